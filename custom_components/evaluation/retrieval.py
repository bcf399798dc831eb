"""Finding the volume that a report was written of, among others."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from custom_components.text import sentence_hash

POOL_SIZE = 100  # volumes to choose from
MAX_POOLS = 10  # a thousand reports tell enough, and every sentence is scored in every volume
RECALLS = (1, 5, 10)


def draw_pools(reports: Sequence[Sequence[str]], seed: int) -> list[list[int]]:
    """Disjoint pools of volumes, drawn at random, from each volume's sentences: one volume of each distinct report.

    Each has ``POOL_SIZE`` volumes, or, where there are fewer, all. Reports without a sentence are left out. So in a
    pool of N volumes chance finds one report in N.
    """
    distinct: dict[frozenset[int], int] = {}
    for volume, sentences in enumerate(reports):
        if sentences:
            distinct.setdefault(frozenset(map(sentence_hash, sentences)), volume)
    order = np.random.RandomState(seed).permutation(list(distinct.values())).astype(int).tolist()
    number = min(MAX_POOLS, max(1, len(order) // POOL_SIZE))
    pools = [order[i * POOL_SIZE : (i + 1) * POOL_SIZE] for i in range(number)]
    return [pool for pool in pools if len(pool) > 1]


def ranks(pool: Sequence[int], rows: Mapping[int, Sequence[int]], scores: Tensor) -> Tensor:
    """Rank of each report's own volume in its pool, ``[N]``, from 1; equal scores share their mean rank.

    Args:
        rows: volume -> rows of its report's sentences in ``scores [S, V]``; their mean is the report's score.
    """
    table = torch.stack([scores[list(rows[volume])][:, list(pool)].mean(0) for volume in pool])  # report volume
    own = table.diagonal()[:, None]
    return 1 + (table > own).sum(1) + 0.5 * ((table == own).sum(1) - 1)


def retrieval(
    pools: Sequence[Sequence[int]], rows: Mapping[int, Sequence[int]], scores: Tensor, random_scores: Tensor
) -> dict[str, Any]:
    """Report -> volume within each pool, for the network, an untrained one, and chance.

    Returns:
        ``simcrop``, ``random_encoder`` and ``chance``, each with ``recall@1``, ``@5``, ``@10`` and ``median_rank``;
        ``volumes`` of a pool, ``pools``, and ``reports`` in all of them.
    """
    size = len(pools[0])

    def summary(scores: Tensor) -> dict[str, float]:
        found = torch.cat([ranks(pool, rows, scores) for pool in pools])
        recalls = {f"recall@{k}": (found <= k).double().mean().item() for k in RECALLS}
        return recalls | {"median_rank": float(np.median(found.numpy()))}

    chance = {f"recall@{k}": min(1.0, k / size) for k in RECALLS} | {"median_rank": (size + 1) / 2}
    found = {"simcrop": summary(scores), "random_encoder": summary(random_scores), "chance": chance}
    return found | {"volumes": size, "pools": len(pools), "reports": size * len(pools)}
