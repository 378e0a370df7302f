"""Filters on whole batches of images whose sums are the same to the last bit in any batch and on any device.

Two ways lead there. Float sums are taken in a fixed order, one rounding at a time: a matrix product or a fused
multiply-add could round a slice otherwise than the whole, and numbers are multiplied by 1 / c instead of divided by c,
as a GPU does. Or every term is an integer, small enough that no partial sum is ever rounded: then any order will do,
and with it any kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "Border",
    "Taps",
    "between",
    "gaussian_taps",
    "linear_zoom",
    "luminance",
    "mirror",
    "nearest",
    "pad",
    "pixels",
    "planes",
    "separable",
    "to_bytes",
]

Taps = tuple[float, ...]  # half a symmetric filter: the centre's weight, then its neighbours'
Border = Callable[[int, int], int]  # (a place, the size) -> the place inside that it stands for


def nearest(index: int, size: int) -> int:
    """Repeat the border's pixel outside."""
    return min(max(index, 0), size - 1)


def mirror(index: int, size: int) -> int:
    """Mirror about the centre of the border's pixel, which is not repeated; any number of times."""
    inside = index % (2 * size - 2)
    return min(inside, 2 * size - 2 - inside)


def planes(images: Tensor) -> Tensor:
    """Convert uint8 (N, H, W, C) to float levels (N, C, H, W), contiguous."""
    return images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)


def pixels(levels: Tensor) -> Tensor:
    """Convert (N, C, H, W) to (N, H, W, C), contiguous; a channel at a time takes half as long as all at once."""
    N, C, H, W = levels.shape
    images = levels.new_empty(N, H, W, C)
    for channel, plane in enumerate(levels.unbind(1)):
        images[..., channel] = plane
    return images


def to_bytes(levels: Tensor) -> Tensor:
    """Truncate float levels as the authors did, in place; what rounding left just under an integer is that integer."""
    return levels.add_(2.0**-14).clamp_(0, 255).to(torch.int16).to(torch.uint8)


def luminance(levels: Tensor) -> Tensor:
    """Compute the grey levels (N, H, W) of (N, 3, H, W), with the weights of ITU-R BT.601."""
    red, green, blue = levels.unbind(1)
    return (red * 0.299).add_(green * 0.587).add_(blue * 0.114)


def pad(
    images: Tensor, rows: tuple[int, int], columns: tuple[int, int], border: Border, dtype: torch.dtype | None = None
) -> Tensor:
    """Add rows (above, below) and columns (left, right) to (N, H, W, C)."""
    N, H, W, C = images.shape
    (above, below), (left, right) = rows, columns
    wide = images.new_empty(N, above + H + below, left + W + right, C, dtype=dtype or images.dtype)
    middle = wide.narrow(1, above, H)
    middle[:, :, left : left + W] = images
    if border is nearest:  # without a loop
        middle[:, :, :left] = images[:, :, :1]
        middle[:, :, left + W :] = images[:, :, -1:]
        wide[:, :above] = middle[:, :1]
        wide[:, above + H :] = middle[:, -1:]
        return wide
    for column in (*range(left), *range(left + W, left + W + right)):
        middle[:, :, column] = middle[:, :, left + border(column - left, W)]
    for row in (*range(above), *range(above + H, above + H + below)):
        wide[:, row] = wide[:, above + border(row - above, H)]
    return wide


def gaussian_taps(sigma: float) -> Taps:
    """Return a Gaussian cut at 4 sigma, with weights of sum 1."""
    weights = np.exp(-0.5 * (np.arange(int(4 * sigma + 0.5) + 1) / sigma) ** 2)
    return tuple((weights / (2 * weights.sum() - weights[0])).tolist())


def separable(images: Tensor, filters: Sequence[tuple[Taps, Taps]], border: Border) -> Tensor:
    """Apply a sum of separable filters to (N, H, W, C), each given as (vertical, horizontal) taps; float32."""
    N, H, W, C = images.shape
    r = max(len(taps) for pair in filters for taps in pair) - 1
    wide = pad(images, (0, 0), (r, r), border, torch.float32).flatten(2)
    tall, rows = wide.new_empty(N, H + 2 * r, W * C), range(r, r + H)
    parts = []
    for vertical, horizontal in filters:
        _convolve(wide, horizontal, r, C, tall[:, r : r + H])
        for row in (*range(r), *range(r + H, H + 2 * r)):
            tall[:, row] = tall[:, rows[border(row - r, H)]]
        parts.append(_convolve(tall.flatten(1), vertical, r, W * C, wide.new_empty(N, H * W * C)))
    for part in parts[1:]:
        parts[0] += part
    return parts[0].view(images.shape)


def _convolve(padded: Tensor, taps: Taps, r: int, step: int, out: Tensor) -> Tensor:
    """Filter the last axis into ``out``; it has r places of ``step`` numbers beyond either end of (..., L)."""

    def shifted(k: int) -> Tensor:
        return padded.narrow(-1, (r + k) * step, out.shape[-1])

    torch.mul(shifted(0), taps[0], out=out)
    pair = torch.empty_like(out)  # once: fresh memory costs more than the sum
    for k, weight in enumerate(taps[1:], start=1):
        out += torch.add(shifted(-k), shifted(k), out=pair).mul_(weight)
    return out


def between(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Compute ``a + (b - a) * share``, rounded after each operation, unlike ``torch.lerp``; overwrites ``b``."""
    return b.sub_(a).mul_(share).add_(a)


def linear_zoom(size: int, factor: float) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Find where the pixels of a line come from when it is zoomed about its centre by ``factor`` >= 1.

    As the script does with ``scipy.ndimage.zoom(order=1)``: the middle ``ceil(size / factor)`` pixels are stretched
    so that the first and the last stay the first and the last, and of the longer line the middle is kept.

    Returns:
        (size,) each: the pixels before and after, int64, and the share of the latter, float64.
    """
    crop = math.ceil(size / factor)
    wide = round(crop * factor)
    place = ((wide - size) // 2 + np.arange(size)) * ((crop - 1) / (wide - 1))
    before = np.minimum(place.astype(np.int64), crop - 1)
    start = (size - crop) // 2
    return before + start, np.minimum(before + 1, crop - 1) + start, place - before
