"""One key, any BERT or RoBERTa: folders laid out as four public repositories, with small random weights.

Which files, names of tensors and fields of config.json each has: huggingface.co/google-bert/bert-base-uncased,
FacebookAI/roberta-base, emilyalsentzer/Bio_ClinicalBERT, microsoft/BiomedVLP-CXR-BERT-specialized.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from custom_components.errors import InputError
from custom_components.losses import MaskedReportLoss, MaskedVolumeLoss, SimCroPLoss, SimilarityAlignmentLoss
from custom_components.simcrop import Aligner, ReportDecoder, SimCroP, VolumeDecoder
from custom_components.text import (
    ReportCollate,
    TokenizeReportd,
    load_text_encoder,
    load_tokenizer,
    split_sentences,
    tokenize_sentences,
)
from custom_components.vit import SimCroPEncoder
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import BertConfig, BertForPreTraining, BertTokenizerFast, RobertaConfig, RobertaForMaskedLM

FINDINGS = "There is a 2.3 x 1.8 cm nodule in the right lung. Heart size is normal. No Pleural effusion"
IMPRESSION = "Pulmonary nodule; follow-up is advised."
SMALL = {"hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def wordpieces(cased: bool) -> list[str]:
    text = f"{FINDINGS} {IMPRESSION}"
    characters = sorted(set(text if cased else text.lower()) - {" "})
    words = sorted({word.strip(".,;") for word in (text if cased else text.lower()).split()})
    return SPECIALS + characters + [f"##{c}" for c in characters] + [w for w in words if len(w) > 1]


def bert_weights(vocab_size: int) -> tuple[BertConfig, dict[str, Tensor]]:
    """A BERT with both heads of its pre-training, random everywhere, and the positions' buffer of old files."""
    config = BertConfig(vocab_size=vocab_size, **SMALL)
    state = {name: torch.randn_like(tensor) * 0.2 for name, tensor in BertForPreTraining(config).state_dict().items()}
    state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"].clone()
    return config, state | {"bert.embeddings.position_ids": torch.arange(512)[None]}


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")


def declared(config: BertConfig | RobertaConfig, *fields: str, **more: object) -> dict[str, object]:
    """config.json with these fields alone: the published ones predate most of what transformers writes now."""
    common = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    common += ("hidden_act", "max_position_embeddings", "type_vocab_size", "layer_norm_eps")
    return {name: getattr(config, name) for name in (*common, *fields)} | more


def bert_base_uncased(folder: Path) -> dict[str, Tensor]:
    """Weights in both formats, layer norms by their names of 2018; a vocabulary, and a whole tokenizer."""
    vocabulary = wordpieces(cased=False)
    config, state = bert_weights(len(vocabulary))
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    named = {}
    for name, tensor in state.items():
        for new, former in old.items():
            name = name.replace(new, former)
        named[name] = tensor
    write(folder, config__json=declared(config, model_type="bert", architectures=["BertForMaskedLM"], pad_token_id=0))
    write(
        folder,
        vocab__txt="\n".join(vocabulary) + "\n",
        tokenizer_config__json={"do_lower_case": True, "model_max_length": 512},
    )
    BertTokenizerFast.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    torch.save(named, folder / "pytorch_model.bin")
    return {name.removeprefix("bert."): tensor for name, tensor in state.items()}


def bio_clinical_bert(folder: Path, model_type: str | None = "bert") -> dict[str, Tensor]:
    """Three files that matter: no tokenizer settings, although the vocabulary is cased; weights pickled."""
    vocabulary = wordpieces(cased=True)
    config, state = bert_weights(len(vocabulary))
    content = declared(config) | ({"model_type": model_type} if model_type else {})
    write(folder, config__json=content, vocab__txt="\n".join(vocabulary) + "\n")
    torch.save(state, folder / "pytorch_model.bin")
    return {name.removeprefix("bert."): tensor for name, tensor in state.items()}


