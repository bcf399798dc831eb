"""One volume as its file holds it: the reader of each format, and what a plausible CT is. Every limit stands here.

Training, inference and preparation read and check through this file. It imports neither torch nor MONAI, because
processes that do nothing but read start by the dozen, and ITK only with the first file that wants it.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from isal import igzip

from custom_components.data.lists import CT_SUFFIXES, ITK_SUFFIXES, NIFTI_SUFFIXES
from custom_components.errors import InputError

# beyond what any scanner makes: they find zero, metres and micrometres, and intensities that are not HU
MIN_SLICES = 3
SPACING = (0.05, 20.0)  # mm
EXTENT = (20.0, 2500.0)  # mm
MIN_DETERMINANT = 0.5  # a voxel's volume over that of a box with its edges: 0.87 for a gantry tilted by 30 degrees
PERCENTILES = (0.5, 50, 99.5)  # extremes would pass what a few voxels of padding or metal have
LOW_HU, HIGH_HU = (-5000.0, -500.0), (0.0, 5000.0)  # where a trunk's lowest and highest percentile lie: air, tissue


class Unfit(InputError):
    """A scan that cannot be used; `reason` is the word under which a summary counts it."""

    def __init__(self, message: str, reason: str = "unreadable") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass
class Raw:
    """Voxels as stored, [I, J, K] of any strides, with what turns them into HU at a place.

    Attributes:
        affine: [4, 4] float64, voxel index to RAS+ mm.
        slope, intercept: HU = slope x voxel + intercept.
        version: what kind of file it turned out to be, and what was assumed.
    """

    voxels: np.ndarray
    affine: np.ndarray
    slope: float = 1.0
    intercept: float = 0.0
    version: str = ""

    def hu(self) -> np.ndarray:
        """All voxels in HU: those in the file where it holds plain int16 or uint8, else float32."""
        plain = (self.slope, self.intercept) == (1.0, 0.0)
        if plain and self.voxels.dtype in (np.int16, np.uint8):
            return self.voxels
        voxels = self.voxels.astype(np.float32)
        if not plain:
            voxels *= np.float32(self.slope)
            voxels += np.float32(self.intercept)
        return voxels

    def sample(self) -> np.ndarray:
        """HU of some 14,000 voxels on a regular grid, float32 [N]."""
        steps = [max(1, round(size / 24)) for size in self.voxels.shape]
        some = self.voxels[tuple(slice(step // 2, None, step) for step in steps)].astype(np.float32).ravel()
        return some * np.float32(self.slope) + np.float32(self.intercept)


def is_hu(sample: np.ndarray) -> bool:
    """Whether intensities can be HU of a trunk: it has air (below -500) and tissue (above 0), nothing far beyond."""
    return bool(np.isfinite(sample).all()) and _are_hu(*np.percentile(sample, PERCENTILES))


def _are_hu(low: float, _: float, high: float) -> bool:
    return bool(LOW_HU[0] < low < LOW_HU[1] and HIGH_HU[0] < high < HIGH_HU[1])


def check_geometry(path: str | os.PathLike, raw: Raw) -> None:
    """Raises Unfit unless a volume has slices, and its voxels a size and place, that a scanner may give them."""
    shape, axes = raw.voxels.shape, raw.affine[:3, :3]
    if min(shape) < MIN_SLICES:
        reason = "few_slices" if min(shape) else "wrong_dimensions"
        thick = ("no voxel", "one voxel", "two voxels")[min(shape)]
        raise Unfit(f"{path} is {thick} thick ({_sizes(shape)}): give a volume of three slices or more", reason)
    spacing = np.linalg.norm(axes, axis=0)
    extent = spacing * shape
    if not np.isfinite(raw.affine).all() or (spacing < SPACING[0]).any() or (spacing > SPACING[1]).any():
        found = _sizes(f"{s:g}" for s in spacing)
        raise Unfit(f"{path} has a voxel spacing of {found} mm, which no CT has: correct its header", "spacing")
    if (extent < EXTENT[0]).any() or (extent > EXTENT[1]).any():
        found = _sizes(f"{e:.0f}" for e in extent)
        raise Unfit(f"{path} shows {found} mm of a patient, which no CT does: correct its header", "spacing")
    if abs(np.linalg.det(axes / spacing)) < MIN_DETERMINANT:
        raise Unfit(
            f"{path} has an affine whose axes do not span space: correct the orientation in its header", "spacing"
        )


def check_voxels(path: str | os.PathLike, raw: Raw, check_hu: bool = True) -> np.ndarray:
    """Percentiles 0.5, 50 and 99.5 of a volume's HU, of a sample on a regular grid.

    Raises:
        Unfit: one voxel of all is NaN or infinite; all of the sample is the same; with `check_hu`, it is not HU.
    """
    voxels = raw.voxels
    if voxels.dtype.kind == "f" and not np.isfinite([voxels.min(), voxels.max()]).all():  # NaN if any voxel is
        count = int((~np.isfinite(voxels)).sum())
        raise Unfit(f"{path} holds NaN or infinity in {count} of {voxels.size} voxels: export it again", "non_finite")
    if not np.isfinite([raw.slope, raw.intercept]).all() or raw.slope == 0:
        raise Unfit(f"{path} has a rescaling of {raw.slope:g} x + {raw.intercept:g}: correct its header", "not_hu")
    percentiles = low, _, high = np.percentile(raw.sample(), PERCENTILES)
    if low == high:
        raise Unfit(f"{path} is empty, 99 % of its voxels are {low:g}: export it again", "empty")
    if check_hu and not _are_hu(*percentiles):
        raise Unfit(
            f"{path} has intensities from {low:g} to {high:g}, which are not HU (air is -1000, water 0): apply the "
            "rescale slope and intercept, once (those of CT-RATE's first version are in its metadata CSV)",
            "not_hu",
        )
    return percentiles


def _sizes(values: Any) -> str:
    return " x ".join(map(str, values))


def _three_axes(path: Path, shape: Any) -> tuple[int, int, int]:
    """Three sizes, where further ones are 1."""
    shape = tuple(int(size) for size in shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        found = _sizes(shape[:3]) + "".join(f", {size} channels" for size in shape[3:4])
        raise Unfit(f"{path} is not one 3D volume ({found}): export a single volume", "wrong_dimensions")
    return shape


def first_line(error: BaseException) -> str:
    """Of what an error says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Turns what nibabel, gzip, zipfile, NumPy, ITK and Pillow each raise for a damaged file into an Unfit."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        cause = first_line(error).replace(str(path), Path(path).name)[:200]
        raise Unfit(f"{path} cannot be read ({cause}): download or export it again") from error


