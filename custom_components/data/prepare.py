"""Public data sets as published, to analysis-ready volumes: one grid, one orientation, HU, checked, restartable.

A prepared volume is a NIfTI file of int16 HU, clipped, at `pixdim` mm, whose axes lie within 45 degrees of R, A, S. On
disk z is its fastest axis (axis codes SAR), so that a memory map of an uncompressed file, turned to RAS, is a
C-contiguous array of which a random crop reads only what it needs. The affine says so: any viewer shows it right.
"""

import csv
import errno
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from custom_components.data.sources import Scan, Source
from custom_components.data.volume import Raw, Unfit, check_geometry, check_voxels, first_line, linear_weights, reading
from custom_components.errors import InputError
from custom_components.files import file_stamp, only_writer, picture, remove_temporaries, remove_temporary, replacing
from custom_components.processes import cores, follow_parent
from isal import igzip
from nibabel.affines import apply_affine
from pebble import ProcessExpired, ProcessPool
from threadpoolctl import threadpool_limits
from tqdm import tqdm

FORMAT_VERSION = 1  # raise it with every change of the voxels written, so that a restart prepares volumes anew

# one row a volume; "" where a volume failed before it was known
COLUMNS = (
    "name", "status", "reason", "message", "source", "output", "label_output", "version", "spacing", "shape",
    "orientation", "prepared_shape", "hu_p0.5", "hu_p50", "hu_p99.5", "lung_share", "voxels_hash", "checks", "seconds",
    "source_stamp", "output_bytes", "recipe", "finished",
)  # fmt: skip


@dataclass
class Recipe:
    """What a prepared volume depends on beside its source.

    Args:
        pixdim: mm along R, A, S.
        hu_range: HU to clip to, before interpolation, which would else mix what scanners write outside their field of
            view (-3024) into the voxels at its edge.
        antialias: whether interpolation averages over all voxels that a larger one covers (a triangle as wide as the
            larger step), or takes the nearest two alone, as the published pipeline does.
        compress: whether to write .nii.gz.
        min_lung_share: smallest share of voxels of lung density (-920 to -500 HU); 0 for scans that need no lungs.
        check_hu: whether intensities must be HU of a trunk.
    """

    pixdim: tuple[float, float, float] = (1.5, 1.5, 3.0)
    hu_range: tuple[float, float] = (-1000.0, 1000.0)
    antialias: bool = True
    compress: bool = False
    min_lung_share: float = 0.02
    check_hu: bool = True

    def __post_init__(self) -> None:
        if len(self.pixdim) != 3 or not all(0.1 <= float(p) <= 20 for p in self.pixdim):
            raise InputError(f"pixdim is {self.pixdim}: give three spacings in mm, such as [1.5, 1.5, 3.0]")
        if len(self.hu_range) != 2 or not -32768 <= self.hu_range[0] < self.hu_range[1] <= 32767:
            raise InputError(f"hu_range is {self.hu_range}: give the lowest and the highest HU, such as [-1000, 1000]")
        # floats as they enter the hash, whether a config has 1 or 1.0
        self.pixdim, self.hu_range = tuple(map(float, self.pixdim)), tuple(map(float, self.hu_range))
        self.min_lung_share = float(self.min_lung_share)


