"""Scores of a classifier's probabilities, in float64.

``B`` examples, ``C`` classes, ``M`` members. Every score takes the probabilities (B, C) of one prediction, such as an
ensemble's mean, and the labels (B,), and is a mean over the examples: score the whole set at once, since a mean of
means over batches weighs the examples of a short last batch more.

Rows may miss a sum of 1 by up to 1e-3, as half precision does, and are taken as they are.

The confidence of a prediction is its largest probability, at most 1. No score depends on the order of the examples:
equal confidences stay in one bin, and where examples are ranked by confidence, a score is its expectation over the
random orders of those that are tied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensembler.calibration import FLOOR, temper
from ensembler.errors import ShapeError, UsageError

__all__ = [
    "FLOOR",
    "TEMPERATURES",
    "Reliability",
    "RiskCoverage",
    "accuracy",
    "adaptive_ece",
    "aurc",
    "brier",
    "classwise_ece",
    "ece",
    "ensemble_log_probs",
    "fit_temperature",
    "mce",
    "member_scores",
    "misclassification_auroc",
    "nll",
    "reliability",
    "risk_at_coverage",
    "risk_coverage",
    "scores",
    "temper",
]

Array = NDArray[np.float64]

TEMPERATURES = (0.01, 100.0)
"""Where :func:`fit_temperature` looks."""

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
    return _Prediction(probs, labels).accuracy()


def nll(probs: ArrayLike, labels: ArrayLike) -> float:
    """Mean of ``-log p[label]`` in nats.

    Probabilities below ``FLOOR`` count as ``FLOOR``, so a label held impossible costs 87.3 nats and not infinity.
    """
    return _Prediction(probs, labels).nll()


def brier(probs: ArrayLike, labels: ArrayLike) -> float:
    """``sum_c (p_c - [c = label])**2``, averaged over the examples (Brier 1950); in [0, 2]."""
    return _Prediction(probs, labels).brier()


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
    return _Prediction(probs, labels).ece(bins)


def mce(probs: ArrayLike, labels: ArrayLike, bins: int = 15) -> float:
    """Maximum calibration error: the largest ``|accuracy_b - confidence_b|`` of ``ece``'s bins that hold any example.

    Naeini et al. 2015; netcal's. One example alone in a bin counts as much as a thousand.
    """
    return _Prediction(probs, labels).mce(bins)


def adaptive_ece(probs: ArrayLike, labels: ArrayLike, bins: int = 15) -> float:
    """``ece`` over bins of equal mass, a share of ``1 / bins`` of the examples each (Nguyen & O'Connor 2015).

    A bin's upper edge is the confidence of rank ``ceil(b * B / bins)``, and belongs to it; equal confidences stay
    together, in the first bin that reaches them, so bins are larger or empty where there are many.
    """
    return _Prediction(probs, labels).adaptive_ece(bins)


def classwise_ece(probs: ArrayLike, labels: ArrayLike, bins: int = 15) -> float:
    """The binned calibration error of every class's own probability, averaged over the classes; in [0, 1].

    ``1 / C * sum_c sum_b n_bc / B * |frequency of c in the bin - mean p_c in it|`` over ``ece``'s bins (Kull et al.
    2019, https://arxiv.org/abs/1910.12656; Nixon et al. 2019's SCE, https://arxiv.org/abs/1904.01685).
    """
    return _Prediction(probs, labels).classwise_ece(bins)


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
    prediction = _Prediction(probs, labels)
    places = np.searchsorted(_edges(bins)[1:], prediction.confidence, side="left")
    count = np.bincount(places, minlength=bins)

    def mean(values: Array) -> Array:
        sums = np.bincount(places, weights=values, minlength=bins)
        means: Array = np.divide(sums, count, out=np.full(bins, np.nan), where=count > 0)
        return means

    return Reliability(mean(prediction.confidence), mean(prediction.correct.astype(np.float64)), count)


@dataclass(frozen=True, eq=False)
class RiskCoverage:
    """The error rate among the most confident examples.

    Attributes:
        coverage: (points,) the share of examples kept, rising to 1.
        risk: (points,) the share of errors among them.
    """

    coverage: Array
    risk: Array


def risk_coverage(probs: ArrayLike, labels: ArrayLike, points: int = 201) -> RiskCoverage:
    """The risk-coverage curve (Geifman & El-Yaniv 2017, https://arxiv.org/abs/1705.08500), at most ``points`` of it.

    Raises:
        ShapeError: probabilities or labels of the wrong shape or range.
        UsageError: fewer than two points.
    """
    if points < 2:
        raise UsageError(f"a curve has at least 2 points, not {points}")
    risk = _Prediction(probs, labels).risk
    kept = np.unique(np.linspace(1, len(risk), points).round().astype(np.int64))
    return RiskCoverage(kept / len(risk), risk[kept - 1])


def aurc(probs: ArrayLike, labels: ArrayLike) -> float:
    """Area under the risk-coverage curve: the mean over k = 1 to B of the error rate of the k most confident.

    Geifman, Uziel & El-Yaniv 2019 (https://arxiv.org/abs/1805.08206); in [0, 1], lower is better. A perfect
    order of the examples is not worth 0: that would take a perfect classifier, too.
    """
    return _Prediction(probs, labels).aurc()


def risk_at_coverage(probs: ArrayLike, labels: ArrayLike, coverage: float) -> float:
    """Error rate of the ``ceil(coverage * B)`` most confident examples; coverage in (0, 1].

    Raises:
        ShapeError: probabilities or labels of the wrong shape or range.
        UsageError: a coverage outside (0, 1].
    """
    return _Prediction(probs, labels).risk_at(coverage)


def misclassification_auroc(probs: ArrayLike, labels: ArrayLike) -> float | None:
    """Probability that a right answer is more confident than a wrong one, ties counting half; in [0, 1].

    The area under the ROC curve of the confidence with the errors as the negative class (Hendrycks & Gimpel 2017,
    https://arxiv.org/abs/1610.02136), scikit-learn's. ``None`` where all answers are right, or all wrong.
    """
    return _Prediction(probs, labels).misclassification_auroc()


def fit_temperature(probs: ArrayLike, labels: ArrayLike) -> float:
    """The temperature T at which ``temper(probs, T)`` has the least NLL (Guo et al. 2017, sec. 4.2).

    Given an ensemble's mean, this is "pool, then scale" (Rahaman & Thiery 2021, https://arxiv.org/abs/2007.08792).
    "Calibrated NLL" is ``nll(temper(probs, T), labels)`` with T fitted on *other* examples.

    Args:
        probs: (B, C) probabilities.
        labels: (B,) classes.

    Returns:
        T in ``TEMPERATURES``; 1 where the examples cannot tell: every label is the most probable class, so that NLL
        falls for ever as T falls, or all classes are equally probable everywhere.

    Raises:
        ShapeError: probabilities or labels of the wrong shape or range.
    """
    from scipy.optimize import brentq

    # Not netcal's TemperatureScaling: where every label is the most probable class its optimiser stops wherever its
    # tolerance lets it, and it clips probabilities at 2e-16 (36 nats) where NLL is measured down to FLOOR (87).
    prediction = _Prediction(probs, labels)
    logs = np.log(np.maximum(prediction.p, FLOOR))
    of_label = logs[np.arange(len(logs)), prediction.y]
    if (of_label >= logs.max(axis=1)).all():
        return 1.0

    def slope(log_temperature: float) -> float:
        """The derivative of NLL by 1 / T, which only rises with 1 / T: NLL is convex in it."""
        q = temper(prediction.p, math.exp(log_temperature))
        return float(((q * logs).sum(axis=1) - of_label).mean())

    low, high = map(math.log, TEMPERATURES)
    if slope(high) >= 0:
        return TEMPERATURES[1]
    if slope(low) <= 0:
        return TEMPERATURES[0]
    return math.exp(brentq(slope, low, high, xtol=1e-12))


def scores(probs: ArrayLike, labels: ArrayLike) -> dict[str, float | None]:
    """Every score that needs no more than (B, C) probabilities and the labels, by name; 15 bins where there are any.

    ``error`` is 1 - accuracy, ``risk_at_80`` the risk at a coverage of 0.8. Only ``misclassification_auroc`` may be
    ``None``.

    Raises:
        ShapeError: probabilities or labels of the wrong shape or range.
    """
    prediction = _Prediction(probs, labels)
    right = prediction.accuracy()
    return {
        "accuracy": right,
        "error": 1.0 - right,
        "nll": prediction.nll(),
        "brier": prediction.brier(),
        "ece": prediction.ece(),
        "adaptive_ece": prediction.adaptive_ece(),
        "classwise_ece": prediction.classwise_ece(),
        "mce": prediction.mce(),
        "aurc": prediction.aurc(),
        "risk_at_80": prediction.risk_at(0.8),
        "misclassification_auroc": prediction.misclassification_auroc(),
    }


def member_scores(members: ArrayLike, labels: ArrayLike) -> list[dict[str, float]]:
    """Accuracy and NLL of each member by itself.

    Args:
        members: (M, B, C) probabilities.
        labels: (B,) classes.

    Raises:
        ShapeError: probabilities or labels of the wrong shape or range.
    """
    predictions = [_Prediction(member, labels) for member in _probabilities(members, "members", "(M, B, C)")]
    return [{"accuracy": prediction.accuracy(), "nll": prediction.nll()} for prediction in predictions]


class _Prediction:
    """Probabilities (B, C) and labels (B,), checked once, and what several scores need of them."""

    def __init__(self, probs: ArrayLike, labels: ArrayLike) -> None:
        self.p = _probabilities(probs, "probs", "(B, C)")
        self.y = _labels(labels, self.p)

    @cached_property
    def confidence(self) -> Array:
        confidence: Array = np.minimum(self.p.max(axis=1), 1.0)
        return confidence

    @cached_property
    def correct(self) -> NDArray[np.bool_]:
        correct: NDArray[np.bool_] = self.p.argmax(axis=1) == self.y
        return correct

    @cached_property
    def risk(self) -> Array:
        """(B,) error rate of the k most confident examples, k = 1 to B."""
        order = np.argsort(-self.confidence)
        errors = np.concatenate([[0], np.cumsum(~self.correct[order])])
        ends = np.concatenate([[0], np.flatnonzero(np.diff(self.confidence[order], append=-1.0)) + 1])
        # The first j of m tied examples with e errors hold e * j / m errors in expectation: a straight line.
        kept = np.arange(1, len(order) + 1)
        risk: Array = np.interp(kept, ends, errors[ends]) / kept
        return risk

    def accuracy(self) -> float:
        return float(self.correct.mean())

    def nll(self) -> float:
        return float(-np.log(np.maximum(self.p[np.arange(len(self.y)), self.y], FLOOR)).mean())

    def brier(self) -> float:
        return float((self._errors**2).sum(axis=1).mean())

    def ece(self, bins: int = 15) -> float:
        from netcal.metrics import ECE  # loads torch, pyro and gpytorch: seconds

        _edges(bins)
        return float(ECE(bins=int(bins)).measure(*self._for_netcal()))

    def mce(self, bins: int = 15) -> float:
        from netcal.metrics import MCE

        _edges(bins)
        return float(MCE(bins=int(bins)).measure(*self._for_netcal()))

    def adaptive_ece(self, bins: int = 15) -> float:
        # netcal's ACE weighs all bins alike, and its equal_intervals=False fails where two edges are equal, as they are
        # as soon as one bin's worth of confidences is: a float32 softmax often says exactly 1.
        _edges(bins)
        last = -(-np.arange(1, bins + 1) * len(self.y) // bins) - 1
        places = np.searchsorted(np.sort(self.confidence)[last], self.confidence, side="left")
        return _gap(places, self.correct - self.confidence) / len(self.y)

    def classwise_ece(self, bins: int = 15) -> float:
        # netcal would take a call a class, 1.5 ms each for 10,000 examples.
        places = np.searchsorted(_edges(bins)[1:], np.minimum(self.p, 1.0), side="left")
        places += bins * np.arange(self.p.shape[1])
        return _gap(places.ravel(), self._errors.ravel()) / self.p.size

    def aurc(self) -> float:
        return float(self.risk.mean())

    def risk_at(self, coverage: float) -> float:
        if not 0 < coverage <= 1:
            raise UsageError(f"coverage must lie in (0, 1], not {coverage}")
        kept = max(1, math.ceil(round(coverage * len(self.risk), 6)))  # 0.07 * 100 is 7.000000000000001
        return float(self.risk[kept - 1])

    def misclassification_auroc(self) -> float | None:
        from sklearn.metrics import roc_auc_score

        return float(roc_auc_score(self.correct, self.confidence)) if 0 < self.correct.mean() < 1 else None

    @cached_property
    def _errors(self) -> Array:
        errors = self.p.copy()
        errors[np.arange(len(self.y)), self.y] -= 1.0
        return errors

    def _for_netcal(self) -> tuple[Array, NDArray[np.int64]]:
        # Given probabilities (B, C), netcal takes any two or fewer distinct labels for a binary problem: it then fails
        # for C > 2, scores class 1 and not the top class for C = 2, and calls a perfect single class wholly
        # miscalibrated. "Is the top class right?" is a binary problem, whatever the labels. Its bins are right-open:
        # one step down from an edge is the bin below, and moves no other confidence to another bin.
        return np.nextafter(self.confidence, 0.0), self.correct.astype(np.int64)


def _gap(places: NDArray[np.int64], differences: Array) -> float:
    """``sum_b n_b * |mean of the differences in bin b|``."""
    return float(np.abs(np.bincount(places, weights=differences)).sum())


def _edges(bins: int) -> Array:
    if bins < 1:
        raise UsageError(f"bins is {bins}; give at least 1")
    edges: Array = np.linspace(0.0, 1.0, bins + 1)
    return edges


def _labels(labels: ArrayLike, p: Array) -> NDArray[np.int64]:
    y = np.asarray(labels)
    if y.shape != p.shape[:1] or y.dtype.kind not in "iu":
        raise ShapeError(f"labels must be {len(p)} integers, one an example, found {y.dtype} {y.shape}")
    outside = np.flatnonzero((y < 0) | (y >= p.shape[1]))
    if len(outside):
        first = outside[0]
        raise ShapeError(f"labels[{first}] is {y[first]}, but probs has the classes 0 to {p.shape[1] - 1}")
    return y.astype(np.int64)


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
