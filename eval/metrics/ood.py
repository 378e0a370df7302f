"""Out-of-distribution detection: detectors and their scores.

A detector is a number per image that should be larger out of distribution. Out of distribution is the positive class
everywhere but in ``aupr_in``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ensembler.errors import ShapeError, UsageError
from ensembler.eval.metrics.selective import aurc, risks_of_losses
from ensembler.record import Record
from ensembler.uncertainty import entropy

__all__ = ["DETECTORS", "OodScores", "detector_scores", "detectors", "fpr_at_recall", "ood_scores", "scod_aurc"]

Array = NDArray[np.float64]

DETECTORS = ("predictive_entropy", "mutual_information", "one_minus_max", "energy", "max_logit")


class OodScores(Record):
    """How well a detector separates images out of distribution from images in distribution.

    Attributes:
        auroc: probability that an image out of distribution has the higher value; a tie counts half.
        aupr_out: average precision with out of distribution as the positive class (scikit-learn's, no interpolation).
        aupr_in: average precision with in distribution as the positive class and the negated value.
        fpr_at_95: share of images *in* distribution above the highest threshold that at least 95 % of those *out* of it
            reach; lower is better. Papers whose positive class is in distribution report another number by this name.
        scod_aurc: see :func:`scod_aurc`, at equal costs; lower is better.
        examples_in, examples_out: numbers of images. Both average precisions depend on their ratio (at chance, they are
            the positive class's share), and so does ``scod_aurc``.
    """

    auroc: float
    aupr_out: float
    aupr_in: float
    fpr_at_95: float
    scod_aurc: float
    examples_in: int
    examples_out: int


def detectors(
    mean: NDArray[np.floating],
    mutual_information: NDArray[np.floating] | None,
    energy: NDArray[np.floating] | None = None,
    max_logit: NDArray[np.floating] | None = None,
) -> dict[str, Array | None]:
    """Compute the detectors of each image, by their names in :data:`DETECTORS`.

    Args:
        mean: (B, C) the members' mean probabilities.
        mutual_information: (B,) between prediction and member, in nats; ``None`` if M = 1.
        energy: (B,) as it is; ``None`` where the logits are unknown.
        max_logit: (B,) likewise.

    Returns:
        (B,) each: the entropy of the mean (nats); the mutual information (nats); 1 minus the largest probability
        (Hendrycks & Gimpel 2017, https://arxiv.org/abs/1610.02136); of the members' mean logits z, the energy
        ``-log sum_c exp z_c`` (Liu et al. 2020, https://arxiv.org/abs/2010.03759) and ``-max_c z_c`` (Hendrycks et al.
        2022, https://arxiv.org/abs/1911.11132).
    """
    return {
        "predictive_entropy": entropy(mean),
        "mutual_information": None if mutual_information is None else np.asarray(mutual_information, np.float64),
        "one_minus_max": 1.0 - np.minimum(np.asarray(mean).max(axis=1), 1.0).astype(np.float64),
        "energy": None if energy is None else np.asarray(energy, dtype=np.float64),
        "max_logit": None if max_logit is None else np.asarray(max_logit, dtype=np.float64),
    }


def detector_scores(
    inside: Mapping[str, Array | None], correct: NDArray[np.bool_], outside: Mapping[str, Array | None]
) -> dict[str, OodScores | None]:
    """Compute :func:`ood_scores` of every detector; ``None`` for one that is ``None``: M = 1, or unknown logits.

    Args:
        inside: :func:`detectors` of images in distribution.
        correct: (B,) whether each of these is classified rightly.
        outside: of images out of distribution.
    """
    found: dict[str, OodScores | None] = {}
    for name in DETECTORS:
        one, other = inside[name], outside[name]
        found[name] = None if one is None or other is None else ood_scores(one, correct, other)
    return found


def ood_scores(
    uncertainty_in: NDArray[np.floating], correct: NDArray[np.bool_], uncertainty_out: NDArray[np.floating]
) -> OodScores:
    """Compute the scores of one detector.

    Args:
        uncertainty_in: (B,) its values for images in distribution.
        correct: (B,) whether each of these is classified rightly.
        uncertainty_out: (B',) its values for images out of distribution, which should be larger.

    Raises:
        ShapeError: empty, not one number per image, or not finite.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    values, is_out = _both(uncertainty_in, uncertainty_out)
    return OodScores(
        auroc=float(roc_auc_score(is_out, values)),
        aupr_out=float(average_precision_score(is_out, values)),
        aupr_in=float(average_precision_score(~is_out, -values)),
        fpr_at_95=fpr_at_recall(uncertainty_in, uncertainty_out, 0.95),
        scod_aurc=scod_aurc(uncertainty_in, correct, uncertainty_out),
        examples_in=int((~is_out).sum()),
        examples_out=int(is_out.sum()),
    )


def fpr_at_recall(
    uncertainty_in: NDArray[np.floating], uncertainty_out: NDArray[np.floating], recall: float = 0.95
) -> float:
    """Compute the share of images in distribution above the highest threshold that ``recall`` of the others reach.

    Tied values are on the same side of every threshold.

    Args:
        uncertainty_in: (B,) a detector's values for images in distribution.
        uncertainty_out: (B',) for images out of distribution, which should be larger.
        recall: in (0, 1].

    Raises:
        ShapeError: empty, not one number per image, or not finite.
        UsageError: a recall out of range.
    """
    if not 0 < recall <= 1:
        raise UsageError(f"a recall must lie in (0, 1], not {recall}")
    values, is_out = _both(uncertainty_in, uncertainty_out)
    outside = np.sort(values[is_out])[::-1]
    needed = math.ceil(round(recall * len(outside), 6))  # 0.07 * 100 is 7.000000000000001
    return float((values[~is_out] >= outside[max(needed, 1) - 1]).mean())


def scod_aurc(
    uncertainty_in: NDArray[np.floating],
    correct: NDArray[np.bool_],
    uncertainty_out: NDArray[np.floating],
    ood_cost: float = 0.5,
) -> float:
    """Compute the area under the risk-coverage curve with images out of distribution mixed in (SCOD).

    All images are answered in the order of rising uncertainty; answering one out of distribution costs ``ood_cost``,
    and a wrong answer in distribution ``1 - ood_cost``. The area is the mean over k of the mean cost of the first k, as
    in :func:`.selective.aurc` (Xia & Bouganis 2022, https://arxiv.org/abs/2207.07506; Narasimhan et al. 2023,
    https://arxiv.org/abs/2301.12386). It depends on the ratio of the numbers of images.

    Args:
        uncertainty_in: (B,) a detector's values for images in distribution.
        correct: (B,) whether each of these is classified rightly.
        uncertainty_out: (B',) for images out of distribution.
        ood_cost: in [0, 1].

    Raises:
        ShapeError: empty, not one number and answer per image, or not finite.
        UsageError: a cost out of range.
    """
    if not 0 <= ood_cost <= 1:
        raise UsageError(f"ood_cost must lie in [0, 1], not {ood_cost}")
    values, is_out = _both(uncertainty_in, uncertainty_out)
    right = np.asarray(correct)
    if right.shape != (int((~is_out).sum()),):
        raise ShapeError(f"correct must be one answer per image in distribution, found shape {right.shape}")
    costs = np.where(is_out, ood_cost, 0.0)
    costs[~is_out] = (1 - ood_cost) * ~right.astype(bool)
    return aurc(risks_of_losses(-values, costs))


def _both(
    uncertainty_in: NDArray[np.floating], uncertainty_out: NDArray[np.floating]
) -> tuple[Array, NDArray[np.bool_]]:
    """Return the values of both (B + B',), and which are out of distribution."""
    inside, outside = (_finite(values, n) for values, n in ((uncertainty_in, "in"), (uncertainty_out, "out")))
    return np.concatenate([inside, outside]), np.arange(len(inside) + len(outside)) >= len(inside)


def _finite(values: NDArray[np.floating], which: str) -> Array:
    found = np.asarray(values)
    if found.ndim != 1 or not len(found) or found.dtype.kind not in "fiu" or not np.isfinite(found).all():
        raise ShapeError(
            f"uncertainty_{which} must be one finite number per image, at least one, found {found.dtype} {found.shape}"
            + (" with NaN or infinity" if found.ndim == 1 and len(found) and found.dtype.kind == "f" else "")
        )
    return found.astype(np.float64)
