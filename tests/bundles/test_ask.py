"""Weights asked from Python: what inference.json writes, of paths and arrays, one and many, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import nbformat
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from custom_components.ask import ScansFailed, SentenceModel, load
from custom_components.errors import InputError
from custom_components.run.description import describe
from custom_components.run.weights import save_weights, text_fingerprint
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from nbclient import NotebookClient

from tests.bundles.conftest import CT
from tests.conftest import BUNDLES, untrained

REPOSITORY = Path(__file__).parents[2]
ENCODER = {"patch_size": [8, 8, 4], "hidden_size": 24, "mlp_dim": 32, "num_layers": 4, "num_heads": 2, "hu_bins": 4}
ENCODER |= {"hu_range": [-1000, 1000], "img_size": [64, 64, 32], "pixdim": [5.0, 5.0, 10.0], "pos_embed": "sincos3d"}
ENCODER |= {"scale_space": [], "statistics_mlp_dim": 0}
SETTINGS = {
    "pretrain": {"projection_size": 16, "align_layer": 0, "patch_projection": "linear", "align_pool": "lse"}
    | {"top_k": 4, "lse_beta": 10.0, "temperature": 0.07, "text_hidden_size": 384},
    "classify": {"classes": ["Nodule", "Effusion"], "exclusive": False},
    "segment": {"classes": ["left lung", "heart"], "feature_size": 4, "img_size": [32, 32, 16]},
}
SENTENCES = ["There is a pleural effusion.", "The heart is enlarged."]


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory, minilm: str) -> Path:
    """The three bundles with small random weights that say of themselves how they are to be used."""
    root = tmp_path_factory.mktemp("asked") / "bundles"
    for name, own in SETTINGS.items():
        folder = untrained(name, root)
        settings = ENCODER | own
        parser = ConfigParser()
        parser.read_config(str(folder / "configs" / "inference.json"))
        if name == "pretrain":
            settings["text_encoder"] = minilm
        for key, value in settings.items():
            parser[key] = value
        if name == "pretrain":
            settings["text_encoder_fingerprint"] = text_fingerprint(
                parser.get_parsed_content("frozen_text_encoder"), parser.get_parsed_content("tokenizer")
            )
        torch.manual_seed(0)
        weights = parser.get_parsed_content("network_def").state_dict()
        if name == "classify":
            weights["head.weight"] = torch.randn_like(weights["head.weight"])  # else all are as probable
        (folder / "models").mkdir()
        save_weights(weights, folder / "models" / "model.pt", describe(settings, folder))
    return root


@pytest.fixture(scope="module")
def model(bundles: Path) -> SentenceModel:
    return load(bundles / "pretrain" / "models")


@pytest.fixture
def bundle(bundles: Path, request: pytest.FixtureRequest) -> Path:
    return bundles / getattr(request, "param", "pretrain")


@pytest.fixture(scope="session")
def nifti(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real CT with its axes stored in another order, and one turned around."""
    from custom_components.data.volume import read_volume

    raw = read_volume(CT)
    # axes of the new array: 0 runs back along the old 1, 1 along the old 2, 2 along the old 0
    array = raw.hu().transpose(1, 2, 0)[::-1]
    back = np.zeros((4, 4))
    back[1, 0], back[1, 3], back[2, 1], back[0, 2], back[3, 3] = -1, raw.voxels.shape[1] - 1, 1, 1, 1
    affine = raw.affine @ back
    path = tmp_path_factory.mktemp("scans") / "chest.nii.gz"
    nib.save(nib.Nifti1Image(np.ascontiguousarray(array).astype(np.int16), affine), path)
    return path


@pytest.mark.parametrize("bundle", ["pretrain"], indirect=True)
def test_sentences_are_as_inference_has_them(
    bundle: Path, run_here: Callable, nifti: Path, tmp_path: Path, model: SentenceModel
) -> None:
    asked = {"Effusion": {"positive": SENTENCES[:1], "negative": ["No effusion."]}, "Heart": SENTENCES[1]}
    run_here(["inference.json"], dataset_dir=nifti, models_dir=bundle / "models", sentences=asked)
    found = model.similarity(nifti, asked)
    table = pd.read_csv(tmp_path / "eval" / "sentences.csv").set_index("class")
    for columns, rounded in ((["score", "probability", "max"], 1e-6), (["x_mm", "y_mm", "z_mm"], 0.051)):
        np.testing.assert_allclose(found.table[columns], table[columns], rtol=0, atol=rounded)
    assert list(table["sentence"]) == SENTENCES and np.isnan(table["probability"]["Heart"])
    for values, file in zip(found.maps, table["map"], strict=True):
        saved = nib.load(tmp_path / "eval" / file)
        np.testing.assert_array_equal(np.nan_to_num(values), saved.get_fdata(dtype=np.float32))
        np.testing.assert_allclose(saved.affine, found.affine, atol=1e-4)
    embedding = np.load(tmp_path / "eval" / "chest" / "embedding.npy")
    np.testing.assert_array_equal(model.embed(nifti), embedding)
    zero_shot = model.zero_shot(nifti, prompts=asked)
    pd.testing.assert_frame_equal(zero_shot, found.table[["score", "probability"]])


