"""Forward passes: in bfloat16, by windows, and over scans of which some cannot be read."""

import errno
import itertools
import math
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from types import FrameType, SimpleNamespace
from typing import Any

import torch
from custom_components.errors import InputError
from custom_components.run.seeded import WatchedDataLoader
from monai.data import Dataset, MetaTensor, list_data_collate
from monai.engines import SupervisedEvaluator
from monai.inferers import SimpleInferer, SlidingWindowInferer
from torch import Tensor, nn
from torch.utils.data import Sampler
from torch.utils.data._utils import signal_handling
from tqdm import tqdm

SECONDS_WITHOUT_BAR = 5.0


class AutocastInferer(SimpleInferer):
    """Forward pass in bfloat16 if ``amp``. Needs no gradient scaler, unlike ``SupervisedTrainer(amp=True)``.

    A network's tensor comes out in float32, so that any loss or metric may follow; any other output as it is.
    """

    def __init__(self, amp: bool = True) -> None:
        super().__init__()
        self.amp = amp

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.amp):
            output = super().__call__(inputs, network, *args, **kwargs)
        return output.float() if isinstance(output, Tensor) else output


class WindowInferer(SlidingWindowInferer):
    """MONAI's sliding window with Gaussian blending, made to bound memory.

    Logits come out in float16. Tall volumes are done in slabs along the last axis: windows of different slabs that
    overlap are computed for both, so the result is that of one pass, but fp32 sums exist for one slab at a time.

    Args:
        roi_size: the network's region, in voxels. Smaller volumes are padded with air.
        slab_windows: windows along the last axis in one slab.
        progress: show a bar of windows for a volume that takes longer than ``SECONDS_WITHOUT_BAR``.
        options: MONAI's, such as ``sw_batch_size`` and ``overlap``.
    """

    def __init__(
        self, roi_size: Sequence[int], amp: bool = True, slab_windows: int = 8, progress: bool = False, **options: Any
    ) -> None:
        super().__init__(roi_size, mode="gaussian", cval=-1.0, **options)
        self.forward = AutocastInferer(amp)
        self.slab_windows = slab_windows
        self.bar_of_windows = progress  # MONAI's own would be one for each slab

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """``inputs [B, C, X, Y, Z]`` -> logits ``[B, classes, X, Y, Z]`` float16, a plain tensor."""
        inputs = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        size, roi = inputs.shape[-1], self.roi_size[-1]
        *across, (step, rows) = map(self._places, inputs.shape[2:], self.roi_size)
        before = math.ceil(roi / step) - 1  # rows of windows that reach into a slab from the one before it
        # MONAI moves the last row back to the volume's end, into the row before it: it never is a slab of its own
        starts = [row for row in range(0, rows, self.slab_windows) if row == 0 or row < rows - max(before, 1)]
        slabs = [(max(0, start - before), start, stop) for start, stop in itertools.pairwise([*starts, rows])]
        windows = math.prod(count for _, count in across) * sum(stop - first for first, _, stop in slabs)
        bar = tqdm(
            total=windows * len(inputs), unit="window", leave=False, delay=SECONDS_WITHOUT_BAR,
            disable=not self.bar_of_windows,
        )  # fmt: skip

        def forward(batch: Tensor) -> Tensor:
            logits = self.forward(batch, network)
            bar.update(len(batch))
            return logits

        output: Tensor | None = None
        with bar:
            for first_row, start, stop in slabs:
                first = first_row * step
                last = size if stop == rows else (stop - 1) * step + roi
                own = slice(start * step, size if stop == rows else stop * step)
                logits = super().__call__(inputs[..., first:last], forward)
                if output is None:
                    output = logits.new_empty((*logits.shape[:2], *inputs.shape[2:]), dtype=torch.float16)
                output[..., own] = logits[..., own.start - first : own.stop - first]
        return output

    def _places(self, size: int, roi: int) -> tuple[int, int]:
        """Step and number of windows along an axis, as MONAI has them."""
        step = max(1, int(roi * (1 - self.overlap)))
        return step, max(1, math.ceil((size - roi) / step) + 1)


