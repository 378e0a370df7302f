"""A report's tables for the terminal and as Markdown, and its scores as CSV."""

from __future__ import annotations

import csv as rfc4180
import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ensembler.eval.metrics.groups import GROUPED, Bounds
from ensembler.eval.metrics.ood import OodScores
from ensembler.eval.report.notation import label, plain
from ensembler.eval.report.schema import CellScores, Report, RunReport
from ensembler.eval.report.sentences import findings
from ensembler.eval.report.table import BEST, Table
from ensembler.eval.report.tables import about, report_tables
from ensembler.text import counted

if TYPE_CHECKING:
    from rich.console import RenderableType

_COLUMNS = (
    *("number", "run", "method", "members", "training_example_passes", "seed"),
    *("set", "source", "corruption", "severity", "score", "value"),
)

_LONG = ("summary", "costs", "groups")  # sections that the terminal shows only if asked
_GAP = 2  # blanks between two columns of the terminal
_FIGURE = 16  # characters; what is longer is a list, which may be broken

__all__ = ["csv", "escape", "markdown", "markdown_table", "tables", "terminal_table"]


def tables(report: Report, width: int = 80, full: bool = False, bold: bool = True) -> RenderableType:
    """Render the findings and the main tables for a terminal; runs by their number and method.

    Args:
        report: the report.
        width: of the terminal, in columns.
        full: whether every table is shown.
        bold: whether what prints it shows bold; otherwise nothing is said of it.
    """
    from rich.console import Group as Lines
    from rich.text import Text

    short = _short_labels(report)
    parts: list[RenderableType] = [Text(line) for line in about(report)]
    parts += [Text(short(label(report, number)) + f": {plain(run.name)}") for number, run in enumerate(report.runs)]
    parts += [Text(), Text("In short", style="bold"), *(Text(short(line)) for line in findings(report))]
    said = set() if bold else {BEST}
    for table in report_tables(report):
        if not full and (table.detail or table.section in _LONG):
            continue
        parts += [Text(), *terminal_table(table, [note for note in table.notes if note not in said], width, short)]
        said |= set(table.notes)
    if not full:
        parts += [Text(), Text("More tables: --full, and the report's page.", style="dim")]
    return Lines(*parts)


def terminal_table(
    table: Table, notes: Sequence[str], width: int = 80, short: Callable[[str], str] = str
) -> list[RenderableType]:
    """Render a table, its title and notes for a terminal; ``short`` writes the runs in a text in short."""
    from rich.padding import Padding
    from rich.text import Text

    return [
        Text(short(table.title), style="bold"),
        *_grids(table, short, width),
        *(Padding(Text(short(note), style="dim"), (0, 0, 0, 2)) for note in notes),
    ]


def _grids(table: Table, short: Callable[[str], str], width: int) -> Iterator[RenderableType]:
    """Render a table in as many parts as it needs for the width: no word is broken, and no figure is cut."""
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text

    columns = [[short(cell) for cell in column] for column in zip(table.columns, *table.rows, strict=True)]
    names, figures = columns[: table.words], columns[table.words :]
    first = table.words  # of a part's columns
    room = width - sum(max(map(len, column)) + _GAP for column in names)
    for part in _parts(figures, room):
        grid = Grid(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="")
        for heading, *_ in names:
            grid.add_column(Text(heading), no_wrap=True)
        left = room - sum(_least(column) + _GAP for column in part)
        for column in part:  # a heading is on one line where there is room
            more = max(map(len, column)) - _least(column)
            own = _least(column) + (more if more <= left else 0)
            left -= own - _least(column)
            grid.add_column(Text(column[0]), justify="right", width=own)
        places = [*range(table.words), *range(first, first + len(part))]
        first += len(part)
        for number, row in enumerate(zip(*(cells for _, *cells in [*names, *part]), strict=True)):
            bold = ["bold" if (number, place) in table.best else "" for place in places]
            grid.add_row(*map(Text, row, bold))
        yield grid


def _least(column: Sequence[str]) -> int:
    """Return the width that breaks no word of a column's heading, and no figure such as ``1.0 to 1.7``."""
    _, *cells = column
    pieces = [word for text in column for word in text.split()] + [cell for cell in cells if len(cell) <= _FIGURE]
    return max(map(len, pieces), default=0)


def _parts(columns: Sequence[list[str]], room: int) -> Iterator[list[list[str]]]:
    """Split columns among tables, so that those of each fit into the room; at least one each."""
    part: list[list[str]] = []
    left = room
    for column in columns:
        if part and _least(column) + _GAP > left:
            yield part
            part, left = [], room
        part.append(column)
        left -= _least(column) + _GAP
    yield part


def _short_labels(report: Report) -> Callable[[str], str]:
    """Return a function that writes runs in a text by their number and method alone."""
    labels = {label(report, number): f"{number + 1} {plain(run.method)}" for number, run in enumerate(report.runs)}
    pattern = re.compile(r"(?<!\d)(" + "|".join(map(re.escape, sorted(labels, key=len, reverse=True))) + ")")
    return lambda text: pattern.sub(lambda found: labels[found[0]], text)