def read_volume(path: str | os.PathLike) -> Raw:
    """A CT file by the reader that its name asks for, or a folder with one DICOM series. Raises Unfit, as all below."""
    path = Path(path)
    name = path.name.lower()
    if not path.exists():
        raise Unfit(f"{path} does not exist: give the path of a CT file or of a DICOM folder")
    with reading(path):
        if path.is_dir() or name.endswith(ITK_SUFFIXES):
            return read_itk(path)
        if name.endswith(NIFTI_SUFFIXES):
            return read_nifti(path)
    raise Unfit(f"{path} is neither {', '.join(CT_SUFFIXES)} nor a DICOM folder: convert it to one")


def read_nifti(path: str | os.PathLike) -> Raw:
    """A .nii, whose voxels stay on disk until they are used, or a .nii.gz, checked by its length and check sum.

    The slope and intercept of the header are in the result, not yet in its voxels. Writing to these leaves the file.
    """
    path = Path(path)
    compressed = path.name.lower().endswith(".gz")
    with igzip.open(path) if compressed else open(path, "rb") as file:  # isal's, faster than the standard library's
        kind = nib.Nifti2Header if file.read(4) in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else nib.Nifti1Header
        file.seek(0)
        header = kind.from_fileobj(file)
        dtype, offset = header.get_data_dtype(), int(header.get_data_offset())
        shape = _three_axes(path, header.get_data_shape())
        if dtype.kind not in "iuf":
            raise Unfit(f"{path} holds {dtype}, not one number a voxel: export it as a CT", "wrong_dimensions")
        count = int(np.prod(shape, dtype=np.int64))
        if not compressed:
            if path.stat().st_size < offset + count * dtype.itemsize:
                raise EOFError("its voxels are cut off")
            voxels = np.memmap(path, dtype, "c", offset, count) if count else np.empty(0, dtype)
        else:
            file.seek(offset)
            voxels = np.empty(count, dtype)
            content = memoryview(voxels).cast("B")
            for at in range(0, len(content), 1 << 20):
                part = content[at : at + (1 << 20)]
                if file.readinto(part) < len(part):
                    raise EOFError("its voxels are cut off")
            while file.read(1 << 20):  # on to the check sum
                pass
    slope, intercept = header.get_slope_inter()
    slope, intercept = 1.0 if slope is None else float(slope), float(intercept or 0.0)
    affine = np.asarray(header.get_best_affine(), float)
    return Raw(voxels.reshape(shape, order="F"), affine, slope, intercept, "NIfTI")


