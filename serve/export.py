"""A run to a bundle: each member as ONNX, and each compared with PyTorch before the bundle exists.

The graph takes what callers have, ``images`` (batch, H, W, 3), and normalises inside; it gives ``logits`` (batch, C)
float32. Members differ in their weights only, so one is traced and the others are its graph with their own weights in
it, found by name. Where a weight cannot be found so, every member is traced.

Where the run's dataset is at hand, the comparison is made on its test images too, members are ordered by its
validation images, and what their doubt usually is is measured on them.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ensembler import artefact, calibration
from ensembler.datasets import Dataset
from ensembler.ensemble import Ensemble
from ensembler.errors import ArtefactError, DataError, ExportError, UsageError
from ensembler.images import Images
from ensembler.ordering import greedy_order
from ensembler.run import DatasetRecord, versions
from ensembler.seeds import derive
from ensembler.serve.machine import available_cpus
from ensembler.serve.precision import Precision, check_precision
from ensembler.serve.schemas import MERGED, PROBE, BundleManifest, Origin, Simplexes, Validation
from ensembler.serve.sessions import open_members, open_merged
from ensembler.serve.strategies import Members
from ensembler.serve.tune import tune as measured
from ensembler.serve.verify import TOLERANCE
from ensembler.serve.writer import Layout, Pixels, Writer, write_merged
from ensembler.uncertainty import mean_probabilities, uncertainty

__all__ = ["BATCHES", "EXAMPLES", "LEVELS", "TOLERANCE", "export_run"]


BATCHES = (1, 2, 7)  # a graph whose batch was frozen at tracing fails at least two of them
EXAMPLES = 1000  # held-out images that members are ordered by and their doubt is measured on
LEVELS = (*(i / 10 for i in range(10)), 0.95, 0.99, 1.0)  # of the quantiles that are kept

_RANGES = 256  # training images that the ranges of 8-bit activations are taken from
_TIMED = 64  # images to time strategies with


def export_run(
    run_path: str | Path,
    out: str | Path,
    *,
    layout: Layout | None = None,
    members: int | None = None,
    seed: int = 0,
    pixels: Pixels = "uint8",
    precision: Precision = "float32",
    data: Path | None = None,
    use_data: bool = True,
    examples: int = EXAMPLES,
    tune: bool = False,
    say: Callable[[str], object] = lambda sentence: None,
) -> Path:
    """Export the members of a run, whole or not at all.

    Args:
        run_path: the run's folder.
        out: the bundle's folder; must not exist.
        layout: ``"members"``: a self-contained file for each, for any runtime; ``"vertices"``: one graph and the
            vertices, of which ours makes the members. By default the latter where there are fewer of them.
        members: sample this many new ones from the run's simplexes; by default its own.
        seed: of that sample.
        pixels: ``"uint8"``: graphs take pixels from 0 to 255; ``"float"``: float32 from 0 to 1.
        precision: lower ones are only accepted within :data:`ensembler.serve.precision.BOUNDS`.
        data: where the run's dataset lies; by default its usual place, and where it is not there, what needs it is
            left out.
        use_data: whether to look for it.
        examples: how many of its validation images to use, at most.
        tune: measure how the members are best run on this machine.
        say: told, in a sentence, what was left out and why.

    Returns:
        ``out``.

    Raises:
        UsageError: ``out`` exists, or options that cannot be honoured together.
        ArtefactError: no run there, or the bundle cannot be written; CorruptError: a file of the run has changed.
        DataError: no dataset at ``data``, or not the run's.
        ExportError: a member cannot be exported, or does not reproduce PyTorch's probabilities; it is named. Or a
            lower precision changes the ensemble by more than is allowed.
    """
    run_path, out = Path(run_path), Path(out)
    if examples < 1:
        raise UsageError(f"at least 1 validation image is needed, not {examples}: to use none, add --no-data")
    manifest: dict[str, Any] = {}
    with artefact.write(out, manifest) as folder:
        ensemble = Ensemble.load(run_path, device="cpu")
        dataset = _dataset(ensemble.run.manifest.dataset, data, say) if use_data else None
        if precision != "float32" and dataset is None:
            raise UsageError(f"{precision} is only accepted after a comparison on validation images: give their --data")
        if members is not None:
            ensemble = ensemble.sample(members, seed, dataset.train if dataset else None)
        ranges = _some(dataset.train, _RANGES)[0] if dataset and precision == "int8" else None
        try:
            written = Writer(folder, ensemble, pixels, precision, ranges).write(layout)
            content = _content(ensemble, run_path, pixels=pixels, precision=precision, **written)
            opened = _open(folder, content)
            _compare(opened, content, ensemble, folder, _some(dataset.test, sum(BATCHES))[0] if dataset else None)
        except (ExportError, ArtefactError) as error:
            raise ExportError(f"{run_path}: {error}") from error
        if dataset:
            _judge(opened, content, ensemble, *_some(dataset.validation, examples))
        else:
            say("Without validation images, members keep the run's order, and their usual doubt is not known.")
        opened.close()
        if tune:
            shape = content.image_shape
            _tune(folder, content, _some(dataset.test, _TIMED)[0] if dataset else patches(shape, _TIMED))
        _calibrate(run_path, folder, content, sampled=members is not None, say=say)
        manifest.update(content.model_dump())
    return out


def patches(image_shape: list[int], count: int) -> NDArray[np.uint8]:
    """Images (count, H, W, 3) for a comparison where no dataset is at hand: seeded, coarse patches under fine noise.

    Agreement is a property of the graph, not of the data; the patches give the deeper layers the large structures
    that pure noise, averaged away by the first of them, would not.
    """
    height, width, channels = image_shape
    rng = np.random.default_rng(derive(0, "export"))
    coarse = rng.integers(0, 200, (count, 4, 4, channels))
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    noise = rng.integers(0, 56, (count, *image_shape))
    return (coarse[:, rows][:, :, columns] + noise).astype(np.uint8)


def _dataset(record: DatasetRecord, root: Path | None, say: Callable[[str], object]) -> Dataset | None:
    """The run's images, or, unless the user said where they lie, a sentence that they are not at hand."""
    try:
        return record.load(root)
    except (DataError, UsageError) as error:
        if root is not None:
            raise
        say(f"The run's images are not at hand: {error}.")
        return None


