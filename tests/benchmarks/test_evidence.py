"""The ablation: what its variants change, that it goes on where it stopped, what it reports, what chance looks like."""

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from custom_components.data import phantom
from custom_components.run.weights import save_weights
from matplotlib.figure import Figure
from scipy import stats

from tests.benchmarks import evidence
from tests.benchmarks.evidence import (
    OVERLAYS,
    REFERENCE,
    VARIANTS,
    Plan,
    Run,
    configured,
    deal_reports_anew,
    measures,
    refuse_other_settings,
    report,
    run_all,
)

TINY = ["--num_train", "32", "--num_valid", "32", "--max_epochs", "1"]
TINY += [
    "--keys",
    json.dumps(
        {"pretrain": {"batch_size": 8, "effective_batch_size": 8}, "probe": {"fractions": [0.5], "max_steps": 5}}
    ),
]
FINDINGS = ("Lung nodule", "Cardiomegaly")


@pytest.mark.parametrize("name", [name for name, made in VARIANTS.items() if not made.supervised])
def test_a_variant_makes_a_network_and_changes_what_it_names(name: str) -> None:
    made = VARIANTS[name]
    plain, changed = (configured("pretrain", OVERLAYS, keys) for keys in ({}, made.keys))
    known = configured("pretrain", ("train.json",), {})
    for key, value in made.keys.items():
        assert known[key] is not KeyError and plain[key] != value  # a key that is not there raises
    differing = {key for key in changed.config if changed[key] != plain[key]}
    assert differing == {key.split("#")[0] for key in made.keys}
    # MiniLM takes seconds to load, and only its sizes count
    changed["tokenizer"] = SimpleNamespace(pad_token_id=0)
    changed["frozen_text_encoder"] = SimpleNamespace(hidden_size=384, vocab_size=50)
    network = changed.get_parsed_content("network_def")
    weights = changed.get_parsed_content("loss_weights")
    assert (network.volume_decoder is not None) == (weights["volume"] > 0)
    assert (network.aligner is not None) == (weights["alignment"] + weights["instance"] > 0)
    assert (network.report_decoder is not None) == (weights["report"] > 0)
    assert changed.get_parsed_content("loss").weights == weights


def test_published_is_all_that_recommended_changes() -> None:
    """But for flips, which would contradict the sides that reports name, and the sharpness of a pooling unused."""
    read = {
        name: json.loads((evidence.BUNDLES / "pretrain" / "configs" / f"{name}.json").read_text())
        for name in ("train", "recommended", "demo")
    }
    assert set(read["recommended"]) - {"flip_prob", "lse_beta"} <= set(evidence.PUBLISHED)
    assert read["demo"]["flip_prob"] == [0.0, 0.0, 0.0]
    assert {key: read["train"][key] for key in evidence.PUBLISHED} == evidence.PUBLISHED
    # whatever else of the recipe the demo sets is its size or its budget
    size = {"pixdim", "img_size", "scale_crop", "flip_prob", "shift_prob", "max_length", "lse_beta"}
    size |= {"num_heads"} | {key for key in read["train"] if "_decoder_" in key}
    budget = {"warmup_epochs", "effective_batch_size", "learning_rate"}
    changed = {
        key
        for key, value in read["train"]["recipe"].items()  # the others are fingerprints
        if value == f"@{key}" and read["demo"].get(key, read["train"][key]) != read["train"][key]
    }
    assert changed <= set(evidence.PUBLISHED) | size | budget


def test_probe_and_segmentation_take_the_variants_encoder(tmp_path: Path) -> None:
    plan = Plan(tmp_path)
    for name in ("recommended", "published", "no_scale_space"):
        pretrain, probe, segment = plan.runs(name, 1, ("probe", "segment"))
        source = configured(pretrain.bundle, pretrain.overlays, pretrain.keys)
        for run in (probe, segment):
            models = Path(pretrain.keys["models_dir"])
            assert run.keys["pretrained"] == f"{models}/encoder.pt" and run.keys["seed"] == pretrain.keys["seed"] == 1
            # the sizes are those that the weights tell, which pre-training leaves beside them
            sizes = ("patch_size", "hidden_size", "hu_bins", "scale_space", "statistics_mlp_dim")
            told = {key: source.get_parsed_content(key) for key in sizes}
            save_weights({}, models / "encoder.pt", {"settings": told})
            config = configured(run.bundle, run.overlays, run.keys)
            assert {key: config.get_parsed_content(key) for key in sizes} == told


