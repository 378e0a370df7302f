"""How much memory was needed at the most."""

from __future__ import annotations

import sys

import torch

__all__ = ["forget_peak", "peak"]


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
