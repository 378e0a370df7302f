"""Drift: whether what is served still looks like the validation images, by the members' own measures. NumPy only.

For each measure the population stability index of a window of answers against the validation images::

    PSI = sum over bins of (p - q) * log(p / q)

with p and q the shares of the window's and of the validation images (Siddiqi 2006, "Credit Risk Scorecards"; it is
the symmetric Kullback-Leibler divergence). Bins are deciles of an entropy, and the classes. Half an image is added to
every bin, so that empty ones are finite. The rule of thumb that 0.25 is too much ignores how many images and bins there
are: here the bound is a quantile of the index where nothing drifts, by a bootstrap of the validation images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensembler.serve.runtime.manifest import Binned

__all__ = ["FEWEST", "MEASURES", "Window", "bin_values", "bound", "stability"]

MEASURES = ("predictive_entropy", "mutual_information", "class")

FEWEST = 50  # images of a window
_BINS = 10
_LEVEL = 0.999  # of windows without drift that lie below the bound
_BLOCKS, _BLOCK = 20, 200  # drawn; of a thousand classes, a block takes megabytes
_DIGITS = 6  # of nats: other machines round the rest differently
_HALF = 0.5  # images added to every bin

Counts = NDArray[np.int64]


def bin_values(measure: str, values: ArrayLike, classes: int) -> Binned:
    """Return the bins of a measure, and how many of the validation images are in each.

    Args:
        measure: one of :data:`MEASURES`.
        values: (B,), of the validation images.
        classes: C.
    """
    edges: list[float] = []
    if measure != "class":
        inner = np.quantile(np.asarray(values, np.float64), np.arange(1, _BINS) / _BINS)
        edges = np.unique(np.round(inner, _DIGITS)).tolist()
    bins = classes if measure == "class" else len(edges) + 1
    counts = np.bincount(_places(measure, edges, values), minlength=bins).tolist()
    return Binned.model_validate({"measure": measure, "edges": edges, "counts": counts})


def stability(found: ArrayLike, expected: ArrayLike) -> NDArray[np.float64]:
    """Return the population stability index of counts (..., bins) against others, of any totals."""
    p, q = _shares(found), _shares(expected)
    index: NDArray[np.float64] = ((p - q) * np.log(p / q)).sum(axis=-1)
    return index


def bound(expected: Sequence[int], images: int) -> float:
    """Return what the index of a window stays below with probability 0.999, where nothing drifts.

    Window and validation images are both samples: both are drawn again from the validation images' shares.

    Args:
        expected: images of the validation split in each bin.
        images: of a window.
    """
    generator = np.random.default_rng(0)
    total = int(sum(expected))
    shares = np.asarray(expected, np.float64) / total
    indices = [
        stability(generator.multinomial(images, shares, _BLOCK), generator.multinomial(total, shares, _BLOCK))
        for _ in range(_BLOCKS)
    ]
    return float(np.quantile(np.concatenate(indices), _LEVEL))


class Window:
    """The last images that were answered, against the validation images.

    Args:
        reference: the bins of each measure, of the validation images.
        images: of the window.
    """

    def __init__(self, reference: Sequence[Binned], images: int) -> None:
        self.images = images
        self.bounds: dict[str, float] = {binned.measure: bound(binned.counts, images) for binned in reference}
        self._reference = list(reference)
        self._places: dict[str, Counts] = {binned.measure: np.empty(0, np.int64) for binned in reference}

    def add(self, columns: Mapping[str, ArrayLike]) -> None:
        """Take what was answered for some images: an array (B,) for each measure."""
        for binned in self._reference:
            added = _places(binned.measure, binned.edges, columns[binned.measure])
            self._places[binned.measure] = np.concatenate([self._places[binned.measure], added])[-self.images :]

    @property
    def full(self) -> bool:
        """Whether as many images were taken as the window has."""
        return all(len(found) == self.images for found in self._places.values())

    def index(self, measure: str) -> float:
        """Return the population stability index of a measure over the window."""
        one = next(binned for binned in self._reference if binned.measure == measure)
        found, expected = self._places[one.measure], one.counts
        return float(stability(np.bincount(found, minlength=len(expected)), expected))

    def indices(self) -> dict[str, float]:
        """Return the index of each measure; nothing before the window is full."""
        return {measure: self.index(measure) for measure in self._places} if self.full else {}


def _places(measure: str, edges: Sequence[float], values: ArrayLike) -> Counts:
    """The bin (B,) of each value. Bins include their upper edges; NaN is in the last."""
    if measure == "class":
        return np.asarray(values, np.int64)
    return np.searchsorted(edges, np.round(np.asarray(values, np.float64), _DIGITS), side="left")


def _shares(counts: ArrayLike) -> NDArray[np.float64]:
    smoothed = np.asarray(counts, np.float64) + _HALF
    shares: NDArray[np.float64] = smoothed / smoothed.sum(axis=-1, keepdims=True)
    return shares
