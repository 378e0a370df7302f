"""Is one ensemble better than another, and by how much?

Pure functions of the probabilities (B, C) of one prediction. Lower is better in every score here: error, NLL, Brier
score, and ECE in 15 bins.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensembler.errors import ShapeError, UsageError
from ensembler.eval.scores.metrics import FLOOR, accuracy
from ensembler.record import Record
from ensembler.run import Manifest
from ensembler.seeds import derive

__all__ = [
    "Difference",
    "Group",
    "Losses",
    "Resampled",
    "Spread",
    "compare_losses",
    "differences",
    "group",
    "group_key",
    "paired_bootstrap",
    "resample",
    "spread",
]

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

_MEANS = ("error", "nll", "brier")  # scores that are means over the examples
BINS = 15
_DRAWS = 2_000_000  # of examples at once in a bootstrap: some 50 MB
# What two runs of one method may differ in: they change where or from which seed it ran, not what was done.
_NOT_THE_METHOD = ("seed", "device", "workers", "compile", "parallel_members", "recipe")
_BEGINNINGS = ("init", "second")


# --- differences ----------------------------------------------------------------------------------------------------


class Difference(Record):
    """A score of ``a`` less that of ``b``, of which lower is better: below 0, ``a`` is the better one.

    Attributes:
        difference: on the examples themselves.
        low, high: the percentile interval of the bootstrap.
        probability_better: share of the resamples in which ``a`` has the lower score; of a tie, half. It says how far
            the choice of test examples decides, and nothing of another training seed.
    """

    difference: float
    low: float
    high: float
    probability_better: float


@dataclass(frozen=True, eq=False)
class Losses:
    """What every example adds to the scores of one run: all that a bootstrap over examples needs.

    Attributes:
        error, nll, brier: (B,) each example's loss; under shift, its mean over the cells.
        gaps: (cells, B) 1 or 0 for a right or wrong answer, less its confidence.
        bins: (cells, B) uint8: which of ECE's 15 bins the confidence lies in.
    """

    error: Array
    nll: Array
    brier: Array
    gaps: Array
    bins: NDArray[np.uint8]

    @classmethod
    def of(cls, probs: ArrayLike, labels: ArrayLike) -> Losses:
        """Of the probabilities (B, C) of one set of images.

        Raises:
            ShapeError: probabilities or labels of the wrong shape or range.
        """
        accuracy(probs, labels)  # refuses what is no prediction
        return losses_of(np.asarray(probs, dtype=np.float64), np.asarray(labels, dtype=np.int64))

    @classmethod
    def over_cells(cls, cells: Iterable[Losses]) -> Losses:
        """Of a shift: the same examples under every cell's corruption, in the same order.

        Means of the scores over cells follow: an example's losses are averaged, and ECE, which is no mean over
        examples, is taken within each cell.

        Raises:
            ShapeError: no cell, or cells of different numbers of examples.
        """
        found = list(cells)
        if not found or len({len(cell.error) for cell in found}) > 1:
            sizes = sorted({len(cell.error) for cell in found})
            raise ShapeError(f"cells must hold the same examples, found cells of {sizes or 'no'} examples")
        error, nll, brier = (np.mean([getattr(cell, name) for cell in found], axis=0) for name in _MEANS)
        gaps, bins = (np.concatenate([getattr(cell, name) for cell in found]) for name in ("gaps", "bins"))
        return cls(error, nll, brier, gaps, bins)

    def scores(self) -> dict[str, float]:
        """Error, NLL, Brier score and ECE, as :mod:`ensembler.eval.scores.metrics` has them."""
        ones = np.ones((1, len(self.error)))
        means = {name: float(getattr(self, name).mean()) for name in _MEANS}
        return means | {"ece": float(self._ece(ones)[0])}

    def _ece(self, weights: Array) -> Array:
        """ECE (R,) of the examples counted ``weights`` (R, B) times: ``sum_b |sum of the gaps in bin b| / B``."""
        total = np.zeros(len(weights))
        for gaps, bins in zip(self.gaps, self.bins, strict=True):
            table = np.zeros((len(gaps), BINS))
            table[np.arange(len(gaps)), bins] = gaps
            total += np.abs(weights @ table[:, table.any(axis=0)]).sum(axis=1)
        return total / self.gaps.size


def losses_of(p: Array, y: Labels) -> Losses:
    examples = np.arange(len(y))
    confidence = np.minimum(p.max(axis=1), 1.0)
    right = (p.argmax(axis=1) == y).astype(np.float64)
    bins = np.searchsorted(np.linspace(0.0, 1.0, BINS + 1)[1:], confidence, side="left")  # left-open bins
    misses = p.copy()
    misses[examples, y] -= 1.0
    return Losses(
        error=1.0 - right,
        nll=-np.log(np.maximum(p[examples, y], FLOOR)),
        brier=np.einsum("bc,bc->b", misses, misses),
        gaps=(right - confidence)[None],
        bins=bins.astype(np.uint8)[None],
    )


@dataclass(frozen=True, eq=False)
class Resampled:
    """A run's scores on the test examples and on resamples of them.

    Attributes:
        scores: by name, on the examples themselves.
        drawn: (R, scores) on each resample.
        of: which resamples: the seed and the numbers of examples, cells and resamples. Equal for two runs, they are
            the same ones.
    """

    scores: dict[str, float]
    drawn: Array
    of: tuple[int, ...]


def resample(losses: Losses, resamples: int = 2000, seed: int = 0) -> Resampled:
    """A run's scores on bootstrap resamples of the test examples.

    Examples are drawn with replacement, under shift with all cells of an example: they share an image, so the image is
    what is drawn (a cluster bootstrap, Davison & Hinkley 1997, sec. 3.8). Which ones are drawn depends on the seed and
    the numbers of examples and resamples alone, so that two runs can be compared in pairs.

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
    """The differences in error, NLL, Brier score and ECE, with paired bootstrap intervals over the test examples.

    The interval is the percentile interval (Efron & Tibshirani 1993, ch. 13).

    ECE is no mean over examples: it adds absolute values, so noise raises it, most of all where calibration is good,
    and a resample is noisier than the sample. Its resamples are therefore shifted to have the measured difference as
    their mean. The interval then says where the *measured* difference would fall on another test set of this size. With
    infinitely many examples it is larger as a rule: the better calibrated run's ECE is measured too high.

    Args:
        a, b: of the same examples in the same order.
        confidence: of the interval, in (0, 1).

    Returns:
        By score: ``error``, ``nll``, ``brier``, ``ece``.

    Raises:
        ShapeError: not the same resamples.
        UsageError: a confidence out of range.
    """
    if a.of != b.of:
        raise ShapeError(
            f"runs must be resampled alike (seed, examples, cells, resamples), found {a.of} and {b.of}: score both on "
            "the same images"
        )
    if not 0 < confidence < 1:
        raise UsageError(f"confidence must lie between 0 and 1, not {confidence}")
    drawn = a.drawn - b.drawn
    drawn[:, -1] += a.scores["ece"] - b.scores["ece"] - drawn[:, -1].mean()
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0).tolist()
    better = ((1 - np.sign(drawn.round(12))).mean(axis=0) / 2).tolist()  # sums in another order are still a tie
    return {
        name: Difference(
            difference=a.scores[name] - b.scores[name],
            low=low[column],
            high=high[column],
            probability_better=better[column],
        )
        for column, name in enumerate(a.scores)
    }


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    labels: ArrayLike,
    *,
    resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Difference]:
    """:func:`differences` between two predictions (B, C) for the same examples.

    Raises:
        ShapeError: probabilities or labels of the wrong shape or range.
        UsageError: an option out of range.
    """
    one, other = Losses.of(a, labels), Losses.of(b, labels)
    return compare_losses(one, other, resamples=resamples, seed=seed, confidence=confidence)


