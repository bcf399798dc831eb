"""Segmentation metrics against counts and distances by hand; sliding window, label reading and labels in the scan."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from monai.transforms import Compose, Orientation, Spacing
from scipy.ndimage import map_coordinates
from torch import Tensor, nn

from custom_components.data.lists import msd
from custom_components.data.read import LoadCTd, LoadLabeld
from custom_components.data.save import LabelsInScand, SaveLabelsd, labels_in_scan
from custom_components.errors import InputError
from custom_components.evaluation.metrics import mean_interval, mean_of_defined
from custom_components.evaluation.segment import PresentDice, scan_scores
from custom_components.run.inferers import WindowInferer


def boxes(*corners: tuple[int, int, int, int]) -> Tensor:
    """A label map of cubes: (class, start, stop along x, and size along y and z)."""
    labels = torch.zeros(24, 12, 10, dtype=torch.uint8)
    for index, start, stop, size in corners:
        labels[start:stop, 2 : 2 + size, 2 : 2 + size] = index
    return labels


def test_scores_of_shifted_boxes() -> None:
    """A box moved by 2 voxels of 1.5 mm: surfaces are 3 mm apart at both ends, and 0 along the sides."""
    truth, pred = boxes((1, 4, 14, 5)), boxes((1, 6, 16, 5))
    scores = scan_scores(pred, truth, (1.5, 1.0, 1.0), num_classes=2)
    assert scores["dice"][1] == pytest.approx(8 / 10)
    assert scores["hd95"][1] == pytest.approx(3.0)
    assert 0.75 < scores["surface_dice"][1] < 0.9  # 25 of 178 surface voxels are the end that lies 3 mm off
    near = scan_scores(pred, truth, (1.5, 1.0, 1.0), num_classes=2, tolerance=3.0)
    assert near["surface_dice"][1] == pytest.approx(1.0)


def test_hd95_is_in_mm() -> None:
    truth, pred = boxes((1, 4, 14, 5)), boxes((1, 6, 16, 5))
    small, large = (scan_scores(pred, truth, (size, size, size), 2)["hd95"][1] for size in (1.0, 2.5))
    assert small > 0 and large == pytest.approx(2.5 * small)


def test_a_class_in_neither_map_is_left_out_and_an_invented_one_counts_as_0() -> None:
    truth, pred = boxes((1, 4, 8, 4)), boxes((1, 4, 8, 4), (3, 10, 14, 4))
    scores = scan_scores(pred, truth, (1, 1, 1), num_classes=4)
    assert scores["dice"][1] == 1 and scores["hd95"][1] == 0 and scores["surface_dice"][1] == 1
    assert all(math.isnan(scores[name][2]) for name in scores)
    assert scores["dice"][3] == 0 and scores["surface_dice"][3] == 0 and math.isnan(scores["hd95"][3])
    assert mean_of_defined(np.array([scores["dice"][1:]]))[0] == 0.5
    metric = PresentDice(num_classes=4)
    metric(pred[None, None], truth[None, None])
    assert metric.aggregate().item() == 0.5
    with_background = PresentDice(num_classes=4, include_background=True)
    with_background(pred[None, None], truth[None, None])
    assert with_background.aggregate().item() == pytest.approx((scores["dice"][0] + 1 + 0) / 3)


def test_an_empty_scan_has_no_dice() -> None:
    empty = torch.zeros(4, 4, 4, dtype=torch.uint8)
    scores = scan_scores(empty, empty, (1, 1, 1), num_classes=3)
    assert math.isnan(mean_of_defined(np.array([scores["dice"][1:]]))[0])
    assert mean_interval(np.array([math.nan]), seed=0) == {"mean": None, "low": None, "high": None, "scans": 0}


def test_interval_covers_the_mean() -> None:
    values = np.random.default_rng(0).normal(0.7, 0.1, 50)
    found = mean_interval(np.append(values, np.nan), seed=1)
    assert found["scans"] == 50 and found["mean"] == pytest.approx(values.mean())
    error = values.std() / math.sqrt(50)
    assert found["low"] == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert found["high"] == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)


class Places(nn.Module):
    """Logits that depend on the voxel and on the window around it, so that blending shows."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.mean((2, 3, 4), keepdim=True) - x * 0.5, x.flip(4)], 1)


