"""Keys that are wrong end a run in one line, before any work; those that are right mean what they say."""

import json
import logging
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai.bundle
import pytest
import torch
from custom_components.errors import InputError
from custom_components.run.keys import RESERVED, KeyValidator, Schema, reference, running, top
from custom_components.run.weights import save_weights
from monai.bundle import ConfigParser, ConfigWorkflow

from tests.bundles.conftest import told

REPOSITORY = Path(__file__).parents[2]
BUNDLES = ("pretrain", "classify", "segment")
BASES = ("train", "inference", "prepare", "import_weights")

each_bundle = pytest.mark.parametrize("name", BUNDLES)


def configs_of(name: str) -> dict[str, dict[str, Any]]:
    folder = REPOSITORY / "bundles" / name / "configs"
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable:
    """A bundle's workflow, as far as ``initialize`` brings it: past the check, before any data."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(name: str, configs: list[str], **keys: object) -> ConfigWorkflow:
        monkeypatch.chdir(REPOSITORY / "bundles" / name)
        files = [config if "/" in config else f"configs/{config}.json" for config in configs]
        return monai.bundle.create_workflow(config_file=files, logging_file=False, **keys)

    return call


@pytest.fixture
def refused(begin: Callable) -> Callable:
    """What a person is told of a workflow that does not begin."""

    def call(name: str, configs: list[str], **keys: object) -> str:
        with pytest.raises(Exception) as raised:
            begin(name, configs, **keys)
        error = raised.value
        while not isinstance(error, InputError):
            assert error is not None, raised.value
            error = error.__cause__ or error.__context__
        assert "\n" not in str(error)
        return str(error)

    return call


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """``python -m monai.bundle run ...`` as a shell starts it, but in this process; returns what it prints."""
    monkeypatch.setattr(logging.root, "handlers", list(logging.root.handlers))  # the bundle's own end with the test
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(name: str, configs: list[str], *words: str) -> tuple[str, str]:
        monkeypatch.chdir(REPOSITORY / "bundles" / name)
        files = str([config if "/" in config else f"configs/{config}.json" for config in configs])
        monkeypatch.setattr(sys, "argv", ["monai.bundle", "run", *words, "--config_file", files])
        capsys.readouterr()
        try:
            runpy.run_module("monai.bundle", run_name="__main__")
        except Exception as error:
            capsys.readouterr()
            sys.excepthook(type(error), error, error.__traceback__)
        return capsys.readouterr()

    return call


# the schema, and the reference made of it


@each_bundle
def test_schema_knows_the_keys_of_every_config_and_no_others(name: str) -> None:
    configs = configs_of(name)
    content = configs.pop("keys")
    del configs["metadata"]
    used = {top(key) for config in configs.values() for key in config}
    schema = Schema(REPOSITORY / "bundles" / name / "configs", "train")
    parts = {top(part) for part in schema.parts}
    assert used == (schema.keys.keys() | parts | used & RESERVED) and not schema.keys.keys() & parts
    assert set(content) == {*schema.sections, "arguments", "parts"}
    for spec in (*schema.keys.values(), *schema.arguments.values()):
        KeyValidator.check_schema(spec)
        assert spec["type"] and spec["description"] and "\n" not in spec["description"]


@each_bundle
def test_key_reference_is_made_of_the_schema(name: str) -> None:
    """``python -m custom_components.run.keys bundles/*`` brings it up to date."""
    bundle = REPOSITORY / "bundles" / name
    text = (bundle / "docs" / "keys.md").read_text()
    assert text == reference(bundle)
    configs = configs_of(name)
    schema = Schema(bundle / "configs", "train")
    for key in configs["train"].keys() & schema.keys.keys():
        assert f"| `{key}` |" in text
    assert "docs/keys.md" in (bundle / "docs" / "README.md").read_text()


OF_INFERENCE = {
    "pretrain": ("zero_shot", "radchestct", "grounding", "grounding_phantom", "grounding_rexgroundingct"),
    "classify": (),
    "segment": (),
}
OVERLAYS = [
    (name, [base, *([overlay] if overlay else [])])
    for name in BUNDLES
    for base, overlays in (
        ("train", [*(set(configs_of(name)) - {*BASES, *OF_INFERENCE[name], "keys", "metadata", "deploy"}), None]),
        ("inference", ["demo", *OF_INFERENCE[name], None]),
        ("prepare", [None]),
        ("import_weights", [None]),
    )
    for overlay in sorted(overlays, key=str)
    if not (overlay or "").startswith(("prepare_", "multi_gpu"))
] + [
    (name, ["prepare", stem]) for name in BUNDLES for stem in sorted(configs_of(name)) if stem.startswith("prepare_")
]  # fmt: skip


@pytest.mark.parametrize(("name", "configs"), OVERLAYS, ids=["-".join([name, *c]) for name, c in OVERLAYS])
def test_every_config_is_right(begin: Callable, name: str, configs: list[str], tmp_path: Path) -> None:
    keys = {}
    if name == "pretrain" and "evaluate" in configs:  # which asks its checkpoint first, whatever that has to say
        keys = {"checkpoint": str(tmp_path / "checkpoint.pt")}
        torch.save({}, keys["checkpoint"])
    begin(name, configs, **keys)


@each_bundle
@pytest.mark.parametrize("overlay", ["multi_gpu_train", "multi_gpu_evaluate"])
def test_configs_of_many_devices_are_right(refused: Callable, name: str, overlay: str) -> None:
    assert "torchrun" in refused(name, ["train", overlay])


# what is wrong


DEMO = ["train", "demo"]
WRONG = [
    # names
    ("pretrain", DEMO, {"mask_ration": 0.6}, ["mask_ration", "did you mean mask_ratio?"]),
    ("pretrain", DEMO, {"logging_fil": "x"}, ["did you mean logging_file?"]),
    ("pretrain", DEMO, {"loss_weights": {"alignement": 1.0}}, ["loss_weights", "did you mean alignment?"]),
    ("pretrain", DEMO, {"loss_weights#alignement": 1.0}, ["did you mean alignment?"]),
    ("pretrain", DEMO, {"dataset_dir#num_trian": 4}, ["dataset_dir#num_trian", "did you mean num_train?"]),
    ("pretrain", DEMO, {"train#trainer#max_epoch": 4}, ["train#trainer#max_epoch", "did you mean max_epochs?"]),
    ("pretrain", DEMO, {"train#max_epochs": 4}, ["train#max_epochs"]),
    ("pretrain", ["inference"], {"max_epochs": 4}, ["max_epochs", "inference.json"]),
    ("pretrain", ["inference"], {"+sentences": ["a"]}, ["+sentences", "replaces sentences"]),
    ("classify", DEMO, {"schedules": {"1.0": {"max_step": 4}}}, ["schedules#1.0", "did you mean max_steps?"]),
    ("classify", ["train", "cc_ccii"], {"learningrate": 0.1}, ["did you mean learning_rate?"]),
    ("segment", DEMO, {"validate#evaluator#networks": 1}, ["validate#evaluator#networks", "did you mean network?"]),
    ("segment", ["prepare", "prepare_btcv"], {"source#dataset": "x"}, ["source#dataset", "did you mean dataset_dir?"]),
    ("segment", ["import_weights"], {"img_siz": [1, 1, 1]}, ["did you mean img_size?"]),
    # types and ranges
    ("pretrain", DEMO, {"pixdim": [1.0, 2.0]}, ["pixdim", "3 numbers"]),
    ("pretrain", DEMO, {"pixdim": [0, 0, 0]}, ["pixdim#0", "above 0"]),
    ("pretrain", DEMO, {"hu_range": [400, -1000]}, ["hu_range", "ascending"]),
    ("pretrain", DEMO, {"hu_range": [0, 0]}, ["hu_range", "ascending"]),
    ("pretrain", DEMO, {"scale_crop": [1.0, 0.8]}, ["scale_crop", "ascending"]),
    ("pretrain", DEMO, {"max_epochs": 1.5}, ["max_epochs", "1.5", "integer"]),
    ("pretrain", DEMO, {"max_epochs": 2.0}, ["max_epochs", "integer"]),
    ("pretrain", DEMO, {"max_epochs": 0}, ["max_epochs", "at least 1"]),
    ("pretrain", DEMO, {"max_epochs": True}, ["max_epochs", "integer"]),
    ("pretrain", DEMO, {"batch_size": "four"}, ["batch_size", "four"]),
    ("pretrain", DEMO, {"batch_size": -1}, ["batch_size", "-1"]),
    ("pretrain", DEMO, {"learning_rate": -0.001}, ["learning_rate", "at least 0"]),
    ("pretrain", DEMO, {"learning_rate": float("nan")}, ["learning_rate"]),
    ("pretrain", DEMO, {"learning_rate": "nan"}, ["learning_rate"]),
    ("pretrain", DEMO, {"seed": -1}, ["seed", "at least 0"]),
    ("pretrain", DEMO, {"top_k": "abc"}, ["top_k", "abc"]),
    ("pretrain", DEMO, {"amp": "no"}, ["amp", "true or false"]),
    ("pretrain", DEMO, {"amp": 1}, ["amp", "auto or true or false"]),
    ("segment", ["inference"], {"amp": "on"}, ["amp", "auto or true or false"]),
    ("pretrain", DEMO, {"negatives": "reports"}, ["negatives", "report or volume or both"]),
    ("pretrain", DEMO, {"loss_weights#volume": -1}, ["loss_weights#volume", "at least 0"]),
    ("pretrain", DEMO, {"dataset_dir#num_train": -4}, ["dataset_dir#num_train", "at least 1"]),
    ("pretrain", DEMO, {"dataset_dir#num_train": "four"}, ["dataset_dir#num_train", "four"]),
    ("pretrain", DEMO, {"device": "gpu"}, ["device gpu"]),
    ("pretrain", DEMO, {"device": 0}, ["device", "such as cpu"]),
    ("pretrain", DEMO, {"img_size": [80, 80]}, ["img_size", "3 integers"]),
    ("pretrain", DEMO, {"img_size": [80, 80, 42]}, ["img_size", "no multiple of patch_size"]),
    ("segment", DEMO, {"hidden_size": 97, "num_heads": 2}, ["hidden_size", "no multiple of num_heads, 2"]),
    ("pretrain", DEMO, {"max_epochs": "$2 * 0.75"}, ["max_epochs", "1.5"]),
    ("pretrain", DEMO, {"max_epochs": "$oops"}, ["max_epochs", "oops", "NameError"]),
    ("pretrain", DEMO, {"max_epochs": "@learning_rate"}, ["max_epochs", "0.004"]),
    ("classify", DEMO, {"frozen": "no"}, ["frozen", "true or false"]),
    ("classify", DEMO, {"validation_share": 1.0}, ["validation_share", "below 1"]),
    ("classify", DEMO, {"select_by": "auc"}, ["select_by", "auroc"]),
    ("classify", DEMO, {"schedules": {"1.0": {"max_steps": "many"}}}, ["schedules#1.0#max_steps"]),
    ("segment", DEMO, {"val_interval": 60}, ["val_interval", "60", "max_epochs", "30"]),
    ("segment", DEMO, {"overlap": 1.0}, ["overlap", "below 1"]),
    ("segment", ["inference"], {"sw_batch_size": 0}, ["sw_batch_size"]),
    ("segment", ["prepare"], {"num_workers": 0}, ["num_workers", "null"]),
    ("segment", ["prepare"], {"timeout_minutes": "ten"}, ["timeout_minutes", "ten"]),
    # None
    ("pretrain", DEMO, {"mae_checkpoint": None}, ["--mae_checkpoint null"]),
    ("pretrain", ["inference"], {"report": None}, ["--report null"]),
    ("classify", DEMO, {"pretrained": None}, ["--pretrained null"]),
    ("segment", DEMO, {"patience": None}, ["--patience null"]),
    ("segment", DEMO, {"max_epochs": None}, ["max_epochs None", "integer"]),
    ("pretrain", DEMO, {"max_epochs": "null"}, ["max_epochs", "integer"]),
    # paths and texts are data
    ("pretrain", ["inference"], {"dataset_dir": "@models_dir"}, ["dataset_dir", "@", "./"]),
    ("pretrain", ["inference"], {"report": "$5 of fluid"}, ["report", "$"]),
    ("pretrain", ["inference"], {"sentences": ["nodule #2"]}, ["sentences", "#"]),
    ("pretrain", ["inference"], {"sentences": ["a", "$b"]}, ["sentences", "$b"]),
    ("classify", ["inference"], {"checkpoint": "$1"}, ["checkpoint", "./"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "configs", "keys", "words"),
    WRONG,
    ids=[f"{w[0]}-{'-'.join(f'{k}={v}' for k, v in w[2].items())}" for w in WRONG],
)
def test_wrong_keys_are_refused(refused: Callable, name: str, configs: list[str], keys: dict, words: list[str]) -> None:
    message = refused(name, configs, **keys)
    assert all(word in message for word in words), message


def test_cuda_without_a_gpu_is_refused(refused: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        assert "cuda:7" in refused("segment", ["inference"], device="cuda:7")
    else:
        assert "cuda" in refused("segment", ["inference"], device="cuda")


def test_all_that_is_wrong_is_told_at_once(refused: Callable) -> None:
    message = refused("pretrain", DEMO, seed=-1, top_k="abc", mask_ration=0.6)
    assert all(key in message for key in ("seed", "top_k", "mask_ration"))


@pytest.mark.parametrize(
    ("overlay", "words"),
    [
        ({"mask_ration": 0.6}, ["mine.json", "mask_ration", "did you mean mask_ratio?"]),
        ({"loss_weights": {"volum": 1.0}}, ["loss_weights", "did you mean volume?"]),
        ({"train#handler": []}, ["train#handler", "did you mean handlers?"]),
        ({"train": {"+handlers": []}}, ["train#+handlers"]),
        ({"loss": {"_target_": "custom_components.losses.SimCroPLos"}}, ["loss", "SimCroPLos"]),
        ({"max_epochs": "2"}, ["max_epochs", "'2'"]),
        ({"log_dir": 5}, ["log_dir", "path or null"]),
    ],
)
def test_overlays_are_checked_too(refused: Callable, tmp_path: Path, overlay: dict, words: list[str]) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(overlay))
    message = refused("pretrain", [*DEMO, f"{tmp_path}/mine.json"])
    assert all(word in message for word in words), message


def test_what_the_demo_gives_for_its_classes_holds_for_no_others(
    refused: Callable, begin: Callable, tmp_path: Path
) -> None:
    (tmp_path / "my_data.json").write_text(json.dumps({"dataset_dir": str(tmp_path), "classes": ["lung", "bone"]}))
    configs = ["train", "demo", str(tmp_path / "my_data.json")]
    words = (
        "classes is ['lung', 'bone'] by ",
        "label_values, class_groups, loss still of configs/demo.json, for classes",
    )
    said = refused("segment", configs)
    assert all(word in said for word in words) and "or leave demo.json out" in said
    assert "by the command line, and loss still of configs/demo.json" in refused(
        "segment", ["train", "demo"], classes=["lung"], label_values={}, class_groups={}
    )
    (tmp_path / "my_data.json").write_text(json.dumps({"classes": configs_of("segment")["demo"]["classes"]}))
    begin("segment", configs)
    keys = {"classes": ["lung"], "label_values": {}, "class_groups": {}, "loss#weight": None}
    begin("segment", ["train", "demo"], **{key: "$None" if value is None else value for key, value in keys.items()})
    begin("segment", ["train"], classes=["lung"])


def test_a_workflow_made_without_files_is_checked(begin: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY / "bundles" / "pretrain")
    workflow = ConfigWorkflow("configs/inference.json", logging_file=False, num_layer=3)
    with pytest.raises(Exception) as raised:
        workflow.initialize()
    assert "did you mean num_layers?" in str(raised.value.__cause__)


# what is right


RIGHT = [
    ("pretrain", DEMO, "max_norm", "null", None),
    ("pretrain", DEMO, "mae_checkpoint", "null", None),
    ("pretrain", DEMO, "mae_checkpoint", "$None", None),
    ("pretrain", DEMO, "resume", "null", None),
    ("pretrain", ["inference"], "report", "null", None),
    ("pretrain", DEMO, "amp", "false", False),
    ("pretrain", DEMO, "amp", "True", True),
    ("pretrain", DEMO, "amp", "auto", "auto"),
    ("pretrain", DEMO, "device", "cpu", torch.device("cpu")),
    ("pretrain", DEMO, "betas", (0.9, 0.99), (0.9, 0.99)),
    ("pretrain", DEMO, "max_epochs", "$2 * 3", 6),
    ("pretrain", DEMO, "my_key", "anything", "anything"),
    ("pretrain", DEMO, "models_dir", "/data/a#b", "/data/a#b"),
    ("pretrain", ["inference"], "report", "Nodule #2, 5 mm :: stable", "Nodule #2, 5 mm :: stable"),
    ("pretrain", ["inference"], "dataset_dir", "./$x.nii.gz", "./$x.nii.gz"),
    ("classify", DEMO, "pretrained", "null", None),
    ("classify", DEMO, "patience", "null", None),
    ("classify", DEMO, "frozen", "false", False),
    ("segment", DEMO, "pretrained", "null", None),
    ("segment", ["prepare"], "num_workers", "null", None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "configs", "key", "value", "expected"), RIGHT, ids=[f"{r[0]}-{r[2]}={r[3]}" for r in RIGHT]
)
def test_right_keys_mean_what_they_say(
    begin: Callable, tmp_path: Path, name: str, configs: list[str], key: str, value: Any, expected: Any
) -> None:
    folders = {} if key == "models_dir" else {"output_dir": str(tmp_path)}
    found = begin(name, configs, **{key: value}, **folders).parser.get_parsed_content(key)
    assert found == expected and type(found) is type(expected)


def test_null_in_a_file_is_none(begin: Callable, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps({"mae_checkpoint": None, "models_dir": "/data/a#b", "my_own": 1}))
    parser = begin("pretrain", [*DEMO, f"{tmp_path}/mine.json"]).parser
    assert parser.get_parsed_content("mae_checkpoint") is None
    assert parser.get_parsed_content("models_dir") == "/data/a#b"


def test_monais_tracking_brings_its_keys(begin: Callable, tmp_path: Path) -> None:
    workflow = begin("segment", DEMO, tracking="mlflow", output_dir=str(tmp_path), experiment_name="mine")
    assert workflow.parser["experiment_name"] == "mine"


def test_a_workflow_begins_twice(begin: Callable) -> None:
    workflow = begin("segment", ["inference"], device="cpu", scans_file="null")
    workflow.initialize()
    assert workflow.parser.get_parsed_content("device") == torch.device("cpu")


def test_without_a_config_nothing_runs() -> None:
    assert running() is None


# the command line


SHOW = {"my_run": ["$print('<' + repr([@dataset_dir, @report, @scans_file, @sentences]) + '>')"], "sentences": []}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--dataset_dir", "a,b"], ["a,b", None, None, []]),
        (["--dataset_dir=scan#1.nii.gz"], ["scan#1.nii.gz", None, None, []]),
        (["--dataset_dir", "2024"], ["2024", None, None, []]),
        (["--dataset-dir", "[a]"], ["[a]", None, None, []]),
        (["--dataset_dir", "'a'"], ["'a'", None, None, []]),
        (["--report", "Nodule, effusion #2"], ["x", "Nodule, effusion #2", None, []]),
        (["--sentences", "['nodule #2', 'a::b']"], ["x", None, None, ["nodule #2", "a::b"]]),
        (["--sentences", "nodule, #2"], ["x", None, None, "nodule, #2"]),
        (["--report", "1"], ["x", "1", None, []]),
        (["--report", "null", "--scans_file", "./@list.txt"], ["x", None, "./@list.txt", []]),
        (["--report", "See @#1 and %#2"], ["x", "See @#1 and %#2", None, []]),
    ],
)
def test_command_line_texts_are_taken_letter_by_letter(
    command_line: Callable, tmp_path: Path, words: list[str], found: list
) -> None:
    (tmp_path / "show.json").write_text(json.dumps({**SHOW, "dataset_dir": "x"}))
    out, err = command_line("pretrain", ["inference", f"{tmp_path}/show.json"], "my_run", *words)
    assert f"<{found!r}>" in out, err


@pytest.mark.parametrize(
    ("words", "told_of"),
    [
        (["--dataset_dir", "$__import__('os').mkdir('HERE/pwned') or 'x.nii.gz'"], ["dataset_dir", "./"]),
        (["--report", "$__import__('os').mkdir('HERE/pwned')"], ["report"]),
        (["--output_dir", "$__import__('os').mkdir('HERE/pwned')"], ["output_dir"]),
        (["--sentences", '[\'$__import__("os").mkdir("HERE/pwned")\']'], ["sentences"]),
        (["--report", "None"], ["--report null"]),
        (["--norm_target"], ["rm_target"]),
        (["--device", "gpu"], ["device gpu"]),
    ],
)
def test_command_line_runs_nothing_and_says_why(
    command_line: Callable, tmp_path: Path, words: list[str], told_of: list[str]
) -> None:
    _, err = command_line("pretrain", ["inference"], *(word.replace("HERE", str(tmp_path)) for word in words))
    told(err, *told_of)
    assert list(tmp_path.iterdir()) == []


def test_a_real_command_ends_in_one_line(tmp_path: Path) -> None:
    scan = f"$__import__('os').mkdir('{tmp_path}/pwned') or 'x.nii.gz'"
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    done = subprocess.run(
        [*command, "--dataset_dir", scan, "--num_layer", "3"],
        cwd=REPOSITORY / "bundles" / "segment", capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    told(done.stderr, "dataset_dir", "./", "did you mean num_layers?")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["$__import__('os').mkdir('PWNED') or 'sincos3d'", "@my_code", "%PWNED.json::key"])
@pytest.mark.parametrize("key", ["pos_embed", "mask_ratio", "loss_weights", "text_encoder"])
def test_what_weights_say_of_themselves_is_no_code(begin: Callable, tmp_path: Path, key: str, text: str) -> None:
    """A checkpoint is read with ``weights_only``; so it must run nothing later either."""
    text = text.replace("PWNED", str(tmp_path / "pwned"))
    checkpoint = tmp_path / "models" / "checkpoint.pt"
    checkpoint.parent.mkdir()
    recipe = {key: {"volume": text} if key == "loss_weights" else text}
    torch.save({"description": {"settings": {}, "recipe": recipe}, "network": {}}, checkpoint)
    code = {"models_dir": str(checkpoint.parent), "my_code": f"$__import__('os').mkdir('{tmp_path}/pwned')"}
    if key == "text_encoder":  # which may be any text
        assert begin("pretrain", ["train", "evaluate"], **code).parser.get_parsed_content(key) == text
    else:
        with pytest.raises(Exception) as raised:
            begin("pretrain", ["train", "evaluate"], **code)
        assert f"{key}" in str(raised.value.__cause__) and text[:20] in str(raised.value.__cause__)
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


@pytest.mark.parametrize("target", ["os.mkdir", "$__import__('os').mkdir"])
def test_what_weights_say_of_themselves_is_no_component(refused: Callable, tmp_path: Path, target: str) -> None:
    checkpoint = tmp_path / "models" / "checkpoint.pt"
    checkpoint.parent.mkdir()
    component = {"_target_": target, "path": str(tmp_path / "pwned")}
    for found in (component, {"volume": component}, [component]):
        torch.save({"description": {"settings": {}, "recipe": {"loss_weights": found}}, "network": {}}, checkpoint)
        told_of = refused("pretrain", ["train", "evaluate"], models_dir=str(checkpoint.parent))
        assert "loss_weights" in told_of and "checkpoint" in told_of
        assert [path.name for path in tmp_path.iterdir()] == ["models"]


@pytest.mark.parametrize("as_component", [False, True])
def test_settings_beside_weights_are_no_code(begin: Callable, tmp_path: Path, as_component: bool) -> None:
    code: Any = f"$__import__('os').mkdir('{tmp_path}/pwned')"
    if as_component:
        code = {"_target_": "os.mkdir", "path": f"{tmp_path}/pwned"}
    save_weights({}, tmp_path / "models" / "model.pt", {"settings": {"pos_embed": code, "skip_layers": [code]}})
    with pytest.raises(Exception):  # noqa: B017
        workflow = begin("segment", ["inference"], models_dir=str(tmp_path / "models"))
        workflow.parser.get_parsed_content("network_def")
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_files_are_the_safe_way(tmp_path: Path) -> None:
    from custom_components.data.lists import scans
    from custom_components.text import queries

    names = ["$__import__('os').system('x').nii.gz", "@seed.nii.gz", "%a.nii.gz", "a#b.nii.gz", "a,b.nii.gz"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_text("\n".join(names))
    (tmp_path / "list.csv").write_text("\n".join(f'"{name}",1' for name in ["image", *names]))
    for file in ("list.txt", "list.csv"):
        assert [Path(item["image"]).name for item in scans("nowhere", tmp_path / file)] == names
    (tmp_path / "report.txt").write_text("$5 of fluid, #2.\n@seed is clear.")
    assert list(queries([], report_file=tmp_path / "report.txt")) == ["$5 of fluid, #2.", "@seed is clear."]
    with pytest.raises(InputError, match="report_file"):
        queries([], "text", tmp_path / "report.txt")
    with pytest.raises(InputError, match="report_file"):
        queries([], report_file=tmp_path / "none.txt")
    with pytest.raises(InputError, match="scans_file"):
        scans("nowhere", tmp_path / "a#b.nii.gz")


# folders


@pytest.mark.parametrize(
    ("name", "configs", "key"),
    [
        ("pretrain", DEMO, "output_dir"),
        ("pretrain", DEMO, "models_dir"),
        ("classify", DEMO, "features_dir"),
        ("classify", ["inference"], "output_dir"),
        ("segment", ["train", "evaluate"], "output_dir"),
        ("segment", ["prepare"], "prepared_dir"),
    ],
)
def test_folders_that_cannot_be_written_are_refused(
    refused: Callable, tmp_path: Path, name: str, configs: list[str], key: str
) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "below"):
        message = refused(name, configs, **{key: str(path)})
        assert key in message and "is no folder" in message
    message = refused(name, configs, **{key: "/proc/self/results"})
    assert key in message and "cannot be written" in message


def test_an_evaluation_may_read_weights_from_where_it_cannot_write(begin: Callable, tmp_path: Path) -> None:
    begin("segment", ["train", "evaluate"], models_dir="/proc/self", output_dir=str(tmp_path / "eval"))
    assert not os.path.exists(tmp_path / "eval")  # nothing is made before there is something to write


def test_macros_are_read_before_the_check(begin: Callable, tmp_path: Path) -> None:
    (tmp_path / "sizes.json").write_text(json.dumps({"size": [64, 64, 32]}))
    (tmp_path / "mine.json").write_text(json.dumps({"img_size": f"%{tmp_path}/sizes.json#size"}))
    parser = begin("pretrain", [*DEMO, f"{tmp_path}/mine.json"]).parser
    assert parser.get_parsed_content("img_size") == [64, 64, 32]
    assert isinstance(parser, ConfigParser)


# mistakes in the data, before a volume is read


def unreadable(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).write_bytes(b"no scan")
    return folder


def stops_at(workflow: ConfigWorkflow, part: str = "train#trainer") -> str:
    """What is told of a training, or another part, as it is put together."""
    with pytest.raises(Exception) as raised:
        workflow.parser.get_parsed_content(part)
    error = raised.value
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    assert isinstance(error, InputError), repr(error)
    return str(error)


WITHOUT_WEIGHTS = [(name, ["inference"], "evaluator") for name in BUNDLES] + [
    ("pretrain", ["inference", "zero_shot"], "evaluation"),
    ("pretrain", ["inference", "grounding"], "evaluation"),
    ("pretrain", ["inference", "grounding"], "prediction"),
]


@pytest.mark.parametrize(("name", "configs", "part"), WITHOUT_WEIGHTS)
def test_inference_without_weights_says_to_train(
    begin: Callable, name: str, configs: list[str], part: str, tmp_path: Path
) -> None:
    (tmp_path / "scan.nii.gz").touch()
    keys = {"dataset_dir": f"{tmp_path}/scan.nii.gz", "models_dir": str(tmp_path / "none"), "num_layers": 1}
    told = stops_at(begin(name, configs, output_dir=str(tmp_path / "eval"), **keys), part)
    assert told == (
        f"checkpoint {tmp_path}/none/model.pt: no such checkpoint; train first, or give models_dir, the folder of a "
        "training"
    )


def test_a_missing_validation_list_is_named_first(begin: Callable, tmp_path: Path) -> None:
    items = [{"image": "a.nii.gz", "label": "a.nii.gz"}]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": items, "val": items}))
    keys = {"dataset_dir": str(unreadable(tmp_path, ["a.nii.gz"])), "pretrained": "null", "device": "cpu"}
    workflow = begin("segment", ["train"], cache_rate=1.0, num_layers=1, output_dir=str(tmp_path / "eval"), **keys)
    message = stops_at(workflow)
    assert "validation_split is validation" in message and "training, val" in message


def test_a_validation_of_one_class_is_told_first(begin: Callable, tmp_path: Path) -> None:
    names = [f"{n}.nii.gz" for n in range(4)]
    table = "scan,split,Nodule\n" + "".join(
        f"{name},{split},{label}\n"
        for name, split, label in zip(names, ("train", "train", "valid", "valid"), (0, 1, 1, 1), strict=True)
    )
    (tmp_path / "labels.csv").write_text(table)
    (tmp_path / "mine.json").write_text(json.dumps({"labels": "labels.csv", "classes": ["Nodule"]}))
    folders = {key: str(tmp_path / key) for key in ("output_dir", "features_dir")}
    keys = {"dataset_dir": str(unreadable(tmp_path, names)), "pretrained": "null", "num_layers": 1, "num_workers": 0}
    keys |= {"max_steps": 2, "batch_size": 2, "warmup_steps": 0, "patience": "null", "learning_rate": 0.1}
    message = stops_at(begin("classify", ["train", f"{tmp_path}/mine.json"], **folders, **keys))
    assert "no class has both label values" in message and "validation" in message


def test_an_epoch_of_one_step_is_warned_of(begin: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "reports.csv").write_text("scan,report\na.nii.gz,Clear.\n")
    overlay = {"reports": "reports.csv", "report_column": "report", "id_column": "scan", "images": "{name}.nii.gz"}
    (tmp_path / "mine.json").write_text(json.dumps(overlay))
    folder = str(unreadable(tmp_path, ["a.nii.gz"]))
    workflow = begin("pretrain", ["train", f"{tmp_path}/mine.json"], dataset_dir=folder, output_dir=f"{tmp_path}/eval")
    workflow.parser.get_parsed_content("accumulation_steps")
    assert "effective_batch_size 448 takes all 1 training volumes at once" in caplog.text
    assert "@accumulation_steps" in workflow.parser["train#trainer"]["_requires_"]  # before the data set is made
