"""Tables of reports and labels, datalists, and folders of scans: files as published in, MONAI datalist (dicts) out.

A datalist holds paths, text and small arrays; voxels are read later, by the transforms. Nothing here knows a data set:
columns, paths and splits are arguments, which the configs name. Nothing here imports torch or MONAI, so that a process
that wants only the list starts fast.
"""

import contextlib
import itertools
import json
import logging
import math
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from string import Formatter

import numpy as np
import pandas as pd
from custom_components.data.tables import (
    CELL_OF_LINES,
    SPLIT_OF,
    SPLITS,
    check_exclusion,
    header_of,
    headers_of,
    json_lists,
    name_parser,
    named_rows,
    read_exclusion,
    some,
    tell_once,
    warn_once,
)
from custom_components.errors import InputError
from custom_components.files import VOXEL_SUFFIXES, read_text

logger = logging.getLogger(__name__)

NIFTI_SUFFIXES: tuple[str, ...] = (".nii", ".nii.gz")
ITK_SUFFIXES: tuple[str, ...] = (".nrrd", ".nhdr", ".mha", ".mhd")
CT_SUFFIXES: tuple[str, ...] = NIFTI_SUFFIXES + ITK_SUFFIXES
# what people keep beside scans and nobody takes for one; any other entry of a folder is read, or refused by name
DOCUMENTS: tuple[str, ...] = (".txt", ".md", ".csv", ".tsv", ".json", ".pdf")
# first line of a list of scans; any other is a path, so that a mistyped one is not taken for a header
LIST_HEADER = re.compile(
    r"(?i)(?:ct|nifti|dicom|image|scan|volume|series|file|folder|path)?[ _-]?(?:path|file|name)?s?"
)

# one file, or those of which the first that there is counts; or such of every split
Files = str | Sequence[str] | None
Tables = Files | Mapping[str, Files]
NO_REPORT = r"not given\.?|n/?a|nan|none|null|-+"  # as CT-RATE, and tables that pandas wrote, say none
SECTIONS = r"findings?|impressions?|conclusions?|technique|comparison|indication|(?:clinical )?history|recommendations?"
# at the start of a line or sentence in any case, elsewhere capitalised: "no significant findings: ..." is no heading
HEADING = re.compile(
    rf"(?:(?:^|(?<=[.;]))[^\S\n]*((?i:{SECTIONS}))|\b({SECTIONS.upper()}|{SECTIONS.title()}))\s*:", re.MULTILINE
)


def no_classes() -> list[str]:
    """Stands for `classes` where no data set is named: raises an InputError that says so."""
    raise InputError(
        "no data set: add the overlay of one behind train.json, such as 'configs/ct_rate.json', or name the columns "
        "of your own labels with the key classes"
    )


