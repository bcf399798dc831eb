"""Which precision a run computes in, on machines that this one stands in for, and after a resumption."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from custom_components.errors import InputError
from custom_components.run.precision import bfloat16
from custom_components.run.weights import save_atomically, save_weights

from tests.conftest import BUNDLES

CPUS = [  # kind, what torch.cpu.get_capabilities says of it, whether it has bfloat16
    ("Sapphire Rapids", {"avx2": True, "avx512_f": True, "avx512_bf16": True, "amx_bf16": True}, True),
    ("Zen 4", {"avx2": True, "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, True),
    ("Skylake", {"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
    ("Zen 2", {"avx2": True, "avx512_f": False}, False),
    ("none of x86", {}, False),
]


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "custom_components.run.precision")
    return caplog


def cpu(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast})


def gpu(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")


@pytest.mark.parametrize(("kind", "capabilities", "fast"), CPUS, ids=[kind for kind, *_ in CPUS])
def test_auto_takes_what_the_cpu_is_fast_at_and_says_so(monkeypatch, told, kind, capabilities, fast) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert bfloat16("auto", "cpu") is fast
    assert [record.getMessage().partition(",")[0] for record in told.records] == [
        f"amp auto: {'bfloat16' if fast else 'float32'}"
    ]
    assert bfloat16(False, "cpu") is False and bfloat16(True, "cpu") is True
    warned = [record for record in told.records if record.levelname == "WARNING"]
    assert len(warned) == (not fast)


def test_this_cpu_is_fast_at_what_auto_takes() -> None:
    """A product of matrices, the best of several that take turns: other processes slow both alike."""
    from time import perf_counter

    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for _ in range(8):
        for dtype in best:
            a = torch.ones(768, 768, dtype=dtype)
            start = perf_counter()
            a @ a
            best[dtype] = min(best[dtype], perf_counter() - start)
    ratio = best[torch.bfloat16] / best[torch.float32]
    if not 0.8 < ratio < 1.2:  # about the same, or too busy a machine to tell
        assert bfloat16("auto", "cpu") is (ratio < 1)


def test_a_gpu_without_bfloat16_computes_in_float32_or_refuses(monkeypatch, told) -> None:
    gpu(monkeypatch, fast=True)
    assert bfloat16("auto", "cuda:0") and bfloat16(True, "cuda:0")
    gpu(monkeypatch, fast=False)
    assert not bfloat16("auto", "cuda:0") and not bfloat16(False, "cuda:0")
    assert "amp auto: float32, since a GPU has no bfloat16" in told.text
    with pytest.raises(InputError, match="amp is true, and a GPU has no bfloat16: give --amp false"):
        bfloat16(True, "cuda:0")


def test_another_kind_of_device_computes_in_float32() -> None:
    assert not bfloat16("auto", "meta")


def checkpoint(path: Path, **recipe: object) -> Path:
    save_atomically({"network": {"weight": torch.ones(100)}, "recipe": recipe}, path)
    return path


@pytest.mark.parametrize("began", [True, False])
def test_a_resumed_training_keeps_its_precision_on_another_cpu(monkeypatch, told, tmp_path: Path, began: bool) -> None:
    path = checkpoint(tmp_path / "checkpoint.pt", amp=began)
    cpu(monkeypatch, fast=not began)
    for resume in ("auto", str(path)):
        told.clear()
        assert bfloat16("auto", "cpu", tmp_path / "checkpoint.pt", resume) is began
        assert f"as {path} was trained, though this CPU has" in told.text
    assert bfloat16("auto", "cpu", path, None) is not began, "a new training takes what this machine is fast at"
    assert bfloat16(not began, "cpu", path, "auto") is not began, "asked for: the Checkpointer compares the recipes"


def test_a_resumed_training_on_a_gpu_without_its_precision_is_refused(monkeypatch, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "checkpoint.pt", amp=True)
    gpu(monkeypatch, fast=False)
    with pytest.raises(InputError, match=r"was trained in bfloat16, and a GPU has no bfloat16: give --amp false"):
        bfloat16("auto", "cuda:0", path, "auto")
    assert bfloat16(False, "cuda:0", path, str(path)) is False


def test_an_evaluation_keeps_the_precision_that_the_weights_tell(monkeypatch, tmp_path: Path) -> None:
    save_weights({"weight": torch.ones(1)}, tmp_path / "model.pt", {"settings": {}, "recipe": {"amp": False}})
    cpu(monkeypatch, fast=True)
    assert not bfloat16("auto", "cpu", tmp_path / "model.pt", "auto")
    for bundle in ("pretrain", "classify", "segment"):
        evaluate = json.loads((BUNDLES / bundle / "configs" / "evaluate.json").read_text())
        assert (evaluate["bfloat16#checkpoint"], evaluate["bfloat16#resume"]) == ("@checkpoint", "auto")


def test_a_checkpoint_that_tells_nothing_leaves_the_choice(monkeypatch, tmp_path: Path) -> None:
    cpu(monkeypatch, fast=True)
    path = tmp_path / "checkpoint.pt"
    assert bfloat16("auto", "cpu", path, "auto"), "there is none"
    checkpoint(path, seed=1)
    assert bfloat16("auto", "cpu", path, "auto"), "it is of before amp was recorded"
    checkpoint(tmp_path / "checkpoint_previous.pt", amp=False)
    path.write_bytes(path.read_bytes()[:-300])
    assert not bfloat16("auto", "cpu", path, "auto"), "damaged: the one before it is resumed from"
    (tmp_path / "checkpoint_previous.pt").unlink()
    assert bfloat16("auto", "cpu", path, "auto"), "damaged alone: the Checkpointer says so"
