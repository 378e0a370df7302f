"""A folder on disk that is whole or absent: what runs and bundles have in common.

Layout: the artefact's own files, ``manifest.json`` (which holds the SHA-256 of every one of them) and
``manifest.sha256`` (the manifest's own, as ``sha256sum`` writes it). Standard library only, so that serving can
verify a bundle without torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ensembler.errors import ArtefactError, CorruptError, UsageError

__all__ = [
    "HELD",
    "MANIFEST",
    "SEAL",
    "appear",
    "check_writable",
    "hold",
    "read",
    "replace_file",
    "replace_files",
    "sha256",
    "sweep",
    "write",
]

MANIFEST = "manifest.json"
SEAL = "manifest.sha256"
HELD = ".held"
"""Ends the name of a hidden file or folder whose writer holds a lock on it: see :func:`sweep`."""

_FORGOTTEN = 3600.0  # seconds since it was touched


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(folder: Path, mend: str = "choose another --out") -> None:
    """Find out before hours of work, not after, that ``folder`` cannot be written to, or made where it is missing.

    Args:
        folder: it, or where it is to be.
        mend: what to do then.

    Raises:
        ArtefactError: it cannot; nothing is made or left either way.
    """
    try:
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ArtefactError(f"cannot write to {folder}: {error.strerror or error}: {mend}") from error


def hold(path: Path) -> int | None:
    """Lock a file or folder until the descriptor that is returned is closed, or this process ends, however it ends.

    ``None`` where another process holds it, or where there are no such locks (Windows, some network file systems).
    """
    try:
        import fcntl

        descriptor = os.open(path, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def sweep(folder: Path) -> None:
    """Remove the ``.partial-*.held`` that killed processes left in ``folder``.

    Dead is a writer whose lock the system has taken back: no process number is asked for, since another process may
    have it by now, or another container. As locks do not reach across every network file system, and clocks jump,
    both must agree: the lock is free, and nothing was touched for an hour.
    """
    for path in folder.glob(f".partial-*{HELD}"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _FORGOTTEN and (lock := hold(path)) is not None:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
                os.close(lock)


def replace_file(path: Path, content: bytes) -> None:
    """Write one file whole or not at all, in place of the one there may be.

    Raises:
        ArtefactError: the disk is full, or the file cannot be written.
    """
    replace_files({path: content})


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """Write files whole, in place of those there may be; where one cannot be written, none of them is.

    Raises:
        ArtefactError: the disk is full, or a file cannot be written.
    """
    path, locks = Path(), list[int | None]()
    partials = {path: path.with_name(f".partial-{os.getpid()}-{path.name}{HELD}") for path in contents}
    try:
        for path, partial in partials.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            sweep(path.parent)
            partial.write_bytes(contents[path])
            locks.append(hold(partial))
            _flush(partial)
        for path, partial in partials.items():
            partial.replace(path)
    except OSError as error:
        raise ArtefactError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        for partial in partials.values():
            with suppress(OSError):
                partial.unlink()
        for lock in locks:
            if lock is not None:
                os.close(lock)


@contextmanager
def appear(path: Path) -> Iterator[Path]:
    """A folder that appears whole or not at all.

    Yields a hidden folder beside ``path`` to put the files in. When the block ends well, all is flushed to disk, and
    the folder takes its name in one rename. When it ends with any exception (a full disk, Ctrl-C) the hidden folder is
    removed; after a SIGKILL it stays behind as ``.partial-*``, is never taken for what it was to be, and goes when
    another is written beside it an hour later.

    Raises:
        UsageError: ``path`` exists already; nothing is ever overwritten.
        ArtefactError: the disk is full, or the folder cannot be written.
    """
    if path.exists():
        raise UsageError(f"{path} exists already: choose another path, or remove it first")
    partial: Path | None = None
    lock: int | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        partial = Path(tempfile.mkdtemp(prefix=f".partial-{path.name}-", suffix=HELD, dir=path.parent))
        lock = hold(partial)
        partial.chmod(0o777 & ~_umask())
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())  # safetensors lets nobody else read its files
        for file in [*partial.rglob("*"), partial]:
            _flush(file)
        partial.rename(path)
        _flush(path.parent)
    except OSError as error:
        if path.exists():  # another process took the name meanwhile
            raise UsageError(f"{path} exists already: choose another path, or remove it first") from error
        raise ArtefactError(f"cannot write {path}: {error.strerror or error}; nothing was left behind") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextmanager
def write(path: Path, manifest: dict[str, Any]) -> Iterator[Path]:
    """Write an artefact whole or not at all.

    Yields a hidden folder to put the files in, as :func:`appear` does. When the block ends well, every file is hashed
    into ``manifest["files"]``, and the manifest and its seal are written beside them.

    Raises:
        UsageError: ``path`` exists already; nothing is ever overwritten.
        ArtefactError: the disk is full, or the folder cannot be written.
    """
    with appear(path) as partial:
        yield partial
        files = sorted(file for file in partial.rglob("*") if file.is_file())
        manifest["files"] = {file.relative_to(partial).as_posix(): sha256(file) for file in files}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        (partial / SEAL).write_text(_seal(partial), encoding="utf-8")


def read(path: Path, kind: str, formats: tuple[int, ...]) -> dict[str, Any]:
    """Read an artefact's manifest and verify every file it names.

    Args:
        path: the artefact's folder.
        kind: ``"run"`` or ``"bundle"``, as its manifest says.
        formats: the format numbers that the caller understands.

    Raises:
        ArtefactError: no such folder, not an artefact of this kind, or of an unknown format.
        CorruptError: a file is missing, truncated or changed; it is named.
    """
    if not path.is_dir():
        raise ArtefactError(f"no {kind} at {path}: there is no such folder")
    if not (path / MANIFEST).is_file():
        raise ArtefactError(f"{path} is not a {kind}: it has no {MANIFEST}")
    try:
        if (path / SEAL).read_text(encoding="utf-8") != _seal(path):
            raise CorruptError(_changed(path / MANIFEST, kind))
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CorruptError(f"{path / SEAL} is missing: the {kind} is incomplete, copy or make it again") from error
    except ValueError as error:
        raise CorruptError(_changed(path / MANIFEST, kind)) from error
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror or error}") from error
    if manifest.get("kind") != kind:
        raise ArtefactError(f"{path} is a {manifest.get('kind')}, not a {kind}")
    if manifest.get("format") not in formats:
        known = ", ".join(map(str, formats))
        raise ArtefactError(
            f"{path} has {kind} format {manifest.get('format')}; this version of ensembler reads {known}: update it"
        )
    for name, expected in manifest["files"].items():
        try:
            if sha256(path / name) != expected:
                raise CorruptError(_changed(path / name, kind))
        except FileNotFoundError as error:
            message = f"{path / name} is missing: the {kind} is incomplete, copy or make it again"
            raise CorruptError(message) from error
        except OSError as error:
            raise ArtefactError(f"cannot read {path / name}: {error.strerror or error}") from error
    return dict(manifest)


def _seal(path: Path) -> str:
    return f"{sha256(path / MANIFEST)}  {MANIFEST}\n"


def _changed(file: Path, kind: str) -> str:
    return f"{file} has changed since it was written (its SHA-256 differs): copy or make the {kind} again"


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder for flushing
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
