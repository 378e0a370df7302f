"""Seeded noise: random numbers that depend on their position only, and the four noises on bytes.

A noise acts on every byte alone, and there are only 256 bytes: it is a table of 256 distributions, from which Walker's
alias method draws with one look-up a byte.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "below",
    "branch",
    "gaussian_noise",
    "image_keys",
    "impulse_noise",
    "mix",
    "normals",
    "random_bits",
    "shot_noise",
    "speckle_noise",
    "uniforms",
]

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def mix(z: Tensor) -> Tensor:
    """Apply the finaliser of splitmix64 (Steele et al. 2014) in place, on int64 with wrapping products."""
    shifted = torch.empty_like(z)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, None)):
        torch.bitwise_right_shift(z, shift, out=shifted)
        z ^= shifted.bitwise_and_(2 ** (64 - shift) - 1)  # the mask makes the arithmetic shift a logical one
        if factor is not None:
            z *= factor
    return z


def image_keys(stream: str, positions: Tensor) -> Tensor:
    """Return a 64-bit key per image, (N,) int64: a function of the stream's name and the image's position."""
    digest = hashlib.blake2b(stream.encode(), digest_size=8).digest()
    return mix(positions * _GOLDEN + int.from_bytes(digest, "little", signed=True))


def branch(keys: Tensor, number: int) -> Tensor:
    """Return the keys (N,) int64 of a further stream of random numbers of the same images."""
    return mix(keys ^ torch.tensor(number, device=keys.device).mul_(_GOLDEN))


def random_bits(keys: Tensor, count: int) -> Tensor:
    """Draw 32 random bits for each of ``count`` positions in every image, (N, count) int32 over its whole range."""
    words = torch.arange(1, (count + 1) // 2 + 1, device=keys.device) * _GOLDEN
    return mix(keys[:, None] + words).view(torch.int32)[:, :count]


def below(keys: Tensor, bounds: Tensor | int, count: int) -> Tensor:
    """Draw integers from 0 to ``bounds - 1``, (N, count) int32; bounds up to 2**15, probabilities exact to 2**-16."""
    return (random_bits(keys, count) & 0xFFFF).mul_(bounds).bitwise_right_shift_(16)


def uniforms(keys: Tensor, count: int) -> Tensor:
    """Draw uniform numbers in (-1, 1), one of 2**12 midpoints, (N, count) float32, so that sums are exact."""
    return (random_bits(keys, count) >> 20).to(torch.float32).add_(0.5).mul_(2.0**-11)


@lru_cache(maxsize=4)
def _normal_quantiles(device: torch.device) -> Tensor:
    middles = (torch.arange(2**14, dtype=torch.float64) + 0.5) / 2**14
    return torch.special.ndtri(middles).to(device, torch.float32)


def normals(keys: Tensor, count: int) -> Tensor:
    """Draw standard normal numbers (N, count) float32, of 2**14 equally probable quantiles, up to 4.01."""
    halves = random_bits(keys, (count + 1) // 2).contiguous().view(torch.int16)[:, :count]
    quantile = halves.to(torch.int32).bitwise_and_(2**14 - 1)
    return _normal_quantiles(keys.device).index_select(0, quantile.flatten()).view(quantile.shape)


_UNIT = 2**24  # the mass of one column of an alias table


def _alias_table(cdf: Tensor) -> Tensor:
    """Prepare drawing a corrupted byte from ``cdf[x]``, P(v <= . | clean byte x), (256, 255) float64 for v < 255.

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


def _sample(images: Tensor, table: Tensor, keys: Tensor) -> Tensor:
    """Draw every byte from its distribution: 8 random bits choose a column, 24 choose between the two bytes there."""
    clean = images.flatten(1)
    bits = random_bits(keys, clean.shape[1])
    column = bits & 255
    cells = clean.to(torch.int32).mul_(256).add_(column)
    drawn = table.to(images.device).index_select(0, cells.flatten()).view(cells.shape)
    # -1 where the column's own byte is drawn, else 0: a branch on noise would be mispredicted half the time.
    keeps = bits.bitwise_right_shift_(8).sub_(torch.bitwise_right_shift(drawn, 8, out=cells)).bitwise_right_shift_(31)
    drawn ^= column.bitwise_xor_(drawn).bitwise_and_(keeps)
    return drawn.bitwise_and_(255).to(torch.uint8).view(images.shape)


def _clean_and_next() -> tuple[Tensor, Tensor]:
    """Return clean bytes x (256, 1), and the values v + 1 (1, 255) below which a truncated level is at most v."""
    return torch.arange(256, dtype=torch.float64)[:, None], torch.arange(1, 256, dtype=torch.float64)[None]


@lru_cache(maxsize=10)
def _gaussian_table(sigma: float) -> Tensor:
    x, above = _clean_and_next()
    return _alias_table(torch.special.ndtr((above - x) / (255 * sigma)))


@lru_cache(maxsize=10)
def _speckle_table(sigma: float) -> Tensor:
    x, above = _clean_and_next()
    return _alias_table(torch.where(x > 0, torch.special.ndtr((above - x) / (x.clamp(min=1) * sigma)), 1.0))


@lru_cache(maxsize=10)
def _shot_table(rate: int) -> Tensor:
    mean = _clean_and_next()[0] / 255 * rate
    counts = torch.arange(rate + 1, dtype=torch.float64)[None]
    probabilities = torch.exp(torch.special.xlogy(counts, mean) - mean - torch.lgamma(counts + 1))
    bytes_of_counts = np.uint8(np.clip(np.arange(rate + 1) / rate, 0, 1) * 255)
    most = np.searchsorted(bytes_of_counts, np.arange(255), side="right") - 1  # the largest count that gives v or less
    return _alias_table(probabilities.cumsum(1)[:, torch.from_numpy(most)])


@lru_cache(maxsize=10)
def _impulse_table(amount: float) -> Tensor:
    x, above = _clean_and_next()
    return _alias_table((above > x).to(torch.float64) * (1 - amount) + amount / 2)


def gaussian_noise(images: Tensor, sigma: float, keys: Tensor) -> Tensor:
    """Add noise ``N(0, sigma)``."""
    return _sample(images, _gaussian_table(sigma), keys)


def speckle_noise(images: Tensor, sigma: float, keys: Tensor) -> Tensor:
    """Add noise ``x * N(0, sigma)``."""
    return _sample(images, _speckle_table(sigma), keys)


def shot_noise(images: Tensor, rate: int, keys: Tensor) -> Tensor:
    """Draw ``Poisson(x * rate) / rate``."""
    return _sample(images, _shot_table(rate), keys)


def impulse_noise(images: Tensor, amount: float, keys: Tensor) -> Tensor:
    """Add salt and pepper: each channel of each pixel becomes 0 or 1 with probability ``amount / 2`` each."""
    return _sample(images, _impulse_table(amount), keys)
