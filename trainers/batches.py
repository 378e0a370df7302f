"""Batches of examples for the loop: shuffled, augmented and normalised, on the network's device."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from ensembler.errors import UsageError
from ensembler.examples import Examples
from ensembler.seeds import generator
from ensembler.trainers.distributed import ALONE, Group

__all__ = ["Batch", "Batches"]


@dataclass(frozen=True)
class Batch:
    """This process's share of one batch.

    Attributes:
        x: inputs (b, ...) as the network sees them.
        y: targets (b,).
        size: examples in the whole batch, those of other processes included.
    """

    x: Tensor
    y: Tensor
    size: int


@dataclass(frozen=True, eq=False)
class Batches:
    """The batches of one part of a training: shuffled anew each epoch, augmented and normalised.

    Every epoch holds every example once; its last batch may be smaller. The order and the augmentation of an epoch are
    a function of the seed, the part and the epoch, drawn at once, so that a stream can begin anywhere. The examples
    make their batches themselves (:meth:`ensembler.examples.Examples.stream`), in memory or from files.

    Processes that train together draw the same batches; of each, every one takes its own share, which may be empty.

    Args:
        examples: what to train on; in memory, on the network's device.
        size: B, examples a batch, all processes together.
        augmentation: one of ``examples.augmentations``.
        mean, std: of the normalisation.
        stream: the seed, and the name of what is drawn.
        device: the network's.
        workers: processes that read files; see :func:`ensembler.loading.read_ahead`.
        group: the processes that train together.
    """

    examples: Examples
    size: int
    augmentation: str
    mean: Sequence[float]
    std: Sequence[float]
    stream: tuple[int, *tuple[str | int, ...]]
    device: torch.device
    workers: int | None = None
    group: Group = ALONE

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"the batch size must be at least 1, not {self.size}")

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.examples) // self.size)

    def sizes(self) -> list[int]:
        """How many examples each batch of an epoch has."""
        return [min(self.size, len(self.examples) - start) for start in range(0, len(self.examples), self.size)]

    def begin(self, step: int = 0) -> Generator[Batch, None, None]:
        """The batches without end, after the first ``step`` of them. Closing it ends its processes."""
        prepare, sizes = self.examples.inputs(self.mean, self.std, self.device), self.sizes()
        made = self.examples.stream(self._epochs(step), self._cut, self.augmentation, self.device, self.workers)
        with closing(made):
            for number, batch in enumerate(made, start=step):
                yield Batch(prepare(batch.data), batch.labels, sizes[number % len(sizes)])

    def _epochs(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Each epoch's order (N,), and how each of its examples is varied (N, ...); the first without past steps."""
        done = step % self.per_epoch * self.size
        for epoch in count(step // self.per_epoch):
            stream = generator(*self.stream, epoch)
            order = torch.randperm(len(self.examples), generator=stream)
            choices = self.examples.draw(self.augmentation, len(order), stream)
            yield order[done:], choices[done:]
            done = 0

    def _cut(self, order: Tensor, choices: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of each batch of an epoch."""
        for index, chosen in zip(torch.split(order, self.size), torch.split(choices, self.size), strict=True):
            yield index[self.group.share], chosen[self.group.share]
