"""The three losses of SimCroP, a fourth of ours, and their weighted sum. All are float32, outside autocast.

Under torchrun each is the mean over the batches of all processes, whatever each of them has.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from custom_components.distributed import gather_rows, mean_over_ranks, rank
from custom_components.errors import InputError
from torch import Tensor, nn
from torch.nn import functional as F

MASKED = -1e9  # not -inf: logsumexp over a fully masked row would send NaN back


def pool_patches(cosine: Tensor, align_pool: str, top_k: int, beta: float) -> Tensor:
    """A sentence's cosines ``[..., n]`` to the n patches of a volume -> one score ``[...]`` on the scale of a cosine.

    Args:
        align_pool: ``topk_mean`` (published): mean over the ``top_k`` most similar patches. ``lse``: log-mean-exp
            with sharpness ``beta`` over all patches, which lets every patch compete for the gradient.

    Raises:
        InputError: ``top_k`` exceeds the number of patches.
    """
    if align_pool == "lse":
        return (torch.logsumexp(beta * cosine, dim=-1) - math.log(cosine.shape[-1])) / beta
    return most_similar(cosine, top_k)[0].mean(-1)


def patch_weights(cosine: Tensor, align_pool: str, top_k: int, beta: float) -> Tensor:
    """The derivative of :func:`pool_patches`: weights ``[..., n]`` that sum to 1.

    The patch features' mean under them is the aligned visual feature.
    """
    if align_pool == "lse":
        return (beta * cosine).softmax(-1)
    return torch.zeros_like(cosine).scatter(-1, most_similar(cosine, top_k)[1], 1.0 / top_k)


def most_similar(cosine: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    if top_k > cosine.shape[-1]:
        raise InputError(
            f"top_k is {top_k}, but only {cosine.shape[-1]} patches of a volume are visible: "
            "lower top_k or mask_ratio, or take smaller patches (patch_size)"
        )
    return cosine.topk(top_k, dim=-1)


@dataclass(frozen=True)
class SentenceVolumeScore:
    """How well a sentence fits a volume: its cosines to the patches, pooled as the alignment was trained to.

    The one score of pre-training, evaluation, inference and Python, float32 outside autocast.

    Args:
        align_pool, top_k, beta: see :func:`pool_patches`; weights say theirs in ``models/model.json``.
        temperature: by which scores are divided before a softmax.

    Raises:
        InputError: ``align_pool`` is unknown.
    """

    align_pool: str = "topk_mean"
    top_k: int = 32
    beta: float = 10.0
    temperature: float = 0.07

    def __post_init__(self) -> None:
        if self.align_pool not in ("topk_mean", "lse"):
            raise InputError(f"align_pool {self.align_pool!r} is unknown: choose topk_mean or lse")

    def pool(self, cosine: Tensor) -> Tensor:
        """A sentence's cosines ``[..., n]`` to the n patches of a volume -> its score ``[...]``, as a cosine's."""
        return pool_patches(cosine, self.align_pool, self.top_k, self.beta)

    def weights(self, cosine: Tensor) -> Tensor:
        """What each of the cosines ``[..., n]`` counts in :meth:`pool`."""
        return patch_weights(cosine, self.align_pool, self.top_k, self.beta)

    def __call__(self, patches: Tensor, sentences: Tensor) -> Tensor:
        """Projected patches ``[V, n, D]`` of V volumes, and sentences ``[S, D]`` -> ``[S, V]``, of any lengths."""
        with torch.autocast(patches.device.type, enabled=False):
            patches = F.normalize(patches.float(), dim=-1)
            return self.pool(torch.einsum("sd,vnd->svn", F.normalize(sentences.float(), dim=-1), patches))


class MaskedVolumeLoss(nn.Module):
    """Mean squared error on the masked patches ("radiograph reconstruction loss" of the paper).

    ``norm_target`` normalises every target patch to mean 0 and variance 1 first, as MAE (He et al. 2022) has it.
    """

    def __init__(self, norm_target: bool = False) -> None:
        super().__init__()
        self.norm_target = norm_target

    def target(self, patches: Tensor) -> Tensor:
        """What the decoder is to predict for true patches ``[..., voxels]``, float32."""
        patches = patches.float()
        if self.norm_target:
            variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
            patches = (patches - mean) / (variance + 1e-6).sqrt()
        return patches

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """``[B, m, voxels]`` each: the masked patches of each volume as predicted and as they are."""
        return mean_over_ranks(F.mse_loss(pred.float(), self.target(target)), target.numel())


class SimilarityAlignmentLoss(nn.Module):
    """InfoNCE between sentences and the patches most similar to them (similarity-driven alignment of the paper).

    Args:
        temperature: of the softmax over negatives.
        negatives: ``report`` (published): the other sentences of the same report, both directions summed. ``volume``:
            the sentence-volume score, with the other volumes of the batch (sentence to volume) and the other reports'
            sentences (volume to sentence) as negatives, both directions averaged; a volume whose own report holds the
            identical sentence, or no sentence, is left out. The batch is that of all processes together. ``both``: the
            mean of the two.
        top_k, align_pool, beta: which patches make a sentence's score and visual feature, see :func:`pool_patches`.

    Padded sentences enter neither rows nor columns. A report with fewer than two sentences adds nothing to ``report``;
    a batch with nothing to contrast gives a zero that still carries (zero) gradients, so that DDP stays in step.
    """

    def __init__(
        self,
        top_k: int = 32,
        temperature: float = 0.07,
        negatives: str = "report",
        align_pool: str = "topk_mean",
        beta: float = 10.0,
    ) -> None:
        super().__init__()
        if negatives not in ("report", "volume", "both"):
            raise InputError(f"negatives {negatives!r} is unknown: choose report, volume or both")
        self.negatives = negatives
        self.score = SentenceVolumeScore(align_pool, top_k, beta, temperature)

    def forward(self, patch_features: Tensor, sentence_features: Tensor, sentence_hash: Tensor) -> Tensor:
        """Of projected visible patches ``[B, n, D]`` and projected sentences ``[B, S, D]``.

        ``sentence_hash [B, S]`` is int64: equal numbers are identical sentences, 0 is padding. Across volumes, patches
        may be those of the first volumes alone: the sentences of the others are then negatives of these volumes.
        """
        with torch.autocast(patch_features.device.type, enabled=False):
            patches, sentences = patch_features.float(), sentence_features.float()
            terms = []
            if self.negatives in ("report", "both"):
                terms.append(self._within_report(patches, sentences, sentence_hash))
            if self.negatives in ("volume", "both"):
                terms.append(self._across_volumes(patches, sentences, sentence_hash))
            return torch.stack(terms).mean()

    def _within_report(self, patches: Tensor, sentences: Tensor, sentence_hash: Tensor) -> Tensor:
        real = sentence_hash != 0
        rows = real & (real.sum(1, keepdim=True) > 1)
        if not rows.any():
            return mean_over_ranks((patches.sum() + sentences.sum()) * 0.0, 0)
        queries = F.normalize(sentences, dim=-1)
        cosine = queries @ F.normalize(patches, dim=-1).transpose(1, 2)  # b s n
        weights = self.score.weights(cosine)
        aligned = F.normalize(weights @ patches, dim=-1)  # b s d
        logits = queries @ aligned.transpose(1, 2) / self.score.temperature  # b sentence aligned
        target = torch.arange(real.shape[1], device=real.device).expand_as(real)[rows]
        directions = (logits, logits.transpose(1, 2))
        columns = ~real[:, None, :]
        loss = sum(F.cross_entropy(d.masked_fill(columns, MASKED)[rows], target) for d in directions)
        return mean_over_ranks(loss, rows.sum())

    def _across_volumes(self, patches: Tensor, sentences: Tensor, sentence_hash: Tensor) -> Tensor:
        real = sentence_hash != 0
        row = real.nonzero()[:, 0]
        every_sentence = gather_rows(sentences[real])
        every_hash = torch.cat(gather_rows(sentence_hash[real]))
        # a process scores all sentences in its own volumes, so that scores travel and not patches
        scores = self.score(patches, torch.cat(every_sentence)).T  # v s
        every_score = gather_rows(scores)
        first = sum(len(score) for score in every_score[: rank()])
        # the volume of each sentence, -1 for none
        own = torch.cat(gather_rows(torch.where(row < len(patches), first + row, -1)))
        placed = own >= 0
        if not placed.any():
            return (patches.sum() + sentences.sum()) * 0.0
        logits = torch.cat(every_score).T / self.score.temperature  # s v
        is_own = own[:, None] == torch.arange(logits.shape[1], device=own.device)
        # no negative of a sentence: a volume whose report holds the very sentence, or holds none at all
        identical = (every_hash[:, None] == every_hash).float() @ is_own.float() > 0  # s v
        logits = logits.masked_fill((identical | ~is_own.any(0)) & ~is_own, MASKED)
        to_volume = F.cross_entropy(logits[placed], own[placed])
        # volume to sentence: each own sentence against the sentences of other reports, never against its siblings
        positive = logits[is_own]
        others = logits.masked_fill(is_own, MASKED).logsumexp(0)[own[placed]]
        to_sentence = F.softplus(others - positive).mean()
        return 0.5 * (to_volume + to_sentence)


class MaskedReportLoss(nn.Module):
    """Cross-entropy over the masked, non-padding tokens of the report (cross-granularity fusion of the paper)."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """``logits [M, vocabulary]`` and ``target [M]`` int64 at the M masked positions of the batch; M may be 0."""
        logits = logits.float()
        # the mean over no token is NaN; the sum over none is 0 and keeps the decoder in the graph, as DDP wants it
        return mean_over_ranks(F.cross_entropy(logits, target) if len(target) else logits.sum(), len(target))


READS = {  # of SimCroP's output, by each loss
    "volume": ("volume_pred", "volume_target"),
    "alignment": ("patch_features", "sentence_features", "sentence_hash"),
    "report": ("report_logits", "report_target"),
    "instance": ("instance_features", "sentence_features", "sentence_hash"),
}


class SimCroPLoss(nn.Module):
    """Sum of the losses under ``weights`` of the same names; a weight of 0, or none, skips that loss.

    ``instance`` is ours: a :class:`SimilarityAlignmentLoss` across volumes, each one patch, its mean token.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        volume: MaskedVolumeLoss,
        alignment: SimilarityAlignmentLoss,
        report: MaskedReportLoss,
        instance: SimilarityAlignmentLoss | None = None,
    ) -> None:
        super().__init__()
        if unknown := set(weights) - set(READS):
            raise InputError(f"loss_weights names {min(unknown)!r}, which is no loss: name some of {', '.join(READS)}")
        if not any(weights.values()):
            raise InputError("all loss_weights are 0: give at least one branch a weight")
        self.weights = dict.fromkeys(READS, 0.0) | dict(weights)
        self.volume = volume
        self.alignment = alignment
        self.report = report
        self.instance = instance

    def parts(self, pred: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each loss that has a weight, unweighted."""
        values = {}
        for name, keys in READS.items():
            if self.weights[name]:
                values[name] = getattr(self, name)(*(pred[key] for key in keys))
        return values

    def forward(self, pred: Mapping[str, Tensor], target: Tensor | None = None) -> Tensor:
        """``pred`` is the output of :class:`custom_components.simcrop.SimCroP`; ``target`` is not used."""
        return sum(self.weights[name] * value for name, value in self.parts(pred).items())
