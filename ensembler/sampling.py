"""Coefficients of members that are drawn from simplexes."""

from __future__ import annotations

from itertools import chain

import numpy as np
import torch
from torch import Tensor

from ensembler.errors import UsageError
from ensembler.run import Sampling
from ensembler.seeds import derive
from ensembler.subspace import dirichlet

__all__ = ["sample_coefficients"]


def sample_coefficients(sampling: Sampling, vertices: int, members: int, seed: int) -> Tensor:
    """Draw coefficients (M, K) of members, each from a Dirichlet distribution in one of the simplexes.

    Without weights, members are assigned to the simplexes in turn; with weights, each member's simplex is drawn. With
    corners, the first members are the vertices: the first of every simplex, then the second of every simplex, and so
    on.

    Raises:
        UsageError: ``members < 1``.
    """
    if members < 1:
        raise UsageError(f"an ensemble needs at least one member, not {members}")
    rng = np.random.default_rng(derive(seed, "members"))
    coefficients = torch.zeros(members, vertices)
    simplexes = sampling.simplexes
    corners = list(dict.fromkeys(chain.from_iterable(zip(*simplexes, strict=True)))) if sampling.corners else []
    corners = corners[:members]
    coefficients[torch.arange(len(corners)), torch.tensor(corners, dtype=torch.int64)] = 1
    places, count = np.arange(len(corners), members), len(simplexes)
    drawn = places % count if sampling.weights is None else rng.choice(count, len(places), p=sampling.weights)
    for i, simplex in enumerate(simplexes):
        rows = torch.from_numpy(places[drawn == i])
        points = dirichlet(len(rows), len(simplex), rng, sampling.concentration)
        coefficients[rows[:, None], torch.tensor(simplex)] = points
    return coefficients
