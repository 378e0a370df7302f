"""Score runs side by side: on the clean test set, under shift, and on images of another kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ensembler import artefact
from ensembler.datasets import Dataset
from ensembler.engine import Engine
from ensembler.ensemble import Ensemble
from ensembler.errors import UsageError
from ensembler.eval.predictions import Prediction, Predictor, Slice, default_folder, predictions
from ensembler.eval.report.schema import (
    CellScores,
    OodReport,
    Report,
    RunReport,
    ShiftReport,
    SingleMember,
    mean_scores,
)
from ensembler.eval.scores.comparison import Losses
from ensembler.eval.scores.metrics import FLOOR, fit_temperature, nll, scores, temper
from ensembler.eval.scores.ood import OodScores, detector_scores, detectors, load_ood
from ensembler.eval.scores.shift_scores import FAMILIES
from ensembler.eval.shift.corruptions import SEVERITIES
from ensembler.eval.shift.find import Cell, Shift, find_shift
from ensembler.images import Images, Split
from ensembler.memory import keep_freed
from ensembler.run import Manifest, Run, versions
from ensembler.seeds import generator

__all__ = ["Evaluation", "Scored", "evaluate"]

Labels = NDArray[np.int64]

_BATCH = 2**26  # bytes of images that are made at once


@dataclass(frozen=True, eq=False)
class Scored:
    """What pictures and comparisons need of one run, beyond its scores.

    Attributes:
        manifest: the run's.
        validation, clean: its predictions, every member's.
        losses: of the clean test images.
        shifted: of the shift's headline cells.
        entropies: predictive entropy (B,) in nats, of the clean test images and of each set of unknown ones.
    """

    manifest: Manifest
    validation: Prediction
    clean: Prediction
    losses: Losses
    shifted: Losses | None
    entropies: dict[str, NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A report, and what pictures and comparisons are made from.

    Attributes:
        report: every score.
        runs: in the report's order.
        labels: (B,) of the test images.
        validation_labels: of the validation images.
    """

    report: Report
    runs: list[Scored]
    labels: Labels
    validation_labels: Labels


