"""Checks that arrays or nested lists are images as the graphs take them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensembler.errors import ShapeError

__all__ = ["check_floats", "check_images", "kind_of", "pixels_of", "shown"]

_RANGE = "send whole numbers from 0 to 255"


def check_images(images: object, image_shape: Sequence[int], max_batch: int | None = None) -> NDArray[np.uint8]:
    """Return images as the graphs take them.

    Args:
        images: (B, H, W, 3), integers from 0 to 255: an array, a list of arrays, or nested lists of numbers.
        image_shape: the (H, W, 3) that is expected.
        max_batch: the largest B; by default any.

    Raises:
        ShapeError: another shape, ragged lists, no image, too many, or a value that is not such an integer.
    """
    values: list[Any] | NDArray[Any]
    if np.ma.is_masked(images):
        raise ShapeError("images have masked entries, which have no value: leave them out")
    if isinstance(images, list) and not any(isinstance(image, np.ndarray) for image in images):
        values, shape = _flat(images)
    else:
        try:
            values = np.asarray(images)
        except ValueError as error:
            raise ShapeError("images differ in shape: bring them to one size") from error
        shape = values.shape
    wanted = f"expected images of shape (batch, {', '.join(map(str, image_shape))})"
    if 0 in shape:
        raise ShapeError(f"{wanted}, found {shape}: send at least one image")
    if shape == tuple(image_shape):
        raise ShapeError(f"{wanted}, found a single image: put it in a list")
    if len(shape) != 4 or shape[1:] != tuple(image_shape):
        raise ShapeError(f"{wanted}, found {shape}: send each image as rows of pixels of [red, green, blue]")
    if max_batch is not None and shape[0] > max_batch:
        raise ShapeError(f"{shape[0]} images are more than {max_batch} at a time: send several smaller requests")
    return _from_list(values, shape) if isinstance(values, list) else _from_array(values)


def pixels_of(data: object, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return the array of a shape whose values are in lists, nested or flat.

    Raises:
        ShapeError: lists of another shape, or a value that is no whole number from 0 to 255.
    """
    if not isinstance(data, list):
        raise ShapeError(f"data is {kind_of(data)}, not a list: {_RANGE}")
    values, found = _flat(data)
    if found not in (shape, (math.prod(shape),)):
        raise ShapeError(f"the data are of shape {found}, not {shape}: send as many values as the shape says")
    return _from_list(values, shape)


def check_floats(images: NDArray[np.floating], image_shape: Sequence[int]) -> NDArray[np.float32]:
    """Return images of floats from 0 to 1 as the graphs take them.

    Args:
        images: (B, H, W, 3).
        image_shape: the (H, W, 3) that is expected.

    Raises:
        ShapeError: another shape, or a value outside 0 to 1.
    """
    if images.ndim != 4 or images.shape[1:] != tuple(image_shape) or not len(images):
        expected = f"(batch, {', '.join(map(str, image_shape))})"
        raise ShapeError(f"expected images of shape {expected}, found {images.shape}")
    if not (images.min() >= 0 and images.max() <= 1):  # NaN is refused, too
        raise ShapeError("images hold floats outside 0 to 1: divide pixels by 255, or send whole numbers from 0 to 255")
    return images.astype(np.float32, copy=False)


def _flat(level: list[Any]) -> tuple[list[Any], tuple[int, ...]]:
    """Return the numbers of nested lists, in order, and the lists' shape, to six dimensions at most.

    Without loops in Python, as a body may hold millions of numbers.
    """
    shape: tuple[int, ...] = (len(level),)
    while list in (kinds := set(map(type, level))) and len(shape) < 6:
        if len(kinds) > 1:
            raise ShapeError(f"images mix lists and other values at depth {len(shape)}: send lists of equal length")
        lengths = set(map(len, level))
        if len(lengths) > 1:
            found = f"{min(lengths)} to {max(lengths)} items at depth {len(shape) + 1}"
            raise ShapeError(f"images are ragged, lists with {found}: send lists of equal length")
        shape = (*shape, *lengths)
        level = list(chain.from_iterable(level))
    return level, shape


def _from_list(values: list[Any], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    if set(map(type, values)) == {int}:  # bytes() takes booleans, too
        try:
            return np.frombuffer(bytes(values), dtype=np.uint8).reshape(shape)
        except ValueError:
            pass  # one of them is no byte: it is named below
    wrong = next(i for i, value in enumerate(values) if type(value) is not int or not 0 <= value <= 255)
    place = "".join(f"[{axis}]" for axis in np.unravel_index(wrong, shape))
    raise ShapeError(f"images{place} is {shown(values[wrong])}: {_RANGE}")


def _from_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    if array.dtype.kind not in "iu":
        raise ShapeError(f"images are of type {array.dtype}: {_RANGE}")
    if array.dtype != np.uint8 and (array.min() < 0 or array.max() > 255):
        raise ShapeError(f"images hold values from {array.min()} to {array.max()}: {_RANGE}")
    return np.ascontiguousarray(array, dtype=np.uint8)


def shown(value: object) -> str:
    """Return a caller's value for a message, shortened."""
    if isinstance(value, list | dict):
        return kind_of(value)
    text = json.dumps(value, default=repr)
    return text if len(text) <= 40 else f"{text[:37]}..."


def kind_of(value: object) -> str:
    """Return the JSON type of a value, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
