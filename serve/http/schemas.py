"""The schema of the service's answers."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from ensembler.record import Record

__all__ = ["Answer", "ImagePrediction", "ModelCard"]


class ModelCard(Record):
    """The ensemble that answered; ``bundle`` is the SHA-256 of its manifest."""

    method: str
    architecture: str
    dataset: str
    members: int
    bundle: str


class ImagePrediction(Record):
    """The outputs that the caller chose, for one image.

    Attributes:
        class_index: of the largest probability, under the name ``class``.
        label: that class's name.
        probabilities: (C,) the mean of the members'; ``mean`` is another name of it.
        members: (members_used, C) each member's own, in the order in which they are asked.
        predictive_entropy: of the mean, in nats, in [0, log C].
        expected_entropy: mean of the members' entropies, in nats, in [0, log C].
        mutual_information: nats; null for one member, which means unknown, not zero.
        disagreement: share of the pairs of members whose classes differ; null for one member.
        members_used: how many members were asked.
        partial: whether these were fewer than all, so that entropies and disagreement do not compare with those of all
            members; absent where all were to be asked.
        calibrated: (C,) the calibrated probabilities.
        prediction_set: names of classes that include the true one with probability 1 - alpha, on average over images
            like those of the validation split.
        abstain: whether the ensemble abstains from a prediction.
    """

    model_config = ConfigDict(serialize_by_alias=True, populate_by_name=True)

    class_index: int | None = Field(None, alias="class")
    label: str | None = None
    probabilities: list[float] | None = None
    mean: list[float] | None = None
    members: list[list[float]] | None = None
    predictive_entropy: float | None = None
    expected_entropy: float | None = None
    mutual_information: float | None = None
    disagreement: float | None = None
    members_used: int | None = None
    partial: bool | None = None
    calibrated: list[float] | None = None
    prediction_set: list[str] | None = None
    abstain: bool | None = None


class Answer(Record):
    """A prediction for each image, in order.

    Attributes:
        model: the ensemble.
        predictions: one an image.
        calibration_id: SHA-256 of the bundle's calibration, where an output needs it.
        alpha: of the prediction sets.
    """

    model: ModelCard
    predictions: list[ImagePrediction]
    calibration_id: str | None = None
    alpha: float | None = None
