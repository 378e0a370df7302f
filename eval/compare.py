"""Is one run better than another at its cost? The comparison that stands in a report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ensembler.errors import UsageError
from ensembler.eval.evaluation import Evaluation, Scored
from ensembler.eval.report.schema import CellScores, Comparison, MemberCurve, Report, RunDifference
from ensembler.eval.scores.comparison import Difference, Losses, differences, group, group_key, resample
from ensembler.eval.scores.members import Equivalent, curve, deep_ensemble_equivalent, greedy_order, recommended_members

__all__ = ["check_names", "compare"]

RESAMPLES, CONFIDENCE = 2000, 0.95

_GROUPED = ("error", "nll", "calibrated_nll", "brier", "ece")


def compare(found: Evaluation, *, baseline: int = 0, curves: bool = False) -> Report:
    """The evaluation's report with the comparison in it.

    Args:
        found: of two runs or more, with different names.
        baseline: the run that the others are compared with, by its place.
        curves: whether every run of several members gets its scores against the number of members; else the largest
            deep ensemble alone, whose curve the deep-ensemble equivalents are read off.

    Raises:
        UsageError: one run alone, two of one name, or no such baseline.
    """
    report, runs = found.report, found.runs
    names = [run.name for run in report.runs]
    check_names(names)
    if not 0 <= baseline < len(runs):
        raise UsageError(f"the baseline is one of the {len(runs)} runs, not number {baseline + 1}")
    deep = [number for number, run in enumerate(runs) if run.manifest.method == "deep-ensemble"]
    reference = max(deep, key=lambda number: runs[number].clean.size, default=None)
    drawn = [number for number, run in enumerate(runs) if (curves and run.clean.size > 1) or number == reference]
    measured = {number: _curve(found, number) for number in drawn}
    comparison = Comparison(
        baseline=names[baseline],
        confidence=CONFIDENCE,
        resamples=RESAMPLES,
        differences=_differences(names, runs, baseline, report.seed),
        groups=group(
            [group_key(run.manifest) for run in runs],
            [run.manifest.seed for run in runs],
            [_grouped(run.clean, run.shifted) for run in report.runs],
        ),
        deep_ensemble=None if reference is None else names[reference],
        equivalents={} if reference is None else _equivalents(report, measured[reference]),
        curves=list(measured.values()),
    )
    return report.model_copy(update={"comparison": comparison})


def check_names(names: Sequence[str]) -> None:
    """Refuse what cannot be compared before hours of predicting.

    Raises:
        UsageError: one run alone, or two of one name.
    """
    if len(names) < 2:
        raise UsageError("a comparison takes at least two runs: name another, or use ensembler eval")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"two runs are called {twice}: rename one of their folders to tell them apart")


def _differences(names: Sequence[str], runs: Sequence[Scored], baseline: int, seed: int) -> list[RunDifference]:
    def against_baseline(losses: Sequence[Losses]) -> list[dict[str, Difference]]:
        drawn = [resample(one, RESAMPLES, seed) for one in losses]
        return [differences(one, drawn[baseline], CONFIDENCE) for one in drawn]

    clean = against_baseline([run.losses for run in runs])
    headline = [run.shifted for run in runs if run.shifted is not None]
    shifted = against_baseline(headline) if headline else [None] * len(runs)
    found = [RunDifference(run=run, clean=a, shifted=b) for run, a, b in zip(names, clean, shifted, strict=True)]
    return found[:baseline] + found[baseline + 1 :]


def _equivalents(report: Report, deep: MemberCurve) -> dict[str, Equivalent]:
    losses = {run.name: run.clean.calibrated_nll for run in report.runs}
    losses[deep.run] = deep.points[-1].calibrated_nll.mean  # the same number, but for its rounding
    return {name: deep_ensemble_equivalent(deep.points, loss) for name, loss in losses.items()}


def _grouped(clean: CellScores, shifted: CellScores | None) -> dict[str, float | None]:
    scores = {name: getattr(clean, name) for name in _GROUPED}
    return scores | ({f"shifted_{name}": getattr(shifted, name) for name in _GROUPED} if shifted else {})


def _curve(found: Evaluation, number: int) -> MemberCurve:
    run = found.runs[number]
    test, validation = np.asarray(run.clean.members), np.asarray(run.validation.members)
    order = greedy_order(validation, found.validation_labels)
    return MemberCurve(
        run=found.report.runs[number].name,
        order=order,
        recommended=recommended_members(validation, found.validation_labels, order),
        points=curve(test, found.labels, validation, found.validation_labels, order=order, seed=found.report.seed),
    )
