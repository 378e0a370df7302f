"""Common image corruptions at the constants of CIFAR-10-C, on whole batches of bytes.

The nineteen corruptions and their five severities are those of Hendrycks & Dietterich 2019
(https://arxiv.org/abs/1903.12261); the semantics follow the script with which the authors made CIFAR-10-C, which
works on ``x / 255``, clips to [0, 1], multiplies by 255 and truncates to a byte. The constants are tuned for
32 x 32 pixels: other sizes work, and are corrupted by the same number of pixels or levels.

The authors drew without a seed, so nothing made here equals the published files, and nothing made here may be
reported as if it did. What is made here can be made again: a random byte depends only on (seed, corruption, severity,
index of the image, position in the image), and every sum is taken in a fixed order, so a slice of a batch holds the
bytes that the whole batch would.

To add a corruption, write one function ``(images, level, keys) -> images`` named as the protocol names it, and
register it with its five constants.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ensembler.errors import ShapeError, UsageError
from ensembler.eval.noise import gaussian_table, image_keys, impulse_table, sample, shot_table, speckle_table

__all__ = ["AVAILABLE", "HEADLINE", "SEVERITIES", "VALIDATION", "corrupt"]

_NOISE = ("gaussian_noise", "shot_noise", "impulse_noise")
_BLUR = ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur")
_WEATHER = ("snow", "frost", "fog", "brightness")
_DIGITAL = ("contrast", "elastic_transform", "pixelate", "jpeg_compression")

HEADLINE: tuple[str, ...] = (*_NOISE, *_BLUR, *_WEATHER, *_DIGITAL)
VALIDATION: tuple[str, ...] = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
SEVERITIES: tuple[int, ...] = (1, 2, 3, 4, 5)

Corruption = Callable[[Tensor, Any, Tensor], Tensor]

_REGISTRY: dict[str, tuple[Corruption, tuple[Any, ...]]] = {}
_SMALLEST = 4  # pixels a side: below it a pixelated cell would span more than two pixels
_CHUNK = {"cpu": 2**19, "cuda": 2**25}  # bytes worked on at once: what a core's cache holds, or what fills a GPU


def corrupt(
    images: Tensor,
    corruption: str,
    severity: int,
    *,
    indices: Tensor | Sequence[int] | None = None,
    seed: int = 0,
) -> Tensor:
    """Corrupt a batch of images.

    Args:
        images: (N, H, W, 3) uint8 on any device, H and W at least 4.
        corruption: one of ``AVAILABLE``.
        severity: 1 to 5.
        indices: (N,) integers, each image's position in the whole test set; 0 to N - 1 by default. Only the noises
            read them.
        seed: any integer.

    Returns:
        (N, H, W, 3) uint8 on the same device; the input is left as it was.

    Raises:
        UsageError: an unknown corruption or severity.
        ShapeError: images or indices of the wrong shape or type.
    """
    if corruption not in _REGISTRY:
        raise UsageError(f"corruption {corruption!r} is not available here; choose one of {', '.join(AVAILABLE)}")
    if severity not in SEVERITIES or isinstance(severity, bool):
        raise UsageError(f"severity {severity!r} of {corruption} does not exist; choose one of 1, 2, 3, 4, 5")
    _check(images)
    positions = _positions(indices, len(images))
    apply, levels = _REGISTRY[corruption]
    # Not every accelerator has the float64 and int64 arithmetic that makes the bytes the same everywhere.
    device = images.device if images.device.type in _CHUNK else torch.device("cpu")
    keys = image_keys(f"{seed:d}/{corruption}/{severity:d}", positions.to(device))
    out = torch.empty_like(images, memory_format=torch.contiguous_format)
    size = max(1, _CHUNK[device.type] // max(1, images[:1].numel()))
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        out[part] = apply(images[part].to(device).contiguous(), levels[severity - 1], keys[part]).to(out.device)
    return out


def _check(images: Tensor) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        found = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise ShapeError(f"images must be a uint8 tensor (N, H, W, 3), found {found}; give the bytes 0 to 255")
    if images.ndim != 4 or images.shape[-1] != 3 or min(images.shape[1:3]) < _SMALLEST:
        raise ShapeError(
            f"images must be (N, H, W, 3) with H and W at least {_SMALLEST}, found {tuple(images.shape)}; "
            "put the channels last and repeat a single channel three times"
        )


def _positions(indices: Tensor | Sequence[int] | None, count: int) -> Tensor:
    """Positions of the images in the whole test set, (N,) int64."""
    if indices is None:
        return torch.arange(count)
    positions = torch.as_tensor(indices)
    if positions.dtype.is_floating_point or positions.dtype == torch.bool or positions.shape != (count,):
        raise ShapeError(
            f"indices must be {count} integers, one an image, found {positions.dtype} {tuple(positions.shape)}"
        )
    return positions.to(torch.int64)


def _register(*levels: Any) -> Callable[[Corruption], Corruption]:
    """Make a function available under its own name, with its constants at severities 1 to 5."""

    def keep(function: Corruption) -> Corruption:
        _REGISTRY[function.__name__] = (function, levels)
        return function

    return keep


# --- noises ---------------------------------------------------------------------------------------------------------


@_register(0.04, 0.06, 0.08, 0.09, 0.10)
def gaussian_noise(images: Tensor, sigma: float, keys: Tensor) -> Tensor:
    """``x + N(0, sigma)``."""
    return sample(images, gaussian_table(sigma), keys)


@_register(500, 250, 100, 75, 50)
def shot_noise(images: Tensor, rate: int, keys: Tensor) -> Tensor:
    """``Poisson(x * rate) / rate``."""
    return sample(images, shot_table(rate), keys)


@_register(0.01, 0.02, 0.03, 0.05, 0.07)
def impulse_noise(images: Tensor, amount: float, keys: Tensor) -> Tensor:
    """Salt and pepper: each channel of each pixel becomes 0 or 1 with probability ``amount / 2`` each."""
    return sample(images, impulse_table(amount), keys)


@_register(0.06, 0.1, 0.12, 0.16, 0.2)
def speckle_noise(images: Tensor, sigma: float, keys: Tensor) -> Tensor:
    """``x + x * N(0, sigma)``."""
    return sample(images, speckle_table(sigma), keys)


# --- blurs: sums of separable symmetric filters ---------------------------------------------------------------------

Taps = tuple[float, ...]  # half a symmetric filter: the centre's weight, then its neighbours'


def _to_bytes(levels: Tensor) -> Tensor:
    """Truncate float levels as the authors did, in place; what rounding left just under an integer is that integer."""
    return levels.add_(2.0**-14).clamp_(0, 255).to(torch.int16).to(torch.uint8)


def _blur(images: Tensor, filters: Sequence[tuple[Taps, Taps]], border: Callable[[int, int], int]) -> Tensor:
    """Sum of separable filters, each its (vertical, horizontal) taps; ``border`` maps a place outside to one inside.

    Shifted copies are added in a fixed order, one rounding at a time: a matrix product is no faster for so few taps,
    and could round a slice otherwise than the whole.
    """
    N, H, W, _ = images.shape
    r = max(len(taps) for pair in filters for taps in pair) - 1
    wide = images.new_empty(N, H, W + 2 * r, 3, dtype=torch.float32)
    wide[:, :, r : r + W] = images
    for column in (*range(r), *range(r + W, W + 2 * r)):
        wide[:, :, column] = wide[:, :, r + border(column - r, W)]
    rows = torch.tensor([border(row - r, H) for row in range(H + 2 * r)], device=images.device)
    total = images.new_zeros(N, H * W * 3, dtype=torch.float32)
    for vertical, horizontal in filters:
        across = _convolve(wide.flatten(2), horizontal, r, 3)
        total += _convolve(across.index_select(1, rows).flatten(1), vertical, r, W * 3)
    return _to_bytes(total).view(images.shape)


def _convolve(padded: Tensor, taps: Taps, r: int, step: int) -> Tensor:
    """Filter the last axis, which holds r places of ``step`` numbers beyond either end; (..., L + 2 * r * step)."""
    length = padded.shape[-1] - 2 * r * step

    def shifted(k: int) -> Tensor:
        return padded.narrow(-1, (r + k) * step, length)

    out = shifted(0) * taps[0]
    for k, weight in enumerate(taps[1:], start=1):
        out += (shifted(-k) + shifted(k)).mul_(weight)
    return out


def _nearest(index: int, size: int) -> int:
    return min(max(index, 0), size - 1)


def _reflect_101(index: int, size: int) -> int:
    """Mirror about the centre of the outermost pixel, which is not repeated; at most size - 1 outside."""
    return size - 1 - abs(size - 1 - abs(index))


@_register(0.4, 0.6, 0.7, 0.8, 1.0)
def gaussian_blur(images: Tensor, sigma: float, keys: Tensor) -> Tensor:
    """Gaussian filter cut at 4 sigma, each channel alone; the border's pixels are repeated outside."""
    weights = np.exp(-0.5 * (np.arange(int(4 * sigma + 0.5) + 1) / sigma) ** 2)
    taps = tuple((weights / (2 * weights.sum() - weights[0])).tolist())
    return _blur(images, [(taps, taps)], _nearest)


