"""Evaluation of runs and of predictions made elsewhere: on the test set, under shift, and out of distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ensembler.arguments import checked
from ensembler.data.datasets import Dataset
from ensembler.data.images import FileSplit, Images
from ensembler.device import configure, default_modes, limit_threads
from ensembler.engine import Engine
from ensembler.ensemble import Ensemble
from ensembler.errors import UsageError
from ensembler.eval.given import Predictions, beside, check_sets
from ensembler.eval.group_file import checked_groups, read_groups
from ensembler.eval.metrics.classes import Places
from ensembler.eval.options import EvaluationOptions
from ensembler.eval.outputs import write_files
from ensembler.eval.prediction_cache import folder_of
from ensembler.eval.prediction_files import is_predictions, write_set, writing
from ensembler.eval.predictions import Prediction, Predictor, predictions
from ensembler.eval.report.notebook import evaluation_html, report_text
from ensembler.eval.report.schema import OodReport, OtherReport, Report, ShiftReport
from ensembler.eval.scoring import ScoredRun, Subject, score
from ensembler.eval.shift.ood import load_ood
from ensembler.eval.shift.readers import load_shifts
from ensembler.eval.shift.test_set import Shift, TestSet, check_images, validation_set
from ensembler.eval.views import augmentations
from ensembler.networks.architectures import Factory
from ensembler.run import Run, versions
from ensembler.seeds import generator
from ensembler.storage import artefact
from ensembler.storage.urls import as_paths, is_url
from ensembler.task import Classification

__all__ = ["Evaluation", "check_task", "distinct", "evaluate", "evaluate_given", "evaluate_paths", "rows"]

_GIVEN = "Shifted predictions were made elsewhere: which images they are for is not checked."


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A report, and the data for figures and comparisons.

    Attributes:
        report: every score.
        runs: in the report's order.
        labels: (B,) of the test images.
        images: all images of the test split, of which the scored ones may be a part; ``None`` of given predictions.
    """

    report: Report
    runs: list[ScoredRun]
    labels: NDArray[np.int64]
    images: Images | None = None

    def __repr__(self) -> str:
        return f"Evaluation of {report_text(self.report)}"

    def _repr_html_(self) -> str:
        return evaluation_html(self)

    @checked
    def compare(self, baseline: str | None = None, *, curves: bool = False) -> Evaluation:
        """Return the evaluation with a comparison of its runs, as ``ensembler compare`` makes it.

        Args:
            baseline: name of the run that the others are compared with; the first by default.
            curves: whether to score every run of several members against their number.

        Raises:
            UsageError: a single run, two runs of the same name, or no such baseline.
        """
        from ensembler.eval.comparison import compare_runs

        names = [run.name for run in self.report.runs]
        if baseline is not None and baseline not in names:
            raise UsageError(f"the baseline {baseline!r} is none of {', '.join(map(repr, names))}")
        place = 0 if baseline is None else names.index(baseline)
        return replace(self, report=compare_runs(self, baseline=place, curves=curves))

    @checked
    def save(self, folder: str | Path) -> Path:
        """Write the report, as ``ensembler eval`` and ``compare`` do: a page, Markdown, CSV, JSON and the figures.

        Args:
            folder: on this machine; of an older report in it, nothing is left.

        Returns:
            The page's path, ``folder/report.html``.

        Raises:
            UsageError: the folder is a URL. ArtefactError: it cannot be written to.
        """
        from ensembler.eval.report.files import report_files

        if is_url(str(folder)):
            raise UsageError(f"a report is a folder on this machine, not {folder}: save it there, and copy it")
        artefact.check_writable(Path(folder), "choose another folder")
        write_files(Path(folder), report_files(self))
        return Path(folder) / "report.html"


@checked
def evaluate(
    predictions: ArrayLike | Mapping[str, ArrayLike],
    labels: ArrayLike | None = None,
    *,
    name: str = "predictions",
    groups: ArrayLike | None = None,
) -> Report:
    """Score predictions made elsewhere.

    Args:
        predictions: probabilities (M, N, C) of M members, or (N, C) of one; or several arrays by their names in
            :mod:`ensembler.eval.given`, such as ``logits`` and ``validation_probabilities``, or an open ``.npz`` file.
        labels: (N,) integers, classes from 0; unless they are among the named arrays.
        name: in the report.
        groups: (N,) the group of each image, text or integers, to score each; by default only by class.

    Raises:
        ShapeError: an array of an unknown name, the wrong shape or type, or that is no prediction.
    """
    return evaluate_given([Predictions.of(name, named_arrays(predictions, labels))], groups=groups).report


