"""Images by name: a training, a validation and a test split, in memory as uint8.

===================  ===========================================================================================
``digits``           scikit-learn's 1,797 handwritten digits, brought to 32 x 32 RGB; inside the package, offline
``cifar10``          CIFAR-10 and CIFAR-100 (torchvision's archives, MD5-checked before anything is read)
``cifar100``
``fashion-mnist``    torchvision's download, or a folder of its IDX files, gzipped or not; padded to 32 x 32 RGB
``folder:PATH``      a folder of images by class, with ``train/`` and ``test/`` or split by us
===================  ===========================================================================================

The validation split is taken from the training images, seeded, stratified and the same for every run: it is never
trained on.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ensembler.errors import DataError, UsageError

__all__ = ["AUGMENTATIONS", "NAMES", "Dataset", "Split", "augment", "default_root", "load", "normalise"]

NAMES = ("digits", "cifar10", "cifar100", "fashion-mnist", "folder:PATH")
AUGMENTATIONS = ("crop-flip", "crop", "none")
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}
_SPLIT_SEED = 20260101
_PADDING = 4


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their classes.

    Attributes:
        images: (N, H, W, 3) uint8, on the CPU.
        labels: (N,) int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Split:
        return Split(self.images[index], self.labels[index])

    @cached_property
    def sha256(self) -> str:
        """Hash of the pixels and labels: names the split whatever its origin."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy().data)
        digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()

    def batches(self, size: int) -> Iterator[Split]:
        """The split in order, ``size`` images at a time; the last may be smaller."""
        for start in range(0, len(self), size):
            yield self[start : start + size]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A named dataset, split in three.

    Attributes:
        name: as the user asked for it; reloads it.
        title: as a report should call it.
        classes: the class names, in label order.
        augmentation: what suits these images: ``"crop-flip"``, ``"crop"`` or ``"none"``.
        mean: (3,) of the training images, pixels in [0, 1].
        std: (3,) likewise.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    augmentation: str
    train: Split
    validation: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load(
    name: str,
    root: Path | None = None,
    *,
    download: bool = False,
    image_size: int | None = None,
    validation: float = 0.1,
) -> Dataset:
    """Load a dataset by name.

    Args:
        name: one of :data:`NAMES`.
        root: where the files lie, or go; by default :func:`default_root`.
        download: fetch what is missing.
        image_size: bring every image to this many pixels a side; by default as it is.
        validation: share of the training images held out, in (0, 1).

    Raises:
        UsageError: an unknown name or an option out of range.
        DataError: files missing, malformed, or too few images to split.
    """
    if not 0 < validation < 1:
        raise UsageError(f"the validation share must lie between 0 and 1, not {validation}")
    if image_size is not None and image_size < 1:
        raise UsageError(f"the image size must be at least 1 pixel, not {image_size}")
    root = root or default_root()
    if name == "digits":
        title, classes, augmentation, train, test = _digits()
    elif name in ("cifar10", "cifar100"):
        title, classes, augmentation, train, test = _cifar(name, root, download)
    elif name == "fashion-mnist":
        title, classes, augmentation, train, test = _fashion_mnist(root, download)
    elif name.startswith("folder:"):
        folder = Path(name.removeprefix("folder:")).expanduser().resolve()
        name = f"folder:{folder}"
        title, classes, augmentation, train, test = _folder(folder, image_size)
    else:
        raise UsageError(f"unknown dataset {name!r}: use one of {', '.join(NAMES)}")
    if image_size is not None and train.images.shape[1:3] != (image_size, image_size):
        train, test = _resized(train, image_size), _resized(test, image_size)
    train, held_out = _split(train, validation, title)
    pixels = train.images.reshape(-1, 3)
    mean, std = _moments(pixels)
    return Dataset(name, title, classes, augmentation, train, held_out, test, mean, std)


