"""Pictures of maps over CT: right is right however a scan is stored, and what is compared has one scale."""

from __future__ import annotations

from itertools import pairwise, permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from custom_components.evaluation import figures
from custom_components.evaluation.figures import COMPARED, canonical, height_of, sentence_panel
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from monai.data import MetaTensor
from torch.utils.tensorboard import SummaryWriter

SHAPE = (9, 8, 7)
AFFINE = np.array([[4.0, 0, 0, -20], [0, 5.0, 0, -30], [0, 0, 6.0, -100], [0, 0, 0, 1]])


def stored(volume: torch.Tensor, order: tuple[int, ...], flips: tuple[bool, ...], tilt: float = 0.0) -> MetaTensor:
    """A RAS volume ``[C, X, Y, Z]`` as a file may hold it: axes in another order, some of them turned around."""
    array = volume.permute(0, *(1 + axis for axis in order))
    back = np.zeros((4, 4))
    back[3, 3] = 1
    for own, axis in enumerate(order):
        back[axis, own] = -1 if flips[own] else 1
        back[axis, 3] = SHAPE[axis] - 1 if flips[own] else 0
    array = array.flip([1 + axis for axis in range(3) if flips[axis]])
    turn = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    affine = AFFINE.copy()
    affine[:3] = turn @ affine[:3]
    return MetaTensor(array, affine=torch.as_tensor(affine @ back))


@pytest.mark.parametrize("tilt", [0.0, 0.3])
def test_every_way_of_storing_a_scan_looks_alike(tilt: float) -> None:
    volume = torch.rand(2, *SHAPE)
    for order, flips in product(permutations(range(3)), product([False, True], repeat=3)):
        image = stored(volume, order, flips, tilt)
        array, affine = canonical(image)
        np.testing.assert_array_equal(array, volume)
        np.testing.assert_allclose(affine, stored(volume, (0, 1, 2), (False,) * 3, tilt).affine, atol=1e-9)
        assert np.shares_memory(array, image.numpy())
    assert height_of(AFFINE, SHAPE, 2) == "z = \N{MINUS SIGN}88 mm"


def panel(sentences: int, **keys: object) -> Figure:
    ct, maps = torch.full((1, *SHAPE), -800.0), torch.rand(sentences, *SHAPE)
    maps[:, 0] = torch.nan
    maps[:, 7, 6, 3] = 2 + torch.arange(sentences)  # to the patient's right, in front
    order, flips = (2, 0, 1), (True, False, True)
    return sentence_panel(stored(ct, order, flips), stored(maps, order, flips), ["A nodule."] * sentences, **keys)


@pytest.mark.parametrize(("sentences", "columns"), [(1, 3), (3, 5), (COMPARED + 1, 3)])
def test_what_is_compared_has_one_scale(sentences: int, columns: int) -> None:
    figure = panel(sentences, threshold=0.5)
    *axes, bar = figure.axes
    assert len(axes) == sentences * columns
    scales = {(each.images[1].norm.vmin, each.images[1].norm.vmax) for each in axes if len(each.images) > 1}
    assert len(scales) == 1 and next(iter(scales))[1] == 1 + sentences
    assert "outlined above 0.50" in figure.get_supxlabel() and bar.get_ylabel() == "cosine"
    assert figure.get_supxlabel().startswith("each row" if sentences > 1 else "the slice where the map is highest")


def test_the_peak_is_where_it_is_in_the_patient(tmp_path) -> None:
    figure = panel(1)
    axes = figure.axes[2]
    (mark,) = axes.lines
    assert mark.get_xydata().tolist() == [[SHAPE[0] - 1 - 7, 6]]  # R is on the left of the picture: see plane()
    texts = {text.get_text(): text.get_position() for text in axes.texts}
    assert texts["R"][0] < 0.5 < texts["L"][0] and "z = \N{MINUS SIGN}82 mm" in texts
    figure.savefig(tmp_path / "panel.png")
    assert axes.title.get_window_extent().y1 < figure.bbox.y1 - 3  # the title keeps off the edge


def volume_row(**more: object) -> dict[str, object]:
    return {"image": MetaTensor(torch.zeros(1, *SHAPE), affine=torch.as_tensor(AFFINE)), **more}


def looks(line: Line2D) -> tuple[object, ...]:
    return line.get_color(), line.get_linestyle()


