"""A module's parameters as one flat vector, its gradients as another.

The vertices of a subspace are vectors; a network is a tree of tensors. Here the tree's tensors become *views* of one
contiguous vector, so that writing ``c @ V`` into the network is one matrix-vector product and reading its gradient is
free. The network's layers are not changed: any ``nn.Module`` works.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ensembler.errors import ShapeError, UsageError

__all__ = ["FlatWeights", "tie"]


@dataclass(frozen=True)
class _Slot:
    """The position of one parameter in the vector."""

    name: str
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    @property
    def size(self) -> int:
        return self.shape.numel()

    def view(self, vector: Tensor) -> Tensor:
        """Return this parameter's view of a ``(P,)`` vector."""
        return vector[self.offset : self.offset + self.size].as_strided(
            self.shape, self.stride, vector.storage_offset() + self.offset
        )


class FlatWeights:
    """A module's trainable parameters as views of ``vector``, and their gradients in ``grad``.

    Tied parameters occur once in the vector. Frozen parameters (``requires_grad=False``) and buffers are not in it: see
    :meth:`frozen` and :meth:`buffers`. A channels-last parameter stays channels-last: the vector holds elements in
    memory order. Move the module to its device, and choose its memory format, before flattening it.

    Args:
        module: any module; it works as before and keeps its parameter objects.
        gather: whether :meth:`backward` computes all gradients before it adds them to ``grad``, in one operation. By
            default on a GPU, where adding each by itself is a launch for every parameter; on a CPU, each is added as
            it is computed, which needs no memory beside ``grad``.

    Attributes:
        vector: (P,) the parameters.
        grad: (P,) their gradients, accumulated by :meth:`backward`; zero it between steps.

    Raises:
        UsageError: there is no trainable parameter, there are several types or devices, or the network's state dict
            holds more than tensors.
    """

    def __init__(self, module: nn.Module, gather: bool | None = None) -> None:
        self.module = module
        _check_state(module)
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not trainable:
            raise UsageError(f"{type(module).__name__} has no trainable parameter: nothing to make an ensemble of")
        kinds = {(p.dtype, p.device) for p in trainable.values()}
        if len(kinds) > 1:
            names = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            raise UsageError(f"{type(module).__name__} mixes parameters of {names}: use one type and device")
        self._slots: list[_Slot] = []
        offset = 0
        for name, parameter in trainable.items():
            self._slots.append(_Slot(name, offset, parameter.shape, _dense_stride(parameter)))
            offset += parameter.numel()
        ((dtype, device),) = kinds
        self.vector = torch.empty(offset, dtype=dtype, device=device)
        self.grad = torch.zeros_like(self.vector)
        for slot, parameter in zip(self._slots, trainable.values(), strict=True):
            view = slot.view(self.vector)
            view.copy_(parameter.detach())
            parameter.data = view
        self._parameters = list(trainable.values())
        self._gradients = [slot.view(self.grad) for slot in self._slots]
        self._gathers = device.type != "cpu" if gather is None else gather
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = None if self._gathers else gradient

    def __len__(self) -> int:
        """The number of parameters P."""
        return self.vector.numel()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar to ``grad``."""
        if not self._gathers:
            loss.backward()  # type: ignore[no-untyped-call]
            return
        self._forget_gradients()  # of a pass that failed
        loss.backward()  # type: ignore[no-untyped-call]
        pairs = zip(self._gradients, self._parameters, strict=True)
        found = [(own, parameter.grad) for own, parameter in pairs if parameter.grad is not None]
        if found:
            torch._foreach_add_([own for own, _ in found], [gradient for _, gradient in found])
        self._forget_gradients()

    def slices(self, least_dimensions: int = 0) -> dict[str, slice]:
        """Return the position in a vector of each parameter with at least ``least_dimensions`` dimensions, by name."""
        return {
            slot.name: slice(slot.offset, slot.offset + slot.size)
            for slot in self._slots
            if len(slot.shape) >= least_dimensions
        }

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """Return views of a vector (P,) by parameter name, each in the parameter's shape."""
        return {slot.name: slot.view(vector) for slot in self._slots}

    def unflatten(self, vectors: Tensor) -> dict[str, Tensor]:
        """Split ``vectors`` (K, P) into tensors by parameter name, each with a leading K axis."""
        self._check(vectors)
        return {
            slot.name: torch.stack([slot.view(row) for row in vectors.detach()]).contiguous() for slot in self._slots
        }

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Invert :meth:`unflatten`: return (K, P) on this module's device, from tensors with a leading K axis.

        Raises:
            ShapeError: a parameter is missing, unknown or of another shape; the message names it.
        """
        expected = {slot.name for slot in self._slots}
        if unknown := sorted(set(tensors) - expected):
            raise ShapeError(f"the network has no parameter {unknown[0]!r}: these weights are another architecture's")
        if missing := sorted(expected - set(tensors)):
            raise ShapeError(f"no weights for parameter {missing[0]!r}: these weights are another architecture's")
        count = len(tensors[self._slots[0].name])
        vectors = self.vector.new_empty(count, len(self))
        for slot in self._slots:
            given = tensors[slot.name]
            if tuple(given.shape) != (count, *slot.shape):
                raise ShapeError(
                    f"parameter {slot.name!r}: expected {(count, *slot.shape)}, found {tuple(given.shape)}: "
                    "these weights are another architecture's"
                )
            for row, tensor in zip(vectors, given, strict=True):
                slot.view(row).copy_(tensor)
        return vectors

    def buffers(self) -> dict[str, Tensor]:
        """Return a copy of the persistent buffers (such as BatchNorm statistics), by name."""
        return {name: buffer.detach().clone() for name, buffer in self._persistent_buffers().items()}

    def load_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Copy buffers into the module, in place.

        Raises:
            ShapeError: other names, or another shape, which a copy would stretch where it can.
        """
        own = self._persistent_buffers()
        if set(buffers) != set(own):
            name = sorted(set(buffers) ^ set(own))[0]
            side = "in the weights" if name in buffers else "in the network"
            raise ShapeError(f"buffer {name!r} is only {side}: these weights are another architecture's")
        for name, buffer in own.items():
            if buffers[name].shape != buffer.shape:
                raise ShapeError(
                    f"buffer {name!r}: expected {tuple(buffer.shape)}, found {tuple(buffers[name].shape)}: "
                    "these weights are another architecture's"
                )
            buffer.copy_(buffers[name])

    def frozen(self) -> dict[str, Tensor]:
        """Return the parameters that are not trained (``requires_grad=False``), by name."""
        return {name: p.detach() for name, p in self.module.named_parameters() if not p.requires_grad}

    def load_frozen(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy frozen parameters into the module, in place."""
        for name, parameter in self.frozen().items():
            if name not in tensors or tensors[name].shape != parameter.shape:
                raise ShapeError(f"frozen parameter {name!r} is missing or of another shape")
            parameter.copy_(tensors[name])

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _persistent_buffers(self) -> dict[str, Tensor]:
        names = self.module.state_dict(keep_vars=True)
        return {name: buffer for name, buffer in self.module.named_buffers() if name in names}

    def _check(self, vectors: Tensor) -> None:
        if vectors.dim() != 2 or vectors.shape[1] != len(self):
            raise ShapeError(f"expected vectors of shape (K, {len(self)}), found {tuple(vectors.shape)}")


def tie(module: nn.Module) -> None:
    """Make parameters that share all of their memory one parameter, which stays tied when it is moved or reordered.

    Raises:
        UsageError: two of them share a part of their memory only; the message names them.
    """
    first: dict[int, tuple[str, nn.Parameter]] = {}
    for prefix, owner in module.named_modules():
        for own, parameter in owner.named_parameters(recurse=False):
            if parameter.device.type == "meta" or isinstance(parameter, UninitializedParameter):
                continue
            name = f"{prefix}.{own}".lstrip(".")
            other, known = first.setdefault(parameter.untyped_storage().data_ptr(), (name, parameter))
            if known is parameter or not parameter.numel():
                continue
            if _memory(known) == _memory(parameter) and known.requires_grad == parameter.requires_grad:
                owner.register_parameter(own, known)
            elif _overlap(known, parameter):
                raise UsageError(
                    f"the parameters {other} and {name} share a part of their memory, which training would pull "
                    "apart: use one parameter for both, or copy one of them"
                )


def _memory(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _overlap(*tensors: Tensor) -> bool:
    """Whether the spans in memory of two tensors overlap."""
    starts = [tensor.data_ptr() for tensor in tensors]
    lengths = [1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in tensors]
    ends = [a + t.element_size() * length for a, t, length in zip(starts, tensors, lengths, strict=True)]
    return max(starts) < min(ends)


def _check_state(module: nn.Module) -> None:
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            owner = name.removesuffix("_extra_state").rstrip(".") or type(module).__name__
            raise UsageError(
                f"the state dict of {owner} holds a {type(value).__name__} ({name}), and a member is made of tensors: "
                "register what it needs as a buffer, and remove get_extra_state"
            )


def _dense_stride(parameter: Tensor) -> tuple[int, ...]:
    """Return the parameter's strides if it has no gaps in memory (as with channels-last), else contiguous ones."""
    strides = sorted(
        (stride, size) for stride, size in zip(parameter.stride(), parameter.shape, strict=True) if size > 1
    )
    expected = 1
    for stride, size in strides:
        if stride != expected:
            return torch.empty(parameter.shape, device="meta").stride()
        expected *= size
    return parameter.stride()
