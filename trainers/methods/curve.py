"""Mode-connecting curves: a path of low loss between two solutions (Garipov et al. 2018, sec. 3).

Vertices: the two ends, fixed, and the bends between them, which move. Coefficients: the curve's basis at t. The bends
start on the straight line and minimise the expected loss at ``t ~ U(0, 1)``, one t a step; weight decay acts on the
sampled weights, as in the paper's code.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ensembler.errors import UsageError
from ensembler.options import Given, option
from ensembler.trainers.method import Members, Method
from ensembler.trainers.recipes import GARIPOV_2018, SOLUTIONS, Recipe

if TYPE_CHECKING:
    from ensembler.trainers.budget import Budget, Piece
    from ensembler.trainers.trainer import Trainer

__all__ = ["Curve"]

# timgaripov/dnn-mode-connectivity, README, "Training the curves"; its 3 bends count both ends.
_CURVES = {
    "vgg16": {"epochs": 600, "lr": 0.015},
    "preresnet164": {"epochs": 200, "lr": 0.03},
    "wrn28x10": {"epochs": 200, "lr": 0.03},
}


class Curve(Method):
    """Connect two solutions by a path of low loss (Garipov et al. 2018)."""

    command = "train-curve"
    fast = {"epochs": 5, "points": 21}
    by_budget = frozenset({"points", "examples"})
    published = tuple(
        Recipe(name, SOLUTIONS[name] | {"curve": "bezier", "bends": 1, "points": 61} | options, GARIPOV_2018)
        for name, options in _CURVES.items()
    )

    first: Given[str | Path, str] = option(
        argument=True, path=True, metavar="FIRST", help="The run whose first member is one end."
    )
    second: Given[str | Path, str] = option(
        argument=True, path=True, metavar="SECOND", help="The run whose first member is the other end."
    )
    curve: Literal["bezier", "chain"] = option("bezier", help="bezier, or chain for straight pieces.")
    bends: int = option(1, ge=1, help="N, points between the ends that move.")
    members: int = option(5, ge=2, help="M, points of the curve in the ensemble, evenly spaced.")
    points: int = option(61, ge=3, help="Points at which the straight line and the curve are measured.")
    examples: int = option(2000, ge=1, help="Training and test images that the measuring takes.")

    @property
    def name(self) -> str:
        """``curve-bezier`` or ``curve-chain``."""
        return f"curve-{self.curve}"

    @property
    def runs(self) -> list[str]:
        """The two ends."""
        return [self.first, self.second]

    def at_budget(self, budget: Budget) -> list[Piece] | str:
        """Two networks of B each, and the curve between them for the rest; the path itself is not measured."""
        from ensembler.trainers.budget import Piece

        steps = budget.steps(budget.total - 2 * budget.one)
        if steps < 1:
            return "two networks leave nothing for the curve"
        ends = {"first": budget.network(0), "second": budget.network(1)}
        options = self.model_copy(update={"points": 3, "examples": 64})
        return [Piece(options, budget.passes(steps), budget.in_epochs(steps), starts=ends)]

    def train(self, trainer: Trainer) -> Members:
        """Connect the first members of two runs.

        The metrics hold, for ``"line"`` and ``"curve"``, what :func:`ensembler.trainers.measure.path_scores` finds.
        """
        import torch

        from ensembler.subspace import CURVES
        from ensembler.trainers.measure import member_buffers, path_scores
        from ensembler.trainers.plan import Plan
        from ensembler.trainers.starts import inherit

        basis, K = CURVES[self.curve], self.bends + 2
        ends = [inherit(trainer, trainer.starts[path], f"end {i + 1}") for i, path in enumerate(self.runs)]
        w1, w2 = ends[0].vector, ends[1].vector
        if torch.equal(w1, w2):
            raise UsageError("both ends are the same solution: train the second with another --seed")
        vertices = torch.stack([torch.lerp(w1, w2, k / (K - 1)) for k in range(K)])
        line = vertices[[0, -1]].clone()
        iterations = trainer.steps(trainer.settings.epochs)
        plan = Plan(
            trainer.schedule(iterations),
            iterations,
            trainable=range(1, K - 1),
            draw=lambda rng, count: basis(torch.from_numpy(rng.random(count)).float(), K),
            decay_sampled=True,
            centre=basis(torch.tensor([0.5]), K)[0],
        )
        fitted = trainer.fit("curve", vertices, ends[0].buffers, plan)
        t, first, second = torch.linspace(0, 1, self.points), ends[0].buffers, ends[1].buffers
        straight, solved = {0: first, 1: second}, {0: first, K - 1: second}
        metrics: dict[str, Any] = {}
        if trainer.settings.measure == "all":
            metrics["path"] = {
                "line": path_scores(trainer, line, CURVES["chain"](t, 2), first, t, self.examples, straight),
                "curve": path_scores(trainer, vertices, basis(t, K), fitted.buffers, t, self.examples, solved),
            }
        coefficients = basis(torch.linspace(0, 1, self.members), K)
        buffers = member_buffers(trainer, vertices, coefficients, fitted.buffers, solved)
        return Members(vertices, coefficients, buffers, metrics=metrics)
