"""Kernels and settings that only CPUs need: each does what torch does, where torch's own way is slow on them."""

import atexit
import ctypes
import itertools
import os
import sys
import threading
from pathlib import Path

import torch
from custom_components.processes import cores
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

BFLOAT16_UNITS = ("amx_bf16", "avx512_bf16")  # as torch.cpu.get_capabilities names them, the faster first
WATCH, IDLE = "watch over the cores", "idle OpenMP team"
WHOLE = 384  # keys from which whole products are the faster way
BUSY, FREE = 30.0, 10.0  # percent of the time: a run alone, whose threads spin, makes about 1
SECONDS_BETWEEN_LOOKS = 3.0
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h (glibc)


def keep_freed(device: torch.device) -> bool:
    """Keep what freed tensors leave for the next ones, instead of giving it back to the system each time.

    glibc maps every block above 32 MiB anew, and the system clears each of its pages at the first touch: with feature
    maps of a 3D network that takes as long as the convolutions. In return the process, and each that it forks, keeps
    its highest use of memory until it ends, which is higher by the gaps between blocks.

    Returns:
        Whether anything was changed: only with glibc, and only if the network's ``device`` is a CPU.
    """
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: 64 * 2**20}
    taken = [] if mallopt is None else [mallopt(name, value) for name, value in settings.items()]  # all are tried
    return bool(taken) and all(taken)


def threads_within_quota(file: str = "/sys/fs/cgroup/cpu.max") -> int:
    """Compute in no more threads than the container's share of the CPUs (``docker run --cpus``) has cores.

    torch counts the machine's cores: with more threads than the share has, all are stopped for most of each period.
    ``OMP_NUM_THREADS`` has the last word.

    Args:
        file: where Linux keeps the share: microseconds of CPU time in each period, and the period; or ``max`` for all.

    Returns:
        The number of threads.
    """
    threads = torch.get_num_threads()
    quota, period = Path(file).read_text().split() if os.path.isfile(file) else ("max", "")
    if quota != "max" and "OMP_NUM_THREADS" not in os.environ:
        threads = min(threads, max(1, round(int(quota) / int(period))))
        torch.set_num_threads(threads)
    return threads


def wait_asleep_when_busy(device: torch.device, pressure: str = "/proc/pressure/cpu") -> bool:
    """Let OpenMP's threads sleep while they wait for each other, as long as other processes want the cores.

    A thread that spins is faster where it has a core of its own, and else keeps the core from the one that it waits
    for. libgomp spins 300,000 times, but 100 times where there are more of its threads than cores (GCC's manual,
    GOMP_SPINCOUNT). It reads its environment as torch is loaded, before any config; so here threads are added, which do
    nothing, until they are more, and taken away again.

    Args:
        pressure: where Linux says in what share of the time something had to wait for a core.

    Returns:
        Whether this process watches for it now: only on Linux, only if the network's ``device`` is a CPU, and not where
        the environment says how to wait.
    """
    threads = torch.get_num_threads()
    asked = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    watched = any(thread.name == WATCH for thread in threading.enumerate())
    if device.type != "cpu" or threads == 1 or asked or watched or _waited(pressure) is None:
        return False
    if (openmp := _openmp()) is None:
        return False
    team = 2 + max(0, cores() - threads)  # its first thread is not counted
    end = threading.Event()
    watch = threading.Thread(target=_watch, args=(pressure, openmp, team, end), name=WATCH, daemon=True)
    watch.start()
    atexit.register(_end, watch, end)
    return True


def _end(thread: threading.Thread, end: threading.Event) -> None:
    """Python stops threads that still run as it ends wherever they are; inside torch that aborts the process."""
    end.set()
    thread.join()


def _openmp() -> ctypes.CDLL | None:
    """The libgomp that torch computes with."""
    with open("/proc/self/maps") as maps:
        return next((ctypes.CDLL(line.split()[-1]) for line in maps if "/libgomp" in line), None)


def _waited(pressure: str) -> float | None:
    """In what share of the last ten seconds something waited for a core, percent; None where no system says so."""
    try:
        return float(Path(pressure).read_text().partition("avg10=")[2].split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _watch(pressure: str, openmp: ctypes.CDLL, team: int, end: threading.Event) -> None:
    idle: tuple[threading.Thread, threading.Event] | None = None
    while True:
        waited = _waited(pressure)  # None: nothing is known, so nothing changes
        if idle is not None and (end.is_set() or (waited is not None and waited < FREE)):
            _end(*idle)
            idle = None
        if end.is_set():
            break
        if idle is None and waited is not None and waited > BUSY:
            awake = threading.Event()
            idle = threading.Thread(target=_idle, args=(openmp, team, awake), name=IDLE, daemon=True), awake
            idle[0].start()
        end.wait(SECONDS_BETWEEN_LOOKS)


def _idle(openmp: ctypes.CDLL, team: int, end: threading.Event) -> None:
    """Every thread that computes gets a team of its own, which lives as long as it does."""
    torch.get_num_threads()  # sets this thread's number, as in every thread that is new to torch
    openmp.omp_set_num_threads(team)  # of this thread alone
    torch.ones(team << 16).exp_()  # large enough for each of the team to have a share
    end.wait()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``scaled_dot_product_attention`` of ``[B, heads, N, C]``; on CPUs in bfloat16, faster ways forth and back."""
    if not torch.jit.is_scripting():
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:
            if q.requires_grad:
                return CPUAttention.apply(q, k, v)
            if k.shape[2] >= WHOLE and bfloat16_units() == "avx512_bf16":
                return by_whole_products(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def by_whole_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of ``[B, heads, N, C]`` bfloat16, head by head: softmax(q k^T / sqrt(C)) v.

    Without AMX, the fused kernel's small blocks are as slow as in float32. Rounding the logits costs about as much as
    that of q and k did, too much for gradients: training is not done so.
    """
    scaled = q * q.shape[-1] ** -0.5
    # minus about each row's maximum, read from some keys: what counts most is then small, and rounded least
    about = (scaled @ k[:, :, ::16].mT).amax(-1, keepdim=True).float()
    rows, columns = _minus(scaled, about), F.pad(k, (0, 2), value=1.0)
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)  # as the next layer reads it
    for head in itertools.product(range(q.shape[0]), range(q.shape[1])):
        out[head] = (rows[head] @ columns[head].T).softmax(-1) @ v[head]
    return out


