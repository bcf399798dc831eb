"""Checkpoints: written whole, resumed from exactly, the best weights kept, and none of a loss that is not finite."""

import copy
import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from custom_components.distributed import any_rank, from_all_ranks, from_rank_zero, rank, world_size
from custom_components.errors import InputError
from custom_components.files import remove_temporary
from custom_components.processes import EndOnSignal, Interrupted
from custom_components.run.handlers import completes_step
from custom_components.run.seeded import SeededDataLoader
from custom_components.run.weights import (
    check_fingerprint,
    fingerprint,
    frozen_parameters,
    load_file,
    misfits,
    save_atomically,
    save_weights,
)
from ignite.engine import Engine, Events
from monai.engines import IterationEvents, SupervisedTrainer
from monai.utils.enums import CommonKeys
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0  # of validations that are not better


@dataclass
class LossCheck:
    """Ends a training whose loss is no longer finite, and names the files of the batch.

    Losses stay on the device and are looked at together, every ``interval`` iterations, since each look waits for it.
    """

    dataloader: SeededDataLoader
    interval: int = 10
    pending: dict[int, Tensor] = field(default_factory=dict, init=False)

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


@dataclass
class Checkpointer:
    """Writes checkpoints, resumes from them, and writes the weights that other bundles take.

    A checkpoint goes to ``path`` at the end of epochs, and within them by the clock; the one before is kept as
    ``..._previous``. Both are whole files at any moment. Order and random numbers follow from the position in the
    training (:class:`custom_components.run.seeded.SeededDataLoader`), so a resumed run ends with the weights of one
    that was never interrupted. Frozen parameters are not stored; a resumed run must have the same. For optimiser and
    schedule the config's values hold, and not the checkpoint's: ``max_epochs`` may be raised. What was kept is restored
    once, at the first start, and never over weights that others have set since the trainer was made, as federated
    clients do.
    A signal (:class:`custom_components.processes.EndOnSignal`) ends the training with a checkpoint after the running
    step of the optimiser; one that comes in a validation, with a checkpoint from which the validation is done anew.
    Under torchrun, rank 0 writes and all read: ``path`` must be on a disk that all machines share. A signal to any of
    the processes ends all of them, after the same step.

    Args:
        objects: what to keep by name (network, optimizer, lr_scheduler, ...): anything with a state dict.
        weights: modules by file name beside ``path``: state dicts, written at the end of epochs. None is left out.
        interval: epochs between two checkpoints; the last epoch always writes one.
        resume: ``auto`` resumes from ``path`` if it is there, else from the one before, else starts. None starts anew
            and replaces what is there. A path resumes from that file.
        minutes: time between two checkpoints within an epoch, after a step of the optimiser; None writes none.
        recipe: settings of the training, and fingerprints of what it starts from. ``auto`` refuses a checkpoint of
            another recipe; but another ``dataset_dir`` goes, where ``data`` and ``files`` show the same in it.
        description: of the weights, written beside each of them and inside the checkpoint; see
            :func:`custom_components.run.description.describe`.
        loss_check: sees every loss, and is called before anything is written.

    Raises:
        InputError: nothing readable to resume from, or made by another recipe, or it does not fit the network.
    """

    path: str | Path
    objects: Mapping[str, Any]
    weights: Mapping[str, nn.Module | None] | None = None
    interval: int = 1
    resume: str | None = "auto"
    minutes: float | None = None
    recipe: Mapping[str, Any] | None = None
    loss_check: LossCheck | None = None
    description: Mapping[str, Any] | None = None
    resumed: bool = field(default=False, init=False)
    position: dict[str, int] | None = field(default=None, init=False)  # the last one kept
    restored: Path | None = field(default=None, init=False)  # where it came from
    made: list[int] | None = field(default=None, init=False)  # until the first start
    # what the handlers of a running end of an epoch, such as a validation, may change, as it was before them
    before: dict[str, Any] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.path = Path(self.path)
        self.previous = self.path.with_name(f"{self.path.stem}_previous{self.path.suffix}")
        self.weights = {self.path.with_name(k): v for k, v in (self.weights or {}).items() if v is not None}
        self.recipe = dict(self.recipe or {})

    def attach(self, engine: SupervisedTrainer) -> None:
        if not isinstance(engine.data_loader, SeededDataLoader):
            raise InputError(
                f"the training's dataloader is a {type(engine.data_loader).__name__}: make it a "
                "custom_components.run.seeded.SeededDataLoader, without which no checkpoint can be resumed"
            )
        if self.loss_check is not None:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.loss_check.iteration_completed)
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.EPOCH_STARTED, self.epoch_started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)
        engine.add_event_handler(Events.COMPLETED, self.completed)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.exception_raised)
        self.made = self._writes()

    def _writes(self) -> list[int]:
        """How often each tensor of the modules has been written to, as torch counts."""
        modules = [item for item in self.objects.values() if isinstance(item, nn.Module)]
        return [tensor._version for module in modules for tensor in module.state_dict(keep_vars=True).values()]

    def started(self, engine: SupervisedTrainer) -> None:
        modules = {name: item for name, item in self.objects.items() if isinstance(item, nn.Module)}
        self.frozen = {name: fingerprint(module) for name, module in modules.items()}
        if rank() == 0:
            for path in (self.path, *self.weights, *(path.with_suffix(".json") for path in self.weights)):
                remove_temporary(path)
        if self.made is not None and self.resume is not None:
            if self._writes() == self.made:
                self.restore()
            elif self.path.is_file():
                logger.warning(
                    f"{self.path}: not resumed from, since weights were set from outside: training on from them"
                )
        self.made = None
        self.saved_at = time.monotonic()
        # ignite counts anew where a training is run again that has ended
        if self.position is not None and not engine.state.iteration:
            self._restore_position(engine)
            if self.position.get("epoch_ends"):
                self._note_before()
                engine.fire_event(Events.EPOCH_COMPLETED)  # its validation was interrupted

    def epoch_started(self, engine: SupervisedTrainer) -> None:
        self._defer(True)

    def iteration_completed(self, engine: SupervisedTrainer) -> None:
        if not completes_step(engine):
            return
        due = self.minutes is not None and time.monotonic() - self.saved_at >= 60 * self.minutes
        asked = any_rank(self._asked())
        epoch_ends = engine.state.iteration % engine.state.epoch_length == 0 or engine.should_terminate_single_epoch
        if epoch_ends:
            self._note_before()
        if asked:
            self._save_and_end(engine)
        if due and not epoch_ends:
            self.save(engine)
        if epoch_ends:
            self._defer(False)  # a validation may take long

    def epoch_completed(self, engine: SupervisedTrainer) -> None:
        self._defer(True)
        self.before = None
        asked = any_rank(self._asked())
        if asked:
            self._save_and_end(engine)
        if engine.state.epoch % self.interval == 0 or engine.state.epoch == engine.state.max_epochs:
            self.save(engine)

    def completed(self, engine: SupervisedTrainer) -> None:
        self._defer(False)
        if self._asked():  # since the last checkpoint
            EndOnSignal.current().end(f"the training is finished, and {self.path} holds it; the same command goes on")

    def exception_raised(self, engine: SupervisedTrainer, error: BaseException) -> None:
        self._defer(False)
        # or an error, where the signal has ended another process that this one talks to
        if self.before is not None and (isinstance(error, Interrupted) or self._asked()):
            self._save_and_end(engine, together=False)
        raise error

    @staticmethod
    def _asked() -> bool:
        """Whether a signal has asked this process to end."""
        handler = EndOnSignal.current()
        return handler is not None and handler.received is not None

    @staticmethod
    def _defer(deferred: bool) -> None:
        if (handler := EndOnSignal.current()) is not None:
            handler.deferred = deferred

    def _save_and_end(self, engine: SupervisedTrainer, together: bool = True) -> NoReturn:
        handler = EndOnSignal.current() or EndOnSignal()
        handler.deferred = handler.ending = True
        self.save(engine)
        if together:
            any_rank(True)  # waits for rank 0: torchrun ends those that are left when one is gone
        self.before = None
        handler.end(
            f"{self.path} holds the training up to iteration {engine.state.iteration}; the same command goes on from it"
        )

    def _note_before(self) -> None:
        changing = (nn.Module, Optimizer, LRScheduler)  # in steps alone
        others = {name: item for name, item in self.objects.items() if not isinstance(item, changing)}
        self.before = {name: copy.deepcopy(item.state_dict()) for name, item in others.items()}

    def save(self, engine: SupervisedTrainer) -> None:
        """Write the checkpoint; at the end of an epoch first the weights for others, so that it never stands alone."""
        if self.loss_check is not None:
            self.loss_check()
        modules = [item for item in self.objects.values() if isinstance(item, nn.Module)]
        if not all(p.isfinite().all() for module in modules for p in module.parameters() if p.requires_grad):
            raise InputError(
                f"{self.path}: not written, since the weights are no longer finite; lower learning_rate or set amp to "
                "false, and give --resume the path of the checkpoint that is there"
            )
        loader = engine.data_loader
        epoch, batch = divmod(engine.state.iteration, engine.state.epoch_length)
        self.position = {
            "iteration": engine.state.iteration,
            "epoch": epoch,
            "items": batch * loader.batch_size * world_size(),  # of the running epoch, that were trained on
            "epoch_items": len(loader.dataset),
        }
        if self.before is not None:
            self.position["epoch_ends"] = 1
        if rank() == 0:
            self._write(with_weights=batch == 0)
        self.resumed = True
        self.saved_at = time.monotonic()

    def _write(self, with_weights: bool) -> None:
        content = {name: _state(item) for name, item in self.objects.items()} | (self.before or {})
        content |= {"trainer": self.position, "recipe": self.recipe, "frozen": self.frozen}
        if self.description is not None:
            content["description"] = dict(self.description)
        if with_weights:
            for path, module in self.weights.items():
                save_weights(module.state_dict(), path, self.description)
        save_atomically(content, self.path, self.previous if self.resumed else None)
        if not self.resumed:
            self.previous.unlink(missing_ok=True)  # of a training that this one replaces

    def restore(self) -> None:
        """Fill the objects from a checkpoint, if there is one."""
        # a disk may show other files to other machines: rank 0 chooses
        path, content = self._read() if rank() == 0 else (None, None)
        path = from_rank_zero(path)
        if path is None:
            return
        if rank() > 0:
            content = load_file(path)
        found = content if isinstance(content, Mapping) else {}
        if absent := sorted({*self.objects, "trainer", "recipe", "frozen"} - found.keys()):
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
        self.restored, self.position = path, content["trainer"]
        self.resumed = True

    def _read(self) -> tuple[Path | None, Any]:
        if self.resume != "auto":
            cure = "check the path, or set resume to null to start without it"
            return Path(self.resume), load_file(self.resume, "resume", cure)
        found = [path for path in (self.path, self.previous) if path.is_file()]
        for path in found:
            try:
                return path, load_file(path)
            except InputError as error:
                if path == found[-1]:
                    raise InputError(f"{error}; no other is kept: start anew with --resume null") from error
                logger.warning(f"{error}; going on from the one before it")
        return None, None

    def _compare_recipe(self, path: Path, saved: Mapping[str, Any]) -> None:
        changed = [key for key in self.recipe if key in saved and self.recipe[key] != saved[key]]
        told = self.recipe.keys() & saved.keys()
        if "dataset_dir" in changed and {"data", "files"} <= told and not {"data", "files"} & set(changed):
            changed.remove("dataset_dir")
            logger.info(
                f"{path}: dataset_dir was {saved['dataset_dir']} and is {self.recipe['dataset_dir']}; going on, since "
                "it has the same list, of files of the same sizes"
            )
        changes = "; ".join(f"{key} was {saved[key]} and is {self.recipe[key]}" for key in changed)
        changes = re.sub(r"\b([0-9a-f]{6})[0-9a-f]{10,}\b", r"\1", changes)  # enough of a hash to tell two apart
        if changed and self.resume == "auto":
            raise InputError(
                f"{path}: was trained by another recipe. Give --models_dir another folder, or --resume null, to start "
                f"anew; the old values to go on; or --resume {path} to go on by the new recipe ({changes})"
            )
        if changed:
            logger.warning(f"{path}: going on by another recipe ({changes})")

    def _restore_position(self, engine: SupervisedTrainer) -> None:
        path, saved, loader, state = self.restored or self.path, self.position, engine.data_loader, engine.state
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
        if saved.get("epoch_ends"):
            state.epoch, loader.start = -(-state.iteration // state.epoch_length), 0
        if state.epoch < state.max_epochs:
            where = f"going on in epoch {state.epoch + 1} of {state.max_epochs}, after iteration {state.iteration}"
        else:
            where = (
                f"training has had {state.epoch} of {state.max_epochs} epochs and is finished; raise max_epochs to "
                "train on, or train anew with --resume null"
            )
        logger.info(f"{path}: {where}")


def _state(item: Any) -> dict[str, Any]:
    """``item.state_dict()``, without frozen parameters."""
    frozen = frozen_parameters(item) if isinstance(item, nn.Module) else {}
    return {name: value for name, value in item.state_dict().items() if name not in frozen}


def _restore_state(item: Any, saved: Mapping[str, Any]) -> None:
    """``item.load_state_dict(saved)``, but what a config sets stays as it is set."""
    if isinstance(item, nn.Module):
        own = _state(item)
        if strangers := [*misfits(own, saved), *saved.keys() - own.keys()]:
            raise KeyError(*strangers)
        item.load_state_dict(saved, strict=False)
    elif isinstance(item, Optimizer):
        configured = [{k: v for k, v in group.items() if k != "params"} for group in item.param_groups]
        item.load_state_dict(saved)
        for group, own in zip(item.param_groups, configured, strict=True):
            # where a schedule runs, the rate is the schedule's, on the scale of the configured one
            rate = group["lr"] * (own["initial_lr"] / group["initial_lr"]) if "initial_lr" in own else own["lr"]
            group.update(own | {"lr": rate})
    elif isinstance(item, LRScheduler):
        position = {key: saved[key] for key in ("last_epoch", "_step_count", "_last_lr")}
        item.load_state_dict(item.state_dict() | position)
    else:
        item.load_state_dict(saved)


@dataclass
class KeepBest:
    """Keeps the weights of the best validation, and ends a training that no longer improves.

    Attach it to the trainer before :class:`Checkpointer`, whose ``objects`` must hold it: a resumed training then knows
    what it has to beat.

    Args:
        evaluator, metric: the metric that counts; higher is better.
        patience: validations without improvement before the training ends; None never ends it.
        loss: of predictions and labels of a validation batch, before they are postprocessed; between equal metrics, the
            lower mean of it counts. With None the earlier epoch does.
        interval: epochs between validations.
        description: of the weights, written beside them; see :func:`custom_components.run.description.describe`.
    """

    network: nn.Module
    evaluator: Engine
    metric: str
    path: str
    patience: int | None = None
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    interval: int = 1
    description: Mapping[str, Any] | None = None
    best: float = field(default=-math.inf, init=False)
    best_loss: float = field(default=math.inf, init=False)
    epoch: int = field(default=0, init=False)
    waited: int = field(default=0, init=False)
    losses: list[Tensor] = field(default_factory=list, init=False)
    told: float = field(default=-math.inf, init=False)

    def attach(self, trainer: Engine) -> None:
        self.evaluator.add_event_handler(IterationEvents.FORWARD_COMPLETED, self.forward_completed)
        self.evaluator.add_event_handler(Events.COMPLETED, self.compare, trainer)
        trainer.add_event_handler(Events.STARTED, self.started)
        trainer.add_event_handler(Events.EPOCH_STARTED, self.epoch_started)

    def started(self, engine: Engine) -> None:
        if self.interval > engine.state.max_epochs:
            raise InputError(
                f"val_interval is {self.interval}, and the training has {engine.state.max_epochs} epochs, so that none "
                "is validated: lower val_interval, or train longer"
            )

    def forward_completed(self, evaluator: Engine) -> None:
        if self.loss is not None:
            output = evaluator.state.output
            logits = output[CommonKeys.PRED].float()  # windows are kept in half precision
            self.losses.append(self.loss(logits, output[CommonKeys.LABEL]).detach())

    def mean_loss(self) -> float:
        """Of the validation batches since the last look, of all processes; infinite where there is none."""
        losses, self.losses = self.losses, []
        if self.loss is None:
            return math.inf
        mean = torch.stack(losses).mean() if losses else torch.tensor(math.nan)
        means = [m for m in from_all_ranks((float(mean), len(losses))) if m[1]]
        count = sum(n for _, n in means)
        return sum(m * n for m, n in means) / count if count else math.inf

    def epoch_started(self, engine: Engine) -> None:
        if self.exhausted:  # resumed from the checkpoint of a training that had ended so
            engine.terminate()

    def compare(self, evaluator: Engine, trainer: Engine) -> None:
        metrics = evaluator.state.metrics
        if self.metric not in metrics:
            raise InputError(
                f"select_by is {self.metric!r}, and validation gives {', '.join(metrics)}: choose of these"
            )
        value, loss = float(metrics[self.metric]), self.mean_loss()
        before = self.best
        better = (value, -loss) > (self.best, -self.best_loss)  # NaN, where no class is anywhere, is never better
        if better:
            self.best, self.best_loss, self.epoch, self.waited = value, loss, trainer.state.epoch, 0
            if rank() == 0:
                save_weights(self.network.state_dict(), self.path, self.description)
        else:
            self.waited += 1
        if better or time.monotonic() - self.told > SECONDS_BETWEEN_LINES:  # a probe validates many times a second
            self.told = time.monotonic()
            shown = ", ".join(f"{name} {float(found):.4f}" for name, found in metrics.items())
            of_equals = ", by the lower loss" if better and value == before else ""
            best = f"best {self.metric} {self.best:.4f} at epoch {self.epoch}{of_equals}"
            logger.info(f"epoch {trainer.state.epoch}: {shown}; {best}")
        if self.exhausted:
            logger.info(f"no better {self.metric} in {self.waited} validations: training ends here")
            trainer.terminate()

    @property
    def exhausted(self) -> bool:
        return self.patience is not None and self.waited >= self.patience

    def restore(self) -> None:
        """Fill the network with the best weights, so that what follows evaluates those."""
        if not self.epoch:
            raise InputError(
                "no validation took place or none was better than NaN: lower val_interval or raise max_epochs"
            )
        self.network.load_state_dict(load_file(self.path))

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best, "best_loss": self.best_loss, "epoch": self.epoch, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.best, self.epoch, self.waited = state["best"], state["epoch"], state["waited"]
        self.best_loss = state.get("best_loss", math.inf)