def cxr_bert(folder: Path) -> dict[str, Tensor]:
    """A model type and code of its own; a projection beside the BERT; weights pickled."""
    vocabulary = wordpieces(cased=False)
    config, state = bert_weights(len(vocabulary))
    for part, shape in (("dense_to_hidden", (40, 40)), ("dense_to_output", (8, 40))):
        state[f"cls_projection_head.{part}.weight"] = torch.randn(shape)
    names = {"AutoConfig": "configuration_cxrbert.CXRBertConfig", "AutoModel": "modeling_cxrbert.CXRBertModel"}
    more = {"model_type": "cxr-bert", "architectures": ["CXRBertModel"], "projection_size": 8, "auto_map": names}
    write(folder, config__json=declared(config, **more), vocab__txt="\n".join(vocabulary) + "\n")
    remote = {"AutoTokenizer": ["configuration_cxrbert.CXRBertTokenizer", None]}
    tokenizer = {
        "do_lower_case": True,
        "model_max_length": 512,
        "tokenizer_class": "CXRBertTokenizer",
        "auto_map": remote,
    }
    special = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIALS, strict=True))
    write(folder, tokenizer_config__json=tokenizer | special, special_tokens_map__json=special)
    for module in ("configuration_cxrbert", "modeling_cxrbert"):
        (folder / f"{module}.py").write_text(f"open({str(folder / 'executed')!r}, 'w')\nraise RuntimeError('ran')\n")
    torch.save(state, folder / "pytorch_model.bin")
    return {name.removeprefix("bert."): tensor for name, tensor in state.items()}


def roberta_base(folder: Path, tokenizer_json: bool = True) -> dict[str, Tensor]:
    """Byte-level pairs, ``<mask>``, padding id 1, positions from 2 on."""
    folder.mkdir(parents=True, exist_ok=True)
    bpe = ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator([FINDINGS, IMPRESSION] * 3, vocab_size=330, special_tokens=specials)
    bpe.save_model(str(folder))
    if tokenizer_json:
        bpe.save(str(folder / "tokenizer.json"))
        write(folder, tokenizer_config__json={"model_max_length": 512})
    config = RobertaConfig(
        vocab_size=bpe.get_vocab_size(), max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, **SMALL
    )
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    write(folder, config__json=declared(config, model_type="roberta", architectures=["RobertaForMaskedLM"], **ids))
    state = {name: torch.randn_like(tensor) * 0.2 for name, tensor in RobertaForMaskedLM(config).state_dict().items()}
    state |= {"roberta.embeddings.position_ids": torch.arange(514)[None]}
    save_file(
        {n: t for n, t in state.items() if "position_ids" not in n}, folder / "model.safetensors", {"format": "pt"}
    )
    torch.save(state, folder / "pytorch_model.bin")
    return {name.removeprefix("roberta."): tensor for name, tensor in state.items()}


LAYOUTS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "bert-base-uncased": bert_base_uncased,
    "Bio_ClinicalBERT": bio_clinical_bert,
    "without model_type": lambda folder: bio_clinical_bert(folder, None),
    "BiomedVLP-CXR-BERT-specialized": cxr_bert,
    "roberta-base": roberta_base,
    "roberta from vocab.json and merges.txt": lambda folder: roberta_base(folder, False),
}


