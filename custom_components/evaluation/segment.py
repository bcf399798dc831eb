"""What a segmentation is worth: Dice, HD95 and surface Dice of scans, with intervals, and contenders side by side."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from custom_components.data.save import argmax_labels, labels_in_scan
from custom_components.errors import InputError, none_read, tell_left_out
from custom_components.evaluation import figures
from custom_components.evaluation.figures import spacing_of
from custom_components.evaluation.metrics import difference_interval, mean_interval, mean_of_defined
from custom_components.evaluation.report import read_metrics, write_report
from custom_components.run.inferers import ReadableLoader
from monai.data import Dataset, decollate_batch
from monai.inferers import Inferer
from monai.metrics import DiceMetric, compute_hausdorff_distance, compute_surface_dice
from monai.networks import eval_mode
from monai.transforms import generate_spatial_bounding_box
from torch import Tensor, nn

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

    A scan that cannot be read is passed over, and told at the end.

    Writes ``metrics.json``, ``metrics.csv`` (a row per scan and class), ``box_plots.png`` and ``contours.png``.

    Args:
        network, inferer: give logits ``[1, C, x, y, z]`` of an image ``[1, 1, x, y, z]``.
        dataset: items with ``image``, preprocessed, and ``label`` as it was read, on the scan's own grid.
        classes: names of classes 1, 2, ...
        groups: name -> classes whose mean over a scan is reported too.
        tolerance: of surface Dice, mm.
        num_figures: scans that are drawn, the first ones.

    Raises:
        InputError: ``groups`` names a class that is not in ``classes``.
    """

    network: nn.Module
    inferer: Inferer
    dataset: Dataset
    classes: Sequence[str]
    output_dir: str | Path
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    tolerance: float = 2.0
    seed: int = 42
    num_figures: int = 3

    def __post_init__(self) -> None:
        if unknown := sorted({name for group in self.groups.values() for name in group} - set(self.classes)):
            raise InputError(f"class_groups names {', '.join(unknown)}: choose of classes, {', '.join(self.classes)}")

    @torch.inference_mode()
    def __call__(self) -> dict[str, Any]:
        """Evaluate, print the table, write it and the figures; returns what ``metrics.json`` holds.

        Raises:
            InputError: no scan could be read; or some could not, once all else is done.
        """
        device = next(self.network.parameters()).device
        scores: dict[str, dict[str, list[float]]] = {}
        rows = []
        loader = ReadableLoader(self.dataset, description="held-out scans")
        with eval_mode(self.network):
            for batch in loader:
                (item,) = decollate_batch(batch)
                image, truth = item["image"], item["label"]
                logits = self.inferer(image.as_tensor()[None].to(device), self.network)[0]
                pred, _ = labels_in_scan(logits, image.affine, truth.affine, truth.shape[1:])
                scores[item["name"]] = scan_scores(
                    pred, truth.as_tensor()[0], spacing_of(truth), len(self.classes) + 1, self.tolerance
                )
                if len(rows) < self.num_figures:
                    rows.append(self._row(item, logits, scores[item["name"]]["dice"]))
        if not scores:
            raise none_read(len(self.dataset), loader.failures)

        # a scan that could not be read keeps its place, by which two evaluations are compared
        unknown = dict.fromkeys(METRICS, [math.nan] * (len(self.classes) + 1))
        of_all = [scores.get(item["name"], unknown) for item in self.dataset.data]
        values = {name: np.array([score[name] for score in of_all]) for name in METRICS}
        unreadable = [name for name, _ in loader.failures]
        metrics = {"seed": self.seed, "scans": len(scores), "unreadable": unreadable, **self._metrics(values)}
        write_report(self.output_dir, metrics, self._rows(scores), table_rows(metrics))
        panels = {
            title.format(self.tolerance): dict(zip(self.classes, values[name].T[1:], strict=True))
            for name, title in METRICS.items()
        }
        figures.save(Path(self.output_dir, "box_plots.png"), figures.box_plots, panels)
        figures.save(Path(self.output_dir, "contours.png"), figures.contours, rows, self.classes)
        tell_left_out(loader.failures)
        return metrics

    def _row(self, item: Mapping[str, Any], logits: Tensor, dice: Sequence[float]) -> dict[str, Any]:
        """One row of the contour figure, on the network's grid."""
        image, label = item["image"], item["label"]
        as_classes = torch.stack([label.as_tensor()[0] == k for k in range(len(self.classes) + 1)])
        truth, _ = labels_in_scan(as_classes, label.affine, image.affine, image.shape[1:])
        foreground = mean_of_defined(np.array([dice[1:]]))[0]
        title = f"{item['name']}: Dice {foreground:.3f}"
        pred = argmax_labels(logits.cpu())
        row = {"image": image[0].cpu(), "pred": pred, "truth": truth, "spacing": spacing_of(image), "title": title}
        return row | {"affine": image.affine.cpu().numpy()}

    def _metrics(self, scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
        metrics: dict[str, Any] = {}
        for name, values in scores.items():
            of_class = dict(zip(self.classes, values.T[1:], strict=True))
            of_group = {
                group: mean_of_defined(np.stack([of_class[c] for c in classes], 1))
                for group, classes in self.groups.items()
            }
            metrics[name] = self._entry(mean_of_defined(values[:, 1:]))
            metrics[name]["groups"] = {group: self._entry(found) for group, found in of_group.items()}
            metrics[name]["per_class"] = {c: self._entry(found) for c, found in of_class.items()}
            if name == "dice":
                metrics[name]["with_background"] = mean_interval(mean_of_defined(values), self.seed)
        metrics["surface_dice"]["tolerance_mm"] = self.tolerance
        return metrics

    def _entry(self, values: np.ndarray) -> dict[str, Any]:
        """Mean with its interval, and ``per_scan``, in the dataset's order, by which two evaluations are compared."""
        per_scan = [None if math.isnan(value) else value for value in values.tolist()]
        return {**mean_interval(values, self.seed), "per_scan": per_scan}

    def _rows(self, scores: Mapping[str, Mapping[str, Sequence[float]]]) -> list[Sequence[Any]]:
        """What ``metrics.csv`` holds."""
        rows: list[Sequence[Any]] = [("scan", "class", "dice", "hd95_mm", "surface_dice")]
        for name, scan in scores.items():
            for c, *values in zip(["background", *self.classes], *scan.values(), strict=True):
                rows.append([name, c, *("" if math.isnan(value) else round(value, 5) for value in values)])
        return rows


def _entries(metric: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What a metric is given of: the whole foreground, groups of classes, single classes."""
    groups = {f"{name} mean": entry for name, entry in metric["groups"].items()}
    return {"foreground mean": metric, **groups, **metric["per_class"]}


def table_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The metrics as rows of text: metric, class, mean, and its interval with the number of scans."""
    rows = []
    for name in METRICS:
        entries = _entries(metrics[name])
        if "with_background" in metrics[name]:
            entries["with background"] = metrics[name]["with_background"]
        for of, e in entries.items():
            if e["mean"] is None:
                rows.append((name, of, "-", "not defined in any scan"))
            else:
                interval = f"{e['low']:.3f} to {e['high']:.3f}, {e['scans']} scans"
                rows.append((name, of, f"{e['mean']:.3f}", interval))
    return rows


def compare_dice(
    runs: Mapping[float, Mapping[str, Path]],
    output_dir: str | Path,
    tuning: Mapping[float, Mapping[str, Mapping[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Dice of networks side by side, for :class:`custom_components.evaluation.compare.Comparison`.

    Writes ``metrics.json``, whose content it returns: ``dice`` by fraction and contender (``mean``, ``low``, ``high``,
    ``groups``, ``per_class``); ``difference`` of the first contender to each other by fraction, of the foreground, each
    group and each class, paired over scans; ``tuning``; also ``metrics.csv`` and ``comparison.png``.

    Args:
        runs: fraction -> contender -> folder with its ``metrics.json``, all of the same scans.
        tuning: fraction -> contender -> ``learning_rate`` that was chosen, and ``validation``, rate -> what it was
            chosen by.
    """
    metrics: dict[str, Any] = {"seed": None, "dice": {}, "difference": {}, "tuning": {}}
    rows = [("fraction", "contender", "of", "dice", "interval")]
    notes = []
    for fraction, folders in runs.items():
        found = {name: read_metrics(folder) for name, folder in folders.items()}
        dice = {name: run["dice"] for name, run in found.items()}
        first, *others = dice
        for other in others:
            if (of_other := found[other].get("unreadable")) != (of_first := found[first].get("unreadable")):
                raise InputError(
                    f"{folders[other]}: its evaluation could not read {of_other or 'nothing'}, that of {first} "
                    f"{of_first or 'nothing'}, so they cannot be compared: start the same command again"
                )
        seed = metrics["seed"] = found[first]["seed"]
        entries = {name: _entries(entry) for name, entry in dice.items()}
        differences = {
            f"{first} - {other}": {
                of: difference_interval(*(_per_scan(entries[name][of]) for name in (first, other)), seed)
                for of in entries[first]
            }
            for other in others
        }
        metrics["dice"][f"{fraction:g}"], metrics["difference"][f"{fraction:g}"] = dice, differences
        for name, of_entry in (entries | differences).items():
            sign = "+" if name in differences else ""
            for of, e in of_entry.items():
                if e["mean"] is None:
                    rows.append((f"{fraction:g}", name, of, "-", "not defined in any scan"))
                else:
                    values = (f"{e[part]:{sign}.3f}" for part in ("mean", "low", "high"))
                    rows.append((f"{fraction:g}", name, of, next(values), " to ".join(values)))
        for name, choice in (tuning or {}).get(fraction, {}).items():
            metrics["tuning"].setdefault(f"{fraction:g}", {})[name] = choice
            values = ", ".join(f"{rate} {value:.3f}" for rate, value in choice["validation"].items())
            notes.append(f"{name} at {fraction:g}: learning rate {choice['learning_rate']:g}, of validation {values}")
    write_report(output_dir, metrics, rows, rows[1:], notes)
    groups = {
        f"{of} at {float(fraction):.0%} of the labels": {name: _entries(entry)[of] for name, entry in dice.items()}
        for fraction, dice in metrics["dice"].items()
        for of in _entries(next(iter(dice.values())))
        if of.endswith(" mean")
    }
    figures.save(Path(output_dir, "comparison.png"), figures.bars, groups, "Dice")
    return metrics


def _per_scan(entry: Mapping[str, Any]) -> np.ndarray:
    return np.array(entry["per_scan"], dtype=float)
