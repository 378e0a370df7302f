"""What every method needs around the loop: the network, the images, the cost, the history, and the run at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ensembler import architectures, checkpoint
from ensembler.checkpoint import Checkpoint
from ensembler.datasets import Dataset, Split, normalise
from ensembler.ensemble import BATCHNORM_EXAMPLES, Ensemble, choose_device, has_batchnorm, member_buffers
from ensembler.errors import UsageError
from ensembler.run import Cost, DatasetRecord, Manifest, Part, Run, Sampling, versions
from ensembler.seeds import derive, generator
from ensembler.trainers import memory
from ensembler.trainers.loop import Batches, Epoch, Snapshot, train
from ensembler.trainers.schedules import Schedule, one_cycle
from ensembler.uncertainty import disagreement
from ensembler.weights import FlatWeights

__all__ = ["Probe", "Session", "Settings", "Solution", "Watcher", "nll", "stack_buffers"]

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
    """One member measured: mean loss on training images, probabilities (N, C) and labels (N,) of images unseen."""

    train_loss: float
    probabilities: Tensor
    labels: Tensor

    def error(self, probabilities: Tensor) -> float:
        """Share of the unseen images that ``probabilities`` (N, C) get wrong."""
        return (probabilities.argmax(1) != self.labels).double().mean().item()

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of the unseen images, in nats."""
        return nll(self.probabilities, self.labels)


