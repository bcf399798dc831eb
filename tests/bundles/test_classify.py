"""The classify bundle through the real command line, at tiny size, on phantoms and on a real chest CT."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import itk
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from custom_components.probe import LinearProbe
from custom_components.vit import SimCroPEncoder
from ignite.engine import Events
from monai.bundle import ConfigParser, ckpt_export, verify_net_in_out
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems
from monai.fl.utils.exchange_object import ExchangeObject
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.bundles.conftest import CT, demo_encoder, documented_overlays, fails_with, run, write_encoder
from tests.conftest import classes_of, write_dicom

BUNDLE = Path(__file__).parents[2] / "bundles" / "classify"
TRAIN = ["train.json", "demo.json"]
COHORT = {"dataset_dir#num_train": 30, "dataset_dir#num_valid": 16}
TINY = {
    "max_steps": 10,
    "warmup_steps": 2,
    "batch_size": 8,
    "num_views": 2,
    "num_resamples": 20,
    "fractions": [0.5, 1.0],
}
DEMO = json.loads((BUNDLE / "configs" / "demo.json").read_text())
ENCODER = demo_encoder()
CT_RATE_CLASSES = classes_of("ct_rate")
DEMO_CLASSES = DEMO["classes"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundle, after its demo at tiny size, by the README's command, on a stand-in for pre-training."""
    folder = tmp_path_factory.mktemp("bundles") / "classify"
    shutil.copytree(BUNDLE, folder, ignore=shutil.ignore_patterns("models", "eval", "data"))
    write_encoder(folder.parent / "pretrain" / "models" / "encoder.pt")
    result = run(folder, TRAIN, **COHORT, **TINY)
    assert result.returncode == 0, result.stdout + result.stderr
    (folder / "stdout.txt").write_text(result.stdout)
    return folder


@pytest.fixture
def defaults() -> dict[str, object]:
    """The demo's cohort and features."""
    return {"dataset_dir": "data/phantom", "compare_after_training": False}


def validations(output_dir: Path) -> list[float]:
    events = EventAccumulator(str(output_dir / "tensorboard" / "validation")).Reload()
    return [event.value for event in events.Scalars("auroc")]


def test_demo_leaves_weights_tables_and_curves(bundle: Path) -> None:
    assert {"checkpoint.pt", "model.pt", "model.json"} <= {p.name for p in (bundle / "models").iterdir()}
    weights = torch.load(bundle / "models" / "model.pt", weights_only=True)
    assert weights["head.weight"].shape == (6, 96) and "encoder.blocks.0.attn.qkv.weight" in weights
    pretrained = torch.load(bundle.parent / "pretrain" / "models" / "encoder.pt", weights_only=True)
    assert torch.equal(weights["encoder.blocks.2.mlp.fc1.weight"], pretrained["blocks.2.mlp.fc1.weight"])
    assert (bundle / "eval" / "roc_pr.png").stat().st_size > 10_000
    assert len(validations(bundle / "eval")) == 4  # ten steps of 8 of 24 volumes: the last epoch has one step
    metrics = json.loads((bundle / "eval" / "metrics.json").read_text())
    assert metrics["selected_on_test"] is False and metrics["volumes"] == 16
    assert set(metrics["per_class"]) | set(metrics["left_out"]) == set(DEMO_CLASSES)
    table = pd.read_csv(bundle / "eval" / "metrics.csv")
    assert list(table) == ["class", "metric", "value", "low", "high"] and {"macro", "micro"} <= set(table["class"])
    predictions = pd.read_csv(bundle / "eval" / "predictions.csv")
    assert len(predictions) == 16 and set(DEMO_CLASSES) <= set(predictions)


def test_demo_compares_encoders_at_both_fractions(bundle: Path) -> None:
    metrics = json.loads((bundle / "eval" / "metrics.json").read_text())
    assert set(metrics["auroc"]) == {"0.5", "1.0"}
    for contenders in metrics["auroc"].values():
        assert set(contenders) == {"simcrop", "random_encoder", "hu_histogram", "raw_statistics"}
        for entry in contenders.values():
            assert {"mean", "low", "high", "per_class"} <= set(entry)
            assert entry["low"] <= entry["mean"] <= entry["high"]
    # a contender is a run of the bundle: at all labels the first one is the run that compares, again
    compared = metrics["auroc"]["1.0"]["simcrop"]["mean"]
    assert compared == metrics["macro"]["auroc"]["value"]
    gain = metrics["auroc_gain"]["1.0"]["hu_histogram"]
    assert gain["value"] == pytest.approx(compared - metrics["auroc"]["1.0"]["hu_histogram"]["mean"])
    assert gain["low"] <= gain["value"] <= gain["high"]
    told = (bundle / "stdout.txt").read_text()
    assert "of the labels: mean AUROC of simcrop minus hu_histogram" in told
    assert "fewer than 10 volumes with it or without" in told  # of 16
    assert "Logging file" not in told and told.count("parsing config_file") <= 1


