"""A folder with one DICOM series of CT: every slice's place and rescaling is read, and none of them defaulted.

Values come as stored, compressed or not: MONOCHROME1, which only tells how to display them, leaves them alone.
"""

import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from custom_components.data.decompress import decompressed
from custom_components.data.volume import MAX_VOXELS, METAL, Raw, Unfit, is_hu, open_file, reading
from pydicom import Dataset, dcmread
from pydicom.dataelem import RawDataElement
from pydicom.errors import InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.pixels import pixel_array
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage

logger = logging.getLogger(__name__)

CT_CLASSES = (CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # and what begins so
SAME = 0.01  # mm within which two slices lie at one place
EVEN = 0.1  # of the spacing, within which slices lie at even distances
UNDEFINED = 0xFFFFFFFF  # length of an element that ends with a delimiter, as compressed voxels do
LAST = (0x7FE00010, 0xFFFAFFFA, 0xFFFCFFFC)  # voxels, and what may follow them: signatures, padding
# what slices of one patient in one place have in common, whatever their series says
ONE = ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID")
OTHERS = re.compile(
    "^(Enhanced )?(MR|PET|RT|Nuclear|Positron|Ultrasound|Raw|Encapsulated) |SR|Segmentation|Presentation"
)
PROJECTIONS = {"LOCALIZER", "MIP", "MINIP", "PROJECTION IMAGE"}
HU_TYPES = ("None", "HU", "HU_MOD", "US")  # US is unspecified
# what tells volumes of one folder apart, in the order in which a person would name it
SERIES = ("SeriesNumber", "SeriesDescription", "SeriesInstanceUID")
ACQUISITIONS = ("AcquisitionNumber", "TemporalPositionIdentifier", "TemporalPositionIndex")
ACQUISITIONS += ("NominalPercentageOfCardiacPhase", "KVP", "ConvolutionKernel")
CONDITIONS = ("ContrastBolusAgent", "ImageType")
CONDITIONS += ("AcquisitionDateTime", "AcquisitionTime", "ContentTime")


@dataclass
class Image:
    """A slice: a file, or a frame of an enhanced one. `parts` are the data sets that speak of it, nearest first."""

    path: Path
    frame: int
    parts: Sequence[Dataset]

    def get(self, keyword: str) -> Any:
        """The value of a DICOM keyword, or None where there is none."""
        values = (part.get(keyword) for part in self.parts)
        return next((value for value in values if value is not None and value != "" and value != []), None)

    def text(self, keyword: str) -> str:
        return _text(self.get(keyword))


def _text(value: Any) -> str:
    return "\\".join(map(str, value)) if isinstance(value, (MultiValue, list, tuple)) else str(value)


def read_dicom(folder: Path, select: Mapping[str, Any] | None = None) -> Raw:
    """The CT of the files directly in a folder. A tilted gantry gives an affine whose axes are not at right angles.

    Localizers, and files that are no CT (RTSTRUCT, SR), are left out, and a slice that is there twice counts once.

    Args:
        select: DICOM keyword -> value that the slices to read have, as `{"AcquisitionNumber": 2}`.

    Raises:
        Unfit: no CT or several; a slice is damaged, missing, or without its place, spacing or rescaling.
    """
    # pydicom's warnings, of values against the standard: those that count are checked here
    with warnings.catch_warnings(), _silent(logging.getLogger("pydicom")):
        warnings.simplefilter("ignore")
        images = _selected(folder, _slices_alone(folder, _ct_images(folder)), select or {})
        _refuse_series(folder, images)
        return _volume(folder, images)


@contextmanager
def _silent(other: logging.Logger) -> Iterator[None]:
    before, other.disabled = other.disabled, True
    try:
        yield
    finally:
        other.disabled = before


def _ct_images(folder: Path) -> list[Image]:
    images, others, strangers = [], Counter(), []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "DICOMDIR" or path.is_dir():
            continue
        with reading(path):
            try:
                with open_file(path) as file:
                    header = dcmread(file, stop_before_pixels=True)
            except InvalidDicomError:
                strangers.append(path)
                continue
            kind, modality = header.get("SOPClassUID"), header.get("Modality")
            if not kind and not modality:
                raise EOFError("it names neither its SOPClassUID nor its Modality")
            if _is_ct(header):
                images += _images(path, header)
            else:
                others[kind.name if kind and modality in (None, "", "CT") else modality] += 1
    if not images:
        if strangers and not others:
            others["no DICOM"] = len(strangers)
        found = ", ".join(f"{count} of {what}" for what, count in others.items())
        raise Unfit(f"{folder} holds 0 readable DICOM series of CT{f' ({found})' * bool(found)}: give the CT's folder")
    endings = {image.path.suffix.lower() for image in images}
    if damaged := [path for path in strangers if path.suffix.lower() in endings]:
        raise Unfit(f"{damaged[0]} is no DICOM file, as those beside it are: download it again, or take it away")
    return images


def _is_ct(header: Dataset) -> bool:
    """By its class and by its modality, of which one may be absent."""
    kind, modality = header.get("SOPClassUID"), header.get("Modality")
    if kind in CT_CLASSES:
        return modality in (None, "", "CT")
    # reports and raw data of a CT are no images
    return modality == "CT" and "Rows" in header and not (kind and OTHERS.search(kind.name))


def _images(path: Path, header: Dataset) -> list[Image]:
    if "PerFrameFunctionalGroupsSequence" not in header:
        return [Image(path, 0, [header])]

    def groups(item: Dataset) -> list[Dataset]:
        return [element.value[0] for element in item if element.VR == "SQ" and element.value]

    shared = [part for item in header.get("SharedFunctionalGroupsSequence", ()) for part in groups(item)]
    frames = header.PerFrameFunctionalGroupsSequence
    return [Image(path, i, [*groups(frame), *shared, header]) for i, frame in enumerate(frames)]


def _slices_alone(folder: Path, images: list[Image]) -> list[Image]:
    """Without localizers and projections, which say so or lie across the others, and pictures of a screen."""
    captured = [str(image.get("SOPClassUID")).startswith(SECONDARY_CAPTURE) for image in images]
    slices = [
        image
        for image, screen in zip(images, captured, strict=True)
        if not PROJECTIONS & set(image.text("ImageType").upper().split("\\")) and (all(captured) or not screen)
    ]
    placed = [image for image in slices if image.get("ImageOrientationPatient") is not None]
    if len(placed) > 2:
        normals = np.array(
            [np.cross(*_numbers(folder, [i], "ImageOrientationPatient", 6).reshape(2, 3)) for i in placed]
        )
        across = (np.abs(normals @ np.median(normals, axis=0)) < 0.7) & (np.linalg.norm(normals, axis=1) > 0.99)
        if 4 * across.sum() < len(placed):
            lying_across = {id(placed[i]) for i in np.flatnonzero(across)}
            slices = [image for image in slices if id(image) not in lying_across]
    if left_out := sorted({image.path.name for image in images} - {image.path.name for image in slices}):
        if not slices:
            raise Unfit(
                f"{folder} holds 0 readable DICOM series of CT, but localizers or projections: give the slices' folder"
            )
        logger.warning(
            f"{folder}: left out {', '.join(left_out[:3])}{', ...' * (len(left_out) > 3)}, no slice but "
            "a localizer, a projection or a picture of a screen"
        )
    return slices


def _selected(folder: Path, images: list[Image], select: Mapping[str, Any]) -> list[Image]:
    for keyword, value in select.items():
        chosen = [image for image in images if image.text(keyword) == _text(value)]
        if not chosen:
            found = _counts(images, keyword)
            raise Unfit(f"{folder} has no slice with the {keyword} {_text(value)}, but {found}: correct dicom_select")
        images = chosen
    return images


def _counts(images: Sequence[Image], keyword: str) -> str:
    """ "AcquisitionNumber 1 (34 slices), 2 (34 slices)"."""
    counts = sorted(Counter(image.text(keyword) for image in images).items())
    told = ", ".join(f"{value} ({count} slices)" for value, count in counts[:4])
    return f"{keyword} {told}{', ...' * (len(counts) > 4)}"


def _several(folder: Path, images: Sequence[Image], keyword: str, what: str) -> Unfit:
    example = {keyword: min(image.text(keyword) for image in images)}
    return Unfit(
        f"{folder} holds {what}, {_counts(images, keyword)}: choose one by dicom_select, such as {example}, or give a "
        "folder with the files of exactly one"
    )


def _refuse_series(folder: Path, images: Sequence[Image]) -> None:
    if any(image.get("SeriesInstanceUID") for image in images):
        _present(folder, images, "SeriesInstanceUID")
    count = len({image.text("SeriesInstanceUID") for image in images})
    if count > 1:
        apart = (k for k in SERIES if len({image.text(k) for image in images}) == count)
        raise _several(folder, images, next(apart), f"{count} readable DICOM series")
    for keyword in ONE:
        if len(values := {image.text(keyword) for image in images if image.get(keyword)}) > 1:
            raise _several(folder, images, keyword, f"slices of {len(values)} volumes")


def _present(folder: Path, images: Sequence[Image], keyword: str) -> None:
    if absent := [image for image in images if image.get(keyword) is None]:
        raise Unfit(
            f"{folder} has no {keyword} in {len(absent)} of {len(images)} slices ({absent[0].path.name}), and it "
            "cannot be guessed: export the series with it"
        )


def _numbers(folder: Path, images: Sequence[Image], keyword: str, size: int = 1) -> np.ndarray:
    """[N, size] values, which each slice must have."""
    _present(folder, images, keyword)
    values = []
    for image in images:
        with reading(image.path):
            value = np.array(image.get(keyword), float).reshape(-1)
            if value.shape != (size,) or not np.isfinite(value).all():
                raise ValueError(f"its {keyword} is {image.text(keyword)}")
            values.append(value)
    return np.array(values)


def _same(folder: Path, images: Sequence[Image], keyword: str, size: int = 1) -> np.ndarray:
    """[size] value that all slices have."""
    values = _numbers(folder, images, keyword, size)
    off = np.abs(values - np.median(values, axis=0)).max(1)
    if off.max() > 1e-3 * np.abs(values).max():
        odd = images[int(off.argmax())]
        raise Unfit(
            f"{folder} has slices of different {keyword}, such as {odd.path.name}: give the files of one volume"
        )
    return values.mean(0)


def _volume(folder: Path, images: list[Image]) -> Raw:
    rows, columns = (int(_same(folder, images, keyword)[0]) for keyword in ("Rows", "Columns"))
    if not 0 < rows * columns * len(images) <= MAX_VOXELS:
        raise Unfit(f"{folder} has {len(images)} slices of {columns} x {rows} voxels, which no CT has: export it again")
    along = _same(folder, images, "ImageOrientationPatient", 6).reshape(2, 3)
    if np.abs(along @ along.T - np.eye(2)).max() > 0.01:
        raise Unfit(f"{folder} has an ImageOrientationPatient that is no two axes at right angles: export it again")
    between_rows, between_columns = _same(folder, images, "PixelSpacing", 2)
    if min(between_rows, between_columns) <= 0:
        raise Unfit(f"{folder} has a PixelSpacing of {between_rows:g} x {between_columns:g} mm: export it again")
    normal = np.cross(*along)
    positions = _numbers(folder, images, "ImagePositionPatient", 3)
    rescaling = np.hstack([_numbers(folder, images, key) for key in ("RescaleSlope", "RescaleIntercept")])
    if not rescaling[:, 0].all():
        raise Unfit(
            f"{folder} has slices whose rescaling makes all values one (RescaleSlope 0): export it again", "not_hu"
        )
    if other := {image.text("RescaleType") for image in images} - set(HU_TYPES):
        raise Unfit(
            f"{folder} has slices of {', '.join(sorted(other))} (RescaleType), not of HU: give the CT", "not_hu"
        )

    order = np.argsort(positions @ normal, kind="stable")
    images, positions, rescaling = [images[i] for i in order], positions[order], rescaling[order]
    _refuse_acquisitions(folder, images, positions @ normal)
    voxels = _voxels(folder, images, rows, columns)
    kept = _without_repeats(folder, images, positions, voxels, rescaling)
    if len(kept) < len(images):
        logger.warning(f"{folder}: {len(images) - len(kept)} slices are there twice, and count once")
        voxels, positions, rescaling = voxels[kept], positions[kept], rescaling[kept]
        images = [images[i] for i in kept]
    voxels = _padded_by_air(voxels, images, rescaling)

    step = normal * float(images[0].get("SliceThickness") or 1)
    if len(kept) > 1:
        step = (positions[-1] - positions[0]) / (len(kept) - 1)
        off = np.linalg.norm(positions - positions[0] - np.arange(len(kept))[:, None] * step, axis=1).max()
        if off > EVEN * np.linalg.norm(step):
            raise Unfit(
                f"{folder} has slices {off:.1f} mm off an even spacing: files of the series are missing or damaged, "
                "export it again"
            )
    affine = np.eye(4)
    affine[:3] = np.stack([along[0] * between_columns, along[1] * between_rows, step, positions[0]], axis=1)
    version = "DICOM"
    if (tilt := np.degrees(np.arccos(min(1.0, step @ normal / np.linalg.norm(step))))) > 0.5:
        version += f", gantry tilted by {tilt:.1f} degrees"
    slope, intercept = rescaling[0].tolist()
    if np.ptp(rescaling, axis=0).any():
        voxels = voxels.astype(np.float32)
        voxels *= rescaling[:, 0, None, None]
        voxels += rescaling[:, 1, None, None]
        slope, intercept = 1.0, 0.0
        _refuse_odd_slices(folder, images, voxels, rescaling)
    # DICOM's +x is left and +y posterior
    return Raw(voxels.transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, slope, intercept, version)


def _padded_by_air(voxels: np.ndarray, images: Sequence[Image], rescaling: np.ndarray) -> np.ndarray:
    """What is outside of the scanner's circle may be stored as 63536, for -2000: air is what is there."""
    for i, (image, (slope, intercept)) in enumerate(zip(images, rescaling, strict=True)):
        value = image.get("PixelPaddingValue")
        if isinstance(value, int) and value * slope + intercept > METAL[0]:
            limits = np.iinfo(voxels.dtype)
            voxels[i][voxels[i] == value] = np.clip(round((-1000 - intercept) / slope), limits.min, limits.max)
    return voxels


def _refuse_odd_slices(folder: Path, images: Sequence[Image], hu: np.ndarray, rescaling: np.ndarray) -> None:
    """Slices whose rescaling is not that of most, and makes no HU of them where it does of the others."""
    values, which = np.unique(rescaling, axis=0, return_inverse=True)
    rows, columns = (max(1, size // 64) for size in hu.shape[1:])
    fits = [is_hu(hu[which.ravel() == i, ::rows, ::columns].ravel()) for i in range(len(values))]
    odd = np.flatnonzero(~np.array(fits)[which.ravel()])
    if 0 < len(odd) < len(images) / 4:
        raise Unfit(
            f"{folder} has slices that are not HU by their RescaleSlope and RescaleIntercept, as others are, such as "
            f"{images[odd[0]].path.name}: export it again",
            "not_hu",
        )


def _refuse_acquisitions(folder: Path, images: Sequence[Image], depths: np.ndarray) -> None:
    """Volumes that lie within each other; those one behind another are one, as of a table that moves on."""
    for keyword in ACQUISITIONS:
        values = np.array([image.text(keyword) for image in images])
        ends = sorted((depths[values == value].min(), depths[values == value].max()) for value in set(values))
        if any(begin < end + SAME for (_, end), (begin, _) in pairwise(ends)):
            raise _several(folder, images, keyword, f"{len(ends)} acquisitions of one place")


def _voxels(folder: Path, images: Sequence[Image], rows: int, columns: int) -> np.ndarray:
    """[slices, rows, columns] as stored."""
    files: dict[Path, list[int]] = {}
    for i, image in enumerate(images):
        files.setdefault(image.path, []).append(i)
    found: dict[Path, np.ndarray | str] = {}
    compressed = []
    for path, (first, *_) in files.items():
        colours = images[first].text("PhotometricInterpretation")
        if images[first].get("SamplesPerPixel") != 1 or colours not in ("MONOCHROME1", "MONOCHROME2"):
            raise Unfit(f"{path} holds colours ({colours}), not one number a voxel: give the CT's own slices")
        if images[first].get("HighBit") != images[first].get("BitsStored") - 1:
            raise Unfit(f"{path} stores its voxels in other bits than the standard has (HighBit): export it again")
        with reading(path):
            with open_file(path) as file:
                header = dcmread(file)
            stored = header.get_item("PixelData")
            _refuse_leftovers(path, header)
            if header.file_meta.TransferSyntaxUID.is_encapsulated:
                compressed.append(path)
                continue
            found[path] = pixel_array(header)
            if stored.length - found[path].nbytes not in (0, 1):  # even lengths are padded
                raise EOFError(f"it has {stored.length} bytes of voxels, and tells of {found[path].nbytes}")
    found |= zip(compressed, decompressed(compressed) if compressed else (), strict=False)  # it ends with a crash

    slices: list[np.ndarray | None] = [None] * len(images)
    for path, own in files.items():
        with reading(path):
            if isinstance(found[path], str):
                raise ValueError(found[path])
            frames = found[path].reshape(-1, rows, columns)
            if len(frames) != (told := int(images[own[0]].get("NumberOfFrames") or 1)) or len(frames) != len(own):
                raise EOFError(f"it has {len(frames)} frames, tells of {told}, and says of {len(own)} where they lie")
            for i in own:
                slices[i] = frames[images[i].frame]
    return np.stack(slices)


def _refuse_leftovers(path: Path, header: Dataset) -> None:
    """Raises unless the last element ends with the file: pydicom takes voxels among which bytes were put."""
    last = header.get_item(max(header.keys()))
    if last.tag not in LAST or not isinstance(last, RawDataElement):
        raise ValueError("its voxels are followed by bytes without a meaning")
    ends = last.value_tell + (len(last.value) + 8 if last.length == UNDEFINED else last.length)
    if not header.file_meta.TransferSyntaxUID.is_deflated and ends != (size := path.stat().st_size):
        raise EOFError(f"it has {size} bytes, and its elements end after {ends}")


def _without_repeats(
    folder: Path, images: Sequence[Image], positions: np.ndarray, voxels: np.ndarray, rescaling: np.ndarray
) -> list[int]:
    """Indices of the slices that are there for the first time."""
    kept = [0]
    for i in range(1, len(images)):
        last = kept[-1]
        if np.linalg.norm(positions[i] - positions[last]) > SAME:
            kept.append(i)
        elif not np.array_equal(voxels[i], voxels[last]) or (rescaling[i] != rescaling[last]).any():
            for keyword in CONDITIONS:
                if 1 < len({image.text(keyword) for image in images}) <= len(images) / 2:
                    raise _several(folder, images, keyword, "different slices at one place")
            raise Unfit(
                f"{folder} has different slices at one place, {images[last].path.name} and {images[i].path.name}: give "
                "the files of one volume"
            )
    return kept
