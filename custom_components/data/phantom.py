"""A procedural chest-CT cohort with reports, in CT-RATE's own layout on disk, from one seed.

For tests and the demo, where no real data set can be had. Everything is made in millimetres in the patient's frame
(+x right, +y anterior, +z superior, origin in the middle of the chest) and sampled on the voxel grid last, so any
``shape`` and ``spacing`` show the same patient (up to the voxel noise, and which voxel a boundary falls on).

=============  ============================================================  ===================================
structure      size                                                          HU before noise
=============  ============================================================  ===================================
body           half axes 121-159 x 94-137 mm; fat rim 4-22 mm                fat -110..-85, muscle 40..65
lungs          apex 105-120 mm above, domes 45-75 mm below the origin        -880..-780, dependent side denser
vessels        branching, radius 4 mm at the hilum to 1.2 mm                 30 (as blood if contrast is given)
trachea        radius 8-9.5 mm, main bronchi 6 mm                            -980
heart          cardiothoracic ratio 0.39-0.475                               35..50; 150..250 with contrast (40 %)
aorta          radius 11-15 mm                                               as the heart
spine, ribs    body 40 x 32 mm, discs; ribs 12 x 8 mm                        120..220; 250..780
distractors    calcified granulomas 3-5 mm (0-3), stomach gas                300..800; -950
=============  ============================================================  ===================================

=================================  ==========================================  ===============================
finding (``FINDINGS``)             size                                        HU before noise
=================================  ==========================================  ===============================
Coronary artery wall calcification 2-5 deposits of 4-10 mm, one >= 7.5 mm       500..1200
Cardiomegaly                       cardiothoracic ratio 0.53-0.61              as the heart
Emphysema                          holes over 20-58 % of the region            -1000..-960
Lung nodule                        1-3 ellipsoids, 12-30 mm in diameter        0..60
Pleural effusion                   dependent crescent, 15-50 mm thick          0..20
Consolidation                      fuzzy wedge of 35-80 mm                     -50..50, bronchograms -450
=================================  ==========================================  ===============================

Over all this lie a calibration offset of -15..15 HU, white noise of 22..32 HU standard deviation and slow noise of
3..8 HU. Confounders (body and lung size, lung density, contrast, bone density, offset, noise, granulomas) are drawn
independently of the findings, and the findings independently of each other.
"""

import csv
import glob
import gzip
import json
import math
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from statistics import NormalDist
from types import MappingProxyType
from typing import Any

import nibabel as nib
import numpy as np
from custom_components.data.lists import mask_file_name
from custom_components.errors import InputError
from custom_components.files import only_writer, remove_temporary, replacing
from custom_components.processes import follow_parent
from tqdm import tqdm

# raise the version with every change of the bytes written, so that old cohorts are rebuilt
GENERATOR = {"generator": "custom_components.phantom", "version": 2}

ORGANS: dict[str, int] = {"left lung": 1, "right lung": 2, "trachea": 3, "heart": 4, "spine": 5, "ribs": 6}
# of a label map beside ORGANS; cardiomegaly is the heart's size, and emphysema has no border to draw
LESIONS: dict[str, int] = {
    "Pleural effusion": 7,
    "Consolidation": 8,
    "Lung nodule": 9,
    "Coronary artery wall calcification": 10,
}
MIN_FIELD_OF_VIEW = 300.0  # mm along each axis: a smaller one would cut findings off
SIDES = {"left": -1.0, "right": 1.0}  # sign of x

# Every template is one sentence; capitals and the full stop are added by `_sentence`.
POSITIVE: dict[str, tuple[str, ...]] = {
    "Coronary artery wall calcification": (
        "calcified plaques in the {artery}",
        "there are coronary calcifications along the {artery}",
        "wall calcification of the {artery} is seen",
        "calcified plaque along the {artery}",
        "{amount} calcified atheroma in the {artery}",
    ),
    "Cardiomegaly": (
        "the heart is enlarged",
        "cardiomegaly, cardiothoracic ratio {ratio}",
        "heart size is increased",
        "the cardiothoracic ratio is increased at {ratio}",
        "the cardiac silhouette is clearly enlarged",
    ),
    "Emphysema": (
        "{severity} {pattern} emphysema in {where}",
        "there are {severity} emphysematous changes in {where}",
        "{severity} emphysema involves {where}",
        "emphysematous areas are observed in {where}",
        "{where} show{s} {severity} {pattern} emphysema",
    ),
    "Lung nodule": (
        "{noun} {of} {size} in the {where}",
        "{noun} {is_} seen in the {where}, {measure}",
        "in the {where} there {is_} {noun}, {measure}",
        "{where}: {noun}, {measure}",
        "{noun} ({measure}) in the {where}",
    ),
    "Pleural effusion": (
        "{amount} {side} pleural effusion{s}",
        "{side} pleural effusion{s}, {thickness} thick",
        "there {is_} {a}{amount} pleural effusion{s} {on}",
        "pleural fluid {on}, {thickness} thick",
        "{amount} amount of pleural fluid {on}",
    ),
    "Consolidation": (
        "consolidation with air bronchograms in the {where}",
        "{where} consolidation is present",
        "there is an airspace consolidation in the {where}",
        "the {where} shows dense consolidation of {size}",
        "air bronchograms run through a {where} consolidation",
    ),
}
NEGATIVE: dict[str, tuple[str, ...]] = {
    "Coronary artery wall calcification": (
        "no coronary calcification",
        "the coronaries are not calcified",
        "coronary calcification is absent",
        "coronary walls are free of calcium",
    ),
    "Cardiomegaly": (
        "heart size is normal",
        "the heart is not enlarged",
        "no cardiomegaly",
        "cardiac size is within normal limits",
    ),
    "Emphysema": ("no emphysema", "emphysema is absent", "emphysema is not seen", "no emphysematous area"),
    "Lung nodule": ("no lung nodule", "no pulmonary nodule", "there is no nodule", "nodules are absent"),
    "Pleural effusion": (
        "no pleural effusion",
        "no pleural effusion is seen",
        "the pleural spaces are dry",
        "no pleural fluid",
    ),
    "Consolidation": (
        "no consolidation",
        "no airspace consolidation is seen",
        "there is no consolidation",
        "the lungs are not consolidated",
    ),
}
FINDINGS: tuple[str, ...] = tuple(POSITIVE)
PREVALENCE: Mapping[str, float] = MappingProxyType(dict.fromkeys(FINDINGS, 0.3))
NEUTRAL: tuple[str, ...] = (
    "trachea and bronchi are open",
    "the trachea is midline",
    "no lytic bone lesion",
    "bone structures are normal",
    "the mediastinum is normal",
    "aortic caliber is normal",
)
SHORT_NAMES = {name: name.lower().replace("artery wall ", "") for name in FINDINGS}
NOT_GIVEN = "Not given."

Array = np.ndarray
Implicit = Callable[[Array, Array, Array], Array]  # f(x, y, z) in mm, patient's frame: below 0 inside, about mm outside


