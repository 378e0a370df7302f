"""What keeps the vertices of a simplex apart: its volume, or the distance between its predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from ensembler.seeds import generator
from ensembler.subspace import AffineHull, log_volume
from ensembler.task import Task
from ensembler.trainers.plan import Penalty, Regulariser

__all__ = ["Volumes", "hellinger_repulsion", "perturbed", "volume_regulariser"]

_PERTURBATION = 1e-3  # a new vertex's first step off the hull of the others, as a share of the centroid's norm
_SOFTENING = 1e-2  # eps of the volume's gradient, likewise
_LEAST_DISTANCE = 1e-4  # keeps the logarithm of a squared distance finite


def perturbed(centroid: Tensor, seed: int, part: str) -> Tensor:
    """The centroid (P,) moved off the hull of the vertices, on which the volume is zero and its gradient undefined."""
    noise = torch.randn(centroid.shape, generator=generator(seed, "perturbation", part)).to(centroid.device)
    return centroid + noise * (_PERTURBATION * centroid.norm() / noise.norm())


def volume_regulariser(others: Tensor, vertex: Tensor, strength: float, scratch: Tensor) -> Regulariser:
    """Adds the gradient of ``-strength * log volume`` in the moving vertex: ``-strength * r / (h^2 + eps^2)``.

    Args:
        others: (K, P) the simplex's other vertices, fixed.
        vertex: (P,) the one that moves.
        strength: lambda.
        scratch: (P,) overwritten: the network's own weight vector is free between two steps.
    """
    hull = AffineHull(others)
    softening = (_SOFTENING * others.mean(dim=0).norm()) ** 2

    def add(gradients: Tensor, drawn: Tensor | None = None) -> None:
        residual = hull.residual(vertex, out=scratch)
        gradients[0].addcmul_(residual, strength / (residual.dot(residual) + softening), value=-1)

    return add


def hellinger_repulsion(task: Task, strength: float) -> Penalty:
    """``-strength * log d`` of the root mean square distance d between the predictions at two points.

    The distance is the task's; of a classifier, Hellinger's. As the loop lets the gradient through one of the two
    points only, the term is doubled: in expectation, its gradient is then the whole one.
    """

    def penalty(outputs: Tensor, others: Tensor) -> Tensor:
        squared = task.distances(outputs, others).mean()
        return -strength * (squared + _LEAST_DISTANCE).log()

    return penalty


class Volumes:
    """The volumes of simplexes that have the last vertex in common, while it alone moves.

    ``log volume = log volume of the other vertices' simplex + log h - log (K - 1)`` with h the last vertex's distance
    to their hull, so that only the distances are computed anew.

    Args:
        vertices: (K, P); kept, not copied.
        simplexes: of each, the rows of its vertices; the last one is the last of ``vertices``.
    """

    def __init__(self, vertices: Tensor, simplexes: list[list[int]]) -> None:
        self.vertices, self.simplexes = vertices, simplexes
        self._others = [vertices[simplex[:-1]] for simplex in simplexes]
        self._hulls = [AffineHull(others) for others in self._others]
        flat = torch.zeros((), dtype=torch.float64)
        fixed = [log_volume(others) if len(others) > 1 else flat for others in self._others]
        self._fixed = torch.stack(fixed).to(vertices.device)
        self._rows = torch.tensor(simplexes, device=vertices.device)

    def shares(self) -> Tensor:
        """Each simplex's share (N,) of the whole volume, float64; even shares where all are flat."""
        heights = torch.stack([hull.residual(self.vertices[-1]).norm().double() for hull in self._hulls])
        logs = self._fixed + heights.log()
        even = torch.full_like(logs, 1 / len(logs))
        return torch.where(logs.isfinite().any(), torch.softmax(logs, dim=0).nan_to_num(0.0), even)

    def coefficients(self, drawn: Tensor) -> Tensor:
        """Coefficients (S, K) from rows (S, 1 + k): a simplex by its present volume, then the point in it.

        The first number of a row, uniform in [0, 1), chooses the simplex; the others are barycentric coordinates.
        """
        bounds = self.shares().cumsum(0).to(drawn.dtype)[:-1]
        chosen = torch.searchsorted(bounds, drawn[:, 0].contiguous(), right=True)
        rows = self._rows.index_select(0, chosen)
        empty = torch.zeros(len(drawn), len(self.vertices), dtype=drawn.dtype, device=drawn.device)
        return empty.scatter(1, rows, drawn[:, 1:])

    def regulariser(self, strength: float, scratch: Tensor) -> Regulariser:
        """Adds the gradient of ``-strength`` times the sum of the log volumes; see :func:`volume_regulariser`."""
        own = [volume_regulariser(others, self.vertices[-1], strength, scratch) for others in self._others]

        def add(gradients: Tensor, drawn: Tensor | None = None) -> None:
            for each in own:
                each(gradients, drawn)

        return add
