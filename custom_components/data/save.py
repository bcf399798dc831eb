"""Results to disk: maps, labels and probabilities, in the geometry of the scan that they were made of."""

import csv
import logging
import shutil
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from custom_components.data.lists import NIFTI_SUFFIXES
from custom_components.data.volume import linear_weights
from custom_components.files import replacing
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import compute_shape_offset
from monai.transforms import Invertd, MapTransform, SpatialResample
from torch import Tensor
from torch.nn import functional as F

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
    scan, affine = _path_of(data), maps.affine.cpu().numpy()
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
    maps = maps.nan_to_num(0.0) if maps.is_floating_point() else maps
    return resample(maps, dst_affine=straight, spatial_size=list(shape)).to(maps.dtype), straight


@dataclass
class ResultTable:
    """The CSV of all scans of a run, and what is said of it at the end.

    It is begun anew with the first scan of a run. Rows are written as scans are done, so a kill loses none.

    Args:
        next_steps: what a person does with the results, to be said at the end.
        transposed: whether the table on the terminal has a column a scan, for a CSV with a column a class.
        shown: rows that the terminal shows, or scans where it is transposed.
    """

    path: str | Path
    next_steps: str
    transposed: bool = False
    shown: int = 40
    rows: list[dict[str, Any]] = field(default_factory=list, init=False)
    scans: int = field(default=0, init=False)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The rows of a scan, which all have the same columns; the first is its ``name``."""
        path = Path(self.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # a name of bytes that are no UTF-8 stays what it is
        with open(path, "a" if self.scans else "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            if not self.scans:
                writer.writeheader()
            writer.writerows(rows)
        self.scans += 1
        self.rows += rows

    def tell(self) -> None:
        """Print the table, where it lies, and what to do next."""
        if not self.rows:
            return
        table = pd.DataFrame(self.rows[: self.shown]).drop(columns="image").round(3).dropna(axis=1, how="all")
        table = table.set_index("name").T if self.transposed else table
        width = max(24, shutil.get_terminal_size((120, 24)).columns - 88)  # the other columns take so many
        text = table.fillna(np.nan).to_string(index=self.transposed, na_rep="-", max_colwidth=width)
        print(text.encode(errors="replace").decode())
        if (more := len(self.rows) - self.shown) > 0:
            print(f"... and {more} more {'scans' if self.transposed else 'rows'}")
        print(
            f"{self.scans} scan{'s' if self.scans > 1 else ''}: {Path(self.path).absolute()}\nnext: {self.next_steps}"
        )


def _path_of(data: Mapping[Hashable, Any]) -> str:
    """Of the scan that an item was read from."""
    image = data.get("image")
    return str(image.meta.get("filename_or_obj", "")) if isinstance(image, MetaTensor) else ""


class MapsInScand(Invertd):
    """Brings maps ``[S, x, y, z]`` of the network's grid to the scan's, ``[S, X, Y, Z]`` with its affine.

    They are NaN where the network did not look, outside of the field that its input was cropped to. What it saw of a
    scan that was padded is left out.

    Args:
        keys: of the maps.
        transform: the preprocessing of the item's ``image``.
    """

    def __init__(self, keys: KeysCollection, transform: Callable, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, transform, "image", nearest_interp=False, allow_missing_keys=allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        data = dict(data)
        for key in self.key_iterator(data):
            data[key] = MetaTensor(torch.as_tensor(data[key]))
        data = super().__call__(data)
        for key in self.key_iterator(data):
            maps, image = data[key], data["image"]
            to_network = torch.linalg.solve(image.affine.double().cpu(), maps.affine.double().cpu()).float()
            x, y, z = (torch.arange(size, dtype=torch.float32) for size in maps.shape[1:])
            for (a, b, c, d), size in zip(to_network.tolist(), image.shape[1:], strict=False):
                place = (a * x)[:, None, None] + (b * y)[:, None] + (c * z + d)
                maps.masked_fill_(((place < -0.5) | (place > size - 0.5)).to(maps.device), torch.nan)
        return data


def peaks(maps: MetaTensor) -> tuple[np.ndarray, np.ndarray]:
    """Highest values ``[S]`` of maps ``[S, X, Y, Z]``, and where they are in mm, ``[S, 3]`` (RAS+), but for NaN."""
    values = [each.as_tensor().cpu().numpy() for each in maps]  # one at a time, since each is as large as the scan
    index = np.array([np.unravel_index(np.nanargmax(each), each.shape) for each in values])
    affine = maps.affine.cpu().numpy()
    highest = np.array([each[tuple(place)] for each, place in zip(values, index, strict=True)])
    return highest, index @ affine[:3, :3].T + affine[:3, 3]


class SaveMapsd(MapTransform):
    """Saves the maps of a scan to ``<output_dir>/<name>/``, and a row a map to the run's table.

    ``<stem>_01.nii.gz`` and so on: one map per name, float32, in the geometry of the maps' own affine, 0 where they are
    NaN. A row: ``name`` and ``image`` of the scan, what the map is of, the ``values``, its highest value ``max``, where
    that is (``x_mm``, ``y_mm``, ``z_mm``, RAS+), and its ``map`` file below ``output_dir``. ``embedding.npy`` where an
    embedding is asked for.

    Args:
        keys: of the maps, MetaTensor [S, X, Y, Z] in the scan's geometry, see :class:`MapsInScand`.
        titles: what the S maps are of, column -> S entries, such as ``{"sentence": [...]}``.
        values: keys of numbers [S] of the item, one per map.
        embedding_key: of the scan's embedding [C], or None.
    """

    def __init__(
        self,
        keys: KeysCollection,
        titles: Mapping[str, Sequence[str]],
        output_dir: str,
        stem: str,
        table: ResultTable,
        values: Sequence[str] = (),
        embedding_key: str | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.titles, self.values, self.embedding_key = titles, values, embedding_key
        self.output_dir, self.stem, self.table = Path(output_dir), stem, table

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        folder = self.output_dir / data["name"]
        for key in self.key_iterator(data):
            folder.mkdir(parents=True, exist_ok=True)
            if self.embedding_key is not None:
                np.save(folder / "embedding.npy", data[self.embedding_key].float().cpu().numpy())
            highest, places = peaks(data[key])
            maps, qform = _to_save(data[key], data, "bilinear")
            rows = []
            for i in range(len(maps)):
                file = f"{self.stem}_{i + 1:02d}.nii.gz"
                values = np.nan_to_num(maps[i].cpu().numpy().astype(np.float32), nan=0.0)
                _save_nifti(values, maps.affine.cpu().numpy(), folder / file, qform)
                row = {"name": data["name"], "image": _path_of(data)}
                row |= {column: entries[i] for column, entries in self.titles.items()}
                known = {value: float(data[value][i]) for value in self.values}
                row |= {value: None if np.isnan(number) else round(number, 6) for value, number in known.items()}
                row |= {"max": round(float(highest[i]), 6)}
                row |= dict(zip(("x_mm", "y_mm", "z_mm"), places[i].round(1).tolist(), strict=True))
                rows.append(row | {"map": f"{data['name']}/{file}"})
            self.table.append(rows)
        return dict(data)


class AppendProbabilitiesd(MapTransform):
    """Appends a row per scan to the run's table: name, image, and a probability per class.

    Args:
        keys: of the probabilities [C].
        classes: their C names, the columns.
    """

    def __init__(self, keys: KeysCollection, classes: Sequence[str], table: ResultTable) -> None:
        super().__init__(keys)
        self.classes, self.table = classes, table

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        for key in self.key_iterator(data):
            values = data[key].float().cpu().tolist()
            row = {"name": data["name"], "image": _path_of(data), **dict(zip(self.classes, values, strict=True))}
            self.table.append([row])
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


def volumes(labels: MetaTensor, classes: Sequence[str]) -> pd.DataFrame:
    """``voxels`` and ``ml`` of each ``class`` 1, 2, ... of a label map ``[1, X, Y, Z]``."""
    counts = [int((labels == index).sum()) for index in range(1, len(classes) + 1)]
    millilitres = abs(float(torch.linalg.det(labels.affine[:3, :3].double()))) / 1000
    return pd.DataFrame({"class": classes, "voxels": counts, "ml": [round(n * millilitres, 2) for n in counts]})


class SaveLabelsd(MapTransform):
    """Saves what was segmented in a scan to ``<output_dir>/<name>/``, and a row a class to the run's table.

    ``labels.nii.gz``: class indices, uint8, in the scan's own geometry. A row: ``name`` and ``image`` of the scan,
    ``class``, ``voxels`` and ``ml``, and the file of the ``labels`` below ``output_dir``. Where the item has
    ``probability``: ``probability_<class>.nii.gz``, stored in steps of 1/255.

    Args:
        keys: of the label maps, see :class:`LabelsInScand`.
        classes: names of classes 1, 2, ...
    """

    def __init__(self, keys: KeysCollection, classes: Sequence[str], output_dir: str, table: ResultTable) -> None:
        super().__init__(keys)
        self.classes, self.table = list(classes), table
        self.output_dir = Path(output_dir)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        folder = self.output_dir / data["name"]
        for key in self.key_iterator(data):
            folder.mkdir(parents=True, exist_ok=True)
            maps, qform = _to_save(data[key], data, "nearest")
            affine = maps.affine.cpu().numpy()
            _save_nifti(maps[0].cpu().numpy(), affine, folder / "labels.nii.gz", qform)
            if "probability" in data:
                chances, qform = _to_save(MetaTensor(data["probability"], affine=data[key].affine), data, "bilinear")
                for name, chance in zip(self.classes, chances, strict=True):
                    file = f"probability_{name.replace(' ', '_')}.nii.gz"
                    _save_nifti(chance.cpu().numpy(), affine, folder / file, qform, scale=1 / 255)
            scan = {"name": data["name"], "image": _path_of(data)}
            file = {"labels": f"{data['name']}/labels.nii.gz"}
            self.table.append([scan | row | file for row in volumes(maps, self.classes).to_dict("records")])
        return dict(data)
