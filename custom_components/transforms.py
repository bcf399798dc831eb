"""Dictionary transforms that MONAI lacks: reading a CT so that each way of being bad ends in one line; saving maps."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pandas as pd
import torch
from monai.config import KeysCollection
from monai.data import ITKReader, MetaTensor
from monai.transforms import LoadImage, MapTransform
from monai.utils import ensure_tuple

from custom_components.datalists import CT_SUFFIXES, ITK_SUFFIXES, NIFTI_SUFFIXES
from custom_components.errors import InputError


class LoadCTd(MapTransform):
    """Reads CT volumes with the reader that the file's name asks for, and checks them.

    A path (.nii, .nii.gz, .nrrd, .nhdr, .mha, .mhd, or a folder with one DICOM series) becomes a MetaTensor
    [1, X, Y, Z] in the axis order of the file, whose affine maps voxel indices to RAS+ mm. A fourth axis of size 1 is
    dropped. Values have the slope and intercept of the file's own header applied. They are float32, but a NIfTI file
    that holds plain int16 stays so, and if it is not compressed it stays on disk: only voxels that are used are read.
    For label maps use :class:`monai.transforms.LoadImaged`: one without any label would be refused here.

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
    if voxels.dtype != np.int16:
        voxels = voxels.astype(np.float32)
    channels = voxels[None] if voxels.ndim < 4 else np.moveaxis(voxels, -1, 0)
    meta = {"filename_or_obj": str(path)}
    return MetaTensor(torch.from_numpy(channels), affine=torch.from_numpy(image.affine), meta=meta)


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


class SaveSimilarityd(MapTransform):
    """Saves what was found in a scan to ``<output_dir>/<name>/``.

    ``similarity_01.nii.gz`` and so on: one map per sentence, float32 cosines in the geometry of the maps' own affine.
    ``sentences.csv``: each sentence with its file, highest cosine and where that is (RAS+ mm). ``embedding.npy``.

    Args:
        keys: of the maps, MetaTensor [S, X, Y, Z], already inverted to the scan's geometry.
        sentences: the S sentences.
        output_dir: folder of all scans' results.
        embedding_key, name_key: of the scan's embedding [C] and of its name.
    """

    def __init__(
        self,
        keys: KeysCollection,
        sentences: Sequence[str],
        output_dir: str,
        embedding_key: str = "embedding",
        name_key: str = "name",
    ) -> None:
        super().__init__(keys)
        self.sentences = list(sentences)
        self.output_dir = Path(output_dir)
        self.embedding_key = embedding_key
        self.name_key = name_key

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        data = dict(data)
        folder = self.output_dir / data[self.name_key]
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "embedding.npy", data[self.embedding_key].float().cpu().numpy())
        for key in self.key_iterator(data):
            table = save_maps(data[key], self.sentences, folder, "similarity")
            table = table.rename(columns={"map": "sentence", "max": "max_cosine"})
            table.to_csv(folder / "sentences.csv", index=False)
        return data


class SaveSaliencyd(MapTransform):
    """Saves the saliency map of each class to ``<output_dir>/<name>/``; does nothing where none was made.

    ``saliency_01.nii.gz`` and so on: float32, what each place adds to the class' logit, in the geometry of the maps'
    own affine. ``saliency.csv``: each class with its file, highest value and where that is (RAS+ mm).

    Args:
        keys: of the maps, MetaTensor [S, X, Y, Z], already inverted to the scan's geometry.
        classes: names of the S maps.
        output_dir: folder of all scans' results.
        name_key: of the scan's name.
    """

    def __init__(self, keys: KeysCollection, classes: Sequence[str], output_dir: str, name_key: str = "name") -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.classes = list(classes)
        self.output_dir = Path(output_dir)
        self.name_key = name_key

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        data = dict(data)
        folder = self.output_dir / data[self.name_key]
        for key in self.key_iterator(data):
            folder.mkdir(parents=True, exist_ok=True)
            table = save_maps(data[key], self.classes, folder, "saliency").rename(columns={"map": "class"})
            table.to_csv(folder / "saliency.csv", index=False)
        return data


def save_maps(maps: MetaTensor, names: Sequence[str], folder: Path, stem: str) -> pd.DataFrame:
    """Write one map ``[X, Y, Z]`` per name as ``<stem>_01.nii.gz`` and so on, float32, with the maps' own affine.

    Returns:
        Columns ``file``, ``map`` (name), ``max``, and ``x_mm``, ``y_mm``, ``z_mm``, the place of the maximum in RAS+.
    """
    values, affine = maps.cpu().numpy(), maps.affine.numpy()
    rows = []
    for i, (name, volume) in enumerate(zip(names, values, strict=True), 1):
        file = f"{stem}_{i:02d}.nii.gz"
        nib.save(nib.Nifti1Image(volume.astype(np.float32), affine), folder / file)
        peak = np.unravel_index(volume.argmax(), volume.shape)
        x, y, z = (affine @ [*peak, 1])[:3].round(1)
        rows.append((file, name, round(float(volume.max()), 4), x, y, z))
    return pd.DataFrame(rows, columns=["file", "map", "max", "x_mm", "y_mm", "z_mm"])


class AppendProbabilitiesd(MapTransform):
    """Appends one row per scan to ``<output_dir>/predictions.csv``: name, image, and a probability per class.

    The file is begun anew with the first scan of a run. Rows are written as scans are done, so a kill loses none.

    Args:
        keys: of the probabilities [C].
        classes: their C names, the columns.
        output_dir: folder of all scans' results.
        name_key, image_key: of the scan's name, and of the MetaTensor that knows its path.
    """

    def __init__(
        self,
        keys: KeysCollection,
        classes: Sequence[str],
        output_dir: str,
        name_key: str = "name",
        image_key: str = "image",
    ) -> None:
        super().__init__(keys)
        self.classes = list(classes)
        self.path = Path(output_dir) / "predictions.csv"
        self.name_key = name_key
        self.image_key = image_key
        self.started = False

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for key in self.key_iterator(data):
            values = data[key].float().cpu().tolist()
            path = data[self.image_key].meta.get("filename_or_obj", "")
            row = {"name": data[self.name_key], "image": path, **dict(zip(self.classes, values, strict=True))}
            frame = pd.DataFrame([row])
            frame.to_csv(self.path, mode="a" if self.started else "w", header=not self.started, index=False)
            self.started = True
        return dict(data)
