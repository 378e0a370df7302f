"""A report's tables: defined once for the terminal, Markdown and the page."""

from __future__ import annotations

from collections.abc import Iterator

from ensembler.eval.report.class_tables import class_tables
from ensembler.eval.report.comparison_tables import comparison_tables
from ensembler.eval.report.group_tables import group_tables
from ensembler.eval.report.notation import NOTHING, SCORES, Score, label, plain, training_passes
from ensembler.eval.report.schema import Report, RunReport, ShiftReport
from ensembler.eval.report.table import (
    CLEAN,
    COST,
    ONE_MEMBER,
    SHIFTED,
    VARIED,
    Column,
    Table,
    by_run,
    images_of,
    means_over,
    meant_shift,
    members_text,
    one_member_note,
    score_column,
    under,
)
from ensembler.eval.shift.corruptions import FAMILIES, SEVERITIES
from ensembler.text import counted

__all__ = ["Table", "about", "report_tables"]

_DETECTORS = {
    "predictive_entropy": "entropy",
    "mutual_information": "mutual inf.",
    "one_minus_max": "1 - max p",
    "energy": "energy",
    "max_logit": "max logit",
}

_OOD = {
    "auroc": "AUROC",
    "fpr_at_95": "FPR@95",
    "aupr_out": "AUPR out",
    "aupr_in": "AUPR in",
    "scod_aurc": "SCOD AURC",
}
_PERCENT = Score("%", 100, 2, "")


def about(report: Report) -> list[str]:
    """Describe what all tables have in common: the images, the shift, the device."""
    where = "elsewhere" if report.device is None else f"on {plain(report.device)}"
    found = [f"{images_of(report)}; predicted {where}; seed {report.seed}."]
    if report.omitted:
        found.append(f"Not scored, as not all have predictions for them: {', '.join(map(plain, report.omitted))}.")
    if report.shift is not None:
        found += [report.shift.note, f"Means are over: {', '.join(report.shift.headline) or 'no corruption'}."]
        if report.shift.not_covered:
            found.append(f"Not covered: {', '.join(report.shift.not_covered)}.")
    return found


def report_tables(report: Report) -> list[Table]:
    """Return all tables for which the report has data, in reading order."""
    found = [_overview(report), _costs(report), _clean(report), _calibration(report)]
    found += class_tables(report)
    found.append(_members(report))
    if report.shift is not None:
        found += _severities(report, report.shift) if meant_shift(report) else []
        found += _families(report, report.shift)
    found += _others(report)
    found.append(_selective(report))
    found += group_tables(report)
    found += _ood(report)
    if report.comparison is not None:
        found += comparison_tables(report, report.comparison)
    if report.shift is not None:
        found += [_cells(report, report.shift, number) for number in range(len(report.runs))]
    return found


def _overview(report: Report) -> Table:
    """Return the one table of the first page."""
    names = ("error", "nll", "ece")
    columns = [*COST, *(score_column(name, CLEAN) for name in names)]
    if (shift := meant_shift(report)) is not None:
        columns += [score_column(name, SHIFTED, f"shifted {SCORES[name].title}") for name in names]
    sets = ["clean", "shifted"] if shift is not None else ["clean"]
    pairs = enumerate(((where, name) for where in sets for name in names), start=len(COST))
    notes = ["M: members, forward passes per prediction; passes: example passes in training."]
    notes += [f"Shifted ({shift.source}): mean over {means_over(shift)}."] if shift else []
    if report.ood:
        columns.append(("AUROC %", lambda run: _PERCENT.write(_detection(run))))
        several = "mean over the sets" if len(report.ood) > 1 else plain(report.ood[0].title)
        notes.append(f"AUROC: detection of out-of-distribution images by predictive entropy, {several}.")
    title = f"Overview: {images_of(report)}"
    return by_run(report, "summary", title, columns, notes=notes, compared=dict(pairs))


def _detection(run: RunReport) -> float | None:
    """Return the mean AUROC of the predictive entropy over out-of-distribution sets."""
    found = [one["predictive_entropy"] for one in run.ood.values()]
    values = [one.auroc for one in found if one is not None]
    return sum(values) / len(values) if len(values) == len(found) and values else None


