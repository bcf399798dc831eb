"""Training in several processes, one per device: who this process is, how to start, and sums over all of them.

All of it also works in a single process without a process group, where torch.distributed raises. ignite.distributed
does not, but its first call waits for all processes, and after the group has ended each raises.
"""

import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from custom_components.errors import InputError
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger(__name__)

SECONDS_TO_SPEAK = 3.0  # processes that have waited in vain for the same give up within less


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process; 0 is the one that writes."""
    return dist.get_rank() if world_size() > 1 else 0


def _environment(name: str) -> int:
    if name not in os.environ:
        raise InputError(
            f"{name} is not set: start this config with torchrun --nproc_per_node=N -m monai.bundle run ..., "
            "or leave the multi_gpu overlay out"
        )
    return int(os.environ[name])


def local_device() -> torch.device:
    """The device of this process on its machine: a GPU of its own, or the CPU where there is none.

    Raises:
        InputError: not started by torchrun, or more processes than GPUs.
    """
    number = _environment("LOCAL_RANK")
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if number >= torch.cuda.device_count():
        raise InputError(
            f"process {number} of this machine finds {torch.cuda.device_count()} GPUs: lower --nproc_per_node to that, "
            "or set device to \"$torch.device('cpu')\""
        )
    return torch.device("cuda", number)


def start(device: torch.device, timeout_minutes: float = 10.0) -> None:
    """Join the processes that torchrun started: nccl between GPUs, gloo between CPUs. Ranks above 0 log warnings alone.

    A process gives up when it has waited for the others for ``timeout_minutes``, which must exceed the time that rank 0
    alone takes to make its data or to write a checkpoint; :func:`hanging` then says whom it has waited for.
    """
    _environment("RANK")
    hook = sys.excepthook
    timeout = timedelta(minutes=timeout_minutes)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # gloo beside it for what concerns no GPU, so that none waits for it
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    sys.excepthook = hook  # torch has put its own around it, which prefixes each line with the rank
    _store().set(f"place/{dist.get_rank()}", f"process {os.getpid()} on {socket.gethostname()}")
    if dist.get_rank() > 0:
        logging.getLogger().setLevel(logging.WARNING)


def _store() -> dist.Store:
    """Where processes leave word for each other: torchrun keeps it, so that it outlives each of them."""
    return dist.distributed_c10d._get_default_store()


def hanging(error: BaseException) -> str | None:
    """The line that names the processes of which no word came in time, if that is what an error of torch's says.

    Every process that waits in vain says so to the others; those that do not are told of.
    """
    if world_size() == 1 or not isinstance(error, RuntimeError) or "timed out" not in str(error).lower():
        return None
    try:
        store = _store()
        store.set(f"waited/{rank()}", "")
        time.sleep(SECONDS_TO_SPEAK)
        silent = [number for number in range(world_size()) if not store.check([f"waited/{number}"])]
        places = [f"rank {number} ({store.get(f'place/{number}').decode()})" for number in silent]
    except RuntimeError:  # the machine that keeps the store is gone
        return None
    if not silent:
        return None
    return (
        f"no word from {', '.join(places)} within timeout_minutes: look at what it does there (py-spy dump --pid), or "
        "raise timeout_minutes if it was only slow"
    )


def any_rank(flag: bool) -> bool:
    """Whether any process passes true; all must ask at the same place. No GPU waits for the answer."""
    if world_size() == 1:
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def leave_to_rank_zero() -> None:
    """End all processes but one, successfully: for work that is not divided, under a launcher that starts many."""
    if _environment("RANK") > 0:
        sys.exit(0)


@contextmanager
def rank_zero_first() -> Iterator[bool]:
    """The block runs in rank 0, and in the others once it has ended there; for what one makes and all read.

    Gives whether this process is the one to make it.
    """
    if rank() > 0:
        dist.barrier()
    yield rank() == 0
    if world_size() > 1 and rank() == 0:
        dist.barrier()


def accumulation_steps(effective_batch_size: int, batch_size: int, num_items: int | None = None) -> int:
    """Forward passes per optimiser step, so that a step sees ``effective_batch_size`` items on all devices together.

    Args:
        num_items: of an epoch; a warning where one step takes them all.

    Raises:
        InputError: they do not divide.
    """
    together = batch_size * world_size()
    if effective_batch_size % together or effective_batch_size < together:
        below = max(effective_batch_size // together, 1) * together
        processes = f" x {world_size()} processes = {together}" if world_size() > 1 else ""
        raise InputError(
            f"effective_batch_size {effective_batch_size} is not divisible by batch_size {batch_size}{processes}: "
            f"set effective_batch_size to {below} or {below + together}, or lower batch_size"
        )
    if num_items is not None and num_items <= effective_batch_size and rank() == 0:
        logger.warning(
            f"effective_batch_size {effective_batch_size} takes all {num_items} training volumes at once: an epoch is "
            "one step of the optimiser; lower it for more"
        )
    return effective_batch_size // together


def from_rank_zero(value: Any) -> Any:
    """What rank 0 passes, on every process."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def from_all_ranks(value: Any) -> list[Any]:
    """What each process passes, in the order of ranks, on every process."""
    values = [value]
    if world_size() > 1:
        values = [None] * world_size()
        dist.all_gather_object(values, value)
    return values


def mean_over_ranks(mean: Tensor, count: int | Tensor) -> Tensor:
    """A mean over ``count`` things of this process -> the mean over those of all processes.

    Its gradient is scaled so that DistributedDataParallel, which averages over processes, makes it that of the common
    mean. All processes must call it, with a count of 0 where they have nothing.
    """
    if world_size() == 1:
        return mean
    total = mean * count
    sums = torch.stack([total.detach().double(), torch.as_tensor(count, device=mean.device).double()])
    dist.all_reduce(sums)
    everything = sums[1].clamp(min=1)
    share = total * (world_size() / everything).to(mean.dtype)
    return (sums[0] / everything).to(mean.dtype) + (share - share.detach())


class LossOverRanks:
    """A loss that is a mean over the items of a batch, made that over the batches of all processes, which may differ by
    an item: see :func:`mean_over_ranks`."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.loss = loss

    def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
        return mean_over_ranks(self.loss(pred, target), len(pred))


class _AllGather(torch.autograd.Function):
    """Tensors of one shape from all processes, stacked; each gets the gradients that all processes have for it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        gathered = tensor.new_empty((world_size(), *tensor.shape))
        dist.all_gather(list(gathered.unbind()), tensor.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[rank()]


def gather_rows(rows: Tensor) -> list[Tensor]:
    """``rows [n, ...]`` of every process, in the order of ranks; n may differ. Gradients flow back to their rows.

    A loss that every process computes alike from gathered rows gets, after DistributedDataParallel's average, the
    gradient of a single process that has all rows.
    """
    if world_size() == 1:
        return [rows]
    sizes = _AllGather.apply(torch.tensor(len(rows), device=rows.device)).tolist()
    padded = F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, max(sizes) - len(rows)))
    return [part[:n] for part, n in zip(_AllGather.apply(padded), sizes, strict=True)]
