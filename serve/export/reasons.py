"""Why PyTorch could not export a network: one line out of an exporter's error and what caused it."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import onnx
import torch

import ensembler

__all__ = ["reason"]

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_OPERATOR = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.:]+)', overload='(\w+)'\)>")
_LIBRARIES = tuple(str(Path(module.__path__[0])) for module in (torch, onnx, ensembler))
_OWN = str(Path(__file__).parent)


def reason(error: BaseException) -> str:
    """Return the reason in one line: the operator, or the line of the network's code, that stopped the exporter."""
    errors = list(_chain(error))
    for each in errors:
        if found := _OPERATOR.search(str(each)):
            operator, overload = found.groups()
            return f"no ONNX function for {operator}{'' if overload == 'default' else f'.{overload}'}"
    place = next((line for each in reversed(errors) if (line := _line(each.__traceback__))), None)
    return _sentence(errors[-1]) + (f" ({place})" if place else "")


def _sentence(error: BaseException) -> str:
    text = _COLOUR.sub("", str(error)).strip()
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        return "a branch on a value of the images"
    if "Constraints violated" in text or "ConstraintViolation" in type(error).__name__:
        return "it takes batches of one size only"
    first = text.partition("\n")[0].rstrip(".: ")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what caused it, the innermost last."""
    following: BaseException | None = error
    while following is not None:
        yield following
        following = following.__cause__


def _line(found: TracebackType | None) -> str | None:
    """Return the last line of code that is neither PyTorch's nor this package's, as ``FILE:LINE``."""
    frames = [(frame.f_code.co_filename, number) for frame, number in traceback.walk_tb(found)]
    own = [
        (Path(file).name, number)
        for file, number in frames
        if Path(file).is_file() and not file.startswith((*_LIBRARIES, _OWN))
    ]
    return f"{own[-1][0]}:{own[-1][1]}" if own else None
