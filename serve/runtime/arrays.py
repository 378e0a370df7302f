"""Arrays of untrusted ``.npz`` files: no more is allocated than the file holds. NumPy only.

``np.load`` allocates what a header claims, and unpacks what an archive claims: a few bytes can ask for any memory.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ensembler.storage.artefact import open_file

__all__ = ["read_array", "read_arrays"]


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of a file that ``np.savez`` wrote, by name.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not such a file: packed, with a name twice, with arrays of another kind than numbers, or of
            another size than their headers say.
        ArtefactError: a link, a device or a pipe.
    """
    arrays: dict[str, NDArray[Any]] = {}
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                name = entry.filename.removesuffix(".npy")
                if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                    raise ValueError(f"{name} is packed")
                if name in arrays:
                    raise ValueError(f"{name} is there twice")
                with archive.open(entry) as member:
                    arrays[name] = read_array(member, entry.file_size)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:  # encrypted, or damaged
        raise ValueError(str(error)) from error
    return arrays


def read_array(file: IO[bytes], size: int) -> NDArray[Any]:
    """Return the array of a ``.npy`` file.

    Args:
        file: at its beginning.
        size: in bytes.

    Raises:
        ValueError: no array of numbers, or of another size than its header says.
    """
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the format is not read")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read_header(file)
    except Exception as error:  # of the parsers of Python's literals, of any class
        raise ValueError("its header cannot be read") from error
    held = size - file.tell()
    if dtype.kind not in "biuf" or not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError(f"{dtype} is not a type of numbers")
    if math.prod(shape) * dtype.itemsize != held:
        raise ValueError(f"an array of shape {shape} does not take {held} bytes")
    array = np.frombuffer(file.read(held), dtype)
    return array.reshape(shape, order="F" if fortran else "C")
