"""What a pre-trained SimCroP knows of held-out volumes, each figure beside its control."""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from custom_components.data.lists import mask_file_name
from custom_components.data.read import as_metatensor
from custom_components.data.volume import read_volume
from custom_components.errors import InputError, none_read, tell_left_out
from custom_components.evaluation import figures
from custom_components.evaluation.cells import aligned_patches
from custom_components.evaluation.controls import (
    hu_histogram,
    mean_and_maximum,
    patch_statistics,
    regression_auc,
    untrained,
)
from custom_components.evaluation.figures import spacing_of
from custom_components.evaluation.places import OPPOSITES, Similarities, grounding, patches_of_mask, specificity
from custom_components.evaluation.report import write_report
from custom_components.evaluation.retrieval import MAX_COSINES, draw_pools, retrieval
from custom_components.losses import SimCroPLoss
from custom_components.run.inferers import ReadableLoader
from custom_components.simcrop import SimCroP, VolumeEmbedder, similarity
from custom_components.text import ReportCollate, encode_sentences, read_prompts, split_sentences
from custom_components.vit import patchify, unpatchify, upsample_patches
from matplotlib.figure import Figure
from monai.data import Dataset, decollate_batch
from monai.networks import eval_mode
from monai.transforms import ResampleToMatch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PICTURE = "what each sentence said, where the network looked, and what was there: sentences.png"


