"""The evaluation's own pictures: scores by severity and reliability diagrams; and what all pictures share."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ensembler.eval.report.schema import RunReport
from ensembler.eval.scores.metrics import Reliability

__all__ = ["STYLES", "new_figure", "plot_reliability", "plot_severity", "to_png", "to_svg"]

_SCORES = (("error", "error (%)", 100), ("nll", "NLL (nats)", 1), ("ece", "ECE (%)", 100))

# Okabe and Ito's colours, told apart by colour-blind readers; the markers tell them apart in print.
STYLES = tuple(
    zip(("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"), "osD^vP*", strict=True)
)


def plot_severity(names: Sequence[str], runs: Sequence[RunReport]) -> Figure:
    """Error, NLL and ECE of each run, clean (severity 0) and as the mean over corruptions at each severity."""
    figure = new_figure(13, 4.2)
    for axes, (name, title, scale) in zip(figure.subplots(1, 3), _SCORES, strict=True):
        for number, (label, run) in enumerate(zip(names, runs, strict=True)):
            columns = {0: run.clean} | run.by_severity
            colour, marker = STYLES[number % len(STYLES)]
            values = [getattr(scores, name) * scale for scores in columns.values()]
            axes.plot(list(columns), values, color=colour, marker=marker, label=label)
        axes.set(xlabel="severity (0: clean)", ylabel=title, xticks=[0, *runs[0].by_severity])
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def plot_reliability(names: Sequence[str], diagrams: Sequence[Reliability]) -> Figure:
    """Accuracy against confidence, a panel a run; dots stand at a bin's mean confidence, the line is its share."""
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(3.2 * columns, 3.1 * rows)
    grid = np.ravel(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True))
    for number, (axes, name, diagram) in enumerate(zip(grid, names, diagrams, strict=False)):
        _reliability(axes, diagram, number)
        axes.set_title(name, fontsize="small")
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    figure.supxlabel("confidence", fontsize="medium")
    figure.supylabel("accuracy (bars), share of images (line)", fontsize="medium")
    return figure


def _reliability(axes: Axes, bins: Reliability, number: int) -> None:
    used = bins.count > 0
    edges = np.linspace(0, 1, len(bins.count) + 1)
    width = edges[1] - edges[0]
    colour, _ = STYLES[number % len(STYLES)]
    axes.bar(edges[:-1][used], bins.accuracy[used], width, align="edge", color=colour, alpha=0.75, edgecolor="white")
    share = bins.count / max(1, bins.count.sum())
    axes.step(np.append(edges[:-1], 1), np.append(share, share[-1]), where="post", color="#777777", lw=1)
    axes.plot([0, 1], [0, 1], color="black", lw=1, ls="--")
    axes.plot(bins.confidence[used], bins.accuracy[used], color="black", marker=".", lw=0)
    axes.set(xlim=(0, 1), ylim=(0, 1))


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, its size in inches."""
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Figure) -> bytes:
    """The figure as PNG; the same figure always gives the same bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})  # matplotlib would write its version
    return content.getvalue()


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG, its text as outlines; the same figure always gives the same bytes."""
    content = io.BytesIO()
    with rc_context({"svg.hashsalt": "ensembler"}):  # else its ids are drawn anew each time
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return content.getvalue()
