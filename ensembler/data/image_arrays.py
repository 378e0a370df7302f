"""Images and labels that are objects in memory, brought to the package's own: uint8 (N, H, W, 3), int64 from 0.

=====================  =============================================================================================
PIL images             as files are (:mod:`ensembler.data.decoding`): palettes, 16 bits, transparency, EXIF orientation
NumPy arrays, tensors  (H, W), or with 1, 3 or 4 channels, which are first or last; grey becomes three equal channels
uint8, other integers  pixels from 0 to 255
floats                 pixels from 0 to 1, rounded to 8 bits; those of another range are refused
four channels          red, green, blue and opacity, on white
=====================  =============================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ensembler.data.decoding import on_white, to_rgb
from ensembler.errors import DataError, first_line

__all__ = ["is_array", "refuse_holes", "resize", "to_array", "to_image", "to_images", "to_label", "to_labels"]

Pixels = NDArray[np.uint8]

_CHANNELS = (1, 3, 4)
_CHUNK = 1024  # images that are converted at once
_MOST_CLASSES = 2**24  # beyond which a label is a number of something else, or -1 in unsigned integers


def is_array(given: Any) -> bool:
    """Return whether an object is a tensor or a NumPy array."""
    return isinstance(given, torch.Tensor | np.ndarray)


def refuse_holes(given: Any, where: str) -> None:
    """Refuse arrays and tensors some of whose numbers are not there, or not in memory one beside another.

    Raises:
        DataError: a masked array, or a tensor that is sparse, nested, quantized or on the device ``meta``.
    """
    if isinstance(given, np.ma.MaskedArray) and np.ma.is_masked(given):
        raise DataError(
            f"{where}: {int(np.ma.getmaskarray(given).sum()):,} masked entries, which have no value: leave them out"
        )
    if isinstance(given, torch.Tensor):
        if given.is_meta:
            raise DataError(f"{where}: a tensor on the device meta, which holds no numbers: make it on the CPU")
        if given.layout != torch.strided or given.is_nested or given.is_quantized:
            raise DataError(f"{where}: a sparse, nested or quantized tensor: give a dense one of plain numbers")


def to_array(given: Any, where: str) -> NDArray[Any]:
    """Return a tensor on any device, an array, or numbers in lists as a NumPy array; ``where`` is for messages.

    Raises:
        DataError: see :func:`refuse_holes`.
    """
    refuse_holes(given, where)
    if isinstance(given, torch.Tensor):
        tensor = given.detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return np.asarray(given)


def to_image(image: Any, where: str, size: int | None = None) -> Pixels:
    """Return one PIL image, array or tensor as (H, W, 3), resized to ``size`` x ``size`` if given.

    Args:
        image: see the table at the top.
        where: what it is, for the message.
        size: pixels a side; proportions are ignored.

    Raises:
        DataError: it is no image, or what its numbers mean is not clear.
    """
    from PIL.Image import Image

    if isinstance(image, Image):
        try:
            pixels = np.array(to_rgb(image))
        except Exception as error:  # of any class: the file behind it may be damaged
            raise DataError(f"{where}: {error}") from error
    elif is_array(image):
        pixels = to_images(to_array(image, where)[None], where)[0]
    else:
        raise DataError(f"{where} is a {type(image).__name__}, expected a PIL image, an array or a tensor")
    return pixels if size is None else resize(pixels, size)


def resize(image: Pixels, size: int) -> Pixels:
    """Return an image (H, W, 3) resized to ``size`` x ``size`` as files are, bilinearly and ignoring proportions."""
    from PIL.Image import Resampling, fromarray

    if image.shape[:2] == (size, size):
        return image
    return np.array(fromarray(image).resize((size, size), Resampling.BILINEAR))


def to_images(images: NDArray[Any], where: str) -> Pixels:
    """Return images (N, H, W), (N, H, W, C) or (N, C, H, W), with 1, 3 or 4 channels, as (N, H, W, 3).

    Raises:
        DataError: another shape, or numbers that are no pixels.
    """
    axis = _channel_axis(images.shape, where)
    scaled = _is_scaled(images, where)
    found = np.empty((len(images), *_size(images.shape, axis), 3), np.uint8)
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK]
        pixels = (np.rint(chunk * 255) if scaled else chunk).astype(np.uint8)
        pixels = pixels[..., None] if axis is None else np.moveaxis(pixels, axis, -1)
        found[start : start + _CHUNK] = on_white(pixels) if pixels.shape[-1] == 4 else pixels
    return found


def _channel_axis(shape: Sequence[int], where: str) -> int | None:
    """Return which axis of (N, ...) holds the channels; ``None`` for (N, H, W).

    Raises:
        DataError: none, or either could.
    """
    shown = f"{where}: {' x '.join(map(str, shape[1:])) or 'single numbers'}"
    if 0 in shape[1:]:
        raise DataError(f"{shown}, which holds no pixel: give images of at least one")
    if len(shape) == 3:
        return None
    if len(shape) != 4:
        raise DataError(f"{shown}, expected (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels")
    first, last = shape[1] in _CHANNELS, shape[3] in _CHANNELS
    if first and last:
        raise DataError(f"{shown}, of which the first or the last number could be the channels: give larger images")
    if not (first or last):
        raise DataError(f"{shown}, where neither the first nor the last number is 1, 3 or 4 channels: give those")
    return 1 if first else 3


def _size(shape: Sequence[int], axis: int | None) -> tuple[int, int]:
    height, width = (length for number, length in enumerate(shape) if number not in (0, axis))
    return height, width


def _is_scaled(images: NDArray[Any], where: str) -> bool:
    """Return whether pixels are floats from 0 to 1, not integers from 0 to 255.

    Raises:
        DataError: neither.
    """
    kind = images.dtype.kind
    if kind not in "iuf":
        mend = "give (images * 255).astype('uint8')" if kind == "b" else "give uint8 from 0 to 255"
        raise DataError(f"{where}: {images.dtype}, not pixels: {mend}")
    low, high = (float(images.min()), float(images.max())) if images.size else (0.0, 0.0)
    most = 1 if kind == "f" else 255
    if low >= 0 and high <= most:  # NaN is neither
        return kind == "f"
    if not np.isfinite([low, high]).all():
        raise DataError(f"{where}: numbers that are not finite (NaN or infinite): leave the image out, or repair it")
    if kind == "f" and low >= 0 and high <= 255:
        mend = "if they are pixels from 0 to 255, give them as uint8"
    elif kind == "f":
        mend = "leave out Normalize, as the package normalises images itself"
    else:
        mend = "scale them, and give uint8"
    raise DataError(f"{where}: numbers from {low:g} to {high:g}, not pixels from 0 to {most}: {mend}")


def to_label(label: Any, where: str) -> int:
    """Return one class as a whole number from 0.

    Raises:
        DataError: it is no such number.
    """
    return int(to_labels([label] if not is_array(label) else to_array(label, where)[None], where)[0])


def to_labels(labels: Any, where: str) -> NDArray[np.int64]:
    """Return labels (N,) or (N, 1) as int64.

    Raises:
        DataError: they are not whole numbers from 0.
    """
    try:
        found = to_array(labels, where)
    except DataError:
        raise
    except Exception as error:  # of any class, as of lists of different lengths
        raise DataError(f"{where}: no labels, expected one class each, from 0: {first_line(error)}") from error
    if found.ndim == 2 and found.shape[1] > 1:
        raise DataError(
            f"{where}: labels of {found.shape[1]} numbers, expected one class each, from 0: if they are one-hot, give "
            "their argmax"
        )
    if found.ndim not in (1, 2):
        raise DataError(f"{where}: labels of shape {found.shape}, expected (N,), one class each")
    found = found.reshape(-1)
    if found.dtype.kind not in "iu":
        what = {"f": "floats", "b": "true or false", "U": "text", "S": "bytes"}.get(found.dtype.kind, "no numbers")
        shown = f", such as {found[0]!s}" if len(found) and found.dtype.kind in "fUS" else ""
        mend = {"f": "give labels.astype('int64')", "b": "give labels.astype('int64')"}.get(
            found.dtype.kind, "give classes.index(label), and the names as classes"
        )
        raise DataError(f"{where}: labels that are {what}{shown}, expected whole numbers from 0: {mend}")
    if len(found) and not 0 <= (wrong := found.min() if found.min() < 0 else found.max()) < _MOST_CLASSES:
        raise DataError(
            f"{where}: the label {wrong}, and classes count from 0: leave out images without a class, or renumber the "
            "labels"
        )
    return found.astype(np.int64)
