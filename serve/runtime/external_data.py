"""Which files an ONNX graph reads its tensors from, beside its own. No onnx, which serving does not need.

A walk through the messages of protobuf's wire format (https://protobuf.dev/programming-guides/encoding) that can hold a
tensor, by the numbers of onnx.proto3. Nothing is copied but names.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from ensembler.storage.artefact import open_file

__all__ = ["external_files"]

_HOLDS = {  # message -> number of a field -> the message in it
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {},
}
_DEEPEST = 100  # as protobuf itself
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # types of the wire


def external_files(graph: Path) -> set[str]:
    """Return the names of the files, as the graph has them: relative to its folder, unless it is hostile.

    Raises:
        OSError: it cannot be read. ArtefactError: a link, a device or a pipe.
        ValueError: it is no ONNX graph.
    """
    with open_file(graph) as file:
        if not graph.stat().st_size:
            raise ValueError("it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(b"location") < 0:  # the key of every such name
                return set()
            return set(_names(content, 0, len(content), "model", 0))


def _names(content: mmap.mmap, start: int, end: int, message: str, depth: int) -> Iterator[str]:
    if depth > _DEEPEST:
        raise ValueError("it is nested too deeply")
    if message == "entry":
        entry = {number: content[first:last] for number, first, last in _fields(content, start, end)}
        if entry.get(1) == b"location":
            yield entry.get(2, b"").decode("utf-8", "backslashreplace")
        return
    for number, first, last in _fields(content, start, end):
        if number in _HOLDS[message]:
            yield from _names(content, first, last, _HOLDS[message][number], depth + 1)


def _fields(content: mmap.mmap, place: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield a message's fields of bytes: number, first byte, one past the last."""
    while place < end:
        tag, place = _varint(content, place, end)
        kind = tag & 7
        if kind == _BYTES:
            length, place = _varint(content, place, end)
            if length > end - place:
                raise ValueError("it is cut short")
            yield tag >> 3, place, place + length
            place += length
        elif kind == _VARINT:
            _, place = _varint(content, place, end)
        elif kind in (_FIXED32, _FIXED64):
            place += 4 if kind == _FIXED32 else 8
        else:
            raise ValueError("it is no message of protobuf")


def _varint(content: mmap.mmap, place: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= end:
            raise ValueError("it is cut short")
        byte = content[place]
        value |= (byte & 127) << shift
        place += 1
        if byte < 128:
            return value, place
    raise ValueError("it has a number of more than 64 bits")
