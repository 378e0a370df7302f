"""Predictions of ensembles for test sets: made once, in one pass, and kept on disk.

Nearly all of an evaluation's time is prediction. Members' probabilities are reduced to what scores need while they are
predicted, and the result is kept (:mod:`ensembler.eval.prediction_cache`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ensembler import jobs
from ensembler.device import configure
from ensembler.engine import Engine
from ensembler.ensemble import Ensemble
from ensembler.eval.prediction_cache import Arrays, Entry, MembersFile, identity
from ensembler.eval.shift.test_set import TestSet
from ensembler.eval.views import Variations
from ensembler.eval.views import identity as view_identity
from ensembler.jobs import Job
from ensembler.run import Run
from ensembler.uncertainty import SUM_TOLERANCE, disagreement_of_votes, entropy, expected_entropy, information

__all__ = ["Prediction", "Predictor", "log_probabilities", "predictions", "reduce_logits", "reduce_members"]

_CHUNK = 2**26  # bytes of images, and of members' probabilities, in memory at once
_EXAMPLES_AXIS = {
    **{"mean": 0, "expected_entropy": 0, "mutual_information": 0, "classes": 1, "label_probabilities": 1},
    **{"energy": 0, "max_logit": 0},
}


@dataclass(frozen=True, eq=False)
class Prediction:
    """A prediction by M members for B images of C classes.

    Attributes:
        mean: (B, C) float32, the mean of the members' probabilities.
        expected_entropy: (B,) float32, the mean of the members' own entropies, in nats.
        mutual_information: (B,) float32 nats, ``None`` where M = 1; computed in float64, as float32's rounding of both
            entropies is larger where members agree.
        classes: (M, B) int32, each member's most probable class.
        label_probabilities: (M, B) float32, each member's probability of the label; (M, 0) without labels.
        energy, max_logit: (B,) float32, see :func:`.metrics.ood.detectors`; ``None`` where the logits are unknown.
        members: (M, B, C) float32, mapped from disk; of test sets that keep them.
    """

    mean: NDArray[np.float32]
    expected_entropy: NDArray[np.float32]
    classes: NDArray[np.int32]
    label_probabilities: NDArray[np.float32]
    mutual_information: NDArray[np.float32] | None = None
    energy: NDArray[np.float32] | None = None
    max_logit: NDArray[np.float32] | None = None
    members: NDArray[np.float32] | None = None

    def part(self, indices: NDArray[np.int64]) -> Prediction:
        """Return the prediction for some of the images."""
        axes = _EXAMPLES_AXIS | {"members": 1}
        arrays: dict[str, Any] = {name: getattr(self, name) for name in axes}
        taken: dict[str, Any] = {n: None if a is None else a.take(indices, axes[n]) for n, a in arrays.items()}
        return Prediction(**taken)

    @property
    def size(self) -> int:
        """M."""
        return len(self.classes)

    @cached_property
    def predictive_entropy(self) -> NDArray[np.float64]:
        """(B,) in nats."""
        return entropy(self.mean)

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


class Predictor:
    """An ensemble whose predictions are kept.

    Args:
        ensemble: the ensemble.
        folder: of the predictions of all ensembles.
        views: variations of each image that are predicted, see :mod:`ensembler.eval.views`; 0 for the image itself.
        seed: of the variations.
    """

    def __init__(self, ensemble: Ensemble, folder: Path, views: int = 0, seed: int = 0) -> None:
        self.ensemble, self.folder, self.views, self.seed = ensemble, folder, views, seed
        self._identity = identity(ensemble)
        if views:
            self._identity["views"] = view_identity(views, seed, ensemble.run)

    def entry(self, test_set: TestSet) -> Entry:
        """Return the cache entry of a test set."""
        what = self._identity | {"images": test_set.examples.sha256}
        if test_set.classes is not None:
            what["classes"] = test_set.classes
        return Entry.of(self.folder, self.ensemble.run.sha256, what)

    def kept(self, test_set: TestSet) -> Prediction | None:
        """Load the kept prediction for a test set; ``None`` if there is no valid one."""
        arrays = self.entry(test_set).load(members=test_set.keeps_members)
        return None if arrays is None else Prediction(**arrays)


def predictions(
    predictors: Sequence[Predictor],
    test_sets: Sequence[TestSet],
    watch: Callable[[str, int, int], None] = lambda label, done, total: None,
    engine: Engine | None = None,
) -> Iterator[tuple[TestSet, list[Prediction]]]:
    """Yield every ensemble's prediction for each test set in turn; those that are not kept are made, and kept.

    A set's images are made once, one batch ahead, on the device of the networks, and each member predicts each image
    once.

    Args:
        predictors: the ensembles.
        test_sets: what to predict.
        watch: called with a set's title, how many images are done, and of how many in all.
        engine: if it is not this process, it predicts the sets whose members are not kept, before the others.

    Raises:
        ArtefactError: a prediction cannot be kept. EngineError: the engine failed.
    """
    if engine is not None and not engine.here:
        _predict_elsewhere(engine, predictors, test_sets, watch)
    done, total = 0, sum(len(test_set.examples) for test_set in test_sets)
    stream = _ahead(_kept_or_images(predictors, test_sets))
    for number, items in groupby(stream, key=lambda item: item[0]):
        test_set = test_sets[number]
        watch(test_set.title, done, total)
        _, found, first = next(items)
        if first is not None:
            missing = [one for one, kept in zip(predictors, found, strict=True) if kept is None]
            batches = chain([first], (batch for *_, batch in items))
            made = iter(_predict(missing, test_set, batches, partial(_tell, watch, test_set.title, done, total)))
            found = [kept or next(made) for kept in found]
        yield test_set, found
        done += len(test_set.examples)
        if first is None:
            watch(test_set.title, done, total)


def _tell(watch: Callable[[str, int, int], None], title: str, before: int, total: int, seen: int) -> None:
    watch(title, before + seen, total)


def _kept_or_images(
    predictors: Sequence[Predictor], test_sets: Sequence[TestSet]
) -> Generator[tuple[int, list[Prediction | None], Tensor | None], None, None]:
    """Yield each set's number and kept predictions: once if all are kept, else with each batch of images."""
    for number, test_set in enumerate(test_sets):
        kept = [one.kept(test_set) for one in predictors]
        if None in kept:
            for batch in test_set.batches(predictors[kept.index(None)].ensemble.device):
                yield number, kept, batch
        else:
            yield number, kept, None


