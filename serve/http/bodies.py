"""What a request's head says: whether it can be read, and of which kind its body is.

A body's ``Content-Type`` says how it is read. Where that says nothing, as curl's and urllib's defaults do, its first
bytes do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from ensembler.errors import ShapeError, UsageError
from ensembler.serve.runtime.images import shown

__all__ = ["MAX_HEAD", "TYPES", "HeadError", "Kind", "MediaTypeError", "check_head", "check_type", "kind_of_body"]

Kind = Literal["json", "npy", "raw", "image", "form"]
"""JSON; the content of a ``.npy`` file; bytes of pixels, whose shape ``X-Shape`` gives; an image file; a form."""

MAX_HEAD = 64 * 1024  # bytes of the path, the query and all headers

TYPES = ("application/json", "application/x-npy", "application/octet-stream", "image/*", "multipart/form-data")
"""Media types of the bodies that are read."""

_SILENT = {
    "",
    "*/*",
    "application/octet-stream",
    "binary/octet-stream",
    "application/x-www-form-urlencoded",  # what curl -d, urllib and others call a body whose type nobody gave
    "text/plain",
}
_ONCE = {b"content-type", b"content-encoding", b"x-shape", b"x-deadline-ms", b"inference-header-content-length"}
_NPY = b"\x93NUMPY"

Headers = Iterable[tuple[bytes, bytes]]


class HeadError(UsageError):
    """A head that is too large (431), or with a header twice that is read once (400)."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class MediaTypeError(ShapeError):
    """A body of a type that is not read; answered 415."""

    status = 415


def check_head(path: str, query: bytes, headers: Headers) -> None:
    """Check a request's head.

    Raises:
        HeadError: more than :data:`MAX_HEAD` bytes, or two values of a header that has one.
    """
    size, seen = len(path) + len(query), set()
    for name, value in headers:
        size += len(name) + len(value)
        if name in _ONCE and name in seen:
            raise HeadError(f"the header {name.decode().title()} was sent twice: send it once")
        seen.add(name)
    if size > MAX_HEAD:
        raise HeadError(
            f"the head of the request has {size} bytes, more than {MAX_HEAD}: send fewer and shorter headers", 431
        )


def check_type(headers: Mapping[bytes, bytes]) -> None:
    """Check that bodies of a request's ``Content-Type`` and ``Content-Encoding`` are read.

    Raises:
        MediaTypeError: they are not.
    """
    named = _media_type(headers.get(b"content-type", b"").decode("latin-1"))
    if not headers.get(b"content-type", b"").isascii() or not (named in _SILENT or _kind_named(named)):
        raise MediaTypeError(f"bodies of this Content-Type are not read: send {', '.join(TYPES)}")
    if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"):
        raise MediaTypeError("compressed bodies are not read: send it without Content-Encoding")


def kind_of_body(content_type: str, shape: str | None, body: bytes) -> Kind:
    """Return how to read a body.

    Args:
        content_type: the request's, one that :func:`check_type` let pass.
        shape: of its ``X-Shape``; ``None`` without one.
        body: its content.

    Raises:
        ShapeError: an empty body, or pixels with a ``Content-Type`` of another kind.
    """
    named = _kind_named(_media_type(content_type))
    if shape is not None:
        if named is not None:
            kind = shown(_media_type(content_type))
            raise ShapeError(f"X-Shape is of raw pixels, not of {kind}: leave it out, or send application/octet-stream")
        return "raw"
    if named is not None:
        return named
    start = body.lstrip(b" \t\r\n")[:6] if body[:1].isspace() else body[:6]
    if not start:
        raise ShapeError('the body is empty: send {"images": [...]}, a .npy file, or an image file')
    if start == _NPY:
        return "npy"
    return "json" if start.removeprefix(b"\xef\xbb\xbf")[:1] in (b"{", b"[") else "image"


def _media_type(content_type: str) -> str:
    return content_type.split(";", maxsplit=1)[0].strip().lower()


def _kind_named(media_type: str) -> Kind | None:
    """The kind that a media type names."""
    if media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json")):
        return "json"
    if media_type == "application/x-npy":
        return "npy"
    if media_type == "multipart/form-data":
        return "form"
    return "image" if media_type.startswith("image/") else None