UNCASED = {"bert-base-uncased", "BiomedVLP-CXR-BERT-specialized"}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(layout: str, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    torch.manual_seed(0)
    return tmp_path / "model", LAYOUTS[layout](tmp_path / "model")


def test_every_weight_of_the_body_is_the_files(model):
    folder, state = model
    encoder = load_text_encoder(str(folder))
    assert encoder.hidden_size == 40
    own = encoder.model.state_dict()
    assert len(own) > 30 and not [name for name in own if "pooler" in name or "cls" in name]
    for name, tensor in own.items():
        assert torch.equal(tensor, state[name]), name
    assert not (folder / "executed").exists()


def test_every_word_of_a_report_has_its_tokens(layout, model):
    folder, _ = model
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.is_fast and tokenizer.model_max_length == 512
    sentences = split_sentences(FINDINGS)
    ids, index = tokenize_sentences(sentences, tokenizer)
    assert tokenizer.unk_token_id not in ids
    for number in (1, 2):  # a cased vocabulary keeps its capitals, although no file says that it should
        expected = sentences[number].lower() if layout in UNCASED else sentences[number]
        assert tokenizer.decode(ids[index == number]).strip() == expected


def test_pre_training_takes_a_step(model):
    """Report to tokens to losses to gradients, as train.json composes them."""
    folder, _ = model
    text_encoder, tokenizer = load_text_encoder(str(folder)), load_tokenizer(str(folder))
    encoder = SimCroPEncoder(
        img_size=(16, 8, 8), patch_size=(4, 4, 2), hidden_size=24, mlp_dim=32, num_layers=2, num_heads=3
    )
    decoder = ReportDecoder(
        24, 40, text_encoder.vocab_size, tokenizer.pad_token_id, hidden_size=24, num_layers=1, num_heads=3, mlp_dim=32
    )
    network = SimCroP(
        encoder,
        text_encoder,
        VolumeDecoder(encoder, hidden_size=18, num_layers=1, num_heads=3),
        Aligner(24, 40, projection_size=16),
        decoder,
    ).train()
    transform = TokenizeReportd(["findings", "impression"], tokenizer)
    report = {"findings": FINDINGS, "impression": IMPRESSION}
    items = [transform(r) | {"image": torch.rand(1, 16, 8, 8)} for r in (report, report | {"findings": ""})]
    batch = ReportCollate(tokenizer)(items)
    masked = batch["report_labels"] != -100
    assert masked.sum() > 10 and (batch["report_ids"][masked] == tokenizer.mask_token_id).all()
    loss = SimCroPLoss(
        {"volume": 1.0, "alignment": 1.0, "report": 1.0},
        MaskedVolumeLoss(),
        SimilarityAlignmentLoss(top_k=2),
        MaskedReportLoss(),
    )
    pred = network(batch.pop("image"), **batch)
    total = loss(pred)
    total.backward()
    assert torch.isfinite(total) and set(loss.parts(pred)) == {"volume", "alignment", "report"}
    trained = [p for p in network.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)
    assert all(p.grad is None for p in text_encoder.parameters())


# what is refused


class Hostile:
    """Runs a shell command as soon as it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_pickled_weights_with_code_are_refused(tmp_path):
    state = bio_clinical_bert(tmp_path)
    torch.save(state | {"pooler.dense.bias": Hostile(tmp_path / "executed")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="no model could be loaded") as told:
        load_text_encoder(str(tmp_path))
    assert "\n" not in str(told.value) and not (tmp_path / "executed").exists()
    assert "weights_only" not in str(told.value) and "might run code" in str(told.value)
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "executed").exists()  # so it would have been


def test_a_config_cannot_choose_a_kernel_of_the_hub(tmp_path):
    bio_clinical_bert(tmp_path)
    expected = load_text_encoder(str(tmp_path))
    content = json.loads((tmp_path / "config.json").read_text())
    for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        write(tmp_path, config__json=content | {key: "someone/attention"})
        model = load_text_encoder(str(tmp_path)).model
        assert model.config._attn_implementation == expected.model.config._attn_implementation == "sdpa"


def test_a_tokenizer_of_another_model_is_told(tmp_path):
    bio_clinical_bert(tmp_path)
    with open(tmp_path / "vocab.txt", "a") as file:
        file.write("more\nwords\n")
    with pytest.raises(InputError, match="its tokenizer has .* tokens, its config.json a vocab_size of"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("load", [load_tokenizer, load_text_encoder])
@pytest.mark.parametrize("path", ["/data/absent", "./absent", "../models/absent", "~/absent", "models/text/absent"])
def test_a_folder_that_is_not_there_is_no_hub_name(load, path):
    with pytest.raises(InputError, match=f"text_encoder {path}: no such folder; give"):
        load(path)


def test_texts_are_as_long_as_there_are_positions(tmp_path):
    roberta_base(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | {"max_position_embeddings": 50}
    (tmp_path / "config.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.model_max_length == 48
    with pytest.raises(InputError, match="max_length 512 exceeds the 48 tokens"):
        TokenizeReportd(["findings", "impression"], tokenizer)


# hub names

HUB_USER = """
import json, sys, time
from custom_components.errors import InputError
from custom_components.text import load_text_encoder, load_tokenizer
for line in sys.stdin:
    start, name = time.monotonic(), line.strip()
    try:
        found = [len(load_tokenizer(name)), load_text_encoder(name).hidden_size]
    except InputError as error:
        found = str(error)
    print(json.dumps([found, time.monotonic() - start]), flush=True)
"""


class Hub(BaseHTTPRequestHandler):
    """Serves the folders under ``root`` as the hub does, without its redirects."""

    root: Path
    requests: list[str]

    def do_HEAD(self) -> None:
        self.requests.append(self.path)
        path = self.path.partition("?")[0].strip("/").removeprefix("api/models/")
        repository, _, name = re.sub("/resolve/[^/]+/", "//", path).partition("//")
        file, known = self.root / repository / name, self.root.joinpath(*path.split("/")[:2]).is_dir()
        if self.path.startswith("/api/models/") and file.is_dir():
            content = json.dumps({"id": repository, "sha": "0" * 40, "siblings": []}).encode()
        elif file.is_file():
            content = file.read_bytes()
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_GET = do_HEAD

    def log_message(self, *args: object) -> None:
        pass


def test_a_hub_name_is_fetched_once_and_never_asked_for_again(tmp_path):
    """And a name that cannot be fetched is told within seconds: unknown, without network, and half in the cache."""
    cxr_bert(tmp_path / "hub" / "org" / "cxr")
    write(
        tmp_path / "hub" / "org" / "half", config__json=(tmp_path / "hub" / "org" / "cxr" / "config.json").read_text()
    )
    Hub.root, Hub.requests = tmp_path / "hub", []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))} | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
    }
    user = subprocess.Popen(
        [sys.executable, "-c", HUB_USER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def ask(name: str) -> object:
        user.stdin.write(name + "\n")
        user.stdin.flush()
        found, seconds = json.loads(user.stdout.readline())
        assert seconds < 8, (name, seconds)
        return found

    try:
        expected = [len(wordpieces(cased=False)), 40]
        assert ask("org/cxr") == expected, Hub.requests
        assert not [path for path in Hub.requests if path.endswith(".py")] and len(Hub.requests) > 3
        Hub.requests.clear()
        assert ask("org/cxr") == expected and not Hub.requests
        assert "no config.json could be loaded; where there is a network" in ask("org/absent")
        assert "no tokenizer could be loaded" in ask("org/half")
        server.shutdown()
        server.server_close()
        assert ask("org/cxr") == expected
        for name in ("org/absent", "org/half"):  # half: config.json is in the cache, a vocabulary is not
            assert f"fetch it once with 'hf download {name} --local-dir DIR'" in ask(name)
    finally:
        user.stdin.close()
        user.wait(10)
    assert not (tmp_path / "hub" / "org" / "cxr" / "executed").exists()


@pytest.mark.slow
def test_a_network_that_swallows_requests_is_given_up(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}",
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "0",
        }
        result = subprocess.run(
            [sys.executable, "-c", HUB_USER], env=environment, input="org/model\n", capture_output=True, text=True
        )
    found, seconds = json.loads(result.stdout)
    assert "hf download org/model" in found and seconds < 20
