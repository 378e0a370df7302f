"""Maps from an ensemble's probabilities to calibrated ones, as they are stored and applied. NumPy and pydantic only."""

from __future__ import annotations

import math
from functools import cached_property
from numbers import Integral
from typing import Annotated, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from ensembler.errors import UsageError
from ensembler.record import Record
from ensembler.task import TINY, softmax

__all__ = ["FLOOR", "Beta", "Histogram", "Isotonic", "Map", "Temperature", "bin_count", "bin_indices", "temper"]

FLOOR = TINY
"""Smallest probability whose logarithm is computed: float32's smallest normal number, 1.2e-38, or 87.3 nats."""

Array = NDArray[np.float64]


class Temperature(Record):
    """Temperature scaling of the pooled prediction: ``p**(1 / T)``, normalised (Guo et al. 2017)."""

    method: Literal["temperature"] = "temperature"
    temperature: float = Field(gt=0)

    def __call__(self, p: Array) -> Array:
        return temper(p, self.temperature)


class Isotonic(Record):
    """One piecewise linear, increasing curve per class (Zadrozny & Elkan 2002); then rows are normalised.

    Attributes:
        x, y: (C, points of that class); for two classes, only the second's curve.
    """

    method: Literal["isotonic"] = "isotonic"
    x: list[list[float]]
    y: list[list[float]]

    def __eq__(self, other: object) -> bool:  # of the fields alone, whatever is cached
        return isinstance(other, Isotonic) and (self.x, self.y) == (other.x, other.y)

    __hash__ = None  # type: ignore[assignment]  # lists have none

    @cached_property
    def _curves(self) -> list[tuple[Array, Array]]:
        return [(np.asarray(x), np.asarray(y)) for x, y in zip(self.x, self.y, strict=True)]

    def __call__(self, p: Array) -> Array:
        columns = p[:, -len(self.x) :].T
        return _one_vs_rest(p, [np.interp(column, *curve) for column, curve in zip(columns, self._curves, strict=True)])


class Histogram(Record):
    """A frequency for each bin of each class's probability (Zadrozny & Elkan 2001); then rows are normalised.

    The bins are those of :func:`bin_indices`.

    Attributes:
        y: (C, bins); for two classes, only the second's.
    """

    method: Literal["histogram"] = "histogram"
    y: list[list[float]]

    def __call__(self, p: Array) -> Array:
        places = bin_indices(p[:, -len(self.y) :].T, len(self.y[0]))
        return _one_vs_rest(p, np.take_along_axis(np.array(self.y), places, axis=1))


class Beta(Record):
    """``softmax(a log p - b log(1 - p) + c)``, with a, b and c per class (Kull et al. 2017, as extended by netcal).

    For two classes, the first's are 0.

    Attributes:
        a, b, c: (C,) each.
    """

    method: Literal["beta"] = "beta"
    a: list[float]
    b: list[float]
    c: list[float]

    def __call__(self, p: Array) -> Array:
        epsilon = np.finfo(np.float64).eps  # netcal's
        log = np.log(np.clip(p, epsilon, 1.0 - epsilon))
        log_rest = np.log(np.clip(1.0 - p, epsilon, 1.0 - epsilon))
        return softmax(np.array(self.a) * log - np.array(self.b) * log_rest + np.array(self.c))


Map = Annotated[Temperature | Isotonic | Histogram | Beta, Field(discriminator="method")]


def bin_count(bins: int) -> int:
    """Return a number of bins.

    Raises:
        UsageError: it is no whole number, or below 1.
    """
    if not isinstance(bins, Integral) or bins < 1:
        raise UsageError(f"bins is {bins!r}; give a whole number, at least 1")
    return int(bins)


def bin_indices(values: ArrayLike, bins: int) -> NDArray[np.int64]:
    """Find the bin, from 0, of each value, among bins of equal width: those of the expected calibration error.

    The bins are ``((b - 1) / bins, b / bins]``, left-open as in Guo et al. 2017; 0 is in the first, and what exceeds 1
    by rounding in the last.

    Args:
        values: of any shape, from 0 to 1.
        bins: their number, at least 1.

    Raises:
        UsageError: as of :func:`bin_count`.
    """
    return np.searchsorted(np.linspace(0.0, 1.0, bin_count(bins) + 1)[1:-1], np.asarray(values), side="left")


def temper(probs: ArrayLike, temperature: float) -> Array:
    """Scale a prediction by a temperature: ``p**(1 / T)``, normalised; softer for T > 1, sharper for T < 1.

    Args:
        probs: (B, C) probabilities; those below ``FLOOR`` count as ``FLOOR``.
        temperature: T > 0.

    Raises:
        UsageError: the temperature is not positive and finite.
    """
    if not 0 < temperature < math.inf:
        raise UsageError(f"a temperature must be positive and finite, not {temperature}")
    return softmax(np.log(np.maximum(np.asarray(probs, dtype=np.float64), FLOOR)) / temperature)


def _one_vs_rest(p: Array, columns: ArrayLike) -> Array:
    """Normalise the frequencies of all classes to distributions; rows that are all 0 keep ``p``."""
    q = np.clip(np.asarray(columns, dtype=np.float64).T, 0.0, 1.0)
    if q.shape[1] < p.shape[1]:  # only the second of two classes
        return np.hstack([1.0 - q, q])
    total = q.sum(axis=1, keepdims=True)
    return np.where(total > 0, q / np.where(total > 0, total, 1.0), p)
