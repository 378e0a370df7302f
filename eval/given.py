"""Predictions made elsewhere, by another package, in another language, by an API: arrays, named and checked.

The names are those of a ``.npz`` file, whose arrays they are:

``probabilities`` or ``logits``
    (M, N, C), or (N, C) for one member: of the test images.
``labels``
    (N,) integers, classes from 0.
``validation_probabilities`` or ``validation_logits``, ``validation_labels``
    of held-out images; a temperature is fitted to them.
``shift/NAME/SEVERITY/probabilities`` or ``.../logits``
    of the same images, in the same order, under a corruption at a severity of 1 to 5.
``shift/NAME/probabilities`` or ``.../logits``, ``shift/NAME/labels``
    of another test set of the same classes; without labels, of the same images.
``ood/NAME/probabilities`` or ``.../logits``; ``ood_probabilities`` or ``ood_logits`` for a single set
    of out-of-distribution images.
``classes``, ``test_sha256``
    the classes' names (C,), and the hash of the test images, text; compared with those of others.
``energy``, ``max_logit``
    beside any probabilities, (N,): what :func:`ensembler.eval.metrics.ood.detectors` needs of their logits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensembler.errors import ShapeError, UsageError, first_line
from ensembler.eval.metrics.classification import SUM_ROUNDING, SUM_TOLERANCE
from ensembler.eval.predictions import Prediction, log_probabilities, reduce_logits, reduce_members
from ensembler.eval.shift.corruptions import SEVERITIES
from ensembler.eval.shift.test_set import TestSet

__all__ = ["GivenSet", "Predictions", "beside", "check_sets", "title_of"]

_VALUES = ("probabilities", "logits", "labels", "energy", "max_logit")
_NAME = re.compile(rf"(?P<set>validation_|ood_|ood/.+/|shift/.+/|)(?P<array>{'|'.join(_VALUES)})")
_TEXTS = ("classes", "test_sha256")

Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class GivenSet:
    """A test set of given predictions; used like :class:`.test_set.TestSet`.

    Attributes:
        name, group, severity: as of a :class:`.test_set.TestSet`.
        labels: (N,); ``None`` out of distribution.
        paired: whether its images are the test images, in their order.
    """

    name: str
    group: Literal["validation", "clean", "shift", "ood"]
    severity: int | None = None
    labels: Labels | None = None
    paired: bool = True

    @property
    def title(self) -> str:
        """Its name in messages, and the beginning of its arrays' names: ``shift/fog/3``."""
        return title_of(self)


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of one ensemble for test sets, checked and reduced to what scores need.

    Attributes:
        name: in reports.
        sets: the test sets with a prediction each, the test images first.
        classes: the classes' names; ``None`` if unknown.
        test_sha256: of the test images; ``None`` if unknown.
        sha256: of the file; ``None`` for arrays.
    """

    name: str
    sets: Mapping[GivenSet, Prediction]
    classes: tuple[str, ...] | None
    test_sha256: str | None
    sha256: str | None = None

    @classmethod
    def read(cls, path: str | Path) -> Predictions:
        """Read a file.

        Raises:
            DataError: it cannot be read. ShapeError: its arrays are no predictions; the message names the array.
        """
        from ensembler.eval.prediction_files import read
        from ensembler.storage.artefact import sha256

        path = Path(path)
        return replace(cls.of(path.name, read(path)), sha256=sha256(path))

    @classmethod
    def of(cls, name: str, arrays: Mapping[str, ArrayLike]) -> Predictions:
        """Check arrays by name.

        Args:
            name: in reports, and of the predictions in error messages.
            arrays: see the module.

        Raises:
            ShapeError: an array is missing, has an unknown name, the wrong shape or type, or is no prediction.
        """
        try:
            return _checked(name, arrays)
        except ShapeError as error:
            raise ShapeError(f"{name}: {error}") from None

    @property
    def clean(self) -> GivenSet:
        """The test images."""
        return next(iter(self.sets))

    @property
    def labels(self) -> Labels:
        """(N,) of the test images."""
        return np.asarray(self.clean.labels)

    @property
    def C(self) -> int:  # noqa: N802
        """The number of classes."""
        return self.sets[self.clean].mean.shape[1]

    @property
    def validation(self) -> GivenSet | None:
        """The held-out images, if there are any."""
        return next((one for one in self.sets if one.group == "validation"), None)

    def part(self, indices: NDArray[np.int64]) -> Predictions:
        """Return the predictions for some of the test images; other sets stay as they are."""
        sets = {
            replace(one, labels=one.labels[indices]) if one.paired and one.labels is not None else one: (
                prediction.part(indices) if one.paired else prediction
            )
            for one, prediction in self.sets.items()
        }
        return replace(self, sets=sets, test_sha256=None)

    def find(self, test_set: TestSet | GivenSet) -> GivenSet | None:
        """Find the set with a test set's name and severity."""
        return next((one for one in self.sets if one.title == title_of(test_set)), None)

    def check_against(self, labels: Labels, classes: Sequence[str] | int, test_sha256: str | None, other: str) -> None:
        """Check that other predictions are for the same images, as far as it can be told.

        Raises:
            UsageError: other labels, classes or images; the message says where they differ first.
        """
        count = classes if isinstance(classes, int) else len(classes)
        if count != self.C:
            raise UsageError(f"{self.name} has {self.C} classes and {other} {count}: compare predictions of one task")
        if not isinstance(classes, int) and self.classes is not None and self.classes != tuple(classes):
            place = next(n for n, both in enumerate(zip(self.classes, classes, strict=True)) if both[0] != both[1])
            raise UsageError(
                f"class {place} is {self.classes[place]!r} in {self.name} and {classes[place]!r} in {other}: give the "
                "classes the same names, in the same order"
            )
        _check_labels(self.name, self.labels, other, labels)
        if None not in (test_sha256, self.test_sha256) and test_sha256 != self.test_sha256:
            raise UsageError(f"{self.name} and {other} have equal labels, but are for other test images: predict again")


