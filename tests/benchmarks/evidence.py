"""What each part of the pre-training buys: an ablation through the bundles' own configs and command line.

    python -m tests.benchmarks.evidence --out ../evidence --docs bundles/pretrain/docs/evidence.md

Every variant is a run of `bundles/pretrain` on phantoms, evaluated on its held-out volumes, then a probe of its encoder
by `bundles/classify` and, with `--stages pretrain probe segment`, a fine-tuning by `bundles/segment`. Each run of a
stage leaves a result file, so that the same command goes on where it was stopped; `--variants`, `--seeds` and
`--stages` choose some. Tables and figures are made of all results that the output folder holds.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from custom_components.evaluation.report import read_metrics
from custom_components.files import replacing
from matplotlib.figure import Figure
from monai.bundle import ConfigParser
from scipy import stats
from tqdm import tqdm

REPOSITORY = Path(__file__).parents[2]
BUNDLES = REPOSITORY / "bundles"
OVERLAYS = ("train.json", "recommended.json", "demo.json")


def published(*names: str) -> dict[str, Any]:
    """These keys as train.json has them."""
    config = json.loads((BUNDLES / "pretrain" / "configs" / "train.json").read_text())
    return {name: config[name] for name in names}


def without(*losses: str) -> dict[str, float]:
    return {f"loss_weights#{name}": 0.0 for name in losses}


@dataclass(frozen=True)
class Variant:
    """One way to pre-train: the keys that it changes of the recommended recipe, at the size of the demo."""

    title: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    shuffled: bool = False  # whether the training volumes' reports are dealt out anew
    supervised: bool = False  # whether labels teach the encoder, by classify's finetune.json


# a learning rate of 0 leaves the weights as they were drawn
UNTRAINED = {"learning_rate": 0.0, "max_epochs": 1, "warmup_epochs": 0}
PUBLISHED_INPUT = published("hu_bins", "scale_space", "statistics_mlp_dim")
PUBLISHED_ALIGNMENT = published(
    "sentence_context",
    "negatives",
    "align_pool",
    "align_layer",
    "align_ratio",
    "encode_ratio",
    "patch_projection",
    "loss_weights",
)
PUBLISHED = {**PUBLISHED_INPUT, **PUBLISHED_ALIGNMENT, **published("mask_ratio", "max_norm", "block_learning_rate")}
ALIGNED = without("report", "instance")
REFERENCE = "recommended"
VARIANTS = {
    REFERENCE: Variant("recommended"),
    "random": Variant("random encoder", UNTRAINED),
    "random_voxels": Variant("random encoder, published network", {**PUBLISHED, **UNTRAINED}),
    "mim": Variant("masked modelling (MIM) alone", without("alignment", "report", "instance")),
    "mim_report": Variant("MIM + report", without("alignment", "instance")),
    "mim_align_report": Variant("MIM + alignment, negatives: report", {**ALIGNED, "negatives": "report"}),
    "mim_align_volume": Variant("MIM + alignment, negatives: volume", ALIGNED),
    "mim_align_both": Variant("MIM + alignment, negatives: both", {**ALIGNED, "negatives": "both"}),
    "align_alone": Variant("alignment alone", without("volume", "report", "instance")),
    "topk_mean": Variant("pooling: top-K mean, K = 32", {"align_pool": "topk_mean"}),
    "topk_mean_4": Variant("pooling: top-K mean, K = 4", {"align_pool": "topk_mean", "top_k": 4}),
    "raw_voxels": Variant("raw voxels as input", published("hu_bins", "scale_space")),
    "no_scale_space": Variant("without scale space", published("scale_space")),
    "no_statistics_mlp": Variant("without the statistics' MLP", published("statistics_mlp_dim")),
    "mlp_projection": Variant("projection: mlp", published("patch_projection")),
    "no_align_ratio": Variant("visible patches aligned", published("align_ratio", "encode_ratio")),
    "no_align_layer": Variant("final tokens aligned", published("align_layer", "align_ratio", "encode_ratio")),
    "no_encode_ratio": Variant("all volumes encoded", published("encode_ratio")),
    "one_rate": Variant("one learning rate for all", published("block_learning_rate")),
    "no_instance": Variant("without the instance level", without("instance")),
    "report_context": Variant("sentences read in their report", published("sentence_context")),
    "no_report": Variant("without the report loss", without("report")),
    "no_clipping": Variant("without gradient clipping", published("max_norm")),
    # at the learning rate of the recommended recipe's blocks: what learns faster there is not in this network
    "published": Variant("published recipe", PUBLISHED | {"learning_rate": 0.0012}),
    "published_losses": Variant("published losses on our input", PUBLISHED_ALIGNMENT),
    "epochs_4": Variant("recommended, 4 epochs", {"max_epochs": 4}),
    "epochs_8": Variant("recommended, 8 epochs", {"max_epochs": 8}),
    "supervised": Variant("supervised ceiling, all labels", supervised=True),
    "no_signal": Variant("recommended, reports shuffled", shuffled=True),
}
# what runs unless --variants names others, or all
CORE = (
    REFERENCE,
    "random",
    "published",
    "published_losses",
    "mim",
    "mim_report",
    "mim_align_report",
    "mim_align_volume",
    "mim_align_both",
    "topk_mean",
    "raw_voxels",
    "no_align_layer",
    "one_rate",
    "no_instance",
    "supervised",
)
CURVE = ("epochs_4", "epochs_8", REFERENCE)  # variants whose budget makes the learning curves

STAGES = ("pretrain", "probe", "segment")
FRACTIONS = (0.01, 0.1, 1.0)


def configured(bundle: str, overlays: Sequence[str], keys: Mapping[str, Any]) -> ConfigParser:
    """A bundle's config of these overlays and keys, not yet parsed."""
    parser = ConfigParser()
    parser.read_config([str(BUNDLES / bundle / "configs" / name) for name in overlays])
    parser["bundle_root"] = str(BUNDLES / bundle)
    parser.update(dict(keys))
    return parser


