"""JSON bodies: ``{"images": [...], ...}``, each image as rows of pixels or as a file in base64.

A body is untrusted. Its size, depth and number of lists are bounded before it is parsed, as lists take forty times
their text in memory.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ensembler.errors import EnsemblerError, ShapeError, UsageError
from ensembler.serve.runtime.images import kind_of, shown

__all__ = ["MAX_DEPTH", "Limits", "Question", "TooLargeError", "file_of", "parse", "read_question"]

MAX_DEPTH = 16

_FORM = 'send {"images": [...]}'
_STRING = re.compile(rb'"[^"]*"?')  # without escapes
_ALL_ELSE = bytes(set(range(256)) - set(b"[]{}:"))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_SPACE = re.compile(r"[ \t\r\n]+")


class TooLargeError(EnsemblerError):
    """A body of more bytes or values than are read; answered 413."""

    status = 413


@dataclass(frozen=True)
class Question:
    """A body's content.

    Attributes:
        images: nested lists, unchecked; ``None`` where files were sent.
        files: contents of image files; ``None`` where pixels were sent.
        options: the other fields.
    """

    images: list[Any] | None
    files: list[bytes] | None
    options: dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """What a JSON body may hold: bytes; lists and objects; names of values in objects."""

    bytes: int
    lists: int
    names: int

    @classmethod
    def of(cls, most_bytes: int, images: int, image_shape: Sequence[int]) -> Limits:
        """Return limits that a number of images keeps, sent as rows of pixels or as files, with some to spare."""
        height, width, _ = image_shape
        return cls(most_bytes, images * (1 + height * (1 + width)) + 1000, 4 * images + 1000)


def parse(body: bytes, limits: Limits) -> Any:
    """Parse JSON within limits.

    Raises:
        TooLargeError: more than they allow.
        ShapeError: no JSON, deeper than :data:`MAX_DEPTH`, an object with a name twice, or half of a character.
    """
    if len(body) > limits.bytes:
        raise TooLargeError(
            f"{len(body)} bytes of JSON are more than {limits.bytes}: send fewer images, a .npy file, or image files"
        )
    _check_punctuation(body, limits)
    try:
        content = json.loads(body.decode("utf-8-sig"), object_pairs_hook=_unique)
        if _SURROGATE.search(body):
            json.dumps(content, ensure_ascii=False).encode()
        return content
    except UnicodeEncodeError as error:
        raise ShapeError("the body has half of a character, \\uD800 to \\uDFFF alone: send whole characters") from error
    except json.JSONDecodeError as error:
        where = f"{error.msg} in line {error.lineno}, column {error.colno}"
        raise ShapeError(f"the body is not JSON ({where}): {_FORM}") from error
    except ShapeError:
        raise
    except (ValueError, RecursionError) as error:
        raise ShapeError(f"the body is not JSON that can be read: {_FORM}") from error


def read_question(content: Any) -> Question:
    """Read a parsed body.

    ``images`` are also called ``instances``, with the options in ``parameters``, as the clients of KServe, Vertex AI
    and TensorFlow Serving send them.

    Raises:
        ShapeError: no object whose images are a list, or files that are no base64.
        UsageError: an option twice.
    """
    if not isinstance(content, dict):
        raise ShapeError(f"the body is {kind_of(content)}, not an object: {_FORM}")
    fields = dict(content)
    names = [name for name in ("images", "instances") if name in fields]
    if not names:
        raise ShapeError(f"the body has no field 'images': {_FORM}")
    if len(names) > 1:
        raise ShapeError("'instances' is another name of 'images': send one of them")
    images = fields.pop(names[0])
    if not isinstance(images, list):
        raise ShapeError(f"'{names[0]}' is {kind_of(images)}, not a list: {_FORM}")
    parameters = fields.pop("parameters", None)
    if parameters is not None and not isinstance(parameters, dict):
        raise UsageError(f"'parameters' is {kind_of(parameters)}, not an object: send options in it, or beside images")
    if twice := fields.keys() & (parameters or {}):
        raise UsageError(f"{shown(min(twice))} was sent twice, beside the images and in parameters: send it once")
    options = fields | (parameters or {})
    if not any(isinstance(image, str | dict) for image in images):
        return Question(images, None, options)
    return Question(None, [file_of(image, f"{names[0]}[{place}]") for place, image in enumerate(images)], options)


def file_of(image: Any, where: str) -> bytes:
    """Return the bytes of an image file: base64, alone or as the one value of an object, such as ``{"b64": ...}``.

    Raises:
        ShapeError: it is no base64; ``where`` says where it was sent.
    """
    content = image
    while isinstance(content, dict) and len(content) == 1:
        (content,) = content.values()
    if not isinstance(content, str):
        raise ShapeError(f"{where} is {kind_of(image)} without base64: send all images as base64, or all as pixels")
    text = _SPACE.sub("", content)
    if text.startswith("data:"):
        text = text.partition(",")[2]
    text = text.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (ValueError, binascii.Error) as error:
        raise ShapeError(f"{where} is no base64: send an image file's bytes in base64") from error


def _check_punctuation(body: bytes, limits: Limits) -> None:
    """Check number and depth by the brackets and colons outside strings, before anything is parsed."""
    unescaped = body.replace(rb"\\", b"").replace(rb"\"", b"")
    marks = _STRING.sub(b"", unescaped).translate(None, _ALL_ELSE)
    brackets = np.frombuffer(marks.replace(b":", b""), dtype=np.uint8)
    opening = brackets & 2 > 0  # of [ and {, not of ] and }
    if np.count_nonzero(opening) > limits.lists:
        raise TooLargeError(f"the body has more than {limits.lists} lists and objects: send fewer images at a time")
    if marks.count(b":") > limits.names:
        raise TooLargeError(f"the body has more than {limits.names} names of values: send fewer images at a time")
    depth = np.cumsum(np.where(opening, 1, -1), dtype=np.int32)
    if depth.max(initial=0) > MAX_DEPTH:
        raise ShapeError(f"the body is nested more than {MAX_DEPTH} lists deep: {_FORM}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ShapeError(f"the body has {shown(twice)} twice in one object: send it once")
    return content
