"""Comparisons as runs of small configs, whose training writes down the keys that reach it; real ones run in bundles."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import monai.bundle
import pytest
import torch
from custom_components.errors import InputError
from custom_components.evaluation.compare import Comparison, running_config
from custom_components.evaluation.report import read_metrics

CONFIG = {
    "imports": ["$import os", "$import json"],
    "pretrained": None,
    "data_fraction": 1.0,
    "max_epochs": 400,
    "val_interval": "$@max_epochs // 20",
    "optimizer": {"lr": 0.1, "name": "adam"},
    "device": "cpu",
    "evaluate_after_training": False,
    "checkpoint": "$@models_dir + '/model.pt'",
    "found": {
        "pretrained": "@pretrained", "fraction": "@data_fraction", "epochs": "@max_epochs", "interval": "@val_interval",
        "optimizer": "@optimizer", "device": "$str(@device)", "evaluated": "@evaluate_after_training",
    },
    "training": [
        "$os.makedirs(@models_dir)",
        "$os.makedirs(@output_dir)",
        "$open(@checkpoint, 'w').write(@output_dir)",
        "$json.dump(@found, open(@output_dir + '/metrics.json', 'w'))",
    ],
    "contenders": {"first": {}, "second": {"optimizer#lr": "$@val_interval / 10", "max_epochs": 40}},
    "comparison": {
        "_target_": "custom_components.evaluation.compare.Comparison",
        "report": "$lambda runs, folder: @runs.update(runs)",
        "fractions": [1.0, 0.1],
        "models_dir": "@models_dir",
        "output_dir": "@output_dir",
        "checkpoint": "@checkpoint",
    },
    "run": ["$@comparison()"],
}  # fmt: skip


@pytest.fixture
def compare(tmp_path: Path) -> Callable[..., dict[float, dict[str, dict]]]:
    """Runs a comparison; gives fraction -> contender -> the keys that its training found."""

    def run(
        *overlays: dict, tuning: dict | None = None, found_in: dict | None = None, **keys: object
    ) -> dict[float, dict[str, dict]]:
        files = []
        for i, content in enumerate((CONFIG, *overlays)):
            files.append(str(tmp_path / f"{i}.json"))
            Path(files[-1]).write_text(json.dumps(content))
        runs: dict[float, dict[str, Path]] = {} if found_in is None else found_in
        folders = {"models_dir": str(tmp_path / "models"), "output_dir": str(tmp_path / "eval")}
        (tmp_path / "models").mkdir()
        monai.bundle.run(config_file=files, logging_file=False, runs=Runs(runs, tuning), **folders, **keys)
        return {fraction: {name: read_metrics(f) for name, f in found.items()} for fraction, found in runs.items()}

    return run


class Runs:
    """An override that JSON cannot hold, nor a copy replace."""

    def __init__(self, runs: dict, tuning: dict | None) -> None:
        self.update, self.tuned = runs.update, ({} if tuning is None else tuning).update

    def __deepcopy__(self, memo: dict) -> Runs:
        return self


def test_contenders_are_runs_of_the_config_with_keys_of_their_own(compare: Callable, tmp_path: Path) -> None:
    found = compare()
    assert list(found) == [0.1, 1.0] and all(list(runs) == ["first", "second"] for runs in found.values())
    first, second = found[0.1].values()
    assert first["fraction"] == 0.1 and first["evaluated"] is True
    assert (first["epochs"], first["interval"], first["optimizer"]) == (400, 20, {"lr": 0.1, "name": "adam"})
    # what a contender's keys refer to is in its own run
    assert (second["epochs"], second["interval"], second["optimizer"]) == (40, 2, {"lr": 0.2, "name": "adam"})
    weights = (tmp_path / "models" / "model.pt").read_text()
    assert weights == (tmp_path / "models" / "first_1" / "model.pt").read_text() == str(tmp_path / "eval" / "first_1")


def test_every_override_and_overlay_reaches_every_run(compare: Callable) -> None:
    overlay = {"val_interval": 7, "optimizer#name": "sgd", "contenders#third": {"pretrained": None}}
    found = compare(overlay, max_epochs=3, device=torch.device("meta"), **{"optimizer#lr": 0.5})
    for runs in found.values():
        first, second, third = runs.values()
        assert first == third and first["optimizer"] == {"lr": 0.5, "name": "sgd"}
        assert (first["epochs"], first["interval"], first["device"]) == (3, 7, "meta")
        # a contender's own key counts for more
        assert (second["epochs"], second["interval"], second["optimizer"]["lr"]) == (40, 7, 0.7)


TUNED = {
    "learning_rate": 1.0,
    # what is best differs: 0.1 for the first, 0.3 for the second
    "middle": 0.1,
    "contenders": {"first": {}, "second": {"middle": 0.3}},
    "train": {"selection": {"_target_": "types.SimpleNamespace", "best": "$-abs(@learning_rate - @middle)"}},
    "found": {"rate": "@learning_rate", "fraction": "@data_fraction", "evaluated": "@evaluate_after_training"},
    "training": [
        "$os.makedirs(@models_dir)",
        "$os.makedirs(@output_dir)",
        "$open(@checkpoint, 'w').write(@output_dir)",
        "$@evaluate() if @evaluate_after_training else None",
    ],
    "evaluate": "$lambda: json.dump(@found, open(@output_dir + '/metrics.json', 'w'))",
    "evaluation": "$@evaluate",
    "comparison#report": "$lambda runs, folder, tuning: @runs.update(runs) or @runs.tuned(tuning)",
    "comparison#learning_rates": [0.03, 0.1, 0.3],
}


def test_each_contender_is_shown_at_the_rate_of_its_best_validation(compare: Callable, tmp_path: Path) -> None:
    tuning: dict = {}
    found = compare(TUNED, tuning=tuning)
    for fraction, runs in found.items():
        assert {name: run["rate"] for name, run in runs.items()} == {"first": 0.1, "second": 0.3}
        assert all(run["fraction"] == fraction for run in runs.values())
        assert tuning[fraction]["first"]["learning_rate"] == 0.1
        assert tuning[fraction]["second"]["validation"] == pytest.approx({"0.03": -0.27, "0.1": -0.2, "0.3": 0.0})
    evaluated = {path.parent.name for path in (tmp_path / "eval").glob("*/metrics.json")}
    assert evaluated == {"first_0.1_lr_0.1", "second_0.1_lr_0.3", "first_1_lr_0.1", "second_1_lr_0.3"}
    assert len(list((tmp_path / "models").glob("*_lr_*"))) == 12  # all were trained, each in its own folder
    assert (tmp_path / "models" / "model.pt").read_text().endswith("first_1_lr_0.1")


UNREADABLE = {
    "imports": ["$import os", "$import json", "$from custom_components.errors import tell_left_out"],
    "tell": "$lambda: tell_left_out([('scan7', 'scan7 is damaged')] if @data_fraction == 0.1 else [])",
}


@pytest.mark.parametrize("tuned", [False, True])
def test_a_scan_that_could_not_be_read_is_told_once_all_are_compared(
    compare: Callable, tmp_path: Path, tuned: bool
) -> None:
    tuning, runs = {}, {}
    if tuned:
        changes = TUNED | {"evaluate": f"{TUNED['evaluate']} or @tell()"}
    else:
        changes = {"training": [*CONFIG["training"], "$@tell()"]}
    with pytest.raises(RuntimeError) as raised:
        compare({**changes, **UNREADABLE}, tuning=tuning, found_in=runs)
    told = raised.value.__cause__
    assert isinstance(told, InputError) and str(told).startswith(
        "1 volumes could not be read and were left out (scan7)"
    )
    assert {fraction: list(found) for fraction, found in runs.items()} == dict.fromkeys((0.1, 1.0), ["first", "second"])
    assert len(list((tmp_path / "eval").glob("*/metrics.json"))) == 4


def test_a_contender_without_its_file_is_left_out(compare: Callable, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = compare({"contenders": {"pretrained": {}, "scratch": {"pretrained": None}}}, pretrained="absent.pt")
    assert "absent.pt DOES NOT EXIST: contender pretrained is left out" in caplog.text
    assert list(found[1.0]) == ["scratch"]


def test_no_contender_at_all_is_told(compare: Callable) -> None:
    with pytest.raises(RuntimeError) as raised:
        compare(pretrained="absent.pt")
    assert isinstance(raised.value.__cause__, InputError) and "none whose pretrained" in str(raised.value.__cause__)


def test_a_comparison_belongs_to_a_config() -> None:
    with pytest.raises(RuntimeError, match="no config is running"):
        running_config()
    with pytest.raises(RuntimeError, match="no config is running"):
        Comparison(dict, [1.0], "models", "eval")()
