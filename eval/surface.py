"""Loss and error on a plane through three points of weight space, and along the paths measured by a run.

As in Garipov et al. 2018, figures 1 and 2, and their code's ``plane.py``. Every point of the plane is an affine
combination of the three corners, so a surface is the same ensemble at other coefficients.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from ensembler.data.examples import Examples, InMemory
from ensembler.data.images import FileSplit
from ensembler.ensemble import Ensemble
from ensembler.errors import DivergedError, UsageError
from ensembler.eval.options import SurfaceOptions
from ensembler.networks.architectures import Factory
from ensembler.networks.dropout import without_masks
from ensembler.record import Record
from ensembler.run import Run, versions
from ensembler.seeds import generator
from ensembler.storage.urls import as_paths
from ensembler.subspace import CURVES, edge_lengths, log_volume

__all__ = [
    "Corner",
    "Measured",
    "Measuring",
    "Route",
    "Surface",
    "Way",
    "measure_surface",
    "plane",
    "plane_coefficients",
    "summary",
]

Array = NDArray[np.float64]

_CHUNK = 16  # members whose probabilities are in memory at once


class Corner(Record):
    """A corner of the plane: ``vertex`` of ``run``, or the run's first member (``null``)."""

    label: str
    run: str
    vertex: int | None
    x: float
    y: float
    train_loss: float
    test_error: float


class Way(Record):
    """Measures at each t of a path. ``ensemble_error``: of the ensemble of the first end and the point."""

    t: list[float]
    train_loss: list[float]
    test_error: list[float]
    ensemble_error: list[float]


class Route(Record):
    """Paths between the same two ends, by name: ``line`` and the trained one."""

    name: str
    ways: dict[str, Way]


class Measured(Record):
    """How points of weight space were measured.

    ``batchnorm_examples``: training images for the BatchNorm statistics at each point.
    """

    train_examples: int
    test_examples: int
    batchnorm_examples: int
    device: str
    seed: int
    versions: dict[str, str]
    seconds: float


class Surface(Measured):
    """The measures of a plane.

    ``x`` and ``y`` are coordinates in weight space, with the first corner at 0; ``train_loss`` (mean NLL, nats) and
    ``test_error`` (in [0, 1]) have a row per ``y``. ``members`` and ``curve``: points (x, y) in the plane of
    members, and of a curve.
    """

    format: Literal[1] = 1
    dataset: str
    architecture: str
    methods: list[str]
    corners: list[Corner]
    members: list[tuple[float, float]]
    curve: list[tuple[float, float]]
    x: list[float]
    y: list[float]
    train_loss: list[list[float]]
    test_error: list[list[float]]
    paths: list[Route]


@dataclass(frozen=True, eq=False)
class Measuring:
    """The images on which points of weight space are measured: the same at every point.

    Attributes:
        title: of the dataset.
        train, test: for the loss and for the error.
        still: training images, for the BatchNorm statistics at each point.
    """

    title: str
    train: InMemory
    test: InMemory
    still: InMemory

    @classmethod
    def of(cls, run: Run, options: SurfaceOptions, given: Any = None) -> Self:
        """Choose the images of a run's dataset.

        Raises:
            DataError: the dataset is missing or not the one that was trained on.
        """
        given = options.dataset if given is None else given
        dataset, seed = run.manifest.dataset.load(options.data, dataset=given), options.seed
        return cls(
            dataset.title,
            _some(dataset.train, options.examples, seed, "train"),
            _some(dataset.test, options.examples, seed, "test"),
            _some(dataset.train, options.batchnorm_examples, seed, "batchnorm"),
        )

    def measure(
        self,
        ensemble: Ensemble,
        coefficients: Tensor,
        label: str,
        watch: Callable[[str, int, int], None],
        mend: str = "train with a lower learning rate",
    ) -> tuple[list[float], list[float]]:
        """Return the train loss and test error at each of N points, ``coefficients`` (N, K) of the vertices.

        Raises:
            DivergedError: a network's outputs are not finite; ``mend`` ends the message.
        """
        losses: list[float] = []
        errors: list[float] = []
        still = self.still.to(ensemble.device)
        for start in range(0, len(coefficients), _CHUNK):
            moved = ensemble.at(coefficients[start : start + _CHUNK], still)
            try:
                seen, unseen = moved.predict_members(self.train.data), moved.predict_members(self.test.data)
            except DivergedError as error:
                raise DivergedError(f"the outputs are not finite everywhere on the plane: {mend}") from error
            losses += [ensemble.task.nll(predicted, self.train.labels) for predicted in seen]
            errors += [ensemble.task.error(predicted, self.test.labels) for predicted in unseen]
            watch(label, len(losses), len(coefficients))
        return losses, errors


