"""Evaluations and calibrations with their options as keywords, for the tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ensembler.eval import calibrate as calibrating
from ensembler.eval import evaluation
from ensembler.eval.evaluation import Evaluation
from ensembler.eval.options import CalibrationOptions, EvaluationOptions


def evaluate(
    paths: Sequence[Path],
    shift: str | None = None,
    *,
    engine: Any = None,
    watch: Callable[..., None] | None = None,
    **options: Any,
) -> Evaluation:
    watching = {} if watch is None else {"watch": watch}
    return evaluation.evaluate_paths(
        paths, EvaluationOptions(shift=None if shift is None else [shift], **options), engine=engine, **watching
    )


def calibrate(path: Path, *, watch: Callable[..., None] | None = None, **options: Any) -> Any:
    watching = {} if watch is None else {"watch": watch}
    return calibrating.calibrate(path, CalibrationOptions(**options), **watching)


def fit(probs: Any, labels: Any, *, run_sha256: str, dataset: str, validation_sha256: str, **options: Any) -> Any:
    origin = {"run_sha256": run_sha256, "dataset": dataset, "validation_sha256": validation_sha256}
    return calibrating.fit(probs, labels, CalibrationOptions(**options), **origin)
