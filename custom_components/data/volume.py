"""One volume as its file holds it: what a plausible CT is, and the reader of NIfTI. Every limit stands here.

Training, inference and preparation read and check through this file. It imports neither torch nor MONAI, because
processes that do nothing but read start by the dozen, and the reader of another format only with the first such file.
"""

import math
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from custom_components.data.lists import CT_SUFFIXES
from custom_components.errors import InputError
from isal import igzip

# beyond what any scanner makes: they find zero, metres and micrometres, and memory that nobody has
MIN_SLICES = 3
MAX_VOXELS = 2**32
SPACING = (0.05, 20.0)  # mm
EXTENT = (20.0, 2500.0)  # mm
MAX_FIELD_OF_VIEW = 1000.0  # mm of every axis but the longest, which may be a whole patient's
MAX_ORIGIN = 1e5  # mm
MAX_RESCALING = 1e6
MAX_FILES = 10_000  # of one slice each
MIN_DETERMINANT = 0.5  # a voxel's volume over that of a box with its edges: 0.87 for a gantry tilted by 30 degrees
DEFLATE_RATIO = 1032  # at which gzip and zlib pack at most

# HU, and shares of voxels: extremes would pass what a few voxels of padding or metal have
PERCENTILES = (0.5, 50, 99.5)
AIR, MIN_AIR = (-1100.0, -750.0), 0.01
HALF_AIR = (-650.0, -350.0)  # where it lies in HU x 0.5, whose padding of -2048 then is what air should be
TISSUE, MIN_TISSUE = (-250.0, 250.0), 0.01
# Bone gets rarer with its density, and beside little tissue there is less of it: tissue that is shifted to 1000, or a
# skull to 0, are told by that.
BONE, DENSE, LITTLE_TISSUE = (250.0, 750.0), (750.0, math.inf), 0.04
METAL, MAX_METAL = (4000.0, math.inf), 0.005  # more of it is what wrapped around, or padding
# What lies below air is padding, of one value; air that is shifted or scaled has noise.
PADDING, MAX_NOISE = -1200.0, 0.05
MAX_ZEROS = 0.15  # of voxels that are water to the digit, which noise forbids: what was never written, or padding
MAX_HU = 1e6  # of a single voxel, before what is damaged spreads by interpolation
# in mm, of what a header may give lengths in
UNITS = {
    "mm": 1.0,
    "millimeter": 1.0,
    "millimetre": 1.0,
    "cm": 10.0,
    "m": 1e3,
    "meter": 1e3,
    "um": 1e-3,
    "micron": 1e-3,
}


class Unfit(InputError):
    """A scan that cannot be used; `reason` is the word under which a summary counts it."""

    def __init__(self, message: str, reason: str = "unreadable") -> None:  # noqa: B042  pickle keeps the reason
        super().__init__(message)
        self.reason = reason


@dataclass
class Raw:
    """Voxels as stored, [I, J, K] of any strides, with what turns them into HU at a place.

    Attributes:
        affine: [4, 4] float64, voxel index to RAS+ mm.
        slope, intercept: HU = slope x voxel + intercept.
        version: what kind of file it turned out to be, and what was assumed.
        guessed: what of the affine is a guess, because the header is blank there; "" where nothing is.
    """

    voxels: np.ndarray
    affine: np.ndarray
    slope: float = 1.0
    intercept: float = 0.0
    version: str = ""
    guessed: str = ""

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
    """Whether intensities can be HU of a trunk or a head: air and soft tissue where they belong, and not elsewhere.

    HU shifted, or scaled by more than two, are told; halved ones pass where their padding is noisy.
    """

    def share(window: tuple[float, float]) -> float:
        return np.mean((sample > window[0]) & (sample < window[1]))

    def noise(window: tuple[float, float]) -> float:
        """Share without that of the most frequent value, as which padding stands there."""
        _, counts = np.unique(sample[(sample > window[0]) & (sample < window[1])], return_counts=True)
        return (counts.sum() - counts.max(initial=0)) / sample.size

    return bool(
        np.isfinite(sample).all()
        and share(AIR) > MIN_AIR
        and (noise(AIR) > MIN_AIR or share(AIR) > share(HALF_AIR))
        and share(TISSUE) > MIN_TISSUE
        and (share(TISSUE) > LITTLE_TISSUE or share(TISSUE) > 2 * share(BONE))
        and share(DENSE) < 0.01 + 3 * share(BONE)
        and share(METAL) < MAX_METAL
        and noise((-math.inf, PADDING)) < MAX_NOISE
    )


