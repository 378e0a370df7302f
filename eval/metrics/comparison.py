"""Paired comparison of ensembles on the same examples: differences of scores, with bootstrap intervals.

The scores are error, NLL, Brier score and ECE in 15 bins; lower is better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensembler.calibration_maps import bin_indices
from ensembler.errors import ShapeError, UsageError
from ensembler.eval.metrics.classification import BINS, Answers
from ensembler.record import Record
from ensembler.seeds import derive

__all__ = ["ROUNDING", "Difference", "Losses", "Resampled", "Spread", "best", "differences", "resample", "spread"]

Array = NDArray[np.float64]

_MEANS = ("error", "nll", "brier")  # scores that are means over the examples
ROUNDING = 1e-6
"""Of scores of float32 predictions: a smaller difference is none, however often it is drawn."""

_DRAWS = 2_000_000  # examples drawn at once in a bootstrap: some 50 MB


class Difference(Record):
    """A score of ``a`` minus that of ``b``; negative where ``a`` is better.

    Attributes:
        difference: on the examples themselves.
        low, high: the expanded percentile interval of the bootstrap.
        probability_better: share of the resamples in which ``a`` has the lower score; a tie counts half. It accounts
            for the choice of test examples, not for that of the training seed.
    """

    difference: float
    low: float
    high: float
    probability_better: float


@dataclass(frozen=True, eq=False)
class Losses:
    """The losses of each example, from which a bootstrap computes a run's scores.

    Attributes:
        error, nll, brier: (B,) each example's loss; under shift, its mean over the cells.
        confidence: (cells, B) largest probability.
        correct: (cells, B) whether the answer is right.
    """

    error: Array
    nll: Array
    brier: Array
    confidence: Array
    correct: NDArray[np.bool_]

    @classmethod
    def of(cls, probs: ArrayLike, labels: ArrayLike) -> Losses:
        """Compute the losses of probabilities (B, C).

        Raises:
            ShapeError: probabilities or labels of the wrong shape or range.
        """
        answers = Answers(probs, labels)
        return cls(
            error=(~answers.correct).astype(np.float64),
            nll=answers.label_nll,
            brier=np.einsum("bc,bc->b", answers.misses, answers.misses),
            confidence=answers.confidence[None],
            correct=answers.correct[None],
        )

    @classmethod
    def over_cells(cls, cells: Iterable[Losses]) -> Losses:
        """Combine the losses of the same examples under several corruptions (cells), in the same order.

        Scores become means over cells: an example's losses are averaged, and ECE, which is no mean over examples, is
        computed in each cell.

        Raises:
            ShapeError: no cell, or cells of different numbers of examples.
        """
        found = list(cells)
        if not found or len({len(cell.error) for cell in found}) > 1:
            sizes = sorted({len(cell.error) for cell in found})
            raise ShapeError(f"cells must hold the same examples, found cells of {sizes or 'no'} examples")
        error, nll, brier = (np.mean([getattr(cell, name) for cell in found], axis=0) for name in _MEANS)
        confidence = np.concatenate([cell.confidence for cell in found])
        return cls(error, nll, brier, confidence, np.concatenate([cell.correct for cell in found]))

    def part(self, indices: NDArray[np.int64]) -> Losses:
        """Return the losses of some of the examples."""
        return Losses(
            error=self.error[indices],
            nll=self.nll[indices],
            brier=self.brier[indices],
            confidence=self.confidence[:, indices],
            correct=self.correct[:, indices],
        )

    def scores(self) -> dict[str, float]:
        """Compute error, NLL, Brier score and ECE; the same as :mod:`ensembler.eval.metrics.classification`."""
        ones = np.ones((1, len(self.error)))
        means = {name: float(getattr(self, name).mean()) for name in _MEANS}
        return means | {"ece": float(self._ece(ones)[0])}

    @cached_property
    def gaps(self) -> Array:
        """(cells, B) 1 or 0 for a right or wrong answer, minus its confidence."""
        gaps: Array = self.correct - self.confidence
        return gaps

    @cached_property
    def bins(self) -> NDArray[np.uint8]:
        """(cells, B) the bin of the confidence, of ECE's 15."""
        return bin_indices(self.confidence, BINS).astype(np.uint8)

    def _ece(self, weights: Array) -> Array:
        """Compute the ECE (R,) of examples weighted by ``weights`` (R, B): ``sum_b |sum of the gaps in bin b| / B``."""
        total = np.zeros(len(weights))
        for gaps, bins in zip(self.gaps, self.bins, strict=True):
            table = np.zeros((len(gaps), BINS))
            table[np.arange(len(gaps)), bins] = gaps
            total += np.abs(weights @ table[:, table.any(axis=0)]).sum(axis=1)
        return total / self.gaps.size


@dataclass(frozen=True, eq=False)
class Resampled:
    """A run's scores on the test examples and on resamples of them.

    Attributes:
        scores: by name, on the examples themselves.
        drawn: (R, scores) on each resample.
        of: the seed and the numbers of examples, cells and resamples; equal for the same resamples.
    """

    scores: dict[str, float]
    drawn: Array
    of: tuple[int, ...]


