"""Snapshot ensembles: cosine restarts, a snapshot at each cycle's end (Huang et al. 2017, "Train 1, get M for free").

Vertices: the snapshots. Coefficients: the identity. One trainable vertex and one optimiser; the rate at iteration i of
cycles of c iterations is

    lr / 2 * (cos(pi * mod(i - 1, c) / c) + 1)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from ensembler.options import option
from ensembler.trainers.method import Members, Method
from ensembler.trainers.recipes import ASHUKHA_2020, SGD, SOLUTIONS, Recipe

if TYPE_CHECKING:
    from ensembler.trainers.budget import Budget, Piece
    from ensembler.trainers.settings import Settings
    from ensembler.trainers.trainer import Trainer

__all__ = ["Snapshots"]

# SamsungLabs/pytorch-ensembles, train/train_sse_mcmc.sh.
_SSE = {"batch_size": 64, "momentum": 0.0, "lr": 0.2, "epochs": 200, "cycle": 40, "members": 5}


class Snapshots(Method):
    """Collect snapshots at the end of cosine cycles (SSE, Huang et al. 2017)."""

    command = "train-snapshots"
    fast = {"epochs": 20, "members": 3}  # 7 epochs a cycle: in 5, the digits were not learnt
    published = (
        Recipe("vgg16bn", SOLUTIONS["vgg16"] | _SSE, ASHUKHA_2020),
        Recipe("preresnet164", SOLUTIONS["preresnet164"] | _SSE, ASHUKHA_2020),
        Recipe("wrn28x10", SOLUTIONS["wrn28x10"] | _SSE, ASHUKHA_2020),
        # gaohuang/SnapshotEnsemble, README and opts.lua, for the 110-layer ResNet whose blocks are activated last.
        Recipe(
            "preresnet110",
            SGD | _SSE | {"momentum": 0.9, "weight_decay": 1e-4},
            "Huang et al. 2017, arXiv 1704.00109",
        ),
    )

    members: int = option(5, ge=1, help="M, snapshots taken, one per cycle.")
    cycle: float | None = option(
        None, gt=0, help="Epochs per cycle; the paper takes 20 to 40. (default: --epochs divided by M)"
    )

    def resolved(self, settings: Settings) -> Self:
        """By default, the whole ensemble costs what one network does."""
        cycle = self.cycle or settings.epochs / self.members
        settings.check_warmup(cycle, f"a cycle of {cycle:g} epochs")
        return self.model_copy(update={"cycle": cycle})

    def at_budget(self, budget: Budget) -> list[Piece] | str:
        """One run of b x B, in cycles of --cycle epochs where given, else of B / M: M snapshots a budget."""
        from ensembler.trainers.budget import LEAST, Piece

        steps = budget.steps(budget.total)
        wanted = steps / (self.cycle * len(budget.sizes)) if self.cycle else budget.networks * self.members
        for count in range(min(steps, max(1, round(wanted))), 0, -1):
            length = steps // count
            if budget.passes(length * count) >= LEAST * budget.total:
                options = {"members": count, "cycle": budget.in_epochs(length)}
                epochs = budget.in_epochs(length * count)
                return [Piece(self.model_copy(update=options), budget.passes(length * count), epochs)]
        return f"its {steps:,} steps are too coarse"

    def train(self, trainer: Trainer) -> Members:
        """Train one network through M cosine cycles, and collect it at the end of each."""
        from ensembler.trainers.plan import Plan
        from ensembler.trainers.schedules import cosine, repeated
        from ensembler.trainers.starts import as_members, begin

        network, length = begin(trainer), trainer.steps(self.cycle or 1)
        plan = Plan(
            trainer.warmed(repeated(cosine(trainer.lr, length), length)),
            length * self.members,
            collect=range(length, length * self.members + 1, length),
        )
        return as_members(trainer.fit("snapshots", network.vector[None].clone(), network.buffers, plan).snapshots)
