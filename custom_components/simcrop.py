"""SimCroP's pre-training network: masked volume modelling, similarity-driven alignment, cross-granularity fusion."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from custom_components.distributed import gather_rows
from custom_components.errors import InputError
from custom_components.losses import SentenceVolumeScore
from custom_components.text import Prompts, encode_sentences, queries, read_prompts
from custom_components.vit import (
    Block,
    SimCroPEncoder,
    gather_tokens,
    init_weights,
    patchify,
    sincos3d_positions,
    upsample_patches,
)
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerBase


class ProjectionHead(nn.Sequential):
    """Linear, GELU, LayerNorm, Linear: into the space where sentences and patches are compared (ToniChopp/ASAP)."""

    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__(nn.Linear(in_size, out_size), nn.GELU(), nn.LayerNorm(out_size), nn.Linear(out_size, out_size))


class LinearProjection(nn.Sequential):
    """LayerNorm, Linear: so little that what tells a finding must be in the tokens themselves."""

    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__(nn.LayerNorm(in_size), nn.Linear(in_size, out_size))


PROJECTIONS = {"mlp": ProjectionHead, "linear": LinearProjection}


class InstanceProjection(nn.Module):
    """Linear, of channels to mean 0 and variance 1 over the batch of all processes.

    The mean tokens of two volumes are alike but for a small part (cosine above .9), and that part tells them apart.
    """

    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_size, out_size)

    def forward(self, x: Tensor) -> Tensor:
        """``[b, 1, in_size]`` -> ``[b, 1, out_size]``; a single volume, which nothing tells apart, gives the bias."""
        x = x.float()
        variance, mean = torch.var_mean(torch.cat(gather_rows(x)), dim=0, correction=0)
        return self.linear((x - mean) / (variance + 1e-5).sqrt())


class VolumeDecoder(nn.Module):
    """ViT decoder of masked volume modelling: encoded patches and mask tokens -> voxels of the masked patches.

    Args:
        hidden_size, num_layers, num_heads: the defaults are those of the authors' follow-up (ToniChopp/ASAP).
        use_checkpoint: as :class:`custom_components.vit.SimCroPEncoder` has it.
    """

    def __init__(
        self,
        encoder: SimCroPEncoder,
        hidden_size: int = 768,
        num_layers: int = 4,
        num_heads: int = 16,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.num_prefix_tokens = encoder.num_prefix_tokens
        self.embed = nn.Linear(encoder.hidden_size, hidden_size)
        self.mask_token = nn.Parameter(nn.init.normal_(torch.empty(1, 1, hidden_size), std=0.02))
        self.register_buffer("pos_embed", sincos3d_positions(encoder.grid, hidden_size)[None])
        blocks = [Block(hidden_size, 4 * hidden_size, num_heads, use_checkpoint) for _ in range(num_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.pred = nn.Linear(hidden_size, encoder.patch_embed.proj.weight[0].numel())  # voxels of a patch
        self.apply(init_weights)

    def forward(self, tokens: Tensor, keep: Tensor, masked: Tensor) -> Tensor:
        """``tokens [B, 1 + n, C]`` of the patches ``keep [B, n]`` -> ``[B, m, voxels]`` at ``masked [B, m]``."""
        x = self.embed(tokens)
        positions = self.pos_embed.expand(len(x), -1, -1)
        prefix = x[:, : self.num_prefix_tokens]
        visible = x[:, self.num_prefix_tokens :] + gather_tokens(positions, keep)
        mask_tokens = self.mask_token.to(x.dtype).expand(*masked.shape, -1) + gather_tokens(positions, masked)
        # attention is blind to order, so the masked patches can stand at the end, where they are wanted
        x = torch.cat([prefix.to(visible.dtype), visible, mask_tokens], dim=1)
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1](x, x.shape[1] - masked.shape[1])  # nothing else of the last block is read
        return self.pred(self.norm(x))


class Aligner(nn.Module):
    """Projects patches and sentences into the space where their cosine similarity is taken.

    Args:
        visual_size, text_size, projection_size: channels of patch tokens, of text tokens, and of the common space.
        align_layer: which tokens are aligned: the encoder's final ones (None, published), or the output of that block;
            0 is what :meth:`custom_components.vit.SimCroPEncoder.describe` gives. Early layers keep a patch's feature
            about that patch.
        patch_projection: ``mlp`` (published), a :class:`ProjectionHead`, or ``linear``, a :class:`LinearProjection`.
    """

    def __init__(
        self,
        visual_size: int,
        text_size: int,
        projection_size: int = 768,
        align_layer: int | None = None,
        patch_projection: str = "mlp",
    ) -> None:
        super().__init__()
        if align_layer is not None and align_layer < 0:
            raise InputError(f"align_layer {align_layer} is negative: name a block, 0, or null for the final tokens")
        if patch_projection not in PROJECTIONS:
            raise InputError(f"patch_projection {patch_projection!r} is unknown: choose mlp or linear")
        self.align_layer = -1 if align_layer is None else align_layer
        self.patch_projection = PROJECTIONS[patch_projection](visual_size, projection_size)
        self.sentence_projection = ProjectionHead(text_size, projection_size)
        self.apply(init_weights)

    def check(self, encoder: SimCroPEncoder) -> None:
        """Raise an InputError unless the encoder has the block that is to be aligned."""
        if self.align_layer > len(encoder.blocks):
            raise InputError(
                f"align_layer {self.align_layer} is larger than num_layers {len(encoder.blocks)}: "
                "lower it, or set it to null for the final tokens"
            )

    def patches(self, described: Tensor, tokens: Tensor, hidden_states: list[Tensor]) -> Tensor:
        """What the encoder's ``describe`` and ``transform`` gave -> ``[B, n, projection_size]``."""
        aligned = [described, *hidden_states, tokens][self.align_layer]
        return self.patch_projection(aligned[:, -described.shape[1] :])  # without the class token

    def sentences(self, token_features: Tensor, token_sentence: Tensor, num_sentences: int) -> Tensor:
        """Mean of each sentence's projected tokens: ``[B, S, projection_size]``, zeros where a report has fewer than S.

        Args:
            token_features: ``[B, T, text_size]`` of the frozen text encoder.
            token_sentence: ``[B, T]`` int64, the sentence of each token, -1 for special tokens and padding.
            num_sentences: S, of the longest report.
        """
        projected = self.sentence_projection(token_features)
        member = F.one_hot(token_sentence + 1, num_sentences + 1)[..., 1:].to(projected.dtype)  # b t s
        return member.transpose(1, 2) @ projected / member.sum(1).clamp(min=1)[..., None]


