"""Datasets of images by name, split in training, validation and test: uint8 in memory or, for folders, in files.

===================  ===========================================================================================
``digits``           scikit-learn's 1,797 handwritten digits, resized to 32 x 32 RGB; embedded, no download
``cifar10``          CIFAR-10 and CIFAR-100 (torchvision's archives, MD5-checked before anything is read)
``cifar100``
``fashion-mnist``    torchvision's download, or a folder of its IDX files, gzipped or not; padded to 32 x 32 RGB
``folder:PATH``      a folder of images by class, with or without splits of its own; :mod:`ensembler.data.folders`
``module:NAME``      ``package.module:NAME`` or ``file.py:NAME``; :func:`ensembler.data.own_data.as_dataset`
===================  ===========================================================================================

The validation split is a seeded, stratified part of the training images, the same in every run, or a folder's ``val/``;
it is never trained on. The split of a folder does not depend on where the folder is.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensembler.arguments import checked
from ensembler.data.decoded import DecodedSplit, find_unreadable
from ensembler.data.decoding import MEND_OR_SKIP, read_image
from ensembler.data.folder_notes import Notes, describe_folder
from ensembler.data.folders import Layout, place, read_layout
from ensembler.data.image_cache import kept
from ensembler.data.images import MEMORY_LIMIT, FileSplit, Images, Split, normalise, resized
from ensembler.data.published import cifar, digits, fashion_mnist
from ensembler.data.splits import complete, hold_out
from ensembler.device import default_modes
from ensembler.errors import DataError, EnsemblerError, UsageError
from ensembler.machine import home
from ensembler.naming import import_object, is_importable, reason
from ensembler.seeds import generator
from ensembler.text import counted, printable, some

__all__ = [
    "CORRUPT",
    "NAMES",
    "OWN",
    "Dataset",
    "Known",
    "Split",
    "default_root",
    "find",
    "load",
    "moments",
    "normalise",
]

NAMES = ("digits", "cifar10", "cifar100", "fashion-mnist", "folder:PATH", "package.module:NAME")
CORRUPT = ("refuse", "skip")
OWN = "own data"  # the title of a dataset that was given no name
_SHOWN = 10  # classes in a repr
_SPLIT_SEED = 20260101
_SAMPLE = 2048  # files from which a channel's mean and variance are computed


@dataclass(frozen=True, eq=False)
class Dataset:
    """A named dataset, split in three.

    Attributes:
        name: the name for :func:`load`.
        title: the name in reports.
        classes: the class names, in label order; none where the targets are numbers.
        augmentation: the default augmentation, one of :data:`ensembler.data.augmentations.CROPS`.
        train, validation, test: all in memory, or all in files. :func:`load` returns images; your own dataset may hold
            other examples (:mod:`ensembler.data.examples`).
        mean: (3,) of the training images, pixels in [0, 1]; for images in files, of a seeded sample of 2,048.
        std: (3,), the standard deviation of the same pixels.
        skipped: the files of a folder that cannot be read and were left out, relative to it.
        notes: what a user should know of a folder before training: what was taken, what was left out and why. They are
            found at their first use.
        task: what the targets are; see :func:`ensembler.task.find`.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    augmentation: str
    train: Any
    validation: Any
    test: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]
    skipped: tuple[str, ...] = ()
    notes: Sequence[str] = ()
    task: str = "classification"

    def __repr__(self) -> str:
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        sizes = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
        names = some([printable(name) for name in self.classes], _SHOWN)
        classes = f"{counted(len(self.classes), 'class', 'classes')}: {names}"
        return "\n".join(
            [
                f"Dataset {self.name!r}: {printable(self.title)}",
                f"  {sizes} examples of shape {tuple(self.train.example_shape)}",
                f"  {classes if self.classes else self.task}",
                f"  augmentation {self.augmentation}",
            ]
        )

    @property
    def class_counts(self) -> dict[str, int]:
        """Number of training images of each class."""
        if not self.classes:
            return {}
        counts = torch.bincount(self.train.labels, minlength=len(self.classes)).tolist()
        return dict(zip(self.classes, counts, strict=True))


