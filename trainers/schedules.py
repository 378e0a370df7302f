"""Learning-rate schedules: functions from the iteration, starting at 1, to the learning rate."""

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
    "warmed",
]

Schedule = Callable[[int], float]


def constant(rate: float) -> Schedule:
    """Return ``rate`` at every iteration."""
    return lambda iteration: rate


def cosine(rate: float, iterations: int) -> Schedule:
    """Fall from ``rate`` to almost 0: ``rate / 2 * (1 + cos(pi (i - 1) / iterations))`` (Loshchilov & Hutter 2017)."""
    return lambda iteration: rate / 2 * (1 + math.cos(math.pi * (iteration - 1) / iterations))


def one_cycle(rate: float, iterations: int, warm_up: float = 0.2) -> Schedule:
    """Rise linearly from 0 to ``rate`` in the first share ``warm_up`` of the iterations, then fall to almost 0.

    The two-segment schedule of Smith & Topin 2018; reaches a converged solution in few epochs.
    """
    rise = max(1, round(warm_up * iterations))

    def schedule(iteration: int) -> float:
        if iteration <= rise:
            return rate * iteration / rise
        return rate * (iterations - iteration + 1) / (iterations - rise + 1)

    return schedule


def piecewise(rate: float, iterations: int) -> Schedule:
    """Stay at ``rate`` for half of the iterations, fall linearly to a hundredth of it at 90 %, and stay there.

    The schedule of Garipov et al. 2018 for solutions and curves (their code's ``train.py``, there per epoch).
    """

    def schedule(iteration: int) -> float:
        share = iteration / iterations
        return rate * (1 - 0.99 * min(max((share - 0.5) / 0.4, 0), 1))

    return schedule


def repeated(schedule: Schedule, cycle: int) -> Schedule:
    """Restart ``schedule`` every ``cycle`` iterations (warm restarts)."""
    return lambda iteration: schedule((iteration - 1) % cycle + 1)


def after(iterations: int, first: Schedule, then: Schedule) -> Schedule:
    """Follow ``first`` for ``iterations``, and ``then`` from its iteration 1 after that."""
    return lambda iteration: first(iteration) if iteration <= iterations else then(iteration - iterations)


def warmed(schedule: Schedule, iterations: int) -> Schedule:
    """Rise linearly to ``schedule`` in so many iterations (warm-up, Goyal et al. 2017, sec. 2.2)."""
    return lambda iteration: schedule(iteration) * min(1.0, iteration / iterations)


SCHEDULES: dict[str, Callable[[float, int], Schedule]] = {  # of a solution
    "one-cycle": one_cycle,
    "cosine": cosine,
    "piecewise": piecewise,
}
