"""How much memory was needed at the most, and that what was freed is kept for the next step."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

import torch

__all__ = ["forget_peak", "keep_freed", "peak"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed(device: torch.device) -> None:
    """Let this process keep the memory that a training step frees, where glibc's ``mallopt`` can be told so.

    By default it goes back to the system and returns a page fault at a time: up to 14,000 a step of a ResNet-20,
    which cost 3 to 9 % of it. Up to 1 GiB is kept. A GPU's memory has an allocator of its own.
    """
    if device.type == "cpu" and sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_M_MMAP_THRESHOLD, 2**25)  # the highest there is; larger blocks are the system's, as ever
            mallopt(_M_TRIM_THRESHOLD, 2**30)


def forget_peak(device: torch.device) -> None:
    """Start to measure anew, where that is possible: on a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    """Bytes: on a GPU what was allocated at the most since :func:`forget_peak`; else what this process ever held.

    ``None`` where the system does not say (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