def volumes(
    dataset_dir: str | os.PathLike,
    tables: Tables,
    split: str,
    images: str | Sequence[str],
    id_column: str | None = None,
    name_pattern: str | None = None,
    patient_column: str | None = "patient",
    split_column: str | None = "split",
    classes: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
    exclusive: bool = False,
    findings_column: str | None = None,
    impression_column: str | None = None,
    report_column: str | None = None,
    labels: Tables = None,
    masks: str | Sequence[str] | None = None,
    finding_sentences: Tables = None,
    lists_dir: str | os.PathLike | None = None,
    data_fraction: float = 1.0,
    validation_share: float | None = None,
    test_share: float | None = None,
    exclude: str | os.PathLike | None = None,
    seed: int = 42,
    required: bool = True,
    limit: int | None = None,
) -> list[dict]:
    """Volumes of a split with their labels, their reports or both, in the order of the table that names them.

    Every item holds `image` (path), `name` and `patient` and, as the arguments ask,

    - `label`: float32 array of zeros and ones in the order of `classes`; an int, the class' code, where `exclusive`.
      Beside reports, labels are optional: a class without a column is NaN, and no item has `label` without any table;
    - `findings` and `impression`: text, "" where there is none;
    - `masks` (path of the volume's folder of finding masks) and `sentences` (finding -> its sentence of the report).

    A table is a CSV file (commas, semicolons or tabs), a JSON file (a list of records, or split -> list of them, as in
    the Medical Segmentation Decathlon) or JSON lines, in UTF-8. Its splits are

    - those that `tables` maps to files. Of `valid` and `test`, one may be absent, and the other stands for both;
      `train_0.1` may name the training list of a `data_fraction` of 0.1, which is drawn from `train` otherwise;
    - or those of one file's `split_column` or JSON lists, see :data:`SPLITS`;
    - or one file without either, from which `test_share` of the patients are held out for testing.

    With a `validation_share`, validation is that share of the training patients, who are then not trained on. No
    patient stands on both sides of a split that is drawn here. For one seed, the training patients of a smaller
    `data_fraction` are among those of a larger one, and leaving out a patient moves no other.

    Args:
        tables: one file, or split -> file; of several files for one split, the first that there is.
        split: "train", "valid" or "test".
        images: where volumes lie below `dataset_dir`, tried in turn; in braces `name`, columns of the table, and the
            named groups of `name_pattern`.
        id_column: header of the column that names volumes, with or without .nii.gz; the first column when None.
        name_pattern: regular expression of names that say more; its group `patient` does for `patient_column`.
        patient_column, split_column: used where the table has them; a patient is the volume itself otherwise.
        classes: of `label`, in the order of the logits; where they exclude each other, that of the codes 0, 1, ...
        columns: class -> header of its column, where the two differ; `label` -> that of the codes.
        exclusive: whether exactly one class is true of a volume; the column `label` then holds its code.
        findings_column, impression_column: headers of the report's two sections.
        report_column: in place of these two, header of whole reports with the headings "FINDINGS:" and "IMPRESSION:".
        labels: tables of labels beside those of reports; without them, the table of reports is searched for classes.
        masks: where folders of finding masks lie, as `images`; patterns with a word that the table lacks are told of.
        finding_sentences: split -> table with the columns Finding and Sentence beside `id_column`.
        lists_dir: folder that relative paths of tables start from; `dataset_dir` when None.
        data_fraction: share of the training patients to keep, in (0, 1].
        validation_share, test_share: see above; None, as 0, where the config has no such key.
        exclude: text or CSV file whose first column names volumes to leave out, such as those that show no chest, or
            patients, of whom all volumes are left out. Each must be one of this data set, of whatever split.
        required: whether a split that nobody names, or of which no volume is on disk, is an error; False makes it an
            empty list, and tells of the latter.
        limit: of the volumes, roughly: as many patients as hold that many, drawn by `seed`, and only these are asked
            for on disk.

    Raises:
        InputError: a file, a folder, a column or a volume is missing, a name occurs twice or has two reports, a label
            is not 0 or 1 (or no code of a class), nothing is left of a split, or an argument is out of range.
    """
    if split not in SPLITS:
        raise InputError(f"split is {split!r}: give train, valid or test")
    shares = {"validation_share": validation_share, "test_share": test_share}
    shares = {key: share for key, share in shares.items() if share is not None}
    for key, share in shares.items():
        if not 0 <= share < 1:
            raise InputError(f"{key} is {share}: give a share from 0 up to, not including, 1, such as 0.1 for 10 %")
    dataset_dir = Path(dataset_dir).expanduser()
    if not dataset_dir.is_dir():
        raise InputError(f"dataset_dir {dataset_dir} is no folder: give the one that holds the volumes")
    folder = dataset_dir if lists_dir is None else Path(lists_dir).expanduser()
    sections = {"findings": findings_column, "impression": impression_column}
    sections = {k: v for k, v in ({"report": report_column} if report_column else sections).items() if v}
    what = "reports" if sections else "labels"
    columns = columns or {}
    parse = name_parser(name_pattern)
    images, masks = ([places] if isinstance(places, str) else list(places or ()) for places in (images, masks))
    for key, patterns in (("images", images), ("masks", masks)):
        check_patterns(key, patterns)
    mentioned = set().union(*map(words_of, (*images, *masks)))

    named = cache(lambda path: named_rows(path, id_column))

    def owners(frame: pd.DataFrame, names: pd.Series) -> pd.Series:
        """The patient of each row: by its cell, or by its name where that is empty."""
        if (header := header_of(frame, patient_column)) is None:
            return names.map(lambda name: parse(name).get("patient", name))
        patients = frame[header].str.strip()
        return patients.where(patients.fillna("") != "", names)

    def read(path: Path, sections: Mapping[str, str] = sections) -> list[dict]:
        frame, names = named(path)
        parts = [parse(name) for name in names]
        patients, splits = header_of(frame, patient_column), header_of(frame, split_column)
        cells = frame[[header for header in frame if header in mentioned]].to_dict("records")
        cells = [{header: cell for header, cell in row.items() if cell == cell} for row in cells]  # without NaN
        content = {
            "name": names,
            "patient": owners(frame, names),
            "split": [None] * len(frame) if splits is None else _split_of(path, frame[splits]),
            "words": [{**cell, **part, "name": name} for cell, part, name in zip(cells, parts, names, strict=True)],
        }
        if sections:
            content |= _reports(path, frame, names, sections)
        wanted = {name: (name, columns.get(name)) for name in (["label"] if exclusive else classes)}
        if what == "reports":  # beside them, labels are optional
            wanted = {name: candidates for name, candidates in wanted.items() if header_of(frame, *candidates)}
        headers = headers_of(path, frame, wanted)
        used = {names.name, patients, splits, *mentioned, *headers.values()}
        if what == "labels" and (extra := [header for header in frame if header not in used]):
            warn_once(f"{path}: {len(extra)} columns are no class, and are not used: {', '.join(extra)}")
        if headers or not sections:
            content["label"] = _labels(path, frame, names, headers, classes, exclusive)
        return _once(path, [dict(zip(content, row, strict=True)) for row in zip(*content.values(), strict=True)])

    if isinstance(tables, Mapping):
        part = cache(lambda key: read(path) if (path := _first(tables.get(key), folder)) else [])
    else:
        every = read(_first(tables, folder, what))
        _tell_unlisted(images, dataset_dir, {row["name"] for row in every}, tables)
        part = _parts(every, test_share or 0.0, seed).get
    source, rows, order = _select(part, split, data_fraction, validation_share or 0.0, seed)
    if not rows and not required:
        return []
    if not rows:
        sought = tables.get(split) or "none is named" if isinstance(tables, Mapping) else tables
        sought = sought if isinstance(sought, str) else ", ".join(sought)
        evaluated = "test" if "test_share" in shares else "valid" if shares else None  # by a training, in the end
        cure = ", or give evaluate_after_training false" if split == evaluated else ""
        found = "; ".join([sought, *(f"{key} {share}" for key, share in shares.items())])
        raise InputError(
            f"{'dataset_dir' if lists_dir is None else 'lists_dir'} {folder} has no {what} of split {split} ({found}): "
            f"put them there, or change {' or '.join([*shares, what])}{cure}"
        )
    lines = read_exclusion(exclude)
    if lines:  # of any split, since one list serves all
        files = tables.values() if isinstance(tables, Mapping) else [tables]
        known, headers = set(), set()
        for frame, names in (named(path) for each in files if (path := _first(each, folder))):
            known |= {*names, *owners(frame, names)}
            headers |= {*frame.columns}
        check_exclusion(exclude, lines, known, headers, f"volume or patient of {what}")
    excluded = set().union(*lines.values())
    rows = [row for row in rows if not {row["name"], row["patient"]} & excluded]
    if isinstance(tables, Mapping) and source != "train" and (path := _first(tables.get("train"), folder)):
        with contextlib.suppress(InputError):  # of the table, which a training tells
            of_training = zip(owners(*named(path)), named(path)[1], strict=True)
            of_training = [("train", *each) for each in of_training if not {*each} & excluded]
            _tell_shared([*of_training, *((source, row["patient"], row["name"]) for row in rows)])
    if not rows:
        raise InputError(f"exclude {exclude} names every volume of split {split}: take out those to be used")
    if order is not None:
        # It was drawn before any patient was left out: an exclusion does not reshuffle it.
        chosen = _chosen({row["patient"] for row in rows}, order, data_fraction)
        rows = [row for row in rows if row["patient"] in chosen]
    if limit is not None:
        counts = Counter(row["patient"] for row in rows)
        drawn = shuffled(list(counts), seed)
        enough = np.searchsorted(np.cumsum([counts[patient] for patient in drawn]), limit) + 1
        chosen = set(drawn[:enough])
        rows = [row for row in rows if row["patient"] in chosen]
    if what == "labels":
        _tell_absent(rows, split, classes, exclusive)

    missing = []
    for row in rows:
        tried, row["image"] = find_file(images, dataset_dir, row["words"])
        if row["image"] is None:
            missing.append(tried)
    if not required and len(missing) == len(rows):
        warn_once(f"no volume of split {split} is on disk ({some(missing)}): going on without that split")
        return []
    if missing:
        raise InputError(
            f"{len(missing)} of {len(rows)} volumes of split {split} are not on disk ({some(missing)}): put them "
            "there, set dataset_dir or images, or list their names in a file given as exclude"
        )
    patients = len({row["patient"] for row in rows})
    tell_once(f"split {split}: {len(rows)} volumes of {patients} patients, of the {what} in {folder}")
    # asked for once, and not for every volume
    masks = [place for place in masks if os.path.isdir(dataset_dir / os.path.dirname(place.split("{")[0]))]
    lacks = {word for place in masks for word in words_of(place) if any(word not in row["words"] for row in rows)}
    if lacks:
        masks = [place for place in masks if not words_of(place) & lacks]
        warn_once(
            f"masks asks for {', '.join(sorted(lacks))} of each volume, which the {what} in {folder} do not give: such "
            "masks of findings are not used; correct masks, or set it to null"
        )
    beside = _beside(labels, source, folder, "labels") if sections else None
    known = {row["name"]: row["label"] for row in read(beside, {})} if beside else {}
    if beside and (unknown := [row["name"] for row in rows if row["name"] not in known]):
        raise InputError(
            f"{beside} has no row for {len(unknown)} of {len(rows)} volumes ({some(unknown)}): download it again, or "
            "list their names in a file given as exclude"
        )
    said = _beside(finding_sentences, source, folder, "finding_sentences")
    sentences = _finding_sentences(said, id_column) if said else {}
    return [
        {key: value for key, value in row.items() if key not in ("split", "words")}
        | ({"label": known[row["name"]]} if beside else {})
        | ({"masks": found} if masks and (found := find_file(masks, dataset_dir, row["words"])[1]) else {})
        | ({"sentences": sentences.get(row["name"], {})} if said else {})
        for row in rows
    ]


