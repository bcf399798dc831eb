"""Preparing data sets: one phantom, written in every layout with its quirks, must come out as the same volume."""

from __future__ import annotations

import gzip
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from custom_components.data.lists import prepared
from custom_components.data.phantom import ORGANS, patient
from custom_components.data.prepare import CannotWrite, Recipe, prepare, prepare_scan, read_manifest
from custom_components.data.sources import BTCV, CCCCII, LUNA16, CTRate, RadChestCT, Scan, Source
from custom_components.data.volume import Raw, Unfit, read_nifti
from custom_components.errors import InputError
from matplotlib.figure import Figure
from PIL import Image
from scipy.ndimage import map_coordinates

from tests.watch import runs, within

SHAPE, SPACING = (80, 72, 40), (4.0, 4.5, 8.0)
PIXDIM = (5.0, 5.0, 10.0)
RECIPE = {"pixdim": PIXDIM, "antialias": False}
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass
class Truth:
    """A phantom in RAS order, and its linear interpolation at any place."""

    volume: np.ndarray
    organs: np.ndarray
    affine: np.ndarray

    def at(self, shape: tuple[int, ...], affine: np.ndarray, labels: bool = False) -> np.ndarray:
        index = np.linalg.inv(self.affine) @ affine
        grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
        places = np.tensordot(index[:3, :3], grid, 1) + index[:3, 3][:, None, None, None]
        values = self.organs if labels else self.volume.clip(-1000, 1000).astype(float)
        return map_coordinates(values, places, order=0 if labels else 1, mode="nearest")


@pytest.fixture(scope="module")
def truth() -> Truth:
    p = patient(np.random.default_rng(3), SHAPE, SPACING, {"Lung nodule": 1.0})
    return Truth(p.volume, p.organs, p.affine)


def save(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def save_mhd(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = itk.image_from_array(np.ascontiguousarray(array.T))
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection(itk.matrix_from_array(lps[:3, :3] / spacing))
    itk.imwrite(image, str(path))


def turned(truth: Truth, codes: str) -> tuple[np.ndarray, np.ndarray]:
    """The phantom with its axes in another order and direction, and the affine of that."""
    to = nib.orientations.axcodes2ornt(codes)
    ornt = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), to)
    array = nib.orientations.apply_orientation(truth.volume, ornt)
    return array, truth.affine @ nib.orientations.inv_ornt_aff(ornt, truth.volume.shape)


