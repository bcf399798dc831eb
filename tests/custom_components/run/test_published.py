"""Published checkpoints, made here by their formulas, against what is computed after the import."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
from pathlib import Path

import pandas as pd
import pytest
import torch
from custom_components.errors import InputError
from custom_components.probe import LinearProbe
from custom_components.run.published import import_unetr, import_weights
from custom_components.run.weights import description_of, load_for_region, load_pretrained
from custom_components.unetr import SimCroPUNETR
from custom_components.vit import SimCroPEncoder
from torch import Tensor
from torch.nn import functional as F

from tests.conftest import BUNDLES

HIDDEN, HEADS, MLP, DEPTH = 48, 3, 80, 12


def weights(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    return torch.randn(shape) * scale


def timm_blocks() -> dict[str, Tensor]:
    """Blocks and final norm of a ViT by timm's names, with affines far from their start."""
    state = {}
    for i in range(DEPTH):
        for norm in ("norm1", "norm2"):
            state[f"blocks.{i}.{norm}.weight"] = 1 + weights((HIDDEN,), 0.3)
            state[f"blocks.{i}.{norm}.bias"] = weights((HIDDEN,), 0.3)
        for name, rows, columns in (
            ("attn.qkv", 3 * HIDDEN, HIDDEN),
            ("attn.proj", HIDDEN, HIDDEN),
            ("mlp.fc1", MLP, HIDDEN),
            ("mlp.fc2", HIDDEN, MLP),
        ):
            state[f"blocks.{i}.{name}.weight"] = weights((rows, columns), columns**-0.5)
            state[f"blocks.{i}.{name}.bias"] = weights((rows,), 0.3)
    return state | {"norm.weight": 1 + weights((HIDDEN,), 0.3), "norm.bias": weights((HIDDEN,), 0.3)}


def simcrop_table(grid: tuple[int, int, int], width: int = HIDDEN) -> Tensor:
    """Channel 2i holds sin(h f_i), channel 2i + 1 cos(w f_i), f_i = 10000^(-2i / width); the class row is 0."""
    table = [[0.0] * width]
    for h in range(grid[0]):
        for w in range(grid[1]):
            row = [
                value
                for i in range(width // 2)
                for value in (math.sin(h * 10000 ** (-2 * i / width)), math.cos(w * 10000 ** (-2 * i / width)))
            ]
            table += [row] * grid[2]
    return torch.tensor(table)[None]


def simcrop_state(grid: tuple[int, int, int], patch: tuple[int, int, int]) -> dict[str, Tensor]:
    """All of a pre-training checkpoint: encoder, image decoder, and text parts."""
    return timm_blocks() | {
        "cls_token": weights((1, 1, HIDDEN)),
        "pos_embed": simcrop_table(grid),
        "patch_embed.proj.weight": weights((HIDDEN, 1, *patch), 0.1),
        "patch_embed.proj.bias": weights((HIDDEN,)),
        "mask_token": weights((1, 1, 16)),
        "decoder_embed.weight": weights((16, HIDDEN)),
        "decoder_blocks.0.norm1.weight": weights((16,)),
        "decoder_norm.weight": weights((16,)),
        "bert_encoder.embeddings.word_embeddings.weight": weights((40, 24)),
    }


def published_blocks(state: dict[str, Tensor], tokens: Tensor) -> list[Tensor]:
    """Output of each block, ``[B, N, C]``: pre-norm, fused qkv with bias, exact GELU, no layer scale, eps 1e-6."""
    outputs, width = [], HIDDEN // HEADS
    for i in range(DEPTH):
        p = {name.removeprefix(f"blocks.{i}."): t for name, t in state.items() if name.startswith(f"blocks.{i}.")}
        x = F.layer_norm(tokens, (HIDDEN,), p["norm1.weight"], p["norm1.bias"], 1e-6)
        qkv = x @ p["attn.qkv.weight"].T + p["attn.qkv.bias"]
        heads = []
        for head in range(HEADS):
            q, k, v = (qkv[..., part * HIDDEN + head * width :][..., :width] for part in range(3))
            heads.append(torch.softmax(q @ k.transpose(1, 2) / width**0.5, dim=-1) @ v)
        tokens = tokens + torch.cat(heads, -1) @ p["attn.proj.weight"].T + p["attn.proj.bias"]
        x = F.layer_norm(tokens, (HIDDEN,), p["norm2.weight"], p["norm2.bias"], 1e-6)
        x = x @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"]
        x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
        tokens = tokens + x @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]
        outputs.append(tokens)
    return outputs


