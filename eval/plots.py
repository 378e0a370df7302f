"""The evaluation's pictures, as PNG: error and NLL by severity, and reliability diagrams."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ensembler.eval.evaluation import Diagrams
from ensembler.eval.metrics import Reliability
from ensembler.eval.report import Report

__all__ = ["STYLES", "new_figure", "plot_reliability", "plot_severity", "to_png"]

# Okabe and Ito's colours, told apart by colour-blind readers; the markers tell them apart in print.
STYLES = tuple(
    zip(("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"), "osD^vP*", strict=True)
)


def plot_severity(report: Report) -> bytes:
    """Error and NLL of each run, clean (severity 0) and as the mean over corruptions at each severity."""
    figure = new_figure(10, 4.2)
    for axes, name, label, scale in zip(
        figure.subplots(1, 2), ("error", "nll"), ("error (%)", "NLL (nats)"), (100, 1), strict=True
    ):
        for number, run in enumerate(report.runs):
            columns = {0: run.clean} | run.by_severity
            colour, marker = STYLES[number % len(STYLES)]
            axes.plot(
                list(columns),
                [getattr(scores, name) * scale for scores in columns.values()],
                color=colour,
                marker=marker,
                label=_legend(report, number),
            )
        axes.set_xlabel("severity (0: clean)")
        axes.set_ylabel(label)
        axes.set_xticks(list(columns))
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
    figure.axes[0].legend(frameon=False, fontsize="small")
    _title(figure, report)
    return to_png(figure)


def plot_reliability(report: Report, diagrams: Sequence[Diagrams]) -> bytes:
    """Accuracy against confidence in 15 bins, one row a run: clean, and pooled over the shift's headline cells."""
    shifted = report.shift is not None
    rows, columns = len(diagrams), 2 if shifted else 1
    figure = new_figure(4.2 * columns, 3.6 * rows + 0.4)
    grid = np.array(figure.subplots(rows, columns, squeeze=False))
    for number, (row, diagram) in enumerate(zip(grid, diagrams, strict=True)):
        run = report.runs[number]
        _reliability(row[0], diagram.clean, number, f"{_legend(report, number)}\nclean, ECE {run.clean.ece:.2%}")
        if diagram.shifted is not None and report.shift is not None:
            title = f"{_legend(report, number)}\nunder shift ({report.shift.source}), severities pooled"
            _reliability(row[1], diagram.shifted, number, title)
    _title(figure, report)
    return to_png(figure)


def _reliability(axes: Axes, bins: Reliability, number: int, title: str) -> None:
    used = bins.count > 0
    edges = np.linspace(0, 1, len(bins.count) + 1)
    width = edges[1] - edges[0]
    colour, _ = STYLES[number % len(STYLES)]
    axes.bar(edges[:-1][used], bins.accuracy[used], width, align="edge", color=colour, alpha=0.75, edgecolor="white")
    share = bins.count / max(1, bins.count.sum())
    axes.step(np.append(edges[:-1], 1), np.append(share, share[-1]), where="post", color="#777777", lw=1)
    axes.plot([0, 1], [0, 1], color="black", lw=1, ls="--")
    axes.plot(bins.confidence[used], bins.accuracy[used], color="black", marker=".", lw=0)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy (bars), share of images (line)")
    axes.set_title(title, fontsize="small")


def _legend(report: Report, number: int) -> str:
    run = report.runs[number]
    passes = run.training_example_passes
    cost = f"{passes / 1e6:.1f}M" if passes >= 1e6 else f"{passes / 1e3:.0f}k"
    return f"{run.method}, M = {run.members}, {cost} passes"


def _title(figure: Figure, report: Report) -> None:
    shift = "" if report.shift is None else f"; shift: {report.shift.source}, {len(report.shift.headline)} corruptions"
    figure.suptitle(f"{report.dataset}, {report.test_examples:,} test images{shift}", fontsize="medium")


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
