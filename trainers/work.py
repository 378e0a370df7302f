"""Independent jobs of one training: the members of a deep ensemble, the simplexes of ESPRO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ensembler import jobs
from ensembler.jobs import Job
from ensembler.trainers.events import OnEvent
from ensembler.trainers.resume import JobResult
from ensembler.trainers.trainer import Trainer

__all__ = ["JobOutput", "each"]

JobOutput = tuple[Mapping[str, Any], dict[str, Any]]
"""What a job's function returns: tensors by name, or mappings of them, and JSON values."""


def each(
    trainer: Trainer, function: Callable[..., JobOutput], arguments: Mapping[str, Mapping[str, Any]]
) -> list[JobOutput]:
    """What ``function(trainer, **arguments[name])`` makes for each name, in their order.

    The trainer's engine does the jobs, here or in other processes; the result is the same, for a job depends on its
    seeds and arguments only. A finished job is kept at once where there is a store, and is not done again. Costs are
    entered as if the jobs had run here one after another.

    Args:
        trainer: of the whole training.
        function: of a module, or a partial of one, so that another process finds it.
        arguments: JSON values, by the job's name.

    Raises:
        EngineError: the engine has lost a job.
    """
    todo = [Job(name, _work, {"name": name, "function": function, "given": given}) for name, given in arguments.items()]
    store, group = trainer.store if trainer.group.first else None, trainer.group

    def kept() -> dict[str, JobResult]:
        found = {job.name: store.load(job) for job in todo} if store else {}
        return {name: result for name, result in found.items() if result is not None}

    done = group.from_first(kept)  # of processes that train together, the first one knows
    missing = [job for job in todo if job.name not in done]
    with trainer.ledger.merging() as ledgers:
        for job, result in jobs.run(missing, trainer, trainer.engine, store, trainer.on_event):
            done[job.name] = result
        results = [done[name] for name in arguments]
        ledgers += [result.ledger for result in results]
    return [(_moved(result.tensors, trainer.device), result.facts) for result in results]


def _work(
    trainer: Trainer, emit: OnEvent, name: str, function: Callable[..., JobOutput], given: dict[str, Any]
) -> JobResult:
    own = trainer.fork(name, emit)
    tensors, facts = function(own, **given)
    return JobResult(_moved(tensors, "cpu"), facts, own.ledger.record())


def _moved(tensors: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The same tensors on another device."""
    return {name: own.to(device) if isinstance(own, Tensor) else _moved(own, device) for name, own in tensors.items()}