def measure_surface(
    paths: str | Path | Sequence[str | Path],
    vertices: Sequence[int] | None = None,
    options: SurfaceOptions | None = None,
    *,
    dataset: Any = None,
    watch: Callable[[str, int, int], None] = lambda label, done, total: None,
    network: Factory | None = None,
) -> Surface:
    """Measure the plane through three vertices of one run, or through the first members of three.

    Args:
        paths: one run's folder, or three of one network and dataset.
        vertices: three of the one run's; by default the first three, and of a curve its ends and middle bend.
        options: the points and the images, which are the same at every point.
        dataset: what the runs were trained on, where it has no name to load it by; see :func:`ensembler.as_dataset`.
        watch: called with "surface", how many points are done, and of how many.
        network: what builds the runs' network, where it cannot be imported.

    Raises:
        UsageError: not one or three runs, different networks or datasets, or vertices on a line.
        DataError: the dataset is missing or not the one that was trained on.
        DivergedError: a network's outputs somewhere on the plane are not finite.
    """
    began, options = time.monotonic(), options or SurfaceOptions()
    grid, seed = options.grid, options.seed
    folders = as_paths(paths)
    if len(folders) not in (1, 3):
        raise UsageError(f"a surface takes one run or three, not {len(folders)}")
    runs = [Run.load(path, network) for path in folders]
    for run in runs:
        run.check_one_network("to span a plane")
    names = [path.resolve().name for path in folders]
    first = runs[0]
    labels: list[tuple[str, str, int | None]]
    inside, curve = torch.empty(0, 3), torch.empty(0, 3)
    if len(runs) == 1:
        run, chosen = first, _choose(first, folders[0], vertices)
        labels = [(f"w{k}", names[0], k) for k in chosen]
        inside = first.coefficients[
            first.coefficients[:, chosen].count_nonzero(1) == first.coefficients.count_nonzero(1)
        ]
        inside = inside[:, chosen]
        if (kind := first.manifest.options.get("curve")) is not None and first.manifest.vertices == 3:
            curve = CURVES[kind](torch.linspace(0, 1, 101), 3)[:, chosen]
    elif vertices is not None:
        raise UsageError("--vertices chooses among the vertices of one run: leave it out, or name one run")
    else:
        run, chosen = _first_members(runs, folders), [0, 1, 2]
        labels = [(f"w{k}", name, None) for k, name in enumerate(names)]
    three = {name: rows[chosen] for name, rows in run.vertices.items()}
    corners = plane(torch.cat([rows.flatten(1) for rows in three.values()], dim=1))
    reach = options.margin * np.ptp(corners, axis=0)
    x, y = np.linspace(corners.min(axis=0) - reach, corners.max(axis=0) + reach, grid).T
    points = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)

    measuring = Measuring.of(first, options, dataset)
    ensemble, affine = Ensemble(run, options.device), torch.cat([torch.eye(3), plane_coefficients(points, corners)])
    coefficients = torch.zeros(len(affine), run.coefficients.shape[1])
    coefficients[:, chosen] = affine
    losses, errors = measuring.measure(ensemble, coefficients, "surface", watch, "choose a lower --margin")
    return Surface(
        dataset=measuring.title,
        architecture=first.manifest.architecture,
        methods=[run.manifest.method for run in runs],
        corners=[
            Corner(label=label, run=run, vertex=vertex, x=x, y=y, train_loss=loss, test_error=error)
            for (label, run, vertex), (x, y), loss, error in zip(labels, corners.tolist(), losses, errors, strict=False)
        ],
        members=(inside.double().numpy() @ corners).tolist(),
        curve=(curve.double().numpy() @ corners).tolist(),
        x=x.tolist(),
        y=y.tolist(),
        train_loss=np.reshape(losses[3:], (grid, grid)).tolist(),
        test_error=np.reshape(errors[3:], (grid, grid)).tolist(),
        paths=_measured_paths(first) if len(runs) == 1 else [],
        train_examples=len(measuring.train),
        test_examples=len(measuring.test),
        batchnorm_examples=len(measuring.still),
        device=str(ensemble.device),
        seed=seed,
        versions=versions(),
        seconds=round(time.monotonic() - began, 3),
    )


def plane(vertices: Tensor) -> Array:
    """Compute the coordinates of three points in the plane through them.

    The basis is the Gram-Schmidt basis of ``w2 - w0`` and ``w1 - w0`` (Garipov et al. 2018, sec. 1, footnote 1, and
    their code's ``plane.py``): w0 is the origin, w2 on the x axis and w1 above it. The coordinates follow from the
    distances between the points.

    Args:
        vertices: (3, P) float.

    Returns:
        (3, 2), in units of Euclidean distance.

    Raises:
        UsageError: the points are on one line.
    """
    side, base, across = edge_lengths(vertices).tolist()
    area = math.exp(log_volume(vertices).item())
    if area == 0:
        raise UsageError(
            "the three points are on one line, or two are the same: choose others with --vertices, or other runs"
        )
    return np.array([[0, 0], [(side**2 + base**2 - across**2) / (2 * base), 2 * area / base], [base, 0]])


