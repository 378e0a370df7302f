"""The runs of a study: those that exist are taken, the others are trained as jobs, and members are combined.

``OUT/runs`` holds a run under the name of each node and cell of the plan. A run is taken where its fingerprint says
that it is the one needed, there or in another folder. Trainings that start from others wait for those only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ensembler.data.datasets import Dataset
from ensembler.engine import Engine
from ensembler.errors import UsageError
from ensembler.run import Run
from ensembler.storage import artefact
from ensembler.study.plan import Cell, Node, Plan
from ensembler.trainers.combining import combination, combine
from ensembler.trainers.events import OnEvent
from ensembler.trainers.runs import Runs
from ensembler.trainers.settings import Settings
from ensembler.trainers.spec import unfinished
from ensembler.trainers.starts import load_starts
from ensembler.trainers.training import Training

__all__ = ["Maker", "OnRun", "index"]


OnRun = Callable[[str, Run, str], None]
"""Told of every run that is there: its name, the run, and whether it was trained, combined or taken."""


@dataclass(eq=False)
class Maker:
    """Makes the runs of a plan.

    Args:
        plan: the plan.
        dataset: what is trained on.
        folder: of the runs.
        engine: trains independent runs: one after another, side by side, or on Ray.
        computing: settings that say how something is computed, by field name.
        elsewhere: runs that may be taken, by fingerprint; see :func:`index`.
        every: seconds between two checkpoints.
        on_event: told of what trainings report.
        on_run: told of every run.
    """

    plan: Plan
    dataset: Dataset
    folder: Path
    engine: Engine
    computing: Mapping[str, Any]
    elsewhere: Mapping[str, Path]
    on_run: OnRun
    every: float = 60.0
    on_event: OnEvent = lambda event: None
    places: dict[str, Path] = field(default_factory=dict)

    def make(self) -> dict[str, Path]:
        """Make every run, and return where each cell's lies, by the cell's name.

        Raises:
            UsageError: another run lies where one is to be. EnsemblerError: of a training; the others are stopped.
        """
        nodes = list(self.plan.nodes.values())
        for depth in range(max(node.depth for node in nodes) + 1):
            self._train([node for node in nodes if node.depth == depth])
        return {cell.name: self._cell(cell) for cell in self.plan.cells}

    def training(self, node: Node) -> Training:
        """What a run is made of, once the runs that it starts from are there."""
        given = {
            name: [self._place(one) for one in start] if isinstance(start, Sequence) else self._place(start)
            for name, start in node.starts.items()
        }
        settings = {name: given.pop(name) for name in list(given) if name in Settings.model_fields}
        method = node.method.model_copy(update=given)
        own = node.settings.model_copy(update={**self.computing, **settings})
        return Training.of(self.dataset, method, own, load_starts(method, own))

    def _place(self, node: Node) -> str:
        return str(self.places[node.name])

    def _train(self, nodes: Sequence[Node]) -> None:
        """Find or train runs that do not depend on one another."""
        missing = {}
        for node in nodes:
            training = self.training(node)
            found = self._found(node.name, training.spec.fingerprint)
            if found is None:
                missing[node.name] = training
                self.places[node.name] = self.folder / node.name
            else:
                self.places[node.name] = found
        if missing:
            paths = {name: self.folder / name for name in missing}
            runs = Runs(missing, paths, self._keep, every=self.every, named=True)
            runs.make(self.engine, self.on_event)

    def _keep(self, run: Run, path: Path) -> Path:
        run.save(path)
        self.on_run(path.name, run, "trained")
        return path

    def _found(self, name: str, fingerprint: str) -> Path | None:
        """Find a run that exists.

        Raises:
            UsageError: another run has its name.
        """
        path = self.folder / name
        if not path.exists():
            if fingerprint not in self.elsewhere or unfinished(path).exists():
                return None
            path = self.elsewhere[fingerprint]
        run = Run.load(path)
        if run.manifest.fingerprint != fingerprint:
            raise UsageError(
                f"{path} is not the run that the study needs there: what it starts from was trained again, or the "
                "package has other defaults now: remove it, and the study makes it anew"
            )
        self.on_run(name, run, "taken")
        return path

    def _cell(self, cell: Cell) -> Path:
        """Find or make the run of a cell's members."""
        if len(cell.nodes) == 1:
            return self.places[cell.name]
        runs = {node.name: Run.load(self.places[node.name]) for node in cell.nodes}
        found = self._found(cell.name, combination(runs).fingerprint)
        if found is None:
            run = combine(runs, self.dataset, self.computing.get("device"))
            found = run.save(self.folder / cell.name)
            self.on_run(cell.name, run, "combined")
        return found


def index(folders: Sequence[Path]) -> dict[str, Path]:
    """The finished runs in folders, by fingerprint; the first of equal ones."""
    found: dict[str, Path] = {}
    for folder in folders:
        for manifest in sorted(folder.glob(f"*/{artefact.MANIFEST}")):
            path = manifest.parent
            try:
                content = json.loads(manifest.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue  # what cannot be read is not taken
            if not path.is_symlink() and isinstance(content, dict) and content.get("kind") == "run":
                found.setdefault(str(content.get("fingerprint")), path.resolve())
    return found
