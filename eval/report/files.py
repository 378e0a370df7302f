"""The files of a report, by their names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ensembler.eval.report.figures import figures
from ensembler.eval.report.page import page
from ensembler.eval.report.plots import to_png
from ensembler.eval.report.text import csv, markdown

if TYPE_CHECKING:
    from ensembler.eval.evaluation import Evaluation

__all__ = ["report_files"]


def report_files(found: Evaluation, *, seconds: float | None = None, command: str | None = None) -> dict[str, bytes]:
    """Return the page, Markdown, CSV, JSON and figures of an evaluation.

    Args:
        found: the evaluation, its report with or without a comparison.
        seconds: its duration, if known.
        command: as typed.
    """
    report = found.report
    drawn = figures(found, report)
    return {
        "report.html": page(found, report, drawn, seconds=seconds, command=command),
        "report.md": markdown(report).encode(),
        "report.csv": csv(report).encode(),
        "report.json": (report.model_dump_json(indent=2) + "\n").encode(),
        **{f"{title}.png": to_png(picture.figure) for title, picture in drawn.items()},
    }
