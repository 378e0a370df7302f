"""Artefacts, the common base of runs and bundles: folders that are written atomically and verified when read.

An artefact holds its files, ``manifest.json`` (with the SHA-256 of each) and ``manifest.sha256`` (that of the manifest,
in the format of ``sha256sum``). Standard library only, so that serving can verify a bundle without torch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

from ensembler.errors import ArtefactError, CorruptError, UsageError

__all__ = [
    "HELD",
    "LARGEST_TEXT",
    "MANIFEST",
    "NAME",
    "SEAL",
    "appear",
    "check_writable",
    "ensure_folder",
    "hold",
    "lock",
    "open_file",
    "parse",
    "parse_json",
    "partial_file",
    "read",
    "read_text",
    "replace_file",
    "replace_files",
    "sha256",
    "sweep",
    "write",
    "writing_to",
]

MANIFEST = "manifest.json"
SEAL = "manifest.sha256"
HELD = ".held"
"""Suffix of a hidden file or folder whose writer holds a lock on it: see :func:`sweep`."""

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_ .,=+-]*")
"""Of a folder or a file, on any system."""

LARGEST_TEXT = 2**26
"""Bytes of a manifest or another JSON file; a larger one is not read."""

_STALE = 3600.0  # seconds without a change, after which a writer may be dead

_INSTEAD = {
    "run": ": make a bundle of it with ensembler export {}",
    "bundle": ": give the run that it was exported from",
}


def sha256(path: Path) -> str:
    """Compute the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_file(root: Path, name: str = "") -> BufferedReader:
    """Open a file of an untrusted folder for reading: a regular file, reached through no link.

    Args:
        root: the folder, or the file itself.
        name: of the file in it, with ``/``.

    Raises:
        FileNotFoundError: it does not exist; OSError: it cannot be read.
        ArtefactError: a link, a device or a pipe, which is not opened.
    """
    parts = name.split("/") if name else []
    for depth in range(1, len(parts)):
        if root.joinpath(*parts[:depth]).is_symlink():
            raise ArtefactError(_link(root.joinpath(*parts[:depth])))
    path = root.joinpath(*parts)
    if path.is_symlink():
        raise ArtefactError(_link(path))
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ArtefactError(f"{path} is not a regular file, and is not opened: do not use it")
    return path.open("rb")


def _link(path: Path) -> str:
    return f"{path} is a link, which is not followed: copy the folder with what its links name (cp -rL), or remove it"


def read_text(root: Path, name: str = "") -> bytes:
    """Return the content of a small file, such as a manifest, of an untrusted folder.

    Raises:
        As :func:`open_file`; ArtefactError: it is larger than :data:`LARGEST_TEXT`.
    """
    with open_file(root, name) as file:
        content = file.read(LARGEST_TEXT + 1)
    if len(content) > LARGEST_TEXT:
        raise ArtefactError(f"{root / name} is larger than {LARGEST_TEXT >> 20} MiB, and is not read: do not use it")
    return content


def parse_json(content: bytes) -> Any:
    """Return what JSON in UTF-8 says.

    Raises:
        ValueError: it is not JSON, an object has a key twice, a number is not finite, or it is nested too deeply.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("an object has a key twice")
        return found

    def finite(text: str) -> float:
        if not math.isfinite(number := float(text)):
            raise ValueError(f"{text} is not a finite number")
        return number

    try:
        return json.loads(content, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse(content: bytes, where: str | Path) -> dict[str, Any]:
    """Return a manifest; refuse one that names files outside its folder.

    Args:
        content: of the file.
        where: the artefact's folder or URL.

    Raises:
        ArtefactError: it is not a manifest.
    """
    try:
        manifest = parse_json(content)
        kind, files = manifest["kind"], manifest["files"]
        if not isinstance(kind, str) or not isinstance(files, dict):
            raise ValueError("kind is no text, or files is no object")
    except (ValueError, KeyError, TypeError) as error:
        reason = f" ({error})" if isinstance(error, ValueError) else ""
        raise ArtefactError(f"the {MANIFEST} at {where} is not of a run or bundle{reason}: do not use it") from error
    for name, expected in files.items():
        if not all(map(NAME.fullmatch, name.split("/"))) or name in (MANIFEST, SEAL, "README.md"):
            raise ArtefactError(
                f"the {MANIFEST} at {where} names {name!r}, which is not a file of a {kind}: do not use it"
            )
        if not isinstance(expected, str):
            raise ArtefactError(f"the {MANIFEST} at {where} has no hash of {name}: do not use it")
    return dict(manifest)


def check_writable(folder: Path, remedy: str = "choose another --out") -> None:
    """Check that ``folder`` can be written to, or created, before the work starts. Nothing is created.

    Args:
        folder: an existing or a future folder.
        remedy: what to do about it, for the error message.

    Raises:
        ArtefactError: the folder cannot be written to or created.
    """
    try:
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ArtefactError(f"cannot write to {folder}: {error.strerror or error}: {remedy}") from error


def hold(path: Path) -> int | None:
    """Lock a file or folder until the returned descriptor is closed or this process ends.

    Returns ``None`` if another process has the lock, or if there are no such locks (Windows, some network file
    systems).
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


