"""The order of an ensemble's members in which the first few are the best subset. NumPy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ensembler.calibration_maps import FLOOR
from ensembler.errors import ShapeError

__all__ = ["greedy_order"]


def greedy_order(likelihoods: ArrayLike) -> list[int]:
    """Order members greedily: each next one gives the mean with those before it the lowest NLL.

    Forward selection without replacement (Caruana et al. 2004, "Ensemble selection from libraries of models"). Ties
    keep the given order.

    Args:
        likelihoods: (M, B), each member's probability of the label of each held-out image (never of test images).

    Returns:
        A permutation of 0 to M - 1.

    Raises:
        ShapeError: not (M, B) with M >= 1 and B >= 1.
    """
    likely = np.asarray(likelihoods, dtype=np.float64)
    if likely.ndim != 2 or not likely.size:
        raise ShapeError(f"expected the members' probabilities of the labels, (M, B), found shape {likely.shape}")
    total = np.zeros(likely.shape[1])
    order: list[int] = []
    left = list(range(len(likely)))
    while left:
        losses = [-np.log(np.maximum((total + likely[m]) / (len(order) + 1), FLOOR)).mean() for m in left]
        order.append(left.pop(int(np.argmin(losses))))
        total += likely[order[-1]]
    return order
