"""Metrics with bootstrap intervals.

Intervals need each metric a thousand times, which would take scikit-learn minutes, so all resamples are computed at
once, as weights: a patient drawn twice counts twice.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from custom_components.errors import InputError
from sklearn.metrics import average_precision_score, confusion_matrix, precision_recall_curve, roc_auc_score
from torch import Tensor

CHUNK = 50  # resamples per pass over all volumes and classes: bounds memory


def both_values(labels: np.ndarray) -> np.ndarray:
    """Which columns of ``labels [N, C]`` hold zeros and ones: bool ``[C]``."""
    return np.ptp(labels, axis=0) > 0


def mean_auroc(logits: Tensor, labels: Tensor) -> float:
    """Mean AUROC over the classes that have both label values, of ``[N, C]`` or ``[N]``; what a probe is selected by.

    Raises:
        InputError: no class has both values.
    """
    scores, truth = (part.float().reshape(len(part), -1).numpy() for part in (logits, labels))
    both = both_values(truth)
    if not both.any():
        raise InputError(
            f"no class has both label values among the {len(truth)} validation volumes, so none has an AUROC: "
            "give a longer validation list, or raise validation_share"
        )
    return float(roc_auc_score(truth[:, both], scores[:, both]))


def check_selection(data: Sequence[Mapping[str, Any]], select_by: str) -> None:
    """Make sure, before a volume is read, that validation items with ``label`` have the metric of ``select_by``.

    Raises:
        InputError: as :func:`mean_auroc` and :func:`selection_metric`; classes that exclude each other have no AUROC,
            and others no accuracy.
    """
    labels = torch.stack([torch.as_tensor(item["label"]) for item in data])
    if selection_metric(select_by) is mean_auroc:
        if labels.ndim == 1:
            raise InputError("select_by is auroc, and the classes exclude each other: set select_by to accuracy")
        mean_auroc(torch.zeros(labels.shape), labels)
    elif labels.ndim > 1:
        raise InputError(
            "select_by is accuracy, and the classes do not exclude each other: set select_by to auroc, or exclusive to "
            "true"
        )


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of volumes whose largest logit (``[N, C]``) is that of their class (``[N]``)."""
    return (logits.argmax(-1) == labels).float().mean().item()


def selection_metric(name: str) -> Callable[[Tensor, Tensor], float]:
    """What the key ``select_by`` names: ``auroc``, or ``accuracy`` for classes that exclude each other."""
    metrics = {"auroc": mean_auroc, "accuracy": accuracy}
    if name not in metrics:
        raise InputError(f"select_by is {name!r}: give auroc, or accuracy where exclusive is true")
    return metrics[name]


