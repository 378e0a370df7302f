"""How runs, costs and scores are written: once, for tables, sentences and pictures alike."""

from __future__ import annotations

from typing import NamedTuple

from ensembler.eval.report.schema import Group, Report
from ensembler.eval.scores.comparison import Difference, Spread

__all__ = [
    "NOTHING",
    "SCORES",
    "Score",
    "compact",
    "count_runs",
    "group_label",
    "label",
    "plain",
    "representatives",
    "spread_text",
    "told_apart",
]

NOTHING = "–"
"""Stands for ``null``."""


class Score(NamedTuple):
    """How a score is written: ``scale`` times its value to so many digits."""

    title: str
    scale: float
    digits: int
    meaning: str

    def write(self, value: float | None, *, sign: bool = False) -> str:
        """The value as text."""
        if value is None:
            return NOTHING
        text = f"{value * self.scale:{'+' if sign else ''}.{self.digits}f}"
        return text.lstrip("+-") if not float(text) else text  # no -0.00


SCORES: dict[str, Score] = {
    "accuracy": Score("accuracy %", 100, 2, "share of images whose most probable class is right"),
    "error": Score("error %", 100, 2, "100 % less the accuracy"),
    "nll": Score("NLL", 1, 4, "negative log-likelihood of the right class, in nats"),
    "calibrated_nll": Score(
        "calibrated NLL", 1, 4, "NLL after one temperature, fitted on the validation images to the pooled prediction"
    ),
    "brier": Score("Brier", 1, 4, "squared error of the probabilities, summed over the classes; 0 to 2"),
    "ece": Score("ECE %", 100, 2, "expected calibration error: confidence against accuracy in 15 bins of equal width"),
    "adaptive_ece": Score("adaptive ECE %", 100, 2, "ECE in 15 bins that hold equally many images"),
    "classwise_ece": Score("class-wise ECE %", 100, 3, "ECE of every class's own probability, mean over the classes"),
    "max_calibration_error": Score(
        "max. calibration error %", 100, 2, "the largest gap among ECE's bins, however few images it holds"
    ),
    "aurc": Score(
        "AURC %", 100, 3, "error among the most confident images, averaged over every number of images that one keeps"
    ),
    "risk_at_80": Score("risk at 80 %", 100, 2, "error in % among the most confident 80 % of the images"),
    "misclassification_auroc": Score(
        "AUROC of errors %", 100, 2, "how often a right answer is more confident than a wrong one; 50 % is chance"
    ),
    "member_accuracy": Score("members' accuracy %", 100, 2, "mean of the members' own accuracies"),
    "member_nll": Score("members' NLL", 1, 4, "mean of the members' own NLLs, in nats"),
    "disagreement": Score("disagreement %", 100, 2, "how often two members name different classes"),
    "predictive_entropy": Score("predictive entropy", 1, 4, "entropy of the mean prediction, in nats"),
    "expected_entropy": Score("expected entropy", 1, 4, "mean of the members' own entropies, in nats"),
    "mutual_information": Score(
        "mutual information", 1, 4, "predictive less expected entropy: how far the members differ"
    ),
}
"""Every score of the schema's ``CellScores``; lower is better but for the accuracies and the AUROC."""


def plain(text: str) -> str:
    """One line that can be printed and encoded, whatever a folder's name holds."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def label(report: Report, number: int) -> str:
    """What a run is called in tables and pictures: its place, since two runs may share a name, and its name."""
    return f"{number + 1}: {plain(report.runs[number].name)}"


def compact(passes: int) -> str:
    """A number of passes, such as 1.5M."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if passes >= size:
            return f"{passes / size:,.1f}{unit}"
    return str(passes)


def count_runs(count: int) -> str:
    """A number of runs, such as "2 runs"."""
    return "1 run" if count == 1 else f"{count} runs"


def representatives(report: Report, most: int) -> tuple[list[int], str]:
    """The places of the runs to show where more than ``most`` are too many, and what must then be said of it.

    Those are the first of each group of seeds, if the groups are known; else all.
    """
    everyone = list(range(len(report.runs)))
    groups = report.comparison.groups if report.comparison is not None else []
    if len(everyone) <= most or not 0 < len(groups) < len(everyone):
        return everyone, ""
    first = [group.runs[0] for group in groups]
    return first, f"One run of each group of seeds is shown: {', '.join(str(place + 1) for place in first)}."


def told_apart(difference: Difference) -> str:
    """``"lower"``, ``"higher"``, or that the interval holds 0."""
    if difference.high < 0:
        return "lower"
    return "higher" if difference.low > 0 else "not told apart"


def group_label(report: Report, group: Group) -> str:
    """A group's method, and the places of its runs."""
    return f"{plain(report.runs[group.runs[0]].method)} ({', '.join(str(place + 1) for place in group.runs)})"


def spread_text(name: str, found: Spread | None) -> str:
    """The mean of a score and its standard deviation, where there is one."""
    if found is None or found.deviation is None:
        return SCORES[name].write(None if found is None else found.mean)
    return f"{SCORES[name].write(found.mean)} ± {SCORES[name].write(found.deviation)}"
