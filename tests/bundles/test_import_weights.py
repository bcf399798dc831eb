"""A published checkpoint through each bundle's command line, and the bundles that start from it by one key."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import monai.bundle
import pandas as pd
import pytest
import torch
from custom_components.data import phantom
from custom_components.vit import SimCroPEncoder, simcrop_positions

from tests.bundles.conftest import run, told

BUNDLES = Path(__file__).parents[2] / "bundles"
SIZES = {"img_size": [80, 80, 40], "patch_size": [8, 8, 4], "hidden_size": 96, "mlp_dim": 192, "num_layers": 3}
SPACING = [4.0, 4.0, 8.0]
IMPORT = ["import_weights.json"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SimCroP's .pth, of the demos' sizes."""
    torch.manual_seed(0)
    state = SimCroPEncoder(**SIZES, num_heads=2).state_dict()
    state["pos_embed"][:, 1:] = simcrop_positions((10, 10, 10), 96)
    state["decoder_pred.weight"] = torch.ones(8, 8)
    path = tmp_path_factory.mktemp("published") / "simcrop.pth"
    torch.save({"model": state, "args": argparse.Namespace(batch_size=14), "epoch": 199}, path)
    return path


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> Path:
    """What the README's command makes of it, in the classify bundle's folder."""
    path = checkpoint.parent / "imported" / "encoder.pt"
    keys = {
        "checkpoint": checkpoint,
        "encoder_file": path,
        "img_size": SIZES["img_size"],
        "num_heads": 2,
        "pixdim": SPACING,
    }
    result = run(BUNDLES / "classify", IMPORT, **keys)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the table of pos_embed simcrop" in result.stdout and "1 tensors skipped" in result.stdout
    assert len(pd.read_csv(path.with_suffix(".csv"))) == len(torch.load(checkpoint, weights_only=False)["model"])
    return path


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "phantom"
    phantom.cohort(folder, 10, 5, num_workers=1)
    return folder


def train(bundle: str, run_id: str, out: Path, monkeypatch: pytest.MonkeyPatch, **keys: object) -> None:
    """The bundle's demo recipe in this process, writing to ``out``."""
    folder = out / bundle
    shutil.copytree(BUNDLES / bundle, folder, ignore=shutil.ignore_patterns("models", "eval", "data"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "path", list(sys.path))
    keys = {key: str(value) if isinstance(value, Path) else value for key, value in keys.items()}
    files = ["configs/train.json", "configs/demo.json"]
    monai.bundle.run(run_id, config_file=files, logging_file=False, **keys)


def test_one_config_serves_all_bundles() -> None:
    texts = {(BUNDLES / bundle / "configs" / IMPORT[0]).read_text() for bundle in ("pretrain", "classify", "segment")}
    assert len(texts) == 1
    published = json.loads((BUNDLES / "pretrain" / "configs" / "train.json").read_text())
    for key, value in json.loads(texts.pop()).items():  # the same names and defaults as where the encoder is used
        if key in published and key not in ("num_heads", "start", "initialize", "run"):
            assert value == published[key], key


def test_classify_probes_an_imported_encoder(
    encoder: Path, dataset_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"max_steps": 2, "warmup_steps": 1, "num_views": 1, "num_resamples": 5, "compare_after_training": False}
    train("classify", "run", tmp_path, monkeypatch, pretrained=encoder, dataset_dir=dataset_dir, **keys)
    model = torch.load(tmp_path / "classify" / "models" / "model.pt", weights_only=True)
    stored = torch.load(encoder, weights_only=True)
    taken = [name for name in stored if not name.startswith("norm.")]  # the probe has a norm of its own
    assert len(taken) == 40 and all(torch.equal(model[f"encoder.{name}"], stored[name]) for name in taken)


def test_segment_fine_tunes_an_imported_encoder(
    encoder: Path, dataset_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datalist = {"_target_": "custom_components.data.phantom.segmentation_datalist", "dataset_dir": str(dataset_dir)}
    keys = {"datalist": datalist | {"num_validation": 1}, "max_epochs": 1, "val_interval": 1, "feature_size": 4}
    keys |= {"img_size": [48, 48, 24]}
    keys |= {"learning_rate": 0.0, "weight_decay": 0.0, "evaluate_after_training": False, "data_fraction": 0.3}
    train("segment", "training", tmp_path, monkeypatch, pretrained=encoder, dataset_dir=dataset_dir, **keys)
    model = torch.load(tmp_path / "segment" / "models" / "model.pt", weights_only=True)
    assert torch.equal(model["encoder.pos_embed"][0], simcrop_positions((6, 6, 6), 96))
    stored = torch.load(encoder, weights_only=True)
    assert torch.equal(model["encoder.blocks.2.attn.qkv.weight"], stored["blocks.2.attn.qkv.weight"])


def test_a_bad_checkpoint_is_told_in_one_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(BUNDLES / "pretrain")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    keys = {"checkpoint": str(checkpoint), "encoder_file": str(tmp_path / "encoder.pt"), "num_heads": 2}
    with pytest.raises(Exception) as raised:
        monai.bundle.run(config_file=f"configs/{IMPORT[0]}", logging_file=False, **keys)
    capsys.readouterr()
    sys.excepthook(raised.type, raised.value, raised.tb)
    told(capsys.readouterr().err, "simcrop.pth", "1000 patches of [8, 8, 4]", "img_size")
    assert not list(tmp_path.iterdir())
