"""Fast Geometric Ensembling: snapshots along a cyclic learning rate (Garipov et al. 2018, sec. 4).

Vertices: the snapshots, taken in mid-cycle where the rate is lowest. Coefficients: the identity. One trainable
vertex, one optimiser from the first step to the last: the cycles begin at ``start`` of one solution's budget and take
its momentum over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from ensembler.errors import UsageError
from ensembler.options import option
from ensembler.trainers.method import Members, Method
from ensembler.trainers.recipes import ASHUKHA_2020, GARIPOV_2018, SOLUTIONS, Recipe

if TYPE_CHECKING:
    from ensembler.trainers.budget import Budget, Piece
    from ensembler.trainers.schedules import Schedule
    from ensembler.trainers.settings import Settings
    from ensembler.trainers.trainer import Trainer

__all__ = ["FGE", "cyclic", "cyclic_middles"]

# Garipov et al. 2018, as repeated in SamsungLabs/pytorch-ensembles, train/train_fge.sh; the README of their own code
# has other rates, with alpha_1 = alpha_2 for VGG16. Members: as many cycles as one budget holds.
_CYCLES = {
    "vgg16": {"members": 20, "cycle": 2, "high": 1e-2, "low": 5e-4, "start": 160 / 200},
    "preresnet164": {"members": 6, "cycle": 4, "high": 5e-2, "low": 5e-4, "start": 125 / 150},
    "wrn28x10": {"members": 10, "cycle": 4, "high": 5e-2, "low": 5e-4, "start": 160 / 200},
}


class FGE(Method):
    """Collect snapshots along a cyclic learning rate (FGE, Garipov et al. 2018)."""

    command = "train-fge"
    fast = {"epochs": 10, "members": 3}
    by_budget = frozenset({"members"})
    published = (
        *(Recipe(name, SOLUTIONS[name] | options, GARIPOV_2018) for name, options in _CYCLES.items()),
        # SamsungLabs/pytorch-ensembles starts from a solution that has converged in 160 epochs.
        Recipe("vgg16bn", SOLUTIONS["vgg16"] | _CYCLES["vgg16"] | {"epochs": 160, "start": 1.0}, ASHUKHA_2020),
    )

    members: int = option(5, ge=1, help="M, snapshots taken, one per cycle.")
    cycle: float = option(2, gt=0, help="c, epochs per cycle; the paper takes 2 to 4.")
    high: float | None = option(None, gt=0, help="alpha_1, highest learning rate of a cycle. (default: half of --lr)")
    low: float | None = option(None, gt=0, help="alpha_2, lowest learning rate of a cycle. (default: a 200th of --lr)")
    start: float = option(0.8, gt=0, le=1, help="Share of one solution's budget before the cycles.")

    def resolved(self, settings: Settings) -> Self:
        """By default, the cycles' rates are those of the paper's ResNet at --lr 0.1."""
        before = self.start * settings.epochs
        settings.check_warmup(before, f"the {before:g} epochs before the cycles")
        return self.model_copy(update=dict(zip(("high", "low"), self.rates(settings.lr or 0), strict=True)))

    def rates(self, lr: float) -> tuple[float, float]:
        """alpha_1 and alpha_2, where the highest rate of a solution is ``lr``."""
        return self.high or lr / 2, self.low or lr / 200

    def at_budget(self, budget: Budget) -> list[Piece] | str:
        """floor(b) independent runs: as many cycles as fit after --start of each, shorter ones where two do not fit."""
        steps = budget.steps(budget.total // budget.whole)
        share = self.start if self.start < 1 else 0.8
        length = min(round(self.cycle * len(budget.sizes)), int((1 - share) * steps / 1.5))
        if length < 2:
            return f"{steps:,} steps are too few for two cycles in the last {1 - share:.0%} of them"
        members = int(((1 - share) * steps - length // 2) / length) + 1
        begin = steps - length // 2 - length * (members - 1)
        options = {"members": members, "cycle": budget.in_epochs(length)}
        if self.start < 1:
            fitting = self.model_copy(update=options | {"start": begin / steps})
            return budget.independent(fitting, steps)
        return budget.independent(self.model_copy(update=options), steps, budget.in_epochs(begin))

    def train(self, trainer: Trainer) -> Members:
        """Train one network, from fresh weights or a start, and collect M snapshots of it."""
        from ensembler.trainers.plan import Plan
        from ensembler.trainers.starts import as_members, begin

        network, length = begin(trainer), trainer.steps(self.cycle)
        first, schedule = trainer.before(self.start, cyclic(*self.rates(trainer.lr), length))
        # The last cycle ends with its snapshot: the rise after it would change nothing.
        collect = [first + middle for middle in cyclic_middles(length, self.members)]
        plan = Plan(schedule, collect[-1], collect=collect)
        return as_members(trainer.fit("fge", network.vector[None].clone(), network.buffers, plan).snapshots)


def cyclic(high: float, low: float, cycle: int) -> Schedule:
    """Fast Geometric Ensembling's triangular cycle (Garipov et al. 2018, sec. 4).

    With ``t = (mod(i - 1, c) + 1) / c``: ``(1 - 2t) high + 2t low`` for ``t <= 1/2``, then
    ``(2 - 2t) low + (2t - 1) high``.

    Args:
        high: the paper's alpha_1.
        low: the paper's alpha_2, below ``high``; reached in mid-cycle.
        cycle: c, iterations a cycle, at least 2.
    """
    if not 0 < low < high:
        raise UsageError(f"FGE's rates must satisfy 0 < low < high, not low = {low:g}, high = {high:g}")
    if cycle < 2:
        raise UsageError(f"an FGE cycle takes at least 2 iterations, not {cycle}")

    def schedule(iteration: int) -> float:
        t = ((iteration - 1) % cycle + 1) / cycle
        return (1 - 2 * t) * high + 2 * t * low if t <= 0.5 else (2 - 2 * t) * low + (2 * t - 1) * high

    return schedule


def cyclic_middles(cycle: int, cycles: int) -> list[int]:
    """The iterations in mid-cycle, where :func:`cyclic` is lowest and a snapshot is due: one a cycle."""
    return [cycle // 2 + cycle * n for n in range(cycles)]
