"""Curves between solutions, and the centroid: bases, the update, what is measured along the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ensembler.ensemble import Ensemble
from ensembler.errors import DataError, UsageError
from ensembler.run import Run
from ensembler.subspace import bezier, chain
from ensembler.trainers import Session, Settings, collapse_run, train_curve, train_deep_ensemble, train_fge
from ensembler.trainers.loop import train
from ensembler.trainers.schedules import constant
from ensembler.weights import FlatWeights
from tests._small import SETTINGS, dataset
from tests.test_trainers import Repeated, random_batches, sgd


def session(**changes):
    init = changes.pop("init", None)
    return Session(changes.pop("dataset", dataset()), Settings(**(SETTINGS | changes)), init)


def test_bases_are_the_papers_formulas_for_one_bend():
    w1, theta, w2 = torch.randn(3, 5, dtype=torch.float64)
    V = torch.stack([w1, theta, w2])
    for t in np.linspace(0, 1, 13):
        at = torch.tensor([t])
        expected = (1 - t) ** 2 * w1 + 2 * t * (1 - t) * theta + t**2 * w2
        torch.testing.assert_close((bezier(at, 3) @ V)[0], expected)
        polygon = 2 * (t * theta + (0.5 - t) * w1) if t <= 0.5 else 2 * ((t - 0.5) * w2 + (1 - t) * theta)
        torch.testing.assert_close((chain(at, 3) @ V)[0], polygon)


@pytest.mark.parametrize("basis", [bezier, chain])
@pytest.mark.parametrize("K", [2, 3, 4, 6])
def test_bases_sum_to_one_and_reach_both_ends(basis, K):
    rows = basis(torch.linspace(0, 1, 21), K)
    assert rows.shape == (21, K)
    assert (rows >= 0).all()
    torch.testing.assert_close(rows.sum(1), torch.ones(21))
    torch.testing.assert_close(rows[[0, -1]], torch.eye(K)[[0, -1]])


@pytest.mark.parametrize("trainable", [[1], [1, 2]])
def test_weight_decay_of_a_curve_acts_on_the_sampled_weights(trainable):
    """Every bend: ``c[k] * d/dw [loss(w) + wd / 2 * |w|^2]`` at ``w = c @ V``."""
    weights = FlatWeights(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3)))
    start = torch.randn(4, len(weights), generator=torch.Generator().manual_seed(0)) / 10
    ((x, y),) = batches = random_batches(1)
    c = torch.tensor([0.1, 0.2, 0.3, 0.4])
    explicit = start.clone().requires_grad_()
    member = c @ explicit
    logits = x.flatten(1) @ member[: 3 * 192].view(3, 192).T + member[3 * 192 :]
    (torch.nn.functional.cross_entropy(logits, y) + 0.01 / 2 * member.square().sum()).backward()
    vertices = start.clone()
    optimiser = lambda moving: torch.optim.SGD(moving, lr=1.0, weight_decay=0.01)  # noqa: E731
    train(
        weights,
        vertices,
        Repeated(*batches),
        optimiser,
        constant(1.0),
        1,
        trainable=trainable,
        draw=lambda samples: c[None],
        decay_sampled=True,
    )
    expected = start.clone()
    expected[trainable] -= explicit.grad[trainable]
    torch.testing.assert_close(vertices, expected, rtol=1e-5, atol=1e-6)
    assert sgd([torch.zeros(1, requires_grad=True)]).defaults["weight_decay"] > 0


@pytest.fixture(scope="module")
def ends():
    return [train_deep_ensemble(session(seed=seed, epochs=6), members=1) for seed in (0, 1)]


@pytest.mark.parametrize("curve", ["bezier", "chain"])
def test_a_curve_joins_the_ends_and_lies_lower_than_the_straight_line(ends, curve):
    run = train_curve(session(epochs=20), *ends, curve=curve, members=3, points=11)
    assert run.manifest.method == f"curve-{curve}"
    for name, rows in run.vertices.items():
        assert torch.equal(rows[[0, 2]], torch.cat([end.vertices[name] for end in ends]))
    line, path = run.manifest.metrics["path"]["line"], run.manifest.metrics["path"]["curve"]
    assert path["highest_train_loss"] == max(path["train_loss"]) < line["highest_train_loss"]
    assert path["t"][5] == 0.5
    for measured in (line, path):
        images = dataset()
        for place, end in ((0, ends[0]), (-1, ends[1])):
            probabilities = Ensemble(end, "cpu").predict_proba(images.test.images)
            error = (probabilities.argmax(1) != images.test.labels).double().mean().item()
            assert measured["test_error"][place] == pytest.approx(error)
    assert path["ensemble_error"][0] == path["test_error"][0]
    parts = {name: part.example_passes for name, part in run.manifest.cost.parts.items()}
    assert parts == {"end 1": 180, "end 2": 180, "curve": 600, "measurements": 0, "members": 0}


def test_the_two_member_ensemble_is_the_mean_of_probabilities(ends):
    run = train_curve(session(), *ends, members=3, points=3)
    members = Ensemble(run, "cpu").predict_members(dataset().test.images)
    for place in range(3):
        mean = (members[0] + members[place]) / 2
        error = (mean.argmax(1) != dataset().test.labels).double().mean().item()
        assert run.manifest.metrics["path"]["curve"]["ensemble_error"][place] == pytest.approx(error)


def test_a_batchnorm_curve_reproduces_its_ends():
    make = lambda seed: train_deep_ensemble(  # noqa: E731
        session(architecture="tests._small:batchnorm", seed=seed, epochs=6, dataset=dataset(train=32)), members=1
    )
    both = [make(0), make(1)]
    work = session(init=both[0], dataset=dataset(train=32))
    run = train_curve(work, *both, members=3, points=3)
    for place, end in ((0, both[0]), (2, both[1])):
        found = Ensemble(run, "cpu").predict_members(dataset().train.images)[place]
        expected = Ensemble(end, "cpu").predict_members(dataset().train.images)[0]
        assert (found - expected).abs().mean() < 0.05
        assert (found.argmax(1) == expected.argmax(1)).double().mean() > 0.9


def test_what_cannot_be_joined_is_refused(ends):
    for arguments, message in (
        ({"curve": "spline"}, "unknown curve 'spline': use one of bezier, chain"),
        ({"bends": 0}, "at least 1 bend"),
        ({"points": 2}, "3 points"),
    ):
        with pytest.raises(UsageError, match=message):
            train_curve(session(), *ends, **arguments)
    with pytest.raises(UsageError, match="both ends are the same solution"):
        train_curve(session(), ends[0], ends[0])
    with pytest.raises(UsageError, match="no weights in common"):
        train_curve(session(architecture="cnn"), *ends)
    with pytest.raises(DataError, match="training images differ"):
        train_curve(session(dataset=dataset(train=33)), *ends)


@pytest.mark.parametrize("architecture", ["tests._small:network", "tests._small:batchnorm"])
def test_the_centroid_is_the_mean_of_the_vertices_with_statistics_of_its_own(architecture, tmp_path):
    work = session(architecture=architecture, dataset=dataset(train=32))
    run = train_fge(work, members=3, cycle=1)
    run.save(tmp_path / "run")
    swa = collapse_run(work, run)
    assert swa.manifest.method == "fge-centroid"
    assert swa.manifest.members == 1
    network = Ensemble(swa, "cpu").network(0)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.detach(), run.vertices[name].mean(0))
    if architecture.endswith("batchnorm"):
        assert not torch.equal(swa.buffers["body.1.running_mean"][0], run.buffers["body.1.running_mean"][-1])
    loaded = Run.load(tmp_path / "run")
    again = collapse_run(session(init=loaded, dataset=dataset(train=32)), loaded)
    for name, part in run.manifest.cost.parts.items():
        assert again.manifest.cost.parts[name] == swa.manifest.cost.parts[name] == part
    assert all(torch.equal(rows, again.buffers[name]) for name, rows in swa.buffers.items())