def published_patches(state: dict[str, Tensor], volume: Tensor) -> Tensor:
    """A strided 3D convolution, flattened and transposed: ``[B, N, C]``, depth fastest."""
    proj = state["patch_embed.proj.weight"]
    tokens = F.conv3d(volume, proj, state["patch_embed.proj.bias"], stride=proj.shape[2:])
    return tokens.flatten(2).transpose(1, 2)


def published_probe(state: dict[str, Tensor], volume: Tensor) -> Tensor:
    """What the published probe's linear layer sees: the mean patch, then a norm without affine."""
    patches = published_patches(state, volume)
    tokens = torch.cat([state["cls_token"].expand(len(volume), -1, -1), patches], 1) + state["pos_embed"]
    return F.layer_norm(published_blocks(state, tokens)[-1][:, 1:].mean(1), (HIDDEN,), eps=1e-6)


@pytest.fixture
def pth(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint as SimCroP's authors publish it, with pickled arguments, for a grid of 3 x 2 x 4 patches."""
    torch.manual_seed(0)
    state = simcrop_state((3, 2, 4), (4, 6, 2))
    path = tmp_path / "simcrop.pth"
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-3), "epoch": 199, "scaler": {"scale": 65536.0}}, path)
    return path, state


SIZE = (12, 12, 8)


def loaded(encoder_file: Path, **changes) -> SimCroPEncoder:
    """The encoder as the classify bundle makes and fills it, with its own keys."""
    keys = {"img_size": SIZE, "patch_size": (4, 6, 2), "hidden_size": HIDDEN, "mlp_dim": MLP, "num_layers": DEPTH}
    return load_pretrained(SimCroPEncoder(**keys | {"num_heads": HEADS} | changes), encoder_file)


def run(path: Path, out: Path, **changes) -> SimCroPEncoder:
    return import_weights(path, out, **{"img_size": SIZE, "num_heads": HEADS} | changes)


@pytest.mark.parametrize(
    ("grid", "patch"),
    [((3, 2, 4), (4, 6, 2)), ((2, 2, 2), (16, 16, 8)), ((1, 5, 2), (2, 2, 3)), ((4, 1, 3), (3, 4, 5))],
)
def test_the_probe_sees_what_the_published_one_sees(tmp_path, grid, patch):
    torch.manual_seed(sum(grid))
    state = simcrop_state(grid, patch)
    torch.save({"model": state}, tmp_path / "simcrop.pth")
    img_size = tuple(g * p for g, p in zip(grid, patch, strict=True))
    run(tmp_path / "simcrop.pth", tmp_path / "encoder.pt", img_size=img_size)
    probe = LinearProbe(loaded(tmp_path / "encoder.pt", img_size=img_size, patch_size=patch), 3).eval()
    volume = torch.rand(2, 1, *img_size) * 2 - 1
    expected = published_probe(state, volume)
    torch.testing.assert_close(probe.features(volume), expected, atol=1e-5, rtol=0)
    # what it must not be: positions, order of axes, and class token all count
    for name in ("pos_embed", "cls_token"):
        wrong = published_probe(state | {name: torch.zeros_like(state[name])}, volume)
        assert (wrong - expected).abs().max() > 1e-3, name


