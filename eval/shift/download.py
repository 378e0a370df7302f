"""Download of published test sets: CIFAR-10-C, CIFAR-100-C, ImageNet-C (Hendrycks & Dietterich 2019) and CINIC-10.

An interrupted transfer is resumed, the MD5 is checked before unpacking, and the folder appears only when complete.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tarfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import httpx

from ensembler import __version__
from ensembler.data.decoding import suffixes
from ensembler.errors import DataError, UsageError
from ensembler.eval.shift.corruptions import HEADLINE, VALIDATION
from ensembler.eval.shift.generated import RECORD
from ensembler.eval.shift.layout import LABELS
from ensembler.progress import Watcher
from ensembler.storage.artefact import ensure_folder, lock

__all__ = ["ARCHIVES", "HOST", "Archive", "download"]

HOST = "https://zenodo.org"

_CHUNK = 2**20
_TIMEOUT = 60.0  # seconds without a byte
_WAITS = (2.0, 5.0, 15.0)  # seconds before each further attempt; starts again after any progress
_PASSING = {408, 425, 429, 500, 502, 503, 504}  # temporary statuses


@dataclass(frozen=True)
class Archive:
    """A published archive that becomes one folder.

    Attributes:
        folder: the folder's name; the archive is ``FOLDER.tar``, or with another suffix.
        record: the page of it, below the host.
        size: in bytes.
        md5: hexadecimal, as published.
        files: the required files of the folder, which lie in a folder of its name in the archive; empty: all images
            of the archive, under their own paths.
        within: the folder's parent in the folder of datasets.
        suffix: of the archive.
        host: its URL.
        place: the archive's path below the host, where it is not Zenodo's.
    """

    folder: str
    record: str
    size: int
    md5: str
    files: tuple[str, ...] = (LABELS, *(f"{name}.npy" for name in HEADLINE + VALIDATION))
    within: str = ""
    suffix: str = ".tar"
    host: str = HOST
    place: str = ""

    @property
    def file(self) -> str:
        """The archive's name."""
        return f"{self.folder}{self.suffix}"

    @property
    def path(self) -> str:
        """The path of the archive, below the host."""
        return self.place or f"{self.record}/files/{self.file}?download=1"

    @property
    def page(self) -> str:
        """The URL of its page."""
        return f"{self.host}/{self.record}"


def _imagenet_c(part: str, size: int, md5: str) -> Archive:
    return Archive(part, "records/2235448", size, md5, files=(), within="imagenet-c")


ARCHIVES = {
    "cifar10c": Archive("CIFAR-10-C", "records/2535967", 2_918_471_680, "56bf5dcef84df0e2308c6dcbcbbd8499"),
    "cifar100c": Archive("CIFAR-100-C", "records/3555552", 2_918_473_216, "11f0ed0f1191edbf9fa23466ae6021d3"),
    "cinic10": Archive(
        "CINIC-10",
        "handle/10283/3192",
        687_544_992,
        "6ee4d0c996905fe93221de577967a372",
        files=(),
        suffix=".tar.gz",
        host="https://datashare.ed.ac.uk",
        place="bitstream/handle/10283/3192/CINIC-10.tar.gz",
    ),
    "imagenet-c-noise": _imagenet_c("noise", 22_565_673_785, "e80562d7f6c3f8834afb1ecf27252745"),
    "imagenet-c-blur": _imagenet_c("blur", 7_112_704_951, "2d8e81fdd8e07fef67b9334fa635e45c"),
    "imagenet-c-weather": _imagenet_c("weather", 12_797_438_995, "33ffea4db4d93fe4a428c40a6ce0c25d"),
    "imagenet-c-digital": _imagenet_c("digital", 7_757_510_705, "89157860d7b10d5797849337ca2e5c03"),
    "imagenet-c-extra": _imagenet_c("extra", 15_789_490_144, "d492dfba5fc162d8ec2c3cd8ee672984"),
}


class _Cut(Exception):  # noqa: N818
    """A failure of the network that may be temporary."""


def download(
    archive: Archive,
    root: Path,
    *,
    base: str | None = None,
    waits: Sequence[float] = _WAITS,
    watch: Watcher = lambda label, done, total: None,
) -> Path:
    """Fetch, check and unpack an archive; an existing folder is left as it is.

    Until then, fetched bytes are in ``FOLDER.tar.partial``, from which an interrupted download resumes. An
    archive that was fetched by hand is checked, unpacked and kept.

    Args:
        archive: one of :data:`ARCHIVES`.
        root: the folder to unpack into.
        base: the host's URL; by default the archive's.
        waits: seconds before each further attempt; after any progress, the first is immediate.
        watch: called with the current step, how many bytes are done, and of how many.

    Returns:
        The unpacked folder.

    Raises:
        UsageError: another process is fetching it, or the folder has generated images.
        DataError: the network or the disk failed, or the archive is not the published one.
    """
    root = root / archive.within
    folder, own, partial = (root / name for name in (archive.folder, archive.file, f"{archive.file}.partial"))
    if _is_there(archive, folder):
        return folder
    try:
        with ensure_folder(root), lock(root / f".{archive.folder}.lock", folder) or nullcontext():
            if _is_there(archive, folder):  # another process was quicker
                return folder
            tar = own if own.is_file() else partial
            _check_space(archive, root, archive.size - _size(tar))
            if tar == partial:
                _fetch(archive, partial, base or archive.host, waits, watch)
            _check_md5(archive, tar, watch)
            _unpack(archive, tar, folder, watch)
            partial.unlink(missing_ok=True)
    except OSError as error:
        kept = "; fetched bytes were kept: run the command again to resume" if _size(partial) else ""
        raise DataError(
            f"cannot write to {root}: {error.strerror or error}: make room there or choose another --data{kept}"
        ) from error
    return folder


