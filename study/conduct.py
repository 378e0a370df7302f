"""``ensembler study``: plan, train, evaluate, report."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from ensembler.artefact import check_writable
from ensembler.datasets import Dataset
from ensembler.device import choose_device
from ensembler.engine import choose
from ensembler.eval.evaluation import evaluate_paths
from ensembler.eval.options import EvaluationOptions
from ensembler.eval.outputs import print_lines, write_files
from ensembler.progress import watching
from ensembler.study.analysis import analyse
from ensembler.study.board import showing
from ensembler.study.estimate import measure_speed
from ensembler.study.file import Study, read, study_of
from ensembler.study.options import StudyOptions
from ensembler.study.plan import Plan, plan
from ensembler.study.report import files, planned, terminal
from ensembler.study.run import Maker, index
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
    tried = Training.of(dataset, study.entries[0].method, found.settings, {}).tried()
    computing = {name: getattr(tried.settings, name) for name in Settings.marked("computing")}
    tests = _tests(study, options)
    if options.dry_run:
        speed = measure_speed(found, dataset, found.settings.model_copy(update=computing))
        Console(highlight=False).print(planned(found, speed, _images(dataset, study)))
        return
    with (
        choose(
            options.engine, options.address, choose_device(tried.settings.device).type, tried.settings.threads,
            options.parallel_members,
        ) as engine,
    ):
        elsewhere = index(options.runs if options.runs is not None else [Path("runs")])
        try:
            with showing(found, options.quiet) as board:
                maker = Maker(
                    found, dataset, out.resolve() / "runs", engine, computing, elsewhere, board.on_run,
                    options.checkpoint_every, board.on_event,
                )
                places = maker.make()
            with watching(options.quiet, unit="images") as watch:
                evaluation = evaluate_paths(list(places.values()), tests, watch=watch, engine=engine)
        except KeyboardInterrupt:
            typer.echo("to resume: the same command", err=True)
            raise
    report = analyse(found, study, places, evaluation)
    write_files(out, files(report), None)
    Console(highlight=False).print(terminal(report))
    print_lines(f"took {time.monotonic() - start:.0f} s; report: {out}")
