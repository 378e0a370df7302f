"""Scores of a classifier's probabilities, in float64.

Every score takes probabilities (B, C) of ``B`` examples and ``C`` classes, such as an ensemble's mean, and labels (B,),
and is a mean over the examples: score the whole set at once, since a mean of batch means overweights a short last
batch.

Probabilities of 16 bits are taken, also as PyTorch tensors: rows may miss a sum of 1 by as much as a softmax in
bfloat16 does, and are normalised where they miss it by more than rounding in float32. The confidence of a prediction is
its largest probability, at most 1.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensembler.calibration_maps import FLOOR, bin_count, bin_indices
from ensembler.errors import ShapeError
from ensembler.eval.metrics.selective import (
    augrc,
    aurc,
    coverage_at_risk,
    misclassification_auroc,
    risk_at_coverage,
    risks,
)
from ensembler.eval.metrics.smooth import smooth_error
from ensembler.uncertainty import SUM_TOLERANCE

__all__ = [
    "BINS",
    "SUM_ROUNDING",
    "SUM_TOLERANCE",
    "Answers",
    "accuracy",
    "adaptive_ece",
    "brier",
    "classwise_ece",
    "ece",
    "l2_calibration_error",
    "max_calibration_error",
    "nll",
    "scores",
    "smooth_ece",
]

BINS = 15

Array = NDArray[np.float64]

SUM_ROUNDING = 1e-5
"""What the sum of a float32 softmax may miss 1 by; its rows are left as they are."""


def accuracy(probs: ArrayLike, labels: ArrayLike) -> float:
    """Compute the share of examples whose most probable class, the first of tied ones, is the label."""
    return Answers(probs, labels).accuracy()


def nll(probs: ArrayLike, labels: ArrayLike) -> float:
    """Compute the mean of ``-log p[label]``, in nats.

    Probabilities below ``FLOOR`` count as ``FLOOR``, so a label of probability 0 costs 87.3 nats and not infinity.
    """
    return Answers(probs, labels).nll()


def brier(probs: ArrayLike, labels: ArrayLike) -> float:
    """Compute ``sum_c (p_c - [c = label])**2``, averaged over the examples (Brier 1950); in [0, 2]."""
    return Answers(probs, labels).brier()


def ece(probs: ArrayLike, labels: ArrayLike, bins: int = BINS) -> float:
    """Compute the expected calibration error of the top class, ``sum_b n_b / B * |accuracy_b - confidence_b|``.

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
    return Answers(probs, labels).ece(bins)


def max_calibration_error(probs: ArrayLike, labels: ArrayLike, bins: int = BINS) -> float:
    """Compute the maximum calibration error, the largest ``|accuracy_b - confidence_b|`` of ``ece``'s non-empty bins.

    Naeini et al. 2015; netcal's. One example alone in a bin counts as much as a thousand.
    """
    return Answers(probs, labels).max_calibration_error(bins)


def adaptive_ece(probs: ArrayLike, labels: ArrayLike, bins: int = BINS) -> float:
    """Compute ``ece`` over bins of equal mass, a share ``1 / bins`` of the examples each (Nguyen & O'Connor 2015).

    A bin's upper edge, which it includes, is the confidence of rank ``ceil(b * B / bins)``; equal confidences are in
    the same bin, so where there are many, bins are larger or empty.
    """
    return Answers(probs, labels).adaptive_ece(bins)


def classwise_ece(probs: ArrayLike, labels: ArrayLike, bins: int = BINS) -> float:
    """Compute the binned calibration error of every class's probability, averaged over the classes; in [0, 1].

    ``1 / C * sum_c sum_b n_bc / B * |frequency of c in the bin - mean p_c in it|`` over ``ece``'s bins (Kull et al.
    2019, https://arxiv.org/abs/1910.12656; Nixon et al. 2019's SCE, https://arxiv.org/abs/1904.01685).
    """
    return Answers(probs, labels).classwise_ece(bins)