def evaluate(
    paths: Sequence[Path],
    shift: str | None = None,
    *,
    ood: Sequence[str] = (),
    data: Path | None = None,
    download: bool = False,
    examples: int | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    cache: Path | None = None,
    watch: Callable[[str, int, int], None] = lambda label, done, total: None,
    threads: int | None = None,
    engine: Engine | None = None,
) -> Evaluation:
    """Score every run on the same images.

    Each slice's images are made once and shown to all runs; each member sees each image once, and what a run said of
    them is kept (:mod:`ensembler.eval.predictions`).

    Args:
        paths: the runs' folders, all trained on one dataset.
        shift: one of :data:`ensembler.eval.shift.find.SHIFTS`, or ``None`` for the clean test set alone.
        ood: sets of images of another kind, as :func:`ensembler.eval.scores.ood.load_ood` names them.
        data: folder of the dataset's files and of the official shift's.
        download: fetch the dataset if it is missing.
        examples: use so many test images, drawn with ``seed``; by default all.
        device: where to compute.
        batch_size: images a forward pass.
        seed: of the generated corruptions and of the choice of examples.
        cache: where predictions are kept; by default :func:`ensembler.eval.predictions.default_folder`.
        watch: told of every slice: its name, how many are done, of how many.
        threads: CPU threads that compute, set for the whole process; by default as they are.
        engine: what makes predictions for a shift's cells and for images of another kind; by default this process.

    Raises:
        UsageError: no run, runs of different datasets, or an option out of range.
        DataError: the dataset is missing or not the one that the runs were trained on.
        ArtefactError: predictions cannot be kept.
        EngineError: the engine has lost a piece.
    """
    paths = [path.resolve() if path.is_symlink() else path for path in paths]  # latest may be another one soon
    if threads is not None:
        if threads < 1:
            raise UsageError(f"threads must be at least 1, not {threads}")
        torch.set_num_threads(threads)
    runs = [Run.load(path) for path in paths]
    dataset = _common_dataset(runs, paths, data, download)
    indices = _choose(len(dataset.test), examples, seed)
    shifted = None if shift is None else find_shift(shift, dataset, indices, data, seed)
    test, validation = dataset.test.part(indices), dataset.validation
    shape = test.shape
    unknown = [load_ood(name, shape, root=data, download=download, examples=examples, seed=seed) for name in ood]
    folder = cache or default_folder()
    artefact.check_writable(folder, "choose another --cache")
    hashes = [run.sha256 for run in runs]
    predictors = [
        Predictor(Ensemble(run, device, batch_size), sha256, folder) for run, sha256 in zip(runs, hashes, strict=True)
    ]
    keep_freed(predictors[0].ensemble.device)
    cells = list(shifted.cells()) if shifted else []
    slices = [
        Slice("validation", validation.sha256, _batches(validation), _labels(validation), members=True),
        Slice("clean", test.sha256, _batches(test), _labels(test), members=True),
        *(_of_cell(shifted, cell, _labels(test)) for cell in cells if shifted),
        *(Slice(one.name, _sha256(one.images), partial(iter, (one.images,)), None) for one in unknown),
    ]
    scorers = [_Scorer(run, path, sha256) for run, path, sha256 in zip(runs, paths, hashes, strict=True)]
    for number, (images, found) in enumerate(predictions(predictors, slices, watch, engine)):
        for scorer, prediction in zip(scorers, found, strict=True):
            if number == 0:
                scorer.see_validation(prediction, _labels(validation))
            elif number == 1:
                scorer.see_clean(prediction, _labels(test))
            elif number < 2 + len(cells) and shifted:
                cell = cells[number - 2]
                scorer.see_cell(cell, prediction, _labels(test), headline=cell.corruption in shifted.headline)
            else:
                scorer.see_unknown(images.name, prediction)
    report = Report(
        dataset=dataset.title,
        test_examples=len(test),
        test_sha256=test.sha256,
        validation_examples=len(validation),
        validation_sha256=validation.sha256,
        shift=_describe(shifted),
        ood=[OodReport(name=one.name, title=one.title, source=one.source, images=len(one.images)) for one in unknown],
        runs=[scorer.report(shifted) for scorer in scorers],
        device=str(predictors[0].ensemble.device),
        seed=seed,
        versions=versions(),
    )
    return Evaluation(report, [scorer.scored() for scorer in scorers], _labels(test), _labels(validation))


class _Scorer:
    """One run's scores, as its predictions come in."""

    def __init__(self, run: Run, path: Path, sha256: str) -> None:
        self._manifest, self._name, self._sha256 = run.manifest, path.resolve().name, sha256
        self._cells: dict[Cell, CellScores] = {}
        self._headline: list[Losses] = []
        self._entropies: dict[str, NDArray[np.float64]] = {}
        self._ood: dict[str, dict[str, OodScores | None]] = {}

    def see_validation(self, prediction: Prediction, labels: Labels) -> None:
        self._validation, self.temperature = prediction, fit_temperature(prediction.mean, labels)

    def see_clean(self, prediction: Prediction, labels: Labels) -> None:
        self._prediction, self._losses = prediction, Losses.of(prediction.mean, labels)
        self._clean = self._score(prediction, labels)
        self._entropies["clean"] = prediction.predictive_entropy
        probabilities = np.maximum(prediction.label_probabilities, FLOOR)
        self._members = [
            SingleMember(accuracy=float(accuracy), nll=float(loss))
            for accuracy, loss in zip(
                (prediction.classes == labels).mean(axis=1), -np.log(probabilities).mean(axis=1), strict=True
            )
        ]

    def see_cell(self, cell: Cell, prediction: Prediction, labels: Labels, *, headline: bool) -> None:
        self._cells[cell] = self._score(prediction, labels)
        if headline:
            self._headline.append(Losses.of(prediction.mean, labels))

    def see_unknown(self, name: str, prediction: Prediction) -> None:
        self._entropies[name] = prediction.predictive_entropy
        self._ood[name] = detector_scores(_detectors(self._prediction), _detectors(prediction))

    def scored(self) -> Scored:
        shifted = Losses.over_cells(self._headline) if self._headline else None
        return Scored(self._manifest, self._validation, self._prediction, self._losses, shifted, self._entropies)

    def report(self, shift: Shift | None) -> RunReport:
        manifest, cost = self._manifest, self._manifest.cost
        cells = {cell: found for cell, found in self._cells.items() if shift and cell.corruption in shift.headline}
        return RunReport(
            name=self._name,
            sha256=self._sha256,
            method=manifest.method,
            architecture=manifest.architecture,
            vertices=manifest.vertices,
            members=manifest.members,
            parameters=manifest.parameters,
            seed=manifest.seed,
            training_example_passes=cost.example_passes,
            training_forward_passes=cost.forward_passes,
            training_unknown=cost.unknown,
            training_seconds=cost.seconds,
            training_peak_memory=cost.peak_memory,
            training_device=cost.device,
            forward_passes_per_prediction=manifest.members,
            temperature=self.temperature,
            clean=self._clean,
            single_members=self._members,
            by_severity={
                severity: mean_scores([found for cell, found in cells.items() if cell.severity == severity])
                for severity in (SEVERITIES if cells else ())
            },
            by_family={
                family: mean_scores([found for cell, found in self._cells.items() if cell.corruption in names])
                for family, names in FAMILIES.items()
                if any(cell.corruption in names for cell in self._cells)
            },
            shifted=mean_scores(list(cells.values())) if cells else None,
            cells={
                corruption: {severity: self._cells[Cell(corruption, severity)] for severity in SEVERITIES}
                for corruption in (shift.corruptions if shift else ())
            },
            ood=self._ood,
        )

    def _score(self, prediction: Prediction, labels: Labels) -> CellScores:
        information, disagreement = prediction.mutual_information, prediction.disagreement
        return CellScores.model_validate(
            scores(prediction.mean, labels)
            | {
                "calibrated_nll": nll(temper(prediction.mean, self.temperature), labels),
                "member_accuracy": float((prediction.classes == labels).mean()),
                "member_nll": float(-np.log(np.maximum(prediction.label_probabilities, FLOOR)).mean()),
                "disagreement": None if disagreement is None else float(disagreement.mean()),
                "predictive_entropy": float(prediction.predictive_entropy.mean()),
                "expected_entropy": float(prediction.expected_entropy.mean(dtype=np.float64)),
                "mutual_information": None if information is None else float(information.mean()),
            }
        )