def _some(split: Images, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Up to ``count`` images (B, H, W, 3) of a split and their labels (B,), drawn with a seed: folders lie sorted."""
    generator = torch.Generator().manual_seed(derive(0, "export"))
    part = split.part(torch.randperm(len(split), generator=generator)[:count])
    images = torch.cat([batch.images for batch in part.batches(256)])
    return images.numpy(), part.labels.numpy()


def _content(ensemble: Ensemble, run_path: Path, pixels: Pixels, **written: Any) -> BundleManifest:
    record = ensemble.run.manifest
    sampling = None
    if record.sampling and written["layout"] == "vertices":
        drawn = record.sampling
        sampling = Simplexes(simplexes=drawn.simplexes, concentration=drawn.concentration, weights=drawn.weights)
    return BundleManifest(
        method=record.method,
        architecture=record.architecture,
        dataset=record.dataset.title,
        classes=record.dataset.classes,
        image_shape=record.dataset.shape,
        members=ensemble.members,
        input=pixels,
        order=list(range(ensemble.members)),
        vertices=record.vertices,
        sampling=sampling,
        parameters=record.parameters,
        training_cost=record.cost.model_dump(),
        run=Origin(name=run_path.resolve().name, sha256=ensemble.run.sha256),
        max_difference=0.0,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        **written,
    )


def _open(folder: Path, content: BundleManifest, *, merged: bool = False) -> Members:
    """The members as they will be served."""
    threads = available_cpus()
    together = open_merged(folder, content, threads) if merged else None
    sessions = open_members(folder, content)
    return Members(sessions, threads, content.image_shape, len(content.classes), content.input == "float", together)


def _compare(
    opened: Members, content: BundleManifest, ensemble: Ensemble, folder: Path, test: NDArray[np.uint8] | None
) -> None:
    """Compare every member with PyTorch at each of :data:`BATCHES`, and keep some answers for ``verify``.

    The latter are PyTorch's, or, in fewer bits, the members' own: these may differ more from PyTorch's, on images
    unlike the dataset's, than any fault that ``verify`` should find.

    Raises:
        ExportError: a member that differs.
    """
    exact, probe = content.precision == "float32", patches(content.image_shape, sum(BATCHES))
    sets = {"test images": test} if test is not None and len(test) == sum(BATCHES) else {}
    sets |= {"seeded patches": probe} if exact or not sets else {}
    images = np.concatenate(list(sets.values()))
    expected = ensemble.predict_members(images).numpy()
    for member in range(len(opened)):
        for start in range(0, len(images), sum(BATCHES)):
            part = slice(start, start + sum(BATCHES))
            try:
                difference = _difference(opened, member, images[part], expected[member, part], content.precision)
            except ExportError as error:
                raise ExportError(f"member {member}: {error}") from error
            content.max_difference = max(content.max_difference, difference)
    content.compared_on = list(sets)
    np.savez(folder / PROBE, images=probe, probabilities=expected[:, -len(probe) :] if exact else opened.ask(probe))


def _difference(
    opened: Members, member: int, images: NDArray[np.uint8], expected: NDArray[np.float32], precision: Precision
) -> float:
    """Largest difference of a probability between a member as it will be served and PyTorch, at each batch size."""
    largest, start = 0.0, 0
    for batch in BATCHES:
        part = slice(start, start + batch)
        try:
            found = opened.ask(images[part], "loop", member, member + 1)[0]
        except Exception as error:
            raise ExportError(f"the graph fails at a batch of {batch}: {str(error).splitlines()[0]}") from error
        difference = float(np.abs(found - expected[part]).max())
        if not difference <= (TOLERANCE if precision == "float32" else 1.0):  # not a number counts as too large
            raise ExportError(
                f"ONNX differs from PyTorch by {difference:.1e} in a probability at a batch of {batch}, "
                f"more than {TOLERANCE:.0e}: the network computes something that ONNX does not reproduce"
            )
        largest, start = max(largest, difference), start + batch
    return largest


def _judge(
    opened: Members,
    content: BundleManifest,
    ensemble: Ensemble,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
) -> None:
    """What validation images tell: whether the precision will do, the order of the members, their usual doubt.

    Raises:
        ExportError: the precision will not do.
    """
    members = opened.ask(images)
    if content.precision != "float32":
        reference = ensemble.predict_members(images).numpy()
        content.precision_check = check_precision(content.precision, reference, members, labels)
    likely = members[:, np.arange(len(labels)), labels].astype(np.float64)
    content.order, content.ordered_by = greedy_order(likely), "validation NLL"
    doubt = uncertainty(members)
    information = doubt.mutual_information
    content.validation = Validation(
        examples=len(labels),
        accuracy=float((mean_probabilities(members).argmax(-1) == labels).mean()),
        nll=float(-np.log(np.maximum(likely.mean(axis=0), calibration.FLOOR)).mean()),
        levels=list(LEVELS),
        predictive_entropy=np.quantile(doubt.predictive_entropy, LEVELS).tolist(),
        mutual_information=None if information is None else np.quantile(information, LEVELS).tolist(),
    )


def _tune(folder: Path, content: BundleManifest, images: NDArray[np.uint8]) -> None:
    """Measure every strategy; keep the graph of all members only where it wins.

    Raises:
        ExportError: that graph does not reproduce the members.
    """
    write_merged(folder, content)
    opened = _open(folder, content, merged=True)
    few = images[: sum(BATCHES)]
    difference = float(np.abs(opened.ask(few, "merged") - opened.ask(few)).max())
    if not difference <= TOLERANCE:
        raise ExportError(f"the members differ by {difference:.1e} when they run in one graph: export without --tune")
    content.tuning = measured(opened, images)
    opened.close()
    if "merged" not in content.tuning.winners.values():
        for file in folder.glob(f"{MERGED}*"):
            file.unlink()


def _calibrate(
    run_path: Path, folder: Path, content: BundleManifest, *, sampled: bool, say: Callable[[str], object]
) -> None:
    """Take the run's calibration along, where these are the members that it was fitted for.

    Raises:
        ArtefactError: the run has one that was fitted for others; CorruptError: it has changed.
    """
    if calibration.load(run_path) is None:
        return
    calibration.read(run_path / calibration.FILE, content.run.sha256)  # another run may lie there by now
    if sampled:
        say("The run's calibration was fitted for its own members: it is left out.")
        return
    if content.precision != "float32":
        say(f"The run's calibration was fitted in float32, and these members compute in {content.precision}.")
    (folder / calibration.FILE).write_bytes((run_path / calibration.FILE).read_bytes())
    content.calibration = calibration.FILE
