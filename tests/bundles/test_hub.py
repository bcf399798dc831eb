"""To the Hugging Face hub and back by MONAI's own functions, with a folder in the hub's place: there is no network."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from custom_components.run.export import export
from custom_components.unetr import SimCroPUNETR
from custom_components.vit import SimCroPEncoder
from monai.bundle import download, load, push_to_hf_hub

BUNDLE = Path(__file__).parents[2] / "bundles" / "segment"
REPO = "someone/simcrop-segment"
NETWORK = {
    "encoder#img_size": [48, 48, 32], "encoder#patch_size": [8, 8, 8], "encoder#hidden_size": 24, "encoder#mlp_dim": 24,
    "encoder#num_layers": 3, "encoder#num_heads": 2, "feature_size": 2,
}  # fmt: skip


REAL = {
    name: inspect.signature(getattr(owner, name))
    for owner, names in (
        (huggingface_hub.HfApi, ("create_repo", "upload_folder", "create_tag")),
        (huggingface_hub, ("snapshot_download", "list_repo_refs")),
    )
    for name in names
}


class FolderHub:
    """What MONAI calls of the hub's client, on a folder; every call must fit the real function's arguments."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tags: list[SimpleNamespace] = []

    def folder(self, function: str, arguments: dict[str, Any]) -> Path:
        signature = REAL[function]
        signature.bind(*([self] if "self" in signature.parameters else []), **arguments)
        return self.root / arguments["repo_id"]

    def create_repo(self, **arguments: Any) -> None:
        self.folder("create_repo", arguments).mkdir(parents=True, exist_ok=True)

    def upload_folder(self, **arguments: Any) -> str:
        target = self.folder("upload_folder", arguments)
        return str(shutil.copytree(arguments["folder_path"], target, dirs_exist_ok=True))

    def create_tag(self, **arguments: Any) -> None:
        self.folder("create_tag", arguments)
        self.tags.append(SimpleNamespace(name=arguments["tag"]))

    def list_repo_refs(self, **arguments: Any) -> SimpleNamespace:
        self.folder("list_repo_refs", arguments)
        return SimpleNamespace(tags=self.tags, branches=[])

    def snapshot_download(self, **arguments: Any) -> str:
        source = self.folder("snapshot_download", arguments)
        assert arguments["revision"] in [tag.name for tag in self.tags]
        return str(shutil.copytree(source, arguments["local_dir"], dirs_exist_ok=True))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderHub:
    hub = FolderHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: hub)
    for name in ("snapshot_download", "list_repo_refs"):
        monkeypatch.setattr(huggingface_hub, name, getattr(hub, name))
    return hub


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Of a tiny UNETR, in a copy of the bundle that is exported to ``tmp_path / "exported"``."""
    bundle = tmp_path / "segment"
    shutil.copytree(BUNDLE, bundle, ignore=shutil.ignore_patterns("models", "eval", "data"))
    sizes = {key.removeprefix("encoder#"): value for key, value in NETWORK.items() if key.startswith("encoder#")}
    torch.manual_seed(0)
    network = SimCroPUNETR(SimCroPEncoder(**sizes, class_token=False), 4, NETWORK["feature_size"])
    (bundle / "models").mkdir()
    torch.save(network.state_dict(), bundle / "models" / "model.pt")
    export(bundle, tmp_path / "exported", trained_on="nothing, random weights")
    return network.state_dict()


def test_to_the_hub_and_back(
    hub: FolderHub, weights: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines of the README's section Share."""
    exported = tmp_path / "exported" / "segment"
    before = {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()}
    version = json.loads((exported / "configs" / "metadata.json").read_text())["version"]
    push_to_hf_hub(repo=REPO, name="segment", bundle_dir=str(tmp_path / "exported"), private=False, version=version)
    assert [tag.name for tag in hub.tags] == [version]
    assert {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()} == before  # the card included
    download(name="segment", source="huggingface_hub", repo=REPO, bundle_dir=str(tmp_path / "bundles"))
    found = tmp_path / "bundles" / "segment"
    assert {path.relative_to(exported): content for path, content in before.items()} == {
        path.relative_to(found): path.read_bytes() for path in found.rglob("*") if path.is_file()
    }
    assert "Trained on: nothing, random weights." in (found / "README.md").read_text()
    monkeypatch.chdir(found)
    loaded = load("segment", bundle_dir="..", workflow_type="inference", net_override=NETWORK, device="cpu")
    assert weights.keys() == loaded.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[key], weights[key]) for key in weights)


def test_load_fetches_what_is_not_there(
    hub: FolderHub, weights: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_to_hf_hub(repo=REPO, name="segment", bundle_dir=str(tmp_path / "exported"), tag_as_latest_version=True)
    (tmp_path / "bundles" / "segment").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "bundles" / "segment")
    hub_keys = {"source": "huggingface_hub", "repo": REPO}
    loaded = load("segment", bundle_dir="..", workflow_type="inference", net_override=NETWORK, device="cpu", **hub_keys)
    assert all(torch.equal(loaded.state_dict()[key], weights[key]) for key in weights)