@dataclass(frozen=True)
class Patient:
    """One chest CT with its report; all arrays are [X, Y, Z] in RAS axis order."""

    volume: Array  # int16 HU in [-1024, 3071]
    affine: Array  # [4, 4] float64, voxel index to RAS mm
    organs: Array  # uint8, values of ORGANS, 0 elsewhere; effusion and lesions stay part of the lung they fill
    masks: dict[str, Array]  # bool, one per finding that is present, never empty
    labels: dict[str, int]  # 0 or 1 for each of FINDINGS
    findings: str
    impression: str
    sentences: dict[str, str]  # finding that is present -> the sentence of `findings` that speaks of it, verbatim


@dataclass
class Grid:
    """Voxel centres in mm from the middle of the chest, along the scanner's axes: u [X], v [Y], w [Z].

    The patient is turned about z by `angle` (radians), so the patient's frame is x, y [X, Y, 1] and z [1, 1, Z].
    """

    axes: Sequence[Array]
    angle: float
    spacing: Sequence[float]
    window: tuple[slice, ...] = ()  # where a part lies in the whole volume

    def __post_init__(self) -> None:
        c, s = math.cos(self.angle), math.sin(self.angle)
        u, v, self.z = np.ix_(*self.axes)
        self.x, self.y = c * u + s * v, c * v - s * u

    def turned(self, x: Array | float, y: Array | float) -> tuple[Array | float, Array | float]:
        """From the patient's x and y to the scanner's u and v."""
        c, s = math.cos(self.angle), math.sin(self.angle)
        return c * x - s * y, s * x + c * y

    def around(self, centre: Sequence[float], reach: Sequence[float] | float) -> "Grid":
        """The part within `reach` mm of `centre`, and a voxel more, so that differences exist at its border."""
        rx, ry, rz = np.broadcast_to(reach, 3)
        c, s = abs(math.cos(self.angle)), abs(math.sin(self.angle))
        middle, half = (*self.turned(centre[0], centre[1]), centre[2]), (c * rx + s * ry, s * rx + c * ry, rz)
        window = []
        for axis, m, h, step in zip(self.axes, middle, half, self.spacing, strict=True):
            first, last = np.searchsorted(axis, [m - h - step, m + h + step])
            first = min(int(first), axis.size - 2)
            window.append(slice(first, max(int(last), first + 2)))
        axes = [axis[own] for axis, own in zip(self.axes, window, strict=True)]
        return Grid(axes, self.angle, self.spacing, tuple(window))

    def layers(self, f: Implicit, *depths: float) -> list[Array]:
        """Share of each voxel inside f < depth, for objects larger than a voxel: the box filter of the linearised f."""
        values = f(self.x, self.y, self.z)
        slope = np.full_like(values, 1e-3)  # change of f across one voxel
        for axis in range(3):
            half = np.abs(np.diff(values, axis=axis)).swapaxes(0, axis) * 0.5
            along = slope.swapaxes(0, axis)
            along[:-1] += half
            along[1:] += half
        return [np.clip(0.5 + (depth - values) / slope, 0, 1) for depth in depths]

    def cover(self, f: Implicit) -> Array:
        return self.layers(f, 0.0)[0]

    def cover_small(self, f: Implicit, step: float = 1.25) -> Array:
        """Share of each voxel inside f < 0, by supersampling every `step` mm: right for objects below a voxel too."""
        counts = [max(1, math.ceil(s / step)) for s in self.spacing]
        axes = [
            (a[:, None] + (((np.arange(n) + 0.5) / n - 0.5) * s).astype(np.float32)).ravel()
            for a, n, s in zip(self.axes, counts, self.spacing, strict=True)
        ]
        fine = Grid(axes, self.angle, self.spacing)
        blocks = [n for axis, count in zip(self.axes, counts, strict=True) for n in (axis.size, count)]
        return (f(fine.x, fine.y, fine.z) < 0).reshape(blocks).mean((1, 3, 5), dtype=np.float32)

    def waves(self, rng: np.random.Generator, shortest: float, longest: float, count: int = 16) -> Array:
        """A smooth random field [X, Y, Z] of mean 0 and variance 1: plane waves of the given wavelengths in mm."""
        direction = rng.standard_normal((3, count))
        direction /= np.linalg.norm(direction, axis=0)
        k = direction * 2 * np.pi / rng.uniform(shortest, longest, count)
        phase = rng.uniform(0, 2 * np.pi, count)
        # products of exp(ik) along the scanner's axes: a cosine per voxel and wave would take 20 times as long
        u, v, w = (axis[:, None] for axis in self.axes)
        ku, kv = self.turned(k[0], k[1])
        plane = np.exp(1j * u * ku)[:, None] * np.exp(1j * (v * kv + phase))
        axial = np.exp(-1j * w * k[2])
        # the real part as a product of interleaved real and imaginary parts, one row of u at a time: too small for
        # BLAS to start threads, which would fight with the other workers
        field = plane.view(np.float64) @ axial.view(np.float64).T
        return (field * math.sqrt(2 / count)).astype(np.float32)

    def splat(self, points: Array, volume: float) -> Array:
        """Share of each voxel [X, Y, Z] that `points` [N, 3], each standing for `volume` mm3, fill (at most 1)."""
        u, v = self.turned(points[:, 0], points[:, 1])
        shape = [axis.size for axis in self.axes]
        places = zip((u, v, points[:, 2]), self.axes, self.spacing, strict=True)
        index = [np.rint((p - axis[0]) / step).astype(np.int64) for p, axis, step in places]
        inside = np.all([(i >= 0) & (i < n) for i, n in zip(index, shape, strict=True)], axis=0)
        flat = np.ravel_multi_index([i[inside] for i in index], shape)
        share = np.bincount(flat, minlength=math.prod(shape)).reshape(shape) * (volume / math.prod(self.spacing))
        return np.minimum(share, 1).astype(np.float32)


def _ellipsoid(centre: Sequence[float], radii: Sequence[float]) -> Implicit:
    (cx, cy, cz), (rx, ry, rz) = centre, radii
    return lambda x, y, z: np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + ((z - cz) / rz) ** 2) - 1


def _capsule(start: Sequence[float], end: Sequence[float], radius: float) -> Implicit:
    (ax, ay, az), (bx, by, bz) = start, np.subtract(end, start)
    length2 = bx * bx + by * by + bz * bz or 1.0  # a ball where both ends are one

    def f(x: Array, y: Array, z: Array) -> Array:
        x, y, z = x - ax, y - ay, z - az
        t = np.clip((x * bx + y * by + z * bz) / length2, 0, 1)
        return np.sqrt((x - t * bx) ** 2 + (y - t * by) ** 2 + (z - t * bz) ** 2) - radius

    return f


