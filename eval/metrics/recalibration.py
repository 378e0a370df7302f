"""Fits of a calibration: maps of the probabilities, and a threshold with a certified selective risk.

They are applied by :mod:`ensembler.calibration` and :mod:`ensembler.calibration_maps`.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensembler.calibration import Abstention
from ensembler.calibration_maps import FLOOR, Beta, Histogram, Isotonic, Map, Temperature, bin_indices, temper
from ensembler.errors import UsageError
from ensembler.eval.metrics.classification import BINS, Answers

__all__ = ["METHODS", "TEMPERATURES", "certify", "fit_map", "fit_temperature", "fit_threshold"]

METHODS = ("temperature", "isotonic", "beta", "histogram")
TEMPERATURES = (0.01, 100.0)
"""The range of :func:`fit_temperature`."""

_CANDIDATES = 100  # thresholds tried

Array = NDArray[np.float64]


def fit_temperature(probs: ArrayLike, labels: ArrayLike) -> float:
    """Fit the temperature T at which ``temper(probs, T)`` has the lowest NLL (Guo et al. 2017, sec. 4.2).

    For an ensemble's mean, this is "pool, then scale" (Rahaman & Thiery 2021, https://arxiv.org/abs/2007.08792).
    "Calibrated NLL" is ``nll(temper(probs, T), labels)`` with T fitted on *other* examples.

    Args:
        probs: (B, C) probabilities.
        labels: (B,) classes.

    Returns:
        T in ``TEMPERATURES``; 1 where the NLL has no minimum: every label is the most probable class, so that the NLL
        decreases with T, or all classes are equally probable everywhere.

    Raises:
        ShapeError: probabilities or labels of the wrong shape or range.
    """
    from scipy.optimize import brentq

    # Not netcal's TemperatureScaling: if every label is the most probable class, its optimiser stops anywhere, and it
    # clips probabilities at 2e-16 (36 nats), where our NLL is measured down to FLOOR (87).
    answers = Answers(probs, labels)
    logs = np.log(np.maximum(answers.p, FLOOR))
    of_label = logs[np.arange(len(logs)), answers.y]
    if (of_label >= logs.max(axis=1)).all():
        return 1.0

    def slope(log_temperature: float) -> float:
        """Compute the derivative of the NLL by 1 / T, which increases with 1 / T: the NLL is convex in it."""
        q = temper(answers.p, math.exp(log_temperature))
        return float(((q * logs).sum(axis=1) - of_label).mean())

    low, high = map(math.log, TEMPERATURES)
    if slope(high) >= 0:
        return TEMPERATURES[1]
    if slope(low) <= 0:
        return TEMPERATURES[0]
    return math.exp(brentq(slope, low, high, xtol=1e-12))


def fit_map(probs: Array, labels: NDArray[np.int64], method: str) -> Map:
    """Fit one of ``METHODS``, or the identity, to probabilities (B, C) and labels (B,).

    But for the temperature, maps treat each class separately and normalise the rows. Isotonic regression and
    histograms can give a class the probability 0; a row where all classes get 0 stays as it was.

    Raises:
        UsageError: an unknown method, or a class without examples, which netcal would give the probability 0.
        ShapeError: probabilities or labels of the wrong shape or range.
    """
    if method == "identity":
        return Temperature(temperature=1.0)
    if method == "temperature":
        return Temperature(temperature=fit_temperature(probs, labels))
    answers = Answers(probs, labels)
    if method not in METHODS:
        raise UsageError(f"unknown method {method!r}: use one of {', '.join(METHODS)}, identity")
    if probs.shape[1] < 2:
        raise UsageError(f"{method} calibrates two classes or more, found one: use --method temperature")
    if len(missing := np.setdiff1d(np.arange(probs.shape[1]), labels)):
        raise UsageError(
            f"{method} needs examples of every class, and of class {missing[0]} there is none among the {len(labels)} "
            "that fit the map: use --method temperature"
        )
    if method == "histogram":
        return _histogram(answers.p, answers.y)
    fitted = _fit_netcal(np.minimum(answers.p, 1.0), answers.y, method)
    if method == "beta":
        sites = {name: np.asarray(site["values"], dtype=np.float64) for name, site in fitted._sites.items()}
        ab, c = sites["weights"].reshape(-1, 2), sites["bias"]
        if len(c) == 1:  # a sigmoid is a softmax beside a 0
            ab, c = np.vstack([[0.0, 0.0], ab]), np.append(0.0, c)
        return Beta(a=ab[:, 0].tolist(), b=ab[:, 1].tolist(), c=c.tolist())
    one_vs_rest = [model for _, model in fitted._multiclass_instances] or [fitted]
    return Isotonic(
        x=[model._iso.X_thresholds_.tolist() for model in one_vs_rest],
        y=[model._iso.y_thresholds_.tolist() for model in one_vs_rest],
    )


def _fit_netcal(probs: Array, labels: NDArray[np.int64], method: str) -> Any:
    from netcal.binning import IsotonicRegression
    from netcal.scaling import BetaCalibration

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pyro's, of netcal's calls
        if method == "beta":
            return BetaCalibration().fit(probs, labels, tensorboard=False)
        return IsotonicRegression().fit(probs, labels)


def _histogram(p: Array, y: NDArray[np.int64]) -> Histogram:
    """Compute each class's frequency in each bin of its probability; the middle of a bin that is empty.

    netcal's, but for its edges: it fits right-open bins and applies left-open ones, which puts votes (1 of 3 members)
    into one bin and reads another.
    """
    first = 1 if p.shape[1] == 2 else 0
    places = bin_indices(p, BINS)
    middles = (np.arange(BINS) + 0.5) / BINS
    rows = []
    for c in range(first, p.shape[1]):
        count = np.bincount(places[:, c], minlength=BINS)
        hits = np.bincount(places[:, c], weights=y == c, minlength=BINS)
        rows.append(np.where(count > 0, hits / np.maximum(count, 1), middles).tolist())
    return Histogram(y=rows)


def certify(
    confidence: Array, correct: NDArray[np.bool_], thresholds: Array, risk: float, delta: float
) -> float | None:
    """Find the last of a sequence of thresholds at which the selective risk is certified, by Learn-then-Test.

    At each threshold in order, the hypothesis "more than a share ``risk`` of the answers is wrong" is tested at level
    ``delta`` by the exact binomial tail ``P(Bin(answers, risk) <= wrong answers)``, until the first that is not
    rejected (fixed-sequence testing: Angelopoulos et al. 2021, https://arxiv.org/abs/2110.01052). With probability
    1 - delta no certified threshold has a true risk above ``risk``, however long the sequence.

    Args:
        confidence: (B,) of examples on which neither the confidence nor the thresholds were fitted.
        correct: (B,) whether each answer is right.
        thresholds: (T,) in the order of testing.
        risk: in (0, 1).
        delta: in (0, 1).

    Returns:
        The threshold; ``None`` if the first is not certified.
    """
    answered, wrong = _count(confidence, correct, thresholds)
    held = _p_values(answered, wrong, risk) <= delta
    certified = len(held) if held.all() else int(held.argmin())
    return float(thresholds[certified - 1]) if certified else None


def fit_threshold(
    seen: Array, seen_labels: NDArray[np.int64], p: Array, y: NDArray[np.int64], risk: float, confidence: float
) -> Abstention:
    """Fit the lowest threshold of the confidence that :func:`certify` certifies.

    The sequence of thresholds, from the most promising one down to 0, is chosen on other examples than certify it.

    Args:
        seen: probabilities (B, C) of the examples that choose the sequence.
        seen_labels: their labels (B,).
        p: probabilities of the held-out examples that certify it.
        y: their labels.
        risk: the highest error rate among the answers.
        confidence: the probability that it holds.
    """
    sure = np.sort(seen.max(axis=1))[::-1]
    ranks = -(-np.arange(1, _CANDIDATES + 1) * len(sure) // _CANDIDATES) - 1
    thresholds = np.append(np.unique(sure[ranks])[::-1], 0.0)
    looks = _p_values(*_count(seen.max(axis=1), seen.argmax(axis=1) == seen_labels, thresholds), risk)
    found = certify(p.max(axis=1), p.argmax(axis=1) == y, thresholds[looks.argmin() :], risk, 1 - confidence)
    answered, wrong = _count(p.max(axis=1), p.argmax(axis=1) == y, np.array([math.inf if found is None else found]))
    return Abstention(risk=risk, confidence=confidence, threshold=found, answered=int(answered[0]), wrong=int(wrong[0]))


def _count(
    confidence: Array, correct: NDArray[np.bool_], thresholds: Array
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count the examples (T,) that reach each threshold, and the wrong ones among them."""
    rising, wrong = np.sort(confidence), np.sort(confidence[~correct])
    return len(rising) - np.searchsorted(rising, thresholds), len(wrong) - np.searchsorted(wrong, thresholds)


def _p_values(answered: NDArray[np.int64], wrong: NDArray[np.int64], risk: float) -> Array:
    from scipy.stats import binom

    return binom.cdf(wrong, answered, risk)