def check_geometry(path: str | os.PathLike, raw: Raw) -> None:
    """Raises Unfit unless a volume has slices, and its voxels a size and place, that a scanner may give them."""
    shape, axes = raw.voxels.shape, raw.affine[:3, :3]
    if min(shape) < MIN_SLICES:
        reason = "few_slices" if min(shape) else "wrong_dimensions"
        thick = ("no voxel", "one voxel", "two voxels")[min(shape)]
        raise Unfit(f"{path} is {thick} thick ({_sizes(shape)}): give a volume of three slices or more", reason)
    spacing = np.linalg.norm(axes, axis=0)
    extent = spacing * shape
    if not np.isfinite(axes).all() or (spacing < SPACING[0]).any() or (spacing > SPACING[1]).any():
        found = _sizes(f"{s:g}" for s in spacing)
        raise Unfit(f"{path} has a voxel spacing of {found} mm, which no CT has: correct its header", "spacing")
    if (extent < EXTENT[0]).any() or (extent > EXTENT[1]).any() or sorted(extent)[1] > MAX_FIELD_OF_VIEW:
        found = _sizes(f"{e:.0f}" for e in extent)
        raise Unfit(f"{path} shows {found} mm of a patient, which no CT does: correct its header", "spacing")
    if abs(np.linalg.det(axes / spacing)) < MIN_DETERMINANT:
        raise Unfit(
            f"{path} has an affine whose axes do not span space: correct the orientation in its header", "spacing"
        )
    if not (np.abs(raw.affine[:3, 3]) < MAX_ORIGIN).all():  # NaN is not
        found = ", ".join(f"{o:g}" for o in raw.affine[:3, 3])
        raise Unfit(f"{path} begins at {found} mm, where no scanner reaches: correct its header", "spacing")


def check_voxels(path: str | os.PathLike, raw: Raw, check_hu: bool = True) -> np.ndarray:
    """Percentiles 0.5, 50 and 99.5 of a volume's HU, of a sample on a regular grid.

    Raises:
        Unfit: one voxel of all is NaN or infinite; all of the sample is the same; with `check_hu`, it is not HU.
    """
    voxels = raw.voxels
    if voxels.dtype.kind == "f":
        extremes = voxels.min(), voxels.max()  # NaN if any voxel is
        if not np.isfinite(extremes).all():
            count = int((~np.isfinite(voxels)).sum())
            raise Unfit(
                f"{path} holds NaN or infinity in {count} of {voxels.size} voxels: export it again", "non_finite"
            )
        if np.abs(extremes).max() > MAX_HU:
            raise Unfit(
                f"{path} has voxels from {extremes[0]:g} to {extremes[1]:g}, which are no HU: export it again", "not_hu"
            )
    if not (1 / MAX_RESCALING < abs(raw.slope) < MAX_RESCALING and abs(raw.intercept) < MAX_RESCALING):
        raise Unfit(f"{path} has a rescaling of {raw.slope:g} x + {raw.intercept:g}: correct its header", "not_hu")
    sample = raw.sample()
    percentiles = low, _, high = np.percentile(sample, PERCENTILES)
    if low == high:
        raise Unfit(f"{path} is empty, 99 % of its voxels are {low:g}: export it again", "empty")
    if check_hu and not is_hu(sample):
        raise Unfit(
            f"{path} has intensities from {low:g} to {high:g}, which are not HU (air is -1000, water 0): apply the "
            "rescale slope and intercept, once (those of CT-RATE's first version are in its metadata CSV)",
            "not_hu",
        )
    zeros, below = float(np.mean(sample == 0)), np.mean((sample > AIR[1]) & (sample < 0))
    if check_hu and zeros > MAX_ZEROS and below > MIN_TISSUE:  # without any fat or lung it is clipped at 0
        raise Unfit(
            f"{path} is exactly 0 HU in {zeros:.0%} of its voxels, where no tissue is without noise: part of it was "
            "never written, or what lies outside of the image is to be air (-1000)",
            "not_hu",
        )
    return percentiles


