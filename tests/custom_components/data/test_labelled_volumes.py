"""The published classification lists, and the splits drawn where there is none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from custom_components.data.lists import CT_RATE_CLASSES, class_names, labelled_volumes, scans
from custom_components.errors import InputError

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


def read(folder: Path, data_set: str, split: str = "train", **keys: object) -> list[dict]:
    return labelled_volumes(folder, data_set, split, lists_dir=folder / "lists", **keys)


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
    first, second = read(folder, "rad_chest_ct", "test")
    names = class_names("rad_chest_ct")
    assert len(names) == 16
    assert {names[i] for i in np.flatnonzero(first["label"])} == {
        "Medical material", "Calcification", "Emphysema", "Atelectasis", "Lung nodule"
    }  # fmt: skip
    # spelled Hietal Hernia in the list
    assert second["label"][names.index("Hiatal hernia")] == 1


def test_cc_cciis_and_luna16s_published_lists(published: Callable) -> None:
    folder = published(CC_CCII_LIST, *(f"images_resized/{n}.nii.gz" for n in (1338, 5397, 3768)))
    assert [item["label"] for item in read(folder, "cc_ccii", exclusive=True)] == [2, 0, 1]
    folder = published(LUNA16_LIST, f"subset3/{UID}.mhd", "images/1.2.3.nii.gz")
    assert [item["label"].tolist() for item in read(folder, "luna16")] == [[1], [0]]


def test_a_fraction_with_a_list_of_its_own(published: Callable) -> None:
    folder = published(CC_CCII_LIST, *(f"images/{n}.nii.gz" for n in (1338, 5397, 3768)))
    (folder / "lists" / "train_list_10.csv").write_text("img_list,label\n5397.nii.gz,0\n")
    assert [item["name"] for item in read(folder, "cc_ccii", data_fraction=0.1, exclusive=True)] == ["5397"]
    assert len(read(folder, "cc_ccii", exclusive=True)) == 3
    # without a validation list of its own, the test list is that too, as published
    assert read(folder, "cc_ccii", "valid", exclusive=True) == read(folder, "cc_ccii", "test", exclusive=True)


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
        "data_set": "csv",
        "classes": ["mass", "nodule"],
        "labels": tmp_path / "labels.csv",
        "validation_share": 0.1,
        "test_share": 0.25,
    }


def test_splits_by_patient_are_nested_and_disjoint(cohort: dict) -> None:
    def split(name: str, **keys: object) -> list[dict]:
        return labelled_volumes(split=name, **cohort | keys)

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


def test_without_a_validation_share_the_test_volumes_are_validated_on(cohort: dict) -> None:
    cohort["validation_share"] = 0.0
    valid, test = (labelled_volumes(split=split, **cohort) for split in ("valid", "test"))
    assert [item["name"] for item in valid] == [item["name"] for item in test]


def test_extra_columns_are_told(cohort: dict, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        labelled_volumes(split="train", **cohort)
    assert "labels.csv: 1 columns are no class of csv, and are not used: age" in caplog.text


BAD = {
    "missing column": ({"classes": ["mass", "cyst"]}, "labels.csv has no column cyst"),
    "no classes": ({"classes": None}, "data_set csv has no classes.*key classes"),
    "data set": ({"data_set": "ctrate"}, "data_set 'ctrate' is unknown: give one of ct_rate"),
    "split": ({"split": "dev"}, "split is 'dev'"),
    "fraction": ({"data_fraction": 0.0}, "data_fraction is 0.0"),
    "share": ({"validation_share": 1.0}, "validation_share is 1.0"),
    "nothing for testing": ({"split": "test", "test_share": 0.0}, "split test of csv has no volume.*test_share 0.0"),
    "no labels": ({"labels": None}, "csv needs labels: set lists_dir"),
    "no lists": ({"labels": None, "lists_dir": "nowhere"}, "lists_dir nowhere has no train_list.csv"),
    "dataset_dir": ({"dataset_dir": "/nowhere"}, "dataset_dir /nowhere is no folder"),
    "codes": ({"exclusive": True}, "labels.csv has no column label"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_told(cohort: dict, case: str) -> None:
    changes, message = BAD[case]
    with pytest.raises(InputError, match=message):
        labelled_volumes(**{"split": "train"} | cohort | changes)


@pytest.mark.parametrize("value", ["2", "0.5", "yes", "", "nan"])
def test_a_label_outside_zero_and_one_is_told(cohort: dict, value: str) -> None:
    frame = pd.read_csv(cohort["labels"], dtype=str)
    frame.loc[7, "mass"] = value
    frame.to_csv(cohort["labels"], index=False)
    with pytest.raises(InputError, match="labels.csv: mass of scan7 is .*: make it 0 or 1"):
        labelled_volumes(split="train", **cohort)


def test_a_code_outside_the_classes_is_told(published: Callable) -> None:
    folder = published(CC_CCII_LIST.replace("1338.nii.gz,2", "1338.nii.gz,3"))
    with pytest.raises(InputError, match="label of 1338 is 3: make it a code from 0 to 2"):
        read(folder, "cc_ccii", exclusive=True)


def test_a_volume_named_twice_and_a_missing_one_are_told(cohort: dict) -> None:
    frame = pd.read_csv(cohort["labels"], dtype=str)
    pd.concat([frame, frame[:1]]).to_csv(cohort["labels"], index=False)
    with pytest.raises(InputError, match="labels.csv names scan0 twice"):
        labelled_volumes(split="train", **cohort)
    frame.to_csv(cohort["labels"], index=False)
    (cohort["dataset_dir"] / "scan4.nii.gz").unlink()
    found = {split: labelled_volumes for split in ("train", "valid", "test")}
    with pytest.raises(InputError, match="1 of .* volumes.*scan4"):
        for split in found:
            labelled_volumes(split=split, **cohort)
    (cohort["dataset_dir"] / "exclude.txt").write_text("scan4.nii.gz\n")
    kept = [labelled_volumes(split=split, exclude=cohort["dataset_dir"] / "exclude.txt", **cohort) for split in found]
    assert sum(len(items) for items in kept) == 119


def test_a_list_of_scans(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nrrd"):
        (tmp_path / name).touch()
    (tmp_path / "scans.csv").write_text(f"path,comment\na.nii.gz,x\n{tmp_path}/b.nrrd,y\nabsent.nii,z\n")
    items = scans(tmp_path / "scans.csv")
    assert [item["image"] for item in items] == [str(tmp_path / n) for n in ("a.nii.gz", "b.nrrd", "absent.nii")]
    (tmp_path / "empty.txt").write_text("nothing here\n")
    with pytest.raises(InputError, match="empty.txt lists no CT"):
        scans(tmp_path / "empty.txt")
