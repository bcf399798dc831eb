"""Readers of public data sets and of folders of scans: files as published in, MONAI datalist (a list of dicts) out.

A datalist holds paths, text and small arrays; voxels are read later, by the transforms. Nothing here imports torch or
MONAI, so that a process that wants only the list starts fast.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from custom_components.errors import InputError

logger = logging.getLogger(__name__)

# The classes of CT-RATE in the order of its label files, which is the order of `abnormalities` and of every logit.
CT_RATE_CLASSES: tuple[str, ...] = (
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Pleural effusion",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Consolidation",
    "Bronchiectasis",
    "Interlobular septal thickening",
)


@dataclass(frozen=True)
class LabelledSet:
    """What a public classification data set looks like on disk.

    Attributes:
        classes: in the order of the logits; where they exclude each other, that of the codes 0, 1, ...
        id_column: header of the column that names volumes, as published.
        images: where volumes lie below `dataset_dir`, tried in turn, with `{name}` and, where names have parts as
            CT-RATE's do, `{split}`, `{patient}`, `{scan}` and `{letter}` ("train", "train_1", "train_1_a", "a").
        columns: class -> header of its column, where the two differ.
    """

    classes: tuple[str, ...]
    id_column: str
    images: tuple[str, ...]
    columns: Mapping[str, str] = field(default_factory=dict)


LABELLED_SETS: dict[str, LabelledSet] = {
    "ct_rate": LabelledSet(
        classes=CT_RATE_CLASSES,
        id_column="VolumeName",
        images=(
            "dataset/{split}_fixed/{patient}/{scan}/{name}.nii.gz",
            "{split}_fixed/{patient}/{scan}/{name}.nii.gz",
            "{split}_preprocessed/{patient}/{patient}{letter}/{name}.nii.gz",
            "dataset/{split}/{patient}/{scan}/{name}.nii.gz",
            "{split}/{patient}/{scan}/{name}.nii.gz",
            "{name}.nii.gz",
        ),
    ),
    "rad_chest_ct": LabelledSet(
        classes=(
            "Medical material",
            "Calcification",
            *(c for c in CT_RATE_CLASSES[2:] if "calcification" not in c and c != "Mosaic attenuation pattern"),
        ),
        id_column="NoteAcc_DEID",
        images=("images/{name}.nii.gz", "{name}.nii.gz"),
        columns={"Hiatal hernia": "Hietal Hernia"},
    ),
    # Which of the codes 1 and 2 is COVID-19 is not told by the published lists: the key `classes` swaps the names.
    "cc_ccii": LabelledSet(
        classes=("Normal", "Common pneumonia", "COVID-19 pneumonia"),
        id_column="img_list",
        images=("images_resized/{name}.nii.gz", "images/{name}.nii.gz", "{name}.nii.gz"),
    ),
    "luna16": LabelledSet(
        classes=("Lung nodule",),
        id_column="image_id",
        images=("images/{name}.nii.gz", "{name}.nii.gz", *(f"subset{i}/{{name}}.mhd" for i in range(10))),
        columns={"Lung nodule": "label"},
    ),
    # anybody's own: a CSV whose first column names volumes, by path or without ending, and a column per class
    "csv": LabelledSet(classes=(), id_column="", images=("{name}", "{name}.nii.gz", "{name}.nrrd", "{name}.mha")),
}

NIFTI_SUFFIXES: tuple[str, ...] = (".nii", ".nii.gz")
ITK_SUFFIXES: tuple[str, ...] = (".nrrd", ".nhdr", ".mha", ".mhd")
CT_SUFFIXES: tuple[str, ...] = NIFTI_SUFFIXES + ITK_SUFFIXES


def ct_rate(
    dataset_dir: str | os.PathLike,
    split: str = "train",
    data_fraction: float = 1.0,
    seed: int = 42,
    exclude: str | os.PathLike | None = None,
) -> list[dict]:
    """CT-RATE as downloaded from Hugging Face: one item per volume of the split's report CSV, in that file's order.

    Every item holds `image` (path), `name` (volume name, "train_1_a_1"), `patient` ("train_1"), `findings` and
    `impression` (text, "" where the report gives none). Where the folder has them, it also holds `abnormalities`
    (float32 array of 18 zeros and ones, see :data:`CT_RATE_CLASSES`), `masks` (path of a folder of finding masks) and
    `sentences` (dict finding -> sentence). Several reconstructions of one scan share its report, and all are listed.

    Args:
        dataset_dir: folder that contains `dataset/`, or that folder itself. Volumes of the second version
            (`train_fixed`) are preferred to those of the first (`train`), where both are there.
        split: "train" or "valid".
        data_fraction: share of the patients to keep, in (0, 1]. For one seed, 1 % lies inside 10 %.
        seed: of the order in which patients are taken.
        exclude: text or CSV file whose first column names volumes to leave out, such as those that show no chest.

    Raises:
        InputError: a file, a folder, a column, a label or a volume is missing, or an argument is out of range.
    """
    if split not in ("train", "valid"):
        raise InputError(f"split is {split!r}, and CT-RATE has two: give train or valid")
    if not 0 < data_fraction <= 1:
        raise InputError(f"data_fraction is {data_fraction}: give a share above 0 and up to 1, such as 0.1 for 10 %")
    dataset_dir = Path(dataset_dir).expanduser()
    if not dataset_dir.is_dir():
        raise InputError(f"dataset_dir {dataset_dir} is no folder: give the one that CT-RATE was downloaded to")
    root = dataset_dir / "dataset" if (dataset_dir / "dataset").is_dir() else dataset_dir

    every_item = _ct_rate_reports(root, split)
    excluded = set() if exclude is None else _volume_names(Path(exclude).expanduser())
    items = [item for item in every_item if item["name"] not in excluded]
    if not items:
        raise InputError(f"exclude {exclude} names every volume of split {split}: take out those to be used")

    # The order in which patients are taken is drawn before anything is left out: an exclusion does not reshuffle it.
    order = np.random.RandomState(seed).permutation(sorted({item["patient"] for item in every_item})).tolist()
    left = {item["patient"] for item in items}
    order = [patient for patient in order if patient in left]
    # Without the small number, rounding would take 8 of 100 patients for 0.07 * 100 = 7.000000000000001.
    chosen = set(order[: math.ceil(data_fraction * len(order) - 1e-9)])
    items = [item for item in items if item["patient"] in chosen]

    missing = [item["image"] for item in items if not os.path.isfile(item["image"])]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(items)} volumes of split {split} are not on disk ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}): download them, or list their names in a file given as exclude"
        )

    labels_csv = _find([root / "multi_abnormality_labels" / f"{word}_predicted_labels.csv" for word in _words(split)])
    if labels_csv is not None:
        labels = _ct_rate_labels(labels_csv)
        unlabelled = [item["name"] for item in items if item["name"] not in labels]
        if unlabelled:
            raise InputError(
                f"{labels_csv} has no row for {len(unlabelled)} of {len(items)} volumes, the first {unlabelled[0]}: "
                "download it again, or list their names in a file given as exclude"
            )
        for item in items:
            item["abnormalities"] = labels[item["name"]]

    sentences_csv = root / "masks" / f"{split}_sentences.csv"
    if sentences_csv.is_file():
        sentences = _ct_rate_sentences(sentences_csv)
        for item in items:
            item["sentences"] = sentences.get(item["name"], {})
    return items


def msd(
    dataset_dir: str | os.PathLike,
    datalist: str | os.PathLike = "dataset.json",
    split: str = "training",
    data_fraction: float = 1.0,
    exclude: str | os.PathLike | None = None,
    seed: int = 42,
) -> list[dict]:
    """A list in the layout of the Medical Segmentation Decathlon, as the authors publish for LUNA16 and BTCV.

    LUNA16's have `training`, `validation` and `testing`, each of `{"image": path, "label": path}`; BTCV's have
    `training` and `validation`, and a `test` of bare file names without labels. Every item holds `image`, `name` (file
    name without its ending) and, where the list gives one, `label`; in the list's order.

    Args:
        dataset_dir: folder that relative paths start from; bare file names are also looked for in its `imagesTs`.
        datalist: the JSON file, absolute or relative to `dataset_dir`.
        split: which list of the file.
        data_fraction: share of the items to keep, in (0, 1]. For one seed, 1 % lies inside 10 %.
        exclude: text or CSV file whose first column names items to leave out of those.
        seed: of the order in which items are taken.

    Raises:
        InputError: the file is missing, not such a list, or has no `split`; an image or label is not on disk; nothing
            is left.
    """
    if not 0 < data_fraction <= 1:
        raise InputError(f"data_fraction is {data_fraction}: give a share above 0 and up to 1, such as 0.1 for 10 %")
    dataset_dir = Path(dataset_dir).expanduser()
    path = dataset_dir / Path(datalist).expanduser()
    if not path.is_file():
        raise InputError(f"datalist {path} does not exist: give dataset_dir, and a datalist in it or an absolute path")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise InputError(f"datalist {path} is not JSON ({error}): download it again") from error
    lists = {key: entries for key, entries in content.items() if isinstance(entries, list)} if content else {}
    if not lists.get(split):
        raise InputError(
            f"datalist {path} has no {split} list (it has {', '.join(lists) or 'none'}): choose one of them"
        )

    items = []
    for entry in lists[split]:
        entry = {"image": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or not all(isinstance(entry.get(k, ""), str) for k in ("image", "label")):
            raise InputError(f"datalist {path}: {split} holds {entry!r}, not a file name or an image with its label")
        if not entry.get("image"):
            raise InputError(f"datalist {path}: {split} holds {entry!r} without an image: add its path")
        image = Path(prepared(dataset_dir / entry["image"]))
        if not image.exists() and os.path.exists(test := prepared(dataset_dir / "imagesTs" / entry["image"])):
            image = Path(test)
        item = {"image": str(image), "name": _stem(image)}
        if entry.get("label"):
            item["label"] = prepared(dataset_dir / entry["label"])
        items.append(item)
    if data_fraction < 1:
        count = math.ceil(data_fraction * len(items) - 1e-9)  # see ct_rate for the small number
        chosen = set(np.random.RandomState(seed).permutation(len(items))[:count].tolist())
        items = [item for i, item in enumerate(items) if i in chosen]
    excluded = set() if exclude is None else _volume_names(Path(exclude).expanduser())
    # a file that is not there keeps its ending in its name
    items = [item for item in items if item["name"].removesuffix(".nii.gz") not in excluded]
    if not items:
        raise InputError(f"exclude {exclude} leaves nothing of {split} in datalist {path}: change one of the two")

    missing = [file for item in items for key, file in item.items() if key != "name" and not os.path.exists(file)]
    if missing:
        raise InputError(
            f"{len(missing)} files of {split} in datalist {path} are not on disk ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}): set dataset_dir to the folder that they are relative to"
        )
    return items


def labelled(items: list[dict]) -> list[dict]:
    """The same items, of which each has a `label`.

    Raises:
        InputError: one has none, as in BTCV's `test` list.
    """
    absent = [item["name"] for item in items if "label" not in item]
    if absent:
        raise InputError(
            f"{len(absent)} of {len(items)} items have no label, the first {absent[0]}: "
            "choose another list of the datalist, or run inference.json on the images"
        )
    return items


def class_names(data_set: str) -> list[str]:
    """Names of a data set's classes in the order of the logits.

    Raises:
        InputError: `data_set` is unknown, or "csv", whose classes the key `classes` has to name.
    """
    names = list(_labelled_set(data_set).classes)
    if not names:
        raise InputError(f"data_set {data_set} has no classes of its own: set the key classes to a list of names")
    return names


def labelled_volumes(
    dataset_dir: str | os.PathLike,
    data_set: str,
    split: str,
    classes: Sequence[str] | None = None,
    exclusive: bool = False,
    lists_dir: str | os.PathLike | None = None,
    labels: str | os.PathLike | None = None,
    data_fraction: float = 1.0,
    validation_share: float = 0.0,
    test_share: float = 0.2,
    exclude: str | os.PathLike | None = None,
    seed: int = 42,
) -> list[dict]:
    """Volumes with class labels: items `image` (path), `name`, `patient`, and `label`.

    `label` is a float32 array of zeros and ones, one a class; where classes exclude each other an int, the class' code.
    Labels come from

    - the authors' lists in `lists_dir`, as published: `train_list_1.csv`, `train_list_10.csv` (for a `data_fraction` of
      0.01 and 0.1), `train_list.csv`, `val_list.csv`, `test_list.csv`. A fraction without a list of its own is drawn
      from `train_list.csv`. Of the last two, one may be absent, and the other stands for both: of CT-RATE, CC-CCII and
      LUNA16 the published validation list is the test list;
    - or one table of all volumes, `labels`, from which `test_share` of the patients are held out for testing;
    - or, for CT-RATE without either, the label files that it is downloaded with: `train` for training, `valid` for
      validation and testing.

    With a `validation_share`, validation is that share of the training patients, who are then not trained on; without
    one, validation is `val_list.csv`, or the test volumes, as in the published protocol. No patient stands on both
    sides of a split that is drawn here, and for one seed the training patients of a smaller `data_fraction` are among
    those of a larger one. A patient is what CT-RATE's volume names or a column `patient` tell; else the volume itself.

    Args:
        dataset_dir: where the volumes lie, see :data:`LABELLED_SETS`.
        data_set: one of :data:`LABELLED_SETS`.
        split: "train", "valid" or "test".
        classes: their names, in the order of the logits; the data set's own when None.
        exclusive: whether exactly one class is true of a volume; the column `label` then holds its code.
        exclude: text or CSV file whose first column names volumes to leave out.
        seed: of the order in which patients are drawn.

    Raises:
        InputError: a file, a column or a volume is missing, a label is not 0 or 1 (or no code of a class), nothing is
            left of a split, or an argument is out of range.
    """
    layout = _labelled_set(data_set)
    classes = class_names(data_set) if classes is None else list(classes)
    if split not in ("train", "valid", "test"):
        raise InputError(f"split is {split!r}: give train, valid or test")
    for key, share in (("validation_share", validation_share), ("test_share", test_share)):
        if not 0 <= share < 1:
            raise InputError(f"{key} is {share}: give a share from 0 up to, not including, 1, such as 0.1 for 10 %")
    if not 0 < data_fraction <= 1:
        raise InputError(f"data_fraction is {data_fraction}: give a share above 0 and up to 1, such as 0.1 for 10 %")
    dataset_dir = Path(dataset_dir).expanduser()
    if not dataset_dir.is_dir():
        raise InputError(f"dataset_dir {dataset_dir} is no folder: give the one that holds the volumes of {data_set}")

    def read(path: Path) -> list[dict]:
        return _labelled_rows(path, data_set, layout, classes, exclusive)

    chosen: list[dict] | None = None  # the training rows, where a list of its own tells the fraction
    if lists_dir is not None:
        folder = Path(lists_dir).expanduser()
        every_train = read(_list_file(folder, "train_list.csv"))
        percent = folder / f"train_list_{round(100 * data_fraction)}.csv"
        if data_fraction < 1 and percent.is_file():
            chosen = read(percent)
        valid = read(_list_file(folder, "val_list.csv", "test_list.csv"))
        test = read(_list_file(folder, "test_list.csv", "val_list.csv"))
    elif labels is not None:
        rows = read(Path(labels).expanduser())
        order = _patient_order(rows, seed)
        held_out = set(order[len(order) - round(test_share * len(order)) :])
        every_train = [row for row in rows if row["patient"] not in held_out]
        valid = test = [row for row in rows if row["patient"] in held_out]
    elif data_set == "ct_rate":
        root = dataset_dir / "dataset" if (dataset_dir / "dataset").is_dir() else dataset_dir
        files = [root / "multi_abnormality_labels" / f"{word}_predicted_labels.csv" for word in ("train", "valid")]
        absent = [str(file) for file in files if not file.is_file()]
        if absent:
            raise InputError(
                f"{absent[0]} is missing: download CT-RATE's labels, or set lists_dir to a folder with "
                "train_list.csv and test_list.csv"
            )
        every_train, test = map(read, files)
        valid = test
    else:
        raise InputError(
            f"{data_set} needs labels: set lists_dir to the folder of its published lists, or labels to one CSV file "
            "of all volumes"
        )

    order = _patient_order(every_train, seed)
    if validation_share:
        size = max(1, round(validation_share * len(order)))
        held_out = set(order[len(order) - size :])
        valid = [row for row in every_train if row["patient"] in held_out]
        order = [patient for patient in order if patient not in held_out]
        chosen = chosen and [row for row in chosen if row["patient"] not in held_out]
    if chosen is None:
        drawn = set(order[: math.ceil(data_fraction * len(order) - 1e-9)])  # see ct_rate
        chosen = [row for row in every_train if row["patient"] in drawn]
    rows = {"train": chosen, "valid": valid, "test": test}[split]

    excluded = set() if exclude is None else _volume_names(Path(exclude).expanduser())
    rows = [row for row in rows if row["name"] not in excluded]
    if not rows:
        raise InputError(
            f"split {split} of {data_set} has no volume (data_fraction {data_fraction}, validation_share "
            f"{validation_share}, test_share {test_share}, exclude {exclude}): change these keys, or the list"
        )
    missing = []
    for row in rows:
        row["image"] = _find_image(dataset_dir, layout, row["name"])
        if row["image"] is None:
            missing.append(row["name"])
    if missing:
        raise InputError(
            f"{len(missing)} of {len(rows)} volumes of split {split} are not in dataset_dir {dataset_dir} "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}), where {layout.images[0]} was sought: "
            "put them there, or list their names in a file given as exclude"
        )
    return rows


def prepared(path: str | os.PathLike) -> str:
    """`path` of a published list, or, where only that is on disk, the uncompressed .nii that stands for its .nii.gz."""
    path = os.fspath(path)
    plain = path.removesuffix(".gz")
    return plain if path.endswith(".nii.gz") and not os.path.exists(path) and os.path.exists(plain) else path


def mask_file_name(finding: str) -> str:
    """``Lung nodule`` -> ``lung_nodule.nii.gz``: a finding's mask in a volume's folder under ``masks``."""
    return finding.lower().replace(" ", "_") + ".nii.gz"


def scans(path: str | os.PathLike) -> list[dict]:
    """Items `{"image": path, "name": stem}` of a CT file, of a DICOM folder, of a folder of such files and folders, or
    of a list: a .csv or .txt file whose first column holds their paths, relative ones from the list's own folder.

    A folder is a DICOM folder if DICOM files lie directly in it; its own path is then the image. Items are sorted by
    path. Names are unique: file names without their ending, or with it where two files differ in nothing else. Hidden
    files are passed over.

    Raises:
        InputError: `path` does not exist, or holds nothing that can be a CT by its name.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"{path} does not exist: give a CT file, a DICOM folder, or a folder that holds such")
    if path.is_file() and path.suffix.lower() in (".csv", ".txt"):
        lines = [line.split(",")[0].strip().strip('"') for line in path.read_text(encoding="utf-8-sig").splitlines()]
        # a header is no CT by its name, and a listed file that is missing is told when it is read
        paths = [path.parent / line for line in lines if line.lower().endswith(CT_SUFFIXES) or "/" in line]
        if not paths:
            raise InputError(f"{path} lists no CT: write one path of a CT file or DICOM folder a line")
    elif _is_ct_file(path) or _is_dicom_folder(path):
        paths = [path]
    elif path.is_file():
        advice = "give the folder of its series" if _is_dicom_file(path) else "convert it to one of them"
        raise InputError(f"{path} is neither {', '.join(CT_SUFFIXES)} nor a DICOM folder: {advice}")
    else:
        paths = sorted(entry for entry in path.iterdir() if _is_ct_file(entry) or _is_dicom_folder(entry))
        if not paths:
            raise InputError(
                f"{path} holds no {', '.join(CT_SUFFIXES)} or DICOM file, and no subfolder with DICOM files: "
                "give the folder directly above the scans"
            )
    names = [_stem(entry) for entry in paths]
    if len(set(names)) < len(names):
        names = [entry.name for entry in paths]
    return [{"image": str(entry), "name": name} for entry, name in zip(paths, names)]


