"""Metrics as a person and a program read them: JSON, CSV, and the printed table."""

import csv
import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from custom_components.files import remove_temporary, replacing

LABEL = " (label)"  # ends the name of a column of labels in predictions.csv


def write_report(
    output_dir: str | Path,
    metrics: Mapping[str, Any],
    rows: Sequence[Sequence[Any]],
    table: Sequence[Sequence[str]],
    notes: Sequence[str] = (),
    csv_name: str = "metrics.csv",
) -> None:
    """Print a table, and write ``metrics.json`` and a CSV file to ``output_dir``, each whole at any moment.

    Args:
        rows: of the CSV file, its header first.
        table: rows of text.
        notes: lines to print below it.
    """
    output_dir = Path(output_dir)
    # first what no full disk can take
    terminal = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(*in_columns(table, terminal), *notes, f"tables and figures: {output_dir.resolve()}", sep="\n", flush=True)
    for name in ("metrics.json", csv_name):
        remove_temporary(output_dir / name)
    with replacing(output_dir / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=2) + "\n")
    with replacing(output_dir / csv_name) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def in_columns(table: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """Rows of text as lines, of which the last column goes on below itself where a line exceeds ``width``."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    indent = sum(width + 2 for width in widths[:-1])
    room = max(24, width - indent) if width is not None else max(widths[-1], 1)
    lines = []
    for *cells, last in table:
        first = "".join(cell.ljust(width + 2) for cell, width in zip(cells, widths, strict=False))
        wrapped = textwrap.wrap(last, room) or [""]
        starts = [first, *[" " * indent] * (len(wrapped) - 1)]
        lines += [(start + part).rstrip() for start, part in zip(starts, wrapped, strict=True)]
    return lines


def read_metrics(folder: str | Path) -> dict[str, Any]:
    """What ``metrics.json`` in a folder holds; nothing if there is none."""
    path = Path(folder, "metrics.json")
    return json.loads(path.read_text()) if path.is_file() else {}


def write_predictions(
    path: Path, items: Sequence[Mapping[str, Any]], classes: Sequence[str], truth: np.ndarray, score: np.ndarray
) -> None:
    """A CSV file with a row per volume: its name and patient, and for each class label and score, of ``[N, C]``."""
    frame = pd.DataFrame({key: [item[key] for item in items] for key in ("name", "patient")})
    for name, labels, scores in zip(classes, truth.T, score.T, strict=True):
        frame[name + LABEL], frame[name] = labels.astype(int), scores
    remove_temporary(path)
    with replacing(path) as temporary:
        frame.to_csv(temporary, index=False)
