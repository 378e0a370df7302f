"""Weight decay of the points that are sampled in a subspace, instead of its vertices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from ensembler.trainers.distributed import ALONE

__all__ = ["SampledDecay", "leaves_decay"]


@dataclass(frozen=True, eq=False)
class SampledDecay:
    """The decay of ``c @ V``, averaged over a step's points, as an optimiser decays weights.

    Its gradient is that of ``decay / 2 * |c @ V|^2``, ``decay * C^T diag(share) C @ V``. It is added to the loss's; or,
    if the optimiser's decay is decoupled from the gradient (Loshchilov & Hutter 2019), subtracted from the vertices at
    the learning rate.

    Attributes:
        strength: of all elements, or (P,) of each, where parameter groups differ.
        decoupled: whether the optimiser's decay is.
    """

    strength: float | Tensor
    decoupled: bool

    @classmethod
    def taken_from(cls, optimiser: Optimizer, factors: Sequence[float], gradients: Tensor) -> SampledDecay | None:
        """Take the decay over from an optimiser, whose own is then 0.

        Args:
            optimiser: of views of vertices.
            factors: of each parameter group's learning rate.
            gradients: (T, P) of the vertices, overwritten.

        Returns:
            ``None`` if it has no decay, or if it is not known how it decays: its own then stays.
        """
        groups = optimiser.param_groups
        if not any(group.get("weight_decay") for group in groups) or leaves_decay(optimiser):
            return None
        adamw = isinstance(optimiser, torch.optim.AdamW)
        decoupled = bool(groups[0].get("decoupled_weight_decay", adamw))
        strengths = [
            group["weight_decay"] * (factor if decoupled else 1.0)
            for group, factor in zip(groups, factors, strict=True)
        ]
        found: float | Tensor = strengths[0]
        if len(set(strengths)) > 1:
            for group, strength in zip(groups, strengths, strict=True):
                for view in group["params"]:  # its gradient is where it lies in the vector
                    view.grad.fill_(strength)
            found = gradients[0].clone()
        for group in groups:
            group["weight_decay"] = 0.0
        return cls(found, decoupled)

    def add(
        self,
        vertices: Tensor,
        trainable: Tensor,
        moving: Sequence[Tensor],
        gradients: Tensor,
        points: Tensor,
        size: int,
        rate: Tensor,
    ) -> None:
        """Decay the trainable vertices.

        Args:
            vertices: (K, P).
            trainable: (T,) their indices.
            moving: T vertices (P,), views of ``vertices``.
            gradients: (T, P).
            points: (S, K), a step's coefficients.
            size: examples in its batch, which the points share.
            rate: the learning rate, a scalar.
        """
        mixed = points.new_zeros(points.shape[1], points.shape[1])
        for c, (share,) in zip(points, ALONE.shares(size, len(points)), strict=False):
            mixed.addr_(c, c, alpha=share / size)
        rows = mixed[trainable]
        if not self.decoupled and not isinstance(self.strength, Tensor):
            gradients.addmm_(rows, vertices, alpha=self.strength)
            return
        pulls = (rows @ vertices).mul_(self.strength)
        if not self.decoupled:
            gradients.add_(pulls)
            return
        with torch.no_grad():
            for vertex, pull in zip(moving, pulls.mul_(rate), strict=True):
                vertex.sub_(pull)


def leaves_decay(optimiser: Optimizer) -> bool:
    """Whether an optimiser decays the vertices by itself, because it is not known how it decays."""
    known = isinstance(optimiser, torch.optim.SGD | torch.optim.AdamW)
    groups = optimiser.param_groups
    return any(group.get("weight_decay") for group in groups) and not (known or "decoupled_weight_decay" in groups[0])
