"""The precision of a run: what is asked for, what the machine is fast at, and what a checkpoint was trained in."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from custom_components.cpu import BFLOAT16_UNITS, bfloat16_units
from custom_components.distributed import from_rank_zero
from custom_components.errors import InputError

logger = logging.getLogger(__name__)


def bfloat16(
    amp: bool | str, device: torch.device | str, checkpoint: str | Path | None = None, resume: str | Path | None = None
) -> bool:
    """Whether a run computes in bfloat16, by autocast, and not in float32; where it chose, it tells so and why.

    Under torchrun, rank 0 chooses for all.

    Args:
        amp: true or false, or ``auto``: bfloat16 where the device has instructions for it, since it is faster there.
        checkpoint, resume: ``path`` and ``resume`` of :class:`custom_components.run.resume.Checkpointer`: where ``amp``
            is ``auto``, a training goes on in the precision in which it began, on any machine. Of an evaluation, the
            weights, which say it in the JSON beside them, and ``auto``.

    Returns:
        Whether autocast is on.

    Raises:
        InputError: bfloat16 on a GPU without it, which torch would refuse or imitate slowly.
    """
    has, why = fast_bfloat16(torch.device(device))
    began = recorded(checkpoint, resume) if amp == "auto" else None
    chosen, file = from_rank_zero((has if amp == "auto" else amp, None) if began is None else began)
    if chosen and not has and torch.device(device).type == "cuda":
        asked = "amp is true" if file is None else f"{file} was trained in bfloat16"
        raise InputError(
            f"{asked}, and {why}: give --amp false for float32"
            + (f", and --resume {file} to go on so all the same" if file is not None else ", or --amp auto")
        )
    name = "bfloat16" if chosen else "float32"
    if file is not None:
        logger.info(f"amp auto: {name}, as {file} was trained" + ("" if chosen == has else f", though {why}"))
    elif amp == "auto":
        logger.info(f"amp auto: {name}, since {why}")
    elif chosen and not has:
        logger.warning(f"amp is true, though {why}: float32, which --amp auto would take, may be faster")
    return chosen


def fast_bfloat16(device: torch.device) -> tuple[bool, str]:
    """Whether a device multiplies bfloat16 matrices faster than float32 ones, and by what."""
    if device.type == "cuda":
        has, name = torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_name(device)
        return has, f"{name} has {'' if has else 'no '}bfloat16"
    if device.type != "cpu":
        return False, f"bfloat16 has not been tried on {device.type}"
    units = bfloat16_units()
    return units is not None, f"this CPU has {units or 'neither ' + ' nor '.join(BFLOAT16_UNITS)}"


def recorded(checkpoint: str | Path | None, resume: str | Path | None) -> tuple[bool, str] | None:
    """Whether what a run starts from was trained in bfloat16, and its file; None where nothing tells.

    A file that cannot be read tells nothing: the Checkpointer says so when it resumes.
    """
    if checkpoint is None or resume is None:
        return None
    path = Path(checkpoint)
    files = [path, path.with_name(f"{path.stem}_previous{path.suffix}")] if resume == "auto" else [Path(resume)]
    for file in filter(Path.is_file, files):
        beside = file.with_suffix(".json")
        try:  # of the file's tensors nothing is read
            if beside.is_file():
                content = json.loads(beside.read_text())
            else:
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception:  # zip, pickle and end-of-file errors of many types
            continue
        recipe = content.get("recipe") if isinstance(content, Mapping) else None
        began = recipe.get("amp") if isinstance(recipe, Mapping) else None
        return (began, str(file)) if isinstance(began, bool) else None
    return None