@pytest.mark.parametrize("bundle", ["classify"], indirect=True)
def test_probabilities_are_as_inference_has_them(bundle: Path, run_here: Callable, tmp_path: Path) -> None:
    run_here(["inference.json"], dataset_dir=CT, models_dir=bundle / "models")
    found = load(bundle).probabilities(CT)
    expected = pd.read_csv(tmp_path / "eval" / "predictions.csv").iloc[0, 2:]
    assert list(found.index) == SETTINGS["classify"]["classes"] and 0 < found.min() < found.max() < 1
    np.testing.assert_allclose(found.to_numpy(), expected.to_numpy(float), atol=1e-6)


@pytest.mark.parametrize("bundle", ["segment"], indirect=True)
def test_labels_are_as_inference_has_them(bundle: Path, run_here: Callable, nifti: Path, tmp_path: Path) -> None:
    run_here(["inference.json"], dataset_dir=nifti, models_dir=bundle / "models")
    found = load(bundle / "models" / "model.pt").segment(nifti)
    labels = nib.load(tmp_path / "eval" / "chest" / "labels.nii.gz")
    np.testing.assert_array_equal(found.labels, np.asarray(labels.dataobj))
    np.testing.assert_allclose(found.affine, labels.affine, atol=1e-4)
    expected = pd.read_csv(tmp_path / "eval" / "volumes.csv").set_index("class")[["voxels", "ml"]]
    pd.testing.assert_frame_equal(found.volumes, expected)
    assert found.volumes["voxels"].sum() > 0


def test_arrays_are_read_as_files(model: SentenceModel, nifti: Path) -> None:
    """Whatever their numbers and their order in memory, and whether the affine is beside them or in them."""
    image = nib.load(nifti)
    array = np.asarray(image.dataobj)
    kept = array.copy()
    expected = model.similarity(nifti, SENTENCES)
    for scan, affine in (
        (array, image.affine),
        (array.astype(np.float64), image.affine.tolist()),
        (np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape), image.affine),  # read-only
        (array.astype(">i2")[::-1].copy()[::-1], image.affine),
        (torch.as_tensor(array)[None], torch.as_tensor(image.affine)),
        (MetaTensor(torch.as_tensor(array)[None], affine=torch.as_tensor(image.affine)), None),
    ):
        found = model.similarity(scan, SENTENCES, affine)
        np.testing.assert_allclose(found.maps, expected.maps, atol=1e-5)
        np.testing.assert_allclose(found.affine, expected.affine, atol=1e-5)
        pd.testing.assert_frame_equal(found.table, expected.table, atol=1e-4)
    np.testing.assert_array_equal(array, kept)


def test_a_map_lies_where_the_anatomy_does(model: SentenceModel, nifti: Path) -> None:
    stored, turned = (model.similarity(path, SENTENCES[0]) for path in (CT, nifti))
    np.testing.assert_allclose(turned.table, stored.table, atol=1e-3)


def test_lists_give_what_their_scans_do_in_any_batches(bundles: Path, model: SentenceModel, nifti: Path) -> None:
    three = load(bundles / "pretrain", batch_size=3)
    array, affine = np.asarray(nib.load(nifti).dataobj), nib.load(nifti).affine
    scans = [array, array[::-1], array + 20, array]
    embeddings = model.embed(scans, affine)
    assert embeddings.shape == (4, 24) and not np.allclose(embeddings[0], embeddings[1])
    np.testing.assert_allclose(three.embed(scans, [affine] * 4), embeddings, atol=1e-5)
    found = three.similarity([nifti, CT], SENTENCES)
    assert [each.maps.shape[1:] for each in found] == [array.shape, (128, 128, 34)]
    table = load(bundles / "classify", batch_size=2).probabilities([str(nifti), CT])
    assert list(table.index) == [str(nifti), str(CT)] and list(table) == SETTINGS["classify"]["classes"]
    cut = array[10:]
    labels = load(bundles / "segment", batch_size=2).segment([array, cut], affine)
    assert [each.labels.shape for each in labels] == [array.shape, cut.shape], "a network of any size takes them"


def test_a_bad_scan_costs_itself_alone(model: SentenceModel, tmp_path: Path) -> None:
    with pytest.raises(ScansFailed, match="1 of 3 scans failed.*no.nii.gz does not exist") as raised:
        model.embed([CT, tmp_path / "no.nii.gz", CT])
    first, none, last = raised.value.answers
    assert none is None and (first == last).all()


