"""Evaluation of runs on the clean test set, under shift, and on out-of-distribution images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ensembler import artefact
from ensembler.datasets import Dataset
from ensembler.device import configure
from ensembler.engine import Engine
from ensembler.ensemble import Ensemble
from ensembler.errors import UsageError
from ensembler.eval.options import EvaluationOptions
from ensembler.eval.prediction_cache import default_folder
from ensembler.eval.predictions import Predictor, predictions
from ensembler.eval.report.schema import OodReport, Report, ShiftReport
from ensembler.eval.scoring import ScoredRun, score
from ensembler.eval.shift.ood import load_ood
from ensembler.eval.shift.readers import load_shift
from ensembler.eval.shift.test_set import Shift, TestSet, validation_set
from ensembler.run import Run, versions
from ensembler.seeds import generator
from ensembler.task import Classification

__all__ = ["Evaluation", "check_task", "distinct", "evaluate"]

Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A report, and the data for figures and comparisons.

    Attributes:
        report: every score.
        runs: in the report's order.
        labels: (B,) of the test images.
        validation_labels: of the validation images.
    """

    report: Report
    runs: list[ScoredRun]
    labels: Labels
    validation_labels: Labels


def evaluate(
    paths: Sequence[Path],
    options: EvaluationOptions | None = None,
    *,
    watch: Callable[[str, int, int], None] = lambda label, done, total: None,
    engine: Engine | None = None,
) -> Evaluation:
    """Score every run on the same test sets.

    Each test set's images are made once for all runs, each member predicts each image once, and predictions are kept
    (:mod:`ensembler.eval.prediction_cache`).

    Args:
        paths: the runs' folders, of one dataset; several paths of the same folder are one run.
        options: the test sets, and how they are predicted; threads are set for the whole process.
        watch: called with a test set's title, how many images are done, and of how many.
        engine: predicts shifted and out-of-distribution sets; by default this process.

    Raises:
        UsageError: no run, runs of different datasets, or unknown test sets.
        DataError: the dataset is missing or not the one that the runs were trained on.
        ArtefactError: predictions cannot be kept.
        EngineError: the engine failed.
    """
    options = options or EvaluationOptions()
    paths, seed = distinct(paths), options.seed
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    runs = [Run.load(path) for path in paths]
    dataset = _common_dataset(runs, paths, options)
    indices = _choose(len(dataset.test), options.examples, seed)
    test = dataset.test.part(indices)
    shifted = None if options.shift is None else load_shift(options.shift, dataset, indices, options.data, seed)
    files: dict[str, Any] = {"root": options.data, "download": options.download, "corrupt": options.corrupt}
    outside = [load_ood(name, test.shape, examples=options.examples, seed=seed, **files) for name in options.ood or ()]
    folder = options.cache or default_folder()
    artefact.check_writable(folder, "choose another --cache")
    predictors = [Predictor(Ensemble(run, options.device, options.batch_size), folder) for run in runs]
    configure(predictors[0].ensemble.device)
    test_sets = [
        validation_set(dataset.validation),
        TestSet("clean", "clean", test, "clean"),
        *(shifted.sets if shifted else ()),
        *outside,
    ]
    scored = score(runs, [path.name for path in paths], predictions(predictors, test_sets, watch, engine), shifted)
    report = Report(
        dataset=dataset.title,
        test_examples=len(test),
        test_sha256=test.sha256,
        validation_examples=len(dataset.validation),
        validation_sha256=dataset.validation.sha256,
        shift=_describe(shifted),
        ood=[OodReport(name=one.name, title=one.title, source=one.source, images=len(one.examples)) for one in outside],
        runs=[report for report, _ in scored],
        device=str(predictors[0].ensemble.device),
        seed=seed,
        versions=versions(),
    )
    return Evaluation(report, [run for _, run in scored], test.labels.numpy(), dataset.validation.labels.numpy())


def check_task(run: Run) -> None:
    """Check that a run is a classifier.

    Raises:
        UsageError: its outputs mean something else.
    """
    if run.manifest.task != Classification.name:
        raise UsageError(f"only classifiers are scored here, not {run.manifest.task}: see Task.scores")


def distinct(paths: Sequence[Path]) -> list[Path]:
    """Resolve paths and remove duplicates: ``runs/latest`` is a link to another of ``runs/*``."""
    return list(dict.fromkeys(path.resolve() for path in paths))


def _common_dataset(runs: list[Run], paths: Sequence[Path], options: EvaluationOptions) -> Dataset:
    if not runs:
        raise UsageError("no run to evaluate: name at least one")
    first = runs[0].manifest.dataset
    for run, path in zip(runs, paths, strict=True):
        if run.manifest.dataset.test_sha256 != first.test_sha256:
            raise UsageError(
                f"{path} was trained on {run.manifest.dataset.title} and {paths[0]} on {first.title}: "
                "evaluate runs of one dataset together"
            )
        check_task(run)
    dataset = first.load(options.data, download=options.download)
    for run in runs:
        run.manifest.dataset.check(dataset)
    return dataset


def _choose(available: int, examples: int | None, seed: int) -> Tensor:
    if examples is None:
        return torch.arange(available)
    if examples > available:
        raise UsageError(f"the test set has {available} images: cannot evaluate on {examples}")
    return torch.randperm(available, generator=generator(seed, "examples"))[:examples].sort().values


def _describe(shift: Shift | None) -> ShiftReport | None:
    if shift is None:
        return None
    return ShiftReport(
        name=shift.name,
        source=shift.source,
        note=shift.note,
        corruptions=list(shift.corruptions),
        headline=list(shift.headline),
        not_covered=list(shift.not_covered),
    )
