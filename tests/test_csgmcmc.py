"""Cyclical SG-MCMC: its noise to the number, its samples' places, and the posterior of a quadratic loss."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from ensembler.errors import UsageError
from ensembler.trainers import CyclicalSGMCMC, Settings, Trainer, train
from ensembler.trainers.methods.csgmcmc import langevin
from ensembler.trainers.plan import Plan
from ensembler.trainers.schedules import constant, cosine
from ensembler.trainers.starts import fresh
from tests._small import SETTINGS, dataset
from tests._training import flat, make, passes, trainer
from tests.test_swag import CURVATURE, PAIRS, gaussian_examples


def test_the_noise_of_every_iteration_of_a_cycle():
    noise = langevin(cosine(0.2, 10), 6, temperature=0.5, momentum=0.0, examples=300)
    assert [noise(i) for i in range(1, 7)] == [0.0] * 6
    for i in range(7, 11):
        step = 0.1 * (math.cos(math.pi * (i - 1) / 10) + 1)  # Zhang et al. 2020, equation 1
        assert (step * noise(i)) ** 2 == pytest.approx(2 * step * 0.5 / 300)
    # At a constant rate, SGHMC's velocity gets 2 (1 - m) lr T / N; the gradient is multiplied by lr on the way.
    noise = langevin(constant(0.2), 0, temperature=0.5, momentum=0.9, examples=300)
    assert [(0.2 * noise(i)) ** 2 for i in (1, 2)] == pytest.approx([2 * 0.1 * 0.2 * 0.5 / 300] * 2)


def test_a_falling_rate_leaves_the_velocity_its_variance_of_equilibrium():
    """The velocity of a flat loss by recursion, as torch.optim.SGD has it: the rate times a buffer of the momentum."""
    rate, m, temperature, N = cosine(0.2, 40), 0.9, 0.5, 300
    noise = langevin(rate, 0, temperature, m, N)
    buffer = 2 * temperature / N / (1 + m) / rate(1)  # in equilibrium
    for i in range(1, 41):
        buffer = m**2 * buffer + noise(i) ** 2
        assert rate(i) ** 2 * buffer == pytest.approx(2 * rate(i) * temperature / N / (1 + m))


def wide(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 400), nn.Tanh(), nn.Linear(400, num_classes))


def steps(plan: Plan, **settings) -> torch.Tensor:
    """What one training without momentum collects (n, P); no example moves it on its own."""
    work = trainer(**{"momentum": 0.0, "weight_decay": 0.0, "clip": 0.0, "batch_size": 30} | settings)
    begin = fresh(work)
    fitted = work.fit("x", begin.vector[None].clone(), begin.buffers, plan)
    return torch.cat([snapshot.vertices for snapshot in fitted.snapshots])


def test_weights_get_the_noise_of_the_formula_anew_at_each_step():
    """Of variance ``2 lr T / N``: the difference to the same step without noise, from the same weights."""
    temperature, lr, N = 0.7, 0.05, 30
    own = {"architecture": "tests.test_csgmcmc:wide"}
    plan = Plan(constant(lr), 4, collect=range(5))
    quiet = steps(plan, **own)
    noise = langevin(constant(lr), 0, temperature, 0.0, N)
    added = []
    for only in (1, 2):  # noise in one step, so that the gradients before are the same

        def of_one(iteration: int, only: int = only) -> float:
            return noise(iteration) if iteration == only else 0.0

        noisy = steps(replace(plan, noise=of_one), **own)
        assert torch.equal(noisy[: only - 1], quiet[: only - 1])
        added.append((noisy[only - 1] - quiet[only - 1]).double())
        assert torch.equal(noisy, steps(replace(plan, noise=of_one), **own))  # a function of the seed
    P = len(added[0])
    for each in added:
        assert each.square().mean().item() == pytest.approx(2 * lr * temperature / N, rel=5 * math.sqrt(2 / P))
        assert abs(each.mean().item()) < 5 * each.std().item() / math.sqrt(P)
        assert each.pow(4).mean().item() == pytest.approx(3 * each.square().mean().item() ** 2, rel=0.05)
    assert abs(torch.corrcoef(torch.stack(added))[0, 1].item()) < 5 / math.sqrt(P)
    other = steps(replace(plan, noise=of_one), seed=1, **own)[1] - steps(plan, seed=1, **own)[1]
    assert abs(torch.corrcoef(torch.stack([other.double(), added[1]]))[0, 1].item()) < 5 / math.sqrt(P)


def test_noise_is_not_clipped():
    """It is no part of the loss, whose gradient clipping bounds."""
    plan = Plan(constant(1.0), 1, collect=[1], noise=constant(100.0))
    bounded = steps(plan, clip=1e-3) - steps(replace(plan, noise=None), clip=1e-3)
    assert bounded.square().mean().sqrt().item() == pytest.approx(100, rel=0.2)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_samples_have_the_covariance_of_a_gaussian_posterior(momentum):
    """Of ``exp(-N / T * (theta^T A theta / 2 + decay / 2 * |theta|^2))`` it is ``T / N * (A + decay)^-1``."""
    N, temperature, decay = 64, 0.5, 0.5
    data = gaussian_examples(N)
    data = replace(data, train=replace(data.train, data=torch.zeros_like(data.train.data)))  # no noise of batches
    settings = Settings(
        **{"architecture": "tests.test_swag:quadratic", "augmentation": "none", "device": "cpu", "batch_size": 8},
        **{"momentum": momentum, "lr": 0.5 * (1 - momentum), "weight_decay": decay, "clip": 0.0, "epochs": 200},
    )
    method = CyclicalSGMCMC(members=4, samples_per_cycle=1, exploration=0.6, temperature=temperature)
    samples = flat(train(data, method, settings)).double().view(4 * PAIRS, 2)
    expected = temperature / N * torch.linalg.inv(CURVATURE + decay * torch.eye(2)).double()
    slack = 0.05 * expected.max().item()
    torch.testing.assert_close(samples.T @ samples / len(samples), expected, rtol=0.07, atol=slack)
    assert samples.mean(dim=0).abs().max() < 0.1 * expected.max().sqrt()


def test_samples_are_equally_far_apart_in_the_noisy_part_of_a_cycle_the_last_at_its_end():
    """30 images in batches of 8: two cycles of 8 iterations, of which the last 4 are noisy."""
    method = CyclicalSGMCMC(members=4, samples_per_cycle=2, exploration=0.5, temperature=0.3)
    run = make(method, epochs=4)
    work = trainer(epochs=4)
    rate = cosine(0.1, 8)
    plan = Plan(rate, 8, noise=langevin(rate, 4, 0.3, 0.9, 30), collect=[6, 8])
    expected = cycles(work, plan, 2)
    assert all(torch.equal(rows, expected[name]) for name, rows in run.vertices.items())
    assert torch.equal(run.coefficients, torch.eye(4))
    assert passes(run) == {"cycle 1": 60, "cycle 2": 60}


def cycles(work: Trainer, plan: Plan, count: int) -> dict[str, torch.Tensor]:
    """What trainings collect of which each goes on from the weights of the one before, without its momentum."""
    begin, rows = fresh(work), []
    vertices, buffers = begin.vector[None].clone(), begin.buffers
    for number in range(count):
        fitted = work.fit(f"cycle {number + 1}", vertices, buffers, plan)
        vertices, buffers = fitted.vertices.clone(), fitted.buffers
        rows += [snapshot.vertices for snapshot in fitted.snapshots]
    return work.weights.unflatten(torch.cat(rows))


def test_at_temperature_0_it_is_a_snapshot_ensemble():
    """Of cycles that begin without velocity."""
    run = make(CyclicalSGMCMC(members=3, samples_per_cycle=1, temperature=0.0), epochs=3)
    expected = cycles(trainer(epochs=3), Plan(cosine(0.1, 4), 4, collect=[4]), 3)
    assert all(torch.equal(rows, expected[name]) for name, rows in run.vertices.items())


def test_the_noise_at_the_end_of_a_cycle_does_not_ruin_the_next():
    """At the end of 100 steps, the noise in SGD's buffer has 4,000 times the variance of that at the beginning."""
    method = CyclicalSGMCMC(members=3, samples_per_cycle=1, temperature=1.0)
    norms = flat(make(method, epochs=75)).norm(dim=1)
    assert norms.max() < 2 * norms[0]