@pytest.mark.parametrize("size", [(20, 12, 61), (20, 12, 64), (16, 8, 5), (9, 9, 8), (17, 8, 20)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.6])
def test_slabs_give_what_one_pass_gives(size: tuple, overlap: float) -> None:
    volume = torch.randn(1, 1, *size)
    expected = sliding_window_inference(volume, (16, 8, 8), 4, Places(), overlap, mode="gaussian", cval=-1.0)
    for slab_windows in (1, 2, 3, 100):
        inferer = WindowInferer((16, 8, 8), overlap=overlap, amp=False, slab_windows=slab_windows)
        found = inferer(volume, Places())
        assert found.dtype == torch.float16
        torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=2e-3)


def oblique(shape: tuple[int, int, int]) -> np.ndarray:
    """A tilted affine with permuted and flipped axes, mm."""
    turn = np.deg2rad(8)
    rotation = np.array([[1, 0, 0], [0, np.cos(turn), -np.sin(turn)], [0, np.sin(turn), np.cos(turn)]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.array([[0, -1.4, 0], [0, 0, 1.1], [2.0, 0, 0]])
    affine[:3, 3] = [40, -30, 10]
    return affine


def test_labels_come_back_to_the_place_in_the_scan() -> None:
    """A ball painted in mm: resampled to the network's grid as logits, and back, it is where it was."""
    shape = (30, 42, 36)
    affine = torch.as_tensor(oblique(shape))
    index = torch.stack(torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij"), -1).double()
    place = index @ affine[:3, :3].T + affine[:3, 3]
    centre = place.reshape(-1, 3).mean(0) + torch.tensor([5.0, -4.0, 3.0])
    ball = ((place - centre).norm(dim=-1) < 14).float()
    scan = MetaTensor(ball[None] * 8 - 4, affine=affine)
    network = Compose([Orientation("RAS", labels=None), Spacing((1.0, 1.2, 1.5), mode="bilinear")])(scan)
    logits = torch.cat([torch.zeros_like(network), network]).as_tensor()
    labels, chance = labels_in_scan(logits, network.affine, affine, shape, probabilities=True)
    assert labels.dtype == torch.uint8 and labels.shape == shape
    assert 2 * (labels * ball).sum() / (labels.sum() + ball.sum()) > 0.97
    assert chance.shape == (1, *shape) and ((chance[0] > 127) == (labels > 0)).float().mean() > 0.999


@settings(max_examples=40, deadline=None)
@given(
    order=st.permutations(range(3)),
    signs=st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3),
    steps=st.tuples(*[st.floats(0.3, 3)] * 3),
    shift=st.tuples(*[st.floats(-3, 3)] * 3),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40)),
    tilt=st.sampled_from([0.0, 0.2]),
)
def test_logits_are_interpolated_at_every_voxel(order, signs, steps, shift, shape, tilt) -> None:
    """Whatever the two grids' axes, spacings and places, beside scipy's interpolation of all of it at once."""
    sizes = (7, 5, 9)
    logits = torch.randn(3, *sizes, generator=torch.Generator().manual_seed(0))
    to_network = np.eye(4)
    to_network[:3, :3] = np.diag(signs)[order] * steps + tilt * np.roll(np.eye(3), 1, 0)
    to_network[:3, 3] = np.array(sizes) / 2 - to_network[:3, :3] @ np.array(shape) / 2 + shift
    affine = torch.as_tensor(oblique(sizes))
    labels, chances = labels_in_scan(logits, affine, affine @ torch.as_tensor(to_network), shape, probabilities=True)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).reshape(3, -1)
    places = to_network[:3, :3] @ index + to_network[:3, 3:]
    expected = torch.as_tensor(
        np.stack([map_coordinates(values.numpy(), places, order=1, mode="nearest").reshape(shape) for values in logits])
    )
    torch.testing.assert_close(chances / 255, expected.softmax(0)[1:], atol=0.003, rtol=0, check_dtype=False)
    best = expected.topk(2, 0).values
    assert (labels == expected.argmax(0))[best[0] - best[1] > 1e-3].all()


