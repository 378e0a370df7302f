"""What depends on the device: choosing it, its name, its memory, and the global random generators."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache

import numpy as np
import torch

from ensembler.errors import UsageError, first_line
from ensembler.machine import available_cpus
from ensembler.text import counted

__all__ = [
    "Room",
    "choose_device",
    "configure",
    "default_modes",
    "device_name",
    "forget_peak",
    "keep_freed",
    "limit_threads",
    "peak_memory",
    "restored_generators",
    "seed_generators",
    "tf32",
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
        raise UsageError(f"cannot compute on the device {device!r}: {first_line(error)}") from error
    return chosen


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({counted(torch.get_num_threads(), 'thread')})"


def configure(device: torch.device) -> None:
    """Set how this process computes on the device; called before training and before predicting.

    On a GPU, float32 means float32: TF32, whose products have 10 bits, is a precision of its own (:func:`tf32`); and
    cuDNN measures which algorithms are fastest. On a CPU, freed memory is kept.
    """
    keep_freed(device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True


@contextmanager
def default_modes() -> Iterator[None]:
    """Compute in the default modes of PyTorch and NumPy within the block, whatever the caller has chosen for itself.

    They are gradients, float32, no autocast, the CPU where no device is named, and underflow that is no error.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        stack.enter_context(np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Multiply float32 matrices as TF32 within the block, on GPUs that can, if ``allowed``."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32, cudnn.allow_tf32 = (allowed or was for was in before)
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


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


class Room:
    """How many of a kind fit into the memory of the current GPU, measured by what the first of them takes."""

    def __init__(self) -> None:
        self._gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._free, self._before = (torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()) if self._gpu else (0, 0)

    def most(self) -> int | None:
        """Return the number, at least 1; ``None`` if there is no GPU."""
        taken = torch.cuda.memory_reserved() - self._before if self._gpu else 0
        return max(1, self._free // taken) if taken > 0 else None


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to the device; from the CPU to a GPU asynchronously, from pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@contextmanager
def restored_generators() -> Iterator[None]:
    """Give the global generators of PyTorch, NumPy and Python their states back at the end of the block."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def seed_generators(seed: int) -> None:
    """Seed what a network may draw from: the global generators of PyTorch, NumPy and Python.

    Call it within :func:`restored_generators`.
    """
    torch.default_generator.manual_seed(seed)  # thirty times as fast as torch.manual_seed
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
