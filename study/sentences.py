"""The answer of a study in sentences, which claim no more than the intervals support."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from ensembler.eval.metrics.comparison import ROUNDING
from ensembler.eval.report.notation import SCORES, Score, compact, percent, plain
from ensembler.study.schema import CellReport, Estimate, StudyReport
from ensembler.text import counted

__all__ = ["NAMES", "answers", "compared", "pareto", "recommendations", "within", "worse"]

NAMES: dict[str, Score] = {
    **{name: SCORES[name] for name in ("error", "nll", "calibrated_nll", "ece")},
    "views_nll": SCORES["nll"]._replace(title="TTA NLL", meaning="NLL with test-time augmentation"),
    "views_calibrated_nll": SCORES["calibrated_nll"]._replace(
        title="TTA cal. NLL", meaning="calibrated NLL with test-time augmentation"
    ),
    "shifted_nll": SCORES["nll"]._replace(title="shifted NLL", meaning="NLL, mean over corruptions and severities"),
    "shifted_calibrated_nll": SCORES["calibrated_nll"]._replace(
        title="shifted cal. NLL",
        meaning="NLL, mean over corruptions and severities, with the temperature of the clean validation images",
    ),
    "shifted_ece": SCORES["ece"]._replace(title="shifted ECE %", meaning="ECE, mean over corruptions and severities"),
    "ood_auroc": Score(
        "OOD AUROC %",
        100,
        2,
        "probability that an out-of-distribution image has a higher predictive entropy than a test image; mean over "
        "the sets",
    ),
}
"""The scores of a study's tables; lower is better, except for the AUROC."""

_FEW_SEEDS = 5
_NAMED = 5  # methods of all budgets that a sentence names


def compared(report: StudyReport) -> list[str]:
    """Describe what was compared, a sentence each."""
    methods = dict.fromkeys(cell.method for cell in report.cells)
    budgets = ", ".join(f"{budget:g}" for budget in _budgets(report))
    found = [
        f"{len(methods)} methods at budgets of {budgets} times B on {plain(report.dataset)} with "
        f"{plain(report.architecture)}; B is one network of {report.epochs:g} "
        f"epoch{'s' * (report.epochs != 1)}, {compact(report.one)} example "
        f"passes. Nothing exceeds its budget. Trained in all: {compact(report.trained)} example passes; what methods "
        "share is trained once and counted in each.",
        f"Scores are means over {counted(len(report.seeds), 'seed')} on {report.test_examples:,} test images, with "
        f"{percent(report.confidence)} intervals over {'seeds and images' if len(report.seeds) > 1 else 'images'}.",
    ]
    if len(report.seeds) == 1:
        found.append("One seed says nothing of the next: the intervals hold for these networks only.")
    elif len(report.seeds) < _FEW_SEEDS:
        found.append(
            f"{len(report.seeds)} seeds say little of the next, so intervals are wide: more seeds tell more apart."
        )
    if report.by == "calibrated_nll":
        found.append(
            "Methods are ordered and told apart by calibrated NLL: one temperature each, fitted on the validation "
            "images, so that none wins by a confidence that one number mends."
        )
    found.append(
        f"Told apart is what the {percent(report.confidence)} intervals of all differences from the best one, which "
        "hold together (Bonferroni), put above 0. What is not told apart need not be as good."
    )
    if report.shift:
        found.append(report.shift)
    return found


def answers(report: StudyReport) -> list[str]:
    """The best method of each budget, and what is not told apart from it; a sentence each."""
    return [_answer(report, budget) for budget in _budgets(report)]


def _answer(report: StudyReport, budget: float) -> str:
    cells = [cell for cell in report.cells if cell.budget == budget]
    best = next(cell for cell in cells if cell.behind is None)
    others = [cell for cell in cells if cell is not best]
    text = (
        f"At {_at(budget)}, {best.method}: {_judged(report, best)}, error "
        f"{SCORES['error'].write(best.scores['error'].mean)} %, {_forward(best)}"
    )
    if not others:
        return f"{text}; nothing else was compared at this budget."
    alike = [cell for cell in others if not worse(cell.behind)]
    if not alike:
        return f"{text}; everything else is worse, its interval without 0."
    listed = ", ".join(f"{cell.method} ({_value(cell, report.by)})" for cell in alike)
    rest = "" if len(alike) < len(others) else "nothing else is told apart from it: "
    return f"{text}; {rest or 'not told apart from it: '}{listed}."


