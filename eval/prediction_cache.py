"""Cache of predictions on disk. It is safe to remove: predictions are then made again.

The key of a prediction has all that it depends on: the run, the images, the code that predicts, the version of torch
and the type of device. Its arrays are in a safetensors file; for test sets on which members are chosen, every member's
probabilities are in an ``.npy`` file beside it, which is mapped into memory.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn

from ensembler import __version__
from ensembler.ensemble import Ensemble
from ensembler.errors import ArtefactError
from ensembler.machine import kept_folder
from ensembler.storage.artefact import HELD, check_writable, ensure_folder, hold, replace_file, sha256

__all__ = ["PREDICTING", "Arrays", "Entry", "MembersFile", "code_sha256", "folder_of", "identity"]

FORMAT = 1
PREDICTING = tuple(
    f"ensembler.{name}"
    for name in (
        *("data.augmentations", "data.decoding", "data.examples", "data.images", "device", "ensemble", "gaussian"),
        *("networks.architectures", "networks.attention", "networks.capture", "networks.checks", "networks.dropout"),
        *("networks.members", "task", "uncertainty", "weights", "eval.predictions", "eval.views"),
    )
)
"""The modules that build the network, prepare images, predict and reduce."""

Arrays = dict[str, NDArray[Any]]


def folder_of(chosen: Path | None) -> Path:
    """Return where predictions are kept: a folder that was chosen, or ``ensembler/predictions`` of the user's cache.

    Where the latter cannot be written, it is a temporary one, which one line says.

    Raises:
        ArtefactError: the chosen one cannot be written.
    """
    if chosen is None:
        return kept_folder("predictions", "predictions")
    check_writable(chosen, "choose another --cache")
    return chosen


def code_sha256(architecture: str, network: nn.Module) -> str:
    """Hash the source that predicts: :data:`PREDICTING`, the network's own classes, and the module that builds it.

    Further imports of a user's modules are not followed; torch counts by its version.
    """
    builder = architecture.partition(":")[0]  # of package.module:factory
    own = {builder, *(type(part).__module__ for part in network.modules())} & sys.modules.keys()
    digest = hashlib.sha256(repr(network).encode())
    for name in sorted({*PREDICTING, *(each for each in own if each.split(".")[0] != "torch")}):
        digest.update(name.encode())
        module = import_module(name)
        with suppress(OSError, TypeError):  # no source, such as a class from a prompt
            digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()


def identity(ensemble: Ensemble) -> dict[str, Any]:
    """Return what an ensemble's predictions depend on beside run and images; overwrites its network's weights."""
    firsts = {id(ensemble.run_of(member)): member for member in reversed(range(ensemble.members))}
    return {
        "format": FORMAT,
        "ensembler": __version__,
        "torch": torch.__version__,
        "device": ensemble.device.type,  # the last bits depend on it
        "code": [code_sha256(ensemble.run_of(m).manifest.architecture, ensemble.network(m)) for m in firsts.values()],
    }


@dataclass(frozen=True)
class Entry:
    """The files of a prediction, which may not exist yet."""

    path: Path

    @classmethod
    def of(cls, folder: Path, run_sha256: str, what: Mapping[str, Any]) -> Self:
        """Return the entry in ``folder`` of a run's prediction that depends on ``what``, JSON values."""
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
        return cls(folder / run_sha256[:32] / f"{key[:32]}.safetensors")

    @property
    def members_path(self) -> Path:
        """The file of every member's probabilities."""
        return self.path.with_suffix(".npy")

    def load(self, *, members: bool) -> Arrays | None:
        """Read and verify the arrays, by name; ``None`` if a file is missing, damaged or of another format.

        Args:
            members: whether to include every member's probabilities, as ``members``, mapped into memory.
        """
        try:
            with safe_open(self.path, "numpy") as file:
                arrays: Arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
            if metadata.get("format") != str(FORMAT) or metadata.get("sha256") != _digest(arrays):
                return None
            if members:
                if metadata.get("members_sha256") != sha256(self.members_path):
                    return None
                arrays["members"] = np.load(self.members_path, mmap_mode="r", allow_pickle=False)
            return arrays
        except (OSError, SafetensorError, ValueError, TypeError):
            return None

    def save(self, arrays: Arrays, **metadata: str) -> None:
        """Write the arrays.

        Raises:
            ArtefactError: they cannot be written.
        """
        replace_file(self.path, save(arrays, {"format": str(FORMAT), "sha256": _digest(arrays)} | metadata))


class MembersFile:
    """Writer of every member's probabilities (M, B, C), part by part; a context that leaves no partial file.

    Args:
        entry: whose file.
        shape: (M, B, C).

    Raises:
        ArtefactError: it cannot be written.
    """

    def __init__(self, entry: Entry, shape: tuple[int, int, int]) -> None:
        self._entry, self._shape = entry, shape
        self._partial = entry.path.with_name(f".partial-{os.getpid()}-{id(self)}-{entry.members_path.name}{HELD}")
        self._file: BinaryIO | None = None
        self._lock: int | None = None

    def __enter__(self) -> Self:
        with self._writing(), ExitStack() as folder:
            folder.enter_context(ensure_folder(self._partial.parent))
            self._file = self._partial.open("wb")
            self._lock = hold(self._partial)
            self._folder = folder.pop_all()
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._file is not None:
            with suppress(OSError):  # on a full disk, its buffer cannot be written
                self._file.close()
        with suppress(OSError):
            self._partial.unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)
        self._folder.__exit__(*raised)

    def write(self, start: int, part: NDArray[np.float32]) -> None:
        """Write the probabilities (M, b, C) of the examples from ``start`` on."""
        assert self._file is not None  # noqa: S101
        _, B, C = self._shape
        with self._writing():  # on a full disk, a memory map would kill the process
            if not start:
                header = {"descr": "<f4", "fortran_order": False, "shape": self._shape}
                np.lib.format.write_array_header_1_0(self._file, header)
                self._offset = self._file.tell()
            for member, rows in enumerate(part.astype("<f4", copy=False)):
                self._file.seek(self._offset + 4 * C * (member * B + start))
                self._file.write(np.ascontiguousarray(rows).data)

    def finish(self) -> str:
        """Complete the file, and return its hash."""
        assert self._file is not None  # noqa: S101
        with self._writing():
            self._file.close()
            digest = sha256(self._partial)
            self._partial.replace(self._entry.members_path)
        return digest

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            folder = self._entry.path.parent.parent
            raise ArtefactError(
                f"cannot keep predictions in {folder}: {error.strerror or error}: choose another --cache"
            ) from error


def _digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(json.dumps([name, str(array.dtype), array.shape]).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
