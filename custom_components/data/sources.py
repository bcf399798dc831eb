"""Public chest CT data sets as their publishers ship them: which files they hold, and what is wrong with each format.

A source lists its scans, and reads one of them at a time into voxels, affine and rescaling. Nothing here imports torch
or MONAI, because processes that do nothing but read start by the dozen.
"""

import ast
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
from custom_components.data.tables import read_table
from custom_components.data.volume import Raw, Unfit, first_line, is_hu, open_file, read_nifti, read_volume
from custom_components.errors import InputError
from nibabel.orientations import axcodes2ornt
from PIL import Image
from tqdm import tqdm

SLICE_SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Scan:
    """One volume to prepare: paths as published, and where it goes below the folder of prepared volumes."""

    name: str
    image: str  # a file, or a folder of slices
    output: str  # relative, ends in .nii
    label: str | None = None
    label_output: str | None = None
    metadata: Mapping[str, str] | None = None  # CT-RATE's row of its metadata table


def read_npz(path: str | os.PathLike, key: str | None, axcodes: str, spacing: Sequence[float]) -> Raw:
    """An array without geometry: `axcodes` ("SPL") says where index grows to on each axis, `spacing` its mm."""
    with open_file(Path(path)) as file, np.load(file, allow_pickle=False) as archive:
        names = archive.files
        if key is None and len(names) == 1:
            key = names[0]
        if key not in names:
            raise ValueError(f"it has no array {key}, but {', '.join(names) or 'none'}")
        voxels = archive[key]
    if voxels.ndim > 3:
        voxels = voxels.squeeze()
    if voxels.ndim != 3 or voxels.dtype.kind not in "iuf":
        shape = " x ".join(map(str, voxels.shape))
        raise Unfit(f"{path} is not one 3D volume but {shape} of {voxels.dtype}: export it again", "wrong_dimensions")
    return Raw(voxels, affine_from(axcodes, spacing, voxels.shape), version=f"npz, {_assumed(axcodes, spacing)}")


def read_slices(folder: str | os.PathLike, window: Sequence[float], axcodes: str, spacing: Sequence[float]) -> Raw:
    """8-bit pictures, one a slice, in natural order ("2.png" before "10.png"); grey 0 and 255 are the window's ends.

    Slices of another size than most are resampled to that of most.
    """

    def natural(path: Path) -> list:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]

    files = (p for p in Path(folder).iterdir() if p.suffix.lower() in SLICE_SUFFIXES and not p.name.startswith("."))
    paths = sorted(files, key=natural)
    if len(paths) < 3:
        raise Unfit(
            f"{folder} holds {len(paths)} slices, and a volume has three or more: download it again", "few_slices"
        )
    pictures = []
    for path in paths:
        try:
            with open_file(path) as file, Image.open(file) as picture:
                picture.verify()  # a PNG's checksums, which reading passes over; a JPEG has none
            with Image.open(path) as picture:
                pictures.append(picture.convert("L"))
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and struct.error for damaged files
            raise ValueError(f"{path.name}: {first_line(error)}") from error
    size, most = Counter(picture.size for picture in pictures).most_common(1)[0]
    voxels = np.stack(
        [np.asarray(p if p.size == size else p.resize(size, Image.Resampling.BILINEAR)) for p in pictures]
    )
    low, high = window
    version = f"8-bit slices, window [{low:g}, {high:g}] and {_assumed(axcodes, spacing)}"
    if resized := len(pictures) - most:
        version += f", {resized} of {len(pictures)} slices resized to {size[0]} x {size[1]}"
    return Raw(voxels, affine_from(axcodes, spacing, voxels.shape), (high - low) / 255, low, version)


def affine_from(axcodes: str, spacing: Sequence[float], shape: Sequence[int]) -> np.ndarray:
    """Affine [4, 4] of an array whose axes grow towards `axcodes` ("SPL"), with RAS+ 0 mm in its middle."""
    affine = np.diag([0.0, 0, 0, 1])
    rows, signs = axcodes2ornt(axcodes).T
    affine[rows.astype(int), range(3)] = signs * spacing
    affine[:3, 3] = -affine[:3, :3] @ ((np.asarray(shape) - 1) / 2)
    return affine


def _check_axcodes(key: str, axcodes: str) -> None:
    if sorted(axcodes.translate(str.maketrans("RAS", "LPI"))) != ["I", "L", "P"]:
        raise InputError(f"{key} is {axcodes!r}: name each axis once, by R or L, A or P, and S or I, such as SPL")


