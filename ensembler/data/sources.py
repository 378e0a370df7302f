"""What a user has of images and labels: arrays, a map-style dataset, a DataLoader, a LightningDataModule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

from ensembler.data.image_arrays import is_array
from ensembler.errors import DataError, UsageError
from ensembler.naming import reason
from ensembler.text import some

__all__ = ["Source", "is_data_module", "sources"]

_LIGHTNING = {"lightning", "pytorch_lightning"}
_LOADERS = {"train": "train_dataloader", "validation": "val_dataloader", "test": "test_dataloader"}
_WRAPPED = 10  # datasets around the one that has the names of the classes
_STAGES = {"train": "fit", "validation": "fit", "test": "test"}


@dataclass(frozen=True, eq=False)
class Source:
    """The examples of one split, as the user gave them.

    Attributes:
        role: ``"train"``, ``"validation"`` or ``"test"``.
        examples: a map-style dataset of pairs; ``None`` for arrays.
        arrays: (N, ...) inputs and (N,) labels, or a sequence of images and their labels; ``None`` for a dataset.
        notes: what of it is not used.
    """

    role: str
    examples: Any = None
    arrays: tuple[Any, Any] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.examples if self.arrays is None else self.arrays[0])

    def item(self, index: int) -> tuple[Any, Any]:
        """Return the image and the label at ``index``.

        Raises:
            DataError: it cannot be read, or is no such pair.
        """
        try:
            if self.arrays is not None:
                return self.arrays[0][index], self.arrays[1][index]
            found = self.examples[index]
        except Exception as error:  # whatever a user's code raises
            raise DataError(f"cannot read {self.where(index)}: {reason(error)}") from error
        if isinstance(found, tuple | list) and len(found) == 2:
            return found[0], found[1]
        what = f"a {type(found).__name__}"
        if isinstance(found, Mapping):
            what = f"a dict of {', '.join(map(repr, found))}"
        elif isinstance(found, tuple | list):
            what = f"{len(found)} values"
        raise DataError(
            f"{self.where(index)} is {what}, expected a pair (image, label): wrap the dataset in one of pairs"
        )

    def where(self, index: int) -> str:
        """Return what an example is called in messages."""
        return f"image {index} of {self.role}"

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the classes, where the dataset has them as torchvision's do, in ``classes``.

        Raises:
            DataError: they cannot be read, or datasets that are joined have different ones.
        """
        return _classes(self.examples, self.role, _WRAPPED)


def _classes(dataset: Any, role: str, depth: int) -> tuple[str, ...] | None:
    """Return the names of a dataset's classes, or of those that it joins or chooses from, as ``Subset`` does."""
    if dataset is None or not depth:
        return None
    try:
        names = getattr(dataset, "classes", None)
    except Exception as error:  # whatever a user's code raises
        raise DataError(f"cannot read the classes of {role}: {reason(error)}") from error
    if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    joined = getattr(dataset, "datasets", None)
    parts = joined if isinstance(joined, list | tuple) else [getattr(dataset, "dataset", None)]
    found = list(dict.fromkeys(_classes(part, role, depth - 1) for part in parts))
    if len(found) > 1:
        shown = " and ".join("none" if one is None else some(one, 5) for one in found[:2])
        raise DataError(
            f"{role} joins datasets of different classes ({shown}), so that a label means two things: give all of them "
            "the same classes, or name them (classes)"
        )
    return found[0] if found else None


def is_data_module(given: Any) -> bool:
    """Return whether an object is used as a ``LightningDataModule`` is."""
    return callable(getattr(given, "setup", None)) and callable(getattr(given, "train_dataloader", None))


def sources(train: Any, test: Any = None, validation: Any = None) -> dict[str, Source]:
    """Return the source of each split that was given; see :func:`ensembler.data.own_data.as_dataset`.

    Raises:
        UsageError: a kind of object that is not taken. DataError: it has no examples.
    """
    if is_data_module(train):
        if test is not None or validation is not None:
            raise UsageError(f"{type(train).__name__} has its own validation and test images: leave out the others")
        found = {role: _source(role, given) for role, given in _from_module(train)}
        if "train" not in found:
            raise UsageError(f"{type(train).__name__}.train_dataloader() returns no loader: return one")
        return found
    given = {"train": train, "validation": validation, "test": test}
    return {role: _source(role, one) for role, one in given.items() if one is not None or role == "train"}


