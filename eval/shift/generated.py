"""Generated corruptions: made when needed, or read from a folder that ``ensembler data corrupt`` wrote.

Such a folder has a ``generated.json``, so that nobody takes it for the official files.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from ensembler.data.images import Images
from ensembler.errors import DataError
from ensembler.eval.shift.corruptions import AVAILABLE, SEVERITIES, Constants, constants_for, corrupt, fingerprint
from ensembler.eval.shift.layout import Rows, StoredFolder
from ensembler.eval.shift.test_set import Shift, Shifted, TestSet
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

_UPLOADED = 2**28  # bytes of clean images that stay on a GPU for all corruptions; more go there batch by batch

_TRIED = 64  # images on which a GPU is compared with the CPU before it makes all of them

_REMEDY = "remove the folder, and make it again with ensembler data corrupt"


@dataclass(frozen=True, eq=False)
class Corrupted(Shifted):
    """Images that are corrupted when needed, with a seed."""

    seed: int

    def images(self, part: slice, device: torch.device | None = None) -> Tensor:
        """Return some of the images, (B, H, W, 3) uint8.

        They are made on ``device`` if it gives the bytes that a CPU does, on the first of them; else on the CPU.
        """
        clean = self.clean
        if device is not None and device.type != "cpu" and self._made_alike(device):
            clean = _uploaded(clean, device) if _bytes(clean) <= _UPLOADED else clean
        else:
            device = None
        images = clean[part].images.to(device)
        return corrupt(images, self.corruption, self.severity, indices=self.indices[part], seed=self.seed)

    @cached_property
    def sha256(self) -> str:
        """Hash of the clean images and of the effect of the corruption on a fixed batch; no image is made for it."""
        what = (self.corruption, self.severity, self.seed, self._effect, self.clean.sha256, self.indices.tolist())
        return hashlib.sha256(repr(what).encode()).hexdigest()

    @cached_property
    def _effect(self) -> str:
        return fingerprint(self.corruption, self.severity, self.seed, self.shape)

    def _made_alike(self, device: torch.device) -> bool:
        """Whether the device makes the first images as a CPU does, to the byte."""
        part = slice(min(_TRIED, len(self.indices)))
        images, places = self.clean[part].images, self.indices[part]
        ours, theirs = (
            corrupt(images.to(where), self.corruption, self.severity, indices=places, seed=self.seed).cpu()
            for where in ("cpu", device)
        )
        return torch.equal(ours, theirs)


@lru_cache(maxsize=1)
def _uploaded(clean: Images, device: torch.device) -> Images:
    return clean.to(device)


def _bytes(clean: Images) -> int:
    return 3 * clean.shape[0] * clean.shape[1] * len(clean)


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
