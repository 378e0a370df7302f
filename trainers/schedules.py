"""Learning-rate schedules: functions from the iteration, counted from 1, to the rate."""

from __future__ import annotations

import math
from collections.abc import Callable

from ensembler.errors import UsageError

__all__ = [
    "SCHEDULES",
    "Schedule",
    "after",
    "constant",
    "cosine",
    "cyclic",
    "cyclic_middles",
    "one_cycle",
    "piecewise",
    "repeated",
]

Schedule = Callable[[int], float]


def constant(rate: float) -> Schedule:
    """The same rate at every iteration."""
    return lambda iteration: rate


def cosine(rate: float, iterations: int) -> Schedule:
    """``rate / 2 * (1 + cos(pi * (i - 1) / iterations))``: from ``rate`` to almost 0 (Loshchilov & Hutter 2017)."""
    return lambda iteration: rate / 2 * (1 + math.cos(math.pi * (iteration - 1) / iterations))


def one_cycle(rate: float, iterations: int, warm_up: float = 0.2) -> Schedule:
    """Linear from 0 up to ``rate`` over the first ``warm_up`` of the iterations, then linear down to almost 0.

    The two-segment shape of Smith & Topin 2018; reaches a trained-out solution in few epochs.
    """
    rise = max(1, round(warm_up * iterations))

    def schedule(iteration: int) -> float:
        if iteration <= rise:
            return rate * iteration / rise
        return rate * (iterations - iteration + 1) / (iterations - rise + 1)

    return schedule


def piecewise(rate: float, iterations: int) -> Schedule:
    """``rate`` for half of the iterations, then linear down to a hundredth of it at nine tenths, and so to the end.

    What Garipov et al. 2018 train their solutions and curves with (the code's ``train.py``; there by whole epochs).
    """

    def schedule(iteration: int) -> float:
        share = iteration / iterations
        return rate * (1 - 0.99 * min(max((share - 0.5) / 0.4, 0), 1))

    return schedule


def cyclic(high: float, low: float, cycle: int) -> Schedule:
    """Fast Geometric Ensembling's triangular cycle (Garipov et al. 2018, sec. 4).

    With ``t = (mod(i - 1, c) + 1) / c``: ``(1 - 2t) high + 2t low`` for ``t <= 1/2``, then
    ``(2 - 2t) low + (2t - 1) high``.

    Args:
        high: the paper's alpha_1.
        low: the paper's alpha_2, below ``high``; reached in mid-cycle.
        cycle: c, iterations a cycle, at least 2.
    """
    if not 0 < low < high:
        raise UsageError(f"FGE's rates must satisfy 0 < low < high, not low = {low:g}, high = {high:g}")
    if cycle < 2:
        raise UsageError(f"an FGE cycle takes at least 2 iterations, not {cycle}")

    def schedule(iteration: int) -> float:
        t = ((iteration - 1) % cycle + 1) / cycle
        return (1 - 2 * t) * high + 2 * t * low if t <= 0.5 else (2 - 2 * t) * low + (2 * t - 1) * high

    return schedule


def cyclic_middles(cycle: int, cycles: int) -> list[int]:
    """The iterations in mid-cycle, where :func:`cyclic` is lowest and a snapshot is due: one a cycle."""
    return [cycle // 2 + cycle * n for n in range(cycles)]


def repeated(schedule: Schedule, cycle: int) -> Schedule:
    """``schedule`` begun anew every ``cycle`` iterations: warm restarts."""
    return lambda iteration: schedule((iteration - 1) % cycle + 1)


def after(iterations: int, first: Schedule, then: Schedule) -> Schedule:
    """``first`` for the given number of iterations, ``then`` from its own iteration 1 on."""
    return lambda iteration: first(iteration) if iteration <= iterations else then(iteration - iterations)


SCHEDULES: dict[str, Callable[[float, int], Schedule]] = {  # a solution's
    "one-cycle": one_cycle,
    "cosine": cosine,
    "piecewise": piecewise,
}
