"""What a segmentation is worth: Dice, HD95 and surface Dice of scans, with intervals, and contenders side by side."""

from __future__ import annotations

import csv
import gc
import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import monai.bundle
import numpy as np
import torch
from monai.data import Dataset
from monai.inferers import Inferer
from monai.metrics import DiceMetric, compute_hausdorff_distance, compute_surface_dice
from torch import Tensor, nn
from tqdm import tqdm

from custom_components.evaluation import figures
from custom_components.errors import InputError
from custom_components.evaluation.pretrain import print_table
from custom_components.evaluation.figures import spacing_of
from custom_components.data.read import argmax_labels, labels_in_scan

logger = logging.getLogger(__name__)

METRICS = ("dice", "hd95", "surface_dice")


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
    scores: dict[str, list[float]] = {name: [] for name in METRICS}
    for index in range(num_classes):
        p, t = pred == index, truth == index
        sizes = int(p.sum()), int(t.sum())
        dice, hd95, surface = math.nan, math.nan, math.nan
        if any(sizes):
            dice = 2 * int((p & t).sum()) / sum(sizes)
            surface = 0.0
        if all(sizes) and index:
            # distances are between surfaces, so what lies around both need not be looked at
            box = tuple(slice(*_extent((p | t), axis)) for axis in range(3))
            p, t = (torch.nn.functional.pad(mask[box], (1,) * 6)[None, None] for mask in (p, t))
            options = {"include_background": True, "spacing": list(spacing)}
            hd95 = float(compute_hausdorff_distance(p, t, percentile=95, **options))
            surface = float(compute_surface_dice(p, t, class_thresholds=[tolerance], **options))
        for name, value in zip(METRICS, (dice, hd95, surface if index else math.nan), strict=True):
            scores[name].append(value)
    return scores


def _extent(mask: Tensor, axis: int) -> tuple[int, int]:
    """First and one after the last index along an axis at which a mask ``[X, Y, Z]`` is set."""
    others = [other for other in range(3) if other != axis]
    found = mask.sum(others).nonzero().flatten()
    return int(found[0]), int(found[-1]) + 1


def interval(values: np.ndarray, seed: int, repeats: int = 2000) -> dict[str, Any]:
    """Mean of what is defined, and the 2.5th and 97.5th percentile of that mean over resampled scans.

    Args:
        values: one per scan, NaN where it is not defined.

    Returns:
        ``mean``, ``low``, ``high`` (None if nothing is defined), and ``scans``, how many are.
    """
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    if not len(values):
        return {"mean": None, "low": None, "high": None, "scans": 0}
    means = np.random.default_rng(seed).choice(values, (repeats, len(values))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "scans": len(values)}


def mean_of_defined(scores: np.ndarray) -> np.ndarray:
    """``[scans, classes]`` -> ``[scans]``, NaN for a scan without any defined class."""
    defined = np.isfinite(scores)
    count = defined.sum(1)
    return np.where(count, np.where(defined, scores, 0).sum(1) / np.maximum(count, 1), np.nan)


