"""What depends on the device: choosing it, its name and its memory."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from functools import cache

import torch

from ensembler.errors import UsageError
from ensembler.machine import available_cpus

__all__ = [
    "choose_device",
    "device_name",
    "forget_peak",
    "keep_freed",
    "limit_threads",
    "peak_memory",
    "seed_dropout",
    "upload",
]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """Return the given device, or by default CUDA if available, else the CPU.

    Raises:
        UsageError: this machine has no such device.
    """
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"cannot compute on the device {device!r}: {reason}") from error
    return chosen


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def limit_threads(threads: int | None = None) -> None:
    """Set how many threads compute one operator on the CPU.

    Args:
        threads: by default as many as before, at first no more than a container's CPU limit, which PyTorch overlooks.
    """
    _obey_limit()
    if threads:
        torch.set_num_threads(threads)


@cache
def _obey_limit() -> None:
    torch.set_num_threads(min(torch.get_num_threads(), available_cpus()))


def keep_freed(device: torch.device) -> None:
    """Let this process keep freed memory for the next step or forward pass, through glibc's ``mallopt`` if available.

    By default, freed memory returns to the system and is mapped again page by page: up to 14,000 page faults for a
    step of a ResNet-20 (3 to 9 % of its time), and 100,000 for a prediction of 360 images by four of them (a sixth or
    more). Up to 1 GiB is kept. GPU memory has its own allocator.
    """
    if device.type == "cpu" and sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_M_MMAP_THRESHOLD, 2**25)  # the maximum; larger blocks still return to the system
            mallopt(_M_TRIM_THRESHOLD, 2**30)


def forget_peak(device: torch.device) -> None:
    """Reset :func:`peak_memory`, if the device can: only GPUs do."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Return the peak memory in bytes: allocated on a GPU since :func:`forget_peak`; else ever held by this process.

    ``None`` if the system does not report it (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to the device; to a GPU asynchronously, from pinned memory."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the generators that dropout uses on this device; call it within ``torch.random.fork_rng``."""
    torch.default_generator.manual_seed(seed)  # thirty times as fast as torch.manual_seed
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
