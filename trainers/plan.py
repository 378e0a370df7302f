"""What a method asks of the training loop, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from ensembler.trainers.schedules import Schedule

__all__ = [
    "Best",
    "Coefficients",
    "Draw",
    "Epoch",
    "Fitted",
    "Gather",
    "Penalty",
    "Plan",
    "Regulariser",
    "Snapshot",
    "TrainState",
]

Draw = Callable[[np.random.Generator, int], Tensor]
"""Draws N rows of numbers, on the CPU, from a generator and N."""
Coefficients = Callable[[Tensor], Tensor]
"""Maps a step's rows (S, D), on the device, to the coefficients (S, K) of its S points."""
Regulariser = Callable[[Tensor, Tensor | None], None]
"""Adds its gradient to the trainable vertices' (T, P), in place; also takes the row drawn for the step."""
Penalty = Callable[[Tensor, Tensor], Tensor]
"""Computes a scalar term of the loss from the outputs (B, O) at a point and at another one."""
Gather = Callable[[list["Snapshot"], "Snapshot", int], list["Snapshot"]]
"""Returns what is kept of the snapshots so far and a new one, taken after the given iteration. Changes no tensor."""


@dataclass(frozen=True)
class Plan:
    """A method's parameters for the loop.

    Attributes:
        schedule: function from the iteration, starting at 1, to the learning rate.
        iterations: number of steps.
        trainable: indices of the vertices that are trained; the others stay fixed.
        draw: draws a row for each point's coefficients; by default 1, for a single network.
        coefficients: maps the rows to coefficients; by default they are the coefficients.
        samples: S >= 1, points per step. The batch is split among them, so a step costs one pass for any S.
        regulariser: adds its gradient to the trainable vertices'.
        regulariser_draw: draws one row per step for the regulariser.
        penalty: a term of the loss that compares the outputs at the drawn point with those at a second one, for the
            same examples; it costs another forward pass. No gradient flows to the second point: if both have the same
            distribution and the term is symmetric, this is half of the whole gradient in expectation.
        decay_sampled: whether the optimiser's weight decay acts on the sampled weights ``c @ V`` instead of the
            vertices.
        noise: function from the iteration to the standard deviation of Gaussian noise, which is added to every
            trainable weight's gradient after clipping (Langevin dynamics). By default there is none.
        collect: iterations after which to take a snapshot.
        gather: what is kept of the snapshots; by default all of them.
        centre: (K,) coefficients of the point at which the held-out examples are predicted; by default the mean of all
            vertices, which for a single network is the network.
        patience: epochs without a lower held-out loss after which training stops; the vertices of the lowest are kept.
            By default it never does.
    """

    schedule: Schedule
    iterations: int
    trainable: Sequence[int] = (0,)
    draw: Draw | None = None
    coefficients: Coefficients | None = None
    samples: int = 1
    regulariser: Regulariser | None = None
    regulariser_draw: Draw | None = None
    penalty: Penalty | None = None
    decay_sampled: bool = False
    noise: Schedule | None = None
    collect: Container[int] = ()
    gather: Gather = lambda kept, new, iteration: [*kept, new]
    centre: Tensor | None = None
    patience: int = 0


@dataclass(frozen=True)
class Snapshot:
    """The trainable vertices (T, P) and the network's buffers at one iteration."""

    vertices: Tensor
    buffers: dict[str, Tensor]


@dataclass(frozen=True)
class Best:
    """The lowest held-out loss, the epoch after which it was found, and the trainable vertices (T, P) and buffers."""

    loss: float
    epoch: int
    vertices: Tensor
    buffers: dict[str, Tensor]


@dataclass(frozen=True)
class Fitted:
    """The result of training: all vertices (K, P), the network's buffers, and the snapshots, in order."""

    vertices: Tensor
    buffers: dict[str, Tensor]
    snapshots: list[Snapshot] = field(default_factory=list)


@dataclass(frozen=True)
class TrainState:
    """Everything that the next step depends on, after ``iteration`` steps.

    ``vertices`` (T, P) are the trainable ones, ``optimiser`` the optimiser's state, ``totals`` and ``examples`` the
    sums of the current epoch, ``scaler`` the state of the loss scaler for float16, ``best`` what early stopping keeps,
    and ``stopped`` whether it has stopped the training.
    """

    iteration: int
    vertices: Tensor
    buffers: dict[str, Tensor]
    optimiser: dict[str, Any]
    snapshots: Sequence[Snapshot]
    totals: Tensor
    examples: int
    scaler: dict[str, Any]
    best: Best | None = None
    stopped: bool = False


@dataclass(frozen=True)
class Epoch:
    """Statistics of one epoch: running means over its training examples, and means over the held-out ones after it.

    There is no ``metric`` where examples were mixed: they have no one target that an answer could be compared with.
    """

    number: int
    lr: float
    loss: float
    metric: float | None
    examples: int
    held_out_loss: float | None = None
    held_out_metric: float | None = None
