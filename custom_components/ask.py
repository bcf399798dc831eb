"""Trained weights asked from Python, through what the bundle's ``inference.json`` builds: nothing is done twice.

    from custom_components.ask import load

    model = load("models/")  # of the pretrain, the classify or the segment bundle
    model.similarity("ct.nii.gz", ["There is a pleural effusion."]).scores

A scan is a path (.nii, .nii.gz, .nrrd, .nhdr, .mha, .mhd, or a folder with one DICOM series), a MetaTensor, or an array
``[X, Y, Z]`` in HU with its ``affine`` ``[4, 4]`` from voxel indices to RAS+ mm. A list of scans gives a list of
answers, in one array or table where they have one shape.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from custom_components.data.save import peaks, volumes
from custom_components.errors import InputError
from custom_components.run.inferers import reason_of
from custom_components.run.start import check_components, quietly
from monai.bundle import create_workflow
from monai.data import Dataset, MetaTensor, decollate_batch, list_data_collate
from monai.networks import eval_mode
from torch import Tensor
from tqdm import tqdm

logger = logging.getLogger(__name__)

CONFIG = Path("configs", "inference.json")
Scan = str | os.PathLike | np.ndarray | Tensor


def load(
    path: str | os.PathLike, bundle_root: str | os.PathLike | None = None, batch_size: int = 1, **keys: Any
) -> "SentenceModel | ProbeModel | SegmentationModel":
    """The model in a bundle's ``models`` folder, ready to be asked.

    Args:
        path: of a folder ``models`` with ``model.pt`` and its ``model.json``, of such a ``.pt``, or of a bundle, in the
            repository or exported.
        bundle_root: the bundle, for weights that lie outside of one.
        batch_size: scans of a list that the network takes at once, where they have one size.
        keys: of the bundle's ``inference.json``, such as ``device="cpu"``; the rest is as the weights say.

    Raises:
        InputError: there are no weights or no bundle, they do not fit each other, or a key is wrong.
    """
    root, checkpoint = _located(Path(path).expanduser().absolute(), bundle_root)
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: give 1 or more")
    check_components(root)
    keys = {"bundle_root": str(root), "models_dir": str(checkpoint.parent), "checkpoint": str(checkpoint)} | keys
    check = {"_target_": "custom_components.run.keys.check_keys", "bundle_root": "@bundle_root", "section": "inference"}
    with _as_raised(), quietly():
        workflow = create_workflow(
            config_file=str(root / CONFIG),
            workflow_type="infer",
            logging_file=False,
            init_id="check",
            check=check,  # in place of what a process of its own does at its start
            **{key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in keys.items()},
        )
        network = workflow.parser.get_parsed_content("network")
        kind = type(network).__name__
        if kind not in MODELS:
            raise InputError(f"{root / CONFIG} builds a {kind}: of {', '.join(MODELS)}, one can be asked")
        return MODELS[kind](root, network, workflow.parser.get_parsed_content, batch_size)


def _located(path: Path, bundle_root: str | os.PathLike | None) -> tuple[Path, Path]:
    """The bundle, and the weights."""
    if not path.exists():
        raise InputError(f"{path} does not exist: give a bundle's folder models, or a model.pt")
    if (path / CONFIG).is_file():
        bundle_root = path if bundle_root is None else bundle_root
        path /= "models"
    root = next((folder for folder in path.parents if (folder / CONFIG).is_file()), None)
    root = root if bundle_root is None else Path(bundle_root).expanduser().absolute()
    if root is None or not (root / CONFIG).is_file():
        where = f"{path} lies in no bundle" if root is None else f"{root} is no bundle"
        raise InputError(f"{where}: give bundle_root, the folder that holds {CONFIG}")
    checkpoint = path if path.is_file() else path / "model.pt"
    if not checkpoint.is_file():
        raise InputError(
            f"{path} holds no model.pt: train one, or bring one with its model.json (docs/README.md, Weights)"
        )
    return root, checkpoint


@contextlib.contextmanager
def _as_raised() -> Iterator[None]:
    """What MONAI wraps, as it was raised."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None


