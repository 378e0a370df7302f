"""Simplicial complexes: independent solutions joined by shared connectors (Benton et al. 2021, sec. 4.2).

Vertices: the modes, fixed, and the connectors, added one at a time. Simplex i is {mode i} and all connectors.
Coefficients: a simplex is drawn by its volume, then a point uniformly in it, in training and for the members. The
first connector starts at the centroid of the modes, a later one at that of the connectors, where the loss is low
already. Each minimises the mean loss minus lambda times the sum of the log volumes of all the simplexes: the published
code counts only the first, and draws the simplexes uniformly.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensembler.errors import UsageError
from ensembler.options import Given, option
from ensembler.trainers.method import Members, Method
from ensembler.trainers.methods.simplex import BASE, BENTON_2021
from ensembler.trainers.recipes import Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from torch import Tensor

    from ensembler.trainers.budget import Budget, Piece
    from ensembler.trainers.measure import Solved
    from ensembler.trainers.trainer import Trainer

__all__ = ["Complex"]


class Complex(Method):
    """Join independent solutions by simplexes with shared connectors (Benton et al. 2021)."""

    command = "train-complex"
    fast = {"epochs": 5, "points": 11}
    by_budget = frozenset({"points", "examples"})
    # One sample a step here; in g-benton/loss-surface-simplexes there are 5, which are summed.
    published = (Recipe("vgg16", BASE | {"epochs": 25, "lr": 0.05, "regularisation": 1e-7}, BENTON_2021),)

    modes: Given[Sequence[str | Path], list[str]] = option(
        argument=True, path=True, metavar="RUNS", help="Two runs or more; of each, the first member."
    )
    connectors: int = option(1, ge=1, help="Vertices that all simplexes share, added one at a time.")
    members: int = option(10, ge=1, help="M: the vertices first, then points drawn inside.")
    regularisation: float = option(1e-2, ge=0, help="lambda, the reward of log volume.")
    concentration: float = option(
        1.0, gt=0, help="Dirichlet's alpha of the drawn members; below 1 leans to the vertices."
    )
    corners: bool = option(
        True, flag="--corners/--no-corners", help="Whether the first members are the vertices themselves."
    )
    points: int = option(21, ge=3, help="Points at which the paths between the modes are measured.")
    examples: int = option(2000, ge=1, help="Training and test images that the measuring takes.")

    @property
    def runs(self) -> list[str]:
        """The modes."""
        return self.modes

    def at_budget(self, budget: Budget) -> list[Piece] | str:
        """floor(b) - 1 networks of B each, two at least, and connectors for the rest; paths are not measured."""
        from ensembler.trainers.budget import Piece

        count = max(2, budget.whole - 1)
        steps = budget.steps((budget.total - count * budget.one) // self.connectors)
        if steps < 1:
            return "two networks leave nothing for a connector"
        modes = {"modes": [budget.network(member) for member in range(count)]}
        options = self.model_copy(update={"points": 3, "examples": 64})
        return [Piece(options, self.connectors * budget.passes(steps), budget.in_epochs(steps), starts=modes)]

    def train(self, trainer: Trainer) -> Members:
        """Join the first members of two or more runs.

        ``metrics["paths"]`` holds, for each pair of modes, what :func:`ensembler.trainers.measure.path_scores` finds
        on the straight ``line`` and on the path over the connectors' centroid, which lies in the ``complex``.
        """
        import torch

        from ensembler.run import Sampling
        from ensembler.sampling import sample_coefficients
        from ensembler.subspace import dirichlet
        from ensembler.trainers.measure import describe, member_buffers
        from ensembler.trainers.plan import Plan
        from ensembler.trainers.regularisers import Volumes, perturbed
        from ensembler.trainers.starts import inherit

        if len(self.modes) < 2:
            raise UsageError(f"a complex joins at least 2 runs, not {len(self.modes)}")
        N, seed = len(self.modes), trainer.settings.seed
        ends = [inherit(trainer, trainer.starts[path], f"mode {i + 1}") for i, path in enumerate(self.modes)]
        vertices, buffers = torch.stack([end.vector for end in ends]), ends[0].buffers
        solved = {i: end.buffers for i, end in enumerate(ends)}
        for i, j in combinations(range(N), 2):
            if torch.equal(vertices[i], vertices[j]):
                raise UsageError(f"modes {i + 1} and {j + 1} are the same solution: train one with another --seed")
        iterations = trainer.steps(trainer.settings.epochs)
        for n in range(self.connectors):
            part = f"connector {n + 1}"
            start = (vertices[N:] if n else vertices).mean(dim=0)
            vertices = torch.cat([vertices, perturbed(start, seed, part)[None]])
            simplexes = [[i, *range(N, N + n + 1)] for i in range(N)]
            volumes = Volumes(vertices, simplexes)

            def draw(rng: np.random.Generator, count: int, corners: int = n + 2) -> Tensor:
                chosen = torch.from_numpy(rng.random((count, 1))).float()
                return torch.cat([chosen, dirichlet(count, corners, rng)], dim=1)

            regulariser = volumes.regulariser(self.regularisation, trainer.weights.vector)
            plan = Plan(
                trainer.schedule(iterations),
                iterations,
                trainable=[N + n],
                draw=draw,
                coefficients=volumes.coefficients,
                regulariser=regulariser if self.regularisation else None,
                centre=torch.eye(N + n + 1)[N:].mean(dim=0),  # of the connectors, which all simplexes share
            )
            buffers = trainer.fit(part, vertices, buffers, plan).buffers
        sampling = Sampling(
            simplexes=simplexes,
            concentration=self.concentration,
            corners=self.corners,
            weights=Volumes(vertices, simplexes).shares().tolist(),
        )
        coefficients = sample_coefficients(sampling, len(vertices), self.members, seed)
        named = {f"simplex {i + 1}": vertices[simplex] for i, simplex in enumerate(simplexes)}
        metrics: dict[str, Any] = {
            "simplexes": [
                describe(trainer, simplex, buffers, name, {0: solved[i]})
                for i, (name, simplex) in enumerate(named.items())
            ]
        }
        if trainer.settings.measure == "all":
            metrics["paths"] = self._paths(trainer, vertices, buffers, solved)
        members = member_buffers(trainer, vertices, coefficients, buffers, solved)
        return Members(vertices, coefficients, members, sampling, metrics)

    def _paths(
        self, trainer: Trainer, vertices: Tensor, buffers: Mapping[str, Tensor], solved: Solved
    ) -> list[dict[str, Any]]:
        import torch

        from ensembler.subspace import chain
        from ensembler.trainers.measure import path_scores

        N, t, corners = len(self.modes), torch.linspace(0, 1, self.points), torch.eye(len(vertices))
        middle = corners[N:].mean(dim=0)
        found = []
        for i, j in combinations(range(N), 2):
            line = chain(t, 2) @ corners[[i, j]]
            bent = chain(t, 3) @ torch.stack([corners[i], middle, corners[j]])
            ways = {"line": line, "complex": bent}
            scores = {
                name: path_scores(trainer, vertices, c, buffers, t, self.examples, solved) for name, c in ways.items()
            }
            found.append({"name": f"mode {i + 1} to mode {j + 1}", **scores})
        return found