def msd(
    dataset_dir: str | os.PathLike,
    datalist: str | os.PathLike = "dataset.json",
    split: str = "training",
    data_fraction: float = 1.0,
    exclude: str | os.PathLike | None = None,
    seed: int = 42,
    labelled: bool = False,
    key: str = "split",
    required: bool = True,
) -> list[dict]:
    """A list in the layout of the Medical Segmentation Decathlon, as the authors publish for LUNA16 and BTCV.

    LUNA16's have `training`, `validation` and `testing`, each of `{"image": path, "label": path}`; BTCV's have
    `training` and `validation`, and a `test` of bare file names without labels. Every item holds `image`, `name` (as
    :func:`scans` makes it) and, where the list gives one, `label`; in the list's order.

    Args:
        dataset_dir: folder that relative paths start from; bare file names are also looked for in its `imagesTs`.
        datalist: the JSON file, absolute or relative to `dataset_dir`.
        split: which list of the file.
        data_fraction, exclude, seed: as in :func:`volumes`; each item counts as a patient of its own.
        labelled: whether every item must have a label, which those of BTCV's `test` list do not.
        key: that names the split, for the message where there is none.
        required: whether a file without this list is an error; False makes it an empty one.

    Raises:
        InputError: the file is missing, not such a list, or has no `split` that is required; an image or label is not
            on disk; an item lacks the label that it must have; nothing is left.
    """
    dataset_dir = Path(dataset_dir).expanduser()
    path = dataset_dir / Path(datalist).expanduser()
    if not path.is_file():
        raise InputError(f"datalist {path} does not exist: give dataset_dir, and a datalist in it or an absolute path")
    lists = json_lists(path)
    if "" in lists:
        raise InputError(f"datalist {path} is a plain list: say which split it is, as {{{json.dumps(split)}: [...]}}")
    if not lists.get(split) and not required:
        return []
    if not lists.get(split):
        raise InputError(
            f"{key} is {split}, and datalist {path} has no such list (it has {', '.join(lists) or 'none'}): set {key} "
            "to one of them"
        )

    items: dict[str, dict] = {}
    for entry in lists[split]:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key, ""), str) for key in ("image", "label")):
            raise InputError(f"datalist {path}: {split} holds {entry!r}, not a file name or an image with its label")
        if not entry.get("image"):
            raise InputError(f"datalist {path}: {split} holds {entry!r} without an image: add its path")
        tried, found = find_file(("{image}", "imagesTs/{image}"), dataset_dir, entry)
        item = {"image": found or tried}
        if entry.get("label"):
            item["label"] = prepared(dataset_dir / entry["label"])
        if items.setdefault(os.path.abspath(item["image"]), item) != item:
            raise InputError(f"datalist {path}: {split} names {entry['image']} twice, with different labels: keep one")
    if repeated := len(lists[split]) - len(items):
        warn_once(f"datalist {path}: {repeated} entries of {split} repeat an image, used once")
    lines = read_exclusion(exclude)
    if lines:  # of any list of the file, since one serves all
        named = [entry.get("image") for part in lists.values() for entry in part if isinstance(entry, dict)]
        known = {Path(image).name.removesuffix(".nii.gz") for image in named if isinstance(image, str)}
        known |= {stem(dataset_dir / image) for image in named if isinstance(image, str)}
        check_exclusion(exclude, lines, known, set(), f"image of datalist {path}")
    excluded = set().union(*lines.values())
    paths = [Path(item["image"]) for item in items.values()]
    # a file that is not there keeps its ending in its name
    kept = [i for i, image in enumerate(paths) if stem(image).removesuffix(".nii.gz") not in excluded]
    if not kept:
        raise InputError(f"exclude {exclude} leaves nothing of {split} in datalist {path}: change one of the two")
    items = [item | {"name": name} for item, name in zip(items.values(), unique_names(paths), strict=True)]
    items = [items[i] for i in sorted(_chosen(set(kept), shuffled(range(len(items)), seed), data_fraction))]

    missing = [file for item in items for key, file in item.items() if key != "name" and not os.path.exists(file)]
    if missing:
        raise InputError(
            f"{len(missing)} files of {split} in datalist {path} are not on disk ({some(missing)}): set dataset_dir "
            "to the folder that they are relative to"
        )
    if labelled and (absent := [item["name"] for item in items if "label" not in item]):
        raise InputError(
            f"{len(absent)} of {len(items)} items have no label, the first {absent[0]}: "
            "choose another list of the datalist, or run inference.json on the images"
        )
    return items


