"""Runs on disk: the vertices and coefficients of a trained ensemble, how it was trained, and its cost.

A run is a folder (see :mod:`ensembler.storage.artefact` for how it is written and verified):

``manifest.json``
    :class:`Manifest`: method, architecture, dataset, seed, versions, cost, metrics, and the hash of every file.
``vertices.safetensors``
    each parameter under its own name, with a leading K axis.
``members.safetensors``
    ``coefficients`` (M, K) and each buffer as ``buffer.NAME``, with a leading M axis.
``frozen.safetensors``
    parameters that were not trained, if any.
``gaussians.safetensors``
    what members are drawn from, if from Gaussians: each parameter under its own name, with leading axes S and K + 2
    (see :mod:`ensembler.gaussian`).
``history.jsonl``
    one JSON object per epoch of training.
``parts/0``, ``parts/1``, ...
    in a combination of different networks, instead of the first three: a run for each network.
"""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ensembler.arguments import checked
from ensembler.data.record import DatasetRecord
from ensembler.errors import ArtefactError, CorruptError, DivergedError, UsageError
from ensembler.naming import is_given
from ensembler.networks.architectures import Factory, factory_name
from ensembler.record import Record, mistake
from ensembler.storage import artefact

__all__ = [
    "Cost",
    "CostEntry",
    "DatasetRecord",
    "Gaussians",
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
    *("ensembler", "torch", "torchvision", "numpy", "pillow", "scikit-learn", "netcal"),
    *("onnx", "onnxruntime-gpu", "onnxruntime", "bentoml"),
)


class Sampling(Record):
    """How to draw further members: barycentric coordinates in simplexes.

    Attributes:
        simplexes: the indices of each simplex's vertices.
        concentration: of the Dirichlet distribution.
        corners: whether a simplex's first members are its vertices.
        weights: the probability of each simplex; ``None`` assigns members to simplexes in turn.
    """

    simplexes: list[list[int]]
    concentration: float
    corners: bool = False
    weights: list[float] | None = None


class Gaussians(Record):
    """How to draw further members: from the run's Gaussians over weights, in turn (:mod:`ensembler.gaussian`).

    Attributes:
        scale: factor of the covariance.
    """

    scale: float


class CostEntry(Record):
    """The cost of one part of a training: a solution ("solution 1"), or an addition ("vertex 2").

    Attributes:
        example_passes: forward and backward passes of one example.
        forward_passes: forward passes of one example without a backward pass: for BatchNorm statistics, distances in
            function space, and a method's measurements.
        seconds: wall time; ``None`` if unknown.
        peak_memory: bytes; on a GPU, the most allocated during this part; on a CPU, the most that the process had held
            up to its end. ``None`` if unknown.
        device: the device's name.
        origin: the pretrained weights, whose own cost is unknown and not counted; ``None`` for a part that was trained.
        ids: of the trainings whose cost this is, ``FINGERPRINT/PART`` each. A run that starts from another holds what
            that one cost, under the same ids.
    """

    example_passes: int = 0
    forward_passes: int = 0
    seconds: float | None = 0.0
    peak_memory: int | None = None
    device: str
    origin: str | None = None
    ids: list[str] = Field(default_factory=list)


class Cost(Record):
    """The total cost of a training, and the cost of each part; the units are those of :class:`CostEntry`.

    ``None`` is unknown: all was trained elsewhere. Where a part was, the rest is counted, and :attr:`unknown` names it.
    """

    example_passes: int | None
    forward_passes: int
    seconds: float | None
    peak_memory: int | None
    device: str
    entries: dict[str, CostEntry]

    @property
    def unknown(self) -> list[str]:
        """The pretrained weights whose own cost is unknown and not counted."""
        return [entry.origin for entry in self.entries.values() if entry.origin is not None]