def test_saved_labels_have_the_scans_geometry(tmp_path: Path) -> None:
    shape = (20, 18, 40)
    volume = np.full(shape, -900, np.int16)
    volume[5:10, 4:9, 20:30] = 60
    nib.save(nib.Nifti1Image(volume, oblique(shape)), tmp_path / "scan.nii.gz")
    image = LoadCTd("image")({"image": tmp_path / "scan.nii.gz"})["image"]
    image = Compose([Orientation("RAS", labels=None), Spacing((1.4, 1.4, 1.4), mode="bilinear")])(image)
    logits = torch.cat([-image.as_tensor(), image.as_tensor()]) + torch.tensor([-400.0, 400.0])[:, None, None, None]
    item = {"image": image, "pred": logits, "name": "scan"}
    item = LabelsInScand("pred", probabilities=True)(item)
    SaveLabelsd("pred", ["upper lobe"], tmp_path)(item)
    saved = nib.load(tmp_path / "scan" / "labels.nii.gz")
    assert saved.shape == shape and saved.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(saved.affine, nib.load(tmp_path / "scan.nii.gz").affine)
    found, truth = np.asarray(saved.dataobj), volume > 0
    assert 2 * (found * truth).sum() / (found.sum() + truth.sum()) > 0.8
    row = (tmp_path / "scan" / "volumes.csv").read_text().splitlines()[1].split(",")
    assert row[0] == "upper lobe" and int(row[1]) == found.sum()
    assert float(row[2]) == pytest.approx(found.sum() * 1.4 * 1.1 * 2.0 / 1000, abs=0.01)
    chance = nib.load(tmp_path / "scan" / "probability_upper_lobe.nii.gz").get_fdata()
    assert chance.shape == shape and 0 <= chance.min() and chance.max() == pytest.approx(1)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, np.ndarray]:
    """A scan and its label map."""
    volume = np.full((12, 10, 8), -900, np.int16)
    volume[3:6] = 40
    labels = np.zeros(volume.shape, np.uint8)
    labels[3:6] = 1
    labels[8] = 2
    for name, array in (("image", volume), ("label", labels)):
        nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 3.0, 1.0])), tmp_path / f"{name}.nii.gz")
    return tmp_path / "image.nii.gz", tmp_path / "label.nii.gz", labels


def read(image: Path, label: Path, **keys) -> MetaTensor:
    item = LoadCTd("image")({"image": image, "label": label})
    return LoadLabeld("label", ["left lung", "right lung"], **keys)(item)["label"]


def test_a_label_map_is_read_as_class_indices(pair: tuple) -> None:
    image, label, values = pair
    found = read(image, label)
    assert found.dtype == torch.uint8 and found.shape == (1, 12, 10, 8)
    np.testing.assert_array_equal(found.numpy()[0], values)
    # all at once: 1 becomes 2 and 2 becomes 1
    np.testing.assert_array_equal(
        read(image, label, label_values={"1": 2, "2": 1}).numpy()[0],
        [0, 2, 1] @ np.eye(3)[values].transpose(0, 1, 3, 2),
    )


def test_values_outside_the_classes_are_told(pair: tuple) -> None:
    image, label, values = pair
    nib.save(nib.Nifti1Image(values * 3, np.diag([2.0, 2.0, 3.0, 1.0])), label)
    with pytest.raises(InputError, match=r"label.nii.gz holds label values \[3, 6\].*label_values"):
        read(image, label)
    found = read(image, label, label_values={"3": 1, "6": 0})
    np.testing.assert_array_equal(found.numpy()[0], values == 1)
    nib.save(nib.Nifti1Image(values * 0.5, np.diag([2.0, 2.0, 3.0, 1.0])), label)
    with pytest.raises(InputError, match="not whole"):
        read(image, label)


def test_another_shape_or_place_is_told(pair: tuple) -> None:
    image, label, values = pair
    nib.save(nib.Nifti1Image(values[:-1], np.diag([2.0, 2.0, 3.0, 1.0])), label)
    with pytest.raises(InputError, match="11 x 10 x 8 voxels and .*image.nii.gz has 12 x 10 x 8"):
        read(image, label)
    nib.save(nib.Nifti1Image(values, np.diag([-2.0, 2.0, 3.0, 1.0])), label)
    with pytest.raises(InputError, match=r"label.nii.gz lies 44.0 mm off .*image.nii.gz"):
        read(image, label)
    moved = np.diag([2.0, 2.0, 3.0, 1.0])
    moved[0, 3] = 0.1  # what rounding in a header does
    nib.save(nib.Nifti1Image(values, moved), label)
    assert read(image, label).any()


