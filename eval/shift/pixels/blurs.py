"""The blurs: Gaussian, defocus, glass, motion and zoom.

Each is a function ``(images, level, keys) -> images`` of uint8 (N, H, W, 3), its constants at one severity, and one
key an image.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ensembler.eval.shift.pixels.filters import (
    Taps,
    gaussian_taps,
    linear_zoom,
    mirror,
    nearest,
    pad,
    separable,
    to_bytes,
)
from ensembler.eval.shift.pixels.noise import below

__all__ = [
    "ANGLES",
    "defocus_blur",
    "gaussian_blur",
    "glass_blur",
    "motion_blur",
    "motion_kernels",
    "smear",
    "zoom_blur",
]


def gaussian_blur(images: Tensor, sigma: float, keys: Tensor) -> Tensor:
    """Filter each channel with a Gaussian cut at 4 sigma; border pixels are repeated outside."""
    taps = gaussian_taps(sigma)
    return to_bytes(separable(images, [(taps, taps)], nearest))


@lru_cache(maxsize=10)
def _disk(radius: float, alias: float) -> list[tuple[Taps, Taps]]:
    """Return the defocus kernel, a disk smoothed by a small Gaussian, as a sum of separable filters.

    As in the script, the disk is drawn on at least 17 x 17 pixels and mirrored beyond them, which at radius 8 and 10
    makes the kernel's sum 1.3 and 1.1 % more than 1.
    """
    reach, around = (8, 1) if radius <= 8 else (int(radius), 2)
    grid = np.arange(-reach, reach + 1)
    disk = (grid[:, None] ** 2 + grid[None] ** 2 <= radius**2).astype(np.float64)
    smooth = np.exp(-0.5 * (np.arange(-around, around + 1) / alias) ** 2)
    wide = np.pad(disk / disk.sum(), around, mode="reflect")
    across: NDArray[np.float64] = np.apply_along_axis(np.convolve, 0, wide, smooth / smooth.sum(), "valid")
    kernel = np.apply_along_axis(np.convolve, 1, across, smooth / smooth.sum(), "valid")
    half = np.where(kernel < 1e-9, 0, kernel)[reach:, reach:]  # symmetric; what is lighter moves no byte
    left, values, right = np.linalg.svd(half[: (half[0] > 0).sum(), : (half[0] > 0).sum()])
    return [
        (tuple((left[:, i] * values[i]).tolist()), tuple(right[i].tolist()))
        for i in range(len(values))
        if values[i] > 1e-6
    ]


def defocus_blur(images: Tensor, level: tuple[float, float], keys: Tensor) -> Tensor:
    """Replace every pixel by a disk of (radius, smoothing); the border is mirrored."""
    return to_bytes(separable(images, _disk(*level), mirror))


# --- glass ----------------------------------------------------------------------------------------------------------


def glass_blur(images: Tensor, level: tuple[float, int, int], keys: Tensor) -> Tensor:
    """Filter with a Gaussian, copy to every pixel one up to ``reach`` away, ``rounds`` times, and filter again.

    The source of a pixel is ``reach`` rows above to ``reach - 1`` below, and likewise in columns. The authors' script
    means to swap the two, but assigns NumPy views, of which one is overwritten before it is read: the pixel becomes
    its partner, and the partner stays. CIFAR-10-C and ImageNet-C were made so, and so are these images.
    """
    sigma, reach, rounds = level
    N, H, W, _ = images.shape
    taps = gaussian_taps(sigma)
    colours = images.new_zeros(N, H, W, 4)  # a pixel is one int32
    colours[..., :3] = to_bytes(separable(images, [(taps, taps)], nearest))
    pixels = colours.view(torch.int32).view(N, H * W)
    inside = torch.zeros(H, W, dtype=torch.bool, device=images.device)  # the pixels that are copied to
    inside[reach + 1 : H - reach + 1, reach + 1 : W - reach + 1] = True
    steps = below(keys, 2 * reach, 2 * rounds * H * W).sub_(reach).view(N, rounds, 2, H * W)
    for down, right in (steps[:, number].unbind(1) for number in range(rounds)):
        pixels = pixels.gather(1, _sources((down * W).add_(right).mul_(inside.view(-1)), inside.view(-1)))
    colours = pixels.view(torch.uint8).view(N, H, W, 4)
    return to_bytes(separable(colours[..., :3], [(taps, taps)], nearest))


def _sources(steps: Tensor, inside: Tensor) -> Tensor:
    """Return the pixel whose colour each pixel gets in one round of glass_blur, (N, P) int64.

    The script goes through the pixels from the last to the first, so a partner further on that is inside was already
    copied to. Such partners are followed, twice as far each time, to one that was not.

    Args:
        steps: (N, P) int32, how many places further on each pixel's partner is.
        inside: (P,) whether a pixel is copied to at all; where not, its step is 0.
    """
    count = len(inside)
    partners = torch.arange(count, device=steps.device) + steps
    if not (steps > 0).any():
        return partners
    # A pixel that was already copied to is its own number, and one as it was before the round that plus the count.
    follow = partners + count * ~((steps > 0) & inside[partners])
    while (copied := follow < count).any():
        follow = torch.where(copied, follow.gather(1, follow.clamp(max=count - 1)), follow)
    return follow - count


# --- motion ---------------------------------------------------------------------------------------------------------

ANGLES = 128
_ONE = 2**22  # a weight of 1: sums of bytes with such weights stay in 32 bits

Kernel = tuple[tuple[int, int, int], ...]  # (rows down, columns right, weight) of each pixel


@lru_cache(maxsize=40)
def motion_kernels(radius: int, sigma: float, angle: float) -> tuple[tuple[Kernel, ...], Tensor]:
    """Return ImageMagick's motion blurs for ``ANGLES`` equally spaced angles around ``angle``, 90 degrees in all.

    A pixel becomes the mean of ``2 * radius + 1`` pixels, the i-th the nearest one to i pixels away at the
    angle (in degrees, clockwise from the right), with weight ``exp(-i**2 / (2 * sigma**2))``, of sum 1: half a
    Gaussian. Several angles share a kernel, because offsets are whole pixels.

    Returns:
        The distinct kernels, and the kernel of each angle, (ANGLES,) int64.
    """
    distance = np.arange(2 * radius + 1)
    weights = np.exp(-0.5 * (distance / sigma) ** 2)
    shares = np.rint(weights / weights.sum() * _ONE).astype(int)
    shares[0] += _ONE - shares.sum()
    found: dict[Kernel, int] = {}
    numbers = []
    for step in range(ANGLES):
        turned = math.radians(angle + 90 * ((step + 0.5) / ANGLES - 0.5))
        down = np.ceil(distance * math.sin(turned) - 0.5).astype(int)
        right = np.ceil(distance * math.cos(turned) - 0.5).astype(int)
        total: dict[tuple[int, int], int] = {}
        for place, share in zip(zip(down.tolist(), right.tolist(), strict=True), shares.tolist(), strict=True):
            total[place] = total.get(place, 0) + share
        kernel = tuple((*place, share) for place, share in total.items() if share)
        numbers.append(found.setdefault(kernel, len(found)))
    return tuple(found), torch.tensor(numbers)


def smear(images: Tensor, radius: int, sigma: float, angle: float, keys: Tensor) -> Tensor:
    """Motion-blur uint8 (N, H, W, C) at a random angle within 45 degrees of ``angle``, truncated to bytes.

    Images with the same kernel are processed together; sums are of integers.
    """
    H, W, C = images.shape[1:]
    known, of_angle = motion_kernels(radius, sigma, angle)
    kernel = of_angle.to(images.device).index_select(0, below(keys, ANGLES, 1).flatten())
    order = kernel.argsort(stable=True)
    sizes = kernel.bincount(minlength=len(known)).tolist()
    blurred = []
    for places, group in zip(known, torch.split(images.index_select(0, order), sizes), strict=True):
        if len(group):
            down, right, _ = zip(*places, strict=True)
            above, left = -min(down), -min(right)
            here = pad(group, (above, max(down)), (left, max(right)), nearest).flatten(2).to(torch.int32)
            total = torch.zeros(len(group), H, W * C, dtype=torch.int32, device=images.device)
            for y, x, share in places:
                corner = (above + y) * here.stride(1) + (left + x) * C
                total.add_(here.as_strided(total.shape, here.stride(), corner), alpha=share)
            blurred.append(total.bitwise_right_shift_(22).to(torch.uint8))
    return torch.cat(blurred).view(images.shape).index_select(0, order.argsort())


def motion_blur(images: Tensor, level: tuple[int, float], keys: Tensor) -> Tensor:
    """Average pixels along a line within 45 degrees of the horizontal, weighted by half a Gaussian.

    The angle is one of 128 equally spaced ones instead of any.
    """
    return smear(images, *level, 0, keys)


# --- zoom -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _zooms(height: int, width: int, stop: float, step: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean of an image and its zooms as one sparse map from pixels to pixels.

    Weights are multiples of 2**-16, in which unit they are given: float32 then holds every partial sum of bytes with
    such weights, so that no sum depends on its order.

    Returns:
        The source pixels and their weights, (E,) int64 and float32, and where each target's begin, (H * W,).
    """
    pixels = height * width
    factors = np.arange(1, stop, step)
    targets = np.arange(pixels)
    entries = [(targets, np.ones(pixels))]
    for factor in factors.tolist():
        top, bottom, lower = linear_zoom(height, factor)
        left, right, further = linear_zoom(width, factor)
        for row, vertical in ((top, 1 - lower), (bottom, lower)):
            for column, horizontal in ((left, 1 - further), (right, further)):
                entries.append((np.add.outer(row * width, column).ravel(), np.outer(vertical, horizontal).ravel()))
    places = torch.from_numpy(np.stack((np.tile(targets, len(entries)), np.concatenate([e[0] for e in entries]))))
    weights = torch.from_numpy(np.concatenate([e[1] for e in entries]))
    mean = torch.sparse_coo_tensor(
        places, weights / (len(factors) + 1), (pixels, pixels), check_invariants=False
    ).coalesce()
    shares = (mean.values() * 2**16).round()
    (target, source), shares = mean.indices()[:, shares > 0], shares[shares > 0]
    shares[target == source] += 2**16 - target.bincount(shares, pixels)  # a pixel is always among its own sources
    return source, shares.float(), torch.searchsorted(target, torch.arange(pixels))


def zoom_blur(images: Tensor, level: tuple[float, float], keys: Tensor) -> Tensor:
    """Average the image and its bilinear zooms about the centre, by 1, 1 + step, ... below ``stop``.

    As NumPy's ``arange`` has it: rounding lets 1.06, 1.11 and 1.31 - 0.01 in where the end should be left out.
    """
    N, H, W, _ = images.shape
    sources, shares, starts = (part.to(images.device) for part in _zooms(H, W, *level))
    by_pixel = images.view(N, H * W, 3).permute(1, 0, 2).to(torch.float32, memory_format=torch.contiguous_format)
    blurred = torch.nn.functional.embedding_bag(
        sources, by_pixel.view(H * W, N * 3), starts, mode="sum", per_sample_weights=shares
    )
    return to_bytes(blurred.mul_(2.0**-16)).view(H * W, N, 3).permute(1, 0, 2).reshape(images.shape)