def recommendations(report: StudyReport) -> dict[str, str]:
    """What to take, by what the user cares for; methods at one budget cost the same to train.

    In the order of the score, the methods down to the first one that is worse: a higher score is not recommended
    because its interval is wider.
    """
    ordered = sorted(report.cells, key=lambda cell: (cell.behind_all is not None, cell.scores[report.by].mean))
    best, alike = ordered[0], [*takewhile(lambda cell: not worse(cell.behind_all), ordered)]
    train = min(alike, key=lambda cell: (cell.budget, cell.members, cell.scores[report.by].mean))
    serve = min(alike, key=lambda cell: (cell.members, cell.budget, cell.scores[report.by].mean))
    trained, served = f"{_cost(report, train)}, {_forward(train)}", f"{_forward(serve)}, {_cost(report, serve)}"
    return {
        "Cheapest to train": _recommended(report, train, best, trained, "at smaller budgets"),
        "Cheapest to serve": _recommended(report, serve, best, served, "of fewer forward passes"),
        "Best under shift": _shifted(report),
    }


def _recommended(report: StudyReport, chosen: CellReport, best: CellReport, cost: str, cheaper: str) -> str:
    text = f"{_named(chosen)}: {_judged(report, chosen)}, {cost}"
    lowest = f"the lowest {NAMES[report.by].title} of all"
    if chosen.behind_all is None:
        return f"{text}; it has {lowest}, and nothing {cheaper} comes near enough to be taken instead."
    text += f"; not told apart from {lowest}, {_named(best)} ({_value(best, report.by)})"
    return f"{text}: {within(report.by, chosen.behind_all)} higher."


def _shifted(report: StudyReport) -> str:
    name = f"shifted_{report.by}"
    if name not in report.cells[0].scores:
        return "not measured: name shifted test images with --shift."
    best = next(cell for cell in report.cells if cell.shift_behind is None)
    alike = [cell for cell in report.cells if cell is not best and not worse(cell.shift_behind)]
    alike.sort(key=lambda cell: cell.scores[name].mean)
    text = (
        f"{_named(best)}: {NAMES[name].title} {within(name, best.scores[name])}, {_cost(report, best)}, "
        f"{_forward(best)}"
    )
    named = [f"{_named(cell)} ({_value(cell, name)})" for cell in alike[:_NAMED]]
    named += [f"{len(alike) - _NAMED} more"] if len(alike) > _NAMED else []
    return f"{text}; not told apart from it: {', '.join(named)}." if named else f"{text}; everything else is worse."


def pareto(cells: Sequence[CellReport], cost: str, by: str) -> list[CellReport]:
    """The cells that no other beats in both a cost, ``passes`` or ``members``, and a score; from the cheapest up."""
    front: list[CellReport] = []
    for cell in sorted(cells, key=lambda one: (getattr(one, cost), one.scores[by].mean)):
        if not front or cell.scores[by].mean < front[-1].scores[by].mean:
            front.append(cell)
    return front


def within(name: str, found: Estimate) -> str:
    """A mean with its interval, such as "0.3560 (0.3510 to 0.3610)"."""
    score = NAMES[name]
    return f"{score.write(found.mean)} ({score.write(found.low)} to {score.write(found.high)})"


def _judged(report: StudyReport, cell: CellReport) -> str:
    """A cell's score by which methods are told apart, by its name and with its interval."""
    return f"{NAMES[report.by].title} {within(report.by, cell.scores[report.by])}"


def _value(cell: CellReport, name: str) -> str:
    return NAMES[name].write(cell.scores[name].mean)


def worse(behind: Estimate | None) -> bool:
    """Whether a distance from the best one is told apart from 0."""
    return behind is not None and behind.low > ROUNDING


def _budgets(report: StudyReport) -> list[float]:
    return list(dict.fromkeys(cell.budget for cell in report.cells))


def _at(budget: float) -> str:
    return f"{budget:g} budget{'s' * (budget != 1)}"


def _named(cell: CellReport) -> str:
    return f"{cell.method} at {_at(cell.budget)}"


def _cost(report: StudyReport, cell: CellReport) -> str:
    return f"{compact(cell.passes)} example passes to train ({cell.passes / report.one:.2f} B)"


def _forward(cell: CellReport) -> str:
    return f"{counted(cell.members, 'forward pass', 'forward passes')} a prediction"
