"""Images of a folder in memory: each split is decoded at its first use, and kept for the next command."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensembler.data.decoding import MEND_OR_SKIP, unreadable
from ensembler.data.image_cache import kept, recorded
from ensembler.data.images import FileSplit, Split, read_images
from ensembler.data.splits import content_sha256

__all__ = ["DecodedSplit", "find_unreadable"]


class DecodedSplit(Split):
    """Images in memory from their first use on: mapped from the cache, or decoded and kept there.

    Labels, shape and length are known without. See :mod:`ensembler.data.image_cache`.

    Args:
        source: the files.
        role: ``"train"``, ``"validation"`` or ``"test"``, as the cache lists it.
        like: a file whose size all of them must have; by default they are resized.
        verify: called with this split when its images are first used; it raises where they are not the expected ones.
    """

    def __init__(
        self,
        source: FileSplit,
        role: str,
        like: Path | None = None,
        verify: Callable[[DecodedSplit], None] = lambda split: None,
    ) -> None:
        for name, value in {"source": source, "role": role, "like": like, "verify": verify}.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "labels", source.labels)

    source: FileSplit
    role: str
    like: Path | None
    verify: Callable[[DecodedSplit], None]

    def __reduce__(self) -> tuple[type[Split], tuple[Tensor, Tensor]]:
        """Another process, maybe of another machine, is sent the images themselves."""
        return Split, (self.images, self.labels)

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """Height and width."""
        return self.source.shape

    @cached_property
    def images(self) -> Tensor:  # type: ignore[override]
        """(N, H, W, 3) uint8, on the CPU.

        Raises:
            DataError: one cannot be read, or they are not the expected ones.
        """
        images, _ = self._decoded
        self.verify(self)
        return images

    @property
    def sha256(self) -> str:  # type: ignore[override]
        """Hash of the pixels and labels, which identifies the split whatever its origin."""
        return self._decoded[1]["sha256"]

    @property
    def files_sha256(self) -> str:
        """Hash of the bytes of the files, in order."""
        return self._decoded[1]["files_sha256"]

    @property
    def is_decoded(self) -> bool:
        """Whether the images are in memory."""
        return "_decoded" in self.__dict__

    @property
    def recorded_sha256(self) -> str | None:
        """The hash of the pixels and labels if it is known without the images; they may not be those any more."""
        texts = recorded(self.source.folder, self.source.files, self._what)
        return None if texts is None else texts.get("sha256")

    def verified(self, verify: Callable[[DecodedSplit], None]) -> DecodedSplit:
        """Return the same images, checked when they are first used."""
        return DecodedSplit(self.source, self.role, self.like, verify)

    @property
    def _what(self) -> dict[str, Any]:
        return {"of": f"{self.role} images", "shape": self.shape, "exact": self.like is not None}

    @cached_property
    def _decoded(self) -> tuple[Tensor, dict[str, str]]:
        return kept(self.source.folder, self.source.files, self._what, self._decode, self.labels)

    def _decode(self) -> tuple[Tensor, dict[str, str]]:
        paths = self.source.paths
        images = read_images(paths, self.shape, like=self.like, mend=MEND_OR_SKIP)
        return images, {"files_sha256": content_sha256(paths)}


def find_unreadable(folder: Path, files: Sequence[str]) -> set[str]:
    """Return which of the files cannot be decoded: all are decoded once, and later those that could not be again."""

    def find() -> tuple[Tensor, dict[str, str]]:
        bad = {*unreadable([folder / file for file in files])}
        return torch.tensor([folder / file in bad for file in files]), {}

    found, _ = kept(folder, files, {"of": "which files are unreadable"}, find)
    suspects = [file for file, failed in zip(files, found.tolist(), strict=True) if failed]
    bad = {*unreadable([folder / file for file in suspects])}  # a disk's error may have passed
    return {file for file in suspects if folder / file in bad}
