"""A run on disk: what was trained, how, at what cost, and the vertices and coefficients that came of it.

A run is a folder (see :mod:`ensembler.artefact` for how it is written and verified):

``manifest.json``
    :class:`Manifest`: method, architecture, dataset, seed, versions, cost, metrics, and the hash of every file.
``vertices.safetensors``
    each parameter under its own name, with a leading K axis.
``members.safetensors``
    ``coefficients`` (M, K) and each buffer as ``buffer.NAME``, with a leading M axis.
``frozen.safetensors``
    parameters that were not trained, if there are any.
``history.jsonl``
    one JSON object for each epoch of training.
"""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ensembler import artefact, datasets
from ensembler.datasets import Dataset
from ensembler.errors import ArtefactError, CorruptError, DataError, DivergedError, UsageError
from ensembler.images import FileSplit
from ensembler.record import Record

__all__ = [
    "Cost",
    "CostEntry",
    "DatasetRecord",
    "Manifest",
    "Run",
    "Sampling",
    "latest",
    "load_tensors",
    "new_path",
    "save_tensors",
    "versions",
]

FORMAT = 1
_PACKAGES = (
    *("ensembler", "torch", "torchvision", "numpy", "scikit-learn", "netcal"),
    *("onnx", "onnxruntime-gpu", "onnxruntime", "bentoml"),
)


class DatasetRecord(Record):
    """Which data, so that evaluation can find the same again, and what a network needs to see them.

    Attributes:
        kind: of data: see :func:`ensembler.examples.find`.
        shape: of one example as it is stored; of images, [H, W, 3].
        lazy: whether images were read from their files whenever they were needed.
        skipped: the files of a folder that were left out.
    """

    name: str
    title: str
    kind: str = "images"
    classes: list[str]
    shape: list[int]
    mean: list[float]
    std: list[float]
    augmentation: str
    train_examples: int
    class_counts: list[int] = Field(default_factory=list)
    train_sha256: str
    test_sha256: str
    lazy: bool = False
    skipped: list[str] = Field(default_factory=list)

    @classmethod
    def of(cls, dataset: Dataset, augmentation: str | None = None) -> DatasetRecord:
        """The record of a dataset, trained on with the given augmentation, or else the dataset's own.

        Raises:
            UsageError: an unknown augmentation.
        """
        augmentation, known = augmentation or dataset.augmentation, dataset.train.augmentations
        if augmentation not in known:
            raise UsageError(f"unknown augmentation {augmentation!r}: use one of {', '.join(known)}")
        return cls(
            name=dataset.name,
            title=dataset.title,
            kind=dataset.train.kind,
            classes=list(dataset.classes),
            shape=list(dataset.train.example_shape),
            mean=list(dataset.mean),
            std=list(dataset.std),
            augmentation=augmentation,
            train_examples=len(dataset.train),
            class_counts=list(dataset.class_counts.values()),
            train_sha256=dataset.train.sha256,
            test_sha256=dataset.test.sha256,
            lazy=isinstance(dataset.train, FileSplit),
            skipped=list(dataset.skipped),
        )

    def load(self, root: Path | None = None, *, download: bool = False) -> Dataset:
        """The same images again; ``root`` and ``download`` as in :func:`ensembler.datasets.load`.

        Raises:
            DataError: they are missing, or are not the same; or they are not images.
        """
        if self.kind != "images":
            raise DataError(f"{self.title} is no dataset that can be loaded by name: give it from Python")
        height, width = self.shape[:2]
        size = height if height == width else None
        dataset = datasets.load(
            self.name,
            root,
            download=download,
            image_size=size,
            in_memory=not self.lazy,
            without=self.skipped,
        )
        self.check(dataset)
        return dataset

    def check(self, dataset: Dataset) -> None:
        """Refuse a dataset whose splits are not the recorded ones.

        Raises:
            DataError: the training or the test images differ; evaluation would not be of held-out data.
        """
        for part, expected, found in (
            ("training", self.train_sha256, dataset.train.sha256),
            ("test", self.test_sha256, dataset.test.sha256),
        ):
            if expected != found:
                raise DataError(
                    f"{dataset.title} has changed since the run was trained: its {part} images differ. "
                    "Point --data at the original files, or train again"
                )


