"""A run to a bundle: members as ONNX, each compared with PyTorch before the bundle exists.

A graph takes ``images`` (batch, H, W, 3), normalises them, and gives ``logits`` (batch, C) float32. Members differ only
in their weights, so one is traced, and the others are its graph with their own weights, found by name. Where a weight
cannot be found so, every member is traced.

Where the run's dataset is available, the comparison uses its test images, too, the members are ordered on its
validation images, and their usual uncertainty is measured on them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from ensembler import calibration
from ensembler.arguments import checked
from ensembler.calibration import Calibration
from ensembler.calibration_maps import Temperature
from ensembler.data.datasets import NAMES, Dataset
from ensembler.device import default_modes
from ensembler.ensemble import Ensemble
from ensembler.errors import ArtefactError, DataError, ExportError, UsageError
from ensembler.machine import available_cpus
from ensembler.networks.architectures import Factory
from ensembler.run import DatasetRecord, Gaussians, Sampling, versions
from ensembler.serve.export.agreement import check_merged, compare, patches
from ensembler.serve.export.graphs import save
from ensembler.serve.export.precision import calibration_lost
from ensembler.serve.export.reasons import unfit
from ensembler.serve.export.single import single_graph
from ensembler.serve.export.validation import Judgement, judge, some
from ensembler.serve.export.writer import Writer, Written, write_merged
from ensembler.serve.runtime.gpu import GpuOptions
from ensembler.serve.runtime.manifest import (
    EXAMPLES,
    MERGED,
    SINGLE,
    BundleManifest,
    Layout,
    Origin,
    Pixels,
    Precision,
    Simplexes,
    Tuning,
)
from ensembler.serve.runtime.sessions import on_gpu, open_members, open_merged, providers
from ensembler.serve.runtime.strategies import Members
from ensembler.serve.runtime.tune import tune as measure_strategies
from ensembler.serve.runtime.verify import single_difference
from ensembler.storage import artefact, signing
from ensembler.task import Classification

__all__ = ["VALIDATION_IMAGES", "export_run"]

VALIDATION_IMAGES = 1000

_ONE_FILE: Final = "single"  # the layout that adds one file with the whole ensemble
_RANGES = 256  # training images that the ranges of 8-bit activations are taken from
_TEST = 64  # test images to compare and to time strategies with
_SHOWN = 8  # test images for the page

Say = Callable[[str], object]


@default_modes()
@checked
def export_run(
    run_path: str | Path,
    out: str | Path,
    *,
    layout: Layout | Literal["single"] | None = None,
    members: int | None = None,
    seed: int = 0,
    pixels: Pixels = "uint8",
    precision: Precision = "float32",
    data: str | Path | None = None,
    dataset: Any = None,
    use_data: bool = True,
    examples: int = VALIDATION_IMAGES,
    tune: bool = False,
    key: str | Path | None = None,
    say: Say = lambda sentence: None,
    network: Factory | None = None,
) -> Path:
    """Export the members of a run, whole or not at all.

    Args:
        run_path: the run's folder.
        out: the bundle's folder; must not exist.
        layout: ``"members"``: a self-contained file for each, for any runtime; ``"vertices"``: one graph and the
            vertices, from which our runtime makes the members. By default the latter where there are fewer of them.
            ``"single"``: as by default, and beside it one self-contained file with all members, their mean and their
            uncertainty, for any runtime: see :mod:`ensembler.serve.export.single`.
        members: sample this many new ones from the run's simplexes; by default the run's own.
        seed: of that sample.
        pixels: ``"uint8"``: graphs take pixels from 0 to 255; ``"float"``: float32 from 0 to 1.
        precision: lower ones are accepted only within :data:`ensembler.serve.export.precision.BOUNDS`.
        data: folder of the run's dataset; by default its usual place, and where it is missing, the steps that need it
            are left out.
        dataset: what the run was trained on, or its name now, where the run knows no name to load it by; see
            :func:`ensembler.as_dataset`.
        use_data: whether to look for the dataset.
        examples: how many of its validation images to use, at most.
        key: PEM file of an Ed25519 private key to sign the bundle with.
        tune: measure how the members run fastest on this machine.
        say: called with a sentence for each step that was left out.
        network: what builds the run's network, where it cannot be imported.

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
    signed = None if key is None else partial(signing.sign, key=signing.private_key(key))
    ensemble = Ensemble.load(run_path, device="cpu", network=network)
    _check_task(ensemble, run_path)
    with artefact.write(out, manifest, signed) as folder:
        file = run_path / calibration.FILE
        fitted = calibration.read(file, ensemble.run.sha256) if file.is_file() else None
        dataset = _dataset(ensemble.run.manifest.dataset, data, dataset, say) if use_data else None
        if precision != "float32" and dataset is None:
            raise UsageError(f"{precision} is accepted only after a comparison on validation images: give their --data")
        if members is not None:
            ensemble = ensemble.sample(members, seed, dataset.train if dataset else None)
            fitted = _unless("it was fitted for the run's own members", fitted, say)
        ranges = some(dataset.train, _RANGES)[0] if dataset and precision == "int8" else None
        test = some(dataset.test, _TEST)[0] if dataset else None
        judgement = Judgement(order=list(range(ensemble.members)))
        try:
            written = Writer(folder, ensemble, pixels, precision, ranges).write(None if layout == _ONE_FILE else layout)
            opened = _open(folder, written, ensemble.run.manifest.dataset, judgement.order)
            agreement = compare(opened, ensemble, folder, precision, test)
        except (ExportError, ArtefactError) as error:
            raise ExportError(f"{run_path}: {error}") from error
        if dataset:
            judgement = judge(opened, ensemble, precision, fitted, *some(dataset.validation, examples))
            fitted = _unless(calibration_lost(judgement.precision_check), fitted, say)
        else:
            say("Without validation images, members keep the run's order, and their usual uncertainty is not known.")
        opened.close()
        record = ensemble.run.manifest
        content = BundleManifest(
            method=record.method,
            architecture=record.architecture,
            dataset=record.dataset.title,
            classes=record.dataset.classes,
            image_shape=record.dataset.shape,
            members=ensemble.members,
            vertices=record.vertices,
            parameters=record.parameters,
            training_cost=record.cost.model_dump(),
            run=Origin(name=run_path.resolve().name, sha256=ensemble.run.sha256),
            sampling=_sampling(record.sampling) if written.layout == "vertices" else None,
            tuning=_tune(folder, written, record.dataset, judgement.order, test, agreement.tolerance) if tune else None,
            calibration=calibration.FILE if fitted else None,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=versions(),
            **vars(written),
            **vars(agreement),
            **vars(judgement),
        )
        if fitted:
            shutil.copyfile(file, folder / calibration.FILE)
        if layout == _ONE_FILE:
            _write_single(folder, content, agreement.tolerance, fitted, say)
        if test is not None and record.dataset.name in NAMES:  # a folder's images stay private
            np.save(folder / EXAMPLES, test[:_SHOWN])
        manifest.update(content.model_dump())
    return out


