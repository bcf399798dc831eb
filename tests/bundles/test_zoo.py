"""The model zoo's rules, and that every README says what is true of its bundle."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions, version
from pathlib import Path

import jsonschema
import pytest
from custom_components.run.export import LARGE, components, export
from monai.bundle import ConfigParser

from tests.conftest import untrained

REPOSITORY = Path(__file__).parents[2]
BUNDLES = ("pretrain", "classify", "segment")
SCHEMA = REPOSITORY / "tests" / "data" / "meta_schema_20240725.json"  # MONAI's own, Apache 2.0
SECTIONS = [
    "# Model Overview", "## Weights", "## Data", "### Preprocessing", "## Training configuration", "### Memory",
    "### Input", "### Output", "## Performance", "## MONAI Bundle Commands", "## Limitations", "## Citation",
    "## References", "## License",
]  # fmt: skip
MONAI_ARGUMENTS = {"config_file", "meta_file", "filepath", "ckpt_file", "input_shape"}

each_bundle = pytest.mark.parametrize("name", BUNDLES)


def folder(name: str) -> Path:
    return REPOSITORY / "bundles" / name


def metadata(name: str) -> dict:
    return json.loads((folder(name) / "configs" / "metadata.json").read_text())


def readme(name: str) -> str:
    return (folder(name) / "docs" / "README.md").read_text()


def commands(pages: Iterable[Path]) -> list[list[str]]:
    """Every command line in the code blocks of these pages, split as a shell splits it."""
    blocks = "".join(
        block.replace("\\\n", " ") for page in pages for block in re.findall(r"(?ms)^```\n(.*?)^```", page.read_text())
    )
    return [shlex.split(line) for line in blocks.splitlines() if "monai.bundle" in line]


@each_bundle
def test_no_config_has_a_key_twice(name: str) -> None:
    """JSON's readers take the last one, and say nothing."""

    def once(pairs: list[tuple]) -> dict:
        assert len({key for key, _ in pairs}) == len(pairs), [key for key, _ in pairs]
        return dict(pairs)

    for file in (folder(name) / "configs").glob("*.json"):
        json.loads(file.read_text(), object_pairs_hook=once)


@each_bundle
def test_names(name: str) -> None:
    """A folder name that the zoo's tools can split from its version, and a name for people."""
    assert re.fullmatch(r"[a-z][a-z0-9_]*", name) and "_v" not in name
    assert metadata(name)["name"].startswith("SimCroP ")


@each_bundle
def test_metadata_satisfies_monais_schema(name: str) -> None:
    jsonschema.validate(metadata(name), json.loads(SCHEMA.read_text()))
    assert all(isinstance(reference, str) for reference in metadata(name)["references"])


@each_bundle
def test_metadata_tells_the_documented_figures_and_of_what_they_are(name: str) -> None:
    metrics = dict(metadata(name)["eval_metrics"])
    assert "phantoms" in metrics.pop("data") and len(metrics) >= 2
    told = readme(name).split("## Performance")[1].split("## MONAI Bundle Commands")[0]
    figures = [float(figure) for figure in re.findall(r"\b0\.\d+", told)]
    assert not set(metrics.values()) - set(figures)


@each_bundle
def test_metadata_calls_logits_logits_and_tells_what_comes_of_them(name: str) -> None:
    data_format = metadata(name)["network_data_format"]
    pred, after = data_format["outputs"]["pred"], data_format["post_processed_outputs"]
    inference = json.loads((folder(name) / "configs" / "inference.json").read_text())
    if name == "pretrain":
        assert list(after["similarity"]["channel_def"].values()) == inference["sentences"]
        assert after["embedding"] == pred
        return
    (output,) = after.values()
    assert pred["type"] == "logits" and output["channel_def"] == pred["channel_def"]
    highest = {"classify": 1, "segment": pred["num_channels"] - 1}[name]
    assert output["value_range"] == [0, highest] and output["num_channels"] == {"classify": 18, "segment": 1}[name]


@each_bundle
def test_version_has_its_changelog_entry_on_top(name: str) -> None:
    content = metadata(name)
    assert re.fullmatch(r"\d+\.\d+\.\d+", content["version"])
    assert next(iter(content["changelog"])) == content["version"] and all(content["changelog"].values())


@each_bundle
def test_packages_are_pinned_and_complete(name: str) -> None:
    """Pins are the repository's own, and cover all that the exported components import."""
    content = metadata(name)
    required = content["required_packages_version"]
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    pins = dict(line.split("#")[0].strip().split("==") for line in lines if "==" in line)
    assert required.items() <= pins.items()
    assert (content["monai_version"], content["pytorch_version"]) == (pins["monai"], pins["torch"])
    assert content["numpy_version"] == pins["numpy"]
    imported = set()
    for module in components(folder(name) / "configs"):
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    configs = "".join(path.read_text() for path in (folder(name) / "configs").glob("*.json"))
    imported |= set(re.findall(r'"package:(\w+)/', configs))
    distributions = packages_distributions()
    needed = {distributions[module][0].lower().replace("_", "-") for module in imported if module in distributions}
    needed |= {"itk"} if "ITKReader" in configs else set()  # MONAI's
    needed -= {"simcrop-monai-bundles", "monai", "torch", "numpy"}  # the repository itself; what has a field of its own
    # MONAI's own needs: the command line
    assert {package.replace("_", "-").lower() for package in required} == needed | {"fire"}
    assert {"nibabel", "pytorch-ignite"} < needed


