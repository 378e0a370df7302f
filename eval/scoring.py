"""Scoring of runs, and of predictions made elsewhere: a pure function of predictions for test sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensembler.calibration_maps import FLOOR, temper
from ensembler.eval.given import GivenSet
from ensembler.eval.metrics.classes import (
    CLASSES,
    IMAGES,
    Places,
    class_scores,
    confusion,
    shown_images,
    surest_mistakes,
    wrong_by_class,
)
from ensembler.eval.metrics.classification import nll, scores
from ensembler.eval.metrics.comparison import Losses
from ensembler.eval.metrics.groups import Groups, Reduced, compare_groups, reduce_groups
from ensembler.eval.metrics.ood import OodScores, detector_scores, detectors
from ensembler.eval.metrics.recalibration import fit_temperature
from ensembler.eval.predictions import Prediction
from ensembler.eval.report.schema import CellScores, RunReport, SingleMember, mean_scores
from ensembler.eval.shift.corruptions import FAMILIES, SEVERITIES
from ensembler.eval.shift.test_set import Shift, TestSet
from ensembler.eval.views import passes
from ensembler.run import Manifest

__all__ = ["ScoredRun", "Subject", "score"]

Labels = NDArray[np.int64]

_WHOLE = Places()


@dataclass(frozen=True)
class Subject:
    """What is scored.

    Attributes:
        name: in reports.
        manifest: of a run; ``None`` for predictions made elsewhere.
        sha256: of the run's manifest, or of the file of predictions; ``None`` for arrays.
        validation_sha256: of the validation images; ``None`` if unknown.
        views: variations of each image that were predicted; 0 for the image itself.
    """

    name: str
    manifest: Manifest | None = None
    sha256: str | None = None
    validation_sha256: str | None = None
    views: int = 0


@dataclass(frozen=True, eq=False)
class ScoredRun:
    """The data of one run for figures and comparisons.

    Attributes:
        manifest: the run's; ``None`` for predictions made elsewhere.
        views: see :class:`Subject`.
        validation, validation_labels: its prediction, with every member's, and the labels; ``None`` without any.
        clean: its prediction of the clean test images, with every member's.
        losses: on the clean test images.
        shifted: on the shift's headline corruptions.
        shifted_calibrated: the same with the temperature of the validation images; ``None`` without any.
        entropies: predictive entropy (B,) in nats, of the clean test images and of each out-of-distribution set.
    """

    manifest: Manifest | None
    views: int
    validation: Prediction | None
    validation_labels: Labels | None
    clean: Prediction
    losses: Losses
    shifted: Losses | None
    shifted_calibrated: Losses | None
    entropies: dict[str, NDArray[np.float64]]


def score(
    subjects: Sequence[Subject],
    found: Iterable[tuple[TestSet | GivenSet, Sequence[Prediction | None]]],
    shift: Shift | None = None,
    *,
    classes: Sequence[str],
    groups: NDArray[np.str_] | None = None,
    places: Places = _WHOLE,
) -> list[tuple[RunReport, ScoredRun]]:
    """Score runs.

    Args:
        subjects: the runs.
        found: each test set with a prediction by each run, or ``None`` where a run is not scored on it: first the
            validation sets, then the clean set, then others.
        shift: the shift that the shifted sets are of.
        classes: their names.
        groups: (B,) the name of each test image's group.
        places: of the test images.
    """
    scorers = [_Scorer(subject, classes, groups, places) for subject in subjects]
    headline = () if shift is None else shift.headline
    for test_set, each in found:
        for scorer, prediction in zip(scorers, each, strict=True):
            if prediction is not None:
                scorer.add(test_set, prediction, headline=test_set.name in headline)
    return [scorer.finish(headline) for scorer in scorers]


@dataclass(eq=False)
class _Scorer:
    """The scores of one run so far; predictions that are not needed later are not kept."""

    subject: Subject
    classes: Sequence[str]
    groups: NDArray[np.str_] | None
    places: Places
    validation: Prediction | None = None
    validation_labels: Labels | None = None
    temperature: float | None = None
    clean: Prediction = field(init=False)
    losses: Losses = field(init=False)
    scores: CellScores = field(init=False)
    members: list[SingleMember] = field(init=False)
    grouped: dict[str, Groups] = field(default_factory=dict)
    test_sets: dict[str, Reduced] = field(default_factory=dict)
    cells: dict[str, dict[int, CellScores]] = field(default_factory=dict)
    others: dict[str, CellScores] = field(default_factory=dict)
    headline: list[Losses] = field(default_factory=list)
    headline_calibrated: list[Losses] = field(default_factory=list)
    entropies: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    ood: dict[str, dict[str, OodScores | None]] = field(default_factory=dict)
    pictured: dict[str, Any] = field(init=False)
    class_errors: dict[str, list[NDArray[np.float64]]] = field(default_factory=dict)

    def add(self, test_set: TestSet | GivenSet, prediction: Prediction, *, headline: bool) -> None:
        labels = test_set.labels
        if labels is None:
            self.entropies[test_set.name] = prediction.predictive_entropy
            correct = self.losses.correct[0]
            self.ood[test_set.name] = detector_scores(_detectors(self.clean), correct, _detectors(prediction))
        elif test_set.group == "validation":
            self.validation, self.validation_labels = prediction, labels
            self.temperature = fit_temperature(prediction.mean, labels)
        elif test_set.group == "other":
            self.others[test_set.name] = _scores(prediction, labels, self.temperature)
        elif test_set.group == "clean":
            self.clean, self.losses = prediction, Losses.of(prediction.mean, labels)
            self.scores, self.members = _scores(prediction, labels, self.temperature), _members(prediction, labels)
            self.entropies[test_set.name] = prediction.predictive_entropy
            self.grouped["class"] = compare_groups(reduce_groups(self.losses, labels, self.classes))
            if self.groups is not None:
                names, places = np.unique(self.groups, return_inverse=True)
                self.grouped["group"] = compare_groups(reduce_groups(self.losses, places, names.tolist()))
            self.test_sets["clean"] = Reduced(self.losses)
            self.pictured = _by_class(prediction, labels, self.classes, self.places)
        else:
            cells = self.cells.setdefault(test_set.name, {})
            cells[test_set.severity or 0] = _scores(prediction, labels, self.temperature)
            losses = Losses.of(prediction.mean, labels)
            self.test_sets[" ".join(filter(None, (test_set.name, str(test_set.severity or ""))))] = Reduced(losses)
            outputs = test_set.classes if isinstance(test_set, TestSet) else None
            own = labels if outputs is None else np.asarray(outputs)[labels]
            errors = wrong_by_class(losses.error, own, len(self.classes))
            self.class_errors.setdefault(test_set.name, []).append(errors)
            if headline:
                self.headline.append(losses)
                if self.temperature is not None:
                    calibrated = temper(prediction.mean, self.temperature)
                    self.headline_calibrated.append(Losses.of(calibrated, labels))

    def finish(self, headline: Sequence[str]) -> tuple[RunReport, ScoredRun]:
        shifted, calibrated = (
            Losses.over_cells(cells) if cells else None for cells in (self.headline, self.headline_calibrated)
        )
        scored = ScoredRun(
            manifest=self.subject.manifest,
            views=self.subject.views,
            validation=self.validation,
            validation_labels=self.validation_labels,
            clean=self.clean,
            losses=self.losses,
            shifted=shifted,
            shifted_calibrated=calibrated,
            entropies=self.entropies,
        )
        return self._report(headline), scored

    def _report(self, headline: Sequence[str]) -> RunReport:
        means = [self.cells[name] for name in headline]
        complete = {name: levels for name, levels in self.cells.items() if levels.keys() == set(SEVERITIES)}
        families = {
            family: [complete[name] for name in names if name in complete] for family, names in FAMILIES.items()
        }
        return RunReport(
            name=self.subject.name,
            sha256=self.subject.sha256,
            members=self.clean.size,
            **_unknown() if self.subject.manifest is None else _made(self.subject.manifest),
            views=self.subject.views,
            forward_passes_per_prediction=passes(self.subject.views, self.clean.size),
            validation_examples=None if self.validation_labels is None else len(self.validation_labels),
            validation_sha256=self.subject.validation_sha256,
            temperature=self.temperature,
            clean=self.scores,
            single_members=self.members,
            by_severity={level: mean_scores([one[level] for one in means]) for level in SEVERITIES if means},
            by_family={family: _mean(levels) for family, levels in families.items() if levels},
            shifted=_mean(means) if means else None,
            cells=self.cells,
            others=self.others,
            ood=self.ood,
            groups=self.grouped | ({"test set": compare_groups(self.test_sets)} if len(self.test_sets) > 1 else {}),
            **self.pictured,
            class_errors=_errors_by_class(self.class_errors, self.classes),
        )


def _by_class(prediction: Prediction, labels: Labels, classes: Sequence[str], places: Places) -> dict[str, Any]:
    """Return what a report shows of classes and single images."""
    mean, entropy = prediction.mean, prediction.predictive_entropy
    shown = partial(shown_images, mean=mean, entropy=entropy, votes=prediction.classes, labels=labels)
    return {
        "confusion": confusion(mean.argmax(axis=1), labels, classes),
        "classes": class_scores(mean, labels, classes),
        "surest_mistakes": shown(surest_mistakes(mean, labels), classes=classes, places=places),
        "most_uncertain": shown(np.argsort(-entropy, kind="stable")[:IMAGES], classes=classes, places=places),
    }


def _errors_by_class(
    errors: Mapping[str, Sequence[NDArray[np.float64]]], classes: Sequence[str]
) -> dict[str, dict[str, float | None]]:
    """Return each class's error by corruption, mean over severities; of many classes, those with the highest error."""
    if not errors:
        return {}
    means = np.array([np.mean(levels, axis=0) for levels in errors.values()])
    order = np.argsort(-np.ma.masked_invalid(means).mean(axis=0).filled(-1.0), kind="stable")
    shown = sorted(order[:CLASSES].tolist())
    return {
        corruption: {classes[k]: None if np.isnan(row[k]) else float(row[k]) for k in shown}
        for corruption, row in zip(errors, means, strict=True)
    }


