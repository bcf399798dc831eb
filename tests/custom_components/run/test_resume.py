"""Checkpoints that a training resumes from bit by bit, and losses that are not finite."""

from __future__ import annotations

import logging
import math
import os
import random
import shutil
import signal
import zipfile

import numpy as np
import pytest
import torch
from custom_components.errors import InputError
from custom_components.processes import SIGNALS, EndOnSignal, Interrupted
from custom_components.run.handlers import LastStep, OptimizerSteps
from custom_components.run.resume import Checkpointer, KeepBest, LossCheck
from custom_components.run.seeded import EpochSampler, SeededDataLoader
from custom_components.run.weights import described, description_of, load_weights
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.optimizers import WarmupCosineSchedule
from monai.transforms import Compose, RandScaleIntensityd
from torch import nn


class Network(nn.Module):
    """Something frozen, dropout, and something trained."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.trained = nn.Sequential(nn.Linear(3, width), nn.Dropout(0.5), nn.Linear(width, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.trained(self.frozen(x))


class Validated:
    """Stands for a validation: what it finds must be found once an epoch, and kept by checkpoints."""

    def __init__(self, signal_in=None):
        self.epochs, self.signal_in = [], signal_in

    def attach(self, trainer):
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self.validate)

    def validate(self, engine):
        self.epochs.append(engine.state.epoch)
        if engine.state.epoch == self.signal_in:
            os.kill(os.getpid(), signal.SIGTERM)

    def state_dict(self):
        return {"epochs": list(self.epochs)}

    def load_state_dict(self, state):
        self.epochs = list(state["epochs"])


def make_trainer(
    folder, max_epochs=2, *, items=10, batch_size=2, accumulation=3, width=4, bad=None, frozen_seed=0, lr=0.05, **keys
):
    """Ten items in batches of two: five iterations per epoch, a step after the third and the fifth."""
    torch.manual_seed(0)
    network = Network(width)
    torch.manual_seed(frozen_seed)
    network.frozen.reset_parameters()
    optimizer = torch.optim.AdamW(network.trained.parameters(), lr=lr, weight_decay=keys.pop("weight_decay", 0.1))
    scheduler = WarmupCosineSchedule(optimizer, warmup_steps=2, t_total=10)
    generator = torch.Generator().manual_seed(1)
    data = [
        {"image": f"scan{i}.nii.gz", "x": torch.randn(3, generator=generator), "label": torch.ones(1) * i}
        for i in range(items)
    ]
    if bad is not None:
        data[bad]["x"] = torch.full((3,), float("nan"))
    transform = Compose([RandScaleIntensityd("x", factors=0.5, prob=1.0)])
    loader = SeededDataLoader(Dataset(data, transform), batch_size, seed=5, num_workers=keys.pop("num_workers", 0))
    check = LossCheck(loader, interval=keys.pop("check_interval", 1000))
    others = {"validated": keys.pop("validated")} if "validated" in keys else {}
    handlers = [OptimizerSteps(scheduler), *others.values(), LastStep(keys.pop("max_steps", 1000))]
    checkpointer = Checkpointer(
        str(folder / "checkpoint.pt"),
        {"network": network, "optimizer": optimizer, "lr_scheduler": scheduler, **others},
        {"encoder.pt": network.trained[0]},
        **({"minutes": 0, "loss_check": check} | keys),
    )
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=max_epochs,
        train_data_loader=loader,
        prepare_batch=lambda batch, *_, **__: (batch["x"], batch["label"]),
        network=network,
        optimizer=optimizer,
        loss_function=nn.MSELoss(),
        accumulation_steps=accumulation,
        train_handlers=[*handlers, checkpointer],
        decollate=False,
    )
    return trainer


def restored(*args, **keys):
    """A trainer as it is when it starts to run."""
    trainer = make_trainer(*args, **keys)
    trainer.fire_event(Events.STARTED)
    return trainer


def warnings(caplog):
    """What was warned of; whether information is recorded too depends on the tests before."""
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def saved(path):
    return torch.load(path, weights_only=True)


def assert_same(path, expected):
    """Bit by bit: weights, optimiser, schedule and position."""
    content = saved(path)
    assert content.pop("frozen") == expected["frozen"] and content.pop("recipe") == expected["recipe"]
    torch.testing.assert_close(content, {k: expected[k] for k in content}, atol=0, rtol=0)


def copies_of(trainer, folder):
    """Runs a training; a copy of each checkpoint that it wrote, by iteration."""
    copies = {}

    def copy(engine):
        path = folder / "checkpoint.pt"
        iteration = saved(path)["trainer"]["iteration"] if path.exists() else 0
        if iteration and iteration not in copies:
            copies[iteration] = shutil.copy(path, folder / f"{iteration}.pt")

    trainer.add_event_handler(Events.ITERATION_COMPLETED, copy)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, copy)
    trainer.run()
    return copies


def test_a_checkpoint_is_restored_once_and_never_over_weights_set_later(tmp_path):
    """Federated rounds set weights between making the trainer and running it, and between two runs."""
    make_trainer(tmp_path, max_epochs=1).run()
    trainer = make_trainer(tmp_path, max_epochs=2)
    seen = []
    trainer.add_event_handler(
        Events.ITERATION_STARTED, lambda: seen.append(float(trainer.network.trained[0].weight.mean()))
    )
    for epochs in (1, 2):
        trainer.state.max_epochs = epochs
        with torch.no_grad():
            trainer.network.trained[0].weight.fill_(epochs)
        seen.clear()
        trainer.run()
        assert seen[0] == pytest.approx(epochs) and trainer.state.epoch == epochs


def test_a_finished_training_that_is_run_again_trains_no_further(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.run()
    expected = saved(tmp_path / "checkpoint.pt")
    trainer.add_event_handler(Events.ITERATION_STARTED, pytest.fail)
    trainer.run()
    assert_same(tmp_path / "checkpoint.pt", expected)


@pytest.fixture
def signals():
    """Signals end a training as in a run of a bundle; afterwards everything is as before."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    logging.disable(logging.NOTSET)


