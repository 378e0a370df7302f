"""What a bundle's manifest holds. No torch, no BentoML."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from ensembler import artefact
from ensembler.errors import ArtefactError
from ensembler.record import Record

__all__ = [
    "FORMAT",
    "GRAPH",
    "MERGED",
    "PROBE",
    "WEIGHTS",
    "BundleManifest",
    "Origin",
    "PrecisionCheck",
    "Simplexes",
    "Strategy",
    "Timing",
    "Tuning",
    "Validation",
    "read_bundle",
]

FORMAT = 2
_FORMATS = (1, 2)  # all that format 2 added has a default that is true of format 1

GRAPH = "graph.onnx"  # of the layout "vertices": the graph of every member, without weights
WEIGHTS = "weights.npz"  # of the layout "vertices": see ensembler.serve.runtime.vertices
MERGED = "merged.onnx"  # all members in one graph, where a bundle was tuned and one was faster
PROBE = "probe.npz"  # images, and what every member must answer

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
        weights: the probability of each simplex; ``None`` shares the members out evenly.
    """

    simplexes: list[list[int]]
    concentration: float
    weights: list[float] | None = None


class Validation(Record):
    """What the members said of images held out from training, as served: what drift is measured against.

    Attributes:
        examples: how many.
        accuracy, nll: of the mean prediction; nats.
        levels: in [0, 1].
        predictive_entropy: its quantiles at these levels, in nats.
        mutual_information: likewise; ``None`` where M = 1.
    """

    examples: int
    accuracy: float
    nll: float
    levels: list[float]
    predictive_entropy: list[float]
    mutual_information: list[float] | None


class PrecisionCheck(Record):
    """What a lower precision changed, on images held out from training, and what was allowed.

    Attributes:
        examples: how many.
        rank_correlation: Spearman's, of the mutual information with float32's; ``None`` where M = 1.
        least_rank_correlation: the bound that it had to reach.
        accuracy_drop: float32's accuracy less this one's.
        most_accuracy_drop: the bound that it could not exceed.
    """

    examples: int
    rank_correlation: float | None
    least_rank_correlation: float
    accuracy_drop: float
    most_accuracy_drop: float


class Timing(Record):
    """The seconds that one way of running all members took for one batch: the lower quartile of ``repeats``."""

    batch: int
    strategy: Strategy
    seconds: float
    repeats: int


class Tuning(Record):
    """Which way of running the members was the fastest, where.

    Attributes:
        machine: in words.
        cpus: how many it lent; elsewhere the winners mean nothing.
        load: how many processes wanted a CPU when it began; ``None`` where the system does not tell. Well above 0,
            the measurement was not alone.
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
    winners: dict[int, Strategy]
    table: list[Timing]


class BundleManifest(Record):
    """Everything about a bundle but its graphs.

    Attributes:
        dataset: the title of what the members were trained on.
        image_shape: [H, W, 3] of the images that the graphs take.
        members: M.
        layout: ``"members"``: an ONNX file for each member, which any runtime can use alone; ``"vertices"``: one graph
            without weights, the K vertices, and what each member needs to be made of them.
        graphs: in the layout ``"members"``, the file of each; else the one graph.
        input: ``"uint8"``: pixels from 0 to 255; ``"float"``: float32 from 0 to 1. Both (B, H, W, 3).
        precision: of weights and activations.
        precision_check: what it changed; ``None`` for float32.
        order: the members in the order in which they are asked; ``ordered_by`` says why.
        vertices: K, as trained.
        sampling: how the layout ``"vertices"`` draws further members; ``None`` where there are none to draw.
        training_cost: the run's, as its manifest has it.
        max_difference: the largest difference from PyTorch of any probability, over all members, as exported.
        compared_on: the images of that comparison.
        validation: ``None`` where no held-out image was at hand.
        tuning: ``None`` where nothing was measured.
        calibration: the file of the run's calibration, whose members these are; ``None`` where there is none.
    """

    kind: Literal["bundle"] = "bundle"
    format: int = FORMAT
    method: str
    architecture: str
    dataset: str
    classes: list[str]
    image_shape: list[int]
    members: int
    layout: Literal["members", "vertices"] = "members"
    graphs: list[str]
    input: Literal["uint8", "float"] = "uint8"
    precision: Literal["float32", "float16", "int8"] = "float32"
    precision_check: PrecisionCheck | None = None
    order: list[int] = Field(default_factory=list)
    ordered_by: Literal["the run", "validation NLL"] = "the run"
    vertices: int | None = None
    sampling: Simplexes | None = None
    parameters: int
    training_cost: dict[str, Any]
    run: Origin
    opset: int
    max_difference: float
    compared_on: list[str] = Field(default_factory=list)
    validation: Validation | None = None
    tuning: Tuning | None = None
    calibration: str | None = None
    created: str
    versions: dict[str, str]
    files: dict[str, str] = Field(default_factory=dict)


def read_bundle(bundle: Path) -> BundleManifest:
    """A bundle's manifest, after every file that it names has been verified.

    Raises:
        ArtefactError: no bundle there, or of a format that this version cannot read.
        CorruptError: a file is missing or changed; it is named.
    """
    content = artefact.read(bundle, "bundle", formats=_FORMATS)
    try:
        manifest = BundleManifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtefactError(f"{bundle} has an unusable manifest ({where}: {first['msg']}): export it again") from error
    manifest.order = manifest.order or list(range(manifest.members))
    needed = [*manifest.graphs, *([WEIGHTS] if manifest.layout == "vertices" else [])]
    needed += [manifest.calibration] if manifest.calibration else []
    if missing := sorted(set(needed) - set(manifest.files)):
        raise ArtefactError(f"{bundle} does not hold its {missing[0]}: export it again")
    if len(manifest.graphs) != (manifest.members if manifest.layout == "members" else 1):
        raise ArtefactError(f"{bundle} does not hold one graph for each of its members: export it again")
    if sorted(manifest.order) != list(range(manifest.members)):
        raise ArtefactError(f"{bundle} does not ask each of its members once (order): export it again")
    return manifest
