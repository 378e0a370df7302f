"""Scores of a classifier's probabilities, in float64.

``B`` examples, ``C`` classes, ``M`` members. Every score takes the probabilities (B, C) of one prediction, such as an
ensemble's mean, and the labels (B,), and is a mean over the examples: score the whole set at once, since a mean of
means over batches weighs the examples of a short last batch more.

Rows may miss a sum of 1 by up to 1e-3, as half precision does, and are taken as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensembler.errors import ShapeError, UsageError

__all__ = ["FLOOR", "Reliability", "accuracy", "brier", "ece", "ensemble_log_probs", "nll", "reliability", "scores"]

Array = NDArray[np.float64]

FLOOR = float(np.finfo(np.float32).tiny)
"""Smallest probability that a logarithm is taken of: float32's smallest normal number, 1.2e-38, or 87.3 nats."""

_SUM_TOLERANCE = 1e-3


def ensemble_log_probs(members: ArrayLike) -> Array:
    """Log of the mean of the members' probabilities, never of their logits.

    Args:
        members: (M, B, C) probabilities, M >= 1.

    Returns:
        (B, C), in [log FLOOR, 0]: where every member is sure of "no", log ``FLOOR`` stands for minus infinity.

    Raises:
        ShapeError: not (M, B, C), empty, not finite, negative, or rows that do not sum to 1.
    """
    mean = _probabilities(members, "members", "(M, B, C)").mean(axis=0)
    log_probs: Array = np.log(np.maximum(mean, FLOOR))
    return log_probs


def accuracy(probs: ArrayLike, labels: ArrayLike) -> float:
    """Share of examples whose most probable class is the label; of equally probable ones the first counts."""
    p, y = _check(probs, labels)
    return float((p.argmax(axis=1) == y).mean())


def nll(probs: ArrayLike, labels: ArrayLike) -> float:
    """Mean of ``-log p[label]`` in nats.

    Probabilities below ``FLOOR`` count as ``FLOOR``, so a label held impossible costs 87.3 nats and not infinity.
    """
    p, y = _check(probs, labels)
    return float(-np.log(np.maximum(p[np.arange(len(y)), y], FLOOR)).mean())


def brier(probs: ArrayLike, labels: ArrayLike) -> float:
    """``sum_c (p_c - [c = label])**2``, averaged over the examples (Brier 1950); in [0, 2]."""
    p, y = _check(probs, labels)
    errors = p.copy()
    errors[np.arange(len(y)), y] -= 1.0
    return float((errors**2).sum(axis=1).mean())


def ece(probs: ArrayLike, labels: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error of the top class: ``sum_b n_b / B * |accuracy_b - confidence_b|``; in [0, 1].

    The bins ``((b - 1) / bins, b / bins]`` have equal width and are left-open (Guo et al. 2017,
    https://arxiv.org/abs/1706.04599); a confidence of 0 falls in the first. The sum is netcal's.

    Args:
        probs: (B, C) probabilities.
        labels: (B,) classes.
        bins: number of bins, at least 1.

    Raises:
        ShapeError: probabilities or labels of the wrong shape or range.
        UsageError: fewer than one bin.
    """
    from netcal.metrics import ECE  # loads torch, pyro and gpytorch: seconds

    confidence, correct = _top(*_check(probs, labels))
    _edges(bins)
    # Given probabilities (B, C), netcal takes any two or fewer distinct labels for a binary problem: it then fails for
    # C > 2, scores class 1 and not the top class for C = 2, and calls a perfect single class wholly miscalibrated.
    # "Is the top class right?" is a binary problem, whatever the labels. Its bins are right-open: one step down from
    # an edge is the bin below, and moves no other confidence to another bin.
    return float(ECE(bins=int(bins)).measure(np.nextafter(confidence, 0.0), correct.astype(np.int64)))


@dataclass(frozen=True, eq=False)
class Reliability:
    """A reliability diagram: what each bin of ``ece`` holds.

    Attributes:
        confidence: (bins,) mean confidence; NaN in an empty bin.
        accuracy: (bins,) share of right answers; NaN in an empty bin.
        count: (bins,) number of examples.
    """

    confidence: Array
    accuracy: Array
    count: NDArray[np.int64]


def reliability(probs: ArrayLike, labels: ArrayLike, bins: int = 15) -> Reliability:
    """Mean confidence, accuracy and count in each of ``ece``'s bins; arguments and errors as there."""
    confidence, correct = _top(*_check(probs, labels))
    places = np.searchsorted(_edges(bins)[1:], confidence, side="left")
    count = np.bincount(places, minlength=bins)

    def mean(values: Array) -> Array:
        sums = np.bincount(places, weights=values, minlength=bins)
        means: Array = np.divide(sums, count, out=np.full(bins, np.nan), where=count > 0)
        return means

    return Reliability(mean(confidence), mean(correct.astype(np.float64)), count)


def scores(probs: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Accuracy, error (1 - accuracy), NLL, Brier score and 15-bin ECE of (B, C) probabilities, by these names.

    Raises:
        ShapeError: probabilities or labels of the wrong shape or range.
    """
    right = accuracy(probs, labels)
    return {
        "accuracy": right,
        "error": 1.0 - right,
        "nll": nll(probs, labels),
        "brier": brier(probs, labels),
        "ece": ece(probs, labels),
    }


def _top(p: Array, y: NDArray[np.int64]) -> tuple[Array, NDArray[np.bool_]]:
    """Each example's confidence in its most probable class, at most 1, and whether that class is right."""
    return np.minimum(p.max(axis=1), 1.0), p.argmax(axis=1) == y


def _edges(bins: int) -> Array:
    if bins < 1:
        raise UsageError(f"bins is {bins}; give at least 1")
    edges: Array = np.linspace(0.0, 1.0, bins + 1)
    return edges


def _check(probs: ArrayLike, labels: ArrayLike) -> tuple[Array, NDArray[np.int64]]:
    p = _probabilities(probs, "probs", "(B, C)")
    y = np.asarray(labels)
    if y.shape != p.shape[:1] or y.dtype.kind not in "iu":
        raise ShapeError(f"labels must be {len(p)} integers, one an example, found {y.dtype} {y.shape}")
    outside = np.flatnonzero((y < 0) | (y >= p.shape[1]))
    if len(outside):
        first = outside[0]
        raise ShapeError(f"labels[{first}] is {y[first]}, but probs has the classes 0 to {p.shape[1] - 1}")
    return p, y.astype(np.int64)


def _probabilities(values: ArrayLike, name: str, shape: str) -> Array:
    found = np.asarray(values)
    if found.ndim != len(shape.split(",")) or found.size == 0 or found.dtype.kind not in "fiu":
        raise ShapeError(f"{name} must be probabilities {shape}, none empty, found {found.dtype} {found.shape}")
    p = found.astype(np.float64)
    with np.errstate(invalid="ignore"):
        rows = p.sum(axis=-1)
    # Comparisons with NaN are false, so a NaN is caught here too.
    bad = np.argwhere(~((np.abs(rows - 1.0) <= _SUM_TOLERANCE) & (p >= 0.0).all(axis=-1)))
    if len(bad):
        where = tuple(int(i) for i in bad[0])
        raise ShapeError(
            f"{name}[{', '.join(map(str, where))}] is no distribution: its smallest entry is {p[where].min():g} and it "
            f"sums to {rows[where]:g}; give probabilities that sum to 1, not logits"
        )
    return p
