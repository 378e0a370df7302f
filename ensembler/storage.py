"""Runs and bundles at a URL: on S3, Google Cloud Storage, any file system that fsspec knows, or the Hugging Face Hub.

What lies at a URL is the artefact's own folder (:mod:`ensembler.artefact`): its files, ``manifest.json``,
``manifest.sha256``, a run's calibration, and a ``README.md`` about it. Object stores rename no folders, so there the
order of writing says what is whole: the manifest comes first and claims the place, the seal comes last. On the Hub
everything is one commit.

Nothing at a URL is trusted: its manifest names no place outside its folder, and every byte fetched has the SHA-256
that the seal vouches for, or is thrown away.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from ensembler import artefact
from ensembler.artefact import MANIFEST, SEAL
from ensembler.errors import ArtefactError, CorruptError, UsageError
from ensembler.progress import Watcher
from ensembler.stores import NAME, HubRepository, Store, changed, is_url, name_of, open_store, silent

__all__ = [
    "Url",
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

CALIBRATION = "calibration.json"  # of a run; ensembler.calibration says more, and imports more
CARD = "README.md"

_KINDS = {"run": "runs", "bundle": "bundles"}  # and where they are pulled to by default
_SEALED = re.compile(rf"([0-9a-f]{{64}})  {re.escape(MANIFEST)}\n")


class Url(str):
    """Where a run or bundle lies; a :class:`~pathlib.Path` would lose a slash of it."""

    __slots__ = ()


def place(text: str | Path) -> Path:
    """What is typed where a run or bundle is wanted: a path, or a :class:`Url`, which :func:`local` makes a path of.

    For Typer's ``parser=``. The command line calls :func:`local` before the command runs, so that a command sees paths
    alone: hence the type.
    """
    return Url(text) if isinstance(text, str) and is_url(text) else Path(text)  # type: ignore[return-value]


def default_folder() -> Path:
    """What is fetched is kept here: ``$XDG_CACHE_HOME/ensembler/artefacts``, or ``~/.cache/...``; safe to remove."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ensembler" / "artefacts"


def local(location: str | Path, watch: Watcher = silent) -> Path:
    """The folder on this machine of a run or bundle that may lie at a URL.

    Of a URL the seal is read, and a run's calibration. Where the cache holds that artefact, nothing more is; else it
    is fetched and verified, and appears in the cache whole or not at all.

    Args:
        location: a path, which is returned as it is, or a URL.
        watch: told what is fetched.

    Returns:
        A folder of the URL's last name.

    Raises:
        ArtefactError: nothing is there, or it cannot be reached or kept. CorruptError: it is not what was pushed.
        UsageError: a URL that cannot be used, or a package for it that is not installed.
    """
    if isinstance(location, Path) or not is_url(location):
        return Path(location)
    store = open_store(location)
    seal, sha256 = _sealed(store)
    calibration = store.read(CALIBRATION)
    version = f"-{hashlib.sha256(calibration).hexdigest()[:32]}" if calibration is not None else ""
    folder = default_folder() / f"{sha256}{version}" / store.name
    if folder.exists() and not _holds(folder, seal, calibration):
        _discard(folder)
    if not folder.exists():
        try:
            _fetch(store, seal, calibration, folder, watch)
        except UsageError:
            if not folder.exists():  # or else another process was quicker
                raise
    return folder


def pull(url: str, out: Path | None = None, watch: Watcher = silent) -> Path:
    """Fetch a run or bundle into a folder, verified, whole or not at all.

    Args:
        url: where it lies.
        out: the folder, which must not exist; by default ``runs/NAME`` or ``bundles/NAME``.
        watch: told what is fetched.

    Raises:
        As :func:`local`; UsageError: ``out`` exists.
    """
    store = open_store(url)
    seal, _ = _sealed(store)
    if out is None:
        out = Path(_KINDS[_manifest(store, seal)[1]["kind"]], store.name)
    if out.exists():
        raise UsageError(f"{out} exists already: choose another --out, or remove it first")
    _fetch(store, seal, store.read(CALIBRATION), out, watch)
    return out


