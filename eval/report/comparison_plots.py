"""The comparison's pictures: differences with intervals, members, shift, rejection, and doubt out of distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ensembler.eval.report.plots import STYLES, new_figure
from ensembler.eval.scores.comparison import Difference
from ensembler.eval.scores.members import CurvePoint
from ensembler.eval.scores.metrics import RiskCoverage
from ensembler.eval.scores.shift_scores import ShiftScores

__all__ = ["plot_boxes", "plot_differences", "plot_entropy", "plot_members", "plot_rejection"]

# Score, what an axis calls it, and what to multiply it by.
_SCORES = (("error", "error (%)", 100), ("nll", "NLL (nats)", 1), ("brier", "Brier score", 1), ("ece", "ECE (%)", 100))
_LEAST_KEPT = 0.05
_UNITS = {"error": "error (points)", "nll": "NLL (nats)", "brier": "Brier score", "ece": "ECE (points)"}


def plot_differences(
    names: Sequence[str], baseline: str, differences: Sequence[Mapping[str, Difference]], confidence: float = 0.95
) -> Figure:
    """A forest plot: each run's scores less the baseline's, with intervals; left of the line, the run is better.

    Args:
        names: of the runs.
        baseline: the name of the run that they are compared with.
        differences: of each run, by score.
        confidence: of the intervals.
    """
    figure = new_figure(12, 1.7 + 0.42 * len(names))
    rows = np.arange(len(names))[::-1]
    for axes, (score, _, scale) in zip(figure.subplots(1, 4, sharey=True), _SCORES, strict=True):
        colour, marker = _style(0)
        for row, found in zip(rows, differences, strict=True):
            one = found[score]
            holds_0 = one.low <= 0 <= one.high
            axes.plot([scale * one.low, scale * one.high], [row, row], color=colour, lw=2)
            axes.plot(scale * one.difference, row, marker, color=colour, mfc="white" if holds_0 else colour)
        axes.locator_params(axis="x", nbins=4)
        axes.axvline(0, color="black", lw=1, ls="--")
        axes.set_xlabel(_UNITS[score])
        axes.set_yticks(rows, names)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.grid(alpha=0.3, axis="x")
    figure.suptitle(
        f"Less {baseline}: {confidence:.0%} intervals over test images; left is better, hollow: not told apart from 0",
        fontsize="medium",
    )
    return figure


def plot_members(names: Sequence[str], costs: Sequence[str], curves: Sequence[Sequence[CurvePoint]]) -> Figure:
    """Calibrated NLL and error against the number of members.

    Solid: the mean over random subsets, in a band from the best to the worst. Dashed: in the order that helps most.

    Args:
        names: of the runs.
        costs: of each, what the legend says of its training cost.
        curves: of each.
    """
    figure = new_figure(10, 4.4)
    panels = (("calibrated_nll", "calibrated NLL (nats)", 1), ("error", "error (%)", 100))
    for axes, (score, label, scale) in zip(figure.subplots(1, 2), panels, strict=True):
        for number, (name, cost, points) in enumerate(zip(names, costs, curves, strict=True)):
            colour, marker = _style(number)
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
    _legend(figure, figure.axes[0])
    figure.suptitle("Solid: random members (band: best to worst subset); dashed: in greedy order", fontsize="medium")
    return figure


def plot_boxes(
    names: Sequence[str], shifts: Sequence[ShiftScores], clean: Sequence[Mapping[str, float | None]] | None = None
) -> Figure:
    """Box plots over corruptions at each severity, runs side by side (Ovadia et al. 2019, figure 2).

    Args:
        names: of the runs.
        shifts: of each run.
        clean: each run's scores without shift, drawn as a point at severity 0.
    """
    figure = new_figure(13, 4.2)
    width = 0.8 / len(names)
    panels = [panel for panel in _SCORES if panel[0] != "brier"]
    for axes, (score, label, scale) in zip(figure.subplots(1, 3), panels, strict=True):
        for number, (name, shift) in enumerate(zip(names, shifts, strict=True)):
            colour, marker = _style(number)
            offset = (number + 0.5) * width - 0.4
            boxes = shift.boxes[score]
            stats = [
                {
                    "whislo": scale * box.minimum,
                    "q1": scale * box.lower_quartile,
                    "med": scale * box.median,
                    "q3": scale * box.upper_quartile,
                    "whishi": scale * box.maximum,
                }
                for box in boxes.values()
            ]
            axes.bxp(
                stats,
                positions=[severity + offset for severity in boxes],
                widths=0.85 * width,
                showfliers=False,
                manage_ticks=False,
                patch_artist=True,
                boxprops={"facecolor": colour, "alpha": 0.6, "edgecolor": colour},
                medianprops={"color": "black"},
                whiskerprops={"color": colour},
                capprops={"color": colour},
            )
            value = clean[number].get(score) if clean else None
            axes.plot(
                [offset] * (value is not None), [scale * value] if value is not None else [], marker, color=colour
            )
            axes.plot([], [], "s", color=colour, label=name)
        axes.set(xlabel="severity (0: clean)" if clean else "severity", ylabel=label)
        axes.set_xticks([0, *shifts[0].boxes[score]] if clean else list(shifts[0].boxes[score]))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3, axis="y")
    _legend(figure, figure.axes[0])
    figure.suptitle(
        f"Over {len(shifts[0].headline)} corruptions: median, quartiles, least and greatest", fontsize="medium"
    )
    return figure


def plot_rejection(
    names: Sequence[str], clean: Sequence[RiskCoverage], shifted: Sequence[RiskCoverage] | None = None
) -> Figure:
    """Accuracy of the most confident examples against the share of examples kept: clean, and under shift.

    From 5 % kept: of fewer, a handful of examples decides.
    """
    panels = [("clean", clean), *([("under shift, cells pooled", shifted)] if shifted else [])]
    figure = new_figure(5 * len(panels), 4.2)
    for axes, (title, curves) in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
        for number, (name, one) in enumerate(zip(names, curves, strict=True)):
            drawn = one.coverage >= _LEAST_KEPT
            axes.plot(100 * one.coverage[drawn], 100 * (1 - one.risk[drawn]), color=_style(number)[0], label=name)
        axes.set(xlabel="most confident examples kept (%)", ylabel="accuracy (%)", xlim=(0, 100))
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
    _legend(figure, figure.axes[0])
    return figure


def plot_entropy(
    names: Sequence[str],
    inside: Sequence[NDArray[np.floating]],
    outside: Mapping[str, Sequence[NDArray[np.floating]]],
    classes: int,
) -> Figure:
    """Histograms of the predictive entropy, in distribution (filled) and out of it (lines), one panel a run.

    Args:
        names: of the runs.
        inside: (B,) each run's predictive entropies (nats) of images in distribution.
        outside: title of each set of images out of distribution, then as ``inside``.
        classes: C, of which log C is the largest entropy.
    """
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(4.4 * columns, 3.2 * rows + 0.8)
    grid = np.ravel(figure.subplots(rows, columns, squeeze=False, sharex=True))
    edges = np.linspace(0, max(np.log(classes), 1e-3), 41)
    for number, (axes, name) in enumerate(zip(grid, names, strict=False)):
        _density(axes, inside[number], edges, "#777777", "in distribution", filled=True)
        for place, (title, values) in enumerate(outside.items()):
            _density(axes, values[number], edges, _style(place)[0], title, filled=False)
        axes.set(xlabel="predictive entropy (nats)", ylabel="share of images", xlim=(0, edges[-1]))
        axes.set_title(name, fontsize="medium")
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    _legend(figure, grid[0])
    return figure


def _density(
    axes: Axes, values: NDArray[np.floating], edges: NDArray[np.float64], colour: str, label: str, *, filled: bool
) -> None:
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    axes.stairs(counts / max(1, len(values)), edges, color=colour, fill=filled, alpha=0.6 if filled else 1, label=label)


def _style(number: int) -> tuple[str, str]:
    return STYLES[number % len(STYLES)]


def _legend(figure: Figure, axes: Axes) -> None:
    """One for all panels, below them."""
    handles, labels = axes.get_legend_handles_labels()
    columns = min(3, max(1, len(labels)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
