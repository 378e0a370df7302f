"""The weather: snow, frost and fog.

Each is a function ``(images, level, keys) -> images`` of uint8 (N, H, W, 3), its constants at one severity, and one
key an image.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import resources

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ensembler.eval.shift.pixels.blurs import smear
from ensembler.eval.shift.pixels.filters import between, linear_zoom, luminance, pixels, planes, to_bytes
from ensembler.eval.shift.pixels.noise import below, branch, normals, uniforms

__all__ = ["fog", "frost", "snow"]


def snow(images: Tensor, level: tuple[float, float, float, float, int, float, float], keys: Tensor) -> Tensor:
    """Add two layers of flakes, driven in opposite directions, over a paler image.

    Normal noise of (mean, deviation), zoomed by ``zoom``, is cut to 0 below ``threshold`` and smeared within 45
    degrees of the vertical; it is added as it is and turned by 180 degrees to
    ``mix * x + (1 - mix) * max(x, 1.5 * grey + 0.5)``.
    """
    mean, deviation, zoom, threshold, radius, sigma, mix = level
    N, H, W, _ = images.shape
    flakes = _zoomed(normals(keys, H * W).view(N, H, W), zoom).mul_(deviation).add_(mean)
    layer = to_bytes(flakes.mul_(flakes >= threshold).mul_(255))
    layer = smear(layer[..., None], radius, sigma, -90, branch(keys, 1)).squeeze(3).to(torch.float32)
    layer += layer.flip(1, 2)
    levels = planes(images)
    pale = torch.maximum(levels, luminance(levels).mul_(1.5).add_(127.5)[:, None])
    return pixels(to_bytes(levels.mul_(mix).add_(pale.mul_(1 - mix)).add_(layer[:, None])))


def _zoomed(layer: Tensor, factor: float) -> Tensor:
    """Zoom (N, H, W) about its centre."""
    N, H, W = layer.shape
    (top, bottom, lower), (left, right, further) = (
        [torch.from_numpy(part).to(layer.device) for part in linear_zoom(size, factor)] for size in (H, W)
    )
    lower, further = lower.to(layer.dtype)[:, None], further.to(layer.dtype)
    layer = between(layer.index_select(1, top), layer.index_select(1, bottom), lower)
    return between(layer.gather(2, left.expand(N, H, W)), layer.gather(2, right.expand(N, H, W)), further)


# --- frost ----------------------------------------------------------------------------------------------------------

_PHOTOGRAPHS = 4
_DRAWN = (0, 1, 1, 2, 3)
"""The photographs that the authors' script draws from, each as often as any. Its third file has the pixels of its
second, and it never draws its last, which is the fifth of ours."""


@lru_cache(maxsize=8)
def _photographs(height: int, width: int, shrink: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Load the frost photographs, shrunk by ``shrink``, or less where (height, width) needs it.

    They are sampled bilinearly without being smoothed first, as OpenCV does.

    Returns:
        All their bytes one after another, and of each the first byte, the height and the width, (4, 3) int64.
    """
    folder = resources.files("torch_uncertainty_assets.frost")
    parts, shapes, begin = [], [], 0
    for number in range(1, _PHOTOGRAPHS + 1):
        with (folder / f"frost{number}.jpg").open("rb") as file:
            photograph = np.asarray(Image.open(file).convert("RGB")).astype(np.float64)
        scale = max(1 / shrink, (height + 1) / photograph.shape[0], (width + 1) / photograph.shape[1])
        for axis in (0, 1):
            photograph = _sampled(photograph, round(photograph.shape[axis] * scale), axis)
        parts.append(torch.from_numpy(np.rint(photograph).astype(np.uint8).ravel()))
        shapes.append((begin, *photograph.shape[:2]))
        begin += photograph.size
    return torch.cat(parts).to(device), torch.tensor(shapes, device=device)


