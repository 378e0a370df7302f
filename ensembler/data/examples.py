"""The interface of data for training and prediction, and arrays of features as one implementation.

Images are the other implementation (:mod:`ensembler.data.images`). Your own is any class with the members of
:class:`Examples`: a run's manifest names it as ``package.module:Class``, and it is imported from there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from ensembler.device import upload
from ensembler.errors import ShapeError, UsageError
from ensembler.naming import import_object

__all__ = ["Arrays", "Examples", "InMemory", "find", "hash_tensors", "stream"]

Inputs = Callable[[Tensor], Tensor]
Epoch = tuple[Tensor, Tensor]
Cut = Callable[[Tensor, Tensor], Iterator[tuple[Tensor, Tensor]]]


@runtime_checkable
class Examples(Protocol):
    """N examples and their targets, in memory or in files.

    Attributes:
        kind: its name in manifests; see :func:`find`.
        augmentations: the names that :meth:`draw` takes; the last one, ``"none"``, changes nothing.
        labels: (N,) targets, on the CPU or on the examples' device.
    """

    kind: ClassVar[str]
    augmentations: ClassVar[Sequence[str]]

    @property
    def labels(self) -> Tensor: ...

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of one stored example."""
        ...

    @property
    def sha256(self) -> str:
        """Hash that identifies these examples, whatever their origin."""
        ...

    def __len__(self) -> int: ...

    def part(self, index: Any) -> Self:
        """Return the examples at ``index``."""
        ...

    def batches(self, size: int) -> Iterator[InMemory]:
        """Yield the examples in order, ``size`` at a time; the last batch may be smaller."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Return the same examples on another device; those in files stay where they are."""
        ...

    def augmented(self, index: Tensor, augmentation: str, choices: Tensor) -> InMemory:
        """Return the examples at ``index`` (B,), augmented by the ``choices`` (B, ...) of :meth:`draw`."""
        ...

    def stream(
        self, epochs: Iterator[Epoch], cut: Cut, augmentation: str, device: torch.device, workers: int | None
    ) -> Generator[InMemory, None, None]:
        """Yield the batches of epochs, on ``device``; for examples in memory, see :func:`stream`.

        Args:
            epochs: each epoch's order (N,) and choices (N, ...), on the CPU.
            cut: splits an epoch's order and choices into those of its batches.
            augmentation: one of :attr:`augmentations`.
            device: the device of examples in memory, and the destination of examples from files.
            workers: processes that read files.
        """
        ...

    @staticmethod
    def draw(augmentation: str, count: int, generator: torch.Generator) -> Tensor:
        """Draw how to augment each of ``count`` examples from a CPU generator: (count, ...) int64."""
        ...

    @staticmethod
    def inputs(mean: Sequence[float], std: Sequence[float], device: torch.device | str) -> Inputs:
        """Return a function from stored examples (B, ...) on ``device`` to the network's inputs."""
        ...

    @staticmethod
    def check(x: Tensor, shape: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> bool:
        """Return whether ``x`` holds stored examples (True) or inputs of the network (False).

        Args:
            x: to check.
            shape: of one stored example.
            mean: of the dataset's normalisation.
            std: likewise.

        Raises:
            ShapeError: neither.
        """
        ...


class InMemory(Examples, Protocol):
    """Examples that are tensors in memory."""

    @property
    def data(self) -> Tensor:
        """The stored examples (N, ...)."""
        ...


@dataclass(frozen=True, eq=False)
class Arrays:
    """Rows of F features and their targets, in memory.

    Attributes:
        data: (N, F) float32.
        labels: (N,) int64 classes, or float32 values.
    """

    kind: ClassVar[str] = "arrays"
    augmentations: ClassVar[Sequence[str]] = ("none",)

    data: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of one row: (F,)."""
        return tuple(self.data.shape[1:])

    @cached_property
    def sha256(self) -> str:
        """Hash of the shape, features and targets."""
        return hash_tensors(self.data, self.labels)

    def to(self, device: torch.device | str) -> Arrays:
        """Return the same rows on another device."""
        return Arrays(self.data.to(device), self.labels.to(device))

    def part(self, index: Any) -> Arrays:
        """Return the rows at ``index``."""
        return Arrays(self.data[index], self.labels[index])

    def batches(self, size: int) -> Iterator[Arrays]:
        """Yield the rows in order, ``size`` at a time; the last batch may be smaller."""
        for start in range(0, len(self), size):
            yield self.part(slice(start, start + size))

    def augmented(self, index: Tensor, augmentation: str, choices: Tensor) -> Arrays:
        """Return the rows at ``index`` (B,); arrays have no augmentation."""
        return self.part(index)

    def stream(
        self, epochs: Iterator[Epoch], cut: Cut, augmentation: str, device: torch.device, workers: int | None
    ) -> Generator[InMemory, None, None]:
        """Yield the batches of epochs; see :func:`stream`."""
        return stream(self, epochs, cut, augmentation, device)

    @staticmethod
    def draw(augmentation: str, count: int, generator: torch.Generator) -> Tensor:
        """Return (count, 0): there is nothing to draw."""
        return torch.empty(count, 0, dtype=torch.int64)

    @staticmethod
    def inputs(mean: Sequence[float], std: Sequence[float], device: torch.device | str) -> Inputs:
        """Return a function that standardises features: ``(x - mean) / std``."""
        shift, scale = (torch.tensor(each, dtype=torch.float32, device=device) for each in (mean, std))
        return lambda rows: (rows.float() - shift) / scale

    @staticmethod
    def check(x: Tensor, shape: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> bool:
        """Return True: rows (B, F) of floats always count as stored examples.

        Raises:
            ShapeError: ``x`` is of another shape or type.
        """
        if not (x.is_floating_point() and x.dim() == 2 and x.shape[1:] == tuple(shape)):
            raise ShapeError(f"expected rows of {shape[0]} features, (B, {shape[0]}) float, found {tuple(x.shape)}")
        return True


def stream(
    examples: InMemory, epochs: Iterator[Epoch], cut: Cut, augmentation: str, device: torch.device
) -> Generator[InMemory, None, None]:
    """Yield the batches of examples in memory; an epoch's order and choices are uploaded together."""
    for order, choices in epochs:
        for index, chosen in cut(upload(order, device), upload(choices, device)):
            yield examples.augmented(index, augmentation, chosen)


def hash_tensors(first: Tensor, *others: Tensor) -> str:
    """Return the hexadecimal SHA-256 of the first tensor's shape and of all tensors' content."""
    digest = hashlib.sha256(repr(tuple(first.shape)).encode())
    for tensor in (first, *others):
        digest.update(tensor.contiguous().cpu().numpy().data)
    return digest.hexdigest()


def find(kind: str) -> type[Examples]:
    """Return the class of a manifest's kind of data: ``"images"``, ``"arrays"`` or ``package.module:Class``.

    Raises:
        UsageError: there is no such kind.
    """
    from ensembler.data.images import Split

    own: dict[str, type[Examples]] = {"images": Split, "arrays": Arrays}
    cls = own.get(kind) or import_object(kind, "kind of data")
    if not isinstance(cls, type):
        raise UsageError(f"{kind} is not a kind of data: name a class that does as ensembler.data.examples.Examples")
    return cls