class Chest:
    """The random proportions of one patient's chest, and its large surfaces as implicit functions."""

    def __init__(self, rng: np.random.Generator, enlarged_heart: bool) -> None:
        self.a = rng.uniform(106, 122)  # half width inside the ribs
        self.b = self.a * rng.uniform(0.68, 0.76)  # half depth
        self.apex = rng.uniform(105, 120)
        self.upper = 0.3 * self.apex  # where the upper zones begin
        self.domes = {"right": rng.uniform(-68, -45)}
        self.domes["left"] = self.domes["right"] - rng.uniform(3, 10)
        self.wall, self.fat = rng.uniform(11, 15), rng.uniform(4, 22)
        self.middle = rng.uniform(-5, -1)  # the mediastinum lies left of the midline, so the left lung is smaller
        self.ratio = rng.uniform(0.53, 0.61) if enlarged_heart else rng.uniform(0.39, 0.475)

        # the long axis of the heart points to the left and forward; its size follows from the cardiothoracic ratio
        self.tilt = rng.uniform(0.45, 0.75)
        c, s = math.cos(self.tilt), math.sin(self.tilt)
        long = self.ratio * self.a / math.hypot(c, 0.76 * s)
        self.heart_radii = (long, 0.76 * long, 0.55 * long + 12)
        depth = long * math.hypot(s, 0.76 * c)
        base = self.domes["left"] - 2
        self.heart_centre = (-self.ratio * self.a / 3, min(18, self.b - 9 - depth), base + 0.9 * self.heart_radii[2])

    def cage(self, x: Array, y: Array, z: Array) -> Array:
        """Inner surface of the rib cage: a superellipse that narrows towards the apex."""
        r = (np.abs(x / self.a) ** 2.4 + np.abs(y / self.b) ** 2.4) ** (1 / 2.4)
        return (r - self.taper(z)) * self.b

    def taper(self, z: Array) -> Array:
        return np.sqrt(np.maximum(1 - (np.maximum(z + 30, 0) / (self.apex + 30)) ** 2.4, 0))

    def diaphragm(self, side: str, x: Array, y: Array) -> Array:
        """Height of the dome in mm."""
        bend = ((x - SIDES[side] * self.a / 2) / (self.a / 2)) ** 2 + ((y - 15) / self.b) ** 2
        return self.domes[side] - 32 * bend

    def lung(self, side: str, x: Array, y: Array, z: Array) -> Array:
        half = 9 + 15 * np.exp(-(((y + 30) / 42) ** 2)) + 6 * np.exp(-((z / 40) ** 2))  # half width of the mediastinum
        medial = half - SIDES[side] * (x - self.middle)
        f = np.maximum(medial, self.diaphragm(side, x, y) - z)
        return np.maximum(np.maximum(self.cage(x, y, z), f), -self.heart(x, y, z))

    def heart(self, x: Array, y: Array, z: Array) -> Array:
        x, y, z = x - self.heart_centre[0], y - self.heart_centre[1], z - self.heart_centre[2]
        c, s = math.cos(self.tilt), math.sin(self.tilt)
        return _ellipsoid((0, 0, 0), self.heart_radii)(s * y - c * x, c * y + s * x, z) * self.heart_radii[1]

    def heart_surface(self, azimuth: Array, elevation: Array) -> Array:
        """Points [N, 3] just inside the surface; azimuth in radians from the patient's right towards anterior."""
        across = np.cos(elevation)
        away = np.stack([across * np.cos(azimuth), across * np.sin(azimuth), np.sin(elevation)], axis=-1)
        centre = np.asarray(self.heart_centre)
        q = self.heart(*(centre + away).T) / self.heart_radii[1] + 1
        return centre + away * (0.96 / q)[:, None]

    def dry(self, side: str, thickness: float, floor: float, height: float, x: Array, y: Array, z: Array) -> Array:
        """Below 0 in the part of the lung that floats on fluid of `thickness` mm at `floor`, `height` mm high."""
        # the lung floats up on the fluid: its surface moved forward, less so higher up, and up behind the dome
        t = thickness * np.sqrt(np.clip(1 - (z - floor) / height, 0, 1))
        lift = 0.4 * np.clip((20 - y) / 50, 0, 1)
        return np.maximum(self.cage(x, y - t, z), self.diaphragm(side, x, y) + lift * t - z)

    def span(self, side: str) -> tuple[float, float]:
        """Lowest and highest z that count for the lung's zones."""
        return self.domes[side] - 30, self.apex - 5

    def level(self, side: str, z: float) -> str:
        low, high = self.span(side)
        return ("lower", "mid", "upper")[int(np.clip(3 * (z - low) / (high - low), 0, 2))]

    def place(self, rng: np.random.Generator, fits: Callable[[str, Array], Array], depth: float) -> tuple[str, Array]:
        """Side and centre [3] of a lesion: a point of a random zone of a random lung, `depth` mm inside it.

        `fits(side, points [3, N])` is 0 or more where the lesion may be. After some zones without a point that fits,
        the best one seen is taken.
        """
        tries = []
        for _ in range(4):
            side = str(rng.choice(list(SIDES)))
            low, high = self.span(side)
            u = rng.uniform([[0], [-1], [0]], 1, (3, 128))
            z = low + (high - low) * (rng.integers(3) + u[2]) / 3
            points = np.stack([SIDES[side] * self.a * u[0], self.b * u[1], z])
            score = np.minimum(-self.lung(side, *points) - depth, fits(side, points))
            i = np.minimum(score, 0).argmax()  # the first that fits, or else the best
            tries.append((score[i], side, points[:, i]))
            if score[i] >= 0:
                break
        return max(tries, key=itemgetter(0))[1:]


def _vessels(rng: np.random.Generator, chest: Chest, volume: float) -> Array:
    """Points [N, 3], each standing for `volume` mm3, that fill both lungs' branching vessel trees."""
    clouds = []
    for sign in SIDES.values():
        start = np.tile([sign * 24.0 + chest.middle, -8.0, 8.0], (9, 1)) + rng.uniform(-10, 10, (9, 3))
        direction = rng.standard_normal((9, 3)) * [0.6, 1, 1.4] + [sign * 1.2, 0, -0.2]
        length, radius = 38.0, 4.0
        for _ in range(5):
            direction /= np.linalg.norm(direction, axis=1, keepdims=True)
            per_branch = max(1, round(math.pi * radius**2 * length / volume))
            along = rng.uniform(0, length, (len(start), per_branch, 1))
            offset = rng.uniform(-radius, radius, (len(start), per_branch, 3))
            clouds.append((start[:, None] + along * direction[:, None] + offset).reshape(-1, 3))
            start = np.repeat(start + length * direction, 2, axis=0)
            direction = np.repeat(direction, 2, axis=0) + rng.standard_normal((len(start), 3)) * 0.45
            length, radius = length * 0.72, radius * 0.74
    return np.concatenate(clouds)


def _blend(volume: Array, cover: Array, hu: Array | float) -> None:
    volume += cover * (hu - volume)


