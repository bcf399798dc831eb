"""The UNETR: its wiring against MONAI's blocks called by hand, its contract, what it takes from pre-training."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from custom_components.errors import InputError
from custom_components.run.handlers import decay_groups
from custom_components.run.weights import load_for_region
from custom_components.unetr import InstanceNorm, SimCroPUNETR
from custom_components.vit import SimCroPEncoder, simcrop_positions, sincos3d_positions
from torch import nn
from torch.nn import functional as F

BUNDLES = Path(__file__).parents[2] / "bundles"
SIZES = {"hidden_size": 24, "mlp_dim": 32, "num_layers": 4, "num_heads": 2}


def make(img_size=(32, 48, 16), patch_size=(16, 16, 8), out_channels=3, skip_layers=None, **keys) -> SimCroPUNETR:
    torch.manual_seed(0)
    encoder = SimCroPEncoder(img_size=img_size, patch_size=patch_size, class_token=False, **SIZES | keys)
    return SimCroPUNETR(encoder, out_channels, feature_size=4, skip_layers=skip_layers)


@pytest.mark.parametrize(
    ("img_size", "patch_size"),
    [((32, 48, 16), (16, 16, 8)), ((32, 16, 24), (8, 8, 8)), ((16, 32, 8), (16, 16, 8)), ((36, 24, 20), (12, 8, 4))],
)
def test_any_region_that_divides_by_the_patch(img_size: tuple, patch_size: tuple) -> None:
    """Also token grids that are no cube, and patches whose stages of x2 do not end at the region's size."""
    network = make(img_size, patch_size)
    assert network(torch.randn(2, 1, *img_size)).shape == (2, 3, *img_size)


@pytest.mark.parametrize(
    ("img_size", "patch_size", "stages"), [((32, 32, 16), (16, 16, 8), 3), ((16, 16, 8), (8, 8, 4), 2)]
)
def test_no_map_grows_beyond_the_region(img_size: tuple, patch_size: tuple, stages: int) -> None:
    network, sizes = make(img_size, patch_size), []
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(lambda _, __, output: sizes.append(output.shape[2:]))
    network(torch.randn(1, 1, *img_size))
    assert all(n <= most for size in sizes for n, most in zip(size, img_size, strict=True))
    assert [network.decoder5, network.decoder4, network.decoder3].count(None) == 3 - stages


def test_skips_of_the_published_depth() -> None:
    network = SimCroPUNETR(SimCroPEncoder(img_size=(96, 96, 48), class_token=False, hidden_size=24, mlp_dim=8), 4)
    assert network.skip_layers == [4, 7, 10]
    assert network.grid == (6, 6, 6)


