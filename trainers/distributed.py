"""Several processes that train one network together, data parallel: as torchrun starts them, one for each GPU.

Every process draws the same batches, points and masks' seeds, takes its own share of each batch, and adds its gradient
to the others' in one all-reduce a step (``trainers/loop.py``). What one alone should do, measuring and writing, the
first does. Nothing else of ``torch.distributed`` is used.
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

__all__ = ["ALONE", "Group", "joined", "launched"]

T = TypeVar("T")

_STEP = timedelta(minutes=10)  # all are at the same step: no compiling network and no checkpoint takes longer
_MEASURING = timedelta(days=1)  # the first one measures and writes while the others wait
_COMMON = timedelta(seconds=10)  # what all of them raise, they raise nearly at once


@dataclass(frozen=True)
class Group:
    """The processes that train together. Without others, every method is free.

    Attributes:
        rank: this process's number, 0 to size - 1; the first one, 0, measures and writes.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1
    _objects: Any = field(default=None, repr=False)  # the process group that objects travel by

    @property
    def first(self) -> bool:
        """Whether this is the process that measures and writes."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """This process's places in a batch: every ``size``-th, from ``rank`` on."""
        return slice(self.rank, None, self.size)

    def shares(self, whole: int, samples: int) -> list[int]:
        """How many of this process's images each sampled point gets; they lie in order.

        The points share the whole batch of ``whole`` images as ``Tensor.chunk(samples)`` does, so that each gets the
        images that it would get in a single process.
        """
        length = -(-whole // samples)
        below = [len(range(self.rank, min(end, whole), self.size)) for end in range(0, whole + length, length)]
        return [after - before for before, after in pairwise(below)]

    def sum_(self, tensor: Tensor) -> None:
        """Add up all processes' tensors, in place; the same bits come to each."""
        if self.size > 1:
            with _answered():
                dist.all_reduce(tensor)

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Give the first process's tensor to all, in place."""
        if self.size > 1:
            with _answered():
                dist.broadcast(tensor, src=0)
        return tensor

    def from_first(self, function: Callable[[], T]) -> T:
        """What ``function`` returns, or the error of ours that it raises: the first process calls it, all get it.

        Tensors travel on the CPU: none in the result may be elsewhere.
        """
        if self.size == 1:
            return function()
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = function()
            except EnsemblerError as error:
                answer[1] = error
        with _answered():
            dist.broadcast_object_list(answer, src=0, group=self._objects)
        if answer[1] is not None:
            raise answer[1]
        found: T = answer[0]
        return found

    def after_first(self, function: Callable[[], T]) -> T:
        """Call ``function`` in every process, in the first one before the others: what it fetches is there for them."""
        found: list[T] = []
        self.from_first(lambda: found.append(function()))
        return found[0] if found else function()


ALONE = Group()


def launched() -> bool:
    """Whether torchrun, or a launcher that sets the same variables for several processes, has started this one."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined(device: str | None = None) -> Iterator[Group]:
    """Join the processes that were started together with this one, for as long as the block runs.

    Each takes the GPU of its LOCAL_RANK, and they talk by NCCL; on CPUs by gloo. When the block ends with an error,
    the first process raises it; the others say what is theirs alone, in a line with their rank, and end.

    Args:
        device: ``"cuda"`` or ``"cpu"``; by default CUDA where there is one.

    Raises:
        UsageError: the environment does not say where the others are, or there are too few GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    try:
        store, rank, size = next(rendezvous("env://", timeout=_STEP))
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the other processes cannot be found ({error}): start them "
            "by torchrun, or unset WORLD_SIZE"
        ) from error
    with _answered():
        store = _unused(store, rank, size)
    try:
        own = _own_device(device)
        nccl = own.type == "cuda" and dist.is_nccl_available()
        with _answered():
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
    except EnsemblerError as error:  # the process group is left to the end of the process: the others may wait in it
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


def _unused(store: Any, rank: int, size: int) -> Any:
    """A part of torchrun's store that no earlier start has written to.

    torchrun keeps its store over restarts, and with it the addresses of processes that are gone, to which the new ones
    would try to connect (pytorch issue 135712). Nor do all machines count the restarts alike. So the first process
    names the part, and tells each other one that asks, until as many as there are have heard it.
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
            if store.check([f"ensembler {other}"]):  # by a process that may be gone: the new one asks, too
                store.set(store.get(f"ensembler {other}").decode(), own)
        if time.monotonic() > deadline:
            raise RuntimeError(f"{size} processes were expected")
        time.sleep(0.05)
    return dist.PrefixStore(own, store)  # type: ignore[attr-defined]


def _own_device(name: str | None) -> torch.device:
    """This process's device, made the current one if it is a GPU, so that "cuda" means it from here on."""
    if torch.cuda.is_available() and (name or "cuda").startswith("cuda"):
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if name not in (None, "cuda"):
            raise UsageError(f"each process takes a GPU of its own: give --device cuda, not {name}")
        if local >= count:
            raise UsageError(f"there are {count} GPUs, fewer than processes: start {count} (--nproc-per-node {count})")
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    device = choose_device(name)
    if device.type != "cpu":
        raise UsageError(f"several processes train together on CUDA or on the CPU, not on {device.type}")
    return device


def _first_says(store: Any, message: str) -> bool:
    """Whether the first process has failed with the same words, or does within seconds.

    Returns once it has said them: torchrun ends all processes as soon as one has failed, and the first one may be slow.
    """
    try:
        store.wait(["error"], _COMMON)
        if store.get("error").decode() != message:
            return False
    except RuntimeError:  # it has not failed, or the store has gone with it
        return False
    with suppress(RuntimeError):  # gone, so it has ended
        store.wait(["said"], _COMMON)
    return True


@contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise GroupError(
            "another process of this training has ended, or has not answered in time: what it said itself, or "
            "torchrun below, tells why"
        ) from error