def _join(words: Sequence[str]) -> str:
    return " and ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} and {words[-1]}"


def _length(rng: np.random.Generator, *mm: float) -> str:
    """A length or a product of lengths as radiologists write it: "18 mm", "1.8 cm", "2.3 x 1.8 cm"."""
    if rng.random() < 0.35:
        return " x ".join(f"{m:.0f}" for m in mm) + " mm"
    return " x ".join(f"{m / 10:.1f}" for m in mm) + " cm"


class Painter:
    """Draws one patient: the healthy chest first, then each finding, with its mask and the words for its sentence."""

    lobe = "lobe"  # what an upper or lower zone may be called as well

    def __init__(self, rng: np.random.Generator, grid: Grid, present: Mapping[str, int]) -> None:
        self.rng, self.grid = rng, grid
        self.covers: dict[str, Array] = {}  # finding -> membership in [0, 1]
        self.words: dict[str, dict[str, str]] = {}
        self.taken: list[Implicit] = []  # lesions in the lung that others must not hide in
        self._draw(present)
        for name, paint in (
            ("Pleural effusion", self._effusion),
            ("Consolidation", self._consolidation),
            ("Lung nodule", self._nodules),
            ("Coronary artery wall calcification", self._coronary_calcification),
        ):
            if present[name]:
                paint()
        self._granulomas()

    def _draw(self, present: Mapping[str, int]) -> None:
        """The chest, and the findings that are part of it rather than put into it."""
        self.chest = Chest(self.rng, present["Cardiomegaly"])
        self._chest_wall()
        self.texture = np.zeros_like(self.volume)  # HU that lesions add to their mean
        self._lungs()
        if present["Emphysema"]:
            self._emphysema()
        self._mediastinum(present["Cardiomegaly"])
        self._bones()

    def _chest_wall(self) -> None:
        rng, grid, chest = self.rng, self.grid, self.chest
        a, b = chest.a + chest.wall, chest.b + chest.wall

        def shell(rim: float, x: Array, y: Array, z: Array) -> Array:  # the back is padded with muscle
            r = (np.abs(x / (a + rim)) ** 2.3 + np.abs((y + 5) / (b + 7 + rim)) ** 2.3) ** (1 / 2.3)
            return (r - 1) * b

        self.volume = np.full(np.broadcast_shapes(grid.x.shape, grid.z.shape), -1000, np.float32)
        table = grid.cover(lambda x, y, z: np.abs(y + 0.0004 * x**2 + b + chest.fat + 24) - 5)
        _blend(self.volume, table * (np.abs(grid.x) < 150), -600)
        _blend(self.volume, grid.cover(partial(shell, chest.fat)), rng.uniform(-110, -85))
        tissue = rng.uniform(40, 65)
        streaks = grid.waves(rng, 20, 60)
        _blend(self.volume, grid.cover(partial(shell, 0.0)), tissue - 12 + 12 * streaks)
        self.cage = grid.cover(chest.cage)
        # mediastinal and abdominal fat, streaked; liver, spleen and stomach lie in it
        _blend(self.volume, self.cage, np.where(streaks > rng.uniform(-0.5, 0.5), tissue - 10, -85))
        contrast = rng.random() < 0.4
        self.blood = rng.uniform(150, 250) if contrast else rng.uniform(35, 50)
        parenchyma = rng.uniform(45, 65) + 45 * contrast
        below = chest.domes["right"]
        for centre, radii, hu in (
            ((40, 0, below - 75), (chest.a - 32, chest.b - 4, 75), parenchyma),  # liver
            ((-72, -35, below - 55), (32, 35, 45), parenchyma + 5),  # spleen
            ((-50, 20, below - 60), (38, 40, 45), 30.0),  # stomach
        ):
            part = grid.around(centre, radii)
            _blend(self.volume[part.window], part.cover(_ellipsoid(centre, radii)) * self.cage[part.window], hu)
        if rng.random() < 0.5:
            centre, radii = (-50, 42, below - 50), rng.uniform(10, 22, 3)
            part = grid.around(centre, radii)
            _blend(self.volume[part.window], part.cover(_ellipsoid(centre, radii)), -950)

    def _lungs(self) -> None:
        rng, grid, chest = self.rng, self.grid, self.chest
        self.sides = {side: np.zeros_like(self.volume) for side in SIDES}
        for side, cover in self.sides.items():
            part = grid.around((SIDES[side] * chest.a / 2, 0, 0), (chest.a / 2, chest.b, chest.apex))
            cover[part.window] = part.cover(partial(chest.lung, side))
        self.lungs = np.maximum(self.sides["left"], self.sides["right"])
        base, gravity = rng.uniform(-880, -780), rng.uniform(0.1, 0.35)
        texture = grid.waves(rng, 15, 45)
        _blend(self.volume, self.lungs, base - gravity * grid.y + rng.uniform(8, 20) * texture)
        volume = 2.5
        self.vessels = grid.splat(_vessels(rng, chest, volume), volume) * self.lungs
        _blend(self.volume, self.vessels, max(30.0, 0.8 * self.blood))

    def _mediastinum(self, enlarged_heart: bool) -> None:
        rng, grid, chest, volume = self.rng, self.grid, self.chest, self.volume
        # epicardial fat under the surface, in which the coronary arteries run; muscle; blood in the chambers
        centre, reach = chest.heart_centre, max(chest.heart_radii)
        part = grid.around(centre, reach)
        heart, muscle, chambers = (c * self.cage[part.window] for c in part.layers(chest.heart, 0, -6, -14))
        for cover, hu in ((heart, -60), (muscle, 42), (chambers, self.blood)):
            _blend(volume[part.window], cover, hu)
        self.heart = np.zeros_like(volume)
        self.heart[part.window] = heart
        if enlarged_heart:
            self.covers["Cardiomegaly"] = self.heart
            self.words["Cardiomegaly"] = {"ratio": f"{chest.ratio:.2f}"}

        radius, arch = rng.uniform(11, 15), rng.uniform(44, 56)
        spine_y = 16 - chest.b
        front, back = (10, 14, arch), (-24, spine_y + 24, arch)
        part = grid.around((0, 0, arch), (70, 70, 30))
        _blend(volume[part.window], part.cover(_capsule(front, back, radius)), self.blood)
        part = grid.around((10, 14, (arch + centre[2]) / 2), (20, 20, (arch - centre[2]) / 2))
        _blend(volume[part.window], part.cover(_capsule(front, (4, 8, centre[2] + 15), radius + 1)), self.blood)
        part = grid.around(back, (20, 20, 400))
        _blend(volume[part.window], part.cover(_capsule(back, (-22, spine_y + 24, -400), radius - 1)), self.blood)

        self.trachea = np.zeros_like(volume)
        carina, radius = (0, -6, rng.uniform(28, 38)), rng.uniform(8, 9.5)
        tubes = [((0, 4, 200), carina, radius)]
        tubes += [(carina, (sign * 34, -12, carina[2] - 28), 6.0) for sign in SIDES.values()]
        for start, end, size in tubes:
            middle, reach = np.add(start, end) / 2, np.abs(np.subtract(start, end)) / 2 + size
            part = grid.around(middle, reach)
            tube = part.cover(_capsule(start, end, size))
            np.maximum(self.trachea[part.window], tube, out=self.trachea[part.window])
        _blend(volume, self.trachea, -980)

    def _bones(self) -> None:
        rng, grid, chest, volume = self.rng, self.grid, self.chest, self.volume
        spine_y = 16 - chest.b
        density = rng.uniform(0.7, 1.3)
        part = grid.around((0, spine_y - 12, 0), (34, 40, 400))
        body, marrow = part.layers(lambda x, y, z: (np.hypot(x / 20, (y - spine_y) / 16) - 1) * 16, 0, -3)
        arch = part.cover(lambda x, y, z: (np.hypot(x / 22, (y - spine_y + 24) / 15) - 1) * 15)
        canal = part.cover(lambda x, y, z: np.hypot(x, y - spine_y + 23) - 9)
        discs = self._bands(part.z, period=26, width=7, at=rng.uniform(0, 26))
        _blend(volume[part.window], arch * (1 - 0.6 * discs), 260 * density)
        _blend(volume[part.window], body, (300 - 130 * marrow) * density * (1 - discs) + 80 * discs)
        _blend(volume[part.window], canal, 25)
        self.spine = np.zeros_like(volume)
        self.spine[part.window] = np.maximum(body, arch) * (1 - 0.9 * canal)

        # a rib is where the shell around the cage meets a band that falls towards the front
        taper = np.maximum(chest.taper(grid.z), 0.4)
        outer, inner = grid.layers(lambda x, y, z: chest.cage(x, y, z) + (chest.taper(z) - taper) * chest.b, 9.5, 1.5)
        height = grid.z + 0.4 * (grid.y + chest.b)
        ribs = (outer - inner) * self._bands(height, period=25, width=12, at=rng.uniform(0, 25))
        lateral = np.clip((np.abs(grid.x) - 22) / 8, 0, 1)  # none in front of the spine or behind the sternum
        self.ribs = ribs * lateral * (height > chest.domes["right"] - 75)
        cartilage = np.clip((grid.y - 0.55 * chest.b) / 15, 0, 1)
        _blend(volume, self.ribs, (rng.uniform(350, 600) * (1 - cartilage) + 100 * cartilage) * density)
        centre, radii = (0, chest.b + 5, 10), (19, 7, 85)
        part = grid.around(centre, radii)
        _blend(volume[part.window], part.cover(_ellipsoid(centre, radii)), 170 * density)

    def _bands(self, height: Array, period: float, width: float, at: float) -> Array:
        """Share of each voxel, along z, inside bands of `width` mm that repeat every `period` mm (exact)."""

        def below(h: Array) -> Array:
            turns = np.floor(h / period)
            return turns * width + np.minimum(h - turns * period, width)

        half = self.grid.spacing[2] / 2
        return (below(height - at + half) - below(height - at - half)) / (2 * half)

    def _emphysema(self) -> None:
        rng, grid, chest = self.rng, self.grid, self.chest
        sides = [list(SIDES), list(SIDES), ["left"], ["right"]][rng.integers(4)]
        diffuse = rng.random() < 0.3
        severity, share = [("mild", 0.2), ("moderate", 0.38), ("severe", 0.58)][rng.integers(3)]
        # holes are where a random field, which is about Gaussian, exceeds its (1 - share) quantile
        holes = np.clip(0.5 + (grid.waves(rng, 28, 60) - NormalDist().inv_cdf(1 - share)) / 0.25, 0, 1)
        if not diffuse:
            holes = holes * np.clip(0.5 + (grid.z - chest.upper) / 40, 0, 1)
        cover = holes * np.maximum.reduce([self.sides[side] for side in sides])
        _blend(self.volume, cover * (1 - self.vessels), rng.uniform(-1000, -960))
        self.covers["Emphysema"] = cover
        both = len(sides) == 2
        region = "lung" if diffuse else f"upper {self.lobe}"
        self.words["Emphysema"] = {
            "severity": severity,
            "pattern": "diffuse" if diffuse else "centrilobular",
            "where": f"both {region}s" if both else f"the {sides[0]} {region}",
            "s": "" if both else "s",
        }

    def _effusion(self) -> None:
        rng, grid, chest = self.rng, self.grid, self.chest
        sides = [["left"], ["right"], list(SIDES)][rng.integers(3)]
        largest = 0.0
        cover = np.zeros_like(self.volume)
        for side in sides:
            thickness, height = rng.uniform(15, 50), rng.uniform(80, 150)
            floor = chest.domes[side] - 45
            dry = partial(chest.dry, side, thickness, floor, height)
            part = grid.around((SIDES[side] * chest.a / 2, 0, floor + height / 2), (chest.a / 2, chest.b, height))
            fluid = self.sides[side][part.window] * (1 - part.cover(dry))
            np.maximum(cover[part.window], fluid, out=cover[part.window])
            self.taken.append(lambda x, y, z, dry=dry, side=side: np.where(x * SIDES[side] > 0, -dry(x, y, z), 99.0))
            largest = max(largest, thickness)
        _blend(self.volume, cover, rng.uniform(0, 20) + self.texture)
        self.covers["Pleural effusion"] = cover
        both = len(sides) == 2
        self.words["Pleural effusion"] = {
            "amount": "small" if largest < 25 else "moderate" if largest < 38 else "large",
            "thickness": _length(rng, largest),
            "side": "bilateral" if both else sides[0],
            "on": "on both sides" if both else f"on the {sides[0]}",
            "s": "s" if both else "",
            "is_": "are" if both else "is",
            "a": "" if both else "a ",
        }

    def _free(self, points: Array, radius: float) -> Array:
        """Distance in mm, at least about, by which a ball at points [3, N] keeps clear of the lesions so far."""
        return np.min([f(*points) for f in self.taken], axis=0, initial=np.inf) - radius

    def _consolidation(self) -> None:
        rng, grid, chest = self.rng, self.grid, self.chest
        size = rng.uniform(35, 80)
        side, centre = chest.place(
            rng, lambda side, p: np.minimum(chest.lung(side, *p) + 0.35 * size, self._free(p, 0.3 * size)), 0.2 * size
        )
        # a wedge that opens from near the hilum to the pleura, blurred and dented by a random field
        hilum = np.array([SIDES[side] * 22, -8, 5])
        axis = ((centre - hilum) / np.linalg.norm(centre - hilum)).tolist()  # floats: arrays stay float32
        dents = grid.waves(rng, 30, 70) * 0.08 * size
        cx, cy, cz = centre.tolist()
        x, y, z = grid.x - cx, grid.y - cy, grid.z - cz
        along = x * axis[0] + y * axis[1] + z * axis[2]
        across = np.sqrt(np.maximum(x * x + y * y + z * z - along * along, 0))
        f = np.maximum(across - 0.36 * size - 0.3 * along, np.abs(along) - 0.5 * size) + dents
        cover = np.clip(0.5 - f / 10, 0, 1) * self.sides[side] * (1 - self.covers.get("Pleural effusion", 0))
        bronchograms = np.clip(grid.waves(rng, 14, 24) - 1.2, 0, 1)
        _blend(self.volume, cover, rng.uniform(-50, 50) + self.texture - 450 * bronchograms)
        self.taken.append(_capsule(centre, centre, 0.55 * size))
        self.covers["Consolidation"] = cover
        level = chest.level(side, centre[2])
        zone = f"{level} {self.lobe}" if level != "mid" and rng.random() < 0.6 else f"{level} zone"
        self.words["Consolidation"] = {"where": f"{side} {zone}", "size": _length(rng, size)}

    def _nodules(self) -> None:
        rng, grid, chest = self.rng, self.grid, self.chest
        cover = np.zeros_like(self.volume)
        hu = rng.uniform(0, 60)
        found = []
        for _ in range(rng.choice([1, 2, 3], p=[0.6, 0.25, 0.15])):
            diameter = rng.uniform(12, 30)
            radii = diameter / 2 * np.array([1, *rng.uniform(0.75, 1, 2)])
            side, centre = chest.place(rng, lambda _, p, r=radii[0] + 4: self._free(p, r), depth=radii[0] + 2)
            nodule = _ellipsoid(centre, radii)
            part = grid.around(centre, radii)
            share = part.cover_small(nodule) * self.lungs[part.window]
            _blend(self.volume[part.window], share, hu + self.texture[part.window])
            np.maximum(cover[part.window], share, out=cover[part.window])
            self.taken.append(_capsule(centre, centre, radii[0]))
            found.append((diameter, 2 * radii[1], f"{side} {chest.level(side, centre[2])}"))
        self.covers["Lung nodule"] = cover
        found.sort(reverse=True)
        largest = _length(rng, *found[0][:1] if rng.random() < 0.6 else found[0][:2])
        many = len(found) > 1
        places = list(dict.fromkeys(place for _, _, place in found))
        self.words["Lung nodule"] = {
            "noun": ("a solid nodule", "two nodules", "three nodules")[len(found) - 1],
            "of": "up to" if many else "of",
            "is_": "are" if many else "is",
            "size": largest,
            "measure": f"the largest {largest}" if many else largest,
            "where": f"{_join(places)} zone{'s' if len(places) > 1 else ''}",
        }

    def _coronary_calcification(self) -> None:
        rng, grid, chest = self.rng, self.grid, self.chest
        arteries = {  # name: azimuth range in radians, from the patient's right towards anterior
            "left anterior descending artery": (1.9, 2.7),
            "circumflex artery": (3.3, 4.0),
            "right coronary artery": (0.3, 1.1),
        }
        names = rng.choice(list(arteries), size=1 + (rng.random() < 0.35), replace=False)
        count = int(rng.integers(2, 6))
        cover = np.zeros_like(self.volume)
        hu = rng.uniform(500, 1200)
        for i in range(count):
            low, high = arteries[names[i % len(names)]]
            centre = chest.heart_surface(rng.uniform(low, high, 1), rng.uniform(-0.2, 0.7, 1))[0]
            # plaques lie along the wall; the first is never the smallest kind, so that one can always be seen
            radii = rng.uniform(7.5 if i == 0 else 4, 10) / 2 * np.array([1, 1, rng.uniform(0.8, 1.6)])
            part = grid.around(centre, radii)
            share = part.cover_small(_ellipsoid(centre, radii))
            _blend(self.volume[part.window], share, hu)
            np.maximum(cover[part.window], share, out=cover[part.window])
        self.covers["Coronary artery wall calcification"] = cover
        self.words["Coronary artery wall calcification"] = {
            "artery": _join(names),
            "amount": "mild" if count < 3 else "moderate" if count < 5 else "marked",
        }

    def _granulomas(self) -> None:
        """Old calcified dots in the lungs and the liver: as bright as coronary plaque, but no finding."""
        rng, grid, chest = self.rng, self.grid, self.chest
        for _ in range(rng.integers(4)):
            _, centre = chest.place(rng, lambda side, p: np.zeros(1), depth=8)
            if rng.random() < 0.5:
                dome = chest.domes["right"]
                centre = np.array([rng.uniform(30, 75), rng.uniform(-40, 40), dome - rng.uniform(40, 70)])
            radius = rng.uniform(1.5, 2.5)
            part = grid.around(centre, radius)
            _blend(self.volume[part.window], part.cover_small(_ellipsoid(centre, [radius] * 3)), rng.uniform(300, 800))


