"""New test images for CIFAR-10: CIFAR-10.1 (Recht et al. 2018) and CIFAR-10.2 (Lu et al. 2020), as NumPy files."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ensembler.data.images import Split
from ensembler.errors import DataError
from ensembler.eval.shift.classes import CIFAR10, Matched, match
from ensembler.eval.shift.layout import map_array

__all__ = ["read_cifar101", "read_cifar102"]

_CIFAR101 = {"v4": 2021, "v6": 2000}  # images of each version, as published
_CIFAR102 = 2000  # test images
_REMEDY = "fetch it again"


def read_cifar101(folder: Path, ours: Sequence[str]) -> tuple[dict[str, Split], Matched] | None:
    """Read CIFAR-10.1's ``cifar10.1_v4_data.npy``, ``..._labels.npy`` and those of v6, as far as they exist.

    Args:
        folder: of the files, or a clone of their repository.
        ours: the run's classes.

    Returns:
        The images of each version by its name, and the classes; ``None`` if there is no such file.

    Raises:
        DataError: a file is missing, damaged or not the published one, or the run has other classes.
    """
    found: dict[str, Split] = {}
    for place in (folder, folder / "datasets"):
        for version, count in _CIFAR101.items():
            data, labels = (place / f"cifar10.1_{version}_{kind}.npy" for kind in ("data", "labels"))
            if data.exists() or labels.exists():
                images, classes = (np.array(map_array(path, _REMEDY)) for path in (data, labels))
                found.setdefault(f"CIFAR-10.1 {version}", _split(place, data.name, images, classes, count))
    return _matched(found, ours, folder)


def read_cifar102(folder: Path, ours: Sequence[str]) -> tuple[dict[str, Split], Matched] | None:
    """Read CIFAR-10.2's test images from ``cifar102_test.npz``; see :func:`read_cifar101`.

    Raises:
        DataError: as above, or the file is the older ``cifar102_test.npy``, a pickle.
    """
    path = folder / "cifar102_test.npz"
    if not path.is_file():
        if not any(folder.glob("cifar102_*")):
            return None
        pickled = " (cifar102_test.npy is a pickle, which is never read)" if path.with_suffix(".npy").exists() else ""
        raise DataError(f"{folder} has no {path.name}{pickled}: fetch it from CIFAR-10.2's repository")
    try:
        with zipfile.ZipFile(path) as archive:
            if max(entry.file_size for entry in archive.infolist()) > 2 * _CIFAR102 * 32 * 32 * 3:
                raise DataError(f"{path} holds more than {_CIFAR102:,} images: {_REMEDY}")
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {path}: {error}: {_REMEDY}") from error
    return _matched({"CIFAR-10.2": _split(folder, path.name, images, labels, _CIFAR102)}, ours, folder)


def _matched(found: dict[str, Split], ours: Sequence[str], folder: Path) -> tuple[dict[str, Split], Matched] | None:
    if not found:
        return None
    matched = match(CIFAR10, ours, str(folder))
    places = torch.tensor([matched.labels[name] for name in CIFAR10])
    return {name: Split(one.images, places[one.labels]) for name, one in found.items()}, matched


def _split(folder: Path, name: str, images: NDArray[np.uint8], labels: NDArray[np.int64], count: int) -> Split:
    """Check the arrays of a published set.

    Raises:
        DataError: they have another shape or type, or a label is no class.
    """
    if images.shape != (count, 32, 32, 3) or images.dtype != np.uint8:
        raise DataError(
            f"{folder / name} holds {images.shape} of {images.dtype}, not the published {(count, 32, 32, 3)} of uint8: "
            f"{_REMEDY}"
        )
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{folder}: the labels of {name} are {labels.shape} of {labels.dtype}, not {count:,} integers: {_REMEDY}"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= len(CIFAR10)))
    if len(wrong):
        raise DataError(
            f"{folder}: the label of image {wrong[0]} of {name} is {labels[wrong[0]]}, not 0 to 9: {_REMEDY}"
        )
    return Split(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.astype(np.int64)))
