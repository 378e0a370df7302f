"""Make runs: every way of turning a dataset and a network into an ensemble, on one training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ensembler._lazy import exports

if TYPE_CHECKING:
    from ensembler.trainers.combining import combine
    from ensembler.trainers.importing import import_checkpoints
    from ensembler.trainers.method import Members, Method
    from ensembler.trainers.methods.complex import Complex
    from ensembler.trainers.methods.csgmcmc import CyclicalSGMCMC
    from ensembler.trainers.methods.curve import Curve
    from ensembler.trainers.methods.deep_ensemble import DeepEnsemble
    from ensembler.trainers.methods.fge import FGE
    from ensembler.trainers.methods.mc_dropout import MCDropout
    from ensembler.trainers.methods.simplex import Simplex
    from ensembler.trainers.methods.snapshots import Snapshots
    from ensembler.trainers.methods.subspace import Subspace
    from ensembler.trainers.methods.swag import SWAG
    from ensembler.trainers.settings import Settings
    from ensembler.trainers.trainer import Trainer
    from ensembler.trainers.training import collapse_run, train

__all__ = [
    "FGE",
    "SWAG",
    "Complex",
    "Curve",
    "CyclicalSGMCMC",
    "DeepEnsemble",
    "MCDropout",
    "Members",
    "Method",
    "Settings",
    "Simplex",
    "Snapshots",
    "Subspace",
    "Trainer",
    "collapse_run",
    "combine",
    "import_checkpoints",
    "train",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "FGE": "ensembler.trainers.methods.fge:FGE",
        "SWAG": "ensembler.trainers.methods.swag:SWAG",
        "Complex": "ensembler.trainers.methods.complex:Complex",
        "Curve": "ensembler.trainers.methods.curve:Curve",
        "CyclicalSGMCMC": "ensembler.trainers.methods.csgmcmc:CyclicalSGMCMC",
        "DeepEnsemble": "ensembler.trainers.methods.deep_ensemble:DeepEnsemble",
        "MCDropout": "ensembler.trainers.methods.mc_dropout:MCDropout",
        "Members": "ensembler.trainers.method:Members",
        "Method": "ensembler.trainers.method:Method",
        "Settings": "ensembler.trainers.settings:Settings",
        "Simplex": "ensembler.trainers.methods.simplex:Simplex",
        "Snapshots": "ensembler.trainers.methods.snapshots:Snapshots",
        "Subspace": "ensembler.trainers.methods.subspace:Subspace",
        "Trainer": "ensembler.trainers.trainer:Trainer",
        "collapse_run": "ensembler.trainers.training:collapse_run",
        "combine": "ensembler.trainers.combining:combine",
        "import_checkpoints": "ensembler.trainers.importing:import_checkpoints",
        "train": "ensembler.trainers.training:train",
    },
)