class Sampling(Record):
    """How further members can be drawn: barycentric coordinates in the simplexes.

    Attributes:
        simplexes: of each, the rows of its vertices.
        concentration: of the Dirichlet distribution.
        corners: whether a simplex's first members are its vertices themselves.
        weights: the probability of each simplex; ``None`` shares the members out evenly.
    """

    simplexes: list[list[int]]
    concentration: float
    corners: bool = False
    weights: list[float] | None = None


class CostEntry(Record):
    """What one part of the training cost: a base solution ("solution 1"), or an addition ("vertex 2").

    Attributes:
        example_passes: one example forward and backward once.
        forward_passes: examples that went forward only: for BatchNorm statistics, distances in function space, and
            what a method measures on its way.
        seconds: wall time; ``None`` where it is not known.
        peak_memory: bytes; on a GPU, the most that was allocated meanwhile; on a CPU, the most that the process had
            held by then. ``None`` where it is not known.
        device: what it ran on.
        origin: the file of weights that was started from, whose cost is not known and not counted.
    """

    example_passes: int = 0
    forward_passes: int = 0
    seconds: float | None = 0.0
    peak_memory: int | None = None
    device: str
    origin: str | None = None


class Cost(Record):
    """What training cost in all, and in each of its parts; the units are those of :class:`CostEntry`."""

    example_passes: int
    forward_passes: int
    seconds: float
    peak_memory: int | None
    device: str
    entries: dict[str, CostEntry]

    @property
    def unknown(self) -> list[str]:
        """The files of weights whose own cost is not known and not counted."""
        return [entry.origin for entry in self.entries.values() if entry.origin is not None]


class Manifest(Record):
    """Everything about a run but its numbers.

    Attributes:
        method: its name, as a report should call it.
        command: the command that makes it; ``None`` where none does.
        independent: whether the members were trained independently of one another.
        task: what the outputs mean; see :func:`ensembler.task.find`.
        options: of the method, every one, resolved.
        settings: what all methods share, every one, resolved.
        fingerprint: SHA-256 of what decides the result: method, options, settings, data, and what it started from.
        vertices, members, parameters: K, M and P.
        sampling: how further members can be drawn; ``None`` where the members are fixed.
    """

    kind: Literal["run"] = "run"
    format: int = FORMAT
    method: str
    command: str | None = None
    independent: bool = False
    task: str = "classification"
    architecture: str
    dataset: DatasetRecord
    seed: int
    vertices: int
    members: int
    parameters: int
    sampling: Sampling | None
    options: dict[str, Any] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)
    fingerprint: str = ""
    cost: Cost
    metrics: dict[str, Any]
    created: str
    versions: dict[str, str]
    files: dict[str, str] = Field(default_factory=dict)


