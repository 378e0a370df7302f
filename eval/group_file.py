"""Groups of test images, from a file of two columns."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensembler.errors import DataError, ShapeError

__all__ = ["checked_groups", "read_groups"]

_COLUMNS = ("image", "group")


def read_groups(path: Path, images: int, files: Sequence[str] | None = None) -> NDArray[np.str_]:
    """Read each test image's group.

    Args:
        path: a CSV file with the columns ``image`` and ``group``, a row for each test image.
        images: N, the number of test images; ``image`` is a position from 0 to N - 1.
        files: the images' files, where they lie in some: ``image`` may then be one of these names.

    Returns:
        (N,) names of groups.

    Raises:
        DataError: the file cannot be read, or an image is unknown, or has no group or several.
    """
    known = {str(number): number for number in range(images)}
    known |= {name: number for number, name in enumerate(files or ())}
    found: dict[int, str] = {}
    for line, image, group in _rows(path):
        if image not in known:
            names = f"0 to {images - 1}" + (f", or a file such as {files[0]}" if files else "")
            raise DataError(f"{path}, line {line}: no test image {image!r}: give {names}")
        if not group:
            raise DataError(f"{path}, line {line}: image {image} has an empty group: name it")
        if known[image] in found:
            raise DataError(f"{path}, line {line}: image {image} is there twice: give each image one group")
        found[known[image]] = group
    if missing := images - len(found):
        first = next(number for number in range(images) if number not in found)
        raise DataError(f"{path}: {missing:,} of {images:,} test images have no group, first image {first}: add them")
    return np.array([found[number] for number in range(images)])


def checked_groups(groups: ArrayLike, images: int) -> NDArray[np.str_]:
    """Return groups (N,), text or integers, as names.

    Raises:
        ShapeError: not one text or integer an image.
    """
    found = np.asarray(groups)
    if found.shape != (images,) or found.dtype.kind not in "iuUb":
        raise ShapeError(f"groups must be {images} names or integers, one an image, found {found.dtype} {found.shape}")
    return found.astype(np.str_)


def _rows(path: Path) -> list[tuple[int, str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            if sorted(name.strip() for name in rows.fieldnames or ()) != sorted(_COLUMNS):
                raise DataError(f"{path} needs the columns image,group in its first line, found {rows.fieldnames}")
            rows.fieldnames = [name.strip() for name in rows.fieldnames or ()]
            return [
                (rows.line_num, (row["image"] or "").strip(), (row["group"] or "").strip())
                for row in rows
                if None not in row or _refuse(path, rows.line_num)
            ]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: save it as CSV in UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path} is no CSV ({error}): give two columns, image,group") from error


def _refuse(path: Path, line: int) -> bool:
    raise DataError(f"{path}, line {line}: more than two values: put a name that has a comma in double quotes")
