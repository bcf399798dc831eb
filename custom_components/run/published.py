"""Import of others' checkpoints: the SimCroP authors', and 2D masked autoencoders'."""

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from custom_components.errors import InputError
from custom_components.files import replacing
from custom_components.run.description import describe, sha256
from custom_components.run.weights import load_file, misfits, positions_formula, save_weights, state_dict_of
from custom_components.vit import SimCroPEncoder, patch_grid
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def _import(
    module: nn.Module,
    found: Mapping[str, Tensor],
    checkpoint: str | Path,
    path: str | Path,
    cure: str,
    wanted: Callable[[str], bool],
    harmless: Callable[[str], bool],
    reasons: Mapping[str, str],
    description: Mapping[str, Any] | None,
) -> None:
    """Fill ``module`` from a file's tensors, write it to ``path`` and the table of them beside it: all, or nothing.

    Args:
        cure: what an error advises.
        wanted: names that must be taken.
        harmless: names of the file whose absence from the module changes nothing that it computes.
        reasons: better ones than the table's own, by ``status tensor``.
        description: of the weights, to which the file that they come from is added; None for none.
    """
    own = module.state_dict()
    misfit = misfits({name: tensor for name, tensor in own.items() if wanted(name)}, found)
    rows = []
    for name, tensor in own.items():
        there = found.get(name)
        if not wanted(name):
            rows.append(("missing", name, tensor, "nothing in the file serves"))
        elif name in misfit:
            rows.append(("missing", name, tensor, misfit[name]))
        else:
            rows.append(("taken", name, there, "as stored" if there.dtype == tensor.dtype else f"from {there.dtype}"))
    for name, tensor in found.items():
        if name not in own or not wanted(name):
            rows.append(("skipped", name, tensor, f"{'of no use to' if name in own else 'no part of'} this network"))
    table = pd.DataFrame(rows, columns=["status", "tensor", "shape", "reason"])
    table["shape"] = ["x".join(map(str, tensor.shape)) for tensor in table["shape"]]
    table["reason"] = [reasons.get(f"{row.status} {row.tensor}", row.reason) for row in table.itertuples()]
    # a line for each kind of tensor, those of all blocks together
    kinds = table.replace(r"\.\d+(?=\.)", ".*", regex=True).value_counts(sort=False).rename("tensors").reset_index()
    print(kinds.to_string(index=False))
    faults = [f"{name} {reason}" for name, reason in misfit.items()]
    faults += [f"{name} is none of this network's" for name in found if name not in own and not harmless(name)]
    if faults:
        raise InputError(
            f"checkpoint {checkpoint}: {faults[0]}, and {len(faults) - 1} more of its tensors do not fit; {cure}"
        )
    module.load_state_dict({name: found[name] for name in own if wanted(name)}, strict=False)
    if description is not None:
        description = {**description, "source": {"file": Path(checkpoint).name, "sha256": sha256(checkpoint)}}
    save_weights(module.state_dict(), path, description)
    table_file = Path(path).with_suffix(".csv")
    with replacing(table_file) as temporary:
        table.to_csv(temporary, index=False)
    counts = ", ".join(f"{sum(table['status'] == s)} tensors {s}" for s in ("taken", "skipped", "missing"))
    print(f"{path}: {counts}; each in {table_file}")


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
    bundle_root: str | Path | None = None,
    license: str | None = None,
    **preprocessing: Any,
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
        img_size: voxels of the volumes that the checkpoint was trained on. The file has the number of patches alone.
        num_heads: attention heads, which no file has; None for width / 64, as in ViT-B.
        patch_size, pos_embed, seed: patch, formula of the positions and random start, for a 2D checkpoint only.
        bundle_root: of the bundle that imports, to describe the weights in a JSON beside them; None describes nothing.
        license: of the weights, for the description.
        preprocessing: what the description says of the volumes that the checkpoint was trained on (``pixdim``,
            ``hu_range``), as of ``img_size`` and ``num_heads``: no file tells, so it is marked as assumed.

    Raises:
        InputError: no such checkpoint, unreadable, of another network or ``img_size``, incomplete, or not finite;
            ``encoder_file`` exists, or cannot be written.
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
    if num_heads is None and hidden_size % 64:
        raise InputError(f"checkpoint {checkpoint}: {hidden_size} channels are not heads of 64: give num_heads")
    if volumetric:
        patch_size = tuple(proj.shape[2:])
    grid = patch_grid(img_size, patch_size)
    stored = found.get("pos_embed")
    if volumetric and stored is not None and (count := stored.shape[1] - 1) != math.prod(grid):
        side = round(count ** (1 / 3))
        cube = f"{[side * size for size in patch_size]} if the grid is a cube"
        raise InputError(
            f"checkpoint {checkpoint}: has positions for {count} patches of {list(patch_size)}, but img_size "
            f"{list(img_size)} makes {math.prod(grid)}; set img_size: "
            f"{cube if side**3 == count else 'that of its training'}"
        )
    sizes = {
        "in_channels": proj.shape[1] if volumetric else 1,
        "img_size": list(img_size),
        "patch_size": list(patch_size),
        "hidden_size": hidden_size,
        "mlp_dim": mlp_dim,
        "num_layers": len({name.split(".")[1] for name in found if name.startswith("blocks.")}),
        "num_heads": hidden_size // 64 if num_heads is None else num_heads,
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
        reasons |= {f"skipped {name}": "of images, not of volumes" for name in (*random, "pos_embed")}
        reasons["missing pos_embed"] = f"made anew: {pos_embed}"
    description = None
    if bundle_root is not None:
        network = {name: value for name, value in sizes.items() if name != "in_channels"}
        statistics = {"hu_bins": 0, "scale_space": [], "statistics_mlp_dim": 0}
        positions = formula if volumetric else pos_embed
        description = describe(
            preprocessing | network | statistics | ({"pos_embed": positions} if positions else {}),
            bundle_root,
            license=license,
            assumed=[*preprocessing, "img_size", "num_heads"],
        )
    _import(
        encoder,
        found,
        checkpoint,
        encoder_file,
        cure="give a whole checkpoint of SimCroP or of a MAE ViT, as published",
        wanted=lambda name: volumetric or name.startswith(("blocks.", "norm.")),
        harmless=lambda name: not name.startswith(("blocks.", "norm.", "patch_embed.")),
        reasons=reasons,
        description=description,
    )
    if not volumetric:
        logger.warning(f"{checkpoint}: is a checkpoint of images: {', '.join(random)} start at RANDOM, seed {seed}")
    print("keys of the bundles: " + ", ".join(f"{key} {value}" for key, value in sizes.items()))
    return encoder


def import_unetr(
    network: nn.Module,
    checkpoint: str | Path,
    model_file: str | Path,
    bundle_root: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    license: str | None = None,
) -> nn.Module:
    """Turn a UNETR that the authors' segmentation code wrote into the segment bundle's ``models/model.pt``.

    Args:
        network: a :class:`custom_components.unetr.SimCroPUNETR` of the checkpoint's sizes; returned filled.
        model_file: where to write, with the table of tensors beside it; must not exist.
        bundle_root, license: as in :func:`import_weights`.
        settings: what the description says that the weights must be used with; all of it is marked as assumed.

    Raises:
        InputError: as :func:`import_weights`; the network's region, classes or widths are not the checkpoint's.
    """
    names = {"vit.fc_norm.": "encoder.norm.", "vit.": "encoder.", "decoder2.conv3d.": "decoder2.conv."}
    pattern = re.compile("^(" + "|".join(map(re.escape, names)) + ")")
    found = {
        pattern.sub(lambda match: names[match[0]], name): tensor
        for name, tensor in _published(checkpoint, model_file, "model_file").items()
    }
    description = None
    if bundle_root is not None and settings is not None:
        description = describe(settings, bundle_root, license=license, assumed=list(settings))
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
        description=description,
    )
    return network