@pytest.mark.parametrize(
    ("largest", "place"), [(3, "z = \N{MINUS SIGN}82 mm"), (5, "z = \N{MINUS SIGN}70 mm, 12 mm higher")]
)
def test_slices_of_a_finding_tell_how_far_they_lie_apart_and_the_legend_all_lines(largest: int, place: str) -> None:
    heat, mask = torch.rand(SHAPE), torch.zeros(SHAPE, dtype=torch.bool)
    heat[4, 4, 3] = 2
    mask[2:4, 2:4, 3] = True
    mask[2:6, 2:6, largest] = True
    told = (
        "A solid nodule lies in the right mid zone, which is said here in more words than a line can hold.\nscore 0.5"
    )
    figure = figures.told_looked_there([volume_row(told=told, heat=heat, mask=mask)] * 3)
    figure.draw_without_rendering()
    for looked, there in (figure.axes[start : start + 2] for start in (0, 3, 5)):
        assert "where it looked" in looked.texts[-1].get_text() and "what was there" in there.texts[-1].get_text()
        assert place in [text.get_text() for text in there.texts]
        title = looked._left_title.get_window_extent()
        assert looked.texts[-1].get_window_extent().y1 < title.y0 and title.y1 < figure.bbox.y1
    shown = {looks(line) for line in figure.legends[0].findobj(Line2D)}
    assert {(figures.OUTLINE, "-"), (figures.TRUTH, "--"), (figures.TRUTH, "-")} < shown


def test_what_is_hidden_is_no_grey() -> None:
    hidden = torch.zeros(SHAPE, dtype=torch.bool)
    hidden[:3] = True
    rows = [volume_row(name=f"valid_{i}", hidden=hidden, restored=torch.zeros(SHAPE)) for i in range(2)]
    figure = figures.reconstructions(rows)
    ct, saw, restored, *_ = figure.axes
    assert [len(axes.images) for axes in (ct, saw, restored)] == [1, 2, 1]
    drawn = saw.images[1]
    colours = drawn.cmap(drawn.norm(drawn.get_array()))
    assert colours[:, -3:, 3].all() and not colours[:, :-3, 3].any()  # R is on the left: see plane()
    assert np.ptp(colours[0, -1, :3]) > 0.2
    assert ct.get_title("left") == "valid_0, z = \N{MINUS SIGN}82 mm\nCT"


def test_losses_stand_in_a_grid_with_the_rate_apart(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(5):
            for tag in ("lr", "loss/volume", "loss/total", "loss/alignment", "held_out/total"):
                writer.add_scalar(tag, step, step)
    figure = figures.loss_curves(tmp_path)
    assert [axes.get_title() for axes in figure.axes] == ["total", "alignment", "volume", "learning rate"]
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss"] * 3 + [""]
    assert figure.axes[0].get_gridspec().ncols == 3
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["training", "training, running mean", "held out"]


def test_equal_curves_are_told_apart_and_not_covered() -> None:
    truth = np.tile([[0.0], [1.0]], (4, 6))
    entry = {"value": 1.0, "low": 1.0, "high": 1.0}
    classes = [f"finding {i}" for i in range(6)]
    measured = {name: {"auroc": entry, "average_precision": entry} for name in classes}
    figure = figures.roc_and_pr_curves(truth, truth, classes, measured)
    figure.draw_without_rendering()
    for axes in figure.axes:
        lines = axes.get_lines()[: len(classes)]
        assert len({(line.get_color(), line.get_linewidth()) for line in lines}) == len(classes)
        assert all(wide.get_linewidth() > thin.get_linewidth() for wide, thin in pairwise(lines))
        legend = axes.get_legend().get_window_extent()
        assert legend.y1 < axes.xaxis.label.get_window_extent().y0 and legend.y0 > 0
        assert axes.get_xlim()[0] < 0 and axes.get_ylim()[1] > 1
        assert axes.title.get_window_extent().y1 < figure.bbox.y1


def test_planes_stand_at_one_height_and_the_legend_shows_the_truth_as_drawn() -> None:
    pred = torch.zeros(SHAPE, dtype=torch.long)
    pred[2:6, 2:6, 2:5] = 1
    row = {"image": torch.zeros(SHAPE), "pred": pred, "spacing": (4.0, 5.0, 6.0), "title": "chest", "affine": AFFINE}
    figure = figures.contours([row | {"truth": pred}], ["heart"])
    figure.draw_without_rendering()
    boxes = [axes.get_position() for axes in figure.axes]
    assert np.ptp([box.y0 for box in boxes]) < 0.01 and np.ptp([box.y1 for box in boxes]) < 0.01
    assert figure.axes[1].get_title("left").startswith("\ncoronal, y = ")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["heart", "truth"]
    drawn = [tuple(lines.get_edgecolor()[0][:3]) for lines in figure.axes[0].collections]
    assert drawn == [(0, 0, 0), figures.COLOURS[0], (1, 1, 1)]
    legend = [to_rgb(line.get_color()) for line in figure.legends[0].findobj(Line2D)]
    assert legend == [figures.COLOURS[0], (0, 0, 0), (1, 1, 1)]


def test_names_under_the_bars_keep_apart() -> None:
    entry = {"mean": 0.5, "low": 0.4, "high": 0.6}
    of = ("foreground mean", "lesions mean", "organs mean")
    figure = figures.bars(
        {f"{name} at 100% of the labels": {"pretrained": entry, "scratch": entry} for name in of}, "Dice"
    )
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
