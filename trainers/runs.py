"""Runs made as jobs under names: each is saved as soon as it is finished, and resumed from its own checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ensembler import jobs
from ensembler.engine import Engine, Local
from ensembler.errors import EnsemblerError, UsageError
from ensembler.jobs import Job
from ensembler.run import Run
from ensembler.trainers.distributed import ALONE, Group
from ensembler.trainers.events import Message, OnEvent, named
from ensembler.trainers.resume import UnfinishedRun
from ensembler.trainers.spec import Spec
from ensembler.trainers.training import Training

__all__ = ["Runs"]


@dataclass(eq=False)
class Runs:
    """Runs of the same data, one a name; as a store of jobs, a job is done where its run lies.

    Args:
        trainings: what each is made of.
        paths: where each is to be.
        keep: saves a run at a path, and returns where it lies.
        urls: where each is to be pushed to, if anywhere.
        every: seconds between two checkpoints.
        group: the processes that train together.
        named: whether events and errors name the run where it is the only one, too.

    Attributes:
        found: those that already existed.
        saved: those that were made.
    """

    trainings: Mapping[str, Training]
    paths: Mapping[str, Path]
    keep: Callable[[Run, Path], Path]
    urls: Mapping[str, str] = field(default_factory=dict)
    every: float = 60.0
    group: Group = ALONE
    named: bool = False
    found: dict[str, Path] = field(default_factory=dict)
    saved: dict[str, Path] = field(default_factory=dict)
    unfinished: dict[str, UnfinishedRun] = field(default_factory=dict)
    on_event: OnEvent = field(init=False)

    @property
    def several(self) -> bool:
        """Whether there are more than one."""
        return len(self.paths) > 1

    @property
    def kept(self) -> list[Path]:
        """The folders of those that are begun and not finished."""
        return [one.folder for one in self.unfinished.values() if one.folder.is_dir()]

    def make(self, engine: Engine, on_event: OnEvent) -> None:
        """Make those that are missing, and save each as soon as it is finished.

        Raises:
            UsageError: another run lies where one is to be. EnsemblerError: of a training; the others are stopped.
        """
        self.on_event, first = on_event, next(iter(self.trainings.values()))
        outer, inner = (engine, Local()) if self.several or not first.method.has_jobs else (Local(), engine)
        self.unfinished = {
            name: UnfinishedRun(path, self._spec(name), self.every, writer=self.group.first)
            for name, path in self.paths.items()
            if not path.exists()
        }
        for note in first.dataset.notes if self.unfinished else ():
            on_event(Message(note))
        here = (dict(self.unfinished), inner, self.group) if outer.here else None
        shared = self.trainings, self.several or self.named, here
        todo = [Job(name, _make, {"name": name}) for name in self.paths]
        try:
            with closing(jobs.run(todo, shared, outer, self, on_event)) as results:
                for _ in results:
                    pass
        finally:
            for one in self.unfinished.values():
                one.close()

    def load(self, job: Job) -> Path | None:
        """Where a run lies, if it already exists.

        Raises:
            UsageError: another run does.
        """
        path = self.paths[job.name]
        if job.name in self.unfinished:
            return None
        if Run.load(path).manifest.fingerprint != self._spec(job.name).fingerprint:
            raise UsageError(
                f"{path} already exists, made with other options or of other data: choose another --out, or remove it"
            )
        self.on_event(Message(f"{path} already exists, skipped"))
        self.found[job.name] = path
        return path

    def save(self, job: Job, result: Run) -> None:
        """Save a run, and remove what was kept while it was made."""
        self.saved[job.name] = self.group.from_first(partial(self.keep, result, self.paths[job.name]))
        self.unfinished.pop(job.name).remove()

    def _spec(self, name: str) -> Spec:
        return self.trainings[name].spec.model_copy(update={"url": self.urls.get(name)})


def _make(shared: tuple[Mapping[str, Training], bool, Any], emit: OnEvent, name: str) -> Run:
    """A job: one run, with its store, engine and group where it is made in the command's own process."""
    trainings, is_named, here = shared
    unfinished, engine, group = here or (dict[str, Any](), None, ALONE)
    store = unfinished[name].store if name in unfinished else None
    if not is_named:
        return trainings[name].make(emit, store, engine, group)
    try:
        return trainings[name].make(named(f"{name}, ", emit), store, engine, group)
    except EnsemblerError as error:
        raise type(error)(f"{name}: {error}") from error