def on_command_line(value: Any) -> str:
    """A key's value as `monai.bundle run` reads it; a plain None would be dropped."""
    return "$None" if value is None else str(value)


@dataclass(frozen=True, eq=False)
class Run:
    """One stage of a variant under one seed: a command, and the result that it leaves."""

    variant: str
    seed: int
    stage: str
    folder: Path
    bundle: str
    overlays: Sequence[str]
    keys: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.variant} seed {self.seed} {self.stage}"

    @property
    def result_file(self) -> Path:
        return self.folder / "result.json"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def command(self) -> list[str]:
        files = str([f"configs/{name}" for name in self.overlays])
        given = [part for key, value in self.keys.items() for part in (f"--{key}", on_command_line(value))]
        return [sys.executable, "-m", "monai.bundle", "run", "--config_file", files, *given]

    def settings(self) -> str:
        """A hash of the config and the keys, wherever the repository is: a result of others is not this run's."""
        config = configured(self.bundle, self.overlays, self.keys).config
        text = json.dumps(config, sort_keys=True, default=str).replace(str(REPOSITORY), "")
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def epochs(self) -> int | None:
        """Of a pre-training."""
        if self.stage != "pretrain":
            return None
        return configured(self.bundle, self.overlays, self.keys).get_parsed_content("max_epochs")

    def result(self) -> dict[str, Any] | None:
        return json.loads(self.result_file.read_text()) if self.result_file.is_file() else None

    def __call__(self, threads: int | None) -> str | None:
        """Run unless the result is there; returns what went wrong, or None."""
        if self.result() is not None:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        start = time.monotonic()
        with open(self.log, "w") as log:
            done = subprocess.run(
                self.command(), cwd=BUNDLES / self.bundle, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        metrics = read_metrics(self.folder / "eval")
        if done.returncode or not metrics:
            lines = self.log.read_text(errors="replace").replace("\r", "\n").splitlines()
            return "\n".join([f"exit code {done.returncode}, {self.log}:", *lines[-8:]])
        content = {
            "variant": self.variant, "seed": self.seed, "stage": self.stage, "settings": self.settings(),
            "seconds": round(time.monotonic() - start, 1), "epochs": self.epochs(), "command": self.command(),
            "metrics": metrics,
        }  # fmt: skip
        with replacing(self.result_file) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")
        for large in [*self.folder.rglob("checkpoint*.pt"), self.folder / "features"]:
            shutil.rmtree(large) if large.is_dir() else large.unlink(missing_ok=True)
        return None


@dataclass
class Plan:
    """Which runs there are to be, on cohorts that all of them share.

    Args:
        num_train, num_valid: volumes of the cohort; None for the demo's.
        max_epochs: of every pre-training, without warm-up; None for what the configs and variants say.
        keys: stage -> keys that all its runs change besides.
    """

    out: Path
    cohort_seed: int = 42
    num_train: int | None = None
    num_valid: int | None = None
    max_epochs: int | None = None
    keys: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.out = Path(self.out).resolve()
        sizes = {"num_train": self.num_train, "num_valid": self.num_valid}
        source = {f"dataset_dir#{name}": size for name, size in sizes.items() if size is not None}
        source["dataset_dir#seed"] = self.cohort_seed
        parser = configured("pretrain", OVERLAYS, source)
        self.num_train, self.num_valid = (parser[f"dataset_dir#{name}"] for name in sizes)
        self.cohort = self.out / f"cohort_{self.cohort_seed}_{self.num_train}_{self.num_valid}"
        parser["dataset_dir#dataset_dir"] = str(self.cohort)
        self._source = parser

    def __str__(self) -> str:
        text = f"Cohort of seed {self.cohort_seed}: {self.num_train} volumes to train on, {self.num_valid} held out"
        changed = {"max_epochs": self.max_epochs} if self.max_epochs is not None else {}
        changed |= self.keys
        return f"{text}, {json.dumps(changed)}" if changed else text

    def write_cohorts(self, runs: Sequence[Run]) -> None:
        """Write what the runs share, before two of them would."""
        self._source.get_parsed_content("dataset_dir")
        for run in runs:
            if run.stage == "pretrain" and VARIANTS[run.variant].shuffled:
                deal_reports_anew(self.cohort, Path(run.keys["dataset_dir"]), run.seed)
        if segment := [run for run in runs if run.stage == "segment"]:
            configured("segment", segment[0].overlays, segment[0].keys).get_parsed_content("dataset_dir")

    def runs(self, variant: str, seed: int, stages: Sequence[str]) -> list[Run]:
        """The runs of a variant under a seed, each after what it needs."""
        makers = {"pretrain": self._pretrain, "probe": self._probe, "segment": self._segment}
        wanted = [stage for stage in makers if stage == "pretrain" or stage in stages]
        if VARIANTS[variant].supervised:
            makers, wanted = {"supervised": self._supervised}, ["supervised"]
        return [self._run(variant, seed, stage, *makers[stage](variant, seed)) for stage in wanted]

    def folder(self, variant: str, seed: int, stage: str) -> Path:
        return self.out / "runs" / variant / f"seed_{seed}" / stage

    def _run(self, variant: str, seed: int, stage: str, bundle: str, overlays: Sequence[str], keys: Mapping) -> Run:
        folder = self.folder(variant, seed, stage)
        own = {"seed": seed, "models_dir": str(folder / "models"), "output_dir": str(folder / "eval")}
        return Run(variant, seed, stage, folder, bundle, overlays, own | keys | dict(self.keys.get(stage, {})))

    def _pretrain_keys(self, variant: str, seed: int) -> dict[str, Any]:
        made = VARIANTS[variant]
        cohort = self.out / f"{self.cohort.name}_shuffled_{seed}" if made.shuffled else self.cohort
        keys = {"dataset_dir": str(cohort), **made.keys, **self.keys.get("pretrain", {})}
        if self.max_epochs is not None:
            keys |= {"max_epochs": self.max_epochs, "warmup_epochs": 0}
        return keys

    def _pretrain(self, variant: str, seed: int) -> tuple[str, Sequence[str], dict[str, Any]]:
        return "pretrain", OVERLAYS, self._pretrain_keys(variant, seed)

    def _encoder_keys(self, variant: str, seed: int) -> dict[str, Any]:
        """The keys that make classify's encoder the variant's, where no weights tell them."""
        parser = configured("pretrain", OVERLAYS, self._pretrain_keys(variant, seed))
        definition = configured("classify", ("train.json",), {})["encoder_def"].values()
        names = [value[1:] for value in definition if isinstance(value, str) and value.startswith("@")]
        return {name: parser.get_parsed_content(name) for name in names}

    def _probe(self, variant: str, seed: int) -> tuple[str, Sequence[str], dict[str, Any]]:
        keys = {
            "dataset_dir": str(self.cohort),
            "pretrained": str(self.folder(variant, seed, "pretrain") / "models" / "encoder.pt"),
            "features_dir": str(self.folder(variant, seed, "probe") / "features"),
            "fractions": list(FRACTIONS),
            "num_views": 1,
            "checkpoint_interval": 100,  # of a few steps each
            "run": ["$@comparison()"],
        }
        if variant != REFERENCE:  # the bundle's controls do not depend on the variant
            keys["contenders"] = {"simcrop": {}}
        return "classify", ("train.json", "demo.json"), keys

    def _supervised(self, variant: str, seed: int) -> tuple[str, Sequence[str], dict[str, Any]]:
        """From scratch, with the steps and batches of pre-training, and the learning rate of its blocks."""
        parser = configured("pretrain", OVERLAYS, self._pretrain_keys(variant, seed))
        names = ("batch_size", "max_epochs", "warmup_epochs", "block_learning_rate")
        batch, epochs, warmup, rate = (parser.get_parsed_content(name) for name in names)
        steps = math.ceil(self.num_train / batch)
        keys = {
            "dataset_dir": str(self.cohort),
            "pretrained": None,
            "max_steps": steps * epochs,
            "warmup_steps": steps * warmup,
            "batch_size": batch,
            "learning_rate": rate,
            "layer_decay": 1.0,
            "compare_after_training": False,
        }
        overlays = ("train.json", "demo.json", "finetune.json")
        return "classify", overlays, keys | self._encoder_keys(variant, seed)

    def _segment(self, variant: str, seed: int) -> tuple[str, Sequence[str], dict[str, Any]]:
        keys = {
            "dataset_dir#dataset_dir": str(self.out / "cohort_segment"),
            "pretrained": str(self.folder(variant, seed, "pretrain") / "models" / "encoder.pt"),
        }
        if variant != REFERENCE:  # from scratch is once enough
            keys["contenders"] = {"pretrained": {}}
        return "segment", ("train.json", "demo.json"), keys


def deal_reports_anew(cohort: Path, target: Path, seed: int) -> None:
    """A cohort whose training volumes have each other's reports, none its own: nothing is left to learn from them.

    Labels, masks and all that is held out stay as they are, so that every measure asks what it asks elsewhere.
    """
    if target.is_dir():
        return
    stage = target.with_name(f".{target.name}.partial")
    shutil.rmtree(stage, ignore_errors=True)
    reports = Path("dataset", "radiology_text_reports")
    shutil.copytree(cohort / reports, stage / reports)
    for entry in (cohort / "dataset").iterdir():
        if entry.name != reports.name:
            (stage / "dataset" / entry.name).symlink_to(entry.resolve())
    table = stage / reports / "train_reports.csv"
    with open(table, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    name = header.index("VolumeName")
    order = np.random.RandomState(seed).permutation(len(rows))
    dealt = [list(row) for row in rows]
    for giver, taker in zip(order, np.roll(order, 1), strict=True):  # one round through all: nobody keeps his own
        dealt[taker] = [rows[taker][i] if i == name else cell for i, cell in enumerate(rows[giver])]
    with open(table, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *dealt])
    stage.rename(target)


def refuse_other_settings(runs: Sequence[Run]) -> None:
    """End unless the results that are there were made with the same configs and keys."""
    other = [str(run.folder) for run in runs if (found := run.result()) and found["settings"] != run.settings()]
    if other:
        raise SystemExit(
            f"error: {len(other)} results were made with other configs or keys ({other[0]}, ...): remove them, "
            "or give another --out"
        )


def run_all(chains: Sequence[Sequence[Run]], jobs: int) -> dict[Run, str]:
    """Run chains side by side, the runs of one after each other; returns what failed, and why."""
    failures: dict[Run, str] = {}
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None
    todo = sum(run.result() is None for chain in chains for run in chain)
    seconds: list[float] = []
    lock, start = Lock(), time.monotonic()
    with tqdm(total=todo, desc="runs", unit="run") as bar:

        def follow(chain: Sequence[Run]) -> None:
            for run in chain:
                new = run.result() is None
                failure = run(threads)
                with lock:
                    if failure is not None:
                        failures[run] = failure
                        bar.write(f"{run}: failed")
                    elif new:
                        seconds.append(run.result()["seconds"])
                        left = (todo - len(seconds) - len(failures)) * np.mean(seconds) / jobs
                        bar.write(f"{run}: {seconds[-1] / 60:.1f} min, about {left / 60:.0f} min left")
                    bar.update(new)
                if failure is not None:
                    return

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(follow, chains))
    print(f"{len(seconds)} new runs in {(time.monotonic() - start) / 60:.1f} min")
    for run, failure in failures.items():
        print(f"\nfailed: {run}: {failure}", file=sys.stderr)
    return failures


