"""Scores under shift, summed up: over everything, by family of corruptions, by severity, and as box plots.

All means are plain means over cells (a corruption at a severity), each of which has the same images. On CIFAR-10-C the
mean error is called "mean corruption error (unnormalised)": it is not divided by another network's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from ensembler.errors import UsageError
from ensembler.eval.shift.corruptions import HEADLINE, SEVERITIES, VALIDATION
from ensembler.record import Record

__all__ = ["FAMILIES", "FiveNumbers", "ShiftScores", "five_numbers", "summarise"]

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "validation": VALIDATION,
}
"""The families of Hendrycks & Dietterich 2019 (https://arxiv.org/abs/1903.12261), and the four kept for validation,
which count in no other mean."""

Cells = Mapping[str, Mapping[int, Mapping[str, float | None]]]
Means = dict[str, float | None]


class FiveNumbers(Record):
    """A box of a box plot: the median and quartiles (linear between values), and whiskers to the least and greatest."""

    minimum: float
    lower_quartile: float
    median: float
    upper_quartile: float
    maximum: float


class ShiftScores(Record):
    """Scores under shift by name; ``null`` where a cell has none.

    Attributes:
        headline: the corruptions, of the protocol's 15, that the means are over.
        mean: over the headline's corruptions and all severities.
        by_family: over a family's corruptions and all severities; of families that are there.
        by_severity: over the headline's corruptions.
        boxes: score, then severity: over the headline's corruptions, as in Ovadia et al. 2019
            (https://arxiv.org/abs/1906.02530).
    """

    headline: list[str]
    mean: Means
    by_family: dict[str, Means]
    by_severity: dict[int, Means]
    boxes: dict[str, dict[int, FiveNumbers]]


def summarise(cells: Cells) -> ShiftScores:
    """Sum up the scores of every cell.

    Args:
        cells: corruption, then severity (1 to 5, all of them), then score; the same scores in every cell.

    Raises:
        UsageError: an unknown corruption, none of the headline's, or cells that lack a severity or a score.
    """
    known = {name for family in FAMILIES.values() for name in family}
    names = _check(cells, known)
    headline = [name for name in HEADLINE if name in cells]
    if not headline:
        raise UsageError(f"no mean over {', '.join(cells) or 'no corruption'}: give some of {', '.join(HEADLINE)}")

    def mean(corruptions: Collection[str], severities: Sequence[int] = SEVERITIES) -> Means:
        columns = {name: _column(cells, name, corruptions, severities) for name in names}
        return {name: None if column is None else float(np.mean(column)) for name, column in columns.items()}

    def boxes(name: str) -> dict[int, FiveNumbers]:
        columns = {severity: _column(cells, name, headline, [severity]) for severity in SEVERITIES}
        return {severity: five_numbers(column) for severity, column in columns.items() if column is not None}

    families = {family: [name for name in members if name in cells] for family, members in FAMILIES.items()}
    return ShiftScores(
        headline=headline,
        mean=mean(headline),
        by_family={family: mean(covered) for family, covered in families.items() if covered},
        by_severity={severity: mean(headline, [severity]) for severity in SEVERITIES},
        boxes={name: found for name in names if (found := boxes(name))},
    )


def five_numbers(values: Sequence[float]) -> FiveNumbers:
    """The box of at least one value."""
    found = np.quantile(np.asarray(values, dtype=np.float64), [0, 0.25, 0.5, 0.75, 1])
    return FiveNumbers(**dict(zip(FiveNumbers.model_fields, found.tolist(), strict=True)))


def _check(cells: Cells, known: Collection[str]) -> list[str]:
    """The scores' names."""
    names = list(next((cell for levels in cells.values() for cell in levels.values()), {}))
    for corruption, levels in cells.items():
        if corruption not in known:
            raise UsageError(f"unknown corruption {corruption!r}: use some of {', '.join(sorted(known))}")
        if set(levels) != set(SEVERITIES):
            raise UsageError(f"{corruption} must have the severities 1 to 5, found {sorted(levels)}")
        for severity, cell in levels.items():
            if set(cell) != set(names):
                odd = sorted(set(cell) ^ set(names))
                raise UsageError(f"every cell must have the same scores: {corruption} {severity} differs in {odd}")
    return names


def _column(cells: Cells, name: str, corruptions: Collection[str], severities: Sequence[int]) -> list[float] | None:
    """One score of some cells; ``None`` where one has none."""
    values = [cells[corruption][severity][name] for corruption in corruptions for severity in severities]
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None
