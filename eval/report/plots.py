"""Plots of an evaluation: reliability, shift, selective prediction and uncertainty; and what all plots share."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any
from unicodedata import bidirectional

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cbook import boxplot_stats
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import LogFormatter
from numpy.typing import NDArray

from ensembler.eval.metrics.selective import Reliability, RiskCoverage
from ensembler.eval.report.notation import percent
from ensembler.eval.report.schema import RunReport
from ensembler.eval.report.styles import PALETTE, Style

__all__ = [
    "add_legend",
    "drawable",
    "name_figure",
    "name_panel",
    "new_figure",
    "panels",
    "plot_boxes",
    "plot_entropy",
    "plot_map",
    "plot_rejection",
    "plot_reliability",
    "plot_severity",
    "scale_by_log",
    "settle",
    "style",
    "to_png",
    "to_svg",
]

_SCORES = (("error", "error (%)", 100), ("nll", "NLL (nats)", 1), ("ece", "ECE (%)", 100))

_DASHES = ("-", "--", ":", "-.")
_LONGEST = 40  # characters of a name
_NUMBERED = 12  # members of a run, at most, whose numbers are written in a map
_LEAST_KEPT = 0.05  # share of the examples below which the accuracy is noise


def plot_severity(names: Sequence[str], styles: Sequence[Style], runs: Sequence[RunReport]) -> Figure:
    """Plot error, NLL and ECE of each run, clean (severity 0) and as means over corruptions at each severity."""
    figure = new_figure(13, 4.2)
    for axes, (name, title, scale) in zip(figure.subplots(1, 3), _SCORES, strict=True):
        for label, own, run in zip(names, styles, runs, strict=True):
            columns = {0: run.clean} | run.by_severity
            values = [getattr(scores, name) * scale for scores in columns.values()]
            axes.plot(list(columns), values, color=own.colour, marker=own.marker, ls=own.line, label=label)
        axes.set(xlabel="severity (0: clean)", ylabel=title, xticks=[0, *runs[0].by_severity])
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
    add_legend(figure)
    return figure


def plot_reliability(names: Sequence[str], styles: Sequence[Style], diagrams: Sequence[Reliability]) -> Figure:
    """Plot accuracy against confidence, a panel per run; dots are at mean confidences, the line is a bin's share."""
    columns = min(4, len(names))
    figure = new_figure(3.2 * columns, 3.1 * -(-len(names) // columns))
    grid = panels(figure, len(names), columns, sharex=True, sharey=True)
    for axes, name, own, diagram in zip(grid, names, styles, diagrams, strict=True):
        _reliability(axes, diagram, own.colour)
        name_panel(axes, name, 2.7)
    figure.supxlabel("confidence", fontsize="medium")
    figure.supylabel("accuracy (bars), share of images (line)", fontsize="medium")
    return figure


def _reliability(axes: Axes, bins: Reliability, colour: str) -> None:
    used = bins.count > 0
    edges = np.linspace(0, 1, len(bins.count) + 1)
    width = edges[1] - edges[0]
    axes.bar(edges[:-1][used], bins.accuracy[used], width, align="edge", color=colour, alpha=0.75, edgecolor="white")
    share = bins.count / max(1, bins.count.sum())
    axes.step(np.append(edges[:-1], 1), np.append(share, share[-1]), where="post", color="#777777", lw=1)
    axes.plot([0, 1], [0, 1], color="black", lw=1, ls="--")
    axes.plot(bins.confidence[used], bins.accuracy[used], color="black", marker=".", lw=0)
    axes.set(xlim=(0, 1), ylim=(0, 1))


def plot_boxes(
    names: Sequence[str], styles: Sequence[Style], runs: Sequence[RunReport], headline: Sequence[str]
) -> Figure:
    """Draw box plots over the headline corruptions at each severity, as in Ovadia et al. 2019, figure 2.

    The clean score is a point at severity 0. https://arxiv.org/abs/1906.02530
    """
    figure = new_figure(13, 4.2)
    width = 0.8 / len(names)
    levels = list(runs[0].by_severity)
    for axes, (score, label, scale) in zip(figure.subplots(1, 3), _SCORES, strict=True):
        for number, (name, own, run) in enumerate(zip(names, styles, runs, strict=True)):
            colour = own.colour
            offset = (number + 0.5) * width - 0.4
            values = [[scale * getattr(run.cells[one][level], score) for one in headline] for level in levels]
            axes.bxp(
                [boxplot_stats(each, whis=(0, 100))[0] for each in values],
                positions=[level + offset for level in levels],
                widths=0.85 * width,
                showfliers=False,
                manage_ticks=False,
                patch_artist=True,
                boxprops={"facecolor": colour, "alpha": 0.6, "edgecolor": colour},
                medianprops={"color": "black"},
                whiskerprops={"color": colour},
                capprops={"color": colour},
            )
            axes.plot([offset], [scale * getattr(run.clean, score)], own.marker, color=colour)
            axes.plot([], [], "s", color=colour, label=name)
        axes.set(xlabel="severity (0: clean)", ylabel=label)
        axes.set_xticks([0, *levels])
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3, axis="y")
    add_legend(figure)
    name_figure(figure, f"Over {len(headline)} corruptions: median, quartiles, minimum and maximum")
    return figure


def plot_rejection(
    names: Sequence[str],
    styles: Sequence[Style],
    clean: Sequence[RiskCoverage],
    shifted: Sequence[RiskCoverage] | None = None,
) -> Figure:
    """Plot the accuracy of the most confident examples against the share of examples kept, from 5 % on."""
    panels = [("clean", clean), *([("under shift, cells pooled", shifted)] if shifted else [])]
    figure = new_figure(5 * len(panels), 4.2)
    for axes, (title, curves) in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
        for name, own, one in zip(names, styles, curves, strict=True):
            drawn = one.coverage >= _LEAST_KEPT
            kept, right = 100 * one.coverage[drawn], 100 * (1 - one.risk[drawn])
            axes.plot(kept, right, color=own.colour, ls=own.line, label=name)
        axes.set(xlabel="most confident examples kept (%)", ylabel="accuracy (%)", xlim=(0, 100))
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
    add_legend(figure)
    return figure


def plot_entropy(
    names: Sequence[str],
    styles: Sequence[Style],
    inside: Sequence[NDArray[np.floating]],
    outside: Mapping[str, Sequence[NDArray[np.floating]]],
    classes: int,
) -> Figure:
    """Draw histograms of the predictive entropy in (filled) and out of distribution (lines), a panel per run.

    Args:
        names, styles: of the runs.
        inside: (B,) each run's predictive entropies (nats) of images in distribution.
        outside: the same for each set of images out of distribution, by title.
        classes: C; log C is the largest entropy.
    """
    columns = min(3, len(names))
    figure = new_figure(4.4 * columns, 3.2 * -(-len(names) // columns) + 0.8)
    grid = panels(figure, len(names), columns, sharex=True)
    edges = np.linspace(0, max(np.log(classes), 1e-3), 41)
    for number, (axes, name) in enumerate(zip(grid, names, strict=True)):
        _density(axes, inside[number], edges, "in distribution", color=styles[number].colour, fill=True, alpha=0.6)
        for place, (title, values) in enumerate(outside.items()):
            ls, grey = _DASHES[place % len(_DASHES)], str(0.2 * (place // len(_DASHES) % 4))
            _density(axes, values[number], edges, title, color=grey, ls=ls, lw=1.3)
        axes.set(xlabel="predictive entropy (nats)", ylabel="share of images", xlim=(0, edges[-1]))
        name_panel(axes, name, 3.7)
    add_legend(figure)
    return figure


def _density(axes: Axes, values: NDArray[np.floating], edges: NDArray[np.float64], label: str, **drawing: Any) -> None:
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    axes.stairs(counts / max(1, len(values)), edges, label=label, **drawing)


def plot_map(
    names: Sequence[str],
    styles: Sequence[Style],
    points: Sequence[NDArray[np.float64]],
    shares: NDArray[np.float64],
) -> Figure:
    """Plot members as points of a map, in the colour of their run.

    Args:
        names, styles: of the runs.
        points: (M, 2) of each run.
        shares: (2,) of the squared distances that each axis holds.
    """
    figure = new_figure(6.5, 6.2)
    axes = figure.subplots()
    for label, (colour, marker, _), own in zip(names, styles, points, strict=True):
        drawing: dict[str, Any] = {"color": colour, "marker": marker, "edgecolors": "white", "zorder": 3, "alpha": 0.7}
        axes.scatter(own[:, 0], own[:, 1], s=70, label=label, **drawing)
        for member, place in enumerate(own if len(own) <= _NUMBERED else (), start=1):
            axes.annotate(str(member), place, (5, 5), textcoords="offset points", fontsize="x-small", color=colour)
    across, up = (f"{percent(share)} of the squared distances" for share in shares)
    axes.set(xlabel=across, ylabel=up)
    every = np.concatenate(points)
    low, high = every.min(axis=0), every.max(axis=0)
    half = 0.6 * max(high - low)  # a tenth of the panel stays free around the outermost members and their numbers
    x, y = (low + high) / 2
    axes.set(xlim=(x - half, x + half), ylim=(y - half, y + half))
    axes.set_aspect("equal")
    axes.grid(alpha=0.3)
    add_legend(figure)
    return figure


def style(number: int) -> tuple[str, str]:
    """Return the colour and marker of the n-th of several lines that are no runs."""
    return PALETTE[number % len(PALETTE)][:2]


def panels(figure: Figure, count: int, columns: int, **shared: Any) -> list[Axes]:
    """Add panels in rows; the lowest of each column has the tick labels of a shared axis."""
    grid = np.ravel(figure.subplots(-(-count // columns), columns, squeeze=False, **shared))
    for axes in grid[count:]:
        axes.remove()
    for axes in grid[max(0, count - columns) : count]:
        axes.tick_params(labelbottom=True)
    return list(grid[:count])


def drawable(text: str, longest: int = _LONGEST) -> str:
    """Escape a name for matplotlib: no formulas, and "?" for what its font lacks or it cannot set, as Arabic."""
    known = get_font(findfont("DejaVu Sans"))
    short = text if len(text) <= longest else f"{text[: longest - longest // 3 - 2]}…{text[-(longest // 3 + 1) :]}"
    letters = (
        letter if known.get_char_index(ord(letter)) and bidirectional(letter) not in ("R", "AL", "AN") else "?"
        for letter in short
    )
    return "".join(letters).replace("$", r"\$")


def name_figure(figure: Figure, *lines: str) -> None:
    """Write lines above a figure, broken where they are wider than it."""
    most = int(11 * figure.get_figwidth())
    figure.suptitle("\n".join(textwrap.fill(line, most) for line in lines), fontsize="medium")


def name_panel(axes: Axes, name: str, inches: float, colour: str = "black") -> None:
    """Write a run's name above its panel, in as many lines as it needs at that width."""
    axes.set_title(textwrap.fill(name, max(8, int(13 * inches))), fontsize="small", color=colour)


class _Plain(LogFormatter):
    """Plain numbers, such as 0.6 and 2, wherever matplotlib labels a logarithmic axis."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def scale_by_log(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers instead of powers of ten."""
    axes.set_yscale("log")
    for labels in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        labels(_Plain(minor_thresholds=(2, 0.5)))


def add_legend(figure: Figure, most: int = 3) -> None:
    """Add one legend for all panels, below them, in as many columns as fit, ``most`` at most."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    widest = 0.6 + 0.075 * max(map(len, labels), default=0)  # inches, with the handle
    columns = max(1, min(most, len(labels), int(figure.get_figwidth() / widest)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")


def new_figure(width: float, height: float) -> Figure:
    """Create an empty figure, of a size in inches."""
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def settle(figure: Figure) -> None:
    """Lay a figure out for good: whichever file of it is written first, both are alike."""
    for _ in range(2):  # panels of a fixed shape find their size in the first, and their titles room in the second
        figure.draw_without_rendering()
    figure.set_layout_engine("none")


def to_png(figure: Figure) -> bytes:
    """Render a figure as PNG; the same figure gives the same bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})  # matplotlib would write its version
    return content.getvalue()


def to_svg(figure: Figure) -> bytes:
    """Render a figure as SVG, with text as outlines; the same figure gives the same bytes."""
    content = io.BytesIO()
    with rc_context({"svg.hashsalt": "ensembler"}):  # fixes the ids
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return content.getvalue()
