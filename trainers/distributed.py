"""Data-parallel training of one network by several processes, as torchrun starts them, one per GPU.

Every process draws the same batches, points and seeds of dropout masks, takes its share of each batch, and the
gradients are summed in one all-reduce per step (``trainers/loop.py``). Only the first process measures and writes.
Nothing else of ``torch.distributed`` is used.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
import typer
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from ensembler.device import choose_device
from ensembler.errors import EnsemblerError, GroupError, UsageError

__all__ = ["ALONE", "Group", "join_group"]

T = TypeVar("T")

_STEP = timedelta(minutes=10)  # longest step; compiling the network or writing a checkpoint takes less
_MEASURING = timedelta(days=1)  # longest time that the others wait while the first one measures or writes
_COMMON = timedelta(seconds=10)  # within which all processes raise an error that they have in common


@dataclass(frozen=True)
class Group:
    """The processes that train together. In a group of one, no method communicates.

    Attributes:
        rank: this process's number, 0 to size - 1; the first one, 0, measures and writes.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1
    _objects: Any = field(default=None, repr=False)  # the process group for objects

    @property
    def first(self) -> bool:
        """Whether this is the process that measures and writes."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """This process's examples in a batch: every ``size``-th, starting at ``rank``."""
        return slice(self.rank, None, self.size)

    def shares(self, whole: int, samples: int, parts: int = 1) -> list[list[int]]:
        """Compute how many of this process's examples each part of each sampled point gets, in order.

        The whole batch of ``whole`` examples is split among the points as evenly as possible, so that each point gets
        the examples that it would get in a single process; and a point's among ``parts`` parts. If the batch has fewer
        than two examples for each, there are fewer points or parts: BatchNorm cannot normalise a single example.
        """
        points = min(samples, max(1, whole // 2))
        parts = max(1, min(parts, whole // points // 2))
        found = []
        for begin, end in pairwise(_bounds(whole, points)):
            below = [len(range(self.rank, begin + bound, self.size)) for bound in _bounds(end - begin, parts)]
            found.append([after - before for before, after in pairwise(below)])
        return found

    def sum_(self, tensor: Tensor) -> None:
        """Sum all processes' tensors, in place; every process gets the same bits."""
        if self.size > 1:
            with _group_errors():
                dist.all_reduce(tensor)

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Copy the first process's tensor to all processes, in place."""
        if self.size > 1:
            with _group_errors():
                dist.broadcast(tensor, src=0)
        return tensor

    def gather(self, share: Tensor, whole: int) -> Tensor:
        """Return the whole batch (``whole``, ...) of which each process has its :attr:`share`, on its device."""
        if self.size == 1:
            return share
        rows = share[:, None].flatten(1).contiguous().view(torch.uint8)  # of any type, which NCCL need not know
        padded = rows.new_zeros(-(-whole // self.size), rows.shape[1])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with _group_errors():
            dist.all_gather(parts, padded)
        gathered = torch.stack(parts, dim=1).flatten(0, 1)[:whole]
        return gathered.view(share.dtype).view(whole, *share.shape[1:])

    def from_first(self, function: Callable[[], T]) -> T:
        """Call ``function`` in the first process, and return its result, or raise its EnsemblerError, in all.

        Tensors in the result must be on the CPU.
        """
        if self.size == 1:
            return function()
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = function()
            except EnsemblerError as error:
                answer[1] = error
        with _group_errors():
            dist.broadcast_object_list(answer, src=0, group=self._objects)
        if answer[1] is not None:
            raise answer[1]
        result: T = answer[0]
        return result

    def after_first(self, function: Callable[[], T]) -> T:
        """Call ``function`` in the first process, then in the others, so that only the first one downloads."""
        results: list[T] = []
        self.from_first(lambda: results.append(function()))
        return results[0] if results else function()


ALONE = Group()


def _bounds(count: int, parts: int) -> list[int]:
    """Return the parts + 1 bounds of as even parts of so many examples as there are, from 0 to ``count``."""
    least, more = divmod(count, parts)
    return [least * part + min(part, more) for part in range(parts + 1)]


@contextmanager
def join_group(device: str | None = None) -> Iterator[Group]:
    """Join the group of processes that were started together with this one, for the duration of the block.

    Each process takes the GPU of its LOCAL_RANK and communicates by NCCL, or by gloo on CPUs. If the block raises, the
    first process raises the error; the others print an error that only they have, on a line with their rank, and exit.

    Args:
        device: ``"cuda"`` or ``"cpu"``; by default CUDA if available.

    Raises:
        UsageError: the environment does not say how to reach the other processes, or there are too few GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    try:
        store, rank, size = next(rendezvous("env://", timeout=_STEP))
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the other processes cannot be found ({error}): start them "
            "with torchrun, or unset WORLD_SIZE"
        ) from error
    with _group_errors():
        store = _fresh_store(store, rank, size)
    try:
        own = _own_device(device)
        nccl = own.type == "cuda" and dist.is_nccl_available()
        with _group_errors():
            dist.init_process_group(
                "nccl" if nccl else "gloo",
                store=store,
                rank=rank,
                world_size=size,
                timeout=_STEP,
                device_id=own if nccl else None,
            )
            objects = dist.new_group(backend="gloo", timeout=_MEASURING)
        yield Group(rank, size, objects)
    except EnsemblerError as error:  # without destroying the process group, in which the others may be waiting
        lost = isinstance(error, GroupError)
        if rank == 0:
            if not lost:
                store.set("error", str(error))
                atexit.register(store.set, "said", "")
            raise
        if not lost and not _first_says(store, str(error)):
            typer.echo(f"rank {rank}: error: {error}", err=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        if rank == 0:
            raise
        raise SystemExit(130) from None
    else:
        dist.destroy_process_group()


def _fresh_store(store: Any, rank: int, size: int) -> Any:
    """Return a part of torchrun's store that no earlier start has written to.

    torchrun keeps its store across restarts, with the addresses of processes that have ended, to which the new ones
    would try to connect (pytorch issue 135712). The machines need not agree on the number of restarts. So the first
    process chooses the part's name, and sends it to each other process that asks, until all have it.
    """
    own = uuid4().hex
    if rank:
        store.set(f"ensembler {rank}", own)
        name = store.get(own).decode()
        store.add(name, 1)
        return dist.PrefixStore(name, store)  # type: ignore[attr-defined]
    deadline = time.monotonic() + _STEP.total_seconds()
    while store.add(own, 0) < size - 1:
        for other in range(1, size):
            if store.check([f"ensembler {other}"]):  # perhaps from an ended process; the new one asks, too
                store.set(store.get(f"ensembler {other}").decode(), own)
        if time.monotonic() > deadline:
            raise RuntimeError(f"{size} processes were expected")
        time.sleep(0.05)
    return dist.PrefixStore(own, store)  # type: ignore[attr-defined]


def _own_device(name: str | None) -> torch.device:
    """Return this process's device; a GPU becomes the current one, so that "cuda" refers to it."""
    if torch.cuda.is_available() and (name or "cuda").startswith("cuda"):
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if name not in (None, "cuda"):
            raise UsageError(f"each process takes its own GPU: give --device cuda, not {name}")
        if local >= count:
            raise UsageError(f"there are more processes than GPUs: start {count} (--nproc-per-node {count})")
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    device = choose_device(name)
    if device.type != "cpu":
        raise UsageError(f"distributed training needs CUDA or the CPU, not {device.type}")
    return device


def _first_says(store: Any, message: str) -> bool:
    """Return whether the first process failed with the same message, or does so within seconds.

    Waits until it has printed the message, because torchrun ends all processes as soon as one has failed.
    """
    try:
        store.wait(["error"], _COMMON)
        if store.get("error").decode() != message:
            return False
    except RuntimeError:  # it has not failed, or the store ended with it
        return False
    with suppress(RuntimeError):  # the store ended with it
        store.wait(["said"], _COMMON)
    return True


@contextmanager
def _group_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise GroupError(
            "another process of this training has ended, or did not answer in time: see its own output, or that of "
            "torchrun below"
        ) from error
