"""The layout of CIFAR-10-C: one ``NAME.npy`` per corruption, and ``labels.npy``.

Of ``n`` test images a file holds ``5 n`` rows, uint8 ``(5 n, H, W, 3)``: rows ``[(s - 1) n : s n]`` are severity s, in
the test set's order. Files are mapped, never read whole, and never unpickled.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ensembler.data.images import Images
from ensembler.errors import DataError
from ensembler.eval.shift.corruptions import AVAILABLE, SEVERITIES
from ensembler.eval.shift.test_set import Shifted

__all__ = ["LABELS", "Rows", "StoredFolder", "map_array"]

LABELS = "labels.npy"


def map_array(path: Path, remedy: str) -> np.memmap[Any, Any]:
    """Map an ``.npy`` file into memory.

    Args:
        path: the file.
        remedy: the last clause of every error message.

    Raises:
        DataError: it is missing or damaged, or a pickle.
    """
    try:
        rows = np.lib.format.open_memmap(path, mode="r")  # refuses objects, and so every pickle
        longer = path.stat().st_size - rows.offset - rows.nbytes
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read {path}: {error}: {remedy}") from error
    if longer:
        raise DataError(f"{path} is {longer} bytes longer than its header says: {remedy}")
    return rows


@dataclass(frozen=True)
class StoredFolder:
    """A folder in this layout.

    Attributes:
        path: where it is.
        test: the clean test images.
        remedy: the last clause of every error message.
    """

    path: Path
    test: Images
    remedy: str

    @property
    def corruptions(self) -> tuple[str, ...]:
        """The corruptions that it has, in the protocol's order."""
        return tuple(name for name in AVAILABLE if self.file(name).is_file())

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of every file."""
        return (len(SEVERITIES) * len(self.test), *self.test.shape, 3)

    def file(self, corruption: str) -> Path:
        """Return the path of a corruption's file."""
        return self.path / f"{corruption}.npy"

    def rows(self, corruption: str) -> np.memmap[Any, Any]:
        """Map a corruption's images into memory.

        Raises:
            DataError: the file is damaged, or its shape or type is wrong.
        """
        rows, remedy = map_array(self.file(corruption), self.remedy), self.remedy
        if rows.shape == self.shape and rows.dtype == np.uint8 and rows.flags.c_contiguous:
            return rows
        if rows.ndim == 4 and rows.shape[1:3] != self.test.shape:
            remedy = "use --shift corruptions, or the test images in their own size"
        raise DataError(
            f"{self.file(corruption)} holds {rows.shape} of {rows.dtype}, not {self.shape} of uint8: {remedy}"
        )

    def some(self, corruption: str, severity: int, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Read a few images by seeking; a memory map would read 128 KB for each.

        Raises:
            DataError: the file is damaged, or its shape or type is wrong.
        """
        begin = self.rows(corruption).offset
        images = np.empty((len(indices), *self.shape[1:]), dtype=np.uint8)
        with self.file(corruption).open("rb", buffering=0) as file:
            for image, index in zip(images, ((severity - 1) * len(self.test) + indices).tolist(), strict=True):
                file.seek(begin + index * image.nbytes)
                file.readinto(image)  # type: ignore[arg-type]
        return images

    def check_labels(self) -> None:
        """Check that the labels are the test set's.

        Raises:
            DataError: they differ, or the file is damaged.
        """
        path, expected = self.path / LABELS, np.tile(self.test.labels.numpy(), len(SEVERITIES))
        labels = map_array(path, self.remedy)
        if labels.shape != expected.shape:
            raise DataError(f"{path} holds {labels.shape} labels, not {expected.shape}: {self.remedy}")
        wrong = np.flatnonzero(labels != expected)
        if len(wrong):
            raise DataError(
                f"{path} is not the test set's labels five times: row {wrong[0]} is {labels[wrong[0]]}, not "
                f"{expected[wrong[0]]}: {self.remedy}"
            )


@dataclass(frozen=True, eq=False)
class Rows(Shifted):
    """Images read from a file.

    Attributes:
        folder: where the file is.
        same_as: images known to be the same; their hash then names these.
    """

    folder: StoredFolder
    same_as: Shifted | None = None

    def images(self, part: slice, device: torch.device | None = None) -> Tensor:
        """Return some of the images, (B, H, W, 3) uint8, on the CPU."""
        places = (self.severity - 1) * len(self.folder.test) + self.indices[part].numpy()
        return torch.from_numpy(self.folder.rows(self.corruption)[places])

    @cached_property
    def sha256(self) -> str:
        """Hash of the images and labels."""
        if self.same_as is not None:
            return self.same_as.sha256
        digest = hashlib.sha256(repr((len(self), *self.shape)).encode())
        digest.update(self.labels.contiguous().numpy().data)
        for batch in self.batches(1024):
            digest.update(batch.images.numpy().data)
        return digest.hexdigest()
