"""Elastic transform: an affine map, then a smooth random displacement of every pixel."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ensembler.eval.shift.pixels.filters import between, to_bytes
from ensembler.eval.shift.pixels.noise import branch, uniforms

__all__ = ["elastic_transform"]


def elastic_transform(images: Tensor, level: tuple[float, float, float], keys: Tensor) -> Tensor:
    """Move three points by up to ``jitter``, the image with them, then every pixel by ``alpha`` times noise.

    Noise, uniform between -1 and 1, is smoothed by a Gaussian of sigma cut at 3 sigma. The level (alpha, sigma,
    jitter) is in parts of the image's smaller side. Both maps are bilinear; the first mirrors the border without
    repeating its pixels, the second with.
    """
    N, H, W, _ = images.shape
    alpha, sigma, jitter = (part * min(H, W) for part in level)
    rows = torch.arange(H, device=images.device, dtype=torch.float32)[:, None]
    columns = torch.arange(W, device=images.device, dtype=torch.float32)
    a = _affine(H, W, jitter, keys).to(torch.float32)[:, :, :, None, None]
    down, right = (a[:, axis, 0] * columns + a[:, axis, 1] * rows + a[:, axis, 2] for axis in (1, 0))
    levels = images.permute(3, 0, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    levels = _bilinear(levels, _mirrored(down, H), _mirrored(right, W))
    if alpha > 0:
        noise = uniforms(branch(keys, 1), 2 * H * W).view(2 * N, H, W).to(torch.float64)
        noise = torch.matmul(_smoothing(H, sigma).to(noise.device), noise)
        noise = torch.matmul(noise, _smoothing(W, sigma).to(noise.device).T)
        moved = noise.mul_(alpha).to(torch.float32).view(N, 2, H, W)
        levels = _bilinear(levels, _repeated(moved[:, 0] + rows, H), _repeated(moved[:, 1] + columns, W))
    return to_bytes(levels).permute(1, 2, 3, 0)


def _affine(height: int, width: int, jitter: float, keys: Tensor) -> Tensor:
    """Return where pixels come from: (N, 2, 3) float64, ``(x, y)`` before from ``(x, y, 1)`` after.

    The script's three points, around the centre by a third of the smaller side, are each moved by uniform noise.
    """
    s = min(height, width) // 3
    x, y = width // 2, height // 2
    before = torch.tensor([[x + s, y + s], [x + s, y - s], [x - s, y - s]], dtype=torch.float64, device=keys.device)
    after = before + jitter * uniforms(keys, 6).view(-1, 3, 2).to(torch.float64)
    # Corner 1 and the sides that meet there are sent to corner 1 and its sides, by Cramer's rule.
    (ax, ay), (bx, by) = ((after[:, end] - after[:, 1]).unbind(1) for end in (0, 2))
    determinant = ax * by - bx * ay
    scale = torch.where(determinant == 0, 0, 1 / determinant)
    side = 2 * s * scale
    # Side 0 was (0, 2 s), side 2 was (-2 s, 0).
    xx, xy, yx, yy = ay * side, -ax * side, by * side, -bx * side
    at = after[:, 1]
    return torch.stack(
        [
            torch.stack([xx, xy, before[1, 0] - (xx * at[:, 0] + xy * at[:, 1])], 1),
            torch.stack([yx, yy, before[1, 1] - (yx * at[:, 0] + yy * at[:, 1])], 1),
        ],
        1,
    )


@lru_cache(maxsize=16)
def _smoothing(size: int, sigma: float) -> Tensor:
    """Return a Gaussian filter cut at 3 sigma as a matrix (size, size) float64; the border is mirrored, repeated.

    Its entries are multiples of 2**-20 and noise those of 2**-12: float64 holds every partial sum of the two products,
    so that the order of sums does not matter.
    """
    reach = int(3 * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(sigma, 1e-9)) ** 2)
    places = np.add.outer(np.arange(size), np.arange(-reach, reach + 1)) % (2 * size)
    matrix = np.zeros((size, size))
    rows = np.broadcast_to(np.arange(size)[:, None], places.shape)
    np.add.at(matrix, (rows, np.minimum(places, 2 * size - 1 - places)), weights / weights.sum())
    return torch.from_numpy(np.rint(matrix * 2**20) / 2**20)


def _mirrored(places: Tensor, size: int) -> Tensor:
    """Fold positions into 0 to size - 1, mirrored about the centres of the border's pixels."""
    period = 2.0 * (size - 1)
    places = places - (places * (1 / period)).floor_().mul_(period)
    return torch.minimum(places, period - places).clamp_(0, size - 1)


def _repeated(places: Tensor, size: int) -> Tensor:
    """Fold positions into 0 to size - 1, mirrored about the border, so that its pixels are repeated."""
    period = 2.0 * size
    places = places + 0.5
    places -= (places * (1 / period)).floor_().mul_(period)
    return torch.minimum(places, period - places).sub_(0.5).clamp_(0, size - 1)


def _bilinear(levels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Interpolate ``levels`` (3, N, H, W) at positions (N, H, W) inside the image; overwrites the positions."""
    _, N, H, W = levels.shape
    top, left = rows.floor().clamp_(max=H - 2), columns.floor().clamp_(max=W - 2)
    down, right = rows.sub_(top).flatten(), columns.sub_(left).flatten()
    corner = top.mul_(W).add_(left).to(torch.int32)
    corner += torch.arange(0, N * H * W, H * W, dtype=torch.int32, device=levels.device)[:, None, None]
    found = torch.empty_like(levels)
    a, c, b, d = found.new_empty(4, N * H * W)
    for plane, out in zip(levels.flatten(1), found.flatten(1), strict=True):
        for aside, pixels in ((0, a), (1, b), (W, c), (W + 1, d)):
            torch.index_select(plane[aside:], 0, corner.flatten(), out=pixels)
        out.copy_(between(between(a, b, right), between(c, d, right), down))
    return found
