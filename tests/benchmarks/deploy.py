"""What deploying the segmentation network as TorchScript or ONNX changes: seconds and memory beside the eager network.

    OMP_NUM_THREADS=2 python -m tests.benchmarks.deploy --out FILE.json

Files are made by MONAI's own ``ckpt_export`` and ``onnx_export`` from ``inference.json`` at published size, with random
weights. Work: a forward pass on 4 regions of 96 x 96 x 48, fp32, as the sliding window makes them; each contender in a
process of its own, the time to load the file apart. Every process has imported torch, so peaks compare.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser, ckpt_export, onnx_export
from monai.data import load_net_with_metadata

from tests.benchmarks.measure import alone, environment, median_seconds, print_table, write_json

CONFIGS = Path(__file__).parents[2] / "bundles" / "segment" / "configs"
SHAPE = (4, 1, 96, 96, 48)


def network() -> torch.nn.Module:
    parser = ConfigParser()
    parser.read_config(CONFIGS / "inference.json")
    torch.manual_seed(0)
    return parser.get_parsed_content("network_def").eval()


def regions() -> torch.Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def make(folder: str) -> dict[str, Any]:
    """The three files, and the eager network's output."""
    eager = network()
    torch.save(eager.state_dict(), f"{folder}/model.pt")
    with torch.inference_mode():
        np.save(f"{folder}/expected.npy", eager(regions()).numpy())
    files = {"ckpt_file": f"{folder}/model.pt", "meta_file": str(CONFIGS / "metadata.json")}
    files["config_file"] = str(CONFIGS / "inference.json")
    ckpt_export("network_def", f"{folder}/model.ts", **files)
    onnx_export("network_def", f"{folder}/model.onnx", **files, input_shape=list(SHAPE))
    return {}


def forward(kind: str, folder: str, repeats: int) -> dict[str, Any]:
    start = time.perf_counter()
    if kind == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options, providers=["CPUExecutionProvider"])
        volume, name = regions().numpy(), session.get_inputs()[0].name

        def run() -> np.ndarray:
            return session.run(None, {name: volume})[0]

    else:
        if kind == "eager":
            module = network()
            module.load_state_dict(torch.load(f"{folder}/model.pt", weights_only=True))
        else:
            module = load_net_with_metadata(f"{folder}/model.ts")[0]
        tensor = regions()

        @torch.inference_mode()
        def run() -> np.ndarray:
            return module(tensor).numpy()

    loaded = time.perf_counter() - start
    expected = np.load(f"{folder}/expected.npy")
    difference = float(np.abs(run() - expected).max() / np.abs(expected).max())
    return {"seconds": median_seconds(run, repeats), "load_seconds": loaded, "difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    results: dict[str, Any] = {"environment": environment()}
    with tempfile.TemporaryDirectory() as folder:
        alone(make, folder)
        for kind in ("eager", "torchscript", "onnx"):
            results[kind] = alone(forward, kind, folder, arguments.repeats)
            print(kind, results[kind], flush=True)
    header = ("network", "s", "peak GiB", "load s", "largest difference", "time / eager", "memory / eager")
    eager, rows = results["eager"], []
    for kind in ("eager", "torchscript", "onnx"):
        found = results[kind]
        row = (kind, found["seconds"], found["peak_gib"], found["load_seconds"], found["difference"])
        rows.append((*row, found["seconds"] / eager["seconds"], found["peak_gib"] / eager["peak_gib"]))
    print_table("forward pass on 4 regions of 96 x 96 x 48, fp32", header, rows)
    write_json(arguments.out, results)


if __name__ == "__main__":
    main()
