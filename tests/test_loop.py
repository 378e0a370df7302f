"""The loop's step against one written out by hand: autograd through ``c @ V``, clipping, weight decay, going on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from ensembler.networks.architectures import build
from ensembler.trainers.plan import Plan
from ensembler.trainers.schedules import constant
from ensembler.weights import FlatWeights
from tests._host import on_meta
from tests._training import fit, plain, random_batches, sgd


def network() -> FlatWeights:
    return FlatWeights(build("tests._small:network", 3))


def around(weights: FlatWeights, K: int = 3, seed: int = 1) -> torch.Tensor:
    """Vertices (K, P) near a network's weights."""
    return weights.vector + 0.3 * torch.randn(K, len(weights), generator=torch.Generator().manual_seed(seed))


def loss_at(weights: FlatWeights, member: torch.Tensor, x, y, reduction="mean"):
    """The loss at the weights ``member`` (P,), differentiable in them."""
    parts = {name: member[part] for name, part in weights.slices().items()}
    shaped = {name: parts[name].as_strided(p.shape, p.stride()) for name, p in weights.module.named_parameters()}
    module = build("tests._small:network", 3)
    return cross_entropy(torch.func.functional_call(module, shaped, x), y, reduction=reduction)


def test_one_vertex_with_coefficient_one_is_plain_training():
    module = build("tests._small:batchnorm", 3)
    own = copy.deepcopy(module)
    batches = random_batches(4)
    optimiser = torch.optim.SGD(own.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-3, nesterov=True)
    for i, (x, y) in enumerate(batches * 2, start=1):
        optimiser.param_groups[0]["lr"] = 0.1 / i
        optimiser.zero_grad()
        cross_entropy(own(x), y).backward()
        optimiser.step()
    weights = FlatWeights(module)
    fitted = fit(weights, weights.vector[None].clone(), batches, Plan(lambda i: 0.1 / i, 8))
    expected = weights.flatten({name: p.detach()[None] for name, p in own.named_parameters()})
    torch.testing.assert_close(fitted.vertices, expected, rtol=1e-5, atol=1e-6)
    for name, buffer in own.named_buffers():
        torch.testing.assert_close(fitted.buffers[name], buffer)


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("trainable", [[2], [0, 2], [0, 1, 2]])
def test_the_step_is_autograd_through_the_explicit_sum(samples, trainable):
    """Every trainable vertex: ``d/dV[k]`` of ``sum_s share_s * loss(c_s @ V)``, by autograd through ``c @ V``."""
    weights = network()
    start, batches = around(weights), random_batches(4, size=7)
    drawn = torch.softmax(torch.randn(4 * samples, 3, generator=torch.Generator().manual_seed(2)), dim=1)

    explicit = [vertex.clone().requires_grad_() for vertex in start]
    leaves = [explicit[k] for k in trainable]
    optimiser = torch.optim.SGD(leaves, lr=0.05, momentum=0.9, weight_decay=1e-3, nesterov=True)
    for (x, y), points in zip(batches, drawn.split(samples), strict=True):
        optimiser.zero_grad()
        for c, x_part, y_part in zip(points, x.tensor_split(samples), y.tensor_split(samples), strict=True):
            member = sum(c[k] * explicit[k] for k in range(3))
            (loss_at(weights, member, x_part, y_part, "sum") / len(y)).backward()
        optimiser.step()

    vertices = start.clone()
    plan = Plan(constant(0.05), 4, trainable=trainable, draw=lambda rng, count: drawn, samples=samples)
    fit(weights, vertices, batches, plan)
    torch.testing.assert_close(vertices, torch.stack(explicit).detach(), rtol=1e-5, atol=1e-6)