def markdown(report: Report) -> str:
    """Render the main tables and their notes as GitHub Markdown."""
    parts = [f"# {escape(plain(report.dataset))}: {counted(len(report.runs), 'run')}"]
    parts.append("\n".join(f"- {escape(line)}" for line in [*about(report), *findings(report)]))
    for table in report_tables(report):
        if table.detail:
            continue
        parts += markdown_table(table)
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    images = f"Test images {report.test_sha256}" if report.test_sha256 else "Test images unknown"
    validation = dict.fromkeys(run.validation_sha256 for run in report.runs if run.validation_sha256)
    parts.append(f"Made with {versions}. {images}{''.join(f', validation {sha256}' for sha256 in validation)}.")
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> list[str]:
    """Render a table under its title, and its notes, as paragraphs of GitHub Markdown."""
    ruler = ["---" if place < table.words else "---:" for place in range(len(table.columns))]
    rows = [
        [f"**{escape(cell)}**" if (row, column) in table.best else escape(cell) for column, cell in enumerate(cells)]
        for row, cells in enumerate(table.rows)
    ]
    lines = [[escape(heading) for heading in table.columns], ruler, *rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return [f"## {escape(table.title)}", body, *(escape(note) for note in table.notes)]


def escape(text: str) -> str:
    """Escape text for Markdown."""
    return re.sub(r"[\\`*\[\]<>|#~$&]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)  # a_b needs no escape


def csv(report: Report) -> str:
    """Render every score of every run as CSV (RFC 4180), one per row; ``null`` is empty.

    ``set`` is ``cost``, ``validation`` (the temperature), ``clean``, ``member N`` (of clean images), ``shifted`` (the
    mean over the headline cells), ``severity``, ``family``, ``cell``, ``other NAME``, ``group class``, ``group test
    set``, ``group group``, or ``ood NAME``; ``corruption`` is the family, corruption or group; an out-of-distribution
    score is ``detector measure``.
    """
    content = io.StringIO(newline="")
    writer = rfc4180.writer(content)
    writer.writerow(_COLUMNS)
    for number, run in enumerate(report.runs, start=1):
        of_run = (number, run.name, run.method, run.members, run.training_example_passes, run.seed)
        writer.writerows((*of_run, *row) for row in _values(report, run))
    return content.getvalue()


def _values(report: Report, run: RunReport) -> Iterator[tuple[str | float | int | None, ...]]:
    """Yield (set, source, corruption, severity, score, value)."""
    for name in (
        "training_example_passes",
        "training_forward_passes",
        "training_seconds",
        "training_peak_memory",
        "forward_passes_per_prediction",
    ):
        yield "cost", "run", None, None, name, getattr(run, name)
    yield "validation", "dataset", None, None, "temperature", run.temperature
    sets: list[tuple[str, str, str | None, int | None, CellScores]] = [("clean", "dataset", None, None, run.clean)]
    if report.shift is not None:
        source = report.shift.source
        sets += [("shifted", source, None, None, run.shifted)] if run.shifted else []
        sets += [("severity", source, None, level, scores) for level, scores in run.by_severity.items()]
        sets += [("family", source, family, None, scores) for family, scores in run.by_family.items()]
        sets += [
            ("cell", source, name, level, one) for name, levels in run.cells.items() for level, one in levels.items()
        ]
    for other in report.others:
        if other.name in run.others:
            sets.append((f"other {other.name}", other.source, None, None, run.others[other.name]))
    for *where, scores in sets:
        for name, value in scores:
            yield *where, name, value
    for place, member in enumerate(run.single_members, start=1):
        for name, value in member:
            yield f"member {place}", "dataset", None, None, name, value
    yield from _groups(run)
    for images in report.ood:
        for detector, found in run.ood[images.name].items():
            for measure in OodScores.model_fields:
                value = None if found is None else getattr(found, measure)
                yield f"ood {images.name}", images.source, None, None, f"{detector} {measure}", value


def _groups(run: RunReport) -> Iterator[tuple[str | float | int | None, ...]]:
    for by, grouped in run.groups.items():
        for group, scores in grouped.groups.items():
            yield f"group {by}", "dataset", group, None, "examples", scores.examples
            yield f"group {by}", "dataset", group, None, "ece", scores.ece
            for name in GROUPED:
                yield from _bounds(by, group, name, getattr(scores, name))
        for name in GROUPED:
            yield from _bounds(by, None, f"worst {name}", grouped.worst[name])
            yield from _bounds(by, None, f"gap {name}", grouped.gap[name])


def _bounds(by: str, group: str | None, name: str, found: Bounds) -> Iterator[tuple[str | float | int | None, ...]]:
    for title, value in ((name, found.value), (f"{name} low", found.low), (f"{name} high", found.high)):
        yield f"group {by}", "dataset", group, None, title, value