def _ahead(items: Generator[Any, None, None]) -> Iterator[Any]:
    """Yield the items, making the next one in a thread meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items, None)
        while (item := future.result()) is not None:
            future = pool.submit(next, items, None)
            yield item


def _predict(
    predictors: Sequence[Predictor], test_set: TestSet, batches: Iterable[Tensor], tell: Callable[[int], None]
) -> list[Prediction]:
    with ExitStack() as stack:
        reductions = []
        for one in predictors:
            file = None
            if test_set.keeps_members:
                count = len(one.ensemble.classes if test_set.classes is None else test_set.classes)
                shape = (one.ensemble.members, len(test_set.examples), count)
                file = stack.enter_context(MembersFile(one.entry(test_set), shape))
            reductions.append(_Reduction(one.ensemble, test_set, file, one.views, one.seed))
        seen = 0
        for batch in batches:
            for reduction in reductions:
                reduction.add(batch)
            seen += len(batch)
            tell(seen)
        return [reduction.keep(one.entry(test_set)) for one, reduction in zip(predictors, reductions, strict=True)]


def _predict_elsewhere(
    engine: Engine,
    predictors: Sequence[Predictor],
    test_sets: Sequence[TestSet],
    watch: Callable[[str, int, int], None],
) -> None:
    """Let the engine make the missing predictions, a job per test set, and keep each as soon as it arrives."""
    asked = []
    for number, test_set in enumerate(test_sets):
        missing = [place for place, one in enumerate(predictors) if not one.entry(test_set).path.exists()]
        if missing and not test_set.keeps_members:
            asked.append(Job(test_set.title, _reduce, {"number": number, "missing": missing}))
    runs = [
        ((one.ensemble.run, str(one.ensemble.device), one.ensemble.batch_size), one.views, one.seed)
        for one in predictors
    ]
    done, total = 0, sum(len(test_sets[job.arguments["number"]].examples) for job in asked)
    results: Generator[tuple[Job, list[Arrays]], None, None] = jobs.run(asked, (runs, test_sets), engine)
    with closing(results):
        for job, found in results:
            test_set = test_sets[job.arguments["number"]]
            for place, arrays in zip(job.arguments["missing"], found, strict=True):
                predictors[place].entry(test_set).save(arrays)
            done += len(test_set.examples)
            watch(test_set.title, done, total)


def _reduce(
    shared: tuple[list[tuple[tuple[Run, str, int], int, int]], Sequence[TestSet]],
    emit: Callable[..., None],
    number: int,
    missing: list[int],
) -> list[Arrays]:
    """Predict a test set with some of the runs, as a job."""
    runs, test_sets = shared
    asked = [runs[place] for place in missing]
    reductions = [_Reduction(Ensemble(*run), test_sets[number], None, views, seed) for run, views, seed in asked]
    for one in reductions:
        configure(one.ensemble.device)
    for batch in test_sets[number].batches(reductions[0].ensemble.device):
        for one in reductions:
            one.add(batch)
    return [one.arrays() for one in reductions]


def reduce_members(probabilities: NDArray[np.floating], labels: NDArray[np.int64]) -> Arrays:
    """Reduce the members' probabilities (M, B, C) and labels, (B,) or (0,), to :class:`Prediction`'s arrays by name.

    They keep the type of the probabilities.
    """
    mean, expected = probabilities.mean(axis=0, dtype=np.float64), expected_entropy(probabilities)
    kind = probabilities.dtype
    found = {
        "mean": mean.astype(kind),
        "expected_entropy": expected.astype(kind),
        "classes": probabilities.argmax(axis=2).astype(np.int32),
        "label_probabilities": probabilities[:, np.arange(len(labels)), labels],
    }
    if len(probabilities) > 1:
        found["mutual_information"] = information(entropy(mean), expected).astype(kind)
    return found


def reduce_logits(logits: NDArray[np.floating]) -> Arrays:
    """Reduce the members' logits (M, B, C) to ``energy`` and ``max_logit``, (B,) each, of their type.

    Neither is known of :func:`log_probabilities`.
    """
    mean = logits.mean(axis=0, dtype=np.float64)
    largest = mean.max(axis=1)
    energy = -largest - np.log(np.exp(mean - largest[:, None]).sum(axis=1))
    return {"energy": energy.astype(logits.dtype), "max_logit": (-largest).astype(logits.dtype)}


def log_probabilities(logits: NDArray[np.floating]) -> bool:
    """Return whether logits (M, B, C) are logarithms of probabilities: their energy is the rounding error of 0."""
    if logits.max() > SUM_TOLERANCE:
        return False
    return bool((np.abs(np.exp(logits).sum(axis=2, dtype=np.float64) - 1.0) <= SUM_TOLERANCE).all())


class _Reduction:
    """Reduction of the members' probabilities, batch by batch, to what scores need.

    Args:
        ensemble: whose members.
        test_set: the set of the batches.
        file: for every member's probabilities.
        views, seed: as of :class:`Predictor`.
    """

    def __init__(
        self, ensemble: Ensemble, test_set: TestSet, file: MembersFile | None = None, views: int = 0, seed: int = 0
    ) -> None:
        self.ensemble, self._file, self._done = ensemble, file, 0
        self._variations = Variations(ensemble, views, len(test_set.examples), seed) if views else None
        self._classes = None if test_set.classes is None else list(test_set.classes)
        labels = test_set.labels
        self._labels = np.empty(0, dtype=np.int64) if labels is None else labels
        self._parts: dict[str, list[NDArray[Any]]] = {}
        self._logits = False  # whether outputs are more than logarithms of probabilities

    def add(self, batch: Tensor) -> None:
        """Predict the next images."""
        ensemble = self.ensemble
        size = max(batch[:1].numel(), 8 * ensemble.members * len(ensemble.classes))
        for images in torch.split(batch, max(1, _CHUNK // size)):
            found, outputs = self._predict(images)
            labels = self._labels[self._done : self._done + len(images)]
            for name, array in (reduce_members(found, labels) | reduce_logits(outputs)).items():
                self._parts.setdefault(name, []).append(array)
            if self._file is not None:
                self._file.write(self._done, found)
            self._done += len(images)

    def _predict(self, images: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Predict each member's probabilities and outputs (M, B, C), means over its variations if there are any."""
        ensemble, start = self.ensemble, self._done
        each = [None] if self._variations is None else self._variations.of(start, start + len(images))
        outputs = [ensemble.predict_outputs(images, vary) for vary in each]
        if self._classes is not None:
            outputs = [one[..., self._classes] for one in outputs]
        self._logits = self._logits or not all(log_probabilities(one.numpy()) for one in outputs)
        probabilities = [ensemble.task.distribution(one) for one in outputs]
        return _mean(probabilities).numpy(), _mean(outputs).numpy()

    def arrays(self) -> Arrays:
        """Return the reduced arrays by name."""
        left_out = () if self._logits else ("energy", "max_logit")
        parts = {name: own for name, own in self._parts.items() if name not in left_out}
        whole = {name: np.concatenate(own, _EXAMPLES_AXIS[name]) for name, own in parts.items()}
        return {name: np.ascontiguousarray(array) for name, array in whole.items()}  # as safetensors needs them

    def keep(self, place: Entry) -> Prediction:
        """Keep the prediction, and return it."""
        arrays = self.arrays()
        if self._file is None:
            place.save(arrays)
            return Prediction(**arrays)
        place.save(arrays, members_sha256=self._file.finish())
        return Prediction(**arrays, members=np.load(place.members_path, mmap_mode="r", allow_pickle=False))


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors)).mean(dim=0)
