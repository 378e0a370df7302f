"""SWAG against its definition, written out from recorded iterates, and the known distribution of SGD on a quadratic."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ensembler import gaussian
from ensembler.data.datasets import Dataset
from ensembler.data.examples import Arrays
from ensembler.ensemble import Ensemble
from ensembler.errors import DataError, UsageError
from ensembler.run import Gaussians, Run
from ensembler.seeds import generator
from ensembler.trainers import SWAG, DeepEnsemble, Settings, collapse_run, combine, train
from ensembler.trainers.methods.swag import moments
from ensembler.trainers.plan import Plan, Snapshot
from ensembler.trainers.schedules import after, constant, one_cycle
from ensembler.trainers.starts import fresh
from tests._small import SETTINGS, dataset
from tests._training import call, flat, make, passes, same, saved, trainer
from tests.test_task import Toy

# 30 images in batches of 8: 4 iterations an epoch. After 2 of 4 epochs, an iterate every 2 iterations.
METHOD = SWAG(members=5, rank=3, start=0.5, collect_every=0.5, swa_lr=0.05)


def iterates_of_the_method(part: str = "swag", member: int = 0, **settings) -> Tensor:
    """The iterates (n, P) of one uninterrupted training, which are all kept, as :func:`flat` has them."""
    work = trainer(**{"epochs": 4} | settings)
    begin, collect = fresh(work, member), range(10, 17, 2)
    plan = Plan(after(8, one_cycle(0.1, 16), constant(0.05)), 16, collect=collect)
    fitted = work.fit(part, begin.vector[None].clone(), begin.buffers, plan)
    iterates = work.weights.unflatten(torch.cat([snapshot.vertices for snapshot in fitted.snapshots]))
    return torch.cat([rows.flatten(1) for rows in iterates.values()], dim=1)


def by_definition(iterates: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The mean (P,), the variances (P,) and D (P, K) of the paper's algorithm 1, in float64."""
    x = iterates.double()
    deviations = [x[i] - x[: i + 1].mean(dim=0) for i in range(len(x))]
    return x.mean(dim=0), (x**2).mean(dim=0) - x.mean(dim=0) ** 2, torch.stack(deviations[-rank:], dim=1)


def gaussians_of(run: Run) -> Tensor:
    """(S, K + 2, P)."""
    return torch.cat([rows.flatten(2) for rows in run.gaussians.values()], dim=2)


def test_the_gaussian_is_that_of_the_recorded_iterates_and_members_are_its_draws():
    run, iterates = make(METHOD, epochs=4), iterates_of_the_method()
    assert len(iterates) == 4
    mean, variance, D = by_definition(iterates, 3)
    (found,) = gaussians_of(run).double()
    torch.testing.assert_close(found[0], mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1] ** 2, variance, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(found[2:].T, D, rtol=0, atol=1e-6)
    # Each member by the formula, with its own numbers: those of D first, then the parameters' by name.
    shapes = {name: rows.shape[1:] for name, rows in sorted(run.vertices.items())}
    for m, member in enumerate(flat(run).double()):
        stream = generator(0, "gaussian", m)
        z2 = torch.randn(3, generator=stream).double()
        drawn = {name: torch.randn(shape, generator=stream).flatten() for name, shape in shapes.items()}
        z1 = torch.cat([drawn[name] for name in run.vertices]).double()
        expected = mean + math.sqrt(0.5) * (variance.clamp_min(0).sqrt() * z1 + D @ z2 / math.sqrt(3 - 1))
        torch.testing.assert_close(member, expected, rtol=0, atol=1e-5)
    assert torch.equal(run.coefficients, torch.eye(5))
    assert run.manifest.sampling == Gaussians(scale=0.5)
    (facts,) = run.manifest.metrics["gaussians"]
    assert (facts["iterates"], facts["rank"]) == (4, 3)
    assert facts["distance"] == pytest.approx(variance.sum().sqrt().item(), rel=1e-3)
    assert passes(run) == {"swag": 4 * 30}