@dataclass
class ReadableLoader:
    """Batches of one from a data set, passing over items that fail; a progress bar shows how far it is.

    Args:
        dataset: whose items have a ``name`` when they are read, by which their results are called.
        timeout_minutes: see :class:`custom_components.run.seeded.WatchedDataLoader`.
        take: asked of each index just before the item is read, whether this process is to read it; None for all.

    Attributes:
        failures: ``(name, reason)`` of the items passed over so far.
    """

    dataset: Dataset
    num_workers: int = 0
    description: str | None = None
    timeout_minutes: float | None = None
    take: Callable[[int], bool] | None = None
    failures: list[tuple[str, str]] = field(default_factory=list, init=False)
    _what: str = field(default="read", init=False, repr=False)
    _told: set[str] = field(default_factory=set, init=False, repr=False)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.failures.clear()
        self._what = "read"
        given = {item["name"] for item in self.dataset.data if "name" in item}
        names = set(given)
        with tqdm(desc=self.description, unit="scan", total=len(self.dataset)) as bar:
            for item, name, failure in self._attempts(bar):
                if failure is None and name not in given:  # its name is the file's, by LoadCTd
                    if item["name"] in names:
                        failure = f"{name} has the name of another scan, {item['name']}: give each item a name", ""
                    names.add(item["name"])
                if failure is None:
                    yield list_data_collate([item])
                else:
                    self._pass_over(name, *failure)
                bar.update()  # it is done now, and not when it was read

    def _attempts(self, bar: tqdm) -> Iterator[tuple[Any, str, tuple[str, str] | None]]:
        """What :func:`attempt` says of each item, in their order, though a worker be killed, or hang."""

        def attempts(indices: list[int], num_workers: int) -> Iterator:
            places = Dataset([{"image": _name(self.dataset, i), "index": i} for i in indices], self._attempt)
            options = {"sampler": _Turns(indices, self.take, bar), "collate_fn": itemgetter(0)}
            return iter(WatchedDataLoader(places, num_workers, self.timeout_minutes, **options))

        left = list(range(len(self.dataset)))
        answers, alone = None, False
        with _deaths() as deaths:
            while left:
                if answers is None:
                    answers = attempts(left[:1], 1) if alone else attempts(left, self.num_workers)
                try:
                    deaths.told = True
                    signal_handling._error_if_any_worker_fails()  # of one that died while the last scan was processed
                    answer = next(answers, None)
                    deaths.told = False
                except InputError as error:  # of a worker that hangs, at the next in turn
                    deaths.told, answers = False, None
                    answer = None, _name(self.dataset, left[0]), (str(error), "")
                except Exception as error:
                    deaths.told, answers = False, None
                    if not _of_a_death(error):
                        raise
                    if not alone:  # which scan it had, torch does not say: the next in turn, if it costs one more
                        alone = True
                        continue
                    name = _name(self.dataset, left[0])
                    answer = None, name, (f"{name} {KILLED}", "")
                if answer is None and not alone:
                    return  # what there was left, others take
                del left[0]
                if alone:
                    answers, alone = None, False
                if answer is not None:
                    yield answer

    def _attempt(self, place: dict[str, Any]) -> tuple[Any, str, tuple[str, str] | None]:
        return attempt(self.dataset, place["index"])

    def iteration(self, engine: SupervisedEvaluator, batch: dict[str, Any]) -> dict[str, Any] | None:
        """What the evaluator does with a batch, as its ``iteration_update``: a failure is that of one scan."""
        try:
            return engine._iteration(engine, batch)
        except Exception as error:
            failure = reason_of(batch["name"][0], error)
        engine.state.output = None  # as large as the scan
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.pass_over(batch["name"][0], *failure)
        return None

    def pass_over(self, name: str, reason: str, trace: str = "") -> None:
        """Note that a scan that was read could not be processed, and say so."""
        self._what = "read or processed"
        self._pass_over(name, reason, trace)

    def _pass_over(self, name: str, reason: str, trace: str) -> None:
        self.failures.append((name, reason))
        if trace and trace not in self._told:  # of a fault that every scan meets, once
            self._told.add(trace)
            tqdm.write(trace, file=sys.stderr, end="")
        tqdm.write(f"skipped: {reason}", file=sys.stderr)

    def report(self) -> None:
        """Raise an :class:`InputError` that lists what was passed over, so that the run ends with exit code 1."""
        if self.failures:
            names = ", ".join(name for name, _ in self.failures)
            raise InputError(
                f"{len(self.failures)} of {len(self.dataset)} scans could not be {self._what} ({names}); "
                "the others are done, the reasons stand above"
            )