def l2_calibration_error(probs: ArrayLike, labels: ArrayLike, bins: int = BINS, *, debiased: bool = True) -> float:
    """Compute the root mean squared calibration error of the top class over ``ece``'s bins.

    ``sqrt(sum_b n_b / B * ((accuracy_b - confidence_b)**2 - accuracy_b (1 - accuracy_b) / (n_b - 1)))``, the debiased
    estimator of Kumar et al. 2019 (https://arxiv.org/abs/1909.10155, sec. 5): the subtracted term is what the
    sampling of a bin's labels adds to its squared gap. As in their code, a bin of one example counts 0, and a negative
    sum is 0. In [0, 1].

    Args:
        probs: (B, C) probabilities.
        labels: (B,) classes.
        bins: number of bins, at least 1.
        debiased: whether to subtract that term; without it, the plug-in estimator of torchmetrics' ``norm="l2"``, too
            high on few examples.

    Raises:
        ShapeError: probabilities or labels of the wrong shape or range.
        UsageError: fewer than one bin.
    """
    return Answers(probs, labels).l2_calibration_error(bins, debiased=debiased)


def smooth_ece(probs: ArrayLike, labels: ArrayLike) -> float:
    """Compute the smooth calibration error of the top class, smECE; see :func:`.smooth.smooth_error`."""
    return Answers(probs, labels).smooth_ece()


def scores(probs: ArrayLike, labels: ArrayLike) -> dict[str, float | None]:
    """Compute every score of probabilities (B, C) and labels (B,), by name; binned ones with 15 bins.

    ``error`` is 1 - accuracy, ``risk_at_80`` the risk at a coverage of 0.8, ``coverage_at_5`` the coverage at a risk of
    0.05, ``l2_calibration_error`` the debiased one; see :mod:`ensembler.eval.metrics.selective`
    for those of the confidence. Only ``misclassification_auroc`` may be ``None``.

    Raises:
        ShapeError: probabilities or labels of the wrong shape or range.
    """
    answers = Answers(probs, labels)
    risk = risks(answers.confidence, answers.correct)
    return {
        "accuracy": answers.accuracy(),
        "error": 1.0 - answers.accuracy(),
        "nll": answers.nll(),
        "brier": answers.brier(),
        "ece": answers.ece(),
        "adaptive_ece": answers.adaptive_ece(),
        "classwise_ece": answers.classwise_ece(),
        "max_calibration_error": answers.max_calibration_error(),
        "l2_calibration_error": answers.l2_calibration_error(),
        "smooth_ece": answers.smooth_ece(),
        "aurc": aurc(risk),
        "augrc": augrc(risk),
        "risk_at_80": risk_at_coverage(risk, 0.8),
        "coverage_at_5": coverage_at_risk(risk, 0.05),
        "misclassification_auroc": misclassification_auroc(answers.confidence, answers.correct),
    }


