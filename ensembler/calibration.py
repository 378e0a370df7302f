"""A fitted calibration: a map of the probabilities, conformal prediction sets, and a threshold to abstain at.

A calibration is one file, ``calibration.json``, in the folder of the run that it was fitted for
(:mod:`ensembler.eval.calibrate` fits it). It names the run's manifest by its hash, and the manifest names every member
by theirs, so it cannot serve other members; and it carries a hash of its own content. Everything here takes the
ensemble's pooled prediction (B, C), the mean of its members' probabilities, as it comes: the map is applied inside.

NumPy, pydantic and the standard library only, so that serving needs neither torch nor netcal.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, ValidationError

from ensembler import artefact
from ensembler.calibration_maps import FLOOR, Map
from ensembler.errors import ArtefactError, CorruptError, ShapeError, UsageError
from ensembler.record import Record

__all__ = [
    "FILE",
    "FLOOR",
    "Abstention",
    "Calibration",
    "Conformal",
    "ConformalMethod",
    "abstain",
    "apply",
    "conformal_quantile",
    "conformal_scores",
    "load",
    "prediction_sets",
    "read",
    "save",
]

FILE = "calibration.json"
FORMAT = 1

Array = NDArray[np.float64]
ConformalMethod = Literal["lac", "aps"]


class Conformal(Record):
    """What split conformal prediction needs: how badly every held-out example's label fitted.

    Attributes:
        method: what :func:`prediction_sets` uses unless told otherwise.
        alpha: likewise; 1 - alpha is the coverage promised.
        lac, aps: the held-out examples' scores, sorted; see :func:`conformal_scores`.
    """

    method: ConformalMethod
    alpha: float = Field(gt=0, lt=1)
    lac: list[float]
    aps: list[float]


class Abstention(Record):
    """Below which confidence not to answer, so that at most a share ``risk`` of the answers is wrong.

    Attributes:
        risk: the error rate among the answers that is not to be exceeded.
        confidence: with what probability, over the held-out examples drawn, the promise holds.
        threshold: of the calibrated largest probability; ``None`` where no threshold could be certified.
        answered: how many held-out examples reach the threshold.
        wrong: how many of these were wrong.
    """

    risk: float = Field(gt=0, lt=1)
    confidence: float = Field(gt=0, lt=1)
    threshold: float | None
    answered: int
    wrong: int


class Calibration(Record):
    """A fitted map, conformal scores and a threshold, and what they were fitted on.

    Attributes:
        run_sha256: of the run's manifest, which holds the hash of every file of its members.
        dataset: its title.
        validation_sha256: of the split that everything was fitted on.
        classes: C.
        fitted: how many of its examples the map was fitted on.
        held_out: how many others gave the conformal scores and the threshold.
        seed: of the choice between the two.
        map: applied to the pooled prediction.
        abstention: ``None`` where no risk was asked for.
        before, after: scores of the held-out examples without and with the map, which has not seen them.
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


def apply(calibration: Calibration, probs: ArrayLike) -> Array:
    """The calibrated prediction.

    Args:
        calibration: fitted for this ensemble.
        probs: (B, C) the ensemble's pooled probabilities.

    Returns:
        (B, C) float64, rows with sum 1.

    Raises:
        ShapeError: not (B, C), with the C that was fitted.
    """
    p = np.asarray(probs, dtype=np.float64)
    if p.ndim != 2 or p.shape[1] != calibration.classes:
        raise ShapeError(f"the calibration is of probabilities (B, {calibration.classes}), found {p.shape}")
    return calibration.map(p)


def prediction_sets(
    calibration: Calibration, probs: ArrayLike, alpha: float | None = None, method: ConformalMethod | None = None
) -> NDArray[np.bool_]:
    """Sets of classes that hold the true one with probability at least 1 - alpha: split conformal prediction.

    The promise is on average over images like those of the validation split, and over its examples; not for every
    image, not for every class, and not under shift. LAC's sets are the smaller ones and may be empty, where no class
    is likely enough; APS's hold the most probable class always.

    Args:
        calibration: fitted for this ensemble.
        probs: (B, C) the ensemble's pooled probabilities.
        alpha: in (0, 1); by default the calibration's own. Any may be asked for. Where the held-out examples are too
            few for it, every set is all classes.
        method: ``"lac"`` or ``"aps"``; by default the calibration's own.

    Returns:
        (B, C): whether the class is in the set.

    Raises:
        ShapeError: not (B, C), with the C that was fitted.
        UsageError: an alpha or a method that does not exist.
    """
    conformal = calibration.conformal
    method = method or conformal.method
    scores = conformal_scores(apply(calibration, probs), method)
    fitted = conformal.lac if method == "lac" else conformal.aps
    sets: NDArray[np.bool_] = scores <= conformal_quantile(fitted, conformal.alpha if alpha is None else alpha)
    return sets


