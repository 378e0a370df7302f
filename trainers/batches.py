"""Batches for the training loop: shuffled, augmented and normalised, on the network's device."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from ensembler.data.examples import Examples
from ensembler.errors import UsageError
from ensembler.seeds import derive, generator
from ensembler.trainers.distributed import ALONE, Group
from ensembler.trainers.mixing import Drawn, Mixing

__all__ = ["Batch", "Batches", "batch_sizes"]


@dataclass(frozen=True)
class Batch:
    """This process's share of one batch.

    Attributes:
        x: inputs (b, ...) of the network.
        y: targets (b,).
        size: examples in the whole batch, including those of other processes.
        other_y: where examples are mixed, the targets (b,) of those that were mixed into ``x``.
        share: the share of ``y`` in the loss then, a scalar.
    """

    x: Tensor
    y: Tensor
    size: int
    other_y: Tensor | None = None
    share: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Batches:
    """The batches of one part of a training: shuffled every epoch, augmented and normalised.

    Every epoch has every example once. Its last batch may be smaller; a single last example joins the batch before it,
    because BatchNorm cannot normalise one alone. An epoch's order and augmentation depend only on the seed, the part
    and the epoch, and are drawn at once, so that a stream can start at any step. The examples make the batches
    (:meth:`ensembler.data.examples.Examples.stream`), in memory or from files.

    Processes that train together draw the same batches, and each takes its share of every batch, which may be empty.

    Args:
        examples: the training examples; if in memory, on the network's device.
        size: B, examples per batch, over all processes.
        augmentation: one of ``examples.augmentations``.
        mean, std: of the normalisation.
        stream: the seed, and the name of the random stream.
        device: the network's device.
        workers: processes that read files; see :func:`ensembler.data.loading.read_ahead`.
        group: the processes that train together.
        mixing: how the examples of a batch are mixed, if they are.
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
    mixing: Mixing | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"the batch size must be at least 1, not {self.size}")

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        return len(self.sizes())

    def sizes(self) -> list[int]:
        """Compute the number of examples in each batch of an epoch."""
        return batch_sizes(len(self.examples), self.size)

    def begin(self, step: int = 0) -> Generator[Batch, None, None]:
        """Yield batches without end, starting after ``step`` of them. Closing the generator ends worker processes."""
        prepare, sizes = self.examples.inputs(self.mean, self.std, self.device), self.sizes()
        batches = self.examples.stream(self._epochs(step), self._cut, self.augmentation, self.device, self.workers)
        with closing(batches):
            drawn: Drawn | None = None
            for number, batch in enumerate(batches, start=step):
                epoch, n = divmod(number, len(sizes))
                x, y = prepare(batch.data), batch.labels
                if not self.mixing:
                    yield Batch(x, y, sizes[n])
                    continue
                if drawn is None or n == 0:
                    drawn = self.mixing.draw(sizes, self.examples.example_shape, derive(*self.stream, "mixing", epoch))
                    drawn = drawn.to(self.device)
                chosen = drawn.partners[n][self.group.share]
                others = prepare(self.group.gather(batch.data, sizes[n])[chosen])
                other_y = self.group.gather(y, sizes[n])[chosen]
                yield Batch(drawn.mix(n, x, others), y, sizes[n], other_y, drawn.shares[n])

    def _epochs(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each epoch's order (N,) and augmentation choices (N, ...); the first without the past steps'."""
        done = step % self.per_epoch * self.size
        for epoch in count(step // self.per_epoch):
            stream = generator(*self.stream, epoch)
            order = torch.randperm(len(self.examples), generator=stream)
            choices = self.examples.draw(self.augmentation, len(order), stream)
            yield order[done:], choices[done:]
            done = 0

    def _cut(self, order: Tensor, choices: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Split an epoch into batches, and yield this process's share of each."""
        sizes = batch_sizes(len(order), self.size)
        for index, chosen in zip(torch.split(order, sizes), torch.split(choices, sizes), strict=True):
            yield index[self.group.share], chosen[self.group.share]


def batch_sizes(count: int, size: int) -> list[int]:
    """Compute the number of examples in each batch of an epoch's last ``count`` examples."""
    full, rest = divmod(count, size)
    sizes = [size] * full
    if full and rest == 1:
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return sizes
