"""What is chosen around a simplex, complexes and joint subspaces, each against one written out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from ensembler.architectures import build
from ensembler.datasets import normalise
from ensembler.ensemble import Ensemble, sample_coefficients
from ensembler.errors import DataError, UsageError
from ensembler.run import Run, Sampling
from ensembler.subspace import log_volume
from ensembler.trainers import (
    Session,
    Settings,
    train_complex,
    train_deep_ensemble,
    train_simplex,
    train_subspace,
)
from ensembler.trainers.complex import Volumes, by_volume
from ensembler.trainers.loop import train
from ensembler.trainers.schedules import constant
from ensembler.trainers.simplex import LADDER, apart
from ensembler.trainers.subspace import towards_right_angles
from ensembler.uncertainty import disagreement
from ensembler.weights import FlatWeights
from tests._small import SETTINGS, dataset
from tests.test_trainers import Repeated, passes, random_batches, same


def session(said=None, **changes):
    init, data = changes.pop("init", None), changes.pop("dataset", dataset())
    say = (lambda line: None) if said is None else said.append
    return Session(data, Settings(**(SETTINGS | changes)), init, say=say)


def flat(run: Run) -> torch.Tensor:
    return torch.cat([rows.flatten(1) for rows in run.vertices.values()], dim=1)


# --- members ---


def test_the_first_members_are_the_vertices_in_turn_of_the_simplexes():
    sampling = Sampling(simplexes=[[0, 1, 2], [3, 4, 5]], concentration=1.0, corners=True)
    coefficients = sample_coefficients(sampling, 6, 9, seed=0)
    assert torch.equal(coefficients[:6], torch.eye(6)[[0, 3, 1, 4, 2, 5]])
    for row, inside in zip(coefficients[6:], ([0, 1, 2], [3, 4, 5], [0, 1, 2]), strict=True):
        assert (row[inside] > 0).all()
        assert row.sum().item() == pytest.approx(1) == row[inside].sum().item()
    assert torch.equal(sample_coefficients(sampling, 6, 3, seed=0), torch.eye(6)[[0, 3, 1]])


def test_shared_vertices_are_members_once_and_simplexes_come_by_their_weights():
    simplexes = [[0, 2], [1, 2]]
    corners = Sampling(simplexes=simplexes, concentration=1.0, corners=True, weights=[0.25, 0.75])
    assert torch.equal(sample_coefficients(corners, 3, 3, seed=0), torch.eye(3))
    drawn = Sampling(simplexes=simplexes, concentration=1.0, weights=[0.25, 0.75])
    coefficients = sample_coefficients(drawn, 3, 4000, seed=0)
    assert ((coefficients[:, 1] > 0).double().mean() - 0.75).abs() < 0.03
    assert ((coefficients[:, 0] > 0) ^ (coefficients[:, 1] > 0)).all()


def test_a_run_of_the_first_format_is_still_read():
    from pathlib import Path

    run = Run.load(Path(__file__).parent / "data" / "run-format-1")
    cost = run.manifest.cost
    assert run.manifest.format == 1
    assert passes(run) == {"solution 1": 24, "vertex 2": 12}
    assert (cost.example_passes, cost.forward_passes, cost.peak_memory) == (36, 24, None)
    assert cost.parts["vertex 2"].seconds is None
    assert run.manifest.sampling.corners is False
    assert Ensemble(run, "cpu").predict_members(dataset().test.images).shape == (2, 15, 3)


# --- distance in function space ---


def distance(p, q):
    """Hellinger's, for each image, from its definition."""
    return torch.tensor([sum((math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in zip(x, y, strict=True)) for x, y in
                         zip(p.tolist(), q.tolist(), strict=True)])  # fmt: skip


def test_the_penalty_is_minus_lambda_log_distance():
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(5, 3, generator=generator) for _ in range(2))
    squared = distance(torch.softmax(one, 1), torch.softmax(other, 1)).mean().item()
    assert apart(0.3)(one, other).item() == pytest.approx(-0.3 * math.log(math.sqrt(squared + 1e-4)), rel=1e-4)
    assert apart(0.3)(one, one).item() == pytest.approx(-0.3 * math.log(1e-2), rel=1e-3)