def _sizes(values: Iterable[Any]) -> str:
    return " x ".join(map(str, values))


def three_axes(path: Path, shape: Iterable[Any]) -> tuple[int, int, int]:
    """Three sizes, where further ones are 1: before memory is asked for."""
    sizes = tuple(int(size) for size in shape)
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes = sizes[:-1]
    if len(sizes) != 3:
        found = f"{_sizes(sizes[:3])}, {_sizes(sizes[3:])} channels" if len(sizes) > 3 else _sizes(sizes)
        raise Unfit(f"{path} is not one 3D volume ({found}): export a single volume", "wrong_dimensions")
    if min(sizes) < 0 or math.prod(sizes) > MAX_VOXELS:
        raise ValueError(f"its header tells of {_sizes(sizes)} voxels")
    return sizes


def first_line(error: BaseException) -> str:
    """Of what an error says, or its kind where it says nothing."""
    if isinstance(error, KeyError):  # of a word that is looked up, says no more than it
        return f"its {error.args[0]} is missing or unknown"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Turns what nibabel, gzip, zipfile, NumPy, pydicom and Pillow each raise for a damaged file into an Unfit."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        cause = first_line(error).replace(str(path), Path(path).name)[:200]
        raise Unfit(f"{path} cannot be read ({cause}): download or export it again") from error


def read_volume(path: str | os.PathLike, dicom_select: dict[str, Any] | None = None) -> Raw:
    """A CT file by the reader that its name asks for, or a folder with one DICOM series.

    `dicom_select` chooses among several volumes in a folder, see :func:`custom_components.data.dicom.read_dicom`.

    Raises:
        Unfit: it cannot be read whole, as all below.
    """
    path = Path(path)
    name = path.name.lower()
    with reading(path):
        if not path.exists():
            raise Unfit(f"{path} does not exist: give the path of a CT file or of a DICOM folder")
        if path.is_dir():
            from custom_components.data.dicom import read_dicom

            return read_dicom(path, dicom_select)
        if not name.endswith(CT_SUFFIXES):
            raise Unfit(f"{path} is neither {', '.join(CT_SUFFIXES)} nor a DICOM folder: convert it to one")
        if name.endswith((".nrrd", ".nhdr")):
            from custom_components.data.nrrd import read_nrrd

            return read_nrrd(path)
        elif name.endswith((".mha", ".mhd")):
            from custom_components.data.metaimage import read_metaimage

            return read_metaimage(path)
        return read_nifti(path)


