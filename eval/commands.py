"""The evaluation commands.

Annotations are evaluated here, not postponed: Typer reads them.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ensembler.eval import data_commands
from ensembler.eval.options import CalibrationOptions, EvaluationOptions, ReportOptions, SurfaceOptions
from ensembler.eval.outputs import print_lines, write_result
from ensembler.options import Options, parameters, with_parameters
from ensembler.progress import waiting, watching
from ensembler.storage.urls import is_url, place

__all__ = ["app"]

app = typer.Typer()
app.add_typer(data_commands.app)

_Quiet = Annotated[bool, typer.Option("--quiet", help="Print only the final result.")]


def _own_first(record: type[Options]) -> list[inspect.Parameter]:
    """Return a record's options, its own before the inherited ones."""
    return sorted(parameters(record, "Options"), key=lambda option: option.name not in record.__annotations__)


def _command(name: str, *records: type[Options]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command: the options of the records, which its function is called with, and the function's own."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function).parameters.values())[len(records) :]
        shared = [option for record in records for option in _own_first(record)]

        def command(**given: Any) -> None:
            function(
                *(record.typed(given) for record in records), **{option.name: given[option.name] for option in own}
            )

        command.__doc__ = function.__doc__
        app.command(name)(with_parameters(command, [*own, *shared]))
        return function

    return decorate


@_command("eval", EvaluationOptions, ReportOptions)
def _eval(
    options: EvaluationOptions,
    report: ReportOptions,
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            parser=place, help="Runs, and files of predictions (.npz, .csv, .parquet). (default: the newest in runs/)"
        ),
    ] = None,
) -> None:
    """Score runs or given predictions: accuracy, likelihood, calibration; clean, under shift, out of distribution."""
    from ensembler.run import latest

    _report("eval", runs or [latest(Path("runs"))], options, report)


@_command("compare", EvaluationOptions, ReportOptions)
def _compare(
    options: EvaluationOptions,
    report: ReportOptions,
    runs: Annotated[
        list[Path], typer.Argument(parser=place, help="Two or more runs, or files of predictions, of one dataset.")
    ],
    baseline: Annotated[
        Path | None,
        typer.Option(parser=place, help="Run that the others are compared with. (default: the first)"),
    ] = None,
    curve: Annotated[
        bool, typer.Option("--curve", help="Score every run against its number of members, to choose M.")
    ] = False,
) -> None:
    """Compare runs or given predictions at their costs: differences with intervals, seeds grouped, equivalents."""
    from ensembler.errors import UsageError
    from ensembler.eval.comparison import check_names
    from ensembler.eval.evaluation import distinct, rows

    places = distinct(runs)
    scored = rows(places, options)
    check_names([name for name, _, _ in scored])
    if baseline is not None and baseline.resolve() not in places:
        raise UsageError(f"--baseline {baseline} is none of the runs: name it among them, too")
    against = 0 if baseline is None else [path for _, path, _ in scored].index(baseline.resolve())
    _report("compare", places, options, report, {"baseline": against, "curves": curve})


def _report(
    name: str,
    runs: list[Path],
    options: EvaluationOptions,
    report: ReportOptions,
    comparison: dict[str, Any] | None = None,
) -> None:
    """Evaluate, compare if wanted, and write everything to one folder."""
    import shlex
    import sys
    import time
    from dataclasses import replace

    from rich.console import Console

    from ensembler.device import choose_device
    from ensembler.engine import choose
    from ensembler.eval.comparison import compare_runs
    from ensembler.eval.evaluation import evaluate_paths
    from ensembler.eval.report.files import report_files
    from ensembler.eval.report.text import tables
    from ensembler.storage.artefact import check_writable

    start = time.monotonic()
    check_writable(report.out or Path("reports"))
    if report.json_file is not None:
        check_writable(report.json_file.parent, "choose another --json")
    device = choose_device(options.device).type  # this process's: predictions are kept under it
    with (
        watching(report.quiet, unit="images") as watch,
        choose(report.engine, report.address, device, options.threads) as engine,
    ):
        found = evaluate_paths(runs, options, watch=watch, engine=engine)
    with waiting(report.quiet, "writing the report"):
        if comparison is not None:
            found = replace(found, report=compare_runs(found, **comparison))
        took, command = time.monotonic() - start, shlex.join(["ensembler", *sys.argv[1:]])
        files = report_files(found, seconds=took, command=command)
    folder = write_result(report.out, "reports", name, files, report.json_file)
    console = Console(highlight=False)
    console.print(tables(found.report, console.width, report.full, bold=console.is_terminal))
    print_lines(f"took {time.monotonic() - start:.0f} s; report: {folder}/report.html")


