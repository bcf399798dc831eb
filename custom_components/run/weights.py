"""Weights in and out: files that are safe to load, published checkpoints, and no silent random start."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from custom_components.errors import InputError
from custom_components.files import replacing
from custom_components.vit import POSITIONS, SimCroPEncoder, patch_grid

logger = logging.getLogger(__name__)

ENCODER_SOURCE = "give the encoder.pt that the pretrain bundle or configs/import_weights.json wrote to a models folder"


def save_atomically(content: Any, path: str | Path, previous: str | Path | None = None) -> None:
    """``torch.save`` to a temporary file beside ``path``, then rename: a kill leaves the old file or the new one.

    Args:
        previous: where the old file goes; None drops it. A kill between the two renames leaves it there alone.

    Raises:
        InputError: the disk is full, or the folder cannot be written; the old file is still there.
    """
    path = Path(path)
    try:
        with replacing(path) as temporary:
            with open(temporary, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())  # else the rename may reach the disk before the content
            if previous is not None and path.exists():
                os.replace(path, previous)
    except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
        cause = str(error).strip().splitlines()[0]
        raise InputError(
            f"{path}: could not be written ({cause}); free space there and start again, what was there before is kept"
        ) from error


def frozen_parameters(module: nn.Module) -> set[str]:
    """Names of the parameters that do not train."""
    return {name for name, parameter in module.named_parameters() if not parameter.requires_grad}


def fingerprint(module: nn.Module) -> str | None:
    """A number for the frozen parameters of a module, or None if it has none; precision beyond bfloat16 is ignored."""
    names = frozen_parameters(module)
    if not names:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in module.named_parameters():
        if name in names:
            digest.update(name.encode())
            digest.update(parameter.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_fingerprint(module: nn.Module, expected: str | None, path: str | Path) -> None:
    """Raise an InputError unless the frozen parameters are those that a checkpoint was trained beside."""
    if fingerprint(module) != expected:
        first = min(frozen_parameters(module), default="none")
        raise InputError(
            f"{path}: was trained beside other frozen weights than this run has ({first}, ...): give the key they come "
            "from, such as text_encoder, its former value"
        )


def load_file(path: str | Path) -> Any:
    """``torch.load(..., weights_only=True)`` onto the CPU.

    ``argparse.Namespace``, which MAE's and SimCroP's authors pickle beside the weights, is the one class allowed.

    Raises:
        InputError: the file is missing, truncated, or holds more than weights.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint; check the path, or set the key to null to start without it")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and end-of-file errors of many types
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named:  # torch's own words would advise to load it all the same
            raise InputError(
                f"{path}: not a readable checkpoint of weights only: it names {named[1]}, which might run code; get a "
                "file of tensors alone from where it came, and do not open this one in another way"
            ) from error
        cause = str(error).rpartition("WeightsUnpickler error:")[2].strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{path}: not a readable checkpoint of weights only; fetch or write it again ({cause[0]})"
        ) from error


