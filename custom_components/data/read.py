"""Transforms that read scans and label maps, so that each way of being bad ends in one line."""

import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from custom_components.data.lists import stem
from custom_components.data.volume import (
    Raw,
    Unfit,
    check_geometry,
    check_voxels,
    numbers,
    read_volume,
    three_axes,
    with_guess,
)
from custom_components.errors import InputError
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapLabelValue, MapTransform
from torch import Tensor

logger = logging.getLogger(__name__)

IN_MEMORY = "the array"  # what stands for the path of a volume that was never a file


class LoadCTd(MapTransform):
    """Reads CT volumes with the reader that the file's name asks for, and checks them.

    A path (.nii, .nii.gz, .nrrd, .nhdr, .mha, .mhd, or a folder with one DICOM series) becomes a MetaTensor
    [1, X, Y, Z] in the axis order of the file, whose affine maps voxel indices to RAS+ mm. A fourth axis of size 1 is
    dropped. Values have the slope and intercept of the file's own header applied. They are float32, but a file that
    holds plain int16 or uint8 stays so, and if it is not compressed it stays on disk: only voxels that are used are
    read. Where a header is blank (no orientation, or an identity affine), a warning names what is assumed.
    An item without a ``name`` gets the file's, without its ending.
    A volume in memory, MetaTensor [X, Y, Z] or [1, X, Y, Z] in HU with its affine (RAS+ mm), is checked all the same.
    For label maps use :class:`LoadLabeld`: one without any label would be refused here.

    Args:
        hu_range: HU to clip to, or None. Clipping comes first, because interpolation would mix what scanners write
            outside their field of view (-3024) into the voxels at its edge.
        check_hu: whether to refuse intensities that cannot be HU, see :func:`custom_components.data.volume.is_hu`.
        check_sides: whether to refuse a blank header, where left and right matter.
        dicom_select: which of several volumes in a DICOM folder to read, as `{"AcquisitionNumber": 2}`.

    Raises:
        InputError: the file is missing, of another format, damaged or cut off; it is not one 3D volume, or is less
            than three voxels thick; it holds NaN or infinity, or nothing; its spacing or its extent is impossible, or
            its intensities are not HU; a DICOM folder lacks slices or what places them, or holds several volumes.
    """

    def __init__(
        self,
        keys: KeysCollection,
        allow_missing_keys: bool = False,
        check_hu: bool = True,
        hu_range: Sequence[float] | None = None,
        check_sides: bool = False,
        dicom_select: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.check_hu = check_hu
        self.hu_range = hu_range
        self.check_sides = check_sides
        self.dicom_select = dicom_select

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        data = dict(data)
        for key in self.key_iterator(data):
            given = data[key]
            path = Path(IN_MEMORY if isinstance(given, MetaTensor) else given).expanduser()
            with _in_one_line():
                raw = _held(given) if isinstance(given, MetaTensor) else read_volume(path, self.dicom_select)
                check_geometry(path, raw)
                if raw.guessed:
                    _told(path, raw.guessed, self.check_sides)
                check_voxels(path, raw, self.check_hu)
            image = as_metatensor(path, raw)
            data[key] = image if self.hu_range is None else _clipped(image, *self.hu_range)
            data.setdefault("name", stem(path))  # MONAI Label and Deploy send a path alone
        return data


def _held(image: MetaTensor) -> Raw:
    """A copy, since reading may clip it."""
    voxels = image.as_tensor().cpu().numpy().copy()
    voxels = voxels[0] if voxels.ndim == 4 and len(voxels) == 1 else voxels
    path = Path(IN_MEMORY)
    numbers(path, voxels.dtype)
    return with_guess(Raw(voxels.reshape(three_axes(path, voxels.shape)), image.affine.cpu().double().numpy()))


@cache
def _told(path: Path, guessed: str, refuse: bool) -> None:
    """Once a file, not once an epoch."""
    if refuse:
        raise InputError(f"{path} may be mirrored, {guessed}: write its affine, or set check_sides to false")
    logger.warning(f"{path}: {guessed}; left and right may be exchanged")


@contextmanager
def _in_one_line() -> Iterator[None]:
    """A data loader's worker sends an error as text, in which OneLineErrors knows InputError alone by its name."""
    try:
        yield
    except Unfit as error:
        raise InputError(str(error)) from error


def as_metatensor(path: Path, raw: Raw) -> MetaTensor:
    """[1, X, Y, Z] with what a map made of the scan needs to come back to its grid, as MONAI's LoadImage has it."""
    shape = np.array(raw.voxels.shape)
    meta = {"filename_or_obj": str(path), "original_affine": raw.affine, "spatial_shape": shape}
    return MetaTensor(torch.from_numpy(raw.hu())[None], affine=torch.from_numpy(raw.affine), meta=meta)


def _clipped(image: MetaTensor, low: float, high: float) -> MetaTensor:
    """In place, but in float32 where the image's own numbers have no such value as a bound that it passes."""
    least, greatest = map(float, torch.aminmax(_in_memory_order(image)))
    bounds = {"min": low} if least < low else {}
    bounds |= {"max": high} if greatest > high else {}
    if not bounds:
        return image
    if not image.is_floating_point():
        limits = torch.iinfo(image.dtype)
        if all(limits.min <= bound <= limits.max and bound == int(bound) for bound in bounds.values()):
            bounds = {name: int(bound) for name, bound in bounds.items()}
        else:
            image = image.float()
    return image.clamp_(**bounds)


def _in_memory_order(image: Tensor) -> Tensor:
    return torch.from_numpy(image.numpy().ravel(order="K"))  # any other order is far slower


class LoadLabeld(MapTransform):
    """Reads a scan's label map beside the scan itself, in any format of :class:`LoadCTd`, and checks it.

    A path becomes a MetaTensor [1, X, Y, Z] of uint8 class indices on the scan's own grid. A map without any declared
    class is a warning and kept: all of that scan is background.

    Args:
        classes: names of classes 1, 2, ...; 0 is background.
        label_values: what a value of the file means, as `{"3": 1, "6": 0}`; other values are class indices already.
        image_key: of the scan, read before by :class:`LoadCTd`.

    Raises:
        InputError: as :class:`LoadCTd` for the file; values that are not of a class; another shape or place than the
            scan's.
    """

    def __init__(
        self,
        keys: KeysCollection,
        classes: Sequence[str],
        label_values: Mapping[str, int] | None = None,
        image_key: str = "image",
    ) -> None:
        super().__init__(keys)
        self.classes = list(classes)
        self.label_values = {int(value): int(index) for value, index in (label_values or {}).items()}
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        data = dict(data)
        for key in self.key_iterator(data):
            path, image = Path(data[key]).expanduser(), data[self.image_key]
            with _in_one_line():
                label = as_metatensor(path, read_volume(path))
            _check_same_grid(path, label, image)
            data[key] = MetaTensor(self._classes(path, label.as_tensor()), meta=label.meta)
        return data

    def _classes(self, path: Path, label: Tensor) -> Tensor:
        in_memory_order = _in_memory_order(label)
        if label.dtype != torch.uint8:
            low, high = (float(value) for value in torch.aminmax(in_memory_order))
            if not (low >= 0 and high <= 255 and bool((label == label.byte()).all())):
                raise InputError(
                    f"{path} has values from {low:g} to {high:g}, some not whole: a label map holds 0 to 255"
                )
            label, in_memory_order = label.byte(), in_memory_order.byte()
        present = in_memory_order.bincount(minlength=1).nonzero().flatten().tolist()
        if unknown := [value for value in present if self.label_values.get(value, value) > len(self.classes)]:
            raise InputError(
                f"{path} holds label values {unknown}, and classes end at {len(self.classes)} "
                f"({self.classes[-1]}): declare them in classes, or give label_values, such as "
                f"{{{str(unknown[0])!r}: 0}} to count them as background"
            )
        if mapped := {value: self.label_values[value] for value in present if value in self.label_values}:
            label = MapLabelValue(list(mapped), list(mapped.values()), np.uint8)(label)
        if not any(self.label_values.get(value, value) for value in present):
            logger.warning(f"{path} holds none of the classes: the whole scan counts as background")
        return label


def _check_same_grid(path: Path, label: MetaTensor, image: MetaTensor) -> None:
    """Raises InputError unless a label map has its scan's shape, and every corner of it within half a voxel."""
    scan = image.meta.get("filename_or_obj", "its scan")
    if label.shape != image.shape:
        found, wanted = (" x ".join(str(size) for size in tensor.shape[1:]) for tensor in (label, image))
        raise InputError(f"{path} has {found} voxels and {scan} has {wanted}: give a label map on the scan's own grid")
    corners = np.array(list(product(*((0, size - 1) for size in image.shape[1:]), [1])))
    apart = np.linalg.norm(((label.affine - image.affine).numpy() @ corners.T)[:3], axis=0).max()
    if apart > 0.5 * np.linalg.norm(image.affine.numpy()[:3, :3], axis=0).min():
        raise InputError(
            f"{path} lies {apart:.1f} mm off {scan} by their headers (affine): correct the one that is wrong, or label "
            "the scan on its own grid"
        )
