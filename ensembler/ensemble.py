"""The ensemble itself: a network, the vertices, and the coefficients of its members."""

from __future__ import annotations

import math
from collections.abc import Iterator
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

BATCHNORM_EXAMPLES = 8192  # enough for a channel's mean and variance; all images would cost more than training did

_BATCHNORM_BATCH = 128


class Ensemble:
    """Members ``coefficients @ vertices`` of one network, ready to predict.

    One copy of the network serves all members: each member's weights are written into it when its turn comes.

    Args:
        run: what was trained.
        device: ``"cpu"``, ``"cuda"``, ...; by default CUDA where there is one.
        batch_size: examples a forward pass; by default what suits the device and the image size.

    Attributes:
        run: the run it was made of.
        device: where it computes.
        task: what the network's outputs mean.

    Raises:
        UsageError: a device that is not there, or ``batch_size < 1``.
    """

    def __init__(self, run: Run, device: str | torch.device | None = None, batch_size: int | None = None) -> None:
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"the batch size must be at least 1, not {batch_size}")
        self.run = run
        self.device = choose_device(device)
        record = run.manifest.dataset
        self.task = task.find(run.manifest.task)
        budget = (2048 if self.device.type == "cuda" else 64) * 3 * 32 * 32  # on a CPU, what its cache holds
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
        """Load a run's folder, every byte verified.

        Raises:
            ArtefactError: no run there; CorruptError: a file of it has changed.
        """
        return cls(Run.load(Path(path)), device, batch_size)

    @property
    def members(self) -> int:
        """M."""
        return len(self._coefficients)

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, in label order."""
        return tuple(self.run.manifest.dataset.classes)

    def network(self, member: int) -> nn.Module:
        """The network with one member's weights and buffers in it, in evaluation mode.

        The same module every time: the next call overwrites it.
        """
        torch.mv(self._vertices.T, self._coefficients[member], out=self._weights.vector)
        self._weights.load_buffers({name: rows[member] for name, rows in self.run.buffers.items()})
        return self._network

    def predict_members(self, x: Tensor | NDArray[np.generic]) -> Tensor:
        """Each member's predictive distribution; of a classifier, its probabilities.

        Args:
            x: examples as they are stored: images (B, H, W, 3) uint8, rows of features (B, F) float. Or, of images,
                inputs (B, 3, H, W) float, already normalised as the network takes them.

        Returns:
            (M, B, C) float32 on the CPU, rows with sum 1.

        Raises:
            ShapeError: ``x`` is of neither form.
        """
        x = torch.as_tensor(x)
        stored = self._kind.check(x, self.run.manifest.dataset.shape)
        result = torch.empty(0)
        with torch.inference_mode():
            for member in range(self.members):
                network = self.network(member)
                for start in range(0, max(1, len(x)), self.batch_size):
                    part = slice(start, start + self.batch_size)
                    found = self.task.distribution(network(self._prepare(x[part], stored)))
                    if not start and not member:
                        result = torch.empty(self.members, len(x), *found.shape[1:])
                    result[member, part] = found
        return result

    def predict_proba(self, x: Tensor | NDArray[np.generic]) -> Tensor:
        """The ensemble's distribution; of classifiers, the mean (B, C) of the members' probabilities.

        Takes what :meth:`predict_members` takes.
        """
        return self.task.combine(self.predict_members(x))

    def uncertainty(self, x: Tensor | NDArray[np.generic]) -> Uncertainty:
        """Entropies, mutual information and disagreement of each image; see :mod:`ensembler.uncertainty`."""
        from ensembler.uncertainty import uncertainty

        return uncertainty(self.predict_members(x).numpy())

    def sample(self, members: int, seed: int = 0, train: Examples | None = None) -> Ensemble:
        """An ensemble of fresh members from the same simplexes.

        Args:
            members: M >= 1.
            seed: of the draw.
            train: the training images, from which a BatchNorm network's statistics are recomputed for every new
                member; by default the run's own dataset is loaded again, from its usual place.

        Raises:
            UsageError: the run's members are fixed (a deep ensemble, snapshots), or ``members < 1``.
        """
        sampling = self.run.manifest.sampling
        if sampling is None:
            raise UsageError(f"the members of a run by {self.run.manifest.method} are fixed: nothing to sample from")
        return self.at(sample_coefficients(sampling, len(self._vertices), members, seed), train)

    def at(self, coefficients: Tensor, train: Examples | None = None) -> Ensemble:
        """An ensemble of the members at other coefficients of the same vertices: any points of their affine span.

        Args:
            coefficients: (M, K), M >= 1; rows of sum 1.
            train: the training images, from which a BatchNorm network's statistics are recomputed for every member;
                by default the run's own dataset is loaded again, from its usual place.

        Raises:
            ShapeError: coefficients of another shape.
        """
        if coefficients.dim() != 2 or not len(coefficients) or coefficients.shape[1] != len(self._vertices):
            found = tuple(coefficients.shape)
            raise ShapeError(f"expected coefficients (M, {len(self._vertices)}) with M >= 1, found {found}")
        record = self.run.manifest.dataset
        if train is None and has_batchnorm(self._network):
            train = record.load().train
        buffers = member_buffers(self._weights, self._vertices, coefficients, train, record)
        manifest = self.run.manifest.model_copy(update={"members": len(coefficients), "files": {}})
        moved = replace(self.run, manifest=manifest, coefficients=coefficients, buffers=buffers)
        return Ensemble(moved, self.device, self.batch_size)

    def _prepare(self, x: Tensor, stored: bool) -> Tensor:
        x = x.to(self.device)
        return self._inputs(x) if stored else x.float()


def sample_coefficients(sampling: Sampling, vertices: int, members: int, seed: int) -> Tensor:
    """Coefficients (M, K) of members, each Dirichlet in one of the simplexes.

    Without weights the members are shared out in turn; with them, each draws its simplex. With corners, the first
    members are the vertices themselves: the first of every simplex, then the second of every simplex, and so on.

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
    buffers: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Buffers of members that were never trained themselves, BatchNorm's recomputed from the training examples.

    A point between two solutions has activations that neither's statistics describe (Izmailov et al. 2018, sec. 3.2;
    Garipov et al. 2018), so each member's are averaged anew over :data:`BATCHNORM_EXAMPLES` training examples,
    augmented as in training: without the augmentation, a ResNet-20 lost 5 points of accuracy. The weights and buffers
    that the network holds are overwritten.

    Args:
        weights: the network.
        vertices: (K, P).
        coefficients: (M, K).
        train: the training examples.
        record: how they were seen in training.
        buffers: all others of each member, by name; by default as the network holds them.

    Returns:
        Buffer name to (M, ...), on the CPU; empty for a network without buffers.
    """
    if train is not None:
        # Shuffled: images often lie sorted by class, and the variance within a class is not the variance.
        train = train.part(torch.randperm(len(train), generator=generator(0, "batchnorm"))[:BATCHNORM_EXAMPLES])
    begin = weights.buffers() if buffers is None else buffers
    rows: list[dict[str, Tensor]] = []
    for row in coefficients.to(vertices.device):
        torch.mv(vertices.T, row, out=weights.vector)
        weights.load_buffers(begin)
        if has_batchnorm(weights.module):
            if train is None:
                raise UsageError("a BatchNorm network needs its training images to make new members")
            batchnorm.recompute(weights.module, _inputs(train, record, vertices.device))
        rows.append({name: buffer.cpu() for name, buffer in weights.buffers().items()})
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}


def _inputs(train: Examples, record: DatasetRecord, device: torch.device) -> Iterator[Tensor]:
    """Training inputs in batches of nearly equal size: each counts the same in the statistics."""
    stream = generator(0, "batchnorm augmentation")
    prepare = train.inputs(record.mean, record.std, device)
    for index in torch.arange(len(train)).tensor_split(-(-len(train) // _BATCHNORM_BATCH)):
        choices = train.draw(record.augmentation, len(index), stream)
        batch = train.augmented(index.to(train.labels.device), record.augmentation, choices.to(train.labels.device))
        yield prepare(batch.data.to(device))
