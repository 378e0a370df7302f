"""Cache on disk of what was made of image files: one file an entry, mapped into memory. It is safe to remove.

An entry's name is a hash of its files' folder, names, sizes and times, and of the code that decodes: whoever changes,
adds or removes a file finds nothing. (An image replaced by another of the same size in bytes, with its time set back,
has another time of its last change of status, which no program can set.) The entries that were not used for longest are
removed when all of them need more than :data:`LIMIT` GiB.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ensembler.data import decoding
from ensembler.data.examples import hash_tensors
from ensembler.data.folders import stat_files
from ensembler.errors import ArtefactError, UsageError
from ensembler.machine import user_cache
from ensembler.storage.artefact import partial_file
from ensembler.text import echo_once

__all__ = ["LIMIT", "Listed", "clear", "default_folder", "kept", "listed", "maximum", "recorded"]

LIMIT = "ENSEMBLER_IMAGE_CACHE_GIB"
"""The environment variable with the most that the cache may hold, in GiB; 0 keeps nothing."""

FORMAT = 1
_GIB = 2**30
_DEFAULT = 20.0
_SUFFIX = ".safetensors"
_NAME = "data"

_locks: dict[Path, int] = {}  # descriptors of the entries that this process has mapped, locked against removal


@dataclass(frozen=True)
class Listed:
    """An entry of the cache, as ``ensembler data cache`` lists it.

    Attributes:
        path: its file.
        what: what it holds, such as ``train images of /photos``.
        images: of how many images.
        bytes: its size.
        used: when it was last used, in seconds since 1970.
    """

    path: Path
    what: str
    images: int
    bytes: int
    used: float


def default_folder() -> Path:
    """Return the folder of the cache: ``$XDG_CACHE_HOME/ensembler/images``, or ``~/.cache/ensembler/images``."""
    return user_cache() / "images"


def maximum() -> int:
    """Return the most bytes that the cache may hold: :data:`LIMIT`, or by default 20 GiB.

    Raises:
        UsageError: it is not a number of GiB.
    """
    text = os.environ.get(LIMIT) or str(_DEFAULT)
    try:
        return int(float(text) * _GIB) if float(text) >= 0 else _refuse(text)
    except (ValueError, OverflowError):
        return _refuse(text)


def kept(
    folder: Path,
    files: Sequence[str],
    what: Mapping[str, Any],
    make: Callable[[], tuple[Tensor, dict[str, str]]],
    *labels: Tensor,
) -> tuple[Tensor, dict[str, str]]:
    """Return what was made of image files: from the cache, or made now and kept.

    Whatever is wrong with the cache is said in one line, and costs no more than making it again.

    Args:
        folder: of the files.
        files: their names, relative to it.
        what: what is made, in JSON: ``"of"`` in words, and the parameters.
        make: makes it: a tensor, and texts to keep beside it.
        labels: tensors that belong to it and are not kept.

    Returns:
        The tensor, mapped into memory where it comes from the cache; and the texts, with ``"sha256"``, which is
        :func:`ensembler.data.examples.hash_tensors` of the tensor and the labels.

    Raises:
        UsageError: :data:`LIMIT` is not a number. Whatever ``make`` raises.
    """
    limit, place, name = maximum(), _place(), _name(folder, files, what)
    path = None if not limit or place is None or name is None else place / name
    if path is not None and (found := _load(path, labels)) is not None:
        return found
    tensor, texts = make()
    texts = {**texts, "sha256": hash_tensors(tensor, *labels)}
    if path is not None and name == _name(folder, files, what):  # else a file has changed meanwhile
        known = {"format": str(FORMAT), "what": f"{what['of']} of {folder}", "images": str(len(files))}
        _save(path, tensor, known | texts | {"dtype": str(tensor.dtype)}, limit)
    return tensor, texts


def recorded(folder: Path, files: Sequence[str], what: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the texts that :func:`kept` keeps beside a tensor, which is not read; ``None`` where there is no entry."""
    place, name = _place(), _name(folder, files, what)
    return None if not maximum() or place is None or name is None else _metadata(place / name)


def listed(folder: Path | None = None) -> list[Listed]:
    """Return the entries of the cache, the one that was used last first.

    Raises:
        ArtefactError: the folder cannot be read.
    """
    found = []
    try:
        for path in (folder or default_folder()).glob(f"*{_SUFFIX}"):
            with suppress(FileNotFoundError):  # another process has removed it
                stat, texts = path.stat(), _metadata(path) or {}
                count = texts.get("images", "")
                images = int(count) if count.isdecimal() else 0
                found.append(Listed(path, texts.get("what", "damaged"), images, stat.st_size, stat.st_mtime))
    except OSError as error:
        raise ArtefactError(f"cannot read the cache {error.filename}: {error.strerror or error}") from error
    return sorted(found, key=lambda entry: -entry.used)


