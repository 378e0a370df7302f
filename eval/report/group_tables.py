"""The tables of groups of images: the worst of them and the gap, and each group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ensembler.eval.metrics.groups import Bounds
from ensembler.eval.report.notation import NOTHING, SCORES, label, plain
from ensembler.eval.report.schema import Report
from ensembler.eval.report.table import Table, images_of

__all__ = ["group_tables"]

_MOST = 30  # groups of a table
_RUNS = 4  # of a table, which would be cut on paper


def group_tables(report: Report) -> Iterator[Table]:
    """Yield the table of the worst groups, and one of each group where these are few."""
    rows = []
    for number, run in enumerate(report.runs):
        for by, found in run.groups.items():
            worst, gap = found.worst["error"], found.gap["error"]
            examples = found.groups[worst.group].examples
            rows.append(
                (
                    label(report, number),
                    by,
                    str(len(found.groups)),
                    plain(worst.group),
                    f"{examples:,}",
                    _interval("error", worst),
                    _interval("error", gap),
                )
            )
    notes = (
        "The group with the highest error, and the gap to the one with the lowest, with 95 % intervals that account "
        "for the choice of the worst among all groups: of small groups they are wide.",
    )
    headings = ("run", "by", "groups", "worst", "images", "error %", "gap, points")
    yield Table("groups", f"Worst groups: {images_of(report)}", headings, tuple(rows), 4, notes)
    for by, first in report.runs[0].groups.items():
        if by == "test set" or len(first.groups) > _MOST:
            continue
        for start in range(0, len(report.runs), _RUNS):
            places = range(len(report.runs))[start : start + _RUNS]
            yield from (_each(report, by, score, places) for score in ("error", "nll"))


def _each(report: Report, by: str, score: str, places: Sequence[int]) -> Table:
    """Return a score of each group, by some runs."""
    rows = tuple(
        (
            plain(name),
            f"{scores.examples:,}",
            *(_interval(score, getattr(report.runs[place].groups[by].groups[name], score)) for place in places),
        )
        for name, scores in report.runs[0].groups[by].groups.items()
    )
    note = (
        "In brackets, each group's own 95 % interval: exact for the error, Student's t for the NLL of 30 images or "
        "more. Of many groups, some miss by chance."
    )
    title = f"{SCORES[score].title} by {by}: {images_of(report)}"
    headings = (by, "images", *(label(report, place) for place in places))
    return Table("groups", title[0].upper() + title[1:], headings, rows, 1, (note,), detail=True)


def _interval(score: str, found: Bounds) -> str:
    write = SCORES[score].write
    interval = NOTHING if found.low is None else f"{write(found.low)}, {write(found.high)}"
    return f"{write(found.value)} [{interval}]"
