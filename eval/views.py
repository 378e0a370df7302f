"""Test-time augmentation: a prediction is the mean over random variations of the image (Ashukha et al. 2020).

Of M members, each sees ``ceil(N / M)`` variations of its own, so that N views of one network take N forward passes, and
an ensemble of M >= N members takes no more passes than without. The variations are those of the run's training.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ensembler.data.images import augment, draw
from ensembler.ensemble import Ensemble
from ensembler.run import Run
from ensembler.seeds import generator

__all__ = ["Variations", "augmentations", "identity", "passes"]

Vary = Callable[[int, Tensor], Tensor]
"""From a member and images (B, H, W, 3) to the variation that it sees."""


def passes(views: int, members: int) -> int:
    """Return the forward passes of one prediction: M without variations, else M times each member's variations."""
    return members * max(1, -(-views // members))


def augmentations(run: Run) -> list[str]:
    """Return the augmentation of each member's training."""
    return [part.manifest.dataset.augmentation for part in run.networks for _ in range(len(part.coefficients))]


class Variations:
    """Variations of a set of images, a function of the seed, the member, and the image's place in the set.

    Args:
        ensemble: whose members see them.
        views: N, at least 1.
        images: how many.
        seed: of the variations.
    """

    def __init__(self, ensemble: Ensemble, views: int, images: int, seed: int) -> None:
        self._augmentations = augmentations(ensemble.run)
        members = len(self._augmentations)
        self._rounds = [
            [
                draw(own, images, generator(seed, "views", first + member))
                for member, own in enumerate(self._augmentations)
            ]
            for first in range(0, passes(views, members), members)
        ]

    def of(self, start: int, stop: int) -> list[Vary]:
        """Return a function for each of a member's variations, of the images from ``start`` to ``stop``."""
        return [partial(self._vary, choices, slice(start, stop)) for choices in self._rounds]

    def _vary(self, choices: list[Tensor], part: slice, member: int, images: Tensor) -> Tensor:
        return augment(images, self._augmentations[member], choices[member][part].to(images.device))


def identity(views: int, seed: int, run: Run) -> dict[str, Any]:
    """Return what a prediction with variations depends on beside its run and images."""
    return {"views": views, "seed": seed, "augmentations": augmentations(run)}
