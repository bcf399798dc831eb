"""Damaged scans through the reader of training and of inference: never a crash, a hang, or voxels silently wrong.

What a format says of itself, a checksum or a length, must be found broken. A changed byte where it says nothing, such
as among the voxels of a .nii, is counted as `untold`.
"""

import random
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import itk
import nibabel as nib
import nrrd
import numpy as np
import pytest
from custom_components.data.read import LoadCTd
from custom_components.errors import InputError

from tests.conftest import write_dicom

READERS = {
    "training": LoadCTd("image", hu_range=(-1000, 1000), check_sides=True),
    "inference": LoadCTd("image", check_hu=False),  # whose checks of HU would hide what its reader lets through
}
# kind -> file to damage, and whether a checksum covers its voxels
KINDS = {
    "ct.nii": ("ct.nii", False),
    "ct.nii.gz": ("ct.nii.gz", True),
    "raw.nrrd": ("raw.nrrd", False),
    "gzip.nrrd": ("gzip.nrrd", True),
    "raw.mha": ("raw.mha", False),
    "zlib.mha": ("zlib.mha", True),
    "ct.mhd": ("ct.mhd", False),
    "raw of ct.mhd": ("ct.raw", False),
    "dicom": ("dicom/1_{:03d}.dcm", False),
    "dicom of JPEG 2000": ("dicom/1_{:03d}.dcm", False),
}


def hu() -> np.ndarray:
    """Noise around air and tissue, int16 [X, Y, Z]."""
    volume = np.random.default_rng(0).normal(-900, 30, (20, 16, 8))
    volume[4:-4] += 950
    return volume.astype(np.int16)


def write(folder: Path, kind: str) -> Path:
    """A sound scan, and its path."""
    image = itk.image_from_array(np.ascontiguousarray(hu().T))
    image.SetSpacing((2.0, 2.5, 3.0))
    path = folder / KINDS[kind][0]
    if "dicom" in kind:
        write_dicom(image, folder / "dicom", compressor="JPEG2000" if "2000" in kind else None)
        return folder / "dicom"
    if kind.endswith("nrrd"):
        header = {"space": "LPS", "space directions": np.diag([2.0, 2.5, 3.0]), "space origin": np.zeros(3)}
        nrrd.write(str(path), hu(), header | {"encoding": kind.split(".")[0]})
    elif ".nii" in kind:
        nib.save(nib.Nifti1Image(hu(), np.diag([-2.0, -2.5, 3, 1])), path)
    else:
        path = path.with_suffix(".mhd") if kind.endswith("mhd") else path
        itk.imwrite(image, str(path), compression=kind.startswith("zlib"))
    return path


def damaged(content: bytes, voxels_at: int, rng: random.Random) -> tuple[bytes, str, bool]:
    """Content with one kind of damage, its name, and whether it lies in the voxels."""
    in_voxels = voxels_at == 0 or voxels_at < len(content) and rng.random() < 0.5
    begin, end = (voxels_at, len(content)) if in_voxels else (0, voxels_at)
    at, much = rng.randrange(begin, end), rng.choice([1, 2, 4, 64, 1000])
    how = rng.choice(["bit", "byte", "digit", "zeros", "noise", "cut", "gone", "more"])
    changed = bytearray(content)
    match how:
        case "bit":
            changed[at] ^= 1 << rng.randrange(8)
        case "byte":
            changed[at] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        case "digit":
            digits = [i for i in range(begin, end) if content[i : i + 1].isdigit()] or [at]
            changed[rng.choice(digits)] = rng.choice(b"0123456789-.e")
        case "zeros":
            changed[at : at + much] = bytes(len(changed[at : at + much]))
        case "noise":
            changed[at : at + much] = rng.randbytes(len(changed[at : at + much]))
        case "cut":
            del changed[at:]
        case "gone":
            del changed[at : at + much]
        case "more":
            changed[at:at] = rng.randbytes(much)
    return bytes(changed), how, in_voxels


@contextmanager
def seconds(limit: int) -> Iterator[None]:
    """A hang is an error."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"longer than {limit} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(folder: Path, kind: str, cases: int) -> Counter:
    scan = write(folder, kind)
    name, checksum = KINDS[kind]
    expected = {key: reader({"image": scan})["image"].numpy().copy() for key, reader in READERS.items()}
    found: Counter = Counter()
    for case in range(cases):
        rng = random.Random(case)
        path = folder / name.format(rng.choice([0, 3, 7]))
        sound = path.read_bytes()
        voxels_at = {".raw": 0, ".mhd": len(sound)}.get(path.suffix, len(sound) - (hu().nbytes if not checksum else 0))
        if checksum:
            voxels_at = (
                0 if path.suffix == ".gz" else max(sound.find(mark) + len(mark) for mark in (b"\n\n", b"LOCAL\n"))
            )
        elif path.suffix == ".dcm":
            voxels_at = sound.index(b"\xe0\x7f\x10\0") + 8
        broken, how, in_voxels = damaged(sound, voxels_at, rng)
        path.write_bytes(broken)
        for key, reader in READERS.items():
            try:
                with seconds(10):
                    voxels = reader({"image": scan})["image"].numpy()
                if voxels.shape == expected[key].shape and np.array_equal(voxels, expected[key]):
                    found["same"] += 1
                elif in_voxels and (checksum or how in ("cut", "gone", "more")) and broken != sound:
                    found["wrong"] += 1
                    print(f"{kind}: {how}, case {case}, {key}")
                elif voxels.shape != expected[key].shape and "dicom" in kind:
                    found["wrong"] += 1  # a slice is lost
                    print(f"{kind}: {voxels.shape}, {how}, case {case}, {key}")
                else:
                    found["untold"] += 1
            except InputError as told:
                found["refused"] += 1
                assert "\n" not in str(told) and str(scan) in str(told), told
        path.write_bytes(sound)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_found(tmp_path: Path, kind: str) -> None:
    found = fuzz(tmp_path, kind, 30)
    assert found["wrong"] == 0 and found["refused"] > 10, found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damage_of_many_kinds_is_found(tmp_path: Path, kind: str) -> None:
    found = fuzz(tmp_path, kind, 100)
    print(f"| {kind} | " + " | ".join(str(found[what]) for what in ("refused", "same", "untold", "wrong")) + " |")
    assert found["wrong"] == 0