def _detectors(prediction: Prediction) -> dict[str, NDArray[np.float64] | None]:
    return detectors(prediction.mean, None if prediction.size == 1 else prediction.expected_entropy)


def _batches(images: Images) -> Callable[[], Iterable[Tensor]]:
    return lambda: (part.images for part in images.batches(_batch_size(images)))


def _of_cell(shift: Shift, cell: Cell, labels: Labels) -> Slice:
    batches = partial(shift.batches, cell, _batch_size(shift.test))
    return Slice(f"{cell.corruption} {cell.severity}", shift.key(cell), batches, labels)


def _batch_size(images: Images) -> int:
    height, width = images.shape
    return max(1, _BATCH // (3 * height * width))


def _labels(images: Images) -> Labels:
    labels: Labels = images.labels.numpy()
    return labels


def _sha256(images: Tensor) -> str:
    return Split(images, torch.empty(0, dtype=torch.int64)).sha256


def _common_dataset(runs: list[Run], paths: Sequence[Path], data: Path | None, download: bool) -> Dataset:
    if not runs:
        raise UsageError("no run to evaluate: name at least one")
    first = runs[0].manifest.dataset
    for run, path in zip(runs, paths, strict=True):
        if run.manifest.dataset.test_sha256 != first.test_sha256:
            raise UsageError(
                f"{path} was trained on {run.manifest.dataset.title} and {paths[0]} on {first.title}: "
                "evaluate runs of one dataset together"
            )
    dataset = first.load(data, download=download)
    for run in runs:
        run.manifest.dataset.check(dataset)
    return dataset


def _choose(available: int, examples: int | None, seed: int) -> Tensor:
    if examples is None:
        return torch.arange(available)
    if not 1 <= examples <= available:
        raise UsageError(f"the test set has {available} images: cannot evaluate on {examples}")
    return torch.randperm(available, generator=generator(seed, "examples"))[:examples].sort().values


def _describe(shift: Shift | None) -> ShiftReport | None:
    if shift is None:
        return None
    return ShiftReport(
        name=shift.name,
        source=shift.source,
        note=shift.note,
        corruptions=list(shift.corruptions),
        headline=list(shift.headline),
        not_covered=list(shift.not_covered),
    )
