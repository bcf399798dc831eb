"""Datalists from small trees written as the data sets are published."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from custom_components.data.lists import CT_RATE_CLASSES, ct_rate, scans
from custom_components.errors import InputError

REPORT_COLUMNS = ["VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN"]
FINDINGS = 'Nodule of 2.3 x 1.8 cm, "spiculated", right upper lobe.\nŒsophagus ≥ 1.5 mm, “normal”; naïve T₁.'


def write_csv(path: Path, rows: list[list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def write_ct_rate(
    root: Path, names: list[str], split: str = "train", folder: str = "train_fixed", reports: str = "train"
) -> Path:
    """`root`/dataset with empty volumes, reports and labels (label i of volume j is 1 where i == j)."""
    for name in names:
        patient, scan = "_".join(name.split("_")[:2]), "_".join(name.split("_")[:3])
        volume = root / "dataset" / folder / patient / scan / f"{name}.nii.gz"
        volume.parent.mkdir(parents=True, exist_ok=True)
        volume.touch()
    rows = [[f"{name}.nii.gz", "Cough", "CT", f"Findings of {name}.", f"Impression of {name}."] for name in names]
    write_csv(root / "dataset" / "radiology_text_reports" / f"{reports}_reports.csv", [REPORT_COLUMNS, *rows])
    labels = [[f"{name}.nii.gz", *np.eye(len(names), 18, dtype=int)[row]] for row, name in enumerate(names)]
    write_csv(
        root / "dataset" / "multi_abnormality_labels" / f"{split}_predicted_labels.csv",
        [["VolumeName", *CT_RATE_CLASSES], *labels],
    )
    return root


NAMES = ["train_2_a_1", "train_1_a_1", "train_1_a_2", "train_1_b_1"]


def test_classes():
    assert len(CT_RATE_CLASSES) == len(set(CT_RATE_CLASSES)) == 18
    assert (CT_RATE_CLASSES[0], CT_RATE_CLASSES[-1]) == ("Medical material", "Interlobular septal thickening")


@pytest.mark.parametrize("folder", ["train_fixed", "train"])
@pytest.mark.parametrize("inside", [False, True], ids=["parent", "dataset"])
def test_both_versions(tmp_path, folder, inside):
    write_ct_rate(tmp_path, NAMES, folder=folder)
    items = ct_rate(tmp_path / "dataset" if inside else tmp_path)
    assert [item["name"] for item in items] == NAMES  # every reconstruction, in the order of the file
    assert [item["patient"] for item in items] == ["train_2", "train_1", "train_1", "train_1"]
    assert items[3]["image"] == str(tmp_path / "dataset" / folder / "train_1" / "train_1_b" / "train_1_b_1.nii.gz")
    assert items[1]["findings"] == "Findings of train_1_a_1." and items[1]["impression"] == "Impression of train_1_a_1."
    for row, item in enumerate(items):
        assert item["abnormalities"].dtype == np.float32
        np.testing.assert_array_equal(item["abnormalities"], np.eye(18)[row])
    assert set(items[0]) == {"image", "name", "patient", "findings", "impression", "abnormalities"}


def test_fixed_version_is_preferred(tmp_path):
    write_ct_rate(tmp_path, NAMES, folder="train")
    write_ct_rate(tmp_path, NAMES, folder="train_fixed")
    assert all("train_fixed" in item["image"] for item in ct_rate(tmp_path))


@pytest.mark.parametrize("reports", ["validation", "valid"])
def test_valid_split_with_masks_and_sentences_without_labels(tmp_path, reports):
    names = ["valid_1_a_1", "valid_2_a_1"]
    write_ct_rate(tmp_path, names, "valid", "valid_fixed", reports)
    root = tmp_path / "dataset"
    (root / "multi_abnormality_labels" / "valid_predicted_labels.csv").unlink()
    masks = root / "masks" / "valid_fixed" / "valid_1" / "valid_1_a" / "valid_1_a_1"
    masks.mkdir(parents=True)
    rows = [["valid_1_a_1.nii.gz", "Lung nodule", "A nodule, right."], ["valid_1_a_1.nii.gz", "Emphysema", "Some."]]
    write_csv(root / "masks" / "valid_sentences.csv", [["VolumeName", "Finding", "Sentence"], *rows])
    first, second = ct_rate(tmp_path, "valid")
    assert first["masks"] == str(masks) and "masks" not in second and "abnormalities" not in first
    assert first["sentences"] == {"Lung nodule": "A nodule, right.", "Emphysema": "Some."}
    assert second["sentences"] == {}


def test_report_text(tmp_path):
    write_ct_rate(tmp_path, NAMES)
    rows = [
        [f"{NAMES[0]}.nii.gz", "", "", FINDINGS, "Not given."],
        [f"{NAMES[1]}.nii.gz", "", "", "not given", "  \n"],
        [f"{NAMES[2]}.nii.gz", "", "", "", "Contrast was not given."],
        ["", "", "", "", ""],
    ]
    path = tmp_path / "dataset" / "radiology_text_reports" / "train_reports.csv"
    write_csv(path, [REPORT_COLUMNS, *rows, rows[0]])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # the mark that spreadsheets put before UTF-8
    texts = [(item["findings"], item["impression"]) for item in ct_rate(tmp_path)]
    assert texts == [(FINDINGS, ""), ("", ""), ("", "Contrast was not given.")]


def test_labels_follow_the_names_of_columns(tmp_path):
    write_ct_rate(tmp_path, NAMES[:1])
    path = tmp_path / "dataset" / "multi_abnormality_labels" / "train_predicted_labels.csv"
    write_csv(path, [["VolumeName", *reversed(CT_RATE_CLASSES)], [NAMES[0] + ".nii.gz", *range(2), *[0] * 16]])
    assert np.flatnonzero(ct_rate(tmp_path)[0]["abnormalities"]).tolist() == [16]


def test_fractions_are_nested_by_patient(tmp_path):
    names = [f"train_{patient}_a_{volume}" for patient in range(1, 101) for volume in (1, 2)]
    write_ct_rate(tmp_path, names)
    fractions = [0.001, 0.01, 0.07, 0.1, 0.5, 1.0]
    chosen = [{item["name"] for item in ct_rate(tmp_path, data_fraction=fraction)} for fraction in fractions]
    assert [len(names) for names in chosen] == [2, 2, 14, 20, 100, 200]  # both volumes of 1, 1, 7, 10, ... patients
    assert all(small <= large for small, large in pairwise(chosen))
    assert chosen[3] == {item["name"] for item in ct_rate(tmp_path, data_fraction=0.1)}
    assert chosen[3] != {item["name"] for item in ct_rate(tmp_path, data_fraction=0.1, seed=1)}

    # Leaving out a patient brings in the next in line, and moves no other.
    left_out = next(iter(chosen[3])).rsplit("_", 2)[0]
    exclude = tmp_path / "exclude.txt"
    exclude.write_text(f"{left_out}_a_1\n{left_out}_a_2\n")
    remaining = {item["name"] for item in ct_rate(tmp_path, data_fraction=0.1, exclude=exclude)}
    assert len(remaining) == 20 and len(remaining - chosen[3]) == 2 and len(remaining & chosen[3]) == 18


@pytest.mark.parametrize(
    "text",
    [
        "train_1_a_1\ntrain_1_b_1\n",
        "train_1_a_1.nii.gz\r\ntrain_1_b_1.nii.gz",
        'VolumeName,reason\n"train_1_a_1.nii.gz",head\n"train_1_b_1.nii.gz","head, again"\n',
        "dataset/train/train_1/train_1_a/train_1_a_1.nii.gz\n\ntrain_1_b_1\n",
    ],
    ids=["text", "endings", "csv", "paths"],
)
def test_exclude(tmp_path, text):
    write_ct_rate(tmp_path, NAMES)
    next(tmp_path.rglob("train_1_b_1.nii.gz")).unlink()  # what is left out need not be there
    exclude = tmp_path / "exclude"
    exclude.write_text(text)
    assert [item["name"] for item in ct_rate(tmp_path, exclude=exclude)] == ["train_2_a_1", "train_1_a_2"]


def reports(root: Path) -> Path:
    return root / "dataset" / "radiology_text_reports" / "train_reports.csv"


def labels(root: Path) -> Path:
    return root / "dataset" / "multi_abnormality_labels" / "train_predicted_labels.csv"


@pytest.mark.parametrize(
    "spoil, arguments, message",
    [
        (None, {"dataset_dir": "nowhere"}, ["nowhere", "no folder"]),
        (None, {"split": "test"}, ["'test'", "train or valid"]),
        (None, {"split": "valid"}, ["has no reports", "validation_reports.csv"]),
        (None, {"data_fraction": 0}, ["data_fraction is 0"]),
        (None, {"data_fraction": 10}, ["data_fraction is 10"]),
        (None, {"exclude": "nowhere.txt"}, ["nowhere.txt", "cannot be read"]),
        (lambda root: reports(root).unlink(), {}, ["has no reports", "train_reports.csv"]),
        (lambda root: reports(root).write_text(""), {}, ["train_reports.csv", "cannot be read as a CSV"]),
        (lambda root: reports(root).write_bytes(b"VolumeName\n\xff\xfe\x80"), {}, ["train_reports.csv", "UTF-8"]),
        (lambda root: write_csv(reports(root), [REPORT_COLUMNS]), {}, ["train_reports.csv", "names no volume"]),
        (
            lambda root: write_csv(reports(root), [["VolumeName", "Findings", "Impressions_EN"], ["a", "b", "c"]]),
            {},
            ["train_reports.csv", "no column Findings_EN", "it has VolumeName, Findings, Impressions_EN"],
        ),
        (
            lambda root: write_csv(reports(root), [REPORT_COLUMNS, ["scan7.nii.gz", "", "", "", ""]]),
            {},
            ["train_reports.csv", "'scan7'", "split_patient_scan_reconstruction"],
        ),
        (
            lambda root: write_csv(labels(root), [["VolumeName", *CT_RATE_CLASSES[1:]]]),
            {},
            ["train_predicted_labels.csv", "no column Medical material"],
        ),
        (
            lambda root: write_csv(labels(root), [["VolumeName", *CT_RATE_CLASSES], ["train_2_a_1", *[1] * 17, "?"]]),
            {},
            ["train_predicted_labels.csv", "Interlobular septal thickening of train_2_a_1 is ?", "0 or 1"],
        ),
        (
            lambda root: write_csv(labels(root), [["VolumeName", *CT_RATE_CLASSES], ["train_2_a_1", *[1] * 18]]),
            {},
            ["train_predicted_labels.csv", "no row for 3 of 4 volumes", "train_1_a_1"],
        ),
        (
            lambda root: [path.unlink() for path in (root / "dataset").rglob("train_1_*.nii.gz")],
            {},
            ["3 of 4 volumes", "train_1_a_1.nii.gz", "not on disk", "exclude"],
        ),
        (
            lambda root: (root / "dataset" / "train_fixed").rename(root / "dataset" / "elsewhere"),
            {},
            ["no volumes", "train_fixed"],
        ),
    ],
)
def test_errors_say_what_to_mend(tmp_path, monkeypatch, spoil, arguments, message):
    monkeypatch.chdir(write_ct_rate(tmp_path, NAMES))
    if spoil:
        spoil(tmp_path)
    with pytest.raises(InputError) as error:
        ct_rate(**{"dataset_dir": tmp_path, **arguments})
    assert all(part in str(error.value) for part in message), error.value
    assert "\n" not in str(error.value)


def test_excluding_everything_is_an_error(tmp_path):
    write_ct_rate(tmp_path, NAMES)
    with pytest.raises(InputError, match="names every volume"):
        ct_rate(tmp_path, exclude=reports(tmp_path))


def test_thousands_of_volumes_take_seconds_at_most(tmp_path):
    write_ct_rate(tmp_path, [f"train_{patient}_a_{volume}" for patient in range(1000) for volume in (1, 2)])
    start = time.perf_counter()
    assert len(ct_rate(tmp_path)) == 2000
    assert time.perf_counter() - start < 2


def test_import_needs_neither_torch_nor_monai():
    code = "import sys, custom_components.data.lists; sys.exit(any(name in sys.modules for name in ('torch', 'monai')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def write_dicom_like(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(128) + b"DICM")


def test_scans_of_a_folder(tmp_path):
    for name in ["b.nii.gz", "A.NRRD", "c.mhd", "c.raw", "._b.nii.gz", "notes.txt", "short"]:
        (tmp_path / name).touch()
    write_dicom_like(tmp_path / "patient 1" / "IM0001")
    write_dicom_like(tmp_path / "patient.2" / "1.2.840.113619.7")
    (tmp_path / "patient.3").mkdir()
    (tmp_path / "patient.3" / "slice.DCM").touch()
    write_dicom_like(tmp_path / "index" / "DICOMDIR")
    items = scans(tmp_path)
    assert [item["name"] for item in items] == ["A", "b", "c", "patient 1", "patient.2", "patient.3"]
    assert [item["image"] for item in items] == [
        str(tmp_path / name) for name in ["A.NRRD", "b.nii.gz", "c.mhd", "patient 1", "patient.2", "patient.3"]
    ]


def test_scans_of_one(tmp_path):
    (tmp_path / "scan.v1.nii.gz").touch()
    assert scans(tmp_path / "scan.v1.nii.gz") == [{"image": str(tmp_path / "scan.v1.nii.gz"), "name": "scan.v1"}]
    write_dicom_like(tmp_path / "series.5" / "IM0001")
    assert scans(tmp_path / "series.5") == [{"image": str(tmp_path / "series.5"), "name": "series.5"}]


def test_scan_names_are_unique(tmp_path):
    for name in ["a.nii.gz", "a.mha", "a.mha.nii", "b.nii"]:
        (tmp_path / name).touch()
    assert [item["name"] for item in scans(tmp_path)] == ["a.mha", "a.mha.nii", "a.nii.gz", "b.nii"]


def test_scans_errors(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        scans(tmp_path / "nowhere")
    (tmp_path / "slice.png").touch()
    with pytest.raises(InputError, match="holds no .nii"):
        scans(tmp_path)
    with pytest.raises(InputError, match="slice.png is neither .nii"):
        scans(tmp_path / "slice.png")
    write_dicom_like(tmp_path / "series" / "1.dcm")
    with pytest.raises(InputError, match="give the folder of its series"):
        scans(tmp_path / "series" / "1.dcm")