@default_modes()
@checked
def load(
    name: str,
    root: str | Path | None = None,
    *,
    download: bool = False,
    image_size: int | None = None,
    validation: float = 0.1,
    in_memory: bool | None = None,
    corrupt: str = "refuse",
    without: Collection[str] = (),
    known: Known | None = None,
) -> Dataset:
    """Load a dataset by name.

    A folder's images that are held in memory are decoded once, and kept (:mod:`ensembler.data.image_cache`).

    Args:
        name: one of :data:`NAMES`. What ``package.module:NAME`` or ``file.py:NAME`` holds is a dataset, or what
            :func:`ensembler.data.own_data.as_dataset` takes, or a function without arguments that returns one of these.
        root: the folder of the files; by default :func:`default_root`. For ``folder:PATH``, where that folder is now.
        download: download missing files.
        image_size: resize every image to this many pixels per side, ignoring proportions; by default no resize.
        validation: share of the training images held out, in (0, 1).
        in_memory: whether to decode a folder's images now and hold them in memory, or to read them from files when
            needed, which requires ``image_size``. By default in memory, unless they need more than
            :data:`ensembler.data.images.MEMORY_LIMIT`; your own dataset is then refused unless this is true.
        corrupt: how to handle images of a folder that cannot be decoded. ``"refuse"`` raises when one is decoded: here
            if they are held in memory, else during training or evaluation. ``"skip"`` leaves them out and names them;
            it decodes every image once here.
        without: files of a folder to leave out without reading them, relative to it.
        known: what a run knows of these images: then each split is decoded when its images are first used, not here.

    Raises:
        UsageError: the name is unknown, or an option is out of range.
        DataError: files are missing or malformed, or there are too few images to split.
    """
    if not 0 < validation < 1:
        raise UsageError(f"the validation share must be between 0 and 1, not {validation}")
    if image_size is not None and image_size < 1:
        raise UsageError(f"the image size must be at least 1 pixel, not {image_size}")
    if corrupt not in CORRUPT:
        raise UsageError(f"corrupt must be one of {', '.join(CORRUPT)}, not {corrupt!r}")
    root = None if root is None else Path(root).expanduser()
    if name.startswith("folder:"):
        folder = place(Path(name.removeprefix("folder:")).expanduser().resolve(), root)
        return _Folder(folder, image_size, in_memory, corrupt == "skip", frozenset(without), known).load(validation)
    root = root or default_root()
    train: Images
    test: Images
    if (name in NAMES or is_importable(name)) and (in_memory is False or corrupt == "skip"):
        raise UsageError(f"{name} is always in memory and whole: only folder:PATH can be read from files or skip any")
    elif name == "digits":
        title, classes, augmentation, train, test = digits()
    elif name in ("cifar10", "cifar100"):
        title, classes, augmentation, train, test = cifar(name, root, download)
    elif name == "fashion-mnist":
        title, classes, augmentation, train, test = fashion_mnist(root, download)
    elif is_importable(name):
        return _own(name, image_size, validation, bool(in_memory), known)
    else:
        path = Path(name).expanduser()
        advice = f"for the folder, give folder:{path}" if path.is_dir() else f"use one of {', '.join(NAMES)}"
        if path.suffix == ".py":
            advice = f"name what the file holds, {path}:NAME"
        raise UsageError(f"unknown dataset {name!r}: {advice}")
    if image_size is not None:
        train, test = _resized(train, image_size), _resized(test, image_size)
    train, held_out = _split(train, validation, title)
    mean, std = (known.mean, known.std) if known else moments(train)
    return Dataset(name, title, classes, augmentation, train, held_out, test, mean, std)


