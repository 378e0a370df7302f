"""JPEG there and back on whole batches, in the integers of libjpeg.

Everything between the pixels and the bits of a file that loses anything, as libjpeg does it by default and so Pillow:
YCbCr, chroma at half the size, the integer DCT of Loeffler, Ligtenberg & Moschytz (1989), the quantisation tables of
the standard's annex K, triangular upsampling. The bits themselves lose nothing and are left out.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ensembler.eval.shift.pixels.filters import nearest, pad

__all__ = ["jpeg_compression"]

_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)


def jpeg_compression(images: Tensor, quality: int, keys: Tensor) -> Tensor:
    """Compress to JPEG at this quality and decompress; equals Pillow to the byte."""
    _, H, W, _ = images.shape
    red, green, blue = pad(images, (0, H % 2), (0, -W % 16), nearest, torch.int32).unbind(3)
    luma = (red * 19595 + green * 38470 + blue * 7471 + 2**15) >> 16
    chroma = torch.cat(
        (
            (red * -11059 + green * -21709 + blue * 2**15 + (2**23 + 2**15 - 1)) >> 16,
            (red * 2**15 + green * -27439 + blue * -5329 + (2**23 + 2**15 - 1)) >> 16,
        )
    )
    rows = chroma[:, ::2] + chroma[:, 1::2]
    alternating = torch.arange(rows.shape[2] // 2, device=images.device, dtype=torch.int32) % 2 + 1
    chroma = (rows[:, :, ::2] + rows[:, :, 1::2] + alternating) >> 2
    luma, chroma = (_coded(plane, _table(base, quality)) for plane, base in ((luma, _LUMA), (chroma, _CHROMA)))
    blueness, redness = _doubled(chroma[:, : (H + 1) // 2, : (W + 1) // 2])[:, :H, :W].sub_(128).chunk(2)
    luma = luma[:, :H, :W]
    levels = (
        luma + ((redness * 91881 + 2**15) >> 16),
        luma + ((blueness * -22554 + redness * -46802 + 2**15) >> 16),
        luma + ((blueness * 116130 + 2**15) >> 16),
    )
    return torch.stack([plane.clamp_(0, 255).to(torch.uint8) for plane in levels], 3)


@lru_cache(maxsize=20)
def _table(base: tuple[tuple[int, ...], ...], quality: int) -> Tensor:
    """Return the quantisation table (8, 8, 1) int32 at a quality from 1 to 100."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((torch.tensor(base, dtype=torch.int32) * scale + 50) // 100).clamp(1, 255)[:, :, None]


def _coded(plane: Tensor, table: Tensor) -> Tensor:
    """Quantise the DCT of a plane (N, H, W) int32, W a multiple of 8, and invert it, (N, 8 * ceil(H / 8), W)."""
    plane = pad(plane[..., None], (0, -plane.shape[1] % 8), (0, -plane.shape[2] % 8), nearest).squeeze(3)
    N, H, W = plane.shape
    blocks = plane.view(N, H // 8, 8, W // 8, 8).permute(2, 4, 0, 1, 3).reshape(8, 8, -1) - 128
    table = table.to(plane.device)
    found = _forward(_forward(blocks, 1, -2, 11), 0, 2, 15)
    divisor = table * 8
    size = (found.abs() + divisor // 2).to(torch.float32).div_(divisor)  # below 2**24, so that flooring it is exact
    found = size.to(torch.int32).mul_(found.sign()).mul_(table)
    found = _inverse(_inverse(found, 0, 11), 1, 18)
    levels = found.add_(128).clamp_(0, 255)
    return levels.view(8, 8, N, H // 8, W // 8).permute(2, 3, 0, 4, 1).reshape(N, H, W)


def _rounded(x: Tensor, bits: int) -> Tensor:
    return (x + 2 ** (bits - 1)) >> bits if bits > 0 else x << -bits


def _odd(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the rotations that the odd halves of both transforms share, in units of 2**-13."""
    shared = (a + b + c + d) * 9633
    ad, bc = (a + d) * -7373, (b + c) * -20995
    ac, bd = (a + c) * -16069 + shared, (b + d) * -3196 + shared
    return a * 2446 + ad + ac, b * 16819 + bc + bd, c * 25172 + bc + ac, d * 12299 + ad + bd


def _forward(blocks: Tensor, axis: int, even: int, bits: int) -> Tensor:
    """Transform (8, 8, M) along an axis by the DCT, shifted by ``bits``; the two sums without a factor by ``even``."""
    x = blocks.unbind(axis)
    sums, differences = [x[i] + x[7 - i] for i in range(4)], [x[i] - x[7 - i] for i in range(4)]
    outer, inner = sums[0] + sums[3], sums[1] + sums[2]
    far, near = sums[0] - sums[3], sums[1] - sums[2]
    turned = (far + near) * 4433
    seven, five, three, one = _odd(*reversed(differences))
    return torch.stack(
        [
            _rounded(outer + inner, even),
            _rounded(one, bits),
            _rounded(turned + far * 6270, bits),
            _rounded(three, bits),
            _rounded(outer - inner, even),
            _rounded(five, bits),
            _rounded(turned - near * 15137, bits),
            _rounded(seven, bits),
        ],
        axis,
    )


def _inverse(coefficients: Tensor, axis: int, bits: int) -> Tensor:
    """Invert the DCT of (8, 8, M) along an axis, shifted by ``bits``."""
    x = coefficients.unbind(axis)
    turned = (x[2] + x[6]) * 4433
    near, far = turned - x[6] * 15137, turned + x[2] * 6270
    plus, minus = (x[0] + x[4]) << 13, (x[0] - x[4]) << 13
    even = (plus + far, minus + near, minus - near, plus - far)
    odd = _odd(x[7], x[5], x[3], x[1])[::-1]
    first = [_rounded(a + b, bits) for a, b in zip(even, odd, strict=True)]
    last = [_rounded(a - b, bits) for a, b in zip(even, odd, strict=True)]
    return torch.stack(first + last[::-1], axis)


def _doubled(plane: Tensor) -> Tensor:
    """Double the rows and columns of (N, H, W), each weighing the nearest 3 to 1 with the next nearest."""
    N, H, W = plane.shape
    if W <= 2:  # libjpeg repeats pixels here
        return plane.repeat_interleave(2, 1).repeat_interleave(2, 2)
    wide = pad(plane[..., None], (1, 1), (0, 0), nearest).squeeze(3)
    rows = torch.stack((plane * 3 + wide[:, :-2], plane * 3 + wide[:, 2:]), 2).view(N, 2 * H, W)
    wide = pad(rows[..., None], (0, 0), (1, 1), nearest).squeeze(3)
    left, right = (rows * 3 + wide[:, :, :-2] + 8) >> 4, (rows * 3 + wide[:, :, 2:] + 7) >> 4
    return torch.stack((left, right), 3).view(N, 2 * H, 2 * W)
