"""SWAG's Gaussian over weights: a mean, a diagonal and a low-rank part (Maddox et al. 2019, sec. 3.3).

A Gaussian has K + 2 rows for each parameter of the network:

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

__all__ = ["draw"]


def draw(gaussians: Mapping[str, Tensor], scale: float, members: int, seed: int) -> dict[str, Tensor]:
    """Draw members from Gaussians in turn: member m from Gaussian ``m mod S``.

    Its random numbers depend on the seed, m and the parameters' names and sizes only: not on the device, on the memory
    format, or on how many members are drawn.

    Args:
        gaussians: parameter name to (S, K + 2, ...), with K = 0 or K >= 2.
        scale: factor of the covariance, >= 0.
        members: M >= 1.
        seed: of the draw.

    Returns:
        Parameter name to (M, ...), on the Gaussians' device.

    Raises:
        UsageError: ``members < 1``.
    """
    if members < 1:
        raise UsageError(f"an ensemble needs at least one member, not {members}")
    S, rows = next(iter(gaussians.values())).shape[:2]
    K = rows - 2
    drawn = {name: own.new_empty(members, *own.shape[2:]) for name, own in gaussians.items()}
    for m in range(members):
        stream = generator(seed, "gaussian", m)
        z2 = torch.randn(K, generator=stream)
        for name in sorted(gaussians):
            own = gaussians[name][m % S]
            apart = own[1] * torch.randn(own.shape[1:], generator=stream).to(own.device)
            if K:
                apart += torch.tensordot(z2.to(own.device), own[2:], 1) / math.sqrt(K - 1)
            drawn[name][m] = own[0] + math.sqrt(scale) * apart
    return drawn
