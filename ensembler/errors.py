"""The exceptions of ensembler.

::

    EnsemblerError
    ├── UsageError           an invalid argument or option
    ├── ShapeError           an array of the wrong shape, type or range
    ├── DataError            a dataset that is missing, malformed or not the expected one
    ├── ArtefactError        a run or bundle that is missing, unreadable or of another format
    │   └── CorruptError     a file of a run or bundle whose content has changed
    ├── DivergedError        a loss or weight that is not finite
    ├── EngineError          Ray cannot be reached, or lost a job
    ├── GroupError           another process of a distributed training has ended
    └── ExportError          an exported member that does not match its PyTorch original

The service adds its own, each with an HTTP status: see ``ensembler.serve``.

A message says what is wrong, where, and how to fix it. The command line prints it on one line without a traceback.
"""

from __future__ import annotations

__all__ = [
    "ArtefactError",
    "CorruptError",
    "DataError",
    "DivergedError",
    "EngineError",
    "EnsemblerError",
    "ExportError",
    "GroupError",
    "ShapeError",
    "UsageError",
    "first_line",
]

_LONGEST = 300  # characters of another library's message


class EnsemblerError(Exception):
    """Base class of all exceptions of ensembler."""


class UsageError(EnsemblerError, ValueError):
    """An invalid argument or option."""


class ShapeError(EnsemblerError, ValueError):
    """An array of the wrong shape, type or range."""


class DataError(EnsemblerError):
    """A dataset that is missing, malformed or not the expected one."""


class ArtefactError(EnsemblerError):
    """A run or bundle that is missing, unreadable or of another format."""


class CorruptError(ArtefactError):
    """A file of a run or bundle whose content has changed."""


class DivergedError(EnsemblerError):
    """A loss or weight that is not finite."""


class EngineError(EnsemblerError):
    """Ray cannot be reached, or lost a job."""


class GroupError(EnsemblerError):
    """Another process of a distributed training has ended."""


class ExportError(EnsemblerError):
    """An exported member that does not match its PyTorch original."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, shortened, or the name of its class where there is none."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
