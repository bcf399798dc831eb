"""Datalists from small trees written as the data sets are published, by the keys of the bundles' own configs."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from custom_components.data import lists
from custom_components.data.lists import msd, scans
from custom_components.data.volume import read_volume
from custom_components.errors import InputError
from monai.bundle import ConfigParser

from tests.conftest import BUNDLES, classes_of

CT_RATE_CLASSES = classes_of("ct_rate")
REPORT_COLUMNS = ["VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN"]
FINDINGS = 'Nodule of 2.3 x 1.8 cm, "spiculated", right upper lobe.\nŒsophagus ≥ 1.5 mm, “normal”; naïve T₁.'


def volumes(bundle: str, overlays: tuple[str, ...], split: str | None = "train", **keys: object) -> Any:
    """What a bundle's training reads, by its configs and these keys; without a split, what reads any."""
    parser = ConfigParser()
    parser.read_config([str(BUNDLES / bundle / "configs" / f"{name}.json") for name in ("train", *overlays)])
    for key, value in keys.items():
        parser[key] = str(value) if isinstance(value, Path) else value
    read = parser.get_parsed_content("datalist")
    return read if split is None else read(split=split)


def ct_rate(dataset_dir: Path, split: str = "train", **keys: object) -> list[dict]:
    return volumes("pretrain", (), split, dataset_dir=dataset_dir, **keys)


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
        assert item["label"].dtype == np.float32
        np.testing.assert_array_equal(item["label"], np.eye(18)[row])
    assert set(items[0]) == {"image", "name", "patient", "findings", "impression", "label"}


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
    assert first["masks"] == str(masks) and "masks" not in second and "label" not in first
    assert first["sentences"] == {"Lung nodule": "A nodule, right.", "Emphysema": "Some."}
    assert second["sentences"] == {}


def test_a_finding_without_its_sentence_is_told(tmp_path, caplog):
    lists.warn_once.cache_clear()
    write_ct_rate(tmp_path, ["valid_1_a_1"], "valid", "valid_fixed", "valid")
    table = tmp_path / "dataset" / "masks" / "valid_sentences.csv"
    name = "valid_1_a_1.nii.gz"
    rows = [["VolumeName", "Finding", "Sentence"], [name, "Emphysema", "Some."], [name, "Lung nodule", " "]]
    write_csv(table, [*rows, [name, "Consolidation", ""]])
    assert ct_rate(tmp_path, "valid")[0]["sentences"] == {"Emphysema": "Some."}
    assert f"{table}: 2 of 3 rows have no Sentence, and are not used" in caplog.text
    write_csv(table, [*rows, [name, "", "A nodule."]])
    with pytest.raises(InputError, match="valid_sentences.csv has no Finding of valid_1_a_1 for 'A nodule.': fill it"):
        ct_rate(tmp_path, "valid")


def test_spaces_around_a_finding_are_none_of_its_name(tmp_path):
    write_ct_rate(tmp_path, ["valid_1_a_1"], "valid", "valid_fixed", "valid")
    rows = [["valid_1_a_1.nii.gz", " Emphysema ", "Some. "]]
    write_csv(tmp_path / "dataset" / "masks" / "valid_sentences.csv", [["VolumeName", "Finding", "Sentence"], *rows])
    assert ct_rate(tmp_path, "valid")[0]["sentences"] == {"Emphysema": "Some."}


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
    assert np.flatnonzero(ct_rate(tmp_path)[0]["label"]).tolist() == [16]


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


def test_a_few_patients_are_drawn_before_the_disk_is_asked(tmp_path):
    names = [f"train_{patient}_a_{volume}" for patient in range(1, 21) for volume in (1, 2)]
    write_ct_rate(tmp_path, names)
    few = partial(volumes("pretrain", (), None, dataset_dir=tmp_path), split="train", limit=5)
    chosen = {item["name"] for item in few()}
    assert len(chosen) == 6, "all volumes of the patients that it takes"
    assert chosen == {item["name"] for item in few()} != {item["name"] for item in few(seed=1)}
    for image in tmp_path.rglob("*.nii.gz"):
        if image.name.removesuffix(".nii.gz") not in chosen:
            image.unlink()
    assert {item["name"] for item in few()} == chosen
    with pytest.raises(InputError, match="of 40 volumes of split train are not on disk"):
        ct_rate(tmp_path)


def test_a_split_that_need_not_be_there_is_empty_and_told_of(tmp_path, caplog):
    read = volumes("pretrain", (), None, dataset_dir=write_ct_rate(tmp_path, NAMES))
    assert read(split="test", required=False) == [] and not caplog.text, "nobody names one"
    for image in [*tmp_path.rglob("train_1_a_*.nii.gz"), *tmp_path.rglob("train_2*.nii.gz")]:
        image.unlink()
    with pytest.raises(InputError, match="3 of 4 volumes of split train are not on disk"):
        read(split="train", required=False)
    next(tmp_path.rglob("*.nii.gz")).unlink()
    assert read(split="train", required=False) == []
    assert "no volume of split train is on disk" in caplog.text


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
        (None, {"split": "dev"}, ["'dev'", "train, valid or test"]),
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
            ["'scan7'", "name_pattern", "{split}_fixed/{patient}/{scan}/{name}.nii.gz"],
        ),
        (
            lambda root: write_csv(labels(root), [["VolumeName", *CT_RATE_CLASSES], ["", *[0] * 18]]),
            {},
            ["train_predicted_labels.csv", "names no volume"],
        ),
        (
            lambda root: write_csv(labels(root), [["Volume", *CT_RATE_CLASSES], ["train_2_a_1", *[1] * 18]]),
            {},
            ["train_predicted_labels.csv", "no column VolumeName"],
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
            ["4 of 4 volumes", "train_fixed"],
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


# first rows of the authors' lists (ToniChopp/SimCroP, Down-stream/Classification_Linear/datasets), as published
CT_RATE_LIST = """\
VolumeName,Medical material,Arterial wall calcification,Cardiomegaly,Pericardial effusion,\
Coronary artery wall calcification,Hiatal hernia,Lymphadenopathy,Emphysema,Atelectasis,Lung nodule,Lung opacity,\
Pulmonary fibrotic sequela,Pleural effusion,Mosaic attenuation pattern,Peribronchial thickening,Consolidation,\
Bronchiectasis,Interlobular septal thickening
train_12460_c_2.nii.gz,0,0,0,0,0,0,0,0,0,1,0,0,0,0,0,0,0,0
train_18480_a_1.nii.gz,0,0,0,0,0,1,0,0,0,1,0,1,0,0,0,0,0,0
"""
RAD_CHEST_CT_LIST = """\
NoteAcc_DEID,Medical material,Calcification,Cardiomegaly,Pericardial effusion,Hietal Hernia,Lymphadenopathy,Emphysema,\
Atelectasis,Lung nodule,Lung opacity,Pulmonary fibrotic sequela,Pleural effusion,Peribronchial thickening,\
Consolidation,Bronchiectasis,Interlobular septal thickening
trn11227,1,1,0,0,0,0,1,1,1,0,0,0,0,0,0,0
trn05329,0,1,0,0,1,0,0,0,1,0,0,0,0,1,0,0
"""
CC_CCII_LIST = "img_list,label\n1338.nii.gz,2\n5397.nii.gz,0\n3768.nii.gz,1\n"
UID = "1.3.6.1.4.1.14519.5.2.1.6279.6001.187451715205085403623595258748"
LUNA16_LIST = f"image_id,label\n{UID}.nii.gz,1\n1.2.3.nii.gz,0\n"


@pytest.fixture
def published(tmp_path: Path) -> Callable[..., Path]:
    """Writes a list under all published names, and empty volumes where the data set has them; returns the folder."""

    def write(text: str, *volumes: str) -> Path:
        (tmp_path / "lists").mkdir(exist_ok=True)
        for name in ("train_list.csv", "test_list.csv"):
            (tmp_path / "lists" / name).write_text(text)
        for volume in volumes:
            (tmp_path / volume).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / volume).touch()
        return tmp_path

    return write


