"""Tables as rows of text, and the columns that they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from ensembler.eval.report.notation import NOTHING, SCORES, label, plain, training_passes
from ensembler.eval.report.schema import CellScores, Report, RunReport, ShiftReport
from ensembler.text import counted

__all__ = [
    "BEST",
    "CLEAN",
    "COST",
    "ONE_MEMBER",
    "SHIFTED",
    "VARIED",
    "Column",
    "Table",
    "by_run",
    "images_of",
    "means_over",
    "meant_shift",
    "members_text",
    "one_member_note",
    "score_column",
    "under",
]

BEST = (
    "Bold: the lowest error, NLL, Brier score or ECE, and those that the 95 % intervals of the paired differences do "
    "not tell apart from it; the intervals hold together."
)
ONE_MEMBER = f"{NOTHING}: not defined for one member."


@dataclass(frozen=True)
class Table:
    """Text in rows and columns.

    Attributes:
        section: the part of a report that it belongs to.
        title: of what, and of which images.
        columns: the headings.
        rows: one cell per column; the first is the row's name.
        words: the number of first columns that are words; the others are figures, aligned right.
        notes: printed below it.
        detail: shown only on the page.
        best: the row and column of each cell that is printed bold.
    """

    section: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1
    notes: tuple[str, ...] = ()
    detail: bool = False
    best: frozenset[tuple[int, int]] = frozenset()


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
    compared: Mapping[int, tuple[str, str]] | None = None,
) -> Table:
    """Make a table with a row for each run.

    Args:
        report: of the runs.
        section, title, notes, detail, words: as of :class:`Table`.
        columns: those after the run's name.
        compared: which of them are marked where they are best: the number of the column, whether its score is
            ``"clean"`` or ``"shifted"``, and the score.
    """
    rows = tuple(
        (label(report, number), *(write(run) for _, write in columns)) for number, run in enumerate(report.runs)
    )
    headings = ("run", *(heading for heading, _ in columns))
    best = {
        (row, column + 1)
        for column, (where, score) in (compared or {}).items()
        for row in (report.comparison.best.get(where, {}).get(score, ()) if report.comparison else ())
    }
    notes = [*notes, BEST] if best else notes
    return Table(section, title, headings, rows, words, tuple(notes), detail, frozenset(best))


def score_column(name: str, of: Callable[[RunReport], CellScores | None], title: str | None = None) -> Column:
    """Make a column of one score, by default under the score's own title."""

    def write(run: RunReport) -> str:
        scores = of(run)
        return SCORES[name].write(None if scores is None else getattr(scores, name))

    return SCORES[name].title if title is None else title, write


def members_text(run: RunReport) -> str:
    """Format the number of members, times the variations of an image that each sees where there are any."""
    each = run.forward_passes_per_prediction // run.members
    return f"{run.members} x {each}" if run.views else str(run.members)


COST: tuple[Column, ...] = (
    ("M", members_text),
    ("passes", training_passes),
)
"""The columns beside every run's scores."""


VARIED = (
    "+TTA N, and M x V: each of M members sees V random variations of the image of its own, in all at least N, as in "
    "training; a prediction is the mean over all."
)
"""The note on rows with variations."""


def images_of(report: Report) -> str:
    """Describe the test images."""
    return f"{report.test_examples:,} test images of {plain(report.dataset)}"


def meant_shift(report: Report) -> ShiftReport | None:
    """Return the shift, if it covers corruptions of the headline."""
    return report.shift if report.runs[0].shifted is not None else None


def under(shift: ShiftReport) -> str:
    """Return "under official shift" or "under generated shift"."""
    return f"under {shift.source} shift"


def one_member_note(report: Report) -> list[str]:
    """Return the note on dashes, if a run has one member."""
    return [ONE_MEMBER] if any(run.members == 1 for run in report.runs) else []


def means_over(shift: ShiftReport) -> str:
    """Describe what means under shift are over."""
    return f"{counted(len(shift.headline), 'corruption')} x 5 severities"
