"""Figures of a study: its Pareto fronts."""

from __future__ import annotations

from ensembler.eval.report.figures import Picture
from ensembler.eval.report.notation import percent
from ensembler.eval.report.plots import add_legend, drawable, new_figure, settle
from ensembler.eval.report.styles import styles
from ensembler.study.schema import CellReport, StudyReport
from ensembler.study.sentences import NAMES, pareto

__all__ = ["figures"]

_COSTS = {
    "passes": ("training", "example passes of training, in B"),
    "members": ("serving", "forward passes a prediction"),
}


_ASIDE = 0.006  # of the axis: methods of equal cost would hide one another


def figures(report: StudyReport) -> dict[str, Picture]:
    """Draw what methods are judged by against the cost of training and of serving, by the names of their files."""
    return {f"pareto-{name}": _picture(report, cost, title) for cost, (name, title) in _COSTS.items()}


def _picture(report: StudyReport, cost: str, title: str) -> Picture:
    figure = new_figure(9, 5)
    axes = figure.subplots()
    unit = report.one if cost == "passes" else 1

    def at(cell: CellReport) -> float:
        return float(getattr(cell, cost) / unit)

    methods = list(dict.fromkeys(cell.method for cell in report.cells))
    reach = max(map(at, report.cells)) - min(map(at, report.cells)) or 1.0
    for number, (method, own) in enumerate(zip(methods, styles([(one, one) for one in methods]), strict=True)):
        aside = _ASIDE * reach * (number - (len(methods) - 1) / 2)
        cells = sorted((cell for cell in report.cells if cell.method == method), key=lambda one: one.budget)
        found = [cell.scores[report.by] for cell in cells]
        values = [one.mean for one in found]
        axes.errorbar(
            [at(cell) + aside for cell in cells],
            values,
            yerr=[[one.mean - one.low for one in found], [one.high - one.mean for one in found]],
            color=own.colour,
            marker=own.marker,
            capsize=3,
            lw=0.8,
            ls=own.line,
            label=drawable(method),
        )
    front, score = pareto(report.cells, cost, report.by), NAMES[report.by].title
    best = [cell.scores[report.by].mean for cell in front]
    axes.plot([at(cell) for cell in front], best, color="black", lw=2, alpha=0.4)
    axes.set(xlabel=title, ylabel=f"{score} (nats)")
    axes.grid(alpha=0.3)
    add_legend(figure)
    settle(figure)
    named = ", ".join(f"{cell.method} at {cell.budget:g}" for cell in front)
    score = score[0].upper() + score[1:]
    caption = (
        f"{score} against {title}, with {percent(report.confidence)} intervals; lines join a method's budgets, and "
        f"methods stand a little aside of one another. Grey: the Pareto front, which nothing beats in both: {named}."
    )
    return Picture("pareto", figure, caption, f"{score} of every method and budget against {title}.")