def test_clipping_shortens_the_gradient_to_the_limit():
    weights = network()
    start = weights.vector[None].clone()
    found = [
        fit(weights, start.clone(), random_batches(1), Plan(constant(1.0), 1), plain, clip=clip).vertices - start
        for clip in (0.0, 1e-3)
    ]
    assert found[1].norm().item() == pytest.approx(1e-3, rel=1e-4)
    torch.testing.assert_close(found[1], found[0] * (1e-3 / found[0].norm()), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("clip", [0.0, 1e-4])
@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("trainable", [[1], [1, 2]])
def test_decay_of_the_sampled_weights_is_added_after_clipping_as_the_optimisers_own_is(trainable, samples, clip):
    """Every bend: ``c[k] * d/dw [loss(w) + wd / 2 * |w|^2]`` at ``w = c @ V``, the loss's part clipped."""
    weights = network()
    start = around(weights, K=4)
    ((x, y),) = batches = random_batches(1, size=7)
    points = torch.softmax(torch.randn(samples, 4, generator=torch.Generator().manual_seed(2)), dim=1)

    def gradient(of):
        leaf = start.clone().requires_grad_()
        shares = [len(part) / len(y) for part in y.tensor_split(samples)]
        sum(share * of(c @ leaf, s) for s, (c, share) in enumerate(zip(points, shares, strict=True))).backward()
        return leaf.grad[trainable]

    loss = gradient(lambda member, s: loss_at(weights, member, x.tensor_split(samples)[s], y.tensor_split(samples)[s]))
    decay = gradient(lambda member, s: 0.01 / 2 * member.square().sum())
    assert loss.norm() > 0.01, "or else the limit would change nothing"
    if clip:
        loss = loss * (clip / loss.norm())
    vertices = start.clone()
    plan = Plan(
        constant(1.0), 1, trainable=trainable, draw=lambda rng, count: points, samples=samples, decay_sampled=True
    )
    fit(weights, vertices, batches, plan, lambda moving: torch.optim.SGD(moving, 1.0, weight_decay=0.01), clip=clip)
    expected = start.clone()
    expected[trainable] -= loss + decay
    torch.testing.assert_close(vertices, expected, rtol=1e-5, atol=1e-6)


def test_decay_of_one_sampled_vertex_is_the_optimisers_own():
    """At ``c = [1]`` the sampled point is the vertex, and a tiny limit leaves the decay alone in both."""
    weights = network()
    start = weights.vector[None].clone()
    optimiser = lambda moving: torch.optim.SGD(moving, lr=1.0, weight_decay=0.5)  # noqa: E731
    own, sampled = (
        fit(
            weights,
            start.clone(),
            random_batches(2),
            Plan(constant(0.1), 4, draw=lambda rng, count: torch.ones(count, 1), decay_sampled=decay_sampled),
            optimiser,
            clip=1e-6,
        ).vertices
        for decay_sampled in (False, True)
    )
    torch.testing.assert_close(own, start * 0.95**4, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sampled, own, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_a_training_goes_on_from_its_state_bit_for_bit(stop):
    """The state after any step, within an epoch or at its end, leads to the same weights, buffers and snapshots."""
    batches, states = random_batches(3), {}
    plan = Plan(
        lambda i: 0.1 / i, 7, draw=lambda rng, count: torch.from_numpy(rng.random((count, 1))).float(), collect=(2, 6)
    )

    def note(iteration, state):
        states[iteration] = state()

    def run(**options):
        weights = FlatWeights(build("tests._small:batchnorm", 3))
        return fit(weights, weights.vector[None].clone(), batches, plan, **options)

    whole = run(after_step=note)
    rest = run(resume=states[stop])
    assert torch.equal(rest.vertices, whole.vertices)
    for one, other in zip((rest, *rest.snapshots), (whole, *whole.snapshots), strict=True):
        assert torch.equal(one.vertices, other.vertices)
        assert all(torch.equal(buffer, other.buffers[name]) for name, buffer in one.buffers.items())


def test_snapshots_of_a_state_come_to_the_device_of_the_vertices():
    """A state is read to the CPU; new snapshots are made where the vertices are, and both are stacked in the end."""
    states = []
    plan = Plan(constant(0.1), 4, collect=(1, 3))
    weights = FlatWeights(build("tests._small:batchnorm", 3))
    fit(
        *(weights, weights.vector[None].clone(), random_batches(2), plan),
        after_step=lambda iteration, state: states.append(state()),
    )
    (taken,) = states[1].snapshots
    assert taken.vertices.device.type == "cpu"

    away = [(x.to("meta"), y.to("meta")) for x, y in random_batches(4)]
    with on_meta():
        weights = FlatWeights(build("tests._small:batchnorm", 3).to("meta"))
        found = fit(weights, weights.vector[None].clone(), away, plan, resume=states[1])
    for one in found.snapshots:
        assert {tensor.device.type for tensor in (one.vertices, *one.buffers.values())} == {"meta"}
    assert torch.cat([one.vertices for one in found.snapshots]).shape == (2, len(weights))


def test_sgd_of_these_tests_decays():
    assert sgd([torch.zeros(1, requires_grad=True)]).defaults["weight_decay"] > 0