def test_a_step_apart_is_autograd_through_the_first_point_alone():
    weights = FlatWeights(build("tests._small:network", 3))
    generator = torch.Generator().manual_seed(1)
    start = weights.vector + 0.3 * torch.randn(3, len(weights), generator=generator)
    (batch,) = random_batches(1)
    points = torch.softmax(torch.randn(2, 3, generator=generator), dim=1)
    module = build("tests._small:network", 3)

    def logits(vertex, c):
        rows = weights.unflatten(start)
        member = {name: c[0] * rows[name][0] + c[1] * rows[name][1] + c[2] * vertex[name] for name in rows}
        return torch.func.functional_call(module, member, batch[0])

    def gradient(detach):
        vertex = {name: rows[2].clone().requires_grad_() for name, rows in weights.unflatten(start).items()}
        first, second = logits(vertex, points[0]), logits(vertex, points[1])
        term = apart(0.2)(first, second.detach() if detach else second)
        (term if not detach else term + cross_entropy(first, batch[1])).backward()
        return weights.flatten({name: leaf.grad[None] for name, leaf in vertex.items()})[0]

    vertices, drawn = start.clone(), iter(points[:, None])
    plain = lambda moving: torch.optim.SGD(moving, lr=1.0)  # noqa: E731
    train(
        weights,
        vertices,
        Repeated(batch),
        plain,
        constant(1.0),
        1,
        trainable=[2],
        draw=lambda S: next(drawn),
        penalty=apart(0.2),
    )
    torch.testing.assert_close(start[2] - vertices[2], gradient(detach=True), rtol=1e-4, atol=1e-6)
    # The two halves, each through one point, are the whole.
    whole = gradient(detach=False)
    points = points.flip(0)
    torch.testing.assert_close(whole, gradient(detach=False), rtol=1e-4, atol=1e-6)


def test_the_function_regulariser_moves_predictions_apart():
    far, near = (
        train_simplex(session(epochs=4), vertices=3, regulariser="function", regularisation=strength, vertex_epochs=4)
        for strength in (0.3, 0.0)
    )
    x = dataset().test.images
    spread = [Ensemble(run, "cpu").predict_members(x)[:3].std(dim=0).mean().item() for run in (far, near)]
    assert spread[0] > 1.5 * spread[1]


# --- the largest simplex that fits ---


def test_auto_bisects_to_the_largest_lambda_that_fits():
    said = []
    everything = train_simplex(session(said), vertices=3, regularisation="auto", tolerance=1e9)
    assert everything.manifest.metrics["lambda"] == LADDER[-1]
    tried = [trial["lambda"] for trial in everything.manifest.metrics["trials"]]
    assert tried == [LADDER[3], LADDER[5], LADDER[6]]
    assert passes(everything) == {"solution 1": 60, "vertex 2": 3 * 16, "vertex 3": 16}
    assert [line.split(":")[0] for line in said[:3]] == [f"lambda {strength:g}" for strength in tried]
    # What was chosen is what the same lambda, given, makes.
    assert same(everything, train_simplex(session(), vertices=3, regularisation=LADDER[-1]))


def test_auto_keeps_what_fits_and_refuses_what_does_not():
    run = train_simplex(session(epochs=6), vertices=2, regularisation="auto", vertex_epochs=3)
    limits = {trial["limit"] for trial in run.manifest.metrics["trials"]}
    solution = train_deep_ensemble(session(epochs=6), members=1)
    validation = dataset().validation
    p = Ensemble(solution, "cpu").predict_proba(validation.images)
    nll = -p.gather(1, validation.labels[:, None]).log().mean().item()
    assert len(limits) == 1
    assert limits.pop() == pytest.approx(1.02 * nll, rel=1e-4)
    for trial in run.manifest.metrics["trials"]:
        assert (trial["held_out_nll"] <= trial["limit"]) == (trial["lambda"] <= run.manifest.metrics["lambda"])


