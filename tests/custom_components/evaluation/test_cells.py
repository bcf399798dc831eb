"""Cells of shifted crops against plain loops over crops and voxels."""

import itertools

import numpy as np
import pytest
import torch
from custom_components.errors import InputError
from custom_components.evaluation.cells import Boxes, Cells, aligned_patches, boxes_in_scan
from custom_components.simcrop import Aligner, VolumeEmbedder
from custom_components.vit import SimCroPEncoder, upsample_patches
from torch.nn import functional as F

PATCH, GRID = (4, 4, 2), (3, 2, 4)


@pytest.fixture
def embedder() -> VolumeEmbedder:
    torch.manual_seed(0)
    size = tuple(n * p for n, p in zip(GRID, PATCH, strict=True))
    sizes = {"hidden_size": 24, "mlp_dim": 32, "num_layers": 1, "num_heads": 3, "pixdim": (4.0, 4.0, 8.0)}
    encoder = SimCroPEncoder(img_size=size, patch_size=PATCH, **sizes, hu_bins=4, scale_space=[8.0])
    return VolumeEmbedder(encoder, Aligner(24, 24, 16, align_layer=0, patch_projection="linear")).eval()


@torch.no_grad()
def test_one_shift_is_the_patch_grid(embedder):
    cells = Cells(embedder.encoder, (1, 1, 1))
    view, words = torch.rand(1, *cells.view_size) - 0.9, F.normalize(torch.randn(3, 16), dim=-1)
    maps = cells.maps(cells.features(embedder, view), words)
    expected = words @ aligned_patches(embedder, view[None])[0].T
    torch.testing.assert_close(maps.flatten(1), expected)
    affine = torch.diag(torch.tensor([1.5, 2.0, 3.0, 1.0])).double()
    slabs = list(cells.slabs(maps, affine, affine, cells.view_size))
    smooth = torch.cat([slab for _, slab, _ in slabs], -1)
    torch.testing.assert_close(smooth, upsample_patches(expected, GRID, cells.view_size))
    assert all(field.all() for *_, field in slabs)


@torch.no_grad()
@pytest.mark.parametrize("shifts", [(2, 2, 2), (4, 1, 2), (2, 4, 1)])
def test_a_cell_is_the_mean_of_the_patches_that_cover_it(embedder, shifts):
    cells = Cells(embedder.encoder, shifts)
    view, words = torch.rand(1, *cells.view_size) - 0.9, F.normalize(torch.randn(2, 16), dim=-1)
    found = cells.maps(cells.features(embedder, view), words)
    total, count = torch.zeros(2, *cells.view_size), torch.zeros(cells.view_size)
    step = [p // s for p, s in zip(PATCH, shifts, strict=True)]
    for corner in itertools.product(*(range(0, p, s) for p, s in zip(PATCH, step, strict=True))):
        crop = tuple(slice(at, at + n * p) for at, n, p in zip(corner, GRID, PATCH, strict=True))
        cosine = words @ aligned_patches(embedder, view[(None, slice(None), *crop)])[0].T
        for axis, patch in enumerate(PATCH, 1):
            cosine = cosine.reshape(2, *GRID) if axis == 1 else cosine
            cosine = cosine.repeat_interleave(patch, axis)
        total[(slice(None), *crop)] += cosine
        count[crop] += 1
    expected = total / count
    for axis, size in enumerate(step, 1):
        found = found.repeat_interleave(size, axis)
    assert found.shape[1:] == cells.view_size and count.max() == np.prod(shifts)
    torch.testing.assert_close(found, expected)


def test_shifts_must_part_a_patch(embedder):
    for shifts in ((3, 1, 1), (1, 1, 4), (0, 1, 1)):
        with pytest.raises(InputError, match="shifts .* give a divisor of patch_size"):
            Cells(embedder.encoder, shifts)


@pytest.mark.parametrize("oblique", [False, True])
def test_voxels_find_their_boxes_as_in_a_plain_loop(oblique):
    view = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0])).double()
    scan = torch.tensor([[0, 1.5, 0, -1.3], [-2.5, 0, 0, 30.2], [0, 0, 3.1, 2.0], [0, 0, 0, 1]]).double()
    if oblique:
        scan[:3, :3] @= torch.linalg.matrix_exp(torch.tensor([[0, 0.1, 0], [-0.1, 0, 0.2], [0, -0.2, 0]])).double()
    boxes = Boxes((1, 0, 2.5), (4, 5, 3), (3, 2, 4))
    shape = (7, 9, 20)
    found = torch.cat([index for _, index in boxes_in_scan(boxes, view, scan, shape)], -1)
    to_view = np.linalg.inv(view.numpy()) @ scan.numpy()
    for voxel in np.ndindex(shape):
        place = (to_view @ [*voxel, 1])[:3]
        box = np.floor((place + 0.5 - np.array(boxes.start)) / boxes.size).astype(int)
        within = (box >= 0).all() and (box < boxes.counts).all()
        assert found[voxel] == (np.ravel_multi_index(box, boxes.counts) if within else -1)
    places = torch.from_numpy((np.argwhere(found.numpy() >= 0) @ to_view[:3, :3].T) + to_view[:3, 3])
    assert torch.equal(boxes.count(places).flatten(), found[found >= 0].bincount(minlength=24))


@pytest.mark.parametrize("shifts", [(1, 1, 1), (2, 4, 1)])
def test_near_is_a_patch_around_the_centre(embedder, shifts):
    cells = Cells(embedder.encoder, shifts)
    rng = np.random.default_rng(0)
    places = torch.from_numpy(rng.integers(0, cells.view_size, (5, 3))).double()
    near = cells.near(places)
    for number, centre in enumerate(cells.cells.centres):
        low, high = (centre + sign * torch.tensor(PATCH) / 2 for sign in (-1, 1))
        assert near[number] == ((places >= low) & (places < high)).all(-1).any()
