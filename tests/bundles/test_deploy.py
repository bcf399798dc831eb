"""deploy.json: MONAI alone, from a folder or a list of scans to label maps, and a line for what is none."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import itk
import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import save_net_with_metadata
from torch import Tensor, nn

from tests.conftest import BUNDLES, write_dicom

AFFINE = np.diag([-4.0, -4.0, 6.0, 1.0])
TISSUE = np.s_[4:12, 4:16, 3:9]


class Threshold(nn.Module):
    """Logits of two classes by the intensity: tissue is the second."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([-x, x], 1)


def write(path: Path, lowest: int = -900, affine: np.ndarray = AFFINE, shape: tuple = (24, 20, 12)) -> Path:
    volume = np.full(shape, lowest, np.int16)
    volume[TISSUE] = 60
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume, affine), path)
    return path


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "model.ts"
    save_net_with_metadata(torch.jit.script(Threshold()), str(path))
    return path


@pytest.fixture
def deploy(script: Path, tmp_path: Path) -> Callable[..., Path]:
    def run(dataset_dir: object) -> Path:
        keys = {"checkpoint": str(script), "output_dir": str(tmp_path / "eval"), "pixdim": [4.0, 4.0, 6.0]}
        keys |= {"img_size": [16, 16, 16], "device": "$torch.device('cpu')", "dataset_dir": dataset_dir}
        monai.bundle.run(config_file=str(BUNDLES / "segment/configs/deploy.json"), logging_file=False, **keys)
        return tmp_path / "eval"

    return run


def test_scans_of_a_folder_and_of_two_folders(deploy: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    paths = [write(tmp_path / case / "ct.nii.gz") for case in ("case1", "case2")]
    shutil.copy(paths[0], tmp_path / "case1" / "other.nii.gz")
    (tmp_path / "case1" / "notes.txt").touch()
    folder = deploy(str(tmp_path / "case1"))
    assert {file.name for file in folder.rglob("*.nii.gz")} == {"ct_labels.nii.gz", "other_labels.nii.gz"}
    assert "not checked here" in capsys.readouterr().out
    shutil.rmtree(folder)
    deploy([str(path) for path in paths])
    found = sorted(folder.rglob("*.nii.gz"))
    assert len(found) == 2 and len({file.parent.parent for file in found}) == 2
    for file in found:  # by the two readers
        labels = nib.load(file)
        assert labels.shape == (24, 20, 12) and (np.asarray(labels.dataobj)[TISSUE] == 1).all()
        np.testing.assert_allclose(labels.affine, AFFINE, atol=1e-4)
        assert itk.array_from_image(itk.imread(str(file))).T[TISSUE].min() == 1


def test_a_series_of_dicom_files(deploy: Callable, tmp_path: Path) -> None:
    write_dicom(itk.imread(str(write(tmp_path / "scan.nii.gz")), itk.SS), tmp_path / "series")
    (file,) = deploy(f"{tmp_path}/series/").rglob("*.nii.gz")
    assert file.name == "series_labels.nii.gz" and nib.load(file).get_fdata().sum() == 8 * 12 * 6


@pytest.mark.parametrize(
    ("scan", "words"),
    [
        ({"lowest": -2000}, None),
        ({"lowest": 0}, "intensities that are not HU"),
        ({"affine": np.diag([0.004, 0.004, 0.006, 1])}, "voxel spacing"),
        ({"shape": (24, 20, 2)}, "three slices or more"),
    ],
)
def test_what_is_no_ct_is_refused_in_a_line(deploy: Callable, tmp_path: Path, scan: dict, words: str | None) -> None:
    path = write(tmp_path / "scan.nii.gz", **scan)
    if words is None:
        assert list(deploy(str(path)).rglob("*.nii.gz"))
        return
    with pytest.raises(SystemExit) as stopped:
        deploy(str(path))
    assert stopped.value.code.startswith(f"error: {path} ") and words in stopped.value.code
    assert "\n" not in stopped.value.code and not list(tmp_path.rglob("*_labels.nii.gz"))


def test_what_is_not_there_or_named_alike(deploy: Callable, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: .*absent.nii.gz does not exist"):
        deploy(str(tmp_path / "absent.nii.gz"))
    write(tmp_path / "scans" / "a.nii.gz")
    (tmp_path / "scans" / "a.mha").touch()
    with pytest.raises(SystemExit, match="error: .*a.mha has the name of another"):
        deploy(str(tmp_path / "scans"))


KEYS = {
    "--pixdm=[1,1,1]": "--pixdm is no key of deploy.json: did you mean pixdim?",
    "--pixdim=[1,1]": "pixdim is [1, 1]: give three numbers of mm above 0",
    "--hu_range=[1000,-1000]": "hu_range is [1000, -1000]: give two numbers of HU, ascending",
    "--img-size=[96,96,4.5]": "img_size is [96, 96, 4.5]: give three whole numbers of voxels above 0",
    "--overlap=1": "overlap is 1: give a number from 0",
    "--sw_batch_size=four": "sw_batch_size is four: give a whole number above 0",
    "--output_dir=$open('ran', 'w').name": "output_dir $open('ran', 'w').name begins as code does",
}


@pytest.mark.parametrize("word", KEYS)
def test_a_wrong_key_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, word: str
) -> None:
    """By the command line itself, in this process, which spares the imports: no script, no scan is looked at."""
    monkeypatch.chdir(tmp_path)
    command = ["--config_file", str(BUNDLES / "segment/configs/deploy.json"), "--logging_file", "False", word]
    monkeypatch.setattr(sys, "argv", ["monai.bundle", "run", *command, "--dataset_dir", "./absent.nii"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
    assert stopped.value.code.startswith(f"error: {KEYS[word]}") and "\n" not in stopped.value.code
    assert not list(tmp_path.iterdir())


def test_every_key_of_deployment_may_be_given() -> None:
    config = json.loads((BUNDLES / "segment/configs/deploy.json").read_text())
    schema = json.loads((BUNDLES / "segment/configs/keys.json").read_text())
    known = {key for section, keys in schema.items() if section not in ("parts", "arguments") for key in keys}
    assert set(config["keys"]) == known & config.keys() | {"description"}
