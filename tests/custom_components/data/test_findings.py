"""Masks with sentences: ReXGroundingCT in its exact layout, tables of one's own, and what is wrong with either."""

import csv
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from custom_components.data.findings import (
    listed,
    of_reports,
    parted,
    read_masks,
    rexgroundingct,
    seen_in,
    write_exclusion,
)
from custom_components.data.lists import volumes
from custom_components.errors import InputError

SHAPE = (6, 5, 4)
AFFINE = np.array([[-8.0, 0, 0, 20], [0, -8, 0, 10], [0, 0, 8, -30], [0, 0, 0, 1]])
PATTERN = "(?P<scan>(?P<patient>(?P<split>train|valid)_[^_]+)_[^_]+)_[^_]+"
IMAGES = ["dataset/{split}_fixed/{patient}/{scan}/{name}.nii.gz", "{split}_fixed/{patient}/{scan}/{name}.nii.gz"]


def save(array: np.ndarray, path: Path, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def masks_of(number: int) -> np.ndarray:
    masks = np.zeros((number, *SHAPE), np.uint8)
    for i in range(number):
        masks[i, i, 0, 0], masks[i, 5, 4, 3] = 1, 2
    return masks


def entry(name: str, number: int = 2, **more: Any) -> dict[str, Any]:
    return {
        "name": f"{name}.nii.gz",
        "findings": {str(i): f"Finding {i} of {name}." for i in range(number)},
        "entity_counts": {str(i): 2 for i in range(number)},
        "shape": list(SHAPE),
        "pixels": {str(i): 2 for i in range(number)},
        "categories": {str(i): ["1a", "2d"][i % 2] for i in range(number)},
        "protocol": "first",
    } | more


@pytest.fixture
def rex(tmp_path: Path) -> Path:
    """ReXGroundingCT: validation volumes that are CT-RATE's training volumes, a test split without masks."""
    lists = {
        "train": [entry("train_1_a_1", 1)],
        "val": [entry("train_2_a_1"), entry("train_2_b_1", 3), entry("valid_4_a_2", 1)],
        "test": [entry("train_5_a_1")],
    }
    (tmp_path / "rex").mkdir()
    (tmp_path / "rex" / "dataset.json").write_text(json.dumps(lists))
    challenge = {"val": [entry("train_7_a_1", 1)], "test": [entry("valid_4_a_1")]}
    (tmp_path / "rex" / "MICCAI_challenge_dataset.json").write_text(json.dumps(challenge))
    for item in (*lists["train"], *lists["val"], *lists["test"]):
        name = item["name"].removesuffix(".nii.gz")
        scan, split = name.rsplit("_", 1)[0], name.split("_")[0]
        place = tmp_path / "ct" / "dataset" / f"{split}_fixed" / scan.rsplit("_", 1)[0] / scan
        save(np.full(SHAPE, -500, np.int16), place / item["name"])
        if item not in lists["test"]:
            save(masks_of(len(item["findings"])), tmp_path / "rex" / "segmentations" / item["name"], np.eye(4))
    return tmp_path


def items_of(folder: Path, **keys: Any) -> list[dict]:
    return rexgroundingct(folder / "rex", folder / "ct", IMAGES, name_pattern=PATTERN, **keys)


def test_rexgroundingct_is_read_as_published(rex: Path) -> None:
    items = items_of(rex)
    assert [item["name"] for item in items] == ["train_2_a_1", "train_2_b_1", "valid_4_a_2"]
    assert [item["patient"] for item in items] == ["train_2", "train_2", "valid_4"]
    assert [finding["category"] for finding in items[1]["findings"]] == ["1a", "2d", "1a"]
    assert items[0]["findings"][1]["sentence"] == "Finding 1 of train_2_a_1."
    assert Path(items[2]["image"]).is_file() and not any(item["partial"] for item in items)
    masks = list(read_masks(items[1], SHAPE, AFFINE))
    assert len(masks) == 3
    for i, (mask, affine) in enumerate(masks):
        assert mask.shape == SHAPE and mask[i, 0, 0] == 1 and mask[5, 4, 3] == 2 and (mask > 0).sum() == 2
        np.testing.assert_array_equal(affine, AFFINE)  # the scan's, whatever the file of the masks says
    assert items_of(rex, split="train")[0]["partial"]


def test_other_masks_than_the_list_tells_of_are_told(rex: Path, caplog: pytest.LogCaptureFixture) -> None:
    spoil("pixels", {"0": 2, "1": 7})(rex)
    assert len(list(read_masks(items_of(rex)[1], SHAPE, AFFINE))) == 3
    (line,) = caplog.messages
    assert "train_2_b_1.nii.gz: 2 voxels of 'Finding 1 of train_2_b_1.'" in line and "tells of 7" in line


def test_masks_that_are_kept_back(rex: Path) -> None:
    items = items_of(rex, split="test")
    assert [finding["mask"] for finding in items[0]["findings"]] == [None, None]
    with pytest.raises(InputError, match="kept back: evaluate another split, or run predict"):
        parted(items, 0.5)


def spoil(key: str, value: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / "rex" / "dataset.json"
        lists = json.loads(path.read_text())
        lists["val"][1][key] = value
        path.write_text(json.dumps(lists))

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "rex" / "dataset.json").unlink(), ["dataset.json does not exist"]),
        (lambda folder: (folder / "rex" / "dataset.json").write_text("{"), ["dataset.json is not JSON"]),
        (lambda folder: (folder / "rex" / "dataset.json").write_text('{"a": []}'), ["no list train, val or test"]),
        (lambda folder: (folder / "rex" / "dataset.json").write_text('{"train": [{}]}'), ["entry 0 of train", "name"]),
        (spoil("name", None), ["entry 1 of valid has no name"]),
        (spoil("name", "train_2_a_1.nii.gz"), ["valid names train_2_a_1.nii.gz twice"]),
        (spoil("findings", ["a"]), ["entry 1 of valid, train_2_b_1", "findings is", "0, 1, ..."]),
        (spoil("findings", {"1": "a", "2": "b"}), ["entry 1 of valid, train_2_b_1", "findings is"]),
        (spoil("findings", {"0": " "}), ["entry 1 of valid, train_2_b_1", "findings is"]),
        (spoil("categories", ["2b"]), ["entry 1 of valid, train_2_b_1", "categories is no mapping"]),
        (spoil("pixels", {"5": 1}), ["entry 1 of valid, train_2_b_1", "pixels is no mapping"]),
        (spoil("shape", "512 x 512"), ["entry 1 of valid, train_2_b_1", "shape is"]),
        (lambda folder: (folder / "ct").rename(folder / "elsewhere"), ["no volume", "set images_dir"]),
    ],
)
def test_a_bad_list_is_told_by_name(rex: Path, change: Any, words: list[str]) -> None:
    change(rex)
    with pytest.raises(InputError) as error:
        items_of(rex)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


