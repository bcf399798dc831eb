"""LinearProbe and its training parts, against independent computation."""

from __future__ import annotations

import io

import pytest
import torch
from custom_components.errors import InputError
from custom_components.probe import ClassificationLoss, LinearProbe, layer_decay_groups, schedule_of
from custom_components.vit import SimCroPEncoder
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F


def make_probe(num_classes: int = 3, frozen: bool = True) -> LinearProbe:
    torch.manual_seed(0)
    encoder = SimCroPEncoder(
        img_size=(16, 8, 8), patch_size=(4, 4, 2), hidden_size=24, mlp_dim=32, num_layers=2, num_heads=3
    )
    probe = LinearProbe(encoder, num_classes, frozen)
    torch.nn.init.normal_(probe.head.weight)
    torch.nn.init.normal_(probe.head.bias)
    return probe.eval()


@pytest.fixture
def volume() -> torch.Tensor:
    return torch.rand(2, 1, 16, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_logits_are_the_published_probes(volume: torch.Tensor) -> None:
    """Mean over patches of the last block's output, class token and final norm left out, then norm, then linear."""
    probe = make_probe()
    encoder = probe.encoder
    tokens = encoder.embed(volume)
    for block in encoder.blocks:
        tokens = block(tokens)
    pooled = tokens[:, 1:].mean(1)
    normed = (pooled - pooled.mean(-1, keepdim=True)) / (pooled.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(probe.features(volume), normed)
    torch.testing.assert_close(probe(volume), normed @ probe.head.weight.T + probe.head.bias)
    assert not [name for name in probe.state_dict() if name.startswith(("encoder.norm", "norm."))]


def test_a_fresh_probe_starts_as_published() -> None:
    encoder = SimCroPEncoder(img_size=(8, 8, 8), patch_size=(4, 4, 4), hidden_size=96, mlp_dim=8, num_heads=3)
    probe = LinearProbe(encoder, 50)
    assert probe.head.bias.abs().max() == 0
    assert probe.head.weight.std().item() == pytest.approx(2e-5, rel=0.1)


def test_saliency_adds_up_to_the_logits(volume: torch.Tensor) -> None:
    probe = make_probe()
    logits, saliency = probe.logits_and_saliency(volume)
    assert saliency.shape == (2, 3, 32)
    torch.testing.assert_close(logits, probe(volume))
    torch.testing.assert_close(saliency.mean(-1) + probe.head.bias, logits, rtol=1e-4, atol=1e-5)


def test_frozen_means_no_gradient_and_eval_mode(volume: torch.Tensor) -> None:
    probe = make_probe().train()
    assert probe.training and not probe.encoder.training
    probe(volume).sum().backward()
    assert {name for name, p in probe.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}
    tuned = make_probe(frozen=False).train()
    assert tuned.encoder.training
    tuned(volume).sum().backward()
    assert all(p.grad is not None for p in tuned.parameters())  # else DDP would wait for it


def test_scripts_and_reloads(volume: torch.Tensor) -> None:
    probe = make_probe()
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(probe), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(volume), probe(volume))


def test_layer_decay_reaches_every_parameter_once() -> None:
    probe = make_probe(frozen=False)
    groups = layer_decay_groups(probe, learning_rate=1.0, layer_decay=0.5, weight_decay=0.1)
    rate = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rate) == len(list(probe.parameters()))
    named = dict(probe.named_parameters())
    assert rate[id(named["head.weight"])] == (1.0, 0.1)
    assert rate[id(named["head.bias"])] == (1.0, 0.0)
    assert rate[id(named["encoder.blocks.1.mlp.fc1.weight"])] == (0.5, 0.1)
    assert rate[id(named["encoder.blocks.0.norm1.weight"])] == (0.25, 0.0)
    assert rate[id(named["encoder.patch_embed.proj.weight"])] == (0.125, 0.1)
    assert rate[id(named["encoder.cls_token"])] == (0.125, 0.0)


def test_loss_with_balanced_positives() -> None:
    data = [{"label": torch.tensor([1.0, 0.0, 0.0])}, *({"label": torch.tensor([0.0, 1.0, 0.0])} for _ in range(3))]
    loss = ClassificationLoss(3, pos_weight="auto", data=data)
    assert loss.weight.tolist() == pytest.approx([3.0, 1 / 3, 1.0])  # the last class has no positive to weigh
    logits, labels = torch.randn(4, 3), torch.stack([item["label"] for item in data])
    p = logits.sigmoid()
    expected = -(loss.weight * labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    torch.testing.assert_close(loss(logits, labels), expected)


def test_loss_of_exclusive_classes() -> None:
    data = [{"label": code} for code in (0, 0, 0, 1)]
    loss = ClassificationLoss(2, exclusive=True, pos_weight="auto", data=data)
    assert loss.weight.tolist() == pytest.approx([4 / 6, 2.0])
    logits, labels = torch.randn(4, 2), torch.tensor([0, 0, 0, 1])
    torch.testing.assert_close(loss(logits, labels), F.cross_entropy(logits, labels, weight=loss.weight))


@pytest.mark.parametrize("exclusive", [False, True])
def test_weights_follow_the_logits_to_their_device(exclusive: bool) -> None:
    """A config makes the loss on the CPU. A fake GPU computes nothing, but refuses what lies on two devices."""
    loss = ClassificationLoss(3, exclusive, pos_weight=[1.0, 2.0, 3.0])
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits = torch.zeros(4, 3, device="cuda")
        labels = torch.zeros(4, dtype=torch.long, device="cuda") if exclusive else torch.zeros_like(logits)
        assert loss(logits, labels).device.type == "cuda"


@pytest.mark.parametrize("pos_weight", ["always", [1.0], [1.0, -1.0, 1.0]])
def test_bad_pos_weight_is_told(pos_weight: object) -> None:
    with pytest.raises(InputError, match="pos_weight"):
        ClassificationLoss(3, pos_weight=pos_weight)


def test_schedule_of_a_fraction() -> None:
    schedules = {"0.01": {"max_steps": 7}, "1.0": {"max_steps": 9}}
    assert schedule_of(schedules, 0.01) == {"max_steps": 7} and schedule_of(schedules, 1) == {"max_steps": 9}
    with pytest.raises(InputError, match="data_fraction 0.5.*0.01, 1.0"):
        schedule_of(schedules, 0.5)
