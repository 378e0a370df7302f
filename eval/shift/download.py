"""The official CIFAR-10-C and CIFAR-100-C archives (Hendrycks and Dietterich 2019), fetched from Zenodo.

A transfer that was cut goes on where it stopped; nothing is unpacked before its MD5 is the published one; the folder
is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shutil
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensembler import __version__
from ensembler.errors import DataError, UsageError
from ensembler.eval.shift.corruptions import HEADLINE, VALIDATION
from ensembler.eval.shift.generated import RECORD
from ensembler.eval.shift.layout import LABELS, lock
from ensembler.progress import Watcher

__all__ = ["ARCHIVES", "HOST", "Archive", "download"]

HOST = "https://zenodo.org"

_CHUNK = 2**20
_TIMEOUT = 60.0  # seconds without a byte
_WAITS = (2.0, 5.0, 15.0)  # seconds before each further attempt; anew whenever the one before has got something
_PASSING = {408, 425, 429, 500, 502, 503, 504}  # statuses that may be others in a moment


@dataclass(frozen=True)
class Archive:
    """A published tar of one folder.

    Attributes:
        folder: the folder's name; the tar is ``FOLDER.tar``.
        record: where it is published, below the host.
        size: in bytes.
        md5: hexadecimal, as published.
        files: what the folder must hold.
    """

    folder: str
    record: str
    size: int
    md5: str
    files: tuple[str, ...] = (LABELS, *(f"{name}.npy" for name in HEADLINE + VALIDATION))

    @property
    def path(self) -> str:
        """Of the tar, below the host."""
        return f"{self.record}/files/{self.folder}.tar?download=1"


ARCHIVES = {
    "cifar10c": Archive("CIFAR-10-C", "records/2535967", 2_918_471_680, "56bf5dcef84df0e2308c6dcbcbbd8499"),
    "cifar100c": Archive("CIFAR-100-C", "records/3555552", 2_918_473_216, "11f0ed0f1191edbf9fa23466ae6021d3"),
}


class _Cut(Exception):  # noqa: N818
    """The network failed in a way that may pass."""


def download(
    archive: Archive,
    root: Path,
    *,
    base: str = HOST,
    waits: Sequence[float] = _WAITS,
    watch: Watcher = lambda label, done, total: None,
) -> Path:
    """Fetch, check and unpack an archive; nothing is done if its folder is there already.

    What has been fetched lies in ``FOLDER.tar.partial`` until the folder is there, and is built upon after any
    interruption. A ``FOLDER.tar`` that lies there already, fetched by hand, is checked, unpacked and kept.

    Args:
        archive: one of :data:`ARCHIVES`.
        root: the folder to unpack into.
        base: the host's URL.
        waits: seconds before each further attempt; the first is tried again at once where an attempt got something.
        watch: told what is being done, how many bytes are done, and of how many.

    Returns:
        The unpacked folder.

    Raises:
        UsageError: another process is fetching it, or the folder's images were generated.
        DataError: the network, the disk, or bytes that are not the published ones.
    """
    folder, partial, own = (root / f"{archive.folder}{suffix}" for suffix in ("", ".tar.partial", ".tar"))
    if _is_there(archive, folder):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with lock(root / f".{archive.folder}.lock", folder):
            if _is_there(archive, folder):  # another process was quicker
                return folder
            tar = own if own.is_file() else partial
            _check_space(archive, root, archive.size - _size(tar))
            if tar == partial:
                _fetch(archive, partial, base, waits, watch)
            _check_md5(archive, tar, watch)
            _unpack(archive, tar, folder, watch)
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot write to {root}: {error.strerror or error}: make room there or choose another --data; what was "
            "fetched is kept, and running the command again goes on"
        ) from error
    return folder


def _is_there(archive: Archive, folder: Path) -> bool:
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    if (folder / RECORD).exists():
        raise UsageError(f"{folder} holds images that were generated here: move it away, or choose another --data")
    missing = [name for name in archive.files if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"{folder} is there but lacks {missing[0]}{more}: remove it, and run the command again")
    return True


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _check_space(archive: Archive, root: Path, to_fetch: int) -> None:
    needed, free = max(0, to_fetch) + archive.size, shutil.disk_usage(root).free
    if free < needed:
        raise DataError(
            f"{root} has {free / 1e9:.1f} GB free, and to fetch and unpack {archive.folder} takes "
            f"{needed / 1e9:.1f} GB more: make room there, or choose another --data"
        )


def _fetch(archive: Archive, partial: Path, base: str, waits: Sequence[float], watch: Watcher) -> None:
    """Bring ``partial`` to its full length, in as many transfers as it takes."""
    if _size(partial) > archive.size:
        partial.unlink()
    waiting = iter(waits)
    while (before := _size(partial)) < archive.size:
        try:
            _transfer(archive, partial, f"{base}/{archive.path}", watch)
        except _Cut as cut:
            kept = _size(partial)
            if kept > before:
                waiting = iter((0.0, *waits))
            wait = next(waiting, None)
            if wait is None:
                raise DataError(
                    f"cannot fetch {archive.folder} from {base}: {cut}; {kept:,} of {archive.size:,} bytes are kept: "
                    "check the network, and run the command again to go on"
                ) from cut
            watch(f"{cut}, trying again in {wait:.0f} s", kept, archive.size)
            time.sleep(wait)


def _transfer(archive: Archive, partial: Path, url: str, watch: Watcher) -> None:
    """One request for what ``partial`` lacks, appended to it.

    Raises:
        _Cut: the network failed; what came is in ``partial``.
        DataError: the server offers something else.
    """
    have = _size(partial)
    headers = {"User-Agent": f"ensembler/{__version__}", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with _answer(archive, urllib.request.Request(url, headers=headers)) as response:  # noqa: S310
        done = _first_byte(archive, response, url, have)
        with partial.open("ab") as file:
            file.truncate(done)
            watch(f"fetching {archive.folder}", done, archive.size)
            while done < archive.size:
                chunk = _read(response, min(_CHUNK, archive.size - done))
                file.write(chunk)
                done += len(chunk)
                watch(f"fetching {archive.folder}", done, archive.size)


def _answer(archive: Archive, request: urllib.request.Request) -> Any:
    try:
        return urllib.request.urlopen(request, timeout=_TIMEOUT)  # noqa: S310
    except urllib.error.HTTPError as error:
        with error:
            said = f"the server answers {error.code} {error.reason}"
        if error.code in _PASSING:
            raise _Cut(said) from error
        raise DataError(
            f"cannot fetch {request.full_url}: {said}: fetch {archive.folder}.tar by hand from {HOST}/{archive.record} "
            "into the same folder, and run the command again"
        ) from error
    except urllib.error.URLError as error:
        raise _Cut(getattr(error.reason, "strerror", None) or str(error.reason)) from error
    except (OSError, http.client.HTTPException) as error:
        raise _Cut(str(error) or type(error).__name__) from error


def _read(response: Any, size: int) -> bytes:
    """Some bytes, at least one."""
    try:
        chunk: bytes = response.read1(size)
    except (OSError, http.client.HTTPException) as error:
        raise _Cut(str(error) or type(error).__name__) from error
    if not chunk:
        raise _Cut("the connection was cut")
    return chunk


def _first_byte(archive: Archive, response: Any, url: str, have: int) -> int:
    """Which byte of the file an answer begins with: the one asked for, or 0 from a server that only sends the whole."""
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        first, size = (int(found[1]), int(found[2])) if found else (None, None)
    else:
        length = response.headers.get("Content-Length", "")
        first, size = 0, int(length) if length.isdecimal() else None
    if size != archive.size or first not in (0, have):
        offered = "something of unknown size" if size is None else f"{size:,} bytes"
        raise DataError(
            f"{url} offers {offered}, not the {archive.size:,} bytes of {archive.folder}.tar: is a proxy or a sign-in "
            f"page between? Try again later, or fetch it by hand from {HOST}/{archive.record} into the same folder"
        )
    return first


def _check_md5(archive: Archive, tar: Path, watch: Watcher) -> None:
    digest, done = hashlib.md5(usedforsecurity=False), 0
    with tar.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            watch(f"checking {archive.folder}", done, archive.size)
    if digest.hexdigest() == archive.md5:
        return
    mend = f"remove it, and fetch it again from {HOST}/{archive.record}"
    if tar.suffix == ".partial":
        tar.unlink()
        mend = "it was removed: run the command again to fetch it anew"
    raise DataError(
        f"{tar} is not the published archive: its MD5 is {digest.hexdigest()}, not {archive.md5}; nothing was unpacked "
        f"from it; {mend}"
    )


def _unpack(archive: Archive, tar: Path, folder: Path, watch: Watcher) -> None:
    """The expected files of the archive, under names of ours: no path in it is ever followed."""
    hidden = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)  # of a process that was killed
    names = {f"{archive.folder}/{name}": name for name in (*archive.files, "README.txt")}
    try:
        hidden.mkdir()
        with tarfile.open(tar, "r:") as opened:
            for member in opened:
                name = names.get(member.name.removeprefix("./"))
                source = opened.extractfile(member) if name and member.isreg() else None
                if name is None or source is None:
                    continue
                with source, (hidden / name).open("wb") as file:
                    while chunk := source.read(_CHUNK):
                        file.write(chunk)
                        watch(f"unpacking {archive.folder}", member.offset_data + source.tell(), archive.size)
                    file.flush()
                    os.fsync(file.fileno())
        missing = [name for name in archive.files if not (hidden / name).is_file()]
        if missing:
            raise DataError(f"{tar} has no {archive.folder}/{missing[0]}: it is not the published archive")
        hidden.rename(folder)
    except tarfile.TarError as error:
        raise DataError(f"cannot unpack {tar}: {error}: remove it, and run the command again") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
