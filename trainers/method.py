"""A method is one record and one function: its options, and what they make of a :class:`Trainer`.

From the record come the command and its ``--help``, the checks of its values, ``--config``, what a recipe may set, the
manifest's ``options`` and the Python call. A method's file loads no torch before its function is called.
"""

from __future__ import annotations

import pkgutil
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ensembler.errors import UsageError
from ensembler.options import Options
from ensembler.trainers.recipes import Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ensembler.run import Gaussians, Sampling
    from ensembler.trainers.budget import Budget, Piece
    from ensembler.trainers.settings import Settings
    from ensembler.trainers.trainer import Trainer

__all__ = ["Members", "Method", "methods"]


@dataclass(frozen=True, eq=False)
class Members:
    """What a method makes: an ensemble.

    Attributes:
        vertices: (K, P).
        coefficients: (M, K), a row each member.
        buffers: the members' buffers, name to (M, ...).
        sampling: how further members can be drawn, if they can.
        metrics: what the method measured, in JSON values.
        gaussians: parameter name to (S, K + 2, ...), where the members are drawn from Gaussians
            (:mod:`ensembler.gaussian`).
    """

    vertices: Tensor
    coefficients: Tensor
    buffers: Mapping[str, Tensor]
    sampling: Sampling | Gaussians | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    gaussians: Mapping[str, Tensor] = field(default_factory=dict)


class Method(Options):
    """A way of turning a dataset and a network into an ensemble. Subclasses declare their options as fields.

    Attributes:
        command: what is typed.
        starts_fresh: whether training starts from fresh weights only, never from a trained solution.
        stops_early: whether it trains solutions, which early stopping may end; see :class:`Settings`.
        has_jobs: whether :meth:`train` gives the engine independent jobs; otherwise, the whole run is one job.
        published: the recipes of papers; see :mod:`ensembler.trainers.recipes`.
        fast: a short run's options, by field name.
        compared: the options of each entry that a study has of it by default, by field name.
        by_budget: the options that :meth:`at_budget` decides.
    """

    command: ClassVar[str]
    starts_fresh: ClassVar[bool] = False
    stops_early: ClassVar[bool] = False
    has_jobs: ClassVar[bool] = False
    published: ClassVar[tuple[Recipe, ...]] = ()
    fast: ClassVar[Mapping[str, Any]] = {}
    compared: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    by_budget: ClassVar[frozenset[str]] = frozenset()

    @property
    def name(self) -> str:
        """What a report calls it."""
        return self.command.removeprefix("train-")

    @property
    def independent(self) -> bool:
        """Whether the members are trained independently of one another."""
        return False

    @property
    def runs(self) -> list[str]:
        """The runs that it joins, whose network and data it takes over; by default none."""
        return []

    def resolved(self, settings: Settings) -> Self:
        """The same with everything filled in that depends on the settings."""
        return self

    def at_budget(self, budget: Budget) -> list[Piece] | str:
        """The runs that a budget buys, whose members are combined; or why none fits it.

        The first line of an overriding docstring states the rule, for the report of a study.

        Raises:
            UsageError: the method has no rule, or options whose cost is not known before training.
        """
        raise UsageError(f"{self.command} has no rule for a budget of passes: leave {self.name} out of the study")

    def check(self, name: str, network: nn.Module, x: Tensor) -> None:
        """Refuse a network that the method cannot use, before anything is trained.

        Args:
            name: the network's, for messages.
            network: a copy of its own, in evaluation mode.
            x: inputs (B, ...).

        Raises:
            UsageError: the message says why.
        """

    @abstractmethod
    def train(self, trainer: Trainer) -> Members:
        """Make the ensemble."""


def methods() -> list[type[Method]]:
    """Every method: one a file of ``trainers/methods``."""
    from ensembler.trainers import methods as package

    modules = [import_module(f"{package.__name__}.{found.name}") for found in pkgutil.iter_modules(package.__path__)]
    return [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
