"""Random kills and signals over pretrain, classify, segment, prepare: ``python -m tests.benchmarks.soak --count 200``.

Each run is hit at a random moment, once or more, by SIGKILL, SIGTERM, SIGINT or SIGUSR1, to itself or to all of its
processes, and started again by the same command until it is done. Its end state must then be bit for bit that of a run
that nobody disturbed, with nothing left behind.
"""

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from custom_components.data import phantom
from custom_components.processes import TRY_AGAIN

from tests.bundles.jobs import BUNDLES, Job, arguments, serving
from tests.watch import runs, within

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SMALL = {"num_layers": 1, "num_workers": 1, "evaluate_after_training": True, "img_size": "[40,40,20]"}
SMALL |= {"pixdim": "[8.0,8.0,16.0]"}
TRAINING = ["train", "demo"]
PROGRAMS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "pretrain": (
        "pretrain",
        TRAINING,
        SMALL
        | {"max_epochs": 3, "warmup_epochs": 1, "batch_size": 2, "effective_batch_size": 4, "report_decoder_layers": 1}
        | {"text_cache_size": 0, "cache_rate": 0.0},
    ),
    "classify": (
        "classify",
        TRAINING,
        SMALL | {"max_steps": 30, "warmup_steps": 2, "batch_size": 4, "num_resamples": 2, "pretrained": "null"}
        | {"compare_after_training": False},
    ),
    "segment": (
        "segment",
        TRAINING,
        SMALL
        | {"max_epochs": 3, "warmup_epochs": 1, "val_interval": 1, "num_samples": 1, "eval_figures": 1}
        | {"feature_size": 4, "pretrained": "null", "procedure": "@training", "cache_rate": 0.0}
        | {"datalist#num_validation": 2},
    ),
    "prepare": ("pretrain", ["prepare"], {"num_workers": 2, "contact_sheet_volumes": 1, "min_lung_share": 0.0}),
}  # fmt: skip
CHANGES = ("seconds", "finished", "source_stamp")  # columns of a manifest that no two runs share
TIMES = ("events.out",)  # curves hold the time of day


@dataclass
class Soak:
    """Programs on a small cohort in ``folder``, each with the state that an undisturbed run of it has left.

    Args:
        server: see :mod:`tests.bundles.jobs`.
        programs: of PROGRAMS.
    """

    server: subprocess.Popen
    folder: Path
    programs: Sequence[str] = tuple(PROGRAMS)

    def __post_init__(self) -> None:
        phantom.cohort(self.folder / "cohort", 8, 6, (40, 40, 20), (8.0, 8.0, 16.0), num_workers=1)
        for bundle in {PROGRAMS[name][0] for name in self.programs}:
            ignored = shutil.ignore_patterns("models", "eval", "data")
            shutil.copytree(BUNDLES / bundle, self.folder / bundle, ignore=ignored)
        self.seconds: dict[str, float] = {}
        self.expected: dict[str, dict[str, str]] = {}
        for name in self.programs:
            begun, job = time.monotonic(), self.start(name, self.folder / f"{name}_undisturbed")
            assert job.wait() == 0, job.stderr
            self.seconds[name] = time.monotonic() - begun
            self.expected[name] = state(self.folder / f"{name}_undisturbed")

    def start(self, name: str, output: Path) -> Job:
        bundle, configs, keys = PROGRAMS[name]
        output.mkdir(exist_ok=True)
        paths = {"dataset_dir": self.folder / "cohort"}
        if name == "prepare":
            paths["prepared_dir"] = output / "prepared"
        else:
            paths |= {"models_dir": output / "models", "output_dir": output / "eval"}
            if name == "classify":
                paths["features_dir"] = output / "features"
        files = [f"configs/{config}.json" for config in configs]
        return Job(self.server, self.folder / bundle, arguments(files, paths | keys), output)

    def disturb(self, rng: random.Random, most: int) -> Counter:
        """Hit a random program up to ``most`` times, let it end, and compare; how often what hit it."""
        name, output = rng.choice(self.programs), Path(tempfile.mkdtemp(dir=self.folder))
        hits: Counter = Counter()
        for _ in range(rng.randint(1, most)):
            job = self.start(name, output)
            number, group = rng.choice(SIGNALS), rng.random() < 0.5
            if within(rng.uniform(0, self.seconds[name]), lambda job=job: not runs(job.pid)):
                assert job.wait() == 0, job.stderr  # before it was hit
                break
            children = job.hit(number, group)
            code = job.wait()
            hits[f"{name} {number.name}"] += 1
            assert code in (0, TRY_AGAIN, -number), f"{name}, {number.name}: exit code {code}\n{job.stderr}"
            assert within(20, lambda: not any(map(runs, children))), f"{name}: processes outlive {number.name}"
        job = self.start(name, output)
        assert job.wait() == 0, f"{name} after {dict(hits)}:\n{job.stderr}"
        found, expected = state(output), self.expected[name]
        different = {file for file in found.keys() | expected.keys() if found.get(file) != expected.get(file)}
        assert not different, f"{name} after {dict(hits)}: {sorted(different)} differ"
        shutil.rmtree(output)
        return hits


