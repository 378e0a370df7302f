"""The classes of a test set matched with those of a run, by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from ensembler.errors import DataError

__all__ = ["CIFAR10", "Matched", "match"]

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""CIFAR-10's classes, in label order."""

_SHOWN = 10  # names of a list


@dataclass(frozen=True)
class Matched:
    """The classes that a test set and a run both have.

    Attributes:
        outputs: the run's outputs that are scored, ascending; ``None`` for all.
        labels: of each class of the test set that the run has, its place among these outputs.
        left_out: the test set's other classes.
        of: the number of the run's classes.
    """

    outputs: tuple[int, ...] | None
    labels: dict[str, int]
    left_out: tuple[str, ...]
    of: int

    @property
    def note(self) -> str:
        """Sentences on what is not scored; empty where everything is."""
        found = []
        if self.outputs is not None:
            found.append(
                f"Scored among the {len(self.outputs)} of the runs' {self.of} classes that it has: the logits of the "
                "others are left out before the softmax."
            )
        if self.left_out:
            found.append(f"Images of {len(self.left_out)} classes that the runs do not know are left out.")
        return " ".join(found)


def match(theirs: Sequence[str], ours: Sequence[str], where: str) -> Matched:
    """Match a test set's classes with a run's.

    Names are equal whatever the case of letters, and with spaces, hyphens or underscores. ImageNet's classes match by
    their WordNet ids, by torchvision's names of them, or, where there are folders 0 to 999, by number. Only of ImageNet
    may a test set have classes that the run does not know.

    Args:
        theirs: the test set's classes.
        ours: the run's, in label order.
        where: the test set, for messages.

    Raises:
        DataError: a class of the test set is not the run's, two are the same one, or fewer than two are shared.
    """
    found = _by_name(theirs, ours)
    if None in found:
        their_numbers, our_numbers = _imagenet(theirs), _imagenet(ours)
        if None not in (*their_numbers, *our_numbers):
            places = {number: place for place, number in enumerate(our_numbers)}
            found = [places.get(number) for number in their_numbers]
        else:
            unknown = [name for name, place in zip(theirs, found, strict=True) if place is None]
            raise DataError(
                f"{where} has classes that the run does not know ({_some(unknown)}): it has {_some(theirs)}, and the "
                f"run has {_some(ours)}; give its classes the run's names, or take other ones away"
            )
    known = {name: place for name, place in zip(theirs, found, strict=True) if place is not None}
    twice = [name for name, place in known.items() if Counter(known.values())[place] > 1]
    if twice:
        raise DataError(f"{where} has several names of one class of the run: {_some(twice)}; join or rename them")
    if len(known) < 2:
        raise DataError(
            f"{where} shares {len(known)} of its classes with the run, and there is nothing to tell apart: it has "
            f"{_some(theirs)}, and the run has {_some(ours)}"
        )
    outputs = tuple(sorted(known.values()))
    labels = {name: outputs.index(place) for name, place in known.items()}
    left_out = tuple(name for name in theirs if name not in known)
    return Matched(None if len(outputs) == len(ours) else outputs, labels, left_out, len(ours))


def _by_name(theirs: Sequence[str], ours: Sequence[str]) -> list[int | None]:
    """Return the place of each name among ours: of the same name, else of the only one that reads alike."""
    places = {name: place for place, name in enumerate(ours)}
    reads = Counter(_plain(name) for name in ours)
    alike = {_plain(name): place for place, name in enumerate(ours) if reads[_plain(name)] == 1}
    return [places.get(name, alike.get(_plain(name))) for name in theirs]


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _imagenet(names: Sequence[str]) -> list[int | None]:
    """Return the number of each class among ImageNet's thousand; ``None`` where it is not one."""
    wnids = _wnids()
    if set(names) == {str(number) for number in range(len(wnids))}:
        return [int(name) for name in names]
    numbers = {wnid: number for number, wnid in enumerate(wnids)}
    if all(name in numbers for name in names):
        return [numbers[name] for name in names]
    titles = _titles()
    return list(range(len(titles))) if tuple(names) == titles else _by_name(names, titles)


@cache
def _wnids() -> tuple[str, ...]:
    """Return ImageNet's WordNet ids, in label order."""
    return tuple((resources.files(__package__) / "imagenet_wnids.txt").read_text().split())


@cache
def _titles() -> tuple[str, ...]:
    from torchvision.models import ResNet18_Weights

    return tuple(ResNet18_Weights.DEFAULT.meta["categories"])


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