@pytest.mark.parametrize("skip_layers", [None, [0, 3, 1]])
def test_wiring_against_the_blocks_by_hand(skip_layers: list[int] | None) -> None:
    """Raw outputs of three blocks as skips, the normed last as bottleneck, trilinear before the biased convolution."""
    network = make(skip_layers=skip_layers, hu_bins=4).eval()
    volume = torch.randn(1, 1, 32, 48, 16)
    tokens, states = network.encoder.embed(volume), [network.encoder.describe(volume)]
    for block in network.encoder.blocks:
        tokens = block(tokens)
        states.append(tokens)

    def grid(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(1, 24, 2, 3, 2)
        for n in range(12):
            out[:, :, n // 6, n // 2 % 3, n % 2] = x[:, n]
        return out

    fine, middle, coarse = skip_layers or [2, 3, 4]
    x = network.decoder5(grid(network.encoder.norm(states[4])), network.encoder4(grid(states[coarse])))
    x = network.decoder4(x, network.encoder3(grid(states[middle])))
    x = network.decoder3(x, network.encoder2(grid(states[fine])))
    assert x.shape[2:] == (16, 24, 16)
    up = F.interpolate(x, (32, 48, 16), mode="trilinear", align_corners=False)
    assert network.decoder2.conv.bias is not None and network.decoder2.conv.kernel_size == (3, 3, 3)
    up = F.conv3d(up, network.decoder2.conv.weight, network.decoder2.conv.bias, padding=1)
    x = network.decoder2.conv_block(torch.cat([up, network.encoder1(volume)], 1))
    torch.testing.assert_close(network(volume), network.out(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_norm_is_instance_norm_without_affine(memory_format: torch.memory_format, dtype, tolerance: float) -> None:
    """Forward and backward, beside torch's own in float64; the layout stays."""
    x = (torch.randn(2, 6, 4, 5, 3, generator=torch.Generator().manual_seed(0)) * 3 + 1).to(dtype)
    x = x.to(memory_format=memory_format).requires_grad_()
    precise = x.detach().double().requires_grad_()
    grad = torch.randn_like(x)
    found, expected = InstanceNorm(6)(x), F.instance_norm(precise)
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance, check_dtype=False, check_stride=False)
    close(found, expected)
    close(InstanceNorm(6)(x.detach()), expected)
    gradient = torch.autograd.grad(found, x, grad)[0]
    close(gradient, torch.autograd.grad(expected, precise, grad.double())[0])
    assert gradient.is_contiguous(memory_format=memory_format) and gradient.dtype == dtype


def test_every_norm_and_activation_is_the_published_one() -> None:
    network = make()
    kinds = {type(m) for part in network.children() if part is not network.encoder for m in part.modules()}
    assert not kinds & {nn.BatchNorm3d, nn.InstanceNorm3d, nn.GroupNorm} and InstanceNorm in kinds
    assert {m.eps for m in network.modules() if isinstance(m, InstanceNorm)} == {1e-5}
    slopes = {m.negative_slope for m in network.modules() if isinstance(m, nn.LeakyReLU)}
    assert slopes == {0.01}


def test_every_parameter_gets_a_gradient() -> None:
    """An unused one would stop DistributedDataParallel."""
    network = make(hu_bins=4)
    network(torch.randn(1, 1, 32, 48, 16)).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("skip_layers", [[1, 2], [0, 1, 5], [-1, 1, 2]])
def test_skips_that_do_not_fit_are_refused(skip_layers: list[int]) -> None:
    with pytest.raises(InputError, match="skip_layers .* 3 stages, .* 0 to num_layers 4"):
        make(skip_layers=skip_layers)


def test_the_encoders_learning_rate_is_of_the_encoder_alone() -> None:
    """Not of the UNETR's own blocks, named encoder1 to encoder4."""
    train = json.loads((BUNDLES / "segment" / "configs" / "train.json").read_text())
    (pattern,) = train["optimizer"]["params"]["learning_rates"]
    network = make()
    slow = {p for group in decay_groups(network, 0.0, {pattern: 0.1}) if "lr" in group for p in group["params"]}
    assert slow == set(network.encoder.parameters())


def test_a_class_token_is_refused() -> None:
    with pytest.raises(InputError, match="class_token"):
        SimCroPUNETR(SimCroPEncoder(img_size=(32, 32, 16), **SIZES), 3)


def test_torchscript_gives_the_same() -> None:
    network = make().eval()
    volume = torch.randn(1, 1, 32, 48, 16)
    torch.testing.assert_close(torch.jit.script(network)(volume), network(volume), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "has, dtype", [("amx_bf16", torch.bfloat16), ("avx512_bf16", torch.bfloat16), ("avx512_f", torch.float32)]
)
def test_autocast_changes_little(monkeypatch: pytest.MonkeyPatch, has: str, dtype: torch.dtype) -> None:
    """Convolutions stay in fp32 on a CPU that is slow at bfloat16, and on no other."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: True})
    network = make().eval()
    volume = torch.randn(1, 1, 32, 48, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(volume)
    assert found.dtype == dtype
    expected = network(volume)
    assert 0 < (found - expected).abs().mean() < 0.05 * expected.abs().mean() + 0.02


@pytest.fixture
def pretrained(tmp_path: Path) -> tuple[Path, dict]:
    """encoder.pt of a pre-training with class token and another grid."""
    torch.manual_seed(1)
    state = SimCroPEncoder(img_size=(64, 64, 32), patch_size=(16, 16, 8), **SIZES).state_dict()
    torch.save(state, tmp_path / "encoder.pt")
    return tmp_path / "encoder.pt", state


def test_patch_embedding_and_blocks_are_taken(pretrained: tuple, caplog: pytest.LogCaptureFixture) -> None:
    path, state = pretrained
    encoder = make().encoder
    with caplog.at_level(logging.INFO):
        load_for_region(encoder, path)
    filled = {k: v for k, v in encoder.state_dict().items() if k.startswith(("patch_embed.", "blocks."))}
    assert all(torch.equal(v, state[k]) for k, v in filled.items())
    assert f"filled {len(filled)} of {len(encoder.state_dict())}" in caplog.text
    assert torch.equal(encoder.norm.weight, torch.ones(24)) and torch.equal(encoder.norm.bias, torch.zeros(24))
    assert torch.equal(encoder.pos_embed[0], sincos3d_positions((2, 3, 2), 24))


def test_positions_can_be_interpolated(pretrained: tuple) -> None:
    """The ends of the region get the ends of the pre-trained grid; a grid of the same size gets it unchanged."""
    path, state = pretrained
    encoder = load_for_region(make().encoder, path, positions="interpolated", pretrained_img_size=(64, 64, 32))
    table = state["pos_embed"][0, 1:].reshape(4, 4, 4, 24)
    found = encoder.pos_embed[0].reshape(2, 3, 2, 24)
    torch.testing.assert_close(found[0, 0, 0], table[0, 0, 0])
    torch.testing.assert_close(found[-1, -1, -1], table[-1, -1, -1])
    torch.testing.assert_close(found[0, 1, 0], (table[0, 1, 0] + table[0, 2, 0]) / 2)
    same = make((64, 64, 32)).encoder
    load_for_region(same, path, positions="interpolated", pretrained_img_size=(64, 64, 32))
    torch.testing.assert_close(same.pos_embed, state["pos_embed"][:, 1:])


def test_starting_from_scratch_is_said(caplog: pytest.LogCaptureFixture) -> None:
    encoder = make().encoder
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    load_for_region(encoder, None)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    assert "random weights" in caplog.text and caplog.records[0].levelno == logging.WARNING


def test_a_file_that_does_not_fit_is_told(pretrained: tuple, tmp_path: Path) -> None:
    path, state = pretrained
    with pytest.raises(InputError, match="absent.pt"):
        load_for_region(make().encoder, tmp_path / "absent.pt")
    with pytest.raises(InputError, match="pretrained_img_size"):
        load_for_region(make().encoder, path, positions="interpolated", pretrained_img_size=(64, 64, 64))
    with pytest.raises(InputError, match="positions 'learned'"):
        load_for_region(make().encoder, path, positions="learned")
    with pytest.raises(InputError, match="blocks"):
        load_for_region(make(num_layers=5).encoder, path)
    with pytest.raises(InputError, match="is .*, not"):
        load_for_region(make(hidden_size=36).encoder, path)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="fits nothing"):
        load_for_region(make().encoder, tmp_path / "other.pt")


@pytest.mark.parametrize("pretrained_img_size", [None, (64, 64, 32), (64, 64, 64)])
def test_positions_are_rebuilt_by_the_checkpoints_formula(
    pretrained: tuple, pretrained_img_size: tuple | None, caplog: pytest.LogCaptureFixture
) -> None:
    """An imported checkpoint brings the authors' table: the region's is made by the same formula, without a key."""
    path, state = pretrained
    state["pos_embed"][0, 1:] = simcrop_positions((4, 4, 4), 24)
    torch.save(state, path)
    with caplog.at_level(logging.INFO):
        encoder = load_for_region(make().encoder, path, pretrained_img_size=pretrained_img_size)
    assert torch.equal(encoder.pos_embed[0], simcrop_positions((2, 3, 2), 24))
    assert "formula of its own, simcrop" in caplog.text


def test_positions_of_no_formula_are_told_and_can_be_interpolated(pretrained: tuple) -> None:
    path, state = pretrained
    state["pos_embed"][0, 3:].mul_(1.1)  # the first two patches still look like the formula's
    torch.save(state, path)
    with pytest.raises(InputError, match="none of sincos3d, simcrop: set positions to interpolated"):
        load_for_region(make().encoder, path, pretrained_img_size=(64, 64, 32))
    load_for_region(make().encoder, path, positions="interpolated", pretrained_img_size=(64, 64, 32))
