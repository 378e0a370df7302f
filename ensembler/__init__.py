"""Ensembles of neural networks and their uncertainty, from training to serving.

The public names are imported on first use, so ``import ensembler`` is fast and does not load torch.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from ensembler._lazy import exports

if TYPE_CHECKING:
    from ensembler.data.datasets import load as load_dataset
    from ensembler.data.own_data import as_dataset
    from ensembler.ensemble import Ensemble
    from ensembler.errors import EnsemblerError
    from ensembler.run import Run

__all__ = ["Ensemble", "EnsemblerError", "Run", "__version__", "as_dataset", "load_dataset"]

__getattr__, __dir__ = exports(
    __name__,
    {
        "Ensemble": "ensembler.ensemble:Ensemble",
        "EnsemblerError": "ensembler.errors:EnsemblerError",
        "Run": "ensembler.run:Run",
        "as_dataset": "ensembler.data.own_data:as_dataset",
        "load_dataset": "ensembler.data.datasets:load",
    },
)

try:
    __version__ = version("ensembler")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+source"

# In a source tree, trainers/, eval/, study/ and serve/ are next to this folder instead of inside it.
_here = Path(__file__).parent
if not (_here / "trainers").is_dir() and (_here.parent / "trainers").is_dir():
    __path__.append(str(_here.parent))