def named_arrays(predictions: ArrayLike | Mapping[str, ArrayLike], labels: ArrayLike | None) -> Mapping[str, ArrayLike]:
    """Return predictions as arrays by name, with the labels; see :func:`evaluate`."""
    arrays = dict(predictions) if isinstance(predictions, Mapping) else {"probabilities": predictions}
    if labels is None:
        return arrays
    if "labels" in arrays:
        raise UsageError("the labels are given twice: leave out the argument, or the named array")
    return arrays | {"labels": labels}


@default_modes()
@checked
def evaluate_given(
    given: Sequence[Predictions],
    *,
    examples: int | None = None,
    seed: int = 0,
    groups: ArrayLike | None = None,
) -> Evaluation:
    """Score predictions made elsewhere for the same test images, on the test sets that all of them have.

    Args:
        given: one or more.
        examples: number of test images; all by default.
        seed: of the choice of examples and of bootstrap intervals.
        groups: (N,) the group of each image, text or integers.

    Raises:
        UsageError: predictions for other images, or too many examples.
        ShapeError: not one group an image.
    """
    for one, other in combinations(given, 2):
        one.check_against(other.labels, other.classes or other.C, other.test_sha256, other.name)
    first = given[0]
    names, places = None if groups is None else checked_groups(groups, len(first.labels)), Places()
    if examples is not None:
        indices = _choose(len(first.labels), examples, seed).numpy()
        places = Places(indices)
        given = [one.part(indices) for one in given]
        first, names = given[0], None if names is None else names[indices]
    every = {one.title: one for own in given for one in own.sets if one.group != "validation"}
    sets = [one for one in first.sets if one.title in every and all(own.find(one) for own in given)]
    check_sets(given, {one: len(first.sets[one].mean) for one in sets})
    cells = tuple(one for one in sets if one.group == "shift")
    shift = Shift("given", "given", _GIVEN, cells) if cells else None
    classes = next((one.classes for one in given if one.classes), tuple(map(str, range(first.C))))
    scored = score(
        [Subject(one.name, sha256=one.sha256) for one in given],
        beside(((one, ()) for one in sets), given),
        shift,
        classes=classes,
        groups=names,
        places=places,
    )
    known = {one.test_sha256 for one in given}
    report = Report(
        dataset="an unnamed dataset",
        test_examples=len(first.labels),
        test_sha256=known.pop() if len(known) == 1 else None,
        classes=list(classes),
        omitted=sorted(every.keys() - {one.title for one in sets}),
        shift=_describe(shift),
        others=[],
        ood=[
            OodReport(name=one.name, title=one.name, source="given", images=len(first.sets[one].mean))
            for one in sets
            if one.group == "ood"
        ],
        runs=[report for report, _ in scored],
        device=None,
        seed=seed,
        versions=versions(),
    )
    return Evaluation(report, [run for _, run in scored], first.labels)