def _sampled(photograph: NDArray[np.float64], size: int, axis: int) -> NDArray[np.float64]:
    """Resize a photograph (H, W, 3) to ``size`` pixels along an axis."""
    old = photograph.shape[axis]
    place = ((np.arange(size) + 0.5) * (old / size) - 0.5).clip(0, old - 1)
    before = place.astype(np.int64)
    share = (place - before).reshape([-1 if along == axis else 1 for along in range(3)])
    after = np.minimum(before + 1, old - 1)
    return photograph.take(before, axis) * (1 - share) + photograph.take(after, axis) * share


def frost(images: Tensor, level: tuple[float, float, int], keys: Tensor) -> Tensor:
    """Compute ``a * x + b * frost`` with a random part of one of the authors' photographs of frost.

    They are drawn with the weights of the script, 1, 2, 1 and 1, and shrunk to a fifth for 32 x 32 pixels.
    """
    image_share, frost_share, shrink = level
    H, W = images.shape[1:3]
    photographs, shapes = _photographs(H, W, shrink, images.device)
    drawn = below(keys, len(_DRAWN), 1).flatten()
    begin, height, width = shapes.index_select(0, torch.tensor(_DRAWN, device=keys.device)[drawn]).unbind(1)
    free = torch.stack((height - H, width - W), 1)
    top, left = below(branch(keys, 1), free, 2).unbind(1)
    rows = (top[:, None] + torch.arange(H, device=images.device)) * width[:, None] + left[:, None]
    windows = photographs.unfold(0, W * 3, 1).index_select(0, (begin[:, None] + rows * 3).flatten())
    ice = windows.view(images.shape).to(torch.float32).mul_(frost_share)
    return to_bytes(images.to(torch.float32).mul_(image_share).add_(ice))


# --- fog ------------------------------------------------------------------------------------------------------------


def _plasma(height: int, width: int, decay: float, keys: Tensor) -> Tensor:
    """Draw diamond-square noise from 0 to 1 on a torus whose side is a power of two, (N, height, width) float32.

    Between four neighbours comes their mean plus uniform noise, first in the middles of the squares, then in those
    of their sides; the noise then shrinks by ``decay`` squared, as the script multiplies by the amplitude twice.
    """
    side = 1 << (max(height, width) - 1).bit_length()
    noise = uniforms(keys, side * side)
    N = len(noise)
    points = noise.new_zeros(N, 1, 1)
    amplitude = 1.0
    while (m := points.shape[1]) < side:
        middle, top, left = noise[:, m * m : 4 * m * m].view(N, 3, m, m).mul(amplitude).unbind(1)
        rows = points + points.roll(-1, 1)
        columns = points + points.roll(-1, 2)
        middle = (rows + rows.roll(-1, 2)).div_(4).add_(middle)
        finer = points.new_empty(N, 2 * m, 2 * m)
        finer[:, ::2, ::2] = points
        finer[:, ::2, 1::2] = (middle + middle.roll(1, 1)).add_(columns).div_(4).add_(top)
        finer[:, 1::2, ::2] = (middle + middle.roll(1, 2)).add_(rows).div_(4).add_(left)
        finer[:, 1::2, 1::2] = middle
        points = finer
        amplitude /= decay**2
    points -= points.amin((1, 2), keepdim=True)
    points /= points.amax((1, 2), keepdim=True)
    return points[:, :height, :width]


def fog(images: Tensor, level: tuple[float, float], keys: Tensor) -> Tensor:
    """Compute ``(x + weight * plasma) * max / (max + weight)`` with the image's largest value."""
    weight, decay = level
    N, H, W, _ = images.shape
    haze = _plasma(H, W, decay, keys).mul_(weight * 255)
    largest = images.view(N, -1).amax(1).to(torch.float32).mul_(1 / 255)
    levels = planes(images).add_(haze[:, None]).mul_((largest / (largest + weight))[:, None, None, None])
    return pixels(to_bytes(levels))
