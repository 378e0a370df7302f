"""A report's tables, as rows of text: one definition for the terminal, Markdown and the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ensembler.eval.report.notation import (
    NOTHING,
    SCORES,
    Score,
    compact,
    group_label,
    label,
    plain,
    spread_text,
    told_apart,
)
from ensembler.eval.report.schema import CellScores, Comparison, Report, RunReport, ShiftReport
from ensembler.eval.scores.comparison import Difference
from ensembler.eval.scores.members import CurvePoint, MemberScores
from ensembler.eval.scores.ood import OodScores
from ensembler.eval.scores.shift_scores import FAMILIES

__all__ = ["Table", "about", "report_tables"]

_DETECTORS = {
    "predictive_entropy": "entropy",
    "mutual_information": "mutual inf.",
    "one_minus_max": "1 - max p",
}

_OOD = {"auroc": "AUROC", "fpr_at_95": "FPR@95", "aupr_out": "AUPR out", "aupr_in": "AUPR in"}
_PERCENT = Score("%", 100, 2, "")
_ONE_MEMBER = f"{NOTHING}: one member cannot say."


@dataclass(frozen=True)
class Table:
    """Text in rows and columns.

    Attributes:
        section: the part of a report that it belongs to.
        title: what it is, and of which images.
        columns: their headings.
        rows: as many cells each as there are columns; the first names the row.
        words: how many of the first columns are words; the others are figures, flush right.
        notes: what must stand beside it.
        detail: left to the page, where there is room.
    """

    section: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1
    notes: tuple[str, ...] = ()
    detail: bool = False


def about(report: Report) -> list[str]:
    """What must be known of all tables: which images, which shift, made where."""
    found = [f"{_images(report)}; predicted on {plain(report.device)}; seed {report.seed}."]
    if report.shift is not None:
        found += [report.shift.note, f"Means are over: {', '.join(report.shift.headline) or 'no corruption'}."]
        if report.shift.not_covered:
            found.append(f"Not covered: {', '.join(report.shift.not_covered)}.")
    return found


def report_tables(report: Report) -> list[Table]:
    """All tables that the report has something for, in reading order."""
    found = [_costs(report), _clean(report), _calibration(report), _members(report)]
    if report.shift is not None:
        found += _severities(report, report.shift) if _meant(report) else []
        found += _families(report, report.shift)
    found.append(_selective(report))
    found += _ood(report)
    if report.comparison is not None:
        found += [*_differences(report, report.comparison), *_groups(report, report.comparison)]
        found += [*_equivalents(report, report.comparison), *_curves(report, report.comparison)]
    if report.shift is not None:
        found += [_cells(report, report.shift, number) for number in range(len(report.runs))]
    return found


# --- rows -----------------------------------------------------------------------------------------------------------

_Column = tuple[str, Callable[[RunReport], str]]


def _by_run(
    report: Report,
    section: str,
    title: str,
    columns: Sequence[_Column],
    *,
    notes: Sequence[str] = (),
    detail: bool = False,
    words: int = 1,
) -> Table:
    rows = tuple(
        (label(report, number), *(write(run) for _, write in columns)) for number, run in enumerate(report.runs)
    )
    headings = ("run", *(heading for heading, _ in columns))
    return Table(section, title, headings, rows, words, tuple(notes), detail)


def _score(name: str, of: Callable[[RunReport], CellScores | None], title: str | None = None) -> _Column:
    def write(run: RunReport) -> str:
        scores = of(run)
        return SCORES[name].write(None if scores is None else getattr(scores, name))

    return SCORES[name].title if title is None else title, write


def _of_clean(run: RunReport) -> CellScores:
    return run.clean


def _of_shifted(run: RunReport) -> CellScores | None:
    return run.shifted


_COST: tuple[_Column, ...] = (
    ("M", lambda run: str(run.members)),
    ("passes", lambda run: compact(run.training_example_passes) + ("+?" if run.training_unknown else "")),
)
"""What stands beside every run's scores."""


def _images(report: Report) -> str:
    return f"{report.test_examples:,} test images of {plain(report.dataset)}"


def _meant(report: Report) -> ShiftReport | None:
    """The shift, where it has corruptions that means are over."""
    return report.shift if report.runs[0].shifted is not None else None


def _under(shift: ShiftReport) -> str:
    return f"under {shift.source} shift"


def _lone(report: Report) -> list[str]:
    return [_ONE_MEMBER] if any(run.members == 1 for run in report.runs) else []


