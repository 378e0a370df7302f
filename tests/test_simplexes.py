"""What is chosen around a simplex, and complexes, each against one written out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from ensembler.data.datasets import normalise
from ensembler.ensemble import Ensemble
from ensembler.errors import DataError, UsageError
from ensembler.networks.architectures import build
from ensembler.run import Run, Sampling
from ensembler.sampling import sample_coefficients
from ensembler.subspace import log_volume
from ensembler.task import Classification
from ensembler.trainers import Complex, DeepEnsemble, Simplex
from ensembler.trainers.methods.simplex import LADDER
from ensembler.trainers.plan import Plan
from ensembler.trainers.regularisers import Volumes, hellinger_repulsion, volume_regulariser
from ensembler.trainers.schedules import constant
from ensembler.uncertainty import disagreement
from ensembler.weights import FlatWeights
from tests._small import dataset
from tests._training import fit, flat, make, passes, plain, random_batches, same, saved

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


# --- volume ---


def test_the_volume_regulariser_is_autograd_of_minus_lambda_log_volume():
    generator = torch.Generator().manual_seed(0)
    simplex = torch.randn(4, 50, generator=generator, dtype=torch.float64)
    simplex[3] += 100  # so far out that the softening does not count
    gradients = torch.ones(1, 50, dtype=torch.float64)
    volume_regulariser(simplex[:3], simplex[3], 0.3, torch.empty(50, dtype=torch.float64))(gradients, None)
    vertex = simplex[3].clone().requires_grad_()
    edges = torch.stack([*simplex[1:3], vertex]) - simplex[0]
    (-0.3 * torch.logdet(edges @ edges.T) / 2).backward()
    torch.testing.assert_close(gradients[0], 1 + vertex.grad, rtol=1e-4, atol=1e-9)


# --- distance in function space ---


def distance(p, q):
    """Hellinger's, squared, for each image, from its definition."""
    pairs = zip(p.tolist(), q.tolist(), strict=True)
    return torch.tensor([sum((math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in zip(x, y, strict=True)) for x, y in pairs])


def whole_term(strength, squared):
    """``-lambda * log d`` of the root mean square distance, kept finite."""
    return -strength * (squared.mean() + 1e-4).sqrt().log()


def test_the_penalty_through_one_point_is_twice_minus_lambda_log_distance():
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(5, 3, generator=generator) for _ in range(2))
    penalty = hellinger_repulsion(Classification(), 0.3)
    squared = distance(torch.softmax(one, 1), torch.softmax(other, 1))
    assert penalty(one, other).item() == pytest.approx(2 * whole_term(0.3, squared).item(), rel=1e-4)
    assert penalty(one, one).item() == pytest.approx(-0.6 * math.log(1e-2), rel=1e-3)


@pytest.mark.parametrize("samples", [1, 2])
def test_the_penalty_acts_with_the_whole_lambda_in_expectation(samples):
    """Over both orders of the two points, of which each step lets the gradient through the first: by autograd."""
    weights = FlatWeights(build("tests._small:network", 3))
    generator = torch.Generator().manual_seed(1)
    start = weights.vector + 0.3 * torch.randn(3, len(weights), generator=generator)
    (batch,) = random_batches(1)
    first, second = (torch.softmax(torch.randn(samples, 3, generator=generator), dim=1) for _ in range(2))
    module = build("tests._small:network", 3)

    def outputs(vertex, c, x):
        rows = weights.unflatten(start)
        member = {name: c[0] * rows[name][0] + c[1] * rows[name][1] + c[2] * vertex[name] for name in rows}
        return torch.func.functional_call(module, member, x)

    def gradient(term):
        vertex = {name: rows[2].clone().requires_grad_() for name, rows in weights.unflatten(start).items()}
        term(vertex).backward()
        return weights.flatten({name: leaf.grad[None] for name, leaf in vertex.items()})[0]

    def repulsion(vertex):  # mean over the samples, of the same share each
        terms = []
        for c, other, x in zip(first, second, batch[0].chunk(samples), strict=True):
            roots = [torch.softmax(outputs(vertex, point, x), dim=1).sqrt() for point in (c, other)]
            terms.append(whole_term(0.2, (roots[0] - roots[1]).square().sum(1)))
        return sum(terms) / samples

    def loss(points):
        def term(vertex):
            parts = zip(points, batch[0].chunk(samples), batch[1].chunk(samples), strict=True)
            return sum(cross_entropy(outputs(vertex, c, x), y) for c, x, y in parts) / samples

        return term

    def step(points, others):
        """The gradient of one step of the loop, which draws ``points`` first and what they are compared with next."""
        drawn, vertices = iter((points, others)), start.clone()
        penalty = hellinger_repulsion(Classification(), 0.2)
        plan = Plan(
            *(constant(1.0), 1), trainable=[2], draw=lambda rng, count: next(drawn), samples=samples, penalty=penalty
        )
        fit(weights, vertices, [batch], plan, plain)
        return start[2] - vertices[2]

    one, other = step(first, second) - gradient(loss(first)), step(second, first) - gradient(loss(second))
    torch.testing.assert_close((one + other) / 2, gradient(repulsion), rtol=1e-4, atol=1e-6)
    assert (one - other).norm() > 0.1 * one.norm(), "each order is another half"


