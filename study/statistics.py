"""Means over seeds with intervals over seeds and images: both are resampled, seeds first, then images.

All runs of a study are scored on the same images, so the design is crossed: each resample draws the seeds, and one set
of images for all of them (Owen 2007, "The pigeonhole bootstrap", https://arxiv.org/abs/0712.1111). The same resamples
serve every method, so that differences are paired by seed and image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ensembler.calibration_maps import temper
from ensembler.eval.metrics.comparison import Losses, resample
from ensembler.eval.scoring import ScoredRun
from ensembler.seeds import derive
from ensembler.study.schema import Estimate

__all__ = ["CONFIDENCE", "RESAMPLES", "Scored", "auroc", "difference", "draw_seeds", "estimate", "scored"]

Array = NDArray[np.float64]

RESAMPLES, CONFIDENCE = 1000, 0.95
_ROWS = 50  # resamples of an AUROC at once


@dataclass(frozen=True, eq=False)
class Scored:
    """A score of one run.

    Attributes:
        value: on the test images.
        drawn: (R,) on each resample of them.
    """

    value: float
    drawn: Array


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
        found["ood_auroc"] = Scored(value, drawn)
    return found


def _of(losses: Losses, names: Sequence[str]) -> dict[str, Scored]:
    """The scores of these names; that of ECE, which resampling raises, is centred on its value."""
    resampled = resample(losses, RESAMPLES)
    places = list(resampled.scores)
    found = {}
    for name in names:
        value, drawn = resampled.scores[name], resampled.drawn[:, places.index(name)]
        found[name] = Scored(value, drawn + (value - drawn.mean()) if name == "ece" else drawn)
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
    return Scored(float(value[0]), np.concatenate(drawn))


def _counts(rng: np.random.Generator, rows: int, size: int) -> Array:
    """Draw how often each of ``size`` examples is in a resample, (rows, size)."""
    drawn = rng.integers(0, size, (rows, size)) + size * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size).astype(np.float64)


def draw_seeds(count: int) -> NDArray[np.int64]:
    """Draw the seeds of each resample, (R, count) of ``count``: the same for every method."""
    return np.random.default_rng(derive(0, "seeds")).integers(0, count, (RESAMPLES, count))


def estimate(runs: Sequence[Scored], seeds: NDArray[np.int64]) -> Estimate:
    """The mean over seeds, with its percentile interval.

    Args:
        runs: one a seed.
        seeds: of :func:`draw_seeds`.
    """
    drawn = np.stack([one.drawn for one in runs], axis=1)  # (R, S)
    means = np.take_along_axis(drawn, seeds, axis=1).mean(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()
    return Estimate(mean=float(np.mean([one.value for one in runs])), low=low, high=high)


def difference(
    ours: Sequence[Mapping[str, Scored]], theirs: Sequence[Mapping[str, Scored]], name: str, seeds: NDArray[np.int64]
) -> Estimate:
    """A score of some runs minus that of others, paired by seed and image."""
    pairs = [
        Scored(a[name].value - b[name].value, a[name].drawn - b[name].drawn) for a, b in zip(ours, theirs, strict=True)
    ]
    return estimate(pairs, seeds)
