"""Means over seeds, with intervals over seeds and images that hold for a few seeds, too.

All runs of a study are scored on the same images, so the design is crossed, as where several readers judge the same
cases (Obuchowski & Rockette 1995, Communications in Statistics 24, 285-308). A mean over S seeds varies with the
seeds, by their standard error, and with the images, by the covariance that the seeds' scores have over resamples of the
images. Each part has its own Student's t, and the two half-widths add in quadrature (MOVER, Zou & Donner 2008,
https://doi.org/10.1002/sim.3095). Resampled seeds would be too alike: intervals at 95 % from two seeds then hold as
seldom as 59 % of the time. The same resamples serve every method: differences are paired by seed and image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ensembler.calibration_maps import temper
from ensembler.eval.metrics.comparison import Losses, resample
from ensembler.eval.scoring import ScoredRun
from ensembler.seeds import derive
from ensembler.study.schema import Estimate

__all__ = ["CONFIDENCE", "RESAMPLES", "Scored", "auroc", "behind", "estimate", "mean", "scored"]

Array = NDArray[np.float64]

RESAMPLES, CONFIDENCE = 1000, 0.95
_ROWS = 50  # resamples of an AUROC at once


@dataclass(frozen=True, eq=False)
class Scored:
    """A score of one run.

    Attributes:
        value: on the test images.
        drawn: (R,) on each resample of them.
        examples: the number of images.
    """

    value: float
    drawn: Array
    examples: int


def scored(run: ScoredRun, labels: NDArray[np.int64], temperature: float | None) -> dict[str, Scored]:
    """Compute a run's scores and those on each resample of the test images.

    Args:
        run: with its predictions.
        labels: (B,) of the test images.
        temperature: fitted on the validation images; without one, there is no calibrated NLL.
    """
    found = _of(run.losses, ("error", "nll", "ece"))
    if temperature is not None:
        calibrated = Losses.of(temper(run.clean.mean, temperature), labels)
        found["calibrated_nll"] = _of(calibrated, ("nll",))["nll"]
    if run.shifted is not None:
        found |= {f"shifted_{name}": one for name, one in _of(run.shifted, ("nll", "ece")).items()}
    if run.shifted_calibrated is not None:
        found["shifted_calibrated_nll"] = _of(run.shifted_calibrated, ("nll",))["nll"]
    outside = [values for name, values in run.entropies.items() if name != "clean"]
    if outside:
        each = [auroc(run.entropies["clean"], values) for values in outside]
        value, drawn = float(np.mean([one.value for one in each])), np.mean([one.drawn for one in each], axis=0)
        found["ood_auroc"] = Scored(value, drawn, min(one.examples for one in each))
    return found


def _of(losses: Losses, names: Sequence[str]) -> dict[str, Scored]:
    """The scores of these names."""
    resampled = resample(losses, RESAMPLES)
    places = list(resampled.scores)
    found = {}
    for name in names:
        value, drawn = resampled.scores[name], resampled.drawn[:, places.index(name)]
        found[name] = Scored(value, drawn, len(losses.error))
    return found


def auroc(inside: NDArray[np.floating], outside: NDArray[np.floating]) -> Scored:
    """Compute the probability that an image outside scores above one inside, a tie counting half; both resampled."""
    order = np.sort(inside)
    left, right = np.searchsorted(order, outside, "left"), np.searchsorted(order, outside, "right")
    places = np.argsort(inside, kind="stable")
    rng = np.random.default_rng(derive(0, "out of distribution"))

    def weighted(within: Array, without: Array) -> Array:
        below = np.concatenate([np.zeros((len(within), 1)), within[:, places].cumsum(axis=1)], axis=1)
        wins = (below[:, left] + below[:, right]) / 2
        return np.einsum("rn,rn->r", without, wins) / (len(inside) * len(outside))

    drawn = [
        weighted(_counts(rng, rows, len(inside)), _counts(rng, rows, len(outside)))
        for rows in (min(_ROWS, RESAMPLES - start) for start in range(0, RESAMPLES, _ROWS))
    ]
    value = weighted(np.ones((1, len(inside))), np.ones((1, len(outside))))
    return Scored(float(value[0]), np.concatenate(drawn), min(len(inside), len(outside)))


def _counts(rng: np.random.Generator, rows: int, size: int) -> Array:
    """Draw how often each of ``size`` examples is in a resample, (rows, size)."""
    drawn = rng.integers(0, size, (rows, size)) + size * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size).astype(np.float64)


def mean(runs: Sequence[Mapping[str, Scored]], name: str) -> Estimate:
    """The mean of a score over seeds; its interval ends where the score's range does."""
    found = estimate([one[name] for one in runs])
    most = math.inf if name.endswith("nll") else 1.0
    return found.model_copy(update={"low": max(0.0, found.low), "high": min(most, found.high)})


def behind(methods: Sequence[Sequence[Mapping[str, Scored]]], best: int, name: str) -> list[Estimate]:
    """A score of each of K methods minus that of one of them, the best, paired by seed and image.

    Seeds are blocks of an analysis of variance: what they do to differences between methods is estimated from all K
    methods, with (K - 1) (S - 1) degrees of freedom, or from the two alone where that is more. Of many methods the
    lowest is low by chance, too, so the intervals hold together, each at a confidence of
    ``1 - (1 - CONFIDENCE) / (K - 1)`` (Bonferroni): the method that is truly the best is called worse in at most 5 % of
    studies (Hsu 1981, Annals of Statistics 9, 1026-1034).

    Args:
        methods: the scores of each one's runs, one a seed.
        best: which one.
        name: of the score.
    """
    scores = [[run[name] for run in runs] for runs in methods]
    values = np.array([[one.value for one in runs] for runs in scores])  # (K, S)
    rest = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()
    freedom = (len(values) - 1) * (values.shape[1] - 1)
    together = 1 - (1 - CONFIDENCE) / max(1, len(values) - 1)
    pooled = 2 * (rest**2).sum() / max(1, freedom)
    own = ((rest - rest[best]) ** 2).sum(axis=1) / max(1, values.shape[1] - 1)
    pairs = [
        [Scored(a.value - b.value, a.drawn - b.drawn, a.examples) for a, b in zip(runs, scores[best], strict=True)]
        for runs in scores
    ]
    return [
        estimate(each, together, (float(max(pooled, variance)), freedom))
        for each, variance in zip(pairs, own, strict=True)
    ]


def estimate(
    runs: Sequence[Scored], confidence: float = CONFIDENCE, between: tuple[float, int] | None = None
) -> Estimate:
    """The mean over seeds, with its interval; that of one seed is over images only.

    Args:
        runs: one a seed, on the same images, two at least.
        confidence: of the interval, in (0, 1).
        between: the variance between seeds, and its degrees of freedom; by default, that of these runs.
    """
    from scipy.stats import t

    S, values = len(runs), np.array([one.value for one in runs])
    covariance = np.atleast_2d(np.cov([one.drawn for one in runs]))
    shared = covariance[~np.eye(S, dtype=bool)].mean() if S > 1 else covariance[0, 0]
    level = (1 + confidence) / 2
    half = t.ppf(level, max(1, runs[0].examples - 1)) * math.sqrt(max(0.0, shared))
    if S > 1:
        variance, freedom = between or (values.var(ddof=1), S - 1)
        half = math.hypot(half, t.ppf(level, freedom) * math.sqrt(variance / S))
    centre = float(values.mean())
    return Estimate(mean=centre, low=centre - half, high=centre + half)