@dataclass
class PretrainEvaluation:
    """Masked modelling, presence, grounding, retrieval on held-out volumes, as far as the data set has what they take.

    - ``masked_voxel_mse``: against the mean of the training volumes at the same place. A scale space reaches into
      masked patches: ``simcrop_blanked`` is the error where that mean replaces them before the encoder sees the volume.
    - ``masked_token_accuracy``: against always answering the training reports' most frequent token.
    - ``presence_auc``: AUROC over volumes of each finding by the mean sentence-volume score of its prompts, on unmasked
      volumes; beside untrained encoder and projections, and logistic regressions, with labels, on the volume's HU
      histogram and on the statistics of its patches (``raw_statistics``).
    - ``grounding``: share of finding sentences whose most similar patch overlaps the finding's mask (``hit``); beside
      the same sentences on all other volumes (``hit_shuffled``), a patch drawn at random (``chance``), and the patch
      that the other volumes' masks of that finding cover most often (``no_image_prior``). Only ``hit`` above
      ``hit_shuffled`` speaks of the image.
    - ``side_specificity``, ``level_specificity``: see :func:`custom_components.evaluation.places.specificity`.
    - ``retrieval`` of a report's volume: see :func:`custom_components.evaluation.retrieval.retrieval`.
    - Collapse: mean cosine of a volume's patches and of distinct sentences, near 1 where all are alike; and effective
      rank of the patches, exp of the entropy of their normalised singular values (RankMe, Garrido et al. 2023).

    A volume or a mask that cannot be read is passed over, and told at the end.

    Args:
        loss: of pre-training; its targets and its pooling of patches count.
        train_dataset: items for the baselines, without augmentation; the first ``num_baseline`` are used.
        dataset: held-out items with ``image``, the tokens of :class:`custom_components.text.TokenizeReportd`, and,
            where the data set has them, ``label`` (of the classes that ``sentences`` names, in their order), ``masks``
            and ``sentences`` of :func:`custom_components.data.lists.volumes`.
        sentences: class name -> its prompts, see :func:`custom_components.text.read_prompts`; the positive ones count.
        num_baseline: training items that the baselines learn from.
        log_dir: TensorBoard folder whose curves are drawn, or None.
        timeout_minutes: see :class:`custom_components.run.seeded.WatchedDataLoader`.
    """

    network: SimCroP
    loss: SimCroPLoss
    tokenizer: PreTrainedTokenizerBase
    train_dataset: Dataset
    dataset: Dataset
    sentences: Mapping[str, Any]
    output_dir: str | Path
    batch_size: int = 8
    num_workers: int = 0
    text_mask_ratio: float = 0.75
    seed: int = 42
    num_baseline: int = 1024
    log_dir: str | None = None
    timeout_minutes: float | None = None

    def __post_init__(self) -> None:
        self.prompts = {name: said.positive for name, said in read_prompts(self.sentences).items()}

    @torch.inference_mode()
    def __call__(self) -> dict[str, Any]:
        """Evaluate, print the table, write it and the figures; returns what ``metrics.json`` holds.

        Raises:
            InputError: no volume could be read; or some could not, or their masks, once all else is done.
        """
        self.device = next(self.network.encoder.parameters()).device
        torch.manual_seed(self.seed)
        with eval_mode(self.network):
            metrics, places = self._metrics()
            left_out = {"unreadable": list(dict(self.failures)), "unreadable_masks": self.unreadable_masks}
            metrics = {"seed": self.seed, "volumes": len(self.read), **left_out, **metrics}
            rows = table_rows(metrics)
            table = [("metric", "of", "SimCroP", "baselines"), *rows]
            write_report(
                self.output_dir,
                metrics,
                [("metric", "of", "value", "beside"), *rows],
                table,
                [PICTURE] if places else [],
            )
            self._figures(places, Path(self.output_dir))
        tell_left_out(self.failures)
        return metrics

    def _loader(self, dataset: Dataset, description: str) -> ReadableLoader:
        return ReadableLoader(dataset, self.num_workers, description, self.timeout_minutes)

    def _batches(self, loader: ReadableLoader) -> Iterator[list[dict[str, Any]]]:
        """Lists of ``batch_size`` items that can be read."""
        items = self._items(loader)
        while batch := list(islice(items, self.batch_size)):
            yield batch

    @staticmethod
    def _items(loader: ReadableLoader) -> Iterator[dict[str, Any]]:
        # the number that one loader of all batches took for its workers: masks are drawn as they were with it
        torch.empty((), dtype=torch.int64).random_()
        items = iter(loader)
        while True:
            with torch.random.fork_rng(devices=()):  # MONAI's loaders would start torch's generator anew
                batch = next(items, None)
            if batch is None:
                return
            yield decollate_batch(batch)[0]

    def _metrics(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The metrics, and the places of finding sentences that they speak of."""
        self.failures: list[tuple[str, str]] = []
        baseline = self._baseline()
        aligned = self.network.aligner is not None
        places, embedders, features = [], [], []
        if aligned:
            places, reports = self._places(), [split_sentences(item["findings"]) for item in self.dataset.data]
            pools = draw_pools(reports, self.seed)
            said = [sentence for prompts in self.prompts.values() for sentence in prompts]
            said += [place["sentence"] for place in places]
            said += [sentence for pool in pools for volume in pool for sentence in reports[volume]]
            number = len(set(said))
            said += [sentence for place in places for _, sentence in place["swapped"].values()]
            rows = {sentence: row for row, sentence in enumerate(dict.fromkeys(said))}
            trained = VolumeEmbedder(self.network.encoder, self.network.aligner)
            embedders = [trained, untrained(trained)]
            features = [self._encode(list(rows), embedder) for embedder in embedders]

        collate = ReportCollate(self.tokenizer, self.text_mask_ratio)
        # figure -> sums of each kind of guess, and how many values they are of
        sums: dict[str, Counter] = defaultdict(Counter)
        similar: list[list[Similarities]] = [[] for _ in embedders]
        histograms, statistics, spread, gram = [], [], [], 0.0
        numbers = {item["name"]: number for number, item in enumerate(self.dataset.data)}
        self.read: list[int] = []  # numbers of the volumes that could be
        loader, masks = self._loader(self.dataset, "held-out volumes"), []
        for items in self._batches(loader):
            own = {numbers[item["name"]]: item["image"] for item in items}
            self.read += own
            images = torch.stack([item["image"].as_tensor() for item in items]).to(self.device)
            self._add_masked(sums, images, collate(items), baseline)
            histograms += [hu_histogram(item["image"]) for item in items]
            statistics.append(mean_and_maximum(baseline["describe"], images).cpu().numpy())
            for embedder, sentences, found in zip(embedders, features, similar, strict=True):
                patches = aligned_patches(embedder, images)
                found.append(self._similarities(patches, sentences))
                if embedder is embedders[0]:
                    spread.append(patches.mean(1).square().sum(-1).cpu())
                    gram = gram + (patches.transpose(1, 2) @ patches).double().sum(0)
            for place in places:
                if place["volume"] in own:
                    try:
                        mask = self._mask(place, own[place["volume"]])
                    except InputError as error:
                        name = self.dataset.data[place["volume"]]["name"]
                        loader.pass_over(name, str(error))
                        masks.append(f"{name}: {place['finding']}")
                        continue
                    place["patches"] = patches_of_mask(mask, self.network.encoder.patch_size)
                    place["half"] = {name: opposites.half(mask) for name, opposites in OPPOSITES.items()}
        self.failures += loader.failures
        if not self.read:
            raise none_read(len(self.dataset), loader.failures)
        self.unreadable_masks = masks
        if aligned:
            column = {number: i for i, number in enumerate(self.read)}
            places = [place | {"volume": column[place["volume"]]} for place in places if "patches" in place]
            reports, pools = [reports[number] for number in self.read], of_read(pools, column)

        metrics: dict[str, Any] = {}
        for name, found in sums.items():
            if total := found.pop("values"):
                metrics[name] = {guess: float(value / total) for guess, value in found.items()}
        if aligned:
            own, random = (Similarities(*(torch.cat(p, 1) for p in zip(*found, strict=True))) for found in similar)
            # near 1: all are alike, which monai's EmbeddingCollapseMetric, that centres them, cannot see
            metrics["patch_patch_cosine"] = torch.cat(spread).mean().item()
            if number > 1:
                total = F.normalize(features[0][:number], dim=-1).sum(0).square().sum()
                metrics["sentence_sentence_cosine"] = ((total - number) / (number * (number - 1))).item()
            values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
            metrics["patch_effective_rank"] = torch.special.entr(values / values.sum()).sum().exp().item()
            told = {"hu_histogram": np.stack(histograms), "raw_statistics": np.concatenate(statistics)}
            metrics["presence_auc"] = self._presence(own.scores, random.scores, rows, baseline, told)
            for place in places:
                scores = own.scores[rows[place["sentence"]]]
                place["score"] = scores[place["volume"]].item()
                place["score_elsewhere"] = (scores.sum().item() - place["score"]) / max(1, len(scores) - 1)
            # a finding outside of the cropped volume, or too small for its grid, cannot be hit
            places = [place for place in places if place["patches"].any()]
            if places:
                metrics["grounding"] = grounding(places, own.most_similar[[rows[p["sentence"]] for p in places]])
            for name, opposites in OPPOSITES.items():
                if cases := _cases(places, name, rows):
                    grid = self.network.encoder.grid
                    metrics[f"{name}_specificity"] = specificity(cases, own, random, opposites, grid, self.seed)
            if pools:
                of_reports = {v: [rows[sentence] for sentence in reports[v]] for pool in pools for v in pool}
                metrics["retrieval"] = retrieval(pools, of_reports, own.scores, random.scores)
        return metrics, places

    def _baseline(self) -> dict[str, Any]:
        """What can be said of a volume and a report without the network, learned from training items."""
        encoder = self.network.encoder
        dataset = Dataset(self.train_dataset.data[: self.num_baseline], self.train_dataset.transform)
        known = {item["name"]: item.get("label") for item in dataset.data}
        describe, voxels, target = None, 0.0, 0.0
        tokens, histograms, statistics, labels = Counter(), [], [], []
        special = set(self.tokenizer.all_special_ids)
        loader = self._loader(dataset, "training volumes, for the baselines")
        for items in self._batches(loader):
            describe = describe or patch_statistics(encoder, spacing_of(items[0]["image"])).to(self.device)
            images = torch.stack([item["image"].as_tensor() for item in items]).to(self.device)
            patches = patchify(images, encoder.patch_size)
            voxels, target = voxels + patches.sum(0), target + self.loss.volume.target(patches).sum(0)
            statistics.append(mean_and_maximum(describe, images).cpu().numpy())
            for item in items:
                tokens.update(token for token in item["report_ids"].tolist() if token not in special)
                histograms.append(hu_histogram(item["image"]))
                labels.append(known[item["name"]])
        self.failures += loader.failures
        if not labels:
            raise none_read(len(dataset), loader.failures)
        return {
            "voxels": voxels / len(labels),
            "target": target / len(labels),
            "token": tokens.most_common(1)[0][0] if tokens else -1,
            "describe": describe,
            "hu_histogram": np.stack(histograms),
            "raw_statistics": np.concatenate(statistics),
            "labels": None if any(label is None for label in labels) else np.stack(labels),
        }

    def _add_masked(self, sums: dict[str, Counter], images: Tensor, batch: Mapping, baseline: Mapping) -> None:
        output = self.network(images, **{k: v.to(self.device) for k, v in batch.items() if k != "image"})
        if "volume_pred" in output:
            target, masked = self.loss.volume.target(output["volume_target"]), output["masked"]
            guesses = {"simcrop": output["volume_pred"], "baseline": baseline["target"][masked]}
            statistics = self.network.encoder.statistics
            if statistics is not None and statistics.statistics.scale_space is not None:
                guesses["simcrop_blanked"] = predict_blanked(self.network, images, masked, baseline["voxels"])
            errors = {name: (guess.float() - target).square().sum().item() for name, guess in guesses.items()}
            sums["masked_voxel_mse"].update(errors | {"values": target.numel()})
        if "report_logits" in output:
            target = output["report_target"]
            answers = {"simcrop": output["report_logits"].argmax(-1), "baseline": baseline["token"]}
            right = {name: (answer == target).sum().item() for name, answer in answers.items()}
            sums["masked_token_accuracy"].update(right | {"values": len(target)})

    def _encode(self, sentences: Sequence[str], embedder: VolumeEmbedder) -> Tensor:
        return encode_sentences(sentences, embedder.aligner, self.network.text_encoder, self.tokenizer)

    def _similarities(self, patches: Tensor, sentences: Tensor) -> Similarities:
        """Of features ``[S, D]`` of sentences and normalised ones ``[B, N, D]`` of patches, on the CPU."""
        parts = []
        for some in F.normalize(sentences, dim=-1).split(max(1, MAX_COSINES // patches[..., 0].numel())):
            cosine = torch.einsum("sd,vnd->svn", some, patches)
            parts.append((self.loss.alignment.score.pool(cosine).cpu(), cosine.argmax(-1).cpu()))
        return Similarities(*map(torch.cat, zip(*parts, strict=True)))

    def _presence(
        self,
        scores: Tensor,
        random_scores: Tensor,
        rows: Mapping[str, int],
        baseline: Mapping[str, Any],
        told: Mapping[str, np.ndarray],
    ) -> dict[str, Any]:
        """AUROC per class: of scores ``[S, V]`` of sentences, whose ``rows`` are given, and of regressions on what
        controls are ``told`` of each volume, ``[V, F]``."""
        items = [self.dataset.data[number] for number in self.read]
        if any("label" not in item for item in items):
            return {}
        labels = np.stack([item["label"] for item in items])
        absent = [name for name, truth in zip(self.prompts, labels.T, strict=True) if np.isnan(truth).any()]
        if absent:
            logger.warning("no presence AUC of %s: the labels have no such column", ", ".join(absent))
        presence = {}
        for i, ((name, sentences), truth) in enumerate(zip(self.prompts.items(), labels.T, strict=True)):
            if set(truth) == {0, 1}:  # a class that all volumes have, or none, has no AUC
                own = [rows[sentence] for sentence in sentences]
                learned = None if baseline["labels"] is None else baseline["labels"][:, i]
                presence[name] = {
                    "simcrop": roc_auc_score(truth, scores[own].mean(0)),
                    "random_encoder": roc_auc_score(truth, random_scores[own].mean(0)),
                    **{c: regression_auc(baseline[c], learned, features, truth) for c, features in told.items()},
                    "positive": int(truth.sum()),
                }
        return presence

    def _places(self) -> list[dict[str, Any]]:
        """Finding sentences whose place is known: number of the volume, finding, sentence, the mask's file, and, of the
        volume's own sentences, the half named and the sentence ``swapped`` to the other, by kind of half."""
        first = {finding: sentences[0] for finding, sentences in self.prompts.items()}
        places = []
        for v, item in enumerate(self.dataset.data):
            own = item.get("sentences", {})
            for finding, sentence in {**first, **own}.items() if "masks" in item else ():
                if (file := Path(item["masks"], mask_file_name(finding))).is_file():
                    swapped = {name: opposites.swap(sentence) for name, opposites in OPPOSITES.items()}
                    swapped = {name: found for name, found in swapped.items() if found and finding in own}
                    places.append(
                        {"volume": v, "finding": finding, "sentence": sentence, "file": file, "swapped": swapped}
                    )
        return places

    @staticmethod
    def _mask(place: Mapping[str, Any], image: Tensor) -> Tensor:
        """A place's mask on the grid of the preprocessed image, ``[1, X, Y, Z]``."""
        mask = as_metatensor(place["file"], read_volume(place["file"]))
        return ResampleToMatch(mode="nearest", padding_mode="zeros")(mask, image).as_tensor()

    def _figures(self, places: Sequence[Mapping[str, Any]], folder: Path) -> None:
        if self.log_dir is not None:
            figures.save(folder / "losses.png", figures.loss_curves, self.log_dir)
        if self.network.volume_decoder is not None:
            figures.save(folder / "reconstructions.png", self._reconstructions, self.read[:3])
        if places:
            # the first of each finding, not the best
            first = {place["finding"]: place for place in reversed(places)}
            figures.save(folder / "sentences.png", self._sentence_maps, list(first.values()))

    def _reconstructions(self, numbers: Sequence[int]) -> Figure:
        """The middle slice of some volumes, what was hidden of it, and what the network restored there."""
        encoder, rows = self.network.encoder, []
        for i in numbers:
            image = self.dataset[i]["image"]
            volume = image.as_tensor()[None].to(self.device)
            keep, masked = self.network.draw_masks(volume)
            tokens, _ = encoder(volume, keep)
            patches = patchify(volume, encoder.patch_size)
            target = patches[0, masked[0]]
            pred = self.network.volume_decoder(tokens, keep, masked)[0].float()
            if self.loss.volume.norm_target:  # the network gives shape only: take mean and contrast from the truth
                pred = pred * target.std(-1, keepdim=True) + target.mean(-1, keepdim=True)
            hidden, restored = torch.zeros_like(patches), patches.clone()
            hidden[0, masked[0]] = 1.0
            restored[0, masked[0]] = pred
            hidden, restored = (
                unpatchify(part, encoder.grid, encoder.patch_size)[0, 0].cpu() for part in (hidden, restored)
            )
            row = {"name": self.dataset.data[i]["name"], "image": image.cpu()}
            rows.append(row | {"hidden": hidden > 0, "restored": restored})
        return figures.reconstructions(rows)

    def _sentence_maps(self, places: Sequence[Mapping[str, Any]]) -> Figure:
        """Maps of finding sentences beside the finding's true mask, with what the figures above make of them."""
        embedder, rows = VolumeEmbedder(self.network.encoder, self.network.aligner), []
        for place in places:
            image = self.dataset[self.read[place["volume"]]]["image"]
            features = embedder.patches_and_embedding(image.as_tensor()[None].to(self.device))[0][0]
            heat = similarity(features, self._encode([place["sentence"]], embedder))
            heat = upsample_patches(heat, self.network.encoder.grid, image.shape[1:])[0].cpu()
            told = f"\u201c{place['sentence']}\u201d\nscore {place['score']:.2f}"
            told += f"; in other volumes {place['score_elsewhere']:.2f} on average" if len(self.read) > 1 else ""
            mask = self._mask(place, image)[0] > 0
            rows.append({"told": told, "image": image.cpu(), "heat": heat, "mask": mask.cpu()})
        return figures.told_looked_there(rows)


def of_read(pools: Sequence[Sequence[int]], column: Mapping[int, int]) -> list[list[int]]:
    """The columns of each pool's volumes that have one, equally many of each; no pool of less than two."""
    pools = [[column[volume] for volume in pool if volume in column] for pool in pools]
    size = min(map(len, pools), default=0)
    return [pool[:size] for pool in pools if size > 1]


def _cases(places: Sequence[Mapping[str, Any]], kind: str, rows: Mapping[str, int]) -> list[dict[str, Any]]:
    """The places for :func:`specificity`: those whose mask lies in the one half that the sentence names."""
    cases = []
    for place in places:
        half, sentence = place["swapped"].get(kind, (None, None))
        if half is not None and half == place["half"][kind]:
            own, swapped = rows[place["sentence"]], rows[sentence]
            cases.append({**place, "half": half, "own": own, "swapped": swapped})
    return cases


def predict_blanked(network: SimCroP, volume: Tensor, masked: Tensor, fill: Tensor) -> Tensor:
    """Voxels ``[B, m, voxels]`` predicted at ``masked [B, m]`` by a network that sees ``fill [N, voxels]`` there.

    The encoder is never given masked patches, but a scale space, computed of the whole volume, reaches into them.
    """
    encoder = network.encoder
    hidden = torch.zeros(len(volume), encoder.num_patches, dtype=torch.bool, device=volume.device)
    hidden.scatter_(1, masked, True)
    patches = torch.where(hidden[..., None], fill, patchify(volume, encoder.patch_size))
    keep = (~hidden).nonzero()[:, 1].view(len(volume), -1)
    tokens, _ = encoder(unpatchify(patches, encoder.grid, encoder.patch_size), keep)
    return network.volume_decoder(tokens, keep, masked)


def table_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The metrics as rows of text: metric, of what, value, and the controls beside it."""

    def beside(entry: Mapping[str, Any], value: str) -> str:
        shown = {k: v for k, v in entry.items() if k != value and not isinstance(v, Mapping)}
        return ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())

    rows = []
    for name in ("masked_voxel_mse", "masked_token_accuracy"):
        if name in metrics:
            entry = metrics[name]
            controls = ", ".join(f"{k} {v:.4f}" for k, v in entry.items() if k != "simcrop")
            rows.append((name, "all", f"{entry['simcrop']:.4f}", controls))
    presence = dict(metrics.get("presence_auc", {}))
    if presence:
        presence["mean"] = {
            key: float(np.mean([entry[key] for entry in presence.values() if entry[key] is not None] or [np.nan]))
            for key in ("simcrop", "random_encoder", "hu_histogram", "raw_statistics")
        }
    for finding, entry in presence.items():
        rows.append(("presence_auc", finding, f"{entry['simcrop']:.3f}", beside(entry, "simcrop")))
    for metric, key in (("grounding", "hit"), ("side_specificity", "simcrop"), ("level_specificity", "simcrop")):
        if metric in metrics:
            name = "grounding_hit" if metric == "grounding" else metric
            for finding, entry in (metrics[metric]["per_finding"] | {"all": metrics[metric]}).items():
                rows.append((name, finding, f"{entry[key]:.3f}", beside(entry, key)))
    if "retrieval" in metrics:
        found = metrics["retrieval"]
        for name, value in found["simcrop"].items():
            if name.startswith("recall@") and int(name.partition("@")[2]) >= found["volumes"]:
                continue  # all of the pool
            controls = {control: found[control][name] for control in ("random_encoder", "chance")}
            rows.append(("retrieval", f"{name} of {found['volumes']}", f"{value:.3f}", beside(controls, "")))
    for name in ("patch_patch_cosine", "sentence_sentence_cosine", "patch_effective_rank"):
        if name in metrics:
            rows.append((name, "all", f"{metrics[name]:.3f}", ""))
    return rows