def resample(losses: Losses, resamples: int = 2000, seed: int = 0) -> Resampled:
    """Compute a run's scores on bootstrap resamples of the test examples.

    Examples are drawn with replacement, under shift together with all their cells, which share an image (a cluster
    bootstrap, Davison & Hinkley 1997, sec. 3.8). The draw depends only on the seed and the numbers of examples and
    resamples, so that two runs can be compared in pairs.

    Raises:
        UsageError: no resample.
    """
    if resamples < 1:
        raise UsageError(f"a bootstrap takes at least 1 resample, not {resamples}")
    cells, examples = losses.gaps.shape
    additive = np.stack([getattr(losses, name) for name in _MEANS], axis=1)
    parts = [
        np.column_stack([weights @ additive / examples, losses._ece(weights)])
        for weights in _resamples(examples, resamples, seed)
    ]
    return Resampled(losses.scores(), np.concatenate(parts), (seed, examples, cells, resamples))


def differences(a: Resampled, b: Resampled, confidence: float = 0.95) -> dict[str, Difference]:
    """Compute the differences in error, NLL, Brier score and ECE, with paired bootstrap intervals over test examples.

    The interval is the percentile interval (Efron & Tibshirani 1993, ch. 13), expanded for few examples as Student's t
    is (Hesterberg 2015, https://arxiv.org/abs/1411.5279, sec. 5.3). So few examples that all their differences have one
    sign by chance more often than ``1 - confidence``, below 6 at 95 %, tell nothing apart: the interval then holds 0.
    A resample's difference below 1e-6, which the rounding of float32 predictions makes, counts as 0.

    ECE adds absolute values, so noise increases it, most of all where calibration is good, and a resample is noisier
    than the sample. Its resamples are therefore shifted to have the measured difference as their mean. The interval is
    then of the *measured* difference on another test set of this size. On infinitely many examples the difference is
    usually larger: the ECE of the better calibrated run is measured too high.

    Args:
        a: of some examples.
        b: of the same examples, in the same order.
        confidence: of the interval, in (0, 1).

    Returns:
        By score: ``error``, ``nll``, ``brier``, ``ece``.

    Raises:
        ShapeError: not the same resamples.
        UsageError: a confidence out of range.
    """
    if a.of != b.of:
        raise ShapeError(
            f"runs must have the same (seed, examples, cells, resamples), found {a.of} and {b.of}: score both on the "
            "same images"
        )
    if not 0 < confidence < 1:
        raise UsageError(f"confidence must lie between 0 and 1, not {confidence}")
    drawn = a.drawn - b.drawn
    drawn[:, -1] += a.scores["ece"] - b.scores["ece"] - drawn[:, -1].mean()
    drawn = np.where(np.abs(drawn) > ROUNDING, drawn, 0.0)
    low, high = np.quantile(drawn, _levels(a.of[1], confidence), axis=0)
    if 2 * 0.5 ** a.of[1] > 1 - confidence:
        low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    better = ((1 - np.sign(drawn)).mean(axis=0) / 2).tolist()
    return {
        name: Difference(
            difference=a.scores[name] - b.scores[name],
            low=float(low[column]),
            high=float(high[column]),
            probability_better=better[column],
        )
        for column, name in enumerate(a.scores)
    }


def _levels(examples: int, confidence: float) -> tuple[float, float]:
    """Return the levels of the quantiles of an expanded percentile interval."""
    from scipy.stats import norm, t

    if examples < 2:
        return 0.0, 1.0
    scale = math.sqrt(examples / (examples - 1))
    tail = float(norm.cdf(scale * t.ppf((1 - confidence) / 2, examples - 1)))
    return tail, 1 - tail


def best(runs: Sequence[Resampled], confidence: float = 0.95) -> dict[str, list[int]]:
    """Find the run with the lowest value of each score, and those that paired intervals do not tell apart from it.

    Of many runs the lowest is low by chance, too. So the intervals of all differences from it hold together: each of
    K - 1 at a confidence of ``1 - (1 - confidence) / (K - 1)`` (Bonferroni). The run that is truly the best is then
    among those found, with ``confidence`` (Hsu 1981, Annals of Statistics 9, 1026-1034).

    Returns:
        By score: positions of ``runs``, that of the lowest value first.
    """
    together = 1 - (1 - confidence) / max(1, len(runs) - 1)
    found = {}
    for name in runs[0].scores:
        lowest = min(range(len(runs)), key=lambda place: runs[place].scores[name])
        tied = [
            place
            for place, run in enumerate(runs)
            if place != lowest and differences(run, runs[lowest], together)[name].low <= 0
        ]
        found[name] = [lowest, *tied]
    return found


def _resamples(examples: int, count: int, seed: int) -> Iterator[Array]:
    """Draw how often each resample has each example, in chunks (R, B): multinomial counts, ``count`` rows in all."""
    rng = np.random.default_rng(derive(seed, "bootstrap"))
    size = max(1, _DRAWS // examples)
    for start in range(0, count, size):
        rows = min(size, count - start)
        drawn = rng.integers(0, examples, (rows, examples))
        drawn += examples * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * examples)
        yield counts.reshape(rows, examples).astype(np.float64)


class Spread(Record):
    """Mean, minimum, maximum and sample standard deviation of n values; ``deviation`` is ``null`` if n = 1."""

    mean: float
    low: float
    high: float
    deviation: float | None
    n: int


def spread(values: Sequence[float]) -> Spread:
    """Compute the spread of at least one value.

    Raises:
        UsageError: no value.
    """
    if not len(values):
        raise UsageError("no value to take the spread of: give at least one")
    found = np.asarray(values, dtype=np.float64)
    return Spread(
        mean=float(found.mean()),
        low=float(found.min()),
        high=float(found.max()),
        deviation=float(found.std(ddof=1)) if len(found) > 1 else None,
        n=len(found),
    )
