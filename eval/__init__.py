"""Score runs: accuracy, likelihood, calibration, and how they hold under shift."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ensembler._lazy import exports

if TYPE_CHECKING:
    from ensembler.eval.metrics.classification import scores
    from ensembler.eval.shift.corruptions import corrupt

__all__ = ["corrupt", "scores"]

__getattr__, __dir__ = exports(
    __name__,
    {"corrupt": "ensembler.eval.shift.corruptions:corrupt", "scores": "ensembler.eval.metrics.classification:scores"},
)