def clear() -> tuple[int, int]:
    """Remove all entries but those that other processes use; return how many were removed, and how many bytes.

    Raises:
        ArtefactError: one cannot be removed.
    """
    entries = listed()
    try:
        removed = [entry.bytes for entry in entries if _remove(entry.path)]
    except OSError as error:
        raise ArtefactError(f"cannot remove {error.filename}: {error.strerror or error}") from error
    return len(removed), sum(removed)


def _refuse(text: str) -> int:
    raise UsageError(f"{LIMIT} must be a number of GiB, 0 or more, not {text!r}: 0 keeps no decoded images")


def _place() -> Path | None:
    try:
        return default_folder()
    except ArtefactError as error:
        return echo_once(f"decoded images are not kept: {error}")


def _name(folder: Path, files: Sequence[str], what: Mapping[str, Any]) -> str | None:
    """Return the file's name of an entry; ``None`` if an image is not there, which whoever decodes it will say."""
    digest = hashlib.sha256(json.dumps([FORMAT, str(folder), *_decoder(), what], sort_keys=True).encode())
    try:
        for file, stat in stat_files(folder, files):
            line = f"{file}\0{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}\n"
            digest.update(line.encode(errors="surrogateescape"))
    except OSError:
        return None
    return digest.hexdigest()[:32] + _SUFFIX


def _decoder() -> list[Any]:
    """Return what decides the pixels beside the files: Pillow, its libraries, and the source of the decoder."""
    import PIL
    from PIL import features

    from ensembler.data.images import read_images

    source = hashlib.sha256()
    for code in (decoding, decoding.decode, read_images):
        with suppress(OSError, TypeError):  # no source
            source.update(inspect.getsource(code).encode())
    libraries = [features.version(name) for name in ("jpg", "libjpeg_turbo", "zlib", "libtiff", "webp", "avif")]
    return [PIL.__version__, libraries, source.hexdigest()]


def _metadata(path: Path) -> dict[str, str] | None:
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    return metadata if metadata.get("format") == str(FORMAT) else None


def _load(path: Path, labels: Sequence[Tensor]) -> tuple[Tensor, dict[str, str]] | None:
    """Map an entry into memory, and verify it; ``None`` if there is none, or it is damaged, which is said."""
    if not path.is_file():
        return None
    _lock(path)
    try:
        with safe_open(path, "pt") as file:
            tensor, metadata = file.get_tensor(_NAME), file.metadata() or {}
    except (OSError, SafetensorError):
        tensor, metadata = None, {}
    known = metadata.get("sha256"), metadata.get("dtype")
    if tensor is None or known != (hash_tensors(tensor, *labels), str(tensor.dtype)):
        echo_once(f"{path} is damaged: the images are decoded again")
        return None
    with suppress(OSError):  # a cache that can only be read
        os.utime(path)
    return tensor, metadata


def _save(path: Path, tensor: Tensor, metadata: dict[str, str], limit: int) -> None:
    """Write an entry whole or not at all; where that fails, say so."""
    needed = tensor.nbytes
    try:
        if needed > limit:
            raise OSError(f"they need {needed / 1e6:,.1f} MB, and {LIMIT} allows {limit / 1e6:,.1f} MB")
        with partial_file(path) as partial:
            if (free := shutil.disk_usage(path.parent).free) < 2 * needed:
                raise OSError(
                    f"they need {needed / 1e6:,.1f} MB, more than half of the {free / 1e6:,.1f} MB left there"
                )
            _make_room(path.parent, limit - needed)
            partial.chmod(0o600)
            save_file({_NAME: tensor.contiguous()}, partial, metadata)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        echo_once(f"decoded images are not kept in {path.parent}: {reason}; they are decoded again when needed")


def _make_room(folder: Path, room: int) -> None:
    """Remove the entries that were not used for longest, until the others need no more than ``room`` bytes."""
    entries = listed(folder)
    total = sum(entry.bytes for entry in entries)
    for entry in reversed(entries):
        if total <= room:
            return
        total -= entry.bytes * _remove(entry.path)


def _lock(path: Path) -> None:
    """Keep other processes from removing an entry as long as this process lives.

    A file that is mapped into memory may be removed, but not by another machine of a network file system.
    """
    with suppress(ImportError, OSError):
        import fcntl

        if path not in _locks:
            _locks[path] = os.open(path, os.O_RDONLY)
            fcntl.flock(_locks[path], fcntl.LOCK_SH | fcntl.LOCK_NB)


def _remove(path: Path) -> bool:
    """Remove an entry unless another process uses it; return whether it was removed."""
    if (own := _locks.pop(path, None)) is not None:
        os.close(own)
    with suppress(ImportError, OSError):
        import fcntl

        descriptor = os.open(path, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
    path.unlink(missing_ok=True)
    return True