class Manifest(Record):
    """Everything about a run except its tensors.

    Attributes:
        method: the method's name in reports.
        command: the command that makes the run; ``None`` if there is none.
        independent: whether the members were trained independently of one another.
        task: what the outputs mean; see :func:`ensembler.task.find`.
        options: all options of the method, resolved.
        settings: all options that the methods share, resolved.
        fingerprint: SHA-256 of what determines the result: method, options, settings, data and initial weights.
        vertices, members, parameters: K, M and P; of a combination of different networks, their sums.
        parts: number of different networks; 0 for one.
        sampling: how to draw further members; ``None`` if the members are fixed.
        probe: what the first member answers to two images of noise, by which a network is found that computes otherwise
            now (:meth:`ensembler.networks.members.MemberNetworks.check`); empty for data of another kind.
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
    parts: int = 0
    sampling: Sampling | Gaussians | None
    probe: list[float] = Field(default_factory=list)
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
        gaussians: parameter name to (S, K + 2, ...), where members are drawn from Gaussians; else empty.
        history: one mapping per epoch of training.
        sha256: of the manifest when the run was saved or loaded; empty before that.
        parts: in a combination of different networks, a run for each, in the order of the members; then there are no
            vertices, coefficients and buffers here.
        network: what builds the network, where that was passed from Python and cannot be imported; it is not saved.
        path: where the run was saved or loaded, if it was.
    """

    manifest: Manifest
    vertices: Mapping[str, Tensor]
    coefficients: Tensor
    buffers: Mapping[str, Tensor]
    frozen: Mapping[str, Tensor] = field(default_factory=dict)
    gaussians: Mapping[str, Tensor] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    sha256: str = ""
    parts: Sequence[Run] = ()
    network: Factory | None = None
    path: Path | None = None

    def __repr__(self) -> str:
        from ensembler.describe import lines

        return "\n".join(["Run", *(f"  {line}" for line in lines(self))])

    def _repr_html_(self) -> str:
        from ensembler.describe import run_html

        return run_html(self, "Run")

    @property
    def networks(self) -> Sequence[Run]:
        """A run for each different network: the parts, or this run."""
        return self.parts or (self,)

    def check_one_network(self, purpose: str) -> None:
        """Refuse a combination of different networks.

        Args:
            purpose: what one network is needed for, such as "to average".

        Raises:
            UsageError: the weights of different networks have nothing in common.
        """
        if self.parts:
            raise UsageError(
                f"this run combines different networks ({self.manifest.architecture}), which have no weights in common "
                f"{purpose}: name a run of one network"
            )

    @checked
    def save(self, path: str | Path) -> Path:
        """Write the run to ``path`` atomically, and point the link ``latest`` beside it to it.

        Raises:
            UsageError: ``path`` already exists.
            ArtefactError: it cannot be written.
            DivergedError: a weight is not finite.
        """
        path = Path(path)
        self._write(path)
        _link_latest(path)
        self.path = path
        return path

    def is_at(self, path: Path) -> bool:
        """Return whether the run in a folder is this one, by its manifest, which has every file's hash."""
        return self.sha256 != "" and _manifest_sha256(path) == self.sha256

    def _write(self, path: Path) -> None:
        for name, tensor in chain(self.vertices.items(), self.gaussians.items()):
            if not torch.isfinite(tensor).all():
                raise DivergedError(f"parameter {name!r} is not finite: train with a lower learning rate")
        members = {"coefficients": self.coefficients} | {f"buffer.{name}": b for name, b in self.buffers.items()}
        content = self.manifest.model_dump()
        with artefact.write(path, content) as folder:
            for number, part in enumerate(self.parts):
                part._write(folder / "parts" / str(number))
            if not self.parts:
                save_tensors(self.vertices, folder / "vertices.safetensors")
                save_tensors(members, folder / "members.safetensors")
            if self.frozen:
                save_tensors(self.frozen, folder / "frozen.safetensors")
            if self.gaussians:
                save_tensors(self.gaussians, folder / "gaussians.safetensors")
            lines = "".join(json.dumps(record) + "\n" for record in self.history)
            (folder / "history.jsonl").write_text(lines, encoding="utf-8")
        self.manifest.files, self.sha256 = content["files"], _manifest_sha256(path)

    @classmethod
    @checked
    def load(cls, path: str | Path, network: Factory | None = None) -> Run:
        """Read a run and verify every byte. Later changes of its files do not affect the run in memory.

        Args:
            path: the run's folder.
            network: what it was trained with, where that was passed from Python and cannot be imported.

        Raises:
            ArtefactError: there is no run, or this version cannot read its format.
            UsageError: ``network`` is not what the run was trained with, by its name.
            CorruptError: a file is missing or has changed (the message names it), or the run was replaced meanwhile.
        """
        path = Path(path)
        sha256 = _manifest_sha256(path)
        content = artefact.read(path, "run", formats=(FORMAT,))
        try:
            manifest = Manifest.model_validate(content)
            of_parts = (f"parts/{number}/{artefact.MANIFEST}" for number in range(manifest.parts))
            own = () if manifest.parts else ("vertices.safetensors", "members.safetensors")
            for name in chain(("history.jsonl",), own, of_parts):
                if name not in manifest.files:
                    raise ValueError(f"its manifest names no {name}")
            parts = [cls.load(path / "parts" / str(number)) for number in range(manifest.parts)]
            members = {"coefficients": torch.empty(0, 0)} if parts else load_tensors(path / "members.safetensors")
            optional = {
                name: load_tensors(path / f"{name}.safetensors") if f"{name}.safetensors" in manifest.files else {}
                for name in ("frozen", "gaussians")
            }
            run = cls(
                manifest=manifest,
                vertices={} if parts else load_tensors(path / "vertices.safetensors"),
                coefficients=members.pop("coefficients"),
                parts=parts,
                buffers={name.removeprefix("buffer."): tensor for name, tensor in members.items()},
                frozen=optional["frozen"],
                gaussians=optional["gaussians"],
                history=[artefact.parse_json(line) for line in (path / "history.jsonl").read_bytes().splitlines()],
                sha256=sha256,
                path=path,
            )
            if fault := next(_faults(run), None):
                raise ValueError(fault)
        except ValidationError as error:
            raise ArtefactError(
                f"{path} is not a run that this version can read ({mistake(error)}): train it again"
            ) from error
        except OSError as error:
            raise ArtefactError(f"cannot read {path}: {error.strerror or error}") from error
        except (KeyError, ValueError, SafetensorError) as error:
            raise ArtefactError(f"{path} is not a run that this version can read ({error}): train it again") from error
        if sha256 != _manifest_sha256(path):
            raise CorruptError(f"{path} was replaced while it was read: run the same command again")
        if network is not None:
            run._take(network)
        return run

    def _take(self, network: Factory) -> None:
        """Let the run's network, or those parts' of a combination that cannot be imported, be built by ``network``."""
        own = factory_name(network)
        for part in self.networks:
            name = part.manifest.architecture
            if own != name and (is_given(name) or not self.parts):
                raise UsageError(f"the run was trained with the network {name}, not {own}: pass that one")
            part.network = network if is_given(name) else None


