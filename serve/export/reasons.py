"""Why a network could not be exported, and the mend: one line out of an exporter's error and what caused it."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import onnx
import torch
from torch import nn

import ensembler
from ensembler.errors import first_line

__all__ = ["explained", "reason", "unfit"]

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_OPERATOR = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.:]+)', overload='(\w+)'\)>")
_LIBRARIES = tuple(str(Path(module.__path__[0])) for module in (torch, onnx, ensembler))
_OWN = str(Path(__file__).parent)
_OTHERWISE = "compute that with other operations of PyTorch"
_MENDS = {
    r"aten\.(nan)?median|aten\.mode": "take it from the values that sort() gives",
    r"aten\.adaptive_max_pool": "use max_pool2d with a kernel, or an adaptive average pool",
    r"a branch on a value": "compute both sides, and choose with torch.where",
    r"one size only": "take its size from x.shape[0], not from len(x)",
    r"nn/modules/rnn\.py|nn/utils/rnn\.py": "give recurrent layers whole batches, not packed sequences",
    r"fake tensor": "compute no gradients in its forward",
    r"attribute type": "give no layer or function a number that depends on the batch, such as groups=len(x)",
}
"""By what is said, or by where it happens."""


def explained(error: BaseException, network: nn.Module) -> str:
    """Return the reason why a network could not be exported, and the mend."""
    found = reason(error)
    if any(isinstance(layer, torch.jit.ScriptModule) for layer in network.modules()):
        return f"{found}: leave out torch.jit.script, which its layers need not"
    files = " ".join(frame.f_code.co_filename for frame, _ in traceback.walk_tb(list(_chain(error))[-1].__traceback__))
    fitting = (mend for pattern, mend in _MENDS.items() if re.search(pattern, f"{found} {files}"))
    return f"{found}: {next(fitting, _OTHERWISE)}"


def unfit(error: BaseException) -> str:
    """Return why ONNX Runtime cannot run a network's graph, and the mend.

    Args:
        error: of this package, raised from ONNX Runtime's; or that itself.
    """
    cause = first_line(error.__cause__ or error)
    mend = "leave out autocast in its forward, for --precision sets it" if "float16" in cause else _OTHERWISE
    return f"ONNX Runtime cannot run this network ({cause}): {mend}"


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
    return f"{type(error).__name__}: {first_line(error).rstrip('.: ')}" if text else type(error).__name__


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
