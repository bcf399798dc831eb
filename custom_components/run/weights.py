"""Weights in and out: files that are safe to load, published checkpoints, and no silent random start."""

import argparse
import contextlib
import hashlib
import json
import logging
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from custom_components.errors import InputError
from custom_components.files import replacing
from custom_components.run.description import check_settings, sha256
from custom_components.vit import POSITIONS, patch_grid
from torch import Tensor, nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)

ENCODER_SOURCE = "give the encoder.pt that the pretrain bundle or configs/import_weights.json wrote to a models folder"
TRAINED = "train first, or give models_dir, the folder of a training"
ABSENT = "is not in it"
SCORE = ("align_pool", "top_k", "lse_beta", "temperature")  # how a sentence is scored in a volume
PARTS = re.compile(r"(encoder\.)?(blocks|statistics)\.")  # without which an encoder would compute something else


def save_atomically(content: Any, path: str | Path, previous: str | Path | None = None) -> None:
    """``torch.save`` to a temporary file beside ``path``, then rename: a kill leaves the old file or the new one.

    Tensors are stored as of the CPU, so that every machine can load them.

    Args:
        previous: where the old file goes; None drops it. A kill between the two renames leaves it there alone.

    Raises:
        InputError: the disk is full, or the folder cannot be written; the old file is still there.
    """
    path = Path(path)
    with _failures_told(path), replacing(path) as temporary:
        _write(content, temporary)
        if previous is not None and path.exists():
            os.replace(path, previous)


def save_weights(weights: Mapping[str, Tensor], path: str | Path, description: Mapping[str, Any] | None = None) -> None:
    """A plain state dict, as :func:`save_atomically`, and beside it, as JSON of the same stem, its description.

    The JSON holds the file's SHA-256. A kill between the two renames leaves a pair that :func:`description_of` refuses.

    Args:
        description: see :func:`custom_components.run.description.describe`; None writes none.
    """
    path = Path(path)
    if description is None:
        save_atomically(weights, path)
        return
    with _failures_told(path), replacing(path.with_suffix(".json")) as told, replacing(path) as temporary:
        _write(weights, temporary)
        with open(told, "w") as file:
            json.dump({**description, "sha256": sha256(temporary)}, file, indent=1)
            _to_disk(file)


