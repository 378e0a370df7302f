"""What training and prediction need of data, and plain arrays of features as one kind of it.

Images are the other kind (:mod:`ensembler.images`). A third is any class with the members of :class:`Examples`; a run
names it in its manifest, as ``package.module:Class``, and finds it there again.
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
from ensembler.naming import imported

__all__ = ["Arrays", "Examples", "InMemory", "find", "stream"]

Inputs = Callable[[Tensor], Tensor]
Epoch = tuple[Tensor, Tensor]
Cut = Callable[[Tensor, Tensor], Iterator[tuple[Tensor, Tensor]]]


@runtime_checkable
class Examples(Protocol):
    """N examples and their targets, in memory or in files.

    Attributes:
        kind: in manifests; see :func:`find`.
        augmentations: the names that :meth:`draw` takes; the last one, ``"none"``, changes nothing.
        labels: (N,) targets, on the CPU or where the examples are.
    """

    kind: ClassVar[str]
    augmentations: ClassVar[Sequence[str]]

    @property
    def labels(self) -> Tensor: ...

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of one example as it is stored."""
        ...

    @property
    def sha256(self) -> str:
        """Hash that names these examples, whatever their origin."""
        ...

    def __len__(self) -> int: ...

    def part(self, index: Any) -> Self:
        """Some of the examples."""
        ...

    def batches(self, size: int) -> Iterator[InMemory]:
        """The examples in order, ``size`` at a time; the last may be fewer."""
        ...

    def augmented(self, index: Tensor, augmentation: str, choices: Tensor) -> InMemory:
        """The examples of ``index`` (B,), varied by ``choices`` (B, ...) of :meth:`draw`."""
        ...

    def stream(
        self, epochs: Iterator[Epoch], cut: Cut, augmentation: str, device: torch.device, workers: int | None
    ) -> Generator[InMemory, None, None]:
        """The batches of epochs, on ``device``; of examples in memory, see :func:`stream`.

        Args:
            epochs: each epoch's order (N,) and choices (N, ...), on the CPU.
            cut: from an epoch's order and choices to those of its batches.
            augmentation: one of :attr:`augmentations`.
            device: where examples in memory lie, and those of files are brought to.
            workers: processes that read files.
        """
        ...

    @staticmethod
    def draw(augmentation: str, count: int, generator: torch.Generator) -> Tensor:
        """How each of ``count`` examples is to be varied, (count, ...) int64, drawn from a CPU generator."""
        ...

    @staticmethod
    def inputs(mean: Sequence[float], std: Sequence[float], device: torch.device | str) -> Inputs:
        """A function from stored examples (B, ...) on ``device`` to what the network sees, its constants made once."""
        ...

    @staticmethod
    def check(x: Tensor, shape: Sequence[int]) -> bool:
        """Whether ``x`` holds stored examples (True) or inputs as the network sees them (False).

        Raises:
            ShapeError: neither.
        """
        ...


class InMemory(Examples, Protocol):
    """Examples whose tensors are at hand."""

    @property
    def data(self) -> Tensor:
        """(N, ...) as stored."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """The same examples on another device."""
        ...


@dataclass(frozen=True, eq=False)
class Arrays:
    """Rows of features and their targets, in memory.

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
        """(F,)."""
        return tuple(self.data.shape[1:])

    @cached_property
    def sha256(self) -> str:
        """Hash of shape, features and targets."""
        digest = hashlib.sha256(repr(tuple(self.data.shape)).encode())
        for tensor in (self.data, self.labels):
            digest.update(tensor.contiguous().cpu().numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> Arrays:
        """The same rows on another device."""
        return Arrays(self.data.to(device), self.labels.to(device))

    def part(self, index: Any) -> Arrays:
        """Some of the rows."""
        return Arrays(self.data[index], self.labels[index])

    def batches(self, size: int) -> Iterator[Arrays]:
        """The rows in order, ``size`` at a time; the last may be fewer."""
        for start in range(0, len(self), size):
            yield self.part(slice(start, start + size))

    def augmented(self, index: Tensor, augmentation: str, choices: Tensor) -> Arrays:
        """The rows of ``index`` (B,)."""
        return self.part(index)

    def stream(
        self, epochs: Iterator[Epoch], cut: Cut, augmentation: str, device: torch.device, workers: int | None
    ) -> Generator[InMemory, None, None]:
        """See :func:`stream`."""
        return stream(self, epochs, cut, augmentation, device)

    @staticmethod
    def draw(augmentation: str, count: int, generator: torch.Generator) -> Tensor:
        """Nothing to draw: (count, 0)."""
        return torch.empty(count, 0, dtype=torch.int64)

    @staticmethod
    def inputs(mean: Sequence[float], std: Sequence[float], device: torch.device | str) -> Inputs:
        """Standardised features: ``(x - mean) / std``."""
        shift, scale = (torch.tensor(each, dtype=torch.float32, device=device) for each in (mean, std))
        return lambda rows: (rows - shift) / scale

    @staticmethod
    def check(x: Tensor, shape: Sequence[int]) -> bool:
        """Rows (B, F) of floats are always taken as they are stored."""
        if not (x.is_floating_point() and x.dim() == 2 and x.shape[1:] == tuple(shape)):
            raise ShapeError(f"expected rows of {shape[0]} features, (B, {shape[0]}) float, found {tuple(x.shape)}")
        return True


def stream(
    examples: InMemory, epochs: Iterator[Epoch], cut: Cut, augmentation: str, device: torch.device
) -> Generator[InMemory, None, None]:
    """The batches of examples in memory: an epoch's order and choices go to the device at once."""
    for order, choices in epochs:
        for index, chosen in cut(upload(order, device), upload(choices, device)):
            yield examples.augmented(index, augmentation, chosen)


def find(kind: str) -> type[Examples]:
    """The class of a manifest's kind of data: ``"images"``, ``"arrays"``, or ``package.module:Class``.

    Raises:
        UsageError: no such kind.
    """
    from ensembler.images import Split

    own: dict[str, type[Examples]] = {"images": Split, "arrays": Arrays}
    found = own.get(kind) or imported(kind, "kind of data")
    if not isinstance(found, type):
        raise UsageError(f"{kind} is no kind of data: name a class with the members of ensembler.examples.Examples")
    return found