def find(given: Any) -> Dataset:
    """Return the dataset that is given itself, by a name for :func:`load`, or as what can be made one.

    Raises:
        UsageError, DataError: see :func:`load` and :func:`ensembler.data.own_data.as_dataset`.
    """
    if isinstance(given, Dataset):
        return given
    if isinstance(given, str):
        return load(given)
    from ensembler.data.own_data import as_dataset

    return as_dataset(given)


def _own(name: str, image_size: int | None, share: float, in_memory: bool, known: Known | None) -> Dataset:
    """Import a dataset, or what one is made of."""
    from ensembler.data.own_data import as_dataset

    found = import_object(name, "dataset")
    if isinstance(found, type) or (inspect.isroutine(found) or isinstance(found, partial)):
        try:
            found = found()
        except EnsemblerError:
            raise
        except Exception as error:  # whatever a user's code raises
            raise DataError(f"the dataset {name!r} cannot be made: {reason(error)}") from error
    if not isinstance(found, Dataset):
        found = as_dataset(found, image_size=image_size, validation_share=share, in_memory=in_memory)
    elif image_size is not None:
        found = _all_resized(found, image_size)
    title = name if found.title == OWN else found.title
    mean, std = (known.mean, known.std) if known else (found.mean, found.std)
    return replace(found, name=name, title=title, mean=mean, std=std)


def _all_resized(dataset: Dataset, size: int) -> Dataset:
    """Return a dataset whose images have another size, and their mean and standard deviation."""
    parts = [dataset.train, dataset.validation, dataset.test]
    if not all(isinstance(part, Split) for part in parts):
        raise UsageError(f"{dataset.title} holds no images in memory: leave out --image-size")
    if all(part.shape == (size, size) for part in parts):
        return dataset
    train, validation, test = (_resized(part, size) for part in parts)
    mean, std = moments(train)
    return replace(dataset, train=train, validation=validation, test=test, mean=mean, std=std)


def default_root() -> Path:
    """Return the default folder of datasets: ``$ENSEMBLER_DATA`` or ``~/.cache/ensembler/data``."""
    return Path(os.environ.get("ENSEMBLER_DATA") or home() / ".cache" / "ensembler" / "data")


@dataclass(frozen=True)
class Known:
    """What a run knows of its images, so that none is decoded to find it out again.

    Attributes:
        shape: (H, W).
        mean, std: (3,), of :class:`Dataset`.
        same_size: whether the training images have this shape in their files, too, as no image size was given.
    """

    shape: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    same_size: bool


