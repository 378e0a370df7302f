"""Progress of a training: on the screen, in a file of JSON lines, in TensorBoard.

Each is a function of the events that a training reports (:mod:`ensembler.trainers.events`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ensembler.errors import ArtefactError, UsageError
from ensembler.trainers.events import EpochEnd, Event, Message, OnEvent

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

__all__ = ["progress"]


@contextmanager
def progress(quiet: bool = False, log: Path | None = None, tensorboard: Path | None = None) -> Iterator[OnEvent]:
    """A function to report events to.

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
        watchers: list[OnEvent] = []
        if log:
            watchers.append(stack.enter_context(_json_lines(log)))
        if tensorboard:
            watchers.append(stack.enter_context(_tensorboard(tensorboard)))
        if not quiet:
            watchers.append(stack.enter_context(_bars(console)) if console.is_terminal else _lines())

        def on_event(event: Event) -> None:
            for watch in watchers:
                watch(event)

        yield on_event


def _lines() -> OnEvent:
    """A plain line an epoch, with the time that its part has left."""
    free = time.monotonic()  # when a part ended, and so the next one began
    began: dict[str, tuple[float, int]] = {}

    def watch(event: Event) -> None:
        nonlocal free
        if isinstance(event, Message):
            typer.echo(event.text, err=True)
            return
        part, epoch, epochs = event.part, event.epoch, event.epochs
        start, before = began.setdefault(part, (free, epoch.number - 1))
        if epoch.number <= before:  # begun again
            start, before = began[part] = (free, epoch.number - 1)
        now = time.monotonic()
        seconds = round((now - start) / (epoch.number - before) * (epochs - epoch.number))
        if epoch.number == epochs:
            free = now
        left = f", {timedelta(seconds=seconds)} left" if epoch.number < epochs else ""
        typer.echo(f"{part}: epoch {epoch.number} of {epochs}, {_state(event)}{left}", err=True)

    return watch


@contextmanager
def _bars(console: Console) -> Iterator[OnEvent]:
    """A bar a part, with the time that it has left, and messages above them."""
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

    def watch(event: Event) -> None:
        if isinstance(event, Message):
            console.print(event.text, markup=False, highlight=False, soft_wrap=True)
            return
        if event.part not in tasks:
            tasks[event.part] = bar.add_task(event.part, total=event.epochs, state="")
        bar.update(tasks[event.part], completed=event.epoch.number, state=_state(event))

    with bar:
        yield watch


@contextmanager
def _json_lines(path: Path) -> Iterator[OnEvent]:
    start = time.monotonic()
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8", buffering=1)  # line by line, so that it can be followed

    def watch(event: Event) -> None:
        if isinstance(event, Message):
            return
        record = {"part": event.part, **_record(event), "epochs": event.epochs}
        with _writing(path):
            file.write(json.dumps(record | {"seconds": round(time.monotonic() - start, 3)}) + "\n")

    try:
        yield watch
    finally:
        with suppress(OSError):
            file.close()  # what could not be written was said when it was


@contextmanager
def _tensorboard(folder: Path) -> Iterator[OnEvent]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("--tensorboard needs TensorBoard: pip install 'ensembler[tensorboard]'") from error
    with _writing(folder):
        writer = SummaryWriter(str(folder))

    def watch(event: Event) -> None:
        if isinstance(event, Message):
            return
        record = _record(event)
        with _writing(folder):
            for name in ("loss", event.metric, "lr"):
                writer.add_scalar(f"{event.part}/{name}", record[name], event.epoch.number)
            writer.flush()

    with closing(writer):
        yield watch


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtefactError(f"cannot write {path}: {error.strerror or error}: choose another place") from error


def _record(event: EpochEnd) -> dict[str, Any]:
    """An epoch's numbers by name."""
    record = asdict(event.epoch)
    record[event.metric] = record.pop("metric")
    return record


def _state(event: EpochEnd) -> str:
    return f"loss {event.epoch.loss:.3f}, {event.metric} {event.epoch.metric:.3f}"
