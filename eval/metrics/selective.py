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
    "augrc",
    "aurc",
    "checked",
    "coverage_at_risk",
    "misclassification_auroc",
    "reliability",
    "risk_at_coverage",
    "risk_coverage",
    "risks",
    "risks_of_losses",
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
    confidence, correct = checked(confidence, correct)
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
    confidence, correct = checked(confidence, correct)
    return risks_of_losses(confidence, (~correct).astype(np.float64))


def risks_of_losses(confidence: Array, losses: Array) -> Array:
    """Compute the mean loss (B,) of the k most confident examples, k = 1 to B, from each example's loss (B,)."""
    order = np.argsort(-confidence)
    total = np.concatenate([[0.0], np.cumsum(losses[order])])
    ends = np.concatenate([[0], np.flatnonzero(np.diff(confidence[order], append=-math.inf)) + 1])
    # The first j of m tied examples with a loss of e in all have e * j / m in expectation: a straight line.
    kept = np.arange(1, len(order) + 1)
    found: Array = np.interp(kept, ends, total[ends]) / kept
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


def augrc(risk: Array) -> float:
    """Compute the area under the generalized risk-coverage curve from :func:`risks` (B,).

    The mean over k of the share of *all* examples that are among the k most confident and wrong, ``k / B * risk_k``
    (Traub et al. 2024, https://arxiv.org/abs/2407.01032); in [0, 1], lower is better. Unlike AURC, it does not weigh
    the errors of the most confident few by large factors; at chance, it is half the error rate.
    """
    return float((risk * np.arange(1, len(risk) + 1)).mean() / len(risk))


def coverage_at_risk(risk: Array, most: float) -> float:
    """Find the largest coverage at which the error rate, of :func:`risks` (B,), is at most ``most``; 0 if none is.

    Raises:
        UsageError: a risk outside [0, 1].
    """
    if not 0 <= most <= 1:
        raise UsageError(f"a risk must lie in [0, 1], not {most}")
    allowed = np.flatnonzero(risk <= most + 1e-12)  # 0.05 of 20 examples may be 0.05000000000000001
    return float(allowed[-1] + 1) / len(risk) if len(allowed) else 0.0


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

    confidence, correct = checked(confidence, correct)
    return float(roc_auc_score(correct, confidence)) if 0 < correct.mean() < 1 else None


def checked(confidence: ArrayLike, correct: ArrayLike) -> tuple[Array, NDArray[np.bool_]]:
    """Return confidence (B,) float64 and correct (B,) bool.

    Raises:
        ShapeError: not one finite confidence and one answer an example.
    """
    values, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct)
    if values.ndim != 1 or not len(values) or right.shape != values.shape or not np.isfinite(values).all():
        raise ShapeError(
            f"confidence and correct must be (B,), none empty, finite, found {values.shape} and {right.shape}"
        )
    return values, right.astype(bool)
