"""Whether the map of a sentence marks what it means, on masks of findings, and predictions for such."""

import itertools
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from custom_components.data.findings import check_shape, read_masks
from custom_components.data.save import save_finding_masks
from custom_components.errors import InputError
from custom_components.evaluation.cells import Boxes, Cells, boxes_in_scan
from custom_components.evaluation.controls import untrained
from custom_components.evaluation.masks import (
    THRESHOLDS,
    best_boxes,
    diameter,
    dice_curves,
    dice_of,
    instances,
    marked_voxels,
    matches,
)
from custom_components.evaluation.metrics import interval, resample
from custom_components.evaluation.report import read_metrics, write_report
from custom_components.files import replacing
from custom_components.run.description import sha256
from custom_components.run.inferers import ReadableLoader
from custom_components.simcrop import VolumeEmbedder
from custom_components.text import TextEncoder, encode_sentences
from monai.data import MetaTensor, decollate_batch
from monai.networks import eval_mode
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

HIT = 0.1  # Dice from which a finding counts as hit, as in ReXGroundingCT's challenge
MAPS = ("simcrop", "shuffled", "random_encoder", "no_image_prior")  # which have a threshold
CONTENDERS = (*MAPS, "chance", "oracle")


@dataclass
class Scan:
    """A volume as the network has seen it: the geometry of its view and its array, and its maps ``[F, *cells]``."""

    view: Tensor
    affine: Tensor
    shape: tuple[int, ...]
    voxels: Tensor
    within: Tensor
    maps: dict[str, Tensor] = field(default_factory=dict)


def scan_of(cells: Cells, image: MetaTensor) -> Scan:
    """Of a preprocessed image, which knows both geometries."""
    affine = torch.as_tensor(np.asarray(image.meta["original_affine"]), dtype=torch.float64)
    shape = tuple(np.asarray(image.meta["spatial_shape"]).tolist())
    view = image.affine.double().cpu()
    return Scan(view, affine, shape, *cells.voxels(torch.linalg.solve(view, affine), shape))


def views(loader: ReadableLoader) -> Iterator[tuple[str, MetaTensor]]:
    """Name and image of each scan that can be read."""
    for batch in loader:
        (item,) = decollate_batch(batch)
        yield item["name"], item["image"]


@dataclass
class _Sentences:
    """What the evaluation and the prediction share: a network, its words, and the cells of its view."""

    network: VolumeEmbedder
    loader: ReadableLoader
    items: Sequence[Mapping[str, Any]]
    text_encoder: TextEncoder
    tokenizer: PreTrainedTokenizerBase
    output_dir: str | Path
    checkpoint: str | Path
    shifts: Sequence[int] = (1, 1, 1)
    threshold: float | None = None

    def __post_init__(self) -> None:
        self.cells = Cells(self.network.encoder, self.shifts)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def encode(self, sentences: Sequence[str], embedder: VolumeEmbedder) -> Tensor:
        return F.normalize(encode_sentences(sentences, embedder.aligner, self.text_encoder, self.tokenizer), dim=-1)

    def features(self, embedder: VolumeEmbedder, image: MetaTensor) -> Tensor:
        return self.cells.features(embedder, image.as_tensor().to(self.device))

    def pass_over(self, name: str, error: InputError) -> None:
        self.loader.pass_over(name, str(error))


