"""The values of ``--shift`` and their readers, found by what lies in a folder.

A reader is one file of this package whose function makes :class:`~ensembler.eval.shift.test_set.TestSet` records.
Generated images are never presented as official ones: the authors used no seed, so nobody can make the same files
again, and figures on generated images are not comparable with published ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ensembler.data.datasets import Dataset, default_root
from ensembler.data.images import Split, resized
from ensembler.errors import DataError, UsageError
from ensembler.eval.shift.cifar_c import LABELS, official_shift
from ensembler.eval.shift.cifar_new import read_cifar101, read_cifar102
from ensembler.eval.shift.classes import Matched
from ensembler.eval.shift.corruptions import AVAILABLE
from ensembler.eval.shift.folder import read_folder
from ensembler.eval.shift.generated import generated_shift, read_record
from ensembler.eval.shift.hub import PREFIX, read_hub
from ensembler.eval.shift.test_set import Shift, Source, TestSet, check_images
from ensembler.seeds import generator

__all__ = ["SHIFTS", "load_shift", "load_shifts"]

SHIFTS = ("cifar10c", "cifar100c", "corruptions")
_OFFICIAL = {"cifar10c": ("cifar10", "CIFAR-10-C"), "cifar100c": ("cifar100", "CIFAR-100-C")}  # dataset, folder
_BY_DATASET = {dataset: name for name, (dataset, _) in _OFFICIAL.items()}


def load_shifts(
    names: Sequence[str], dataset: Dataset, indices: Tensor, root: Path | None = None, seed: int = 0
) -> list[Shift]:
    """Load several test sets, of which one may have corruptions; see :func:`load_shift`.

    Raises:
        UsageError: two have corruptions, or two test sets have the same name.
    """
    if names:
        check_images(dataset, "--shift")
    listed = [name for name in names if _corruptions(name)]
    chosen = list(dict.fromkeys(name for name in names if name not in listed)) + [",".join(listed)] * bool(listed)
    found = [load_shift(name, dataset, indices, root, seed) for name in chosen]
    corrupted = [one.name for one in found if one.corruptions]
    if len(corrupted) > 1:
        raise UsageError(f"--shift {' and '.join(corrupted)} each have corruptions: evaluate one of them at a time")
    titles = Counter(one.name for shift in found for one in shift.others)
    if twice := [title for title, count in titles.items() if count > 1]:
        raise UsageError(f"--shift names two test sets that are called {twice[0]}: evaluate one of them at a time")
    return found


def load_shift(name: str, dataset: Dataset, indices: Tensor, root: str | Path | None = None, seed: int = 0) -> Shift:
    """Load shifted versions of a dataset's test images, or other test sets of its classes.

    Args:
        name: one of :data:`SHIFTS`; corruptions, separated by commas; the path of a folder, or its name in ``root``; or
            ``hf:NAME``. ``"cifar10c"`` and ``"cifar100c"`` are the official files for the datasets ``"cifar10"`` and
            ``"cifar100"`` where they exist, else generated, as for any other dataset; ``"corruptions"`` is always
            generated. Named corruptions are those of ``"cifar10c"`` and ``"cifar100c"`` for these datasets, else
            generated.
        dataset: whose test images and classes.
        indices: (N,) the test images to use; of other test sets, as many are drawn with the seed, where there are more.
        root: the folder of ``CIFAR-10-C/``, or that folder itself; by default the folder of datasets. Files that
            ``ensembler data corrupt`` generated from the same images with the same seed are read.
        seed: of generated corruptions, and of the choice of images.

    Raises:
        UsageError: an unknown shift, or an unknown corruption.
        DataError: the files exist, but are damaged or of other images or classes.
    """
    root = None if root is None else Path(root)
    if name.startswith(PREFIX):
        return _other(
            name,
            [(name, *read_hub(name, dataset.classes, dataset.test.shape, _chooser(indices, dataset, seed)))],
            "hub",
        )
    if corruptions := _corruptions(name):
        return _part(_protocol(_BY_DATASET.get(dataset.name, "corruptions"), dataset, indices, root, seed), corruptions)
    if name not in SHIFTS:
        return _found(name, _place(name, root or default_root()), dataset, indices, seed)
    return _protocol(name, dataset, indices, root, seed)


def _corruptions(name: str) -> list[str]:
    """Return the corruptions that a value of ``--shift`` lists, in the protocol's order; none where it is no list.

    Raises:
        UsageError: a list with an unknown corruption.
    """
    parts = [part.strip() for part in name.split(",")]
    other = len(parts) == 1 or name.startswith(PREFIX) or Path(name).expanduser().exists()
    if not set(parts) & set(AVAILABLE) and other:
        return []
    if unknown := [part for part in parts if part not in AVAILABLE]:
        raise UsageError(
            f"--shift {name} lists {' and '.join(repr(part) for part in unknown)}, which "
            f"{'is no corruption' if len(unknown) == 1 else 'are no corruptions'}: choose among "
            f"{', '.join(AVAILABLE)}; other test sets take a --shift each"
        )
    return [one for one in AVAILABLE if one in parts]


def _part(shift: Shift, corruptions: Sequence[str]) -> Shift:
    """Return some corruptions of a shift.

    Raises:
        DataError: official files lack one.
    """
    if lacking := [one for one in corruptions if one not in shift.corruptions]:
        raise DataError(f"the files of {shift.name} lack {', '.join(lacking)}: fetch them, or leave these out")
    sets = tuple(one for one in shift.sets if isinstance(one, TestSet) and one.name in corruptions)
    note = f"{shift.note} Chosen of them: {', '.join(corruptions)}."
    return replace(shift, name=",".join(corruptions), note=note, sets=sets)


def _protocol(name: str, dataset: Dataset, indices: Tensor, root: Path | None, seed: int) -> Shift:
    """Load all corruptions: official files, files that were generated here, or none."""
    official_for, title = _OFFICIAL.get(name, ("", ""))
    for folder, may_be_official in _folders(title, dataset.name == official_for, root or default_root()):
        record = read_record(folder)
        if record is not None and (record.test_sha256, record.seed) == (dataset.test.sha256, seed):
            return generated_shift(name, dataset.test, indices, seed, folder)
        if record is None and may_be_official and (folder / LABELS).is_file():
            return official_shift(name, title, dataset.test, indices, folder)
    return generated_shift(name, dataset.test, indices, seed)


def _folders(title: str, official: bool, root: Path) -> Iterator[tuple[Path, bool]]:
    """Yield folders that may have files, and whether these can be the official ones of this dataset."""
    if official:
        yield root / title, True
    yield root, official


def _place(name: str, root: Path) -> Path:
    """Return the folder of a path, or of a name in the folder of datasets, in any case of letters."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if root.is_dir() and path.name == name:
        for found in sorted(root.iterdir()):
            if found.name.lower() == name.lower() and found.is_dir():
                return found.resolve()
    raise UsageError(
        f"--shift {name} is none of {', '.join(SHIFTS)}, no folder here, and no folder in {root}: name one of these, "
        f"corruptions such as fog,snow (of {', '.join(AVAILABLE)}), a path, or hf:NAME"
    )


