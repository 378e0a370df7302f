"""Training as the tests do it: small, on the CPU, from a record; and the loop alone, on batches that are given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer
from typer.testing import CliRunner, Result

from ensembler.cli import app
from ensembler.data.datasets import Dataset
from ensembler.run import Run
from ensembler.task import Classification
from ensembler.trainers import Method, Settings, Trainer, loop, train
from ensembler.trainers.batches import Batch
from ensembler.trainers.events import Event, Message, OnEvent
from ensembler.trainers.plan import Fitted, Plan
from ensembler.trainers.starts import Start, load_starts
from ensembler.weights import FlatWeights
from tests._small import SETTINGS, dataset


def make(
    method: Method,
    data: Dataset | None = None,
    *,
    said: list[str] | None = None,
    on_event: OnEvent = lambda event: None,
    **settings,
) -> Run:
    """A run of the small dataset; what is found on the way goes to ``said``."""

    def tell(event: Event) -> None:
        if said is not None and isinstance(event, Message):
            said.append(event.text)
        on_event(event)

    own = SETTINGS | settings
    starts = load_starts(method, Settings(**own)).values()
    if "architecture" not in settings and any(isinstance(start, Run) for start in starts):
        own.pop("architecture")  # it is that of the run
    return train(data or dataset(), method, Settings(**own), on_event=tell)


def trainer(data: Dataset | None = None, starts: dict[str, Start] | None = None, **settings) -> Trainer:
    data = data or dataset()
    return Trainer(data, Settings(**(SETTINGS | settings)).resolved(data), starts or {})


def saved(run: Run, path: Path) -> str:
    """Where a run lies, as an option that names one."""
    return str(run.save(path))


def call(*arguments: object) -> Result:
    """A command of the package, run in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


_WITH_METHODS = """
import json, sys
from typer.testing import CliRunner
import ensembler.trainers.methods
ensembler.trainers.methods.__path__.append(sys.argv[1])
from ensembler.cli import app
results = [CliRunner().invoke(app, arguments) for arguments in json.loads(sys.argv[2])]
print(json.dumps([[result.exit_code, result.stdout, result.stderr] for result in results]))
"""


def call_with_method(source: str, folder: Path, *commands: Sequence[object]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of commands in ``folder``, where one file more lies among the methods."""
    (folder / "methods").mkdir(exist_ok=True)
    (folder / "methods" / "mine.py").write_text(source)
    given = json.dumps([[str(argument) for argument in command] for command in commands])
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "COLUMNS": "200"}
    command = [sys.executable, "-c", _WITH_METHODS, folder / "methods", given]
    found = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [tuple(result) for result in json.loads(found.stdout)]


def passes(run: Run) -> dict[str, int]:
    """Example passes by part, of those that trained something."""
    return {name: entry.example_passes for name, entry in run.manifest.cost.entries.items() if entry.example_passes}


def same(one: Run, other: Run) -> bool:
    return all(torch.equal(tensor, other.vertices[name]) for name, tensor in one.vertices.items())


def flat(run: Run) -> Tensor:
    """The vertices (K, P)."""
    return torch.cat([rows.flatten(1) for rows in run.vertices.values()], dim=1)


class Given:
    """Given batches (x, y), again and again: as many an epoch as there are."""

    def __init__(self, *batches: tuple[Tensor, Tensor]) -> None:
        self.given, self.per_epoch = batches, len(batches)

    def begin(self, step: int = 0) -> Generator[Batch, None, None]:
        while True:
            x, y = self.given[step % self.per_epoch]
            yield Batch(x, y, len(y))
            step += 1


def random_batches(count: int, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(size, 3, 8, 8, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def sgd(moving: list[Tensor]) -> Optimizer:
    return torch.optim.SGD(moving, lr=1.0, momentum=0.9, weight_decay=1e-3, nesterov=True)


def plain(moving: list[Tensor]) -> Optimizer:
    """The update of one step at the rate 1 is minus the gradient."""
    return torch.optim.SGD(moving, lr=1.0)


def fit(
    weights: FlatWeights,
    vertices: Tensor,
    batches: list[tuple[Tensor, Tensor]],
    plan: Plan,
    optimiser: Callable[[list[Tensor]], Optimizer] = sgd,
    **options,
) -> Fitted:
    """The loop, on given batches."""
    given, task = Given(*batches), Classification()
    return loop.fit(weights, task, vertices, weights.buffers(), given, optimiser, plan, **options)
