"""Datasets of your own, made from Python: arrays, a map-style dataset of PyTorch, or a ``LightningDataModule``.

Every example is read once, when the dataset is made, and held in memory: images as uint8, features as float32. So the
pixels have a hash, by which a run finds them again, and are the same in training, evaluation and export.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ensembler.arguments import checked
from ensembler.data.datasets import NAMES, OWN, Dataset, moments
from ensembler.data.examples import Arrays
from ensembler.data.folder_notes import Notes, describe_splits
from ensembler.data.image_arrays import is_array, resize, to_array, to_image, to_images, to_label, to_labels
from ensembler.data.images import MEMORY_LIMIT, Split
from ensembler.data.normalisation import normalised
from ensembler.data.sources import Source, sources
from ensembler.data.splits import complete
from ensembler.device import default_modes
from ensembler.errors import DataError, UsageError

__all__ = ["as_dataset"]

_READ_TWICE = 64  # examples that are read again, to find random transforms


@default_modes()
@checked
def as_dataset(
    train: Any,
    test: Any = None,
    validation: Any = None,
    *,
    classes: Sequence[str] | NDArray[np.str_] | None = None,
    name: str = OWN,
    image_size: int | None = None,
    normalisation: str | None = None,
    validation_share: float = 0.1,
    in_memory: bool = False,
) -> Dataset:
    """Make a dataset of images, or of rows of features, that are not in a folder.

    ::

        dataset = as_dataset((images, labels), classes=["cat", "dog"], name="pets")
        dataset = as_dataset(torchvision.datasets.SVHN("data"), torchvision.datasets.SVHN("data", "test"))
        run = train(dataset, FGE(members=5))

    A split is ``(images, labels)`` or any map-style dataset of pairs ``(image, label)``, such as a
    ``torch.utils.data.Dataset``, a list, or the dataset of a ``DataLoader``. Images are PIL images, arrays or tensors
    as :mod:`ensembler.data.image_arrays` says: of 8 bits, or floats from 0 to 1, which are rounded to 8 bits. Rows
    (N, F) of numbers are features. Labels are whole numbers from 0.

    Transforms must give the same image each time: random ones belong to training's augmentation, and ``Normalize`` is
    left out, because the package normalises.

    Args:
        train: the training examples; or a ``LightningDataModule``, of which the three loaders' datasets are taken.
        test: the test examples; by default a fifth of ``train`` is held out, seeded and stratified.
        validation: examples that are never trained on, for calibration and choices; by default a share of ``train``.
        classes: the class names, in label order; by default those of the dataset's attribute ``classes``, or numbers.
        name: in reports. For commands to find the data again, it is the ``package.module:attribute`` or
            ``file.py:attribute`` of this dataset, or of a function without arguments that returns it.
        image_size: resize every image to this many pixels per side, ignoring proportions.
        normalisation: of the network's inputs, see :func:`ensembler.data.normalisation.parse`; by default the mean and
            standard deviation of the training examples.
        validation_share: of the training examples that are held out where there is no ``validation``.
        in_memory: read images that take more than :data:`ensembler.data.images.MEMORY_LIMIT`, too.

    Raises:
        UsageError: an object of a kind that is not taken, or an option out of range.
        DataError: examples that cannot be read, or are not what they must be; or too few to hold any out.
    """
    if not 0 < validation_share < 1:
        raise UsageError(f"validation_share must be between 0 and 1, not {validation_share}")
    if image_size is not None and image_size < 1:
        raise UsageError(f"image_size must be at least 1 pixel, not {image_size}")
    if name in NAMES or name.startswith("folder:") or not name.strip():
        raise UsageError(f"{name!r} is no name for data of your own: give another")
    given = sources(train, test, validation)
    total = 0 if in_memory else sum(map(len, given.values()))
    found = {role: _read(source, image_size, total) for role, source in given.items()}
    _check_alike(found)
    names = _class_names(classes, given, found)
    parts = complete(found, validation_share, name)
    is_images = isinstance(parts["train"], Split)
    mean, std = moments(parts["train"]) if is_images else _moments(parts["train"].data)
    notes = [note for source in given.values() for note in source.notes]
    dataset = Dataset(
        name=name,
        title=name,
        classes=names,
        augmentation="crop-flip" if is_images else "none",
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        mean=mean,
        std=std,
        notes=Notes(partial(describe_splits, name, names, parts, tuple(found), notes)),
    )
    return normalised(dataset, normalisation)


def _read(source: Source, image_size: int | None, total: int) -> Split | Arrays:
    """Read a split into memory, which is limited where ``total``, the number of all splits' examples, is not 0.

    Raises:
        DataError: an example that cannot be read, or is not what it must be. UsageError: too many.
    """
    if source.arrays is not None:
        images, labels = source.arrays
        targets = to_labels(labels, f"the labels of {source.role}")
        if is_array(images) and images.dtype != object:
            inputs = to_array(images, f"the images of {source.role}")
            return _arrays(inputs, targets, source.role, image_size, total)
        source = Source(source.role, arrays=(images, targets))
    first, _ = source.item(0)
    if is_array(first) and first.ndim == 1:
        return _rows(source, image_size)
    return _images(source, first, image_size, total)


def _arrays(
    inputs: NDArray[Any], labels: NDArray[np.int64], role: str, image_size: int | None, total: int
) -> Split | Arrays:
    if inputs.ndim == 2:
        return _features(inputs, labels, role, image_size)
    images = to_images(inputs, f"the images of {role}")
    if image_size is not None:
        _check_memory(total, (image_size, image_size, 3))
        images = np.stack([resize(image, image_size) for image in images])
    return Split(torch.from_numpy(images), torch.from_numpy(labels))


def _check_memory(total: int, shape: tuple[int, ...]) -> None:
    """Refuse so many images of a shape (H, W, 3) that take more than the limit; ``total`` 0 lifts it."""
    size = total * math.prod(shape)
    if size > MEMORY_LIMIT:
        raise UsageError(
            f"{total:,} images of {shape[1]} x {shape[0]} pixels take {size / 2**30:.1f} GiB in memory, and the limit "
            f"is {MEMORY_LIMIT / 2**30:g} GiB: write them to a folder (folder:PATH is read from files), make them "
            "smaller (image_size), or allow it (in_memory=True, --in-memory)"
        )


def _images(source: Source, first: Any, image_size: int | None, total: int) -> Split:
    shape = to_image(first, source.where(0)).shape if image_size is None else (image_size, image_size, 3)
    _check_memory(total, shape)
    images, labels = np.empty((len(source), *shape), np.uint8), np.empty(len(source), np.int64)
    for index in range(len(source)):
        image, label = source.item(index)
        pixels = to_image(image, source.where(index), image_size)
        if pixels.shape != shape:
            raise DataError(
                f"{source.where(index)} is {pixels.shape[1]} x {pixels.shape[0]} pixels and the first {shape[1]} x "
                f"{shape[0]}: give image_size (--image-size) to resize all to one size"
            )
        images[index], labels[index] = pixels, to_label(label, source.where(index))

    def again(index: int) -> bool:
        image, label = source.item(index)
        same = np.array_equal(to_image(image, source.where(index), image_size), images[index])
        return same and to_label(label, source.where(index)) == labels[index]

    _check_still(source, again)
    return Split(torch.from_numpy(images), torch.from_numpy(labels))


def _rows(source: Source, image_size: int | None) -> Arrays:
    """Read rows of features one by one."""
    items = [source.item(index) for index in range(len(source))]
    rows = [to_array(row, source.where(index)) for index, (row, _) in enumerate(items)]
    for index, row in enumerate(rows):
        if row.shape != rows[0].shape:
            raise DataError(
                f"{source.where(index)} has shape {row.shape} and the first {rows[0].shape}: give equal ones"
            )
    labels = np.array([to_label(label, source.where(index)) for index, (_, label) in enumerate(items)])

    def again(index: int) -> bool:
        (row, label), where = source.item(index), source.where(index)
        return np.array_equal(to_array(row, where), rows[index]) and to_label(label, where) == labels[index]

    found = _features(np.stack(rows), labels, source.role, image_size)
    _check_still(source, again)
    return found


def _features(rows: NDArray[Any], labels: NDArray[np.int64], role: str, image_size: int | None) -> Arrays:
    if image_size is not None:
        raise UsageError(f"{role} holds rows of features, not images: leave out image_size (--image-size)")
    if rows.dtype.kind not in "iuf":
        raise DataError(f"the rows of {role}: {rows.dtype}, expected numbers")
    if not rows.shape[1]:
        raise DataError(f"the rows of {role} hold no feature: give at least one")
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused as infinite
        found = np.array(rows, dtype=np.float32, order="C")
    if not np.isfinite(found).all():
        index = int(np.flatnonzero(~np.isfinite(found).all(axis=1))[0])
        raise DataError(
            f"row {index} of {role} has a number that is not finite in float32 (NaN or infinite): leave the row out, "
            "or fill it"
        )
    return Arrays(torch.from_numpy(found), torch.from_numpy(labels))


def _check_still(source: Source, again: Callable[[int], bool]) -> None:
    """Refuse a dataset that gives another example at a second reading.

    Raises:
        DataError: it does; the first such example is named.
    """
    if source.arrays is not None:
        return
    for index in np.unique(np.linspace(0, len(source) - 1, _READ_TWICE).astype(int)).tolist():
        if not again(index):
            raise DataError(
                f"{source.where(index)} is another one each time that it is read: leave random transforms out of the "
                "dataset, and name them as augmentation (--augmentation), which is drawn anew at every step"
            )


def _check_alike(found: Mapping[str, Split | Arrays]) -> None:
    """Refuse splits of different kinds or shapes."""
    (first, one), *others = found.items()
    for role, other in others:
        if one.example_shape != other.example_shape or one.kind != other.kind:
            ours, theirs = (" x ".join(map(str, each.example_shape)) for each in (one, other))
            raise DataError(
                f"the examples of {first} are {ours} and those of {role} {theirs}: give images of one size, or "
                "image_size (--image-size)"
            )


def _class_names(
    classes: Sequence[str] | NDArray[np.str_] | None, given: Mapping[str, Source], found: Mapping[str, Split | Arrays]
) -> tuple[str, ...]:
    """Return the class names, which fit the labels of all splits.

    Raises:
        UsageError: names that are not distinct text. DataError: labels that are not 0 to C - 1.
    """
    own = {role: source.classes for role, source in given.items()} if classes is None else {}
    known = {role: names for role, names in own.items() if names is not None}
    if len(set(known.values())) > 1:
        (first, ours), (second, theirs), *_ = known.items()
        one, other = next(((a, b) for a, b in zip(ours, theirs, strict=False) if a != b), (len(ours), len(theirs)))
        raise DataError(
            f"{first} and {second} have different classes ({one!r} and {other!r} in one place), so that a label means "
            "two things: give both the same classes"
        )
    present = set(found["train"].labels.tolist())
    most = max(present) + 1
    names = next(iter(known.values()), None) if classes is None else tuple(classes)
    if names is None or (classes is None and len(names) < most):
        if missing := [*islice((label for label in range(most) if label not in present), 5)]:
            raise DataError(
                f"no image of train has the label {', '.join(map(str, missing))}, and classes count from 0 to "
                f"{most - 1}: renumber the labels, or name every class (classes)"
            )
        names = tuple(map(str, range(most)))
    if not all(isinstance(one, str) and one.strip() for one in names):
        raise UsageError("classes are names in label order, as in classes=['cat', 'dog']")
    if len(set(names)) < len(names):
        twice = next(one for one in names if names.count(one) > 1)
        raise UsageError(f"two classes are called {twice!r}: give every class a name of its own")
    for role, split in found.items():
        if (wrong := int(split.labels.max())) >= len(names):
            raise DataError(
                f"{role} has the label {wrong}, and the {len(names)} classes ({names[0]}, ...) count from 0 to "
                f"{len(names) - 1}: renumber the labels, or name every class (classes)"
            )
    if len(names) < 2:
        raise DataError("all images have the same label: at least two classes are needed")
    return names


def _moments(rows: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each feature, 1 for one that is constant."""
    wide = rows.double()
    std = wide.std(dim=0, correction=0)
    return tuple(wide.mean(dim=0).tolist()), tuple(torch.where(std > 0, std, 1.0).tolist())
