"""SWAG's Gaussian over weights: a mean, a diagonal and a low-rank part (Maddox et al. 2019, sec. 3.3).

A Gaussian is a matrix of K + 2 rows, each as long as the network's weights:

- row 0, the mean of the iterates;
- row 1, their standard deviation in each coordinate;
- rows 2 to K + 1, the columns of D: of each of the last iterates, its deviation from the mean of those up to it.

A member is the draw

    mean + sqrt(scale) * (std * z1 + D z2 / sqrt(K - 1)),    z1 ~ N(0, I_P), z2 ~ N(0, I_K)

whose covariance is ``scale * (diag(std^2) + D D^T / (K - 1))``. With ``scale = 1/2`` it is the paper's equation 1.
The diagonal part leaves the span of any few vertices, so that a drawn member is a vertex of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ensembler.errors import UsageError
from ensembler.seeds import generator
from ensembler.weights import FlatWeights

__all__ = ["draw", "flatten", "unflatten"]


def flatten(weights: FlatWeights, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return Gaussians (S, K + 2, P) on the network's device, from a run's tensors (S, K + 2, ...) by parameter."""
    rows = weights.flatten({name: tensor.flatten(0, 1) for name, tensor in tensors.items()})
    return rows.view(*next(iter(tensors.values())).shape[:2], -1)


def unflatten(weights: FlatWeights, gaussians: Tensor) -> dict[str, Tensor]:
    """Invert :func:`flatten`."""
    rows = weights.unflatten(gaussians.flatten(0, 1))
    return {name: tensor.unflatten(0, gaussians.shape[:2]) for name, tensor in rows.items()}


def draw(gaussians: Tensor, scale: float, members: int, seed: int) -> Tensor:
    """Draw members from Gaussians in turn: member m from Gaussian ``m mod S``.

    A member depends on the seed and its number only, not on the device or on how many are drawn.

    Args:
        gaussians: (S, K + 2, P), with K = 0 or K >= 2.
        scale: factor of the covariance, >= 0.
        members: M >= 1.
        seed: of the draw.

    Returns:
        (M, P), on the Gaussians' device.

    Raises:
        UsageError: ``members < 1``.
    """
    if members < 1:
        raise UsageError(f"an ensemble needs at least one member, not {members}")
    S, rows, P = gaussians.shape
    K, drawn = rows - 2, gaussians.new_empty(members, P)
    for m, member in enumerate(drawn):
        mean, std, deviations = gaussians[m % S].split([1, 1, K])
        stream = generator(seed, "gaussian", m)
        z1, z2 = (torch.randn(size, generator=stream).to(gaussians.device) for size in (P, K))
        torch.mul(std[0], z1, out=member)
        if K:
            member.addmv_(deviations.T, z2, alpha=1 / math.sqrt(K - 1))
        member.mul_(math.sqrt(scale)).add_(mean[0])
    return drawn
