"""Labels back in the scan: at the place, with the geometry and the values that they should have."""

from __future__ import annotations

import os
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from custom_components.data.read import LoadCTd
from custom_components.data.save import (
    AppendProbabilitiesd,
    LabelsInScand,
    MapsInScand,
    ResultTable,
    SaveLabelsd,
    SaveMapsd,
    labels_in_scan,
    peaks,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import CenterSpatialCropd, Compose, Orientation, Orientationd, Spacing, Spacingd, SpatialPadd
from scipy.ndimage import map_coordinates


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
    SaveLabelsd("pred", ["upper lobe"], tmp_path, ResultTable(tmp_path / "volumes.csv", ""))(item)
    saved = nib.load(tmp_path / "scan" / "labels.nii.gz")
    assert saved.shape == shape and saved.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(saved.affine, nib.load(tmp_path / "scan.nii.gz").affine)
    found, truth = np.asarray(saved.dataobj), volume > 0
    assert 2 * (found * truth).sum() / (found.sum() + truth.sum()) > 0.8
    row = pd.read_csv(tmp_path / "volumes.csv").iloc[0]
    assert row["class"] == "upper lobe" and row["voxels"] == found.sum() and row["labels"] == "scan/labels.nii.gz"
    assert row["ml"] == pytest.approx(found.sum() * 1.4 * 1.1 * 2.0 / 1000, abs=0.01)
    chance = nib.load(tmp_path / "scan" / "probability_upper_lobe.nii.gz").get_fdata()
    assert chance.shape == shape and 0 <= chance.min() and chance.max() == pytest.approx(1)


SHAPE = (24, 20, 12)


def placed(skew: float) -> np.ndarray:
    """Axes of 3, 3 and 5 mm, of which the first leans over by `skew` mm a mm, as a tilted gantry's slices do."""
    affine = np.diag([3.0, 3.0, 5.0, 1.0])
    affine[:3, 3] = [-30, -40, 100]
    affine[2, 1] = 3 * skew
    return affine


def write_scan(path: Path, sform: np.ndarray | None, qform: np.ndarray | None, voxels: np.ndarray) -> Path:
    header = nib.Nifti1Header()
    header.set_sform(sform, 2 if sform is not None else 0)
    header.set_qform(qform, 1 if qform is not None else 0)
    nib.save(nib.Nifti1Image(voxels, None, header), path)
    return path


def places_in_itk(path: Path, voxels: np.ndarray) -> np.ndarray:
    """RAS+ mm of voxels [N, 3], as ITK places them."""
    image = itk.imread(str(path))
    return np.array([image.TransformIndexToPhysicalPoint(voxel.tolist()) for voxel in voxels]) * [-1, -1, 1]


@pytest.mark.parametrize("scan_qform", [True, False])
@pytest.mark.parametrize("skew", [0.0, 1e-5, 1e-4, 1e-3, 1e-2, 0.27])
def test_every_output_opens_elsewhere_at_the_scans_place(tmp_path: Path, skew: float, scan_qform: bool) -> None:
    """In nibabel where the scan lies by its sform; in ITK where the scan lies in ITK, or, if that refuses it, there."""
    affine = placed(skew)
    volume = np.full(SHAPE, -900, np.int16)
    volume[6:12, 5:15, 3:9] = 60
    path = write_scan(tmp_path / "scan.nii.gz", affine, placed(0) if scan_qform else None, volume)
    image = LoadCTd("image")({"image": path})["image"]
    soft = (torch.as_tensor(volume)[None] > 0).float()
    item = {"image": image, "name": "out", "pred": torch.cat([1 - soft, soft]) * 8}
    item = LabelsInScand("pred", probabilities=True)(item)
    SaveLabelsd("pred", ["organ"], tmp_path, ResultTable(tmp_path / "volumes.csv", ""))(item)
    maps = MetaTensor(soft, affine=image.affine)
    keys = {"output_dir": str(tmp_path), "stem": "map", "table": ResultTable(tmp_path / "maps.csv", "")}
    SaveMapsd("maps", {"class": ["organ"]}, **keys)({"image": image, "name": "out", "maps": maps})

    organ = np.argwhere(volume > 0)
    by_sform = organ @ affine[:3, :3].T + affine[:3, 3]
    for name, threshold in (("labels", 0), ("probability_organ", 0.5), ("map_01", 0.5)):
        file = tmp_path / "out" / f"{name}.nii.gz"
        saved = nib.load(file)
        found = np.argwhere(saved.get_fdata() > threshold)
        by_nibabel = found @ saved.affine[:3, :3].T + saved.affine[:3, 3]
        by_itk = places_in_itk(file, found)
        if scan_qform:  # voxel by voxel where each reader has the scan
            np.testing.assert_array_equal(found, organ)
            np.testing.assert_allclose(by_nibabel, by_sform, atol=1e-3)
            np.testing.assert_allclose(by_itk, places_in_itk(path, organ), atol=1e-3)
        else:  # one place, whatever the reader
            np.testing.assert_allclose(by_itk, by_nibabel, atol=1.5)
            for axis in range(3):
                ends = np.percentile(by_sform[:, axis], [1, 50, 99])
                np.testing.assert_allclose(np.percentile(by_nibabel[:, axis], [1, 50, 99]), ends, atol=2.6)
            assert abs(len(found) / len(organ) - 1) < 0.1


def test_a_scan_without_an_sform_is_placed_by_its_qform(tmp_path: Path) -> None:
    affine = oblique(SHAPE)
    affine[:3, :3] *= 3
    volume = np.full(SHAPE, -900, np.int16)
    volume[6:12, 5:15, 3:9] = 60
    path = write_scan(tmp_path / "scan.nii", None, affine, volume)
    image = LoadCTd("image")({"image": path})["image"]
    maps = MetaTensor(torch.zeros(1, *SHAPE), affine=image.affine)
    keys = {"output_dir": str(tmp_path), "stem": "map", "table": ResultTable(tmp_path / "maps.csv", "")}
    SaveMapsd("maps", {"class": ["organ"]}, **keys)({"image": image, "name": "out", "maps": maps})
    corners = np.array([[0, 0, 0], [23, 19, 11]])
    expected = places_in_itk(path, corners)
    np.testing.assert_allclose(places_in_itk(tmp_path / "out" / "map_01.nii.gz", corners), expected, atol=1e-3)
    np.testing.assert_allclose(nib.affines.apply_affine(nib.load(path).affine, corners), expected, atol=1e-3)


def test_maps_come_back_where_the_network_looked(tmp_path: Path) -> None:
    """Padding is not of the scan, and what was cropped away was not seen: no peak lies in either."""
    volume = np.full((40, 40, 12), -900, np.int16)
    volume[14:20, 10:16, 2:5] = 60
    nib.save(nib.Nifti1Image(volume, np.diag([-5.0, -5.0, 8.0, 1.0])), tmp_path / "scan.nii.gz")
    steps = [
        LoadCTd("image", check_hu=False),
        Orientationd("image", axcodes="RAS", labels=None),
        Spacingd("image", (5.0, 5.0, 5.0)),
    ]
    steps += [CenterSpatialCropd("image", (30, 30, 30)), SpatialPadd("image", (30, 30, 30), mode="reflect")]
    preprocessing = Compose(steps)
    image = preprocessing({"image": tmp_path / "scan.nii.gz"})["image"]
    maps = torch.full((2, 30, 30, 30), -0.5)
    maps[0] = image[0] / 1000 - 0.5
    maps[1, :, :, -1] = 0.9  # in the padding
    item = MapsInScand("maps", preprocessing)({"image": image, "name": "scan", "maps": maps})
    found = item["maps"]
    assert found.shape == (2, 40, 40, 12)
    assert found[:, :5].isnan().all() and found[:, 6:34, 6:34].isfinite().all()
    highest, places = peaks(found)
    assert highest[1] == pytest.approx(-0.5) and highest[0] < 0
    assert (np.abs(places[0] - [-82.5, -62.5, 24.0]) < [15, 15, 12]).all()
    table = ResultTable(tmp_path / "maps.csv", "")
    SaveMapsd("maps", {"class": ["one", "two"]}, str(tmp_path), "map", table)(item)
    assert (nib.load(tmp_path / "scan" / "map_01.nii.gz").get_fdata()[:5] == 0).all()
    assert list(pd.read_csv(tmp_path / "maps.csv")["max"].round(3)) == [round(float(value), 3) for value in highest]


def test_a_run_tells_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """All scans are in one file, begun anew by each run; the terminal shows the first of many."""
    path = tmp_path / "eval" / "table.csv"
    for scans in (5, 3):
        table = ResultTable(path, "look at it", shown=4)
        for scan in range(scans):
            row = {"name": f"scan {scan}", "image": "/somewhere/long", "class": "Fluid, free", "score": 0.123456}
            row |= {"probability": None, "file": None if scan else "map"}
            table.append([row, row | {"score": None}])
            assert len(pd.read_csv(path)) == 2 * (scan + 1)  # a kill loses none
    table.tell()
    told = capsys.readouterr().out
    assert "scan 1" in told and "scan 2" not in told and "... and 2 more rows" in told and "/somewhere" not in told
    assert f"3 scans: {path}" in told and "next: look at it" in told and "0.123" in told and " -" in told
    assert "probability" not in told and "None" not in told
    wide = ResultTable(tmp_path / "wide.csv", "", transposed=True, shown=2)
    for scan in range(3):
        wide.append([{"name": f"scan {scan}", "image": "", "Nodule": 0.5, "Effusion": 0.25}])
    wide.tell()
    told = capsys.readouterr().out
    assert [line.split()[0] for line in told.splitlines()[1:3]] == ["Nodule", "Effusion"] and "1 more scans" in told
    ResultTable(path, "look at it").tell()  # of a run that no scan came through
    assert capsys.readouterr().out == ""


def test_a_path_that_is_no_utf8_is_written_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    name = os.fsdecode(b"bad\xff")
    image = MetaTensor(torch.zeros(1, 1, 1, 1), meta={"filename_or_obj": f"/data/{name}.nii"})
    table = ResultTable(tmp_path / "predictions.csv", "")
    AppendProbabilitiesd("p", ["nodule"], table)({"p": torch.ones(1), "name": name, "image": image})
    assert (tmp_path / "predictions.csv").read_bytes() == b"name,image,nodule\nbad\xff,/data/bad\xff.nii,1.0\n"
    table.tell()
    assert "bad?" in capsys.readouterr().out
