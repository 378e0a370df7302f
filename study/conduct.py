"""``ensembler study``: plan, train, evaluate, report."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console

from ensembler.data.datasets import Dataset
from ensembler.device import choose_device
from ensembler.engine import choose
from ensembler.errors import UsageError
from ensembler.eval.evaluation import evaluate_paths
from ensembler.eval.options import EvaluationOptions
from ensembler.eval.outputs import print_lines, write_files
from ensembler.eval.shift.ood import load_ood
from ensembler.eval.shift.readers import load_shifts
from ensembler.eval.shift.test_set import TestSet, check_images
from ensembler.progress import watching
from ensembler.storage.artefact import check_writable
from ensembler.study.analysis import analyse
from ensembler.study.board import showing
from ensembler.study.estimate import measure_speed
from ensembler.study.file import Study, read, study_of
from ensembler.study.options import StudyOptions
from ensembler.study.plan import plan
from ensembler.study.report import files, planned, terminal
from ensembler.study.run import Maker, index
from ensembler.trainers.events import Message
from ensembler.trainers.progress import progress
from ensembler.trainers.settings import Settings
from ensembler.trainers.training import Training

__all__ = ["conduct"]


def conduct(file: Path | None, typed: Mapping[str, Any], options: StudyOptions) -> None:
    """Run a study.

    Args:
        file: the study's, if it has one.
        typed: the options that were typed, by field name.
        options: where it runs.

    Raises:
        UsageError: the file or the options ask for what cannot be planned. EnsemblerError: of a training, or of the
            evaluation.
    """
    start = time.monotonic()
    study = study_of(read(file) if file else {}, typed, str(file) if file else "the study")
    out = options.out or Path(f"study-{file.stem if file else _label(study)}")
    check_writable(out)
    dataset = study.data.load()
    found = plan(study, dataset)
    with progress(options.quiet) as say:
        for note in dataset.notes:
            say(Message(note))
        tried = Training.of(dataset, study.entries[0].method, found.settings, {}).tried(say)
    computing = {name: getattr(tried.settings, name) for name in Settings.marked("computing")}
    tests = EvaluationOptions.typed(
        {
            **study.grid.model_dump(include={"shift", "ood", "examples"}),
            **study.data.model_dump(include={"data", "download", "corrupt"}),
            **{"device": tried.settings.device, "threads": tried.settings.threads, "cache": options.cache},
        }
    )
    images = _images(dataset, tests)
    if options.dry_run:
        speed = measure_speed(found, dataset, found.settings.model_copy(update=computing))
        Console(highlight=False).print(planned(found, speed, images))
        return
    with (
        choose(
            options.engine,
            options.address,
            choose_device(tried.settings.device).type,
            tried.settings.threads,
            options.parallel_members,
        ) as engine,
    ):
        known = index([out.resolve() / "runs", *(options.runs if options.runs is not None else [Path("runs")])])
        try:
            with showing(found, options.quiet) as board:
                maker = Maker(
                    found,
                    dataset,
                    out.resolve() / "runs",
                    engine,
                    computing,
                    known,
                    board.on_run,
                    options.checkpoint_every,
                    board.on_event,
                )
                places = maker.make()
            with watching(options.quiet, unit="images") as watch:
                paths = list(places.values())
                evaluation, varied = evaluate_paths(paths, tests, watch=watch, engine=engine), None
                if study.grid.views:
                    clean = {"views": [study.grid.views], "shift": None, "ood": None}
                    varied = evaluate_paths(paths, tests.model_copy(update=clean), watch=watch, engine=engine)
        except KeyboardInterrupt:
            typer.echo("to resume: the same command", err=True)
            raise
    report = analyse(found, study, places, evaluation, varied)
    write_files(out, files(report), None)
    Console(highlight=False).print(terminal(report))
    print_lines(f"took {time.monotonic() - start:.0f} s; report: {out}")


def _images(dataset: Dataset, tests: EvaluationOptions) -> int:
    """Images that each run predicts; an unknown test set is refused before hours of training."""
    count = len(dataset.test) if tests.examples is None else tests.examples
    if count > len(dataset.test):
        raise UsageError(f"the test set has {len(dataset.test):,} images: give at most as many examples, not {count:,}")
    if count < 2:
        raise UsageError("one test image gives no interval: a study takes two at least")
    shifts = load_shifts(tests.shift or (), dataset, torch.arange(count), tests.data)
    for one in shifts:
        if not one.corruptions:
            raise UsageError(f"--shift {one.name} has no corruptions: a study takes cifar10c, cifar100c or corruptions")
    sources: dict[str, Any] = {"root": tests.data, "download": tests.download, "corrupt": tests.corrupt}
    outside: list[TestSet] = []
    if tests.ood:
        check_images(dataset, "--ood")
        height, width, _ = dataset.test.example_shape
        outside = [load_ood(name, (height, width), examples=tests.examples, **sources) for name in tests.ood]
    shifted = [len(one.examples) for shift in shifts for one in shift.sets if isinstance(one, TestSet)]
    return len(dataset.validation) + count + sum(shifted) + sum(len(one.examples) for one in outside)


def _label(study: Study) -> str:
    return re.sub(r"[^\w.-]+", "-", f"{study.data.name}-{study.settings.architecture}")
