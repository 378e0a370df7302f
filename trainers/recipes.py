"""Recipes: values of a method's options, ``paper`` as published, and ``fast`` for a short run.

Each method's file defines its recipes. A published recipe is for one network and some datasets. If a paper and its code
differ, the recipe follows the code, which produced the paper's results. Three things are always this package's own:

- a tenth of the training images is held out; the published codes train on all of them;
- momentum is Nesterov's; all but Huang et al.'s use plain momentum;
- schedules change at every step; all but Huang et al.'s change at every epoch.

``fast`` is for any network and dataset. It is this package's defaults with a smaller budget: one-cycle and a high
learning rate reach a converged solution in few epochs (Smith & Topin 2018). It was chosen on held-out images of the
digits with ``cnn`` and two seeds, and not tuned at all for curves and complexes: it is a starting point, not a
recommendation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ensembler.errors import UsageError

if TYPE_CHECKING:
    from ensembler.trainers.method import Method

__all__ = ["ASHUKHA_2020", "GARIPOV_2018", "MADDOX_2019", "SGD", "SOLUTIONS", "Recipe", "find", "published"]


@dataclass(frozen=True)
class Recipe:
    """The published options of a method, by field name, for a network on some datasets."""

    architecture: str
    options: Mapping[str, Any]
    source: str
    datasets: tuple[str, ...] = ("cifar10", "cifar100")


GARIPOV_2018 = "Garipov et al. 2018, arXiv 1802.10026"
ASHUKHA_2020 = "Ashukha et al. 2020, arXiv 2002.06470"
MADDOX_2019 = "Maddox et al. 2019, arXiv 1902.02476"

SGD: dict[str, Any] = {"batch_size": 128, "momentum": 0.9, "clip": 0.0, "augmentation": "crop-flip"}

# timgaripov/dnn-mode-connectivity, README, "Training the endpoints", and train.py: epochs are the paper's budget B.
_PIECEWISE = SGD | {"schedule": "piecewise"}
SOLUTIONS = {
    "vgg16": _PIECEWISE | {"epochs": 200, "lr": 0.05, "weight_decay": 5e-4},
    "preresnet164": _PIECEWISE | {"epochs": 150, "lr": 0.1, "weight_decay": 3e-4},
    "wrn28x10": _PIECEWISE | {"epochs": 200, "lr": 0.1, "weight_decay": 5e-4},
}


def find(recipe: str, method: type[Method], architecture: str, dataset: str) -> Mapping[str, Any]:
    """Return a recipe's options by field name.

    Args:
        recipe: ``"paper"`` or ``"fast"``.
        method: the method.
        architecture, dataset: their names.

    Raises:
        UsageError: there is no such recipe.
    """
    if recipe == "fast":
        if not method.fast:
            raise UsageError(f"{method.command} has no fast recipe: leave out --recipe, and give its options")
        return method.fast
    if not method.published:
        raise UsageError(f"{method.command} has no published recipe: leave out --recipe, and give its options")
    if options := published(method, architecture, dataset):
        return options
    known = "; ".join(f"{r.architecture} on {' or '.join(r.datasets)} ({r.source})" for r in method.published)
    raise UsageError(f"no recipe of {method.command} was published for {architecture} on {dataset}: use {known}")


def published(method: type[Method], architecture: str, dataset: str) -> Mapping[str, Any]:
    """Return a method's published options for a network and a dataset, by field name; empty without any."""
    fits = (one for one in method.published if one.architecture == architecture and dataset in one.datasets)
    return next((one.options for one in fits), {})
