"""Probes that know nothing of pre-training: logistic regressions on fixed features, and an untrained encoder."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from custom_components.evaluation.controls import (
    HistogramProbe,
    StatisticsProbe,
    mean_and_maximum,
    patch_statistics,
    random_probe,
    regression_auc,
)
from custom_components.probe import LinearProbe
from custom_components.run.features import FeatureDataset, OnlineFeatures
from custom_components.vit import SimCroPEncoder
from torch import Tensor
from torch.utils.data import Dataset


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


SIZES = {"img_size": (8, 8, 8), "patch_size": (4, 4, 4), "hidden_size": 24, "mlp_dim": 32, "num_heads": 3}


def test_statistics_probe_sees_what_the_whole_volumes_intensities_hide(volumes: tuple) -> None:
    """Where a bright spot is sharp, not how much is bright, tells the class: one histogram, two statistics."""
    images, items = volumes
    images = torch.full_like(images, -0.8)
    images[:, 0, ::4, ::4, ::4] = 0.1  # eight bright voxels far apart, or together
    images[1::2] = -0.8
    images[1::2, 0, :2, :2, :2] = 0.1
    images += torch.linspace(0, 0.01, len(images))[:, None, None, None, None]
    assert len(HistogramProbe().features(images).unique(dim=0)) == 1
    encoder = SimCroPEncoder(**SIZES, num_layers=1)
    probe = StatisticsProbe(encoder, (4.0, 4.0, 8.0))
    features = probe.features(images)
    assert features.shape == (20, 2 * (32 + 4 + 6))
    probe.fit(FeatureDataset(features[:, None], items))
    assert ((probe(images)[:, 0] > 0) == (torch.arange(20) % 2 == 1)).all()


def test_statistics_are_the_encoders_own_or_the_recommended_ones() -> None:
    keys = {"hu_bins": 8, "scale_space": [6.0], "pixdim": (4.0, 4.0, 8.0)}
    own = SimCroPEncoder(**SIZES, num_layers=1, **keys)
    assert patch_statistics(own, (1.0, 1.0, 1.0)) is own.statistics.statistics
    fixed = patch_statistics(SimCroPEncoder(**SIZES, num_layers=1), (4.0, 4.0, 8.0))
    assert fixed.hu_bins == 32 and fixed.num_features == 42
    volume = torch.rand(2, 1, 8, 8, 8) - 0.9
    values = own.statistics.statistics(volume)
    features = mean_and_maximum(own.statistics.statistics, volume)
    torch.testing.assert_close(features[1, :14], values[1].mean(0))
    torch.testing.assert_close(features[1, 14:], values[1].max(0).values)


def test_cached_statistics_are_of_one_scale_space() -> None:
    """Equal weights, none, do not make equal features: widths and voxels count."""

    def key(widths: list[float], pixdim: tuple) -> str:
        probe = StatisticsProbe(SimCroPEncoder(**SIZES, num_layers=1, scale_space=widths, pixdim=pixdim), pixdim)
        return OnlineFeatures(probe, [], [], []).encoder_key()

    first = key([6.0], (4.0, 4.0, 8.0))
    assert first == key([6.0], (4.0, 4.0, 8.0))
    assert len({first, key([8.0], (4.0, 4.0, 8.0)), key([6.0], (4.0, 4.0, 6.0))}) == 3


def test_regression_auc_needs_both_labels() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    features = rng.normal(size=(40, 3)) + 3 * labels[:, None]
    assert regression_auc(features[:20], labels[:20], features[20:], labels[20:]) > 0.9
    assert regression_auc(features[:20], None, features[20:], labels[20:]) is None
    assert regression_auc(features[:20], np.zeros(20), features[20:], labels[20:]) is None


def test_random_probe_is_one_per_seed_and_keeps_the_head() -> None:
    torch.manual_seed(5)
    trained = LinearProbe(SimCroPEncoder(**SIZES, num_layers=2), 2)
    first, again, other = (random_probe(copy.deepcopy(trained), seed).state_dict() for seed in (1, 1, 2))
    for name, tensor in trained.state_dict().items():
        assert torch.equal(first[name], again[name]), name
        if tensor.ndim == 2 or name.endswith("cls_token"):
            kept = name == "head.weight"
            assert torch.equal(first[name], tensor) == torch.equal(first[name], other[name]) == kept, name