@pytest.mark.parametrize(
    ("masks", "shape", "words"),
    [
        (masks_of(3).transpose(1, 2, 3, 0), SHAPE, ["6 x 5 x 4 x 3 voxels", "3 x 6 x 5 x 4"]),
        (masks_of(2), SHAPE, ["2 x 6 x 5 x 4 voxels", "3 findings"]),
        (masks_of(3).transpose(0, 2, 1, 3), SHAPE, ["3 x 5 x 6 x 4 voxels", "3 x 6 x 5 x 4"]),
        (masks_of(3), (4, 5, 6), ["has 4 x 5 x 6 voxels, and its list tells of 6 x 5 x 4", "not a prepared one"]),
        (masks_of(3) * np.float32(0.5), SHAPE, ["not whole"]),
        (masks_of(3) * np.float32(np.nan), SHAPE, ["NaN"]),
        (masks_of(3).astype(np.int16) - 1, SHAPE, ["from -1"]),
        (None, SHAPE, ["does not exist"]),
    ],
)
def test_masks_that_do_not_fit_are_told_by_name(
    rex: Path, masks: np.ndarray | None, shape: tuple[int, ...], words: list[str]
) -> None:
    item = items_of(rex)[1]
    path = Path(item["findings"][0]["mask"])
    path.unlink()
    if masks is not None:
        save(masks, path)
    with pytest.raises(InputError) as error:
        list(read_masks(item, shape, AFFINE))
    assert all(word in str(error.value) for word in ("train_2_b_1.nii.gz", *words)), error.value


def test_a_damaged_mask_is_told_by_name(rex: Path) -> None:
    item = items_of(rex)[0]
    path = Path(item["findings"][0]["mask"])
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match="train_2_a_1.nii.gz cannot be read"):
        list(read_masks(item, SHAPE, AFFINE))


