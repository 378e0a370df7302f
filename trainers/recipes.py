"""Recipes: values for a method's options, ``paper`` as they were published, and ``fast`` for a short run.

Each method's file holds its own. A published one stands for a network and a dataset; where a paper and its code differ,
it is what the code did, for that gave the paper's figures. It gives everything but what this package does in its own
way throughout:

- a tenth of the training images is held out, where the published codes train on all of them;
- momentum is Nesterov's, where all of them but Huang et al.'s have the plain one;
- a schedule goes by steps, where theirs but Huang et al.'s go by epochs.

``fast`` goes for any network and dataset. It is this package's defaults on a smaller budget: one-cycle and a high rate
reach a trained-out solution in few epochs (Smith & Topin 2018). It was chosen on the digits' held-out images, with
``cnn`` and two seeds, and for curves and complexes not even so: a place to begin, no recommendation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ensembler.errors import UsageError

if TYPE_CHECKING:
    from ensembler.trainers.method import Method

__all__ = ["ASHUKHA_2020", "GARIPOV_2018", "SGD", "SOLUTIONS", "Recipe", "find"]


@dataclass(frozen=True)
class Recipe:
    """The options, by field name, that a method was published with for a network on some datasets."""

    architecture: str
    options: Mapping[str, Any]
    source: str
    datasets: tuple[str, ...] = ("cifar10", "cifar100")


GARIPOV_2018 = "Garipov et al. 2018, arXiv 1802.10026"
ASHUKHA_2020 = "Ashukha et al. 2020, arXiv 2002.06470"

SGD: dict[str, Any] = {"batch_size": 128, "momentum": 0.9, "clip": 0.0, "augmentation": "crop-flip"}

# timgaripov/dnn-mode-connectivity, README, "Training the endpoints", and train.py: epochs are the paper's budget B.
_PIECEWISE = SGD | {"schedule": "piecewise"}
SOLUTIONS = {
    "vgg16": _PIECEWISE | {"epochs": 200, "lr": 0.05, "weight_decay": 5e-4},
    "preresnet164": _PIECEWISE | {"epochs": 150, "lr": 0.1, "weight_decay": 3e-4},
    "wrn28x10": _PIECEWISE | {"epochs": 200, "lr": 0.1, "weight_decay": 5e-4},
}


def find(recipe: str, method: type[Method], architecture: str, dataset: str) -> Mapping[str, Any]:
    """A recipe's options by field name.

    Args:
        recipe: ``"paper"`` or ``"fast"``.
        method: whose.
        architecture, dataset: by name.

    Raises:
        UsageError: there is none for these.
    """
    if recipe == "fast":
        if not method.fast:
            raise UsageError(f"{method.command} has no fast recipe: leave out --recipe, and give its options")
        return method.fast
    if not method.published:
        raise UsageError(f"{method.command} has no published recipe: leave out --recipe, and give its options")
    for found in method.published:
        if found.architecture == architecture and dataset in found.datasets:
            return found.options
    known = "; ".join(f"{r.architecture} on {' or '.join(r.datasets)} ({r.source})" for r in method.published)
    raise UsageError(f"no recipe of {method.command} was published for {architecture} on {dataset}: there is {known}")
