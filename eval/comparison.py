"""Comparison of runs, and of predictions made elsewhere: differences with intervals, seeds grouped, equivalents."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from ensembler.arguments import checked
from ensembler.errors import UsageError
from ensembler.eval.evaluation import Evaluation, evaluate_given, named_arrays
from ensembler.eval.given import Predictions
from ensembler.eval.metrics.comparison import Resampled, best, differences, resample, spread
from ensembler.eval.metrics.members import curve, deep_ensemble_equivalent, recommended_members
from ensembler.eval.report.schema import (
    CellScores,
    Comparison,
    Group,
    MemberCurve,
    Report,
    RunDifference,
    RunEquivalent,
)
from ensembler.eval.scoring import ScoredRun
from ensembler.ordering import greedy_order
from ensembler.run import Manifest

__all__ = ["check_names", "compare", "compare_runs", "group_key"]

RESAMPLES, CONFIDENCE = 2000, 0.95

_GROUPED = ("error", "nll", "calibrated_nll", "brier", "ece")
_HOW = {
    "measure",
    "seed",
    "device",
    "eager",
    "memory_format",
    "threads",
    "workers",
    "compile",
}  # options that do not identify the method
_STARTS = {"init", "first", "second", "modes"}  # options that name the runs or files that training starts from


@checked
def compare(
    predictions: Mapping[str, ArrayLike | Mapping[str, ArrayLike]],
    labels: ArrayLike | None = None,
    *,
    baseline: str | None = None,
    curves: bool = False,
    groups: ArrayLike | None = None,
    seed: int = 0,
) -> Report:
    """Score predictions made elsewhere for the same images, and compare them.

    Args:
        predictions: two or more by name, each as of :func:`ensembler.eval.evaluate`: probabilities, or named arrays.
        labels: (N,) integers, classes from 0; unless they are among the named arrays.
        baseline: the name of the predictions that the others are compared with; the first by default.
        curves: whether to score predictions of several members with validation predictions against their number.
        groups: (N,) the group of each image, text or integers, to score each; by default only by class.
        seed: of the bootstrap.

    Raises:
        ShapeError: an array of an unknown name, the wrong shape or type, or that is no prediction.
        UsageError: fewer than two, other labels, or no such baseline.
    """
    names = [str(name) for name in predictions]
    check_names(names)
    if baseline is not None and baseline not in names:
        raise UsageError(f"the baseline {baseline!r} is none of {', '.join(map(repr, names))}")
    given = [
        Predictions.of(name, named_arrays(each, labels)) for name, each in zip(names, predictions.values(), strict=True)
    ]
    place = 0 if baseline is None else names.index(baseline)
    return compare_runs(evaluate_given(given, seed=seed, groups=groups), baseline=place, curves=curves)


def compare_runs(found: Evaluation, *, baseline: int = 0, curves: bool = False) -> Report:
    """Return the evaluation's report with a comparison.

    Args:
        found: an evaluation of two or more runs with different names.
        baseline: index of the run that the others are compared with.
        curves: whether to score every run of several members against their number; else only the deep ensembles that
            are references of equivalents.

    Raises:
        UsageError: a single run, two runs of the same name, or no such baseline.
    """
    report, runs = found.report, found.runs
    names = [run.name for run in report.runs]
    check_names(names)
    if not 0 <= baseline < len(runs):
        raise UsageError(f"the baseline is one of the {len(runs)} runs, not number {baseline + 1}")
    references = [_reference(run, runs) for run in runs]
    drawn = [n for n, run in enumerate(runs) if (curves and run.clean.size > 1) or n in references]
    measured = {number: curve for number in drawn if (curve := _curve(found, number)) is not None}
    clean = [resample(run.losses, RESAMPLES, report.seed) for run in runs]
    shifted = [resample(run.shifted, RESAMPLES, report.seed) for run in runs if run.shifted is not None]
    comparison = Comparison(
        baseline=names[baseline],
        confidence=CONFIDENCE,
        resamples=RESAMPLES,
        differences=_differences(names, clean, shifted, baseline),
        best={where: best(drawn, CONFIDENCE) for where, drawn in (("clean", clean), ("shifted", shifted)) if drawn},
        groups=_groups(report, runs),
        equivalents={
            names[number]: _equivalent(report, number, measured[reference])
            for number, reference in enumerate(references)
            if reference is not None and reference in measured
        },
        curves=list(measured.values()),
    )
    return report.model_copy(update={"comparison": comparison})


def check_names(names: Sequence[str]) -> None:
    """Check the runs' names before hours of predicting.

    Raises:
        UsageError: a single run, or two runs of the same name.
    """
    if len(names) < 2:
        raise UsageError("a comparison takes at least two runs: name another, or use ensembler eval")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"two runs are called {twice}: rename one of their folders to tell them apart")


def _differences(
    names: Sequence[str], clean: Sequence[Resampled], shifted: Sequence[Resampled], baseline: int
) -> list[RunDifference]:
    """Compare each run with the baseline, clean and, if there are corruptions, under shift."""
    found = [
        RunDifference(
            run=name,
            clean=differences(clean[place], clean[baseline], CONFIDENCE),
            shifted=differences(shifted[place], shifted[baseline], CONFIDENCE) if shifted else None,
        )
        for place, name in enumerate(names)
    ]
    return found[:baseline] + found[baseline + 1 :]


# --- seeds ----------------------------------------------------------------------------------------------------------


def group_key(manifest: Manifest) -> str:
    """Return a key, readable JSON, that is equal for runs that differ only in their seed.

    It has the method, its options, the network, the members, the images, and the total example passes; not the seed and
    what follows from it (weights, metrics), how and when it was computed (device, threads, workers, compilation), and
    where files are. Of the runs or files that training started from it has the number, not the names: three seeds start
    from three solutions, whose equal cost is in the passes. Published weights count by their name.
    """
    given = {name: value for name, value in (manifest.settings | manifest.options).items() if value is not None}
    images = manifest.dataset
    return json.dumps(
        {
            "method": manifest.method,
            "architecture": manifest.architecture,
            "members": manifest.members,
            "vertices": manifest.vertices,
            "images": [images.shape, images.train_sha256, images.test_sha256, images.mean, images.std],
            "example_passes": manifest.cost.example_passes,
            "options": {name: value for name, value in given.items() if name not in _HOW | _STARTS},
            "starts": {
                name: len(value) if isinstance(value, list | tuple) else 1
                for name, value in given.items()
                if name in _STARTS
            },
        },
        sort_keys=True,
    )


def _groups(report: Report, runs: Sequence[ScoredRun]) -> list[Group]:
    """Group runs that differ only in their seed, in the order of each group's first run."""
    places: dict[str, list[int]] = {}
    for place, run in enumerate(runs):
        key = f"predictions {place}" if run.manifest is None else f"{group_key(run.manifest)} {run.views} views"
        places.setdefault(key, []).append(place)
    scores = [_grouped(run.clean, run.shifted) for run in report.runs]
    return [
        Group(
            runs=chosen,
            seeds=[report.runs[place].seed for place in chosen],
            scores={name: spread([scores[place][name] for place in chosen]) for name in scores[chosen[0]]},
        )
        for chosen in places.values()
    ]


