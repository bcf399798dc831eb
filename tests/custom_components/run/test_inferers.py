"""Forward passes: in bfloat16, by windows as in one pass, and over scans of which some cannot be read."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import resource_sharer
from types import FrameType

import pytest
import torch
from custom_components.errors import InputError
from custom_components.run import inferers, seeded
from custom_components.run.inferers import AutocastInferer, ReadableLoader, WindowInferer
from monai.data import Dataset
from monai.engines import SupervisedEvaluator
from monai.inferers import sliding_window_inference
from monai.transforms import Compose, Lambda, Lambdad
from torch import Tensor, nn
from torch.utils.data._utils import signal_handling
from tqdm import tqdm


@pytest.mark.parametrize(("amp", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_autocast_inferer_runs_the_network_in_bfloat16_if_asked(amp, dtype):
    network = nn.Linear(4, 2)
    seen = []
    network.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    output = AutocastInferer(amp)(torch.ones(3, 4), network)
    assert seen == [dtype] and output.dtype == network.weight.dtype == torch.float32
    torch.testing.assert_close(output, network(torch.ones(3, 4)), atol=0.02, rtol=0.02)


class Places(nn.Module):
    """Logits that depend on the voxel and on the window around it, so that blending shows."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.mean((2, 3, 4), keepdim=True) - x * 0.5, x.flip(4)], 1)


@pytest.mark.parametrize("size", [(20, 12, 61), (20, 12, 64), (16, 8, 5), (9, 9, 8), (17, 8, 20)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.6])
def test_slabs_give_what_one_pass_gives(size: tuple, overlap: float) -> None:
    volume = torch.randn(1, 1, *size)
    expected = sliding_window_inference(volume, (16, 8, 8), 4, Places(), overlap, mode="gaussian", cval=-1.0)
    for slab_windows in (1, 2, 3, 100):
        inferer = WindowInferer((16, 8, 8), overlap=overlap, amp=False, slab_windows=slab_windows)
        found = inferer(volume, Places())
        assert found.dtype == torch.float16
        torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("size", [(20, 12, 61), (40, 30, 64), (16, 8, 5)])
@pytest.mark.parametrize("overlap", [0.0, 0.6])
def test_a_long_volume_has_a_bar_that_ends_with_its_last_window(size, overlap, monkeypatch, capsys) -> None:
    """One volume of published size takes minutes on a CPU: the bar of scans stands at 0 until then."""
    bars = []
    monkeypatch.setattr(inferers, "SECONDS_WITHOUT_BAR", 0.0)
    monkeypatch.setattr(inferers, "tqdm", lambda **keys: bars.append(tqdm(mininterval=0, **keys)) or bars[-1])
    for progress in (True, False):
        inferer = WindowInferer(
            (16, 8, 8), overlap=overlap, amp=False, slab_windows=2, sw_batch_size=3, progress=progress
        )
        inferer(torch.randn(1, 1, *size), Places())
        shown = capsys.readouterr().err
        if progress:
            assert bars[-1].n == bars[-1].total and f"{bars[-1].total}/{bars[-1].total} [" in shown
        else:
            assert not shown


def read(value: int) -> torch.Tensor:
    if value < 0:
        raise InputError(f"scan {value} is empty: export it again")
    return torch.full((1, 2, 2, 2), 12 / value)  # 0 is a bug of ours, not of the scan


def scans(*values: int, **keys) -> ReadableLoader:
    items = [{"name": f"scan{value}", "image": value} for value in values]
    return ReadableLoader(Dataset(items, Compose([Lambdad("image", read)])), **keys)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_scans_that_cannot_be_read_are_passed_over_and_reported(num_workers, capsys):
    loader = scans(3, -1, 4, -2, num_workers=num_workers)
    for _ in range(2):  # a second pass starts a new report
        batches = list(loader)
        assert [batch["image"][0, 0, 0, 0, 0].item() for batch in batches] == [4.0, 3.0]
        assert all(batch["image"].shape == (1, 1, 2, 2, 2) for batch in batches)
        assert loader.failures == [(f"scan-{n}", f"scan -{n} is empty: export it again") for n in (1, 2)]
    assert "skipped: scan -1 is empty: export it again" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"2 of 4 scans could not be read \(scan-1, scan-2\)"):
        loader.report()