def read_itk(path: Path) -> Raw:
    """A .nrrd, .nhdr, .mha or .mhd with its voxels, or a folder with one DICOM series."""
    import itk  # takes a second, which files of other formats need not

    if path.is_dir():
        image = _read_dicom(path)
    else:
        if path.suffix.lower() == ".mhd":
            _check_mhd(path)
        image = _by_itk(itk.imread, str(path))
    shape = _three_axes(path, (*itk.size(image), image.GetNumberOfComponentsPerPixel()))
    affine = np.eye(4)
    affine[:3, :3] = itk.array_from_matrix(image.GetDirection())[:3, :3] * np.asarray(image.GetSpacing())[:3]
    affine[:3, 3] = np.asarray(image.GetOrigin())[:3]
    # ITK's +x is left and +y posterior, NIfTI's right and anterior
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    return Raw(itk.array_from_image(image).T.reshape(shape, order="F"), affine, version="ITK")


def _by_itk(read: Callable, *arguments: Any) -> Any:
    try:
        return read(*arguments)
    except Exception as error:  # its text is about ITK's own source files
        raise ValueError("its header or its voxels are missing, cut off or of another format") from error


def _check_mhd(path: Path) -> None:
    """ITK reads a .raw that is too short without an error, and fills up with what the memory held."""
    import itk

    header = dict(re.findall(r"(?m)^\s*(\w+)\s*=\s*(.*?)\s*$", path.read_text(encoding="latin-1")))
    name = header.get("ElementDataFile", "LOCAL")
    if name in ("LOCAL", "LIST") or "%" in name:
        return  # within the file, or one file a slice
    data = path.parent / name
    if not data.is_file():
        raise FileNotFoundError(f"its voxels, {data.name}, are not beside it")
    image = itk.MetaImageIO.New()
    image.SetFileName(str(path))
    _by_itk(image.ReadImageInformation)
    skipped = int(header.get("HeaderSize", 0))  # -1: as much as there is before the voxels
    expected, size = image.GetImageSizeInBytes() + max(skipped, 0), data.stat().st_size
    if header.get("CompressedData", "").lower() != "true" and (size < expected or size > expected and skipped >= 0):
        raise EOFError(f"{data.name} has {size} bytes, and the header tells of {expected}")


def _read_dicom(folder: Path) -> Any:
    """ITK would take the first of several series, or stretch slices over a missing one's place: both are errors."""
    import itk

    finder = itk.GDCMSeriesFileNames.New()
    finder.SetUseSeriesDetails(True)  # a scout, of another orientation or size, is another series
    finder.SetDirectory(str(folder))
    series = [finder.GetFileNames(uid) for uid in finder.GetSeriesUIDs()]
    if len(series) != 1:
        counts = " and ".join(str(len(files)) for files in series) or "no"
        raise Unfit(
            f"{folder} holds {len(series)} readable DICOM series ({counts} slices): "
            "give a folder with the files of exactly one"
        )
    image = _by_itk(itk.imread, list(series[0]))
    # Largest distance in mm of a slice from where even spacing puts it; ITK leaves the key out where it is small.
    key, meta = "ITK_non_uniform_sampling_deviation", image.GetMetaDataDictionary()
    if key in meta.GetKeys() and meta[key] > 0.1 * image.GetSpacing()[2]:
        raise Unfit(
            f"{folder} has slices {meta[key]:.1f} mm off an even spacing: "
            "files of the series are missing or damaged, export it again"
        )
    return image


def linear_weights(places: np.ndarray, size: int, width: float = 1.0) -> np.ndarray:
    """Linear interpolation at places [n] of an axis as a matrix [n, size], float32, whose rows have the sum 1.

    What lies outside gets the outermost voxel. A triangle wider than one voxel averages, against aliasing.
    """
    places = np.clip(places, 0, size - 1)[:, None]
    weights = np.maximum(1 - np.abs(np.arange(size) - places) / width, 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
