"""Files of predictions made elsewhere: ``.npz`` of any number of arrays, ``.csv`` or ``.parquet`` of one member.

:mod:`ensembler.eval.given` says which arrays there are, and checks them. Files are untrusted: nothing is unpickled, and
sizes are checked before anything is unpacked.
"""

from __future__ import annotations

import csv
import math
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ensembler.errors import DataError, UsageError, first_line
from ensembler.eval.given import title_of
from ensembler.eval.predictions import Prediction
from ensembler.eval.shift.test_set import TestSet
from ensembler.storage.artefact import partial_file, writing_to

__all__ = ["SUFFIXES", "Writer", "is_predictions", "read", "write_set", "writing"]

SUFFIXES = (".npz", ".csv", ".parquet")

Arrays = dict[str, NDArray[Any]]

_LABELS = ("label", "labels")


def is_predictions(path: Path) -> bool:
    """Return whether a path is of a file of predictions, not of a run's folder.

    Raises:
        DataError: there is no such file.
        UsageError: a file of another kind.
    """
    if path.is_dir():
        return False
    if path.suffix.lower() in SUFFIXES:
        if not path.is_file():
            raise DataError(f"no file of predictions at {path}: check the path")
        return True
    if path.is_file():
        raise UsageError(f"{path} is neither a run's folder nor a file of predictions ({', '.join(SUFFIXES)})")
    return False


def read(path: Path) -> Arrays:
    """Read a file's arrays by name.

    Raises:
        DataError: the file is damaged, too large, or holds something else than arrays of numbers and text.
        UsageError: Parquet without a package that reads it.
    """
    readers = {".npz": _read_npz, ".csv": _read_csv, ".parquet": _read_parquet}
    try:
        return readers[path.suffix.lower()](path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


@contextmanager
def writing(path: Path) -> Iterator[Writer]:
    """Write a ``.npz`` file, array by array; if the block raises, no file is written, and one there is kept.

    Raises:
        ArtefactError: the file cannot be written.
    """
    with (
        writing_to(path),
        partial_file(path) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        yield Writer(archive)


class Writer:
    """An open ``.npz`` file."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive

    def add(self, name: str, array: NDArray[Any]) -> None:
        """Write one array, which may be mapped from disk."""
        with self._archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
            npy.write_array(file, np.asanyarray(array), allow_pickle=False)


def write_set(writer: Writer, test_set: TestSet, prediction: Prediction) -> None:
    """Write a run's prediction for a test set, of which every member's probabilities are kept."""
    prefix = {"clean": "", "validation": "validation_"}.get(test_set.group, f"{title_of(test_set)}/")
    arrays: dict[str, NDArray[Any] | None] = {}
    arrays |= {"probabilities": prediction.members, "energy": prediction.energy, "max_logit": prediction.max_logit}
    if test_set.labels is not None and test_set.severity is None:
        arrays["labels"] = test_set.labels
    for name, array in arrays.items():
        if array is not None:
            writer.add(f"{prefix}{name}", array)


def _memory() -> int:
    """Return the bytes that a file's arrays may take: half of this machine's memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):  # Windows
        return 2**34


# --- npz ------------------------------------------------------------------------------------------------------------


def _read_npz(path: Path) -> Arrays:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            _check_entries(path, infos)
            for info in infos:
                with archive.open(info) as file:
                    _check_header(path, info, file)  # type: ignore[arg-type]
            return {info.filename.removesuffix(".npy"): _array(archive, info) for info in infos}
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{path} is damaged or not of numpy.savez ({first_line(error)}): write it again") from error
    except ImportError as error:  # of a compression that this Python was built without
        raise DataError(f"{path} cannot be unpacked here ({error}): write it with numpy.savez") from error


def _check_entries(path: Path, infos: Sequence[zipfile.ZipInfo]) -> None:
    names = [info.filename for info in infos]
    for name in names:
        if not name.endswith(".npy"):
            raise DataError(f"{path} holds {name!r}, which is no array: write it with numpy.savez")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path} holds {twice.removesuffix('.npy')!r} twice: write it again")
    _check_size(path, sum(info.file_size for info in infos))


def _check_size(path: Path, size: int) -> None:
    if size > _memory():
        raise DataError(
            f"{path} takes {size / 2**30:,.1f} GiB unpacked, more than half of this machine's memory: save fewer "
            "members or images"
        )


