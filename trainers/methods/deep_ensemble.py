"""Deep ensembles: the same network trained M times from independent weights (Lakshminarayanan et al. 2017).

Vertices: the M solutions. Coefficients: the identity. One member is a single network, the baseline of everything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ensembler.options import option
from ensembler.trainers.method import Members, Method
from ensembler.trainers.recipes import ASHUKHA_2020, GARIPOV_2018, SOLUTIONS, Recipe

if TYPE_CHECKING:
    from ensembler.trainers.budget import Budget, Piece
    from ensembler.trainers.trainer import Trainer
    from ensembler.trainers.work import JobOutput

__all__ = ["DeepEnsemble"]


class DeepEnsemble(Method):
    """Train M networks from independent weights (Lakshminarayanan et al. 2017)."""

    command = "train-deep-ensemble"
    starts_fresh = True
    has_jobs = True
    stops_early = True
    fast = {"epochs": 10, "members": 3}
    compared = ({"members": 1}, {})
    by_budget = frozenset({"members"})
    published = (
        *(Recipe(name, options, GARIPOV_2018) for name, options in SOLUTIONS.items()),
        Recipe("vgg16bn", SOLUTIONS["vgg16"] | {"epochs": 400}, ASHUKHA_2020),
    )

    members: int = option(4, ge=1, help="M, networks trained; 1 is a single network.")

    @property
    def name(self) -> str:
        """``single`` where M = 1."""
        return "single" if self.members == 1 else "deep-ensemble"

    @property
    def independent(self) -> bool:
        """Always."""
        return True

    def at_budget(self, budget: Budget) -> list[Piece] | str:
        """floor(b) networks of B each; a single network, the control, is trained for b x B."""
        from ensembler.trainers.budget import Piece

        alone = self.model_copy(update={"members": 1})
        count = 1 if self.members == 1 else budget.whole
        if self.members > 1 and count == 1:
            return "a budget below 2 holds one network only"
        steps = budget.steps(budget.total if self.members == 1 else budget.one)
        passes, epochs = budget.passes(steps), budget.in_epochs(steps)
        return [Piece(alone, passes, epochs, member) for member in range(count)]

    def train(self, trainer: Trainer) -> Members:
        """Train each member from its own weights and on its own order of the data."""
        import torch

        from ensembler.trainers.starts import Solution, stack_buffers
        from ensembler.trainers.work import each

        jobs = {f"solution {member + 1}": {"member": member} for member in range(self.members)}
        found = [Solution(**tensors) for tensors, _ in each(trainer, solve, jobs)]
        return Members(torch.stack([one.vector for one in found]), torch.eye(self.members), stack_buffers(found))


def solve(trainer: Trainer, member: int) -> JobOutput:
    """A job: one solution, its ``vector`` (P,) and its ``buffers``."""
    from ensembler.trainers.starts import solution

    return vars(solution(trainer, member)), {}
