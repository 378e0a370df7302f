"""Lines and simplexes trained jointly from scratch (Wortsman et al. 2021, "Learning neural network subspaces").

Vertices: K, each from fresh weights of its own, all of them moving. Coefficients: points drawn uniformly, one a step,
so that the whole subspace costs as many example passes as one network. It minimises

    loss(c @ V)  +  beta * cos^2(V[j], V[k])

with a pair j, k drawn anew at every step: without the second term the vertices would fall together (sec. 3.2).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ensembler.ensemble import sample_coefficients
from ensembler.errors import UsageError
from ensembler.run import Run, Sampling
from ensembler.seeds import derive
from ensembler.subspace import dirichlet
from ensembler.trainers.loop import Regulariser
from ensembler.trainers.session import Session
from ensembler.trainers.simplex import describe

__all__ = ["towards_right_angles", "train_subspace"]


def train_subspace(
    session: Session,
    vertices: int = 3,
    members: int = 10,
    beta: float = 1.0,
    concentration: float = 1.0,
    corners: bool = True,
) -> Run:
    """Train a line (K = 2) or a simplex of solutions in one go.

    Args:
        session: the dataset and settings; ``settings.epochs`` are spent on all vertices together.
        vertices: K >= 2.
        members: M, drawn once for the run.
        beta: weight of the squared cosine, at least 0 (the paper takes 1).
        concentration: of the Dirichlet that the members are drawn from; below 1 leans to the vertices.
        corners: whether the first members are the vertices themselves.

    Returns:
        A run of method ``subspace``, from which further members can be drawn.
    """
    if vertices < 2:
        raise UsageError(f"a subspace needs at least 2 vertices, not {vertices}")
    if not beta >= 0:
        raise UsageError(f"beta must not be negative, as {beta} is")
    if session.begins_solved:
        raise UsageError("a joint subspace starts from fresh weights, never from a solution")
    sampling = Sampling(simplexes=[list(range(vertices))], concentration=concentration, corners=corners)
    coefficients = sample_coefficients(sampling, vertices, members, session.settings.seed)
    beginnings = [session.fresh(k) for k in range(vertices)]
    # A point's weights have sum c^2 of a vertex's variance, 2 / (K + 1) on average: with an initialisation's there, a
    # network without BatchNorm learns inside, too (the cnn with K = 3 stayed at chance on the digits without this).
    subspace = torch.stack([beginning.vector for beginning in beginnings]) * math.sqrt((vertices + 1) / 2)
    session.weights.load_buffers(beginnings[0].buffers)
    rng = np.random.default_rng(derive(session.settings.seed, "points", "subspace"))
    iterations = session.iterations(session.settings.epochs)
    session.train(
        "subspace",
        subspace,
        session.schedule(iterations),
        iterations,
        rng,
        trainable=range(vertices),
        draw=lambda samples: dirichlet(samples, vertices, rng),
        regulariser=towards_right_angles(subspace, beta, rng),
    )
    return session.finish(
        "subspace",
        subspace,
        coefficients,
        session.member_buffers(subspace, coefficients),
        sampling=sampling,
        metrics={"simplexes": [describe(session, subspace, "subspace")]},
        options={
            "vertices": vertices,
            "members": members,
            "beta": beta,
            "concentration": concentration,
            "corners": corners,
        },
    )


def towards_right_angles(vertices: Tensor, beta: float, rng: np.random.Generator) -> Regulariser | None:
    """Adds the gradient of ``beta * cos^2(u, v)`` for a random pair of the vertices (K, P).

    In u it is ``2 beta (u.v) / (|u|^2 |v|^2) * (v - (u.v) / |u|^2 * u)``.
    """
    if beta == 0:
        return None

    def add(gradients: Tensor) -> None:
        j, k = rng.choice(len(vertices), 2, replace=False).tolist()
        inner, u2, v2 = (vertices[a].dot(vertices[b]) for a, b in ((j, k), (j, j), (k, k)))
        strength = 2 * beta * inner / (u2 * v2)
        for of, other, square in ((j, k, u2), (k, j, v2)):
            gradients[of].addcmul_(vertices[other], strength).addcmul_(vertices[of], -strength * inner / square)

    return add