class CPUAttention(torch.autograd.Function):
    """Attention whose backward pass keeps a CPU's bfloat16 matrix units busy.

    The fused kernel's own multiplies small blocks, which leaves them idle. Here each head takes five whole matrix
    products; one head's N x N weights exist at a time, so memory stays small too.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # what F.scaled_dot_product_attention calls on CPUs; it alone returns the logarithm of the softmax's denominator
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        ctx.save_for_backward(q, k, v, out, log_sum)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, log_sum = ctx.saved_tensors
        scaled = q * q.shape[-1] ** -0.5
        delta = (grad.float() * out.float()).sum(-1, keepdim=True)
        logit_rows, logit_columns = _minus(scaled, log_sum.float()[..., None]), F.pad(k, (0, 2), value=1.0)
        grad_rows, grad_columns = _minus(grad, delta), F.pad(v, (0, 2), value=1.0)
        grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        for head in itertools.product(range(q.shape[0]), range(q.shape[1])):
            # keys along the rows: two products then take the weights as they lie, and one transposed, which is slower
            weights = (logit_columns[head] @ logit_rows[head].T).exp_()
            grad_v[head] = weights @ grad[head]
            weights *= grad_columns[head] @ grad_rows[head].T
            grad_k[head] = weights @ scaled[head]
            grad_q[head] = weights.T @ k[head]
        return grad_q * q.shape[-1] ** -0.5, grad_k, grad_v


def _minus(x: Tensor, row: Tensor) -> Tensor:
    """``x [.., N, C]`` and two columns, so that ``_minus(x, row) @ F.pad(y, (0, 2), value=1).T`` is ``x y^T - row``.

    ``row [.., N, 1]`` float32 goes in as a high and a low half: it is subtracted before the product rounds to x's type.
    """
    high = row.to(x.dtype)
    return torch.cat([x, -high, (high - row).to(x.dtype)], dim=-1)


def instance_norm(x: Tensor, eps: float) -> Tensor:
    """Instance norm of ``[B, C, X, Y, Z]`` without affine, in any layout; trained on CPUs, a faster way back."""
    if not torch.jit.is_scripting():
        if x.requires_grad and x.device.type == "cpu":
            return CPUInstanceNorm.apply(x, eps)
    return F.group_norm(x, x.shape[1], eps=eps)


class CPUInstanceNorm(torch.autograd.Function):
    """Group norm of torch with one channel a group, and its gradient in whole-map operations.

    On a CPU, channels last, torch's own backward takes three times as long in fp32, and seven in bfloat16.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, eps: float) -> Tensor:
        batch, channels = x.shape[:2]
        normed, mean, rstd = torch.native_group_norm(x, None, None, batch, channels, x[0, 0].numel(), channels, eps)
        ctx.save_for_backward(x, mean, rstd)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        x, mean, rstd = ctx.saved_tensors
        mean, rstd = mean.float(), rstd.float()
        spatial, size = tuple(range(2, x.ndim)), x[0, 0].numel()
        grad_mean = grad.sum(spatial, dtype=torch.float32) / size
        product_mean = (grad * x).sum(spatial, dtype=torch.float32) / size
        # rstd * (grad - mean(grad) - normed * mean(grad * normed)), sorted by what is multiplied with whole maps
        of_x = rstd**3 * (mean * grad_mean - product_mean)
        offset = -rstd * grad_mean - of_x * mean
        offset, of_x, of_grad = (v.to(x.dtype)[(..., *[None] * len(spatial))] for v in (offset, of_x, rstd))
        return torch.addcmul(offset, x, of_x).addcmul_(grad, of_grad), None


def bfloat16_units() -> str | None:
    """What this CPU multiplies bfloat16 matrices by, faster than float32 ones; None where it has nothing.

    torch computes in bfloat16 on every CPU: without these it converts to float32 and back.
    """
    has = torch.cpu.get_capabilities()
    return next((name for name in BFLOAT16_UNITS if has.get(name)), None)


def convolves_in_float32(device: torch.device) -> bool:
    """Whether 3D convolutions are to leave autocast: a CPU that only imitates bfloat16 takes twice as long in it."""
    return device.type == "cpu" and torch.is_autocast_enabled("cpu") and bfloat16_units() is None
