"""The micro-batcher, alone: a `predict` that doubles numbers stands in for the ensemble."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from time import monotonic
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensembler.serve.http.batcher import Batcher, DeadlineError, OverloadError

POISON = 13


class Doubler:
    """Predicts 2 x; raises where a batch holds the poison; can be held up, and keeps a record of every pass."""

    def __init__(self) -> None:
        self.passes: list[tuple[Any, list[int]]] = []
        self.go = threading.Event()
        self.go.set()
        self.begun = threading.Event()

    def __call__(self, images: np.ndarray, key: Any) -> dict[str, np.ndarray]:
        self.passes.append((key, images.tolist()))
        self.begun.set()
        assert self.go.wait(100)
        if POISON in images:
            raise ValueError("poison")
        return {"double": 2 * images, "pair": np.stack([images, images], axis=1)}


def run(test: Callable[[Batcher, Doubler], Coroutine[Any, Any, None]], **limits: Any) -> Doubler:
    doubler = Doubler()

    async def main() -> None:
        batcher = Batcher(doubler, **limits)
        try:
            async with asyncio.timeout(200):
                await test(batcher, doubler)
            assert batcher.waiting == 0
        finally:
            doubler.go.set()
            batcher.close()

    asyncio.run(main())
    return doubler


async def held_up(batcher: Batcher, doubler: Doubler) -> asyncio.Task[Any]:
    """A request whose pass has begun and does not end before ``doubler.go`` is set."""
    doubler.go.clear()
    task = asyncio.create_task(batcher.submit(np.array([0]), "first"))
    while not doubler.begun.is_set():
        await asyncio.sleep(0.001)
    return task


async def started(*requests: Coroutine[Any, Any, Any]) -> list[asyncio.Task[Any]]:
    tasks = [asyncio.create_task(request) for request in requests]
    await asyncio.sleep(0)
    return tasks


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.lists(st.integers(0, 20), min_size=1, max_size=12), st.sampled_from("ab")), min_size=1, max_size=12
    ),
    max_batch=st.integers(1, 9),
)
def test_everyone_gets_their_own_answer_whatever_waits_beside_it(requests: list[Any], max_batch: int) -> None:
    async def test(batcher: Batcher, doubler: Doubler) -> None:
        first = await held_up(batcher, doubler)
        tasks = await started(*(batcher.submit(np.array(images), key) for images, key in requests))
        doubler.go.set()
        await first
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        for (images, _), answer in zip(requests, answers, strict=True):
            if POISON in images:
                assert isinstance(answer, ValueError)
            else:
                assert answer.columns["double"].tolist() == [2 * image for image in images]
                assert answer.columns["pair"].tolist() == [[image, image] for image in images]
                assert 1 <= answer.batch <= max_batch

    doubler = run(test, max_batch=max_batch)
    assert all(len(images) <= max_batch for _, images in doubler.passes)
    healthy = [image for images, _ in requests if POISON not in images for image in images]
    assert sum(len(images) for _, images in doubler.passes) >= len(healthy)


def test_an_idle_batcher_waits_for_nobody_and_a_busy_one_gathers() -> None:
    async def test(batcher: Batcher, doubler: Doubler) -> None:
        first = await held_up(batcher, doubler)
        tasks = await started(*(batcher.submit(np.array([n]), "a" if n < 5 else "b") for n in range(8)))
        assert batcher.waiting == 8
        doubler.go.set()
        assert (await first).batch == 1
        assert [task.batch for task in await asyncio.gather(*tasks)] == [5] * 5 + [3] * 3

    doubler = run(test, max_batch=64)
    assert doubler.passes == [("first", [0]), ("a", [0, 1, 2, 3, 4]), ("b", [5, 6, 7])]


def test_small_requests_go_between_the_passes_of_a_large_one() -> None:
    async def test(batcher: Batcher, doubler: Doubler) -> None:
        first = await held_up(batcher, doubler)
        tasks = await started(
            batcher.submit(np.arange(100, 110), "a"),
            batcher.submit(np.array([1]), "a"),
            batcher.submit(np.array([2]), "b"),
        )
        doubler.go.set()
        await asyncio.gather(first, *tasks)

    doubler = run(test, max_batch=4)
    order = [image for _, images in doubler.passes for image in images]
    assert order.index(1) < order.index(107)
    assert order.index(2) < order.index(109)


def test_beyond_the_queue_others_are_sent_away_and_told_when_to_come_back() -> None:
    async def test(batcher: Batcher, doubler: Doubler) -> None:
        first = await held_up(batcher, doubler)
        tasks = await started(batcher.submit(np.arange(20, 26), "a"))  # nobody waits: taken whatever its size
        with pytest.raises(OverloadError, match="6 images wait already") as refused:
            await batcher.submit(np.array([1]), "a")
        assert refused.value.retry_after >= 1
        doubler.go.set()
        await asyncio.gather(first, *tasks)
        assert (await batcher.submit(np.array([1]), "a")).columns["double"].tolist() == [2]

    run(test, max_queue=4)


def test_a_deadline_drops_what_has_not_begun() -> None:
    async def test(batcher: Batcher, doubler: Doubler) -> None:
        with pytest.raises(DeadlineError):
            await batcher.submit(np.array([5]), "a", monotonic() - 1)
        first = await held_up(batcher, doubler)
        with pytest.raises(DeadlineError, match="allow more time"):
            await batcher.submit(np.array([5]), "a", monotonic() + 0.03)
        assert batcher.waiting == 0
        doubler.go.set()
        await first
        await batcher.submit(np.array([6]), "a", monotonic() + 100)

    assert run(test).passes == [("first", [0]), ("a", [6])]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its last number is the time that the batcher reads."""
    told = [0.0]
    monkeypatch.setattr("ensembler.serve.http.batcher.monotonic", lambda: told[-1])
    return told


