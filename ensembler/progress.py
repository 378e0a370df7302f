"""Progress of long work: a bar with the time left on a terminal or in a notebook, else a line every ten seconds."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ensembler.text import echo

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn

__all__ = ["Watcher", "bars_on", "has_bars", "interactive", "waiting", "watching"]

Watcher = Callable[[str, int, int], None]

_INTERVAL = 10.0  # seconds between two lines
_REDRAWN = 0.25  # seconds between two states of a notebook's bars
_WIDTH = 100  # columns of these


def interactive() -> bool:
    """Return whether somebody looks on, at a terminal or in a notebook: otherwise functions of Python are silent."""
    from rich.console import Console

    return has_bars(Console(stderr=True))


def has_bars(console: Console) -> bool:
    """Return whether a console shows bars: a terminal, or a notebook's."""
    return console.is_jupyter or console.is_terminal


def bars_on(console: Console, *columns: ProgressColumn) -> Progress:
    """Return bars for a console, which disappear at the end.

    Rich draws a notebook's with widgets, which need another package; here they are text that is replaced.
    """
    from rich.progress import Progress

    if not console.is_jupyter:
        return Progress(*columns, console=console, transient=True)

    from rich.console import Console

    show: Any = import_module("IPython.display")

    class Replaced(Progress):
        """Bars as the text of one output, drawn by whoever updates them: a thread's output has no cell."""

        drawn, name, text = 0.0, "", ""

        def start(self) -> None:
            self.name = f"ensembler-{id(self)}"
            show.display(_content(""), raw=True, display_id=self.name)

        def stop(self) -> None:
            show.update_display(_content(""), raw=True, display_id=self.name)

        def update(self, *given: Any, **fields: Any) -> None:
            super().update(*given, **fields)
            if time.monotonic() - self.drawn > _REDRAWN:
                self.drawn = time.monotonic()
                with self.console.capture() as drawn:
                    self.console.print(self.get_renderable())
                show.update_display(_content(drawn.get().rstrip()), raw=True, display_id=self.name)

    plain = Console(file=io.StringIO(), width=_WIDTH, force_jupyter=False, force_terminal=False, color_system=None)
    return Replaced(*columns, console=plain, auto_refresh=False)


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
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if quiet:
        yield lambda label, done, total: None
    elif not has_bars(console):
        yield _lines(unit, scale)
    else:
        count = TextColumn(f"{{task.fields[done]}} of {{task.fields[all]}} {unit}".rstrip())
        columns = (TextColumn("{task.description:24}", markup=False), BarColumn(), count, TimeRemainingColumn())
        with bars_on(console, *columns) as bar:
            stages = [(0, -1)]

            def watch(label: str, done: int, total: int) -> None:
                fields: dict[str, Any] = {"done": f"{done / scale:,.0f}", "all": f"{total / scale:,.0f}"}
                if total != stages[-1][1] or done < stages[-1][0]:
                    bar.add_task(label, total=total or None, **fields)
                stages.append((done, total))
                del stages[:-1]
                bar.update(bar.task_ids[-1], description=label, completed=done, **fields)

            yield watch


@contextmanager
def waiting(quiet: bool, what: str) -> Iterator[None]:
    """Show on a terminal, until the block ends, what is under way that has no count."""
    from rich.console import Console

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


def _content(text: str) -> dict[str, str]:
    """Return a notebook's output of plain text."""
    return {"text/plain": text}


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
