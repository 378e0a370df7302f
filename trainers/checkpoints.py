"""What an unfinished run has reached, so that a kill costs no more than the last minute.

Beside the run that is being made lies a folder ``NAME.unfinished``. In it are the command's options
(``options.json``, which ``--resume NAME`` gives it again), and for each part of the training one checkpoint, an
artefact (:mod:`ensembler.artefact`) that a later one replaces: the moving vertices, the optimiser's state, the
network's buffers, the snapshots taken, the state of what points are drawn from, and the step.

A piece of the training that is independent of the others (a member of a deep ensemble: :mod:`.pieces`) is kept whole,
as ``piece-NUMBER``, as soon as it is finished, in place of the checkpoints of its parts.

A method is a deterministic function of its seeds. So resuming is running it again: parts that are there are read
instead of trained, the one that was broken off goes on from its checkpoint, and whatever is missing or damaged is
trained anew. On a CPU, with the same number of threads, the result is the uninterrupted run's, bit for bit. Of
processes that train together the first one keeps the checkpoints and tells the others what it read: any number of
processes can go on.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from ensembler import artefact
from ensembler.errors import ArtefactError, CorruptError, UsageError
from ensembler.run import Part, load_tensors, save_tensors
from ensembler.trainers.books import Books
from ensembler.trainers.loop import Snapshot, State

__all__ = ["OPTIONS", "Checkpoints", "Done", "Saved", "numbers", "unfinished"]

FORMAT = 2
_FORMATS = (1, 2)  # 1 also held random generators' states; dropout's masks are drawn anew at every step since
OPTIONS = "options.json"
_NUMBERS = 10_000  # for a piece's parts


def unfinished(path: Path) -> Path:
    """Where the checkpoints of the run that is to be at ``path`` lie."""
    return path.with_name(f"{path.name}.unfinished")


@dataclass(frozen=True)
class Saved:
    """A part's training so far: the loop's state and, as JSON values, that of what lies around it."""

    state: State
    facts: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Done:
    """A finished piece of a training.

    Attributes:
        tensors, facts: what it made: tensors, and JSON values.
        buffers: the network's at its end.
        books: what it cost and did.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    buffers: dict[str, Tensor]
    books: Books


def numbers(place: int) -> range:
    """Of the parts of the ``place``-th piece: its own, so that a piece that is skipped shifts no other's."""
    return range(_NUMBERS * (place + 1), _NUMBERS * (place + 2))