def interrupted(trainer, event, number=signal.SIGTERM):
    """Runs a training that gets a signal; the line that tells of it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    EndOnSignal.install()
    trainer.add_event_handler(event, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted) as told:
        trainer.run()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as in the process that goes on
    logging.disable(logging.NOTSET)
    return str(told.value)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(("iteration", "after"), [(1, 3), (3, 3), (4, 5), (5, 5), (7, 8), (10, 10)])
def test_a_signal_ends_a_training_after_the_running_step_and_nothing_is_lost(
    tmp_path, signals, number, iteration, after
):
    make_trainer(tmp_path / "straight").run()
    trainer = make_trainer(tmp_path / "again", minutes=None, interval=9)
    told = interrupted(trainer, Events.ITERATION_STARTED(once=iteration), number)
    assert told.startswith(f"{number.name}: ") and f"checkpoint.pt holds the training up to iteration {after}" in told
    assert saved(tmp_path / "again/checkpoint.pt")["trainer"]["iteration"] == after
    trainer = make_trainer(tmp_path / "again", minutes=None, interval=9)
    seen = []
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda engine: seen.append(engine.state.iteration))
    trainer.run()
    assert seen == list(range(after + 1, 11))
    assert_same(tmp_path / "again/checkpoint.pt", saved(tmp_path / "straight/checkpoint.pt"))


@pytest.mark.parametrize("when", ["last step", "validation"])
@pytest.mark.parametrize("max_steps", [10, 8])
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_validation_that_a_signal_interrupts_is_done_anew(tmp_path, signals, when, max_steps, epoch):
    """Also that of an epoch which ends with the last step, in its midst."""
    keys = {"minutes": None, "accumulation": 1, "max_steps": max_steps}
    make_trainer(tmp_path / "straight", validated=Validated(), **keys).run()
    expected = saved(tmp_path / "straight/checkpoint.pt")
    assert expected["validated"] == {"epochs": [1, 2]}
    validated = Validated(signal_in=epoch if when == "validation" else None)
    last = {1: 5, 2: max_steps}[epoch]
    event = Events.ITERATION_STARTED(once=last) if when == "last step" else Events.ITERATION_STARTED(once=1000)
    interrupted(make_trainer(tmp_path / "again", validated=validated, **keys), event)
    assert saved(tmp_path / "again/checkpoint.pt")["validated"] == {"epochs": [1, 2][: epoch - 1]}
    make_trainer(tmp_path / "again", validated=Validated(), **keys).run()
    assert_same(tmp_path / "again/checkpoint.pt", expected)


def test_a_signal_before_the_first_step_ends_at_once(tmp_path, signals):
    told = interrupted(make_trainer(tmp_path), Events.STARTED)
    assert told == "SIGTERM: ended; what is written stays until the same command writes anew, or goes on with it"
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_from_each_checkpoint_a_training_goes_on_exactly(tmp_path, num_workers):
    """In the midst of epochs too, and whatever has drawn random numbers in between."""
    copies = copies_of(make_trainer(tmp_path / "straight"), tmp_path / "straight")
    assert list(copies) == [3, 5, 8, 10]  # five iterations per epoch, steps after three of them and after the last
    expected = saved(copies.pop(10))
    for iteration, path in copies.items() if num_workers == 0 else [(8, copies[8])]:
        trainer = restored(tmp_path / "again", resume=path, num_workers=num_workers)
        assert trainer.state.iteration == iteration
        torch.rand(7), np.random.rand(7), random.random()
        trainer.run()
        assert_same(tmp_path / "again/checkpoint.pt", expected)
    # and it is worth it to keep more than the weights
    trainer = make_trainer(tmp_path / "again", max_epochs=1, resume=None)
    trainer.network.load_state_dict(saved(copies[5])["network"], strict=False)
    trainer.run()
    weights = saved(tmp_path / "again/checkpoint.pt")["network"]
    assert not torch.equal(weights["trained.0.weight"], expected["network"]["trained.0.weight"])


def test_a_checkpoint_holds_what_changes_and_the_weights_of_others_stand_beside_it(tmp_path):
    trainer = make_trainer(tmp_path, recipe={"negatives": "both"})
    (tmp_path / ".123.tmp.checkpoint.pt").touch()  # of a run that was killed as it wrote
    (tmp_path / ".123.tmp.encoder.pt").touch()
    trainer = make_trainer(tmp_path, recipe={"negatives": "both"})
    trainer.run()
    names = ["checkpoint.pt", "checkpoint_previous.pt", "encoder.pt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    content = saved(tmp_path / "checkpoint.pt")
    assert set(content) == {"network", "optimizer", "lr_scheduler", "trainer", "recipe", "frozen"}
    assert content["trainer"] == {"iteration": 10, "epoch": 2, "items": 0, "epoch_items": 10}
    assert set(content["network"]) == {"trained.0.weight", "trained.0.bias", "trained.2.weight", "trained.2.bias"}
    assert saved(tmp_path / "checkpoint_previous.pt")["trainer"]["items"] == 6
    torch.testing.assert_close(saved(tmp_path / "encoder.pt"), trainer.network.trained[0].state_dict())


def test_interval_and_minutes_space_the_checkpoints_and_the_last_epoch_always_writes_one(tmp_path):
    copies = copies_of(make_trainer(tmp_path, 3, interval=2, minutes=None, recipe=None), tmp_path)
    assert list(copies) == [10, 15]


def test_processes_that_write_nothing_look_at_the_losses_as_often_as_the_one_that_writes(tmp_path, monkeypatch):
    """By a clock that moves by 40 seconds at each look: every second iteration is due, and the last is the end."""
    looks = {}
    for number in (0, 1):
        monkeypatch.setattr("custom_components.run.resume.rank", lambda number=number: number)
        trainer, times = make_trainer(tmp_path, minutes=1, interval=9, accumulation=1), iter(range(0, 1000, 40))
        monkeypatch.setattr("custom_components.run.resume.time.monotonic", lambda times=times: next(times))
        looks[number] = []
        monkeypatch.setattr(LossCheck, "__call__", lambda check, seen=looks[number]: seen.append(max(check.pending)))
        trainer.run()
    assert looks[1] == looks[0] == [2, 4, 6, 8, 10]


def copies_of_finished(tmp_path):
    make_trainer(tmp_path).run()
    return tmp_path / "checkpoint.pt", tmp_path / "checkpoint_previous.pt"


@pytest.mark.parametrize("length", [0, 100, 0.5, 0.999])
def test_a_truncated_checkpoint_is_noticed_and_the_one_before_is_used(tmp_path, caplog, length):
    path, previous = copies_of_finished(tmp_path)
    expected, content = saved(path), path.read_bytes()
    path.write_bytes(content[: int(length if length >= 1 else length * len(content))])
    trainer = restored(tmp_path)
    assert trainer.state.iteration == 8
    assert warnings(caplog)[0].startswith(f"{path}: not a readable checkpoint")
    trainer.run()
    assert_same(path, expected)
    previous.write_bytes(content[:50])
    path.write_bytes(content[:50])
    with pytest.raises(InputError, match="checkpoint_previous.pt: not a readable .* start anew with --resume null"):
        restored(tmp_path)


@pytest.mark.parametrize("where", ["pickle", "weights", "directory"])
@pytest.mark.parametrize("damage", ["bit", "block"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(tmp_path, caplog, where, damage):
    """A flipped bit, or zeros where the disk lost a block: the zip's checksums tell, which torch does not look at."""
    path, previous = copies_of_finished(tmp_path)
    expected, content = saved(path), bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        name = "data.pkl" if where == "pickle" else "data/0"
        info = next(info for info in file.infolist() if info.filename.endswith(name))
        start = file.start_dir + 16 if where == "directory" else content.index(file.read(info), info.header_offset)
    content[start] ^= 4
    if damage == "block":
        content[start : start + 64] = bytes(64)
    path.write_bytes(content)
    trainer = restored(tmp_path)
    assert trainer.state.iteration == 8
    assert warnings(caplog)[0].startswith(f"{path}: not a readable checkpoint")
    trainer.run()
    assert_same(path, expected)


