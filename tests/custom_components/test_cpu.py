"""Memory that tensors have left is used again, and threads that wait leave the cores to others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from custom_components.cpu import keep_freed, threads_within_quota, wait_asleep_when_busy

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
import pathlib, sys, threading, time, torch
from custom_components import cpu

pressure = pathlib.Path(sys.argv[1])
pressure.write_text("some avg10=1.00 avg60=0.00")
cpu.SECONDS_BETWEEN_LOOKS = 0.02
device = torch.device("cpu")
assert cpu.wait_asleep_when_busy(device, str(pressure)) and not cpu.wait_asleep_when_busy(device, str(pressure)), "once"
torch.ones(1 << 20).exp_()

def spent():
    before = time.process_time()
    for _ in range(100):
        torch.ones(1 << 16).exp_()
        time.sleep(0.02)
    return time.process_time() - before

for share in ("1.00", "80.00", "20.00", "0.00"):
    pressure.write_text(f"some avg10={share} avg60=0.00")
    time.sleep(0.3)
    assert torch.get_num_threads() == 2
    print(spent(), flush=True)
"""


@pytest.mark.skipif(not Path("/proc/pressure/cpu").is_file() or len(os.sched_getaffinity(0)) < 2, reason="two cores")
def test_threads_wait_asleep_while_others_want_the_cores(tmp_path: Path) -> None:
    """Seconds of CPU that 100 short products take with pauses between them, in two threads."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", WAITING, str(tmp_path / "cpu")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr
    free, busy, less_busy, free_again = map(float, done.stdout.split())
    assert max(busy, less_busy) < 0.5 * min(free, free_again)


ENDING = """
import sys, threading, time, torch
from custom_components import cpu

assert cpu.wait_asleep_when_busy(torch.device("cpu"), sys.argv[1])
while not any(thread.name == cpu.IDLE for thread in threading.enumerate()):
    time.sleep(0)
time.sleep(0.0003)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or len(os.sched_getaffinity(0)) < 2, reason="two cores")
def test_a_process_ends_as_it_should_while_threads_are_added(tmp_path: Path) -> None:
    """It aborted in 8 of 10 tries: Python ended the thread within torch."""
    (tmp_path / "cpu").write_text("some avg10=80.00 avg60=0.00")
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", ENDING, str(tmp_path / "cpu")]
    for _ in range(5):
        done = subprocess.run(command, capture_output=True, text=True, env=environment | {"OMP_NUM_THREADS": "2"})
        assert done.returncode == 0, done.stderr


def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert not wait_asleep_when_busy(torch.device("cpu"))


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


@pytest.mark.parametrize("told", [None, "", "some avg10=", "full"])
def test_a_system_that_does_not_say_who_waits_is_left_alone(tmp_path: Path, told: str | None) -> None:
    if told is not None:
        (tmp_path / "cpu").write_text(told)
    assert not wait_asleep_when_busy(torch.device("cpu"), str(tmp_path / "cpu"))


def test_other_devices_are_left_alone() -> None:
    assert not keep_freed(torch.device("meta")) and not wait_asleep_when_busy(torch.device("meta"))