@lru_cache(maxsize=5)
def _disk(radius: float, alias: float) -> list[tuple[Taps, Taps]]:
    """The defocus kernel, a disk of pixels smoothed by a 3 x 3 Gaussian, as a sum of separable filters."""
    grid = np.arange(-8, 9)
    disk = (grid[:, None] ** 2 + grid[None] ** 2 <= radius**2).astype(np.float64)
    smooth = np.exp(-0.5 * (np.arange(-1, 2) / alias) ** 2)
    smooth /= smooth.sum()
    around: NDArray[np.float64] = np.apply_along_axis(np.convolve, 0, disk / disk.sum(), smooth, "same")
    kernel = np.apply_along_axis(np.convolve, 1, around, smooth, "same")
    half = np.where(kernel < 1e-9, 0, kernel)[8:, 8:]  # symmetric; what is lighter moves no byte
    left, values, right = np.linalg.svd(half[: (half[0] > 0).sum(), : (half[0] > 0).sum()])
    return [
        (tuple((left[:, i] * values[i]).tolist()), tuple(right[i].tolist()))
        for i in range(len(values))
        if values[i] > 1e-6
    ]


@_register((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))
def defocus_blur(images: Tensor, level: tuple[float, float], keys: Tensor) -> Tensor:
    """A disk of (radius, smoothing) in place of every pixel; the border is mirrored."""
    return _blur(images, _disk(*level), _reflect_101)