@default_modes()
@checked
def evaluate_paths(
    paths: str | Path | Sequence[str | Path],
    options: EvaluationOptions | None = None,
    *,
    dataset: Any = None,
    watch: Callable[[str, int, int], None] = lambda label, done, total: None,
    engine: Engine | None = None,
    network: Factory | None = None,
) -> Evaluation:
    """Score runs, and files of predictions made elsewhere, on the same test sets.

    Each test set's images are made once for all runs, each member predicts each image once, and predictions are kept
    (:mod:`ensembler.eval.prediction_cache`).

    Args:
        paths: the runs' folders, one or several of one dataset, and files of predictions for its test images; several
            paths of the same folder are one run.
        options: the test sets, and how they are predicted; threads are set for the whole process.
        dataset: what the runs were trained on, where it has no name to load it by; see :func:`ensembler.as_dataset`.
        watch: called with a test set's title, how many images are done, and of how many.
        engine: predicts shifted and out-of-distribution sets; by default this process.
        network: what builds the runs' network, where it cannot be imported.

    Raises:
        UsageError: no run, runs of different datasets, predictions for other images, or unknown test sets.
        DataError: the dataset is missing or not the one that the runs were trained on, or a file cannot be read.
        ShapeError: a file's arrays are no predictions.
        ArtefactError: predictions cannot be kept or saved.
        EngineError: the engine failed.
    """
    options = options or EvaluationOptions()
    places, seed = distinct(as_paths(paths)), options.seed
    given = {path: Predictions.read(path) for path in places if is_predictions(path)}
    run_paths = [path for path in places if path not in given]
    _check_options(options, run_paths, given)
    if given and not run_paths:
        images = len(next(iter(given.values())).labels)
        groups = None if options.group is None else read_groups(options.group, images)
        return evaluate_given(list(given.values()), examples=options.examples, seed=seed, groups=groups)
    limit_threads(options.threads)
    runs = [Run.load(path, network) for path in run_paths]
    _check_views(runs, run_paths, options)
    dataset = _common_dataset(runs, run_paths, options, options.dataset if dataset is None else dataset)
    if options.ood:
        check_images(dataset, "--ood")
    files = dataset.test.files if isinstance(dataset.test, FileSplit) else None
    groups = None if options.group is None else read_groups(options.group, len(dataset.test), files)
    indices = _choose(len(dataset.test), options.examples, seed)
    test = dataset.test.part(indices)
    given = {path: _of_test_images(one, dataset, test, indices) for path, one in given.items()}
    shifts = load_shifts(options.shift or (), dataset, indices, options.data, seed)
    shifted = next((one for one in shifts if one.corruptions), None)
    if options.save_predictions is not None and (named := [shift.name for shift in shifts if shift.others]):
        raise UsageError(f"--save-predictions saves no other test sets: leave out --shift {named[0]}")
    sources: dict[str, Any] = {"root": options.data, "download": options.download, "corrupt": options.corrupt}
    outside = [
        load_ood(name, test.shape, examples=options.examples, seed=seed, **sources) for name in options.ood or ()
    ]
    folder = folder_of(options.cache)
    ensembles = [Ensemble(run, options.device, options.batch_size) for run in runs]
    for ensemble in ensembles:
        ensemble.check_networks()
    predictors = [Predictor(one, folder, views, seed) for one in ensembles for views in options.views]
    configure(predictors[0].ensemble.device)
    shifted_sets = [one for shift in shifts for one in shift.sets if isinstance(one, TestSet)]
    test_sets = [validation_set(dataset.validation), TestSet("clean", "clean", test, "clean"), *shifted_sets, *outside]
    test_sets = [replace(one, members=options.save_predictions is not None) for one in test_sets]
    omitted = check_sets(
        given.values(), {one: len(one.examples) for one in test_sets if one.group not in ("validation", "other")}
    )
    scored_rows, loaded = rows(places, options), dict(zip(run_paths, runs, strict=True))
    subjects = [
        Subject(name, sha256=given[path].sha256)
        if path in given
        else Subject(name, loaded[path].manifest, loaded[path].sha256, dataset.validation.sha256, views)
        for name, path, views in scored_rows
    ]
    found = predictions(predictors, test_sets, watch, engine)
    with ExitStack() as stack:
        if options.save_predictions is not None:
            writer = stack.enter_context(writing(options.save_predictions))
            writer.add("classes", np.array(dataset.classes))
            writer.add("test_sha256", np.array(test.sha256))
            found = _saved(found, writer)
        scored = score(
            subjects,
            beside(found, [given.get(path) for _, path, _ in scored_rows]),
            shifted,
            classes=dataset.classes,
            groups=None if groups is None else groups[indices.numpy()],
            places=Places(indices.numpy(), files),
        )
    report = Report(
        dataset=dataset.title,
        test_examples=len(test),
        test_sha256=test.sha256,
        classes=list(dataset.classes),
        omitted=omitted,
        shift=_describe(shifted),
        others=_describe_others(shifts),
        ood=[OodReport(name=one.name, title=one.title, source=one.source, images=len(one.examples)) for one in outside],
        runs=[report for report, _ in scored],
        device=str(predictors[0].ensemble.device),
        seed=seed,
        versions=versions(),
    )
    return Evaluation(report, [run for _, run in scored], test.labels.numpy(), dataset.test)


