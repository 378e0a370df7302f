"""Independent jobs at once in one process, which take turns on the host: several small networks on one GPU.

A small network leaves most of a GPU idle, and a captured step costs the host microseconds. So each job has a thread, a
network and a CUDA stream of its own, and after each step the next job has its turn. One thread works at a time: each
job does what it would do alone, in the same order, and only the GPU works for several at once.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass

from ensembler.device import Room, restored_generators
from ensembler.engine import A, Emit, Engine, R, S
from ensembler.errors import UsageError

__all__ = ["SideBySide", "own_time", "turn"]

_WARM_UP = 8  # turns that the first job is ahead of the others: by then it has all the memory that it will need

_thread = threading.local()


def turn() -> None:
    """Let the other jobs have their turns; does nothing where there are no others."""
    if turns := getattr(_thread, "turns", None):
        turns.next()


def own_time() -> float:
    """Seconds of :func:`time.monotonic`, less those in which this thread waited for its turn."""
    return time.monotonic() - getattr(_thread, "waited", 0.0)


@dataclass(frozen=True)
class SideBySide(Engine):
    """Runs up to ``count`` jobs at once, each with its own copy of what they share (:func:`copy.copy`).

    Attributes:
        count: jobs at once, 2 or more.
        room: measures how many fit into the device's memory.
    """

    count: int
    room: Callable[[], Room] = Room

    def run(
        self, function: Callable[[S, A, Emit], R], shared: S, arguments: Sequence[A], on_event: Emit
    ) -> Generator[tuple[int, R], None, None]:
        """Yield each job's index and result; see :class:`ensembler.engine.Engine`.

        Raises:
            UsageError: so many do not fit into the device's memory; the message says how many do.
        """
        count = min(self.count, len(arguments))
        turns, room, copies = _Turns(), self.room(), [shared] * bool(count)

        def begin() -> S:
            if copies:  # free again, or the first
                return copies.pop()
            for _ in range(_WARM_UP):
                turns.next()
            most = room.most()
            if most is not None and most < count:
                raise UsageError(
                    f"{count} networks do not fit into the GPU's memory side by side: give --parallel-members {most}"
                )
            return copies.pop() if copies else copy.copy(shared)

        def work(place: int, argument: A) -> tuple[int, R]:
            with turns.taken():
                own = begin()
                result = function(own, argument, on_event)
                copies.append(own)
                return place, result

        # A job leaves the generators of random numbers as it found them, but those may have been in another's midst.
        with restored_generators(), ThreadPoolExecutor(max(1, count)) as pool:
            jobs = [pool.submit(work, *each) for each in enumerate(arguments)]
            try:
                for job in as_completed(jobs):
                    with turns.taken():
                        yield job.result()
            finally:
                turns.stop()
                pool.shutdown(cancel_futures=True)


class _Stopped(BaseException):
    """Ends a job that is no longer wanted."""


class _Turns:
    """A lock that goes to whoever has waited longest."""

    def __init__(self) -> None:
        self._taken, self._stopped = False, False
        self._waiting = deque[threading.Semaphore]()
        self._own = threading.Lock()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Wait for a turn, and keep it within the block but for :func:`turn`."""
        _thread.turns = self
        self._take()
        try:
            yield
        finally:
            del _thread.turns
            self._give()

    def next(self) -> None:
        """Let those who wait have a turn, then go on.

        Raises:
            _Stopped: nobody wants the result any more.
        """
        if self._waiting:
            self._give()
            self._take()
        if self._stopped:
            raise _Stopped

    def stop(self) -> None:
        """End every job at its next turn."""
        self._stopped = True

    def _take(self) -> None:
        began, own = time.monotonic(), threading.Semaphore(0)
        with self._own:
            if not self._taken:
                self._taken = True
                own.release()
            else:
                self._waiting.append(own)
        own.acquire()
        _thread.waited = getattr(_thread, "waited", 0.0) + time.monotonic() - began

    def _give(self) -> None:
        with self._own:
            self._taken = bool(self._waiting)
            if self._taken:
                self._waiting.popleft().release()
