"""The three losses against plain loops over volumes, sentences and patches, and what must never change them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from custom_components.errors import InputError
from custom_components.losses import MaskedReportLoss, MaskedVolumeLoss, SimCroPLoss, SimilarityAlignmentLoss
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

TOP_K, TEMPERATURE, BETA = 3, 0.07, 10.0
NEGATIVES = ["report", "volume", "both"]
POOLS = ["topk_mean", "lse"]


def alignment_batch(sentences=(3, 2, 1), seed: int = 0, repeated: bool = False, patches: int = 7) -> list[Tensor]:
    """Patch features [B, 7, 5], sentence features [B, S, 5] with garbage in the padding, sentence ids [B, S]."""
    generator = torch.Generator().manual_seed(seed)
    b, s = len(sentences), max([*sentences, 0])
    patch_features = torch.randn(b, patches, 5, generator=generator)
    sentence_features = torch.randn(b, s, 5, generator=generator)
    sentence_hash = torch.arange(1, b * s + 1).reshape(b, s)
    if repeated:  # the first sentence of every report is the same
        sentence_features[:, 0], sentence_hash[:, 0] = sentence_features[0, 0].clone(), 1
    sentence_hash = sentence_hash * (torch.arange(s) < torch.tensor(sentences)[:, None])
    return [patch_features, sentence_features, sentence_hash]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))


def cross_entropy(logits: list[float], target: int) -> float:
    return -logits[target] + math.log(sum(math.exp(x) for x in logits))


def naive_score(sentence: np.ndarray, patches: np.ndarray, pool: str) -> float:
    cosines = [cosine(sentence, p) for p in patches]
    if pool == "topk_mean":
        return sum(sorted(cosines)[-TOP_K:]) / TOP_K
    return math.log(sum(math.exp(BETA * c) for c in cosines) / len(cosines)) / BETA


def naive_aligned(sentence: np.ndarray, patches: np.ndarray, pool: str) -> np.ndarray:
    cosines = [cosine(sentence, p) for p in patches]
    if pool == "topk_mean":
        best = sorted(range(len(patches)), key=lambda n: cosines[n])[-TOP_K:]
        return sum(patches[n] for n in best) / TOP_K
    weights = [math.exp(BETA * c) for c in cosines]
    return sum(w * p for w, p in zip(weights, patches, strict=True)) / sum(weights)


def real_sentences(sentence_features: np.ndarray, sentence_hash: np.ndarray) -> list[list[np.ndarray]]:
    return [
        [f for f, number in zip(features, ids, strict=True) if number != 0]
        for features, ids in zip(sentence_features, sentence_hash, strict=True)
    ]


def naive_report(patches: np.ndarray, features: np.ndarray, ids: np.ndarray, pool: str) -> float:
    """InfoNCE inside each report: sentence to aligned feature plus aligned feature to sentence, mean over sentences."""
    losses = []
    for volume, sentences in zip(patches, real_sentences(features, ids), strict=True):
        if len(sentences) < 2:
            continue
        aligned = [naive_aligned(s, volume, pool) for s in sentences]
        for i in range(len(sentences)):
            to_aligned = [cosine(sentences[i], a) / TEMPERATURE for a in aligned]
            to_sentence = [cosine(s, aligned[i]) / TEMPERATURE for s in sentences]
            losses.append(cross_entropy(to_aligned, i) + cross_entropy(to_sentence, i))
    return sum(losses) / len(losses) if losses else 0.0


def naive_volume(patches: np.ndarray, features: np.ndarray, ids: np.ndarray, pool: str) -> float:
    """Half sentence against volumes, half volume against sentences of other reports, identical sentences left out."""
    sentences = real_sentences(features, ids)
    numbers = [[n for n in row if n != 0] for row in ids.tolist()]
    losses = []
    for v in range(len(patches)):
        for sentence, number in zip(sentences[v], numbers[v], strict=True):
            own = naive_score(sentence, patches[v], pool) / TEMPERATURE
            other_volumes = [
                naive_score(sentence, patches[u], pool) / TEMPERATURE
                for u in range(len(patches))
                if u != v and numbers[u] and number not in numbers[u]
            ]
            other_sentences = [
                naive_score(other, patches[v], pool) / TEMPERATURE
                for u in range(len(sentences))
                if u != v
                for other, its_number in zip(sentences[u], numbers[u], strict=True)
                if its_number not in numbers[v]
            ]
            losses.append(
                0.5 * cross_entropy([own, *other_volumes], 0) + 0.5 * cross_entropy([own, *other_sentences], 0)
            )
    return sum(losses) / len(losses) if losses else 0.0


def naive_alignment(patches: Tensor, features: Tensor, ids: Tensor, negatives: str, pool: str) -> float:
    arrays = patches.double().numpy(), features.double().numpy(), ids.numpy(), pool
    if negatives == "both":
        return (naive_report(*arrays) + naive_volume(*arrays)) / 2
    return naive_report(*arrays) if negatives == "report" else naive_volume(*arrays)


def alignment_loss(negatives: str, pool: str = "topk_mean") -> SimilarityAlignmentLoss:
    return SimilarityAlignmentLoss(TOP_K, TEMPERATURE, negatives, pool, BETA)


# volume loss


@pytest.mark.parametrize("norm_target", [False, True])
def test_volume_loss_is_the_mean_squared_error_of_the_masked_patches(norm_target):
    torch.manual_seed(0)
    pred, target = torch.randn(2, 3, 8), torch.randn(2, 3, 8) * 3 + 2
    total = 0.0
    for b in range(2):
        for m in range(3):
            patch = [float(x) for x in target[b, m]]
            if norm_target:  # as MAE: mean 0, sample variance 1, eps 1e-6
                mean = sum(patch) / 8
                variance = sum((x - mean) ** 2 for x in patch) / 7
                patch = [(x - mean) / math.sqrt(variance + 1e-6) for x in patch]
            total += sum((float(p) - x) ** 2 for p, x in zip(pred[b, m], patch, strict=True))
    assert MaskedVolumeLoss(norm_target)(pred, target).item() == pytest.approx(total / 48, rel=1e-5)


def test_volume_loss_of_an_empty_patch_is_finite_under_norm_target():
    pred = torch.randn(1, 2, 8, requires_grad=True)
    loss = MaskedVolumeLoss(norm_target=True)(pred, torch.full((1, 2, 8), -1.0))
    loss.backward()
    assert loss.isfinite() and pred.grad.isfinite().all()


# alignment loss


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("sentences", [(3, 2, 1), (2, 4), (1, 1), (3, 0, 2), (5,)])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_alignment_loss_is_what_loops_compute(negatives, pool, sentences, repeated):
    inputs = alignment_batch(sentences, repeated=repeated)
    expected = naive_alignment(*inputs, negatives, pool)
    assert alignment_loss(negatives, pool)(*inputs).item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("sentences", [(3, 2, 1), (3, 0, 2, 1)])
def test_sentences_of_volumes_that_are_not_given_are_negatives_of_the_others(sentences, repeated):
    """The instance level encodes the first volumes of a batch, and has the reports of all."""
    patches, features, ids = alignment_batch(sentences, repeated=repeated)
    found = alignment_loss("volume")(patches[:2], features, ids)
    expected = naive_volume(*(tensor.double().numpy() for tensor in (patches[:2], features)), ids.numpy(), "topk_mean")
    assert found.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    if not repeated:  # else all others are the very sentences of these reports
        assert found.item() != pytest.approx(alignment_loss("volume")(patches[:2], features[:2], ids[:2]).item())


@pytest.mark.parametrize("pool", POOLS)
def test_scores_are_what_loops_compute(pool):
    patches, sentences, _ = alignment_batch()
    scores = alignment_loss("both", pool).score(patches, sentences[0])
    assert scores.shape == (3, 3)
    for s in range(3):
        for v in range(3):
            expected = naive_score(sentences[0, s].double().numpy(), patches[v].double().numpy(), pool)
            assert scores[s, v].item() == pytest.approx(expected, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=4),
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from(NEGATIVES),
    st.sampled_from(POOLS),
    st.floats(-1e4, 1e4, width=32),
)
def test_padding_never_changes_the_alignment_loss(sentences, more, silent, negatives, pool, garbage):
    """Not its length, not what stands in it, and not a further volume whose report has no sentence."""
    patches, features, ids = alignment_batch(tuple(sentences))
    loss = alignment_loss(negatives, pool)
    expected = loss(patches, features, ids)
    b, s = ids.shape
    ids = torch.cat([ids, torch.zeros(b, more, dtype=torch.long)], dim=1)
    features = torch.cat([features, torch.zeros(b, more, 5)], dim=1)
    features = torch.where(ids[..., None] == 0, torch.tensor(garbage), features)
    if silent:
        patches = torch.cat([patches, torch.randn(1, 7, 5)])
        features = torch.cat([features, torch.full((1, s + more, 5), garbage)])
        ids = torch.cat([ids, torch.zeros(1, s + more, dtype=torch.long)])
    torch.testing.assert_close(loss(patches, features, ids), expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=4),
    st.booleans(),
    st.booleans(),
    st.sampled_from(NEGATIVES),
    st.sampled_from(POOLS),
)
def test_alignment_gradients_are_finite_and_padding_gets_none(sentences, zero_padding, repeated, negatives, pool):
    repeated = repeated and max(sentences) > 0
    patches, features, ids = alignment_batch(tuple(sentences), repeated=repeated)
    if zero_padding:  # as Aligner makes it; a zero vector has no direction
        features = features * (ids != 0)[..., None]
    patches.requires_grad_()
    features.requires_grad_()
    loss = alignment_loss(negatives, pool)(patches, features, ids)
    loss.backward()
    assert loss.isfinite()
    assert patches.grad.isfinite().all() and features.grad.isfinite().all()
    assert not features.grad[ids == 0].any()


@pytest.mark.parametrize("pool", POOLS)
def test_reports_of_one_sentence_add_nothing_within_reports(pool):
    loss = alignment_loss("report", pool)
    patches, features, ids = alignment_batch((3, 1, 2))
    without = [tensor[[0, 2]] for tensor in (patches, features, ids)]
    patches.requires_grad_()
    torch.testing.assert_close(loss(patches, features, ids), loss(*without))
    loss(patches, features, ids).backward()
    assert not patches.grad[1].any() and patches.grad[0].any()


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("sentences", [(0, 0), (0,)])
def test_a_batch_without_sentences_gives_zero_that_still_carries_gradients(negatives, sentences):
    """Else some ranks of DDP would wait for gradients that others never send."""
    patches, features, ids = alignment_batch(sentences)
    patches.requires_grad_()
    features.requires_grad_()
    loss = alignment_loss(negatives)(patches, features, ids)
    loss.backward()
    assert loss.item() == 0
    assert patches.grad is not None and not patches.grad.any()
    assert features.grad is not None and not features.grad.any()


@pytest.mark.parametrize("negatives", ["volume", "both"])
def test_a_batch_whose_encoded_volumes_have_no_sentence_gives_zero_that_still_carries_gradients(negatives):
    """Sentences of volumes that are not encoded have nothing to be negatives of."""
    patches, features, ids = alignment_batch((0, 1, 1, 1))
    patches = patches[:1].requires_grad_()
    features.requires_grad_()
    loss = alignment_loss(negatives)(patches, features, ids[:, :1])
    loss.backward()
    assert loss.item() == 0
    assert patches.grad is not None and not patches.grad.any()
    assert features.grad is not None and not features.grad.any()


def test_a_volume_whose_report_holds_the_identical_sentence_is_no_negative():
    loss = alignment_loss("volume")
    patches, features, ids = alignment_batch((1, 1))
    assert loss(patches, features, ids) > 0
    ids[1, 0] = ids[0, 0]
    assert loss(patches, features, ids).item() == 0


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_order_of_the_volumes_does_not_matter(negatives):
    inputs = alignment_batch((3, 2, 1, 3), repeated=True)
    order = [2, 0, 3, 1]
    loss = alignment_loss(negatives)
    torch.testing.assert_close(loss(*inputs), loss(*(tensor[order] for tensor in inputs)))


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_features_that_tell_sentences_apart_lower_the_loss(negatives):
    """Each sentence has patches of its own that point its way, and no other volume has them."""
    _, features, ids = alignment_batch((2, 2))
    features = torch.eye(5)[:4].reshape(2, 2, 5)
    matching = features.repeat_interleave(TOP_K, dim=1)
    loss = alignment_loss(negatives)
    assert loss(matching, features, ids) < 1e-3
    assert loss(torch.ones_like(matching), features, ids) > 0.3


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_more_top_k_than_patches_is_an_error_that_names_the_key(negatives):
    with pytest.raises(InputError, match="top_k is 32, but only 7 patches"):
        SimilarityAlignmentLoss(top_k=32, negatives=negatives)(*alignment_batch())


def test_unknown_choices_are_named():
    with pytest.raises(InputError, match="negatives 'batch'"):
        SimilarityAlignmentLoss(negatives="batch")
    with pytest.raises(InputError, match="align_pool 'max'"):
        SimilarityAlignmentLoss(TOP_K, align_pool="max")(*alignment_batch())


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_half_precision_inputs_are_computed_in_float32(negatives, pool):
    patches, features, ids = alignment_batch()
    patches, features = patches.bfloat16(), features.bfloat16()
    expected = naive_alignment(patches, features, ids, negatives, pool)
    with torch.autocast("cpu", torch.bfloat16):
        loss = alignment_loss(negatives, pool)(patches, features, ids)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-4)


# report loss


def test_report_loss_is_the_mean_cross_entropy():
    torch.manual_seed(0)
    logits, target = torch.randn(4, 6), torch.tensor([5, 0, 2, 2])
    expected = sum(cross_entropy([float(x) for x in row], int(t)) for row, t in zip(logits, target, strict=True)) / 4
    assert MaskedReportLoss()(logits, target).item() == pytest.approx(expected, rel=1e-5)


def test_report_loss_without_masked_tokens_is_zero_with_gradients():
    logits = torch.zeros(0, 6, requires_grad=True)
    loss = MaskedReportLoss()(logits, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and logits.grad.shape == (0, 6)


def test_volume_and_report_losses_take_half_precision_in_float32():
    torch.manual_seed(0)
    a, b, target = torch.randn(1, 2, 8).bfloat16(), torch.randn(1, 2, 8).bfloat16(), torch.tensor([1, 7])
    with torch.autocast("cpu", torch.bfloat16):
        losses = [MaskedVolumeLoss()(a, b), MaskedReportLoss()(a[0], target)]
    assert [loss.dtype for loss in losses] == [torch.float32] * 2
    assert losses[0].item() == pytest.approx((a.double() - b.double()).square().mean().item(), rel=1e-5)
    expected = (cross_entropy(a[0, 0].tolist(), 1) + cross_entropy(a[0, 1].tolist(), 7)) / 2
    assert losses[1].item() == pytest.approx(expected, rel=1e-5)


# their sum


def total_loss(**weights: float) -> SimCroPLoss:
    weights = {"volume": 1.0, "alignment": 1.0, "report": 1.0} | weights
    return SimCroPLoss(weights, MaskedVolumeLoss(), alignment_loss("both"), MaskedReportLoss())


def prediction() -> dict[str, Tensor]:
    torch.manual_seed(0)
    patches, features, ids = alignment_batch()
    return {
        "volume_pred": torch.randn(2, 3, 8),
        "volume_target": torch.randn(2, 3, 8),
        "patch_features": patches,
        "sentence_features": features,
        "sentence_hash": ids,
        "report_logits": torch.randn(4, 6, requires_grad=True),
        "report_target": torch.tensor([5, 0, 2, 2]),
    }


def test_total_is_the_weighted_sum_and_the_parts_are_unweighted():
    loss, pred = total_loss(volume=0.5, alignment=2.0, report=3.0), prediction()
    total = loss(pred)
    expected = {
        "volume": MaskedVolumeLoss()(pred["volume_pred"], pred["volume_target"]),
        "alignment": alignment_loss("both")(pred["patch_features"], pred["sentence_features"], pred["sentence_hash"]),
        "report": MaskedReportLoss()(pred["report_logits"], pred["report_target"]),
    }
    torch.testing.assert_close(total, 0.5 * expected["volume"] + 2 * expected["alignment"] + 3 * expected["report"])
    torch.testing.assert_close(loss.parts(pred), expected)
    assert total.requires_grad


@pytest.mark.parametrize("name", ["volume", "alignment", "report"])
def test_weight_zero_skips_a_loss_and_needs_nothing_for_it(name):
    needed = {
        "volume": ["volume_pred", "volume_target"],
        "alignment": ["patch_features", "sentence_features", "sentence_hash"],
        "report": ["report_logits", "report_target"],
    }
    pred = {key: value for key, value in prediction().items() if key not in needed[name]}
    loss = total_loss(**{name: 0})
    assert loss(pred).isfinite()
    assert set(loss.parts(pred)) == {*needed} - {name}


def test_a_weight_of_no_loss_is_refused():
    weights = {"volume": 1, "alignment": 1, "report": 1, "text": 1}
    with pytest.raises(InputError, match="loss_weights names 'text', which is no loss: name some of volume, alignment"):
        SimCroPLoss(weights, MaskedVolumeLoss(), alignment_loss("both"), MaskedReportLoss())


def test_a_loss_without_a_weight_is_skipped():
    loss = SimCroPLoss({"volume": 1}, MaskedVolumeLoss(), alignment_loss("both"), MaskedReportLoss())
    assert set(loss.parts(prediction())) == {"volume"}


def test_instance_is_the_alignment_of_volumes_of_one_patch_each():
    pred = prediction()
    pred["instance_features"] = pred["patch_features"].mean(1, keepdim=True)
    instance = SimilarityAlignmentLoss(top_k=1, negatives="volume")
    loss = SimCroPLoss({"instance": 0.5}, MaskedVolumeLoss(), alignment_loss("both"), MaskedReportLoss(), instance)
    expected = instance(pred["instance_features"], pred["sentence_features"], pred["sentence_hash"])
    torch.testing.assert_close(loss(pred), 0.5 * expected)


def test_all_weights_zero_is_an_error():
    with pytest.raises(InputError, match="all loss_weights are 0"):
        total_loss(volume=0, alignment=0, report=0)
