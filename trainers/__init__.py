"""Make runs: every way of turning a dataset and a network into an ensemble, on one training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ensembler._lazy import exports

if TYPE_CHECKING:
    from ensembler.trainers.collapse import collapse_run
    from ensembler.trainers.complex import train_complex
    from ensembler.trainers.curve import train_curve
    from ensembler.trainers.deep_ensemble import train_deep_ensemble
    from ensembler.trainers.fge import train_fge
    from ensembler.trainers.session import Session, Settings
    from ensembler.trainers.simplex import train_simplex
    from ensembler.trainers.snapshot import train_snapshots
    from ensembler.trainers.subspace import train_subspace

__all__ = [
    "Session",
    "Settings",
    "collapse_run",
    "train_complex",
    "train_curve",
    "train_deep_ensemble",
    "train_fge",
    "train_simplex",
    "train_snapshots",
    "train_subspace",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "Session": "ensembler.trainers.session:Session",
        "Settings": "ensembler.trainers.session:Settings",
        "collapse_run": "ensembler.trainers.collapse:collapse_run",
        "train_complex": "ensembler.trainers.complex:train_complex",
        "train_curve": "ensembler.trainers.curve:train_curve",
        "train_deep_ensemble": "ensembler.trainers.deep_ensemble:train_deep_ensemble",
        "train_fge": "ensembler.trainers.fge:train_fge",
        "train_simplex": "ensembler.trainers.simplex:train_simplex",
        "train_snapshots": "ensembler.trainers.snapshot:train_snapshots",
        "train_subspace": "ensembler.trainers.subspace:train_subspace",
    },
)