def _faults(run: Run) -> Iterator[str]:
    """Yield what does not go together in a run that was read."""
    if not all(isinstance(line, dict) and "part" in line for line in run.history):
        yield "its history is not of a training"
    K, M = run.manifest.vertices, run.manifest.members
    if run.parts:
        if sum(part.manifest.members for part in run.parts) != M:
            yield f"its parts do not have {M} members in all"
        return
    if run.coefficients.shape != (M, K) or run.coefficients.dtype != torch.float32:
        yield f"its coefficients are not float32 of shape ({M}, {K})"
    for name, tensor in run.vertices.items():
        if not tensor.dim() or len(tensor) != K:
            yield f"parameter {name!r} is not there for each of its {K} vertices"
    for name, tensor in run.buffers.items():
        if not tensor.dim() or len(tensor) != M:
            yield f"buffer {name!r} is not there for each of its {M} members"
    simplexes = run.manifest.sampling.simplexes if isinstance(run.manifest.sampling, Sampling) else []
    if not all(0 <= vertex < K for simplex in simplexes for vertex in simplex):
        yield f"its simplexes have vertices beyond its {K}"


def new_path(folder: Path, label: str) -> Path:
    """Return a free path in ``folder``, made of ``label`` and the time."""
    stem = f"{label}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    names = (stem, *(f"{stem}-{n}" for n in range(2, 1_000_000)))
    return next(
        folder / name for name in names if not (folder / name).exists() and not (folder / f"{name}.unfinished").exists()
    )


def latest(folder: Path) -> Path:
    """Return the newest run in ``folder``.

    Raises:
        ArtefactError: there is none.
    """
    link = folder / "latest"
    if not link.is_dir():
        raise ArtefactError(f"no run in {folder}: train one first (ensembler --help lists the methods), or name a run")
    return link.resolve()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that scores depend on."""
    result = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            result[package] = version(package)
        except PackageNotFoundError:
            continue
    return result


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, and copy them.

    safetensors maps the file into memory: without a copy, overwriting the file would change the tensors, and truncating
    it would kill the process.
    """
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        ArtefactError: it cannot be written.
    """
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # raised for a full disk, too, instead of OSError
        raise ArtefactError(f"cannot write {path}: {error}: make room, or choose another place") from error


def _manifest_sha256(path: Path) -> str:
    try:
        return hashlib.sha256(artefact.read_text(path, artefact.MANIFEST)).hexdigest()
    except (OSError, ArtefactError):  # who reads it says what is wrong
        return ""


def _link_latest(path: Path) -> None:
    """Replace the link atomically, so that it is never missing."""
    with tempfile.TemporaryDirectory(prefix=".partial-latest-", dir=path.parent) as scratch:
        link = Path(scratch) / "latest"
        try:
            link.symlink_to(path.name, target_is_directory=True)
            link.replace(path.parent / "latest")
        except OSError:
            return  # no symbolic links here (some file systems, Windows without the permission); the run is saved
