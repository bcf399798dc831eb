"""Finding the volume of a report, the report of a volume, and volumes with the same findings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from custom_components.errors import InputError
from custom_components.evaluation.metrics import entry
from custom_components.losses import SentenceVolumeScore
from custom_components.text import sentence_hash
from torch import Tensor
from torch.nn import functional as F

POOL_SIZE = 100  # volumes to choose from
MAX_POOLS = 10  # a thousand reports tell enough, and every sentence is scored in every volume
RECALLS = (1, 5, 10)
POOLS = ("all", "first", "report")
MAX_COSINES = 2**25  # of sentences and patches, held at a time
NUM_SHUFFLES = 20


def report_key(sentences: Sequence[str]) -> frozenset[int]:
    """Equal for reports that hold the same sentences, in whatever order."""
    return frozenset(map(sentence_hash, sentences))


def draw_pools(reports: Sequence[Sequence[str]], seed: int) -> list[list[int]]:
    """Disjoint pools of volumes, drawn at random, from each volume's sentences: one volume of each distinct report.

    Each has ``POOL_SIZE`` volumes, or, where there are fewer, all. Reports without a sentence are left out. So in a
    pool of N volumes chance finds one report in N.
    """
    distinct: dict[frozenset[int], int] = {}
    for volume, sentences in enumerate(reports):
        if sentences:
            distinct.setdefault(report_key(sentences), volume)
    order = np.random.RandomState(seed).permutation(list(distinct.values())).astype(int).tolist()
    number = min(MAX_POOLS, max(1, len(order) // POOL_SIZE))
    pools = [order[i * POOL_SIZE : (i + 1) * POOL_SIZE] for i in range(number)]
    return [pool for pool in pools if len(pool) > 1]


def ranks(table: Tensor, relevant: Tensor) -> Tensor:
    """Rank, from 1, of the best of each query's relevant items, ``[Q]`` float64.

    What scores equally stands in no order, so that the expected rank of the best counts.

    Args:
        table: ``[Q, N]``, score of each of N items for a query.
        relevant: ``[Q, N]`` bool, of which a row has at least one.
    """
    best = table.masked_fill(~relevant, -torch.inf).amax(1, keepdim=True)
    above = ((table > best) & ~relevant).sum(1)
    level = ((table == best) & ~relevant).sum(1)
    hits = ((table == best) & relevant).sum(1)
    return 1 + above + level.double() / (hits + 1)


def retrieval(
    pools: Sequence[Sequence[int]], rows: Mapping[int, Sequence[int]], scores: Tensor, random_scores: Tensor
) -> dict[str, Any]:
    """Report -> volume within each pool of :func:`draw_pools`, for the network, an untrained one, and chance.

    Args:
        rows: volume -> rows of its report's sentences in ``scores [S, V]``; their mean is the report's score.

    Returns:
        ``simcrop``, ``random_encoder`` and ``chance``, each with ``recall@1``, ``@5``, ``@10`` and ``median_rank``;
        ``volumes`` of a pool, ``pools``, and ``reports`` in all of them.
    """
    size = len(pools[0])

    def ranks_in(pool: Sequence[int], scores: Tensor) -> Tensor:
        table = torch.stack([scores[list(rows[volume])][:, list(pool)].mean(0) for volume in pool])  # report volume
        return ranks(table, torch.eye(len(pool), dtype=torch.bool))

    def summary(scores: Tensor) -> dict[str, float]:
        found = torch.cat([ranks_in(pool, scores) for pool in pools])
        recalls = {f"recall@{k}": (found <= k).double().mean().item() for k in RECALLS}
        return recalls | {"median_rank": float(np.median(found.numpy()))}

    chance = {f"recall@{k}": min(1.0, k / size) for k in RECALLS} | {"median_rank": (size + 1) / 2}
    found = {"simcrop": summary(scores), "random_encoder": summary(random_scores), "chance": chance}
    return found | {"volumes": size, "pools": len(pools), "reports": size * len(pools)}


# whole cohorts


@dataclass
class Pool:
    """Volumes and reports among which is sought.

    Args:
        volumes: V numbers of a cohort's volumes.
        reports: R distinct reports, the sentences of each.
        relevant: ``[R, V]`` bool, which volumes a report was written of.
        report_volume: ``[R]``, the first of these, as a place in ``volumes``: whose patient the report is.
    """

    volumes: list[int]
    reports: list[list[str]]
    relevant: Tensor
    report_volume: list[int]


def make_pool(reports: Sequence[Sequence[str]], scans: Sequence[str], pool: str) -> Pool | None:
    """The pool of a cohort; None where fewer than two reports differ.

    A report belongs to all reconstructions of its scan, and reports of the same sentences are one. Volumes whose report
    has no sentence are left out.

    Args:
        reports: sentences of each volume's report.
        scans: the scan that each volume is a reconstruction of.
        pool: ``all`` reconstructions, the ``first`` of each scan, or one volume of each distinct ``report``.

    Raises:
        InputError: ``pool`` is unknown.
    """
    if pool not in POOLS:
        raise InputError(f"pool {pool!r} is unknown: choose {', '.join(POOLS)}")
    keys = [report_key(sentences) for sentences in reports]
    volumes, met = [], set()
    for volume, (key, scan) in enumerate(zip(keys, scans, strict=True)):
        unit = {"all": volume, "first": scan, "report": key}[pool]
        if key and unit not in met:
            met.add(unit)
            volumes.append(volume)
    number = {key: i for i, key in enumerate(dict.fromkeys(keys[volume] for volume in volumes))}
    if len(number) < 2:
        return None
    report_of = np.array([number[keys[volume]] for volume in volumes])
    scan_of = np.unique([scans[volume] for volume in volumes], return_inverse=True)[1]
    first = np.unique(report_of, return_index=True)[1].tolist()
    own = report_of == np.arange(len(number))[:, None]
    of_scan = np.zeros((len(number), scan_of.max() + 1), bool)
    of_scan[report_of, scan_of] = True  # a scan's reconstructions may have reports that differ
    texts = [list(reports[volumes[place]]) for place in first]
    return Pool(volumes, texts, torch.from_numpy(own | of_scan[:, scan_of]), first)


class ReportScores:
    """Scores of R reports in volumes that come a few at a time: the mean of a report's sentence-volume scores.

    A distinct sentence is scored once. Memory is that of the sentences' features, and of ``MAX_COSINES`` cosines.

    Args:
        reports: sentences of each.
        features: ``[S, D]``, of ``sentences``, in that order, where the volumes' patches will be.
        sentences: all that the reports hold.
    """

    def __init__(
        self,
        reports: Sequence[Sequence[str]],
        sentences: Sequence[str],
        features: Tensor,
        score: SentenceVolumeScore,
        max_cosines: int = MAX_COSINES,
    ) -> None:
        row = {sentence: i for i, sentence in enumerate(sentences)}
        pairs = [(r, row[sentence]) for r, report in enumerate(reports) for sentence in report]
        device = features.device
        self.report, self.sentence = torch.tensor(pairs, device=device).T.contiguous()
        self.length = torch.tensor([len(report) for report in reports], device=device)[:, None]
        self.features, self.score, self.max_cosines = features, score, max_cosines

    def sentence_scores(self, patches: Tensor) -> Tensor:
        """Projected patches ``[B, n, D]`` -> ``[S, B]`` of all sentences."""
        size = max(1, self.max_cosines // patches[..., 0].numel())
        return torch.cat([self.score(patches, some) for some in self.features.split(size)])

    def __call__(self, patches: Tensor) -> Tensor:
        """Projected patches ``[B, n, D]`` -> ``[R, B]`` on the CPU."""
        scores = self.sentence_scores(patches)[self.sentence]
        sums = scores.new_zeros(len(self.length), scores.shape[1]).index_add_(0, self.report, scores)
        return (sums / self.length).cpu()

    def embeddings(self) -> Tensor:
        """One feature a report, ``[R, D]`` of length 1 on the CPU: the mean of its sentences', each of length 1."""
        unit = F.normalize(self.features.float(), dim=-1)[self.sentence]
        sums = unit.new_zeros(len(self.length), unit.shape[1]).index_add_(0, self.report, unit)
        return F.normalize(sums, dim=-1).cpu()


