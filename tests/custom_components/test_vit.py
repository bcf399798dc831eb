"""The 3D ViT against plain loops: patch order, positions, attention, and what the encoder returns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from custom_components.cpu import attention, by_whole_products
from custom_components.errors import InputError
from custom_components.simcrop import Aligner, VolumeEmbedder
from custom_components.vit import (
    Attention,
    Block,
    ScaleSpace,
    SimCroPEncoder,
    Standardize,
    compile_blocks,
    gather_tokens,
    hu_statistics,
    patch_grid,
    patchify,
    simcrop_positions,
    sincos3d_positions,
    unpatchify,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

IMG_SIZE, PATCH_SIZE, GRID = (8, 12, 8), (4, 4, 2), (2, 3, 4)

grids = st.tuples(*[st.integers(1, 4)] * 3)
patch_sizes = st.tuples(*[st.integers(1, 3)] * 3)


def small_encoder(**changes) -> SimCroPEncoder:
    torch.manual_seed(0)
    keys = {"img_size": IMG_SIZE, "patch_size": PATCH_SIZE, "hidden_size": 24, "mlp_dim": 40, "num_layers": 3}
    encoder = SimCroPEncoder(**(keys | {"num_heads": 3} | changes))
    for p in encoder.parameters():  # biases and norms start at 0 and 1, where a forgotten one would not show
        nn.init.normal_(p, std=0.3)
    return encoder


def small_volume(batch_size: int = 2) -> Tensor:
    return torch.rand(batch_size, 1, *IMG_SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1


# patches


@settings(max_examples=20, deadline=None)
@given(grids, patch_sizes, st.integers(1, 2))
def test_patchify_orders_patches_and_voxels_with_the_last_axis_fastest(grid, patch, channels):
    size = [g * p for g, p in zip(grid, patch, strict=True)]
    volume = torch.rand(2, channels, *size)
    patches = patchify(volume, patch)
    px, py, pz = patch
    n = 0
    for h in range(grid[0]):
        for w in range(grid[1]):
            for d in range(grid[2]):
                block = volume[:, :, h * px : (h + 1) * px, w * py : (w + 1) * py, d * pz : (d + 1) * pz]
                assert torch.equal(patches[:, n], block.flatten(1))
                n += 1
    assert patches.shape[1] == n


@pytest.mark.parametrize("channels", [1, 2])
def test_embedding_is_a_strided_convolution_flattened_and_transposed(channels):
    encoder = small_encoder(in_channels=channels)
    volume = torch.rand(2, channels, *IMG_SIZE)
    proj = encoder.patch_embed.proj
    convolved = nn.functional.conv3d(volume, proj.weight, proj.bias, stride=PATCH_SIZE)
    assert convolved.shape[2:] == GRID
    torch.testing.assert_close(
        encoder.patch_embed(patchify(volume, PATCH_SIZE)), convolved.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5
    )


@settings(max_examples=20, deadline=None)
@given(grids, patch_sizes, st.integers(1, 2))
def test_unpatchify_undoes_patchify(grid, patch, channels):
    volume = torch.rand(2, channels, *(g * p for g, p in zip(grid, patch, strict=True)))
    assert torch.equal(unpatchify(patchify(volume, patch), grid, patch), volume)


@pytest.mark.parametrize("img_size", [(224, 224, 100), (8, 224, 112), (0, 16, 8)])
def test_sizes_that_do_not_divide_are_named(img_size):
    with pytest.raises(InputError, match="img_size.*patch_size"):
        patch_grid(img_size, (16, 16, 8))
    with pytest.raises(InputError, match="img_size.*patch_size"):
        SimCroPEncoder(img_size=img_size)


def naive_statistics(voxels: list[float], num_bins: int) -> list[float]:
    counts = [0] * num_bins
    for v in voxels:
        counts[min(max(math.floor((v + 1) / 2 * num_bins), 0), num_bins - 1)] += 1
    n, mean = len(voxels), sum(voxels) / len(voxels)
    sd = math.sqrt(sum((v - mean) ** 2 for v in voxels) / (n - 1))
    return [math.sqrt(count / n) for count in counts] + [mean, sd, min(voxels), max(voxels)]


def test_hu_statistics_are_roots_of_histogram_shares_and_moments():
    torch.manual_seed(0)
    patches = torch.rand(2, 3, 32) * 2.4 - 1.2  # a random shift of the intensity leaves [-1, 1]
    statistics = hu_statistics(patches, 5)
    for b in range(2):
        for n in range(3):
            torch.testing.assert_close(statistics[b, n], torch.tensor(naive_statistics(patches[b, n].tolist(), 5)))


def test_statistics_make_tokens_that_the_voxels_join_later():
    encoder = small_encoder(hu_bins=5, statistics_mlp_dim=7)
    volume, keep = small_volume(), torch.tensor([[5, 0, 23], [7, 8, 2]])
    described = encoder.describe(volume, keep)
    statistics = encoder.statistics.statistics(volume)
    embed = encoder.statistics
    for b in range(2):
        for place, n in enumerate(keep[b].tolist()):
            token = embed.proj(embed.standardize(statistics[b, n])) + encoder.pos_embed[0, 1 + n]
            torch.testing.assert_close(described[b, place], token + embed.mlp(embed.norm(token)), atol=1e-5, rtol=1e-5)
    voxels = F.linear(patchify(volume, PATCH_SIZE), encoder.patch_embed.proj.weight.flatten(1))
    expected = described + gather_tokens(voxels + encoder.patch_embed.proj.bias, keep)
    torch.testing.assert_close(encoder.embed(volume, keep)[:, 1:], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder.embed(volume, keep, described)[:, 1:], expected, atol=1e-5, rtol=1e-5)


def test_statistics_are_standardised_by_the_first_batch_trained_on_and_fixed_then():
    standardize = Standardize(3)
    x = torch.randn(4, 50, 3) * torch.tensor([2.0, 0.1, 0.001]) + 5
    torch.testing.assert_close(standardize.eval()(x), x)
    first = standardize.train()(x)
    torch.testing.assert_close(first.mean((0, 1)), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(first.std((0, 1), correction=0)[:2], torch.ones(2), atol=1e-3, rtol=0)
    assert first[..., 2].std() < 0.1  # next to nothing is not blown up
    torch.testing.assert_close(standardize(x + 1)[..., 0], first[..., 0] + 1 / standardize.std[0])
    resumed = Standardize(3)
    resumed.load_state_dict(standardize.state_dict())
    torch.testing.assert_close(resumed.train()(2 * x), standardize.eval()(2 * x))


def test_without_statistics_a_patch_is_described_by_its_voxels():
    encoder, volume = small_encoder(), small_volume()
    torch.testing.assert_close(encoder.describe(volume), encoder.embed(volume)[:, 1:])


def ball(diameter: float, pixdim: Sequence[float], size: Sequence[int], hu: float = 40.0) -> torch.Tensor:
    """A ball of soft tissue in the middle of lung, ``[1, 1, X, Y, Z]`` scaled to [-1, 1]."""
    axes = [(torch.arange(n) - (n - 1) / 2) * mm for n, mm in zip(size, pixdim, strict=True)]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    inside = (x**2 + y**2 + z**2).sqrt() < diameter / 2
    return torch.where(inside, hu / 1000, -0.85)[None, None]


def test_scale_space_is_strongest_where_the_blob_is_and_at_its_size():
    size, patch, pixdim = (48, 48, 48), (16, 16, 16), (2.0, 2.0, 2.0)
    scale_space = ScaleSpace([4, 8, 14], pixdim, patch_grid(size, patch), patch)
    strongest = []
    for diameter in (10, 40):
        features = scale_space(ball(diameter, pixdim, size))[0]
        brightest = features[:, :3]
        assert brightest.shape == (27, 3)
        assert brightest.amax(1).argmax() == 13  # the patch in the middle
        strongest.append(brightest[13].argmax().item())
    assert strongest[0] < strongest[1]


def test_scale_space_is_the_difference_of_smoothed_volumes():
    from scipy.ndimage import gaussian_filter

    size, patch, pixdim = (24, 24, 24), (8, 8, 8), (4.0, 4.0, 4.0)
    torch.manual_seed(0)
    volume = torch.rand(1, 1, *size) * 2 - 1
    # a width of half a voxel: sampled at every voxel
    features = ScaleSpace([2, 4], pixdim, patch_grid(size, patch), patch)(volume)[0]
    clipped = volume[0, 0].clamp(max=0.15).double().numpy()
    smooth = [gaussian_filter(clipped, sigma / 4, mode="reflect", truncate=8) for sigma in (2, 4, 6.4)]
    for i in range(2):
        difference = torch.from_numpy(smooth[i] - smooth[i + 1]).float()
        inner = difference[8:16, 8:16, 8:16]  # away from the border, where scipy reflects
        torch.testing.assert_close(features[13, i], inner.max(), atol=1e-3, rtol=0)
        torch.testing.assert_close(features[13, 2 + i], inner.min(), atol=1e-3, rtol=0)


def test_scale_space_says_nothing_of_an_even_volume_up_to_its_border():
    scale_space = ScaleSpace([4, 8], (4.0, 4.0, 8.0), (2, 2, 2), (8, 8, 4))
    torch.testing.assert_close(
        scale_space(torch.full((1, 1, 16, 16, 8), -0.4)), torch.zeros(1, 8, 4), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("sigmas", [[8, 4], [0, 4], [-1]])
def test_scale_space_refuses_widths_that_do_not_rise(sigmas):
    with pytest.raises(InputError, match="scale_space .*: give widths of Gaussians in mm, ascending"):
        small_encoder(hu_bins=4, scale_space=sigmas)


# positions


def naive_sincos3d(grid, dim) -> np.ndarray:
    """Concat of sin h, cos h, sin w, cos w, sin d, cos d, dim / 6 each, f_i = 10000^(-i / (dim / 6))."""
    n = dim // 6
    rows = []
    for position in np.ndindex(*grid):
        row = []
        for p in position:
            row += [math.sin(p * 10000 ** (-i / n)) for i in range(n)]
            row += [math.cos(p * 10000 ** (-i / n)) for i in range(n)]
        rows.append(row)
    return np.array(rows)


def naive_simcrop(grid, dim) -> np.ndarray:
    """Even channels sin(h f), odd channels cos(w f), f_i = 10000^(-2i / dim)."""
    rows = []
    for h, w, _ in np.ndindex(*grid):
        row = []
        for i in range(dim // 2):
            f = 10000 ** (-2 * i / dim)
            row += [math.sin(h * f), math.cos(w * f)]
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("grid", [(2, 3, 4), (5, 1, 2)])
@pytest.mark.parametrize(("table", "naive"), [(sincos3d_positions, naive_sincos3d), (simcrop_positions, naive_simcrop)])
def test_positions_follow_their_formula(grid, table, naive):
    positions = table(grid, 24)
    assert positions.dtype == torch.float32
    np.testing.assert_allclose(positions.numpy(), naive(grid, 24), atol=1e-6)


def test_sincos3d_leaves_channels_that_six_does_not_divide_at_zero():
    positions = sincos3d_positions((2, 3, 4), 28)
    np.testing.assert_allclose(positions[:, :24].numpy(), naive_sincos3d((2, 3, 4), 24), atol=1e-6)
    assert positions.shape == (24, 28)
    assert not positions[:, 24:].any()


@pytest.mark.parametrize(("table", "distinct"), [(simcrop_positions, 14 * 14), (sincos3d_positions, 14**3)])
def test_only_our_table_tells_depth_apart(table, distinct):
    positions = table((14, 14, 14), 768)
    assert positions.shape == (2744, 768)
    assert len(np.unique(positions.numpy(), axis=0)) == distinct


@pytest.mark.parametrize(("name", "naive"), [("sincos3d", naive_sincos3d), ("simcrop", naive_simcrop)])
def test_class_token_has_the_zero_row_of_the_stored_positions(name, naive):
    stored = small_encoder(pos_embed=name).state_dict()["pos_embed"]
    np.testing.assert_allclose(stored[0].numpy(), np.vstack([np.zeros((1, 24)), naive(GRID, 24)]), atol=1e-6)


# layers


def naive_attention(x: np.ndarray, layer: Attention) -> np.ndarray:
    """softmax(q k^T / sqrt(head size)) v, head by head, token by token."""
    (wq, wk, wv), (bq, bk, bv) = (p.detach().numpy().reshape(3, -1, *p.shape[1:]) for p in layer.qkv.parameters())
    n, c = x.shape
    size = c // layer.num_heads
    out = np.zeros_like(x)
    for head in range(layer.num_heads):
        s = slice(head * size, (head + 1) * size)
        q, k, v = x @ wq[s].T + bq[s], x @ wk[s].T + bk[s], x @ wv[s].T + bv[s]
        for i in range(n):
            weights = np.exp([q[i] @ k[j] / math.sqrt(size) for j in range(n)])
            out[i, s] = sum(w * v[j] for j, w in enumerate(weights / weights.sum()))
    return out @ layer.proj.weight.detach().numpy().T + layer.proj.bias.detach().numpy()


def naive_norm(x: np.ndarray, norm: nn.LayerNorm) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return scaled * norm.weight.detach().numpy() + norm.bias.detach().numpy()


def naive_mlp(x: np.ndarray, mlp) -> np.ndarray:
    h = x @ mlp.fc1.weight.detach().numpy().T + mlp.fc1.bias.detach().numpy()
    h = h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
    return h @ mlp.fc2.weight.detach().numpy().T + mlp.fc2.bias.detach().numpy()


def test_attention_is_the_naive_softmax_formula():
    layer = small_encoder().double().blocks[0].attn
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    expected = np.stack([naive_attention(row, layer) for row in x.numpy()])
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("first", [3, 6])
def test_attention_of_the_last_tokens_is_a_slice_of_that_of_all(first):
    torch.manual_seed(0)
    block, x = Block(24, 40, 3), torch.randn(2, 7, 24)
    torch.testing.assert_close(block(x, first), block(x)[:, first:])


@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.sampled_from([3, 16]))
@example(1, 1, 34, 1, 3)
@example(1, 1, 1, 9, 3)
@settings(max_examples=20, deadline=None)
def test_bfloat16_attention_on_cpus_has_the_gradients_of_the_formula(batch, heads, queries, keys, channels):
    torch.manual_seed(0)
    shapes = [(batch, heads, tokens, channels) for tokens in (queries, keys, keys)]
    low = [torch.randn(shape).mul(2).bfloat16().requires_grad_() for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in low]
    weights = (exact[0] @ exact[1].mT / math.sqrt(channels)).softmax(-1)
    grad = torch.randn(shapes[0]).bfloat16()
    (weights @ exact[2]).backward(grad.double())
    output = attention(*low)
    assert type(output.grad_fn).__name__ == "CPUAttentionBackward"
    torch.testing.assert_close(output.double(), (weights @ exact[2]).detach(), atol=0.03, rtol=0.03)
    output.backward(grad)
    with torch.no_grad():  # the same sums without signs
        q, k, v, g = (x.abs() for x in (*exact, grad.double()))
        slopes = g @ v.mT
        slopes = weights * (slopes + (weights * slopes).sum(-1, keepdim=True)) / math.sqrt(channels)
        unsigned = slopes @ k, slopes.mT @ q, weights.mT @ g
    for x, reference, size, terms in zip(low, exact, unsigned, (keys, queries, queries), strict=True):
        error, right = (x.grad.double() - reference.grad).norm(), reference.grad.norm()
        # rounding of one number is 2^-9; that of a sum grows with the root of its terms
        noise = 0.02 * max(1.0, math.sqrt(terms / 16)) * math.sqrt(x.numel())
        if right < 0.01 * size.norm():  # terms cancel, as those of queries and keys do with one key: noise is all
            noise = 2**-7 * size.norm()
        assert error <= 0.03 * right + noise


@pytest.mark.parametrize("size", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("channels", [32, 48, 64])
def test_attention_by_whole_products_errs_about_as_much_as_the_rounding_of_its_inputs(size, channels):
    torch.manual_seed(0)
    exact = [torch.randn(2, 2, 600, channels).double() for _ in range(3)]
    exact[0] = size * (exact[0] + exact[1].roll(1, dims=2))  # each query has a key that it seeks
    low = [x.bfloat16() for x in exact]
    of_low, of_exact = (F.scaled_dot_product_attention(*(x.double() for x in given)) for given in (low, exact))
    error, rounding = (by_whole_products(*low) - of_low).norm(), (of_low - of_exact).norm()
    assert error < 1.75 * rounding


def test_attention_by_whole_products_sees_a_key_far_above_those_that_it_first_looked_at():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 40, 16).bfloat16() for _ in range(3))
    k[0, 0, 5] = 1000 * q[0, 0, 7]  # not one of every sixteen
    assert torch.equal(by_whole_products(q, k, v)[0, 0, 7], v[0, 0, 5])


@pytest.mark.parametrize(
    ("has", "tokens", "whole"),
    [("avx512_bf16", 384, True), ("avx512_bf16", 383, False), ("amx_bf16", 384, False), ("avx2", 384, False)],
)
def test_attention_without_gradients_takes_the_way_that_is_faster_on_this_cpu(monkeypatch, has, tokens, whole):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: True})
    q, k, v = (torch.randn(1, 1, tokens, 16) for _ in range(3))
    low = q.bfloat16(), k.bfloat16(), v.bfloat16()
    expected = by_whole_products(*low) if whole else F.scaled_dot_product_attention(*low)
    assert torch.equal(attention(*low), expected)
    assert torch.equal(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_every_block_is_compiled_if_asked_and_nothing_else():
    for enabled in (False, True):
        encoder = small_encoder()
        assert compile_blocks(encoder, enabled) is encoder
        compiled = {name for name, module in encoder.named_modules() if module._compiled_call_impl is not None}
        assert compiled == ({"blocks.0", "blocks.1", "blocks.2"} if enabled else set())


def test_recomputed_blocks_give_the_same_gradients_and_keep_less():
    gradients, saved = [], []
    for use_checkpoint in (False, True):
        encoder, count = small_encoder(use_checkpoint=use_checkpoint), []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, count=count: (count.append(x.numel()), x)[1], lambda x: x
        ):
            tokens, _ = encoder(torch.randn(2, 1, *IMG_SIZE))
        tokens.square().mean().backward()
        gradients.append([p.grad for p in encoder.parameters()])
        saved.append(sum(count))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert saved[1] < saved[0] / 3


def test_encoder_is_pre_norm_with_hidden_states_before_the_final_norm():
    encoder = small_encoder().double()
    volume = small_volume().double()
    tokens, hidden = encoder(volume)
    assert len(hidden) == 3
    for b in range(2):
        patches = patchify(volume, PATCH_SIZE)[b].numpy()
        proj = encoder.patch_embed.proj
        x = patches @ proj.weight.detach().flatten(1).numpy().T + proj.bias.detach().numpy() + naive_sincos3d(GRID, 24)
        x = np.vstack([encoder.cls_token.detach()[0].numpy(), x])  # class token first, its position is zero
        for i, block in enumerate(encoder.blocks):
            x = x + naive_attention(naive_norm(x, block.norm1), block.attn)
            x = x + naive_mlp(naive_norm(x, block.norm2), block.mlp)
            np.testing.assert_allclose(hidden[i][b].detach().numpy(), x, atol=1e-5)
        np.testing.assert_allclose(tokens[b].detach().numpy(), naive_norm(x, encoder.norm), atol=1e-5)
    torch.testing.assert_close(encoder.norm(hidden[-1]), tokens)


# keep


def test_keep_embeds_exactly_the_named_patches_in_the_order_given():
    encoder = small_encoder()
    volume = small_volume()
    keep = torch.tensor([[5, 0, 23], [7, 8, 2]])
    embedded = encoder.embed(volume, keep)
    proj = encoder.patch_embed.proj
    for b in range(2):
        for place, n in enumerate(keep[b].tolist()):
            h, w, d = n // 12, n // 4 % 3, n % 4  # token index = (h * grid_w + w) * grid_d + d
            block = volume[b, :, 4 * h : 4 * h + 4, 4 * w : 4 * w + 4, 2 * d : 2 * d + 2]
            expected = (proj.weight * block).sum((1, 2, 3, 4)) + proj.bias + encoder.pos_embed[0, 1 + n]
            torch.testing.assert_close(embedded[b, 1 + place], expected, atol=1e-5, rtol=1e-5)
    everything = encoder.embed(volume)
    for b in range(2):
        assert torch.equal(embedded[b, 0], everything[b, 0])


def test_order_of_keep_only_permutes_the_tokens():
    encoder = small_encoder().eval()
    volume = small_volume()
    keep = torch.stack([torch.randperm(24), torch.randperm(24)])
    tokens, hidden = encoder(volume)
    kept_tokens, kept_hidden = encoder(volume, keep)
    for all_of, kept in zip([tokens, *hidden], [kept_tokens, *kept_hidden], strict=True):
        expected = torch.stack([torch.cat([row[:1], row[1:][index]]) for row, index in zip(all_of, keep, strict=True)])
        torch.testing.assert_close(kept, expected, atol=1e-4, rtol=1e-4)


def test_patches_left_out_of_keep_have_no_influence():
    encoder = small_encoder()
    volume, keep = small_volume(), torch.tensor([[0, 3], [0, 3]])
    changed = volume.clone()
    changed[:, :, 4:] += 1  # patches 12 to 23
    assert torch.equal(encoder(volume, keep)[0], encoder(changed, keep)[0])
    assert not torch.equal(encoder(volume)[0], encoder(changed)[0])


# the encoder as a whole


def test_class_token_comes_first_and_can_be_left_out():
    encoder, bare = small_encoder(), small_encoder(class_token=False)
    bare.load_state_dict(
        {k: v[:, 1:] if k == "pos_embed" else v for k, v in encoder.state_dict().items() if k != "cls_token"}
    )
    volume = small_volume()
    assert encoder(volume)[0].shape == (2, 25, 24)
    assert bare(volume)[0].shape == (2, 24, 24)
    assert bare.cls_token is None
    embedded = encoder.embed(volume)
    torch.testing.assert_close(embedded[:, 1:], bare.embed(volume))
    torch.testing.assert_close(embedded[:, 0], encoder.cls_token[0].expand(2, -1))


def test_size_at_the_published_defaults():
    with torch.device("meta"):  # shapes without memory or arithmetic
        encoder = SimCroPEncoder()
    assert sum(p.numel() for p in encoder.parameters() if p.requires_grad) == 86_630_400
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    assert shapes["pos_embed"] == (1, 2745, 768)
    assert "pos_embed" not in dict(encoder.named_parameters())
    assert shapes["patch_embed.proj.weight"] == (768, 1, 16, 16, 8)
    assert shapes["cls_token"] == (1, 1, 768)


def test_parameters_have_timms_names():
    block = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    layers = ["patch_embed.proj", "norm", *(f"blocks.{i}.{name}" for i in range(3) for name in block)]
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert set(small_encoder().state_dict()) == expected | {"cls_token", "pos_embed"}


def test_every_parameter_gets_a_gradient():
    encoder = small_encoder()
    encoder(small_volume())[0].square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"num_heads": 5}, "hidden_size 24.*num_heads 5"), ({"pos_embed": "learned"}, "pos_embed 'learned'.*simcrop")],
)
def test_keys_that_do_not_fit_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        small_encoder(**changes)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize(
    "changes", [{}, {"class_token": False}, {"hu_bins": 5, "scale_space": [4, 8], "statistics_mlp_dim": 8}]
)
def test_scripted_encoder_gives_the_same(changes):
    encoder = small_encoder(**changes).eval()
    volume, keep = small_volume(), torch.tensor([[5, 0, 23], [7, 8, 2]])
    scripted = torch.jit.script(encoder)
    for arguments in [(volume,), (volume, keep)]:
        (tokens, hidden), (expected, expected_hidden) = scripted(*arguments), encoder(*arguments)
        torch.testing.assert_close([tokens, *hidden], [expected, *expected_hidden])


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_scripted_embedder_gives_the_mean_patch_token_before_the_norm():
    encoder = small_encoder().eval()
    embedder = VolumeEmbedder(encoder, Aligner(24, 10, 16)).eval()
    scripted = torch.jit.script(embedder)
    volume = small_volume()
    expected = encoder(volume)[1][-1][:, 1:].mean(1)
    torch.testing.assert_close(embedder(volume), expected)
    torch.testing.assert_close(scripted(volume), expected)
