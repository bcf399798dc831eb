"""Arithmetic of masks against plain loops and every choice there is."""

import itertools

import numpy as np
import pytest
import torch
from custom_components.evaluation.masks import (
    THRESHOLDS,
    best_boxes,
    diameter,
    dice_curves,
    dice_of,
    instances,
    marked_voxels,
    matches,
)


def test_instances_hang_together_at_corners_and_are_ranked_by_size():
    mask = np.zeros((6, 5, 4), np.uint8)
    mask[0, 0, 0] = mask[5, 4, 3] = mask[4, 3, 2] = 1  # two of them touch at a corner
    found = instances(mask, None)
    assert found.max() == 2 and found[5, 4, 3] == found[4, 3, 2] == 1 and found[0, 0, 0] == 2
    mask[4, 3, 2] = 2  # numbered by its values
    assert instances(mask, None).max() == 2 and instances(mask, None)[0, 0, 0] == instances(mask, None)[5, 4, 3] == 1
    assert instances(mask, False)[0, 0, 0] == 2
    assert instances(np.array(mask > 0, np.uint8), True).max() == 1  # one instance of several parts
    assert instances(np.zeros((3, 3, 3)), None).max() == 0


def test_diameter_is_that_of_the_largest_instance():
    labels = np.zeros((9, 9, 9), int)
    labels[:2, :3, :4], labels[8, 8, 8] = 1, 2
    assert diameter(labels, 1.5 * 1.5 * 3) == pytest.approx((6 * 24 * 6.75 / np.pi) ** (1 / 3))


def test_matches_give_each_instance_one_of_the_other_side():
    truth = np.zeros((20, 4, 4), int)
    truth[0:4], truth[6:10], truth[12:13] = 1, 2, 3
    pred = np.zeros_like(truth)
    pred[0:2], pred[2:4] = 1, 2  # both halves are Dice 2/3 with the first: it is found once
    pred[9:19] = 3  # Dice 2/14 with the second, and 2/11 with the third
    assert matches(pred, truth) == 1
    pred[9:11], pred[11:19] = 4, 0  # 2/6 with the second
    assert matches(pred, truth) == 2
    assert matches(np.zeros_like(truth), truth) == 0


def slabs_of(maps, field, size=2):
    for start in range(0, maps.shape[-1], size):
        own = slice(start, start + size)
        yield own, maps[..., own], field[..., own]


def test_curves_are_the_dice_of_what_is_marked():
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(3, 5, 4, 6, generator=generator) * 2 - 1
    truth = torch.rand(5, 4, 6, generator=generator) < 0.3
    field = torch.rand(5, 4, 6, generator=generator) < 0.8
    curves = dice_curves(slabs_of(maps, field), truth)
    for t in (0, 137, 200, 301, 400):
        marked = marked_voxels(slabs_of(maps, field), [THRESHOLDS[t]] * 3, truth.shape)
        for c in range(3):
            expected = ((maps[c] >= THRESHOLDS[t]) & field).numpy()
            np.testing.assert_array_equal(marked[c], expected)
            assert curves[c, t] == pytest.approx(dice_of(expected, truth.numpy()))


def test_no_choice_of_boxes_has_a_higher_dice():
    rng = np.random.default_rng(0)
    for _ in range(20):
        total = torch.from_numpy(rng.integers(0, 9, 8))
        marked = torch.from_numpy(rng.integers(0, total.numpy() + 1))
        outside = int(rng.integers(0, 6))
        if not marked.sum():
            continue

        def dice(chosen, total=total, marked=marked, outside=outside):
            return 2 * marked[chosen].sum() / (total[chosen].sum() + marked.sum() + outside)

        best = max(dice(list(chosen)) for n in range(1, 9) for chosen in itertools.combinations(range(8), n))
        assert dice(best_boxes(marked, total, int(marked.sum()) + outside)) == pytest.approx(best)