def test_a_cycle_may_end_within_an_epoch():
    run = make(CyclicalSGMCMC(members=4, samples_per_cycle=2, cycle=1.5, exploration=0.3))
    assert passes(run) == {"cycle 1": 30 + 16, "cycle 2": 30 + 16}


def test_batchnorm_statistics_are_those_that_a_sample_was_trained_with():
    run = make(CyclicalSGMCMC(members=2, samples_per_cycle=1), architecture="tests._small:batchnorm")
    assert "members" not in run.manifest.cost.entries
    assert run.buffers["body.1.num_batches_tracked"].tolist() == [4, 8]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"members": 5}, "5 members are no whole number of cycles of 3 samples: give --members a multiple of"),
        ({"cycle": 1.0, "exploration": 0.9}, "a cycle has 0 of its 4 steps, fewer than the 3 samples: raise --cycle"),
        ({"temperature": -1.0}, "temperature must be at least 0, not -1"),
        ({"temperature": math.inf}, "temperature must be finite"),
        ({"exploration": 1.0}, "exploration must be below 1, not 1"),
    ],
)
def test_what_is_no_sampler_is_refused_in_one_sentence(given, message):
    with pytest.raises(UsageError, match=message):
        train(dataset(), CyclicalSGMCMC(**given), Settings(**SETTINGS))
