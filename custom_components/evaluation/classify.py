"""What a probe can tell of held-out volumes, and how much of that is the pre-training's."""

from __future__ import annotations

import csv
import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from ignite.metrics import EpochMetric
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import ValidationHandler, from_engine
from monai.optimizers import WarmupCosineSchedule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from custom_components.errors import InputError
from custom_components.evaluation import figures
from custom_components.evaluation.controls import histogram_scores
from custom_components.evaluation.metrics import (
    accuracy,
    auroc_table,
    best_f1_thresholds,
    classification_metrics,
    mean_auroc,
    metric_rows,
    resample_patients,
)
from custom_components.evaluation.report import print_table
from custom_components.probe import ClassificationLoss, LinearProbe, probe_head
from custom_components.run.features import FeatureCache, FeatureDataset, FeatureLoader
from custom_components.run.handlers import ClipGradients, LastStep, OptimizerSteps
from custom_components.run.inferers import ReadableLoader
from custom_components.run.resume import KeepBest
from custom_components.run.weights import load_weights

logger = logging.getLogger(__name__)


@torch.inference_mode()
def predict(
    network: LinearProbe, dataset: Dataset, device: torch.device, amp: bool = True, num_workers: int = 0
) -> tuple[Tensor, list[Mapping[str, Any]], list[tuple[str, str]]]:
    """Logits of features or of volumes.

    Args:
        dataset: a :class:`custom_components.run.features.FeatureDataset`, of which the first view counts; or volumes.

    Returns:
        Logits ``[N, C]`` float32 on the CPU, the N items they belong to, and ``(name, reason)`` of unreadable volumes.
    """
    network.eval()
    if isinstance(dataset, FeatureDataset):
        return network.head(dataset.features[:, 0].to(device)).float().cpu(), dataset.data, dataset.failures
    loader = ReadableLoader(dataset, num_workers, "volumes")
    items = {item["name"]: item for item in dataset.data}
    logits, kept = [], []
    for batch in loader:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits.append(network(torch.as_tensor(batch["image"]).to(device)).float().cpu())
        kept.append(items[batch["name"][0]])
    if not kept:
        raise InputError(
            f"none of {len(dataset)} volumes could be read, the first for this reason: {loader.failures[0][1]}"
        )
    return torch.cat(logits), kept, loader.failures


