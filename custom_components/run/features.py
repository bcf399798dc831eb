"""How a probe is fed: with volumes, or with features of its frozen encoder that are kept on disk."""

import csv
import hashlib
import inspect
import io
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import monai.data
import numpy as np
import torch
from custom_components.distributed import from_all_ranks
from custom_components.errors import InputError, none_read, tell_left_out
from custom_components.files import Claims, file_stamp, replacing
from custom_components.probe import LinearProbe
from custom_components.run.inferers import AutocastInferer, ReadableLoader
from custom_components.run.seeded import SeededDataLoader, WatchedDataLoader, mixed_seed
from monai.data import ImageReader
from monai.networks import eval_mode
from monai.transforms import Compose, Transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 1.0  # at what other processes have encoded
CACHE_VERSION = 1  # raise it when the same keys would give other features


def describe(configured: Any) -> str:
    """What was configured, as JSON: of a transform its class and the arguments that it was made with.

    What a transform draws or fills in while it works is no argument, so a used transform is described as a fresh one.
    """
    return json.dumps(configured, default=_parts, indent=2, sort_keys=True)


def _parts(thing: Any) -> Any:
    """What stands in JSON for a thing that it does not know."""
    if isinstance(thing, (Transform, ImageReader)):
        arguments = {*inspect.signature(type(thing).__init__).parameters, "kwargs"}
        return {"class": f"{type(thing).__module__}.{type(thing).__qualname__}"} | {
            name: value
            for name, value in vars(thing).items()
            if not name.startswith("_") and (name in arguments or isinstance(value, (Transform, ImageReader)))
        }
    if isinstance(thing, (Tensor, np.ndarray, np.generic)):
        return thing.tolist()
    if isinstance(thing, Collection):
        return list(thing.items() if isinstance(thing, Mapping) else thing)
    if inspect.isfunction(thing):
        return [thing.__module__, thing.__qualname__, thing.__code__.co_code.hex(), str(thing.__code__.co_consts)]
    return str(thing) if isinstance(thing, (type, torch.dtype, np.dtype, Enum)) else type(thing).__qualname__


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class FeatureDataset(Dataset):
    """Encoded volumes: an item is ``image [C]`` float32, the volume's first view, and ``label``.

    Args:
        features: ``[N, V, C]``, N volumes in V views.
        data: the volumes' items.
        failures: ``(name, reason)`` of volumes that could not be read.

    Attributes:
        labels: ``[N, ...]``.
    """

    features: Tensor
    data: Sequence[Mapping[str, Any]]
    failures: Sequence[tuple[str, str]] = ()

    def __post_init__(self) -> None:
        self.labels = torch.stack([torch.as_tensor(item["label"]) for item in self.data])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.features[index, 0], "label": self.labels[index]}


class FeatureLoader(SeededDataLoader):
    """Batches of a :class:`FeatureDataset`, each volume in one of its views, drawn anew in every epoch.

    Order and views follow from seed, epoch and batch, as in the parent.
    """

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        start, self.start = self.start, 0
        self.sampler.start = start * self.batch_size
        content = self.dataset.items
        order = torch.tensor([index for _, index in self.sampler], dtype=torch.long)
        for i, rows in enumerate(order.split(self.batch_size), start):
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.sampler.epoch, i, self.sampler.rank))
            views = torch.randint(content.features.shape[1], rows.shape, generator=generator)
            yield {"image": content.features[rows, views], "label": content.labels[rows]}


