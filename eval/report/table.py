"""A report's table as rows of text, and the columns that tables share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from ensembler.eval.report.notation import NOTHING, SCORES, compact, label, plain
from ensembler.eval.report.schema import CellScores, Report, RunReport, ShiftReport

__all__ = [
    "CLEAN",
    "COST",
    "ONE_MEMBER",
    "SHIFTED",
    "Column",
    "Table",
    "by_run",
    "images_of",
    "means_over",
    "meant_shift",
    "one_member_note",
    "score_column",
    "under",
]

ONE_MEMBER = f"{NOTHING}: not defined for one member."


@dataclass(frozen=True)
class Table:
    """Text in rows and columns.

    Attributes:
        section: the part of a report that it belongs to.
        title: what it is, and of which images.
        columns: their headings.
        rows: as many cells each as there are columns; the first names the row.
        words: how many of the first columns are words; the others are figures, flush right.
        notes: what must stand beside it.
        detail: left to the page, where there is room.
    """

    section: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1
    notes: tuple[str, ...] = ()
    detail: bool = False


Column = tuple[str, Callable[[RunReport], str]]
CLEAN, SHIFTED = attrgetter("clean"), attrgetter("shifted")


def by_run(
    report: Report,
    section: str,
    title: str,
    columns: Sequence[Column],
    *,
    notes: Sequence[str] = (),
    detail: bool = False,
    words: int = 1,
) -> Table:
    """A table with a row for each run; the other arguments are :class:`Table`'s."""
    rows = tuple(
        (label(report, number), *(write(run) for _, write in columns)) for number, run in enumerate(report.runs)
    )
    headings = ("run", *(heading for heading, _ in columns))
    return Table(section, title, headings, rows, words, tuple(notes), detail)


def score_column(name: str, of: Callable[[RunReport], CellScores | None], title: str | None = None) -> Column:
    """A column of one score: of a run's clean scores, say; by default under the score's own title."""

    def write(run: RunReport) -> str:
        scores = of(run)
        return SCORES[name].write(None if scores is None else getattr(scores, name))

    return SCORES[name].title if title is None else title, write


COST: tuple[Column, ...] = (
    ("M", lambda run: str(run.members)),
    ("passes", lambda run: compact(run.training_example_passes) + ("+?" if run.training_unknown else "")),
)
"""The columns beside every run's scores."""


def images_of(report: Report) -> str:
    """The test images, in words."""
    return f"{report.test_examples:,} test images of {plain(report.dataset)}"


def meant_shift(report: Report) -> ShiftReport | None:
    """The shift, where it has corruptions that means are over."""
    return report.shift if report.runs[0].shifted is not None else None


def under(shift: ShiftReport) -> str:
    """ "under official shift", say."""
    return f"under {shift.source} shift"


def one_member_note(report: Report) -> list[str]:
    """The note on dashes, where a run has one member."""
    return [ONE_MEMBER] if any(run.members == 1 for run in report.runs) else []


def means_over(shift: ShiftReport) -> str:
    """What means under shift are over, in words."""
    return f"{len(shift.headline)} corruptions x 5 severities"