def open_file(path: Path) -> BinaryIO:
    """A regular file to read: a pipe would be waited for, and a device never ends."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path.name} is a pipe or a device")
    return open(path, "rb")


def beside(path: Path, name: str) -> Path:
    """The file of voxels that the header in `path` names."""
    data = path.parent / name
    if not name or not os.path.exists(data) or data.is_dir():
        raise FileNotFoundError(f"its voxels, {name or 'a file without a name'}, are not beside it")
    return data


def numbered(pattern: str, first: int = 1, last: int = 1, step: int = 1) -> list[str]:
    """Names of the files of one slice each that a header tells of by a pattern, such as ``ct%03d.raw``."""
    if not re.fullmatch(r"[^%]*%0?\d?\dd[^%]*|[^%]*%d[^%]*", pattern) or step == 0:
        raise ValueError(f"{pattern!r} with step {step} is no pattern of file names")
    return [pattern % number for number in range(first, last + (1 if step > 0 else -1), step)[:MAX_FILES]]


def text_voxels(content: bytes, dtype: np.dtype, count: int) -> np.ndarray:
    """`count` voxels that are written as words."""
    words = content.split()
    if len(words) != count:
        raise EOFError(f"its voxels are stored as text, of {len(words)} words, and its header tells of {count}")
    voxels = np.array(words).astype(float)
    if dtype.kind != "f" and (voxels != voxels.astype(dtype)).any():
        raise ValueError(f"its voxels are no numbers of type {dtype}")
    return voxels.astype(dtype)


def in_mm(affine: np.ndarray, unit: str) -> np.ndarray:
    """An affine whose header gives its lengths in a unit."""
    if (name := unit.strip().lower().removesuffix("s")) not in UNITS:
        raise ValueError(f"its lengths are in {unit!r}, not in mm")
    return np.diag([*[UNITS[name]] * 3, 1.0]) @ affine


def raw_voxels(path: Path, dtype: np.dtype, count: int, offset: int = 0) -> np.ndarray:
    """`count` voxels that end with their file, as a map of it: they stay on disk until they are used."""
    with open_file(path) as file:
        expected, size = offset + count * dtype.itemsize, os.fstat(file.fileno()).st_size
        if size != expected:
            raise EOFError(f"{path.name} has {size} bytes, and the header tells of {expected}")
        voxels = np.memmap(file, dtype, "c", offset, count) if count else np.empty(0, dtype)
        return voxels if offset % dtype.itemsize == 0 else voxels.copy()


def packed_voxels(stream: BinaryIO, dtype: np.dtype, count: int, packed_size: int) -> np.ndarray:
    """`count` voxels of a decompressing stream, read on to its end, and so to its checksum."""
    if count * dtype.itemsize > DEFLATE_RATIO * packed_size:
        raise EOFError(f"its header tells of {count} voxels, which {packed_size} bytes cannot hold")
    voxels = np.empty(count, dtype)
    content = memoryview(voxels).cast("B")
    at = 0
    while at < len(content):
        if not (got := stream.readinto(content[at : at + (1 << 20)])):
            raise EOFError("its voxels are cut off")
        at += got
    if stream.read(1):
        raise ValueError("it holds more than its header tells of")
    return voxels


def numbers(path: Path, dtype: np.dtype) -> np.dtype:
    """The type itself, where it is one real number a voxel."""
    if dtype.kind not in "iuf":
        found = {"V": "bits or blocks", "c": "complex numbers"}.get(dtype.kind, str(dtype))
        found = "colours (RGB)" if dtype.names else found
        raise Unfit(f"{path} holds {found}, not one number a voxel: export it as a CT", "wrong_dimensions")
    return dtype


def read_nifti(path: str | os.PathLike) -> Raw:
    """A .nii, whose voxels stay on disk until they are used, or a .nii.gz, checked by its length and check sum.

    The slope and intercept of the header are in the result, not yet in its voxels. Writing to these leaves the file.
    """
    path = Path(path)
    with open_file(path) as file:
        compressed = path.name.lower().endswith(".gz")
        stream = igzip.GzipFile(fileobj=file) if compressed else file  # isal's, faster than the standard library's
        start = stream.read(nib.Nifti2Header.sizeof_hdr)
        kind = nib.Nifti2Header if start[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else nib.Nifti1Header
        # nibabel would mend what it finds wrong, such as a spacing of 0
        header = kind(start[: kind.sizeof_hdr], check=False)
        if header["magic"].item()[:3] not in (b"n+1", b"n+2"):
            raise ValueError("it is not a NIfTI file of header and voxels")
        dtype, shape = numbers(path, header.get_data_dtype()), three_axes(path, header.get_data_shape())
        if header["bitpix"] != 8 * dtype.itemsize:
            raise ValueError(f"its header tells of {header['bitpix']} bits a voxel, and of {dtype}")
        count, offset = math.prod(shape), int(header["vox_offset"]) or kind.single_vox_offset
        if offset < kind.sizeof_hdr:
            raise ValueError(f"its voxels begin at byte {offset}, in the header")
        if compressed:
            stream.seek(offset)
            voxels = packed_voxels(stream, dtype, count, os.fstat(file.fileno()).st_size)
        else:
            voxels = raw_voxels(path, dtype, count, offset)
    raw = Raw(voxels.reshape(shape, order="F"), _nifti_affine(header), *_nifti_rescaling(header), "NIfTI")
    if not header["qform_code"] and not header["sform_code"]:
        return with_guess(raw, "no orientation (neither qform nor sform)")
    return with_guess(raw)


def _nifti_rescaling(header: nib.Nifti1Header) -> tuple[float, float]:
    """Slope and intercept; a slope of 0, or NaN for both as nibabel writes it, stand for none."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or math.isnan(slope) and (math.isnan(intercept) or intercept == 0):
        return 1.0, 0.0
    if not math.isfinite(slope) or not math.isfinite(intercept):
        raise ValueError(f"its header has a rescaling of {slope:g} x + {intercept:g}")
    return slope, intercept


