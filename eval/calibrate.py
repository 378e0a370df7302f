"""Fit a calibration to a run's validation split: :mod:`ensembler.calibration` says what it is and applies it.

One half of the split, drawn with a seed, fits the map. The other half gives the conformal scores and certifies the
threshold: the map has seen the first half's labels, so only the second is exchangeable with images to come.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from ensembler.calibration import (
    Abstention,
    Beta,
    Calibration,
    Conformal,
    ConformalMethod,
    Histogram,
    Isotonic,
    Map,
    Temperature,
    conformal_quantile,
    conformal_scores,
)
from ensembler.errors import UsageError
from ensembler.eval.scores.metrics import fit_temperature, nll, scores
from ensembler.seeds import derive

__all__ = ["METHODS", "calibrate", "certify", "fit", "fit_map", "summary"]

METHODS = ("temperature", "isotonic", "beta", "histogram")

_BINS = 15  # of a histogram
_CANDIDATES = 100  # thresholds tried

Array = NDArray[np.float64]


def calibrate(
    path: Path,
    method: str = "temperature",
    *,
    alpha: float = 0.1,
    conformal: str = "lac",
    risk: float | None = None,
    confidence: float = 0.95,
    data: Path | None = None,
    download: bool = False,
    device: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    watch: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> Calibration:
    """Fit a calibration to a run's validation split; :func:`ensembler.calibration.save` stores it.

    Args:
        path: the run's folder.
        method: of the map: one of ``METHODS``.
        alpha: 1 - alpha is the coverage of the conformal sets, unless another is asked for when they are made.
        conformal: ``"lac"`` or ``"aps"``, likewise.
        risk: the error rate among the answers that is not to be exceeded; ``None`` for no threshold.
        confidence: with what probability.
        data: folder of the dataset's files.
        download: fetch the dataset if it is missing.
        device: where to compute.
        batch_size: images a forward pass.
        seed: of the choice of the half that fits the map.
        watch: told how many images have been predicted, of how many.

    Raises:
        UsageError: an option out of range, or too few validation images for the method.
        DataError: the dataset is missing or not the one that the run was trained on.
        ArtefactError: no run there.
    """
    from ensembler.ensemble import Ensemble
    from ensembler.uncertainty import mean_probabilities

    _check(method, alpha, conformal, risk, confidence)
    ensemble = Ensemble.load(path, device, batch_size)
    record = ensemble.run.manifest.dataset
    validation = record.load(data, download=download).validation
    probs = np.empty((len(validation), len(ensemble.classes)))
    done = 0
    for batch in validation.batches(16 * ensemble.batch_size):
        probs[done : done + len(batch)] = mean_probabilities(ensemble.predict_members(batch.images).numpy())
        done += len(batch)
        watch("validation images", done, len(validation))
    return fit(
        probs,
        validation.labels.numpy(),
        method,
        alpha=alpha,
        conformal=conformal,
        risk=risk,
        confidence=confidence,
        seed=seed,
        run_sha256=ensemble.run.sha256,
        dataset=record.title,
        validation_sha256=validation.sha256,
    )


def fit(
    probs: Array,
    labels: NDArray[np.int64],
    method: str = "temperature",
    *,
    alpha: float = 0.1,
    conformal: str = "lac",
    risk: float | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    run_sha256: str,
    dataset: str,
    validation_sha256: str,
) -> Calibration:
    """Fit a calibration to an ensemble's pooled probabilities (B, C) of held-out images and their labels (B,).

    The other arguments are :func:`calibrate`'s, and what the calibration is to say of its origin.

    Raises:
        UsageError: an option out of range, or too few examples for the method.
        ShapeError: probabilities or labels of the wrong shape or range.
    """
    from ensembler.run import versions

    _check(method, alpha, conformal, risk, confidence)
    nll(probs, labels)  # checks them
    if len(labels) < 2:
        raise UsageError(f"{len(labels)} validation image cannot calibrate: one fits the map, others what follows")
    order = np.random.default_rng(derive(seed, "calibration")).permutation(len(labels))
    seen, held_out = np.split(order, [len(order) // 2])
    mapping = fit_map(probs[seen], labels[seen], method)
    p, y = mapping(probs[held_out]), labels[held_out]
    of_label = {name: conformal_scores(p, name)[np.arange(len(y)), y] for name in get_args(ConformalMethod)}
    abstention = None
    if risk is not None:
        abstention = _abstention(mapping(probs[seen]), labels[seen], p, y, risk, confidence)
    return Calibration(
        run_sha256=run_sha256,
        dataset=dataset,
        validation_sha256=validation_sha256,
        classes=probs.shape[1],
        fitted=len(seen),
        held_out=len(held_out),
        seed=seed,
        map=mapping,
        conformal=Conformal(
            method=cast(ConformalMethod, conformal),
            alpha=alpha,
            **{name: np.sort(found).tolist() for name, found in of_label.items()},
        ),
        abstention=abstention,
        before=scores(probs[held_out], y),
        after=scores(p, y),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
    )


def fit_map(probs: Array, labels: NDArray[np.int64], method: str) -> Map:
    """Fit one of ``METHODS`` to probabilities (B, C) and labels (B,); all but temperature by netcal.

    netcal's maps treat each class by itself and normalise the rows. Isotonic regression and histograms can so give a
    class the probability 0 that it has not; where they give it to every class, the row stays as it was.

    Raises:
        UsageError: an unknown method, or a class without any example, of which netcal would make the probability 0.
        ShapeError: probabilities or labels of the wrong shape or range.
    """
    if method == "temperature":
        return Temperature(temperature=fit_temperature(probs, labels))
    nll(probs, labels)  # checks them: netcal names no wrong input
    if method not in METHODS:
        raise UsageError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    if probs.shape[1] < 2:
        raise UsageError(f"{method} calibrates two classes or more, found one: use --method temperature")
    if len(missing := np.setdiff1d(np.arange(probs.shape[1]), labels)):
        raise UsageError(
            f"{method} needs examples of every class, and of class {missing[0]} there is none among the {len(labels)} "
            "that fit the map: use --method temperature"
        )
    fitted = _fit_netcal(np.minimum(probs.astype(np.float64), 1.0), labels, method)
    if method == "beta":
        sites = {name: np.asarray(site["values"], dtype=np.float64) for name, site in fitted._sites.items()}
        ab, c = sites["weights"].reshape(-1, 2), sites["bias"]
        if len(c) == 1:  # a sigmoid is a softmax beside a 0
            ab, c = np.vstack([[0.0, 0.0], ab]), np.append(0.0, c)
        return Beta(a=ab[:, 0].tolist(), b=ab[:, 1].tolist(), c=c.tolist())
    one_vs_rest = [model for _, model in fitted._multiclass_instances] or [fitted]
    if method == "histogram":
        return Histogram(y=[model._bin_map.tolist() for model in one_vs_rest])
    return Isotonic(
        x=[model._iso.X_thresholds_.tolist() for model in one_vs_rest],
        y=[model._iso.y_thresholds_.tolist() for model in one_vs_rest],
    )


def _fit_netcal(probs: Array, labels: NDArray[np.int64], method: str) -> Any:
    from netcal.binning import HistogramBinning, IsotonicRegression
    from netcal.scaling import BetaCalibration

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pyro's, of netcal's calls
        if method == "beta":
            return BetaCalibration().fit(probs, labels, tensorboard=False)
        model = IsotonicRegression() if method == "isotonic" else HistogramBinning(bins=_BINS)
        return model.fit(probs, labels)


def certify(
    confidence: Array, correct: NDArray[np.bool_], thresholds: Array, risk: float, delta: float
) -> float | None:
    """The last of a sequence of thresholds at which the selective risk is certified: Learn-then-Test.

    At each threshold, "more than a share ``risk`` of the answers is wrong" is tested by the exact binomial tail
    ``P(Bin(answers, risk) <= wrong answers)``, in the order given and each at level ``delta``, until the first that is
    not rejected (fixed-sequence testing: Angelopoulos et al. 2021, https://arxiv.org/abs/2110.01052).
    With probability 1 - delta none of the certified ones is in truth above ``risk``, however long the sequence.

    Args:
        confidence: (B,) of examples that neither the confidence nor the thresholds were fitted on.
        correct: (B,) whether each answer is right.
        thresholds: (T,) in the order of testing.
        risk: in (0, 1).
        delta: in (0, 1).

    Returns:
        The threshold; ``None`` where the first is not certified.
    """
    answered, wrong = _count(confidence, correct, thresholds)
    held = _p_values(answered, wrong, risk) <= delta
    certified = len(held) if held.all() else int(held.argmin())
    return float(thresholds[certified - 1]) if certified else None


def _abstention(
    seen: Array, seen_labels: NDArray[np.int64], p: Array, y: NDArray[np.int64], risk: float, confidence: float
) -> Abstention:
    """Certify on (p, y) a sequence that the other examples chose: it may depend on them in any way.

    From the threshold that looks surest there, down to answering all.
    """
    sure = np.sort(seen.max(axis=1))[::-1]
    ranks = -(-np.arange(1, _CANDIDATES + 1) * len(sure) // _CANDIDATES) - 1
    thresholds = np.append(np.unique(sure[ranks])[::-1], 0.0)
    looks = _p_values(*_count(seen.max(axis=1), seen.argmax(axis=1) == seen_labels, thresholds), risk)
    found = certify(p.max(axis=1), p.argmax(axis=1) == y, thresholds[looks.argmin() :], risk, 1 - confidence)
    answered, wrong = _count(p.max(axis=1), p.argmax(axis=1) == y, np.array([math.inf if found is None else found]))
    return Abstention(risk=risk, confidence=confidence, threshold=found, answered=int(answered[0]), wrong=int(wrong[0]))


def _count(
    confidence: Array, correct: NDArray[np.bool_], thresholds: Array
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many examples (T,) reach each threshold, and how many of these are wrong."""
    rising, wrong = np.sort(confidence), np.sort(confidence[~correct])
    return len(rising) - np.searchsorted(rising, thresholds), len(wrong) - np.searchsorted(wrong, thresholds)


def _p_values(answered: NDArray[np.int64], wrong: NDArray[np.int64], risk: float) -> Array:
    from scipy.stats import binom

    return binom.cdf(wrong, answered, risk)


def _check(method: str, alpha: float, conformal: str, risk: float | None, confidence: float) -> None:
    if method not in METHODS:
        raise UsageError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    if conformal not in get_args(ConformalMethod):
        raise UsageError(f"unknown conformal method {conformal!r}: use lac or aps")
    for name, value in (("alpha", alpha), ("risk", risk), ("confidence", confidence)):
        if value is not None and not 0 < value < 1:
            raise UsageError(f"{name} must lie between 0 and 1, not {value}")


def summary(calibration: Calibration) -> str:
    """What was fitted, on how much, and what it promises: a few plain lines."""
    before, after = calibration.before, calibration.after
    mapping, conformal = calibration.map, calibration.conformal
    what = f"T = {mapping.temperature:.4g}" if isinstance(mapping, Temperature) else f"by {mapping.method}"
    lines = [
        f"{calibration.dataset}, validation images: {calibration.fitted:,} fitted the map ({what}), "
        f"{calibration.held_out:,} others gave all that follows",
        f"error {_percent(before['error'])} -> {_percent(after['error'])}, NLL {before['nll']:.4f} -> "
        f"{after['nll']:.4f}, ECE {_percent(before['ece'])} -> {_percent(after['ece'])}",
    ]
    threshold = conformal_quantile(conformal.lac if conformal.method == "lac" else conformal.aps, conformal.alpha)
    promise = (
        f"{conformal.method.upper()} sets hold the true class in at least {_percent(1 - conformal.alpha)} of cases"
    )
    if math.isinf(threshold):
        needed = math.ceil(round(1 / conformal.alpha - 1, 9))
        lines.append(f"{promise}, by holding every class: fewer need at least {needed:,} held-out images")
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
    lines.append("All this holds for images like the validation split's, and not under shift")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.4g} %"
