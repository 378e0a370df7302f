"""Spatter: drops of water that glint, or splashes of mud.

The water's glint follows OpenCV 4's algorithms step by step on whole batches, in integers where OpenCV computes in
integers: Canny's edges, distances of a 5 x 5 chamfer, box filters, and the equalising of a histogram.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ensembler.eval.shift.pixels.filters import gaussian_taps, mirror, nearest, pad, planes, separable, to_bytes
from ensembler.eval.shift.pixels.noise import normals

__all__ = ["spatter"]

_WATER = (175.0, 238.0, 238.0)  # pale turquoise
_MUD = (63.0, 42.0, 20.0)


def spatter(images: Tensor, level: tuple[float, float, float, float, float, bool], keys: Tensor) -> Tensor:
    """Cover the image with liquid where normal noise of (mean, deviation), smoothed by sigma, exceeds a threshold.

    Water adds its colour by ``strength`` times its height times its glint, largest 1 in each image. Mud, its mask
    smoothed by ``strength``, covers the pixels where it is denser than 0.8. An image on which nothing fell stays as it
    is, where the script divides 0 by 0.
    """
    mean, deviation, sigma, threshold, strength, muddy = level
    N, H, W, _ = images.shape
    taps = gaussian_taps(sigma)
    noise = normals(keys, H * W).view(N, H, W, 1).mul_(deviation).add_(mean)
    liquid = separable(noise, [(taps, taps)], nearest).squeeze(3)
    levels = planes(images)
    if muddy:
        taps = gaussian_taps(strength)
        mud = separable((liquid > threshold).to(torch.float32)[..., None], [(taps, taps)], nearest)
        mud = mud.mul_(mud >= 0.8).view(N, 1, H, W)
        covered = levels.mul_(1 - mud).add_(mud * levels.new_tensor(_MUD).view(3, 1, 1))
        return to_bytes(covered).permute(0, 2, 3, 1)
    drops = to_bytes(liquid.mul_(liquid >= threshold).mul_(255))
    height = drops.to(torch.int32) * _glint(drops)
    largest = height.amax((1, 2), keepdim=True).clamp_(min=1)
    water = (height.to(torch.float32) / largest).mul_(strength)[:, None]
    return to_bytes(levels.add_(water * levels.new_tensor(_WATER).view(3, 1, 1))).permute(0, 2, 3, 1)


def _around(layer: Tensor, rows: int, columns: int) -> Tensor:
    """Shift a layer (N, H + 2, W + 2) by (rows, columns) and cut its rim, (N, H, W)."""
    H, W = layer.shape[1] - 2, layer.shape[2] - 2
    return layer[:, 1 + rows :][:, :H, 1 + columns :][:, :, :W]


def _weighted(layer: Tensor, weights: tuple[tuple[int, int, int], ...], border: str = "mirror") -> Tensor:
    """Correlate an integer or float (N, H, W) with a 3 x 3 kernel, summed row by row."""
    wide = pad(layer[..., None], (1, 1), (1, 1), mirror if border == "mirror" else nearest).squeeze(3)
    total = torch.zeros_like(layer)
    for row, line in enumerate(weights):
        for column, weight in enumerate(line):
            if weight:
                total += _around(wide, row - 1, column - 1) * weight
    return total


_BOX = ((1, 1, 1),) * 3
_LIGHT = ((-2, -1, 0), (-1, 1, 1), (0, 1, 2))


def _glint(drops: Tensor) -> Tensor:
    """Light the slopes of the distance from the drops' edges, (N, H, W) int32 from 0 to 255."""
    distance = _distance(_edges(drops.to(torch.int32)))
    smooth = to_bytes(_weighted(distance, _BOX).mul_(1 / 9)).to(torch.int32)
    lit = _weighted(_equalised(smooth), _LIGHT).clamp_(0, 255)
    return (2 * _weighted(lit, _BOX) + 9) // 18  # a mean of nine, to the nearest