def _nifti_affine(header: nib.Nifti1Header) -> np.ndarray:
    """As nibabel chooses it, which takes sform before qform; but where both are there, they may not contradict."""
    spacing = np.abs(header["pixdim"][1:4])
    if not (np.isfinite(spacing).all() and spacing.all()):
        raise ValueError(f"its header has a spacing (pixdim) of {_sizes(f'{s:g}' for s in spacing)} mm")
    affine = np.asarray(header.get_best_affine(), float)
    if header["sform_code"] and header["qform_code"]:
        by_sform = np.linalg.norm(affine[:3, :3], axis=0)
        if not np.allclose(by_sform, spacing, rtol=0.2):  # a tilted gantry's sform is sheared
            found = f"{_sizes(f'{s:g}' for s in by_sform)} mm by its sform, {_sizes(f'{s:g}' for s in spacing)} by its"
            raise ValueError(f"its spacing is {found} qform (pixdim)")
        sides = [part[:3, :3] / np.linalg.norm(part[:3, :3], axis=0) for part in (affine, header.get_qform())]
        if (np.prod(sides, axis=0).sum(0) < 0.5).any():
            raise ValueError("its sform and qform turn the axes to different sides")
    unit = int(header["xyzt_units"]) & 7
    return in_mm(affine, {0: "mm", 1: "m", 2: "mm", 3: "um"}.get(unit, f"the unknown unit {unit}"))


def with_guess(raw: Raw, lacks: str = "") -> Raw:
    """Says what the header leaves open: what it `lacks`, or that nobody filled it in, as an identity affine shows."""
    if not lacks and np.allclose(np.abs(raw.affine), np.eye(4), atol=1e-4):
        lacks = "an identity affine, as where nothing was filled in"
    if lacks and np.isfinite(raw.affine).all() and np.linalg.det(raw.affine):  # others are refused later
        spacing = _sizes(f"{s:g}" for s in np.linalg.norm(raw.affine[:3, :3], axis=0))
        codes = "".join(nib.aff2axcodes(raw.affine))
        raw.guessed = f"its header has {lacks}: {spacing} mm and axes towards {codes} are assumed"
        raw.version += f", blank header, {spacing} mm and {codes} assumed"
    return raw


def linear_weights(places: np.ndarray, size: int, width: float = 1.0) -> np.ndarray:
    """Linear interpolation at places [n] of an axis as a matrix [n, size], float32, whose rows have the sum 1.

    What lies outside gets the outermost voxel. A triangle wider than one voxel averages, against aliasing.
    """
    places = np.clip(places, 0, size - 1)[:, None]
    weights = np.maximum(1 - np.abs(np.arange(size) - places) / width, 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
