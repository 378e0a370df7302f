"""What every command does about URLs: those that it is given are fetched before it, what it made is pushed after it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from ensembler import storage
from ensembler.errors import ArtefactError, UsageError
from ensembler.progress import watching
from ensembler.storage import Url, local

__all__ = ["MEGABYTES", "at_hand", "push_finished"]

MEGABYTES: dict[str, Any] = {"unit": "MB", "scale": 1e6}  # what transfers are counted in, for :mod:`.progress`


def at_hand(given: Mapping[str, Any]) -> dict[str, Any]:
    """A command's parameters, with the folder on this machine in place of every URL of a run or bundle.

    Raises:
        As :func:`ensembler.storage.local`.
    """
    many = {name: value if isinstance(value, list | tuple) else [value] for name, value in given.items()}
    remote = {name for name, values in many.items() if any(isinstance(value, Url) for value in values)}
    if not remote:
        return dict(given)
    with watching(bool(given.get("quiet")), **MEGABYTES) as watch:
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
        with watching(quiet, **MEGABYTES) as watch:
            storage.push(path, url, watch=watch)
    except (ArtefactError, UsageError) as error:
        raise ArtefactError(f"{error}; {again}") from error
    except KeyboardInterrupt:
        typer.echo(again, err=True)
        raise
    typer.echo(f"pushed: {url}")
