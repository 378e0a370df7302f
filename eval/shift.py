"""Test images under shift: the official CIFAR-10-C files where they are there, else corruptions generated here.

Generated images are never passed off as the official ones: the set's makers drew without a seed, so nobody can make
the same files again, and figures on generated images do not compare with published ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ensembler.datasets import Dataset, Split, default_root
from ensembler.errors import DataError, UsageError
from ensembler.eval.corruptions import AVAILABLE, HEADLINE, SEVERITIES, VALIDATION, corrupt
from ensembler.images import Images

__all__ = ["SHIFTS", "Cell", "Shift", "find_shift"]

SHIFTS = ("cifar10c",)


@dataclass(frozen=True)
class Cell:
    """One corruption at one severity, 1 to 5."""

    corruption: str
    severity: int


@dataclass(frozen=True, eq=False)
class Shift:
    """A corrupted test set, cell by cell.

    Attributes:
        name: as the user asked for it.
        source: ``"official"`` files or ``"generated"`` here.
        corruptions: those it covers.
        test: the clean test images, or the chosen part of them.
        indices: (N,) their positions in the whole test set.
        folder: of the official files.
        seed: of the generated ones.
    """

    name: str
    source: Literal["official", "generated"]
    corruptions: tuple[str, ...]
    test: Split
    indices: Tensor
    folder: Path | None = None
    seed: int = 0

    @property
    def headline(self) -> tuple[str, ...]:
        """The covered ones among the protocol's 15, over which means are taken."""
        return tuple(name for name in HEADLINE if name in self.corruptions)

    @property
    def not_covered(self) -> tuple[str, ...]:
        """The protocol's corruptions that it lacks."""
        return tuple(name for name in HEADLINE + VALIDATION if name not in self.corruptions)

    @property
    def note(self) -> str:
        """One sentence that must stand beside every number from it."""
        if self.source == "official":
            return f"Shift: the official CIFAR-10-C files, {len(self.corruptions)} corruptions at 5 severities."
        return (
            f"Shift: generated with CIFAR-10-C's 32 x 32 constants, seed {self.seed}, {len(self.corruptions)} "
            "corruptions at 5 severities; not the official files, so not comparable with published figures."
        )

    def cells(self) -> Iterator[Cell]:
        """Every corruption at every severity."""
        return (Cell(corruption, severity) for corruption in self.corruptions for severity in SEVERITIES)

    def images(self, cell: Cell) -> Tensor:
        """The test images under one cell's corruption: (N, H, W, 3) uint8."""
        if self.folder is None:
            return corrupt(self.test.images, cell.corruption, cell.severity, indices=self.indices, seed=self.seed)
        # Rows [(s - 1) * n : s * n] of a file are severity s, in the test set's order.
        rows = np.load(self.folder / f"{cell.corruption}.npy", mmap_mode="r", allow_pickle=False)
        count = len(rows) // len(SEVERITIES)
        return torch.from_numpy(rows[(cell.severity - 1) * count + self.indices.numpy()])


def find_shift(name: str, dataset: Dataset, indices: Tensor, root: Path | None = None, seed: int = 0) -> Shift:
    """The shift of that name for a dataset's test images.

    Args:
        name: ``"cifar10c"``.
        dataset: whose test images; the official files serve ``"cifar10"`` alone.
        indices: (N,) which of its test images to use.
        root: the folder of ``CIFAR-10-C/``, or that folder itself; by default where datasets lie. Where the files are
            missing, images are generated.
        seed: of the generated ones.

    Raises:
        UsageError: an unknown shift.
        DataError: the official files are there, but are not what they should be.
    """
    if name not in SHIFTS:
        raise UsageError(f"unknown shift {name!r}: use {', '.join(SHIFTS)}")
    test, chosen = dataset.test, dataset.test[indices]
    root = root or default_root()
    folders = [root / "CIFAR-10-C", root] if dataset.name == "cifar10" else []
    folder = next((folder for folder in folders if (folder / "labels.npy").is_file()), None)
    if folder is None:
        return Shift(name, "generated", AVAILABLE, chosen, indices, seed=seed)
    corruptions = tuple(name for name in HEADLINE + VALIDATION if (folder / f"{name}.npy").is_file())
    if not corruptions:
        raise DataError(f"{folder} has labels.npy but no corruption: unpack the archive again")
    _check_official(folder, corruptions, test)
    return Shift(name, "official", corruptions, chosen, indices, folder=folder)


def _check_official(folder: Path, corruptions: tuple[str, ...], test: Images) -> None:
    expected = (len(SEVERITIES) * len(test), *test.shape, 3)
    for corruption in corruptions:
        path = folder / f"{corruption}.npy"
        images = _open(path)
        if images.shape != expected or images.dtype != np.uint8:
            raise DataError(
                f"{path} holds {images.shape} of {images.dtype}, not {expected} of uint8: unpack the archive again"
            )
    labels = _open(folder / "labels.npy")
    if not np.array_equal(labels, np.tile(test.labels.numpy(), len(SEVERITIES))):
        raise DataError(f"{folder / 'labels.npy'} is not the test set's labels five times: unpack the archive again")


def _open(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read {path}: {error}: unpack the archive again") from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path} is not a NumPy array: unpack the archive again")
    return array