def _words(split: str) -> tuple[str, ...]:
    """What a split is called in file names: as published, reports say "validation" where labels say "valid"."""
    return ("validation", "valid") if split == "valid" else (split,)


def _find(paths: list[Path]) -> Path | None:
    """The first of `paths` that exists."""
    return next((path for path in paths if path.exists()), None)


def _ct_rate_reports(root: Path, split: str) -> list[dict]:
    """Items of all volumes that the split's report CSV names: paths, patient and report, not yet looked up on disk."""
    reports_csvs = [root / "radiology_text_reports" / f"{word}_reports.csv" for word in _words(split)]
    reports_csv = _find(reports_csvs)
    if reports_csv is None:
        raise InputError(f"dataset_dir {root} has no reports: download CT-RATE's to {reports_csvs[0]}")
    volumes_dir = _find([root / f"{split}_fixed", root / split])
    if volumes_dir is None:
        raise InputError(f"dataset_dir {root} has no volumes: download CT-RATE's to {root / f'{split}_fixed'}")
    masks_dir = _find([root / "masks" / f"{split}_fixed", root / "masks" / split])

    reports = _read_csv(reports_csv, ("VolumeName", "Findings_EN", "Impressions_EN")).drop_duplicates("VolumeName")
    if reports.empty:
        raise InputError(f"{reports_csv} names no volume: download it again")
    items = []
    for name, findings, impression in zip(
        reports["VolumeName"], _report_text(reports["Findings_EN"]), _report_text(reports["Impressions_EN"])
    ):
        parts = name.split("_")
        if len(parts) != 4:
            raise InputError(f"{reports_csv}: VolumeName {name!r} is not split_patient_scan_reconstruction: correct it")
        patient, scan = "_".join(parts[:2]), "_".join(parts[:3])
        item = {
            "image": prepared(os.path.join(volumes_dir, patient, scan, f"{name}.nii.gz")),
            "name": name,
            "patient": patient,
            "findings": findings,
            "impression": impression,
        }
        if masks_dir is not None and os.path.isdir(masks := os.path.join(masks_dir, patient, scan, name)):
            item["masks"] = masks
        items.append(item)
    return items


