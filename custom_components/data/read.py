"""Dictionary transforms that MONAI lacks: reading so that each way of being bad ends in one line; maps to the scan."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import ITKReader, MetaTensor
from monai.transforms import LoadImage, MapLabelValue, MapTransform
from monai.utils import ensure_tuple
from torch import Tensor

from custom_components.data.lists import CT_SUFFIXES, ITK_SUFFIXES, NIFTI_SUFFIXES
from custom_components.errors import InputError

logger = logging.getLogger(__name__)


class LoadCTd(MapTransform):
    """Reads CT volumes with the reader that the file's name asks for, and checks them.

    A path (.nii, .nii.gz, .nrrd, .nhdr, .mha, .mhd, or a folder with one DICOM series) becomes a MetaTensor
    [1, X, Y, Z] in the axis order of the file, whose affine maps voxel indices to RAS+ mm. A fourth axis of size 1 is
    dropped. Values have the slope and intercept of the file's own header applied. They are float32, but a NIfTI file
    that holds plain int16 or uint8 stays so, and if it is not compressed it stays on disk: only voxels that are used
    are read.
    For label maps use :class:`LoadLabeld`: one without any label would be refused here.

    Args:
        keys: of the paths, which the volumes replace.
        hu_range: HU to clip to, or None. Clipping comes first, because interpolation would mix what scanners write
            outside their field of view (-3024) into the voxels at its edge.
        allow_missing_keys: whether to pass over keys that an item does not have.
        check_hu: whether to refuse intensities that cannot be HU: a chest has air (below -500) and tissue (above 0).

    Raises:
        InputError: the file is missing, of another format, damaged or cut off; it is not one 3D volume, or is one voxel
            thick; it holds NaN or infinity, or nothing; its spacing is impossible, or its intensities are not HU.
    """

    def __init__(
        self,
        keys: KeysCollection,
        allow_missing_keys: bool = False,
        check_hu: bool = True,
        hu_range: Sequence[float] | None = None,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.check_hu = check_hu
        self.hu_range = hu_range
        self.load = LoadImage(image_only=True, ensure_channel_first=True)
        # Left to choose, LoadImage reads .nrrd with whichever of pynrrd and ITK is installed; named readers are tried
        # in turn with all others, down to one that unpickles. Hence one reader per kind of file, given at the call.
        self.itk_reader = ITKReader()
        self.dicom_reader = DicomSeriesReader()

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        data = dict(data)
        for key in self.key_iterator(data):
            path = Path(data[key]).expanduser()
            image = self._read(path)
            low, high = _check(path, image, self.check_hu)
            if self.hu_range is not None and (low < self.hu_range[0] or high > self.hu_range[1]):
                image.clamp_(*self.hu_range)
            data[key] = image
        return data

    def _read(self, path: Path) -> MetaTensor:
        name = path.name.lower()
        if not path.exists():
            raise InputError(f"{path} does not exist: give the path of a CT file or of a DICOM folder")
        if path.is_dir():
            reader = self.dicom_reader
        elif name.endswith(NIFTI_SUFFIXES):
            reader = None
        elif name.endswith(ITK_SUFFIXES):
            reader = self.itk_reader
        else:
            raise InputError(f"{path} is neither {', '.join(CT_SUFFIXES)} nor a DICOM folder: convert it to one")
        try:
            return _read_nifti(path) if reader is None else self.load(path, reader)
        except InputError:
            raise
        except Exception as error:  # nibabel, gzip, zlib, NumPy and ITK each raise their own for a damaged file
            # ITK's text is about its own source files; the first line of nibabel's says what is wrong.
            cause = "its header or its voxels are missing, cut off or of another format"
            if reader is None and str(error):
                cause = str(error).splitlines()[0].replace(str(path), path.name)
            raise InputError(f"{path} cannot be read ({cause}): download or export it again") from error


def _read_nifti(path: Path) -> MetaTensor:
    """[C, X, Y, Z]; unlike LoadImage's, a memory map where the file allows it, whichever axis is fastest in it."""
    image = nib.load(path)
    voxels = np.asanyarray(image.dataobj)
    while voxels.ndim > 3 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    if voxels.dtype not in (np.int16, np.uint8):
        voxels = voxels.astype(np.float32)
    channels = voxels[None] if voxels.ndim < 4 else np.moveaxis(voxels, -1, 0)
    # as LoadImage has them: what a map made of the scan needs to come back to its grid
    grid = {"original_affine": image.affine, "spatial_shape": np.array(channels.shape[1:])}
    meta = {"filename_or_obj": str(path)} | grid
    return MetaTensor(torch.from_numpy(channels), affine=torch.from_numpy(image.affine), meta=meta)


