"""MetaImage files, with their voxels (.mha) or beside them (.mhd): every promise of the header is checked.

ITK, which defines the format, fills up what a file lacks with what the memory held, and ends its process by a header
such as ``NDims = -1``.
"""

import math
import os
import zlib
from pathlib import Path

import numpy as np
from custom_components.data.volume import (
    Raw,
    Unfit,
    beside,
    in_mm,
    numbered,
    open_file,
    raw_voxels,
    text_voxels,
    three_axes,
    with_guess,
)

TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
RESCALING = {"Slope": 1, "Offset": 0}
NO_CT = ("MET_MOD_MR", "MET_MOD_NM", "MET_MOD_US")


def read_metaimage(path: Path) -> Raw:
    """A volume with its place.

    Raises:
        Exception: of any kind, for a file that cannot be read whole.
    """
    header, names, start = _header(path)
    sizes = [int(size) for size in header["DimSize"].split()]
    if len(sizes) != int(header["NDims"]):
        raise ValueError(f"its header contradicts itself: NDims {header['NDims']}, DimSize {header['DimSize']}")
    shape = three_axes(path, (*sizes, int(header.get("ElementNumberOfChannels", 1))))
    if (kind := header["ElementType"]) not in TYPES:
        raise Unfit(f"{path} holds {kind}, not one number a voxel: export it as a CT", "wrong_dimensions")
    big = any(_true(header, key) for key in ("BinaryDataByteOrderMSB", "ElementByteOrderMSB"))
    dtype = np.dtype(TYPES[kind]).newbyteorder(">" if big else "<")
    if (kind := header.get("ObjectType", "Image")) != "Image" or (kind := header.get("Modality")) in NO_CT:
        raise Unfit(f"{path} is no CT, by its header ({kind}): give a CT")
    if names == ["LOCAL"]:
        parts = [(path, start)]
    else:
        parts = [(beside(path, name), 0) for name in names]
    count, rest = divmod(math.prod(shape), len(parts))
    if rest:
        raise ValueError(f"{len(parts)} files cannot hold {math.prod(shape)} voxels")
    voxels = [_voxels(file, header, dtype, count, start) for file, start in parts]
    voxels = voxels[0] if len(voxels) == 1 else np.concatenate(voxels)
    affine, lacks = _affine(header, len(sizes))
    rescaling = (float(header.get(f"ElementToIntensityFunction{key}", value)) for key, value in RESCALING.items())
    return with_guess(Raw(voxels.reshape(shape, order="F"), affine, *rescaling, version="MetaImage"), lacks)


def _header(path: Path) -> tuple[dict[str, str], list[str], int]:
    """Fields, names of the files of voxels ("LOCAL" is this one), and where the header ends."""
    header: dict[str, str] = {}
    with open_file(path) as file:
        for line in file:
            key, equals, value = (part.strip() for part in line.decode("latin-1").partition("="))
            if not equals and key:
                raise ValueError("its header is no list of 'name = value'")
            if key and header.setdefault(key, value) != value:
                raise ValueError(f"its header has two values of {key}")
            if key == "ElementDataFile":
                break
        else:
            raise ValueError("its header names no ElementDataFile")
        names = ["LOCAL" if value.upper() == "LOCAL" else value]
        if value.split()[:1] == ["LIST"]:
            names = file.read().decode("latin-1").split("\n")
            names = [name.strip() for name in names if name.strip()]
            if not names:
                raise ValueError("its header lists no file of voxels")
        elif "%" in value:  # ct%03d.raw 1 40 1
            pattern, *numbers = value.split()
            names = numbered(pattern, *map(int, numbers))
        return header, names, file.tell()


def _true(header: dict[str, str], key: str, default: str = "False") -> bool:
    return header.get(key, default)[:1] in "Tt1"


def _affine(header: dict[str, str], ndims: int) -> tuple[np.ndarray, str]:
    """[4, 4] to RAS+ mm, and what the header lacks for it."""

    def field(size: int, *keys: str) -> np.ndarray | None:
        text = next((header[key] for key in keys if key in header), None)
        return None if text is None else np.array(text.split(), float).reshape((ndims,) * size)

    spacing = field(1, "ElementSpacing", "ElementSize")
    matrix = field(2, "TransformMatrix", "Rotation", "Orientation")
    origin = field(1, "Offset", "Position", "Origin")
    affine = np.eye(4)
    if spacing is not None and (spacing < 0).any():
        raise ValueError(f"its ElementSpacing is {' '.join(f'{s:g}' for s in spacing)}")
    if matrix is not None:
        lengths = np.linalg.norm(matrix, axis=1)
        if (np.abs(lengths - 1) > 0.01)[lengths > 0].any():  # 0 is a spacing of 0, refused later
            raise ValueError("its TransformMatrix is no matrix of directions")
        affine[:3, :3] = matrix[:3, :3].T  # a row an axis
    if spacing is not None:
        affine[:3, :3] *= spacing[:3]
    if origin is not None:
        affine[:3, 3] = origin[:3]
    found = {"ElementSpacing": spacing, "TransformMatrix": matrix}
    lacks = " and ".join(f"no {key}" for key, value in found.items() if value is None)
    to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])  # its +x is left and +y posterior
    return to_ras @ in_mm(affine, header.get("DistanceUnits", "mm")), lacks


def _voxels(path: Path, header: dict[str, str], dtype: np.dtype, count: int, start: int) -> np.ndarray:
    if not _true(header, "BinaryData", "True"):
        with open_file(path) as file:
            file.seek(start)
            return text_voxels(file.read(), dtype, count)
    size = count * dtype.itemsize
    skipped = int(header.get("HeaderSize", 0))  # -1: as much as there is before the voxels
    if not _true(header, "CompressedData"):
        return raw_voxels(path, dtype, count, start + skipped if skipped >= 0 else os.stat(path).st_size - size)
    with open_file(path) as file:
        file.seek(start + max(skipped, 0))
        content = file.read()
    told = int(header.get("CompressedDataSize", len(content)))
    inflating = zlib.decompressobj(zlib.MAX_WBITS | 32)  # zlib's or gzip's header
    voxels = inflating.decompress(content, size + 1)
    if told != len(content) or not inflating.eof or inflating.unused_data or len(voxels) != size:
        raise EOFError(f"{path.name} holds other voxels than the {size} bytes that its header tells of")
    return np.frombuffer(bytearray(voxels), dtype)
