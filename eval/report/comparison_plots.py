"""Plots of a comparison: differences with intervals, and scores against the number of members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from ensembler.eval.metrics.comparison import Difference
from ensembler.eval.metrics.members import CurvePoint
from ensembler.eval.report.notation import percent
from ensembler.eval.report.plots import add_legend, name_figure, new_figure
from ensembler.eval.report.styles import Style

__all__ = ["plot_differences", "plot_members"]

# Score, what its axis says, and what to multiply it by.
_DIFFERENCES = (
    ("error", "error (points)", 100),
    ("nll", "NLL (nats)", 1),
    ("brier", "Brier score", 1),
    ("ece", "ECE (points)", 100),
)


def plot_differences(
    names: Sequence[str],
    styles: Sequence[Style],
    baseline: str,
    differences: Sequence[Mapping[str, Difference]],
    confidence: float = 0.95,
) -> Figure:
    """Draw a forest plot of each run's differences from the baseline; left of the line, the run is better.

    Args:
        names, styles: of the runs.
        baseline: the name of the run that they are compared with.
        differences: of each run, by score.
        confidence: of the intervals.
    """
    figure = new_figure(12, 1.7 + 0.42 * len(names))
    rows = np.arange(len(names))[::-1]
    for axes, (score, label, scale) in zip(figure.subplots(1, 4, sharey=True), _DIFFERENCES, strict=True):
        for row, (colour, marker, _), found in zip(rows, styles, differences, strict=True):
            one = found[score]
            holds_0 = one.low <= 0 <= one.high
            axes.plot([scale * one.low, scale * one.high], [row, row], color=colour, lw=2)
            axes.plot(scale * one.difference, row, marker, color=colour, mfc="white" if holds_0 else colour)
        axes.locator_params(axis="x", nbins=4)
        axes.axvline(0, color="black", lw=1, ls="--")
        axes.set_xlabel(label)
        axes.set_yticks(rows, names)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.grid(alpha=0.3, axis="x")
    name_figure(
        figure,
        f"Differences from {baseline}, with {percent(confidence)} intervals; left is better, hollow: not significant",
    )
    return figure


def plot_members(
    names: Sequence[str], styles: Sequence[Style], costs: Sequence[str], curves: Sequence[Sequence[CurvePoint]]
) -> Figure:
    """Plot calibrated NLL and error against the number of members.

    Solid: the mean over random subsets, with a band from the best to the worst. Dashed: the greedy order.

    Args:
        names, styles: of the runs.
        costs: of each, the training cost in the legend.
        curves: of each.
    """
    figure = new_figure(10, 4.4)
    panels = (("calibrated_nll", "calibrated NLL (nats)", 1), ("error", "error (%)", 100))
    for axes, (score, label, scale) in zip(figure.subplots(1, 2), panels, strict=True):
        for name, (colour, marker, _), cost, points in zip(names, styles, costs, curves, strict=True):
            sizes = np.array([point.members for point in points])
            spreads = [getattr(point, score) for point in points]
            low, mean, high = (
                scale * np.array([getattr(found, end) for found in spreads]) for end in ("low", "mean", "high")
            )
            axes.fill_between(sizes, low, high, color=colour, alpha=0.15, lw=0)
            axes.plot(sizes, mean, color=colour, marker=marker, ms=4, label=f"{name} ({cost})")
            ordered = [(p.members, scale * getattr(p.ordered, score)) for p in points if p.ordered is not None]
            if ordered:
                axes.plot(*zip(*ordered, strict=True), color=colour, ls="--", lw=1.2)
        axes.set(xlabel="members", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    add_legend(figure)
    name_figure(figure, "Solid: random members (band: best to worst subset); dashed: in greedy order")
    return figure
