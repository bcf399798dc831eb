"""Scans whose sentences have masks: what is said of a scan, and where it lies, as data sets publish it.

An item holds ``image`` (path), ``name``, ``patient`` and

- ``findings``: a list of ``sentence``, ``category``, and ``mask``, its path, or None where the masks are kept back;
- ``channel_first``: whether that file holds all findings of the scan, ``(F, X, Y, Z)`` on the scan's own array;
- ``numbered``: whether the values of a mask number its instances; else, what hangs together is one;
- ``partial``: whether a mask may lack some of what its sentence means;
- ``split``, and ``shape``, that of the scan's array, where the data set says so.
"""

import csv
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from custom_components.data.lists import find_file, mask_file_name, shuffled, unique_names
from custom_components.data.tables import (
    SPLIT_OF,
    header_of,
    headers_of,
    json_lists,
    name_parser,
    named_rows,
    read_exclusion,
    read_table,
    some,
)
from custom_components.data.volume import Unfit, check_geometry, read_volume, reading
from custom_components.errors import InputError
from custom_components.files import replacing

logger = logging.getLogger(__name__)

NO_CATEGORY = "not given"


def of_reports(items: Sequence[Mapping[str, Any]]) -> list[dict]:
    """From volumes with ``masks`` and ``sentences``, as :func:`custom_components.data.lists.volumes` makes them.

    A finding is a category. Volumes of which no finding has both sentence and mask are left out.

    Raises:
        InputError: nothing is left.
    """
    found = []
    for item in items:
        findings = []
        for finding, sentence in item.get("sentences", {}).items() if "masks" in item else ():
            if (path := Path(item["masks"], mask_file_name(finding))).is_file():
                findings.append({"sentence": sentence, "category": finding, "mask": str(path)})
        if findings:
            own = {key: item[key] for key in ("image", "name", "patient")}
            found.append(own | {"findings": findings, "channel_first": False, "numbered": False, "partial": False})
    if not found:
        raise InputError("no volume has a mask of a finding and its sentence: set masks and finding_sentences")
    return found


def listed(dataset_dir: str | os.PathLike, table: str | os.PathLike = "findings.csv") -> list[dict]:
    """From a table with a row for each sentence: a CSV, JSON or JSON-lines file in UTF-8.

    Its columns are ``image``, ``sentence`` and ``mask``, paths from ``dataset_dir`` or absolute ones; and, where there
    are such, ``category``, ``patient`` (the scan itself otherwise) and ``split``, ``valid`` or ``test``. A mask is of
    any format that scans are; what is not 0 is marked; values beyond 1 number instances.

    Raises:
        InputError: the table cannot be read, or lacks a column; a cell that must be there is empty; a sentence of a
            scan has two masks; an image has two patients or splits; a file is not on disk.
    """
    dataset_dir = Path(dataset_dir).expanduser()
    path = dataset_dir / Path(table).expanduser()
    if not path.is_file():
        raise InputError(f"table {path} does not exist: give dataset_dir, and a table in it or an absolute path")
    frame = read_table(path)
    headers = headers_of(path, frame, {key: (key,) for key in ("image", "sentence", "mask")})
    headers |= {key: header for key in ("category", "patient", "split") if (header := header_of(frame, key))}
    frame = frame[list(headers.values())].set_axis(list(headers), axis=1)
    if not len(frame):
        raise InputError(f"table {path} names no scan: give another")
    frame = frame.fillna("").apply(lambda cells: cells.str.strip())
    for key in ("image", "sentence", "mask"):
        if (empty := frame[key].eq("")).any():
            raise InputError(f"table {path}: row {int(empty.argmax()) + 1} has no {key}: fill it in, or take it out")
    items: dict[str, dict] = {}
    for row in frame.to_dict("records"):
        image, mask = (str(dataset_dir / Path(row[key]).expanduser()) for key in ("image", "mask"))
        split = row.get("split") and SPLIT_OF.get(row["split"].lower(), row["split"])
        own = {"image": image, "patient": row.get("patient"), "split": split}
        item = items.setdefault(os.path.abspath(image), own | {"findings": []})
        if any(item[key] != own[key] for key in ("patient", "split")):
            raise InputError(f"table {path} gives {row['image']} two patients or splits: correct it")
        finding = {"sentence": row["sentence"], "category": row.get("category") or NO_CATEGORY, "mask": mask}
        others = [other for other in item["findings"] if other["sentence"] == finding["sentence"]]
        if others:
            what = "twice" if others == [finding] else "with two masks or categories"
            raise InputError(f"table {path} has {finding['sentence']!r} of {row['image']} {what}: keep one row")
        item["findings"].append(finding)
    missing = [file for item in items.values() for file in (item["image"], *(f["mask"] for f in item["findings"]))]
    missing = [file for file in dict.fromkeys(missing) if not os.path.exists(file)]
    if missing:
        raise InputError(
            f"{len(missing)} files of table {path} are not on disk ({some(missing)}): set dataset_dir to the folder "
            "that they are relative to"
        )
    names = unique_names([Path(item["image"]) for item in items.values()])
    for item, name in zip(items.values(), names, strict=True):
        item |= {"name": name, "patient": item["patient"] or name}
        item |= {"channel_first": False, "numbered": None, "partial": False}
        if not item["split"]:
            del item["split"]
    return list(items.values())


