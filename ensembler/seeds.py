"""Random streams that cannot disturb one another.

One seed a run; each use of randomness names its own stream, so drawing more coefficients never changes the order of
the images.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["derive", "generator"]


def derive(seed: int, *stream: str | int) -> int:
    """A 63-bit seed for the named stream, e.g. ``derive(0, "shuffle", member)``."""
    digest = hashlib.sha256(repr((seed, *stream)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *stream: str | int) -> torch.Generator:
    """A CPU generator for the named stream."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *stream))
