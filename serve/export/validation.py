"""What validation images say of exported members: order, usual uncertainty, and what a lower precision changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ensembler.calibration import Calibration
from ensembler.data.images import Images
from ensembler.ensemble import Ensemble
from ensembler.ordering import greedy_order
from ensembler.seeds import derive
from ensembler.serve.export.precision import check_precision
from ensembler.serve.runtime.drift import MEASURES, bin_values
from ensembler.serve.runtime.manifest import Binned, Precision, PrecisionCheck, Validation
from ensembler.serve.runtime.strategies import Members
from ensembler.uncertainty import uncertainty

__all__ = ["LEVELS", "Judgement", "judge", "some"]

LEVELS = (*(i / 10 for i in range(10)), 0.95, 0.99, 1.0)
"""Of the quantiles of uncertainty that a bundle holds."""


@dataclass(frozen=True)
class Judgement:
    """What validation images say; by default, what holds without any.

    Attributes:
        order: the members in the order in which to ask them.
        ordered_by: why in this order.
        validation: the members' scores and usual uncertainty.
        precision_check: what a lower precision changes.
    """

    order: list[int]
    ordered_by: Literal["the run", "validation NLL"] = "the run"
    validation: Validation | None = None
    precision_check: PrecisionCheck | None = None


def judge(
    opened: Members,
    ensemble: Ensemble,
    precision: Precision,
    fitted: Calibration | None,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
) -> Judgement:
    """Score the exported members on validation images.

    Args:
        opened: the members as they will be served, in the ensemble's order.
        ensemble: in PyTorch.
        precision: of the exported members.
        fitted: the calibration of the ensemble in float32.
        images: (B, H, W, 3), never test images.
        labels: (B,).

    Raises:
        ExportError: the precision changes the ensemble by more than is allowed.
    """
    members = opened.ask(images)
    check = None
    if precision != "float32":
        check = check_precision(precision, ensemble.predict_members(images).numpy(), members, labels, fitted)
    scores = ensemble.task.scores(torch.from_numpy(members), torch.from_numpy(labels))
    found = uncertainty(members)
    information = found.mutual_information
    return Judgement(
        order=greedy_order(members[:, np.arange(len(labels)), labels]),
        ordered_by="validation NLL",
        validation=Validation(
            examples=len(labels),
            accuracy=scores["accuracy"] or 0.0,
            nll=scores["nll"] or 0.0,
            levels=list(LEVELS),
            predictive_entropy=np.quantile(found.predictive_entropy, LEVELS).tolist(),
            mutual_information=None if information is None else np.quantile(information, LEVELS).tolist(),
            drift=_drift(found.predictive_entropy, information, members.mean(axis=0, dtype=np.float64)),
        ),
        precision_check=check,
    )


def _drift(
    entropy: NDArray[np.float64], information: NDArray[np.float64] | None, mean: NDArray[np.float64]
) -> list[Binned]:
    """What drift is judged by; one member has no mutual information."""
    values = {"predictive_entropy": entropy, "mutual_information": information, "class": mean.argmax(axis=-1)}
    return [
        bin_values(measure, found, mean.shape[-1]) for measure in MEASURES if (found := values[measure]) is not None
    ]


def some(split: Images, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return up to ``count`` images (B, H, W, 3) of a split and their labels (B,), drawn with a seed."""
    generator = torch.Generator().manual_seed(derive(0, "export"))
    part = split.part(torch.randperm(len(split), generator=generator)[:count])
    images = torch.cat([batch.images for batch in part.batches(256)])
    return images.numpy(), part.labels.numpy()