def prepared(path: str | os.PathLike) -> str:
    """`path` of a published list, or, where only that is on disk, the uncompressed .nii that stands for its .nii.gz."""
    path = os.fspath(path)
    plain = path.removesuffix(".gz")
    return plain if path.endswith(".nii.gz") and not os.path.exists(path) and os.path.exists(plain) else path


def mask_file_name(finding: str) -> str:
    """``Lung nodule`` -> ``lung_nodule.nii.gz``: a finding's mask in a volume's folder under ``masks``."""
    return finding.lower().replace(" ", "_") + ".nii.gz"


def scans(path: str | os.PathLike, scans_file: str | os.PathLike | None = None) -> list[dict]:
    """Items `{"image": path, "name": name}` of a CT file, of a DICOM folder, of a folder of such files and folders, or
    of a list: a .csv or .txt file that holds a path a line, up to a comma, semicolon or tab that is no part of it;
    relative ones start from the list's own folder.

    Nothing is left out in silence: every line of a list but its header, and every entry of a folder, is an item, and
    what cannot be read is refused by its reader. Hidden files, documents (:data:`DOCUMENTS`) and files that a header
    beside them names as its voxels are no entries.

    A folder is a DICOM folder if DICOM files lie directly in it; its own path is then the image. Items are sorted by
    path, or as listed. No two have the same name: it is the file's without its ending; or with it, where two files of
    one folder differ in nothing else; and with as many of its folders as tell it from others.

    Args:
        scans_file: such a list, in place of `path`. What it holds is data, whatever it looks like: MONAI evaluates
            values of keys that begin with `$`, `@` or `%`, and never sees this.

    Raises:
        InputError: `path` does not exist, or holds nothing that can be a CT by its name; `scans_file` is no list.
    """
    if scans_file is not None and Path(scans_file).suffix.lower() not in (".csv", ".txt"):
        raise InputError(f"scans_file {scans_file} is no list: give a .txt file, a scan a line, or a .csv file")
    path = Path(path if scans_file is None else scans_file).expanduser()
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist: give a CT file, a DICOM folder, or a folder that holds such")
    if path.is_file() and path.suffix.lower() in (".csv", ".txt"):
        paths = _listed(path)
        if not any(os.path.exists(entry) or entry.name.lower().endswith(CT_SUFFIXES) for entry in paths):
            raise InputError(f"{path} lists no CT: write one path of a CT file or DICOM folder a line")
    elif path.is_file() and _is_scan(path):
        paths = [path]
    elif path.is_file():
        advice = "give the folder of its series" if _is_dicom_file(path) else "convert it to one of them"
        raise InputError(f"{path} is neither {', '.join(CT_SUFFIXES)} nor a DICOM folder: {advice}")
    elif not path.is_dir():
        raise InputError(f"{path} is neither a file nor a folder: give a CT file or a folder")
    else:
        paths = _entries(path)
        if _is_scan(path):  # what else lies in a series' folder is its reader's to judge
            paths = [path, *filter(_is_scan, paths)]
        elif not any(_is_scan(entry) or entry.name.lower().endswith(CT_SUFFIXES) for entry in paths):
            raise InputError(
                f"{path} holds no {', '.join(CT_SUFFIXES)} or DICOM file, and no subfolder with DICOM files: "
                "give the folder directly above the scans"
            )
    return [{"image": str(entry), "name": name} for entry, name in zip(paths, unique_names(paths), strict=True)]


