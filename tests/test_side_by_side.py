"""Members trained side by side against the same members trained one after the other."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ensembler.architectures import build
from ensembler.errors import DivergedError, UsageError
from ensembler.trainers import Session, Settings, side_by_side, train_deep_ensemble
from ensembler.trainers.checkpoints import Checkpoints
from ensembler.trainers.schedules import constant
from ensembler.weights import FlatWeights
from tests._small import SETTINGS, WithBatchNorm, dataset, network

HERE = "tests.test_side_by_side"


class Counting(WithBatchNorm):
    """Its buffers are another tensor after each pass; its first layer is not trained."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.body[0].requires_grad_(False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen = 0.5 * self.seen + x.detach().mean()
        return super().forward(x) + self.seen


class Branching(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = network(num_classes)

    def forward(self, x):
        logits = self.body(x)
        return logits if logits.sum() > 0 else -logits


def counting(num_classes: int) -> nn.Module:
    return Counting(num_classes)


def branching(num_classes: int) -> nn.Module:
    return Branching(num_classes)


def session(checkpoints=None, watch=lambda part, epoch, epochs: None, **changes):
    settings = {"epochs": 3, "augmentation": "crop", "clip": 0.5, "weight_decay": 0.01}
    return Session(dataset(), Settings(**(SETTINGS | settings | changes)), watch=watch, checkpoints=checkpoints)


def booked(run):
    return [(name, p.example_passes, p.forward_passes) for name, p in run.manifest.cost.parts.items()]


def assert_close(one, other, atol):
    for kind in ("vertices", "buffers"):
        left, right = getattr(one, kind), getattr(other, kind)
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            torch.testing.assert_close(tensor, right[name], rtol=0, atol=atol)


class Stream:
    """Random batches, the last one of each epoch smaller."""

    per_epoch = 3

    def __init__(self, seed, dtype=torch.float64):
        self.generator, self.dtype, self.taken = torch.Generator().manual_seed(seed), dtype, 0

    def __next__(self):
        self.taken += 1
        self.whole = size = 2 if self.taken % 3 == 0 else 5
        x = torch.randn(size, 3, 8, 8, generator=self.generator, dtype=self.dtype)
        return x, torch.randint(3, (size,), generator=self.generator)


def sgd(moving):
    return torch.optim.SGD(moving, lr=1.0, momentum=0.9, weight_decay=1e-2, nesterov=True)


@pytest.mark.parametrize(
    ("architecture", "clip"), [("tests._small:network", 2.0), ("tests._small:batchnorm", 2.0), ("resnet20", 6.0)]
)
def test_each_member_is_plain_training_with_a_clipped_gradient(architecture, clip):
    modules = [build(architecture, 3, seed).double() for seed in range(3)]
    weights = [FlatWeights(copy.deepcopy(module)) for module in modules]
    vertices = torch.stack([w.vector for w in weights])
    buffers = {name: torch.stack([w.buffers()[name] for w in weights]) for name in weights[0].buffers()}
    epochs = []
    before = weights[0].vector.clone()
    buffers = side_by_side.train(
        weights[0],
        vertices,
        buffers,
        [Stream(g) for g in range(3)],
        sgd,
        lambda i: 0.1 / i,
        7,
        clip=clip,
        on_epoch=lambda g, epoch: epochs.append((g, epoch)),
    )
    assert torch.equal(weights[0].vector, before), "the network's own weights are left alone"
    assert [(g, epoch.number, epoch.examples) for g, epoch in epochs] == [
        (g, number, examples) for number, examples in ((1, 12), (2, 12), (3, 5)) for g in range(3)
    ]
    norms = []
    for g, module in enumerate(modules):
        optimiser, stream = sgd(module.parameters()), Stream(g)
        for i in range(1, 8):
            optimiser.param_groups[0]["lr"] = 0.1 / i
            optimiser.zero_grad()
            x, y = next(stream)
            logits = module(x)
            loss = torch.nn.functional.cross_entropy(logits, y)
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(module.parameters(), clip).item())
            optimiser.step()
        (last,) = (epoch for member, epoch in epochs if member == g and epoch.number == 3)
        assert last.loss == pytest.approx(loss.item(), rel=1e-5)
        assert last.accuracy == pytest.approx((logits.argmax(1) == y).double().mean().item())
        for name, parameter in module.named_parameters():
            found = weights[0].unflatten(vertices)[name][g]
            torch.testing.assert_close(found, parameter.detach(), rtol=0, atol=1e-6)
        for name, buffer in module.named_buffers():
            torch.testing.assert_close(buffers[name][g], buffer, rtol=0, atol=1e-6)
    assert min(norms) < clip < max(norms), "some gradients are clipped, and some not"