ARRAY = np.full((20, 20, 20), -1000, np.int16)
REFUSED = {
    "no affine": (ARRAY, None, "affine of an array is none"),
    "affine of another shape": (ARRAY, np.eye(3), r"affine of an array is of shape \[3, 3\]"),
    "an affine too many": ([ARRAY], [np.eye(4)] * 2, "2 affines are given for 1 scans"),
    "an affine beside a file": (str(CT), np.eye(4), "which its file has"),
    "no scan": ([], None, "no scan in the list"),
    "no scan at all": (None, None, "NoneType"),
    "not HU": (np.random.default_rng(0).random((20, 20, 20)), np.diag([4, 4, 4, 1]), "HU"),
    "NaN": (np.full((20, 20, 20), np.nan), np.diag([4, 4, 4, 1]), "NaN"),
    "four axes": (np.zeros((2, 20, 20, 20)), np.diag([4, 4, 4, 1]), "not one 3D volume"),
    "words": (ARRAY.astype(str), np.diag([4, 4, 4, 1]), "holds <U"),
    "complex": (ARRAY.astype(complex), np.diag([4, 4, 4, 1]), "complex"),
    "spacing": (ARRAY, np.diag([400, 4, 4, 1]), "spacing of 400 x 4 x 4"),
    "missing": ("nowhere.nii", None, "nowhere.nii does not exist"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_scan_is_told(model: SentenceModel, case: str) -> None:
    scan, affine, words = REFUSED[case]
    with pytest.raises(InputError, match=words) as raised:
        model.embed(scan, affine)
    assert "\n" not in str(raised.value)


KEYS = {
    "a key that is none": ("pretrain", {"devise": "cpu"}, "did you mean device"),
    "a device that is none": ("classify", {"device": "abacus"}, "abacus"),
    "a value out of range": ("segment", {"overlap": 2}, "overlap is 2"),
    "a key that contradicts the weights": ("segment", {"pixdim": [1.0, 1.0, 1.0]}, "pixdim"),
    "no batch": ("pretrain", {"batch_size": 0}, "batch_size is 0"),
}


@pytest.mark.parametrize("case", KEYS)
def test_a_wrong_key_is_told(bundles: Path, case: str) -> None:
    name, keys, words = KEYS[case]
    with pytest.raises(InputError, match=words):
        load(bundles / name, **keys)


def test_what_is_no_bundle_or_no_weights_is_told(bundles: Path, tmp_path: Path) -> None:
    for path, words in ((tmp_path, "lies in no bundle"), (tmp_path / "none", "does not exist")):
        with pytest.raises(InputError, match=words):
            load(path)
    with pytest.raises(InputError, match="no model.pt"):
        load(untrained("segment", tmp_path))
    with pytest.raises(InputError, match="is no bundle"):
        load(bundles / "segment" / "models", bundle_root=tmp_path)


def test_weights_may_lie_elsewhere(bundles: Path, tmp_path: Path) -> None:
    for file in (bundles / "segment" / "models").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert load(tmp_path, bundle_root=bundles / "segment").settings["classes"] == ["left lung", "heart"]


def test_a_question_of_another_bundle_is_told(model: SentenceModel) -> None:
    with pytest.raises(AttributeError, match="bundle pretrain have no segment: load those of the bundle segment"):
        model.segment(CT)
    assert not hasattr(model, "guess") and hasattr(model, "embed")


def test_shipped_prompts_are_named(model: SentenceModel) -> None:
    found = model.zero_shot(CT, ["Lung nodule", "Emphysema"], "ct_clip")
    assert list(found.index) == ["Lung nodule", "Emphysema"] and found["probability"].between(0, 1).all()
    assert list(model.zero_shot(CT, "Emphysema").index) == ["Emphysema"]
    with pytest.raises(InputError, match="nowhere.json"):
        model.zero_shot(CT, ["Lung nodule"], "nowhere.json")


def test_a_panel_is_drawn_of_paths_and_arrays(model: SentenceModel, nifti: Path, tmp_path: Path) -> None:
    model.panel(nifti, model.similarity(nifti, SENTENCES)).savefig(tmp_path / "panel.png")
    assert (tmp_path / "panel.png").stat().st_size > 10_000


def test_the_notebook_runs_as_it_is_told(bundles: Path) -> None:
    notebook = nbformat.read(REPOSITORY / "docs" / "first_steps.ipynb", 4)
    told = json.dumps([cell.get("outputs") for cell in notebook.cells])
    assert "image/jpeg" in told and not re.search(r"/(tmp|home|root|usr)/", told)
    folder = bundles.parent / "docs"
    folder.mkdir()
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    told = json.dumps([cell.get("outputs") for cell in notebook.cells])
    assert "image/jpeg" in told and "(2, 24) True" in told and "left lung" in told


@pytest.mark.parametrize("name", SETTINGS)
def test_the_readme_says_what_runs(bundles: Path, nifti: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"(?ms)^### From Python\n.*?^```\n(.*?)^```", (BUNDLES / name / "docs/README.md").read_text())
    monkeypatch.chdir(bundles / name)
    Path("ct.nii.gz").symlink_to(nifti)
    exec(code, {})  # noqa: S102