def _listed(path: Path) -> list[Path]:
    """What a list names, each path once, without its header."""
    text = read_text(path)
    if path.suffix.lower() == ".csv":  # a cell of several lines, such as a comment, is no line of the list
        text = CELL_OF_LINES.sub(lambda cell: " ".join(cell[0].splitlines()), text)
    lines = [line.strip() for line in text.splitlines() if line.strip(" \t,;")]
    paths = [_path_in(line, path.parent) for line in lines]
    if paths and LIST_HEADER.fullmatch(paths[0].name) and not os.path.lexists(paths[0]):
        del paths[0]
    once: dict[str, Path] = {}
    for entry in paths:
        once.setdefault(os.path.abspath(entry), entry)
    return list(once.values())


def _path_in(line: str, folder: Path) -> Path:
    """The path that a line of a list begins with: quoted, or as long as there is a file of that name."""
    if quoted := re.match(r'"((?:[^"]|"")+)"', line):
        return folder / os.path.expanduser(quoted[1].replace('""', '"'))
    starts = [line[: end.start()].strip() for end in re.finditer(r"[,;\t]|$", line)]
    paths = [folder / os.path.expanduser(start) for start in starts if start] or [folder / line]
    there = [entry for entry in paths if os.path.lexists(entry)]
    return [*there[-1:], *(entry for entry in paths if entry.name.lower().endswith(CT_SUFFIXES)), paths[0]][0]


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder and may be a scan by its name, sorted."""
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder} cannot be opened ({error.strerror}): allow it, or give another folder") from error
    entries = [entry for entry in entries if not entry.name.lower().endswith(DOCUMENTS) or entry.is_dir()]
    headers = [entry for entry in entries if entry.suffix.lower() in VOXEL_SUFFIXES and entry.is_file()]
    named = [name for header in headers for name in _voxel_files(header)]
    used = re.compile("|".join(named) or r"(?!)")
    return [entry for entry in entries if not used.fullmatch(entry.name)]


def _voxel_files(header: Path) -> list[str]:
    """Regular expressions of the files in its own folder that a .mhd or .nhdr may name: every word of it is one."""
    try:
        with open(header, "rb") as file:
            text = file.read(1 << 20).decode("latin-1")
    except OSError:  # its reader will say so
        return []
    own = [re.escape(header.stem + suffix) for suffix in VOXEL_SUFFIXES[header.suffix.lower()]]
    lines = text.splitlines()
    words = {word.strip().removeprefix("./") for line in lines for word in (*line.split(), re.split("[=:]", line)[-1])}
    files = {word for word in words if "." in word and "/" not in word and not word.lower().endswith(CT_SUFFIXES)}
    return own + [re.sub(r"%0?\d*d", r"\\d+", re.escape(file)) for file in files]


def unique_names(paths: Sequence[Path]) -> list[str]:
    """A name of each path that no other has, in any case of its letters, and which says where it lies if it must."""
    paths = [Path(os.path.abspath(path)) for path in paths]
    stems = [stem(path) for path in paths]
    if _repeated([f"{path.parent}/{stem}" for path, stem in zip(paths, stems, strict=True)]):
        stems = [path.name for path in paths]
    parents = [path.parent.parts[1:] for path in paths]
    names, depths = list(stems), [0] * len(paths)
    groups = _repeated(stems)
    while groups:
        group = groups.pop()
        if len({parents[i] for i in group}) > 1:
            for i in group:
                depths[i] += 1
                names[i] = "_".join([*parents[i][-depths[i] :], stems[i]])
            groups += [[group[i] for i in same] for same in _repeated([names[i] for i in group])]
    taken: set[str] = set()
    # not every character can be written to a table or a picture
    names = ["".join(c if c.isprintable() else "_" for c in name) for name in names]
    for i, name in enumerate(names):  # a_b/c and a/b_c are alike by now, as are a and A
        numbers = itertools.count(2)
        while _folded(names[i]) in taken:
            names[i] = f"{name}_{next(numbers)}"
        taken.add(_folded(names[i]))
    return names


def _repeated(names: Sequence[str]) -> list[list[int]]:
    """Of each name that stands there more than once, in any case of its letters: where."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(names):
        places[_folded(name)].append(place)
    return [same for same in places.values() if len(same) > 1]


