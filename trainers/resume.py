"""What an unfinished run has reached, so that a kill costs no more than the last minute.

Beside the run that is being made lies a folder ``NAME.unfinished``. In it are ``spec.json``, what decides the run
(:class:`ensembler.trainers.spec.Spec`), which ``--resume NAME`` reads; and by name

- for each part of the training one checkpoint, an artefact that a later one replaces: the moving vertices, the
  optimiser's state, the network's buffers, the snapshots taken, and the step;
- for each finished job (a member of a deep ensemble) its result, in place of the checkpoints of its parts.

A method is a deterministic function of its seed. So resuming is running it again: jobs and parts that are there are
read instead of done, the part that was interrupted goes on from its checkpoint, and whatever is missing or damaged is
done again. On a CPU, with the same number of threads, the result is the uninterrupted run's, bit for bit. Of processes
that train together the first one keeps the checkpoints and sends the others what it read: any number can go on.

The folder is removed when the run is saved, and at no other time.
"""

from __future__ import annotations

import re
import secrets
import shutil
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ensembler import artefact
from ensembler.errors import ArtefactError, UsageError
from ensembler.jobs import Job
from ensembler.trainers.loop import Snapshot, TrainState
from ensembler.trainers.spec import SPEC, Spec, unfinished

__all__ = ["JobResult", "Store", "Unfinished"]

FORMAT = 1
_FILE = "state.pt"


@dataclass(frozen=True, eq=False)
class JobResult:
    """A finished job: what it made, tensors and JSON values, and its ledger's record."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    ledger: dict[str, Any]


@dataclass(eq=False)
class Unfinished:
    """The folder of one unfinished run.

    Args:
        path: where the run is to be.
        spec: what decides it.
        every: seconds between two checkpoints of a part; its end is always kept.
        ours: whether this process keeps them; of those that train together, the first.

    Raises:
        UsageError: another process is working on the same run, or the folder is of another run.
    """

    path: Path
    spec: Spec
    every: float = 60.0
    ours: bool = True
    folder: Path = field(init=False)
    written: float = field(default_factory=time.monotonic, init=False)
    _lock: IO[bytes] | None = field(default=None, init=False)
    _begun: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.folder = unfinished(self.path)
        self._begun = self.ours and self.folder.is_dir()
        if self._begun:
            self._own(self.folder)
            if Spec.read(self.folder).fingerprint != self.spec.fingerprint:
                self.close()
                raise UsageError(
                    f"{self.folder} was begun with other options or on other data: resume it with those, or remove it"
                )
            for partial in self.folder.rglob(".partial-*") if self._lock else ():
                shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed while it wrote

    @property
    def store(self) -> Store:
        """What keeps the run's jobs and parts."""
        return Store(self)

    def begin(self) -> None:
        """Make the folder where it is missing, whole; where another process has made it, one beside it."""
        if self._begun and (self.folder / SPEC).is_file():
            return
        name = self.path.name
        partial = self.folder.with_name(f".partial-{name}-{secrets.token_hex(4)}")
        try:
            partial.mkdir(parents=True)
            self._own(partial)
            self.spec.write(partial)
            for number in count(2):
                try:
                    partial.rename(self.folder)
                    break
                except OSError:
                    if not self.folder.exists():
                        raise
                    if not (self.folder / SPEC).is_file():  # the rest of one that was removed while we wrote to it
                        shutil.rmtree(self.folder, ignore_errors=True)
                    if self.folder.exists():
                        self.folder = unfinished(self.path.with_name(f"{name}-{number}"))
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

    def close(self) -> None:
        """Let another process go on with the run."""
        if self._lock:
            self._lock.close()

    def remove(self) -> None:
        """The run is saved: nothing of this is needed any more."""
        self.close()
        if self._begun:  # or else it is another process's
            shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True, eq=False)
class Store:
    """Keeps the results of jobs and the states of parts, by name.

    Args:
        unfinished: the run that they are of.
        job: the job that this store's parts are of; empty for the run itself.
    """

    unfinished: Unfinished
    job: str = ""

    def child(self, job: str) -> Store:
        """The store of a job's own parts, which go when its result is saved."""
        return Store(self.unfinished, f"{self.job}{_slug(job)}/")

    @property
    def due(self) -> bool:
        """Whether it is time for another checkpoint."""
        return time.monotonic() - self.unfinished.written >= self.unfinished.every

    def load(self, job: Job) -> JobResult | None:
        """The result of a finished job, if it is there and whole."""
        content = self._read(self._folder / f"{_slug(job.name)}.done")
        return None if content is None else JobResult(**content)

    def save(self, job: Job, result: JobResult) -> None:
        """Write the result of a job, and remove the checkpoints of its parts.

        Raises:
            ArtefactError: it cannot be written.
        """
        self._write(f"{_slug(job.name)}.done", vars(result))
        shutil.rmtree(self._folder / _slug(job.name), ignore_errors=True)

    def load_state(self, part: str) -> tuple[TrainState, dict[str, Any]] | None:
        """A part's newest whole checkpoint, and the ledger's record that was saved with it."""
        for path in reversed(self._states(part)):
            content = self._read(path)
            if content is not None:
                snapshots = [Snapshot(**snapshot) for snapshot in content["state"]["snapshots"]]
                return TrainState(**content["state"] | {"snapshots": snapshots}), content["ledger"]
        return None

    def save_state(self, part: str, state: TrainState, ledger: Mapping[str, Any]) -> None:
        """Write a part's checkpoint, and remove the one before it.

        Raises:
            ArtefactError: it cannot be written.
        """
        older = self._states(part)
        content = vars(state) | {"snapshots": [vars(snapshot) for snapshot in state.snapshots]}
        self._write(f"{_slug(part)}.{state.iteration:09}", {"state": content, "ledger": ledger})
        for path in older:
            shutil.rmtree(path, ignore_errors=True)

    @property
    def _folder(self) -> Path:
        return self.unfinished.folder / self.job

    def _states(self, part: str) -> list[Path]:
        return sorted(self._folder.glob(f"{_slug(part)}.[0-9]*")) if self._folder.is_dir() else []

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        self.unfinished.begin()
        path = self._folder / name
        shutil.rmtree(path, ignore_errors=True)  # a damaged one
        try:
            with artefact.write(path, {"kind": "checkpoint", "format": FORMAT}) as folder:
                torch.save(dict(content), folder / _FILE)
        except RuntimeError as error:  # PyTorch's word for a full disk
            raise ArtefactError(f"cannot write {path}: {str(error).splitlines()[0]}") from error
        self.unfinished.written = time.monotonic()

    def _read(self, path: Path) -> dict[str, Any] | None:
        if not path.is_dir():
            return None
        try:
            artefact.read(path, "checkpoint", (FORMAT,))
            content: dict[str, Any] = torch.load(path / _FILE, map_location="cpu", weights_only=True)
        except (ArtefactError, OSError):
            shutil.rmtree(path, ignore_errors=True)  # damaged, or half removed: done again
            return None
        return content


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower())
