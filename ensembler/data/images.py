"""Images with labels, in memory or in files: decoding, augmentation and normalisation.

Both kinds of split have the same interface: indexing one, or iterating over its ``batches()``, gives a :class:`Split`
in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ensembler.data.augmentations import CROPS, POLICIES, split, transform
from ensembler.data.decoding import MEND, read_image
from ensembler.data.examples import Cut, Epoch, InMemory, hash_tensors, stream
from ensembler.data.folders import stat_files
from ensembler.data.inputs import check_images
from ensembler.errors import DataError
from ensembler.machine import in_threads
from ensembler.text import counted, printable

__all__ = [
    "MEMORY_LIMIT",
    "FileSplit",
    "Images",
    "Split",
    "augment",
    "draw",
    "normalise",
    "normaliser",
    "read_image",
    "read_images",
    "resized",
]

MEMORY_LIMIT = 4 * 2**30  # bytes of decoded images that are held in memory by default

_PADDING = 4
_GLOBAL_GENERATOR = Lock()


class _Images:
    """Base of :class:`Split` and :class:`FileSplit`; see :class:`ensembler.data.examples.Examples`."""

    kind: ClassVar[str] = "images"
    augmentations: ClassVar[Sequence[str]] = (*POLICIES, *CROPS)
    labels: Tensor
    shape: tuple[int, int]

    def __repr__(self) -> str:
        place = f" in {printable(self.folder)}" if isinstance(self, FileSplit) else ""
        return f"{type(self).__name__} of {counted(len(self.labels), 'image')} {self.example_shape}{place}"

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of one image: (H, W, 3)."""
        return (*self.shape, 3)

    @staticmethod
    def draw(augmentation: str, count: int, generator: torch.Generator) -> Tensor:
        """Draw how to augment each image; see :func:`draw`."""
        return draw(augmentation, count, generator)

    @staticmethod
    def inputs(mean: Sequence[float], std: Sequence[float], device: torch.device | str) -> Callable[[Tensor], Tensor]:
        """Return a function that normalises images; see :func:`normaliser`."""
        return normaliser(mean, std, device)

    @staticmethod
    def check(x: Tensor, shape: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> bool:
        """Whether these are stored images or normalised inputs; see :func:`ensembler.data.inputs.check_images`."""
        return check_images(x, shape, mean, std)


@dataclass(frozen=True, eq=False, repr=False)
class Split(_Images):
    """Images in memory and their classes.

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

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """Height and width."""
        return self.images.shape[1], self.images.shape[2]

    @property
    def data(self) -> Tensor:
        """The images."""
        return self.images

    def to(self, device: torch.device | str) -> Split:
        """Return the same images on another device."""
        return Split(self.images.to(device), self.labels.to(device))

    @cached_property
    def sha256(self) -> str:
        """Hash of the pixels and labels, which identifies the split whatever its origin."""
        return hash_tensors(self.images, self.labels)

    def part(self, index: Any) -> Split:
        """Return the images at ``index``."""
        return self[index]

    def batches(self, size: int) -> Iterator[Split]:
        """Yield the split in order, ``size`` images at a time; the last batch may be smaller."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def augmented(self, index: Tensor, augmentation: str, choices: Tensor) -> Split:
        """Return the images at ``index`` (B,), augmented by :func:`augment`."""
        batch = self[index]
        return Split(augment(batch.images, augmentation, choices), batch.labels)

    def stream(
        self, epochs: Iterator[Epoch], cut: Cut, augmentation: str, device: torch.device, workers: int | None = None
    ) -> Generator[InMemory, None, None]:
        """Yield the batches of epochs; see :func:`ensembler.data.examples.stream`."""
        return stream(self, epochs, cut, augmentation, device)


@dataclass(frozen=True, eq=False, repr=False)
class FileSplit(_Images):
    """Images in files, decoded when needed, and their classes.

    Attributes:
        folder: the folder of the files.
        files: N names relative to it.
        labels: (N,) int64.
        shape: (H, W) to which every image is resized, ignoring proportions.
    """

    folder: Path
    files: tuple[str, ...]
    labels: Tensor
    shape: tuple[int, int]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Split:
        """Decode the images at ``index`` into memory.

        Raises:
            DataError: one cannot be read, or together they need more than :data:`MEMORY_LIMIT`.
        """
        part = self.part(index)
        part.check_memory()
        return part._decode()

    def check_memory(self) -> None:
        """Check that all images fit into memory.

        Raises:
            DataError: they need more than :data:`MEMORY_LIMIT`.
        """
        if self.decoded_bytes > MEMORY_LIMIT:
            raise DataError(
                f"{len(self)} images of {self.shape[1]} x {self.shape[0]} pixels take "
                f"{self.decoded_bytes / 2**30:.1f} GiB, and the limit is {MEMORY_LIMIT / 2**30:g} GiB: "
                "use fewer (--examples)"
            )

    def to(self, device: torch.device | str) -> FileSplit:
        """Return the split itself: its batches go to the device as they are read."""
        return self

    @property
    def paths(self) -> list[Path]:
        """The files' N paths."""
        return [self.folder / file for file in self.files]

    @property
    def decoded_bytes(self) -> int:
        """Memory that all images would need, in bytes."""
        return 3 * self.shape[0] * self.shape[1] * len(self)

    @cached_property
    def sha256(self) -> str:
        """Hash of the files' names and sizes in bytes, the labels and the shape; the files are not read.

        It does not change if an image is replaced by another of the same size in bytes.
        """
        digest = hashlib.sha256(repr(self.shape).encode())
        try:
            for file, stat in stat_files(self.folder, self.files):
                digest.update(f"{file}\0{stat.st_size}\n".encode(errors="surrogateescape"))
        except OSError as error:
            raise DataError(f"cannot read the image {error.filename}: {error}") from error
        digest.update(self.labels.numpy().data)
        return digest.hexdigest()

    def part(self, index: Any) -> FileSplit:
        """Return the images at ``index``, without decoding them."""
        chosen = torch.arange(len(self))[index]
        files = tuple(self.files[i] for i in chosen.tolist())
        return FileSplit(self.folder, files, self.labels[chosen], self.shape)

    def batches(self, size: int) -> Iterator[Split]:
        """Yield the split in order, decoding ``size`` images at a time; the last batch may be smaller."""
        for start in range(0, len(self), size):
            yield self.part(slice(start, start + size))._decode()

    def augmented(self, index: Tensor, augmentation: str, choices: Tensor) -> Split:
        """Return the images at ``index`` (B,), augmented by :func:`read_images`."""
        part = self.part(index)
        return Split(read_images(part.paths, self.shape, augmentation, choices), part.labels)

    def stream(
        self, epochs: Iterator[Epoch], cut: Cut, augmentation: str, device: torch.device, workers: int | None = None
    ) -> Generator[InMemory, None, None]:
        """Yield the batches of epochs, read by worker processes; see :func:`ensembler.data.loading.read_ahead`."""
        from ensembler.data.loading import read_ahead

        keys = (key for order, choices in epochs for key in cut(order, choices))
        with closing(read_ahead(self, keys, augmentation, device, workers)) as batches:
            for images, labels in batches:
                yield Split(images, labels)

    def _decode(self) -> Split:
        return Split(read_images(self.paths, self.shape), self.labels)


Images = Split | FileSplit
"""Images in memory, or in files."""


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise images (B, H, W, 3) uint8 for the network; for many batches, use :func:`normaliser`."""
    return normaliser(mean, std, images.device)(images)


def normaliser(mean: Sequence[float], std: Sequence[float], device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """Return a function from uint8 (B, H, W, 3) to float32 (B, 3, H, W) with zero mean and unit variance per channel.

    The result keeps the images' memory order, so it is channels-last without a copy, which is also the faster layout.
    """
    scale = torch.tensor([1 / (255 * s) for s in std], dtype=torch.float32, device=device)
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32, device=device)
    return lambda images: images.float().mul_(scale).sub_(shift).permute(0, 3, 1, 2)


def resized(images: Tensor, shape: tuple[int, int]) -> Tensor:
    """Resize images (N, H, W, 3) uint8 to ``shape`` bilinearly, whatever the proportions."""
    from torchvision.transforms.v2.functional import resize

    if tuple(images.shape[1:3]) == shape:
        return images
    parts = (part.permute(0, 3, 1, 2) for part in torch.split(images, 1024))
    return torch.cat([resize(part, list(shape), antialias=True).permute(0, 2, 3, 1) for part in parts]).contiguous()


def draw(augmentation: str, count: int, generator: torch.Generator) -> Tensor:
    """Draw how to augment each of ``count`` images from a CPU generator; int64.

    Returns:
        (count, 3) for crops: row, column, and whether to mirror. (count,) seeds for ``"resized-crop-flip"``. (count, 0)
        for ``"none"``. Where a transform follows, (count, D + 1): these, then its seed.
    """
    crop, name = split(augmentation)
    choices = _draw_crop(crop, count, generator)
    return choices if name is None else torch.cat([choices[:, None].flatten(1), _seeds(count, generator)[:, None]], 1)


def _draw_crop(crop: str, count: int, generator: torch.Generator) -> Tensor:
    if crop == "none":
        return torch.empty(count, 0, dtype=torch.int64)
    if crop == "resized-crop-flip":
        return _seeds(count, generator)
    offsets = torch.randint(0, 2 * _PADDING + 1, (count, 2), generator=generator)
    flips = crop == "crop-flip"
    mirrored = torch.rand(count, 1, generator=generator) < 0.5 if flips else torch.zeros(count, 1)
    return torch.cat([offsets, mirrored.long()], dim=1)


def _seeds(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2**62, (count,), generator=generator)


def augment(images: Tensor, augmentation: str, choices: Tensor) -> Tensor:
    """Augment a batch of images (B, H, W, 3) uint8 by the ``choices`` of :func:`draw`, on the same device.

    ``"crop"`` pads by 4 black pixels and crops to the original size; ``"crop-flip"`` also mirrors half of the images;
    ``"resized-crop-flip"`` is usual for ImageNet: torchvision's ``v2.RandomResizedCrop`` (8 to 100 % of the area,
    proportions from 3:4 to 4:3, resized to the original size) and ``v2.RandomHorizontalFlip``; ``"none"`` changes
    nothing. The transform that may follow is computed on the CPU; see :func:`ensembler.data.augmentations.transform`.
    """
    crop, name = split(augmentation)
    if name is None or not len(images):
        return _crop(images, crop, choices)
    return _lock_and_transform(_crop(images, crop, choices[:, :-1]), name, choices)


def _lock_and_transform(images: Tensor, name: str, choices: Tensor) -> Tensor:
    with _GLOBAL_GENERATOR:
        return transform(images, name, choices[:, -1])


def _crop(images: Tensor, crop: str, choices: Tensor) -> Tensor:
    if crop == "none" or not len(images):
        return images
    count, height, width, _ = images.shape
    if crop == "resized-crop-flip":  # one image at a time, because the host must read the seeds
        pairs = zip(images, choices.flatten().tolist(), strict=True)
        return torch.stack([_resized_crop_flip(image, seed, (height, width)) for image, seed in pairs])
    device = images.device
    rows = choices[:, :1] + torch.arange(height, device=device)
    columns = choices[:, 1:2] + torch.arange(width, device=device)
    columns = torch.where(choices[:, 2:].bool(), columns.flip(1), columns)
    padded = torch.nn.functional.pad(images, (0, 0, _PADDING, _PADDING, _PADDING, _PADDING))
    picture = torch.arange(count, device=device)[:, None, None]
    return padded[picture, rows[:, :, None], columns[:, None, :]]


def read_images(
    files: Sequence[Path],
    shape: tuple[int, int],
    augmentation: str = "none",
    choices: Tensor | None = None,
    *,
    like: Path | None = None,
    threads: int | None = None,
    mend: str = MEND,
) -> Tensor:
    """Decode image files in several threads.

    Args:
        files: N paths.
        shape: (H, W) to which every image is resized, bilinearly and ignoring proportions.
        augmentation, choices: see :func:`augment`. ``"resized-crop-flip"`` crops the image at its original size, and
            resizes only the crop. A transform that follows takes the image of ``shape``.
        like: a file of ``shape``; images of another shape are refused, with its name, instead of being resized.
        threads: number of threads; see :func:`ensembler.machine.in_threads`.
        mend: the last clause of the message about a file that cannot be read.

    Returns:
        (N, H, W, 3) uint8.

    Raises:
        DataError: an image cannot be read, or has another shape; the message names it.
    """
    images = np.empty((len(files), *shape, 3), np.uint8)  # in inference mode, other threads could not fill a tensor
    crop, name = split(augmentation)
    whole = like is not None or crop == "resized-crop-flip"

    def read(i: int) -> None:
        image = read_image(files[i], None if whole else shape, mend)
        if like is not None and image.shape[:2] != shape:
            raise DataError(
                f"{files[i]} is {image.shape[1]} x {image.shape[0]} pixels but {like} is "
                f"{shape[1]} x {shape[0]}: add --image-size to resize all to one size"
            )
        if crop == "resized-crop-flip" and choices is not None:
            image = _resized_crop_flip(torch.from_numpy(image), int(choices[i].flatten()[0]), shape).numpy()
        images[i] = image

    for _ in in_threads(read, files, threads):
        pass
    found = torch.from_numpy(images)
    if choices is None or (whole and name is None):
        return found
    return _lock_and_transform(found, str(name), choices) if whole else augment(found, augmentation, choices)


def _resized_crop_flip(image: Tensor, seed: int, shape: tuple[int, int]) -> Tensor:
    """Augment one image (h, w, 3) to (H, W, 3) with torchvision's transforms."""
    transform = _transform(shape)
    # The transforms draw from torch's global generator, so one thread at a time seeds it and restores its state.
    with _GLOBAL_GENERATOR, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        result: Tensor = transform(image.permute(2, 0, 1))
    return result.permute(1, 2, 0)


@cache
def _transform(shape: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import v2

    transform: Callable[[Tensor], Tensor] = v2.Compose([v2.RandomResizedCrop(shape), v2.RandomHorizontalFlip()])
    return transform
