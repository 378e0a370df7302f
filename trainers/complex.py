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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ensembler.ensemble import sample_coefficients
from ensembler.errors import UsageError
from ensembler.run import Run, Sampling
from ensembler.seeds import derive
from ensembler.subspace import AffineHull, chain, dirichlet, log_volume
from ensembler.trainers.curve import path_scores
from ensembler.trainers.loop import Draw, Regulariser
from ensembler.trainers.session import Session
from ensembler.trainers.simplex import describe, nudged, towards_volume

__all__ = ["Volumes", "by_volume", "train_complex"]


def train_complex(
    session: Session,
    modes: Sequence[Run],
    connectors: int = 1,
    members: int = 10,
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
        members: M, drawn once for the run.
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
        simplexes = [[i, *range(N, N + n + 1)] for i in range(N)]
        volumes = Volumes(vertices, simplexes)
        rng = np.random.default_rng(derive(seed, "points", part))
        session.train(
            part,
            vertices,
            session.schedule(iterations),
            iterations,
            rng,
            trainable=[N + n],
            draw=by_volume(volumes, rng),
            regulariser=volumes.towards(regularisation, session.weights.vector) if regularisation else None,
        )
    sampling = Sampling(
        simplexes=simplexes,
        concentration=concentration,
        corners=corners,
        weights=Volumes(vertices, simplexes).shares().tolist(),
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


class Volumes:
    """The volumes of simplexes that have the last vertex in common, while it alone moves.

    ``log volume = log volume of the other vertices' simplex + log h - log (K - 1)`` with h the last vertex's distance
    to their hull, so that only the distances are taken anew.

    Args:
        vertices: (K, P); kept, not copied.
        simplexes: of each, the rows of its vertices; the last one is the last of ``vertices``.
    """

    def __init__(self, vertices: Tensor, simplexes: list[list[int]]) -> None:
        self.vertices, self.simplexes = vertices, simplexes
        self._others = [vertices[simplex[:-1]] for simplex in simplexes]
        self._hulls = [AffineHull(others) for others in self._others]
        self._fixed = torch.stack(
            [log_volume(others) if len(others) > 1 else torch.zeros((), dtype=torch.float64) for others in self._others]
        )

    def shares(self) -> NDArray[np.float64]:
        """Each simplex's share of the whole volume, sum 1; even shares where all are flat."""
        heights = torch.stack([hull.residual(self.vertices[-1]).norm().double().cpu() for hull in self._hulls])
        logs = self._fixed + heights.log()
        even = torch.full_like(logs, 1 / len(logs))
        return (torch.softmax(logs, dim=0) if logs.isfinite().any() else even).numpy()

    def towards(self, strength: float, scratch: Tensor) -> Regulariser:
        """Adds the gradient of ``-strength`` times the sum of the log volumes; see
        :func:`ensembler.trainers.simplex.towards_volume`."""
        pulls = [towards_volume(others, self.vertices[-1], strength, scratch) for others in self._others]

        def add(gradients: Tensor) -> None:
            for pull in pulls:
                pull(gradients)

        return add


def by_volume(volumes: Volumes, rng: np.random.Generator) -> Draw:
    """Draws S to coefficients (S, K): a simplex by its present volume, then Dirichlet(1) in it."""

    def draw(samples: int) -> Tensor:
        simplexes = volumes.simplexes
        coefficients = torch.zeros(samples, len(volumes.vertices))
        for row, i in zip(coefficients, rng.choice(len(simplexes), samples, p=volumes.shares()), strict=True):
            row[simplexes[i]] = dirichlet(1, len(simplexes[i]), rng)[0]
        return coefficients

    return draw


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
