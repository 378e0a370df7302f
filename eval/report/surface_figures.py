"""Plots of a surface: contours on the plane, and measures along paths."""

from __future__ import annotations

import matplotlib.patheffects as effects
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ensembler.eval.report.plots import add_legend, drawable, name_figure, new_figure, scale_by_log, style, to_png
from ensembler.eval.surface import Surface

__all__ = ["draw_surface", "plot_paths", "plot_surface"]

Array = NDArray[np.float64]

_LEVELS = 13
_NARROWEST = 4  # times longer than wide, beyond which a plane is drawn wider than it is


def plot_surface(surface: Surface) -> bytes:
    """Plot the plane as PNG; see :func:`draw_surface`."""
    return to_png(draw_surface(surface))


def draw_surface(surface: Surface) -> Figure:
    """Draw the plane in two panels of filled contours, train loss and test error, with marked corners.

    The panels are squares of the same size whatever the plane's proportions; grey is beyond it.
    """
    figure = new_figure(11, 5.6)
    left, right = figure.subplots(1, 2)
    _contours(left, surface, np.array(surface.train_loss), 1e-6, "train loss (nats)")
    _contours(right, surface, 100 * np.array(surface.test_error), 50 / surface.test_examples, "test error (%)")
    if surface.curve or surface.members:
        add_legend(figure)
    name_figure(
        figure,
        _title(surface),
        f"{surface.train_examples:,} training and {surface.test_examples:,} test images "
        f"at each of {len(surface.x)} x {len(surface.y)} points",
    )
    return figure


def _title(surface: Surface) -> str:
    corners = [f"{corner.label}: {corner.run}" for corner in surface.corners]
    names = corners if len(surface.methods) > 1 else [surface.corners[0].run]
    return ", ".join(map(drawable, (surface.dataset, surface.architecture, *names)))


def _contours(axes: Axes, surface: Surface, values: Array, floor: float, title: str) -> None:
    """Draw contours at logarithmic levels: values differ by orders of magnitude."""
    logs = np.log(np.maximum(values, floor))
    levels = np.linspace(logs.min() - 1e-6, logs.max() + 1e-6, _LEVELS)
    filled = axes.contourf(surface.x, surface.y, logs, levels, cmap="viridis")
    axes.contour(surface.x, surface.y, logs, levels, colors="white", linewidths=0.4, linestyles="solid", alpha=0.6)
    axes.set(title=title, facecolor="#e6e6e6")
    _make_square(axes, surface)
    bar = axes.figure.colorbar(filled, cax=axes.inset_axes((1.04, 0, 0.04, 1)))
    bar.set_ticks(levels[::3].tolist(), labels=[_number(level) for level in np.exp(levels[::3]).tolist()])
    outlined = [effects.withStroke(linewidth=4, foreground="black")]
    if surface.curve:
        places = zip(*surface.curve, strict=True)
        axes.plot(*places, color="white", lw=2, label="the curve", path_effects=outlined)
    middle = np.mean([corner.x for corner in surface.corners])
    for corner in surface.corners:
        axes.plot(corner.x, corner.y, "o", color="#D55E00", mec="white", ms=11)
        side = 1 if corner.x > middle else -1
        text = axes.annotate(
            corner.label,
            (corner.x, corner.y),
            (10 * side, 0),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="center_baseline",
            weight="bold",
        )
        text.set_path_effects([effects.withStroke(linewidth=3, foreground="white")])
    if surface.members:
        places = zip(*surface.members, strict=True)
        axes.plot(*places, "o", color="black", mec="white", ms=4, label="members")


def _make_square(axes: Axes, surface: Surface) -> None:
    """Show the plane in the middle of a square panel, at one scale in both directions unless it is very narrow."""
    middles = [(ends[-1] + ends[0]) / 2 for ends in (surface.x, surface.y)]
    extents = [surface.x[-1] - surface.x[0], surface.y[-1] - surface.y[0]]
    stretch = max(1.0, max(extents) / (_NARROWEST * min(extents)))
    limits = []
    for axis, middle, extent in zip((axes.xaxis, axes.yaxis), middles, extents, strict=True):
        narrow = extent == min(extents) and stretch > 1
        half = max(extents) / (stretch if narrow else 1) / 2
        limits.append((middle - half, middle + half))
        axis.set_label_text("distance in weight space" + (f" ({stretch:.3g} times as large)" if narrow else ""))
    axes.set(xlim=limits[0], ylim=limits[1])
    axes.set_box_aspect(1)


def _number(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def plot_paths(surface: Surface) -> bytes:
    """Plot train loss, test error, and the error of the ensemble of the first end and the point at t, a row per path.

    As in Garipov et al. 2018, figure 2.
    """
    rows = len(surface.paths)
    figure = new_figure(12, 3.3 * rows + 0.5)
    columns = (
        ("train_loss", "train loss (nats)", 1),
        ("test_error", "test error (%)", 100),
        ("ensemble_error", "error of t = 0 and t together (%)", 100),
    )
    for row, path in zip(figure.subplots(rows, 3, squeeze=False), surface.paths, strict=True):
        for axes, (column, label, scale) in zip(row, columns, strict=True):
            for number, (name, way) in enumerate(path.ways.items()):
                line = name == "line"
                axes.plot(
                    way.t,
                    scale * np.array(getattr(way, column)),
                    color=style(number)[0],
                    ls="--" if line else "-",
                    label="straight line" if line else name,
                )
            axes.set(xlabel="t", ylabel=label, xlim=(0, 1))
            axes.grid(alpha=0.3)
        scale_by_log(row[0])
        row[0].legend(frameon=False, fontsize="small")
        row[1].set_title(drawable(path.name), fontsize="medium")
    name_figure(figure, _title(surface))
    return to_png(figure)
