"""The figures of an evaluation, with captions and alternative texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ensembler.eval.evaluation import Evaluation
from ensembler.eval.metrics.classification import BINS
from ensembler.eval.metrics.comparison import Losses
from ensembler.eval.metrics.embedding import classical_scaling, pairwise_disagreement
from ensembler.eval.metrics.selective import Reliability, RiskCoverage, reliability, risk_coverage
from ensembler.eval.report.class_plots import plot_class_errors, plot_confusion
from ensembler.eval.report.comparison_plots import plot_differences, plot_members
from ensembler.eval.report.notation import count_runs, label, percent, representatives, training_passes
from ensembler.eval.report.plots import (
    drawable,
    plot_boxes,
    plot_entropy,
    plot_map,
    plot_rejection,
    plot_reliability,
    plot_severity,
    settle,
)
from ensembler.eval.report.schema import Report, RunReport, ShiftReport
from ensembler.eval.report.styles import PALETTE, Style, styles

__all__ = ["Picture", "figures", "run_styles"]

_SHORT = 36  # characters of a class in a figure


@dataclass(frozen=True, eq=False)
class Picture:
    """A figure with its texts.

    Attributes:
        section: the part of a report that it belongs to, as for tables.
        figure: for :func:`ensembler.eval.report.plots.to_png` and ``to_svg``.
        caption: what it shows.
        alt: the alternative text; the numbers are in the tables.
    """

    section: str
    figure: Figure
    caption: str
    alt: str


def figures(found: Evaluation, report: Report) -> dict[str, Picture]:
    """Draw every figure for which there are data, by the name of its file, in reading order.

    With more runs than colours, figures of single runs show only the first seed of each group.

    Args:
        found: the evaluation.
        report: its report, or the one with a comparison.
    """
    places, said = representatives(report, most=len(PALETTE))
    drawn = f" {said}".rstrip()
    names, every = [_name(report, place) for place in places], run_styles(report)
    own = [every[place] for place in places]
    runs = [found.runs[place] for place in places]
    reports = [report.runs[place] for place in places]
    shift = report.shift if all(run.shifted for run in runs) else None
    listed = count_runs(len(names))
    clean = [_reliability(run.losses) for run in runs]
    pictures = {
        "reliability": Picture(
            "calibration",
            plot_reliability(names, own, clean),
            f"Reliability on the clean test images: accuracy against confidence in {BINS} bins of equal width. Bars "
            f"below the dashed line: overconfident. The grey line is the share of images in each bin.{drawn}",
            f"Reliability diagrams of {listed} on clean images.",
        )
    }
    shifted = [run.shifted for run in runs if run.shifted is not None]
    if shift is not None:
        under = f"{shift.source} shift"
        pictures["reliability-shifted"] = Picture(
            "calibration",
            plot_reliability(names, own, [_reliability(losses) for losses in shifted]),
            f"The same under {under}, all {_cells(shift)} pooled. Gaps of opposite sign cancel here between cells, but "
            f"not in the tables' ECE, a mean over cells.{drawn}",
            f"Reliability diagrams of {listed} under {under}.",
        )
        pictures["severity"] = Picture(
            "shift",
            plot_severity(names, own, reports),
            f"Error, NLL and ECE by severity, {under}: means over {len(shift.headline)} corruptions.{drawn}",
            f"Lines of error, NLL and ECE of {listed} over severities 0 (clean) to 5.",
        )
        pictures["boxes"] = Picture(
            "shift",
            plot_boxes(names, own, reports, shift.headline),
            f"Error, NLL and ECE over the {len(shift.headline)} corruptions at each severity, {under}: median, "
            f"quartiles, minimum and maximum; the mark at 0 is the clean score.{drawn}",
            f"Box plots of error, NLL and ECE of {listed} over corruptions, at severities 1 to 5.",
        )
    pictures["rejection"] = Picture(
        "rejection",
        plot_rejection(
            names,
            own,
            [_risk_coverage(run.losses) for run in runs],
            [_risk_coverage(losses) for losses in shifted] if shift is not None else None,
        ),
        f"Accuracy on the most confident images against the share of images answered{_and_shifted(shift)}.{drawn}",
        f"Accuracy-rejection curves of {listed}.",
    )
    if report.ood:
        titles = {f"{place}: {drawable(one.title)}": one.name for place, one in enumerate(report.ood, start=1)}
        pictures["entropy"] = Picture(
            "ood",
            plot_entropy(
                names,
                own,
                [run.entropies["clean"] for run in runs],
                {title: [run.entropies[name] for run in runs] for title, name in titles.items()},
                runs[0].clean.mean.shape[1],
            ),
            f"Predictive entropy of the clean test images and of out-of-distribution images.{drawn}",
            f"Histograms of the predictive entropy of {listed}, in and out of distribution.",
        )
    pictures |= _classes(names, own, reports, report, drawn)
    pictures |= _map(names, own, [run.clean.classes for run in runs], drawn)
    pictures |= _comparison(report, every)
    first = next(name for name in ("severity", "differences", "reliability") if name in pictures)
    pictures[first] = replace(pictures[first], section="summary")
    for picture in pictures.values():
        settle(picture.figure)
    return pictures


def run_styles(report: Report) -> list[Style]:
    """Return each run's style; those that are shown where there are too many for the colours choose first."""
    shown, _ = representatives(report, most=len(PALETTE))
    return styles([(run.method, run.name) for run in report.runs], shown)


