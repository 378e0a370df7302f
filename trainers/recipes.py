"""Values for a method's options, ready-made: ``paper``, as they were published, and ``fast``, a short run.

:data:`PAPER` holds a recipe for each method, network and dataset that was published with one; where a paper and its
code differ, what the code did, for that gave the paper's figures. A recipe gives everything but what this package does
in its own way throughout:

- a tenth of the training images is held out, where the published codes train on all of them;
- momentum is Nesterov's, where all of them but Huang et al.'s have the plain one;
- a schedule goes by steps, where theirs but Huang et al.'s go by epochs, and Wortsman et al.'s 5 epochs of warm-up are
  left out.

``fast`` goes for any network and dataset. It is this package's defaults on a smaller budget: one-cycle and a high rate
reach a trained-out solution in few epochs (Smith & Topin 2018). It was chosen on the digits' held-out images, with
``cnn`` and two seeds, and for curves and complexes not even so: a place to begin, no recommendation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ensembler.errors import UsageError

__all__ = ["FAST", "PAPER", "Recipe", "find"]


@dataclass(frozen=True)
class Recipe:
    """The options, by parameter name, that a command was published with for a network on some datasets."""

    command: str
    architecture: str
    options: Mapping[str, Any]
    source: str
    datasets: tuple[str, ...] = ("cifar10", "cifar100")


_SGD = {"batch_size": 128, "momentum": 0.9, "clip": 0.0, "augmentation": "crop-flip"}

# timgaripov/dnn-mode-connectivity, README, "Training the endpoints", and train.py: epochs are the paper's budget B.
_PIECEWISE = _SGD | {"schedule": "piecewise"}
_GARIPOV = {
    "vgg16": _PIECEWISE | {"epochs": 200, "lr": 0.05, "weight_decay": 5e-4},
    "preresnet164": _PIECEWISE | {"epochs": 150, "lr": 0.1, "weight_decay": 3e-4},
    "wrn28x10": _PIECEWISE | {"epochs": 200, "lr": 0.1, "weight_decay": 5e-4},
}
_GARIPOV_2018 = "Garipov et al. 2018, arXiv 1802.10026"

# Garipov et al. 2018, as repeated in SamsungLabs/pytorch-ensembles, train/train_fge.sh; the README of their own code
# has other rates, with alpha_1 = alpha_2 for VGG16. Members: as many cycles as one budget holds.
_FGE = {
    "vgg16": {"members": 20, "cycle": 2, "high": 1e-2, "low": 5e-4, "start": 160 / 200},
    "preresnet164": {"members": 6, "cycle": 4, "high": 5e-2, "low": 5e-4, "start": 125 / 150},
    "wrn28x10": {"members": 10, "cycle": 4, "high": 5e-2, "low": 5e-4, "start": 160 / 200},
}

# The same README, "Training the curves"; its 3 bends count both ends.
_CURVE = {"curve": "bezier", "bends": 1, "points": 61}
_CURVES = {
    "vgg16": _CURVE | {"epochs": 600, "lr": 0.015},
    "preresnet164": _CURVE | {"epochs": 200, "lr": 0.03},
    "wrn28x10": _CURVE | {"epochs": 200, "lr": 0.03},
}

# SamsungLabs/pytorch-ensembles, train/train_cifar.sh, train_fge.sh, train_sse_mcmc.sh. Its FGE starts from a solution
# that is trained out in 160 epochs.
_ASHUKHA_2020 = "Ashukha et al. 2020, arXiv 2002.06470"
_SSE = {"batch_size": 64, "momentum": 0.0, "lr": 0.2, "epochs": 200, "cycle": 40, "members": 5}

# g-benton/loss-surface-simplexes, experiments/vgg-cifar10 and vgg-cifar100. Its loss is summed over the 5 samples, not
# averaged: its rate for a vertex, 0.01, acts as 0.05 does here, and its weight decay as a fifth, which cannot be had
# here for the vertices alone. Its 5 samples see the whole batch each, here they share it: a step costs a fifth. Its
# lambda comes to about 1e-7. Members: 2-simplexes and 25 points, as in the paper's figures.
_BENTON_2021 = "Benton et al. 2021, arXiv 2102.13042"
_BENTON = _SGD | {"weight_decay": 5e-4, "schedule": "cosine"}
_SPRO = _BENTON | {"epochs": 300, "lr": 0.05, "vertices": 3, "vertex_lr": 0.05, "samples_per_step": 5}
_SPRO |= {"regularisation": 1e-7, "regulariser": "volume", "members": 25, "corners": False, "concentration": 1.0}

PAPER: tuple[Recipe, ...] = (
    *(Recipe("train-deep-ensemble", name, base, _GARIPOV_2018) for name, base in _GARIPOV.items()),
    *(Recipe("train-fge", name, base | _FGE[name], _GARIPOV_2018) for name, base in _GARIPOV.items()),
    *(Recipe("train-curve", name, base | _CURVES[name], _GARIPOV_2018) for name, base in _GARIPOV.items()),
    Recipe("train-deep-ensemble", "vgg16bn", _GARIPOV["vgg16"] | {"epochs": 400}, _ASHUKHA_2020),
    Recipe("train-fge", "vgg16bn", _GARIPOV["vgg16"] | _FGE["vgg16"] | {"epochs": 160, "start": 1.0}, _ASHUKHA_2020),
    Recipe("train-snapshots", "vgg16bn", _GARIPOV["vgg16"] | _SSE, _ASHUKHA_2020),
    Recipe("train-snapshots", "preresnet164", _GARIPOV["preresnet164"] | _SSE, _ASHUKHA_2020),
    Recipe("train-snapshots", "wrn28x10", _GARIPOV["wrn28x10"] | _SSE, _ASHUKHA_2020),
    # gaohuang/SnapshotEnsemble, README and opts.lua, for the 110-layer ResNet whose blocks are activated last.
    Recipe(
        "train-snapshots",
        "preresnet110",
        _SGD | _SSE | {"momentum": 0.9, "weight_decay": 1e-4},
        "Huang et al. 2017, arXiv 1704.00109",
    ),
    Recipe("train-simplex", "vgg16", _SPRO | {"vertex_epochs": 10}, _BENTON_2021, ("cifar10",)),
    Recipe("train-simplex", "vgg16", _SPRO | {"vertex_epochs": 20}, _BENTON_2021, ("cifar100",)),
    # One sample a step here, 5 there, which are summed: see above.
    Recipe("train-complex", "vgg16", _BENTON | {"epochs": 25, "lr": 0.05, "regularisation": 1e-7}, _BENTON_2021),
    # apple/learning-subspaces, experiment_configs/cifar10, for the 20-layer ResNet whose blocks are activated last.
    # What differs: their cosine is over convolutions' weights, here over the classifier's too; their vertices start
    # unscaled.
    *(
        Recipe(
            "train-subspace",
            name,
            _SGD | {"epochs": 160, "lr": 0.1, "schedule": "cosine", "weight_decay": 1e-4, "beta": 1.0},
            "Wortsman et al. 2021, arXiv 2102.10472",
            ("cifar10",),
        )
        for name in ("preresnet20", "resnet20")
    ),
)

FAST: dict[str, dict[str, Any]] = {
    "train-deep-ensemble": {"epochs": 10, "members": 3},
    "train-fge": {"epochs": 10, "members": 3},
    "train-snapshots": {"epochs": 20, "members": 3},  # 7 epochs a cycle: in 5, the digits did not come down
    "train-simplex": {"epochs": 10, "vertices": 3, "vertex_epochs": 3},  # in 2, a vertex was worse than the solution
    "train-subspace": {"epochs": 20, "vertices": 2},  # each vertex has its share of every step's gradient alone
    "train-curve": {"epochs": 5, "points": 21},
    "train-complex": {"epochs": 5, "points": 11},
}


def find(recipe: str, command: str, architecture: str, dataset: str) -> Mapping[str, Any]:
    """A recipe's options by parameter name.

    Args:
        recipe: ``"paper"`` or ``"fast"``.
        command: as typed, e.g. ``"train-fge"``.
        architecture, dataset: by name.

    Raises:
        UsageError: none was published for these.
    """
    if recipe == "fast":
        if command not in FAST:
            raise UsageError(f"{command} has no fast recipe: give its options, or use one of {', '.join(FAST)}")
        return FAST[command]
    published = [found for found in PAPER if found.command == command]
    if not published:
        raise UsageError(f"{command} has no published recipe: leave out --recipe, and give its options")
    for found in published:
        if found.architecture == architecture and dataset in found.datasets:
            return found.options
    known = "; ".join(f"{r.architecture} on {' or '.join(r.datasets)} ({r.source})" for r in published)
    raise UsageError(f"no recipe of {command} was published for {architecture} on {dataset}: there is {known}")
