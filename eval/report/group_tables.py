"""The tables of groups of images: the worst of them and the gap, and each group."""

from __future__ import annotations

from collections.abc import Iterator

from ensembler.eval.metrics.groups import Bounds
from ensembler.eval.report.notation import NOTHING, SCORES, label, plain
from ensembler.eval.report.schema import Report
from ensembler.eval.report.table import Table, images_of

__all__ = ["group_tables"]

_MOST = 30  # groups of a table


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
        yield Table(
            "groups",
            f"Error and NLL by {by}: {images_of(report)}",
            (by, "images", *(f"{label(report, n)}: {s}" for n in range(len(report.runs)) for s in ("error %", "NLL"))),
            tuple(
                (
                    plain(name),
                    f"{scores.examples:,}",
                    *(
                        _interval(score, getattr(run.groups[by].groups[name], score))
                        for run in report.runs
                        for score in ("error", "nll")
                    ),
                )
                for name, scores in first.groups.items()
            ),
            1,
            (
                "In brackets, each group's own 95 % interval: exact for the error, Student's t for the NLL of 30 "
                "images or more. Of many groups, some miss by chance.",
            ),
            detail=True,
        )


def _interval(score: str, found: Bounds) -> str:
    write = SCORES[score].write
    interval = NOTHING if found.low is None else f"{write(found.low)}, {write(found.high)}"
    return f"{write(found.value)} [{interval}]"
