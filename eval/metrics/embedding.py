"""A map of members by their disagreement: their diversity in function space (Fort et al. 2019, arXiv 1912.02757)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["classical_scaling", "pairwise_disagreement"]

Array = NDArray[np.float64]


def pairwise_disagreement(classes: NDArray[np.integer]) -> Array:
    """Return the share of images (M, M) for which two members predict different classes, of their classes (M, B)."""
    return np.array([(classes != own).mean(axis=1) for own in classes])


def classical_scaling(squared: Array, dimensions: int = 2) -> tuple[Array, Array]:
    """Compute points whose distances are as close as possible to those given (Torgerson 1952).

    The squared distances between one-hot predictions are twice the disagreements, so that these are squared Euclidean
    distances: for them, the points are the principal components of the predictions.

    Args:
        squared: (M, M) squared distances, M >= 2.
        dimensions: D, of the points.

    Returns:
        Points (M, D) around 0, whose largest coordinate of each direction is positive; and the share (D,) of the sum of
        all squared distances that each direction holds: 0 if all are 0.
    """
    centred = squared - squared.mean(axis=0) - squared.mean(axis=1)[:, None] + squared.mean()
    values, vectors = np.linalg.eigh(-centred / 2)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    whole = values.sum()
    if dimensions > len(values):
        extra = dimensions - len(values)
        values, vectors = np.pad(values, (0, extra)), np.pad(vectors, ((0, 0), (0, extra)))
    points = vectors[:, :dimensions] * np.sqrt(values[:dimensions])
    points *= np.sign(points[np.abs(points).argmax(axis=0), np.arange(dimensions)] + 1e-300)
    return points, values[:dimensions] / (whole or 1.0)