def conformal_scores(p: Array, method: ConformalMethod) -> Array:
    """How badly each class fits each prediction.

    - ``lac``: ``1 - p_c`` (Sadinle et al. 2019, https://arxiv.org/abs/1609.00451).
    - ``aps``: the sum of the probabilities larger than ``p_c`` (Romano et al. 2020,
      https://arxiv.org/abs/2006.02544), without their randomisation, so that an image's set is always the same: the
      class at which the sum crosses the threshold belongs to the set.

    Args:
        p: (B, C) calibrated probabilities.
        method: which.

    Returns:
        (B, C), in [0, 1].

    Raises:
        UsageError: another method.
    """
    if method == "lac":
        return 1.0 - p
    if method != "aps":
        raise UsageError(f"unknown conformal method {method!r}: use lac or aps")
    order = np.argsort(-p, axis=1)
    falling = np.take_along_axis(p, order, axis=1)
    larger = np.zeros_like(p)
    larger[:, 1:] = np.where(falling[:, 1:] < falling[:, :-1], np.cumsum(falling, axis=1)[:, :-1], 0.0)
    larger = np.maximum.accumulate(larger, axis=1)  # equally probable classes have the first one's sum
    scores = np.empty_like(p)
    np.put_along_axis(scores, order, larger, axis=1)
    return scores


def conformal_quantile(scores: ArrayLike, alpha: float) -> float:
    """The ``ceil((n + 1) (1 - alpha))``-th smallest of n scores; infinite where that is more than n.

    A new example's score is as likely to take any of the n + 1 places among them, so it is no larger with probability
    at least 1 - alpha (Vovk et al. 2005; Lei et al. 2018, https://arxiv.org/abs/1604.04173).

    Raises:
        UsageError: an alpha outside (0, 1).
    """
    if not 0 < alpha < 1:
        raise UsageError(f"alpha must lie between 0 and 1, not {alpha}")
    ordered = np.sort(np.asarray(scores, dtype=np.float64))
    rank = math.ceil(round((len(ordered) + 1) * (1 - alpha), 9))  # 10 * (1 - 0.1) is no more than 9
    return float(ordered[rank - 1]) if rank <= len(ordered) else math.inf


def abstain(calibration: Calibration, probs: ArrayLike) -> NDArray[np.bool_]:
    """Which predictions (B,) are better not given as answers: those below the threshold.

    Where no threshold could be certified, all of them: nothing less would keep the promise.

    Raises:
        ShapeError: not (B, C), with the C that was fitted.
        UsageError: the calibration was fitted without a risk.
    """
    if calibration.abstention is None:
        raise UsageError("this calibration has no threshold to abstain at: calibrate with --risk, such as --risk 0.05")
    confidence = apply(calibration, probs).max(axis=1)
    threshold = calibration.abstention.threshold
    return np.ones(len(confidence), dtype=bool) if threshold is None else confidence < threshold


def save(calibration: Calibration, run: Path) -> Path:
    """Write the calibration into its run's folder, whole or not at all, in place of an earlier one.

    Raises:
        ArtefactError: the run is not the one that it was fitted for, or the file cannot be written.
    """
    _check_run(calibration, _run_sha256(run), run)
    content = calibration.model_dump()
    content["sha256"] = _seal(content)
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    artefact.replace_file(run / FILE, text.encode())
    return run / FILE


def load(run: Path) -> Calibration | None:
    """The calibration in a run's folder; ``None`` where there is none.

    The run's own files are not verified here, as loading the run does it.

    Raises:
        ArtefactError: it was fitted for other members, is of an unknown format, or there is no run.
        CorruptError: it has changed since it was written.
    """
    return read(run / FILE, _run_sha256(run)) if (run / FILE).is_file() else None


def read(file: Path, run_sha256: str) -> Calibration:
    """A calibration from its file, wherever it lies.

    Args:
        file: as :func:`save` wrote it.
        run_sha256: of the manifest of the run that is to be calibrated.

    Raises:
        ArtefactError: it was fitted for another run, is of an unknown format, or cannot be read.
        CorruptError: it has changed since it was written.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
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
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise ArtefactError(f"{file} is no calibration that this version can read ({reason}): make it again") from error
    _check_run(calibration, run_sha256, file)
    return calibration


def _check_run(calibration: Calibration, run_sha256: str, where: Path) -> None:
    if calibration.run_sha256 != run_sha256:
        raise ArtefactError(
            f"{where}: the calibration was fitted for other members than this run's: run `ensembler calibrate` again"
        )


def _run_sha256(run: Path) -> str:
    try:
        return artefact.sha256(run / artefact.MANIFEST)
    except OSError as error:
        raise ArtefactError(f"no run at {run}: it has no {artefact.MANIFEST}") from error


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