def test_patients_of_the_evaluation_are_left_out_of_training(rex: Path, capsys: pytest.CaptureFixture) -> None:
    path = rex / "out" / "exclusion.csv"
    datalists = ["dataset.json", "MICCAI_challenge_dataset.json", "absent.json"]
    write_exclusion(rex / "rex", path, datalists, name_pattern=PATTERN)
    rows = list(csv.DictReader(path.open()))
    assert [row["patient"] for row in rows] == ["train_2", "train_5", "train_7", "valid_4"]
    assert rows[0]["volumes"] == "train_2_a_1 train_2_b_1" and rows[3]["splits"] == "test valid"
    assert "4 patients" in capsys.readouterr().out
    for split, names in (
        ("train", ["train_1_a_1", "train_2_b_1", "train_5_a_1", "train_7_a_9"]),
        ("valid", ["valid_4_a_2"]),
    ):
        table = rex / "ct" / f"{split}.csv"
        table.write_text("\n".join(["VolumeName,Findings_EN", *(f"{name}.nii.gz,x" for name in names)]) + "\n")
    keys = {"tables": {"train": "train.csv", "valid": "valid.csv"}, "images": IMAGES, "name_pattern": PATTERN}
    found = volumes(rex / "ct", split="train", findings_column="Findings_EN", exclude=path, **keys)
    assert [item["name"] for item in found] == ["train_1_a_1"]
    seen = seen_in(rex / "ct" / "train.csv", path, name_pattern=PATTERN)
    assert seen == {"train_1_a_1", "train_1"} and seen_in(None) is None
    assert {"train_2_b_1", "train_7"} < seen_in(rex / "ct" / "train.csv", name_pattern=PATTERN)


def test_excluding_from_what_is_no_such_data_set_is_refused(rex: Path) -> None:
    with pytest.raises(InputError, match="has none of dataset.json"):
        write_exclusion(rex, rex / "out.csv", ["dataset.json"])
    with pytest.raises(InputError, match="no split test"):
        (rex / "rex" / "dataset.json").write_text(json.dumps({"train": [entry("train_1_a_1")]}))
        write_exclusion(rex / "rex", rex / "out.csv", ["dataset.json"], ["test"])
    assert not (rex / "out.csv").exists()


# tables of one's own


