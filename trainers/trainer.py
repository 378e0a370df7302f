"""What a method trains with: the network, the data on the device, and :meth:`Trainer.fit`."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import SyncBatchNorm

from ensembler import task
from ensembler.data.datasets import Dataset
from ensembler.data.examples import Examples
from ensembler.device import (
    choose_device,
    configure,
    device_name,
    limit_threads,
    restored_generators,
    seed_generators,
    tf32,
)
from ensembler.engine import Engine, Local
from ensembler.errors import UsageError
from ensembler.networks import architectures, matching
from ensembler.networks.architectures import Factory
from ensembler.networks.capture import CudaGraph
from ensembler.networks.checkpoints import Checkpoint
from ensembler.run import CostEntry, DatasetRecord, Run
from ensembler.seeds import derive
from ensembler.side_by_side import turn
from ensembler.trainers import optimisers
from ensembler.trainers.batches import Batches
from ensembler.trainers.distributed import ALONE, Group
from ensembler.trainers.events import EpochEnd, Message, OnEvent, Progress
from ensembler.trainers.ledger import Ledger
from ensembler.trainers.loop import fit
from ensembler.trainers.losses import training_loss
from ensembler.trainers.mixing import Mixing
from ensembler.trainers.plan import Best, Epoch, Fitted, Plan, TrainState
from ensembler.trainers.resume import Store
from ensembler.trainers.schedules import SCHEDULES, Schedule, after, warmed
from ensembler.trainers.settings import Settings
from ensembler.trainers.starts import Start
from ensembler.weights import FlatWeights

__all__ = ["Trainer"]


@dataclass(eq=False)
class Trainer:
    """The network that all vertices take turns in, the data, and the cost of what is done with them.

    Args:
        dataset: what to train on.
        settings: resolved, see :meth:`Settings.resolved`.
        starts: what training may start from, by the names that the settings and the method give it.
        on_event: told of every epoch, and of what a method finds on its way.
        store: where what has been reached is kept; nowhere by default.
        engine: what runs independent jobs; see :func:`ensembler.trainers.work.each`.
        group: the processes that train together. Each makes the same calls and gets the same results; the first
            measures and keeps checkpoints.
        factory: what builds the network, where the settings' architecture is not imported by its name.

    Attributes:
        start: what the settings say to start from.
        starts_solved: whether that is a whole solution, not only where training begins.

    Raises:
        UsageError: a device that cannot do what is asked. ShapeError: a checkpoint is another network's.
    """

    dataset: Dataset
    settings: Settings
    starts: Mapping[str, Start] = field(default_factory=dict)
    on_event: OnEvent = lambda event: None
    store: Store | None = None
    engine: Engine = field(default_factory=Local)
    group: Group = ALONE
    factory: Factory | None = None

    def __post_init__(self) -> None:
        settings, self._shown = self.settings, 0.0
        limit_threads(settings.threads)
        self.device = choose_device(settings.device)
        settings.check_device(self.device.type)
        configure(self.device)
        self.task = task.find(self.dataset.task)
        self.record = DatasetRecord.of(self.dataset, settings.augmentation)
        self.train_examples: Examples = self.dataset.train.to(self.device)
        name = settings.init or settings.weights
        self.start = start = self.starts[name] if name else None
        network = self.network(settings.seed)
        found = matching.load(network, start) if isinstance(start, Checkpoint) else None
        self.starts_solved = start is not None and not (found and found.fresh)
        if found and found.said:
            self.say(found.said)
        self.weights = FlatWeights(network)
        if isinstance(start, Run):
            self.weights.load_frozen(start.frozen)
        together = settings.sync_batchnorm and self.group.size > 1
        self._synchronised = _synchronised(self.weights) if together else None
        if settings.compile:
            # For each size of a batch by itself: sizes are few, and a graph is captured of each.
            (self._synchronised or self.weights).module.compile(dynamic=False)
        self.ledger = Ledger(f"{self.group.size} x " * (self.group.size > 1) + device_name(self.device))
        if isinstance(start, Checkpoint):
            self.ledger.entries["checkpoint"] = CostEntry(seconds=None, device="unknown", origin=start.origin)

    def __reduce__(self) -> Any:
        """Sent to another process, it is made there of the same data, settings and starts."""
        make = partial(Trainer, factory=self.factory)
        return make, (self.dataset, self.settings, self.starts)

    def __copy__(self) -> Trainer:
        """The same with a network and a ledger of its own, for jobs at the same time."""
        own = replace(self)
        own.train_examples = self.train_examples
        if self.measures:
            own.held_out = self.held_out
        return own

    def fork(self, job: str, on_event: OnEvent) -> Trainer:
        """The same network, data and processes, with a ledger and a store of its own, for a job."""
        own = object.__new__(Trainer)
        store = self.store.child(job) if self.store else None
        own.__dict__.update(self.__dict__, on_event=on_event, ledger=self.ledger.fork(), store=store)
        return own

    def network(self, seed: int) -> torch.nn.Module:
        """The network with the fresh weights of a seed, on the device."""
        settings, outputs = self.settings, self.task.outputs(len(self.dataset.classes))
        memory_format = settings.memory_format or "channels-last"
        network = architectures.build(settings.architecture, outputs, seed, memory_format, self.factory)
        return network.to(self.device)

    @property
    def captures(self) -> bool:
        """Whether steps are captured as CUDA graphs: by one process, on a GPU."""
        return self.device.type == "cuda" and self.group.size == 1 and not self.settings.eager

    @property
    def measures(self) -> bool:
        """Whether held-out examples are predicted after every epoch."""
        return self.settings.measure == "all"

    @cached_property
    def held_out(self) -> Examples:
        """The validation split, on the device if it is in memory."""
        return self.dataset.validation.to(self.device)

    def _held_out_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's share of the held-out examples, as inputs of the network and targets."""
        examples = self.held_out
        prepare = examples.inputs(self.record.mean, self.record.std, self.device)
        own = examples.part(self.group.share) if self.group.size > 1 else examples
        for batch in own.batches(self.settings.batch_size or 1):
            yield prepare(batch.data.to(self.device)), batch.labels.to(self.device)

    def say(self, text: str) -> None:
        """Report what was found, in one line."""
        self.on_event(Message(text))

    def show(self, part: str, done: int, total: int) -> None:
        """Report progress, in examples; at most twice a second, but always the end."""
        if done == total or time.monotonic() - self._shown > 0.5:
            self._shown = time.monotonic()
            self.on_event(Progress(part, done, total))

    def steps(self, epochs: float) -> int:
        """Steps in so many epochs, at least 1."""
        return max(1, round(epochs * self.batches("").per_epoch))

    @property
    def lr(self) -> float:
        """The settings' learning rate, which they have once they are resolved."""
        assert self.settings.lr is not None  # noqa: S101  for the type checker
        return self.settings.lr

    def schedule(self, iterations: int) -> Schedule:
        """The settings' schedule over so many steps, with its warm-up."""
        return self.warmed(SCHEDULES[self.settings.schedule](self.lr, iterations))

    def before(self, share: float, then: Schedule) -> tuple[int, Schedule]:
        """A share of a solution's schedule, then another one; the latter alone where training starts from a solution.

        Returns:
            The iterations of the share, and the whole schedule.
        """
        if self.starts_solved:
            return 0, then
        budget = self.steps(self.settings.epochs)
        iterations = max(1, round(share * budget))
        return iterations, after(iterations, self.schedule(budget), then)

    def warmed(self, schedule: Schedule) -> Schedule:
        """A schedule with the settings' warm-up."""
        return warmed(schedule, self.steps(self.settings.warmup)) if self.settings.warmup else schedule

    def batches(self, part: str) -> Batches:
        """The stream of batches that a part of the training sees."""
        return Batches(
            self.train_examples,
            self.settings.batch_size or 1,
            self.record.augmentation,
            self.dataset.mean,
            self.dataset.std,
            (self.settings.seed, "batches", part),
            self.device,
            self.settings.workers,
            self.group,
            Mixing(self.settings.mixup, self.settings.cutmix),
        )

    def fit(self, part: str, vertices: Tensor, buffers: Mapping[str, Tensor], plan: Plan, attempt: str = "") -> Fitted:
        """Run the loop (:func:`ensembler.trainers.loop.fit`) on ``vertices``, in place, and enter its cost.

        Args:
            part: names the entry of the cost, and the stream of data, coefficients and dropout masks that it sees.
            vertices: (K, P).
            buffers: the network's, to begin with.
            plan: what the method asks for.
            attempt: tells several trainings of one part apart, so that each has a checkpoint of its own.
        """
        settings, group, batches = self.settings, self.group, self.batches(part)
        held_out = len(self.held_out) if self.measures or plan.patience else 0
        ended = False
        store = self.store if group.first else None
        name, epochs = f"{part} {attempt}".rstrip(), -(-plan.iterations // batches.per_epoch)
        if self._synchronised:
            _check_shares(batches, plan.samples, settings.accumulate, group.size)

        def on_epoch(epoch: Epoch, kept: Best | None) -> None:
            nonlocal ended
            ended = kept is not None
            end = EpochEnd(part, epoch, epoch.number if kept else epochs, self.task.metric)
            ledger.epoch(end, forward_passes=held_out + (epoch.examples if plan.penalty else 0))
            self.on_event(end)
            if kept:
                self.say(
                    f"{part}: {epoch.number} of {epochs} epochs; the lowest held-out loss, {kept.loss:.4f}, was after "
                    f"epoch {kept.epoch}, whose weights are kept"
                )

        def before_step(iteration: int) -> None:  # other masks in every process
            turn()
            seed_generators(derive(settings.seed, "dropout", part, group.rank, iteration))

        each = len(self.train_examples) / batches.per_epoch

        def after_step(iteration: int, state: Callable[[], TrainState]) -> None:
            if not ended and iteration < plan.iterations:  # then the epoch's end is told
                self.show(part, round(iteration * each), round(plan.iterations * each))
            if store and (ended or iteration == plan.iterations or store.due):
                store.save_state(name, state(), ledger.record())

        with self.ledger.forked() as ledger, restored_generators():
            resume, record = group.from_first(lambda: store.load_state(name) if store else None) or (None, None)
            if record:
                ledger.resume(part, record)
            with ledger.entry(part, self.device), tf32(settings.precision == "tf32"):
                fitted = fit(
                    self._synchronised or self.weights,
                    self.task,
                    group.broadcast_(vertices),
                    {key: group.broadcast_(buffer.to(self.device)) for key, buffer in buffers.items()},
                    batches,
                    partial(optimisers.make, settings, self.weights),
                    plan,
                    losses=training_loss(settings, self.dataset, self.device),
                    stream=(settings.seed, part),
                    clip=settings.clip,
                    precision=settings.dtype,
                    accumulate=settings.accumulate,
                    held_out=self._held_out_batches if held_out else None,
                    on_epoch=on_epoch,
                    before_step=before_step,
                    after_step=after_step,
                    resume=resume,
                    group=group,
                    graph=CudaGraph if self.captures else None,
                    say=self.say,
                )
            # Each process has summed the same numbers, in an order of its own.
            for tensor in (fitted.vertices, *fitted.buffers.values()):
                group.broadcast_(tensor)
            return fitted


def _synchronised(weights: FlatWeights) -> FlatWeights:
    """The same weights and buffers in a network whose BatchNorm layers normalise over the images of all processes.

    Only training takes it: where one process measures alone, such layers would wait for the others.
    """
    module = weights.module
    kept = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    twin = copy.copy(weights)
    twin.module = SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module, kept))  # type: ignore[no-untyped-call]
    return twin


def _check_shares(batches: Batches, samples: int, parts: int, processes: int) -> None:
    """Synchronised BatchNorm waits for every process: none may be without images."""
    shares = [ALONE.shares(size, samples, parts) for size in set(batches.sizes())]
    least = min(chain.from_iterable(chain.from_iterable(shares)))
    if least < processes:
        raise UsageError(
            f"synchronised BatchNorm needs an image for every process and point in every batch: of "
            f"{len(batches.examples)} images in batches of {batches.size}, a part has {least} for {processes} "
            "processes: choose another --batch-size"
        )