def lock(file: Path, what: Path) -> BufferedWriter | None:
    """Open a file and lock it until it is closed, so that one process at a time works on ``what``.

    Returns:
        The open file, without a lock on network file systems that have none; ``None`` on Windows.

    Raises:
        UsageError: another process has locked it.
    """
    try:
        import fcntl
    except ImportError:
        return None
    held = file.open("wb")
    with suppress(OSError):
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            held.close()
            raise UsageError(f"another process is working on {what}: let it finish, or stop it") from error
    return held


def sweep(folder: Path) -> None:
    """Remove the ``.partial-*.held`` files and folders of killed processes from ``folder``.

    The system releases a dead writer's lock. (A process number would not do: it may be reused, or belong to another
    container.) Since locks do not work across every network file system, and clocks can jump, two conditions must hold:
    the lock is free, and nothing has changed for an hour.
    """
    for path in folder.glob(f".partial-*{HELD}"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE and (lock := hold(path)) is not None:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
                os.close(lock)


@contextmanager
def ensure_folder(path: Path) -> Iterator[None]:
    """Make a folder and its parents where they are missing; if the block raises, those made here and empty are removed.

    What killed processes left in the folder is removed, too (:func:`sweep`).

    Raises:
        OSError: it cannot be made.
    """
    made: list[Path] = []
    try:
        for folder in reversed((path, *path.parents)):
            if not folder.is_dir():
                try:
                    folder.mkdir(parents=True)  # one that was removed meanwhile is made again
                    made.append(folder)
                except FileExistsError as error:
                    if not folder.is_dir():  # no other process made it meanwhile
                        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error
        sweep(path)
        yield
    except BaseException:
        with suppress(OSError):  # the first that is not empty, and its parents, stay
            for folder in reversed(made):
                folder.rmdir()
        raise


@contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """Write or replace one file atomically, in a folder that is made where it is missing.

    Yields an empty hidden file beside ``path``. If the block succeeds, it is flushed to disk and takes its place;
    otherwise it is removed.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    partial, lock = path.with_name(f".partial-{secrets.token_hex(4)}-{path.name}{HELD}"), None
    with ensure_folder(path.parent):
        try:
            partial.touch()
            lock = hold(partial)
            yield partial
            _flush(partial)
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        finally:
            if lock is not None:
                os.close(lock)


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn the system's errors in the block into one sentence about ``path``.

    Raises:
        ArtefactError: the disk is full, or ``path`` cannot be written.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ArtefactError(f"cannot write {path}: {reason}: make room, or choose another place") from error


def replace_file(path: Path, content: bytes) -> None:
    """Write or replace one file atomically.

    Raises:
        ArtefactError: the disk is full, or the file cannot be written.
    """
    replace_files({path: content})


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """Write or replace several files; if one cannot be written, none is replaced.

    Raises:
        ArtefactError: the disk is full, or a file cannot be written.
    """
    with ExitStack() as files:
        for path, content in reversed([*contents.items()]):  # the last written is replaced first
            files.enter_context(writing_to(path))
            partial = files.enter_context(partial_file(path))
            partial.write_bytes(content)
            _flush(partial)


@contextmanager
def appear(path: Path) -> Iterator[Path]:
    """Create a folder atomically.

    Yields a hidden folder beside ``path`` for the files. If the block succeeds, everything is flushed to disk and the
    folder is renamed to ``path`` in one step. If the block raises (a full disk, Ctrl-C), the hidden folder is removed.
    After a SIGKILL it remains as ``.partial-*``, which nothing reads, until :func:`sweep` removes it.

    Raises:
        UsageError: ``path`` already exists; nothing is ever overwritten.
        ArtefactError: the disk is full, or the folder cannot be written.
    """
    if path.exists():
        raise UsageError(f"{path} already exists: choose another path, or remove it first")
    with writing_to(path), ensure_folder(path.parent), _partial_folder(path) as partial:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())  # safetensors makes its files readable by their owner only
        for file in [*partial.rglob("*"), partial]:
            _flush(file)
        try:
            partial.rename(path)
        except OSError as error:
            if path.exists():  # another process created it meanwhile
                raise UsageError(f"{path} already exists: choose another path, or remove it first") from error
            raise
        _flush(path.parent)


@contextmanager
def _partial_folder(path: Path) -> Iterator[Path]:
    """Make a hidden folder beside ``path``, and remove it at the end unless it was renamed."""
    partial = Path(tempfile.mkdtemp(prefix=f".partial-{path.name}-", suffix=HELD, dir=path.parent))
    lock = hold(partial)
    try:
        partial.chmod(0o777 & ~_umask())
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextmanager
def write(path: Path, manifest: dict[str, Any], sign: Callable[[bytes], bytes] | None = None) -> Iterator[Path]:
    """Write an artefact atomically.

    Yields a hidden folder for the files, as :func:`appear` does. If the block succeeds, the hash of every file is added
    to ``manifest["files"]``, and the manifest and its seal are written.

    Args:
        path: must not exist.
        manifest: its content, read when the block has ended.
        sign: returns the line that is added to the seal's line.

    Raises:
        UsageError: ``path`` already exists; nothing is ever overwritten.
        ArtefactError: the disk is full, or the folder cannot be written.
    """
    with appear(path) as partial:
        yield partial
        files = sorted(file for file in partial.rglob("*") if file.is_file())
        manifest["files"] = {file.relative_to(partial).as_posix(): sha256(file) for file in files}
        content = f"{json.dumps(manifest, indent=2, allow_nan=False)}\n".encode()
        (partial / MANIFEST).write_bytes(content)
        seal = _sealed(content)
        (partial / SEAL).write_bytes(seal + (sign(seal) if sign else b""))


def read(
    path: Path, kind: str, formats: tuple[int, ...], check_seal: Callable[[bytes], None] | None = None
) -> dict[str, Any]:
    """Read an artefact's manifest and verify every file in it.

    Args:
        path: the artefact's folder.
        kind: the expected kind, such as ``"run"`` or ``"bundle"``.
        formats: the format numbers that the caller can read.
        check_seal: called with the seal's content, to refuse it.

    Raises:
        ArtefactError: there is no such folder, or it is of another kind or an unknown format.
        CorruptError: a file is missing, truncated or changed; the message names it.
    """
    if not path.is_dir():
        raise ArtefactError(f"no {kind} at {path}: there is no such folder, check the path")
    if not os.path.lexists(path / MANIFEST):
        raise ArtefactError(f"{path} is not a {kind}: it has no {MANIFEST}")
    try:
        content = read_text(path, MANIFEST)
        seal = read_text(path, SEAL)
        if not seal.startswith(_sealed(content)):
            raise CorruptError(_changed(path / MANIFEST, kind))
    except FileNotFoundError as error:
        raise CorruptError(f"{path / SEAL} is missing: the {kind} is incomplete, copy or create it again") from error
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror or error}") from error
    if check_seal is not None:
        check_seal(seal)
    manifest = parse(content, path)
    if (found := manifest["kind"]) != kind:
        raise ArtefactError(f"{path} is a {found}, not a {kind}{_INSTEAD.get(found, '').format(path)}")
    if manifest.get("format") not in formats:
        known = ", ".join(map(str, formats))
        raise ArtefactError(
            f"{path} has {kind} format {manifest.get('format')}; this version of ensembler reads {known}: update it"
        )
    for name, expected in manifest["files"].items():
        try:
            with open_file(path, name) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    raise CorruptError(_changed(path / name, kind))
        except FileNotFoundError as error:
            message = f"{path / name} is missing: the {kind} is incomplete, copy or create it again"
            raise CorruptError(message) from error
        except OSError as error:
            raise ArtefactError(f"cannot read {path / name}: {error.strerror or error}") from error
    return manifest


def _sealed(manifest: bytes) -> bytes:
    """The first line of a seal; a signature may follow."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def _changed(file: Path, kind: str) -> str:
    return f"{file} has changed since it was written (its SHA-256 differs): copy or create the {kind} again"


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot flush a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
