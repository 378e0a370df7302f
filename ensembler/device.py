"""Everything that depends on the device: which one it is, its threads, its memory."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

import torch

from ensembler.errors import UsageError

__all__ = ["choose_device", "device_name", "forget_peak", "keep_freed", "peak_memory", "seed_dropout", "upload"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, or CUDA where there is one, or the CPU.

    Raises:
        UsageError: the device is not one of this machine's.
    """
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"cannot compute on the device {device!r}: {reason}") from error
    return chosen


def device_name(device: torch.device) -> str:
    """The name of a GPU, or the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def keep_freed(device: torch.device) -> None:
    """Let this process keep the memory that a step or a forward pass frees, where glibc's ``mallopt`` is there.

    By default it goes back to the system and returns a page fault at a time: up to 14,000 a step of a ResNet-20,
    which cost 3 to 9 % of it, and 100,000 a prediction of 360 images by four of them, a sixth of its time or more. Up
    to 1 GiB is kept. A GPU's memory has an allocator of its own.
    """
    if device.type == "cpu" and sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_M_MMAP_THRESHOLD, 2**25)  # the highest there is; larger blocks are the system's, as ever
            mallopt(_M_TRIM_THRESHOLD, 2**30)


def forget_peak(device: torch.device) -> None:
    """Start to measure :func:`peak_memory` anew, where that is possible: on a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Bytes: on a GPU the most that was allocated since :func:`forget_peak`; else the most that this process ever held.

    ``None`` where the system does not say (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on the device; a GPU fetches it from pinned memory, and nobody waits for it."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the generators that dropout draws from on this device; to be called within ``torch.random.fork_rng``."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes thirty times as long
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