@dataclass
class OnlineFeatures:
    """Feeds a probe with volumes, which are read and encoded anew in every epoch: the published way.

    Slow where the encoder is frozen, and the only way where it is fine-tuned.

    Args:
        network: the probe, on ``device``.
        read: deterministic transforms that every volume starts with.
        plain, augment: transforms that follow for evaluation, and for training.
        seed: of order and augmentation.
        batch_size: volumes per forward pass of an evaluation.
        timeout_minutes: see :class:`custom_components.run.seeded.WatchedDataLoader`.
    """

    name: ClassVar[str] = "online"
    network: LinearProbe
    read: Sequence[Callable]
    plain: Sequence[Callable]
    augment: Sequence[Callable]
    device: torch.device | str = "cpu"
    amp: bool = True
    seed: int = 42
    num_workers: int = 0
    batch_size: int = 8
    num_views: int | None = None
    timeout_minutes: float | None = None

    def __post_init__(self) -> None:
        self.read, self.plain, self.augment = Compose(self.read), Compose(self.plain), Compose(self.augment)
        self.device = torch.device(self.device)
        self.trained: nn.Module = self.network  # by the trainer: takes an item's image, gives logits
        self.inferer = AutocastInferer(self.amp)

    def encoder_key(self) -> str:
        """SHA-256 of the encoder's weights, buffers and plain attributes (patch size, heads, eps) of its modules."""
        digest = hashlib.sha256()
        for name, module in self.network.encoder.named_modules():
            plain = [
                (k, v) for k, v in vars(module).items() if k != "training" and isinstance(v, (int, float, str, tuple))
            ]
            digest.update(f"{name} {type(module).__qualname__} {sorted(plain)}\n".encode())
        # a scale space keeps its widths in buffers that no checkpoint holds
        tensors = self.network.encoder.state_dict() | dict(self.network.encoder.named_buffers())
        for name, tensor in tensors.items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def training(self, data: Sequence[Mapping[str, Any]]) -> Dataset:
        """Items with ``image`` and ``label``, augmented."""
        return monai.data.Dataset(data, Compose([self.read, self.augment]))

    def plain_views(self, data: Sequence[Mapping[str, Any]], description: str = "") -> Dataset:
        """Items for evaluation: no augmentation, in order."""
        return monai.data.Dataset(data, Compose([self.read, self.plain]))

    def training_loader(self, dataset: Dataset, batch_size: int) -> SeededDataLoader:
        """Shuffled, repeatable batches of what :meth:`training` gave."""
        return SeededDataLoader(dataset, batch_size, self.seed, self.num_workers, timeout_minutes=self.timeout_minutes)

    def loader(self, dataset: Dataset) -> DataLoader:
        """Batches of what :meth:`plain_views` gave."""
        with torch.random.fork_rng(devices=()):  # MONAI's loader would start torch's generator anew
            return WatchedDataLoader(dataset, self.num_workers, self.timeout_minutes, batch_size=self.batch_size)

    def report(self) -> None:
        """Nothing to report: a volume that cannot be read has ended the training, or is told by the evaluation."""