def test_a_damaged_checkpoint_that_is_named_is_refused(tmp_path):
    path, _ = copies_of_finished(tmp_path)
    content = bytearray(path.read_bytes())
    content[content.index(saved(path)["network"]["trained.0.weight"].numpy().tobytes()) + 2] ^= 1
    path.write_bytes(content)
    for read in (lambda: restored(tmp_path, resume=path), lambda: load_weights(Network(), path)):
        with pytest.raises(InputError, match="checkpoint.pt: not a readable checkpoint .* is damaged"):
            read()


def test_a_checkpoint_and_the_weights_beside_it_describe_themselves(tmp_path):
    told = {"settings": {"pixdim": [1.0, 1.0, 1.0]}, "license": None}
    make_trainer(tmp_path, description=told).run()
    assert saved(tmp_path / "checkpoint.pt")["description"] == told
    assert description_of(tmp_path / "checkpoint.pt") == told
    assert described(tmp_path / "encoder.pt") == told["settings"]
    assert set(saved(tmp_path / "encoder.pt")) == {"weight", "bias"}


def test_the_best_weights_describe_themselves(tmp_path):
    network, evaluator = Network(), Engine(lambda *_: None)
    best = KeepBest(
        network, evaluator, "dice", str(tmp_path / "model.pt"), description={"settings": {"classes": ["a"]}}
    )
    evaluator.state.metrics = {"dice": 0.5}
    trainer = Engine(lambda *_: None)
    trainer.state.epoch = 1
    best.compare(evaluator, trainer)
    assert described(tmp_path / "model.pt") == {"classes": ["a"]}
    best.restore()


