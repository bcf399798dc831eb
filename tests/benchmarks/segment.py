"""How long a UNETR takes here: ours, the same network as MONAI's blocks make it, MONAI's stock UNETR; and the memory of
one large scan.

    OMP_NUM_THREADS=2 python -m tests.benchmarks.segment --out FILE.json

Every contender runs in a process of its own. Work: a training step on 4 regions of 96 x 96 x 48, and a sliding window
over 256 x 256 x 96 (75 windows, overlap 0.5, Gaussian). ``simcrop`` is ours as the bundle runs it. ``plain`` has its
weights and architecture, and of MONAI's and torch's own what the published code has: instance norm, the default layout
and allocator, every convolution under autocast, MONAI's sliding window. ``monai``, the stock UNETR, knows only patches
of 16 x 16 x 16, hence half the tokens. The published times (``PUBLISHED``) are of another machine.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from custom_components import unetr
from custom_components.cpu import keep_freed
from custom_components.run.handlers import decay_groups
from custom_components.run.inferers import WindowInferer
from custom_components.unetr import InstanceNorm, SimCroPUNETR
from custom_components.vit import SimCroPEncoder
from monai.bundle import ConfigParser
from monai.inferers import sliding_window_inference
from monai.networks.nets import UNETR
from torch import nn

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

REGION, VOLUME = (96, 96, 48), (256, 256, 96)
INFERENCE = Path(__file__).parents[2] / "bundles" / "segment" / "configs" / "inference.json"
# seconds on two cores with AMX, the authors' code patched for CPU
PUBLISHED = {"step": {"fp32": 20.5, "bf16": 13.3}, "window": {"fp32": 70.0, "bf16": 38.0}}
PUBLISHED_MATMUL = {"fp32": 0.31e12, "bf16": 1.9e12}
CONTENDERS = ("simcrop", "plain", "monai")


def make(name: str, sizes: Mapping[str, Any] | None = None) -> nn.Module:
    torch.manual_seed(0)
    if name == "monai":
        network = UNETR(1, 4, REGION, feature_size=16, norm_name="instance", res_block=True, conv_block=True)
        return network.to(device())
    network = SimCroPUNETR(SimCroPEncoder(**{"img_size": REGION} | dict(sizes or {}), class_token=False), 4)
    if name == "simcrop":
        keep_freed(device())
        return network.to(device())
    unetr.convolves_in_float32 = lambda device: False
    for module in list(network.modules()):
        for key, child in module.named_children():
            if isinstance(child, InstanceNorm):
                setattr(module, key, nn.InstanceNorm3d(child.num_features))
    return network.to(device(), memory_format=torch.contiguous_format)


def step(name: str, precision: str, repeats: int, sizes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A training step: forward, DiceCE, backward, AdamW; ours of an encoder of these sizes, or the published."""
    content = ConfigParser(config=ConfigParser.load_config_file(INFERENCE.with_name("train.json")))
    loss = content.get_parsed_content("loss")
    network, region = make(name, sizes).train(), (sizes or {}).get("img_size", REGION)
    fused = True if name == "simcrop" else None  # as train.json has it, and torch's default
    optimizer = torch.optim.AdamW(decay_groups(network, 1e-5), lr=1e-4, fused=fused)
    volume = torch.randn(4, 1, *region, device=device())
    label = torch.randint(0, 4, (4, 1, *region), device=device())

    def run() -> None:
        optimizer.zero_grad()
        with torch.autocast(device().type, torch.bfloat16, enabled=precision == "bf16"):
            logits = network(volume)
        loss(logits.float(), label).backward()
        optimizer.step()

    # memory is new to the process in the first two
    return {"seconds": median_seconds(run, repeats, warmup=2), "device_gib": device_gib()}


