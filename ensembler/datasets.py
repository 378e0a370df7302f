"""Datasets of images by name, split in training, validation and test: uint8 in memory or, for folders, in files.

===================  ===========================================================================================
``digits``           scikit-learn's 1,797 handwritten digits, resized to 32 x 32 RGB; embedded, no download
``cifar10``          CIFAR-10 and CIFAR-100 (torchvision's archives, MD5-checked before anything is read)
``cifar100``
``fashion-mnist``    torchvision's download, or a folder of its IDX files, gzipped or not; padded to 32 x 32 RGB
``folder:PATH``      a folder of images by class, with ``train/`` and ``test/``, or split here
===================  ===========================================================================================

The validation split is a seeded, stratified part of the training images, the same in every run, and is never trained
on. The split of a folder does not depend on where the folder is.
"""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ensembler.errors import DataError, UsageError
from ensembler.images import (
    AUGMENTATIONS,
    MEMORY_LIMIT,
    FileSplit,
    Images,
    Split,
    normalise,
    read_image,
    read_images,
    unreadable,
)
from ensembler.seeds import generator

__all__ = [
    "AUGMENTATIONS",
    "CORRUPT",
    "IMAGE_SUFFIXES",
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
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}
_SPLIT_SEED = 20260101
_SAMPLE = 2048  # files from which a channel's mean and variance are computed


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
        skipped: the files of a folder that were left out, relative to it.
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
        root: the folder of the files; by default :func:`default_root`.
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
    root = root or default_root()
    skipped: tuple[str, ...] = ()
    if name.startswith("folder:"):
        folder = Path(name.removeprefix("folder:")).expanduser().resolve()
        name = f"folder:{folder}"
        title, classes, augmentation, train, test, skipped = _folder(folder, image_size, in_memory, corrupt, without)
    elif name in NAMES and (in_memory is False or corrupt == "skip"):
        raise UsageError(f"{name} is always in memory and whole: only folder:PATH can be read from files or skip any")
    elif name == "digits":
        title, classes, augmentation, train, test = _digits()
    elif name in ("cifar10", "cifar100"):
        title, classes, augmentation, train, test = _cifar(name, root, download)
    elif name == "fashion-mnist":
        title, classes, augmentation, train, test = _fashion_mnist(root, download)
    else:
        raise UsageError(f"unknown dataset {name!r}: use one of {', '.join(NAMES)}")
    if image_size is not None:
        train, test = _resized(train, image_size), _resized(test, image_size)
    train, held_out = _split(train, validation, title)
    mean, std = moments(train)
    return Dataset(name, title, classes, augmentation, train, held_out, test, mean, std, skipped)


def default_root() -> Path:
    """Return the default folder of datasets: ``$ENSEMBLER_DATA`` or ``~/.cache/ensembler/data``."""
    return Path(os.environ.get("ENSEMBLER_DATA") or Path.home() / ".cache" / "ensembler" / "data")


_Parts = tuple[str, tuple[str, ...], str, Images, Images]


def _digits() -> _Parts:
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.from_numpy(data.images).float()[:, None] * (255 / 16)
    pixels = torch.nn.functional.interpolate(pixels, size=(32, 32), mode="bilinear", align_corners=False)
    images = pixels.round_().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous()
    everything = Split(images, torch.from_numpy(data.target).long())
    train, test = _split(everything, 0.2, "digits")
    return "digits (scikit-learn, 32 x 32)", tuple("0123456789"), "crop", train, test


def _cifar(name: str, root: Path, download: bool) -> _Parts:
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    title = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}[name]
    try:
        # torchvision checks every file's MD5 before unpickling it, so only the published archives are read.
        parts = [kind(root, train=train, download=download) for train in (True, False)]
    except RuntimeError as error:
        raise DataError(
            f"{title} is not in {root}, or its files are not the published ones: "
            "add --download, or point --data at the folder that holds them"
        ) from error
    except OSError as error:
        raise DataError(f"cannot download {title} to {root}: {error}") from error
    train, test = (Split(torch.from_numpy(part.data), torch.tensor(part.targets)) for part in parts)
    return title, tuple(parts[0].classes), "crop-flip", train, test


def _fashion_mnist(root: Path, download: bool) -> _Parts:
    from torchvision import datasets

    folders = [root, root / "FashionMNIST" / "raw"]
    folder = next((folder for folder in folders if _idx_file(folder, "train-images-idx3-ubyte")), None)
    if folder is None:
        if not download:
            raise DataError(
                f"Fashion-MNIST is not in {root}: add --download, or point --data at the folder of its IDX files"
            )
        try:
            datasets.FashionMNIST(root, download=True)
        except (OSError, RuntimeError) as error:
            raise DataError(f"cannot download Fashion-MNIST to {root}: {error}") from error
        folder = folders[1]
    train, test = (_idx_split(folder, part) for part in ("train", "t10k"))
    return "Fashion-MNIST", tuple(datasets.FashionMNIST.classes), "crop-flip", train, test


