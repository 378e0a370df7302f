"""Whether a tensor holds images as they are stored, or a network's normalised inputs; anything else is refused.

Floats are ambiguous: pixels from 0 to 1, from 0 to 255, or normalised. A network takes all of them, and answers two of
the three wrongly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ensembler.errors import ShapeError

__all__ = ["check_images"]

_OVERSHOOT = 0.1  # of the pixels' range: what resampling may add to it


def check_images(x: Tensor, shape: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> bool:
    """Return True for images (B, H, W, C) uint8, False for normalised inputs (B, C, H, W) float.

    Args:
        x: to check.
        shape: the (H, W, C) that the network was trained on.
        mean, std: of each channel, in pixels from 0 to 1.

    Raises:
        ShapeError: ``x`` is neither, of another size, or holds floats that are no normalised pixels.
    """
    height, width, channels = shape
    if x.dtype == torch.uint8 and x.shape[1:] == torch.Size(shape):
        return True
    if x.is_floating_point() and x.dim() == 4 and x.shape[1:] == (channels, height, width):
        _check_normalised(x, mean, std)
        return False
    raise ShapeError(
        f"expected images (B, {height}, {width}, {channels}) uint8, or normalised inputs (B, {channels}, {height}, "
        f"{width}) float; found {tuple(x.shape)} of {str(x.dtype).removeprefix('torch.')}: {_mend(x, shape)}"
    )


def _check_normalised(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse floats that no image normalised by these statistics holds, and those that are rather pixels."""
    if not x.numel():
        return
    mend = "give the images as (B, H, W, C) uint8 from 0 to 255, or normalise by the run's own mean and std"
    low, high = x.min().item(), x.max().item()
    if low >= 0 and high <= 1:
        raise ShapeError(
            "the inputs are floats from 0 to 1, as torchvision's ToTensor makes them, not normalised ones: give "
            "(images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)"
        )
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        own, least, most = x[:, channel], -(m + _OVERSHOOT) / s, (1 - m + _OVERSHOOT) / s
        if not (least <= own.min() and own.max() <= most):  # NaN is refused, too
            raise ShapeError(
                f"the inputs hold floats from {low:g} to {high:g}, and no image of this run, normalised, has any "
                f"outside {-m / s:.3g} to {(1 - m) / s:.3g} in channel {channel}: {mend}"
            )


def _mend(x: Tensor, shape: Sequence[int]) -> str:
    """Say what to do with a tensor of another shape or type."""
    height, width, channels = shape
    if x.shape in (torch.Size(shape), (channels, height, width)):
        return "give a batch, images[None]"
    if x.dim() != 4:
        return "give a batch of images"
    if x.shape[1:] == torch.Size(shape):
        ones = x.is_floating_point() and x.numel() and x.min() >= 0 and x.max() <= 1
        return "give (images * 255).round().to(torch.uint8)" if ones else "give whole numbers from 0 to 255 as uint8"
    if x.shape[1:] == (channels, height, width):
        return "the channels are first, give images.permute(0, 2, 3, 1) as uint8"
    fits = channels in (x.shape[1], x.shape[3])
    return f"resize them to {width} x {height} pixels, as in training" if fits else f"their channels must be {channels}"