class SegmentationEvaluation:
    """Dice, HD95 and surface Dice on held-out scans, at their own resolution, with 95 % bootstrap intervals over scans.

    Writes ``metrics.json``, ``metrics.csv`` (a row per scan and class), ``box_plots.png`` and ``contours.png``.

    Args:
        network, inferer: give logits ``[1, C, x, y, z]`` of an image ``[1, 1, x, y, z]``.
        dataset: items with ``image``, preprocessed, and ``label`` as it was read, on the scan's own grid.
        classes: names of classes 1, 2, ...
        output_dir: for tables and figures.
        tolerance: of surface Dice, mm.
        seed: of the bootstrap.
        num_figures: scans that are drawn, the first ones.
    """

    def __init__(
        self,
        network: nn.Module,
        inferer: Inferer,
        dataset: Dataset,
        classes: Sequence[str],
        output_dir: str,
        tolerance: float = 2.0,
        seed: int = 42,
        num_figures: int = 3,
    ) -> None:
        self.network = network
        self.inferer = inferer
        self.dataset = dataset
        self.classes = list(classes)
        self.output_dir = Path(output_dir)
        self.tolerance = tolerance
        self.seed = seed
        self.num_figures = num_figures

    @torch.inference_mode()
    def __call__(self) -> dict[str, Any]:
        """Evaluate, print the table, write it and the figures; returns what ``metrics.json`` holds."""
        was_training = self.network.training
        self.network.eval()
        device = next(self.network.parameters()).device
        names, scores, rows = [], [], []
        for i in tqdm(range(len(self.dataset)), desc="held-out scans", unit="scan"):
            item = self.dataset[i]
            image, truth = item["image"], item["label"]
            logits = self.inferer(image.as_tensor()[None].to(device), self.network)[0]
            pred, _ = labels_in_scan(logits, image.affine, truth.affine, truth.shape[1:])
            scores.append(
                scan_scores(pred, truth.as_tensor()[0], spacing_of(truth), len(self.classes) + 1, self.tolerance)
            )
            names.append(item["name"])
            if len(rows) < self.num_figures:
                rows.append(self._row(item, logits, scores[-1]["dice"]))
        self.network.train(was_training)

        metrics = self._metrics({name: np.array([score[name] for score in scores]) for name in METRICS})
        self.output_dir.mkdir(parents=True, exist_ok=True)
        (self.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        self._write_scans(names, scores)
        titles = ("Dice", "HD95 (mm)", f"surface Dice at {self.tolerance:g} mm")
        panels = {
            title: {c: [score[name][k] for score in scores] for k, c in enumerate(self.classes, 1)}
            for name, title in zip(METRICS, titles, strict=True)
        }
        figures.box_plots(panels, self.output_dir / "box_plots.png")
        figures.contours(rows, self.classes).savefig(self.output_dir / "contours.png", dpi=120)
        print_table(table_rows(metrics))
        print(f"tables and figures: {self.output_dir.resolve()}")
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
            metrics[name] = interval(foreground, self.seed)
            metrics[name]["per_class"] = {c: interval(values[:, k], self.seed) for k, c in enumerate(self.classes, 1)}
            if name == "dice":
                metrics[name]["with_background"] = interval(mean_of_defined(values), self.seed)
                # in the datasets' order, so that two evaluations can be compared scan by scan
                metrics[name]["per_scan"] = [None if math.isnan(value) else value for value in foreground.tolist()]
        metrics["surface_dice"]["tolerance_mm"] = self.tolerance
        return metrics

    def _write_scans(self, names: Sequence[str], scores: Sequence[Mapping[str, Sequence[float]]]) -> None:
        with open(self.output_dir / "metrics.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["scan", "class", "dice", "hd95_mm", "surface_dice"])
            for name, score in zip(names, scores, strict=True):
                for k, c in enumerate(["background", *self.classes]):
                    values = ["" if math.isnan(score[metric][k]) else round(score[metric][k], 5) for metric in METRICS]
                    writer.writerow([name, c, *values])


def table_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The metrics as rows of text: metric, class, mean, and its interval with the number of scans."""

    def row(metric: str, of: str, entry: Mapping[str, Any]) -> tuple[str, str, str, str]:
        if entry["mean"] is None:
            return metric, of, "-", "not defined in any scan"
        return metric, of, f"{entry['mean']:.3f}", f"{entry['low']:.3f} to {entry['high']:.3f}, {entry['scans']} scans"

    rows = []
    for name in METRICS:
        rows.append(row(name, "foreground mean", metrics[name]))
        rows += [row(name, c, entry) for c, entry in metrics[name]["per_class"].items()]
        if "with_background" in metrics[name]:
            rows.append(row(name, "with background", metrics[name]["with_background"]))
    return rows


class Comparison:
    """Trains and evaluates contenders at several fractions of the labels, each as a bundle run of its own.

    Writes ``metrics.json``: ``dice`` by fraction and contender (``mean``, ``low``, ``high``, ``per_class``), and
    ``difference`` of the first contender to each other, paired over scans; ``metrics.csv`` and ``comparison.png``.
    Every run leaves its own tables, pictures and TensorBoard curves in a folder below. The weights of the first
    contender at the largest fraction become ``<models_dir>/model.pt``.

    Args:
        config_file: the configs of a single run.
        run_id: what those configs call training and evaluation.
        contenders: name -> keys that make it, such as ``{"pretrained": null}``.
        fractions: of the training items.
        overrides: keys that every run gets.
        models_dir, output_dir: as in the configs.
    """

    def __init__(
        self,
        config_file: Sequence[str],
        run_id: str,
        contenders: Mapping[str, Mapping[str, Any]],
        fractions: Sequence[float],
        overrides: Mapping[str, Any],
        models_dir: str,
        output_dir: str,
    ) -> None:
        self.config_file = [str(path) for path in config_file]
        self.run_id = run_id
        self.contenders = {name: dict(keys) for name, keys in contenders.items()}
        self.fractions = sorted(fractions)
        self.overrides = dict(overrides)
        self.models_dir = Path(models_dir)
        self.output_dir = Path(output_dir)
        for name, keys in list(self.contenders.items()):
            if keys.get("pretrained") and not Path(keys["pretrained"]).is_file():
                logger.warning(
                    f"pretrained {keys['pretrained']} DOES NOT EXIST: contender {name} is left out and nothing is "
                    "compared; run the pretrain bundle's demo first, or give the path of an encoder.pt"
                )
                del self.contenders[name]
        if not self.contenders:
            raise InputError("contenders has none whose pretrained file exists: give one, or one with pretrained null")

    def __call__(self) -> dict[str, Any]:
        """Run all, print the table, write it; returns what ``metrics.json`` holds."""
        found: dict[str, dict[str, Any]] = {}
        for fraction in self.fractions:
            for name, keys in self.contenders.items():
                label = f"{name}_{fraction:g}"
                print(f"--- {name} at {fraction:.0%} of the labels")
                keys = {
                    **self.overrides,
                    **keys,
                    "data_fraction": fraction,
                    "models_dir": str(self.models_dir / label),
                    "output_dir": str(self.output_dir / label),
                }
                # MONAI takes an override of None for none given
                keys = {key: "$None" if value is None else value for key, value in keys.items()}
                monai.bundle.run(self.run_id, config_file=self.config_file, **keys)
                gc.collect()
                found.setdefault(f"{fraction:g}", {})[name] = json.loads(
                    (self.output_dir / label / "metrics.json").read_text()
                )
        first, largest = next(iter(self.contenders)), self.fractions[-1]
        shutil.copy(self.models_dir / f"{first}_{largest:g}" / "model.pt", self.models_dir / "model.pt")

        metrics = {
            "seed": next(iter(found["%g" % largest].values()))["seed"],
            "dice": {fraction: {name: run["dice"] for name, run in runs.items()} for fraction, runs in found.items()},
            "difference": {fraction: self._differences(runs) for fraction, runs in found.items()},
        }
        (self.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        rows = self._rows(metrics)
        with open(self.output_dir / "metrics.csv", "w", newline="") as file:
            csv.writer(file).writerows([("fraction", "contender", "of", "dice", "interval"), *rows])
        figures.bars(
            {f"{float(fraction):.0%} of the labels": runs for fraction, runs in metrics["dice"].items()},
            "foreground Dice",
            self.output_dir / "comparison.png",
        )
        print_table(rows)
        print(f"tables and figures: {self.output_dir.resolve()}")
        return metrics

    @staticmethod
    def _differences(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        scans = {name: np.array(run["dice"]["per_scan"], dtype=float) for name, run in runs.items()}
        first, *others = scans
        return {f"{first} - {other}": interval(scans[first] - scans[other], runs[first]["seed"]) for other in others}

    @staticmethod
    def _rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
        rows = []
        for fraction, runs in metrics["dice"].items():
            for name, entry in runs.items():
                for of, e in [("foreground mean", entry), *entry["per_class"].items()]:
                    rows.append((fraction, name, of, f"{e['mean']:.3f}", f"{e['low']:.3f} to {e['high']:.3f}"))
            for name, e in metrics["difference"][fraction].items():
                rows.append((fraction, name, "paired", f"{e['mean']:+.3f}", f"{e['low']:+.3f} to {e['high']:+.3f}"))
        return rows