def number(metrics: Mapping[str, Any], *path: str) -> float | None:
    """What stands at a place of a `metrics.json`; None where there is no number."""
    for key in path:
        metrics = metrics.get(key) if isinstance(metrics, Mapping) else None
    return float(metrics) if isinstance(metrics, (int, float)) and math.isfinite(metrics) else None


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are there."""
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


CONTROLS = ("random_encoder", "hu_histogram", "raw_statistics")
# what stands at a key of a table: measure, and its title
PRESENCE, HITS = "presence AUC", "hits minus shuffled"
LESIONS, TIME = "lesion Dice", "minutes"


def percent(fraction: float | str) -> str:
    return f"{float(fraction):.0%}".replace("%", " %")


def measures(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Measure -> value, of the metrics of a variant's stages under one seed; what a stage lacks is left out."""
    own, found = stages.get("pretrain", {}), {}
    presence = own.get("presence_auc", {})
    for name, entry in presence.items():
        found[f"{PRESENCE}: {name}"] = number(entry, "simcrop")
    found[PRESENCE] = mean([number(entry, "simcrop") for entry in presence.values()])
    for control in CONTROLS:
        found[f"{PRESENCE}, {control}"] = mean([number(entry, control) for entry in presence.values()])
    grounded = own.get("grounding", {})
    for name, entry in {**grounded.get("per_finding", {}), None: grounded}.items():
        title = HITS if name is None else f"{HITS}: {name}"
        found[title] = minus(number(entry, "hit"), number(entry, "hit_shuffled"))
    for key in ("hit", "hit_shuffled", "no_image_prior", "chance"):
        found[f"grounding, {key}"] = number(grounded, key)
    for key, title in (("side_specificity", "side"), ("level_specificity", "level")):
        found[title] = number(own, key, "simcrop")
        for control in ("random_encoder", "no_image_prior"):
            found[f"{title}, {control}"] = number(own, key, control)
    for key in ("recall@1", "recall@10", "median_rank"):
        for who, suffix in (("simcrop", ""), ("random_encoder", ", random_encoder"), ("chance", ", chance")):
            found[f"retrieval {key}{suffix}"] = number(own, "retrieval", who, key)
    for key in own:
        if key.endswith(("_cosine", "_effective_rank")):  # near 1: all patches, or all sentences, are alike
            found[key.replace("_", " ")] = number(own, key)
    found["masked-voxel MSE"] = number(own, "masked_voxel_mse", "simcrop")
    found["masked-voxel MSE, positional mean"] = number(own, "masked_voxel_mse", "baseline")
    found["masked-token accuracy"] = number(own, "masked_token_accuracy", "simcrop")
    found["masked-token accuracy, most frequent"] = number(own, "masked_token_accuracy", "baseline")
    for fraction, contenders in stages.get("probe", {}).get("auroc", {}).items():
        for name in contenders:
            suffix = "" if name == "simcrop" else f", {name}"
            found[f"probe {percent(fraction)}{suffix}"] = number(contenders, name, "mean")
    for contenders in stages.get("segment", {}).get("dice", {}).values():
        for name in contenders:
            suffix = "" if name == "pretrained" else f", {name}"
            found[f"{LESIONS}{suffix}"] = number(contenders, name, "groups", "lesions", "mean")
            found[f"organ Dice{suffix}"] = number(contenders, name, "groups", "organs", "mean")
    labelled = stages.get("supervised", {})
    for name, entry in labelled.get("per_class", {}).items():
        found[f"{PRESENCE}: {name}"] = number(entry, "auroc", "value")
    if labelled:
        found[PRESENCE] = number(labelled, "macro", "auroc", "value")
    return {name: value for name, value in found.items() if value is not None}


