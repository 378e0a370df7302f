"""Batches of examples for the loop: shuffled, augmented and normalised, on the network's device."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.context import BaseContext
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ensembler.device import upload
from ensembler.errors import DataError, UsageError
from ensembler.examples import Examples, InMemory
from ensembler.images import FileSplit, Split, read_images
from ensembler.seeds import generator
from ensembler.trainers.distributed import ALONE, Group

__all__ = ["Batch", "Batches"]

_WORKERS = 8


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
    a function of the seed, the part and the epoch, drawn at once and brought to the device at once, so that no step
    waits for the host and a stream can begin anywhere. Examples in memory are varied as whole batches, on the device;
    files are read and varied ahead of their turn by the processes of a :class:`torch.utils.data.DataLoader`. Either
    way the batches are the same, but for ``"resized-crop-flip"``, which crops a file's image at its full size.

    Processes that train together draw the same batches; of each, every one takes its own share, which may be empty.

    Args:
        examples: what to train on; in memory, on the network's device.
        size: B, examples a batch, all processes together.
        augmentation: one of ``examples.augmentations``.
        mean, std: of the normalisation.
        stream: the seed, and the name of what is drawn.
        device: the network's.
        workers: processes that read files; 0 for none but this one; by default one for each CPU that this process may
            use, 8 at most, or its part of them where several train on one machine.
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
        prepare = self.examples.inputs(self.mean, self.std, self.device)
        sizes = self.sizes()
        made = self._from_files(step) if isinstance(self.examples, FileSplit) else self._in_memory(step)
        with closing(made):
            for number, batch in enumerate(made, start=step):
                yield Batch(prepare(batch.data), batch.labels, sizes[number % len(sizes)])

    def _drawn(self, epoch: int) -> tuple[Tensor, Tensor]:
        """An epoch's order (N,), and how each of its examples is varied (N, ...); on the CPU."""
        stream = generator(*self.stream, epoch)
        order = torch.randperm(len(self.examples), generator=stream)
        return order, self.examples.draw(self.augmentation, len(order), stream)

    def _shares(self, order: Tensor, choices: Tensor, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        for index, chosen in list(zip(torch.split(order, self.size), torch.split(choices, self.size), strict=True))[
            first:
        ]:
            yield index[self.group.share], chosen[self.group.share]

    def _in_memory(self, step: int) -> Generator[InMemory, None, None]:
        first = step % self.per_epoch
        place = torch.device("cpu") if self.augmentation == "resized-crop-flip" else self.device
        for epoch in count(step // self.per_epoch):
            order, choices = self._drawn(epoch)
            for index, chosen in self._shares(upload(order, self.device), upload(choices, place), first):
                yield self.examples.augmented(index, self.augmentation, chosen)
            first = 0

    def _keys(self, files: FileSplit, step: int) -> Iterator[_Key]:
        first = step % self.per_epoch
        for epoch in count(step // self.per_epoch):
            for index, choices in self._shares(*self._drawn(epoch), first):
                part = files.part(index)
                yield part.paths, part.labels.numpy(), choices.numpy()
            first = 0

    def _from_files(self, step: int) -> Generator[Split, None, None]:
        files = self.examples
        assert isinstance(files, FileSplit)  # noqa: S101  for the type checker
        workers = max(1, min(_cpus() // self.group.here, _WORKERS)) if self.workers is None else self.workers
        loader = DataLoader(
            _Reader(files.shape, self.augmentation, threads=1 if workers else None),
            batch_size=None,  # a key is a whole batch
            sampler=self._keys(files, step),
            num_workers=workers,
            multiprocessing_context=_context() if workers else None,
            worker_init_fn=_end_with_parent,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or else it draws from torch's global numbers
        )
        batches = iter(loader)
        try:
            while True:
                images, labels = (part.to(self.device, non_blocking=True) for part in _next(batches, workers))
                yield Split(images, labels)
        finally:
            # They end with ``batches``, but a traceback may keep that for long.
            getattr(batches, "_shutdown_workers", lambda: None)()


_Key = tuple[list[Path], NDArray[np.int64], NDArray[np.int64]]  # files, their labels, and how they are varied


def _next(batches: Iterator[Any], workers: int) -> tuple[Tensor, Tensor]:
    try:
        found: tuple[Tensor, Tensor] | DataError = next(batches)
    except (RuntimeError, OSError, EOFError) as error:
        if not workers or str(error).startswith("Caught"):  # raised by what was to be done
            raise
        raise UsageError(
            f"the processes that read images have died ({error}): use fewer, or --workers 0. "
            'A script of yours must train under if __name__ == "__main__":, for each of them imports it'
        ) from error
    if isinstance(found, DataError):
        raise found
    return found


class _Reader(Dataset[Any]):
    """What a worker process holds: a key tells it all the rest, so that it needs no list of all the files."""

    def __init__(self, shape: tuple[int, int], augmentation: str, threads: int | None) -> None:
        self._shape, self._augmentation, self._threads = shape, augmentation, threads

    def __getitem__(self, key: _Key) -> tuple[Tensor, Tensor] | DataError:
        files, labels, choices = key
        try:
            images = read_images(
                files, self._shape, self._augmentation, torch.from_numpy(choices), threads=self._threads
            )
        except DataError as error:
            return error  # raised, it would come out as a traceback of the loader's
        return images, torch.from_numpy(labels)


def _context() -> BaseContext:
    """How workers are started: from a clean server process, since a fork of this one could inherit OpenMP's locks."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["ensembler.images", "torchvision.transforms.v2"])
    return context


def _end_with_parent(worker: int) -> None:
    """Let a worker end when the process that trains is killed: torch's own watchdog looks at the server process."""
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=watch, daemon=True).start()


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