def window(name: str, precision: str, repeats: int, sizes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A sliding window over one volume: ours by its own inferer, the others' by ``sliding_window_inference``."""
    network, region = make(name, sizes).eval(), (sizes or {}).get("img_size", REGION)
    volume = torch.randn(1, 1, *(VOLUME if sizes is None else [2 * size for size in region]), device=device())
    inferer = WindowInferer(region, sw_batch_size=4, overlap=0.5, amp=precision == "bf16")

    @torch.inference_mode()
    def run() -> None:
        if name == "simcrop":
            inferer(volume, network)
        else:
            with torch.autocast(device().type, torch.bfloat16, enabled=precision == "bf16"):
                sliding_window_inference(volume, region, 4, network, 0.5, mode="gaussian")

    return {"seconds": median_seconds(run, repeats, warmup=0), "device_gib": device_gib()}


def large_scan(shape: tuple[int, int, int], pixdim: tuple[float, float, float], classes: int) -> dict[str, Any]:
    """inference.json on a synthetic scan of this shape (0.8 x 0.8 x 0.6 mm) with a tiny network: its memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scan.nii"
        rng = np.random.default_rng(0)
        body = np.full(shape, -1000, np.int16)
        x, y = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape[:2]), indexing="ij")
        body[x**2 + 2 * y**2 < 0.7] = 40
        body[..., ::7] += rng.integers(-30, 30, body[..., ::7].shape, dtype=np.int16)
        nib.save(nib.Nifti1Image(body, np.diag([0.8, 0.8, 0.6, 1.0])), path)
        del body, x, y
        names = [f"class {i}" for i in range(1, classes)]
        keys = {"hidden_size": 24, "mlp_dim": 24, "num_layers": 1, "num_heads": 2, "feature_size": 1}
        config = ConfigParser(config=ConfigParser.load_config_file(INFERENCE))
        config.update(keys | {"dataset_dir": str(path), "output_dir": folder, "pixdim": list(pixdim), "classes": names})
        config.update({"network": "@network_def", "overlap": 0.0})
        keep_freed(config.get_parsed_content("device"))
        evaluator = config.get_parsed_content("evaluator")
        evaluator.run()
        labels = nib.load(Path(folder) / "scan" / "labels.nii.gz")
        assert labels.shape == shape
    return {"seconds": evaluator.state.times["COMPLETED"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--large-scan", action="store_true", help="measure the memory of 512 x 512 x 1000 voxels instead"
    )
    arguments = parser.parse_args()
    results: dict[str, Any] = {"environment": environment()}
    if arguments.large_scan:
        for name, pixdim, classes in (("LUNA16", (1.0, 1.0, 1.0), 4), ("BTCV", (1.5, 1.5, 3.0), 14)):
            results[name] = alone(large_scan, (512, 512, 1000), pixdim, classes)
            print(name, results[name], flush=True)
        write_json(arguments.out, results)
        return
    results["matmul"] = {p: alone(matmul_rate, p) for p in PUBLISHED_MATMUL}
    rows = []
    for work, function in (("step", step), ("window", window)):
        results[work] = {}
        for precision in ("fp32", "bf16"):
            results[work][precision] = {}
            for name in CONTENDERS:
                found = alone(function, name, precision, arguments.repeats)
                results[work][precision][name] = found
                ratio = results[work][precision]["simcrop"]["seconds"] / found["seconds"]
                rows.append((work, precision, name, found["seconds"], found["peak_gib"], ratio))
                print(rows[-1], flush=True)
            # what the published time would be if it went by the matrix product alone
            published = PUBLISHED[work][precision]
            scaled = published * PUBLISHED_MATMUL[precision] / results["matmul"][precision]["flops"]
            ratio = results[work][precision]["simcrop"]["seconds"] / scaled
            rows.append((work, precision, f"published {published} s elsewhere, scaled", scaled, math.nan, ratio))
    header = ("work", "precision", "contender", "seconds", "peak GiB", "simcrop / contender")
    print_table("4 regions of 96 x 96 x 48; 75 windows over 256 x 256 x 96", header, rows)
    write_json(arguments.out, results)


if __name__ == "__main__":
    main()
