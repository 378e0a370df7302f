"""BatchNorm statistics for weights that were not trained themselves: points between solutions, and averages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["has_batchnorm", "recompute"]


def has_batchnorm(network: nn.Module) -> bool:
    """Return whether the network has running BatchNorm statistics."""
    return bool(_layers(network))


def recompute(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running mean and variance to their averages over batches of inputs, all weighted equally.

    Computes what :func:`torch.optim.swa_utils.update_bn` does, but only the BatchNorm layers are in training mode:
    dropout draws no masks, and no other buffer changes.
    """
    with _batchnorm_in_training(network) as layers, torch.no_grad():
        for layer in layers:
            layer.reset_running_stats()
        for count, inputs in enumerate(batches, start=1):
            for layer in layers:
                layer.momentum = 1 / count  # a cumulative average, without reading a counter on the device
            network(inputs)


@contextmanager
def _batchnorm_in_training(network: nn.Module) -> Iterator[list[nn.modules.batchnorm._BatchNorm]]:
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