def title_of(test_set: TestSet | GivenSet) -> str:
    """Return the beginning of the names of a set's arrays, such as ``shift/fog/3``; what names it among others."""
    if test_set.group in ("validation", "clean"):
        return test_set.group
    severity = "" if test_set.severity is None else f"/{test_set.severity}"
    return f"{test_set.group}/{test_set.name}{severity}"


def check_sets(given: Iterable[Predictions], test_sets: Mapping[Any, int]) -> list[str]:
    """Check that all have predictions for every test set, and as many as it has images.

    Args:
        given: the predictions.
        test_sets: each test set's number of images.

    Returns:
        The names of the sets that some have beyond these.

    Raises:
        UsageError: predictions are missing, or for another number of images.
    """
    more = set()
    for one in given:
        for test_set, images in test_sets.items():
            own = one.find(test_set)
            if own is None:
                raise UsageError(
                    f"{one.name} has no predictions for {title_of(test_set)}: add them, or leave that test set out"
                )
            if (count := len(one.sets[own].mean)) != images:
                raise UsageError(f"{one.name} has {count:,} predictions for {title_of(test_set)}, not {images:,}")
        known = {title_of(test_set) for test_set in test_sets} | {"validation"}
        more |= {own.title for own in one.sets} - known
    return sorted(more)


def beside(
    found: Iterable[tuple[TestSet | GivenSet, Sequence[Prediction]]],
    order: Sequence[Predictions | None],
) -> Iterator[tuple[TestSet | GivenSet, list[Prediction | None]]]:
    """Put given predictions beside those of runs, for each test set; each has its own validation set, or none.

    Args:
        found: test sets, each with the runs' predictions.
        order: of all: given predictions, or ``None`` for a run.

    Raises:
        UsageError: given predictions are for other images of a test set.
    """
    for place, one in enumerate(order):
        if one is not None and (own := one.validation) is not None:
            yield own, [one.sets[own] if number == place else None for number in range(len(order))]
    for test_set, each in found:
        made = iter(each)
        yield test_set, [next(made) if one is None else _prediction(one, test_set) for one in order]


def _prediction(one: Predictions, test_set: TestSet | GivenSet) -> Prediction | None:
    own = one.find(test_set)
    if own is None or own.group == "validation":
        return None
    if own.labels is not None and test_set.labels is not None:
        _check_labels(one.name, own.labels, f"{title_of(test_set)} of others", test_set.labels)
    return one.sets[own]


def _check_labels(name: str, labels: Labels, other: str, expected: Labels) -> None:
    mend = "give predictions for the same images, in the same order"
    if len(labels) != len(expected):
        raise UsageError(f"{name} has {len(labels):,} labels and {other} {len(expected):,}: {mend}")
    if len(differ := np.flatnonzero(labels != expected)):
        first = differ[0]
        raise UsageError(
            f"{len(differ):,} labels differ between {name} and {other}, first of image {first} ({labels[first]} and "
            f"{expected[first]}): {mend}"
        )


# --- checks ---------------------------------------------------------------------------------------------------------


