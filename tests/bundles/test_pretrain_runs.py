"""Pre-training that is killed, that runs in several processes, or out of disk, through the real command line.

torchrun starts processes of its own; the others are forked, see :mod:`tests.bundles.jobs`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from custom_components.data import phantom
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.bundles.jobs import Job, arguments, serving, until
from tests.watch import runs, within

BUNDLE = Path(__file__).parents[2] / "bundles" / "pretrain"
CONFIGS = ["configs/train.json", "configs/demo.json"]
MULTI_GPU = "configs/multi_gpu_train.json"
# three steps of the optimiser in each of two epochs, the last of each of one batch; a checkpoint after every step
TINY = {
    "max_epochs": 2,
    "warmup_epochs": 1,
    "batch_size": 2,
    "effective_batch_size": 4,
    "checkpoint_interval": 1,
    "checkpoint_minutes": 0,
    "num_layers": 1,
    "report_decoder_layers": 1,
    "flip_prob": "[0.5,0.5,0.5]",
    "shift_prob": 1.0,
    "text_cache_size": 0,  # else features are rounded as the batch was that they were first read in
}


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen]:
    with serving() as process:
        yield process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundle with a cohort of ten volumes."""
    folder = tmp_path_factory.mktemp("bundle") / "pretrain"
    shutil.copytree(BUNDLE, folder, ignore=shutil.ignore_patterns("models", "eval", "data"))
    phantom.cohort(folder / "data" / "phantom", num_train=10, num_valid=2, num_workers=1)
    return folder


@pytest.fixture
def start(server: subprocess.Popen, folder: Path, tmp_path: Path) -> Callable[..., Job]:
    """Starts the bundle's ``run``; writes to ``tmp_path`` unless told."""

    def call(configs: list[str] = CONFIGS, **keys: object) -> Job:
        paths = {"dataset_dir": folder / "data" / "phantom", "models_dir": tmp_path / "m", "output_dir": tmp_path / "e"}
        return Job(server, folder, arguments(configs, paths | TINY | keys), tmp_path)

    return call


HOLDS = """
import sys
from pathlib import Path
from custom_components.errors import InputError
try:
    from custom_components.files import only_writer
    with only_writer(Path(sys.argv[1], ".lock"), "models_dir", "models_dir"):
        print("not refused")
except InputError as error:
    print(error)
"""


