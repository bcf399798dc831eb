"""The phantom cohort: same bytes from the same seed, CT-RATE's layout, and truth that agrees with itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from custom_components.data import phantom
from custom_components.data.lists import mask_file_name
from custom_components.data.phantom import FINDINGS, LESIONS, ORGANS, Patient, cohort, patient, segmentation_datalist
from custom_components.errors import InputError

from tests.conftest import classes_of, hashes, table
from tests.watch import forked, runs, within

ALL_PRESENT = dict.fromkeys(FINDINGS, 1.0)


def world_centroid(p: Patient, mask: np.ndarray) -> np.ndarray:
    return p.affine[:3, :3] @ np.argwhere(mask).mean(0) + p.affine[:3, 3]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(cohort(tmp_path_factory.mktemp("phantom") / "cohort", num_train=3, num_valid=2, num_workers=1))


@pytest.fixture(scope="module")
def patients() -> list[Patient]:
    return [patient(np.random.default_rng([1, i])) for i in range(12)]


def test_same_seed_same_bytes_whatever_the_workers(built: Path, tmp_path: Path) -> None:
    again = cohort(tmp_path / "again", num_train=3, num_valid=2, num_workers=2)
    assert hashes(Path(again)) == hashes(built)


def test_another_seed_differs(built: Path, tmp_path: Path) -> None:
    other = hashes(Path(cohort(tmp_path / "other", num_train=1, num_valid=0, num_workers=1, seed=43)))
    volume = "dataset/train_fixed/train_1/train_1_a/train_1_a_1.nii.gz"
    assert other[volume] != hashes(built)[volume]


def test_layout_and_columns(built: Path) -> None:
    data = built / "dataset"
    names = {"train": ["train_1_a_1", "train_2_a_1", "train_3_a_1"], "valid": ["valid_1_a_1", "valid_2_a_1"]}
    for split, reports in (("train", "train"), ("valid", "validation")):
        files = [f"{name}.nii.gz" for name in names[split]]
        rows = table(data / "radiology_text_reports" / f"{reports}_reports.csv")
        assert list(rows[0]) == [
            "VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN"
        ]  # fmt: skip
        labels = table(data / "multi_abnormality_labels" / f"{split}_predicted_labels.csv")
        assert list(labels[0]) == ["VolumeName", *FINDINGS]
        metadata = table(data / "metadata" / f"{reports}_metadata.csv")
        assert list(metadata[0]) == ["VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing"]
        assert json.loads(metadata[0]["XYSpacing"]) == [5, 5]
        for part in (rows, labels, metadata):
            assert [row["VolumeName"] for row in part] == files
        for name in names[split]:
            place = Path(f"{split}_fixed", name[:-4], name[:-2])
            image = nib.load(data / place / f"{name}.nii.gz")
            organs = nib.load(data / "masks" / place / name / "organs.nii.gz")
            assert image.get_data_dtype() == np.int16 and image.shape == organs.shape == (64, 64, 32)
            assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
            assert np.any(image.affine[:3, 3] != 0)
            np.testing.assert_array_equal(image.affine, organs.affine)


def test_files_agree_with_each_other_and_with_patient(built: Path) -> None:
    data = built / "dataset"
    reports = {row["VolumeName"]: row for row in table(data / "radiology_text_reports" / "train_reports.csv")}
    sentences = table(data / "masks" / "train_sentences.csv")
    for i, row in enumerate(table(data / "multi_abnormality_labels" / "train_predicted_labels.csv")):
        file = row["VolumeName"]
        name = file.removesuffix(".nii.gz")
        place = Path("train_fixed", name[:-4], name[:-2])
        masks = data / "masks" / place / name
        present = {c for c in FINDINGS if row[c] == "1"}
        assert {p.name for p in masks.iterdir()} == {"organs.nii.gz"} | {
            f"{c.lower().replace(' ', '_')}.nii.gz" for c in present
        }
        spoken = {s["Finding"]: s["Sentence"] for s in sentences if s["VolumeName"] == file}
        assert set(spoken) == present
        assert all(s in reports[file]["Findings_EN"] for s in spoken.values())

        expected = patient(np.random.default_rng([42, 0, i]))
        ras = nib.as_closest_canonical(nib.load(data / place / file))
        np.testing.assert_array_equal(np.asarray(ras.dataobj), expected.volume)
        np.testing.assert_allclose(ras.affine, expected.affine, atol=1e-3)
        for finding, mask in expected.masks.items():
            stored = nib.as_closest_canonical(nib.load(masks / f"{finding.lower().replace(' ', '_')}.nii.gz"))
            np.testing.assert_array_equal(np.asarray(stored.dataobj), mask)


def test_labels_masks_and_sentences_agree(patients: list[Patient]) -> None:
    assert set(FINDINGS) <= set(classes_of("ct_rate"))
    for p in patients:
        assert set(p.labels) == set(FINDINGS)
        assert set(p.masks) == set(p.sentences) == {name for name, label in p.labels.items() if label}
        for name, mask in p.masks.items():
            assert mask.dtype == bool and mask.shape == p.volume.shape and mask.any()
            assert p.sentences[name] in p.findings
        assert p.volume.dtype == np.int16 and p.organs.dtype == np.uint8
        assert p.volume.min() >= -1024 and p.volume.max() <= 3071
        assert p.findings and p.impression


def test_prevalence_names_what_is_drawn() -> None:
    healthy, ill = (patient(np.random.default_rng(2), prevalence=p) for p in ({}, ALL_PRESENT))
    assert not any(healthy.labels.values()) and not healthy.masks
    assert all(ill.labels.values())


def test_left_is_left(patients: list[Patient]) -> None:
    for p in patients:
        assert nib.aff2axcodes(p.affine) == ("R", "A", "S")  # x grows towards the patient's right
        x = {name: world_centroid(p, p.organs == value)[0] for name, value in ORGANS.items()}
        assert x["left lung"] < x["heart"] < x["spine"] + 10 < x["right lung"]
        assert world_centroid(p, p.organs == ORGANS["spine"])[1] < world_centroid(p, p.organs == ORGANS["heart"])[1]
        assert np.sum(p.organs == ORGANS["left lung"]) < np.sum(p.organs == ORGANS["right lung"])


def test_sentence_names_the_side_of_its_mask() -> None:
    checked = set()
    for i in range(30):
        p = patient(np.random.default_rng([3, i]), prevalence=ALL_PRESENT)
        middle = world_centroid(p, p.organs == ORGANS["spine"])[0]
        for name in ("Lung nodule", "Pleural effusion", "Consolidation"):
            words = p.sentences[name].lower().replace(",", "").replace(".", "").split()
            sides = {side for side in ("left", "right") if side in words}
            if len(sides) == 1:
                assert (world_centroid(p, p.masks[name])[0] < middle) == (sides == {"left"}), p.sentences[name]
                checked.add((name, *sides))
    assert len(checked) == 6


def test_cardiothoracic_ratio_tells_cardiomegaly() -> None:
    for enlarged in (0.0, 1.0):
        for i in range(5):
            p = patient(np.random.default_rng([4, i]), prevalence={"Cardiomegaly": enlarged})
            lungs = np.isin(p.organs, (ORGANS["left lung"], ORGANS["right lung"]))
            width = [np.ptp(np.flatnonzero(m.any((1, 2)))) for m in (p.organs == ORGANS["heart"], lungs)]
            assert (width[0] / width[1] > 0.5) == bool(enlarged)


def test_lesions_stand_out_of_the_noise() -> None:
    for i in range(8):
        p = patient(np.random.default_rng([5, i]), prevalence=ALL_PRESENT)
        healthy_lung = np.isin(p.organs, (1, 2)) & ~np.any(list(p.masks.values()), axis=0)
        lung = np.median(p.volume[healthy_lung])
        assert np.median(p.volume[p.masks["Lung nodule"]]) > lung + 200
        assert np.median(p.volume[p.masks["Consolidation"]]) > lung + 200
        assert np.median(p.volume[p.masks["Pleural effusion"]]) > lung + 600
        assert np.median(p.volume[p.masks["Emphysema"]]) < lung - 50
        # against the blood, which may hold contrast: an absolute HU would not tell calcium from that
        blood = np.median(p.volume[p.organs == ORGANS["heart"]])
        assert p.volume[p.masks["Coronary artery wall calcification"]].max() > blood + 4 * 32  # 32 HU: strongest noise


def test_voxel_noise() -> None:
    for i in range(3):
        p = patient(np.random.default_rng([6, i]), prevalence={"Cardiomegaly": 1.0})
        core = p.organs == ORGANS["heart"]
        for axis, voxels in ((0, 4), (1, 4), (2, 2)):  # 20 mm below the surface of a large heart there is only blood
            core = np.min([np.roll(core, n, axis) for n in range(-voxels, voxels + 1)], axis=0)
        assert core.sum() > 100
        assert 20 <= p.volume[core].std() < 60


def test_same_patient_on_another_grid() -> None:
    coarse, fine = (
        patient(np.random.default_rng(7), shape, spacing, ALL_PRESENT)
        for shape, spacing in (((64, 64, 32), (5, 5, 10)), ((80, 70, 64), (4, 5, 5)))
    )
    assert coarse.findings == fine.findings
    for name in ("Cardiomegaly", "Pleural effusion"):
        size = [p.masks[name].sum() * abs(np.linalg.det(p.affine[:3, :3])) for p in (coarse, fine)]
        assert size[0] == pytest.approx(size[1], rel=0.1)
        shift = world_centroid(coarse, coarse.masks[name]) - world_centroid(fine, fine.masks[name])
        np.testing.assert_allclose(shift, 0, atol=3)


def test_too_small_a_field_of_view_is_refused() -> None:
    with pytest.raises(InputError, match="300 mm"):
        patient(np.random.default_rng(0), shape=(32, 64, 32))


def test_cohort_is_reused_or_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cohort"
    arguments = {"dataset_dir": str(folder), "num_train": 1, "num_valid": 1, "num_workers": 1}
    assert cohort(**arguments) == str(folder)
    with monkeypatch.context() as patched:
        patched.setattr(phantom, "_write_patient", lambda *_: pytest.fail("built again"))
        cohort(**arguments)
    before = hashes(folder)
    cohort(**arguments, seed=1)
    assert hashes(folder) != before and json.loads((folder / "phantom.json").read_text())["seed"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["cohort"]


def test_a_failed_build_leaves_the_old_cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cohort"
    cohort(folder, num_train=1, num_valid=0, num_workers=1)
    before = hashes(folder)
    monkeypatch.setattr(phantom, "patient", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cohort(folder, num_train=2, num_valid=0, num_workers=1)
    assert hashes(folder) == before and [p.name for p in tmp_path.iterdir()] == ["cohort"]


def test_a_kill_as_an_old_cohort_is_replaced_refuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cohort"
    cohort(folder, num_train=1, num_valid=0, num_workers=1)

    def dies(path: str | Path, **_: object) -> None:
        Path(path, "phantom.json").unlink(missing_ok=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        monkeypatch.setattr(shutil, "rmtree", dies)
        cohort(folder, num_train=2, num_valid=0, num_workers=1)

    assert os.waitstatus_to_exitcode(os.waitpid(forked(killed), 0)[1]) == -signal.SIGKILL
    assert cohort(folder, num_train=1, num_valid=1, num_workers=1) == str(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["cohort"]


MAKES = """
import sys
from custom_components.data.phantom import cohort
if __name__ == "__main__":
    cohort(sys.argv[1], int(sys.argv[2]), 0, num_workers=2)
