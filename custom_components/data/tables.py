"""Tables that people have: CSV, JSON and JSON lines, the headers in them, the names in their rows, lists to leave out.

Nothing here imports torch or MONAI.
"""

import csv
import io
import json
import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import pandas as pd
from custom_components.errors import InputError
from custom_components.files import no_key_twice, read_text

logger = logging.getLogger(__name__)

CELL_OF_LINES = re.compile(r'(?<![^,;\t\r\n])"(?:[^"]|"")*"(?![^,;\t\r\n])')
# first line of a list to leave out; any other is a name, so that a mistyped one is not taken for a header
EXCLUDE_HEADER = re.compile(
    r"(?i)(?:image|scan|volume|series|file|patient|subject|study|case)?[ _-]?(?:name|id|path)?s?"
)
# split -> what tables and datalists call it
SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "valid": ("valid", "val", "validation", "dev"),
    "test": ("test", "testing"),
}
SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}


def read_table(path: Path) -> pd.DataFrame:
    """A table's rows, all cells as strings. Lists of splits are joined, and a column `split` says whose a row is.

    Raises:
        InputError: it is no CSV, JSON or JSON lines in UTF-8, or a row has more cells than the header.
    """
    try:
        if path.suffix.lower() == ".json":
            lists = json_lists(path)
            if lists and not lists.keys() & {"", *SPLIT_OF}:
                raise InputError(f"{path} has lists {', '.join(lists)}: call them training, validation and testing")
            return _frame([e | ({"split": k} if k else {}) for k in lists if k in ("", *SPLIT_OF) for e in lists[k]])
        text = read_text(path, "a CSV or JSON file")
        if path.suffix.lower() == ".jsonl":
            return _frame(
                [json.loads(line, object_pairs_hook=no_key_twice) for line in text.split("\n") if line.strip()]
            )
        header = text.split("\n", 1)[0]
        separator = max(",;\t", key=header.count)
        names = Counter(name.strip().casefold() for name in next(csv.reader([header], delimiter=separator), ()))
        if repeated := [name for name, count in names.items() if name and count > 1]:
            raise ValueError(f"it has the column {repeated[0]!r} twice")
        with warnings.catch_warnings():  # of cells beyond the header, which would be lost
            warnings.simplefilter("error", pd.errors.ParserWarning)
            # a volume may be called NA: what is empty alone is no value
            options = {"dtype": str, "index_col": False, "keep_default_na": False, "na_values": [""]}
            return pd.read_csv(io.StringIO(text), sep=separator, **options)
    except InputError:
        raise
    # pandas' are ValueErrors
    except (ValueError, AttributeError, TypeError, RecursionError, pd.errors.ParserWarning) as error:
        raise InputError(
            f"{path} cannot be read as a CSV or JSON file in UTF-8 ({str(error).strip().splitlines()[0]}): download it "
            "again, or save it so"
        ) from error


def _frame(records: list[dict]) -> pd.DataFrame:
    """JSON values as cells: true and false are 1 and 0, null is no value."""
    if wrong := [record for record in records if not isinstance(record, dict)]:
        raise ValueError(f"a row is {str(wrong[0])[:50]!r}, and should name its columns")
    cells = pd.DataFrame(records, dtype=object)
    return cells.map(lambda cell: str(int(cell) if isinstance(cell, bool) else cell), na_action="ignore").astype("str")


def json_lists(path: Path) -> dict[str, list[dict]]:
    """Split -> records of a datalist, or "" -> records of a plain list of them; a bare file name is an image."""
    try:
        content = json.loads(read_text(path, "JSON"), object_pairs_hook=no_key_twice)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError
        raise InputError(f"datalist {path} is not JSON ({error}): download it again") from error
    content = content if isinstance(content, dict) else {"": content}
    lists = {key: entries for key, entries in content.items() if isinstance(entries, list)}
    return {k: [{"image": e} if isinstance(e, str) else e for e in entries] for k, entries in lists.items()}