@dataclass(frozen=True, eq=False)
class _Folder:
    """A folder of images, and how it is read; see :func:`load`."""

    folder: Path
    image_size: int | None
    in_memory: bool | None
    skip: bool
    without: frozenset[str]
    known: Known | None

    def load(self, share: float) -> Dataset:
        layout = read_layout(self.folder)
        found, skipped = self._readable(layout)
        files, like = complete(found, share, str(self.folder)), self._like(found["train"])
        decoded = self._fits(found)
        parts: dict[str, Images] = {}
        for role, split in files.items():
            own = role == "train" or role not in found  # of the training folder
            parts[role] = DecodedSplit(split, role, like if own else None) if decoded else split
        train = parts["train"]
        if self.known is None:
            counts = _histogram(train)
            mean, std = _moments(counts)
            for part in parts.values():
                _ = part.images if isinstance(part, DecodedSplit) else None  # what cannot be read is said now
        else:
            mean, std, counts = self.known.mean, self.known.std, None
        brightest = partial(_brightest, train, counts)
        return Dataset(
            name=f"folder:{self.folder}",
            title=self.folder.name,
            classes=layout.classes,
            augmentation="crop-flip" if decoded else "resized-crop-flip",
            train=train,
            validation=parts["validation"],
            test=parts["test"],
            mean=mean,
            std=std,
            skipped=skipped,
            notes=Notes(partial(describe_folder, layout, files, parts, skipped, brightest)),
        )

    def _readable(self, layout: Layout) -> tuple[dict[str, FileSplit], tuple[str, ...]]:
        """Return each split's files, and those that cannot be read and are left out."""
        shape = self.known.shape if self.known else (self.image_size or 0, self.image_size or 0)
        found: dict[str, FileSplit] = {}
        skipped: list[str] = []
        for role, part in layout.parts.items():
            bad = self.without.intersection(part.files)
            if self.skip:
                bad |= find_unreadable(self.folder, [file for file in part.files if file not in bad])
            labels = torch.tensor(part.labels)
            good = torch.tensor([file not in bad for file in part.files])
            for label in set(part.labels).difference(labels[good].tolist()):
                where = self.folder / part.name / layout.classes[label]
                raise DataError(
                    f"none of the {part.labels.count(label)} images in {where} can be read: repair or remove them"
                )
            split = FileSplit(self.folder, tuple(part.files), labels, shape)
            found[role] = split.part(good)
            skipped += [file for file in part.files if file in bad]
        if shape == (0, 0):
            shape = read_image(self.folder / found["train"].files[0], mend=MEND_OR_SKIP).shape[:2]
            found = {role: replace(split, shape=shape) for role, split in found.items()}
        return found, tuple(skipped)

    def _like(self, train: FileSplit) -> Path | None:
        """Return the file whose size all training images must have, if any; the others are resized to it."""
        same_size = self.known.same_size if self.known else self.image_size is None
        return self.folder / train.files[0] if same_size else None

    def _fits(self, found: dict[str, FileSplit]) -> bool:
        """Return whether the images are held in memory."""
        size = sum(split.decoded_bytes for split in found.values())
        if self.in_memory or (self.in_memory is None and size <= MEMORY_LIMIT):
            return True
        if self.image_size is None and self.known is None:
            raise UsageError(
                f"the images in {self.folder} would take {size / 2**30:.1f} GiB in memory: to read them from files "
                f"when needed, give the size to resize them to, such as the first one's: --image-size "
                f"{min(found['train'].shape)}"
            )
        return False


def _resized(split: Images, size: int) -> Images:
    return split if isinstance(split, FileSplit) else Split(resized(split.images, (size, size)), split.labels)


def _split(split: Images, share: float, title: str) -> tuple[Images, Images]:
    """Hold out a seeded, stratified ``share``; return the rest and the share."""
    rest, held_out = hold_out(split.labels.numpy(), share, title)
    return split.part(rest), split.part(held_out)


def moments(split: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute the mean and standard deviation of each channel, of a sample where the images are in files."""
    return _moments(_histogram(split))


def _brightest(train: Images, counts: Tensor | None = None) -> int:
    """Return the greatest byte value, of a sample where the images are in files."""
    return int((_histogram(train) if counts is None else counts).any(0).nonzero().max())


def _histogram(split: Images) -> Tensor:
    """Count the byte values of each channel, (3, 256) float64; of images in files, those of a sample, and only once."""
    if not isinstance(split, FileSplit):
        return _count(split)
    sample = split.part(torch.randperm(len(split), generator=generator(_SPLIT_SEED, "moments"))[:_SAMPLE])
    what = {"of": "histogram of a sample", "shape": sample.shape}
    counts, _ = kept(sample.folder, sample.files, what, lambda: (_count(sample), {}))
    return counts


def _count(split: Images) -> Tensor:
    counts = torch.zeros(3, 256, dtype=torch.float64)
    for batch in split.batches(256):
        pixels = batch.images.reshape(-1, 3).T.int()
        counts += torch.stack([torch.bincount(channel, minlength=256) for channel in pixels])
    return counts


def _moments(counts: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute the mean and standard deviation of each channel from its counts (3, 256) of byte values."""
    values = torch.arange(256, dtype=torch.float64) / 255
    total = counts[0].sum()
    mean = counts @ values / total
    variance = counts @ values.square() / total - mean.square()
    return tuple(mean.tolist()), tuple(variance.clamp_min(1e-6).sqrt().tolist())
