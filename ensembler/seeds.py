"""Independent random streams, all derived from one seed.

A run has one seed, and each use of randomness names its own stream: drawing more coefficients never changes the order
of the images.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["derive", "generator"]


def derive(seed: int, *stream: str | int) -> int:
    """Return a 63-bit seed for the named stream, e.g. ``derive(0, "shuffle", member)``."""
    digest = hashlib.sha256(repr((seed, *stream)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *stream: str | int) -> torch.Generator:
    """Return a CPU generator for the named stream."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *stream))
