"""What a training does beside its steps: weight decay, learning rate, losses' parts, progress, last step, clipping."""

import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from ignite.engine import Engine, Events
from monai.engines import IterationEvents, SupervisedTrainer
from monai.utils.enums import CommonKeys
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from custom_components.errors import InputError


def decay_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW parameter groups: no weight decay on biases, norms and tokens (all that is not a matrix), as MAE has it.

    Frozen parameters are left out.
    """
    trained = [p for p in network.parameters() if p.requires_grad]
    # a class or mask token is [1, 1, C]: a vector by nature
    decay = [p for p in trained if p.squeeze().ndim > 1]
    no_decay = [p for p in trained if p.squeeze().ndim <= 1]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]


def completes_step(engine: SupervisedTrainer) -> bool:
    """Whether the running iteration ends with a step of the optimiser: after ``accumulation_steps``, and at the end of
    an epoch, where the iterations left over make a smaller step, each with the weight that it has in a full one."""
    done = (engine.state.iteration - 1) % engine.state.epoch_length + 1
    return done % engine.accumulation_steps == 0 or done == engine.state.epoch_length


@dataclass
class OptimizerSteps:
    """Steps the learning rate, and exchanges gradients between processes, as often as the optimiser steps: once in
    ``accumulation_steps`` iterations."""

    lr_scheduler: LRScheduler

    def attach(self, engine: SupervisedTrainer) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, self.iteration_started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)

    def iteration_started(self, engine: SupervisedTrainer) -> None:
        network = getattr(engine.network, "_orig_mod", engine.network)  # where the trainer has compiled it
        if isinstance(network, DistributedDataParallel):
            # what its no_sync() sets, and its forward reads; the trainer leaves no place for a context manager
            network.require_backward_grad_sync = completes_step(engine)

    def iteration_completed(self, engine: SupervisedTrainer) -> None:
        if completes_step(engine):
            self.lr_scheduler.step()


class LossParts:
    """Puts the value of each module of ``loss`` that an iteration calls into the engine's ``output["losses"]``."""

    def __init__(self, loss: nn.Module) -> None:
        self.values: dict[str, Tensor] = {}
        for name, part in loss.named_children():
            part.register_forward_hook(partial(self.record, name))

    def record(self, name: str, part: nn.Module, args: tuple[Any, ...], value: Tensor) -> None:
        self.values[name] = value.detach()

    def attach(self, engine: SupervisedTrainer) -> None:
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self.loss_completed)

    def loss_completed(self, engine: SupervisedTrainer) -> None:
        engine.state.output["losses"], self.values = self.values, {}


class TrainingProgress:
    """One bar over the whole training: epoch, the loss, its parts where :class:`LossParts` gives them, time left."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        # a log file needs a line now and then, a terminal needs motion
        self.seconds = 0.5 if sys.stderr.isatty() else 10.0
        self.shown = -math.inf

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.epoch_started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)
        engine.add_event_handler(Events.COMPLETED | Events.TERMINATE, self.completed)

    def epoch_started(self, engine: Engine) -> None:
        if self.bar is None:
            total = engine.state.max_epochs * engine.state.epoch_length
            self.bar = tqdm(total=total, initial=engine.state.iteration, unit="step", mininterval=0, dynamic_ncols=True)

    def iteration_completed(self, engine: Engine) -> None:
        # reading a loss waits for the device, so it is done as often as it is seen
        if time.monotonic() - self.shown < self.seconds and engine.state.iteration < self.bar.total:
            return
        self.shown = time.monotonic()
        losses = {"total": engine.state.output[CommonKeys.LOSS]} | engine.state.output.get("losses", {})
        self.bar.set_description(f"epoch {engine.state.epoch}/{engine.state.max_epochs}", refresh=False)
        self.bar.set_postfix({k: f"{v.item():.3f}" for k, v in losses.items()}, refresh=False)
        self.bar.update(engine.state.iteration - self.bar.n)

    def completed(self) -> None:
        if self.bar is not None:  # there was something left to train
            self.bar.close()


@dataclass
class LastStep:
    """Ends training at ``max_steps`` iterations exactly, within an epoch if need be, so that a cosine schedule reaches
    its end. That epoch still counts as completed: its validation and its checkpoint are made."""

    max_steps: int

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise InputError(f"max_steps is {self.max_steps}: give the number of optimiser steps, 1 or more")

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.epoch_started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)

    def epoch_started(self, engine: Engine) -> None:
        if engine.state.iteration >= self.max_steps:  # resumed from the checkpoint of a finished training
            engine.terminate()

    def iteration_completed(self, engine: Engine) -> None:
        if engine.state.iteration >= self.max_steps:
            engine.terminate_epoch()


@dataclass
class ClipGradients:
    """Scales the gradient of all parameters down to a norm of ``max_norm`` before each optimiser step."""

    network: nn.Module
    max_norm: float

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self.clip)

    def clip(self, engine: SupervisedTrainer) -> None:
        if completes_step(engine):
            nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm)
