"""What the evaluation commands do with their results."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from ensembler.text import print_prose

__all__ = ["LIST", "print_lines", "write_files", "write_result"]

LIST = "files.sha256"
"""Of each of a result's files, the SHA-256 and the name, as ``sha256sum --check`` reads them."""


def write_result(out: Path | None, parent: str, label: str, files: dict[str, bytes], json: Path | None = None) -> Path:
    """Write a command's files to ``out``, or to a new folder in ``parent`` that no other process names at that moment.

    Returns:
        The folder.

    Raises:
        As :func:`write_files`.
    """
    from ensembler.run import new_path
    from ensembler.storage.artefact import ensure_folder, writing_to

    if out is not None:
        write_files(out, files, json)
        return out
    with writing_to(Path(parent)), ensure_folder(Path(parent)):
        while True:
            folder = new_path(Path(parent), label)
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            try:
                write_files(folder, files, json)
            except BaseException:  # Ctrl-C, too
                with suppress(OSError):
                    folder.rmdir()
                raise
            return folder


def write_files(folder: Path, files: dict[str, bytes], json: Path | None = None) -> None:
    """Write a command's files, and its JSON to a second place where wanted: all or none.

    Of an older result in the folder, what this one has not is removed: the files that its list, :data:`LIST`, names and
    that nobody has changed since. All else in the folder stays.

    Raises:
        ArtefactError: a file cannot be written.
    """
    from ensembler.storage.artefact import replace_files

    old = _listed(folder)
    listing = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items())
    contents = {folder / name: content for name, content in (files | {LIST: listing.encode()}).items()}
    if json is not None:
        contents[json] = next(content for name, content in files.items() if name.endswith(".json"))
    replace_files(contents)
    for path in old - contents.keys():
        with suppress(OSError):
            path.unlink()


def _listed(folder: Path) -> set[Path]:
    """Return the files that an older result's list names, and that are as they were written."""
    from ensembler.storage.artefact import NAME, sha256

    try:
        lines = [line.partition("  ") for line in (folder / LIST).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return set()
    found = set()
    for digest, _, name in lines:
        path = folder / name
        with suppress(OSError):
            if NAME.fullmatch(name) and path.is_file() and not path.is_symlink() and sha256(path) == digest:
                found.add(path)
    return found


def print_lines(*lines: str, prose: str = "") -> None:
    """Print prose, on a terminal wrapped between words, and then lines as they are, however long: paths stay whole."""
    from rich.console import Console

    if prose:
        print_prose(prose)
    Console(highlight=False, markup=False).print("\n".join(lines), soft_wrap=True)
