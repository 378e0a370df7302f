"""Published datasets of images as their authors split them: digits, CIFAR-10, CIFAR-100 and Fashion-MNIST."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ensembler.data.images import Split
from ensembler.data.splits import hold_out
from ensembler.errors import DataError

__all__ = ["Parts", "cifar", "digits", "fashion_mnist"]

Parts = tuple[str, tuple[str, ...], str, Split, Split]
"""Title, names of classes, augmentation, training and test images."""


_ELSEWHERE = ": check the network, or set ENSEMBLER_DATA or --data to a folder that can be written"


def digits() -> Parts:
    """Return scikit-learn's digits, resized to 32 x 32 RGB."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.from_numpy(data.images).float()[:, None] * (255 / 16)
    pixels = torch.nn.functional.interpolate(pixels, size=(32, 32), mode="bilinear", align_corners=False)
    images = pixels.round_().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous()
    everything = Split(images, torch.from_numpy(data.target).long())
    rest, held_out = hold_out(everything.labels.numpy(), 0.2, "digits")
    train, test = everything[rest], everything[held_out]
    return "digits (scikit-learn, 32 x 32)", tuple("0123456789"), "crop", train, test


def cifar(name: str, root: Path, download: bool) -> Parts:
    """Return CIFAR-10 or CIFAR-100 from torchvision's archives.

    Raises:
        DataError: they are missing, or not the published ones.
    """
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
        raise DataError(f"cannot download {title} to {root}: {error.strerror or error}{_ELSEWHERE}") from error
    train, test = (Split(torch.from_numpy(part.data), torch.tensor(part.targets)) for part in parts)
    return title, tuple(parts[0].classes), "crop-flip", train, test


def fashion_mnist(root: Path, download: bool) -> Parts:
    """Return Fashion-MNIST from its IDX files, padded to 32 x 32 RGB.

    Raises:
        DataError: they are missing or damaged.
    """
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
            raise DataError(f"cannot download Fashion-MNIST to {root}: {error}{_ELSEWHERE}") from error
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
