"""What a pre-trained SimCroP tells of volumes by words alone: which findings they have, and whose report is whose."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from custom_components.errors import InputError, none_read, tell_left_out
from custom_components.evaluation import figures
from custom_components.evaluation.controls import (
    hu_histogram,
    mean_and_maximum,
    patch_statistics,
    regression_scores,
    untrained,
)
from custom_components.evaluation.figures import spacing_of
from custom_components.evaluation.metrics import (
    auroc_table,
    best_f1_thresholds,
    both_values,
    classification_metrics,
    entry,
    mean_auroc,
    metric_rows,
    resample,
)
from custom_components.evaluation.report import write_predictions, write_report
from custom_components.evaluation.retrieval import (
    ReportScores,
    chance_label_metrics,
    cross_retrieval,
    label_metrics,
    label_queries,
    make_pool,
    report_key,
    volume_embedding,
)
from custom_components.losses import SentenceVolumeScore
from custom_components.run.inferers import ReadableLoader
from custom_components.simcrop import ENSEMBLES, VolumeEmbedder, ZeroShot
from custom_components.text import Prompts, encode_sentences, split_sentences
from monai.data import Dataset
from monai.networks import eval_mode
from torch import Tensor
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

AT_HALF = ("f1", "sensitivity", "specificity")  # metrics of a probability of 0.5, which one side alone has not
OWN, RANDOM = "simcrop", "random_encoder"


@dataclass
class _Encoded:
    """What is kept of V volumes that could be read: rows in the order of ``items``."""

    items: list[Mapping[str, Any]] = field(default_factory=list)
    # of the classes: [C] a volume, by each ensemble, also of the positive side ``alone``, and by ``random_encoder``
    scores: dict[str, list[Tensor]] = field(default_factory=dict)
    controls: dict[str, list[np.ndarray]] = field(default_factory=dict)
    # of the reports, per embedder: [R] a volume, and the volumes' embeddings in the space of sentences and their own
    reports: dict[str, list[Tensor]] = field(default_factory=dict)
    in_text_space: list[Tensor] = field(default_factory=list)
    embeddings: dict[str, list[Tensor]] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)  # name and reason of those that could not be read

    def of(self, name: str) -> np.ndarray:
        """Scores of the classes, ``[V, C]`` float64."""
        return torch.stack(self.scores[name]).double().numpy()

    def patients(self) -> list[str]:
        return [item["patient"] for item in self.items]

    def labels(self) -> np.ndarray:
        return np.stack([item["label"] for item in self.items])


@dataclass
class ZeroShotEvaluation:
    """Findings by prompts, and retrieval, on held-out volumes, with 95 % bootstrap intervals over patients.

    As far as the data set has what they take:

    - ``zero_shot``, from labels: :func:`custom_components.evaluation.metrics.classification_metrics` by the
      probabilities of :class:`custom_components.simcrop.ZeroShot`, the scores where a class has no negative prompt;
      F1 at the threshold that is best on the selection's volumes, never on these. ``controls``: AUROC of an untrained
      network, of the scores given to volumes that are shuffled, and of logistic regressions, learned with the
      selection's labels, on the HU histogram and on patch statistics. ``ensembles``: mean AUROC of each, on the
      selection and here; ``positive_alone``: AUROC without the negative prompts.
    - ``report_to_volume``, ``volume_to_report``: :func:`custom_components.evaluation.retrieval.cross_retrieval` by the
      mean sentence-volume score of a report's sentences (``simcrop``, ``random_encoder``), and by the cosine of mean
      sentence and mean patch (``embedding``).
    - ``volume_to_volume``: :func:`custom_components.evaluation.retrieval.label_metrics` by the class scores,
      standardised (``simcrop``), by the volume's embedding, less its mean over the volumes (``embedding``), by that of
      an untrained network, and by the HU histogram; beside ``chance``.

    Writes ``metrics.json``, ``metrics.csv``, ``predictions.csv`` and ``roc_pr.png`` to ``output_dir``.

    Args:
        score: of a sentence in a volume, as the weights were trained.
        dataset: items with ``image``, ``name``, ``patient`` and, for what they serve, ``label`` and ``findings``.
        selection: labelled items for thresholds, regressions and the choice of an ensemble; none of them a patient of
            ``dataset``. Empty for neither of them.
        prompts: class -> its prompts, in the order of the labels.
        ensemble: one of :data:`custom_components.simcrop.ENSEMBLES`, or ``selected``, the best on the selection.
        pool: see :func:`custom_components.evaluation.retrieval.make_pool`.
        name_pattern: of names; its group ``scan`` tells which volumes are of one scan.
        recall_at, precision_at: k of retrieval with reports, and among volumes.
        timeout_minutes: see :class:`custom_components.run.seeded.WatchedDataLoader`.

    Raises:
        InputError: ``ensemble`` is unknown, or to be selected on nothing; a patient stands on both sides.
    """

    network: VolumeEmbedder
    score: SentenceVolumeScore
    text_encoder: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    dataset: Dataset
    selection: Dataset
    prompts: Mapping[str, Prompts]
    output_dir: str | Path
    ensemble: str = "mean_score"
    pool: str = "all"
    name_pattern: str | None = None
    recall_at: Sequence[int] = (5, 10, 50, 100)
    precision_at: Sequence[int] = (1, 5, 10, 50)
    num_workers: int = 0
    timeout_minutes: float | None = None
    num_resamples: int = 1000
    seed: int = 42

    def __post_init__(self) -> None:
        if self.ensemble not in (*ENSEMBLES, "selected"):
            raise InputError(f"ensemble {self.ensemble!r} is unknown: choose {', '.join(ENSEMBLES)} or selected")
        if self.ensemble == "selected" and not len(self.selection):
            raise InputError(
                "ensemble is selected, and there are no volumes to select on: give selection_split, or choose "
                f"{', '.join(ENSEMBLES)}"
            )
        make_pool([], [], self.pool)
        shared = {item["patient"] for item in self.selection.data} & {item["patient"] for item in self.dataset.data}
        if shared:
            raise InputError(
                f"selection_split and test_split share {len(shared)} patients (such as {min(shared)}): thresholds must "
                "not be chosen on the test; name another selection_split, or null for none"
            )

    @torch.inference_mode()
    def __call__(self) -> dict[str, Any]:
        """Evaluate, print the table, write it; returns what ``metrics.json`` holds.

        Raises:
            InputError: volumes could not be read, once all else is done.
        """
        torch.manual_seed(self.seed)
        self.columns = self._known_classes()
        self.classes = [list(self.prompts)[column] for column in self.columns]
        self._check_selection()
        self._prepare()
        with eval_mode(self.network):
            chosen, test = _Encoded(), self._encode(self.dataset, "held-out volumes", held_out=True)
            if not test.items:
                raise none_read(len(self.dataset), test.failures)
            if self.classes and len(self.selection):
                chosen = self._encode(self.selection, "volumes to select on", held_out=False)
            elif self.classes:
                logger.info("no volumes to select on: no thresholds, and no regressions beside the scores")
        failures = test.failures + chosen.failures
        metrics = {
            "seed": self.seed,
            "volumes": len(test.items),
            "patients": len(set(test.patients())),
            "selection_volumes": len(chosen.items),
            "unreadable": [name for name, _ in failures],
            "score": asdict(self.score),
        }
        values = None
        if self.classes and both_values(test.labels()[:, self.columns]).any():
            values, metrics["zero_shot"] = self._presence(test, chosen)
        elif self.classes:
            logger.warning("no zero-shot figures: no class has both label values among %d volumes", len(test.items))
        ensemble = metrics.get("zero_shot", {}).get("ensemble", ENSEMBLES[0])
        metrics |= self._report_retrieval(test) | self._label_retrieval(test, ensemble)
        rows = [("task", "of", "metric", "value", "low", "high"), *_csv_rows(metrics)]
        write_report(self.output_dir, metrics, rows, table_rows(metrics), _notes(metrics))
        if values is not None:
            truth, folder = test.labels()[:, self.columns], Path(self.output_dir)
            write_predictions(folder / "predictions.csv", test.items, self.classes, truth, values)
            measured = metrics["zero_shot"]["per_class"]
            figures.save(folder / "roc_pr.png", figures.roc_and_pr_curves, truth, values, self.classes, measured)
        tell_left_out(failures)
        return metrics

    def _known_classes(self) -> np.ndarray:
        """Which of the prompts' classes the labels of all volumes tell: their columns."""
        labels = [item.get("label") for item in (*self.dataset.data, *self.selection.data)]
        if any(label is None for label in labels):
            logger.warning("no zero-shot figures: the data set has no labels")
            return np.array([], int)
        known = ~np.isnan(np.stack(labels)).any(0)
        if absent := [name for name, there in zip(self.prompts, known, strict=True) if not there]:
            logger.warning("no zero-shot figures of %s: the labels have no such column", ", ".join(absent))
        return np.flatnonzero(known)

    def _check_selection(self) -> None:
        """Raise an InputError, before a volume is read, if there is nothing by which an ensemble could be selected."""
        if self.ensemble == "selected":
            labels = [item["label"][self.columns] for item in self.selection.data] if self.classes else []
            if not labels or not both_values(np.stack(labels)).any():
                raise InputError(
                    "ensemble is selected, and no class has both label values among the volumes to select on: raise "
                    f"selection_volumes, or choose {', '.join(ENSEMBLES)}"
                )

    def _prepare(self) -> None:
        """Encode all sentences, once for each network."""
        prompts = {name: self.prompts[name] for name in self.classes}
        self.told = {ensemble: ZeroShot(prompts, self.score, ensemble) for ensemble in ENSEMBLES}
        reports = [split_sentences(item.get("findings", "")) for item in self.dataset.data]
        self.report_row: dict[frozenset[int], int] = {}
        distinct = []
        for report in filter(None, reports):
            if report_key(report) not in self.report_row:
                self.report_row[report_key(report)] = len(distinct)
                distinct.append(report)
        said = list(dict.fromkeys(sentence for report in distinct for sentence in report))
        self.embedders = {OWN: self.network, RANDOM: untrained(self.network)}
        self.prompt_features, self.report_scores = {}, {}
        for name, embedder in self.embedders.items():
            embedder.eval()

            def encode(sentences: Sequence[str], embedder: VolumeEmbedder = embedder) -> Tensor:
                return encode_sentences(sentences, embedder.aligner, self.text_encoder, self.tokenizer)

            if self.classes:
                self.prompt_features[name] = encode(self.told["mean_score"].sentences)
            if len(distinct) > 1:
                self.report_scores[name] = ReportScores(distinct, said, encode(said), self.score)
        if not self.classes and not self.report_scores:
            raise InputError(
                "the data set has neither labels of the classes nor reports that differ: nothing to ask of"
            )

    def _encode(self, dataset: Dataset, description: str, held_out: bool) -> _Encoded:
        """Read a data set once, and keep of each volume what the metrics take."""
        found = _Encoded()
        device = next(self.network.parameters()).device
        items = {item["name"]: item for item in dataset.data}
        loader = ReadableLoader(dataset, self.num_workers, description, self.timeout_minutes)
        statistics = None
        for batch in loader:
            image = batch["image"]
            volume = torch.as_tensor(image.as_tensor() if hasattr(image, "as_tensor") else image).to(device)
            if statistics is None:
                statistics = patch_statistics(self.network.encoder, spacing_of(image[0])).to(device)
            found.items.append(items[batch["name"][0]])
            kept = {
                "hu_histogram": hu_histogram(volume.cpu()),
                "raw_statistics": mean_and_maximum(statistics, volume)[0],
            }
            for name, values in kept.items():
                found.controls.setdefault(name, []).append(np.asarray(torch.as_tensor(values).cpu()))
            for name, embedder in self.embedders.items() if held_out else [(OWN, self.network)]:
                patches, embedding = embedder.patches_and_embedding(volume)
                for key, scores in self._class_scores(name, patches).items():
                    found.scores.setdefault(key, []).append(scores.cpu())
                if held_out:
                    found.embeddings.setdefault(name, []).append(embedding[0].float().cpu())
                    if name in self.report_scores:
                        found.reports.setdefault(name, []).append(self.report_scores[name](patches)[:, 0])
                        if name == OWN:
                            found.in_text_space.append(volume_embedding(patches)[0].cpu())
        found.failures = loader.failures
        return found

    def _class_scores(self, embedder: str, patches: Tensor) -> dict[str, Tensor]:
        """Scores ``[C]`` of one volume, by what they are the scores of."""
        if not self.classes:
            return {}
        features = self.prompt_features[embedder]
        prefix = "" if embedder == OWN else f"{embedder} "
        found = {}
        for ensemble, told in self.told.items():
            found[prefix + ensemble], found[f"{prefix}{ensemble} alone"] = told.sides(patches, features)
        return {name: scores[:, 0] for name, scores in found.items()}

    # findings

    def _presence(self, test: _Encoded, chosen: _Encoded) -> tuple[np.ndarray, dict[str, Any]]:
        """Values by which volumes are ordered, ``[V, C]``, and the metrics of all."""
        truth, weights = test.labels()[:, self.columns], resample(test.patients(), self.num_resamples, self.seed)
        chosen_truth = chosen.labels()[:, self.columns] if chosen.items else None

        def mean(of: _Encoded, labels: np.ndarray | None, ensemble: str) -> float | None:
            if labels is None or not both_values(labels).any():
                return None
            return mean_auroc(torch.from_numpy(of.of(ensemble)), torch.from_numpy(labels))

        ensembles = {e: {"selection": mean(chosen, chosen_truth, e), "test": mean(test, truth, e)} for e in ENSEMBLES}
        ensemble = self.ensemble
        if ensemble == "selected":
            ensemble = max(ENSEMBLES, key=lambda name: ensembles[name]["selection"] or 0.0)
        two_sided = np.array([bool(self.prompts[name].negative) for name in self.classes])

        def values_of(encoded: _Encoded) -> np.ndarray:
            scores = encoded.of(ensemble)
            return np.where(two_sided, 1 / (1 + np.exp(-scores / self.score.temperature)), scores)

        values, thresholds = values_of(test), None
        if chosen_truth is not None:
            thresholds = best_f1_thresholds(chosen_truth, values_of(chosen))
            if single := [n for n, both in zip(self.classes, both_values(chosen_truth), strict=True) if not both]:
                logger.warning("no threshold for %s: one label value on the selection; 0.5 is taken", ", ".join(single))
        options = (self.classes, test.patients(), thresholds, False, self.num_resamples, self.seed)
        metrics = {
            "ensemble": ensemble,
            "prompts": {name: self.prompts[name]._asdict() for name in self.classes},
            **classification_metrics(truth, values, *options),
        }
        if not two_sided.all():
            del metrics["micro"]  # of values on different scales
            for name, sided in zip(self.classes, two_sided, strict=True):
                for metric in AT_HALF if not sided and name in metrics["per_class"] else ():
                    del metrics["per_class"][name][metric]
            for metric in AT_HALF:
                del metrics["macro"][metric]

        own, own_means = auroc_table(truth, values, self.classes, weights)
        order = np.random.RandomState(self.seed).permutation(len(values))
        contenders = {RANDOM: test.of(f"{RANDOM} {ensemble}"), "shuffled": values[order]}
        for control, features in test.controls.items() if chosen_truth is not None else ():
            learned = np.stack(chosen.controls[control])
            contenders[control] = regression_scores(learned, chosen_truth, np.stack(features))
        if two_sided.any():
            contenders["positive_alone"] = test.of(f"{ensemble} alone")
        metrics["ensembles"], metrics["controls"] = ensembles, {}
        for name, scores in contenders.items():
            table, means = auroc_table(truth, scores, self.classes, weights)
            metrics["controls"][name] = table | {"gain": entry(own["mean"] - table["mean"], own_means - means)}
        return values, metrics

    # retrieval

    def _report_retrieval(self, test: _Encoded) -> dict[str, Any]:
        """``report_to_volume`` and ``volume_to_report``; nothing where fewer than two reports differ."""
        sentences = [split_sentences(item.get("findings", "")) for item in test.items]
        pool = make_pool(sentences, [self._scan(item["name"]) for item in test.items], self.pool)
        if pool is None:
            return {}
        rows = [self.report_row[report_key(report)] for report in pool.reports]
        tables = {name: torch.stack(columns, 1)[rows][:, pool.volumes] for name, columns in test.reports.items()}
        volumes = torch.stack(test.in_text_space)[pool.volumes]
        tables["embedding"] = self.report_scores[OWN].embeddings()[rows] @ volumes.T
        size = {"pool": self.pool, "volumes": len(pool.volumes), "reports": len(pool.reports)}
        patients = np.array(test.patients())[pool.volumes]
        sides = {
            "report_to_volume": (tables, pool.relevant, patients[pool.report_volume]),
            "volume_to_report": ({name: table.T for name, table in tables.items()}, pool.relevant.T, patients),
        }
        metrics = {}
        for task, (scored, relevant, owners) in sides.items():
            weights = resample(owners, self.num_resamples, self.seed)
            metrics[task] = size | cross_retrieval(scored, relevant, self.recall_at, weights, self.seed)
        return metrics

    def _label_retrieval(self, test: _Encoded, ensemble: str) -> dict[str, Any]:
        """``volume_to_volume``; nothing without labels, or of one patient alone."""
        patients = np.array(test.patients())
        labels = test.labels()[:, self.columns].astype(int) if self.classes else np.zeros((len(patients), 0))
        queries = label_queries(labels)
        if not len(queries) or len(set(patients)) < 2:
            return {}
        scores = test.of(ensemble)
        described = {
            OWN: scores / np.maximum(scores.std(0), 1e-9),
            "embedding": torch.stack(test.embeddings[OWN]).numpy(),
            RANDOM: torch.stack(test.embeddings[RANDOM]).numpy(),
            "hu_histogram": np.stack(test.controls["hu_histogram"]),
        }
        weights = resample(patients[queries], self.num_resamples, self.seed)
        found: dict[str, Any] = {"volumes": len(labels), "queries": len(queries)}
        for name, features in described.items():
            centred = torch.from_numpy(features - features.mean(0))
            found[name] = label_metrics(centred, labels, patients, self.precision_at, weights)
        return {"volume_to_volume": found | {"chance": chance_label_metrics(labels, patients, self.precision_at)}}

    def _scan(self, name: str) -> str:
        """The scan that a volume is a reconstruction of; itself where its name does not tell."""
        match = re.fullmatch(self.name_pattern, name.removesuffix(".nii.gz")) if self.name_pattern else None
        return (match.groupdict().get("scan") if match else None) or name