def _classes(
    names: Sequence[str], own: Sequence[Style], runs: Sequence[RunReport], report: Report, drawn: str
) -> dict[str, Picture]:
    """Draw the confusion of few classes, and the classes' errors under shift."""
    pictures = {}
    listed, classes = count_runs(len(names)), _class_names(report.classes)
    if any(name.startswith("#") for name in classes.values() if name not in report.classes):
        drawn += " #N: a class by its place in their order, whose name the figure's font lacks or is too long."
    counts = [run.confusion.counts for run in runs if run.confusion.counts is not None]
    if counts:
        pictures["confusion"] = Picture(
            "classes",
            plot_confusion(names, own, counts, list(classes.values())),
            "Confusion on the clean test images: rows are classes, columns the classes that they are answered with. "
            f"Numbers are images; the darker, the larger the share of the row.{drawn}",
            f"Confusion matrices of {listed} on clean images.",
        )
    shifted = [run.class_errors for run in runs]
    if report.shift is not None and all(shifted):
        pictures["class-errors"] = Picture(
            "classes",
            plot_class_errors(names, own, shifted, classes.__getitem__),
            f"Error by class and corruption, means over severities, on one scale.{drawn}",
            f"Heat maps of the error of {listed} by class and corruption.",
        )
    return pictures


def _map(
    names: Sequence[str], own: Sequence[Style], classes: Sequence[NDArray[np.int32]], drawn: str
) -> dict[str, Picture]:
    """Draw a map of three members or more that do not all agree."""
    ends = np.cumsum([len(votes) for votes in classes])
    disagreement = pairwise_disagreement(np.concatenate(classes)) if ends[-1] > 2 else np.zeros(1)
    if not disagreement.any():
        return {}
    points, shares = classical_scaling(disagreement)
    most = percent(disagreement.max(), 1)
    return {
        "map": Picture(
            "members",
            plot_map(names, own, np.split(points, ends[:-1]), shares),
            "Map of the members by their predictions on the clean test images: the squared distance of two is the "
            "share of images for which they predict different classes, as well as a plane can show it (classical "
            f"multidimensional scaling; Fort et al. 2019); at most {most}.{drawn}",
            f"Map of the members of {count_runs(len(names))} by their disagreement, at most {most}.",
        )
    }


def _comparison(report: Report, every: Sequence[Style]) -> dict[str, Picture]:
    comparison = report.comparison
    if comparison is None:
        return {}
    places = {run.name: place for place, run in enumerate(report.runs)}
    baseline = _name(report, places[comparison.baseline])
    pictures = {}
    for key, name, where in (("differences", "clean", "clean"), ("differences-shifted", "shifted", "under shift")):
        known = [(one.run, getattr(one, name)) for one in comparison.differences if getattr(one, name) is not None]
        if known:
            pictures[key] = Picture(
                "comparison",
                plot_differences(
                    [_name(report, places[run]) for run, _ in known],
                    [every[places[run]] for run, _ in known],
                    baseline,
                    [differences for _, differences in known],
                    comparison.confidence,
                ),
                f"Scores minus those of {baseline}, {where}, with {percent(comparison.confidence)} bootstrap intervals "
                "over the test images; lower is better. Hollow mark: the interval contains 0.",
                f"Forest plot of the differences of {count_runs(len(known))} from the baseline, {where}.",
            )
    if comparison.curves:
        drawn = [places[curve.run] for curve in comparison.curves]
        pictures["members"] = Picture(
            "number",
            plot_members(
                [_name(report, place) for place in drawn],
                [every[place] for place in drawn],
                [_passes(report.runs[place]) for place in drawn],
                [curve.points for curve in comparison.curves],
            ),
            "Clean scores against the number of members: solid, the mean over random subsets, with a band from best "
            "to worst; dashed, in the greedy order on the validation images.",
            f"Curves of calibrated NLL and error of {count_runs(len(drawn))} against members.",
        )
    return pictures


def _passes(run: RunReport) -> str:
    unknown = run.training_example_passes is None
    return "unknown training cost" if unknown else f"{training_passes(run)} passes"


def _name(report: Report, number: int) -> str:
    return drawable(label(report, number))


def _class_names(classes: Sequence[str]) -> dict[str, str]:
    """Return how each class is called in figures: by its number, from 1, if its name cannot be drawn or told apart."""
    drawn = [drawable(name, _SHORT) for name in classes]
    once = [name for name, count in Counter(drawn).items() if count == 1]
    return {
        own: name if name in once and name.count("?") == own.count("?") else f"#{number}"
        for number, (own, name) in enumerate(zip(classes, drawn, strict=True), start=1)
    }


def _reliability(losses: Losses) -> Reliability:
    return reliability(losses.confidence.ravel(), losses.correct.ravel(), BINS)


def _risk_coverage(losses: Losses) -> RiskCoverage:
    return risk_coverage(losses.confidence.ravel(), losses.correct.ravel())


def _cells(shift: ShiftReport) -> str:
    return f"{5 * len(shift.headline)} cells"


def _and_shifted(shift: ShiftReport | None) -> str:
    return "" if shift is None else f", clean and under {shift.source} shift, all {_cells(shift)} pooled"
