"""A step needs nothing of the host, whatever the method: it could be captured once and replayed, as on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ensembler.networks.architectures import build
from ensembler.networks.batchnorm import layers as batchnorm_layers
from ensembler.networks.capture import WARM_UP, Graph
from ensembler.subspace import dirichlet
from ensembler.trainers import (
    FGE,
    SWAG,
    Complex,
    Curve,
    CyclicalSGMCMC,
    DeepEnsemble,
    MCDropout,
    Method,
    Settings,
    Simplex,
    Snapshots,
    Subspace,
    Trainer,
)
from ensembler.trainers.events import Message
from ensembler.trainers.method import methods
from ensembler.trainers.plan import Plan
from ensembler.trainers.regularisers import volume_regulariser
from ensembler.trainers.schedules import constant
from ensembler.trainers.starts import load_starts
from ensembler.trainers.step import Step
from ensembler.weights import FlatWeights
from tests._host import CpuGraph, Operations, Recorder, on_meta
from tests._small import NEWER, dataset
from tests._small import batchnorm as small_batchnorm
from tests._training import fit, make, random_batches, saved, trainer


def fused(moving: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(moving, 0.1, 0.9, weight_decay=1e-3, nesterov=True, fused=True)


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("ends")
    data = dataset(train=32)
    return [saved(make(DeepEnsemble(members=1), data, seed=seed), folder / str(seed)) for seed in range(3)]


CASES: dict[str, Callable[[list[str]], Method]] = {
    "single": lambda ends: DeepEnsemble(members=1),
    "FGE": lambda ends: FGE(members=2, cycle=1, start=0.5),
    "snapshots": lambda ends: Snapshots(members=2),
    "SWAG": lambda ends: SWAG(members=2, start=0.5, swa_epochs=2, collect_every=0.5),
    "cSG-MCMC": lambda ends: CyclicalSGMCMC(members=4, samples_per_cycle=2, cycle=2, exploration=0.5),
    "volume": lambda ends: Simplex(vertices=4, vertex_epochs=1),
    "function": lambda ends: Simplex(vertices=3, vertex_epochs=1, regulariser="function", samples_per_step=2),
    "joint subspace": lambda ends: Subspace(vertices=3),
    "curve": lambda ends: Curve(first=ends[0], second=ends[1], bends=2, points=3),
    "complex": lambda ends: Complex(modes=ends, connectors=2, points=3),
}


def work(method: Method, **settings: Any) -> Trainer:
    """A trainer of batches of one size."""
    return trainer(dataset(train=32), load_starts(method, Settings()), **settings)


def test_every_method_is_among_the_cases(ends):
    """MC dropout trains one network as a deep ensemble of one does."""
    assert {type(case(ends)) for case in CASES.values()} | {MCDropout} == set(methods())


@pytest.mark.parametrize(
    ("case", "options"),
    [(case, {}) for case in CASES]
    + [
        (case, {"optimiser": "adamw", "warmup": 0.25, "accumulate": 2, "measure": "all"})
        for case in ("single", "FGE", "volume", "joint subspace", "curve")
    ],
    ids=str,
)
def test_a_step_needs_nothing_of_the_host(case, options, ends, monkeypatch):
    """On "meta", where nothing can be read: no value, no copy, no tensor made of numbers; SGD fused, clipping on."""
    method, step, counted = CASES[case](ends), Step.__call__, []

    def noted(self: Any, *args: Any) -> None:
        needs.noting = True
        step(self, *args)
        needs.noting = False
        counted.append(self.clip)

    with on_meta() as needs:
        needs.noting = False
        own = work(method, device="meta", **options)
        monkeypatch.setattr(Step, "__call__", noted)
        monkeypatch.setattr("ensembler.trainers.optimisers._FUSED", ("meta",))
        method.train(own)
    assert len(counted) >= 8
    assert all(clip > 0 for clip in counted)
    assert not needs.places, needs.places


@pytest.fixture
def on_graphs(monkeypatch) -> Callable[[], int]:
    """Has the trainer capture its steps, by a CUDA graph's rules; how many were replayed since."""
    monkeypatch.setattr(Trainer, "captures", property(lambda self: not self.settings.eager))
    monkeypatch.setattr("ensembler.trainers.trainer.CudaGraph", CpuGraph)
    before = CpuGraph.replays
    return lambda: CpuGraph.replays - before


