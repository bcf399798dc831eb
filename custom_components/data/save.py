"""Results to disk: maps, labels and probabilities, in the geometry of the scan that they were made of."""

import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import compute_shape_offset
from monai.transforms import MapTransform, SpatialResample
from torch import Tensor
from torch.nn import functional as F

from custom_components.data.lists import NIFTI_SUFFIXES
from custom_components.data.volume import linear_weights
from custom_components.files import replacing

logger = logging.getLogger(__name__)


def _save_nifti(array: np.ndarray, affine: np.ndarray, path: Path, qform: np.ndarray, scale: float = 1.0) -> None:
    """[X, Y, Z] with exactly this affine (RAS+ mm): MONAI's NibabelWriter fails on affines whose axes are permuted.

    Some viewers, such as nibabel's, place a file by its sform, which is the affine. ITK's prefer it too, but fall back
    on the qform, or refuse the file, where its axes are not at right angles to the last digit.
    """
    header = nib.Nifti1Header()
    header.set_sform(affine, code=1)
    header.set_qform(qform, code=1)
    header.set_xyzt_units("mm")
    image = nib.Nifti1Image(array, None, header, dtype=array.dtype)
    image.header.set_slope_inter(scale, 0)
    with replacing(path) as temporary:
        nib.save(image, temporary)


def _qform(affine: np.ndarray, shape: Sequence[int], scan: object) -> np.ndarray | None:
    """The scan's own qform where its file has one, or the rotation next to an affine [4, 4] that moves no voxel by more
    than half of its size; None where that one would show a map elsewhere."""
    if str(scan).lower().endswith(NIFTI_SUFFIXES):
        with suppress(OSError, nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError):
            header = nib.load(scan).header
            if header["qform_code"] > 0 and np.allclose(header.get_best_affine(), affine, atol=1e-3):
                return header.get_qform()
    straight = _straight(affine)
    corners = np.stack(np.meshgrid(*((0, size - 1) for size in shape)), -1).reshape(-1, 3)
    moved = np.linalg.norm(corners @ (straight - affine)[:3, :3].T, axis=1).max()
    return straight if moved <= 0.5 * np.linalg.norm(affine[:3, :3], axis=0).min() else None


def _straight(affine: np.ndarray) -> np.ndarray:
    """The affine with its axes turned to right angles, each by as little as all of them allow."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    left, _, right = np.linalg.svd(affine[:3, :3] / spacing)
    straight = affine.copy()
    straight[:3, :3] = (left @ right) * spacing
    return straight


def _to_save(maps: MetaTensor, data: Mapping[Hashable, object], mode: str) -> tuple[MetaTensor, np.ndarray]:
    """Maps [S, X, Y, Z] of a scan and their qform: on the scan's own grid, if every viewer can place that."""
    image = data.get("image")
    scan = image.meta.get("filename_or_obj", "") if isinstance(image, MetaTensor) else ""
    affine = maps.affine.cpu().numpy()
    qform = _qform(affine, maps.shape[1:], scan)
    if qform is not None:
        return maps, qform
    logger.warning(
        f"{scan or data['name']}: its axes are not at right angles, which few viewers can show: its maps are saved on "
        "the box of right angles around it, in voxels of the same size"
    )
    straight = _straight(affine)
    shape, straight[:3, 3] = compute_shape_offset(maps.shape[1:], affine, straight)
    resample = SpatialResample(mode=mode, padding_mode="zeros", dtype=torch.float32)
    return resample(maps, dst_affine=straight, spatial_size=list(shape)).to(maps.dtype), straight