@pytest.mark.parametrize("rank", [0, 2, 5, 20])
def test_moments_of_any_iterates(rank):
    """With fewer iterates than the rank, D has as many columns as there are; far from 0, no variance is lost."""
    x = 100 + 1e-3 * torch.randn(7, 1, 40, generator=torch.Generator().manual_seed(0))
    collect, kept = range(5, 26, 3), []
    gather = moments(rank, collect)
    for iteration, vertices in zip(collect, x, strict=True):
        kept = gather(kept, Snapshot(vertices, {"seen": torch.ones(())}), iteration)
    mean, squares, *deviations = (snapshot.vertices[0] for snapshot in kept)
    expected_mean, variance, D = by_definition(x[:, 0], rank)
    torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(squares.double() / 7, variance, rtol=0.05, atol=0)
    assert len(deviations) == min(rank, 7)
    if rank:
        torch.testing.assert_close(torch.stack(deviations, dim=1).double(), D, rtol=0, atol=2e-5)


def draw(gaussians: Tensor, *given, **named) -> Tensor:
    """Members (M, P) of Gaussians (S, K + 2, P) over one parameter."""
    return gaussian.draw({"only": gaussians}, *given, **named)["only"]


def test_draws_have_the_covariance_that_is_said():
    """``scale * (diag + D D^T / (K - 1))``, from 4,000 draws; and a Gaussian without D is the diagonal alone."""
    stream = torch.Generator().manual_seed(1)
    own = torch.randn(1, 5, 4, generator=stream)
    own[0, 1].abs_()
    for rows, scale in ((5, 0.5), (5, 2.0), (2, 0.5)):
        given = own[:, :rows]
        drawn = draw(given, scale, 4_000, seed=3).double()
        D = given[0, 2:].double().T
        expected = given[0, 1].double().square().diag() + (D @ D.T / (rows - 3) if rows > 2 else 0)
        torch.testing.assert_close(drawn.mean(dim=0), given[0, 0].double(), rtol=0, atol=0.1)
        torch.testing.assert_close(torch.cov(drawn.T), scale * expected, rtol=0.06, atol=0.06)
    assert torch.equal(draw(own, 0.0, 3, seed=3), own[0, 0].expand(3, 4))


def test_a_member_depends_on_the_seed_and_its_number_alone():
    own = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    drawn = draw(own, 0.5, 6, seed=3)
    assert torch.equal(draw(own, 0.5, 3, seed=3), drawn[:3])
    assert not torch.equal(draw(own, 0.5, 3, seed=4), drawn[:3])
    assert torch.equal(draw(own, 0.0, 4, seed=0), own[[0, 1, 0, 1], 0])  # in turn
    with pytest.raises(UsageError, match="at least one member, not 0"):
        draw(own, 0.5, 0, seed=0)
    two = {"b": own[..., :4], "a": own[..., 4:].unflatten(2, (2, 1))}
    there, back = (gaussian.draw(dict(sorted(two.items(), reverse=order)), 0.5, 2, seed=3) for order in (False, True))
    assert all(torch.equal(rows, back[name]) for name, rows in there.items())  # in any order of the parameters


def test_the_memory_format_changes_no_draw():
    """It says how a run is computed, and is no part of its fingerprint."""
    runs = [make(METHOD, epochs=4, memory_format=kind) for kind in ("contiguous", "channels-last")]
    apart = [flat(run) - gaussians_of(run)[0, 0] for run in runs]
    torch.testing.assert_close(*apart, rtol=1e-3, atol=1e-5)
    assert runs[0].manifest.fingerprint == runs[1].manifest.fingerprint


# --- a quadratic loss, whose stationary distribution is known (Mandt et al. 2017) ---

