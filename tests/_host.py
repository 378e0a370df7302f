"""A GPU's rules where there is no GPU: what a step needs of the host, and whether it can be captured and replayed."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[1]
PACKAGE = tuple(f"{ROOT / folder}/" for folder in ("ensembler", "trainers"))
aten = torch.ops.aten
FUSED = (aten._fused_sgd_.default, aten._fused_sgd_.tensor_lr, aten._fused_adamw_.default, aten._fused_adamw_.tensor_lr)


class Needs(TorchDispatchMode):
    """Lists where the host is needed by what runs on "meta", a device of shapes without data.

    A value that is read is 0 or false, and a tensor a uniform distribution, so that whatever reads them goes on.

    Attributes:
        noting: whether places are listed.
        places: how often the host was needed, by ``"what at file:line"``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.noting, self.places = True, Counter[str]()

    def note(self, what: str) -> None:
        if self.noting:
            self.places[f"{what} at {_place()}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        devices = _devices((args, kwargs))
        if "meta" in devices:
            if func in (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default):
                self.note("a value is read")
                return False if func is aten.equal.default else 0
            if func is aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
                self.note("a tensor is read")
                dtype = kwargs.get("dtype") or args[0].dtype
                return torch.full(args[0].shape, 1 / max(1, *args[0].shape[-1:]), dtype=torch.float64).to(dtype)
            if func in FUSED:  # in place, and without shapes of "meta"
                return None
            if func is aten.copy_.default and args[0].device.type == "cpu":
                self.note("a tensor is read")
                return args[0].zero_()
        result = func(*args, **kwargs)
        if len(devices | _devices(result)) > 1:
            self.note(f"{func} on several devices")
        return result


class _Made(TorchFunctionMode):
    """Notes tensors that are made on "meta" of Python numbers."""

    def __init__(self, needs: Needs) -> None:
        super().__init__()
        self.needs = needs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        listed = func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[1], list)
        if (listed or func in (torch.tensor, torch.as_tensor, Tensor.new_tensor)) and "meta" in _devices(
            (args, result)
        ):
            self.needs.note("a tensor is made of Python numbers")
        return result


@contextlib.contextmanager
def on_meta() -> Iterator[Needs]:
    """Lists the block's needs; there, autocast does nothing and SGD may be fused, neither of which "meta" has."""
    needs, fused = Needs(), ["cpu", "cuda", "meta"]
    with (
        patch("torch.autocast", lambda *_, **__: contextlib.nullcontext()),
        patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: fused),
        needs,
        _Made(needs),
    ):
        yield needs


class Recorder(TorchDispatchMode):
    """Records operations, and does them again on the same memory with the same numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # of memory that is written to: itself, and what it held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default, aten.equal.default):
            raise RuntimeError(f"{_place()} reads a value: no graph can hold that")
        kwargs = kwargs or {}
        if _is_view(func):  # in inference mode, one that may copy (to, reshape) comes here whole
            with self:
                parts = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if parts is NotImplemented else parts
        for tensor in _written(func, args, kwargs):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.before:
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                self.before[storage.data_ptr()] = whole, whole.clone()
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, recorded in self.calls:
            for old, new in zip(tree_leaves(recorded), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)  # to where the next operation reads it


class CpuGraph:
    """A CUDA graph's rules on the CPU: what is captured is not computed, and only operations on tensors are replayed.

    Attributes:
        replays: how often any of them was replayed.
    """

    replays: ClassVar[int] = 0

    def __init__(self) -> None:
        self._recorder = Recorder()

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        with torch.random.fork_rng([]):
            try:
                with self._recorder:
                    yield
            finally:
                for whole, before in self._recorder.before.values():
                    whole.copy_(before)

    def replay(self) -> None:
        CpuGraph.replays += 1
        self._recorder.replay()


class Operations(TorchDispatchMode):
    """Counts operations on tensors by name, but for views, which cost nothing on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += func.namespace == "aten" and not _is_view(func)
        return func(*args, **(kwargs or {}))


def _is_view(func: Any) -> bool:
    returns = [found.alias_info for found in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returns)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operation writes to; BatchNorm's does not declare its running statistics."""
    for place, argument in enumerate(func._schema.arguments):
        declared = argument.alias_info is not None and argument.alias_info.is_write
        if declared or argument.name in ("running_mean", "running_var"):
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor))


def _devices(tree: Any) -> set[str]:
    return {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


def _place() -> str:
    """The innermost line of the package that is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "no line of the package"
