"""Data sets of the Hugging Face Hub, read with its package ``datasets``, the extra ``ensembler[datasets]``."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ensembler.data.decoding import decode
from ensembler.data.images import MEMORY_LIMIT, Split
from ensembler.errors import DataError, UsageError
from ensembler.eval.shift.classes import Matched, match

__all__ = ["PREFIX", "read_hub"]

PREFIX = "hf:"


def read_hub(
    name: str, ours: Sequence[str], shape: tuple[int, int], choose: Callable[[int], Tensor]
) -> tuple[Split, Matched]:
    """Read one split of a data set; nothing of it is run.

    Args:
        name: ``hf:NAME[@CONFIGURATION][:SPLIT]``; by default the split ``test``, else ``validation``.
        ours: the run's classes.
        shape: (H, W) to which images are resized.
        choose: the indices to use of a number of images.

    Raises:
        UsageError: the package ``datasets`` is not installed.
        DataError: it cannot be read, has not one column of images and one of classes, an image without a class, or too
            many images to hold.
    """
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"{name} is read with the package datasets: pip install 'ensembler[datasets]'") from error
    place, _, split = name.removeprefix(PREFIX).partition(":")
    repository, _, configuration = place.partition("@")
    try:
        if not split:
            known = datasets.get_dataset_split_names(repository, configuration or None)
            split = next((one for one in ("test", "validation") if one in known), "")
            if not split:
                raise DataError(f"{name} has the splits {', '.join(known)}: name one, as in {name}:{known[0]}")
        data = datasets.load_dataset(repository, configuration or None, split=split)
    except DataError:
        raise
    except Exception as error:  # of many classes, of the network, the name and the files
        reason = " ".join(str(error).split())
        raise DataError(f"cannot load {name}: {reason}: check hf:NAME@CONFIGURATION:SPLIT and the network") from error
    image, label = (_column(name, data.features, kind) for kind in ("Image", "ClassLabel"))
    matched = match(data.features[label].names, ours, name)
    labels = _labels(name, data[label], data.features[label].names, matched)
    usable = torch.nonzero(labels >= 0).flatten()  # not those of classes that the run does not know
    chosen = usable[choose(len(usable))]
    size = 3 * shape[0] * shape[1] * len(chosen)
    if size > MEMORY_LIMIT:
        raise DataError(
            f"{len(chosen):,} images of {name} take {size / 2**30:.1f} GiB, and the limit is "
            f"{MEMORY_LIMIT / 2**30:g} GiB: use fewer (--examples)"
        )
    rows = data.select(chosen.tolist()).cast_column(image, datasets.Image(decode=False))
    images = np.empty((len(chosen), *shape, 3), np.uint8)
    for number, row in enumerate(rows):
        images[number] = _decoded(name, int(chosen[number]), row[image], shape)
    return Split(torch.from_numpy(images), labels[chosen]), matched


def _column(name: str, features: Any, kind: str) -> str:
    """Return the only column of a kind."""
    found = [column for column, feature in features.items() if type(feature).__name__ == kind]
    if len(found) != 1:
        columns = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in features.items())
        raise DataError(f"{name} has {len(found)} columns of the type {kind}, not one: it has {columns}")
    return found[0]


def _labels(name: str, labels: Any, names: Sequence[str], matched: Matched) -> Tensor:
    """Return the labels (N,) as places among the scored outputs, -1 of classes that the run does not know."""
    given = np.asarray(labels)
    wrong = np.flatnonzero((given < 0) | (given >= len(names)))
    if len(wrong):
        raise DataError(f"image {wrong[0]} of {name} has no class ({given[wrong[0]]}): choose a split that has labels")
    places = np.array([matched.labels.get(one, -1) for one in names])
    return torch.from_numpy(places[given])


def _decoded(name: str, number: int, stored: dict[str, Any], shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    try:
        content = stored["bytes"]
        return decode(Path(stored["path"]) if content is None else io.BytesIO(content), shape)
    except Exception as error:  # the data are untrusted
        raise DataError(f"cannot read image {number} of {name}: {error}: choose other images") from error
