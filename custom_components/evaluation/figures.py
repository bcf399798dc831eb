"""The pictures: training, ROC and precision-recall curves, box plots, heat maps and contours over CT slices.

A picture is not worth a run: the functions return figures, and :func:`save` makes of one that cannot be drawn or
written a warning.

Slices are shown as radiologists see them: axial from below, so the patient's right is on the left of the picture.
Volumes are in RAS axis order, as every preprocessing chain of this project leaves them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ignite.engine import Engine, Events
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from sklearn.metrics import ConfusionMatrixDisplay, PrecisionRecallDisplay, RocCurveDisplay
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from custom_components.data.save import argmax_labels
from custom_components.files import not_worth_a_run, picture, remove_temporary

CT = {"cmap": "gray", "vmin": -1, "vmax": 0.4}
HEAT = {"cmap": "inferno", "alpha": 0.45}
COLOURS = tuple(colormaps["tab20"].colors[::2] + colormaps["tab20"].colors[1::2])  # of classes 1, 2, ...
PLANES = {2: "axial", 1: "coronal", 0: "sagittal"}


def save(path: str | Path, draw: Callable[..., Figure], *args: Any) -> None:
    """Write the figure that ``draw(*args)`` returns; a warning where drawing or writing fails."""
    remove_temporary(path)
    with picture(path) as file:
        draw(*args).savefig(file, dpi=120)


def plane(volume: Tensor | np.ndarray, axis: int, index: int) -> np.ndarray:
    """A slice of a RAS volume ``[X, Y, Z]`` across ``axis`` (see PLANES), rows from the bottom: anterior is left in
    sagittal and up in axial ones, the patient's right is left in axial and coronal ones."""
    return np.take(np.asarray(volume), index, axis)[::-1].T


def show_plane(
    axes: Axes, volume: Tensor | np.ndarray, axis: int, index: int, spacing: Sequence[float], **style: Any
) -> None:
    """Draw a :func:`plane` of a RAS volume ``[X, Y, Z]`` in the proportions of the patient."""
    across, up = (size for i, size in enumerate(spacing) if i != axis)
    axes.imshow(plane(volume, axis, index), origin="lower", aspect=up / across, **style)
    axes.set_axis_off()


def outline_plane(
    axes: Axes, mask: Tensor | np.ndarray, axis: int, index: int, colour: str = "#00e5ff", **style: Any
) -> None:
    """Outline a RAS mask ``[X, Y, Z]``, to go over :func:`show_plane`."""
    area = plane(mask, axis, index).astype(float)
    if area.any():
        axes.contour(area, levels=[0.5], colors=colour, **({"linewidths": 1.2} | style))


def spacing_of(image: Tensor) -> tuple[float, float, float]:
    """Voxel spacing in mm of a MetaTensor; 1 mm for a tensor that knows none."""
    return tuple(image.pixdim.tolist()) if isinstance(image, MetaTensor) else (1.0, 1.0, 1.0)


