"""The smooth calibration error: calibration without bins."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensembler.eval.metrics.selective import checked

__all__ = ["smooth_error"]

_POINTS = 2**13  # of the grid on [0, 1]

Array = NDArray[np.float64]


@np.errstate(under="ignore")
def smooth_error(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Compute the smooth expected calibration error, smECE (Blasiok & Nakkiran 2023, https://arxiv.org/abs/2309.12236).

    The gaps ``correct - confidence`` are smoothed over the confidence by a Gaussian of standard deviation s, reflected
    at 0 and 1, and the absolute value is integrated: ``int_0^1 |1 / B * sum_i gap_i K_s(confidence_i, t)| dt``. The
    integral falls as s rises, and smECE is where the two are equal (their definition 5): there are no bins, and no
    bandwidth to choose. Confidences are rounded to a grid of 8,193 points by linear interpolation.

    Args:
        confidence: (B,) in [0, 1].
        correct: (B,) whether each answer is right.

    Returns:
        In [0, 1]; lower is better.

    Raises:
        ShapeError: not one confidence and one answer an example.
    """
    from scipy.fft import dct
    from scipy.optimize import brentq

    confidence, right = checked(confidence, correct)
    masses = _on_grid(confidence, (right - confidence) / len(confidence))
    masses[[0, -1]] *= 2  # the cosine transform counts both ends half
    cosines = dct(masses, type=1) / 2
    rates = (np.pi * np.arange(_POINTS + 1)) ** 2 / 2

    def excess(width: float) -> float:
        # Reflection at both ends makes the Gaussian diffusion on [0, 1], which damps each cosine by itself.
        smoothed = np.abs(dct(cosines * np.exp(-rates * width**2), type=1))
        return float(np.trapezoid(smoothed, dx=1 / _POINTS)) - width

    if excess(0.0) <= 0.0:
        return 0.0
    return min(1.0, float(brentq(excess, 0.0, 1.0 + 1e-9, xtol=1e-10)))


def _on_grid(places: Array, weights: Array) -> Array:
    """Share each weight between the two grid points beside its place in [0, 1]."""
    scaled = np.clip(places, 0.0, 1.0) * _POINTS
    left = np.minimum(scaled.astype(np.int64), _POINTS - 1)
    part = scaled - left
    grid = np.zeros(_POINTS + 1)
    np.add.at(grid, left, weights * (1 - part))
    np.add.at(grid, left + 1, weights * part)
    return grid
