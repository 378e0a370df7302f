"""A small evaluation with all that a report can hold, made once for the tests that show one."""

from __future__ import annotations

import dataclasses
import tempfile
from functools import lru_cache
from pathlib import Path
from unittest import mock

import numpy as np

from ensembler.eval.comparison import compare_runs
from ensembler.eval.evaluation import Evaluation
from ensembler.eval.predictions import Prediction
from ensembler.eval.report.schema import Report
from ensembler.trainers import DeepEnsemble, Settings, Simplex, train
from tests._evaluate import evaluate
from tests._small import SETTINGS, dataset

OUTSIDE = ("noise:uniform", "noise:constant")


@lru_cache(maxsize=1)
def evaluation() -> Evaluation:
    """Four runs, one of a single member and two that differ in their seeds, under shift and out of distribution."""
    with tempfile.TemporaryDirectory() as name, mock.patch("ensembler.data.datasets.load", lambda *_, **__: dataset()):
        folder = Path(name)
        made = {
            "single": (DeepEnsemble(members=1), 0),
            "deep-a": (DeepEnsemble(members=3), 0),
            "deep-b": (DeepEnsemble(members=3), 1),
            "simplex": (Simplex(vertices=3, members=4), 0),
        }
        paths = [
            train(dataset(), method, Settings(**SETTINGS, seed=seed)).save(folder / name)
            for name, (method, seed) in made.items()
        ]
        found = evaluate(paths, "corruptions", ood=OUTSIDE, examples=15, device="cpu", cache=folder / "kept", seed=3)
        # The members lie in files that are about to go.
        runs = [
            dataclasses.replace(run, validation=_held(run.validation), clean=_held(run.clean)) for run in found.runs
        ]
    return dataclasses.replace(found, runs=runs)


@lru_cache(maxsize=1)
def comparison() -> Report:
    """The same with the comparison in it."""
    return compare_runs(evaluation(), baseline=0, curves=True)


def part(runs: int = 1, *, shift: bool = False, ood: bool = False) -> Evaluation:
    """The first runs of it alone, with or without shift and out-of-distribution images."""
    whole = evaluation()
    report = whole.report.model_copy(deep=True)
    report.runs = report.runs[:runs]
    scored = whole.runs[:runs]
    if not shift:
        report.shift = None
        for run in report.runs:
            run.by_severity, run.by_family, run.shifted, run.cells = {}, {}, None, {}
            run.class_errors = {}
            run.groups = {by: found for by, found in run.groups.items() if by != "test set"}
        scored = [dataclasses.replace(run, shifted=None) for run in scored]
    if not ood:
        report.ood = []
        for run in report.runs:
            run.ood = {}
        scored = [dataclasses.replace(run, entropies={"clean": run.entropies["clean"]}) for run in scored]
    return dataclasses.replace(whole, report=report, runs=scored)


def named(names: list[str]) -> Evaluation:
    """The evaluation with other names for its runs."""
    whole = evaluation()
    report = whole.report.model_copy(deep=True)
    for run, name in zip(report.runs, names, strict=True):
        run.name = name
    return dataclasses.replace(whole, report=report)


def _held(prediction: Prediction) -> Prediction:
    return dataclasses.replace(prediction, members=np.array(prediction.members))
