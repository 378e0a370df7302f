"""Runs and bundles at URLs: on S3, Google Cloud Storage, any file system of fsspec, or the Hugging Face Hub.

A URL holds the folder of a run or bundle (:mod:`ensembler.storage.artefact`): its files, ``manifest.json``,
``manifest.sha256``, a run's calibration, and a ``README.md``. Object stores cannot rename folders, so the order of
writing marks what is complete: the manifest comes first and claims the URL, the seal comes last. On the Hub, everything
is one commit.

The content of a URL is untrusted: a manifest that names files outside its folder is refused, and every file must have
the SHA-256 that the sealed manifest gives, or it is discarded.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ensembler.errors import ArtefactError, CorruptError, UsageError
from ensembler.machine import kept_folder, user_cache
from ensembler.progress import Watcher
from ensembler.storage import artefact
from ensembler.storage.artefact import MANIFEST, SEAL
from ensembler.storage.signing import SIGNED
from ensembler.storage.stores import HubRepository, Store, is_url, mismatch, name_of, open_store, silent

__all__ = [
    "LARGEST",
    "Url",
    "as_paths",
    "check_free",
    "default_folder",
    "destination",
    "is_url",
    "local",
    "name_of",
    "place",
    "pull",
    "push",
]

CALIBRATION = "calibration.json"  # as ensembler.calibration.FILE, without its imports
CARD = "README.md"

LARGEST = 64
"""GB of a run or bundle at a URL; a larger one is fetched only if more is allowed."""

_KINDS = {"run": "runs", "bundle": "bundles"}  # each with its default parent folder
_SEALED = re.compile(rf"([0-9a-f]{{64}})  {re.escape(MANIFEST)}\n(?:{SIGNED.pattern.decode()})?")


class Url(str):
    """The URL of a run or bundle; a :class:`~pathlib.Path` would collapse its double slash."""

    __slots__ = ()


def place(text: str | Path) -> Path:
    """Parse a command-line argument that names a run or bundle: a path, or a :class:`Url`.

    For Typer's ``parser=``. It is annotated as a path because the command line replaces URLs by :func:`local` paths
    before a command runs.
    """
    if not str(text):
        import typer

        raise typer.BadParameter("takes a path or a URL, and it is empty")
    return Url(text) if isinstance(text, str) and is_url(text) else Path(text)  # type: ignore[return-value]


def as_paths(given: str | Path | Iterable[str | Path]) -> list[Path]:
    """Return one path or several, given as text or as paths, as a list of paths."""
    return [Path(given)] if isinstance(given, str | Path) else [Path(one) for one in given]


def default_folder() -> Path:
    """Return the cache of downloads: ``$XDG_CACHE_HOME/ensembler/artefacts`` or ``~/.cache/...``; safe to remove."""
    return user_cache() / "artefacts"


def local(location: str | Path, watch: Watcher = silent) -> Path:
    """Return the local folder of a run or bundle; one at a URL is downloaded into the cache.

    From a URL, the seal and a run's calibration are always read. If the cache has that artefact, nothing more is
    fetched; else it is downloaded and verified, and a partial download is not kept.

    Args:
        location: a path, which is returned as it is, or a URL.
        watch: reports progress.

    Returns:
        A folder whose name is the last part of the URL.

    Raises:
        ArtefactError: there is no artefact, it cannot be reached, or it cannot be written here.
        CorruptError: it is not what was pushed. UsageError: the URL is invalid, or its package is not installed.
    """
    if isinstance(location, Path) or not is_url(location):
        return Path(location)
    store = open_store(location)
    seal, sha256 = _read_seal(store)
    calibration = store.read(CALIBRATION)
    version = f"-{hashlib.sha256(calibration).hexdigest()[:32]}" if calibration is not None else ""
    folder = kept_folder("artefacts", "fetched runs and bundles") / f"{sha256}{version}" / store.name
    if folder.exists() and not _is_intact(folder, seal, calibration):
        _discard(folder)
    if not folder.exists():
        try:
            _fetch(store, seal, calibration, folder, watch)
        except UsageError:
            if not folder.exists():  # if it exists, another process fetched it first
                raise
    return folder


def pull(url: str, out: str | Path | None = None, watch: Watcher = silent, largest: float = LARGEST) -> Path:
    """Download a run or bundle into a folder and verify it; a partial download is not kept.

    Args:
        url: of the run or bundle.
        out: the folder, which must not exist; by default ``runs/NAME`` or ``bundles/NAME``.
        watch: reports progress.
        largest: GB; a larger one is refused.

    Raises:
        As :func:`local`; UsageError: ``out`` exists.
    """
    store = open_store(url)
    seal, _ = _read_seal(store)
    out = Path(_KINDS[_manifest(store, seal)[1]["kind"]], store.name) if out is None else Path(out)
    if out.exists():
        raise UsageError(f"{out} already exists: choose another --out, or remove it first")
    _fetch(store, seal, store.read(CALIBRATION), out, watch, largest)
    return out


def push(path: str | Path, url: str, *, private: bool | None = None, watch: Watcher = silent) -> list[str]:
    """Verify a run or bundle and upload it to a URL; an incomplete upload is never used.

    An interrupted push can be repeated. A complete artefact is never overwritten: if it is the same one, only files
    that are missing or of another size are sent again, and a calibration that differs. An existing ``README.md`` stays
    unchanged.

    Args:
        path: the run or bundle.
        url: the destination.
        private: whether a new repository on the Hugging Face Hub is private; by default it is.
        watch: reports progress.

    Returns:
        The names of the files sent; empty if all were there.

    Raises:
        ArtefactError: there is no run or bundle at ``path``, or the URL cannot be written to.
        CorruptError: a file has changed.
        UsageError: the URL holds something else, or the URL or an option for it is invalid.
    """
    from ensembler.storage.card import card

    path = Path(path).resolve()
    if private is not None and not url.startswith("hf://"):
        raise UsageError(f"--private and --public are for repositories on the Hub (hf://USER/NAME), not for {url}")
    manifest = _verify(path)
    seal = (path / SEAL).read_bytes()
    store = open_store(url)
    store.prepare(private is not False)
    exists = _check(store, seal, (path / MANIFEST).read_bytes())
    small, sizes = [MANIFEST], store.sizes() if exists else {}
    to_send: dict[str, Path | bytes] = {}  # in this order
    if manifest["kind"] == "run" and (path / CALIBRATION).exists():
        _check_calibration(path, path / CALIBRATION)
        small.append(CALIBRATION)
    for file in small:
        content = (path / file).read_bytes()
        if not exists or store.read(file) != content:
            to_send[file] = content
    for file in manifest["files"]:
        if sizes.get(file) != (path / file).stat().st_size:
            to_send[file] = path / file
    if not store.has(CARD):
        calibrated = CALIBRATION in (*small, *manifest["files"])
        to_send[CARD] = card(manifest, seal[:64].decode(), url, store.name, calibrated=calibrated).encode()
    if not exists:
        to_send[SEAL] = seal
    if to_send:
        store.write(to_send, watch)
    return list(to_send)


def check_free(url: str) -> None:
    """Check that a new run or bundle can be pushed to a URL, before the work starts.

    Raises:
        UsageError: the URL is taken or invalid. ArtefactError: it cannot be reached.
    """
    _check(open_store(url), None, None)


def destination(out: str | None, folder: str) -> tuple[Path | None, str | None]:
    """Split ``--out`` into a local path and a URL to push to at the end; for a URL, the path is ``FOLDER/NAME``.

    Raises:
        As :func:`check_free`.
    """
    if out is None or not is_url(out):
        return (None if out is None else Path(out)), None
    check_free(out)
    return Path(folder, name_of(out)), out


def _read_seal(store: Store) -> tuple[bytes, str]:
    """Read the artefact's seal, and the SHA-256 in it.

    Raises:
        ArtefactError: there is no run or bundle. CorruptError: it is incomplete.
    """
    seal = store.read(SEAL)
    match = _SEALED.fullmatch((seal or b"").decode("ascii", "replace"))
    if seal is not None and match:
        return seal, match[1]
    if seal is None and store.read(MANIFEST) is None:
        hidden = "; if it is private, set HF_TOKEN" if isinstance(store, HubRepository) else ""
        raise ArtefactError(f"no run or bundle at {store.url}: check the URL{hidden}")
    raise CorruptError(
        f"{store.url} is incomplete: wait until its push has finished, or push it again if that was interrupted"
    )


def _manifest(store: Store, seal: bytes) -> tuple[bytes, dict[str, Any]]:
    """Read the manifest at a URL, as bytes and parsed.

    Raises:
        CorruptError: it does not match the seal. ArtefactError: it is not a valid manifest of a run or bundle.
    """
    content = store.read(MANIFEST)
    if content is None or hashlib.sha256(content).hexdigest().encode() != seal[:64]:
        raise CorruptError(mismatch(f"{store.url}/{MANIFEST}", missing=content is None))
    return content, _parse(content, store.url)


def _parse(content: bytes, where: str | Path) -> dict[str, Any]:
    """Parse a manifest; refuse one that is not a run's or bundle's, or that names files outside its folder."""
    manifest = artefact.parse(content, where)
    if manifest["kind"] not in _KINDS:
        raise ArtefactError(f"{where} is a {manifest['kind']}, not a run or bundle: do not use it")
    return manifest


def _verify(path: Path) -> dict[str, Any]:
    """Verify every file of the run or bundle in a folder, of any format, and return its manifest."""
    try:
        manifest = _parse(artefact.read_text(path, MANIFEST), path)
    except FileNotFoundError as error:
        raise ArtefactError(f"no run or bundle at {path}: it has no {MANIFEST}; check the path") from error
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror or error}") from error
    return artefact.read(path, manifest["kind"], (manifest.get("format"),))  # type: ignore[arg-type]


def _check(store: Store, seal: bytes | None, manifest: bytes | None) -> bool:
    """Return whether a URL holds the complete artefact; if not, it is empty or holds its interrupted push.

    Args:
        store: the folder at the URL.
        seal, manifest: the artefact's; ``None`` for one that does not exist yet.

    Raises:
        UsageError: it holds something else.
    """
    store.check_writes()
    remedy = "choose another URL, or remove what is there first"
    other_seal, other_manifest = store.read(SEAL), store.read(MANIFEST)
    if other_seal and _SEALED.fullmatch(other_seal.decode("ascii", "replace")):
        if other_seal == seal:
            return True
        raise UsageError(f"{store.url} holds another run or bundle, which is never overwritten: {remedy}")
    if other_manifest is not None:
        if manifest is not None and manifest.startswith(other_manifest):  # even the first write may have been cut short
            return False
        raise UsageError(f"another push to {store.url} is running or was interrupted: {remedy}")
    if rest := [name for name in store.names() if not name.startswith(".") and name not in (CARD, SEAL, "LICENSE")]:
        raise UsageError(f"{store.url} is not empty, and holds no run or bundle ({min(rest)}): {remedy}")
    return False


def _fetch(
    store: Store, seal: bytes, calibration: bytes | None, path: Path, watch: Watcher, largest: float = LARGEST
) -> None:
    """Download the sealed artefact to ``path``.

    Raises:
        CorruptError: a file is missing or differs. ArtefactError: a file cannot be read, or not be written here, or
            all are larger than ``largest`` GB.
        UsageError: ``path`` exists.
    """
    content, manifest = _manifest(store, seal)
    done, total, label = 0, 0, f"fetching {store.url}"
    with suppress(ArtefactError):  # some servers cannot list files
        sizes = store.sizes()
        total = sum(sizes.get(name, 0) for name in manifest["files"])
    most = int(largest * 1e9)
    too_large = ArtefactError(
        f"{store.url} holds more than {largest:g} GB, and nothing of it was kept: allow more with "
        f"ensembler pull {store.url} --largest GB, if it is what you expect"
    )
    if total > most:
        raise too_large
    copies: list[Path] = []
    with suppress(ArtefactError):  # this user has no cache
        copies = [each for each in default_folder().glob(f"{seal[:64].decode()}*/[!.]*") if each.is_dir()]
    with artefact.appear(path) as folder:
        for name, expected in manifest["files"].items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if copies and _copy(copies[0] / name, target, expected):
                done += target.stat().st_size
                continue
            digest = hashlib.sha256()
            watch(label, done, total)
            with target.open("wb") as file:
                for chunk in store.chunks(name):
                    if done + len(chunk) > most:
                        raise too_large
                    digest.update(chunk)
                    file.write(chunk)
                    done += len(chunk)
                    watch(label, done, total)
            if digest.hexdigest() != expected:
                raise CorruptError(mismatch(f"{store.url}/{name}"))
        (folder / MANIFEST).write_bytes(content)
        (folder / SEAL).write_bytes(seal)
        if calibration is not None and manifest["kind"] == "run":
            (folder / CALIBRATION).write_bytes(calibration)
            _check_calibration(folder, f"{store.url}/{CALIBRATION}")


def _copy(source: Path, target: Path, expected: str) -> bool:
    """Copy a file from the cache, and return whether it has the expected SHA-256."""
    try:
        shutil.copyfile(source, target)
        return artefact.sha256(target) == expected
    except OSError:
        return False


def _check_calibration(run: Path, where: str | Path) -> None:
    """Refuse a damaged calibration; whether it is the run's is checked when it is used."""
    from ensembler import calibration

    try:
        calibration.load(run)
    except CorruptError as error:
        raise CorruptError(f"{where} has changed since it was written: remove it there, or calibrate again") from error
    except ArtefactError:
        pass


def _is_intact(folder: Path, seal: bytes, calibration: bytes | None) -> bool:
    """Return whether a folder of the cache is unchanged since it was fetched."""
    try:
        manifest = _verify(folder)
        beside = manifest["kind"] == "run" and (folder / CALIBRATION).exists()
        own = (folder / CALIBRATION).read_bytes() if beside else None
        return (folder / SEAL).read_bytes() == seal and own == (calibration if manifest["kind"] == "run" else None)
    except (ArtefactError, OSError):
        return False


def _discard(folder: Path) -> None:
    """Remove a folder in one step, so that no other process sees a part of it."""
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as away, suppress(OSError):
        folder.rename(Path(away) / folder.name)
