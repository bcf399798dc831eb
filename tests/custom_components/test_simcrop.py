"""The pre-training network end to end at toy size: what gets a gradient, what must not matter, what branches read."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path

import pytest
import torch
from custom_components.errors import InputError
from custom_components.losses import (
    READS,
    MaskedReportLoss,
    MaskedVolumeLoss,
    SentenceVolumeScore,
    SimCroPLoss,
    SimilarityAlignmentLoss,
)
from custom_components.simcrop import (
    ENSEMBLES,
    Aligner,
    InstanceProjection,
    ReportDecoder,
    SentenceSimilarityInferer,
    SimCroP,
    VolumeDecoder,
    VolumeEmbedder,
    ZeroShot,
    similarity,
)
from custom_components.text import TextEncoder, load_text_encoder, queries, read_prompts
from custom_components.vit import SimCroPEncoder, gather_tokens, patchify, unpatchify, upsample_patches
from monai.bundle import ConfigParser
from torch import Tensor, distributed, nn
from torch.multiprocessing import start_processes
from torch.nn import functional as F
from transformers import BertConfig, BertModel

ROOT = Path(__file__).parents[2]
BRANCHES = {"volume": "volume_decoder", "alignment": "aligner", "report": "report_decoder"}
OUTPUTS = {
    "volume": {"volume_pred", "volume_target", "masked"},
    "alignment": {"patch_features", "sentence_features", "sentence_hash"},
    "report": {"report_logits", "report_target"},
}


def losses(negatives: str = "both", **weights: float) -> SimCroPLoss:
    weights = {"volume": 1.0, "alignment": 1.0, "report": 1.0} | weights
    alignment = SimilarityAlignmentLoss(top_k=2, negatives=negatives)
    instance = SimilarityAlignmentLoss(top_k=1, negatives="volume")
    return SimCroPLoss(weights, MaskedVolumeLoss(), alignment, MaskedReportLoss(), instance)


def parts(network: SimCroP, batch: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """The three losses, with masks drawn from ``seed``."""
    torch.manual_seed(seed)
    return losses().parts(network(**batch))


# masks


def draw(batch_size: int, grid: tuple[int, int, int], ratio: float) -> tuple[Tensor, Tensor]:
    encoder = SimCroPEncoder(1, grid, (1, 1, 1), hidden_size=6, mlp_dim=1, num_layers=1, num_heads=1)
    return SimCroP(encoder, mask_ratio=ratio).draw_masks(torch.zeros(batch_size, 1, *grid))


@pytest.mark.parametrize(
    ("grid", "ratio"), [((14, 14, 14), 0.75), ((4, 2, 4), 0.5), ((7, 1, 1), 0.4), ((5, 1, 2), 0.0)]
)
def test_kept_and_masked_patches_part_the_volume(grid, ratio):
    keep, masked = draw(3, grid, ratio)
    num_patches = math.prod(grid)
    assert keep.dtype == masked.dtype == torch.int64
    assert masked.shape == (3, round(num_patches * ratio))
    for both in torch.cat([keep, masked], dim=1):
        assert both.sort().values.tolist() == list(range(num_patches))


def test_every_volume_and_call_has_its_own_mask_and_no_patch_is_favoured():
    torch.manual_seed(0)
    count = torch.zeros(32)
    for _ in range(50):
        _, masked = draw(40, (4, 2, 4), 0.75)
        count += torch.bincount(masked.flatten(), minlength=32)
    assert len({tuple(sorted(row)) for row in masked.tolist()}) == 40
    assert ((count / 2000 - 0.75).abs() < 0.05).all()  # five standard deviations


@pytest.mark.parametrize("ratio", [1.0, -0.1, 1.5, 0.99])
def test_a_mask_ratio_that_leaves_nothing_is_an_error(network, ratio):
    with pytest.raises(InputError, match=f"mask_ratio {ratio} leaves no patch"):
        network(mask_ratio=ratio)


def test_a_mask_ratio_that_masks_nothing_needs_the_volume_branch_off(network, batch):
    with pytest.raises(InputError, match="mask_ratio 0.0 masks no patch"):
        network(mask_ratio=0.0)
    assert network(mask_ratio=0.0, volume=False)(**batch())["patch_features"].shape[1] == 32


# one step


def test_output_has_the_documented_shapes(network, batch):
    inputs = batch()
    output = network()(**inputs)
    hidden = inputs["report_labels"] != -100
    assert {name: tuple(value.shape) for name, value in output.items()} == {
        "volume_pred": (3, 24, 32),
        "volume_target": (3, 24, 32),
        "masked": (3, 24),
        "patch_features": (3, 8, 16),
        "sentence_features": (3, 3, 16),
        "sentence_hash": (3, 3),
        "report_logits": (hidden.sum(), 40),
        "report_target": (hidden.sum(),),
    }
    assert torch.equal(output["report_target"], inputs["report_labels"][hidden])
    patches = patchify(inputs["volume"], (4, 4, 2))
    for b in range(3):
        for place, n in enumerate(output["masked"][b].tolist()):
            assert torch.equal(output["volume_target"][b, place], patches[b, n])


@pytest.mark.parametrize("align_layer", [None, 0, 1])
@pytest.mark.parametrize("sentences", [(3, 1, 0), (0, 0), (1,)])
def test_a_step_reaches_every_trainable_parameter_and_no_frozen_one(network, batch, sentences, align_layer):
    """None without a gradient even where a batch has nothing to align: DDP needs one for each, if only zeros."""
    model = network(align_layer=align_layer)
    total = losses()(model(**batch(sentences=sentences)))
    total.backward()
    assert total.isfinite()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("text_encoder."), name
        assert p.grad is None or p.grad.isfinite().all(), name
    if sentences == (3, 1, 0):
        # a bias of keys shifts all logits of a row alike, so softmax forgets it; its share of the fused bias is skipped
        silent = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() < 1e-9]
        assert [n for n in silent if "key.bias" not in n] == []


def test_the_seed_decides_the_losses(network, batch):
    model, inputs = network(), batch()
    first, again, other = (parts(model, inputs, seed) for seed in (1, 1, 2))
    for name in ("volume", "alignment", "report"):
        assert first[name] == again[name] != other[name], name


def test_padding_never_changes_a_loss(network, batch):
    model, inputs = network().eval(), batch()
    longer = inputs | {
        name: torch.nn.functional.pad(inputs[name], more, value=value)
        for name, more, value in [
            ("findings_ids", (0, 5), 0),
            ("token_place", (0, 0, 0, 5), 0),
            ("token_sentence", (0, 5), -1),
            ("sentence_hash", (0, 2), 0),
            ("report_ids", (0, 6), 0),
            ("report_labels", (0, 6), -100),
        ]
    }
    torch.testing.assert_close(parts(model, longer), parts(model, inputs), atol=1e-5, rtol=1e-5)


def test_a_few_steps_lower_every_loss(network, batch):
    torch.manual_seed(0)
    model, inputs = network(mask_ratio=0.5), batch(sentences=(3, 2, 2))
    before = parts(model.eval(), inputs)
    model.train()
    loss, optimizer = losses(), torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss(model(**inputs)).backward()
        optimizer.step()
    after = parts(model.eval(), inputs)
    for name in ("volume", "alignment", "report"):
        assert after[name] < 0.9 * before[name], name


def test_bfloat16_autocast_is_finite_and_near_float32(network, batch):
    model, inputs = network().eval(), batch()
    expected = parts(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        lower = parts(model, inputs)
        torch.manual_seed(0)
        losses()(model(**inputs)).backward()
    assert all(value.dtype == torch.float32 for value in lower.values())
    torch.testing.assert_close(lower, expected, atol=0.1, rtol=0.05)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# branches


@pytest.mark.parametrize("off", ["volume", "alignment", "report"])
def test_a_branch_that_is_none_is_not_computed_and_the_others_do_not_notice(network, batch, off):
    model, inputs = network().eval(), batch()
    expected = parts(model, inputs)
    setattr(model, BRANCHES[off], None)
    texts = []
    model.text_encoder.model.register_forward_pre_hook(
        lambda module, args, kwargs: texts.append(kwargs["input_ids"]), with_kwargs=True
    )
    torch.manual_seed(0)
    output = model(**inputs)
    assert set(output) == set().union(*(names for branch, names in OUTPUTS.items() if branch != off))
    read = {"volume": ["findings_ids", "report_ids"], "alignment": ["report_ids"], "report": ["findings_ids"]}[off]
    assert len(texts) == len(read) and all(torch.equal(t, inputs[name]) for t, name in zip(texts, read, strict=True))
    found = losses(**{off: 0.0}).parts(output)
    for name in set(BRANCHES) - {off}:
        torch.testing.assert_close(found[name], expected[name])


def test_volume_modelling_alone_needs_no_text_encoder(network, batch):
    model = SimCroP(network().encoder, volume_decoder=network().volume_decoder)
    assert losses(alignment=0, report=0)(model(**batch())).isfinite()


# alignment


@pytest.mark.parametrize("align_layer", [0, 1, 2, None])
def test_align_layer_says_which_tokens_are_aligned(network, batch, align_layer):
    model, inputs = network(align_layer=align_layer).eval(), batch()
    torch.manual_seed(0)
    keep, _ = model.draw_masks(inputs["volume"])
    torch.manual_seed(0)
    features = model(**inputs)["patch_features"]
    tokens, hidden = model.encoder(inputs["volume"], keep)
    states = {None: tokens, 0: model.encoder.embed(inputs["volume"], keep), 1: hidden[0], 2: hidden[1]}
    torch.testing.assert_close(features, model.aligner.patch_projection(states[align_layer][:, 1:]))


def test_aligned_patches_are_drawn_apart_from_the_mask_and_air_last(network, batch):
    model, inputs = network(align_layer=0, align_ratio=0.75).eval(), batch()
    inputs["volume"][:, :, :8] = -1.0  # half of the patches
    drawn = model.draw_aligned(inputs["volume"])
    assert drawn.shape == (3, 24)
    for row in drawn.tolist():
        assert len(set(row)) == 24
        assert set(range(16, 32)) < set(row)
    torch.manual_seed(0)
    features = model(**inputs)["patch_features"]
    torch.manual_seed(0)
    model.draw_masks(inputs["volume"])
    described = gather_tokens(model.encoder.describe(inputs["volume"]), model.draw_aligned(inputs["volume"]))
    torch.testing.assert_close(features, model.aligner.patch_projection(described))


@pytest.mark.parametrize(
    "keys", [{"align_ratio": 0.0}, {"align_ratio": 1.1}, {"align_layer": 1}, {"align_layer": None}]
)
def test_an_align_ratio_that_cannot_be_is_an_error(network, keys):
    with pytest.raises(InputError, match="align_ratio .* is to be above 0, at most 1, and beside align_layer 0"):
        network(**({"align_layer": 0, "align_ratio": 0.5} | keys))


def test_encode_ratio_lets_the_blocks_encode_the_first_volumes_of_a_batch(network, batch):
    model, inputs = network(align_layer=0, align_ratio=0.5, encode_ratio=0.5, instance=True), batch()
    rows = {"volume_pred": 2, "volume_target": 2, "masked": 2, "instance_features": 2, "patch_features": 3}
    output = model(**inputs)
    assert {name: len(output[name]) for name in rows} == rows
    labels = inputs["report_labels"][:2]
    assert torch.equal(output["report_target"], labels[labels != -100])
    assert {len(model.eval()(**inputs)[name]) for name in rows} == {3}


@pytest.mark.parametrize("encode_ratio", [0.0, 1.5, 0.5])
def test_an_encode_ratio_that_cannot_be_is_an_error(network, encode_ratio):
    with pytest.raises(InputError, match=f"encode_ratio {encode_ratio} is to be above 0, at most 1, and 1 where"):
        network(encode_ratio=encode_ratio)


def test_instance_feature_is_the_projected_mean_of_the_last_blocks_visible_patches(network, batch):
    model, inputs = network(instance=True).eval(), batch()
    torch.manual_seed(0)
    keep, _ = model.draw_masks(inputs["volume"])
    torch.manual_seed(0)
    features = model(**inputs)["instance_features"]
    _, hidden = model.encoder(inputs["volume"], keep)
    expected = model.instance_projection(hidden[-1][:, 1:].mean(1, keepdim=True))
    torch.testing.assert_close(features, expected)


def test_instance_features_tell_volumes_apart_that_share_all_but_a_little():
    torch.manual_seed(0)
    mean, own = torch.randn(1, 1, 24), torch.randn(6, 1, 24)
    projection = InstanceProjection(24, 16)
    near, far = projection(mean + 0.01 * own), projection(own)
    torch.testing.assert_close(near, far, atol=0.1, rtol=0.1)
    assert F.cosine_similarity(near[0], near[1:], dim=-1).max() < 0.9
    torch.testing.assert_close(projection(own[:1]), projection.linear.bias.expand(1, 1, -1))


@pytest.mark.parametrize(("statistics", "leaks"), [({"hu_bins": 4}, False), ({"scale_space": [2, 4]}, True)])
def test_only_a_scale_space_shows_visible_patches_what_is_masked(network, batch, statistics, leaks):
    model, inputs = network(statistics=statistics).eval(), batch()
    keep, masked = model.draw_masks(inputs["volume"])
    patches = patchify(inputs["volume"], (4, 4, 2))
    for b, hidden in enumerate(masked):
        patches[b, hidden] = 0.5
    other = unpatchify(patches, (4, 2, 4), (4, 4, 2))
    tokens = [model.encoder(volume, keep)[0] for volume in (inputs["volume"], other)]
    assert torch.equal(*tokens) is not leaks


def test_align_layer_beyond_the_last_block_is_an_error(network):
    with pytest.raises(InputError, match="align_layer 3 is larger than num_layers 2"):
        network(align_layer=3)


def test_a_sentence_is_read_where_its_tokens_stand(network, batch):
    """Report 0 of three sentences, each of three tokens: as one text, and as three texts that stand in other rows."""
    model, inputs = network().eval(), batch()
    whole, words = inputs["findings_ids"][:1], inputs["findings_ids"][0, 1:10].reshape(3, 3)
    alone = torch.nn.functional.pad(torch.tensor([[2, *sentence, 3] for sentence in words]), (0, 6))
    apart = inputs | {"findings_ids": torch.cat([inputs["findings_ids"], alone])}
    apart["token_place"] = inputs["token_place"].clone()
    apart["token_place"][0, 1:10] = torch.tensor([[3 + s, 1 + t] for s in range(3) for t in range(3)])
    for given, expected in [(inputs, model.text_encoder(whole)[0, 4:7]), (apart, model.text_encoder(alone)[1, 1:4])]:
        features = model(**given)["sentence_features"]
        expected = model.aligner.sentence_projection(expected).mean(0)
        torch.testing.assert_close(features[0, 1], expected, atol=1e-5, rtol=1e-4)
        assert not features[inputs["sentence_hash"] == 0].any()


def test_sentence_feature_is_the_mean_of_its_projected_tokens():
    torch.manual_seed(0)
    aligner = Aligner(8, 6, 4)
    tokens = torch.randn(2, 6, 6)
    index = torch.tensor([[-1, 0, 0, 1, -1, -1], [-1, 0, 1, 1, 1, -1]])
    features = aligner.sentences(tokens, index, 3)
    assert features.shape == (2, 3, 4) and not features[:, 2].any()
    for b in range(2):
        for s in range(2):
            members = [aligner.sentence_projection(tokens[b, t]) for t in range(6) if index[b, t] == s]
            torch.testing.assert_close(features[b, s], sum(members) / len(members))


def test_projection_is_linear_gelu_norm_linear():
    torch.manual_seed(0)
    first, _, norm, last = projection = Aligner(8, 6, 4).patch_projection
    x = torch.randn(5, 8)
    hidden = torch.nn.functional.gelu(x @ first.weight.T + first.bias)
    expected = torch.nn.functional.layer_norm(hidden, (4,), norm.weight, norm.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(projection(x), expected)


def test_similarity_is_the_cosine_and_maps_keep_the_grid():
    torch.manual_seed(0)
    patches, sentences = torch.randn(12, 5), torch.randn(2, 5)
    cosines = similarity(patches, sentences)
    for s in range(2):
        for n in range(12):
            expected = sentences[s] @ patches[n] / sentences[s].norm() / patches[n].norm()
            torch.testing.assert_close(cosines[s, n], expected)
    # odd patches have a middle voxel, where the map is the patch's own value
    maps = upsample_patches(cosines, (2, 3, 2), (6, 9, 6))
    torch.testing.assert_close(maps[:, 1::3, 1::3, 1::3].flatten(1), cosines)


def test_embedder_gives_projected_features_of_all_patches(network, batch):
    model, volume = network(align_layer=1).eval(), batch()["volume"]
    embedder = VolumeEmbedder(model.encoder, model.aligner)
    patches, embedding = embedder.patches_and_embedding(volume)
    _, hidden = model.encoder(volume)
    torch.testing.assert_close(patches, model.aligner.patch_projection(hidden[0][:, 1:]))
    torch.testing.assert_close(embedding, hidden[1][:, 1:].mean(1))
    torch.testing.assert_close(embedder(volume), embedding)


# decoders


def test_volume_decoder_answers_in_the_order_it_is_asked(network, batch):
    model, volume = network().eval(), batch()["volume"]
    keep, masked = model.draw_masks(volume)
    tokens, _ = model.encoder(volume, keep)
    pred = model.volume_decoder(tokens, keep, masked)
    order = torch.randperm(masked.shape[1])
    torch.testing.assert_close(model.volume_decoder(tokens, keep, masked[:, order]), pred[:, order])
    # nor does the order of the visible patches matter, as long as keep tells it
    order = torch.randperm(keep.shape[1])
    shuffled = torch.cat([tokens[:, :1], tokens[:, 1:][:, order]], dim=1)
    torch.testing.assert_close(model.volume_decoder(shuffled, keep[:, order], masked), pred)
    assert not torch.allclose(model.volume_decoder(shuffled, keep, masked), pred, atol=1e-4)


def test_volume_decoder_sees_the_volume_only_through_the_kept_patches(network, batch):
    model, inputs = network().eval(), batch()
    torch.manual_seed(0)
    expected = model(**inputs)
    volume = patchify(inputs["volume"], (4, 4, 2))
    for b, masked in enumerate(expected["masked"]):
        volume[b, masked] = 9.0
    model.encoder.measure = lambda _: volume
    torch.manual_seed(0)
    output = model(**inputs)
    for name in ("volume_pred", "patch_features", "report_logits"):
        torch.testing.assert_close(output[name], expected[name])


def test_report_decoder_ignores_padding_and_reads_patches(network):
    decoder = network().report_decoder.eval()
    features, patches = torch.randn(2, 7, 24), torch.randn(2, 8, 24)
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    masked = torch.tensor([[0, 1, 1, 0, 1, 1, 0], [0, 1, 0, 1, 0, 0, 0]]).bool()
    logits = decoder(features, patches, padding, masked)
    assert logits.shape == (6, 40)
    garbage = torch.where(padding[..., None], 100.0, features)
    torch.testing.assert_close(decoder(garbage, patches, padding, masked), logits)
    alone = decoder(features[1:, :4], patches[1:], padding[1:, :4], masked[1:, :4])
    torch.testing.assert_close(logits[4:], alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(decoder(features, patches.flip(0), padding, masked), logits, atol=1e-4)


def test_report_decoder_takes_patches_as_a_set_and_their_mean_counts(network):
    decoder = network().report_decoder.eval()
    features, patches = torch.randn(1, 5, 24), torch.randn(1, 8, 24)
    padding, masked = torch.zeros(1, 5).bool(), torch.ones(1, 5).bool()
    logits = decoder(features, patches, padding, masked)
    torch.testing.assert_close(decoder(features, patches.flip(1), padding, masked), logits, atol=1e-5, rtol=1e-4)
    with torch.no_grad():  # without the cross-attention, only the mean of the patches is left
        decoder.cross_attention.out_proj.weight.zero_()
    logits = decoder(features, patches, padding, masked)
    mean = patches.mean(1, keepdim=True).expand_as(patches)
    torch.testing.assert_close(decoder(features, mean, padding, masked), logits, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(decoder(features, mean + 1, padding, masked), logits, atol=1e-4)


def test_heads_that_do_not_divide_are_named(network):
    with pytest.raises(InputError, match="report decoder: hidden_size 18.*num_heads 4"):
        ReportDecoder(24, 24, 40, 0, hidden_size=18, num_heads=4)
    with pytest.raises(InputError, match="hidden_size 18.*num_heads 4"):
        VolumeDecoder(network().encoder, hidden_size=18, num_heads=4)


def test_every_part_may_have_its_own_size(text_encoder, batch):
    encoder = SimCroPEncoder(
        1, (16, 8, 8), (4, 4, 2), hidden_size=36, mlp_dim=20, num_layers=1, num_heads=2, class_token=False
    )
    model = SimCroP(
        encoder,
        text_encoder,
        VolumeDecoder(encoder, 30, 1, 5),
        Aligner(36, 24, 10),
        ReportDecoder(36, 24, 40, 0, hidden_size=20, num_layers=1, num_heads=4, mlp_dim=8, max_length=64),
    )
    assert losses()(model(**batch())).isfinite()


# more than one process, and the published size


def two_ranks(gradients, folder: Path, network, batch) -> list:
    """What both of two processes find; forked, since a new process would spend ten seconds on imports."""
    start_processes(run_rank, (gradients, folder, network, batch), nprocs=2, start_method="fork")
    return [torch.load(folder / f"grads{rank}.pt", weights_only=True) for rank in range(2)]


def run_rank(rank: int, gradients, folder: Path, network, batch) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    # DDP ends in it, before its process group. A DDP that outlives the group ends the group's threads itself and keeps
    # the GIL meanwhile, for which the thread of the last exchange may wait: a deadlock, in about 1 run of 200
    torch.save(gradients(rank, network, batch), folder / f"grads{rank}.pt")
    distributed.destroy_process_group()


def gradients_of_all(rank: int, network, batch) -> dict[str, Tensor | None]:
    model = network(seed=rank)
    parallel = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
    loss = losses()
    torch.manual_seed(rank)
    for _ in range(2):  # DDP tells an unused parameter at the second step only
        parallel.zero_grad()
        loss(parallel(**batch(seed=rank, sentences=[(3, 2), (0, 0)][rank]))).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.skipif(torch.cuda.is_available(), reason="autograd's device threads do not survive a fork")
def test_ddp_needs_no_unused_parameter_search_even_if_one_rank_has_no_sentence(network, batch, tmp_path):
    first, second = two_ranks(gradients_of_all, tmp_path, network, batch)
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    assert all(grad is not None and grad.isfinite().all() for grad in first.values())


@pytest.mark.parametrize("align_layer", [None, 0, 1, 2])
@pytest.mark.parametrize("weights", [dict(zip(READS, on, strict=True)) for on in product((0, 1), repeat=4) if any(on)])
@pytest.mark.parametrize("statistics", [{}, {"hu_bins": 4, "statistics_mlp_dim": 8}])
def test_what_no_weighted_loss_reads_is_known_before_the_first_step(network, batch, weights, align_layer, statistics):
    model = selected(network, weights, align_layer, statistics=statistics)
    losses(**weights)(model(**batch())).backward()
    assert model.unread(weights) == [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


# what some weights leave without a gradient; the last weighs all, as the defaults do but for the instance level
SELECTIONS = [
    ({"volume": 1, "alignment": 0, "report": 0, "instance": 1}, 0),
    ({"volume": 0, "alignment": 1, "report": 0, "instance": 0}, 0),
    ({"volume": 0, "alignment": 1, "report": 0, "instance": 1}, 0),
    ({"volume": 0, "alignment": 1, "report": 0, "instance": 0}, 1),
    ({"volume": 1, "alignment": 1, "report": 1, "instance": 1}, None),
]


def selected(network, weights: dict[str, float], align_layer: int | None, **keys) -> SimCroP:
    """The network that train.json makes for these ``loss_weights``."""
    on = {name: bool(weight) for name, weight in weights.items()} | {
        "alignment": bool(weights["alignment"] or weights["instance"])
    }
    return network(align_layer=align_layer, **on, **keys)


def gradients_of_selections(rank: int, network, batch) -> list[dict[str, Tensor]]:
    overlay = json.loads((ROOT / "bundles/pretrain/configs/multi_gpu_train.json").read_text())
    found = []
    for weights, align_layer in SELECTIONS:
        model = selected(network, weights, align_layer)
        config = {"network": model, "loss_weights": weights, "device": torch.device("cpu")}
        parallel = ConfigParser(config | {"parallel": overlay["train#trainer#network"]}).get_parsed_content("parallel")
        assert parallel.module is model
        loss = losses(**weights)
        torch.manual_seed(rank)
        for _ in range(2):
            parallel.zero_grad()
            loss(parallel(**batch(seed=rank, sentences=[(3, 2), (0, 0)][rank]))).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="autograd's device threads do not survive a fork")
def test_several_processes_train_with_all_weights_that_one_trains_with(network, batch, tmp_path):
    """What no weighted loss reads gets no gradient, as in one process; the others are the same in both processes."""
    first, second = two_ranks(gradients_of_selections, tmp_path, network, batch)
    for (weights, align_layer), one, other in zip(SELECTIONS, first, second, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)
        alone = selected(network, weights, align_layer)
        losses(**weights)(alone(**batch())).backward()
        assert set(one) == {name for name, p in alone.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_one_step_at_the_published_size(tmp_path):
    """train.json's own network, loss and optimizer, with BERT-base's size of random weights as the text encoder."""
    config = ConfigParser()
    config.read_config(ROOT / "bundles/pretrain/configs/train.json")
    text_encoder = TextEncoder(BertModel(BertConfig(), add_pooling_layer=False), pad_token_id=0)
    config.update({"mae_checkpoint": None, "device": "cpu", "frozen_text_encoder": None, "tokenizer": None})
    config["network_def#text_encoder"] = text_encoder
    for name in ("aligner#text_size", "network_def#report_decoder#text_size"):
        config[name] = 768
    config["network_def#report_decoder#vocab_size"] = 30522
    config["network_def#report_decoder#pad_token_id"] = 0
    network, loss, optimizer = (config.get_parsed_content(name) for name in ("network", "loss", "optimizer"))
    assert sum(p.numel() for p in network.encoder.parameters()) == 86_630_400

    torch.manual_seed(0)
    words = torch.randint(1000, 30000, (1, 160))
    hidden = torch.rand(1, 160) < 0.75
    output = network(
        volume=torch.rand(1, 1, 224, 224, 112) * 2 - 1,
        findings_ids=words,
        token_place=torch.stack([torch.zeros(160).long(), torch.arange(160)], -1)[None],
        token_sentence=(torch.arange(160) // 20)[None],
        sentence_hash=torch.arange(1, 9)[None],
        report_ids=torch.where(hidden, 103, words),
        report_labels=torch.where(hidden, words, -100),
    )
    assert output["volume_pred"].shape == (1, 2058, 2048) and output["patch_features"].shape == (1, 686, 768)
    total = loss(output)
    total.backward()
    optimizer.step()
    assert total.isfinite()
    for name, p in network.named_parameters():
        assert p.isfinite().all() and (p.grad is not None) == p.requires_grad, name


# sentences over volumes


def test_sentence_maps_show_the_cosine_of_each_patch(minilm, tokenizer):
    torch.manual_seed(0)
    encoder = SimCroPEncoder(
        img_size=(6, 9, 6), patch_size=(3, 3, 3), hidden_size=24, mlp_dim=32, num_layers=1, num_heads=3
    )
    network = VolumeEmbedder(encoder, Aligner(24, 384, 16)).eval()
    text_encoder, sentences = load_text_encoder(minilm), ["No effusion.", "A 3 mm nodule in the left lung."]
    score = SentenceVolumeScore("lse", beta=5.0)
    asked = {"Effusion": {"positive": "Fluid.", "negative": sentences[0]}, "Nodule": sentences[1]}
    inferer = SentenceSimilarityInferer(ZeroShot(queries(sentences), score), text_encoder, tokenizer)
    volume = torch.rand(2, 1, 6, 9, 6)
    with torch.no_grad():
        output, classes = inferer(volume, network), inferer.about(asked, maps=False)(volume, network)
        expected = score(network.patches_and_embedding(volume)[0], inferer._encoded[1]).T
        tokens = encoder(volume)[0][:, 1:]
    torch.testing.assert_close(output["score"], expected)
    assert output["probability"].isnan().all() and "similarity" not in classes
    torch.testing.assert_close(classes["score"][:, 1], expected[:, 1])
    assert ((0 < classes["probability"][:, 0]) & (classes["probability"][:, 0] < 1)).all()
    assert output["similarity"].shape == (2, 2, 6, 9, 6)
    torch.testing.assert_close(output["embedding"], network(volume))
    for s, sentence in enumerate(sentences):
        words = text_encoder(torch.tensor(tokenizer(sentence)["input_ids"])[None])[0, 1:-1]
        feature = network.aligner.sentence_projection(words).mean(0)
        for b in range(2):
            expected = nn.functional.cosine_similarity(network.aligner.patch_projection(tokens[b]), feature[None])
            # the middle voxel of each 3 x 3 x 3 patch keeps the patch's value
            middle = output["similarity"][b, s, 1::3, 1::3, 1::3]
            torch.testing.assert_close(middle.flatten(), expected, atol=1e-5, rtol=1e-4)


def prompts_of_three_classes():
    return read_prompts(
        {"a": {"positive": ["A.", "AA."], "negative": ["No A.", "None.", "Nil."]}, "b": ["B.", "A."], "c": "C."}
    )


@pytest.mark.parametrize("ensemble", ENSEMBLES)
@pytest.mark.parametrize("pool", ["topk_mean", "lse"])
def test_presence_is_what_loops_compute(ensemble, pool):
    generator = torch.Generator().manual_seed(0)
    score = SentenceVolumeScore(pool, top_k=3, beta=5.0, temperature=0.2)
    told = ZeroShot(prompts_of_three_classes(), score, ensemble)
    assert told.sentences == ["A.", "AA.", "No A.", "None.", "Nil.", "B.", "C."]
    patches, features = (torch.randn(*size, 6, generator=generator) for size in ((4, 7), (7,)))
    found = told(patches, features)
    assert found.score.shape == found.probability.shape == (3, 4)
    unit = features / features.norm(dim=-1, keepdim=True)

    def one(volume, sentences):
        rows = [told.sentences.index(sentence) for sentence in sentences]
        if ensemble == "mean_embedding":
            return score(patches[volume, None], unit[rows].mean(0, keepdim=True)).item()
        scores = [score(patches[volume, None], features[row, None]).item() for row in rows]
        return max(scores) if ensemble == "max_score" else sum(scores) / len(scores)

    for volume in range(4):
        positive, negative = one(volume, ["A.", "AA."]), one(volume, ["No A.", "None.", "Nil."])
        assert found.score[0, volume].item() == pytest.approx(positive - negative, abs=1e-5)
        softmax = math.exp(positive / 0.2) / (math.exp(positive / 0.2) + math.exp(negative / 0.2))
        assert found.probability[0, volume].item() == pytest.approx(softmax, abs=1e-5)
        assert found.score[1, volume].item() == pytest.approx(one(volume, ["B.", "A."]), abs=1e-5)
    assert found.probability[1:].isnan().all()


def test_an_unknown_ensemble_is_refused():
    with pytest.raises(InputError, match="mean_score, max_score, mean_embedding"):
        ZeroShot(prompts_of_three_classes(), SentenceVolumeScore(), "median")


def test_sentences_are_scored_alike_by_the_loss_and_under_autocast(network):
    """One score everywhere: lengths do not count, nor does a caller's bfloat16."""
    patches, sentences = torch.randn(2, 40, 16), torch.randn(3, 16)
    score = SentenceVolumeScore()
    expected = SimilarityAlignmentLoss().score(patches, sentences)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(score(patches, sentences), expected)
    torch.testing.assert_close(score(patches * 3, sentences * 0.1), expected)
    for s in range(3):
        torch.testing.assert_close(score.pool(similarity(patches[1], sentences))[s], expected[s, 1])
