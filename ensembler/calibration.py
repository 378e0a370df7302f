"""Calibration of an ensemble: a map of its probabilities, conformal prediction sets, and a threshold for abstention.

A calibration is a file, ``calibration.json``, in the folder of its run (:mod:`ensembler.eval.calibrate` fits it). It
has the hash of the run's manifest, which has the hashes of all members, so it cannot be used with other members; and it
has a hash of its own content. All functions here take the ensemble's pooled prediction (B, C), the uncalibrated mean of
its members' probabilities, and apply the map themselves.

NumPy, pydantic and the standard library only, so that serving needs neither torch nor netcal.
"""

from __future__ import annotations

import hashlib
import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, ValidationError

from ensembler.arguments import checked
from ensembler.calibration_maps import FLOOR, Map, Temperature
from ensembler.errors import ArtefactError, CorruptError, ShapeError, UsageError
from ensembler.record import Record, mistake
from ensembler.storage import artefact
from ensembler.text import counted, printable

__all__ = [
    "FILE",
    "FLOOR",
    "Abstention",
    "Calibration",
    "Conformal",
    "ConformalMethod",
    "abstain",
    "abstentions_of",
    "apply",
    "conformal_quantile",
    "conformal_scores",
    "load",
    "prediction_sets",
    "read",
    "save",
    "sets_of",
]

FILE = "calibration.json"
FORMAT = 1

Array = NDArray[np.float64]
ConformalMethod = Literal["lac", "aps"]


class Conformal(Record):
    """The conformity scores of the held-out examples' labels, for split conformal prediction.

    Attributes:
        method: the default of :func:`prediction_sets`.
        alpha: its default, too; the guaranteed coverage is 1 - alpha.
        lac, aps: the held-out examples' scores, sorted; see :func:`conformal_scores`.
    """

    method: ConformalMethod
    alpha: float = Field(gt=0, lt=1)
    lac: list[float]
    aps: list[float]

    @cached_property
    def ordered(self) -> dict[ConformalMethod, Array]:
        """The scores of each method, rising, as arrays: made once, as every answer asks for a quantile."""
        return {"lac": np.sort(np.asarray(self.lac, np.float64)), "aps": np.sort(np.asarray(self.aps, np.float64))}


class Abstention(Record):
    """The confidence below which to abstain, so that at most a share ``risk`` of the answers is wrong.

    Attributes:
        risk: the highest error rate among the answers.
        confidence: the probability, over the draw of held-out examples, that the guarantee holds.
        threshold: of the largest calibrated probability; ``None`` if no threshold could be certified.
        answered: number of held-out examples that reach the threshold.
        wrong: number of wrong ones among these.
    """

    risk: float = Field(gt=0, lt=1)
    confidence: float = Field(gt=0, lt=1)
    threshold: float | None
    answered: int
    wrong: int


class Calibration(Record):
    """A fitted map, conformal scores and a threshold, and the data of the fit.

    Attributes:
        run_sha256: of the run's manifest, which has the hash of every file of its members.
        dataset: its title.
        validation_sha256: of the validation split, on which everything was fitted.
        classes: C.
        fitted: number of validation examples for the map.
        held_out: number of the other validation examples, for the conformal scores and the threshold.
        seed: of the split into these two.
        map: applied to the pooled prediction.
        abstention: ``None`` if no risk was requested.
        before, after: scores of the held-out examples without and with the map.
    """

    kind: Literal["calibration"] = "calibration"
    format: int = FORMAT
    run_sha256: str
    dataset: str
    validation_sha256: str
    classes: int
    fitted: int
    held_out: int
    seed: int
    map: Map
    conformal: Conformal
    abstention: Abstention | None
    before: dict[str, float | None]
    after: dict[str, float | None]
    created: str
    versions: dict[str, str]

    def __repr__(self) -> str:
        def moved(name: str) -> str:
            return " -> ".join(
                "-" if value is None else f"{value:.4f}" for value in (self.before[name], self.after[name])
            )

        how = f"T = {self.map.temperature:.4g}" if isinstance(self.map, Temperature) else f"by {self.map.method}"
        sets, answers = self.conformal, self.abstention
        held = f"{counted(self.held_out, 'other validation example')}: NLL {moved('nll')}, ECE {moved('ece')}"
        lines = [
            f"Calibration of {printable(self.dataset)}: {how}, fitted to {counted(self.fitted, 'validation example')}",
            f"  {held}",
            f"  {sets.method.upper()} sets miss the true class in at most {100 * sets.alpha:g} % of cases",
        ]
        if answers is not None:
            least = "always abstains" if answers.threshold is None else f"abstains below {answers.threshold:.4g}"
            lines.append(f"  {least}, for at most {100 * answers.risk:g} % wrong answers")
        return "\n".join(lines)


