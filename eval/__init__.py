"""Score runs, and predictions made elsewhere: accuracy, likelihood, calibration, and how they hold under shift."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ensembler._lazy import exports
from ensembler.machine import settle_matplotlib

if TYPE_CHECKING:
    from ensembler.eval.comparison import compare
    from ensembler.eval.evaluation import evaluate
    from ensembler.eval.metrics.classification import scores
    from ensembler.eval.shift.corruptions import corrupt

__all__ = ["compare", "corrupt", "evaluate", "scores"]

settle_matplotlib()

__getattr__, __dir__ = exports(
    __name__,
    {
        "compare": "ensembler.eval.comparison:compare",
        "corrupt": "ensembler.eval.shift.corruptions:corrupt",
        "evaluate": "ensembler.eval.evaluation:evaluate",
        "scores": "ensembler.eval.metrics.classification:scores",
    },
)
