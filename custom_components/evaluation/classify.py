"""How well a probe classifies held-out volumes, and how much of that pre-training gives."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from custom_components.errors import InputError, none_read, tell_left_out
from custom_components.evaluation import figures
from custom_components.evaluation.metrics import (
    auroc_table,
    best_f1_thresholds,
    classification_metrics,
    entry,
    metric_rows,
    resample,
)
from custom_components.evaluation.report import LABEL, read_metrics, write_predictions, write_report
from custom_components.probe import LinearProbe
from custom_components.run.features import FeatureDataset
from custom_components.run.inferers import AutocastInferer, ReadableLoader
from custom_components.run.weights import load_weights
from torch import Tensor
from torch.utils.data import Dataset

logger = logging.getLogger(__name__)

FEW = 10  # volumes, of which a bootstrap draws intervals that are too narrow


@dataclass
class ProbeEvaluation:
    """Metrics of a probe on a list of volumes, with intervals, tables and curves.

    Writes to ``output_dir``: ``metrics.json`` and ``metrics.csv`` (see :func:`classification_metrics`),
    ``predictions.csv`` (a row per volume: labels and probabilities), ``roc_pr.png`` and, where classes exclude each
    other, ``confusion_matrix.png``.

    Args:
        classes: what the labels mean.
        network_classes: what the logits mean; differs from ``classes`` in an external test.
        valid_dataset: features or volumes of which the thresholds are chosen; None for 0.5 alone.
        merged_classes: class -> the network's classes that it stands for. Its probability is the largest of theirs,
            which needs no look at the labels; ``auroc_published`` reports the one of them whose AUROC is best on the
            test labels, as the authors do.
        checkpoint: weights to load first; None to take the network as it is.
        exclusive: whether exactly one class is true of a volume.
        timeout_minutes: see :class:`custom_components.run.seeded.WatchedDataLoader`.

    Raises:
        InputError: a class is neither the network's nor merged of such.
    """

    network: LinearProbe
    dataset: Dataset
    classes: Sequence[str]
    network_classes: Sequence[str]
    output_dir: str | Path
    device: torch.device
    valid_dataset: Dataset | None = None
    merged_classes: Mapping[str, Sequence[str]] | None = None
    checkpoint: str | None = None
    exclusive: bool = False
    amp: bool = True
    num_workers: int = 0
    num_resamples: int = 1000
    seed: int = 42
    timeout_minutes: float | None = None

    def __post_init__(self) -> None:
        self.failures: list[tuple[str, str]] = []
        self.parts = {name: list((self.merged_classes or {}).get(name, [name])) for name in self.classes}
        unknown = [name for name, parts in self.parts.items() if not set(parts) <= set(self.network_classes)]
        if unknown:
            raise InputError(
                f"{unknown[0]} is no class of the network ({', '.join(self.network_classes)}): name those that it "
                "stands for in merged_classes"
            )

    def __call__(self) -> dict[str, Any]:
        """Evaluate, print the table, write it and the figures; returns what ``metrics.json`` holds."""
        if self.checkpoint is not None:
            load_weights(self.network, self.checkpoint)
        probability_of_all, truth, items, failures = self._outputs(self.dataset)
        probability = self._merge(probability_of_all)
        thresholds, on_test, valid_failures = None, None, []
        if self.valid_dataset is not None:
            valid_probability, valid_truth, valid_items, valid_failures = self._outputs(self.valid_dataset)
            thresholds = best_f1_thresholds(valid_truth, self._merge(valid_probability))
            on_test = not {item["name"] for item in valid_items}.isdisjoint(item["name"] for item in items)
            if on_test:
                logger.warning(
                    "validation and test share volumes: the probe and its thresholds were selected by looking at the "
                    "test labels, as the published lists have it; set validation_share to hold volumes out"
                )
        patients = [item["patient"] for item in items]
        metrics = {
            "seed": self.seed,
            "classes": self.classes,
            "selected_on_test": on_test,
            "unreadable": [name for name, _ in failures],
            **classification_metrics(
                truth, probability, self.classes, patients, thresholds, self.exclusive, self.num_resamples, self.seed
            ),
        }
        if any(len(parts) > 1 for parts in self.parts.values()):
            metrics["auroc_published"] = self._published(truth, probability_of_all, patients)
        rows = [("class", "metric", "value", "low", "high"), *metric_rows(metrics)]
        folder = Path(self.output_dir)
        write_predictions(folder / "predictions.csv", items, self.classes, truth, probability)
        write_report(self.output_dir, metrics, rows, *_table(metrics))
        figures.save(
            folder / "roc_pr.png", figures.roc_and_pr_curves, truth, probability, self.classes, metrics["per_class"]
        )
        if self.exclusive:
            matrix = metrics["confusion_matrix"]
            figures.save(folder / "confusion_matrix.png", figures.confusion_matrix, matrix, self.classes)
        if not isinstance(self.dataset, FeatureDataset):
            self.failures = [*valid_failures, *failures]
        return metrics

    def report(self) -> None:
        """Raise an :class:`InputError` that lists what could not be read; of cached features, the cache tells that."""
        tell_left_out(self.failures)

    def _outputs(self, dataset: Dataset) -> tuple[pd.DataFrame, np.ndarray, list, list]:
        """Probabilities, a column per class of the network; labels ``[N, C]``; items; failures."""
        logits, items, failures = self._logits(dataset)
        probability = logits.softmax(-1) if self.exclusive else logits.sigmoid()
        labels = np.stack([np.asarray(item["label"]) for item in items])
        truth = np.eye(len(self.classes))[labels] if self.exclusive else labels
        return pd.DataFrame(probability.double().numpy(), columns=self.network_classes), truth, items, failures

    @torch.inference_mode()
    def _logits(self, dataset: Dataset) -> tuple[Tensor, list, list]:
        """Logits ``[N, K]`` float32 on the CPU, the N items they are of, ``(name, reason)`` of unreadable volumes."""
        self.network.eval()
        if isinstance(dataset, FeatureDataset):  # its first view counts
            logits = self.network.head(dataset.features[:, 0].to(self.device))
            return logits.float().cpu(), dataset.data, dataset.failures
        loader, forward = (
            ReadableLoader(dataset, self.num_workers, "volumes", self.timeout_minutes),
            AutocastInferer(self.amp),
        )
        items = {item["name"]: item for item in dataset.data}
        logits, kept = [], []
        for batch in loader:
            logits.append(forward(torch.as_tensor(batch["image"]).to(self.device), self.network).cpu())
            kept.append(items[batch["name"][0]])
        if not kept:
            raise none_read(len(dataset), loader.failures)
        return torch.cat(logits), kept, loader.failures

    def _merge(self, probability: pd.DataFrame) -> np.ndarray:
        return np.stack([probability[parts].to_numpy().max(1) for parts in self.parts.values()], 1)

    def _published(self, truth: np.ndarray, probability: pd.DataFrame, patients: Sequence[str]) -> dict[str, Any]:
        """AUROCs where a merged class counts by its best part, chosen on these very labels."""
        weights = resample(patients, self.num_resamples, self.seed)
        chosen, parts_of = [], {}
        for labels, (name, parts) in zip(truth.T, self.parts.items(), strict=True):
            column = np.repeat(labels[:, None], len(parts), 1)
            entries = auroc_table(column, probability[parts].to_numpy(), parts, weights)[0]["per_class"]
            chosen.append(max(entries, key=lambda part: entries[part]["value"], default=parts[0]))
            if len(parts) > 1:
                parts_of[name] = entries
        table = auroc_table(truth, probability[chosen].to_numpy(), self.classes, weights)[0]
        return {"parts": parts_of, **table}


def _table(metrics: Mapping[str, Any]) -> tuple[list[tuple[str, ...]], list[str]]:
    """What is printed of ``metrics.json``: rows of text, and lines below them."""
    shown = ("auroc", "average_precision", "f1", "f1_at_threshold")
    table = [("class", "positive", *shown)]
    for name, found in (metrics["per_class"] | {"macro": metrics["macro"], "micro": metrics["micro"]}).items():
        table.append((name, str(found.get("positive", "")), *(_text(found.get(metric)) for metric in shown)))
    notes = []
    if "accuracy" in metrics:
        notes.append(f"accuracy {_text(metrics['accuracy'])}")
    if "auroc_published" in metrics:
        mean = metrics["auroc_published"]["mean"]
        notes.append(f"mean AUROC, best part of merged classes chosen on test labels: {mean:.3f}")
    sizes = {name: found["positive"] for name, found in metrics["per_class"].items()}
    if few := ", ".join(name for name, n in sizes.items() if min(n, metrics["volumes"] - n) < FEW):
        notes.append(f"fewer than {FEW} volumes with it or without, so that its interval says little: {few}")
    if left_out := ", ".join(metrics["left_out"]):
        notes.append(f"left out of every mean, since the list has a single label value: {left_out}")
    return table, notes


def _text(found: Mapping[str, float | None] | None) -> str:
    if found is None or found["value"] is None:
        return ""
    interval = "" if found["low"] is None else f" ({found['low']:.3f} to {found['high']:.3f})"
    return f"{found['value']:.3f}{interval}"


def compare_auroc(
    runs: Mapping[float, Mapping[str, Path]], output_dir: str | Path, num_resamples: int = 1000, seed: int = 42
) -> dict[str, Any]:
    """AUROC of probes side by side, for :class:`custom_components.evaluation.compare.Comparison`.

    Writes ``auroc.csv``, and adds to ``metrics.json`` in ``output_dir``: ``auroc``, which it returns, fraction ->
    contender -> :func:`auroc_table`; ``auroc_gain``, fraction -> first contender minus each other, by equal resamples.

    Args:
        runs: fraction -> contender -> folder with its ``predictions.csv``, all of the same volumes.
    """
    auroc, gains = {}, {}
    first, *others = next(iter(runs.values()))
    rows, notes = [("labels", "class", first, *others)], []
    for fraction, folders in runs.items():
        tables = {name: _auroc_of(folder, num_resamples, seed) for name, folder in folders.items()}
        entries = auroc[str(fraction)] = {name: table for name, (table, _) in tables.items()}
        for name in entries[first]["per_class"]:
            rows.append((str(fraction), name, *(_text(table["per_class"][name]) for table in entries.values())))
        rows.append((str(fraction), "mean", *(_text({**table, "value": table["mean"]}) for table in entries.values())))
        gains[str(fraction)] = {}
        for other in others if entries[first]["per_class"] else ():
            (own, own_means), (control, control_means) = tables[first], tables[other]
            gain = gains[str(fraction)][other] = entry(own["mean"] - control["mean"], own_means - control_means)
            notes.append(f"{fraction} of the labels: mean AUROC of {first} minus {other}: {_text(gain)}")
    if entries[first]["left_out"]:
        notes.append(f"left out, since the test list has a single label value: {', '.join(entries[first]['left_out'])}")
    metrics = read_metrics(output_dir) | {"auroc": auroc, "auroc_gain": gains}
    write_report(output_dir, metrics, rows, rows, notes, "auroc.csv")
    return auroc


def _auroc_of(folder: Path, num_resamples: int, seed: int) -> tuple[dict[str, Any], np.ndarray]:
    """:func:`auroc_table` of the ``predictions.csv`` of a run."""
    # a patient may be called NA
    options = {"dtype": {"patient": str}, "keep_default_na": False, "na_values": [""]}
    predictions = pd.read_csv(folder / "predictions.csv", **options)
    classes = [column.removesuffix(LABEL) for column in predictions if column.endswith(LABEL)]
    truth = predictions[[name + LABEL for name in classes]].to_numpy()
    weights = resample(predictions["patient"], num_resamples, seed)
    return auroc_table(truth, predictions[classes].to_numpy(), classes, weights)