def _made(manifest: Manifest) -> dict[str, Any]:
    """Return how a run was made, and at what cost."""
    cost = manifest.cost
    return {
        "method": manifest.method,
        "architecture": manifest.architecture,
        "vertices": manifest.vertices,
        "parameters": manifest.parameters,
        "seed": manifest.seed,
        "training_example_passes": cost.example_passes,
        "training_forward_passes": cost.forward_passes,
        "training_unknown": cost.unknown,
        "training_seconds": cost.seconds,
        "training_peak_memory": cost.peak_memory,
        "training_device": cost.device,
    }


def _unknown() -> dict[str, Any]:
    """Return the same for predictions made elsewhere, of which nothing is known."""
    fields = ("architecture", "vertices", "parameters", "seed")
    costs = (f"training_{name}" for name in ("example_passes", "forward_passes", "seconds", "peak_memory", "device"))
    return {"method": "elsewhere", "training_unknown": []} | dict.fromkeys([*fields, *costs])


def _mean(cells: Sequence[dict[int, CellScores]]) -> CellScores:
    """Compute the mean over corruptions and severities."""
    return mean_scores([scores for levels in cells for scores in levels.values()])


def _scores(prediction: Prediction, labels: Labels, temperature: float | None) -> CellScores:
    information, disagreement = prediction.mutual_information, prediction.disagreement
    calibrated = None if temperature is None else nll(temper(prediction.mean, temperature), labels)
    return CellScores.model_validate(
        scores(prediction.mean, labels)
        | {
            "calibrated_nll": calibrated,
            "member_accuracy": float((prediction.classes == labels).mean()),
            "member_nll": float(_member_losses(prediction).mean()),
            "disagreement": None if disagreement is None else float(disagreement.mean()),
            "predictive_entropy": float(prediction.predictive_entropy.mean()),
            "expected_entropy": float(prediction.expected_entropy.mean(dtype=np.float64)),
            "mutual_information": None if information is None else float(information.mean(dtype=np.float64)),
        }
    )


def _members(prediction: Prediction, labels: Labels) -> list[SingleMember]:
    accuracies = (prediction.classes == labels).mean(axis=1)
    losses = _member_losses(prediction).mean(axis=1)
    return [
        SingleMember(accuracy=float(accuracy), nll=float(loss))
        for accuracy, loss in zip(accuracies, losses, strict=True)
    ]


def _member_losses(prediction: Prediction) -> NDArray[np.float64]:
    """Compute each member's ``-log p[label]`` (M, B), in nats."""
    likely = prediction.label_probabilities.astype(np.float64, order="C")  # the order in memory is that of the sum
    losses: NDArray[np.float64] = -np.log(np.maximum(likely, FLOOR))
    return losses


def _detectors(prediction: Prediction) -> dict[str, NDArray[np.float64] | None]:
    return detectors(prediction.mean, prediction.mutual_information, prediction.energy, prediction.max_logit)
