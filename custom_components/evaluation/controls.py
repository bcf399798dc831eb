"""What could explain a figure away: an untrained copy of the network, and the volume's HU histogram."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from custom_components.probe import LinearProbe
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
    return roc_auc_score(truth, histogram_scores(baseline["histograms"], baseline["labels"][:, column], histograms))


def histogram_scores(train: np.ndarray, labels: np.ndarray, histograms: np.ndarray) -> np.ndarray:
    """Scores ``[N]`` of a logistic regression that learned binary ``labels [T]`` from histograms ``train [T, B]``."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return model.fit(train, labels).decision_function(histograms)


def random_probe(probe: LinearProbe, seed: int) -> LinearProbe:
    """A copy of a probe whose encoder is untrained, the same for every call with one seed."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return untrained(probe)


class HuHistogram(nn.Module):
    """HU histogram in the place of an encoder: what can be told without any features. Goes into a FeatureCache."""

    frozen = True

    @property
    def encoder(self) -> nn.Module:
        return self

    def features(self, volume: Tensor) -> Tensor:
        """``[B, 1, X, Y, Z]`` in [-1, 1] -> shares of 64 bins ``[B, 64]``."""
        return torch.stack([torch.from_numpy(hu_histogram(v.float().cpu())) for v in volume]).float()