class ScansFailed(InputError):
    """Some scans of a list could not be read or processed; ``answers`` holds those of the others, None for these."""

    def __init__(self, message: str, answers: list[Any]) -> None:
        super().__init__(message, answers)
        self.answers = answers

    def __str__(self) -> str:
        return self.args[0]


class Model:
    """What the models of all bundles share: scans in, answers out, one or many."""

    bundle = ""

    def __init__(self, root: Path, network: torch.nn.Module, part: Callable[[str], Any], batch_size: int) -> None:
        self.root, self.network, self.batch_size = root, network, batch_size
        self.settings: Mapping[str, Any] = part("settings")
        self.device: torch.device = part("device")
        self.reader, self.preprocessing = part("reader"), part("preprocessing")
        self.inferer, self.in_scan = part("inferer"), part("in_scan")

    def __repr__(self) -> str:
        return f"{type(self).__name__} on {self.device}: {', '.join(self.asks)}"

    @property
    def asks(self) -> list[str]:
        """The names of what it can be asked."""
        return [name for name, what in vars(type(self)).items() if callable(what) and not name.startswith("_")]

    def __getattr__(self, name: str) -> Any:
        others = [kind.bundle for kind in MODELS.values() if name in vars(kind) and not name.startswith("_")]
        advice = f": load those of the bundle {others[0]}" if others else ""
        raise AttributeError(f"weights of the bundle {self.bundle} have no {name}{advice}")

    def _ask(
        self,
        scans: Scan | Sequence[Scan],
        affine: Any,
        answer: Callable[[dict[str, Any]], Any],
        inferer: Callable[[Tensor, torch.nn.Module], Any] | None = None,
        in_scan: bool = False,
    ) -> Any:
        """The answer of each scan, of what the inferer makes of it; as a list, where scans are one."""
        many = isinstance(scans, (list, tuple))
        items = _items(list(scans) if many else [scans], affine, many)
        answers: list[Any] = [None] * len(items)
        failures: dict[int, tuple[str, str]] = {}
        dataset = Dataset(items, self.preprocessing)
        with torch.inference_mode(), eval_mode(self.network):
            for start in tqdm(range(0, len(items), self.batch_size), unit="batch", disable=len(items) == 1):
                read = {}
                for i in range(start, min(start + self.batch_size, len(items))):
                    try:
                        read[i] = dataset[i]
                    except Exception as error:
                        failures[i] = reason_of(items[i]["name"], error)
                try:
                    found = self._infer(list(read.values()), inferer or self.inferer) if read else []
                    for (i, item), output in zip(read.items(), found, strict=True):
                        output = item | output
                        answers[i] = answer(self.in_scan(output) if in_scan else output)
                except Exception as error:
                    for i in read:
                        if answers[i] is None:
                            failures[i] = reason_of(items[i]["name"], error)
        if failures:
            reasons = "; ".join(reason for reason, _ in failures.values())
            traces = "".join(dict.fromkeys(trace for _, trace in failures.values()))
            if traces:  # of faults that no scan is known to have
                logger.error(traces)
            if not many:
                raise InputError(reasons)
            told = f"{len(failures)} of {len(items)} scans failed, and the error's answers hold the others: {reasons}"
            raise ScansFailed(told, answers)
        return answers if many else answers[0]

    def _infer(self, items: list[dict[str, Any]], inferer: Callable) -> list[dict[str, Any]]:
        if len({item["image"].shape for item in items}) > 1:
            return [output for item in items for output in self._infer([item], inferer)]
        images = list_data_collate([{"image": item["image"]} for item in items])["image"]
        output = inferer(images.to(self.device), self.network)
        return decollate_batch(output if isinstance(output, Mapping) else {"pred": output})