def _sentence(template: str, words: Mapping[str, str]) -> str:
    text = str(template).format(**words)
    return f"{text[0].upper()}{text[1:]}."


def write_report(
    rng: np.random.Generator, labels: Mapping[str, int], words: Mapping[str, Mapping[str, str]]
) -> tuple[str, str, dict[str, str]]:
    """Findings, impression, and the sentence of each finding that is present."""
    spoken: list[tuple[str | None, str]] = []
    for name, present in labels.items():
        if present:
            spoken.append((name, _sentence(rng.choice(POSITIVE[name]), words[name])))
        elif rng.random() < 0.4:
            spoken.append((None, _sentence(rng.choice(NEGATIVE[name]), {})))
    spoken += [(None, _sentence(template, {})) for template in rng.choice(NEUTRAL, size=rng.integers(2))]
    spoken = [spoken[i] for i in rng.permutation(len(spoken))]
    if spoken and rng.random() < 0.15:  # as in many real reports, no full stop at the end
        spoken[-1] = (spoken[-1][0], spoken[-1][1].removesuffix("."))
    findings = " ".join(text for _, text in spoken) or NOT_GIVEN
    sentences = {name: text for name, text in spoken if name is not None}

    # as in a real impression, what matters most, not all of it
    named = _join([SHORT_NAMES[name] for name in rng.permutation(FINDINGS) if labels[name]][:2])
    if rng.random() < 0.07:
        impression = NOT_GIVEN
    elif named:
        impression = _sentence(rng.choice(["{named}", "findings in keeping with {named}"]), {"named": named})
    else:
        impression = str(rng.choice(["No acute finding.", "Normal chest CT.", "No significant abnormality."]))
    return findings, impression, sentences


