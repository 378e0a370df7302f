"""Scores of groups of examples: of each, of the worst, and the gap between worst and best, with honest intervals.

The worst of many small groups looks bad by chance alone. The intervals of the worst group and of the gap therefore come
from intervals of all G groups that hold together (Bonferroni: each at a confidence of 1 - 0.05 / G).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ensembler.eval.metrics.comparison import Losses
from ensembler.record import Record

__all__ = ["GROUPED", "Bounds", "Gap", "GroupScores", "Groups", "Reduced", "Worst", "compare_groups", "reduce_groups"]

CONFIDENCE = 0.95
GROUPED = ("error", "nll", "brier")
"""Scores that are means over a group's examples; all of them have intervals."""

_FEWEST = 30  # examples for a t interval, whose distribution of means must be near a normal one


class Bounds(Record):
    """A score and its interval; ``low`` and ``high`` are ``null`` where there are too few examples for one."""

    value: float
    low: float | None
    high: float | None


class Worst(Bounds):
    """The highest score of any group, and whose it is; the interval is of the highest true score of any group."""

    group: str


class Gap(Bounds):
    """The difference between the highest and the lowest score of any group."""


class GroupScores(Record):
    """Scores of a group's ``examples``; the intervals are each group's own, at 95 %.

    ``error``: an exact interval (Clopper & Pearson 1934), which holds for any number of examples. ``nll``, ``brier``:
    Student's t, from 30 examples on. ``ece`` is measured too high in small groups, and has no interval.
    """

    examples: int
    error: Bounds
    nll: Bounds
    brier: Bounds
    ece: float


class Groups(Record):
    """Groups of examples by name; ``worst`` and ``gap``: by score of :data:`GROUPED`, at 95 %."""

    groups: dict[str, GroupScores]
    worst: dict[str, Worst]
    gap: dict[str, Gap]


class Reduced:
    """A group's losses, reduced to what its scores and intervals need.

    Args:
        losses: of at least one example, in one cell.
    """

    def __init__(self, losses: Losses) -> None:
        self.n = len(losses.error)
        self.scores = losses.scores()
        self.spread = {
            name: float(getattr(losses, name).std(ddof=1)) if self.n > 1 else 0.0 for name in ("nll", "brier")
        }

    def bounds(self, name: str, confidence: float) -> Bounds:
        """Compute a score of :data:`GROUPED` with its interval."""
        value = self.scores[name]
        low, high = self._error(confidence) if name == "error" else self._mean(name, confidence)
        return Bounds(value=value, low=low, high=high)

    def _error(self, confidence: float) -> tuple[float, float]:
        from scipy.stats import beta

        n, tail = self.n, (1 - confidence) / 2
        wrong = round(self.scores["error"] * n)
        low = 0.0 if wrong == 0 else float(beta.ppf(tail, wrong, n - wrong + 1))
        return low, 1.0 if wrong == n else float(beta.ppf(1 - tail, wrong + 1, n - wrong))

    def _mean(self, name: str, confidence: float) -> tuple[float, float] | tuple[None, None]:
        from scipy.stats import t

        if self.n < _FEWEST:
            return None, None
        half = float(t.ppf((1 + confidence) / 2, self.n - 1)) * self.spread[name] / self.n**0.5
        return max(0.0, self.scores[name] - half), self.scores[name] + half


def reduce_groups(losses: Losses, places: NDArray[np.int64], names: Sequence[str]) -> dict[str, Reduced]:
    """Reduce the losses of each group that has examples.

    Args:
        losses: of all examples, in one cell.
        places: (B,) each example's group, as a position in ``names``.
        names: of the groups.
    """
    order = np.argsort(places, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(places[order])) + 1)
    return {names[places[part[0]]]: Reduced(losses.part(part)) for part in parts}


def compare_groups(groups: Mapping[str, Reduced]) -> Groups:
    """Compute each group's scores, and the worst group and the gap of each score of :data:`GROUPED`."""
    together = 1 - (1 - CONFIDENCE) / len(groups)
    worst, gap = {}, {}
    for name in GROUPED:
        found = {group: one.bounds(name, together) for group, one in groups.items()}
        highest = max(found, key=lambda group: found[group].value)
        top, bottom = found[highest].value, min(one.value for one in found.values())
        lows = [one.low for one in found.values() if one.low is not None]
        highs = [one.high for one in found.values() if one.high is not None]
        if len(lows) < len(found):  # the worst may be among those without an interval
            worst[name] = Worst(group=highest, value=top, low=None, high=None)
            gap[name] = Gap(value=top - bottom, low=None, high=None)
            continue
        worst[name] = Worst(group=highest, value=top, low=max(lows), high=max(highs))
        most = max(highs) - min(lows) if len(found) > 1 else 0.0
        gap[name] = Gap(value=top - bottom, low=max(0.0, max(lows) - min(highs)), high=most)
    return Groups(
        groups={
            name: GroupScores(
                examples=one.n,
                ece=one.scores["ece"],
                **{score: one.bounds(score, CONFIDENCE) for score in GROUPED},
            )
            for name, one in groups.items()
        },
        worst=worst,
        gap=gap,
    )
