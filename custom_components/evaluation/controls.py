"""What could explain a figure away: an untrained network, the HU histogram, the raw statistics of its patches."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from custom_components.vit import PatchStatistics, SimCroPEncoder, init_weights
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import Dataset


def untrained(embedder: Any) -> Any:
    """A copy of a network around an ``encoder`` with random weights: what the architecture does alone."""
    embedder = copy.deepcopy(embedder)
    for module in embedder.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    if embedder.encoder.cls_token is not None:
        nn.init.normal_(embedder.encoder.cls_token, std=0.02)
    return embedder.apply(init_weights)


def hu_histogram(image: Tensor) -> np.ndarray:
    """Share of voxels in each of 64 equal bins over [-1, 1], float64."""
    values = torch.as_tensor(image).float()
    return torch.histc(values, 64, -1.0, 1.0).double().numpy() / values.numel()


def patch_statistics(encoder: SimCroPEncoder, pixdim: Sequence[float]) -> PatchStatistics:
    """The statistics that an encoder reads; for one that reads voxels alone, those of the recommended recipe.

    ``pixdim`` is mm per voxel.
    """
    if encoder.statistics is not None:
        return encoder.statistics.statistics
    return PatchStatistics(32, [4.0, 8.0, 14.0], pixdim, encoder.grid, encoder.patch_size)


def mean_and_maximum(statistics: PatchStatistics, volume: Tensor) -> Tensor:
    """``[B, 1, X, Y, Z]`` in [-1, 1] -> each of the F statistics' mean and maximum over the patches, ``[B, 2 F]``."""
    values = statistics(volume)
    return torch.cat([values.mean(1), values.amax(1)], dim=1)


def regression(features: np.ndarray, labels: np.ndarray) -> Pipeline:
    """A logistic regression that learned binary ``labels [N]`` from ``features [N, F]``."""
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(features, labels)


def regression_auc(
    train_features: np.ndarray, train_labels: np.ndarray | None, features: np.ndarray, labels: np.ndarray
) -> float | None:
    """AUROC of a logistic regression, features ``[N, F]`` and labels ``[N]``; None without two values to learn from."""
    if train_labels is None or set(train_labels) != {0, 1}:
        return None
    return roc_auc_score(labels, regression(train_features, train_labels).decision_function(features))


def random_probe(probe: nn.Module, seed: int) -> nn.Module:
    """A :class:`custom_components.probe.LinearProbe` with an untrained encoder in place of its own; one per seed."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        probe.encoder = untrained(probe).encoder
    return probe


def regression_scores(train_features: np.ndarray, train_labels: np.ndarray, features: np.ndarray) -> np.ndarray:
    """What a logistic regression per column of ``train_labels [N, C]`` says of ``features [M, F]``: ``[M, C]``.

    Zeros for a column with one label value, of which nothing can be learned.
    """
    models = [regression(train_features, column) if np.ptp(column) > 0 else None for column in train_labels.T]
    return np.stack([np.zeros(len(features)) if m is None else m.decision_function(features) for m in models], 1)


class RegressionProbe(nn.Module):
    """Logistic regressions on fixed ``features`` where a probe would stand: what can be said without a network."""

    frozen = True  # a FeatureCache may keep its features

    @property
    def encoder(self) -> nn.Module:
        return self

    def features(self, volume: Tensor) -> Tensor:
        """``[B, 1, X, Y, Z]`` in [-1, 1] -> ``[B, F]`` float32."""
        raise NotImplementedError

    def fit(self, dataset: Dataset) -> None:
        """Learn from ``image``, a volume or its features, and ``label``; a class with one label value scores zero."""
        features, labels = [], []
        for item in (dataset[i] for i in range(len(dataset))):
            features.append(self.features(item["image"][None])[0] if item["image"].ndim > 1 else item["image"])
            labels.append(item["label"])
        self.models = [
            regression(np.stack(features), column) if np.ptp(column) > 0 else None for column in np.stack(labels).T
        ]

    def forward(self, volume: Tensor) -> Tensor:
        return self.head(self.features(volume))

    def head(self, features: Tensor) -> Tensor:
        """``[B, F]`` -> logits ``[B, num_classes]``, float64."""
        values = features.cpu().numpy()
        scores = [m.decision_function(values) if m is not None else np.zeros(len(values)) for m in self.models]
        return torch.from_numpy(np.stack(scores, 1))


class HistogramProbe(RegressionProbe):
    """Of the HU histogram: shares of 64 bins."""

    def features(self, volume: Tensor) -> Tensor:
        return torch.stack([torch.from_numpy(hu_histogram(v.float().cpu())) for v in volume]).float()


class StatisticsProbe(RegressionProbe):
    """Of the :func:`patch_statistics` of an ``encoder``: what its input says before any weight."""

    def __init__(self, encoder: SimCroPEncoder, pixdim: Sequence[float]) -> None:
        super().__init__()
        self.statistics = patch_statistics(encoder, pixdim)

    def features(self, volume: Tensor) -> Tensor:
        return mean_and_maximum(self.statistics, volume.float().cpu())
