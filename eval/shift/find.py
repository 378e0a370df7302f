"""Test images under shift: official CIFAR-10-C and CIFAR-100-C where they are there, else corruptions generated here.

Generated images are never passed off as the official ones: the set's makers drew without a seed, so nobody can make
the same files again, and figures on generated images do not compare with published ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ensembler.datasets import Dataset, default_root
from ensembler.errors import DataError, UsageError
from ensembler.eval.shift.cifar_c import (
    LABELS,
    check_generated,
    check_official,
    constants_of,
    read_record,
    read_rows,
    stored,
)
from ensembler.eval.shift.corruptions import AVAILABLE, HEADLINE, SEVERITIES, VALIDATION, corrupt, fingerprint
from ensembler.images import Images

__all__ = ["SHIFTS", "Cell", "Shift", "find_shift"]

SHIFTS = ("cifar10c", "cifar100c", "corruptions")
_OFFICIAL = {"cifar10c": ("cifar10", "CIFAR-10-C"), "cifar100c": ("cifar100", "CIFAR-100-C")}  # dataset, folder


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
        test: the clean test images, or the chosen part of them; in memory, or in their files.
        indices: (N,) their positions in the whole test set.
        folder: of files in the official layout: the official ones, or some that ``ensembler data corrupt`` made.
        stored: the corruptions that are read from there; the others are made when they are asked for.
        seed: of the generated ones.
    """

    name: str
    source: Literal["official", "generated"]
    corruptions: tuple[str, ...]
    test: Images
    indices: Tensor
    folder: Path | None = None
    stored: tuple[str, ...] = ()
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
            title = _OFFICIAL[self.name][1]
            return f"Shift: the official {title} files, {len(self.corruptions)} corruptions at 5 severities."
        constants = {"cifar": "CIFAR-10-C's 32 x 32 constants", "imagenet": "ImageNet-C's constants"}
        return (
            f"Shift: generated with {constants[constants_of(self.test.shape)]}, seed {self.seed}, "
            f"{len(self.corruptions)} corruptions at 5 severities; not the official files, so not comparable with "
            "published figures."
        )

    def cells(self) -> Iterator[Cell]:
        """Every corruption at every severity."""
        return (Cell(corruption, severity) for corruption in self.corruptions for severity in SEVERITIES)

    def images(self, cell: Cell | None, part: Any = slice(None)) -> Tensor:
        """The test images, or a part of them, under one cell's corruption, or clean: (B, H, W, 3) uint8."""
        if cell is not None and self.folder is not None and cell.corruption in self.stored:
            rows = read_rows(self.folder / f"{cell.corruption}.npy", self.source == "generated")
            count = len(rows) // len(SEVERITIES)
            return torch.from_numpy(rows[(cell.severity - 1) * count + self.indices[part].numpy()])
        clean = self.test[part].images
        if cell is None:
            return clean
        return corrupt(clean, cell.corruption, cell.severity, indices=self.indices[part], seed=self.seed)

    def batches(self, cell: Cell | None, size: int) -> Iterator[Tensor]:
        """The images of one cell, or the clean ones, in order, at most ``size`` at a time."""
        return (self.images(cell, slice(start, start + size)) for start in range(0, len(self.test), size))

    def key(self, cell: Cell) -> str:
        """What tells one cell's images and labels from any others: for keeping predictions. None is made for it."""
        if self.source == "official":
            digest = hashlib.sha256(repr((len(self.test), *self.test.shape)).encode())
            digest.update(self.test.labels.contiguous().numpy().data)
            for images in self.batches(cell, 1024):
                digest.update(images.numpy().data)
            return f"official/{digest.hexdigest()}"
        digest = hashlib.sha256(self.test.sha256.encode() + self.indices.contiguous().numpy().tobytes())
        made = fingerprint(cell.corruption, cell.severity, self.seed, self.test.shape)
        return f"generated/{cell.corruption}/{cell.severity}/{self.seed}/{made}/{digest.hexdigest()}"


def find_shift(name: str, dataset: Dataset, indices: Tensor, root: Path | None = None, seed: int = 0) -> Shift:
    """The shift of that name for a dataset's test images.

    Args:
        name: ``"cifar10c"`` and ``"cifar100c"`` are the official files for the datasets ``"cifar10"`` and
            ``"cifar100"`` where they are there, else generated, as for any other dataset; ``"corruptions"`` is always
            generated.
        dataset: whose test images.
        indices: (N,) which of its test images to use.
        root: the folder of ``CIFAR-10-C/``, or that folder itself; by default where datasets lie. A folder that
            ``ensembler data corrupt`` made of the same images with the same seed is read instead of made again.
        seed: of the generated ones.

    Raises:
        UsageError: an unknown shift.
        DataError: the files are there, but are not what they should be.
    """
    if name not in SHIFTS:
        raise UsageError(f"unknown shift {name!r}: use {', '.join(SHIFTS)}")
    test, chosen = dataset.test, dataset.test.part(indices)
    for folder, may_be_official in _folders(name, dataset.name, root or default_root()):
        record, found = read_record(folder), stored(folder)
        if record is not None:
            if found and (record.test_sha256, record.seed) == (test.sha256, seed):
                check_generated(folder, test, seed)
                return Shift(name, "generated", AVAILABLE, chosen, indices, folder, found, seed)
        elif may_be_official and (folder / LABELS).is_file():
            if not found:
                raise DataError(f"{folder} has {LABELS} but no corruption: fetch it again with ensembler data download")
            check_official(folder, test)
            return Shift(name, "official", found, chosen, indices, folder, found)
    return Shift(name, "generated", AVAILABLE, chosen, indices, seed=seed)


def _folders(name: str, dataset: str, root: Path) -> Iterator[tuple[Path, bool]]:
    """Where files may lie, and whether those there can be the official ones of this dataset."""
    official_for, title = _OFFICIAL.get(name, (None, None))
    if title is not None and dataset == official_for:
        yield root / title, True
    yield root, dataset == official_for
