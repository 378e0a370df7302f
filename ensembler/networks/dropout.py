"""MC dropout with fixed masks, one set a member (Gal & Ghahramani 2016, arXiv 1506.02142, sec. 4).

A forward pass with dropout samples a network whose units are partly switched off. With masks that are drawn once and
kept, as buffers of a member, each sample is a network of its own: its answers do not vary, and it can be exported.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ensembler.device import restored_generators
from ensembler.errors import UsageError
from ensembler.seeds import generator

__all__ = ["FixedDropout", "draw_masks", "fix_masks", "mask_shapes", "without_masks"]

_MASK = "mc_dropout_mask"
_BY_CHANNEL = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout)
_LAYERS = (nn.Dropout, nn.AlphaDropout, *_BY_CHANNEL)
_ALPHA = 1.7580993408473766  # minus the least value of SELU, as in PyTorch
_DIMENSIONS = {nn.Dropout1d: 3, nn.Dropout3d: 5}  # with fewer, PyTorch takes the examples for channels


class FixedDropout(nn.Module):
    """A dropout layer with one mask for all examples, in any mode.

    Dropout divides what it keeps by ``1 - p``. Alpha dropout (Klambauer et al. 2017, sec. 2, "New dropout technique")
    sets the others to SELU's least value, ``-alpha``, and then scales and shifts all to the former mean and variance.

    Args:
        layer: the layer that it takes the place of.
        shape: of the mask, which broadcasts with one example.
    """

    def __init__(self, layer: nn.Module, shape: tuple[int, ...], device: torch.device) -> None:
        super().__init__()
        self.p, self.alpha = float(layer.p), isinstance(layer, nn.AlphaDropout | nn.FeatureAlphaDropout)  # type: ignore[arg-type]
        self.register_buffer(_MASK, torch.ones(shape, device=device))

    def forward(self, x: Tensor) -> Tensor:
        kept = x * getattr(self, _MASK)
        if self.p == 1:  # nothing is kept
            return kept
        if not self.alpha:
            return kept / (1 - self.p)
        scale = ((1 + _ALPHA**2 * self.p) * (1 - self.p)) ** -0.5
        result: Tensor = scale * (kept + _ALPHA * (getattr(self, _MASK) - 1 + self.p))
        return result

    def extra_repr(self) -> str:
        return f"p={self.p}, alpha={self.alpha}"


def mask_shapes(name: str, network: nn.Module, x: Tensor) -> dict[str, tuple[int, ...]]:
    """Return the shape of a mask for each dropout layer that the network uses.

    Args:
        name: the network's, for messages.
        network: left in evaluation mode.
        x: one input or more, (B, ...).

    Raises:
        UsageError: there is no dropout layer, or no fixed masks could take the place of what the network draws.
    """
    layers = {own: layer for own, layer in _layers(network).items() if layer.p > 0}
    two = x[:1].repeat(2, *[1] * (x.dim() - 1))
    with torch.no_grad(), restored_generators():
        network.train()
        for layer in layers.values():
            layer.eval()
        with _drawing(network) as drawn, _called(layers) as training:
            network(two)
        network.eval()
        with _called(layers) as once:
            network(two)
        with _called(layers) as again:
            network(torch.cat([two, two[:1]]))
    if drawn:
        where = f"its layer {drawn[0]!r}" if drawn[0] else "its forward"
        raise UsageError(
            f"{name} draws random numbers in {where} that are no nn.Dropout layer's (F.dropout, dropout in attention, "
            "stochastic depth), and no mask could be fixed for them: use nn.Dropout layers alone"
        )
    if not any(training.values()):
        raise UsageError(
            f"{name} has no dropout that it uses (an nn.Dropout layer with p > 0), so that MC dropout would make equal "
            "members: choose an --arch with dropout, such as vgg16"
        )
    for own, layer in layers.items():
        _check_calls(f"{name} ", own, layer, training[own], once[own], again[own])
    return {own: _shape(layer, once[own][0][1:]) for own, layer in layers.items() if once[own]}


def draw_masks(network: nn.Module, shapes: Mapping[str, tuple[int, ...]], members: int, seed: int) -> dict[str, Tensor]:
    """Draw members' masks: buffer name to (M, ...) bool, true with probability ``1 - p`` of the layer.

    Those of a member depend on the seed and its number alone, not on M.
    """
    layers, rows = _layers(network), dict[str, list[Tensor]]()
    for member in range(members):
        stream = generator(seed, "dropout masks", member)
        for own, shape in shapes.items():
            rows.setdefault(f"{own}.{_MASK}", []).append(torch.rand(shape, generator=stream) >= layers[own].p)
    return {name: torch.stack(each) for name, each in rows.items()}


def fix_masks(network: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Replace the dropout layers for which there are masks among the buffers, (M, ...) each, by fixed ones."""
    device = next(network.parameters()).device
    for own, layer in _layers(network).items():
        if (masks := buffers.get(f"{own}.{_MASK}")) is not None:
            parent, _, last = own.rpartition(".")
            setattr(network.get_submodule(parent), last, FixedDropout(layer, tuple(masks.shape[1:]), device))