def _entries(path: Path) -> dict[str, list[dict]]:
    """Split -> entries of a ReXGroundingCT list, each with ``name`` and sentences in ``findings``."""
    if not path.is_file():
        raise InputError(f"findings_list {path} does not exist: give dataset_dir, and a file in it or an absolute path")
    lists = {SPLIT_OF[split]: entries for split, entries in json_lists(path).items() if split in SPLIT_OF}
    if not any(lists.values()):
        raise InputError(f"findings_list {path} has no list train, val or test: give ReXGroundingCT's dataset.json")
    for split, entries in lists.items():
        for number, entry in enumerate(entries):
            place = f"findings_list {path}: entry {number} of {split}"
            if not isinstance(entry, dict) or not isinstance(name := entry.get("name"), str) or not name.strip():
                raise InputError(f"{place} has no name of a volume: download it again")
            findings = entry.get("findings")
            said = isinstance(findings, dict) and all(
                isinstance(text, str) and text.strip() for text in findings.values()
            )
            if not said or not findings or set(findings) != {str(i) for i in range(len(findings))}:
                raise InputError(
                    f"{place}, {name}: findings is {str(findings)[:60]!r}, and should map 0, 1, ... to sentences: "
                    "download it again"
                )
            for key in ("categories", "pixels"):
                if not isinstance(entry.get(key, {}), dict) or not set(entry.get(key, {})) <= set(findings):
                    raise InputError(f"{place}, {name}: {key} is no mapping of findings: download it again")
            shape = entry.get("shape", [1, 1, 1])
            if not isinstance(shape, list) or len(shape) != 3 or not all(isinstance(size, int) for size in shape):
                raise InputError(f"{place}, {name}: shape is {str(shape)[:60]!r}, not three sizes: download it again")
        repeated = [name for name, count in Counter(entry["name"] for entry in entries).items() if count > 1]
        if repeated:
            raise InputError(f"findings_list {path}: {split} names {repeated[0]} twice: download it again")
    return lists


def rexgroundingct(
    dataset_dir: str | os.PathLike,
    images_dir: str | os.PathLike,
    images: str | Sequence[str],
    split: str = "valid",
    datalist: str = "dataset.json",
    masks: str = "segmentations",
    name_pattern: str | None = None,
) -> list[dict]:
    """From ReXGroundingCT: its list, its masks, and CT-RATE's own volumes.

    Categories are the codes of the list, such as 2b. Those of training are ``partial``: at most three instances of a
    finding are marked. A split of which no mask is there has them kept back.

    Args:
        images_dir: CT-RATE's folder; where volumes lie below it is told by ``images`` and ``name_pattern``, as for
            :func:`custom_components.data.lists.volumes`.
        datalist: ``dataset.json`` or ``MICCAI_challenge_dataset.json``.
        masks: folder of the masks below ``dataset_dir``.

    Raises:
        InputError: a file or folder is missing, an entry lacks what it must have, or none of the volumes is on disk.
    """
    dataset_dir, images_dir = Path(dataset_dir).expanduser(), Path(images_dir).expanduser()
    path = dataset_dir / datalist
    lists = _entries(path)
    if not lists.get(split):
        raise InputError(f"split is {split}, and findings_list {path} has no such list (it has {', '.join(lists)})")
    parse, images = name_parser(name_pattern), [images] if isinstance(images, str) else images
    items, tried = [], []
    for entry in lists[split]:
        name = entry["name"].strip().removesuffix(".nii.gz")
        words = parse(name)
        first, image = find_file(images, images_dir, words | {"name": name})
        tried += [] if image else [first]
        mask, categories = dataset_dir / masks / f"{name}.nii.gz", entry.get("categories", {})
        findings = [
            {"sentence": entry["findings"][str(i)].strip(), "category": str(categories.get(str(i)) or NO_CATEGORY)}
            for i in range(len(entry["findings"]))
        ]
        item = {"image": image or first, "name": name, "patient": words.get("patient", name)}
        for i, told in entry.get("pixels", {}).items():
            findings[int(i)]["voxels"] = told
        item |= {"findings": [finding | {"mask": str(mask)} for finding in findings], "partial": split == "train"}
        item |= {"shape": tuple(entry["shape"])} if "shape" in entry else {}
        items.append(item | {"channel_first": True, "numbered": True})
    if len(tried) == len(items):
        raise InputError(f"no volume of {path} is on disk ({some(tried)}): set images_dir to CT-RATE's folder")
    if not any(os.path.exists(item["findings"][0]["mask"]) for item in items):
        for item in items:
            item["findings"] = [finding | {"mask": None} for finding in item["findings"]]
    return items


