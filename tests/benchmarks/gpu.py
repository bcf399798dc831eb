"""What a GPU makes of the three bundles' networks, in at most 8 minutes.

    python -m tests.benchmarks.gpu --out FILE.json
    python -m tests.benchmarks.gpu --device cpu --size tiny

Steps of pre-training by batch size, with and without activation checkpointing and compilation; probe and UNETR; the
loader beside the step; losses and gradients beside a CPU's; two processes that train together. Each part runs in a
process of its own, the most wanted first. A part that fails, and what the time does not allow, is listed with the
reason; the others count. All of it runs on a CPU too, in one process, at a size that says nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from custom_components.cpu import keep_freed
from custom_components.distributed import from_all_ranks
from custom_components.run.precision import fast_bfloat16
from torch.nn.parallel import DistributedDataParallel

from tests.benchmarks import classify, segment
from tests.benchmarks.measure import alone, device, environment, matmul_rate, median_seconds, print_table, write_json
from tests.benchmarks.pretrain import loading, make_batch, parse, simcrop_steps, write_text_encoder, write_volume

ENCODER = {
    "img_size": [32, 32, 16], "patch_size": [8, 8, 4], "hidden_size": 24, "mlp_dim": 32, "num_layers": 4,
    "num_heads": 2,
}  # fmt: skip
SMALL = ENCODER | {
    "volume_decoder_hidden_size": 24, "volume_decoder_layers": 1, "volume_decoder_heads": 2, "projection_size": 16,
    "report_decoder_hidden_size": 24, "report_decoder_mlp_dim": 32, "report_decoder_layers": 1,
    "report_decoder_heads": 2, "top_k": 2,
}  # fmt: skip
SMALL_TEXT = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
BATCH_SIZES = {"published": (1, 8, 14, 32), "tiny": (1, 2)}
VARIANTS = {
    "plain": {},
    "checkpointing": {"use_checkpoint": True},
    "compiled": {"compile": True},
    "compiled, checkpointing": {"compile": True, "use_checkpoint": True},
}
VOLUMES, EPOCHS = 50_000, 200  # CT-RATE's reconstructions, and the published schedule


@dataclass
class Parts:
    """Runs parts until the time is over, keeps what each found, and writes it after each.

    Args:
        seconds: for all parts together; a part that takes longer than what is left is ended.
        apart: each in a process of its own; else all in this one, which spares imports where memory does not count.
        only: names of the parts to run; none for all.
    """

    seconds: float
    out: str | None = None
    apart: bool = True
    only: Sequence[str] = ()
    found: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def __call__(self, name: str, function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any] | None:
        if self.only and name not in self.only:
            return None
        left = self.seconds - (time.monotonic() - self.began)
        try:
            if left <= 0:
                raise RuntimeError("no time was left")
            self.found[name] = alone(function, *args, timeout=left) if self.apart else function(*args)
        except Exception as error:  # of any kind: the other parts count all the same
            self.missing[name] = f"{type(error).__name__}: {error}"
        print(f"{time.monotonic() - self.began:6.1f} s  {name}: {self.missing.get(name, 'done')}", flush=True)
        if self.out is not None:
            Path(self.out).write_text(json.dumps({"parts": self.found, "missing": self.missing}, indent=1) + "\n")
        return self.found.get(name)


def parity(text_encoder: str) -> dict[str, Any]:
    """Losses, and the norm of all gradients, of a small network on the CPU and on the device: same weights and masks.

    In float32 on both, and in bfloat16 on the device.
    """
    found = {}
    for name, place, precision in (
        ("CPU, fp32", torch.device("cpu"), "fp32"),
        ("device, fp32", device(), "fp32"),
        ("device, bf16", device(), "bf16"),
    ):
        parser = parse(text_encoder, precision, SMALL | {"device": place})
        batch = {key: value.to(place) for key, value in make_batch(parser, 4).items()}
        torch.manual_seed(0)
        network, loss = parser.get_parsed_content("network"), parser.get_parsed_content("loss")
        masks = [mask.to(place) for mask in network.draw_masks(torch.empty(4, 1))]  # drawn on the CPU
        network.draw_masks = lambda volume, masks=masks: masks
        pred = parser.get_parsed_content("train#inferer")(batch.pop("image"), network.train(), *batch.values())
        loss(pred).backward()
        gradients = [p.grad.float().cpu() for p in network.parameters() if p.grad is not None]
        found[name] = {key: value.item() for key, value in loss.parts(pred).items()}
        found[name]["gradient"] = torch.nn.utils.get_total_norm(gradients).item()
    return found


def together(
    text_encoder: str, precision: str, batch_size: int, repeats: int, keys: Mapping[str, Any]
) -> dict[str, Any]:
    """A step of two processes: nccl with a GPU each, else gloo, since nccl takes one process per GPU."""
    with tempfile.TemporaryDirectory() as folder:
        options = (folder, text_encoder, precision, batch_size, repeats, dict(keys))
        torch.multiprocessing.spawn(_process, options, nprocs=2)
        return json.loads(Path(folder, "found.json").read_text())


def _process(rank: int, folder: str, *options: Any) -> None:
    keep_freed(device())
    backend = "nccl" if torch.cuda.device_count() > 1 else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(rank)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=2, timeout=timedelta(minutes=2))
    found = _steps(rank, *options) | {"backend": backend}  # DDP ends in it, before its process group
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _steps(
    rank: int, text_encoder: str, precision: str, batch_size: int, repeats: int, keys: dict[str, Any]
) -> dict[str, Any]:
    parser = parse(text_encoder, precision, keys)
    torch.manual_seed(0)
    network, loss, optimizer = (parser.get_parsed_content(key) for key in ("network", "loss", "optimizer"))
    inferer = parser.get_parsed_content("train#inferer")
    # as in multi_gpu_train.json
    ids = [torch.cuda.current_device()] if torch.cuda.is_available() else None
    network = DistributedDataParallel(network.train(), device_ids=ids, forward_sync_buffers=False)
    volume, *texts = make_batch(parser, batch_size).values()
    torch.manual_seed(rank)  # masks differ

    def step() -> None:
        loss(inferer(volume, network, *texts)).backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = median_seconds(step, repeats)
    sums = from_all_ranks(sum(p.detach().double().sum().item() for p in network.parameters()))
    return {"seconds": seconds, "sums_of_weights": sums}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=tuple(BATCH_SIZES), default="published")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps per contender; the median counts")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="loader processes")
    parser.add_argument(
        "--only", nargs="+", default=(), help="parts to run, by their names in the output; all unless given"
    )
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        parser.error("torch finds no GPU here: give --device cpu, and --size tiny to see that all of it runs")
    tiny = args.size == "tiny"
    keys, sizes, text = (SMALL, ENCODER, SMALL_TEXT) if tiny else ({}, None, {})
    precision = "bf16" if fast_bfloat16(device())[0] else "fp32"
    batch_sizes = BATCH_SIZES[args.size]
    parts = Parts(60 * args.minutes, args.out, not tiny, args.only)
    print(environment())
    with tempfile.TemporaryDirectory() as folder:
        write_text_encoder(folder, **text)
        write_volume(Path(folder))
        small = folder if tiny else f"{folder}/small"
        if not tiny:
            write_text_encoder(small, **SMALL_TEXT)

        def steps(variant: str) -> None:
            parts(variant, simcrop_steps, folder, precision, batch_sizes, args.repeats, keys | VARIANTS[variant])

        peak = parts("matrix product", matmul_rate, precision, 256 if tiny else 8192)
        steps("plain")
        parts("parity", parity, small)
        for batch_size in (1, batch_sizes[1]):
            parts(f"probe forward, batch {batch_size}", classify.encode, "simcrop", precision, batch_size, sizes)
        parts("UNETR step, 4 regions", segment.step, "simcrop", precision, args.repeats, sizes)
        parts("UNETR sliding window", segment.window, "simcrop", precision, 1, sizes)
        which = "ours, .nii with z fastest"
        parts("loader", loading, folder, folder, which, args.workers, 2 if tiny else 10)
        parts("two processes", together, folder, precision, batch_sizes[1], args.repeats, keys)
        for variant in list(VARIANTS)[1:]:
            steps(variant)
    report(parts, peak["flops"] if peak else float("nan"), precision, args.size, args.workers)
    write_json(args.out, {"environment": environment(), **vars(args), "parts": parts.found, "missing": parts.missing})


def report(parts: Parts, peak: float, precision: str, size: str, workers: int) -> None:
    """Print what was found as tables, and what was not."""
    found, rows, best, batch_sizes = parts.found, [], float("inf"), BATCH_SIZES[size]
    for variant in [variant for variant in VARIANTS if variant in found]:
        for batch_size in batch_sizes:
            step = found[variant][str(batch_size)]
            if step is None:
                rows.append((variant, batch_size, "out of memory", "", "", ""))
                continue
            rate = sum(step["flops"].values()) / step["seconds"]
            best = min(best, step["seconds"] / batch_size)
            volumes = batch_size / step["seconds"]
            # operations are counted for a text encoder of published size
            share = rate / peak if size == "published" else ""
            rows.append((variant, batch_size, step["seconds"], step["device_gib"], volumes, share))
    header = ("pre-training", "batch", "s per step", "GiB", "volumes per s", "share of the matrix product")
    print_table(f"{precision}, matrix product {peak / 1e12:.3g} TFLOP/s", header, rows)
    others = [(name, part["seconds"], part["device_gib"]) for name, part in found.items() if "device_gib" in part]
    print_table(precision, ("work", "s", "GiB"), others)
    if "parity" in found:
        base = found["parity"]["CPU, fp32"]
        rows = [
            (name, *(values[key] / base[key] - 1 for key in base)) if name != "CPU, fp32" else (name, *base.values())
            for name, values in found["parity"].items()
        ]
        print_table("losses of a small network; below the first row, relative differences", ("", *base), rows)
    if two := found.get("two processes"):
        same = len(set(two["sums_of_weights"])) == 1
        print(f"\ntwo processes, {two['backend']}, batch {batch_sizes[1]} each: {two['seconds']:.3g} s per step; "
              f"their weights are {'the same' if same else 'NOT THE SAME'}")  # fmt: skip
    if best < float("inf"):
        if "loader" in found:
            item = found["loader"]["loader_seconds_per_item"]
            slower = "step" if best > item else "loader"
            print(f"the {slower} is the bottleneck: {best:.3g} s a volume at best, {item:.3g} s to load one with "
                  f"{workers} workers; they keep up from {workers * item / best:.1f} workers on")  # fmt: skip
        if size == "published":
            print(f"{EPOCHS} epochs of {VOLUMES:,} volumes at {best:.3g} s: {EPOCHS * VOLUMES * best / 86400:.3g} days")
    for name, reason in parts.missing.items():
        print(f"not measured: {name} ({reason})")


if __name__ == "__main__":
    main()