def test_auto_without_a_lambda_that_fits_does_not_regularise(monkeypatch):
    monkeypatch.setattr("ensembler.trainers.simplex.LADDER", (1e6, 1e7))
    said = []
    run = train_simplex(session(said), vertices=2, regularisation="auto", vertex_epochs=1)
    assert run.manifest.metrics["lambda"] == 0
    assert any("no lambda of the ladder fits" in line for line in said)
    assert same(run, train_simplex(session(), vertices=2, regularisation=0.0, vertex_epochs=1))


def test_a_trial_that_diverges_is_too_much_and_the_run_is_saved(monkeypatch, tmp_path):
    monkeypatch.setattr("ensembler.trainers.simplex.LADDER", (1e-3, 1e38))
    path = train_simplex(session(), vertices=2, regularisation="auto", tolerance=1e9).save(tmp_path / "run")
    trials = Run.load(path).manifest.metrics["trials"]
    assert {trial["lambda"]: trial["held_out_nll"] for trial in trials}[1e38] is None
    assert Run.load(path).manifest.metrics["lambda"] == 1e-3


def test_what_is_said_of_a_simplex_is_what_its_members_do():
    said, images = [], dataset()
    run = train_simplex(session(said), vertices=3, members=3, vertex_epochs=1)
    (found,) = run.manifest.metrics["simplexes"]
    ensemble = Ensemble(run, "cpu")
    probabilities = ensemble.predict_members(images.validation.images)
    losses = [-p.gather(1, images.validation.labels[:, None]).log().mean().item() for p in probabilities]
    assert found["held_out_nll"]["vertices"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert found["disagreement"]["vertices"] == pytest.approx(disagreement(probabilities.numpy()).mean(), abs=1e-6)
    centroid = ensemble.at(torch.full((1, 3), 1 / 3)).predict_members(images.train.images)[0]
    loss = -centroid.gather(1, images.train.labels[:, None]).log().mean().item()
    assert found["train_loss"]["centroid"] == pytest.approx(loss, rel=1e-4)
    assert found["log_volume"] == pytest.approx(log_volume(flat(run)).item(), abs=1e-5)
    assert [line.split(":")[0] for line in said] == ["simplex of 2 vertices", "simplex of 3 vertices"]
    assert "disagreement" in said[0]
    assert len(run.manifest.metrics["growth"]) == 2


# --- joint subspaces ---


def test_right_angles_are_autograd_of_beta_squared_cosine():
    generator = torch.Generator().manual_seed(0)
    vertices = torch.randn(3, 20, generator=generator, dtype=torch.float64)
    add = towards_right_angles(vertices, 0.7, np.random.default_rng(4))
    pairs = np.random.default_rng(4)
    for _ in range(5):
        gradients = torch.ones(3, 20, dtype=torch.float64)
        add(gradients)
        leaf = vertices.clone().requires_grad_()
        j, k = pairs.choice(3, 2, replace=False)
        (0.7 * torch.cosine_similarity(leaf[j], leaf[k], dim=0) ** 2).backward()
        torch.testing.assert_close(gradients - 1, leaf.grad)
    assert towards_right_angles(vertices, 0.0, pairs) is None


def test_a_joint_subspace_costs_one_network_and_starts_from_independent_weights():
    run = train_subspace(session(), vertices=3, members=5)
    assert passes(run) == {"subspace": 60}
    assert run.manifest.method == "subspace"
    assert torch.equal(run.coefficients[:3], torch.eye(3))
    work = session()
    beginnings = torch.stack([work.fresh(k).vector for k in range(3)])
    still = train_subspace(session(rate=1e-30, weight_decay=0.0), vertices=3, beta=0.0)
    torch.testing.assert_close(work.weights.flatten(still.vertices), beginnings * math.sqrt(2))
    assert Ensemble(run, "cpu").sample(4).members == 4
    for wrong, message in (({"vertices": 1}, "at least 2 vertices"), ({"beta": -1.0}, "beta must not be negative")):
        with pytest.raises(UsageError, match=message):
            train_subspace(session(), **wrong)
    with pytest.raises(UsageError, match="starts from fresh weights"):
        train_subspace(session(init=run))


def test_beta_keeps_the_vertices_of_a_subspace_at_right_angles():
    cosines = []
    for beta in (0.0, 10.0):
        V = flat(train_subspace(session(epochs=10), vertices=2, beta=beta))
        cosines.append(torch.cosine_similarity(V[0], V[1], dim=0).abs().item())
    assert cosines[1] < 0.5 * cosines[0]


# --- complexes ---


@pytest.fixture(scope="module")
def modes():
    return [train_deep_ensemble(session(seed=seed, epochs=6), members=1) for seed in range(3)]


def test_shares_are_those_of_the_volumes():
    vertices = torch.randn(5, 60, generator=torch.Generator().manual_seed(0))
    simplexes = [[0, 3, 4], [1, 3, 4], [2, 3, 4]]
    volumes = Volumes(vertices, simplexes)
    for _ in range(2):
        expected = torch.softmax(torch.stack([log_volume(vertices[simplex]) for simplex in simplexes]), 0)
        np.testing.assert_allclose(volumes.shares(), expected.numpy(), rtol=1e-4)
        vertices[4] += 3 * torch.randn(60, generator=torch.Generator().manual_seed(1))  # the last one may move
    flat = torch.ones(4, 10)
    np.testing.assert_allclose(Volumes(flat, [[0, 3], [1, 3]]).shares(), [0.5, 0.5])


def test_simplexes_are_drawn_by_volume_and_points_uniformly():
    vertices = torch.zeros(4, 10)
    vertices[0, 0], vertices[1, 1], vertices[2, 2] = 3.0, 1.0, 1.0  # edges to vertex 3: 3, 1 and 1 long
    draw = by_volume(Volumes(vertices, [[0, 3], [1, 3], [2, 3]]), np.random.default_rng(0))
    points = torch.cat([draw(3) for _ in range(1000)])
    assert ((points[:, :3] > 0).sum(1) == 1).all()
    shares = (points[:, :3] > 0).double().mean(0)
    torch.testing.assert_close(shares, torch.tensor([0.6, 0.2, 0.2]).double(), atol=0.03, rtol=0)
    assert (points[:, 3].mean() - 0.5).abs() < 0.02


def test_a_complex_joins_its_modes_and_leaves_them_as_they_are(modes):
    said = []
    run = train_complex(session(said, epochs=20), modes, connectors=2, members=8, points=5)
    for name, rows in run.vertices.items():
        for i, mode in enumerate(modes):
            assert torch.equal(rows[i], mode.vertices[name][0])
    assert run.manifest.sampling.simplexes == [[0, 3, 4], [1, 3, 4], [2, 3, 4]]
    volumes = torch.stack([log_volume(flat(run)[simplex]) for simplex in run.manifest.sampling.simplexes])
    assert run.manifest.sampling.weights == pytest.approx(torch.softmax(volumes, 0).tolist(), rel=1e-3)
    assert torch.equal(run.coefficients[:5], torch.eye(5)[[0, 1, 2, 3, 4]])
    assert [name for name, n in passes(run).items() if n == 600] == ["connector 1", "connector 2"]
    assert run.manifest.cost.example_passes == 3 * 180 + 2 * 600
    paths = run.manifest.metrics["paths"]
    assert [path["name"] for path in paths] == ["mode 1 to mode 2", "mode 1 to mode 3", "mode 2 to mode 3"]
    ends = [Ensemble(mode, "cpu").predict_members(dataset().test.images)[0] for mode in modes]
    errors = [(p.argmax(1) != dataset().test.labels).double().mean().item() for p in ends]
    for path, (i, j) in zip(paths, ((0, 1), (0, 2), (1, 2)), strict=True):
        for way in ("line", "complex"):
            assert path[way]["test_error"][0] == pytest.approx(errors[i])
            assert path[way]["test_error"][-1] == pytest.approx(errors[j])
        assert path["complex"]["highest_train_loss"] == max(path["complex"]["train_loss"]) < 0.1
    middle = Ensemble(run, "cpu").at(torch.tensor([[0, 0, 0, 0.5, 0.5]])).predict_members(dataset().train.images)[0]
    loss = -middle.gather(1, dataset().train.labels[:, None]).log().mean().item()
    assert [path["complex"]["train_loss"][2] for path in paths] == pytest.approx([loss] * 3, rel=1e-3)
    assert len(said) == 3


def test_a_connector_feels_the_volume_of_every_simplex(modes):
    generator = torch.Generator().manual_seed(0)
    fixed = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    connector = fixed.mean(0) + 100
    gradients = torch.zeros(1, 40, dtype=torch.float64)
    volumes = Volumes(torch.cat([fixed, connector[None]]), [[0, 3], [1, 3], [2, 3]])
    volumes.towards(0.5, torch.empty(40, dtype=torch.float64))(gradients)
    leaf = connector.clone().requires_grad_()
    (-0.5 * sum((leaf - fixed[i]).norm().log() for i in range(3))).backward()
    torch.testing.assert_close(gradients[0], leaf.grad, rtol=1e-3, atol=1e-9)


def test_what_cannot_be_a_complex_is_refused(modes):
    for runs, arguments, message in (
        (modes[:1], {}, "at least 2 runs"),
        (modes, {"connectors": 0}, "at least 1 connector"),
        (modes, {"regularisation": -1.0}, "must not be negative"),
        ([modes[0], modes[1], modes[0]], {}, "modes 1 and 3 are the same solution"),
    ):
        with pytest.raises(UsageError, match=message):
            train_complex(session(), runs, **arguments)
    with pytest.raises(DataError, match="training images differ"):
        train_complex(session(dataset=dataset(train=33)), modes)


# --- BatchNorm ---


def test_a_member_at_a_vertex_does_what_the_vertex_did_and_needs_statistics_of_its_own():
    images = dataset(train=32)
    work = session(dataset=images, architecture="tests._small:batchnorm", epochs=6)
    single = train_deep_ensemble(work, members=1)
    run = train_simplex(session(dataset=images, init=single), vertices=3, members=6, vertex_rate=0.3)
    x = normalise(images.train.images, images.mean, images.std)
    trained = Ensemble(single, "cpu").predict_members(images.train.images)[0]
    ensemble = Ensemble(run, "cpu")
    at_vertex = ensemble.predict_members(images.train.images)[0]
    assert torch.equal(run.coefficients[0], torch.tensor([1.0, 0.0, 0.0]))
    assert (at_vertex.argmax(1) == trained.argmax(1)).double().mean() > 0.9
    # With the statistics of the first vertex, another member's layer is not normalised at all.
    network = ensemble.network(5)
    batchnorm = network.body[1]
    activations = network.body[0](x)
    own = torch.nn.functional.batch_norm(activations, batchnorm.running_mean, batchnorm.running_var)
    foreign = torch.nn.functional.batch_norm(
        activations, run.buffers["body.1.running_mean"][0], run.buffers["body.1.running_var"][0]
    )
    assert own.mean((0, 2, 3)).abs().max() < 1e-3
    assert foreign.mean((0, 2, 3)).abs().max() > 10 * own.mean((0, 2, 3)).abs().max()