def test_a_kill_between_the_two_renames_leaves_the_checkpoint_before(tmp_path):
    path, previous = copies_of_finished(tmp_path)
    path.unlink()
    assert restored(tmp_path).state.iteration == 8


def test_auto_starts_where_nothing_is_and_null_starts_anew_and_replaces_all(tmp_path):
    path, previous = copies_of_finished(tmp_path)
    trainer = restored(tmp_path, resume=None, max_epochs=1, accumulation=5)
    assert trainer.state.iteration == 0
    trainer.run()
    assert saved(path)["trainer"]["epoch"] == 1
    assert not previous.exists(), "else a damaged file would be replaced by another training's"


def test_a_finished_training_is_told_and_goes_on_with_more_epochs(tmp_path, caplog):
    path, _ = copies_of_finished(tmp_path)
    with caplog.at_level("INFO"):
        trainer = make_trainer(tmp_path)
        trainer.add_event_handler(Events.ITERATION_STARTED, pytest.fail)
        trainer.run()
    assert (trainer.state.epoch, trainer.state.iteration) == (2, 10)
    assert f"{path}: training has had 2 of 2 epochs and is finished" in caplog.text
    trainer = make_trainer(tmp_path, max_epochs=3)
    trainer.run()
    assert (trainer.state.epoch, trainer.state.iteration) == (3, 15)


