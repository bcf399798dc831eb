"""Maps finer than the patch grid: cells of a view, what sentences score in them, and where they lie in a scan."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from custom_components.data.save import SLAB, slabs_in_scan
from custom_components.errors import InputError
from custom_components.evaluation.retrieval import MAX_COSINES
from custom_components.simcrop import VolumeEmbedder
from custom_components.vit import SimCroPEncoder
from torch import Tensor
from torch.nn import functional as F


def aligned_patches(embedder: VolumeEmbedder, volume: Tensor) -> Tensor:
    """``[B, 1, X, Y, Z]`` -> projected features of all patches, ``[B, N, D]`` float32 of length 1."""
    if embedder.aligner.align_layer == 0:  # what the blocks would make of them is not read
        described = embedder.encoder.describe(volume)
        patches = embedder.aligner.patches(described, described, [])
    else:
        patches = embedder.patches_and_embedding(volume)[0]
    return F.normalize(patches.float(), dim=-1)


@dataclass(frozen=True)
class Boxes:
    """Boxes of ``size`` voxels that lie side by side in a view, ``counts`` along each axis, from voxel ``start`` on."""

    start: Sequence[float]
    size: Sequence[float]
    counts: Sequence[int]

    def index(self, places: Sequence[Tensor]) -> Tensor:
        """Number of the box at places in voxels of the view, a tensor an axis that broadcast; -1 where none is."""
        found, within = 0, True
        for place, start, size, count in zip(places, self.start, self.size, self.counts, strict=True):
            axis = ((place + 0.5 - start) / size).floor().long()
            found, within = found * count + axis, within & (axis >= 0) & (axis < count)
        return torch.where(within, found, -1)

    def count(self, places: Tensor) -> Tensor:
        """How many of the places ``[K, 3]`` lie in each box, ``counts`` int64."""
        index = self.index(places.unbind(-1))
        return index[index >= 0].bincount(minlength=math.prod(self.counts)).view(*self.counts)

    @property
    def centres(self) -> Tensor:
        """``[number of boxes, 3]`` float64, in voxels of the view."""
        axes = (torch.arange(n).double() for n in self.counts)
        index = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)
        return (index + 0.5) * torch.tensor(self.size) + torch.tensor(self.start) - 0.5


def boxes_in_scan(boxes: Boxes, view: Tensor, affine: Tensor, shape: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
    """Slices of a scan, and the box that each voxel lies in, ``[X, Y, slices]``, -1 for none.

    Args:
        view, affine: ``[4, 4]`` from voxel indices to mm, of the view and of the scan.
    """
    to_view = torch.linalg.solve(view.double().cpu(), affine.double().cpu())
    for start in range(0, shape[2], SLAB):
        own = slice(start, min(start + SLAB, shape[2]))
        yield own, boxes.index(places_along(to_view, shape, own)).expand(*shape[:2], own.stop - own.start)


def places_along(to_view: Tensor, shape: Sequence[int], slices: slice) -> list[Tensor]:
    """Places in the view of the voxels of some slices of a scan: a tensor an axis, broadcasting to ``[X, Y, slices]``.

    Args:
        to_view: ``[4, 4]`` from the scan's voxel indices to the view's.
    """
    sizes = (range(shape[0]), range(shape[1]), range(slices.start, slices.stop))
    index = [torch.tensor(size).double().view([-1 if a == i else 1 for a in range(3)]) for i, size in enumerate(sizes)]
    used = to_view[:3, :3].abs() * torch.tensor(shape) >= 0.01  # most scans run along the view's axes
    return [to_view[axis, 3] + sum(to_view[axis, i] * index[i] for i in range(3) if used[axis, i]) for axis in range(3)]


class Cells:
    """The cells of a view: a patch parted along each axis, as crops shifted by such parts cover it.

    A crop is what the network takes. With ``shifts`` n along an axis there are n of them, a part of a patch from one
    to the next; a cell's value is the mean over the patches that cover it, so (1, 1, 1) is the patch grid, and the cost
    is one forward pass for each crop, the product of ``shifts``.

    Args:
        shifts: crops along each axis; each divides the patch's voxels.

    Attributes:
        view_size: voxels that all crops together take.
        cells, patches: boxes of the cells, and of the patches of one crop in the middle.
    """

    def __init__(self, encoder: SimCroPEncoder, shifts: Sequence[int]) -> None:
        sizes = list(zip(encoder.grid, encoder.patch_size, shifts, strict=True))
        if any(s < 1 or patch % s for _, patch, s in sizes):
            raise InputError(
                f"shifts {list(shifts)}: give a divisor of patch_size {list(encoder.patch_size)} for each axis"
            )
        self.shifts = tuple(shifts)
        self.grid, self.patch_size = encoder.grid, encoder.patch_size
        self.step = tuple(patch // s for _, patch, s in sizes)
        self.crop_size = tuple(n * patch for n, patch, _ in sizes)
        self.view_size = tuple(n * patch + patch - patch // s for n, patch, s in sizes)
        self.cells = Boxes((0, 0, 0), self.step, tuple(n * s + s - 1 for n, _, s in sizes))
        self.halves = Boxes((0, 0, 0), [size / 2 for size in self.step], [2 * n for n in self.cells.counts])
        middle = [(view - crop) / 2 for view, crop in zip(self.view_size, self.crop_size, strict=True)]
        self.patches = Boxes(middle, self.patch_size, self.grid)

    def features(self, embedder: VolumeEmbedder, view: Tensor) -> Tensor:
        """Patches of all crops of a view ``[1, X, Y, Z]``: ``[crops, N, D]`` of length 1."""
        if tuple(view.shape[1:]) != self.view_size:
            raise InputError(f"a view of {list(view.shape[1:])} voxels, and shifts {self.shifts} take {self.view_size}")
        corners = itertools.product(*(range(0, s * step, step) for s, step in zip(self.shifts, self.step, strict=True)))
        crops = (
            view[(slice(None), *(slice(at, at + n) for at, n in zip(corner, self.crop_size, strict=True)))]
            for corner in corners
        )
        return torch.cat([aligned_patches(embedder, crop[None]) for crop in crops])

    def maps(self, features: Tensor, sentences: Tensor) -> Tensor:
        """Cosines of sentences ``[S, D]``, of length 1, in every cell: ``[S, *cells]`` float32."""
        counts, shifts = self.cells.counts, self.shifts
        edges = [n for s in reversed(shifts) for n in (s - 1, s - 1)]
        parts = []
        for some in sentences.split(max(1, MAX_COSINES // features[..., 0].numel())):
            cosine = torch.einsum("sd,knd->skn", some, features).reshape(len(some), *shifts, *self.grid)
            cosine = cosine.permute(0, 4, 1, 5, 2, 6, 3)  # s gx shift gy shift gz shift: patches by their place
            cosine = cosine.reshape(len(some), *(n - s + 1 for n, s in zip(counts, shifts, strict=True)))
            parts.append(F.avg_pool3d(F.pad(cosine, edges), shifts, 1))
        covered = F.avg_pool3d(F.pad(torch.ones_like(cosine[:1]), edges), shifts, 1)
        return torch.cat(parts) / covered

    def affine(self, view: Tensor) -> Tensor:
        """``[4, 4]`` from cell indices to mm, given that from the view's voxel indices to mm."""
        step = torch.tensor(self.step, dtype=torch.float64)
        to_view = torch.diag(torch.cat([step, torch.ones(1)]))
        to_view[:3, 3] = (step - 1) / 2
        return view.double().cpu() @ to_view

    def near(self, places: Tensor) -> Tensor:
        """Whether a box of a patch's size around each cell's centre holds one of the places ``[K, 3]``: ``[cells]``."""
        marked = (self.halves.count(places) > 0).float()[None]
        kernel, padding = [2 * s for s in self.shifts], [s - 1 for s in self.shifts]
        return F.max_pool3d(marked, kernel, 2, padding)[0].flatten() > 0

    def voxels(self, to_view: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The voxel ``[cells, 3]`` int64 of a scan at each cell's centre, and whether the scan has it."""
        from_view = torch.linalg.inv(to_view)
        voxels = (self.cells.centres @ from_view[:3, :3].T + from_view[:3, 3]).round().long()
        within = ((voxels >= 0) & (voxels < torch.tensor(shape))).all(-1)
        return voxels.clamp(min=0).minimum(torch.tensor(shape) - 1), within

    @property
    def field(self) -> Boxes:
        """The view as one box."""
        return Boxes((0, 0, 0), self.view_size, (1, 1, 1))

    def slabs(
        self, maps: Tensor, view: Tensor, affine: Tensor, shape: Sequence[int]
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Slices of a scan, maps ``[C, *cells]`` interpolated there, ``[C, X, Y, slices]``, and where the view is.

        Args:
            view, affine: ``[4, 4]`` from voxel indices to mm, of the view and of the scan.
        """
        field = boxes_in_scan(self.field, view, affine, shape)
        slabs = slabs_in_scan(maps, self.affine(view), affine, shape)
        for (own, slab), (_, index) in zip(slabs, field, strict=True):
            yield own, slab, (index >= 0).to(slab.device)
