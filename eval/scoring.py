"""Scoring of runs: a pure function of their predictions for test sets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ensembler.calibration_maps import FLOOR, temper
from ensembler.eval.metrics.classification import nll, scores
from ensembler.eval.metrics.comparison import Losses
from ensembler.eval.metrics.ood import OodScores, detector_scores, detectors
from ensembler.eval.metrics.recalibration import fit_temperature
from ensembler.eval.predictions import Prediction
from ensembler.eval.report.schema import CellScores, RunReport, SingleMember, mean_scores
from ensembler.eval.shift.corruptions import FAMILIES, SEVERITIES
from ensembler.eval.shift.test_set import Shift, TestSet
from ensembler.run import Manifest, Run

__all__ = ["ScoredRun", "score"]

Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ScoredRun:
    """The data of one run for figures and comparisons.

    Attributes:
        manifest: the run's.
        validation, clean: its predictions, with every member's.
        losses: on the clean test images.
        shifted: on the shift's headline corruptions.
        entropies: predictive entropy (B,) in nats, of the clean test images and of each out-of-distribution set.
    """

    manifest: Manifest
    validation: Prediction
    clean: Prediction
    losses: Losses
    shifted: Losses | None
    entropies: dict[str, NDArray[np.float64]]


def score(
    runs: Sequence[Run],
    names: Sequence[str],
    found: Iterable[tuple[TestSet, Sequence[Prediction]]],
    shift: Shift | None = None,
) -> list[tuple[RunReport, ScoredRun]]:
    """Score runs.

    Args:
        runs: the runs.
        names: of the runs.
        found: each test set with a prediction by each run: first the validation, then the clean set, then others.
        shift: the shift that the shifted sets are of.
    """
    scorers = [_Scorer(run, name) for run, name in zip(runs, names, strict=True)]
    headline = () if shift is None else shift.headline
    for test_set, each in found:
        for scorer, prediction in zip(scorers, each, strict=True):
            scorer.add(test_set, prediction, headline=test_set.name in headline)
    return [scorer.finish(headline) for scorer in scorers]


@dataclass(eq=False)
class _Scorer:
    """The scores of one run so far; predictions that are not needed later are not kept."""

    run: Run
    name: str
    validation: Prediction = field(init=False)
    temperature: float = field(init=False)
    clean: Prediction = field(init=False)
    losses: Losses = field(init=False)
    scores: CellScores = field(init=False)
    members: list[SingleMember] = field(init=False)
    cells: dict[str, dict[int, CellScores]] = field(default_factory=dict)
    headline: list[Losses] = field(default_factory=list)
    entropies: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    ood: dict[str, dict[str, OodScores | None]] = field(default_factory=dict)

    def add(self, test_set: TestSet, prediction: Prediction, *, headline: bool) -> None:
        labels = test_set.labels
        if labels is None:
            self.entropies[test_set.name] = prediction.predictive_entropy
            correct = self.losses.correct[0]
            self.ood[test_set.name] = detector_scores(_detectors(self.clean), correct, _detectors(prediction))
        elif test_set.group == "validation":
            self.validation, self.temperature = prediction, fit_temperature(prediction.mean, labels)
        elif test_set.group == "clean":
            self.clean, self.losses = prediction, Losses.of(prediction.mean, labels)
            self.scores, self.members = _scores(prediction, labels, self.temperature), _members(prediction, labels)
            self.entropies[test_set.name] = prediction.predictive_entropy
        else:
            cells = self.cells.setdefault(test_set.name, {})
            cells[test_set.severity or 0] = _scores(prediction, labels, self.temperature)
            if headline:
                self.headline.append(Losses.of(prediction.mean, labels))

    def finish(self, headline: Sequence[str]) -> tuple[RunReport, ScoredRun]:
        shifted = Losses.over_cells(self.headline) if self.headline else None
        manifest = self.run.manifest
        scored = ScoredRun(manifest, self.validation, self.clean, self.losses, shifted, self.entropies)
        return self._report(headline), scored

    def _report(self, headline: Sequence[str]) -> RunReport:
        manifest, cost = self.run.manifest, self.run.manifest.cost
        means = [self.cells[name] for name in headline]
        families = {family: [self.cells[n] for n in names if n in self.cells] for family, names in FAMILIES.items()}
        return RunReport(
            name=self.name,
            sha256=self.run.sha256,
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
            clean=self.scores,
            single_members=self.members,
            by_severity={level: mean_scores([one[level] for one in means]) for level in SEVERITIES if means},
            by_family={family: _mean(levels) for family, levels in families.items() if levels},
            shifted=_mean(means) if means else None,
            cells=self.cells,
            ood=self.ood,
        )


def _mean(cells: Sequence[dict[int, CellScores]]) -> CellScores:
    """Compute the mean over corruptions and severities."""
    return mean_scores([scores for levels in cells for scores in levels.values()])


def _scores(prediction: Prediction, labels: Labels, temperature: float) -> CellScores:
    information, disagreement = prediction.mutual_information, prediction.disagreement
    return CellScores.model_validate(
        scores(prediction.mean, labels)
        | {
            "calibrated_nll": nll(temper(prediction.mean, temperature), labels),
            "member_accuracy": float((prediction.classes == labels).mean()),
            "member_nll": float(-np.log(np.maximum(prediction.label_probabilities, FLOOR)).mean()),
            "disagreement": None if disagreement is None else float(disagreement.mean()),
            "predictive_entropy": float(prediction.predictive_entropy.mean()),
            "expected_entropy": float(prediction.expected_entropy.mean(dtype=np.float64)),
            "mutual_information": None if information is None else float(information.mean()),
        }
    )


def _members(prediction: Prediction, labels: Labels) -> list[SingleMember]:
    accuracies = (prediction.classes == labels).mean(axis=1)
    losses = -np.log(np.maximum(prediction.label_probabilities, FLOOR)).mean(axis=1)
    return [
        SingleMember(accuracy=float(accuracy), nll=float(loss))
        for accuracy, loss in zip(accuracies, losses, strict=True)
    ]


def _detectors(prediction: Prediction) -> dict[str, NDArray[np.float64] | None]:
    spread = None if prediction.size == 1 else prediction.expected_entropy
    return detectors(prediction.mean, spread, prediction.energy, prediction.max_logit)
