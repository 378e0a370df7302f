"""The ensemble: a network, vertices, and the coefficients of its members."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ensembler import architectures, batchnorm, examples, task
from ensembler.batchnorm import has_batchnorm
from ensembler.device import choose_device
from ensembler.errors import ShapeError, UsageError
from ensembler.examples import Examples
from ensembler.run import DatasetRecord, Run, Sampling
from ensembler.seeds import derive, generator
from ensembler.subspace import dirichlet
from ensembler.weights import FlatWeights

if TYPE_CHECKING:
    from ensembler.uncertainty import Uncertainty

__all__ = ["BATCHNORM_EXAMPLES", "Ensemble", "member_buffers", "sample_coefficients"]

BATCHNORM_EXAMPLES = 8192  # enough for a channel's mean and variance; all images could cost more than the training

_BATCHNORM_BATCH = 128


class Ensemble:
    """Members ``coefficients @ vertices`` of one network, ready to predict.

    All members share one copy of the network: each member's weights are written into it before its forward pass.

    Args:
        run: the trained run.
        device: ``"cpu"``, ``"cuda"``, ...; by default CUDA if available.
        batch_size: examples per forward pass; by default what suits the device and the image size.

    Attributes:
        run: the trained run.
        device: the device of the network.
        task: what the network's outputs mean.

    Raises:
        UsageError: there is no such device, or ``batch_size < 1``.
    """

    def __init__(self, run: Run, device: str | torch.device | None = None, batch_size: int | None = None) -> None:
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"the batch size must be at least 1, not {batch_size}")
        self.run = run
        self.device = choose_device(device)
        record = run.manifest.dataset
        self.task = task.find(run.manifest.task)
        budget = (2048 if self.device.type == "cuda" else 64) * 3 * 32 * 32  # on a CPU, what fits into its cache
        self.batch_size = batch_size or max(1, budget // math.prod(record.shape))
        outputs = self.task.outputs(len(record.classes))
        self._network = architectures.build(run.manifest.architecture, outputs).to(self.device).eval()
        self._weights = FlatWeights(self._network)
        self._weights.load_frozen(run.frozen)
        self._vertices = self._weights.flatten(run.vertices)
        self._coefficients = run.coefficients.to(self.device)
        self._kind = examples.find(record.kind)
        self._inputs = self._kind.inputs(record.mean, record.std, self.device)

    @classmethod
    def load(
        cls, path: str | Path, device: str | torch.device | None = None, batch_size: int | None = None
    ) -> Ensemble:
        """Load an ensemble from a run's folder, and verify every byte.

        Raises:
            ArtefactError: there is no run. CorruptError: a file of the run has changed.
        """
        return cls(Run.load(Path(path)), device, batch_size)

    @property
    def members(self) -> int:
        """Number of members, M."""
        return len(self._coefficients)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in label order."""
        return tuple(self.run.manifest.dataset.classes)

    def network(self, member: int) -> nn.Module:
        """Return the network with one member's weights and buffers, in evaluation mode.

        It is the same module every time: the next call overwrites its weights.
        """
        torch.mv(self._vertices.T, self._coefficients[member], out=self._weights.vector)
        self._weights.load_buffers({name: rows[member] for name, rows in self.run.buffers.items()})
        return self._network

    def predict_outputs(self, x: Tensor | NDArray[np.generic]) -> Tensor:
        """Predict each member's raw outputs; for a classifier, its logits.

        Args:
            x: stored examples: images (B, H, W, 3) uint8, or rows of features (B, F) float. For images also normalised
                inputs (B, 3, H, W) float.

        Returns:
            (M, B, O) float32 on the CPU.

        Raises:
            ShapeError: ``x`` has another shape or type.
        """
        x = torch.as_tensor(x)
        stored = self._kind.check(x, self.run.manifest.dataset.shape)
        result = torch.empty(0)
        with torch.inference_mode():
            for member in range(self.members):
                network = self.network(member)
                for start in range(0, max(1, len(x)), self.batch_size):
                    part = slice(start, start + self.batch_size)
                    outputs = network(self._prepare(x[part], stored))
                    if not start and not member:
                        result = torch.empty(self.members, len(x), *outputs.shape[1:])
                    result[member, part] = outputs
        return result

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
        """Draw an ensemble of new members from the same simplexes.

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
        return self.at(sample_coefficients(sampling, len(self._vertices), members, seed), train)

    def at(self, coefficients: Tensor, train: Examples | None = None) -> Ensemble:
        """Return an ensemble with other coefficients of the same vertices: any points of their affine span.

        Args:
            coefficients: (M, K), M >= 1; rows with sum 1.
            train: the training examples, from which BatchNorm statistics are recomputed for every member; by default
                the run's dataset is loaded from its default folder.

        Raises:
            ShapeError: the coefficients have another shape.
        """
        if coefficients.dim() != 2 or not len(coefficients) or coefficients.shape[1] != len(self._vertices):
            shape = tuple(coefficients.shape)
            raise ShapeError(f"expected coefficients (M, {len(self._vertices)}) with M >= 1, found {shape}")
        record = self.run.manifest.dataset
        if train is None and has_batchnorm(self._network):
            train = record.load().train
        first = {name: rows[0] for name, rows in self.run.buffers.items()}
        buffers = member_buffers(self._weights, self._vertices, coefficients, train, record, first)
        manifest = self.run.manifest.model_copy(update={"members": len(coefficients), "files": {}})
        moved = replace(self.run, manifest=manifest, coefficients=coefficients, buffers=buffers)
        return Ensemble(moved, self.device, self.batch_size)

    def _prepare(self, x: Tensor, stored: bool) -> Tensor:
        x = x.to(self.device)
        return self._inputs(x) if stored else x.float()


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


def member_buffers(
    weights: FlatWeights,
    vertices: Tensor,
    coefficients: Tensor,
    train: Examples | None,
    record: DatasetRecord,
    buffers: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Compute the buffers of members that were not trained themselves, with recomputed BatchNorm statistics.

    A point between two solutions has activations that the statistics of neither describe (Izmailov et al. 2018, sec.
    3.2; Garipov et al. 2018). So each member's statistics are averaged over :data:`BATCHNORM_EXAMPLES` training
    examples, augmented as in training: without augmentation, a ResNet-20 lost 5 points of accuracy. The network's
    weights and buffers are overwritten.

    Args:
        weights: the network.
        vertices: (K, P).
        coefficients: (M, K).
        train: the training examples; ``None`` is enough for a network without BatchNorm.
        record: their normalisation and augmentation.
        buffers: all other buffers of each member, by name.

    Returns:
        Buffer name to (M, ...), on the CPU; empty for a network without buffers.

    Raises:
        UsageError: the network has BatchNorm, and ``train`` is ``None``.
    """
    if train is not None:
        # Shuffled, because files are often sorted by class, and the variance within one class is too small.
        train = train.part(torch.randperm(len(train), generator=generator(0, "batchnorm"))[:BATCHNORM_EXAMPLES])
    rows: list[dict[str, Tensor]] = []
    for row in coefficients.to(vertices.device):
        torch.mv(vertices.T, row, out=weights.vector)
        weights.load_buffers(buffers)
        if has_batchnorm(weights.module):
            if train is None:
                raise UsageError("new members of a network with BatchNorm need its training images")
            batchnorm.recompute(weights.module, _inputs(train, record, vertices.device))
        rows.append({name: buffer.cpu() for name, buffer in weights.buffers().items()})
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}


def _inputs(train: Examples, record: DatasetRecord, device: torch.device) -> Iterator[Tensor]:
    """Yield training inputs in batches of nearly equal size, because all batches have equal weight."""
    stream = generator(0, "batchnorm augmentation")
    prepare = train.inputs(record.mean, record.std, device)
    for index in torch.arange(len(train)).tensor_split(-(-len(train) // _BATCHNORM_BATCH)):
        choices = train.draw(record.augmentation, len(index), stream)
        batch = train.augmented(index.to(train.labels.device), record.augmentation, choices.to(train.labels.device))
        yield prepare(batch.data.to(device))
