"""The linear probe: a frozen encoder, its mean patch token, one linear layer, and what training it needs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from custom_components.errors import InputError
from custom_components.vit import SimCroPEncoder, upsample_patches
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch import Tensor, nn
from torch.nn import functional as F


class LinearProbe(nn.Module):
    """Mean patch token of the last block, LayerNorm without affine, one linear layer: SimCroP's published probe.

    The encoder's own final norm is removed: the published probe pools before it, and an unused parameter breaks
    distributed training. So the encoder must already be filled with its weights, which name that norm. ``frozen``
    trains the linear layer alone, with the encoder in eval mode.
    """

    def __init__(self, encoder: SimCroPEncoder, num_classes: int, frozen: bool = True) -> None:
        super().__init__()
        self.frozen = frozen
        self.encoder = encoder
        self.encoder.norm = nn.Identity()
        self.encoder.requires_grad_(not frozen)
        self.norm = nn.LayerNorm(encoder.hidden_size, eps=1e-6, elementwise_affine=False)
        self.head = nn.Linear(encoder.hidden_size, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> "LinearProbe":
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def patch_tokens(self, volume: Tensor) -> Tensor:
        """``[B, 1, X, Y, Z]`` -> ``[B, N, C]`` float32: the last block's output without the class token."""
        _, hidden_states = self.encoder(volume)
        return hidden_states[-1][:, self.encoder.num_prefix_tokens :].float()

    def features(self, volume: Tensor) -> Tensor:
        """``[B, 1, X, Y, Z]`` -> ``[B, C]`` float32: what the linear layer sees."""
        return self.norm(self.patch_tokens(volume).mean(1))

    def forward(self, volume: Tensor) -> Tensor:
        """``[B, 1, X, Y, Z]`` in [-1, 1] -> logits ``[B, num_classes]``."""
        return self.head(self.features(volume))

    @torch.jit.ignore
    def logits_and_saliency(self, volume: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[B, num_classes]``, and what each patch adds to them, ``[B, num_classes, N]``.

        The probe is linear but for the norm's scale, which belongs to the whole volume. With it held, the map's mean
        over the patches plus the layer's bias is the logit.
        """
        tokens = self.patch_tokens(volume)
        pooled = tokens.mean(1)
        scale = (pooled.var(-1, correction=0) + self.norm.eps).rsqrt()
        centred = (tokens - tokens.mean(-1, keepdim=True)) * scale[:, None, None]
        weight = self.head.weight.float()
        return F.linear(self.norm(pooled), weight, self.head.bias.float()), weight @ centred.transpose(1, 2)


class ProbeInferer(Inferer):
    """Probabilities of a :class:`LinearProbe`, and saliency maps of some classes.

    Args:
        classes, saliency: names of the logits, and those to map; see :func:`saliency_classes`.
        exclusive: whether exactly one class is true: softmax instead of sigmoid.
    """

    def __init__(
        self,
        classes: Sequence[str],
        saliency: str | Sequence[str] | None = None,
        exclusive: bool = False,
        amp: bool = True,
    ) -> None:
        super().__init__()
        self.index = [list(classes).index(name) for name in saliency_classes(classes, saliency)]
        self.exclusive = exclusive
        self.amp = amp

    def __call__(self, inputs: Tensor, network: LinearProbe, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """``inputs [B, 1, X, Y, Z]`` -> ``probability [B, C]``, and ``saliency [B, S, X, Y, Z]`` if asked for."""
        volume = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        output = {}
        with torch.autocast(volume.device.type, torch.bfloat16, enabled=self.amp):
            if self.index:
                logits, patches = network.logits_and_saliency(volume)
                output["saliency"] = upsample_patches(patches[:, self.index], network.encoder.grid, volume.shape[2:])
            else:
                logits = network(volume)
        output["probability"] = logits.float().softmax(-1) if self.exclusive else logits.float().sigmoid()
        return output


def saliency_classes(classes: Sequence[str], saliency: str | Sequence[str] | None) -> list[str]:
    """The classes to map: those of ``saliency``, every one for "all", none for None or empty.

    Raises:
        InputError: ``saliency`` names a class that there is not.
    """
    wanted = list(classes) if saliency == "all" else [saliency] if isinstance(saliency, str) else list(saliency or ())
    unknown = [name for name in wanted if name not in classes]
    if unknown:
        raise InputError(f"saliency names {unknown[0]!r}, which is no class: give all, or some of {', '.join(classes)}")
    return wanted


class ClassificationLoss(nn.Module):
    """Binary cross-entropy per class, or cross-entropy where classes exclude each other.

    Args:
        exclusive: whether exactly one class is true of a volume.
        pos_weight: weight of each class' positives (of each class, if exclusive); ``auto`` for the training volumes'
            negatives over positives (volumes over class size, mean 1, if exclusive); None, as published, for 1.
        data: training items with ``label``, for ``auto``.

    Raises:
        InputError: ``pos_weight`` is neither null, ``auto``, nor one positive number a class.
    """

    def __init__(
        self,
        num_classes: int,
        exclusive: bool = False,
        pos_weight: str | Sequence[float] | None = None,
        data: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__()
        self.exclusive = exclusive
        weight = None
        if pos_weight == "auto":
            labels = torch.stack([torch.as_tensor(item["label"]) for item in data])
            count = torch.bincount(labels, minlength=num_classes) if exclusive else labels.sum(0)
            # a class without positives has no gradient from them, whatever their weight
            weight = (len(labels) / (num_classes * count) if exclusive else (len(labels) - count) / count).float()
            weight = torch.where(count > 0, weight, 1.0)
        elif pos_weight is not None:
            if isinstance(pos_weight, str) or len(pos_weight) != num_classes or min(pos_weight) <= 0:
                raise InputError(
                    f"pos_weight is {pos_weight!r}: give null, auto, or {num_classes} positive numbers, one per class"
                )
            weight = torch.tensor(pos_weight, dtype=torch.float32)
        self.register_buffer("weight", weight)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits ``[B, C]``; labels ``[B, C]`` of zeros and ones, or ``[B]`` int64 codes. Returns a scalar."""
        weight = None if self.weight is None else self.weight.to(logits.device)  # no config moves a loss
        if self.exclusive:
            return F.cross_entropy(logits.float(), labels, weight=weight)
        return F.binary_cross_entropy_with_logits(logits.float(), labels, pos_weight=weight)


def layer_decay_groups(
    probe: LinearProbe, learning_rate: float, layer_decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW groups for full fine-tuning: each block learns ``layer_decay`` times as fast as the one above it.

    The linear layer learns at ``learning_rate``, the last block at ``layer_decay`` times that, and so on down to patch
    embedding and class token (Bao et al., BEiT, ICLR 2022). No weight decay on what is not a matrix.
    """
    num_layers = len(probe.encoder.blocks)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in probe.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("head."):
            depth = 0
        elif name.startswith("encoder.blocks."):
            depth = num_layers - int(name.split(".")[2])
        else:
            depth = num_layers + 1
        decayed = parameter.squeeze().ndim > 1  # a class token is [1, 1, C]: a vector by nature
        settings = {"lr": learning_rate * layer_decay**depth, "weight_decay": weight_decay if decayed else 0.0}
        groups.setdefault((depth, decayed), {"params": [], **settings})["params"].append(parameter)
    return list(groups.values())


def schedule_of(schedules: Mapping[str, Mapping[str, Any]], data_fraction: float) -> dict[str, Any]:
    """The published schedule of a ``data_fraction``, from a table whose keys are fractions as text.

    Raises:
        InputError: the table has no such fraction.
    """
    for fraction, schedule in schedules.items():
        if float(fraction) == float(data_fraction):
            return dict(schedule)
    raise InputError(
        f"data_fraction {data_fraction} has no published schedule, {', '.join(schedules)} have: add one to schedules"
    )
