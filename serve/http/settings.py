"""Settings of the service, each an environment variable. Standard library only.

=============================  ===========================================================================  ==========
variable                       meaning                                                                      default
=============================  ===========================================================================  ==========
``ENSEMBLER_BUNDLE``           the bundle's folder                                                          required
``ENSEMBLER_MEMBERS``          members to open; more than the bundle holds are made of its vertices         all it has
``ENSEMBLER_WORKERS``          processes; each opens the bundle and uses its share of the CPUs              1
``ENSEMBLER_TOKEN``            what callers must send as ``Authorization: Bearer TOKEN``                    none
``ENSEMBLER_MAX_BATCH``        the most images in one request                                               1024
``ENSEMBLER_RUN_BATCH``        the most images in one forward pass, of one request or of several            64
``ENSEMBLER_MAX_QUEUE``        images that may wait in one worker before others are answered 503            1024
``ENSEMBLER_MAX_REQUESTS``     requests that one worker handles at a time before others are answered 503    256
``ENSEMBLER_MAX_BODY``         the most bytes in one request's body                                         32 MiB
``ENSEMBLER_MAX_PIXELS``       the most pixels of one image file, before it is resized                      25,000,000
``ENSEMBLER_DEADLINE_MS``      how long a request may take that does not say so itself                      30,000
``ENSEMBLER_BODY_MS``          how long a body may take to arrive                                           30,000
=============================  ===========================================================================  ==========
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ensembler.errors import UsageError

__all__ = ["Settings", "whole_number"]


@dataclass(frozen=True)
class Settings:
    """The settings of one worker; times in seconds."""

    bundle: Path
    members: int | None
    workers: int
    token: str | None
    max_batch: int
    run_batch: int
    max_queue: int
    max_requests: int
    max_body: int
    max_pixels: int
    deadline: float
    body_time: float

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Read the settings from an environment.

        Raises:
            UsageError: no bundle is named, a value is not a whole number from 1 up, or the token is unusable.
        """

        def number(name: str, default: int) -> int:
            return _number(environment, name) or default

        bundle = environment.get("ENSEMBLER_BUNDLE")
        if not bundle:
            raise UsageError(
                "no bundle to serve: set ENSEMBLER_BUNDLE to its folder, or start with ensembler serve BUNDLE"
            )
        token = environment.get("ENSEMBLER_TOKEN")
        if token and not all("!" <= character <= "~" for character in token):
            raise UsageError("ENSEMBLER_TOKEN must consist of visible ASCII characters: a header holds no others")
        return cls(
            bundle=Path(bundle),
            members=_number(environment, "ENSEMBLER_MEMBERS"),
            workers=number("ENSEMBLER_WORKERS", 1),
            token=token or None,
            max_batch=number("ENSEMBLER_MAX_BATCH", 1024),
            run_batch=number("ENSEMBLER_RUN_BATCH", 64),
            max_queue=number("ENSEMBLER_MAX_QUEUE", 1024),
            max_requests=number("ENSEMBLER_MAX_REQUESTS", 256),
            max_body=number("ENSEMBLER_MAX_BODY", 32 * 2**20),
            max_pixels=number("ENSEMBLER_MAX_PIXELS", 25_000_000),
            deadline=number("ENSEMBLER_DEADLINE_MS", 30_000) / 1000,
            body_time=number("ENSEMBLER_BODY_MS", 30_000) / 1000,
        )

    def limits(self) -> dict[str, int]:
        """Return what a caller may know of the settings; times in milliseconds."""
        names = ("workers", "max_batch", "run_batch", "max_queue", "max_requests", "max_body", "max_pixels")
        limits: dict[str, int] = {name: getattr(self, name) for name in names}
        return limits | {"deadline_ms": round(1000 * self.deadline)}


def whole_number(name: str, default: int) -> int:
    """Return an environment variable's whole number from 1 up.

    Raises:
        UsageError: it is something else.
    """
    return _number(os.environ, name) or default


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 19) or int(text) < 1:
        raise UsageError(f"{name} must be a whole number from 1 up, not {text!r}")
    return int(text)
