"""Test sets: named images that an evaluation predicts and scores."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ensembler.data.examples import Arrays
from ensembler.data.images import Images, Split
from ensembler.errors import UsageError
from ensembler.eval.shift.corruptions import HEADLINE, SEVERITIES, VALIDATION

if TYPE_CHECKING:
    from ensembler.data.datasets import Dataset
    from ensembler.eval.given import GivenSet

__all__ = ["Shift", "Shifted", "Source", "TestSet", "check_images", "validation_set"]

Source = Literal["dataset", "folder", "hub", "official", "generated"]

_BATCH = 2**26  # bytes of images in a batch


@dataclass(frozen=True, eq=False)
class Shifted(ABC):
    """Test images under one corruption at one severity; used like :class:`ensembler.data.images.Split`.

    Attributes:
        clean: the clean images.
        indices: (N,) their positions in the whole test set.
        corruption, severity: which corruption; 1 to 5.
    """

    clean: Images
    indices: Tensor
    corruption: str
    severity: int

    @abstractmethod
    def images(self, part: slice, device: torch.device | None = None) -> Tensor:
        """Return some of the images, (B, H, W, 3) uint8; those that are computed are so on ``device``."""

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

    @property
    def example_shape(self) -> tuple[int, ...]:
        """(H, W, 3)."""
        return self.clean.example_shape

    def __len__(self) -> int:
        return len(self.clean)

    def batches(self, size: int, device: torch.device | None = None) -> Iterator[Split]:
        """Yield the images in order, at most ``size`` at a time; those that are computed are so on ``device``."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield Split(self.images(part, device), self.labels[part])


@dataclass(frozen=True, eq=False)
class TestSet:
    """Images that every run predicts, and the role of their scores.

    Attributes:
        name: of a shifted set, the corruption; else unique in an evaluation.
        title: its name in progress and reports.
        examples: the images and labels; out of distribution, the labels are meaningless.
        group: ``"validation"`` (fits temperatures, chooses members), ``"clean"`` (the test split), ``"shift"`` (a
            corruption at a severity), ``"other"`` (other images of the same classes) or ``"ood"``.
        severity: of a shifted set, 1 to 5.
        source: of the images.
        classes: the network's outputs that are scored, ascending, which the labels count; ``None``: all. The logits
            of the others are left out before the softmax.
        members: whether to keep every member's probabilities, whatever the group.
    """

    __test__: ClassVar[bool] = False  # not a test case for pytest

    name: str
    title: str
    examples: Images | Arrays | Shifted
    group: Literal["validation", "clean", "shift", "other", "ood"]
    severity: int | None = None
    source: Source = "dataset"
    classes: tuple[int, ...] | None = None
    members: bool = False

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """(N,) classes; ``None`` out of distribution."""
        return None if self.group == "ood" else self.examples.labels.numpy()

    @property
    def keeps_members(self) -> bool:
        """Whether every member's probabilities are kept: they are needed to choose members, and to save them."""
        return self.members or self.group in ("validation", "clean")

    def batches(self, device: torch.device | None = None) -> Iterator[Tensor]:
        """Yield the stored examples in order on ``device``, such as images (B, H, W, 3) uint8, in limited memory."""
        size, examples = max(1, _BATCH // math.prod(self.examples.example_shape)), self.examples
        parts = examples.batches(size, device) if isinstance(examples, Shifted) else examples.batches(size)
        return (part.data.to(device) for part in parts)


@dataclass(frozen=True, eq=False)
class Shift:
    """Shifted versions of one test set, or other images of its classes.

    Attributes:
        name: as the user gave it.
        source: ``"official"`` files, another ``"folder"``, ``"generated"`` here, or ``"given"`` as predictions.
        note: a sentence to print with every number.
        sets: one per corruption and severity, and others.
    """

    name: str
    source: Literal["official", "folder", "generated", "given"]
    note: str
    sets: tuple[TestSet, ...] | tuple[GivenSet, ...]

    @property
    def corruptions(self) -> tuple[str, ...]:
        """The corruptions that it covers."""
        return tuple(dict.fromkeys(one.name for one in self.sets if one.group == "shift"))

    @property
    def others(self) -> tuple[TestSet | GivenSet, ...]:
        """The sets that are no corruptions."""
        return tuple(one for one in self.sets if one.group == "other")

    @property
    def headline(self) -> tuple[str, ...]:
        """Those of the protocol's 15 that it covers at every severity, over which means are taken."""
        cells = {(one.name, one.severity) for one in self.sets}
        return tuple(name for name in HEADLINE if all((name, severity) in cells for severity in SEVERITIES))

    @property
    def not_covered(self) -> tuple[str, ...]:
        """Those of the protocol's 19 that it lacks."""
        return tuple(name for name in HEADLINE + VALIDATION if name not in self.corruptions)


def check_images(dataset: Dataset, what: str) -> None:
    """Refuse a dataset of other examples where ``what`` needs images.

    Raises:
        UsageError: it holds no images.
    """
    if dataset.test.kind != "images":
        raise UsageError(f"{dataset.title} holds no images but rows ({dataset.test.kind}), which {what} needs")


def validation_set(validation: Images | Arrays) -> TestSet:
    """Return the test set of a validation split; evaluation and calibration share its prediction."""
    return TestSet("validation", "validation", validation, "validation")
