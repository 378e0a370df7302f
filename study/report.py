"""A study's report for the terminal, as Markdown, HTML and JSON; and its plan for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape as html
from typing import TYPE_CHECKING

from ensembler.eval.report.notation import NOTHING, SCORES, compact, plain
from ensembler.eval.report.page import bullets, definitions, document, html_figure, html_table
from ensembler.eval.report.plots import to_png
from ensembler.eval.report.table import Table
from ensembler.eval.report.text import escape, markdown_table, terminal_table
from ensembler.study.estimate import Speed
from ensembler.study.figures import figures
from ensembler.study.plan import Cell, Plan
from ensembler.study.schema import CellReport, StudyReport
from ensembler.study.sentences import NAMES, answers, compared, recommendations, within, worse
from ensembler.text import counted

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["files", "planned", "terminal"]

_LONG = 90  # minutes, from which on a time is in hours
_LEGEND = (
    "B: example passes of training, in those of one network. M: members, forward passes a prediction. needed: members "
    "that suffice, judged on the validation images. DEE: networks of a deep ensemble with the same calibrated NLL. *: "
    "worse than the first row: the intervals of all differences from it hold together, and this one is above 0."
)


def files(report: StudyReport) -> dict[str, bytes]:
    """Every file of the report, by its name."""
    pictures = figures(report)
    tables = _tables(report, intervals=True)
    lines = [*answers(report), *(f"{title}: {text}" for title, text in recommendations(report).items())]
    sections = {
        "answer": ("The answer", bullets(lines)),
        "budgets": ("Scores at each budget", "\n".join(html_table(table, table.notes) for table in tables)),
        "pareto": ("Quality against cost", "\n".join(map(html_figure, pictures.values()))),
        "rules": ("How a budget is spent", definitions({name: html(text) for name, text in report.rules.items()})),
        "terms": ("Terms", definitions({one.title: html(one.meaning) for one in NAMES.values()})),
        "made": ("How this was made", definitions(_made(report))),
    }
    title = _title(report)
    markdown = [f"# {escape(title)}", *map(escape, compared(report)), "\n".join(f"- {escape(line)}" for line in lines)]
    markdown += [part for table in tables for part in markdown_table(table)]
    markdown += ["## How a budget is spent"]
    markdown += ["\n".join(f"- {escape(name)}: {escape(text)}" for name, text in report.rules.items())]
    markdown += [escape(picture.caption) for picture in pictures.values()]
    markdown += [f"Made with {', '.join(f'{name} {version}' for name, version in report.versions.items())}."]
    return {
        "report.html": document(title, compared(report), sections),
        "report.md": ("\n\n".join(markdown) + "\n").encode(),
        "report.json": (report.model_dump_json(indent=2) + "\n").encode(),
        **{f"{name}.png": to_png(picture.figure) for name, picture in pictures.items()},
    }


def terminal(report: StudyReport) -> RenderableType:
    """The answer and a table a budget, of means only, for a terminal of 80 columns or more."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(line) for line in compared(report)]
    for table in _tables(report, intervals=False):
        parts += [Text(), *terminal_table(table, table.notes)]
    if report.left_out:
        parts += [Text(), *(Text(_left_out(one.method, one.budget, one.why)) for one in report.left_out)]
    lines = [*answers(report), *(f"{title}: {text}" for title, text in recommendations(report).items())]
    return Group(*parts, Text(), *map(Text, lines))


def _title(report: StudyReport) -> str:
    return f"Which ensemble? {plain(report.architecture)} on {plain(report.dataset)}"


def _tables(report: StudyReport, *, intervals: bool) -> list[Table]:
    budgets = dict.fromkeys(cell.budget for cell in report.cells)
    found = [table for budget in budgets for table in _scores(report, budget, intervals)]
    if report.left_out and intervals:  # a terminal has no room for the reasons in a table
        rows = tuple((one.method, f"{one.budget:g}", one.why) for one in report.left_out)
        found.append(Table("budgets", "Left out", ("method", "budget", "why"), rows, words=3))
    if report.published:
        found.append(_published(report))
    return found


def _scores(report: StudyReport, budget: float, intervals: bool) -> list[Table]:
    """A budget on one table; without intervals, for 80 columns, a second one has the scores on other images."""
    cells = [cell for cell in report.cells if cell.budget == budget]
    names = [name for name in NAMES if name in cells[0].scores]
    title = f"At {budget:g} budget{'s' * (budget != 1)} ({compact(round(budget * report.one))} example passes)"
    notes = (_LEGEND,) if budget == report.cells[0].budget else ()
    if intervals:
        return [_table(report, cells, title, names, notes, intervals)]
    clean = [name for name in names if name in SCORES]
    tables = [_table(report, cells, title, clean, notes, intervals)]
    if others := [name for name in names if name not in SCORES]:
        columns = ("method", *(NAMES[name].title for name in others))
        rows = tuple((cell.method, *(_score(cell, name, intervals) for name in others)) for cell in cells)
        tables.append(Table("budgets", f"{title}: other images", columns, rows))
    return tables


