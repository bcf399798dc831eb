"""Places of sentences, against plain loops and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from custom_components.evaluation.places import OPPOSITES, Similarities, grounding, patches_of_mask, specificity

SIDE, LEVEL = OPPOSITES["side"], OPPOSITES["level"]


def test_grounding_against_plain_loops():
    rng = np.random.default_rng(0)
    volumes, patches = 5, 12
    places = [
        {"volume": v, "finding": f, "patches": torch.from_numpy(rng.random(patches) < 0.4)}
        for v in range(volumes)
        for f in ("a", "b")
    ]
    most_similar = torch.from_numpy(rng.integers(patches, size=(len(places), volumes)))
    found = grounding(places, most_similar)
    for finding in ("a", "b"):
        hit, shuffled, chance, prior = [], [], [], []
        for i, place in enumerate(places):
            if place["finding"] != finding:
                continue
            mask, own = place["patches"].tolist(), place["volume"]
            hit.append(mask[most_similar[i, own]])
            shuffled.append(np.mean([mask[most_similar[i, v]] for v in range(volumes) if v != own]))
            chance.append(sum(mask) / patches)
            peers = [p["patches"].tolist() for p in places if p["finding"] == finding and p["volume"] != own]
            votes = [sum(peer[n] for peer in peers) for n in range(patches)]
            prior.append(mask[votes.index(max(votes))])
        entry = found["per_finding"][finding]
        assert entry["sentences"] == volumes
        for key, values in (("hit", hit), ("hit_shuffled", shuffled), ("chance", chance), ("no_image_prior", prior)):
            assert entry[key] == pytest.approx(np.mean(values)), key
    assert found["hit"] == pytest.approx(np.mean([found["per_finding"][f]["hit"] for f in ("a", "b")]))


def test_patches_of_mask_marks_every_patch_with_a_voxel_of_it():
    mask = torch.zeros(1, 8, 4, 6)
    mask[0, 7, 0, 3] = 1  # patch (1, 0, 1) of a 2 x 2 x 3 grid, last axis fastest
    assert patches_of_mask(mask, (4, 2, 2)).nonzero().flatten().tolist() == [1 * 6 + 0 * 3 + 1]


@pytest.mark.parametrize(
    ("opposites", "sentence", "expected"),
    [
        (SIDE, "Left pleural effusion.", (0, "Right pleural effusion.")),
        (SIDE, "Nodules in the right lower and right mid zone.", (1, "Nodules in the left lower and left mid zone.")),
        (SIDE, "Nodules in the right upper and left lower zones.", None),
        (SIDE, "Emphysema in both lungs.", None),
        (SIDE, "Plaque in the left anterior descending artery.", None),
        (SIDE, "Plaque in the left anterior descending artery and a right effusion.",
         (1, "Plaque in the left anterior descending artery and a left effusion.")),
        (LEVEL, "Emphysema in both upper lobes.", (1, "Emphysema in both lower lobes.")),
        (LEVEL, "A nodule in the left mid zone.", None),
    ],
)  # fmt: skip
def test_a_sentence_and_its_opposite(opposites, sentence, expected):
    assert opposites.swap(sentence) == expected


def test_the_half_that_a_mask_lies_in():
    mask = torch.zeros(1, 4, 4, 5)
    mask[0, 2:, :, 0] = 1
    assert SIDE.half(mask) == 1 and LEVEL.half(mask) == 0
    mask[0, 0, :2, 0] = 1  # 2 of 10 voxels on the other side
    assert SIDE.half(mask) is None and LEVEL.half(mask) == 0
    middle = torch.zeros(1, 4, 4, 5)
    middle[..., 2] = 1
    assert LEVEL.half(middle) is None and SIDE.half(torch.zeros(1, 4, 4, 5)) is None


def test_preferring_a_findings_usual_half_needs_no_image():
    """Emphysema is mostly in upper lobes: a network that always prefers "upper" is right there."""
    halves = {"emphysema": (1, 1, 1, 0), "nodule": (0, 1, 0)}
    cases = [
        {"volume": volume, "finding": name, "own": half, "swapped": 1 - half, "half": half}
        for name, of_volumes in halves.items()
        for volume, half in enumerate(of_volumes)
    ]
    upper = Similarities(torch.tensor([[0.0], [1.0]]).expand(2, 4), torch.zeros(2, 4, dtype=torch.long))
    found = specificity(cases, upper, upper, LEVEL, (1, 1, 2), seed=0)
    assert found["per_finding"]["emphysema"]["no_image_prior"] == found["per_finding"]["emphysema"]["simcrop"] == 0.75
    assert found["per_finding"]["nodule"]["no_image_prior"] == pytest.approx(2 / 3)
    assert found["no_image_prior"] == pytest.approx(5 / 7) and found["simcrop"] == pytest.approx(4 / 7)


def test_specificity_by_hand():
    grid = (2, 1, 3)  # patches 0, 1, 2 lie left, 3, 4, 5 right; upwards from 0 and from 3
    # rows 0 and 1 are a sentence and its opposite, rows 2 and 3 another
    scores = torch.tensor([[0.9, 0.5], [0.1, 0.5], [0.0, 0.2], [0.0, 0.3]])
    most_similar = torch.tensor([[0, 5], [1, 1], [0, 4], [0, 0]])
    cases = [
        {"volume": 0, "finding": "a", "own": 0, "swapped": 1, "half": 0},  # higher, on its side
        {"volume": 1, "finding": "a", "own": 0, "swapped": 1, "half": 0},  # tie, on the other
        {"volume": 1, "finding": "b", "own": 2, "swapped": 3, "half": 1},  # lower, on its side
    ]
    random = Similarities(torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.long))
    found = specificity(cases, Similarities(scores, most_similar), random, SIDE, grid, seed=0)
    assert (found["simcrop"], found["peak"], found["sentences"]) == (0.5, pytest.approx(2 / 3), 3)
    assert (found["random_encoder"], found["random_peak"]) == (0.5, pytest.approx(2 / 3))
    assert 0 <= found["low"] <= found["simcrop"] <= found["high"] <= 1
    assert found["per_finding"]["a"]["simcrop"] == 0.75 and found["per_finding"]["b"]["simcrop"] == 0
    # on the way up patch 1 and patch 4 are the middle of three: half a hit
    assert LEVEL.lies_in(torch.tensor([0, 1, 2, 3, 5]), torch.ones(5), grid).tolist() == [0, 0.5, 1, 0, 1]