def _costs(report: Report) -> Table:
    notes = [
        "Example passes: an image forward and backward once; forward only: such as for BatchNorm statistics. M members "
        "take M forward passes a prediction."
    ]
    notes += [
        f"{label(report, number)} began with {', '.join(map(plain, run.training_unknown))}, whose own training is not "
        "known and not counted (+?)."
        for number, run in enumerate(report.runs)
        if run.training_unknown
    ]
    columns: list[_Column] = [
        ("method", lambda run: plain(run.method)),
        ("network", lambda run: plain(run.architecture)),
        ("seed", lambda run: str(run.seed)),
        ("M", lambda run: str(run.forward_passes_per_prediction)),
        (
            "example passes",
            lambda run: f"{run.training_example_passes:,}" + ("+?" if run.training_unknown else ""),
        ),
        ("forward only", lambda run: f"{run.training_forward_passes:,}"),
        ("seconds", lambda run: f"{run.training_seconds:,.0f}"),
        ("on", lambda run: plain(run.training_device)),
    ]
    return _by_run(report, "costs", "What training took", columns, notes=notes, words=3)


def _clean(report: Report) -> Table:
    names = ("error", "nll", "calibrated_nll", "brier", "ece", "aurc")
    columns = [*_COST, *(_score(name, _of_clean) for name in names)]
    notes = ["M: members, so forward passes a prediction; passes: example passes in training."]
    return _by_run(report, "clean", f"Clean: {_images(report)}", columns, notes=notes)


def _calibration(report: Report) -> Table:
    names = ("ece", "adaptive_ece", "classwise_ece", "mce", "nll", "calibrated_nll")
    sets: list[tuple[str, Callable[[RunReport], CellScores | None]]] = [("clean", _of_clean)]
    if (shift := _meant(report)) is not None:
        sets.append(("shifted", _of_shifted))
    rows = []
    for number, run in enumerate(report.runs):
        for title, of in sets:
            figures = (_score(name, of)[1](run) for name in names)
            rows.append((label(report, number), title, *figures, f"{run.temperature:.3f}"))
    headings = ("run", "images", *(SCORES[name].title for name in names), "temperature")
    notes = [f"The temperature was fitted on {report.validation_examples:,} validation images; above 1 it softens."]
    if shift is not None:
        notes.append(f"Shifted ({shift.source}): mean over {_means(shift)}.")
    title = f"Calibration: {_images(report)}"
    return Table("calibration", title, headings, tuple(rows), 2, tuple(notes), detail=True)


def _members(report: Report) -> Table:
    names = ("disagreement", "mutual_information", "expected_entropy", "predictive_entropy", "accuracy")
    columns = [*_COST, *(_score(name, _of_clean) for name in names)]
    columns += [
        _score("member_accuracy", _of_clean),
        ("least %", lambda run: SCORES["accuracy"].write(min(one.accuracy for one in run.single_members))),
        ("greatest %", lambda run: SCORES["accuracy"].write(max(one.accuracy for one in run.single_members))),
    ]
    notes = ["Entropies and mutual information in nats; least and greatest: of the members' own accuracies."]
    title = f"Members: {_images(report)}, clean"
    return _by_run(report, "members", title, columns, notes=[*notes, *_lone(report)], detail=True)


def _means(shift: ShiftReport) -> str:
    return f"{len(shift.headline)} corruptions x 5 severities"


def _severities(report: Report, shift: ShiftReport) -> Iterator[Table]:
    levels = list(report.runs[0].by_severity)
    companions = {
        "error": "Mean corruption error (unnormalised), %",
        "nll": "Mean corruption NLL",
        "ece": "Mean corruption ECE, %",
        "brier": "Mean corruption Brier score",
        "calibrated_nll": "Mean corruption NLL, calibrated on clean validation images",
        "disagreement": "Mean corruption disagreement, %",
    }
    for name, title in companions.items():
        columns = [*_COST, _score(name, _of_clean, "clean")]
        columns += [_score(name, lambda run, level=level: run.by_severity[level], str(level)) for level in levels]  # type: ignore[misc]
        columns.append(_score(name, _of_shifted, "mean 1-5"))
        yield _by_run(
            report,
            "shift",
            f"{title}, {shift.source} shift",
            columns,
            notes=[
                f"By severity; means over {len(shift.headline)} corruptions, {_images(report)} each.",
                *(_lone(report) if name == "disagreement" else []),
            ],
            detail=name not in ("error", "nll", "ece"),
        )


