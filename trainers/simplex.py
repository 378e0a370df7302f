"""SPRO and ESPRO: simplexes of solutions, grown one vertex at a time (Benton et al. 2021, sec. 4 and 5).

Vertices: a trained solution and K - 1 more, once for each simplex. Coefficients: points drawn uniformly, Dirichlet(1),
in training and, with a concentration of the user's choice, for the members, each of which lies in one simplex. A new
vertex starts at the centroid of the present ones and is the only one that moves. It minimises

    mean over sampled points of loss(c @ V)  -  lambda * log volume(V)

The published code sums over the samples where the paper takes the mean, and regularises with the squared volume and a
lambda that is practically zero; here both are the paper's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ensembler.ensemble import sample_coefficients
from ensembler.errors import UsageError
from ensembler.run import Run, Sampling
from ensembler.seeds import derive, generator
from ensembler.subspace import AffineHull, dirichlet, edge_lengths, log_volume
from ensembler.trainers.loop import Regulariser
from ensembler.trainers.schedules import cosine
from ensembler.trainers.session import Session

__all__ = ["towards_volume", "train_simplex"]

_NUDGE = 1e-3  # a new vertex's first step off the hull of the others, as a share of the centroid's norm
_SOFTENING = 1e-2  # eps of the regulariser's gradient, likewise


def train_simplex(
    session: Session,
    vertices: int = 4,
    members: int = 10,
    vertex_epochs: float | None = None,
    vertex_rate: float = 0.1,
    regularisation: float = 1e-2,
    concentration: float = 1.0,
    samples_per_step: int = 1,
    simplexes: int = 1,
) -> Run:
    """Grow simplexes, each around a solution of its own, and draw an ensemble from them.

    Args:
        session: the dataset and settings; with ``session.init``, that solution is the first vertex.
        vertices: K >= 2, of each simplex.
        members: M, points drawn once for the run and shared out among the simplexes; at least one for each.
        vertex_epochs: spent on each added vertex; by default a quarter of the solution's.
        vertex_rate: highest learning rate of an added vertex; a cosine takes it to 0.
        regularisation: lambda >= 0.
        concentration: of the Dirichlet that the members are drawn from; below 1 leans to the vertices.
        samples_per_step: points a step, at least 1; the batch is split among them.
        simplexes: S >= 1; one is SPRO, several are ESPRO.

    Returns:
        A run of method ``simplex``, or ``simplexes`` where S > 1, from which further members can be drawn. Simplex s
        has the vertices s K to (s + 1) K - 1.
    """
    epochs = session.settings.epochs / 4 if vertex_epochs is None else vertex_epochs
    if vertices < 2:
        raise UsageError(f"a simplex needs at least 2 vertices, not {vertices}")
    for name, value in (
        ("vertex_epochs", epochs),
        ("vertex_rate", vertex_rate),
        ("samples_per_step", samples_per_step),
        ("simplexes", simplexes),
    ):
        if not value > 0:
            raise UsageError(f"{name} must be positive, not {value}")
    if not regularisation >= 0:
        raise UsageError(f"the regularisation must not be negative, as {regularisation} is")
    if members < simplexes:
        raise UsageError(f"{members} members are too few for {simplexes} simplexes: each needs at least one member")
    if simplexes > 1 and session.init is not None:
        raise UsageError("several simplexes start from independent solutions, never from one run")
    rows = torch.arange(simplexes * vertices).view(simplexes, vertices).tolist()
    sampling = Sampling(simplexes=rows, concentration=concentration)
    coefficients = sample_coefficients(sampling, simplexes * vertices, members, session.settings.seed)

    grown = []
    for number in range(simplexes):
        simplex = session.solution(number).vector[None].clone()
        for k in range(1, vertices):
            part = f"vertex {k + 1}" if simplexes == 1 else f"simplex {number + 1}, vertex {k + 1}"
            simplex = torch.cat([simplex, _beginning(simplex, session.settings.seed, part)[None]])
            rng = np.random.default_rng(derive(session.settings.seed, "points", part))
            iterations = session.iterations(epochs)
            session.train(
                part,
                simplex,
                cosine(vertex_rate, iterations),
                iterations,
                trainable=[k],
                draw=lambda samples, K=k + 1, rng=rng: dirichlet(samples, K, rng),
                samples=samples_per_step,
                regulariser=towards_volume(simplex, regularisation, scratch=session.weights.vector),
            )
        grown.append(simplex)
    everything = torch.cat(grown)
    return session.finish(
        "simplex" if simplexes == 1 else "simplexes",
        everything,
        coefficients,
        session.member_buffers(everything, coefficients),
        sampling=sampling,
        metrics={"simplexes": [_geometry(simplex) for simplex in grown]},
        options={
            "vertices": vertices,
            "members": members,
            "vertex_epochs": epochs,
            "vertex_rate": vertex_rate,
            "regularisation": regularisation,
            "concentration": concentration,
            "samples_per_step": samples_per_step,
            "simplexes": simplexes,
        },
    )


def _beginning(simplex: Tensor, seed: int, part: str) -> Tensor:
    """The centroid, nudged off the hull: on it the volume is zero and its gradient undefined."""
    centroid = simplex.mean(dim=0)
    noise = torch.randn(centroid.shape, generator=generator(seed, "nudge", part)).to(centroid.device)
    return centroid + noise * (_NUDGE * centroid.norm() / noise.norm())


def towards_volume(simplex: Tensor, strength: float, scratch: Tensor) -> Regulariser | None:
    """Adds the gradient of ``-strength * log volume`` in the last vertex: ``-strength * r / (h^2 + eps^2)``.

    ``scratch`` (P,) is overwritten: the network's own weight vector is free between two steps.
    """
    if strength == 0:
        return None
    hull, vertex = AffineHull(simplex[:-1]), simplex[-1]
    softening = _SOFTENING * simplex[:-1].mean(dim=0).norm()

    def add(gradients: Tensor) -> None:
        residual = hull.residual(vertex, out=scratch)
        gradients[0].addcmul_(residual, strength / (residual.dot(residual) + softening**2), value=-1)

    return add


def _geometry(simplex: Tensor) -> dict[str, Any]:
    return {"log_volume": log_volume(simplex).item(), "edge_lengths": edge_lengths(simplex).tolist()}
