"""Running statistics for weights that were not trained themselves: points between solutions, and averages.

Those of BatchNorm layers and of InstanceNorm layers with ``track_running_stats``. A layer takes part if training itself
would update its statistics: frozen ones, which the network's own ``train()`` keeps in evaluation mode, do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["has_batchnorm", "keeping_modes", "layers", "recompute"]


def has_batchnorm(network: nn.Module) -> bool:
    """Return whether the network has running statistics that training updates."""
    return bool(layers(network))


def layers(network: nn.Module) -> dict[str, _NormBase]:
    """Return the layers whose running statistics training updates, by name."""
    with keeping_modes(network):
        network.train()
        return {name: module for name, module in network.named_modules() if _updates(module)}


def recompute(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running mean and variance to their averages over batches of inputs, all weighted equally.

    Computes what :func:`torch.optim.swa_utils.update_bn` does, but only the layers of :func:`layers` are in training
    mode: dropout draws no masks, and no other buffer changes. A layer that the forward pass leaves out keeps its
    statistics; one that it takes twice averages over both.
    """
    found = list(layers(network).values())
    momenta, calls = [layer.momentum for layer in found], [0] * len(found)

    def before(place: int, layer: _NormBase, inputs: Any) -> None:
        if not calls[place]:
            layer.reset_running_stats()
        calls[place] += 1
        layer.momentum = 1 / calls[place]  # a cumulative average, without reading a counter on the device

    hooks = [layer.register_forward_pre_hook(partial(before, place)) for place, layer in enumerate(found)]
    try:
        with keeping_modes(network), torch.no_grad():
            network.eval()
            for layer in found:
                layer.train()
            for inputs in batches:
                # As it is called, but never compiled: every batch has a new momentum.
                network._call_impl(inputs)  # type: ignore[no-untyped-call]
    finally:
        for hook, layer, momentum in zip(hooks, found, momenta, strict=True):
            hook.remove()
            layer.momentum = momentum


@contextmanager
def keeping_modes(network: nn.Module) -> Iterator[None]:
    """Give every module its present mode back in the end."""
    modes = {module: module.training for module in network.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _updates(module: nn.Module) -> bool:
    """Whether the module is a layer with running statistics that its present mode and its momentum update."""
    if not isinstance(module, _NormBase) or module.running_mean is None:
        return False
    return module.training and module.momentum != 0