def test_nothing_is_reported_if_all_can_be_read():
    loader = scans(1, 2)
    assert len(list(loader)) == 2
    loader.report()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_fault_of_ours_is_shown_in_full_and_the_next_scan_done(num_workers, capsys):
    loader = scans(1, 0, 2, num_workers=num_workers)
    assert [batch["name"] for batch in loader] == [["scan1"], ["scan2"]]
    printed = capsys.readouterr().err
    assert "skipped: scan0: ZeroDivisionError: division by zero" in printed
    assert "Traceback" in printed and "in read" in printed
    with pytest.raises(InputError, match=r"1 of 3 scans could not be read \(scan0\)"):
        loader.report()


def deadly(value: int) -> torch.Tensor:
    if value == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(value)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_worker_that_is_killed_costs_its_scan_alone(num_workers, capsys):
    """Whoever it is: the one that memory runs out for, or a reader that crashes."""
    items = [{"name": f"scan{value}", "image": value} for value in (1, 2, 3, 4, -1, 6)]
    loader = ReadableLoader(Dataset(items, Compose([Lambdad("image", deadly)])), num_workers)
    done = []
    for batch in loader:
        time.sleep(0.3)  # the worker dies while this scan is processed
        done += batch["name"]
    assert done == ["scan1", "scan2", "scan4", "scan6"]
    assert [name for name, _ in loader.failures] == ["scan3", "scan-1"]
    assert "skipped: scan3 ends the process that reads it" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"2 of 6 scans could not be read \(scan3, scan-1\)"):
        loader.report()


def test_scans_that_others_take_are_not_named_for_a_death() -> None:
    items = [{"name": f"scan{value}", "image": value} for value in (1, 3, 2, 4, 5)]
    loader = ReadableLoader(
        Dataset(items, Compose([Lambdad("image", deadly)])), 1, take=lambda index: index not in (0, 3)
    )
    assert [name for batch in loader for name in batch["name"]] == ["scan2", "scan5"]
    assert [name for name, _ in loader.failures] == ["scan3"]


def test_a_folder_that_is_gone_is_no_scans_fault(tmp_path) -> None:
    loader = scans(1, 2, num_workers=1)
    loader.take = lambda index: (tmp_path / "gone" / str(index)).touch() is None
    with pytest.raises(FileNotFoundError, match="gone"):
        list(loader)
    assert not loader.failures


def closing(value: int) -> torch.Tensor:
    """Scan 3 closes its worker's connections, as the system does of one that it kills, some time before its end."""
    if value == 3:
        resource_sharer.stop()
        time.sleep(1)
    return deadly(value)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_scan_that_a_dying_worker_has_read_is_done(num_workers):
    """Its voxels come through a connection, which was reset."""
    items = [{"name": f"scan{value}", "image": value} for value in (1, 2, 4, 3, 5, 6)]
    loader = ReadableLoader(Dataset(items, Compose([Lambdad("image", closing)])), num_workers)
    done = []
    for batch in loader:
        time.sleep(0.3)
        done += batch["name"]
    assert done == ["scan1", "scan2", "scan4", "scan5", "scan6"]
    assert [name for name, _ in loader.failures] == ["scan3"]