def _checked(name: str, arrays: Mapping[str, ArrayLike]) -> Predictions:
    by_set: dict[str, dict[str, NDArray[Any]]] = {"": {}}
    for given, array in arrays.items():
        if given in _TEXTS:
            continue
        match = _NAME.fullmatch(given)
        if match is None or not given.isprintable():
            raise ShapeError(
                f"unknown array {given!r}: give {', '.join(_VALUES[:3])}, the same as validation_... or "
                "ood_..., shift/NAME/SEVERITY/... and ood/NAME/..., classes or test_sha256"
            )
        by_set.setdefault(match["set"], {})[match["array"]] = _array(given, array)
    clean = by_set.pop("")
    if "labels" not in clean:
        raise ShapeError("there are no 'labels': give the class of each image, (N,) integers")
    first = _reduced("", clean, None)
    labels, shape = clean["labels"].astype(np.int64), (first.size, first.mean.shape[1])
    sets = {GivenSet("clean", "clean", None, labels): first}
    for prefix, own in by_set.items():
        one = _named(prefix, own, labels)
        prediction = _reduced(prefix, own, one.labels)
        if (prediction.size, prediction.mean.shape[1]) != shape:
            raise ShapeError(
                f"{prefix}... is of {prediction.size} members and {prediction.mean.shape[1]} classes, but the test "
                f"images' predictions are of {shape[0]} and {shape[1]}"
            )
        if any(one.title == other.title for other in sets):
            raise ShapeError(f"there are two sets {one.title}: give each another name")
        sets[one] = prediction
    _check_names(sets)
    _check_held_out(sets)
    classes = _texts(arrays, "classes", shape[1])
    sha256 = _texts(arrays, "test_sha256", None)
    return Predictions(name, sets, classes, sha256[0] if sha256 else None)


def _check_names(sets: Iterable[GivenSet]) -> None:
    """Refuse a set that has severities and also none, and two that a report would call by one name."""
    shifted = [one for one in sets if one.group == "shift"]
    # Means over a set's severities would take one without a severity for one more.
    if both := {one.name for one in shifted if one.severity} & {one.name for one in shifted if not one.severity}:
        raise ShapeError(f"shift/{min(both)} is there with severities and without: give one of them another name")
    cells = {f"{one.name} {one.severity}" for one in shifted if one.severity}
    for one in sets:
        if (one.group == "shift" and one.name in cells) or (one.group in ("shift", "ood") and one.name == "clean"):
            raise ShapeError(f"{one.title} has the name that another test set has in a report: give it another one")


def _check_held_out(sets: Mapping[GivenSet, Prediction]) -> None:
    """Refuse test images as validation images: a temperature and an order of members must not have seen them."""
    known = {one.group: (np.asarray(one.labels), np.asarray(found.members)) for one, found in sets.items()}
    if "validation" in known and all(map(np.array_equal, known["clean"], known["validation"])):
        raise ShapeError(
            "the validation predictions and labels are those of the test images: give those of other, held-out images, "
            "or leave them out"
        )