def parted(items: Sequence[Mapping[str, Any]], valid_share: float, seed: int = 42) -> list[dict]:
    """Items with a ``split``: ``valid``, where thresholds are chosen, or ``test``, where they are measured.

    As the items say; where none says so, ``valid_share`` of the patients, drawn by ``seed``, and at least one.

    Raises:
        InputError: a split is empty, or a patient stands in both; masks are kept back.
    """
    if any(finding["mask"] is None for item in items for finding in item["findings"]):
        raise InputError("the masks of this split are kept back: evaluate another split, or run predict")
    if not 0 < valid_share < 1:
        raise InputError(f"valid_share is {valid_share}: give a share above 0 and below 1, such as 0.25")
    if any("split" in item for item in items):
        if other := [item for item in items if item.get("split") not in ("valid", "test")]:
            raise InputError(
                f"{other[0]['image']} is of split {other[0].get('split')}: "
                "make it valid or test, or leave the column out"
            )
        found = [dict(item) for item in items]
    else:
        order = shuffled([item["patient"] for item in items], seed)
        held_out = set(order[: max(1, round(valid_share * len(order)))])
        found = [dict(item, split="valid" if item["patient"] in held_out else "test") for item in items]
    patients = {split: {item["patient"] for item in found if item["split"] == split} for split in ("valid", "test")}
    if empty := [split for split, names in patients.items() if not names]:
        raise InputError(
            f"no scan is of split {empty[0]}: thresholds are chosen on valid, and measured on test; give both in the "
            "column split, or none, and two patients at least"
        )
    if both := sorted(map(str, patients["valid"] & patients["test"])):
        raise InputError(f"{len(both)} patients are of both valid and test ({some(both)}): keep each in one split")
    return found


def write_exclusion(
    dataset_dir: str | os.PathLike,
    path: str | os.PathLike,
    datalists: Sequence[str],
    splits: Sequence[str] = ("valid", "test"),
    name_pattern: str | None = None,
) -> None:
    """Write the patients of ReXGroundingCT's evaluation as a CSV file for pre-training's key ``exclude``.

    Volumes that it evaluates on may be of CT-RATE's training split. A row is a patient: ``patient``, and ``volumes``
    and ``splits`` of the lists.

    Args:
        datalists: those of ``dataset_dir`` that there are; one at least.

    Raises:
        InputError: none of the lists is there, or one is no such list.
    """
    dataset_dir, parse = Path(dataset_dir).expanduser(), name_parser(name_pattern)
    there = [dataset_dir / name for name in datalists if (dataset_dir / name).is_file()]
    if not there:
        raise InputError(f"dataset_dir {dataset_dir} has none of {', '.join(datalists)}: set it to ReXGroundingCT's")
    patients: dict[str, tuple[set, set]] = {}
    for datalist in there:
        for split, entries in _entries(datalist).items():
            for name in [entry["name"].strip().removesuffix(".nii.gz") for entry in entries if split in splits]:
                volumes, found = patients.setdefault(parse(name).get("patient", name), (set(), set()))
                volumes.add(name)
                found.add(split)
    if not patients:
        raise InputError(f"{', '.join(map(str, there))} have no split {' or '.join(splits)}: nothing to exclude")
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        rows = ((patient, *(" ".join(sorted(part)) for part in parts)) for patient, parts in sorted(patients.items()))
        csv.writer(file).writerows([("patient", "volumes", "splits"), *rows])
    print(f"{len(patients)} patients of {', '.join(p.name for p in there)} to exclude: {Path(path).resolve()}")


