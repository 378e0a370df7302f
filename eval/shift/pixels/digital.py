"""Light, colour and resolution: contrast, brightness, saturation and pixels.

Each is a function ``(images, level, keys) -> images`` of uint8 (N, H, W, 3), its constants at one severity, and one
key an image, which none of them reads.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ensembler.eval.shift.pixels.filters import pixels, planes, to_bytes

__all__ = ["brightness", "contrast", "pixelate", "saturate"]


def contrast(images: Tensor, factor: float, keys: Tensor) -> Tensor:
    """Compute ``(x - mean) * factor + mean`` with the mean of each image and channel."""
    N, H, W, _ = images.shape
    levels = images.view(N, H, W * 3).to(torch.float32)
    sums = levels.sum(1).to(torch.float64).view(N, W, 3).sum(1)  # of integers: exact in any order
    offset = (sums * ((1 - factor) / (H * W))).to(torch.float32)
    levels *= factor
    levels += offset.repeat(1, W)[:, None]
    return to_bytes(levels).view(images.shape)


def _extremes(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest and smallest of the three channels of (N, 3, H, W)."""
    red, green, blue = levels.unbind(1)
    return torch.maximum(red, green).maximum(blue), torch.minimum(red, green).minimum(blue)


def brightness(images: Tensor, amount: float, keys: Tensor) -> Tensor:
    """Add to the HSV value: at constant hue and saturation all three channels grow by the same factor."""
    levels = planes(images)
    value = _extremes(levels)[0]
    raised = (value + 255 * amount).clamp_(max=255)
    factor = raised / value.clamp(min=1)
    levels = raised[:, None] - (value[:, None] - levels).mul_(factor[:, None])
    return pixels(to_bytes(levels))


def saturate(images: Tensor, level: tuple[float, float], keys: Tensor) -> Tensor:
    """Map the HSV saturation s to a * s + b: each channel's distance from the largest grows by one factor.

    Grey has no hue; by the convention that it is red, ``b > 0`` tints it.
    """
    scale, shift = level
    levels = planes(images)
    value, smallest = _extremes(levels)
    full = value / (value - smallest).clamp_(min=1)  # one over the saturation
    factor = torch.minimum(full * shift + scale, full)
    levels = value[:, None] - (value[:, None] - levels).mul_(factor[:, None])
    if shift > 0:
        levels[:, 1:] -= (value * shift).mul_(value == smallest)[:, None]
    return pixels(to_bytes(levels))


@lru_cache(maxsize=32)
def _box_cells(size: int, cells: int) -> list[tuple[int, int]]:
    """Return the cell that each pixel shows, after a box filter from ``size`` pixels down to ``cells`` and back.

    A cell takes the pixels whose centres lie inside it, as Pillow's box filter does.

    Returns:
        For each of ``size`` pixels its cell's first pixel and how many there are.
    """
    scale = size / cells
    inside = [
        [i for i in range(size) if -0.5 < (i - (cell + 0.5) * scale + 0.5) / scale <= 0.5] for cell in range(cells)
    ]
    shown = [inside[int((pixel + 0.5) * cells / size)] for pixel in range(size)]
    return [(pixels[0], len(pixels)) for pixels in shown]


def _mean(parts: list[Tensor]) -> Tensor:
    """Return the mean of some bytes, to the nearest."""
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 2:  # (a + b + 1) / 2 without leaving the bytes
        a, b = parts
        return (a | b).sub_((a ^ b).bitwise_right_shift_(1))
    total = parts[0].to(torch.int32)
    for part in parts[1:]:
        total += part
    return total.mul_(round(2**22 / len(parts))).add_(2**21).bitwise_right_shift_(22).to(torch.uint8)


@lru_cache(maxsize=32)
def _shifts(size: int, cells: int) -> dict[int, list[tuple[int, Tensor]]]:
    """By the number of pixels in a cell: how many places aside its first pixel is, and a mask of the pixels that
    show it, (size * 3,) uint8 of 0 and 255."""
    found: dict[int, dict[int, Tensor]] = {}
    for pixel, (first, length) in enumerate(_box_cells(size, cells)):
        mask = found.setdefault(length, {}).setdefault(first - pixel, torch.zeros(size, 3, dtype=torch.uint8))
        mask[first] = 255
    return {length: [(shift, mask.flatten()) for shift, mask in masks.items()] for length, masks in found.items()}


def _pixelated_rows(images: Tensor, cells: int) -> Tensor:
    """Shrink every row of pixels to ``cells`` and grow it back.

    A processor takes 32 bytes at a time from one place, but gathers them one by one. All pixels lie a few places from
    their cells: those equally far are masked and moved together, at the cell's first pixel.
    """
    N, H, W, _ = images.shape
    flat = images.view(-1)
    out = torch.zeros_like(flat)
    for length, masks in _shifts(W, cells).items():
        size = len(flat) - (length - 1) * 3
        means = flat
        if length > 1:
            means = torch.empty_like(flat)  # the last have no mean, and start no cell
            means[:size] = _mean([flat[k * 3 :][:size] for k in range(length)])
        for shift, mask in masks:
            chosen = (means.view(N * H, W * 3) & mask.to(flat.device)).view(-1)
            first, last = max(0, shift * 3), len(flat) + min(0, shift * 3)
            out[first - shift * 3 : last - shift * 3].bitwise_or_(chosen[first:last])
    return out.view(images.shape)


@lru_cache(maxsize=32)
def _columns(size: int, cells: int) -> tuple[list[list[Tensor]], Tensor]:
    """By the number of pixels in a cell: the first pixels of these cells, the second ones and so on; and of all cells
    in this order the number of the one that each pixel shows, (size,) int64."""
    shown = _box_cells(size, cells)
    order = sorted({*shown}, key=lambda cell: cell[::-1])
    members = [
        [torch.tensor([first + k for first, many in order if many == length]) for k in range(length)]
        for length in sorted({many for _, many in order})
    ]
    return members, torch.tensor([order.index(cell) for cell in shown])


def pixelate(images: Tensor, factor: float, keys: Tensor) -> Tensor:
    """Shrink by a box filter to ``int(factor * size)`` and grow back, as Pillow does: rows first, then columns.

    Each axis is rounded by itself, so images so tall that Pillow begins with the columns differ by a level here.
    """
    H, W = images.shape[1:3]
    rows = _pixelated_rows(images, max(1, int(W * factor)))
    members, shown = _columns(H, max(1, int(H * factor)))
    cells = [_mean([rows.index_select(1, places.to(rows.device)) for places in of_length]) for of_length in members]
    return torch.cat(cells, 1).index_select(1, shown.to(rows.device))