def _assumed(axcodes: str, spacing: Sequence[float]) -> str:
    return f"{axcodes} and {' x '.join(f'{s:g}' for s in spacing)} mm assumed"


@dataclass
class Source:
    """A data set: `scans()` lists it, `read(scan)` and `read_label(scan)` read one. Instances pickle to the workers.

    Attributes:
        tables: files and folders of lists, labels and reports, which are copied beside the prepared volumes.
        label_values: value in a published label map -> value in the prepared one, all others 0; empty: kept.
    """

    tables: ClassVar[tuple[str, ...]] = ("lists",)
    label_values: ClassVar[Mapping[int, int]] = {}
    dataset_dir: str | os.PathLike

    def __post_init__(self) -> None:
        given, self.dataset_dir = self.dataset_dir, str(Path(self.dataset_dir).expanduser())
        if not os.path.isdir(self.dataset_dir):
            raise InputError(f"dataset_dir {given} is no folder: give the one that the data set was downloaded to")

    def scans(self) -> list[Scan]:
        """All scans, sorted by name, each name once."""
        raise NotImplementedError

    def read(self, scan: Scan) -> Raw:
        return read_volume(scan.image)

    def read_label(self, scan: Scan) -> Raw:
        return read_volume(scan.label)

    def _listed(self, scans: Mapping[str, Scan], wanted: str) -> list[Scan]:
        if not scans:
            raise InputError(f"dataset_dir {self.dataset_dir} holds no {wanted}: give the folder above it")
        return [scans[name] for name in sorted(scans)]

    def _walk(self, *folders: str) -> Iterator[Path]:
        """Files that are not hidden, in and below those of `folders` that exist, by folder and name."""
        with tqdm(desc="listing", unit="folder", delay=5, leave=False) as bar:
            for top in folders:
                for folder, subfolders, files in os.walk(os.path.join(self.dataset_dir, top)):
                    subfolders.sort()
                    bar.update()
                    yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))


