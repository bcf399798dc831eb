"""What weights say of themselves: what they must be used with, and how they were made.

A plain state dict, which MONAI's loaders want, holds no such thing. So a JSON lies beside it, tied to it by its SHA-256
(:func:`custom_components.run.weights.save_weights`); a checkpoint to resume from holds the same inside.
"""

import hashlib
import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from custom_components.errors import InputError
from custom_components.files import file_stamp

logger = logging.getLogger(__name__)


def plain(value: Any) -> Any:
    """A value as JSON gives it back: tuples and arrays as lists, paths, devices and what else there is as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def sha256(path: str | Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_fingerprint(path: str | Path | None) -> str | None:
    """The start of a file's SHA-256, for a recipe; None where no file is given, or none is there."""
    return sha256(path)[:16] if path is not None and Path(path).is_file() else None


def data_fingerprint(data: Sequence[Mapping[str, Any]], dataset_dir: str | Path) -> str:
    """Number of the items and a hash over all that they say, wherever ``dataset_dir`` lies."""
    root = os.path.join(Path(dataset_dir).expanduser(), "")
    items = [{k: v.removeprefix(root) if isinstance(v, str) else v for k, v in item.items()} for item in data]
    digest = hashlib.sha256(json.dumps(plain(items), sort_keys=True).encode()).hexdigest()
    return f"{len(items)} items, {digest[:16]}"


def files_fingerprint(data: Sequence[Mapping[str, Any]], dataset_dir: str | Path) -> str:
    """Number of the images and labels below ``dataset_dir`` that the items name, and a hash over their sizes in order.

    Where :func:`data_fingerprint` is the same too, it is the same data, perhaps in another place.
    """
    root = os.path.join(Path(dataset_dir).expanduser(), "")
    named = [item[key] for item in data for key in ("image", "label") if isinstance(item.get(key), str)]
    stamps = [file_stamp(path).rpartition(":")[0] for path in named if path.startswith(root)]
    return f"{len(stamps)} files, {hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:16]}"


def describe(
    settings: Mapping[str, Any],
    bundle_root: str | Path,
    recipe: Mapping[str, Any] | None = None,
    license: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The description of weights, as JSON holds it.

    Args:
        settings: what the weights must be used with, by the names of ``inference.json``'s keys.
        bundle_root: of the bundle that makes them, whose ``metadata.json`` names it and the packages that it needs.
        recipe: how they are made; its ``dataset_dir`` says nothing to others, and is left out.
        license: of the weights, None where nobody has said.
        more: ``assumed``, settings that were taken on trust; ``source``, the file that the weights were imported from.
    """
    bundle = json.loads(Path(bundle_root, "configs", "metadata.json").read_text())
    versions = {"bundle": bundle["version"], "python": platform.python_version()}
    for package in ("monai", "torch", "numpy", *bundle["required_packages_version"]):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # one that this run did without
            continue
    told = {"bundle": bundle["name"], "settings": settings, "license": license, **more}
    told["recipe"] = {key: value for key, value in (recipe or {}).items() if key != "dataset_dir"}
    return plain(told | {"versions": versions})


def check_settings(path: str | Path, description: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> None:
    """Raise an InputError where a run uses weights with other settings than their description says.

    What the description does not say is taken on trust, with a warning. The encoder of a text is known by its
    fingerprint, wherever it lies.
    """
    told, used = dict((description or {}).get("settings", {})), plain(settings)
    wrong = []
    for key in [key for key in used if key in told and used[key] != told[key]]:
        name = key.removesuffix("_fingerprint")
        if name == key and f"{key}_fingerprint" in told and f"{key}_fingerprint" in used:
            continue  # moved, perhaps
        of = f" ({told[key]}, not {used[key]})" if name != key else ""
        wrong.append(f"it was trained with {name} {told.get(name)}, and {name} is {used.get(name)}{of}")
    if wrong:
        raise InputError(
            f"{path}: does not fit the keys: {'; '.join(wrong)}. Leave the key out to take the weights' own value, or "
            "give other weights"
        )
    assumed = used
    if description is not None:
        assumed = {key: used[key] for key in description.get("assumed", ()) if key in used}
    if assumed:
        values = ", ".join(f"{key} {value}" for key, value in assumed.items())
        logger.warning(f"{path}: does not itself tell what it was trained with; assumed: {values}")
