"""Exports a bundle with the components it uses: a folder and a zip that need nothing else of this repository.

    python -m custom_components.export bundles/segment --out exported

Imports the standard library alone, so that it runs in a second, without torch.
"""

import argparse
import ast
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
NEEDED = ("LICENSE", "configs/metadata.json", "docs/README.md", "docs/data_license.txt")
WEIGHTS = ("model.pt", "model.ts", "encoder.pt")  # checkpoints and caches of a training are not for sharing
LARGE = 25 * 10**6  # bytes that the model zoo takes in one file
AFTER = "post_processed_outputs"
ASKED = ".ask"  # what people import, and no config names
OWN = "my_"  # names of a person's own configs, as of keys (custom_components.run.keys)
OF_THE_DEMO = "The figures of this section are of the project's demo on phantoms: no other weights have them."
NOT_TOLD = "not told by those who exported them"
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can hold: equal content makes equal zips
COMPONENT = re.compile(rf"\b{PACKAGE.name}((?:\.\w+)+)")
# what MONAI's push_to_hf_hub puts before docs/README.md, so that a card pushed by it and one pushed by hand agree
CARD = "---\ntags:\n- monai\n- medical\nlibrary_name: monai\nlicense: apache-2.0\n---\n"
PLACEHOLDER = b"/workspace/data/"  # the model zoo's own, for a data set that a person will name

logger = logging.getLogger(__name__)


class ExportError(ValueError):
    """What a person can mend, in one line."""


def module_of(dotted: str) -> Path | None:
    """The file of the module that a dotted name such as ``.run.start.start`` leads to or through, below the package."""
    parts = dotted.strip(".").split(".")
    files = (PACKAGE.joinpath(*parts[:depth]).with_suffix(".py") for depth in range(1, len(parts) + 1))
    return next((file for file in files if file.is_file()), None)


