"""Flat weights are the module's own weights: same function, same gradients, any module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ensembler.errors import ShapeError, UsageError
from ensembler.networks.architectures import build
from ensembler.weights import FlatWeights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def gradients_of(module, x, y):
    loss = nn.functional.cross_entropy(module(x), y)
    loss.backward()
    return loss


@pytest.mark.parametrize("name", ["cnn", "resnet20"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_forward_and_gradients_are_those_of_the_untouched_module(name, memory_format):
    torch.manual_seed(0)
    plain = build(name, 10).to(memory_format=memory_format)
    weights = FlatWeights(copy.deepcopy(plain))
    x, y = torch.randn(4, 3, 32, 32).to(memory_format=memory_format), torch.randint(10, (4,))
    assert torch.equal(gradients_of(plain, x, y), gradients_of(weights.module, x, y))
    flattened = FlatWeights(copy.deepcopy(plain)).flatten({n: p.grad[None] for n, p in plain.named_parameters()})
    torch.testing.assert_close(weights.grad, flattened[0], rtol=1e-5, atol=1e-7)


def test_writing_the_vector_writes_the_module():
    weights = FlatWeights(build("cnn", 10, seed=0))
    other = FlatWeights(build("cnn", 10, seed=1))
    x = torch.randn(2, 3, 32, 32)
    assert not torch.equal(weights.module(x), other.module(x))
    weights.vector.copy_(other.vector)
    assert torch.equal(weights.module(x), other.module(x))


def test_channels_last_parameters_stay_so_and_unflatten_to_their_own_shape():
    module = build("cnn", 10).to(memory_format=torch.channels_last)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    weights = FlatWeights(module)
    for name, parameter in module.named_parameters():
        assert parameter.dim() != 4 or parameter.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(parameter, before[name])
    named = weights.unflatten(weights.vector[None])
    assert all(torch.equal(named[name][0], before[name]) for name in before)
    assert torch.equal(weights.flatten(named)[0], weights.vector)


def test_a_tied_parameter_lies_in_the_vector_once_and_stays_tied():
    module = Tied()
    reference = copy.deepcopy(module)
    weights = FlatWeights(module)
    assert len(weights) == 6 * 6 + 6 + 6 + 6 * 3 + 3
    assert module.first.weight is module.second.weight
    x, y = torch.randn(5, 6), torch.randint(3, (5,))
    gradients_of(reference, x, y)
    gradients_of(module, x, y)
    torch.testing.assert_close(module.first.weight.grad, reference.first.weight.grad)


class Parting(nn.Module):
    """A layer of which each pass leaves one of two out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])

    def forward(self, x):
        return self.layers[len(x) % 2](x)


@pytest.mark.parametrize("make", [Tied, Parting, lambda: build("tests._small:channels_last", 3)])
def test_gradients_that_are_gathered_at_once_are_those_that_are_added_one_by_one(make):
    """To the bit, over several passes, also where a pass does not reach a parameter; nothing is left behind."""
    torch.manual_seed(0)
    module = make()
    one_by_one, at_once = FlatWeights(copy.deepcopy(module), gather=False), FlatWeights(module, gather=True)
    for count in (4, 6, 5):
        x, y = torch.randn(count, 3, 8, 8), torch.randint(3, (count,))
        x = x.flatten(1)[:, :6] if isinstance(module, Tied | Parting) else x
        for weights in (one_by_one, at_once):
            weights.backward(nn.functional.cross_entropy(weights.module(x), y))
        assert at_once.grad.any()
        assert torch.equal(at_once.grad, one_by_one.grad)
        assert all(parameter.grad is None for parameter in at_once.module.parameters())


def test_frozen_parameters_and_buffers_stay_outside_the_vector():
    module = build("resnet20", 10)
    module[0].weight.requires_grad_(False)
    weights = FlatWeights(module)
    assert len(weights) == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert list(weights.frozen()) == ["0.weight"]
    changed = {name: tensor + 1 for name, tensor in weights.buffers().items()}
    weights.load_buffers(changed)
    assert all(torch.equal(tensor, changed[name]) for name, tensor in weights.buffers().items())
    for stretched in (torch.ones(1), torch.ones(3, 1)):  # both would be copied into each of its places
        with pytest.raises(ShapeError, match=r"buffer '.*': expected .* another architecture's"):
            weights.load_buffers(changed | {next(name for name, buffer in changed.items() if buffer.dim()): stretched})
    weights.load_frozen({"0.weight": torch.ones_like(module[0].weight)})
    assert torch.equal(module[0].weight, torch.ones_like(module[0].weight))


def test_rows_of_a_matrix_flatten_without_mixing():
    weights = FlatWeights(build("cnn", 10))
    vectors = torch.randn(3, len(weights))
    assert torch.equal(weights.flatten(weights.unflatten(vectors)), vectors)


def test_what_cannot_be_flattened_is_refused_by_name():
    weights = FlatWeights(build("cnn", 10))
    named = weights.unflatten(weights.vector[None])
    with pytest.raises(ShapeError, match=r"no weights for parameter '0\.bias'"):
        weights.flatten({name: tensor for name, tensor in named.items() if name != "0.bias"})
    with pytest.raises(ShapeError, match="no parameter 'extra'"):
        weights.flatten(named | {"extra": torch.zeros(1)})
    with pytest.raises(ShapeError, match=r"'0\.bias': expected \(1, 32\), found \(1, 7\)"):
        weights.flatten(named | {"0.bias": torch.zeros(1, 7)})
    with pytest.raises(UsageError, match="no trainable parameter"):
        FlatWeights(nn.ReLU())
    with pytest.raises(UsageError, match=r"float32 on cpu, torch\.float64 on cpu"):
        FlatWeights(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()))
