"""Base class of the schemas of the package's JSON files."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Record"]


class Record(BaseModel):
    """A schema that rejects unknown fields instead of dropping them."""

    model_config = ConfigDict(extra="forbid")
