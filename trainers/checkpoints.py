"""What an unfinished run has reached, so that a kill costs no more than the last minute.

Beside the run that is being made lies a folder ``NAME.unfinished``. In it are the command's options
(``options.json``, which ``--resume NAME`` gives it again), and for each part of the training one checkpoint, an
artefact (:mod:`ensembler.artefact`) that a later one replaces: the moving vertices, the optimiser's state, the
network's buffers, the snapshots taken, the state of what points are drawn from, and the step.

A method is a deterministic function of its seeds. So resuming is running it again: parts that are there are read
instead of trained, the one that was broken off goes on from its checkpoint, and whatever is missing or damaged is
trained anew. On a CPU, with the same number of threads, the result is the uninterrupted run's, bit for bit. Of
processes that train together the first one keeps the checkpoints and tells the others what it read: any number of
processes can go on.
"""

from __future__ import annotations

import json
import shutil
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import IO, Any

from safetensors.torch import load_file
from torch import Tensor

from ensembler import artefact
from ensembler.artefact import replace_file
from ensembler.errors import ArtefactError, CorruptError, UsageError
from ensembler.run import save_tensors
from ensembler.trainers.loop import Snapshot, State

__all__ = ["OPTIONS", "Checkpoints", "Saved", "unfinished"]

FORMAT = 2
_FORMATS = (1, 2)  # 1 also held random generators' states; dropout's masks are drawn anew at every step since
OPTIONS = "options.json"


def unfinished(path: Path) -> Path:
    """Where the checkpoints of the run that is to be at ``path`` lie."""
    return path.with_name(f"{path.name}.unfinished")


@dataclass(frozen=True)
class Saved:
    """A part's training so far: the loop's state and, as JSON values, that of what lies around it."""

    state: State
    facts: dict[str, Any]


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
            self._own()

    def _begin(self) -> None:
        """Make the folder; where another process has made it meanwhile, one beside it."""
        name = self.folder.name.removesuffix(".unfinished")
        for number in count(2):
            try:
                self.folder.mkdir(parents=True)
                break
            except FileExistsError:
                self.folder = self.folder.with_name(f"{name}-{number}.unfinished")
            except OSError as error:
                raise ArtefactError(f"cannot write {self.folder}: {error.strerror or error}") from error
        self._begun = True
        self._own()
        replace_file(self.folder / OPTIONS, json.dumps(dict(self.options), indent=2).encode())

    def _own(self) -> None:
        """Hold a lock for as long as this process lives: two that train one run would write over each other."""
        try:
            import fcntl
        except ImportError:  # not on Windows
            return
        self._lock = (self.folder / ".lock").open("wb")
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
        if not self._begun:
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
                tensors = load_file(path / "state.safetensors")
            except CorruptError:
                continue  # trained anew
            if content["part"] != part or content["identity"] != dict(self.identity):
                raise UsageError(
                    f"{self.folder} is of a run with other options or other images: give the ones it was begun with, "
                    "or remove it"
                )
            return Saved(_state(content, tensors), content["facts"])
        return None

    def close(self) -> None:
        """Let another process go on with the run."""
        if self._lock:
            self._lock.close()

    def remove(self) -> None:
        """The run is finished: nothing of this is needed any more."""
        self.close()
        if self._begun:  # or else it is another process's
            shutil.rmtree(self.folder, ignore_errors=True)

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
