"""Order and random numbers of a training follow from seed, epoch and place alone."""

from __future__ import annotations

import os
import random
import re
import time

import numpy as np
import pytest
import torch
from custom_components.errors import InputError
from custom_components.run.seeded import EpochSampler, SeededDataLoader, WatchedDataLoader, mixed_seed
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import CacheDataset, Dataset, list_data_collate
from monai.transforms import Compose, Lambdad, RandScaleIntensityd
from torch.utils.data import DistributedSampler, Subset

from tests.watch import runs, within


def order(items: int, processes: int, process: int, seed: int, epoch: int) -> list[int]:
    sampler = EpochSampler(range(items), processes, process, seed=seed)
    sampler.set_epoch(epoch)
    places = list(sampler)
    assert {e for e, _ in places} <= {epoch} and len(places) == len(sampler)
    return [index for _, index in places]


def batches(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 5), st.integers(0, 9), st.integers(1, 9))
def test_processes_share_the_batches_of_one_with_a_larger_batch(items, processes, size, seed, epoch):
    alone = batches(order(items, 1, 0, seed, epoch), size * processes)
    shares = [batches(order(items, processes, p, seed, epoch), size) for p in range(processes)]
    assert len({len(share) for share in shares}) == 1, "else one would wait for the others for ever"
    together = [sorted(sum(parts, [])) for parts in zip(*shares, strict=True)]
    if items % processes == 0:
        assert together == [sorted(batch) for batch in alone]
    else:  # a few are repeated, so that all have as many
        used = sum(together, [])
        assert set(used) == set(range(items)) and len(used) - items < processes


def test_every_epoch_has_an_order_of_its_own():
    orders = {tuple(order(20, 1, 0, seed, epoch)) for seed in (1, 2) for epoch in (1, 2, 3)}
    assert len(orders) == 4  # torch's sampler adds seed and epoch
    assert all(sorted(o) == list(range(20)) for o in orders)


def test_seeds_of_neighbours_are_far_apart():
    seeds = {mixed_seed(seed, epoch, index) for seed in range(10) for epoch in range(10) for index in range(100)}
    assert len(seeds) == 10_000 and np.std(list(seeds)) == pytest.approx(2**32 / 12**0.5, rel=0.02)


class Masks:
    """A collate function that draws from torch's generator, as the report's masking does."""

    def __call__(self, items):
        return list_data_collate(items) | {"mask": torch.rand(len(items))}


READ: list[float] = []


def loader(num_workers: int = 0, cached: bool | str = False, seed: int = 3) -> SeededDataLoader:
    data = [{"image": f"/data/scan{i}.nii.gz", "x": torch.full((2,), float(i))} for i in range(7)]
    read = Lambdad("x", lambda x: READ.append(x[0].item()) or x)
    transform = Compose([read, RandScaleIntensityd("x", factors=0.1, prob=0.9)])
    dataset = Dataset(data, transform)
    if cached:
        dataset = CacheDataset(data, transform, progress=False, runtime_cache=cached == "as it goes")
    return SeededDataLoader(dataset, 2, seed, num_workers, Masks())


def epochs(loader: SeededDataLoader, *numbers: int) -> list[tuple]:
    """All that is random in some epochs, a draw of each generator as the network would make it included."""
    drawn = []
    for number in numbers:
        loader.sampler.set_epoch(number)
        for batch in loader:
            network = (torch.rand(1).item(), float(np.random.rand()), random.random())
            drawn.append((tuple(batch["x"].flatten().tolist()), tuple(batch["mask"].tolist()), network))
            torch.rand(len(drawn))  # what else may draw
    return drawn


def test_all_that_is_random_is_the_same_again_whatever_ran_before():
    expected = epochs(loader(), 1, 2)
    assert len(set(expected)) == len(expected) == 8
    torch.manual_seed(99)
    assert epochs(loader(), 2) == expected[4:]
    assert epochs(loader(cached=True), 1, 2) == epochs(loader(cached="as it goes"), 1, 2) == expected
    assert epochs(loader(num_workers=2), 2, 1) == expected[4:] + expected[:4]
    assert not set(epochs(loader(seed=4), 1, 2)) & set(expected)


