"""The ensemble: a network, vertices, and the coefficients of its members."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ensembler import examples, gaussian, task
from ensembler.architectures import Factory
from ensembler.batchnorm import has_batchnorm
from ensembler.buffers import Start, member_buffers
from ensembler.capture import Captured, CudaGraph, on_stream
from ensembler.device import choose_device, limit_threads
from ensembler.dropout import fix_masks
from ensembler.errors import ShapeError, UsageError
from ensembler.examples import Examples
from ensembler.network_checks import NetworkChecks
from ensembler.run import Gaussians, Run, Sampling
from ensembler.seeds import derive, generator
from ensembler.subspace import dirichlet
from ensembler.task import Task
from ensembler.weights import FlatWeights

if TYPE_CHECKING:
    from ensembler.uncertainty import Uncertainty

__all__ = ["Ensemble", "sample_coefficients"]

# Numbers in a batch, 341 images of CIFAR's size, below which a forward pass takes longer to launch than to compute.
_CAPTURED = 2**20
_GRAPHS = 8  # shapes of batches that have one; each holds memory


class Ensemble:
    """Members ``coefficients @ vertices`` of one network, ready to predict.

    All members of one network share one copy of it: each member's weights are written into it before its forward pass.
    A combination of different networks has one copy of each.

    Args:
        run: the trained run.
        device: ``"cpu"``, ``"cuda"``, ...; by default CUDA if available.
        batch_size: examples per forward pass; by default what suits the device and the image size.

    Attributes:
        run: the trained run.
        device: the device of the network.
        task: what the network's outputs mean.

    Raises:
        UsageError: there is no such device, ``batch_size < 1``, or the architecture computes with what no run holds.
    """

    def __init__(self, run: Run, device: str | torch.device | None = None, batch_size: int | None = None) -> None:
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"the batch size must be at least 1, not {batch_size}")
        self.run = run
        limit_threads()
        self.device = choose_device(device)
        record = run.manifest.dataset
        self.task = task.find(run.manifest.task)
        budget = (2048 if self.device.type == "cuda" else 64) * 3 * 32 * 32  # on a CPU, what fits into its cache
        self.batch_size = batch_size or max(1, budget // math.prod(record.shape))
        outputs = self.task.outputs(len(record.classes))
        self._kind = examples.find(record.kind)
        self._parts = [_Part(part, self.task, outputs, self.device) for part in run.networks]
        self._places = [(part, row) for part in self._parts for row in range(len(part.run.coefficients))]

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        batch_size: int | None = None,
        network: Factory | None = None,
    ) -> Ensemble:
        """Load an ensemble from a run's folder, and verify every byte.

        Args:
            path: the run's folder.
            device: as of the class.
            batch_size: likewise.
            network: what the run was trained with, where that was defined in a notebook or script; see
                :func:`ensembler.trainers.train`.

        Raises:
            ArtefactError: there is no run. CorruptError: a file of the run has changed. UsageError: the network cannot
                be imported and is not passed, or another one is.
        """
        return cls(Run.load(path, network), device, batch_size)

    @property
    def members(self) -> int:
        """Number of members, M."""
        return len(self._places)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in label order."""
        return tuple(self.run.manifest.dataset.classes)

    def network(self, member: int) -> nn.Module:
        """Return the network with one member's weights and buffers, in evaluation mode.

        Members of one network are the same module every time: the next call overwrites its weights.
        """
        part, row = self._places[member]
        return part.network(row)

    def run_of(self, member: int) -> Run:
        """Return the run of a member's network: one of the parts of a combination, else :attr:`run`."""
        return self._places[member][0].run

    def predict_outputs(
        self, x: Tensor | NDArray[np.generic], vary: Callable[[int, Tensor], Tensor] | None = None
    ) -> Tensor:
        """Predict each member's raw outputs; for a classifier, its logits.

        Args:
            x: stored examples: images (B, H, W, 3) uint8, or rows of features (B, F) float. For images also normalised
                inputs (B, 3, H, W) float.
            vary: from a member and ``x`` to what this member sees instead, of the same shape and type.

        Returns:
            (M, B, O) float32 on the CPU.

        Raises:
            ShapeError: ``x`` has another shape or type, or floats that are pixels rather than normalised inputs.
        """
        x = torch.as_tensor(x)
        record = self.run.manifest.dataset
        stored = self._kind.check(x, record.shape, record.mean, record.std)
        x, result = x.to(self.device), torch.empty(0)  # once for all members
        captured = self._captures and x[: self.batch_size].numel() <= _CAPTURED
        with torch.inference_mode(), on_stream(self.device) if captured else nullcontext():
            for member in range(self.members):
                self.network(member)
                predict = self._places[member][0].outputs
                seen = x if vary is None else vary(member, x)
                for start in range(0, max(1, len(x)), self.batch_size):
                    part = slice(start, start + self.batch_size)
                    outputs = predict(seen[part], stored, captured)
                    if not start and not member:
                        result = torch.empty(self.members, len(x), *outputs.shape[1:], device=self.device)
                    result[member, part] = outputs
            return result.cpu()

    @property
    def _captures(self) -> bool:
        """Whether the forward pass of a small batch is captured as a CUDA graph: on a GPU, outside autocast."""
        return self.device.type == "cuda" and not torch.is_autocast_enabled("cuda")

    def predict_members(self, x: Tensor | NDArray[np.generic]) -> Tensor:
        """Predict each member's distribution; for a classifier, its probabilities.

        Takes the same arguments as :meth:`predict_outputs`, and raises the same errors.

        Returns:
            (M, B, C) float32 on the CPU, rows with sum 1.
        """
        return self.task.distribution(self.predict_outputs(x))

    def predict_proba(self, x: Tensor | NDArray[np.generic]) -> Tensor:
        """Predict the ensemble's distribution; for classifiers, the mean (B, C) of the members' probabilities.

        Takes the same arguments as :meth:`predict_members`.
        """
        return self.task.combine(self.predict_members(x))

    def uncertainty(self, x: Tensor | NDArray[np.generic]) -> Uncertainty:
        """Compute each example's entropies, mutual information and disagreement; see :mod:`ensembler.uncertainty`."""
        from ensembler.uncertainty import uncertainty

        return uncertainty(self.predict_members(x).numpy())

    def sample(self, members: int, seed: int = 0, train: Examples | None = None) -> Ensemble:
        """Draw an ensemble of new members from the same simplexes or Gaussians.

        With the run's own seed, the members drawn from Gaussians are the run's.

        Args:
            members: M >= 1.
            seed: of the draw.
            train: the training examples, from which BatchNorm statistics are recomputed for every new member; by
                default the run's dataset is loaded from its default folder.

        Raises:
            UsageError: the run's members are fixed (a deep ensemble, snapshots), or ``members < 1``.
        """
        sampling = self.run.manifest.sampling
        if sampling is None:
            raise UsageError(f"the members of a run by {self.run.manifest.method} are fixed: nothing to sample from")
        if isinstance(sampling, Gaussians):
            return self._drawn(sampling.scale, members, seed, train)
        return self.at(sample_coefficients(sampling, self.run.coefficients.shape[1], members, seed), train)

    def at(self, coefficients: Tensor, train: Examples | None = None) -> Ensemble:
        """Return an ensemble with other coefficients of the same vertices: any points of their affine span.

        Each point takes over the buffers of the member whose coefficients are nearest; where they are the same, to the
        bit, else as in :mod:`ensembler.buffers`.

        Args:
            coefficients: (M, K), M >= 1; rows with sum 1.
            train: the training examples, from which BatchNorm statistics are recomputed for every member; by default
                the run's dataset is loaded from its default folder.

        Raises:
            ShapeError: the coefficients have another shape.
        """
        self.run.check_one_network("for a point between them")
        count = self.run.coefficients.shape[1]
        if coefficients.dim() != 2 or not len(coefficients) or coefficients.shape[1] != count:
            shape = tuple(coefficients.shape)
            raise ShapeError(f"expected coefficients (M, {count}) with M >= 1, found {shape}")
        return self._moved(self.run, self._parts[0].vertices, coefficients, self._starts(coefficients), train)

    def _drawn(self, scale: float, members: int, seed: int, train: Examples | None) -> Ensemble:
        """Return an ensemble of members drawn from the run's Gaussians, with the buffers of their own members."""
        run, weights = self.run, self._parts[0].weights
        drawn = replace(run, vertices=gaussian.draw(run.gaussians, scale, members, seed))
        S = len(next(iter(run.gaussians.values())))
        places = [m % S % len(run.coefficients) for m in range(members)]
        starts: list[Start] = [({name: rows[place] for name, rows in run.buffers.items()}, False) for place in places]
        return self._moved(drawn, weights.flatten(drawn.vertices), torch.eye(members), starts, train)

    def _moved(
        self, run: Run, vertices: Tensor, coefficients: Tensor, starts: Sequence[Start], train: Examples | None
    ) -> Ensemble:
        """Return an ensemble of other members of the same network; arguments as of :func:`member_buffers`.

        ``run`` holds the vertices.
        """
        record, (part,) = run.manifest.dataset, self._parts
        if train is None and not all(own for _, own in starts) and has_batchnorm(part.weights.module):
            train = record.load().train
        found = member_buffers(part.weights, vertices, coefficients, train, record, starts)
        buffers = {name: rows.cpu() for name, rows in found.items()}
        sizes = {"vertices": len(vertices), "members": len(coefficients), "files": {}}
        manifest = run.manifest.model_copy(update=sizes)
        moved = replace(run, manifest=manifest, coefficients=coefficients, buffers=buffers, path=None)
        return Ensemble(moved, self.device, self.batch_size)

    def _starts(self, coefficients: Tensor) -> list[Start]:
        """Return what the buffers of each point (M, K) start from: those of the nearest member."""
        members, starts = self.run.coefficients, list[Start]()
        for row in coefficients.cpu():
            nearest = int((members.double() - row.double()).square().sum(dim=1).argmin())
            buffers = {name: rows[nearest] for name, rows in self.run.buffers.items()}
            starts.append((buffers, torch.equal(members[nearest], row)))
        return starts


