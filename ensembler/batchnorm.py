"""BatchNorm statistics of weights that were never trained themselves: points between solutions, averages of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["has_batchnorm", "recompute"]


def has_batchnorm(network: nn.Module) -> bool:
    """Whether the network keeps statistics that depend on its weights."""
    return bool(_layers(network))


def recompute(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set running mean and variance to the averages over batches of inputs, each of the same weight.

    Only the BatchNorm layers are in training mode meanwhile: dropout draws nothing, and no other buffer changes. (What
    :func:`torch.optim.swa_utils.update_bn` computes, which puts the whole network in training mode.)
    """
    with _training(network) as layers, torch.no_grad():
        for layer in layers:
            layer.reset_running_stats()
        for count, inputs in enumerate(batches, start=1):
            for layer in layers:
                layer.momentum = 1 / count  # a cumulative average, without reading a counter on the device
            network(inputs)


@contextmanager
def _training(network: nn.Module) -> Iterator[list[nn.modules.batchnorm._BatchNorm]]:
    layers = _layers(network)
    momenta, modes = [layer.momentum for layer in layers], {module: module.training for module in network.modules()}
    network.eval()
    for layer in layers:
        layer.train()
    try:
        yield layers
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


def _layers(network: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [
        module
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
