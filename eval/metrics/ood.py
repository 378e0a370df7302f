"""Out-of-distribution detection: detectors and their scores.

A detector is a number per image that should be larger out of distribution. Out of distribution is the positive class
everywhere but in ``aupr_in``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ensembler.errors import ShapeError
from ensembler.record import Record
from ensembler.uncertainty import entropy

__all__ = ["DETECTORS", "OodScores", "detector_scores", "detectors", "ood_scores"]

Array = NDArray[np.float64]

DETECTORS = ("predictive_entropy", "mutual_information", "one_minus_max")

_TRUE_POSITIVES = 0.95


class OodScores(Record):
    """How well a detector separates images out of distribution from images in distribution.

    Attributes:
        auroc: probability that an image out of distribution has the higher value; a tie counts half.
        aupr_out: average precision with out of distribution as the positive class (scikit-learn's, no interpolation).
        aupr_in: average precision with in distribution as the positive class and the negated value.
        fpr_at_95: share of images *in* distribution above the highest threshold that at least 95 % of those *out* of it
            reach; lower is better. Papers whose positive class is in distribution report another number by this name.
        examples_in, examples_out: numbers of images. Both average precisions depend on their ratio: at chance, they are
            the positive class's share.
    """

    auroc: float
    aupr_out: float
    aupr_in: float
    fpr_at_95: float
    examples_in: int
    examples_out: int


def detectors(mean: NDArray[np.floating], expected_entropy: NDArray[np.floating] | None) -> dict[str, Array | None]:
    """Compute the detectors of each image, by their names in :data:`DETECTORS`.

    Args:
        mean: (B, C) the members' mean probabilities.
        expected_entropy: (B,) the mean of the members' own entropies, in nats; ``None`` if M = 1: the mutual
            information is then ``None``, too.

    Returns:
        (B,) each: the entropy of the mean (nats); the same minus the expected entropy, at least 0 (nats); 1 minus the
        largest probability (Hendrycks & Gimpel 2017, https://arxiv.org/abs/1610.02136).
    """
    total = entropy(mean)
    return {
        "predictive_entropy": total,
        "mutual_information": None if expected_entropy is None else np.maximum(total - expected_entropy, 0.0),
        "one_minus_max": 1.0 - np.minimum(np.asarray(mean).max(axis=1), 1.0).astype(np.float64),
    }


def detector_scores(
    inside: Mapping[str, Array | None], outside: Mapping[str, Array | None]
) -> dict[str, OodScores | None]:
    """Compute :func:`ood_scores` of every detector; ``None`` for one that is ``None`` (M = 1).

    Args:
        inside: :func:`detectors` of images in distribution.
        outside: of images out of distribution.
    """
    found: dict[str, OodScores | None] = {}
    for name in DETECTORS:
        one, other = inside[name], outside[name]
        found[name] = None if one is None or other is None else ood_scores(one, other)
    return found


def ood_scores(uncertainty_in: NDArray[np.floating], uncertainty_out: NDArray[np.floating]) -> OodScores:
    """Compute the scores of one detector.

    Args:
        uncertainty_in: (B,) its values for images in distribution.
        uncertainty_out: (B',) its values for images out of distribution, which should be larger.

    Raises:
        ShapeError: empty, not one number per image, or not finite.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    inside, outside = (_finite(values, n) for values, n in ((uncertainty_in, "in"), (uncertainty_out, "out")))
    values = np.concatenate([inside, outside])
    is_out = np.arange(len(values)) >= len(inside)
    # With drop_intermediate, the points left out could be the one that reaches 95 %.
    false, true, _ = roc_curve(is_out, values, drop_intermediate=False)
    return OodScores(
        auroc=float(roc_auc_score(is_out, values)),
        aupr_out=float(average_precision_score(is_out, values)),
        aupr_in=float(average_precision_score(~is_out, -values)),
        fpr_at_95=float(false[np.argmax(true >= _TRUE_POSITIVES)]),
        examples_in=len(inside),
        examples_out=len(outside),
    )


def _finite(values: NDArray[np.floating], which: str) -> Array:
    found = np.asarray(values)
    if found.ndim != 1 or not len(found) or found.dtype.kind not in "fiu" or not np.isfinite(found).all():
        raise ShapeError(
            f"uncertainty_{which} must be one finite number per image, at least one, found {found.dtype} {found.shape}"
            + (" with NaN or infinity" if found.ndim == 1 and len(found) and found.dtype.kind == "f" else "")
        )
    return found.astype(np.float64)
