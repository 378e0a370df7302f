"""What a bundle's manifest holds and what the service answers. No torch, no BentoML."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ensembler import artefact
from ensembler.errors import ArtefactError

__all__ = ["FORMAT", "Answer", "BundleManifest", "ImagePrediction", "ModelCard", "Origin", "read_bundle"]

FORMAT = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Origin(_Record):
    """The run that a bundle was exported from; the hash is of its manifest, which holds those of its files."""

    name: str
    sha256: str


class BundleManifest(_Record):
    """Everything about a bundle but its graphs.

    Attributes:
        dataset: the title of what the members were trained on.
        image_shape: [H, W, 3] of the uint8 images that the graphs take.
        graphs: one ONNX file for each member, in order.
        training_cost: the run's, as its manifest has it.
        max_difference: the largest difference from PyTorch of any probability, over all members, as exported.
    """

    kind: Literal["bundle"] = "bundle"
    format: int = FORMAT
    method: str
    architecture: str
    dataset: str
    classes: list[str]
    image_shape: list[int]
    members: int
    graphs: list[str]
    parameters: int
    training_cost: dict[str, Any]
    run: Origin
    opset: int
    max_difference: float
    created: str
    versions: dict[str, str]
    files: dict[str, str] = {}


def read_bundle(bundle: Path) -> BundleManifest:
    """A bundle's manifest, after every file that it names has been verified.

    Raises:
        ArtefactError: no bundle there, or of a format that this version cannot read.
        CorruptError: a file is missing or changed; it is named.
    """
    content = artefact.read(bundle, "bundle", formats=(FORMAT,))
    try:
        manifest = BundleManifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtefactError(f"{bundle} has an unusable manifest ({where}: {first['msg']}): export it again") from error
    if len(manifest.graphs) != manifest.members or not set(manifest.graphs) <= set(manifest.files):
        raise ArtefactError(f"{bundle} does not hold one graph for each of its members: export it again")
    return manifest


class ModelCard(_Record):
    """Which ensemble answered; ``bundle`` is the SHA-256 of its manifest."""

    method: str
    architecture: str
    dataset: str
    members: int
    bundle: str


class ImagePrediction(_Record):
    """One image's prediction and its uncertainty, entropies in nats; null means "one member cannot say", not zero."""

    model_config = ConfigDict(serialize_by_alias=True, populate_by_name=True)

    class_index: int = Field(alias="class")
    label: str
    probabilities: list[float]
    predictive_entropy: float
    expected_entropy: float
    mutual_information: float | None
    disagreement: float | None
    members_used: int


class Answer(_Record):
    """What ``POST /predictive-uncertainty`` returns: a prediction for each image, in order."""

    model: ModelCard
    predictions: list[ImagePrediction]