def _grouped(clean: CellScores, shifted: CellScores | None) -> dict[str, float]:
    scores = {name: getattr(clean, name) for name in _GROUPED}
    scores |= {f"shifted_{name}": getattr(shifted, name) for name in _GROUPED} if shifted else {}
    return {name: value for name, value in scores.items() if value is not None}


# --- numbers of members ---------------------------------------------------------------------------------------------


def _reference(run: ScoredRun, runs: Sequence[ScoredRun]) -> int | None:
    """Find the largest ensemble of independent members of the same network; all runs have the same training data."""
    if run.manifest is None:
        return None
    deep = [
        number
        for number, other in enumerate(runs)
        if other.manifest is not None
        and other.manifest.independent
        and not other.views
        and other.clean.size > 1
        and other.manifest.architecture == run.manifest.architecture
    ]
    return max(deep, key=lambda number: runs[number].clean.size, default=None)


def _equivalent(report: Report, number: int, deep: MemberCurve) -> RunEquivalent:
    run = report.runs[number]
    # The reference's own loss is on its curve; computed otherwise, it would differ by rounding.
    loss = deep.points[-1].calibrated_nll.mean if run.name == deep.run else run.clean.calibrated_nll
    assert loss is not None  # noqa: S101  a run has validation images
    return RunEquivalent(reference=deep.run, **deep_ensemble_equivalent(deep.points, loss).model_dump())


def _curve(found: Evaluation, number: int) -> MemberCurve | None:
    """Score a run against its number of members; ``None`` without a validation prediction, which orders them."""
    run = found.runs[number]
    if run.validation is None or run.validation_labels is None:
        return None
    test, validation = np.asarray(run.clean.members), np.asarray(run.validation.members)
    order = greedy_order(run.validation.label_probabilities)
    return MemberCurve(
        run=found.report.runs[number].name,
        order=order,
        recommended=recommended_members(run.validation.label_probabilities, order),
        validation_examples=len(run.validation_labels),
        points=curve(test, found.labels, validation, run.validation_labels, order=order, seed=found.report.seed),
    )