def test_data_may_move_but_not_change(tmp_path, caplog):
    recipe = {"dataset_dir": "/a", "data": "2 items, 1", "files": "2 files, 3"}
    make_trainer(tmp_path, recipe=recipe).run()
    caplog.set_level("INFO")
    assert restored(tmp_path, recipe=recipe | {"dataset_dir": "/b"}).state.epoch == 2
    assert "dataset_dir was /a and is /b; going on, since it has the same list" in caplog.text
    for key in ("data", "files"):
        for moved in ({}, {"dataset_dir": "/b"}):
            with pytest.raises(InputError, match=f"another recipe.*{key} was"):
                restored(tmp_path, recipe=recipe | moved | {key: "another"})
    del recipe["files"]  # of before it was told
    make_trainer(tmp_path / "old", recipe=recipe).run()
    with pytest.raises(InputError, match="another recipe.*dataset_dir was /a and is /b"):
        restored(tmp_path / "old", recipe=recipe | {"dataset_dir": "/b", "files": "2 files, 3"})


def test_another_recipe_is_refused_or_followed_if_the_path_is_given(tmp_path, caplog):
    make_trainer(tmp_path, recipe={"mask_ratio": 0.75, "hu_range": [-1000, 1000], "gone": 1}).run()
    recipe = {"mask_ratio": 0.5, "hu_range": [-1000, 1000], "new": 2}
    with pytest.raises(InputError, match=r"another recipe.*new recipe \(mask_ratio was 0.75 and is 0.5\)"):
        restored(tmp_path, recipe=recipe)
    assert restored(tmp_path, recipe=recipe, resume=tmp_path / "checkpoint.pt").state.epoch == 2
    assert "going on by another recipe (mask_ratio was 0.75 and is 0.5)" in caplog.text


def test_the_place_in_an_epoch_is_counted_in_items(tmp_path, caplog):
    """Six of ten items were used: three batches of two, or six of one; with other data the epoch starts anew."""
    path = copies_of(make_trainer(tmp_path), tmp_path)[8]
    trainer = restored(tmp_path, resume=path, batch_size=1, accumulation=6)
    assert (trainer.state.epoch, trainer.state.iteration, trainer.data_loader.start) == (1, 16, 6)
    assert not warnings(caplog)
    for changes in ({"items": 8}, {"batch_size": 4}):
        trainer = restored(tmp_path, resume=path, **changes)
        assert trainer.state.iteration == trainer.state.epoch_length and trainer.data_loader.start == 0
        assert "epoch 2 starts anew" in warnings(caplog)[-1]


def test_what_the_config_says_of_optimiser_and_schedule_holds(tmp_path):
    path = copies_of(make_trainer(tmp_path), tmp_path)[5]
    trainer = restored(tmp_path, resume=path, lr=0.005, weight_decay=0.3)
    group = trainer.optimizer.param_groups[0]
    assert group["weight_decay"] == 0.3
    assert group["lr"] == pytest.approx(saved(path)["optimizer"]["param_groups"][0]["lr"] / 10)
    trainer.run()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.005 * 0.5 * (1 + math.cos(math.pi * 2 / 8)))


def test_other_frozen_weights_are_refused(tmp_path):
    make_trainer(tmp_path).run()
    with pytest.raises(InputError, match="beside other frozen weights .*frozen.bias"):
        restored(tmp_path, frozen_seed=1)
    torch.manual_seed(2)
    network = Network()
    with pytest.raises(InputError, match="beside other frozen weights"):
        load_weights(network, tmp_path / "checkpoint.pt")
    torch.manual_seed(0)
    network.frozen.reset_parameters()
    load_weights(network, tmp_path / "checkpoint.pt")
    torch.testing.assert_close(network.trained[0].state_dict(), saved(tmp_path / "encoder.pt"))