def _check_task(ensemble: Ensemble, run_path: Path) -> None:
    record = ensemble.run.manifest
    if not isinstance(ensemble.task, Classification) or record.dataset.kind != "images":
        raise UsageError(
            f"{run_path} is a {record.task} of {record.dataset.kind}: only classifiers of images can be exported"
        )


def _dataset(record: DatasetRecord, root: str | Path | None, given: Any, say: Say) -> Dataset | None:
    """Load the run's dataset; where it is missing and nobody said where it is, say so."""
    try:
        return record.load(root, dataset=given)
    except (DataError, UsageError) as error:
        if root is not None or given is not None:
            raise
        say(f"The run's images were not found: {error}.")
        return None


def _sampling(drawn: Sampling | Gaussians | None) -> Simplexes | None:
    """How the server draws further members: points of simplexes, not of Gaussians, which leave the vertices' span."""
    return Simplexes(**drawn.model_dump(include=set(Simplexes.model_fields))) if isinstance(drawn, Sampling) else None


def _open(folder: Path, written: Written, record: DatasetRecord, order: list[int], *, merged: bool = False) -> Members:
    """Open the members as they will be served: on a GPU where there is one, with TF32 only at that precision."""
    threads = available_cpus()
    ways = providers(GpuOptions(), written.precision == "tf32", len(order) + merged)
    together = open_merged(folder, written.layout, order, threads, ways) if merged else None
    try:
        sessions = open_members(folder, written.layout, written.graphs, order, ways)
    except ArtefactError as error:
        raise ExportError(unfit(error)) from error
    if written.precision == "tf32" and not on_gpu(sessions):
        raise UsageError(
            "TF32 is computed by NVIDIA's GPUs only, and ONNX Runtime finds none here to compare it on: export on a "
            "machine with one, or choose another --precision"
        )
    return Members(sessions, threads, record.shape, len(record.classes), written.input == "float", together)


def _tune(
    folder: Path,
    written: Written,
    record: DatasetRecord,
    order: list[int],
    test: NDArray[np.uint8] | None,
    tolerance: float,
) -> Tuning:
    """Time every strategy; keep the graph of all members only where it wins.

    Raises:
        ExportError: that graph does not reproduce the members.
    """
    images = patches(record.shape, _TEST) if test is None else test
    write_merged(folder, written.layout, written.graphs, order)
    opened = _open(folder, written, record, order, merged=True)
    check_merged(opened, images, tolerance)
    tuning = measure_strategies(opened, images)
    opened.close()
    if "merged" not in tuning.winners.values():
        for file in folder.glob(f"{MERGED}*"):
            file.unlink()
    return tuning


def _write_single(
    folder: Path, manifest: BundleManifest, tolerance: float, fitted: Calibration | None, say: Say
) -> None:
    """Write one file with the whole ensemble, compared with what the members answer.

    Raises:
        ExportError: it does not reproduce them.
    """
    save(single_graph(folder, manifest), folder / SINGLE)
    if fitted and not isinstance(fitted.map, Temperature):
        say(f"{SINGLE} has no calibrated probabilities: the calibration is by {fitted.map.method}, not by temperature.")
    sessions = open_members(folder, manifest.layout, manifest.graphs, manifest.order)
    opened = Members(sessions, 1, manifest.image_shape, len(manifest.classes), manifest.input == "float")
    images = patches(manifest.image_shape, _TEST)
    given = images / np.float32(255) if manifest.input == "float" else images
    difference = single_difference(folder / SINGLE, given, opened.ask(images))
    opened.close()
    if not difference <= tolerance:
        raise ExportError(f"{SINGLE} differs from the members by {difference:.1e}: export without --layout single")


def _unless(reason: str | None, fitted: Calibration | None, say: Say) -> Calibration | None:
    """A run's calibration, unless there is a reason to leave it out, which is said."""
    if reason is None or fitted is None:
        return fitted
    say(f"The run's calibration is left out: {reason}.")
    return None
