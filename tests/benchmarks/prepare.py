"""Preparing one raw CT beside the published preprocessing's steps, each in one thread of a process of its own.

    python -m tests.benchmarks.prepare --out FILE.json

The volume is a phantom of 512 x 512 x 300 voxels, 0.7 x 0.7 x 1.05 mm, int16 .nii.gz in LPS order, with white noise as
a sharp kernel leaves; it compresses worse than most patients, so gunzip weighs more here. Contenders take turns.
"""

from __future__ import annotations

import argparse
import gzip
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from custom_components.data.phantom import patient
from custom_components.data.prepare import Recipe, prepare_scan, resample
from custom_components.data.sources import CTRate, Scan
from custom_components.data.volume import read_nifti
from tqdm import tqdm

from tests.benchmarks.measure import alone, environment, print_table, write_json

VOLUMES, CORES = 50_000, 32
SPACING, PIXDIM = (0.7, 0.7, 1.05), (1.5, 1.5, 3.0)


def write_raw(path: Path, shape: tuple[int, int, int]) -> None:
    """A phantom at a quarter of the resolution, blown up, with noise per voxel."""
    rng = np.random.default_rng(0)
    coarse = [-(-n // f) for n, f in zip(shape, (4, 4, 4))]
    spacing = [max(s * n / c, 300.0 / c) for n, c, s in zip(shape, coarse, SPACING)]
    volume = patient(rng, coarse, spacing).volume
    for axis in range(3):
        volume = volume.repeat(4, axis)
    volume = volume[tuple(slice(n) for n in shape)]
    volume = volume + rng.normal(0, 15, volume.shape).astype(np.float32)
    affine = np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0])
    image = nib.Nifti1Image(np.rint(volume).clip(-1024, 3071).astype(np.int16), affine)
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=6, mtime=0))


def published(path: str, folder: str) -> None:
    """The published preprocessing's steps: load, reorient, clip and cast, interpolate, save compressed."""
    image = nib.as_closest_canonical(nib.load(path))
    spacing = image.header.get_zooms()
    volume = np.clip(image.get_fdata(), -1000, 1000).astype(np.float32)
    size = [round(n * s / p) for n, s, p in zip(volume.shape, spacing, PIXDIM)]
    tensor = torch.from_numpy(volume)[None, None]
    small = torch.nn.functional.interpolate(tensor, size=size, mode="trilinear", align_corners=False)[0, 0]
    out = nib.Nifti1Image(small.numpy().astype(np.int16), np.diag([*PIXDIM, 1.0]))
    nib.save(out, f"{folder}/published.nii.gz")


def ours(path: str, folder: str, **keys: Any) -> None:
    prepare_scan(CTRate(folder), Scan("ours", path, "ours.nii"), Recipe(pixdim=PIXDIM, **keys), folder)


def resample_only(path: str, folder: str) -> Callable[[], Any]:
    raw = read_nifti(path)
    return lambda: resample(raw, Recipe(pixdim=PIXDIM))


STEPS: dict[str, Callable[[str, str], Callable[[], Any]]] = {
    "published": lambda path, folder: lambda: published(path, folder),
    "ours": lambda path, folder: lambda: ours(path, folder),
    "ours, compress": lambda path, folder: lambda: ours(path, folder, compress=True),
    "ours, antialias false": lambda path, folder: lambda: ours(path, folder, antialias=False),
    "of it: read, gunzip by isal": lambda path, folder: lambda: read_nifti(path),
    "gunzip by zlib": lambda path, folder: lambda: gzip.decompress(Path(path).read_bytes()),
    "of it: resample": resample_only,
}


def timed(which: str, path: str, folder: str) -> dict[str, Any]:
    """Seconds of one call after one untimed, as a worker that has begun sees them, and processor seconds."""
    torch.set_num_threads(1)
    step = STEPS[which](path, folder)
    step()
    start, cpu = time.perf_counter(), time.process_time()
    step()
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the median counts")
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 300))
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    found: dict[str, list[dict[str, Any]]] = {which: [] for which in STEPS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "raw.nii.gz"
        write_raw(path, tuple(args.shape))
        size = {"raw": path.stat().st_size}
        for _, which in tqdm([(r, w) for r in range(args.repeats) for w in STEPS], unit="run"):
            found[which].append(alone(timed, which, str(path), folder))
        for name in ("published.nii.gz", "ours.nii", "ours.nii.gz"):
            size[name] = Path(folder, name).stat().st_size
    median = {
        which: {key: float(np.median([run[key] for run in runs])) for key in runs[0]} for which, runs in found.items()
    }
    ratio = median["published"]["cpu_seconds"] / median["ours"]["cpu_seconds"]
    hours = {w: VOLUMES * median[w]["cpu_seconds"] / CORES / 3600 for w in ("published", "ours", "ours, compress")}
    print_table(
        "one volume, one thread, median",
        ("contender", "s", "processor s", "peak GiB"),
        [(which, m["seconds"], m["cpu_seconds"], m["peak_gib"]) for which, m in median.items()],
    )
    print_table("size on disk", ("file", "MB"), [(name, n / 1e6) for name, n in size.items()])
    print(f"\nthroughput per core: {ratio:.2f} times the published preprocessing's")
    for which, value in hours.items():
        seconds = median[which]["cpu_seconds"]
        print(f"{which}: {VOLUMES} volumes x {seconds:.2f} s / {CORES} cores = {value:.1f} h, if the disk keeps up")
    write_json(
        args.out,
        {"environment": environment(), "median": median, "bytes": size, "throughput_ratio": ratio, "hours": hours},
    )


if __name__ == "__main__":
    main()
