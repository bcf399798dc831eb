"""Contenders side by side, at several fractions of the labels, each as a run of the bundle."""

import copy
import gc
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from custom_components.errors import InputError, LeftOut, tell_left_out
from custom_components.files import replacing
from custom_components.run.keys import running
from custom_components.run.start import quietly
from monai.bundle import ConfigParser, ConfigWorkflow

logger = logging.getLogger(__name__)


def running_config() -> dict[str, Any]:
    """A copy of the config that runs now: all its files, and all overrides, with references as they are written."""
    if (run := running()) is None:
        raise RuntimeError("no config is running: a comparison is a part of one")
    return copy.deepcopy(run.parser.config)


@dataclass
class Comparison:
    """Trains and evaluates contenders at several fractions of the labels, each as a run of the bundle.

    A run is the key ``training`` of the config that compares, whatever files and overrides made it, but for a
    contender's keys, ``data_fraction``, and folders of its own for weights, tables, pictures and curves:
    ``<models_dir>/pretrained_0.1``, ``<output_dir>/pretrained_0.1``, ``<log_dir>/pretrained_0.1``. The config's key
    ``contenders`` is name -> keys that make it, such as ``{"pretrained": null}``, taken as written, so that their
    references are the run's own.

    With ``learning_rates`` every contender trains once at each, in folders such as ``pretrained_0.1_lr_0.01``, and only
    the run whose ``train#selection`` has the best validation is evaluated: each start is shown at a rate of its own.

    Args:
        report: makes tables of what the runs leave: called with fraction -> contender -> folder, and ``output_dir``;
            and with ``learning_rates`` also with ``tuning``, fraction -> contender -> ``learning_rate`` that was chosen
            and ``validation``, rate -> best validation.
        fractions: of the training items.
        log_dir: of TensorBoard's curves; None for none.
        checkpoint: what the weights of the first contender at the largest fraction are copied to; None for nothing.
        learning_rates: values of the config's key ``learning_rate`` to choose from; none leaves it as it is.
    """

    report: Callable[..., dict[str, Any]]
    fractions: Sequence[float]
    models_dir: str | Path
    output_dir: str | Path
    log_dir: str | Path | None = None
    checkpoint: str | None = None
    learning_rates: Sequence[float] = ()

    def __call__(self) -> dict[str, Any]:
        """Run all and report; returns what ``metrics.json`` holds.

        Raises:
            InputError: no contender is left, since the files that they are to start from do not exist; or volumes could
                not be read by the evaluations, once all else is done.
        """
        self.failures: dict[str, str] = {}
        config = running_config()
        contenders = {name: keys for name, keys in config["contenders"].items() if self._starts(name, config, keys)}
        if not contenders:
            raise InputError("contenders has none whose pretrained file exists: give one, or one with pretrained null")
        outputs = Path(self.output_dir)
        runs: dict[float, dict[str, Path]] = {fraction: {} for fraction in sorted(self.fractions)}
        tuning: dict[float, dict[str, dict[str, Any]]] = {fraction: {} for fraction in runs}
        for fraction, folders in runs.items():
            for name, keys in contenders.items():
                label = f"{name}_{fraction:g}"
                print(f"--- {name} at {fraction:.0%} of the labels")
                own = config | keys | {"data_fraction": fraction}
                if self.learning_rates:
                    label, tuning[fraction][name] = self._tune(own, label)
                else:
                    self._run(own, label)
                folders[name] = outputs / label
        if self.checkpoint is not None:
            self._copy(self._checkpoint(runs[max(runs)][next(iter(contenders))].name), Path(self.checkpoint))
        metrics = self.report(runs, outputs, **({"tuning": tuning} if self.learning_rates else {}))
        tell_left_out(list(self.failures.items()))
        return metrics

    def _tune(self, config: Mapping[str, Any], label: str) -> tuple[str, dict[str, Any]]:
        """Train at every rate, and evaluate the run of the best validation: its folder's name, and what was found."""
        found: dict[float, float] = {}
        for rate in self.learning_rates:
            print(f"--- learning rate {rate:g}")
            workflow = self._run(config | {"learning_rate": rate}, f"{label}_lr_{rate:g}", evaluate=False)
            value = workflow.parser.get_parsed_content("train#selection").best
            if value > max(found.values(), default=-math.inf):
                chosen, best = rate, workflow  # the others are let go: each holds its own network and volumes
            found[rate] = value
        with self._noting():
            best.parser.get_parsed_content("evaluation")()
        validation = {f"{rate:g}": value for rate, value in found.items()}
        return f"{label}_lr_{chosen:g}", {"learning_rate": chosen, "validation": validation}

    def _checkpoint(self, label: str) -> Path:
        return Path(self.models_dir) / label / "model.pt"

    @staticmethod
    def _copy(weights: Path, target: Path) -> None:
        """With what lies beside them, which says how they are to be used."""
        for suffix in (weights.suffix, ".json"):
            if weights.with_suffix(suffix).is_file():
                with replacing(target.with_suffix(suffix)) as temporary:
                    shutil.copy(weights.with_suffix(suffix), temporary)

    def _run(self, config: Mapping[str, Any], label: str, evaluate: bool = True) -> ConfigWorkflow:
        """``monai.bundle.run`` of a config that is no file, and that may hold what JSON cannot, in its own folders."""
        own = {
            "models_dir": str(self._checkpoint(label).parent),
            "output_dir": str(Path(self.output_dir) / label),
            "log_dir": None if self.log_dir is None else str(Path(self.log_dir) / label),
            "checkpoint": str(self._checkpoint(label)),
            "evaluate_after_training": evaluate,
        }
        gc.collect()  # of the run before, whose parts refer to each other
        with quietly():
            config = copy.deepcopy({**config, **own})
            workflow = ConfigWorkflow(None, {}, logging_file=False, run_id="training", **config)
        workflow.initialize()
        with self._noting():
            workflow.run()
        workflow.finalize()
        return workflow

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Keeps for the end what an evaluation says, in the end, of volumes that it could not read."""
        try:
            yield
        except Exception as error:
            cause: BaseException | None = error  # MONAI wraps what an expression of a config raises
            while cause is not None and not isinstance(cause, LeftOut):
                cause = cause.__cause__
            if cause is None:
                raise
            self.failures |= dict(cause.failures)

    @staticmethod
    def _starts(name: str, config: Mapping[str, Any], keys: Mapping[str, Any]) -> bool:
        """Whether what a contender is to start from exists; a warning if not."""
        parser = ConfigParser(copy.deepcopy(config))
        parser.update(copy.deepcopy(keys))
        start = "encoder#checkpoint" if "encoder#checkpoint" in parser else "pretrained"
        pretrained = parser.get_parsed_content(start, default=None)
        if pretrained is None or Path(pretrained).is_file():
            return True
        logger.warning(
            f"pretrained {pretrained} DOES NOT EXIST: contender {name} is left out and nothing is "
            "compared; run the pretrain bundle's demo first, or give the path of an encoder.pt"
        )
        return False
