"""Files that are whole under their name, and what killed processes leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from custom_components.files import remove_temporaries, remove_temporary, replacing


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
