"""Files that are whole under their name, what killed processes leave, and stamps of a change."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from custom_components.files import file_stamp, remove_temporaries, remove_temporary, replacing


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "scan.nii.gz"
    with replacing(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists() and temporary.name.endswith(".nii.gz") and temporary.name.startswith(".")
    with pytest.raises(KeyError), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert [file.name for file in path.parent.iterdir()] == ["scan.nii.gz"] and path.read_text() == "whole"


def test_what_killed_processes_left_goes_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    others = ["a/b[1].pt", "a/.1.tmp.c.pt", "a/.b[1].pt", "a/1.tmp.b[1].pt"]
    left = ["a/.1.tmp.b[1].pt", "a/.23.tmp.b[1].pt"]
    for clear in (
        lambda: remove_temporary(tmp_path / "a" / "b[1].pt"),
        lambda: remove_temporaries(tmp_path, ["a/b[1].pt", "a/d.pt"]),
    ):
        for name in others + left:
            (tmp_path / name).touch()
        clear()
        assert {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.pt")} == set(others)


@pytest.mark.parametrize("header, voxels", [("a.mhd", "a.raw"), ("a.mhd", "a.zraw"), ("a.nhdr", "a.raw.gz")])
def test_stamp_of_a_header_sees_its_voxels(tmp_path: Path, header: str, voxels: str) -> None:
    (tmp_path / header).write_text("header")
    (tmp_path / voxels).write_bytes(b"1234")
    (tmp_path / "a.csv").touch()
    before = file_stamp(tmp_path / header)
    assert file_stamp(str(tmp_path / header)) == before
    (tmp_path / voxels).write_bytes(b"12345")
    assert file_stamp(tmp_path / header) != before
    (tmp_path / header).unlink()
    with pytest.raises(FileNotFoundError):
        file_stamp(tmp_path / header)


def test_stamps_are_those_that_prepared_data_sets_hold(tmp_path: Path) -> None:
    """Their manifests were written by them: in another format, terabytes would be prepared anew."""
    for number, name in enumerate(("a.mhd", "a.raw", "b.nii.gz", "slices/1.png", "slices/2.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"0" * (number + 1))
        os.utime(tmp_path / name, ns=(0, 1_700_000_000_000_000_000 + number))
    found = [file_stamp(tmp_path / name) for name in ("a.mhd", "b.nii.gz", "slices")]
    assert found == ["2:3:1700000000000000001", "1:3:1700000000000000002", "2:9:1700000000000000004"]