def loss_curves(log_dir: str | Path) -> Figure:
    """One panel per scalar of a TensorBoard folder, over iterations, with a running mean."""
    events = EventAccumulator(str(log_dir), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    if not tags:
        raise ValueError(f"{log_dir} holds no curves")
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
    return figure


class SentencePaneld(MapTransform):
    """Draws the CT with the map of every sentence, and saves it as ``<output_dir>/<name>/panel.png``.

    Reads ``image [1, X, Y, Z]`` and ``name`` too. Works on the network's grid, so it stands before the maps are brought
    back to the scan's geometry.

    Args:
        keys: of the maps ``[S, X, Y, Z]``.
        sentences: the S sentences, or whatever else the maps are of.
        quantity: what the maps hold.
    """

    def __init__(
        self,
        keys: KeysCollection,
        sentences: Sequence[str],
        output_dir: str,
        quantity: str = "cosine",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.sentences = list(sentences)
        self.output_dir = Path(output_dir)
        self.quantity = quantity

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        data = dict(data)
        path = self.output_dir / data["name"] / "panel.png"
        for key in self.key_iterator(data):
            save(path, self.draw, data["image"].cpu(), data[key].cpu())
        return data

    def draw(self, image: MetaTensor, maps: Tensor) -> Figure:
        """A row a sentence: the slice of its highest value, without and with its map."""
        figure = Figure(figsize=(6.4, 3.3 * len(self.sentences)), layout="constrained")
        rows = figure.subplots(len(self.sentences), 2, squeeze=False)
        for row, sentence, heat in zip(rows, self.sentences, maps, strict=True):
            z = int(heat.amax((0, 1)).argmax())
            low, high = float(heat.min()), float(heat.max())
            for axes in row:
                show_plane(axes, image[0], 2, z, spacing_of(image), **CT)
            show_plane(row[1], heat, 2, z, spacing_of(image), vmin=low, vmax=high, **HEAT)
            row[0].set_title(sentence, fontsize=9, loc="left")
            row[1].set_title(f"{self.quantity} {low:.2f} to {high:.2f}", fontsize=9, loc="right")
        return figure


def most_classes(labels: np.ndarray, axis: int) -> int:
    """The slice across ``axis`` that meets most classes of a label map ``[X, Y, Z]``, and of those most voxels."""
    others = tuple(i for i in range(3) if i != axis)
    present = sum((labels == index).any(others).astype(int) for index in np.unique(labels) if index)
    voxels = (labels > 0).sum(others)
    return int(np.argmax(present + voxels / (1 + voxels.max())))


def contours(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> Figure:
    """Organ contours over CT in three planes, one row a scan; solid is predicted, dotted white is the truth.

    Args:
        rows: tensors on one grid in RAS order: ``image [X, Y, Z]`` in [-1, 1], class indices ``pred [X, Y, Z]`` and,
            where it is known, ``truth``; ``spacing`` in mm, ``title``.
        classes: names of classes 1, 2, ...
    """
    figure = Figure(figsize=(11, 3.6 * len(rows) + 0.4), layout="constrained")
    shown: set[int] = set()
    for row, axes_row in zip(rows, figure.subplots(len(rows), 3, squeeze=False), strict=True):
        pred, truth = row["pred"].numpy(), row["truth"].numpy() if "truth" in row else None
        for axis, axes in zip(PLANES, axes_row, strict=True):
            index = most_classes(pred if truth is None else truth, axis)
            show_plane(axes, row["image"], axis, index, row["spacing"], **CT)
            for c in range(1, len(classes) + 1):
                outline_plane(axes, pred == c, axis, index, COLOURS[(c - 1) % len(COLOURS)])
                shown |= {c} if (plane(pred, axis, index) == c).any() else set()
                if truth is not None:
                    outline_plane(axes, truth == c, axis, index, "white", linewidths=0.9, linestyles="dotted")
            axes.text(0.5, -0.02, PLANES[axis], transform=axes.transAxes, ha="center", va="top", fontsize=9)
        axes_row[0].set_title(row["title"], fontsize=10, loc="left")
    lines = [Line2D([], [], color=COLOURS[(c - 1) % len(COLOURS)], label=classes[c - 1]) for c in sorted(shown)]
    if any("truth" in row for row in rows):
        lines.append(Line2D([], [], color="grey", linestyle="dotted", label="truth"))
    if lines:
        figure.legend(handles=lines, loc="outside upper center", ncols=7, fontsize=9, frameon=False)
    return figure


class ContourPaneld(MapTransform):
    """Draws the contours of what was segmented, and saves them as ``<output_dir>/<name>/panel.png``.

    Reads ``image [1, X, Y, Z]`` and ``name`` too. Works on the network's grid, so it stands before the logits are
    brought to the scan's.

    Args:
        keys: of the logits ``[C, X, Y, Z]``.
        classes: names of classes 1, 2, ...
    """

    def __init__(self, keys: KeysCollection, classes: Sequence[str], output_dir: str) -> None:
        super().__init__(keys)
        self.classes = list(classes)
        self.output_dir = Path(output_dir)

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        data = dict(data)
        image = data["image"].cpu()
        for key in self.key_iterator(data):
            pred = argmax_labels(data[key].cpu())
            row = {"image": image[0], "pred": pred, "spacing": spacing_of(image), "title": data["name"]}
            save(self.output_dir / data["name"] / "panel.png", contours, [row], self.classes)
        return data


@dataclass
class ContourImages:
    """Writes the contours of a validation's first scan to TensorBoard, prediction over truth.

    Attach it to the evaluator, whose output holds ``image`` and the class indices ``pred`` and ``label``, on one grid.

    Args:
        classes: names of classes 1, 2, ...
    """

    log_dir: str
    classes: Sequence[str]

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.write)

    def write(self, engine: Engine) -> None:
        if engine.state.iteration % engine.state.epoch_length != 1 % engine.state.epoch_length:
            return
        item = engine.state.output[0]
        image, pred, truth = (item[key].cpu()[0] for key in ("image", "pred", "label"))
        title = f"epoch {engine.state.epoch}"
        row = {"image": image, "pred": pred, "truth": truth, "spacing": spacing_of(item["image"]), "title": title}
        with not_worth_a_run("validation/contours"), SummaryWriter(self.log_dir) as writer:
            writer.add_figure("validation/contours", contours([row], self.classes), engine.state.epoch)


def box_plots(scores: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """One panel per metric with a box and the single scans per class.

    Args:
        scores: title of the panel -> class -> one value per scan, NaN where it is not defined.
    """
    classes = max(len(values) for values in scores.values())
    figure = Figure(figsize=(len(scores) * (2.2 + 0.35 * classes), 3.8), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores.items(), strict=True):
        defined = [v[np.isfinite(v)] for v in values.values()]
        axes.boxplot(defined, tick_labels=list(values), showfliers=False, medianprops={"color": "#08519c"})
        for i, v in enumerate(defined, 1):
            axes.plot(i + np.linspace(-0.12, 0.12, len(v)), v, "o", markersize=3, alpha=0.5, color="#6baed6")
        axes.set_title(title, fontsize=10)
        axes.tick_params(axis="x", labelrotation=30 if classes < 6 else 75, labelsize=8)
        axes.grid(axis="y", alpha=0.3)
    return figure


def bars(values: Mapping[str, Mapping[str, Mapping[str, float]]], ylabel: str) -> Figure:
    """Groups of bars with intervals: ``values`` are group -> bar -> ``mean``, ``low``, ``high``."""
    mean, low, high = (
        pd.DataFrame({g: {bar: entry[part] for bar, entry in group.items()} for g, group in values.items()}).T
        for part in ("mean", "low", "high")
    )
    figure = Figure(figsize=(2.2 + 1.7 * len(values), 3.6), layout="constrained")
    reach = np.stack([mean - low, high - mean]).transpose(2, 0, 1)  # bar, side, group
    axes = mean.plot.bar(ax=figure.subplots(), yerr=reach, capsize=3, rot=0, ylabel=ylabel, color=COLOURS)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=9)
    return figure


def roc_and_pr_curves(truth: np.ndarray, score: np.ndarray, classes: Sequence[str]) -> Figure:
    """ROC and precision-recall curve of every class with both label values; ``truth`` and ``score`` are ``[N, C]``."""
    figure = Figure(figsize=(11.0, 5.0), layout="constrained")
    roc, pr = figure.subplots(1, 2)
    for c, name in enumerate(classes):
        y, scored = truth[:, c], score[:, c]
        if np.ptp(y) > 0:
            style = {"curve_kwargs": {"color": f"C{c % 10}", "linestyle": "-" if c < 10 else "--", "linewidth": 1.2}}
            RocCurveDisplay.from_predictions(y, scored, ax=roc, name=name, **style)
            PrecisionRecallDisplay.from_predictions(y, scored, ax=pr, name=f"{name}, {y.mean():.0%} positive", **style)
    roc.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    roc.set(title="ROC", xlabel="1 - specificity", ylabel="sensitivity")
    pr.set(title="precision-recall", xlabel="sensitivity", ylabel="precision")
    for axes in (roc, pr):
        axes.legend(fontsize=6)
        axes.grid(alpha=0.3)
    return figure


def confusion_matrix(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """Counts of true class (rows) against the class of highest probability."""
    figure = Figure(figsize=(1.5 + 1.2 * len(classes), 1.2 + 1.0 * len(classes)), layout="constrained")
    axes = figure.subplots()
    display = ConfusionMatrixDisplay(np.asarray(matrix), display_labels=list(classes))
    display.plot(ax=axes, cmap="Blues", colorbar=False, xticks_rotation=30)
    return figure
