"""NRRD files, attached (.nrrd) and detached (.nhdr): the header by pynrrd, the voxels to their length or checksum."""

import bz2
import math
import os
from pathlib import Path

import nrrd
import numpy as np
from isal import igzip
from nrrd.reader import _determine_datatype  # its table of type names has no public name

from custom_components.data.volume import (
    Raw,
    beside,
    numbers,
    open_file,
    packed_voxels,
    raw_voxels,
    three_axes,
    with_guess,
)

TO_RAS = {
    "right-anterior-superior": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
}
SPACES = {"RAS": "right-anterior-superior", "LAS": "left-anterior-superior", "LPS": "left-posterior-superior"}
MILLIMETRES = {"mm", "millimeter", "millimeters", "millimetre", "millimetres", ""}


def read_nrrd(path: Path) -> Raw:
    """A volume with its place; a header without one is read as ITK does, and says so in `guessed`.

    Raises:
        Exception: of any kind, for a file that cannot be read whole.
    """
    with open_file(path) as file:
        header = nrrd.read_header(file)
        start = file.tell()
    header = {key.replace(" ", ""): value for key, value in header.items()}  # data file, datafile
    dtype = numbers(path, _determine_datatype(header))
    sizes, directions = header["sizes"].tolist(), header.get("spacedirections")
    if len(sizes) != header["dimension"] or directions is not None and len(directions) != len(sizes):
        raise ValueError(f"its header contradicts itself: dimension {header['dimension']}, sizes {sizes}")
    in_space = _spatial(sizes, directions, header.get("kinds"))
    order = sorted(range(len(sizes)), key=lambda axis: not in_space[axis])
    shape = three_axes(path, (sizes[axis] for axis in order))
    voxels = _voxels(path, header, dtype, math.prod(sizes), start).reshape(sizes, order="F")
    affine, lacks = _affine(header, directions, order[:3])
    return with_guess(Raw(voxels.transpose(order).reshape(shape, order="F"), affine, version="NRRD"), lacks)


def _spatial(sizes: list[int], directions: np.ndarray | None, kinds: list[str] | None) -> list[bool]:
    """Which axes lie in the patient: others hold channels or times."""
    if directions is not None:
        return np.isfinite(directions).all(1).tolist()
    if kinds is not None:
        return [kind in ("domain", "space") for kind in kinds]
    return [len(sizes) == 3 or size > 1 for size in sizes]


def _affine(header: dict, directions: np.ndarray | None, axes: list[int]) -> tuple[np.ndarray, str]:
    """[4, 4] to RAS+ mm, and what the header lacks for it."""
    units = {str(unit).lower() for key in ("spaceunits", "units") for unit in header.get(key, ())}
    if other := units - MILLIMETRES - {"???", "none", "nan"}:
        raise ValueError(f"its units are {', '.join(sorted(other))}, not mm")
    affine, lacks = np.eye(4), ""
    if directions is not None:
        affine[:3, :3] = directions[axes].T
    elif "spacings" in header:
        affine[:3, :3] = np.diag(header["spacings"][axes])
        lacks = "no space directions"
    else:
        lacks = "no space directions and no spacings"
    affine[:3, 3] = header.get("spaceorigin", np.zeros(3))
    space = header.get("space", "")
    space = SPACES.get(space.upper(), space.lower())
    if space not in TO_RAS and not lacks:
        lacks = f"the space {space!r}" if space else "no space"
    return np.diag([*TO_RAS.get(space, TO_RAS["left-posterior-superior"]), 1.0]) @ affine, lacks


def _voxels(path: Path, header: dict, dtype: np.dtype, count: int, start: int) -> np.ndarray:
    """[count], wherever and however the header says that they are stored."""
    if "datafile" in header:
        path, start = beside(path, header["datafile"]), 0
    skipped = int(header.get("byteskip", 0))
    with open_file(path) as file:
        file.seek(start)
        for _ in range(int(header.get("lineskip", 0))):
            if not file.readline():
                raise EOFError("its voxels are cut off")
        start, size = file.tell(), os.fstat(file.fileno()).st_size
        encoding = header["encoding"].lower()
        if encoding == "raw":
            offset = start + skipped if skipped >= 0 else size - count * dtype.itemsize
            return raw_voxels(path, dtype, count, offset)
        if encoding in ("gzip", "gz"):
            stream = igzip.GzipFile(fileobj=file)
        elif encoding in ("bzip2", "bz2"):
            stream = bz2.BZ2File(file)
        else:
            raise ValueError(f"its voxels are stored as {encoding}, and neither raw nor gzip")
        stream.seek(max(skipped, 0))
        return packed_voxels(stream, dtype, count, size)