Results = dict[str, dict[int, dict[str, float]]]  # variant -> seed -> measure -> value


def read_results(out: Path) -> Results:
    """All results below a folder, variants in the order of VARIANTS; `minutes` are those of all stages."""
    stages: dict[tuple[str, int], dict[str, Any]] = {}
    minutes: dict[tuple[str, int], float] = {}
    for file in sorted(Path(out, "runs").glob("*/*/*/result.json")):
        content = json.loads(file.read_text())
        run = content["variant"], content["seed"]
        stages.setdefault(run, {})[content["stage"]] = content["metrics"]
        minutes[run] = minutes.get(run, 0.0) + content["seconds"] / 60
    results: Results = {}
    for variant in VARIANTS:
        for run in sorted(run for run in stages if run[0] == variant):
            results.setdefault(variant, {})[run[1]] = measures(stages[run]) | {TIME: minutes[run]}
    return results


def values_of(seeds: Mapping[int, Mapping[str, float]], measure: str) -> dict[int, float]:
    return {seed: found[measure] for seed, found in seeds.items() if measure in found}


def differences(results: Results, variant: str, measure: str) -> list[float]:
    """The variant minus the recommended recipe, under each seed that both have."""
    own, reference = (values_of(results.get(name, {}), measure) for name in (variant, REFERENCE))
    return [own[seed] - reference[seed] for seed in own if seed in reference]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """`mean`, `lowest`, `highest`, and `half_width` of the 95 % interval of the mean by Student's t; None of one."""
    wide = (
        stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
    )
    return {
        "mean": float(np.mean(values)),
        "lowest": float(min(values)),
        "highest": float(max(values)),
        "half_width": None if wide is None else float(wide),
        "seeds": len(values),
    }