class ReportDecoder(nn.Module):
    """Cross-granularity fusion and the BERT decoder that restores the masked report.

    Word-patch level: cross-attention from the tokens to the visible patches. Instance level: the mean patch feature is
    added to every token (framework figure of the paper; layout of the authors' follow-up, ToniChopp/ASAP).

    Args:
        visual_size, text_size: channels of patch tokens and of text tokens.
        vocab_size, pad_token_id: of the text encoder's tokenizer.
        hidden_size, num_layers, num_heads, mlp_dim: the defaults are those of the authors' follow-up.
        max_length: positions of the decoder.
    """

    def __init__(
        self,
        visual_size: int,
        text_size: int,
        vocab_size: int,
        pad_token_id: int,
        hidden_size: int = 768,
        num_layers: int = 6,
        num_heads: int = 6,
        mlp_dim: int = 1536,
        max_length: int = 512,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise InputError(
                f"report decoder: hidden_size {hidden_size} is not divisible by num_heads {num_heads}: change one"
            )
        self.token_projection = nn.Linear(text_size, hidden_size)
        self.patch_projection = nn.Linear(visual_size, hidden_size)
        self.instance_projection = nn.Linear(visual_size, hidden_size)
        self.self_attention = nn.MultiheadAttention(hidden_size, num_heads, batch_first=True)
        self.norm1 = nn.LayerNorm(hidden_size)
        self.cross_attention = nn.MultiheadAttention(hidden_size, num_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.feed_forward = nn.Sequential(nn.Linear(hidden_size, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, hidden_size))
        self.norm3 = nn.LayerNorm(hidden_size)
        config = BertConfig(
            vocab_size=vocab_size,
            pad_token_id=pad_token_id,
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            intermediate_size=mlp_dim,
            max_position_embeddings=max_length,
        )
        self.language_model = BertForMaskedLM(config)

    def forward(self, token_features: Tensor, patches: Tensor, padding: Tensor, masked: Tensor) -> Tensor:
        """Logits ``[M, vocab_size]`` at the M masked positions, in the order of ``masked.nonzero()``.

        Args:
            token_features: ``[B, L, text_size]`` of the masked report.
            patches: ``[B, n, visual_size]``, the visible patches.
            padding, masked: ``[B, L]`` bool, True at padding and at masked tokens.
        """
        x = self.token_projection(token_features)
        x = self.norm1(x + self.self_attention(x, x, x, key_padding_mask=padding, need_weights=False)[0])
        memory = self.patch_projection(patches)
        word_patch = self.cross_attention(x, memory, memory, need_weights=False)[0]
        instance = self.instance_projection(patches.mean(1, keepdim=True))
        x = self.norm2(x + word_patch + instance)
        x = self.norm3(x + self.feed_forward(x))
        x = self.language_model.bert(inputs_embeds=x, attention_mask=(~padding).long())[0]
        return self.language_model.cls(x[masked])  # the vocabulary product only where the loss looks


def similarity(patch_features: Tensor, sentence_features: Tensor) -> Tensor:
    """Cosine similarity of every sentence ``[S, D]`` to every patch ``[N, D]`` of a volume: ``[S, N]`` in [-1, 1]."""
    return F.normalize(sentence_features.float(), dim=-1) @ F.normalize(patch_features.float(), dim=-1).T


AIR = -0.97  # mean of a patch scaled to [-1, 1] that holds nothing else


class SimCroP(nn.Module):
    """One pre-training step of SimCroP (MICCAI 2025), up to the losses.

    Args:
        text_encoder: frozen; see :func:`custom_components.text.load_text_encoder`.
        volume_decoder, aligner, report_decoder: the three branches; one that is None is not computed.
        mask_ratio: share of patches hidden from the encoder; 0.75 in the authors' follow-up (ToniChopp/ASAP).
        align_ratio: share of patches that are aligned, drawn apart from the mask, patches of nothing but air last;
            None, as published, for the visible ones. For an aligner whose ``align_layer`` is 0.
        instance_projection: projects the mean patch token of the last block, to align whole volumes; None, as
            published, for no such level.
        encode_ratio: share of a training batch's volumes, the first ones, that the blocks encode and whose voxels and
            report are restored; 1, as published, for all. An alignment at layer 0 wants many volumes, and costs little.
    """

    def __init__(
        self,
        encoder: SimCroPEncoder,
        text_encoder: nn.Module | None = None,
        volume_decoder: VolumeDecoder | None = None,
        aligner: Aligner | None = None,
        report_decoder: ReportDecoder | None = None,
        mask_ratio: float = 0.75,
        align_ratio: float | None = None,
        encode_ratio: float = 1.0,
        instance_projection: nn.Module | None = None,
    ) -> None:
        super().__init__()
        num_masked = round(encoder.num_patches * mask_ratio)
        if not 0 <= mask_ratio < 1 or num_masked == encoder.num_patches:
            raise InputError(f"mask_ratio {mask_ratio} leaves no patch to encode: set it to at least 0 and below 1")
        if volume_decoder is not None and num_masked == 0:
            raise InputError(
                f"mask_ratio {mask_ratio} masks no patch: raise it, or set the weight of the volume loss to 0"
            )
        if aligner is not None:
            aligner.check(encoder)
            if align_ratio is not None and (aligner.align_layer or not 0 < align_ratio <= 1):
                raise InputError(
                    f"align_ratio {align_ratio} is to be above 0, at most 1, and beside align_layer 0: change it, or "
                    "set it to null to align the visible patches"
                )
        self.num_aligned = None if align_ratio is None else max(1, round(encoder.num_patches * align_ratio))
        if not 0 < encode_ratio <= 1 or (encode_ratio < 1 and align_ratio is None):
            raise InputError(
                f"encode_ratio {encode_ratio} is to be above 0, at most 1, and 1 where align_ratio is null: change it"
            )
        self.encode_ratio = encode_ratio
        self.instance_projection = instance_projection
        self.encoder = encoder
        self.text_encoder = text_encoder
        self.volume_decoder = volume_decoder
        self.aligner = aligner
        self.report_decoder = report_decoder
        self.num_masked = num_masked

    def draw_masks(self, volume: Tensor) -> tuple[Tensor, Tensor]:
        """``keep [B, n]`` and ``masked [B, m]``, int64 indices: a random split of each volume's patches.

        Both come from one permutation, as in MAE; m = round(number of patches * mask_ratio).
        """
        order = torch.rand(len(volume), self.encoder.num_patches, device=volume.device).argsort(dim=1)
        return order[:, self.num_masked :], order[:, : self.num_masked]

    def draw_aligned(self, volume: Tensor) -> Tensor:
        """``[B, n]`` int64: a random ``align_ratio`` of each volume's patches, those of nothing but air last."""
        air = F.avg_pool3d(volume, self.encoder.patch_size).flatten(1) < AIR
        return (torch.rand_like(air, dtype=torch.float32) + air).argsort(dim=1)[:, : self.num_aligned]

    def forward(
        self,
        volume: Tensor,
        findings_ids: Tensor,
        token_place: Tensor,
        token_sentence: Tensor,
        sentence_hash: Tensor,
        report_ids: Tensor,
        report_labels: Tensor,
    ) -> dict[str, Tensor]:
        """What the losses need of ``volume [B, 1, X, Y, Z]``, HU scaled to [-1, 1], and its report.

        The report's tensors, int64, are as :class:`custom_components.text.ReportCollate` makes them.

        Returns:
            Each if its branch is there, b of the B volumes being encoded: ``volume_pred`` and ``volume_target``
            ``[b, m, voxels]`` with the patches' indices ``masked [b, m]``; ``patch_features [B, n, D]``,
            ``sentence_features [B, S, D]``, ``sentence_hash [B, S]``, and with an instance level
            ``instance_features [b, 1, D]``; ``report_logits [M, vocabulary]`` and ``report_target [M]``.
        """
        encoded = volume[: math.ceil(len(volume) * (self.encode_ratio if self.training else 1.0))]
        keep, masked = self.draw_masks(encoded)
        if self.num_aligned is None:
            described = aligned = self.encoder.describe(encoded, keep)
        else:
            measured = self.encoder.measure(volume)
            described = self.encoder.describe(encoded, keep, measured[: len(encoded)])
            aligned = self.encoder.describe(volume, self.draw_aligned(volume), measured)
        tokens, hidden_states = self.encoder.transform(self.encoder.embed(encoded, keep, described))
        patches = slice(self.encoder.num_prefix_tokens, None)
        output: dict[str, Tensor] = {}
        if self.volume_decoder is not None:
            output["volume_pred"] = self.volume_decoder(tokens, keep, masked)
            output["volume_target"] = gather_tokens(patchify(encoded, self.encoder.patch_size), masked)
            output["masked"] = masked
        if self.aligner is not None:
            row, column = token_place.unbind(-1)
            token_features = self.text_encoder.cached(findings_ids)[row, column]
            output["patch_features"] = self.aligner.patches(aligned, tokens, hidden_states)
            output["sentence_features"] = self.aligner.sentences(token_features, token_sentence, sentence_hash.shape[1])
            output["sentence_hash"] = sentence_hash
            if self.instance_projection is not None:
                instance = hidden_states[-1][:, patches].mean(1, keepdim=True)
                output["instance_features"] = self.instance_projection(instance)
        if self.report_decoder is not None:
            ids, labels = report_ids[: len(encoded)], report_labels[: len(encoded)]
            hidden = labels != -100
            padding = ids == self.text_encoder.pad_token_id
            features = self.text_encoder(ids)
            output["report_logits"] = self.report_decoder(features, tokens[:, patches], padding, hidden)
            output["report_target"] = labels[hidden]
        return output

    def unread(self, loss_weights: Mapping[str, float]) -> list[str]:
        """Names of the trained parameters that no loss with a weight reads, so that they never get a gradient."""
        read = {name for name, weight in loss_weights.items() if weight}
        layer = self.aligner.align_layer if "alignment" in read else 0
        final = layer < 0 or bool(read & {"volume", "report"})  # the tokens after the norm
        depth = len(self.encoder.blocks) if final or "instance" in read else layer  # blocks that anything reads
        unread = [f"encoder.blocks.{i}." for i in range(depth, len(self.encoder.blocks))]
        if not final:
            unread.append("encoder.norm.")
        if not depth:  # nothing but what is known of each patch alone
            unread.append("encoder.cls_token")
            unread += [] if self.encoder.statistics is None else ["encoder.patch_embed."]
        if "alignment" not in read:
            unread.append("aligner.patch_projection.")
        return [name for name, p in self.named_parameters() if p.requires_grad and name.startswith(tuple(unread))]


def in_parallel(network: SimCroP, loss_weights: Mapping[str, float], **options: Any) -> DistributedDataParallel:
    """The network in all processes, of which none waits for gradients of what no weighted loss reads.

    Such parameters stay as they are, as in a single process. DDP's own search for them costs time in every step, and
    takes all that the network puts out for read.

    Args:
        options: more of DistributedDataParallel's arguments.
    """
    unread = network.unread(loss_weights)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, unread)
    return DistributedDataParallel(network, **options)


class VolumeEmbedder(nn.Module):
    """What is left of SimCroP for new volumes: encoder and aligner, as models/model.pt stores them."""

    def __init__(self, encoder: SimCroPEncoder, aligner: Aligner) -> None:
        super().__init__()
        aligner.check(encoder)
        self.encoder = encoder
        self.aligner = aligner

    def forward(self, volume: Tensor) -> Tensor:
        """``[B, 1, X, Y, Z]`` -> the volume's embedding ``[B, C]``: mean patch token of the last block, unnormed."""
        _, hidden_states = self.encoder(volume)
        return hidden_states[-1][:, self.encoder.num_prefix_tokens :].mean(1)

    @torch.jit.ignore
    def patches_and_embedding(self, volume: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, 1, X, Y, Z]`` -> projected features ``[B, N, D]`` of all patches, and the embedding ``[B, C]``."""
        described = self.encoder.describe(volume)
        tokens, hidden_states = self.encoder.transform(self.encoder.embed(volume, None, described))
        embedding = hidden_states[-1][:, self.encoder.num_prefix_tokens :].mean(1)
        return self.aligner.patches(described, tokens, hidden_states), embedding


@dataclass
class SentenceSimilarityInferer(Inferer):
    """How well what is asked for fits a volume, and how similar each place is to it.

    Args:
        zero_shot: what is asked for; maps are those of each class' first positive sentence.
        text_encoder, tokenizer: those of pre-training.
        maps: whether to make those, each as large as the volume.
    """

    zero_shot: "ZeroShot"
    text_encoder: nn.Module
    tokenizer: PreTrainedTokenizerBase
    maps: bool = True
    _encoded: tuple[nn.Module, Tensor] | None = field(default=None, init=False, repr=False)

    def __call__(self, inputs: Tensor, network: VolumeEmbedder, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Of ``inputs [B, 1, X, Y, Z]`` and S classes or sentences, float32.

        Returns:
            ``score [B, S]`` and ``probability [B, S]``, see :class:`ZeroShot`; ``embedding [B, C]``; and
            ``similarity [B, S, X, Y, Z]``, cosines, where maps are wanted.
        """
        volume = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        asked = self.zero_shot
        if self._encoded is None or self._encoded[0] is not network:
            features = encode_sentences(asked.sentences, network.aligner, self.text_encoder, self.tokenizer)
            self._encoded = network, features  # once for all volumes
        features = self._encoded[1]
        patches, embedding = network.patches_and_embedding(volume)
        presence = asked(patches, features)
        output = {"score": presence.score.T, "probability": presence.probability.T, "embedding": embedding}
        if self.maps:
            first = features[[asked.sentences.index(prompts.positive[0]) for prompts in asked.prompts.values()]]
            cosines = torch.stack([similarity(each, first) for each in patches])
            output["similarity"] = upsample_patches(cosines, network.encoder.grid, volume.shape[2:])
        return output

    def about(self, prompts: Any, classes: Sequence[str] | None = None, **changes: Any) -> "SentenceSimilarityInferer":
        """The same inferer, asked for something else: see :func:`custom_components.text.queries` for sentences, and
        :func:`custom_components.text.read_prompts` for a file (a Path), or for ``classes``."""
        as_prompts = isinstance(prompts, Path) or classes is not None
        prompts = read_prompts(prompts, classes) if as_prompts else queries(prompts)
        return replace(self, zero_shot=replace(self.zero_shot, prompts=prompts), **changes)


ENSEMBLES = ("mean_score", "max_score", "mean_embedding")


class Presence(NamedTuple):
    """Of C classes in V volumes: score ``[C, V]``, and probability ``[C, V]``, NaN for classes without negative."""

    score: Tensor
    probability: Tensor


@dataclass
class ZeroShot:
    """Tells by prompts which classes are present in a volume: no label is learned from.

    Args:
        prompts: of :func:`custom_components.text.read_prompts`.
        score: of a sentence in a volume.
        ensemble: what several sentences of one side make: the mean or the maximum of their scores (``mean_score``,
            ``max_score``), or the score of the mean of their features of length 1 (``mean_embedding``).

    Raises:
        InputError: ``ensemble`` is unknown.
    """

    prompts: Mapping[str, Prompts]
    score: SentenceVolumeScore
    ensemble: str = "mean_score"

    def __post_init__(self) -> None:
        if self.ensemble not in ENSEMBLES:
            raise InputError(f"ensemble {self.ensemble!r} is unknown: choose {', '.join(ENSEMBLES)}")
        said = (sentence for sides in self.prompts.values() for side in sides for sentence in side)
        self.sentences = list(dict.fromkeys(said))  # each once, in the order of the features

    def __call__(self, patches: Tensor, features: Tensor) -> Presence:
        """Projected patches ``[V, n, D]`` of V volumes, and features ``[S, D]`` of :attr:`sentences`.

        A class scores its positive side minus its negative one, the positive alone where there is no other. Its
        probability is the softmax over both sides at the temperature of the score.
        """
        score, _ = self.sides(patches, features)
        known = torch.tensor([bool(said.negative) for said in self.prompts.values()], device=score.device)[:, None]
        probability = (score / self.score.temperature).sigmoid()  # softmax over two
        return Presence(score, probability.masked_fill(~known, math.nan))

    def sides(self, patches: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`__call__`: the classes' scores ``[C, V]``, and those of their positive sides alone."""
        row = {sentence: i for i, sentence in enumerate(self.sentences)}
        sides = [[row[s] for s in side] for prompts in self.prompts.values() for side in prompts]
        if self.ensemble == "mean_embedding":
            features = F.normalize(features.float(), dim=-1)
            # of a side without sentences nothing is read below
            table = self.score(patches, torch.stack([features[rows or [0]].mean(0) for rows in sides]))
        else:
            scores = self.score(patches, features)
            found = [scores[rows or [0]] for rows in sides]
            table = torch.stack([s.amax(0) if self.ensemble == "max_score" else s.mean(0) for s in found])
        positive, negative = table.unflatten(0, (-1, 2)).unbind(1)
        known = torch.tensor([bool(said.negative) for said in self.prompts.values()], device=table.device)
        return torch.where(known[:, None], positive - negative, positive), positive
