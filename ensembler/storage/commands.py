"""``ensembler push`` and ``ensembler pull``.

Annotations are evaluated here, not postponed: Typer reads them.
"""

from pathlib import Path
from typing import Annotated

import typer

from ensembler.errors import UsageError
from ensembler.progress import watching
from ensembler.storage import urls
from ensembler.storage.transfers import MEGABYTES
from ensembler.text import echo

__all__ = ["app"]

app = typer.Typer()

_Quiet = Annotated[bool, typer.Option("--quiet", help="Print only the final result.")]


@app.command("push")
def push(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="[RUN|BUNDLE] URL",
            help="What to push (default: the newest run in runs/), and its URL: s3://, gs://, file:// or any other "
            "protocol of fsspec, or hf://USER/NAME.",
        ),
    ],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Visibility of a new repository on the Hub. (default: private)"),
    ] = None,
    quiet: _Quiet = False,
) -> None:
    """Verify a run or bundle and upload it to a URL, with a model card; an incomplete upload is never used."""
    *given, url = places
    if len(given) > 1 or not urls.is_url(url):
        mistake = "" if urls.is_url(url) else f", which {url} is not"
        raise UsageError(f"push takes a run or bundle, and the URL to push it to, such as s3://BUCKET/NAME{mistake}")
    with watching(quiet, **MEGABYTES) as watch:
        sent = urls.push(urls.local(given[0], watch) if given else _latest(), url, private=private, watch=watch)
    echo(f"pushed: {url} ({', '.join(sent)})" if sent else f"{url} is up to date: nothing was sent")


@app.command("pull")
def pull(
    url: Annotated[str, typer.Argument(metavar="URL", help="URL of a run or bundle.")],
    out: Annotated[
        Path | None, typer.Option(help="New folder. (default: runs/NAME or bundles/NAME, with the URL's last part)")
    ] = None,
    largest: Annotated[
        float, typer.Option(min=0.0, metavar="GB", help="Largest size in GB; more is refused, and not kept.")
    ] = urls.LARGEST,
    quiet: _Quiet = False,
) -> None:
    """Download a run or bundle from a URL and verify every byte; a partial download is not kept."""
    if not urls.is_url(url):
        raise UsageError(f"{url} is not a URL: pull is only for runs and bundles on other machines")
    with watching(quiet, **MEGABYTES) as watch:
        folder = urls.pull(url, out, watch, largest)
    echo(f"pulled: {folder}")


def _latest() -> Path:
    from ensembler.run import latest

    return latest(Path("runs"))
