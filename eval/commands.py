"""The evaluation commands.

Annotations are evaluated here, not postponed: Typer reads them.
"""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ensembler.eval import data_commands
from ensembler.eval.options import (
    BatchSize,
    Cache,
    Data,
    Device,
    Download,
    Json,
    Quiet,
    new_folder,
    print_lines,
    write_files,
)
from ensembler.progress import watching
from ensembler.storage import is_url, place

__all__ = ["app"]

app = typer.Typer()
app.add_typer(data_commands.app)

Comparison = dict[str, Any] | None


def _report(
    name: str,
    runs: list[Path],
    comparison: Comparison,
    *,
    shift: Annotated[
        str | None,
        typer.Option(
            help="Shifted test images: cifar10c or cifar100c (official files where they exist, else generated), or "
            "corruptions (generated). (default: none)"
        ),
    ] = None,
    ood: Annotated[
        list[str] | None,
        typer.Option(
            help="Out-of-distribution images: a dataset, folder:PATH, or noise:gaussian|uniform|constant. Repeatable."
        ),
    ] = None,
    examples: Annotated[int | None, typer.Option(help="Number of test images. (default: all)")] = None,
    data: Data = None,
    download: Download = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the report. (default: a new one in reports/)")] = None,
    json: Json = None,
    cache: Cache = None,
    device: Device = None,
    batch_size: BatchSize = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. (default: all)")] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Where shifted images are predicted: in this process, or by Ray.")
    ] = "local",
    address: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster. (default: RAY_ADDRESS, or a new local Ray)")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Random seed of generated images, the choice of examples, and bootstrap intervals.")
    ] = 0,
    quiet: Quiet = False,
) -> None:
    """Evaluate, compare where that is wanted, and write everything to one folder."""
    import shlex
    import sys
    import time

    from rich.console import Console

    from ensembler.artefact import check_writable
    from ensembler.device import choose_device
    from ensembler.engine import choose
    from ensembler.eval.compare import compare
    from ensembler.eval.evaluation import evaluate
    from ensembler.eval.report.figures import figures
    from ensembler.eval.report.page import page
    from ensembler.eval.report.plots import to_png
    from ensembler.eval.report.text import csv, markdown, tables

    start = time.monotonic()
    check_writable(out or Path("reports"))
    if json is not None:
        check_writable(json.parent, "choose another --json")
    # Predictions are kept under the kind of device, which is this process's.
    with watching(quiet, unit="images") as watch, choose(engine, address, choose_device(device).type, threads) as by:
        found = evaluate(
            runs,
            shift,
            ood=ood or (),
            data=data,
            download=download,
            examples=examples,
            device=device,
            batch_size=batch_size,
            seed=seed,
            cache=cache,
            watch=watch,
            threads=threads,
            engine=by,
        )
    report = found.report if comparison is None else compare(found, **comparison)
    drawn = figures(found, report)
    seconds = time.monotonic() - start
    files = {
        "report.html": page(found, report, drawn, seconds=seconds, command=shlex.join(["ensembler", *sys.argv[1:]])),
        "report.md": markdown(report).encode(),
        "report.csv": csv(report).encode(),
        "report.json": (report.model_dump_json(indent=2) + "\n").encode(),
        **{f"{title}.png": to_png(picture.figure) for title, picture in drawn.items()},
    }
    folder = out or new_folder(Path("reports"), name)
    write_files(folder, files, json)
    Console(highlight=False).print(tables(report))
    print_lines(f"took {time.monotonic() - start:.0f} s; report: {folder} ({', '.join(files)})")


def _command(name: str) -> Callable[[Callable[..., tuple[list[Path], Comparison]]], None]:
    """Make a command of a function that says which runs to report on: its own options, then those of a report."""

    def decorate(choose_runs: Callable[..., tuple[list[Path], Comparison]]) -> None:
        own, shared = (inspect.signature(each).parameters for each in (choose_runs, _report))
        options = [*own.values(), *(option for option in shared.values() if option.kind is option.KEYWORD_ONLY)]

        @functools.wraps(choose_runs)
        def command(**given: Any) -> None:
            runs, comparison = choose_runs(**{key: given.pop(key) for key in own})
            _report(name, runs, comparison, **given)

        keywords = [option.replace(kind=option.KEYWORD_ONLY) for option in options]
        command.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
        command.__annotations__ = {option.name: option.annotation for option in options}
        app.command(name)(command)

    return decorate


@_command("eval")
def _eval(
    runs: Annotated[
        list[Path] | None, typer.Argument(parser=place, help="Runs to score. (default: the newest in runs/)")
    ] = None,
) -> tuple[list[Path], Comparison]:
    """Score runs side by side: accuracy, likelihood, calibration; clean, under shift and out of distribution."""
    from ensembler.run import latest

    return runs or [latest(Path("runs"))], None