def state(output: Path) -> dict[str, str]:
    """What a run has left, file -> hash of what it means."""
    found = {}
    for path in sorted(output.rglob("*")):
        name = str(path.relative_to(output))
        # a training that ended before its first checkpoint's successor has none before it
        if not path.is_file() or path.name.startswith(TIMES) or path.suffix == ".png" or path.parent == output:
            continue
        if "previous" in path.name:
            continue
        found[name] = hashlib.sha256(_meaning(path)).hexdigest()
    return found


def _meaning(path: Path) -> bytes:
    if path.name == "checkpoint.pt":  # zipped with what is no part of the state
        return repr(_plain(torch.load(path, weights_only=True))).encode()
    if path.suffix == ".pt":
        return repr(_plain(torch.load(path, weights_only=True))).encode()
    if path.suffix == ".json" and path.parent.name == "models":
        told = json.loads(path.read_text())
        return json.dumps({key: value for key, value in told.items() if key in ("settings", "sha256")}).encode()
    if path.name == "manifest.csv" or path.parent.name == "manifest":
        table = pd.read_csv(path, dtype=str)
        table = table.drop_duplicates("name", keep="last").sort_values("name")
        return table.drop(columns=list(CHANGES)).to_csv(index=False).encode()
    if path.name == "summary.md":
        return b"".join(line for line in path.read_bytes().splitlines() if not line.startswith(b"| seconds"))
    return path.read_bytes()


def _plain(content: Any) -> Any:
    if isinstance(content, torch.Tensor):
        array = content.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return tuple(content.shape), hashlib.sha256(array).hexdigest()
    if isinstance(content, dict):
        # paths of this run; what else a checkpoint says of itself is compared
        return {key: _plain(value) for key, value in sorted(content.items(), key=str) if key != "description"}
    return [_plain(value) for value in content] if isinstance(content, (list, tuple)) else content


def soak(server: subprocess.Popen, folder: Path, count: int, seed: int, programs: Sequence[str], most: int) -> Counter:
    """Hit the programs ``count`` times in all; how often what hit them."""
    rng, hits = random.Random(seed), Counter()
    run = Soak(server, folder, programs)
    while hits.total() < count:
        hits += run.disturb(rng, min(most, count - hits.total()))
        print(f"{hits.total()} of {count}", flush=True)
    return hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="kills and signals in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=4, help="kills and signals of one run")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serving() as server:
        hits = soak(server, Path(folder), options.count, options.seed, options.programs, options.most)
    for what, number in sorted(hits.items()):
        print(f"{number:4} {what}")
    print(f"{hits.total()} in all: every run ended bit for bit as if nobody had disturbed it")


if __name__ == "__main__":
    main()