@dataclass
class FeatureCache(OnlineFeatures):
    """Encodes volumes once per view, and keeps each view's feature in a file of its own: no volume is encoded twice.

    View 0 is the volume as in evaluation; views 1, 2, ... are augmented, each with random numbers that depend on
    ``seed``, the volume's name and the view alone. So evaluation shares view 0 with training, and more views or more
    data encode only what is new.

    Files lie in ``<cache_dir>/<key>/plain`` and ``<cache_dir>/<key>/<augmentation>``. The key hashes the encoder's
    weights and architecture, the deterministic transforms, and ``amp``; the augmentation's hashes its transforms and
    the seed. Names hold the stamp (path, size, time of change) of the volume's file. A file that is damaged, or not as
    long as it was, is made again.

    Any number of processes, under torchrun or each started by itself, share the work: each encodes the volumes that no
    other has claimed, then waits for theirs. One that is lost costs its volumes in work, which another encodes.

    Args:
        num_views: per training volume; ``batch_size`` counts views. All else as in :class:`OnlineFeatures`.
    """

    name: ClassVar[str] = "cached"
    num_views: int = 1
    cache_dir: str | Path = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.cache_dir = Path(self.cache_dir)
        self.failures: dict[str, str] = {}
        self.encoded = 0  # views that had to be encoded so far
        self.trained = getattr(self.network, "head", None)  # a control in the probe's place has none
        self.inferer = AutocastInferer(amp=False)

    def training(self, data: Sequence[Mapping[str, Any]]) -> FeatureDataset:
        return self.encode(data, self.num_views, "training")

    def plain_views(self, data: Sequence[Mapping[str, Any]], description: str = "") -> FeatureDataset:
        return self.encode(data, 1, description)

    def training_loader(self, dataset: FeatureDataset, batch_size: int) -> FeatureLoader:
        return FeatureLoader(dataset, batch_size, self.seed)

    def loader(self, dataset: FeatureDataset) -> DataLoader:
        return DataLoader(dataset, batch_size=len(dataset))

    def folders(self) -> tuple[Path, Path]:
        """Folder of plain and of augmented views, for the network's weights as they are now."""
        chain = [self.read, self.plain]
        key = describe({"version": CACHE_VERSION, "encoder": self.encoder_key(), "transforms": chain, "amp": self.amp})
        augmentation = describe({"augment": self.augment, "seed": self.seed})
        folder = self.cache_dir / _hash(key)
        for file, text in ((folder / "key.json", key), (folder / f"{_hash(augmentation)}.json", augmentation)):
            if not file.is_file() or file.read_text() != text:
                with replacing(file) as temporary:
                    temporary.write_text(text)
        return folder / "plain", folder / _hash(augmentation)

    def encode(self, data: Sequence[Mapping[str, Any]], num_views: int = 1, description: str = "") -> FeatureDataset:
        """Features of items with ``image`` and ``name``; volumes that cannot be read are reported, and left out.

        Processes of a group must all call it, for the same items: each leaves out what any of them could not read.

        Raises:
            InputError: the encoder is not frozen, ``num_views`` is not positive, or no volume at all can be read.
        """
        if not self.network.frozen:
            raise InputError(
                "frozen is false, but features_dir keeps features: set features_dir to null, an encoder that learns "
                "needs features online"
            )
        if num_views < 1:
            raise InputError(f"num_views is {num_views}: give the number of views per volume, 1 or more")
        plain, augmented = self.folders()
        items: list[dict[str, Any]] = []
        failures: dict[str, str] = {}
        for item in data:
            try:
                stamp = _hash(f"{os.path.realpath(item['image'])} {file_stamp(item['image'])}")
            except OSError as error:
                failures[item["name"]] = f"{item['image']} cannot be read ({error.strerror}): restore it"
                continue
            stem = f"{Path(item['name']).name}-{stamp}"
            files = {view: (augmented if view else plain) / f"{stem}-{view}.npy" for view in range(num_views)}
            items.append({**item, "stem": stem, "files": files})
        claims = Claims(plain.parent)
        _tidy(claims)
        missing, told = _missing(items), False
        while missing:
            failures |= self._encode(missing, claims, description)
            missing = [item for item in _missing(missing) if item["name"] not in failures]
            while missing and not any(claims.take(item["stem"]) for item in missing):
                if not told:
                    logger.warning(
                        f"{len(missing)} volumes of the feature cache {plain.parent} are being encoded by others, the "
                        f"first by {claims.holder(missing[0]['stem'])}: waiting for them"
                    )
                told = True
                time.sleep(SECONDS_BETWEEN_LOOKS)
                missing = _missing(missing)

        loaded = {}
        for item in items:
            views = [_load(file) for file in item["files"].values()]
            if all(view is not None for view in views):
                loaded[item["name"]] = torch.from_numpy(np.stack(views))
            elif item["name"] not in failures:
                failures[item["name"]] = f"{item['name']}: its cached feature cannot be read"
        # processes that train together must have as many volumes, though some could read what others could not
        failures = {name: reason for found in from_all_ranks(failures) for name, reason in found.items()}
        self.failures |= failures
        kept, features = [], []
        for item in items:
            if item["name"] not in failures:
                kept.append({name: value for name, value in item.items() if name not in ("stem", "files")})
                features.append(loaded[item["name"]])
        if not kept:
            raise none_read(len(data), list(failures.items()))
        return FeatureDataset(torch.stack(features), kept, list(failures.items()))

    def _encode(self, items: Sequence[Mapping[str, Any]], claims: Claims, description: str) -> dict[str, str]:
        """Write the ``files`` of each item that no other process has claimed or done, a feature per view.

        Returns:
            Names and reasons of those that cannot be read.
        """

        def take(index: int) -> bool:
            stem = items[index]["stem"]
            taken = claims.take(stem) and bool(_missing([items[index]]))
            if not taken:
                claims.release(stem)
            return taken

        views = partial(_views, read=self.read, plain=self.plain, augment=self.augment, seed=self.seed)
        dataset = monai.data.Dataset([{**item, "index": index} for index, item in enumerate(items)], views)
        loader = ReadableLoader(dataset, self.num_workers, description, self.timeout_minutes, take)
        stems = {item["name"]: item["stem"] for item in items}
        told = 0
        try:
            with eval_mode(self.network):
                for batch in loader:
                    item = items[batch["index"]]
                    chunks = batch["image"][0].to(self.device).split(self.batch_size)
                    with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                        features = torch.cat([self.network.features(chunk) for chunk in chunks]).float().cpu().numpy()
                    for file, feature in zip(item["files"].values(), features, strict=True):
                        _save(feature, file)
                    self.encoded += len(features)
                    for name in (item["name"], *(name for name, _ in loader.failures[told:])):
                        claims.release(stems[name])
                    told = len(loader.failures)
        finally:
            for stem in list(claims.held):
                claims.release(stem)
        return dict(loader.failures)

    def report(self) -> None:
        """Raise an :class:`InputError` that lists the volumes left out, so that the run ends with exit code 1."""
        tell_left_out(list(self.failures.items()))


