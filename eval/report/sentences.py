"""The findings of a report in sentences, which claim no more than the intervals support."""

from __future__ import annotations

from collections.abc import Mapping

from ensembler.eval.metrics.comparison import Difference
from ensembler.eval.report.notation import (
    SCORES,
    Score,
    compact,
    count_runs,
    group_label,
    label,
    percent,
    plain,
    representatives,
    spread_text,
    verdict,
)
from ensembler.eval.report.schema import CellScores, Comparison, Report, RunReport

__all__ = ["compared", "findings"]

_SAID = ("nll", "error")
_LONGEST = 7  # runs with a sentence each
_NAMED = 3  # runs of a sentence that are not told apart


def compared(report: Report) -> list[str]:
    """Describe the runs and the images, a sentence each."""
    images = f"{report.test_examples:,} test images of {plain(report.dataset)}"
    found = [f"{count_runs(len(report.runs))}, scored on the same {images}."]
    if report.shift is not None:
        found.append(report.shift.note)
    if report.ood:
        found.append(f"Out of distribution: {'; '.join(plain(images.title) for images in report.ood)}.")
    return found


def findings(report: Report) -> list[str]:
    """Describe the cost and the findings, a sentence or two each."""
    found = [] if report.comparison is None else _best(report, report.comparison)
    found.append(_cost(report))
    if report.comparison is not None:
        found += _differences(report, report.comparison)
        found += _seeds(report, report.comparison)
        found += _numbers(report, report.comparison)
        return found
    for number, run in enumerate(report.runs):
        text = f"{label(report, number)}: {_scores(run.clean)} on clean images"
        found.append(f"{text}; {_scores(run.shifted)} under shift." if run.shifted else f"{text}.")
    if len(report.runs) > 1:
        found.append("For significance of the differences, use ensembler compare.")
    return found


def _best(report: Report, comparison: Comparison) -> list[str]:
    """Name the best run by NLL and by error, and those that are not told apart from it."""
    found = []
    for where, title in (("clean", "clean images"), ("shifted", "shifted images")):
        if where not in comparison.best:
            continue
        parts = []
        for name in _SAID:
            best, *tied = comparison.best[where][name]
            score, value = SCORES[name], getattr(getattr(report.runs[best], where), name)
            unit = " %" if score.scale == 100 else ""
            text = f"lowest {score.title.removesuffix(' %')}: {label(report, best)} ({score.write(value)}{unit})"
            others = [label(report, place) for place in tied[:_NAMED]]
            others += [f"{len(tied) - _NAMED} more"] if len(tied) > _NAMED else []
            parts.append(text + (f", not told apart from {', '.join(others)}" if tied else ", alone"))
        found.append(f"On {title}, {'; '.join(parts)}.")
    return found


def _scores(scores: CellScores) -> str:
    return f"error {SCORES['error'].write(scores.error)} %, NLL {SCORES['nll'].write(scores.nll)}"


def _cost(report: Report) -> str:
    passes = [run.training_example_passes for run in report.runs]
    known = [number for number in passes if number is not None]
    forward = [run.forward_passes_per_prediction for run in report.runs]
    text = f"Training took {_extent(known) if known else 'an unknown number of'} example passes; a prediction takes "
    text += f"{_extent(forward)} forward pass{'es' * (max(forward) > 1)}."
    given = [label(report, n) for n, run in enumerate(report.runs) if run.architecture is None]
    if given:
        text += f" The training cost of predictions made elsewhere is unknown: {', '.join(given)}."
    if any(run.training_unknown for run in report.runs):
        text += " Some weights were trained elsewhere: their training cost is unknown and not counted."
    if len(set(passes)) > 1:
        text += " The runs differ in training cost: read every difference together with it."
    return text


def _extent(values: list[int]) -> str:
    low, high = min(values), max(values)
    return compact(low) if low == high else f"{compact(low)} to {compact(high)}"


def _differences(report: Report, comparison: Comparison) -> list[str]:
    places = {run.name: number for number, run in enumerate(report.runs)}
    baseline = report.runs[places[comparison.baseline]]
    found = [
        f"Compared with {label(report, places[comparison.baseline])}; {percent(comparison.confidence)} intervals over "
        "the choice of test images, not over training seeds; about one in "
        f"{1 / (1 - comparison.confidence):.0f} misses by chance:"
    ]
    shown, said = representatives(report, _LONGEST)
    for one in comparison.differences:
        if places[one.run] not in shown:
            continue
        run = report.runs[places[one.run]]
        text = f"{label(report, places[one.run])}, at {_ratios(run, baseline)}: clean, {_said(one.clean)}"
        found.append(f"{text}; under shift, {_said(one.shifted)}." if one.shifted is not None else f"{text}.")
    return [*found, said] if said else found


def _ratios(run: RunReport, baseline: RunReport) -> str:
    members = _ratio(run.forward_passes_per_prediction, baseline.forward_passes_per_prediction, "forward passes")
    ours, theirs = run.training_example_passes, baseline.training_example_passes
    if run.training_unknown or baseline.training_unknown or not ours or not theirs:
        return f"{members} (training cost: {'unknown' if ours is None or theirs is None else 'partly unknown'})"
    return f"{_ratio(ours, theirs, 'training passes')} and {members}"


def _ratio(one: int, other: int, what: str) -> str:
    return f"the same {what}" if one == other else f"{one / other:.3g} times the {what}"


def _said(differences: Mapping[str, Difference]) -> str:
    return ", ".join(_phrase(SCORES[name], differences[name]) for name in _SAID)


def _phrase(score: Score, one: Difference) -> str:
    title, unit = score.title.removesuffix(" %"), " points" if score.scale == 100 else ""
    direction = verdict(one)
    if direction in ("lower", "higher"):
        amount, low, high = (
            score.write(size) for size in (abs(one.difference), *sorted((abs(one.low), abs(one.high))))
        )
        return f"{title} {direction} by {amount}{unit} ({low} to {high})"
    difference, low, high = (score.write(value, sign=True) for value in (one.difference, one.low, one.high))
    return f"{title} not significant ({difference}{unit}, {low} to {high})"


def _seeds(report: Report, comparison: Comparison) -> list[str]:
    return [
        f"Over {len(group.runs)} seeds of {group_label(report, group)}, clean: "
        + ", ".join(_spread(SCORES[name], spread_text(name, group.scores.get(name))) for name in _SAID)
        + " (mean ± standard deviation)."
        for group in comparison.groups
        if len(group.runs) > 1
    ]


def _spread(score: Score, text: str) -> str:
    return f"{score.title.removesuffix(' %')} {text}{' %' * score.title.endswith(' %')}"


def _numbers(report: Report, comparison: Comparison) -> list[str]:
    places = {run.name: number for number, run in enumerate(report.runs)}
    sufficient, unknown = [], []
    for curve in comparison.curves:
        number, members = places[curve.run], report.runs[places[curve.run]].members
        if curve.recommended is None:
            unknown.append(f"of {label(report, number)} with {curve.validation_examples:,} images")
        elif curve.recommended < members:
            sufficient.append(f"{curve.recommended} of {members} members of {label(report, number)}")
    found = [f"Sufficient, judged on the validation images: {'; '.join(sufficient)}."] if sufficient else []
    if unknown:
        found.append(
            f"How many members suffice cannot be told {', nor '.join(unknown)}: fewer are not told apart from all, nor "
            "from losing all that the ensemble gains."
        )
    return found
