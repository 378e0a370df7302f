"""Image files to pixels, by one function wherever files are read: training, evaluation, prediction, the service.

========================  ==========================================================================================
8 bits, 1 bit, palettes   as they are; grey becomes three equal channels
12- and 16-bit grey       scaled: 4,095 or 65,535 is white, or black where a TIFF file says so
floats                    from 0 to 1, times 255; other ranges are refused
32-bit or signed, LAB     refused: the file does not say what is white
transparent pixels        on white
CMYK, YCbCr               Pillow's conversion to RGB; colour profiles are ignored
EXIF orientation          applied
animations, pages         the first
========================  ==========================================================================================
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ensembler.errors import DataError, ShapeError
from ensembler.machine import in_threads

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "MEND",
    "MEND_OR_SKIP",
    "decode",
    "formats",
    "measure",
    "on_white",
    "pixels",
    "read_image",
    "suffixes",
    "to_rgb",
    "unreadable",
]

_SUFFIXES = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
}
_BYTES = {"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"}  # modes of Pillow without alpha, 8 bits a channel
_ALPHA = {"LA", "La", "PA", "RGBA", "RGBa"}
_SAVE = "save it with 8 or 16 bits a channel"
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT, _SIGNED = 258, 262, 339, 2  # of TIFF


MEND = "repair it, or put the original back"
"""What to do about an image that cannot be read and that is part of a run."""

MEND_OR_SKIP = "repair or remove it, or leave out all images that cannot be read (--corrupt skip)"
"""The same where images are chosen."""


@cache
def formats() -> tuple[str, ...]:
    """Return the formats that are read, by Pillow's names; WebP and AVIF only where Pillow was built with them."""
    from PIL import features

    missing = {kind.upper() for kind in ("webp", "avif") if kind not in features.modules or not features.check(kind)}
    return tuple(kind for kind in _SUFFIXES if kind not in missing)


@cache
def suffixes() -> frozenset[str]:
    """Return the suffixes of the files that are taken from a folder, in small letters."""
    return frozenset(suffix for kind in formats() for suffix in _SUFFIXES[kind])


def decode(
    file: Path | IO[bytes], shape: tuple[int, int] | None = None, max_pixels: int | None = None
) -> NDArray[np.uint8]:
    """Decode an image to (H, W, 3) as the table at the top says.

    Args:
        file: a path, or the content as a file object; its format is found from its content.
        shape: (H, W) to which it is resized, bilinearly and ignoring proportions; by default its own.
        max_pixels: the most that are decoded, by the file's header; by default Pillow's limit.

    Raises:
        ShapeError: too many pixels, or pixels whose meaning the file does not say.
        PIL.UnidentifiedImageError: not one of :func:`formats`.
        Exception: of any class where the file is damaged.
    """
    from PIL import Image

    # Not by its name: Pillow then maps some TIFF files into memory, and turns those with an orientation wrongly.
    content = file.open("rb") if isinstance(file, Path) else nullcontext(file)
    with content as readable, Image.open(readable, formats=formats()) as opened:
        _check_pixels(opened, max_pixels)
        return pixels(opened, shape)


