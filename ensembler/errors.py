"""Every error that ensembler raises on purpose.

::

    EnsemblerError
    ├── UsageError           an argument or option that cannot be honoured
    ├── ShapeError           an array of the wrong shape, type or range
    ├── DataError            a dataset that is missing, malformed or not the one expected
    ├── ArtefactError        a run or bundle that is missing, unreadable or of another format
    │   └── CorruptError     a file of a run or bundle whose bytes are not the ones written
    ├── DivergedError        training produced a loss or weight that is not finite
    ├── EngineError          Ray that cannot be reached, or has lost a piece of work
    ├── GroupError           a process of those that train together is gone
    └── ExportError          an exported member that does not reproduce its PyTorch original

The service adds its own, each with the status that it answers: see ``ensembler.serve``.

A message says what was wrong, where, and the mend. The command line prints it on one line without a traceback.
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
]


class EnsemblerError(Exception):
    """Base of every error raised on purpose; ``except EnsemblerError`` catches them all."""


class UsageError(EnsemblerError, ValueError):
    """An argument or option that cannot be honoured."""


class ShapeError(EnsemblerError, ValueError):
    """An array of the wrong shape, type or range."""


class DataError(EnsemblerError):
    """A dataset that is missing, malformed or not the one expected."""


class ArtefactError(EnsemblerError):
    """A run or bundle that is missing, unreadable or of another format."""


class CorruptError(ArtefactError):
    """A file of a run or bundle whose bytes are not the ones written."""


class DivergedError(EnsemblerError):
    """Training produced a loss or weight that is not finite."""


class EngineError(EnsemblerError):
    """Ray that cannot be reached, or has lost a piece of work."""


class GroupError(EnsemblerError):
    """A process of those that train together is gone."""


class ExportError(EnsemblerError):
    """An exported member that does not reproduce its PyTorch original."""
