"""Measures which way of running the members is the fastest on this machine."""

from __future__ import annotations

import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ensembler.errors import first_line
from ensembler.machine import available_cpus
from ensembler.serve.runtime.manifest import Strategy, Timing, Tuning
from ensembler.serve.runtime.strategies import Members

__all__ = ["BATCHES", "keep_faster_graphs", "machine_in_words", "measure", "tune"]

BATCHES = (1, 8, 64)
_SECONDS = 5.0  # for one batch size
_REPEATS = (5, 200)  # of each strategy, at least and at most
_TIE = 0.04  # of the time; within it the first strategy wins, on a CPU "sessions", which serves several callers best

_SAME = 1e-5  # difference of a probability between a pass and its replay

_logger = logging.getLogger("ensembler.serve")

Name = TypeVar("Name", bound=str)


def tune(
    members: Members, images: NDArray[np.uint8], batches: tuple[int, ...] = BATCHES, seconds: float = _SECONDS
) -> Tuning:
    """Time every available strategy at every batch size; what is within 4 % of the fastest counts as as fast.

    The lower quartile decides: it is less affected by other work on the machine than the median.

    Args:
        members: opened with as many threads as there are CPUs.
        images: (B, H, W, 3), B >= 1; repeated for larger batches.
        batches: the sizes.
        seconds: for each size.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    table: list[Timing] = []
    winners: dict[int, Strategy] = {}
    for batch in batches:
        part = images[np.arange(batch) % len(images)]
        measured = measure({name: _asking(members, part, name) for name in members.strategies}, seconds)
        rows = [
            Timing(batch=batch, strategy=name, seconds=_quartile(times), repeats=len(times))
            for name, times in measured.items()
        ]
        fastest = min(row.seconds for row in rows)
        winners[batch] = next(row.strategy for row in rows if row.seconds <= (1 + _TIE) * fastest)
        table += rows
    return Tuning(
        machine=machine_in_words(),
        cpus=available_cpus(),
        load=load,
        device=members.device,
        members=len(members),
        winners=winners,
        table=table,
    )


def keep_faster_graphs(members: Members, images: NDArray[np.uint8], seconds: float = _SECONDS) -> None:
    """Capture the passes of every strategy at one batch size as CUDA graphs, and keep those that are faster.

    A graph is kept only where it gives the probabilities of the eager pass, also for other images than those that it
    was captured with.

    Args:
        members: on a GPU.
        images: (B, H, W, 3), B being one of ``members.batches``.
        seconds: for each strategy, at most.
    """
    size, others = len(images), 255 - images
    for strategy, passes in members.passes.items():
        ways = {on: _replaying(passes.graphs, size, _asking(members, images, strategy), on) for on in (True, False)}
        try:
            ways[True]()  # captures
            replayed = members.ask(others, strategy)
            ways[False]()
            alike = np.allclose(replayed, members.ask(others, strategy), rtol=0, atol=_SAME)  # NaN is not
            times = measure({"eager": ways[False], "replayed": ways[True]}, seconds) if alike else None
        except Exception as error:  # ONNX Runtime's, of any class
            times = None
            _logger.warning("batches of %d are not replayed as CUDA graphs: %s", size, first_line(error))
        faster = times is not None and _quartile(times["replayed"]) < (1 - _TIE) * _quartile(times["eager"])
        (passes.graphs.add if faster else passes.graphs.discard)(size)


def measure(runs: Mapping[Name, Callable[[], object]], seconds: float = _SECONDS) -> dict[Name, list[float]]:
    """Return the seconds of each run, repeatedly and in turns, so that other work affects all alike.

    Each is timed at its second run in a row: a server runs one way only, with warm caches and without another way's
    threads still spinning.
    """
    found: dict[Name, list[float]] = {name: [] for name in runs}
    least, most = _REPEATS
    started, turn = time.perf_counter(), 0
    while turn < least or (turn < most and time.perf_counter() - started < seconds):
        for name in list(runs) if turn % 2 else list(runs)[::-1]:
            runs[name]()
            before = time.perf_counter()
            runs[name]()
            found[name].append(time.perf_counter() - before)
        turn += 1
    return found


def machine_in_words() -> str:
    """Return the system, the processor's kind and the available CPUs."""
    return f"{platform.system()} {platform.machine()}, {available_cpus()} CPUs"


def _asking(members: Members, images: NDArray[np.uint8], strategy: Strategy) -> Callable[[], object]:
    return lambda: members.ask(images, strategy)


def _replaying(graphs: set[int], size: int, ask: Callable[[], object], on: bool) -> Callable[[], object]:
    """Ask with the pass of one batch size replayed as a CUDA graph, or not."""

    def run() -> object:
        (graphs.add if on else graphs.discard)(size)
        return ask()

    return run


def _quartile(times: list[float]) -> float:
    return statistics.quantiles(times, n=4)[0]
