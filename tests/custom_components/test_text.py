"""Reports cut into sentences and tokens, and the frozen text encoder in every form it can be handed over."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
import unicodedata
from pathlib import Path

import pytest
import torch
from custom_components.errors import InputError
from custom_components.simcrop import Aligner
from custom_components.text import (
    ReportCollate,
    TextEncoder,
    TokenizeReportd,
    encode_sentences,
    load_text_encoder,
    load_tokenizer,
    queries,
    read_prompts,
    sentence_hash,
    split_sentences,
    titles,
    tokenize_sentences,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import BertConfig, BertForMaskedLM, BertModel, RobertaConfig, RobertaModel

from tests.conftest import BUNDLES, classes_of

FINDINGS = "There is a 2.3 x 1.8 cm nodule in the right lung. Heart size is normal. No pleural effusion"
IMPRESSION = "Pulmonary nodule; follow-up is advised."


def letters(text: str) -> str:
    return "".join(character for character in text if character.isalpha())


# sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("A 2.3 x 1.8 cm nodule. No effusion.", ["A 2.3 x 1.8 cm nodule.", "No effusion."]),
        ("A 1.5 mm nodule is seen. Normal heart.", ["A 1.5 mm nodule is seen.", "Normal heart."]),
        ("Discussed with Dr. Smith. Normal heart.", ["Discussed with Dr. Smith.", "Normal heart."]),
        ("Scar vs. atelectasis. Normal heart.", ["Scar vs. atelectasis.", "Normal heart."]),
        ("- Normal heart.\n* No effusion\n\u2022 A nodule.", ["Normal heart.", "No effusion", "A nodule."]),
        ("1. Normal heart.\n2. No effusion.\n10) A nodule.", ["Normal heart.", "No effusion.", "A nodule."]),
        ("1. Normal heart. 2. No effusion.", ["Normal heart.", "No effusion."]),
        ("Normal heart. No effusion", ["Normal heart.", "No effusion"]),
        ("LUNGS: Clear. MEDIASTINUM/HEART: Normal.", ["Clear.", "Normal."]),
        ("Lungs are clear.Heart is normal.", ["Lungs are clear.", "Heart is normal."]),
        ("No nodule (or mass).Heart is normal.", ["No nodule (or mass).", "Heart is normal."]),
        ("Normal heart.\n\nNo effusion.\r\nA nodule.", ["Normal heart.", "No effusion.", "A nodule."]),
        ("Läsion, 3 \u00b5m groß. Kein Erguss.", ["Läsion, 3 \u00b5m groß.", "Kein Erguss."]),
        ("...  - . 12. 3.5", []),
        ("", []),
        (" \n\t ", []),
    ],
)
def test_sentences_end_where_a_reader_ends_them(text, sentences):
    assert split_sentences(text) == sentences


NUMBERED = "{}. There is a 2.3 x 1.8 cm nodule (series 3, image {}) in the left lobe vs. a scar. It is new. "


@pytest.mark.parametrize(
    "line",
    [
        "".join(NUMBERED.format(i % 99 + 1, i) for i in range(130)),
        "".join(f"{i}) Normal heart. No effusion; see image {i} of 99. " for i in range(1, 99)),
        "Lungs are clear. The heart is normal, as discussed with Dr. Smith. Scar vs. atelectasis. " * 60,
        'He said "no pain. Or little." Normal liver (see above. And below). ' * 60,
    ],
)
def test_a_long_line_is_split_as_by_pysbd_at_once(line, monkeypatch):
    monkeypatch.setattr("custom_components.text.PIECE", len(line))
    whole = split_sentences(line)
    monkeypatch.undo()
    assert len(whole) > 100 and split_sentences(line) == whole


@pytest.mark.parametrize(
    "report",
    [
        "".join(NUMBERED.format(i % 99 + 1, i) for i in range(130))[:12_000],
        "1. Normal heart. " * 700,
        "No nodule seen.[" + "1" * 40 + " Normal heart.",
        "x" * 12_000,
        "(" * 12_000,
    ],
)
def test_time_to_split_grows_with_the_length_alone(report):
    split_sentences("Normal heart.")  # compiles
    start = time.process_time()
    sentences = split_sentences(report)
    assert time.process_time() - start < 0.5  # 0.4 s before for the first, hours for the third
    assert letters("".join(sentences)) == letters(report)


def test_a_report_of_a_million_characters_is_bounded():
    report = "Normal heart. " * 72_000
    start = time.process_time()
    assert set(split_sentences(report)[:-1]) == {"Normal heart."}  # the last is cut
    assert time.process_time() - start < 2
    with pytest.raises(InputError, match="report has 1008000 characters"):
        queries("unused", report=report)


def test_html_is_what_it_stands_for():
    report = "A nodule &gt; 5&nbsp;mm.<br>No effusion.<BR/>Heart &amp; aorta normal.</p><p>R&D, a &not seen; x < y."
    assert split_sentences(report) == [
        "A nodule > 5\u00a0mm.",
        "No effusion.",
        "Heart & aorta normal.",
        "R&D, a &not seen; x < y.",
    ]


@pytest.mark.parametrize("kind", ["zeros", "pipe", "/dev/zero", "folder"])
def test_a_report_file_that_is_none(tmp_path, kind):
    path = Path(kind) if kind.startswith("/") else tmp_path / "report.txt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "zeros":
        path.write_bytes(b"A nod\0ule is seen.")
    with pytest.raises(InputError, match=f"{path} cannot be read as the text of report_file in UTF-8"):
        queries("unused", report_file=path)


def is_subsequence(short: str, long: str) -> bool:
    rest = iter(long)
    return all(character in rest for character in short)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_any_text_can_be_split_and_no_letter_is_invented(text):
    sentences = split_sentences(text)
    assert is_subsequence(letters("".join(sentences)), letters(text))
    assert all(s == s.strip() and letters(s) for s in sentences)


PHRASES = [
    "No effusion.",
    "1.5 mm nodule",
    "Dr. Smith",
    "vs.",
    "(S1/2)",
    "e.g. here",
    "2.",
    "3)",
    "b.",
    "L3.",
    "No. 5",
] + ["...", "?!", "U.S.", "at 5 a.m. The", "Heart normal", "et al.", "Fig. 3.", "10%.", "-", "\n", "mm.No", '"ok."']


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(PHRASES), max_size=8))
def test_no_word_of_a_report_is_lost(phrases):
    text = " ".join(phrases)
    assert letters("".join(split_sentences(text))) == letters(text)


def test_sentence_hash_is_that_of_the_words():
    assert sentence_hash("No  Effusion.") == sentence_hash("no effusion.")
    assert sentence_hash("No effusion.") != sentence_hash("Effusion.")
    assert sentence_hash("No effusion.") == 885827686028336322  # in every process


def test_prompts_in_every_form(tmp_path):
    written = {"nodule": "A nodule.", "fluid": ["Fluid.", "An effusion."], "*": {"positive": "{class} is seen."}}
    written["heart"] = {"positive": ["A large heart."], "negative": ["A small heart.", "No {class}."]}
    (tmp_path / "prompts.json").write_text(json.dumps(written))
    expected = {
        "nodule": (["A nodule."], []),
        "fluid": (["Fluid.", "An effusion."], []),
        "heart": (["A large heart."], ["A small heart.", "No heart."]),
    }
    for prompts in (written, tmp_path / "prompts.json", str(tmp_path / "prompts.json")):
        assert read_prompts(prompts) == expected
        assert list(read_prompts(prompts, ["heart", "lung"])) == ["heart", "lung"]
        assert read_prompts(prompts, ["lung"]) == {"lung": (["lung is seen."], [])}


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({}, "names no class"),
        ({"*": "{class}."}, "names no class"),
        ({"nodule": []}, "no sentence that says 'nodule' is present"),
        ({"nodule": {"negative": ["None."]}}, "no sentence that says 'nodule' is present"),
        ({"nodule": {"positive": ["A."], "negativ": ["B."]}}, "negativ"),
        ({"nodule": [3]}, "[3]"),
        ({"nodule": [" "]}, "give a sentence"),
        ({"nodule": 3}, "give a sentence"),
        ({"nodule": None}, "give a sentence"),
        ({"nodule": {"positive": "A.", "negative": ["B.", "A."]}}, "'A.' as positive and as negative"),
    ],
)
def test_prompts_in_another_form_are_refused(tmp_path, written, words):
    with pytest.raises(InputError, match=re.escape(words)):
        read_prompts(written)
    (tmp_path / "prompts.json").write_text(json.dumps(written))
    with pytest.raises(InputError, match=re.escape(words)):
        read_prompts(tmp_path / "prompts.json")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": "A.", "a": "B."}', "\0", "[" * 100_000])
def test_a_file_of_prompts_that_is_none_is_refused_by_name(tmp_path, text):
    (tmp_path / "prompts.json").write_text(text)
    with pytest.raises(InputError, match="prompts.json"):
        read_prompts(tmp_path / "prompts.json")
    with pytest.raises(InputError, match="absent.json"):
        read_prompts(tmp_path / "absent.json")


def test_a_class_without_prompts_is_named():
    with pytest.raises(InputError, match="no sentence for the class 'heart'"):
        read_prompts({"nodule": "A nodule."}, ["nodule", "heart"])


@pytest.mark.parametrize("data_set", ["ct_rate", "radchestct"])
def test_shipped_prompts_have_every_class_on_both_sides(data_set):
    classes, folder = classes_of(data_set), BUNDLES / "pretrain" / "configs" / "prompts"
    files = {path.stem: read_prompts(path, classes) for path in folder.glob("*.json")}
    assert files["ct_clip"]["Emphysema"] == (["Emphysema is present."], ["Emphysema is not present."])
    assert files["hlip"]["Emphysema"] == (["The volume shows: Emphysema."], [])
    for name, (positive, negative) in files["ensemble"].items():
        assert len(set(positive)) == len(positive) >= 5 and len(set(negative)) == len(negative) >= 3, name


def test_queries_take_any_form_and_must_hold_a_sentence():
    assert queries("A nodule.") == {"A nodule.": (["A nodule."], [])}
    assert queries({"nodule": "A nodule."}) == {"nodule": (["A nodule."], [])}
    sides = {"positive": ["A nodule.", "Two nodules."], "negative": "No nodule."}
    found = queries({"nodule": sides, "effusion": "Fluid."})
    assert found == {"nodule": (["A nodule.", "Two nodules."], ["No nodule."]), "effusion": (["Fluid."], [])}
    assert titles(found) == {"class": ["nodule", "effusion"], "sentence": ["A nodule.", "Fluid."]}
    assert list(queries(["{class}", "*"])) == ["{class}", "*"]  # a report's own words
    assert titles(queries(["A nodule.", "No effusion."])) == {"sentence": ["A nodule.", "No effusion."]}
    assert list(queries("unused", report="A nodule. No effusion.")) == ["A nodule.", "No effusion."]
    for wrong in ([3], [" "], ["A nodule.", None]):
        with pytest.raises(InputError, match="give texts"):
            queries(wrong)
    for nothing in ({"sentences": []}, {"sentences": "unused", "report": " - "}):
        with pytest.raises(InputError, match="no sentence"):
            queries(**nothing)


# tokens


def plain(text: str) -> str:
    """As an uncased WordPiece tokenizer sees it: lower case, no accents, no spaces."""
    folded = unicodedata.normalize("NFD", text.lower())
    return re.sub(r"\s", "", "".join(c for c in folded if not unicodedata.combining(c)))


def assert_tokens_spell_their_sentences(sentences, ids, index, tokenizer):
    assert ids.dtype == index.dtype == torch.int64 and ids.shape == index.shape
    for number, sentence in enumerate(sentences):
        assert plain(tokenizer.decode(ids[index == number])) == plain(sentence)
    special = torch.isin(ids, torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id]))
    assert torch.equal(index == -1, special)
    assert torch.equal(index[1:-1], index[1:-1].sort().values)


@pytest.mark.parametrize(
    "sentences",
    [
        ["A 2.3 x 1.8 cm nodule.", "No pneumothorax", "Bronchiectasis, mild."],
        ["Größe: 3 mm.", "Kein Erguss."],
        ["A."],
        [],
        ["Same.", "Same.", "Same."],
    ],
)
def test_tokens_belong_to_the_sentence_they_spell(sentences, tokenizer):
    assert_tokens_spell_their_sentences(sentences, *tokenize_sentences(sentences, tokenizer), tokenizer)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.from_regex(r"[A-Za-z][a-z0-9 ,.()/%-]{0,20}[a-z.]", fullmatch=True), max_size=5))
def test_any_sentences_keep_their_tokens(tokenizer, sentences):
    assert_tokens_spell_their_sentences(sentences, *tokenize_sentences(sentences, tokenizer), tokenizer)


def test_long_texts_are_cut_at_max_length(tokenizer):
    sentences = split_sentences(FINDINGS)
    whole, _ = tokenize_sentences(sentences, tokenizer)
    ids, index = tokenize_sentences(sentences, tokenizer, max_length=15)
    assert len(ids) == len(index) == 15
    assert torch.equal(ids[:-1], whole[:14])
    assert ids[-1] == tokenizer.sep_token_id and index[-1] == -1
    assert index.max() == 0  # the first sentence alone is longer


def test_sentences_beyond_max_length_have_no_number(tokenizer):
    report = {"findings": FINDINGS, "impression": IMPRESSION}
    item = TokenizeReportd(["findings", "impression"], tokenizer, max_length=22)(report)
    assert item["token_sentence"].max() == 1
    assert item["sentence_hash"].tolist() == [sentence_hash(s) for s in split_sentences(FINDINGS)[:2]]
    assert len(item["findings_ids"][0]) == len(item["report_ids"]) == 22


def test_findings_make_the_sentences_and_both_sections_the_report(tokenizer):
    report = {"findings": FINDINGS, "impression": IMPRESSION, "name": "a"}
    item = TokenizeReportd(["findings", "impression"], tokenizer)(report)
    assert item["name"] == "a" and set(report) == {"findings", "impression", "name"}
    (findings,) = item["findings_ids"]
    assert_tokens_spell_their_sentences(split_sentences(FINDINGS), findings, item["token_sentence"], tokenizer)
    assert item["token_place"].tolist() == [[0, column] for column in range(len(findings))]
    assert item["sentence_hash"].tolist() == [sentence_hash(s) for s in split_sentences(FINDINGS)]
    assert plain(tokenizer.decode(item["report_ids"], skip_special_tokens=True)) == plain(FINDINGS + IMPRESSION)


@pytest.mark.parametrize("max_length", [512, 22, 15, 4])
def test_a_sentence_alone_is_tokenised_alone_and_laid_out_as_in_its_report(tokenizer, max_length):
    report = {"findings": FINDINGS, "impression": IMPRESSION}
    whole, alone = (
        TokenizeReportd(["findings", "impression"], tokenizer, max_length, context)(report)
        for context in ("report", "sentence")
    )
    for key in ("token_sentence", "sentence_hash", "report_ids"):
        assert torch.equal(alone[key], whole[key]), key
    count = len(alone["sentence_hash"])
    for text, sentence in zip(alone["findings_ids"], split_sentences(FINDINGS)[:count], strict=True):
        expected = torch.tensor(tokenizer(sentence)["input_ids"])
        assert torch.equal(text[:-1], expected[: len(text) - 1]) and text[-1] == tokenizer.sep_token_id
        assert len(text) == len(expected) or text is alone["findings_ids"][-1]  # the last may be cut
    row, column = alone["token_place"].T
    tokens = torch.stack([alone["findings_ids"][r][c] for r, c in zip(row, column, strict=True)])
    assert torch.equal(tokens, whole["findings_ids"][0])


def test_an_unknown_sentence_context_is_named(tokenizer):
    with pytest.raises(InputError, match="sentence_context 'volume'"):
        TokenizeReportd(["findings", "impression"], tokenizer, sentence_context="volume")


def test_two_sections_are_needed(tokenizer):
    with pytest.raises(InputError, match="two keys"):
        TokenizeReportd("findings", tokenizer)


# batches


REPORTS = [
    {"findings": FINDINGS, "impression": IMPRESSION},
    {"findings": "", "impression": IMPRESSION},
    {"findings": "No pleural effusion", "impression": ""},
    {"findings": "", "impression": ""},
]


def collate(tokenizer, reports=REPORTS, context="report", **keys):
    transform = TokenizeReportd(["findings", "impression"], tokenizer, sentence_context=context)
    items = [transform(report) | {"image": torch.full((1, 2, 2, 2), float(i))} for i, report in enumerate(reports)]
    return items, ReportCollate(tokenizer, **keys)(items)


def test_full_partial_and_empty_reports_share_a_batch(tokenizer):
    items, batch = collate(tokenizer)
    assert batch["image"].shape == (4, 1, 2, 2, 2) and batch["image"][:, 0, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert set(batch) == {
        "image", "findings_ids", "token_place", "token_sentence", "sentence_hash", "report_ids", "report_labels"
    }  # fmt: skip
    assert [(row != 0).sum().item() for row in batch["sentence_hash"]] == [3, 0, 1, 0]
    for i, item in enumerate(items):
        item = item | {
            "findings_ids": item["findings_ids"][0],
            "token_place": item["token_place"] + torch.tensor([i, 0]),
        }
        padded = {"findings_ids": tokenizer.pad_token_id, "token_place": 0, "token_sentence": -1, "sentence_hash": 0}
        for key, padding in padded.items():
            length = len(item[key])
            assert torch.equal(batch[key][i, :length], item[key])
            assert (batch[key][i, length:] == padding).all()


@pytest.mark.parametrize("context", ["report", "sentence"])
def test_every_token_of_a_batch_is_found_again(tokenizer, context):
    _, batch = collate(tokenizer, context=context)
    assert len(batch["findings_ids"]) == {"report": 4, "sentence": 6}[context]  # 3, 1 and 1 sentences, two empty texts
    row, column = batch["token_place"].unbind(-1)
    tokens, expected = batch["findings_ids"][row, column], collate(tokenizer)[1]["findings_ids"]
    words = batch["token_sentence"] >= 0
    assert words.any() and torch.equal(tokens[words], expected[words])


@pytest.mark.parametrize("context", ["report", "sentence"])
def test_a_batch_of_empty_reports_can_be_made(tokenizer, context):
    _, batch = collate(tokenizer, [REPORTS[3]] * 2, context)
    assert batch["sentence_hash"].shape == (2, 0) and (batch["token_sentence"] == -1).all()
    assert (batch["report_labels"] == -100).all()


def test_only_words_are_masked_and_the_labels_tell_them(tokenizer):
    torch.manual_seed(0)
    count = total = 0
    for _ in range(50):
        items, batch = collate(tokenizer)
        for item, ids, labels in zip(items, batch["report_ids"], batch["report_labels"], strict=True):
            true = torch.nn.functional.pad(item["report_ids"], (0, len(ids) - len(item["report_ids"])))
            masked = labels != -100
            assert torch.equal(labels[masked], true[masked])
            assert torch.equal(ids, torch.where(masked, tokenizer.mask_token_id, true))
            words = ~torch.isin(true, torch.tensor(tokenizer.all_special_ids))
            assert not (masked & ~words).any()
            count, total = count + masked.sum().item(), total + words.sum().item()
    assert total > 2000
    assert count / total == pytest.approx(0.75, abs=0.04)  # four standard deviations


def test_masks_are_drawn_anew_at_every_call(tokenizer):
    torch.manual_seed(0)
    first, second = (collate(tokenizer)[1]["report_ids"] for _ in range(2))
    torch.manual_seed(0)
    again = collate(tokenizer)[1]["report_ids"]
    assert not torch.equal(first, second) and torch.equal(first, again)


def test_mask_ratio_is_a_key(tokenizer):
    words = collate(tokenizer, mask_ratio=1.0)[1]["report_labels"] != -100
    assert words.any() and torch.equal(words, collate(tokenizer, mask_ratio=1.0)[1]["report_labels"] != -100)
    assert (collate(tokenizer, mask_ratio=0.0)[1]["report_labels"] == -100).all()


# the text encoder


@pytest.fixture(scope="module")
def real_encoder(minilm) -> TextEncoder:
    return load_text_encoder(minilm)


def findings_ids(tokenizer) -> torch.Tensor:
    return collate(tokenizer)[1]["findings_ids"]


def test_frozen_means_no_gradient_no_dropout_and_no_random_numbers(real_encoder, tokenizer):
    ids = findings_ids(tokenizer)
    parent = torch.nn.ModuleList([real_encoder]).train()
    assert parent.training and not any(module.training for module in real_encoder.modules())
    assert not any(p.requires_grad for p in real_encoder.parameters())
    state = torch.get_rng_state()
    first, second = real_encoder(ids), real_encoder(ids)
    assert torch.equal(first, second) and not first.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (*ids.shape, 384) == (*ids.shape, real_encoder.hidden_size)


def test_padding_does_not_change_the_features_of_tokens(real_encoder, tokenizer):
    ids = findings_ids(tokenizer)
    features = real_encoder(ids)
    longer = real_encoder(torch.nn.functional.pad(ids, (0, 7), value=tokenizer.pad_token_id))
    for row, (text, batched, padded) in enumerate(zip(ids, features, longer, strict=True)):
        length = (text != tokenizer.pad_token_id).sum()
        alone = real_encoder(ids[row : row + 1, :length])[0]
        torch.testing.assert_close(batched[:length], alone, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(padded[:length], alone, atol=1e-5, rtol=1e-4)


def test_amp_keeps_bfloat16_weights_and_gives_the_features_of_autocast(minilm, real_encoder, tokenizer):
    ids = findings_ids(tokenizer)
    with torch.autocast("cpu", torch.bfloat16):
        expected = real_encoder(ids)
    encoder = load_text_encoder(minilm, amp=True)
    assert encoder.model.encoder.layer[0].attention.self.query.weight.dtype == torch.bfloat16
    features = encoder(ids)
    assert features.dtype == torch.float32
    assert torch.equal(features, expected.float())


def test_cached_features_are_those_of_the_forward_pass(minilm, tokenizer):
    encoder = load_text_encoder(minilm, cache_size=8)
    encoded = []
    encoder.model.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len(kwargs["input_ids"])), with_kwargs=True
    )

    def check(ids):
        features = encoder.cached(ids)
        encoded_now = encoded.copy()
        expected, real = encoder(ids), ids != tokenizer.pad_token_id
        encoded.clear()
        torch.testing.assert_close(features[real], expected[real], atol=1e-5, rtol=1e-4)
        assert features.shape == expected.shape and not features[~real].any()
        return encoded_now

    ids = findings_ids(tokenizer)
    longer = torch.nn.functional.pad(ids, (0, 7), value=tokenizer.pad_token_id)
    new = tokenize_sentences(["A nodule."], tokenizer)[0]
    new = torch.nn.functional.pad(new, (0, longer.shape[1] - len(new)), value=tokenizer.pad_token_id)
    assert check(ids) == [3]  # two of the four are empty, which is the same text
    assert check(ids) == []
    assert check(longer.flip(0)) == []
    assert check(ids[2:3, : (ids[2] != tokenizer.pad_token_id).sum()]) == []
    assert check(torch.cat([longer, new[None]])) == [1]
    assert check(torch.cat([new[None], longer])) == []


def test_cache_keeps_no_more_than_asked_for(text_encoder, batch):
    ids = batch(sentences=(1, 2, 3, 4))["findings_ids"]
    expected = text_encoder(ids)
    for size in (0, 2):
        text_encoder.cache_size = size
        for _ in range(2):
            features = text_encoder.cached(ids)
            real = ids != text_encoder.pad_token_id
            torch.testing.assert_close(features[real], expected[real], atol=1e-5, rtol=1e-4)
        assert len(text_encoder._cache) == size


def test_every_sentence_can_be_read_alone(real_encoder, tokenizer):
    _, batch = collate(tokenizer, context="sentence")
    row, column = batch["token_place"].unbind(-1)
    features = real_encoder(batch["findings_ids"])[row, column]
    for b, report in enumerate(REPORTS):
        for s, sentence in enumerate(split_sentences(report["findings"])):
            alone = real_encoder(torch.tensor(tokenizer(sentence)["input_ids"])[None])[0, 1:-1]
            torch.testing.assert_close(features[b, batch["token_sentence"][b] == s], alone, atol=1e-5, rtol=1e-4)


def test_a_sentence_read_alone_is_the_mean_of_its_projected_tokens(real_encoder, tokenizer):
    torch.manual_seed(0)
    aligner = Aligner(8, 384, 16)
    sentences = ["No pleural effusion.", "A 3 mm nodule in the right upper lobe."]
    features = encode_sentences(sentences, aligner, real_encoder, tokenizer)
    for sentence, feature in zip(sentences, features, strict=True):
        tokens = real_encoder(torch.tensor(tokenizer(sentence)["input_ids"])[None])[0, 1:-1]
        torch.testing.assert_close(feature, aligner.sentence_projection(tokens).mean(0), atol=1e-5, rtol=1e-4)


# text encoders in local folders


def copy_tokenizer(minilm: str, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(Path(minilm) / name, folder)
    return folder


def small_bert_config() -> BertConfig:
    return BertConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)


@pytest.mark.parametrize("only_vocabulary", [False, True])
def test_a_bert_of_any_size_loads_from_a_folder(minilm, tmp_path, tokenizer, only_vocabulary):
    folder = copy_tokenizer(minilm, tmp_path / "bert")
    if only_vocabulary:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            (folder / name).unlink()
    model = BertModel(small_bert_config()).eval()
    model.save_pretrained(folder)
    encoder = load_text_encoder(str(folder))
    assert (encoder.hidden_size, encoder.vocab_size, encoder.pad_token_id) == (48, 30522, 0)
    ids = tokenize_sentences(split_sentences(FINDINGS), load_tokenizer(str(folder)))[0]
    assert torch.equal(ids, tokenize_sentences(split_sentences(FINDINGS), tokenizer)[0])
    torch.testing.assert_close(encoder(ids[None]), model(ids[None])[0])
    assert not [name for name, _ in encoder.named_parameters() if "pooler" in name]


def make_cxr_bert(minilm: str, folder: Path, weights: str) -> BertForMaskedLM:
    """Like BiomedVLP-CXR-BERT: own model type, remote code for model and tokenizer, masked-LM and projection heads."""
    copy_tokenizer(minilm, folder)
    config = small_bert_config()
    model = BertForMaskedLM(config).eval()
    state = {k: v.clone() for k, v in model.state_dict().items()} | {"cls_projection_head.weight": torch.rand(8, 48)}
    if weights == "pytorch_model.bin":
        torch.save(state, folder / weights)
    else:
        save_file(state, folder / weights, metadata={"format": "pt"})
    remote = {"AutoConfig": "remote.CXRBertConfig", "AutoModel": "remote.CXRBertModel"}
    declared = config.to_dict() | {
        "model_type": "cxr-bert",
        "auto_map": remote,
        "projection_size": 8,
        "architectures": ["CXRBertModel"],
    }
    (folder / "config.json").write_text(json.dumps(declared))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CXRBertTokenizer", "auto_map": {"AutoTokenizer": ["remote.Tokenizer", None]}})
    )
    (folder / "remote.py").write_text(
        f"open({str(folder / 'executed')!r}, 'w').close()\nraise RuntimeError('remote code ran')\n"
    )
    return model


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors"])
def test_cxr_bert_loads_as_plain_bert_and_its_remote_code_never_runs(minilm, tmp_path, tokenizer, weights):
    model = make_cxr_bert(minilm, tmp_path / "cxr", weights)
    encoder = load_text_encoder(str(tmp_path / "cxr"))
    ids = tokenize_sentences(split_sentences(FINDINGS), load_tokenizer(str(tmp_path / "cxr")))[0]
    assert torch.equal(ids, tokenize_sentences(split_sentences(FINDINGS), tokenizer)[0])
    torch.testing.assert_close(encoder(ids[None]), model.bert(ids[None])[0])
    assert not (tmp_path / "cxr/executed").exists()


@pytest.mark.parametrize("load", [load_tokenizer, load_text_encoder])
@pytest.mark.parametrize("model_type", ["unheard-of", "roberta"])
def test_remote_code_of_any_model_is_never_run_nor_offered(minilm, tmp_path, monkeypatch, model_type, load):
    make_cxr_bert(minilm, tmp_path, "model.safetensors")
    declared = json.loads((tmp_path / "config.json").read_text()) | {"model_type": model_type}
    (tmp_path / "config.json").write_text(json.dumps(declared))
    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    with contextlib.suppress(InputError):
        load(str(tmp_path))
    assert not asked and not (tmp_path / "executed").exists()


def test_a_roberta_with_byte_level_tokens_serves_as_well(tmp_path):
    corpus = [FINDINGS, IMPRESSION, "Größe 3 \u00b5m."] * 3
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(corpus, vocab_size=400, special_tokens=specials)
    bpe.save_model(str(tmp_path))
    config = RobertaConfig(
        vocab_size=bpe.get_vocab_size(),
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=514,
    )
    model = RobertaModel(config).eval()
    model.save_pretrained(tmp_path)

    encoder, tokenizer = load_text_encoder(str(tmp_path)), load_tokenizer(str(tmp_path))
    assert encoder.pad_token_id == tokenizer.pad_token_id == 1
    assert tokenizer.mask_token_id == specials.index("<mask>")
    sentences = [*split_sentences(FINDINGS), "Größe 3 \u00b5m."]
    ids, index = tokenize_sentences(sentences, tokenizer)
    for number, sentence in enumerate(sentences):
        assert tokenizer.decode(ids[index == number]).strip() == sentence
    _, batch = collate(tokenizer)
    masked = batch["report_labels"] != -100
    assert masked.any() and (batch["report_ids"][masked] == tokenizer.mask_token_id).all()
    features = encoder(batch["findings_ids"])
    length = (batch["findings_ids"][0] != 1).sum()
    alone = model(batch["findings_ids"][:1, :length])[0][0]
    torch.testing.assert_close(features[0, :length], alone, atol=1e-5, rtol=1e-4)


def test_a_folder_without_a_tokenizer_is_told(tmp_path):
    BertModel(small_bert_config()).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no tokenizer could be loaded; .* \(no tokenizer.json, vocab.txt, or"):
        load_tokenizer(str(tmp_path))


def test_a_folder_without_config_or_weights_is_told(minilm, tmp_path):
    folder = copy_tokenizer(minilm, tmp_path / "bert")
    for load in (load_tokenizer, load_text_encoder):
        with pytest.raises(InputError, match=r"text_encoder .*bert: no config\.json") as told:
            load(str(folder))
        assert "\n" not in str(told.value)
    small_bert_config().save_pretrained(folder)
    with pytest.raises(InputError, match="no model could be loaded; point text_encoder at a folder"):
        load_text_encoder(str(folder))


def test_a_folder_with_damaged_weights_is_told(minilm, tmp_path):
    folder = copy_tokenizer(minilm, tmp_path / "bert")
    BertModel(small_bert_config()).save_pretrained(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(InputError, match="no model could be loaded"):
        load_text_encoder(str(folder))


def test_missing_weights_are_no_silent_random_start(minilm, tmp_path):
    folder = copy_tokenizer(minilm, tmp_path / "bert")
    model = BertModel(small_bert_config(), add_pooling_layer=False)
    model.config.save_pretrained(folder)
    incomplete = {k: v for k, v in model.state_dict().items() if k != "encoder.layer.1.output.dense.bias"}
    for weights in ({"blocks.0.weight": torch.zeros(2)}, incomplete):
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match="weights lack .* tensors"):
            load_text_encoder(str(folder))


@pytest.mark.parametrize("load", [load_tokenizer, load_text_encoder])
def test_a_name_that_cannot_be_reached_says_how_to_fetch_it(load, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="hf download nobody/no-such-model --local-dir DIR"):
        load("nobody/no-such-model")


def test_a_tokenizer_without_a_mask_token_is_told(tmp_path):
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([FINDINGS], vocab_size=300)
    bpe.save_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(InputError, match="no mask or padding token"):
        load_tokenizer(str(tmp_path))