def plane_coefficients(points: Array, corners: Array) -> Tensor:
    """Compute the affine combinations of three corners at given coordinates.

    Args:
        points: (N, 2).
        corners: (3, 2), from :func:`plane`.

    Returns:
        (N, 3) float32, rows of sum 1.
    """
    second = points[:, 1] / corners[1, 1]
    third = (points[:, 0] - second * corners[1, 0]) / corners[2, 0]
    return torch.from_numpy(np.stack([1 - second - third, second, third], axis=1)).float()


def _choose(run: Run, path: Path, vertices: Sequence[int] | None) -> list[int]:
    count = run.manifest.vertices
    if count < 3:
        raise UsageError(
            f"{path} has {count} {'vertex' if count == 1 else 'vertices'} and a plane takes three: "
            "name three runs (their first members are taken), or one run of three vertices or more"
        )
    if vertices is None:
        return [0, 1, 2] if run.manifest.options.get("curve") is None else [0, count // 2, count - 1]
    if len(vertices) != 3 or len(set(vertices)) != 3 or not set(vertices) <= set(range(count)):
        given = ",".join(map(str, vertices))
        raise UsageError(
            f"--vertices takes three different ones of 0 to {count - 1} of {path}, such as 0,1,2: not {given}"
        )
    return list(vertices)


def _first_members(runs: Sequence[Run], paths: Sequence[Path]) -> Run:
    """Return the three runs' first members as the vertices of one run."""
    first = runs[0]
    shapes = {name: rows.shape[1:] for name, rows in first.vertices.items()}
    images = first.manifest.dataset
    for run, path in zip(runs, paths, strict=True):
        other = run.manifest.dataset
        if (other.train_sha256, other.test_sha256) != (images.train_sha256, images.test_sha256):
            raise UsageError(
                f"{path} was trained on {other.title} and {paths[0]} on {images.title}, or on another split of it: "
                "name three runs of one dataset"
            )
        same = run.manifest.architecture == first.manifest.architecture
        same = same and shapes == {name: rows.shape[1:] for name, rows in run.vertices.items()}
        if not same or not all(torch.equal(tensor, run.frozen[name]) for name, tensor in first.frozen.items()):
            raise UsageError(
                f"{path} is a {run.manifest.architecture} and {paths[0]} a {first.manifest.architecture}, or their "
                "frozen weights differ: name three runs of one network"
            )
    vertices = {
        name: torch.stack([torch.tensordot(run.coefficients[0], run.vertices[name], 1) for run in runs])
        for name in shapes
    }
    buffers = {name: torch.stack([run.buffers[name][0] for run in runs]) for name in without_masks(first.buffers)}
    manifest = first.manifest.model_copy(update={"vertices": 3, "members": 3})
    return replace(first, manifest=manifest, vertices=vertices, coefficients=torch.eye(3), buffers=buffers)


def _measured_paths(run: Run) -> list[Route]:
    """Read the paths in a run's metrics: ``path`` of a curve, ``paths`` of a complex."""
    metrics = run.manifest.metrics
    entries = list(metrics.get("paths", ()))
    if "path" in metrics:
        entries.append({"name": run.manifest.method} | metrics["path"])
    found = []
    for entry in entries:
        with suppress(ValidationError, TypeError, KeyError):  # another kind of entry
            ways = {
                name: Way(**{field: way[field] for field in Way.model_fields})
                for name, way in entry.items()
                if name != "name"
            }
            found.append(Route(name=entry["name"], ways=ways))
    return found


def _some(split: Examples, examples: int, seed: int, name: str) -> InMemory:
    chosen = split.part(torch.randperm(len(split), generator=generator(seed, "surface", name))[:examples])
    if isinstance(chosen, FileSplit):
        chosen.check_memory()
    return next(chosen.batches(examples))


def summary(surface: Surface) -> str:
    """Describe loss and error at the three corners, and the lowest and highest on the plane, a line each."""
    lines = [
        f"{corner.label} ({corner.run}): train loss {corner.train_loss:.4f}, test error {corner.test_error:.4f}"
        for corner in surface.corners
    ]
    losses, errors = np.array(surface.train_loss), np.array(surface.test_error)
    for name, loss, error in (("lowest", losses.min(), errors.min()), ("highest", losses.max(), errors.max())):
        lines.append(f"{name} on the plane: train loss {loss:.4f}, test error {error:.4f}")
    return "\n".join(lines)
