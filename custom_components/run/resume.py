"""The few engine parts that MONAI and ignite lack."""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset, MetaTensor, list_data_collate
from monai.engines import IterationEvents, SupervisedTrainer
from monai.inferers import Inferer, SimpleInferer, SlidingWindowInferer
from monai.utils.enums import CommonKeys
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from custom_components.distributed import from_rank_zero, rank, world_size
from custom_components.errors import InputError
from custom_components.files import remove_temporary
from custom_components.run.seeded import SeededDataLoader
from custom_components.probe import LinearProbe
from custom_components.simcrop import VolumeEmbedder, similarity, upsample_patches
from custom_components.text import encode_sentences
from custom_components.run.weights import (
    check_fingerprint,
    fingerprint,
    frozen_parameters,
    load_file,
    save_atomically,
)

logger = logging.getLogger(__name__)


class OneLineErrors:
    """Tell an :class:`InputError`, or a full disk, in its own line, instead of nested tracebacks.

    Installs itself as ``sys.excepthook``, so the exit code stays 1; any other exception is shown in full. Under
    torchrun, a process that fails ends at once, so that the others are not kept waiting for it; and ranks above 0 wait
    for a moment before they speak, so that what goes wrong in all of them is told by one.
    """

    PATTERN = re.compile(rf"^(?:.*\.)?{InputError.__name__}: (.+)$", re.MULTILINE)
    SECONDS_BEHIND_RANK_ZERO = 5.0  # torchrun ends the others within one

    def __init__(self) -> None:
        sys.excepthook = self

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(self.SECONDS_BEHIND_RANK_ZERO)
        message = self.message(kind, error, trace)
        if message is None:
            sys.__excepthook__(kind, error, trace)
        else:
            for bar in list(getattr(tqdm, "_instances", ())):
                bar.close()  # else the message would stand at the end of a bar's line
            print(f"error: {message}", file=sys.stderr)
        if world_size() > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)  # the interpreter's own end would first wait for the process group

    def message(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> str | None:
        """The line that says what to do, or None where there is none."""
        # a data loader's worker sends its exception as text, so the text is what can be searched
        found = self.PATTERN.findall("".join(traceback.format_exception(kind, error, trace)))
        if found:
            return found[-1]  # a worker's own stands behind "InputError: Caught InputError in DataLoader worker"
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, InputError):  # by another name
                return str(cause)
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
                return f"the disk is full ({cause}): free space in models_dir and output_dir and start the same again"
            cause = cause.__cause__ or cause.__context__
        return None


class AutocastInferer(SimpleInferer):
    """Forward pass in bfloat16 on any device. Needs no gradient scaler, unlike ``SupervisedTrainer(amp=True)``.

    Args:
        amp: whether to autocast at all.
    """

    def __init__(self, amp: bool = True) -> None:
        super().__init__()
        self.amp = amp

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.amp):
            return super().__call__(inputs, network, *args, **kwargs)