class _Part:
    """The members of one network.

    Attributes:
        run: theirs.
        weights: the network, in evaluation mode.
        vertices: (K, P) on its device.
        inputs: from stored examples to the network's inputs.
    """

    def __init__(self, run: Run, kind: Task, outputs: int, device: torch.device) -> None:
        record = run.manifest.dataset
        self.run = run
        self.inputs = examples.find(record.kind).inputs(record.mean, record.std, device)
        network = self._build(kind, outputs, device)
        fix_masks(network, run.buffers)
        self.weights = FlatWeights(network)
        self.weights.load_frozen(run.frozen)
        self.vertices = self.weights.flatten(run.vertices)
        self._coefficients = run.coefficients.to(device)
        self._buffers = {name: rows.to(device) for name, rows in run.buffers.items()}
        self._forget([])

    def network(self, row: int) -> nn.Module:
        """Return the network with one member's weights and buffers."""
        torch.mv(self.vertices.T, self._coefficients[row], out=self.weights.vector)
        self.weights.load_buffers({name: rows[row] for name, rows in self._buffers.items()})
        return self.weights.module

    def outputs(self, x: Tensor, stored: bool, captured: bool) -> Tensor:
        """Compute the outputs (B, O) of the network as it is, valid until the next call.

        Args:
            x: stored examples, or inputs of the network.
            stored: which of them.
            captured: whether a CUDA graph may be captured and replayed for this shape.
        """
        modes = [module.training for module in self.weights.module.modules()]
        if modes != self._modes:  # a graph has those of its capture
            self._forget(modes)
        key = stored, x.shape, x.dtype, x.stride()
        if not captured or (key not in self._outputs and len(self._outputs) == _GRAPHS):
            return self._forward(x, stored)
        self._graphs(stored, x)
        return self._outputs[key]

    def _forget(self, modes: list[bool]) -> None:
        """Begin without graphs, for a network in these modes."""
        self._modes, self._outputs = modes, dict[object, Tensor]()
        self._graphs = Captured(self._store, _unsaid, CudaGraph)

    def _store(self, stored: int, x: Tensor) -> None:
        """Leave the outputs where :meth:`outputs` finds them; a graph leaves them at the same address every time."""
        self._outputs[stored, x.shape, x.dtype, x.stride()] = self._forward(x, bool(stored))

    def _forward(self, x: Tensor, stored: bool) -> Tensor:
        outputs: Tensor = self.weights.module(self.inputs(x) if stored else x.float())
        return outputs

    def _build(self, kind: Task, outputs: int, device: torch.device) -> nn.Module:
        """Build the network in evaluation mode and in the run's memory format, or in the one that it can.

        A user's own network is checked: its module may have changed, or the run may come from elsewhere.
        """
        manifest = self.run.manifest
        record, checks = manifest.dataset, NetworkChecks(manifest.architecture, kind, outputs, self.run.network)
        pixels = torch.randint(0, 256, (2, *record.shape), dtype=torch.uint8, generator=generator(0, "probe"))
        x = self.inputs(pixels.to(device)) if record.kind in ("images", "arrays") else None
        return checks.built(manifest.settings.get("memory_format"), x, device)


def _unsaid(reason: str) -> None:
    """Say nothing: what cannot be captured gives the same predictions."""


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