def cell(values: Sequence[float], signed: bool = False) -> str:
    """Mean and range, and of differences the 95 % interval's half width."""
    if not values:
        return ""
    found = summary(values)
    sign = "+" if signed else ""
    digits = 1 if abs(found["mean"]) >= 10 else 3
    mean, low, high = (f"{found[key]:{sign}.{digits}f}" for key in ("mean", "lowest", "highest"))
    if len(values) == 1:
        return mean
    interval = f" ± {found['half_width']:.{digits}f}" if signed else ""
    return f"{mean}{interval} ({low} to {high})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, without the columns in which no row has anything."""
    kept = [i for i in range(len(header)) if i == 0 or any(row[i] for row in rows)]
    lines = [[line[i] for i in kept] for line in (header, ["---"] * len(header), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_variant(results: Results, columns: Mapping[str, str], cells: Callable[[str, str], str]) -> str:
    """A table with a row per variant, and columns title -> measure."""
    rows = [
        [VARIANTS[variant].title, *(cells(variant, measure) for measure in columns.values())] for variant in results
    ]
    return table(["", *columns], [row for row in rows if any(row[1:])])


LANGUAGE = {
    name: name
    for name in (PRESENCE, HITS, "side", "level")
    + ("retrieval recall@1", "retrieval recall@10", "patch patch cosine", "patch effective rank")
}
FEATURES = {f"probe {percent(fraction)}": f"probe {percent(fraction)}" for fraction in FRACTIONS}
FEATURES |= {name: name for name in (LESIONS, "organ Dice", "masked-voxel MSE", "masked-token accuracy")}
PAIRED = {name: name for name in (PRESENCE, HITS, "side", "level", "probe 10 %", LESIONS)}
BARS = (PRESENCE, HITS, "probe 10 %", LESIONS)
CHANCE = {PRESENCE: 0.5, HITS: 0.0, "probe 10 %": 0.5}


def markdown(results: Results, made_of: str, figures: Mapping[str, Path], folder: Path) -> str:
    """The tables, and links to the figures."""

    def absolute(variant: str, measure: str) -> str:
        return cell(list(values_of(results[variant], measure).values()))

    def paired(variant: str, measure: str) -> str:
        return "" if variant == REFERENCE else cell(differences(results, variant, measure), signed=True)

    every = {measure for seeds in results.values() for found in seeds.values() for measure in found}
    seeds = sorted({seed for found in results.values() for seed in found})
    reference = results.get(REFERENCE, {})
    controls = sorted(name for name in every if ", " in name)
    one = len(seeds) == 1
    of_seeds = f"seed of training {seeds[0]}: no range" if one else f"seeds of training {', '.join(map(str, seeds))}"
    parts = [
        f"{made_of}; {of_seeds}." + ("" if one else " Mean, and in brackets the range over seeds."),
        "#### What the sentences know",
        by_variant(results, LANGUAGE, absolute),
        "#### What the encoder knows",
        by_variant(results, FEATURES, absolute),
    ]
    if reference and len(results) > 1:
        parts += ["#### Minus the recommended recipe" + ("" if one else ", paired by seed")]
        told = (
            "±: half the width of the 95 % interval of the mean (Student's t over seeds). Without it: one seed alone."
        )
        parts += [] if one else [told]
        parts += [by_variant(results, PAIRED, paired)]
    for caption, path in figures.items():
        parts.append(f"![{caption}]({os.path.relpath(path, folder)})")
    parts += ["<details>\n<summary>By finding; controls; time</summary>"]
    for title in (PRESENCE, HITS):
        names = list(
            dict.fromkeys(name for found in reference.values() for name in found if name.startswith(f"{title}: "))
        )
        if names:
            columns = {name.removeprefix(f"{title}: "): name for name in names}
            parts += [f"#### {title[0].upper()}{title[1:]}, by finding", by_variant(results, columns, absolute)]
    if controls and reference:
        rows = [[name, cell(list(values_of(reference, name).values()))] for name in controls]
        parts += ["#### Controls beside the recommended recipe", table(["", "value"], [row for row in rows if row[1]])]
    parts += ["#### Time", by_variant(results, {"minutes for a run": TIME}, absolute), "</details>"]
    return "\n\n".join(parts) + "\n"


def between_markers(document: str, name: str, content: str) -> str:
    """A document with what stands between the two markers of this name replaced."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    head, _, rest = document.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise SystemExit(
            f"error: the document given as --docs lacks {begin} or, behind it, {end}: put them where the tables go"
        )
    return f"{head}{begin}\n{content}{end}{tail}"


# Okabe and Ito's, which colour-blind readers tell apart
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vPX"


def bars(results: Results, path: Path) -> bool:
    """A panel per measure that compares variants, a bar per variant, from chance to the mean, a dot for each seed.

    Returns whether there was any such measure, and so a figure.
    """
    having = {name: sum(bool(values_of(seeds, name)) for seeds in results.values()) for name in BARS}
    shown = [name for name in BARS if having[name] >= min(2, len(results))]
    if not shown:
        return False
    figure = Figure(figsize=(3.2 + 3.0 * len(shown), 1.2 + 0.26 * len(results)), layout="constrained")
    variants = list(results)[::-1]
    for axes, measure in zip(figure.subplots(1, len(shown), squeeze=False, sharey=True)[0], shown, strict=True):
        for place, variant in enumerate(variants):
            if values := list(values_of(results[variant], measure).values()):
                colour = COLOURS[1] if variant == REFERENCE else COLOURS[5]
                start = CHANCE.get(measure, 0.0)
                axes.barh(place, np.mean(values) - start, left=start, color=colour, alpha=0.75, height=0.7)
                axes.plot(values, [place] * len(values), "o", color="black", markersize=3)
        if measure in CHANCE:
            axes.axvline(CHANCE[measure], color="grey", linestyle=":", label="chance")
            axes.legend(fontsize=8, frameon=False, loc="lower right")
        axes.set_xlabel(measure)
        axes.grid(axis="x", alpha=0.3)
        axes.set_yticks(range(len(variants)), [VARIANTS[variant].title for variant in variants], fontsize=8)
    figure.savefig(path, dpi=120)
    return True


def learning_curves(results: Results, epochs: Mapping[str, int], path: Path) -> None:
    """Presence AUC and hits minus shuffled of each finding over epochs, each budget a run of its own."""
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    measured = [name for found in results[REFERENCE].values() for name in found]
    findings = dict.fromkeys(
        name.removeprefix(f"{PRESENCE}: ") for name in measured if name.startswith(f"{PRESENCE}: ")
    )
    styles = [{"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]} for i in range(len(findings))]
    for axes, title in zip(panels, (PRESENCE, HITS), strict=True):
        for finding, style in zip(findings, styles, strict=True):
            points = [
                (epochs[variant], value)
                for variant in epochs
                for value in values_of(results[variant], f"{title}: {finding}").values()
            ]
            axes.plot(*np.reshape(points, (-1, 2)).T, linestyle="", markersize=4, alpha=0.5, **style)
            budgets = sorted({budget for budget, _ in points})
            means = [np.mean([value for at, value in points if at == budget]) for budget in budgets]
            axes.plot(budgets, means, label=finding, **style)
        axes.axhline(CHANCE[title], color="grey", linestyle=":", label="chance")
        axes.set(xlabel="epochs of training", ylabel=title, xticks=sorted(set(epochs.values())))
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def report(out: Path, made_of: str, docs: Path | None = None, name: str = "evidence") -> None:
    """Write `evidence.json`, `evidence.csv`, `evidence.md` and the figures to `out`, of all results that it holds.

    `made_of` says what the runs were; `docs` is a document with the two markers of `name`, which gets the tables too;
    the figures then go to its folder, with names that begin with `name`.
    """
    results = read_results(out)
    if not results:
        raise SystemExit(f"error: {out} holds no result yet")
    paired = {
        variant: {
            measure: summary(found)
            for measure in dict.fromkeys(name for seed in seeds.values() for name in seed)
            if (found := differences(results, variant, measure))
        }
        for variant, seeds in results.items()
        if variant != REFERENCE
    }
    content = {"made_of": made_of, "values": results, "minus_recommended": paired}
    with replacing(out / "evidence.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    with replacing(out / "evidence.csv") as temporary, open(temporary, "w", newline="") as file:
        rows = [
            (variant, seed, measure, value)
            for variant, seeds in results.items()
            for seed, found in seeds.items()
            for measure, value in found.items()
        ]
        csv.writer(file).writerows([("variant", "seed", "measure", "value"), *rows])

    folder = out if docs is None else docs.parent
    figures: dict[str, Path] = {}
    if set(results) - set(CURVE) and bars(results, path := folder / f"{name}_ablation.png"):
        figures["ablation: bars from chance to the mean of seeds, a dot for each seed"] = path
    curve = {variant: epochs for variant in CURVE if variant in results and (epochs := epochs_of(out, variant))}
    if REFERENCE in curve and len(curve) > 1:
        figures["learning curves by finding"] = folder / f"{name}_curves.png"
        learning_curves(results, curve, figures["learning curves by finding"])
    (out / "evidence.md").write_text(markdown(results, made_of, figures, out))
    if docs is not None:
        with replacing(docs) as temporary:
            temporary.write_text(
                between_markers(docs.read_text(), name, markdown(results, made_of, figures, docs.parent))
            )
    print(f"written: {out / 'evidence.json'}, .csv, .md" + (f"; {docs}" if docs else ""))


def epochs_of(out: Path, variant: str) -> int | None:
    """How many epochs a variant was trained for."""
    for file in sorted(Path(out, "runs", variant).glob("*/pretrain/result.json")):
        return json.loads(file.read_text())["epochs"]
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("evidence"), help="folder of cohorts, runs and results")
    parser.add_argument(
        "--variants", nargs="+", choices=[*VARIANTS, "all"], metavar="NAME",
        help="some of those that --list names, or all; without it the main ones",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of training; the cohort is shared")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=["pretrain", "probe"])
    parser.add_argument("--cohort_seed", type=int, default=42, help="of the phantoms")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, which share the cores")
    parser.add_argument("--docs", type=Path, help="document whose tables, between two markers, are replaced")
    parser.add_argument("--name", default="evidence", help="of the markers, <!-- NAME: begin -->, and of the figures")
    parser.add_argument("--list", action="store_true", help="list variants and what is done, and run nothing")
    parser.add_argument("--num_train", type=int, help="volumes to train on; the demo's without it")
    parser.add_argument("--num_valid", type=int, help="volumes to evaluate on; the demo's without it")
    parser.add_argument("--max_epochs", type=int, help="of every pre-training, without warm-up")
    parser.add_argument("--keys", type=json.loads, default={}, help="stage -> keys of all its runs, as JSON")
    given = parser.parse_args()
    if unknown := given.keys.keys() - {*STAGES}:
        raise SystemExit(f"error: --keys has {', '.join(unknown)}, which is no stage: give {{stage: {{key: value}}}}")
    given.variants = given.variants or (["all"] if given.list else CORE)
    if "all" in given.variants:
        given.variants = list(VARIANTS)
    sizes = {name: getattr(given, name) for name in ("num_train", "num_valid", "max_epochs", "keys")}
    plan = Plan(given.out, given.cohort_seed, **sizes)
    chains = [plan.runs(variant, seed, given.stages) for seed in given.seeds for variant in given.variants]
    if given.list:
        for name in given.variants:
            runs = [run for chain in chains for run in chain if run.variant == name]
            done = sum(run.result() is not None for run in runs)
            keys = ", ".join(f"{key} {json.dumps(value)}" for key, value in VARIANTS[name].keys.items())
            print(f"{name:20} {done} of {len(runs)} done  {VARIANTS[name].title}{': ' if keys else ''}{keys}")
        return
    runs = [run for chain in chains for run in chain]
    refuse_other_settings(runs)
    if given.docs is not None:
        between_markers(given.docs.read_text(), given.name, "")  # ends here, and not after hours, where there are none
    plan.write_cohorts(runs)
    failures = run_all(chains, given.jobs)
    report(plan.out, str(plan), given.docs, given.name)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