def named_rows(path: Path, id_column: str | None) -> tuple[pd.DataFrame, pd.Series]:
    """The rows that name a volume, and these names; the name of the series is the column's.

    Raises:
        InputError: there is none, or no such column.
    """
    frame = read_table(path)
    if len(frame.columns):
        ids = headers_of(path, frame, {"id": (id_column,)})["id"] if id_column else frame.columns[0]
        named = frame[ids].str.strip().fillna("") != ""
        rest = frame[~named].drop(columns=[ids, "split"], errors="ignore")
        if nameless := int((rest.fillna("").apply(lambda cells: cells.str.strip()) != "").any(axis=1).sum()):
            warn_once(f"{path}: {nameless} rows name no volume ({ids} is empty), and are not used")
        frame = frame[named].reset_index(drop=True)
    if not len(frame):
        raise InputError(f"{path} names no volume: download it again, or give another table")
    return frame, frame[ids].str.strip().str.removesuffix(".nii.gz")


def name_parser(pattern: str | None) -> Callable[[str], dict[str, str]]:
    """Name -> what its parts mean, by the pattern's named groups; nothing for a name of another form."""
    try:
        form = re.compile(pattern or "")
    except re.error as error:
        raise InputError(f"name_pattern {pattern} is no regular expression ({error}): correct it") from error
    return lambda name: {k: v for k, v in match.groupdict().items() if v} if (match := form.fullmatch(name)) else {}


def header_of(frame: pd.DataFrame, *candidates: str | None) -> str | None:
    """The first of the candidates that the table has, whatever its case."""
    headers = {header.strip().casefold(): header for header in frame.columns}
    return next((headers[c.casefold()] for c in candidates if c and c.casefold() in headers), None)


def headers_of(path: Path, frame: pd.DataFrame, wanted: Mapping[str, Sequence[str | None]]) -> dict[str, str]:
    """What -> header, the first of its candidates that the table has; an InputError where it has none."""
    found = {key: header_of(frame, *candidates) for key, candidates in wanted.items()}
    if absent := [next(filter(None, wanted[key])) for key, header in found.items() if header is None]:
        raise InputError(
            f"{path} has no column {', '.join(absent)} (it has {', '.join(frame.columns)}): give another table, rename "
            "its columns, or set the keys that name them"
        )
    return found


def read_exclusion(path: str | os.PathLike | None) -> dict[str, set[str]]:
    """Of a list to leave out, first cell of each line -> the names it may stand for: with and without folders, without
    file ending."""
    cells = [] if path is None else [cell for cell in first_cells(Path(path).expanduser()) if cell]
    lines = {}
    for cell in cells:
        spelt = (cell, cell.split(",")[0].strip())
        lines[cell] = {name.removesuffix(".nii.gz") for part in spelt for name in (part, Path(part).name)}
    return lines


def check_exclusion(
    path: str | os.PathLike, lines: Mapping[str, set[str]], known: set[str], headers: set[str], what: str
) -> None:
    """Raises an InputError for a line that names nothing, as a mistyped one does; the first may be a header."""
    unknown = [cell for cell, names in lines.items() if not names & known]
    if unknown and unknown[0] == next(iter(lines)):
        words = unknown[0].split(",")[0].strip()
        if EXCLUDE_HEADER.fullmatch(words) or words.casefold() in {header.strip().casefold() for header in headers}:
            del unknown[0]
    if unknown:
        raise InputError(
            f"exclude {path}: {len(unknown)} of its {len(lines)} lines name no {what} ({some(unknown)}): correct "
            "them, or take them out"
        )


def first_cells(path: Path) -> list[str]:
    """First cell of each line; of a .txt file the line, since names may hold commas."""
    text = read_text(path)
    if path.suffix.lower() == ".txt":
        return [line.strip().strip('"') for line in text.splitlines()]
    return [row[0].strip() if row else "" for row in csv.reader(io.StringIO(text, newline=""))]


def some(names: Sequence[str]) -> str:
    """The first three, for a message."""
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])


@cache
def warn_once(message: str) -> None:
    """A list is made for each split, and says what is wrong with its table once."""
    logger.warning(message)


@cache
def tell_once(message: str) -> None:
    """As :func:`warn_once`, of what is as it should be."""
    logger.info(message)
