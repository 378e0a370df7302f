"""A report as whoever prints it sees it, in five lines, and as a notebook shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ensembler.text import counted, printable

if TYPE_CHECKING:
    from ensembler.eval.evaluation import Evaluation
    from ensembler.eval.report.schema import Report

__all__ = ["evaluation_html", "report_html", "report_text"]

_ROWS = 4


def report_text(report: Report) -> str:
    """Describe a report in five lines: its test images, and a line a run."""
    compared = "" if report.comparison is None else f", compared with {printable(report.comparison.baseline)}"
    title = f"{counted(len(report.runs), 'run')} on {counted(report.test_examples, 'test image')} of "
    lines = [f"{title}{printable(report.dataset)}{compared}"]
    for run in report.runs:
        clean, shifted = run.clean, run.shifted
        line = f"  {printable(run.name)}: accuracy {clean.accuracy:.4f}, NLL {clean.nll:.4f}, ECE {clean.ece:.4f}"
        lines.append(line if shifted is None else f"{line}; under shift {shifted.accuracy:.4f}, {shifted.nll:.4f}")
    if len(lines) > _ROWS + 1:
        lines[_ROWS:] = [f"  and {len(report.runs) - _ROWS + 1} more"]
    return "\n".join(lines)


def report_html(report: Report, figure: str = "") -> str:
    """Render a report's findings and its main table, and a figure between them."""
    from ensembler.eval.report.page import bullets, html_table
    from ensembler.eval.report.sentences import findings
    from ensembler.eval.report.tables import report_tables

    table = next(iter(report_tables(report)))
    return "\n".join([bullets(findings(report)), figure, html_table(table, table.notes)])


def evaluation_html(found: Evaluation) -> str:
    """Render an evaluation's findings, its main table, and its figure: scores by severity, or else reliability."""
    from ensembler.eval.report.figures import figures
    from ensembler.eval.report.page import html_figure

    drawn = figures(found, found.report)
    return report_html(found.report, html_figure(drawn.get("severity") or next(iter(drawn.values()))))
