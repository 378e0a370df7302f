"""Plots of classes: which are confused, and each one's error under each corruption."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ensembler.eval.report.plots import name_panel, new_figure, panels
from ensembler.eval.report.styles import Style

__all__ = ["plot_class_errors", "plot_confusion"]

_DARK = 0.55  # of the scale, from which text is white
_WIDEST = 13.0  # inches of a figure


def plot_confusion(
    names: Sequence[str], styles: Sequence[Style], counts: Sequence[Sequence[Sequence[int]]], classes: Sequence[str]
) -> Figure:
    """Draw each run's confusion matrix; darkness: the share of the class, a row; numbers: images, 0 left out.

    Args:
        names, styles: of the runs.
        counts: (C, C) of each.
        classes: the C names.
    """
    cells = 0.27 * len(classes)
    side = 1.3 + cells + _room(classes)
    columns = min(len(names), max(1, int(_WIDEST // side)))
    figure = new_figure(max(4.5, side * columns), side * -(-len(names) // columns))
    for axes, name, own, table in zip(panels(figure, len(names), columns), names, styles, counts, strict=True):
        matrix = np.array(table)
        shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
        _cells(axes, shares, _shades(own.colour), 1)
        axes.set_aspect("equal")
        for row, column in zip(*np.nonzero(matrix), strict=True):
            text = "white" if shares[row, column] > _DARK else "black"
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize="x-small", color=text)
        _ticks(axes, classes, classes)
        axes.set(xlabel="predicted class", ylabel="class")
        name_panel(axes, name, max(1.5, cells), own.colour)
    return figure


def plot_class_errors(
    names: Sequence[str],
    styles: Sequence[Style],
    errors: Sequence[Mapping[str, Mapping[str, float | None]]],
    write: Callable[[str], str] = str,
) -> Figure:
    """Draw each run's error by class and corruption, on one scale from 0 to 100 %.

    Args:
        names, styles: of the runs.
        errors: of each, by corruption and class.
        write: writes a class's name.
    """
    corruptions = list(errors[0])
    most = max(len(next(iter(found.values()))) for found in errors)
    cells = 0.24 * len(corruptions)
    width = 1.4 + cells + _room([write(each) for found in errors for each in next(iter(found.values()))])
    columns = min(len(names), max(1, int(_WIDEST // width)))
    figure = new_figure(max(5.0, columns * width) + 0.8, -(-len(names) // columns) * (2.0 + 0.2 * most))
    grid = panels(figure, len(names), columns)
    for axes, name, own, found in zip(grid, names, styles, errors, strict=True):
        shown = list(next(iter(found.values())))
        values = [[found[one][each] for one in corruptions] for each in shown]
        _cells(axes, 100 * np.array(values, dtype=np.float64), "Greys", 100)
        _ticks(axes, corruptions, [write(each) for each in shown])
        axes.set(ylabel="class")
        name_panel(axes, name, max(1.5, cells), own.colour)
    bar = ScalarMappable(Normalize(0, 100), "Greys")
    scale = figure.colorbar(bar, ax=grid, label="error (%)", fraction=0.03, aspect=30)
    if scale.solids is not None:
        scale.solids.set(rasterized=False, edgecolor="face")  # no seams between the shades
    return figure


def _cells(axes: Axes, values: NDArray[np.float64], shades: Colormap | str, most: float) -> None:
    """Draw a matrix from 0 to ``most``, the first row on top; not ``imshow``, whose SVG holds pixels."""
    rows, columns = (np.arange(count + 1) - 0.5 for count in values.shape)
    axes.pcolormesh(columns, rows, values, cmap=shades, vmin=0, vmax=most)
    axes.invert_yaxis()


def _room(classes: Sequence[str]) -> float:
    """Return the inches that the longest name takes beside a matrix."""
    return 0.06 * max(map(len, classes), default=0)


def _ticks(axes: Axes, across: Sequence[str], down: Sequence[str]) -> None:
    axes.set_xticks(range(len(across)), across, rotation=90, fontsize="x-small")
    axes.set_yticks(range(len(down)), down, fontsize="x-small")


def _shades(colour: str) -> LinearSegmentedColormap:
    return LinearSegmentedColormap.from_list(colour, ["white", colour])
