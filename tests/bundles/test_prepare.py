"""prepare.json through the real command line: from CT-RATE as published to a folder that training reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import monai.bundle
import numpy as np
import pandas as pd
import pytest
import torch
from custom_components.data.phantom import ORGANS, Patient, cohort, patient
from custom_components.data.prepare import Recipe, prepare
from custom_components.data.read import LoadCTd
from custom_components.data.sources import Source
from monai.bundle import ConfigParser
from PIL import Image

from tests.conftest import classes_of
from tests.custom_components.data.test_prepare import save, save_mhd

BUNDLES = Path(__file__).parents[2] / "bundles"


def test_ct_rate_as_published_becomes_what_training_reads(tmp_path: Path) -> None:
    cohort(tmp_path / "raw", 3, 1, num_workers=1)
    damaged = tmp_path / "raw/dataset/train_fixed/train_2/train_2_a/train_2_a_1.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    keys = {"dataset_dir": tmp_path / "raw", "prepared_dir": tmp_path / "out", "pixdim": [5, 5, 10], "num_workers": 1}
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/prepare.json"]
    command += [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    result = subprocess.run(command, cwd=BUNDLES / "pretrain", capture_output=True, text=True, timeout=300)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert len(errors) == 1 and "1 of 4 volumes failed" in errors[0] and str(damaged) in errors[0]
    assert "failed=1" in result.stderr and "3 prepared, 1 failed" in (tmp_path / "out" / "summary.md").read_text()
    assert len(pd.read_csv(tmp_path / "out" / "manifest.csv")) == 4

    parser = ConfigParser()
    parser.read_config(str(BUNDLES / "pretrain" / "configs" / "train.json"))
    for key, value in (("dataset_dir", tmp_path / "out"), ("exclude", tmp_path / "out" / "failed.csv")):
        parser[key] = str(value)
    items = parser.get_parsed_content("train#data")
    assert [item["name"] for item in items] == ["train_1_a_1", "train_3_a_1"]
    assert all(item["findings"] is not None and "label" in item for item in items)
    volume = LoadCTd("image")(items[0])["image"]
    assert volume.pixdim.tolist() == pytest.approx([10, 5, 5]) and -1000 <= volume.min() <= volume.max() <= 1000


@pytest.mark.parametrize(
    "bundle, overlay", [(path.parts[-3], path.name) for path in sorted(BUNDLES.glob("*/configs/prepare*.json"))]
)
def test_each_config_resolves_to_its_data_set(bundle: str, overlay: str, tmp_path: Path) -> None:
    folder = BUNDLES / bundle / "configs"
    parser = ConfigParser()
    parser.read_config([str(folder / name) for name in dict.fromkeys(("prepare.json", overlay))])
    parser["dataset_dir"] = str(tmp_path)
    assert isinstance(parser.get_parsed_content("source"), Source)
    (call,) = parser["run"]
    keys = {*prepare.__annotations__, *Recipe.__annotations__} - {"recipe_keys", "return"}
    assert set(call) - {"_target_"} == keys
    if overlay == "prepare.json":  # one recipe: only the defaults of the data set may differ between bundles
        common = {k: v for k, v in json.loads((folder / overlay).read_text()).items()}
        other = json.loads((BUNDLES / "pretrain" / "configs" / overlay).read_text())
        differs = {key for key in common if common[key] != other[key]}
        assert differs <= {"dataset_dir", "source", "pixdim"} and set(common) == set(other)


# from each data set as published, with its published lists, to what training reads

SHAPE, SPACING = (64, 60, 32), (5.0, 5.0, 10.0)
LPS = np.array([[-1.0, 0, 0, SHAPE[0] - 1], [0, -1, 0, SHAPE[1] - 1], [0, 0, 1, 0], [0, 0, 0, 1]])


def patients() -> Iterator[tuple[int, Patient]]:
    for i in range(4):
        yield i, patient(np.random.default_rng(i), SHAPE, SPACING)


def publish_lists(root: Path, names: list[str], columns: list[str], labels: list[list[int]]) -> None:
    (root / "lists").mkdir()
    table = pd.DataFrame([[name, *values] for name, values in zip(names, labels, strict=True)], columns=columns)
    table[:3].to_csv(root / "lists" / "train_list.csv", index=False)
    table[3:].to_csv(root / "lists" / "test_list.csv", index=False)


def publish_ct_rate(root: Path) -> None:
    cohort(root, 3, 1, num_workers=1)
    for table in (root / "dataset" / "multi_abnormality_labels").iterdir():
        columns = ["VolumeName", *classes_of("ct_rate")]  # of which phantoms have six
        pd.read_csv(table).reindex(columns=columns, fill_value=0).to_csv(table, index=False)


def publish_ct_rate_without_dataset(root: Path) -> None:
    """With train_fixed directly in dataset_dir, as people who point at the folder dataset have it."""
    publish_ct_rate(root)
    for folder in (root / "dataset").iterdir():
        folder.rename(root / folder.name)
    (root / "dataset").rmdir()
    for path in list((root / "valid_fixed").rglob("*.nii.gz")):  # as some download tools leave them
        path.rename(root / "valid_fixed" / path.name)


def publish_radchestct(root: Path) -> None:
    for i, p in patients():
        np.savez_compressed(root / f"trn0000{i}.npz", ct=p.volume[::-1, ::-1, ::-1].transpose(2, 1, 0))
    classes = ["Hietal Hernia" if name == "Hiatal hernia" else name for name in classes_of("radchestct")]
    publish_lists(root, [f"trn0000{i}" for i in range(4)], ["NoteAcc_DEID", *classes], [[i % 2] * 16 for i in range(4)])


def publish_cc_ccii(root: Path) -> None:
    for i, p in patients():
        folder = root / ("NCP", "CP", "Normal")[i % 3] / str(i) / str(3690 + i)
        folder.mkdir(parents=True)
        grey = ((p.volume.clip(-1000, 1000) + 1000) / 2000 * 255).astype(np.uint8)[::-1, ::-1, ::-1]
        for number, picture in enumerate(grey.transpose(2, 1, 0)):
            Image.fromarray(picture).save(folder / (f"{number}.jpg" if i % 2 else f"{number:04d}.png"))
    publish_lists(root, [f"{3690 + i}.nii.gz" for i in range(4)], ["img_list", "label"], [[i % 3] for i in range(4)])


def publish_luna16(root: Path) -> None:
    names = [f"1.3.6.1.4.1.14519.{i}" for i in range(4)]
    for (i, p), name in zip(patients(), names, strict=True):
        masks = [p.organs == ORGANS[organ] for organ in ("left lung", "right lung", "trachea")]
        mask = np.select(masks, [3, 4, 5], 0).astype(np.uint8)
        save_mhd(root / f"subset{i}" / f"{name}.mhd", p.volume[::-1, ::-1], p.affine @ LPS)
        save_mhd(root / "seg-lungs-LUNA16" / f"{name}.mhd", mask[::-1, ::-1], p.affine @ LPS)
    publish_lists(root, [f"{name}.nii.gz" for name in names], ["image_id", "label"], [[i % 2] for i in range(4)])
    items = [{"image": f"images/{n}.nii.gz", "label": f"masks_processed/{n}.nii.gz"} for n in names]
    lists = {"training": items[:3], "validation": items[3:], "testing": items[3:]}
    (root / "dataset.json").write_text(json.dumps(lists))


def publish_btcv(root: Path) -> None:
    for i, p in patients():
        save(root / "imagesTr" / f"img000{i}.nii.gz", p.volume, p.affine)
        save(root / "labelsTr" / f"label000{i}.nii.gz", p.organs.astype(np.uint8), p.affine)
    save(root / "imagesTs" / "img0061.nii.gz", p.volume, p.affine)
    items = [{"image": f"imagesTr/img000{i}.nii.gz", "label": f"labelsTr/label000{i}.nii.gz"} for i in range(4)]
    lists = {"training": items[:3], "validation": items[3:], "test": ["img0061.nii.gz"]}
    (root / "dataset.json").write_text(json.dumps(lists))


GEOMETRY = {"source#spacing": [10.0, 5.0, 5.0]}  # of what lies in files that do not tell
PUBLISHED = [
    ("pretrain", [], ["train"], publish_ct_rate, {}),
    ("pretrain", [], ["train"], publish_ct_rate_without_dataset, {}),
    ("classify", [], ["train", "ct_rate"], publish_ct_rate, {}),
    ("classify", [], ["train", "ct_rate"], publish_ct_rate_without_dataset, {}),
    ("classify", ["prepare_radchestct"], ["train", "radchestct"], publish_radchestct, GEOMETRY),
    ("classify", ["prepare_cc_ccii"], ["train", "cc_ccii"], publish_cc_ccii, GEOMETRY),
    ("classify", ["prepare_luna16"], ["train", "luna16"], publish_luna16, {}),
    ("segment", [], ["train", "luna16"], publish_luna16, {}),
    ("segment", ["prepare_btcv"], ["train", "btcv"], publish_btcv, {}),
]


def test_every_overlay_has_its_case() -> None:
    cases = {(bundle, (overlay or ["prepare"])[0]) for bundle, overlay, *_ in PUBLISHED}
    assert cases == {(path.parts[-3], path.stem) for path in BUNDLES.glob("*/configs/prepare*.json")}


@pytest.mark.parametrize(
    "bundle, overlay, training, publish, keys", PUBLISHED, ids=[f"{case[0]} {' '.join(case[2])}" for case in PUBLISHED]
)
def test_training_reads_what_was_prepared(
    bundle: str,
    overlay: list[str],
    training: list[str],
    publish: object,
    keys: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    minilm: str,
) -> None:
    raw, out = tmp_path / "raw", tmp_path / "prepared"
    raw.mkdir()
    publish(raw)
    configs = [str(BUNDLES / bundle / "configs" / f"{name}.json") for name in ("prepare", *overlay)]
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    common = {"pixdim": [5.0, 5.0, 10.0], "num_workers": 1}
    folders = {"dataset_dir": str(raw), "prepared_dir": str(out)}
    monai.bundle.run(config_file=configs, logging_file=False, **common, **folders, **keys)
    count = len(pd.read_csv(out / "manifest.csv"))
    assert count == (5 if publish is publish_btcv else 4)
    assert f"{count} prepared, 0 failed" in (out / "summary.md").read_text()
    assert (out / "contact_sheet.png").stat().st_size > 10_000

    parser = ConfigParser()
    parser.read_config([str(BUNDLES / bundle / "configs" / f"{name}.json") for name in training])
    small = {"img_size": [48, 48, 24], "num_samples": 1, "pixdim": common["pixdim"], "seed": 0}
    small |= {"dataset_dir": str(out), "exclude": str(out / "failed.csv"), "text_encoder": minilm}
    small |= {"evaluate_after_training": True}  # else pre-training reads no validation reports
    for key, value in (small | ({"classes": list("abcdefg")} if "btcv" in training else {})).items():
        parser[key] = value
    train, valid = (parser.get_parsed_content(f"{split}#data") for split in ("train", "validate"))
    assert (len(train), len(valid)) == (3, 1)
    assert all(os.path.isfile(item["image"]) and item["image"].startswith(str(out)) for item in [*train, *valid])
    chain = (
        "$@read_transforms + @train#random_transforms" if bundle == "classify" else "$@train#preprocessing.transforms"
    )
    parser["chain"] = {"_target_": "Compose", "transforms": chain, "lazy": None if bundle == "pretrain" else False}
    item = parser.get_parsed_content("chain")(dict(train[0]))
    item = item[0] if isinstance(item, list) else item
    assert item["image"].shape == (1, 48, 48, 24) and -1.2 < item["image"].min() < -0.5 < 0 < item["image"].max()
    if bundle == "segment":
        assert item["label"].shape == item["image"].shape and len(torch.unique(item["label"])) > 1