def write_table(folder: Path, rows: list[list[str]], header: str = "image,sentence,mask,category,patient") -> None:
    for i in range(3):
        save(np.full(SHAPE, -500, np.int16), folder / "ct" / f"{i}.nii.gz")
        save(masks_of(3)[i], folder / "masks" / f"{i}.nii.gz")
    with (folder / "findings.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])


ROWS = [
    ["ct/0.nii.gz", "A nodule, left.", "masks/0.nii.gz", "nodule", "p"],
    ["ct/0.nii.gz", "An effusion.", "masks/1.nii.gz", "effusion", "p"],
    ["ct/1.nii.gz", "A nodule, left.", "masks/2.nii.gz", "", "q"],
]


def test_a_table_of_scans_sentences_and_masks(tmp_path: Path) -> None:
    write_table(tmp_path, ROWS)
    items = listed(tmp_path)
    assert [(item["name"], item["patient"], len(item["findings"])) for item in items] == [("0", "p", 2), ("1", "q", 1)]
    assert [f["category"] for item in items for f in item["findings"]] == ["nodule", "effusion", "not given"]
    masks = [mask for item in items for mask, _ in read_masks(item, SHAPE, AFFINE)]
    assert [int(np.flatnonzero(mask[:, 0, 0])[0]) for mask in masks] == [0, 1, 2]
    (tmp_path / "own.json").write_text(json.dumps([dict(zip(("image", "sentence", "mask"), ROWS[0], strict=False))]))
    assert listed(tmp_path, "own.json")[0]["patient"] == "0"
    spaces = [[*ROWS[2][:3], " ", " p "], ["ct/2.nii.gz", "x", "masks/0.nii.gz", "nodule ", " "]]
    write_table(tmp_path, [*ROWS[:2], *spaces])
    found = [(item["patient"], item["findings"][-1]["category"]) for item in listed(tmp_path)]
    assert found == [("p", "effusion"), ("p", "not given"), ("2", "nodule")]


@pytest.mark.parametrize(
    ("rows", "header", "words"),
    [
        (ROWS, "image,text,mask,category,patient", ["findings.csv has no column sentence"]),
        ([], "image,sentence,mask", ["names no scan"]),
        ([*ROWS, ["ct/2.nii.gz", "", "masks/0.nii.gz"]], "image,sentence,mask,a,b", ["row 4 has no sentence"]),
        ([*ROWS, ["ct/2.nii.gz", "x", ""]], "image,sentence,mask,a,b", ["row 4 has no mask"]),
        ([*ROWS, ROWS[0]], "image,sentence,mask,category,patient", ["'A nodule, left.' of ct/0.nii.gz twice"]),
        (
            [ROWS[0], [*ROWS[0][:2], "masks/2.nii.gz", "nodule", "p"]],
            "image,sentence,mask,category,patient",
            ["two masks"],
        ),
        ([ROWS[0], [*ROWS[1][:4], "q"]], "image,sentence,mask,category,patient", ["two patients or splits"]),
        ([["ct/7.nii.gz", "x", "masks/0.nii.gz"]], "image,sentence,mask", ["1 files", "7.nii.gz", "not on disk"]),
    ],
)
def test_a_bad_table_is_told(tmp_path: Path, rows: list, header: str, words: list[str]) -> None:
    write_table(tmp_path, [row[: header.count(",") + 1] for row in rows], header)
    with pytest.raises(InputError) as error:
        listed(tmp_path)
    assert all(word in str(error.value) for word in words), error.value


def test_a_mask_elsewhere_than_its_scan_is_told(tmp_path: Path) -> None:
    write_table(tmp_path, ROWS)
    (item, _) = listed(tmp_path)
    moved = AFFINE.copy()
    moved[0, 3] += 40
    save(masks_of(3)[0], tmp_path / "masks" / "0.nii.gz", moved)
    with pytest.raises(InputError, match="0.nii.gz marks what lies outside of its scan"):
        list(read_masks(item, SHAPE, AFFINE))
    save(masks_of(3)[0], tmp_path / "masks" / "0.nii.gz", np.eye(4))
    with pytest.raises(InputError, match="0.nii.gz"):
        list(read_masks(item, SHAPE, AFFINE))
    flipped = save(
        masks_of(3)[0][::-1],
        tmp_path / "masks" / "0.nii.gz",
        AFFINE @ np.diag([-1, 1, 1, 1]) + [[0, 0, 0, -40], *[[0] * 4] * 3],
    )
    mask, affine = next(read_masks(item, SHAPE, AFFINE))
    assert nib.aff2axcodes(affine)[0] == "R" and mask[5, 0, 0] and flipped.is_file()


def test_phantoms_have_their_own_sentences(tmp_path: Path) -> None:
    save(masks_of(1)[0], tmp_path / "m" / "lung_nodule.nii.gz")
    said = {"Lung nodule": "A nodule.", "Emphysema": "Emphysema."}
    own = {"image": "ct.nii.gz", "name": "ct", "patient": "p", "masks": str(tmp_path / "m"), "findings": "text"}
    (item,) = of_reports([own | {"sentences": said}, {k: v for k, v in own.items() if k != "masks"}])
    assert [(f["category"], f["sentence"]) for f in item["findings"]] == [("Lung nodule", "A nodule.")]
    with pytest.raises(InputError, match="no volume has a mask"):
        of_reports([own | {"sentences": {}}])


def test_thresholds_and_results_are_of_other_patients(tmp_path: Path) -> None:
    items = [{"image": f"{i}", "name": f"{i}", "patient": f"p{i // 2}", "findings": [{"mask": "m"}]} for i in range(8)]
    found = parted(items, 0.25)
    patients = {split: {item["patient"] for item in found if item["split"] == split} for split in ("valid", "test")}
    assert len(patients["valid"]) == 1 and len(patients["test"]) == 3 and len(found) == 8
    assert found == parted(items, 0.25) and not patients["valid"] & patients["test"]
    said = [item | {"split": "valid" if item["patient"] == "p0" else "test"} for item in items]
    assert parted(said, 0.5) == said
    for spoilt, words in (
        ([item | {"split": "test"} for item in items], "no scan is of split valid"),
        ([said[0] | {"split": "test"}, *said[1:]], "1 patients are of both valid and test"),
        ([said[0] | {"split": "train"}, *said[1:]], "0 is of split train: make it valid or test"),
        ([items[0], *said[1:]], "0 is of split None"),
        (items[:2], "no scan is of split test"),
    ):
        with pytest.raises(InputError, match=words):
            parted(spoilt, 0.25)
    with pytest.raises(InputError, match="valid_share is 1"):
        parted(items, 1)
