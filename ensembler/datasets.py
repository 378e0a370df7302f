"""Datasets of images by name, split in training, validation and test: uint8 in memory or, for folders, in files.

===================  ===========================================================================================
``digits``           scikit-learn's 1,797 handwritten digits, resized to 32 x 32 RGB; embedded, no download
``cifar10``          CIFAR-10 and CIFAR-100 (torchvision's archives, MD5-checked before anything is read)
``cifar100``
``fashion-mnist``    torchvision's download, or a folder of its IDX files, gzipped or not; padded to 32 x 32 RGB
``folder:PATH``      a folder of images by class, with or without splits of its own; :mod:`ensembler.folders`
===================  ===========================================================================================

The validation split is a seeded, stratified part of the training images, the same in every run, or a folder's ``val/``;
it is never trained on. The split of a folder does not depend on where the folder is.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ensembler.decoding import MEND_OR_SKIP, read_image, unreadable
from ensembler.errors import DataError, UsageError
from ensembler.folders import Layout, describe, place, read_layout
from ensembler.images import AUGMENTATIONS, MEMORY_LIMIT, FileSplit, Images, Split, normalise, read_images
from ensembler.published import cifar, digits, fashion_mnist
from ensembler.seeds import generator
from ensembler.splits import content_sha256, hold_out, repeated, repeated_files

__all__ = [
    "AUGMENTATIONS",
    "CORRUPT",
    "NAMES",
    "Dataset",
    "Split",
    "default_root",
    "load",
    "moments",
    "normalise",
]

NAMES = ("digits", "cifar10", "cifar100", "fashion-mnist", "folder:PATH")
CORRUPT = ("refuse", "skip")
_SPLIT_SEED = 20260101
_SAMPLE = 2048  # files from which a channel's mean and variance are computed
_TEST = 0.2  # share of a folder's images that are held out for testing where it has no test/
_DARK = 64  # of 255: where no training image has a brighter pixel, something is wrong with their scale
_SHOWN = 5  # names of classes in a note


@dataclass(frozen=True, eq=False)
class Dataset:
    """A named dataset, split in three.

    Attributes:
        name: the name for :func:`load`.
        title: the name in reports.
        classes: the class names, in label order; none where the targets are numbers.
        augmentation: the default augmentation, one of :data:`ensembler.images.AUGMENTATIONS`.
        train, validation, test: all in memory, or all in files. :func:`load` returns images; your own dataset may hold
            other examples (:mod:`ensembler.examples`).
        mean: (3,) of the training images, pixels in [0, 1]; for images in files, of a seeded sample of 2,048.
        std: (3,), the standard deviation of the same pixels.
        skipped: the files of a folder that cannot be read and were left out, relative to it.
        files_sha256: hash of the bytes of a folder's files, in order, where the images are in memory; else empty.
        notes: what a user should know of a folder before training: what was taken, what was left out and why.
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
    files_sha256: str = ""
    notes: tuple[str, ...] = ()
    task: str = "classification"

    @property
    def class_counts(self) -> dict[str, int]:
        """Number of training images of each class."""
        if not self.classes:
            return {}
        counts = torch.bincount(self.train.labels, minlength=len(self.classes)).tolist()
        return dict(zip(self.classes, counts, strict=True))


