"""Two processes with gloo against one that has both batches: losses, gradients, accumulation, and what ends them.

The processes are forked from one that has imported what they need; this file is also their program.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from custom_components.data import phantom
from custom_components.distributed import (
    accumulation_steps,
    gather_rows,
    leave_to_rank_zero,
    local_device,
    mean_over_ranks,
    start,
)
from custom_components.errors import InputError
from custom_components.losses import MaskedReportLoss, MaskedVolumeLoss, SimCroPLoss, SimilarityAlignmentLoss
from custom_components.run.handlers import OptimizerSteps
from custom_components.run.seeded import SeededDataLoader
from custom_components.simcrop import InstanceProjection
from ignite.engine import Events
from monai.data import Dataset
from monai.engines import SupervisedTrainer
from monai.transforms import Compose, RandScaleIntensityd
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

# sentences in the reports of four volumes; each process has two of them
REPORTS = [(3, 2, 1, 4), (1, 1, 2, 3), (0, 0, 2, 1), (2, 0, 0, 0), (0, 0, 0, 0)]


class Toy(nn.Module):
    """Projects patches, sentences and tokens, as far as the losses are concerned."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.sentence, self.token = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(6, 9)
        self.instance = InstanceProjection(6, 5)

    def forward(
        self, patches: Tensor, sentences: Tensor, sentence_hash: Tensor, tokens: Tensor, labels: Tensor
    ) -> dict:
        hidden = labels != -100
        return {
            "volume_pred": self.patch(patches),
            "volume_target": patches[..., :5],
            "patch_features": self.patch(patches),
            "sentence_features": self.sentence(sentences),
            "sentence_hash": sentence_hash,
            "instance_features": self.instance(patches.mean(1, keepdim=True)),
            "report_logits": self.token(tokens[hidden]),
            "report_target": labels[hidden],
        }


def batch_of(counts: tuple[int, ...], volumes: slice) -> list[Tensor]:
    """Some of four volumes; the padding is that of the volumes in the batch. Volumes 0 and 2 share a sentence."""
    generator = torch.Generator().manual_seed(1)
    number = torch.arange(1, 1 + 4 * 4).reshape(4, 4)
    number[2, 0] = number[0, 0]
    number = number * (torch.arange(4) < torch.tensor(counts)[:, None])
    labels = torch.randint(0, 9, (4, 7), generator=generator)
    masked = torch.rand(4, 7, generator=generator) < torch.tensor([0.9, 0.6, 0.3, 0.0])[:, None]
    patches, sentences = torch.randn(4, 8, 6, generator=generator), torch.randn(4, 4, 6, generator=generator)
    tokens = torch.randn(4, 7, 6, generator=generator)
    longest = max(counts[volumes])
    return [
        patches[volumes],
        sentences[volumes, :longest],
        number[volumes, :longest],
        tokens[volumes],
        torch.where(masked, labels, -100)[volumes],
    ]


def losses(negatives: str, pool: str) -> SimCroPLoss:
    alignment = SimilarityAlignmentLoss(3, 0.07, negatives, pool, 10.0)
    instance = SimilarityAlignmentLoss(1, 0.07, "volume")
    weights = {"volume": 1.0, "alignment": 2.0, "report": 0.5, "instance": 0.5}
    return SimCroPLoss(weights, MaskedVolumeLoss(), alignment, MaskedReportLoss(), instance)


def result(network: nn.Module, loss: SimCroPLoss, batch: list[Tensor]) -> dict[str, Tensor]:
    pred = network(*batch)
    total = loss(pred)
    total.backward()
    gradients = {name.removeprefix("module."): p.grad for name, p in network.named_parameters()}
    return {"total": total.detach()} | {k: v.detach() for k, v in loss.parts(pred).items()} | gradients


def check_losses(rank: int, expected: dict) -> None:
    for case, values in expected.items():
        network = DistributedDataParallel(Toy())
        own = slice(2 * rank, 2 * rank + 2)
        found = result(network, losses(*case[1:]), batch_of(case[0], own))
        torch.testing.assert_close(found, values, atol=1e-6, rtol=1e-4, msg=lambda text, case=case: f"{case}: {text}")


def check_gathering(rank: int) -> None:
    rows = torch.full((rank + 1, 2), float(rank + 1), requires_grad=True)
    parts = gather_rows(rows)
    assert [part.shape for part in parts] == [(1, 2), (2, 2)]
    assert [part.unique().item() for part in parts] == [1.0, 2.0]
    sum((i + 1) * part.sum() for i, part in enumerate(parts)).backward()
    assert rows.grad.unique().item() == 2.0 * (rank + 1), "both processes' gradients"
    mean = torch.tensor(float(rank), requires_grad=True)
    assert mean_over_ranks(mean, 3 * rank).item() == 1.0, "rank 0 has nothing"
    assert accumulation_steps(8, 2) == 2
    with pytest.raises(InputError, match="batch_size 3 x 2 processes = 6: set effective_batch_size to 6 or 12"):
        accumulation_steps(8, 3)


def make_trainer(batch_size: int, distributed: bool) -> tuple[SupervisedTrainer, list[int], list[float]]:
    """Three batches per epoch, two of them a step, the last alone and half as large."""
    torch.manual_seed(0)
    network = nn.Linear(3, 1)
    generator = torch.Generator().manual_seed(2)
    data = [{"image": torch.randn(3, generator=generator), "label": torch.ones(1) * i} for i in range(10)]
    trained = DistributedDataParallel(network) if distributed else network
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 4)
    exchanges, seen = [], []
    loss = nn.MSELoss()
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=2,
        train_data_loader=SeededDataLoader(Dataset(data), batch_size, seed=1),
        network=trained,
        optimizer=optimizer,
        loss_function=lambda pred, label: mean_over_ranks(loss(pred, label), len(pred)),
        accumulation_steps=2,
        train_handlers=[OptimizerSteps(schedule)],
        decollate=False,
    )
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.output["loss"].item())
    )
    if distributed:

        def hook(group, bucket):  # torch compares annotations, which are text here
            exchanges.append(trainer.state.iteration)
            return allreduce_hook(group, bucket)

        trained.register_comm_hook(None, hook)
    return trainer, exchanges, seen