@pytest.mark.parametrize("network", ["network", "batchnorm", "dropout", "layernorm", "channels_last"])
@pytest.mark.parametrize("case", CASES)
def test_captured_steps_are_the_training_bit_for_bit(case, network, ends, on_graphs):
    """What the host would do in between is not done, what it would choose stays as it was."""
    method = CASES[case](ends)
    if network != "network" and case in ("curve", "complex"):
        pytest.skip("begins from solutions of another network")
    own = {"architecture": f"tests._small:{network}", "epochs": 3}
    eager = method.train(work(method, eager=True, **own))
    assert not on_graphs()
    found = method.train(work(method, **own))
    assert on_graphs() >= 4
    assert torch.equal(found.vertices, eager.vertices)
    assert all(torch.equal(rows, eager.buffers[name]) for name, rows in found.buffers.items())


TRAINED_WITH = {
    "mixed": {"mixup": 0.4, "cutmix": 1.0},
    "smoothed": {"label_smoothing": 0.1, "class_weights": "balanced"},
    "own": {"loss": "tests.test_losses:focal_mean", "mixup": 0.4},
    "policy": {"augmentation": "crop+trivialaugment", "mixup": 0.4, "label_smoothing": 0.1},
}


@pytest.mark.parametrize("given", TRAINED_WITH)
def test_steps_of_every_loss_are_captured_bit_for_bit_and_need_nothing_of_the_host(given, on_graphs, monkeypatch):
    method, own = Simplex(vertices=2, vertex_epochs=2, samples_per_step=2), TRAINED_WITH[given]
    eager = method.train(work(method, eager=True, **own))
    assert not on_graphs()
    found = method.train(work(method, **own))
    assert on_graphs() >= 4
    assert torch.equal(found.vertices, eager.vertices)
    if given == "policy":
        return  # it is computed on the CPU, before the step
    step = Step.__call__

    def noted(self: Any, *args: Any) -> None:
        needs.noting = True
        step(self, *args)
        needs.noting = False

    with on_meta() as needs:
        needs.noting = False
        trainer_on_meta = work(method, device="meta", eager=True, **own)
        monkeypatch.setattr(Step, "__call__", noted)
        monkeypatch.setattr("ensembler.trainers.optimisers._FUSED", ("meta",))
        method.train(trainer_on_meta)
    assert not needs.places, needs.places


@pytest.mark.parametrize("case", ["single", "volume", "joint subspace"])
def test_captured_steps_are_the_training_with_groups_parts_and_warm_up(case, ends, on_graphs):
    own = {"architecture": "tests._small:batchnorm", "epochs": 3, "optimiser": "adamw", "lr": 0.01, "warmup": 0.5}
    own |= {"accumulate": 2, "parameter_groups": "tests.test_optimisers:halves"}
    method = CASES[case](ends)
    eager, found = (method.train(work(method, eager=way, **own)) for way in (True, False))
    assert on_graphs() >= 4
    assert torch.equal(found.vertices, eager.vertices)


