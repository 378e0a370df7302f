"""What every method needs around the loop: the network, the images, the cost, the history, and the run at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ensembler import architectures
from ensembler.datasets import Dataset, Split, normalise
from ensembler.ensemble import BATCHNORM_EXAMPLES, Ensemble, choose_device, has_batchnorm, member_buffers
from ensembler.errors import UsageError
from ensembler.run import Cost, DatasetRecord, Manifest, Run, Sampling, versions
from ensembler.seeds import derive, generator
from ensembler.trainers.loop import Batches, Epoch, Snapshot, train
from ensembler.trainers.schedules import Schedule, one_cycle
from ensembler.uncertainty import disagreement
from ensembler.weights import FlatWeights

__all__ = ["Probe", "Session", "Settings", "Solution", "Watcher", "stack_buffers"]

_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epochs": (lambda value: 0 < value < math.inf, "positive"),
    "batch_size": (lambda value: value >= 1, "at least 1"),
    "rate": (lambda value: 0 < value < math.inf, "positive"),
    "momentum": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "weight_decay": (lambda value: 0 <= value < math.inf, "at least 0"),
    "clip": (lambda value: value > 0, "positive"),
}

Watcher = Callable[[str, Epoch, int], None]  # part, what its epoch did, epochs in all


@dataclass(frozen=True)
class Settings:
    """What all methods share. Every field is a command-line option and is kept in the run's manifest.

    Attributes:
        architecture: see :mod:`ensembler.architectures`.
        epochs: passes over the training images for one solution; a fraction will do.
        batch_size: B; by default 128, or 32 where there are fewer than 10,000 training images.
        rate: highest learning rate of a solution's one-cycle schedule.
        momentum, weight_decay: of SGD with Nesterov momentum.
        clip: largest gradient norm, or ``None``.
        augmentation: see :func:`ensembler.datasets.augment`; by default what suits the dataset.
        seed: of everything that is drawn.
        device: ``"cpu"``, ``"cuda"``, ...; by default CUDA where there is one.
    """

    architecture: str = "cnn"
    epochs: float = 20
    batch_size: int | None = None
    rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float | None = 1.0
    augmentation: str | None = None
    seed: int = 0
    device: str | None = None


@dataclass(frozen=True)
class Solution:
    """One trained network: its weights (P,) and its buffers."""

    vector: Tensor
    buffers: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Probe:
    """One member measured: mean loss on training images, probabilities (N, C) and labels (N,) of test images."""

    train_loss: float
    test_probabilities: Tensor
    labels: Tensor

    def error(self, probabilities: Tensor) -> float:
        """Share of the test images that ``probabilities`` (N, C) get wrong."""
        return (probabilities.argmax(1) != self.labels).double().mean().item()


@dataclass(eq=False)
class Session:
    """One training command: owns the network that all vertices take turns in, and counts the cost.

    Args:
        dataset: what to train on.
        settings: see :class:`Settings`.
        init: a run whose first member is the solution to start from; its architecture and cost are taken over.
        watch: told of every epoch.

    Raises:
        UsageError: a setting out of range. DataError: ``init`` was trained on other images.
    """

    dataset: Dataset
    settings: Settings = field(default_factory=Settings)
    init: Run | None = None
    watch: Watcher = lambda part, epoch, epochs: None

    def __post_init__(self) -> None:
        settings, init = self.settings, self.init
        for name, value in asdict(settings).items():
            if name in _RANGES and value is not None and not _RANGES[name][0](value):
                raise UsageError(f"{name} must be {_RANGES[name][1]}, not {value}")
        self.device = choose_device(settings.device)
        self.architecture = init.manifest.architecture if init else settings.architecture
        self.weights = FlatWeights(self._network(settings.seed))
        self.history: list[dict[str, Any]] = []
        self._parts: dict[str, int] = {}
        self._batchnorm_examples = 0
        self._seconds_before = 0.0
        self._start = time.monotonic()
        self._images = Split(self.dataset.train.images.to(self.device), self.dataset.train.labels.to(self.device))
        self._batch_size = settings.batch_size or (128 if len(self._images) >= 10_000 else 32)
        self._record = DatasetRecord.of(self.dataset, settings.augmentation)
        self.per_epoch = self._batches("").per_epoch

    def iterations(self, epochs: float) -> int:
        """Steps in so many epochs, at least 1."""
        return max(1, round(epochs * self.per_epoch))

    def fresh(self, member: int = 0) -> Solution:
        """Freshly initialised weights of the given member."""
        weights = FlatWeights(self._network(derive(self.settings.seed, "member", member)))
        return Solution(weights.vector, weights.buffers())

    def solution(self, member: int = 0) -> Solution:
        """A solution to start from: the first member of ``init``, or one trained from fresh weights."""
        if self.init is not None:
            return self.inherit(self.init, _part(0))
        beginning = self.fresh(member)
        self.weights.load_buffers(beginning.buffers)
        vertices = beginning.vector[None].clone()
        iterations = self.iterations(self.settings.epochs)
        self.train(_part(member), vertices, one_cycle(self.settings.rate, iterations), iterations)
        return Solution(vertices[0], self.weights.buffers())

    def inherit(self, run: Run, part: str) -> Solution:
        """A run's first member, its cost booked under ``part``.

        Raises:
            DataError: it was trained on other images.
            UsageError: it is of another architecture.
        """
        cost = run.manifest.cost
        # A member of a deep ensemble was trained alone; of any other run, all of it was needed.
        alone = run.manifest.method in ("single", "deep-ensemble")
        self._parts[part] = cost.parts[_part(0)] if alone else cost.example_passes
        self._seconds_before += cost.seconds * self._parts[part] / max(1, cost.example_passes)
        vertices = self._flattened(run)
        vector = run.coefficients[0].to(vertices) @ vertices
        return Solution(vector, {name: rows[0].to(self.device) for name, rows in run.buffers.items()})

    def vertices_of(self, run: Run) -> Tensor:
        """All vertices (K, P) of a run, and its whole cost booked, unless this session made it."""
        if not self._parts:
            self._parts |= run.manifest.cost.parts
            self._batchnorm_examples += run.manifest.cost.batchnorm_examples
            self._seconds_before += run.manifest.cost.seconds
        return self._flattened(run)

    def probe(self, vertices: Tensor, coefficients: Tensor, examples: int) -> list[Probe]:
        """Measure members on at most ``examples`` training and as many test images, the same for every member.

        BatchNorm statistics are recomputed for each; their cost is not the run's, as no member is made.
        """
        record, train = self._record, _some(self.dataset.train, examples)
        test = _some(self.dataset.test, examples)
        result = []
        for row in coefficients:
            buffers = member_buffers(self.weights, vertices, row[None], self._images, record)
            self.weights.load_buffers({name: rows[0] for name, rows in buffers.items()})
            seen, unseen = self._log_probabilities(train), self._log_probabilities(test)
            loss = torch.nn.functional.nll_loss(seen, train.labels).item()
            result.append(Probe(loss, unseen.exp(), test.labels))
        return result

    def train(self, part: str, vertices: Tensor, schedule: Schedule, iterations: int, **options: Any) -> list[Snapshot]:
        """Run the loop (:func:`ensembler.trainers.loop.train`) and book what it cost under ``part``.

        ``part`` also names the stream of images, augmentations and dropout masks that it sees.
        """
        settings = self.settings
        batches = self._batches(part)
        epochs = -(-iterations // batches.per_epoch)

        def optimiser(moving: list[Tensor]) -> Optimizer:
            return torch.optim.SGD(
                moving,
                lr=settings.rate,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay,
                nesterov=settings.momentum > 0,
            )

        def on_epoch(epoch: Epoch) -> None:
            self._parts[part] = self._parts.get(part, 0) + epoch.examples
            self.history.append({"part": part, **asdict(epoch), "seconds": round(self._seconds(), 3)})
            self.watch(part, epoch, epochs)

        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(derive(settings.seed, "dropout", part))
            return train(
                self.weights,
                vertices,
                batches,
                optimiser,
                schedule,
                iterations,
                clip=settings.clip,
                on_epoch=on_epoch,
                **options,
            )

    def member_buffers(self, vertices: Tensor, coefficients: Tensor) -> dict[str, Tensor]:
        """Buffers (M, ...) of sampled members, BatchNorm statistics recomputed; see
        :func:`ensembler.ensemble.member_buffers`."""
        if has_batchnorm(self.weights.module):
            self._batchnorm_examples += len(coefficients) * min(len(self._images), BATCHNORM_EXAMPLES)
        return member_buffers(self.weights, vertices, coefficients, self._images, self._record)

    def finish(
        self,
        method: str,
        vertices: Tensor,
        coefficients: Tensor,
        buffers: dict[str, Tensor],
        *,
        options: dict[str, Any],
        sampling: Sampling | None = None,
        metrics: dict[str, Any] | None = None,
    ) -> Run:
        """Make the run, and measure the ensemble on the held-out and the test images.

        Args:
            method: its name.
            vertices: (K, P).
            coefficients: (M, K).
            buffers: name to (M, ...).
            options: the method's own options, kept in the manifest beside the settings.
            sampling: how further members can be drawn, if they can.
            metrics: what the method has to say of itself.
        """
        seconds = self._seconds()
        manifest = Manifest(
            method=method,
            architecture=self.architecture,
            dataset=self._record,
            seed=self.settings.seed,
            vertices=len(vertices),
            members=len(coefficients),
            parameters=len(self.weights),
            sampling=sampling,
            options=asdict(self.settings)
            | {
                "batch_size": self._batch_size,
                "augmentation": self._record.augmentation,
                "architecture": self.architecture,
            }
            | options,
            cost=Cost(
                example_passes=sum(self._parts.values()),
                parts=self._parts,
                batchnorm_examples=self._batchnorm_examples,
                seconds=round(seconds, 3),
                device=_device_name(self.device),
            ),
            metrics={},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=versions(),
        )
        run = Run(
            manifest=manifest,
            vertices=self.weights.unflatten(vertices),
            coefficients=coefficients.cpu(),
            buffers=buffers,
            frozen={name: tensor.cpu() for name, tensor in self.weights.frozen().items()},
            history=self.history,
        )
        ensemble = Ensemble(run, self.device)
        manifest.metrics = (metrics or {}) | {
            name: _measure(ensemble, split)
            for name, split in (("validation", self.dataset.validation), ("test", self.dataset.test))
        }
        return run

    def _network(self, seed: int) -> torch.nn.Module:
        return architectures.build(self.architecture, len(self.dataset.classes), seed).to(self.device)

    def _batches(self, part: str) -> Batches:
        stream = generator(self.settings.seed, "batches", part)
        return Batches(
            self._images, self._batch_size, self._record.augmentation, self.dataset.mean, self.dataset.std, stream
        )

    def _flattened(self, run: Run) -> Tensor:
        run.manifest.dataset.check(self.dataset)
        if run.manifest.architecture != self.architecture:
            raise UsageError(f"a run of {run.manifest.architecture} and {self.architecture} have no weights in common")
        self.weights.load_frozen(run.frozen)
        return self.weights.flatten(run.vertices)

    def _log_probabilities(self, split: Split) -> Tensor:
        self.weights.module.eval()
        with torch.inference_mode():
            logits = [
                self.weights.module(normalise(batch.images.to(self.device), self.dataset.mean, self.dataset.std))
                for batch in split.batches(self._batch_size)
            ]
        return torch.log_softmax(torch.cat(logits).float(), dim=1).cpu()

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._start


def stack_buffers(solutions: Sequence[Solution | Snapshot]) -> dict[str, Tensor]:
    """The buffers of solutions that are members themselves: name to (M, ...), on the CPU."""
    names = solutions[0].buffers
    return {name: torch.stack([solution.buffers[name].cpu() for solution in solutions]) for name in names}


def _part(member: int) -> str:
    return f"solution {member + 1}"


def _measure(ensemble: Ensemble, split: Split) -> dict[str, float | None]:
    members = ensemble.predict_members(split.images)
    mean = members.mean(dim=0)
    chosen = mean.gather(1, split.labels[:, None]).clamp_min(torch.finfo(torch.float32).tiny)
    differ = disagreement(members.numpy())
    return {
        "accuracy": (mean.argmax(1) == split.labels).double().mean().item(),
        "nll": -chosen.log().double().mean().item(),
        "member_accuracy": (members.argmax(2) == split.labels).double().mean().item(),
        "disagreement": None if differ is None else float(differ.mean()),
    }


def _some(split: Split, examples: int) -> Split:
    return split[torch.randperm(len(split), generator=generator(0, "probe"))[:examples]]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"
