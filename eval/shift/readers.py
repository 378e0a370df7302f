"""The values of ``--shift`` and their readers: official files where they exist, else corruptions generated here.

A reader is one file of this package, with a function that returns a :class:`~ensembler.eval.shift.test_set.Shift`.
Generated images are never presented as official ones: the authors used no seed, so nobody can make the same files
again, and figures on generated images are not comparable with published ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from ensembler.datasets import Dataset, default_root
from ensembler.errors import UsageError
from ensembler.eval.shift.cifar_c import LABELS, official_shift
from ensembler.eval.shift.generated import generated_shift, read_record
from ensembler.eval.shift.test_set import Shift

__all__ = ["SHIFTS", "load_shift"]

SHIFTS = ("cifar10c", "cifar100c", "corruptions")
_OFFICIAL = {"cifar10c": ("cifar10", "CIFAR-10-C"), "cifar100c": ("cifar100", "CIFAR-100-C")}  # dataset, folder


def load_shift(name: str, dataset: Dataset, indices: Tensor, root: Path | None = None, seed: int = 0) -> Shift:
    """Load a shift of a dataset's test images.

    Args:
        name: one of :data:`SHIFTS`. ``"cifar10c"`` and ``"cifar100c"`` are the official files for the datasets
            ``"cifar10"`` and ``"cifar100"`` where they exist, else generated, as for any other dataset;
            ``"corruptions"`` is always generated.
        dataset: whose test images.
        indices: (N,) the test images to use.
        root: the folder of ``CIFAR-10-C/``, or that folder itself; by default the folder of datasets. Files that
            ``ensembler data corrupt`` generated from the same images with the same seed are read.
        seed: of generated corruptions.

    Raises:
        UsageError: an unknown shift.
        DataError: the files exist, but are damaged or of other images.
    """
    if name not in SHIFTS:
        raise UsageError(f"unknown shift {name!r}: use {', '.join(SHIFTS)}")
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
