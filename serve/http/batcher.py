"""Requests that wait together are predicted together, and each keeps its own answer, error and deadline. asyncio.

One forward pass runs at a time, in a thread, on all the CPUs that the runtime was given. It takes what has come while
the one before it ran, so nothing ever waits for company: an idle service answers at once, and a busy one makes larger
batches the busier it is. Only requests that ask alike (mode, members) share a pass. A large request goes in several
passes, and others between them.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from ensembler.errors import EnsemblerError

__all__ = ["Answered", "Batcher", "Columns", "DeadlineError", "OverloadError"]

Columns = Mapping[str, NDArray[np.generic]]
"""What is known of B images, by name: arrays (B, ...)."""

_KNOWN = 10  # passes before their time is believed: the first ones are slow
_MEMORY = 0.8  # how much of the old estimate of a pass's time each new one leaves


class OverloadError(EnsemblerError):
    """More waits than may wait; ``retry_after`` is the seconds after which it should be less. Answered 503."""

    status = 503

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(EnsemblerError):
    """A request's time is over; what of it had not begun is never done. Answered 504."""

    status = 504


@dataclass(frozen=True)
class Answered:
    """One request's share of the passes that it was in.

    Attributes:
        columns: of its B images, in order.
        batch: images of the largest pass, its own and others'.
        queued: seconds until the first pass began.
        predicted: seconds from then to the end of the last.
    """

    columns: Columns
    batch: int
    queued: float
    predicted: float


@dataclass(eq=False)
class _Request:
    images: NDArray[np.generic]
    result: asyncio.Future[Answered]
    arrived: float
    queued: float  # when it last went to the end of its queue
    begun: float | None = None
    taken: int = 0
    batch: int = 0
    parts: list[Columns] = field(default_factory=list)

    @property
    def waiting(self) -> int:
        return 0 if self.result.done() else len(self.images) - self.taken


class Batcher:
    """The queue of one worker. Every method is for the event loop's thread.

    Args:
        predict: images (B, ...) and a key to what is known of them; runs in a thread of its own. Whatever it raises
            is the error of the request alone whose images make it.
        max_batch: images of one pass.
        max_queue: images that may wait. A request that finds nobody waiting is taken whatever its size.
        watch: told the images of every pass.
    """

    def __init__(
        self,
        predict: Callable[[NDArray[np.generic], Hashable], Columns],
        *,
        max_batch: int = 64,
        max_queue: int = 1024,
        watch: Callable[[int], None] = lambda images: None,
    ) -> None:
        self._predict = predict
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._watch = watch
        self._queues: dict[Hashable, deque[_Request]] = {}
        self._drain: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ensembler-batch")
        self._seconds = 0.0  # that a pass takes, a running mean
        self._passes = 0
        self.waiting = 0

    async def submit(self, images: NDArray[np.generic], key: Hashable, deadline: float = math.inf) -> Answered:
        """What is known of some images. Cancelling it takes out of the queue what has not begun.

        Args:
            images: (B, ...), checked.
            key: only requests with equal keys share a pass.
            deadline: by :func:`time.monotonic`, after which the answer is of no use.

        Raises:
            OverloadError: more waits than may wait, or than can be done before the deadline.
            DeadlineError: the deadline came before the answer.
        """
        now = monotonic()
        if now >= deadline:
            raise DeadlineError(_LATE)
        self._admit(len(images), deadline - now)
        request = _Request(images, asyncio.get_running_loop().create_future(), now, now)
        self._queues.setdefault(key, deque()).append(request)
        self.waiting += len(images)
        if self._drain is None or self._drain.done():
            self._drain = asyncio.create_task(self._run())
        try:
            async with asyncio.timeout(None if deadline == math.inf else deadline - now):
                return await request.result
        except TimeoutError:
            raise DeadlineError(_LATE) from None
        finally:
            if not request.result.done() or request.result.cancelled():
                self.waiting -= len(images) - request.taken
                request.result.cancel()

    def close(self) -> None:
        """Let the thread go, once what it does is done."""
        self._thread.shutdown()

    def _admit(self, images: int, left: float) -> None:
        passes = math.ceil(self.waiting / self._max_batch)
        expected = passes * self._seconds if self._passes >= _KNOWN else 0.0
        if self.waiting and (self.waiting + images > self._max_queue or expected > left):
            retry = max(1, math.ceil(expected))
            raise OverloadError(
                f"{self.waiting} images wait already: send these {images} again in {retry} s, or to another server",
                retry,
            )

    async def _run(self) -> None:
        while batch := self._next():
            key, requests, spans = batch
            images = [request.images[span] for request, span in zip(requests, spans, strict=True)]
            began = monotonic()
            for request in requests:
                request.begun = request.begun or began
            outcomes = await asyncio.get_running_loop().run_in_executor(self._thread, self._pass, images, key)
            spent = monotonic() - began
            self._seconds = _MEMORY * self._seconds + (1 - _MEMORY) * spent if self._passes else spent
            self._passes += 1
            count = sum(map(len, images))
            self._watch(count)
            for request, outcome in zip(requests, outcomes, strict=True):
                request.batch = max(request.batch, count)
                self._settle(request, outcome)

    def _next(self) -> tuple[Hashable, list[_Request], list[slice]] | None:
        """The next pass: of the request that has waited longest for its turn, and those that ask like it."""
        for key in list(self._queues):
            queue = self._queues[key]
            while queue and not queue[0].waiting:
                queue.popleft()
            if not queue:
                del self._queues[key]
        if not self._queues:
            return None
        key = min(self._queues, key=lambda key: self._queues[key][0].queued)
        queue, room = self._queues[key], self._max_batch
        requests, spans, unfinished = [], [], []
        while queue and room:
            request = queue.popleft()
            if not request.waiting:
                continue
            span = slice(request.taken, min(len(request.images), request.taken + room))
            request.taken = span.stop
            room -= span.stop - span.start
            self.waiting -= span.stop - span.start
            requests.append(request)
            spans.append(span)
            if request.waiting:
                request.queued = monotonic()
                unfinished.append(request)
        queue.extend(unfinished)
        return key, requests, spans

    def _pass(self, images: list[NDArray[np.generic]], key: Hashable) -> list[Columns | Exception]:
        """Each request's columns or error; runs in the thread."""
        try:
            columns = self._predict(images[0] if len(images) == 1 else np.concatenate(images), key)
        except Exception as error:
            if len(images) == 1:
                return [error]
            return [self._pass([alone], key)[0] for alone in images]
        ends = np.cumsum([len(part) for part in images])
        return [
            {name: column[end - len(part) : end] for name, column in columns.items()}
            for part, end in zip(images, ends, strict=True)
        ]

    def _settle(self, request: _Request, outcome: Columns | Exception) -> None:
        if request.result.done():
            return
        if isinstance(outcome, Exception):
            self.waiting -= request.waiting
            request.result.set_exception(outcome)
            return
        request.parts.append(outcome)
        if sum(len(next(iter(part.values()))) for part in request.parts) < len(request.images):
            return
        parts, begun = request.parts, request.begun or request.arrived
        columns = parts[0] if len(parts) == 1 else _joined(parts)
        request.result.set_result(Answered(columns, request.batch, begun - request.arrived, monotonic() - begun))


_LATE = "the deadline passed before the answer was ready: allow more time, or send fewer images"


def _joined(parts: list[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
