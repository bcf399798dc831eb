"""Ranks and pools, by hand and against a plain loop."""

from __future__ import annotations

import pytest
import torch

from custom_components.evaluation.retrieval import draw_pools, ranks, retrieval


def test_ranks_against_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(4, (12, 9), generator=generator).float()  # few values: many ties
    pool, rows = [7, 2, 0, 5], {7: [0, 3], 2: [1], 0: [2, 4, 5], 5: [11, 0]}
    for volume, rank in zip(pool, ranks(pool, rows, scores).tolist(), strict=True):
        mean = {v: sum(scores[row, v].item() for row in rows[volume]) / len(rows[volume]) for v in pool}
        above = sum(mean[v] > mean[volume] + 1e-6 for v in pool)
        level = sum(abs(mean[v] - mean[volume]) < 1e-6 for v in pool)
        assert rank == pytest.approx(1 + above + (level - 1) / 2)


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
