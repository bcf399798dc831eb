"""The benchmark for GPUs through its command line, on a CPU, at a size that says nothing about speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks.gpu import Parts
from tests.benchmarks.measure import matmul_rate

COMMAND = [sys.executable, "-m", "tests.benchmarks.gpu"]
REPOSITORY = Path(__file__).parents[2]


def measured(tmp_path: Path, *options: str) -> tuple[dict, str]:
    """The parts that were measured, none of them missing, and what was printed."""
    out = tmp_path / "out.json"
    tiny = ["--device", "cpu", "--size", "tiny", "--minutes", "30", "--repeats", "1", "--workers", "1"]
    command = [*COMMAND, *tiny, "--out", str(out), *options]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY).stdout
    result = json.loads(out.read_text())
    assert result["missing"] == {} and "not measured" not in printed, printed
    assert all(
        part["seconds"] > 0 and part["device_gib"] > 0 for part in result["parts"].values() if "device_gib" in part
    )
    return result["parts"], printed


def test_what_needs_no_compiler_and_no_second_process_runs_on_a_cpu(tmp_path: Path) -> None:
    names = [
        "matrix product",
        "plain",
        "parity",
        "probe forward, batch 1",
        "UNETR step, 4 regions",
        "UNETR sliding window",
    ]
    parts, printed = measured(tmp_path, "--only", *names, "loader", "checkpointing")
    assert set(parts) == {*names, "loader", "checkpointing"}
    assert parts["checkpointing"]["1"]["losses"] == pytest.approx(parts["plain"]["1"]["losses"], rel=1e-3)
    exact, same, rounded = (parts["parity"][name] for name in ("CPU, fp32", "device, fp32", "device, bf16"))
    assert same == pytest.approx(exact, rel=1e-5) and rounded == pytest.approx(exact, rel=0.1) and rounded != exact
    assert "is the bottleneck" in printed
    assert "days" not in printed, "of a size that says nothing about speed"


@pytest.mark.slow
def test_compilation_and_two_processes_run_on_a_cpu(tmp_path: Path) -> None:
    parts, printed = measured(tmp_path, "--only", "plain", "compiled", "compiled, checkpointing", "two processes")
    for variant in ("compiled", "compiled, checkpointing"):
        assert parts[variant]["1"]["losses"] == pytest.approx(parts["plain"]["1"]["losses"], rel=0.02)
    assert len(set(parts["two processes"]["sums_of_weights"])) == 1
    assert "two processes, gloo" in printed and "their weights are the same" in printed


def test_what_fails_or_takes_too_long_is_told_and_the_rest_counts(tmp_path: Path) -> None:
    parts = Parts(60, str(tmp_path / "out.json"))
    parts("wrong", matmul_rate, "fp7")
    parts("right", matmul_rate, "fp32", 64)
    parts.seconds = 0
    parts("late", matmul_rate, "fp32", 64)
    found = json.loads((tmp_path / "out.json").read_text())
    reasons = {
        "wrong": "RuntimeError: matmul_rate('fp7',) ended without a result",
        "late": "RuntimeError: no time was left",
    }
    assert found["missing"] == reasons
    assert found["parts"]["right"]["flops"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do() -> None:
    done = subprocess.run(COMMAND, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 2 and "give --device cpu" in done.stderr
