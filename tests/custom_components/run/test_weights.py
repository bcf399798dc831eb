"""Checkpoints: never half written, never executed, never half loaded."""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from custom_components.errors import InputError
from custom_components.run.weights import (
    load_file,
    load_mae,
    load_weights,
    save_atomically,
    state_dict_of,
    trained_with,
)
from custom_components.vit import SimCroPEncoder
from torch import nn


def encoder(**changes) -> SimCroPEncoder:
    keys = {"img_size": (8, 8, 8), "patch_size": (4, 4, 2), "hidden_size": 24, "mlp_dim": 32, "num_layers": 2}
    return SimCroPEncoder(**(keys | {"num_heads": 3} | changes))


def copy(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def mae_file(path: Path, **changes) -> dict[str, torch.Tensor]:
    """Write a checkpoint laid out as MAE's (2D, with decoder) for two blocks of 24 channels; return its weights."""
    torch.manual_seed(1)
    state = {name: torch.randn_like(t) for name, t in encoder().state_dict().items() if name[:5] in ("block", "norm.")}
    state |= {
        "cls_token": torch.ones(1, 1, 24),
        "pos_embed": torch.ones(1, 197, 24),
        "patch_embed.proj.weight": torch.ones(24, 3, 16, 16),
        "patch_embed.proj.bias": torch.ones(24),
        "mask_token": torch.ones(1, 1, 8),
        "decoder_blocks.0.norm1.weight": torch.ones(8),
        "decoder_norm.weight": torch.ones(8),
    }
    state = {name: tensor for name, tensor in (state | changes).items() if tensor is not None}
    torch.save({"model": state, "args": argparse.Namespace(lr=1.0), "epoch": 799}, path)
    return state


# files


def test_saving_leaves_the_file_and_nothing_else(tmp_path):
    path = tmp_path / "models/encoder.pt"
    for value in (1.0, 2.0):
        save_atomically({"weight": torch.tensor(value)}, path)
        assert torch.load(path, weights_only=True)["weight"] == value
    assert [p.name for p in path.parent.iterdir()] == ["encoder.pt"]


def test_a_save_that_fails_keeps_the_old_file(tmp_path):
    path = tmp_path / "encoder.pt"
    save_atomically({"weight": torch.ones(2)}, path)
    with pytest.raises(Exception, match="pickle"):
        save_atomically({"weight": torch.zeros(2), "bad": lambda: None}, path)
    assert torch.equal(load_file(path)["weight"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["encoder.pt"]


class Hostile:
    """Creates a file as soon as it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path, legacy):
    path, marker = tmp_path / "hostile.pt", tmp_path / "executed"
    torch.save({"model": Hostile(marker)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match="hostile.pt: not a readable checkpoint of weights only") as told:
        load_file(path)
    assert not marker.exists() and "\n" not in str(told.value)
    torch.load(path, weights_only=False)
    assert marker.exists()  # so it would have been


@pytest.mark.parametrize("size", [0, 10, 0.5, 0.99])
def test_a_truncated_file_is_told(tmp_path, size):
    path = tmp_path / "cut.pt"
    torch.save({"weight": torch.randn(1000)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(size * len(content)) if isinstance(size, float) else size])
    with pytest.raises(InputError, match="cut.pt: not a readable checkpoint"):
        load_file(path)


def test_a_missing_file_is_told(tmp_path):
    message = "^checkpoint .*nothing.pt: no such checkpoint; train first, or give models_dir, the folder of a training$"
    for load in (load_file, trained_with, partial(load_weights, nn.Linear(1, 1))):
        with pytest.raises(InputError, match=message):
            load(tmp_path / "nothing.pt")


def test_the_arguments_that_authors_pickle_beside_weights_are_allowed(tmp_path):
    torch.save({"model": {"weight": torch.ones(2)}, "args": argparse.Namespace(lr=1.0)}, tmp_path / "a.pth")
    assert load_file(tmp_path / "a.pth")["args"].lr == 1.0


@pytest.mark.parametrize("key", [None, "model", "network", "state_dict"])
def test_the_state_dict_is_found_where_checkpoints_keep_it(key):
    state = {"weight": torch.ones(2)}
    assert state_dict_of({key: state, "epoch": 1} if key else state) == state


@pytest.mark.parametrize("content", [None, 3, [torch.ones(2)], torch.ones(2), {"model": 3}])
def test_what_holds_no_state_dict_gives_none(content):
    assert state_dict_of(content) == {}


# loading


def test_load_weights_fills_everything(tmp_path):
    source, target = encoder(), encoder()
    torch.save(source.state_dict(), tmp_path / "encoder.pt")
    assert load_weights(target, tmp_path / "encoder.pt") is target
    torch.testing.assert_close(target.state_dict(), source.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.weight": None}, r"1 tensors missing, 0 of other size or not finite \(norm.weight\)"),
        (
            {"norm.weight": torch.ones(25)},
            r"0 tensors missing, 1 of other size or not finite \(norm.weight is \(25,\), not",
        ),
        ({"norm.weight": torch.full((24,), torch.nan)}, "1 of other size or not finite .norm.weight holds values"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(tmp_path, change, message):
    target = encoder()
    before = copy(target)
    state = {k: v + 1 for k, v in before.items()} | change
    torch.save({k: v for k, v in state.items() if v is not None}, tmp_path / "encoder.pt")
    with pytest.raises(InputError, match=message):
        load_weights(target, tmp_path / "encoder.pt")
    torch.testing.assert_close(target.state_dict(), before)


@pytest.mark.parametrize("content", [{"conv1.weight": torch.ones(2)}, {}, 3])
def test_a_checkpoint_that_fits_nothing_is_an_error(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(InputError, match="other.pt: fits nothing of SimCroPEncoder"):
        load_weights(encoder(), tmp_path / "other.pt")
    with pytest.raises(InputError, match="other.pt: fits nothing of SimCroPEncoder"):
        load_mae(encoder(), tmp_path / "other.pt")


def test_mae_gives_blocks_and_final_norm_only(tmp_path, caplog):
    state, target = mae_file(tmp_path / "mae.pth"), encoder()
    before = copy(target)
    with caplog.at_level(logging.INFO):
        assert load_mae(target, tmp_path / "mae.pth") is target
    taken = [name for name in before if name.startswith("blocks.") or name in ("norm.weight", "norm.bias")]
    assert len(taken) == 2 * 12 + 2
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, state[name] if name in taken else before[name]), name
    assert "filled 26 of 30 tensors of SimCroPEncoder, left 7 of the file's unused" in caplog.text


def test_mae_of_another_size_changes_nothing(tmp_path):
    mae_file(tmp_path / "mae.pth", **{"blocks.1.mlp.fc1.weight": torch.ones(96, 24)})
    target = encoder()
    before = copy(target)
    with pytest.raises(InputError, match=r"blocks.1.mlp.fc1.weight is \(96, 24\), not \(32, 24\)"):
        load_mae(target, tmp_path / "mae.pth")
    torch.testing.assert_close(target.state_dict(), before)


def test_without_a_mae_checkpoint_the_encoder_stays_as_it_is():
    target = encoder()
    before = copy(target)
    assert load_mae(target, None) is target
    torch.testing.assert_close(target.state_dict(), before)


def test_a_missing_mae_checkpoint_names_the_key_and_the_cure(tmp_path):
    with pytest.raises(InputError, match="mae_checkpoint .*: no such file; download.*or set mae_checkpoint to null"):
        load_mae(encoder(), tmp_path / "mae.pth")
