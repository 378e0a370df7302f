"""Colours, markers and lines of runs: the same in all figures of a report, and of a method in all reports."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple
from zlib import adler32

__all__ = ["PALETTE", "Style", "styles"]


class Style(NamedTuple):
    """How a run is drawn."""

    colour: str
    marker: str
    line: str = "-"


# Okabe and Ito's colours, for colour-blind readers; with markers for print.
PALETTE = tuple(map(Style, ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"), "osD^vP*"))

_LINES = ("-", "--", ":", "-.")


def styles(runs: Sequence[tuple[str, str]], first: Sequence[int] = ()) -> list[Style]:
    """Give each run its style.

    A method's first run has the method's own colour; the others have the next free ones, in the order of their names,
    not of the command line. When all are taken they begin again, with other lines.

    Args:
        runs: the method and name of each.
        first: positions of those that choose first.
    """
    found: dict[int, Style] = {}
    order = sorted(range(len(runs)), key=lambda place: (place not in first, *runs[place], place))
    free = list(range(len(PALETTE)))
    for place in order:
        if (own := _own(runs[place][0])) in free:
            free.remove(own)
            found[place] = PALETTE[own]
    others = (place for place in order if place not in found)
    numbers = chain(free, range(len(PALETTE), len(runs) + len(PALETTE)))
    for place, number in zip(others, numbers, strict=False):
        line = _LINES[number // len(PALETTE) % len(_LINES)]
        found[place] = PALETTE[number % len(PALETTE)]._replace(line=line)
    return [found[place] for place in range(len(runs))]


def _own(method: str) -> int:
    """Return a method's own colour, by its name up to a hyphen: the same in every report."""
    return adler32(method.partition("-")[0].encode()) % len(PALETTE)
