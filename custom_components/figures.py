"""The pictures: training, ROC and precision-recall curves, confusion matrices, and heat maps over CT slices.

Slices are shown as radiologists see them: axial from below, so the patient's right is on the left of the picture.
Volumes are in RAS axis order, as every preprocessing chain of this project leaves them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from sklearn.metrics import (
    ConfusionMatrixDisplay,
    average_precision_score,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from custom_components.losses import SimCroPLoss
from custom_components.simcrop import SimCroP, VolumeEmbedder, similarity, upsample_patches
from custom_components.text import encode_sentences
from custom_components.vit import patchify, unpatchify

HEAT = {"cmap": "inferno", "alpha": 0.45}


def show_axial(axes: Axes, volume: Tensor | np.ndarray, z: int, spacing: Sequence[float], **style: Any) -> None:
    """Draw slice ``z`` of a RAS volume ``[X, Y, Z]``, anterior up, the patient's right on the left."""
    axes.imshow(np.asarray(volume[:, :, z])[::-1].T, origin="lower", aspect=spacing[1] / spacing[0], **style)
    axes.set_axis_off()


def outline_axial(axes: Axes, mask: Tensor | np.ndarray, z: int, colour: str = "#00e5ff") -> None:
    """Outline a RAS mask ``[X, Y, Z]`` on slice ``z``, to go over :func:`show_axial`."""
    area = np.asarray(mask[:, :, z], dtype=float)[::-1].T
    if area.any():
        axes.contour(area, levels=[0.5], colors=colour, linewidths=1.2)


def spacing_of(image: Tensor) -> tuple[float, float, float]:
    """Voxel spacing in mm of a MetaTensor; 1 mm for a tensor that knows none."""
    x, y, z = image.pixdim.tolist() if isinstance(image, MetaTensor) else (1.0, 1.0, 1.0)
    return x, y, z


