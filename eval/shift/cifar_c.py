"""A folder of corrupted test sets in the layout of CIFAR-10-C: one ``NAME.npy`` a corruption, and ``labels.npy``.

Of ``n`` test images a file holds ``5 n`` rows, uint8 ``(5 n, H, W, 3)``: rows ``[(s - 1) n : s n]`` are severity s, in
the test set's order. A folder made here says so in ``generated.json``; without one it is taken for the official files,
which are never read whole and never unpickled, but checked where a mistake would show.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, ValidationError

from ensembler.errors import DataError, UsageError
from ensembler.eval.shift.corruptions import HEADLINE, SEVERITIES, VALIDATION, Constants, corrupt
from ensembler.images import Images
from ensembler.record import Record

__all__ = [
    "LABELS",
    "RECORD",
    "Generated",
    "alone",
    "check_generated",
    "check_official",
    "constants_of",
    "expected_rows",
    "read_record",
    "read_rows",
    "stored",
]

RECORD = "generated.json"
LABELS = "labels.npy"

_SAMPLE = 100  # images that are looked at
_OWN = 0.5  # of them that must resemble their own clean image most: by chance it is one
_LARGE = 64  # pixels of the smaller side above which corruptions take ImageNet-C's constants
_FLAT = 2.0  # a standard deviation in levels below which an image has nothing to be told apart by
_FEWEST = 10  # images that can be told apart, below which nothing is concluded
# What changes images more with every severity, whatever was drawn; by so much of a step back, it is out of order.
_GROWING = {
    *("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "defocus_blur", "gaussian_blur", "zoom_blur"),
    *("fog", "brightness", "contrast", "pixelate", "jpeg_compression"),
}
_STEP_BACK = 0.95


class Generated(Record):
    """What ``generated.json`` says of a folder made here.

    Attributes:
        note: for whoever opens it.
        dataset: the dataset's name, and ``title`` as a report calls it.
        test_sha256: of its test images and labels.
        image_shape: (H, W, 3).
        constants: which: see :func:`constants_of`.
        versions: of the packages that made it.
    """

    model_config = ConfigDict(frozen=True)

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


def read_record(folder: Path) -> Generated | None:
    """What a folder says of having been made here; ``None`` if it says nothing.

    Raises:
        DataError: it says it in words that cannot be read.
    """
    path = folder / RECORD
    try:
        return Generated.model_validate_json(path.read_bytes()) if path.is_file() else None
    except (OSError, ValidationError) as error:
        raise DataError(
            f"cannot read {path}, without which nobody knows what made the images: {_mend(True)}"
        ) from error


def stored(folder: Path) -> tuple[str, ...]:
    """The corruptions that a folder has a file of, in the protocol's order."""
    return tuple(name for name in HEADLINE + VALIDATION if (folder / f"{name}.npy").is_file())


def constants_of(shape: tuple[int, int]) -> Constants:
    """The constants that :func:`ensembler.eval.shift.corruptions.corrupt` takes by itself for images of (H, W)."""
    return "imagenet" if min(shape) > _LARGE else "cifar"


def expected_rows(test: Images) -> tuple[int, int, int, int]:
    """The shape of every file over these test images."""
    return (len(SEVERITIES) * len(test), *test.shape, 3)


def read_rows(path: Path, generated: bool = False) -> np.memmap[Any, Any]:
    """A ``.npy`` file, mapped into memory.

    Raises:
        DataError: it is no such file, holds Python objects, or is shorter or longer than its header says.
    """
    try:
        rows = np.lib.format.open_memmap(path, mode="r")  # refuses objects, and so every pickle
        longer = path.stat().st_size - rows.offset - rows.nbytes
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read {path}: {error}: {_mend(generated)}") from error
    if longer:
        raise DataError(f"{path} is {longer} bytes longer than its header says: {_mend(generated)}")
    return rows


def check_official(folder: Path, test: Images) -> None:
    """Find out whether the files of a folder belong to these test images, in their order.

    Of every file its shape; of about a hundred images, spread over the set, whether they resemble the clean images in
    their places more than they do the others, and, for corruptions of which that is sure, whether they are changed
    more with every severity. Genuine images are far from being refused: of CIFAR-10's test images under every
    corruption generated here, 86 % or more pass.

    Raises:
        DataError: a file is not what it should be; it is named.
    """
    _check_labels(folder, test, generated=False)
    sample = np.unique(np.linspace(0, len(test) - 1, _SAMPLE).astype(int))
    clean = test[torch.from_numpy(sample)].images.numpy()
    for name in stored(folder):
        path = folder / f"{name}.npy"
        begin = _check_rows(path, test, generated=False)
        before = 0.0
        for severity in SEVERITIES:
            corrupted = _read(path, begin, (severity - 1) * len(test) + sample, test)
            share, change = _own_share(clean, corrupted), _change(clean, corrupted)
            if share < _OWN:
                raise DataError(
                    f"{path} is not in the test set's order: of {len(sample)} images looked at, only {share:.0%} "
                    f"resemble their own clean image most at severity {severity}: {_mend(False)}"
                )
            if name in _GROWING and change < _STEP_BACK * before:
                raise DataError(
                    f"{path} does not hold severities 1 to 5 one after the other: severity {severity} changes the "
                    f"images by {change:.1f} levels, severity {severity - 1} by {before:.1f}: {_mend(False)}"
                )
            before = change