def _items(scans: Sequence[Scan], affine: Any, many: bool) -> list[dict[str, Any]]:
    """Items of the preprocessing; ``affine`` is one ``[4, 4]``, or, of many scans, one each."""
    if not scans:
        raise InputError("there is no scan in the list: give one or more")
    affines = [affine] * len(scans)
    if affine is not None and np.ndim(affine) != 2:
        affines = list(affine) if many else affines
        if len(affines) != len(scans):
            raise InputError(f"{len(affines)} affines are given for {len(scans)} scans: give one, or one for each")
    items = []
    for i, (scan, own) in enumerate(zip(scans, affines, strict=True)):
        if isinstance(scan, (str, os.PathLike)):
            if own is not None:
                raise InputError(f"{os.fspath(scan)} is given with an affine, which its file has: leave affine out")
            items.append({"image": os.fspath(scan), "name": os.fspath(scan)})
            continue
        if not isinstance(scan, (np.ndarray, Tensor)):
            raise InputError(f"a scan is a {type(scan).__name__}: give a path, or an array and its affine")
        own = scan.affine if own is None and isinstance(scan, MetaTensor) else own
        if own is None or np.shape(own) != (4, 4):
            found = "none" if own is None else f"of shape {list(np.shape(own))}"
            raise InputError(f"the affine of an array is {found}: give [4, 4], from voxel indices to RAS+ mm")
        voxels = scan.detach().cpu().numpy() if isinstance(scan, Tensor) else scan
        if voxels.dtype.kind not in "iufc":
            raise InputError(f"an array holds {voxels.dtype}, not one number a voxel: give HU")
        voxels = torch.from_numpy(np.require(voxels, voxels.dtype.newbyteorder("="), ["C", "W"]))
        items.append({"image": MetaTensor(voxels, affine=torch.as_tensor(np.array(own, float))), "name": f"scan {i}"})
    return items


class Similarity(NamedTuple):
    """How S sentences fit one scan.

    Attributes:
        table: ``score``, ``probability`` (NaN without negative sentences) and the place ``x_mm``, ``y_mm``, ``z_mm``
            (RAS+) of the highest cosine ``max`` of each sentence or class, its index.
        maps: ``[S, X, Y, Z]`` float32 cosines on the scan's own grid, NaN where the network did not look.
        affine: ``[4, 4]`` of the scan, from voxel indices to RAS+ mm.
    """

    table: pd.DataFrame
    maps: np.ndarray
    affine: np.ndarray

    @property
    def scores(self) -> np.ndarray:
        return self.table["score"].to_numpy()


def _presence(inferer: Any, item: dict[str, Any]) -> pd.DataFrame:
    columns = {name: item[name].float().cpu().numpy() for name in ("score", "probability")}
    return pd.DataFrame(columns, list(inferer.zero_shot.prompts))