def test_overrides_reach_every_run_of_the_demo(bundle: Path) -> None:
    for name in ("simcrop_0.5", "random_encoder_0.5", "simcrop_1", "random_encoder_1"):
        checkpoint = torch.load(bundle / "models" / name / "checkpoint.pt", weights_only=True)
        assert checkpoint["trainer"]["iteration"] == TINY["max_steps"]
        assert checkpoint["recipe"]["num_views"] == TINY["num_views"]
    for name in ("hu_histogram_1", "raw_statistics_1"):  # they have no weights, and no training of the bundle's
        assert not list((bundle / "models" / name).glob("*.pt"))
    table = pd.read_csv(bundle / "eval" / "auroc.csv")
    assert list(table) == ["labels", "class", "simcrop", "random_encoder", "hu_histogram", "raw_statistics"]


def test_every_writer_of_curves_has_a_folder_of_its_own(bundle: Path) -> None:
    runs = ["", *(f"{name}_{fraction}" for name in ("simcrop", "random_encoder") for fraction in ("0.5", "1"))]
    folders = {bundle / "eval" / "tensorboard" / run / part for run in runs for part in ("", "validation")}
    files = list((bundle / "eval").rglob("events.*"))
    assert {path.parent for path in files} == folders and len(files) == len(folders)


def test_mlflow_tracks_a_training_and_its_validation(tracked: Callable) -> None:
    (run,) = tracked(TRAIN, **TINY | {"max_steps": 2, "evaluate_after_training": False})
    assert run.info.status == "FINISHED" and [loss.step for loss in run.losses] == [1, 2]
    assert 0 <= run.data.metrics["auroc"] <= 1 and run.data.params["max_epochs"] == "1"


def test_a_second_run_encodes_nothing(bundle: Path, run_here: Callable) -> None:
    before = {path: path.stat().st_mtime_ns for path in (bundle / "data" / "features").rglob("*.npy")}
    assert before
    run_here(TRAIN, **TINY | {"learning_rate": 0.1})
    assert {p: p.stat().st_mtime_ns for p in (bundle / "data" / "features").rglob("*.npy")} == before


def test_resume_goes_on_where_it_was_killed(run_here: Callable, tmp_path: Path) -> None:
    """Ten steps, and five steps then a stop then the rest, end with the same weights."""
    keys = TINY | {"evaluate_after_training": False}
    run_here(TRAIN, **keys)
    whole = torch.load(tmp_path / "models" / "checkpoint.pt", weights_only=True)
    stop = "$@train#trainer.add_event_handler('EPOCH_COMPLETED', lambda engine: engine.terminate())"
    other = {"models_dir": tmp_path / "other", "output_dir": tmp_path / "other"}
    run_here(TRAIN, **keys, **other, run=[stop, "$@train#trainer.run()"])
    assert torch.load(tmp_path / "other" / "checkpoint.pt", weights_only=True)["trainer"]["iteration"] == 3
    run_here(TRAIN, **keys, **other)
    resumed = torch.load(tmp_path / "other" / "checkpoint.pt", weights_only=True)
    assert resumed["trainer"]["iteration"] == whole["trainer"]["iteration"] == 10
    for name, tensor in whole["network"].items():
        torch.testing.assert_close(resumed["network"][name], tensor)
    assert resumed["selection"] == whole["selection"]
    # cosine ended: the rate of the step after the last is zero
    assert whole["lr_scheduler"]["_last_lr"] == [pytest.approx(0.0)]
    before = (tmp_path / "other" / "checkpoint.pt").stat().st_mtime_ns
    run_here(TRAIN, **keys, **other)  # finished: nothing to do
    assert (tmp_path / "other" / "checkpoint.pt").stat().st_mtime_ns == before


def test_early_stopping_and_another_recipe(run_here: Callable, refuses: Callable, tmp_path: Path) -> None:
    keys = TINY | {"max_steps": 200, "learning_rate": 0.0, "patience": 2, "evaluate_after_training": False}
    run_here(TRAIN, **keys, log_dir=None)
    assert not list(tmp_path.rglob("events.*")) and not Path("runs").exists()
    checkpoint = torch.load(tmp_path / "models" / "checkpoint.pt", weights_only=True)
    assert checkpoint["trainer"]["iteration"] == 9  # one epoch of three steps is best, two are not better
    refuses(TRAIN, keys | {"learning_rate": 0.1}, "learning_rate was 0.0 and is 0.1", "resume")


