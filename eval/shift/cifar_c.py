"""The official CIFAR-10-C and CIFAR-100-C files, checked on a sample."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ensembler.data.images import Images
from ensembler.errors import DataError
from ensembler.eval.shift.corruptions import SEVERITIES
from ensembler.eval.shift.layout import LABELS, Rows, StoredFolder
from ensembler.eval.shift.test_set import Shift, TestSet

__all__ = ["LABELS", "check_official", "official_shift"]

_REMEDY = "remove the folder, and fetch it again with ensembler data download"
_SAMPLE = 100  # images checked
_OWN = 0.5  # share of them that must resemble their own clean image most; by chance it is one image
_FLAT = 2.0  # standard deviation, in levels, below which an image cannot be told from others
_FEWEST = 10  # distinct images below which nothing is concluded
# Corruptions that change images more with every severity, whatever was drawn.
_GROWING = {
    *("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "defocus_blur", "gaussian_blur", "zoom_blur"),
    *("fog", "brightness", "contrast", "pixelate", "jpeg_compression"),
}
_STEP_BACK = 0.95  # of the change at the severity before, below which the severities are out of order


def official_shift(
    name: str, title: str, test: Images, indices: Tensor, path: Path, source: Literal["official", "folder"] = "official"
) -> Shift:
    """Read the official files, or others in their layout, for some of the test images.

    Args:
        name: as the user gave it.
        title: of the files in reports, such as ``"CIFAR-10-C"``.
        test: all test images.
        indices: (N,) those to use.
        path: the folder of the files.
        source: whether they are the official ones.

    Raises:
        DataError: there is no corruption, or a file is damaged or of other images.
    """
    folder = StoredFolder(path, test, _REMEDY)
    if not folder.corruptions:
        raise DataError(f"{path} has {LABELS} but no corruption: fetch it again with ensembler data download")
    check_official(folder)
    clean = test.part(indices)
    sets = tuple(
        TestSet(
            corruption,
            f"{corruption} {severity}",
            Rows(clean, indices, corruption, severity, folder),
            "shift",
            severity,
            source,
        )
        for corruption in folder.corruptions
        for severity in SEVERITIES
    )
    count = len(folder.corruptions)
    files = f"the official {title} files" if source == "official" else f"the files of {title}"
    return Shift(name, source, f"Shift: {files}, {count} corruptions at 5 severities.", sets)


def check_official(folder: StoredFolder) -> None:
    """Check whether the files of a folder belong to its test images, in their order.

    Every file's shape is checked and, for about a hundred images, whether each resembles its own clean image more than
    the others, and, for corruptions that grow with severity, whether the change grows. Genuine files pass by a wide
    margin: half of the images must, and of CIFAR-10's test images 86 % or more do under every corruption.

    Raises:
        DataError: a file is damaged or of other images.
    """
    folder.check_labels()
    sample = np.unique(np.linspace(0, len(folder.test) - 1, _SAMPLE).astype(int))
    clean = folder.test[torch.from_numpy(sample)].images.numpy()
    for name in folder.corruptions:
        before = 0.0
        for severity in SEVERITIES:
            corrupted = folder.some(name, severity, sample)
            share, change = _own_share(clean, corrupted), _change(clean, corrupted)
            if share < _OWN:
                raise DataError(
                    f"{folder.file(name)} is not in the test set's order: of {len(sample)} images looked at, only "
                    f"{share:.0%} resemble their own clean image most at severity {severity}: {folder.remedy}"
                )
            if name in _GROWING and change < _STEP_BACK * before:
                raise DataError(
                    f"{folder.file(name)} does not hold severities 1 to 5 one after the other: severity {severity} "
                    f"changes the images by {change:.1f} levels, severity {severity - 1} by {before:.1f}: "
                    f"{folder.remedy}"
                )
            before = change


def _own_share(clean: NDArray[np.uint8], corrupted: NDArray[np.uint8]) -> float:
    """Compute the share of the images (N, H, W, 3) that correlate most with their own clean image."""
    pixels = [images.reshape(len(images), -1).astype(np.float32) for images in (clean, corrupted)]
    distinct = pixels[0].std(1) >= _FLAT
    if distinct.sum() < _FEWEST:
        return 1.0
    a, b = ((part := rows[distinct] - rows[distinct].mean(1, keepdims=True)) / _norm(part) for rows in pixels)
    correlation = b @ a.T
    return float((correlation.diagonal() >= correlation.max(1) - 1e-6).mean())


def _norm(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    length: NDArray[np.float32] = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.maximum(length, 1e-6)


def _change(clean: NDArray[np.uint8], corrupted: NDArray[np.uint8]) -> float:
    """Compute the mean absolute change, in levels."""
    return float(np.abs(corrupted.astype(np.int16) - clean).mean())
