"""Early exit: two rules for when an image needs no further member. NumPy only.

Both take the probabilities of the members asked so far, (k, B, C), and tell for every image whether it is settled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ensembler.errors import UsageError

__all__ = ["LEVEL", "MODES", "Mode", "Rule", "confident", "exact", "rule", "student_t", "waves"]

Mode = Literal["full", "exact", "confidence"]
MODES: tuple[str, ...] = get_args(Mode)
Rule = Callable[[NDArray[np.floating], int], NDArray[np.bool_]]

LEVEL = 0.95
_ROUNDING = 1e-9  # a member: far more than float64 loses in a sum, far less than any gap that matters
_FIRST = 3  # members before the spread is used: two may agree by chance


def rule(mode: Mode, level: float = LEVEL) -> Rule:
    """Return the rule of a mode that stops early.

    Raises:
        UsageError: an unknown mode, or a level outside (0, 1).
    """
    if mode == "exact":
        return exact
    if mode != "confidence":
        raise UsageError(f"unknown mode {mode!r}: use one of {', '.join(MODES)}")
    if not 0 < level < 1:
        raise UsageError(f"the level of confidence must lie between 0 and 1, not {level}")
    return lambda asked, _: confident(asked, level)


def waves(mode: Mode, members: int) -> Iterator[tuple[int, int]]:
    """Yield the members to ask at a time: (first, one past the last) of ``members``.

    What half of the members say, the others could undo, so the exact rule first asks one more than half; confidence
    first asks three. The rest are asked one by one.
    """
    first = min(members, members // 2 + 1 if mode == "exact" else _FIRST)
    yield 0, first
    yield from zip(range(first, members), range(first + 1, members + 1), strict=True)


def exact(asked: NDArray[np.floating], members: int) -> NDArray[np.bool_]:
    """Return whether the ensemble's class can no longer change.

    After k of M members, if the best class's summed probability exceeds every other class's by more than ``M - k``,
    the remaining members could not change the class even if each gave another class all of its probability.

    Args:
        asked: (k, B, C) probabilities, C >= 2 or 1.
        members: M.

    Returns:
        (B,).
    """
    total = asked.sum(axis=0, dtype=np.float64)
    return _lead(total) > members - len(asked) + _ROUNDING * members


def confident(asked: NDArray[np.floating], level: float = LEVEL) -> NDArray[np.bool_]:
    """Return whether the best class leads the second with some confidence, given the members' spread.

    Let ``d_i`` be member i's probability of the mean's best class less that of its second, with mean ``d`` and standard
    deviation ``s`` (divided by k - 1). The interval ``d +- t s / sqrt(k)`` must lie above 0, where t is the two-sided
    Student quantile of ``level`` with k - 1 degrees of freedom (after Inoue 2019, "Adaptive ensemble prediction for
    deep neural networks based on confidence level"). For two classes it is the interval of the best one's probability,
    above 1/2. The level holds for one look at members drawn at random, not for repeated looks.

    Args:
        asked: (k, B, C) probabilities, k >= 1; one member settles nothing.
        level: in (0, 1).

    Returns:
        (B,).
    """
    k, B, C = asked.shape
    if k < 2 or C < 2:
        return np.full(B, C < 2)
    mean = asked.mean(axis=0, dtype=np.float64)
    best = mean.argmax(axis=-1)[:, None]
    rivals = mean.copy()
    np.put_along_axis(rivals, best, -1.0, axis=-1)
    second = rivals.argmax(axis=-1)[:, None]
    gaps = np.take_along_axis(asked, best[None], axis=-1) - np.take_along_axis(asked, second[None], axis=-1)
    d, s = gaps[..., 0].mean(axis=0, dtype=np.float64), gaps[..., 0].std(axis=0, ddof=1, dtype=np.float64)
    settled: NDArray[np.bool_] = d - student_t(level, k - 1) * s / math.sqrt(k) > 0
    return settled


@cache
def student_t(level: float, freedom: int) -> float:
    """Return t with ``P(|T| <= t) = level`` for Student's distribution with ``freedom`` degrees of freedom.

    The finite series of Abramowitz & Stegun, 26.7.3 and 26.7.4, in the angle ``atan(t / sqrt(freedom))``, bisected.
    """

    def probability(angle: float) -> float:
        sine, cosine = math.sin(angle), math.cos(angle)
        odd = freedom % 2
        term = total = cosine if odd else 1.0
        for i in range(2 + odd, freedom - 1, 2):
            term *= cosine * cosine * (i - 1) / i
            total += term
        if odd:
            return 2 / math.pi * (angle + (sine * total if freedom > 1 else 0.0))
        return sine * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _lead(total: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much the largest of each row (B, C) exceeds the second largest; infinite where there is no second."""
    if total.shape[-1] < 2:
        return np.full(len(total), math.inf)
    largest = np.partition(total, -2, axis=-1)[:, -2:]
    return largest[:, 1] - largest[:, 0]
