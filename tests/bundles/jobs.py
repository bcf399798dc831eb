"""Commands of bundles that start at once, and what may befall them.

Importing what a bundle needs takes many times longer than a tiny run, so one process imports it and is forked for each
command. It reads a command a line, and prints a process's number, and both it and its exit code when that has ended.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.watch import runs

BUNDLES = Path(__file__).parents[2] / "bundles"
SERVER = """
import json, os, runpy, sys
import ignite.engine, monai.bundle, torch.utils.tensorboard, transformers.models.bert.modeling_bert
import custom_components.run.resume, custom_components.evaluation.pretrain, custom_components.data.lists
import custom_components.evaluation.segment, custom_components.evaluation.classify, custom_components.data.prepare
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.chdir(job["folder"])
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.path.append(job["stdout"].rpartition("/")[0])
        sys.argv = ["monai.bundle", "run", *job["arguments"]]
        runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
        sys.exit()
    print(pid, flush=True)
    print(pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@contextmanager
def serving() -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def arguments(configs: list[str], keys: dict[str, object]) -> list[str]:
    given = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    return ["--config_file", str(configs), *given]


class Job:
    """A command that runs."""

    def __init__(self, server: subprocess.Popen, folder: Path, given: list[str], output: Path) -> None:
        self.server, self.files = server, {name: output / f"{name}.txt" for name in ("stdout", "stderr")}
        for file in self.files.values():
            file.write_text("")  # what it says is read while it starts
        request = {"folder": str(folder), "arguments": given} | {k: str(v) for k, v in self.files.items()}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        while " " in (line := server.stdout.readline().strip()):
            pass  # the end of a job that a failed test has left
        self.pid = int(line)
        self.returncode: int | None = None

    def kill_when(self, condition: Callable[[], bool]) -> None:
        """``kill -9`` as soon as the condition holds; the process must still be there."""
        assert self.signal_when(signal.SIGKILL, condition) == -signal.SIGKILL

    def signal_when(self, number: signal.Signals, condition: Callable[[], bool], group: bool = False) -> int:
        """Send a signal, to all of the job's processes if ``group``, as soon as the condition holds -> exit code."""
        until(condition, lambda: runs(self.pid))
        self.hit(number, group)
        return self.wait()

    def hit(self, number: signal.Signals, group: bool = False) -> list[int]:
        """Send a signal, to all of the job's processes if ``group`` -> its children so far."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        (os.killpg if group else os.kill)(self.pid, number)
        return [int(child) for child in children]

    def wait(self) -> int:
        self.returncode = int(self.server.stdout.readline().split()[1])
        return self.returncode

    @property
    def stdout(self) -> str:
        return self.files["stdout"].read_text()

    @property
    def stderr(self) -> str:
        return self.files["stderr"].read_text()


def until(condition: Callable[[], bool], alive: Callable[[], bool], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert alive() and time.monotonic() < end
        time.sleep(0.0005)
