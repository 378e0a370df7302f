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
from torch.utils._pytree import tree_leaves

__all__ = ["Counters", "has_batchnorm", "keeping_modes", "layers", "recompute"]

_COUNTER = "num_batches_tracked"


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


class Counters:
    """Counts the batches that BatchNorm layers see in one operation for all of them, not one for each.

    The counters (``num_batches_tracked``) hold what they would hold otherwise. On a GPU each layer's own count is a
    launch, a tenth of the launches of a small network. Those that decide a layer's momentum, and those of a compiled
    network, stay as they are.
    """

    def __init__(self, network: nn.Module) -> None:
        modules = list(network.modules())
        compiled = any(each._compiled_call_impl is not None or hasattr(each, "_orig_mod") for each in modules)
        self._layers = [] if compiled else [each for each in modules if _only_counts(each)]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Count what is done within; what goes wrong is not counted."""
        counters: list[Tensor] = [layer._buffers[_COUNTER] for layer in self._layers]  # type: ignore[misc]
        pending = [_Pending.of(counter) for counter in counters]
        for layer, stand_in in zip(self._layers, pending, strict=True):
            layer._buffers[_COUNTER] = stand_in
        try:
            yield
        finally:
            for layer, counter in zip(self._layers, counters, strict=True):
                layer._buffers[_COUNTER] = counter
        if any(each.calls for each in pending):
            torch._foreach_add_(counters, [each.calls for each in pending])


class _Pending(Tensor):
    """A counter whose additions are kept on the host, until anything else is asked of it."""

    calls: int

    @classmethod
    def of(cls, counter: Tensor) -> _Pending:
        pending = counter.as_subclass(cls)
        pending.calls = 0
        return pending

    def add_(self, other: Any, *, alpha: Any = 1) -> _Pending:
        self.calls += other * alpha
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            for each in tree_leaves((args, kwargs)):
                if isinstance(each, cls) and each.calls:
                    Tensor.add_(each, each.calls)
                    each.calls = 0
            return func(*args, **(kwargs or {}))


def _only_counts(module: nn.Module) -> bool:
    """Whether the module is a BatchNorm layer of PyTorch's own, whose counter decides nothing."""
    if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return False
    return module._buffers[_COUNTER] is not None and module.momentum is not None


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
