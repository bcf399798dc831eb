"""What a pre-trained SimCroP knows of held-out volumes, each figure beside its control."""

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from monai.data import Dataset
from monai.networks import eval_mode
from monai.transforms import LoadImage, ResampleToMatch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from custom_components.data.lists import mask_file_name
from custom_components.evaluation import figures
from custom_components.evaluation.controls import histogram_auc, hu_histogram, untrained
from custom_components.evaluation.figures import CT, HEAT, outline_plane, show_plane, spacing_of
from custom_components.evaluation.report import write_report
from custom_components.losses import SimCroPLoss
from custom_components.simcrop import SimCroP, VolumeEmbedder, similarity
from custom_components.text import ReportCollate, encode_sentences
from custom_components.vit import patchify, unpatchify, upsample_patches

logger = logging.getLogger(__name__)


def patches_of_mask(mask: Tensor, patch_size: Sequence[int]) -> Tensor:
    """``[1, X, Y, Z]`` mask -> ``[N]`` bool: which patches overlap it."""
    return patchify(mask[None].float(), tuple(patch_size))[0].amax(-1) > 0


@dataclass
class PretrainEvaluation:
    """Masked modelling, presence and grounding on held-out volumes, as far as the data set has labels and masks.

    - ``masked_voxel_mse``: against the mean of the training volumes at the same place.
    - ``masked_token_accuracy``: against always answering the training reports' most frequent token.
    - ``presence_auc``: AUROC over volumes of each finding's sentence by the sentence-volume score, on unmasked volumes;
      beside untrained encoder and projections, and a logistic regression on the volume's HU histogram.
    - ``grounding``: share of finding sentences whose most similar patch overlaps the finding's mask (``hit``); beside
      the same sentences on all other volumes (``hit_shuffled``), a patch drawn at random (``chance``), and the patch
      that the other volumes' masks of that finding cover most often (``no_image_prior``). Only ``hit`` above
      ``hit_shuffled`` speaks of the image.

    Args:
        loss: of pre-training; its targets and its pooling of patches count.
        train_dataset: items for the baselines, without augmentation; the first ``num_baseline`` are used.
        dataset: held-out items with ``image``, the tokens of :class:`custom_components.text.TokenizeReportd`, and,
            where the data set has them, ``label`` (of the classes that ``sentences`` names, in their order), ``masks``
            and ``sentences`` of :func:`custom_components.data.lists.volumes`.
        sentences: class name -> the sentence that says it is present.
        num_baseline: training items that the baselines learn from.
        log_dir: TensorBoard folder whose curves are drawn, or None.
    """

    network: SimCroP
    loss: SimCroPLoss
    tokenizer: PreTrainedTokenizerBase
    train_dataset: Dataset
    dataset: Dataset
    sentences: Mapping[str, str]
    output_dir: str | Path
    batch_size: int = 8
    num_workers: int = 0
    text_mask_ratio: float = 0.75
    seed: int = 42
    num_baseline: int = 1024
    log_dir: str | None = None

    @torch.inference_mode()
    def __call__(self) -> dict[str, Any]:
        """Evaluate, print the table, write it and the figures; returns what ``metrics.json`` holds."""
        self.device = next(self.network.encoder.parameters()).device
        torch.manual_seed(self.seed)
        with eval_mode(self.network):
            metrics, places = self._metrics()
            metrics = {"seed": self.seed, "volumes": len(self.dataset), **metrics}
            rows = table_rows(metrics)
            write_report(self.output_dir, metrics, [("metric", "of", "value", "beside"), *rows], rows)
            self._figures(places, Path(self.output_dir))
        return metrics

    def _batches(self, dataset: Dataset, description: str) -> tqdm:
        """Lists of ``batch_size`` items, with a progress bar."""
        loader = DataLoader(dataset, self.batch_size, num_workers=self.num_workers, collate_fn=list)
        return tqdm(loader, desc=description, unit="batch")

    def _metrics(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The metrics, and the places of finding sentences that they speak of."""
        baseline = self._baseline()
        places, prompts = [], list(self.sentences.values())
        if self.network.aligner is not None:
            places = self._places()
            trained = VolumeEmbedder(self.network.encoder, self.network.aligner)
            random_embedder = untrained(trained)
            features = self._encode([*prompts, *(place["sentence"] for place in places)], trained)
            random_features = self._encode(prompts, random_embedder)

        collate = ReportCollate(self.tokenizer, self.text_mask_ratio)
        # metric of masked modelling -> sums for SimCroP and for the baseline, and how many values they are of
        sums = defaultdict(lambda: np.zeros(3))
        similar, random, histograms = [], [], []
        for items in self._batches(self.dataset, "held-out volumes"):
            start = len(histograms)
            images = torch.stack([item["image"].as_tensor() for item in items]).to(self.device)
            self._add_masked(sums, images, collate(items), baseline)
            histograms += [hu_histogram(item["image"]) for item in items]
            if self.network.aligner is not None:
                similar.append(self._similarities(trained, images, features))
                random.append(self._similarities(random_embedder, images, random_features)[0])
            for place in places:
                if start <= place["volume"] < start + len(items):
                    mask = self._mask(place, items[place["volume"] - start]["image"])
                    place["patches"] = patches_of_mask(mask, self.network.encoder.patch_size)

        metrics: dict[str, Any] = {
            name: {"simcrop": float(own / number), "baseline": float(control / number)}
            for name, (own, control, number) in sums.items()
            if number
        }
        if similar:
            scores, patches, spread = (torch.cat(part, -1) for part in zip(*similar, strict=True))
            # near 1: all patches are alike, which monai's EmbeddingCollapseMetric, that centres them, cannot see
            metrics["patch_patch_cosine"] = spread.mean().item()
            metrics["presence_auc"] = self._presence(scores, torch.cat(random, -1), baseline, np.stack(histograms))
            # a finding outside of the cropped volume, or too small for its grid, cannot be hit
            seen = [i for i, place in enumerate(places) if place["patches"].any()]
            if seen:
                places = [places[i] for i in seen]
                metrics["grounding"] = grounding(places, patches[len(prompts) :][seen])
        return metrics, places

    def _baseline(self) -> dict[str, Any]:
        """What can be said of a volume and a report without looking at them, learned from training items."""
        total, tokens, histograms, labels = 0.0, Counter(), [], []
        special = set(self.tokenizer.all_special_ids)
        subset = Subset(self.train_dataset, range(min(self.num_baseline, len(self.train_dataset))))
        for items in self._batches(subset, "training volumes, for the baselines"):
            for item in items:
                patches = patchify(item["image"].as_tensor()[None], self.network.encoder.patch_size)
                total = total + self.loss.volume.target(patches)[0]
                tokens.update(token for token in item["report_ids"].tolist() if token not in special)
                histograms.append(hu_histogram(item["image"]))
                labels += [item["label"]] if "label" in item else []
        return {
            "patches": (total / len(subset)).to(self.device),
            "token": tokens.most_common(1)[0][0] if tokens else -1,
            "histograms": np.stack(histograms),
            "labels": np.stack(labels) if len(labels) == len(subset) else None,
        }

    def _add_masked(self, sums: dict[str, np.ndarray], images: Tensor, batch: Mapping, baseline: Mapping) -> None:
        output = self.network(images, **{k: v.to(self.device) for k, v in batch.items() if k != "image"})
        if "volume_pred" in output:
            target = self.loss.volume.target(output["volume_target"])
            guesses = output["volume_pred"].float(), baseline["patches"][output["masked"]]
            errors = [(guess - target).square().sum().item() for guess in guesses]
            sums["masked_voxel_mse"] += [*errors, target.numel()]
        if "report_logits" in output:
            target = output["report_target"]
            answers = output["report_logits"].argmax(-1), baseline["token"]
            right = [(answer == target).sum().item() for answer in answers]
            sums["masked_token_accuracy"] += [*right, len(target)]

    def _encode(self, sentences: Sequence[str], embedder: VolumeEmbedder) -> Tensor:
        return encode_sentences(sentences, embedder.aligner, self.network.text_encoder, self.tokenizer)

    def _similarities(self, embedder: VolumeEmbedder, images: Tensor, features: Tensor) -> tuple[Tensor, ...]:
        """Of every sentence (features ``[S, D]``) in every volume of a batch: score ``[S, B]`` and most similar patch
        ``[S, B]``; and each volume's mean patch-patch cosine ``[B]``."""
        patches = embedder.patches_and_embedding(images)[0].float()
        most_similar = torch.stack([similarity(volume, features).argmax(-1) for volume in patches], -1)
        spread = F.normalize(patches, dim=-1).mean(1).square().sum(-1)
        return self.loss.alignment.scores(patches, features).cpu(), most_similar.cpu(), spread.cpu()

    def _presence(self, scores: Tensor, random_scores: Tensor, baseline: Mapping, histograms: np.ndarray) -> dict:
        if any("label" not in item for item in self.dataset.data):
            return {}
        labels = np.stack([item["label"] for item in self.dataset.data])
        absent = [name for name, truth in zip(self.sentences, labels.T, strict=True) if np.isnan(truth).any()]
        if absent:
            logger.warning("no presence AUC of %s: the labels have no such column", ", ".join(absent))
        presence = {}
        for i, (name, truth) in enumerate(zip(self.sentences, labels.T, strict=True)):
            if set(truth) == {0, 1}:  # a class that all volumes have, or none, has no AUC
                presence[name] = {
                    "simcrop": roc_auc_score(truth, scores[i]),
                    "random_encoder": roc_auc_score(truth, random_scores[i]),
                    "hu_histogram": histogram_auc(baseline, i, histograms, truth),
                    "positive": int(truth.sum()),
                }
        return presence

    def _places(self) -> list[dict[str, Any]]:
        """Finding sentences whose place is known: number of the volume, finding, sentence, and the mask's file."""
        return [
            {"volume": v, "finding": finding, "sentence": sentence, "file": file}
            for v, item in enumerate(self.dataset.data)
            if "masks" in item
            for finding, sentence in {**self.sentences, **item.get("sentences", {})}.items()
            if (file := Path(item["masks"], mask_file_name(finding))).is_file()
        ]

    @staticmethod
    def _mask(place: Mapping[str, Any], image: Tensor) -> Tensor:
        """A place's mask on the grid of the preprocessed image, ``[1, X, Y, Z]``."""
        mask = LoadImage(image_only=True, ensure_channel_first=True)(place["file"])
        return ResampleToMatch(mode="nearest", padding_mode="zeros")(mask, image).as_tensor()

    def _figures(self, places: Sequence[Mapping[str, Any]], folder: Path) -> None:
        if self.log_dir is not None:
            figures.loss_curves(self.log_dir, folder / "losses.png")
        if self.network.volume_decoder is not None:
            self._reconstructions(min(3, len(self.dataset))).savefig(folder / "reconstructions.png", dpi=120)
        if places:
            # the first of each finding, not the best
            first = {place["finding"]: place for place in reversed(places)}
            self._sentence_maps(list(first.values())).savefig(folder / "sentences.png", dpi=120)

    def _reconstructions(self, number: int) -> Figure:
        """Original, masked and reconstructed middle slice of the first volumes, one row a volume."""
        figure = Figure(figsize=(7.5, 2.6 * number), layout="constrained")
        encoder = self.network.encoder
        for i, row in enumerate(figure.subplots(number, 3, squeeze=False)):
            image = self.dataset[i]["image"]
            volume = image.as_tensor()[None].to(self.device)
            keep, masked = self.network.draw_masks(volume)
            tokens, _ = encoder(volume, keep)
            patches = patchify(volume, encoder.patch_size)
            target = patches[0, masked[0]]
            pred = self.network.volume_decoder(tokens, keep, masked)[0].float()
            if self.loss.volume.norm_target:  # the network gives shape only: take mean and contrast from the truth
                pred = pred * target.std(-1, keepdim=True) + target.mean(-1, keepdim=True)
            hidden, restored = patches.clone(), patches.clone()
            hidden[0, masked[0]] = -1.0
            restored[0, masked[0]] = pred
            stages = {"original": patches, "masked": hidden, "reconstructed": restored}
            for axes, (title, stage) in zip(row, stages.items(), strict=True):
                stage = unpatchify(stage, encoder.grid, encoder.patch_size)[0, 0].cpu()
                show_plane(axes, stage, 2, stage.shape[2] // 2, spacing_of(image), **CT)
                axes.set_title(title, fontsize=10)
        return figure

    def _sentence_maps(self, places: Sequence[Mapping[str, Any]]) -> Figure:
        """Similarity map of finding sentences over CT, beside the finding's true mask; one row a place."""
        embedder = VolumeEmbedder(self.network.encoder, self.network.aligner)
        figure = Figure(figsize=(8.4, 3.1 * len(places)), layout="constrained")
        for row, place in zip(figure.subplots(len(places), 3, squeeze=False), places, strict=True):
            image = self.dataset[place["volume"]]["image"]
            mask = self._mask(place, image)[0] > 0
            features = embedder.patches_and_embedding(image.as_tensor()[None].to(self.device))[0][0]
            heat = similarity(features, self._encode([place["sentence"]], embedder))
            heat = upsample_patches(heat, self.network.encoder.grid, image.shape[1:])[0].cpu()
            at_mask, at_peak = mask.sum((0, 1)).argmax().item(), heat.amax((0, 1)).argmax().item()
            panels = {
                "CT, true mask outlined": at_mask,
                "similarity, same slice": at_mask,
                "slice of its peak": at_peak,
            }
            for axes, (text, z) in zip(row, panels.items(), strict=True):
                show_plane(axes, image[0], 2, z, spacing_of(image), **CT)
                if axes is not row[0]:
                    show_plane(axes, heat, 2, z, spacing_of(image), vmin=heat.min(), vmax=heat.max(), **HEAT)
                outline_plane(axes, mask, 2, z)
                axes.text(0.5, -0.02, text, transform=axes.transAxes, ha="center", va="top", fontsize=9)
            row[0].set_title(f"“{place['sentence']}”", fontsize=10, loc="left")
        return figure


def grounding(places: Sequence[Mapping[str, Any]], most_similar: Tensor) -> dict[str, Any]:
    """Grounding hits and their controls.

    Args:
        places: per sentence i, ``volume`` it belongs to, ``finding``, and ``patches [N]`` bool that the mask overlaps.
        most_similar: ``[S, V]`` int64, the patch most similar to sentence i in volume v.

    Returns:
        ``hit``, ``hit_shuffled`` (mean over all other volumes), ``chance`` and ``no_image_prior`` (leave-one-out),
        over all sentences, and the same per finding under ``per_finding``.
    """
    rows: dict[str, list[dict[str, float]]] = defaultdict(list)
    for place, patches in zip(places, most_similar, strict=True):
        overlap, own = place["patches"], place["volume"]
        hits = overlap[patches].float()  # v
        peers = [p["patches"] for p in places if p["finding"] == place["finding"] and p["volume"] != own]
        prior = torch.stack(peers).float().mean(0).argmax() if peers else 0
        rows[place["finding"]].append(
            {
                "hit": hits[own].item(),
                "hit_shuffled": ((hits.sum() - hits[own]) / (len(hits) - 1)).item() if len(hits) > 1 else float("nan"),
                "chance": overlap.float().mean().item(),
                "no_image_prior": overlap[prior].float().item(),
            }
        )

    def mean(entries: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        return {k: float(np.mean([e[k] for e in entries])) for k in entries[0]} | {"sentences": len(entries)}

    everything = [entry for entries in rows.values() for entry in entries]
    return mean(everything) | {"per_finding": {finding: mean(entries) for finding, entries in rows.items()}}


def table_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The metrics as rows of text: metric, of what, value, and the controls beside it."""

    def beside(entry: Mapping[str, Any], value: str) -> str:
        shown = {k: v for k, v in entry.items() if k != value and not isinstance(v, Mapping)}
        return ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())

    rows = []
    for name in ("masked_voxel_mse", "masked_token_accuracy"):
        if name in metrics:
            entry = metrics[name]
            rows.append((name, "all", f"{entry['simcrop']:.4f}", f"baseline {entry['baseline']:.4f}"))
    presence = dict(metrics.get("presence_auc", {}))
    if presence:
        presence["mean"] = {
            key: float(np.mean([entry[key] for entry in presence.values() if entry[key] is not None] or [np.nan]))
            for key in ("simcrop", "random_encoder", "hu_histogram")
        }
    for finding, entry in presence.items():
        rows.append(("presence_auc", finding, f"{entry['simcrop']:.3f}", beside(entry, "simcrop")))
    if "grounding" in metrics:
        for finding, entry in (metrics["grounding"]["per_finding"] | {"all": metrics["grounding"]}).items():
            rows.append(("grounding_hit", finding, f"{entry['hit']:.3f}", beside(entry, "hit")))
    return rows
