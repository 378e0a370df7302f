"""What every command does about URLs: those that it is given are fetched before it, what it made is pushed after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from ensembler import storage
from ensembler.errors import ArtefactError, UsageError
from ensembler.storage import Url, Watcher, local

__all__ = ["at_hand", "push_finished", "watching"]


def at_hand(given: Mapping[str, Any]) -> dict[str, Any]:
    """A command's parameters, with the folder on this machine in place of every URL of a run or bundle.

    Raises:
        As :func:`ensembler.storage.local`.
    """
    many = {name: value if isinstance(value, list | tuple) else [value] for name, value in given.items()}
    remote = {name for name, values in many.items() if any(isinstance(value, Url) for value in values)}
    if not remote:
        return dict(given)
    with watching(bool(given.get("quiet"))) as watch:
        found = {
            name: [local(value, watch) if isinstance(value, Url) else value for value in many[name]] for name in remote
        }
    return {
        name: value if name not in remote else found[name] if isinstance(value, list | tuple) else found[name][0]
        for name, value in given.items()
    }


def push_finished(path: Path, url: str | None, quiet: bool = False) -> None:
    """Push what a command has just made, where its ``--out`` was a URL.

    Raises:
        ArtefactError: it cannot be; what was made is safe, and the message says how to push it.
    """
    if url is None:
        return
    again = f"what was made is safe at {path}; to push it: ensembler push {path} {url}"
    try:
        with watching(quiet) as watch:
            storage.push(path, url, watch=watch)
    except (ArtefactError, UsageError) as error:
        raise ArtefactError(f"{error}; {again}") from error
    except KeyboardInterrupt:
        typer.echo(again, err=True)
        raise
    typer.echo(f"pushed: {url}")


@contextmanager
def watching(quiet: bool) -> Iterator[Watcher]:
    """A function to be told how many bytes have gone: a bar on a terminal, else a line for each transfer."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if quiet:
        yield lambda label, done, total: None
    elif not console.is_terminal:
        told: set[str] = set()

        def say(label: str, done: int, total: int) -> None:
            if label not in told:
                typer.echo(f"{label} ({total / 1e6:,.1f} MB)", err=True)
            told.add(label)

        yield say
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
            tasks: dict[str, Any] = {}

            def watch(label: str, done: int, total: int) -> None:
                if label not in tasks:
                    tasks[label] = bar.add_task(label)
                bar.update(tasks[label], completed=done, total=total or None)

            yield watch