@dataclass(eq=False)
class Session:
    """One training command: owns the network that all vertices take turns in, and counts the cost.

    Args:
        dataset: what to train on.
        settings: see :class:`Settings`.
        init: what to start from. A run: its first member is the solution, its architecture and cost are taken over.
            A checkpoint that fits the network: it is the solution, at a cost that is not known. One whose head has
            another number of classes: where training begins.
        watch: told of every epoch.
        say: told what a method finds on its way, a line at a time.

    Attributes:
        begins_solved: whether ``init`` is a solution.

    Raises:
        UsageError: a setting out of range. DataError: ``init`` was trained on other images. ShapeError: the checkpoint
            is another network's.
    """

    dataset: Dataset
    settings: Settings = field(default_factory=Settings)
    init: Run | Checkpoint | None = None
    watch: Watcher = lambda part, epoch, epochs: None
    say: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        settings, init = self.settings, self.init
        for name, value in asdict(settings).items():
            if name in _RANGES and value is not None and not _RANGES[name][0](value):
                raise UsageError(f"{name} must be {_RANGES[name][1]}, not {value}")
        self.device = choose_device(settings.device)
        self.architecture = init.manifest.architecture if isinstance(init, Run) else settings.architecture
        network = self._network(settings.seed)
        new_head = checkpoint.fit(network, init.tensors) if isinstance(init, Checkpoint) else []
        self.begins_solved = init is not None and not new_head
        self.weights = FlatWeights(network)
        self.history: list[dict[str, Any]] = []
        self._parts: dict[str, Part] = {}
        if isinstance(init, Checkpoint):
            self._parts["checkpoint"] = Part(seconds=None, device="unknown", origin=init.origin)
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
        """Freshly initialised weights of the given member; those of a checkpoint, if there is one, in their places."""
        network = self._network(derive(self.settings.seed, "member", member))
        if isinstance(self.init, Checkpoint):
            checkpoint.fit(network, self.init.tensors)
        weights = FlatWeights(network)
        return Solution(weights.vector, weights.buffers())

    def solution(self, member: int = 0) -> Solution:
        """A solution to start from: that of ``init``, or one trained from fresh weights."""
        if isinstance(self.init, Run):
            return self.inherit(self.init, _part(0))
        if isinstance(self.init, Checkpoint) and self.begins_solved:
            return self.fresh()
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
        whole = cost.model_dump(exclude={"parts"})
        origin = ", ".join(cost.unknown) or None
        booked = (cost.parts[_part(0)] if alone else Part.model_validate(whole)).model_copy(update={"origin": origin})
        self._parts[part] = booked
        self._seconds_before += cost.seconds if booked.seconds is None else booked.seconds
        vertices = self._flattened(run)
        vector = run.coefficients[0].to(vertices) @ vertices
        return Solution(vector, {name: rows[0].to(self.device) for name, rows in run.buffers.items()})

    def vertices_of(self, run: Run) -> Tensor:
        """All vertices (K, P) of a run, and its whole cost booked, unless this session made it."""
        if not self._parts:
            self._parts |= {name: part.model_copy() for name, part in run.manifest.cost.parts.items()}
            self._seconds_before += run.manifest.cost.seconds
        return self._flattened(run)

    def probe(self, vertices: Tensor, coefficients: Tensor, unseen: Split, examples: int) -> list[Probe]:
        """Measure members on at most ``examples`` training images and as many unseen ones, the same for every member.

        BatchNorm statistics are recomputed for each, from as many training images.
        """
        record, train, unseen = self._record, _some(self._images, examples), _some(unseen, examples)
        result = []
        with self._booked("measurements") as booked:
            for row in coefficients:
                buffers = member_buffers(self.weights, vertices, row[None], train, record)
                self.weights.load_buffers({name: rows[0] for name, rows in buffers.items()})
                loss = nll(self._probabilities(train), train.labels.cpu())
                result.append(Probe(loss, self._probabilities(unseen), unseen.labels))
            each = len(train) * (2 if has_batchnorm(self.weights.module) else 1) + len(unseen)
            booked.forward_passes += len(coefficients) * each
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
            booked.example_passes += epoch.examples
            booked.forward_passes += epoch.examples if "penalty" in options else 0
            self.history.append({"part": part, **asdict(epoch), "seconds": round(self._seconds(), 3)})
            self.watch(part, epoch, epochs)

        devices = [self.device] if self.device.type == "cuda" else []
        with self._booked(part) as booked, torch.random.fork_rng(devices):
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
        with self._booked("members") as booked:
            if has_batchnorm(self.weights.module):
                booked.forward_passes += len(coefficients) * min(len(self._images), BATCHNORM_EXAMPLES)
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
        peaks = [part.peak_memory for part in self._parts.values() if part.peak_memory is not None]
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
                "init": self.init.origin if isinstance(self.init, Checkpoint) else None,
                "augmentation": self._record.augmentation,
                "architecture": self.architecture,
            }
            | options,
            cost=Cost(
                example_passes=sum(part.example_passes for part in self._parts.values()),
                forward_passes=sum(part.forward_passes for part in self._parts.values()),
                seconds=round(self._seconds(), 3),
                peak_memory=max(peaks, default=None),
                device=_device_name(self.device),
                parts=self._parts,
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

    def _probabilities(self, split: Split) -> Tensor:
        self.weights.module.eval()
        with torch.inference_mode():
            logits = [
                self.weights.module(normalise(batch.images.to(self.device), self.dataset.mean, self.dataset.std))
                for batch in split.batches(self._batch_size)
            ]
        return torch.softmax(torch.cat(logits).float(), dim=1).cpu()

    @contextmanager
    def _booked(self, name: str) -> Iterator[Part]:
        """Book under ``name`` what the block counts, and the time and memory that it takes."""
        part = self._parts.setdefault(name, Part(device=_device_name(self.device)))
        start = time.monotonic()
        memory.forget_peak(self.device)
        yield part
        part.seconds = round((part.seconds or 0.0) + time.monotonic() - start, 3)
        part.peak_memory = max(filter(None, (part.peak_memory, memory.peak(self.device))), default=None)

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._start


def stack_buffers(solutions: Sequence[Solution | Snapshot]) -> dict[str, Tensor]:
    """The buffers of solutions that are members themselves: name to (M, ...), on the CPU."""
    names = solutions[0].buffers
    return {name: torch.stack([solution.buffers[name].cpu() for solution in solutions]) for name in names}


def nll(probabilities: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood of ``labels`` (N,) under ``probabilities`` (N, C), in nats."""
    chosen = probabilities.gather(1, labels[:, None]).clamp_min(torch.finfo(torch.float32).tiny)
    return -chosen.log().double().mean().item()


def _part(member: int) -> str:
    return f"solution {member + 1}"


def _measure(ensemble: Ensemble, split: Split) -> dict[str, float | None]:
    members = ensemble.predict_members(split.images)
    mean = members.mean(dim=0)
    differ = disagreement(members.numpy())
    return {
        "accuracy": (mean.argmax(1) == split.labels).double().mean().item(),
        "nll": nll(mean, split.labels),
        "member_accuracy": (members.argmax(2) == split.labels).double().mean().item(),
        "disagreement": None if differ is None else float(differ.mean()),
    }


def _some(split: Split, examples: int) -> Split:
    return split[torch.randperm(len(split), generator=generator(0, "probe"))[:examples]]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"
