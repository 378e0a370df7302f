"""Learning-rate schedules: functions from the iteration, counted from 1, to the rate."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = [
    "SCHEDULES",
    "Schedule",
    "after",
    "constant",
    "cosine",
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