def test_supervised_ceiling_has_the_budget_of_pretraining(tmp_path: Path) -> None:
    (ceiling,) = Plan(tmp_path).runs("supervised", 0, ("probe",))
    config = configured(ceiling.bundle, ceiling.overlays, ceiling.keys)
    source = configured("pretrain", OVERLAYS, {})
    steps = -(-source["dataset_dir#num_train"] // source["batch_size"]) * source["max_epochs"]
    assert (config["max_steps"], config["batch_size"]) == (steps, source["batch_size"])
    assert config["learning_rate"] == source.get_parsed_content("block_learning_rate") < source["learning_rate"]
    assert config["frozen"] is False and config["pretrained"] is None and config["data_fraction"] == 1.0


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("cohort") / "phantom"
    phantom.cohort(target, num_train=6, num_valid=2, num_workers=1)
    return target


def test_dealt_reports_are_others(cohort: Path, tmp_path: Path) -> None:
    deal_reports_anew(cohort, tmp_path / "dealt", seed=0)

    def reports(folder: Path, split: str) -> dict[str, tuple[str, ...]]:
        with open(folder / "dataset" / "radiology_text_reports" / f"{split}_reports.csv", newline="") as file:
            return {row.pop("VolumeName"): tuple(row.values()) for row in csv.DictReader(file)}

    own, dealt = (reports(folder, "train") for folder in (cohort, tmp_path / "dealt"))
    assert list(own) == list(dealt) and sorted(own.values()) == sorted(dealt.values())
    assert len(set(own.values())) == len(own) and all(own[name] != dealt[name] for name in own)
    assert reports(cohort, "validation") == reports(tmp_path / "dealt", "validation")
    for file in (cohort / "dataset").rglob("*"):
        if file.is_file() and file.name != "train_reports.csv":
            assert (tmp_path / "dealt" / file.relative_to(cohort)).read_bytes() == file.read_bytes()
    first = (tmp_path / "dealt" / "dataset" / "radiology_text_reports" / "train_reports.csv").read_bytes()
    for seed, same in ((0, True), (1, False)):
        deal_reports_anew(cohort, tmp_path / f"again_{seed}", seed)
        again = tmp_path / f"again_{seed}" / "dataset" / "radiology_text_reports" / "train_reports.csv"
        assert (again.read_bytes() == first) == same


def pretrained(presence: float, hit: float) -> dict[str, Any]:
    """A `metrics.json` of the pretrain bundle, made by hand."""
    entry = {"simcrop": presence, "random_encoder": 0.5, "hu_histogram": None, "positive": 9}
    grounded = {"hit": hit, "hit_shuffled": 0.25, "chance": 0.1, "no_image_prior": 0.5, "sentences": 7}
    return {
        "seed": 0,
        "masked_voxel_mse": {"simcrop": 0.03, "baseline": 0.04},
        "patch_patch_cosine": 0.25,
        "presence_auc": {FINDINGS[0]: entry, FINDINGS[1]: {**entry, "simcrop": 1.0}},
        "grounding": {**grounded, "per_finding": {FINDINGS[0]: grounded}},
    }


def test_measures_take_what_there_is() -> None:
    probe = {"auroc": {"0.1": {"simcrop": {"mean": 0.7}, "random_encoder": {"mean": 0.6}}}}
    found = measures({"pretrain": pretrained(0.5, 0.75), "probe": probe})
    assert found["presence AUC"] == 0.75 and found["presence AUC: Lung nodule"] == 0.5
    assert found["presence AUC, random_encoder"] == 0.5 and "presence AUC, hu_histogram" not in found
    assert found["hits minus shuffled"] == found["hits minus shuffled: Lung nodule"] == 0.5
    assert (found["probe 10 %"], found["probe 10 %, random_encoder"]) == (0.7, 0.6)
    assert "side" not in found and "lesion Dice" not in found
    more = pretrained(0.5, 0.75) | {
        "side_specificity": {"simcrop": 0.9, "random_encoder": 0.5},
        "retrieval": {"simcrop": {"recall@10": 0.4}, "chance": {"recall@10": 0.1}},
    }
    dice = {"dice": {"1": {"pretrained": {"mean": 0.5, "groups": {"lesions": {"mean": 0.2}}}}}}
    found = measures({"pretrain": more, "segment": dice})
    assert (found["side"], found["retrieval recall@10"], found["lesion Dice"]) == (0.9, 0.4, 0.2)
    ceiling = {"macro": {"auroc": {"value": 0.98}}, "per_class": {FINDINGS[0]: {"auroc": {"value": 0.9}}}}
    assert measures({"supervised": ceiling}) == {"presence AUC: Lung nodule": 0.9, "presence AUC": 0.98}


def leave(out: Path, variant: str, seed: int, stage: str, metrics: Mapping[str, Any], epochs: int | None = 20) -> None:
    folder = out / "runs" / variant / f"seed_{seed}" / stage
    folder.mkdir(parents=True)
    content = {"variant": variant, "seed": seed, "stage": stage, "seconds": 60.0, "epochs": epochs, "metrics": metrics}
    (folder / "result.json").write_text(json.dumps(content))


def test_report_of_results_made_by_hand(tmp_path: Path) -> None:
    for seed, presence in enumerate((0.8, 0.9, 1.0)):
        leave(tmp_path, REFERENCE, seed, "pretrain", pretrained(presence, 0.75))
        leave(tmp_path, "mim_align_report", seed, "pretrain", pretrained(presence - 0.2 - 0.1 * seed, 0.25))
    leave(tmp_path, "epochs_4", 0, "pretrain", pretrained(0.6, 0.5), epochs=4)
    docs = tmp_path / "docs" / "page.md"
    docs.parent.mkdir()
    begin, end = "<!-- short: begin -->", "<!-- short: end -->"
    others = "<!-- evidence: begin -->\nother runs\n<!-- evidence: end -->\n"
    docs.write_text(f"{others}{begin}\nold\n{end}\nafter\n")
    report(tmp_path, "the cohort", docs, "short")
    report(tmp_path, "the cohort", docs, "short")  # a second time changes nothing
    text = docs.read_text()
    assert text.startswith(f"{others}{begin}\n") and text.endswith(f"{end}\nafter\n") and "old" not in text
    assert "the cohort; seeds of training 0, 1, 2." in text
    # means over findings, one of which is 1.0 throughout
    assert "| recommended | 0.950 (0.900 to 1.000) | 0.500 (0.500 to 0.500) |" in text
    half = stats.t.ppf(0.975, 2) * 0.05 / 3**0.5
    assert f"| MIM + alignment, negatives: report | -0.150 ± {half:.3f} (-0.200 to -0.100) |" in text
    assert "| probe" not in text and "| side |" not in text  # nobody ran it
    for name in ("short_ablation", "short_curves"):
        assert (docs.parent / f"{name}.png").stat().st_size > 5000 and f"({name}.png)" in text
    found = json.loads((tmp_path / "evidence.json").read_text())
    assert found["values"][REFERENCE]["2"]["presence AUC"] == 1.0
    paired = found["minus_recommended"]["mim_align_report"]["presence AUC"]
    assert paired["mean"] == pytest.approx(-0.15) and paired["seeds"] == 3
    assert found["minus_recommended"]["epochs_4"]["presence AUC"]["half_width"] is None
    rows = list(csv.DictReader((tmp_path / "evidence.csv").open()))
    chosen = [row for row in rows if row["variant"] == REFERENCE and row["measure"] == "presence AUC"]
    assert [float(row["value"]) for row in chosen] == pytest.approx([0.9, 0.95, 1.0])


def test_bars_are_drawn_of_what_compares_variants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    lesions = {"dice": {"16": {"pretrained": {"groups": {"lesions": {"mean": 0.3}}}}}}
    for variant in (REFERENCE, "mim_align_report"):
        leave(tmp_path, variant, 0, "pretrain", pretrained(0.8, 0.75))
    leave(tmp_path, REFERENCE, 0, "segment", lesions)
    report(tmp_path, "the cohort")
    assert [axes.get_xlabel() for axes in figures[0].axes] == ["presence AUC", "hits minus shuffled"]
    leave(tmp_path, "mim_align_report", 0, "segment", lesions)
    report(tmp_path, "the cohort")
    assert [axes.get_xlabel() for axes in figures[1].axes][-1] == "lesion Dice"


def test_what_is_looked_up_is_folded(tmp_path: Path) -> None:
    """The page is long: what answers the question stands open, also when it is folded."""
    for variant in (REFERENCE, "mim_align_report"):
        leave(tmp_path, variant, 0, "pretrain", pretrained(0.8, 0.75))
    report(tmp_path, "the cohort")
    open_part, _, folded = (tmp_path / "evidence.md").read_text().partition("<details>\n<summary>")
    assert "#### Minus the recommended recipe" in open_part and "evidence_ablation.png" in open_part
    assert "#### Presence AUC, by finding" in folded and "#### Time" in folded
    assert "</summary>\n\n" in folded and folded.endswith("</details>\n")  # blank lines, or tables are not read


def test_a_finding_has_one_colour_in_all_panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Presence and hits list findings in orders of their own."""
    measured = {f"presence AUC: {name}": 0.9 for name in "ABC"} | {f"hits minus shuffled: {name}": 0.5 for name in "CA"}
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    evidence.learning_curves(
        {REFERENCE: {0: measured}, "epochs_4": {0: measured}}, {REFERENCE: 20, "epochs_4": 4}, tmp_path
    )
    presence, hits = (
        {line.get_label(): (line.get_color(), line.get_marker()) for line in axes.lines if len(line.get_label()) == 1}
        for axes in drawn[0].axes
    )
    assert presence == hits and len(set(presence.values())) == 3


def test_report_wants_markers(tmp_path: Path) -> None:
    leave(tmp_path, REFERENCE, 0, "pretrain", pretrained(0.8, 0.75))
    page = tmp_path / "page.md"
    page.write_text("no marker\n")
    with pytest.raises(SystemExit, match="lacks"):
        report(tmp_path, "the cohort", page)
    assert page.read_text() == "no marker\n"


@pytest.mark.parametrize("name", ["evidence", "evidence_short"])
def test_page_has_its_markers(name: str) -> None:
    page = (evidence.BUNDLES / "pretrain" / "docs" / "evidence.md").read_text()
    assert "replaced" in evidence.between_markers(page, name, "replaced")


class Scripted(Run):
    """A run whose command is a line of Python, which counts its calls in its folder."""

    def command(self) -> list[str]:
        count = f"open(r'{self.folder}/calls', 'a').write('x')"
        write = f"import os; os.makedirs(r'{self.folder}/eval', exist_ok=True)"
        write += f"; open(r'{self.folder}/eval/metrics.json', 'w').write('{{\"seed\": 0}}')"
        if self.keys.get("fails"):
            return [sys.executable, "-c", f"{count}; print('what went wrong'); raise SystemExit(3)"]
        return [sys.executable, "-c", f"{count}; {write}"]


def test_what_is_done_is_not_done_again_and_a_failure_stops_its_chain_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def chain(variant: str, **keys: Any) -> list[Run]:
        return [
            Scripted(variant, 0, stage, tmp_path / variant / stage, "pretrain", OVERLAYS, keys)
            for stage in ("pretrain", "probe")
        ]

    def calls(run: Run) -> int:
        file = run.folder / "calls"
        return len(file.read_text()) if file.is_file() else 0

    good, bad = chain("random"), chain("mim", fails=True)
    failures = run_all([bad, good], jobs=1)
    assert [str(run) for run in failures] == ["mim seed 0 pretrain"]
    printed = capsys.readouterr().err
    assert "what went wrong" in printed and "exit code 3" in printed
    assert [calls(run) for run in (*good, *bad)] == [1, 1, 1, 0]
    run_all([bad, good], jobs=2)
    assert [calls(run) for run in (*good, *bad)] == [1, 1, 2, 0]
    # results of other settings are not taken for these, and not thrown away either
    refuse_other_settings([*good, *bad])
    with pytest.raises(SystemExit, match="2 results were made with other configs"):
        refuse_other_settings(chain("random", max_epochs=3))


def test_results_hold_wherever_the_repository_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run,) = Plan(tmp_path / "out").runs("random", 0, ())
    here = run.settings()
    shutil.copytree(
        evidence.BUNDLES / "pretrain" / "configs", tmp_path / "elsewhere" / "bundles" / "pretrain" / "configs"
    )
    monkeypatch.setattr(evidence, "REPOSITORY", tmp_path / "elsewhere")
    monkeypatch.setattr(evidence, "BUNDLES", tmp_path / "elsewhere" / "bundles")
    assert run.settings() == here


def run_evidence(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tests.benchmarks.evidence", *map(str, arguments)]
    return subprocess.run(command, cwd=evidence.REPOSITORY, capture_output=True, text=True)


def test_a_page_without_markers_ends_before_the_first_run(tmp_path: Path) -> None:
    done = run_evidence("--out", tmp_path, "--variants", "random", "--docs", evidence.REPOSITORY / "README.md", *TINY)
    assert done.returncode == 1 and done.stderr.startswith("error: the document given as --docs lacks <!-- evidence:")
    assert not list(tmp_path.iterdir())


def result(out: Path, variant: str, stage: str, seed: int = 0) -> dict[str, Any]:
    return json.loads((out / "runs" / variant / f"seed_{seed}" / stage / "result.json").read_text())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an ablation of two variants, one of which has nothing to learn, through the cohort line."""
    out = tmp_path_factory.mktemp("evidence")
    done = run_evidence("--out", out, *TINY, "--variants", "recommended", "no_signal", "--seeds", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no_signal seed 0 probe: " in done.stdout + done.stderr
    return out


def test_two_variants_through_the_command_line(tiny: Path) -> None:
    found = json.loads((tiny / "evidence.json").read_text())["values"]
    for variant in ("recommended", "no_signal"):
        measured = found[variant]["0"]
        stages = {stage: result(tiny, variant, stage)["metrics"] for stage in ("pretrain", "probe")}
        assert measured["masked-voxel MSE"] == stages["pretrain"]["masked_voxel_mse"]["simcrop"]
        assert measured["probe 50 %"] == stages["probe"]["auroc"]["0.5"]["simcrop"]["mean"]
        assert {"presence AUC", "hits minus shuffled", "minutes"} < set(measured)
    # the bundle's controls stand beside the recommended recipe
    assert "probe 50 %, hu_histogram" in found["recommended"]["0"]
    assert "probe 50 %, hu_histogram" not in found["no_signal"]["0"]
    # the two started alike, and saw other reports
    first, second = (result(tiny, variant, "pretrain")["metrics"] for variant in ("recommended", "no_signal"))
    assert first["presence_auc"] != second["presence_auc"]
    assert first["masked_voxel_mse"]["baseline"] == second["masked_voxel_mse"]["baseline"]
    for name in ("evidence.md", "evidence_ablation.png", "evidence.csv"):
        assert (tiny / name).stat().st_size > 0
    assert not list(tiny.rglob("checkpoint*.pt")) and len(list(tiny.rglob("encoder.pt"))) == 2


def test_again_runs_nothing(tiny: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in tiny.rglob("result.json")}
    done = run_evidence("--out", tiny, *TINY, "--variants", "recommended", "no_signal", "--seeds", "0")
    assert done.returncode == 0 and "0 new runs in" in done.stdout
    assert {file: file.stat().st_mtime_ns for file in tiny.rglob("result.json")} == before and len(before) == 4
    listed = run_evidence("--out", tiny, *TINY, "--list", "--seeds", "0").stdout.splitlines()
    assert any(line.startswith("no_signal") and "2 of 2 done" in line for line in listed)
    assert any(line.startswith("mim ") and "0 of 2 done" in line for line in listed)


# of an interval of 99.9 %: these are several measures, of few sentences, which depend on each other where a network
# prefers one word, such as "lower", whatever it sees
Z = stats.norm.ppf(0.9995)


def chance(metrics: Mapping[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Measure -> distance from chance, and the interval in which a network that knows nothing has it, over volumes.

    AUC by the variance of the rank sum without any difference; hits as if each were drawn. Findings count as if they
    were one, which makes the intervals of means too wide rather than too narrow.
    """
    volumes, found = metrics["volumes"], {}
    widths = []
    for name, entry in metrics["presence_auc"].items():
        positive = entry["positive"]
        width = Z * ((volumes + 1) / (12 * positive * (volumes - positive))) ** 0.5
        widths.append(width)
        found[f"presence of {name}"] = entry["simcrop"] - 0.5, -width, width
    mean_width = sum(widths) / len(widths)
    mean = sum(entry["simcrop"] for entry in metrics["presence_auc"].values()) / len(widths)
    found["presence"] = mean - 0.5, -mean_width, mean_width
    grounded = metrics["grounding"]
    rate = max(grounded["hit"], grounded["hit_shuffled"], 1 / grounded["sentences"])
    width = Z * (rate * (1 - rate) / grounded["sentences"]) ** 0.5
    found["hits"] = grounded["hit"] - grounded["hit_shuffled"], -width, width
    for key in ("side_specificity", "level_specificity"):
        if key in metrics:
            # a text that always says "upper" is right as often as findings lie there, or as seldom
            width = Z * 0.5 / metrics[key]["sentences"] ** 0.5 + metrics[key]["no_image_prior"] - 0.5
            found[key] = metrics[key]["simcrop"] - 0.5, -width, width
    return found


def test_without_signal_measures_are_at_chance(tiny: Path) -> None:
    """The reports of the training volumes were dealt anew; held-out labels, masks and sentences are true."""
    found = chance(result(tiny, "no_signal", "pretrain")["metrics"])
    for name in {"presence", "hits", "side_specificity", "level_specificity"} & set(found):
        value, low, high = found[name]
        assert low <= value <= high, name


@pytest.mark.slow
def test_without_signal_measures_are_at_chance_at_the_size_of_the_demo(tmp_path: Path) -> None:
    """And with signal they are not: the same training on the true reports."""
    done = run_evidence("--out", tmp_path, "--variants", "no_signal", "--stages", "pretrain", "--seeds", *"012")
    assert done.returncode == 0, done.stdout + done.stderr
    done = run_evidence("--out", tmp_path, "--variants", "recommended", "--stages", "pretrain", "--seeds", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    values = json.loads((tmp_path / "evidence.json").read_text())["values"]
    at_chance = {"presence AUC": 0.5, "hits minus shuffled": 0.0, "side": 0.5, "level": 0.5, "retrieval recall@10": 0.1}
    for measure in set(at_chance) & set(values["no_signal"]["0"]):
        # over seeds: a network that knows nothing still ranks volumes, by what it happens to see first
        found = evidence.summary([seed[measure] for seed in values["no_signal"].values()])
        prior = values["no_signal"]["0"].get(f"{measure}, no_image_prior", at_chance[measure])
        assert abs(found["mean"] - at_chance[measure]) <= found["half_width"] + prior - at_chance[measure], measure
        assert values["recommended"]["0"][measure] > found["highest"], measure