def default_root() -> Path:
    """Where datasets lie unless the user says otherwise: ``$ENSEMBLER_DATA`` or ``~/.cache/ensembler/data``."""
    return Path(os.environ.get("ENSEMBLER_DATA") or Path.home() / ".cache" / "ensembler" / "data")


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """What the network sees: uint8 (B, H, W, 3) to float32 (B, 3, H, W), zero mean and unit variance a channel.

    The result keeps the images' memory order, which makes it channels-last: no copy, and the faster layout.
    """
    scale = images.new_tensor([1 / (255 * s) for s in std], dtype=torch.float32)
    shift = images.new_tensor([m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32)
    return images.float().mul_(scale).sub_(shift).permute(0, 3, 1, 2)


def augment(images: Tensor, augmentation: str, generator: torch.Generator) -> Tensor:
    """A random variant of every image of a batch (B, H, W, 3), drawn from a CPU generator.

    ``"crop"`` pads 4 black pixels and crops to the old size at a random place; ``"crop-flip"`` mirrors half the images
    as well; ``"none"`` changes nothing.
    """
    if augmentation == "none":
        return images
    count, height, width, _ = images.shape
    offsets = torch.randint(0, 2 * _PADDING + 1, (count, 2), generator=generator)
    rows = offsets[:, :1] + torch.arange(height)
    columns = offsets[:, 1:] + torch.arange(width)
    if augmentation == "crop-flip":
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = torch.nn.functional.pad(images, (0, 0, _PADDING, _PADDING, _PADDING, _PADDING))
    picture = torch.arange(count)[:, None, None]
    rows, columns, picture = (part.to(images.device) for part in (rows, columns, picture))
    return padded[picture, rows[:, :, None], columns[:, None, :]]


_Parts = tuple[str, tuple[str, ...], str, Split, Split]


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
        # torchvision checks every file's MD5 before it unpickles one, so only the published archives are ever read.
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
        raise DataError(f"cannot read {path}: {error}: fetch it again") from error
    header = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < header:
        raise DataError(f"{path} is not an IDX file of {dimensions}-dimensional bytes: fetch it again")
    shape = np.frombuffer(content, dtype=">u4", count=dimensions, offset=4).astype(int)
    if len(content) - header != math.prod(shape):
        raise DataError(f"{path} is truncated: its header promises {math.prod(shape)} bytes: fetch it again")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape).copy()


def _folder(folder: Path, image_size: int | None) -> _Parts:
    if not folder.is_dir():
        raise DataError(f"no folder of images at {folder}")
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        classes = _class_names(folder / "train")
        if unknown := sorted(set(_class_names(folder / "test")) - set(classes)):
            raise DataError(f"{folder / 'test'} has the class {unknown[0]!r}, which {folder / 'train'} has not")
        train = _read_images(folder / "train", classes, image_size)
        test = _read_images(folder / "test", classes, image_size or train.images.shape[1:3])
    else:
        classes = _class_names(folder)
        train, test = _split(_read_images(folder, classes, image_size), 0.2, str(folder))
    return f"images of {folder.name}", classes, "crop-flip", train, test


def _class_names(folder: Path) -> tuple[str, ...]:
    classes = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))
    if len(classes) < 2:
        raise DataError(f"{folder} must hold one folder of images for each class, at least two; found {len(classes)}")
    return classes


def _read_images(folder: Path, classes: tuple[str, ...], size: int | tuple[int, ...] | None) -> Split:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            continue
        found = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in _IMAGE_SUFFIXES)
        if not found:
            raise DataError(f"{folder / name} holds no image ({', '.join(sorted(_IMAGE_SUFFIXES))})")
        files += found
        labels += [label] * len(found)
    first = _read_image(files[0], None)
    shape = (size, size) if isinstance(size, int) else tuple(size or first.shape[:2])
    images = torch.empty((len(files), *shape, 3), dtype=torch.uint8)
    pixels = images.numpy()

    def read(index: int) -> None:
        image = _read_image(files[index], shape if size else None)
        if image.shape[:2] != shape:
            raise DataError(
                f"{files[index]} is {image.shape[1]} x {image.shape[0]} pixels but {files[0]} is "
                f"{shape[1]} x {shape[0]}: add --image-size to bring all to one size"
            )
        pixels[index] = image

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(read, range(len(files)), chunksize=256):
            pass
    return Split(images, torch.tensor(labels))


def _read_image(path: Path, shape: tuple[int, ...] | None) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
            if shape is not None and image.size != shape[::-1]:
                image = image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"cannot read the image {path}: {error}: mend or remove it") from error


def _resized(split: Split, size: int) -> Split:
    from torchvision.transforms.v2.functional import resize

    small = [
        resize(batch.images.permute(0, 3, 1, 2), [size, size], antialias=True).permute(0, 2, 3, 1)
        for batch in split.batches(1024)
    ]
    return Split(torch.cat(small).contiguous(), split.labels)


def _split(split: Split, share: float, title: str) -> tuple[Split, Split]:
    """Stratified and seeded: (the rest, the ``share`` held out)."""
    from sklearn.model_selection import train_test_split

    try:
        rest, held_out = train_test_split(
            np.arange(len(split)), test_size=share, random_state=_SPLIT_SEED, stratify=split.labels.numpy()
        )
    except ValueError as error:
        raise DataError(f"{title}: too few images to hold out a share of {share:g} of each class: {error}") from error
    return split[np.sort(rest)], split[np.sort(held_out)]


def _moments(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation a channel, from exact histograms of the byte values."""
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(channel, minlength=256) for channel in pixels.T.int()]).double()
    mean = counts @ values / len(pixels)
    variance = counts @ values.square() / len(pixels) - mean.square()
    return tuple(mean.tolist()), tuple(variance.clamp_min(1e-6).sqrt().tolist())