def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A prepared file as any tool reads it, in RAS order."""
    image = nib.load(path)
    assert nib.aff2axcodes(image.affine) == ("S", "A", "R")
    image = nib.as_closest_canonical(image)
    array = np.asanyarray(image.dataobj)
    np.testing.assert_allclose(image.header.get_zooms(), PIXDIM, rtol=1e-5)
    return array, image.affine


def only(source: Source) -> Scan:
    (scan,) = source.scans()
    return scan


def prepared_like(truth: Truth, source: Source, folder: Path, tolerance: float = 1.0, **keys: object) -> dict:
    """Prepare the only scan of a source and compare it with the truth at every voxel."""
    scan = only(source)
    row = prepare_scan(source, scan, Recipe(**RECIPE | keys), folder)
    array, affine = load(folder / scan.output)
    assert array.dtype == np.int16 and array.min() >= -1000
    error = np.abs(array - truth.at(array.shape, affine))
    assert error.max() <= tolerance, error.max()
    assert array.size * np.prod(PIXDIM) == pytest.approx(truth.volume.size * np.prod(SPACING), rel=0.1)
    assert not list(folder.rglob(".*.tmp.*"))
    return row


def centred(truth: Truth) -> Truth:
    """The same phantom around 0 mm, for layouts that lose the position."""
    affine = truth.affine.copy()
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(SHAPE) - 1) / 2)
    return Truth(truth.volume, truth.organs, affine)


def write_metadata(root: Path, **changes: str) -> None:
    row = {
        "VolumeName": "train_1_a_1.nii.gz",
        "RescaleSlope": "2",
        "RescaleIntercept": "-1024",
        "XYSpacing": "[4.0, 4.5]",
        "ZSpacing": "8.0",
    } | changes
    (root / "dataset" / "metadata").mkdir(parents=True, exist_ok=True)
    pd.DataFrame([row]).to_csv(root / "dataset" / "metadata" / "train_metadata.csv", index=False)


V1 = "dataset/train/train_1/train_1_a/train_1_a_1.nii.gz"
V2 = "dataset/train_fixed/train_1/train_1_a/train_1_a_1.nii.gz"


def test_a_volume_that_the_metadata_table_names_twice(truth: Truth, tmp_path: Path) -> None:
    """The same twice is nothing new; two slopes, of which nobody can tell which is right, cost that volume alone."""
    save(tmp_path / V1, ((truth.volume.clip(-1024, 3071) + 1024) // 2).astype(np.int16), np.eye(4))
    write_metadata(tmp_path)
    table = tmp_path / "dataset" / "metadata" / "train_metadata.csv"
    row = pd.read_csv(table, dtype=str)
    pd.concat([row, row]).to_csv(table, index=False)
    source = CTRate(tmp_path)
    assert source.read(only(source)).slope == 2
    pd.concat([row, row.assign(RescaleSlope="1")]).to_csv(table, index=False)
    source = CTRate(tmp_path)
    with pytest.raises(Unfit, match="train_1_a_1 has RescaleSlope '2 or 1'"):
        source.read(only(source))
    table.write_bytes(row.to_csv(index=False).encode("utf-16"))
    with pytest.raises(InputError, match="train_metadata.csv cannot be read as a CSV or JSON file in UTF-8"):
        CTRate(tmp_path).scans()


@pytest.mark.parametrize("placed", [True, False])
def test_ct_rate_v1_takes_what_its_header_lacks_from_the_table(truth: Truth, tmp_path: Path, placed: bool) -> None:
    array, affine = turned(truth, "LPS")
    position = str((LPS @ affine)[:3, 3].tolist())
    placing = {"ImageOrientationPatient": "[1, 0, 0, 0, 1, 0]", "ImagePositionPatient": position} if placed else {}
    write_metadata(tmp_path, **placing)
    raw = (array.clip(-1024, 3071) + 1024) // 2  # slope 2
    save(tmp_path / V1, raw.astype(np.int16), np.eye(4))
    row = prepared_like(truth if placed else centred(truth), CTRate(tmp_path), tmp_path / "out", tolerance=2)
    assert row["version"] == "v1"


def test_a_blank_header_over_right_hu_is_not_rescaled(truth: Truth, tmp_path: Path) -> None:
    array, _ = turned(truth, "LPS")
    write_metadata(tmp_path, RescaleSlope="1")
    save(tmp_path / V1, array, np.eye(4))
    row = prepared_like(centred(truth), CTRate(tmp_path), tmp_path / "out")
    assert row["version"] == "v1 header, HU right"


@pytest.mark.parametrize("codes", ["LPS", "RAS", "SAR", "PIL", "ARI"])
def test_ct_rate_v2_of_any_axis_order_is_never_rescaled(truth: Truth, tmp_path: Path, codes: str) -> None:
    array, affine = turned(truth, codes)
    array = array.copy()
    edge = np.zeros(array.shape, bool)
    edge[0, :3, :3] = True
    array[edge & (array <= -1000)] = -3024  # outside the field of view: clipped before it is interpolated
    write_metadata(tmp_path)
    save(tmp_path / V2, array, affine)
    row = prepared_like(truth, CTRate(tmp_path), tmp_path / "out")
    assert (
        row["version"] == "v2" and row["orientation"] == codes and sorted(row["spacing"].split()) == ["4", "4.5", "8"]
    )


def test_v2_header_without_rescaling_is_rescaled_once(truth: Truth, tmp_path: Path) -> None:
    write_metadata(tmp_path, RescaleSlope="1")
    save(tmp_path / V2, truth.volume + np.int16(1024), truth.affine)
    assert "was missing" in prepared_like(truth, CTRate(tmp_path), tmp_path / "out")["version"]


def test_rescaled_twice_is_refused(truth: Truth, tmp_path: Path) -> None:
    write_metadata(tmp_path, RescaleSlope="1")
    save(tmp_path / V2, truth.volume - np.int16(1024), truth.affine)
    with pytest.raises(Unfit, match="not HU") as refused:
        prepare_scan(source := CTRate(tmp_path), only(source), Recipe(**RECIPE), tmp_path / "out")
    assert refused.value.reason == "not_hu"


def test_ct_clips_layout_without_affine(truth: Truth, tmp_path: Path) -> None:
    array, _ = turned(truth, "SLP")
    path = tmp_path / "train_preprocessed" / "train_1" / "train_1a" / "train_1_a_1.npz"
    path.parent.mkdir(parents=True)
    np.savez(path, (array.clip(-1000, 1000) / 1000).astype(np.float32))
    source = CTRate(tmp_path, preprocessed_spacing=SPACING)
    assert only(source).output == V2.removesuffix(".gz")
    row = prepared_like(centred(truth), source, tmp_path / "out")
    assert "times 1000" in row["version"]
    path.unlink()
    save(path.with_suffix(".nii.gz"), turned(truth, "LPS")[0], np.eye(4))
    prepared_like(centred(truth), CTRate(tmp_path, preprocessed_spacing=SPACING), tmp_path / "out")


def test_oblique_axes_are_kept_and_a_tilted_gantrys_straightened(truth: Truth, tmp_path: Path) -> None:
    for name, angle, shear in (("oblique", 0.3, 0.0), ("tilted", 0.0, 0.25)):
        move = np.eye(4)
        move[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        move[1, 2] += shear  # y moves with z
        source = tmp_path / name
        write_metadata(source, XYSpacing="[4.0, 4.5]", ZSpacing=str(8 * np.hypot(1, shear)))
        save(source / V2, truth.volume, move @ truth.affine)
        moved = Truth(truth.volume, truth.organs, move @ truth.affine)
        if shear:
            prepare_scan(read := CTRate(source), only(read), Recipe(**RECIPE), source / "out")
            array, affine = load(source / "out" / only(read).output)
            expected = moved.at(array.shape, affine)
            inside = array > -1000  # where the scan does not reach, the lowest HU stands
            # interpolated twice, so smoother than the noise of the truth
            assert np.corrcoef(array[inside], expected[inside])[0, 1] > 0.97
            assert abs((array[inside] - expected[inside]).mean()) < 10
            axes = affine[:3, :3] / PIXDIM
            np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-5)
        else:
            prepared_like(moved, CTRate(source), source / "out")


def test_rad_chest_ct(truth: Truth, tmp_path: Path) -> None:
    array, _ = turned(truth, "IPL")
    np.savez_compressed(tmp_path / "trn00001.npz", ct=array)
    row = prepared_like(centred(truth), RadChestCT(tmp_path, spacing=(8.0, 4.5, 4.0)), tmp_path / "out")
    assert "IPL and 8 x 4.5 x 4 mm assumed" in row["version"]


def test_cc_ccii_slices_out_of_order_and_of_mixed_sizes(truth: Truth, tmp_path: Path) -> None:
    array, _ = turned(truth, "IPL")
    grey = np.rint((array.clip(-1000, 1000) + 1000) / 2000 * 255).astype(np.uint8)
    folder = tmp_path / "NCP" / "12" / "3699"
    folder.mkdir(parents=True)
    for i, picture in enumerate(grey):  # "10.png" sorts before "2.png"
        Image.fromarray(picture).save(folder / f"{i}.png")
    odd = Image.open(folder / "5.png")
    odd.resize((odd.width * 2, odd.height * 2), Image.Resampling.NEAREST).save(folder / "5.png")
    source = CCCCII(tmp_path, spacing=(8.0, 4.5, 4.0))
    assert only(source).output == "images_resized/3699.nii"
    quantised = centred(truth)
    quantised.volume = np.rint(np.transpose(grey, (2, 1, 0))[::-1, ::-1, ::-1] / 255 * 2000 - 1000)
    scan = only(source)
    row = prepare_scan(source, scan, Recipe(**RECIPE, check_hu=False, min_lung_share=0), tmp_path / "out")
    array, affine = load(tmp_path / "out" / scan.output)
    error = np.abs(array - quantised.at(array.shape, affine))
    assert np.percentile(error, 95) <= 1  # all but what lies beside the resized slice
    assert "window [-1000, 1000]" in row["version"] and "1 of 40 slices resized to 80 x 72" in row["version"]


def test_luna16_with_its_lung_mask(truth: Truth, tmp_path: Path) -> None:
    array, affine = turned(truth, "LPS")
    save_mhd(tmp_path / "subset3" / "1.2.3.mhd", array, affine)
    mask = np.select([truth.organs == ORGANS["left lung"], truth.organs == ORGANS["right lung"]], [3, 4], 0)
    mask[truth.organs == ORGANS["trachea"]] = 5
    labels = Truth(truth.volume, mask.astype(np.uint8), truth.affine)
    save_mhd(tmp_path / "seg-lungs-LUNA16" / "1.2.3.mhd", mask.astype(np.uint8)[::-1, ::-1], affine)
    prepared_like(truth, LUNA16(tmp_path), tmp_path / "out")
    found, place = load(tmp_path / "out" / "masks_processed" / "1.2.3.nii")
    image, _ = load(tmp_path / "out" / "images" / "1.2.3.nii")
    assert found.dtype == np.uint8 and found.shape == image.shape and set(np.unique(found)) == {0, 1, 2, 3}
    expected = labels.at(found.shape, place, labels=True)
    expected = np.where(expected >= 3, expected - 2, 0)
    assert (found == expected).mean() > 0.995  # nearest is ambiguous half way between voxels
    assert prepared(tmp_path / "out" / "images" / "1.2.3.nii.gz").endswith("1.2.3.nii")


def test_btcv_and_a_label_that_lies_elsewhere(truth: Truth, tmp_path: Path) -> None:
    save(tmp_path / "imagesTr" / "img0001.nii.gz", truth.volume, truth.affine)
    save(tmp_path / "labelsTr" / "label0001.nii.gz", truth.organs, truth.affine)
    prepared_like(truth, BTCV(tmp_path), tmp_path / "out")
    found, place = load(tmp_path / "out" / "labelsTr" / "label0001.nii")
    assert (found == truth.at(found.shape, place, labels=True)).mean() > 0.995
    moved = truth.affine.copy()
    moved[0, 3] += 40
    save(tmp_path / "labelsTr" / "label0001.nii.gz", truth.organs, moved)
    with pytest.raises(Unfit, match="lies elsewhere"):
        prepare_scan(source := BTCV(tmp_path), only(source), Recipe(**RECIPE), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.nii"))  # nothing stale is left of a scan that fails now


def test_antialiasing_is_nearer_to_a_phantom_made_at_that_size(tmp_path: Path) -> None:
    """The same patient, sampled fine and coarse: 2.0 x 2.0 x 2.5 mm with noise against 5 x 5 x 10 mm without."""
    rng = np.random.default_rng
    fine, coarse = (patient(rng(5), s, d, {}) for s, d in (((150, 150, 128), (2, 2, 2.5)), ((60, 60, 32), (5, 5, 10))))
    target = Truth(coarse.volume, coarse.organs, coarse.affine)
    errors = {}
    for antialias in (True, False):
        save(tmp_path / V2, fine.volume, fine.affine)
        prepare_scan(source := CTRate(tmp_path), only(source), Recipe(PIXDIM, antialias=antialias), tmp_path / "out")
        array, affine = load(tmp_path / "out" / only(source).output)
        errors[antialias] = np.sqrt(((array - target.at(array.shape, affine)) ** 2).mean())
    assert errors[True] < 0.95 * errors[False], errors


@pytest.mark.parametrize(
    "reason, change",
    [
        ("wrong_dimensions", lambda v, a: (np.stack([v, v], -1), a)),
        ("few_slices", lambda v, a: (v[:, :, :2], a)),
        ("spacing", lambda v, a: (v, a @ np.diag([0.001, 0.001, 0.001, 1]))),
        ("spacing", lambda v, a: (v, np.diag([0.0, 1, 1, 1]) @ a)),
        ("non_finite", lambda v, a: (np.where(v == v.max(), np.nan, v).astype(np.float32), a)),
        ("empty", lambda v, a: (np.full_like(v, -1000), a)),
        ("orientation", lambda v, a: (v, np.eye(4))),
        ("not_hu", lambda v, a: (v // 20, a)),
        (
            "little_lung",
            lambda v, a: (np.where(np.arange(80)[:, None, None] < 30, -1000, v.clip(0)).astype(np.int16), a),
        ),
    ],
)
def test_reasons(truth: Truth, tmp_path: Path, reason: str, change: Callable) -> None:
    array, affine = change(truth.volume, truth.affine)
    path = tmp_path / "imagesTr" / "img0001.nii"
    path.parent.mkdir()
    image = nib.Nifti1Image(array, None)
    image.header.set_sform(affine, 1)  # a qform could not be as wrong
    nib.save(image, path)
    with pytest.raises(Unfit) as refused:
        prepare_scan(source := BTCV(tmp_path), only(source), Recipe(**RECIPE), tmp_path / "out")
    assert refused.value.reason == reason and str(path) in str(refused.value)
    assert not list((tmp_path / "out").rglob("*.nii"))


# ------------------------------------------------------------------------------------------------- many processes


class Hostile(BTCV):
    """A source whose reading kills its process, or hangs, by the name of the file."""

    def read(self, scan: Scan) -> Raw:
        if "kill" in scan.name:
            os.kill(os.getpid(), 9)
        if "hang" in scan.name:
            time.sleep(600)
        return read_nifti(scan.image)


def test_a_crash_or_a_hang_costs_its_volume_alone_and_a_restart_skips_the_rest(truth: Truth, tmp_path: Path) -> None:
    for name in ("a", "b_kill", "c", "d_hang", "e", "f"):
        save(tmp_path / "raw" / "imagesTr" / f"{name}.nii.gz", truth.volume, truth.affine)
    (tmp_path / "raw" / "imagesTr" / "f.nii.gz").write_bytes(b"no gzip")
    out = tmp_path / "out"

    def run(source: Source, **keys: object) -> None:
        prepare(source, out, **RECIPE, num_workers=2, timeout_minutes=0.1, **keys)

    with pytest.raises(InputError, match="3 of 6 volumes failed"):
        run(Hostile(tmp_path / "raw"))
    table = pd.read_csv(out / "manifest.csv").set_index("name")
    assert table["reason"].dropna().to_dict() == {
        "imagesTr/b_kill": "crashed",
        "imagesTr/d_hang": "timeout",
        "imagesTr/f": "unreadable",
    }
    assert table.loc["imagesTr/c", "checks"] == "duplicate of imagesTr/a"
    assert "| timeout | 1 |" in (out / "summary.md").read_text() and (out / "contact_sheet.png").stat().st_size > 10_000
    assert not list(out.rglob(".*.tmp.*")) and len(list(out.rglob("*.nii"))) == 3

    # what is done is kept; what has changed, is damaged or has failed is done again
    times = {path.name: path.stat().st_mtime_ns for path in out.rglob("*.nii")}
    for name in ("b_kill", "d_hang"):
        (tmp_path / "raw" / "imagesTr" / f"{name}.nii.gz").unlink()
    save(tmp_path / "raw" / "imagesTr" / "f.nii.gz", truth.volume, truth.affine)
    (out / "imagesTr" / "c.nii").write_bytes(b"cut")
    with open(out / "manifest" / "shard_1_of_1.csv", "a") as manifest:
        manifest.write("imagesTr/e,failed,cut o")  # a kill in the midst of a line
    run(Hostile(tmp_path / "raw"))
    after = {path.name: path.stat().st_mtime_ns for path in out.rglob("*.nii")}
    assert sorted(after) == ["a.nii", "c.nii", "e.nii", "f.nii"]
    assert {name for name in times if after[name] == times[name]} == {"a.nii", "e.nii"}


@pytest.mark.parametrize("compress", [False, True])
def test_what_an_earlier_recipe_made_does_not_outlive_a_rerun(truth: Truth, tmp_path: Path, compress: bool) -> None:
    """Training takes the .nii.gz before the .nii, and would mix the recipes."""
    for name in ("a", "b_kill", "d_hang", "f"):
        save(tmp_path / "raw" / "imagesTr" / f"{name}.nii.gz", truth.volume, truth.affine)
        save(tmp_path / "raw" / "labelsTr" / f"{name}.nii.gz", truth.organs, truth.affine)
    out = tmp_path / "out"
    prepare(BTCV(tmp_path / "raw"), out, **RECIPE, num_workers=2, compress=compress)
    assert len(list(out.rglob("*.nii*"))) == 8
    (tmp_path / "raw" / "imagesTr" / "f.nii.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match="3 of 4 volumes failed"):
        prepare(Hostile(tmp_path / "raw"), out, **RECIPE, num_workers=2, timeout_minutes=0.1)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.nii*")) == ["imagesTr/a.nii", "labelsTr/a.nii"]


def test_a_source_is_never_removed_however_the_folders_lie(truth: Truth, tmp_path: Path) -> None:
    source = tmp_path / "raw" / "imagesTr" / "a.nii.gz"
    save(source, truth.volume, truth.affine)
    before = source.read_bytes()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "imagesTr").symlink_to(source.parent)
    prepare(BTCV(tmp_path / "raw"), tmp_path / "out", **RECIPE, num_workers=1, compress=False)
    assert source.read_bytes() == before and source.with_name("a.nii").is_file()


def test_shards_share_the_work_and_the_manifest(truth: Truth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        save(tmp_path / "raw" / "imagesTr" / f"{i}.nii.gz", truth.volume, truth.affine)
    out = tmp_path / "out"
    prepare(BTCV(tmp_path / "raw"), out, **RECIPE, num_workers=1, shard="2/2", compress=True)
    assert set(read_manifest(out)) == {"imagesTr/1"}
    prepare(BTCV(tmp_path / "raw"), out, **RECIPE, num_workers=1, shard="1/2", compress=True)
    assert len(pd.read_csv(out / "manifest.csv")) == 3 and len(list(out.rglob("*.nii.gz"))) == 3
    assert nib.load(out / "imagesTr" / "1.nii.gz").shape[0] == 32
    with pytest.raises(InputError, match="shard is '3/2'"):
        prepare(BTCV(tmp_path / "raw"), out, **RECIPE, shard="3/2")


KILLED = """
import os, signal, sys, time
from pathlib import Path
from custom_components.data.prepare import prepare
from custom_components.data.sources import BTCV

