"""Selective prediction: how well the confidence ranks right answers above wrong ones.

Functions of each example's confidence, such as its largest probability, and of whether its answer is right. No score
depends on the order of the examples: with tied confidences, it is the expectation over their random orders.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensembler.calibration_maps import bin_indices
from ensembler.errors import ShapeError, UsageError

__all__ = [
    "Reliability",
    "RiskCoverage",
    "aurc",
    "misclassification_auroc",
    "reliability",
    "risk_at_coverage",
    "risk_coverage",
    "risks",
]

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Reliability:
    """A reliability diagram, by ECE's bins.

    Attributes:
        confidence: (bins,) mean confidence; NaN in an empty bin.
        accuracy: (bins,) share of right answers; NaN in an empty bin.
        count: (bins,) number of examples.
    """

    confidence: Array
    accuracy: Array
    count: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RiskCoverage:
    """The error rate among the most confident examples.

    Attributes:
        coverage: (points,) the share of examples kept, rising to 1.
        risk: (points,) the share of errors among them.
    """

    coverage: Array
    risk: Array


def reliability(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> Reliability:
    """Compute mean confidence, accuracy and count of each of ECE's bins.

    Args:
        confidence: (B,) in [0, 1].
        correct: (B,) whether each answer is right.
        bins: their number, at least 1.

    Raises:
        ShapeError: not one confidence and one answer an example.
        UsageError: fewer than one bin.
    """
    confidence, correct = _checked(confidence, correct)
    places = bin_indices(confidence, bins)
    count = np.bincount(places, minlength=bins)

    def mean(values: Array) -> Array:
        sums = np.bincount(places, weights=values, minlength=bins)
        means: Array = np.divide(sums, count, out=np.full(bins, np.nan), where=count > 0)
        return means

    return Reliability(mean(confidence), mean(correct.astype(np.float64)), count)


def risks(confidence: ArrayLike, correct: ArrayLike) -> Array:
    """Compute the error rate (B,) of the k most confident examples, k = 1 to B.

    Raises:
        ShapeError: not one confidence and one answer an example.
    """
    confidence, correct = _checked(confidence, correct)
    order = np.argsort(-confidence)
    errors = np.concatenate([[0], np.cumsum(~correct[order])])
    ends = np.concatenate([[0], np.flatnonzero(np.diff(confidence[order], append=-math.inf)) + 1])
    # The first j of m tied examples with e errors hold e * j / m errors in expectation: a straight line.
    kept = np.arange(1, len(order) + 1)
    found: Array = np.interp(kept, ends, errors[ends]) / kept
    return found


def risk_coverage(confidence: ArrayLike, correct: ArrayLike, points: int = 201) -> RiskCoverage:
    """Compute the risk-coverage curve (Geifman & El-Yaniv 2017, https://arxiv.org/abs/1705.08500).

    Raises:
        ShapeError: not one confidence and one answer an example.
        UsageError: fewer than two points.
    """
    if points < 2:
        raise UsageError(f"a curve has at least 2 points, not {points}")
    risk = risks(confidence, correct)
    kept = np.unique(np.linspace(1, len(risk), points).round().astype(np.int64))
    return RiskCoverage(kept / len(risk), risk[kept - 1])


def aurc(risk: Array) -> float:
    """Compute the area under the risk-coverage curve: the mean of :func:`risks` (B,).

    Geifman, Uziel & El-Yaniv 2019 (https://arxiv.org/abs/1805.08206); in [0, 1], lower is better, and 0 takes
    a perfect classifier, not only a perfect ranking.
    """
    return float(risk.mean())


def risk_at_coverage(risk: Array, coverage: float) -> float:
    """Look up the error rate of the ``ceil(coverage * B)`` most confident examples in :func:`risks` (B,).

    Raises:
        UsageError: a coverage outside (0, 1].
    """
    if not 0 < coverage <= 1:
        raise UsageError(f"coverage must lie in (0, 1], not {coverage}")
    kept = max(1, math.ceil(round(coverage * len(risk), 6)))  # 0.07 * 100 is 7.000000000000001
    return float(risk[kept - 1])


def misclassification_auroc(confidence: ArrayLike, correct: ArrayLike) -> float | None:
    """Compute the probability that a right answer is more confident than a wrong one; a tie counts half.

    The area under the ROC curve of the confidence, with errors as the negative class (Hendrycks & Gimpel 2017,
    https://arxiv.org/abs/1610.02136), scikit-learn's. ``None`` where all answers are right, or all wrong.

    Raises:
        ShapeError: not one confidence and one answer an example.
    """
    from sklearn.metrics import roc_auc_score

    confidence, correct = _checked(confidence, correct)
    return float(roc_auc_score(correct, confidence)) if 0 < correct.mean() < 1 else None


def _checked(confidence: ArrayLike, correct: ArrayLike) -> tuple[Array, NDArray[np.bool_]]:
    values, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct)
    if values.ndim != 1 or not len(values) or right.shape != values.shape or not np.isfinite(values).all():
        raise ShapeError(
            f"confidence and correct must be (B,), none empty, finite, found {values.shape} and {right.shape}"
        )
    return values, right.astype(bool)