def apply(calibration: Calibration, probs: ArrayLike) -> Array:
    """Apply the map to a prediction.

    Args:
        calibration: fitted for this ensemble.
        probs: (B, C) the ensemble's pooled probabilities.

    Returns:
        (B, C) float64, rows with sum 1.

    Raises:
        ShapeError: ``probs`` is not (B, C) with the calibration's C.
    """
    p = np.asarray(probs, dtype=np.float64)
    if p.ndim != 2 or p.shape[1] != calibration.classes:
        raise ShapeError(f"the calibration is for probabilities (B, {calibration.classes}), found {p.shape}")
    return calibration.map(p)


def prediction_sets(
    calibration: Calibration, probs: ArrayLike, alpha: float | None = None, method: ConformalMethod | None = None
) -> NDArray[np.bool_]:
    """Compute sets of classes that contain the true class with probability at least 1 - alpha.

    Split conformal prediction. The guarantee is an average over images like those of the validation split, and over the
    draw of that split. It does not hold for every image or class, nor under shift. LAC's sets are smaller, and empty if
    no class is probable enough; APS's always contain the most probable class.

    Args:
        calibration: fitted for this ensemble.
        probs: (B, C) the ensemble's pooled probabilities.
        alpha: any number in (0, 1); by default the calibration's. If the held-out examples are too few for it, every
            set contains all classes.
        method: ``"lac"`` or ``"aps"``; by default the calibration's.

    Returns:
        (B, C): whether the class is in the set.

    Raises:
        ShapeError: ``probs`` is not (B, C) with the calibration's C.
        UsageError: ``alpha`` is out of range, or the method is unknown.
    """
    return sets_of(calibration, apply(calibration, probs), alpha, method)


def sets_of(
    calibration: Calibration, p: Array, alpha: float | None = None, method: ConformalMethod | None = None
) -> NDArray[np.bool_]:
    """Compute :func:`prediction_sets` of probabilities (B, C) that :func:`apply` has calibrated.

    Raises:
        UsageError: ``alpha`` is out of range, or the method is unknown.
    """
    conformal = calibration.conformal
    method = method or conformal.method
    scores = conformal_scores(p, method)
    alpha = conformal.alpha if alpha is None else alpha
    sets: NDArray[np.bool_] = scores <= _rank_quantile(conformal.ordered[method], alpha)
    return sets


def conformal_scores(p: Array, method: ConformalMethod) -> Array:
    """Compute the conformity score of each class; larger is worse.

    - ``lac``: ``1 - p_c`` (Sadinle et al. 2019, https://arxiv.org/abs/1609.00451).
    - ``aps``: the sum of the probabilities larger than ``p_c`` (Romano et al. 2020,
      https://arxiv.org/abs/2006.02544), without their randomisation, so that the same image always has the same set.
      The class at which the sum crosses the threshold is in the set.

    Args:
        p: (B, C) calibrated probabilities.
        method: ``"lac"`` or ``"aps"``.

    Returns:
        (B, C), in [0, 1].

    Raises:
        UsageError: the method is unknown.
    """
    if method == "lac":
        return 1.0 - p
    if method != "aps":
        raise UsageError(f"unknown conformal method {method!r}: use lac or aps")
    order = np.argsort(-p, axis=1)
    falling = np.take_along_axis(p, order, axis=1)
    larger = np.zeros_like(p)
    larger[:, 1:] = np.where(falling[:, 1:] < falling[:, :-1], np.cumsum(falling, axis=1)[:, :-1], 0.0)
    larger = np.maximum.accumulate(larger, axis=1)  # equally probable classes get the sum of the first of them
    scores = np.empty_like(p)
    np.put_along_axis(scores, order, larger, axis=1)
    return scores


def conformal_quantile(scores: ArrayLike, alpha: float) -> float:
    """Return the ``ceil((n + 1) (1 - alpha))``-th smallest of n scores; infinity if that is more than n.

    The rank of a new example's score among them is uniform in 1 to n + 1, so its score is at most this with probability
    at least 1 - alpha (Vovk et al. 2005; Lei et al. 2018, https://arxiv.org/abs/1604.04173).

    Raises:
        UsageError: ``alpha`` is not in (0, 1).
    """
    return _rank_quantile(np.sort(np.asarray(scores, dtype=np.float64)), alpha)