def imported(module: Path) -> set[str]:
    """Dotted names, below the package, of what a component imports from it, anywhere in its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE.name:
            # "from a.b import c": c is a module of a.b, or something in the module a.b
            names |= {f"{node.module}.{alias.name}"[len(PACKAGE.name) :] for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {name for alias in node.names for name in COMPONENT.findall(alias.name)}
    return names


def components(configs: Path) -> list[Path]:
    """The modules that the configs of a folder name, and :mod:`custom_components.ask`; those that these import in turn,
    and their packages.

    Raises:
        ExportError: a config or a module names one that is not there.
    """
    wanted = {name: path for path in sorted(configs.glob("*.json")) for name in COMPONENT.findall(path.read_text())}
    wanted[ASKED] = Path(__file__)
    found: set[Path] = {PACKAGE / "__init__.py"}
    while wanted:
        name, source = wanted.popitem()
        if (module := module_of(name)) is None:
            raise ExportError(
                f"{source} names {PACKAGE.name}{name}, and {PACKAGE} has no such module: correct the name"
            )
        if module not in found:
            found |= {module, module.with_name("__init__.py")}
            wanted |= {other: module for other in imported(module)}
    return sorted(found)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def requirements(metadata: dict[str, Any]) -> str:
    """The packages of ``metadata.json`` as pip takes them."""
    names = {"monai": "monai_version", "torch": "pytorch_version", "numpy": "numpy_version"}
    pins = {name: metadata[key] for name, key in names.items()} | metadata["required_packages_version"]
    return "".join(f"{name}=={version}\n" for name, version in pins.items())


def others_configs(bundle: Path) -> list[Path]:
    """Configs of a person, not of the bundle: their names begin with ``my_``, or no page of the docs has them."""
    docs = "".join(page.read_text() for page in sorted((bundle / "docs").glob("*.md")))
    own = {"metadata.json", "logging.conf", *re.findall(r"[\w.-]+\.json\b", docs)}
    configs = [path for path in files_of(bundle / "configs") if not path.name.startswith(".")]
    return [path for path in configs if path.name.startswith(OWN) or path.name not in own]


def with_weights_in(models: Path) -> list[str]:
    """Folders in ``models`` where a training has left weights."""
    return [str(path.parent) for path in sorted(models.glob("*/model.pt"))]


def copy_weights(models: Path, target: Path) -> list[Path]:
    """Copy what is there of ``WEIGHTS``, and return the copies.

    A TorchScript file is a zip. Its ``*.debug_pkl`` hold the path of the source of every line; it runs without them.
    """
    names = [name for name in WEIGHTS if (models / name).is_file()]
    for name in names:
        if not name.endswith(".ts"):
            shutil.copyfile(models / name, target / name)
            continue
        with zipfile.ZipFile(models / name) as script, zipfile.ZipFile(target / name, "w") as stripped:
            for entry in script.infolist():
                if not entry.filename.endswith(".debug_pkl"):
                    stripped.writestr(entry, script.read(entry))
    return [target / name for name in names]


def copy_description(models: Path, weights: Path) -> dict[str, Any] | None:
    """Copy the JSON that says what exported weights must be used with, and return it; None if there is none.

    A text encoder in a folder of this machine keeps the folder's name alone: its fingerprint tells it elsewhere.

    Raises:
        ExportError: it describes other weights.
    """
    source = models / weights.with_suffix(".json").name
    if not source.is_file():
        logger.warning(
            f"{models / weights.name}: nothing beside it tells what it must be used with; configs/metadata.json and "
            "README are left as they are: see that they fit, or export what a training of this version wrote"
        )
        return None
    description = json.loads(source.read_text())
    if description.get("sha256") != sha256(weights):
        raise ExportError(f"{source} describes other weights than {weights.name} holds: bring both from one place")
    settings = description["settings"]
    if os.path.isabs(text_encoder := settings.get("text_encoder", "")):
        settings["text_encoder"] = Path(text_encoder).name
    weights.with_suffix(".json").write_text(json.dumps(description, indent=1) + "\n")
    return description


def fit_metadata(metadata: dict[str, Any], settings: dict[str, Any], trained_on: str | None) -> None:
    """Let ``metadata.json`` say what holds for the weights, of their data too, and nothing of others' figures."""
    metadata["eval_metrics"] = {}
    metadata["data_source"] = f"training: {trained_on or NOT_TOLD}"
    data_format = metadata["network_data_format"]
    image, pred, after = data_format["inputs"]["image"], data_format["outputs"]["pred"], data_format[AFTER]
    image["spatial_shape"] = settings["img_size"]
    low, high = settings["hu_range"]
    sizes = {r"(?= patches)": settings["patch_size"], r"(?= voxels)": settings["img_size"]}
    for place, size in sizes.items():
        text = " x ".join(map(str, size))
        metadata["description"] = re.sub(rf"\d+ x \d+ x \d+{place}", text, metadata["description"])
    metadata["image_classes"] = re.sub(r"HU from \S+ to \S+", f"HU from {low} to {high}", metadata["image_classes"])
    classes = settings.get("classes")
    for before in (r"(?<=fine-tuned as a whole for ).*", r"(?<= classify )abnormalities in chest CT: .*"):
        text = f"{', '.join(classes or ())} in chest CT."
        metadata["description"] = re.sub(before, lambda _, text=text: text, metadata["description"])
    if classes is None:
        pred["num_channels"] = after["embedding"]["num_channels"] = settings["hidden_size"]
        metadata["pred_classes"] = re.sub(r"^\d+", str(settings["hidden_size"]), metadata["pred_classes"])
        return
    if pred["spatial_shape"]:  # one class a voxel
        pred["spatial_shape"] = settings["img_size"]
        classes = ["background", *classes]
        indices = ", ".join(f"{index} {name}" for index, name in enumerate(classes))
        metadata["label_classes"] = f"one channel of class indices: {indices}"
        metadata["pred_classes"] = f"one channel per class: {', '.join(classes)}"
    pred["num_channels"] = len(classes)
    if "labels" in after:
        after["labels"]["value_range"] = [0, len(classes) - 1]
    else:
        after["probability"]["num_channels"] = len(classes)
    for output in (pred, *after.values()):
        output["channel_def"] = {str(index): name for index, name in enumerate(classes)}


def fit_readme(readme: str, settings: dict[str, Any]) -> str:
    """Let the sections Input and Output of a README say what holds for the weights."""
    size = " x ".join(map(str, settings["img_size"]))
    field = [round(voxels * mm) for voxels, mm in zip(settings["img_size"], settings["pixdim"], strict=True)]
    field = str(field[0]) if len(set(field)) == 1 else " x ".join(map(str, field))
    classes = ", ".join(settings.get("classes", ()))
    before, title, rest = readme.partition("### Input\n")
    section, end, after = rest.partition("\n## ")
    for pattern, text in (
        (r"\d+ x \d+ x \d+(?=, float32)", size),
        (r"(?<=`pred`: )\d+(?= channels)", str(settings["hidden_size"])),
        (r"(?<=one logit per class), [^.]*(?=\.)", f": {classes}"),
        (r"(?<=one channel per class), background first", f": background, {classes}"),
        (r"\d+(?= mm field)", field),
    ):
        section = re.sub(pattern, lambda _, text=text: text, section)
    return before + title + section + end + after


