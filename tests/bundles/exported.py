"""What MONAI can do with an exported bundle, checked with the bundle as working folder; prints JSON.

    cd EXPORT && python exported.py '{"demo": [...], ...}'

Run by ``test_export.py`` where this repository cannot be imported; one process, since importing torch takes seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, "")  # as ``python -m monai.bundle`` has it

import monai.bundle
import nibabel as nib
import numpy as np
import onnxruntime
import pandas as pd
import torch
from monai.bundle import (
    ConfigParser,
    ConfigWorkflow,
    ckpt_export,
    create_workflow,
    load,
    onnx_export,
    verify_metadata,
    verify_net_in_out,
)

INFERENCE = ["configs/inference.json"]


def check_metadata(schema: str, shape: list[int], channels: int) -> None:
    """As the model zoo does: the schema lies where it would be downloaded to."""
    Path("eval").mkdir(exist_ok=True)
    shutil.copy(schema, "eval/schema.json")
    verify_metadata("configs/metadata.json", "eval/schema.json")
    data_format = "_meta_#network_data_format"
    small = {f"{data_format}#inputs#image#spatial_shape": shape, f"{data_format}#outputs#pred#num_channels": channels}
    verify_net_in_out("network_def", "configs/metadata.json", INFERENCE, device="cpu", **small)


def missing_properties(overlays: dict[str, tuple[list[str], str, dict[str, Any]]]) -> dict[str, list[str]]:
    # as torchrun has it, for one process
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    missing = {}
    for name, (configs, kind, keys) in overlays.items():
        workflow = ConfigWorkflow([f"configs/{config}" for config in configs], workflow_type=kind, **keys)
        workflow.initialize()
        missing[name] = workflow.check_properties()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return missing


def exports(shape: list[int]) -> dict[str, float]:
    """Largest difference between the eager network and its TorchScript and ONNX exports, over its largest output."""
    files = {"ckpt_file": "models/model.pt", "meta_file": "configs/metadata.json", "config_file": INFERENCE}
    ckpt_export("network_def", "models/model.ts", **files)
    onnx_export("network_def", "models/model.onnx", **files, input_shape=[1, 1, *shape])
    parser = ConfigParser()
    parser.read_config(INFERENCE)
    eager = parser.get_parsed_content("network_def").eval()
    eager.load_state_dict(torch.load("models/model.pt", weights_only=True))
    torch.manual_seed(0)
    volume = torch.rand(1, 1, *shape) * 2 - 1
    with torch.inference_mode():
        expected = eager(volume).numpy()
        script, metadata, _ = load(Path.cwd().name, bundle_dir="..", load_ts_module=True, device="cpu")
        scripted = script(volume).numpy()
    session = onnxruntime.InferenceSession("models/model.onnx", providers=["CPUExecutionProvider"])
    (onnx,) = session.run(None, {session.get_inputs()[0].name: volume.numpy()})
    scale = np.abs(expected).max()
    assert scale > 0 and metadata["version"]
    return {name: float(np.abs(found - expected).max() / scale) for name, found in (("ts", scripted), ("onnx", onnx))}


def loaded_share() -> float:
    """Share of ``models/model.pt`` that ``monai.bundle.load`` puts into the network of ``inference.json``."""
    name = Path.cwd().name
    network = load(name, bundle_dir="..", workflow_type="inference", device="cpu")
    weights = torch.load("models/model.pt", weights_only=True)
    found = network.state_dict()
    assert found.keys() == weights.keys()
    return sum(torch.equal(found[key], weights[key]) for key in weights) / len(weights)


def random_weights() -> None:
    """``models/random.pt``, whose label maps hold every class, unlike those of a minute's training; and its script."""
    parser = ConfigParser()
    parser.read_config(INFERENCE)
    torch.manual_seed(0)
    torch.save(parser.get_parsed_content("network_def").state_dict(), "models/random.pt")
    description = json.loads(Path("models/model.json").read_text())
    description["sha256"] = hashlib.sha256(Path("models/random.pt").read_bytes()).hexdigest()
    Path("models/random.json").write_text(json.dumps(description))
    files = {"ckpt_file": "models/random.pt", "meta_file": "configs/metadata.json", "config_file": INFERENCE}
    ckpt_export("network_def", "models/random.ts", **files)


