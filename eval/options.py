"""Options that several evaluation commands share, and what they do with their results.

Annotations are evaluated here, not postponed: Typer reads them.
"""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "BatchSize",
    "Cache",
    "Data",
    "Device",
    "Download",
    "Json",
    "Quiet",
    "new_folder",
    "print_lines",
    "write_files",
]

Data = Annotated[
    Path | None,
    typer.Option(help="Folder of the datasets, and of CIFAR-10-C/. (default: $ENSEMBLER_DATA, or a cache folder)"),
]
Download = Annotated[bool, typer.Option("--download", help="Download the dataset if it is missing.")]
Device = Annotated[str | None, typer.Option(help="Device, such as cpu or cuda. (default: CUDA where available)")]
BatchSize = Annotated[int | None, typer.Option(help="Images per forward pass. (default: what suits the device)")]
Cache = Annotated[Path | None, typer.Option(help="Folder of kept predictions. (default: a cache folder)")]
Json = Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print only the final result.")]


def new_folder(parent: Path, label: str) -> Path:
    """Create a folder that no other process has, even where another names one in the same second."""
    from ensembler.run import new_path

    while True:
        path = new_path(parent, label)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError:
            pass  # writing into it says it better
        return path


def write_files(folder: Path, files: dict[str, bytes], json: Path | None) -> None:
    """Write a command's files, and its JSON to a second place where wanted: all or none."""
    from ensembler.artefact import replace_files

    contents = {folder / name: content for name, content in files.items()}
    if json is not None:
        contents[json] = next(content for name, content in files.items() if name.endswith(".json"))
    try:
        replace_files(contents)
    except BaseException:  # Ctrl-C, too
        with suppress(OSError):
            folder.rmdir()  # where nothing is in it
        raise


def print_lines(*lines: str) -> None:
    """Print lines as they are, however long."""
    from rich.console import Console

    Console(highlight=False, markup=False).print("\n".join(lines), soft_wrap=True)
