"""Independent work: jobs under names, done by an engine, kept in a store.

The members of a deep ensemble, the simplexes of ESPRO, the seeds of a comparison and the cells of a shift table are
jobs of one kind. A job depends on its arguments and on what all jobs share, and on nothing else: so it does not matter
where it runs, nor whether it had to be run twice.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from ensembler.engine import Engine

__all__ = ["Job", "Store", "run"]

R = TypeVar("R")


@dataclass(frozen=True)
class Job:
    """A function and its arguments, under a name that no other job of the same store has.

    Attributes:
        name: e.g. ``"solution 2"``.
        function: called as ``function(shared, emit, **arguments)``, of a module, so that another process finds it.
        arguments: JSON values.
    """

    name: str
    function: Callable[..., Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)


class Store(Protocol[R]):
    """Keeps the results of finished jobs."""

    def load(self, job: Job) -> R | None:
        """The result of a job, if it is kept and whole."""
        ...

    def save(self, job: Job, result: R) -> None:
        """Keep the result of a job."""
        ...


def run(
    jobs: Sequence[Job],
    shared: Any,
    engine: Engine,
    store: Store[R] | None = None,
    on_event: Callable[..., None] = lambda *event: None,
) -> Generator[tuple[Job, R], None, None]:
    """Each job with its result: first those that the store keeps, then the others, saved as soon as they are finished.

    Args:
        jobs: independent of one another.
        shared: what all jobs have in common; sent to each machine once.
        engine: what does them.
        store: what keeps them.
        on_event: called with whatever the jobs emit.

    Raises:
        EnsemblerError: what a job raises; it ends the others. So does closing the generator.
    """
    missing = []
    for job in jobs:
        kept = store.load(job) if store else None
        if kept is None:
            missing.append(job)
        else:
            yield job, kept
    with closing(engine.run(_call, shared, missing, on_event)) as results:
        for place, result in results:
            if store:
                store.save(missing[place], result)
            yield missing[place], result


def _call(shared: Any, job: Job, emit: Callable[..., None]) -> Any:
    return job.function(shared, emit, **job.arguments)