def seen_in(
    trained_on: str | os.PathLike | None,
    trained_without: str | os.PathLike | None = None,
    id_column: str | None = None,
    name_pattern: str | None = None,
) -> set[str] | None:
    """Names of the volumes and patients that weights were trained on; None where no table is given.

    Volumes that a training's ``validation_share`` or ``data_fraction`` left out count as trained on, unless
    ``trained_without`` names them too.

    Args:
        trained_on: table of the training, such as CT-RATE's train_reports.csv.
        trained_without: the file that the training was given as ``exclude``.
        id_column: of the table, the first by default.
        name_pattern: whose group ``patient`` names the patient of a volume.
    """
    if trained_on is None:
        return None
    path, parse = Path(trained_on).expanduser(), name_parser(name_pattern)
    frame, names = named_rows(path, id_column)
    left_out = set().union(*read_exclusion(trained_without).values())
    seen: set[str] = set()
    for name in (Path(name).name for name in names):
        own = {name, parse(name).get("patient", name)}
        seen |= set() if own & left_out else own
    return seen


def check_shape(item: Mapping[str, Any], shape: Sequence[int]) -> None:
    """Raises Unfit where a scan's array is not of the ``shape`` that its data set tells."""
    told = item.get("shape")
    if told is not None and tuple(told) != tuple(shape):
        raise Unfit(
            f"{item['image']} has {_sizes(shape)} voxels, and its list tells of {_sizes(told)}: give the volume as "
            "CT-RATE ships it, not a prepared one"
        )


def read_masks(
    item: Mapping[str, Any], shape: Sequence[int], affine: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The mask ``[X, Y, Z]`` of each finding, whole numbers, and its affine ``[4, 4]``, RAS+ mm, in their order.

    Args:
        shape, affine: of the scan's array, which a mask of all findings shares.

    Raises:
        Unfit: a file cannot be read, is not on the scan's array where it must be, holds what is no mask, or marks what
            lies outside of the scan.
    """
    check_shape(item, shape)
    if item["channel_first"]:
        path = Path(item["findings"][0]["mask"])
        masks = _read_channels(path, len(item["findings"]), shape)
        for finding, mask in zip(item["findings"], masks, strict=True):
            marked = np.count_nonzero(mask)
            if finding.get("voxels", marked) != marked:
                logger.warning(
                    f"{path}: {marked} voxels of {finding['sentence']!r} are marked, and its list tells of "
                    f"{finding['voxels']}: see that list and masks are of one version"
                )
            yield mask, affine
        return
    for finding in item["findings"]:
        path = Path(finding["mask"])
        with reading(path):
            raw = read_volume(path)
        check_geometry(path, raw)
        if raw.guessed and not np.allclose(raw.affine, affine, atol=1e-3):
            raise Unfit(f"{path}: {raw.guessed}, which is not where its scan lies: write its affine", "spacing")
        mask = _whole(path, raw.hu())
        _check_within(path, mask, raw.affine, shape, affine)
        yield mask, raw.affine


def _read_channels(path: Path, number: int, shape: Sequence[int]) -> np.ndarray:
    """``(F, X, Y, Z)``; MONAI's and ITK's readers would take the last axis of a 4D file for that of the findings."""
    with reading(path):
        if not path.exists():
            raise Unfit(f"{path} does not exist: download it")
        image = nib.load(path)
        voxels = np.asanyarray(image.dataobj)
    if voxels.ndim == 3 and number == 1:
        voxels = voxels[None]
    if voxels.shape != (number, *shape):
        raise Unfit(
            f"{path} has {_sizes(voxels.shape)} voxels, and {number} findings of a scan of {_sizes(shape)} make "
            f"{_sizes((number, *shape))}: give the masks and the CT as they are published"
        )
    return _whole(path, voxels)


def _whole(path: Path, voxels: np.ndarray) -> np.ndarray:
    if voxels.dtype.kind == "f" and not np.isfinite([voxels.min(), voxels.max()]).all():
        raise Unfit(f"{path} holds NaN or infinity, and is to be a mask: export it again")
    whole = voxels.astype(np.uint8 if voxels.max(initial=0) < 256 else np.uint16)
    if not (voxels == whole).all():
        raise Unfit(
            f"{path} has values from {voxels.min():g} to {voxels.max():g}, some not whole: a mask numbers instances"
        )
    return whole


def _check_within(path: Path, mask: np.ndarray, affine: np.ndarray, shape: Sequence[int], scan: np.ndarray) -> None:
    marked = np.argwhere(mask)
    places = marked @ (to_scan := np.linalg.solve(scan, affine))[:3, :3].T + to_scan[:3, 3]
    if len(marked) and ((places < -1).any() or (places > np.array(shape)).any()):
        raise Unfit(
            f"{path} marks what lies outside of its scan by their headers (affine): correct the one that is wrong"
        )


def _sizes(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