@_command("calibrate", CalibrationOptions)
def _calibrate(
    options: CalibrationOptions,
    run: Annotated[str | None, typer.Argument(help="The run. (default: the newest in runs/)")] = None,
    quiet: _Quiet = False,
) -> None:
    """Fit a run's calibration, prediction sets and abstention on its validation images; stored in the run's folder."""
    from ensembler import calibration
    from ensembler.errors import UsageError
    from ensembler.eval.calibrate import calibrate, summary
    from ensembler.run import latest
    from ensembler.storage.artefact import check_writable

    if run is not None and is_url(run):
        raise UsageError(
            f"a calibration is kept with its run: ensembler pull {run} --out PATH, ensembler calibrate PATH, and "
            f"ensembler push PATH {run} sends it there"
        )
    path = latest(Path("runs")) if run is None else Path(run)
    if path.is_file():
        raise UsageError(
            f"{path} is no run, beside which a calibration is kept: ensembler eval fits a temperature to a file's "
            "validation predictions"
        )
    path = path.resolve() if path.is_symlink() else path  # latest may be another one soon
    check_writable(path, "a calibration lies in its run's folder: copy the run to where you may write")
    with watching(quiet, unit="images") as watch:
        found = calibrate(path, options, watch=watch)
    print_lines(f"calibration: {calibration.save(found, path)}", prose=summary(found))


@_command("surface", SurfaceOptions)
def _surface(
    options: SurfaceOptions,
    runs: Annotated[
        list[Path] | None,
        typer.Argument(parser=place, help="One run, or three of one network. (default: the newest in runs/)"),
    ] = None,
    vertices: Annotated[
        str | None,
        typer.Option(help="Three vertices of the one run. (default: 0,1,2; of a curve, its ends and middle bend)"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the figures. (default: a new one in surfaces/)")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the numbers' JSON to this file.")] = None,
    simplexes: Annotated[
        bool,
        typer.Option(
            "--3d", help="Instead, one run's simplexes: in three dimensions, along edges, and over faces; no --margin."
        ),
    ] = False,
    quiet: _Quiet = False,
) -> None:
    """Draw loss and error on the plane through three networks (Garipov et al. 2018), and along a curve's path."""
    from ensembler.errors import UsageError
    from ensembler.eval.report.surface_figures import plot_paths, plot_surface
    from ensembler.eval.surface import measure_surface, summary
    from ensembler.run import latest
    from ensembler.storage.artefact import check_writable

    try:
        chosen = None if vertices is None else [int(number) for number in vertices.split(",")]
    except ValueError as error:
        raise UsageError(f"--vertices takes three numbers, such as 0,1,2: not {vertices!r}") from error
    check_writable(out or Path("surfaces"))
    if json is not None:
        check_writable(json.parent, "choose another --json")
    if simplexes:
        if vertices is not None or len(runs or [0]) > 1:
            raise UsageError("--3d draws the simplexes of one run, all of them: leave out --vertices and other runs")
        _simplexes(runs[0] if runs else latest(Path("runs")), options, out, json, quiet)
        return
    with watching(quiet, unit="points") as watch:
        found = measure_surface(runs or [latest(Path("runs"))], chosen, options, watch=watch)
    files = {
        "surface.json": (found.model_dump_json(indent=2) + "\n").encode(),
        "surface.png": plot_surface(found),
        **({"path.png": plot_paths(found)} if found.paths else {}),
    }
    folder = write_result(out, "surfaces", "surface", files, json)
    print_lines(f"took {found.seconds:.0f} s; surface: {folder} ({', '.join(files)})", prose=summary(found))


def _simplexes(run: Path, options: SurfaceOptions, out: Path | None, json: Path | None, quiet: bool) -> None:
    """Measure a run's simplexes, and write their figures to one folder."""
    from ensembler.eval.report.simplex_figures import plot_edges, plot_faces, plot_simplexes
    from ensembler.eval.simplexes import measure_simplexes, summary

    with watching(quiet, unit="points") as watch:
        found = measure_simplexes(run, options, watch=watch)
    files = {
        "simplexes.json": (found.model_dump_json(indent=2) + "\n").encode(),
        "simplexes.png": plot_simplexes(found),
        "edges.png": plot_edges(found),
        **({"faces.png": plot_faces(found)} if found.faces else {}),
    }
    folder = write_result(out, "surfaces", "simplexes", files, json)
    print_lines(f"took {found.seconds:.0f} s; simplexes: {folder} ({', '.join(files)})", prose=summary(found))
