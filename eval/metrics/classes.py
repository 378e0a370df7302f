"""Which classes are taken for which, how far each answer can be trusted, and which images show it best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ensembler.record import Record

__all__ = [
    "CLASSES",
    "IMAGES",
    "ClassScores",
    "ConfusedPair",
    "Confusion",
    "Places",
    "ShownImage",
    "class_scores",
    "confusion",
    "shown_images",
    "surest_mistakes",
    "wrong_by_class",
]

CLASSES = 20  # the largest number of classes whose confusion and errors under shift are kept in full
IMAGES = 8  # of the surest mistakes, and of the most uncertain images

Ints = NDArray[np.int64]


class ConfusedPair(Record):
    """Images of one class that are answered with another. ``share``: of all images of the class ``label``."""

    label: str
    predicted: str
    examples: int
    share: float


class Confusion(Record):
    """The confusion of classes on the clean test images.

    ``counts``: images of each class (rows) by the class that they are answered with (columns), both in the order of the
    report's ``classes``; ``null`` for more than 20 classes. ``pairs``: the most frequent confusions, 20 at most.
    """

    counts: list[list[int]] | None
    pairs: list[ConfusedPair]


class ClassScores(Record):
    """How far an answer can be trusted: of the images answered with a class.

    ``answered``: their number; ``precision``: the share of them that are of this class; ``confidence``: the mean
    probability of the class. Both are ``null`` where no image is answered with it.
    """

    answered: int
    precision: float | None
    confidence: float | None


class ShownImage(Record):
    """A test image and its prediction.

    ``image``: its position in the test set, from 0; ``file``: its name, of a folder's images; ``entropy``: of the mean
    prediction, in nats; ``votes``: the number of members by the class that each finds most probable.
    """

    image: int
    file: str | None
    label: str
    predicted: str
    confidence: float
    entropy: float
    votes: dict[str, int]


class Places(NamedTuple):
    """Where predicted images come from.

    Attributes:
        indices: (B,) positions in the test set; ``None`` for all of it.
        files: names of all images of the test set; ``None`` where they lie in no files.
    """

    indices: Ints | None = None
    files: Sequence[str] | None = None


def confusion(predicted: Ints, labels: Ints, classes: Sequence[str]) -> Confusion:
    """Count how often each class is taken for each.

    Args:
        predicted: (B,) answers.
        labels: (B,) classes.
        classes: the C names.
    """
    C = len(classes)
    cells, counts = np.unique(labels * C + predicted, return_counts=True)
    sizes = np.bincount(labels, minlength=C)
    wrong = cells // C != cells % C
    cells_wrong, counts_wrong = cells[wrong], counts[wrong]
    order = np.argsort(-counts_wrong, kind="stable")[:CLASSES]
    pairs = [
        ConfusedPair(label=classes[label], predicted=classes[other], examples=count, share=count / int(sizes[label]))
        for label, other, count in zip(
            (cells_wrong[order] // C).tolist(),
            (cells_wrong[order] % C).tolist(),
            counts_wrong[order].tolist(),
            strict=True,
        )
    ]
    whole = None
    if C <= CLASSES:
        table = np.zeros(C * C, np.int64)
        table[cells] = counts
        whole = table.reshape(C, C).tolist()
    return Confusion(counts=whole, pairs=pairs)


def class_scores(mean: NDArray[np.floating], labels: Ints, classes: Sequence[str]) -> dict[str, ClassScores]:
    """Score the answers with each class, of mean probabilities (B, C) and labels (B,)."""
    C, predicted = len(classes), mean.argmax(axis=1)
    answered = np.bincount(predicted, minlength=C)
    right = np.bincount(predicted, weights=predicted == labels, minlength=C)
    sure = np.bincount(predicted, weights=np.minimum(mean.max(axis=1).astype(np.float64), 1.0), minlength=C)
    return {
        name: ClassScores(
            answered=int(count),
            precision=float(right[k] / count) if count else None,
            confidence=float(sure[k] / count) if count else None,
        )
        for k, (name, count) in enumerate(zip(classes, answered, strict=True))
    }


def wrong_by_class(wrong: NDArray[np.floating], labels: Ints, count: int) -> NDArray[np.float64]:
    """Compute each class's error (C,) from losses (B,) of 0 and 1; NaN for a class without images."""
    sizes = np.bincount(labels, minlength=count)
    sums = np.bincount(labels, weights=wrong, minlength=count)
    return np.divide(sums, sizes, out=np.full(count, np.nan), where=sizes > 0)


def surest_mistakes(mean: NDArray[np.floating], labels: Ints) -> Ints:
    """Return the places of the wrong answers of highest confidence, the surest first, :data:`IMAGES` at most."""
    wrong = np.flatnonzero(mean.argmax(axis=1) != labels)
    return wrong[np.argsort(-mean[wrong].max(axis=1), kind="stable")[:IMAGES]]


def shown_images(
    chosen: Ints,
    mean: NDArray[np.floating],
    entropy: NDArray[np.floating],
    votes: NDArray[np.integer],
    labels: Ints,
    classes: Sequence[str],
    places: Places,
) -> list[ShownImage]:
    """Describe the predictions of some images.

    Args:
        chosen: places among the B images.
        mean: (B, C) mean probabilities.
        entropy: (B,) of the mean, in nats.
        votes: (M, B) each member's most probable class.
        labels: (B,) classes.
        classes: the C names.
        places: of the B images.
    """
    found = []
    for place in chosen.tolist():
        image = place if places.indices is None else int(places.indices[place])
        answer = int(mean[place].argmax())
        found.append(
            ShownImage(
                image=image,
                file=None if places.files is None else _writable(places.files[image]),
                label=classes[labels[place]],
                predicted=classes[answer],
                confidence=min(1.0, float(mean[place, answer])),
                entropy=float(entropy[place]),
                votes=_votes(votes[:, place], classes),
            )
        )
    return found


def _votes(votes: NDArray[np.integer], classes: Sequence[str]) -> dict[str, int]:
    """Count votes (M,) by class, the most first."""
    found, counts = np.unique(votes, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {classes[found[k]]: int(counts[k]) for k in order}


def _writable(name: str) -> str:
    """Return a file's name without bytes that are no UTF-8."""
    return name.encode(errors="replace").decode()
