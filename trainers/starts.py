"""What a training starts from: fresh weights, a run's solution, or a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ensembler.errors import UsageError
from ensembler.networks import checkpoints, matching
from ensembler.networks.checkpoints import Checkpoint
from ensembler.networks.dropout import without_masks
from ensembler.networks.pretrained import pretrained
from ensembler.run import CostEntry, Run
from ensembler.seeds import derive
from ensembler.storage import artefact
from ensembler.storage.urls import local
from ensembler.trainers.method import Members, Method
from ensembler.trainers.plan import Plan, Snapshot
from ensembler.trainers.settings import Settings
from ensembler.weights import FlatWeights

if TYPE_CHECKING:
    from ensembler.trainers.trainer import Trainer

__all__ = [
    "Solution",
    "Start",
    "as_members",
    "begin",
    "fresh",
    "identity",
    "inherit",
    "load_starts",
    "solution",
    "stack_buffers",
    "vertices",
]

Start = Run | Checkpoint


@dataclass(frozen=True)
class Solution:
    """One trained network: its weights (P,) and its buffers."""

    vector: Tensor
    buffers: Mapping[str, Tensor]


def load_starts(method: Method, settings: Settings) -> dict[str, Start]:
    """What training starts from, by the paths or URLs that the method and the settings give: runs, files of weights.

    Raises:
        UsageError: two answers to what to start from. ArtefactError: one cannot be read.
    """
    if settings.init and settings.weights:
        raise UsageError("--init and --weights both name a start: give one of them")
    starts: dict[str, Start] = {path: Run.load(local(path)) for path in method.runs}
    if settings.weights:
        starts[settings.weights] = pretrained(settings.architecture, settings.weights)
    if settings.init:
        path = local(settings.init)
        starts[settings.init] = checkpoints.read(path) if path.is_file() else Run.load(path)
    return starts


def identity(name: str, start: Start) -> str:
    """What stands for a start in a fingerprint: the SHA-256 of the run's manifest or of the file."""
    if isinstance(start, Run):
        return start.sha256
    path = Path(name)
    return artefact.sha256(path) if path.is_file() else start.origin


def fresh(trainer: Trainer, member: int = 0) -> Solution:
    """Freshly initialised weights of a member; those of a checkpoint, if there is one, in their places."""
    network = trainer.network(derive(trainer.settings.seed, "member", member))
    if isinstance(trainer.start, Checkpoint):
        matching.load(network, trainer.start)
    weights = FlatWeights(network)
    return Solution(weights.vector, weights.buffers())


def begin(trainer: Trainer, member: int = 0) -> Solution:
    """Where a training begins: the solution of the run that the settings start from, or fresh weights."""
    if isinstance(trainer.start, Run):
        return inherit(trainer, trainer.start, _part(member))
    return fresh(trainer, member)


def solution(trainer: Trainer, member: int = 0) -> Solution:
    """A solution: that of the settings' start, or one trained from fresh weights."""
    found = begin(trainer, member)
    if trainer.starts_solved:
        return found
    iterations = trainer.steps(trainer.settings.epochs)
    plan = Plan(trainer.schedule(iterations), iterations, patience=trainer.settings.early_stopping)
    fitted = trainer.fit(_part(member), found.vector[None].clone(), found.buffers, plan)
    return Solution(fitted.vertices[0], fitted.buffers)


def _part(member: int) -> str:
    return f"solution {member + 1}"


def inherit(trainer: Trainer, run: Start, part: str) -> Solution:
    """A run's first member, its cost entered under ``part``.

    Raises:
        DataError: it was trained on other data. UsageError: it is of another architecture.
    """
    assert isinstance(run, Run)  # noqa: S101  methods join runs
    cost = run.manifest.cost
    # An independent member was trained alone; of any other, the whole run was needed.
    alone = next((e for name, e in cost.entries.items() if run.manifest.independent and name.endswith(_part(0))), None)
    whole = cost.model_dump(exclude={"entries"}) | {"example_passes": cost.example_passes or 0}
    ids = [each for entry in cost.entries.values() for each in entry.ids]
    entry = alone or CostEntry.model_validate(whole | {"origin": ", ".join(cost.unknown) or None, "ids": ids})
    trainer.ledger.entries[part] = entry.model_copy()
    trainer.ledger.before += entry.seconds or 0.0
    rows = vertices(trainer, run)
    buffers = {name: rows[0].to(trainer.device) for name, rows in without_masks(run.buffers).items()}
    return Solution(run.coefficients[0].to(rows) @ rows, buffers)


def vertices(trainer: Trainer, run: Run) -> Tensor:
    """All vertices (K, P) of a run of the same architecture and data.

    Raises:
        DataError, UsageError: it is of others.
    """
    run.check_one_network("to start from")
    run.manifest.dataset.check(trainer.dataset)
    own, other = trainer.settings.architecture, run.manifest.architecture
    if other != own:
        raise UsageError(f"a run of {other} and {own} have no weights in common: name runs of one --arch")
    trainer.weights.load_frozen(run.frozen)
    return trainer.weights.flatten(run.vertices)


def as_members(snapshots: Sequence[Snapshot]) -> Members:
    """The ensemble of snapshots of one network: each is a vertex, and a member."""
    vertices = torch.cat([snapshot.vertices for snapshot in snapshots])
    return Members(vertices, torch.eye(len(vertices)), stack_buffers(snapshots))


def stack_buffers(solutions: Sequence[Solution | Snapshot]) -> dict[str, Tensor]:
    """The buffers of solutions that are members themselves: name to (M, ...), on the CPU."""
    names = solutions[0].buffers
    return {name: torch.stack([solution.buffers[name].cpu() for solution in solutions]) for name in names}
