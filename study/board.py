"""What a study shows while it works: on a terminal a table that fills, otherwise a line for each run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import typer

from ensembler.study.plan import Plan
from ensembler.text import counted
from ensembler.trainers.events import EpochEnd, Event

if TYPE_CHECKING:
    from rich.table import Table

    from ensembler.run import Run

__all__ = ["Board", "showing"]


@dataclass(eq=False)
class Board:
    """The runs that are there, and what is being trained.

    Attributes:
        plan: of the study.
        losses: the test NLL of each run that is there, by name.
        status: the last epoch that was trained.
    """

    plan: Plan
    quiet: bool = False
    live: Any = None
    losses: dict[str, float] = field(default_factory=dict)
    status: str = ""

    def on_run(self, name: str, run: Run, how: str) -> None:
        """A run is there."""
        scores = run.manifest.metrics["test"]
        self.losses[name] = scores["nll"]
        if self.live:
            self.live.update(self.table())
        elif not self.quiet:
            done = sum(node in self.losses for node in self.plan.nodes)
            count = f"{done} of {counted(len(self.plan.nodes), 'run')}"
            typer.echo(f"{count}: {name} {how}, test NLL {scores['nll']:.4f}", err=True)

    def on_event(self, event: Event) -> None:
        """A training reports an epoch; what a method finds on its way is in its run."""
        if isinstance(event, EpochEnd) and self.live:
            self.status = f"{event.part}: epoch {event.epoch.number} of {event.epochs}, loss {event.epoch.loss:.3f}"
            self.live.update(self.table())

    def table(self) -> Table:
        """Methods by budgets: the mean test NLL of the seeds that are there, and how many there are."""
        from rich.table import Table
        from rich.text import Text

        cells: dict[tuple[str, float], list[str]] = {}
        for cell in self.plan.cells:
            cells.setdefault((cell.label, cell.budget), []).append(cell.name)
        grid = Table(caption=Text(self.status), caption_justify="left")
        grid.add_column("test NLL")
        for budget in self.plan.budgets:
            grid.add_column(f"{budget:g} B", justify="right")
        for entry in self.plan.entries:
            row = [self._cell(cells.get((entry.label, budget))) for budget in self.plan.budgets]
            grid.add_row(Text(entry.label), *row)
        return grid

    def _cell(self, names: list[str] | None) -> str:
        if names is None:
            return "–"
        known = [self.losses[name] for name in names if name in self.losses]
        mean = f"{sum(known) / len(known):.3f}" if known else ""
        return mean if len(known) == len(names) else f"{mean} {len(known)}/{len(names)}".lstrip()


@contextmanager
def showing(plan: Plan, quiet: bool = False) -> Iterator[Board]:
    """Yield the board of a study; on a terminal it is drawn until the block ends."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    board = Board(plan, quiet)
    if quiet or not console.is_terminal:
        yield board
        return
    with Live(board.table(), console=console, refresh_per_second=4) as live:
        board.live = live
        yield board
        board.status = ""
        live.update(board.table())