def test_cached_and_online_agree(bundle: Path, run_here: Callable, tmp_path: Path) -> None:
    """With one view and no augmentation, both feed the same numbers in the same order."""
    quiet = {"shift_prob": 0.0, "noise_prob": 0.0, "num_views": 1, "max_steps": 6}
    for features, keys in (("cached", {}), ("online", {"features_dir": None})):
        folder = {"models_dir": tmp_path / features, "output_dir": tmp_path / features}
        run_here(TRAIN, **TINY | quiet | keys, **folder)
    cached, online = (torch.load(tmp_path / f / "model.pt", weights_only=True) for f in ("cached", "online"))
    for name in cached:
        torch.testing.assert_close(cached[name], online[name], rtol=1e-3, atol=1e-5)
    scores = [json.loads((tmp_path / f / "metrics.json").read_text())["macro"]["auroc"] for f in ("cached", "online")]
    assert scores[0]["value"] == pytest.approx(scores[1]["value"], abs=1e-3)


def test_finetuning_moves_the_encoder_least_at_the_bottom(bundle: Path, run_here: Callable, tmp_path: Path) -> None:
    keys = TINY | {"max_steps": 3, "batch_size": 8, "learning_rate": 0.01, "layer_decay": 0.1}
    run_here([*TRAIN, "finetune.json"], **keys, pos_weight="auto")
    start = torch.load(bundle.parent / "pretrain" / "models" / "encoder.pt", weights_only=True)
    end = torch.load(tmp_path / "models" / "checkpoint.pt", weights_only=True)["network"]
    moved = [
        (end[f"encoder.blocks.{i}.mlp.fc1.weight"] - start[f"blocks.{i}.mlp.fc1.weight"]).abs().mean() for i in (0, 2)
    ]
    assert 0 < moved[0] < 0.2 * moved[1]
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text())["volumes"] == 16


def test_evaluate_repeats_the_table(bundle: Path, run_here: Callable, tmp_path: Path) -> None:
    run_here([*TRAIN, "evaluate.json"], models_dir=bundle / "models", num_resamples=20)
    first, again = (json.loads((f / "metrics.json").read_text()) for f in (bundle / "eval", tmp_path / "eval"))
    assert again["per_class"] == first["per_class"]


def test_kept_features_are_written_for_rate(bundle: Path, run_here: Callable, tmp_path: Path) -> None:
    run_here([*TRAIN, "rate.json"], **TINY)
    folder = tmp_path / "eval" / "rate"
    rows = pd.read_csv(folder / "processed.csv")
    assert rows["split"].value_counts().to_dict() == {
        split: len(list((folder / "embeddings" / split).glob("*.npz"))) for split in ("train", "valid", "test")
    }
    assert set(rows["dataset_name"]) == {"phantom"}
    labels = json.loads((folder / "labels.json").read_text())
    assert set(labels) == set(rows["accession"])
    assert len(labels[rows["accession"][0]]["qa_results"]["findings"]) == 6


def test_runs_share_the_encoding(bundle: Path, tmp_path: Path) -> None:
    """Two started at once; a training then encodes nothing."""
    keys = TINY | {key: tmp_path / key for key in ("features_dir", "models_dir", "output_dir")}
    keys |= {"dataset_dir": "data/phantom", "num_views": 8, "compare_after_training": False}
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda _: run(bundle, [*TRAIN, "encode.json"], **keys), range(2)))
    assert [done.returncode for done in runs] == [0, 0], runs[0].stderr + runs[1].stderr
    encoded = [int(re.search(r"(\d+) views encoded", done.stdout)[1]) for done in runs]
    kept = sorted((tmp_path / "features_dir").rglob("*.npy"))
    assert sum(encoded) == len(kept) == 24 * 8 + 6 + 16
    assert run(bundle, [*TRAIN, "cached.json"], **keys).returncode == 0
    assert sorted((tmp_path / "features_dir").rglob("*.npy")) == kept


@pytest.fixture
def published(bundle: Path, tmp_path: Path) -> Callable:
    """Writes a data set of phantoms under the names and lists that the authors publish; gives the folder."""
    volumes = sorted((bundle / "data" / "phantom" / "dataset").rglob("*_1.nii.gz"))[:18]

    def write(data_set: str, images: str, rows: list[dict], **lists: slice) -> Path:
        for folder in (images, "lists"):
            (tmp_path / data_set / folder).mkdir(parents=True)
        for volume, row in zip(volumes, rows):
            name = next(iter(row.values()))
            shutil.copy(volume, tmp_path / data_set / images / f"{name.removesuffix('.nii.gz')}.nii.gz")
        for name, part in lists.items():
            pd.DataFrame(rows[part]).to_csv(tmp_path / data_set / "lists" / f"{name}.csv", index=False)
        return tmp_path / data_set

    return write


@pytest.fixture
def radchestct(published: Callable) -> Path:
    columns = [{"Hiatal hernia": "Hietal Hernia"}.get(name, name) for name in classes_of("radchestct")]
    rows = [{"NoteAcc_DEID": f"tst{i}", **{n: (i + c) % 2 for c, n in enumerate(columns)}} for i in range(18)]
    return published("radchestct", "images", rows, train_list=slice(10), val_list=slice(10, 14), test_list=slice(18))


