"""What a segmentation is worth: Dice, HD95 and surface Dice of scans, with intervals, and contenders side by side."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import Dataset
from monai.inferers import Inferer
from monai.metrics import DiceMetric, compute_hausdorff_distance, compute_surface_dice
from monai.networks import eval_mode
from monai.transforms import generate_spatial_bounding_box
from torch import Tensor, nn
from tqdm import tqdm

from custom_components.data.save import argmax_labels, labels_in_scan
from custom_components.evaluation import figures
from custom_components.evaluation.figures import spacing_of
from custom_components.evaluation.metrics import mean_interval, mean_of_defined
from custom_components.evaluation.report import read_metrics, write_report

METRICS = {"dice": "Dice", "hd95": "HD95 (mm)", "surface_dice": "surface Dice at {:g} mm"}


class PresentDice(DiceMetric):
    """MONAI's Dice of class indices ``[B, 1, ...]``, per scan over the classes that are in truth or prediction.

    A class in neither is left out. MONAI offers to count it as 1, or to leave out every class that is not in the
    truth, which forgives inventing one.

    Args:
        num_classes: background included.
        include_background: whether class 0 counts.
    """

    def __init__(self, num_classes: int, include_background: bool = False) -> None:
        super().__init__(include_background=include_background, ignore_empty=False, num_classes=num_classes)

    def _compute_tensor(self, y_pred: Tensor, y: Tensor) -> Tensor:
        dice = super()._compute_tensor(y_pred, y)
        for column, index in enumerate(range(0 if self.include_background else 1, self.num_classes)):
            absent = ~((y_pred == index) | (y == index)).flatten(1).any(1)
            dice[absent, column] = math.nan
        return dice


def scan_scores(
    pred: Tensor, truth: Tensor, spacing: Sequence[float], num_classes: int, tolerance: float = 2.0
) -> dict[str, list[float]]:
    """Scores of one scan for each class from 0 on, NaN where one is not defined.

    A class in neither map is not defined by any metric; of one that is in a single map, ``dice`` and ``surface_dice``
    are 0 and ``hd95`` is not defined.

    Args:
        pred, truth: class indices ``[X, Y, Z]``.
        spacing: of the voxels, mm.
        num_classes: background included.
        tolerance: of ``surface_dice``, mm.

    Returns:
        ``dice``; ``hd95``, the 95th percentile of the surfaces' distances (the larger of both directions), mm;
        ``surface_dice``, the share of both surfaces within ``tolerance`` of the other. Surfaces of class 0 are not
        computed.
    """
    rows = []
    for index in range(num_classes):
        p, t = pred == index, truth == index
        sizes = int(p.sum()), int(t.sum())
        dice, hd95, surface = math.nan, math.nan, math.nan
        if any(sizes):
            dice = 2 * int((p & t).sum()) / sum(sizes)
            surface = 0.0
        if all(sizes) and index:
            # distances are between surfaces, so what lies around both need not be looked at
            box = tuple(map(slice, *generate_spatial_bounding_box((p | t)[None])))
            p, t = (mask[box][None, None] for mask in (p, t))
            options = {"include_background": True, "spacing": list(spacing)}
            hd95 = float(compute_hausdorff_distance(p, t, percentile=95, **options))
            surface = float(compute_surface_dice(p, t, class_thresholds=[tolerance], **options))
        rows.append((dice, hd95, surface if index else math.nan))
    return dict(zip(METRICS, map(list, zip(*rows, strict=True)), strict=True))


@dataclass
class SegmentationEvaluation:
    """Dice, HD95 and surface Dice on held-out scans, at their own resolution, with 95 % bootstrap intervals over scans.

    Writes ``metrics.json``, ``metrics.csv`` (a row per scan and class), ``box_plots.png`` and ``contours.png``.

    Args:
        network, inferer: give logits ``[1, C, x, y, z]`` of an image ``[1, 1, x, y, z]``.
        dataset: items with ``image``, preprocessed, and ``label`` as it was read, on the scan's own grid.
        classes: names of classes 1, 2, ...
        tolerance: of surface Dice, mm.
        num_figures: scans that are drawn, the first ones.
    """

    network: nn.Module
    inferer: Inferer
    dataset: Dataset
    classes: Sequence[str]
    output_dir: str | Path
    tolerance: float = 2.0
    seed: int = 42
    num_figures: int = 3

    @torch.inference_mode()
    def __call__(self) -> dict[str, Any]:
        """Evaluate, print the table, write it and the figures; returns what ``metrics.json`` holds."""
        device = next(self.network.parameters()).device
        names, scores, rows = [], [], []
        with eval_mode(self.network):
            for i in tqdm(range(len(self.dataset)), desc="held-out scans", unit="scan"):
                item = self.dataset[i]
                image, truth = item["image"], item["label"]
                logits = self.inferer(image.as_tensor()[None].to(device), self.network)[0]
                pred, _ = labels_in_scan(logits, image.affine, truth.affine, truth.shape[1:])
                names.append(item["name"])
                scores.append(
                    scan_scores(pred, truth.as_tensor()[0], spacing_of(truth), len(self.classes) + 1, self.tolerance)
                )
                if i < self.num_figures:
                    rows.append(self._row(item, logits, scores[-1]["dice"]))

        values = {name: np.array([score[name] for score in scores]) for name in METRICS}
        metrics = self._metrics(values)
        write_report(self.output_dir, metrics, self._rows(names, values), table_rows(metrics))
        panels = {
            title.format(self.tolerance): dict(zip(self.classes, values[name].T[1:], strict=True))
            for name, title in METRICS.items()
        }
        figures.box_plots(panels, Path(self.output_dir) / "box_plots.png")
        figures.contours(rows, self.classes).savefig(Path(self.output_dir) / "contours.png", dpi=120)
        return metrics

    def _row(self, item: Mapping[str, Any], logits: Tensor, dice: Sequence[float]) -> dict[str, Any]:
        """One row of the contour figure, on the network's grid."""
        image, label = item["image"], item["label"]
        as_classes = torch.stack([label.as_tensor()[0] == k for k in range(len(self.classes) + 1)])
        truth, _ = labels_in_scan(as_classes, label.affine, image.affine, image.shape[1:])
        foreground = mean_of_defined(np.array([dice[1:]]))[0]
        title = f"{item['name']}: Dice {foreground:.3f}"
        pred = argmax_labels(logits.cpu())
        return {"image": image[0].cpu(), "pred": pred, "truth": truth, "spacing": spacing_of(image), "title": title}

    def _metrics(self, scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
        metrics: dict[str, Any] = {"seed": self.seed, "scans": len(self.dataset)}
        for name, values in scores.items():
            foreground = mean_of_defined(values[:, 1:])
            per_class = {c: mean_interval(values[:, k], self.seed) for k, c in enumerate(self.classes, 1)}
            metrics[name] = {**mean_interval(foreground, self.seed), "per_class": per_class}
            if name == "dice":
                metrics[name]["with_background"] = mean_interval(mean_of_defined(values), self.seed)
                # in the datasets' order, so that two evaluations can be compared scan by scan
                metrics[name]["per_scan"] = [None if math.isnan(value) else value for value in foreground.tolist()]
        metrics["surface_dice"]["tolerance_mm"] = self.tolerance
        return metrics

    def _rows(self, names: Sequence[str], scores: Mapping[str, np.ndarray]) -> list[Sequence[Any]]:
        """What ``metrics.csv`` holds."""
        rows: list[Sequence[Any]] = [("scan", "class", "dice", "hd95_mm", "surface_dice")]
        for name, scan in zip(names, np.stack(list(scores.values()), -1).tolist(), strict=True):
            for c, values in zip(["background", *self.classes], scan, strict=True):
                rows.append([name, c, *("" if math.isnan(value) else round(value, 5) for value in values)])
        return rows


def table_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The metrics as rows of text: metric, class, mean, and its interval with the number of scans."""
    rows = []
    for name in METRICS:
        entries = {"foreground mean": metrics[name], **metrics[name]["per_class"]}
        if "with_background" in metrics[name]:
            entries["with background"] = metrics[name]["with_background"]
        for of, e in entries.items():
            if e["mean"] is None:
                rows.append((name, of, "-", "not defined in any scan"))
            else:
                interval = f"{e['low']:.3f} to {e['high']:.3f}, {e['scans']} scans"
                rows.append((name, of, f"{e['mean']:.3f}", interval))
    return rows


def compare_dice(runs: Mapping[float, Mapping[str, Path]], output_dir: str | Path) -> dict[str, Any]:
    """Dice of networks side by side, for :class:`custom_components.evaluation.compare.Comparison`.

    Writes ``metrics.json``, whose content it returns: ``dice`` by fraction and contender (``mean``, ``low``, ``high``,
    ``per_class``), and ``difference`` of the first contender to each other, paired over scans; ``metrics.csv`` and
    ``comparison.png``.

    Args:
        runs: fraction -> contender -> folder with its ``metrics.json``, all of the same scans.
    """
    metrics: dict[str, Any] = {"seed": None, "dice": {}, "difference": {}}
    rows = [("fraction", "contender", "of", "dice", "interval")]
    for fraction, folders in runs.items():
        found = {name: read_metrics(folder) for name, folder in folders.items()}
        dice = {name: run["dice"] for name, run in found.items()}
        scans = {name: np.array(entry["per_scan"], dtype=float) for name, entry in dice.items()}
        first, *others = dice
        seed = metrics["seed"] = found[first]["seed"]
        differences = {f"{first} - {other}": mean_interval(scans[first] - scans[other], seed) for other in others}
        metrics["dice"][f"{fraction:g}"], metrics["difference"][f"{fraction:g}"] = dice, differences
        for name, entry in dice.items():
            for of, e in {"foreground mean": entry, **entry["per_class"]}.items():
                rows.append((f"{fraction:g}", name, of, f"{e['mean']:.3f}", f"{e['low']:.3f} to {e['high']:.3f}"))
        for name, e in differences.items():
            values = f"{e['mean']:+.3f}", f"{e['low']:+.3f} to {e['high']:+.3f}"
            rows.append((f"{fraction:g}", name, "paired", *values))
    write_report(output_dir, metrics, rows, rows[1:])
    groups = {f"{float(fraction):.0%} of the labels": dice for fraction, dice in metrics["dice"].items()}
    figures.bars(groups, "foreground Dice", Path(output_dir) / "comparison.png")
    return metrics
