"""What a long command says while it works: a bar with the time left on a terminal, else a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import typer

__all__ = ["Watcher", "watching"]

Watcher = Callable[[str, int, int], None]

_EVERY = 10.0  # seconds between two lines


@contextmanager
def watching(quiet: bool, *, unit: str = "", scale: float = 1.0) -> Iterator[Watcher]:
    """A function to be told of the progress: what is being done, how much is done, of how much.

    What becomes less, or of another total, is a new stage, with a bar of its own. A total of 0 is one not known.

    Args:
        quiet: say nothing.
        unit: of what is counted, such as ``"points"``.
        scale: how much of it makes one unit.
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
        columns = (TextColumn("{task.description:24}"), BarColumn(), count, TimeRemainingColumn())
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
    begun = printed = 0.0
    before, previous, of = 0, 0, -1

    def watch(label: str, done: int, total: int) -> None:
        nonlocal begun, printed, before, previous, of
        now = time.monotonic()
        if new := total != of or done < previous:
            begun, before, of = now, done, total
        previous = done
        if not new and (done < total or not total) and now - printed < _EVERY:
            return
        printed, left = now, ""
        if before < done < total:
            left = f", {timedelta(seconds=round((now - begun) / (done - before) * (total - done)))} left"
        typer.echo(f"{label}: {done / scale:,.0f} of {total / scale:,.0f} {unit}".rstrip() + left, err=True)

    return watch
