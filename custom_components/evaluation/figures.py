"""The pictures: training, ROC and precision-recall curves, box plots, heat maps and contours over CT slices.

A picture is not worth a run: the functions return figures, and :func:`save` makes of one that cannot be drawn or
written a warning.

Slices are shown as radiologists see them: axial from below, so the patient's right is on the left of the picture.
Volumes are in RAS axis order, as every preprocessing chain of this project leaves them.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from custom_components.data.save import argmax_labels
from custom_components.files import not_worth_a_run, picture, remove_temporary
from ignite.engine import Engine, Events
from matplotlib import color_sequences, colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from sklearn.metrics import ConfusionMatrixDisplay, PrecisionRecallDisplay, RocCurveDisplay
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

CT = {"cmap": "gray", "vmin": -1, "vmax": 0.4}
LUNG, SOFT_TISSUE, BOTH = (-1350, 150), (-160, 240), (-1150, 350)  # HU
OUTLINE, TRUTH = "#00e5ff", "#7dff5a"
COMPARED = 4  # sentences at most of which each is shown on the slices of all
# of classes 1, 2, ...: ten that people with any colour vision tell apart, then more
COLOURS = tuple(color_sequences["petroff10"] + color_sequences["tab20"][1::2])
STYLES = ("solid", (0, (4, 1.5)), (0, (6, 1, 1, 1)))  # of curves that may lie on one another
HIDDEN = "#27587f"  # petroff10's blue, darkened: no grey, hence no HU
UNDER = {"linewidths": 2.4}  # black, so that a white line upon it shows over bone as over air
DOTTED = {"linewidths": 1.0, "linestyles": "dotted"}
MINUS = "\N{MINUS SIGN}"
PLANES = {2: "axial", 1: "coronal", 0: "sagittal"}
SIDES = {2: "RL", 1: "RL", 0: "AP"}  # left and right of a plane


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
    axes: Axes, mask: Tensor | np.ndarray, axis: int, index: int, colour: str = OUTLINE, **style: Any
) -> None:
    """Outline a RAS mask ``[X, Y, Z]``, to go over :func:`show_plane`."""
    area = plane(mask, axis, index).astype(float)
    if area.any():
        axes.contour(area, levels=[0.5], colors=colour, **({"linewidths": 1.2} | style))


def spacing_of(image: Tensor) -> tuple[float, float, float]:
    """Voxel spacing in mm of a MetaTensor; 1 mm for a tensor that knows none."""
    return tuple(image.pixdim.tolist()) if isinstance(image, MetaTensor) else (1.0, 1.0, 1.0)


def loss_curves(log_dir: str | Path) -> Figure:
    """One panel per scalar of a TensorBoard folder, over iterations, with a running mean, and its held-out values."""
    events = EventAccumulator(str(log_dir), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("held_out/")]
    if not tags:
        raise ValueError(f"{log_dir} holds no curves")
    curves = {tag: _curve(events, tag) for tag in events.Tags()["scalars"]}
    tags.sort(key=lambda tag: (not tag.startswith("loss/"), tag != "loss/total", tag))  # the rate apart, at the end
    columns = min(3, len(tags))
    lines = -(-len(tags) // columns)
    figure = Figure(figsize=(3.0 * columns, 2.5 * lines + 0.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for tag, axes in zip(tags, grid, strict=False):
        steps, values = curves[tag]
        axes.set(xlabel="iteration", title={"lr": "learning rate"}.get(tag, tag.removeprefix("loss/")))
        axes.grid(alpha=0.3)
        if not tag.startswith("loss/"):
            axes.plot(steps, values, color="#555555", linewidth=1.6)
            continue
        axes.set_ylabel("loss")
        window = max(1, len(values) // 50)
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(steps, values, color="#9ecae1", linewidth=0.8, label="training")
        axes.plot(steps[window - 1 :], smooth, color="#08519c", linewidth=1.6, label="training, running mean")
        if (held_out := tag.replace("loss/", "held_out/")) in curves:
            axes.plot(*curves[held_out], "o--", color="#d95f02", markersize=4, linewidth=1.2, label="held out")
    for axes in grid:  # what zip() left of the iterator
        axes.remove()
    drawn = {line.get_label(): line for axes in figure.axes for line in axes.get_lines() if line.get_label()[0] != "_"}
    if drawn:
        figure.legend(handles=list(drawn.values()), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _curve(events: EventAccumulator, tag: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a scalar; where a resumed or repeated run went over the same steps again, its last word."""
    curve: list[tuple[int, float]] = []
    for event in events.Scalars(tag):
        while curve and curve[-1][0] >= event.step:
            curve.pop()
        curve.append((event.step, event.value))
    steps, values = np.array(curve).T
    return steps, values