@pytest.mark.parametrize("name", ("classify", "segment"))
def test_language_is_of_pretraining_alone(name: str) -> None:
    """Every component of the bundle can be imported where the language stack cannot."""
    package = REPOSITORY / "custom_components"
    modules = [
        ".".join(path.relative_to(package.parent).with_suffix("").parts)
        for path in components(folder(name) / "configs")
    ]
    code = f"""
import importlib, sys

class Absent:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("transformers", "pysbd", "huggingface_hub"):
            raise ImportError(name)

sys.meta_path.insert(0, Absent())
for module in {modules}:
    importlib.import_module(module.removesuffix(".__init__"))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {"transformers", "pysbd", "huggingface_hub"} & set(metadata(name)["required_packages_version"])


@each_bundle
def test_packages_come_from_pypi(name: str) -> None:
    """Each is installed under the pinned version and from an index: nothing local, nothing from a repository."""
    from importlib.metadata import distribution

    for package, pin in metadata(name)["required_packages_version"].items():
        assert version(package) == pin
        assert distribution(package).read_text("direct_url.json") is None


@each_bundle
def test_readme_has_the_zoos_sections(name: str) -> None:
    found = re.findall(r"(?m)^#+ .+$", re.sub(r"(?ms)^```\n.*?^```\n", "", readme(name)))
    assert [heading for heading in found if heading in SECTIONS] == SECTIONS


@each_bundle
def test_readme_holds_in_every_place_where_it_is_shown(name: str) -> None:
    """Links lead to files beside it, in docs and in an export; their words name the path, for a card in the root."""
    linked = re.findall(r"(!?)\[([^]]*)\]\((?!https://)([^)]*)\)", readme(name))
    assert linked and all(not picture and words == f"`docs/{target}`" for picture, words, target in linked)
    assert all((folder(name) / "docs" / target).is_file() for *_, target in linked)
    assert "data_license.txt" in {target for *_, target in linked}
    assert (folder(name) / "LICENSE").read_bytes() == (REPOSITORY / "LICENSE").read_bytes()


def named_files_and_keys_exist(bundle: Path, command: list[str]) -> None:
    option = command.index("--config_file")
    files = ast.literal_eval(command[option + 1]) if "[" in command[option + 1] else [command[option + 1]]
    paths = [bundle / file for file in files]
    assert all(path.is_file() or path.name.startswith("my_") for path in paths), command
    parser = ConfigParser(config=ConfigParser.load_config_files([path for path in paths if path.is_file()]))
    for part in command[command.index("monai.bundle") :]:
        key = part[2:].split("=")[0] if part.startswith("--") else None
        if key and key not in MONAI_ARGUMENTS:
            assert key in parser, f"{key} in {command}"


@each_bundle
def test_docs_name_configs_and_keys_that_exist(name: str) -> None:
    found = commands((folder(name) / "docs").glob("*.md"))
    assert len(found) > 5
    for command in found:
        named_files_and_keys_exist(folder(name), command)


FRONT = REPOSITORY / "README.md"


def test_front_page_is_short_and_its_lines_run() -> None:
    text = FRONT.read_text()
    assert len(text.split()) <= 1000
    for link in re.findall(r"\]\((?!https://)([^)#]*)", text):
        assert (REPOSITORY / link).is_file() or (REPOSITORY / link).is_dir(), link
    for command in commands([FRONT]):
        named_files_and_keys_exist(folder("pretrain"), command)


def test_front_page_repeats_what_the_pages_behind_it_say() -> None:
    """Its table has no number of its own."""
    behind = "".join(path.read_text() for name in BUNDLES for path in (folder(name) / "docs").glob("*.md"))
    table = FRONT.read_text().split("## What came out")[1].split("\n\n")[1]
    numbers = re.findall(r"\d\.\d{3}", table)
    assert len(numbers) > 15 and [number for number in numbers if number not in behind] == []


def test_one_version_everywhere() -> None:
    told = {name: metadata(name)["version"] for name in BUNDLES}
    told["pyproject"] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    told["citation"] = re.search(r"(?m)^version: (.+)$", (REPOSITORY / "CITATION.cff").read_text())[1]
    told["changes"] = re.search(r"(?m)^## (\S+)$", (REPOSITORY / "CHANGELOG.md").read_text())[1]
    assert len(set(told.values())) == 1, told


@each_bundle
def test_readme_names_every_overlay(name: str) -> None:
    configs = {path.name for path in (folder(name) / "configs").glob("*.json")} - {"metadata.json"}
    assert {config for config in configs if config not in readme(name)} == set()


@each_bundle
def test_readme_backquoted_keys_exist(name: str) -> None:
    """The tables of keys name keys of the configs."""
    paths = [path for path in (folder(name) / "configs").glob("*.json") if path.name != "metadata.json"]
    keys = {key for path in paths for key in json.loads(path.read_text())}
    rows = re.findall(r"(?m)^\| .* \| (`[a-z_#`, ]+`)[^|]*\|$", readme(name).split("## Training configuration")[1])
    named = {key.split("#")[0] for row in rows for key in re.findall(r"`([a-z_]+)`", row)}
    assert len(named) >= 8 and named <= keys


@each_bundle
def test_readme_tells_what_was_measured_and_what_was_not(name: str) -> None:
    text = readme(name).split("## Performance")[1].split("## MONAI Bundle Commands")[0]
    assert "Measured here" in text and "phantoms" in text and "nothing has been measured here" in text
    assert "What the paper reports" in text


@each_bundle
def test_readme_says_that_there_are_no_weights(name: str) -> None:
    assert "## Weights\nNone." in readme(name)


DATA_SETS = ("CT-RATE", "RadChestCT", "CC-CCII", "LUNA16", "BTCV")


@each_bundle
def test_every_data_set_has_its_licence(name: str) -> None:
    configs = "".join(path.read_text() for path in (folder(name) / "configs").glob("*.json"))
    licences = (folder(name) / "docs" / "data_license.txt").read_text().splitlines()
    named = [data_set for data_set in DATA_SETS if data_set in configs + metadata(name)["data_source"] + readme(name)]
    assert named
    for data_set in named:
        (line,) = [line for line in licences if line.startswith(data_set)]
        assert "CC-" in line or "terms" in line


@each_bundle
def test_files_are_small_and_lines_short(name: str, tmp_path: Path) -> None:
    exported, archive = export(untrained(name, tmp_path), tmp_path / "out")
    assert archive.stat().st_size < LARGE
    for path in exported.rglob("*"):
        assert path.is_dir() or path.stat().st_size < LARGE
        if path.suffix == ".py":
            assert max(map(len, path.read_text().splitlines()), default=0) <= 120


@pytest.fixture(scope="module")
def python_of_exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of all exports in one folder, placed as in the model zoo, away from this repository's settings."""
    out = tmp_path_factory.mktemp("zoo")
    for name in BUNDLES:
        for module in components(folder(name) / "configs"):
            target = out / "models" / "simcrop" / module.relative_to(REPOSITORY)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(module, target)
    return out


