"""What torchrun starts in the tests: every process trains the same, and writes down what it holds.

``python -m torch.distributed.run --nproc-per-node 2 tests/_together.py FOLDER``; or, to fail, a command line of
ensembler's in place of the folder, or ``alone``, whose second process does.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from ensembler import cli
from ensembler.errors import DataError, EnsemblerError
from ensembler.run import Run, save_tensors
from ensembler.trainers import (
    FGE,
    SWAG,
    Curve,
    CyclicalSGMCMC,
    DeepEnsemble,
    Method,
    Settings,
    Simplex,
    Subspace,
    distributed,
)
from ensembler.trainers.distributed import ALONE, Group, join_group
from tests._interrupt import make
from tests._small import SETTINGS, dataset

# 33 images in batches of 8: five steps an epoch, the last one of a single image. Ten epochs in all are fifty steps.
DATASET = dataset(train=33)


def settings(**changes) -> Settings:
    return Settings(**(SETTINGS | {"epochs": 10} | changes))


def methods(ends: list[str]) -> dict[str, tuple[Method, Settings]]:
    """By name; ``ends`` are two runs of this dataset."""
    simplex = Simplex(vertices=3, vertex_epochs=3, members=4)
    return {
        "plain": (DeepEnsemble(members=1), settings()),
        "simplex": (simplex, settings(epochs=4)),
        "three points a step": (Simplex(vertices=2, vertex_epochs=5, samples_per_step=3), settings(epochs=5)),
        "mixed": (DeepEnsemble(members=1), settings(mixup=0.5, cutmix=1.0, label_smoothing=0.1, class_weights="1,2,3")),
        "auto": (Simplex(vertices=2, vertex_epochs=1, regularisation="auto"), settings(epochs=5)),
        "snapshots": (FGE(members=2, cycle=2), settings()),
        "swag": (SWAG(members=2, start=0.5), settings(epochs=5)),
        "cyclical sg-mcmc": (CyclicalSGMCMC(members=4, samples_per_cycle=2), settings(epochs=5)),
        "subspace": (Subspace(vertices=3), settings()),
        "curve": (Curve(first=ends[0], second=ends[1], bends=2, points=3), settings()),
        "adamw": (
            DeepEnsemble(members=1),
            settings(optimiser="adamw", lr=0.05, weight_decay=0.1, accumulate=2, early_stopping=2, epochs=8),
        ),
        "resumed": (simplex, settings(epochs=4)),
    }


NAMES = [*methods(["", ""])]


def train(folder: Path, name: str, group: Group = ALONE) -> Run:
    """The run of that name; ``resumed`` goes on with what is at ``begun``, which only the first process finds."""
    method, given = methods([str(folder / "end 1"), str(folder / "end 2")])[name]
    path = folder / ("begun" if group.first else "nowhere") if name == "resumed" else None
    return make(path, method, given, data=DATASET, writer=group.first, group=group)


def fail_alone() -> None:
    """The second process fails. The first one never does, so the second need not wait to hear it say so."""
    distributed._COMMON = timedelta(milliseconds=1)
    try:
        with join_group("cpu") as group:
            while group.first:
                group.sum_(torch.ones(()))
            raise DataError("this process alone has failed")
    except EnsemblerError as error:
        sys.exit(f"error: {error}")


def command() -> None:
    """Run a command of which the first process is slow to fail and to say so; the others wait for it, however long."""
    distributed._COMMON = timedelta(hours=1)
    say = cli._print_error

    def slowly(sentence: object) -> None:
        time.sleep(2)
        say(f"{sentence}, says the first")

    if os.environ["RANK"] == "0":
        time.sleep(2)
        cli._print_error = slowly
    cli.main()


def main() -> None:
    if sys.argv[1] == "alone":
        return fail_alone()
    if len(sys.argv) > 2:
        return command()
    folder = Path(sys.argv[1])
    with join_group("cpu") as group:
        for name in NAMES:
            run = train(folder, name, group)
            save_tensors(run.vertices, folder / f"{name} {group.rank}.safetensors")
            entries = run.manifest.cost.entries
            facts = {
                "history": run.history,
                "passes": {part: [entry.example_passes, entry.forward_passes] for part, entry in entries.items()},
                "metrics": run.manifest.metrics,
                "device": run.manifest.cost.device,
            }
            (folder / f"{name} {group.rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