# --- light and colour -----------------------------------------------------------------------------------------------


@_register(0.75, 0.5, 0.4, 0.3, 0.15)
def contrast(images: Tensor, factor: float, keys: Tensor) -> Tensor:
    """``(x - mean) * factor + mean`` with each image's and channel's own mean."""
    N, H, W, _ = images.shape
    levels = images.view(N, H, W * 3).to(torch.float32)
    sums = levels.sum(1).to(torch.float64).view(N, W, 3).sum(1)  # of integers: exact in any order
    offset = (sums * ((1 - factor) / (H * W))).to(torch.float32)
    levels *= factor
    levels += offset.repeat(1, W)[:, None]
    return _to_bytes(levels).view(images.shape)


def _extremes(planes: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and smallest of the three channels of ``planes`` (N, 3, H, W)."""
    red, green, blue = planes.unbind(1)
    return torch.maximum(red, green).maximum(blue), torch.minimum(red, green).minimum(blue)


def _planes(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)


@_register(0.05, 0.1, 0.15, 0.2, 0.3)
def brightness(images: Tensor, amount: float, keys: Tensor) -> Tensor:
    """HSV value + amount: at one hue and saturation all three channels grow by the same factor."""
    planes = _planes(images)
    value = _extremes(planes)[0]
    raised = (value + 255 * amount).clamp_(max=255)
    factor = raised / value.clamp(min=1)
    levels = raised[:, None] - (value[:, None] - planes).mul_(factor[:, None])
    return _to_bytes(levels).permute(0, 2, 3, 1)


@_register((0.3, 0.0), (0.1, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2))
def saturate(images: Tensor, level: tuple[float, float], keys: Tensor) -> Tensor:
    """HSV saturation * a + b: at one hue and value every channel's distance from the largest grows by one factor.

    Grey has no hue; by the convention that it is red, ``b > 0`` tints it.
    """
    scale, shift = level
    planes = _planes(images)
    value, smallest = _extremes(planes)
    full = value / (value - smallest).clamp_(min=1)  # one over the saturation
    factor = torch.minimum(full * shift + scale, full)
    levels = value[:, None] - (value[:, None] - planes).mul_(factor[:, None])
    if shift > 0:
        levels[:, 1:] -= (value * shift).mul_(value == smallest)[:, None]
    return _to_bytes(levels).permute(0, 2, 3, 1)


# --- coding ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def _box_cells(size: int, cells: int) -> Tensor:
    """For a box filter from ``size`` pixels down to ``cells`` and back: what each pixel takes, (size,) int64.

    An entry below ``size`` is one pixel, an entry ``size + i`` the mean of pixels i and i + 1. A cell takes the
    pixels whose centres lie inside it, as Pillow's box filter does.
    """
    scale = size / cells
    taken = []
    for cell in range(cells):
        centre = (cell + 0.5) * scale
        inside = [i for i in range(size) if -0.5 < (i - centre + 0.5) / scale <= 0.5]
        taken.append(inside[0] + size * (len(inside) - 1))
    return torch.tensor([taken[int((pixel + 0.5) * cells / size)] for pixel in range(size)])


@_register(0.95, 0.9, 0.85, 0.75, 0.65)
def pixelate(images: Tensor, factor: float, keys: Tensor) -> Tensor:
    """Shrink by a box filter to ``int(factor * size)`` and grow back, as Pillow does: rows first, then columns.

    Each axis is rounded by itself, so images so tall that Pillow begins with the columns differ by a level here.
    """
    for axis in (2, 1):
        size = images.shape[axis]
        a, b = images.narrow(axis, 0, size - 1), images.narrow(axis, 1, size - 1)
        means = (a | b) - ((a ^ b) >> 1)  # (a + b + 1) / 2 without leaving the bytes
        cells = _box_cells(size, int(size * factor)).to(images.device)
        images = torch.cat((images, means), axis).index_select(axis, cells)
    return images


@_register(80, 65, 58, 50, 40)
def jpeg_compression(images: Tensor, quality: int, keys: Tensor) -> Tensor:
    """Pillow's JPEG at this quality, there and back."""

    def recode(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return torch.from_numpy(np.stack(list(pool.map(recode, images.cpu().numpy()))))


AVAILABLE: tuple[str, ...] = tuple(name for name in HEADLINE + VALIDATION if name in _REGISTRY)