def _edges(drops: Tensor, low: int = 50, high: int = 150) -> Tensor:
    """Find Canny's edges (1986) of int32 layers (N, H, W), as a mask."""
    right = _weighted(drops, ((-1, 0, 1), (-2, 0, 2), (-1, 0, 1)), "nearest")
    down = _weighted(drops, ((-1, -2, -1), (0, 0, 0), (1, 2, 1)), "nearest")
    x, y = right.abs(), down.abs()
    slope = x + y
    wide = torch.nn.functional.pad(slope, (1, 1, 1, 1))

    def ridge(rows: int, columns: int) -> Tensor:
        return slope > _around(wide, -rows, -columns)

    def ridge_or_plateau(rows: int, columns: int) -> Tensor:
        return slope >= _around(wide, rows, columns)

    # Directions are told apart at 22.5 and 67.5 degrees, in units of 2**-15.
    steep = (y << 15) > x * (13573 + (2 << 15))
    flat = (y << 15) < x * 13573
    falling = ridge(1, 1) & (slope > _around(wide, 1, 1))
    rising = ridge(1, -1) & (slope > _around(wide, 1, -1))
    diagonal = torch.where((right ^ down) < 0, rising, falling)
    straight = torch.where(flat, ridge(0, 1) & ridge_or_plateau(0, 1), ridge(1, 0) & ridge_or_plateau(1, 0))
    candidate = torch.where(flat | steep, straight, diagonal) & (slope > low)
    edges = candidate & (slope > high)
    while True:  # what touches an edge and could be one, is one
        grown = edges.clone()
        for axis in (1, 2):
            before, after = (grown.narrow(axis, start, grown.shape[axis] - 1).clone() for start in (0, 1))
            grown.narrow(axis, 1, grown.shape[axis] - 1).logical_or_(before)
            grown.narrow(axis, 0, grown.shape[axis] - 1).logical_or_(after)
        grown &= candidate
        if torch.equal(grown, edges):
            return edges
        edges = grown


_FAR = 20  # distances beyond are not told apart


@lru_cache(maxsize=2)
def _chamfer(device: torch.device) -> Tensor:
    """Return lengths of (columns, rows) in steps of 1, 1.4 (diagonal), 2.1969 (a knight's move), cut at ``_FAR``."""
    columns, rows = torch.arange(_FAR + 1.0)[:, None], torch.arange(_FAR + 1.0)[None]
    long, short = torch.maximum(columns, rows), torch.minimum(columns, rows)
    near_axis = 2.1969 * short + (long - 2 * short)
    near_diagonal = 2.1969 * (long - short) + 1.4 * (2 * short - long)
    return torch.where(2 * short <= long, near_axis, near_diagonal).clamp_(max=_FAR).to(device)


def _distance(edges: Tensor) -> Tensor:
    """Compute the chamfer distance (Borgefors 1986) to the nearest edge, at most ``_FAR``, (N, H, W) float32.

    First to the nearest edge in the same column; whatever the other columns, only their nearest edge in a column can
    be the nearest of all.
    """
    _, H, W = edges.shape
    rows = torch.arange(H, device=edges.device)[:, None]
    last = torch.where(edges, rows, -_FAR).cummax(1).values
    following = torch.where(edges, rows, H - 1 + _FAR).flip(1).cummin(1).values.flip(1)
    within = torch.minimum(rows - last, following - rows).clamp_(max=_FAR).to(torch.int32)
    lengths = _chamfer(edges.device)
    found = lengths[0].index_select(0, within.flatten()).view(edges.shape)
    for columns in range(1, min(W, int(found.max()) + 1)):
        length = lengths[columns].index_select(0, within.flatten()).view(edges.shape)
        torch.minimum(found[:, :, columns:], length[:, :, :-columns], out=found[:, :, columns:])
        torch.minimum(found[:, :, :-columns], length[:, :, columns:], out=found[:, :, :-columns])
    return found


def _equalised(layer: Tensor) -> Tensor:
    """Equalise the histogram of each int32 layer (N, H, W) of values 0 to ``_FAR``, to values 0 to 255."""
    N, H, W = layer.shape
    number = torch.arange(N, device=layer.device)[:, None, None] * (_FAR + 1)
    counts = torch.bincount((layer + number).flatten(), minlength=N * (_FAR + 1)).view(N, _FAR + 1)
    upto = counts.cumsum(1)
    fewest = torch.where(upto > 0, upto, H * W).amin(1, keepdim=True)  # as many have the smallest value
    rest = H * W - fewest
    scaled = ((upto - fewest) * (255.0 / rest.clamp(min=1))).round()
    flat = torch.arange(_FAR + 1, device=layer.device)  # a layer of one value stays as it is
    table = torch.where(rest > 0, scaled, flat).clamp_(min=0).to(torch.int32)
    return table.flatten().index_select(0, (layer + number).flatten()).view(layer.shape)