"""


@pytest.fixture
def making(tmp_path: Path) -> Callable[[int], subprocess.Popen]:
    """Starts a process that makes a cohort of so many patients with two workers."""
    (tmp_path / "makes.py").write_text(MAKES)

    def start(number: int) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, tmp_path / "makes.py", tmp_path / "there" / "cohort", str(number)])
        assert within(60, lambda: any(tmp_path.glob("there/.cohort.partial-*/cohort/dataset/*/*/*/*.nii.gz")))
        return process

    return start


def test_a_killed_build_leaves_no_workers_and_its_folder_goes_with_the_next(making: Callable, tmp_path: Path) -> None:
    process = making(4000)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    assert len(children) > 1 and within(10, lambda: not any(map(runs, map(int, children))))
    assert any(tmp_path.glob("there/.cohort.partial-*"))
    cohort(tmp_path / "there" / "cohort", num_train=1, num_valid=0, num_workers=1)
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["cohort"]


def test_a_run_waits_for_another_that_makes_the_same_cohort(
    making: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    process = making(24)
    monkeypatch.setattr(phantom, "_write_patient", lambda *_: pytest.fail("built again"))
    cohort(tmp_path / "there" / "cohort", num_train=24, num_valid=0, num_workers=1)
    assert process.wait(10) == 0
    assert f"is being written by process {process.pid} on" in caplog.text


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="phantom.json") as error:
        cohort(tmp_path, num_train=1, num_valid=0)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert (tmp_path / "thesis.txt").exists()


def test_prevalence_of_a_cohort(tmp_path: Path) -> None:
    prevalence = {"Lung nodule": 1.0, "Emphysema": 0.0}
    folder = cohort(tmp_path / "cohort", num_train=3, num_valid=0, num_workers=1, prevalence=prevalence)
    rows = table(Path(folder) / "dataset" / "multi_abnormality_labels" / "train_predicted_labels.csv")
    assert all(row[name] == str(int(name == "Lung nodule")) for row in rows for name in FINDINGS)
    with pytest.raises(InputError, match="prevalence names nodule"):
        cohort(tmp_path / "other", prevalence={"nodule": 1.0})


def test_label_maps_hold_organs_and_lesions(tmp_path: Path) -> None:
    everything = dict.fromkeys(FINDINGS, 1.0)
    folder = Path(cohort(tmp_path / "cohort", num_train=1, num_valid=3, num_workers=1, prevalence=everything))
    lists = json.loads(Path(segmentation_datalist(folder, num_validation=1)).read_text())
    assert {split: len(items) for split, items in lists.items()} == {"training": 1, "validation": 1, "testing": 2}
    assert lists["validation"][0]["image"].endswith("valid_1_a_1.nii.gz")
    for item in (item for items in lists.values() for item in items):
        volume, labels = (nib.load(folder / item[key]) for key in ("image", "label"))
        np.testing.assert_array_equal(labels.affine, volume.affine)
        masks = (folder / item["label"]).parent
        values = np.asarray(labels.dataobj)
        organs = np.asarray(nib.load(masks / "organs.nii.gz").dataobj)
        lesion = np.zeros(values.shape, bool)
        for finding, value in reversed(LESIONS.items()):  # what a later one has not replaced
            mask = np.asarray(nib.load(masks / mask_file_name(finding)).dataobj) > 0
            np.testing.assert_array_equal(values == value, mask & ~lesion)
            assert (values == value).any()
            lesion |= mask
        np.testing.assert_array_equal(values[~lesion], organs[~lesion])
        assert set(ORGANS.values()) <= set(np.unique(values))


def test_a_list_without_patients_is_refused(tmp_path: Path) -> None:
    folder = cohort(tmp_path / "cohort", num_train=1, num_valid=2, num_workers=1)
    with pytest.raises(InputError, match="num_validation 2 of 2"):
        segmentation_datalist(folder, num_validation=2)