def _costs(report: Report) -> Table:
    notes = [
        "Example passes: one image forward and backward; forward only: for BatchNorm statistics, for instance. A "
        "prediction by M members takes M forward passes."
    ]
    varied = any(run.views for run in report.runs)
    notes += [VARIED] if varied else []
    notes += [
        f"{label(report, number)}: the training cost of {', '.join(map(plain, run.training_unknown))} is unknown "
        "and not counted (+?)."
        for number, run in enumerate(report.runs)
        if run.training_unknown
    ]
    if any(run.architecture is None for run in report.runs):
        notes.append("elsewhere: predictions that were given; their training cost is unknown.")

    def or_nothing(value: object) -> str:
        return NOTHING if value is None else plain(str(value))

    columns: list[Column] = [
        ("method", lambda run: plain(run.method)),
        ("network", lambda run: or_nothing(run.architecture)),
        ("seed", lambda run: or_nothing(run.seed)),
        ("M", members_text),
        *([("passes a prediction", lambda run: str(run.forward_passes_per_prediction))] if varied else []),
        ("example passes", lambda run: training_passes(run, _count)),
        ("forward only", lambda run: _count(run.training_forward_passes)),
        ("seconds", lambda run: _count(run.training_seconds)),
        ("on", lambda run: or_nothing(run.training_device)),
    ]
    return by_run(report, "costs", "Training cost", columns, notes=notes, words=3)


def _count(number: float | None) -> str:
    return "unknown" if number is None else f"{number:,.0f}"


def _clean(report: Report) -> Table:
    names = ("error", "nll", "calibrated_nll", "brier", "ece", "aurc")
    columns = [*COST, *(score_column(name, CLEAN) for name in names)]
    notes = ["M: members, and forward passes per prediction; passes: example passes in training."]
    pairs = {place: ("clean", name) for place, name in enumerate(names, start=len(COST))}
    return by_run(report, "clean", f"Clean: {images_of(report)}", columns, notes=notes, compared=pairs)


def _calibration(report: Report) -> Table:
    names = (
        *("ece", "adaptive_ece", "classwise_ece", "max_calibration_error", "l2_calibration_error", "smooth_ece"),
        *("nll", "calibrated_nll"),
    )
    sets = [("clean", CLEAN)]
    if (shift := meant_shift(report)) is not None:
        sets.append(("shifted", SHIFTED))
    rows = []
    for number, run in enumerate(report.runs):
        for title, of in sets:
            figures = (score_column(name, of)[1](run) for name in names)
            temperature = NOTHING if run.temperature is None else f"{run.temperature:.3f}"
            rows.append((label(report, number), title, *figures, temperature))
    headings = ("run", "images", *(SCORES[name].title for name in names), "temperature")
    notes = ["Temperatures were fitted on validation images; above 1, they lower confidence."]
    if any(run.temperature is None for run in report.runs):
        notes.append(f"{NOTHING}: without validation predictions, none is fitted.")
    if shift is not None:
        notes.append(f"Shifted ({shift.source}): mean over {means_over(shift)}.")
    title = f"Calibration: {images_of(report)}"
    return Table("calibration", title, headings, tuple(rows), 2, tuple(notes), detail=True)


def _members(report: Report) -> Table:
    names = ("disagreement", "mutual_information", "expected_entropy", "predictive_entropy", "accuracy")
    columns = [*COST, *(score_column(name, CLEAN) for name in names)]
    columns += [
        score_column("member_accuracy", CLEAN),
        ("min %", lambda run: SCORES["accuracy"].write(min(one.accuracy for one in run.single_members))),
        ("max %", lambda run: SCORES["accuracy"].write(max(one.accuracy for one in run.single_members))),
    ]
    notes = ["Entropies and mutual information in nats; min and max: of the members' accuracies."]
    title = f"Members: {images_of(report)}, clean"
    return by_run(report, "members", title, columns, notes=[*notes, *one_member_note(report)], detail=True)


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
        columns = [*COST, score_column(name, CLEAN, "clean")]
        columns += [score_column(name, lambda run, level=level: run.by_severity[level], str(level)) for level in levels]  # type: ignore[misc]
        columns.append(score_column(name, SHIFTED, "mean 1-5"))
        yield by_run(
            report,
            "shift",
            f"{title}, {shift.source} shift",
            columns,
            notes=[
                f"By severity; means over {counted(len(shift.headline), 'corruption')}, {images_of(report)} each.",
                *(one_member_note(report) if name == "disagreement" else []),
            ],
            detail=name not in ("error", "nll", "ece"),
            compared={len(columns) - 1: ("shifted", name)},
        )


