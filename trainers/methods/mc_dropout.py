"""MC dropout: one network, and M of its dropout masks (Gal & Ghahramani 2016, "Dropout as a Bayesian Approximation").

Vertices: the one solution. Coefficients: one for each member. What tells the members apart are buffers: a fixed mask of
each dropout layer, drawn once with the seed (:mod:`ensembler.networks.dropout`). With more members, their mean
prediction comes closer to that of dropout drawn anew for each image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ensembler.options import option
from ensembler.trainers.method import Members, Method
from ensembler.trainers.recipes import ASHUKHA_2020, SOLUTIONS, Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ensembler.trainers.budget import Budget, Piece
    from ensembler.trainers.trainer import Trainer

__all__ = ["MCDropout"]


class MCDropout(Method):
    """Train one network with dropout, and take M fixed dropout masks as members (Gal & Ghahramani 2016)."""

    command = "train-mc-dropout"
    stops_early = True
    fast = {"epochs": 10, "members": 10}
    # Dropout of VGG16's head is a part of its usual training: the network is that of a deep ensemble.
    published = (Recipe("vgg16bn", SOLUTIONS["vgg16"] | {"epochs": 400, "members": 100}, ASHUKHA_2020),)

    members: int = option(10, ge=1, help="M, dropout masks drawn, one per member.")

    def check(self, name: str, network: nn.Module, x: Tensor) -> None:
        """Refuse a network without dropout, or with dropout that no masks can take the place of."""
        from ensembler.networks.dropout import mask_shapes

        mask_shapes(name, network, x)

    def at_budget(self, budget: Budget) -> list[Piece] | str:
        """One network trained for b x B; its masks cost no training."""
        from ensembler.trainers.budget import Piece

        steps = budget.steps(budget.total)
        return [Piece(self, budget.passes(steps), budget.in_epochs(steps))]

    def train(self, trainer: Trainer) -> Members:
        """Train one network, or take that of the run to start from, and draw its members' masks."""
        import torch

        from ensembler.networks.dropout import draw_masks, mask_shapes
        from ensembler.trainers.starts import solution, stack_buffers

        found, settings, record = solution(trainer), trainer.settings, trainer.record
        (first,) = trainer.train_examples.part(torch.arange(1)).batches(1)
        prepare = trainer.train_examples.inputs(record.mean, record.std, trainer.device)
        network = trainer.network(settings.seed)
        shapes = mask_shapes(settings.architecture, network, prepare(first.data.to(trainer.device)))
        masks = draw_masks(network, shapes, self.members, settings.seed)
        buffers = stack_buffers([found] * self.members) | masks
        return Members(found.vector[None], torch.ones(self.members, 1), buffers)