def _folded(name: str) -> str:
    """What is one name to some file systems: in any case of its letters, with accents as letters or as marks."""
    return unicodedata.normalize("NFC", name.casefold())


def _finding_sentences(path: Path, id_column: str | None) -> dict[str, dict[str, str]]:
    """Volume -> finding -> the sentence of the report that speaks of it."""
    frame, names = named_rows(path, id_column)
    headers = headers_of(path, frame, {key: (key,) for key in ("Finding", "Sentence")})
    findings, sentences = (frame[header].fillna("").str.strip() for header in headers.values())
    said: dict[str, dict[str, str]] = defaultdict(dict)
    for name, of, text in zip(names, findings, sentences, strict=True):
        if not text:  # the report says nothing of that finding
            continue
        if not of:
            raise InputError(f"{path} has no Finding of {name} for {text!r}: fill it in, or take the row out")
        if said[name].setdefault(of, text) != text:
            raise InputError(f"{path} has two sentences of {name} for {of}: keep one")
    if empty := sentences.eq("").sum():
        warn_once(f"{path}: {empty} of {len(sentences)} rows have no Sentence, and are not used")
    return dict(said)


def _split_of(path: Path, words: pd.Series) -> list[str]:
    if unknown := [word for word in words.unique() if str(word).strip().lower() not in SPLIT_OF]:
        raise InputError(
            f"{path}: {words.name} is {unknown[0]!r}: make it train, valid or test, or set split_column to null"
        )
    return [SPLIT_OF[word.strip().lower()] for word in words]


def _reports(path: Path, frame: pd.DataFrame, names: pd.Series, sections: Mapping[str, str]) -> dict[str, list[str]]:
    """Findings and impression, from a column each or from whole reports."""
    texts = {}
    for key, header in headers_of(path, frame, {key: (header,) for key, header in sections.items()}).items():
        text = frame[header].fillna("").str.strip()
        texts[key] = text.mask(text.str.fullmatch(NO_REPORT, case=False), "").tolist()
    if "report" in texts:
        parted = [_sections(report) for report in texts["report"]]
        plain = [name for name, part, text in zip(names, parted, texts["report"], strict=True) if text and part is None]
        if plain:
            warn_once(
                f"{path}: {len(plain)} of {len(names)} reports have no heading FINDINGS: or IMPRESSION: "
                f"({some(plain)}), and all of their text is taken for findings"
            )
        pairs = [part or (text, "") for part, text in zip(parted, texts["report"], strict=True)]
        texts = {"findings": [findings for findings, _ in pairs], "impression": [impression for _, impression in pairs]}
    texts = {key: texts.get(key) or [""] * len(names) for key in ("findings", "impression")}
    if empty := [name for name, *text in zip(names, *texts.values(), strict=True) if not any(text)]:
        warn_once(
            f"{path}: {len(empty)} of {len(names)} reports are empty ({some(empty)}): of these volumes only the "
            "images are trained on; list their names in a file given as exclude to leave them out"
        )
    return texts


def _sections(report: str) -> tuple[str, str] | None:
    """Findings and impression of a whole report, without its other sections; None where it has no such heading."""
    found: dict[str, list[str]] = defaultdict(list)
    _, *parts = HEADING.split(report)
    for word, capitals, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        name = (word or capitals).lower().rstrip("s")
        found["impression" if name == "conclusion" else name].append(text.strip())
    if not found.keys() & {"finding", "impression"}:
        return None
    return "\n".join(found["finding"]), "\n".join(found["impression"])


def _labels(
    path: Path, frame: pd.DataFrame, names: pd.Series, headers: dict[str, str], classes: Sequence[str], exclusive: bool
) -> list:
    """Per row an array of zeros and ones in the order of the classes, or a code; NaN for a class without a header."""
    cells = frame[list(headers.values())].set_axis(list(headers), axis=1)
    values = cells.apply(pd.to_numeric, errors="coerce").astype(np.float32)
    if len(wrong := np.argwhere(~np.isin(values, range(len(classes)) if exclusive else (0, 1)))):
        row, column = wrong[0]
        raise InputError(
            f"{path}: {cells.columns[column]} of {names.iloc[row]} is {cells.iloc[row, column]}: make it "
            f"{f'a code from 0 to {len(classes) - 1}' if exclusive else '0 or 1'}"
        )
    if exclusive:
        return values["label"].astype(int).tolist()
    return list(values.reindex(columns=list(classes)).to_numpy(np.float32, copy=True))


