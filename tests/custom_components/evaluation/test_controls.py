"""Probes that know nothing of pre-training: a logistic regression on the histogram, and an untrained encoder."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from custom_components.evaluation.controls import HistogramProbe, random_probe
from custom_components.probe import LinearProbe
from custom_components.run.features import FeatureDataset
from custom_components.vit import SimCroPEncoder


@pytest.fixture
def volumes() -> tuple[Tensor, list[dict]]:
    """20 volumes of noise, brighter where class 0 is true; class 1 is true of all, class 2 of any."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(20) % 2
    noise = torch.rand(20, 1, 8, 8, 8, generator=generator) - 0.8
    labels = torch.stack([truth, torch.ones(20), torch.randint(2, (20,), generator=generator)], 1)
    return noise + 0.5 * truth[:, None, None, None, None], [{"name": str(i), "label": x} for i, x in enumerate(labels)]


class Volumes(Dataset):
    def __init__(self, volumes: Tensor, items: list[dict]) -> None:
        self.items = [{**item, "image": volume} for item, volume in zip(items, volumes, strict=True)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        return self.items[index]


def test_histogram_probe_learns_what_intensities_say(volumes: tuple) -> None:
    images, items = volumes
    probe = HistogramProbe()
    assert probe.features(images).shape == (20, 64)
    probe.fit(FeatureDataset(probe.features(images)[:, None], items))
    logits = probe(images)
    assert ((logits[:, 0] > 0) == (torch.arange(20) % 2 == 1)).all()
    assert (logits[:, 1] == 0).all() and logits[:, 2].std() > 0
    # volumes themselves, as they come where features are not cached, teach the same
    online = HistogramProbe()
    online.fit(Volumes(images, items))
    torch.testing.assert_close(online(images), logits)


def test_random_probe_is_one_per_seed_and_keeps_the_head() -> None:
    torch.manual_seed(5)
    sizes = {"img_size": (8, 8, 8), "patch_size": (4, 4, 4), "hidden_size": 24, "mlp_dim": 32}
    trained = LinearProbe(SimCroPEncoder(**sizes, num_layers=2, num_heads=3), 2)
    first, again, other = (random_probe(copy.deepcopy(trained), seed).state_dict() for seed in (1, 1, 2))
    for name, tensor in trained.state_dict().items():
        assert torch.equal(first[name], again[name]), name
        if tensor.ndim == 2 or name.endswith("cls_token"):
            kept = name == "head.weight"
            assert torch.equal(first[name], tensor) == torch.equal(first[name], other[name]) == kept, name