def canonical(volume: MetaTensor) -> tuple[np.ndarray, np.ndarray]:
    """A view ``[C, X, Y, Z]`` whose axes point to R, A and S as nearly as a volume's own allow, and its affine.

    A :func:`plane` of it has the patient's right on the left, however the file stores its axes.
    """
    affine = volume.affine.cpu().double().numpy()
    turned = nib.io_orientation(affine)
    array = nib.apply_orientation(np.moveaxis(volume.as_tensor().cpu().numpy(), 0, -1), turned)
    return np.moveaxis(array, -1, 0), affine @ nib.orientations.inv_ornt_aff(turned, volume.shape[1:])


def height_of(affine: np.ndarray, shape: Sequence[int], index: int) -> str:
    """Where the middle of an axial slice of a :func:`canonical` volume lies, in the words of the tables."""
    z = (affine @ [(shape[0] - 1) / 2, (shape[1] - 1) / 2, index, 1])[2]
    return f"z = {z:.0f} mm".replace("-", MINUS)


def tall(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Height over width of an axial slice of a RAS volume, by which figures leave no empty bands."""
    return shape[1] * spacing[1] / (shape[0] * spacing[0])


def wrapped(text: str, width: int) -> str:
    """Lines of text, those longer than ``width`` broken."""
    return "\n".join(textwrap.fill(line, width) for line in text.split("\n"))


def dark(figure: Figure, axes: Any) -> None:
    """White on black, as CT is read; slices stand right below their titles, for which the layout leaves room."""
    figure.set_facecolor("black")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    for each in axes.flat:
        each.set_anchor("N")
        each.set_facecolor("black")
        each.set_axis_off()


def show_ct(
    axes: Axes, ct: np.ndarray, index: int, spacing: Sequence[float], window: tuple[float, float], place: str = ""
) -> None:
    """An axial slice of a :func:`canonical` CT ``[X, Y, Z]`` in HU, with the patient's sides marked and its place."""
    low, high = window
    show_plane(axes, ct, 2, index, spacing, cmap="gray", vmin=low, vmax=high, interpolation="bilinear")
    words = {"color": "white", "fontsize": 8, "transform": axes.transAxes}
    axes.text(0.02, 0.5, "R", ha="left", va="center", **words)
    axes.text(0.98, 0.5, "L", ha="right", va="center", **words)
    axes.text(0.02, 0.02, place, ha="left", va="bottom", **words)


class Heat:
    """One colour scale for maps that are compared, from their median to their maximum.

    Colour grows opaque with the value, so that anatomy shows through what is ordinary. Outlines lie at ``threshold``,
    half of the scale if None.

    Args:
        maps: each ``[X, Y, Z]``; what is NaN is not shown.
    """

    def __init__(self, maps: Sequence[np.ndarray], threshold: float | None = None) -> None:
        some = [part[tuple(slice(None, None, -(-size // 64)) for size in part.shape)] for part in maps]
        self.low = float(np.nanmedian(np.concatenate([part.ravel() for part in some])))
        self.high = float(max(np.fmax.reduce(part, axis=None) for part in maps))  # which copies none
        self.threshold = (self.low + self.high) / 2 if threshold is None else threshold
        colours = colormaps["inferno"](np.linspace(0.3, 1, 256))
        colours[:, 3] = np.linspace(0, 0.75, 256)
        self.mappable = ScalarMappable(Normalize(self.low, max(self.high, self.low + 1e-6)), ListedColormap(colours))

    def show(self, axes: Axes, heat: np.ndarray, index: int, spacing: Sequence[float]) -> None:
        """Lay an axial slice of a map ``[X, Y, Z]`` over the CT, with its outline."""
        show_plane(axes, heat, 2, index, spacing, norm=self.mappable.norm, cmap=self.mappable.cmap)
        field = np.isfinite(heat[..., [index]])
        outline_plane(axes, np.where(field, heat[..., [index]], -np.inf) > self.threshold, 2, 0)
        if not field.all():
            outline_plane(axes, field, 2, 0, "lightgrey", linewidths=0.8, linestyles="dotted")

    def bar(self, figure: Figure, axes: Any, label: str) -> None:
        """The scale beside ``axes``, as it looks over black, with the threshold."""
        # which leaves the anchors of dark() as they are
        bar = figure.colorbar(self.mappable, ax=axes, aspect=40, fraction=0.02, pad=0.01, panchor=False)
        bar.ax.set_facecolor("black")
        bar.ax.axhline(self.threshold, color=OUTLINE, linewidth=1.2)
        bar.ax.tick_params(colors="white", labelsize=8)
        bar.outline.set_edgecolor("grey")
        bar.set_label(label, color="white", fontsize=9)


def sentence_panel(
    ct: MetaTensor, maps: MetaTensor, titles: Sequence[str], quantity: str = "cosine", threshold: float | None = None
) -> Figure:
    """A row a map: the slice of its peak, in two windows, and what the maps say there, in the colours of one scale.

    Every row shows all maps, so that they can be compared on a slice, or, of more than :data:`COMPARED`, its own.

    Args:
        ct: ``[1, X, Y, Z]`` in HU.
        maps: ``[S, X, Y, Z]`` on the grid of the CT, NaN where nothing is known.
        titles: of the S maps.
        quantity: what the maps hold.
        threshold: see :class:`Heat`.
    """
    (scan,), affine = canonical(ct)
    heats, _ = canonical(maps)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    compared = len(titles) <= COMPARED
    columns = 2 + (len(titles) if compared else 1)
    titles = [wrapped(title, 36) for title in titles]
    heads = 0.17 * (1 + max(title.count("\n") for title in titles)) * (1 if compared else len(titles))
    height = 2.83 * tall(scan.shape, spacing) * len(titles) + heads + 0.45
    figure = Figure(figsize=(2.9 * columns + 0.8, height), layout="constrained")
    grid = figure.subplots(len(titles), columns, squeeze=False)
    dark(figure, grid)
    heat = Heat(heats, threshold)
    for i, (row, own) in enumerate(zip(grid, heats, strict=True)):
        peak = np.unravel_index(np.nanargmax(own), own.shape)
        place = height_of(affine, scan.shape, peak[2])
        for axes, title, window in zip(row, ("lung window", "soft-tissue window"), (LUNG, SOFT_TISSUE), strict=False):
            show_ct(axes, scan, peak[2], spacing, window, place)
            axes.set_title(title if i == 0 else "", fontsize=10, color="white")
        for axes, j in zip(row[2:], range(len(titles)) if compared else [i], strict=True):
            show_ct(axes, scan, peak[2], spacing, BOTH, place)
            heat.show(axes, heats[j], peak[2], spacing)
            if i == j:  # as plane() turns it
                axes.plot(scan.shape[0] - 1 - peak[0], peak[1], "+", color="white", markersize=9)
            if i == 0 or not compared:
                axes.set_title(titles[j], fontsize=10, color="white")
    heat.bar(figure, grid, quantity)
    words = "the slice where the map is highest, at the +"
    if len(titles) > 1:
        words = "each row: the slice where one map is highest, at its +"
    words += f"; outlined above {heat.threshold:.2f}"
    words += "" if np.isfinite(heats).all() else "; dotted: the field that the network saw"
    figure.supxlabel(words, color="white", fontsize=9)
    return figure


class SentencePaneld(MapTransform):
    """Saves a :func:`sentence_panel` of every scan as ``<output_dir>/<name>/panel.png``.

    The scan is read again, at its own resolution, from where ``image`` came from.

    Args:
        keys: of the maps ``[S, X, Y, Z]`` in the scan's geometry, see :class:`custom_components.data.save.MapsInScand`.
        names: of the S maps.
        reader: of the scan, as the first transform of the preprocessing.
        score_key: of the scores [S] that titles tell, or None.
    """

    def __init__(
        self,
        keys: KeysCollection,
        names: Sequence[str],
        output_dir: str,
        reader: Callable,
        quantity: str = "cosine",
        threshold: float | None = None,
        score_key: str | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.names, self.output_dir, self.reader = list(names), Path(output_dir), reader
        self.quantity, self.threshold, self.score_key = quantity, threshold, score_key

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        data = dict(data)
        for key in self.key_iterator(data):
            titles = self.names
            if self.score_key is not None:
                scores = data[self.score_key].tolist()
                titles = [f"{name}\nscore {score:.2f}" for name, score in zip(titles, scores, strict=True)]
            ct = self.reader({"image": data["image"].meta["filename_or_obj"]})["image"]
            path = self.output_dir / data["name"] / "panel.png"
            save(path, sentence_panel, ct, data[key], titles, self.quantity, self.threshold)
        return data


def told_looked_there(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """What the network was told, where it looked, and what was there: two slices a finding, in one colour scale.

    Args:
        rows: of a finding each. ``told``, its title; on one grid in RAS order ``image [1, X, Y, Z]`` in [-1, 1], a
            MetaTensor, its ``heat [X, Y, Z]``, and the true ``mask [X, Y, Z]``.
    """
    pairs = -(-len(rows) // 2)
    titles = [wrapped(row["told"], 70) for row in rows]
    height = 2.55 * max(tall(row["heat"].shape, spacing_of(row["image"])) for row in rows)
    height += 0.36 + 0.16 * (1 + max(title.count("\n") for title in titles))
    figure = Figure(figsize=(11.6, height * pairs + 0.5), layout="constrained")
    grid = figure.subplots(pairs, 5, squeeze=False, width_ratios=[1, 1, 0.04, 1, 1])
    dark(figure, grid)
    heat = Heat([row["heat"].numpy() for row in rows])
    panels = [pair for line in grid for pair in (line[:2], line[3:])]
    for row, title, (looked, there) in zip(rows, titles, panels, strict=False):
        image, affine = row["image"][0].as_tensor().numpy(), row["image"].affine.numpy()
        values, mask = row["heat"].numpy(), row["mask"].numpy()
        x, y, z = np.unravel_index(values.argmax(), values.shape)
        spacing = spacing_of(row["image"])
        largest = int(mask.sum((0, 1)).argmax())
        places = [height_of(affine, image.shape, index) for index in (z, largest)]
        if largest != z:
            places[1] += f", {abs(largest - z) * spacing[2]:.0f} mm {'higher' if largest > z else 'lower'}"
        heads = ("where it looked: slice of the +", "what was there: its largest slice")
        for axes, index, place, head in zip((looked, there), (z, largest), places, heads, strict=True):
            show_ct(axes, image, index, spacing, (CT["vmin"], CT["vmax"]), place)
            axes.text(0.5, 1.02, head, transform=axes.transAxes, ha="center", va="bottom", color="white", fontsize=9.5)
        heat.show(looked, values, z, spacing)
        looked.plot(image.shape[0] - 1 - x, y, "+", color="white", markersize=9)
        outline_plane(looked, mask, 2, z, TRUTH, linestyles="dashed")
        outline_plane(there, mask, 2, largest, TRUTH)
        looked.set_title(title, fontsize=9.5, color="white", loc="left", pad=20)  # above the head
    heat.bar(figure, grid, "cosine of the sentence and each place")
    lines = [
        Line2D([], [], color="white", marker="+", linestyle="", markersize=9, label="most similar place"),
        Line2D([], [], color=OUTLINE, label="looked at"),
        Line2D([], [], color=TRUTH, linestyle="dashed", label="true finding, where it looked"),
        Line2D([], [], color=TRUTH, label="true finding, its largest slice"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=4, fontsize=10, frameon=False, labelcolor="white")
    return figure


def reconstructions(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A volume's middle slice, what was hidden of it, and what the network restored there: one row a volume.

    Args:
        rows: of a volume each. ``name``; on one grid in RAS order ``image [1, X, Y, Z]`` in [-1, 1], a MetaTensor, the
            mask ``hidden [X, Y, Z]``, and ``restored [X, Y, Z]``, which is the image where nothing was hidden.
    """
    height = 2.65 * max(tall(row["hidden"].shape, spacing_of(row["image"])) for row in rows) + 0.48
    figure = Figure(figsize=(8.2, height * len(rows) + 0.4), layout="constrained")
    grid = figure.subplots(len(rows), 3, squeeze=False)
    dark(figure, grid)
    for row, axes_row in zip(rows, grid, strict=True):
        image, affine = row["image"][0].as_tensor().numpy(), row["image"].affine.numpy()
        middle, spacing = image.shape[2] // 2, spacing_of(row["image"])
        heads = ("CT", "what the network saw", "what it restored")
        for axes, volume, head in zip(axes_row, (image, image, row["restored"].numpy()), heads, strict=True):
            show_ct(axes, volume, middle, spacing, (CT["vmin"], CT["vmax"]))
            of = f"{row['name']}, {height_of(affine, image.shape, middle)}" if axes is axes_row[0] else ""
            axes.set_title(f"{of}\n{head}", fontsize=10, color="white", loc="left")
        hidden = np.where(row["hidden"].numpy(), 1.0, np.nan)
        show_plane(axes_row[1], hidden, 2, middle, spacing, cmap=ListedColormap([HIDDEN]), zorder=0.5)
    patch = Patch(color=HIDDEN, label="hidden from the network; restored on the right, where all else is the CT")
    figure.legend(handles=[patch], loc="outside lower center", fontsize=9, frameon=False, labelcolor="white")
    return figure


def most_classes(labels: np.ndarray, axis: int) -> int:
    """The slice across ``axis`` that meets most classes of a label map ``[X, Y, Z]``, and of those most voxels."""
    others = tuple(i for i in range(3) if i != axis)
    present = sum((labels == index).any(others).astype(int) for index in np.unique(labels) if index)
    voxels = (labels > 0).sum(others)
    return int(np.argmax(present + voxels / (1 + voxels.max())))


def contours(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> Figure:
    """Organ contours over CT in three planes, one row a scan; solid is predicted, white dots on black are the truth.

    Args:
        rows: tensors on one grid in RAS order: ``image [X, Y, Z]`` in [-1, 1], class indices ``pred [X, Y, Z]`` and,
            where it is known, ``truth``; ``spacing`` in mm, ``title``, and perhaps the grid's ``affine [4, 4]``, by
            which slices are placed.
        classes: names of classes 1, 2, ...
    """
    # as wide as the planes of the largest scan are at one height, so that all three stand side by side
    extent = np.max([np.multiply(row["pred"].shape, row["spacing"]) for row in rows], axis=0)
    wide = [np.delete(extent, axis)[0] / np.delete(extent, axis)[1] for axis in PLANES]
    figure = Figure(figsize=(11, (10.6 / sum(wide) + 0.5) * len(rows) + 0.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    grid = figure.subplots(len(rows), 3, squeeze=False, width_ratios=wide)
    shown: set[int] = set()
    for row, axes_row in zip(rows, grid, strict=True):
        pred, truth = row["pred"].numpy(), row["truth"].numpy() if "truth" in row else None
        for axis, axes in zip(PLANES, axes_row, strict=True):
            index = most_classes(pred if truth is None else truth, axis)
            show_plane(axes, row["image"], axis, index, row["spacing"], **CT, interpolation="bilinear")
            axes.set_anchor("N")  # below their titles
            known = range(1, len(classes) + 1) if truth is not None else ()
            for c in known:
                outline_plane(axes, truth == c, axis, index, "black", **UNDER)
            for c in range(1, len(classes) + 1):
                outline_plane(axes, pred == c, axis, index, COLOURS[(c - 1) % len(COLOURS)])
                shown |= {c} if (plane(pred, axis, index) == c).any() else set()
            for c in known:
                outline_plane(axes, truth == c, axis, index, "white", **DOTTED)
            for side, x, ha in zip(SIDES[axis], (0.015, 0.985), ("left", "right"), strict=True):
                axes.text(x, 0.5, side, transform=axes.transAxes, ha=ha, va="center", fontsize=8, color="white")
            place = PLANES[axis]
            if "affine" in row:
                middle = [index if i == axis else (size - 1) / 2 for i, size in enumerate(pred.shape)]
                place += f", {'xyz'[axis]} = {(row['affine'] @ [*middle, 1])[axis]:.0f} mm".replace("-", MINUS)
            axes.set_title(f"{row['title'] if axes is axes_row[0] else ''}\n{place}", fontsize=10, loc="left")
    lines: list[Any] = [Line2D([], [], color=COLOURS[(c - 1) % len(COLOURS)]) for c in sorted(shown)]
    names = [classes[c - 1] for c in sorted(shown)]
    if any("truth" in row for row in rows):  # as it is drawn, one line on the other
        under, dots = (Line2D([], [], color=colour) for colour in ("black", "white"))
        under.set_linewidth(UNDER["linewidths"])
        dots.set(linewidth=DOTTED["linewidths"], linestyle=DOTTED["linestyles"])
        lines, names = [*lines, (under, dots)], [*names, "truth"]
    if lines:
        figure.legend(lines, names, loc="outside upper center", ncols=7, fontsize=10, frameon=False)
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
            row["affine"] = image.affine.numpy()
            save(self.output_dir / data["name"] / "panel.png", contours, [row], self.classes)
        return data


@dataclass
class ContourImages:
    """Writes the contours of a validation's first scan to TensorBoard, prediction over truth.

    Attach it to the evaluator, whose output holds ``image`` and the class indices ``pred`` and ``label``, on one grid.

    Args:
        classes: names of classes 1, 2, ...
    """

    writer: SummaryWriter
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
        with not_worth_a_run("validation/contours"):
            self.writer.add_figure("validation/contours", contours([row], self.classes), engine.state.epoch)
            self.writer.flush()


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
    axes.set_xticks(range(len(values)), [textwrap.fill(group, 20) for group in values])
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=9)
    return figure


def roc_and_pr_curves(
    truth: np.ndarray, score: np.ndarray, classes: Sequence[str], measured: Mapping[str, Mapping[str, Any]]
) -> Figure:
    """ROC and precision-recall curve of every class with both label values.

    Args:
        truth, score: ``[N, C]``.
        measured: class -> ``auroc``, ``average_precision``: each ``value``, ``low``, ``high``, told beside its curve.
    """
    both = [c for c in range(len(classes)) if np.ptp(truth[:, c]) > 0]
    figure = Figure(figsize=(10.0, 5.3 + 0.19 * len(both)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    roc, pr = figure.subplots(1, 2)
    # of equal curves, which lie on one another, later ones are thinner and leave the earlier ones an edge
    for c, width in zip(both, np.linspace(3.0, 1.2, len(both)), strict=True):
        y, scored = truth[:, c], score[:, c]
        curve = {"color": COLOURS[c % len(COLOURS)], "linestyle": STYLES[c % len(STYLES)], "linewidth": width}
        for axes, display, of, more in (
            (roc, RocCurveDisplay, "auroc", ""),
            (pr, PrecisionRecallDisplay, "average_precision", f", {y.mean():.0%} positive"),
        ):
            display.from_predictions(y, scored, ax=axes, curve_kwargs=curve)
            value = "{value:.2f} ({low:.2f} to {high:.2f})".format(**measured[classes[c]][of])
            axes.lines[-1].set_label(f"{classes[c]} {value}{more}")
    roc.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    roc.set(title="ROC: area under the curve, 95 % interval", xlabel="1 - specificity", ylabel="sensitivity")
    pr.set(title="precision-recall: average precision, 95 % interval", xlabel="sensitivity", ylabel="precision")
    for axes in (roc, pr):
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="auto")  # curves keep off the frame
        axes.grid(alpha=0.3)
        if both:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=9, handlelength=3, frameon=False)
    return figure


def confusion_matrix(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """Counts of true class (rows) against the class of highest probability."""
    figure = Figure(figsize=(1.5 + 1.2 * len(classes), 1.2 + 1.0 * len(classes)), layout="constrained")
    axes = figure.subplots()
    display = ConfusionMatrixDisplay(np.asarray(matrix), display_labels=list(classes))
    display.plot(ax=axes, cmap="Blues", colorbar=False, xticks_rotation=30)
    return figure
