"""Reading and augmenting image files ahead of time, in the worker processes of a DataLoader."""

from __future__ import annotations

import os
import pickle
from collections.abc import Generator, Iterator
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.context import BaseContext
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ensembler.errors import EnsemblerError, UsageError
from ensembler.machine import available_cpus
from ensembler.naming import given, reason, remember

if TYPE_CHECKING:
    from ensembler.data.images import FileSplit

__all__ = ["read_ahead"]

_WORKERS = 8

_Key = tuple[list[Path], NDArray[np.int64], NDArray[np.int64]]  # files, their labels, and their augmentation's choices


def read_ahead(
    split: FileSplit,
    keys: Iterator[tuple[Tensor, Tensor]],
    augmentation: str,
    device: torch.device,
    workers: int | None = None,
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Yield batches of images (B, H, W, 3) and labels (B,) on ``device``, in the order of their keys.

    Args:
        split: the files.
        keys: for each batch, the indices (B,) of its images, and their choices of :func:`images.draw`.
        augmentation: see :func:`images.read_images`.
        device: where the batches go; to a GPU through pinned memory.
        workers: worker processes; 0 reads in this process. By default one per CPU that this process may use, divided
            by the number of processes that torchrun started on this machine; at most 8.

    Raises:
        DataError: an image cannot be read. UsageError: a worker process died, or cannot be sent the augmentation, or
            that fails.
    """
    if workers is None:
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        workers = max(1, min(available_cpus() // sharing, _WORKERS))
    reader = _Reader(split.shape, augmentation, threads=1 if workers else None)
    if workers:
        _check_sent(reader, augmentation)
    loader = DataLoader(
        reader,
        batch_size=None,  # a key is a whole batch
        sampler=_worker_keys(split, keys),
        num_workers=workers,
        multiprocessing_context=_context() if workers else None,
        worker_init_fn=_end_with_parent,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # by default it draws from torch's global generator
    )
    batches = iter(loader)
    try:
        while True:
            images, labels = _next(batches, workers)
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    finally:
        # Workers end when ``batches`` is freed, but a traceback may keep it alive.
        getattr(batches, "_shutdown_workers", lambda: None)()


def _check_sent(reader: _Reader, augmentation: str) -> None:
    try:
        pickle.dumps(reader)
    except Exception as error:  # whatever an object that cannot be pickled raises
        raise UsageError(
            f"the augmentation {augmentation} cannot be sent to the processes that read images ({reason(error)}): "
            "define it at the top of a module, or use --workers 0"
        ) from error


def _worker_keys(split: FileSplit, keys: Iterator[tuple[Tensor, Tensor]]) -> Iterator[_Key]:
    for index, choices in keys:
        part = split.part(index)
        yield part.paths, part.labels.numpy(), choices.numpy()


def _next(batches: Iterator[Any], workers: int) -> tuple[Tensor, Tensor]:
    try:
        batch: tuple[Tensor, Tensor] | EnsemblerError = next(batches)
    except (RuntimeError, OSError, EOFError) as error:
        if not workers or str(error).startswith("Caught"):  # raised by the reader, not by a lost worker
            raise
        raise UsageError(
            f"a process that reads images died ({error}): use fewer --workers, or 0. In a script of your own, train "
            'under if __name__ == "__main__": because each of these processes imports it'
        ) from error
    if isinstance(batch, EnsemblerError):
        raise batch
    return batch


class _Reader(Dataset[Any]):
    """A dataset indexed by keys that name their files, so that no worker needs the list of all files."""

    def __init__(self, shape: tuple[int, int], augmentation: str, threads: int | None) -> None:
        self._shape, self._augmentation, self._threads = shape, augmentation, threads
        self._transform = given(augmentation)

    def __getitem__(self, key: _Key) -> tuple[Tensor, Tensor] | EnsemblerError:
        from ensembler.data.decoding import MEND_OR_SKIP
        from ensembler.data.images import read_images

        files, labels, choices = key
        if self._transform is not None:
            remember(self._augmentation, self._transform)
        try:
            images = read_images(
                files,
                self._shape,
                self._augmentation,
                torch.from_numpy(choices),
                threads=self._threads,
                mend=MEND_OR_SKIP,
            )
        except EnsemblerError as error:
            return error  # the loader would turn a raised error into a traceback
        return images, torch.from_numpy(labels)


def _context() -> BaseContext:
    """Return how to start workers: from a clean server process, as a fork of this one could inherit OpenMP's locks."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["ensembler.data.images", "torchvision.transforms.v2"])
    return context


def _end_with_parent(worker: int) -> None:
    """End a worker when the training process is killed: torch's own watchdog watches the server process instead."""
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=watch, daemon=True).start()
