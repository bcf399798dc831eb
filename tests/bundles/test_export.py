"""Exported bundles where this repository cannot be imported: a bare environment that sees installed packages only."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from custom_components.run.export import export

from tests.bundles.conftest import CT, told
from tests.bundles.test_classify import COHORT as CLASSIFY_COHORT
from tests.bundles.test_classify import TINY as CLASSIFY_TINY
from tests.bundles.test_pretrain import TINY as PRETRAIN_TINY
from tests.bundles.test_segment import TINY as SEGMENT_TINY
from tests.conftest import untrained

REPOSITORY = Path(__file__).parents[2]
BUNDLES = ("pretrain", "classify", "segment")
SCHEMA = REPOSITORY / "tests" / "data" / "meta_schema_20240725.json"
DEMO = {
    "pretrain": PRETRAIN_TINY,
    "classify": CLASSIFY_COHORT | CLASSIFY_TINY | {"fractions": [1.0]},
    "segment": SEGMENT_TINY | {"max_epochs": 1, "learning_rates": [0.001]},
}
PHANTOM = {"dataset_dir": "data/phantom"}
ORGANS = PHANTOM | {"datalist": "segmentation.json", "feature_size": 4}
PRETRAIN, CLASSIFY, SEGMENT = (
    json.loads((REPOSITORY / "bundles" / bundle / "configs" / "demo.json").read_text()) for bundle in BUNDLES
)
LABELS = {key: CLASSIFY[key] for key in ("labels", "id_column", "name_pattern", "images", "classes")}
AS_ANY = PHANTOM | LABELS | {"lists_dir": None, "columns": {}}  # the phantoms stand in for any data set


def overlays(train: dict[str, dict], keys: dict) -> dict[str, tuple]:
    """Every overlay of a bundle on its demo, as a training workflow; and inference."""
    found = {name: (["train.json", "demo.json", f"{name}.json"], "train", keys | more) for name, more in train.items()}
    return found | {
        "train": (["train.json", "demo.json"], "train", keys),
        "inference": (["inference.json"], "infer", {"dataset_dir": str(CT)}),
    }


TASK = {
    "pretrain": {
        "shape": PRETRAIN["img_size"],
        "channels": 96,
        "inference": {"sentences": ["There is a pleural effusion."]},
        "overlays": overlays(
            {name: {} for name in ("recommended", "anatomy", "evaluate", "multi_gpu_train", "multi_gpu_evaluate")},
            PHANTOM,
        )
        | {
            "zero_shot": (["inference.json", "zero_shot.json"], "infer", PHANTOM | {"classes": CLASSIFY["classes"]}),
            "radchestct": (
                ["inference.json", "zero_shot.json", "radchestct.json"],
                "infer",
                AS_ANY | {"selection_split": "train"},
            ),
            "grounding_phantom": (["inference.json", "grounding.json", "grounding_phantom.json"], "infer", PHANTOM),
        },
    },
    "classify": {
        "shape": PRETRAIN["img_size"],
        "channels": 6,
        "inference": {"saliency": "all"},
        "overlays": overlays(
            {
                name: {}
                for name in ("ct_rate", "radchestct", "luna16", "cached", "encode", "finetune", "evaluate", "rate")
            }
            | {"cc_ccii": {"exclusive": False, "select_by": "auroc"}}
            | {"external_radchestct": {"network_classes": "@classes", "merged_classes": {}}}
            | {"multi_gpu_train": {}, "multi_gpu_evaluate": {}},
            AS_ANY | {"num_views": 1, "resume": None},
        ),
    },
    "segment": {
        "shape": SEGMENT["img_size"],
        "channels": 1 + len(SEGMENT["classes"]),
        # in float32, as deploy.json computes
        "inference": {"checkpoint": "models/random.pt", "overlap": SEGMENT["overlap"], "amp": False},
        "deploy": {"overlap": SEGMENT["overlap"]},
        "overlays": overlays(
            {name: {} for name in ("evaluate", "multi_gpu_train", "multi_gpu_evaluate")}
            | {
                name: {"label_values": {}, "class_groups": {}, "cache_rate": 0.0, "test_split": "testing"}
                for name in ("luna16", "btcv")
            },
            ORGANS,
        )
        | {"deploy": (["deploy.json"], "infer", {"dataset_dir": str(CT), "checkpoint": "models/random.ts"})},
    },
}
FILES = {
    "pretrain": {"embedding.npy", "panel.png", "similarity_01.nii.gz"},
    "classify": {"panel.png", *(f"saliency_{i:02d}.nii.gz" for i in range(1, 7))},
    "segment": {"labels.nii.gz", "panel.png"},
}
TABLES = {"pretrain": {"sentences.csv"}, "classify": {"predictions.csv", "saliency.csv"}, "segment": {"volumes.csv"}}


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A Python that sees the installed packages, not this repository, and its environment variables.

    Packages come by PYTHONPATH, where editable installs (``.pth`` files) do not count.
    """
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PYTHONPATH": sysconfig.get_paths()["purelib"], "OMP_NUM_THREADS": "1", "PYTHONNOUSERSITE": "1"}
    return folder / "bin" / "python", environment


