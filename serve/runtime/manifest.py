"""What a bundle's manifest holds. No torch, no BentoML."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError, model_validator

from ensembler.errors import ArtefactError, first_line
from ensembler.record import Record, mistake
from ensembler.serve.runtime.external_data import external_files
from ensembler.storage import artefact, signing

__all__ = [
    "EXAMPLES",
    "FORMAT",
    "GIVEN",
    "GRAPH",
    "MERGED",
    "PROBE",
    "SINGLE",
    "WEIGHTS",
    "Binned",
    "BundleManifest",
    "Layout",
    "Origin",
    "Pixels",
    "Precision",
    "PrecisionCheck",
    "Simplexes",
    "Strategy",
    "Timing",
    "Tuning",
    "Validation",
    "read_bundle",
]

FORMAT = 1

GRAPH = "graph.onnx"  # of the layout "vertices": the graph of every member, without weights
WEIGHTS = "weights.npz"  # of the layout "vertices": see ensembler.serve.runtime.vertices
MERGED = "merged.onnx"  # all members in one graph, where a bundle was tuned and this was the fastest
SINGLE = "ensemble.onnx"  # all members and their mean and uncertainty, where it was asked for
PROBE = "probe.npz"  # images, and what every member must answer
EXAMPLES = "examples.npy"  # test images of a public dataset, for the page

GIVEN = "given-when-opened"  # where the one graph says that its weights are: ONNX Runtime is given them from memory

_LARGEST_IMAGE = 25_000_000  # pixels: a file of the service's has no more, either
_ROUNDING = 1e-6  # of a sum of probabilities

Layout = Literal["members", "vertices"]
Pixels = Literal["uint8", "float"]
Precision = Literal["float32", "tf32", "float16", "int8"]
Strategy = Literal["sessions", "loop", "merged"]


class Origin(Record):
    """The run that a bundle was exported from; the hash is of its manifest, which holds those of its files."""

    name: str
    sha256: str


class Simplexes(Record):
    """How further members can be drawn; see :class:`ensembler.run.Sampling`.

    Attributes:
        simplexes: of each, the rows of its vertices.
        concentration: of the Dirichlet distribution.
        weights: the probability of each simplex; ``None`` gives all equally many members.
    """

    simplexes: list[list[NonNegativeInt]]
    concentration: float = Field(gt=0)
    weights: list[NonNegativeFloat] | None = None

    @model_validator(mode="after")
    def _of_each(self) -> Self:
        if self.weights is not None and (
            len(self.weights) != len(self.simplexes) or abs(sum(self.weights) - 1) > _ROUNDING
        ):
            raise ValueError("the weights of the simplexes do not sum to 1")
        return self


class Binned(Record):
    """How many validation images are in each bin of a measure; see :mod:`ensembler.serve.runtime.drift`.

    Attributes:
        measure: ``"class"``, whose bins are the classes, or a measure in nats.
        edges: between its bins, rising.
        counts: images in each.
    """

    measure: Literal["predictive_entropy", "mutual_information", "class"]
    edges: list[float]
    counts: list[int]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (
            (self.measure != "class" and len(self.counts) != len(self.edges) + 1)
            or min(self.counts, default=-1) < 0
            or not sum(self.counts)
        ):
            raise ValueError("edges and counts do not go together")
        return self


class Validation(Record):
    """What the members as exported predict for images held out from training: the reference for drift.

    Attributes:
        examples: how many.
        accuracy: of the mean prediction.
        nll: of the mean prediction, in nats.
        levels: in [0, 1].
        predictive_entropy: its quantiles at these levels, in nats.
        mutual_information: likewise; ``None`` for one member.
        drift: what drift is judged by; empty where it is not known.
    """

    examples: PositiveInt
    accuracy: float = Field(ge=0, le=1)
    nll: float
    levels: list[Annotated[float, Field(ge=0, le=1)]]
    predictive_entropy: list[float]
    mutual_information: list[float] | None
    drift: list[Binned] = Field(default_factory=list)

    @model_validator(mode="after")
    def _rising(self) -> Self:
        for values in (self.levels, self.predictive_entropy, self.mutual_information or self.levels):
            if len(values) != len(self.levels) or any(a > b for a, b in pairwise(values)):
                raise ValueError("quantiles do not rise with their levels")
        return self


class PrecisionCheck(Record):
    """What a lower precision changes, on images held out from training, and the bounds on it.

    Attributes:
        examples: how many.
        rank_correlation: Spearman's, of the mutual information with float32's; ``None`` for one member.
        least_rank_correlation: its lower bound.
        accuracy_drop: float32's accuracy less this one's.
        most_accuracy_drop: its upper bound.
        calibrated_distance: mean total variation between the calibrated predictions and float32's; ``None`` without a
            calibration.
        most_calibrated_distance: the largest at which the bundle carries the calibration.
    """

    examples: int
    rank_correlation: float | None
    least_rank_correlation: float
    accuracy_drop: float
    most_accuracy_drop: float
    calibrated_distance: float | None
    most_calibrated_distance: float


class Timing(Record):
    """The seconds that one way of running all members took for one batch: the lower quartile of ``repeats``."""

    batch: PositiveInt
    strategy: Strategy
    seconds: NonNegativeFloat
    repeats: PositiveInt


class Tuning(Record):
    """Which way of running the members was the fastest, and on which machine.

    Attributes:
        machine: in words.
        cpus: how many were available; with another number, the winners do not apply.
        load: processes that wanted a CPU at the start; ``None`` where unknown. Well above 0, the machine was shared.
        device: "cpu" or "cuda".
        members: M.
        winners: batch size to the fastest strategy.
        table: everything that was measured.
    """

    machine: str
    cpus: int
    load: float | None
    device: str
    members: int
    winners: dict[PositiveInt, Strategy]
    table: list[Timing]


class BundleManifest(Record):
    """Everything about a bundle except its graphs.

    Attributes:
        dataset: title of what the members were trained on.
        image_shape: [H, W, 3] of the images that the graphs take.
        members: M.
        layout: ``"members"``: an ONNX file for each member, usable alone in any runtime; ``"vertices"``: one graph
            without weights, the K vertices, and each member's coefficients and buffers.
        graphs: of the layout ``"members"``, the file of each member; else the one graph.
        input: ``"uint8"``: pixels from 0 to 255; ``"float"``: float32 from 0 to 1. Both (B, H, W, 3).
        precision: of weights and activations; ``"tf32"``: float32, whose products a GPU computes in TF32.
        precision_check: what the precision changes; ``None`` for float32.
        order: the members in the order in which they are asked; ``ordered_by`` says why.
        vertices: K, as trained.
        sampling: how the layout ``"vertices"`` draws further members; ``None`` where the members are fixed.
        training_cost: the run's, as its manifest has it.
        max_difference: the largest difference of any member's probability from PyTorch's.
        tolerance: the largest that was accepted.
        compared_on: the images of that comparison.
        validation: ``None`` where no held-out images were available.
        tuning: ``None`` where nothing was measured.
        calibration: the file of the calibration fitted for these members; ``None`` without one.
    """

    kind: Literal["bundle"] = "bundle"
    format: int = FORMAT
    method: str
    architecture: str
    dataset: str
    classes: list[str] = Field(min_length=1)
    image_shape: list[PositiveInt] = Field(min_length=3, max_length=3)
    members: PositiveInt
    layout: Layout
    graphs: list[str]
    input: Pixels
    precision: Precision
    precision_check: PrecisionCheck | None
    order: list[NonNegativeInt]
    ordered_by: Literal["the run", "validation NLL"]
    vertices: PositiveInt
    sampling: Simplexes | None
    parameters: NonNegativeInt
    training_cost: dict[str, Any]
    run: Origin
    opset: int
    max_difference: NonNegativeFloat
    tolerance: NonNegativeFloat
    compared_on: list[str]
    validation: Validation | None
    tuning: Tuning | None
    calibration: str | None
    created: str
    versions: dict[str, str]
    files: dict[str, str] = Field(default_factory=dict)


def read_bundle(bundle: Path, key: str | Path | None = None) -> BundleManifest:
    """Return a bundle's manifest, after verifying every file that it names, and that its graphs read no other.

    Args:
        bundle: its folder.
        key: PEM file of the public key that it must be signed with.

    Raises:
        UsageError: no key there.
        ArtefactError: no bundle there, of a format that this version cannot read, or with a graph that reads tensors
            from files that the manifest does not name; or not signed with the key.
        CorruptError: a file is missing or changed; it is named.
    """
    public = None if key is None else signing.public_key(key)
    check = None if public is None else partial(signing.check, key=public, where=bundle)
    content = artefact.read(bundle, "bundle", (FORMAT,), check)
    try:
        manifest = BundleManifest.model_validate(content)
    except ValidationError as error:
        raise ArtefactError(f"{bundle} has an unusable manifest ({mistake(error)}): export it again") from error
    if fault := next(_faults(manifest), None):
        raise ArtefactError(f"{bundle} {fault}: export it again")
    for graph in [*manifest.graphs, *(name for name in (MERGED, SINGLE) if name in manifest.files)]:
        _check_external(bundle, graph, manifest)
    return manifest


def _faults(manifest: BundleManifest) -> Iterator[str]:
    """Yield what does not go together in a manifest."""
    needed = [*manifest.graphs, PROBE, *([WEIGHTS] if manifest.layout == "vertices" else [])]
    needed += [manifest.calibration] if manifest.calibration else []
    if missing := [name for name in needed if name not in manifest.files]:
        yield f"does not hold its {missing[0]}"
    count = manifest.members if manifest.layout == "members" else 1
    if len(manifest.graphs) != count or len(set(manifest.graphs)) != count:
        yield "does not hold one graph for each of its members"
    if manifest.layout == "vertices" and manifest.graphs != [GRAPH]:
        yield f"names another graph than {GRAPH}"
    if len(manifest.order) != manifest.members or sorted(manifest.order) != list(range(manifest.members)):
        yield "does not ask each of its members once (order)"
    height, width, channels = manifest.image_shape
    if channels != 3 or height * width > _LARGEST_IMAGE:
        yield f"is for images of {height} x {width} x {channels}, not of three channels and at most 25 megapixels"
    if manifest.precision != "float32" and manifest.precision_check is None:
        yield f"is of precision {manifest.precision}, and does not say what that changes"


def _check_external(bundle: Path, graph: str, manifest: BundleManifest) -> None:
    """Refuse a graph that reads tensors from files whose hash is not in the manifest."""
    given = {GIVEN} if manifest.layout == "vertices" and not os.path.lexists(bundle / GIVEN) else set()
    try:
        names = external_files(bundle / graph) - given
    except (OSError, ValueError) as error:
        raise ArtefactError(
            f"{bundle / graph} is no ONNX graph that can be read ({first_line(error)}): export the run again"
        ) from error
    if others := sorted(names - set(manifest.files)):
        raise ArtefactError(
            f"{bundle / graph} reads tensors from {others[0]!r}, a file that the manifest does not name: do not use it"
        )