def _text(found: Mapping[str, float | None] | float | None) -> str:
    """A value with its interval, where it has one."""
    if not isinstance(found, Mapping):
        return "-" if found is None else f"{found:.3f}"
    if found["value"] is None:
        return "-"
    interval = "" if found["low"] is None else f" ({found['low']:.3f} to {found['high']:.3f})"
    return f"{found['value']:.3f}{interval}"


def table_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The metrics as rows of text: metric, of what, value with its interval, and what stands beside it."""
    rows = [("metric", "of", "simcrop", "beside")]
    if presence := metrics.get("zero_shot"):
        for name, found in (presence["per_class"] | {"macro": presence["macro"]}).items():
            controls = {
                control: table["mean"] if name == "macro" else table["per_class"][name]["value"]
                for control, table in presence["controls"].items()
            }
            others = {"average precision": "average_precision", "F1": "f1_at_threshold"}
            told = {title: found[metric]["value"] for title, metric in others.items() if metric in found}
            rows.append(("zero-shot AUROC", name, _text(found["auroc"]), _beside(told | controls)))
    for task in ("report_to_volume", "volume_to_report", "volume_to_volume"):
        if found := metrics.get(task):
            for metric, value in found[OWN].items():
                controls = {c: v[metric] for c, v in found.items() if isinstance(v, Mapping) and c != OWN}
                rows.append((task, metric, _text(value), _beside(controls)))
    return rows


def _beside(controls: Mapping[str, Any]) -> str:
    values = {name: value["value"] if isinstance(value, Mapping) else value for name, value in controls.items()}
    return ", ".join(f"{name} {_text(value)}" for name, value in values.items())


def _notes(metrics: Mapping[str, Any]) -> list[str]:
    notes = []
    if presence := metrics.get("zero_shot"):
        notes.append(
            f"prompts joined by {presence['ensemble']}; thresholds and regressions from "
            f"{metrics['selection_volumes']} other volumes"
        )
        if presence["left_out"]:
            notes.append(f"left out, since the list has a single label value: {', '.join(presence['left_out'])}")
    if found := metrics.get("report_to_volume"):
        notes.append(f"retrieval among {found['volumes']} volumes and {found['reports']} reports, pool {found['pool']}")
    return notes


def _csv_rows(metrics: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """The metrics as rows: task, of what, metric, value, low, high."""

    def row(task: str, of: str, metric: str, value: Mapping[str, Any] | float | None) -> tuple[Any, ...]:
        return (task, of, metric, *(value.values() if isinstance(value, Mapping) else (value, None, None)))

    rows = []
    if presence := metrics.get("zero_shot"):
        rows += [("zero_shot", *found) for found in metric_rows({"micro": {}, **presence})]
        for control, table in presence["controls"].items():
            rows += [row("zero_shot", name, f"auroc, {control}", found) for name, found in table["per_class"].items()]
            mean = {"value": table["mean"], "low": table["low"], "high": table["high"]}
            rows.append(row("zero_shot", "macro", f"auroc, {control}", mean))
            rows.append(row("zero_shot", "macro", f"auroc minus {control}", table["gain"]))
    for task in ("report_to_volume", "volume_to_report", "volume_to_volume"):
        for contender, found in metrics.get(task, {}).items():
            for metric, value in found.items() if isinstance(found, Mapping) else ():
                rows.append(row(task, contender, metric, value))
    return rows