def loss_curves(log_dir: str | Path, path: str | Path) -> None:
    """One panel per scalar of a TensorBoard folder, over iterations, with a running mean."""
    events = EventAccumulator(str(log_dir), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    if not tags:
        return
    figure = Figure(figsize=(3.6 * len(tags), 3.0), layout="constrained")
    for axes, tag in zip(figure.subplots(1, len(tags), squeeze=False)[0], tags, strict=True):
        curve: list[tuple[int, float]] = []
        for event in events.Scalars(tag):
            # a resumed or repeated run goes over the same iterations again: the last word counts
            while curve and curve[-1][0] >= event.step:
                curve.pop()
            curve.append((event.step, event.value))
        steps, values = np.array(curve).T
        window = max(1, len(values) // 50)
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(steps, values, color="#9ecae1", linewidth=0.8)
        axes.plot(steps[window - 1 :], smooth, color="#08519c", linewidth=1.6)
        axes.set_title(tag, fontsize=10)
        axes.set_xlabel("iteration", fontsize=9)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def reconstructions(network: SimCroP, loss: SimCroPLoss, items: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Original, masked and reconstructed middle slice of each item's ``image``, one row a volume."""
    figure = Figure(figsize=(7.5, 2.6 * len(items)), layout="constrained")
    encoder = network.encoder
    device = next(encoder.parameters()).device
    for row, item in zip(figure.subplots(len(items), 3, squeeze=False), items, strict=True):
        volume = item["image"].as_tensor()[None].to(device)
        keep, masked = network.draw_masks(volume)
        tokens, _ = encoder(volume, keep)
        patches = patchify(volume, encoder.patch_size)
        target = patches[0, masked[0]]
        pred = network.volume_decoder(tokens, keep, masked)[0].float()
        if loss.volume.norm_target:  # the network tells shape only: take mean and contrast from the truth
            pred = pred * target.std(-1, keepdim=True) + target.mean(-1, keepdim=True)
        hidden, restored = patches.clone(), patches.clone()
        hidden[0, masked[0]] = -1.0
        restored[0, masked[0]] = pred
        stages = [
            unpatchify(stage, encoder.grid, encoder.patch_size)[0, 0].cpu() for stage in (patches, hidden, restored)
        ]
        for axes, stage, title in zip(row, stages, ("original", "masked", "reconstructed"), strict=True):
            show_axial(axes, stage, stage.shape[2] // 2, spacing_of(item["image"]), cmap="gray", vmin=-1, vmax=0.4)
            axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=120)


def sentence_maps(
    network: SimCroP,
    tokenizer: PreTrainedTokenizerBase,
    places: Sequence[Mapping[str, Any]],
    path: str | Path,
) -> None:
    """Similarity map of finding sentences over CT, beside the finding's true mask; one row a place.

    Args:
        places: ``image [1, X, Y, Z]``, ``mask [X, Y, Z]`` bool on the same grid, ``finding`` and ``sentence``.
    """
    embedder = VolumeEmbedder(network.encoder, network.aligner)
    device = next(network.encoder.parameters()).device
    figure = Figure(figsize=(8.4, 3.1 * len(places)), layout="constrained")
    for row, place in zip(figure.subplots(len(places), 3, squeeze=False), places, strict=True):
        image = place["image"]
        features = embedder.patches_and_embedding(image.as_tensor()[None].to(device))[0][0]
        sentence = encode_sentences([place["sentence"]], network.aligner, network.text_encoder, tokenizer)
        heat = upsample_patches(similarity(features, sentence), network.encoder.grid, image.shape[1:])[0].cpu()
        at_mask = int(place["mask"].sum((0, 1)).argmax())
        at_peak = int(heat.amax((0, 1)).argmax())
        for axes, z, heated in zip(row, (at_mask, at_mask, at_peak), (False, True, True), strict=True):
            show_axial(axes, image[0], z, spacing_of(image), cmap="gray", vmin=-1, vmax=0.4)
            if heated:
                show_axial(axes, heat, z, spacing_of(image), vmin=heat.min(), vmax=heat.max(), **HEAT)
            outline_axial(axes, place["mask"], z)
        row[0].set_title(f"“{place['sentence']}”", fontsize=10, loc="left")
        for axes, text in zip(
            row, ("CT, true mask outlined", "similarity, same slice", "slice of its peak"), strict=True
        ):
            axes.text(0.5, -0.02, text, transform=axes.transAxes, ha="center", va="top", fontsize=9)
    figure.savefig(path, dpi=120)


class SentencePaneld(MapTransform):
    """Draws the CT with the map of every sentence, and saves it as ``<output_dir>/<name>/panel.png``.

    Works on the network's grid, so it stands before the maps are brought back to the scan's geometry.

    Args:
        keys: of the maps ``[S, X, Y, Z]``.
        sentences: the S sentences, or whatever else the maps are of.
        output_dir: folder of all scans' results.
        image_key, name_key: of the preprocessed CT ``[1, X, Y, Z]``, and of the scan's name.
        quantity: what the maps hold.
        allow_missing_keys: whether to pass over scans without maps.
    """

    def __init__(
        self,
        keys: KeysCollection,
        sentences: Sequence[str],
        output_dir: str,
        image_key: str = "image",
        name_key: str = "name",
        quantity: str = "cosine",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.sentences = list(sentences)
        self.output_dir = Path(output_dir)
        self.image_key = image_key
        self.name_key = name_key
        self.quantity = quantity

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        data = dict(data)
        image = data[self.image_key].cpu()
        folder = self.output_dir / data[self.name_key]
        for key in self.key_iterator(data):
            folder.mkdir(parents=True, exist_ok=True)
            figure = Figure(figsize=(6.4, 3.3 * len(self.sentences)), layout="constrained")
            rows = figure.subplots(len(self.sentences), 2, squeeze=False)
            for row, sentence, heat in zip(rows, self.sentences, data[key].cpu(), strict=True):
                z = int(heat.amax((0, 1)).argmax())
                low, high = float(heat.min()), float(heat.max())
                for axes in row:
                    show_axial(axes, image[0], z, spacing_of(image), cmap="gray", vmin=-1, vmax=0.4)
                show_axial(row[1], heat, z, spacing_of(image), vmin=low, vmax=high, **HEAT)
                row[0].set_title(sentence, fontsize=9, loc="left")
                row[1].set_title(f"{self.quantity} {low:.2f} to {high:.2f}", fontsize=9, loc="right")
            figure.savefig(folder / "panel.png", dpi=120)
        return data


def roc_and_pr_curves(truth: np.ndarray, score: np.ndarray, classes: Sequence[str], path: str | Path) -> None:
    """ROC and precision-recall curve of every class that has both label values.

    Args:
        truth: ``[N, C]`` zeros and ones.
        score: ``[N, C]``.
        classes: C names.
    """
    figure = Figure(figsize=(11.0, 5.0), layout="constrained")
    roc, pr = figure.subplots(1, 2)
    colours = [f"C{i}" for i in range(10)]
    for c, name in enumerate(classes):
        if len(np.unique(truth[:, c])) < 2:
            continue
        style = {"color": colours[c % 10], "linestyle": "-" if c < 10 else "--", "linewidth": 1.2}
        false_positive, true_positive, _ = roc_curve(truth[:, c], score[:, c])
        precision, recall, _ = precision_recall_curve(truth[:, c], score[:, c])
        roc.plot(false_positive, true_positive, label=f"{name}: {roc_auc_score(truth[:, c], score[:, c]):.3f}", **style)
        precision_of_class = average_precision_score(truth[:, c], score[:, c])
        label = f"{name}: {precision_of_class:.3f} (share {truth[:, c].mean():.3f})"
        pr.step(recall, precision, where="post", label=label, **style)
    roc.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    for axes, title, x, y in (
        (roc, "ROC, with AUROC", "1 - specificity", "sensitivity"),
        (pr, "precision-recall, with average precision", "sensitivity", "precision"),
    ):
        axes.set(title=title, xlabel=x, ylabel=y, xlim=(0, 1), ylim=(0, 1.01))
        axes.legend(fontsize=6)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def confusion_matrix(matrix: Sequence[Sequence[int]], classes: Sequence[str], path: str | Path) -> None:
    """Counts of true class (rows) against the class of highest probability."""
    figure = Figure(figsize=(1.5 + 1.2 * len(classes), 1.2 + 1.0 * len(classes)), layout="constrained")
    axes = figure.subplots()
    display = ConfusionMatrixDisplay(np.asarray(matrix), display_labels=list(classes))
    display.plot(ax=axes, cmap="Blues", colorbar=False, xticks_rotation=30)
    figure.savefig(path, dpi=120)
