"""Memory that tensors have left is used again."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from custom_components.cpu import keep_freed

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


def test_other_devices_are_left_alone() -> None:
    assert not keep_freed(torch.device("meta"))