PAIRS, RATE, BATCH = 400, 0.2, 4
CURVATURE = torch.tensor([[1.0, 0.6], [0.6, 2.0]])
SPREAD = torch.tensor([[1.0, -0.3], [-0.3, 0.5]])  # covariance of the examples


class Quadratic(nn.Module):
    """``(theta - x)^T A (theta - x) / 2``, summed over pairs of coordinates; the output (B, 1) is the loss itself."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(PAIRS, 2))

    def forward(self, x: Tensor) -> Tensor:
        apart = self.theta - x.view(-1, PAIRS, 2)
        return (apart @ CURVATURE.to(x) * apart).sum(dim=(1, 2))[:, None] / 2


def quadratic(num_classes: int) -> nn.Module:
    return Quadratic()


class Loss(Toy):
    """The output is the loss."""

    name = "tests.test_swag:Loss"

    def losses(self, outputs, targets):
        return outputs[:, 0]


def gaussian_examples(count: int = 2000) -> Dataset:
    """Examples whose mean is 0 and whose covariance is ``SPREAD`` in every pair of coordinates, exactly."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Arrays:
        x = torch.randn(count, PAIRS, 2, generator=generator, dtype=torch.float64)
        x -= x.mean(dim=0)
        own = torch.linalg.cholesky(torch.einsum("npi,npj->pij", x, x) / count)
        x = torch.linalg.solve_triangular(own, x[..., None], upper=False)[..., 0]
        x = x @ torch.linalg.cholesky(SPREAD.double()).T
        return Arrays(x.flatten(1).float(), torch.zeros(count))

    zeros, ones = (0.0,) * (2 * PAIRS), (1.0,) * (2 * PAIRS)
    splits = split(count), split(8), split(8)
    return Dataset("gauss", "gauss", (), "none", *splits, zeros, ones, task=Loss.name)


def stationary(rate: float) -> Tensor:
    """Covariance (2, 2) of SGD with replacement: ``S = (1 - rate A) S (1 - rate A) + rate^2 A C A / B``."""
    shrink, noise = torch.eye(2) - rate * CURVATURE, rate**2 * CURVATURE @ SPREAD @ CURVATURE / BATCH
    row = torch.kron(shrink, shrink)
    return torch.linalg.solve(torch.eye(4) - row, noise.flatten()).view(2, 2)


def test_on_a_quadratic_the_gaussian_is_the_stationary_distribution_of_sgd():
    """Over 400 pairs of coordinates: the mean near the minimum, both parts of the covariance as they must be.

    Iterates 10 steps apart are nearly independent. An epoch goes through the examples without replacement, whose
    gradients add up to 0; it has 500 steps, of which an iterate remembers about 5.
    """
    own = {"batch_size": BATCH, "momentum": 0.0, "weight_decay": 0.0, "clip": 0.0, "lr": RATE, "device": "cpu"}
    settings = Settings(architecture="tests.test_swag:quadratic", epochs=1, augmentation="none", **own)
    method = SWAG(members=40, rank=150, start=0.2, swa_epochs=4, swa_lr=RATE, collect_every=0.02, scale=1.0)
    run = train(gaussian_examples(), method, settings)
    (found,) = gaussians_of(run).double()
    expected = stationary(RATE).double()
    assert found[0].square().mean() < 0.05 * expected.diagonal().mean()  # the mean of 200 iterates
    variances = found[1].square().view(PAIRS, 2).mean(dim=0)
    torch.testing.assert_close(variances, expected.diagonal(), rtol=0.05, atol=0)
    D = found[2:].view(150, PAIRS, 2)
    low_rank = torch.einsum("kpi,kpj->ij", D, D) / PAIRS / (150 - 1)
    slack = 0.02 * expected.max().item()
    torch.testing.assert_close(low_rank, expected, rtol=0.05, atol=slack)
    # A draw has the diagonal once more than the low-rank part: the paper halves their sum.
    apart = (flat(run).double() - found[0]).view(40, PAIRS, 2)
    drawn = torch.einsum("mpi,mpj->ij", apart, apart) / 40 / PAIRS
    torch.testing.assert_close(drawn, expected + expected.diagonal().diag(), rtol=0.05, atol=2 * slack)


