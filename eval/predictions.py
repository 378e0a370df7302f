"""What a run's members say of a slice of images: made once, in one pass, and kept on disk.

Predicting is what an evaluation costs; scoring is nothing beside it. So what scores need of a slice is reduced while
it is predicted, kept under the hashes of the run and of the images, and never made again. Of the clean test and the
validation images every member's probabilities are kept too, since the order and the number of members are chosen
there. Nothing is lost when the folder is removed but time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from ensembler.artefact import HELD, hold, replace_file, sha256, sweep
from ensembler.device import keep_freed
from ensembler.engine import Engine
from ensembler.ensemble import Ensemble
from ensembler.errors import ArtefactError
from ensembler.run import Run
from ensembler.uncertainty import disagreement_of_votes, entropy, expected_entropy

__all__ = ["Prediction", "Predictor", "Slice", "default_folder", "predictions"]

FORMAT = 2  # 1 had no number, and no hash of the members' probabilities
_FORMATS = ("1", "2")
_CHUNK = 2**26  # bytes of images, and of members' probabilities, that are held at once
_EXAMPLES = {"mean": 0, "expected_entropy": 0, "classes": 1, "label_probabilities": 1}  # where the examples lie


@dataclass(frozen=True, eq=False)
class Slice:
    """Images that every run is shown.

    Attributes:
        name: for the progress.
        key: the images' and labels' hash, or another name that no others have.
        batches: gives the images, (b, H, W, 3) uint8 each; called only where a run has not seen them.
        labels: (B,), or ``None``.
        members: whether every member's probabilities are kept; needs labels.
    """

    name: str
    key: str
    batches: Callable[[], Iterable[Tensor]]
    labels: NDArray[np.int64] | None
    members: bool = False


@dataclass(frozen=True, eq=False)
class Prediction:
    """M members on B images of C classes.

    Attributes:
        mean: (B, C) float32, the mean of the members' probabilities.
        expected_entropy: (B,) float32, the mean of the members' own entropies, in nats.
        classes: (M, B) int32, each member's most probable class.
        label_probabilities: (M, B) float32, each member's probability of the label; (M, 0) without labels.
        members: (M, B, C) float32 on disk, where they were asked for.
    """

    mean: NDArray[np.float32]
    expected_entropy: NDArray[np.float32]
    classes: NDArray[np.int32]
    label_probabilities: NDArray[np.float32]
    members: NDArray[np.float32] | None = None

    @property
    def size(self) -> int:
        """M."""
        return len(self.classes)

    @cached_property
    def predictive_entropy(self) -> NDArray[np.float64]:
        """(B,) in nats."""
        return entropy(self.mean)

    @property
    def mutual_information(self) -> NDArray[np.float64] | None:
        """(B,) in nats, ``None`` where M = 1; see :func:`ensembler.uncertainty.mutual_information`."""
        return None if self.size == 1 else np.maximum(self.predictive_entropy - self.expected_entropy, 0.0)

    @property
    def disagreement(self) -> NDArray[np.float64] | None:
        """(B,) ``None`` where M = 1; see :func:`ensembler.uncertainty.disagreement`."""
        if self.size == 1:
            return None
        B, C = self.mean.shape
        votes = np.zeros((B, C))
        for row in self.classes:
            votes[np.arange(B), row] += 1
        return disagreement_of_votes(votes)


@dataclass(frozen=True, eq=False)
class Predictor:
    """One run's predictions, kept in a folder.

    Attributes:
        ensemble: the run's.
        run: the run's hash.
        folder: where predictions are kept.
    """

    ensemble: Ensemble
    run: str
    folder: Path

    def path(self, images: Slice) -> Path:
        """Where the prediction for a slice is kept."""
        # The last bits of a prediction depend on what it was computed on.
        key = hashlib.sha256(f"1/{self.ensemble.device.type}/{images.key}".encode()).hexdigest()[:32]
        return self.folder / self.run[:32] / f"{key}.safetensors"

    def kept(self, images: Slice) -> Prediction | None:
        """The kept prediction for a slice; ``None`` where there is none, or it is not whole, or of a later format."""
        path = self.path(images)
        try:
            with safe_open(path, "numpy") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
            known = metadata.get("format", "1") in _FORMATS
            if not known or metadata.get("sha256") != _digest(arrays):
                return None
            if images.members and "format" in metadata and metadata.get("members_sha256") != sha256(_whole(path)):
                return None
            every = np.load(_whole(path), mmap_mode="r", allow_pickle=False) if images.members else None
            return Prediction(**arrays, members=every)
        except (OSError, SafetensorError, ValueError, TypeError):
            return None


def predictions(
    predictors: Sequence[Predictor],
    slices: Sequence[Slice],
    watch: Callable[[str, int, int], None] = lambda label, done, total: None,
    engine: Engine | None = None,
) -> Iterator[tuple[Slice, list[Prediction]]]:
    """Every run's prediction for every slice, slice by slice: the kept ones, and the others made now and kept.

    The images of a slice are made once, one batch ahead of the runs, and each member sees each image once.

    Args:
        predictors: the runs'.
        slices: what to show them.
        watch: told of every slice: its name, how many are done, of how many.
        engine: what runs pieces of work; where that is not here, slices without ``members`` are such pieces, and are
            made before the others.

    Raises:
        ArtefactError: a prediction cannot be kept. EngineError: the engine has lost a piece.
    """
    missing = [[one for one in predictors if one.kept(images) is None] for images in slices]
    if engine is not None and not engine.here:
        _make_elsewhere(engine, missing, slices, watch)
    stream = _ahead(
        (number, batch) for number, images in enumerate(slices) if missing[number] for batch in images.batches()
    )
    groups = groupby(stream, key=lambda item: item[0])
    for number, images in enumerate(slices):
        made: dict[Predictor, Prediction] = {}
        if missing[number]:
            _, batches = next(groups)
            made = _make(missing[number], images, (batch for _, batch in batches))
        yield images, [made.get(one) or _sure(one.kept(images), one.folder) for one in predictors]
        watch(images.name, number + 1, len(slices))


def _make_elsewhere(
    engine: Engine,
    missing: list[list[Predictor]],
    slices: Sequence[Slice],
    watch: Callable[[str, int, int], None],
) -> None:
    """Let the engine make what it can, keep each as soon as it comes, and take it off the list."""
    numbers = [number for number, images in enumerate(slices) if missing[number] and not images.members]
    predictors = list(dict.fromkeys(one for number in numbers for one in missing[number]))
    runs = [(one.ensemble.run, str(one.ensemble.device), one.ensemble.batch_size) for one in predictors]
    asked = [(slices[number], [predictors.index(one) for one in missing[number]]) for number in numbers]
    done = 0
    with closing(engine.run(_reduce, runs, asked, lambda: None)) as made:
        for place, found in made:
            images, of = asked[place]
            for i, arrays in zip(of, found, strict=True):
                _keep(predictors[i].path(images), arrays)
            missing[numbers[place]] = []
            done += 1
            watch(images.name, done, len(asked))


def _reduce(
    runs: list[tuple[Run, str, int]], asked: tuple[Slice, list[int]], tell: Callable[..., None]
) -> list[dict[str, NDArray[Any]]]:
    """A piece of work: what is kept of some of the runs' predictions for a slice."""
    images, of = asked
    reductions = [_Reduction(Ensemble(*runs[i]), images) for i in of]
    for one in reductions:
        keep_freed(one.ensemble.device)
    for batch in images.batches():
        for one in reductions:
            one.add(batch)
    return [one.arrays() for one in reductions]


