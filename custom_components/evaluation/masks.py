"""Arithmetic of masks: instances and their sizes, what a threshold gives, what the patch grid allows."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from monai.transforms import generate_spatial_bounding_box
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from torch import Tensor

STEPS = 200  # of a threshold, in 1
THRESHOLDS = np.arange(-STEPS, STEPS + 1) / STEPS
MATCH = 0.2  # Dice from which an instance counts as found, as in ReXGroundingCT's challenge


def instances(mask: np.ndarray, numbered: bool | None) -> np.ndarray:
    """Instances of a mask ``[X, Y, Z]``, numbered from 1, largest first: int32.

    Args:
        numbered: whether the mask's values number them; else, they are what hangs together, corners included. None for
            as the mask looks: one with values beyond 1 is numbered.
    """
    found = np.zeros(mask.shape, np.int32)
    if not mask.any():
        return found
    box = tuple(map(slice, *generate_spatial_bounding_box(mask[None])))
    part = mask[box]
    if numbered is None:
        numbered = part.max() > 1
    labels = part if numbered else ndimage.label(part > 0, np.ones((3, 3, 3)))[0]
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    rank = np.zeros(len(sizes), np.int32)
    present = np.flatnonzero(sizes)
    rank[present[np.argsort(-sizes[present], kind="stable")]] = np.arange(1, len(present) + 1)
    found[box] = rank[labels]
    return found


def diameter(labels: np.ndarray, voxel: float) -> float:
    """Of a sphere of the largest of :func:`instances`, mm, where a voxel has ``voxel`` mm^3."""
    return float((6 * (labels == 1).sum() * voxel / np.pi) ** (1 / 3))


def matches(pred: np.ndarray, truth: np.ndarray) -> int:
    """How many :func:`instances` of the truth are found: each by one of the prediction, with a Dice of 0.2 or more."""
    count, other = int(truth.max()) + 1, int(pred.max()) + 1
    marked = (truth > 0) | (pred > 0)
    common = np.bincount(truth[marked].astype(np.int64) * other + pred[marked], minlength=count * other)
    common = common.reshape(count, other)
    dice = 2 * common / (common.sum(1, keepdims=True) + common.sum(0) + 1e-9)
    dice = np.where(dice >= MATCH, 1 + dice, 0)[1:, 1:]
    rows, columns = linear_sum_assignment(dice, maximize=True)
    return int((dice[rows, columns] > 0).sum())


def dice_of(pred: np.ndarray, truth: np.ndarray) -> float:
    """Of two masks of which the truth is not empty."""
    return float(2 * (pred & truth).sum() / (pred.sum() + truth.sum()))


def dice_curves(slabs: Iterable[tuple[slice, Tensor, Tensor]], truth: Tensor) -> np.ndarray:
    """Dice of C maps with a mask ``[X, Y, Z]`` bool, at each of ``THRESHOLDS`` from which up a voxel is marked.

    ``slabs`` are those of :meth:`custom_components.evaluation.cells.Cells.slabs`. Returns ``[C, thresholds]``.
    """
    bins = len(THRESHOLDS)
    total, marked = [], []
    for own, slab, field in slabs:
        values = slab.clamp(-1, 1).where(field, -2.0).cpu()  # -2 is in no bin
        inside = values[:, truth[..., own]]
        for found, part in ((total, values), (marked, inside)):
            found.append(torch.stack([of.histc(bins, -1.0, -1.0 + bins / STEPS) for of in part.float()]))
    above = [torch.stack(found).double().sum(0).flip(1).cumsum(1).flip(1) for found in (total, marked)]
    return (2 * above[1] / (above[0] + truth.sum())).numpy()


def marked_voxels(
    slabs: Iterable[tuple[slice, Tensor, Tensor]], thresholds: Sequence[float], shape: Sequence[int]
) -> np.ndarray:
    """Voxels of a scan where C maps reach their ``thresholds``, within the view: bool ``[C, X, Y, Z]``."""
    found = np.zeros((len(thresholds), *shape), bool)
    for own, slab, field in slabs:
        reached = slab >= torch.tensor(thresholds, dtype=slab.dtype, device=slab.device)[:, None, None, None]
        found[..., own] = (reached & field).cpu().numpy()
    return found


def best_boxes(marked: Tensor, total: Tensor, truth: int) -> Tensor:
    """The boxes ``[N]`` bool whose union has the highest Dice with a mask of ``truth`` voxels, given how many of them,
    and how many voxels at all, each box has.

    No other choice is better: a box raises the Dice exactly if more than half of that Dice is marked of it.
    """
    share = torch.where(total > 0, marked / total.clamp(min=1), 0.0)
    order = share.argsort(descending=True, stable=True)
    dice = 2 * marked[order].cumsum(0) / (total[order].cumsum(0) + truth)
    chosen = torch.zeros(len(marked), dtype=torch.bool)
    chosen[order[: int(dice.argmax()) + 1]] = True
    return chosen & (marked > 0)
