"""What an evaluation found: the schema of its JSON, and its tables.

A report holds nothing that changes from one evaluation to the next (no dates, no timings of its own), so the same
runs and seed give the same bytes on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

__all__ = ["CellScores", "Report", "RunReport", "ShiftReport", "mean_scores", "tables"]


class CellScores(BaseModel):
    """Scores of the ensemble's mean prediction on one set of images. Entropies in nats; ``null``: M = 1 cannot say."""

    accuracy: float
    error: float
    nll: float
    brier: float
    ece: float
    member_accuracy: float
    disagreement: float | None
    predictive_entropy: float
    mutual_information: float | None


class ShiftReport(BaseModel):
    """Which shift: ``source`` says whether the files are the official ones. Means are over ``headline``."""

    name: str
    source: Literal["official", "generated"]
    note: str
    corruptions: list[str]
    headline: list[str]
    not_covered: list[str]


class RunReport(BaseModel):
    """One run's cost and scores.

    ``training_unknown`` names files of weights that training started from, whose own cost is not known and not counted;
    ``training_peak_memory`` is in bytes.
    """

    name: str
    method: str
    architecture: str
    vertices: int
    members: int
    parameters: int
    seed: int
    training_example_passes: int
    training_forward_passes: int
    training_unknown: list[str]
    training_seconds: float
    training_peak_memory: int | None
    training_device: str
    forward_passes_per_prediction: int
    clean: CellScores
    by_severity: dict[int, CellScores]
    shifted: CellScores | None
    cells: dict[str, dict[int, CellScores]]


class Report(BaseModel):
    """A whole evaluation."""

    format: Literal[1] = 1
    dataset: str
    test_examples: int
    test_sha256: str
    shift: ShiftReport | None
    runs: list[RunReport]
    device: str
    seed: int
    versions: dict[str, str]


def mean_scores(cells: Sequence[CellScores]) -> CellScores:
    """The plain mean over cells of equal size: "mean corruption error (unnormalised)" and its companions."""
    columns = {name: [getattr(cell, name) for cell in cells] for name in CellScores.model_fields}
    means = {name: None if None in column else float(np.mean(column)) for name, column in columns.items()}
    return CellScores.model_validate(means)


_METRICS = (
    ("error %", "error", 100.0, 2),
    ("NLL", "nll", 1.0, 4),
    ("Brier", "brier", 1.0, 4),
    ("ECE % (15 bins)", "ece", 100.0, 2),
    ("disagreement %", "disagreement", 100.0, 2),
)


def tables(report: Report) -> RenderableType:
    """The report for a terminal: what each run cost, then one table a metric, severities down, runs across."""
    scored: list[RenderableType] = []
    for title, name, scale, digits in _METRICS:
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("severity")
        for number, run in enumerate(report.runs, start=1):
            table.add_column(f"{number}: {run.method}", justify="right")
        rows = [("clean", [run.clean for run in report.runs])]
        if report.shift is not None:
            levels = report.runs[0].by_severity
            rows += [(str(severity), [run.by_severity[severity] for run in report.runs]) for severity in levels]
            rows.append(("mean 1-5", [run.shifted for run in report.runs if run.shifted is not None]))
        for label, columns in rows:
            table.add_row(label, *(_number(getattr(scores, name), scale, digits) for scores in columns))
        scored.append(table)
    parts: list[RenderableType] = [_costs(report), Text(), Columns(scored, padding=(0, 3))]
    if report.shift is not None:
        parts += [Text(), Text(report.shift.note)]
        parts.append(Text(f"Means are over: {', '.join(report.shift.headline)}."))
        if report.shift.not_covered:
            parts.append(Text(f"Not covered: {', '.join(report.shift.not_covered)}."))
    return Group(*parts)


def _costs(report: Report) -> Table:
    title = f"{report.dataset}, {report.test_examples:,} test images, on {report.device}"
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("run", "method", "network"):
        table.add_column(name, overflow="fold")
    for name in ("M", "example passes in training", "forward only", "training s", "forward passes a prediction"):
        table.add_column(name, justify="right")
    for number, run in enumerate(report.runs, start=1):
        table.add_row(
            f"{number}: {run.name}",
            run.method,
            run.architecture,
            str(run.members),
            " + ".join(
                (f"{run.training_example_passes:,}", *(f"those of {origin}" for origin in run.training_unknown))
            ),
            f"{run.training_forward_passes:,}",
            f"{run.training_seconds:,.0f}",
            str(run.forward_passes_per_prediction),
        )
    return table


def _number(value: float | None, scale: float, digits: int) -> str:
    return "-" if value is None else f"{value * scale:.{digits}f}"
