"""Calibration of a run on its validation split; applied by :mod:`ensembler.calibration`.

A random half of the split fits the map; the other half gives the conformal scores and certifies the threshold: as the
map has seen the labels of the first half, only the second is exchangeable with new images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from ensembler.arguments import checked
from ensembler.calibration import Calibration, Conformal, ConformalMethod, conformal_quantile, conformal_scores
from ensembler.calibration_maps import Temperature
from ensembler.errors import UsageError
from ensembler.eval.metrics.classification import Answers, scores
from ensembler.eval.metrics.recalibration import fit_map, fit_threshold
from ensembler.eval.options import CalibrationOptions
from ensembler.seeds import derive

if TYPE_CHECKING:
    from ensembler.networks.architectures import Factory

__all__ = ["calibrate", "fit", "summary"]

Array = NDArray[np.float64]

_TITLES = {"error": "the error", "nll": "the NLL", "ece": "the ECE"}
_ROUNDING = 1e-9  # of a score


@checked
def calibrate(
    path: str | Path,
    options: CalibrationOptions | None = None,
    *,
    dataset: Any = None,
    watch: Callable[[str, int, int], None] = lambda label, done, total: None,
    network: Factory | None = None,
) -> Calibration:
    """Fit a calibration to a run's validation split; :func:`ensembler.calibration.save` stores it.

    The validation prediction is shared with evaluations, through the cache.

    Args:
        path: the run's folder.
        options: what is fitted, and how the prediction is made.
        dataset: what the run was trained on, where it has no name to load it by; see :func:`ensembler.as_dataset`.
        watch: called with a title, how many images are done, and of how many.
        network: what builds the run's network, where it cannot be imported.

    Raises:
        UsageError: too few validation images for the method.
        DataError: the dataset is missing or not the one that the run was trained on.
        ArtefactError: no run there, or the prediction cannot be kept.
    """
    from ensembler.device import default_modes
    from ensembler.ensemble import Ensemble
    from ensembler.eval.evaluation import check_task
    from ensembler.eval.prediction_cache import folder_of
    from ensembler.eval.predictions import Predictor, predictions
    from ensembler.eval.shift.test_set import validation_set
    from ensembler.uncertainty import mean_probabilities

    options = options or CalibrationOptions()
    ensemble = Ensemble.load(path, options.device, options.batch_size, network)
    check_task(ensemble.run)
    record = ensemble.run.manifest.dataset
    given = options.dataset if dataset is None else dataset
    validation = record.load(options.data, download=options.download, dataset=given).validation
    folder = folder_of(options.cache)
    with default_modes():
        ((_, (prediction,)),) = predictions([Predictor(ensemble, folder)], [validation_set(validation)], watch)
    return fit(
        mean_probabilities(np.asarray(prediction.members)),  # in float64, as it is served: a threshold may be a tie
        validation.labels.numpy(),
        options,
        run_sha256=ensemble.run.sha256,
        dataset=record.title,
        validation_sha256=validation.sha256,
    )


def fit(
    probs: Array,
    labels: NDArray[np.int64],
    options: CalibrationOptions | None = None,
    *,
    run_sha256: str,
    dataset: str,
    validation_sha256: str,
) -> Calibration:
    """Fit a calibration to an ensemble's pooled probabilities (B, C) of held-out images and their labels (B,).

    Args:
        probs: (B, C).
        labels: (B,).
        options: what is fitted.
        run_sha256: a field of the calibration.
        dataset: likewise.
        validation_sha256: likewise.

    Raises:
        UsageError: too few examples for the method.
        ShapeError: probabilities or labels of the wrong shape or range.
    """
    from ensembler.run import versions

    options = options or CalibrationOptions()
    answers = Answers(probs, labels)
    if len(labels) < 2:
        raise UsageError(f"{len(labels)} validation image cannot calibrate: train on a dataset with at least two")
    order = np.random.default_rng(derive(options.seed, "calibration")).permutation(len(labels))
    seen, held_out = np.split(order, [len(order) // 2])
    mapping = fit_map(answers.p[seen], labels[seen], options.method)
    p, y = mapping(answers.p[held_out]), labels[held_out]
    label_scores = {name: conformal_scores(p, name)[np.arange(len(y)), y] for name in get_args(ConformalMethod)}
    abstention = None
    if options.risk is not None:
        seen_probs = mapping(answers.p[seen])
        abstention = fit_threshold(seen_probs, labels[seen], p, y, options.risk, options.confidence)
    return Calibration(
        run_sha256=run_sha256,
        dataset=dataset,
        validation_sha256=validation_sha256,
        classes=answers.p.shape[1],
        fitted=len(seen),
        held_out=len(held_out),
        seed=options.seed,
        map=mapping,
        conformal=Conformal(
            method=options.conformal,
            alpha=options.alpha,
            **{name: np.sort(found).tolist() for name, found in label_scores.items()},
        ),
        abstention=abstention,
        before=scores(answers.p[held_out], y),
        after=scores(p, y),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
    )


def summary(calibration: Calibration) -> str:
    """Describe a calibration in a few lines: the fit, its scores and its guarantees."""
    before, after = calibration.before, calibration.after
    mapping, conformal = calibration.map, calibration.conformal
    what = f"T = {mapping.temperature:.4g}" if isinstance(mapping, Temperature) else f"by {mapping.method}"
    lines = [
        f"{calibration.dataset}, validation images: {calibration.fitted:,} to fit the map ({what}), "
        f"{calibration.held_out:,} others for the figures below",
        f"error {_percent(before['error'])} -> {_percent(after['error'])}, NLL {before['nll']:.4f} -> "
        f"{after['nll']:.4f}, ECE {_percent(before['ece'])} -> {_percent(after['ece'])}",
    ]
    if worse := [title for name, title in _TITLES.items() if (after[name] or 0) > (before[name] or 0) + _ROUNDING]:
        lines.append(
            f"warning: on these images, which the map has not seen, it makes {' and '.join(worse)} worse: to leave the "
            "probabilities as they are, calibrate with --method identity"
        )
    threshold = conformal_quantile(conformal.lac if conformal.method == "lac" else conformal.aps, conformal.alpha)
    promise = (
        f"{conformal.method.upper()} sets hold the true class in at least {_percent(1 - conformal.alpha)} of cases"
    )
    if math.isinf(threshold):
        needed = math.ceil(round(1 / conformal.alpha - 1, 9))
        lines.append(f"{promise}, by holding every class: smaller sets need at least {needed:,} held-out images")
    else:
        lines.append(f"{promise}, on average over calibrations (threshold {threshold:.4g})")
    if (abstention := calibration.abstention) is not None:
        wanted = f"at most {_percent(abstention.risk)} wrong answers with confidence {_percent(abstention.confidence)}"
        if abstention.threshold is None:
            lines.append(
                f"{wanted}: no threshold could be certified, so abstain always; allow more, or use more images"
            )
        else:
            lines.append(
                f"{wanted}: answer at a probability of at least {abstention.threshold:.4g}, as "
                f"{_percent(abstention.answered / calibration.held_out)} of the held-out images do, "
                f"{abstention.wrong:,} of {abstention.answered:,} wrongly"
            )
    lines.append("This holds for images like the validation split's, and not under shift")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.4g} %"