def _ahead(items: Generator[Any, None, None]) -> Iterator[Any]:
    """The items, the next one being made while one is used."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items, None)
        while (item := future.result()) is not None:
            future = pool.submit(next, items, None)
            yield item


def _make(predictors: Sequence[Predictor], images: Slice, batches: Iterable[Tensor]) -> dict[Predictor, Prediction]:
    with ExitStack() as stack:
        gatherings = [stack.enter_context(_Gathering(one, images)) for one in predictors]
        for batch in batches:
            for gathering in gatherings:
                gathering.add(batch)
        return {gathering.predictor: gathering.keep() for gathering in gatherings}


class _Reduction:
    """Reduces the members' probabilities, batch by batch, to what scores need.

    Args:
        ensemble: whose members.
        images: the slice that the batches are of.
        see: is shown each part (M, b, C) before it is let go, with the number of images before it.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        images: Slice,
        see: Callable[[int, NDArray[np.float32]], None] = lambda done, found: None,
    ) -> None:
        self.ensemble, self._see, self._done = ensemble, see, 0
        self._labels = np.empty(0, dtype=np.int64) if images.labels is None else images.labels
        self._parts: dict[str, list[NDArray[Any]]] = {name: [] for name in _EXAMPLES}

    def add(self, batch: Tensor) -> None:
        ensemble = self.ensemble
        size = max(batch[:1].numel(), 4 * ensemble.members * len(ensemble.classes))
        for images in torch.split(batch, max(1, _CHUNK // size)):
            found = ensemble.predict_members(images).numpy()
            known = self._labels[self._done : self._done + len(images)]
            self._parts["mean"].append(found.mean(axis=0, dtype=np.float64).astype(np.float32))
            self._parts["expected_entropy"].append(expected_entropy(found).astype(np.float32))
            self._parts["classes"].append(found.argmax(axis=2).astype(np.int32))
            self._parts["label_probabilities"].append(found[:, np.arange(len(known)), known])
            self._see(self._done, found)
            self._done += len(images)

    def arrays(self) -> dict[str, NDArray[Any]]:
        whole = {name: np.concatenate(parts, _EXAMPLES[name]) for name, parts in self._parts.items()}
        return {name: np.ascontiguousarray(array) for name, array in whole.items()}  # safetensors takes them as such


class _Gathering:
    """Reduces one run's predictions for a slice and keeps them, every member's too where that is asked for."""

    def __init__(self, predictor: Predictor, images: Slice) -> None:
        self.predictor = predictor
        self._path = predictor.path(images)
        self._every: BinaryIO | None = None
        self._lock: int | None = None
        ensemble = predictor.ensemble
        examples = 0 if images.labels is None else len(images.labels)
        self._shape = (ensemble.members, examples, len(ensemble.classes))
        self._keeps_members = images.members
        self._reduction = _Reduction(ensemble, images, self._write)
        self.add = self._reduction.add

    def __enter__(self) -> Self:
        if self._keeps_members:
            with self._writing():
                self._path.parent.mkdir(parents=True, exist_ok=True)
                sweep(self._path.parent)
                self._every = self._partial.open("wb")
                self._lock = hold(self._partial)
        return self

    def __exit__(self, *_: object) -> None:
        if self._every is not None:
            with suppress(OSError):  # on a full disk, what it still holds cannot be written
                self._every.close()
        with suppress(OSError):
            self._partial.unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)

    def _write(self, done: int, found: NDArray[np.float32]) -> None:
        if self._every is None:
            return
        _, B, C = self._shape
        with self._writing():  # plain writes: where the disk is full, a memory map would kill the process
            if not done:
                header = {"descr": "<f4", "fortran_order": False, "shape": self._shape}
                np.lib.format.write_array_header_1_0(self._every, header)
                self._offset = self._every.tell()
            for member, rows in enumerate(found.astype("<f4", copy=False)):
                self._every.seek(self._offset + 4 * C * (member * B + done))
                self._every.write(np.ascontiguousarray(rows).data)

    def keep(self) -> Prediction:
        arrays, metadata = self._reduction.arrays(), {}
        if self._every is not None:
            with self._writing():
                self._every.close()
                metadata["members_sha256"] = sha256(self._partial)
                self._partial.replace(_whole(self._path))
        _keep(self._path, arrays, **metadata)
        every = None if self._every is None else np.load(_whole(self._path), mmap_mode="r", allow_pickle=False)
        return Prediction(**arrays, members=every)

    @property
    def _partial(self) -> Path:
        return self._path.with_name(f".partial-{os.getpid()}-{id(self)}-{_whole(self._path).name}{HELD}")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ArtefactError(
                f"cannot keep predictions in {self.predictor.folder}: {error.strerror or error}: choose another --cache"
            ) from error


def _keep(path: Path, arrays: dict[str, NDArray[Any]], **metadata: str) -> None:
    replace_file(path, save(arrays, {"format": str(FORMAT), "sha256": _digest(arrays)} | metadata))


def _whole(path: Path) -> Path:
    """Where all members' probabilities lie beside a prediction."""
    return path.with_suffix(".npy")


def _sure(prediction: Prediction | None, folder: Path) -> Prediction:
    if prediction is None:
        raise ArtefactError(f"a prediction in {folder} was changed while it was in use: run again")
    return prediction


def default_folder() -> Path:
    """Where predictions are kept by default: ``$XDG_CACHE_HOME/ensembler/predictions``, or ``~/.cache/...``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ensembler" / "predictions"


def _digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(json.dumps([name, str(array.dtype), array.shape]).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