class Hanging(BTCV):
    def read(self, scan):
        Path(self.dataset_dir, f"pid_{os.getpid()}").touch()
        time.sleep(600)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    prepare(Hanging(sys.argv[1]), sys.argv[2], num_workers=2)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="asks /proc which processes run")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_workers_do_not_outlive_a_run_that_was_killed_and_a_restart_tidies_up(
    truth: Truth, tmp_path: Path, end: signal.Signals
) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    for name in "ab":
        save(raw / "imagesTr" / f"{name}.nii.gz", truth.volume, truth.affine)
    (tmp_path / "killed.py").write_text(KILLED)
    run = subprocess.Popen([sys.executable, tmp_path / "killed.py", raw, out], stderr=subprocess.DEVNULL)
    try:
        assert within(60, lambda: len(list(raw.glob("pid_*"))) == 2)
    finally:
        run.send_signal(end)
        try:
            run.wait(20)
        finally:
            run.kill()
    workers = [int(path.name.removeprefix("pid_")) for path in raw.glob("pid_*")]
    assert within(10, lambda: not any(map(runs, workers)))
    assert not list(out.rglob("*.nii"))

    left = out / "imagesTr" / ".12345.tmp.a.nii"  # as a worker killed in the midst of writing leaves it
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    foreign = left.with_name(".12345.tmp.c.nii")  # of a scan of another shard
    foreign.write_bytes(b"half")
    prepare(BTCV(raw), out, **RECIPE, num_workers=1)
    assert not left.exists() and foreign.exists() and len(list((out / "imagesTr").glob("[ab].nii"))) == 2


