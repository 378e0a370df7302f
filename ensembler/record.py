"""Base class of the schemas of the package's JSON files."""

from __future__ import annotations

import textwrap
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

__all__ = ["Record", "mistake"]

_SHOWN = 3  # entries of a list in a repr


class Record(BaseModel):
    """A schema that rejects unknown fields instead of dropping them."""

    model_config = ConfigDict(extra="forbid")

    def __repr__(self) -> str:
        """Return the fields in at most five lines; of lists and records only their sizes and names."""
        fields = ", ".join(f"{name}={_short(value)}" for name, value in self if value is not None)
        return textwrap.fill(f"{type(self).__name__}({fields})", 100, max_lines=5, subsequent_indent="  ")

    def __str__(self) -> str:
        return repr(self)


def mistake(error: ValidationError) -> str:
    """Return the first thing that is wrong with a file's content: where, and what."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _short(value: Any) -> str:
    if isinstance(value, BaseModel):
        return f"{type(value).__name__}(...)"
    if isinstance(value, list | tuple | dict) and len(value) > _SHOWN:
        return f"<{len(value)} entries>"
    return textwrap.shorten(repr(value), 60)
