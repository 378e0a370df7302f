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
        l2_calibration_error,
        max_calibration_error,
        nll,
        scores,
        smooth_ece,
    )
    from ensembler.eval.metrics.ood import fpr_at_recall, ood_scores, scod_aurc
    from ensembler.eval.metrics.selective import augrc, aurc, coverage_at_risk, risk_at_coverage
    from ensembler.eval.metrics.sets import coverage, mean_set_size

__all__ = [
    "accuracy",
    "adaptive_ece",
    "augrc",
    "aurc",
    "brier",
    "classwise_ece",
    "coverage",
    "coverage_at_risk",
    "ece",
    "fpr_at_recall",
    "l2_calibration_error",
    "max_calibration_error",
    "mean_set_size",
    "nll",
    "ood_scores",
    "risk_at_coverage",
    "scod_aurc",
    "scores",
    "smooth_ece",
]

_OTHERS = {
    "selective": ("augrc", "aurc", "coverage_at_risk", "risk_at_coverage"),
    "ood": ("fpr_at_recall", "ood_scores", "scod_aurc"),
    "sets": ("coverage", "mean_set_size"),
}
_MODULES = dict.fromkeys(__all__, "classification") | {n: m for m, names in _OTHERS.items() for n in names}

__getattr__, __dir__ = exports(__name__, {name: f"ensembler.eval.metrics.{m}:{name}" for name, m in _MODULES.items()})