def best_f1_thresholds(truth: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Per class of ``[N, C]`` the threshold of highest F1, ``[C]``, from which up a volume counts as positive; 0.5
    where a class has one label value only."""
    thresholds = np.full(truth.shape[1], 0.5)
    for c in np.flatnonzero(both_values(truth)):
        precision, recall, values = precision_recall_curve(truth[:, c], probability[:, c])
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        thresholds[c] = values[f1[:-1].argmax()]
    return thresholds


def resample(units: Sequence[Any], num_resamples: int, seed: int) -> np.ndarray:
    """How often each of N observations counts in each bootstrap resample of their N ``units``, patients or scans, which
    keep what is theirs together: ``[R, N]`` float64."""
    names, owner = np.unique(np.asarray(units), return_inverse=True)
    draws = np.random.RandomState(seed).randint(len(names), size=(num_resamples, len(names)))
    counts = np.stack([np.bincount(draw, minlength=len(names)) for draw in draws])
    return counts[:, owner].astype(np.float64)


def mean_of_defined(scores: np.ndarray) -> np.ndarray:
    """Mean over classes, ``[N, C]`` -> ``[N]``, of what is not NaN; NaN where no class is defined."""
    return np.ma.masked_invalid(scores).mean(1).filled(np.nan)


def interval(values: np.ndarray) -> dict[str, float | None]:
    """95 % percentile interval of a metric's values over resamples; None where no resample gives one."""
    values = values[np.isfinite(values)]
    low, high = np.percentile(values, [2.5, 97.5]).tolist() if len(values) else (None, None)
    return {"low": low, "high": high}


def mean_interval(values: np.ndarray, seed: int, num_resamples: int = 2000) -> dict[str, Any]:
    """Mean over the ``scans`` whose value is not NaN: that number, ``mean``, ``low`` and ``high`` (None if all are)."""
    values = values[np.isfinite(values)]
    if not len(values):
        return {"mean": None, "low": None, "high": None, "scans": 0}
    means = resample(range(len(values)), num_resamples, seed) @ values / len(values)
    return {"mean": float(values.mean()), **interval(means), "scans": len(values)}


def difference_interval(first: np.ndarray, other: np.ndarray, seed: int, num_resamples: int = 2000) -> dict[str, Any]:
    """:func:`mean_interval` of ``first`` minus that of ``other``, values ``[N]`` of the same scans, drawn together.

    Each mean is over its own values that are not NaN, as in a table of both: two networks may differ in where a
    class is defined, since it is where one of them invents it. ``scans`` have a value of either.
    """
    weights = resample(range(len(first)), num_resamples, seed)
    sides = [(np.isfinite(values), np.nan_to_num(values)) for values in (first, other)]

    def difference(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            first, other = (weights @ values / (weights @ defined) for defined, values in sides)
        return first - other

    mean = difference(np.ones((1, len(first))))[0]
    scans = int((sides[0][0] | sides[1][0]).sum())
    return {"mean": float(mean) if np.isfinite(mean) else None, **interval(difference(weights)), "scans": scans}


def weighted_auroc(truth: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROC of ``score [N]`` for ``truth [N]`` by each row of ``weights [R, N]``; NaN where a label has no weight."""
    positive, negative = _by_score(truth, score, weights)
    below = negative.cumsum(1) - negative
    with np.errstate(invalid="ignore"):
        return (positive * (below + negative / 2)).sum(1) / (positive.sum(1) * negative.sum(1))


def weighted_average_precision(truth: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average precision, as :func:`weighted_auroc`; NaN where no positive has weight."""
    positive, negative = (part[:, ::-1] for part in _by_score(truth, score, weights))
    found, wrong = positive.cumsum(1), negative.cumsum(1)
    with np.errstate(invalid="ignore"):
        precision = np.where(found + wrong > 0, found / (found + wrong), 0.0)
        return (positive * precision).sum(1) / positive.sum(1)


def _by_score(truth: np.ndarray, score: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight of positives and of negatives at each distinct score, ascending, ``[R, D]`` both."""
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) > 0])
    sorted_weights, positive = weights[:, order], truth[order] > 0
    return tuple(np.add.reduceat(sorted_weights * part, starts, axis=1) for part in (positive, ~positive))


def weighted_rates(
    truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray, pooled: bool = False
) -> dict[str, np.ndarray]:
    """F1, sensitivity and specificity under each row of ``weights [R, N]``: per class ``[R, C]``, or pooled ``[R]``.

    ``truth`` and ``predicted`` are ``[N, C]`` of zeros and ones. NaN where nothing could have been counted.
    """
    counts = [weights @ part.astype(np.float64) for part in (truth * predicted, truth, predicted, np.ones_like(truth))]
    hit, positive, called, total = (count.sum(1) for count in counts) if pooled else counts
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "f1": 2 * hit / (positive + called),
            "sensitivity": hit / positive,
            "specificity": (total - positive - called + hit) / (total - positive),
        }


def entry(value: float, resampled: np.ndarray) -> dict[str, float | None]:
    """A metric's ``value``, and the :func:`interval` of its values over resamples."""
    return {"value": float(value), **interval(resampled)}


def auroc_table(
    truth: np.ndarray, score: np.ndarray, classes: Sequence[str], weights: np.ndarray
) -> tuple[dict[str, Any], np.ndarray]:
    """Mean AUROC of ``truth`` and ``score``, ``[N, C]``, by the ``weights`` of :func:`resample`.

    Returns:
        ``mean``, ``low``, ``high``, ``per_class`` (class -> ``value``, ``low``, ``high``), ``left_out`` (classes with a
        single label value); and the resamples' means, each over the classes that have both label values in it.
    """
    per_class, resampled = {}, []
    for c in np.flatnonzero(both_values(truth)):
        resampled.append(weighted_auroc(truth[:, c], score[:, c], weights))
        per_class[classes[c]] = entry(roc_auc_score(truth[:, c], score[:, c]), resampled[-1])
    left_out = [name for name in classes if name not in per_class]
    if not per_class:
        return {"mean": None, "low": None, "high": None, "per_class": {}, "left_out": left_out}, np.array([])
    means = mean_of_defined(np.stack(resampled, 1))
    mean = float(np.mean([found["value"] for found in per_class.values()]))
    return {"mean": mean, **interval(means), "per_class": per_class, "left_out": left_out}, means


# name -> value of truth [N] and score [N], and the same by weights [R, N]
SCORES = {
    "auroc": (roc_auc_score, weighted_auroc),
    "average_precision": (average_precision_score, weighted_average_precision),
}


def classification_metrics(
    truth: np.ndarray,
    probability: np.ndarray,
    classes: Sequence[str],
    patients: Sequence[str],
    thresholds: np.ndarray | None = None,
    exclusive: bool = False,
    num_resamples: int = 1000,
    seed: int = 42,
) -> dict[str, Any]:
    """All metrics of one list of volumes; every value as ``{"value", "low", "high"}``, a 95 % bootstrap interval.

    Args:
        truth: ``[N, C]`` zeros and ones (one-hot where classes exclude each other).
        probability: ``[N, C]``.
        patients: N names, see :func:`resample`.
        thresholds: ``[C]``, chosen on validation, for F1, sensitivity and specificity beside those at 0.5.
        exclusive: whether exactly one class is true; "at 0.5" is then the class of highest probability, and
            ``accuracy`` and ``confusion_matrix`` (rows: truth) are added.
        num_resamples, seed: of the bootstrap.

    Returns:
        ``per_class`` (class -> metric -> value and interval, and ``positive``), ``macro`` (mean over classes),
        ``micro`` (all class decisions pooled), ``left_out``: classes with a single label value, which have neither
        AUROC nor average precision, and enter no mean.
    """
    weights = resample(patients, num_resamples, seed)
    kept = np.flatnonzero(both_values(truth))
    left_out = [name for c, name in enumerate(classes) if c not in kept]
    if not len(kept):
        raise InputError(
            f"no class has both label values among {len(truth)} volumes ({', '.join(left_out)}): give a longer list"
        )
    at_half = np.eye(len(classes))[probability.argmax(1)] if exclusive else probability >= 0.5
    decisions = {"": at_half[:, kept]}
    if thresholds is not None:
        decisions["_at_threshold"] = (probability >= thresholds)[:, kept]
    all_truth, truth, score = truth, truth[:, kept], probability[:, kept]

    # metric -> values [C] and their bootstrap [R, C]; then the same with all classes pooled, a value and [R]
    table: dict[str, tuple[Sequence[float], np.ndarray, float, np.ndarray]] = {}
    columns, flat = list(zip(truth.T, score.T, strict=True)), (truth.ravel(), score.ravel())
    for name, (value_of, weighted) in SCORES.items():
        resampled = np.stack([weighted(*column, weights) for column in columns], 1)
        chunks = (np.repeat(weights[i : i + CHUNK], len(kept), axis=1) for i in range(0, len(weights), CHUNK))
        pooled = np.concatenate([weighted(*flat, chunk) for chunk in chunks])
        table[name] = [value_of(*column) for column in columns], resampled, value_of(*flat), pooled
    once_and_resampled = np.vstack([np.ones(len(truth)), weights])
    for suffix, predicted in decisions.items():
        rates, pooled_rates = (weighted_rates(truth, predicted, once_and_resampled, pool) for pool in (False, True))
        for name, (values, *resampled) in rates.items():
            value, *pooled = pooled_rates[name]
            table[name + suffix] = values, np.stack(resampled), value, np.array(pooled)

    metrics: dict[str, Any] = {
        "volumes": len(truth),
        "patients": len(set(patients)),
        "left_out": left_out,
        "macro": {n: entry(np.mean(values), mean_of_defined(many)) for n, (values, many, *_) in table.items()},
        "micro": {n: entry(value, pooled) for n, (*_, value, pooled) in table.items()},
        "per_class": {},
    }
    for i, c in enumerate(kept):
        found = metrics["per_class"][classes[c]] = {"positive": int(truth[:, i].sum())}
        found |= {n: entry(values[i], resampled[:, i]) for n, (values, resampled, *_) in table.items()}
        if thresholds is not None:
            found["threshold"] = float(thresholds[c])
    if exclusive:
        codes, predicted = all_truth.argmax(1), probability.argmax(1)
        right = codes == predicted
        metrics["accuracy"] = entry(right.mean(), weights @ right / weights.sum(1))
        metrics["confusion_matrix"] = confusion_matrix(codes, predicted, labels=range(len(classes))).tolist()
    return metrics


def metric_rows(metrics: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """The metrics as rows: class (or macro, micro, all), metric, value, low, high."""
    rows = []
    for name, found in (metrics["per_class"] | {"macro": metrics["macro"], "micro": metrics["micro"]}).items():
        for metric, value in found.items():
            rows.append((name, metric, *(value.values() if isinstance(value, Mapping) else (value, None, None))))
    if "accuracy" in metrics:
        rows.append(("all", "accuracy", *metrics["accuracy"].values()))
    return rows
