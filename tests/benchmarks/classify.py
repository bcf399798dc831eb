"""What the classify bundle costs: encoding one volume, and a published schedule on cached against online features.

    OMP_NUM_THREADS=2 python -m tests.benchmarks.classify --out classify.json

Encoding is timed beside MONAI's own ViT of the same size, and the published architecture of stock parts (``stock``),
each in a process of its own. The ratio of cached to online features for CT-RATE's 1 % schedule is extrapolated from the
pieces that are measured here, with the arithmetic printed: the whole would take days.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from custom_components.cpu import keep_freed
from custom_components.data import phantom
from custom_components.evaluation.metrics import mean_auroc
from custom_components.probe import LinearProbe
from custom_components.run.features import FeatureCache, FeatureDataset, FeatureLoader
from custom_components.vit import SimCroPEncoder
from monai.bundle import ConfigParser
from monai.networks.nets import ViT
from monai.transforms import Compose

from tests.benchmarks.measure import (
    DTYPES,
    alone,
    device,
    device_gib,
    environment,
    matmul_rate,
    median_seconds,
    print_table,
    write_json,
)
from tests.benchmarks.stock import StockEncoder

CONFIGS = Path(__file__).parents[2] / "bundles" / "classify" / "configs"
SIZE = (224, 224, 112)
PUBLISHED_SECONDS = 4.21  # the authors' probe forward, fp32, two cores with AMX (see README)
# CT-RATE, 1 %: lists of the authors
TRAIN_VOLUMES, VALID_VOLUMES, NUM_CLASSES = 464, 3009, 18


def encode(
    contender: str, precision: str, batch_size: int = 1, sizes: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """Seconds to encode volumes of published size, or ours of an encoder of these sizes."""
    torch.manual_seed(0)
    if contender == "simcrop":
        keep_freed(device())
        network = LinearProbe(SimCroPEncoder(**sizes or {}), NUM_CLASSES)
        forward = network.features
    elif contender == "stock":
        network = StockEncoder()
        forward = lambda volume: network(volume)[:, 1:].mean(1)  # noqa: E731
    else:
        network = ViT(1, SIZE, (16, 16, 8), pos_embed_type="sincos", classification=False)
        forward = lambda volume: network(volume)[0].mean(1)  # noqa: E731
    network.eval().to(device())
    volume = torch.rand(batch_size, 1, *(sizes or {}).get("img_size", SIZE), device=device()) * 2 - 1
    autocast = torch.autocast(device().type, DTYPES[precision], enabled=precision != "fp32")
    with torch.inference_mode(), autocast:
        return {"seconds": median_seconds(lambda: forward(volume), repeats=5), "device_gib": device_gib()}


def chain(kind: str) -> list[Any]:
    """The bundle's transforms that read a volume, and crop (plain) or augment it."""
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "train.json"))
    parser.parse(True)
    views = "validate#crop_transforms" if kind == "plain" else "train#random_transforms"
    return [*parser.get_parsed_content("read_transforms"), *parser.get_parsed_content(views)]


def prepared(folder: str, number: int) -> list[dict[str, Any]]:
    """Items of phantoms of 240 x 240 x 120 voxels, as CT-RATE is prepared, which are drawn into ``folder``."""
    phantom.cohort(Path(folder, "cohort"), number, 1, (240, 240, 120), (1.5, 1.5, 3.0), num_workers=1)
    files = sorted(Path(folder).rglob("train_*.nii.gz"))
    return [{"image": str(file), "name": file.name, "label": 0} for file in files]


def read(kind: str) -> dict[str, float]:
    """Seconds to read a prepared volume, and to crop (plain) or to augment it."""
    transforms = Compose(chain(kind)).set_random_state(0)
    with tempfile.TemporaryDirectory() as folder:
        item = prepared(folder, 1)[0]
        return {"seconds": median_seconds(lambda: transforms(item), repeats=5)}


def fill(folder: str, items: Sequence[Mapping[str, Any]], threads: int) -> dict[str, float]:
    """Encode, in this process, what no other has; when that began and ended, and how many volumes."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    keep_freed(device())
    network = LinearProbe(SimCroPEncoder(), NUM_CLASSES).to(device())
    cache = FeatureCache(network, chain("plain"), [], [], device=device(), amp=True, num_workers=0, cache_dir=folder)
    start = time.time()
    cache.encode(items)
    return {"start": start, "end": time.time(), "encoded": cache.encoded}


def share(processes: int, number: int, threads: int) -> dict[str, float]:
    """Volumes in an hour that processes encode into one cache."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(processes) as pool:
        items = prepared(folder, number)
        parts = list(pool.map(lambda _: alone(fill, folder, items, threads), range(processes)))
    assert sum(part["encoded"] for part in parts) == number
    seconds = max(part["end"] for part in parts) - min(part["start"] for part in parts)
    return {"volumes_per_hour": 3600 * number / seconds, "peak_gib": max(part["peak_gib"] for part in parts)}