def test_the_function_regulariser_moves_predictions_apart():
    far, near = (
        make(Simplex(vertices=3, regulariser="function", regularisation=strength, vertex_epochs=4), epochs=4)
        for strength in (0.3, 0.0)
    )
    x = dataset().test.images
    spread = [Ensemble(run, "cpu").predict_members(x)[:3].std(dim=0).mean().item() for run in (far, near)]
    assert spread[0] > 1.5 * spread[1]


# --- the largest simplex that fits ---


def test_auto_bisects_to_the_largest_lambda_that_fits():
    said = []
    everything = make(Simplex(vertices=3, regularisation="auto", tolerance=1e9), said=said)
    assert everything.manifest.metrics["lambda"] == LADDER[-1]
    tried = [trial["lambda"] for trial in everything.manifest.metrics["trials"]]
    assert tried == [LADDER[3], LADDER[5], LADDER[6]]
    assert passes(everything) == {"solution 1": 60, "vertex 2": 3 * 16, "vertex 3": 16}
    assert [line.split(":")[0] for line in said[:3]] == [f"lambda {strength:g}" for strength in tried]
    # What was chosen is what the same lambda, given, makes.
    assert same(everything, make(Simplex(vertices=3, regularisation=LADDER[-1])))


def test_auto_keeps_what_fits_and_refuses_what_does_not():
    run = make(Simplex(vertices=2, regularisation="auto", vertex_epochs=3), epochs=6)
    limits = {trial["limit"] for trial in run.manifest.metrics["trials"]}
    solution = make(DeepEnsemble(members=1), epochs=6)
    validation = dataset().validation
    p = Ensemble(solution, "cpu").predict_proba(validation.images)
    nll = -p.gather(1, validation.labels[:, None]).log().mean().item()
    assert len(limits) == 1
    assert limits.pop() == pytest.approx(1.02 * nll, rel=1e-4)
    for trial in run.manifest.metrics["trials"]:
        assert (trial["held_out_nll"] <= trial["limit"]) == (trial["lambda"] <= run.manifest.metrics["lambda"])


def test_auto_without_a_lambda_that_fits_does_not_regularise(monkeypatch):
    monkeypatch.setattr("ensembler.trainers.methods.simplex.LADDER", (1e6, 1e7))
    said = []
    run = make(Simplex(vertices=2, regularisation="auto", vertex_epochs=1), said=said)
    assert run.manifest.metrics["lambda"] == 0
    assert "no lambda fits: the simplex is not regularised" in said
    assert same(run, make(Simplex(vertices=2, regularisation=0.0, vertex_epochs=1)))


def test_a_trial_that_diverges_is_too_much_and_the_run_is_saved(monkeypatch, tmp_path):
    monkeypatch.setattr("ensembler.trainers.methods.simplex.LADDER", (1e-3, 1e38))
    path = make(Simplex(vertices=2, regularisation="auto", tolerance=1e9)).save(tmp_path / "run")
    trials = Run.load(path).manifest.metrics["trials"]
    assert {trial["lambda"]: trial["held_out_nll"] for trial in trials}[1e38] is None
    assert Run.load(path).manifest.metrics["lambda"] == 1e-3


def test_what_is_said_of_a_simplex_is_what_its_members_do():
    said, images = [], dataset()
    run = make(Simplex(vertices=3, members=3, vertex_epochs=1), said=said)
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


# --- complexes ---


@pytest.fixture(scope="module")
def modes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modes")
    return [saved(make(DeepEnsemble(members=1), seed=seed, epochs=6), folder / str(seed)) for seed in range(3)]


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


