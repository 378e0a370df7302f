"""What a caller may choose beside the images: outputs, mode, members, level, alpha. No BentoML, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from ensembler.calibration import Calibration
from ensembler.errors import UsageError
from ensembler.serve.runtime.early_exit import LEVEL, MODES, Mode
from ensembler.serve.runtime.images import shown

__all__ = ["CALIBRATED", "OUTPUTS", "STANDARD", "Options", "options_from_query", "read_options"]

STANDARD = (
    "class",
    "label",
    "probabilities",
    "predictive_entropy",
    "expected_entropy",
    "mutual_information",
    "disagreement",
    "members_used",
)
"""Outputs of every answer that does not choose."""

CALIBRATED = ("calibrated", "prediction_set", "abstain")
"""Outputs that need a calibration. Where the bundle has one, an answer of all members holds them, too."""

OUTPUTS = (*STANDARD, "mean", "members", *CALIBRATED)
"""All; ``mean`` is ``probabilities`` by another name."""

_FIELDS = ("outputs", "mode", "members", "level", "alpha")


@dataclass(frozen=True)
class Options:
    """A caller's choices, checked.

    Attributes:
        outputs: each one's field in the answer, in this order.
        mode: see :meth:`ensembler.serve.runtime.runtime.Runtime.predict`.
        members: ask no more than these first ones; ``None`` for all.
        level: of the mode ``"confidence"``.
        alpha: 1 - alpha is the coverage that the prediction sets promise; ``None`` without them.
    """

    outputs: tuple[str, ...] = STANDARD
    mode: Mode = "full"
    members: int | None = None
    level: float = LEVEL
    alpha: float | None = None

    fields = _FIELDS


def read_options(chosen: Mapping[str, Any], members: int, calibration: Calibration | None) -> Options:
    """Check a caller's choices; what is absent or ``None`` is not chosen.

    Args:
        chosen: values by the names of ``Options.fields``.
        members: M.
        calibration: of these members.

    Raises:
        UsageError: a choice that does not exist, or that this bundle cannot honour.
    """
    given = {name: value for name, value in chosen.items() if value is not None}
    mode = given.get("mode", "full")
    if mode not in MODES:
        raise UsageError(f"unknown mode {shown(mode)}: use one of {', '.join(MODES)}")
    asked = given.get("members")
    if asked is not None and (type(asked) is not int or not 1 <= asked <= members):
        raise UsageError(f"members is {shown(asked)}: ask from 1 to {members} of them")
    level = given.get("level", LEVEL)
    if type(level) not in (int, float) or not 0 < level < 1:
        raise UsageError(f"level is {shown(level)}: it must lie between 0 and 1")
    whole = mode == "full" and asked in (None, members)
    outputs = _outputs(given.get("outputs"), calibration if whole else None)
    if wanting := [output for output in outputs if output in CALIBRATED]:
        _check_calibrated(wanting, whole, calibration)
    alpha = given.get("alpha")
    if alpha is not None:
        if type(alpha) is not float or not 0 < alpha < 1:
            raise UsageError(f"alpha is {shown(alpha)}: it must lie between 0 and 1")
        if "prediction_set" not in outputs:
            _check_calibrated(["prediction_set"], whole, calibration)
            raise UsageError("alpha is of the output prediction_set: add it to outputs")
    elif calibration is not None and "prediction_set" in outputs:
        alpha = calibration.conformal.alpha
    return Options(tuple(outputs), cast(Mode, mode), asked, float(level), alpha)


def options_from_query(query: Mapping[str, str]) -> dict[str, Any]:
    """The options of a URL's query, for :func:`read_options` to check: ``outputs`` has commas between its names.

    Raises:
        UsageError: an unknown parameter, or text where a number belongs.
    """
    if unknown := sorted(set(query) - set(_FIELDS)):
        raise UsageError(f"unknown parameter {shown(unknown[0])}: use {', '.join(_FIELDS)}")
    chosen: dict[str, Any] = dict(query)
    for name, number in (("members", int), ("level", float), ("alpha", float)):
        if name in chosen:
            try:
                chosen[name] = number(query[name][:40])
            except ValueError as error:
                raise UsageError(f"{name} is {shown(query[name])}: it must be a number") from error
    if "outputs" in chosen:
        chosen["outputs"] = query["outputs"].split(",")
    return chosen


def _outputs(chosen: Any, calibration: Calibration | None) -> list[str]:
    if chosen is None:
        fitted = () if calibration is None else CALIBRATED[: 2 if calibration.abstention is None else 3]
        return [*STANDARD, *fitted]
    if not isinstance(chosen, list) or not chosen:
        raise UsageError(f"outputs is {shown(chosen)}: send a list of some of {', '.join(OUTPUTS)}")
    for output in chosen:
        if not isinstance(output, str) or output not in OUTPUTS:
            raise UsageError(f"unknown output {shown(output)}: use some of {', '.join(OUTPUTS)}")
    return list(dict.fromkeys(chosen))


def _check_calibrated(outputs: list[str], whole: bool, calibration: Calibration | None) -> None:
    wanted = " and ".join(outputs)
    if calibration is None:
        raise UsageError(
            f"this bundle holds no calibration, which {wanted} would need: leave them out, or calibrate the run and "
            "export it again"
        )
    if not whole:
        raise UsageError(
            f"the calibration is of all members together, so {wanted} cannot be had from fewer: leave mode and members "
            "out"
        )
    if "abstain" in outputs and calibration.abstention is None:
        raise UsageError("this bundle's calibration has no threshold to abstain at: calibrate the run with --risk")
