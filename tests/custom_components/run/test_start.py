"""The first call of every config, and two exported bundles in one process: equal components are shared, others refused."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import custom_components
from custom_components.errors import InputError
from custom_components.run.export import export
from custom_components.run.start import OneLineErrors, check_components, start
from tests.conftest import untrained

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def loaded() -> list[str]:
    """``custom_components.__path__``, which the test may change."""
    return custom_components.__path__


def test_equal_components_are_joined(loaded: list[str], tmp_path: Path) -> None:
    folder, _ = export(untrained("segment", tmp_path), tmp_path / "out")
    check_components(folder)
    check_components(folder)  # once is enough
    assert loaded[1:] == [str(folder / "custom_components")]


def test_a_module_that_is_not_loaded_comes_from_the_bundle(
    loaded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the modules that a bundle needs are in its export: another bundle's must be found beside them."""
    (tmp_path / "custom_components").mkdir()
    (tmp_path / "custom_components" / "only_here.py").write_text("answer = 42\n")
    check_components(tmp_path)
    from custom_components import only_here

    monkeypatch.delitem(sys.modules, "custom_components.only_here")
    monkeypatch.delattr(custom_components, "only_here")
    assert only_here.answer == 42


def test_another_version_is_refused_in_one_line(loaded: list[str], tmp_path: Path) -> None:
    folder, _ = export(untrained("segment", tmp_path), tmp_path / "out")
    module = folder / "custom_components" / "unetr.py"
    module.write_text(module.read_text() + "\n# changed\n")
    with pytest.raises(InputError) as raised:
        check_components(folder)
    message = str(raised.value)
    assert "\n" not in message and "unetr.py" in message and "segment 0." in message and "processes" in message
    assert str(folder) in message and loaded[0] in message and len(loaded) == 1


def test_three_bundles_compare_with_all_that_is_loaded(loaded: list[str], tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, text in ((first, "x = 1\n"), (second, "x = 2\n")):
        (folder / "custom_components").mkdir(parents=True)
        (folder / "custom_components" / "new.py").write_text(text)
    check_components(first)
    with pytest.raises(InputError, match="new.py"):
        check_components(second)


def test_a_bundle_without_components_takes_the_installed(loaded: list[str], tmp_path: Path) -> None:
    check_components(tmp_path)
    check_components(REPOSITORY / "bundles" / "segment")
    shutil.copytree(REPOSITORY / "bundles" / "segment" / "configs", tmp_path / "configs")
    check_components(tmp_path)
    assert len(loaded) == 1


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors are printed as they were before, once the test is over."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def test_start_seeds_every_generator_and_prints_errors_in_one_line(hook: None, tmp_path: Path) -> None:
    drawn = []
    for _ in range(2):
        start(tmp_path, seed=3)
        drawn.append((torch.rand(1).item(), np.random.rand()))
    assert drawn[0] == drawn[1] and isinstance(sys.excepthook, OneLineErrors)
    state = torch.get_rng_state()
    start(tmp_path)  # a run that draws no random numbers
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("keys", ({"timeout_minutes": 1.0}, {"rank_zero_alone": True}))
def test_start_without_torchrun_says_how_to_start(
    hook: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="torchrun"):
        start(tmp_path, **keys)
    assert isinstance(sys.excepthook, OneLineErrors)  # so that a person reads one line