class LoadLabeld(LoadCTd):
    """Reads a scan's label map beside the scan itself, in any format of :class:`LoadCTd`, and checks it.

    A path becomes a MetaTensor [1, X, Y, Z] of uint8 class indices on the scan's own grid. A map without any declared
    class is told as a warning and kept: all of that scan is background.

    Args:
        keys: of the paths, which the label maps replace.
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
        super().__init__(keys, check_hu=False)
        self.classes = list(classes)
        self.label_values = {int(value): int(index) for value, index in (label_values or {}).items()}
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        data = dict(data)
        for key in self.key_iterator(data):
            path, image = Path(data[key]).expanduser(), data[self.image_key]
            label = self._read(path)
            _check_same_grid(path, label, image)
            data[key] = MetaTensor(self._classes(path, label.as_tensor()), meta=label.meta)
        return data

    def _classes(self, path: Path, label: Tensor) -> Tensor:
        in_memory_order = torch.from_numpy(label.numpy().ravel(order="K"))  # any other order is far slower
        if label.dtype != torch.uint8:
            low, high = (float(value) for value in torch.aminmax(in_memory_order))
            if not (low >= 0 and high <= 255 and bool((label == label.byte()).all())):
                raise InputError(
                    f"{path} has values from {low:g} to {high:g}, some not whole: a label map holds 0 to 255"
                )
            label, in_memory_order = label.byte(), in_memory_order.byte()
        present = in_memory_order.bincount(minlength=1).nonzero().flatten().tolist()
        unknown = [value for value in present if self.label_values.get(value, value) > len(self.classes)]
        if unknown:
            raise InputError(
                f"{path} holds label values {unknown}, and classes end at {len(self.classes)} "
                f"({self.classes[-1]}): declare them in classes, or give label_values, such as {{'{unknown[0]}': 0}} "
                "to count them as background"
            )
        mapped = {value: self.label_values[value] for value in present if value in self.label_values}
        if mapped:
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
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)]) * [
        *np.array(image.shape[1:]) - 1,
        1,
    ]
    apart = np.linalg.norm(((label.affine - image.affine).numpy() @ corners.T)[:3], axis=0).max()
    if apart > 0.5 * np.linalg.norm(image.affine.numpy()[:3, :3], axis=0).min():
        raise InputError(
            f"{path} lies {apart:.1f} mm off {scan} by their headers (affine): correct the one that is wrong, or label "
            "the scan on its own grid"
        )


class DicomSeriesReader(ITKReader):
    """Reads a folder with one DICOM series. Where :class:`monai.data.ITKReader` would take the first of several, or
    stretch the slices over the place of a missing one, the volume would be wrong without an error: here it is one.
    """

    def read(self, data, **kwargs):
        """ITK image of the series in folder `data`. Raises InputError unless it has one series, without gaps."""
        folder = str(ensure_tuple(data)[0])
        finder = itk.GDCMSeriesFileNames.New()
        finder.SetUseSeriesDetails(True)  # tells slices apart that differ in orientation or size, such as a scout's
        finder.SetDirectory(folder)
        series = [finder.GetFileNames(uid) for uid in finder.GetSeriesUIDs()]
        if len(series) != 1:
            counts = " and ".join(str(len(files)) for files in series) or "no"
            raise InputError(
                f"{folder} holds {len(series)} readable DICOM series ({counts} slices): "
                "give a folder with the files of exactly one"
            )
        image = itk.imread(list(series[0]), **self.kwargs, **kwargs)
        # Largest distance in mm of a slice from where even spacing puts it; ITK leaves the key out where it is small.
        key, meta = "ITK_non_uniform_sampling_deviation", image.GetMetaDataDictionary()
        if key in meta.GetKeys() and meta[key] > 0.1 * image.GetSpacing()[2]:
            raise InputError(
                f"{folder} has slices {meta[key]:.1f} mm off an even spacing: "
                "files of the series are missing or damaged, export it again"
            )
        return image


def _check(path: Path, image: MetaTensor, check_hu: bool) -> tuple[float, float]:
    """Lowest and highest voxel of one volume [1, X, Y, Z] with content, a usable affine and, if asked, HU.

    Raises InputError if it is something else.
    """
    shape = " x ".join(str(size) for size in image.shape[1:])
    if image.ndim != 4 or image.shape[0] != 1:
        raise InputError(f"{path} is not one 3D volume ({shape}, {image.shape[0]} channels): export a single volume")
    if min(image.shape[1:]) < 2:
        raise InputError(f"{path} is one voxel thick ({shape}): give a volume of two slices or more")

    in_memory_order = torch.from_numpy(image.as_tensor().numpy().ravel(order="K"))  # any other order is far slower
    low, high = (float(value) for value in torch.aminmax(in_memory_order))  # both are NaN if any voxel is
    if not (np.isfinite(low) and np.isfinite(high)):
        count = int((~torch.isfinite(image.as_tensor())).sum())
        raise InputError(f"{path} holds NaN or infinity in {count} of {image.numel()} voxels: export it again")
    if low == high:
        raise InputError(f"{path} is empty, every voxel is {low:g}: export it again")

    # Bounds outside any CT scanner's: they find zero, metres and micrometres.
    axes = image.affine.numpy()[:3, :3]
    spacing = np.linalg.norm(axes, axis=0)
    if not (np.isfinite(image.affine.numpy()).all() and (0.05 < spacing).all() and (spacing < 50).all()):
        found = " x ".join(f"{size:g}" for size in spacing)
        raise InputError(f"{path} has a voxel spacing of {found} mm, which no CT has: correct its header")
    # Volume of a voxel over that of a box with its edges: 1 at right angles, 0.87 for a gantry tilted by 30 degrees.
    if abs(np.linalg.det(axes / spacing)) < 0.1:
        raise InputError(f"{path} has an affine whose axes do not span space: correct the orientation in its header")

    if check_hu and (low > -500 or high < 0):
        raise InputError(
            f"{path} has intensities from {low:g} to {high:g}, which are not HU (air is -1000, water 0): apply the "
            "rescale slope and intercept (those of CT-RATE's first version are in its metadata CSV)"
        )
    return low, high