def state_dict_of(content: Any) -> dict[str, Tensor]:
    """The state dict in a checkpoint: itself, or under ``model`` (MAE, SimCroP), ``network`` or ``state_dict``."""
    for key in ("model", "network", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    return {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}


def _fill(module: nn.Module, path: str | Path, wanted: Callable[[str], bool], content: Any = None) -> None:
    """Load every tensor of ``module`` whose name is ``wanted`` from a checkpoint, and log what was taken and left."""
    found = state_dict_of(load_file(path) if content is None else content)
    names = [name for name in module.state_dict() if wanted(name)]
    missing = [name for name in names if name not in found]
    if len(missing) == len(names):
        raise InputError(
            f"{path}: fits nothing of {type(module).__name__}, which wants {names[0]} and {len(names) - 1} more; "
            f"the file holds {', '.join(list(found)[:3]) or 'no tensors'}"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    wrong = [
        f"{name} is {tuple(found[name].shape)}, not {shapes[name]}"
        for name in names
        if name in found and tuple(found[name].shape) != shapes[name]
    ]
    if missing or wrong:
        raise InputError(
            f"{path}: does not fit {type(module).__name__}: {len(missing)} tensors missing, {len(wrong)} of other size "
            f"({(wrong or missing)[0]}); set the network's keys to the sizes that the checkpoint was trained with"
        )
    module.load_state_dict({name: found[name] for name in names}, strict=False)
    logger.info(
        f"{path}: filled {len(names)} of {len(shapes)} tensors of {type(module).__name__}, "
        f"left {len(set(found) - set(names))} of the file's unused"
    )


def _require(key: str, checkpoint: str | Path, source: str) -> None:
    """Raise an InputError that names the key, unless its file is there."""
    if not Path(checkpoint).is_file():
        raise InputError(
            f"{key} {checkpoint}: no such file; {source}, or set {key} to null to start from random weights"
        )


def load_weights(module: nn.Module, checkpoint: str | Path) -> nn.Module:
    """Fill all weights of a module from a checkpoint of the same layout, and return the module.

    Frozen weights, which :class:`custom_components.run.resume.Checkpointer` leaves out, are compared instead.

    Raises:
        InputError: unreadable file, any tensor missing or of another size; names the first. Or other frozen weights.
    """
    content = load_file(checkpoint)
    kept_elsewhere: set[str] = set()
    if isinstance(content, Mapping) and "frozen" in content:
        check_fingerprint(module, content["frozen"].get("network"), checkpoint)
        kept_elsewhere = frozen_parameters(module)
    _fill(module, checkpoint, lambda name: name not in kept_elsewhere, content)
    return module


def load_pretrained(encoder: nn.Module, pretrained: str | Path | None) -> nn.Module:
    """Fill all of a :class:`custom_components.vit.SimCroPEncoder` from ``models/encoder.pt`` of pre-training.

    With None the encoder stays random, and the log says so.

    Raises:
        InputError: as :func:`load_weights`.
    """
    if pretrained is None:
        logger.warning("pretrained is null: the encoder starts from RANDOM weights")
        return encoder
    _require("pretrained", pretrained, ENCODER_SOURCE)
    return load_weights(encoder, pretrained)


def load_mae(encoder: nn.Module, checkpoint: str | Path | None) -> nn.Module:
    """Initialise a :class:`custom_components.vit.SimCroPEncoder` from a 2D MAE ViT checkpoint, as the authors do.

    Blocks and final norm are taken; patch embedding, positions, class token and decoder are not. With None the encoder
    stays as it is.

    Raises:
        InputError: as :func:`load_weights`.
    """
    if checkpoint is not None:
        source = "download MAE's mae_pretrain_vit_base.pth (facebookresearch/mae) to there"
        _require("mae_checkpoint", checkpoint, source)
        _fill(encoder, checkpoint, lambda name: name.startswith(("blocks.", "norm.")))
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
) -> nn.Module:
    """Start a segmentation encoder from the pretrain bundle's ``models/encoder.pt``, whose grid may be another.

    Patch embedding and blocks are taken. The class token has no counterpart, and the final norm starts fresh, as the
    authors fine-tune it. With None the encoder stays random, which is said as a warning.

    Args:
        encoder: a :class:`custom_components.vit.SimCroPEncoder` without class token.
        checkpoint: the file, or None.
        positions: ``rebuilt`` makes a table for the region's own grid by the formula of the checkpoint's, as published,
            whichever of :data:`custom_components.vit.POSITIONS` that is; ``interpolated`` stretches the checkpoint's
            table over it.
        pretrained_img_size: of pre-training. ``interpolated`` needs it; ``rebuilt`` tells the formula from the whole
            table with it, and from the first two patches alone without it, or where it is another size.

    Raises:
        InputError: as :func:`load_weights`; the checkpoint's positions are of no known formula, or not of
            ``pretrained_img_size``; ``positions`` is unknown.
    """
    if positions not in ("rebuilt", "interpolated"):
        raise InputError(f"positions {positions!r} is unknown: choose rebuilt or interpolated")
    if checkpoint is None:
        logger.warning("pretrained is null: NOTHING is loaded, the encoder starts from random weights")
        return encoder
    _require("pretrained", checkpoint, ENCODER_SOURCE)
    content = load_file(checkpoint)
    _fill(encoder, checkpoint, lambda name: name.startswith(("patch_embed.", "blocks.")), content)
    found = state_dict_of(content)
    if "pos_embed" not in found:
        raise InputError(f"pretrained {checkpoint}: has no pos_embed; give a whole encoder.pt")
    table = found["pos_embed"][0, int("cls_token" in found) :]
    grid = None if pretrained_img_size is None else patch_grid(pretrained_img_size, encoder.patch_size)
    fits = grid is not None and grid[0] * grid[1] * grid[2] == len(table)
    if positions == "interpolated":
        if grid is None:
            raise InputError("positions is interpolated: give pretrained_img_size, the img_size of pre-training")
        if not fits:
            raise InputError(
                f"pretrained {checkpoint}: has positions for {len(table)} patches, not {grid[0] * grid[1] * grid[2]}; "
                f"set pretrained_img_size ({list(pretrained_img_size)}) to the img_size of pre-training"
            )
        volume = table.T.reshape(1, -1, *grid)
        volume = F.interpolate(volume, size=encoder.grid, mode="trilinear", align_corners=True)
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


def _tensor_table(
    own: Mapping[str, Tensor], found: Mapping[str, Tensor], wanted: Callable[[str], bool]
) -> tuple[list[dict[str, str]], list[str]]:
    """What becomes of every tensor of a module and of a file, and what stands in the way of taking those wanted.

    Returns:
        a row of tensor, status (taken, skipped or missing), shape and reason for each; and the faults.
    """
    rows, faults = [], []

    def add(name: str, status: str, tensor: Tensor, reason: str) -> None:
        shape = "x".join(map(str, tensor.shape))
        rows.append({"status": status, "tensor": name, "shape": shape, "reason": reason})

    for name, tensor in own.items():
        there = found.get(name)
        if not wanted(name):
            add(name, "missing", tensor, "nothing in the file serves")
        elif there is None:
            add(name, "missing", tensor, "not in the file")
            faults.append(f"{name} is not in it")
        elif there.shape != tensor.shape:
            add(name, "missing", tensor, f"{list(there.shape)} in the file")
            faults.append(f"{name} is {tuple(there.shape)}, not {tuple(tensor.shape)}")
        elif not bool(torch.isfinite(there).all()):
            add(name, "missing", tensor, "not finite in the file")
            faults.append(f"{name} holds values that are not finite")
        else:
            add(name, "taken", there, "as stored" if there.dtype == tensor.dtype else f"from {there.dtype}")
    for name, tensor in found.items():
        if name not in own:
            add(name, "skipped", tensor, "no part of this network")
        elif not wanted(name):
            add(name, "skipped", tensor, "of no use to this network")
    return rows, faults


def _print_table(rows: Iterable[Mapping[str, str]]) -> None:
    """A line for each kind of tensor, those of all blocks together; the CSV has a line for each tensor."""
    kinds = Counter(tuple(re.sub(r"\.\d+(?=\.)", ".*", cell) for cell in row.values()) for row in rows)
    lines = [("status", "tensors", "tensor", "shape", "reason")]
    lines += [(status, str(count), *rest) for (status, *rest), count in kinds.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _import(
    module: nn.Module,
    found: Mapping[str, Tensor],
    checkpoint: str | Path,
    path: str | Path,
    cure: str,
    wanted: Callable[[str], bool],
    harmless: Callable[[str], bool],
    reasons: Mapping[str, str],
) -> None:
    """Fill ``module`` from a file's tensors, write it to ``path`` and the table of them beside it: all, or nothing.

    Args:
        cure: what an error advises.
        wanted: names that must be taken.
        harmless: names of the file whose absence from the module changes nothing that it computes.
        reasons: better ones than the table's own, by ``status tensor``.
    """
    own = module.state_dict()
    rows, faults = _tensor_table(own, found, wanted)
    rows = [row | {"reason": reasons.get(f"{row['status']} {row['tensor']}", row["reason"])} for row in rows]
    faults += [f"{name} is none of this network's" for name in found if name not in own and not harmless(name)]
    _print_table(rows)
    if faults:
        raise InputError(
            f"checkpoint {checkpoint}: {faults[0]}, and {len(faults) - 1} more of its tensors do not fit; {cure}"
        )
    module.load_state_dict({name: found[name] for name in own if wanted(name)}, strict=False)
    save_atomically(module.state_dict(), path)
    table = Path(path).with_suffix(".csv")
    with replacing(table) as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False)
    count = Counter(row["status"] for row in rows)
    counts = ", ".join(f"{count[status]} tensors {status}" for status in ("taken", "skipped", "missing"))
    print(f"{path}: {counts}; each in {table}")


def _published(checkpoint: str | Path, target: str | Path, key: str) -> dict[str, Tensor]:
    """The tensors of a published checkpoint, with ``target``, which ``key`` names, still free."""
    if not Path(checkpoint).is_file():
        raise InputError(
            f"checkpoint {checkpoint}: no such file; download a published .pth (github.com/ToniChopp/SimCroP, or "
            "mae_pretrain_vit_base.pth of github.com/facebookresearch/mae) and give its path"
        )
    if Path(target).exists():
        raise InputError(f"{key} {target}: exists, and may be what a training left; name another, or move it away")
    return state_dict_of(load_file(checkpoint))


def import_weights(
    checkpoint: str | Path,
    encoder_file: str | Path,
    img_size: Sequence[int] = (224, 224, 112),
    num_heads: int | None = None,
    patch_size: Sequence[int] = (16, 16, 8),
    pos_embed: str = "sincos3d",
    seed: int = 42,
) -> SimCroPEncoder:
    """Turn a published checkpoint into the ``encoder.pt`` that all bundles read, and return the encoder.

    SimCroP's ``.pth`` (ToniChopp/SimCroP), or any 3D ViT by the same names (timm's), gives the whole encoder, stored
    positions included. A 2D MAE ViT (facebookresearch/mae) gives blocks and final norm, as the authors take them; the
    rest starts at random, which is warned of. Width, depth, MLP, patch and channels are the file's. Its other parts
    (decoders, text) are skipped. A table of every tensor taken, skipped or missing is printed by kind, and written as
    CSV beside ``encoder_file``.

    Args:
        checkpoint: the published file; loaded as weights only, never executed.
        encoder_file: where to write; must not exist.
        img_size: voxels along each axis of the volumes that the checkpoint was trained on. The file tells the number of
            patches alone.
        num_heads: attention heads, which no file tells; None for width / 64, as in ViT-B.
        patch_size: for a 2D checkpoint only.
        pos_embed: formula of the positions, for a 2D checkpoint only.
        seed: of the random start, for a 2D checkpoint only.

    Raises:
        InputError: no such checkpoint, unreadable, of another network, incomplete, or not finite; ``img_size`` does not
            give the file's number of patches; ``encoder_file`` exists, or cannot be written.
    """
    found = _published(checkpoint, encoder_file, "encoder_file")
    fc1, proj = found.get("blocks.0.mlp.fc1.weight"), found.get("patch_embed.proj.weight")
    if fc1 is None or fc1.ndim != 2 or proj is None or proj.ndim not in (4, 5):
        raise InputError(
            f"checkpoint {checkpoint}: holds no ViT (blocks.0.mlp.fc1.weight and patch_embed.proj.weight) but "
            f"{', '.join(list(found)[:3]) or 'no tensors'}; give SimCroP's .pth, or that of a MAE ViT"
        )
    mlp_dim, hidden_size = fc1.shape
    volumetric = proj.ndim == 5
    if num_heads is None:
        num_heads, rest = divmod(hidden_size, 64)
        if rest:
            raise InputError(f"checkpoint {checkpoint}: {hidden_size} channels are not heads of 64: give num_heads")
    if volumetric:
        patch_size = tuple(proj.shape[2:])
    grid = patch_grid(img_size, patch_size)
    stored = found.get("pos_embed")
    if volumetric and stored is not None and stored.shape[1] != 1 + grid[0] * grid[1] * grid[2]:
        count = stored.shape[1] - 1
        side = round(count ** (1 / 3))
        likely = (
            f"{[side * size for size in patch_size]} if the grid is a cube"
            if side**3 == count
            else "that of its training"
        )
        raise InputError(
            f"checkpoint {checkpoint}: has positions for {count} patches of {list(patch_size)}, but img_size "
            f"{list(img_size)} makes {grid[0] * grid[1] * grid[2]}; set img_size: {likely}"
        )
    sizes = {
        "in_channels": proj.shape[1] if volumetric else 1,
        "img_size": list(img_size),
        "patch_size": list(patch_size),
        "hidden_size": hidden_size,
        "mlp_dim": mlp_dim,
        "num_layers": len({name.split(".")[1] for name in found if name.startswith("blocks.")}),
        "num_heads": num_heads,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = SimCroPEncoder(**sizes, pos_embed=pos_embed)
    if volumetric:
        formula = None if stored is None else positions_formula(stored[0, 1:], grid)
        kind = f"the table of pos_embed {formula}" if formula else "of no formula known here"
        reasons = {"taken pos_embed": f"as stored: {kind}"}
    else:
        random = ("cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias")
        reasons = {f"missing {name}": f"starts at random, seed {seed}" for name in random}
        reasons |= {"missing pos_embed": f"made anew: {pos_embed}"}
        reasons |= {f"skipped {name}": "of images, not of volumes" for name in (*random, "pos_embed")}
    _import(
        encoder,
        found,
        checkpoint,
        encoder_file,
        cure="give a whole checkpoint of SimCroP or of a MAE ViT, as published",
        wanted=lambda name: volumetric or name.startswith(("blocks.", "norm.")),
        harmless=lambda name: not name.startswith(("blocks.", "norm.", "patch_embed.")),
        reasons=reasons,
    )
    if not volumetric:
        logger.warning(f"{checkpoint}: is a checkpoint of images: {', '.join(random)} start at RANDOM, seed {seed}")
    print("keys of the bundles: " + ", ".join(f"{key} {value}" for key, value in sizes.items()))
    return encoder


def import_unetr(network: nn.Module, checkpoint: str | Path, model_file: str | Path) -> nn.Module:
    """Turn a UNETR that the authors' segmentation code wrote into the segment bundle's ``models/model.pt``.

    Args:
        network: a :class:`custom_components.unetr.SimCroPUNETR` of the checkpoint's sizes; returned filled.
        checkpoint: the published file; loaded as weights only, never executed.
        model_file: where to write, with the table of tensors beside it; must not exist.

    Raises:
        InputError: as :func:`import_weights`; the network's region, classes or widths are not the checkpoint's.
    """
    names = ((r"^vit\.fc_norm\.", "encoder.norm."), (r"^vit\.", "encoder."), (r"^decoder2\.conv3d\.", "decoder2.conv."))
    found = {}
    for name, tensor in _published(checkpoint, model_file, "model_file").items():
        for theirs, ours in names:
            name = re.sub(theirs, ours, name)
        found[name] = tensor
    _import(
        network,
        found,
        checkpoint,
        model_file,
        cure="set classes, img_size, feature_size and the encoder's keys to those of its training",
        wanted=lambda name: True,
        # the published network holds them, and leaves them out of its forward pass
        harmless=lambda name: name == "encoder.cls_token" or ".conv3." in name,
        reasons={},
    )
    return network
