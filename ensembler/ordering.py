"""In which order to ask an ensemble's members, so that the first few serve best. NumPy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ensembler.calibration_maps import FLOOR
from ensembler.errors import ShapeError

__all__ = ["greedy_order"]


def greedy_order(likelihoods: ArrayLike) -> list[int]:
    """The members in the order that helps most: each next one gives the lowest NLL of the mean with those before it.

    Forward selection (Caruana et al. 2004, "Ensemble selection from libraries of models"), without replacement. Of
    equally good members the first comes first.

    Args:
        likelihoods: (M, B) what each member gives to the label of each held-out image: never of the test images.

    Returns:
        0 to M - 1, each once.

    Raises:
        ShapeError: not (M, B) with at least one of each.
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
