"""PyTorch's transformers, made to compute in evaluation mode what they compute in training.

Without gradients, ``nn.TransformerEncoderLayer`` leaves its layers for one fused operation, the fast path. It takes a
mask of numbers for one of booleans (so an additive bias masks everything), ignores a dropout layer that was replaced,
returns zeros at padded places, and has no function in ONNX. And an encoder or decoder that is given a mask compares it
with the causal one, a value that a graph cannot read.
"""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["without_fast_path"]


def without_fast_path(network: nn.Module) -> None:
    """Let transformers of the network, in place, compute with their own layers, and take masks as they are given."""
    for layer in network.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            layer.register_forward_pre_hook(_unchanged)  # with a hook, its layers are called one by one
        elif isinstance(layer, nn.TransformerEncoder):
            layer.use_nested_tensor = False
            layer.register_forward_pre_hook(_masked_encoder, with_kwargs=True)
        elif isinstance(layer, nn.TransformerDecoder):
            layer.register_forward_pre_hook(_masked_decoder, with_kwargs=True)


def _unchanged(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Change nothing."""


def _masked_encoder(layer: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
    """Do not ask whether a mask is causal (``is_causal``, the fourth argument), unless the network says so."""
    return _answered("is_causal", 3, inputs, options)


def _masked_decoder(layer: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
    """Likewise ``tgt_is_causal``, the seventh argument."""
    return _answered("tgt_is_causal", 6, inputs, options)


def _answered(name: str, place: int, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
    if len(inputs) > place:
        return (*inputs[:place], bool(inputs[place]), *inputs[place + 1 :]), options
    return inputs, options | {name: bool(options.get(name))}
