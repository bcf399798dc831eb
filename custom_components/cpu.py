"""What the C library does with memory that tensors on the CPU have left."""

from __future__ import annotations

import ctypes
import sys

import torch

# names and numbers of malloc.h (glibc)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed(device: torch.device) -> bool:
    """Keep what freed tensors leave for the next ones, instead of giving it back to the system each time.

    glibc maps every block above 32 MiB anew, and the system clears each of its pages at the first touch: with feature
    maps of a 3D network that takes as long as the convolutions. In return the process, and each that it forks, keeps
    its highest use of memory until it ends, which is higher by the gaps between blocks.

    Args:
        device: that the network runs on; nothing is changed unless it is a CPU.

    Returns:
        Whether anything was changed: not with another C library, where it does no harm either.
    """
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: 64 * 2**20}
    return mallopt is not None and all([mallopt(name, value) for name, value in settings.items()])
