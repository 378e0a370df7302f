"""A study's report, as it is written as JSON. It has no times: the same runs give the same bytes."""

from __future__ import annotations

import textwrap
from typing import Literal

from ensembler.record import Record
from ensembler.text import counted, printable

__all__ = ["CellReport", "Estimate", "LeftOutReport", "PublishedFigure", "StudyReport"]


class Estimate(Record):
    """A mean over seeds with its interval, over seeds and images."""

    mean: float
    low: float
    high: float


class CellReport(Record):
    """A method at a budget, over its seeds.

    Attributes:
        method: its label.
        budget: in multiples of B, as asked for.
        members: M, forward passes a prediction.
        passes: example passes that it took; a training that members share counts once.
        forward_passes: of its training, for BatchNorm statistics and measurements.
        scores: by name; those that were not measured are missing.
        behind: its score ``by`` which methods are judged minus that of the best one at this budget, ``null`` of itself;
            the intervals of all of these differences hold together.
        behind_all, shift_behind: likewise, minus that of the best of all, and of the best of all under shift.
        needed: members whose validation NLL is not significantly worse than that of all, mean over the seeds that
            can tell.
        equivalent: networks of a deep ensemble of the same calibrated NLL, mean over the seeds, and how to say it.
    """

    method: str
    budget: float
    seeds: list[int]
    members: int
    passes: int
    forward_passes: int
    scores: dict[str, Estimate]
    behind: Estimate | None = None
    behind_all: Estimate | None = None
    shift_behind: Estimate | None = None
    needed: float | None
    equivalent: str | None


class LeftOutReport(Record):
    """A method that is not compared at a budget, and why."""

    method: str
    budget: float
    why: str


class PublishedFigure(Record):
    """A published figure, and ours; in the unit of the tables."""

    source: str
    score: str
    method: str
    budget: float
    published: float
    ours: float | None


class StudyReport(Record):
    """A whole study.

    Attributes:
        one: B, example passes of one network.
        epochs: of that network.
        rules: how each method spends a budget.
        trained: example passes of all trainings, of which cells share some.
        by: the score that methods are judged by: calibrated NLL, where there are validation images to fit a temperature
            on. Without it, a confidence that one number mends would decide (Ashukha et al. 2020, sec. 4).
        cells: by budget, each from the best up.
    """

    kind: Literal["study"] = "study"
    format: Literal[1] = 1
    dataset: str
    architecture: str
    epochs: float
    one: int
    seeds: list[int]
    rules: dict[str, str]
    trained: int
    by: Literal["calibrated_nll", "nll"]
    test_examples: int
    test_sha256: str | None
    shift: str | None
    ood: list[str]
    confidence: float
    resamples: int
    cells: list[CellReport]
    left_out: list[LeftOutReport]
    published: list[PublishedFigure]
    device: str | None
    versions: dict[str, str]

    def __repr__(self) -> str:
        from ensembler.study.sentences import answers

        what = f"{counted(len(self.cells), 'cell')}, {counted(len(self.seeds), 'seed')}"
        lines = [f"StudyReport of {printable(self.architecture)} on {printable(self.dataset)}: {what}", *answers(self)]
        return "\n  ".join(textwrap.shorten(line, 118) for line in lines[:5])