def call(bare: tuple[Path, dict[str, str]], *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    python, environment = bare
    command = [python, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def options(keys: dict[str, object]) -> list[str]:
    return [part for key, value in keys.items() for part in (f"--{key}", str(value))]


def demo(bare: tuple, bundle: Path, cwd: Path) -> subprocess.CompletedProcess:
    """The demo's command from a foreign folder."""
    files = str([str(bundle / "configs" / name) for name in ("train.json", "demo.json")])
    keys = DEMO[bundle.name] | {"bundle_root": bundle}
    return call(bare, "-m", "monai.bundle", "run", "--config_file", files, *options(keys), cwd=cwd)


@pytest.fixture(scope="session")
def exported(bare: tuple, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Per bundle: its exported folder, what its demo said from a foreign folder, and what ``exported.py`` found there.

    Classify lies alone; segment lies beside pretrain, whose demo has left an encoder.
    """
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("exported")
    foreign = tmp_path_factory.mktemp("foreign")

    folders = {
        name: export(untrained(name, source), out / ("alone" if name == "classify" else "together"))[0]
        for name in BUNDLES
    }

    def work(name: str) -> dict[str, object]:
        return {"folder": folders[name], "foreign": demo(bare, folders[name], foreign)}

    def check(name: str, results: dict[str, object]) -> None:
        task = TASK[name] | {"schema": str(SCHEMA), "scan": str(CT), "demo": DEMO[name]}
        if name == "classify":
            task["other"] = (str(folders["segment"]), "SimCroPUNETR")
        script = Path(__file__).with_name("exported.py")
        results["checks"] = call(bare, script, json.dumps(task), cwd=results["folder"])

    def both(name: str) -> dict[str, object]:
        results = work(name)
        check(name, results)
        return results

    with ThreadPoolExecutor(2) as pool:  # two cores
        classify = pool.submit(both, "classify")
        pretrain = work("pretrain")
        segment = pool.submit(both, "segment")
        check("pretrain", pretrain)
        return {"pretrain": pretrain, "classify": classify.result(), "segment": segment.result()}


def succeeded(result: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def found(exported: dict[str, dict], name: str) -> dict:
    return json.loads(succeeded(exported[name]["checks"]).stdout.splitlines()[-1])


def test_the_environment_is_bare(bare: tuple, tmp_path: Path) -> None:
    result = call(bare, "-c", "import torch; import custom_components", cwd=tmp_path)
    assert result.returncode == 1 and "No module named 'custom_components'" in result.stderr


@pytest.mark.parametrize("name", BUNDLES)
def test_demo_runs_from_a_foreign_and_from_its_own_folder(exported: dict, name: str) -> None:
    succeeded(exported[name]["foreign"])
    folder = exported[name]["folder"]
    assert (folder / "models" / "model.pt").is_file() and found(exported, name)["own demo"]
    assert json.loads((folder / "eval" / "metrics.json").read_text())


def test_demos_say_which_encoder_they_start_from(exported: dict) -> None:
    assert "the encoder starts from RANDOM weights" in exported["classify"]["foreign"].stdout
    assert "filled 49 of 52 tensors of SimCroPEncoder" in exported["segment"]["foreign"].stdout


@pytest.mark.parametrize("name", BUNDLES)
def test_components_are_the_bundles_own(exported: dict, name: str) -> None:
    result = found(exported, name)
    assert result["components"] == str(exported[name]["folder"] / "custom_components") and result["outside"] == []


@pytest.mark.parametrize("name", BUNDLES)
def test_workflow_properties(exported: dict, name: str) -> None:
    missing = found(exported, name)["missing"]
    configs = {path.stem for path in (REPOSITORY / "bundles" / name / "configs").glob("*.json")}
    other = {config for config in configs if config.startswith(("prepare", "import"))}
    other |= {"grounding", "grounding_rexgroundingct"} & configs  # read data of their own, see test_grounding
    assert set(missing) == configs - other - {"metadata", "keys", "demo"}
    assert not any(missing.values()), missing


@pytest.mark.parametrize("name", BUNDLES)
def test_torchscript_and_onnx_compute_what_the_network_does(exported: dict, name: str) -> None:
    error = found(exported, name)["error"]
    assert error["ts"] < 1e-6 and error["onnx"] < 1e-4


@pytest.mark.parametrize("name", BUNDLES)
def test_monai_load_fills_the_network(exported: dict, name: str) -> None:
    assert found(exported, name)["loaded"] == 1.0


@pytest.mark.parametrize("name", BUNDLES)
def test_inference_on_a_real_ct(exported: dict, name: str) -> None:
    assert set(found(exported, name)["files"]) == {f"CTChest4/{file}" for file in FILES[name]} | TABLES[name]


@pytest.mark.parametrize("name", BUNDLES)
def test_python_is_told_what_inference_writes(exported: dict, name: str) -> None:
    assert found(exported, name)["asked"]


def test_two_exports_in_one_process(exported: dict) -> None:
    """Classify's process opens segment, whose UNETR is not among the components that it has imported."""
    folder = exported["segment"]["folder"]
    assert found(exported, "classify")["other"] == str(folder / "custom_components" / "unetr.py")


def test_two_exports_of_different_versions_are_told(exported: dict) -> None:
    folder = exported["classify"]["folder"] / "custom_components"
    told(found(exported, "classify")["refused"], "its vit.py is not that of", str(folder), "processes of their own")


def test_deployment_needs_no_components(exported: dict, bare: tuple, tmp_path: Path) -> None:
    """The script, what describes it, and ``deploy.json`` segment a real CT as the eager network does."""
    folder = exported["segment"]["folder"]
    found(exported, "segment")
    (tmp_path / "models").mkdir()
    (tmp_path / "configs").mkdir()
    for suffix in (".ts", ".json"):
        shutil.copy(folder / "models" / f"random{suffix}", tmp_path / "models" / f"model{suffix}")
    shutil.copy(folder / "configs" / "deploy.json", tmp_path / "configs")
    keys = {"dataset_dir": CT} | TASK["segment"]["deploy"]
    command = ["-m", "monai.bundle", "run", "--config_file", "configs/deploy.json", *options(keys)]
    succeeded(call(bare, *command, cwd=tmp_path))
    scripted, eager, inference = (
        nib.load(path)
        for path in (
            tmp_path / "eval" / "CTChest4" / "CTChest4_labels.nii.gz",
            folder / "eval" / "deployed" / "CTChest4" / "CTChest4_labels.nii.gz",
            folder / "eval" / "inference" / "CTChest4" / "labels.nii.gz",
        )
    )
    labels, same, ours = (np.asarray(image.dataobj) for image in (scripted, eager, inference))
    assert len(np.unique(labels)) > 1 and labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, same)
    # inference.json keeps logits in half precision, which decides a tie now and then
    assert labels.shape == ours.shape and (labels != ours).mean() < 5e-4
    np.testing.assert_allclose(scripted.affine, inference.affine, atol=1e-3)
