"""Runs and bundles at URLs, for commands: arguments are fetched before a command, its result is pushed after it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ensembler.errors import ArtefactError, UsageError
from ensembler.progress import watching
from ensembler.storage import urls
from ensembler.storage.urls import Url, local
from ensembler.text import echo

__all__ = ["MEGABYTES", "fetch_urls", "push_finished"]

MEGABYTES: dict[str, Any] = {"unit": "MB", "scale": 1e6}  # the unit of transfers, for :func:`.progress.watching`


def fetch_urls(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Fetch the runs and bundles among a command's parameters, and replace each URL by its local folder.

    Raises:
        As :func:`ensembler.storage.urls.local`.
    """
    many = {name: value if isinstance(value, list | tuple) else [value] for name, value in parameters.items()}
    remote = {name for name, values in many.items() if any(isinstance(value, Url) for value in values)}
    if not remote:
        return dict(parameters)
    with watching(bool(parameters.get("quiet")), **MEGABYTES) as watch:
        folders = {
            name: [local(value, watch) if isinstance(value, Url) else value for value in many[name]] for name in remote
        }
    return {
        name: value if name not in remote else folders[name] if isinstance(value, list | tuple) else folders[name][0]
        for name, value in parameters.items()
    }


def push_finished(path: Path, url: str | None, quiet: bool = False) -> None:
    """Push the run or bundle that a command has just finished to its ``--out``, if that is a URL.

    Raises:
        ArtefactError: the push failed; the folder is kept, and the message says how to push it.
    """
    if url is None:
        return
    again = f"{path} is finished and kept; to push it: ensembler push {path} {url}"
    try:
        with watching(quiet, **MEGABYTES) as watch:
            urls.push(path, url, watch=watch)
    except (ArtefactError, UsageError) as error:
        raise ArtefactError(f"{error}; {again}") from error
    except KeyboardInterrupt:
        echo(again, err=True)
        raise
    echo(f"pushed: {url}")
