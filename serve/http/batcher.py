"""A queue whose waiting requests are predicted together; each keeps its own answer, error and deadline.

One forward pass runs at a time, in a thread, on all CPUs that the runtime was given. It takes what arrived during the
pass before it, so nothing waits for others: an idle service answers at once, and a busy one makes larger batches.
Only requests with equal keys share a pass. A large request takes several passes, with other requests between them.
"""

from __future__ import annotations

import asyncio
import logging
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
"""What is predicted for B images, by name: arrays (B, ...)."""

_TRUSTED = 10  # passes before their mean time is trusted: the first ones are slow
_MEMORY = 0.8  # weight of the running mean of a pass's time against a new one
_LATE = "the deadline passed before the answer was ready: allow more time, or send fewer images"

_logger = logging.getLogger("ensembler.serve")


class OverloadError(EnsemblerError):
    """The queue is full; ``retry_after`` is when to try again, in seconds. Answered 503."""

    status = 503

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(EnsemblerError):
    """A request's deadline passed; what of it had not begun is dropped. Answered 504."""

    status = 504


@dataclass(frozen=True)
class Answered:
    """One request's share of its passes.

    Attributes:
        columns: of its B images, in order.
        batch: images of the largest pass, including other requests'.
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
        predict: called with images (B, ...) and their key in a thread of its own; returns what is predicted. What it
            raises is the error of those requests only whose images cause it.
        max_batch: images of one pass.
        max_queue: images that may wait. A request that finds an empty queue is taken whatever its size.
        on_pass: called with the number of images after every pass.
    """

    def __init__(
        self,
        predict: Callable[[NDArray[np.generic], Hashable], Columns],
        *,
        max_batch: int = 64,
        max_queue: int = 1024,
        on_pass: Callable[[int], None] = lambda images: None,
    ) -> None:
        self._predict = predict
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._on_pass = on_pass
        self._queues: dict[Hashable, deque[_Request]] = {}
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ensembler-batch")
        self._seconds = 0.0  # of a pass, a running mean
        self._passes = 0
        self.waiting = 0

    async def submit(self, images: NDArray[np.generic], key: Hashable, deadline: float = math.inf) -> Answered:
        """Return what is predicted for some images. Cancelling it removes from the queue what has not begun.

        Args:
            images: (B, ...), checked.
            key: only requests with equal keys share a pass.
            deadline: by :func:`time.monotonic`.

        Raises:
            OverloadError: more waits than may wait, or than can be done before the deadline.
            DeadlineError: the deadline passed before the answer was ready.
        """
        now = monotonic()
        if now >= deadline:
            raise DeadlineError(_LATE)
        self._admit(len(images), deadline - now)
        request = _Request(images, asyncio.get_running_loop().create_future(), now, now)
        self._queues.setdefault(key, deque()).append(request)
        self.waiting += len(images)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._run())
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
        """Stop the thread after its present pass."""
        self._thread.shutdown()

    def _admit(self, images: int, left: float) -> None:
        passes = math.ceil(self.waiting / self._max_batch)
        expected = passes * self._seconds if self._passes >= _TRUSTED else 0.0
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
            try:
                loop = asyncio.get_running_loop()
                outcomes = await loop.run_in_executor(self._thread, _outcomes, self._predict, images, key)
            except Exception as error:  # whatever happens, nobody may wait for an answer that never comes
                outcomes = [error] * len(requests)
            spent = monotonic() - began
            self._seconds = _MEMORY * self._seconds + (1 - _MEMORY) * spent if self._passes else spent
            self._passes += 1
            count = sum(map(len, images))
            for request, outcome in zip(requests, outcomes, strict=True):
                request.batch = max(request.batch, count)
                self._settle(request, outcome)
            try:
                self._on_pass(count)
            except Exception:
                _logger.exception("the hook after a forward pass failed")

    def _next(self) -> tuple[Hashable, list[_Request], list[slice]] | None:
        """Take the next pass: the request that has waited longest for its turn, and those with its key."""
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
        columns = parts[0] if len(parts) == 1 else _concatenate(parts)
        request.result.set_result(Answered(columns, request.batch, begun - request.arrived, monotonic() - begun))


def _outcomes(
    predict: Callable[[NDArray[np.generic], Hashable], Columns], images: list[NDArray[np.generic]], key: Hashable
) -> list[Columns | Exception]:
    """Return each request's columns or error; runs in the thread."""
    try:
        columns = predict(images[0] if len(images) == 1 else np.concatenate(images), key)
    except Exception as error:
        if len(images) == 1:
            return [error]
        return [_outcomes(predict, [part], key)[0] for part in images]
    ends = np.cumsum([len(part) for part in images])
    return [
        {name: column[end - len(part) : end] for name, column in columns.items()}
        for part, end in zip(images, ends, strict=True)
    ]


def _concatenate(parts: list[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
