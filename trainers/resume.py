"""Checkpoints of an unfinished run, so that an interruption loses a minute of work at most.

A run in training has a folder ``NAME.unfinished`` beside its path. It contains ``spec.json``
(:class:`ensembler.trainers.spec.Spec`), everything that determines the run, which ``--resume NAME`` reads; and

- for each part of the training, its latest checkpoint: the trainable vertices, the optimiser's state, the network's
  buffers, the snapshots and the step;
- for each finished job (such as a member of a deep ensemble), its result instead of the checkpoints of its parts.

A method is a deterministic function of its seed, so resuming runs it again: finished jobs and parts are read instead of
trained, the interrupted part resumes from its checkpoint, and whatever is missing or damaged is trained again. On a CPU
with the same number of threads, the result is the same as without the interruption, bit for bit. Of processes that
train together, the first reads and writes checkpoints and sends their content to the others, so that any number of
processes can resume.

The folder is removed when the run is saved, and never otherwise.
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

from ensembler.errors import ArtefactError, CorruptError, UsageError, first_line
from ensembler.jobs import Job
from ensembler.storage import artefact
from ensembler.trainers.plan import Best, Snapshot, TrainState
from ensembler.trainers.spec import SPEC, Spec, unfinished

__all__ = ["JobResult", "Store", "UnfinishedRun"]

FORMAT = 1
_FILE = "state.pt"


@dataclass(frozen=True, eq=False)
class JobResult:
    """The result of a job: tensors by name, or mappings of them, JSON values, and its ledger's record."""

    tensors: dict[str, Any]
    facts: dict[str, Any]
    ledger: dict[str, Any]


@dataclass(eq=False)
class UnfinishedRun:
    """The folder of an unfinished run.

    Args:
        path: of the run, once it is finished.
        spec: what determines the run.
        every: seconds between two checkpoints of a part; its end is always saved.
        writer: whether this process writes checkpoints; of those that train together, only the first does.

    Raises:
        UsageError: another process is working on the same run, or the folder belongs to another run.
    """

    path: Path
    spec: Spec
    every: float = 60.0
    writer: bool = True
    folder: Path = field(init=False)
    written: float = field(default_factory=time.monotonic, init=False)
    _lock: IO[bytes] | None = field(default=None, init=False)
    _exists: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.folder = unfinished(self.path)
        self._exists = self.writer and self.folder.is_dir()
        if self._exists:
            self._acquire_lock(self.folder)
            if Spec.read(self.folder).fingerprint != self.spec.fingerprint:
                self.close()
                raise UsageError(
                    f"{self.folder} was started with other options, data or code: resume it with those, or remove it"
                )
            for partial in self.folder.rglob(".partial-*") if self._lock else ():
                shutil.rmtree(partial, ignore_errors=True)  # from a process that was killed while writing

    @property
    def store(self) -> Store:
        """The store of the run's jobs and parts."""
        return Store(self)

    def begin(self) -> None:
        """Create the folder atomically if it is missing; under another name if another process has created it."""
        if self._exists and (self.folder / SPEC).is_file():
            return
        name = self.path.name
        partial = self.folder.with_name(f".partial-{name}-{secrets.token_hex(4)}")
        with artefact.writing_to(self.folder), artefact.ensure_folder(partial.parent):
            try:
                partial.mkdir()
                self._acquire_lock(partial)
                self.spec.write(partial)
                for number in count(2):
                    try:
                        partial.rename(self.folder)
                        break
                    except OSError:
                        if not self.folder.exists():
                            raise
                        if not (self.folder / SPEC).is_file():  # the rest of a folder that was being removed
                            shutil.rmtree(self.folder, ignore_errors=True)
                        if self.folder.exists():
                            self.folder = unfinished(self.path.with_name(f"{name}-{number}"))
            finally:
                shutil.rmtree(partial, ignore_errors=True)  # it has been renamed, unless there was an error
        self._exists = True

    def _acquire_lock(self, folder: Path) -> None:
        self._lock = artefact.lock(folder / ".lock", folder)
        if self._lock:
            weakref.finalize(self, self._lock.close)

    def close(self) -> None:
        """Release the lock, so that another process can resume the run."""
        if self._lock:
            self._lock.close()

    def remove(self) -> None:
        """Remove the folder; call it once the run is saved."""
        self.close()
        if self._exists:  # otherwise it is another process's
            shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True, eq=False)
class Store:
    """Stores the results of jobs and the states of parts, by name.

    Args:
        unfinished: their run.
        job: the job whose parts are stored; empty for the run's own.
    """

    unfinished: UnfinishedRun
    job: str = ""

    def child(self, job: str) -> Store:
        """Return the store of a job's parts, which are removed when its result is saved."""
        return Store(self.unfinished, f"{self.job}{_slug(job)}/")

    @property
    def due(self) -> bool:
        """Whether the next checkpoint is due."""
        return time.monotonic() - self.unfinished.written >= self.unfinished.every

    def load(self, job: Job) -> JobResult | None:
        """Return the result of a finished job, or ``None`` if it is missing or damaged.

        Raises:
            ArtefactError: it cannot be read, or is of another version's format. It stays where it is.
        """
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
        """Return a part's newest intact checkpoint and the ledger's record saved with it, or ``None``.

        Raises:
            ArtefactError: as for :meth:`load`.
        """
        for path in reversed(self._states(part)):
            content = self._read(path)
            if content is not None:
                state = content["state"]
                snapshots = [Snapshot(**snapshot) for snapshot in state["snapshots"]]
                best = state["best"] and Best(**state["best"])
                return TrainState(**state | {"snapshots": snapshots, "best": best}), content["ledger"]
        return None

    def save_state(self, part: str, state: TrainState, ledger: Mapping[str, Any]) -> None:
        """Write a part's checkpoint, and remove the previous one.

        Raises:
            ArtefactError: it cannot be written.
        """
        older = self._states(part)
        content = vars(state) | {"snapshots": [vars(snapshot) for snapshot in state.snapshots]}
        content["best"] = state.best and vars(state.best)
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
        shutil.rmtree(path, ignore_errors=True)  # if it exists, it is damaged
        try:
            with (
                artefact.write(path, {"kind": "checkpoint", "format": FORMAT}) as folder,
                (folder / _FILE).open("wb") as file,
            ):
                torch.save(dict(content), file)
        except RuntimeError as error:  # PyTorch raises it while it handles the system's error, such as a full disk
            system = error.__context__
            reason = system.strerror if isinstance(system, OSError) else first_line(error)
            raise ArtefactError(f"cannot write {path}: {reason}: make room, or choose another place") from error
        self.unfinished.written = time.monotonic()

    def _read(self, path: Path) -> dict[str, Any] | None:
        if not (path / artefact.MANIFEST).is_file():  # never written, or half removed
            return None
        try:
            artefact.read(path, "checkpoint", (FORMAT,))
            content: dict[str, Any] = torch.load(path / _FILE, map_location="cpu", weights_only=True)
        except CorruptError:
            shutil.rmtree(path, ignore_errors=True)  # done again
            return None
        except OSError as error:
            raise ArtefactError(f"cannot read {path}: {error.strerror or error}") from error
        return content


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower())