def read(folder: Path, overlay: str, split: str = "train", **keys: object) -> list[dict]:
    return volumes("classify", (overlay,), split, **{"dataset_dir": folder, "lists_dir": folder / "lists"} | keys)


def test_ct_rates_published_list(published: Callable) -> None:
    volumes = (
        "dataset/train_fixed/train_12460/train_12460_c/train_12460_c_2.nii.gz",
        "train_preprocessed/train_18480/train_18480a/train_18480_a_1.nii.gz",  # the authors' own layout
    )
    folder = published(CT_RATE_LIST, *volumes)
    items = read(folder, "ct_rate")
    assert [item["image"] for item in items] == [str(folder / volume) for volume in volumes]
    assert [item["patient"] for item in items] == ["train_12460", "train_18480"]
    assert [CT_RATE_CLASSES[i] for i in np.flatnonzero(items[0]["label"])] == ["Lung nodule"]
    assert items[1]["label"].sum() == 3 and items[1]["label"].dtype == np.float32


def test_rad_chest_cts_published_list(published: Callable) -> None:
    folder = published(RAD_CHEST_CT_LIST, "images/trn11227.nii.gz", "trn05329.nii.gz")
    first, second = read(folder, "radchestct", "test")
    names = classes_of("radchestct")
    assert len(names) == 16
    assert {names[i] for i in np.flatnonzero(first["label"])} == {
        "Medical material", "Calcification", "Emphysema", "Atelectasis", "Lung nodule"
    }  # fmt: skip
    # spelled Hietal Hernia in the list
    assert second["label"][names.index("Hiatal hernia")] == 1


def test_cc_cciis_and_luna16s_published_lists(published: Callable) -> None:
    folder = published(CC_CCII_LIST, *(f"images_resized/{n}.nii.gz" for n in (1338, 5397, 3768)))
    assert [item["label"] for item in read(folder, "cc_ccii")] == [2, 0, 1]
    folder = published(LUNA16_LIST, f"subset3/{UID}.mhd", "images/1.2.3.nii.gz")
    assert [item["label"].tolist() for item in read(folder, "luna16")] == [[1], [0]]


def test_a_fraction_with_a_list_of_its_own(published: Callable) -> None:
    folder = published(CC_CCII_LIST, *(f"images/{n}.nii.gz" for n in (1338, 5397, 3768)))
    (folder / "lists" / "train_list_10.csv").write_text("img_list,label\n5397.nii.gz,0\n")
    assert [item["name"] for item in read(folder, "cc_ccii", data_fraction=0.1)] == ["5397"]
    assert len(read(folder, "cc_ccii")) == 3
    # without a validation list of its own, the test list is that too, as published
    assert read(folder, "cc_ccii", "valid") == read(folder, "cc_ccii", "test")


@pytest.fixture
def cohort(tmp_path: Path) -> dict:
    """120 scans of 40 patients, three each, in a table of one's own."""
    rows = []
    for i in range(120):
        (tmp_path / f"scan{i}.nii.gz").touch()
        rows.append(
            {"file": f"scan{i}", "patient": f"p{i // 3}", "nodule": i % 2, "mass": int(i % 5 == 0), "age": 50 + i}
        )
    pd.DataFrame(rows).to_csv(tmp_path / "labels.csv", index=False)
    return {
        "dataset_dir": tmp_path,
        "classes": ["mass", "nodule"],
        "labels": tmp_path / "labels.csv",
        "validation_share": 0.1,
        "test_share": 0.25,
    }


def own(split: str = "train", **keys: object) -> list[dict]:
    return volumes("classify", (), split, **keys)


def test_splits_by_patient_are_nested_and_disjoint(cohort: dict) -> None:
    def split(name: str, **keys: object) -> list[dict]:
        return own(name, **cohort | keys)

    def patients(items: list[dict]) -> set[str]:
        return {item["patient"] for item in items}

    train, valid, test = (patients(split(name)) for name in ("train", "valid", "test"))
    assert (len(train), len(valid), len(test)) == (27, 3, 10)
    assert len(train | valid | test) == 40
    smaller = train
    for fraction in (0.5, 0.1, 0.01):
        items = split("train", data_fraction=fraction)
        assert len(items) == 3 * len(patients(items))  # a patient's scans stay together
        assert patients(items) < smaller and len(patients(items)) == int(np.ceil(27 * fraction))
        smaller = patients(items)
    assert patients(split("train", data_fraction=0.5)) == patients(split("train", data_fraction=0.5))
    assert patients(split("train", data_fraction=0.5, seed=1)) != patients(split("train", data_fraction=0.5))
    assert split("train")[0]["label"].shape == (2,)