@pytest.mark.parametrize(
    ("architecture", "options", "atol"),
    [
        ("tests._small:network", {}, 1e-5),
        ("tests._small:batchnorm", {}, 1e-5),
        (f"{HERE}:counting", {}, 1e-5),
        ("cnn", {}, 1e-5),
        ("tests._small:network", {"clip": None, "momentum": 0.0, "weight_decay": 0.0}, 1e-5),
        ("tests._small:batchnorm", {"precision": "bfloat16"}, 1e-2),
        ("cnn", {"precision": "bfloat16"}, 1e-2),
    ],
)
def test_the_members_are_those_trained_one_after_the_other(architecture, options, atol):
    runs = [train_deep_ensemble(session(architecture=architecture, **options), 3, parallel=p) for p in (1, 3)]
    assert_close(*runs, atol)
    one, other = (run.manifest for run in runs)
    assert booked(runs[0]) == booked(runs[1]) == [(f"solution {n}", 90, 0) for n in (1, 2, 3)]
    assert one.cost.example_passes == other.cost.example_passes == 270
    assert (one.method, one.members, one.parameters) == (other.method, other.members, other.parameters)
    assert torch.equal(runs[0].coefficients, runs[1].coefficients)
    assert (one.options.pop("parallel_members"), other.options.pop("parallel_members")) == (1, 3)
    assert one.options == other.options
    for part in one.cost.parts:
        for left, right in zip(*([r for r in run.history if r["part"] == part] for run in runs), strict=True):
            assert [left[name] for name in ("number", "rate", "examples")] == [
                right[name] for name in ("number", "rate", "examples")
            ]
            assert left["loss"] == pytest.approx(right["loss"], abs=10 * atol)


def test_bfloat16_is_honoured():
    one, other = (
        train_deep_ensemble(session(architecture="cnn", precision=precision), 2, parallel=2)
        for precision in ("float32", "bfloat16")
    )
    differences = [(one.vertices[name] - other.vertices[name]).abs().max().item() for name in one.vertices]
    assert 1e-5 < max(differences) < 1e-1


def test_groups_of_so_many_and_the_rest_alone_keep_their_names_and_numbers(tmp_path):
    told = []
    work = session(Checkpoints(tmp_path / "x.unfinished"), lambda part, epoch, epochs: told.append((part, epochs)))
    run = train_deep_ensemble(work, members=5, parallel=2)
    kept = sorted(path.name for path in (tmp_path / "x.unfinished").glob("[0-9p]*"))
    assert kept == ["piece-0000", "piece-0001", "piece-0002"]
    assert [name for name, _, _ in booked(run)] == [f"solution {n}" for n in range(1, 6)]
    assert told == [(f"solution {n}", 3) for group in ((1, 2), (3, 4), (5,)) for _ in range(3) for n in group]
    assert_close(run, train_deep_ensemble(session(), members=5), atol=1e-5)
    seconds = [part.seconds for part in run.manifest.cost.parts.values()]
    assert seconds[0] == pytest.approx(seconds[1], abs=0.02)
    assert sum(seconds) <= run.manifest.cost.seconds + 0.01


def test_more_at_a_time_than_there_are_is_all_of_them_and_none_is_refused():
    assert_close(train_deep_ensemble(session(), members=2, parallel=9), train_deep_ensemble(session(), members=2), 1e-5)
    assert train_deep_ensemble(session(), members=1, parallel=4).manifest.method == "single"
    with pytest.raises(UsageError, match="at least one member is trained at a time, not 0"):
        train_deep_ensemble(session(), parallel=0)


def test_each_member_has_dropout_masks_of_its_own_from_the_seed():
    weights = FlatWeights(build("tests._small:noisy", 3))
    vertices = weights.vector.repeat(2, 1)
    buffers = {name: torch.stack([buffer] * 2) for name, buffer in weights.buffers().items()}
    streams = [Stream(0, torch.float32) for _ in range(2)]
    side_by_side.train(weights, vertices, buffers, streams, sgd, constant(0.1), 2)
    assert not torch.allclose(vertices[0], vertices[1]), "alike but for dropout"
    one, other = (train_deep_ensemble(session(architecture="tests._small:noisy"), 2, parallel=2) for _ in range(2))
    assert all(torch.equal(rows, other.vertices[name]) for name, rows in one.vertices.items())


def test_a_network_that_cannot_is_told_how_it_can():
    with pytest.raises(UsageError, match=r"leave --parallel-members out \(vmap: .* data-dependent control flow"):
        train_deep_ensemble(session(architecture=f"{HERE}:branching"), members=2, parallel=2)


def test_divergence_is_said():
    with pytest.raises(DivergedError, match=r"the training loss is .* in epoch .: lower the learning rate"):
        train_deep_ensemble(session(rate=1e30, clip=None, epochs=6), members=2, parallel=2)
