"""Progress of a training: in the terminal, in a file of JSON lines, in TensorBoard.

Each is a function that handles the events of :mod:`ensembler.trainers.events`.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from ensembler.errors import ArtefactError, UsageError
from ensembler.progress import bars_on, has_bars
from ensembler.storage.artefact import ensure_folder
from ensembler.text import counted, echo, print_prose, printable
from ensembler.trainers.events import EpochEnd, Event, Message, OnEvent, Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

__all__ = ["progress"]

_MINUTE = 60.0  # seconds between two lines within an epoch
_WIDE = 100  # columns of a terminal with long bars
_NAME, _LONG = 10, 24  # characters of a part's name that a line has room for, at least and at most where it is full


@contextmanager
def progress(
    quiet: bool = False, log: str | Path | None = None, tensorboard: str | Path | None = None
) -> Iterator[OnEvent]:
    """Yield a function that handles events; results are printed at the end, when no bar is there any more.

    Args:
        quiet: print nothing but the results.
        log: a file to which each epoch appends a JSON object on one line.
        tensorboard: a folder for event files.

    Raises:
        UsageError: TensorBoard is not installed.
        ArtefactError: a file cannot be written.
    """
    from rich.console import Console

    console, results = Console(stderr=True), list[str]()
    with ExitStack() as stack:
        stack.callback(_print, results)
        watchers: list[OnEvent] = []
        if log:
            watchers.append(stack.enter_context(_json_lines(Path(log))))
        if tensorboard:
            watchers.append(stack.enter_context(_tensorboard(Path(tensorboard))))
        if not quiet:
            watchers.append(stack.enter_context(_bars(console)) if has_bars(console) else _lines())

        def on_event(event: Event) -> None:
            if isinstance(event, Message) and event.result:
                results.append(event.text)
                return
            for watch in watchers:
                watch(event)

        yield on_event


def _print(lines: Sequence[str]) -> None:
    for line in lines:
        print_prose(line)


def _lines() -> OnEvent:
    """Return a handler that prints a line per epoch, with its part's time left, and in a long epoch one a minute."""
    end = printed = time.monotonic()  # end: of the last part, when the next one starts
    starts: dict[str, tuple[float, int]] = {}

    def watch(event: Event) -> None:
        nonlocal end, printed
        if isinstance(event, Message):
            echo(event.text, err=True)
            return
        if isinstance(event, Progress):
            if time.monotonic() - printed > _MINUTE:
                printed = time.monotonic()
                echo(f"{event.part}: {event.done:,} of {event.total:,} images", err=True)
            return
        part, epoch, epochs = event.part, event.epoch, event.epochs
        start, before = starts.setdefault(part, (end, epoch.number - 1))
        if epoch.number <= before:  # the part was restarted
            start, before = starts[part] = (end, epoch.number - 1)
        now = printed = time.monotonic()
        seconds = round((now - start) / (epoch.number - before) * (epochs - epoch.number))
        if epoch.number == epochs:
            end = now
        left = f", {timedelta(seconds=seconds)} left" if epoch.number < epochs else ""
        echo(f"{part}: epoch {epoch.number} of {epochs}, {_state(event)}{left}", err=True)

    return watch


@contextmanager
def _bars(console: Console) -> Iterator[OnEvent]:
    """Yield a handler that shows a bar per part that is under way; above the bars, a line per finished part.

    Where a line has no room for all, a part's name loses its beginning, and no figure is cut.
    """
    from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.table import Column
    from rich.text import Text

    narrow = console.width < _WIDE
    unit, bar = ("/s", 4) if narrow else (" images/s", 12)
    room = console.width - bar - len(f"99,999{unit}") - len("0:00:00") - 4  # of name and state

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:,.0f}{unit}" if task.speed else "")

    class Part(ProgressColumn):
        def render(self, task: Task) -> Text:
            left = max(_NAME, room - len(task.fields["state"]))
            name = task.description
            return Text(name if len(name) <= left else f"…{name[1 - left :]}")

    whole = Column(no_wrap=True)
    bars = bars_on(
        console,
        Part(table_column=whole),
        BarColumn(bar_width=bar),
        TextColumn("{task.fields[state]}", markup=False, table_column=whole),
        Speed(table_column=whole),
        TimeRemainingColumn(table_column=whole),
    )
    loading = bars.add_task("loading", total=None, state="")
    tasks: dict[str, TaskID] = {}

    def say(line: str) -> None:
        if console.is_jupyter:
            echo(line)
        else:
            console.print(printable(line), markup=False, highlight=False)

    def watch(event: Event) -> None:
        bars.update(loading, visible=False)
        if isinstance(event, Message):
            say(event.text)
            return
        if event.part not in tasks:
            tasks[event.part] = bars.add_task(event.part, total=None, state="")
        if isinstance(event, Progress):
            bars.update(tasks[event.part], completed=event.done, total=event.total)
            ended = event.done == event.total
        else:
            bars.update(tasks[event.part], state=_beside(event, room - min(len(event.part), _LONG)))
            if ended := event.epoch.number == event.epochs:
                say(f"{event.part}: {counted(event.epochs, 'epoch')}, {_state(event)}")
        if ended:
            bars.remove_task(tasks.pop(event.part))

    with bars:
        yield watch