@pytest.fixture
def cc_ccii(published: Callable) -> Path:
    rows = [{"img_list": f"{i}.nii.gz", "label": i % 3} for i in range(18)]
    lists = {"train_list_1": slice(9), "train_list": slice(12), "test_list": slice(9, 18)}
    return published("cc_ccii", "images_resized", rows, **lists)


@pytest.fixture
def luna16(published: Callable) -> Path:
    rows = [{"image_id": f"1.3.6.1.4.1.14519.{i}.nii.gz", "label": i % 2} for i in range(18)]
    return published("luna16", "images", rows, train_list=slice(12), test_list=slice(12, 18))


NETWORK = ENCODER | {"amp": False, "num_workers": 0, "num_views": 1}


def test_external_test_with_and_without_the_peek(run_here: Callable, radchestct: Path, tmp_path: Path) -> None:
    """A probe of CT-RATE's classes on RadChestCT's, whose one Calcification stands for two."""
    torch.manual_seed(0)
    probe = LinearProbe(SimCroPEncoder(**ENCODER), 18)
    torch.nn.init.normal_(probe.head.weight)
    torch.save(probe.state_dict(), tmp_path / "model.pt")
    keys = NETWORK | {"dataset_dir": radchestct, "checkpoint": tmp_path / "model.pt", "num_resamples": 20}
    run_here(["train.json", "radchestct.json", "evaluate.json", "external_radchestct.json"], **keys)
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    names = classes_of("radchestct")
    assert list(metrics["per_class"]) == names and "threshold" not in metrics["per_class"]["Calcification"]
    published = metrics["auroc_published"]
    parts = [entry["value"] for entry in published["parts"]["Calcification"].values()]
    assert set(published["parts"]["Calcification"]) == {CT_RATE_CLASSES[1], CT_RATE_CLASSES[4]}
    assert max(parts) in [entry["value"] for entry in published["per_class"].values()]
    others = [metrics["per_class"][name]["auroc"]["value"] for name in names if name != "Calcification"]
    assert published["mean"] == pytest.approx(np.mean([*others, max(parts)]))


def test_classes_that_exclude_each_other(run_here: Callable, cc_ccii: Path, tmp_path: Path) -> None:
    """CC-CCII as published: codes, cross-entropy, accuracy, a confusion matrix; the smallest fraction's schedule."""
    keys = NETWORK | {"dataset_dir": cc_ccii, "data_fraction": 0.01, "num_resamples": 20, "patience": 3}
    run_here(["train.json", "cc_ccii.json"], **keys)
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert np.sum(metrics["confusion_matrix"]) == 9 and metrics["classes"] == classes_of("cc_ccii")
    assert metrics["accuracy"]["value"] == pytest.approx(np.trace(metrics["confusion_matrix"]) / 9)
    assert metrics["selected_on_test"] is True  # of this data set the published validation list is the test list
    assert (tmp_path / "eval" / "confusion_matrix.png").is_file()
    recipe = torch.load(tmp_path / "models" / "checkpoint.pt", weights_only=True)["recipe"]
    assert (recipe["max_steps"], recipe["batch_size"], recipe["warmup_steps"]) == (200, 29, 20)


