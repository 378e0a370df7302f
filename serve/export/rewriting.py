"""Functions of PyTorch that its exporter to ONNX lacks, computed by others while a network is traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["rewritten"]

_T = TypeVar("_T")


def rewritten(network: nn.Module, trace: Callable[[], _T]) -> _T:
    """Return what ``trace`` returns: of the network as it is, or where it raises, with other functions in places.

    An LSTM with projections and ``nn.EmbeddingBag`` are traced without an error, into graphs that ONNX Runtime cannot
    run, or of which it crashes: they are always rewritten.

    Raises:
        Exception: of the network as it is, where the other functions do not help.
    """
    first: Exception | None = None
    if not any(_unfit(layer) for layer in network.modules()):
        try:
            return trace()
        except Exception as error:  # the exporter raises errors of any class
            first = error
    try:
        with _Rewriting():
            return trace()
    except Exception as error:
        raise first or error  # noqa: B904  (the first's cause is told apart from its context)


def _unfit(layer: nn.Module) -> bool:
    return isinstance(layer, nn.EmbeddingBag) or (isinstance(layer, nn.LSTM) and layer.proj_size > 0)


class _Rewriting(TorchFunctionMode):
    """Calls other functions in the places of those that have one."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _OTHERS.get(func, func)(*args, **(kwargs or {}))


def _lstm(x: Tensor, states: Any, *options: Any) -> Any:
    """Compute an LSTM step by step if it has projections: its hidden state is then smaller than its cell."""
    if isinstance(states, list | tuple) and states[0].shape != states[1].shape:
        return torch.ops.aten.lstm.input.decompose(x, states, *options)
    return torch.lstm(x, states, *options)


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """Compute attention without heads, (B, L, E), as that of one head."""
    if query.dim() != 3:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask, **options)
    mask = attn_mask[:, None] if attn_mask is not None and attn_mask.dim() == 3 else attn_mask
    one = functional.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None], mask, **options)
    return one.squeeze(1)


def _cdist(one: Tensor, other: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    """Compute distances (..., N, M) between the rows of (..., N, E) and (..., M, E)."""
    return torch.linalg.vector_norm(one[..., :, None, :] - other[..., None, :, :], ord=p, dim=-1)


def _embedding_bag(indices: Tensor, weight: Tensor, offsets: Tensor | None = None, **options: Any) -> Tensor:
    """Compute the sum, mean or maximum (B, E) of the embeddings of each row of indices (B, N)."""
    if indices.dim() != 2 or options.get("padding_idx") is not None:
        raise NotImplementedError("nn.EmbeddingBag with offsets or padding: use nn.Embedding, and sum over each row")
    rows, mode = functional.embedding(indices, weight), options.get("mode", "mean")
    if (factors := options.get("per_sample_weights")) is not None:
        rows = rows * factors[..., None]
    return rows.amax(1) if mode == "max" else rows.sum(1) if mode == "sum" else rows.mean(1)


_OTHERS: dict[Any, Callable[..., Any]] = {
    torch.lstm: _lstm,
    functional.scaled_dot_product_attention: _attention,
    torch.cdist: _cdist,
    functional.embedding_bag: _embedding_bag,
}
