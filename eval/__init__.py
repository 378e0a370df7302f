"""Score runs: accuracy, likelihood, calibration, and how they hold under shift."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ensembler._lazy import exports

if TYPE_CHECKING:
    from ensembler.eval.corruptions import corrupt
    from ensembler.eval.metrics import scores

__all__ = ["corrupt", "scores"]

__getattr__, __dir__ = exports(
    __name__,
    {"corrupt": "ensembler.eval.corruptions:corrupt", "scores": "ensembler.eval.metrics:scores"},
)
