"""Memory that tensors have left is used again, and threads that wait leave the cores to others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from custom_components.cpu import keep_freed, threads_within_quota, wait_asleep

FAULTS = """
import resource, sys, torch
from custom_components.cpu import keep_freed

if sys.argv[1] == "keep" and not keep_freed(torch.device("cpu")):
    sys.exit("unchanged")

def maps(rounds):
    for _ in range(rounds):
        tensors = [torch.ones(size << 20) for size in (9, 12, 10, 16)]  # 188 MiB, 48,000 pages
    return tensors

maps(20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
maps(5)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(what: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, what], capture_output=True, text=True)
    if done.stderr.strip() == "unchanged":
        pytest.skip("not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_freed_memory_is_used_again() -> None:
    """In pages that the system hands out: hardly any once the process has what it needs, be it a block late."""
    assert faults("keep") < 20_000
    assert faults("leave") > 200_000, "pages are not mapped anew here without it: it could go"


WAITING = """
import sys, time, torch
from custom_components.cpu import wait_asleep

device = torch.device("cpu")
if sys.argv[1] == "asleep":
    assert wait_asleep(device) and not wait_asleep(device), "once is enough"
    assert torch.get_num_threads() == 2
torch.ones(1 << 20).exp_()
spent = -time.process_time()
for _ in range(100):
    torch.ones(1 << 16).exp_()
    time.sleep(0.02)
print(spent + time.process_time())
"""


def waiting(how: str, **environment: str) -> float:
    """Seconds of CPU that 100 short products take with pauses between them, in two threads."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | environment
    environment["OMP_NUM_THREADS"] = "2"
    command = [sys.executable, "-c", WAITING, how]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


@pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="libgomp and two cores")
def test_threads_wait_asleep() -> None:
    assert waiting("asleep") < 0.5 * waiting("spinning"), "they sleep without it: it could go"


def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert not wait_asleep(torch.device("cpu"))


@pytest.mark.parametrize(
    ("share", "threads"),
    [("max 100000", 8), ("200000 100000", 2), ("350000 100000", 4), ("20000 100000", 1), ("3200000 100000", 8)],
)
def test_no_more_threads_than_a_container_has_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, share: str, threads: int
) -> None:
    (tmp_path / "cpu.max").write_text(share + "\n")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(8)
        monkeypatch.setenv("OMP_NUM_THREADS", "8")
        assert threads_within_quota(str(tmp_path / "cpu.max")) == torch.get_num_threads() == 8
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert threads_within_quota(str(tmp_path / "absent")) == torch.get_num_threads() == 8
        assert threads_within_quota(str(tmp_path / "cpu.max")) == torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_other_devices_are_left_alone() -> None:
    assert not keep_freed(torch.device("meta")) and not wait_asleep(torch.device("meta"))
