"""Plots of a run's simplexes: in three dimensions, along their edges, and over their faces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.tri import Triangulation
from mpl_toolkits.mplot3d.art3d import Line3DCollection, Poly3DCollection
from numpy.typing import NDArray

from ensembler.eval.report.notation import percent
from ensembler.eval.report.plots import (
    add_legend,
    drawable,
    name_figure,
    new_figure,
    panels,
    scale_by_log,
    style,
    to_png,
)
from ensembler.eval.simplexes import Face, Simplexes
from ensembler.text import counted

__all__ = ["plot_edges", "plot_faces", "plot_simplexes"]

Array = NDArray[np.float64]

_MAP = "viridis"
_DASHES = ("-", "--", ":", "-.")
_COLOURS = 7
_CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(0.75)]])
_MEASURES = (("train_loss", "train loss (nats)", 1.0), ("test_error", "test error (%)", 100.0))


def plot_simplexes(found: Simplexes) -> bytes:
    """Plot the projection of vertices, edges and faces on three dimensions, coloured by loss and by error."""
    figure = new_figure(12, 5.6)
    places = np.array([vertex.place for vertex in found.vertices])
    reach = 1.05 * np.abs(places).max(axis=0)
    reach = np.maximum(reach, 0.35 * reach.max())
    for number, (measure, title, scale) in enumerate(_MEASURES):
        axes = figure.add_subplot(1, 2, number + 1, projection="3d")
        axes.computed_zorder = False  # names would be hidden by faces
        norm = _norm(found, measure, scale)
        shade = ScalarMappable(norm, _MAP)
        for face in found.faces:
            triangles, rows = _triangles(face), np.array(face.points) @ places[list(face.corners)]
            values = scale * np.array(getattr(face, measure))[triangles].mean(axis=1)
            axes.add_collection3d(Poly3DCollection(rows[triangles], facecolors=shade.to_rgba(values, alpha=0.75)))
        for edge in found.edges:
            first, second = places[list(edge.ends)]
            rows = first + np.array(edge.t)[:, None] * (second - first)
            values = scale * np.array(getattr(edge, measure))
            colours = shade.to_rgba((values[1:] + values[:-1]) / 2)
            axes.add_collection3d(
                Line3DCollection(np.stack([rows[:-1], rows[1:]], axis=1), colors=colours, lw=3, zorder=2)
            )
        values = scale * np.array([getattr(vertex, measure) for vertex in found.vertices])
        axes.scatter(*places.T, c=values, cmap=_MAP, norm=norm, s=60, edgecolors="black", depthshade=False, zorder=3)
        for k, place in enumerate(places):
            axes.text(
                *(place + 0.06 * reach.max() * np.array([0, 0, 1])), f"w{k}", weight="bold", ha="center", zorder=4
            )
        axes.set(xlim=(-reach[0], reach[0]), ylim=(-reach[1], reach[1]), zlim=(-reach[2], reach[2]))
        axes.set_box_aspect(reach.tolist(), zoom=0.95)  # larger, its corners are cut off
        axes.set_title(title, fontsize="medium")
        axes.tick_params(labelsize="x-small")
        axes.locator_params(nbins=5)
        _add_scale(figure, shade, ax=axes, shrink=0.7, pad=0.12)
    name_figure(
        figure,
        _title(found),
        f"vertices on the three principal directions of weight space ({', '.join(map(percent, found.shares))} of their "
        "squared distances)",
        _images(found),
    )
    return to_png(figure)


def plot_edges(found: Simplexes) -> bytes:
    """Plot loss and error along every edge."""
    figure = new_figure(12, 4.4 + 0.2 * -(-len(found.edges) // 8))
    for axes, (measure, title, scale) in zip(figure.subplots(1, 2), _MEASURES, strict=True):
        for number, edge in enumerate(found.edges):
            axes.plot(
                edge.t,
                scale * np.array(getattr(edge, measure)),
                color=style(number)[0],
                ls=_DASHES[number // _COLOURS % len(_DASHES)],
                label=f"w{edge.ends[0]} to w{edge.ends[1]}",
            )
        axes.set(xlabel="t", ylabel=title, xlim=(0, 1))
        axes.grid(alpha=0.3)
    figure.axes[1].set_ylim(bottom=0)
    if min(min(edge.train_loss) for edge in found.edges) > 0:
        scale_by_log(figure.axes[0])
    add_legend(figure, most=8)
    name_figure(figure, _title(found), f"along the edges; {_images(found)}")
    return to_png(figure)


def plot_faces(found: Simplexes) -> bytes:
    """Plot the train loss over every face, as a triangle of barycentric coordinates."""
    columns = min(4, len(found.faces))
    figure = new_figure(max(6.5, 3.2 * columns + 1.2), 2.9 * -(-len(found.faces) // columns) + 1.1)
    norm, grid = _norm(found, "train_loss", 1.0), panels(figure, len(found.faces), columns)
    for axes, face in zip(grid, found.faces, strict=True):
        x, y = (np.array(face.points) @ _CORNERS).T
        mesh = Triangulation(x, y, _triangles(face))
        axes.tripcolor(mesh, face.train_loss, cmap=_MAP, norm=norm, shading="gouraud", rasterized=True)
        axes.plot(*_CORNERS[[0, 1, 2, 0]].T, color="black", lw=0.8)
        for corner, place, side in zip(face.corners, _CORNERS, ("right", "left", "center"), strict=True):
            above = side == "center"
            axes.annotate(
                f"w{corner}",
                place,
                (0, 4 if above else -4),
                textcoords="offset points",
                ha=side,
                va="bottom" if above else "top",
            )
        axes.set(xlim=(-0.12, 1.12), ylim=(-0.12, 1.0), aspect="equal")
        axes.set_axis_off()
    _add_scale(figure, ScalarMappable(norm, _MAP), ax=grid, label="train loss (nats)")
    left_out = f", {found.faces_left_out} others left out" if found.faces_left_out else ""
    name_figure(figure, _title(found), f"{counted(len(found.faces), 'face')}{left_out}; {_images(found)}")
    return to_png(figure)


def _add_scale(figure: Figure, shade: ScalarMappable, **where: Any) -> None:
    """Add a scale of colours whose ends have their numbers, plain ones on a logarithmic scale, too."""
    low, high = shade.get_clim()
    ticks = (np.geomspace if isinstance(shade.norm, LogNorm) else np.linspace)(low, high, 5).tolist()
    scale = figure.colorbar(shade, **where)
    scale.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
    scale.minorticks_off()


def _norm(found: Simplexes, measure: str, scale: float) -> Normalize:
    """Return one scale of colours for all; logarithmic for losses, which differ by orders of magnitude."""
    values = [getattr(vertex, measure) for vertex in found.vertices]
    values += [value for one in (*found.edges, *found.faces) for value in getattr(one, measure)]
    low, high = scale * min(values), scale * max(values)
    if high <= low:
        high = low + 1
    if measure == "train_loss":
        return LogNorm(max(low, 1e-6), max(high, 2e-6))
    return Normalize(low, high)


def _triangles(face: Face) -> NDArray[np.int64]:
    """Return the small triangles (T, 3) of a face's lattice, by the places of its points."""
    parts = round((np.sqrt(8 * len(face.points) + 1) - 3) / 2)
    whole = [tuple(round(share * parts) for share in point) for point in face.points]
    place = {shares: number for number, shares in enumerate(whole)}
    found: list[Sequence[int]] = []
    for (i, j, k), number in place.items():
        if i:
            found.append((number, place[i - 1, j + 1, k], place[i - 1, j, k + 1]))
        if i and j:
            found.append((number, place[i, j - 1, k + 1], place[i - 1, j, k + 1]))
    return np.array(found)


def _title(found: Simplexes) -> str:
    return ", ".join(map(drawable, (found.dataset, found.architecture, found.run)))


def _images(found: Simplexes) -> str:
    return f"{found.train_examples:,} training and {found.test_examples:,} test images at each point"