def resample(raw: Raw, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """int16 HU [X, Y, Z], C-contiguous, and its affine: the scan's own axes, named R, A, S, at `pixdim`.

    The grid has the scan's centre and, to half a voxel, its extent. Axes at right angles need only one matrix product
    per axis; a tilted gantry's are straightened afterwards, with the lowest HU where the scan does not reach.
    """
    axes = np.linalg.norm(raw.affine[:3, :3], axis=0)
    to_ras = nib.orientations.io_orientation(raw.affine)  # row per array axis: which of R, A, S, and its sign
    target = to_ras[:, 0].astype(int)
    steps = [recipe.pixdim[axis] for axis in target]
    new_sizes = [max(1, round(n * a / s)) for n, a, s in zip(raw.voxels.shape, axes, steps, strict=True)]
    matrices = []
    for old_size, old_step, size, step, sign in zip(
        raw.voxels.shape, axes, new_sizes, steps, to_ras[:, 1], strict=True
    ):
        ratio = step / old_step
        places = (old_size - 1) / 2 + (np.arange(size) - (size - 1) / 2) * ratio  # both grids have the same centre
        width = max(1.0, ratio) if recipe.antialias else 1.0
        matrices.append(linear_weights(places, old_size, width)[:: int(sign)])

    # from the slowest axis in memory to the fastest: the first step then reads each voxel where it lies, once
    order = np.argsort([-abs(stride) for stride in raw.voxels.strides], kind="stable")
    voxels = raw.voxels.transpose(order)
    first, second, third = (matrices[axis] for axis in order)
    shape = np.empty(3, int)
    shape[target] = new_sizes
    out = np.empty(shape, np.int16)
    view = out.transpose(target[order])
    block = 8
    third = np.ascontiguousarray(third.T)
    for start in range(0, len(first), block):
        rows = first[start : start + block]
        used = np.flatnonzero(rows.any(0))
        begin, end = used[0], used[-1] + 1
        slab = np.array(replace(raw, voxels=voxels[begin:end]).hu(), np.float32, order="C")
        np.clip(slab, *recipe.hu_range, out=slab)
        mixed = np.ascontiguousarray(rows[:, begin:end]) @ slab.reshape(end - begin, -1)
        mixed = np.ascontiguousarray(second) @ mixed.reshape(-1, *voxels.shape[1:]) @ third
        view[start : start + block] = np.rint(mixed, out=mixed)

    affine = np.eye(4)
    direction = np.empty((3, 3))
    direction[:, target] = raw.affine[:3, :3] / axes * to_ras[:, 1]
    affine[:3, :3] = direction * recipe.pixdim
    centre = raw.affine[:3, :3] @ ((np.asarray(raw.voxels.shape) - 1) / 2) + raw.affine[:3, 3]
    affine[:3, 3] = centre - affine[:3, :3] @ ((shape - 1) / 2)
    if np.abs(direction.T @ direction - np.eye(3)).max() > 1e-3:
        return _straighten(out, affine, recipe)
    return out, affine


def _straighten(volume: np.ndarray, affine: np.ndarray, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """Resample a volume of skewed axes onto the box of right angles around it."""
    from scipy.ndimage import affine_transform  # few scans need it

    # the rotation next to the skewed axes
    left, _, right = np.linalg.svd(affine[:3, :3] / recipe.pixdim)
    straight = np.eye(4)
    straight[:3, :3] = (left @ right) * recipe.pixdim
    corners = np.stack(np.meshgrid(*((0, n - 1) for n in volume.shape)), -1).reshape(-1, 3)
    places = (corners @ affine[:3, :3].T + affine[:3, 3]) @ np.linalg.inv(straight[:3, :3]).T
    shape = np.ceil(np.ptp(places, axis=0) - 1e-6).astype(int) + 1
    straight[:3, 3] = straight[:3, :3] @ places.min(0)
    index = np.linalg.inv(affine)[:3] @ straight
    low = recipe.hu_range[0]
    out = affine_transform(volume.astype(np.float32), index, output_shape=tuple(shape), order=1, cval=low)
    return np.rint(out).astype(np.int16), straight


def _check_prepared(scan: Scan, volume: np.ndarray, recipe: Recipe) -> float:
    """Share of voxels of lung density."""
    some = volume[::2, ::2, ::2]
    lung_share = float(((some > -920) & (some < -500)).mean())
    if lung_share < recipe.min_lung_share:
        raise Unfit(
            f"{scan.image} has lung density in {lung_share:.1%} of its voxels, less than min_lung_share "
            f"{recipe.min_lung_share:g}: it may show no chest",
            "little_lung",
        )
    return lung_share


def _prepare_label(scan: Scan, source: Source, raw: Raw, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """uint8, of the nearest voxel of the published map; 0 where that does not reach."""
    from scipy.ndimage import affine_transform

    label = source.read_label(scan)
    sizes = [np.linalg.norm(part.affine[:3, :3], axis=0) for part in (raw, label)]
    centres = [apply_affine(part.affine, (np.array(part.voxels.shape) - 1) / 2) for part in (raw, label)]
    extents = [np.sort(size * part.voxels.shape) for size, part in zip(sizes, (raw, label), strict=True)]
    off = np.linalg.norm(centres[0] - centres[1])
    if off > 1.5 * max(sizes[0]) or np.abs(extents[0] - extents[1]).max() > 3 * max(sizes[0]):
        raise Unfit(f"{scan.label} lies elsewhere than {scan.image} ({off:.1f} mm): find out which is right", "label")
    values = np.unique(label.voxels)
    if (label.slope, label.intercept) != (1.0, 0.0) or (values != np.rint(values)).any() or not values.any():
        raise Unfit(f"{scan.label} is no label map, its values are {values[:5].tolist()}: download it again", "label")
    if values.min() < 0 or values.max() > 255:
        raise Unfit(
            f"{scan.label} has values from {values.min():g} to {values.max():g}, and labels are 0 to 255: correct it",
            "label",
        )
    index = np.linalg.inv(label.affine)[:3] @ affine
    nearest = affine_transform(label.voxels, index, output_shape=shape, order=0, mode="grid-constant")
    table = [source.label_values.get(value, 0) if source.label_values else value for value in range(256)]
    return np.array(table, np.uint8)[nearest.astype(np.uint8)]


class CannotWrite(InputError):
    """The folder of prepared volumes takes no more: the whole run ends, instead of every volume failing."""


@contextmanager
def _writing(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        told = error.strerror or error
        raise CannotWrite(
            f"{path} cannot be written ({told}): free space, or change prepared_dir; what is done is kept"
        ) from error


def _write(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """[X, Y, Z] as a NIfTI file with z fastest, under its final name only when complete."""
    turned = affine[:, [2, 1, 0, 3]]
    header = nib.Nifti1Image(array.T, turned).header
    header.set_sform(turned, code=1)
    header.set_qform(turned, code=1)
    header.set_xyzt_units("mm")
    header["vox_offset"], header["scl_slope"], header["scl_inter"] = 352, 1, 0
    content = [header.binaryblock, b"\0" * 4, np.ascontiguousarray(array).data]
    with _writing(path), replacing(path) as part:
        with igzip.open(part, "wb", compresslevel=2) if path.suffix == ".gz" else open(part, "wb") as file:
            file.writelines(content)


def _outputs(scan: Scan, recipe: Recipe) -> list[str]:
    """Paths of the prepared image and, where there is one, label, below the folder of prepared volumes."""
    return [path + ".gz" * recipe.compress for path in (scan.output, scan.label_output) if path is not None]


def _remove_earlier(place: Path, scan: Scan) -> None:
    """What a run of another recipe or source made, compressed or not: training would take either for this run's.

    Never the scan's own files, however the folders lie in each other.
    """
    plain = place.with_name(place.name.removesuffix(".gz"))
    own = {Path(path).resolve() for path in (scan.image, scan.label) if path is not None}
    for path in (plain, Path(f"{plain}.gz")):
        if path.resolve() not in own:
            with _writing(path):
                path.unlink(missing_ok=True)


def prepare_scan(source: Source, scan: Scan, recipe: Recipe, prepared_dir: str | os.PathLike) -> dict[str, Any]:
    """Read, check, resample and write one scan with its label; returns what the manifest says of it.

    Raises:
        Unfit: it cannot be used, and why.
        CannotWrite: the disk is full or read-only.
    """
    start = time.perf_counter()
    places = [Path(prepared_dir, path) for path in _outputs(scan, recipe)]
    for place in places:  # first, since a scan may end its process
        _remove_earlier(place, scan)
    with reading(scan.image):
        raw = source.read(scan)
        if raw.guessed:  # what is written would not show it
            raise Unfit(f"{scan.image} may be mirrored, {raw.guessed}: write its affine", "orientation")
        check_geometry(scan.image, raw)
        percentiles = check_voxels(scan.image, raw, recipe.check_hu)
        volume, affine = resample(raw, recipe)
        lung_share = _check_prepared(scan, volume, recipe)
        arrays = [volume]
    if scan.label is not None:
        with reading(scan.label):
            arrays.append(_prepare_label(scan, source, raw, volume.shape, affine))
    # the label first: an image whose label is missing would look complete
    for place, array in reversed(list(zip(places, arrays, strict=True))):
        _write(place, array, affine)
    return {
        "status": "ok",
        "version": raw.version,
        "spacing": " ".join(f"{s:.4g}" for s in np.linalg.norm(raw.affine[:3, :3], axis=0)),
        "shape": " ".join(map(str, raw.voxels.shape)),
        "orientation": "".join(nib.aff2axcodes(raw.affine)),
        "prepared_shape": " ".join(map(str, volume.shape)),
        **{f"hu_p{p}": round(float(value), 1) for p, value in zip(("0.5", "50", "99.5"), percentiles, strict=True)},
        "lung_share": round(lung_share, 4),
        "voxels_hash": hashlib.blake2b(volume.data, digest_size=8).hexdigest(),
        "checks": "" if scan.label or not scan.label_output else "no label",
        "seconds": round(time.perf_counter() - start, 3),
        "output_bytes": " ".join(str(place.stat().st_size) for place in places),
    }


def _begin_worker() -> None:
    """One thread for BLAS, and an end with the parent, which, killed, could not end a worker that hangs."""
    follow_parent()
    threadpool_limits(1)


def _run_pool(
    scans: Sequence[Scan], num_workers: int, timeout: float, source: Source, recipe: Recipe, prepared_dir: str
) -> Iterator[tuple[Scan, dict[str, Any]]]:
    """Every scan with its row, in the order in which they finish; `timeout` is in seconds a scan.

    The pool says which scan a dead worker had, unless it ended with exit code 0: that one counts as timed out.
    """
    waiting = iter(scans)
    working: dict[futures.Future, Scan] = {}
    # forking a process in which threads run can hang
    pool = ProcessPool(
        min(num_workers, len(scans)), initializer=_begin_worker, context=multiprocessing.get_context("spawn")
    )
    try:
        while True:
            # one a worker: the pool could not be stopped while it hands on more than a pipe holds
            for scan in islice(waiting, num_workers - len(working)):
                task = pool.schedule(prepare_scan, (source, scan, recipe, prepared_dir), timeout=timeout)
                working[task] = scan
            if not working:
                return
            for task in futures.wait(working, return_when=futures.FIRST_COMPLETED).done:
                scan, error = working.pop(task), task.exception()
                yield scan, _failure(scan, error, timeout) if error else task.result()
    finally:
        pool.stop()
        pool.join()


def _failure(scan: Scan, error: BaseException, timeout: float) -> dict[str, Any]:
    """The row of a scan that failed; what ends the whole run is raised."""
    if isinstance(error, CannotWrite):
        raise error
    if isinstance(error, futures.BrokenExecutor):
        raise InputError("a worker process ended before it began: lower num_workers, or see the error above") from None
    if isinstance(error, Unfit):
        reason, message = error.reason, str(error)
    elif isinstance(error, TimeoutError):
        reason = "timeout"
        message = f"{scan.image} took longer than {timeout:g} s: look at it, or raise timeout_minutes"
    else:
        told = f"{type(error).__name__}: {first_line(error)}"
        if isinstance(error, ProcessExpired):
            told = f"signal {-error.exitcode}" if error.exitcode < 0 else f"exit code {error.exitcode}"
        reason, message = "crashed", f"{scan.image} ended the process that read it ({told}): download it again"
    return {"status": "failed", "reason": reason, "message": message}


def read_manifest(prepared_dir: str | os.PathLike) -> dict[str, dict[str, str]]:
    """Name -> its latest row, over the manifests of all shards. A line that a kill cut off counts as not written."""
    rows: dict[str, dict[str, str]] = {}
    for path in sorted(Path(prepared_dir, "manifest").glob("*.csv")):
        content = path.read_bytes()
        lines = content[: content.rfind(b"\n") + 1].decode().splitlines()
        for row in csv.DictReader(lines):
            if row["finished"] and row["finished"] >= rows.get(row["name"], {}).get("finished", ""):
                rows[row["name"]] = row
    return rows


class _Manifest(io.FileIO):
    """The rows of one shard, appended line by line; each is on its way to the disk before the next volume.

    Unbuffered: a line that could not be written is not tried again when the file is closed.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(path, "a+")
        self.seek(0)
        if not self.truncate(self.read().rfind(b"\n") + 1):
            self.append({column: column for column in COLUMNS})

    def append(self, row: Mapping[str, Any]) -> None:
        # no line ends within a cell, so that a cut-off line is recognised
        cells = [" ".join(str(row.get(column, "")).splitlines()) for column in COLUMNS]
        content = pd.DataFrame([cells]).to_csv(header=False, index=False, lineterminator="\n").encode()
        with _writing(self.name):
            if self.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _stamps(scan: Scan) -> str:
    try:
        return f"{file_stamp(scan.image)} {file_stamp(scan.label) if scan.label else ''}"
    except OSError:  # gone since it was listed
        return ""


def _is_done(scan: Scan, row: Mapping[str, str] | None, recipe: Recipe, folder: Path) -> bool:
    """Whether a row of the manifest still describes the source and the files that lie there."""
    if row is None or row["status"] != "ok":
        return False
    try:
        sizes = " ".join(str((folder / path).stat().st_size) for path in _outputs(scan, recipe))
        return sizes == row["output_bytes"] and _stamps(scan) == row["source_stamp"]
    except OSError:
        return False


def _shard(shard: str | None) -> tuple[int, int]:
    """Which part of how many, from 0: `shard` ("1/4" is the first), or torchrun's rank, or all."""
    if shard is None:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        part, parts = (int(number) for number in str(shard).split("/"))
        if not 1 <= part <= parts:
            raise ValueError
    except ValueError as error:
        raise InputError(f"shard is {shard!r}: give i/n with i from 1 to n, such as 1/4") from error
    return part - 1, parts


def prepare(
    source: Source,
    prepared_dir: str | os.PathLike,
    num_workers: int | None = None,
    timeout_minutes: float = 10.0,
    shard: str | None = None,
    contact_sheet_volumes: int = 12,
    **recipe_keys: Any,
) -> None:
    """Prepare a data set: volumes, their manifest, a contact sheet and a summary below `prepared_dir`.

    Volumes that an earlier run has prepared from the same files by the same recipe are passed over. Those that cannot
    be used are listed with the reason in ``manifest.csv``, ``summary.md`` and ``failed.csv`` (which `exclude` of the
    other configs takes), and the others go on.

    Args:
        num_workers: processes; by default one per core that this process may use, shared among torchrun's processes.
        timeout_minutes: for one volume.
        shard: "i/n", the i-th of n parts, for n machines that share a disk; torchrun's rank by default.
        contact_sheet_volumes: how many volumes of this run the contact sheet shows.
        recipe_keys: pixdim and all else that :class:`Recipe` takes.

    Raises:
        InputError: an argument is impossible, another run prepares the shard, the disk is full, or, at the end, volumes
            have failed.
    """
    folder = Path(prepared_dir).expanduser()
    recipe = Recipe(**recipe_keys)
    if folder.resolve() == Path(source.dataset_dir).resolve():
        raise InputError(f"prepared_dir {folder} is dataset_dir: give another folder, or published files are replaced")
    # a source's attributes are its part of the recipe, apart from where its files lie today
    assumed = {key: value for key, value in vars(source).items() if key != "dataset_dir"}
    told = json.dumps([FORMAT_VERSION, type(source).__name__, asdict(recipe), assumed], sort_keys=True, default=str)
    recipe_hash = hashlib.blake2b(told.encode(), digest_size=8).hexdigest()
    part, parts = _shard(shard)
    if num_workers is None:
        num_workers = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    every_scan = source.scans()
    mine = every_scan[part::parts]
    with _writing(folder):
        Path(folder, "manifest").mkdir(parents=True, exist_ok=True)
    with _only_preparing(folder, part, parts):
        rows = {name: row for name, row in read_manifest(folder).items() if row["recipe"] == recipe_hash}
        waiting = [s for s in tqdm(mine, "verifying", delay=5) if not _is_done(s, rows.get(s.name), recipe, folder)]
        with _writing(folder):
            manifest = _Manifest(folder / "manifest" / f"shard_{part + 1}_of_{parts}.csv")
            if part == 0:
                _copy_tables(source, folder)
        own_outputs = [output for scan in mine for output in _outputs(scan, recipe)]
        remove_temporaries(folder, own_outputs)
        shown: list[tuple[str, Path]] = []
        failures = 0
        sheet = folder / f"contact_sheet{f'_{part + 1}' if parts > 1 else ''}.png"
        remove_temporary(sheet)
        bar = tqdm(total=len(mine), initial=len(mine) - len(waiting), desc="prepare", unit="volume", smoothing=0.05)
        pool = _run_pool(waiting, num_workers, 60 * timeout_minutes, source, recipe, str(folder))
        try:
            with bar, manifest, closing(pool) as finished:
                for scan, row in finished:
                    outputs = _outputs(scan, recipe)
                    row |= {
                        "name": scan.name,
                        "source": scan.image,
                        "output": outputs[0],
                        "label_output": outputs[1] if len(outputs) > 1 else "",
                        "source_stamp": _stamps(scan),
                        "recipe": recipe_hash,
                        "finished": f"{time.time():.3f}",
                    }
                    manifest.append(row)
                    if row["status"] != "ok":
                        failures += 1
                        for place in outputs:  # a worker that was killed could not tidy up
                            remove_temporary(folder / place)
                    elif len(shown) < contact_sheet_volumes:
                        shown.append((scan.name, folder / outputs[0]))
                        if len(shown) == contact_sheet_volumes:  # now, when a wrong orientation costs least
                            _show(shown, sheet, recipe)
                    bar.set_postfix(failed=failures, refresh=False)
                    bar.update()
        except BaseException:  # the workers were ended, be it in the midst of writing
            remove_temporaries(folder, own_outputs)
            raise
        if 0 < len(shown) < contact_sheet_volumes:
            _show(shown, sheet, recipe)

    _wait_for_others(shard)
    with _writing(folder), only_writer(folder / "manifest" / ".reports.lock", f"{folder}", "prepared_dir", wait=True):
        for report in ("manifest.csv", "failed.csv", "summary.md"):
            remove_temporary(folder / report)
        rows = read_manifest(folder)
        failed = summarize(folder, [rows[scan.name] for scan in every_scan if scan.name in rows], len(every_scan))
    mine_failed = [scan.name for scan in mine if scan.name in failed]
    if mine_failed:
        first = failed[mine_failed[0]]
        raise InputError(
            f"{len(mine_failed)} of {len(mine)} volumes failed, the first by {first['reason']} ({first['message']}): "
            f"see {folder / 'summary.md'}"
        )


@contextmanager
def _only_preparing(folder: Path, part: int, parts: int) -> Iterator[None]:
    """One run a shard, and no two that divide a data set otherwise, since those would share volumes."""
    locks = folder / "manifest"
    own = locks / f".shard_{part + 1}_of_{parts}.lock"
    with only_writer(own, f"shard {part + 1}/{parts} of {folder}", "shard or prepared_dir"):
        for other in locks.glob(".shard_*.lock"):
            if not other.name.endswith(f"_of_{parts}.lock"):
                with only_writer(other, f"{folder}, in other shards,", "prepared_dir"):
                    pass
        yield


def _wait_for_others(shard: str | None) -> None:
    """Under torchrun, which would end the other processes when one that has failures exits."""
    if shard is None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        import torch.distributed
        from custom_components.distributed import start

        start(torch.device("cpu"), timeout_minutes=60 * 24 * 30)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _copy_tables(source: Source, folder: Path) -> None:
    """Lists, labels and reports beside the volumes, so that `prepared_dir` is a `dataset_dir` for the other configs."""
    for table in source.tables:
        origin = Path(source.dataset_dir, table)
        if origin.is_dir():
            shutil.copytree(origin, folder / table, dirs_exist_ok=True)
        elif origin.is_file():
            shutil.copy2(origin, folder / table)


def _replace_text(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text)


def summarize(folder: Path, rows: Sequence[Mapping[str, str]], expected: int) -> dict[str, Mapping[str, str]]:
    """Write ``manifest.csv``, ``failed.csv`` and ``summary.md`` of all shards so far -> the failed rows by name."""
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    ok = table[table["status"] == "ok"].copy()
    same = [list(names) for _, names in ok.groupby("voxels_hash")["name"] if len(names) > 1]
    for names in same:
        for name in names[1:]:
            table.loc[table["name"] == name, "checks"] += f" duplicate of {names[0]}"
    table["checks"] = table["checks"].str.strip()
    failed = {row["name"]: row for row in rows if row["status"] != "ok"}
    _replace_text(folder / "manifest.csv", table.to_csv(index=False))
    unfit = table.loc[table["status"] != "ok", ["name", "reason", "message"]]
    _replace_text(folder / "failed.csv", unfit.to_csv(index=False))

    lines = ["# Prepared volumes", "", f"{len(ok)} prepared, {len(failed)} failed, {expected - len(rows)} to come.", ""]
    if failed:
        lines += ["## Failures", "", "| reason | volumes | first | message |", "|---|---|---|---|"]
        for reason, count in Counter(row["reason"] for row in failed.values()).most_common():
            first = next(row for row in failed.values() if row["reason"] == reason)
            lines.append(f"| {reason} | {count} | {first['name']} | {first['message'].replace('|', '/')} |")
        lines += ["", "All of them, with reasons: failed.csv.", ""]
    if len(ok):
        lines += ["## As published", "", "| version | volumes |", "|---|---|"]
        lines += [f"| {version} | {count} |" for version, count in Counter(ok["version"]).most_common(20)]
        measured = ok[["hu_p0.5", "hu_p50", "hu_p99.5", "lung_share", "seconds"]].astype(float)
        for column, unit in (("shape", "voxels, axis {}"), ("spacing", "spacing, axis {}, mm")):
            cells = ok[column].str.split(expand=True).astype(float)
            for axis in (2, 1, 0):
                measured.insert(0, unit.format(axis), cells[axis])
        lines += ["", "| | lowest | median | highest |", "|---|---|---|---|"]
        for name, values in measured.items():
            lines.append(f"| {name} | {values.min():g} | {values.median():g} | {values.max():g} |")
        orientations = ", ".join(f"{code} {count}" for code, count in Counter(ok["orientation"]).most_common(8))
        size = sum(int(n) for cell in ok["output_bytes"] for n in str(cell).split()) / 1e9
        lines += ["", f"Orientation of the files: {orientations}. Prepared volumes: {size:.3g} GB.", ""]
    if same:
        lines += ["## Duplicates", "", "Volumes with the same voxels, kept:", ""]
        lines += [f"- {', '.join(names)}" for names in same[:50]] + [""]
    _replace_text(folder / "summary.md", "\n".join(lines))
    return failed


def _show(volumes: Sequence[tuple[str, Path]], sheet: Path, recipe: Recipe) -> None:
    with picture(sheet) as part:
        contact_sheet(volumes, part, recipe.hu_range)


def contact_sheet(volumes: Sequence[tuple[str, Path]], path: Path, hu_range: Sequence[float]) -> None:
    """A row per prepared file: its middle axial, coronal and sagittal slice, the histogram of its HU, and its name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.6 * len(volumes)), layout="constrained")
    for row, (name, file) in zip(figure.subplots(len(volumes), 4, squeeze=False), volumes, strict=True):
        image = nib.load(file)
        volume = np.asanyarray(image.dataobj).transpose(2, 1, 0)
        x, y, z = (n // 2 for n in volume.shape)
        dx, dy, dz = image.header.get_zooms()[::-1]
        # the patient's right on the left of the picture, or anterior there; head up
        views = (
            (volume[::-1, :, z], dy / dx, "R", "A"),
            (volume[::-1, y], dz / dx, "R", "S"),
            (volume[x, ::-1], dz / dy, "A", "S"),
        )
        for axes, (view, aspect, left, top) in zip(row[:3], views, strict=True):
            axes.imshow(view.T, origin="lower", cmap="gray", vmin=-1000, vmax=400, aspect=aspect)
            axes.text(0.01, 0.5, left, transform=axes.transAxes, color="yellow", va="center")
            axes.text(0.5, 0.99, top, transform=axes.transAxes, color="yellow", ha="center", va="top")
            axes.set_axis_off()
        row[0].set_title(name, fontsize=9, loc="left")
        row[3].hist(volume[::2, ::2, ::2].ravel(), bins=100, range=tuple(hu_range), color="#08519c", log=True)
        row[3].set_title("HU", fontsize=9)
        row[3].tick_params(labelsize=7, left=False, labelleft=False)
    figure.savefig(path, dpi=80)