class SentenceModel(Model):
    """Weights of the pretrain bundle."""

    bundle = "pretrain"

    def embed(self, scans: Scan | Sequence[Scan], affine: Any = None) -> np.ndarray:
        """The embedding ``[C]`` of a scan, ``[N, C]`` of a list, float32: the mean patch token, as a probe reads it."""

        def embedding(images: Tensor, network: torch.nn.Module) -> dict[str, Tensor]:
            return {"embedding": network.patches_and_embedding(images.as_tensor())[1]}

        found = self._ask(scans, affine, lambda item: item["embedding"].float().cpu().numpy(), embedding)
        return np.stack(found) if isinstance(found, list) else found

    def similarity(
        self, scans: Scan | Sequence[Scan], sentences: Any, affine: Any = None
    ) -> Similarity | list[Similarity]:
        """How well sentences fit a scan, and where.

        Args:
            sentences: one, a list, or class -> one, a list, or ``{"positive": [...], "negative": [...]}``.
        """
        inferer = self.inferer.about(sentences)

        def answer(item: dict[str, Any]) -> Similarity:
            maps, table = item["similarity"], _presence(inferer, item)
            table["max"], places = peaks(maps)
            table[["x_mm", "y_mm", "z_mm"]] = places
            return Similarity(table, maps.float().cpu().numpy(), maps.affine.cpu().numpy())

        return self._ask(scans, affine, answer, inferer, in_scan=True)

    def panel(self, scan: Scan, found: Similarity, affine: Any = None, threshold: float | None = None) -> Any:
        """A matplotlib figure of what :meth:`similarity` found in a scan, outlined at the cosine ``threshold``."""
        from custom_components.evaluation.figures import sentence_panel  # which loads scikit-learn and TensorBoard

        (item,) = _items([scan], affine, False)
        maps = MetaTensor(torch.as_tensor(found.maps), affine=torch.as_tensor(found.affine))
        titles = [f"{name}\nscore {score:.2f}" for name, score in found.table["score"].items()]
        with _as_raised():
            return sentence_panel(self.reader(item)["image"], maps, titles, threshold=threshold)

    def zero_shot(
        self,
        scans: Scan | Sequence[Scan],
        classes: Sequence[str] | None = None,
        prompts: str | os.PathLike | Mapping[str, Any] = "ensemble",
        affine: Any = None,
    ) -> pd.DataFrame | list[pd.DataFrame]:
        """Which classes a scan shows, told by sentences alone: ``score`` and ``probability`` (NaN without negatives).

        Args:
            classes: their names; None for all that the prompts name.
            prompts: class -> its sentences, as in :meth:`similarity`; or a JSON file of such; or the name of one in the
                bundle's ``configs/prompts``.
        """
        classes = [classes] if isinstance(classes, str) else classes
        if not isinstance(prompts, Mapping):
            shipped = self.root / "configs" / "prompts" / f"{prompts}.json"
            prompts = shipped if shipped.is_file() else Path(prompts)
        inferer = self.inferer.about(prompts, classes, maps=False)
        return self._ask(scans, affine, lambda item: _presence(inferer, item), inferer)


class ProbeModel(Model):
    """Weights of the classify bundle."""

    bundle = "classify"

    def probabilities(self, scans: Scan | Sequence[Scan], affine: Any = None) -> pd.Series | pd.DataFrame:
        """Probability of each class, its index; of a list of scans, a row each."""
        classes = self.settings["classes"]
        found = self._ask(scans, affine, lambda item: pd.Series(item["probability"].cpu().numpy(), classes))
        if not isinstance(found, list):
            return found
        names = [item["name"] for item in _items(scans, affine, True)]
        return pd.DataFrame(found, index=names)


class Segmentation(NamedTuple):
    """What was segmented in one scan.

    Attributes:
        labels: uint8 ``[X, Y, Z]`` on the scan's own grid: 0 for background, 1 for the first class, ...
        affine: ``[4, 4]`` of the scan, from voxel indices to RAS+ mm.
        volumes: ``voxels`` and ``ml`` of each class, its index.
    """

    labels: np.ndarray
    affine: np.ndarray
    volumes: pd.DataFrame


class SegmentationModel(Model):
    """Weights of the segment bundle."""

    bundle = "segment"

    def segment(self, scans: Scan | Sequence[Scan], affine: Any = None) -> Segmentation | list[Segmentation]:
        """The label map of a scan, in its own geometry, and the volume of each class."""
        return self._ask(scans, affine, self._segmentation, in_scan=True)

    def _segmentation(self, item: dict[str, Any]) -> Segmentation:
        labels = item["pred"]
        table = volumes(labels, self.settings["classes"]).set_index("class")
        return Segmentation(labels[0].cpu().numpy(), labels.affine.cpu().numpy(), table)


MODELS = {"VolumeEmbedder": SentenceModel, "LinearProbe": ProbeModel, "SimCroPUNETR": SegmentationModel}