def test_a_second_run_on_a_shard_is_refused_and_other_shards_are_not(truth: Truth, tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    for name in "ab":
        save(raw / "imagesTr" / f"{name}.nii.gz", truth.volume, truth.affine)
    (tmp_path / "killed.py").write_text(KILLED.replace("num_workers=2", "num_workers=2, shard='1/2'"))
    run = subprocess.Popen([sys.executable, tmp_path / "killed.py", raw, out], stderr=subprocess.DEVNULL)
    try:
        assert within(60, lambda: list(raw.glob("pid_*")))
        for shard in ("1/2", None):  # the same, and one that shares its volumes
            with pytest.raises(InputError, match=f"is being written by process {run.pid} on .* prepared_dir") as told:
                prepare(BTCV(raw), out, **RECIPE, num_workers=1, shard=shard)
            assert "\n" not in str(told.value)
        prepare(BTCV(raw), out, **RECIPE, num_workers=1, shard="2/2")
        assert [path.name for path in out.rglob("*.nii")] == ["b.nii"]
    finally:
        run.kill()
        run.wait()
    prepare(BTCV(raw), out, **RECIPE, num_workers=1)
    assert not list(out.rglob(".*"))


def test_a_contact_sheet_that_cannot_be_drawn_costs_a_warning(
    truth: Truth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "raw" / "imagesTr" / "a.nii.gz", truth.volume, truth.affine)
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: 1 / 0)
    prepare(BTCV(tmp_path / "raw"), tmp_path / "out", **RECIPE, num_workers=1)
    assert "contact_sheet.png: not drawn (ZeroDivisionError" in caplog.text
    assert len(pd.read_csv(tmp_path / "out" / "manifest.csv")) == 1


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process and those that it starts can grow beyond ``size`` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_the_run_in_one_line_and_keeps_what_is_done(truth: Truth, tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    save(raw / "imagesTr" / "a.nii.gz", truth.volume, truth.affine)
    prepare(BTCV(raw), out, **RECIPE, num_workers=1)
    size = (out / "imagesTr" / "a.nii").stat().st_size
    for name in "bc":
        save(raw / "imagesTr" / f"{name}.nii.gz", truth.volume, truth.affine)

    def fails(limit: int, *words: str) -> None:
        with largest_file(limit), pytest.raises(CannotWrite) as told:
            prepare(BTCV(raw), out, **RECIPE, num_workers=2)
        assert all(word in str(told.value) for word in words) and "\n" not in str(told.value)
        assert not list(out.rglob(".*.tmp.*"))
        assert set(read_manifest(out)) >= {"imagesTr/a"}

    fails(size - 1, ".nii cannot be written (File too large): free space")
    assert [path.name for path in out.rglob("*.nii")] == ["a.nii"]
    # room for volumes, not for another row
    manifest = out / "manifest" / "shard_1_of_1.csv"
    with open(manifest, "a") as file:
        file.write(("x" * 977 + "," * 22 + "\n") * (size // 1000 + 1))
    fails(manifest.stat().st_size + 30, "shard_1_of_1.csv cannot be written")
    prepare(BTCV(raw), out, **RECIPE, num_workers=1)
    assert len(list(out.rglob("*.nii"))) == 3 and "3 prepared, 0 failed" in (out / "summary.md").read_text()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_volumes(truth: Truth, tmp_path: Path) -> None:
    """What one worker does, 200 times: the second half needs no more than the first."""
    save(tmp_path / "imagesTr" / "a.nii.gz", truth.volume.repeat(2, 0), truth.affine)
    source, recipe = BTCV(tmp_path), Recipe((2.0, 2.0, 4.0))
    scan, peaks = only(source), []
    for _ in range(200):
        prepare_scan(source, scan, recipe, tmp_path / "out")
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # KiB
    assert peaks[-1] - peaks[20] < 20_000, (peaks[0], peaks[20], peaks[-1])


# ------------------------------------------------------------------------------------------------------------ fuzz


def damaged(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Cut off, or with bytes changed, or with a part taken out."""
    kind = rng.choice(("cut", "changed", "shortened"))
    at = rng.randrange(len(content))
    if kind == "cut":
        return kind, content[:at]
    if kind == "changed":
        changed = bytearray(content)
        for _ in range(rng.randrange(1, 9)):
            changed[rng.randrange(len(changed))] ^= rng.randrange(1, 256)
        return kind, bytes(changed)
    return kind, content[:at] + content[at + rng.randrange(1, 200) :]


def slices(root: Path) -> CCCCII:
    return CCCCII(root, spacing=(8.0, 4.5, 4.0))


# the source, the file to damage, and what damage each format's checksums or lengths cannot tell from another sound file
FUZZED: dict[str, tuple[Callable[[Path], Source], str, set[str]]] = {
    "nii.gz": (BTCV, "imagesTr/a.nii.gz", set()),
    "label.nii.gz": (BTCV, "labelsTr/a.nii.gz", set()),
    "npz": (lambda root: RadChestCT(root, spacing=(8.0, 4.5, 4.0)), "a.npz", set()),
    "png": (slices, "1/3/7.png", set()),
    "jpg": (slices, "1/3/7.jpg", {"changed", "shortened"}),
    "nii": (BTCV, "imagesTr/a.nii", {"changed"}),
    "mhd": (LUNA16, "subset0/a.mhd", {"cut", "changed", "shortened"}),
    "raw": (LUNA16, "subset0/a.raw", {"changed"}),
    "mask.mhd": (LUNA16, "seg-lungs-LUNA16/a.mhd", {"cut", "changed", "shortened"}),
}


def fuzz(truth: Truth, root: Path, kind: str, cases: int) -> tuple[int, int]:
    """Damaged files that were refused, and that came out as another volume although their format could have told."""
    small = truth.volume[::2, ::2, ::2]
    organs = np.minimum(truth.organs[::2, ::2, ::2], 5).astype(np.uint8)
    array = small[::-1, ::-1, ::-1].transpose(2, 1, 0)
    affine = truth.affine @ np.diag([2.0, 2.0, 2.0, 1.0])
    make, name, untold = FUZZED[kind]
    path = root / name
    if name.startswith(("imagesTr", "labelsTr")):
        save(path if "imagesTr" in name else root / "imagesTr" / "a.nii.gz", small, affine)
        save(root / "labelsTr" / path.name, organs, affine)
    elif name.endswith("npz"):
        np.savez_compressed(path, ct=array)
    elif name.startswith("1/"):
        path.parent.mkdir(parents=True)
        for i, picture in enumerate(((array.clip(-1000, 1000) + 1000) / 2000 * 255).astype(np.uint8)):
            Image.fromarray(picture).save(path.with_stem(str(i)))
    else:
        save_mhd(root / "subset0" / "a.mhd", small, affine)
        save_mhd(root / "seg-lungs-LUNA16" / "a.mhd", organs, affine)
    source = make(root)
    scan = only(source)
    sound = path.read_bytes()
    recipe = Recipe(**RECIPE, check_hu="1/" not in name, min_lung_share=0)
    out = root / "out"

    def voxels() -> list[bytes]:
        prepare_scan(source, scan, recipe, out)
        return [(out / file).read_bytes() for file in (scan.output, scan.label_output) if file]

    expected = voxels()
    refused = wrong = 0
    for case in range(cases):
        how, broken = damaged(sound, random.Random(case))
        path.write_bytes(broken)
        try:
            wrong += voxels() != expected and how not in untold
        except Unfit as told:
            refused += 1
            assert told.reason and "\n" not in str(told)
            assert not (out / scan.output).exists()
        assert not list(out.rglob(".*.tmp.*"))
    return refused, wrong


@pytest.mark.parametrize("kind", FUZZED)
def test_a_damaged_file_crashes_nothing_and_makes_no_volume(truth: Truth, tmp_path: Path, kind: str) -> None:
    """Where a format has no checksum, damage that leaves its length right may pass for sound, and is not counted."""
    refused, wrong = fuzz(truth, tmp_path, kind, 50)
    assert wrong == 0 and refused > 10


def test_a_raw_that_is_cut_off_makes_no_volume(truth: Truth, tmp_path: Path) -> None:
    save_mhd(tmp_path / "subset0" / "a.mhd", truth.volume, truth.affine)
    raw = tmp_path / "subset0" / "a.raw"
    raw.write_bytes(raw.read_bytes()[:-2])
    with pytest.raises(Unfit, match="a.raw has") as refused:
        prepare_scan(source := LUNA16(tmp_path), only(source), Recipe(**RECIPE), tmp_path / "out")
    assert refused.value.reason == "unreadable"


def test_a_damaged_label_is_named_and_not_its_scan(truth: Truth, tmp_path: Path) -> None:
    for name, voxels in (("imagesTr/a.nii.gz", truth.volume), ("labelsTr/a.nii.gz", truth.organs)):
        save(tmp_path / name, voxels, truth.affine)
    label = tmp_path / "labelsTr" / "a.nii.gz"
    label.write_bytes(label.read_bytes()[:-100])
    with pytest.raises(Unfit, match=f"{label} cannot be read"):
        prepare_scan(source := BTCV(tmp_path), only(source), Recipe(**RECIPE), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("kind", FUZZED)
def test_no_damaged_file_of_many_makes_a_volume(truth: Truth, tmp_path: Path, kind: str) -> None:
    refused, wrong = fuzz(truth, tmp_path, kind, 1000)
    print(f"{kind}: {refused} of 1000 refused")
    assert wrong == 0


def test_gzip_of_several_members_is_read_whole(truth: Truth, tmp_path: Path) -> None:
    content = nib.Nifti1Image(truth.volume, truth.affine).to_bytes()
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content[:5000]) + gzip.compress(content[5000:]))
    np.testing.assert_array_equal(read_nifti(tmp_path / "a.nii.gz").voxels, truth.volume)
