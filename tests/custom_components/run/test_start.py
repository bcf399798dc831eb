"""The first call of every config, errors in one line, and two exported bundles in one process."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import custom_components
import numpy as np
import pytest
import torch
from custom_components.errors import InputError
from custom_components.processes import EndOnSignal
from custom_components.run.export import export
from custom_components.run.start import OneLineErrors, check_components, keep_imported, one_console, start
from monai.data import DataLoader, Dataset
from monai.transforms import Lambdad
from tqdm import tqdm

from tests.conftest import untrained
from tests.watch import forked

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def loaded() -> list[str]:
    """``custom_components.__path__``, which the test may change."""
    return custom_components.__path__


def test_equal_components_are_joined(loaded: list[str], tmp_path: Path) -> None:
    folder, _ = export(untrained("segment", tmp_path), tmp_path / "out")
    check_components(folder)
    check_components(folder)  # once is enough
    assert loaded[1:] == [str(folder / "custom_components")]


def test_a_module_that_is_not_loaded_comes_from_the_bundle(
    loaded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the modules that a bundle needs are in its export: another bundle's must be found beside them."""
    (tmp_path / "custom_components").mkdir()
    (tmp_path / "custom_components" / "only_here.py").write_text("answer = 42\n")
    check_components(tmp_path)
    from custom_components import only_here

    monkeypatch.delitem(sys.modules, "custom_components.only_here")
    monkeypatch.delattr(custom_components, "only_here")
    assert only_here.answer == 42


def test_another_version_is_refused_in_one_line(loaded: list[str], tmp_path: Path) -> None:
    folder, _ = export(untrained("segment", tmp_path), tmp_path / "out")
    module = folder / "custom_components" / "unetr.py"
    module.write_text(module.read_text() + "\n# changed\n")
    with pytest.raises(InputError) as raised:
        check_components(folder)
    message = str(raised.value)
    assert "\n" not in message and "unetr.py" in message and "segment 0." in message and "processes" in message
    assert str(folder) in message and loaded[0] in message and len(loaded) == 1


def test_three_bundles_compare_with_all_that_is_loaded(loaded: list[str], tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, text in ((first, "x = 1\n"), (second, "x = 2\n")):
        (folder / "custom_components").mkdir(parents=True)
        (folder / "custom_components" / "new.py").write_text(text)
    check_components(first)
    with pytest.raises(InputError, match="new.py"):
        check_components(second)


def test_a_bundle_without_components_takes_the_installed(loaded: list[str], tmp_path: Path) -> None:
    check_components(tmp_path)
    check_components(REPOSITORY / "bundles" / "segment")
    shutil.copytree(REPOSITORY / "bundles" / "segment" / "configs", tmp_path / "configs")
    check_components(tmp_path)
    assert len(loaded) == 1


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors are printed as they were before, once the test is over."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def test_start_seeds_every_generator_and_prints_errors_in_one_line(hook: None, tmp_path: Path) -> None:
    drawn = []
    for _ in range(2):
        start(tmp_path, seed=3)
        drawn.append((torch.rand(1).item(), np.random.rand()))
    assert drawn[0] == drawn[1] and isinstance(sys.excepthook, OneLineErrors)
    state = torch.get_rng_state()
    start(tmp_path)  # a run that draws no random numbers
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("keys", ({"timeout_minutes": 1.0}, {"rank_zero_alone": True}))
def test_start_without_torchrun_says_how_to_start(
    hook: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="torchrun"):
        start(tmp_path, **keys)
    assert isinstance(sys.excepthook, OneLineErrors)  # so that a person reads one line


# errors in one line


TOLD = "a.nii.gz is empty (0.5 x 0.5): export it again"


def bad(*_) -> None:
    raise InputError(TOLD)


def bug(*_) -> None:
    raise KeyError("a bug")


def nested() -> None:
    try:
        try:
            bad()
        except InputError as error:
            raise RuntimeError("applying transform") from error
    except RuntimeError as error:
        raise RuntimeError("engine run is terminating") from error


class DiskFull(InputError):
    """A kind of InputError."""


def narrower() -> None:
    try:
        raise DiskFull(TOLD) from OSError(28, "no space")
    except InputError as error:
        raise RuntimeError("failed to instantiate") from error


class Scans(torch.utils.data.Dataset):
    """Fails as it is read, without MONAI's RuntimeError around it."""

    def __init__(self, read) -> None:
        self.read = read

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int):
        return self.read()


