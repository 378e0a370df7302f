"""Progress of long commands: a bar with the time left on a terminal, otherwise a line every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from ensembler.text import echo

__all__ = ["Watcher", "watching"]

Watcher = Callable[[str, int, int], None]

_INTERVAL = 10.0  # seconds between two lines


@contextmanager
def watching(quiet: bool, *, unit: str = "", scale: float = 1.0) -> Iterator[Watcher]:
    """Yield a function ``watch(label, done, total)`` that shows progress on standard error.

    A count that falls, or another total, starts a new stage with its own bar. A total of 0 means unknown.

    Args:
        quiet: show nothing.
        unit: name of the unit, such as ``"points"``.
        scale: counts in one unit.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if quiet:
        yield lambda label, done, total: None
    elif not console.is_terminal:
        yield _lines(unit, scale)
    else:
        count = TextColumn(f"{{task.fields[done]}} of {{task.fields[all]}} {unit}".rstrip())
        columns = (TextColumn("{task.description:24}", markup=False), BarColumn(), count, TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            stages = [(0, -1)]

            def watch(label: str, done: int, total: int) -> None:
                fields: dict[str, Any] = {"done": f"{done / scale:,.0f}", "all": f"{total / scale:,.0f}"}
                if total != stages[-1][1] or done < stages[-1][0]:
                    bar.add_task(label, total=total or None, **fields)
                stages.append((done, total))
                del stages[:-1]
                bar.update(bar.task_ids[-1], description=label, completed=done, **fields)

            yield watch


def _lines(unit: str, scale: float) -> Watcher:
    start = printed = 0.0
    first, previous, stage_total = 0, 0, -1

    def watch(label: str, done: int, total: int) -> None:
        nonlocal start, printed, first, previous, stage_total
        now = time.monotonic()
        if new := total != stage_total or done < previous:
            start, first, stage_total = now, done, total
        previous = done
        if not new and (done < total or not total) and now - printed < _INTERVAL:
            return
        printed, left = now, ""
        if first < done < total:
            left = f", {timedelta(seconds=round((now - start) / (done - first) * (total - done)))} left"
        echo(f"{label}: {done / scale:,.0f} of {total / scale:,.0f} {unit}".rstrip() + left, err=True)

    return watch