class Answers:
    """Probabilities (B, C) and labels (B,), checked once, and quantities that several scores use.

    Attributes:
        p: (B, C) float64.
        y: (B,) int64.

    Raises:
        ShapeError: probabilities or labels of the wrong shape or range.
    """

    def __init__(self, probs: ArrayLike, labels: ArrayLike) -> None:
        self.p = _probabilities(probs)
        self.y = _labels(labels, self.p)

    @cached_property
    def confidence(self) -> Array:
        """(B,) largest probability, at most 1."""
        confidence: Array = np.minimum(self.p.max(axis=1), 1.0)
        return confidence

    @cached_property
    def correct(self) -> NDArray[np.bool_]:
        """(B,) whether the most probable class is the label."""
        correct: NDArray[np.bool_] = self.p.argmax(axis=1) == self.y
        return correct

    @cached_property
    def label_nll(self) -> Array:
        """(B,) ``-log p[label]``, at most ``-log FLOOR``."""
        losses: Array = -np.log(np.maximum(self.p[np.arange(len(self.y)), self.y], FLOOR))
        return losses

    @cached_property
    def misses(self) -> Array:
        """(B, C) ``p_c - [c = label]``."""
        misses = self.p.copy()
        misses[np.arange(len(self.y)), self.y] -= 1.0
        return misses

    def accuracy(self) -> float:
        return float(self.correct.mean())

    def nll(self) -> float:
        return float(self.label_nll.mean())

    def brier(self) -> float:
        return float((self.misses**2).sum(axis=1).mean())

    def ece(self, bins: int = BINS) -> float:
        from netcal.metrics import ECE  # loads torch, pyro and gpytorch: seconds

        return float(ECE(bins=bin_count(bins)).measure(*self._for_netcal()))

    def max_calibration_error(self, bins: int = BINS) -> float:
        from netcal.metrics import MCE

        return float(MCE(bins=bin_count(bins)).measure(*self._for_netcal()))

    def adaptive_ece(self, bins: int = BINS) -> float:
        # netcal's ACE weighs all bins equally, and its equal_intervals=False fails if two edges are equal, as they are
        # when a bin's worth of confidences is: a float32 softmax is often exactly 1.
        last = -(-np.arange(1, bin_count(bins) + 1) * len(self.y) // bins) - 1
        places = np.searchsorted(np.sort(self.confidence)[last], self.confidence, side="left")
        return _gap(places, self.correct - self.confidence) / len(self.y)

    def classwise_ece(self, bins: int = BINS) -> float:
        # netcal needs a call per class, 1.5 ms each for 10,000 examples.
        places = bin_indices(self.p, bins) + bins * np.arange(self.p.shape[1])
        return _gap(places.ravel(), self.misses.ravel()) / self.p.size

    def l2_calibration_error(self, bins: int = BINS, *, debiased: bool = True) -> float:
        places = bin_indices(self.confidence, bins)
        count = np.bincount(places, minlength=bins)
        used = count > 1 if debiased else count > 0
        n = count[used]
        gaps = np.bincount(places, weights=self.correct - self.confidence, minlength=bins)[used] / n
        accuracy = np.bincount(places, weights=self.correct, minlength=bins)[used] / n
        noise = accuracy * (1 - accuracy) / (n - 1) if debiased else 0.0
        return float(np.sqrt(max(0.0, (n * (gaps**2 - noise)).sum() / len(self.y))))

    def smooth_ece(self) -> float:
        return smooth_error(self.confidence, self.correct)

    def _for_netcal(self) -> tuple[Array, NDArray[np.int64]]:
        # Given probabilities (B, C), netcal treats two or fewer distinct labels as a binary problem: it then fails for
        # C > 2, scores class 1 and not the top class for C = 2, and calls a perfect single class miscalibrated. "Is the
        # top class right?" is a binary problem, whatever the labels. Its bins are right-open: one step down from an
        # edge is the bin below, and moves no other confidence to another bin.
        return np.nextafter(self.confidence, 0.0), self.correct.astype(np.int64)


def _gap(places: NDArray[np.int64], differences: Array) -> float:
    """Compute ``sum_b n_b * |mean of the differences in bin b|``."""
    return float(np.abs(np.bincount(places, weights=differences)).sum())


def _labels(labels: ArrayLike, p: Array) -> NDArray[np.int64]:
    y = _array(labels)
    if y.shape != p.shape[:1] or y.dtype.kind not in "iu":
        raise ShapeError(f"labels must be {len(p)} integers, one an example, found {y.dtype} {y.shape}")
    outside = np.flatnonzero((y < 0) | (y >= p.shape[1]))
    if len(outside):
        first = outside[0]
        raise ShapeError(f"labels[{first}] is {y[first]}, but probs has the classes 0 to {p.shape[1] - 1}")
    return y.astype(np.int64)


def _probabilities(probs: ArrayLike) -> Array:
    found = _array(probs)
    if found.ndim != 2 or found.size == 0 or found.dtype.kind not in "fiu":
        raise ShapeError(f"probs must be probabilities (B, C), none empty, found {found.dtype} {found.shape}")
    p = found.astype(np.float64)
    with np.errstate(invalid="ignore"):
        rows = p.sum(axis=1)
    # Comparisons with NaN are false, so a NaN is caught here too.
    bad = np.flatnonzero(~((np.abs(rows - 1.0) <= SUM_TOLERANCE) & (p >= 0.0).all(axis=1)))
    if len(bad):
        raise ShapeError(
            f"probs[{bad[0]}] is no distribution: its smallest entry is {p[bad[0]].min():g} and it sums to "
            f"{rows[bad[0]]:g}; give probabilities that sum to 1, not logits"
        )
    rounded = np.abs(rows - 1.0) > SUM_ROUNDING
    p[rounded] /= rows[rounded, None]
    return p


def _array(values: Any) -> NDArray[Any]:
    """Return an array of numbers, also of a PyTorch tensor on any device, and of bfloat16, which NumPy lacks.

    Raises:
        ShapeError: masked entries, which an array has no more.
    """
    if np.ma.is_masked(values):
        raise ShapeError("an array has masked entries: leave these examples out of the probabilities and the labels")
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if "bfloat16" in str(values.dtype) else values
    found = np.asarray(values)
    return found.astype(np.float32) if found.dtype.name == "bfloat16" else found
