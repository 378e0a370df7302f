"""What the evaluation commands do with their results."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

__all__ = ["new_folder", "print_lines", "write_files"]


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