def _ct_rate_labels(path: Path) -> dict[str, np.ndarray]:
    """Volume name -> float32 array of 18 zeros and ones in the order of the classes, whatever that of the columns."""
    frame = _read_csv(path, ("VolumeName", *CT_RATE_CLASSES))
    values = frame[list(CT_RATE_CLASSES)].apply(pd.to_numeric, errors="coerce").to_numpy(np.float32)
    wrong = np.argwhere(~np.isin(values, (0, 1)))
    if len(wrong):
        row, column = wrong[0]
        name, value = frame["VolumeName"].iloc[row], frame[CT_RATE_CLASSES[column]].iloc[row]
        raise InputError(f"{path}: {CT_RATE_CLASSES[column]} of {name} is {value}: make it 0 or 1")
    return dict(zip(frame["VolumeName"], values))


def _ct_rate_sentences(path: Path) -> dict[str, dict[str, str]]:
    """Volume name -> finding -> the sentence of the report that tells of it."""
    frame = _read_csv(path, ("VolumeName", "Finding", "Sentence"))
    sentences: dict[str, dict[str, str]] = defaultdict(dict)
    for name, finding, sentence in zip(frame["VolumeName"], frame["Finding"], frame["Sentence"]):
        sentences[name][finding] = sentence
    return sentences