def _once(path: Path, rows: list[dict]) -> list[dict]:
    """Rows of which each names another volume, within its split; a row that is only repeated is left out."""
    first: dict[tuple, dict] = {}
    repeated = []
    scans: dict[str, set[tuple]] = defaultdict(set)
    for row in rows:
        report = row.get("findings"), row.get("impression")
        scans[row["words"].get("scan", row["name"])].add(report)
        other = first.setdefault((row["split"], row["name"]), row)
        if other is row:
            continue
        repeated.append(row["name"])
        if "findings" not in row:
            raise InputError(f"{path} names {row['name']} twice: keep one row per volume")
        if report != (other["findings"], other["impression"]):
            raise InputError(f"{path} has two different reports of {row['name']}: keep one row per volume")
        own, others = (
            [repr(np.asarray(r.get(key)).tolist()) for key in ("label", "patient", "words")] for r in (row, other)
        )
        if own != others:
            raise InputError(f"{path} names {row['name']} twice, and differently: keep one row per volume")
    if several := [scan for scan, reports in scans.items() if len(reports) > 1]:
        warn_once(f"{path}: {len(several)} scans have several reports ({some(several)}): each volume keeps its own")
    if repeated:
        warn_once(f"{path}: {len(repeated)} rows repeat a volume with the same report ({some(repeated)}), used once")
    return list(first.values())


def _parts(rows: list[dict], test_share: float, seed: int) -> dict[str, list[dict]]:
    """Split -> rows of one table: as its rows say, or `test_share` of the patients for testing."""
    if any(row["split"] for row in rows):
        _tell_shared((row["split"], row["patient"], row["name"]) for row in rows)
        return {split: [row for row in rows if row["split"] == split] for split in SPLITS}
    order = _order(rows, seed)
    held_out = set(order[len(order) - round(test_share * len(order)) :])
    testing = [row for row in rows if row["patient"] in held_out]
    return {"train": [row for row in rows if row["patient"] not in held_out], "test": testing}


def _select(
    part: Callable[[str], list[dict] | None], split: str, data_fraction: float, validation_share: float, seed: int
) -> tuple[str, list[dict] | None, list[Hashable] | None]:
    """Of the parts of a data set: which one a split is taken from, its rows, and the order to draw a fraction in."""
    if split != "train" and not (split == "valid" and validation_share):
        source = split if part(split) else "test" if split == "valid" else "valid"
        return source, part(source), None
    every = part("train") or []
    order = _order(every, seed)
    held_out = set(order[len(order) - max(1, round(validation_share * len(order))) :] if validation_share else ())
    own = part(f"train_{data_fraction:g}") if split == "train" and data_fraction < 1 else None
    rows = [row for row in own or every if (row["patient"] in held_out) == (split == "valid")]
    return "train", rows, None if own or split == "valid" else order


def _order(rows: Sequence[Mapping[str, object]], seed: int) -> list[Hashable]:
    """Patients in a random order, any stretch of which has its share of each finding, as far as whole patients allow.

    A patient counts for the rarest of his findings, so that the rare ones, which a small stretch would lack, are spread
    most evenly.
    """
    order = shuffled([row["patient"] for row in rows], seed)
    findings: dict[Hashable, np.ndarray] = {}
    for row in rows:
        if (label := row.get("label")) is not None:
            found = np.nan_to_num(label) if isinstance(label, np.ndarray) else np.eye(label + 1)[label]
            before = findings.get(row["patient"], np.zeros(0))
            width = max(len(found), len(before))
            findings[row["patient"]] = np.maximum(*(np.pad(v, (0, width - len(v))) for v in (found, before)))
    if not order or len(findings) < len(order):
        return order
    width = max(map(len, findings.values()))
    present = np.stack([np.pad(findings[patient], (0, width - len(findings[patient]))) for patient in order]) > 0
    count = np.where(present, present.sum(0), len(order) + 1)
    rarest = np.where(present.any(1), count.argmin(1), width)
    place, random = np.empty(len(order)), np.random.RandomState(seed)
    for finding in np.unique(rarest):
        those = np.flatnonzero(rarest == finding)
        place[those] = (np.arange(len(those)) + random.uniform(size=len(those))) / len(those)
    return [order[i] for i in place.argsort(kind="stable")]


def shuffled(owners: Sequence[Hashable], seed: int) -> list[Hashable]:
    """Each owner once, in an order that follows from the seed and from who they are, not from how they are listed."""
    return np.random.RandomState(seed).permutation(sorted(set(owners))).tolist()


def _chosen(left: set[Hashable], order: Sequence[Hashable], data_fraction: float) -> set[Hashable]:
    """The first `data_fraction` of those that are left, in `order`."""
    if not 0 < data_fraction <= 1:
        raise InputError(f"data_fraction is {data_fraction}: give a share above 0 and up to 1, such as 0.1 for 10 %")
    # Without the small number, rounding would take 8 of 100 patients for 0.07 * 100 = 7.000000000000001.
    count = math.ceil(data_fraction * len(left) - 1e-9)
    return set([owner for owner in order if owner in left][:count])


