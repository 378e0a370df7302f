"""Simplicial complexes: independent solutions joined by shared connectors (Benton et al. 2021, sec. 4.2).

Vertices: the modes, fixed, and the connectors, added one at a time. Simplex i is {mode i} and all connectors.
Coefficients: a simplex is drawn by its volume, then a point uniformly in it, in training and for the members. The
first connector starts at the centroid of the modes, a later one at that of the connectors, where the loss is low
already. Each minimises the mean loss minus lambda times the sum of the log volumes of all the simplexes: the published
code counts only the first, and draws the simplexes uniformly.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, count

import numpy as np
import torch
from torch import Tensor

from ensembler.ensemble import sample_coefficients
from ensembler.errors import UsageError
from ensembler.run import Run, Sampling
from ensembler.seeds import derive
from ensembler.subspace import chain, dirichlet, log_volume
from ensembler.trainers.curve import path_scores
from ensembler.trainers.loop import Draw, Regulariser
from ensembler.trainers.schedules import one_cycle
from ensembler.trainers.session import Session
from ensembler.trainers.simplex import describe, nudged, towards_volume

__all__ = ["by_volume", "train_complex"]


def train_complex(
    session: Session,
    modes: Sequence[Run],
    connectors: int = 1,
    members: int | None = None,
    regularisation: float = 1e-2,
    concentration: float = 1.0,
    corners: bool = True,
    points: int = 21,
    examples: int = 2000,
) -> Run:
    """Join the first members of two or more runs.

    Args:
        session: the dataset and settings; ``settings.epochs`` are spent on each connector, at ``settings.rate``.
        modes: N >= 2 runs of one architecture on the session's dataset.
        connectors: how many, at least 1.
        members: M, drawn once for the run; by default as many as vertices, which with ``corners`` they are.
        regularisation: lambda >= 0.
        concentration: of the Dirichlet that the members are drawn from.
        corners: whether the first members are the vertices themselves.
        points: at which the way between two modes is measured, at least 3.
        examples: images that the measuring takes from the training and from the test images, at most.

    Returns:
        A run of method ``complex``, from which further members can be drawn. Its vertices are the modes, then the
        connectors. ``metrics["paths"]`` holds, for each pair of modes, the columns of
        :func:`ensembler.trainers.curve.path_scores` for the straight ``line`` and for the way over the connectors'
        centroid, which lies in the ``complex``.
    """
    if len(modes) < 2:
        raise UsageError("a complex joins at least 2 runs")
    if connectors < 1 or points < 3 or examples < 1:
        raise UsageError("a complex needs at least 1 connector, 3 points and 1 example")
    if not regularisation >= 0:
        raise UsageError(f"the regularisation must not be negative, as {regularisation} is")
    members = len(modes) + connectors if members is None else members
    N, seed = len(modes), session.settings.seed
    ends = [session.inherit(run, f"mode {i + 1}") for i, run in enumerate(modes)]
    vertices = torch.stack([end.vector for end in ends])
    for i, j in combinations(range(N), 2):
        if torch.equal(vertices[i], vertices[j]):
            raise UsageError(f"modes {i + 1} and {j + 1} are the same solution: train one with another --seed")
    session.weights.load_buffers(ends[0].buffers)
    iterations = session.iterations(session.settings.epochs)
    for n in range(connectors):
        part = f"connector {n + 1}"
        vertices = torch.cat([vertices, nudged((vertices[N:] if n else vertices).mean(dim=0), seed, part)[None]])
        simplexes = _simplexes(N, n + 1)
        draws = np.random.default_rng(derive(seed, "points", part))
        session.train(
            part,
            vertices,
            one_cycle(session.settings.rate, iterations),
            iterations,
            trainable=[N + n],
            draw=by_volume(vertices, simplexes, draws, every=session.per_epoch),
            regulariser=_towards_volumes(session, vertices, simplexes, regularisation) if regularisation else None,
        )
    sampling = Sampling(
        simplexes=simplexes, concentration=concentration, corners=corners, weights=_shares(vertices, simplexes)
    )
    coefficients = sample_coefficients(sampling, len(vertices), members, seed)
    return session.finish(
        "complex",
        vertices,
        coefficients,
        session.member_buffers(vertices, coefficients),
        sampling=sampling,
        metrics={
            "simplexes": [
                describe(session, vertices[simplex], f"simplex {i + 1}") for i, simplex in enumerate(simplexes)
            ],
            "paths": _paths(session, vertices, N, points, examples),
        },
        options={
            "modes": N,
            "connectors": connectors,
            "members": members,
            "regularisation": regularisation,
            "concentration": concentration,
            "corners": corners,
            "points": points,
            "examples": examples,
        },
    )


def by_volume(vertices: Tensor, simplexes: list[list[int]], rng: np.random.Generator, every: int) -> Draw:
    """Draws S to coefficients (S, K): a simplex by its volume, then Dirichlet(1) in it.

    The volumes change as a vertex moves: they are taken anew at every ``every``-th call.
    """
    calls, shares = count(), np.empty(0)

    def draw(samples: int) -> Tensor:
        nonlocal shares
        if next(calls) % every == 0:
            shares = np.array(_shares(vertices, simplexes))
        coefficients = torch.zeros(samples, len(vertices))
        for row, i in zip(coefficients, rng.choice(len(simplexes), samples, p=shares), strict=True):
            row[simplexes[i]] = dirichlet(1, len(simplexes[i]), rng)[0]
        return coefficients

    return draw


def _towards_volumes(session: Session, vertices: Tensor, simplexes: list[list[int]], strength: float) -> Regulariser:
    """Towards the volume of every simplex, in the last vertex, which all of them share."""
    scratch = session.weights.vector
    pulls = [towards_volume(vertices[simplex[:-1]], vertices[-1], strength, scratch) for simplex in simplexes]

    def add(gradients: Tensor) -> None:
        for pull in pulls:
            pull(gradients)

    return add


def _simplexes(modes: int, connectors: int) -> list[list[int]]:
    return [[i, *range(modes, modes + connectors)] for i in range(modes)]


def _shares(vertices: Tensor, simplexes: list[list[int]]) -> list[float]:
    """Each simplex's share of the complex's volume; even shares where it is flat."""
    logs = torch.stack([log_volume(vertices[simplex]) for simplex in simplexes])
    even = torch.full_like(logs, 1 / len(logs))
    shares: list[float] = (torch.softmax(logs, dim=0) if logs.isfinite().any() else even).tolist()
    return shares


def _paths(session: Session, vertices: Tensor, modes: int, points: int, examples: int) -> list[dict[str, object]]:
    t = torch.linspace(0, 1, points)
    corners = torch.eye(len(vertices))
    middle = corners[modes:].mean(dim=0)
    return [
        {
            "name": f"mode {i + 1} to mode {j + 1}",
            "line": path_scores(session, vertices, chain(t, 2) @ corners[[i, j]], t, examples),
            "complex": path_scores(
                session, vertices, chain(t, 3) @ torch.stack([corners[i], middle, corners[j]]), t, examples
            ),
        }
        for i, j in combinations(range(modes), 2)
    ]
