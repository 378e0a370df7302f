"""Scores: pure functions of arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ensembler._lazy import exports

if TYPE_CHECKING:
    from ensembler.eval.metrics.classification import (
        accuracy,
        adaptive_ece,
        brier,
        classwise_ece,
        ece,
        max_calibration_error,
        nll,
        scores,
    )

__all__ = ["accuracy", "adaptive_ece", "brier", "classwise_ece", "ece", "max_calibration_error", "nll", "scores"]

__getattr__, __dir__ = exports(__name__, {name: f"ensembler.eval.metrics.classification:{name}" for name in __all__})
