"""The options of a request: one record that reads, checks and describes them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Literal, Self, get_args

from pydantic import ConfigDict, Field, ValidationError

from ensembler.calibration import Calibration
from ensembler.errors import UsageError
from ensembler.record import Record
from ensembler.serve.runtime.early_exit import LEVEL, Mode, waves
from ensembler.serve.runtime.images import shown

__all__ = ["CALIBRATED", "OUTPUTS", "STANDARD", "Options", "Output", "calibrated_outputs"]

Output = Literal[
    "class",
    "label",
    "probabilities",
    "predictive_entropy",
    "expected_entropy",
    "mutual_information",
    "disagreement",
    "members_used",
    "mean",
    "members",
    "calibrated",
    "prediction_set",
    "abstain",
]
OUTPUTS: tuple[Output, ...] = get_args(Output)
"""All outputs; ``mean`` is another name of ``probabilities``."""

STANDARD = OUTPUTS[: OUTPUTS.index("mean")]
"""Outputs of a request that chooses none."""

CALIBRATED = OUTPUTS[OUTPUTS.index("calibrated") :]
"""Outputs that need a calibration; where the bundle has one, they are added to the standard ones."""

_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})(\.\d{1,30})?([eE][+-]?\d{1,3})?", re.ASCII)


class Options(Record):
    """What a request chooses beside its images. ``None`` is the default of an option that depends on the bundle."""

    model_config = ConfigDict(frozen=True)

    outputs: list[Output] | None = Field(
        None, min_length=1, description="Fields of the answer. (default: all but mean and members)"
    )
    mode: Mode = Field(
        "full",
        description="full asks every member; exact stops where the class can no longer change; confidence stops where "
        "the members' spread makes the class probable enough.",
    )
    members: int | None = Field(None, ge=1, description="Ask at most this many members, in order. (default: all)")
    level: float = Field(LEVEL, gt=0, lt=1, description="Confidence level of the mode confidence.")
    alpha: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Prediction sets contain the true class with probability 1 - alpha. (default: the calibration's)",
    )

    @classmethod
    def read(cls, fields: Mapping[str, Any], texts: Iterable[tuple[str, str]] = ()) -> Self:
        """Read the options of a request.

        Args:
            fields: of a JSON object; ``null`` means the default.
            texts: names and values of a URL's query or a form; lists have commas between their items.

        Raises:
            UsageError: an unknown option, one that is given twice, or a value of the wrong type or range.
        """
        values = dict(fields)
        for name, text in texts:
            if name in values:
                raise UsageError(f"the option {shown(name)} was sent twice: send it once")
            values[name] = _value(cls.schemas().get(name, {}), text)
        return cls._read({name: value for name, value in values.items() if value is not None})

    @classmethod
    @cache
    def schemas(cls) -> dict[str, dict[str, Any]]:
        """The JSON schema of each option, by name, without its ``null``."""
        found: dict[str, dict[str, Any]] = {}
        for name, schema in cls.model_json_schema()["properties"].items():
            rest = {key: value for key, value in schema.items() if key not in ("anyOf", "title")}
            if rest.get("default", ...) is None:
                del rest["default"]
            found[name] = next((one for one in schema.get("anyOf", ()) if one["type"] != "null"), {}) | rest
        return found

    def resolve(self, members: int, calibration: Calibration | None) -> Self:
        """Fill in every default, so that requests that ask for the same have equal options.

        Args:
            members: M of the ensemble.
            calibration: the ensemble's; ``None`` without one.

        Raises:
            UsageError: more members than there are, or an output that this ensemble does not have.
        """
        asked = members if self.members is None else self.members
        if asked > members:
            raise UsageError(f"members is {shown(asked)}: ask from 1 to {members} of them")
        whole = self.asks_all(members)
        outputs, alpha = list(dict.fromkeys(self.outputs or ())), self.alpha
        if self.outputs is None:
            outputs += [*STANDARD, *(calibrated_outputs(calibration) if whole else ())]
        wanted = [output for output in outputs if output in CALIBRATED]
        if wanted or alpha is not None:
            _check_calibrated(wanted or ["prediction_set"], whole, calibration)
        if alpha is not None and "prediction_set" not in outputs:
            raise UsageError("alpha is an option of the output prediction_set: add it to outputs")
        if alpha is None and calibration is not None and "prediction_set" in outputs:
            alpha = calibration.conformal.alpha
        level = self.level if self.mode == "confidence" else LEVEL
        return self.model_copy(update={"outputs": outputs, "members": asked, "level": level, "alpha": alpha})

    def asks_all(self, members: int) -> bool:
        """Whether all of an ensemble's members are to be asked."""
        return self.mode == "full" and self.members in (None, members)

    def computation(self) -> tuple[Mode, int, float]:
        """Return what resolved options compute, mode, members and level: requests with equal ones share a pass.

        Where a mode's first members are all that may be asked, it is that of asking all of them.
        """
        if self.members is None:
            raise ValueError("resolve the options first")
        (_, first), *_ = waves(self.mode, self.members)
        return ("full", self.members, LEVEL) if first == self.members else (self.mode, self.members, self.level)

    @classmethod
    def _read(cls, values: Mapping[str, Any]) -> Self:
        try:
            return cls.model_validate(values, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
        name, *index = first["loc"]
        if first["type"] == "extra_forbidden":
            raise UsageError(f"unknown option {shown(name)}: use {', '.join(cls.model_fields)}")
        where = "".join([str(name), *(f"[{place}]" for place in index)])
        schema = cls.schemas()[str(name)]
        found = "empty" if first["input"] == [] else shown(first["input"])
        raise UsageError(f"{where} is {found}: {_expected(schema['items'] if index else schema)}")


def calibrated_outputs(calibration: Calibration | None) -> tuple[Output, ...]:
    """The outputs that a calibration adds."""
    if calibration is None:
        return ()
    return CALIBRATED if calibration.abstention is not None else CALIBRATED[:-1]


def _value(schema: dict[str, Any], text: str) -> Any:
    """A value that a query or form holds as text; numbers are written as in JSON."""
    if schema.get("type") == "array":
        return text.split(",")
    if schema.get("type") in ("integer", "number") and _NUMBER.fullmatch(text):
        return json.loads(text)
    return text


def _expected(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return f"use one of {', '.join(schema['enum'])}"
    if "items" in schema:
        return f"send a list of some of {', '.join(schema['items']['enum'])}"
    if "exclusiveMinimum" in schema:
        return f"it must lie between {schema['exclusiveMinimum']} and {schema['exclusiveMaximum']}"
    return f"it must be a whole number from {schema['minimum']} up"


def _check_calibrated(outputs: list[Output], whole: bool, calibration: Calibration | None) -> None:
    wanted = " and ".join(outputs)
    if calibration is None:
        raise UsageError(f"this bundle has no calibration, which {wanted} needs: calibrate the run and export it again")
    if not whole:
        raise UsageError(
            f"the calibration is of all members together, not of fewer: leave out {wanted}, or mode and members"
        )
    if "abstain" in outputs and calibration.abstention is None:
        raise UsageError("this bundle's calibration has no threshold to abstain at: calibrate the run with --risk")
