"""What an evaluation leaves: whole files, and a table that lines up."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from custom_components.evaluation.report import in_columns, read_metrics, write_report


def test_a_report_is_json_csv_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    metrics = {"mean": 0.5, "left_out": None}
    rows = [("name", "value"), ("a, b", 0.5), ("c", "")]
    write_report(tmp_path / "new", metrics, rows, [("scan", "dice"), ("a, b", "0.5")], ["a note"], "scans.csv")
    assert read_metrics(tmp_path / "new") == metrics
    with open(tmp_path / "new" / "scans.csv", newline="") as file:
        assert list(csv.reader(file)) == [["name", "value"], ["a, b", "0.5"], ["c", ""]]
    folder = (tmp_path / "new").resolve()
    assert capsys.readouterr().out.splitlines() == [
        "scan  dice", "a, b  0.5", "a note", f"tables and figures: {folder}"
    ]  # fmt: skip
    assert read_metrics(tmp_path) == {}


def test_a_report_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    rows = [("name",), ("a",)]
    write_report(tmp_path, {"mean": 0.5}, rows, rows)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TypeError):
        write_report(tmp_path, {"mean": {1, 2}}, rows, rows)  # a set is not JSON
    with pytest.raises(csv.Error):
        write_report(tmp_path, {"mean": 0.5}, [("name",), 5], rows)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert json.loads(before["metrics.json"]) == {"mean": 0.5}


def test_a_table_fits_a_narrow_terminal() -> None:
    table = [["auc", "all", "0.93", "random 0.50"], ["auc", "a long name", "0.8", "random 0.50, histogram 0.66, n 7"]]
    assert in_columns(table) == [
        "auc  all          0.93  random 0.50",
        "auc  a long name  0.8   random 0.50, histogram 0.66, n 7",
    ]
    assert in_columns(table, 50) == [
        "auc  all          0.93  random 0.50",
        "auc  a long name  0.8   random 0.50, histogram",
        "                        0.66, n 7",
    ]
    assert in_columns([["auc", ""]]) == ["auc"]