def _families(report: Report, shift: ShiftReport) -> Iterator[Table]:
    families = list(report.runs[0].by_family)
    covered = {family: [name for name in FAMILIES[family] if name in shift.corruptions] for family in families}
    notes = [f"{family}: {', '.join(names)}" for family, names in covered.items()]
    if "validation" in covered:
        notes[-1] += ", which count in no other mean"
    for name, title in (("error", "Error, %"), ("nll", "NLL"), ("ece", "ECE, %")):
        columns = [
            *_COST,
            *(_score(name, lambda run, family=family: run.by_family[family], family) for family in families),  # type: ignore[misc]
        ]
        yield _by_run(
            report,
            "shift",
            f"{title}, {shift.source} shift, by family",
            columns,
            notes=[f"Means over corruptions and severities. {'; '.join(notes)}."],
            detail=name != "error",
        )


def _selective(report: Report) -> Table:
    names = ("aurc", "risk_at_80", "misclassification_auroc")
    columns = [*_COST, *(_score(name, _of_clean) for name in names)]
    if (shift := _meant(report)) is not None:
        columns += [_score(name, _of_shifted, f"shifted {SCORES[name].title}") for name in names]
    title = f"Answering only when confident: {_images(report)}"
    notes = [f"Shifted ({shift.source}): mean over {_means(shift)}."] if shift else []
    return _by_run(report, "rejection", title, columns, notes=notes, detail=True)


def _ood(report: Report) -> Iterator[Table]:
    for images in report.ood:
        for measures in (("auroc", "fpr_at_95"), ("aupr_out", "aupr_in")):
            columns = list(_COST)
            for measure in measures:
                for detector, heading in _DETECTORS.items():
                    columns.append(
                        (
                            f"{_OOD[measure]} {heading}",
                            lambda run, m=measure, d=detector, n=images.name: _ood_figure(run.ood[n][d], m),  # type: ignore[misc]
                        )
                    )
            kinds = " and ".join(_OOD[measure] for measure in measures)
            title = f"{plain(images.title)}: {kinds}, %"
            counts = (
                f"Telling {images.images:,} images ({images.source}) from {report.test_examples:,} clean test images "
                "by predictive entropy, mutual information, and 1 less the largest probability."
            )
            if "fpr_at_95" in measures:
                notes = [
                    f"{counts} FPR@95: share of clean images flagged where 95 % of the others are; lower is better."
                ]
            else:
                notes = [f"{counts} AUPR out: out of distribution is the positive class; AUPR in: the other way round."]
            detail = "auroc" not in measures
            yield _by_run(report, "ood", title, columns, notes=[*notes, *_lone(report)], detail=detail)


def _ood_figure(scores: OodScores | None, measure: str) -> str:
    return _PERCENT.write(None if scores is None else getattr(scores, measure))


def _differences(report: Report, comparison: Comparison) -> Iterator[Table]:
    places = {run.name: number for number, run in enumerate(report.runs)}
    baseline = label(report, places[comparison.baseline])
    base = " and ".join(f"{heading} {write(report.runs[places[comparison.baseline]])}" for heading, write in _COST)
    note = (
        f"The run's score less that of {baseline} ({base}); lower is better. Low to high: {comparison.confidence:.0%} "
        f"interval of a paired bootstrap over the test images, {comparison.resamples:,} resamples. P(better): share of "
        "these in which the run has the lower score. They say how far the choice of test images decides, and nothing "
        "of another training seed."
    )
    headings = ("run", "score", "reads", *(heading for heading, _ in _COST), "difference", "low", "high", "P(better)")
    sets = [("clean", f"Clean: {_images(report)}")]
    if (shift := _meant(report)) is not None:
        sets.append(("shifted", f"{_under(shift).capitalize()}: means over {_means(shift)}"))
    for where, images in sets:
        for scores, names in ((("error", "nll"), "error and NLL"), (("brier", "ece"), "Brier score and ECE")):
            rows = tuple(
                _difference(report, places[found.run], name, getattr(found, where)[name])
                for found in comparison.differences
                for name in scores
                if getattr(found, where) is not None
            )
            title = f"{images}: differences from {baseline} in {names}"
            yield Table("comparison", title, headings, rows, 3, (note,), detail="error" not in scores)


def _difference(report: Report, place: int, name: str, one: Difference) -> tuple[str, ...]:
    cost = (write(report.runs[place]) for _, write in _COST)
    figures = (SCORES[name].write(value, sign=True) for value in (one.difference, one.low, one.high))
    chance = f"{one.probability_better:.3f}"
    return (label(report, place), SCORES[name].title, told_apart(one), *cost, *figures, chance)


