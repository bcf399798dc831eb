"""Contenders side by side, at several fractions of the labels, each as a run of the bundle."""

import copy
import gc
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from traceback import walk_stack
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow

from custom_components.errors import InputError

logger = logging.getLogger(__name__)


def running_config() -> dict[str, Any]:
    """A copy of the config that runs now: all its files, and all overrides, with references as they are written.

    MONAI hands a component only what its own item says, so the parser is the one that called, some frames above.
    """
    for frame, _ in walk_stack(None):
        if isinstance(frame.f_locals.get("self"), ConfigParser):
            return copy.deepcopy(frame.f_locals["self"].config)
    raise RuntimeError("no config is running: a comparison is a part of one")


@dataclass
class Comparison:
    """Trains and evaluates contenders at several fractions of the labels, each as a run of the bundle.

    A run is the key ``training`` of the config that compares, whatever files and overrides made it, but for a
    contender's keys, ``data_fraction``, and folders of its own for weights, tables, pictures and curves:
    ``<models_dir>/pretrained_0.1`` and ``<output_dir>/pretrained_0.1``. The config's key ``contenders`` is name -> keys
    that make it, such as ``{"pretrained": null}``, taken as written, so that their references are the run's own.

    Args:
        report: makes tables of what the runs leave: called with fraction -> contender -> folder, and ``output_dir``.
        fractions: of the training items.
        checkpoint: what the weights of the first contender at the largest fraction are copied to; None for nothing.
    """

    report: Callable[[Mapping[float, Mapping[str, Path]], Path], dict[str, Any]]
    fractions: Sequence[float]
    models_dir: str | Path
    output_dir: str | Path
    checkpoint: str | None = None

    def __call__(self) -> dict[str, Any]:
        """Run all and report; returns what ``metrics.json`` holds.

        Raises:
            InputError: no contender is left, since the files that they are to start from do not exist.
        """
        config = running_config()
        contenders = {name: keys for name, keys in config["contenders"].items() if self._starts(name, config | keys)}
        if not contenders:
            raise InputError("contenders has none whose pretrained file exists: give one, or one with pretrained null")
        models, outputs = Path(self.models_dir), Path(self.output_dir)
        runs: dict[float, dict[str, Path]] = {fraction: {} for fraction in sorted(self.fractions)}
        for fraction, folders in runs.items():
            for name, keys in contenders.items():
                label = f"{name}_{fraction:g}"
                print(f"--- {name} at {fraction:.0%} of the labels")
                folders[name] = outputs / label
                own = {
                    "data_fraction": fraction,
                    "models_dir": str(models / label),
                    "output_dir": str(outputs / label),
                    "checkpoint": str(models / label / "model.pt"),
                    "evaluate_after_training": True,
                }
                self._run(config | keys | own)
                gc.collect()
        if self.checkpoint is not None:
            shutil.copy(models / f"{next(iter(contenders))}_{max(runs):g}" / "model.pt", self.checkpoint)
        return self.report(runs, outputs)

    @staticmethod
    def _run(config: Mapping[str, Any]) -> None:
        """``monai.bundle.run`` of a config that is no file, and that may hold what JSON cannot."""
        workflow = ConfigWorkflow(None, {}, logging_file=False, run_id="training", **copy.deepcopy(config))
        workflow.initialize()
        workflow.run()
        workflow.finalize()

    @staticmethod
    def _starts(name: str, config: Mapping[str, Any]) -> bool:
        """Whether what a contender is to start from exists; a warning if not."""
        pretrained = ConfigParser(copy.deepcopy(config)).get_parsed_content("pretrained", default=None)
        if pretrained is None or Path(pretrained).is_file():
            return True
        logger.warning(
            f"pretrained {pretrained} DOES NOT EXIST: contender {name} is left out and nothing is "
            "compared; run the pretrain bundle's demo first, or give the path of an encoder.pt"
        )
        return False
