"""Pictures of maps over CT: right is right however a scan is stored, and what is compared has one scale."""

from __future__ import annotations

from itertools import pairwise, permutations, product

import numpy as np
import pytest
import torch
from custom_components.evaluation import figures
from custom_components.evaluation.figures import COMPARED, canonical, height_of, sentence_panel
from matplotlib.figure import Figure
from monai.data import MetaTensor

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


def test_the_peak_is_where_it_is_in_the_patient(tmp_path) -> None:
    figure = panel(1)
    axes = figure.axes[2]
    (mark,) = axes.lines
    assert mark.get_xydata().tolist() == [[SHAPE[0] - 1 - 7, 6]]  # R is on the left of the picture: see plane()
    texts = {text.get_text(): text.get_position() for text in axes.texts}
    assert texts["R"][0] < 0.5 < texts["L"][0] and "z = \N{MINUS SIGN}82 mm" in texts
    figure.savefig(tmp_path / "panel.png")


def test_names_under_the_bars_keep_apart() -> None:
    entry = {"mean": 0.5, "low": 0.4, "high": 0.6}
    of = ("foreground mean", "lesions mean", "organs mean")
    figure = figures.bars(
        {f"{name} at 100% of the labels": {"pretrained": entry, "scratch": entry} for name in of}, "Dice"
    )
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
