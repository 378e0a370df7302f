"""What torchrun starts in the tests: every process trains the same, and writes down what it holds.

``python -m torch.distributed.run --nproc-per-node 2 tests/_together.py FOLDER``; or, to fail, with the rank of the one
that does in place of the folder, or with ``both`` and the rank of the slower one.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from ensembler.errors import DataError, EnsemblerError
from ensembler.run import save_tensors
from ensembler.trainers import (
    Session,
    Settings,
    train_curve,
    train_deep_ensemble,
    train_fge,
    train_simplex,
    train_subspace,
)
from ensembler.trainers.checkpoints import Checkpoints
from ensembler.trainers.distributed import ALONE, joined
from tests._small import SETTINGS, dataset

# 33 images in batches of 8: five steps an epoch, the last one of a single image. Ten epochs in all are fifty steps.
DATASET = dataset(train=33)


def session(group=ALONE, checkpoints=None, init=None, **changes):
    settings = Settings(**(SETTINGS | {"epochs": 10} | changes))
    return Session(DATASET, settings, init, checkpoints=checkpoints, group=group)


def simplex(group, checkpoints=None):
    return train_simplex(session(group, checkpoints, epochs=4), 3, vertex_epochs=3, members=4)


def curve(group):
    ends = [train_deep_ensemble(session(group, seed=seed, epochs=2), members=1) for seed in (1, 2)]
    return train_curve(session(group, init=ends[0]), *ends, bends=2, points=3)


METHODS = {
    "plain": lambda group: train_deep_ensemble(session(group), members=1),
    "simplex": simplex,
    "three points a step": lambda group: train_simplex(
        session(group, epochs=5), 2, vertex_epochs=5, samples_per_step=3
    ),
    "auto": lambda group: train_simplex(session(group, epochs=5), 2, vertex_epochs=1, regularisation="auto"),
    "snapshots": lambda group: train_fge(session(group), members=2, cycle=2),
    "subspace": lambda group: train_subspace(session(group), vertices=3),
    "curve": curve,
}


def resumed(group, folder):
    """Goes on with what a single process has begun; the others' folder is not there."""
    checkpoints = Checkpoints(folder / "begun.unfinished" if group.first else folder / "nowhere", ours=group.first)
    return simplex(group, checkpoints)


def fail(ranks: str, slower: int) -> None:
    """As a command does it whose processes fail."""
    try:
        with joined("cpu") as group:
            if ranks == "both":
                time.sleep(2 * (group.rank == slower))
                raise DataError("all of them have failed")
            if group.rank == int(ranks):
                raise DataError("this process alone has failed")
            while True:
                group.sum_(torch.ones(()))
    except EnsemblerError as error:
        time.sleep(2 * (group.rank == slower))
        sys.exit(f"error: {error}")


def main() -> None:
    if len(sys.argv) == 3:
        return fail(sys.argv[1], int(sys.argv[2]))
    folder = Path(sys.argv[1])
    with joined("cpu") as group:
        for name, method in {**METHODS, "resumed": lambda group: resumed(group, folder)}.items():
            run = method(group)
            save_tensors(run.vertices, folder / f"{name} {group.rank}.safetensors")
            parts = run.manifest.cost.parts
            facts = {
                "history": run.history,
                "passes": {part: [cost.example_passes, cost.forward_passes] for part, cost in parts.items()},
                "metrics": run.manifest.metrics,
                "device": run.manifest.cost.device,
            }
            (folder / f"{name} {group.rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