def test_no_scan_is_lost_wherever_a_death_is_told(monkeypatch, capsys):
    """Torch raises an error at any line: here at each in turn of those that hand scans on, while there are workers."""
    begun, dies, lines, done, process = False, 0, 0, [], os.getpid()

    def fail() -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    def trace(frame: FrameType, event: str, _) -> Callable | None:
        nonlocal begun, lines
        code = frame.f_code
        begun |= code is seeded.WatchedDataLoader.__iter__.__code__
        if code.co_filename not in (inferers.__file__, seeded.__file__) or os.getpid() != process:
            return None
        if event == "line" and begun and len(done) < 3:
            lines += 1
            if lines == dies and callable(handler := signal.getsignal(signal.SIGCHLD)):
                with monkeypatch.context() as patch:
                    patch.setattr(signal_handling, "_error_if_any_worker_fails", fail)
                    handler(signal.SIGCHLD, frame)
        return trace

    while dies <= lines:
        begun, dies, lines, done = False, dies + 1, 0, []
        loader, tracer = scans(1, 2, 3, num_workers=1), sys.gettrace()
        sys.settrace(trace)
        try:
            for batch in loader:
                done += batch["name"]
        finally:
            sys.settrace(tracer)
        assert done == ["scan1", "scan2", "scan3"], dies
        assert not loader.failures, dies
    capsys.readouterr()
    assert dies > 50


def test_the_bar_counts_what_is_done(capsys):
    """It stood at 1/1 while the only scan was segmented."""
    for _ in ReadableLoader(Dataset([{"name": "scan", "image": 1}])):
        assert "1/1" not in capsys.readouterr().err
    assert "1/1" in capsys.readouterr().err


def hanging(value: int) -> torch.Tensor:
    if value == 3:
        time.sleep(600)
    return read(value)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_worker_that_hangs_costs_its_scan_alone(num_workers, capsys):
    items = [{"name": f"scan{value}", "image": value} for value in (1, 3, 2, 4)]
    loader = ReadableLoader(Dataset(items, Compose([Lambdad("image", hanging)])), num_workers, timeout_minutes=0.03)
    assert [name for batch in loader for name in batch["name"]] == ["scan1", "scan2", "scan4"]
    assert "a worker, has not read scan3 within timeout_minutes" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"1 of 4 scans could not be read \(scan3\)"):
        loader.report()


class Hungry(nn.Module):
    """Asks for more memory than there is with the scan whose voxels are 3, fails with that whose voxels are 6."""

    def forward(self, x: Tensor) -> Tensor:
        if x.max() == 3:
            torch.empty(1 << 46)
        return x if x.max() != 6 else x @ x[..., :1, :]


def test_a_scan_that_the_network_fails_at_does_not_stop_the_next(capsys):
    loader = scans(1, 2, 3, 4, -1)
    done = []
    evaluator = SupervisedEvaluator(
        "cpu",
        loader,
        Hungry(),
        postprocessing=Lambda(lambda item: done.append(item["image"].max().item()) or item),
        iteration_update=loader.iteration,
    )
    evaluator.run()
    assert done == [12, 4]
    assert [name for name, _ in loader.failures] == ["scan2", "scan4", "scan-1"]
    printed = capsys.readouterr().err
    assert printed.count("Traceback") == 1  # that of scan2: memory and bad input need none
    assert "skipped: scan4: not enough memory" in printed
    with pytest.raises(InputError, match="3 of 5 scans could not be read or processed"):
        loader.report()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_full_disk_is_no_scans_fault(num_workers):
    """In a worker too, whose errors torch tells in words like those of its death."""

    def full(value: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    items = [{"name": "scan1", "image": 1}, {"name": "scan2", "image": 2}]
    loader = ReadableLoader(Dataset(items, Compose([Lambdad("image", full)])), num_workers)
    with pytest.raises((OSError, RuntimeError), match=r"applying transform|No space left on device"):
        list(loader)
    assert not loader.failures


def test_a_full_disk_ends_the_run():
    def full(item: dict) -> dict:
        raise OSError(errno.ENOSPC, "No space left on device")

    loader = scans(1, 2)
    evaluator = SupervisedEvaluator(
        "cpu", loader, nn.Identity(), postprocessing=Lambda(full), iteration_update=loader.iteration
    )
    with pytest.raises(RuntimeError, match="applying transform"):
        evaluator.run()
