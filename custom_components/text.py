"""Report -> sentences -> tokens -> batches -> features of the frozen text encoder."""

import contextlib
import copy
import hashlib
import html
import json
import os
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pysbd
import torch
import transformers
from custom_components.errors import InputError
from custom_components.files import no_key_twice, read_text
from huggingface_hub import HfApi
from monai.config import KeysCollection
from monai.data import list_data_collate
from monai.transforms import MapTransform
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging as transformers_logging

# what is left of HTML where reports were copied out of a web page
LINE_BREAK, ENTITY = re.compile(r"(?i)</?(?:br|p|div|li)\s*/?>"), re.compile(r"&#?\w{1,10};")
BULLET = re.compile(r"^\s*(?:[-*\u2022\u00b7]|\d{1,2}[.)])\s+")
HEADING = re.compile(r"^[A-Z][A-Z /&,-]{2,40}:\s*")
GLUED = re.compile(r"(?<=[a-z)])\.(?=[A-Z])")
# "seen.[12]" is a reference for pySBD, which tries every way to part a long number: twice as long for each digit
LONG_REFERENCE = re.compile(r"\.(?=\[[\d,\s-]{12})")
# where pySBD ends a sentence whatever stands before and behind: after a lower-case word, if that is no abbreviation
SURE_END = re.compile(r"(?<![\w.])([a-z]{3,})[)\]\"]?[.!?][)\]\"]?\s+(?=[A-Z\d])")
PIECE = 1000  # characters that pySBD gets at once: its time grows with their square
MAX_REPORT = 50_000  # characters of a section: ten times as many as any text encoder here reads


def split_sentences(text: str) -> list[str]:
    """Sentences of a report section, of its first 50,000 characters.

    pySBD leaves "2.3 x 1.8 cm", "Dr." and "vs." whole. Lines and bullets end a sentence too, an upper-case heading
    ("LUNGS:") and a bullet's mark are dropped, two sentences without a space between are parted, and what has no letter
    in it is no sentence. The last sentence needs no full stop. "&gt;" and "<br>" of HTML are what they stand for.
    """
    text = ENTITY.sub(lambda found: html.unescape(found[0]), LINE_BREAK.sub("\n", text[:MAX_REPORT]))
    segmenter = pysbd.Segmenter(language="en", clean=False)
    abbreviations = set(segmenter.language_module.Abbreviation.ABBREVIATIONS)
    sentences = []
    for line in filter(str.strip, text.splitlines()):
        line = LONG_REFERENCE.sub(". ", GLUED.sub(". ", line))
        sentences += [s for piece in _pieces(line, abbreviations) for s in segmenter.segment(piece)]
    sentences = [HEADING.sub("", BULLET.sub("", sentence)).strip() for sentence in sentences]
    return [sentence for sentence in sentences if any(character.isalpha() for character in sentence)]


def _pieces(line: str, abbreviations: Container[str]) -> Iterator[str]:
    """A line in parts of at most :data:`PIECE` characters, which end where a sentence surely does, if any does."""
    while len(line) > PIECE:
        ends = [
            match.end()
            for match in SURE_END.finditer(line, 0, PIECE)
            if match[1] not in abbreviations and _closed(line[: match.end()])
        ]
        end = ends[-1] if ends else line.rfind(" ", 0, PIECE) + 1 or PIECE
        yield line[:end]
        line = line[end:]
    yield line


def _closed(text: str) -> bool:
    """Whether no bracket or quotation, of which pySBD parts nothing, is open at the end of a text."""
    # "2)" closes nothing
    return text.rfind("(") <= text.rfind(")") and text.rfind("[") <= text.rfind("]") and text.count('"') % 2 == 0


def sentence_hash(sentence: str) -> int:
    """A positive 63-bit number, the same for the same words in every process; case and spacing do not count."""
    words = " ".join(sentence.lower().split())
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest()) >> 1 or 1