@_command("compare")
def _compare(
    runs: Annotated[list[Path], typer.Argument(parser=place, help="Two or more runs of one dataset.")],
    baseline: Annotated[
        Path | None,
        typer.Option(parser=place, help="Run that the others are compared with. (default: the first)"),
    ] = None,
    curve: Annotated[
        bool, typer.Option("--curve", help="Score every run against its number of members, to choose M.")
    ] = False,
) -> tuple[list[Path], Comparison]:
    """Compare runs at their costs: differences with intervals, seeds grouped, deep-ensemble equivalents."""
    from ensembler.errors import UsageError
    from ensembler.eval.compare import check_names
    from ensembler.eval.evaluation import distinct

    places = distinct(runs)
    check_names([path.name for path in places])
    if baseline is not None and baseline.resolve() not in places:
        raise UsageError(f"--baseline {baseline} is none of the runs: name it among them, too")
    against = 0 if baseline is None else places.index(baseline.resolve())
    return places, {"baseline": against, "curves": curve}


@app.command("calibrate")
def calibrate(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="The run. (default: the newest in runs/)")] = None,
    method: Annotated[
        Literal["temperature", "isotonic", "beta", "histogram"],
        typer.Option(help="Map from the pooled prediction to calibrated probabilities."),
    ] = "temperature",
    alpha: Annotated[float, typer.Option(help="Largest share of prediction sets that miss the true class.")] = 0.1,
    conformal: Annotated[Literal["lac", "aps"], typer.Option(help="Kind of prediction sets.")] = "lac",
    risk: Annotated[
        float | None,
        typer.Option(help="Largest share of wrong answers, above which to abstain. (default: no abstention)"),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Probability with which --risk holds.")] = 0.95,
    data: Data = None,
    download: Download = False,
    cache: Cache = None,
    device: Device = None,
    batch_size: BatchSize = None,
    seed: Annotated[int, typer.Option(help="Random seed of the choice of images that fit the map.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Fit a run's calibration, prediction sets and abstention on its validation images; stored in the run's folder."""
    from ensembler import calibration
    from ensembler.artefact import check_writable
    from ensembler.errors import UsageError
    from ensembler.eval.calibrate import calibrate, summary
    from ensembler.run import latest

    if run is not None and is_url(run):
        raise UsageError(
            f"a calibration is kept with its run: ensembler pull {run} --out PATH, ensembler calibrate PATH, and "
            f"ensembler push PATH {run} sends it there"
        )
    path = latest(Path("runs")) if run is None else Path(run)
    path = path.resolve() if path.is_symlink() else path  # latest may be another one soon
    check_writable(path, "a calibration lies in its run's folder: copy the run to where you may write")
    with watching(quiet, unit="images") as watch:
        found = calibrate(
            path,
            method,
            alpha=alpha,
            conformal=conformal,
            risk=risk,
            confidence=confidence,
            data=data,
            download=download,
            device=device,
            batch_size=batch_size,
            seed=seed,
            cache=cache,
            watch=watch,
        )
    print_lines(summary(found), f"calibration: {calibration.save(found, path)}")


@app.command("surface")
def surface(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(parser=place, help="One run, or three of one network. (default: the newest in runs/)"),
    ] = None,
    vertices: Annotated[
        str | None,
        typer.Option(help="Three vertices of the one run. (default: 0,1,2; of a curve, its ends and middle bend)"),
    ] = None,
    grid: Annotated[int, typer.Option(help="Points per side.")] = 21,
    margin: Annotated[float, typer.Option(help="Reach beyond the three points, as a share of their extent.")] = 0.2,
    examples: Annotated[int, typer.Option(help="Largest number of training and of test images to measure on.")] = 500,
    batchnorm_examples: Annotated[
        int, typer.Option(help="Largest number of training images for BatchNorm statistics at each point.")
    ] = 512,
    data: Data = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the figures. (default: a new one in surfaces/)")] = None,
    json: Json = None,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Random seed of the choice of images.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Draw loss and error on the plane through three networks (Garipov et al. 2018), and along a curve's path."""
    from ensembler.artefact import check_writable
    from ensembler.errors import UsageError
    from ensembler.eval.report.surface_figures import plot_paths, plot_surface
    from ensembler.eval.surface import measure_surface, summary
    from ensembler.run import latest

    try:
        chosen = None if vertices is None else [int(number) for number in vertices.split(",")]
    except ValueError as error:
        raise UsageError(f"--vertices takes three numbers, such as 0,1,2: not {vertices!r}") from error
    check_writable(out or Path("surfaces"))
    if json is not None:
        check_writable(json.parent, "choose another --json")

    with watching(quiet, unit="points") as watch:
        found = measure_surface(
            runs or [latest(Path("runs"))],
            chosen,
            grid=grid,
            margin=margin,
            examples=examples,
            batchnorm_examples=batchnorm_examples,
            data=data,
            device=device,
            seed=seed,
            watch=watch,
        )
    files = {
        "surface.json": (found.model_dump_json(indent=2) + "\n").encode(),
        "surface.png": plot_surface(found),
        **({"path.png": plot_paths(found)} if found.paths else {}),
    }
    folder = out or new_folder(Path("surfaces"), "surface")
    write_files(folder, files, json)
    print_lines(summary(found), f"took {found.seconds:.0f} s; surface: {folder} ({', '.join(files)})")