@contextmanager
def _json_lines(path: Path) -> Iterator[OnEvent]:
    start = time.monotonic()

    def watch(event: Event) -> None:
        if not isinstance(event, EpochEnd):
            return
        record = event.record() | {"epochs": event.epochs}
        with _writing(path):
            file.write(json.dumps(record | {"seconds": round(time.monotonic() - start, 3)}) + "\n")

    with ExitStack() as folder:
        with _writing(path):
            folder.enter_context(ensure_folder(path.parent))
            is_new = not path.exists()
            file = path.open("a", encoding="utf-8", buffering=1)  # flushed after every line, for tail -f
        try:
            yield watch
        finally:
            with suppress(OSError):
                file.close()  # a failed write has already been reported
            if is_new and not path.stat().st_size:
                path.unlink()


@contextmanager
def _tensorboard(folder: Path) -> Iterator[OnEvent]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("--tensorboard needs TensorBoard: pip install 'ensembler[tensorboard]'") from error
    report, others = threading.excepthook, set(threading.enumerate())

    def report_others(failed: threading.ExceptHookArgs) -> None:
        if not isinstance(failed.exc_value, OSError):  # of the writer's thread, which the next flush raises again
            report(failed)

    is_new, is_empty = not folder.exists(), True

    def watch(event: Event) -> None:
        nonlocal is_empty
        if not isinstance(event, EpochEnd):
            return
        record, is_empty = event.record(), False
        with _writing(folder):
            names = ("loss", event.metric, "lr", "held_out_loss", f"held_out_{event.metric}")
            for name in names:
                if name in record:
                    writer.add_scalar(f"{event.part}/{name}", record[name], event.epoch.number)
            writer.flush()

    threading.excepthook = report_others
    parents = ExitStack()
    try:
        with parents:
            with _writing(folder):
                parents.enter_context(ensure_folder(folder.parent))
                writer = SummaryWriter(str(folder))
            try:
                with closing(writer):
                    yield watch
            finally:
                if is_new and is_empty:
                    shutil.rmtree(folder, ignore_errors=True)
    finally:
        for thread in set(threading.enumerate()) - others:
            if type(thread).__module__.startswith("tensorboard"):  # if it failed, it may not have reported yet
                thread.join(1)
        threading.excepthook = report


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtefactError(f"cannot write {path}: {error.strerror or error}: choose another path") from error


def _beside(event: EpochEnd, room: int) -> str:
    """The epoch and its numbers, beside a bar: in short where there is no room for so many characters."""
    texts = [f"{event.epoch.number}/{event.epochs}, {_state(event, short)}" for short in (False, True)]
    return next((text for text in texts if len(text) <= room), texts[-1])


def _state(event: EpochEnd, short: bool = False) -> str:
    """The epoch's numbers."""
    epoch = event.epoch
    numbers = [f"loss {epoch.loss:.3f}"]
    if epoch.metric is not None and not (short and epoch.held_out_loss is not None):
        numbers.append(f"{event.metric} {epoch.metric:.3f}")
    if epoch.held_out_loss is not None:
        name = f"{epoch.held_out_loss:.3f}," if short else f"loss {epoch.held_out_loss:.3f}, {event.metric}"
        numbers.append(f"held-out {name} {epoch.held_out_metric:.3f}")
    return ", ".join(numbers)