def check_training(expected: list[float], weight: Tensor) -> None:
    trainer, exchanges, seen = make_trainer(2, distributed=True)
    trainer.run()
    assert exchanges == [2, 3, 5, 6], "one exchange of gradients per step of the optimiser"
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected))
    torch.testing.assert_close(trainer.network.module.weight, weight)


def check_randomness(rank: int) -> None:
    """Order, augmentation and masks: the same seed, other numbers."""
    transform = Compose([RandScaleIntensityd("x", factors=0.5, prob=1.0)])
    data = [{"image": f"/data/scan{i}.nii.gz", "x": torch.ones(1)} for i in range(8)]
    loader = SeededDataLoader(Dataset(data, transform), 2, seed=1)
    loader.sampler.set_epoch(1)
    drawn = []
    for i, batch in enumerate(loader):
        drawn += [*batch["image"], *batch["x"].flatten().tolist(), torch.rand(1).item()]
        names = [None, None]
        dist.all_gather_object(names, [path.rpartition("/")[2] for path in batch["image"]])
        assert loader.files(i + 1) == names[0] + names[1]
    everything = [None, None]
    dist.all_gather_object(everything, drawn)
    assert len(set(everything[0] + everything[1])) == 2 * len(drawn)


def check_cohort(rank: int, folder: str) -> None:
    """Rank 0 writes what both read, even if it comes last."""
    if rank == 0:
        time.sleep(0.5)
    else:
        phantom._write_patient = None  # would raise
    made = phantom.cohort(f"{folder}/cohort", 1, 0, num_workers=1)
    assert Path(made, "phantom.json").is_file()
    assert phantom.cohort(made, 1, 0) == made


def main() -> None:
    expected = {}
    for case in product(REPORTS, ("report", "volume", "both"), ("topk_mean", "lse")):
        expected[case] = result(Toy(), losses(*case[1:]), batch_of(case[0], slice(0, 4)))
    trainer, _, seen = make_trainer(4, distributed=False)
    trainer.run()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "WORLD_SIZE": "2"}
        children = []
        for rank in (0, 1):
            if (pid := os.fork()) == 0:
                dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
                check_gathering(rank)
                check_losses(rank, expected)
                check_training(seen, trainer.network.weight)
                check_randomness(rank)
                check_cohort(rank, folder)
                os.write(1, f"process {rank} agrees\n".encode())  # whole, where print may write its parts apart
                os._exit(0)
            children.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    sys.exit(any(codes))


def test_two_processes_compute_what_one_with_both_batches_does():
    """Losses and gradients of all kinds of negatives, training with accumulation, and the number of exchanges."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "process 0 agrees", "process 1 agrees"]


def test_alone_nothing_is_gathered_and_batches_must_divide():
    rows = torch.ones(2, 3)
    assert gather_rows(rows)[0] is rows and mean_over_ranks(rows, 2) is rows
    assert accumulation_steps(448, 14) == 32
    for effective, batch in ((448, 13), (4, 8)):
        with pytest.raises(
            InputError, match=f"effective_batch_size {effective} is not divisible by batch_size {batch}"
        ):
            accumulation_steps(effective, batch)


@pytest.mark.parametrize("call", [local_device, lambda: start(torch.device("cpu"))])
def test_without_torchrun_the_overlay_says_how_to_start_it(monkeypatch, call):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="is not set: start this config with torchrun"):
        call()


HANGS = """
import os, sys, time
import torch
import torch.distributed as dist
from custom_components.distributed import any_rank, hanging, start
children = []
reader, writer = os.pipe()  # which rank 2 alone holds until its end
for rank in range(3):
    if (pid := os.fork()) == 0:
        if rank < 2:
            os.close(writer)
        os.environ |= {"RANK": str(rank), "MASTER_ADDR": "localhost", "MASTER_PORT": sys.argv[1], "WORLD_SIZE": "3"}
        start(torch.device("cpu"), timeout_minutes=0.05)
        assert any_rank(rank == 2)
        if rank == 1:
            print("hangs:", os.getpid(), flush=True)
            time.sleep(600)
        try:
            any_rank(False)
        except RuntimeError as error:
            os.write(1, f"{rank}: {hanging(error)}\\n".encode())
        if rank == 0:
            os.read(reader, 1)  # since it keeps what they say to each other
        os._exit(0)
    children.append(pid)
os.close(writer)
os.waitpid(children[2], 0)
os.waitpid(children[0], 0)
os.kill(children[1], 9)
"""


def test_a_process_that_hangs_is_named() -> None:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = str(found.getsockname()[1])
    done = subprocess.run([sys.executable, "-c", HANGS, port], capture_output=True, text=True, timeout=120)
    pid = done.stdout.partition("hangs: ")[2].split()[0]
    told = [line for line in done.stdout.splitlines() if line.startswith(("0: ", "2: "))]
    assert len(told) == 2, done.stdout + done.stderr
    for line in told:
        assert f"no word from rank 1 (process {pid} on {socket.gethostname()}) within timeout_minutes" in line


def test_work_that_is_not_divided_is_left_to_rank_zero(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    leave_to_rank_zero()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as left:
        leave_to_rank_zero()
    assert left.value.code == 0, "or torchrun would end the others"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