def push(path: Path, url: str, *, private: bool | None = None, watch: Watcher = silent) -> list[str]:
    """Verify a run or bundle and write it to a URL, such that it is never taken for whole before it is.

    A push that was interrupted can be repeated. What lies there whole is never overwritten: if it is the same artefact,
    only files that are missing or of another size are sent again, and a calibration that differs. A ``README.md`` that
    is there is left as it is.

    Args:
        path: the run or bundle.
        url: where to.
        private: whether a repository that is made on the Hugging Face Hub is private; by default it is.
        watch: told what is sent.

    Returns:
        The names of the files sent; none where it was all there.

    Raises:
        ArtefactError: no run or bundle at ``path``, or the URL cannot be written to. CorruptError: a file has changed.
        UsageError: something else lies at the URL, or the URL or an option for it cannot be used.
    """
    from ensembler.card import card

    path = path.resolve()
    if private is not None and not url.startswith("hf://"):
        raise UsageError(f"--private and --public are of Hugging Face Hub repositories (hf://USER/NAME), not of {url}")
    manifest = _whole(path)
    seal = (path / SEAL).read_bytes()
    store = open_store(url)
    store.prepare(private is not False)
    is_there = _check(store, seal, (path / MANIFEST).read_bytes())
    small, sizes = [MANIFEST], store.sizes() if is_there else {}
    to_send: dict[str, Path | bytes] = {}  # in this order
    if manifest["kind"] == "run" and (path / CALIBRATION).exists():
        _check_calibration(path, path / CALIBRATION)
        small.append(CALIBRATION)
    for file in small:
        content = (path / file).read_bytes()
        if not is_there or store.read(file) != content:
            to_send[file] = content
    for file in manifest["files"]:
        if sizes.get(file) != (path / file).stat().st_size:
            to_send[file] = path / file
    if not store.has(CARD):
        calibrated = CALIBRATION in (*small, *manifest["files"])
        to_send[CARD] = card(manifest, seal[:64].decode(), url, store.name, calibrated=calibrated).encode()
    if not is_there:
        to_send[SEAL] = seal
    if to_send:
        store.write(to_send, watch)
    return list(to_send)


def check_free(url: str) -> None:
    """Find out before hours of work, not after, that nothing can be pushed to a URL.

    Raises:
        UsageError: something lies there, or the URL cannot be used. ArtefactError: it cannot be reached.
    """
    _check(open_store(url), None, None)


def destination(out: str | None, folder: str) -> tuple[Path | None, str | None]:
    """``--out`` as a path, and the URL to push to when that is finished: of a URL the path is ``FOLDER/NAME``.

    Raises:
        As :func:`check_free`.
    """
    if out is None or not is_url(out):
        return (None if out is None else Path(out)), None
    check_free(out)
    return Path(folder, name_of(out)), out


def _sealed(store: Store) -> tuple[bytes, str]:
    """The seal of what lies there, and the SHA-256 in it.

    Raises:
        ArtefactError: nothing of ours is there. CorruptError: it is not whole.
    """
    seal = store.read(SEAL)
    match = _SEALED.fullmatch((seal or b"").decode("ascii", "replace"))
    if seal is not None and match:
        return seal, match[1]
    if seal is None and store.read(MANIFEST) is None:
        hidden = "; if it is private, set HF_TOKEN" if isinstance(store, HubRepository) else ""
        raise ArtefactError(f"no run or bundle at {store.url}{hidden}")
    raise CorruptError(
        f"what lies at {store.url} is incomplete: wait until its push has ended, or push it again if it was broken off"
    )


def _manifest(store: Store, seal: bytes) -> tuple[bytes, dict[str, Any]]:
    """The manifest at a URL, as bytes and read.

    Raises:
        CorruptError: it is not the one that was sealed. ArtefactError: it names what no artefact of ours holds.
    """
    content = store.read(MANIFEST)
    if content is None or hashlib.sha256(content).hexdigest().encode() != seal[:64]:
        raise CorruptError(changed(f"{store.url}/{MANIFEST}", missing=content is None))
    return content, _read(content, store.url)


def _read(content: bytes, where: str | Path) -> dict[str, Any]:
    """A manifest, if it is of a run or bundle and names only files of its own folder."""
    try:
        manifest = json.loads(content)
        kind, files = manifest["kind"], dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"the {MANIFEST} at {where} is not of a run or bundle") from error
    if kind not in _KINDS:
        raise ArtefactError(f"what lies at {where} is a {kind}, not a run or bundle")
    for name, expected in files.items():
        if not all(map(NAME.fullmatch, name.split("/"))) or name in (MANIFEST, SEAL, CARD):
            raise ArtefactError(
                f"the {MANIFEST} at {where} names {name!r}, which is no file of a {kind}: do not use it"
            )
        if not isinstance(expected, str):
            raise ArtefactError(f"the {MANIFEST} at {where} has no hash of {name}: do not use it")
    return dict(manifest)


