"""Ranks, pools, recall, precision by plain loops and counts; the whole runs in ``tests/bundles/test_zero_shot.py``."""

import itertools

import numpy as np
import pytest
import torch
from custom_components.errors import InputError
from custom_components.evaluation.metrics import resample
from custom_components.evaluation.retrieval import (
    ReportScores,
    chance_label_metrics,
    chance_recall,
    cross_retrieval,
    draw_pools,
    label_metrics,
    label_queries,
    make_pool,
    ranks,
    recall_metrics,
    retrieval,
    weighted_median,
)
from custom_components.losses import SentenceVolumeScore
from sklearn.metrics import average_precision_score


def test_ranks_are_those_expected_of_every_order_of_ties():
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(3, (40, 5), generator=generator).float()  # few values: many ties
    relevant = torch.rand(40, 5, generator=generator) < 0.4
    relevant[:, 0] |= ~relevant.any(1)
    for scores, wanted, rank in zip(table.tolist(), relevant.tolist(), ranks(table, relevant).tolist(), strict=True):
        firsts = []
        for order in itertools.permutations(range(5)):  # a stable sort of each order breaks ties by it
            found = sorted(order, key=lambda item: -scores[item])
            firsts.append(next(place for place, item in enumerate(found, 1) if wanted[item]))
        assert rank == pytest.approx(np.mean(firsts))


def test_pools_hold_each_report_once_and_none_without_a_sentence():
    reports = [[f"Finding {i}."] for i in range(250)] + [["finding 7."], [], ["Finding 8.", "Finding 9."]]
    pools = draw_pools(reports, seed=0)
    assert [len(pool) for pool in pools] == [100, 100]
    drawn = [volume for pool in pools for volume in pool]
    assert len(set(drawn)) == 200 and not {250, 251} & set(drawn)
    assert draw_pools(reports, seed=0) == pools != draw_pools(reports, seed=1)
    few = draw_pools([["A.", "B."], ["B.", "a."], [], ["C."]], seed=0)  # the same two sentences
    assert [sorted(pool) for pool in few] == [[0, 3]]
    assert draw_pools([["A."], ["a."], []], seed=0) == []


def test_retrieval_by_hand():
    scores = torch.eye(3)
    scores[2] = torch.tensor([0.5, 0.4, 0.3])  # the third report's own volume comes last
    found = retrieval([[0, 1, 2]], {0: [0], 1: [1], 2: [2]}, scores, torch.zeros(3, 3))
    assert found["simcrop"] == {"recall@1": pytest.approx(2 / 3), "recall@5": 1, "recall@10": 1, "median_rank": 1}
    assert found["random_encoder"]["median_rank"] == found["chance"]["median_rank"] == 2
    assert found["chance"]["recall@1"] == pytest.approx(1 / 3) and found["chance"]["recall@5"] == 1
    assert (found["volumes"], found["pools"], found["reports"]) == (3, 1, 3)


# whole cohorts

# reconstructions of scans a, b, c, d; b and c have the same sentences, e has none
REPORTS = [["One.", "Two."], ["One.", "Two."], ["No finding."], ["no finding."], ["Three."], []]
SCANS = ["a", "a", "b", "c", "d", "e"]


@pytest.mark.parametrize(
    ("pool", "volumes", "relevant"),
    [
        ("all", [0, 1, 2, 3, 4], [[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]),
        ("first", [0, 2, 3, 4], [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]),
        ("report", [0, 2, 4], [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    ],
)
def test_a_pool_knows_reconstructions_and_duplicate_reports(pool, volumes, relevant):
    found = make_pool(REPORTS, SCANS, pool)
    assert found.volumes == volumes and found.reports == [["One.", "Two."], ["No finding."], ["Three."]]
    assert found.relevant.int().tolist() == relevant
    assert [found.volumes[place] for place in found.report_volume] == [0, 2, 4]


def test_any_reconstruction_of_the_reports_scan_is_a_hit():
    found = make_pool([["One."], ["One, read again."], ["Two."]], ["a", "a", "b"], "all")
    assert found.relevant.int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_pools_that_are_none():
    assert make_pool([["One."], ["one."]], ["a", "b"], "all") is None and make_pool([], [], "all") is None
    with pytest.raises(InputError, match="all, first, report"):
        make_pool(REPORTS, SCANS, "every")


@pytest.mark.parametrize("max_cosines", [1, 40, 10**6])
def test_report_scores_are_the_mean_of_their_sentences(max_cosines):
    """A sentence that a report says twice counts twice, in however small chunks it is scored."""
    torch.manual_seed(0)
    sentences, reports = ["A.", "B.", "C."], [["A.", "B.", "A."], ["C."], ["B.", "C."]]
    features, patches, score = torch.randn(3, 6), torch.randn(2, 9, 6), SentenceVolumeScore(top_k=4)
    told = ReportScores(reports, sentences, features, score, max_cosines)
    single = score(patches, features)
    expected = torch.stack([(2 * single[0] + single[1]) / 3, single[2], (single[1] + single[2]) / 2])
    torch.testing.assert_close(told(patches), expected)
    unit = features / features.norm(dim=1, keepdim=True)
    mean = 2 * unit[0] + unit[1]
    torch.testing.assert_close(told.embeddings()[0], mean / mean.norm())


def test_chance_is_what_random_orders_give():
    random = np.random.RandomState(0)
    relevant = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]], dtype=torch.bool)
    tables = [torch.from_numpy(random.rand(2, 8)) for _ in range(4000)]
    found = np.stack([ranks(table, relevant).numpy() for table in tables])
    for k in (1, 3, 6, 8, 20):
        assert chance_recall(relevant.sum(1).numpy(), 8, k) == pytest.approx((found <= k).mean(), abs=0.015)
    assert found.mean(0) == pytest.approx([9 / 2, 9 / 4], abs=0.06)