def _idx_split(folder: Path, part: str) -> Split:
    images = _read_idx(folder, f"{part}-images-idx3-ubyte", 3)
    labels = _read_idx(folder, f"{part}-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} {part} images but {len(labels)} labels: the files do not match")
    pad = [max(0, 32 - side) for side in images.shape[1:]]
    padded = np.pad(images, [(0, 0), *((p // 2, p - p // 2) for p in pad)])
    return Split(torch.from_numpy(padded)[..., None].repeat(1, 1, 1, 3), torch.from_numpy(labels).long())


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_idx(folder: Path, name: str, dimensions: int) -> NDArray[np.uint8]:
    """Read one IDX file of unsigned bytes (LeCun et al., the MNIST page)."""
    path = _idx_file(folder, name)
    if path is None:
        raise DataError(f"{folder} has no {name} or {name}.gz: the dataset is incomplete")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"cannot read {path}: {error}: download it again") from error
    header = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < header:
        raise DataError(f"{path} is not an IDX file of {dimensions}-dimensional bytes: download it again")
    shape = np.frombuffer(content, dtype=">u4", count=dimensions, offset=4).astype(int)
    if len(content) - header != math.prod(shape):
        raise DataError(f"{path} is truncated: its header announces {math.prod(shape)} bytes: download it again")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape).copy()


def _folder(
    folder: Path, image_size: int | None, in_memory: bool | None, corrupt: str, without: Collection[str]
) -> tuple[str, tuple[str, ...], str, Images, Images, tuple[str, ...]]:
    if not folder.is_dir():
        raise DataError(f"no folder of images at {folder}")
    is_split = (folder / "train").is_dir() and (folder / "test").is_dir()
    parts = [folder / "train", folder / "test"] if is_split else [folder]
    classes = _class_names(parts[0])
    if unknown := sorted(set(_class_names(parts[-1])) - set(classes)):
        raise DataError(f"{parts[-1]} has the class {unknown[0]!r}, which is not in {parts[0]}")
    shape = (image_size, image_size) if image_size else None
    file_splits: list[FileSplit] = []
    skipped: list[str] = []
    for part in parts:
        files, labels, unreadable_files = _list(folder, part, classes, corrupt == "skip", set(without))
        shape = shape or read_image(folder / files[0]).shape[:2]
        file_splits.append(FileSplit(folder, tuple(files), torch.tensor(labels), shape))
        skipped += unreadable_files
    size = sum(split.decoded_bytes for split in file_splits)
    splits: list[Images] = [*file_splits]
    if in_memory or (in_memory is None and size <= MEMORY_LIMIT):
        # Without an image size, all training images must have the same one, to which test images are resized.
        splits = [
            Split(read_images(split.paths, split.shape, exact=not image_size and split is file_splits[0]), split.labels)
            for split in file_splits
        ]
    elif image_size is None:
        raise UsageError(
            f"the images in {folder} would take {size / 2**30:.1f} GiB in memory: to read them from files when needed, "
            f"give the size to resize them to, such as the first one's: --image-size {min(file_splits[0].shape)}"
        )
    train, test = splits if is_split else _split(splits[0], 0.2, str(folder))
    augmentation = "crop-flip" if isinstance(train, Split) else "resized-crop-flip"
    return f"images of {folder.name}", classes, augmentation, train, test, tuple(skipped)


def _class_names(folder: Path) -> tuple[str, ...]:
    classes = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))
    if len(classes) < 2:
        raise DataError(f"{folder} must hold one folder of images for each class, at least two; found {len(classes)}")
    return classes


def _list(
    folder: Path, part: Path, classes: tuple[str, ...], check: bool, without: set[str]
) -> tuple[list[str], list[int], list[str]]:
    """List a part's image files (relative to the folder), their labels, and the files that are left out."""
    files: list[str] = []
    labels: list[int] = []
    skipped: list[str] = []
    for label, name in enumerate(classes):
        if not (part / name).is_dir():
            continue
        paths = sorted(path for path in (part / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not paths:
            raise DataError(f"{part / name} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
        names = [path.relative_to(folder).as_posix() for path in paths]
        bad = without | {path.relative_to(folder).as_posix() for path in (unreadable(paths) if check else ())}
        good = [file for file in names if file not in bad]
        if not good:
            raise DataError(f"none of the {len(paths)} images in {part / name} can be read: repair or remove them")
        files += good
        labels += [label] * len(good)
        skipped += [file for file in names if file in bad]
    return files, labels, skipped


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
    from sklearn.model_selection import train_test_split

    try:
        rest, held_out = train_test_split(
            np.arange(len(split)), test_size=share, random_state=_SPLIT_SEED, stratify=split.labels.numpy()
        )
    except ValueError as error:
        raise DataError(f"{title}: too few images to hold out a share of {share:g} of each class: {error}") from error
    return split.part(np.sort(rest)), split.part(np.sort(held_out))


def moments(split: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute the mean and standard deviation of each channel, from exact histograms of the byte values."""
    if isinstance(split, FileSplit):
        split = split.part(torch.randperm(len(split), generator=generator(_SPLIT_SEED, "moments"))[:_SAMPLE])
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.zeros(3, 256, dtype=torch.float64)
    for batch in split.batches(256):
        pixels = batch.images.reshape(-1, 3).T.int()
        counts += torch.stack([torch.bincount(channel, minlength=256) for channel in pixels])
    total = counts[0].sum()
    mean = counts @ values / total
    variance = counts @ values.square() / total - mean.square()
    return tuple(mean.tolist()), tuple(variance.clamp_min(1e-6).sqrt().tolist())
