"""What an export holds, what it leaves out, and what it refuses."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import custom_components.run.export
import jsonschema
import pytest
import torch
import yaml
from custom_components.run.description import describe
from custom_components.run.export import (
    OF_THE_DEMO,
    ExportError,
    components,
    content_hash,
    export,
    with_weights,
    write_zip,
)
from custom_components.run.weights import save_weights
from monai.bundle import ConfigParser, ckpt_export, download_large_files, verify_net_in_out
from monai.bundle.scripts import _add_model_card_metadata
from torch import nn

from tests.conftest import untrained

REPOSITORY = Path(__file__).parents[3]
BUNDLES = ("pretrain", "classify", "segment")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the smallest bundle, in which a test may plant things."""
    return untrained("segment", tmp_path)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", BUNDLES)
def test_holds_what_a_bundle_needs(name: str, tmp_path: Path) -> None:
    source = untrained(name, tmp_path)
    folder, archive = export(source, tmp_path / "out")
    metadata = json.loads((source / "configs" / "metadata.json").read_text())
    assert (folder.name, archive.name) == (name, f"{name}_v{metadata['version']}.zip")
    held = files(folder)
    for part in ("configs", "docs"):
        for path in filter(Path.is_file, (source / part).rglob("*")):
            assert held.pop(path.relative_to(source).as_posix()) == path.read_bytes()  # configs unchanged
    assert held.pop("LICENSE") == (REPOSITORY / "LICENSE").read_bytes()
    pins = held.pop("requirements.txt").decode().split()
    assert pins[:3] == [f"monai=={metadata['monai_version']}", "torch==2.13.0", "numpy==2.4.6"]
    assert len(pins) == 3 + len(metadata["required_packages_version"]) and all("==" in pin for pin in pins)
    assert held.pop("README.md") and held.pop("custom_components/stamp.json")
    assert all(path.startswith("custom_components/") for path in held)


@pytest.mark.parametrize("name", BUNDLES)
def test_holds_the_components_it_needs_and_no_others(name: str) -> None:
    """Each is named by a config, or imported by one that is, but for what people import; nothing that they import is
    missing."""
    configs = REPOSITORY / "bundles" / name / "configs"
    text = "".join(path.read_text() for path in configs.glob("*.json"))
    package = REPOSITORY / "custom_components"
    modules = {
        ".".join(path.relative_to(package).with_suffix("").parts): path.read_text() for path in components(configs)
    }
    for module, source in modules.items():
        others = text + "".join(code for other, code in modules.items() if other != module)
        folder, _, name_in_folder = f"custom_components.{module}".rpartition(".")
        imported = re.search(rf"from {re.escape(folder)} import [\w, ]*\b{name_in_folder}\b", others)
        assert name_in_folder in ("__init__", "ask") or f"{folder}.{name_in_folder}" in others or imported, module
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("custom_components."):
                target = node.module.removeprefix("custom_components.")
                assert target in modules or all(f"{target}.{alias.name}" in modules for alias in node.names), module
    assert {"ask", "__init__", "data.__init__", "run.__init__", "evaluation.__init__"} <= set(modules)
    only = {
        "unetr": "segment",
        "evaluation.segment": "segment",
        "run.features": "classify",
        "evaluation.classify": "classify",
    }
    for module, owner in only.items():
        assert (module in modules) == (name == owner)
    assert "run.export" not in modules and "export" not in modules


@pytest.mark.parametrize("name", BUNDLES)
def test_zip_unpacks_into_the_folder(name: str, tmp_path: Path) -> None:
    folder, archive = export(untrained(name, tmp_path), tmp_path / "out")
    with zipfile.ZipFile(archive) as packed:
        assert packed.testzip() is None
        packed.extractall(tmp_path / "unpacked")
    assert [path.name for path in (tmp_path / "unpacked").iterdir()] == [name]
    assert files(tmp_path / "unpacked" / name) == files(folder)


def test_equal_content_makes_equal_bytes(bundle: Path, tmp_path: Path) -> None:
    (_, first), (_, second) = export(bundle, tmp_path / "1"), export(bundle, tmp_path / "2")
    assert first.read_bytes() == second.read_bytes()


