"""Pre-training with a text encoder that is no BERT, through the real command line, by one key."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.bundles.conftest import run
from tests.bundles.test_pretrain import BUNDLE, TINY, TRAIN
from tests.custom_components.test_text_encoders import roberta_base


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    shutil.copytree(BUNDLE, tmp_path / "pretrain", ignore=shutil.ignore_patterns("models", "eval", "data"))
    return tmp_path / "pretrain"


def test_pre_training_with_a_roberta(bundle: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = roberta_base(tmp_path / "roberta")
    keys = TINY | {"max_epochs": 1, "dataset_dir#num_train": 4, "dataset_dir#num_valid": 1}
    result = run(bundle, TRAIN, **keys, text_encoder=tmp_path / "roberta", evaluate_after_training=False)
    assert result.returncode == 0, result.stdout + result.stderr
    checkpoint = torch.load(bundle / "models" / "checkpoint.pt", weights_only=True)
    network = checkpoint["network"]
    assert checkpoint["trainer"]["iteration"] == 1
    assert network["aligner.sentence_projection.0.weight"].shape[1] == 40  # the text encoder's width
    vocab_size = len(state["lm_head.bias"])
    assert any(tensor.shape[0] == vocab_size for name, tensor in network.items() if name.startswith("report_decoder"))