def _rank_quantile(ordered: Array, alpha: float) -> float:
    if not 0 < alpha < 1:
        raise UsageError(f"alpha must be between 0 and 1, not {alpha}")
    rank = math.ceil(round((len(ordered) + 1) * (1 - alpha), 9))  # rounded: in floats, 10 * (1 - 0.1) may exceed 9
    return float(ordered[rank - 1]) if rank <= len(ordered) else math.inf


def abstain(calibration: Calibration, probs: ArrayLike) -> NDArray[np.bool_]:
    """Return which predictions (B,) are below the threshold for abstention; all, if no threshold could be certified.

    Raises:
        ShapeError: ``probs`` is not (B, C) with the calibration's C.
        UsageError: the calibration was fitted without a risk.
    """
    return abstentions_of(calibration, apply(calibration, probs))


def abstentions_of(calibration: Calibration, p: Array) -> NDArray[np.bool_]:
    """Return :func:`abstain` of probabilities (B, C) that :func:`apply` has calibrated.

    Raises:
        UsageError: the calibration was fitted without a risk.
    """
    if calibration.abstention is None:
        raise UsageError("this calibration has no threshold for abstention: calibrate with --risk, such as --risk 0.05")
    confidence = p.max(axis=1)
    threshold = calibration.abstention.threshold
    return np.ones(len(confidence), dtype=bool) if threshold is None else confidence < threshold


@checked
def save(calibration: Calibration, run: str | Path) -> Path:
    """Write the calibration into its run's folder, or replace it, atomically.

    Raises:
        ArtefactError: the calibration was fitted for another run, or the file cannot be written.
    """
    run = Path(run)
    _check_run(calibration, _run_sha256(run), run)
    content = calibration.model_dump()
    content["sha256"] = _seal(content)
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    artefact.replace_file(run / FILE, text.encode())
    return run / FILE


@checked
def load(run: str | Path) -> Calibration | None:
    """Load the calibration in a run's folder; ``None`` if there is none.

    The run's other files are not verified here, but when the run is loaded.

    Raises:
        ArtefactError: the calibration was fitted for another run or is of an unknown format, or there is no run.
        CorruptError: it has changed since it was written.
    """
    run = Path(run)
    return read(run / FILE, _run_sha256(run)) if (run / FILE).is_file() else None


def read(file: str | Path, run_sha256: str, classes: int | None = None) -> Calibration:
    """Read a calibration from a file.

    Args:
        file: written by :func:`save`.
        run_sha256: of the manifest of its run.
        classes: C, where it is known.

    Raises:
        ArtefactError: it was fitted for another run, is of an unknown format, or cannot be read.
        CorruptError: it has changed since it was written.
    """
    file = Path(file)
    try:
        content = artefact.parse_json(artefact.read_text(file))
        if content.pop("sha256") != _seal(content):
            raise ValueError("its SHA-256 differs")
    except OSError as error:
        raise ArtefactError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{file} has changed since it was written: remove it, and calibrate again") from error
    if (found := content.get("format")) != FORMAT:
        raise ArtefactError(
            f"{file} has calibration format {found}; this version of ensembler reads {FORMAT}: update it"
        )
    try:
        calibration = Calibration.model_validate(content)
    except ValidationError as error:
        raise ArtefactError(
            f"{file} is not a calibration of this version ({mistake(error)}): calibrate again"
        ) from error
    _check_run(calibration, run_sha256, file)
    if classes not in (None, calibration.classes):
        raise ArtefactError(f"{file} is for {calibration.classes} classes, not {classes}: calibrate again")
    try:  # lengths that do not go together
        usable = bool(np.isfinite(calibration.map(np.full((1, calibration.classes), 1 / calibration.classes))).all())
    except (ValueError, IndexError, ZeroDivisionError):
        usable = False
    if not usable or calibration.classes < 1:
        raise ArtefactError(
            f"{file} holds a map that cannot be applied to {calibration.classes} classes: calibrate again"
        )
    return calibration


def _check_run(calibration: Calibration, run_sha256: str, where: Path) -> None:
    if calibration.run_sha256 != run_sha256:
        raise ArtefactError(f"{where}: the calibration was fitted for another run: run `ensembler calibrate` again")


def _run_sha256(run: Path) -> str:
    try:
        return artefact.sha256(run / artefact.MANIFEST)
    except OSError as error:
        raise ArtefactError(f"no run at {run}: it has no {artefact.MANIFEST}") from error


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
