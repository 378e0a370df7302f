"""What a user should know of a folder of images, or of data of their own, before training, in lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from ensembler.data.folders import Layout, describe
from ensembler.data.images import FileSplit, Images, Split
from ensembler.data.splits import repeated, repeated_files
from ensembler.text import some

__all__ = ["Notes", "describe_folder", "describe_splits"]

_DARK = 64  # of 255: where no training image has a brighter pixel, something is wrong with their scale
_SHOWN = 5  # names of classes in a note


class Notes(Sequence[str]):
    """Lines that are found at their first use, as they take comparing all images."""

    def __init__(self, find: Callable[[], Iterator[str]]) -> None:
        self._find = find

    @cached_property
    def _lines(self) -> tuple[str, ...]:
        return tuple(self._find())

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: Any) -> Any:
        return self._lines[index]

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (self._lines,)


def describe_folder(
    layout: Layout,
    files: Mapping[str, FileSplit],
    parts: Mapping[str, Images],
    skipped: Sequence[str],
    brightest: Callable[[], int],
) -> Iterator[str]:
    """Yield what a user should know of a folder before training, each in one line.

    Args:
        layout: the folder's.
        files: those of each split.
        parts: the splits.
        skipped: files that cannot be read.
        brightest: returns the greatest byte value of the training images.
    """
    held = {role: split for role, split in files.items() if role != "train"}
    counts = ", ".join(f"{len(split):,} {_USES[role]}{_source(layout, role)}" for role, split in files.items())
    total = sum(map(len, files.values()))
    line = f"{layout.folder}: {total:,} images of {len(layout.classes)} classes, {counts}"
    yield line + (f"; left out: {describe(layout.left_out)}" if layout.left_out else "")
    if skipped:
        yield f"{len(skipped)} images cannot be read and are left out: {', '.join(skipped)}"
    if inside := _same_inside(layout):
        yield (
            f"all classes hold folders of the same names ({some(inside, _SHOWN)}): if those are the classes, name a "
            f"folder of them, such as {layout.folder / layout.classes[0]}"
        )
    yield from _missing(layout.classes, held)
    for role, split in held.items():
        if pairs := _repeats(split, parts[role], files["train"], parts["train"]):
            yield (
                f"{len(pairs):,} of {len(split):,} {role} images are training images, too (such as {pairs[0][0]}, "
                f"which is {pairs[0][1]}): scores on them are too good"
            )
    if (most := brightest()) < _DARK:
        yield _dark(most, "the files hold fewer bits than their format")


def describe_splits(
    title: str, classes: Sequence[str], parts: Mapping[str, Any], given: Sequence[str], notes: Sequence[str]
) -> Iterator[str]:
    """Yield what a user should know of data of their own before training, each in one line.

    Args:
        title: of the data.
        classes: the names.
        parts: the splits, in memory.
        given: the names of those that the user gave; the others were held out of the training examples.
        notes: what else there is to say.
    """
    held = {"validation": " (held out of train)", "test": " (a fifth of train, as there is no test)"}
    counts = ", ".join(
        f"{len(split):,} {_USES[role]}{'' if role in given else held[role]}" for role, split in parts.items()
    )
    is_images = isinstance(parts["train"], Split)
    total, what = sum(map(len, parts.values())), "images" if is_images else "rows"
    yield f"{title}: {total:,} {what} of {len(classes)} classes, {counts}"
    yield from notes
    yield from _missing(classes, parts)
    for role, split in parts.items():
        if role != "train" and (pairs := repeated(split.data.numpy(), parts["train"].data.numpy())):
            yield (
                f"{len(pairs):,} of {len(split):,} {role} {what} are training {what}, too (such as number "
                f"{pairs[0][0]}, which is {pairs[0][1]}): scores on them are too good"
            )
    if is_images and (most := int(parts["train"].images.max())) < _DARK:
        yield _dark(most, "they were divided by 255 twice, or hold fewer bits")


def _same_inside(layout: Layout) -> list[str]:
    """Return the names of the folders in every class, where all hold the same ones, two or more, and nothing else."""
    inside: dict[int, set[str]] = {}
    for file, label in zip(layout.train.files, layout.train.labels, strict=True):
        below = file.removeprefix(f"{layout.train.name}/").split("/")
        inside.setdefault(label, set()).add(below[1] if len(below) > 2 else "")
    first, *others = inside.values()
    alike = len(first) > 1 and "" not in first and all(other == first for other in others)
    return sorted(first) if alike else []


def _missing(classes: Sequence[str], parts: Mapping[str, Any]) -> Iterator[str]:
    """Say which classes have no image in some of the splits."""
    present = {role: set(split.labels.tolist()) for role, split in parts.items()}
    missing = {role: [name for label, name in enumerate(classes) if label not in one] for role, one in present.items()}
    said = [f"{len(names)} in the {role} images ({some(names, _SHOWN)})" for role, names in missing.items() if names]
    if said:
        yield f"classes without an image: {', '.join(said)}"


def _dark(most: int, why: str) -> str:
    return f"no training image has a pixel brighter than {most} of 255: if {why}, scale them to the whole range"


def _repeats(files: FileSplit, part: Images, train_files: FileSplit, train: Images) -> list[tuple[str, str]]:
    """Return the images that are also training images: the names of both."""
    if isinstance(part, Split) and isinstance(train, Split):
        pairs = repeated(part.images.numpy(), train.images.numpy())
        return [(files.files[one], train_files.files[other]) for one, other in pairs]
    found = repeated_files(files.paths, train_files.paths)
    return [(str(one.relative_to(files.folder)), str(other.relative_to(files.folder))) for one, other in found]


_USES = {"train": "to train on", "validation": "for validation", "test": "for testing"}


def _source(layout: Layout, role: str) -> str:
    """Return where a split of a folder with splits comes from, in brackets."""
    own = layout.parts.get(role)
    if not layout.train.name:
        return ""
    if own is not None:
        return f" ({own.name}/)"
    if role == "validation":
        return f" (held out of {layout.train.name}/)"
    return f" (a fifth of {layout.train.name}/, as there is no test/)"