def pixels(opened: Image, shape: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Return the pixels (H, W, 3) of one of Pillow's images, as :func:`decode` does those of a file.

    Raises:
        ShapeError: pixels whose meaning the image does not say.
        Exception: of any class where its file is damaged.
    """
    from PIL.Image import Resampling

    _scale_transparency(opened)
    opened.load()
    image = to_rgb(opened)
    if shape is not None and image.size != shape[::-1]:
        image = image.resize((shape[1], shape[0]), Resampling.BILINEAR)
    return np.array(image)


def to_rgb(image: Image) -> Image:
    """Return an image of any mode as RGB and upright, as the table at the top says.

    Raises:
        ShapeError: pixels whose meaning the image does not say.
    """
    return _upright(_rgb(image), image)


def measure(content: bytes, max_pixels: int | None = None) -> tuple[int, int]:
    """Return what decoding an image will cost, from its headers: its pixels, and in how many scans it has each.

    A progressive JPEG can have any number of scans of a few bytes, each of which is decoded over the whole image. They
    are counted by their markers: its data hold no other ``FF DA``.

    Raises:
        ShapeError: too many pixels.
        PIL.UnidentifiedImageError: not one of :func:`formats`.
        Exception: of any class where the file is damaged.
    """
    from PIL import Image

    with Image.open(io.BytesIO(content), formats=formats()) as opened:
        _check_pixels(opened, max_pixels)
        width, height = opened.size
        jpeg = opened.format in ("JPEG", "MPO") or opened.info.get("compression") == "jpeg"
    return width * height, max(1, content.count(b"\xff\xda")) if jpeg else 1


def read_image(path: Path, shape: tuple[int, int] | None = None, mend: str = MEND) -> NDArray[np.uint8]:
    """Decode one image file to (H, W, 3) by :func:`decode`, resized to ``shape`` if given.

    Raises:
        DataError: it cannot be read; ``mend`` is the last clause of the message.
    """
    from PIL import UnidentifiedImageError
    from PIL.Image import DecompressionBombError

    try:
        return decode(path, shape)
    except DecompressionBombError as error:
        raise DataError(f"the image {path} has more pixels than Pillow reads: make it smaller") from error
    except UnidentifiedImageError as error:
        reason = f"it is not of a format that is read ({', '.join(formats())})"
        raise DataError(f"cannot read the image {path}: {reason}: {mend}") from error
    except Exception as error:  # any exception: the file is untrusted
        raise DataError(f"cannot read the image {path}: {error}: {mend}") from error


def unreadable(files: Sequence[Path]) -> list[Path]:
    """Return the files that cannot be decoded, by decoding all of them in several threads."""

    def fails(i: int) -> bool:
        try:
            read_image(files[i])
        except DataError:
            return True
        return False

    return [path for path, failed in zip(files, in_threads(fails, files), strict=True) if failed]


def _check_pixels(opened: Image, max_pixels: int | None) -> None:
    width, height = opened.size
    if max_pixels is not None and width * height > max_pixels:
        raise ShapeError(f"an image of {width} x {height} pixels is more than {max_pixels} pixels: use a smaller one")


def _rgb(image: Image) -> Image:
    from PIL.Image import fromarray

    mode = image.mode
    tags = getattr(image, "tag_v2", {})  # of a TIFF file
    signed = _SIGNED in np.atleast_1d(tags.get(_SAMPLE_FORMAT, 0))
    if mode in _ALPHA or (mode in _BYTES and "transparency" in image.info):
        return _on_white(image.convert("LA") if mode == "La" else image)
    if mode in _BYTES and not signed:
        return image.convert("RGB")
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int64)
        white = 2 ** np.atleast_1d(tags.get(_BITS, 16))[0] - 1
        grey = (values * 255 + white // 2) // white
        if tags.get(_PHOTOMETRIC) == 0:  # white is zero
            grey = 255 - grey
        if "transparency" in image.info:
            grey[values == image.info["transparency"]] = 255
    elif mode == "F":
        grey = _from_floats(np.asarray(image))
    else:
        raise ShapeError(f"pixels of mode {mode}{' (signed)' * signed}, which do not say what is white: {_SAVE}")
    return fromarray(grey.astype(np.uint8)).convert("RGB")


def _scale_transparency(opened: Image) -> None:
    """Scale the transparent grey of a PNG of 2 or 4 bits to 8 bits, as Pillow scales the pixels alone."""
    kinds = [tile[3] for tile in getattr(opened, "tile", ())]
    if "transparency" in opened.info and kinds in (["L;2"], ["L;4"]):
        opened.info["transparency"] *= 85 if kinds == ["L;2"] else 17


def _from_floats(values: NDArray[Any]) -> NDArray[Any]:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # NaN is refused, too
        raise ShapeError(f"floats from {low:g} to {high:g} (mode F), not from 0 to 1: {_SAVE}")
    return np.rint(values * 255)


def _on_white(image: Image) -> Image:
    from PIL.Image import fromarray

    return fromarray(on_white(np.asarray(image.convert("RGBA"))))


def on_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return images (..., 4) of red, green, blue and opacity on white, (..., 3)."""
    wide = rgba.astype(np.uint32)
    colour, alpha = wide[..., :3], wide[..., 3:]
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _upright(image: Image, opened: Image) -> Image:
    """Turn an image as the EXIF data of the file say; damaged EXIF data say nothing."""
    from PIL import ExifTags
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        turn = turns.get(opened.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # of any class: the data are untrusted
        return image
    return image if turn is None else image.transpose(turn)
