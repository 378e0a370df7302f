"""Loss and error over the simplexes of a run: its vertices in three dimensions, along edges, and over faces.

As in the figures of Benton et al. 2021 (arXiv 2102.13042). Every point is a sum of vertices, so this is the same
ensemble at other coefficients.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from ensembler.ensemble import Ensemble
from ensembler.errors import UsageError
from ensembler.eval.metrics.embedding import classical_scaling
from ensembler.eval.options import SurfaceOptions
from ensembler.eval.surface import Measured, Measuring
from ensembler.networks.architectures import Factory
from ensembler.record import Record
from ensembler.run import Run, Sampling, versions
from ensembler.text import counted

__all__ = ["Edge", "Face", "Simplexes", "Vertex", "lattice", "measure_simplexes", "projection", "summary"]

FACES = 12
"""The most triangles that are measured: the first of each simplex in turn."""

Place = tuple[tuple[int, int], ...]
"""A point: how many of ``grid - 1`` parts it has of each of its vertices."""


class Vertex(Record):
    """A vertex, and its coordinates in the projection."""

    place: tuple[float, float, float]
    train_loss: float
    test_error: float


class Edge(Record):
    """Measures along the straight line between two vertices, at each t in [0, 1]."""

    ends: tuple[int, int]
    t: list[float]
    train_loss: list[float]
    test_error: list[float]


class Face(Record):
    """Measures over a triangle of three vertices, at barycentric coordinates ``points`` (N, 3)."""

    corners: tuple[int, int, int]
    points: list[tuple[float, float, float]]
    train_loss: list[float]
    test_error: list[float]


class Simplexes(Measured):
    """The measures of a run's simplexes.

    ``train_loss``: mean NLL in nats; ``test_error`` in [0, 1]. ``shares``: of the vertices' squared distances in weight
    space, what each direction of the projection shows. ``faces_left_out``: triangles beyond the first that were not
    measured.
    """

    format: int = 1
    dataset: str
    architecture: str
    method: str
    run: str
    simplexes: list[list[int]]
    vertices: list[Vertex]
    shares: tuple[float, float, float]
    edges: list[Edge]
    faces: list[Face]
    faces_left_out: int


def measure_simplexes(
    path: str | Path,
    options: SurfaceOptions | None = None,
    *,
    dataset: Any = None,
    watch: Callable[[str, int, int], None] = lambda label, done, total: None,
    network: Factory | None = None,
) -> Simplexes:
    """Measure the vertices, edges and faces of a run's simplexes; of a run without any, of the one of all its vertices.

    Args:
        path: the run's folder.
        options: the points along an edge, and the images, which are the same at every point.
        dataset: what the run was trained on, where it has no name to load it by; see :func:`ensembler.as_dataset`.
        watch: called with "simplexes", how many points are done, and of how many.
        network: what builds the run's network, where it cannot be imported.

    Raises:
        UsageError: a run of one vertex, or of different networks.
        DataError: the dataset is missing or not the one that was trained on.
        DivergedError: a network's outputs somewhere are not finite.
    """
    began, options, path = time.monotonic(), options or SurfaceOptions(), Path(path)
    run = Run.load(path, network)
    run.check_one_network("to lie in a simplex")
    sampling, count = run.manifest.sampling, run.manifest.vertices
    if count < 2:
        raise UsageError(f"{path} has 1 vertex, and a simplex has two or more: name a run of several")
    simplexes = [list(range(count))] if not isinstance(sampling, Sampling) else sampling.simplexes
    parts = options.grid - 1
    edges, triangles = _unique(simplexes, 2), _unique(simplexes, 3)
    faces = triangles[:FACES]
    every = [(k,) for k in range(count)]
    known = dict.fromkeys(place for corners in (*every, *edges, *faces) for place in _places(corners, parts))
    coefficients = torch.zeros(len(known), count)
    for row, place in zip(coefficients, known, strict=True):
        for vertex, share in place:
            row[vertex] = share / parts

    measuring = Measuring.of(run, options, dataset)
    ensemble = Ensemble(run, options.device)
    losses, errors = measuring.measure(ensemble, coefficients, "simplexes", watch)
    loss, error = dict(zip(known, losses, strict=True)), dict(zip(known, errors, strict=True))
    places, shares = projection(run)
    barycentric = [(i / parts, j / parts, k / parts) for i, j, k in lattice(parts, 3)]

    def values(corners: Sequence[int]) -> dict[str, list[float]]:
        own = list(_places(corners, parts))
        return {"train_loss": [loss[one] for one in own], "test_error": [error[one] for one in own]}

    return Simplexes(
        dataset=measuring.title,
        architecture=run.manifest.architecture,
        method=run.manifest.method,
        run=path.resolve().name,
        simplexes=simplexes,
        vertices=[
            Vertex(place=place, train_loss=loss[((k, parts),)], test_error=error[((k, parts),)])
            for k, place in enumerate(places)
        ],
        shares=shares,
        edges=[
            Edge(ends=(ends[0], ends[1]), t=[share[1] / parts for share in lattice(parts, 2)], **values(ends))
            for ends in edges
        ],
        faces=[Face(corners=(own[0], own[1], own[2]), points=barycentric, **values(own)) for own in faces],
        faces_left_out=len(triangles) - len(faces),
        train_examples=len(measuring.train),
        test_examples=len(measuring.test),
        batchnorm_examples=len(measuring.still),
        device=str(ensemble.device),
        seed=options.seed,
        versions=versions(),
        seconds=round(time.monotonic() - began, 3),
    )


def lattice(parts: int, corners: int) -> Iterator[tuple[int, ...]]:
    """Yield all ways to divide ``parts`` among ``corners``, each a tuple of that sum."""
    if corners == 1:
        yield (parts,)
        return
    for first in range(parts, -1, -1):
        for rest in lattice(parts - first, corners - 1):
            yield (first, *rest)


def projection(run: Run) -> tuple[list[tuple[float, float, float]], tuple[float, float, float]]:
    """Project the vertices on the three principal directions of their affine hull, in units of Euclidean distance.

    Returns:
        The coordinates of each vertex, and the shares of their squared distances that the directions hold.
    """
    count = run.manifest.vertices
    squared = torch.zeros(count, count, dtype=torch.float64)
    for rows in run.vertices.values():
        for k, own in enumerate(rows):
            squared[k] += (rows.double() - own.double()).square().flatten(1).sum(dim=1)
    points, shares = classical_scaling(squared.numpy(), 3)
    return [(x, y, z) for x, y, z in points.tolist()], (float(shares[0]), float(shares[1]), float(shares[2]))


def _unique(simplexes: Sequence[Sequence[int]], corners: int) -> list[tuple[int, ...]]:
    """Return the edges or faces of simplexes, each once: the first of every simplex, then the second, and so on."""
    each = [[tuple(sorted(found)) for found in combinations(own, corners)] for own in simplexes]
    longest = max(map(len, each))
    return list(dict.fromkeys(own[place] for place in range(longest) for own in each if place < len(own)))


def _places(corners: Sequence[int], parts: int) -> Iterator[Place]:
    for shares in lattice(parts, len(corners)):
        yield tuple((corner, share) for corner, share in zip(corners, shares, strict=True) if share)


def summary(found: Simplexes) -> str:
    """Describe loss and error at the vertices, and the highest along the edges and over the faces, a line each."""
    lines = [
        f"w{k}: train loss {vertex.train_loss:.4f}, test error {vertex.test_error:.4f}"
        for k, vertex in enumerate(found.vertices)
    ]
    for name, each in (("edge", found.edges), ("face", found.faces)):
        if each:
            loss, error = max(max(one.train_loss) for one in each), max(max(one.test_error) for one in each)
            lines.append(f"highest on {counted(len(each), name)}: train loss {loss:.4f}, test error {error:.4f}")
    if found.faces_left_out:
        lines.append(f"not measured: {counted(found.faces_left_out, 'more face', 'more faces')}")
    return "\n".join(lines)