def check_field_of_view(cohort: str, shape: Sequence[int], spacing: Sequence[float]) -> None:
    if any(n * s < MIN_FIELD_OF_VIEW for n, s in zip(shape, spacing, strict=True)):
        raise InputError(
            f"{cohort}: shape {tuple(shape)} x spacing {tuple(spacing)} must span {MIN_FIELD_OF_VIEW:.0f} mm or more "
            "along each axis: raise shape or spacing"
        )


def draw_labels(rng: np.random.Generator, prevalence: Mapping[str, float]) -> dict[str, int]:
    return {name: int(rng.random() < prevalence.get(name, 0.0)) for name in FINDINGS}


def scanner_grid(rng: np.random.Generator, shape: Sequence[int], spacing: Sequence[float]) -> tuple[Grid, Array]:
    """A grid about which the patient lies a little off centre and turned, and its affine [4, 4]."""
    placing = zip(shape, spacing, rng.uniform(-6, 6, 3), strict=True)
    axes = [(np.arange(n) * step - (n - 1) * step / 2 - shift).astype(np.float32) for n, step, shift in placing]
    grid = Grid(axes, math.radians(rng.uniform(-5, 5)), spacing)
    affine = np.diag([*spacing, 1.0])
    centre = rng.uniform([-15, -30, -400], [15, 30, -150]).round(1)  # where the scanner has its origin
    affine[:3, 3] = centre - (np.asarray(shape) - 1) * spacing / 2
    return grid, affine