def test_stamp_is_the_contents_hash(bundle: Path, tmp_path: Path) -> None:
    folder, _ = export(bundle, tmp_path / "out")
    stamp = json.loads((folder / "custom_components" / "stamp.json").read_text())
    (folder / "custom_components" / "stamp.json").unlink()
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(files(folder).items())]
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    sha256 = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert stamp == {"bundle": "segment", "version": metadata["version"], "sha256": sha256}
    (folder / "LICENSE").write_text("changed")
    assert content_hash(folder) != sha256


@pytest.mark.parametrize("name", BUNDLES)
def test_holds_no_path_of_this_machine(name: str, tmp_path: Path) -> None:
    folder, _ = export(untrained(name, tmp_path), tmp_path / "out")
    content = b"".join(files(folder).values())
    for place in (Path.home(), REPOSITORY, tmp_path, Path(sys.prefix), Path.cwd()):
        assert place == Path(place.anchor) or f"{place}{os.sep}".encode() not in content


def test_a_path_of_this_machine_is_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "configs" / "btcv.json").write_text(json.dumps({"dataset_dir": str(Path.home() / "ct" / "LUNA16")}))
    with pytest.raises(ExportError, match=r"configs/btcv.json holds .*LUNA16, a path of this machine"):
        export(bundle, tmp_path / "out")
    assert not (tmp_path / "out" / "segment").exists() and list((tmp_path / "out").iterdir()) == []