class _Turns(Sampler):
    """Places in ``left``, in turn; an index that ``take`` leaves to another process goes from there, and from the bar.

    Loaders ask for a place when a worker is free for it, and once more for those that they had already.
    """

    def __init__(self, left: list[int], take: Callable[[int], bool] | None, bar: tqdm) -> None:
        self.left, self.take, self.bar = left, take, bar
        self.had: list[int] = []

    def __iter__(self) -> Iterator[int]:
        if self.had:
            yield from list(self.had)
            return
        for place, index in enumerate(list(self.left)):
            if self.take is None or self.take(index):
                self.had.append(place)
                yield place
            else:
                self.left.remove(index)
                self.bar.total -= 1


KILLED = (
    "ends the process that reads it, alone and beside others: crop it, or take a machine with more memory; or, if its "
    "file is at fault, export it again"
)


@contextmanager
def _deaths() -> Iterator[SimpleNamespace]:
    """Of workers, torch tells by an error at any line of the main thread: here only while ``told`` is set to True.

    So no scan is lost that was read, and none interrupted that is processed. In other threads torch looks for the dead
    while it waits.
    """
    deaths = SimpleNamespace(told=False)
    if threading.current_thread() is not threading.main_thread():
        yield deaths
        return

    def tell(signum: int, frame: FrameType | None) -> None:
        if deaths.told:
            signal_handling._error_if_any_worker_fails()

    signal_handling._set_SIGCHLD_handler()  # which loaders set once in a process, over ours else
    before = signal.signal(signal.SIGCHLD, tell)
    try:
        yield deaths
    finally:
        signal.signal(signal.SIGCHLD, before)


def _of_a_death(error: Exception) -> bool:
    """Whether it is torch's of a worker that is no more, or that of a connection to one that is about to be.

    A connection names no file; an error of the disk, which ``take`` may meet, does.
    """
    if isinstance(error, (ConnectionError, EOFError, FileNotFoundError)):
        return getattr(error, "filename", None) is None
    return "DataLoader worker (pid" in str(error)


def _name(dataset: Dataset, index: int) -> str:
    return dataset.data[index].get("name", str(dataset.data[index].get("image")))


def attempt(dataset: Dataset, index: int) -> tuple[Any, str, tuple[str, str] | None]:
    """An item with its name, or that name with the reason why there is none and the trace of it."""
    name = _name(dataset, index)
    try:
        return dataset[index], name, None
    except Exception as error:
        return None, name, reason_of(name, error)


def reason_of(name: str, error: BaseException) -> tuple[str, str]:
    """Why a scan failed, in a line, and, where the scan is not known to be at fault, the trace to find the fault by.

    Raises:
        OSError: the disk is full, so that no other scan would get its results either.
    """
    causes = [error]  # MONAI wraps what a transform raises
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    for cause in causes:
        if isinstance(cause, InputError):
            return str(cause), ""
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise error
        # torch says so in a RuntimeError on a CPU
        if isinstance(cause, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(cause):
            return f"{name}: not enough memory ({_line(cause)}): crop the scan, or take a machine with more", ""
    return f"{name}: {_line(causes[-1])}", "".join(traceback.format_exception(error))


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