def _labelled_set(data_set: str) -> LabelledSet:
    if data_set not in LABELLED_SETS:
        raise InputError(f"data_set {data_set!r} is unknown: give one of {', '.join(LABELLED_SETS)}")
    return LABELLED_SETS[data_set]


def _list_file(folder: Path, *names: str) -> Path:
    """The first of `names` that the folder of lists has."""
    found = _find([folder / name for name in names])
    if found is None:
        raise InputError(f"lists_dir {folder} has no {' or '.join(names)}: give the folder of the data set's lists")
    return found


def _patient_order(rows: list[dict], seed: int) -> list[str]:
    return np.random.RandomState(seed).permutation(sorted({row["patient"] for row in rows})).tolist()


def _labelled_rows(
    path: Path, data_set: str, layout: LabelledSet, classes: Sequence[str], exclusive: bool
) -> list[dict]:
    """Rows of a list: `name`, `patient` and `label`."""
    frame = _read_table(path)
    headers = {header.strip().casefold(): header for header in frame.columns}

    def header_of(*candidates: str) -> str | None:
        return next((headers[c.casefold()] for c in candidates if c.casefold() in headers), None)

    ids = header_of(layout.id_column) or frame.columns[0]
    wanted = {"label": ("label",)} if exclusive else {c: (c, layout.columns.get(c, c)) for c in classes}
    columns = {name: header_of(*candidates) for name, candidates in wanted.items()}
    absent = [name for name, header in columns.items() if header is None]
    if absent:
        raise InputError(
            f"{path} has no column {', '.join(absent)} (it has {', '.join(frame.columns)}): "
            "give the list of this data_set, rename its columns, or set the key classes"
        )
    patients = header_of("patient")
    extra = [h for h in frame.columns if h not in {ids, patients, *columns.values()}]
    if extra:
        _warn_once(f"{path}: {len(extra)} columns are no class of {data_set}, and are not used: {', '.join(extra)}")

    frame = frame.dropna(subset=[ids])
    names = frame[ids].str.strip().str.removesuffix(".nii.gz")
    twice = names[names.duplicated()]
    if len(twice):
        raise InputError(f"{path} names {twice.iloc[0]} twice: keep one row per volume")
    values = frame[list(columns.values())].apply(pd.to_numeric, errors="coerce").to_numpy(np.float32, copy=True)
    allowed = range(len(classes)) if exclusive else (0, 1)
    wrong = np.argwhere(~np.isin(values, allowed))
    if len(wrong):
        row, column = wrong[0]
        found = frame[list(columns.values())[column]].iloc[row]
        raise InputError(
            f"{path}: {list(columns)[column]} of {names.iloc[row]} is {found}: make it "
            f"{f'a code from 0 to {len(classes) - 1}' if exclusive else '0 or 1'}"
        )
    owners = names.map(_patient_of) if patients is None else frame[patients].fillna(names)
    return [
        {"name": name, "patient": owner, "label": int(value[0]) if exclusive else value}
        for name, owner, value in zip(names, owners, values)
    ]


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _patient_of(name: str) -> str:
    """ "train_1_a_2" is of patient "train_1"; any other name is taken for a patient of its own."""
    parts = name.split("_")
    return "_".join(parts[:2]) if len(parts) == 4 and parts[0] in ("train", "valid") else name


