"""From the predictions of a study's runs to its report."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from ensembler.eval.evaluation import Evaluation, distinct
from ensembler.eval.metrics.members import (
    CurvePoint,
    Equivalent,
    curve,
    deep_ensemble_equivalent,
    recommended_members,
)
from ensembler.eval.report.notation import SCORES
from ensembler.eval.scoring import ScoredRun
from ensembler.ordering import greedy_order
from ensembler.study.file import Published, Study
from ensembler.study.plan import Cell, Plan
from ensembler.study.schema import CellReport, LeftOutReport, PublishedFigure, StudyReport
from ensembler.study.statistics import CONFIDENCE, RESAMPLES, Scored, behind, mean, scored

__all__ = ["analyse", "equivalents_said"]

Key = tuple[float, str]  # of a cell's group: budget and label


def analyse(
    plan: Plan, study: Study, places: Mapping[str, Path], found: Evaluation, varied: Evaluation | None = None
) -> StudyReport:
    """Make the report of a study.

    Args:
        plan, study: what was asked for.
        places: where each cell's run lies, by the cell's name.
        found: their evaluation.
        varied: that of variations of the test images.
    """
    order = {path: number for number, path in enumerate(distinct(list(places.values())))}
    numbers = {name: order[path.resolve()] for name, path in places.items()}
    scores = [
        scored(run, found.labels, report.temperature) for run, report in zip(found.runs, found.report.runs, strict=True)
    ]
    if varied is not None:
        for own, run, row in zip(scores, varied.runs, varied.report.runs, strict=True):
            of_views = scored(run, varied.labels, row.temperature)
            own |= {f"views_{name}": of_views[name] for name in ("nll", "calibrated_nll") if name in of_views}
    groups: dict[Key, list[Cell]] = {}
    for cell in plan.cells:
        groups.setdefault((cell.budget, cell.label), []).append(cell)
    runs = {key: [numbers[cell.name] for cell in cells] for key, cells in groups.items()}
    of = {key: [scores[number] for number in places] for key, places in runs.items()}
    equivalents = _equivalents(found, runs)
    cells = [_cell(found, cells, runs[key], of[key], equivalents.get(key)) for key, cells in groups.items()]
    by: Literal["calibrated_nll", "nll"] = "calibrated_nll" if all("calibrated_nll" in one for one in scores) else "nll"
    cells = _behind(sorted(cells, key=lambda one: (one.budget, one.scores[by].mean)), of, by)
    report = found.report
    return StudyReport(
        dataset=report.dataset,
        architecture=plan.settings.architecture,
        epochs=plan.epochs,
        one=plan.one,
        seeds=list(plan.seeds),
        rules={entry.label: _rule(type(entry.method)) for entry in plan.entries},
        trained=plan.passes,
        by=by,
        test_examples=report.test_examples,
        test_sha256=report.test_sha256,
        shift=None if report.shift is None else report.shift.note,
        ood=[one.title for one in report.ood],
        confidence=CONFIDENCE,
        resamples=RESAMPLES,
        cells=cells,
        left_out=[LeftOutReport(method=one.label, budget=one.budget, why=one.why) for one in plan.left_out],
        published=[figure for one in study.published for figure in _figures(one, cells)],
        device=report.device,
        versions=report.versions,
    )


def _rule(kind: type) -> str:
    """How a method spends a budget: the first line of its rule's docstring."""
    return (inspect.getdoc(kind.at_budget) or "").partition("\n")[0]  # type: ignore[attr-defined]


def _cell(
    found: Evaluation,
    cells: Sequence[Cell],
    numbers: Sequence[int],
    scores: Sequence[Mapping[str, Scored]],
    equivalent: str | None,
) -> CellReport:
    runs = [found.runs[number] for number in numbers]
    first = found.report.runs[numbers[0]]
    needed = [count for run in runs if (count := _needed(run)) is not None]
    return CellReport(
        method=cells[0].label,
        budget=cells[0].budget,
        seeds=[cell.seed for cell in cells],
        members=first.members,
        passes=cells[0].passes,
        forward_passes=first.training_forward_passes or 0,
        scores={name: mean(scores, name) for name in scores[0]},
        needed=float(np.mean(needed)) if needed else None,
        equivalent=equivalent,
    )


