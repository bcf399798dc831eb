"""Batches in an order, and with random numbers, that follow from seed, epoch and place; loaders that do not hang."""

import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from custom_components.distributed import rank, world_size
from custom_components.errors import InputError
from custom_components.processes import cores, follow_parent, signals_wait
from monai.data import DataLoader, Dataset, list_data_collate
from monai.data.utils import worker_init_fn
from monai.transforms import Randomizable
from torch.utils.data import DistributedSampler, Subset
from torch.utils.data._utils import signal_handling


def mixed_seed(*numbers: int) -> int:
    """One 32-bit seed from several numbers, far from that of similar numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class WatchedDataLoader(DataLoader):
    """MONAI's DataLoader, whose workers end with their parent, and whose hangs are told.

    Args:
        dataset: whose ``data`` names each item's file under ``image``; its sampler gives its order again.
        num_workers: processes that read; no more than this process may use cores, of which torch would warn.
        timeout_minutes: within which a worker must give a batch; None waits for ever.
        kwargs: more of torch's DataLoader's arguments.

    Raises:
        InputError: when iterated, a worker has given none: its process, and the files that it reads.
    """

    def __init__(
        self, dataset: Dataset, num_workers: int = 0, timeout_minutes: float | None = None, **kwargs: Any
    ) -> None:
        self.timeout_minutes = timeout_minutes
        num_workers = min(num_workers, cores())
        timeout = 60 * timeout_minutes if num_workers and timeout_minutes else 0
        if world_size() > 1:
            timeout *= 0.8  # the others, which wait as long for this process, cannot name the file
        super().__init__(dataset, num_workers, timeout=timeout, worker_init_fn=_begin_worker, **kwargs)

    def __iter__(self) -> Iterator[Any]:
        with signals_wait():
            batches = super().__iter__()
        number = 0
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader timed out" not in str(error):
                    raise
                worker = batches._workers[batches._task_info[batches._rcvd_idx][0]].pid
                signal_handling._remove_worker_pids(id(batches))  # else torch raises an error of its own by its end
                batches._worker_pids_set = False
                os.kill(worker, signal.SIGKILL)  # torch would wait for it
                raise InputError(
                    f"process {worker}, a worker, has not read {', '.join(self.names(number))} within timeout_minutes "
                    f"({self.timeout_minutes:g}): look at the file and its disk, or raise it if they are only slow"
                ) from error
            yield batch
            number += 1

    def names(self, number: int) -> list[str]:
        """Of the files in a batch of the running iteration, which counts from 0."""
        return [_name(self.dataset, index) for index in next(islice(self.batch_sampler, number, None))]


def _begin_worker(worker: int) -> None:
    worker_init_fn(worker)
    follow_parent()


def _name(dataset: Dataset, index: int) -> str:
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, dataset.indices[index]
    item = dataset.data[index] if hasattr(dataset, "data") else {}
    return Path(str(item["image"])).name if "image" in item else f"item {index}"


class EpochSampler(DistributedSampler):
    """``(epoch, index)`` of each item of an epoch, in the order that seed and epoch shuffle; every process its share.

    MONAI's engines set the epoch. Shares differ by an item where the processes do not divide the epoch. Only a process
    that would have nothing in the last batch repeats an item of it, so that all make the same number of batches.

    Attributes:
        start: how many items the next epoch skips, since a run that resumes within it has trained on them already.
    """

    start: int = 0

    def __init__(self, dataset: Dataset, num_replicas: int, rank: int, seed: int, batch_size: int = 1) -> None:
        super().__init__(dataset, num_replicas, rank, seed=seed)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        start, self.start = self.start, 0
        everything = DistributedSampler(self.dataset, 1, 0, seed=self.seed)
        everything.set_epoch(self.epoch)
        order = list(everything)
        own = order[self.rank :: self.num_replicas]
        if len(own) < self.num_samples and len(own) % self.batch_size == 0:
            left = order[len(own) * self.num_replicas :]
            own.append(left[self.rank % len(left)])
        return ((self.epoch, index) for index in own[start:])


def own_share(dataset: Dataset) -> range:
    """The sampler of this process' share of a validation, in order and without repeats: shares may differ by an item.

    Raises:
        InputError: a process would have nothing, and a metric over all processes would wait for it for ever.
    """
    if len(dataset) < world_size():
        raise InputError(
            f"{len(dataset)} validation scans for {world_size()} processes: lower --nproc_per_node to {len(dataset)}, "
            "or put more scans into validation_split"
        )
    return range(rank(), len(dataset), world_size())


class SeededDataLoader(WatchedDataLoader):
    """MONAI's DataLoader for training, made repeatable: a run resumes within an epoch from its position alone.

    - The order follows from the seed and the epoch.
    - An item's random transforms start from seed, epoch and index; the collate function's random numbers from the
      batch's first item. So they are the same for any number of workers.
    - Before a batch is handed out, the generators of Python, NumPy and torch (all devices) are set from seed, epoch,
      batch and rank: the network's masks and dropout differ between processes, and do not depend on what ran before.

    Under torchrun every process gets its share of each epoch: batch k of all processes together holds the items that
    batch k of one process with a batch size so many times larger would hold.

    Args:
        dataset: whose ``transform`` may be random, and whose ``data`` names each item's file under ``image``.
        kwargs: more of :class:`WatchedDataLoader`'s arguments.

    Attributes:
        start: how many batches the next epoch skips; their items are not read.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        collate_fn: Callable[[Sequence[Any]], Any] = list_data_collate,
        **kwargs: Any,
    ) -> None:
        self.seed = seed
        self.start = self.first = 0  # batches that the next epoch skips, and that the running one has skipped
        super().__init__(
            _SeededItems(dataset, seed),
            num_workers,
            batch_size=batch_size,
            sampler=EpochSampler(dataset, world_size(), rank(), seed, batch_size),
            collate_fn=partial(_seeded, collate_fn),
            **kwargs,
        )

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        self.first = start
        self.sampler.start = start * self.batch_size
        for i, batch in enumerate(super().__iter__(), start):
            seed = mixed_seed(self.seed, self.sampler.epoch, i, self.sampler.rank)
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield batch

    def files(self, iteration: int) -> list[str]:
        """Names of the files in the batches that all processes had in an iteration, which counts from 1."""
        epoch, batch = divmod(iteration - 1, len(self))
        processes = range(self.sampler.num_replicas)
        return [name for process in processes for name in self._names(process, epoch + 1, batch)]

    def names(self, number: int) -> list[str]:
        return self._names(self.sampler.rank, self.sampler.epoch, self.first + number)

    def _names(self, process: int, epoch: int, batch: int) -> list[str]:
        order = EpochSampler(self.dataset, self.sampler.num_replicas, process, self.seed, self.batch_size)
        order.set_epoch(epoch)
        indices = list(order)[batch * self.batch_size : (batch + 1) * self.batch_size]
        return [_name(self.dataset.items, index) for _, index in indices]


@dataclass
class _SeededItems(torch.utils.data.Dataset):
    """``(seed, item)`` at ``(epoch, index)``, the item's random transforms started from that seed."""

    items: Dataset
    seed: int

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: tuple[int, int]) -> tuple[int, Any]:
        seed = mixed_seed(self.seed, *place)
        if isinstance(self.items.transform, Randomizable):
            self.items.transform.set_random_state(seed)
        return seed, self.items[place[1]]


def _seeded(collate: Callable[[Sequence[Any]], Any], items: Sequence[tuple[int, Any]]) -> Any:
    """Collates with torch's CPU generator started from the first item's seed, and then set back."""
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(items[0][0])
        return collate([item for _, item in items])
