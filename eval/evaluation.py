"""Score runs side by side on the clean test set and under shift."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ensembler.datasets import Dataset
from ensembler.ensemble import Ensemble
from ensembler.errors import UsageError
from ensembler.eval.corruptions import SEVERITIES
from ensembler.eval.metrics import Reliability, ensemble_log_probs, reliability, scores
from ensembler.eval.report import CellScores, Report, RunReport, ShiftReport, mean_scores
from ensembler.eval.shift import Cell, Shift, find_shift
from ensembler.run import Run, versions
from ensembler.seeds import generator
from ensembler.uncertainty import uncertainty

__all__ = ["Diagrams", "evaluate"]


@dataclass(frozen=True)
class Diagrams:
    """One run's reliability, clean and pooled over the shift's headline cells."""

    clean: Reliability
    shifted: Reliability | None


def evaluate(
    paths: Sequence[Path],
    shift: str | None = None,
    *,
    data: Path | None = None,
    download: bool = False,
    examples: int | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    watch: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> tuple[Report, list[Diagrams]]:
    """Score every run on the same images.

    Each cell's images are made once and shown to all runs; each member sees each image once.

    Args:
        paths: the runs' folders, all trained on one dataset.
        shift: ``"cifar10c"``, or ``None`` for the clean test set alone.
        data: folder of the dataset's files and of the official shift's.
        download: fetch the dataset if it is missing.
        examples: use so many test images, drawn with ``seed``; by default all.
        device: where to compute.
        batch_size: images a forward pass.
        seed: of the generated corruptions and of the choice of examples.
        watch: told of every cell scored: its name, how many are done, of how many.

    Returns:
        The report, and each run's reliability diagrams.

    Raises:
        UsageError: no run, runs of different datasets, or an option out of range.
        DataError: the dataset is missing or not the one that the runs were trained on.
    """
    runs = [Run.load(path) for path in paths]
    dataset = _common_dataset(runs, paths, data, download)
    indices = _choose(len(dataset.test), examples, seed)
    shifted = None if shift is None else find_shift(shift, dataset, indices, data, seed)
    test = shifted.test if shifted else dataset.test[indices]
    labels = test.labels.numpy()
    cells: list[Cell | None] = [None, *(shifted.cells() if shifted else ())]

    ensembles = [Ensemble(run, device, batch_size) for run in runs]
    found: list[dict[Cell | None, CellScores]] = [{} for _ in runs]
    pooled: list[list[NDArray[np.float64]]] = [[] for _ in runs]
    clean: list[Reliability] = []
    for number, cell in enumerate(cells):
        images = test.images if cell is None or shifted is None else shifted.images(cell)
        for run, ensemble in enumerate(ensembles):
            members = ensemble.predict_members(images).numpy()
            probabilities = np.exp(ensemble_log_probs(members))
            found[run][cell] = _score(members, probabilities, labels)
            if cell is None:
                clean.append(reliability(probabilities, labels))
            elif shifted is not None and cell.corruption in shifted.headline:
                pooled[run].append(probabilities)
            label = "clean" if cell is None else f"{cell.corruption} {cell.severity}"
            watch(label, number * len(runs) + run + 1, len(cells) * len(runs))

    report = Report(
        dataset=dataset.title,
        test_examples=len(test),
        test_sha256=test.sha256,
        shift=_describe(shifted),
        runs=[
            _run_report(run, path, scores_of, shifted) for run, path, scores_of in zip(runs, paths, found, strict=True)
        ],
        device=str(ensembles[0].device),
        seed=seed,
        versions=versions(),
    )
    diagrams = [
        Diagrams(one, reliability(np.concatenate(parts), np.tile(labels, len(parts))) if parts else None)
        for one, parts in zip(clean, pooled, strict=True)
    ]
    return report, diagrams


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


def _score(members: NDArray[np.float32], probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> CellScores:
    doubt = uncertainty(members)
    return CellScores(
        **scores(probabilities, labels),
        member_accuracy=float((members.argmax(axis=2) == labels).mean()),
        disagreement=None if doubt.disagreement is None else float(doubt.disagreement.mean()),
        predictive_entropy=float(doubt.predictive_entropy.mean()),
        mutual_information=None if doubt.mutual_information is None else float(doubt.mutual_information.mean()),
    )


def _run_report(run: Run, path: Path, found: dict[Cell | None, CellScores], shift: Shift | None) -> RunReport:
    manifest = run.manifest
    by_severity, everything = {}, None
    if shift is not None:
        headline = {cell: s for cell, s in found.items() if cell is not None and cell.corruption in shift.headline}
        by_severity = {
            severity: mean_scores([s for cell, s in headline.items() if cell.severity == severity])
            for severity in SEVERITIES
        }
        everything = mean_scores(list(headline.values()))
    return RunReport(
        name=path.resolve().name,
        method=manifest.method,
        architecture=manifest.architecture,
        vertices=manifest.vertices,
        members=manifest.members,
        parameters=manifest.parameters,
        seed=manifest.seed,
        training_example_passes=manifest.cost.example_passes,
        training_forward_passes=manifest.cost.forward_passes,
        training_unknown=manifest.cost.unknown,
        training_seconds=manifest.cost.seconds,
        training_peak_memory=manifest.cost.peak_memory,
        training_device=manifest.cost.device,
        forward_passes_per_prediction=manifest.members,
        clean=found[None],
        by_severity=by_severity,
        shifted=everything,
        cells={
            corruption: {severity: found[Cell(corruption, severity)] for severity in SEVERITIES}
            for corruption in (shift.corruptions if shift else ())
        },
    )


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
