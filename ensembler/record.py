"""What is written to a file of ours as JSON: a field that is not known is an error, and never left out in silence."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Record"]


class Record(BaseModel):
    """A schema that forbids fields that it does not name."""

    model_config = ConfigDict(extra="forbid")
