"""The tables of classes: the most confused pairs, how far answers can be trusted, and errors under shift."""

from __future__ import annotations

from collections.abc import Iterator

from ensembler.eval.metrics.classes import CLASSES
from ensembler.eval.report.notation import SCORES, label, plain
from ensembler.eval.report.schema import Report, RunReport
from ensembler.eval.report.table import Table, images_of

__all__ = ["class_tables"]

_PAIRS = 10  # of a run


def class_tables(report: Report) -> Iterator[Table]:
    """Yield the tables of classes: of all runs together, then of each."""
    rows = tuple(
        (
            label(report, number),
            plain(pair.label),
            plain(pair.predicted),
            f"{pair.examples:,}",
            _percent(pair.share),
        )
        for number, run in enumerate(report.runs)
        for pair in run.confusion.pairs[:_PAIRS]
    )
    if rows:
        notes = (f"The {_PAIRS} most frequent of each run. Share: of the images of the class.",)
        headings = ("run", "class", "predicted", "images", "share %")
        yield Table("classes", f"Most confused classes: {images_of(report)}", headings, rows, 3, notes, detail=True)
    for number, run in enumerate(report.runs):
        yield _answers(report, number, run)
    if report.shift is not None:
        yield from (_shifted(report, number, run) for number, run in enumerate(report.runs) if run.class_errors)


def _answers(report: Report, number: int, run: RunReport) -> Table:
    groups = run.groups["class"].groups
    shown = _highest({name: one.error.value for name, one in groups.items()})
    rows = []
    for name in shown:
        own = run.classes[name]
        gap = None if own.confidence is None or own.precision is None else own.confidence - own.precision
        rows.append(
            (
                plain(name),
                f"{groups[name].examples:,}",
                _percent(groups[name].error.value),
                f"{own.answered:,}",
                _percent(own.precision),
                _percent(own.confidence),
                SCORES["accuracy"].write(gap, sign=True),
            )
        )
    notes = (
        "Answered: images that are answered with this class, the share of them that are right, and their mean "
        "confidence. Gap: confidence minus that share, in points; above 0, these answers are overconfident.",
        *([f"The {CLASSES} of {len(groups):,} classes with the highest error."] if len(groups) > CLASSES else []),
    )
    headings = ("class", "images", "error %", "answered", "right of these %", "confidence %", "gap")
    title = f"{label(report, number)}: error and calibration by class"
    return Table("classes", title, headings, tuple(rows), 1, notes, detail=True)


def _shifted(report: Report, number: int, run: RunReport) -> Table:
    groups = run.groups["class"].groups
    rows = []
    for name in next(iter(run.class_errors.values())):
        errors = {one: own[name] for one, own in run.class_errors.items() if own[name] is not None}
        if not errors:
            continue
        worst = max(errors, key=lambda one: errors[one] or 0)
        clean = groups[name].error.value if name in groups else None
        mean = sum(value or 0 for value in errors.values()) / len(errors)
        rows.append((plain(name), _percent(clean), _percent(mean), worst, _percent(errors[worst])))
    notes = [f"Means over severities; mean: over {len(run.class_errors)} corruptions, those of validation among them."]
    if len(report.classes) > CLASSES:
        notes.append(f"The {CLASSES} of {len(report.classes):,} classes with the highest error under shift.")
    headings = ("class", "clean error %", "mean error %", "worst corruption", "its error %")
    title = f"{label(report, number)}: error by class under shift"
    return Table("classes", title, headings, tuple(rows), 1, tuple(notes), detail=True)


def _highest(values: dict[str, float]) -> list[str]:
    """Return the names of the highest values, in their order."""
    chosen = set(sorted(values, key=lambda name: -values[name])[:CLASSES])
    return [name for name in values if name in chosen]


def _percent(value: float | None) -> str:
    return SCORES["accuracy"].write(value)
