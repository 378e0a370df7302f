"""``ensembler push`` and ``ensembler pull``.

Annotations are evaluated here, not postponed: Typer reads them.
"""

from pathlib import Path
from typing import Annotated

import typer

from ensembler import storage
from ensembler.errors import UsageError
from ensembler.progress import watching
from ensembler.transfers import MEGABYTES

__all__ = ["app"]

app = typer.Typer()

_Quiet = Annotated[bool, typer.Option("--quiet", help="Say nothing before the end.")]


@app.command("push")
def push(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="[RUN|BUNDLE] URL",
            help="What (default: the newest run in runs/), and where to: s3://, gs://, file:// or any that fsspec "
            "knows, or hf://USER/NAME.",
        ),
    ],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Who sees a repository made on the Hub. (default: private)"),
    ] = None,
    quiet: _Quiet = False,
) -> None:
    """Verify a run or bundle and write it to a URL, with a model card; it is never taken for whole before it is."""
    *given, url = places
    if len(given) > 1 or not storage.is_url(url):
        raise UsageError("push takes a run or bundle, and the URL to write it to, such as s3://BUCKET/NAME")
    with watching(quiet, **MEGABYTES) as watch:
        sent = storage.push(storage.local(given[0], watch) if given else _latest(), url, private=private, watch=watch)
    typer.echo(f"pushed: {url} ({', '.join(sent)})" if sent else f"{url} holds it already: nothing was sent")


@app.command("pull")
def pull(
    url: Annotated[str, typer.Argument(metavar="URL", help="Where a run or bundle was pushed to.")],
    out: Annotated[
        Path | None, typer.Option(help="The new folder. (default: runs/NAME or bundles/NAME, by the URL's last part)")
    ] = None,
    quiet: _Quiet = False,
) -> None:
    """Fetch a run or bundle from a URL and verify every byte; the folder appears whole or not at all."""
    if not storage.is_url(url):
        raise UsageError(f"{url} is no URL: what lies on this machine needs no pulling")
    with watching(quiet, **MEGABYTES) as watch:
        found = storage.pull(url, out, watch)
    typer.echo(f"pulled: {found}")


def _latest() -> Path:
    from ensembler.run import latest

    return latest(Path("runs"))
