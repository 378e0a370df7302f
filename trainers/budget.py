"""What a training budget buys: the runs of a method whose members together cost so many example passes.

A method's own file says how it spends a budget (:meth:`ensembler.trainers.method.Method.at_budget`); here is what all
rules share. Budgets are counted in example passes, and spent in whole steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ensembler.trainers.method import Method

__all__ = ["LEAST", "Budget", "Piece", "one_network"]

LEAST = 0.98
"""The share of a budget that a method must spend to be compared at it."""


@dataclass(frozen=True, eq=False)
class Piece:
    """A run to be trained, before the paths that it starts from are known.

    Attributes:
        method: with its options; those of :attr:`starts` are still empty.
        passes: example passes of its own training, without those of what it starts from.
        epochs: ``--epochs``.
        member: pieces of different numbers are independent: each has a seed of its own.
        starts: the pieces that it starts from, by the option that names them: ``init``, or one of the method's.
        shared: whether it is the network that all methods share, trained with the study's own settings.
    """

    method: Method
    passes: int
    epochs: float
    member: int = 0
    starts: Mapping[str, Piece | Sequence[Piece]] = field(default_factory=dict)
    shared: bool = False


@dataclass(frozen=True)
class Budget:
    """b times the cost of one network.

    Attributes:
        networks: b.
        one: B, the example passes of one network.
        epochs: of that network.
        sizes: examples in each batch of an epoch, with the method's own batch size.
    """

    networks: float
    one: int
    epochs: float
    sizes: Sequence[int]

    @property
    def total(self) -> int:
        """Example passes of the whole budget."""
        return math.floor(self.networks * self.one + 1e-6)

    @property
    def whole(self) -> int:
        """floor(b), at least 1: how many independent runs of a network's cost fit."""
        return max(1, math.floor(self.networks + 1e-9))

    def passes(self, steps: int) -> int:
        """Example passes of so many steps from the start of an epoch."""
        epochs, rest = divmod(steps, len(self.sizes))
        return epochs * sum(self.sizes) + sum(self.sizes[:rest])

    def steps(self, passes: int) -> int:
        """The most steps that take at most so many example passes."""
        epochs, left = divmod(max(0, passes), sum(self.sizes))
        steps = epochs * len(self.sizes)
        for size in self.sizes:
            left -= size
            if left < 0:
                break
            steps += 1
        return steps

    def in_epochs(self, steps: int) -> float:
        """Steps as epochs, of which :meth:`ensembler.trainers.trainer.Trainer.steps` makes the same steps again."""
        return steps / len(self.sizes)

    def network(self, member: int = 0) -> Piece:
        """One network of cost B, which all methods share."""
        return Piece(one_network(), self.one, self.epochs, member, shared=True)

    def independent(self, method: Method, steps: int, epochs: float | None = None) -> list[Piece]:
        """floor(b) independent runs of a method, of so many steps each."""
        length = self.in_epochs(steps) if epochs is None else epochs
        return [Piece(method, self.passes(steps), length, member) for member in range(self.whole)]


def one_network() -> Method:
    """The method that trains a single network: what a budget is measured in, and what others start from."""
    from ensembler.trainers.methods.deep_ensemble import DeepEnsemble

    return DeepEnsemble(members=1)
