"""What could explain a figure away: an untrained copy of the network, and the volume's HU histogram."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import Dataset

from custom_components.vit import init_weights


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


def histogram_auc(baseline: Mapping[str, Any], column: int, histograms: np.ndarray, truth: np.ndarray) -> float | None:
    """AUROC of a logistic regression on HU histograms; None where the training items' labels do not allow one."""
    if baseline["labels"] is None or set(baseline["labels"][:, column]) != {0, 1}:
        return None
    model = histogram_regression(baseline["histograms"], baseline["labels"][:, column])
    return roc_auc_score(truth, model.decision_function(histograms))


def histogram_regression(histograms: np.ndarray, labels: np.ndarray) -> Pipeline:
    """A logistic regression that learned binary ``labels [N]`` from ``histograms [N, B]``."""
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(histograms, labels)


def random_probe(probe: nn.Module, seed: int) -> nn.Module:
    """A :class:`custom_components.probe.LinearProbe` with an untrained encoder in place of its own; one per seed."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        probe.encoder = untrained(probe).encoder
    return probe


class HistogramProbe(nn.Module):
    """Logistic regressions on the HU histogram where a probe would stand: what can be said without any features."""

    frozen = True  # a FeatureCache may keep its histograms

    @property
    def encoder(self) -> nn.Module:
        return self

    def features(self, volume: Tensor) -> Tensor:
        """``[B, 1, X, Y, Z]`` in [-1, 1] -> shares of 64 bins ``[B, 64]``."""
        return torch.stack([torch.from_numpy(hu_histogram(v.float().cpu())) for v in volume]).float()

    def fit(self, dataset: Dataset) -> None:
        """Learn from ``image``, a volume or its histogram, and ``label``; a class with one label value scores zero."""
        histograms, labels = [], []
        for item in (dataset[i] for i in range(len(dataset))):
            histograms.append(self.features(item["image"][None])[0] if item["image"].ndim > 1 else item["image"])
            labels.append(item["label"])
        self.models = [
            histogram_regression(np.stack(histograms), column) if np.ptp(column) > 0 else None
            for column in np.stack(labels).T
        ]

    def forward(self, volume: Tensor) -> Tensor:
        return self.head(self.features(volume))

    def head(self, histograms: Tensor) -> Tensor:
        """``[B, 64]`` -> logits ``[B, num_classes]``, float64."""
        values = histograms.cpu().numpy()
        scores = [m.decision_function(values) if m is not None else np.zeros(len(values)) for m in self.models]
        return torch.from_numpy(np.stack(scores, 1))
