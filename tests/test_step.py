"""A step needs nothing of the host, whatever the method: it could be captured once and replayed, as on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ensembler.architectures import build
from ensembler.trainers import FGE, Complex, Curve, DeepEnsemble, Method, Simplex, Snapshots, Subspace, Trainer, loop
from ensembler.trainers.batches import Batch
from ensembler.trainers.loop import Plan
from ensembler.trainers.method import methods
from ensembler.trainers.regularisers import volume_regulariser
from ensembler.trainers.schedules import constant
from ensembler.trainers.starts import load_starts
from ensembler.weights import FlatWeights
from tests._host import Needs, Operations, Recorder, on_meta
from tests._small import dataset
from tests._training import fit, make, saved, trainer

Step = Callable[..., None]


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("ends")
    return [saved(make(DeepEnsemble(members=1), seed=seed), folder / str(seed)) for seed in range(3)]


CASES: dict[str, Callable[[list[str]], Method]] = {
    "single": lambda ends: DeepEnsemble(members=1),
    "FGE": lambda ends: FGE(members=2, cycle=1, start=0.5),
    "snapshots": lambda ends: Snapshots(members=2),
    "volume": lambda ends: Simplex(vertices=4, vertex_epochs=1),
    "function": lambda ends: Simplex(vertices=3, vertex_epochs=1, regulariser="function", samples_per_step=2),
    "joint subspace": lambda ends: Subspace(vertices=3),
    "curve": lambda ends: Curve(first=ends[0], second=ends[1], bends=2, points=3),
    "complex": lambda ends: Complex(modes=ends, connectors=2, points=3),
}


def work(method: Method, **settings: Any) -> Trainer:
    """A trainer of batches of one size."""
    from ensembler.trainers import Settings

    return trainer(dataset(train=32), load_starts(method, Settings()), **settings)


def test_every_method_is_among_the_cases(ends):
    assert {type(case(ends)) for case in CASES.values()} == set(methods())


@pytest.mark.parametrize("case", CASES)
def test_a_step_needs_nothing_of_the_host(case, ends, monkeypatch):
    """On "meta", where nothing can be read: no value, no copy, no tensor made of numbers; SGD fused, clipping on."""
    method, step, counted = CASES[case](ends), loop._Step.__call__, []

    def noted(self: Any, *args: Any) -> None:
        needs.noting = True
        step(self, *args)
        needs.noting = False
        counted.append(self.clip)

    with on_meta() as needs:
        needs.noting = False
        own = work(method, device="meta")
        monkeypatch.setattr(loop._Step, "__call__", noted)
        monkeypatch.setattr(own, "optimiser", lambda moving: torch.optim.SGD(moving, 0.1, 0.9, fused=True))
        method.train(own)
    assert len(counted) >= 8
    assert all(clip > 0 for clip in counted)
    assert not needs.places, needs.places