# --- members drawn again, SWA, several ---


@pytest.mark.parametrize("network", ["network", "batchnorm"])
def test_members_are_drawn_again_with_a_seed(network, tmp_path):
    run = make(METHOD, epochs=4, architecture=f"tests._small:{network}", seed=2)
    path, images = run.save(tmp_path / "run"), dataset().test.images
    ensemble = Ensemble.load(path, "cpu")
    again = ensemble.sample(5, seed=2, train=dataset().train)
    assert same(again.run, run)
    for name, rows in run.buffers.items():  # BatchNorm statistics recomputed for the same weights
        torch.testing.assert_close(again.run.buffers[name], rows)
    torch.testing.assert_close(again.predict_proba(images), ensemble.predict_proba(images))
    more = ensemble.sample(7, seed=3, train=dataset().train)
    assert (more.members, more.run.manifest.vertices, more.run.manifest.members) == (7, 7, 7)
    assert not any(torch.equal(rows[:5], run.vertices[name]) for name, rows in more.run.vertices.items())
    third = more.sample(5, seed=2, train=dataset().train)  # what was drawn can be drawn from
    assert same(third.run, run)
    if network == "batchnorm":
        with pytest.raises(DataError, match="small was given from Python and cannot be loaded by name"):
            ensemble.sample(3)


def test_what_is_not_recomputed_a_drawn_member_has_from_its_own_gaussian():
    run = make(METHOD.model_copy(update={"swags": 2}), epochs=4, architecture="tests._small:counting")
    assert run.buffers["0.seen"].tolist() == [120.0] * 5
    run = replace(run, buffers={**run.buffers, "0.seen": torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])})
    drawn = Ensemble(run, "cpu").sample(4, seed=5, train=dataset().train)
    assert drawn.run.buffers["0.seen"].tolist() == [1.0, 2.0, 1.0, 2.0]