@dataclass
class CTRate(Source):
    """CT-RATE, both versions, and volumes preprocessed as CT-CLIP does (``train_preprocessed/train_1/train_1a/...``).

    A volume's own content shows its version. A blank header (identity affine) takes spacing, orientation and position
    from the metadata table; intensities that are no HU take its slope and intercept; what is right already stays. Of
    one name in several folders, `*_fixed` counts before the first version, and that before CT-CLIP's.

    Attributes:
        preprocessed_spacing: mm of CT-CLIP's volumes, whose affine is lost, in R, A, S order.
        preprocessed_axcodes: where the index of their arrays grows to: of .npz and of .nii.gz files.
    """

    tables = tuple(
        f"{root}{folder}"
        for root in ("dataset/", "")
        for folder in ("radiology_text_reports", "multi_abnormality_labels", "metadata")
    ) + ("lists",)
    preprocessed_spacing: Sequence[float] = (0.75, 0.75, 1.5)
    preprocessed_axcodes: Mapping[str, str] = field(default_factory=lambda: {".npz": "SLP", ".nii.gz": "LPS"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for suffix, axcodes in self.preprocessed_axcodes.items():
            _check_axcodes(f"preprocessed_axcodes {suffix}", axcodes)

    def scans(self) -> list[Scan]:
        metadata = self._metadata()
        found: dict[str, Scan] = {}
        roots = [os.path.join(top, split) for split in ("train", "valid") for top in ("dataset", "")]
        folders = [f"{root}{version}" for version in ("_fixed", "", "_preprocessed") for root in roots]
        for path in self._walk(*folders):
            name = path.name.removesuffix(".gz").removesuffix(".nii").removesuffix(".npz")
            parts = name.split("_")
            if name == path.name or len(parts) != 4 or name in found:
                continue
            patient, scan = "_".join(parts[:2]), "_".join(parts[:3])
            output = f"dataset/{parts[0]}_fixed/{patient}/{scan}/{name}.nii"
            found[name] = Scan(name, str(path), output, metadata=metadata.get(name))
        return self._listed(found, "dataset/train_fixed, dataset/train or train_preprocessed with volumes of CT-RATE")

    def _metadata(self) -> dict[str, dict[str, str]]:
        rows: dict[str, dict[str, str]] = {}
        wanted = ("RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing")
        for top in ("dataset", ""):
            for path in sorted(Path(self.dataset_dir, top, "metadata").glob("*metadata*.csv")):
                frame = read_table(path)
                absent = [column for column in ("VolumeName", *wanted) if column not in frame.columns]
                if absent:
                    raise InputError(f"{path} has no column {', '.join(absent)}: download it again")
                placing = [c for c in ("ImageOrientationPatient", "ImagePositionPatient") if c in frame.columns]
                frame = frame.dropna(subset=["VolumeName"])
                names = frame["VolumeName"].str.strip().str.removesuffix(".nii.gz")
                for name, row in zip(names, frame[[*wanted, *placing]].fillna("").to_dict("records"), strict=True):
                    if rows.setdefault(name, row) != row:  # no number any more: this volume will be refused
                        rows[name] = {key: f"{rows[name].get(key)} or {cell}" for key, cell in row.items()}
        return rows

    def read(self, scan: Scan) -> Raw:
        if any(part.endswith("_preprocessed") for part in Path(os.path.relpath(scan.image, self.dataset_dir)).parts):
            return self._read_preprocessed(scan)
        raw = read_nifti(scan.image)
        blank = bool(raw.guessed) or np.allclose(raw.affine[:3, :3], np.eye(3), atol=1e-4)
        if scan.metadata is None:
            if blank:
                raise Unfit(f"{scan.image} has a blank header, and no metadata table names it: download it", "metadata")
            raw.version = "v2"
            return raw
        spacing, slope, intercept = _rescaling(scan)
        if blank and not np.allclose(spacing, 1, atol=1e-3):
            raw.affine, raw.guessed = _dicom_affine(scan, spacing, raw.voxels.shape), ""
        else:
            blank = False
            header = np.linalg.norm(raw.affine[:3, :3], axis=0)
            if not np.allclose(np.sort(header), np.sort(spacing), rtol=0.02):
                raise Unfit(
                    f"{scan.image} has a spacing of {' x '.join(f'{s:g}' for s in header)} mm in its header, and "
                    f"{' x '.join(f'{s:g}' for s in spacing)} in the metadata table: find out which is right",
                    "spacing",
                )
        rescaled = Raw(raw.voxels, raw.affine, raw.slope * slope, raw.intercept * slope + intercept)
        # Where a header is blank, the rescaling most likely is missing too; where it is right, it most likely is done.
        candidates = [rescaled, raw] if blank else [raw, rescaled]
        rescaled.version = "v1" if blank else "v2 header, rescaling was missing"
        raw.version = "v1 header, HU right" if blank else "v2"
        # where neither is HU, the checks refuse the first
        return next((candidate for candidate in candidates if is_hu(candidate.sample())), candidates[0])

    def _read_preprocessed(self, scan: Scan) -> Raw:
        suffix = ".npz" if scan.image.endswith(".npz") else ".nii.gz"
        axcodes = self.preprocessed_axcodes[suffix]
        # the spacing in the order of the array's axes
        spacing = [self.preprocessed_spacing["RLAPIS".index(code) // 2] for code in axcodes]
        if suffix == ".npz":
            raw = read_npz(scan.image, None, axcodes, spacing)
        else:
            raw = read_nifti(scan.image)
            raw.affine, raw.guessed = affine_from(axcodes, spacing, raw.voxels.shape), ""
        raw.version = f"CT-CLIP, {_assumed(axcodes, spacing)}"
        sample = raw.sample()
        if np.isfinite(sample).all() and np.abs(sample).max() <= 2:  # it may be stored as HU / 1000
            raw.slope, raw.intercept = raw.slope * 1000, raw.intercept * 1000
            raw.version += ", times 1000"
        return raw


def _rescaling(scan: Scan) -> tuple[np.ndarray, float, float]:
    """Spacing [3] in mm, slope and intercept of CT-RATE's metadata table."""
    row = scan.metadata
    try:
        spacing = np.array([*ast.literal_eval(row["XYSpacing"]), float(row["ZSpacing"])], float)
        slope, intercept = float(row["RescaleSlope"]), float(row["RescaleIntercept"])
        if spacing.shape != (3,) or not np.isfinite([*spacing, slope, intercept]).all() or slope == 0:
            raise ValueError
    except (ValueError, SyntaxError, TypeError) as error:
        found = ", ".join(f"{key} {value!r}" for key, value in row.items())
        raise Unfit(f"{scan.name} has {found} in the metadata table: correct it", "metadata") from error
    return spacing, slope, intercept


def _dicom_affine(scan: Scan, spacing: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """From the metadata table's orientation and position, where it has them; else of a patient on the back."""
    try:
        rows, columns = np.array(ast.literal_eval(scan.metadata["ImageOrientationPatient"]), float).reshape(2, 3)
        origin = np.array(ast.literal_eval(scan.metadata["ImagePositionPatient"]), float).reshape(3)
    except (KeyError, ValueError, SyntaxError, TypeError):
        return affine_from("LPS", spacing, shape)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([rows, columns, np.cross(rows, columns)], axis=1) * spacing
    affine[:3, 3] = origin
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


@dataclass
class RadChestCT(Source):
    """RAD-ChestCT: one .npz a scan, key ``ct``, int16 HU, first axis slices, no geometry in the file.

    Attributes:
        spacing: mm along the array's axes; the publishers resampled to 0.8 mm.
        axcodes: where the array's index grows to, slices first. Look at the contact sheet.
    """

    spacing: Sequence[float] = (0.8, 0.8, 0.8)
    axcodes: str = "IPL"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_axcodes("axcodes", self.axcodes)

    def scans(self) -> list[Scan]:
        found = {}
        for path in self._walk(""):
            if path.suffix == ".npz":
                found.setdefault(path.stem, Scan(path.stem, str(path), f"images/{path.stem}.nii"))
        return self._listed(found, ".npz files of RAD-ChestCT")

    def read(self, scan: Scan) -> Raw:
        return read_npz(scan.image, "ct", self.axcodes, self.spacing)


@dataclass
class CCCCII(Source):
    """CC-CCII: a folder of 8-bit slices a scan, without HU, spacing or orientation; what is assumed are keys.

    Attributes:
        window: HU of grey 0 and of grey 255.
        spacing: mm between slices, rows and columns.
        axcodes: where slices, rows and columns grow to.
    """

    window: Sequence[float] = (-1000.0, 1000.0)
    spacing: Sequence[float] = (5.0, 0.7, 0.7)
    axcodes: str = "IPL"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_axcodes("axcodes", self.axcodes)

    def scans(self) -> list[Scan]:
        found: dict[str, Scan] = {}
        for folder in dict.fromkeys(path.parent for path in self._walk("") if path.suffix.lower() in SLICE_SUFFIXES):
            if folder.name in found:
                raise InputError(f"{folder} and {found[folder.name].image} are two scans of one name: rename one")
            found[folder.name] = Scan(folder.name, str(folder), f"images_resized/{folder.name}.nii")
        return self._listed(found, "folders of .png or .jpg slices")

    def read(self, scan: Scan) -> Raw:
        return read_slices(scan.image, self.window, self.axcodes, self.spacing)


class LUNA16(Source):
    """LUNA16: .mhd with .raw in ``subset0`` to ``subset9``, lung masks of the same names in ``seg-lungs-LUNA16``."""

    tables = ("lists", "dataset.json", "annotations.csv")
    label_values = {3: 1, 4: 2, 5: 3}  # left lung, right lung, trachea

    def scans(self) -> list[Scan]:
        found = {}
        for path in self._walk(*(f"subset{i}" for i in range(10))):
            if path.suffix == ".mhd":
                label = os.path.join(self.dataset_dir, "seg-lungs-LUNA16", path.name)
                places = (label, f"masks_processed/{path.stem}.nii") if os.path.isfile(label) else (None, None)
                found[path.stem] = Scan(path.stem, str(path), f"images/{path.stem}.nii", *places)
        return self._listed(found, "subset0 to subset9 with .mhd files")


class BTCV(Source):
    """BTCV, or any segmentation data set laid out so: ``imagesTr``, ``labelsTr``, ``imagesTs``, ``dataset.json``."""

    tables = ("lists", "dataset.json")

    def scans(self) -> list[Scan]:
        found = {}
        labels = Path(self.dataset_dir, "labelsTr")
        for path in self._walk("imagesTr", "imagesTs"):
            stem = path.name.removesuffix(".gz").removesuffix(".nii")
            if stem == path.name:
                continue
            folder = path.parent.name
            candidates = [labels / path.name, labels / path.name.replace("img", "label")]
            label = next((p for p in candidates if p.is_file()), None) if folder == "imagesTr" else None
            name = f"{folder}/{stem}"
            label_output = label and f"labelsTr/{label.name.removesuffix('.gz').removesuffix('.nii')}.nii"
            found[name] = Scan(name, str(path), f"{name}.nii", label and str(label), label_output)
        return self._listed(found, "imagesTr with .nii.gz files")