class SaveMapsd(MapTransform):
    """Saves the maps of a scan to ``<output_dir>/<name>/``.

    ``<stem>_01.nii.gz`` and so on: one map per name, float32, in the geometry of the maps' own affine. ``<table>``:
    each map's ``file``, ``map`` (its name), highest value ``max``, and ``x_mm``, ``y_mm``, ``z_mm``, where that is
    (RAS+). ``embedding.npy`` where an embedding is asked for.

    Args:
        keys: of the maps, MetaTensor [S, X, Y, Z], already inverted to the scan's geometry.
        names: of the S maps, such as sentences or classes.
        columns: headers other than those above, as ``{"map": "class"}``.
        embedding_key: of the scan's embedding [C], or None.
    """

    def __init__(
        self,
        keys: KeysCollection,
        names: Sequence[str],
        output_dir: str,
        stem: str,
        table: str,
        columns: Mapping[str, str],
        embedding_key: str | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.names, self.columns, self.embedding_key = names, columns, embedding_key
        self.output_dir, self.stem, self.table = Path(output_dir), stem, table

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        folder = self.output_dir / data["name"]
        for key in self.key_iterator(data):
            folder.mkdir(parents=True, exist_ok=True)
            if self.embedding_key is not None:
                np.save(folder / "embedding.npy", data[self.embedding_key].float().cpu().numpy())
            maps, qform = _to_save(data[key], data, "bilinear")
            values, affine = maps.cpu().numpy(), maps.affine.cpu().numpy()
            rows = []
            for i, (name, volume) in enumerate(zip(self.names, values, strict=True), 1):
                file = f"{self.stem}_{i:02d}.nii.gz"
                _save_nifti(volume.astype(np.float32), affine, folder / file, qform)
                peak = np.unravel_index(volume.argmax(), volume.shape)
                x, y, z = (affine @ [*peak, 1])[:3].round(1)
                rows.append((file, name, round(float(volume.max()), 4), x, y, z))
            table = pd.DataFrame(rows, columns=["file", "map", "max", "x_mm", "y_mm", "z_mm"])
            table.rename(columns=self.columns).to_csv(folder / self.table, index=False)
        return dict(data)


class AppendProbabilitiesd(MapTransform):
    """Appends one row per scan to ``<output_dir>/predictions.csv``: name, image, and a probability per class.

    The file is begun anew with the first scan of a run. Rows are written as scans are done, so a kill loses none.

    Args:
        keys: of the probabilities [C].
        classes: their C names, the columns.
    """

    def __init__(self, keys: KeysCollection, classes: Sequence[str], output_dir: str) -> None:
        super().__init__(keys)
        self.classes = classes
        self.path = Path(output_dir) / "predictions.csv"
        self.started = False

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for key in self.key_iterator(data):
            values = data[key].float().cpu().tolist()
            path = data["image"].meta.get("filename_or_obj", "")
            row = {"name": data["name"], "image": path, **dict(zip(self.classes, values, strict=True))}
            mode = "a" if self.started else "w"
            rows = pd.DataFrame([row])
            # a name of bytes that are no UTF-8 stays what it is
            rows.to_csv(self.path, mode=mode, header=not self.started, index=False, errors="surrogateescape")
            self.started = True
        return dict(data)


def argmax_labels(logits: Tensor) -> Tensor:
    """``[C, X, Y, Z]`` -> uint8 ``[X, Y, Z]``, by slabs: argmax itself answers in eight bytes a voxel."""
    return torch.cat([slab.argmax(0).byte() for slab in logits.split(16, dim=1)])


def labels_in_scan(
    logits: Tensor, affine: Tensor, scan_affine: Tensor, scan_shape: Sequence[int], probabilities: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Bring logits to the scan's grid and take the largest, 16 slices at a time.

    Logits are interpolated linearly, so that a boundary is as smooth as the scan's voxels allow; but those of a whole
    scan of 512 x 512 x 1000 voxels would need 4 bytes x 262 million x classes, hence the slabs. Grids that run along
    the same axes, in whatever order and direction, need only one matrix product per axis.

    Args:
        logits: ``[C, x, y, z]`` on the network's grid.
        affine, scan_affine: ``[4, 4]`` from voxel indices to mm, of the network's grid and of the scan's.
        scan_shape: X, Y, Z.
        probabilities: whether to return those as well.

    Returns:
        labels uint8 ``[X, Y, Z]``; and probabilities of classes 1, 2, ... in 1/255, uint8 ``[C - 1, X, Y, Z]``, or
        None.
    """
    shape = [int(size) for size in scan_shape]
    labels = torch.empty(shape, dtype=torch.uint8)
    chances = torch.empty((len(logits) - 1, *shape), dtype=torch.uint8) if probabilities else None
    for own, slab in slabs_in_scan(logits, affine, scan_affine, shape):
        labels[..., own] = slab.argmax(0).byte().cpu()
        if chances is not None:
            chances[..., own] = (slab.softmax(0)[1:] * 255).round().byte().cpu()
    return labels, chances


SLAB = 16  # slices of the scan


def slabs_in_scan(
    maps: Tensor, affine: Tensor, scan_affine: Tensor, shape: Sequence[int]
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the scan, :data:`SLAB` at a time, and maps ``[C, x, y, z]`` interpolated there, ``[C, X, Y, slices]``.

    Beyond the outermost voxels of the maps, these hold. Arguments as for :func:`labels_in_scan`.
    """
    to_network = torch.linalg.solve(affine.double().cpu(), scan_affine.double().cpu())
    along = to_network[:3, :3].abs().argmax(0).tolist()  # which of the network's axes runs along each of the scan's
    tilt = to_network[:3, :3].clone()
    tilt[along, range(3)] = 0
    if sorted(along) == [0, 1, 2] and (tilt.abs() @ torch.tensor(shape, dtype=torch.float64)).max() < 0.01:
        return _slabs_along_axes(maps, to_network, along, shape)
    return _slabs_by_voxel(maps, to_network, shape)


def _slabs_along_axes(
    logits: Tensor, to_network: Tensor, along: Sequence[int], shape: Sequence[int]
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the scan, and the logits ``[C, X, Y, slices]`` there, where the grids have their axes in common."""
    logits = logits.permute(0, *(1 + axis for axis in along))
    steps, starts = to_network[along, range(3)].tolist(), to_network[along, 3].tolist()
    axes = zip(steps, starts, shape, logits.shape[1:], strict=True)
    x, y, z = (torch.from_numpy(linear_weights(step * np.arange(n) + start, size)) for step, start, n, size in axes)
    x, y = x.to(logits.device), y.T.contiguous().to(logits.device)
    for start in range(0, shape[2], SLAB):
        own = slice(start, min(start + SLAB, shape[2]))
        used = z[own].any(0).nonzero()
        begin, end = int(used[0]), int(used[-1]) + 1
        rows = z[own, begin:end].to(logits.device)
        slab = torch.tensordot(rows, logits[..., begin:end].float(), ([1], [3])) @ y
        yield own, (x @ slab).permute(1, 2, 3, 0)


def _slabs_by_voxel(logits: Tensor, to_network: Tensor, shape: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
    """As :func:`_slabs_along_axes`, for any two grids."""
    last = torch.tensor(logits.shape[1:]) - 1
    for start in range(0, shape[2], SLAB):
        own = slice(start, min(start + SLAB, shape[2]))
        index = torch.meshgrid(*map(torch.arange, shape[:2]), torch.arange(own.start, own.stop), indexing="ij")
        places = torch.stack(index, -1).double() @ to_network[:3, :3].T + to_network[:3, 3]
        # only the logits around the slab, since all of them would be converted and copied for each
        ends = places.amin((0, 1, 2)), places.amax((0, 1, 2)) + 1
        low, high = (torch.minimum(end.floor().long().clamp(min=0), last) for end in ends)
        x, y, z = (slice(begin, end + 1) for begin, end in zip(low.tolist(), high.tolist(), strict=True))
        # grid_sample counts from -1 to 1, and the last axis first
        grid = ((places - low) * 2 / (high - low).clamp(min=1) - 1).flip(-1).float().to(logits.device)
        part = logits[None, :, x, y, z].float()
        yield own, F.grid_sample(part, grid[None], "bilinear", "border", align_corners=True)[0]


def save_finding_masks(masks: np.ndarray, affine: np.ndarray, path: str | Path, scan: str | Path) -> None:
    """Save masks ``(F, X, Y, Z)`` uint8 of a scan's findings as ReXGroundingCT takes them: the first axis of the file
    is that of the findings, the others and the affine (RAS+ mm) are the scan's own."""
    qform = _qform(affine, masks.shape[1:], scan)
    _save_nifti(masks, affine, Path(path), _straight(affine) if qform is None else qform)


class LabelsInScand(MapTransform):
    """Turns logits on the network's grid into a label map on the scan's, see :func:`labels_in_scan`.

    The logits of a key become a MetaTensor uint8 ``[1, X, Y, Z]`` whose shape and affine are the scan's. With
    ``probabilities`` the item also gets ``probability``, uint8 ``[C - 1, X, Y, Z]``.

    Args:
        keys: of the logits ``[C, x, y, z]``; ``image`` is the preprocessed scan, which knows its grid and the scan's.
        probabilities: whether to keep those.
    """

    def __init__(self, keys: KeysCollection, probabilities: bool = False) -> None:
        super().__init__(keys)
        self.probabilities = probabilities

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        data = dict(data)
        image = data["image"]
        scan_affine = torch.as_tensor(image.meta["original_affine"], dtype=torch.float64)
        scan_shape = np.asarray(image.meta["spatial_shape"]).tolist()
        for key in self.key_iterator(data):
            logits = data[key].as_tensor() if isinstance(data[key], MetaTensor) else data[key]
            labels, chances = labels_in_scan(logits, image.affine, scan_affine, scan_shape, self.probabilities)
            data[key] = MetaTensor(labels[None], affine=scan_affine)
            if chances is not None:
                data["probability"] = chances
        return data


class SaveLabelsd(MapTransform):
    """Saves what was segmented in a scan to ``<output_dir>/<name>/``.

    ``labels.nii.gz``: class indices, uint8, in the scan's own geometry. ``volumes.csv``: voxels and millilitres of each
    class. Where the item has ``probability``: ``probability_<class>.nii.gz``, stored in steps of 1/255.

    Args:
        keys: of the label maps, see :class:`LabelsInScand`.
        classes: names of classes 1, 2, ...
    """

    def __init__(self, keys: KeysCollection, classes: Sequence[str], output_dir: str) -> None:
        super().__init__(keys)
        self.classes = classes
        self.output_dir = Path(output_dir)

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        folder = self.output_dir / data["name"]
        for key in self.key_iterator(data):
            maps, qform = _to_save(data[key], data, "nearest")
            labels, affine = maps[0].cpu().numpy(), maps.affine.cpu().numpy()
            _save_nifti(labels, affine, folder / "labels.nii.gz", qform)
            counts = [int((labels == index).sum()) for index in range(1, len(self.classes) + 1)]
            millilitres = [round(count * abs(np.linalg.det(affine[:3, :3])) / 1000, 2) for count in counts]
            table = pd.DataFrame({"class": self.classes, "voxels": counts, "ml": millilitres})
            table.to_csv(folder / "volumes.csv", index=False)
            if "probability" not in data:
                continue
            chances, qform = _to_save(MetaTensor(data["probability"], affine=data[key].affine), data, "bilinear")
            for name, chance in zip(self.classes, chances, strict=True):
                file = f"probability_{name.replace(' ', '_')}.nii.gz"
                _save_nifti(chance.cpu().numpy(), affine, folder / file, qform, scale=1 / 255)
        return dict(data)
