"""What a run records of its dataset, and how it finds the same images again."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from ensembler.data import datasets
from ensembler.data.augmentations import check_augmentation
from ensembler.data.datasets import Dataset
from ensembler.data.decoded import DecodedSplit
from ensembler.data.images import FileSplit
from ensembler.errors import DataError, UsageError
from ensembler.naming import is_importable
from ensembler.record import Record

__all__ = ["DatasetRecord"]

_LARGEST = 2**31  # bytes of an image


class DatasetRecord(Record):
    """The identity of a dataset, its normalisation and its augmentation.

    Attributes:
        kind: of data; see :func:`ensembler.data.examples.find`.
        shape: of one stored example; for images, [H, W, 3].
        lazy: whether images were read from files when needed.
        skipped: the files of a folder that cannot be read and were left out.
        files_sha256: hash of the bytes of each split's files, by its name, where a folder's images were in memory.
        train_files: hash of the names and sizes of the training files, likewise; else empty.
        same_size: whether a folder's training images had to have this shape, as no image size was given.
    """

    name: str
    title: str
    kind: str = "images"
    classes: list[str]
    shape: list[int]
    mean: list[float]
    std: list[float]
    augmentation: str
    train_examples: int
    class_counts: list[int] = Field(default_factory=list)
    train_sha256: str
    validation_sha256: str = ""
    test_sha256: str
    files_sha256: dict[str, str] = Field(default_factory=dict)
    train_files: str = ""
    same_size: bool = False
    lazy: bool = False
    skipped: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _of_images(self) -> Self:
        if self.kind == "images":
            if len(self.shape) != 3 or not 0 < math.prod(self.shape) < _LARGEST or min(self.shape) < 1:
                raise ValueError(f"{self.shape} is no shape [H, W, 3] of images")
            if len(self.mean) != len(self.std) or not all(std > 0 for std in self.std):
                raise ValueError("mean and std are not those of an image's channels")
        return self

    @classmethod
    def of(cls, dataset: Dataset, augmentation: str | None = None) -> DatasetRecord:
        """Make the record of a dataset with the given augmentation, or by default the dataset's.

        Raises:
            UsageError: the augmentation is unknown.
        """
        augmentation, known = augmentation or dataset.augmentation, dataset.train.augmentations
        if dataset.train.kind == "images":
            check_augmentation(augmentation)
        elif augmentation not in known:
            raise UsageError(f"unknown augmentation {augmentation!r}: use one of {', '.join(known)}")
        train = dataset.train
        decoded = {name: split for name, split in _splits(dataset) if isinstance(split, DecodedSplit)}
        return cls(
            name=dataset.name,
            title=dataset.title,
            kind=dataset.train.kind,
            classes=list(dataset.classes),
            shape=list(dataset.train.example_shape),
            mean=list(dataset.mean),
            std=list(dataset.std),
            augmentation=augmentation,
            train_examples=len(dataset.train),
            class_counts=list(dataset.class_counts.values()),
            train_sha256=dataset.train.sha256,
            validation_sha256=dataset.validation.sha256,
            test_sha256=dataset.test.sha256,
            files_sha256={name: split.files_sha256 for name, split in decoded.items()},
            train_files=train.source.sha256 if isinstance(train, DecodedSplit) else "",
            same_size=isinstance(train, DecodedSplit) and train.like is not None,
            lazy=isinstance(dataset.train, FileSplit),
            skipped=list(dataset.skipped),
        )

    def load(self, root: str | Path | None = None, *, download: bool = False, dataset: Any = None) -> Dataset:
        """Load the same examples, normalised alike; ``root``, ``download`` as in :func:`ensembler.data.datasets.load`.

        A folder that has moved is read at ``root``, or at its own name in ``root``. Its training images are neither
        read nor decoded, and are checked when they are first used.

        Args:
            root: see above.
            download: see above.
            dataset: where the examples are now, if not under the record's name: another name, the dataset, or what
                :func:`ensembler.data.datasets.find` makes one of.

        Raises:
            DataError: the examples are missing or have changed, or are known by no name.
        """
        if dataset is not None and not isinstance(dataset, str):
            return self.adopt(datasets.find(dataset))
        name = self.name if dataset is None else dataset
        try:
            found = self._load(name, root, download)
        except UsageError as error:
            if is_importable(name):
                mend = "run the command in the module's folder, or name the dataset anew (--dataset module:NAME)"
                raise DataError(f"{error}: {mend}") from error
            if dataset is None and not (name.startswith("folder:") or self._is_published):
                raise DataError(
                    f"{self.title} was given from Python and cannot be loaded by name: name it as module:NAME "
                    "(--dataset), or pass the dataset from Python"
                ) from error
            raise
        if isinstance(found.train, DecodedSplit):
            verify = partial(self._check_split, "training", title=found.title)
            found = replace(found, train=found.train.verified(verify))
        return self.adopt(found)

    def _load(self, name: str, root: str | Path | None, download: bool) -> Dataset:
        size, known = None, None
        if self.kind == "images":
            height, width = self.shape[:2]
            size = height if height == width else None
            known = datasets.Known((height, width), tuple(self.mean), tuple(self.std), self.same_size)
        return datasets.load(
            name,
            root,
            download=download,
            image_size=size,
            in_memory=not self.lazy,
            without=self.skipped,
            known=known,
        )

    def adopt(self, dataset: Dataset) -> Dataset:
        """Return a dataset with the record's normalisation, which the run's networks were trained with.

        Raises:
            DataError: the training or test examples are not the record's.
        """
        self.check(dataset)
        return replace(dataset, mean=tuple(self.mean), std=tuple(self.std))

    def check(self, dataset: Dataset) -> None:
        """Refuse a dataset that differs from the record.

        A folder's training images that are not yet decoded are known by the cache, or else by their names and sizes.

        Raises:
            DataError: the training, validation or test examples differ, so the test split might not be held out.
        """
        if list(dataset.classes) != self.classes:
            raise DataError(
                f"{dataset.title} has the classes {', '.join(dataset.classes[:5])}, ... and the run "
                f"{', '.join(self.classes[:5])}, ...: give the run's own data, with its classes in their order"
            )
        if all(self._seems_same(name, split) for name, split in _splits(dataset)):
            return
        for name, split in _splits(dataset):
            self._check_split(name, split, dataset.title)

    def _seems_same(self, name: str, split: Any) -> bool:
        expected = self._sha256(name)
        if isinstance(split, DecodedSplit) and name == "training" and not split.is_decoded:
            known = split.recorded_sha256
            return known == expected if known else split.source.sha256 == self.train_files
        return not expected or split.sha256 == expected

    def _check_split(self, name: str, split: Any, title: str) -> None:
        expected = self._sha256(name)
        if not expected or split.sha256 == expected:
            return
        if isinstance(split, DecodedSplit) and self.files_sha256.get(name) == split.files_sha256:
            raise DataError(
                f"the {name} images of {title} differ from the run's although their files are the same: "
                "install the versions of Pillow and scikit-learn that ensembler show names, or train again"
            )
        what = f"{name} {'images' if self.kind == 'images' else 'examples'}"
        if self._is_published or self.name.startswith("folder:"):
            raise DataError(
                f"{title} has changed since the run was trained (its {what} differ): "
                "point --data at the original files, or train again"
            )
        raise DataError(
            f"{title} is not what the run was trained on, or has changed since (its {what} differ): seed whatever is "
            "drawn in it, such as a random split, give the run's own data (--dataset), or train again"
        )

    @property
    def _is_published(self) -> bool:
        return self.name in datasets.NAMES

    def _sha256(self, name: str) -> str:
        return {"training": self.train_sha256, "validation": self.validation_sha256, "test": self.test_sha256}[name]


def _splits(dataset: Dataset) -> list[tuple[str, Any]]:
    return [("training", dataset.train), ("validation", dataset.validation), ("test", dataset.test)]
