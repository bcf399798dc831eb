"""Of processes: forks, whether they run, and waiting for them. Workers import it, so it imports little."""

import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def forked(work: Callable[[], object]) -> int:
    """A copy of this process that does some work and ends, whatever happens, before it meets the next test -> its pid.

    It computes in one thread: OpenMP's others do not survive a fork, and what waits for them waits for ever.
    """
    import torch

    if (pid := os.fork()) == 0:
        try:
            torch.set_num_threads(1)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return pid


def runs(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def within(seconds: float, condition: Callable[[], object]) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.02)
    return bool(condition())
