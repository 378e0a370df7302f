"""A report's tables for the terminal and as Markdown, and its scores as CSV."""

from __future__ import annotations

import csv as rfc4180
import io
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from ensembler.eval.metrics.groups import GROUPED, Bounds
from ensembler.eval.metrics.ood import OodScores
from ensembler.eval.report.notation import plain
from ensembler.eval.report.schema import CellScores, Report, RunReport
from ensembler.eval.report.sentences import findings
from ensembler.eval.report.table import Table
from ensembler.eval.report.tables import about, report_tables

if TYPE_CHECKING:
    from rich.console import RenderableType

_COLUMNS = (
    *("number", "run", "method", "members", "training_example_passes", "seed"),
    *("set", "source", "corruption", "severity", "score", "value"),
)

__all__ = ["csv", "escape", "markdown", "markdown_table", "tables", "terminal_table"]


def tables(report: Report) -> RenderableType:
    """Render the main tables for a terminal of at least 80 columns."""
    from rich.console import Group as Lines
    from rich.text import Text

    parts: list[RenderableType] = [Text(line) for line in about(report)]
    said: set[str] = set()
    for table in report_tables(report):
        if table.detail:
            continue
        parts += [Text(), *terminal_table(table, [note for note in table.notes if note not in said])]
        said |= set(table.notes)
    return Lines(*parts)


def terminal_table(table: Table, notes: Sequence[str]) -> list[RenderableType]:
    """Render a table, its title and notes for a terminal."""
    from rich import box
    from rich.padding import Padding
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="")
    for place, heading in enumerate(table.columns):
        widest = max(len(part) for row in table.rows for part in row[place].split() or [""])
        if place < table.words:
            # Without room, names are cut, except in the first table.
            overflow: Literal["fold", "ellipsis"] = "fold" if place or table.section == "costs" else "ellipsis"
            grid.add_column(Text(heading), overflow=overflow, min_width=min(widest, 8))
        else:  # figures are never broken
            grid.add_column(Text(heading), justify="right", overflow="fold", min_width=widest)
    for row in table.rows:
        grid.add_row(Text(row[0].replace(": ", ":", 1)), *map(Text, row[1:]))  # one word, so that no line breaks in it
    return [
        Text(table.title, style="bold"),
        grid,
        *(Padding(Text(note, style="dim"), (0, 0, 0, 2)) for note in notes),
    ]


def markdown(report: Report) -> str:
    """Render the main tables and their notes as GitHub Markdown."""
    parts = [f"# {escape(plain(report.dataset))}: {len(report.runs)} run{'s' * (len(report.runs) > 1)}"]
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
    lines = [table.columns, ruler, *table.rows]
    body = "\n".join(f"| {' | '.join(cell if line is ruler else escape(cell) for cell in line)} |" for line in lines)
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