@contextlib.contextmanager
def _failures_told(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
        cause = str(error).strip().splitlines()[0]
        raise InputError(
            f"{path}: could not be written ({cause}); free space there and start again, what was there before is kept"
        ) from error


def _write(content: Any, path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(_on_cpu(content), file)
        _to_disk(file)


def _to_disk(file: IO) -> None:
    """Else a rename may reach the disk before the content."""
    file.flush()
    os.fsync(file.fileno())


def _on_cpu(content: Any) -> Any:
    if isinstance(content, Tensor):
        return content.cpu()
    if isinstance(content, Mapping):
        return {key: _on_cpu(value) for key, value in content.items()}
    return type(content)(map(_on_cpu, content)) if type(content) in (list, tuple) else content


def description_of(path: str | Path, content: Any = None) -> dict[str, Any] | None:
    """What weights say of themselves, from the JSON beside them or inside the checkpoint; None if they say nothing.

    Args:
        content: of the file, if it is read already.

    Raises:
        InputError: the JSON is damaged, or describes another file.
    """
    path = Path(path)
    beside = path.with_suffix(".json")
    if beside == path or not beside.is_file():
        content = load_file(path) if content is None else content
        found = content.get("description") if isinstance(content, Mapping) else None
        return found if isinstance(found, Mapping) else None
    try:
        found = json.loads(beside.read_text())
        described, settings = found["sha256"], dict(found["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{beside}: is damaged, or no description of {path.name}; bring both from where they came, or delete it to "
            "load the weights as they are, and give all keys that they were trained with"
        ) from error
    if described != (actual := sha256(path)):
        raise InputError(
            f"{beside}: describes other weights ({str(described)[:12]}) than {path.name} holds ({actual[:12]}): "
            "bring both from one place, or, where a training was killed as it wrote them, resume it, which writes both"
        )
    return found | {"settings": settings}


def described(
    file: str | Path | None, otherwise: Mapping[str, Any] | None = None, leave_out: Sequence[str] = ()
) -> dict[str, Any]:
    """What weights must be used with, by the names of a config's keys: the config's own values where it gives none.

    Args:
        file: the weights. What there is none of, as None or as a file that is not there, tells nothing.
        otherwise: values where nothing tells them.
        leave_out: what a training on these weights sets itself.
    """
    told = description_of(file) if file is not None and Path(file).is_file() else None
    if told is None:
        return dict(otherwise or {})
    recipe = told.get("recipe") or {}  # which alone tells the score of weights of before the settings did
    settings = {key: recipe[key] for key in SCORE if key in recipe} | told["settings"]
    return {key: value for key, value in settings.items() if key not in leave_out}


def trained_with(checkpoint: str | Path) -> dict[str, Any]:
    """All that a checkpoint of a training was made with, by the names of its config's keys, for its evaluation.

    Beside what the weights must be used with (:func:`described`), the recipe: masks, losses, sizes of the decoders. Not
    the precision, which :func:`custom_components.run.precision.bfloat16` takes from there itself.

    Raises:
        InputError: no such file, or an unreadable one.
    """
    told = description_of(checkpoint) or {}
    recipe = {key: value for key, value in told.get("recipe", {}).items() if key != "amp"}
    return {**recipe, **told.get("settings", {})}


def frozen_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that do not train, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if not parameter.requires_grad}


def fingerprint(module: nn.Module) -> str | None:
    """A number for the frozen parameters of a module, or None if it has none; precision beyond bfloat16 is ignored."""
    frozen = frozen_parameters(module)
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in frozen.items():
        digest.update(name.encode())
        digest.update(parameter.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest() if frozen else None


def text_fingerprint(text_encoder: nn.Module, tokenizer: Any) -> str:
    """A number for a frozen text encoder's weights (:func:`fingerprint`), and the words and rules of its tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    rules = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}  # of the last call
    words = hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()
    return f"{fingerprint(text_encoder)[:16]}-{words[:16]}"


def check_fingerprint(module: nn.Module, expected: str | None, path: str | Path) -> None:
    """Raise an InputError unless the frozen parameters are those that a checkpoint was trained beside."""
    if fingerprint(module) != expected:
        first = min(frozen_parameters(module), default="none")
        raise InputError(
            f"{path}: was trained beside other frozen weights than this run has ({first}, ...): give the key they come "
            "from, such as text_encoder, its former value"
        )


def check_there(path: str | Path, key: str = "checkpoint", cure: str = TRAINED) -> None:
    """Raise an InputError with the ``cure`` where the file that a ``key`` of the config gives is not there."""
    if not Path(path).is_file():
        raise InputError(f"{key} {path}: no such checkpoint; {cure}")


def load_file(path: str | Path, key: str = "checkpoint", cure: str = TRAINED) -> Any:
    """``torch.load(..., weights_only=True)`` onto the CPU.

    ``argparse.Namespace``, which MAE's and SimCroP's authors pickle beside the weights, is the one class allowed.

    Args:
        key, cure: see :func:`check_there`.

    Raises:
        InputError: the file is missing, truncated, damaged, or holds more than weights.
    """
    check_there(path, key, cure)
    try:
        _check_sums(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and end-of-file errors of many types
        if named := re.search(r"GLOBAL (\S+)", str(error)):  # torch's own words would advise to load it all the same
            raise InputError(
                f"{path}: not a readable checkpoint of weights only: it names {named[1]}, which might run code; get a "
                "file of tensors alone from where it came, and do not open this one in another way"
            ) from error
        cause = str(error).rpartition("WeightsUnpickler error:")[2].strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{path}: not a readable checkpoint of weights only; fetch or write it again ({cause[0]})"
        ) from error


def _check_sums(path: str | Path) -> None:
    """Compare the content with the zip's checksums, which torch does not. Files of before torch 1.6 have none."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if (damaged := file.testzip()) is not None:
                raise OSError(f"its {damaged} is damaged")


def state_dict_of(content: Any) -> dict[str, Tensor]:
    """The state dict in a checkpoint: itself, or under ``model`` (MAE, SimCroP), ``network`` or ``state_dict``."""
    content = content if isinstance(content, Mapping) else {}
    for key in ("model", "network", "state_dict"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def misfits(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, str]:
    """Why tensors of a network cannot be taken from a file: name -> reason. Empty if the file fits."""
    reasons = {}
    for name, tensor in own.items():
        there = found.get(name)
        if there is None:
            reasons[name] = ABSENT
        elif there.shape != tensor.shape:
            reasons[name] = f"is {tuple(there.shape)}, not {tuple(tensor.shape)}"
        elif not bool(torch.isfinite(there).all()):
            reasons[name] = "holds values that are not finite"
    return reasons


def _fill(module: nn.Module, path: str | Path, content: Any, wanted: Callable[[str], bool]) -> None:
    """Load every tensor of ``module`` whose name is ``wanted`` from what a file holds; log what was taken and left."""
    found = state_dict_of(content)
    own = module.state_dict()
    names = [name for name in own if wanted(name)]
    reasons = misfits({name: own[name] for name in names}, found)
    missing = [name for name, reason in reasons.items() if reason is ABSENT]
    if len(missing) == len(names):
        raise InputError(
            f"{path}: fits nothing of {type(module).__name__}, which wants {names[0]} and {len(names) - 1} more; "
            f"the file holds {', '.join(list(found)[:3]) or 'no tensors'}"
        )
    if reasons:
        wrong = [f"{name} {reason}" for name, reason in reasons.items() if reason is not ABSENT]
        raise InputError(
            f"{path}: does not fit {type(module).__name__}: {len(missing)} tensors missing, {len(wrong)} of other size "
            f"or not finite ({(wrong or missing)[0]}); set the network's keys to the sizes that it was trained with"
        )
    if lost := [name for name in found if name not in own and PARTS.match(name)]:
        raise InputError(
            f"{path}: does not fit {type(module).__name__}, which has no place for {len(lost)} tensors ({lost[0]}); "
            "set the network's keys to the sizes that it was trained with"
        )
    module.load_state_dict({name: found[name] for name in names}, strict=False)
    logger.info(
        f"{path}: filled {len(names)} of {len(own)} tensors of {type(module).__name__}, "
        f"left {len(set(found) - set(names))} of the file's unused"
    )


def _load(key: str, checkpoint: str | Path, source: str) -> Any:
    """What a file holds; an InputError that names the key and the file's ``source`` if it is not there."""
    if not Path(checkpoint).is_file():
        raise InputError(
            f"{key} {checkpoint}: no such file; {source}, or set {key} to null to start from random weights"
        )
    return load_file(checkpoint)


def load_weights(module: nn.Module, checkpoint: str | Path, settings: Mapping[str, Any] | None = None) -> nn.Module:
    """Fill all weights of a module from a checkpoint of the same layout, and return the module.

    Frozen weights, which :class:`custom_components.run.resume.Checkpointer` leaves out, are compared instead.

    Args:
        settings: what the run uses the weights with, compared with what they say of themselves
            (:func:`custom_components.run.description.check_settings`); None compares nothing.

    Raises:
        InputError: unreadable file, any tensor missing or of another size, other frozen weights, other settings.
    """
    content, left_out = load_file(checkpoint), {}
    if settings is not None:
        check_settings(checkpoint, description_of(checkpoint, content), settings)
    if isinstance(content, Mapping) and "frozen" in content:
        check_fingerprint(module, content["frozen"].get("network"), checkpoint)
        left_out = frozen_parameters(module)
    _fill(module, checkpoint, content, lambda name: name not in left_out)
    return module


def load_pretrained(
    encoder: nn.Module, pretrained: str | Path | None, settings: Mapping[str, Any] | None = None
) -> nn.Module:
    """Fill all of a :class:`custom_components.vit.SimCroPEncoder` from ``models/encoder.pt`` of pre-training.

    With None the encoder stays random, and the log says so. ``settings`` are compared as by :func:`load_weights`.

    Raises:
        InputError: no such file, or as :func:`load_weights`.
    """
    if pretrained is None:
        logger.warning("pretrained is null: the encoder starts from RANDOM weights")
        return encoder
    content = _load("pretrained", pretrained, ENCODER_SOURCE)
    if settings is not None:
        check_settings(pretrained, description_of(pretrained, content), settings)
    _fill(encoder, pretrained, content, lambda name: True)
    return encoder


def load_mae(encoder: nn.Module, checkpoint: str | Path | None) -> nn.Module:
    """Initialise a :class:`custom_components.vit.SimCroPEncoder` from a 2D MAE ViT checkpoint, as the authors do.

    Blocks and final norm are taken. With None the encoder stays as it is.

    Raises:
        InputError: as :func:`load_pretrained`.
    """
    if checkpoint is not None:
        source = "download MAE's mae_pretrain_vit_base.pth (facebookresearch/mae) to there"
        content = _load("mae_checkpoint", checkpoint, source)
        _fill(encoder, checkpoint, content, lambda name: name.startswith(("blocks.", "norm.")))
    return encoder


def positions_formula(table: Tensor, grid: Sequence[int]) -> str | None:
    """Which key of :data:`custom_components.vit.POSITIONS` makes the table ``[N, C]`` of a grid; None if none does."""
    for name, formula in POSITIONS.items():
        if torch.allclose(table.float(), formula(grid, table.shape[1]), atol=1e-3):  # half precision in the file
            return name
    return None


def load_for_region(
    encoder: nn.Module,
    checkpoint: str | Path | None,
    positions: str = "rebuilt",
    pretrained_img_size: Sequence[int] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Start a segmentation encoder from the pretrain bundle's ``models/encoder.pt``, whose grid may be another.

    Patch embedding, statistics and blocks are taken. The class token has no counterpart, and the final norm starts
    fresh, as the authors fine-tune it. With None the encoder stays random, with a warning.

    Args:
        encoder: a :class:`custom_components.vit.SimCroPEncoder` without class token.
        positions: ``rebuilt`` makes a table for the region's own grid by the formula of the checkpoint's, as published,
            whichever of :data:`custom_components.vit.POSITIONS` that is; ``interpolated`` stretches the checkpoint's
            table over it.
        pretrained_img_size: of pre-training; None for what the checkpoint says of itself. ``interpolated`` needs it.
            ``rebuilt`` recognises the formula by the whole table with it, and by the first two patches alone without
            it, or where it is another size.
        settings: compared as by :func:`load_weights`; but the region, and the voxels' spacing, are this training's own.

    Raises:
        InputError: as :func:`load_pretrained`; the checkpoint's positions are of no known formula, or not of
            ``pretrained_img_size``; ``positions`` is unknown.
    """
    if positions not in ("rebuilt", "interpolated"):
        raise InputError(f"positions {positions!r} is unknown: choose rebuilt or interpolated")
    if checkpoint is None:
        logger.warning("pretrained is null: NOTHING is loaded, the encoder starts from random weights")
        return encoder
    content = _load("pretrained", checkpoint, ENCODER_SOURCE)
    description = description_of(checkpoint, content)
    if settings is not None:
        own = ("img_size", "pixdim")
        check_settings(checkpoint, description, {key: value for key, value in settings.items() if key not in own})
    if pretrained_img_size is None and description is not None:
        pretrained_img_size = description["settings"].get("img_size")
    _fill(encoder, checkpoint, content, lambda name: name.startswith(("patch_embed.", "statistics.", "blocks.")))
    found = state_dict_of(content)
    if "pos_embed" not in found:
        raise InputError(f"pretrained {checkpoint}: has no pos_embed; give a whole encoder.pt")
    table = found["pos_embed"][0, int("cls_token" in found) :]
    grid = None if pretrained_img_size is None else patch_grid(pretrained_img_size, encoder.patch_size)
    fits = grid is not None and math.prod(grid) == len(table)
    if positions == "interpolated":
        if grid is None:
            raise InputError("positions is interpolated: give pretrained_img_size, the img_size of pre-training")
        if not fits:
            raise InputError(
                f"pretrained {checkpoint}: has positions for {len(table)} patches, not {math.prod(grid)}; "
                f"set pretrained_img_size ({list(pretrained_img_size)}) to the img_size of pre-training"
            )
        volume = F.interpolate(table.T.reshape(1, -1, *grid), encoder.grid, mode="trilinear", align_corners=True)
        encoder.pos_embed.copy_(volume.flatten(2).transpose(1, 2))
        return encoder
    # the first two rows are those of patches (0, 0, 0) and (0, 0, 1), whatever the grid
    formula = positions_formula(table, grid) if fits else positions_formula(table[:2], (1, 1, 2))
    if formula is None:
        raise InputError(
            f"pretrained {checkpoint}: its positions are those of none of {', '.join(POSITIONS)}: set positions to "
            "interpolated, and pretrained_img_size to the img_size of pre-training"
        )
    encoder.pos_embed.copy_(POSITIONS[formula](encoder.grid, table.shape[1])[None])
    logger.info(f"{checkpoint}: positions rebuilt for the region by the formula of its own, {formula}")
    return encoder
