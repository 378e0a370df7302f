"""BatchNorm statistics of weights that were never trained: torch's own answer, and no random number drawn."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from ensembler.ensemble import Ensemble
from ensembler.networks.architectures import build
from ensembler.networks.batchnorm import Counters, has_batchnorm, recompute
from ensembler.networks.buffers import member_buffers
from ensembler.trainers import Simplex
from tests._host import on_meta
from tests._small import dataset
from tests._training import make, trainer


def batches(count: int = 3, size: int = 5) -> list[torch.Tensor]:
    return [torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(count)]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_are_those_that_torch_computes(momentum):
    network = build("tests._small:batchnorm", 3)
    network.body[1].momentum = momentum
    expected = copy.deepcopy(network)
    update_bn(batches(), expected)
    recompute(network, batches())
    torch.testing.assert_close(network.state_dict(), expected.state_dict())
    assert network.body[1].momentum == momentum


def test_only_batchnorm_layers_are_in_training_mode_and_all_are_as_before_in_the_end():
    network = build("tests._small:counting", 3)
    network[1][1].eval()
    modes = {name: module.training for name, module in network.named_modules()}
    before, seen = torch.random.get_rng_state(), []
    network[1][1].register_forward_pre_hook(lambda module, inputs: seen.append(module.training))
    recompute(network, batches())
    assert torch.equal(before, torch.random.get_rng_state()), "dropout draws nothing"
    assert seen == [False] * 3
    assert network[0].seen == 0, "no other buffer changes"
    assert {name: module.training for name, module in network.named_modules()} == modes
    first = torch.cat(batches())
    conv, bn = network[1][0].body[:2]
    torch.testing.assert_close(bn.running_mean, conv(first).mean((0, 2, 3)))


def test_layers_without_statistics_are_none():
    assert has_batchnorm(nn.Sequential(nn.BatchNorm1d(3)))
    assert not has_batchnorm(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.Dropout()))


def test_sampled_members_are_those_of_a_fresh_ensemble_and_draw_nothing():
    """Whether it has predicted before, and whatever the caller's random numbers: a function of the seed alone."""
    run, x = make(Simplex(vertices=2, members=2), architecture="tests._small:counting"), dataset().test.images
    assert (run.buffers["0.seen"] > 0).all()
    used, fresh = Ensemble(run, "cpu"), Ensemble(run, "cpu")
    used.predict_members(x)
    used.network(1).train()  # as one leaves it who goes on training
    found = []
    for ensemble, callers in ((used, 1), (fresh, 2)):
        torch.manual_seed(callers)
        before = torch.random.get_rng_state()
        found.append(ensemble.sample(4, seed=3, train=dataset().train))
        assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(rows, found[1].run.buffers[name]) for name, rows in found[0].run.buffers.items())
    solution, last = run.buffers["0.seen"].tolist()
    assert found[0].run.buffers["0.seen"].tolist()[:2] == [solution, last], "the vertices are the run's members"
    assert set(found[0].run.buffers["0.seen"].tolist()) == {solution, last}, "carried from the nearest member"
    assert torch.equal(found[0].predict_members(x), found[1].predict_members(x))


class Reading(nn.Module):
    """Takes one of its BatchNorm layers twice, and reads how often it did so far."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once, self.cumulative = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=None)
        self.seen: list[int] = []

    def forward(self, x):
        x = self.twice(self.cumulative(x))
        self.seen.append(int(self.twice.num_batches_tracked))
        return self.once(self.twice(x)) * self.twice.num_batches_tracked


def test_counters_counted_at_once_are_those_counted_layer_by_layer():
    """Also those that the network reads on its way, and those that decide a momentum."""
    network = Reading().train()
    expected, counters = copy.deepcopy(network), Counters(network)
    for inputs in torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(0)):
        with counters():
            found = network(inputs)
        assert type(found) is torch.Tensor
        assert torch.equal(found, expected(inputs))
        torch.testing.assert_close(network.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert network.seen == expected.seen == [1, 3, 5]
    assert all(type(buffer) is torch.Tensor for buffer in network.buffers())


def test_a_pass_that_fails_leaves_the_counters_in_their_places():
    network = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(4, 1))
    counter = network[0].num_batches_tracked
    with pytest.raises(RuntimeError), Counters(network)():
        network(torch.randn(5, 3))
    assert network[0].num_batches_tracked is counter
    assert counter == 0


def test_no_batch_of_the_statistics_waits_for_the_host():
    """On "meta": nothing is read, and what is uploaded is so once a member, however many batches there are."""

    def needs_of(examples: int) -> Counter[str]:
        with on_meta() as needs:
            own = trainer(dataset(train=examples), architecture="tests._small:noisy", device="meta")
            vertices, start = own.weights.vector[None].clone(), (own.weights.buffers(), False)
            train = own.train_examples
            needs.places.clear()
            found = member_buffers(own.weights, vertices, torch.ones(2, 1), train, own.record, [start] * 2)
        assert {rows.device.type for rows in found.values()} == {"meta"}, "they stay where the network is"
        return needs.places

    few, many = needs_of(128), needs_of(7 * 128)
    assert few == many
    assert not [place for place in few if "is read" in place], few