def inference(scan: str, keys: dict[str, Any]) -> list[str]:
    """Files that inference on a scan leaves, through ``create_workflow``."""
    keys = keys | {"dataset_dir": scan, "output_dir": "eval/inference"}
    workflow = create_workflow(config_file=INFERENCE, workflow_type="infer", **keys)
    workflow.run()
    workflow.finalize()
    folder = Path("eval/inference")
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def asked(scan: str, keys: dict[str, Any]) -> bool:
    """Whether Python is told what inference has written."""
    from custom_components.ask import load as ask  # the export's own

    folder, keys = Path("eval/inference"), dict(keys)
    model = ask(keys.pop("checkpoint", "models"), **{key: keys[key] for key in keys if key in ("amp", "overlap")})
    if model.bundle == "pretrain":
        return np.array_equal(model.embed(scan), np.load(folder / "CTChest4" / "embedding.npy"))
    assert "custom_components.text" not in sys.modules and "pysbd" not in sys.modules
    if model.bundle == "classify":
        table = pd.read_csv(folder / "predictions.csv")[list(model.settings["classes"])]
        return np.allclose(model.probabilities([scan]), table, atol=0.02)  # with saliency, in another order of bfloat16
    return np.array_equal(model.segment(scan).labels, nib.load(folder / "CTChest4" / "labels.nii.gz").dataobj)


def deployed(scan: str, keys: dict[str, Any]) -> None:
    """``deploy.json`` on a scan with the eager network in place of its script: what the script has to repeat."""
    parser = ConfigParser()
    parser.read_config(INFERENCE)
    eager = parser.get_parsed_content("network_def").eval()
    eager.load_state_dict(torch.load("models/random.pt", weights_only=True))
    keys = keys | {"dataset_dir": scan, "output_dir": "eval/deployed", "network_def": eager}
    create_workflow(config_file="configs/deploy.json", workflow_type="infer", **keys).run()


def own_demo(keys: dict[str, Any]) -> bool:
    """Whether the demo's command, from the bundle's own folder, leaves its table."""
    table = Path("eval/metrics.json")
    table.unlink()
    monai.bundle.run(config_file=["configs/train.json", "configs/demo.json"], **keys)
    return table.is_file()


def other_bundle(folder: str, network: str) -> str:
    """Where a network's class comes from whose bundle is another export, opened in the same process."""
    configs = [f"{folder}/{name}" for name in INFERENCE]
    workflow = create_workflow(config_file=configs, workflow_type="infer", bundle_root=folder)
    found = workflow.network_def
    assert type(found).__name__ == network
    return sys.modules[type(found).__module__].__file__


def refused(folder: str) -> str:
    """What a person is told who opens a bundle whose components are not those of this process."""
    changed = shutil.copytree(folder, "eval/changed", ignore=shutil.ignore_patterns("models", "eval", "data"))
    with open(Path(changed, "custom_components", "vit.py"), "a") as module:
        module.write("# another version\n")
    try:
        create_workflow(config_file=[f"{changed}/{name}" for name in INFERENCE], bundle_root=str(changed))
    except Exception as error:
        text = io.StringIO()
        with contextlib.redirect_stderr(text):
            sys.excepthook(type(error), error, error.__traceback__)
        return text.getvalue()
    return ""


def main() -> None:
    task = json.loads(sys.argv[1])
    check_metadata(task["schema"], task["shape"], task["channels"])
    if "checkpoint" in task["inference"]:
        random_weights()
    result = {
        "components": str(Path(importlib.util.find_spec("custom_components").origin).parent),
        "own demo": own_demo(task["demo"]),
        "missing": missing_properties(task["overlays"]),
        "error": exports(task["shape"]),
        "loaded": loaded_share(),
        "files": inference(task["scan"], task["inference"]),
        "asked": asked(task["scan"], task["inference"]),
        "outside": sorted(
            path
            for module in list(sys.modules.values())
            if (path := getattr(module, "__file__", None))
            and "custom_components" in path
            and str(Path.cwd()) not in path
        ),
    }
    if "deploy" in task:
        deployed(task["scan"], task["deploy"])
    if "other" in task:
        result["other"] = other_bundle(*task["other"])
        result["refused"] = refused(task["other"][0])
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