@dataclass(eq=False)
class Checkpoints:
    """The checkpoints of one unfinished run.

    Args:
        folder: made when the first is written.
        every: seconds between two checkpoints of a part; its end is always kept.
        options: of the command, by its name; written beside the checkpoints.
        identity: what must be the same for a checkpoint to be of use: the training images, the network, the batches.
        ours: whether this process keeps them; of those that train together, the first.

    Raises:
        UsageError: another process is working on the same run.
    """

    folder: Path
    every: float = 60.0
    options: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    ours: bool = True
    _last: float = field(default_factory=time.monotonic, init=False)
    _lock: IO[bytes] | None = field(default=None, init=False)
    _begun: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._begun = self.ours and self.folder.is_dir()
        if self._begun:
            self._own(self.folder)
            for partial in self.folder.glob(".partial-*") if self._lock else ():
                shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed while it wrote

    def _begin(self) -> None:
        """Make the folder, with the options in it or not at all; where another process has made it, one beside it."""
        name = self.folder.name.removesuffix(".unfinished")
        partial = self.folder.with_name(f".partial-{name}-{secrets.token_hex(4)}")
        try:
            partial.mkdir(parents=True)
            self._own(partial)
            with (partial / OPTIONS).open("w", encoding="utf-8") as file:
                json.dump(dict(self.options), file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            for number in count(2):
                try:
                    partial.rename(self.folder)
                    break
                except OSError:
                    if not self.folder.exists():
                        raise
                    if not (self.folder / OPTIONS).is_file():  # the rest of one that is removed while we write to it
                        shutil.rmtree(self.folder, ignore_errors=True)
                    if self.folder.exists():
                        self.folder = self.folder.with_name(f"{name}-{number}.unfinished")
        except OSError as error:
            raise ArtefactError(f"cannot write {self.folder}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # it has another name, if all went well
        self._begun = True

    def _own(self, folder: Path) -> None:
        """Hold a lock for as long as this process lives: two that train one run would write over each other."""
        try:
            import fcntl
        except ImportError:  # not on Windows
            return
        self._lock = (folder / ".lock").open("wb")
        weakref.finalize(self, self._lock.close)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise UsageError(f"another process is working on {self.folder}: let it finish, or stop it") from error

    def due(self) -> bool:
        """Whether ``every`` seconds have passed since the last one was written."""
        return time.monotonic() - self._last >= self.every

    def save(self, number: int, part: str, saved: Saved) -> None:
        """Write the checkpoint of the ``number``-th part, and remove the one before it.

        Raises:
            ArtefactError: it cannot be written.
        """
        state = saved.state
        optimiser, numbers = _split(state.optimiser)
        tensors = {
            "vertices": state.vertices,
            "totals": state.totals,
            **{f"buffer.{name}": buffer for name, buffer in state.buffers.items()},
            **{f"optimiser.{name}": tensor for name, tensor in optimiser.items()},
        }
        for i, snapshot in enumerate(state.snapshots):
            tensors[f"snapshot.{i}.vertices"] = snapshot.vertices
            tensors |= {f"snapshot.{i}.buffer.{name}": buffer for name, buffer in snapshot.buffers.items()}
        if not (self._begun and (self.folder / OPTIONS).is_file()):  # never was, or was removed meanwhile
            self._begin()
        older = self._find(number)
        content = {
            "kind": "checkpoint",
            "format": FORMAT,
            "part": part,
            "identity": dict(self.identity),
            "iteration": state.iteration,
            "examples": state.examples,
            "snapshots": len(state.snapshots),
            "optimiser": numbers,
            "scaler": state.scaler,
            "facts": saved.facts,
        }
        with artefact.write(self.folder / f"{number:04}-{state.iteration:09}", content) as folder:
            save_tensors(tensors, folder / "state.safetensors")
        for path in older:
            shutil.rmtree(path, ignore_errors=True)
        self._last = time.monotonic()

    def load(self, number: int, part: str) -> Saved | None:
        """The newest whole checkpoint of the ``number``-th part, if there is one.

        Raises:
            UsageError: it is of another run.
        """
        for path in reversed(self._find(number)):
            try:
                content = artefact.read(path, "checkpoint", _FORMATS)
                tensors = load_tensors(path / "state.safetensors")
            except ArtefactError as error:
                if (path / artefact.MANIFEST).is_file() and not isinstance(error, CorruptError):
                    raise  # of another version
                shutil.rmtree(path, ignore_errors=True)  # damaged, or half removed: trained anew
                continue
            self._check(content, part)
            return Saved(_state(content, tensors), content["facts"])
        return None

    def keep(self, place: int, part: str, argument: Mapping[str, Any], done: Done) -> None:
        """Write the ``place``-th piece, which ``argument`` describes, and remove the checkpoints of its parts.

        Raises:
            ArtefactError: it cannot be written.
        """
        if not (self._begun and (self.folder / OPTIONS).is_file()):  # never was, or was removed meanwhile
            self._begin()
        path, books = self._piece(place), done.books
        shutil.rmtree(path, ignore_errors=True)  # a damaged one
        content = {
            "kind": "piece",
            "format": FORMAT,
            "part": part,
            "identity": dict(self.identity),
            "argument": dict(argument),
            "facts": done.facts,
            "parts": {name: each.model_dump() for name, each in books.parts.items()},
            "history": books.history,
            "seconds": books.seconds,
        }
        tensors = done.tensors | {f"network.{name}": buffer for name, buffer in done.buffers.items()}
        with artefact.write(path, content) as folder:
            save_tensors(tensors, folder / "piece.safetensors")
        for checkpoint in self.folder.glob("[0-9]*-*"):
            if int(checkpoint.name.partition("-")[0]) in numbers(place):
                shutil.rmtree(checkpoint, ignore_errors=True)
        self._last = time.monotonic()

    def kept(self, place: int, part: str, argument: Mapping[str, Any]) -> Done | None:
        """The ``place``-th piece, if it is there and whole.

        Raises:
            UsageError: it is of another run.
        """
        try:
            content = artefact.read(self._piece(place), "piece", (FORMAT,))
            tensors = load_tensors(self._piece(place) / "piece.safetensors")
        except ArtefactError:
            return None  # made anew
        self._check(content, part, argument)
        buffers = _named(tensors, "network.")
        parts = {name: Part.model_validate(each) for name, each in content["parts"].items()}
        return Done(
            {name: tensor for name, tensor in tensors.items() if not name.startswith("network.")},
            content["facts"],
            buffers,
            Books(parts, content["history"], content["seconds"]),
        )

    def close(self) -> None:
        """Let another process go on with the run."""
        if self._lock:
            self._lock.close()

    def remove(self) -> None:
        """The run is finished: nothing of this is needed any more."""
        self.close()
        if self._begun:  # or else it is another process's
            shutil.rmtree(self.folder, ignore_errors=True)

    def _check(self, content: Mapping[str, Any], part: str, argument: Mapping[str, Any] | None = None) -> None:
        if (content["part"], content["identity"], content.get("argument")) != (part, dict(self.identity), argument):
            raise UsageError(
                f"{self.folder} is of a run with other options or other images: give the ones it was begun with, "
                "or remove it"
            )

    def _piece(self, place: int) -> Path:
        return self.folder / f"piece-{place:04}"

    def _find(self, number: int) -> list[Path]:
        return sorted(self.folder.glob(f"{number:04}-*")) if self.folder.is_dir() else []


def _state(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> State:
    snapshots = [
        Snapshot(tensors[f"snapshot.{i}.vertices"], _named(tensors, f"snapshot.{i}.buffer."))
        for i in range(content["snapshots"])
    ]
    optimiser: dict[int, dict[str, Any]] = {}
    for name, value in (content["optimiser"] | _named(tensors, "optimiser.")).items():
        index, _, key = name.partition(".")
        optimiser.setdefault(int(index), {})[key] = value
    return State(
        iteration=content["iteration"],
        vertices=tensors["vertices"],
        buffers=_named(tensors, "buffer."),
        optimiser=optimiser,
        snapshots=snapshots,
        totals=tensors["totals"],
        examples=content["examples"],
        scaler=content["scaler"],
    )


def _split(optimiser: Mapping[int, Mapping[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as tensors and as JSON values, by ``INDEX.NAME``."""
    flat = {f"{index}.{name}": value for index, entries in optimiser.items() for name, value in entries.items()}
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in flat.items() if name not in tensors}


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