@dataclass
class RateExport:
    """Writes features of volumes, as evaluation has them, in the layout of the RATE evaluations (YalaLab/rate-evals).

    ``embeddings/<split>/<accession>.npz`` in ``folder`` hold ``embedding [C]`` float32; ``processed.csv`` has a row a
    file; ``labels.json`` answers each class of each volume with Yes or No.

    Args:
        features: a :class:`FeatureCache`, which encodes nothing twice.
        data: split -> items with ``image``, ``name`` and ``label``.
        classes: of the labels.
        exclusive: whether a label is the code of the one class that is true.
        dataset_name, model_name: as ``processed.csv`` calls them.

    Raises:
        InputError: ``folder`` holds embeddings of other volumes, which RATE would read too; two volumes of a split have
            one name; and once all else is written, volumes could not be read.
    """

    features: FeatureCache
    data: Mapping[str, Sequence[Mapping[str, Any]]]
    folder: str | Path
    classes: Sequence[str]
    exclusive: bool = False
    dataset_name: str = "dataset"
    model_name: str = "simcrop"

    def __call__(self) -> None:
        folder, written, answers = Path(self.folder), [], {}
        for split, items in self.data.items():
            self._check(split, [_accession(item) for item in items])
            dataset = self.features.plain_views(items, split)
            for item, feature in zip(dataset.data, dataset.features[:, 0].numpy(), strict=True):
                accession = _accession(item)
                with replacing(folder / "embeddings" / split / f"{accession}.npz") as temporary:
                    np.savez(temporary, embedding=feature)
                written.append((accession, self.model_name, self.dataset_name, split, datetime.now().isoformat()))
                label = np.asarray(item["label"])
                truth = np.arange(len(self.classes)) == label if self.exclusive else label
                found = [{name: "Yes" if true else "No"} for name, true in zip(self.classes, truth, strict=True)]
                answers[accession] = {"qa_results": {"findings": found}}
        with replacing(folder / "processed.csv") as temporary, open(temporary, "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("accession", "model_name", "dataset_name", "split", "timestamp"))
            rows.writerows(written)
        with replacing(folder / "labels.json") as temporary:
            temporary.write_text(json.dumps(answers, indent=1) + "\n")
        print(f"{len(written)} embeddings: {folder.resolve()}")
        self.features.report()

    def _check(self, split: str, accessions: Sequence[str]) -> None:
        if len(set(accessions)) < len(accessions):
            twice = next(name for name in accessions if accessions.count(name) > 1)
            raise InputError(f"{split} has two volumes named {twice}: give each a name of its own in the labels' table")
        there = {path.stem for path in Path(self.folder, "embeddings", split).glob("*.npz")}
        if other := there - set(accessions):
            raise InputError(
                f"{Path(self.folder, 'embeddings', split)} holds {len(other)} embeddings of other volumes (such as "
                f"{min(other)}), which RATE would read too: delete them, or give another rate_dir"
            )


def _accession(item: Mapping[str, Any]) -> str:
    return Path(item["name"]).name


def probe_features(cache_dir: str | None, num_views: int, **options: Any) -> OnlineFeatures:
    """How a config feeds its probe: a :class:`FeatureCache`, or :class:`OnlineFeatures` where ``cache_dir`` is None."""
    if cache_dir is None:
        return OnlineFeatures(**options)
    return FeatureCache(cache_dir=cache_dir, num_views=num_views, **options)


def _missing(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The items of whose ``files`` some cannot be read, with those alone."""
    return [
        {**item, "files": absent}
        for item in items
        if (absent := {view: file for view, file in item["files"].items() if _load(file) is None})
    ]


def _tidy(claims: Claims) -> None:
    """Delete what killed processes have left: claims, and features half written, as live ones write under a claim."""
    temporary: dict[str, list[Path]] = {}
    for file in claims.folder.glob("*/.*.tmp.*.npy"):
        temporary.setdefault(file.name.partition(".tmp.")[2].rpartition("-")[0], []).append(file)
    for stem in {*temporary, *claims.left()}:
        if claims.take(stem) and stem in claims.held:  # a disk without locks says nothing of who lives
            for file in temporary.get(stem, ()):
                file.unlink(missing_ok=True)
            claims.release(stem)


def _views(item: Mapping[str, Any], read: Callable, plain: Callable, augment: Compose, seed: int) -> dict[str, Any]:
    """A volume in the views of its ``files``: ``image [V, 1, X, Y, Z]``, and the item's ``index``."""
    volume = read({"image": item["image"], "name": item["name"]})
    views = []
    for view in item["files"]:
        if view:
            digest = hashlib.sha256(f"{seed} {item['name']} {view}".encode()).digest()
            augment.set_random_state(seed=int.from_bytes(digest[:4], "little"))
        image = (augment if view else plain)({**volume, "image": volume["image"].clone()})["image"]
        views.append(torch.as_tensor(image).as_subclass(Tensor))
    return {"image": torch.stack(views), "index": item["index"]}


def _save(feature: np.ndarray, file: Path) -> None:
    """As NumPy saves it, with the checksum behind that its format lacks; ``np.load`` passes over what follows."""
    content = io.BytesIO()
    np.save(content, feature)
    with replacing(file) as temporary:
        temporary.write_bytes(content.getvalue() + zlib.crc32(content.getvalue()).to_bytes(4, "little"))


def _load(file: Path) -> np.ndarray | None:
    """None for what has to be made: there is no file, or its bytes are not those that were written."""
    try:
        content = file.read_bytes()
        if zlib.crc32(content[:-4]).to_bytes(4, "little") != content[-4:]:
            return None
        return np.load(io.BytesIO(content), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