def test_the_collate_function_leaves_the_generator_as_it_was():
    """Else the random numbers of what runs between two batches would hang on the number of workers."""
    items = iter(loader())
    torch.manual_seed(1)
    before = torch.get_rng_state()
    collate = loader().collate_fn
    collate([(5, {"x": torch.ones(1)})])
    assert torch.equal(torch.get_rng_state(), before)
    next(items)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_epoch_goes_on_without_reading_what_it_leaves_out(num_workers):
    expected, started = epochs(loader(), 2), loader(num_workers)
    started.start = 3
    READ.clear()
    assert epochs(started, 2) == expected[3:]
    assert len(READ) == (1 if num_workers == 0 else 0)  # a worker's reading is its own
    assert epochs(started, 2) == expected, "the next epoch is a whole one"
    assert len(started) == 4


def test_files_of_an_iteration_are_those_of_its_batch():
    made = loader()
    for epoch in (1, 2):
        made.sampler.set_epoch(epoch)
        for i, batch in enumerate(made):
            names = [path.rpartition("/")[2] for path in batch["image"]]
            assert made.files(4 * (epoch - 1) + i + 1) == names


class Hanging(torch.utils.data.Dataset):
    """Volumes of which one is never read."""

    transform = None

    def __init__(self) -> None:
        self.data = [{"image": f"/data/scan{i}.nii.gz"} for i in range(6)]

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict:
        if index == 4:
            time.sleep(600)
        return {"x": index}


def test_no_more_workers_than_cores(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    for cores, wanted, workers in (({0, 5}, 8, 2), ({5}, 2, 1), ({0, 1, 2}, 2, 2), ({0}, 0, 0)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores)
        assert WatchedDataLoader(Dataset([1]), wanted).num_workers == workers
        assert SeededDataLoader(Dataset([1]), 1, 0, wanted).num_workers == workers
    assert not [warning for warning in recwarn if "worker" in str(warning.message)]


def test_a_worker_that_hangs_is_named_with_its_files_and_ended() -> None:
    loader = WatchedDataLoader(Hanging(), num_workers=1, timeout_minutes=0.02, batch_size=2)
    batches = iter(loader)
    assert [next(batches)["x"].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(InputError, match=r"process \d+, a worker, has not read scan4.nii.gz, scan5.nii.gz") as told:
        next(batches)
    assert "timeout_minutes" in str(told.value) and "\n" not in str(told.value)
    assert within(5, lambda: not runs(int(re.search(r"process (\d+)", str(told.value))[1])))


def test_the_hanging_file_of_a_process_that_reads_a_share_is_named() -> None:
    everything = Hanging()
    share = Subset(everything, [5, 1, 4, 0])
    loader = WatchedDataLoader(share, 1, 0.02, sampler=DistributedSampler(share, 2, 0, shuffle=False))
    with pytest.raises(InputError, match="has not read scan4.nii.gz within"):
        list(loader)


def test_a_training_names_the_hanging_file_of_its_shuffled_order() -> None:
    loader = SeededDataLoader(Hanging(), 2, seed=1, num_workers=1, timeout_minutes=0.02)
    loader.sampler.set_epoch(1)
    with pytest.raises(InputError, match="has not read .*scan4.nii.gz"):
        list(loader)


@pytest.mark.parametrize(
    ("items", "batch_size", "processes"), [(31, 1, 2), (31, 2, 2), (9, 4, 2), (5, 1, 3), (1, 1, 2)]
)
def test_processes_share_an_epoch_without_repeats_but_for_one_that_would_have_nothing(
    items: int, batch_size: int, processes: int
) -> None:
    shares = []
    for rank in range(processes):
        sampler = EpochSampler(range(items), processes, rank, 1, batch_size)
        sampler.set_epoch(1)
        shares.append([index for _, index in sampler])
    assert len({-(-len(share) // batch_size) for share in shares}) == 1, "as many batches in each"
    one = EpochSampler(range(items), 1, 0, 1)
    one.set_epoch(1)
    order = [index for _, index in one]
    together = batch_size * processes
    for start in range(0, items, together):
        step = slice(start // processes, start // processes + batch_size)
        assert {index for share in shares for index in share[step]} == set(order[start : start + together])
    assert sum(map(len, shares)) - items < processes
