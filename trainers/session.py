"""What every method needs around the loop: the network, the images, the cost, the history, and the run at the end."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import chain, count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import SyncBatchNorm
from torch.optim import Optimizer

from ensembler import architectures, checkpoint
from ensembler.checkpoint import Checkpoint
from ensembler.datasets import Dataset
from ensembler.engine import Engine, Local
from ensembler.ensemble import BATCHNORM_EXAMPLES, Ensemble, choose_device, has_batchnorm, member_buffers
from ensembler.errors import UsageError
from ensembler.images import Images, Split, normalise
from ensembler.memory import keep_freed
from ensembler.run import Cost, DatasetRecord, Manifest, Part, Run, Sampling, versions
from ensembler.seeds import derive, generator
from ensembler.trainers import memory
from ensembler.trainers.batches import Batches
from ensembler.trainers.books import Books
from ensembler.trainers.checkpoints import Checkpoints, Saved
from ensembler.trainers.distributed import ALONE, Group
from ensembler.trainers.loop import Epoch, Snapshot, State, train
from ensembler.trainers.schedules import SCHEDULES, Schedule
from ensembler.uncertainty import disagreement
from ensembler.weights import FlatWeights

__all__ = ["Probe", "Session", "Settings", "Solution", "Watcher", "nll", "stack_buffers"]

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epochs": (lambda value: 0 < value < math.inf, "positive"),
    "batch_size": (lambda value: value >= 1, "at least 1"),
    "rate": (lambda value: 0 < value < math.inf, "positive"),
    "momentum": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "weight_decay": (lambda value: 0 <= value < math.inf, "at least 0"),
    "clip": (lambda value: value > 0, "positive"),
    "workers": (lambda value: value >= 0, "at least 0"),
    "threads": (lambda value: value >= 1, "at least 1"),
}

Watcher = Callable[[str, Epoch, int], None]  # part, what its epoch did, epochs in all


@dataclass(frozen=True)
class Settings:
    """What all methods share. Every field is a command-line option and is kept in the run's manifest.

    Attributes:
        architecture: see :mod:`ensembler.architectures`.
        epochs: passes over the training images for one solution; a fraction will do.
        batch_size: B, of all processes together; by default 128, or 32 where there are fewer than 10,000 training
            images.
        rate: highest learning rate of a solution's schedule.
        schedule: of :data:`ensembler.trainers.schedules.SCHEDULES`.
        momentum, weight_decay: of SGD with Nesterov momentum.
        clip: largest gradient norm, or ``None``.
        precision: of the forward and backward pass: ``"float32"``, ``"bfloat16"``, or on a GPU ``"float16"``.
        compile: whether ``torch.compile`` makes the network faster: it takes a minute, and pays on a GPU.
        sync_batchnorm: whether BatchNorm normalises over the images of all processes, not over each one's: on GPUs.
        augmentation: see :func:`ensembler.images.augment`; by default what suits the dataset.
        seed: of everything that is drawn.
        device: ``"cpu"``, ``"cuda"``, ...; by default CUDA where there is one.
        workers: processes that read images from their files; see :class:`ensembler.trainers.batches.Batches`.
        threads: CPU threads that compute one piece of the training, set for the whole process; by default as they are.
            The last bits of a result depend on them.
    """

    architecture: str = "cnn"
    epochs: float = 20
    batch_size: int | None = None
    rate: float = 0.1
    schedule: str = "one-cycle"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float | None = 1.0
    precision: str = "float32"
    compile: bool = False
    sync_batchnorm: bool = False
    augmentation: str | None = None
    seed: int = 0
    device: str | None = None
    workers: int | None = None
    threads: int | None = None


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
        checkpoints: where to keep what has been reached, and to go on from; nowhere by default.
        engine: what runs those pieces of the training that are independent: see :mod:`ensembler.trainers.pieces`.
        group: the processes that train together, from :func:`ensembler.trainers.distributed.joined`. Each calls the
            same methods with the same arguments and gets the same run; the first measures and keeps the checkpoints.

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
    checkpoints: Checkpoints | None = None
    engine: Engine = field(default_factory=Local)
    group: Group = ALONE

    def __post_init__(self) -> None:
        settings, init = self.settings, self.init
        for name, value in asdict(settings).items():
            if name in _RANGES and value is not None and not _RANGES[name][0](value):
                raise UsageError(f"{name} must be {_RANGES[name][1]}, not {value}")
        if settings.schedule not in SCHEDULES:
            raise UsageError(f"unknown schedule {settings.schedule!r}: use one of {', '.join(SCHEDULES)}")
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.device = choose_device(settings.device)
        keep_freed(self.device)
        if settings.precision not in PRECISIONS:
            raise UsageError(f"unknown precision {settings.precision!r}: use one of {', '.join(PRECISIONS)}")
        if settings.precision == "float16" and self.device.type == "cpu":
            raise UsageError("float16 needs a GPU: use bfloat16 or float32 on the CPU")
        if settings.sync_batchnorm and self.device.type == "cpu":
            raise UsageError("BatchNorm is synchronised on GPUs alone: leave --sync-batchnorm out on the CPU")
        self.architecture = init.manifest.architecture if isinstance(init, Run) else settings.architecture
        network = self._network(settings.seed)
        new_head = checkpoint.fit(network, init.tensors) if isinstance(init, Checkpoint) else []
        self.begins_solved = init is not None and not new_head
        self.weights = FlatWeights(network)
        if isinstance(init, Run):
            self.weights.load_frozen(init.frozen)
        together = settings.sync_batchnorm and self.group.size > 1
        self._synchronised = _synchronised(self.weights) if together else None
        if settings.compile:
            (self._synchronised or self.weights).module.compile()
        self.history: list[dict[str, Any]] = []
        self._parts: dict[str, Part] = {}
        if isinstance(init, Checkpoint):
            self._parts["checkpoint"] = Part(seconds=None, device="unknown", origin=init.origin)
        self._seconds_before = 0.0
        self._start = time.monotonic()
        self._images = train = self.dataset.train
        if isinstance(train, Split):
            self._images = Split(train.images.to(self.device), train.labels.to(self.device))
        self._batch_size = settings.batch_size or (128 if len(self._images) >= 10_000 else 32)
        self._record = DatasetRecord.of(self.dataset, settings.augmentation)
        self.per_epoch = self.batches("").per_epoch
        self._numbers: Iterator[int] = count()
        if self.checkpoints:
            self.checkpoints.identity = {
                "train_sha256": self._record.train_sha256,
                "architecture": self.architecture,
                "batch_size": self._batch_size,
                "augmentation": self._record.augmentation,
                "seed": settings.seed,
            }

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
        self.train(_part(member), vertices, self.schedule(iterations), iterations)
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

    def schedule(self, iterations: int) -> Schedule:
        """The settings' schedule over so many steps."""
        return SCHEDULES[self.settings.schedule](self.settings.rate, iterations)

    def probe(self, vertices: Tensor, coefficients: Tensor, unseen: Images, examples: int) -> list[Probe]:
        """Measure members on at most ``examples`` training images and as many unseen ones, the same for every member.

        BatchNorm statistics are recomputed for each, from as many training images.
        """
        record, train, held_out = self._record, _some(self._images, examples), _some(unseen, examples)

        def measure() -> list[Probe]:
            result = []
            for row in coefficients:
                buffers = member_buffers(self.weights, vertices, row[None], train, record)
                self.weights.load_buffers({name: rows[0] for name, rows in buffers.items()})
                loss = nll(self._probabilities(train), train.labels.cpu())
                result.append(Probe(loss, self._probabilities(held_out), held_out.labels))
            return result

        with self.booked("measurements") as booked:
            each = len(train) * (2 if has_batchnorm(self.weights.module) else 1) + len(held_out)
            booked.forward_passes += len(coefficients) * each
            return self.group.from_first(measure)

    def train(
        self,
        part: str,
        vertices: Tensor,
        schedule: Schedule,
        iterations: int,
        rng: np.random.Generator | None = None,
        *,
        trainable: Sequence[int] = (0,),
        **options: Any,
    ) -> list[Snapshot]:
        """Run the loop (:func:`ensembler.trainers.loop.train`) and book what it cost under ``part``.

        ``part`` also names the stream of images, augmentations and dropout masks that it sees. ``rng`` is what the
        method draws its points from, so that a checkpoint can hold its state. Processes that train together begin and
        end with the first one's vertices and buffers.
        """
        settings, batches, number = self.settings, self.batches(part), self.next_number()
        if self._synchronised:
            self._check_parts(options.get("samples", 1))
        checkpoints = self.checkpoints if self.group.first else None
        title = f"{part}, {iterations} steps"
        epochs, told = -(-iterations // batches.per_epoch), len(self.history)
        devices = [self.device] if self.device.type == "cuda" else []

        def on_epoch(epoch: Epoch) -> None:
            booked.forward_passes += epoch.examples if "penalty" in options else 0
            self.note(part, booked, epoch, epochs)

        def seed(iteration: int) -> None:  # of the masks of the step after it, others in every process
            number = derive(settings.seed, "dropout", part, self.group.rank, iteration)
            torch.default_generator.manual_seed(number)  # torch.manual_seed takes thirty times as long
            if devices:
                torch.cuda.manual_seed_all(number)

        def on_step(iteration: int, state: Callable[[], State]) -> None:
            seed(iteration)
            if checkpoints and (iteration == iterations or checkpoints.due()):
                facts = {
                    "history": self.history[told:],
                    "example_passes": booked.example_passes - before.example_passes,
                    "forward_passes": booked.forward_passes - before.forward_passes,
                    "seconds": time.monotonic() - start,
                    "rng": rng.bit_generator.state if rng else None,
                }
                checkpoints.save(number, title, Saved(state(), facts))

        with self.booked(part) as booked, torch.random.fork_rng(devices), closing(batches):
            before, start = booked.model_copy(), time.monotonic()
            saved = self.group.from_first(lambda: checkpoints.load(number, title) if checkpoints else None)
            seed(saved.state.iteration if saved else 0)
            if saved:
                facts = saved.facts
                booked.example_passes += facts["example_passes"]
                booked.forward_passes += facts["forward_passes"]
                booked.seconds = (booked.seconds or 0.0) + facts["seconds"]
                self._seconds_before += facts["seconds"]
                start -= facts["seconds"]
                self.history += facts["history"]
                if rng:
                    rng.bit_generator.state = facts["rng"]
                if saved.state.iteration < iterations:
                    batches.skip(saved.state.iteration)
            self._agree(vertices, trainable)
            snapshots = train(
                self._synchronised or self.weights,
                vertices,
                batches,
                self.optimiser,
                schedule,
                iterations,
                clip=settings.clip,
                precision=PRECISIONS[settings.precision],
                on_epoch=on_epoch,
                resume=saved.state if saved else None,
                on_step=on_step,
                group=self.group,
                trainable=trainable,
                **options,
            )
            self._agree(vertices, trainable)
            return snapshots

    def _agree(self, vertices: Tensor, trainable: Sequence[int]) -> None:
        """Take over the first process's moving vertices and buffers."""
        if self.group.size > 1:
            buffers = self.weights.buffers()
            for tensor in (*(vertices[k] for k in trainable), *buffers.values()):
                self.group.broadcast_(tensor)
            self.weights.load_buffers(buffers)

    def _check_parts(self, samples: int) -> None:
        """Synchronised BatchNorm waits for every process: none may be without images."""
        images, size = len(self._images), self._batch_size
        parts = [part for whole in (size, images % size or size) for part in torch.arange(whole).chunk(samples)]
        if min(map(len, parts)) < self.group.size:
            raise UsageError(
                f"synchronised BatchNorm needs an image for every process and point in every batch: of {images} images "
                f"in batches of {size}, a part has {min(map(len, parts))} for {self.group.size} processes: "
                "choose another --batch-size"
            )

    @contextmanager
    def apart(self, numbers: range) -> Iterator[Books]:
        """Enter what the block does in books of its own, its parts numbered by ``numbers``; see :meth:`absorb`."""
        own = self._parts, self.history, self._numbers, self._seconds_before, self._start
        books = Books()
        self._parts, self.history, self._numbers = books.parts, books.history, iter(numbers)
        self._seconds_before, self._start = 0.0, time.monotonic()
        try:
            yield books
            books.seconds = self._seconds()
        finally:
            self._parts, self.history, self._numbers, self._seconds_before, self._start = own

    @contextmanager
    def absorb(self) -> Iterator[list[Books]]:
        """Take over the books that the block collects, as if it had itself done nothing else."""
        found: list[Books] = []
        own = Books(self._parts, self.history, self._seconds())
        yield found
        for books in found:
            own.add(books)
        self._seconds_before, self._start = own.seconds, time.monotonic()

    def next_number(self) -> int:
        """Of a call of :meth:`train`, or of what takes its place: checkpoints are named by it."""
        return next(self._numbers)

    def optimiser(self, moving: list[Tensor]) -> Optimizer:
        """SGD as the settings have it."""
        settings = self.settings
        return torch.optim.SGD(
            moving,
            lr=settings.rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.momentum > 0,
            fused=self.device.type in ("cpu", "cuda"),  # one pass over memory, and no temporary of size P
        )

    def note(self, part: str, booked: Part, epoch: Epoch, epochs: int) -> None:
        """Count an epoch's passes, and put it into the history and on the screen."""
        booked.example_passes += epoch.examples
        self.history.append({"part": part, **asdict(epoch), "seconds": round(self._seconds(), 3)})
        self.watch(part, epoch, epochs)

    def member_buffers(self, vertices: Tensor, coefficients: Tensor) -> dict[str, Tensor]:
        """Buffers (M, ...) of sampled members, BatchNorm statistics recomputed; see
        :func:`ensembler.ensemble.member_buffers`."""
        with self.booked("members") as booked:
            if has_batchnorm(self.weights.module):
                booked.forward_passes += len(coefficients) * min(len(self._images), BATCHNORM_EXAMPLES)
            return self.group.from_first(
                lambda: member_buffers(self.weights, vertices, coefficients, self._images, self._record)
            )

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
                device=self._device_name,
                parts=self._parts,
            ),
            metrics={},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=versions(),
        )
        run = Run(
            manifest=manifest,
            vertices=self.weights.unflatten(vertices.cpu()),
            coefficients=coefficients.cpu(),
            buffers=buffers,
            frozen={name: tensor.cpu() for name, tensor in self.weights.frozen().items()},
            history=self.history,
        )

        def measure() -> dict[str, Any]:
            ensemble = Ensemble(run, self.device)
            splits = {"validation": self.dataset.validation, "test": self.dataset.test}
            return {name: _measure(ensemble, split) for name, split in splits.items()}

        manifest.metrics = (metrics or {}) | self.group.from_first(measure)
        return run

    def _network(self, seed: int) -> torch.nn.Module:
        return architectures.build(self.architecture, len(self.dataset.classes), seed).to(self.device)

    def batches(self, part: str) -> Batches:
        stream = generator(self.settings.seed, "batches", part)
        return Batches(
            self._images,
            self._batch_size,
            self._record.augmentation,
            self.dataset.mean,
            self.dataset.std,
            stream,
            self.device,
            self.settings.workers,
            self.group,
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
    def booked(self, name: str) -> Iterator[Part]:
        """Book under ``name`` what the block counts, and the time and memory that it takes."""
        part = self._parts.setdefault(name, Part(device=self._device_name))
        start = time.monotonic()
        memory.forget_peak(self.device)
        yield part
        part.seconds = round((part.seconds or 0.0) + time.monotonic() - start, 3)
        part.peak_memory = max(filter(None, (part.peak_memory, memory.peak(self.device))), default=None)

    @property
    def _device_name(self) -> str:
        together = f"{self.group.size} x " if self.group.size > 1 else ""
        return together + _device_name(self.device)

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


def _synchronised(weights: FlatWeights) -> FlatWeights:
    """The same weights and buffers in a network whose BatchNorm layers normalise over the images of all processes.

    Only training takes it: where one process measures alone, such layers would wait for the others.
    """
    module = weights.module
    kept = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    twin = copy.copy(weights)
    twin.module = SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module, kept))  # type: ignore[no-untyped-call]
    return twin


def _part(member: int) -> str:
    return f"solution {member + 1}"


def _measure(ensemble: Ensemble, split: Images) -> dict[str, float | None]:
    parts = split.batches(16 * ensemble.batch_size)  # files are decoded a few at a time
    members = torch.cat([ensemble.predict_members(part.images) for part in parts], dim=1)
    mean = members.mean(dim=0)
    differ = disagreement(members.numpy())
    return {
        "accuracy": (mean.argmax(1) == split.labels).double().mean().item(),
        "nll": nll(mean, split.labels),
        "member_accuracy": (members.argmax(2) == split.labels).double().mean().item(),
        "disagreement": None if differ is None else float(differ.mean()),
        "examples": len(split),
    }


def _some(split: Images, examples: int) -> Split:
    return split[torch.randperm(len(split), generator=generator(0, "probe"))[:examples]]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"
