"""The tables of a comparison: differences, seeds, deep-ensemble equivalents and numbers of members."""

from __future__ import annotations

from collections.abc import Iterator

from ensembler.eval.metrics.comparison import Difference
from ensembler.eval.metrics.members import CurvePoint, MemberScores
from ensembler.eval.report.notation import NOTHING, SCORES, group_label, label, percent, spread_text, verdict
from ensembler.eval.report.schema import Comparison, Report, RunReport
from ensembler.eval.report.table import (
    CLEAN,
    COST,
    Table,
    by_run,
    images_of,
    means_over,
    meant_shift,
    score_column,
    under,
)

__all__ = ["comparison_tables"]

_CURVE = ("error", "nll", "calibrated_nll", "ece")


def comparison_tables(report: Report, comparison: Comparison) -> Iterator[Table]:
    """Yield the tables for which a comparison has data, in reading order."""
    yield from _differences(report, comparison)
    yield from _groups(report, comparison)
    yield from _equivalents(report, comparison)
    yield from _curves(report, comparison)


def _differences(report: Report, comparison: Comparison) -> Iterator[Table]:
    places = {run.name: number for number, run in enumerate(report.runs)}
    baseline = label(report, places[comparison.baseline])
    base = " and ".join(f"{heading} {write(report.runs[places[comparison.baseline]])}" for heading, write in COST)
    note = (
        f"The run's score minus that of {baseline} ({base}); lower is better. Low to high: "
        f"{percent(comparison.confidence)} interval of a "
        f"paired bootstrap over the test images, {comparison.resamples:,} resamples. P(better): share of "
        "these in which the run has the lower score. Both account for the choice of test images, not for that of the "
        "training seed."
    )
    headings = ("run", "score", "verdict", *(heading for heading, _ in COST), "difference", "low", "high", "P(better)")
    sets = [("clean", f"Clean: {images_of(report)}")]
    if (shift := meant_shift(report)) is not None:
        sets.append(("shifted", f"{under(shift).capitalize()}: means over {means_over(shift)}"))
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
    cost = (write(report.runs[place]) for _, write in COST)
    figures = (SCORES[name].write(value, sign=True) for value in (one.difference, one.low, one.high))
    chance = f"{one.probability_better:.3f}"
    return (label(report, place), SCORES[name].title, verdict(one), *cost, *figures, chance)


def _groups(report: Report, comparison: Comparison) -> Iterator[Table]:
    groups = [group for group in comparison.groups if len(group.runs) > 1]
    sets = [("", f"Clean: {images_of(report)}")]
    if (shift := meant_shift(report)) is not None:
        sets.append(("shifted_", f"{under(shift).capitalize()}: means over {means_over(shift)}"))
    names = ("error", "nll", "calibrated_nll", "brier", "ece")
    for prefix, title in sets if groups else ():
        rows = []
        for group in groups:
            spreads = (spread_text(name, group.scores.get(f"{prefix}{name}")) for name in names)
            first = report.runs[group.runs[0]]
            rows.append(
                (group_label(report, group), str(len(group.runs)), *(write(first) for _, write in COST), *spreads)
            )
        headings = ("runs", "seeds", *(heading for heading, _ in COST), *(SCORES[name].title for name in names))
        notes = ("Mean and sample standard deviation over runs that differ only in their seed.",)
        yield Table("comparison", f"{title}: over seeds", headings, tuple(rows), 1, notes)


def _equivalents(report: Report, comparison: Comparison) -> Iterator[Table]:
    found = comparison.equivalents
    if not found:
        return
    places = {run.name: number for number, run in enumerate(report.runs)}

    def ends(run: RunReport) -> str:
        if (one := found.get(run.name)) is None:
            return NOTHING
        low, high = (f"{end:.1f}" if end is not None else f"> {one.largest}" for end in (one.low, one.high))
        return low if low == high else f"{low} to {high}"

    def reference(run: RunReport) -> str:
        one = found.get(run.name)
        return NOTHING if one is None else f"{one.largest} in {places[one.reference] + 1}"

    columns = [
        *COST,
        score_column("calibrated_nll", CLEAN),
        ("DEE", lambda run: str(found.get(run.name, NOTHING))),
        ("one s.d. either way", ends),
        ("reference", reference),
    ]
    notes = [
        "DEE: the number of networks of the reference (its networks, in which run), the largest deep ensemble of the "
        f"same network, that reach the run's calibrated NLL; {NOTHING}: there is none. The standard deviation is over "
        "subsets of one ensemble, which share members: smaller than over independent ensembles."
    ]
    yield by_run(report, "number", "Deep-ensemble equivalent (DEE)", columns, notes=notes)


def _curves(report: Report, comparison: Comparison) -> Iterator[Table]:
    places = {run.name: number for number, run in enumerate(report.runs)}
    rows = []
    for found in comparison.curves:
        run = report.runs[places[found.run]]
        order = " ".join(str(member + 1) for member in found.order)
        cost = (write(run) for _, write in COST)
        rows.append((label(report, places[found.run]), *cost, str(found.recommended or NOTHING), order))
    if rows:
        headings = ("run", *(heading for heading, _ in COST), "sufficient", "in this order")
        notes = (
            "Sufficient: the fewest members, in this order, that are not significantly worse than all on validation "
            f"images; {NOTHING}: so few images cannot tell. The greedy order was chosen on the same images, which "
            "favours small numbers a little.",
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


def _point(point: CurvePoint) -> Iterator[str]:
    ordered: MemberScores | None = point.ordered
    for name in _CURVE:
        yield spread_text(name, getattr(point, name))
        yield SCORES[name].write(None if ordered is None else getattr(ordered, name))
