"""Several exported bundles in one process: each brings ``custom_components``, and Python imports the first one only."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import custom_components
from custom_components.errors import InputError

STAMP = "stamp.json"  # what custom_components.run.export leaves beside the modules


def check_components(bundle_root: str | Path) -> None:
    """Make sure that a bundle runs on its own components, or on equal ones that another bundle brought before it.

    An export holds only the modules that its bundle needs, so those that are not loaded yet are found in this bundle
    from here on. A bundle without components, as in the repository, takes what is installed.

    Raises:
        InputError: a module of the bundle differs from the one of that name in the components already loaded.
    """
    own = Path(bundle_root, "custom_components").resolve()
    folders = [Path(folder).resolve() for folder in custom_components.__path__]
    if own in folders or not own.is_dir():
        return
    modules = sorted(module.relative_to(own) for module in own.rglob("*.py"))
    for module in modules:
        for folder in folders:
            other = folder / module
            if other.is_file() and other.read_bytes() != (own / module).read_bytes():
                raise InputError(
                    f"{own} ({version(own)}): its {module} is not that of {folder} ({version(folder)}), on which "
                    "this process runs already: run the bundles in processes of their own, or export both anew from "
                    "one version"
                )
    custom_components.__path__.append(str(own))
    for package in {module.parent.name for module in modules} - {""}:
        importlib.import_module(f"{custom_components.__name__}.{package}").__path__.append(str(own / package))


def version(folder: Path) -> str:
    """Bundle, version and hash of an export's components, or that they are none."""
    if not (folder / STAMP).is_file():
        return "no export"
    stamp = json.loads((folder / STAMP).read_text())
    return f"{stamp['bundle']} {stamp['version']}, {stamp['sha256'][:12]}"