def test_weighted_median_is_that_of_repeated_values():
    random = np.random.RandomState(0)
    values, weights = random.randint(5, size=11).astype(float), random.randint(3, size=(50, 11)).astype(float)
    for row, median in zip(weights, weighted_median(values, weights), strict=True):
        assert median == np.median(np.repeat(values, row.astype(int)))


def test_recall_and_its_interval_are_those_of_the_resampled_patients():
    table = torch.tensor([[3.0, 2, 1], [1, 3, 2], [3, 2, 1], [1, 2, 3]])
    relevant = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.bool)  # ranks 1, 3, 2, 1
    weights = resample(["p", "p", "q", "r"], 500, 0)
    found = recall_metrics(table, relevant, [1, 2], weights)
    assert found["recall@1"]["value"] == 0.5 and found["recall@2"]["value"] == 0.75
    assert found["median_rank"]["value"] == 1.5
    expected = np.percentile(weights @ [1, 0, 0, 1] / weights.sum(1), [2.5, 97.5])
    assert [found["recall@1"]["low"], found["recall@1"]["high"]] == pytest.approx(expected.tolist())


def test_scores_stand_beside_shuffled_pairs_and_chance():
    size = 60
    table, relevant = torch.eye(size), torch.eye(size, dtype=torch.bool)
    weights = resample(range(size), 50, 0)
    found = cross_retrieval({"simcrop": table, "other": -table}, relevant, [1, 10], weights, 0)
    assert (
        found["simcrop"]["recall@1"] == {"value": 1, "low": 1, "high": 1} and found["other"]["recall@10"]["value"] == 0
    )
    assert found["chance"] == {
        "recall@1": pytest.approx(1 / size),
        "recall@10": pytest.approx(1 / 6),
        "median_rank": 30.5,
    }
    assert found["shuffled"]["recall@1"] < 0.1 and 25 < found["shuffled"]["median_rank"] < 36


# volumes that share labels

LABELS = np.array([[1, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]])
PATIENTS = ["p", "q", "r", "s", "t", "p"]


def test_label_metrics_are_what_loops_compute():
    torch.manual_seed(0)
    features, depths = torch.randn(6, 5), [1, 2, 10]
    queries = label_queries(LABELS)
    assert queries.tolist() == [0, 1, 2, 3, 5]  # one has no finding to share
    found = label_metrics(features, LABELS, PATIENTS, depths, resample([PATIENTS[q] for q in queries], 20, 0))
    for k in depths:
        precisions, overlaps = [], []
        for query in queries:
            others = [v for v in range(6) if PATIENTS[v] != PATIENTS[query]]
            cosine = torch.cosine_similarity(features[others], features[query][None]).tolist()
            order = [v for _, v in sorted(zip(cosine, others, strict=True), reverse=True)][:k]
            hits = [bool((LABELS[v] & LABELS[query]).any()) for v in order]
            total = sum(bool((LABELS[v] & LABELS[query]).any()) for v in others)
            gained = sum(hits[: i + 1].count(True) / (i + 1) for i, hit in enumerate(hits) if hit)
            precisions.append(gained / max(1, min(len(order), total)))
            shared = [(LABELS[v] & LABELS[query]).sum() / (LABELS[v] | LABELS[query]).sum() for v in order]
            overlaps.append(np.mean(shared))
        assert found[f"map@{k}"]["value"] == pytest.approx(np.mean(precisions))
        assert found[f"overlap@{k}"]["value"] == pytest.approx(np.mean(overlaps))


def test_mean_average_precision_over_all_is_scikit_learns():
    torch.manual_seed(1)
    random = np.random.RandomState(1)
    labels, features = random.randint(2, size=(30, 2)), torch.randn(30, 4)
    queries = label_queries(labels)
    found = label_metrics(features, labels, list(map(str, range(30))), [29], resample(queries, 5, 0))["map@29"]
    expected = []
    for query in queries:
        others = np.arange(30) != query
        cosine = torch.cosine_similarity(features[others], features[query][None]).numpy()
        expected.append(average_precision_score((labels[others] & labels[query]).any(1), cosine))
    assert found["value"] == pytest.approx(np.mean(expected))


def test_chance_among_labels_is_what_random_features_give():
    torch.manual_seed(0)
    depths = [1, 2, 4]
    weights = resample(label_queries(LABELS), 5, 0)
    draws = [label_metrics(torch.randn(6, 3), LABELS, PATIENTS, depths, weights) for _ in range(1500)]
    for name, value in chance_label_metrics(LABELS, PATIENTS, depths).items():
        assert value == pytest.approx(np.mean([draw[name]["value"] for draw in draws]), abs=0.02)