def _of_test_images(one: Predictions, dataset: Dataset, test: Images, indices: Tensor) -> Predictions:
    """Check that predictions are for a dataset's test images, or for those chosen of them, and return the latter."""
    whole = len(one.labels) != len(test)
    images = dataset.test if whole else test
    title = f"the test images of {dataset.title}"
    one.check_against(images.labels.numpy(), dataset.classes, images.sha256, title)
    return one.part(indices.numpy()) if whole else one


def _saved(
    found: Iterator[tuple[TestSet, list[Prediction]]], writer: Any
) -> Iterator[tuple[TestSet, list[Prediction]]]:
    for test_set, each in found:
        write_set(writer, test_set, each[0])
        yield test_set, each


def _check_options(options: EvaluationOptions, runs: Sequence[Path], given: Mapping[Path, Predictions]) -> None:
    """Check options that need runs, or one run."""
    if not runs and not given:
        raise UsageError("no run to evaluate: name at least one")
    if not runs and any(options.views):
        raise UsageError("--views predicts images by a run, and only files of predictions are named: leave it out")
    if not runs and (options.shift is not None or options.ood):
        raise UsageError(
            "--shift and --ood predict images by a run, and only files of predictions are named: a file holds its own "
            "test sets, under shift/ and ood/"
        )
    if len(set(options.views)) < len(options.views) or not options.views or min(options.views) < 0:
        raise UsageError(
            f"--views takes different numbers of variations, 0 or more, not {', '.join(map(str, options.views))}"
        )
    if options.save_predictions is not None:
        if len(options.views) > 1:
            raise UsageError("--save-predictions takes one prediction of each image: give --views once")
        if len(runs) != 1 or given:
            raise UsageError("--save-predictions takes one run at a time: name it alone")
        if options.save_predictions.suffix != ".npz":
            raise UsageError(f"--save-predictions writes .npz files, not {options.save_predictions.name}: name one")
        artefact.check_writable(options.save_predictions.parent, "choose another --save-predictions")
        if options.save_predictions.is_dir():
            raise UsageError(f"--save-predictions {options.save_predictions} is a folder: name a .npz file in it")


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


def rows(paths: Sequence[Path], options: EvaluationOptions) -> list[tuple[str, Path, int]]:
    """Return the name, path and views of each row of a report: one for each of a run's ``--views``."""
    return [
        (f"{path.name} +TTA {views}" if views else path.name, path, views)
        for path in paths
        for views in ([0] if is_predictions(path) else options.views)
    ]


def _check_views(runs: Sequence[Run], paths: Sequence[Path], options: EvaluationOptions) -> None:
    """Refuse variations of images whose training had none."""
    for run, path in zip(runs, paths, strict=True):
        if any(options.views) and "none" in augmentations(run):
            raise UsageError(
                f"{path} was trained with --augmentation none, so that its images have no variations: leave out --views"
            )


def _common_dataset(runs: list[Run], paths: Sequence[Path], options: EvaluationOptions, given: Any) -> Dataset:
    first = runs[0].manifest.dataset
    for run, path in zip(runs, paths, strict=True):
        if run.manifest.dataset.test_sha256 != first.test_sha256:
            raise UsageError(
                f"{path} was trained on {run.manifest.dataset.title} and {paths[0]} on {first.title}: "
                "evaluate runs of one dataset together"
            )
        check_task(run)
    dataset = first.load(options.data, download=options.download, dataset=given)
    for run in runs:
        run.manifest.dataset.check(dataset)
    return dataset


def _choose(available: int, examples: int | None, seed: int) -> Tensor:
    if examples is None:
        return torch.arange(available)
    if examples > available:
        raise UsageError(f"the test set has {available} images: give at most as many --examples, not {examples}")
    return torch.randperm(available, generator=generator(seed, "examples"))[:examples].sort().values


def _describe_others(shifts: Sequence[Shift]) -> list[OtherReport]:
    return [
        OtherReport(
            name=one.name,
            source=one.source,
            images=len(one.examples),
            classes=None if one.classes is None else list(one.classes),
            note=shift.note,
        )
        for shift in shifts
        for one in shift.others
        if isinstance(one, TestSet)
    ]


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
