"""Batches in an order, and with random numbers, that depend on seed, epoch and place alone."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import DataLoader, Dataset, list_data_collate
from monai.transforms import Randomizable
from torch.utils.data import DistributedSampler

from custom_components.distributed import rank, world_size


def mixed_seed(*numbers: int) -> int:
    """One 32-bit seed from several numbers, far from that of similar numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class EpochSampler(DistributedSampler):
    """``(epoch, index)`` of each item of an epoch, in the order that seed and epoch shuffle; every process its share.

    It repeats a few items where the processes would get unequal shares. MONAI's engines set the epoch.

    Attributes:
        start: how many items the next epoch skips, since a run that resumes within it has trained on them already.
    """

    start: int = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        start, self.start = self.start, 0
        return ((self.epoch, index) for index in islice(super().__iter__(), start, None))


class SeededDataLoader(DataLoader):
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
        kwargs: more of torch's DataLoader's arguments.

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
        self.start = 0
        super().__init__(
            _SeededItems(dataset, seed),
            num_workers,
            batch_size=batch_size,
            sampler=EpochSampler(dataset, world_size(), rank(), seed=seed),
            collate_fn=partial(_seeded, collate_fn),
            **kwargs,
        )

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
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
        names = []
        for process in range(self.sampler.num_replicas):
            order = EpochSampler(self.dataset, self.sampler.num_replicas, process, seed=self.seed)
            order.set_epoch(epoch + 1)
            for _, index in list(order)[batch * self.batch_size : (batch + 1) * self.batch_size]:
                item = self.dataset.items.data[index]
                names.append(Path(item["image"]).name if "image" in item else f"item {index}")
        return names


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