def check_generated(folder: Path, test: Images, seed: int) -> None:
    """Find out whether the files of a folder made here are what this version makes: some images are made again.

    Raises:
        DataError: a file is not; it is named.
    """
    _check_labels(folder, test, generated=True)
    sample = np.unique(np.linspace(0, len(test) - 1, 3).astype(int))
    clean = test[torch.from_numpy(sample)].images
    for name in stored(folder):
        path = folder / f"{name}.npy"
        begin = _check_rows(path, test, generated=True)
        for severity in SEVERITIES:
            made = corrupt(clean, name, severity, indices=torch.from_numpy(sample), seed=seed)
            if not np.array_equal(made.numpy(), _read(path, begin, (severity - 1) * len(test) + sample, test)):
                raise DataError(
                    f"{path} is not what this version of ensembler makes of these images at severity {severity}: "
                    f"{_mend(True)}"
                )


@contextmanager
def alone(lock: Path, what: Path) -> Iterator[None]:
    """Hold a lock while the block runs, which ends with the process however it ends.

    Raises:
        UsageError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with lock.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"another process is working on {what}: let it finish, or stop it") from error
        yield


def _mend(generated: bool) -> str:
    if generated:
        return "remove the folder, and make it again with ensembler data corrupt"
    return "remove the folder, and fetch it again with ensembler data download"


def _check_rows(path: Path, test: Images, generated: bool) -> int:
    """Where the rows of a file begin, which are of the right shape and type."""
    rows, expected = read_rows(path, generated), expected_rows(test)
    if rows.shape == expected and rows.dtype == np.uint8 and rows.flags.c_contiguous:
        return rows.offset
    mend = _mend(generated)
    if rows.ndim == 4 and rows.shape[1:3] != test.shape:
        mend = "use --shift corruptions, or the test images in their own size"
    raise DataError(f"{path} holds {rows.shape} of {rows.dtype}, not {expected} of uint8: {mend}")


def _read(path: Path, begin: int, positions: NDArray[np.int64], test: Images) -> NDArray[np.uint8]:
    """A few rows, far apart: through a memory map each would bring 128 KB with it."""
    rows = np.empty((len(positions), *test.shape, 3), dtype=np.uint8)
    with path.open("rb", buffering=0) as file:
        for row, position in zip(rows, positions.tolist(), strict=True):
            file.seek(begin + position * row.nbytes)
            file.readinto(row)  # type: ignore[arg-type]
    return rows


def _check_labels(folder: Path, test: Images, generated: bool) -> None:
    path = folder / LABELS
    labels, expected = read_rows(path, generated), np.tile(test.labels.numpy(), len(SEVERITIES))
    if labels.shape != expected.shape:
        raise DataError(f"{path} holds {labels.shape} labels, not {expected.shape}: {_mend(generated)}")
    wrong = np.flatnonzero(labels != expected)
    if len(wrong):
        raise DataError(
            f"{path} is not the test set's labels five times: row {wrong[0]} is {labels[wrong[0]]}, not "
            f"{expected[wrong[0]]}: {_mend(generated)}"
        )


def _own_share(clean: NDArray[np.uint8], corrupted: NDArray[np.uint8]) -> float:
    """Share of the images (N, H, W, 3) that correlate with their own clean image more than with any other one."""
    pixels = [images.reshape(len(images), -1).astype(np.float32) for images in (clean, corrupted)]
    distinct = pixels[0].std(1) >= _FLAT
    if distinct.sum() < _FEWEST:
        return 1.0
    a, b = ((part := rows[distinct] - rows[distinct].mean(1, keepdims=True)) / _norm(part) for rows in pixels)
    correlation = b @ a.T
    return float((correlation.diagonal() >= correlation.max(1) - 1e-6).mean())


def _norm(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    length: NDArray[np.float32] = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.maximum(length, 1e-6)


def _change(clean: NDArray[np.uint8], corrupted: NDArray[np.uint8]) -> float:
    """Mean absolute change, in levels."""
    return float(np.abs(corrupted.astype(np.int16) - clean).mean())