def large_files(weights: list[Path], weights_url: str) -> str:
    """``large_files.yml`` as the model zoo, and MONAI's ``download_large_files``, read it."""
    text = "large_files:\n"
    for path in weights:
        text += f'  - path: "models/{path.name}"\n    url: "{weights_url.rstrip("/")}/{path.name}"\n'
        text += f'    hash_val: "{sha256(path)}"\n    hash_type: "sha256"\n'
    return text


def with_weights(
    readme: str, weights: list[Path], trained_on: str | None, description: dict[str, Any] | None = None
) -> str:
    """A README whose section Weights says what the bundle holds, and whose section Performance says that it is of the
    demo; without weights, the README as it is."""
    if not weights:
        return readme
    section = f"## Weights\nTrained on: {trained_on or NOT_TOLD}.\n"
    if description is not None:
        section += f"Licence of the weights: {description['license'] or 'not told by those who trained them'}.\n"
    section += "\n| file | bytes | SHA-256 |\n|---|---|---|\n"
    section += "".join(f"| `models/{path.name}` | {path.stat().st_size:,} | `{sha256(path)}` |\n" for path in weights)
    if description is not None:
        section += (
            "\n`inference.json` takes from `models/model.json` what these weights must be used with. Where sections "
        )
        section += "below name published values, these hold:\n\n| key | value |\n|---|---|\n"
        section += "".join(f"| `{key}` | {json.dumps(value)} |\n" for key, value in description["settings"].items())
        readme = fit_readme(readme, description["settings"])
    changed, count = re.subn(r"(?ms)^## Weights\n.*?(?=^#)", lambda _: section + "\n", readme)
    if count != 1:
        raise ExportError(f"docs/README.md has {count} sections '## Weights', where the weights are told: it needs one")
    return changed.replace("\n## Performance\n", f"\n## Performance\n{OF_THE_DEMO}\n\n")


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def refuse_paths(folder: Path, places: set[Path]) -> None:
    """Raise an ExportError for a file that holds a path below one of these places."""
    prefixes = [re.escape(str(place).encode() + os.sep.encode()) for place in places if place != Path(place.anchor)]
    pattern = re.compile(b"(?<![\\w.])(?:" + b"|".join(prefixes) + b")[^\\s\"']*")
    for path in files_of(folder):
        for match in pattern.finditer(path.read_bytes()):
            if not match[0].startswith(PLACEHOLDER):
                raise ExportError(
                    f"{path.relative_to(folder)} holds {match[0].decode(errors='replace')}, a path of this machine: "
                    "take it out of the bundle"
                )


def content_hash(folder: Path) -> str:
    """SHA-256 over names and content of all files of a folder."""
    lines = "".join(f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files_of(folder))
    return hashlib.sha256(lines.encode()).hexdigest()


