"""Metrics and their intervals, against scikit-learn with sample weights and against arithmetic by hand."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from custom_components.errors import InputError
from custom_components.evaluation.metrics import (
    accuracy,
    auroc_table,
    best_f1_thresholds,
    check_selection,
    classification_metrics,
    difference_interval,
    interval,
    mean_auroc,
    mean_interval,
    metric_rows,
    resample,
    selection_metric,
    weighted_auroc,
    weighted_average_precision,
    weighted_rates,
)
from sklearn.metrics import average_precision_score, f1_score, recall_score, roc_auc_score


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """90 volumes of 45 patients, 4 classes, scores rounded so that many are equal."""
    random = np.random.RandomState(0)
    truth = (random.rand(90, 4) < 0.3).astype(float)
    score = np.clip(random.rand(90, 4) * 0.8 + 0.2 * truth, 0, 1).round(1)
    return truth, score, [f"patient {i // 2}" for i in range(90)]


def test_resamples_equal_scikit_learn_with_weights(data: tuple) -> None:
    truth, score, patients = data
    weights = resample(patients, 20, seed=3)
    auroc = weighted_auroc(truth[:, 1], score[:, 1], weights)
    precision = weighted_average_precision(truth[:, 1], score[:, 1], weights)
    rates = weighted_rates(truth, score >= 0.5, weights)
    for i, w in enumerate(weights):
        assert auroc[i] == pytest.approx(roc_auc_score(truth[:, 1], score[:, 1], sample_weight=w))
        assert precision[i] == pytest.approx(average_precision_score(truth[:, 1], score[:, 1], sample_weight=w))
        called = score[:, 1] >= 0.5
        assert rates["f1"][i, 1] == pytest.approx(f1_score(truth[:, 1], called, sample_weight=w))
        assert rates["sensitivity"][i, 1] == pytest.approx(recall_score(truth[:, 1], called, sample_weight=w))
        specificity = recall_score(truth[:, 1], called, pos_label=0, sample_weight=w)
        assert rates["specificity"][i, 1] == pytest.approx(specificity)


def test_resamples_keep_a_patients_volumes_together(data: tuple) -> None:
    weights = resample(data[2], 50, seed=0)
    assert (weights[:, ::2] == weights[:, 1::2]).all()
    assert (weights.sum(1) == 90).all() and weights.max() >= 4
    assert (weights == resample(data[2], 50, seed=0)).all()


def test_intervals_of_means_are_of_the_same_resamples() -> None:
    """Scans are drawn as patients are, and an interval is between percentiles, whatever it is of."""
    values = np.random.RandomState(0).rand(12)
    means = [np.average(values, weights=w) for w in resample([f"scan {i:02d}" for i in range(12)], 300, seed=4)]
    found = mean_interval(values, seed=4, num_resamples=300)
    assert (found["low"], found["high"]) == pytest.approx(np.quantile(means, [0.025, 0.975]))
    assert interval(np.array([*means, np.nan])) == pytest.approx({"low": found["low"], "high": found["high"]})
    assert interval(np.array([np.nan])) == {"low": None, "high": None}


def test_pooled_rates_are_of_all_decisions(data: tuple) -> None:
    truth, score, patients = data
    weights = resample(patients, 10, seed=0)
    rates = weighted_rates(truth, score >= 0.5, weights, pooled=True)
    for i, w in enumerate(np.repeat(weights, 4, axis=1)):
        called = (score >= 0.5).ravel()
        assert rates["f1"][i] == pytest.approx(f1_score(truth.ravel(), called, sample_weight=w))
        specificity = recall_score(truth.ravel(), called, pos_label=0, sample_weight=w)
        assert rates["specificity"][i] == pytest.approx(specificity)


def test_metrics_hold_the_values_and_intervals_around_them(data: tuple) -> None:
    truth, score, patients = data
    names = ["a", "b", "c", "d"]
    thresholds = np.array([0.3, 0.4, 0.5, 0.6])
    metrics = classification_metrics(truth, score, names, patients, thresholds, num_resamples=300)
    assert metrics["volumes"] == 90 and metrics["patients"] == 45 and metrics["left_out"] == []
    for c, name in enumerate(names):
        entry = metrics["per_class"][name]
        assert entry["positive"] == truth[:, c].sum()
        assert entry["auroc"]["value"] == pytest.approx(roc_auc_score(truth[:, c], score[:, c]))
        called = score[:, c] >= thresholds[c]
        assert entry["f1_at_threshold"]["value"] == pytest.approx(f1_score(truth[:, c], called))
        for metric, value in entry.items():
            if isinstance(value, dict):
                assert value["low"] <= value["value"] <= value["high"], (name, metric)
    macro = np.mean([metrics["per_class"][name]["auroc"]["value"] for name in names])
    assert metrics["macro"]["auroc"]["value"] == pytest.approx(macro)
    assert metrics["micro"]["auroc"]["value"] == pytest.approx(roc_auc_score(truth.ravel(), score.ravel()))
    assert metrics["micro"]["f1"]["value"] == pytest.approx(f1_score(truth, score >= 0.5, average="micro"))
    assert ("macro", "auroc") in {row[:2] for row in metric_rows(metrics)}
    # an interval from half as many patients is about sqrt(2) wider
    half = classification_metrics(truth[:44], score[:44], names, patients[:44], num_resamples=300)
    width = [m["macro"]["auroc"]["high"] - m["macro"]["auroc"]["low"] for m in (metrics, half)]
    assert 1.1 < width[1] / width[0] < 2


def test_a_class_with_one_label_value_is_named_and_left_out(data: tuple) -> None:
    truth, score, patients = data
    truth = truth.copy()
    truth[:, 2] = 0
    metrics = classification_metrics(truth, score, ["a", "b", "c", "d"], patients, num_resamples=20)
    assert metrics["left_out"] == ["c"] and set(metrics["per_class"]) == {"a", "b", "d"}
    others = [roc_auc_score(truth[:, i], score[:, i]) for i in (0, 1, 3)]
    assert metrics["macro"]["auroc"]["value"] == pytest.approx(np.mean(others))
    logits = torch.as_tensor(score).logit(1e-3)
    assert mean_auroc(logits, torch.as_tensor(truth)) == pytest.approx(np.mean(others), abs=1e-6)
    table, _ = auroc_table(truth, score, ["a", "b", "c", "d"], resample(patients, 20, 0))
    assert table["left_out"] == ["c"] and table["mean"] == pytest.approx(np.mean(others))
    with pytest.raises(InputError, match="no class has both label values"):
        classification_metrics(np.zeros((4, 1)), np.zeros((4, 1)), ["a"], list("abcd"))
    with pytest.raises(InputError, match="no class has both label values"):
        mean_auroc(torch.zeros(4, 1), torch.ones(4, 1))


def test_exclusive_classes_have_accuracy_and_a_confusion_matrix() -> None:
    codes = np.array([0, 0, 1, 1, 2, 2])
    probability = np.eye(3)[[0, 1, 1, 1, 2, 0]] * 0.4 + 0.2
    metrics = classification_metrics(
        np.eye(3)[codes], probability, ["x", "y", "z"], list("abcdef"), exclusive=True, num_resamples=50
    )
    assert metrics["accuracy"]["value"] == pytest.approx(4 / 6)
    assert metrics["confusion_matrix"] == [[1, 1, 0], [0, 2, 0], [1, 0, 1]]
    assert metrics["per_class"]["y"]["f1"]["value"] == pytest.approx(0.8)  # by the largest, not by 0.5
    assert accuracy(torch.as_tensor(probability), torch.as_tensor(codes)) == pytest.approx(4 / 6)


def test_thresholds_are_those_of_highest_f1(data: tuple) -> None:
    truth, score, _ = data
    chosen = best_f1_thresholds(truth, score)
    for c in range(4):
        best = max(f1_score(truth[:, c], score[:, c] >= t) for t in np.linspace(0, 1, 101))
        assert f1_score(truth[:, c], score[:, c] >= chosen[c]) == pytest.approx(best)
    assert best_f1_thresholds(np.zeros((3, 1)), np.full((3, 1), 0.2)) == [0.5]


def test_a_selection_is_checked_before_a_volume_is_read() -> None:
    def items(*labels: object) -> list[dict]:
        return [{"image": "a.nii.gz", "label": label} for label in labels]

    of_one, of_both = np.array([1, 0], np.float32), np.array([1, 1], np.float32)
    check_selection(items(of_one, of_both), "auroc")
    check_selection(items(0, 2), "accuracy")
    with pytest.raises(InputError, match="no class has both label values among the 2 validation volumes"):
        check_selection(items(of_one, of_one), "auroc")
    with pytest.raises(InputError, match="set select_by to accuracy"):
        check_selection(items(0, 2), "auroc")
    for labels in ([of_one, of_both], [np.zeros(1, np.float32), np.ones(1, np.float32)]):
        with pytest.raises(InputError, match="select_by is accuracy, .*: set select_by to auroc, or exclusive to true"):
            check_selection(items(*labels), "accuracy")


def test_selection_metric_is_known() -> None:
    assert selection_metric("auroc") is mean_auroc
    with pytest.raises(InputError, match="select_by"):
        selection_metric("loss")


@pytest.mark.slow
def test_a_thousand_resamples_at_ct_rates_size_take_seconds() -> None:
    random = np.random.RandomState(0)
    truth = (random.rand(3009, 18) < 0.2).astype(float)
    start = time.perf_counter()
    classification_metrics(truth, random.rand(3009, 18), list("abcdefghijklmnopqr"), [str(i) for i in range(3009)])
    assert time.perf_counter() - start < 60


def test_interval_covers_the_mean() -> None:
    values = np.random.default_rng(0).normal(0.7, 0.1, 50)
    found = mean_interval(np.append(values, np.nan), seed=1)
    assert found["scans"] == 50 and found["mean"] == pytest.approx(values.mean())
    error = values.std() / math.sqrt(50)
    assert found["low"] == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert found["high"] == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)


def test_a_difference_is_paired_and_between_the_means_of_what_is_defined() -> None:
    random = np.random.default_rng(0)
    scans = random.normal(0.5, 0.2, 40)  # scans differ far more than the two networks
    first, other = scans + 0.05 + random.normal(0, 0.01, 40), scans.copy()
    found = difference_interval(first, other, seed=1)
    assert found == pytest.approx(mean_interval(first - other, seed=1))
    assert 0.04 < found["low"] < found["high"] < 0.06
    first[:10] = np.nan  # where the other invented a class, and the first did not
    other[:10] = 0.0
    found = difference_interval(first, other, seed=1)
    assert found["mean"] == pytest.approx(np.nanmean(first) - other.mean()) and found["scans"] == 40
    assert found["low"] > 0.1
    nothing = np.full(3, np.nan)
    assert difference_interval(nothing, np.ones(3), seed=1) == {"mean": None, "low": None, "high": None, "scans": 3}
