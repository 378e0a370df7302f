"""Seeded noise on bytes: random bits that depend on their place alone, and noises that are tables.

A noise acts on every byte alone, and there are only 256 bytes: its law is a table of 256 distributions, from which
Walker's alias method draws with one look-up a byte.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

__all__ = ["gaussian_table", "image_keys", "impulse_table", "mix", "sample", "shot_table", "speckle_table"]

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def mix(z: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014), in place on int64, whose products wrap as uint64's do."""
    shifted = torch.empty_like(z)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, None)):
        torch.bitwise_right_shift(z, shift, out=shifted)
        z ^= shifted.bitwise_and_(2 ** (64 - shift) - 1)  # the mask makes the arithmetic shift a logical one
        if factor is not None:
            z *= factor
    return z


def image_keys(stream: str, positions: Tensor) -> Tensor:
    """One 64-bit key an image, (N,) int64: a function of the stream's name and the image's position."""
    digest = hashlib.blake2b(stream.encode(), digest_size=8).digest()
    return mix(positions * _GOLDEN + int.from_bytes(digest, "little", signed=True))


def _random_bits(keys: Tensor, count: int) -> Tensor:
    """32 random bits for each of ``count`` positions in every image, (N, count) int32 over its whole range."""
    words = torch.arange(1, (count + 1) // 2 + 1, device=keys.device) * _GOLDEN
    return mix(keys[:, None] + words).view(torch.int32)[:, :count]


_UNIT = 2**24  # the mass of one column of an alias table


def _alias_table(cdf: Tensor) -> Tensor:
    """Prepare drawing a corrupted byte v from P(v <= . | clean byte x) = ``cdf[x]``, (256, 255) float64 for v < 255.

    Walker's alias method (1977) in integers: 256 columns of equal mass, each shared by its own byte and at most one
    other, its alias. Every probability is exact to 2**-31.

    Returns:
        (256 * 256,) int32, an entry per clean byte and column: what the column's own byte keeps, less half a unit, in
        the upper 24 bits and the alias in the lower 8.
    """
    total = 256 * _UNIT
    shares = (cdf.clamp(0, 1).cummax(1).values * total).round().to(torch.int64).numpy()
    mass = np.diff(shares, axis=1, prepend=0, append=total)
    kept, alias = mass.copy(), np.tile(np.arange(256), (256, 1))
    rows = np.arange(256)
    settled = np.zeros((256, 256), dtype=bool)
    for _ in range(255):  # the poorest column left is filled up by the richest
        poor = np.where(settled, total + 1, mass).argmin(1)
        rich = np.where(settled, -1, mass).argmax(1)
        kept[rows, poor] = mass[rows, poor]
        alias[rows, poor] = rich
        mass[rows, rich] -= _UNIT - mass[rows, poor]
        settled[rows, poor] = True
    own = np.where(kept < _UNIT, kept, 0)
    entries = (own - _UNIT // 2) * 256 + alias
    return torch.from_numpy(entries.astype(np.int32).ravel())


def sample(images: Tensor, table: Tensor, keys: Tensor) -> Tensor:
    """Draw every byte from its law: 8 of its random bits choose a column, 24 choose between the two bytes there."""
    clean = images.flatten(1)
    bits = _random_bits(keys, clean.shape[1])
    column = bits & 255
    cells = clean.to(torch.int32).mul_(256).add_(column)
    drawn = table.to(images.device).index_select(0, cells.flatten()).view(cells.shape)
    # -1 where the column's own byte is drawn, else 0: a branch on noise would be mispredicted half the time.
    keeps = bits.bitwise_right_shift_(8).sub_(torch.bitwise_right_shift(drawn, 8, out=cells)).bitwise_right_shift_(31)
    drawn ^= column.bitwise_xor_(drawn).bitwise_and_(keeps)
    return drawn.bitwise_and_(255).to(torch.uint8).view(images.shape)


def _clean_and_next() -> tuple[Tensor, Tensor]:
    """Clean bytes x (256, 1) and the values v + 1 below which a truncated level is at most v, (1, 255)."""
    return torch.arange(256, dtype=torch.float64)[:, None], torch.arange(1, 256, dtype=torch.float64)[None]


@lru_cache(maxsize=5)
def gaussian_table(sigma: float) -> Tensor:
    """``x + N(0, sigma)``."""
    x, above = _clean_and_next()
    return _alias_table(torch.special.ndtr((above - x) / (255 * sigma)))


@lru_cache(maxsize=5)
def speckle_table(sigma: float) -> Tensor:
    """``x + x * N(0, sigma)``."""
    x, above = _clean_and_next()
    return _alias_table(torch.where(x > 0, torch.special.ndtr((above - x) / (x.clamp(min=1) * sigma)), 1.0))


@lru_cache(maxsize=5)
def shot_table(rate: int) -> Tensor:
    """``Poisson(x * rate) / rate``."""
    mean = _clean_and_next()[0] / 255 * rate
    counts = torch.arange(rate + 1, dtype=torch.float64)[None]
    probabilities = torch.exp(torch.special.xlogy(counts, mean) - mean - torch.lgamma(counts + 1))
    bytes_of_counts = np.uint8(np.clip(np.arange(rate + 1) / rate, 0, 1) * 255)
    most = np.searchsorted(bytes_of_counts, np.arange(255), side="right") - 1  # the largest count that gives v or less
    return _alias_table(probabilities.cumsum(1)[:, torch.from_numpy(most)])


@lru_cache(maxsize=5)
def impulse_table(amount: float) -> Tensor:
    """0 or 1 with probability ``amount / 2`` each, else ``x``."""
    x, above = _clean_and_next()
    return _alias_table((above > x).to(torch.float64) * (1 - amount) + amount / 2)
