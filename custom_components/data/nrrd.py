"""NRRD files, attached (.nrrd) and detached (.nhdr): the header by pynrrd, the voxels to their length or checksum."""

import bz2
import io
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import nrrd
import numpy as np
from custom_components.data.volume import (
    Raw,
    beside,
    in_mm,
    numbered,
    numbers,
    open_file,
    packed_voxels,
    raw_voxels,
    text_voxels,
    three_axes,
    with_guess,
)
from isal import igzip
from nrrd.reader import _determine_datatype  # its table of type names has no public name

TO_RAS = {
    "right-anterior-superior": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
}
SPACES = {"RAS": "right-anterior-superior", "LAS": "left-anterior-superior", "LPS": "left-posterior-superior"}
NO_UNIT = {"", "???", "none", "nan"}


def read_nrrd(path: Path) -> Raw:
    """A volume with its place; a header without one is read as ITK does, and says so in `guessed`.

    Raises:
        Exception: of any kind, for a file that cannot be read whole.
    """
    with open_file(path) as file:
        header = nrrd.read_header(_header_lines(file))
        start = file.tell()
        header = {key.replace(" ", ""): value for key, value in header.items()}  # data file, datafile
        names = _voxel_files(header, file)
    dtype = numbers(path, _determine_datatype(header))
    sizes, directions = header["sizes"].tolist(), header.get("spacedirections")
    if len(sizes) != header["dimension"] or directions is not None and len(directions) != len(sizes):
        raise ValueError(f"its header contradicts itself: dimension {header['dimension']}, sizes {sizes}")
    if directions is not None and directions.shape[1] != 3:  # as where all are none
        raise ValueError("its space directions are no directions in space")
    in_space = _spatial(sizes, directions, header.get("kinds"))
    if sum(in_space) < 3 <= len(sizes):
        raise ValueError(f"it has {sum(in_space)} axes in the patient, by its space directions or kinds")
    order = sorted(range(len(sizes)), key=lambda axis: not in_space[axis])
    shape = three_axes(path, (sizes[axis] for axis in order))
    parts = [(beside(path, name), 0) for name in names] or [(path, start)]
    count, rest = divmod(math.prod(sizes), len(parts))
    if rest:
        raise ValueError(f"{len(parts)} files cannot hold {math.prod(sizes)} voxels")
    voxels = [_voxels(file, header, dtype, count, begin) for file, begin in parts]
    voxels = (voxels[0] if len(voxels) == 1 else np.concatenate(voxels)).reshape(sizes, order="F")
    affine, lacks = _affine(header, directions, order[:3])
    return with_guess(Raw(voxels.transpose(order).reshape(shape, order="F"), affine, version="NRRD"), lacks)


def _header_lines(file: BinaryIO) -> Iterator[str]:
    """Up to a list of files, which is no field."""
    for line in file:
        yield line.decode("utf-8", "surrogateescape")
        if re.fullmatch(rb"data ?file: *LIST.*", line.strip()):
            return


def _voxel_files(header: dict, file: BinaryIO) -> list[str]:
    """Names of the files that hold the voxels, if those do not follow the header."""
    if "datafile" not in header:
        return []
    words = header["datafile"].split()
    if words[:1] == ["LIST"]:
        names = [name for line in file if (name := line.decode("utf-8", "surrogateescape").strip())]
    elif "%" in header["datafile"]:
        names, words = numbered(words[0], *map(int, words[1:4])), words[3:]
    else:
        return [header["datafile"]]
    if not names or words[1:] not in ([], [str(header["dimension"] - 1)]):
        raise ValueError(f"its voxels are in {len(names)} files, {header['datafile']}, and not in one a slice")
    return names


def _spatial(sizes: list[int], directions: np.ndarray | None, kinds: list[str] | None) -> list[bool]:
    """Which axes lie in the patient: others hold channels or times."""
    if directions is not None:
        return np.isfinite(directions).all(1).tolist()
    if kinds is not None:
        return [kind in ("domain", "space") for kind in kinds]
    return [len(sizes) == 3 or size > 1 for size in sizes]


def _affine(header: dict, directions: np.ndarray | None, axes: list[int]) -> tuple[np.ndarray, str]:
    """[4, 4] to RAS+ mm, and what the header lacks for it."""
    units = {str(unit).lower() for key in ("spaceunits", "units") for unit in header.get(key, ())} - NO_UNIT
    if len(units) > 1:
        raise ValueError(f"its axes have different units, {', '.join(sorted(units))}")
    affine, lacks = np.eye(4), ""
    if directions is not None:
        affine[:3, :3] = directions[axes].T
        if "spacings" in header and not np.allclose(
            header["spacings"][axes], np.linalg.norm(directions[axes], axis=1), rtol=0.02
        ):
            raise ValueError("its spacings and its space directions contradict each other")
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
    to_ras = np.diag([*TO_RAS.get(space, TO_RAS["left-posterior-superior"]), 1.0])
    return to_ras @ in_mm(affine, *units or ["mm"]), lacks


def _voxels(path: Path, header: dict, dtype: np.dtype, count: int, start: int) -> np.ndarray:
    """[count], however the header says that they are stored in a file."""
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
        if encoding in ("ascii", "text", "txt"):
            return text_voxels(file.read(), dtype, count)
        if encoding == "hex":
            return packed_voxels(io.BytesIO(bytes.fromhex(file.read().decode("ascii"))), dtype, count, size)
        if encoding in ("gzip", "gz"):
            stream = igzip.GzipFile(fileobj=file)
        elif encoding in ("bzip2", "bz2"):
            stream = bz2.BZ2File(file)
        else:
            raise ValueError(f"its voxels are stored as {encoding}, which is not read")
        stream.seek(max(skipped, 0))
        return packed_voxels(stream, dtype, count, size)
