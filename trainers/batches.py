"""Batches of examples for the loop: shuffled, augmented and normalised, on the network's device."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from itertools import cycle
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

from ensembler.errors import DataError, UsageError
from ensembler.images import FileSplit, Images, Split, draw, normalise, read_images
from ensembler.trainers.distributed import ALONE, Group

__all__ = ["Batches"]

_WORKERS = 8


class Batches(Iterator[tuple[Tensor, Tensor]]):
    """An endless, seeded stream of shuffled, augmented and normalised batches.

    Every epoch holds every example once; its last batch may be smaller. Which images a batch holds, and how each is
    varied, is drawn in this process, in order. What is left to do is no longer random: images in memory are varied as
    whole batches, on the device they lie on; files are read and varied ahead of their turn by the processes of a
    :class:`torch.utils.data.DataLoader`, as many as one likes. Either way the batches are the same, but for
    ``"resized-crop-flip"``, which crops a file's image at its full size.

    Processes that train together draw the same batches; of each, every one makes its own share, which may be empty.

    Args:
        split: the training images.
        size: B, images a batch, all processes together.
        augmentation: see :func:`ensembler.images.augment`.
        mean, std: of the normalisation.
        generator: a CPU generator; the only source of randomness.
        device: where batches of files are brought to; by default the CPU.
        workers: processes that read files; 0 for none but this one; by default one for each CPU that this process may
            use, 8 at most, or its part of them where several train on one machine.
        group: the processes that train together.

    Attributes:
        per_epoch: batches in an epoch.
        whole: images in the batch that was taken last, the other processes' included.
    """

    def __init__(
        self,
        split: Images,
        size: int,
        augmentation: str,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        generator: torch.Generator,
        device: torch.device | str = "cpu",
        workers: int | None = None,
        group: Group = ALONE,
    ) -> None:
        if size < 1:
            raise UsageError(f"the batch size must be at least 1, not {size}")
        workers = max(1, min(_cpus() // group.here, _WORKERS)) if workers is None else workers
        self.per_epoch, self.whole = -(-len(split) // size), 0
        self._sizes = cycle(min(size, len(split) - start) for start in range(0, len(split), size))
        self._mean, self._std = mean, std
        self._drawn = _draw(len(split), size, augmentation, generator, group.share)
        if isinstance(split, Split):
            self._made = _in_memory(split, augmentation, self._drawn)
        else:
            self._made = _from_files(split, augmentation, self._drawn, torch.device(device), workers)
        self._begun = False

    def __next__(self) -> tuple[Tensor, Tensor]:
        self._begun = True
        batch = next(self._made)
        self.whole = next(self._sizes)
        return normalise(batch.images, self._mean, self._std), batch.labels

    def skip(self, batches: int) -> None:
        """Pass over so many batches. Before the first one is taken, none is made for it."""
        for _ in range(batches):
            next(self._made if self._begun else self._drawn)
            next(self._sizes)

    def close(self) -> None:
        """End the processes, if there are any, and the stream. They end with this object, too."""
        self._made.close()


def _draw(
    count: int, size: int, augmentation: str, generator: torch.Generator, share: slice
) -> Iterator[tuple[Tensor, Tensor]]:
    """For every batch, without end: the indices of a share of its B images, and how each is varied."""
    while True:
        for index in torch.split(torch.randperm(count, generator=generator), size):
            choices = draw(augmentation, len(index), generator)
            yield index[share], choices[share]


def _in_memory(split: Split, augmentation: str, drawn: Iterator[tuple[Tensor, Tensor]]) -> Generator[Split, None, None]:
    for index, choices in drawn:
        yield split.augmented(index, augmentation, choices)


def _from_files(
    split: FileSplit,
    augmentation: str,
    drawn: Iterator[tuple[Tensor, Tensor]],
    device: torch.device,
    workers: int,
) -> Generator[Split, None, None]:
    loader = DataLoader(
        _Reader(split.shape, augmentation, threads=1 if workers else None),
        batch_size=None,  # a key is a whole batch
        sampler=_keys(split, drawn),
        num_workers=workers,
        multiprocessing_context=_context() if workers else None,
        worker_init_fn=_end_with_parent,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # or else it draws from torch's global numbers
    )
    batches = iter(loader)
    try:
        while True:
            try:
                found = next(batches)
            except (RuntimeError, OSError, EOFError) as error:
                if not workers or str(error).startswith("Caught"):  # raised by what was to be done
                    raise
                raise UsageError(
                    f"the processes that read images have died ({error}): use fewer, or --workers 0. "
                    'A script of yours must train under if __name__ == "__main__":, for each of them imports it'
                ) from error
            if isinstance(found, DataError):
                raise found
            images, labels = (part.to(device, non_blocking=True) for part in found)
            yield Split(images, labels)
    finally:
        # They end with ``batches``, but a traceback may keep that for long.
        getattr(batches, "_shutdown_workers", lambda: None)()


_Key = tuple[list[Path], NDArray[np.int64], NDArray[np.int64]]  # files, their labels, and how they are varied


def _keys(split: FileSplit, drawn: Iterator[tuple[Tensor, Tensor]]) -> Iterator[_Key]:
    for index, choices in drawn:
        part = split.part(index)
        yield part.paths, part.labels.numpy(), choices.numpy()


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