@pytest.mark.parametrize("exclusive", [False, True])
def test_every_split_has_its_share_of_a_rare_finding(tmp_path: Path, exclusive: bool) -> None:
    """20 of 400 patients have it: 4 in a test set of a fifth, 2 in a tenth of what is left. By chance alone, a tenth
    has none of it in one seed of eight."""
    rows = []
    for i in range(400):
        (tmp_path / f"{i}.nii.gz").touch()
        kinds = {"label": 2 * (i < 20) or i % 2} if exclusive else {"rare": int(i < 20), "common": i % 2}
        rows.append({"file": i, **kinds})
    pd.DataFrame(rows).to_csv(tmp_path / "labels.csv", index=False)
    keys = {"dataset_dir": tmp_path, "labels": tmp_path / "labels.csv", "validation_share": 0.1, "test_share": 0.2}
    keys |= {"classes": ["none", "common", "rare"] if exclusive else ["rare", "common"], "exclusive": exclusive}
    for seed in range(8):
        for split, fraction, volumes_, expected in (
            ("test", 1, 80, 4),
            ("valid", 1, 32, 1.6),
            ("train", 0.1, 29, 1.44),
        ):
            items = own(split, **keys, data_fraction=fraction, seed=seed)
            rare = sum((item["label"] == 2) if exclusive else item["label"][0] for item in items)
            assert len(items) == volumes_ and abs(rare - expected) < 1.7, (seed, split)
            assert rare > 0 and (exclusive or 0.35 < np.mean([item["label"][1] for item in items]) < 0.65)


def test_a_finding_that_no_volume_of_a_split_has_is_told(cohort: dict, caplog: pytest.LogCaptureFixture) -> None:
    own("train", **cohort)
    assert not [record for record in caplog.records if "has none of" in record.getMessage()]
    frame = pd.read_csv(cohort["labels"])
    frame["mass"] = 0
    frame.to_csv(cohort["labels"], index=False)
    own("train", **cohort)
    assert "split train, 81 volumes, has none of: mass" in caplog.text


def test_without_a_validation_share_the_test_volumes_are_validated_on(cohort: dict) -> None:
    cohort["validation_share"] = 0.0
    valid, test = (own(split, **cohort) for split in ("valid", "test"))
    assert [item["name"] for item in valid] == [item["name"] for item in test]