ANY_CLASS = "*"


class Prompts(NamedTuple):
    """Sentences that say a class is present, and sentences that say it is not, of which there may be none."""

    positive: list[str]
    negative: list[str]


def read_prompts(
    prompts: str | os.PathLike | Mapping[str, Any], classes: Sequence[str] | None = None
) -> dict[str, Prompts]:
    """Class -> its prompts, from a mapping, or from a JSON file that holds one.

    A class has ``{"positive": [...], "negative": [...]}``; a sentence alone, or a list, is positive. The class ``*``
    stands for every one that is not named, and ``{class}`` in a sentence for the name of its class.

    Args:
        classes: those wanted, in their order; None for those that are named.

    Raises:
        InputError: the file cannot be read, a class has no prompt or one in another form.
    """
    source = "sentences"
    if not isinstance(prompts, Mapping):
        path = Path(prompts).expanduser()
        source, text = f"prompts {path}", read_text(path, "JSON")
        try:
            prompts = json.loads(text, object_pairs_hook=no_key_twice)
        except (ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError
            raise InputError(f"{source} is not JSON ({error}): write class -> its sentences") from error
        if not isinstance(prompts, Mapping):
            raise InputError(f"{source} holds no mapping: write class -> its sentences")
    names = [name for name in prompts if name != ANY_CLASS] if classes is None else classes
    if not names:
        raise InputError(f"{source} names no class: name one, or give classes that {ANY_CLASS!r} can stand for")
    found = {}
    for name in names:
        if name not in prompts and ANY_CLASS not in prompts:
            raise InputError(f"{source} has no sentence for the class {name!r}: add one, or take it out of classes")
        found[name] = _prompts_of(source, name, prompts.get(name, prompts.get(ANY_CLASS)))
    return found


def _prompts_of(source: str, name: str, said: Any) -> Prompts:
    """The prompts of a class as they are written, in any form."""
    sides = said if isinstance(said, Mapping) else {"positive": said}
    lists = {side: [found] if isinstance(found, str) else found for side, found in sides.items()}
    if not lists.keys() <= set(Prompts._fields) or not all(
        isinstance(found, Sequence) and all(isinstance(s, str) and s.strip() for s in found) for found in lists.values()
    ):
        raise InputError(
            f'{source} has {said!r} for {name!r}: give a sentence, a list, or {{"positive": [...], "negative": [...]}}'
        )
    if not lists.get("positive"):
        raise InputError(f"{source} has no sentence that says {name!r} is present: give one, or several in a list")
    lists = {side: [s.replace("{class}", name) for s in found] for side, found in lists.items()}
    if both := set(lists["positive"]) & set(lists.get("negative", ())):
        raise InputError(f"{source} has {min(both)!r} as positive and as negative of {name!r}: keep one of them")
    return Prompts(list(lists["positive"]), list(lists.get("negative", ())))


def queries(
    sentences: str | Sequence[str] | Mapping[str, Any], report: str | None = None, report_file: str | Path | None = None
) -> dict[str, Prompts]:
    """What to look for, as :func:`read_prompts` has it: the sentences of a report if one is given, else ``sentences``.

    A sentence that belongs to no class stands for itself.

    Args:
        report, report_file: the report's text, or a file in UTF-8 that holds it.

    Raises:
        InputError: there is no sentence, or the report is longer than one can be; both reports are given; the file
            cannot be read.
    """
    if report_file is not None:
        if report is not None:
            raise InputError("report and report_file are given: give one of them")
        report = read_text(Path(report_file).expanduser(), "the text of report_file")
    if report is not None:
        if len(report) > MAX_REPORT:
            raise InputError(
                f"report has {len(report)} characters: give the findings of one scan, {MAX_REPORT} at most"
            )
        sentences = split_sentences(report)
    elif isinstance(sentences, str):
        sentences = [sentences]
    if not sentences:
        raise InputError("sentences and report hold no sentence: give one, as --sentences \"['There is a nodule.']\"")
    if isinstance(sentences, Mapping):
        return read_prompts(sentences)
    for said in sentences:
        if not isinstance(said, str) or not said.strip():
            raise InputError(f"sentences has {said!r}: give texts")
    return {said: Prompts([said], []) for said in sentences}


def titles(prompts: Mapping[str, Prompts]) -> dict[str, list[str]]:
    """The columns that name prompts in a table: the first positive ``sentence``, and its ``class`` if it has one."""
    columns = {"class": list(prompts), "sentence": [said.positive[0] for said in prompts.values()]}
    return columns if columns["class"] != columns["sentence"] else {"sentence": columns["sentence"]}


def tokenize_sentences(
    sentences: Sequence[str], tokenizer: transformers.PreTrainedTokenizerBase, max_length: int = 512
) -> tuple[Tensor, Tensor]:
    """Tokens ``[T]`` of a text with the special ones, cut at ``max_length``, and the sentence ``[T]`` of each; int64.

    Special tokens belong to sentence -1.
    """
    encoded = tokenizer(" ".join(sentences), truncation=True, max_length=max_length, return_offsets_mapping=True)
    start, end = torch.tensor(encoded["offset_mapping"], dtype=torch.long).reshape(-1, 2).T.contiguous()
    sentence_end = torch.tensor([len(sentence) + 1 for sentence in sentences], dtype=torch.long).cumsum(0) - 1
    index = torch.searchsorted(sentence_end, end)
    return torch.tensor(encoded["input_ids"]), torch.where(end > start, index, -1)


class TokenizeReportd(MapTransform):
    """Findings and Impression -> what SimCroP reads of them, as new items of the dictionary, int64.

    Of the Findings: ``findings_ids``, the texts that the text encoder reads, each ``[T]``; ``token_place [L, 2]``, the
    text of each token and its position there; ``token_sentence [L]``, its sentence, -1 for the special tokens at both
    ends; ``sentence_hash [S]``. Of both together: ``report_ids [L]``. An empty section gives special tokens only.

    Args:
        keys: the two sections, Findings first.
        max_length: tokens at most, special tokens included; what lies beyond is dropped.
        sentence_context: what the text encoder reads beside a sentence of the Findings: the whole ``report``, as
            published, or the ``sentence`` alone. In context, every sentence carries traces of its neighbours, by which
            a report can be recognised without the sentence's own finding.
    """

    def __init__(
        self,
        keys: KeysCollection,
        tokenizer: transformers.PreTrainedTokenizerBase,
        max_length: int = 512,
        sentence_context: str = "report",
    ) -> None:
        super().__init__(keys)
        if len(self.keys) != 2:
            raise InputError(f"TokenizeReportd takes two keys, Findings and Impression, not {self.keys}")
        if max_length > tokenizer.model_max_length:
            raise InputError(
                f"max_length {max_length} exceeds the {tokenizer.model_max_length} tokens that the text encoder reads: "
                "lower it"
            )
        if sentence_context not in ("report", "sentence"):
            raise InputError(f"sentence_context {sentence_context!r} is unknown: choose report or sentence")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.sentence_context = sentence_context

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        findings, impression = (split_sentences(data[key]) for key in self.keys)
        ids, sentences = zip(*self._texts(findings), strict=True)
        place = (pad_sequence(ids, batch_first=True, padding_value=-1) >= 0).nonzero()
        sentence = torch.cat(sentences)
        kept = sentence >= 0
        kept[[0, -1]] = True  # as in a text of the whole report, whatever the context
        return dict(data) | {
            "findings_ids": ids,
            "token_place": place[kept],
            "token_sentence": sentence[kept],
            "sentence_hash": torch.tensor([sentence_hash(s) for s in findings[: sentence.max() + 1]], dtype=torch.long),
            "report_ids": tokenize_sentences([*findings, *impression], self.tokenizer, self.max_length)[0],
        }

    def _texts(self, sentences: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """What the text encoder reads at once: tokens, and the sentence of each."""
        if self.sentence_context == "report" or not sentences:
            return [tokenize_sentences(sentences, self.tokenizer, self.max_length)]
        texts, words = [], self.max_length - 2
        for number, sentence in enumerate(sentences):
            if words > 0:
                ids, index = tokenize_sentences([sentence], self.tokenizer, words + 2)
                texts.append((ids, torch.where(index < 0, index, number)))
                words -= len(ids) - 2
        return texts


class ReportCollate:
    """Collate function: batches volumes as MONAI does, pads the texts, and masks the report; drops all other items.

    ``findings_ids [R, T]`` holds the texts of all reports one after another, and ``token_place [B, L, 2]`` the row and
    column there of each token of a report: whatever the text encoder reads at once, a report's tokens lie together.

    A ``mask_ratio`` of the report's tokens, drawn anew at every call and never special ones, is [MASK] in
    ``report_ids``; ``report_labels [B, L]`` int64 holds the true tokens there, and -100 elsewhere. 0.75 is the ratio of
    the authors' follow-up (ToniChopp/ASAP).
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, mask_ratio: float = 0.75) -> None:
        self.pad_token_id = tokenizer.pad_token_id
        self.mask_tokens = transformers.DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=mask_ratio, mask_replace_prob=1.0, random_replace_prob=0.0
        )

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = list_data_collate([{"image": item["image"]} for item in items])
        texts, places = [], []
        for item in items:
            places.append(item["token_place"] + torch.tensor([len(texts), 0]))
            texts += item["findings_ids"]
        sentences = [item["token_sentence"] for item in items]
        hashes = [item["sentence_hash"] for item in items]
        masked = self.mask_tokens([{"input_ids": item["report_ids"]} for item in items])
        return batch | {
            "findings_ids": pad_sequence(texts, batch_first=True, padding_value=self.pad_token_id),
            "token_place": pad_sequence(places, batch_first=True),
            "token_sentence": pad_sequence(sentences, batch_first=True, padding_value=-1),
            "sentence_hash": pad_sequence(hashes, batch_first=True),
            "report_ids": masked["input_ids"],
            "report_labels": masked["labels"],
        }


def _located(name_or_path: str) -> str:
    """``package:NAME/FOLDER`` as the folder of an installed Python package; all else as it is."""
    package, _, folder = name_or_path.removeprefix("package:").partition("/")
    if not name_or_path.startswith("package:"):
        return name_or_path
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"text_encoder {name_or_path}: no package {package!r} is installed; install it with pip")
    return str(Path(spec.submodule_search_locations[0], folder))


def load_tokenizer(name_or_path: str) -> transformers.PreTrainedTokenizerBase:
    """The fast tokenizer of a BERT- or RoBERTa-type model; never runs remote code.

    ``name_or_path`` is a name on the hub, a folder, or ``package:NAME/FOLDER``, a folder in an installed package.

    Its ``model_max_length`` is what the model has positions for. Where no file says whether text must be lower case,
    the vocabulary decides.

    Raises:
        InputError: nothing there, no vocabulary or another model's, or a tokenizer without mask and padding tokens.
    """
    name_or_path = _located(name_or_path)
    config = _load_config(name_or_path)
    is_bert = isinstance(config, transformers.BertConfig)
    loader = transformers.BertTokenizerFast if is_bert else transformers.AutoTokenizer

    def load(name: str, **keys: Any) -> transformers.PreTrainedTokenizerBase:
        tokenizer = loader.from_pretrained(name, **keys)
        words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
        if not words:  # made from no file at all
            raise OSError("no tokenizer.json, vocab.txt, or vocab.json with merges.txt")
        # transformers 5 lowers the case unless tokenizer_config.json says not to, whatever tokenizer.json says
        if is_bert and "do_lower_case" not in get_tokenizer_config(name, **keys):
            if sum(word != word.lower() for word in words) > 0.01 * len(words):
                tokenizer = loader.from_pretrained(name, do_lower_case=False, **keys)
        return tokenizer

    tokenizer = _read(name_or_path, "tokenizer", load)
    if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
        raise InputError(
            f"text_encoder {name_or_path}: its tokenizer has no mask or padding token; take a BERT or RoBERTa"
        )
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"text_encoder {name_or_path}: its tokenizer has {len(tokenizer)} tokens, its config.json a vocab_size of "
            f"{config.vocab_size}; take both from one model"
        )
    # RoBERTa counts positions from the one after the padding's
    positions = config.max_position_embeddings - (0 if is_bert else config.pad_token_id + 1)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return tokenizer


def load_text_encoder(
    name_or_path: str, cache_size: int = 0, device: torch.device | str = "cpu", amp: bool = False
) -> "TextEncoder":
    """A frozen BERT- or RoBERTa-type encoder of any hidden size, from where :func:`load_tokenizer` finds its tokenizer.

    Raises:
        InputError: nothing can be loaded from there, with how to fetch the model once; or weights are missing.
    """
    name_or_path = _located(name_or_path)
    keys = {"config": _load_config(name_or_path), "add_pooling_layer": False, "output_loading_info": True}
    # else config.json may name a kernel of the hub, which is code
    keys["attn_implementation"] = "sdpa"
    model, info = _read(name_or_path, "model", transformers.AutoModel.from_pretrained, **keys)
    if info["missing_keys"]:  # transformers would start these at random
        raise InputError(
            f"text_encoder {name_or_path}: its weights lack {len(info['missing_keys'])} tensors, "
            f"{min(info['missing_keys'])} among them; take a BERT or RoBERTa whose config.json and weights fit"
        )
    encoder = TextEncoder(model, load_tokenizer(name_or_path).pad_token_id, cache_size, amp)
    if amp:  # as long as one tensor is the file's own memory map, all of the file's float32 weights take memory
        encoder = copy.deepcopy(encoder)
    return encoder.to(device)


def _load_config(name_or_path: str) -> transformers.PreTrainedConfig:
    def declaration(name: str, **keys: Any) -> dict[str, Any]:
        declared, _ = transformers.PreTrainedConfig.get_config_dict(name, **keys)
        if not declared:
            raise OSError("there is none")
        return declared

    declared = _read(name_or_path, "config.json", declaration)
    if declared.get("model_type") in (None, "cxr-bert"):
        # BERTs from before there was a model_type; and CXR-BERT, a plain BERT whose remote code only adds a projection
        # that SimCroP does not use
        return transformers.BertConfig.from_dict(declared)
    return _read(name_or_path, "config.json", transformers.AutoConfig.from_pretrained)


def _read(name_or_path: str, what: str, load: Callable[..., Any], **keys: Any) -> Any:
    """Run a ``from_pretrained`` without its messages or remote code, and turn any failure into an InputError.

    A hub name is looked up in the local cache first, so that what was fetched once needs no network. Without a network,
    the error comes within seconds: transformers would repeat every request for minutes.
    """
    local = Path(name_or_path).is_dir()
    if not local and (name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1):
        raise InputError(
            f"text_encoder {name_or_path}: no such folder; give the folder of a BERT or RoBERTa, or its name on the hub"
        )
    keys["trust_remote_code"] = False
    # else a thread would ask the hub, on every load, to make safetensors of weights that are stored otherwise
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # else the heads left out on purpose are listed as unexpected
    transformers_logging.disable_progress_bar()
    try:
        try:
            return load(name_or_path, local_files_only=True, **keys)
        except Exception:  # as below
            if local:
                raise
        HfApi().model_info(name_or_path, timeout=10)
        transformers_logging.enable_progress_bar()
        return load(name_or_path, **keys)
    # transformers raises OSError, ValueError, KeyError, SafetensorError ... for one missing file
    except Exception as error:
        cure = "point text_encoder at a folder that holds config.json, the weights and the tokenizer's files"
        if not local:
            cure = (
                f"where there is a network, fetch it once with 'hf download {name_or_path} --local-dir DIR', and set "
                "text_encoder to DIR"
            )
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "weights_only" in str(error):  # torch's own words would advise to load it all the same
            cause = "its weights are no tensors alone, and might run code"
        raise InputError(f"text_encoder {name_or_path}: no {what} could be loaded; {cure} ({cause})") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


class TextEncoder(nn.Module):
    """A frozen BERT: no gradient, always in eval mode, no pooling head.

    Args:
        model: a ``transformers`` encoder whose first output is ``[B, T, hidden_size]``.
        pad_token_id: positions with this id are padding.
        cache_size: texts whose features :meth:`cached` keeps in memory, about 0.3 MB for 220 tokens of 768 channels.
        amp: keep the linear layers in bfloat16 and autocast around them, with or without the caller's autocast. The
            features are those of autocast on float32 weights, which would be cast again in every step.
    """

    def __init__(self, model: nn.Module, pad_token_id: int, cache_size: int = 0, amp: bool = False) -> None:
        super().__init__()
        self.amp = amp
        for layer in model.modules():
            if amp and isinstance(layer, nn.Linear):
                layer.to(torch.bfloat16)
        self.model = model.requires_grad_(False).eval()
        self.hidden_size: int = model.config.hidden_size
        self.vocab_size: int = model.config.vocab_size
        self.pad_token_id = pad_token_id
        self.cache_size = cache_size
        self._cache: dict[tuple[int, ...], Tensor] = {}

    def train(self, mode: bool = True) -> "TextEncoder":
        """Stays in eval mode: frozen means without dropout too."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        """``ids [B, T]`` int64 -> token features ``[B, T, hidden_size]`` float32."""
        with torch.autocast(ids.device.type, torch.bfloat16) if self.amp else contextlib.nullcontext():
            return self.model(input_ids=ids, attention_mask=(ids != self.pad_token_id).long())[0].float()

    @torch.no_grad()
    def cached(self, ids: Tensor) -> Tensor:
        """As :meth:`forward`, but texts met before are not encoded again. Padding positions hold zeros."""
        if not self.cache_size:
            return self(ids)
        lengths = (ids != self.pad_token_id).sum(1).tolist()
        texts = [tuple(row[:length]) for row, length in zip(ids.tolist(), lengths, strict=True)]
        features = {text: self._cache[text] for text in texts if text in self._cache}
        new = {text: i for i, text in enumerate(texts) if text not in features}
        for text, row in zip(new, self(ids[list(new.values())]) if new else (), strict=True):
            features[text] = row[: len(text)]
            if len(self._cache) < self.cache_size:
                self._cache[text] = features[text].clone()
        padded = pad_sequence([features[text] for text in texts], batch_first=True)
        return nn.functional.pad(padded, (0, 0, 0, ids.shape[1] - padded.shape[1]))


def encode_sentences(
    sentences: Sequence[str],
    aligner: nn.Module,
    text_encoder: TextEncoder,
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> Tensor:
    """Sentences, each read alone -> features ``[S, projection_size]`` float32, to compare with projected patches."""
    device = next(aligner.parameters()).device
    tokenized = [tokenize_sentences([sentence], tokenizer) for sentence in sentences]
    features = []
    for start in range(0, len(tokenized), 64):
        ids, index = zip(*tokenized[start : start + 64], strict=True)
        ids = pad_sequence(list(ids), batch_first=True, padding_value=text_encoder.pad_token_id).to(device)
        index = pad_sequence(list(index), batch_first=True, padding_value=-1).to(device)
        features.append(aligner.sentences(text_encoder.cached(ids), index, 1)[:, 0].float())
    return torch.cat(features)
