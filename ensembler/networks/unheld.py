"""What a network computes with that is neither a parameter nor a persistent buffer, so that no run holds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["differences", "unheld"]

_DEPTH = 4  # of lists, dictionaries and objects within one another
_PYTORCHS = frozenset(vars(nn.Module()))  # what every module has


def unheld(network: nn.Module) -> dict[str, Any]:
    """Return tensors, arrays and numbers that the network's layers have as attributes, by their paths.

    These are non-persistent buffers, tensors that are no buffers, and whatever lies in lists, dictionaries and objects;
    also the weights of layers in a plain list.
    """
    own = {id(module) for module in network.modules()}
    held = {id(tensor) for tensor in (*network.parameters(), *network.buffers())}
    found: dict[str, Any] = {}
    for prefix, module in network.named_modules():
        for name in module._non_persistent_buffers_set:
            if module._buffers.get(name) is not None:
                found[_path(prefix, name)] = module._buffers[name]
        for name, value in vars(module).items():
            if name not in _PYTORCHS and not name.startswith("_forward"):
                found |= {
                    path: leaf
                    for path, leaf in _leaves(_path(prefix, name), value, own, _DEPTH)
                    if id(leaf) not in held
                }
    return found


def differences(network: nn.Module, other: nn.Module) -> dict[str, Any]:
    """Return what :func:`unheld` finds in the network, and otherwise or not at all in another one of the same class."""
    own, others = unheld(network), unheld(other)
    return {path: value for path, value in own.items() if path not in others or not _same(value, others[path])}


def _leaves(path: str, value: Any, own: set[int], depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, nn.Module):
        if id(value) not in own:
            yield from ((_path(path, name), tensor) for name, tensor in value.state_dict(keep_vars=True).items())
    elif isinstance(value, Tensor | np.ndarray | np.generic | int | float | complex):
        yield path, value
    elif depth:
        if isinstance(value, Mapping):
            items = [(f"{path}[{key!r}]", each) for key, each in value.items()]
        elif isinstance(value, list | tuple):
            items = [(f"{path}[{place}]", each) for place, each in enumerate(value)]
        elif hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
            items = [(_path(path, name), each) for name, each in vars(value).items()]
        else:
            items = []
        for name, each in items:
            yield from _leaves(name, each, own, depth - 1)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one.detach().cpu(), other.detach().cpu())
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return False
    return bool(np.array_equal(one, other))


def _path(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