def load(
    name: str,
    root: Path | None = None,
    *,
    download: bool = False,
    image_size: int | None = None,
    validation: float = 0.1,
    in_memory: bool | None = None,
    corrupt: str = "refuse",
    without: Collection[str] = (),
) -> Dataset:
    """Load a dataset by name.

    Args:
        name: one of :data:`NAMES`.
        root: the folder of the files; by default :func:`default_root`. For ``folder:PATH``, where that folder is now.
        download: download missing files.
        image_size: resize every image to this many pixels per side, ignoring proportions; by default no resize.
        validation: share of the training images held out, in (0, 1).
        in_memory: whether to decode a folder's images now and hold them in memory, or to read them from files when
            needed, which requires ``image_size``. By default in memory, unless they need more than
            :data:`ensembler.images.MEMORY_LIMIT`.
        corrupt: how to handle images of a folder that cannot be decoded. ``"refuse"`` raises when one is decoded: here
            if they are held in memory, else during training or evaluation. ``"skip"`` leaves them out and names them;
            it decodes every image once here.
        without: files of a folder to leave out without reading them, relative to it.

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
    if name.startswith("folder:"):
        folder = place(Path(name.removeprefix("folder:")).expanduser().resolve(), root)
        return _Folder(folder, image_size, in_memory, corrupt == "skip", frozenset(without)).load(validation)
    root = root or default_root()
    train: Images
    test: Images
    if name in NAMES and (in_memory is False or corrupt == "skip"):
        raise UsageError(f"{name} is always in memory and whole: only folder:PATH can be read from files or skip any")
    elif name == "digits":
        title, classes, augmentation, train, test = digits()
    elif name in ("cifar10", "cifar100"):
        title, classes, augmentation, train, test = cifar(name, root, download)
    elif name == "fashion-mnist":
        title, classes, augmentation, train, test = fashion_mnist(root, download)
    else:
        path = Path(name).expanduser()
        advice = f"for the folder, give folder:{path}" if path.is_dir() else f"use one of {', '.join(NAMES)}"
        raise UsageError(f"unknown dataset {name!r}: {advice}")
    if image_size is not None:
        train, test = _resized(train, image_size), _resized(test, image_size)
    train, held_out = _split(train, validation, title)
    mean, std = moments(train)
    return Dataset(name, title, classes, augmentation, train, held_out, test, mean, std)


def default_root() -> Path:
    """Return the default folder of datasets: ``$ENSEMBLER_DATA`` or ``~/.cache/ensembler/data``."""
    return Path(os.environ.get("ENSEMBLER_DATA") or Path.home() / ".cache" / "ensembler" / "data")


@dataclass(frozen=True, eq=False)
class _Part:
    """The files of a split, and their images: decoded, or the files themselves."""

    files: FileSplit
    images: Images

    def hold_out(self, share: float, title: str, spare: int = 0) -> tuple[_Part, _Part]:
        rest, held = hold_out(self.files.labels.numpy(), share, title, spare)
        return self._part(rest), self._part(held)

    def _part(self, index: NDArray[np.int64]) -> _Part:
        return _Part(self.files.part(index), self.images.part(index))

    def repeats(self, train: _Part) -> list[tuple[str, str]]:
        """Return the images that are also training images: the names of both."""
        if isinstance(self.images, Split) and isinstance(train.images, Split):
            pairs = repeated(self.images.images.numpy(), train.images.images.numpy())
            return [(self.files.files[one], train.files.files[other]) for one, other in pairs]
        found = repeated_files(self.files.paths, train.files.paths)
        return [
            (str(one.relative_to(self.files.folder)), str(other.relative_to(train.files.folder)))
            for one, other in found
        ]


@dataclass(frozen=True, eq=False)
class _Folder:
    """A folder of images, and how it is read; see :func:`load`."""

    folder: Path
    image_size: int | None
    in_memory: bool | None
    skip: bool
    without: frozenset[str]

    def load(self, share: float) -> Dataset:
        layout = read_layout(self.folder)
        files, skipped = self._readable(layout)
        parts = self._read(files)
        title = str(self.folder)
        train, test = parts["train"], parts.get("test")
        if test is None:
            train, test = train.hold_out(_TEST, title, spare="validation" not in parts)
        validation = parts.get("validation")
        if validation is None:
            train, validation = train.hold_out(share, title)
        counts = _histogram(train.images)
        mean, std = _moments(counts)
        every = [path for split in files.values() for path in split.paths]
        held = isinstance(train.images, Split)
        return Dataset(
            name=f"folder:{self.folder}",
            title=f"images of {self.folder.name}",
            classes=layout.classes,
            augmentation="crop-flip" if held else "resized-crop-flip",
            train=train.images,
            validation=validation.images,
            test=test.images,
            mean=mean,
            std=std,
            skipped=skipped,
            files_sha256=content_sha256(every) if held else "",
            notes=tuple(_notes(layout, train, validation, test, skipped, int(counts.any(0).nonzero().max()))),
        )

    def _readable(self, layout: Layout) -> tuple[dict[str, FileSplit], tuple[str, ...]]:
        """Return each split's files, and those that cannot be read and are left out."""
        shape = (self.image_size or 0, self.image_size or 0)
        found: dict[str, FileSplit] = {}
        skipped: list[str] = []
        for role, part in layout.parts.items():
            bad = self.without.intersection(part.files)
            if self.skip:
                paths = [self.folder / file for file in part.files if file not in bad]
                bad |= {path.relative_to(self.folder).as_posix() for path in unreadable(paths)}
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
        if self.image_size is None:
            shape = read_image(found["train"].paths[0], mend=MEND_OR_SKIP).shape[:2]
            found = {role: replace(split, shape=shape) for role, split in found.items()}
        return found, tuple(skipped)

    def _read(self, files: dict[str, FileSplit]) -> dict[str, _Part]:
        size = sum(split.decoded_bytes for split in files.values())
        if self.in_memory or (self.in_memory is None and size <= MEMORY_LIMIT):
            # Without an image size, all training images must have the same one, to which the others are resized.
            return {
                role: _Part(
                    split, Split(self._pixels(split, exact=not self.image_size and role == "train"), split.labels)
                )
                for role, split in files.items()
            }
        if self.image_size is None:
            raise UsageError(
                f"the images in {self.folder} would take {size / 2**30:.1f} GiB in memory: to read them from files "
                f"when needed, give the size to resize them to, such as the first one's: --image-size "
                f"{min(files['train'].shape)}"
            )
        return {role: _Part(split, split) for role, split in files.items()}

    @staticmethod
    def _pixels(split: FileSplit, exact: bool) -> Tensor:
        return read_images(split.paths, split.shape, exact=exact, mend=MEND_OR_SKIP)