class ProbeEvaluation:
    """Metrics of a probe on a list of volumes, with intervals, tables and curves.

    Writes to ``output_dir``: ``metrics.json`` and ``metrics.csv`` (see
    :func:`custom_components.evaluation.metrics.classification_metrics`), ``predictions.csv`` (per volume: labels and
    probabilities), ``roc_pr.png`` and, where classes exclude each other, ``confusion_matrix.png``.

    Args:
        network: the probe.
        dataset: features or volumes to test on.
        classes: what the labels mean.
        network_classes: what the logits mean; differs from ``classes`` in an external test.
        output_dir: see above.
        device: where the network is.
        valid_dataset: features or volumes of which the thresholds are chosen; None for 0.5 alone.
        merged_classes: class -> the network's classes that it stands for. Its probability is the largest of theirs,
            which needs no look at the labels; ``auroc_published`` reports the one of them whose AUROC is best on the
            test labels, as the authors do.
        checkpoint: weights to load first, None to take the network as it is.
        exclusive: whether exactly one class is true of a volume.
        amp: forward passes over volumes in bfloat16.
        num_workers: processes that read volumes.
        num_resamples, seed: of the bootstrap.

    Raises:
        InputError: a class is neither the network's nor merged of such.
    """

    def __init__(
        self,
        network: LinearProbe,
        dataset: Dataset,
        classes: Sequence[str],
        network_classes: Sequence[str],
        output_dir: str,
        device: torch.device,
        valid_dataset: Dataset | None = None,
        merged_classes: Mapping[str, Sequence[str]] | None = None,
        checkpoint: str | None = None,
        exclusive: bool = False,
        amp: bool = True,
        num_workers: int = 0,
        num_resamples: int = 1000,
        seed: int = 42,
    ) -> None:
        self.network = network
        self.dataset = dataset
        self.classes = list(classes)
        self.output_dir = Path(output_dir)
        self.device = device
        self.valid_dataset = valid_dataset
        self.checkpoint = checkpoint
        self.exclusive = exclusive
        self.amp = amp
        self.num_workers = num_workers
        self.num_resamples = num_resamples
        self.seed = seed
        names = list(network_classes)
        sources = {name: list((merged_classes or {}).get(name, [name])) for name in self.classes}
        unknown = [name for name, parts in sources.items() if not set(parts) <= set(names)]
        if unknown:
            raise InputError(
                f"{unknown[0]} is no class of the network ({', '.join(names)}): name those that it stands for in "
                "merged_classes"
            )
        self.sources = {name: [names.index(part) for part in parts] for name, parts in sources.items()}
        self.network_classes = names

    def __call__(self) -> dict[str, Any]:
        """Evaluate, print the table, write it and the figures; returns what ``metrics.json`` holds."""
        if self.checkpoint is not None:
            load_weights(self.network, self.checkpoint)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        probability_of_all, truth, items, failures = self._outputs(self.dataset)
        probability = self._merge(probability_of_all)
        thresholds, on_test = None, None
        if self.valid_dataset is not None:
            valid_probability, valid_truth, valid_items, _ = self._outputs(self.valid_dataset)
            thresholds = best_f1_thresholds(valid_truth, self._merge(valid_probability))
            on_test = bool({item["name"] for item in valid_items} & {item["name"] for item in items})
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
        if any(len(parts) > 1 for parts in self.sources.values()):
            metrics["auroc_published"] = self._published(truth, probability_of_all, patients)
        (self.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        rows = metric_rows(metrics)
        with open(self.output_dir / "metrics.csv", "w", newline="") as file:
            csv.writer(file).writerows([("class", "metric", "value", "low", "high"), *rows])
        self._write_predictions(items, truth, probability)
        figures.roc_and_pr_curves(truth, probability, self.classes, self.output_dir / "roc_pr.png")
        if self.exclusive:
            path = self.output_dir / "confusion_matrix.png"
            figures.confusion_matrix(metrics["confusion_matrix"], self.classes, path)
        self._print(metrics)
        return metrics

    def _outputs(self, dataset: Dataset) -> tuple[np.ndarray, np.ndarray, list, list]:
        """Probabilities of the network's classes ``[N, K]``, labels ``[N, C]``, items, failures."""
        logits, items, failures = predict(self.network, dataset, self.device, self.amp, self.num_workers)
        probability = logits.softmax(-1) if self.exclusive else logits.sigmoid()
        labels = np.stack([np.asarray(item["label"]) for item in items])
        truth = np.eye(len(self.classes))[labels] if self.exclusive else labels
        return probability.double().numpy(), truth, items, failures

    def _merge(self, probability: np.ndarray) -> np.ndarray:
        return np.stack([probability[:, parts].max(1) for parts in self.sources.values()], 1)

    def _published(self, truth: np.ndarray, probability: np.ndarray, patients: Sequence[str]) -> dict[str, Any]:
        """AUROCs where a merged class counts by its best part, chosen on these very labels."""
        weights = resample_patients(patients, self.num_resamples, self.seed)
        chosen, parts_of = [], {}
        for c, (name, parts) in enumerate(self.sources.items()):
            names = [self.network_classes[part] for part in parts]
            column = np.repeat(truth[:, [c]], len(parts), 1)
            entries = auroc_table(column, probability[:, parts], names, weights)[0]["per_class"]
            best = max(entries, key=lambda part: entries[part]["value"], default=names[0])
            chosen.append(self.network_classes.index(best))
            if len(parts) > 1:
                parts_of[name] = entries
        table = auroc_table(truth, probability[:, chosen], self.classes, weights)[0]
        return {"parts": parts_of, **table}

    def _write_predictions(self, items: Sequence[Mapping], truth: np.ndarray, probability: np.ndarray) -> None:
        frame = pd.DataFrame({"name": [item["name"] for item in items], "patient": [item["patient"] for item in items]})
        for c, name in enumerate(self.classes):
            frame[f"{name} (label)"] = truth[:, c].astype(int)
            frame[name] = probability[:, c]
        frame.to_csv(self.output_dir / "predictions.csv", index=False)

    def _print(self, metrics: Mapping[str, Any]) -> None:
        shown = ("auroc", "average_precision", "f1", "f1_at_threshold")
        rows = [("class", "positive", *shown)]
        for name, entry in (metrics["per_class"] | {"macro": metrics["macro"], "micro": metrics["micro"]}).items():
            rows.append((name, str(entry.get("positive", "")), *(_text(entry.get(metric)) for metric in shown)))
        print_table(rows)
        if self.exclusive:
            print(f"accuracy {_text(metrics['accuracy'])}")
        if "auroc_published" in metrics:
            published = metrics["auroc_published"]
            print(f"mean AUROC, best part of merged classes chosen on test labels: {published['mean']:.3f}")
        if metrics["left_out"]:
            print(f"left out of every mean, since the list has a single label value: {', '.join(metrics['left_out'])}")
        print(f"tables and figures: {self.output_dir.resolve()}")


def _text(entry: Mapping[str, float | None] | None) -> str:
    if entry is None or entry["value"] is None:
        return ""
    if entry["low"] is None:
        return f"{entry['value']:.3f}"
    return f"{entry['value']:.3f} ({entry['low']:.3f} to {entry['high']:.3f})"


def fit_head(
    train: FeatureDataset,
    valid: FeatureDataset,
    num_classes: int,
    max_steps: int,
    batch_size: int,
    learning_rate: float,
    warmup_steps: int,
    weight_decay: float,
    max_norm: float,
    patience: int | None,
    exclusive: bool = False,
    seed: int = 42,
) -> nn.Linear:
    """The linear layer of a probe, trained on features by the recipe of the bundle's ``train.json``; the best one."""
    torch.manual_seed(seed)
    head = probe_head(train.features.shape[-1], num_classes)
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=weight_decay)
    scheduler = WarmupCosineSchedule(optimizer, warmup_steps, max_steps)
    device = torch.device("cpu")
    metric = EpochMetric(accuracy if exclusive else mean_auroc, from_engine(["pred", "label"]), False)
    validator = SupervisedEvaluator(
        device,
        DataLoader(valid, len(valid)),
        head,
        key_val_metric={"score": metric},
        decollate=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        best = KeepBest(head, validator, "score", f"{folder}/head.pt", patience)
        loader = FeatureLoader(train, batch_size, seed)
        trainer = SupervisedTrainer(
            device,
            max_epochs=-(-max_steps // len(loader)),
            train_data_loader=loader,
            network=head,
            optimizer=optimizer,
            loss_function=ClassificationLoss(num_classes, exclusive),
            train_handlers=[
                LastStep(max_steps),
                ClipGradients(head, max_norm),
                OptimizerSteps(scheduler),
                best,
                ValidationHandler(1, validator),
            ],
            decollate=False,
        )
        trainer.run()
        best.restore()
    return head


class ProbeComparison:
    """Probes on several encoders, and a logistic regression on HU histograms, at several shares of the labels.

    Adds ``auroc`` to ``metrics.json`` in ``output_dir``: fraction -> contender -> ``mean``, ``low``, ``high``,
    ``per_class``, ``left_out``; and ``auroc_gain``: fraction -> ``simcrop`` minus each other contender, paired over the
    same bootstrap resamples. Writes the table as ``auroc.csv``.

    Args:
        encoders: contender -> its cache of features; ``simcrop`` first.
        histogram: cache of :class:`HuHistogram`.
        datalist: called with ``split`` and ``data_fraction``, returns items.
        fractions: shares of the training data.
        classes: names.
        num_views: views per training volume.
        output_dir: of ``metrics.json``.
        recipe: further arguments of :func:`fit_head`.
        num_resamples, seed: of the bootstrap.
    """

    def __init__(
        self,
        encoders: Mapping[str, FeatureCache],
        histogram: FeatureCache,
        datalist: Callable[..., list[dict]],
        fractions: Sequence[float],
        classes: Sequence[str],
        num_views: int,
        output_dir: str,
        recipe: Mapping[str, Any],
        num_resamples: int = 1000,
        seed: int = 42,
    ) -> None:
        self.encoders = dict(encoders)
        self.histogram = histogram
        self.datalist = datalist
        self.fractions = list(fractions)
        self.classes = list(classes)
        self.num_views = num_views
        self.output_dir = Path(output_dir)
        self.recipe = dict(recipe)
        self.num_resamples = num_resamples
        self.seed = seed

    def __call__(self) -> dict[str, Any]:
        """Compare, print the table, write it; returns what ``auroc`` of ``metrics.json`` holds."""
        scores: dict[str, dict[str, np.ndarray]] = {str(fraction): {} for fraction in self.fractions}
        valid, test = self.datalist(split="valid"), self.datalist(split="test")
        for contender, cache in {**self.encoders, "hu_histogram": self.histogram}.items():
            views = self.num_views if contender in self.encoders else 1
            test_features = cache.encode(test, 1, f"{contender}: test")
            valid_features = cache.encode(valid, 1, f"{contender}: validation")
            for fraction in self.fractions:
                train = self.datalist(split="train", data_fraction=fraction)
                features = cache.encode(train, views, f"{contender}: training at {fraction:.0%}")
                if contender in self.encoders:
                    head = fit_head(features, valid_features, len(self.classes), seed=self.seed, **self.recipe)
                    with torch.inference_mode():
                        score = head(test_features.features[:, 0]).numpy()
                else:
                    score = self._histogram_scores(features, test_features)
                scores[str(fraction)][contender] = score
        return self._tell(scores, test_features)

    def _histogram_scores(self, train: FeatureDataset, test: FeatureDataset) -> np.ndarray:
        """``[N, C]``; zeros for a class with a single label value in training."""
        scores = np.zeros((len(test), len(self.classes)))
        for c in range(len(self.classes)):
            labels = train.labels[:, c].numpy()
            if len(np.unique(labels)) == 2:
                scores[:, c] = histogram_scores(train.features[:, 0].numpy(), labels, test.features[:, 0].numpy())
        return scores

    def _tell(self, scores: Mapping[str, Mapping[str, np.ndarray]], test: FeatureDataset) -> dict[str, Any]:
        weights = resample_patients([item["patient"] for item in test.data], self.num_resamples, self.seed)
        truth = test.labels.numpy()
        table: dict[str, Any] = {}
        gains: dict[str, Any] = {}
        for fraction, contenders in scores.items():
            tables = {name: auroc_table(truth, score, self.classes, weights) for name, score in contenders.items()}
            table[fraction] = {name: entry for name, (entry, _) in tables.items()}
            first, resampled = tables["simcrop"]
            gains[fraction] = {}
            for name, (entry, other) in tables.items():
                if name != "simcrop" and first["mean"] is not None:
                    low, high = np.percentile(resampled - other, [2.5, 97.5])
                    gain = {"value": first["mean"] - entry["mean"], "low": float(low), "high": float(high)}
                    gains[fraction][name] = gain
        path = self.output_dir / "metrics.json"
        metrics = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(metrics | {"auroc": table, "auroc_gain": gains}, indent=2) + "\n")

        contenders = list(next(iter(scores.values())))
        rows = [("labels", "class", *contenders)]
        for fraction, entries in table.items():
            for name in entries["simcrop"]["per_class"]:
                rows.append((fraction, name, *(_text(entries[c]["per_class"][name]) for c in contenders)))
            means = (
                {"value": entries[c]["mean"], "low": entries[c]["low"], "high": entries[c]["high"]} for c in contenders
            )
            rows.append((fraction, "mean", *(_text(mean) for mean in means)))
        with open(self.output_dir / "auroc.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)
        print_table(rows)
        for fraction, entries in gains.items():
            for name, gain in entries.items():
                print(f"{fraction} of the labels: mean AUROC of simcrop minus {name}: {_text(gain)}")
        left_out = table[str(self.fractions[0])]["simcrop"]["left_out"]
        if left_out:
            print(f"left out, since the test list has a single label value: {', '.join(left_out)}")
        return table