def _array(name: str, given: ArrayLike) -> NDArray[Any]:
    if np.ma.is_masked(given):
        raise ShapeError(f"{name} has masked entries: leave these images out of every array")
    try:
        return np.asarray(given)
    except (
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:  # a tensor on a GPU or with a gradient, rows of other lengths
        raise ShapeError(
            f"{name} is no array ({first_line(error)}): give one of NumPy's, or a tensor.detach().cpu()"
        ) from error


def _named(prefix: str, own: Mapping[str, Any], labels: Labels) -> GivenSet:
    """Make the set of a prefix, such as ``shift/fog/3/``."""
    if prefix == "validation_":
        if "labels" not in own:
            raise ShapeError("there are no 'validation_labels': give the class of each held-out image")
        return GivenSet("validation", "validation", None, np.asarray(own["labels"]), paired=False)
    if prefix.startswith("ood"):
        if "labels" in own:
            raise ShapeError(f"{prefix}labels: out-of-distribution images have no labels; leave them out")
        return GivenSet("ood" if prefix == "ood_" else prefix[len("ood/") : -1], "ood", paired=False)
    name, _, severity = prefix.removeprefix("shift/").rstrip("/").rpartition("/")
    if not name:
        paired = "labels" not in own
        return GivenSet(severity, "shift", None, labels if paired else np.asarray(own["labels"]), paired)
    if severity not in map(str, SEVERITIES):
        raise ShapeError(f"{prefix}...: a severity is 1 to 5, not {severity!r}")
    if "labels" in own:
        raise ShapeError(f"{prefix}labels: corrupted test images have the test images' labels; leave them out")
    return GivenSet(name, "shift", int(severity), labels)


def _reduced(prefix: str, own: Mapping[str, NDArray[Any]], labels: Labels | None) -> Prediction:
    """Check a set's arrays, and reduce them; without ``labels``, its own are used, if it has any."""
    values = [name for name in ("probabilities", "logits") if name in own]
    if len(values) != 1:
        found = "both" if values else "neither"
        raise ShapeError(f"{found} of {prefix}probabilities and {prefix}logits are there: give one of them")
    title = prefix + values[0]
    members = _members(title, own[values[0]])
    extra = {name: own[name] for name in ("energy", "max_logit") if name in own}
    if values[0] == "logits":
        if extra:
            raise ShapeError(f"{prefix}{next(iter(extra))} follows from the logits: leave it out")
        extra = {} if log_probabilities(members) else reduce_logits(members)
        members = _softmax(title, members)
    members = _distributions(title, members)
    y = own.get("labels", labels)
    if y is not None:
        y = _labels(prefix, y, title, members)
    for name, array in extra.items():
        if array.shape != members.shape[1:2] or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise ShapeError(
                f"{prefix}{name} must be {members.shape[1]} finite numbers, one an image, found {array.dtype} "
                f"{array.shape}"
            )
    keeps = prefix in ("", "validation_")
    reduced = reduce_members(members, np.empty(0, dtype=np.int64) if y is None else y)
    return Prediction(**reduced, **extra, members=members if keeps else None)


def _members(title: str, array: NDArray[Any]) -> NDArray[Any]:
    """Return (M, N, C) float32 or float64, finite."""
    if array.ndim not in (2, 3) or not array.size or array.dtype.kind not in "fiu":
        hint = "; of two classes, give both: numpy.stack([1 - p, p], axis=1)" if array.ndim == 1 else ""
        raise ShapeError(
            f"{title} must be numbers (M, N, C), or (N, C) of one member, none empty, found {array.dtype} "
            f"{array.shape}{hint}"
        )
    members = array if array.ndim == 3 else array[None]
    members = np.asarray(members, dtype=np.float32 if members.dtype in (np.float16, np.float32) else np.float64)
    finite = np.isfinite(members).all(axis=2)
    if not finite.all():
        member, image = np.argwhere(~finite)[0]
        raise ShapeError(f"{title}: member {member} has NaN or infinity for image {image}")
    return members


def _softmax(title: str, logits: NDArray[Any]) -> NDArray[Any]:
    """Turn logits into probabilities, as a classifier's are; refuse probabilities under the name of logits."""
    import torch

    sums = logits.sum(axis=2, dtype=np.float64)
    if logits.shape[2] > 1 and (logits >= 0).all() and (np.abs(sums - 1.0) <= SUM_TOLERANCE).all():
        raise ShapeError(f"{title}: every row is a distribution already: name the array {title[:-6]}probabilities")
    return np.asarray(torch.from_numpy(np.ascontiguousarray(logits)).softmax(dim=2).numpy())


def _distributions(title: str, members: NDArray[Any]) -> NDArray[Any]:
    """Refuse what is no distribution, and normalise the rows as :class:`.classification.Answers` does."""
    sums = members.sum(axis=2, dtype=np.float64)
    bad = np.argwhere(~((np.abs(sums - 1.0) <= SUM_TOLERANCE) & (members >= 0.0).all(axis=2)))
    if len(bad):
        member, image = bad[0]
        raise ShapeError(
            f"{title}: the row of member {member} for image {image} is no distribution: its smallest entry is "
            f"{members[member, image].min():g} and it sums to {sums[member, image]:g}; give probabilities that sum to "
            f"1, or name the array {title.removesuffix('probabilities')}logits"
        )
    rounded = np.abs(sums - 1.0) > SUM_ROUNDING
    if not rounded.any():
        return members
    return np.where(rounded[..., None], members / sums[..., None], members).astype(members.dtype)


def _labels(prefix: str, labels: NDArray[Any], title: str, members: NDArray[Any]) -> Labels:
    _, N, C = members.shape
    y = np.asarray(labels)
    if y.shape != (N,) or y.dtype.kind not in "iu":
        raise ShapeError(
            f"{title} is of {N:,} images, (M, N, C) = {members.shape}, but the labels, which must be one integer an "
            f"image, are {y.dtype} {y.shape}"
        )
    outside = np.flatnonzero((y < 0) | (y >= C))
    if len(outside):
        first = outside[0]
        raise ShapeError(
            f"{prefix}labels: image {first} has the class {y[first]}, but {title} has the classes 0 to {C - 1}; count "
            "them from 0"
        )
    return y.astype(np.int64)


def _texts(arrays: Mapping[str, ArrayLike], name: str, count: int | None) -> tuple[str, ...] | None:
    if name not in arrays:
        return None
    found = np.atleast_1d(_array(name, arrays[name]))
    if found.dtype.kind != "U" or found.shape != (count or 1,):
        raise ShapeError(f"{name} must be text, {count or 1} of it, found {found.dtype} {found.shape}")
    if len(set(found.tolist())) < len(found):
        raise ShapeError(f"{name} must all differ: give each class a name of its own")
    return tuple(found.tolist())