def _tell_absent(rows: Sequence[Mapping[str, object]], split: str, classes: Sequence[str], exclusive: bool) -> None:
    """Warn of classes that no volume of a split has, or all of them."""
    labels = np.stack([row["label"] for row in rows])
    labels = np.eye(len(classes))[labels] if exclusive else labels
    absent = [name for name, column in zip(classes, labels.T, strict=True) if not column.any()]
    always = [name for name, column in zip(classes, labels.T, strict=True) if column.all()]
    for names, how in ((absent, "has none of"), (always, "has nothing but")):
        if names:
            warn_once(
                f"split {split}, {len(rows)} volumes, {how}: {', '.join(names)}; raise data_fraction or its share"
            )


def _tell_shared(rows: Iterable[tuple[str, str, str]]) -> None:
    """Warn of patients in several splits, or else of volumes, by rows of split, patient and volume."""
    splits: dict[str, dict[str, set[str]]] = {"patients": defaultdict(set), "volumes": defaultdict(set)}
    for split, *names in rows:
        for of, name in zip(splits.values(), names, strict=True):
            of[name].add(split)
    for what, of in splits.items():
        if several := [name for name, found in of.items() if len(found) > 1]:
            warn_once(f"{len(several)} {what} stand in several splits ({some(several)}): scores will be too good")
            return


def _tell_unlisted(images: Sequence[str], dataset_dir: Path, names: set[str], table: Files) -> None:
    """Warn of files beside the volumes that no row names, where one folder holds all."""
    for before, _, after in (place.partition("{name}") for place in images):
        folder = dataset_dir / os.path.dirname(before)
        if words_of(before + after) or "/" in after or not after or not folder.is_dir():
            continue
        start = os.path.basename(before)
        files = [file for file in os.listdir(folder) if file.startswith(start) and file.endswith(after)]
        if unlisted := sorted({file[len(start) : len(file) - len(after)] for file in files} - names):
            warn_once(
                f"{folder}: {len(unlisted)} of {len(files)} volumes ({some(unlisted)}) have no row in {table}: left out"
            )


def words_of(pattern: str) -> set[str]:
    """The words in braces of a pattern of paths; of ``{name[0]}``, a part of one, the word."""
    return {re.split(r"[.[]", word)[0] for _, word, *_ in Formatter().parse(pattern) if word}


def check_patterns(key: str, patterns: Sequence[str]) -> None:
    """Raises an InputError for a pattern of paths, given as `key`, that no words could fill in."""
    for pattern in patterns:
        try:
            # as long as a file's name may be, so that a part of a word is found
            pattern.format(**dict.fromkeys(words_of(pattern), "x" * 255))
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise InputError(
                f"{key} is {pattern!r}, which cannot be filled in ({error}): write one word in each pair of braces, "
                "such as 'scans/{name}.nii.gz'"
            ) from error


def _first(files: Files, folder: Path, key: str | None = None) -> Path | None:
    """The first of some files, absolute or relative to a folder, that there is; with a `key`, one must be there."""
    paths = (folder / Path(file).expanduser() for file in ([files] if isinstance(files, str) else files or ()))
    path = next((path for path in paths if path.is_file()), None)
    if key and path is None:
        raise InputError(f"{key} is {files}, and {folder} has no such file: set {key} to the table of the volumes")
    return path


def _beside(tables: Tables, split: str, folder: Path, key: str) -> Path | None:
    """The table that belongs to a split, if there is any; one that is named alone must be there."""
    files = tables.get(split) if isinstance(tables, Mapping) else tables
    return _first(files, folder, key if isinstance(tables, str) else None)


def find_file(patterns: Sequence[str], dataset_dir: Path, words: Mapping[str, str]) -> tuple[str, str | None]:
    """Of the patterns whose words a volume has, filled in: the first, and the first that exists."""
    tried = []
    for pattern in patterns:
        try:
            tried.append(prepared(os.path.join(dataset_dir, pattern.format(**words))))
        except (KeyError, IndexError):  # a word that this volume does not have
            continue
        if os.path.exists(tried[-1]):
            return tried[0], tried[-1]
    if not tried:
        raise InputError(
            f"{words['name']!r} does not have all words of {', '.join(patterns)}: correct it, name_pattern, or images"
        )
    return tried[0], None


def _is_scan(path: Path) -> bool:
    """A CT file by its ending, or a folder with DICOM files, of which DICOMDIR is but an index of the series below."""
    try:
        if path.is_dir():
            return any(entry.name != "DICOMDIR" and _is_dicom_file(entry) for entry in path.iterdir())
        # macOS leaves a "._scan.nii.gz" beside every scan.nii.gz that it copies
        return path.name.lower().endswith(CT_SUFFIXES) and not path.name.startswith(".") and path.is_file()
    except OSError:  # not allowed to look
        return False


def _is_dicom_file(path: Path) -> bool:
    """By its ending or, as many files of a series have none or end in a number, by the four letters at byte 128."""
    if path.name.startswith(".") or not path.is_file():
        return False
    if path.suffix.lower() == ".dcm":
        return True
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def stem(path: Path) -> str:
    """Name of a CT file without its ending (.nii.gz is one); the whole name of a folder."""
    suffix = next((suffix for suffix in CT_SUFFIXES if path.name.lower().endswith(suffix)), "")
    return path.name[: -len(suffix)] or path.name if suffix and os.path.isfile(path) else path.name