def _whole(path: Path) -> dict[str, Any]:
    """The manifest of the run or bundle in a folder, of whatever format, after every file has been verified."""
    try:
        said = _read((path / MANIFEST).read_bytes(), path)
    except FileNotFoundError as error:
        raise ArtefactError(f"no run or bundle at {path}: it has no {MANIFEST}") from error
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror or error}") from error
    return artefact.read(path, said["kind"], (said.get("format"),))  # type: ignore[arg-type]


def _check(store: Store, seal: bytes | None, manifest: bytes | None) -> bool:
    """Whether an artefact lies there sealed; if not, the place is free for it, or its push was broken off.

    Args:
        store: where.
        seal, manifest: the artefact's; ``None`` of one that is not made yet.

    Raises:
        UsageError: something else lies there.
    """
    other = "choose another URL, or remove what is there first"
    sealed, begun = store.read(SEAL), store.read(MANIFEST)
    if sealed and _SEALED.fullmatch(sealed.decode("ascii", "replace")):
        if sealed == seal:
            return True
        raise UsageError(f"another run or bundle lies at {store.url}, and nothing is ever overwritten: {other}")
    if begun is not None:
        if manifest is not None and manifest.startswith(begun):  # the first write may itself have been cut short
            return False
        raise UsageError(f"a push of another run or bundle to {store.url} is under way or was broken off: {other}")
    if rest := [name for name in store.names() if not name.startswith(".") and name not in (CARD, SEAL, "LICENSE")]:
        raise UsageError(f"{store.url} is not empty, and holds no run or bundle ({min(rest)}): {other}")
    return False


def _fetch(store: Store, seal: bytes, calibration: bytes | None, path: Path, watch: Watcher) -> None:
    """Make ``path`` the artefact that was sealed.

    Raises:
        CorruptError: a file is missing or another. ArtefactError: it cannot be read, or not be written here.
        UsageError: ``path`` exists.
    """
    content, manifest = _manifest(store, seal)
    done, total, label = 0, 0, f"fetching {store.url}"
    with suppress(ArtefactError):  # of a server that lists nothing
        sizes = store.sizes()
        total = sum(sizes.get(name, 0) for name in manifest["files"])
    held = [each for each in default_folder().glob(f"{seal[:64].decode()}*/[!.]*") if each.is_dir()]
    with artefact.appear(path) as folder:
        for name, expected in manifest["files"].items():
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if held and _copy(held[0] / name, place, expected):
                done += place.stat().st_size
                continue
            digest = hashlib.sha256()
            watch(label, done, total)
            with place.open("wb") as file:
                for chunk in store.chunks(name):
                    digest.update(chunk)
                    file.write(chunk)
                    done += len(chunk)
                    watch(label, done, total)
            if digest.hexdigest() != expected:
                raise CorruptError(changed(f"{store.url}/{name}"))
        (folder / MANIFEST).write_bytes(content)
        (folder / SEAL).write_bytes(seal)
        if calibration is not None and manifest["kind"] == "run":
            (folder / CALIBRATION).write_bytes(calibration)
            _check_calibration(folder, f"{store.url}/{CALIBRATION}")


def _copy(held: Path, place: Path, expected: str) -> bool:
    """Take a file from the cache, if it is there as it should be."""
    try:
        shutil.copyfile(held, place)
        return artefact.sha256(place) == expected
    except OSError:
        return False


def _check_calibration(run: Path, where: str | Path) -> None:
    """Refuse a calibration that is not as it was written. Whose it is, is asked where it is used."""
    from ensembler import calibration

    try:
        calibration.load(run)
    except CorruptError as error:
        raise CorruptError(f"{where} has changed since it was written: remove it there, or calibrate again") from error
    except ArtefactError:
        pass


def _holds(folder: Path, seal: bytes, calibration: bytes | None) -> bool:
    """Whether a folder of the cache is what was once fetched into it."""
    try:
        manifest = _whole(folder)
        beside = manifest["kind"] == "run" and (folder / CALIBRATION).exists()
        own = (folder / CALIBRATION).read_bytes() if beside else None
        return (folder / SEAL).read_bytes() == seal and own == (calibration if manifest["kind"] == "run" else None)
    except (ArtefactError, OSError):
        return False


def _discard(folder: Path) -> None:
    """Remove a folder in one step, so that nobody finds half of it."""
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as away, suppress(OSError):
        folder.rename(Path(away) / folder.name)