def _table(
    report: StudyReport,
    cells: Sequence[CellReport],
    title: str,
    names: Sequence[str],
    notes: tuple[str, ...],
    intervals: bool,
) -> Table:
    columns = ("method", "B", "M", *(NAMES[name].title for name in names), "needed", "DEE")
    rows = tuple(
        (
            cell.method + "*" * worse(cell.behind),
            f"{cell.passes / report.one:.3f}",
            str(cell.members),
            *(_score(cell, name, intervals) for name in names),
            NOTHING if cell.needed is None else f"{cell.needed:.1f}",
            cell.equivalent or NOTHING,
        )
        for cell in cells
    )
    return Table("budgets", title, columns, rows, notes=notes)


def _score(cell: CellReport, name: str, intervals: bool) -> str:
    found = cell.scores[name]
    return within(name, found) if intervals else NAMES[name].write(found.mean)


def _left_out(method: str, budget: float, why: str) -> str:
    return f"left out: {method} at {budget:g}: {why}"


def _published(report: StudyReport) -> Table:
    rows = tuple(
        (
            one.method,
            f"{one.budget:g}",
            SCORES[one.score].title,
            f"{one.published:g}",
            NOTHING if one.ours is None else f"{one.ours:.{SCORES[one.score].digits}f}",
            one.source,
        )
        for one in report.published
    )
    columns = ("method", "budget", "score", "published", "ours", "source")
    return Table("budgets", "Published figures beside ours", columns, rows, words=3)


def _made(report: StudyReport) -> dict[str, str]:
    return {
        "predicted on": html(plain(report.device or "elsewhere")),
        "seeds": ", ".join(map(str, report.seeds)),
        "test sha256": f"<code>{html(report.test_sha256 or 'unknown')}</code>",
        "out of distribution": html(plain("; ".join(report.ood))) or "nothing",
        "bootstrap": f"{report.resamples:,} resamples of the test images",
        "versions": html(", ".join(f"{name} {version}" for name, version in report.versions.items())),
    }


def planned(plan: Plan, speed: Speed, images: int) -> RenderableType:
    """The plan, and an estimate of its time.

    Args:
        plan: the plan.
        speed: measured.
        images: that each run predicts.
    """
    from rich.console import Group
    from rich.text import Text

    first = {(cell.label, cell.budget): cell for cell in reversed(plan.cells)}
    rows = tuple(_planned_row(plan, cell) for _, cell in sorted(first.items(), key=lambda item: item[0][1]))
    columns = ("method", "budget", "example passes", "B", "trained for it alone")
    parts: list[RenderableType] = terminal_table(Table("plan", "Plan, of each seed", columns, rows), ())
    parts += [Text(_left_out(one.label, one.budget, one.why)) for one in plan.left_out]
    members = sum(_members(cell) for cell in {cell.name: cell for cell in plan.cells}.values())
    training, predicting = plan.passes / speed.training, members * images / speed.prediction
    parts.append(
        Text(
            f"{counted(len(plan.nodes), 'run')}, {_seeds(plan)}: {compact(plan.passes)} example passes "
            f"({plan.passes / plan.one:.1f} B), {compact(members * images)} forward passes of evaluation"
        )
    )
    parts.append(
        Text(
            f"about {_duration(training + predicting)}, one run at a time, on {speed.device}: "
            f"{speed.training:,.0f} example passes and {speed.prediction:,.0f} forward passes a second"
        )
    )
    return Group(*parts)


def _duration(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return counted(minutes, "minute") if minutes < _LONG else f"{seconds / 3600:.2g} hours"


def _seeds(plan: Plan) -> str:
    first, last = plan.seeds[0], plan.seeds[-1]
    return f"seed {first}" if first == last else f"seeds {first} to {last}"


def _planned_row(plan: Plan, cell: Cell) -> tuple[str, ...]:
    others = {
        name for other in plan.cells if (other.label, other.budget) != (cell.label, cell.budget) for name in other.needs
    }
    alone = sum(node.passes for name, node in cell.needs.items() if name not in others)
    return cell.label, f"{cell.budget:g}", f"{cell.passes:,}", f"{cell.passes / plan.one:.3f}", f"{alone:,}"


def _members(cell: Cell) -> int:
    return sum(getattr(node.method, "members", 1) for node in cell.nodes)