def load(dataset) -> None:
    list(DataLoader(dataset, num_workers=1))


def told(case, monkeypatch, capsys) -> str:
    """What is printed for the exception that ``case`` raises."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # so that it comes back
    OneLineErrors()
    try:
        case()
    except Exception as error:
        capsys.readouterr()
        sys.excepthook(type(error), error, error.__traceback__)
        traceback.clear_frames(error.__traceback__)  # else the garbage collector waits 5 s for each loader's worker
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "case",
    [
        bad,
        nested,
        narrower,
        lambda: Dataset([{"image": 1}], Lambdad("image", bad))[0],
        lambda: load(Dataset([{"image": 1}], Lambdad("image", bad))),
        lambda: load(Scans(bad)),
    ],
    ids=["plain", "nested", "narrower", "transform", "transform in a worker", "data set in a worker"],
)
def test_input_errors_are_told_in_one_line(case, monkeypatch, capsys):
    assert told(case, monkeypatch, capsys) == f"error: {TOLD}\n"


@pytest.mark.parametrize("case", [bug, lambda: load(Scans(bug))], ids=["plain", "in a worker"])
def test_bugs_keep_their_traceback(case, monkeypatch, capsys):
    shown = told(case, monkeypatch, capsys)
    assert shown.startswith("Traceback") and "a bug" in shown and "in bug" in shown


UNCAUGHT = """
import os, sys
from custom_components.run.start import OneLineErrors
from custom_components.errors import InputError
for name, error in {"bad": InputError("told"), "bug": KeyError("a bug")}.items():
    if os.fork() == 0:  # a process each, forked, since the imports take seconds
        sys.stderr = open(name, "w")
        OneLineErrors()
        raise RuntimeError("engine run is terminating") from error
    print(name, os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_a_process_that_ends_in_an_input_error_has_exit_code_one(tmp_path):
    done = subprocess.run([sys.executable, "-c", UNCAUGHT], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == "bad 1\nbug 1\n", done.stderr
    assert (tmp_path / "bad").read_text() == "error: told\n"
    assert (tmp_path / "bug").read_text().startswith("KeyError: 'a bug'\n\nThe above exception was the direct cause")


def test_a_process_that_leaves_the_message_to_the_first_ends_by_a_signal_without_a_word():
    """torchrun sends one to all that are left as soon as one has failed."""
    reader, writer = os.pipe()

    def fails() -> None:
        os.environ["RANK"] = "1"
        EndOnSignal.install()
        OneLineErrors()
        os.write(writer, b"fails")
        sys.excepthook(InputError, InputError("told"), None)

    pid = forked(fails)
    os.read(reader, 5)
    time.sleep(0.5)
    os.kill(pid, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


def write() -> None:
    with open("/dev/full", "w") as file:
        file.write("events")


@pytest.mark.parametrize("case", [write, lambda: load(Scans(write))], ids=["plain", "in a worker"])
def test_a_full_disk_is_told_wherever_it_is_met(case, monkeypatch, capsys):
    assert told(case, monkeypatch, capsys).startswith("error: the disk is full ([Errno 28] No space left on device)")


def test_a_worker_that_is_killed_is_told_in_one_line(monkeypatch, capsys):
    shown = told(lambda: load(Scans(lambda: os.kill(os.getpid(), signal.SIGKILL))), monkeypatch, capsys)
    assert re.fullmatch(r"error: process \d+, a data loader's worker, is killed by signal: Killed, as .+\n", shown)
    assert "give fewer num_workers" in shown


def test_log_lines_go_above_the_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A line that comes while a bar is drawn starts on a line of its own, and the bar comes again below it."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    monkeypatch.setattr(logging.root, "handlers", [handler])
    one_console()
    one_console()  # once is enough
    with tqdm(total=2, file=sys.stdout, ncols=40) as bar:
        bar.update(1)
        logging.getLogger("some.module").warning("a line")
    shown = capsys.readouterr().out
    before, after = shown.split("WARNING a line\n")
    assert before.endswith(" \r") and "50%" in after


def test_imports_are_not_searched_for_garbage_where_the_command_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It took the interpreter seconds to end; a program's own objects are none of this."""
    assert not keep_imported() and not gc.get_freeze_count()
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", importlib.util.find_spec("monai.bundle.__main__"))
    try:
        assert keep_imported() and gc.get_freeze_count() > 100_000
        assert not keep_imported(), "what a comparison's run has left behind must be freed"
    finally:
        gc.unfreeze()