def test_what_cannot_be_resumed_is_told(tmp_path):
    make_trainer(tmp_path).run()
    with pytest.raises(InputError, match="its network does not fit the config"):
        restored(tmp_path, width=5)
    with pytest.raises(InputError, match="encoder.pt: not a checkpoint to resume from, it lacks frozen, lr_scheduler"):
        restored(tmp_path, resume=tmp_path / "encoder.pt")
    with pytest.raises(
        InputError, match="^resume .*nothing.pt: no such checkpoint; .*resume to null to start without it"
    ):
        restored(tmp_path, resume=tmp_path / "nothing.pt")
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    with pytest.raises(InputError, match="tensor.pt: not a checkpoint to resume from"):
        restored(tmp_path, resume=tmp_path / "tensor.pt")
    checkpointer = Checkpointer(str(tmp_path / "checkpoint.pt"), {}, {})
    engine = Engine(lambda *_: None)
    engine.data_loader = DataLoader(Dataset([1]))
    with pytest.raises(InputError, match="is a DataLoader: make it a .*SeededDataLoader"):
        checkpointer.attach(engine)


@pytest.mark.parametrize("keys", [{"check_interval": 1}, {"accumulation": 1}, {"interval": 9}, {"loss_check": None}])
def test_a_loss_that_is_not_finite_ends_the_training_and_is_saved_nowhere(tmp_path, keys):
    trainer = make_trainer(tmp_path, bad=3, **keys)
    order = EpochSampler(range(10), 1, 0, seed=5)
    order.set_epoch(1)
    indices = [index for _, index in order]
    iteration = indices.index(3) // 2 + 1
    batch = ", ".join(f"scan{index}.nii.gz" for index in indices[2 * iteration - 2 : 2 * iteration])
    expected = "weights are no longer finite" if "loss_check" in keys else f"nan at iteration {iteration}, .* {batch};"
    with pytest.raises(InputError, match=expected):
        trainer.run()
    for path in tmp_path.iterdir():
        content = saved(path)
        assert all(weight.isfinite().all() for weight in content.get("network", content).values())


def test_a_full_disk_ends_the_training_and_keeps_the_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, minutes=None)

    @trainer.on(Events.ITERATION_COMPLETED(once=7))
    def fill(engine):
        (tmp_path / f".{os.getpid()}.tmp.checkpoint.pt").symlink_to("/dev/full")

    with pytest.raises(InputError, match="checkpoint.pt: could not be written .*space"):
        trainer.run()
    assert saved(tmp_path / "checkpoint.pt")["trainer"]["epoch"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "encoder.pt"]


# the best weights


def validated(folder, values: list[float], losses: list[float], **keys) -> KeepBest:
    """What is kept of a training whose validations have these metrics and these losses."""
    network = nn.Linear(1, 1, bias=False)
    trainer = Engine(lambda engine, batch: nn.init.constant_(network.weight, engine.state.epoch))
    evaluator = SupervisedEvaluator(
        "cpu", [{"image": torch.zeros(1, 1), "label": torch.zeros(1, 1)}], nn.Identity(), decollate=False
    )
    best = KeepBest(network, evaluator, "dice", str(folder / "model.pt"), **keys)
    if losses:
        best.loss = lambda pred, label: torch.tensor(losses[trainer.state.epoch - 1])
    best.attach(trainer)

    def validate(engine: Engine) -> None:
        evaluator.state.max_epochs = engine.state.epoch
        evaluator.add_event_handler(
            Events.EPOCH_COMPLETED, lambda e: e.state.metrics.update(dice=values[trainer.state.epoch - 1])
        )
        evaluator.run()

    trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
    trainer.run([0], max_epochs=len(values))
    assert torch.load(folder / "model.pt")["weight"].item() == best.epoch
    return best


def test_equal_validations_go_to_the_lower_loss(tmp_path):
    best = validated(tmp_path, [0.5, 0.8, 0.8, 0.8, math.nan], [0.1, 0.6, 0.4, 0.5, 0.0])
    assert (best.best, best.epoch) == (0.8, 3) and best.best_loss == pytest.approx(0.4)
    resumed = KeepBest(best.network, best.evaluator, "dice", best.path)
    resumed.load_state_dict(best.state_dict())
    assert resumed.best_loss == best.best_loss
    state = best.state_dict()
    del state["best_loss"]  # of a checkpoint from before there was one
    resumed.load_state_dict(state)
    assert resumed.best_loss == math.inf


def test_without_a_loss_equal_validations_go_to_the_first(tmp_path):
    assert validated(tmp_path, [0.8, 0.8], []).epoch == 1


def test_a_training_without_any_validation_does_not_begin(tmp_path):
    with pytest.raises(InputError, match="val_interval is 3, and the training has 2 epochs"):
        validated(tmp_path, [0.8, 0.8], [], interval=3)