ZOO_STYLE = {
    "isort": ["--check", "--diff", "--profile", "black", "--line-length", "120", "."],
    "black": ["--check", "--diff", "-q", "-l", "120", "-C", "-t", "py37", "-t", "py38", "-t", "py39", "."],
    "flake8": [
        "--isolated", "--max-line-length", "120", "--select", "B,C,E,F,N,P,T4,W,B9", "--per-file-ignores",
        "__init__.py:F401", "--ignore", "E203,E501,E741,W503,W504,C408,N812,B023", ".",
    ],
}  # fmt: skip


@pytest.mark.parametrize("tool", ZOO_STYLE)
def test_exports_pass_the_zoos_style(python_of_exports: Path, tool: str) -> None:
    command = [sys.executable, "-m", tool, *ZOO_STYLE[tool]]
    done = subprocess.run(command, cwd=python_of_exports, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@each_bundle
def test_every_start_is_one_call(name: str) -> None:
    """MONAI puts the bundle on the path too late, so that comes first; ``start`` is the same everywhere."""
    opening = ["$import sys", "$sys.path.insert(0, @bundle_root)", "@start"]
    configs = {path.stem: json.loads(path.read_text()) for path in (folder(name) / "configs").glob("*.json")}
    starts = {stem: config["start"] for stem, config in configs.items() if "start" in config}
    assert len(starts) >= 4 and {stem for stem, config in configs.items() if "initialize" in config} == set(starts)
    for stem, start in starts.items():
        chosen = ["@bfloat16"] if "amp" in configs[stem] else []  # told before anything is built
        assert configs[stem]["initialize"] == opening + chosen
        assert start["_target_"] == "custom_components.run.start.start" and start["bundle_root"] == "@bundle_root"
        draws = not stem.startswith(("prepare", "import"))  # random numbers
        assert ("seed" in start) == draws, stem
    assert configs["multi_gpu_train"]["start#timeout_minutes"] == "@timeout_minutes"
    assert configs["multi_gpu_evaluate"]["start#rank_zero_alone"] is True


@each_bundle
def test_no_config_imports_components(name: str) -> None:
    """``$import`` runs before anything else, thus before the bundle is on the path."""
    for path in (folder(name) / "configs").glob("*.json"):
        assert not re.search(r"\$(import|from) custom_components", path.read_text())