def test_an_empty_label_map_is_a_warning(pair: tuple, caplog: pytest.LogCaptureFixture) -> None:
    image, label, values = pair
    nib.save(nib.Nifti1Image(values * 0, np.diag([2.0, 2.0, 3.0, 1.0])), label)
    with caplog.at_level(logging.WARNING):
        assert not read(image, label).any()
    assert "label.nii.gz holds none of the classes" in caplog.text


@pytest.fixture
def btcv(tmp_path: Path) -> Path:
    """A folder with a list as BTCV's: `test` is of bare file names."""
    import json

    content = {
        "training": [{"image": f"imagesTr/{i}.nii.gz", "label": f"labelsTr/{i}.nii.gz"} for i in range(20)],
        "validation": [{"image": "imagesTr/20.nii.gz", "label": "labelsTr/20.nii.gz"}],
        "test": ["0061.nii.gz"],
        "labels": {"0": "background"},
    }
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (tmp_path / folder).mkdir()
    for i in range(21):
        (tmp_path / "imagesTr" / f"{i}.nii.gz").touch()
        (tmp_path / "labelsTr" / f"{i}.nii.gz").touch()
    (tmp_path / "imagesTs" / "0061.nii.gz").touch()
    return tmp_path


def test_lists_are_read_as_published(btcv: Path) -> None:
    items = msd(btcv)
    assert len(items) == 20
    expected = {"image": str(btcv / "imagesTr/3.nii.gz"), "name": "3", "label": str(btcv / "labelsTr/3.nii.gz")}
    assert items[3] == expected
    assert [item["name"] for item in msd(btcv, split="validation")] == ["20"]
    assert msd(btcv, split="test") == [{"image": str(btcv / "imagesTs/0061.nii.gz"), "name": "0061"}]
    with pytest.raises(InputError, match="have no label.*0061"):
        msd(btcv, split="test", labelled=True)


def test_fractions_are_nested(btcv: Path) -> None:
    def names(fraction: float) -> set[str]:
        return {item["name"] for item in msd(btcv, data_fraction=fraction)}

    assert [len(names(f)) for f in (0.05, 0.1, 0.5, 1.0)] == [1, 2, 10, 20]
    assert names(0.05) < names(0.1) < names(0.5) < names(1.0)


def test_scans_that_could_not_be_prepared_are_left_out(btcv: Path, tmp_path: Path) -> None:
    failed = tmp_path / "failed.csv"  # as prepare writes it
    failed.write_text("name,reason,message\nimagesTr/3,unreadable,download it again\nimagesTr/20,empty,air\n")
    (btcv / "imagesTr" / "3.nii.gz").unlink()
    assert [item["name"] for item in msd(btcv, exclude=failed)] == [str(i) for i in range(20) if i != 3]
    with pytest.raises(InputError, match="failed.csv leaves nothing of validation"):
        msd(btcv, split="validation", exclude=failed)


def test_a_bad_list_is_told(btcv: Path) -> None:
    with pytest.raises(InputError, match="no testing list .*training, validation, test"):
        msd(btcv, split="testing")
    (btcv / "labelsTr" / "7.nii.gz").unlink()
    with pytest.raises(InputError, match="1 files of training.*7.nii.gz"):
        msd(btcv)
    with pytest.raises(InputError, match="absent.json"):
        msd(btcv, "absent.json")
    (btcv / "broken.json").write_text("{")
    with pytest.raises(InputError, match="broken.json is not JSON"):
        msd(btcv, "broken.json")
    (btcv / "odd.json").write_text('{"training": [{"label": "a"}]}')
    with pytest.raises(InputError, match="without an image"):
        msd(btcv, "odd.json")
    with pytest.raises(InputError, match="data_fraction"):
        msd(btcv, data_fraction=0)
