"""The plan of a study: which runs its cells need, what is shared between them, and what each costs, before training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ensembler.data.datasets import Dataset
from ensembler.errors import UsageError
from ensembler.source import hash_sources
from ensembler.study.file import Entry, Study
from ensembler.trainers.batches import batch_sizes
from ensembler.trainers.budget import LEAST, Budget, Piece
from ensembler.trainers.dry_pass import refusal
from ensembler.trainers.method import Method
from ensembler.trainers.settings import Settings

__all__ = ["Cell", "LeftOut", "Node", "Plan", "plan"]

_STRIDE = 1000  # between the seeds of independent solutions of one repetition; a study has at most so many repetitions


@dataclass(frozen=True, eq=False)
class Node:
    """A run to be trained.

    Attributes:
        name: of its folder; two plans that need the same run give it the same name.
        method, settings: all but the paths that it starts from.
        starts: the runs that it starts from, by the option that names them.
        passes: example passes of its own training.
    """

    name: str
    method: Method
    settings: Settings
    starts: Mapping[str, Node | Sequence[Node]]
    passes: int

    @property
    def before(self) -> list[Node]:
        """The runs that it starts from."""
        return [node for one in self.starts.values() for node in (one if isinstance(one, Sequence) else [one])]

    @cached_property
    def depth(self) -> int:
        """How many trainings come before it, one after another."""
        return max((node.depth + 1 for node in self.before), default=0)

    @cached_property
    def all(self) -> dict[str, Node]:
        """It and all that it needs, by name."""
        found: dict[str, Node] = {}
        for node in self.before:
            found |= node.all
        return found | {self.name: self}


@dataclass(frozen=True, eq=False)
class Cell:
    """A method at a budget, with a seed.

    Attributes:
        label: the method's.
        budget: b.
        seed: of the repetition.
        nodes: the runs whose members are combined.
        name: of the folder of the run that has the members.
        needs: every run that has to be trained for it, by name.
    """

    label: str
    budget: float
    seed: int
    nodes: Sequence[Node]
    name: str
    needs: Mapping[str, Node]

    @property
    def passes(self) -> int:
        """Example passes; a training that several runs share counts once."""
        return sum(node.passes for node in self.needs.values())


@dataclass(frozen=True)
class LeftOut:
    """A method that is not compared at a budget, and why."""

    label: str
    budget: float
    why: str


@dataclass(frozen=True)
class Plan:
    """The cells of a study, and what is left out.

    Attributes:
        one: B, example passes of one network.
        epochs: of that network.
        settings: what all methods share, resolved.
        entries: the methods.
        budgets: in multiples of B.
        cells: by budget, method and seed.
    """

    one: int
    epochs: float
    settings: Settings
    entries: Sequence[Entry]
    budgets: Sequence[float]
    seeds: Sequence[int]
    cells: Sequence[Cell] = field(default_factory=list)
    left_out: Sequence[LeftOut] = field(default_factory=list)

    @cached_property
    def nodes(self) -> dict[str, Node]:
        """Every run to be trained, by name, each after those that it starts from."""
        found: dict[str, Node] = {}
        for cell in self.cells:
            found |= cell.needs
        return dict(sorted(found.items(), key=lambda item: item[1].depth))

    @property
    def passes(self) -> int:
        """Example passes of all trainings; what cells share is trained once."""
        return sum(node.passes for node in self.nodes.values())


def plan(study: Study, dataset: Dataset) -> Plan:
    """Turn each method's budgets into runs.

    Raises:
        UsageError: a method has no rule for budgets, or no method fits any budget.
    """
    if study.settings.early_stopping or any(entry.settings.get("early_stopping") for entry in study.entries):
        raise UsageError(
            "--early-stopping ends trainings before their budget, and a study compares equal ones: leave it out"
        )
    settings = study.settings.resolved(dataset)
    sizes = batch_sizes(len(dataset.train), settings.batch_size or 1)
    steps = max(1, round(settings.epochs * len(sizes)))
    whole = Budget(1, 0, 0, sizes)
    one, epochs = whole.passes(steps), whole.in_epochs(steps)
    cells, left_out = list[Cell](), list[LeftOut]()
    unfit = {entry.label: refusal(entry.method, dataset, settings) for entry in study.entries}
    for networks in study.grid.multiples:
        for entry in study.entries:
            own = study.settings.model_copy(update=dict(entry.settings)).resolved(dataset)
            budget = Budget(networks, one, epochs, batch_sizes(len(dataset.train), own.batch_size or 1))
            pieces = unfit[entry.label] or entry.method.at_budget(budget)
            if isinstance(pieces, str):
                left_out.append(LeftOut(entry.label, networks, pieces))
                continue
            builder = _Builder(settings, own, _identity(dataset))
            found = [builder.cell(entry.label, networks, seed, pieces) for seed in study.seeds]
            if why := _refused(found[0], dataset):
                left_out.append(LeftOut(entry.label, networks, why))
                continue
            share = found[0].passes / budget.total
            if LEAST <= share <= 1:
                cells += found
            else:
                said = f"what fits takes {share:.0%} of the budget, and {LEAST:.0%} to 100 % are compared"
                left_out.append(LeftOut(entry.label, networks, said))
    if not cells:
        reasons = "; ".join(f"{one.label} at {one.budget:g}: {one.why}" for one in left_out)
        raise UsageError(f"no method fits a budget ({reasons}): choose other budgets, or a larger --budget")
    return Plan(one, epochs, settings, study.entries, study.grid.multiples, list(study.seeds), cells, left_out)


def _refused(cell: Cell, dataset: Dataset) -> str | None:
    """Why options of a cell's runs do not go together, if they do not."""
    try:
        for node in cell.needs.values():
            node.method.resolved(node.settings.resolved(dataset))
    except UsageError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class _Builder:
    """Makes nodes of pieces.

    Attributes:
        shared: the study's settings, for the networks that all methods share.
        own: the method's.
        data: the identity of the dataset.
    """

    shared: Settings
    own: Settings
    data: Sequence[Any]

    def cell(self, label: str, budget: float, seed: int, pieces: Sequence[Piece]) -> Cell:
        nodes = [self.node(piece, seed) for piece in pieces]
        needs: dict[str, Node] = {}
        for node in nodes:
            needs |= node.all
        joined = _digest([node.name for node in nodes])
        name = nodes[0].name if len(nodes) == 1 else f"{label}-b{budget:g}-s{seed}-{joined}"
        return Cell(label, budget, seed, nodes, name, needs)

    def node(self, piece: Piece, seed: int) -> Node:
        starts = {
            option: [self.node(one, seed) for one in given] if isinstance(given, Sequence) else self.node(given, seed)
            for option, given in piece.starts.items()
        }
        own = seed + _STRIDE * piece.member
        settings = (self.shared if piece.shared else self.own).model_copy(update={"epochs": piece.epochs, "seed": own})
        content = {
            "command": piece.method.command,
            "options": piece.method.model_dump(mode="json", exclude=piece.method.marked("path")),
            "settings": settings.model_dump(mode="json", exclude={*Settings.marked("computing"), "init"}),
            "data": self.data,
            "starts": {name: list(_names(given)) for name, given in starts.items()},
        }
        if code := hash_sources(settings.model_dump()):
            content["code"] = code
        return Node(f"{piece.method.name}-s{own}-{_digest(content)}", piece.method, settings, starts, piece.passes)


def _names(given: Node | Sequence[Node]) -> Iterator[str]:
    for node in given if isinstance(given, Sequence) else [given]:
        yield node.name


def _identity(dataset: Dataset) -> list[Any]:
    splits = (dataset.train, dataset.validation, dataset.test)
    return [*(split.sha256 for split in splits), list(dataset.mean), list(dataset.std)]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