def head(batch_size: int, steps: int) -> dict[str, float]:
    """Seconds of one training step on features, and of one validation of VALID_VOLUMES."""
    torch.manual_seed(0)

    def dataset(volumes: int, views: int) -> FeatureDataset:
        labels = torch.rand(volumes, NUM_CLASSES).round()
        return FeatureDataset(torch.randn(volumes, views, 768), [{"label": label} for label in labels])

    train, valid = dataset(TRAIN_VOLUMES, 4), dataset(VALID_VOLUMES, 1)
    linear = torch.nn.Linear(768, NUM_CLASSES)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=1e-3, weight_decay=1e-5)
    loader = FeatureLoader(train, batch_size, 0)
    done, start = 0, time.perf_counter()
    while done < steps:
        for batch in loader:
            optimizer.zero_grad()
            logits = linear(batch["image"])
            torch.nn.functional.binary_cross_entropy_with_logits(logits, batch["label"]).backward()
            optimizer.step()
            done += 1
    step = (time.perf_counter() - start) / done
    with torch.inference_mode():
        validation = median_seconds(lambda: mean_auroc(linear(valid.features[:, 0]), valid.labels), repeats=3)
    return {"step": step, "validation": validation}


def extrapolate(encode_seconds: float, plain: float, augmented: float, head: dict[str, float]) -> dict[str, Any]:
    """Both ways through CT-RATE's 1 % schedule, in seconds on one device that reads and encodes in turn."""
    schedule = json.loads((CONFIGS / "train.json").read_text())["schedules"]["0.01"]
    views = json.loads((CONFIGS / "train.json").read_text())["num_views"]
    steps, batch = schedule["max_steps"], schedule["batch_size"]
    per_epoch = -(-TRAIN_VOLUMES // batch)
    epochs = -(-steps // per_epoch)
    seen = epochs * TRAIN_VOLUMES  # an upper bound: the last epoch may end early
    seen = min(seen, steps * batch)
    online_train = seen * (augmented + encode_seconds)
    online_validation = epochs * VALID_VOLUMES * (plain + encode_seconds)
    # a volume is read once for all its views: reading is what plain costs, the rest is the augmentation's
    cached_train = TRAIN_VOLUMES * (plain + (views - 1) * max(0.0, augmented - plain) + views * encode_seconds)
    cached_validation = VALID_VOLUMES * (plain + encode_seconds)
    probe = steps * head["step"] + epochs * head["validation"]
    online = online_train + online_validation
    cached = cached_train + cached_validation + probe
    print("\nCT-RATE at 1 % of the labels, extrapolated, hours")
    print(f"  {steps} steps of {batch} from {TRAIN_VOLUMES} volumes: {epochs} epochs, as many validations")
    print(f"  online: {seen} x ({augmented:.3f} + {encode_seconds:.3f}) s = {online_train / 3600:.2f} to train, "
          f"{epochs} x {VALID_VOLUMES} x ({plain:.3f} + {encode_seconds:.3f}) s = "
          f"{online_validation / 3600:.2f} to validate")  # fmt: skip
    print(f"  cached: {TRAIN_VOLUMES} volumes in {views} views = {cached_train / 3600:.2f}, "
          f"{VALID_VOLUMES} validation volumes once = {cached_validation / 3600:.2f}, "
          f"probe {steps} x {1000 * head['step']:.2f} ms + {epochs} x {head['validation']:.2f} s = "
          f"{probe:.0f} s")  # fmt: skip
    print(f"  online {online / 3600:.2f} h, cached {cached / 3600:.2f} h: ratio {online / cached:.1f}; "
          f"training alone, without validation: {online_train / (cached_train + steps * head['step']):.1f}; "
          f"a second run with other hyper-parameters: {probe:.0f} s, ratio {online / probe:.0f}")  # fmt: skip
    return {
        "epochs": epochs, "online_seconds": online, "cached_seconds": cached, "second_run_seconds": probe,
        "ratio": online / cached, "ratio_second_run": online / probe,
        "ratio_without_validation": online_train / (cached_train + steps * head["step"]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--processes", type=int, default=2, help="that share one feature cache")
    parser.add_argument("--volumes", type=int, default=16, help="that they encode")
    arguments = parser.parse_args()
    rates = {precision: alone(matmul_rate, precision)["flops"] for precision in DTYPES}
    encoding = {
        contender: {precision: alone(encode, contender, precision) for precision in DTYPES}
        for contender in ("simcrop", "stock", "monai_vit")
    }
    rows = [
        (contender, precision, entry["seconds"], entry["peak_gib"], PUBLISHED_SECONDS / entry["seconds"])
        for contender, entries in encoding.items()
        for precision, entry in entries.items()
    ]
    header = ("encoder", "precision", "seconds", "peak GiB", "times faster than the published 4.21 s")
    print_table("one volume of 224 x 224 x 112", header, rows)
    print(f"  this machine's matrix product: fp32 {rates['fp32'] / 1e12:.2f}, bf16 {rates['bf16'] / 1e12:.2f} TFLOP/s")
    reading = {kind: alone(read, kind)["seconds"] for kind in ("plain", "augmented")}
    on_features = alone(head, 32, 1000)
    threads = torch.get_num_threads()
    sharing = {n: share(n, arguments.volumes, max(1, threads // n)) for n in sorted({1, arguments.processes})}
    rows = [(n, max(1, threads // n), entry["volumes_per_hour"], entry["peak_gib"]) for n, entry in sharing.items()]
    header = ("processes", "threads of each", "volumes in an hour", "peak GiB of each")
    print_table(f"{arguments.volumes} volumes into one feature cache, bf16, reading included", header, rows)
    best = min(entry["seconds"] for entry in encoding["simcrop"].values())
    result = extrapolate(best, reading["plain"], reading["augmented"], on_features)
    write_json(
        arguments.out,
        {
            "environment": environment(), "matmul_flops": rates, "encode": encoding, "read": reading,
            "sharing": sharing,
            "head": on_features, "ct_rate_1_percent": result,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
