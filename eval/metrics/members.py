"""Subsets of members: scores against their number, how many suffice, and deep-ensemble equivalents.

Members' probabilities (M, B, C) may be a memory map. Lower is better in every score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ensembler.calibration_maps import FLOOR, temper
from ensembler.errors import ShapeError, UsageError
from ensembler.eval.metrics.classification import BINS
from ensembler.eval.metrics.comparison import Losses, Spread, spread
from ensembler.eval.metrics.recalibration import fit_temperature
from ensembler.record import Record
from ensembler.seeds import derive

__all__ = [
    "CurvePoint",
    "Equivalent",
    "MemberScores",
    "curve",
    "deep_ensemble_equivalent",
    "recommended_members",
    "score_subsets",
]

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

_ELEMENTS = 2**23  # members' probabilities scored at once
_ROUNDING = 1e-12  # of a difference of losses that is 0
_SIZES = 12  # points of a long curve


class MemberScores(Record):
    """Scores of the mean prediction of some members.

    ``calibrated_nll`` is the NLL after a temperature fitted on the validation images to the same members: without it,
    NLLs of ensembles of different sizes are not comparable (Ashukha et al. 2020, https://arxiv.org/abs/2002.06470,
    sec. 3).
    """

    error: float
    nll: float
    calibrated_nll: float
    brier: float
    ece: float


class CurvePoint(Record):
    """Scores of ``members`` members: over random subsets of them, and of the first ones in a given order."""

    members: int
    error: Spread
    nll: Spread
    calibrated_nll: Spread
    brier: Spread
    ece: Spread
    ordered: MemberScores | None


def curve(
    members_test: NDArray[np.floating],
    labels: Labels,
    members_validation: NDArray[np.floating],
    labels_validation: Labels,
    order: Sequence[int] | None = None,
    subsets: int = 10,
    seed: int = 0,
) -> list[CurvePoint]:
    """Compute test scores against the number of members: up to 12 all numbers, else about 12 in equal ratios.

    Each number is scored on ``subsets`` different random subsets, or on all if there are no more. Subsets share
    members, the more the larger they are, so their spread is narrower than that of independent ensembles.

    Args:
        members_test: (M, B, C) probabilities.
        labels: (B,).
        members_validation: (M, B', C), on which temperatures are fitted; its mean is held in float64.
        labels_validation: (B',).
        order: M or fewer different members, such as :func:`ensembler.ordering.greedy_order` gives.
        subsets: random subsets of each number, at least 1.
        seed: of the subsets.

    Raises:
        ShapeError: arrays that are not probabilities of the same M members, or labels that do not fit.
        UsageError: an order of other members, or no subset.
    """
    _check_members(members_test, labels)
    M = len(members_test)
    if order is not None and (len(set(order)) < len(order) or not set(order) <= set(range(M))):
        raise UsageError(f"an order takes different members of 0 to {M - 1}, not {list(order)}")
    if subsets < 1:
        raise UsageError(f"a curve takes at least 1 subset of each size, not {subsets}")
    rng = np.random.default_rng(derive(seed, "subsets"))
    drawn = {size: _some_subsets(M, size, subsets, rng) for size in _sizes(M)}
    ordered = {size: tuple(order[:size]) for size in drawn if order is not None and size <= len(order)}
    wanted = list(dict.fromkeys([*(subset for some in drawn.values() for subset in some), *ordered.values()]))
    found = dict(
        zip(wanted, score_subsets(members_test, labels, members_validation, labels_validation, wanted), strict=True)
    )
    return [
        CurvePoint(
            members=size,
            ordered=found[ordered[size]] if size in ordered else None,
            **{name: spread([getattr(found[subset], name) for subset in some]) for name in MemberScores.model_fields},
        )
        for size, some in drawn.items()
    ]


def score_subsets(
    members_test: NDArray[np.floating],
    labels: Labels,
    members_validation: NDArray[np.floating],
    labels_validation: Labels,
    subsets: Sequence[Sequence[int]],
) -> list[MemberScores]:
    """Compute test scores of subsets of the members in one pass over the test images; see :func:`curve`.

    Raises:
        ShapeError: arrays that are not probabilities of the same M members, or labels that do not fit.
    """
    _check_members(members_test, labels)
    _check_members(members_validation, labels_validation)
    if (len(members_test), members_test.shape[2]) != (len(members_validation), members_validation.shape[2]):
        raise ShapeError(
            f"test and validation must be of the same members and classes, found {members_test.shape} and "
            f"{members_validation.shape}"
        )
    chosen = [list(subset) for subset in subsets]
    temperatures = [fit_temperature(_mean(members_validation, subset), labels_validation) for subset in chosen]
    sums = np.zeros((len(chosen), 4))
    gaps = np.zeros((len(chosen), BINS))
    M, B, C = members_test.shape
    size = max(1, _ELEMENTS // (C * (M + 8)))
    for start in range(0, B, size):
        part = np.asarray(members_test[:, start : start + size])
        y = np.asarray(labels[start : start + size], dtype=np.int64)
        for row, (subset, temperature) in enumerate(zip(chosen, temperatures, strict=True)):
            mean = part[subset].mean(axis=0, dtype=np.float64)
            found = Losses.of(mean, y)
            calibrated = np.asarray(temper(mean, temperature))[np.arange(len(y)), y]
            nll = -np.log(np.maximum(calibrated, FLOOR))
            sums[row] += found.error.sum(), found.nll.sum(), nll.sum(), found.brier.sum()
            gaps[row] += np.bincount(found.bins[0], weights=found.gaps[0], minlength=BINS)
    return [
        MemberScores(error=error, nll=nll, calibrated_nll=calibrated, brier=brier, ece=ece)
        for (error, nll, calibrated, brier), ece in zip(
            (sums / B).tolist(), (np.abs(gaps).sum(axis=1) / B).tolist(), strict=True
        )
    ]


def recommended_members(likelihoods: NDArray[np.floating], order: Sequence[int] | None = None) -> int | None:
    """Find the smallest number of members that is not significantly worse than all, on the validation images.

    Its NLL exceeds that of all members by at most one standard error of the paired difference (the one-standard-error
    rule, Breiman et al. 1984, sec. 3.4.3). A greedy order chosen on the same images favours small numbers a little:
    check the curve on the test images.

    With few images, nothing is significant, and any number would pass. So it must be told apart, by two standard
    errors, from losing all that the ensemble gains: the NLL of the mean prediction against the members' mean NLL.

    Args:
        likelihoods: (M, B) each member's probability of the label of each validation image.
        order: of all members; by default as they are.

    Returns:
        Their number; ``None`` where so few images cannot tell.

    Raises:
        ShapeError: not (M, B) with at least one of each.
        UsageError: an order that is not of all members.
    """
    likely = np.asarray(likelihoods, dtype=np.float64)
    if likely.ndim != 2 or not likely.size:
        raise ShapeError(f"expected the members' probabilities of the labels, (M, B), found shape {likely.shape}")
    M, B = likely.shape
    order = list(range(M)) if order is None else list(order)
    if sorted(order) != list(range(M)):
        raise UsageError(f"an order of all members takes 0 to {M - 1} once each, not {order}")
    whole = -np.log(np.maximum(likely.mean(axis=0), FLOOR))
    gain = float((-np.log(np.maximum(likely, FLOOR)).mean(axis=0) - whole).mean())
    total = np.zeros(B)
    for size, member in enumerate(order, start=1):
        total += likely[member]
        excess = -np.log(np.maximum(total / size, FLOOR)) - whole
        error = excess.std(ddof=1) / math.sqrt(B) if B > 1 else 0.0
        if excess.mean() <= error + _ROUNDING:
            told = size == M or (B > 1 and excess.mean() + 2 * error <= gain + _ROUNDING)
            return size if told else None
    return M


def _sizes(M: int) -> list[int]:
    if M <= _SIZES:
        return list(range(1, M + 1))
    return sorted({round(size) for size in np.geomspace(1, M, _SIZES).tolist()})


def _some_subsets(M: int, size: int, count: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Draw ``count`` different subsets, or return all if there are no more; each in the members' order."""
    if math.comb(M, size) <= count:
        return list(combinations(range(M), size))
    found: dict[tuple[int, ...], None] = {}
    while len(found) < count:
        found[tuple(sorted(rng.choice(M, size, replace=False).tolist()))] = None
    return list(found)


def _mean(members: NDArray[np.floating], subset: Sequence[int]) -> Array:
    """Compute the mean (B, C) of some of the members, read one at a time."""
    total = np.zeros(members.shape[1:])
    for member in subset:
        total += members[member]
    total /= len(subset)
    return total


def _check_members(members: NDArray[np.floating], labels: Labels) -> None:
    if members.ndim != 3 or not members.size:
        raise ShapeError(f"expected the members' probabilities (M, B, C), none empty, found shape {members.shape}")
    if np.shape(labels) != members.shape[1:2]:
        raise ShapeError(f"labels must be {members.shape[1]} integers, one an example, found {np.shape(labels)}")


# --- the deep-ensemble equivalent -----------------------------------------------------------------------------------


class Equivalent(Record):
    """The number of independently trained networks whose deep ensemble does as well.

    Attributes:
        members: a real number from 1 to ``largest``; ``null`` if ``largest`` networks do worse.
        low, high: the same for the curve one standard deviation better, and worse.
        largest: the members of that deep ensemble.
        below_one: whether one network does better; ``members`` is then 1.
    """

    members: float | None
    low: float | None
    high: float | None
    largest: int
    below_one: bool

    def __str__(self) -> str:
        if self.members is None:
            return f"more than {self.largest}"
        return "fewer than 1" if self.below_one else f"{self.members:.1f}"


def deep_ensemble_equivalent(points: Sequence[CurvePoint], calibrated_nll: float) -> Equivalent:
    """Compute a deep-ensemble equivalent, DEE (Ashukha et al. 2020, https://arxiv.org/abs/2002.06470, sec. 5).

    ``min {l >= 1: CLL_DE(l) >= CLL}``, with the calibrated log-likelihood (CLL) of the deep ensemble interpolated
    linearly between numbers of members. As in the paper, ``low`` and ``high`` use ``CLL_DE`` plus and minus its
    standard deviation; here that is over subsets of one ensemble, which share members, and not over independent
    ensembles, so it is too small, and 0 for the whole.

    Args:
        points: the deep ensemble's :func:`curve`.
        calibrated_nll: on the same test and validation images.

    Raises:
        UsageError: a curve that does not start with one member, or values that are not finite.
    """
    sizes = np.array([point.members for point in points], dtype=np.float64)
    mean = np.array([point.calibrated_nll.mean for point in points])
    deviation = np.array([point.calibrated_nll.deviation or 0.0 for point in points])
    if not len(points) or sizes[0] != 1 or (np.diff(sizes) <= 0).any():
        raise UsageError(f"a deep ensemble's curve goes from 1 member up, not over {sizes.astype(int).tolist()}")
    if not (math.isfinite(calibrated_nll) and np.isfinite(mean).all() and np.isfinite(deviation).all()):
        raise UsageError("calibrated NLLs must be finite to compare them")
    return Equivalent(
        members=_first_reaching(sizes, mean, calibrated_nll),
        low=_first_reaching(sizes, mean - deviation, calibrated_nll),
        high=_first_reaching(sizes, mean + deviation, calibrated_nll),
        largest=int(sizes[-1]),
        below_one=bool(calibrated_nll > mean[0]),
    )


def _first_reaching(sizes: Array, losses: Array, target: float) -> float | None:
    """Find where the interpolated losses first fall to the target."""
    reached = np.flatnonzero(losses <= target)
    if not len(reached):
        return None
    after = int(reached[0])
    if after == 0:
        return float(sizes[0])
    share = (losses[after - 1] - target) / (losses[after - 1] - losses[after])
    return float(sizes[after - 1] + share * (sizes[after] - sizes[after - 1]))