def _groups(report: Report, comparison: Comparison) -> Iterator[Table]:
    groups = [group for group in comparison.groups if len(group.runs) > 1]
    sets = [("", f"Clean: {_images(report)}")]
    if (shift := _meant(report)) is not None:
        sets.append(("shifted_", f"{_under(shift).capitalize()}: means over {_means(shift)}"))
    names = ("error", "nll", "calibrated_nll", "brier", "ece")
    for prefix, title in sets if groups else ():
        rows = []
        for group in groups:
            spreads = (spread_text(name, group.scores.get(f"{prefix}{name}")) for name in names)
            first = report.runs[group.runs[0]]
            rows.append(
                (group_label(report, group), str(len(group.runs)), *(write(first) for _, write in _COST), *spreads)
            )
        headings = ("runs", "seeds", *(heading for heading, _ in _COST), *(SCORES[name].title for name in names))
        notes = ("Mean and sample standard deviation over runs that differ in their seed alone.",)
        yield Table("comparison", f"{title}: over seeds", headings, tuple(rows), 1, notes)


def _equivalents(report: Report, comparison: Comparison) -> Iterator[Table]:
    if not comparison.equivalents:
        return

    def ends(run: RunReport) -> str:
        found = comparison.equivalents[run.name]
        low, high = (f"{end:.1f}" if end is not None else f"> {found.largest}" for end in (found.low, found.high))
        return low if low == high else f"{low} to {high}"

    largest = max(found.largest for found in comparison.equivalents.values())
    reference = next(n for n, run in enumerate(report.runs) if run.name == comparison.deep_ensemble)
    columns = [
        *_COST,
        _score("calibrated_nll", _of_clean),
        ("DEE", lambda run: str(comparison.equivalents[run.name])),
        ("one s.d. either way", ends),
    ]
    notes = [
        f"DEE: how many networks, of the {largest} of {label(report, reference)}, reach the run's calibrated NLL. The "
        "standard deviation is over subsets of that one ensemble, which share members: it says less than one over "
        "ensembles trained anew."
    ]
    yield _by_run(report, "number", "Deep-ensemble equivalent (DEE)", columns, notes=notes)


def _curves(report: Report, comparison: Comparison) -> Iterator[Table]:
    places = {run.name: number for number, run in enumerate(report.runs)}
    rows = []
    for found in comparison.curves:
        run = report.runs[places[found.run]]
        order = " ".join(str(member + 1) for member in found.order)
        cost = (write(run) for _, write in _COST)
        rows.append((label(report, places[found.run]), *cost, str(found.recommended), order))
    if rows:
        headings = ("run", *(heading for heading, _ in _COST), "enough", "in this order")
        notes = (
            "Enough: the fewest members, in this order, that the validation images cannot tell from all of them. The "
            "order, the one that helps most, was chosen on the same images, which flatters small numbers a little.",
        )
        yield Table("number", "How many members, and which", headings, tuple(rows), 1, notes)
    for found in comparison.curves:
        yield Table(
            "number",
            f"{label(report, places[found.run])}: clean scores against the number of members",
            ("members", *(f"{SCORES[name].title}, {kind}" for name in _CURVE for kind in ("random", "ordered"))),
            tuple((str(point.members), *_point(point)) for point in found.points),
            1,
            ("Random: mean and standard deviation over random subsets of these members.",),
            detail=True,
        )


_CURVE = ("error", "nll", "calibrated_nll", "ece")


def _point(point: CurvePoint) -> Iterator[str]:
    ordered: MemberScores | None = point.ordered
    for name in _CURVE:
        yield spread_text(name, getattr(point, name))
        yield SCORES[name].write(None if ordered is None else getattr(ordered, name))


def _cells(report: Report, shift: ShiftReport, number: int) -> Table:
    rows = tuple(
        (corruption, str(severity), *(score.write(getattr(scores, name)) for name, score in SCORES.items()))
        for corruption, levels in report.runs[number].cells.items()
        for severity, scores in levels.items()
    )
    headings = ("corruption", "severity", *(score.title for score in SCORES.values()))
    notes = [_ONE_MEMBER] if report.runs[number].members == 1 else []
    title = f"{label(report, number)}, {_under(shift)}: every cell"
    return Table("cells", title, headings, rows, 1, tuple(notes), detail=True)
