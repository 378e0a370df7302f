"""What a run is, in a few lines and in a picture; and tables for a notebook."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ensembler.text import counted, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ensembler.run import Run

__all__ = ["lines", "picture", "run_html", "table_html"]

_NAMED = 6  # parts of a training in a legend


def lines(run: Run) -> list[str]:
    """Describe a run in four lines: what it is, what it was trained on, its scores, and where it is."""
    return [text if name in ("members", "saved") else f"{name} {text}" for name, text in _facts(run).items()]


def _facts(run: Run) -> dict[str, str]:
    manifest, cost = run.manifest, run.manifest.cost.example_passes
    size = f"{counted(manifest.vertices, 'vertex', 'vertices')}, {manifest.parameters:,} parameters"
    passes = "an unknown cost" if cost is None else counted(cost, "example pass", "example passes")
    scores = manifest.metrics.get("test", {})
    shown = [f"{name.replace('_', ' ')} {scores[name]:.4f}" for name in scores if isinstance(scores[name], float)]
    return {
        "members": f"{manifest.method} of {counted(manifest.members, 'member')}: {manifest.architecture}, {size}",
        "trained on": f"{printable(manifest.dataset.title)}, seed {manifest.seed}, {passes}",
        "test:": ", ".join(shown).replace("nll", "NLL") or "not measured",
        "saved": "not saved" if run.path is None else f"saved at {printable(run.path)}",
    }


def run_html(run: Run, title: str) -> str:
    """Render a run for a notebook: what it is as a table, and its picture."""
    rows = [(name.removesuffix(":"), text.removeprefix("saved ")) for name, text in _facts(run).items()]
    shown, figure = table_html(title, (), rows), picture(run)
    if figure is None:
        return shown
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=96)
    png = base64.b64encode(content.getvalue()).decode()
    return f'{shown}\n<img src="data:image/png;base64,{png}" alt="{html.escape(str(figure.get_label()))}">'


def table_html(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> str:
    """Render text as a table for a notebook.

    Args:
        title: above it.
        columns: the headings; none for a table of names and values.
        rows: their cells, the first of each its name.
        note: below it.
    """
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    cell = "<td>" if columns else '<td style="text-align: left">'
    body = "\n".join(
        f"<tr><th>{html.escape(name)}</th>{''.join(f'{cell}{html.escape(text)}</td>' for text in cells)}</tr>"
        for name, *cells in rows
    )
    return (
        f"<table>\n<caption>{html.escape(title)}</caption>\n"
        + (f"<thead><tr>{head}</tr></thead>\n" if head else "")
        + f"<tbody>\n{body}\n</tbody>\n</table>"
        + (f"\n<p>{html.escape(note)}</p>" if note else "")
    )


def picture(run: Run) -> Figure | None:
    """Draw a run: its vertices and members in the plane of their largest distances, and its loss by epoch.

    Returns:
        The figure; ``None`` where there is neither, as of a checkpoint that was trained elsewhere.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    has_plane = not run.parts and run.manifest.vertices > 1
    panels = {
        "members and vertices in weight space": (_draw_members, has_plane),
        "the training loss by epoch": (_draw_history, run.history),
    }
    drawn = {name: draw for name, (draw, wanted) in panels.items() if wanted}
    if not drawn:
        return None
    figure = Figure(figsize=(4.5 * len(drawn), 3.2), layout="constrained", label=", and ".join(drawn))
    FigureCanvasAgg(figure)
    for axes, draw in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.values(), strict=True):
        draw(axes, run)
        axes.grid(alpha=0.3)
    return figure


def _draw_members(axes: Axes, run: Run) -> None:
    """Draw vertices and members: the principal components of the vertices (K, P), found from their K x K products."""
    import torch

    products = torch.zeros(run.manifest.vertices, run.manifest.vertices, dtype=torch.float64)
    for rows in run.vertices.values():  # one parameter at a time: all of them may take much of the memory
        centred = rows.flatten(1).double()
        centred -= centred.mean(dim=0)
        products += centred @ centred.T
    values, vectors = torch.linalg.eigh(products)
    places = vectors[:, -2:].flip(1) * values[-2:].flip(0).clamp_min(0).sqrt()
    members = run.coefficients.double() @ places
    axes.plot(*members.T.numpy(), "o", alpha=0.6, label="members")
    axes.plot(*places.T.numpy(), "^", color="black", fillstyle="none", label="vertices")
    axes.set(title="weight space", xlabel="first principal component", ylabel="second")
    axes.margins(0.1)
    axes.legend()


def _draw_history(axes: Axes, run: Run) -> None:
    """Draw the training loss of each part by epoch."""
    parts: dict[str, list[float]] = {}
    for record in run.history:
        parts.setdefault(record["part"], []).append(record["loss"])
    for number, (part, losses) in enumerate(parts.items()):
        label = part if number < _NAMED else None
        axes.plot(range(1, len(losses) + 1), losses, marker=".", label=label)
    axes.set(title="training", xlabel="epoch", ylabel="loss")
    axes.locator_params(axis="x", integer=True)
    axes.legend()