def _notes(
    layout: Layout, train: _Part, validation: _Part, test: _Part, skipped: Sequence[str], brightest: int
) -> Iterator[str]:
    """Yield what a user should know of a folder before training, each in one line."""
    held = {"validation": validation.files, "test": test.files}
    sizes = {"train": len(train.files), **{role: len(split) for role, split in held.items()}}
    counts = ", ".join(f"{size:,} {_USES[role]}{_source(layout, role)}" for role, size in sizes.items())
    line = f"{layout.folder}: {sum(sizes.values()):,} images of {len(layout.classes)} classes, {counts}"
    yield line + (f"; left out: {describe(layout.left_out)}" if layout.left_out else "")
    if skipped:
        yield f"{len(skipped)} images cannot be read and are left out: {', '.join(skipped)}"
    missing = {
        role: [name for label, name in enumerate(layout.classes) if label not in set(split.labels.tolist())]
        for role, split in held.items()
    }
    said = [f"{len(names)} in the {role} images ({_some(names)})" for role, names in missing.items() if names]
    if said:
        yield f"classes without an image: {', '.join(said)}"
    for role, part in (("validation", validation), ("test", test)):
        if pairs := part.repeats(train):
            yield (
                f"{len(pairs):,} of {sizes[role]:,} {role} images are training images, too (such as {pairs[0][0]}, "
                f"which is {pairs[0][1]}): scores on them are too good"
            )
    if brightest < _DARK:
        yield (
            f"no training image has a pixel brighter than {brightest} of 255: if the files hold fewer bits than their "
            "format, scale them to its whole range"
        )


_USES = {"train": "to train on", "validation": "for validation", "test": "for testing"}


def _source(layout: Layout, role: str) -> str:
    """Return where a split of a folder with splits comes from, in brackets."""
    own = layout.parts.get(role)
    if not layout.train.name:
        return ""
    if own is not None:
        return f" ({own.name}/)"
    if role == "validation":
        return f" (held out of {layout.train.name}/)"
    return f" (a fifth of {layout.train.name}/, as there is no test/)"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + ", ..." * (len(names) > _SHOWN)


def _resized(split: Images, size: int) -> Images:
    from torchvision.transforms.v2.functional import resize

    if isinstance(split, FileSplit) or split.shape == (size, size):
        return split
    small = [
        resize(batch.images.permute(0, 3, 1, 2), [size, size], antialias=True).permute(0, 2, 3, 1)
        for batch in split.batches(1024)
    ]
    return Split(torch.cat(small).contiguous(), split.labels)


def _split(split: Images, share: float, title: str) -> tuple[Images, Images]:
    """Hold out a seeded, stratified ``share``; return the rest and the share."""
    rest, held_out = hold_out(split.labels.numpy(), share, title)
    return split.part(rest), split.part(held_out)


def moments(split: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute the mean and standard deviation of each channel, of a sample where the images are in files."""
    return _moments(_histogram(split))


def _histogram(split: Images) -> Tensor:
    """Count the byte values of each channel, (3, 256)."""
    if isinstance(split, FileSplit):
        split = split.part(torch.randperm(len(split), generator=generator(_SPLIT_SEED, "moments"))[:_SAMPLE])
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
