"""Independent jobs with names, run by an engine, with their results in a store.

The members of a deep ensemble, the simplexes of ESPRO, the seeds of a comparison and the cells of a shift table are
all jobs. A job depends only on its arguments and on what all jobs share, so it can run anywhere, and run again.
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
    """A function and its arguments, with a name that is unique in its store.

    Attributes:
        name: e.g. ``"solution 2"``.
        function: called as ``function(shared, emit, **arguments)``; a module-level function, so that another process
            can import it.
        arguments: values that one process can send to another.
    """

    name: str
    function: Callable[..., Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)


class Store(Protocol[R]):
    """Stores the results of finished jobs."""

    def load(self, job: Job) -> R | None:
        """Return the result of a job, or ``None`` if there is no intact one."""
        ...

    def save(self, job: Job, result: R) -> None:
        """Store the result of a job."""
        ...


def run(
    jobs: Sequence[Job],
    shared: Any,
    engine: Engine,
    store: Store[R] | None = None,
    on_event: Callable[..., None] = lambda *event: None,
) -> Generator[tuple[Job, R], None, None]:
    """Run jobs and yield each with its result: first those in the store, then the others, saved as they finish.

    Args:
        jobs: independent of one another.
        shared: what all jobs have in common; sent to each machine once.
        engine: runs the jobs.
        store: holds their results.
        on_event: called with what the jobs emit.

    Raises:
        EnsemblerError: raised by a job; the others are stopped. Closing the generator stops them, too.
    """
    missing = []
    for job in jobs:
        result = store.load(job) if store else None
        if result is None:
            missing.append(job)
        else:
            yield job, result
    with closing(engine.run(_call, shared, missing, on_event)) as results:
        for place, result in results:
            if store:
                store.save(missing[place], result)
            yield missing[place], result


def _call(shared: Any, job: Job, emit: Callable[..., None]) -> Any:
    return job.function(shared, emit, **job.arguments)
