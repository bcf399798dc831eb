"""The few engine parts that MONAI and ignite lack."""

from __future__ import annotations

import logging
import math
import re
import sys
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
from monai.inferers import Inferer, SimpleInferer, SlidingWindowInferer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from custom_components.errors import InputError
from custom_components.losses import SimCroPLoss
from custom_components.simcrop import VolumeEmbedder, similarity, upsample_patches
from custom_components.text import encode_sentences
from custom_components.weights import load_file, save_atomically

logger = logging.getLogger(__name__)


class OneLineErrors:
    """Tell an :class:`InputError` in its own line, instead of MONAI's and the data loader's nested tracebacks.

    Installs itself as ``sys.excepthook``, so the exit code stays 1; any other exception is shown in full.
    """

    PATTERN = re.compile(rf"^(?:.*\.)?{InputError.__name__}: (.+)$", re.MULTILINE)

    def __init__(self) -> None:
        sys.excepthook = self

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # a data loader's worker sends its exception as text, so the text is what can be searched
        found = self.PATTERN.findall("".join(traceback.format_exception(kind, error, trace)))
        if found:
            # the last: a worker's own InputError stands behind "InputError: Caught InputError in DataLoader worker"
            for bar in list(getattr(tqdm, "_instances", ())):
                bar.close()  # else the message would stand at the end of a bar's line
            print(f"error: {found[-1]}", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)


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


class TrainingProgress:
    """One bar over the whole training: epoch, each loss, time left. Stops at a loss that is not finite.

    Args:
        loss: whose ``parts`` are shown.
    """

    def __init__(self, loss: SimCroPLoss) -> None:
        self.loss = loss
        self.bar: tqdm | None = None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)
        engine.add_event_handler(Events.COMPLETED | Events.TERMINATE, self.completed)

    def started(self, engine: Engine) -> None:
        # a log file wants a line now and then, a terminal wants motion
        interval = 0.5 if sys.stderr.isatty() else 10.0
        total = engine.state.max_epochs * engine.state.epoch_length
        self.bar = tqdm(
            total=total, initial=engine.state.iteration, unit="step", mininterval=interval, dynamic_ncols=True
        )

    def iteration_completed(self, engine: Engine) -> None:
        # the sum first: reading it waits for the device once
        if not math.isfinite(self.loss.parts["total"].item()):
            parts = {name: value.item() for name, value in self.loss.parts.items()}
            raise InputError(
                f"the loss is no longer finite at iteration {engine.state.iteration} ({parts}): "
                "the last checkpoint is kept; lower learning_rate, or set amp to false, and resume"
            )
        self.bar.set_description(f"epoch {engine.state.epoch}/{engine.state.max_epochs}", refresh=False)
        self.bar.set_postfix({k: f"{v.item():.3f}" for k, v in self.loss.parts.items()}, refresh=False)
        self.bar.update()

    def completed(self) -> None:
        self.bar.close()


class Checkpointer:
    """Writes one checkpoint to resume from, and the weights that other bundles take, every ``interval`` epochs.

    Unlike MONAI's ``CheckpointSaver``, every file is renamed into place, and torch's generators keep their state.
    Random transforms start anew from the seed.

    Args:
        path: the checkpoint.
        objects: what to keep by name (network, optimizer, lr_scheduler); the engine is kept as ``trainer``.
        weights: further files, each with the plain state dict of one module.
        interval: epochs between two checkpoints; the last epoch always writes one.
        resume: checkpoint to start from, or None.
    """

    def __init__(
        self,
        path: str,
        objects: Mapping[str, Any],
        weights: Mapping[str, nn.Module],
        interval: int = 1,
        resume: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.objects = dict(objects)
        self.weights = dict(weights)
        self.interval = interval
        self.resume = resume

    def attach(self, engine: Engine) -> None:
        if self.resume is not None:
            self.restore(engine)
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self.save)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    def completed(self, engine: Engine) -> None:
        if engine.state.epoch % self.interval:  # else the last epoch has just been saved
            self.save(engine)

    def save(self, engine: Engine) -> None:
        content = {name: item.state_dict() for name, item in self.objects.items()}
        content |= {"trainer": engine.state_dict(), "rng": torch.get_rng_state()}
        if torch.cuda.is_available():
            content["cuda_rng"] = torch.cuda.get_rng_state_all()
        save_atomically(content, self.path)
        for path, module in self.weights.items():
            save_atomically(module.state_dict(), path)

    def restore(self, engine: Engine) -> None:
        content = load_file(self.resume)
        absent = sorted({*self.objects, "trainer", "rng"} - set(content))
        if absent:
            raise InputError(f"{self.resume}: not a checkpoint to resume from, it lacks {', '.join(absent)}")
        for name, item in self.objects.items():
            try:
                item.load_state_dict(content[name])
            except (RuntimeError, ValueError, KeyError) as error:
                raise InputError(
                    f"{self.resume}: its {name} does not fit the config; resume with the keys it was trained with"
                ) from error
        max_epochs = engine.state.max_epochs
        engine.load_state_dict(content["trainer"])
        if engine.state.epoch >= max_epochs:
            raise InputError(
                f"{self.resume}: has {engine.state.epoch} epochs already; raise max_epochs ({max_epochs}) to train on"
            )
        engine.state.max_epochs = max_epochs
        torch.set_rng_state(content["rng"])
        if torch.cuda.is_available() and len(content.get("cuda_rng", ())) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(content["cuda_rng"])


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

    def compare(self, evaluator: Engine, trainer: Engine) -> None:
        metrics = evaluator.state.metrics
        if self.metric not in metrics:
            raise InputError(
                f"select_by is {self.metric!r}, and validation gives {', '.join(metrics)}: choose of these"
            )
        value = float(metrics[self.metric])
        if value > self.best:  # NaN, where no class is anywhere, is never better
            self.best, self.epoch, self.waited = value, trainer.state.epoch, 0
            save_atomically(self.network.state_dict(), self.path)
        else:
            self.waited += 1
        shown = ", ".join(f"{name} {float(found):.4f}" for name, found in metrics.items())
        logger.info(f"epoch {trainer.state.epoch}: {shown}; best {self.metric} {self.best:.4f} at epoch {self.epoch}")
        if self.patience is not None and self.waited >= self.patience:
            logger.info(f"no better {self.metric} in {self.waited} validations: training ends here")
            trainer.terminate()

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


class ReadableLoader:
    """Batches of one from a data set, passing over items that cannot be read; a progress bar shows how far it is.

    Args:
        dataset: whose items have a ``name``.
        num_workers: processes that read ahead.

    Attributes:
        failures: ``(name, reason)`` of the items passed over so far.
    """

    def __init__(self, dataset: Dataset, num_workers: int = 0) -> None:
        self.dataset = dataset
        self.num_workers = num_workers
        self.failures: list[tuple[str, str]] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.failures.clear()
        loader = DataLoader(_Attempts(self.dataset), self.num_workers, collate_fn=itemgetter(0))
        for item, name, reason in tqdm(loader, unit="scan", total=len(self.dataset)):
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
