"""What is told while training goes on: on the screen, in a file of JSON lines, in TensorBoard.

Each is a watcher, called after every epoch with the part that is being trained, what the epoch did, and how many
epochs the part has.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ensembler.errors import ArtefactError, UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from ensembler.trainers.loop import Epoch
    from ensembler.trainers.session import Watcher

    Told = Iterator[tuple[Watcher, Callable[[str], None]]]

__all__ = ["progress"]


@contextmanager
def progress(quiet: bool = False, log: Path | None = None, tensorboard: Path | None = None) -> Told:
    """A watcher of epochs, and a function that says one line.

    Args:
        quiet: nothing on the screen.
        log: a file that each epoch adds a line to, a JSON object.
        tensorboard: a folder of event files.

    Raises:
        UsageError: TensorBoard is not installed.
        ArtefactError: a file cannot be written.
    """
    from rich.console import Console

    console = Console(stderr=True)
    with ExitStack() as stack:
        watchers = []
        if log:
            watchers.append(stack.enter_context(_json_lines(log)))
        if tensorboard:
            watchers.append(stack.enter_context(_tensorboard(tensorboard)))
        if quiet:
            say: Callable[[str], None] = lambda line: None  # noqa: E731
        else:
            watch, say = stack.enter_context(_bars(console) if console.is_terminal else _lines())
            watchers.append(watch)

        def all_of_them(part: str, epoch: Epoch, epochs: int) -> None:
            for watch in watchers:
                watch(part, epoch, epochs)

        yield all_of_them, say


@contextmanager
def _lines() -> Told:
    """A plain line an epoch, with the time that its part has left."""
    free = time.monotonic()  # when a part ended, and so the next one began
    began: dict[str, tuple[float, int]] = {}

    def watch(part: str, epoch: Epoch, epochs: int) -> None:
        nonlocal free
        start, before = began.setdefault(part, (free, epoch.number - 1))
        if epoch.number <= before:  # begun again
            start, before = began[part] = (free, epoch.number - 1)
        now = time.monotonic()
        seconds = round((now - start) / (epoch.number - before) * (epochs - epoch.number))
        if epoch.number == epochs:
            free = now
        left = f", {timedelta(seconds=seconds)} left" if epoch.number < epochs else ""
        typer.echo(f"{part}: epoch {epoch.number} of {epochs}, {_state(epoch)}{left}", err=True)

    yield watch, partial(typer.echo, err=True)


@contextmanager
def _bars(console: Console) -> Told:
    """A bar a part, with the time that it has left, and what is said above them."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs, {task.fields[state]}"),
        TimeRemainingColumn(),
        console=console,
    )
    tasks: dict[str, TaskID] = {}

    def watch(part: str, epoch: Epoch, epochs: int) -> None:
        if part not in tasks:
            tasks[part] = bar.add_task(part, total=epochs, state="")
        bar.update(tasks[part], completed=epoch.number, state=_state(epoch))

    with bar:
        yield watch, lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _json_lines(path: Path) -> Iterator[Watcher]:
    start = time.monotonic()
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8", buffering=1)  # line by line, so that it can be followed

    def watch(part: str, epoch: Epoch, epochs: int) -> None:
        seconds = round(time.monotonic() - start, 3)
        with _writing(path):
            file.write(json.dumps({"part": part, **asdict(epoch), "epochs": epochs, "seconds": seconds}) + "\n")

    try:
        yield watch
    finally:
        with suppress(OSError):
            file.close()  # what could not be written was said when it was


@contextmanager
def _tensorboard(folder: Path) -> Iterator[Watcher]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("--tensorboard needs TensorBoard: pip install 'ensembler[tensorboard]'") from error
    with _writing(folder):
        writer = SummaryWriter(str(folder))

    def watch(part: str, epoch: Epoch, epochs: int) -> None:
        with _writing(folder):
            for name in ("loss", "accuracy", "rate"):
                writer.add_scalar(f"{part}/{name}", getattr(epoch, name), epoch.number)
            writer.flush()

    with closing(writer):
        yield watch


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtefactError(f"cannot write {path}: {error.strerror or error}: choose another place") from error


def _state(epoch: Epoch) -> str:
    return f"loss {epoch.loss:.3f}, accuracy {epoch.accuracy:.3f}"
