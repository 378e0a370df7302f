"""Folders of images, of any depth: every folder of class folders is a test set, named by its path.

So ImageNet-C (``corruption/severity/wnid/``, with or without ``blur/``, ``noise/``, ...), ImageNet-R, -A, -V2 and
-Sketch (``wnid/`` or ``0/`` to ``999/``), CINIC-10 (``test/class/``) and one's own are read.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Literal

import torch
from torch import Tensor

from ensembler.data.folders import find_images
from ensembler.data.images import FileSplit
from ensembler.errors import DataError
from ensembler.eval.shift.classes import Matched, match
from ensembler.eval.shift.corruptions import AVAILABLE, SEVERITIES
from ensembler.eval.shift.test_set import TestSet

__all__ = ["read_folder"]

_TRAIN, _TEST = ("train", "training"), ("test", "testing")

_Files = list[tuple[str, Path]]
"""Class and file of each image, in order."""


def read_folder(
    folder: Path, ours: Sequence[str], shape: tuple[int, int], choose: Callable[[int], Tensor]
) -> tuple[tuple[TestSet, ...], Matched]:
    """Find the test sets of a folder.

    Where it has ``train/`` and ``test/``, those in ``test/`` are read. Files that are no images are left out.

    Args:
        folder: the folder.
        ours: the run's classes.
        shape: (H, W) to which images are resized.
        choose: the indices to use of a number of images.

    Returns:
        The test sets, and the classes. ``CORRUPTION/1`` to ``CORRUPTION/5`` are of the group ``"shift"``.

    Raises:
        DataError: there is no image, one lies in no folder of a class, a class is empty or unknown, or the severities
            of a corruption are not of the same images.
    """
    root = _part(folder)
    images, _ = find_images(root)
    if not images:
        raise DataError(f"{root} holds no image: name a folder of test images, each in a folder of its class")
    sets: dict[PurePath, _Files] = defaultdict(list)
    for path in images:
        if path.parent == root:
            raise DataError(f"{path} lies in no folder of a class: put every image into a folder named by its class")
        sets[path.parent.parent.relative_to(root)].append((path.parent.name, path))
    _check_depth(root, sets)
    classes = sorted({name for files in sets.values() for name, _ in files})
    matched = match(classes, ours, str(root))
    for place, files in sets.items():
        _check_full(root / place, {name for name, _ in files}, ours)
    known = {place: [one for one in files if one[0] in matched.labels] for place, files in sets.items()}
    cells = _cells(root, {place: files for place, files in known.items() if files})
    found = []
    for place, files in known.items():
        if files:
            labels = torch.tensor([matched.labels[name] for name, _ in files])
            names = tuple(path.relative_to(folder).as_posix() for _, path in files)
            examples = FileSplit(folder, names, labels, shape).part(choose(len(files)))
            name, severity = cells.get(place, (place.as_posix() if len(known) > 1 else folder.name, None))
            title = name if severity is None else f"{name} {severity}"
            group: Literal["other", "shift"] = "other" if severity is None else "shift"
            found.append(TestSet(name, title, examples, group, severity, "folder", classes=matched.outputs))
    return tuple(found), matched


def _part(folder: Path) -> Path:
    """Return the folder's test split, or the folder where it is not split."""
    try:
        inside = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}") from error
    test = next((inside[name] for name in _TEST if name in inside), None)
    return test if test is not None and any(name in inside for name in _TRAIN) else folder


def _check_depth(root: Path, sets: dict[PurePath, _Files]) -> None:
    """Check that no folder of images holds further folders of images.

    Raises:
        DataError: one does.
    """
    for place, files in sets.items():
        for folder in {path.parent for _, path in files}:
            if (inner := folder.relative_to(root)) in sets:
                below = sets[inner][0][1].parent
                raise DataError(
                    f"{root / place / folder.name} holds images and the folder {below.name}/ of images, so that the "
                    "classes cannot be told: put the images of a class into its folder itself"
                )


def _check_full(folder: Path, full: set[str], ours: Sequence[str]) -> None:
    """Check that no class of a test set is a folder without images.

    Raises:
        DataError: one is.
    """
    empty = sorted(path.name for path in folder.iterdir() if path.name in {*ours} - full and path.is_dir())
    if empty:
        raise DataError(f"{folder / empty[0]} holds no image: unpack the test set again, or remove the folder")


def _cells(root: Path, sets: dict[PurePath, _Files]) -> dict[PurePath, tuple[str, int]]:
    """Return the corruption and severity of the test sets that are ``CORRUPTION/1`` to ``CORRUPTION/5``.

    Raises:
        DataError: a severity is missing, a corruption is there twice, or not all are of the same images.
    """
    levels: dict[PurePath, set[str]] = defaultdict(set)
    for place in sets:
        levels[place.parent].add(place.name)
    every = {str(severity) for severity in SEVERITIES}
    found: dict[PurePath, tuple[str, int]] = {}
    for parent, names in levels.items():
        if parent.name in AVAILABLE and (missing := sorted(every - names)):
            raise DataError(f"{root / parent} has no severity {', '.join(missing)}: unpack it again")
        if parent.name and names == every:
            found |= {parent / name: (parent.name, int(name)) for name in sorted(names)}
    twice = [cell for cell, count in Counter(found.values()).items() if count > 1]
    if twice:
        places = [str(root / place) for place, cell in found.items() if cell == twice[0]]
        raise DataError(f"{' and '.join(places)} are the same corruption: remove one, or name one of the folders")
    for place in found:
        first = next(iter(found))
        if _images(sets[place]) != _images(sets[first]):
            raise DataError(
                f"{root / place} holds {len(sets[place]):,} images and {root / first} {len(sets[first]):,}, not the "
                "same ones: unpack it again"
            )
    return found


def _images(files: _Files) -> list[tuple[str, str]]:
    return [(name, path.stem) for name, path in files]