def volume_embedding(patches: Tensor) -> Tensor:
    """Projected patches ``[B, n, D]`` -> ``[B, D]`` of length 1: their mean, each of length 1."""
    return F.normalize(F.normalize(patches.float(), dim=-1).mean(1), dim=-1)


def chance_recall(num_relevant: np.ndarray, num_items: int, k: int) -> float:
    """Expected Recall@k over queries that have so many of so many items relevant, in an order drawn at random."""
    missed = np.ones(len(num_relevant))
    for drawn in range(min(k, num_items)):
        missed *= np.clip(num_items - num_relevant - drawn, 0, None) / (num_items - drawn)
    return float(1 - missed.mean())


def weighted_median(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Median of ``values [N]`` by each row of ``weights [R, N]``, the mean of both middle ones where there are two."""
    order = np.argsort(values, kind="stable")
    total = weights[:, order].cumsum(1)
    half = total[:, -1:] / 2
    lower, upper = (total >= half).argmax(1), (total > half).argmax(1)
    return (values[order][lower] + values[order][upper]) / 2


def recall_metrics(
    table: Tensor, relevant: Tensor, recall_at: Sequence[int], weights: np.ndarray
) -> dict[str, dict[str, float | None]]:
    """``recall@k`` and ``median_rank`` of queries by :func:`ranks`, each with its bootstrap interval.

    Args:
        weights: ``[R, Q]``, of :func:`custom_components.evaluation.metrics.resample` over the queries' patients.
    """
    found = ranks(table, relevant).numpy()
    metrics = {}
    for k in recall_at:
        hit = (found <= k).astype(np.float64)
        metrics[f"recall@{k}"] = entry(hit.mean(), weights @ hit / weights.sum(1))
    metrics["median_rank"] = entry(float(np.median(found)), weighted_median(found, weights))
    return metrics


def cross_retrieval(
    tables: Mapping[str, Tensor], relevant: Tensor, recall_at: Sequence[int], weights: np.ndarray, seed: int
) -> dict[str, Any]:
    """Retrieval by several scores side by side, with what chance and shuffled pairs reach.

    Args:
        tables: how it is scored -> ``[Q, N]``; the first is also shuffled.
        relevant: ``[Q, N]`` bool.
        recall_at: k of Recall@k.
        weights: as in :func:`recall_metrics`.

    Returns:
        For each of the tables :func:`recall_metrics`; ``shuffled``, the mean over 20 shuffles of the items under the
        first table; and ``chance``, of orders drawn at random, whose median rank is that of each query's expectation.
    """
    found: dict[str, Any] = {
        name: recall_metrics(table, relevant, recall_at, weights) for name, table in tables.items()
    }
    items, number = relevant.shape[1], relevant.sum(1).numpy()
    first = next(iter(tables.values()))
    random = np.random.RandomState(seed)
    shuffled = [ranks(first[:, random.permutation(items)], relevant).numpy() for _ in range(NUM_SHUFFLES)]
    found["shuffled"] = {f"recall@{k}": float(np.mean([r <= k for r in shuffled])) for k in recall_at}
    found["shuffled"]["median_rank"] = float(np.mean([np.median(r) for r in shuffled]))
    found["chance"] = {f"recall@{k}": chance_recall(number, items, k) for k in recall_at}
    found["chance"]["median_rank"] = float(np.median((items + 1) / (number + 1)))
    return found


# volumes that share labels


def label_metrics(
    features: Tensor, labels: np.ndarray, patients: Sequence[str], precision_at: Sequence[int], weights: np.ndarray
) -> dict[str, dict[str, float | None]]:
    """How alike in labels the volumes are that are nearest by cosine, other volumes of the patient left out.

    Args:
        features: ``[V, D]``.
        labels: ``[V, C]`` zeros and ones. A volume without any is found, but is no query.
        weights: ``[R, Q]`` over the queries' patients, see :func:`label_queries`.

    Returns:
        ``map@k``, the mean average precision of the k nearest, where a volume is relevant that shares a label with the
        query; ``overlap@k``, the mean over these k of shared labels by labels of either.
    """
    precisions, overlaps = [], []
    unit, queries, deepest = F.normalize(features.double(), dim=-1), label_queries(labels), max(precision_at)
    owner = np.unique(np.asarray(patients), return_inverse=True)[1]
    for query in queries:
        cosine = (unit @ unit[query]).numpy()
        others = np.flatnonzero(owner != owner[query])
        at = np.argsort(-cosine[others], kind="stable")[:deepest]
        shared, either = _shared(labels, query, others)
        relevant = shared > 0
        hits = relevant[at].astype(np.float64)
        gained = np.cumsum(hits * hits.cumsum() / np.arange(1, len(hits) + 1))
        alike = np.cumsum(shared[at] / either[at])
        depth = np.minimum(precision_at, len(at))
        precisions.append(gained[depth - 1] / np.maximum(np.minimum(depth, relevant.sum()), 1))
        overlaps.append(alike[depth - 1] / depth)
    metrics = {}
    for name, values in (("map", np.stack(precisions)), ("overlap", np.stack(overlaps))):
        for k, column in zip(precision_at, values.T, strict=True):
            metrics[f"{name}@{k}"] = entry(column.mean(), weights @ column / weights.sum(1))
    return metrics


def label_queries(labels: np.ndarray) -> np.ndarray:
    """Which volumes have a label, by which others can be like them: ``[Q]``."""
    return np.flatnonzero(labels.any(1))


def chance_label_metrics(labels: np.ndarray, patients: Sequence[str], precision_at: Sequence[int]) -> dict[str, float]:
    """What :func:`label_metrics` gives on average for orders drawn at random."""
    owner = np.unique(np.asarray(patients), return_inverse=True)[1]
    precisions, overlaps = [], []
    for query in label_queries(labels):
        others = np.flatnonzero(owner != owner[query])
        shared, either = _shared(labels, query, others)
        n, m = len(others), int((shared > 0).sum())
        depth = np.minimum(precision_at, n)
        # at place k, a relevant item has k - 1 others before it, of which each is relevant with (m - 1) / (n - 1)
        k = np.arange(1, n + 1)
        gained = np.cumsum(m / n * (1 + (k - 1) * (m - 1) / max(n - 1, 1)) / k)
        precisions.append(gained[depth - 1] / np.maximum(np.minimum(depth, m), 1))
        overlaps.append((shared / either).mean())
    found = {f"map@{k}": value for k, value in zip(precision_at, np.mean(precisions, 0).tolist(), strict=True)}
    return found | {f"overlap@{k}": float(np.mean(overlaps)) for k in precision_at}


def _shared(labels: np.ndarray, query: int, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many labels each of the others shares with a query, and how many either has, never 0."""
    shared = labels[others] @ labels[query]
    return shared, labels[others].sum(1) + labels[query].sum() - shared