def _families(report: Report, shift: ShiftReport) -> Iterator[Table]:
    families = list(report.runs[0].by_family)
    complete = [name for name, levels in report.runs[0].cells.items() if levels.keys() == set(SEVERITIES)]
    covered = {family: [name for name in FAMILIES[family] if name in complete] for family in families}
    notes = [f"{family}: {', '.join(names)}" for family, names in covered.items()]
    if "validation" in covered:
        notes[-1] += ", which no other mean includes"
    for name, title in (("error", "Error, %"), ("nll", "NLL"), ("ece", "ECE, %")):
        columns = [
            *COST,
            *(score_column(name, lambda run, family=family: run.by_family[family], family) for family in families),  # type: ignore[misc]
        ]
        yield by_run(
            report,
            "shift",
            f"{title}, {shift.source} shift, by family",
            columns,
            notes=[f"Means over corruptions and severities. {'; '.join(notes)}."],
            detail=name != "error",
        )


def _others(report: Report) -> Iterator[Table]:
    names = ("error", "nll", "calibrated_nll", "brier", "ece", "aurc")
    for one in report.others:
        columns = [*COST, score_column("error", CLEAN, f"clean {SCORES['error'].title}")]
        columns += [score_column(name, lambda run, of=one.name: run.others.get(of)) for name in names]  # type: ignore[misc]
        notes = [note for note in (plain(one.note),) if note]
        yield by_run(report, "others", f"{plain(one.name)}: {one.images:,} images ({one.source})", columns, notes=notes)


def _selective(report: Report) -> Table:
    names = ("aurc", "augrc", "risk_at_80", "coverage_at_5", "misclassification_auroc")
    columns = [*COST, *(score_column(name, CLEAN) for name in names)]
    if (shift := meant_shift(report)) is not None:
        columns += [score_column(name, SHIFTED, f"shifted {SCORES[name].title}") for name in names]
    title = f"Selective prediction: {images_of(report)}"
    notes = [f"Shifted ({shift.source}): mean over {means_over(shift)}."] if shift else []
    return by_run(report, "rejection", title, columns, notes=notes, detail=True)


def _ood(report: Report) -> Iterator[Table]:
    for images in report.ood:
        rows = tuple(
            (
                label(report, number),
                heading,
                *(write(run) for _, write in COST),
                *(_PERCENT.write(getattr(scores, measure)) for measure in _OOD),
            )
            for number, run in enumerate(report.runs)
            for detector, heading in _DETECTORS.items()
            if (scores := run.ood[images.name][detector]) is not None
        )
        notes = [
            f"Detection of {images.images:,} images ({images.source}) among {report.test_examples:,} clean test images "
            "by predictive entropy, mutual information, 1 minus the largest probability, and energy and largest of the "
            "members' mean logits, where there are two members or logits are known.",
            "FPR@95: share of clean images flagged at 95 % recall of the others. AUPR out: the positive class is out "
            "of distribution; AUPR in: in distribution. SCOD AURC: AURC with both kinds of images, where answering one "
            "out of distribution and a wrong answer cost 0.5 each. FPR@95 and SCOD AURC: lower is better.",
        ]
        headings = ("run", "detector", *(heading for heading, _ in COST), *_OOD.values())
        title = f"{plain(images.title)}: out-of-distribution detection, %"
        yield Table("ood", title, headings, rows, 2, tuple(notes))


def _cells(report: Report, shift: ShiftReport, number: int) -> Table:
    rows = tuple(
        (corruption, str(severity), *(score.write(getattr(scores, name)) for name, score in SCORES.items()))
        for corruption, levels in report.runs[number].cells.items()
        for severity, scores in levels.items()
    )
    headings = ("corruption", "severity", *(score.title for score in SCORES.values()))
    notes = [ONE_MEMBER] if report.runs[number].members == 1 else []
    title = f"{label(report, number)}, {under(shift)}: every cell"
    return Table("cells", title, headings, rows, 1, tuple(notes), detail=True)
