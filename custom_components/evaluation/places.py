"""Whether a sentence finds its place: hits in a finding's mask, and left from right, upper from lower."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from custom_components.evaluation.metrics import entry, resample
from custom_components.vit import patchify
from torch import Tensor


class Similarities(NamedTuple):
    """Of S sentences in V volumes: pooled cosine ``[S, V]`` float32, and most similar patch ``[S, V]`` int64."""

    scores: Tensor
    most_similar: Tensor


def patches_of_mask(mask: Tensor, patch_size: Sequence[int]) -> Tensor:
    """``[1, X, Y, Z]`` mask -> ``[N]`` bool: which patches overlap it."""
    return patchify(mask[None].float(), tuple(patch_size))[0].amax(-1) > 0


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


class Opposites(NamedTuple):
    """Words for the two halves of a RAS volume along an axis, that of the lower indices first."""

    axis: int
    words: tuple[str, str]

    def swap(self, sentence: str) -> tuple[int, str] | None:
        """The half that a sentence names, 0 or 1, and the sentence of the other; None if it names none or both.

        The left anterior descending artery is no side.
        """
        pattern = re.compile(rf"\b({'|'.join(self.words)})\b(?! (?:anterior|coronary))", re.IGNORECASE)
        named = {word.lower() for word in pattern.findall(sentence)}
        if len(named) != 1:
            return None
        half = self.words.index(named.pop())
        other = self.words[1 - half]
        return half, pattern.sub(lambda found: other.capitalize() if found[0][0].isupper() else other, sentence)

    def half(self, mask: Tensor) -> int | None:
        """The half that holds 90 % or more of the voxels of a mask ``[1, X, Y, Z]``; None if neither does."""
        along = (mask[0] > 0).sum([axis for axis in range(3) if axis != self.axis]).float()
        size = len(along)
        shares = torch.stack([along[: size // 2].sum(), along[(size + 1) // 2 :].sum()]) / along.sum()
        return int(shares.argmax()) if shares.max() >= 0.9 else None

    def lies_in(self, patch: Tensor, half: Tensor, grid: Sequence[int]) -> Tensor:
        """1 where a patch's index ``[n]`` lies in the half ``[n]`` of the grid, 0.5 in the middle of it, else 0."""
        place = torch.stack(torch.unravel_index(patch, tuple(grid)))[self.axis]
        return 0.5 + 0.5 * (2 * place + 1 - grid[self.axis]).sign() * (2 * half - 1)


OPPOSITES = {"side": Opposites(0, ("left", "right")), "level": Opposites(2, ("lower", "upper"))}


def specificity(
    cases: Sequence[Mapping[str, Any]],
    trained: Similarities,
    random: Similarities,
    opposites: Opposites,
    grid: Sequence[int],
    seed: int,
) -> dict[str, Any]:
    """Whether a sentence knows which half of the volume its finding lies in.

    Args:
        cases: per sentence of a finding that lies in one ``half`` (0 or 1): ``volume``, ``finding``, and the rows
            ``own`` and ``swapped`` of that sentence and of the one that names the other half.
        trained, random: of the network and of an untrained one.

    Returns:
        ``simcrop`` with its bootstrap interval ``low``, ``high`` over volumes, and ``random_encoder``: share of
        sentences that score higher in their volume than the swapped ones, ties counting half; ``no_image_prior``:
        that share for always preferring the half where the finding lies most often; ``peak`` and ``random_peak``: share
        whose most similar patch lies in that half; ``sentences``; the same ``per_finding``.
    """
    own, swapped, volume, half = (
        torch.tensor([case[key] for case in cases]) for key in ("own", "swapped", "volume", "half")
    )

    def shares(found: Similarities) -> tuple[np.ndarray, np.ndarray]:
        above = (found.scores[own, volume] - found.scores[swapped, volume]).sign()
        peak = opposites.lies_in(found.most_similar[own, volume], half, grid)
        return (0.5 + 0.5 * above).double().numpy(), peak.double().numpy()

    (higher, peak), (random_higher, random_peak) = shares(trained), shares(random)
    findings = np.array([case["finding"] for case in cases])
    usual = {name: half.numpy()[findings == name].mean().round() for name in findings}
    prior = half.numpy() == [usual[name] for name in findings]

    def summary(chosen: np.ndarray) -> dict[str, Any]:
        weights = resample(volume.numpy()[chosen], 2000, seed)
        found = entry(higher[chosen].mean(), weights @ higher[chosen] / weights.sum(1))
        return {
            "simcrop": found["value"],
            "low": found["low"],
            "high": found["high"],
            "random_encoder": float(random_higher[chosen].mean()),
            "no_image_prior": float(prior[chosen].mean()),
            "peak": float(peak[chosen].mean()),
            "random_peak": float(random_peak[chosen].mean()),
            "sentences": int(chosen.sum()),
        }

    per_finding = {str(name): summary(findings == name) for name in dict.fromkeys(findings)}
    return summary(np.ones(len(cases), bool)) | {"per_finding": per_finding}