def weights(models_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(models_dir / "checkpoint.pt", weights_only=True)["network"]


def curve(output_dir: Path, tag: str = "loss/total") -> list[tuple[int, float]]:
    events = EventAccumulator(str(output_dir / "tensorboard")).Reload().Scalars(tag)
    return [(event.step, event.value) for event in events]


def one_error(stderr: str, *words: str) -> None:
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, stderr
    assert all(word in lines[0] for word in words), lines[0]


@pytest.fixture(scope="module")
def unbroken(server: subprocess.Popen, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that nobody interrupted: models in ``m``, results in ``e``."""
    output = tmp_path_factory.mktemp("unbroken")
    paths = {"dataset_dir": folder / "data" / "phantom", "models_dir": output / "m", "output_dir": output / "e"}
    keys = TINY | {"evaluate_after_training": False, "num_workers": 0}
    job = Job(server, folder, arguments(CONFIGS, paths | keys), output)
    assert job.wait() == 0, job.stderr
    return output


def test_the_schedule_goes_by_steps_of_the_optimiser(unbroken: Path) -> None:
    """Five iterations per epoch, two of them a step, the last alone: warm-up in epoch 1, cosine in epoch 2."""
    rates = [0, 1 / 3, 2 / 3, 1, 0.75, 0.25]
    expected = [rates[step] for step in (0, 0, 1, 1, 2, 3, 3, 4, 4, 5)]
    assert dict(curve(unbroken / "e", "lr")) == pytest.approx({i + 1: 4e-3 * rate for i, rate in enumerate(expected)})
    assert torch.load(unbroken / "m" / "checkpoint.pt", weights_only=True)["lr_scheduler"]["last_epoch"] == 6


def test_a_run_killed_three_times_ends_with_the_weights_of_an_unbroken_one(
    unbroken: Path, start: Callable[..., Job], tmp_path: Path
) -> None:
    """In training, as it writes a checkpoint, and in its evaluation; each time started by the same command."""
    models, keys = tmp_path / "m", {"num_workers": 2, "cache_rate": 0.0}
    job = start(**keys)
    # in training: the bar has shown a loss after the first checkpoint
    job.kill_when(lambda: (models / "checkpoint.pt").exists() and (models / "checkpoint_previous.pt").exists())
    first = torch.load(models / "checkpoint.pt", weights_only=True)["trainer"]
    assert first["iteration"] % 5 != 0, "in the midst of an epoch"

    job = start(**keys)
    job.kill_when(lambda: any(models.glob(".*.tmp.checkpoint.pt")))
    assert "going on in epoch" in job.stdout and f"after iteration {first['iteration']}" in job.stdout
    assert any(models.glob(".*.tmp.checkpoint.pt"))
    assert torch.load(models / "checkpoint.pt", weights_only=True)["trainer"]["iteration"] >= first["iteration"]

    job = start(**keys)
    job.kill_when(lambda: "held-out volumes" in job.stderr)
    assert not any(models.glob(".*.tmp.*")), "what the killed run had left"
    assert not (tmp_path / "e" / "metrics.json").exists()

    job = start(**keys)
    assert job.wait() == 0, job.stderr
    assert "training has had 2 of 2 epochs and is finished" in job.stdout
    assert (tmp_path / "e" / "metrics.json").exists()
    torch.testing.assert_close(weights(models), weights(unbroken / "m"), atol=0, rtol=0)
    # the last word of the curve on each iteration; from random numbers that go another way it would be another curve
    assert dict(curve(tmp_path / "e")) == dict(curve(unbroken / "e"))
    for name in ("encoder.pt", "model.pt"):
        assert (models / name).exists()
    assert not [name for name in weights(models) if name.startswith("text_encoder")], "it has a folder of its own"


def test_a_signal_to_all_processes_ends_a_run_after_its_step_and_a_second_run_is_refused_meanwhile(
    unbroken: Path, start: Callable[..., Job], tmp_path: Path
) -> None:
    keys = {"num_workers": 2, "cache_rate": 0.0, "checkpoint_minutes": 60, "evaluate_after_training": False}
    job = start(**keys)
    until(lambda: "epoch 1/2" in job.stderr, lambda: runs(job.pid))
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "m")], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert f"process {job.pid} on {socket.gethostname()}" in other.communicate(timeout=60)[0]
    children = job.hit(signal.SIGTERM, group=True)
    assert job.wait() == 75
    told = [line for line in job.stderr.splitlines() if line.startswith("SIGTERM: ")]
    assert len(told) == 1 and "checkpoint.pt holds the training up to iteration" in told[0]
    assert "Traceback" not in job.stderr and "Traceback" not in job.stdout
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["checkpoint.pt"]
    assert children and within(10, lambda: not any(map(runs, children)))
    job = start(**keys)
    assert job.wait() == 0, job.stderr
    assert "going on in epoch 1 of 2" in job.stdout
    torch.testing.assert_close(weights(tmp_path / "m"), weights(unbroken / "m"), atol=0, rtol=0)


def test_a_finished_run_refuses_another_recipe_until_told(unbroken: Path, start: Callable[..., Job]) -> None:
    keys = {"evaluate_after_training": False, "models_dir": unbroken / "m", "negatives": "report"}
    job = start(**keys)
    assert job.wait() == 1
    one_error(job.stderr, "negatives was volume and is report", "--resume null")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_told_and_leaves_the_last_good_checkpoint(start: Callable[..., Job], tmp_path: Path) -> None:
    models = tmp_path / "m"
    models.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=70m", "tmpfs", models]).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        job = start(evaluate_after_training=False)
        assert job.wait() == 1
        one_error(job.stderr, "checkpoint.pt", "space")
        assert "Traceback" not in job.stderr
        assert [p.name for p in models.iterdir()] == ["checkpoint.pt"]
        saved = torch.load(models / "checkpoint.pt", weights_only=True)
        assert saved["trainer"]["iteration"] == 2
    finally:
        subprocess.run(["umount", models], check=True)


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_files(start: Callable[..., Job], tmp_path: Path) -> None:
    job = start(learning_rate=1e30, warmup_epochs=0)
    assert job.wait() == 1
    one_error(job.stderr, "the loss is", "at iteration 3", "train_", "lower learning_rate")
    saved = torch.load(tmp_path / "m" / "checkpoint.pt", weights_only=True)
    assert saved["trainer"]["iteration"] == 2


# several processes

FIXED = """
import zlib
import torch
from torch import nn

def fixed(network):
    '''No dropout, and masks that follow from the volume's content: what is random per process is taken out.'''
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def draw_masks(volume):
        orders = []
        for image in volume:
            generator = torch.Generator().manual_seed(zlib.crc32(image.numpy().tobytes()))
            orders.append(torch.rand(network.encoder.num_patches, generator=generator).argsort())
        order, masked = torch.stack(orders), network.encoder.num_patches // 2
        return order[:, masked:], order[:, :masked]

    network.draw_masks = draw_masks
    return network
"""
OVERLAY = {
    "network": {"_target_": "fixed_masks.fixed", "network": "$@network_def.to(@device)"},
    # Adam makes whole steps of gradients that are zero but for rounding
    "optimizer": {"_target_": "torch.optim.SGD", "params": "$@network.parameters()", "lr": 0.02, "momentum": 0.9},
    "text_mask_ratio": 1.0,
    # what a process draws for itself
    "align_ratio": None,
    "encode_ratio": 1.0,
}


@pytest.fixture
def torchrun(folder: Path, tmp_path: Path) -> Callable[..., subprocess.Popen]:
    """Starts ``torchrun``, which writes to ``tmp_path``."""

    def call(options: list[str], configs: list[str], name: str, **keys: object) -> subprocess.Popen:
        paths = {"dataset_dir": folder / "data" / "phantom", "models_dir": tmp_path / "m", "output_dir": tmp_path / "e"}
        command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "monai.bundle", "run"]
        command += arguments([*configs, MULTI_GPU], paths | TINY | keys)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
        with open(tmp_path / name, "w") as log:
            return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)

    return call


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(pid) for pid in children]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def test_two_processes_train_as_one_does_also_after_one_was_killed(
    server: subprocess.Popen, folder: Path, torchrun: Callable, tmp_path: Path
) -> None:
    """Two processes x batch 1 against one x batch 2; the second time as two machines."""
    (tmp_path / "fixed_masks.py").write_text(FIXED)
    (tmp_path / "fixed.json").write_text(json.dumps(OVERLAY))
    configs, keys = [*CONFIGS, str(tmp_path / "fixed.json")], {"evaluate_after_training": False}
    launcher = torchrun(["--nproc_per_node=2"], configs, "killed.txt", batch_size=1, **keys)
    until((tmp_path / "m" / "checkpoint.pt").exists, lambda: launcher.poll() is None)
    os.kill(ranks_of(launcher)[1], signal.SIGKILL)
    killed = time.monotonic()
    assert launcher.wait(300) != 0
    assert time.monotonic() - killed < 60
    log = (tmp_path / "killed.txt").read_text()
    assert "exitcode  : -9" in log and "rank      : 1" in log

    endpoint = ["--nnodes=2", "--nproc_per_node=1", f"--rdzv_endpoint=localhost:{free_port()}", "--rdzv_backend=c10d"]
    machines = [torchrun(endpoint, configs, f"machine{i}.txt", batch_size=1, **keys) for i in (0, 1)]
    assert [machine.wait(300) for machine in machines] == [0, 0], (tmp_path / "machine0.txt").read_text()
    told = [(tmp_path / f"machine{i}.txt").read_text() for i in (0, 1)]
    assert sum("epoch 2/2" in text for text in told) == sum("going on in epoch" in text for text in told) == 1
    assert {p.name for p in (tmp_path / "m").iterdir()} == {
        "checkpoint.pt", "checkpoint_previous.pt", "encoder.pt", "encoder.json", "model.pt", "model.json"
    }  # fmt: skip
    assert len(list((tmp_path / "e" / "tensorboard").iterdir())) == 2, "one file of events per run, not per process"

    paths = {"dataset_dir": folder / "data" / "phantom", "models_dir": tmp_path / "1", "output_dir": tmp_path / "1e"}
    job = Job(server, folder, arguments(configs, paths | TINY | keys), tmp_path)
    assert job.wait() == 0, job.stderr
    together, alone = dict(curve(tmp_path / "e")), dict(curve(tmp_path / "1e"))
    assert together.keys() == alone.keys() == set(range(1, 11))
    assert together == pytest.approx(alone, rel=1e-4)
    before = torch.load(tmp_path / "1" / "checkpoint.pt", weights_only=True)["network"]
    torch.testing.assert_close(weights(tmp_path / "m"), before, atol=2e-6, rtol=1e-4)


def test_a_signal_to_torchrun_ends_all_after_one_step_and_an_odd_number_of_volumes_trains_as_in_one_process(
    server: subprocess.Popen, folder: Path, torchrun: Callable, tmp_path: Path
) -> None:
    """Nine volumes on two processes: the last batch has one, which both take."""
    (tmp_path / "fixed_masks.py").write_text(FIXED)
    (tmp_path / "fixed.json").write_text(json.dumps(OVERLAY))
    (tmp_path / "left_out.csv").write_text("name\ntrain_3_a_1\n")
    configs = [*CONFIGS, str(tmp_path / "fixed.json")]
    keys = {"evaluate_after_training": False, "exclude": tmp_path / "left_out.csv", "checkpoint_minutes": 60}
    launcher = torchrun(["--nproc_per_node=2"], configs, "asked.txt", batch_size=1, **keys)
    log = tmp_path / "asked.txt"
    until(lambda: "epoch 1/2" in log.read_text(), lambda: launcher.poll() is None)
    ranks = ranks_of(launcher)
    launcher.terminate()
    assert launcher.wait(60) != 0
    told = [line for line in log.read_text().splitlines() if "checkpoint.pt holds the training up to" in line]
    assert len(told) == 1 and "SIGTERM: " in told[0], log.read_text()
    assert (tmp_path / "m" / "checkpoint.pt").exists() and not any(map(runs, ranks))

    launcher = torchrun(["--nproc_per_node=2"], configs, "again.txt", batch_size=1, **keys)
    assert launcher.wait(300) == 0, (tmp_path / "again.txt").read_text()
    paths = {"dataset_dir": folder / "data" / "phantom", "models_dir": tmp_path / "1", "output_dir": tmp_path / "1e"}
    job = Job(server, folder, arguments(configs, paths | TINY | keys), tmp_path)
    assert job.wait() == 0, job.stderr
    assert dict(curve(tmp_path / "e")) == pytest.approx(dict(curve(tmp_path / "1e")), rel=1e-4)
    before = torch.load(tmp_path / "1" / "checkpoint.pt", weights_only=True)["network"]
    torch.testing.assert_close(weights(tmp_path / "m"), before, atol=2e-6, rtol=1e-4)


def test_an_error_in_one_process_ends_all_with_one_line(folder: Path, torchrun: Callable, tmp_path: Path) -> None:
    shutil.copytree(folder / "data" / "phantom", tmp_path / "cohort")
    volume = next((tmp_path / "cohort" / "dataset" / "train_fixed").glob("train_3/*/*.nii.gz"))
    volume.write_bytes(volume.read_bytes()[:5_000])
    keys = {"dataset_dir": tmp_path / "cohort", "cache_rate": 0.0, "batch_size": 1, "num_workers": 1}
    launcher = torchrun(["--nproc_per_node=2"], CONFIGS, "log.txt", **keys)
    assert launcher.wait(300) == 1
    one_error((tmp_path / "log.txt").read_text(), "train_3_a_1.nii.gz", "cannot be read")
