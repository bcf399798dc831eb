"""Running a bundle as its users do, and what they must be told; the real chest CT of ``slicerio`` with its lungs."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai.bundle
import pytest
import torch
from custom_components.run.description import describe
from custom_components.run.weights import save_weights
from custom_components.vit import SimCroPEncoder
from mlflow import MlflowClient
from monai.bundle import ConfigWorkflow
from monai.utils import path_to_sqlite_uri

from tests.conftest import BUNDLES

SLICERIO = Path(importlib.util.find_spec("slicerio").submodule_search_locations[0]) / "data"
CT, LUNGS = SLICERIO / "CTChest4.nrrd", SLICERIO / "Segmentation.seg.nrrd"
RIGHT_LUNG, LEFT_LUNG = 5, 6  # values in LUNGS


def run(bundle: Path, configs: list[str], *run_id: str, **keys: object) -> subprocess.CompletedProcess:
    """``python -m monai.bundle run`` as a user calls it, from the bundle's folder."""
    files = str([f"configs/{name}" for name in configs])
    arguments = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "monai.bundle", "run", *run_id, "--config_file", files, *arguments]
    return subprocess.run(command, cwd=bundle, capture_output=True, text=True, timeout=600)


def fails_with(result: subprocess.CompletedProcess, *words: str) -> None:
    """The run ended with exit code 1 and one clear line, not with a traceback."""
    assert result.returncode == 1, result.stdout + result.stderr
    told(result.stderr, *words)


def told(stderr: str, *words: str) -> None:
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, stderr
    assert all(word in lines[0] for word in words), lines[0]
    assert "Traceback" not in stderr


def demo_encoder() -> dict[str, object]:
    """Sizes of the encoder that the demo of the pretrain bundle leaves."""
    demo = json.loads((BUNDLES / "pretrain" / "configs" / "demo.json").read_text())
    keys = ("img_size", "pixdim", "patch_size", "hidden_size", "mlp_dim", "num_layers", "num_heads", "hu_bins")
    sizes = {key: demo[key] for key in (*keys, "scale_space")}
    return sizes | {"statistics_mlp_dim": 2 * demo["hidden_size"]}


def write_encoder(path: Path, seed: int = 0) -> None:
    """What the demo of the pretrain bundle leaves, untrained, with what it says of itself."""
    torch.manual_seed(seed)  # some starts find no organ in so few steps
    settings = demo_encoder() | {"hu_range": [-1000, 1000], "pos_embed": "sincos3d"}
    description = describe(settings, BUNDLES / "pretrain")
    save_weights(SimCroPEncoder(**demo_encoder()).state_dict(), path, description)


def documented_overlays(bundle: Path, page: str = "own_data.md", section: str = "") -> list[dict]:
    """The JSON that a page of the docs, or a section of it, shows, in its order."""
    text = (bundle / "docs" / page).read_text()
    text = text.split(section)[1].split("\n### ")[0] if section else text
    return [json.loads(block) for block in re.findall(r"(?ms)^```\n(\{.*?^\})\n```", text)]


@pytest.fixture
def defaults() -> dict[str, object]:
    """Keys of every ``run_here`` of a module, where it does not give others."""
    return {}


@pytest.fixture
def run_here(bundle: Path, defaults: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """The bundle's ``run`` in this process, which spares minutes of imports; writes to ``tmp_path`` unless told.

    ``run`` and the fixtures made with it go through the real command line.
    """
    monkeypatch.chdir(bundle)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(configs: list[str], run_id: str | None = None, **keys: object) -> None:
        files = [f"configs/{name}" for name in configs]
        of_training = {k: v for k, v in defaults.items() if configs[0] == "train.json" or k == "dataset_dir"}
        keys = {"models_dir": tmp_path / "models", "output_dir": tmp_path / "eval"} | of_training | keys
        keys = {k: str(v) if isinstance(v, Path) else "$None" if v is None else v for k, v in keys.items()}
        monai.bundle.run(run_id, config_file=files, logging_file=False, **keys)

    return call


@pytest.fixture
def refuses(run_here: Callable, capsys: pytest.CaptureFixture) -> Callable:
    """Runs a config that must fail, and checks what a user is told."""

    def check(configs: list[str], keys: dict[str, object], *words: str, run_id: str | None = None) -> None:
        with pytest.raises(Exception) as raised:
            run_here(configs, run_id, **keys)
        capsys.readouterr()
        sys.excepthook(raised.type, raised.value, raised.tb)
        told(capsys.readouterr().err, *words)

    return check


@pytest.fixture
def has_properties(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Checks that configs, with these keys, are a workflow that has all that MONAI asks of its type."""
    monkeypatch.chdir(bundle)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def check(configs: list[str], workflow_type: str = "train", **keys: object) -> None:
        files = [f"configs/{name}" for name in configs]
        keys = {k: str(v) if isinstance(v, Path) else "$None" if v is None else v for k, v in keys.items()}
        workflow = ConfigWorkflow(files, workflow_type=workflow_type, logging_file=False, **keys)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "excepthook", sys.excepthook)
            workflow.initialize()
        assert workflow.check_properties() == []

    return check


@pytest.fixture
def tracked(run_here: Callable, tmp_path: Path) -> Callable[..., list[Any]]:
    """Runs a config with MONAI's ``--tracking mlflow``, and gives the runs that MLflow's client reads back."""

    def call(configs: list[str], run_id: str | None = None, **keys: object) -> list[Any]:
        run_here(configs, run_id, tracking="mlflow", **keys)
        found = []
        for path in tmp_path.rglob("mlruns.db"):
            client = MlflowClient(tracking_uri=path_to_sqlite_uri(str(path)))
            experiment = client.get_experiment_by_name("monai_experiment")
            for run in client.search_runs([experiment.experiment_id]):
                run.losses = client.get_metric_history(run.info.run_id, "train_loss")
                found.append(run)
        return found

    return call
