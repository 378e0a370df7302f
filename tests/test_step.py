"""A step needs nothing of the host, whatever the method: it could be captured once and replayed, as on a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ensembler.architectures import build
from ensembler.subspace import dirichlet
from ensembler.trainers import (
    FGE,
    Complex,
    Curve,
    DeepEnsemble,
    Method,
    Settings,
    Simplex,
    Snapshots,
    Subspace,
    Trainer,
    loop,
)
from ensembler.trainers.batches import Batch
from ensembler.trainers.loop import Plan
from ensembler.trainers.method import methods
from ensembler.trainers.regularisers import volume_regulariser
from ensembler.trainers.schedules import constant
from ensembler.trainers.starts import load_starts
from ensembler.weights import FlatWeights
from tests._host import Operations, Recorder, on_meta
from tests._small import dataset
from tests._training import fit, make, saved, trainer

Step = Callable[..., None]


def fused(settings: Settings, moving: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(moving, settings.lr, settings.momentum, weight_decay=1e-3, nesterov=True, fused=True)


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("ends")
    data = dataset(train=32)
    return [saved(make(DeepEnsemble(members=1), data, seed=seed), folder / str(seed)) for seed in range(3)]


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


BATCHNORM = {"FGE", "volume", "joint subspace"}


def architecture(case: str) -> str:
    return f"tests._small:{'batchnorm' if case in BATCHNORM else 'network'}"


def work(method: Method, **settings: Any) -> Trainer:
    """A trainer of batches of one size."""
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
        monkeypatch.setattr("ensembler.trainers.trainer._sgd", fused)
        method.train(own)
    assert len(counted) >= 8
    assert all(clip > 0 for clip in counted)
    assert not needs.places, needs.places


def captured(eager: Step, replays: Counter[Any]) -> Step:
    """``_Step.__call__`` as a captured loop would have it: the second step is recorded, those after it replay it.

    What changes from step to step is copied to where the recorded step reads it. SGD makes its buffers in the first.
    """
    recorded: dict[Any, tuple[list[Tensor | None], Recorder] | None] = {}

    def call(step: Any, batch: Batch, *given: Tensor | None) -> None:
        changing = (batch.x, batch.y, *given)
        if step not in recorded:
            recorded[step] = None
            eager(step, batch, *given)
        elif (found := recorded[step]) is None:
            x, y, *rest = kept = [None if tensor is None else tensor.clone() for tensor in changing]
            with (recorder := Recorder()):
                eager(step, Batch(x, y, batch.size), *rest)
            recorded[step] = kept, recorder
        else:
            for old, new in zip(found[0], changing, strict=True):
                if old is not None:
                    old.copy_(new)
            found[1].replay()
            replays[step] += 1

    return call


@pytest.mark.parametrize("case", CASES)
def test_replays_of_a_recorded_step_are_the_training_bit_for_bit(case, ends, monkeypatch):
    """As captured on a GPU: what the host would do in between is not done, what it would choose stays as it was."""
    method, replays = CASES[case](ends), Counter()
    eager = method.train(work(method, architecture=architecture(case)))
    monkeypatch.setattr(loop._Step, "__call__", captured(loop._Step.__call__, replays))
    replayed = method.train(work(method, architecture=architecture(case)))
    assert replays
    assert all(count >= 2 for count in replays.values())
    assert torch.equal(replayed.vertices, eager.vertices)
    assert all(torch.equal(rows, eager.buffers[name]) for name, rows in replayed.buffers.items())


def operations(steps: Callable[[int], Any]) -> int:
    """How many operations a step takes, of those that ``steps(n)`` does beside what it does once."""

    def count(n: int) -> int:
        with Operations() as found:
            steps(n)
        return found.counts.total()

    return round((count(6) - count(3)) / 3)


def by_hand(batch: tuple[Tensor, Tensor], steps: int) -> None:
    """A training loop as one writes it."""
    module = build("resnet20", 10).train()
    optimiser = torch.optim.SGD(module.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True, fused=True)
    for _ in range(steps):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(module(batch[0]), batch[1]).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()


def in_a_simplex(batch: tuple[Tensor, Tensor], K: int, steps: int) -> None:
    """The package's loop, one of K vertices moving; K = 1 is a single network."""
    weights = FlatWeights(build("resnet20", 10))
    vertices = weights.vector + 0.01 * torch.randn(K, len(weights))
    plan = Plan(constant(0.1), steps, trainable=[K - 1])
    if K > 1:
        regulariser = volume_regulariser(vertices[:-1], vertices[-1], 0.01, weights.vector)
        plan = replace(plan, draw=lambda rng, count: dirichlet(count, K, rng), regulariser=regulariser)
    fit(weights, vertices, [batch] * 20, plan, partial(fused, Settings()), clip=1.0)


def test_a_step_has_few_operations_more_than_one_written_by_hand():
    """Each is a kernel's launch on a GPU, where a small network waits for those.

    Gradients are added into one vector, an operation a parameter; the rest is a few.
    """
    batch = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    parameters = len(list(build("resnet20", 10).parameters()))
    plain, *own = map(operations, (partial(by_hand, batch), *(partial(in_a_simplex, batch, K) for K in (1, 4))))
    print(f"resnet20, {parameters} parameters: {plain} operations by hand, {own[0]} with K = 1, {own[1]} with K = 4")
    assert own[0] <= plain + parameters + 15
    assert own[1] <= plain + parameters + 40


def test_a_recorded_step_freezes_what_the_host_chooses():
    """The check is one: a rate that is a Python number, or a draw within the step, would be found."""
    x, y = torch.zeros(3), torch.zeros(3)

    def eager(rate: float) -> None:
        y.add_(x + 1, alpha=rate)

    with (recorder := Recorder()):
        eager(0.5)
    y.zero_()
    recorder.replay()
    assert torch.equal(y, torch.full((3,), 0.5))
    with pytest.raises(AssertionError, match="reads a value"), Recorder():
        x.sum().item()


@pytest.mark.parametrize(
    ("what", "function"),
    [
        ("a value is read", lambda m: m.sum().item()),
        ("a value is read", lambda m: bool(m[0] > 0)),
        ("a value is read", lambda m: m[m.sum().long()]),
        ("a value is read", lambda m: m.add_(m, alpha=m[0])),
        ("a value is read", lambda m: torch.equal(m, m)),
        ("a tensor is read", lambda m: m.tolist()),
        ("a tensor is read", lambda m: torch.zeros(4).copy_(m)),
        ("a tensor is made of Python numbers", lambda m: m[[0, 1]]),
        ("a tensor is made of Python numbers", lambda m: m.new_tensor([1.0])),
        ("a tensor is made of Python numbers", lambda m: torch.tensor([1.0], device="meta")),
        ("on several devices", lambda m: torch.zeros(4).to("meta")),
        ("on several devices", lambda m: m + torch.zeros(())),
        (None, lambda m: torch.where(m > 0, m, 0.0) * 2 + torch.zeros(4, device="meta")),
    ],
)
def test_what_needs_the_host_is_found(what: str | None, function: Callable[[Tensor], Any]):
    with on_meta() as needs:
        function(torch.zeros(4, device="meta"))
    assert len(needs.places) == (what is not None), needs.places
    assert what is None or what in next(iter(needs.places))