def _check_header(path: Path, info: zipfile.ZipInfo, file: BinaryIO) -> None:
    """Check an array's type, and that its shape fits its size, before memory is taken for it."""
    name = info.filename.removesuffix(".npy")
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise DataError(f"{path}: {name!r} is of NumPy's format {version}: write it with numpy.savez")
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if dtype.kind not in "fiubU":
        what = "Python objects, which are never unpickled" if dtype.hasobject else f"of type {dtype}"
        raise DataError(f"{path}: {name!r} is {what}: save numbers, or text of NumPy's type <U")
    if math.prod(shape) * dtype.itemsize != info.file_size - file.tell():
        raise DataError(f"{path}: {name!r} is cut short or too long for its shape {shape}: write it again")


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(info) as file:
        array: NDArray[Any] = npy.read_array(file, allow_pickle=False)
    return array


# --- columns --------------------------------------------------------------------------------------------------------


def _read_csv(path: Path) -> Arrays:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            headings = [heading.strip() for heading in next(rows, [])]
            return _from_rows(path, headings, (row for row in rows if row))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: save it as CSV in UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path} is no CSV ({error}): separate values by commas, one row an example") from error


def _read_parquet(path: Path) -> Arrays:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UsageError(
            f'{path}: Parquet needs pyarrow: pip install "ensembler[parquet]", or give a .npz or .csv'
        ) from error
    try:
        file = parquet.ParquetFile(path)
        _check_size(path, file.metadata.num_rows * file.metadata.num_columns * 8)
        headings = [str(name) for name in file.schema_arrow.names]
        batches = (batch for batch in file.iter_batches(10_000) if batch.num_rows)
        rows = (row for batch in batches for row in zip(*(c.to_pylist() for c in batch.columns), strict=True))
        return _from_rows(path, headings, rows)
    except ArrowException as error:
        raise DataError(f"{path} is damaged or no Parquet ({first_line(error)}): write it again") from error


def _from_rows(path: Path, headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> Arrays:
    """Make ``probabilities`` (N, C), ``labels`` and ``classes`` of a column for each class and one of labels."""
    found = [place for place, heading in enumerate(headings) if heading in _LABELS]
    classes = [heading for heading in headings if heading not in _LABELS]
    if len(found) != 1 or not classes:
        raise DataError(
            f"{path} needs one column {_LABELS[0]!r} and a column of probabilities for each class, in the classes' "
            f"order; found {', '.join(map(repr, headings[:6])) or 'no columns'}"
        )
    if len(set(classes)) < len(classes):
        raise DataError(f"{path} has the column {next(c for c in classes if classes.count(c) > 1)!r} twice: rename one")
    labels, probabilities = [], []
    for number, row in enumerate(rows, start=1):
        if len(row) != len(headings):
            raise DataError(f"{path}, row {number}: {len(row)} values, not {len(headings)}: give one for each column")
        cells = list(row)
        labels.append(cells.pop(found[0]))
        probabilities.append(_numbers(path, number, cells, classes))
    if not labels:
        raise DataError(f"{path} has no rows: give one for each test image")
    arrays = {"probabilities": np.stack(probabilities), "labels": _classes(path, labels, classes)}
    return arrays | {"classes": np.array(classes)}


def _numbers(path: Path, number: int, cells: Sequence[Any], classes: Sequence[str]) -> NDArray[np.float64]:
    try:
        return np.array([float(cell) for cell in cells])
    except (TypeError, ValueError):
        for cell, name in zip(cells, classes, strict=True):
            try:
                float(cell)
            except (TypeError, ValueError) as error:
                where = f"row {number}, column {name!r}"
                raise DataError(f"{path}, {where}: {cell!r} is no number: give a probability in every cell") from error
        raise


def _classes(path: Path, given: Sequence[Any], classes: Sequence[str]) -> NDArray[np.int64]:
    """Read labels that are the columns' names, or, where none of them is a name, numbers from 0."""
    texts = [str(label).strip() for label in given]
    numbered = [str(number) for number in range(len(classes))]
    known = {name: place for place, name in enumerate(classes)}
    if set(classes) & set(numbered) and list(classes) != numbered:
        raise DataError(
            f"{path}: the columns {', '.join(map(repr, classes[:6]))} have numbers as names that are not their places "
            "from 0: order them as 0 to C - 1, or give them other names"
        )
    if not set(texts) & known.keys():
        known = {name: place for place, name in enumerate(numbered)}
    for row, text in enumerate(texts):
        if text not in known:
            raise DataError(
                f"{path}, row {row + 1}: the label {given[row]!r} is no class: give a column's name, or its place "
                f"from 0 to {len(classes) - 1}"
            )
    return np.array([known[text] for text in texts], dtype=np.int64)
