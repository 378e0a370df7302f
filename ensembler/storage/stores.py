"""Folders at URLs for :mod:`ensembler.storage.urls`: reading, listing and writing, with errors on one line.

fsspec and huggingface_hub are imported when a URL is opened, because few commands need them.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ensembler.errors import ArtefactError, CorruptError, EnsemblerError, UsageError
from ensembler.progress import Watcher
from ensembler.storage.artefact import LARGEST_TEXT, MANIFEST, NAME, SEAL, open_file, partial_file

__all__ = ["HubRepository", "Store", "is_url", "mismatch", "name_of", "open_store", "silent"]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]+://")  # at least two letters: C:// is a drive
_HUB = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([^/@]+))?/?")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hub"}
_FLAT = {*_EXTRAS, "az", "abfs", "abfss", "oss", "oci", "http", "https"}  # without folders; s3fs would make a bucket
_CHUNK = 2**22


def silent(label: str, done: int, total: int) -> None:
    """Ignore progress."""


def is_url(text: str) -> bool:
    """Return whether a text is a URL rather than a path."""
    return _URL.match(text) is not None


def name_of(url: str) -> str:
    """Return the last part of a URL: the name of the run or bundle there.

    Raises:
        UsageError: it is not a valid name of a folder.
    """
    repository = _HUB.fullmatch(url)
    scheme, _, path = url.partition("://")
    name = (repository[1] if repository else path).rstrip("/").rpartition("/")[2]
    if not NAME.fullmatch(name):
        example = f"{scheme}://{path.rstrip('/') or 'BUCKET'}/NAME"
        raise UsageError(f"{url} must end with a name for the run or bundle, such as {example}")
    return name


def mismatch(where: str, *, missing: bool = False) -> str:
    """Return the message for a file at a URL that is not the one that was pushed."""
    if missing:
        return f"{where} is missing: push again"
    return f"{where} is not what was pushed (its SHA-256 differs): remove that file, and push again"


class Store:
    """A folder on a file system that fsspec knows."""

    def __init__(self, url: str) -> None:
        self.url, self.name = url.rstrip("/"), name_of(url)
        with self._errors_on_one_line("reach"):
            from fsspec.core import url_to_fs

            self._fs, root = url_to_fs(url)
            self._root = root.rstrip("/")
            self._fs.invalidate_cache()

    def check_writes(self) -> None:
        """Check that something can be pushed to this kind of URL.

        Raises:
            UsageError: it can only be read.
        """
        if "http" in self._protocols():
            raise UsageError(f"{self.url} can only be read: push to s3://, gs://, hf:// or file:// instead")

    def prepare(self, private: bool) -> None:
        """Create what must exist before the first write."""

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file, or ``None`` if it does not exist.

        Raises:
            ArtefactError: it is too large to be one.
        """
        with self._errors_on_one_line("read"):
            try:
                with self._open(name) as file:
                    content: bytes = file.read(LARGEST_TEXT + 1)
            except (FileNotFoundError, NotADirectoryError) as error:
                _check_missing(error)
                return None
        if len(content) > LARGEST_TEXT:
            raise ArtefactError(f"{self.url}/{name} is larger than {LARGEST_TEXT >> 20} MiB: do not use it")
        return content

    def has(self, name: str) -> bool:
        """Return whether a file exists."""
        with self._errors_on_one_line("read"):
            return bool(self._fs.exists(self._path(name)))

    def names(self) -> list[str]:
        """List the folder's content."""
        with self._errors_on_one_line("read"):
            try:
                self._fs.invalidate_cache()
                paths = self._fs.ls(self._root, detail=False)
            except (FileNotFoundError, NotADirectoryError) as error:
                _check_missing(error)
                return []
        return [path.rstrip("/").rpartition("/")[2] for path in paths if path.rstrip("/") != self._root]

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of every file of the folder, if known."""
        with self._errors_on_one_line("read"):
            try:
                self._fs.invalidate_cache()
                files = self._fs.find(self._root, maxdepth=2, detail=True)
            except (FileNotFoundError, NotADirectoryError) as error:
                _check_missing(error)
                return {}
        sizes = {path.removeprefix(self._root).lstrip("/"): entry["size"] for path, entry in files.items()}
        return {name: size for name, size in sizes.items() if size is not None}

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield a file's content in chunks."""
        with self._errors_on_one_line("read"):
            try:
                file = self._stream(name)
            except FileNotFoundError as error:
                _check_missing(error)
                raise CorruptError(mismatch(f"{self.url}/{name}", missing=True)) from error
        with file:
            while True:
                with self._errors_on_one_line("read"):
                    chunk = file.read(_CHUNK)
                if not chunk:
                    return
                yield chunk

    def write(self, files: Mapping[str, Path | bytes], watch: Watcher) -> None:
        """Write files in order: the first claims the folder; the seal is written only if the claim still holds."""
        done, total = 0, sum(map(_size, files.values()))
        label = f"pushing to {self.url}"
        for name, source in files.items():
            watch(label, done, total)
            if name == SEAL and self.read(MANIFEST) != files[MANIFEST]:
                raise UsageError(f"another push to {self.url} ran at the same time: choose another URL, or push again")
            with self._errors_on_one_line("write"):
                self._put(name, source, partial(_report, watch, label, done, total))
            done += _size(source)
        watch(label, done, total)

    def _put(self, name: str, source: Path | bytes, sent: Callable[[int], None]) -> None:
        target, protocols = self._path(name), self._protocols()
        if "file" in protocols:
            with partial_file(Path(target)) as hidden:
                self._send(source, str(hidden), sent)
            return
        if not _FLAT.intersection(protocols):
            self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._send(source, target, sent)

    def _send(self, source: Path | bytes, target: str, sent: Callable[[int], None]) -> None:
        from fsspec.callbacks import Callback

        if isinstance(source, bytes):
            self._fs.pipe_file(target, source)
        else:
            callback = Callback(hooks={"sent": lambda size, value, **_: sent(value)})
            self._fs.put_file(str(source), target, callback=callback)

    def _open(self, name: str) -> Any:
        if "file" in self._protocols():  # another's shared folder
            return open_file(Path(self._root), name)
        return self._fs.open(self._path(name), "rb")

    def _stream(self, name: str) -> Any:
        """Open a file that is read from its beginning to its end."""
        return self._open(name)

    def _protocols(self) -> tuple[str, ...]:
        given = self._fs.protocol
        return tuple(given) if isinstance(given, tuple | list) else (given,)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _errors_on_one_line(self, verb: str) -> Iterator[None]:
        """Turn any error of a file system into an EnsemblerError of one line."""
        try:
            yield
        except EnsemblerError:
            raise
        except ImportError as error:
            scheme = self.url.partition("://")[0]
            package = (
                f"'ensembler[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else str(getattr(error, "name", None) or "")
            )
            remedy = f"pip install {package}" if package else str(error)
            raise UsageError(f"{self.url} needs a package that is not installed: {remedy}") from error
        except FileNotFoundError as error:
            reason = "its bucket or folder does not exist: check the URL, or create it first"
            raise ArtefactError(f"cannot {verb} {self.url}: {reason}") from error
        except Exception as error:
            reason = (error.strerror if isinstance(error, OSError) else "") or str(error).strip()
            reason = reason or type(error).__name__
            status = _status(error)
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = "make room, and try again" if full else "check the URL and the network, and try again"
            if isinstance(error, PermissionError) or status in (401, 403) or "Credential" in type(error).__name__:
                remedy = "check that the credentials in the environment allow it"
            raise ArtefactError(f"cannot {verb} {self.url}: {reason.splitlines()[0]}: {remedy}") from error


