"""What an evaluation predicts and scores: test sets, and lists of them that belong together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ensembler.eval.shift.corruptions import HEADLINE, VALIDATION
from ensembler.images import Images, Split

__all__ = ["Shift", "Shifted", "Source", "TestSet", "clean_set", "validation_set"]

Source = Literal["dataset", "folder", "official", "generated"]

_BATCH = 2**26  # bytes of images made at once


@dataclass(frozen=True, eq=False)
class Shifted(ABC):
    """Chosen test images under one corruption at one severity; used like :class:`ensembler.images.Split`.

    Attributes:
        clean: the chosen clean images.
        indices: (N,) their positions in the whole test set.
        corruption, severity: which corruption; 1 to 5.
    """

    clean: Images
    indices: Tensor
    corruption: str
    severity: int

    @abstractmethod
    def images(self, part: slice) -> Tensor:
        """Some of the images, (B, H, W, 3) uint8."""

    @property
    @abstractmethod
    def sha256(self) -> str:
        """Hash that names the images and labels."""

    @property
    def labels(self) -> Tensor:
        """(N,) int64."""
        return self.clean.labels

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""
        return self.clean.shape

    def __len__(self) -> int:
        return len(self.clean)

    def batches(self, size: int) -> Iterator[Split]:
        """The images in order, at most ``size`` at a time."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield Split(self.images(part), self.labels[part])


@dataclass(frozen=True, eq=False)
class TestSet:
    """Images that every run predicts, and how their scores are used.

    Attributes:
        name: of a shift, the corruption; else unique among an evaluation's sets.
        title: what progress and reports call it.
        examples: the images and their labels; out of distribution, labels say nothing.
        group: ``"validation"`` fits temperatures and chooses members, ``"clean"`` is the test split, ``"shift"`` a
            shifted copy of it, ``"ood"`` has no right answers.
        severity: of a shift, 1 to 5.
        source: where the images are from.
    """

    __test__: ClassVar[bool] = False  # no test case of pytest's

    name: str
    title: str
    examples: Images | Shifted
    group: Literal["validation", "clean", "shift", "ood"]
    severity: int | None = None
    source: Source = "dataset"

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """(N,) classes; ``None`` out of distribution."""
        return None if self.group == "ood" else self.examples.labels.numpy()

    @property
    def keeps_members(self) -> bool:
        """Whether every member's probabilities are kept, as choosing members needs."""
        return self.group in ("validation", "clean")

    def batches(self) -> Iterator[Tensor]:
        """The images in order, (b, H, W, 3) uint8, a memory-bounded number at a time."""
        height, width = self.examples.shape
        return (part.images for part in self.examples.batches(max(1, _BATCH // (3 * height * width))))


@dataclass(frozen=True, eq=False)
class Shift:
    """Shifted copies of one test set: corruptions at severities.

    Attributes:
        name: as the user asked for it.
        source: ``"official"`` files, or ``"generated"`` here.
        note: one sentence that must stand beside every number from it.
        sets: one for each corruption and severity.
    """

    name: str
    source: Literal["official", "generated"]
    note: str
    sets: tuple[TestSet, ...]

    @property
    def corruptions(self) -> tuple[str, ...]:
        """The corruptions that it covers."""
        return tuple(dict.fromkeys(one.name for one in self.sets))

    @property
    def headline(self) -> tuple[str, ...]:
        """The covered ones among the protocol's 15, over which means are taken."""
        return tuple(name for name in HEADLINE if name in self.corruptions)

    @property
    def not_covered(self) -> tuple[str, ...]:
        """The protocol's corruptions that it lacks."""
        return tuple(name for name in HEADLINE + VALIDATION if name not in self.corruptions)


def validation_set(validation: Images) -> TestSet:
    """A dataset's validation split."""
    return TestSet("validation", "validation", validation, "validation")


def clean_set(test: Images) -> TestSet:
    """A dataset's test split, or the chosen part of it."""
    return TestSet("clean", "clean", test, "clean")