def test_each_drawn_member_has_batchnorm_statistics_of_its_own_weights():
    run = make(METHOD, epochs=4, architecture="tests._small:batchnorm")
    assert run.manifest.cost.entries["members"].forward_passes == 5 * 30
    means = run.buffers["body.1.running_mean"]
    weights, images = run.vertices["body.0.weight"], dataset().train
    x = images.inputs((0.4,) * 3, (0.25,) * 3, torch.device("cpu"))(images.images)
    for mean, weight, bias in zip(means, weights, run.vertices["body.0.bias"], strict=True):
        out = nn.functional.conv2d(x, weight, bias, stride=2)
        torch.testing.assert_close(mean, out.mean(dim=(0, 2, 3)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("network", ["network", "batchnorm"])
def test_collapse_gives_swa_the_mean_of_the_iterates(network, tmp_path):
    own = {"epochs": 4, "architecture": f"tests._small:{network}"}
    run, mean = make(METHOD, **own), iterates_of_the_method(**own).mean(dim=0)
    swa = collapse_run(run, dataset(), "cpu")
    torch.testing.assert_close(flat(swa)[0], mean, rtol=0, atol=1e-6)
    assert (swa.manifest.method, swa.manifest.members, swa.manifest.sampling) == ("swag-centroid", 1, None)
    assert not swa.gaussians
    assert passes(swa) == passes(run) == {"swag": 120}
    # The same network by --scale 0, with the same BatchNorm statistics, which are not those of the first member.
    alone = make(METHOD.model_copy(update={"scale": 0.0, "members": 1}), **own)
    assert torch.equal(flat(alone), flat(swa))
    for name, rows in alone.buffers.items():
        torch.testing.assert_close(swa.buffers[name], rows)
        assert "running" not in name or not torch.equal(rows, run.buffers[name][:1])
    assert passes(alone) == {"swag": 120}
    whole = saved(run, tmp_path / "whole")
    assert same(collapse_run(Run.load(whole), dataset(), "cpu"), swa)


def test_several_gaussians_stand_on_independent_solutions_and_share_the_members(tmp_path):
    method = METHOD.model_copy(update={"swags": 2})
    run, deep = make(method, epochs=4), make(DeepEnsemble(members=2), epochs=4)
    assert run.manifest.method == "multi-swag"
    own = gaussians_of(run)
    for number in range(2):
        mean, _, D = by_definition(iterates_of_the_method(f"swag {number + 1}", number), 3)
        torch.testing.assert_close(own[number, 0].double(), mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(own[number, 2:].double().T, D, rtol=0, atol=1e-6)
    nearest = torch.cdist(flat(run), own[:, 0]).argmin(dim=1)
    assert nearest.tolist() == [0, 1, 0, 1, 0]
    assert passes(run) == {"swag 1": 120, "swag 2": 120}
    assert [facts["name"] for facts in run.manifest.metrics["gaussians"]] == ["swag 1", "swag 2"]
    with pytest.raises(UsageError, match="5 members are too few for 6 Gaussians"):
        make(METHOD.model_copy(update={"swags": 6}))
    with pytest.raises(UsageError, match="several Gaussians need independent solutions: leave out --init"):
        make(method, init=saved(deep, tmp_path / "deep"))


def test_swag_starts_from_a_solution(tmp_path):
    """From ``--init`` there is nothing before the iterates, and its cost is counted."""
    single = make(DeepEnsemble(members=1))
    run = make(METHOD, epochs=4, init=saved(single, tmp_path / "single"))
    assert passes(run) == {"solution 1": 60, "swag": 60}
    together = combine({"a": run, "b": single}, dataset(), "cpu")
    assert (together.manifest.members, together.manifest.sampling) == (6, None)
    assert not together.gaussians
    assert together.manifest.cost.example_passes == 120


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 1}, "--rank must be 0, for the diagonal alone, or at least 2"),
        ({"start": 1.0}, "--start 1 leaves no epochs in which to collect iterates: give --swa-epochs"),
        ({"swa_epochs": 1.0}, "SWAG needs at least 2 iterates, and 1 epochs with one every 1 give 1"),
        ({"scale": 0.0}, "--scale 0 draws the mean of a Gaussian each time: give --members 1"),
        ({"scale": float("nan")}, "scale must be finite"),
        ({"scale": -1.0}, "scale must be at least 0"),
        ({"collect_every": 0.0}, "collect_every must be positive"),
    ],
)
def test_what_makes_no_gaussian_is_refused_in_one_sentence(given, message):
    said = []
    with pytest.raises(UsageError, match=message):
        train(dataset(), SWAG(**given), Settings(**SETTINGS), on_event=said.append)
    assert not [event for event in said if hasattr(event, "epoch")]  # before anything is trained


def test_the_commands_train_collapse_and_redraw_for_a_bundle(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--arch", "tests._small:batchnorm", "--epochs", 2, "--batch-size", 8, "--device", "cpu", *images]
    result = call("train-swag", "--members", 2, "--start", 0.5, "--collect-every", 0.25, *small, "--out", "swag")
    assert result.exit_code == 0, result.output
    assert "swag: 4 iterates, rank 4, " in result.stderr
    assert call("collapse", "swag", "--device", "cpu", "--out", "swa").stdout.startswith("swag-centroid of 1 member on")
    result = call("export", "swag", "--members", 3, "--out", "bundle")
    assert result.exit_code == 0, result.output
    assert '"members": 3' in (tmp_path / "bundle" / "manifest.json").read_text()
    result = call("train-swag", "--members", 2, "--rank", 1, *small, "--out", "refused")
    assert (result.exit_code, len(result.stderr.strip().splitlines())) == (1, 1)
    assert not list(tmp_path.glob("refused*"))