def _from_module(module: Any) -> Iterator[tuple[str, Any]]:
    """Prepare a data module as Lightning's trainer does, and yield each split with the loader that it has for it."""
    name, stage = type(module).__name__, ""
    _call(name, getattr(module, "prepare_data", None))
    for role, method in _LOADERS.items():
        make = getattr(module, method, None)
        if make is None or not _is_overridden(module, method):
            continue
        if _STAGES[role] != stage:
            stage = _STAGES[role]
            _call(name, module.setup, stage=stage)
        loader = _call(name, make)
        if isinstance(loader, list | tuple) and len(loader) == 1:
            loader = loader[0]
        elif isinstance(loader, list | tuple | Mapping) and len(loader) > 1:
            raise UsageError(f"{name}.{method}() returns {len(loader)} loaders: return one")
        if loader is not None and not (isinstance(loader, list | tuple | Mapping) and not loader):
            yield role, loader


def _is_overridden(module: Any, method: str) -> bool:
    """Return whether a method is the user's own, in the class or the instance, not Lightning's, which only raises."""
    inherited = getattr(type(module), method, None)
    return method in vars(module) or getattr(inherited, "__module__", "").partition(".")[0] not in _LIGHTNING


def _call(name: str, method: Any, **arguments: Any) -> Any:
    if method is None:
        return None
    try:
        return method(**arguments)
    except Exception as error:  # whatever a user's code raises
        raise DataError(f"{name}.{method.__name__}() failed: {reason(error)}") from error


def _source(role: str, given: Any) -> Source:
    """Return the source of one split.

    Raises:
        UsageError: a kind of object that is not taken. DataError: it has no examples.
    """
    from torch.utils.data import DataLoader, Dataset, IterableDataset

    notes: tuple[str, ...] = ()
    if isinstance(given, DataLoader):
        given, notes = _from_loader(role, given)
    if isinstance(given, IterableDataset) or not (hasattr(given, "__len__") and hasattr(given, "__getitem__")):
        raise UsageError(
            f"{role} is a {type(given).__name__}, expected (images, labels) or a dataset with a length and an index: "
            "of one that is only iterated over, give list(dataset)"
        )
    if is_array(given) or isinstance(given, str | Mapping):
        kind = type(given).__name__
        raise UsageError(f"{role} is a {kind} without labels: give (images, labels), or a dataset of such pairs")
    if _is_pair(given) and all(isinstance(one, Dataset) for one in given):
        raise UsageError(f"{role} is a pair of datasets: give as_dataset(train, test)")
    source = (
        Source(role, arrays=(given[0], given[1]), notes=notes) if _is_pair(given) else Source(role, given, notes=notes)
    )
    try:
        lengths = [len(source)] if source.arrays is None else [len(one) for one in source.arrays]
    except Exception as error:  # of a number, or whatever a user's __len__ raises
        raise UsageError(f"{role} has no length: {reason(error)}") from error
    if len(set(lengths)) > 1:
        raise DataError(f"{role} has {lengths[0]:,} images and {lengths[1]:,} labels: give one label an image")
    if not lengths[0]:
        raise DataError(f"{role} has no image: give at least one, or leave the split out")
    return source


def _is_pair(given: Any) -> bool:
    """Return whether an object is (images, labels), not two examples (image, label)."""
    if not isinstance(given, tuple | list) or len(given) != 2 or isinstance(given[0], Mapping):
        return False
    first = given[0]
    example = isinstance(first, tuple | list) and len(first) == 2 and _is_image(first[0]) and not _is_image(first[1])
    return isinstance(first, Sized) and not example


def _is_image(given: Any) -> bool:
    from PIL.Image import Image

    return isinstance(given, Image) or (is_array(given) and given.ndim > 0)


def _from_loader(role: str, loader: Any) -> tuple[Any, tuple[str, ...]]:
    """Return the dataset of a DataLoader, and what of the loader is not used.

    Raises:
        UsageError: it chooses among the images in a way that is not known.
    """
    from torch.utils.data import (
        BatchSampler,
        IterableDataset,
        RandomSampler,
        SequentialSampler,
        Subset,
        SubsetRandomSampler,
    )
    from torch.utils.data.dataloader import default_collate

    dataset, sampler, batches = loader.dataset, loader.sampler, loader.batch_sampler
    if type(batches) not in (BatchSampler, type(None)):
        sampler = batches
    notes = []
    if loader.collate_fn is not default_collate and batches is not None:
        called = getattr(loader.collate_fn, "__qualname__", type(loader.collate_fn).__name__)
        notes.append(f"the loader's collate_fn ({called}) is not used in {role}: images are read one by one")
    if isinstance(sampler, SubsetRandomSampler):
        return Subset(dataset, [int(index) for index in sampler.indices]), tuple(notes)
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(dataset):
        return dataset, tuple(notes)
    if type(sampler) is SequentialSampler or isinstance(dataset, IterableDataset):
        return dataset, tuple(notes)
    raise UsageError(
        f"the loader of {role} chooses its images by a {type(sampler).__name__}, and every image is used once an epoch "
        "here: give the dataset itself, or a Subset of it"
    )
