"""What a training does beside its steps: weight decay, learning rate, its losses, progress, clipping."""

import logging
import math
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from custom_components.errors import InputError
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.engines import IterationEvents, SupervisedTrainer
from monai.networks import eval_mode
from monai.utils.enums import CommonKeys
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

logger = logging.getLogger(__name__)


def decay_groups(
    network: nn.Module, weight_decay: float, learning_rates: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """AdamW parameter groups: no weight decay on biases, norms and tokens (all that is not a matrix), as MAE has it.

    Frozen parameters are left out. ``learning_rates`` maps patterns of what parameters' names begin with (``re.match``)
    to a peak learning rate; all others have the optimiser's.

    Raises:
        InputError: no parameter that is trained, and that no pattern before took, has such a name.
    """
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    groups = []
    for pattern, rate in (learning_rates or {}).items():
        found = [trained.pop(name) for name in list(trained) if re.match(pattern, name)]
        if not found:
            raise InputError(
                f"learning_rates names {pattern!r}, and no parameter that is trained begins so: name another"
            )
        groups += [group | {"lr": rate} for group in _decay_groups(found, weight_decay)]
    return _decay_groups(list(trained.values()), weight_decay) + groups


def _decay_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    # a class or mask token is [1, 1, C]: a vector by nature
    decay = [p for p in parameters if p.squeeze().ndim > 1]
    no_decay = [p for p in parameters if p.squeeze().ndim <= 1]
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
        engine.state.output["losses"] = self.take()

    def take(self) -> dict[str, Tensor]:
        """The values since the last call."""
        values, self.values = self.values, {}
        return values


@dataclass
class HeldOutLoss:
    """The loss and its parts on held-out items, every ``interval`` epochs, as ``engine.state.metrics["held_out/..."]``.

    The trainer's own way from a batch to its loss, with the network in eval mode. Means over batches: give the
    training's batch size, since a contrastive loss falls with the number of its negatives.

    Args:
        dataloader: the same batches, with the same masks, each time (:class:`SeededDataLoader`).
        parts: of the trainer's loss.
    """

    dataloader: DataLoader
    parts: LossParts
    interval: int = 1

    def attach(self, engine: SupervisedTrainer) -> None:
        if not len(self.dataloader):
            logger.info("no volumes are held out, so val_interval looks at none: validation_share holds some out")
            return
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self.epoch_completed)

    @torch.no_grad()
    def epoch_completed(self, engine: SupervisedTrainer) -> None:
        sums: Counter[str] = Counter()
        with eval_mode(engine.network):
            for batch in self.dataloader:
                prepared = engine.prepare_batch(batch, engine.state.device, engine.non_blocking)
                images, targets, args, kwargs = (*prepared, (), {})[:4]  # some return two
                output = engine.inferer(images, engine.network, *args, **kwargs)
                sums["total"] += engine.loss_function(output, targets).item()
                sums.update({name: value.item() for name, value in self.parts.take().items()})
        means = {name: value / len(self.dataloader) for name, value in sums.items()}
        engine.state.metrics.update({f"held_out/{name}": mean for name, mean in means.items()})
        logger.info(f"epoch {engine.state.epoch}, held out: " + ", ".join(f"{k} {v:.3f}" for k, v in means.items()))


class TrainingProgress:
    """One line that says what trains where, and one bar over the whole training: epoch, time left, the loss, and its
    parts where :class:`LossParts` gives them; in a narrow terminal by the first letters of their names."""

    BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    NARROW = "{desc} {percentage:3.0f}% {elapsed}<{remaining}{postfix}"
    WIDE_COLUMNS = 110

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        # a log file needs a line now and then, a terminal needs motion
        self.terminal = sys.stderr.isatty()
        self.seconds = 0.5 if self.terminal else 10.0
        self.shown = -math.inf

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.EPOCH_STARTED, self.epoch_started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)
        engine.add_event_handler(Events.COMPLETED | Events.TERMINATE, self.completed)

    def started(self, engine: SupervisedTrainer) -> None:
        network = getattr(engine.network, "_orig_mod", engine.network)  # where the trainer has compiled it
        network = getattr(network, "module", network)  # where processes share it
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad) / 1e6
        logger.info(
            f"{type(network).__name__}, {trained:.3g} million trained parameters, on {engine.state.device}: "
            f"{engine.state.max_epochs} epochs of {engine.state.epoch_length} batches"
        )

    def epoch_started(self, engine: Engine) -> None:
        if self.bar is None:
            total = engine.state.max_epochs * engine.state.epoch_length
            self.bar = tqdm(total=total, initial=engine.state.iteration, unit="step", mininterval=0, dynamic_ncols=True)

    def iteration_completed(self, engine: Engine) -> None:
        # reading a loss waits for the device, so it is done as often as it is seen
        if time.monotonic() - self.shown < self.seconds and engine.state.iteration < self.bar.total:
            return
        self.show(engine)

    def show(self, engine: Engine) -> None:
        self.shown = time.monotonic()
        narrow = self.terminal and shutil.get_terminal_size().columns < self.WIDE_COLUMNS
        self.bar.bar_format = self.NARROW if narrow else self.BAR
        parts = engine.state.output.get("losses", {})
        losses = {"loss": engine.state.output[CommonKeys.LOSS], **{k[:3] if narrow else k: v for k, v in parts.items()}}
        shown = [f"{name} {value.item():.3g}" for name, value in losses.items()]
        self.bar.set_description_str(f"epoch {engine.state.epoch}/{engine.state.max_epochs}", refresh=False)
        self.bar.set_postfix_str(" ".join(shown), refresh=False)
        self.bar.update(engine.state.iteration - self.bar.n)

    def completed(self, engine: Engine) -> None:
        if self.bar is not None:  # there was something left to train
            if self.bar.n < engine.state.iteration:  # it ended before its time
                self.show(engine)
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