def _is_there(archive: Archive, folder: Path) -> bool:
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    if (folder / RECORD).exists():
        raise UsageError(f"{folder} holds generated images: move it away, or choose another --data")
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
    """Fetch ``partial`` to its full length, in any number of transfers."""
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
                    f"cannot fetch {archive.folder} from {base}: {cut}; {kept:,} of {archive.size:,} bytes were kept: "
                    "check the network, and run the command again to resume"
                ) from cut
            watch(f"{cut}, trying again in {wait:.0f} s", kept, archive.size)
            time.sleep(wait)


def _transfer(archive: Archive, partial: Path, url: str, watch: Watcher) -> None:
    """Request the rest of ``partial``, and append it.

    Raises:
        _Cut: the network failed; what came was kept.
        DataError: the server offers another file.
    """
    have = _size(partial)
    headers = {"User-Agent": f"ensembler/{__version__}", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        with httpx.stream("GET", url, headers=headers, timeout=_TIMEOUT, follow_redirects=True) as response:
            _check_status(archive, response)
            done = _first_byte(archive, response, url, have)
            with partial.open("ab") as file:
                file.truncate(done)
                watch(f"fetching {archive.folder}", done, archive.size)
                for chunk in response.iter_raw():
                    done += file.write(chunk[: archive.size - done])
                    watch(f"fetching {archive.folder}", done, archive.size)
    except httpx.TransportError as error:
        reason = re.sub(r"^\[Errno -?\d+\] |^peer closed .*", "", str(error))
        raise _Cut(reason or "the connection was cut") from error


def _check_status(archive: Archive, response: httpx.Response) -> None:
    answer = f"the server answers {response.status_code} {response.reason_phrase}"
    if response.status_code in _PASSING:
        raise _Cut(answer)
    if response.is_error:
        raise DataError(
            f"cannot fetch {response.url}: {answer}: fetch {archive.file} by hand from {archive.page} "
            "into the same folder, and run the command again"
        )


def _first_byte(archive: Archive, response: httpx.Response, url: str, have: int) -> int:
    """Return the position of an answer's first byte: the requested one, or 0 from a server without ranges."""
    if response.status_code == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        first, size = (int(found[1]), int(found[2])) if found else (None, None)
    else:
        length = response.headers.get("Content-Length", "")
        first, size = 0, int(length) if length.isdecimal() else None
    if size != archive.size or first not in (0, have):
        offered = "something of unknown size" if size is None else f"{size:,} bytes"
        raise DataError(
            f"{url} offers {offered}, not the {archive.size:,} bytes of {archive.file}: is a proxy or a sign-in "
            f"page between? Try again later, or fetch it by hand from {archive.page} into the same folder"
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
    mend = f"remove it, and fetch it again from {archive.page}"
    if tar.suffix == ".partial":
        tar.unlink()
        mend = "it was removed: run the command again to fetch it anew"
    raise DataError(
        f"{tar} is not the published archive: its MD5 is {digest.hexdigest()}, not {archive.md5}; nothing was unpacked "
        f"from it; {mend}"
    )


def _unpack(archive: Archive, tar: Path, folder: Path, watch: Watcher) -> None:
    """Unpack the expected files under fixed names, or images under their own: nothing is written elsewhere."""
    hidden = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)  # of a process that was killed
    try:
        hidden.mkdir()
        with tarfile.open(tar, "r:*") as opened:
            for member in opened:
                name = _unpacked_name(archive, member.name)
                source = opened.extractfile(member) if name and member.isreg() else None
                if name is None or source is None:
                    continue
                (hidden / name).parent.mkdir(parents=True, exist_ok=True)
                with source, (hidden / name).open("wb") as file:
                    while chunk := source.read(_CHUNK):
                        file.write(chunk)
                        done = min(member.offset_data + source.tell(), archive.size)
                        watch(f"unpacking {archive.folder}", done, archive.size)
                    if archive.files:
                        file.flush()
                        os.fsync(file.fileno())
        missing = [name for name in archive.files if not (hidden / name).is_file()]
        if not archive.files and not any(hidden.iterdir()):
            raise DataError(f"{tar} has no image: it is not the published archive, remove it and run the command again")
        if missing:
            raise DataError(
                f"{tar} has no {archive.folder}/{missing[0]}: it is not the published archive, remove it and "
                "run the command again"
            )
        if not archive.files and hasattr(os, "sync"):
            os.sync()  # once: hundreds of thousands of small files
        hidden.rename(folder)
    except tarfile.TarError as error:
        raise DataError(f"cannot unpack {tar}: {error}: remove it, and run the command again") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _unpacked_name(archive: Archive, name: str) -> str | None:
    """Return the path in the folder of a file of the archive; ``None`` to leave it out."""
    name = name.removeprefix("./")
    if archive.files:
        inside = name.removeprefix(f"{archive.folder}/")
        return inside if inside != name and inside in (*archive.files, "README.txt") else None
    path = PurePosixPath(name)
    is_inside = not path.is_absolute() and ".." not in path.parts and "\\" not in name and ":" not in name
    return name if is_inside and path.suffix.lower() in suffixes() else None