def _behind(cells: Sequence[CellReport], of: Mapping[Key, Sequence[Mapping[str, Scored]]], by: str) -> list[CellReport]:
    """The cells with their distances from the best ones."""
    found = [cell.model_copy() for cell in cells]

    def note(field: str, some: Sequence[CellReport], name: str) -> None:
        best = min(range(len(some)), key=lambda at: (some[at].scores[name].mean, some[at].passes, some[at].members))
        distances = behind([of[cell.budget, cell.method] for cell in some], best, name)
        for cell, distance in zip(some, distances, strict=True):
            setattr(cell, field, None if cell is some[best] else distance)

    for budget in {cell.budget for cell in found}:
        note("behind", [cell for cell in found if cell.budget == budget], by)
    note("behind_all", found, by)
    if f"shifted_{by}" in found[0].scores:
        note("shift_behind", found, f"shifted_{by}")
    return found


def _needed(run: ScoredRun) -> int | None:
    if run.validation is None:
        return None
    likely = run.validation.label_probabilities
    return recommended_members(likely, greedy_order(likely))


def _equivalents(found: Evaluation, runs: Mapping[Key, Sequence[int]]) -> dict[Key, str]:
    """Each cell's deep-ensemble equivalent; each seed's reference is its largest ensemble of independent networks."""
    count = len(next(iter(runs.values())))
    references = [_reference(found, [numbers[place] for numbers in runs.values()]) for place in range(count)]
    curves = [None if number is None else _curve(found, number) for number in references]
    if None in curves:
        return {}
    result = {}
    for key, numbers in runs.items():
        each = [
            _equivalent(found, number, points, reference)
            for number, points, reference in zip(numbers, curves, references, strict=True)
            if points is not None
        ]
        result[key] = equivalents_said(each)
    return result


def _reference(found: Evaluation, numbers: Sequence[int]) -> int | None:
    deep = [
        number
        for number in numbers
        if (manifest := found.runs[number].manifest) is not None and manifest.independent and manifest.members > 1
    ]
    return max(deep, key=lambda number: found.runs[number].clean.size, default=None)


def _curve(found: Evaluation, number: int) -> list[CurvePoint] | None:
    run = found.runs[number]
    if run.validation is None or run.validation_labels is None:
        return None
    test, validation = np.asarray(run.clean.members), np.asarray(run.validation.members)
    return curve(test, found.labels, validation, run.validation_labels)


def _equivalent(found: Evaluation, number: int, points: Sequence[CurvePoint], reference: int | None) -> Equivalent:
    loss = found.report.runs[number].clean.calibrated_nll
    if number == reference or loss is None:  # the reference's own loss is on its curve
        loss = points[-1].calibrated_nll.mean
    return deep_ensemble_equivalent(points, loss)


def equivalents_said(each: Sequence[Equivalent]) -> str:
    """The mean over seeds, or the bound that it lies beyond."""
    known = [one.members for one in each if one.members is not None]
    beyond = [one.largest for one in each if one.members is None]
    if beyond:
        return f"> {each[0].largest}" if not known else f"> {np.mean([*known, *beyond]):.1f}"
    return "< 1" if all(one.below_one for one in each) else f"{np.mean(known):.1f}"


def _figures(published: Published, cells: Sequence[CellReport]) -> list[PublishedFigure]:
    """A paper's figures beside ours, in the unit of the tables."""
    ours = {(cell.budget, cell.method): cell.scores.get(published.score) for cell in cells}
    scale = SCORES[published.score].scale
    return [
        PublishedFigure(
            source=published.source,
            score=published.score,
            method=method,
            budget=budget,
            published=figure,
            ours=None if (one := ours.get((budget, method))) is None else scale * one.mean,
        )
        for method, figures in published.values.items()
        for budget, figure in figures.items()
    ]
