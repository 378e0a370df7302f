"""Measures of an ensemble's uncertainty. NumPy only.

Every function takes the members' probabilities (M, B, C) and returns one number per example; entropies are in nats.
The entropy of the mean prediction is the sum of the members' expected entropy and the mutual information between
prediction and member (Depeweg et al. 2018). Whether these deserve the names "aleatoric" and "epistemic" is disputed
(Wimmer et al. 2023), so those names are not used here.

For a single member (M = 1), mutual information, disagreement and variation ratio are undefined and ``None``, not zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensembler.errors import ShapeError

__all__ = [
    "SUM_TOLERANCE",
    "Uncertainty",
    "disagreement",
    "disagreement_of_votes",
    "entropy",
    "expected_entropy",
    "information",
    "mean_probabilities",
    "mutual_information",
    "predictive_entropy",
    "uncertainty",
    "variation_ratio",
]

Array = NDArray[np.float64]

SUM_TOLERANCE = 2**-7
"""The most by which a sum of probabilities may miss 1: twice what a softmax in bfloat16, rounded once, does."""

_ROUNDING = 1e-12  # nats, of a difference of entropies


def entropy(probabilities: NDArray[np.floating]) -> Array:
    """Compute the Shannon entropy over the last axis, in nats, with ``0 log 0 = 0``; in [0, log C].

    Raises:
        ShapeError: no distributions, such as logits or NaN.
    """
    p = _distributions(np.asarray(probabilities, dtype=np.float64))
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    return np.maximum(-(p * logs).sum(axis=-1), 0.0)


def mean_probabilities(members: ArrayLike) -> Array:
    """Compute the ensemble's prediction (B, C): the mean of the members' probabilities, not of their logits."""
    return _check(members).mean(axis=0, dtype=np.float64)


def predictive_entropy(members: ArrayLike) -> Array:
    """Compute the total uncertainty (B,): the entropy of the mean prediction; in [0, log C]."""
    return entropy(mean_probabilities(members))


def expected_entropy(members: ArrayLike) -> Array:
    """Compute the mean (B,) of the members' entropies; in [0, log C]."""
    return entropy(_check(members)).mean(axis=0)


def mutual_information(members: ArrayLike) -> Array | None:
    """Compute predictive minus expected entropy (B,), at least 0; at most log min(M, C). ``None`` if M = 1."""
    if len(_check(members)) == 1:
        return None
    return information(predictive_entropy(members), expected_entropy(members))


def information(predictive: Array, expected: Array) -> Array:
    """Compute the mutual information (B,) from both entropies in float64; a difference that is rounding is 0.

    Members that agree have none: the rest, some 1e-16 nats, would rank images by their entropy.
    """
    gap = predictive - expected
    return np.where(gap > _ROUNDING, gap, 0.0)


def disagreement(members: ArrayLike) -> Array | None:
    """Compute the share (B,) of pairs of members that predict different classes; in [0, 1]. ``None`` if M = 1."""
    found = _check(members)
    return None if len(found) == 1 else disagreement_of_votes(_votes(found))


def disagreement_of_votes(votes: NDArray[np.floating]) -> Array:
    """Compute the :func:`disagreement` (B,) from the number of members that predict each class, (B, C); M >= 2."""
    M = votes[:1].sum()
    return 1.0 - (votes * (votes - 1)).sum(axis=-1) / (M * (M - 1))


def variation_ratio(members: ArrayLike) -> Array | None:
    """Compute the share (B,) of members outside the majority class; in [0, 1 - 1/M]. ``None`` if M = 1."""
    found = _check(members)
    return None if len(found) == 1 else 1.0 - _votes(found).max(axis=-1) / len(found)


@dataclass(frozen=True)
class Uncertainty:
    """All measures of one batch; each field is (B,), or ``None`` if M = 1 leaves it undefined."""

    predictive_entropy: Array
    expected_entropy: Array
    mutual_information: Array | None
    disagreement: Array | None
    variation_ratio: Array | None


def uncertainty(members: ArrayLike) -> Uncertainty:
    """Compute all measures of one batch of members' probabilities (M, B, C), an array or a tensor.

    Raises:
        ShapeError: not (M, B, C) with M >= 1 and C >= 1, or no probabilities, such as logits or NaN.
    """
    return Uncertainty(
        predictive_entropy(members),
        expected_entropy(members),
        mutual_information(members),
        disagreement(members),
        variation_ratio(members),
    )


def _votes(members: NDArray[np.floating]) -> Array:
    """Count the members that predict each class: (B, C)."""
    classes = members.argmax(axis=-1)
    return (classes[..., None] == np.arange(members.shape[-1])).sum(axis=0, dtype=np.float64)


def _check(members: ArrayLike) -> NDArray[np.floating]:
    """Return probabilities (M, B, C) as an array, also of a tensor on any device."""
    members = np.asarray(members.detach().cpu() if hasattr(members, "detach") else members)
    if members.ndim != 3 or members.shape[0] < 1 or members.shape[2] < 1:
        raise ShapeError(f"expected the members' probabilities (M, B, C), found shape {members.shape}")
    return _distributions(members)


def _distributions(p: NDArray[np.floating]) -> NDArray[np.floating]:
    """Refuse logits, NaN and whatever else is no distribution over the last axis."""
    if p.size:
        miss = np.abs(p.sum(axis=-1, dtype=np.float64) - 1.0).max()
        if not (p.min() >= 0.0 and miss <= SUM_TOLERANCE):  # NaN is refused, too
            raise ShapeError(
                f"expected probabilities, found rows with an entry of {p.min():g} or a sum that misses 1 by {miss:g}: "
                "give probabilities that sum to 1, not logits"
            )
    return p
