"""The commands of ``ensembler data``: corrupted test sets, official or generated here, and the cache of decoded images.

Annotations are evaluated here, not postponed: Typer reads them.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ensembler.progress import watching
from ensembler.text import counted, echo

__all__ = ["app"]

app = typer.Typer(
    name="data",
    no_args_is_help=True,
    help="Download published test sets, or generate corrupted ones; list cached images.",
)

_Data = Annotated[Path | None, typer.Option(help="Folder of datasets. (default: $ENSEMBLER_DATA, or a cache folder)")]
_Published = Literal[
    "cifar10c",
    "cifar100c",
    "cinic10",
    "imagenet-c-noise",
    "imagenet-c-blur",
    "imagenet-c-weather",
    "imagenet-c-digital",
    "imagenet-c-extra",
]
_Quiet = Annotated[bool, typer.Option("--quiet", help="Print only the final result.")]


@app.command("download")
def download(
    name: Annotated[_Published, typer.Argument(help="The test set, or a part of it.")],
    data: _Data = None,
    quiet: _Quiet = False,
) -> None:
    """Download a published test set (0.7 to 23 GB), check its MD5 and unpack it; resumes an interrupted download."""
    from ensembler.data.datasets import default_root
    from ensembler.eval.shift.download import ARCHIVES, download

    try:
        with watching(quiet, unit="MB", scale=1e6) as watch:
            folder = download(ARCHIVES[name], data or default_root(), watch=watch)
    except KeyboardInterrupt:
        echo("the partial download was kept: run the same command again to resume", err=True)
        raise
    use = name if ARCHIVES[name].files else ARCHIVES[name].within or ARCHIVES[name].folder
    echo(f"{folder}: to use it, ensembler eval --shift {use}" + (f" --data {data}" if data else ""))


@app.command("corrupt")
def corrupt(
    dataset: Annotated[str, typer.Argument(help="digits, cifar10, cifar100, fashion-mnist or folder:PATH.")],
    out: Annotated[Path, typer.Option(help="Folder of the files; an unfinished one is resumed.")],
    corruptions: Annotated[
        str | None, typer.Option(help="Corruptions, comma-separated, such as fog,snow. (default: all 19)")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the corruptions.")] = 0,
    data: _Data = None,
    download: Annotated[bool, typer.Option("--download", help="Download the dataset if it is missing.")] = False,
    image_size: Annotated[
        int | None, typer.Option(help="First resize every image to this many pixels per side. (default: not)")
    ] = None,
    unreadable: Annotated[
        Literal["refuse", "skip"],
        typer.Option("--corrupt", help="Images of a folder that cannot be read: stop, or leave them out."),
    ] = "refuse",
    quiet: _Quiet = False,
) -> None:
    """Write a dataset's test images under corruptions at 5 severities, in the layout of CIFAR-10-C."""
    from ensembler.data.datasets import load
    from ensembler.eval.shift.corruptions import AVAILABLE
    from ensembler.eval.shift.writer import write_corruptions
    from ensembler.storage.artefact import check_writable

    check_writable(out)
    images = load(dataset, data, download=download, image_size=image_size, corrupt=unreadable)
    chosen = AVAILABLE if corruptions is None else tuple(part.strip() for part in corruptions.split(","))
    try:
        with watching(quiet, unit="MB", scale=1e6) as watch:
            made = write_corruptions(images, out, chosen, seed=seed, watch=watch)
    except KeyboardInterrupt:
        echo("complete files were kept: run the same command again to resume", err=True)
        raise
    what = f"{counted(len(made), 'corruption')} of {counted(len(images.test), 'image')}"
    echo(f"{out}: generated {what}, marked as generated")


@app.command("cache")
def cache(
    clear: Annotated[
        bool, typer.Option("--clear", help="Remove all of them; they are decoded again when needed.")
    ] = False,
) -> None:
    """List the decoded images of folders that are kept, the last used first; or remove them."""
    from datetime import datetime

    from ensembler.data import image_cache

    folder, entries = image_cache.default_folder(), image_cache.listed()
    if clear:
        removed, size = image_cache.clear()
        used = f"; {len(entries) - removed} are used by other processes and stay" if removed < len(entries) else ""
        echo(f"{folder}: removed {removed} of {counted(len(entries), 'file')}, {size / 1e6:,.1f} MB{used}")
        return
    for entry in entries:
        used = f"{datetime.fromtimestamp(entry.used):%Y-%m-%d %H:%M}"
        echo(f"{used}  {entry.bytes / 1e6:>9,.1f} MB  {entry.images:>9,} images  {entry.what}")
    size, limit = sum(entry.bytes for entry in entries), image_cache.maximum()
    most = f"{limit / 2**30:g} GiB, {image_cache.LIMIT}"
    files = counted(len(entries), "file")
    echo(f"{folder}: {files}, {size / 1e6:,.1f} MB (at most {most}), by the time of their last use")
