"""The schema of a report's JSON.

A report has no dates or timings of its own, so the same runs and seed give the same bytes on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ensembler.eval.metrics.classes import ClassScores, Confusion, ShownImage
from ensembler.eval.metrics.comparison import Difference, Spread
from ensembler.eval.metrics.groups import Groups
from ensembler.eval.metrics.members import CurvePoint, Equivalent
from ensembler.eval.metrics.ood import OodScores
from ensembler.eval.report.notebook import report_html, report_text
from ensembler.eval.shift.test_set import Source
from ensembler.record import Record

__all__ = [
    "CellScores",
    "Comparison",
    "Group",
    "MemberCurve",
    "OodReport",
    "OtherReport",
    "Report",
    "RunDifference",
    "RunEquivalent",
    "RunReport",
    "ShiftReport",
    "SingleMember",
    "mean_scores",
]


class CellScores(Record):
    """Scores of the ensemble's mean prediction on one set of images; see :mod:`ensembler.eval.metrics.classification`.

    Entropies and NLLs are in nats. ``calibrated_nll`` is the NLL after the run's temperature, fitted on the validation
    images. ``member_accuracy`` and ``member_nll`` are means over single members. ``null``: not defined for one member,
    if all answers are right or all wrong, or without validation images.
    """

    accuracy: float
    error: float
    nll: float
    calibrated_nll: float | None
    brier: float
    ece: float
    adaptive_ece: float
    classwise_ece: float
    max_calibration_error: float
    l2_calibration_error: float
    smooth_ece: float
    aurc: float
    augrc: float
    risk_at_80: float
    coverage_at_5: float
    misclassification_auroc: float | None
    member_accuracy: float
    member_nll: float
    disagreement: float | None
    predictive_entropy: float
    expected_entropy: float
    mutual_information: float | None


class SingleMember(Record):
    """One member's own scores on the clean test images."""

    accuracy: float
    nll: float


class ShiftReport(Record):
    """A shift; means are over ``headline``."""

    name: str
    source: Literal["official", "folder", "generated", "given"]
    note: str
    corruptions: list[str]
    headline: list[str]
    not_covered: list[str]


class OtherReport(Record):
    """Another test set of the same classes. ``classes``: the outputs that are scored; ``null``: all."""

    name: str
    source: Source
    images: int
    classes: list[int] | None
    note: str


class OodReport(Record):
    """A set of out-of-distribution images."""

    name: str
    title: str
    source: Source | Literal["given"]
    images: int


class RunReport(Record):
    """The cost and scores of one run, or of predictions made elsewhere, of which what is unknown is ``null``.

    ``sha256`` is of the run's manifest, which has the hash of each of its files, or of the file of predictions.
    ``training_unknown``: files of weights that training started from, whose own cost is unknown and not counted; a cost
    is ``null`` where all of it is unknown. ``training_peak_memory``: bytes. ``views``:
    variations of each image that predictions are means over, 0 for the image itself. ``temperature``: fitted to
    ``validation_examples`` images, whose hash is ``validation_sha256``; ``null`` without any. ``by_severity``,
    ``by_family`` and ``shifted`` are means over corruptions at all severities, of the headline or of the family;
    ``others``: by test set; ``ood``: by set of images and detector; ``groups``: by ``class``, by ``test set`` where
    there are several, and by the groups that were given, ``group``. ``confusion``, ``classes``, ``surest_mistakes`` and
    ``most_uncertain`` are of the clean test images; see :mod:`ensembler.eval.metrics.classes`. ``class_errors``: by
    corruption and class, means over severities; of more than 20 classes, those of the 20 with the highest error under
    shift.
    """

    name: str
    sha256: str | None
    method: str
    architecture: str | None
    vertices: int | None
    members: int
    parameters: int | None
    seed: int | None
    training_example_passes: int | None
    training_forward_passes: int | None
    training_unknown: list[str]
    training_seconds: float | None
    training_peak_memory: int | None
    training_device: str | None
    views: int
    forward_passes_per_prediction: int
    validation_examples: int | None
    validation_sha256: str | None
    temperature: float | None
    clean: CellScores
    single_members: list[SingleMember]
    by_severity: dict[int, CellScores]
    by_family: dict[str, CellScores]
    shifted: CellScores | None
    cells: dict[str, dict[int, CellScores]]
    others: dict[str, CellScores]
    ood: dict[str, dict[str, OodScores | None]]
    groups: dict[str, Groups]
    confusion: Confusion
    classes: dict[str, ClassScores]
    surest_mistakes: list[ShownImage]
    most_uncertain: list[ShownImage]
    class_errors: dict[str, dict[str, float | None]]


class RunDifference(Record):
    """Differences of a run from the baseline by score: clean, and as means over the shift's headline cells."""

    run: str
    clean: dict[str, Difference]
    shifted: dict[str, Difference] | None


class Group(Record):
    """Runs that differ only in their seeds.

    ``runs``: their positions in the report. A seed that appears twice in ``seeds`` is the same run made twice.
    ``scores``: the spread of each score, those under shift as ``shifted_NAME``.
    """

    runs: list[int]
    seeds: list[int | None]
    scores: dict[str, Spread]


class RunEquivalent(Equivalent):
    """A run's deep-ensemble equivalent; ``reference`` is the deep ensemble."""

    reference: str


class MemberCurve(Record):
    """Test scores against the number of members.

    ``order``: the members' greedy order on the validation images; ``recommended``: the smallest number of members, in
    that order, that is not significantly worse than all on these ``validation_examples``, ``null`` where so few cannot
    tell.
    """

    run: str
    order: list[int]
    recommended: int | None
    validation_examples: int
    points: list[CurvePoint]


class Comparison(Record):
    """A comparison of runs with one of them, the baseline, by a paired bootstrap over test examples.

    ``best``: by ``clean`` and ``shifted``, then by score, the positions of runs in the report: first the one with the
    lowest value, then those that a paired interval does not tell apart from it. ``equivalents``: of the runs for which
    a deep ensemble of the same network is among the runs.
    """

    baseline: str
    confidence: float
    resamples: int
    differences: list[RunDifference]
    best: dict[str, dict[str, list[int]]]
    groups: list[Group]
    equivalents: dict[str, RunEquivalent]
    curves: list[MemberCurve]


class Report(Record):
    """A whole evaluation.

    ``test_sha256``: of the test images and labels; ``null`` if only their predictions are known. ``classes``: their
    names. ``omitted``: test sets that were not scored, since not all predictions that were given have them.
    """

    format: Literal[1] = 1
    dataset: str
    test_examples: int
    test_sha256: str | None
    classes: list[str]
    omitted: list[str]
    shift: ShiftReport | None
    others: list[OtherReport]
    ood: list[OodReport]
    runs: list[RunReport]
    comparison: Comparison | None = None
    device: str | None
    seed: int
    versions: dict[str, str]

    def __repr__(self) -> str:
        return f"Report of {report_text(self)}"

    def _repr_html_(self) -> str:
        return report_html(self)


def mean_scores(cells: Sequence[CellScores]) -> CellScores:
    """Compute the mean over cells of equal size: "mean corruption error (unnormalised)" and the other scores."""
    columns = {name: [getattr(cell, name) for cell in cells] for name in CellScores.model_fields}
    means = {name: None if None in column else float(np.mean(column)) for name, column in columns.items()}
    return CellScores.model_validate(means)