class HubRepository(Store):
    """A model repository on the Hugging Face Hub, at one commit."""

    def __init__(self, url: str) -> None:
        self.url, self.name = url.rstrip("/"), name_of(url)
        if not (match := _HUB.fullmatch(url)):
            raise UsageError(f"{url} is not a repository: give hf://USER/NAME or hf://USER/NAME@REVISION")
        self._repository, self._revision = match[1], unquote(match[2] or "main")
        self._commit = ""
        with self._errors_on_one_line("reach"):
            from huggingface_hub import HfApi, HfFileSystem

            self._api, self._fs = HfApi(), HfFileSystem()
            self._pin()

    def _pin(self) -> None:
        """Pin the revision to its current commit, so that later commits do not change what is read."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        self._fs.invalidate_cache()
        with suppress(RepositoryNotFoundError, RevisionNotFoundError):
            self._commit = self._api.repo_info(self._repository, revision=self._revision).sha or ""
        self._root = f"{self._repository}@{self._commit or self._revision}"

    def prepare(self, private: bool) -> None:
        if not self._commit:
            with self._errors_on_one_line("write"):
                self._api.create_repo(self._repository, private=private, exist_ok=True)
                self._pin()

    def read(self, name: str) -> bytes | None:
        return super().read(name) if self._commit else None

    def write(self, files: Mapping[str, Path | bytes], watch: Watcher) -> None:
        """Write all files in one commit, which fails if there is a newer commit than the pinned one."""
        import sys

        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.utils.tqdm import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
        with self._errors_on_one_line("write"):
            self._api.create_commit(
                self._repository,
                [CommitOperationAdd(name, source) for name, source in files.items()],
                commit_message=f"Push {self.name} with ensembler",
                revision=self._revision,
                parent_commit=self._commit or None,
            )

    def _stream(self, name: str) -> Any:
        return self._fs.open(self._path(name), "rb", block_size=0)  # one stream instead of a request per block


def open_store(url: str) -> Store:
    """Open the folder at a URL, which need not exist.

    Raises:
        UsageError: the URL is invalid, or its package is not installed. ArtefactError: it cannot be reached.
    """
    return HubRepository(url) if url.startswith("hf://") else Store(url)


def _check_missing(error: OSError) -> None:
    """Raise what is no missing file, but reported as one: a host that does not answer, an HTTP error, no bucket."""
    cause = error.__cause__
    if type(cause).__name__ == "NoSuchBucket":
        raise error
    if cause and type(cause).__module__.startswith("aiohttp.") and _status(cause) not in (403, 404, 410):
        raise cause  # (403: of S3, to whoever may not list)


def _status(error: BaseException | None) -> int | None:
    """The status of an HTTP error of any library."""
    response = getattr(error, "response", None)
    status: int | None = getattr(error, "status", None) or getattr(response, "status_code", None)
    return status


def _report(watch: Watcher, label: str, before: int, total: int, sent: int) -> None:
    watch(label, before + sent, total)


def _size(source: Path | bytes) -> int:
    return len(source) if isinstance(source, bytes) else source.stat().st_size
