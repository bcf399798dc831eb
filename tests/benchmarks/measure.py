"""What every benchmark here needs: a process per contender, medians, and the machine's own matrix product."""

from __future__ import annotations

import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

GIB = 2**30
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def peak_bytes() -> int:
    """Highest resident memory of this process so far (Linux), plus the highest of its CUDA allocations."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            resident = int(line.split()[1]) * 1024
    return resident + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def _run(connection: Connection, function: Callable[..., dict[str, Any]], args: Sequence[Any]) -> None:
    result = function(*args)
    connection.send(result | {"peak_gib": peak_bytes() / GIB})


def device_gib() -> float:
    """Highest memory of the device so far: of CUDA's allocations, or of this process where there is no GPU."""
    return (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_bytes()) / GIB


def alone(function: Callable[..., dict[str, Any]], *args: Any, timeout: float | None = None) -> dict[str, Any]:
    """Run ``function(*args)`` in a process of its own -> its dictionary, with ``peak_gib`` of that process.

    Peak memory never falls within a process, so two contenders in one process would share the larger one's.

    Raises:
        RuntimeError: the process ended without a result; its own traceback stands above. Or it was ended, since it took
            longer than ``timeout`` seconds.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            process.terminate()
            raise RuntimeError(f"{function.__name__} took longer than {timeout:.0f} s")
        return receiver.recv()
    except EOFError as error:
        raise RuntimeError(f"{function.__name__}{tuple(args)} ended without a result") from error
    finally:
        process.join()


def wait() -> None:
    """Let queued device work end, so that a clock read next tells the truth."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_seconds(step: Callable[[], Any], repeats: int, warmup: int = 1) -> float:
    """Median seconds of ``repeats`` calls after ``warmup`` untimed ones."""
    times = []
    for i in range(warmup + repeats):
        wait()
        start = time.perf_counter()
        step()
        wait()
        if i >= warmup:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def matmul_rate(precision: str, size: int = 4096, repeats: int = 5) -> dict[str, float]:
    """Floating-point operations per second of a square matrix product of this size, the machine's practical peak."""
    a, b = (torch.randn(size, size, device=device(), dtype=DTYPES[precision]) for _ in range(2))
    return {"flops": 2 * size**3 / median_seconds(lambda: a @ b, repeats)}


def environment() -> dict[str, Any]:
    """What the figures depend on, for the JSON file."""
    flags = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "amx_bf16": "amx_bf16" in flags,
    }


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    cells = [[f"{c:.3g}" if isinstance(c, float) else str(c) for c in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    print(f"\n{title}")
    for row in cells:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def write_json(path: str | None, content: Mapping[str, Any]) -> None:
    if path is not None:
        Path(path).write_text(json.dumps(content, indent=1) + "\n")
        print(f"\nwritten: {path}")
