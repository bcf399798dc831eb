"""The evaluation's arithmetic against plain loops; the whole of it runs in ``tests/bundles/test_pretrain.py``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from custom_components.evaluation.controls import hu_histogram, untrained
from custom_components.evaluation.pretrain import grounding, patches_of_mask
from custom_components.simcrop import VolumeEmbedder


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


def test_hu_histogram_counts_shares():
    image = MetaTensor(torch.tensor([-1.0, -0.99, 0.01, 1.0]).reshape(1, 2, 2, 1))
    histogram = hu_histogram(image)
    assert histogram[0] == 0.5 and histogram[32] == 0.25 and histogram[63] == 0.25


def test_untrained_leaves_the_trained_network_alone(network):
    model = network()
    trained = VolumeEmbedder(model.encoder, model.aligner)
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    other = untrained(trained).state_dict()
    for name, value in trained.state_dict().items():
        assert torch.equal(value, before[name])
    assert not torch.equal(other["encoder.blocks.0.attn.qkv.weight"], before["encoder.blocks.0.attn.qkv.weight"])
    assert not torch.equal(other["encoder.cls_token"], before["encoder.cls_token"])