@dataclass(eq=False)
class Run:
    """A run in memory. Tensors are on the CPU.

    Attributes:
        manifest: see :class:`Manifest`.
        vertices: parameter name to (K, ...).
        coefficients: (M, K).
        buffers: buffer name to (M, ...).
        frozen: name to tensor, for parameters that were not trained.
        history: one mapping for each epoch of training.
        sha256: of the manifest that it was loaded with, whatever lies at its path by now; empty before that.
    """

    manifest: Manifest
    vertices: Mapping[str, Tensor]
    coefficients: Tensor
    buffers: Mapping[str, Tensor]
    frozen: Mapping[str, Tensor] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    sha256: str = ""

    def save(self, path: str | Path) -> Path:
        """Write the run to ``path``, whole or not at all, and let ``latest`` beside it name it.

        Raises:
            UsageError: ``path`` exists.
            ArtefactError: it cannot be written.
            DivergedError: a weight is not finite.
        """
        path = Path(path)
        for name, tensor in self.vertices.items():
            if not torch.isfinite(tensor).all():
                raise DivergedError(f"parameter {name!r} is not finite: train with a lower learning rate")
        members = {"coefficients": self.coefficients} | {f"buffer.{name}": b for name, b in self.buffers.items()}
        content = self.manifest.model_dump()
        with artefact.write(path, content) as folder:
            save_tensors(self.vertices, folder / "vertices.safetensors")
            save_tensors(members, folder / "members.safetensors")
            if self.frozen:
                save_tensors(self.frozen, folder / "frozen.safetensors")
            lines = "".join(json.dumps(record) + "\n" for record in self.history)
            (folder / "history.jsonl").write_text(lines, encoding="utf-8")
        self.manifest.files, self.sha256 = content["files"], _identity(path)
        _point_latest_at(path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Read a run and verify every byte of it. What becomes of its files later does not reach the run in memory.

        Raises:
            ArtefactError: no run there, or of a format this version cannot read.
            CorruptError: a file is missing or changed; it is named. Or another run took its place meanwhile.
        """
        path = Path(path)
        sha256 = _identity(path)
        content = artefact.read(path, "run", formats=(FORMAT,))
        try:
            manifest = Manifest.model_validate(content)
            members = load_tensors(path / "members.safetensors")
            frozen = path / "frozen.safetensors"
            run = cls(
                manifest=manifest,
                vertices=load_tensors(path / "vertices.safetensors"),
                coefficients=members.pop("coefficients"),
                buffers={name.removeprefix("buffer."): tensor for name, tensor in members.items()},
                frozen=load_tensors(frozen) if frozen.name in manifest.files else {},
                history=[json.loads(line) for line in (path / "history.jsonl").read_text("utf-8").splitlines()],
                sha256=sha256,
            )
        except ValidationError as error:
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise ArtefactError(f"{path} is not a run that this version can read ({reason}): train it again") from error
        except OSError as error:
            raise ArtefactError(f"cannot read {path}: {error.strerror or error}") from error
        except (KeyError, ValueError, SafetensorError) as error:
            raise ArtefactError(f"{path} is not a run that this version can read ({error}): train it again") from error
        if sha256 != _identity(path):
            raise CorruptError(f"{path} was replaced while it was read: run the same command again")
        return run


def new_path(folder: Path, label: str) -> Path:
    """A path in ``folder`` that names ``label`` and the time and that nothing has taken, nor begun to."""
    stem = f"{label}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    names = (stem, *(f"{stem}-{n}" for n in range(2, 1_000_000)))
    return next(
        folder / name for name in names if not (folder / name).exists() and not (folder / f"{name}.unfinished").exists()
    )


def latest(folder: Path) -> Path:
    """The newest run of ``folder``.

    Raises:
        ArtefactError: none is there yet.
    """
    link = folder / "latest"
    if not link.is_dir():
        raise ArtefactError(f"no run in {folder}: train one first (ensembler train-simplex), or name a run")
    return link.resolve()


def versions() -> dict[str, str]:
    """The versions that a reported number depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory of their own.

    Its reader maps the file: whoever wrote over it would change the tensors, and cutting it short would end the
    process.
    """
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        ArtefactError: it cannot be written.
    """
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # its writer's, and no OSError
        raise ArtefactError(f"cannot write {path}: {error}; nothing was left behind") from error


def _identity(path: Path) -> str:
    try:
        return artefact.sha256(path / artefact.MANIFEST)
    except OSError:
        return ""


def _point_latest_at(path: Path) -> None:
    """Replace the link in one step, so that a reader never finds it missing or half-made."""
    with tempfile.TemporaryDirectory(prefix=".partial-latest-", dir=path.parent) as scratch:
        link = Path(scratch) / "latest"
        try:
            link.symlink_to(path.name, target_is_directory=True)
            link.replace(path.parent / "latest")
        except OSError:
            return  # no symbolic links here (some file systems, Windows without the right): the run itself is safe