def finding_masks(covers: Mapping[str, Array]) -> dict[str, Array]:
    """Masks (bool, never empty) of what fills a voxel by half, or of the fullest voxel where none is half full."""
    return {name: covers[name] > min(0.5, 0.999 * covers[name].max()) for name in FINDINGS if name in covers}


def scanned(rng: np.random.Generator, grid: Grid, volume: Array) -> Array:
    """HU as int16 with a scanner's calibration offset and noise; the volume itself changes."""
    volume += rng.uniform(-15, 15) + rng.uniform(3, 8) * grid.waves(rng, 50, 150)
    # last: its draws depend on the shape
    volume += rng.uniform(22, 32) * rng.standard_normal(volume.shape, dtype=np.float32)
    return np.rint(volume).clip(-1024, 3071).astype(np.int16)


def patient(
    rng: np.random.Generator,
    shape: Sequence[int] = (64, 64, 32),
    spacing: Sequence[float] = (5.0, 5.0, 10.0),
    prevalence: Mapping[str, float] = PREVALENCE,
) -> Patient:
    """Draw one patient.

    Args:
        rng: the only source of chance.
        shape: voxels [X, Y, Z].
        spacing: mm [X, Y, Z]; shape times spacing must be 300 mm or more along each axis.
        prevalence: finding -> probability; a finding that is not named is absent.
    """
    check_field_of_view("phantom", shape, spacing)
    labels = draw_labels(rng, prevalence)
    grid, affine = scanner_grid(rng, shape, spacing)
    painter = Painter(rng, grid, labels)
    findings, impression, sentences = write_report(rng, labels, painter.words)
    organ_covers = {f"{side} lung": cover for side, cover in painter.sides.items()}
    organ_covers |= {"heart": painter.heart, "spine": painter.spine, "ribs": painter.ribs, "trachea": painter.trachea}
    organs = np.zeros(tuple(shape), np.uint8)
    for name, cover in organ_covers.items():
        organs[cover > 0.5] = ORGANS[name]

    volume = scanned(rng, grid, painter.volume)
    return Patient(volume, affine, organs, finding_masks(painter.covers), labels, findings, impression, sentences)


Draw = Callable[[np.random.Generator, Sequence[int], Sequence[float]], Patient]
SPLITS = {"train": "train", "valid": "validation"}  # as CT-RATE names volumes, and tables of reports and metadata
# folder of a table -> its columns
COLUMNS: dict[str, tuple[str, ...]] = {
    "radiology_text_reports": ("VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN"),
    "multi_abnormality_labels": ("VolumeName", *FINDINGS),
    "metadata": ("VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing"),
    "masks": ("VolumeName", "Finding", "Sentence"),
}