def test_extra_columns_are_told(cohort: dict, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        own(**cohort)
    assert "labels.csv: 1 columns are no class, and are not used: age" in caplog.text


BAD = {
    "missing column": ({"classes": ["mass", "cyst"]}, "labels.csv has no column cyst"),
    "split": ({"split": "dev"}, "split is 'dev'"),
    "fraction": ({"data_fraction": 0.0}, "data_fraction is 0.0"),
    "share": ({"validation_share": 1.0}, "validation_share is 1.0"),
    "nothing for testing": ({"split": "test", "test_share": 0.0}, "has no labels of split test .*test_share 0.0"),
    "no labels": ({"labels": None}, "labels is None, .*: set labels to the table"),
    "no lists": (
        {"labels": {"train": "train_list.csv"}, "lists_dir": "nowhere"},
        "lists_dir nowhere has no labels of split train .train_list.csv",
    ),
    "dataset_dir": ({"dataset_dir": "/nowhere"}, "dataset_dir /nowhere is no folder"),
    "codes": ({"exclusive": True}, "labels.csv has no column label"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_told(cohort: dict, case: str) -> None:
    changes, message = BAD[case]
    with pytest.raises(InputError, match=message):
        own(**cohort | changes)


@pytest.mark.parametrize("value", ["2", "0.5", "yes", "", "nan"])
def test_a_label_outside_zero_and_one_is_told(cohort: dict, value: str) -> None:
    frame = pd.read_csv(cohort["labels"], dtype=str)
    frame.loc[7, "mass"] = value
    frame.to_csv(cohort["labels"], index=False)
    with pytest.raises(InputError, match="labels.csv: mass of scan7 is .*: make it 0 or 1"):
        own(**cohort)


def test_a_code_outside_the_classes_is_told(published: Callable) -> None:
    folder = published(CC_CCII_LIST.replace("1338.nii.gz,2", "1338.nii.gz,3"))
    with pytest.raises(InputError, match="label of 1338 is 3: make it a code from 0 to 2"):
        read(folder, "cc_ccii")


def test_a_volume_named_twice_and_a_missing_one_are_told(cohort: dict) -> None:
    frame = pd.read_csv(cohort["labels"], dtype=str)
    pd.concat([frame, frame[:1]]).to_csv(cohort["labels"], index=False)
    with pytest.raises(InputError, match="labels.csv names scan0 twice"):
        own(**cohort)
    frame.to_csv(cohort["labels"], index=False)
    (cohort["dataset_dir"] / "scan4.nii.gz").unlink()
    found = ("train", "valid", "test")
    with pytest.raises(InputError, match="1 of .* volumes.*scan4"):
        for split in found:
            own(split, **cohort)
    (cohort["dataset_dir"] / "exclude.txt").write_text("scan4.nii.gz\n")
    kept = [own(split, exclude=cohort["dataset_dir"] / "exclude.txt", **cohort) for split in found]
    assert sum(len(items) for items in kept) == 119


REPORTS = [
    {"scan": "a", "text": "TECHNIQUE: CT. FINDINGS: A nodule of 1.5 mm. IMPRESSION: Nodule.", "who": "p1", "Nodule": 1},
    {
        "scan": "b",
        "text": "Findings:\nLungs: clear.\nImpression:\nNormal.\nRecommendations: none.",
        "who": "p1",
        "Nodule": 0,
    },
    {"scan": "c", "text": "No significant findings: all clear.", "who": "p2", "Nodule": 0},
    {"scan": "d", "text": None, "who": "p3", "Nodule": 1},
]
TEXTS = [
    ("A nodule of 1.5 mm.", "Nodule."),
    ("Lungs: clear.", "Normal."),
    ("No significant findings: all clear.", ""),
    ("", ""),
]


@pytest.fixture
def mine(tmp_path: Path) -> dict:
    """Keys of reports that nobody publishes; the table is for the test to write."""
    for name in "abcd":
        (tmp_path / "scans").mkdir(exist_ok=True)
        (tmp_path / "scans" / f"{name}.nii.gz").touch()
    return {
        "dataset_dir": tmp_path,
        "id_column": "scan",
        "images": "scans/{name}.nii.gz",
        "report_column": "text",
        "patient_column": "who",
        "sentences": {"Effusion": "There is an effusion.", "Nodule": "There is a nodule."},
    }


def write_semicolons(path: Path, rows: list[dict]) -> None:
    pd.DataFrame(rows).to_csv(path, index=False, sep=";", encoding="utf-8-sig")


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize(
    "name, write",
    [
        ("reports.csv", lambda path, rows: pd.DataFrame(rows).to_csv(path, index=False)),
        ("reports.csv", write_semicolons),
        ("reports.tsv", lambda path, rows: pd.DataFrame(rows).to_csv(path, index=False, sep="\t")),
        ("reports.json", lambda path, rows: path.write_text(json.dumps(rows))),
        ("reports.jsonl", write_lines),
        ("reports.json", lambda path, rows: path.write_text(json.dumps({"training": rows, "numTraining": 4}))),
    ],
    ids=["csv", "semicolons and BOM", "tabs", "json", "json lines", "MSD"],
)
def test_any_table_of_reports(mine: dict, caplog: pytest.LogCaptureFixture, name: str, write: Callable) -> None:
    write(mine["dataset_dir"] / name, REPORTS)
    with caplog.at_level(logging.WARNING):
        items = volumes("pretrain", (), reports=name, **mine)
    assert [(item["findings"], item["impression"]) for item in items] == TEXTS
    assert [Path(item["image"]).name for item in items] == [f"{scan}.nii.gz" for scan in "abcd"]
    assert [item["patient"] for item in items] == ["p1", "p1", "p2", "p3"]
    np.testing.assert_array_equal([item["label"] for item in items], [[np.nan, value] for value in (1, 0, 0, 1)])
    assert "1 of 4 reports have no heading FINDINGS: or IMPRESSION: (c)" in caplog.text
    assert "1 of 4 reports are empty (d)" in caplog.text


def test_what_a_table_does_not_name_is_told(mine: dict, caplog: pytest.LogCaptureFixture) -> None:
    """A folder of masks that are laid out in another way ended the run, by a key that nobody had set."""
    pd.DataFrame(REPORTS).to_csv(mine["dataset_dir"] / "reports.csv", index=False)
    (mine["dataset_dir"] / "masks").mkdir()
    with caplog.at_level(logging.INFO):
        items = volumes("pretrain", (), reports="reports.csv", **mine)
        assert len(volumes("pretrain", (), reports="reports.csv", masks=None, **mine)) == 4
        pattern = {**mine, "images": "ct/{name}.nii.gz"}
        (mine["dataset_dir"] / "ct").mkdir()
        for name in "abcde":
            (mine["dataset_dir"] / "ct" / f"{name}.nii.gz").touch()
        volumes("pretrain", (), reports="reports.csv", **pattern)
    assert len(items) == 4 and not any("masks" in item for item in items)
    assert "masks asks for patient, split of each volume" in caplog.text
    assert "split train: 4 volumes of 3 patients" in caplog.text
    assert "ct: 1 of 5 volumes (e) have no row in reports.csv" in caplog.text


def test_a_datalist_of_images_and_reports(tmp_path: Path) -> None:
    """As the Medical Segmentation Decathlon's lists, by which each volume's path is its name."""
    splits = {"training": ["p1/ct", "p2/ct"], "validation": ["p3/ct"]}
    for name in sum(splits.values(), []):
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.nii.gz").touch()
    content = {
        s: [{"image": f"{n}.nii.gz", "report": f"IMPRESSION: {n}"} for n in names] for s, names in splits.items()
    }
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    keys = {"reports": "datalist.json", "id_column": "image", "images": "{image}", "report_column": "report"}
    for split, names in (("train", ["p1/ct", "p2/ct"]), ("valid", ["p3/ct"])):
        items = volumes("pretrain", (), split, dataset_dir=tmp_path, **keys)
        assert [item["name"] for item in items] == [item["impression"] for item in items] == names
        assert [item["image"] for item in items] == [str(tmp_path / f"{name}.nii.gz") for name in names]


def test_splits_of_ones_own_reports(mine: dict) -> None:
    """Named by a column, or drawn by patient."""
    table = mine["dataset_dir"] / "reports.jsonl"
    write_lines(table, [row | {"fold": "val" if row["who"] == "p3" else "Train"} for row in REPORTS])
    found = [
        volumes("pretrain", (), s, reports="reports.jsonl", **mine, split_column="fold") for s in ("train", "valid")
    ]
    assert [[item["name"] for item in items] for items in found] == [["a", "b", "c"], ["d"]]
    with pytest.raises(InputError, match="of split valid .reports.jsonl; validation_share 0.0"):
        volumes("pretrain", (), "valid", reports="reports.jsonl", **mine)
    drawn = [
        volumes("pretrain", (), s, reports="reports.jsonl", **mine, validation_share=0.3) for s in ("train", "valid")
    ]
    patients = [{item["patient"] for item in items} for items in drawn]
    assert [len(p) for p in patients] == [2, 1] and not patients[0] & patients[1]
    write_lines(table, [row | {"fold": "3"} for row in REPORTS])
    with pytest.raises(
        InputError, match="reports.jsonl: fold is '3': make it train, valid or test, or set split_column"
    ):
        volumes("pretrain", (), reports="reports.jsonl", **mine, split_column="fold")


def test_a_split_without_a_table_is_said(mine: dict) -> None:
    write_lines(mine["dataset_dir"] / "reports.jsonl", REPORTS)
    keys = {"reports": {"train": "reports.jsonl", "valid": None}, **mine, "validation_share": 0.0}
    missing = r"has no reports of split valid \(none is named; validation_share 0.0\): "
    with pytest.raises(InputError, match=missing) as told:
        volumes("pretrain", (), "valid", **keys)
    cure = "change validation_share or reports, or give evaluate_after_training false"
    assert "test_share" not in str(told.value) and str(told.value).endswith(cure)
    with pytest.raises(InputError, match="split test .*change validation_share or reports$"):
        volumes("pretrain", (), "test", **keys)
    shares = {"datalist#validation_share": None}  # as in zero_shot.json
    with pytest.raises(InputError, match=r"split valid \(none is named\): put them there, or change reports$"):
        volumes("pretrain", (), "valid", **keys | shares)


def test_labels_beside_reports(mine: dict) -> None:
    write_lines(mine["dataset_dir"] / "reports.jsonl", REPORTS)
    table = pd.DataFrame({"scan": list("dcba"), "fluid": [1, 1, 0, 0], "Nodule": [0, 0, 0, 1]})
    table.to_csv(mine["dataset_dir"] / "labels.csv", index=False)
    keys = mine | {"reports": "reports.jsonl", "labels": "labels.csv", "columns": {"Effusion": "fluid"}}
    items = volumes("pretrain", (), **keys)
    assert [item["label"].tolist() for item in items] == [[0, 1], [0, 0], [1, 0], [1, 0]]
    with pytest.raises(InputError, match="labels is absent.csv"):
        volumes("pretrain", (), **keys | {"labels": "absent.csv"})


def test_a_report_that_is_repeated_and_one_that_differs(mine: dict, caplog: pytest.LogCaptureFixture) -> None:
    table = mine["dataset_dir"] / "reports.jsonl"
    write_lines(table, [*REPORTS, REPORTS[1]])
    with caplog.at_level(logging.WARNING):
        assert len(volumes("pretrain", (), reports="reports.jsonl", **mine)) == 4
    assert "1 rows repeat a volume with the same report (b)" in caplog.text
    labelled = [row | {"Effusion": 0} for row in REPORTS]
    write_lines(table, [*labelled, labelled[1] | {"Nodule": 1}])
    with pytest.raises(InputError, match="reports.jsonl names b twice, and differently: keep one row per volume"):
        volumes("pretrain", (), reports="reports.jsonl", **mine)
    write_lines(table, [*REPORTS, REPORTS[1] | {"text": "FINDINGS: Other."}])
    with pytest.raises(InputError, match="reports.jsonl has two different reports of b: keep one row per volume"):
        volumes("pretrain", (), reports="reports.jsonl", **mine)


def test_reconstructions_of_one_scan_with_several_reports_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_ct_rate(tmp_path, NAMES)
    with caplog.at_level(logging.WARNING):
        assert len(ct_rate(tmp_path)) == 4
    assert "train_reports.csv: 1 scans have several reports (train_1_a)" in caplog.text


def test_a_volume_whose_path_is_not_given(mine: dict) -> None:
    write_lines(mine["dataset_dir"] / "reports.jsonl", [row | {"path": None} for row in REPORTS])
    with pytest.raises(InputError, match="'a' does not have all words of {path}: correct it, name_pattern, or images"):
        volumes("pretrain", (), reports="reports.jsonl", **mine | {"images": "{path}"})


@pytest.mark.parametrize("key", ["images", "masks"])
@pytest.mark.parametrize(
    "pattern",
    ["scans/{name", "scans/name}", "{name.foo}.nii", "{}.nii", "{0}", "{name!x}", "{name:d}", "{name[x]}", "{a:{b}}"],
)
def test_a_pattern_that_cannot_be_filled_in_is_told(mine: dict, key: str, pattern: str) -> None:
    write_lines(mine["dataset_dir"] / "reports.jsonl", REPORTS)
    with pytest.raises(InputError, match=f"{key} is {re.escape(repr(pattern))}, .*such as 'scans/{{name}}.nii.gz'"):
        volumes("pretrain", (), reports="reports.jsonl", **mine | {key: ["other/{name}", pattern]})


def test_a_part_of_a_word_may_name_a_folder(mine: dict) -> None:
    write_lines(mine["dataset_dir"] / "reports.jsonl", REPORTS)
    for name, who in zip("abcd", "1123", strict=True):
        (mine["dataset_dir"] / f"p{who}").mkdir(exist_ok=True)
        (mine["dataset_dir"] / f"p{who}" / f"{name}.nii.gz").touch()
    items = volumes("pretrain", (), reports="reports.jsonl", **mine | {"images": "{who[0]}{who[1]}/{name:.9}.nii.gz"})
    assert [Path(item["image"]).parent.name for item in items] == ["p1", "p1", "p2", "p3"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("reports.csv", "scan,text\na,Überblick\n".encode("latin-1"), "cannot be read as a CSV or JSON file in UTF-8"),
        ("reports.csv", "scan,text\na,x\n".encode("utf-16"), "cannot be read as a CSV or JSON file in UTF-8"),
        ("reports.csv", "scan,text\na,x\n".encode("utf-16-le"), "cannot be read as a CSV or JSON file in UTF-8"),
        ("reports.csv", b"scan,text\na,x,y\n", "cannot be read as a CSV or JSON file"),
        ("reports.json", "[]".encode("utf-16"), "cannot be read as JSON in UTF-8"),
        ("reports.json", b"{", "reports.json is not JSON"),
        ("reports.json", b"[" * 100_000, "reports.json is not JSON"),
        ("reports.json", b'{"train": [], "train": []}', "has the key 'train' twice"),
        ("reports.json", b"[1, 2]", "cannot be read as a CSV or JSON file"),
        ("reports.json", b'[["a"]]', "cannot be read as a CSV or JSON file"),
        ("reports.json", b"3", "names no volume"),
        ("reports.jsonl", b"7\n", "cannot be read as a CSV or JSON file"),
        ("reports.json", b'{"fold0": []}', "reports.json has lists fold0: call them training"),
        ("reports.jsonl", b'{"scan": "a"}\n["b"]\n', "cannot be read as a CSV or JSON file"),
        ("reports.jsonl", b'{"scan": "a", "report": "x"}\n', "no column text .it has scan, report"),
    ],
)
def test_a_table_that_cannot_be_read_is_said(mine: dict, name: str, content: bytes, message: str) -> None:
    (mine["dataset_dir"] / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        volumes("pretrain", (), reports=name, **mine)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_class_without_a_column_is_left_open(tmp_path: Path) -> None:
    write_ct_rate(tmp_path, NAMES)
    write_csv(labels(tmp_path), [["VolumeName", *CT_RATE_CLASSES[1:]], *[[name, *[1] * 17] for name in NAMES]])
    assert all(np.isnan(item["label"][0]) and item["label"][1:].all() for item in ct_rate(tmp_path))


@pytest.mark.parametrize(
    "report, findings, impression",
    [
        ("EXAM: CT CHEST FINDINGS: Clear. IMPRESSION: Normal.", "Clear.", "Normal."),
        ("history: cough\nfindings: clear\nconclusion: normal", "clear", "normal"),
        ("Findings : Clear.Impression: Normal. Comparison: none.", "Clear.", "Normal."),
        ("Findings: No mass Impression: normal", "No mass", "normal"),
        ("FINDINGS:\nLUNGS: clear.\nHEART: normal.", "LUNGS: clear.\nHEART: normal.", ""),
        ("FINDINGS: A.\nADDENDUM FINDINGS: B.", "A.\nADDENDUM\nB.", ""),
    ],
)
def test_sections_of_a_report(mine: dict, report: str, findings: str, impression: str) -> None:
    write_lines(mine["dataset_dir"] / "reports.jsonl", [{"scan": "a", "text": report}])
    (item,) = volumes("pretrain", (), reports="reports.jsonl", **mine)
    assert (item["findings"], item["impression"]) == (findings, impression)


@pytest.mark.parametrize("filling", ["\n", " ", ". ", "FINDINGS ", "Nodule: 1. "])
def test_a_report_of_a_million_characters_is_parted_in_no_time(mine: dict, filling: str) -> None:
    text = "FINDINGS: Clear." + filling * (1_000_000 // len(filling)) + "\nIMPRESSION: Normal."
    write_lines(mine["dataset_dir"] / "reports.jsonl", [{"scan": "a", "text": text}])
    start = time.process_time()
    (item,) = volumes("pretrain", (), reports="reports.jsonl", **mine)
    assert time.process_time() - start < 3
    assert item["findings"].startswith("Clear.") and item["impression"] == "Normal."


def test_import_needs_neither_torch_nor_monai():
    code = "import sys, custom_components.data.lists; sys.exit(any(name in sys.modules for name in ('torch', 'monai')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def write_dicom_like(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(128) + b"DICM")


def test_scans_of_a_folder(tmp_path):
    for name in ["b.nii.gz", "A.NRRD", "c.mhd", "c.raw", "._b.nii.gz", "notes.txt"]:
        (tmp_path / name).touch()
    write_dicom_like(tmp_path / "patient 1" / "IM0001")
    write_dicom_like(tmp_path / "patient.2" / "1.2.840.113619.7")
    (tmp_path / "patient.3").mkdir()
    (tmp_path / "patient.3" / "slice.DCM").touch()
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


def test_every_entry_of_a_folder_has_a_result_or_a_reason(tmp_path: Path) -> None:
    """What a reader will refuse is an item too: nothing of a patient is passed over in silence."""
    for name in ["a.nii.gz", "b.nii.gz.part", "c.npz", "slice.dcm.gz", "short"]:
        (tmp_path / name).touch()
    (tmp_path / "fetched.nii.gz").symlink_to("annex/not/fetched")
    (tmp_path / "patient 4" / "nested").mkdir(parents=True)
    (tmp_path / "patient 4" / "nested" / "ct.nii.gz").touch()
    (tmp_path / "patient 5").mkdir()
    write_dicom_like(tmp_path / "index" / "DICOMDIR")
    items = scans(tmp_path)
    assert [Path(item["image"]).name for item in items] == sorted(entry.name for entry in tmp_path.iterdir())
    refused = []
    for item in items[1:]:
        with pytest.raises(InputError, match=re.escape(item["image"])) as error:
            read_volume(item["image"])
        refused.append(str(error.value))
    assert len(set(refused)) == len(items) - 1 and not any("\n" in reason for reason in refused)


def test_voxels_of_a_header_are_no_scans_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.mhd").write_text("NDims = 3\nElementDataFile = my voxels.raw\n")
    (tmp_path / "b.mhd").write_text("NDims = 3\nElementDataFile = slice%03d.raw 1 2 1\n")
    (tmp_path / "c.nhdr").write_text("NRRD0004\ndata file: ./c-data.raw.gz\n")
    for name in ["my voxels.raw", "slice001.raw", "slice002.raw", "c-data.raw.gz", "other.raw"]:
        (tmp_path / name).touch()
    assert [item["name"] for item in scans(tmp_path)] == ["a", "b", "c", "other.raw"]


def test_scans_beside_the_slices_of_a_series(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "second"):
        write_dicom_like(folder / "IM0001")
    (tmp_path / "a.nii.gz").touch()
    assert [Path(item["image"]) for item in scans(tmp_path)] == [tmp_path, tmp_path / "a.nii.gz", tmp_path / "second"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["p1/ct.nii.gz", "p2/ct.nii.gz", "p2/b.nii"], ["p1_ct", "p2_ct", "b"]),
        (["p1/x/ct.nii", "p2/x/ct.nii", "p2/y/ct.nii"], ["p1_x_ct", "p2_x_ct", "y_ct"]),
        (["p1/ct.nii", "p2/ct.nii", "p2/ct.mha"], ["p1_ct.nii", "p2_ct.nii", "ct.mha"]),
        (["p1/ct.nii", "p2/CT.mha"], ["p1_ct", "p2_CT"]),
        (["p1_ct.nii", "p1/ct.nii", "p2/ct.nii"], ["p1_ct", "p1_ct_2", "p2_ct"]),
        (["a.nii", "A.nii", "A_2.nii"], ["a.nii", "A.nii_2", "A_2.nii"]),
        (["e\u0301.nii", "\u00e9.nii"], ["e\u0301.nii", "\u00e9.nii_2"]),  # é as two characters, and as one
    ],
)
def test_names_are_unique_over_the_whole_list(tmp_path: Path, paths: list[str], names: list[str]) -> None:
    """Also where file systems do not tell cases apart, and where joined folders read like others."""
    for path in paths:
        (tmp_path / "top" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "top" / path).touch()
    (tmp_path / "top" / "list.txt").write_text("\n".join(paths))
    found = [item["name"] for item in scans(tmp_path / "top" / "list.txt")]
    assert len({name.casefold() for name in found}) == len(paths)
    assert found == names


def test_the_name_of_the_folder_that_one_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dicom_like(tmp_path / "series" / "IM0001")
    monkeypatch.chdir(tmp_path / "series")
    assert [item["name"] for item in scans(".")] == ["series"]


def test_every_line_of_a_list_is_an_item(tmp_path: Path) -> None:
    (tmp_path / "a, b; c.nii.gz").touch()
    write_dicom_like(tmp_path / "patient1" / "IM0001")
    (tmp_path / "Weiß.nii").touch()
    lines = [
        ("a, b; c.nii.gz,a comment, of two parts", "a, b; c.nii.gz"),
        ('"a, b; c.nii.gz";x', "a, b; c.nii.gz"),  # again
        ("  patient1  ", "patient1"),
        ("Weiß.nii;lung", "Weiß.nii"),
        ("not,there.nii.gz,x", "not,there.nii.gz"),
        ("patient2", "patient2"),
        (",nothing", ",nothing"),
        ("notes", "notes"),
    ]
    (tmp_path / "list.csv").write_text("path;comment\n" + "\n".join(line for line, _ in lines), encoding="utf-8-sig")
    found = [item["image"] for item in scans(tmp_path / "list.csv")]
    assert found == [str(tmp_path / name) for name in dict.fromkeys(name for _, name in lines)]


def test_what_a_spreadsheet_adds_to_a_list(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii.gz"):
        (tmp_path / name).touch()
    text = 'path,comment\r\n,\r\na.nii.gz,"two\r\nlines, ""quoted"""\r\n;;\r\nb.nii.gz,\r\n,,,\r\n'
    (tmp_path / "list.csv").write_bytes(text.encode("utf-8-sig"))
    assert [item["name"] for item in scans(tmp_path / "list.csv")] == ["a", "b"]


def test_names_that_cannot_be_files_or_text(tmp_path: Path) -> None:
    (tmp_path / "a.nii").touch()
    (tmp_path / "list.txt").write_text("x" * 5000 + ".nii\na.nii\n")
    assert [item["name"] for item in scans(tmp_path / "list.txt")] == ["x" * 5000 + ".nii", "a"]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": ["x" * 5000 + ".nii"]}))
    with pytest.raises(InputError, match="1 files of training"):
        msd(tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in (b"bad\xff.nii", b"new\nline.nii"):
        with open(os.path.join(os.fsencode(folder), name), "wb"):
            pass
    assert [item["name"] for item in scans(folder)] == ["bad_", "new_line"]


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


def test_a_list_of_scans(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nrrd"):
        (tmp_path / name).touch()
    (tmp_path / "scans.csv").write_text(f"path,comment\na.nii.gz,x\n{tmp_path}/b.nrrd,y\nabsent.nii,z\n")
    items = scans(tmp_path / "scans.csv")
    assert [item["image"] for item in items] == [str(tmp_path / n) for n in ("a.nii.gz", "b.nrrd", "absent.nii")]
    (tmp_path / "scans.csv").write_text("a\na.nii.gz\n~nobody/x.nii\n")  # the first is no header, but mistyped
    assert [item["name"] for item in scans(tmp_path / "scans.csv")] == ["a", "a.nii.gz", "x.nii"]
    (tmp_path / "empty.txt").write_text("nothing here\n")
    with pytest.raises(InputError, match="empty.txt lists no CT"):
        scans(tmp_path / "empty.txt")


@pytest.mark.parametrize("header", ["name,c,c", "name,C,c ", "name,c,note,Note"])
def test_a_column_that_stands_there_twice(tmp_path: Path, header: str) -> None:
    (tmp_path / "t.csv").write_text(f"{header}\na,1,0,0\n")
    with pytest.raises(InputError, match="it has the column '(c|note)' twice"):
        lists.volumes(tmp_path, "t.csv", "train", images="{name}", classes=["c"])


def test_words_that_pandas_takes_for_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "t.csv").write_text("name,findings\nNA,None\nnan,\nnull,NA seen.\n,A nodule.\n , \n,\n")
    for name in ("NA", "nan", "null"):
        (tmp_path / name).touch()
    items = lists.volumes(tmp_path, "t.csv", "train", images="{name}", findings_column="findings")
    assert [(item["name"], item["findings"]) for item in items] == [("NA", ""), ("nan", ""), ("null", "NA seen.")]
    assert "1 rows name no volume (name is empty), and are not used" in caplog.text


def test_a_patient_on_both_sides_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "t.csv").write_text("name,c,split\na,1,train\na,1,test\n")
    lists.volumes(tmp_path, "t.csv", "train", images="{name}", classes=["c"])
    assert "1 patients stand in several splits (a)" in caplog.text


@pytest.mark.parametrize(
    "train, test, told",
    [
        ("name,patient,c\na,p,0\nb,q,1\n", "name,patient,c\nc,p ,1\n", "1 patients stand in several splits (p)"),
        ("name,c\na,0\nb,1\n", "name,c\nb,1\n", "1 patients stand in several splits (b)"),
        ("name,patient,c\na,p,0\n", "name,patient,c\na,q,0\n", "1 volumes stand in several splits (a)"),
        ("name,patient,c\na,p,0\nb,q,1\n", "name,patient,c\nc,r,1\n", None),
    ],
    ids=["patient", "no patients", "volume", "none"],
)
def test_a_patient_in_the_tables_of_two_splits_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, train: str, test: str, told: str | None
) -> None:
    lists.warn_once.cache_clear()
    for name, text in (("train", train), ("train_10", train), ("test", test)):
        (tmp_path / f"{name}.csv").write_text(text)
    for name in "abc":
        (tmp_path / f"{name}.nii.gz").touch()
    # a part of the training list is no split of its own
    tables = {"train": "train.csv", "train_0.1": "train_10.csv", "valid": "absent.csv", "test": "test.csv"}
    own("train", dataset_dir=tmp_path, labels=tables, classes=["c"])
    assert "stand in several splits" not in caplog.text  # a training alone has no scores
    own("test", dataset_dir=tmp_path, labels=tables, classes=["c"])
    assert ("stand in several splits" in caplog.text) == (told is not None) and (told or "") in caplog.text


def test_what_is_shared_in_no_use_of_it_is_not_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The published lists select on the test list; a share of the training patients, or an exclusion, mends that."""
    lists.warn_once.cache_clear()
    (tmp_path / "train.csv").write_text("name,patient,c\na,p,0\nb,q,1\nc,r,0\n")
    (tmp_path / "test.csv").write_text("name,patient,c\nd,s,0\ne,p,1\n")
    (tmp_path / "exclude.txt").write_text("a\n")
    for name in "abcde":
        (tmp_path / f"{name}.nii.gz").touch()
    keys = {"dataset_dir": tmp_path, "classes": ["c"]}
    tables = {"train": "train.csv", "valid": "test.csv", "test": "test.csv"}
    for split in ("train", "valid", "test"):
        own(split, **keys, labels=tables, exclude=tmp_path / "exclude.txt")
    own("valid", **keys, labels=tables, validation_share=0.4)
    (tmp_path / "broken.csv").write_text("x;y\n")
    own("test", **keys, labels={"train": "broken.csv", "test": "test.csv"}, id_column="name")
    assert "stand in several splits" not in caplog.text
    own("test", **keys, labels=tables)
    assert "1 patients stand in several splits (p)" in caplog.text


def test_spaces_make_no_other_patient(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("name,patient,c\na,p,0\nb,p ,1\nc, q,0\nd,  ,1\n")
    for name in "abcd":
        (tmp_path / f"{name}.nii.gz").touch()
    (tmp_path / "exclude.txt").write_text("q\n")
    keys = {"dataset_dir": tmp_path, "labels": "t.csv", "classes": ["c"], "test_share": 0, "validation_share": 0}
    assert [item["patient"] for item in own("train", **keys)] == ["p", "p", "q", "d"]
    assert [item["name"] for item in own("train", **keys, exclude=tmp_path / "exclude.txt")] == ["a", "b", "d"]


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "folder"])
def test_a_text_that_never_ends_is_no_file(tmp_path: Path, kind: str) -> None:
    path = Path(kind) if kind.startswith("/") else tmp_path / "list.txt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    (tmp_path / "dataset.json").write_text('{"training": ["a"]}')
    with pytest.raises(InputError, match="cannot be read as text in UTF-8 .it is a "):
        msd(tmp_path, exclude=path)


def test_a_list_in_latin_1_is_said(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes("Prüfung/ct.nii.gz\n".encode("latin-1"))
    with pytest.raises(InputError, match="list.txt cannot be read as text in UTF-8"):
        scans(tmp_path / "list.txt")
    for encoding in ("utf-16", "utf-16-le"):  # with a byte order mark, and without
        (tmp_path / "list.txt").write_bytes("a/ct.nii.gz\n".encode(encoding))
        for read in (scans, lambda path: msd(tmp_path, path), lambda path: msd(tmp_path, "dataset.json", exclude=path)):
            (tmp_path / "dataset.json").write_text('{"training": ["a"]}')
            with pytest.raises(InputError, match="list.txt cannot be read as .* in UTF-8"):
                read(tmp_path / "list.txt")


def test_a_list_of_folders_and_of_equal_names(tmp_path: Path) -> None:
    write_dicom_like(tmp_path / "patient1" / "IM0001")
    (tmp_path / "folders.txt").write_text("patient1\npatient2.nii.gz\n")
    assert [item["name"] for item in scans(tmp_path / "folders.txt")] == ["patient1", "patient2.nii.gz"]
    for case in ("case1", "case2"):
        (tmp_path / case).mkdir()
        (tmp_path / case / "ct.nii.gz").touch()
    (tmp_path / "equal.txt").write_text("case1/ct.nii.gz\ncase2/ct.nii.gz\ncase1/ct.nii.gz\n")
    items = scans(tmp_path / "equal.txt")
    assert [item["name"] for item in items] == ["case1_ct", "case2_ct"]


# MSD-style lists


@pytest.fixture
def btcv(tmp_path: Path) -> Path:
    """A folder with a list as BTCV's: `test` is of bare file names."""
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


def test_an_image_that_a_list_names_twice(btcv: Path, caplog: pytest.LogCaptureFixture) -> None:
    once = {"image": "imagesTr/1.nii.gz", "label": "labelsTr/1.nii.gz"}
    (btcv / "twice.json").write_text(json.dumps({"training": [once, once]}))
    with caplog.at_level(logging.WARNING):
        assert len(msd(btcv, "twice.json")) == 1
    assert "1 entries of training repeat an image, used once" in caplog.text
    (btcv / "twice.json").write_text(json.dumps({"training": [once, once | {"label": "labelsTr/2.nii.gz"}]}))
    with pytest.raises(InputError, match="names imagesTr/1.nii.gz twice, with different labels: keep one"):
        msd(btcv, "twice.json")


def test_images_of_one_name_in_a_folder_per_case(btcv: Path) -> None:
    images = [f"case{i}/ct.nii.gz" for i in range(2)]
    for image in images:
        (btcv / image).parent.mkdir()
        (btcv / image).touch()
    (btcv / "cases.json").write_text(json.dumps({"training": images}))
    assert [item["name"] for item in msd(btcv, "cases.json")] == ["case0_ct", "case1_ct"]


def test_a_bad_list_is_told(btcv: Path) -> None:
    with pytest.raises(InputError, match="split is testing, and datalist .* has no such list .*training, validation"):
        msd(btcv, split="testing")
    assert msd(btcv, split="testing", required=False) == []
    (btcv / "labelsTr" / "7.nii.gz").unlink()
    with pytest.raises(InputError, match="1 files of training.*7.nii.gz"):
        msd(btcv)
    with pytest.raises(InputError, match="absent.json"):
        msd(btcv, "absent.json")
    (btcv / "broken.json").write_text("{")
    with pytest.raises(InputError, match="broken.json is not JSON"):
        msd(btcv, "broken.json")
    (btcv / "plain.json").write_text('["imagesTr/1.nii.gz"]')
    with pytest.raises(InputError, match='plain.json is a plain list: say which split it is, as {"training": '):
        msd(btcv, "plain.json")
    (btcv / "odd.json").write_text('{"training": [{"label": "a"}]}')
    with pytest.raises(InputError, match="without an image"):
        msd(btcv, "odd.json")
    with pytest.raises(InputError, match="data_fraction"):
        msd(btcv, data_fraction=0)


# names to leave out


def test_patients_are_left_out_with_all_their_volumes(tmp_path: Path) -> None:
    write_ct_rate(tmp_path, NAMES)
    (tmp_path / "out.csv").write_text("patient,volume,split\ntrain_1,train_1_a_1,val\n")
    assert {item["patient"] for item in ct_rate(tmp_path, exclude=tmp_path / "out.csv")} == {"train_2"}
    names = [f"scan{i}" for i in range(6)]
    for name in names:
        (tmp_path / f"{name}.nii.gz").touch()
    pd.DataFrame({"id": names, "who": ["p1", "p1", "p2", "p2", "p3", "p3"], "y": list("010101")}).to_csv(
        tmp_path / "labels.csv", index=False
    )
    (tmp_path / "out.txt").write_text("p1\nscan4.nii.gz\n")
    keys = {"images": "{name}.nii.gz", "classes": ["y"], "patient_column": "who", "exclude": tmp_path / "out.txt"}
    found = own(dataset_dir=tmp_path, labels="labels.csv", test_share=0.0, validation_share=0.0, **keys)
    assert [item["name"] for item in found] == ["scan2", "scan3", "scan5"]


@pytest.mark.parametrize("lines", ["train_1_a_7\n", "patient\ntrain_11\n", "train_1_a_1\nname\n", "VolumeNam\n"])
def test_a_name_to_leave_out_that_matches_nothing_is_refused(tmp_path: Path, lines: str) -> None:
    write_ct_rate(tmp_path, NAMES)
    (tmp_path / "out.csv").write_text(lines)
    with pytest.raises(InputError, match="exclude .*out.csv: 1 of its . lines name no volume or patient") as error:
        ct_rate(tmp_path, exclude=tmp_path / "out.csv")
    assert "correct them" in str(error.value) and lines.split()[-1] in str(error.value)


def test_a_name_of_another_split_is_known(tmp_path: Path) -> None:
    write_ct_rate(tmp_path, NAMES)
    valid = reports(tmp_path).with_name("validation_reports.csv")
    write_csv(valid, [REPORT_COLUMNS, ["valid_1_a_1.nii.gz", "", "", "x.", ""]])
    (tmp_path / "out.txt").write_text("valid_1_a_1\nvalid_1\ntrain_2\n")
    assert {item["patient"] for item in ct_rate(tmp_path, exclude=tmp_path / "out.txt")} == {"train_1"}


def test_an_image_to_leave_out_that_no_list_has_is_refused(btcv: Path) -> None:
    (btcv / "out.txt").write_text("3\n20.nii.gz\n0061\n")
    assert len(msd(btcv, exclude=btcv / "out.txt")) == 19
    (btcv / "out.txt").write_text("3\n30\n")
    with pytest.raises(InputError, match="out.txt: 1 of its 2 lines name no image of datalist .* .30.: correct them"):
        msd(btcv, exclude=btcv / "out.txt")