def test_who_cannot_be_served_in_time_is_refused_at_once(clock: list[float]) -> None:
    async def test(batcher: Batcher, doubler: Doubler) -> None:
        first = await held_up(batcher, doubler)
        clock.append(0.1)
        doubler.go.set()
        await first  # a pass took 0.1 s
        for n in range(9):
            await batcher.submit(np.array([n]), "a")
            assert len(doubler.passes) == n + 2
        doubler.go.clear()
        tasks = await started(*(batcher.submit(np.array([n]), "a") for n in range(5)))
        with pytest.raises(OverloadError):
            await batcher.submit(np.array([7]), "a", clock[-1] + 0.01)
        doubler.go.set()
        await asyncio.gather(*tasks)

    run(test, max_batch=1)


def test_who_hangs_up_costs_nothing_more() -> None:
    async def test(batcher: Batcher, doubler: Doubler) -> None:
        first = await held_up(batcher, doubler)
        gone, here, large = await started(
            batcher.submit(np.array([1]), "a"),
            batcher.submit(np.array([2]), "a"),
            batcher.submit(np.arange(20, 40), "b"),
        )
        gone.cancel()
        with suppress(asyncio.CancelledError):
            await gone
        assert batcher.waiting == 21
        doubler.go.set()
        await first
        await here
        doubler.go.clear()
        large.cancel()
        with suppress(asyncio.CancelledError):
            await large
        doubler.go.set()
        await batcher.submit(np.array([3]), "a")

    doubler = run(test, max_batch=4)
    asked = [image for _, images in doubler.passes for image in images]
    assert 1 not in asked
    assert len([image for image in asked if 20 <= image < 40]) <= 8


def test_what_is_told_of_time_is_so(clock: list[float]) -> None:
    async def test(batcher: Batcher, doubler: Doubler) -> None:
        first = await held_up(batcher, doubler)
        (task,) = await started(batcher.submit(np.array([1]), "a"))
        clock.append(0.05)
        doubler.go.set()
        assert (await first).predicted == 0.05
        assert ((await task).queued, (await task).predicted) == (0.05, 0)

    run(test)


def test_a_hook_that_fails_keeps_nobody_waiting() -> None:
    def fail(images: int) -> None:
        raise OSError("no space left")

    async def test(batcher: Batcher, doubler: Doubler) -> None:
        first = await held_up(batcher, doubler)
        tasks = await started(*(batcher.submit(np.array([n]), "a", monotonic() + 100) for n in range(3)))
        doubler.go.set()
        async with asyncio.timeout(100):
            await first
            answers = await asyncio.gather(*tasks)
            assert [answer.columns["double"].tolist() for answer in answers] == [[0], [2], [4]]
            assert (await batcher.submit(np.array([7]), "a")).columns["double"].tolist() == [14]

    run(test, on_pass=fail)


def test_a_pass_that_cannot_begin_keeps_nobody_waiting() -> None:
    async def test(batcher: Batcher, doubler: Doubler) -> None:
        batcher.close()
        with pytest.raises(RuntimeError, match="shutdown"):
            async with asyncio.timeout(100):
                await batcher.submit(np.array([1]), "a")

    run(test)
