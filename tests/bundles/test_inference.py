"""inference.json over lists of scans that are named alike, missing, skewed or too large: a result or a reason each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from tests.bundles.conftest import told
from tests.conftest import untrained

TINY = {"patch_size": [8, 8, 4], "hidden_size": 24, "mlp_dim": 32, "num_layers": 4, "num_heads": 2, "feature_size": 4}
KEYS = TINY | {"img_size": [32, 32, 16], "pixdim": [4.0, 4.0, 6.0], "classes": ["one", "two"], "amp": False}
AFFINE = np.diag([-4.0, -4.0, 6.0, 1.0])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = untrained("segment", tmp_path_factory.mktemp("bundles"))
    parser = ConfigParser()
    parser.read_config(str(folder / "configs" / "inference.json"))
    for key, value in KEYS.items():
        parser[key] = value
    torch.manual_seed(0)
    (folder / "models").mkdir()
    torch.save(parser.get_parsed_content("network_def").state_dict(), folder / "models" / "model.pt")
    return folder


def write(path: Path, affine: np.ndarray = AFFINE) -> Path:
    volume = np.random.default_rng(0).integers(-1000, 400, (24, 20, 12)).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume, affine), path)
    return path


def infer(run_here: Callable, bundle: Path, dataset_dir: Path, capsys: pytest.CaptureFixture, *words: str) -> str:
    """Standard error of a run that has to end with one line of these words, or well if there are none."""
    keys = KEYS | {"models_dir": bundle / "models", "dataset_dir": dataset_dir}
    if not words:
        run_here(["inference.json"], **keys)
        return capsys.readouterr().err
    with pytest.raises(Exception) as raised:
        run_here(["inference.json"], **keys)
    printed = capsys.readouterr().err
    sys.excepthook(raised.type, raised.value, raised.tb)
    told(capsys.readouterr().err, *words)
    return printed


def test_a_list_of_scans_that_are_named_alike(
    run_here: Callable, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write(tmp_path / "kits_01" / "imaging.nii.gz")
    write(tmp_path / "kits_02" / "imaging.nii.gz", AFFINE @ np.diag([1, 1, 1.5, 1]))
    (tmp_path / "list.txt").write_text("kits_01/imaging.nii.gz\nkits_02/imaging.nii.gz\n")
    infer(run_here, bundle, tmp_path / "list.txt", capsys)
    for name, step in (("kits_01_imaging", 6), ("kits_02_imaging", 9)):
        assert nib.load(tmp_path / "eval" / name / "labels.nii.gz").header.get_zooms()[2] == step


def test_every_line_has_a_result_or_a_reason(
    run_here: Callable, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is missing, one is skewed, one is a link without a file, at one there is not enough memory, one is right."""
    skewed = AFFINE.copy()
    skewed[2, 0], skewed[0, 1] = 0.004, 0.006
    write(tmp_path / "a, skewed.nii.gz", skewed)
    write(tmp_path / "large.nii.gz")
    write(tmp_path / "right.nii")
    (tmp_path / "fetched.nii.gz").symlink_to("annex/not/fetched")
    lines = ["path,what", "a, skewed.nii.gz,x", "large.nii.gz,x", "fetched.nii.gz,x", "patient3,x", "right.nii,x"]
    (tmp_path / "list.csv").write_text("\n".join(lines))

    from custom_components.data import save  # where the memory runs out after the forward pass

    labels_in_scan = save.labels_in_scan

    def fails_at_large(logits: torch.Tensor, *arguments: object) -> object:
        calls.append(1)
        return labels_in_scan(torch.empty(1 << 46) if len(calls) == 2 else logits, *arguments)

    calls: list[int] = []
    monkeypatch.setattr(save, "labels_in_scan", fails_at_large)
    words = ("3 of 5 scans could not be read or processed (large, fetched.nii.gz, patient3)",)
    printed = infer(run_here, bundle, tmp_path / "list.csv", capsys, *words)
    assert printed.count("skipped: ") == 3 and "large: not enough memory" in printed and "Traceback" not in printed
    assert {path.parent.name for path in (tmp_path / "eval").rglob("labels.nii.gz")} == {"a, skewed", "right"}
    labels = tmp_path / "eval" / "a, skewed" / "labels.nii.gz"
    by_itk = np.array(itk.imread(str(labels)).TransformIndexToPhysicalPoint([23, 19, 11])) * [-1, -1, 1]
    np.testing.assert_allclose(nib.load(labels).affine, skewed, atol=1e-6)
    np.testing.assert_allclose(by_itk, (skewed @ [23, 19, 11, 1])[:3], atol=0.2)


def test_items_that_are_a_path_alone(
    run_here: Callable, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """As MONAI Label and Deploy send them; two of one name would be one result."""
    paths = [str(write(tmp_path / case / "ct.nii.gz")) for case in ("one", "two")]
    with pytest.raises(Exception) as raised:
        run_here(
            ["inference.json"], **KEYS, models_dir=bundle / "models", **{"dataset#data": [{"image": p} for p in paths]}
        )
    assert "has the name of another scan, ct" in capsys.readouterr().err
    sys.excepthook(raised.type, raised.value, raised.tb)
    told(capsys.readouterr().err, "1 of 2 scans", "ct.nii.gz")
    assert [path.parent.name for path in (tmp_path / "eval").rglob("labels.nii.gz")] == ["ct"]