@pytest.mark.parametrize("region", [(8, 12, 8), (16, 6, 6)])
def test_the_unetr_gets_what_the_published_one_gets(pth, tmp_path, region):
    """Blocks 4, 7, 10 and the last, no class token, positions made anew for the region by the authors' formula."""
    path, state = pth
    run(path, tmp_path / "encoder.pt")
    keys = {"patch_size": (4, 6, 2), "hidden_size": HIDDEN, "mlp_dim": MLP, "num_layers": DEPTH, "num_heads": HEADS}
    encoder = SimCroPEncoder(img_size=region, class_token=False, **keys)
    load_for_region(encoder, tmp_path / "encoder.pt", pretrained_img_size=SIZE)
    volume = torch.rand(1, 1, *region) * 2 - 1
    tokens, hidden_states = encoder(volume)
    grid = tuple(size // patch for size, patch in zip(region, (4, 6, 2), strict=True))
    expected = published_blocks(state, published_patches(state, volume) + simcrop_table(grid)[:, 1:])
    for layer in (4, 7, 10):  # the UNETR's skips
        torch.testing.assert_close(hidden_states[layer - 1], expected[layer - 1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens, F.layer_norm(expected[-1], (HIDDEN,), eps=1e-6), atol=1e-5, rtol=1e-5)


def test_every_tensor_is_accounted_for(pth, tmp_path, capsys):
    path, state = pth
    encoder = run(path, tmp_path / "out" / "encoder.pt")
    table = pd.read_csv(tmp_path / "out" / "encoder.csv")
    assert list(table) == ["status", "tensor", "shape", "reason"]
    assert sorted(table["tensor"]) == sorted(state)
    written = torch.load(tmp_path / "out" / "encoder.pt", weights_only=True)
    assert set(written) == set(table["tensor"][table["status"] == "taken"]) == set(encoder.state_dict())
    assert all(torch.equal(written[name], state[name]) for name in written)
    assert not (table["status"] == "missing").any()
    reason = table.set_index("tensor")["reason"]
    assert "simcrop" in reason["pos_embed"] and "no part" in reason["decoder_blocks.0.norm1.weight"]
    printed = capsys.readouterr().out
    assert "blocks.*.attn.qkv.weight" in printed and "144x48" in printed
    assert f"{len(written)} tensors taken, 5 tensors skipped, 0 tensors missing" in printed
    assert "img_size [12, 12, 8], patch_size [4, 6, 2], hidden_size 48, mlp_dim 80, num_layers 12" in printed


def test_an_import_says_what_it_is_and_what_was_assumed(pth, tmp_path):
    path, _ = pth
    keys = {"pixdim": [1.5, 1.5, 3.0], "hu_range": [-1000, 1000]}
    run(path, tmp_path / "encoder.pt", bundle_root=BUNDLES / "classify", license="Apache-2.0", **keys)
    told = description_of(tmp_path / "encoder.pt")
    sizes = {"patch_size": [4, 6, 2], "hidden_size": HIDDEN, "mlp_dim": MLP, "num_layers": DEPTH, "num_heads": HEADS}
    statistics = {"hu_bins": 0, "scale_space": [], "statistics_mlp_dim": 0}
    assert told["settings"] == keys | sizes | statistics | {"img_size": list(SIZE), "pos_embed": "simcrop"}
    assert set(told["assumed"]) == {"pixdim", "hu_range", "img_size", "num_heads"}
    assert told["source"] == {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert told["license"] == "Apache-2.0"


def test_positions_of_no_formula_are_kept_and_said(pth, tmp_path, capsys):
    path, state = pth
    state["pos_embed"] = weights((1, 25, HIDDEN))
    torch.save({"model": state}, path)
    encoder = run(path, tmp_path / "encoder.pt")
    assert torch.equal(encoder.pos_embed, state["pos_embed"]) and "of no formula" in capsys.readouterr().out


def test_half_precision_is_widened(pth, tmp_path):
    path, state = pth
    torch.save({"model": {name: tensor.half() for name, tensor in state.items()}}, path)
    run(path, tmp_path / "encoder.pt")
    written = torch.load(tmp_path / "encoder.pt", weights_only=True)
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert all(torch.equal(tensor, state[name].half().float()) for name, tensor in written.items())
    reason = pd.read_csv(tmp_path / "encoder.csv").set_index("tensor")["reason"]
    assert "float16" in reason["norm.weight"] and "simcrop" in reason["pos_embed"]


def mae_state() -> dict[str, Tensor]:
    """A MAE ViT of images as published with its decoder."""
    return timm_blocks() | {
        "cls_token": weights((1, 1, HIDDEN)),
        "pos_embed": weights((1, 197, HIDDEN)),
        "patch_embed.proj.weight": weights((HIDDEN, 3, 16, 16)),
        "patch_embed.proj.bias": weights((HIDDEN,)),
        "decoder_pos_embed": weights((1, 197, 16)),
    }


def test_a_mae_of_images_gives_blocks_and_norm_and_the_rest_is_told(tmp_path, caplog):
    torch.manual_seed(0)
    state = mae_state()
    torch.save({"model": state}, tmp_path / "mae.pth")
    for name in ("encoder.pt", "again.pt"):
        rng = torch.get_rng_state()
        run(tmp_path / "mae.pth", tmp_path / name, patch_size=(4, 6, 2))
        assert torch.equal(torch.get_rng_state(), rng)
    written = torch.load(tmp_path / "encoder.pt", weights_only=True)
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    random = {"cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    for name, tensor in written.items():
        assert torch.equal(tensor, again[name])
        assert name in random | {"pos_embed"} or torch.equal(tensor, state[name])
    assert "start at RANDOM" in caplog.text and all(name in caplog.text for name in random)
    table = pd.read_csv(tmp_path / "encoder.csv")
    missing = table[table["status"] == "missing"].set_index("tensor")["reason"]
    assert set(missing.index) == random | {"pos_embed"}
    assert "random" in missing["cls_token"] and "sincos3d" in missing["pos_embed"]
    skipped = set(table["tensor"][table["status"] == "skipped"])
    assert skipped == random | {"pos_embed", "decoder_pos_embed"}
    assert loaded(tmp_path / "encoder.pt").pos_embed.shape == (1, 25, HIDDEN)


# what is refused, in one line, with nothing written


class Hostile:
    """Runs a shell command as soon as it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("inside", ["alone", "namespace", "namespace in namespace", "state dict"])
def test_a_hostile_pickle_is_refused_and_not_executed(pth, tmp_path, inside, legacy):
    path, state = pth
    marker = tmp_path / "executed"
    hostile = Hostile(marker)
    content = {
        "alone": hostile,
        "namespace": {"model": state, "args": argparse.Namespace(lr=hostile)},
        "namespace in namespace": {"model": state, "args": argparse.Namespace(deep=argparse.Namespace(x=[hostile]))},
        "state dict": {"model": state | {"norm.weight": hostile}},
    }[inside]
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match="simcrop.pth: not a readable .* weights only: it names posix.system") as told:
        run(path, tmp_path / "encoder.pt")
    assert "\n" not in str(told.value) and not marker.exists()
    assert {file.name for file in tmp_path.iterdir()} == {"simcrop.pth"}
    torch.load(path, weights_only=False)
    assert marker.exists()  # so it would have been


def without(*names: str):
    return lambda state: {name: tensor for name, tensor in state.items() if name not in names}


def but(**changes: Tensor):
    return lambda state: state | {name.replace("__", "."): tensor for name, tensor in changes.items()}


BAD = {
    "no encoder": (lambda state: {"weight": torch.ones(2)}, {}, "holds no ViT.*but weight"),
    "empty": (lambda state: {}, {}, "holds no ViT.*but no tensors"),
    "a block's tensor": (without("blocks.5.mlp.fc2.bias"), {}, "blocks.5.mlp.fc2.bias is not in it, and 0 more"),
    "class token": (without("cls_token"), {}, "cls_token is not in it"),
    "positions": (without("pos_embed"), {}, "pos_embed is not in it"),
    "norm": (without("norm.weight", "norm.bias"), {}, "norm.weight is not in it, and 1 more"),
    "size": (but(blocks__3__norm1__bias=torch.ones(5)), {}, r"blocks.3.norm1.bias is \(5,\), not \(48,\)"),
    "not finite": (but(norm__bias=torch.full((HIDDEN,), torch.nan)), {}, "norm.bias holds values that are not finite"),
    "layer scale": (but(blocks__0__ls1__gamma=torch.ones(HIDDEN)), {}, "blocks.0.ls1.gamma is none of this network's"),
    "heads": (lambda state: state, {"num_heads": None}, "48 channels are not heads of 64: give num_heads"),
    "tokens": (lambda state: state, {"img_size": (12, 12, 12)}, r"24 patches of \[4, 6, 2\].*makes 36; set img_size"),
    "patch": (lambda state: state, {"img_size": (13, 12, 8)}, r"img_size \(13, 12, 8\) is not divisible"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_told_and_nothing_is_written(pth, tmp_path, case):
    path, state = pth
    change, keys, message = BAD[case]
    torch.save({"model": change(state)}, path)
    with pytest.raises(InputError, match=message) as told:
        run(path, tmp_path / "encoder.pt", **keys)
    assert "\n" not in str(told.value)
    assert {file.name for file in tmp_path.iterdir()} == {"simcrop.pth"}


def test_a_cubic_grid_suggests_the_img_size(tmp_path):
    torch.save({"model": simcrop_state((3, 3, 3), (4, 4, 2))}, tmp_path / "simcrop.pth")
    with pytest.raises(InputError, match=r"set img_size: \[12, 12, 6\] if the grid is a cube"):
        run(tmp_path / "simcrop.pth", tmp_path / "encoder.pt", img_size=(224, 224, 112))


def test_a_missing_checkpoint_says_where_to_get_it_and_a_file_that_is_there_is_kept(pth, tmp_path):
    path, _ = pth
    with pytest.raises(InputError, match="absent.pth: no such file; download .*ToniChopp/SimCroP"):
        run(tmp_path / "absent.pth", tmp_path / "encoder.pt")
    (tmp_path / "encoder.pt").write_text("weeks of training")
    with pytest.raises(InputError, match="encoder_file .*encoder.pt: exists"):
        run(path, tmp_path / "encoder.pt")
    assert (tmp_path / "encoder.pt").read_text() == "weeks of training"


# fine-tuned UNETR


def unetr() -> SimCroPUNETR:
    keys = {"hidden_size": 24, "mlp_dim": 32, "num_layers": 4, "num_heads": 3, "class_token": False}
    return SimCroPUNETR(
        SimCroPEncoder(img_size=(16, 16, 8), patch_size=(4, 4, 2), **keys), out_channels=3, feature_size=4
    )


def published_unetr(network: SimCroPUNETR) -> dict[str, Tensor]:
    """A network's weights by the names in the authors' code, with the tensors that their forward pass leaves unused."""
    names = {"encoder.norm.": "vit.fc_norm.", "encoder.": "vit.", "decoder2.conv.": "decoder2.conv3d."}
    state = {"vit.cls_token": torch.ones(1, 1, 24)}
    for name, tensor in network.state_dict().items():
        ours = next((ours for ours in names if name.startswith(ours)), "")
        state[names.get(ours, "") + name.removeprefix(ours)] = tensor
    for block in ("encoder2.blocks.0.1", "encoder2.blocks.1.1", "encoder3.blocks.0.1"):
        state[f"{block}.conv3.conv.weight"] = torch.ones(4, 4, 1, 1, 1)
    return state


def test_a_published_unetr_segments_as_before(tmp_path):
    torch.manual_seed(0)
    source, target = unetr().eval(), unetr().eval()
    source.encoder.pos_embed.normal_()
    source.encoder.norm.weight.data.normal_()
    torch.save({"state_dict": published_unetr(source), "epoch": 50, "best_acc": 0.9}, tmp_path / "unetr.pth")
    import_unetr(target, tmp_path / "unetr.pth", tmp_path / "model.pt")
    volume = torch.rand(1, 1, 16, 16, 8) * 2 - 1
    again = unetr().eval()
    again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(again(volume), source(volume))
    table = pd.read_csv(tmp_path / "model.csv").set_index("tensor")["status"]
    assert set(table[table == "skipped"].index) == {
        "encoder.cls_token",
        "encoder2.blocks.0.1.conv3.conv.weight",
        "encoder2.blocks.1.1.conv3.conv.weight",
        "encoder3.blocks.0.1.conv3.conv.weight",
    }


def test_an_imported_unetr_says_with_which_keys_it_was_imported(tmp_path):
    torch.save({"state_dict": published_unetr(unetr())}, tmp_path / "unetr.pth")
    settings = {"classes": ["left lung", "right lung"], "pixdim": [1.0, 1.0, 1.0]}
    import_unetr(unetr(), tmp_path / "unetr.pth", tmp_path / "model.pt", BUNDLES / "segment", settings)
    told = description_of(tmp_path / "model.pt")
    assert told["settings"] == settings and told["assumed"] == list(settings)


def test_a_unetr_of_other_classes_or_parts_is_told(tmp_path):
    state = published_unetr(unetr())
    torch.save({"state_dict": state | {"out.conv.conv.weight": torch.ones(14, 4, 1, 1, 1)}}, tmp_path / "unetr.pth")
    with pytest.raises(InputError, match=r"out.conv.conv.weight is \(14, 4.*set classes, img_size"):
        import_unetr(unetr(), tmp_path / "unetr.pth", tmp_path / "model.pt")
    torch.save({"state_dict": state | {"encoder1.layer.norm1.weight": torch.ones(4)}}, tmp_path / "unetr.pth")
    with pytest.raises(InputError, match="encoder1.layer.norm1.weight is none of this network's"):
        import_unetr(unetr(), tmp_path / "unetr.pth", tmp_path / "model.pt")
    assert {file.name for file in tmp_path.iterdir()} == {"unetr.pth"}