def compare_losses(
    a: Losses, b: Losses, *, resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> dict[str, Difference]:
    """:func:`differences` between two runs; of many runs, :func:`resample` each once."""
    return differences(resample(a, resamples, seed), resample(b, resamples, seed), confidence)


def _resamples(examples: int, count: int, seed: int) -> Iterator[Array]:
    """How often each resample holds each example, (R, B) a chunk: multinomial counts, ``count`` rows in all."""
    rng = np.random.default_rng(derive(seed, "bootstrap"))
    size = max(1, _DRAWS // examples)
    for start in range(0, count, size):
        rows = min(size, count - start)
        drawn = rng.integers(0, examples, (rows, examples))
        drawn += examples * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * examples)
        yield counts.reshape(rows, examples).astype(np.float64)


# --- several runs of one method -------------------------------------------------------------------------------------


class Spread(Record):
    """Values and how far they lie apart: the mean, the least and the greatest, and the sample standard deviation.

    ``deviation`` divides by n - 1, and is ``null`` where n is 1: one value says nothing of it.
    """

    mean: float
    low: float
    high: float
    deviation: float | None
    n: int


def spread(values: Sequence[float]) -> Spread:
    """The spread of at least one value.

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


class Group(Record):
    """Runs of one method that differ in their seeds.

    Attributes:
        runs: their places in the list that was grouped.
        seeds: of each. One that comes twice is the same run made twice, and tells nothing new.
        scores: the spread of each score that all of them have.
    """

    runs: list[int]
    seeds: list[int]
    scores: dict[str, Spread]


def group_key(manifest: Manifest) -> str:
    """Equal for runs that differ only in their seed, as readable JSON.

    What counts is the method, its options, the network, the members, the images, and the example passes that it took in
    all. What does not: the seed and what follows from it (weights, metrics), how it was run (device, workers,
    compilation, members side by side), when, and whether an option was typed or came from a recipe. Of the runs or
    files that it started from it counts how many there were, not their names: three seeds start from three
    solutions; that these cost the same is in the passes. Published weights count by their name.
    """
    options = {name: value for name, value in manifest.options.items() if name not in _NOT_THE_METHOD}
    for name in _BEGINNINGS:
        value = options.pop(name, None)
        options[f"{name}: how many"] = len(value) if isinstance(value, list | tuple) else int(value is not None)
    images = manifest.dataset
    return json.dumps(
        {
            "method": manifest.method,
            "architecture": manifest.architecture,
            "members": manifest.members,
            "vertices": manifest.vertices,
            "images": [images.image_shape, images.train_sha256, images.test_sha256],
            "example_passes": manifest.cost.example_passes,
            "options": {name: value for name, value in options.items() if value is not None},
        },
        sort_keys=True,
    )


def group(keys: Sequence[str], seeds: Sequence[int], scores: Sequence[Mapping[str, float | None]]) -> list[Group]:
    """Gather runs of equal keys, in the order in which the keys first come.

    Args:
        keys: of each run, see :func:`group_key`.
        seeds: of each run.
        scores: of each run, by name; one that a run of the group lacks, or has as ``None``, is left out.
    """
    places: dict[str, list[int]] = {}
    for place, (key, _, _) in enumerate(zip(keys, seeds, scores, strict=True)):
        places.setdefault(key, []).append(place)
    found = []
    for chosen in places.values():
        columns = {name: [scores[place].get(name) for place in chosen] for name in scores[chosen[0]]}
        found.append(
            Group(
                runs=chosen,
                seeds=[seeds[place] for place in chosen],
                scores={
                    name: spread([value for value in values if value is not None])
                    for name, values in columns.items()
                    if None not in values
                },
            )
        )
    return found
