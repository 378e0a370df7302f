"""What the service answers."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from ensembler.record import Record

__all__ = ["Answer", "ImagePrediction", "ModelCard"]


class ModelCard(Record):
    """Which ensemble answered; ``bundle`` is the SHA-256 of its manifest."""

    method: str
    architecture: str
    dataset: str
    members: int
    bundle: str


class ImagePrediction(Record):
    """One image's prediction and its uncertainty: the outputs that the caller chose.

    Attributes:
        class_index: of the largest probability, under the name ``class``.
        label: that class's name.
        probabilities: (C,) the mean of the members'; ``mean`` is the same under another name.
        members: (members_used, C) each member's own, in the order in which they are asked.
        predictive_entropy, expected_entropy: nats, in [0, log C].
        mutual_information: nats; null means "one member cannot say", not zero. So does a null disagreement.
        disagreement: share of the pairs of members whose classes differ.
        members_used: how many members were asked.
        partial: whether these were fewer than all, so that no number here compares with one of all members; left out
            where all were to be asked.
        calibrated: (C,) the calibrated probabilities.
        prediction_set: names of the classes that hold the true one with probability 1 - alpha, on average over images
            like those of the validation split.
        abstain: whether the image is better given to somebody else.
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
        calibration_id: SHA-256 of the bundle's calibration, where an output needed it.
        alpha: of the prediction sets, where they were wanted.
    """

    model: ModelCard
    predictions: list[ImagePrediction]
    calibration_id: str | None = None
    alpha: float | None = None
