"""Contenders side by side, at several fractions of the labels, each as a run of the bundle."""

from __future__ import annotations

import csv
import gc
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import monai.bundle
import numpy as np

from custom_components.errors import InputError
from custom_components.evaluation import figures
from custom_components.evaluation.metrics import mean_interval
from custom_components.evaluation.report import print_table

logger = logging.getLogger(__name__)


class Comparison:
    """Trains and evaluates contenders at several fractions of the labels, each as a bundle run of its own.

    Writes ``metrics.json``: ``dice`` by fraction and contender (``mean``, ``low``, ``high``, ``per_class``), and
    ``difference`` of the first contender to each other, paired over scans; ``metrics.csv`` and ``comparison.png``.
    Every run leaves its own tables, pictures and TensorBoard curves in a folder below. The weights of the first
    contender at the largest fraction become ``<models_dir>/model.pt``.

    Args:
        config_file: the configs of a single run.
        run_id: what those configs call training and evaluation.
        contenders: name -> keys that make it, such as ``{"pretrained": null}``.
        fractions: of the training items.
        overrides: keys that every run gets.
        models_dir, output_dir: as in the configs.
    """

    def __init__(
        self,
        config_file: Sequence[str],
        run_id: str,
        contenders: Mapping[str, Mapping[str, Any]],
        fractions: Sequence[float],
        overrides: Mapping[str, Any],
        models_dir: str,
        output_dir: str,
    ) -> None:
        self.config_file = [str(path) for path in config_file]
        self.run_id = run_id
        self.contenders = {name: dict(keys) for name, keys in contenders.items()}
        self.fractions = sorted(fractions)
        self.overrides = dict(overrides)
        self.models_dir = Path(models_dir)
        self.output_dir = Path(output_dir)
        for name, keys in list(self.contenders.items()):
            if keys.get("pretrained") and not Path(keys["pretrained"]).is_file():
                logger.warning(
                    f"pretrained {keys['pretrained']} DOES NOT EXIST: contender {name} is left out and nothing is "
                    "compared; run the pretrain bundle's demo first, or give the path of an encoder.pt"
                )
                del self.contenders[name]
        if not self.contenders:
            raise InputError("contenders has none whose pretrained file exists: give one, or one with pretrained null")

    def __call__(self) -> dict[str, Any]:
        """Run all, print the table, write it; returns what ``metrics.json`` holds."""
        found: dict[str, dict[str, Any]] = {}
        for fraction in self.fractions:
            for name, keys in self.contenders.items():
                label = f"{name}_{fraction:g}"
                print(f"--- {name} at {fraction:.0%} of the labels")
                keys = {
                    **self.overrides,
                    **keys,
                    "data_fraction": fraction,
                    "models_dir": str(self.models_dir / label),
                    "output_dir": str(self.output_dir / label),
                }
                # MONAI takes an override of None for none given
                keys = {key: "$None" if value is None else value for key, value in keys.items()}
                monai.bundle.run(self.run_id, config_file=self.config_file, **keys)
                gc.collect()
                found.setdefault(f"{fraction:g}", {})[name] = json.loads(
                    (self.output_dir / label / "metrics.json").read_text()
                )
        first, largest = next(iter(self.contenders)), self.fractions[-1]
        shutil.copy(self.models_dir / f"{first}_{largest:g}" / "model.pt", self.models_dir / "model.pt")

        metrics = {
            "seed": next(iter(found["%g" % largest].values()))["seed"],
            "dice": {fraction: {name: run["dice"] for name, run in runs.items()} for fraction, runs in found.items()},
            "difference": {fraction: self._differences(runs) for fraction, runs in found.items()},
        }
        (self.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        rows = self._rows(metrics)
        with open(self.output_dir / "metrics.csv", "w", newline="") as file:
            csv.writer(file).writerows([("fraction", "contender", "of", "dice", "interval"), *rows])
        figures.bars(
            {f"{float(fraction):.0%} of the labels": runs for fraction, runs in metrics["dice"].items()},
            "foreground Dice",
            self.output_dir / "comparison.png",
        )
        print_table(rows)
        print(f"tables and figures: {self.output_dir.resolve()}")
        return metrics

    @staticmethod
    def _differences(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        scans = {name: np.array(run["dice"]["per_scan"], dtype=float) for name, run in runs.items()}
        first, *others = scans
        return {
            f"{first} - {other}": mean_interval(scans[first] - scans[other], runs[first]["seed"]) for other in others
        }

    @staticmethod
    def _rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
        rows = []
        for fraction, runs in metrics["dice"].items():
            for name, entry in runs.items():
                for of, e in [("foreground mean", entry), *entry["per_class"].items()]:
                    rows.append((fraction, name, of, f"{e['mean']:.3f}", f"{e['low']:.3f} to {e['high']:.3f}"))
            for name, e in metrics["difference"][fraction].items():
                rows.append((fraction, name, "paired", f"{e['mean']:+.3f}", f"{e['low']:+.3f} to {e['high']:+.3f}"))
        return rows