def without_masks(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the buffers of the network without dropout, its usual approximation of their mean (sec. 3)."""
    return {name: tensor for name, tensor in buffers.items() if name.rpartition(".")[2] != _MASK}


Calls = list[tuple[int, ...]]


def _layers(network: nn.Module) -> dict[str, Any]:
    return {own: layer for own, layer in network.named_modules() if type(layer) in _LAYERS and own}


def _shape(layer: nn.Module, example: tuple[int, ...]) -> tuple[int, ...]:
    return (example[0], *[1] * (len(example) - 1)) if type(layer) in _BY_CHANNEL else example


def _check_calls(name: str, own: str, layer: Any, training: Calls, once: Calls, again: Calls) -> None:
    """Refuse a layer whose inputs no mask of one example would fit; shapes of each call, with 2, 2 and 3 examples."""
    kind = type(layer).__name__
    if training != once:
        raise UsageError(
            f"{name}calls its dropout layer {own!r} in training mode otherwise than in evaluation mode, where its mask "
            "must act: call it alike in both, for it does nothing in evaluation mode by itself"
        )
    if len(once) > 1:
        raise UsageError(
            f"{name}calls its dropout layer {own!r} {len(once)} times in one pass, and a mask belongs to one place: "
            "give each place an nn.Dropout of its own"
        )
    for first, second in zip(once, again, strict=True):
        if len(first) < _DIMENSIONS.get(type(layer), 2) or first != (2, *second[1:]) or second[0] != 3:
            raise UsageError(
                f"{name}gives its dropout layer {own!r}, {kind}, a tensor {first} for 2 images, expected the images in "
                f"its first dimension{', then channels' * (type(layer) in _BY_CHANNEL)}: a mask is one image's"
            )


@contextmanager
def _called(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Calls]]:
    """Collect the shapes that each layer is called with."""
    calls: dict[str, Calls] = {own: [] for own in layers}

    def watch(own: str) -> Any:
        return lambda _, inputs: calls[own].append(tuple(inputs[0].shape))

    hooks = [layer.register_forward_pre_hook(watch(own)) for own, layer in layers.items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _drawing(network: nn.Module) -> Iterator[list[str]]:
    """Collect the layers in whose forward pass random numbers are drawn, the innermost first."""
    drawn: list[str] = []
    before: list[bytes] = []

    def leave(own: str) -> Any:
        return lambda *_: drawn.append(own) if before.pop() != _states() else None

    hooks = []
    for own, layer in network.named_modules():
        hooks.append(layer.register_forward_pre_hook(lambda *_: before.append(_states())))
        hooks.append(layer.register_forward_hook(leave(own)))
    try:
        yield drawn
    finally:
        for hook in hooks:
            hook.remove()


def _states() -> bytes:
    """Return the states of all global generators."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    torchs = b"".join(state.numpy().tobytes() for state in (torch.get_rng_state(), *gpus))
    return torchs + repr((random.getstate(), np.random.get_state(legacy=False))).encode()
