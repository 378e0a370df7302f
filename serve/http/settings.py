"""Settings of the service. The standard library and pydantic only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pydantic import ConfigDict, Field, PositiveInt, ValidationError

from ensembler.errors import UsageError
from ensembler.serve.runtime.gpu import GpuOptions

__all__ = ["Settings"]

_PREFIX = "ENSEMBLER_"


class Settings(GpuOptions):
    """The settings of one worker; each is the environment variable of its name in capitals, after ``ENSEMBLER_``."""

    model_config = ConfigDict(frozen=True)

    bundle: Path = Field(description="the bundle's folder")
    members: PositiveInt | None = Field(None, description="number of members; further ones are made from the vertices")
    workers: PositiveInt = Field(1, description="processes; each opens the bundle and uses its share of the CPUs")
    token: str | None = Field(None, pattern="^[!-~]*$", description="what callers send: Authorization: Bearer TOKEN")
    cors_origin: str | None = Field(
        None,
        pattern=r"^(\*|https?://[^\s,/*?#]+(,https?://[^\s,/*?#]+)*)$",
        description="origins whose pages may ask, with commas between them, or * for all",
    )
    log_answers: Path | None = Field(None, description="file to which answers are appended, without their images")
    log_sample: float = Field(1.0, gt=0, le=1, description="share of images whose answers are logged, at random")
    drift_window: int = Field(1000, ge=50, description="images over which drift is measured")
    max_batch: PositiveInt = Field(1024, description="the most images in one request")
    run_batch: PositiveInt = Field(64, description="the most images in one forward pass, of one request or several")
    max_queue: PositiveInt = Field(1024, description="images that may wait in one worker; others get 503")
    max_requests: PositiveInt = Field(256, description="requests that one worker handles at a time; others get 503")
    max_body: PositiveInt = Field(32 * 2**20, description="the most bytes in one request's body")
    max_json: PositiveInt = Field(4 * 2**20, description="the most bytes of JSON in one request")
    max_pixels: PositiveInt | None = Field(None, description="the most pixels of one image file, before it is resized")
    decode_ms: PositiveInt = Field(5_000, description="how long image files may take to decode, a megapixel at a time")
    deadline_ms: PositiveInt = Field(30_000, description="how long a request may take by default")
    body_ms: PositiveInt = Field(30_000, description="how long a body may take to arrive")
    body_rate: PositiveInt = Field(16 * 2**10, description="the fewest bytes a second of a body, over five seconds")
    require_signature: Path | None = Field(
        None, description="PEM file of the public key that the bundle is signed with"
    )

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Read the settings from an environment; an empty variable means the default.

        Raises:
            UsageError: no bundle is named, or a value is invalid.
        """
        names = {name: _PREFIX + name.upper() for name in cls.model_fields}
        given = {name: environment[variable] for name, variable in names.items() if environment.get(variable)}
        if "bundle" not in given:
            raise UsageError(
                "no bundle to serve: set ENSEMBLER_BUNDLE to its folder, or start with ensembler serve BUNDLE"
            )
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
        name = str(first["loc"][0])
        if name == "token":
            raise UsageError(f"{names[name]} must consist of visible ASCII characters: a header holds no others")
        expected = {
            "log_sample": "above 0 and at most 1",
            "drift_window": "a whole number from 50 up",
            "cors_origin": "* or origins such as https://example.org with commas between them",
            "device_id": "a whole number from 0 up",
        }.get(name) or {
            "literal_error": str(first.get("ctx", {}).get("expected")).replace("'", ""),
            "bool_parsing": "true or false",
            "greater_than_equal": "a whole number from 0 up",
        }.get(first["type"], "a whole number from 1 up")
        raise UsageError(f"{names[name]} must be {expected}, not {given[name]!r}")
