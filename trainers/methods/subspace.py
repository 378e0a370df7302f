"""Lines and simplexes trained jointly from scratch (Wortsman et al. 2021, "Learning neural network subspaces").

Vertices: K, each from fresh weights of its own, all of them moving. Coefficients: points drawn uniformly, one a step,
so that the whole subspace costs as many example passes as one network. It minimises

    loss(c @ V)  +  beta * cos^2(V[j], V[k])

with a pair j, k drawn anew at every step: without the second term the vertices would fall together (sec. 3.2). The
cosine is taken over weights of two or more dimensions (the authors' code: over convolutions' weights), so that
BatchNorm's gains and the biases, which are alike in all vertices, do not enter it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ensembler.options import option
from ensembler.trainers.method import Members, Method
from ensembler.trainers.recipes import SGD, Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from ensembler.trainers.budget import Budget, Piece
    from ensembler.trainers.plan import Regulariser
    from ensembler.trainers.trainer import Trainer
    from ensembler.weights import FlatWeights

__all__ = ["Subspace", "cosine_regulariser", "spread"]


class Subspace(Method):
    """Train a line or simplex jointly from scratch, at the cost of one network (Wortsman et al. 2021)."""

    command = "train-subspace"
    starts_fresh = True
    fast = {"epochs": 20, "vertices": 2}  # a vertex has its share of every step's gradient only
    # apple/learning-subspaces, experiment_configs/cifar10, for the 20-layer ResNet whose blocks are activated last.
    # Here the cosine is over the classifier's weights, too, and the vertices' start is scaled (see `spread`).
    published = tuple(
        Recipe(
            name,
            SGD | {"epochs": 160, "lr": 0.1, "schedule": "cosine", "weight_decay": 1e-4, "beta": 1.0, "warmup": 5.0},
            "Wortsman et al. 2021, arXiv 2102.10472",
            ("cifar10",),
        )
        for name in ("preresnet20", "resnet20")
    )

    vertices: int = option(3, ge=2, help="K, ends of a line (2) or corners of a simplex.")
    members: int = option(10, ge=1, help="M: the vertices first, then points drawn inside.")
    beta: float = option(1.0, ge=0, help="Weight of the squared cosine between two vertices.")
    concentration: float = option(
        1.0, gt=0, help="Dirichlet's alpha of the drawn members; below 1 leans to the vertices."
    )
    corners: bool = option(
        True, flag="--corners/--no-corners", help="Whether the first members are the vertices themselves."
    )

    def at_budget(self, budget: Budget) -> list[Piece] | str:
        """floor(b) independent subspaces, each at the cost of one network."""
        return budget.independent(self, budget.steps(budget.total // budget.whole))

    def train(self, trainer: Trainer) -> Members:
        """Train all vertices together."""
        import torch

        from ensembler.run import Sampling
        from ensembler.sampling import sample_coefficients
        from ensembler.subspace import dirichlet
        from ensembler.trainers.measure import describe, member_buffers
        from ensembler.trainers.plan import Plan
        from ensembler.trainers.starts import fresh

        K = self.vertices
        begins = [fresh(trainer, k) for k in range(K)]
        vertices = spread(torch.stack([begin.vector for begin in begins]), trainer.weights)
        iterations = trainer.steps(trainer.settings.epochs)
        plan = Plan(
            trainer.schedule(iterations),
            iterations,
            trainable=range(K),
            draw=lambda rng, count: dirichlet(count, K, rng),
            regulariser=cosine_regulariser(vertices, self.beta, trainer.weights) if self.beta else None,
            # A random pair: the places of the two least of K numbers.
            regulariser_draw=lambda rng, count: torch.from_numpy(rng.random((count, K)).argsort(axis=1)[:, :2]),
        )
        fitted = trainer.fit("subspace", vertices, begins[0].buffers, plan)
        sampling = Sampling(simplexes=[list(range(K))], concentration=self.concentration, corners=self.corners)
        coefficients = sample_coefficients(sampling, K, self.members, trainer.settings.seed)
        buffers = member_buffers(trainer, vertices, coefficients, fitted.buffers)
        found = describe(trainer, vertices, fitted.buffers, "subspace")
        return Members(vertices, coefficients, buffers, sampling, {"simplexes": [found]})


def spread(vertices: Tensor, weights: FlatWeights) -> Tensor:
    """The vertices (K, P) that points inside start from with the variance of an initialisation.

    A point's weights have ``sum c^2`` of a vertex's variance, ``2 / (K + 1)`` on average: without compensation a
    network without BatchNorm does not learn inside (the cnn with K = 3 stayed at chance on the digits). Only tensors
    that differ between the vertices are scaled: BatchNorm's gains and pretrained weights stay as they are.
    """
    import torch

    scale = math.sqrt((len(vertices) + 1) / 2)
    factors = torch.ones_like(vertices[0])
    for part in weights.slices().values():
        if (vertices[1:, part] != vertices[:1, part]).any():
            factors[part] = scale
    return vertices * factors


def cosine_regulariser(vertices: Tensor, beta: float, weights: FlatWeights) -> Regulariser:
    """Adds the gradient of ``beta * cos^2(u, v)`` for the drawn pair of the vertices (K, P).

    In u it is ``2 beta (u.v) / (|u|^2 |v|^2) * (v - (u.v) / |u|^2 * u)``, over weights of two or more dimensions.
    """
    import torch

    mask = torch.zeros_like(vertices[0])
    for part in weights.slices(least_dimensions=2).values():
        mask[part] = 1

    def add(gradients: Tensor, pair: Tensor | None) -> None:
        assert pair is not None  # noqa: S101  for the type checker
        u, v = (vertices.index_select(0, place)[0] * mask for place in torch.split(pair, 1))
        inner, u2, v2 = u.dot(v), u.dot(u), v.dot(v)
        strength = 2 * beta * inner / (u2 * v2)
        rows = torch.stack([(v - inner / u2 * u) * strength, (u - inner / v2 * v) * strength])
        gradients.index_add_(0, pair, rows)

    return add
