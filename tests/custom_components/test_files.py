"""Files that are whole under their name, one writer at a time, what killed processes leave, and stamps of a change."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from custom_components.errors import InputError
from custom_components.files import file_stamp, only_writer, picture, remove_temporaries, remove_temporary, replacing

from tests.watch import forked


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


WRITER = """
import sys, time
from pathlib import Path
from custom_components.files import only_writer
folder = Path(sys.argv[1])
with only_writer(folder / ".lock", f"models_dir {folder}", "models_dir", wait=sys.argv[2] == "wait"):
    (folder / sys.argv[2]).touch()
    time.sleep(float(sys.argv[3]))
"""


def writer(folder: Path, name: str, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, folder, name, str(seconds)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_a_second_writer_is_refused_or_waits_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    first = writer(tmp_path, "first", 60)
    try:
        until((tmp_path / "first").exists)
        with pytest.raises(InputError) as told, only_writer(tmp_path / ".lock", f"models_dir {tmp_path}", "models_dir"):
            pytest.fail("it is taken")
        assert f"process {first.pid} on {socket.gethostname()}" in str(told.value) and "\n" not in str(told.value)
        assert f"models_dir {tmp_path}" in str(told.value)
        second = writer(tmp_path, "wait", 0)
        assert f"process {first.pid} on" in second.stderr.readline()
        assert not (tmp_path / "wait").exists()
    finally:
        first.kill()
    assert second.wait(20) == 0 and (tmp_path / "wait").exists()
    with only_writer(tmp_path / ".lock", "", ""), only_writer(tmp_path / ".lock", "", ""):
        assert (tmp_path / ".lock").exists(), "a process that has it may take it again"
    assert not (tmp_path / ".lock").exists()


def test_a_worker_that_outlives_its_parent_holds_no_lock(tmp_path: Path) -> None:
    reader, writer_end = os.pipe()

    def outlives() -> None:
        os.close(writer_end)
        os.read(reader, 1)  # until the test ends

    def parent() -> None:
        lock = only_writer(tmp_path / ".lock", "", "")
        lock.__enter__()
        forked(outlives)
        os.kill(os.getpid(), signal.SIGKILL)

    assert os.waitstatus_to_exitcode(os.waitpid(forked(parent), 0)[1]) == -signal.SIGKILL
    os.close(reader)
    with only_writer(tmp_path / ".lock", "", ""):
        pass
    os.close(writer_end)


def test_a_disk_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuses)
    with only_writer(tmp_path / ".lock", "", ""):
        pass
    assert "no locks" in caplog.text and "second run" in caplog.text


def test_a_picture_that_cannot_be_drawn_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with picture(tmp_path / "a.png") as file:
        file.touch()
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir()) and "a.png: not drawn (OSError" in caplog.text
    with pytest.raises(KeyboardInterrupt), picture(tmp_path / "a.png"):
        raise KeyboardInterrupt


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
