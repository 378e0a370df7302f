"""Mixing the examples of a batch: mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019).

Each example of a batch is mixed with another one of it, and the loss is that of both targets by their shares. All of it
is drawn for an epoch at once, from the seed, the part and the epoch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ensembler.device import upload

__all__ = ["Drawn", "Mixing"]

Box = tuple[slice, slice]


@dataclass(frozen=True)
class Mixing:
    """How batches are mixed. With both, each batch is mixed by one of the two, with even odds.

    Attributes:
        mixup: alpha; a batch's share is drawn from Beta(alpha, alpha). 0 for no mixup.
        cutmix: alpha; likewise, the share that lies outside of the box. 0 for no CutMix.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.mixup or self.cutmix)

    def draw(self, sizes: Sequence[int], shape: Sequence[int], seed: int) -> Drawn:
        """Draw how an epoch's batches are mixed.

        Args:
            sizes: examples in each of the N batches.
            shape: of one example; CutMix takes images (H, W, 3).
            seed: of what is drawn.
        """
        rng = np.random.default_rng(seed)
        partners = [torch.from_numpy(rng.permutation(size)) for size in sizes]
        boxes, shares = list[Box | None](), list[float]()
        for _ in sizes:
            cut = bool(self.cutmix) and (not self.mixup or rng.random() < 0.5)
            alpha = self.cutmix if cut else self.mixup
            share = float(rng.beta(alpha, alpha))
            box = _box(shape[0], shape[1], share, rng) if cut else None
            boxes.append(box)
            shares.append(share if box is None else 1 - _area(box) / (shape[0] * shape[1]))
        return Drawn(tuple(partners), torch.tensor(shares), tuple(boxes))


@dataclass(frozen=True, eq=False)
class Drawn:
    """How an epoch's N batches are mixed.

    Attributes:
        partners: of each batch, the place (B,) in it of the example that is mixed into each example.
        shares: (N,) share of an example's own target in its loss.
        boxes: of each batch, the rows and columns that are the other image's; ``None`` for mixup.
    """

    partners: tuple[Tensor, ...]
    shares: Tensor
    boxes: tuple[Box | None, ...]

    def to(self, device: torch.device) -> Drawn:
        """Return the same on another device, to which it is copied at once."""
        sizes = [len(own) for own in self.partners]
        partners = torch.split(upload(torch.cat(self.partners), device), sizes)
        return replace(self, partners=partners, shares=upload(self.shares, device))

    def mix(self, n: int, x: Tensor, others: Tensor) -> Tensor:
        """Mix ``others`` (b, ...) into the inputs ``x`` (b, ...) of batch ``n``, which may be changed."""
        box = self.boxes[n]
        if box is None:
            return torch.lerp(x, others, 1 - self.shares[n])
        x[:, :, box[0], box[1]] = others[:, :, box[0], box[1]]
        return x


def _box(height: int, width: int, share: float, rng: np.random.Generator) -> Box:
    """Draw a box of the image's proportions and ``1 - share`` of its area, around an even place, cut at the edges."""

    def side(length: int) -> slice:
        centre, half = int(rng.integers(length)), int(length * math.sqrt(1 - share)) // 2
        return slice(max(0, centre - half), min(length, centre + half))

    return side(height), side(width)


def _area(box: Box) -> int:
    return math.prod(side.stop - side.start for side in box)
