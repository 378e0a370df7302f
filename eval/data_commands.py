"""The commands of ``ensembler data``: the official corrupted test sets, and ones made here in their layout.

Annotations are evaluated here, not postponed: Typer reads them.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ensembler.progress import watching

__all__ = ["app"]

app = typer.Typer(name="data", no_args_is_help=True, help="Corrupted test sets: fetch the official ones, or make some.")

_Data = Annotated[Path | None, typer.Option(help="Folder of datasets. (default: $ENSEMBLER_DATA, or a cache folder)")]
_Quiet = Annotated[bool, typer.Option("--quiet", help="Say nothing before the end.")]


@app.command("download")
def download(
    name: Annotated[Literal["cifar10c", "cifar100c"], typer.Argument(help="Which of the official sets.")],
    data: _Data = None,
    quiet: _Quiet = False,
) -> None:
    """Fetch CIFAR-10-C or CIFAR-100-C (2.9 GB), check its MD5 and unpack it; an interrupted transfer goes on."""
    from ensembler.datasets import default_root
    from ensembler.eval.shift.download import ARCHIVES, download

    try:
        with watching(quiet, unit="MB", scale=1e6) as watch:
            folder = download(ARCHIVES[name], data or default_root(), watch=watch)
    except KeyboardInterrupt:
        typer.echo("what was fetched is kept: run the same command again to go on", err=True)
        raise
    typer.echo(f"{folder}: to use it, ensembler eval --shift {name}" + (f" --data {data}" if data else ""))


@app.command("corrupt")
def corrupt(
    dataset: Annotated[str, typer.Argument(help="digits, cifar10, cifar100, fashion-mnist or folder:PATH.")],
    out: Annotated[Path, typer.Option(help="Folder of the files; one that was not finished is gone on with.")],
    corruptions: Annotated[str | None, typer.Option(help="Such as fog,snow. (default: all 19)")] = None,
    seed: Annotated[int, typer.Option(help="Of the corruptions.")] = 0,
    data: _Data = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch the dataset if it is not there.")] = False,
    image_size: Annotated[int | None, typer.Option(help="Bring every image to this size first.")] = None,
    quiet: _Quiet = False,
) -> None:
    """Write a dataset's test images under corruptions at 5 severities, in the layout of CIFAR-10-C."""
    from ensembler.artefact import check_writable
    from ensembler.datasets import load
    from ensembler.eval.shift.corruptions import AVAILABLE
    from ensembler.eval.shift.generated import write_corruptions

    check_writable(out)
    images = load(dataset, data, download=download, image_size=image_size)
    chosen = AVAILABLE if corruptions is None else tuple(part.strip() for part in corruptions.split(","))
    try:
        with watching(quiet, unit="MB", scale=1e6) as watch:
            made = write_corruptions(images, out, chosen, seed=seed, watch=watch)
    except KeyboardInterrupt:
        typer.echo("whole files are kept: run the same command again to go on", err=True)
        raise
    typer.echo(f"{out}: {len(made)} corruptions of {len(images.test)} images made, generated and marked so")