def test_a_compiled_network_is_captured_for_each_size_of_a_batch(on_graphs, monkeypatch):
    """20 images are two batches of 8 and one of 4. Of each size, three steps are computed, which also compile it."""
    compiled, sizes, compile_ = [], [], torch.nn.Module.compile

    def compiling(module: torch.nn.Module, **options: Any) -> None:
        def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            sizes.extend(len(each) for each in inputs if isinstance(each, Tensor) and each.shape[1:] == (3, 8, 8))
            assert not any(isinstance(each, torch.SymInt | int) for each in inputs), "a size that is not fixed"
            return graph.forward

        compiled.append(options)
        compile_(module, backend=backend, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compiling)
    found = []
    for own in ({"eager": True}, {"compile": True, "eager": True}, {"compile": True}):
        before = on_graphs()
        data = trainer(dataset(train=20), {}, architecture="tests._small:batchnorm", epochs=6, measure="none", **own)
        found.append(DeepEnsemble(members=1).train(data).vertices)
    assert compiled == [{"dynamic": False}] * 2
    assert sizes == [8, 4] * 2
    assert on_graphs() - before == 18 - 2 * WARM_UP
    assert torch.equal(found[2], found[1])
    torch.testing.assert_close(found[1], found[0])


def train_loop(
    make: Callable[[list[Tensor]], torch.optim.Optimizer],
    precision: torch.dtype,
    graph: Callable[[], Graph] | None,
    schedule: Callable[[int], float] = lambda iteration: 0.1 / iteration,
) -> list[Tensor]:
    """20 steps of a simplex's vertex on batches of two sizes: its vertices and buffers.

    In graphs, gradients are gathered as on a GPU; without, they are added one by one as on a CPU.
    """
    torch.manual_seed(0)
    weights = FlatWeights(small_batchnorm(3), gather=graph is not None)
    vertices = weights.vector + 0.01 * torch.randn(3, len(weights), generator=torch.Generator().manual_seed(0))
    regulariser = volume_regulariser(vertices[:-1], vertices[-1], 0.01, weights.vector)
    plan = Plan(schedule, 20, trainable=[2], draw=lambda rng, count: dirichlet(count, 3, rng), regulariser=regulariser)
    batches = [*random_batches(2), *random_batches(1, size=4)]
    fitted = fit(weights, vertices, batches, plan, make, clip=1.0, precision=precision, graph=graph)
    return [fitted.vertices, *fitted.buffers.values()]


OPTIMISERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "SGD": lambda moving: torch.optim.SGD(moving, 0.1, fused=True),
    "Nesterov": lambda moving: torch.optim.SGD(moving, 0.1, 0.9, weight_decay=1e-3, nesterov=True, fused=True),
    "Adam": lambda moving: torch.optim.Adam(moving, 0.1, fused=True),
    "AdamW": lambda moving: torch.optim.AdamW(moving, 0.1, weight_decay=0.1, fused=True),
    "Adagrad": lambda moving: torch.optim.Adagrad(moving, 0.1, fused=True),
}


@pytest.mark.parametrize(
    ("optimiser", "precision"),
    [
        pytest.param(name, precision, marks=NEWER if (name, precision) == ("Adagrad", torch.float16) else ())
        for name in OPTIMISERS
        for precision in (torch.float32, torch.bfloat16, torch.float16)
    ],
)
def test_captured_steps_are_the_eager_ones_with_every_optimiser_and_precision(optimiser, precision):
    before, make = CpuGraph.replays, OPTIMISERS[optimiser]
    eager, found = (train_loop(make, precision, graph) for graph in (None, CpuGraph))
    assert CpuGraph.replays == before + 20 - 2 * WARM_UP  # each size of a batch has a graph of its own
    assert all(torch.equal(one, other) for one, other in zip(found, eager, strict=True))


def test_a_rate_that_the_host_chooses_would_be_found(monkeypatch):
    """The check is one: a step that takes its rate from the host differs, as the graph keeps the first."""
    call = Step.__call__

    def by_the_host(self: Any, size: int, x: Tensor, y: Tensor, rate: Tensor, *given: Any) -> None:
        count[0] += 1
        call(self, size, x, y, torch.full((), 0.1 / count[0]), *given)

    monkeypatch.setattr(Step, "__call__", by_the_host)
    found = []
    for graph in (None, CpuGraph):
        count = [0]
        found.append(train_loop(OPTIMISERS["Nesterov"], torch.float32, graph)[0])
    assert not torch.equal(*found)


