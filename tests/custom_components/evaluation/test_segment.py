"""Segmentation metrics against counts and distances by hand."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from custom_components.errors import InputError
from custom_components.evaluation.metrics import mean_interval, mean_of_defined
from custom_components.evaluation.report import write_report
from custom_components.evaluation.segment import PresentDice, SegmentationEvaluation, compare_dice, scan_scores
from matplotlib.figure import Figure
from monai.data import Dataset, MetaTensor
from torch import Tensor, nn


def boxes(*corners: tuple[int, int, int, int]) -> Tensor:
    """A label map of cubes: (class, start, stop along x, and size along y and z)."""
    labels = torch.zeros(24, 12, 10, dtype=torch.uint8)
    for index, start, stop, size in corners:
        labels[start:stop, 2 : 2 + size, 2 : 2 + size] = index
    return labels


def test_scores_of_shifted_boxes() -> None:
    """A box moved by 2 voxels of 1.5 mm: surfaces are 3 mm apart at both ends, and 0 along the sides."""
    truth, pred = boxes((1, 4, 14, 5)), boxes((1, 6, 16, 5))
    scores = scan_scores(pred, truth, (1.5, 1.0, 1.0), num_classes=2)
    assert scores["dice"][1] == pytest.approx(8 / 10)
    assert scores["hd95"][1] == pytest.approx(3.0)
    assert 0.75 < scores["surface_dice"][1] < 0.9  # 25 of 178 surface voxels are the end that lies 3 mm off
    near = scan_scores(pred, truth, (1.5, 1.0, 1.0), num_classes=2, tolerance=3.0)
    assert near["surface_dice"][1] == pytest.approx(1.0)


def test_hd95_is_in_mm() -> None:
    truth, pred = boxes((1, 4, 14, 5)), boxes((1, 6, 16, 5))
    small, large = (scan_scores(pred, truth, (size, size, size), 2)["hd95"][1] for size in (1.0, 2.5))
    assert small > 0 and large == pytest.approx(2.5 * small)


def test_a_class_in_neither_map_is_left_out_and_an_invented_one_counts_as_0() -> None:
    truth, pred = boxes((1, 4, 8, 4)), boxes((1, 4, 8, 4), (3, 10, 14, 4))
    scores = scan_scores(pred, truth, (1, 1, 1), num_classes=4)
    assert scores["dice"][1] == 1 and scores["hd95"][1] == 0 and scores["surface_dice"][1] == 1
    assert all(math.isnan(scores[name][2]) for name in scores)
    assert scores["dice"][3] == 0 and scores["surface_dice"][3] == 0 and math.isnan(scores["hd95"][3])
    assert mean_of_defined(np.array([scores["dice"][1:]]))[0] == 0.5
    metric = PresentDice(num_classes=4)
    metric(pred[None, None], truth[None, None])
    assert metric.aggregate().item() == 0.5
    with_background = PresentDice(num_classes=4, include_background=True)
    with_background(pred[None, None], truth[None, None])
    assert with_background.aggregate().item() == pytest.approx((scores["dice"][0] + 1 + 0) / 3)


def test_an_empty_scan_has_no_dice() -> None:
    empty = torch.zeros(4, 4, 4, dtype=torch.uint8)
    scores = scan_scores(empty, empty, (1, 1, 1), num_classes=3)
    assert math.isnan(mean_of_defined(np.array([scores["dice"][1:]]))[0])
    assert mean_interval(np.array([math.nan]), seed=0) == {"mean": None, "low": None, "high": None, "scans": 0}


def entry(*values: float) -> dict:
    scans = np.array(values)
    return {**mean_interval(scans, 0), "per_scan": [None if math.isnan(value) else value for value in values]}


def test_a_comparison_pairs_groups_and_classes(tmp_path: Path) -> None:
    """What one network invents counts against it in the difference as in the table."""
    dice = {
        "first": {"a": entry(0.5, 0.9, 0.7, math.nan), "b": entry(0.9, 0.9, 0.8, 0.8)},
        "other": {"a": entry(0.4, 0.8, 0.6, 0.0), "b": entry(0.9, 0.9, 0.8, 0.8)},
    }
    for name, per_class in dice.items():
        metrics = {**per_class["a"], "groups": {"lesions": per_class["a"]}, "per_class": per_class}
        write_report(tmp_path / name, {"seed": 0, "dice": metrics}, [()], [("",)])
    tuning = {1.0: {"first": {"learning_rate": 0.1, "validation": {"0.1": 0.5, "1": 0.4}}}}
    found = compare_dice({1.0: {name: tmp_path / name for name in dice}}, tmp_path / "out", tuning)
    paired = found["difference"]["1"]["first - other"]
    assert set(paired) == {"foreground mean", "lesions mean", "a", "b"}
    assert paired["a"]["mean"] == paired["lesions mean"]["mean"] == pytest.approx(0.7 - 0.45)
    assert paired["a"]["scans"] == 4 and paired["a"]["low"] < 0.25 < paired["a"]["high"]
    assert (paired["b"]["mean"], paired["b"]["low"], paired["b"]["high"]) == (0, 0, 0)
    assert found["tuning"] == {"1": tuning[1.0]}
    table = (tmp_path / "out" / "metrics.csv").read_text()
    assert "1,first - other,a,+0.250," in table and "1,other,lesions mean,0.450," in table
    # a disk that failed while one of them was evaluated
    write_report(tmp_path / "other", {"seed": 0, "dice": metrics, "unreadable": ["c"]}, [()], [("",)])
    with pytest.raises(InputError, match=r"other: its evaluation could not read \['c'\], that of first nothing"):
        compare_dice({1.0: {name: tmp_path / name for name in dice}}, tmp_path / "out", tuning)


def test_numbers_are_written_before_pictures_which_cost_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen = []

    def fails(*_: object, **__: object) -> None:
        seen.append(json.loads((tmp_path / "metrics.json").read_text())["dice"]["mean"])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fails)
    label = torch.zeros(1, 8, 8, 8)
    label[:, 2:6, 2:6, 2:6] = 1
    logits = torch.cat([1 - label, label])[None]
    items = Dataset([{"name": "a", "image": MetaTensor(torch.zeros(1, 8, 8, 8)), "label": MetaTensor(label)}])
    evaluation = SegmentationEvaluation(nn.Linear(1, 1), lambda *_: logits, items, ["organ"], tmp_path)
    assert evaluation()["dice"]["mean"] == 1.0 and seen == [1.0, 1.0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "metrics.json"]
    for picture in ("box_plots.png", "contours.png"):
        assert f"{picture}: not drawn (OSError: [Errno 28] No space left on device)" in caplog.text


class Scans(Dataset):
    """Boxes under their true logits, by the names of scans, of which some cannot be read."""

    def __init__(self, names: str, damaged: str) -> None:
        super().__init__([{"name": name, "image": f"{name}.nii.gz"} for name in names])
        self.damaged = damaged

    def __getitem__(self, index: int) -> dict:
        name = self.data[index]["name"]
        if name in self.damaged:
            raise InputError(f"{name}.nii.gz is cut off: download it again")
        label = boxes((1, 4, 14, 5 + index))[None]
        return {"name": name, "image": MetaTensor(label.float()), "label": MetaTensor(label)}


def evaluation_of(scans: Scans, folder: Path) -> SegmentationEvaluation:
    def logits(image: Tensor, network: nn.Module) -> Tensor:
        return torch.cat([1 - image, image], 1)

    return SegmentationEvaluation(nn.Linear(1, 1), logits, scans, ["organ"], folder, num_figures=2)


def test_a_scan_that_cannot_be_read_leaves_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(InputError, match=r"^1 volumes could not be read and were left out \(b\); all else is done"):
        evaluation_of(Scans("abcd", "b"), tmp_path)()
    assert "skipped: b.nii.gz is cut off: download it again" in capsys.readouterr().err
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["scans"], metrics["unreadable"], metrics["dice"]["scans"]) == (3, ["b"], 3)
    # in its place, so that scans of two networks are paired though one alone could read it
    assert metrics["dice"]["per_scan"] == [1.0, None, 1.0, 1.0]
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[2::2]] == ["a", "c", "d"]
    assert (tmp_path / "contours.png").is_file() and (tmp_path / "box_plots.png").is_file()


def test_no_scan_that_can_be_read_makes_no_report(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of 2 volumes could be read, the first for this reason: a.nii.gz is cut"):
        evaluation_of(Scans("ab", "ab"), tmp_path)()
    assert not list(tmp_path.iterdir())