def _find_image(dataset_dir: Path, layout: LabelledSet, name: str) -> str | None:
    parts = [*name.split("_"), "", "", ""]
    words = {"split": parts[0], "patient": "_".join(parts[:2]), "scan": "_".join(parts[:3]), "letter": parts[2]}
    paths = (prepared(os.path.join(dataset_dir, place.format(name=name, **words))) for place in layout.images)
    return next((path for path in paths if os.path.exists(path)), None)


def _read_table(path: Path) -> pd.DataFrame:
    """A CSV file, all cells as strings."""
    try:
        return pd.read_csv(path, dtype=str, encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # pandas' parser errors and UnicodeDecodeError are ValueErrors
        cause = str(error).strip().splitlines()[0]
        raise InputError(f"{path} cannot be read as a CSV file in UTF-8 ({cause}): download it again") from error


def _read_csv(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """All cells as strings; `columns` are checked to be there, and volume names lose their file ending."""
    frame = _read_table(path)
    absent = [column for column in columns if column not in frame.columns]
    if absent:
        raise InputError(
            f"{path} has no column {', '.join(absent)} (it has {', '.join(frame.columns)}): "
            "download it again, or rename its columns"
        )
    frame = frame.dropna(subset=["VolumeName"])
    return frame.assign(VolumeName=frame["VolumeName"].str.strip().str.removesuffix(".nii.gz"))


def _report_text(texts: pd.Series) -> list[str]:
    """Stripped text; "" where nothing was reported, for which CT-RATE has blanks and "Not given."."""
    texts = texts.fillna("").str.strip()
    return texts.mask(texts.str.fullmatch(r"not given\.?", case=False), "").tolist()


def _volume_names(path: Path) -> set[str]:
    """Names in the first column of a text or CSV file, without folders and file ending; a header matches no volume."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"exclude {path} cannot be read as text: give a file with one volume name a line") from error
    return {Path(line.split(",")[0].strip().strip('"')).name.removesuffix(".nii.gz") for line in lines}


def _is_ct_file(path: Path) -> bool:
    # A name that starts with a dot is no scan: macOS leaves a "._scan.nii.gz" beside every scan.nii.gz that it copies.
    return path.name.lower().endswith(CT_SUFFIXES) and not path.name.startswith(".") and path.is_file()


def _is_dicom_file(path: Path) -> bool:
    """By its ending or, as many files of a series have none or end in a number, by the four letters at byte 128."""
    if path.name.startswith(".") or not path.is_file():
        return False
    if path.suffix.lower() == ".dcm":
        return True
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def _is_dicom_folder(path: Path) -> bool:
    # DICOMDIR is a DICOM file too, but an index of the series below it.
    return path.is_dir() and any(entry.name != "DICOMDIR" and _is_dicom_file(entry) for entry in path.iterdir())


def _stem(path: Path) -> str:
    """Name of a CT file without its ending (.nii.gz is one); the whole name of a folder."""
    suffix = next((suffix for suffix in CT_SUFFIXES if path.name.lower().endswith(suffix)), "")
    return path.name[: -len(suffix)] if suffix and path.is_file() else path.name
