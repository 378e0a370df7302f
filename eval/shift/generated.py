"""Generated corruptions: made when needed, or read from a folder that ``ensembler data corrupt`` wrote.

Such a folder has a ``generated.json``, so that nobody takes it for the official files.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from ensembler.errors import DataError
from ensembler.eval.shift.corruptions import AVAILABLE, SEVERITIES, Constants, constants_for, corrupt, fingerprint
from ensembler.eval.shift.layout import Rows, StoredFolder
from ensembler.eval.shift.test_set import Shift, Shifted, TestSet
from ensembler.images import Images
from ensembler.record import Record

__all__ = [
    "RECORD",
    "Corrupted",
    "GeneratedRecord",
    "check_generated",
    "generated_folder",
    "generated_shift",
    "read_record",
]

RECORD = "generated.json"

_REMEDY = "remove the folder, and make it again with ensembler data corrupt"


@dataclass(frozen=True, eq=False)
class Corrupted(Shifted):
    """Images that are corrupted when needed, with a seed."""

    seed: int

    def images(self, part: slice) -> Tensor:
        """Return some of the images, (B, H, W, 3) uint8."""
        clean = self.clean[part].images
        return corrupt(clean, self.corruption, self.severity, indices=self.indices[part], seed=self.seed)

    @cached_property
    def sha256(self) -> str:
        """Hash of the clean images and of the effect of the corruption on a fixed batch; no image is made for it."""
        made = fingerprint(self.corruption, self.severity, self.seed, self.shape)
        what = (self.corruption, self.severity, self.seed, made, self.clean.sha256, self.indices.tolist())
        return hashlib.sha256(repr(what).encode()).hexdigest()


def generated_shift(name: str, test: Images, indices: Tensor, seed: int = 0, path: Path | None = None) -> Shift:
    """Return every corruption at every severity of some of the test images.

    Args:
        name: as the user gave it.
        test: all test images.
        indices: (N,) those to use.
        seed: of the corruptions.
        path: a folder written with the same images and seed, from which existing files are read.

    Raises:
        DataError: a file of the folder is not what this version generates.
    """
    stored = () if path is None else check_generated(folder := generated_folder(path, test), seed)
    clean = test.part(indices)
    sets = []
    for corruption in AVAILABLE:
        for severity in SEVERITIES:
            made = Corrupted(clean, indices, corruption, severity, seed)
            examples = Rows(clean, indices, corruption, severity, folder, made) if corruption in stored else made
            title = f"{corruption} {severity}"
            sets.append(TestSet(corruption, title, examples, "shift", severity, "generated"))
    constants = {"cifar": "CIFAR-10-C's 32 x 32 constants", "imagenet": "ImageNet-C's constants"}
    note = (
        f"Shift: generated with {constants[constants_for(test.shape)]}, seed {seed}, {len(AVAILABLE)} corruptions at "
        "5 severities; not the official files, so not comparable with published figures."
    )
    return Shift(name, "generated", note, tuple(sets))


def generated_folder(path: Path, test: Images) -> StoredFolder:
    """Return the folder at ``path`` for generated corruptions of these test images."""
    return StoredFolder(path, test, _REMEDY)


class GeneratedRecord(Record):
    """The schema of ``generated.json``.

    Attributes:
        note: for readers of the file.
        dataset, title: the dataset's name, and its title in reports.
        test_sha256: of its test images and labels.
        image_shape: (H, W, 3).
        constants: see :func:`ensembler.eval.shift.corruptions.constants_for`.
        versions: of the packages that generated it.
    """

    format: int = 1
    note: str
    dataset: str
    title: str
    test_examples: int
    test_sha256: str
    image_shape: tuple[int, int, int]
    seed: int
    constants: Constants
    versions: dict[str, str]


def read_record(path: Path) -> GeneratedRecord | None:
    """Read the ``generated.json`` of a folder; ``None`` if there is none.

    Raises:
        DataError: it cannot be read.
    """
    file = path / RECORD
    try:
        return GeneratedRecord.model_validate_json(file.read_bytes()) if file.is_file() else None
    except (OSError, ValidationError) as error:
        raise DataError(f"cannot read {file}, which describes the images: {_REMEDY}") from error


def check_generated(folder: StoredFolder, seed: int) -> tuple[str, ...]:
    """Check on a few images of each file that a folder has what this version generates.

    Returns:
        The corruptions that it has.

    Raises:
        DataError: a file differs.
    """
    folder.check_labels()
    sample = np.unique(np.linspace(0, len(folder.test) - 1, 3).astype(int))
    clean = folder.test[torch.from_numpy(sample)].images
    for name in folder.corruptions:
        for severity in SEVERITIES:
            made = corrupt(clean, name, severity, indices=sample.tolist(), seed=seed).numpy()
            if not np.array_equal(made, folder.some(name, severity, sample)):
                raise DataError(
                    f"{folder.file(name)} is not what this version of ensembler generates at severity "
                    f"{severity}: {folder.remedy}"
                )
    return folder.corruptions
