"""Signals end a process in order, the second at once; workers end with their parent and at its word alone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.watch import runs, within

PROGRAM = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
from custom_components.processes import EndOnSignal, follow_parent

def hang(file, deaf):
    if deaf:
        follow_parent()
    Path(file).write_text(str(os.getpid()))
    time.sleep(600)

def parent(folder, method):
    worker = multiprocessing.get_context(method).Process(target=hang, args=(folder + "/worker", True), daemon=True)
    worker.start()
    time.sleep(600)

def waits(folder):
    EndOnSignal.install()
    EndOnSignal.current().deferred = True
    Path(folder, "ready").touch()
    while EndOnSignal.current().received is None:
        time.sleep(0.01)
    Path(folder, "asked").touch()
    time.sleep(600)

if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
"""


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., subprocess.Popen]:
    (tmp_path / "program.py").write_text(PROGRAM)

    def start(*arguments: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, tmp_path / "program.py", *arguments], start_new_session=True)

    return start


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_the_first_signal_is_noted_and_the_second_ends_at_once(
    program: Callable, tmp_path: Path, number: signal.Signals
) -> None:
    process = program("waits", str(tmp_path))
    try:
        assert within(30, (tmp_path / "ready").exists)
        process.send_signal(number)
        assert within(10, (tmp_path / "asked").exists)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(10) == -number
    finally:
        process.kill()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_that_hangs_ends_with_its_parent_and_not_by_a_signal_to_all(
    program: Callable, tmp_path: Path, method: str
) -> None:
    process = program("parent", str(tmp_path), method)
    try:
        worker = tmp_path / "worker"
        assert within(30, lambda: worker.exists() and worker.read_text())
        pid = int(worker.read_text())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(pid, number)
        time.sleep(1.2)
        assert runs(pid)
        process.kill()
        process.wait()
        assert within(5, lambda: not runs(pid))
    finally:
        process.kill()


def test_a_parent_ends_its_worker() -> None:
    code = """
import multiprocessing, time
from custom_components.processes import follow_parent
def hang():
    follow_parent()
    time.sleep(600)
worker = multiprocessing.get_context("fork").Process(target=hang)
worker.start()
time.sleep(0.5)
worker.terminate()
worker.join(5)
assert not worker.is_alive()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