@pytest.mark.parametrize(("network", "why"), [("reads_a_value", "reads a value"), ("drops_a_layer", "generator")])
def test_what_cannot_be_captured_is_trained_as_it_is_and_said_once(network, why, on_graphs):
    method, said = DeepEnsemble(members=1), []
    own = work(method, architecture=f"tests._small:{network}")
    own.on_event = lambda event: said.append(event.text) if isinstance(event, Message) else None
    found = method.train(own)
    assert not on_graphs()
    (sentence,) = (text for text in said if "captured" in text)
    assert sentence.startswith("a step of this training cannot be captured as a CUDA graph, and is not: ")
    assert why in sentence
    eager = method.train(work(method, architecture=f"tests._small:{network}", eager=True))
    assert torch.equal(found.vertices, eager.vertices)


def test_a_backward_pass_that_fails_in_a_capture_leaves_no_gradient_behind():
    """The step is done again as it is: gradients of the failed one would count twice."""

    def train_reading(graph: Callable[[], Graph] | None) -> tuple[Tensor, list[str]]:
        torch.manual_seed(0)
        module, said = small_batchnorm(3), []
        module.body[0].bias.register_hook(lambda gradient: gradient * (gradient.sum().item() < 1e9))
        weights = FlatWeights(module, gather=graph is not None)
        plan = Plan(constant(0.1), 6)
        options = {"graph": graph, "say": said.append}
        fitted = fit(weights, weights.vector[None].clone(), random_batches(1), plan, OPTIMISERS["SGD"], **options)
        return fitted.vertices, said

    (found, said), (expected, _) = train_reading(CpuGraph), train_reading(None)
    assert len(said) == 1
    assert torch.equal(found, expected)


def operations(steps: Callable[[int], Any]) -> int:
    """How many operations a step takes, of those that ``steps(n)`` does beside what it does once."""

    def count(n: int) -> int:
        with Operations() as found:
            steps(n)
        return found.counts.total()

    return round((count(6) - count(3)) / 3)


def by_hand(architecture: str, batch: tuple[Tensor, Tensor], steps: int) -> None:
    """A training loop as one writes it."""
    module = build(architecture, 10).train()
    optimiser = torch.optim.SGD(module.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True, fused=True)
    for _ in range(steps):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(module(batch[0]), batch[1]).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()


def in_a_simplex(architecture: str, batch: tuple[Tensor, Tensor], K: int, steps: int) -> None:
    """The package's loop as on a GPU, one of K vertices moving; K = 1 is a single network."""
    weights = FlatWeights(build(architecture, 10), gather=True)
    vertices = weights.vector + 0.01 * torch.randn(K, len(weights))
    plan = Plan(constant(0.1), steps, trainable=[K - 1])
    if K > 1:
        regulariser = volume_regulariser(vertices[:-1], vertices[-1], 0.01, weights.vector)
        plan = replace(plan, draw=lambda rng, count: dirichlet(count, K, rng), regulariser=regulariser)
    fit(weights, vertices, [batch] * 20, plan, fused, clip=1.0)


@pytest.mark.parametrize("architecture", ["cnn", "resnet20"])
def test_a_step_has_no_operation_for_every_parameter_that_one_written_by_hand_has_not(architecture):
    """Each is a kernel's launch on a GPU, where a small network waits for those.

    A step beyond the plain one writes the weights, sums the loss and the accuracy and gathers the gradients (12); the
    volume of a simplex takes 19 more. In return, BatchNorm layers' counters are counted at once.
    """
    batch = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    given = architecture, batch
    layers = len(batchnorm_layers(build(architecture, 10)))
    plain, *own = map(operations, (partial(by_hand, *given), *(partial(in_a_simplex, *given, K) for K in (1, 4))))
    print(f"{architecture}: {plain} operations by hand, {own[0]} with K = 1, {own[1]} with K = 4")
    assert own[0] <= plain + 12 - layers + (layers > 0)
    assert own[1] <= plain + 31 - layers + (layers > 0)


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
    with pytest.raises(RuntimeError, match="reads a value"), Recorder():
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