@pytest.mark.parametrize("example", range(3), ids=["smallest", "patients", "MSD"])
def test_ones_own_data_by_the_documented_overlays(
    bundle: Path, run_here: Callable, tmp_path: Path, example: int
) -> None:
    mine = tmp_path / "mine" / "scans"
    mine.mkdir(parents=True)
    volumes = sorted((bundle / "data" / "phantom" / "dataset" / "train_fixed").rglob("*_1.nii.gz"))[:24]
    for i, volume in enumerate(volumes):
        shutil.copy(volume, mine / f"{i}.nii.gz")
    rows = [
        {"scan": i, "patient_id": f"p{i // 2}", "Nodule": i % 2, "fluid": i // 2 % 2, "Effusion": i // 2 % 2}
        for i in range(24)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "mine" / "labels.csv", index=False)
    entries = [{"image": f"scans/{i}.nii.gz", "label": i % 3} for i in range(24)]
    lists = {"training": entries[:12], "validation": entries[12:], "testing": []}
    (tmp_path / "mine" / "datalist.json").write_text(json.dumps(lists))
    overlay = documented_overlays(bundle)[example]
    (bundle / "configs" / "my_data.json").write_text(json.dumps(overlay))
    keys = TINY | {"max_steps": 4, "validation_share": overlay.get("validation_share", 0.0)}  # the demo has its own
    run_here([*TRAIN, "my_data.json"], **keys, dataset_dir=tmp_path / "mine")
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert (metrics["volumes"], metrics["selected_on_test"]) == [(5, False), (4, False), (12, True)][example]
    run_here(["inference.json"], dataset_dir=CT)
    assert list(pd.read_csv(tmp_path / "eval" / "predictions.csv"))[2:] == overlay["classes"]


def test_a_missing_test_list_is_found_before_any_volume_is_read(refuses: Callable, tmp_path: Path) -> None:
    """A training that tests nothing needs none."""
    rows = [{"scan": i, "Nodule": i % 2, "Effusion": i // 2 % 2} for i in range(16)]
    pd.DataFrame(rows).to_csv(tmp_path / "train.csv", index=False)
    for i in range(16):
        (tmp_path / f"{i}.nii.gz").touch()  # unreadable
    keys = {"dataset_dir": tmp_path, "labels": {"train": "train.csv"}, "classes": ["Nodule", "Effusion"]}
    keys |= {"id_column": "scan", "name_pattern": None, "images": "{name}.nii.gz", "validation_share": 0.5}
    keys |= {"max_steps": 2, "features_dir": None}
    refuses(TRAIN, keys, "has no labels of split test")
    refuses(TRAIN, keys | {"evaluate_after_training": False}, ".nii.gz", "read")


def test_training_without_a_data_set_says_which_to_add(refuses: Callable) -> None:
    refuses(["train.json"], {"dataset_dir": "data"}, "no data set", "overlay", "ct_rate.json", "classes")


def test_inference_serves_the_classes_of_ct_rate_or_of_the_overlay(bundle: Path) -> None:
    for overlays in ([], ["radchestct"], ["cc_ccii"], ["luna16"]):
        parser = ConfigParser()
        parser.read_config([str(bundle / "configs" / f"{name}.json") for name in ("inference", *overlays)])
        parser["bundle_root"] = str(bundle)
        parser["models_dir"] = "absent"
        assert parser.get_parsed_content("classes") == classes_of((overlays or ["ct_rate"])[0])


def test_an_unreadable_volume_is_left_out_and_ends_in_exit_code_1(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle / "data" / "phantom", tmp_path / "cohort")
    volume = tmp_path / "cohort" / "dataset" / "valid_fixed" / "valid_3" / "valid_3_a" / "valid_3_a_1.nii.gz"
    volume.write_bytes(volume.read_bytes()[:3000])
    keys = {
        "dataset_dir": tmp_path / "cohort",
        "output_dir": tmp_path,
        "models_dir": tmp_path,
        "compare_after_training": False,
    }
    fails_with(run(bundle, TRAIN, **TINY | keys), "1 volumes could not be read", "valid_3_a_1")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["unreadable"] == ["valid_3_a_1"] and metrics["volumes"] == 15


def test_an_unreadable_test_volume_is_told_without_cached_features_too(
    bundle: Path, refuses: Callable, tmp_path: Path
) -> None:
    shutil.copytree(bundle / "data" / "phantom", tmp_path / "cohort")
    volume = tmp_path / "cohort" / "dataset" / "valid_fixed" / "valid_3" / "valid_3_a" / "valid_3_a_1.nii.gz"
    volume.write_bytes(volume.read_bytes()[:3000])
    keys = {"dataset_dir": tmp_path / "cohort", "models_dir": bundle / "models", "features_dir": None}
    refuses([*TRAIN, "evaluate.json"], keys | {"num_resamples": 20}, "1 volumes could not be read", "valid_3_a_1")
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text())["unreadable"] == ["valid_3_a_1"]


BAD_KEYS = {
    "encoder of another size": ({"hidden_size": 48}, ["encoder.pt", "trained with hidden_size 96", "is 48"]),
    "spacing": ({"pixdim": [1.5, 1.5, 3.0]}, ["encoder.pt", "pixdim [4.0, 4.0, 8.0]", "pixdim is [1.5, 1.5, 3.0]"]),
    "window": ({"hu_range": [-500, 500]}, ["encoder.pt", "hu_range [-1000, 1000]", "hu_range is [-500, 500]"]),
    "no encoder": ({"pretrained": "absent.pt"}, ["pretrained absent.pt", "null"]),
    "class": ({"classes": ["Cyst"]}, ["train_predicted_labels.csv", "no column Cyst"]),
    "frozen": ({"frozen": False}, ["frozen is false", "online"]),
    "fraction": ({"data_fraction": 0.0}, ["data_fraction is 0.0"]),
    "steps": ({"max_steps": 0}, ["max_steps is 0"]),
    "select_by": ({"select_by": "f1"}, ["select_by is 'f1'"]),
    "pos_weight": ({"pos_weight": "yes"}, ["pos_weight is 'yes'"]),
    "dataset_dir": ({"dataset_dir": "/nowhere"}, ["/nowhere"]),
}


@pytest.mark.parametrize("case", BAD_KEYS)
def test_a_bad_key_is_told_in_one_line(refuses: Callable, case: str) -> None:
    keys, words = BAD_KEYS[case]
    refuses(TRAIN, TINY | keys, *words)


def test_a_class_in_training_alone_is_named(bundle: Path, run_here: Callable, tmp_path: Path) -> None:
    shutil.copytree(bundle / "data" / "phantom", tmp_path / "cohort")
    labels = tmp_path / "cohort" / "dataset" / "multi_abnormality_labels" / "valid_predicted_labels.csv"
    pd.read_csv(labels).assign(Cardiomegaly=0).to_csv(labels, index=False)
    run_here(TRAIN, **TINY, dataset_dir=tmp_path / "cohort")
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert "Cardiomegaly" in metrics["left_out"] and "Cardiomegaly" not in metrics["per_class"]
    assert np.isfinite(metrics["macro"]["auroc"]["value"])


@pytest.fixture(scope="module")
def found(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of inference on the real CT as NRRD, NIfTI and DICOM, and on a file that cannot be read."""
    scans, results = tmp_path_factory.mktemp("scans"), tmp_path_factory.mktemp("results")
    shutil.copy(CT, scans / "chest.nrrd")
    itk.imwrite(itk.imread(str(CT)), str(scans / "nifti.nii.gz"))
    write_dicom(itk.imread(str(CT), itk.SS), scans / "series")
    (scans / "text.nii").write_text("not a volume")
    keys = {"dataset_dir": scans, "output_dir": results, "saliency": "['Pleural effusion', 'Lung nodule']"}
    fails_with(run(bundle, ["inference.json"], **keys), "1 of 4", "text")
    return results


def test_inference_on_real_ct_gives_a_row_per_scan(bundle: Path, found: Path) -> None:
    table = pd.read_csv(found / "predictions.csv")
    assert list(table) == ["name", "image", *DEMO_CLASSES] and list(table["name"]) == ["chest", "nifti", "series"]
    values = table[DEMO_CLASSES].to_numpy()
    assert ((values > 0) & (values < 1)).all()
    np.testing.assert_allclose(values, values[[0, 0, 0]], atol=1e-4)  # the same scan in three formats


def test_weights_tell_what_they_must_be_used_with(bundle: Path) -> None:
    told = json.loads((bundle / "models" / "model.json").read_text())
    expected = ENCODER | {"classes": DEMO_CLASSES, "exclusive": False, "check_hu": True, "hu_range": [-1000, 1000]}
    assert expected.items() <= told["settings"].items()
    encoder = (bundle.parent / "pretrain" / "models" / "encoder.pt").read_bytes()
    assert told["recipe"]["pretrained"] == hashlib.sha256(encoder).hexdigest()[:16]
    assert (
        torch.load(bundle / "models" / "checkpoint.pt", weights_only=True)["description"]["settings"]
        == told["settings"]
    )


CONTRADICTIONS = {
    "spacing": ({"pixdim": [1.5, 1.5, 3.0]}, ["pixdim [4.0, 4.0, 8.0]", "pixdim is [1.5, 1.5, 3.0]"]),
    "window": ({"hu_range": [0, 255]}, ["hu_range [-1000, 1000]", "hu_range is [0, 255]"]),
    "order": ({"classes": DEMO_CLASSES[::-1]}, [f"classes {DEMO_CLASSES}", f"classes is {DEMO_CLASSES[::-1]}"]),
    "exclusive": ({"exclusive": True}, ["exclusive False", "exclusive is True"]),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_key_that_contradicts_the_weights_is_told(bundle: Path, refuses: Callable, case: str) -> None:
    keys, words = CONTRADICTIONS[case]
    refuses(["inference.json"], {"dataset_dir": CT, "models_dir": bundle / "models"} | keys, "model.pt", *words)


def test_evaluation_is_of_the_classes_that_the_weights_name(bundle: Path, run_here: Callable, tmp_path: Path) -> None:
    """Whatever the order of the overlay's."""
    turned = {"models_dir": bundle / "models", "num_resamples": 20, "classes": DEMO_CLASSES[::-1]}
    run_here([*TRAIN, "evaluate.json"], **turned)
    first, again = (json.loads((f / "metrics.json").read_text()) for f in (bundle / "eval", tmp_path / "eval"))
    for name, entry in first["per_class"].items():
        assert again["per_class"][name]["auroc"]["value"] == pytest.approx(entry["auroc"]["value"])


def test_resuming_on_another_encoder_is_refused(bundle: Path, refuses: Callable, tmp_path: Path) -> None:
    write_encoder(tmp_path / "encoder.pt", seed=1)
    keys = TINY | {"models_dir": bundle / "models", "pretrained": tmp_path / "encoder.pt", "fractions": [1.0]}
    refuses(TRAIN, keys, "checkpoint.pt", "another recipe", "pretrained was ", "and is")


def test_a_federated_client_trains_from_the_weights_it_is_given(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MONAI's client, two rounds."""
    monkeypatch.chdir(bundle)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "path", list(sys.path))
    folders = {"models_dir": str(tmp_path / "models"), "output_dir": str(tmp_path / "eval")}
    keys = TINY | folders | {"dataset_dir": "data/phantom", "compare_after_training": False, "fractions": [1.0]}
    client = MonaiAlgo(
        str(bundle),
        config_train_filename=[f"configs/{name}" for name in TRAIN],
        train_kwargs=keys,
        config_evaluate_filename=None,
    )
    client.initialize({ExtraItems.CLIENT_NAME: "site"})
    network, seen = client.trainer.network, []
    client.trainer.add_event_handler(Events.STARTED, lambda: seen.append(network.bias.mean().item()))
    for value in (1.0, 2.0):
        given = {name: torch.full_like(tensor, value) for name, tensor in network.state_dict().items()}
        client.train(ExchangeObject(weights=given))
    assert seen == [1.0, 2.0] and client.trainer.state.epoch == 2


def test_old_weights_load_and_what_is_assumed_is_told(
    bundle: Path, run_here: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "models").mkdir()
    shutil.copy(bundle / "models" / "model.pt", tmp_path / "models")
    run_here(["inference.json"], dataset_dir=CT, classes=DEMO_CLASSES, **ENCODER)
    assert "model.pt: does not itself tell what it was trained with; assumed: classes" in caplog.text
    assert list(pd.read_csv(tmp_path / "eval" / "predictions.csv"))[2:] == DEMO_CLASSES


def test_saliency_has_the_scans_geometry_and_means_the_logit(bundle: Path, found: Path) -> None:
    scan = itk.imread(str(CT))
    shape = tuple(scan.GetLargestPossibleRegion().GetSize())
    corner = np.array(scan.TransformIndexToPhysicalPoint([0, 0, 0])) * [-1, -1, 1]  # LPS -> RAS
    for i in (1, 2):
        saliency = nib.load(found / "chest" / f"saliency_{i:02d}.nii.gz")
        assert saliency.shape == shape and saliency.get_data_dtype() == np.float32
        np.testing.assert_allclose(saliency.affine[:3, 3], corner, atol=1e-3)
        assert np.isfinite(saliency.get_fdata()).all() and saliency.get_fdata().std() > 0
    assert (found / "chest" / "panel.png").stat().st_size > 10_000
    table = pd.read_csv(found / "saliency.csv").set_index("name")
    assert list(table.loc["chest", "class"]) == ["Pleural effusion", "Lung nodule"]


def test_inference_on_a_list_without_saliency(bundle: Path, run_here: Callable, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(f"path\n{CT}\n")
    keys = {"dataset_dir": tmp_path / "list.csv", "models_dir": bundle / "models"}
    run_here(["inference.json", "demo.json"], **keys)
    assert [p.name for p in (tmp_path / "eval").iterdir()] == ["predictions.csv"]


def test_an_unknown_saliency_class_is_told(bundle: Path, refuses: Callable) -> None:
    keys = {"dataset_dir": CT, "models_dir": bundle / "models", "saliency": ["Cyst"]}
    refuses(["inference.json", "demo.json"], keys, "saliency names 'Cyst'", "Cardiomegaly")


def test_two_processes_train_as_one(bundle: Path, tmp_path: Path) -> None:
    """torchrun with gloo: the same weights as one process with twice the batch."""
    quiet = TINY | {"max_steps": 4, "evaluate_after_training": True, "compare_after_training": False}
    quiet |= {"dataset_dir": "data/phantom", "num_views": 1, "validation_share": 0.2}

    def arguments(configs: list[str], folder: Path, batch_size: int) -> list[str]:
        keys = quiet | {"models_dir": folder, "output_dir": folder, "batch_size": batch_size}
        files = str([f"configs/{name}" for name in configs])
        return ["--config_file", files, *(part for k, v in keys.items() for part in (f"--{k}", str(v)))]

    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    for command, configs, folder, size in (
        ([sys.executable, "-m"], TRAIN, tmp_path / "one", 8),
        (launch, [*TRAIN, "multi_gpu_train.json"], tmp_path / "two", 4),
    ):
        command = [*command, "monai.bundle", "run", *arguments(configs, folder, size)]
        result = subprocess.run(command, cwd=bundle, capture_output=True, text=True, env=environment, timeout=300)
        assert result.returncode == 0, result.stdout + result.stderr
    one, two = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True)["network"] for n in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert metrics["volumes"] == 16

    configs = [*TRAIN, "evaluate.json", "multi_gpu_evaluate.json"]
    keys = arguments(configs, tmp_path / "two", 4) + ["--output_dir", str(tmp_path / "again")]
    command = [*launch, "monai.bundle", "run", *keys]
    result = subprocess.run(command, cwd=bundle, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads((tmp_path / "again" / "metrics.json").read_text())["per_class"] == metrics["per_class"]


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_the_one_that_evaluates_tells_of_unreadable_volumes(
    monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """The others have nothing to fail of, since torchrun would end it with the first of them that fails."""
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    told: list[str] = []

    class Evaluation:
        report = partial(told.append, "evaluation")

        def __call__(self) -> None:
            told.append("evaluated")

    config = {
        "run": json.loads((BUNDLE / "configs" / "multi_gpu_train.json").read_text())["run"],
        "train": {"trainer": SimpleNamespace(run=lambda: None)},
        "test": {"dataset": None},
        "features": SimpleNamespace(report=lambda: told.append("features")),
        "evaluation": Evaluation(),
        "evaluate_after_training": True,
        "rank": rank,
    }
    ConfigParser(config).get_parsed_content("run")
    assert told == (["evaluated", "evaluation", "features"] if rank == 0 else [])


def test_workflow_properties(has_properties: Callable, bundle: Path, tmp_path: Path) -> None:
    keys = {"dataset_dir": "data/phantom"}
    for configs in (TRAIN, [*TRAIN, "finetune.json"], ["train.json", "ct_rate.json", "demo.json"]):
        has_properties(configs, models_dir=tmp_path, **keys)
    has_properties([*TRAIN, "evaluate.json"], **keys)
    has_properties(["inference.json", "demo.json"], "infer", dataset_dir=CT)


@pytest.mark.parametrize("data_set", ["radchestct", "cc_ccii", "luna16"])
def test_workflow_properties_of_data_sets(
    has_properties: Callable, request: pytest.FixtureRequest, tmp_path: Path, data_set: str
) -> None:
    keys = NETWORK | {"dataset_dir": request.getfixturevalue(data_set), "models_dir": tmp_path, "pretrained": None}
    has_properties(["train.json", f"{data_set}.json"], **keys)
    if data_set == "radchestct":
        torch.save(LinearProbe(SimCroPEncoder(**ENCODER), 18).state_dict(), tmp_path / "model.pt")
        has_properties(["train.json", "radchestct.json", "evaluate.json", "external_radchestct.json"], **keys)


def test_published_schedules() -> None:
    """The tables of the authors' run.sh, and their recipe."""
    train = json.loads((BUNDLE / "configs" / "train.json").read_text())
    published = {
        "img_size": [224, 224, 112], "patch_size": [16, 16, 8], "pixdim": [1.5, 1.5, 3.0], "hidden_size": 768,
        "num_layers": 12, "num_heads": 12, "weight_decay": 1e-5, "max_norm": 1.0, "scale_crop": [0.8, 1.0],
        "flip_prob": [0.2, 0.2, 0.2], "shift_offset": 0.1, "shift_prob": 0.1, "noise_prob": 0.2, "frozen": True,
        "pos_weight": None, "validation_share": 0.0, "select_by": "auroc", "seed": 42,
    }  # fmt: skip
    parser = ConfigParser(train | {"pretrained": None})
    assert {key: parser.get_parsed_content(key) for key in published} == published
    table = {
        "ct_rate": {"0.01": (1000, 32, 1.5e-3, 150, 10),
                    "0.1": (10000, 64, 3e-3, 1500, 10), "1.0": (10000, 64, 3e-3, 1500, 10)},
        "radchestct": {"0.1": (2000, 32, 1.5e-3, 80, 10), "1.0": (2000, 128, 3e-3, 200, 10)},
        "cc_ccii": {"0.01": (200, 29, 1.5e-3, 20, 20), "0.1": (2000, 32, 1.5e-3, 150, 20),
                    "1.0": (2000, 128, 1.5e-3, 200, 20)},
        "luna16": {"0.1": (200, 31, 1.5e-3, 20, 200), "1.0": (2000, 32, 1.5e-3, 200, 20)},
    }  # fmt: skip
    for name, rows in table.items():
        parser = ConfigParser()
        parser.read_config([str(BUNDLE / "configs" / file) for file in ("train.json", f"{name}.json")])
        assert set(parser["schedules"]) == set(rows)
        for fraction, row in rows.items():
            parser["data_fraction"] = float(fraction)
            parser.parse(True)
            keys = ("max_steps", "batch_size", "learning_rate", "warmup_steps", "patience")
            assert tuple(parser.get_parsed_content(key) for key in keys) == row


def test_metadata_names_the_classes() -> None:
    metadata = json.loads((BUNDLE / "configs" / "metadata.json").read_text())
    channels = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert list(channels.values()) == CT_RATE_CLASSES


def test_exports_to_torchscript(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(bundle)
    files = ("models/model.pt", "configs/metadata.json", "configs/inference.json")
    ckpt_export("network_def", str(tmp_path / "model.ts"), *files)
    exported = torch.jit.load(tmp_path / "model.ts")
    probe = LinearProbe(SimCroPEncoder(**ENCODER), 6)
    probe.load_state_dict(torch.load("models/model.pt", weights_only=True))
    volume = torch.rand(1, 1, *ENCODER["img_size"])
    torch.testing.assert_close(exported(volume), probe.eval()(volume))


@pytest.mark.slow
def test_verify_net_in_out_at_published_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BUNDLE)
    verify_net_in_out("network_def", "configs/metadata.json", "configs/inference.json", device="cpu")
