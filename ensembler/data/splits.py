"""Holding examples out, and what is wrong with what was held out: classes without examples, duplicates."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensembler.data.decoding import MEND_OR_SKIP
from ensembler.errors import DataError
from ensembler.machine import in_threads

__all__ = ["complete", "content_sha256", "hold_out", "repeated", "repeated_files"]

_SEED = 20260101
_TEST = 0.2  # share of the training examples that are held out for testing where there are no others
_TAIL = 4096  # bytes at the end of files of equal size that are compared first

Indices = NDArray[np.int64]


def hold_out(labels: Indices, share: float, title: str, spare: int = 0) -> tuple[Indices, Indices]:
    """Hold out a seeded, stratified share of examples, at least one.

    Where classes are too small for a stratified share, each keeps at least one example, and those that have most
    beyond their share give one first.

    Args:
        labels: (N,).
        share: in (0, 1).
        title: of the examples, for the message.
        spare: how many examples beyond one of each class must be left.

    Returns:
        The indices of the rest and of the share, in order.

    Raises:
        DataError: there is no example beyond one of each class.
    """
    from sklearn.model_selection import train_test_split

    counts = np.bincount(labels)
    classes, held = np.count_nonzero(counts), math.ceil(share * len(labels))
    if counts[counts > 0].min() >= 2 and classes <= held <= len(labels) - classes:
        rest, some = train_test_split(np.arange(len(labels)), test_size=share, random_state=_SEED, stratify=labels)
        return np.sort(rest), np.sort(some)
    room = np.maximum(counts - 1, 0)
    held = min(held, room.sum() - spare)
    if held < 1:
        raise DataError(
            f"{title}: too few images to hold any out: {len(labels)} of {classes} classes, and at least "
            f"{classes + 1 + spare} are needed"
        )
    rng = np.random.default_rng(_SEED)
    quotas = _quotas(counts, room, int(held), rng)
    members = [rng.permutation(np.flatnonzero(labels == label)) for label in range(len(counts))]
    some = np.sort(np.concatenate([one[:quota] for one, quota in zip(members, quotas, strict=True)]))
    return np.setdiff1d(np.arange(len(labels)), some), some


def complete(found: Mapping[str, Any], share: float, title: str) -> dict[str, Any]:
    """Return the splits ``train``, ``validation`` and ``test``; those missing are held out of the training examples.

    Args:
        found: the splits that there are, of :class:`ensembler.data.examples.Examples`; ``train`` is one of them.
        share: of the training examples that are held out for validation; a fifth is for testing.
        title: of the examples, for the message.

    Raises:
        DataError: too few examples to hold any out.
    """
    train, validation, test = found["train"], found.get("validation"), found.get("test")
    if test is None:
        rest, held = hold_out(train.labels.numpy(), _TEST, title, spare=validation is None)
        train, test = train.part(rest), train.part(held)
    if validation is None:
        rest, held = hold_out(train.labels.numpy(), share, title)
        train, validation = train.part(rest), train.part(held)
    return {"train": train, "validation": validation, "test": test}


def _quotas(counts: Indices, room: Indices, held: int, rng: np.random.Generator) -> Indices:
    """Return how many of each class to hold out: their shares rounded to ``held`` in all, within the room."""
    ideal = counts * held / counts.sum()
    taken = np.minimum(np.floor(ideal).astype(np.int64), room)
    order = rng.permutation(len(counts))
    while (missing := held - taken.sum()) > 0:
        free = order[taken[order] < room[order]]
        taken[free[np.argsort((taken - ideal)[free], kind="stable")][:missing]] += 1
    return taken


def content_sha256(files: Iterable[Path]) -> str:
    """Return a hash of the bytes of files, in order, whatever their names.

    Raises:
        DataError: one cannot be read.
    """
    digest = hashlib.sha256()
    found = list(files)
    for one in in_threads(lambda i: _sha256(found[i]), found):
        digest.update(one)
    return digest.hexdigest()


def repeated(images: NDArray[np.uint8], others: NDArray[np.uint8]) -> list[tuple[int, int]]:
    """Return the images (N, ...) that equal one of ``others`` (M, ...): the indices of both, of the first such one."""
    first = {hashlib.sha256(other).digest(): index for index, other in reversed(list(enumerate(others)))}
    found = ((index, first.get(hashlib.sha256(image).digest())) for index, image in enumerate(images))
    return [(index, other) for index, other in found if other is not None]


def repeated_files(files: Sequence[Path], others: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Return the files of the same bytes as one of ``others``, each with the first such one.

    Sizes are compared first, then the last bytes, then everything: most files are not read as a whole.

    Raises:
        DataError: one cannot be read.
    """

    def keyed(key: Callable[[Path], bytes], some: Sequence[Path]) -> list[tuple[Path, bytes]]:
        return list(zip(some, in_threads(lambda i: key(some[i]), some), strict=True))

    for key in (_size, _tail, _sha256):
        of_files, of_others = keyed(key, files), keyed(key, others)
        shared = {found for _, found in of_files} & {found for _, found in of_others}
        files, others = ([file for file, found in one if found in shared] for one in (of_files, of_others))
    first = {found: other for other, found in reversed(of_others)}
    return [(file, first[found]) for file, found in of_files if found in shared]


def _size(path: Path) -> bytes:
    with _reading(path):
        return str(path.stat().st_size).encode()


def _tail(path: Path) -> bytes:
    with _reading(path), path.open("rb") as file:
        file.seek(-min(_TAIL, path.stat().st_size), 2)
        return hashlib.sha256(file.read(_TAIL)).digest()


def _sha256(path: Path) -> bytes:
    with _reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read the image {path}: {error.strerror or error}: {MEND_OR_SKIP}") from error
