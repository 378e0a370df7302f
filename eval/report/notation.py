"""Formats of runs, costs and scores, for tables, sentences and figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ensembler.eval.metrics.comparison import Difference, Spread
from ensembler.eval.report.schema import Group, Report, RunReport

__all__ = [
    "NOTHING",
    "SCORES",
    "Score",
    "compact",
    "count_runs",
    "group_label",
    "label",
    "percent",
    "plain",
    "representatives",
    "spread_text",
    "training_passes",
    "verdict",
]

NOTHING = "–"
"""The text of ``null``."""


class Score(NamedTuple):
    """The format of a score: ``scale`` times its value, with ``digits`` decimal places."""

    title: str
    scale: float
    digits: int
    meaning: str

    def write(self, value: float | None, *, sign: bool = False) -> str:
        """Format a value."""
        if value is None:
            return NOTHING
        text = f"{value * self.scale:{'+' if sign else ''}.{self.digits}f}"
        return text.lstrip("+-") if not float(text) else text  # no -0.00


SCORES: dict[str, Score] = {
    "accuracy": Score("accuracy %", 100, 2, "share of images whose most probable class is right"),
    "error": Score("error %", 100, 2, "100 % minus the accuracy"),
    "nll": Score("NLL", 1, 4, "negative log-likelihood of the right class, in nats"),
    "calibrated_nll": Score(
        "calibrated NLL", 1, 4, "NLL after one temperature, fitted on the validation images to the pooled prediction"
    ),
    "brier": Score("Brier", 1, 4, "squared error of the probabilities, summed over the classes; 0 to 2"),
    "ece": Score("ECE %", 100, 2, "expected calibration error: confidence against accuracy in 15 bins of equal width"),
    "adaptive_ece": Score("adaptive ECE %", 100, 2, "ECE in 15 bins of equally many images"),
    "classwise_ece": Score("class-wise ECE %", 100, 3, "ECE of every class's own probability, mean over the classes"),
    "max_calibration_error": Score(
        "max. calibration error %", 100, 2, "the largest gap of ECE's bins, however few images a bin has"
    ),
    "l2_calibration_error": Score(
        "l2 calibration error %", 100, 2, "root mean square of ECE's gaps, without what the sampling of labels adds"
    ),
    "smooth_ece": Score(
        "smooth ECE %", 100, 2, "calibration error without bins, of gaps smoothed by a kernel as wide as the error"
    ),
    "aurc": Score("AURC %", 100, 3, "error among the k most confident images, averaged over all k"),
    "augrc": Score(
        "AUGRC %", 100, 3, "share of all images that are wrong and among the k most confident, averaged over all k"
    ),
    "risk_at_80": Score("risk at 80 %", 100, 2, "error in % among the most confident 80 % of the images"),
    "coverage_at_5": Score(
        "coverage at 5 %", 100, 2, "largest share of images, the most confident, with at most 5 % errors among them"
    ),
    "misclassification_auroc": Score(
        "AUROC of errors %",
        100,
        2,
        "probability that a right answer is more confident than a wrong one; 50 % is chance",
    ),
    "member_accuracy": Score("members' accuracy %", 100, 2, "mean of the members' own accuracies"),
    "member_nll": Score("members' NLL", 1, 4, "mean of the members' own NLLs, in nats"),
    "disagreement": Score("disagreement %", 100, 2, "share of pairs of members that predict different classes"),
    "predictive_entropy": Score("predictive entropy", 1, 4, "entropy of the mean prediction, in nats"),
    "expected_entropy": Score("expected entropy", 1, 4, "mean of the members' own entropies, in nats"),
    "mutual_information": Score(
        "mutual information", 1, 4, "predictive minus expected entropy: how much the members differ"
    ),
}
"""Every score of ``CellScores``; lower is better, except for the accuracies, the AUROC and the coverage."""


def plain(text: str) -> str:
    """Replace characters that cannot be printed or encoded, such as those of a folder's name."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def label(report: Report, number: int) -> str:
    """Return a run's label in tables and figures: its number, since names may be equal, and its name."""
    return f"{number + 1}: {plain(report.runs[number].name)}"


def percent(share: float, digits: int = 0) -> str:
    """Format a share, such as "95 %"."""
    return f"{100 * share:.{digits}f} %"


def compact(passes: int | None) -> str:
    """Format a number of passes, such as 1.5M."""
    if passes is None:
        return "unknown"
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if passes >= size:
            return f"{passes / size:,.1f}{unit}"
    return str(passes)


def training_passes(run: RunReport, write: Callable[[int | None], str] = compact) -> str:
    """Format a run's training cost: ``+?`` where a part is unknown, "unknown" where all of it is."""
    part = run.training_unknown and run.training_example_passes is not None
    return write(run.training_example_passes) + ("+?" if part else "")


def count_runs(count: int) -> str:
    """Format a number of runs, such as "2 runs"."""
    return "1 run" if count == 1 else f"{count} runs"


def representatives(report: Report, most: int) -> tuple[list[int], str]:
    """Choose the runs to show if more than ``most`` are too many: the first of each known group of seeds.

    Returns:
        Their positions, and a sentence on the choice, empty if all are shown.
    """
    everyone = list(range(len(report.runs)))
    groups = report.comparison.groups if report.comparison is not None else []
    if len(everyone) <= most or not 0 < len(groups) < len(everyone):
        return everyone, ""
    first = [group.runs[0] for group in groups]
    return first, f"One run of each group of seeds is shown: {', '.join(str(place + 1) for place in first)}."


def verdict(difference: Difference) -> str:
    """Return ``"lower"``, ``"higher"``, or ``"not significant"`` if the interval contains 0."""
    if difference.high < 0:
        return "lower"
    return "higher" if difference.low > 0 else "not significant"


def group_label(report: Report, group: Group) -> str:
    """Return a group's label: its method and the numbers of its runs."""
    return f"{plain(report.runs[group.runs[0]].method)} ({', '.join(str(place + 1) for place in group.runs)})"


def spread_text(name: str, found: Spread | None) -> str:
    """Format the mean of a score and its standard deviation, if there is one."""
    if found is None or found.deviation is None:
        return SCORES[name].write(None if found is None else found.mean)
    return f"{SCORES[name].write(found.mean)} ± {SCORES[name].write(found.deviation)}"