class WindowInferer(SlidingWindowInferer):
    """MONAI's sliding window with Gaussian blending, made to bound memory and to save work.

    Logits come out in float16. Tall volumes are done in slabs along the last axis: windows of different slabs that
    overlap are computed for both, so the result is that of one pass, but fp32 sums exist for one slab at a time.

    Args:
        roi_size: the network's region, in voxels. Smaller volumes are padded with air.
        sw_batch_size: windows in one forward pass.
        overlap: share of a window that it has in common with the next.
        amp: whether the network runs under bfloat16 autocast.
        skip_air: windows without any voxel above this value, on the network's scale, are background without being
            looked at; None looks at all.
        slab_windows: windows along the last axis in one slab.
        progress: whether to show a bar over windows.
    """

    AIR_LOGIT = 10.0  # of background over all others in a skipped window: e^-10 is left for them

    def __init__(
        self,
        roi_size: Sequence[int],
        sw_batch_size: int = 4,
        overlap: float = 0.5,
        amp: bool = True,
        skip_air: float | None = None,
        slab_windows: int = 8,
        progress: bool = False,
    ) -> None:
        super().__init__(roi_size, sw_batch_size, overlap, mode="gaussian", cval=-1.0, progress=progress)
        self.amp = amp
        self.skip_air = skip_air
        self.slab_windows = slab_windows
        self.classes: int | None = None

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """``inputs [B, C, X, Y, Z]`` -> logits ``[B, classes, X, Y, Z]`` float16, a plain tensor."""
        inputs = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        size, roi = inputs.shape[-1], self.roi_size[-1]
        step = max(1, int(roi * (1 - self.overlap)))
        rows = max(1, math.ceil((size - roi) / step) + 1)
        before = math.ceil(roi / step) - 1  # rows of windows that reach into a slab from the one before it
        # MONAI moves the last row back to the volume's end, into the row before it: it never is a slab of its own
        starts = [row for row in range(0, rows, self.slab_windows) if row == 0 or row < rows - max(before, 1)]
        output: Tensor | None = None
        for start, stop in zip(starts, [*starts[1:], rows]):
            first = max(0, start - before) * step
            last = size if stop == rows else (stop - 1) * step + roi
            own = slice(start * step, size if stop == rows else stop * step)
            logits = super().__call__(inputs[..., first:last], partial(self._predict, network))
            if output is None:
                output = logits.new_empty((*logits.shape[:2], *inputs.shape[2:]), dtype=torch.float16)
            output[..., own] = logits[..., own.start - first : own.stop - first]
        return output

    def _predict(self, network: nn.Module, windows: Tensor) -> Tensor:
        with torch.autocast(windows.device.type, torch.bfloat16, enabled=self.amp):
            if self.skip_air is None:
                return network(windows).float()
            seen = windows.amax((1, 2, 3, 4)) > self.skip_air
            if not seen.any() and self.classes is None:
                seen[0] = True  # only the network knows how many classes there are
            found = network(windows[seen]).float() if seen.any() else windows.new_empty(0)
        self.classes = found.shape[1] if len(found) else self.classes
        logits = windows.new_zeros((len(windows), self.classes, *windows.shape[2:]))
        logits[:, 0] = self.AIR_LOGIT
        logits[seen] = found.reshape(-1, *logits.shape[1:])
        return logits


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
    an epoch, where what is left over makes a step of its own, every item with the weight that it has in a full one."""
    done = (engine.state.iteration - 1) % engine.state.epoch_length + 1
    return done % engine.accumulation_steps == 0 or done == engine.state.epoch_length


class OptimizerSteps:
    """What goes by the optimiser's steps and not by iterations, where ``accumulation_steps`` make a step.

    That is the learning rate, and the exchange of gradients between processes.

    Args:
        lr_scheduler: stepped after each step of the optimiser.
    """

    def __init__(self, lr_scheduler: LRScheduler) -> None:
        self.lr_scheduler = lr_scheduler

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


class TrainingProgress:
    """One bar over the whole training: epoch, each loss, time left.

    Args:
        loss: whose ``parts`` are shown, a dictionary of scalar tensors; None shows the trainer's loss alone.
    """

    def __init__(self, loss: nn.Module | None = None) -> None:
        self.loss = loss
        self.bar: tqdm | None = None
        # a log file wants a line now and then, a terminal wants motion
        self.seconds = 0.5 if sys.stderr.isatty() else 10.0
        self.shown = -math.inf

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.epoch_started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)
        engine.add_event_handler(Events.COMPLETED | Events.TERMINATE, self.completed)

    def epoch_started(self, engine: Engine) -> None:
        if self.bar is not None:
            return
        total = engine.state.max_epochs * engine.state.epoch_length
        self.bar = tqdm(total=total, initial=engine.state.iteration, unit="step", mininterval=0, dynamic_ncols=True)

    def iteration_completed(self, engine: Engine) -> None:
        # reading a loss waits for the device, so it is done as often as it is seen
        if time.monotonic() - self.shown < self.seconds and engine.state.iteration < self.bar.total:
            return
        self.shown = time.monotonic()
        parts = {"loss": engine.state.output[CommonKeys.LOSS]} if self.loss is None else self.loss.parts
        self.bar.set_description(f"epoch {engine.state.epoch}/{engine.state.max_epochs}", refresh=False)
        self.bar.set_postfix({k: f"{v.item():.3f}" for k, v in parts.items()}, refresh=False)
        self.bar.update(engine.state.iteration - self.bar.n)

    def completed(self) -> None:
        if self.bar is not None:  # there was something left to train
            self.bar.close()


class LossCheck:
    """Ends a training whose loss is no longer finite, and names the files of the batch.

    The losses stay on the device and are looked at together, since each look waits for it.

    Args:
        dataloader: of the training.
        interval: iterations between two looks.
    """

    def __init__(self, dataloader: SeededDataLoader, interval: int = 10) -> None:
        self.dataloader = dataloader
        self.interval = interval
        self.pending: dict[int, Tensor] = {}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)

    def iteration_completed(self, engine: Engine) -> None:
        self.pending[engine.state.iteration] = engine.state.output[CommonKeys.LOSS].detach()
        if len(self.pending) >= self.interval:
            self()

    def __call__(self) -> None:
        """Look at the losses since the last look. Raises an InputError at the first that is not finite."""
        losses, self.pending = self.pending, {}
        values = torch.stack(list(losses.values())).tolist() if losses else []
        for iteration, value in zip(losses, values, strict=True):
            if not math.isfinite(value):
                raise InputError(
                    f"the loss is {value} at iteration {iteration}, in the batch of "
                    f"{', '.join(self.dataloader.files(iteration))}; nothing was saved since. If a file is at fault, "
                    "exclude it; else lower learning_rate or set amp to false, and give --resume the checkpoint's path"
                )


class Checkpointer:
    """Keeps all that a training needs to go on after it was killed, and the weights that other bundles take.

    Writes ``path`` and keeps the one before as ``..._previous``: at the end of epochs, and in their midst by the clock.
    Both are whole files at any moment. Together with :class:`custom_components.run.seeded.SeededDataLoader`, by which
    order and random numbers follow from the position in the training, a run that goes on ends with the weights of one
    that was never interrupted. Frozen parameters are not stored, but must be the same when the training goes on.
    Under torchrun, rank 0 writes and all read: ``path`` must be on a disk that all machines share.

    For optimiser and schedule the config's values hold, and not the checkpoint's: ``max_epochs`` may be raised.

    Args:
        path: the checkpoint.
        objects: what to keep by name (network, optimizer, lr_scheduler, ...): anything with a state dict.
        weights: further files, each with the plain state dict of one module, written at the end of epochs.
        interval: epochs between two checkpoints; the last epoch always writes one.
        resume: ``auto`` goes on from ``path`` if it is there, else from the one before, else starts. None starts anew
            and replaces what is there. A path goes on from that file.
        minutes: time between two checkpoints in the midst of an epoch, after a step of the optimiser; None writes none.
        recipe: settings that a training goes on with. ``auto`` refuses a checkpoint of another recipe.
        loss_check: attached to the same engine, ahead of the checkpoints, and called before anything is written.

    Raises:
        InputError: nothing readable to go on from, or made by another recipe, or it does not fit the network.
    """

    def __init__(
        self,
        path: str,
        objects: Mapping[str, Any],
        weights: Mapping[str, nn.Module],
        interval: int = 1,
        resume: str | None = "auto",
        minutes: float | None = None,
        recipe: Mapping[str, Any] | None = None,
        loss_check: LossCheck | None = None,
    ) -> None:
        self.path = Path(path)
        self.previous = self.path.with_name(f"{self.path.stem}_previous{self.path.suffix}")
        self.objects = dict(objects)
        self.weights = dict(weights)
        self.interval = interval
        self.resume = None if resume == "null" else resume  # the command line gives null as a word
        self.minutes = math.inf if minutes is None else minutes
        self.recipe = dict(recipe or {})
        self.loss_check = loss_check
        self.resumed = False
        self.saved_at = time.monotonic()
        self.frozen: dict[str, str | None] = {}

    def attach(self, engine: SupervisedTrainer) -> None:
        if not isinstance(engine.data_loader, SeededDataLoader):
            raise InputError(
                f"the training's dataloader is a {type(engine.data_loader).__name__}: make it a "
                "custom_components.run.seeded.SeededDataLoader, without which a checkpoint cannot be gone on from"
            )
        if self.loss_check is not None:
            self.loss_check.attach(engine)
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)

    def started(self, engine: SupervisedTrainer) -> None:
        modules = {name: item for name, item in self.objects.items() if isinstance(item, nn.Module)}
        self.frozen = {name: fingerprint(module) for name, module in modules.items()}
        if rank() == 0:
            for path in (self.path, *self.weights):
                remove_temporary(path)
        if self.resume is not None:
            self.restore(engine)
        self.saved_at = time.monotonic()

    def iteration_completed(self, engine: SupervisedTrainer) -> None:
        due = time.monotonic() - self.saved_at >= 60 * self.minutes
        if due and completes_step(engine) and engine.state.iteration % engine.state.epoch_length:
            self.save(engine)

    def epoch_completed(self, engine: SupervisedTrainer) -> None:
        if engine.state.epoch % self.interval == 0 or engine.state.epoch == engine.state.max_epochs:
            self.save(engine)

    def save(self, engine: SupervisedTrainer) -> None:
        """Write the checkpoint; at the end of an epoch first the weights for others, so that it never stands alone."""
        if self.loss_check is not None:
            self.loss_check()
        if rank() > 0:
            return
        content: dict[str, Any] = {}
        for name, item in self.objects.items():
            content[name] = item.state_dict()
            if isinstance(item, nn.Module):
                frozen = frozen_parameters(item)
                content[name] = {k: v for k, v in content[name].items() if k not in frozen}
                self._check_finite(item)
        loader = engine.data_loader
        epoch, batch = divmod(engine.state.iteration, engine.state.epoch_length)
        content["trainer"] = {
            "iteration": engine.state.iteration,
            "epoch": epoch,
            "items": batch * loader.batch_size * world_size(),  # of the running epoch, that were trained on
            "epoch_items": len(loader.dataset),
        }
        content |= {"recipe": self.recipe, "frozen": self.frozen}
        if batch == 0:
            for path, module in self.weights.items():
                save_atomically(module.state_dict(), path)
        save_atomically(content, self.path, self.previous if self.resumed else None)
        if not self.resumed:
            self.previous.unlink(missing_ok=True)  # of a training that this one replaces
        self.resumed = True
        self.saved_at = time.monotonic()

    def _check_finite(self, module: nn.Module) -> None:
        trained = [p for p in module.parameters() if p.requires_grad]
        if not torch.stack([p.isfinite().all() for p in trained]).all():
            raise InputError(
                f"{self.path}: not written, since the weights are no longer finite; lower learning_rate or set amp to "
                "false, and give --resume the path of the checkpoint that is there"
            )

    def restore(self, engine: SupervisedTrainer) -> None:
        """Go on from a checkpoint, if there is one."""
        # a disk may show other files to other machines: rank 0 chooses
        path, content = self._read() if rank() == 0 else (None, None)
        path = from_rank_zero(path)
        if path is None:
            return
        if rank() > 0:
            content = load_file(path)
        wanted = {*self.objects, "trainer", "recipe", "frozen"}
        absent = sorted(wanted - set(content)) if isinstance(content, Mapping) else sorted(wanted)
        if absent:
            raise InputError(f"{path}: not a checkpoint to resume from, it lacks {', '.join(absent)}")
        self._compare_recipe(path, content["recipe"])
        for name, item in self.objects.items():
            if isinstance(item, nn.Module):
                check_fingerprint(item, content["frozen"].get(name), path)
            try:
                _restore_state(item, content[name])
            except (RuntimeError, ValueError, KeyError) as error:
                raise InputError(
                    f"{path}: its {name} does not fit the config; resume with the keys it was trained with, or "
                    "start anew with --resume null or another --models_dir"
                ) from error
        self._restore_position(path, engine, content["trainer"])
        self.resumed = True

    def _read(self) -> tuple[Path | None, Any]:
        if self.resume != "auto":
            return Path(self.resume), load_file(self.resume)
        found = [path for path in (self.path, self.previous) if path.is_file()]
        for path in found:
            try:
                content = load_file(path)
            except InputError as error:
                if path == found[-1]:
                    raise InputError(f"{error}; no other is kept: start anew with --resume null") from error
                logger.warning(f"{error}; going on from the one before it")
                continue
            return path, content
        return None, None

    def _compare_recipe(self, path: Path, saved: Mapping[str, Any]) -> None:
        changed = [key for key in self.recipe if key in saved and self.recipe[key] != saved[key]]
        if not changed:
            return
        told = "; ".join(f"{key} was {saved[key]} and is {self.recipe[key]}" for key in changed)
        if self.resume == "auto":
            raise InputError(
                f"{path}: was trained by another recipe ({told}). Give the old values to go on, --models_dir another "
                f"folder or --resume null to start anew, or --resume {path} to go on by the new recipe"
            )
        logger.warning(f"{path}: going on by another recipe ({told})")

    def _restore_position(self, path: Path, engine: SupervisedTrainer, saved: Mapping[str, int]) -> None:
        loader, state = engine.data_loader, engine.state
        batch, odd = divmod(saved["items"], loader.batch_size * world_size())
        if batch and (odd or saved["epoch_items"] != len(loader.dataset)):
            logger.warning(
                f"{path}: epoch {saved['epoch'] + 1} starts anew, since the training data or effective_batch_size "
                "have changed in its midst"
            )
            batch = 0
        loader.start = batch
        state.epoch = saved["epoch"]
        state.iteration = state.epoch * state.epoch_length + batch
        if state.epoch >= state.max_epochs:
            logger.info(
                f"{path}: training has had {state.epoch} of {state.max_epochs} epochs and is finished; raise "
                "max_epochs to train on, or train anew with --resume null"
            )
        else:
            logger.info(
                f"{path}: going on in epoch {state.epoch + 1} of {state.max_epochs}, after iteration {state.iteration}"
            )


def _restore_state(item: Any, saved: Mapping[str, Any]) -> None:
    """``item.load_state_dict(saved)``, but what a config sets stays as it is set."""
    if isinstance(item, nn.Module):
        missing, unexpected = item.load_state_dict(saved, strict=False)
        if set(missing) != frozen_parameters(item) or unexpected:
            raise KeyError((*missing, *unexpected))
    elif isinstance(item, Optimizer):
        configured = [{k: v for k, v in group.items() if k != "params"} for group in item.param_groups]
        item.load_state_dict(saved)
        for group, own in zip(item.param_groups, configured, strict=True):
            # where a schedule runs, the rate is the schedule's, on the scale of the configured one
            rate = group["lr"] * own["initial_lr"] / group["initial_lr"] if "initial_lr" in own else own["lr"]
            group.update(own | {"lr": rate})
    elif isinstance(item, LRScheduler):
        position = {key: saved[key] for key in ("last_epoch", "_step_count", "_last_lr")}
        item.load_state_dict(item.state_dict() | position)
    else:
        item.load_state_dict(saved)


class LastStep:
    """Ends training at ``max_steps`` iterations exactly, within an epoch if need be, so that a cosine schedule really
    reaches its end. That epoch still counts as completed: its validation and its checkpoint are made.
    """

    def __init__(self, max_steps: int) -> None:
        if max_steps < 1:
            raise InputError(f"max_steps is {max_steps}: give the number of optimiser steps, 1 or more")
        self.max_steps = max_steps

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.epoch_started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)

    def epoch_started(self, engine: Engine) -> None:
        if engine.state.iteration >= self.max_steps:  # gone on from the checkpoint of a finished training
            engine.terminate()

    def iteration_completed(self, engine: Engine) -> None:
        if engine.state.iteration >= self.max_steps:
            engine.terminate_epoch()


class ClipGradients:
    """Scales the gradient of all parameters down to a norm of ``max_norm`` before each optimiser step."""

    def __init__(self, network: nn.Module, max_norm: float) -> None:
        self.network = network
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self.clip)

    def clip(self) -> None:
        nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm)


class KeepBest:
    """Keeps the weights of the best validation, and ends a training that no longer improves.

    Attach it to the trainer before :class:`Checkpointer`, and give it to that as one of its objects: a resumed training
    then knows what it has to beat.

    Args:
        network: whose state dict is written.
        evaluator: whose metric counts.
        metric: its name; higher is better.
        path: of the weights.
        patience: validations without improvement before the training ends; None never ends it.
    """

    def __init__(
        self, network: nn.Module, evaluator: Engine, metric: str, path: str, patience: int | None = None
    ) -> None:
        self.network = network
        self.evaluator = evaluator
        self.metric = metric
        self.path = Path(path)
        self.patience = patience
        self.best = -math.inf
        self.epoch = 0
        self.waited = 0

    def attach(self, engine: Engine) -> None:
        """``engine``: the trainer."""
        self.evaluator.add_event_handler(Events.COMPLETED, self.compare, engine)
        engine.add_event_handler(Events.EPOCH_STARTED, self.epoch_started)

    def epoch_started(self, engine: Engine) -> None:
        if self.exhausted:  # gone on from the checkpoint of a training that had ended so
            engine.terminate()

    def compare(self, evaluator: Engine, trainer: Engine) -> None:
        metrics = evaluator.state.metrics
        if self.metric not in metrics:
            raise InputError(
                f"select_by is {self.metric!r}, and validation gives {', '.join(metrics)}: choose of these"
            )
        value = float(metrics[self.metric])
        if value > self.best:  # NaN, where no class is anywhere, is never better
            self.best, self.epoch, self.waited = value, trainer.state.epoch, 0
            if rank() == 0:
                save_atomically(self.network.state_dict(), self.path)
        else:
            self.waited += 1
        shown = ", ".join(f"{name} {float(found):.4f}" for name, found in metrics.items())
        logger.info(f"epoch {trainer.state.epoch}: {shown}; best {self.metric} {self.best:.4f} at epoch {self.epoch}")
        if self.exhausted:
            logger.info(f"no better {self.metric} in {self.waited} validations: training ends here")
            trainer.terminate()

    @property
    def exhausted(self) -> bool:
        """Whether patience is at its end."""
        return self.patience is not None and self.waited >= self.patience

    def restore(self) -> None:
        """Fill the network with the best weights, so that what follows evaluates those."""
        if not self.epoch:
            raise InputError(
                "no validation took place or none was better than NaN: lower val_interval or raise max_epochs"
            )
        self.network.load_state_dict(load_file(self.path))

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best, "epoch": self.epoch, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.best, self.epoch, self.waited = state["best"], state["epoch"], state["waited"]


class SentenceSimilarityInferer(Inferer):
    """How similar each sentence is to each place of a volume, as a map on the network's grid.

    Args:
        sentences: what to look for.
        text_encoder, tokenizer: the frozen text encoder of pre-training and its tokenizer.
    """

    def __init__(self, sentences: Sequence[str], text_encoder: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.sentences = list(sentences)
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer

    def __call__(self, inputs: Tensor, network: VolumeEmbedder, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """``inputs [B, 1, X, Y, Z]`` -> ``similarity [B, S, X, Y, Z]``, cosines, and ``embedding [B, C]``."""
        volume = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        sentences = encode_sentences(self.sentences, network.aligner, self.text_encoder, self.tokenizer)
        patches, embedding = network.patches_and_embedding(volume)
        maps = [upsample_patches(similarity(p, sentences), network.encoder.grid, volume.shape[2:]) for p in patches]
        return {"similarity": torch.stack(maps), "embedding": embedding}


class ProbeInferer(Inferer):
    """Probabilities of a :class:`custom_components.probe.LinearProbe`, and saliency maps of some classes.

    Args:
        classes: names of the logits.
        saliency: classes to map; "all" for every one, None or empty for none.
        exclusive: whether exactly one class is true: softmax instead of sigmoid.
        amp: forward pass in bfloat16.

    Raises:
        InputError: ``saliency`` names a class that there is not.
    """

    def __init__(
        self,
        classes: Sequence[str],
        saliency: str | Sequence[str] | None = None,
        exclusive: bool = False,
        amp: bool = True,
    ) -> None:
        super().__init__()
        self.mapped = saliency_classes(classes, saliency)
        self.index = [list(classes).index(name) for name in self.mapped]
        self.exclusive = exclusive
        self.amp = amp

    def __call__(self, inputs: Tensor, network: LinearProbe, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """``inputs [B, 1, X, Y, Z]`` -> ``probability [B, C]``, and ``saliency [B, S, X, Y, Z]`` if asked for."""
        volume = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        with torch.autocast(volume.device.type, torch.bfloat16, enabled=self.amp):
            if not self.index:
                logits = network(volume)
            else:
                logits, patches = network.logits_and_saliency(volume)
        output = {"probability": logits.float().softmax(-1) if self.exclusive else logits.float().sigmoid()}
        if self.index:
            maps = patches[:, self.index].float()
            output["saliency"] = torch.stack(
                [upsample_patches(m, network.encoder.grid, volume.shape[2:]) for m in maps]
            )
        return output


def saliency_classes(classes: Sequence[str], saliency: str | Sequence[str] | None) -> list[str]:
    """The classes that the key ``saliency`` asks to map."""
    wanted = list(classes) if saliency == "all" else [saliency] if isinstance(saliency, str) else list(saliency or ())
    unknown = [name for name in wanted if name not in classes]
    if unknown:
        raise InputError(f"saliency names {unknown[0]!r}, which is no class: give all, or some of {', '.join(classes)}")
    return wanted


class ReadableLoader:
    """Batches of one from a data set, passing over items that cannot be read; a progress bar shows how far it is.

    Args:
        dataset: whose items have a ``name``.
        num_workers: processes that read ahead.
        description: what the progress bar calls this.

    Attributes:
        failures: ``(name, reason)`` of the items passed over so far.
    """

    def __init__(self, dataset: Dataset, num_workers: int = 0, description: str | None = None) -> None:
        self.dataset = dataset
        self.num_workers = num_workers
        self.description = description
        self.failures: list[tuple[str, str]] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.failures.clear()
        loader = DataLoader(_Attempts(self.dataset), self.num_workers, collate_fn=itemgetter(0))
        for item, name, reason in tqdm(loader, self.description, unit="scan", total=len(self.dataset)):
            if reason is None:
                yield list_data_collate([item])
            else:
                self.failures.append((name, reason))
                tqdm.write(f"skipped: {reason}", file=sys.stderr)

    def report(self) -> None:
        """Raise an :class:`InputError` that lists what was passed over, so that the run ends with exit code 1."""
        if self.failures:
            names = ", ".join(name for name, _ in self.failures)
            raise InputError(
                f"{len(self.failures)} of {len(self.dataset)} scans could not be read ({names}); the others are done, "
                "the reasons stand above"
            )


class _Attempts(torch.utils.data.Dataset):
    """Each item with its name and the reason why it cannot be read, or None."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, str, str | None]:
        name = self.dataset.data[index]["name"]
        try:
            return self.dataset[index], name, None
        except Exception as error:  # MONAI wraps what a transform raises; anything else is a bug and goes on up
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, InputError):
                cause = cause.__cause__
            if cause is None:
                raise
            return None, name, str(cause)
