"""What an ensemble predicts for a batch: the mean, each member's probabilities, and the uncertainty. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ensembler.text import counted
from ensembler.uncertainty import mean_probabilities, uncertainty

__all__ = ["Prediction", "predict"]

_SHOWN = 3  # images in a repr
_ROWS = 10  # in a notebook


@dataclass(frozen=True, eq=False)
class Prediction:
    """The prediction for a batch of B images. Every number of an image is of the members that were asked for it.

    Attributes:
        classes: (B,) int64, the most probable class of the mean.
        labels: its name, B of them.
        probabilities: (B, C) float64, the mean of the members'.
        members: (M, B, C) float32, each member's own; NaN where it was not asked.
        predictive_entropy: (B,) nats, in [0, log C].
        expected_entropy: (B,) nats, in [0, log C].
        mutual_information: (B,) nats, in [0, log min(M, C)]; ``None`` where M = 1.
        disagreement: (B,) share of the pairs of members whose classes differ; ``None`` where M = 1.
        members_used: (B,) int64, how many members were asked.
        complete: (B,) whether these were all that the ensemble has: mutual information and disagreement of fewer do
            not compare with those of all.
    """

    classes: NDArray[np.int64]
    labels: list[str]
    probabilities: NDArray[np.float64]
    members: NDArray[np.float32]
    predictive_entropy: NDArray[np.float64]
    expected_entropy: NDArray[np.float64]
    mutual_information: NDArray[np.float64] | None
    disagreement: NDArray[np.float64] | None
    members_used: NDArray[np.int64]
    complete: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.classes)

    def __repr__(self) -> str:
        B = len(self)
        lines = [self._title]
        for number, label in enumerate(self.labels[:_SHOWN]):
            line = f"  {number}: {label} {self.probabilities[number].max():.3f}"
            line += f", entropy {self.predictive_entropy[number]:.3f}"
            if self.disagreement is not None:
                line += f", disagreement {self.disagreement[number]:.3f}"
            lines.append(line)
        return "\n".join([*lines, f"  and {B - _SHOWN:,} more"] if B > _SHOWN else lines)

    @property
    def _title(self) -> str:
        M, B, _ = self.members.shape
        return f"Prediction of {counted(B, 'image')} by {counted(M, 'member')}; entropies in nats"

    def _repr_html_(self) -> str:
        from ensembler.describe import table_html

        measures = {
            "probability": self.probabilities.max(axis=1),
            "predictive entropy": self.predictive_entropy,
            "mutual information": self.mutual_information,
            "disagreement": self.disagreement,
        }
        measured = {name: values for name, values in measures.items() if values is not None}
        rows = [
            (str(number), label, *(f"{values[number]:.3f}" for values in measured.values()))
            for number, label in enumerate(self.labels[:_ROWS])
        ]
        left = len(self) - len(rows)
        return table_html(self._title, ("image", "class", *measured), rows, f"and {left:,} more" if left else "")


def predict(
    members: NDArray[np.float32], used: NDArray[np.int64], total: int, class_names: Sequence[str]
) -> Prediction:
    """Return the prediction of members' probabilities, in float64.

    Args:
        members: (M, B, C), the first ``used`` of each image asked.
        used: (B,), at least 1.
        total: members of the whole ensemble.
        class_names: C of them.
    """
    M, B, C = members.shape
    mean = np.empty((B, C))
    predictive, expected, information, disagreement = np.empty((4, B))
    for count in np.unique(used):
        rows = used == count
        asked = members[:count] if rows.all() else members[:count, rows]
        found = uncertainty(asked)
        mean[rows] = mean_probabilities(asked)
        predictive[rows], expected[rows] = found.predictive_entropy, found.expected_entropy
        if found.mutual_information is not None and found.disagreement is not None:
            information[rows], disagreement[rows] = found.mutual_information, found.disagreement
    classes = mean.argmax(axis=-1)
    return Prediction(
        classes=classes,
        labels=[class_names[index] for index in classes],
        probabilities=mean,
        members=members,
        predictive_entropy=predictive,
        expected_entropy=expected,
        mutual_information=None if M == 1 else information,
        disagreement=None if M == 1 else disagreement,
        members_used=used,
        complete=used == total,
    )