def write_zip(folder: Path, path: Path) -> None:
    """A zip that unpacks into one folder of that name; equal content makes equal bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files_of(folder):
            entry = zipfile.ZipInfo(file.relative_to(folder.parent).as_posix(), EPOCH)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            with archive.open(entry, "w", force_zip64=True) as target, open(file, "rb") as source:
                shutil.copyfileobj(source, target)


def export(
    bundle: str | Path,
    out: str | Path,
    weights_url: str | None = None,
    trained_on: str | None = None,
    keep_large: bool = False,
    models_dir: str | Path | None = None,
) -> tuple[Path, Path]:
    """Write ``<out>/<name>/`` and ``<out>/<name>_v<version>.zip``, each whole or not there, and return both paths.

    Args:
        bundle: a folder with configs, docs and perhaps models.
        out: a folder, made if need be.
        weights_url: where the person hosts the bundle's models folder. Weights over 25 MB, which the model zoo takes
            from elsewhere, are then left out; ``large_files.yml`` has address and hash, and MONAI's
            ``download_large_files`` brings them back.
        trained_on: what the weights have seen, for the README.
        keep_large: leave such weights in, for a place that takes them.
        models_dir: the folder of a training, whose weights go along; None for the bundle's models folder.

    Raises:
        ExportError: the bundle lacks a file, or ``models_dir`` the weights; ``out`` holds an export already; a path of
            this machine is in a file; weights are too large for the zoo, and neither ``weights_url`` nor ``keep_large``
            says what to do.
    """
    bundle, out = Path(bundle).resolve(), Path(out).resolve()
    for name in NEEDED:
        if not (bundle / name).is_file():
            raise ExportError(f"{bundle} has no {name}: give the folder of a bundle")
    models = bundle / "models" if models_dir is None else Path(models_dir).resolve()
    if models_dir is not None and not (models / "model.pt").is_file():
        known = ", ".join(with_weights_in(bundle / "models")) or "none in the bundle's models folder"
        raise ExportError(f"--models_dir {models} has no model.pt: give the folder of a training ({known})")
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    folder, archive = out / bundle.name, out / f"{bundle.name}_v{metadata['version']}.zip"
    for path in (folder, archive):
        if path.exists():
            raise ExportError(f"{path} exists: delete it, or give another --out")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".") as temporary:
        work = Path(temporary) / bundle.name
        for name in ("configs", "docs"):
            shutil.copytree(bundle / name, work / name, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        if others := others_configs(bundle):
            names = [path.relative_to(bundle).as_posix() for path in others]
            for name in names:
                (work / name).unlink()
            logger.warning(
                f"{', '.join(names)}: left out as your own: the name begins with {OWN}, or no page of docs has it; "
                f"to share such a config, name it in docs/README.md, by a name without {OWN}"
            )
        shutil.copyfile(bundle / "LICENSE", work / "LICENSE")
        (work / "models").mkdir()
        for module in components(work / "configs"):
            copy = work / module.relative_to(PACKAGE.parent)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(module, copy)
        weights = copy_weights(models, work / "models")
        large = [path for path in weights if path.stat().st_size > LARGE]
        if large and not weights_url and not keep_large:
            raise ExportError(
                f"{', '.join(path.name for path in large)} of {models}: over 25 MB, which the model zoo "
                "does not take: give --weights_url, where you host the models folder, or --keep_large for a place that "
                "takes such files, as the Hugging Face hub does"
            )
        if not any(path.name == "model.pt" for path in weights):
            there = with_weights_in(models)
            cure = "train, or bring a model.pt and its model.json"
            if there:
                cure = f"give --models_dir, one of {', '.join(there)}"
            logger.warning(
                f"{models} has no model.pt: the export holds no weights to infer with. To add them, {cure}, and export "
                "again; or let its users put both into its models folder"
            )
        described = {path.name: copy_description(models, path) for path in weights if path.suffix == ".pt"}
        description = described.get("model.pt")
        if description is not None:
            fit_metadata(metadata, description["settings"], trained_on)
            (work / "configs" / "metadata.json").write_text(json.dumps(metadata, indent=4) + "\n")
        readme = (bundle / "docs" / "README.md").read_text()
        readme = with_weights(readme, weights, trained_on, description)
        (work / "docs" / "README.md").write_text(readme)
        (work / "README.md").write_text(CARD + readme)
        (work / "requirements.txt").write_text(requirements(metadata))
        if large and weights_url:
            (work / "large_files.yml").write_text(large_files(large, weights_url))
            for path in large:
                path.unlink()
            names = ", ".join(path.name for path in large)
            logger.warning(f"{names}: over 25 MB, left out: put what is in {models} at {weights_url}")
        refuse_paths(work, {Path.home(), PACKAGE.resolve().parent, bundle, models})
        stamp = {"bundle": bundle.name, "version": metadata["version"], "sha256": content_hash(work)}
        (work / PACKAGE.name / "stamp.json").write_text(json.dumps(stamp, indent=1) + "\n")
        write_zip(work, Path(temporary) / archive.name)
        os.replace(work, folder)
        os.replace(Path(temporary) / archive.name, archive)
    return folder, archive


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m custom_components.export", description=__doc__.splitlines()[0])
    parser.add_argument("bundle", help="folder of the bundle, such as bundles/segment")
    parser.add_argument("--out", required=True, help="where its export goes")
    parser.add_argument("--weights_url", help="where the models folder is hosted; leaves weights over 25 MB out")
    parser.add_argument("--keep_large", action="store_true", help="leave them in, for a place that takes such files")
    parser.add_argument("--models_dir", help="folder of the weights; by default the bundle's models folder")
    parser.add_argument("--trained_on", help="what the weights were trained on, for the README")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        folder, archive = export(**vars(parser.parse_args()))
    except (ExportError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{folder}\n{archive}")
