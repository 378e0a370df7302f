"""Light, colour and resolution: contrast, brightness, saturation and pixels.

Each is a function ``(images, level, keys) -> images`` of uint8 (N, H, W, 3), its constants at one severity, and one
key an image, which none of them reads.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ensembler.eval.filters import planes, to_bytes

__all__ = ["brightness", "contrast", "pixelate", "saturate"]


def contrast(images: Tensor, factor: float, keys: Tensor) -> Tensor:
    """``(x - mean) * factor + mean`` with each image's and channel's own mean."""
    N, H, W, _ = images.shape
    levels = images.view(N, H, W * 3).to(torch.float32)
    sums = levels.sum(1).to(torch.float64).view(N, W, 3).sum(1)  # of integers: exact in any order
    offset = (sums * ((1 - factor) / (H * W))).to(torch.float32)
    levels *= factor
    levels += offset.repeat(1, W)[:, None]
    return to_bytes(levels).view(images.shape)


def _extremes(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and smallest of the three channels of (N, 3, H, W)."""
    red, green, blue = levels.unbind(1)
    return torch.maximum(red, green).maximum(blue), torch.minimum(red, green).minimum(blue)


def brightness(images: Tensor, amount: float, keys: Tensor) -> Tensor:
    """HSV value + amount: at one hue and saturation all three channels grow by the same factor."""
    levels = planes(images)
    value = _extremes(levels)[0]
    raised = (value + 255 * amount).clamp_(max=255)
    factor = raised / value.clamp(min=1)
    levels = raised[:, None] - (value[:, None] - levels).mul_(factor[:, None])
    return to_bytes(levels).permute(0, 2, 3, 1)


def saturate(images: Tensor, level: tuple[float, float], keys: Tensor) -> Tensor:
    """HSV saturation * a + b: at one hue and value every channel's distance from the largest grows by one factor.

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
    return to_bytes(levels).permute(0, 2, 3, 1)


@lru_cache(maxsize=32)
def _box_cells(size: int, cells: int) -> tuple[tuple[int, ...], Tensor]:
    """For a box filter from ``size`` pixels down to ``cells`` and back: what each pixel takes.

    A cell takes the pixels whose centres lie inside it, as Pillow's box filter does.

    Returns:
        The different numbers of pixels in a cell; and (size,) int64, ``size * j + i`` for the mean of as many pixels,
        from pixel i on, as the j-th of these numbers says.
    """
    scale = size / cells
    inside = [
        [i for i in range(size) if -0.5 < (i - (cell + 0.5) * scale + 0.5) / scale <= 0.5] for cell in range(cells)
    ]
    lengths = tuple(sorted({len(pixels) for pixels in inside}))
    taken = [pixels[0] + size * lengths.index(len(pixels)) for pixels in inside]
    return lengths, torch.tensor([taken[int((pixel + 0.5) * cells / size)] for pixel in range(size)])


def _means(images: Tensor, step: int, length: int) -> Tensor:
    """The means of ``length`` pixels, ``step`` bytes apart, from each byte on; beyond the last they mean nothing."""
    if length == 1:
        return images
    flat, means = images.flatten(), torch.empty_like(images)
    size = len(flat) - (length - 1) * step
    if length == 2:  # (a + b + 1) / 2 without leaving the bytes
        a, b, out = flat[:size], flat[step:], means.view(-1)[:size]
        torch.bitwise_or(a, b, out=out).sub_((a ^ b).bitwise_right_shift_(1))
    else:
        total = flat[:size].to(torch.int32)
        for k in range(1, length):
            total += flat[k * step :][:size]
        means.view(-1)[:size] = total.mul_(round(2**22 / length)).add_(2**21).bitwise_right_shift_(22)
    return means


def pixelate(images: Tensor, factor: float, keys: Tensor) -> Tensor:
    """Shrink by a box filter to ``int(factor * size)`` and grow back, as Pillow does: rows first, then columns.

    Each axis is rounded by itself, so images so tall that Pillow begins with the columns differ by a level here.
    """
    N, H, W, _ = images.shape
    lengths, taken = _box_cells(W, max(1, int(W * factor)))
    means = torch.cat([_means(images, 3, length) for length in lengths], 2).view(N * H, -1)
    places = (taken[:, None] * 3 + torch.arange(3)).flatten().to(images.device)
    across = means.gather(1, places.expand(N * H, -1)).view(images.shape)
    lengths, taken = _box_cells(H, max(1, int(H * factor)))
    means = torch.cat([_means(across, W * 3, length) for length in lengths], 1)
    return means.index_select(1, taken.to(images.device))