@dataclass
class GroundingEvaluation(_Sentences):
    """Whether the map of a sentence marks what it means, on the masks' own voxels, each figure beside its controls.

    - ``pointing``: share of sentences whose highest cell has its centre in the mask. ``patch_hit``: share of sentences
      where a patch around that centre overlaps it.
    - ``dice``: mean over sentences, of the voxels whose map reaches a threshold, one for all, which is chosen by that
      mean on the scans of split ``valid`` alone. ``hit_rate``: share of sentences with a Dice of 0.1 or more.
    - ``precision``, ``recall``, ``f1`` of instances, found with a Dice of 0.2 or more; of a prediction, an instance is
      what hangs together.

    Beside SimCroP: ``shuffled``, the same sentences in the volumes of other patients (all of them for pointing, the
    next one for Dice); ``random_encoder``, untrained; ``no_image_prior``, the mean mask of the category in the other
    patients; ``chance``, a cell drawn at random, and for Dice all that the network sees; ``oracle``, for Dice the best
    choice of patches that there is, for pointing whether any cell could hit. Maps of controls have thresholds of their
    own, chosen alike. Intervals are 95 %, by bootstrap over patients.

    Writes ``metrics.json``, ``metrics.csv``, and ``findings.csv``, a row for each sentence. A scan that cannot be read,
    or a mask that does not fit, is passed over; the loader's ``report`` tells at the end.

    Args:
        loader: of the preprocessed images of ``items``, a ``view_size`` of :class:`Cells` each.
        items: see :mod:`custom_components.data.findings`, with ``split``.
        checkpoint: file of the network's weights, to tell them by.
        threshold: in place of one chosen on ``valid``, for SimCroP's own maps.
        size_edges: mm, of the groups by equivalent diameter of a mask's largest instance.
        seen: names of the volumes and patients that the weights were trained on; None where nobody says.
    """

    size_edges: Sequence[float] = (10.0, 20.0, 40.0)
    seen: set[str] | None = None
    seed: int = 42
    num_resamples: int = 2000

    @torch.inference_mode()
    def __call__(self) -> dict[str, Any]:
        """Evaluate, print the table, write the files; returns what ``metrics.json`` holds.

        Raises:
            InputError: no sentence of split ``valid``, or none of ``test``, has a mask with a voxel in it.
        """
        torch.manual_seed(self.seed)
        self.scans: dict[str, Scan] = {}
        self.peaks: dict[str, Tensor] = {}  # of every sentence, in each volume of split test
        with eval_mode(self.network):
            self._look()
        # category -> patient -> sum of the share that masks have of each cell, and number of these masks
        self.covered: dict[str, dict[str, tuple[Tensor, int]]] = defaultdict(dict)
        self.empty = 0
        for item, scan, masks in self._masks("masks"):
            self._learn(item, scan, masks)
        thresholds = self._thresholds()
        rows = [row for found in self._masks("masks of split test", "test") for row in self._rows(*found, thresholds)]
        if not rows:
            raise InputError("no sentence of split test has a mask with a voxel in it: the reasons stand above")
        table = pd.DataFrame(rows)
        metrics = self._metrics(table, thresholds)
        long = [("of", "metric", "contender", "value", "low", "high"), *long_rows(metrics)]
        write_report(self.output_dir, metrics, long, table_rows(metrics), notes(metrics))
        with replacing(Path(self.output_dir) / "findings.csv") as temporary:
            table.to_csv(temporary, index=False)
        return metrics

    def _look(self) -> None:
        """Maps of all scans, and the peaks of all sentences in those of split test."""
        items = {item["name"]: item for item in self.items}
        self.patients = {name: item["patient"] for name, item in items.items()}
        said = dict.fromkeys(finding["sentence"] for item in self.items for finding in item["findings"])
        self.row = {sentence: row for row, sentence in enumerate(said)}
        networks = {"simcrop": self.network, "random_encoder": untrained(self.network)}
        encoded = {name: self.encode(list(said), network) for name, network in networks.items()}
        asked = defaultdict(list)  # volume -> those whose sentences are shuffled to it
        for item in self.items:
            asked[self._next(item)].append(item["name"])
        shuffled = {}
        for name, image in views(self.loader):
            item, scan = items[name], scan_of(self.cells, image)
            features = {network: self.features(networks[network], image) for network in networks}
            for network in networks:
                scan.maps[network] = self.cells.maps(features[network], encoded[network][self._own(item)]).cpu()
            for other in asked[name]:
                own = encoded["simcrop"][self._own(items[other])]
                shuffled[other] = self.cells.maps(features["simcrop"], own).cpu()
            if item["split"] == "test":
                parts = encoded["simcrop"].split(256)
                peaks = [peaks_of(self.cells.maps(features["simcrop"], some).cpu(), scan.within) for some in parts]
                self.peaks[name] = torch.cat(peaks)
            self.scans[name] = scan
        for name, maps in shuffled.items():
            if name in self.scans:
                self.scans[name].maps["shuffled"] = maps

    def _next(self, item: Mapping[str, Any]) -> str | None:
        """The next volume of the same split and another patient, from the last on to the first."""
        names = [other["name"] for other in self.items]
        place = names.index(item["name"]) + 1
        for other in (*self.items[place:], *self.items[: place - 1]):
            if other["split"] == item["split"] and other["patient"] != item["patient"]:
                return other["name"]
        return None

    def _own(self, item: Mapping[str, Any]) -> list[int]:
        return [self.row[finding["sentence"]] for finding in item["findings"]]

    def _masks(self, description: str, split: str | None = None) -> Iterator[tuple[Mapping[str, Any], Scan, list]]:
        """Items, their scans and masks; an item whose masks do not fit is passed over, and not asked for again."""
        items = [item for item in self.items if item["name"] in self.scans and split in (None, item["split"])]
        for item in tqdm(items, desc=description, unit="scan"):
            scan = self.scans[item["name"]]
            try:
                masks = list(read_masks(item, scan.shape, scan.affine.numpy()))
            except InputError as error:
                self.pass_over(item["name"], error)
                del self.scans[item["name"]]
                continue
            yield item, scan, masks

    def _learn(self, item: Mapping[str, Any], scan: Scan, masks: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """What the no-image prior is made of."""
        for finding, (mask, affine) in zip(item["findings"], masks, strict=True):
            if not mask.any():
                self.empty += 1
                logger.warning("%s: the mask of %r is empty, and is left out", item["name"], finding["sentence"])
                continue
            count = self.cells.cells.count(places_of(mask, scan.view, affine))
            cell = abs(torch.linalg.det(self.cells.affine(scan.view)[:3, :3])).item()
            share = (count * (abs(np.linalg.det(affine[:3, :3])) / cell)).clamp(max=1).float()
            before, number = self.covered[finding["category"]].get(item["patient"], (torch.zeros_like(share), 0))
            self.covered[finding["category"]][item["patient"]] = before + share, number + 1

    def _prior(self, category: str, patient: str) -> Tensor | None:
        """Mean mask of a category in the other patients, ``[*cells]``, its highest value being 1; None without any."""
        others = [found for name, found in self.covered[category].items() if name != patient]
        if not others:
            return None
        mean = torch.stack([found for found, _ in others]).sum(0)
        return mean / mean.max().clamp(min=1e-6)

    def _maps(self, item: Mapping[str, Any], scan: Scan, number: int) -> dict[str, Tensor]:
        """The maps ``[*cells]`` of one sentence, of each contender that has one."""
        found = {name: maps[number] for name, maps in scan.maps.items()}
        prior = self._prior(item["findings"][number]["category"], item["patient"])
        found |= {} if prior is None else {"no_image_prior": prior}
        return {name: found[name] for name in MAPS if name in found}

    def _thresholds(self) -> dict[str, float]:
        """Of each contender's maps, that of the highest mean Dice over the sentences of split valid."""
        curves = defaultdict(list)
        for item, scan, masks in self._masks("masks of split valid", "valid"):
            for number, (mask, affine) in enumerate(masks):
                if mask.any():
                    maps = self._maps(item, scan, number)
                    truth = torch.from_numpy(mask > 0)
                    slabs = self._slabs(maps, scan, affine, mask.shape)
                    for name, curve in zip(maps, dice_curves(slabs, truth), strict=True):
                        curves[name].append(curve)
        if "simcrop" not in curves:
            raise InputError("no sentence of split valid has a mask with a voxel in it: the reasons stand above")
        best = {name: float(THRESHOLDS[np.mean(found, 0).argmax()]) for name, found in curves.items()}
        return best if self.threshold is None else best | {"simcrop": self.threshold}

    def _slabs(self, maps: Mapping[str, Tensor], scan: Scan, affine: np.ndarray, shape: Sequence[int]) -> Iterator:
        stacked = torch.stack(list(maps.values())).to(self.device)
        return self.cells.slabs(stacked, scan.view, torch.from_numpy(affine), shape)

    def _rows(
        self,
        item: Mapping[str, Any],
        scan: Scan,
        masks: Sequence[tuple[np.ndarray, np.ndarray]],
        thresholds: Mapping[str, float],
    ) -> Iterator[dict[str, Any]]:
        """A row of ``findings.csv`` for each sentence of an item."""
        seen = None if self.seen is None else bool({item["name"], item["patient"]} & self.seen)
        for number, (finding, (mask, affine)) in enumerate(zip(item["findings"], masks, strict=True)):
            if not mask.any():
                continue
            places, truth = places_of(mask, scan.view, affine), instances(mask, item["numbered"])
            maps = {name: of for name, of in self._maps(item, scan, number).items() if name in thresholds}
            marked = marked_voxels(
                self._slabs(maps, scan, affine, mask.shape), [thresholds[name] for name in maps], mask.shape
            )
            best = self._best_patches(places, scan, affine, mask.shape)
            field = sum(int((index >= 0).sum()) for _, index in self._boxes(self.cells.field, scan, affine, mask.shape))
            inside = int((self.cells.field.index(places.unbind(-1)) >= 0).sum())
            row = {
                "name": item["name"],
                "patient": item["patient"],
                "finding": number,
                "sentence": finding["sentence"],
                "category": finding["category"],
                "diameter_mm": diameter(truth, abs(np.linalg.det(affine[:3, :3]))),
                "voxels": len(places),
                "outside": len(places) - inside,
                "instances": int(truth.max()),
                "seen": seen,
            }
            for name, found in {**dict(zip(maps, marked, strict=True)), "oracle": best}.items():
                pred = instances(found, False)
                row[f"dice_{name}"] = dice_of(found, mask > 0)
                row[f"found_{name}"] = matches(pred, truth)
                row[f"predicted_{name}"] = np.nan if item["partial"] else int(pred.max())
            row["dice_chance"] = 2 * inside / (field + len(places))
            yield row | self._hits(item, scan, maps, mask, affine, places, self.row[finding["sentence"]])

    def _hits(
        self,
        item: Mapping[str, Any],
        scan: Scan,
        maps: Mapping[str, Tensor],
        mask: np.ndarray,
        affine: np.ndarray,
        places: Tensor,
        row: int,
    ) -> dict[str, float]:
        """Of ``pointing`` and ``patch_hit``, whether each contender hits, or how often it would."""
        voxels, within = self.cells.voxels(torch.linalg.solve(scan.view, torch.from_numpy(affine)), mask.shape)
        at_centre = torch.from_numpy(mask[tuple(voxels.T.numpy())] > 0) & within
        others = [peaks[row] for name, peaks in self.peaks.items() if self.patients[name] != item["patient"]]
        found = {}
        for metric, hits in (("pointing", at_centre), ("patch_hit", self.cells.near(places))):
            for name, of in maps.items():
                found[f"{metric}_{name}"] = float(hits[peaks_of(of[None], scan.within)[0]])
            found[f"{metric}_shuffled"] = hits[torch.stack(others)].float().mean().item() if others else np.nan
            found[f"{metric}_chance"] = hits[scan.within].float().mean().item()
            found[f"{metric}_oracle"] = float(hits[scan.within].any())
        return found

    def _boxes(
        self, boxes: Boxes, scan: Scan, affine: np.ndarray, shape: Sequence[int]
    ) -> Iterator[tuple[slice, Tensor]]:
        return boxes_in_scan(boxes, scan.view, torch.from_numpy(affine), shape)

    def _best_patches(self, places: Tensor, scan: Scan, affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """The best that a choice of patches can mark of a mask, bool ``[X, Y, Z]``."""
        patches = self.cells.patches
        total = torch.zeros(int(np.prod(patches.counts)), dtype=torch.long)
        for _, index in self._boxes(patches, scan, affine, shape):
            total += index[index >= 0].bincount(minlength=len(total))
        chosen = best_boxes(patches.count(places).flatten(), total, len(places))
        found = np.zeros(shape, bool)
        for own, index in self._boxes(patches, scan, affine, shape):
            found[..., own] = (chosen[index.clamp(min=0)] & (index >= 0)).numpy()
        return found

    def _metrics(self, table: pd.DataFrame, thresholds: Mapping[str, float]) -> dict[str, Any]:
        edges = [0.0, *self.size_edges, np.inf]
        sizes = {}
        for low, high in zip(edges, edges[1:], strict=False):
            name = f"{low:g} mm and more" if high == np.inf else f"{low:g} to {high:g} mm"
            name = name if low else f"under {high:g} mm"
            sizes[name] = table[(table["diameter_mm"] >= low) & (table["diameter_mm"] < high)]
        seen = table.loc[table["seen"].eq(True), "patient"].nunique() if self.seen is not None else None
        return {
            "seed": self.seed,
            "checkpoint_sha256": sha256(self.checkpoint),
            "shifts": list(self.shifts),
            "thresholds": dict(thresholds),
            "threshold_given": self.threshold is not None,
            "scans": int(table["name"].nunique()),
            "patients": int(table["patient"].nunique()),
            "patients_seen_in_training": seen,
            "empty_masks": self.empty,
            "outside_of_view": int((table["outside"] == table["voxels"]).sum()),
            "partial": any(item["partial"] for item in self.items),
            "unreadable": [name for name, _ in self.loader.failures],
            "all": self._summary(table),
            "per_category": {str(name): self._summary(rows) for name, rows in table.groupby("category")},
            "per_size": {name: self._summary(rows) for name, rows in sizes.items() if len(rows)},
        }

    def _summary(self, table: pd.DataFrame) -> dict[str, Any]:
        """Each metric of each contender with its interval, of some sentences."""
        weights = np.vstack([np.ones(len(table)), resample(table["patient"], self.num_resamples, self.seed)])

        def column(name: str) -> np.ndarray:
            return table[name].to_numpy(float) if name in table else np.full(len(table), np.nan)

        def ratio(above: np.ndarray, below: np.ndarray) -> dict[str, float | None]:
            """Sum of one over that of the other, of those sentences that have both."""
            defined = np.isfinite(above) & np.isfinite(below)
            with np.errstate(invalid="ignore", divide="ignore"):
                values = (weights @ np.where(defined, above, 0)) / (weights @ np.where(defined, below, 0))
            return {"value": float(values[0]) if np.isfinite(values[0]) else None, **interval(values[1:])}

        one, found = np.ones(len(table)), defaultdict(dict)
        for name in CONTENDERS:
            dice = column(f"dice_{name}")
            hit, predicted, truth = column(f"found_{name}"), column(f"predicted_{name}"), column("instances")
            found["pointing"][name] = ratio(column(f"pointing_{name}"), one)
            found["patch_hit"][name] = ratio(column(f"patch_hit_{name}"), one)
            found["dice"][name] = ratio(dice, one)
            found["dice_of_oracle"][name] = ratio(dice, column("dice_oracle"))
            found["hit_rate"][name] = ratio(np.where(np.isfinite(dice), dice >= HIT, np.nan), one)
            found["precision"][name] = ratio(hit, predicted)
            found["recall"][name] = ratio(hit, np.where(np.isfinite(hit), truth, np.nan))
            found["f1"][name] = ratio(2 * hit, predicted + truth)
        for metric, control in itertools.product(("pointing", "patch_hit", "dice"), ("shuffled", "no_image_prior")):
            own, other = (column(f"{metric}_{name}") for name in ("simcrop", control))
            found[metric][f"minus_{control}"] = ratio(own - other, one)
        return {"sentences": len(table), **found}


def places_of(mask: np.ndarray, view: Tensor, affine: np.ndarray) -> Tensor:
    """Where a mask's voxels lie: ``[K, 3]``, in voxels of the view."""
    to_view = torch.linalg.solve(view, torch.from_numpy(affine))
    return torch.from_numpy(np.argwhere(mask)).double() @ to_view[:3, :3].T + to_view[:3, 3]


def peaks_of(maps: Tensor, within: Tensor) -> Tensor:
    """The highest cell of each map ``[S, *cells]``, among those ``within`` the scan ``[cells]``: ``[S]`` int64."""
    return maps.flatten(1).masked_fill(~within, -torch.inf).argmax(1)


def groups_of(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What the metrics are given of: all, categories, sizes."""
    return {"all": metrics["all"], **metrics["per_category"], **metrics["per_size"]}


def long_rows(metrics: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """What ``metrics.csv`` holds."""
    for of, group in groups_of(metrics).items():
        yield of, "sentences", "", group["sentences"], None, None
        for metric, contenders in group.items():
            if metric != "sentences":
                yield from ((of, metric, name, *found.values()) for name, found in contenders.items())


def table_rows(metrics: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The metrics as rows of text: metric, of what, SimCroP's value, its interval, and the controls beside it."""
    rows = [("metric", "of", "simcrop", "interval", "beside")]
    for of, group in groups_of(metrics).items():
        for metric in ("pointing", "patch_hit", "dice", "dice_of_oracle", "hit_rate", "precision", "recall", "f1"):
            if of != "all" and metric in ("patch_hit", "precision", "recall"):
                continue
            found = {name: each for name, each in group[metric].items() if each["value"] is not None}
            own = found.pop("simcrop", None)
            if own is None:
                rows.append((metric, of, "-", "not defined", ""))
                continue
            reach = "" if own["low"] is None else f"{own['low']:.3f} to {own['high']:.3f}"
            beside = ", ".join(f"{name} {each['value']:.3f}" for name, each in found.items())
            rows.append((metric, f"{of} ({group['sentences']})", f"{own['value']:.3f}", reach, beside))
    return rows


def notes(metrics: Mapping[str, Any]) -> list[str]:
    """Lines below the table."""
    own = metrics["thresholds"]["simcrop"]
    found = [f"threshold {own:g}, {'as given' if metrics['threshold_given'] else 'chosen on split valid'}"]
    seen = metrics["patients_seen_in_training"]
    if seen is None:
        found.append("whether these patients were in the pre-training is not told: give its table as trained_on")
    else:
        found.append(f"{seen} of {metrics['patients']} patients were in the pre-training")
    if metrics["partial"]:
        found.append("the masks are partial: Dice is a lower bound, and precision and F1 are not defined")
    if metrics["outside_of_view"]:
        found.append(f"{metrics['outside_of_view']} masks lie outside of what the network sees, and count as missed")
    return found


@dataclass
class GroundingPrediction(_Sentences):
    """Writes what the network finds of each sentence as ReXGroundingCT's challenge takes it.

    ``<output_dir>/predictions/<name>.nii.gz``: uint8 ``(F, X, Y, Z)``, finding by finding in the order of the list, on
    the scan's own array with its affine; what hangs together has one number, from 1, the largest first, and all beyond
    the 255th have 255.

    Args:
        threshold: from which up a voxel is marked; None for that of ``metrics.json`` in ``output_dir``, which an
            evaluation of the same weights with the same ``shifts`` has chosen.
    """

    @torch.inference_mode()
    def __call__(self) -> None:
        threshold = self._chosen() if self.threshold is None else self.threshold
        items = {item["name"]: item for item in self.items}
        folder = Path(self.output_dir) / "predictions"
        number = 0
        with eval_mode(self.network):
            for name, image in views(self.loader):
                item, scan = items[name], scan_of(self.cells, image)
                try:
                    check_shape(item, scan.shape)
                except InputError as error:
                    self.pass_over(name, error)
                    continue
                sentences = self.encode([finding["sentence"] for finding in item["findings"]], self.network)
                maps = self.cells.maps(self.features(self.network, image), sentences)
                slabs = self.cells.slabs(maps, scan.view, scan.affine, scan.shape)
                marked = marked_voxels(slabs, [threshold] * len(maps), scan.shape)
                masks = np.stack([instances(found, False).clip(max=255).astype(np.uint8) for found in marked])
                save_finding_masks(masks, scan.affine.numpy(), folder / f"{name}.nii.gz", item["image"])
                number += 1
        print(f"predictions of {number} scans at threshold {threshold:g}: {folder.resolve()}")

    def _chosen(self) -> float:
        metrics = read_metrics(self.output_dir)
        told = f"output_dir {self.output_dir} has no metrics.json of a grounding evaluation"
        if "thresholds" in metrics:
            if metrics["checkpoint_sha256"] == sha256(self.checkpoint) and metrics["shifts"] == list(self.shifts):
                return float(metrics["thresholds"]["simcrop"])
            told = f"{self.output_dir}/metrics.json is of other weights or shifts"
        raise InputError(f"{told}: run the evaluation on masks first, or give threshold")
