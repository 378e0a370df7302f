"""Readers of request bodies: ``.npy``, raw bytes, image files and forms, or an error of one sentence.

Bodies are untrusted: nothing is unpickled, no address is fetched, and every size is checked before it is used.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ensembler.data.decoding import decode, formats
from ensembler.errors import ShapeError
from ensembler.serve.http.bodies import MediaTypeError
from ensembler.serve.runtime.images import shown

if TYPE_CHECKING:
    from starlette.requests import Request

__all__ = [
    "MAX_PIXELS",
    "form_of",
    "image_from_file",
    "images_from_npy",
    "images_from_raw",
    "refused_files",
]

MAX_PIXELS = 25_000_000

_NPY = "send what numpy.save writes of a uint8 array (batch, H, W, 3), or raw bytes and their X-Shape"
_NPY_HEADER = 10_000  # bytes; numpy's own limit
_PLAIN_HEADER = re.compile(  # each name once, and numbers in digits: NumPy reads what it would not write
    rb"\x93NUMPY.+?\{(\s*['\"](descr|fortran_order|shape)['\"]\s*:\s*"
    rb"(['\"][^'\"]*['\"]|True|False|\([0-9L, ]*\)),?){3}\s*\}\s*",
    re.DOTALL,
)
_MOST_DIMENSIONS = 6
_MOST_FIELDS = 32  # text fields of a form


def images_from_npy(body: bytes) -> NDArray[Any]:
    """Return the array of a ``.npy`` file, a view of its bytes, unchecked.

    Raises:
        MediaTypeError: a pickle, an archive, or an array of Python objects, which is a pickle inside.
        ShapeError: not such a file, or its header gives another number of bytes than follow it.
    """
    for start, kind in ((b"\x80", "a pickle"), (b"PK", "an archive")):
        if body.startswith(start):
            raise MediaTypeError(f"the body is {kind}: {_NPY}")
    file = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file, max_header_size=_NPY_HEADER)
    except Exception as error:  # its parser raises errors of any class
        raise ShapeError(f"the body is not a .npy file that can be read: {_NPY}") from error
    if dtype.hasobject:
        raise MediaTypeError(f"the .npy file holds Python objects, which would have to be unpickled: {_NPY}")
    if len(shape) > _MOST_DIMENSIONS or any(type(size) is not int for size in shape):
        raise ShapeError(f"the .npy file's shape is not that of images: {_NPY}")
    if dtype.kind not in "iu":
        raise ShapeError(f"the .npy file is of type {shown(str(dtype))}: {_NPY}")
    if not _PLAIN_HEADER.fullmatch(body[: file.tell()]):
        raise ShapeError(f"the .npy file's header is not one that NumPy writes: {_NPY}")
    pixels = _pixels(memoryview(body)[file.tell() :], tuple(shape), dtype)
    return pixels.reshape(shape, order="F" if fortran else "C")


def images_from_raw(body: bytes, shape: str) -> NDArray[Any]:
    """Return raw bytes as an array of the shape in a ``X-Shape`` header such as ``"2,32,32,3"``, unchecked.

    Raises:
        ShapeError: not a shape, or one of another number of bytes.
    """
    sizes = [size.strip() for size in shape.split(",")]
    whole = all(size.isascii() and size.isdecimal() and len(size) <= 9 for size in sizes)
    if not whole or len(sizes) > _MOST_DIMENSIONS:
        raise ShapeError(f"X-Shape is {shown(shape)}: send whole numbers between commas, such as 2,32,32,3")
    dimensions = tuple(map(int, sizes))
    return _pixels(memoryview(body), dimensions, np.dtype(np.uint8)).reshape(dimensions)


def _pixels(content: memoryview, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    promised = dtype.itemsize * math.prod(shape)
    if min(shape, default=0) < 0 or promised != len(content):
        found, needed = f"{len(content)} bytes of pixels", f"their shape {_size(shape)} needs {_digits(promised)}"
        raise ShapeError(f"{found}, but {needed}: {_NPY}")
    if not promised:
        raise ShapeError(f"the shape {_size(shape)} has no pixels: send at least one image")
    return np.frombuffer(content, dtype=dtype)


def image_from_file(body: bytes, image_shape: Sequence[int], max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode an image file to (H, W, 3), as training does (:func:`ensembler.data.decoding.decode`).

    Args:
        body: the file's content.
        image_shape: the (H, W, 3) of the result.
        max_pixels: the most that are decoded, by the file's header.

    Raises:
        MediaTypeError: a format that is not read.
        ShapeError: it cannot be decoded, has too many pixels, or pixels whose meaning the file does not say.
    """
    with refused_files(max_pixels):
        return decode(io.BytesIO(body), (image_shape[0], image_shape[1]), max_pixels)


@contextmanager
def refused_files(max_pixels: int) -> Iterator[None]:
    """Turn what Pillow raises of an image file into a sentence, as :func:`image_from_file` says."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except (ShapeError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise MediaTypeError(f"the image is of no format that is read: send {' or '.join(formats())}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ShapeError(f"an image of more than {max_pixels} pixels: send a smaller one") from error
    except Exception as error:  # of any class: the file is untrusted
        raise ShapeError("the image cannot be decoded: send a whole image file") from error


async def form_of(request: Request, most: int) -> tuple[list[bytes], list[tuple[str, str]]]:
    """Return the files of a form, and its text fields, which are options.

    Raises:
        ShapeError: a form without files, with more than ``most``, or malformed.
    """
    files, fields = [], []
    try:
        async with request.form(max_files=most, max_fields=_MOST_FIELDS) as form:
            for name, part in form.multi_items():
                if isinstance(part, str):
                    fields.append((name, part))
                else:
                    files.append(await part.read())
    except Exception as error:  # its parser raises errors of any class
        raise ShapeError(f"the form cannot be read: send image files, {most} at most, and options") from error
    if not files:
        raise ShapeError("the form holds no file: send at least one image")
    return files, fields


def _size(shape: Sequence[int]) -> str:
    return f"({', '.join(_digits(size) for size in shape[:6])}{', ...' if len(shape) > 6 else ''})"


def _digits(number: int) -> str:
    return str(number) if abs(number) < 10**15 else "more than 10^15"