def test_a_persons_own_configs_stay_here(bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("my_data.json", "hospital.json", "labels.csv"):
        (bundle / "configs" / name).write_text('{"dataset_dir": "/data/mine"}')
    folder, _ = export(bundle, tmp_path / "out")
    assert b"/data/mine" not in b"".join(content for name, content in files(folder).items() if "configs" in name)
    (line,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert line.startswith("configs/hospital.json, configs/labels.csv, configs/my_data.json: left out as your own")
    with open(bundle / "docs" / "README.md", "a") as readme:
        readme.write("\n`hospital.json` is for the scans of our hospital.\n")
    folder, _ = export(bundle, tmp_path / "named")
    assert (folder / "configs" / "hospital.json").is_file() and not (folder / "configs" / "my_data.json").exists()


def weights(bundle: Path, size: int = 1000) -> None:
    (bundle / "models").mkdir()
    for name in ("model.pt", "encoder.pt", "checkpoint.pt", "checkpoint_previous.pt", "mae_pretrain_vit_base.pth"):
        (bundle / "models" / name).write_bytes(name.encode() + bytes(size))
    (bundle / "models" / "scratch_1").mkdir()
    (bundle / "models" / "scratch_1" / "model.pt").write_bytes(b"other")


def test_weights_go_along_and_checkpoints_do_not(bundle: Path, tmp_path: Path) -> None:
    weights(bundle)
    folder, _ = export(bundle, tmp_path / "out", trained_on="phantoms, for 7 epochs")
    assert sorted(files(folder / "models")) == ["encoder.pt", "model.pt"]
    readme = (folder / "docs" / "README.md").read_text()
    digest = hashlib.sha256((bundle / "models" / "model.pt").read_bytes()).hexdigest()
    assert f"| `models/model.pt` | 1,008 | `{digest}` |" in readme and "Trained on: phantoms, for 7 epochs." in readme
    before = (bundle / "docs" / "README.md").read_text()
    assert "## Weights\nNone." in before and "## Weights\nNone." not in readme
    after = readme.split("## Weights")[1].split("\n## Data", 1)[1]
    performance = f"\n## Performance\n{OF_THE_DEMO}\n\n"
    assert performance in after
    assert before.split("\n## Data", 1)[1] == after.replace(
        performance, "\n## Performance\n"
    )  # nothing else has changed
    assert not (folder / "large_files.yml").exists()


def test_weights_of_unknown_origin_are_told_to_be(bundle: Path, tmp_path: Path) -> None:
    weights(bundle)
    folder, _ = export(bundle, tmp_path / "out")
    assert "Trained on: not told by those who exported them." in (folder / "README.md").read_text()


SMALL = {
    "img_size": [16, 16, 16], "pixdim": [4.0, 4.0, 8.0], "hu_range": [-900, 900], "patch_size": [8, 8, 4],
    "hidden_size": 24, "mlp_dim": 32, "num_layers": 4, "num_heads": 3, "hu_bins": 4, "scale_space": [4.0],
    "statistics_mlp_dim": 8, "pos_embed": "simcrop",
}  # fmt: skip
OWN = {
    "pretrain": {
        "text_encoder": str(Path.home() / "models" / "bert"), "text_hidden_size": 20, "projection_size": 12,
        "align_layer": 0, "patch_projection": "linear",
    },
    "classify": {"classes": ["nodule", "mass", "effusion"], "exclusive": True, "check_hu": False},
    "segment": {"classes": ["heart", "liver"], "feature_size": 4},
}  # fmt: skip


def trained(name: str, folder: Path) -> Path:
    """A bundle whose ``models`` hold weights of another size, spacing and classes than published."""
    bundle = untrained(name, folder)
    settings = SMALL | OWN[name]
    parser = ConfigParser(json.loads((bundle / "configs" / "inference.json").read_text()) | settings)
    network = parser.get_parsed_content("network_def")
    description = describe(settings, bundle, license="CC-BY-NC-4.0")
    save_weights(network.state_dict(), bundle / "models" / "model.pt", description)
    return bundle


@pytest.mark.parametrize("name", BUNDLES)
def test_an_export_fits_its_weights(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MONAI's commands, on the plain configs: no overlay, no override."""
    folder, _ = export(trained(name, tmp_path), tmp_path / "out")
    monkeypatch.chdir(folder)
    files = {"meta_file": "configs/metadata.json", "config_file": "configs/inference.json"}
    verify_net_in_out("network_def", **files, device="cpu")
    ckpt_export("network_def", "models/model.ts", "models/model.pt", **files)
    onto, extra = torch.rand(1, 1, *SMALL["img_size"]), {"metadata.json": ""}
    scripted = torch.jit.load("models/model.ts", _extra_files=extra)(onto)
    parser = ConfigParser(json.loads(Path("configs/inference.json").read_text()))
    for key in SMALL.keys() | OWN[name].keys() - {"text_encoder"}:
        assert parser.get_parsed_content(key) == (SMALL | OWN[name])[key]
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load("models/model.pt", weights_only=True))
    torch.testing.assert_close(scripted, network(onto))

    metadata = json.loads(Path("configs/metadata.json").read_text())
    jsonschema.validate(metadata, json.loads((REPOSITORY / "tests/data/meta_schema_20240725.json").read_text()))
    image, pred = (metadata["network_data_format"][k] for k in ("inputs", "outputs"))
    image, pred = image["image"], pred["pred"]
    classes = {
        "pretrain": ["embedding"], "classify": OWN["classify"]["classes"], "segment": ["background", "heart", "liver"]
    }[name]  # fmt: skip
    assert image["spatial_shape"] == SMALL["img_size"] and pred["num_channels"] == scripted.shape[1]
    assert pred["spatial_shape"] == (SMALL["img_size"] if name == "segment" else [])
    assert list(pred["channel_def"].values()) == classes and metadata["eval_metrics"] == {}
    after = metadata["network_data_format"]["post_processed_outputs"]
    if name == "pretrain":
        assert after["embedding"]["num_channels"] == 24
    else:
        (output,) = after.values()
        assert list(output["channel_def"].values()) == classes
        assert output["num_channels"] == (1 if name == "segment" else 3) and output["value_range"] == [
            0, 2 if name == "segment" else 1
        ]  # fmt: skip
    assert "HU from -900 to 900" in metadata["image_classes"]
    keys = ("description", "image_classes", "label_classes", "pred_classes", "network_data_format")
    told = json.dumps([metadata[key] for key in keys])
    told += Path("README.md").read_text().split("### Input")[1].split("\n## ")[0]
    for gone in ("768", "left lung", "Medical material", "18 with", "224", "96 x", "336", "-1000"):
        assert gone not in told, gone


@pytest.mark.parametrize("name", BUNDLES)
def test_an_exports_readme_tells_what_its_weights_must_be_used_with(name: str, tmp_path: Path) -> None:
    folder, _ = export(trained(name, tmp_path), tmp_path / "out")
    readme = (folder / "docs" / "README.md").read_text()
    section = readme.split("## Weights\n")[1].split("\n## ")[0]
    assert "Licence of the weights: CC-BY-NC-4.0." in section and "| `pixdim` | [4.0, 4.0, 8.0] |" in section
    assert "16 x 16 x 16" in readme.split("### Input")[1].split("### Output")[0]
    output = readme.split("### Output")[1].split("\n## ")[0]
    expected = {
        "pretrain": ["`pred`: 24 channels", "the 64 x 64 x 128 mm field"],
        "classify": ["one logit per class: nodule, mass, effusion."],
        "segment": ["one channel per class: background, heart, liver."],
    }
    assert all(words in output for words in expected[name]), output
    if name == "pretrain":  # known by its fingerprint, wherever it lies
        assert json.loads((folder / "models" / "model.json").read_text())["settings"]["text_encoder"] == "bert"


@pytest.mark.parametrize("name", BUNDLES)
def test_an_export_claims_no_data_that_its_weights_have_not_seen(name: str, tmp_path: Path) -> None:
    folder, _ = export(trained(name, tmp_path), tmp_path / "out", trained_on="24 scans of our hospital")
    metadata = json.loads((folder / "configs" / "metadata.json").read_text())
    assert metadata["data_source"] == "training: 24 scans of our hospital"
    told = json.dumps({key: value for key, value in metadata.items() if key not in ("changelog", "references")})
    assert not [data_set for data_set in ("CT-RATE", "RadChestCT", "CC-CCII", "LUNA16", "BTCV") if data_set in told]
    if name != "pretrain":
        assert f"{', '.join(OWN[name]['classes'])} in chest CT." in metadata["description"]


def test_performance_is_told_to_be_the_demos(bundle: Path, tmp_path: Path) -> None:
    weights(bundle)
    readme = (bundle / "docs" / "README.md").read_text()
    told = with_weights(readme, [bundle / "models" / "model.pt"], None)
    assert f"\n## Performance\n{OF_THE_DEMO}\n\nMeasured here" in told
    assert OF_THE_DEMO not in with_weights(readme, [], None)


def test_weights_of_another_description_are_refused(tmp_path: Path) -> None:
    bundle = trained("classify", tmp_path)
    (bundle / "models" / "model.pt").write_bytes(b"other")
    with pytest.raises(ExportError, match="model.json describes other weights"):
        export(bundle, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_an_export_without_weights_or_without_description_says_so(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export(bundle, tmp_path / "none")
    assert "models has no model.pt: the export holds no weights" in caplog.text and "model.json" in caplog.text
    weights(bundle)
    (bundle / "models" / "model.pt").rename(bundle / "models" / "elsewhere.pt")
    caplog.clear()
    export(bundle, tmp_path / "elsewhere")
    assert f"To add them, give --models_dir, one of {bundle / 'models' / 'scratch_1'}, and export again" in caplog.text
    (bundle / "models" / "elsewhere.pt").rename(bundle / "models" / "model.pt")
    export(bundle, tmp_path / "undescribed")
    assert "model.pt: nothing beside it tells what it must be used with" in caplog.text


def test_weights_of_another_folder_go_along(bundle: Path, tmp_path: Path) -> None:
    weights(bundle)
    folder, _ = export(bundle, tmp_path / "out", models_dir=bundle / "models" / "scratch_1")
    assert files(folder / "models") == {"model.pt": b"other"}
    with pytest.raises(ExportError, match=r"trial has no model.pt: give the folder of a training \(.*scratch_1\)"):
        export(bundle, tmp_path / "other", models_dir=bundle / "models" / "trial")


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> int:
    """Stands in for 25 MB, which take seconds to pack; above all else in the bundle."""
    assert custom_components.run.export.LARGE == 25_000_000
    monkeypatch.setattr(custom_components.run.export, "LARGE", 200_000)
    return custom_components.run.export.LARGE


def test_large_weights_are_left_out_and_brought_back_by_monai(bundle: Path, tmp_path: Path, small_limit: int) -> None:
    weights(bundle, small_limit)
    hosted = tmp_path / "hosted"
    shutil.copytree(bundle / "models", hosted)
    folder, archive = export(bundle, tmp_path / "out", weights_url=hosted.as_uri())
    assert not (folder / "models").exists() or not list((folder / "models").iterdir())
    with zipfile.ZipFile(archive) as packed:
        assert not [name for name in packed.namelist() if name.endswith(".pt")]
    listed = yaml.safe_load((folder / "large_files.yml").read_text())["large_files"]
    assert [entry["path"] for entry in listed] == ["models/model.pt", "models/encoder.pt"]
    assert "| `models/model.pt` | 200,008 |" in (folder / "README.md").read_text()
    download_large_files(bundle_path=str(folder))
    assert (folder / "models" / "model.pt").read_bytes() == (bundle / "models" / "model.pt").read_bytes()


def test_large_weights_that_nobody_hosts_are_refused_in_one_line(
    bundle: Path, tmp_path: Path, small_limit: int
) -> None:
    weights(bundle, small_limit)
    with pytest.raises(ExportError) as told:
        export(bundle, tmp_path / "out")
    assert str(told.value).startswith(f"model.pt, encoder.pt of {bundle / 'models'}: over 25 MB")
    assert "--weights_url" in str(told.value) and "\n" not in str(told.value)
    assert not list((tmp_path / "out").iterdir())
    folder, _ = export(bundle, tmp_path / "out", keep_large=True)
    assert (folder / "models" / "model.pt").is_file() and not (folder / "large_files.yml").exists()


def test_torchscript_loses_paths_and_keeps_its_numbers(bundle: Path, tmp_path: Path) -> None:
    (bundle / "models").mkdir()
    path = bundle / "models" / "model.ts"
    network = torch.jit.script(nn.Sequential(nn.Conv3d(1, 2, 3), nn.InstanceNorm3d(2)))
    torch.jit.save(network, path, _extra_files={"metadata.json": "{}"})
    folder, _ = export(bundle, tmp_path / "out")
    for script, told in ((path, True), (folder / "models" / "model.ts", False)):
        with zipfile.ZipFile(script) as packed:
            members = b"".join(packed.read(name) for name in packed.namelist())
        assert (str(Path(torch.__file__).parent).encode() in members) == told
    extra = {"metadata.json": ""}
    volume = torch.rand(1, 1, 8, 8, 8)
    assert torch.equal(torch.jit.load(folder / "models" / "model.ts", _extra_files=extra)(volume), network(volume))
    assert extra["metadata.json"] == b"{}"


@pytest.mark.parametrize("name", BUNDLES)
def test_model_card_is_what_monai_would_push(name: str, tmp_path: Path) -> None:
    folder, _ = export(untrained(name, tmp_path), tmp_path / "out")
    card = (folder / "README.md").read_text()
    shutil.copy(folder / "docs" / "README.md", folder / "README.md")
    _add_model_card_metadata(str(folder / "README.md"))  # as push_to_hf_hub does before it uploads
    assert (folder / "README.md").read_text() == card
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {"tags": ["monai", "medical"], "library_name": "monai", "license": "apache-2.0"}
    assert "2509.08311" in card and "@article{wang2025simcrop" in card and "whom we thank" in card


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "custom_components.export", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_command_line(tmp_path: Path) -> None:
    done = run("bundles/segment", "--out", tmp_path / "out")
    folder, archive = map(Path, done.stdout.split())
    assert done.returncode == 0 and folder.is_dir() and archive.is_file()
    again = run("bundles/segment", "--out", tmp_path / "out")
    assert again.returncode == 1 and again.stderr == f"error: {folder} exists: delete it, or give another --out\n"
    other = run("tests", "--out", tmp_path / "other")
    assert other.returncode == 1 and other.stderr.startswith("error: ") and "has no LICENSE" in other.stderr


def test_an_unknown_component_is_told(bundle: Path, tmp_path: Path) -> None:
    (bundle / "configs" / "btcv.json").write_text('{"x": "$custom_components.nothere.f()"}')
    with pytest.raises(ExportError, match=r"btcv.json names custom_components.nothere.f, .* correct the name"):
        export(bundle, tmp_path / "out")


def test_imports_the_standard_library_alone() -> None:
    """So that it runs in a second, and needs none of what it exports."""
    code = (
        "import sys; before = set(sys.modules); import custom_components.run.export; print(*set(sys.modules) - before)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True).stdout.split()
    assert "custom_components.run.export" in found
    roots = {name.split(".")[0] for name in found} - {"custom_components"}
    own = {name for name in found if name.startswith("custom_components.")}
    assert own == {"custom_components.run", "custom_components.run.export"}
    assert not roots - set(sys.stdlib_module_names)


def test_zip_times_are_fixed(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("x")
    write_zip(tmp_path / "folder", tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as packed:
        assert [(entry.filename, entry.date_time[0]) for entry in packed.infolist()] == [("folder/file", 1980)]
