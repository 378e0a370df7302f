"""Spatter: drops of water that glint, or splashes of mud.

The water's glint follows OpenCV 4's algorithms step by step on whole batches, in integers where OpenCV computes in
integers: Canny's edges, distances of a 5 x 5 chamfer, box filters, and the equalising of a histogram.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ensembler.eval.shift.pixels.filters import (
    Border,
    gaussian_taps,
    mirror,
    nearest,
    pad,
    planes,
    separable,
    to_bytes,
)
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
    drops = to_bytes(liquid.mul_(liquid >= threshold).mul_(255)).permute(1, 2, 0).contiguous()
    height = _glint(drops.to(torch.int16)).to(torch.int32).mul_(drops)
    largest = height.amax((0, 1)).clamp_(min=1)
    water = (height.to(torch.float32) / largest).mul_(strength).permute(2, 0, 1)[:, None]
    return to_bytes(levels.add_(water * levels.new_tensor(_WATER).view(3, 1, 1))).permute(0, 2, 3, 1)


# Below, images are last, (H, W, N): then neighbours lie side by side in memory for all images.


def _around(layer: Tensor, rows: int, columns: int) -> Tensor:
    """Shift a layer (H + 2, W + 2, N) by (rows, columns) and cut its rim, (H, W, N)."""
    H, W = layer.shape[0] - 2, layer.shape[1] - 2
    return layer[1 + rows :][:H, 1 + columns :][:, :W]


def _rimmed(layer: Tensor, border: Border) -> Tensor:
    return pad(layer[None], (1, 1), (1, 1), border)[0]


def _box(layer: Tensor) -> Tensor:
    """Sum the 3 x 3 pixels around each, (H, W, N), by columns first; the border is mirrored."""
    wide = _rimmed(layer, mirror)
    tall = wide[:-2] + wide[1:-1]
    tall += wide[2:]
    total = tall[:, :-2] + tall[:, 1:-1]
    total += tall[:, 2:]
    return total


def _lit(layer: Tensor) -> Tensor:
    """Correlate int16 (H, W, N) with the kernel of a light; the border is mirrored."""
    wide = _rimmed(layer, mirror)
    total = _around(wide, 1, 1) - _around(wide, -1, -1)
    total *= 2
    for rows, columns in ((0, 0), (0, 1), (1, 0)):
        total += _around(wide, rows, columns)
    for rows, columns in ((0, -1), (-1, 0)):
        total -= _around(wide, rows, columns)
    return total


def _glint(drops: Tensor) -> Tensor:
    """Light the slopes of the distance from the drops' edges, int16 (H, W, N), 0 to 255."""
    smooth = to_bytes(_box(_distance(_edges(drops))).mul_(1 / 9)).to(torch.int32)
    lit = _lit(_equalised(smooth)).clamp_(0, 255)
    return _box(lit).mul_(2).add_(9).floor_divide_(18)  # a mean of nine, to the nearest


def _sobel(layer: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slopes to the right and down of int16 (H, W, N); border pixels are repeated."""
    wide = _rimmed(layer, nearest)
    tall = wide[:-2] + wide[2:]
    tall.add_(wide[1:-1]).add_(wide[1:-1])
    long = wide[:, :-2] + wide[:, 2:]
    long.add_(wide[:, 1:-1]).add_(wide[:, 1:-1])
    return tall[:, 2:] - tall[:, :-2], long[2:] - long[:-2]


def _edges(drops: Tensor, low: int = 50, high: int = 150) -> Tensor:
    """Find Canny's edges (1986) of int16 layers (H, W, N), as a mask."""
    right, down = _sobel(drops)
    x, y = right.abs(), down.abs()
    slope = x + y
    wide = torch.nn.functional.pad(slope, (0, 0, 1, 1, 1, 1))
    x, y = x.to(torch.int32), y.to(torch.int32)

    def ridge(rows: int, columns: int) -> Tensor:
        return slope > _around(wide, -rows, -columns)

    def ridge_or_plateau(rows: int, columns: int) -> Tensor:
        return slope >= _around(wide, rows, columns)

    # Directions are told apart at 22.5 and 67.5 degrees, in units of 2**-15.
    steep = (y << 15) > x * (13573 + (2 << 15))
    flat = (y << 15) < x * 13573
    falling = ridge(1, 1) & (slope > _around(wide, 1, 1))
    rising = ridge(1, -1) & (slope > _around(wide, 1, -1))
    rises = (right ^ down) < 0
    # Sums of masks: torch.where takes ten times as long on them.
    candidate = (flat & ridge(0, 1) & ridge_or_plateau(0, 1)) | (steep & ridge(1, 0) & ridge_or_plateau(1, 0))
    candidate |= ~(flat | steep) & ((rises & rising) | (~rises & falling))
    candidate &= slope > low
    edges = candidate & (slope > high)
    while True:  # what touches an edge and could be one, is one
        grown = edges.clone()
        for axis in (0, 1):
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
    """Compute the chamfer distance (Borgefors 1986) to the nearest edge, at most ``_FAR``, (H, W, N) float32.

    First to the nearest edge in the same column; whatever the other columns, only their nearest edge in a column can
    be the nearest of all.
    """
    H, W, _ = edges.shape
    within = edges.logical_not().to(torch.uint8).mul_(_FAR)
    for rows in (1, 2, 4, 8, 16)[: (H - 1).bit_length()]:
        near = within.clone()
        torch.minimum(near[rows:], within[:-rows] + rows, out=near[rows:])
        torch.minimum(near[:-rows], within[rows:] + rows, out=near[:-rows])
        within = near
    places, lengths = within.to(torch.int32).flatten(), _chamfer(edges.device)
    found = lengths[0].index_select(0, places).view(edges.shape)
    length = torch.empty_like(found)
    some = edges.any(0).any(0)  # without an edge, every pixel stays at the largest distance
    for columns in range(1, W):
        if not (found.amax((0, 1))[some] > columns).any():
            break
        torch.index_select(lengths[columns], 0, places, out=length.view(-1))
        torch.minimum(found[:, columns:], length[:, :-columns], out=found[:, columns:])
        torch.minimum(found[:, :-columns], length[:, columns:], out=found[:, :-columns])
    return found


def _equalised(layer: Tensor) -> Tensor:
    """Equalise the histogram of each int32 layer (H, W, N) of values 0 to ``_FAR``, to int16 values 0 to 255."""
    H, W, N = layer.shape
    bins = (layer * N).add_(torch.arange(N, dtype=torch.int32, device=layer.device)).flatten()
    upto = torch.bincount(bins, minlength=(_FAR + 1) * N).view(_FAR + 1, N).cumsum(0)
    fewest = torch.where(upto > 0, upto, H * W).amin(0)  # as many have the smallest value
    rest = H * W - fewest
    scaled = ((upto - fewest) * (255.0 / rest.clamp(min=1))).round()
    flat = torch.arange(_FAR + 1, device=layer.device)[:, None]  # a layer of one value stays as it is
    table = torch.where(rest > 0, scaled, flat).clamp_(min=0).to(torch.int16)
    return table.flatten().index_select(0, bins).view(layer.shape)
