"""What a user gives to predict: image files, Pillow's images, arrays, tensors; and whether a tensor holds images as
they are stored, or a network's normalised inputs. Anything else is refused.

Floats are ambiguous: pixels from 0 to 1, from 0 to 255, or normalised. A network takes all of them, and answers two of
the three wrongly.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ensembler.data.decoding import pixels, read_image
from ensembler.data.examples import Examples
from ensembler.data.image_arrays import refuse_holes
from ensembler.errors import ShapeError, UsageError
from ensembler.naming import reason

__all__ = ["as_tensor", "batches", "check_images"]

_KINDS = "a path, an image of Pillow, an array (H, W, 3) of uint8, or several of them in a list or as (N, H, W, 3)"

_OVERSHOOT = 0.1  # of the pixels' range: what resampling may add to it


def as_tensor(given: Any) -> Tensor:
    """Return an array of NumPy, or several in a list, as a tensor; tensors as they are.

    Memory is shared where PyTorch can read it: not of another byte order, in reverse, or that may not be written.

    Raises:
        UsageError: it is no array. ShapeError: of no numbers, or lists of different lengths.
        DataError: some of its numbers are not there (:func:`ensembler.data.image_arrays.refuse_holes`).
    """
    refuse_holes(given, "the array")
    if isinstance(given, Tensor):
        return given
    if not isinstance(given, np.ndarray | list | tuple):
        raise UsageError(f"an array or a tensor is expected here, not a {type(given).__name__}: predict takes {_KINDS}")
    try:
        array = np.asarray(given)
        odd = any(step < 0 or step % array.itemsize for step in array.strides)
        if odd or not (array.dtype.isnative and array.flags.writeable):
            array = array.astype(array.dtype.newbyteorder("="), order="C")
        return torch.from_numpy(array)
    except (TypeError, ValueError) as error:  # text, objects, dates
        raise ShapeError(f"this is no array of numbers ({reason(error)}): give uint8 or float32") from error


def batches(images: Any, shape: Sequence[int], size: int) -> Iterator[Tensor]:
    """Yield what a user gives to predict, ``size`` examples at a time, as tensors that :func:`check_images` takes.

    Files and Pillow's images are decoded as in training, and resized to ``shape``. Arrays and tensors stay as they are.

    Args:
        images: one image or several; see :meth:`ensembler.ensemble.Ensemble.predict`.
        shape: of one stored example; for images, (H, W, 3).
        size: of a batch.

    Raises:
        ShapeError: none, or images of different shapes. DataError: an image cannot be read.
        UsageError: something else.
    """
    if isinstance(images, Examples):
        yield from (part.data for part in images.batches(size))
        return
    if isinstance(images, np.ndarray | Tensor):
        whole = as_tensor(images)
        many: Any = whole[None] if whole.shape == torch.Size(shape) else whole
    else:
        many = [images] if _is_file(images) or not isinstance(images, Sequence) else images
    if not len(many):
        raise ShapeError(f"there is no image to predict: give {_KINDS}")
    for start in range(0, len(many), size):
        part = many[start : start + size]
        yield part if isinstance(part, Tensor) else _stacked(part, shape, start)


def _is_file(one: Any) -> bool:
    return isinstance(one, str | os.PathLike)


def _stacked(images: Sequence[Any], shape: Sequence[int], first: int) -> Tensor:
    """Return images of a list as one tensor; ``first`` is the number of the first of them, for messages."""
    found = [_one(image, shape, first + place) for place, image in enumerate(images)]
    kinds = list(dict.fromkeys(f"{tuple(one.shape)} {str(one.dtype).removeprefix('torch.')}" for one in found))
    if len(kinds) > 1:
        raise ShapeError(f"the images are of different kinds, {' and '.join(kinds[:2])}: give arrays of one kind")
    return torch.stack(found)


def _one(image: Any, shape: Sequence[int], number: int) -> Tensor:
    """Return one image of a list, files and Pillow's images as (H, W, 3) uint8 of ``shape``."""
    from PIL.Image import Image

    if isinstance(image, np.ndarray | Tensor):
        return as_tensor(image)
    if not _is_file(image) and not isinstance(image, Image):
        raise UsageError(f"image {number} is of type {type(image).__name__}: give {_KINDS}")
    if len(shape) != 3:
        raise UsageError(f"the run is of examples of shape {tuple(shape)}, not of images: give an array of them")
    size = shape[0], shape[1]
    if isinstance(image, Image):
        try:
            return torch.from_numpy(pixels(image, size))
        except Exception as error:  # of any class where its file is damaged
            raise ShapeError(f"image {number} cannot be read: {reason(error)}") from error
    if Path(image).is_dir():
        raise UsageError(f"{image} is a folder: give its images, such as sorted(Path({str(image)!r}).glob('*.png'))")
    return torch.from_numpy(read_image(Path(image), size, mend="give the path of an image file"))


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
