"""Scores of prediction sets, such as :func:`ensembler.calibration.prediction_sets` computes."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensembler.errors import ShapeError

__all__ = ["coverage", "mean_set_size"]


def coverage(sets: ArrayLike, labels: ArrayLike) -> float:
    """Compute the share of examples whose set holds the label; a guarantee of 1 - alpha is about its expectation.

    Args:
        sets: (B, C) bool, whether the class is in the set.
        labels: (B,) classes.

    Raises:
        ShapeError: sets or labels of the wrong shape, type or range.
    """
    held, y = _sets(sets), np.asarray(labels)
    B, C = held.shape
    if y.shape != (B,) or y.dtype.kind not in "iu" or (y < 0).any() or (y >= C).any():
        raise ShapeError(f"labels must be {B} integers of 0 to {C - 1}, one a set, found {y.dtype} {y.shape}")
    return float(held[np.arange(B), y].mean())


def mean_set_size(sets: ArrayLike) -> float:
    """Compute the mean number of classes in a set; of two kinds of sets with the same coverage, the smaller is better.

    Args:
        sets: (B, C) bool, whether the class is in the set.

    Raises:
        ShapeError: sets of the wrong shape or type.
    """
    return float(_sets(sets).sum(axis=1).mean())


def _sets(sets: ArrayLike) -> NDArray[np.bool_]:
    found = np.asarray(sets)
    if found.ndim != 2 or not found.size or found.dtype != bool:
        raise ShapeError(f"sets must be (B, C) of bool, none empty, found {found.dtype} {found.shape}")
    return found