def test_simplexes_are_drawn_by_volume_and_points_are_where_they_were_drawn():
    vertices = torch.zeros(4, 10)
    vertices[0, 0], vertices[1, 1], vertices[2, 2] = 3.0, 1.0, 1.0  # edges to vertex 3: 3, 1 and 1 long
    rng = np.random.default_rng(0)
    points = torch.from_numpy(rng.dirichlet([1, 1], 3000)).float()
    drawn = torch.cat([torch.from_numpy(rng.random((3000, 1))).float(), points], dim=1)
    found = Volumes(vertices, [[0, 3], [1, 3], [2, 3]]).coefficients(drawn)
    assert ((found[:, :3] > 0).sum(1) == 1).all()
    shares = (found[:, :3] > 0).double().mean(0)
    torch.testing.assert_close(shares, torch.tensor([0.6, 0.2, 0.2]).double(), atol=0.03, rtol=0)
    torch.testing.assert_close(found[:, 3], points[:, 1])
    torch.testing.assert_close(found[:, :3].sum(1), points[:, 0])


def test_a_complex_joins_its_modes_and_leaves_them_as_they_are(modes):
    said, runs, images = [], [Run.load(path) for path in modes], dataset()
    run = make(Complex(modes=modes, connectors=2, members=8, points=5), said=said, epochs=20)
    for name, rows in run.vertices.items():
        for i, mode in enumerate(runs):
            assert torch.equal(rows[i], mode.vertices[name][0])
    assert run.manifest.sampling.simplexes == [[0, 3, 4], [1, 3, 4], [2, 3, 4]]
    volumes = torch.stack([log_volume(flat(run)[simplex]) for simplex in run.manifest.sampling.simplexes])
    assert run.manifest.sampling.weights == pytest.approx(torch.softmax(volumes, 0).tolist(), rel=1e-3)
    assert torch.equal(run.coefficients[:5], torch.eye(5)[[0, 1, 2, 3, 4]])
    assert [name for name, n in passes(run).items() if n == 600] == ["connector 1", "connector 2"]
    assert run.manifest.cost.example_passes == 3 * 180 + 2 * 600
    paths = run.manifest.metrics["paths"]
    assert [path["name"] for path in paths] == ["mode 1 to mode 2", "mode 1 to mode 3", "mode 2 to mode 3"]
    ends = [Ensemble(mode, "cpu").predict_members(images.test.images)[0] for mode in runs]
    errors = [(p.argmax(1) != images.test.labels).double().mean().item() for p in ends]
    for path, (i, j) in zip(paths, ((0, 1), (0, 2), (1, 2)), strict=True):
        for way in ("line", "complex"):
            assert path[way]["test_error"][0] == pytest.approx(errors[i])
            assert path[way]["test_error"][-1] == pytest.approx(errors[j])
        assert path["complex"]["highest_train_loss"] == max(path["complex"]["train_loss"]) < 0.1
    middle = Ensemble(run, "cpu").at(torch.tensor([[0, 0, 0, 0.5, 0.5]])).predict_members(images.train.images)[0]
    loss = -middle.gather(1, images.train.labels[:, None]).log().mean().item()
    assert [path["complex"]["train_loss"][2] for path in paths] == pytest.approx([loss] * 3, rel=1e-3)
    assert len(said) == 3


def test_a_connector_feels_the_volume_of_every_simplex():
    generator = torch.Generator().manual_seed(0)
    fixed = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    connector = fixed.mean(0) + 100
    gradients = torch.zeros(1, 40, dtype=torch.float64)
    volumes = Volumes(torch.cat([fixed, connector[None]]), [[0, 3], [1, 3], [2, 3]])
    volumes.regulariser(0.5, torch.empty(40, dtype=torch.float64))(gradients, None)
    leaf = connector.clone().requires_grad_()
    (-0.5 * sum((leaf - fixed[i]).norm().log() for i in range(3))).backward()
    torch.testing.assert_close(gradients[0], leaf.grad, rtol=1e-3, atol=1e-9)


def test_what_cannot_be_a_complex_is_refused(modes):
    for runs, message in (
        (modes[:1], "a complex joins at least 2 runs, not 1"),
        ([*modes[:2], f"{modes[0]}/../0"], "modes 1 and 3 are the same solution: train one with another --seed"),
    ):
        with pytest.raises(UsageError, match=message):
            make(Complex(modes=runs))
    with pytest.raises(DataError, match="training images differ"):
        make(Complex(modes=modes), dataset(train=33))


# --- BatchNorm ---


def test_a_member_at_a_vertex_does_what_the_vertex_did_and_needs_statistics_of_its_own(tmp_path):
    images, network = dataset(train=32), "tests._small:batchnorm"
    single = make(DeepEnsemble(members=1), images, architecture=network, epochs=6)
    start = {"init": saved(single, tmp_path / "single"), "architecture": network}
    run = make(Simplex(vertices=3, members=6, vertex_lr=0.3), images, **start)
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