def _write_nifti(path: Path, array: Array, affine: Array) -> None:
    """Write a RAS array in LPS voxel order, as CT-RATE's volumes lie on disk: readers really have to reorient it."""
    image = nib.Nifti1Image(array, affine).as_reoriented([[0, -1], [1, -1], [2, 1]])
    image.header.set_xyzt_units("mm")
    image.set_sform(image.affine, code=1)
    image.set_qform(image.affine, code=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    # without a time stamp, and whatever nibabel's own default is, so that the same patient gives the same bytes
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def _write_patient(
    root: Path, draw: Draw, shape: Sequence[int], spacing: Sequence[float], seed: int, item: tuple[str, int]
) -> dict[str, list[list[str]]]:
    """Write the volume and masks of one patient; return its rows, table -> rows."""
    split, i = item
    p = draw(np.random.default_rng([seed, list(SPLITS).index(split), i]), shape, spacing)
    name = f"{split}_{i + 1}_a_1"
    place = Path(f"{split}_fixed", f"{split}_{i + 1}", f"{split}_{i + 1}_a")
    volumes, masks = root / place, root / "masks" / place / name
    file = f"{name}.nii.gz"
    _write_nifti(volumes / file, p.volume, p.affine)
    _write_nifti(masks / "organs.nii.gz", p.organs, p.affine)
    for finding, mask in p.masks.items():
        _write_nifti(masks / mask_file_name(finding), mask.astype(np.uint8), p.affine)
    technique = f"Axial chest CT with a section thickness of {spacing[2]:g} mm."
    xy_spacing = f"[{spacing[0]:g}, {spacing[1]:g}]"
    return {
        f"radiology_text_reports/{SPLITS[split]}_reports.csv": [[file, NOT_GIVEN, technique, p.findings, p.impression]],
        f"multi_abnormality_labels/{split}_predicted_labels.csv": [[file, *map(str, p.labels.values())]],
        # the *_fixed volumes are in HU already; as in CT-RATE, the table still says how the raw ones were to be scaled
        f"metadata/{SPLITS[split]}_metadata.csv": [[file, "1", "-1024", xy_spacing, f"{spacing[2]:g}"]],
        f"masks/{split}_sentences.csv": [[file, finding, text] for finding, text in p.sentences.items()],
    }


def cohort(
    dataset_dir: str | os.PathLike[str],
    num_train: int = 1024,
    num_valid: int = 256,
    shape: Sequence[int] = (64, 64, 32),
    spacing: Sequence[float] = (5.0, 5.0, 10.0),
    prevalence: Mapping[str, float] = PREVALENCE,
    seed: int = 42,
    num_workers: int = 2,
) -> str:
    """Write a cohort in CT-RATE's layout and return `dataset_dir`; reuse it if it is there with these parameters.

    Beside CT-RATE's own files, ``dataset/masks`` holds for each volume ``organs.nii.gz``, a mask per finding that is
    present, and per split the sentence that speaks of each. The bytes depend on the arguments but not on
    `num_workers`. A cohort of other parameters is replaced; any other folder that is not empty is left alone. A run
    that finds another at it waits. Where several processes train together, rank 0 writes it, and the others go on when
    it is there. What a kill has left is removed by the next run.

    Args:
        shape, spacing, prevalence: as in :func:`patient`.

    Raises:
        InputError: `dataset_dir` holds something else, or `prevalence` names no finding.
    """
    shape, spacing = [int(n) for n in shape], [float(s) for s in spacing]
    if unknown := sorted(set(prevalence) - set(FINDINGS)):
        raise InputError(f"phantom.cohort: prevalence names {', '.join(unknown)}: choose of {', '.join(FINDINGS)}")
    manifest = dict(GENERATOR, num_train=num_train, num_valid=num_valid, shape=shape, spacing=spacing, seed=seed)
    manifest["prevalence"] = dict(prevalence)
    return write_cohort(dataset_dir, manifest, partial(patient, prevalence=dict(prevalence)), num_workers)


def write_cohort(dataset_dir: str | os.PathLike[str], manifest: Mapping[str, Any], draw: Draw, num_workers: int) -> str:
    """Do as :func:`cohort` says, for patients of any kind.

    Args:
        dataset_dir: folder to write, returned.
        manifest: `generator` (whose last word names the file that says what the cohort is), `num_train`, `num_valid`,
            `shape`, `spacing`, `seed`, and whatever else the bytes depend on.
        draw: function (generator of chance, shape, spacing) -> Patient that other processes can import.
        num_workers: processes that draw.
    """
    from custom_components.distributed import rank_zero_first  # torch takes seconds, and the workers want none of it

    kind = manifest["generator"].rpartition(".")[2]
    target = Path(dataset_dir).resolve()
    stamp = target / f"{kind}.json"
    with rank_zero_first() as first:
        if first and (not _is_there(stamp, manifest) or _left_by_kills(target)):
            with _only_writer(target):
                for left in _left_by_kills(target):
                    shutil.rmtree(left)
                if not _is_there(stamp, manifest):  # another run may have written it in the meantime
                    _write_cohort(stamp, manifest, draw, num_workers)
    return str(dataset_dir)


def _only_writer(target: Path) -> AbstractContextManager[None]:
    """The lock lies beside the cohort, which is replaced as a whole."""
    return only_writer(target.parent / f".{target.name}.lock", f"the cohort {target}", "dataset_dir", wait=True)


def _left_by_kills(target: Path) -> list[Path]:
    """Folders in which runs that were killed, or the one that runs now, build the cohort."""
    return list(target.parent.glob(f".{glob.escape(target.name)}.partial-*"))


def _is_there(stamp: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether a cohort is that of the manifest; an InputError where its place is taken by something else."""
    target = stamp.parent
    if stamp.is_file():
        return json.loads(stamp.read_text()) == manifest
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(
            f"{stamp.stem}.cohort: {target} holds something that is not its cohort (it has no {stamp.name}): "
            "set dataset_dir to a new or empty folder"
        )
    return False


def _write_cohort(stamp: Path, manifest: Mapping[str, Any], draw: Draw, num_workers: int) -> None:
    target = stamp.parent
    items = [(split, i) for split in SPLITS for i in range(manifest[f"num_{split}"])]
    context = multiprocessing.get_context("spawn")  # forking a process in which torch's threads run can hang
    # built beside the target and renamed at the end, so that a kill never leaves half a cohort under its name
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.partial-", dir=target.parent) as stage:
        data = Path(stage, "cohort", "dataset")
        for folder in COLUMNS:
            (data / folder).mkdir(parents=True)
        (data.parent / stamp.name).write_text(json.dumps(manifest, indent=2) + "\n")
        write = partial(_write_patient, data, draw, *map(manifest.get, ("shape", "spacing", "seed")))
        workers = ProcessPoolExecutor(num_workers, context, follow_parent) if num_workers > 1 else nullcontext()
        with workers as pool:
            written = pool.map(write, items, chunksize=8) if pool else map(write, items)
            for tables in tqdm(written, total=len(items), desc=f"{stamp.stem} cohort", unit="patient"):
                for table, lines in tables.items():
                    with open(data / table, "a", newline="", encoding="utf-8") as file:
                        header = [] if file.tell() else [COLUMNS[table.split("/")[0]]]
                        csv.writer(file, lineterminator="\n").writerows(header + lines)
        if stamp.is_file():  # nothing else is ever replaced; renamed too, since a kill may come between any two files
            target.rename(Path(stage, "old"))
        data.parent.rename(target)


def _write_label_map(dataset: Path, volume: str) -> str:
    """Write organs and lesions of one volume as one map, and return its path in the data set.

    A lesion replaces the organ that it lies in, and a later one of LESIONS an earlier one.
    """
    masks = dataset / "masks" / volume
    organs = nib.load(masks / "organs.nii.gz")
    labels = np.asarray(organs.dataobj).copy()
    for finding, value in LESIONS.items():
        if (file := masks / mask_file_name(finding)).is_file():
            labels[np.asarray(nib.load(file).dataobj) > 0] = value
    with replacing(masks / "labels.nii.gz") as temporary:  # other processes may read it
        image = nib.Nifti1Image(labels, organs.affine, organs.header)
        temporary.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
    return f"dataset/masks/{volume}/labels.nii.gz"


def segmentation_datalist(dataset_dir: str | os.PathLike[str], num_validation: int) -> str:
    """Write ``segmentation.json`` beside a cohort's volumes, a list as LUNA16's, and return its path.

    `training` are the cohort's training patients, `validation` the first `num_validation` of its others, and `testing`
    the rest. Labels are maps of ORGANS and LESIONS, which are written too: ``dataset/masks/<volume>/labels.nii.gz``.

    Raises:
        InputError: no patient is left for one of the lists.
    """
    from custom_components.distributed import rank_zero_first

    dataset = Path(dataset_dir, "dataset")

    def items(split: str) -> list[dict[str, str]]:
        volumes = dataset.glob(f"{split}_fixed/*/*/*.nii.gz")
        volumes = sorted(volumes, key=lambda file: int(file.name.split("_")[1]))
        names = ["/".join(file.parts[-4:]).removesuffix(".nii.gz") for file in volumes]
        return [{"image": f"dataset/{n}.nii.gz", "label": _write_label_map(dataset, n)} for n in names]

    path = Path(dataset_dir).resolve() / "segmentation.json"
    with rank_zero_first() as first:
        if first:
            with _only_writer(path.parent):
                for left in dataset.glob("masks/*/*/*/*/.*.tmp.labels.nii.gz"):  # of runs that were killed
                    left.unlink()
                remove_temporary(path)
                train, other = map(items, SPLITS)
                content = {
                    "training": train, "validation": other[:num_validation], "testing": other[num_validation:]
                }  # fmt: skip
                if not all(content.values()):
                    raise InputError(
                        f"{dataset_dir}: num_validation {num_validation} of {len(other)} held-out patients leaves none "
                        "to validate or to test on: change num_valid or num_validation"
                    )
                with replacing(path) as temporary:
                    temporary.write_text(json.dumps(content, indent=1) + "\n")
    return str(path)