def _found(name: str, folder: Path, dataset: Dataset, indices: Tensor, seed: int) -> Shift:
    """Read a folder by what lies in it."""
    if (folder / LABELS).is_file():
        return _corrupted(name, folder, dataset, indices)
    arrays = [one for one in AVAILABLE if (folder / f"{one}.npy").is_file()]
    if arrays:
        raise DataError(f"{folder} has {arrays[0]}.npy but no {LABELS}: fetch or generate it again")
    for read in (read_cifar101, read_cifar102):
        if (new := read(folder, dataset.classes)) is not None:
            parts, matched = new
            choose, shape = _chooser(indices, dataset, seed), dataset.test.shape
            chosen = {title: part[choose(len(part))] for title, part in parts.items()}
            fitted = {title: Split(resized(part.images, shape), part.labels) for title, part in chosen.items()}
            return _other(name, [(title, part, matched) for title, part in fitted.items()], "folder")
    sets, matched = read_folder(folder, dataset.classes, dataset.test.shape, _chooser(indices, dataset, seed))
    shift = Shift(name, "folder", "", sets)
    count = len(shift.corruptions)
    about = [f"Shift: images of {folder.name}, {count} corruptions at 5 severities."] if count else []
    return Shift(name, "folder", " ".join(filter(None, [*about, matched.note])), sets)


def _corrupted(name: str, folder: Path, dataset: Dataset, indices: Tensor) -> Shift:
    """Read a folder in CIFAR-10-C's layout."""
    record = read_record(folder)
    if record is None:
        official = (dataset.name, folder.name) in _OFFICIAL.values()
        source: Literal["official", "folder"] = "official" if official else "folder"
        return official_shift(name, folder.name, dataset.test, indices, folder, source)
    if record.test_sha256 != dataset.test.sha256:
        raise DataError(
            f"{folder} was generated from other images ({record.title}) than {dataset.title}: generate it again"
        )
    return generated_shift(name, dataset.test, indices, record.seed, folder)


def _other(name: str, parts: Sequence[tuple[str, Split, Matched]], source: Source) -> Shift:
    sets = tuple(
        TestSet(title, title, images, "other", source=source, classes=matched.outputs)
        for title, images, matched in parts
    )
    return Shift(name, "folder", parts[0][2].note, sets)


def _chooser(indices: Tensor, dataset: Dataset, seed: int) -> Callable[[int], Tensor]:
    """Return a function that chooses images: all, or as many as are chosen of the test images."""

    def choose(available: int) -> Tensor:
        if len(indices) == len(dataset.test) or len(indices) >= available:
            return torch.arange(available)
        return torch.randperm(available, generator=generator(seed, "examples"))[: len(indices)].sort().values

    return choose
