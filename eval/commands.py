"""The evaluation commands.

Annotations are evaluated here, not postponed: Typer reads them.
"""

import functools
import inspect
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ensembler.eval import data_commands
from ensembler.progress import watching
from ensembler.storage import is_url, place

__all__ = ["app"]

app = typer.Typer()
app.add_typer(data_commands.app)

_Data = Annotated[Path | None, typer.Option(help="Folder of the dataset's files, and of CIFAR-10-C/.")]
_Download = Annotated[bool, typer.Option("--download", help="Fetch the dataset if it is not there.")]
_Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: CUDA where there is one)")]
_BatchSize = Annotated[int | None, typer.Option(help="Images a forward pass.")]
_Seed = Annotated[int, typer.Option(help="Of generated corruptions, of the choice of examples and of intervals.")]
_Quiet = Annotated[bool, typer.Option("--quiet", help="Say nothing before the end.")]
_Json = Annotated[Path | None, typer.Option(help="Write the report's JSON to this file, too.")]
_Shift = Annotated[
    str | None, typer.Option(help="cifar10c, cifar100c (official files where they are, else generated), corruptions.")
]
_Ood = Annotated[
    list[str] | None,
    typer.Option(help="Images of another kind: a dataset, folder:PATH, noise:gaussian|uniform|constant. Repeatable."),
]
_Examples = Annotated[int | None, typer.Option(help="Test images to use. (default: all)")]
_Cache = Annotated[
    Path | None, typer.Option(help="Where predictions are kept, never to be made again. (default: a cache folder)")
]
_Threads = Annotated[int | None, typer.Option(help="CPU threads that compute one piece. (default: all)")]
_Engine = Annotated[
    Literal["local", "ray"], typer.Option(help="What predicts a shift's cells: this process in turn, or Ray.")
]
_Address = Annotated[
    str | None, typer.Option(help="Of a Ray cluster. (default: RAY_ADDRESS, or a Ray of this machine's own)")
]
_ReportOut = Annotated[Path | None, typer.Option(help="Folder for the report. (default: one in reports/)")]


def _report(
    name: str,
    runs: list[Path],
    comparison: dict[str, Any] | None,
    shift: _Shift = None,
    ood: _Ood = None,
    examples: _Examples = None,
    data: _Data = None,
    download: _Download = False,
    out: _ReportOut = None,
    json: _Json = None,
    cache: _Cache = None,
    device: _Device = None,
    batch_size: _BatchSize = None,
    threads: _Threads = None,
    engine: _Engine = "local",
    address: _Address = None,
    seed: _Seed = 0,
    quiet: _Quiet = False,
) -> None:
    """Evaluate, compare where that is wanted, and write everything to one folder."""
    import shlex
    import sys
    import time

    from rich.console import Console

    from ensembler.artefact import check_writable
    from ensembler.engine import choose
    from ensembler.ensemble import choose_device
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
    # What is predicted is kept under the kind of device, which is this process's.
    with watching(quiet) as watch, choose(engine, address, choose_device(device).type, threads) as chosen:
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
            engine=chosen,
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
    folder = out or _fresh(Path("reports"), name)
    _write(folder, files, json)
    Console(highlight=False).print(tables(report))
    _say(f"took {time.monotonic() - start:.0f} s; report: {folder} ({', '.join(files)})")


_Chosen = Callable[..., tuple[list[Path], dict[str, Any] | None]]


def _reports(name: str) -> Callable[[_Chosen], _Chosen]:
    """Make a command that says which runs to score, and how to compare them: its own options, then the shared ones."""
    by_name = inspect.Parameter.KEYWORD_ONLY

    def decorate(choice: _Chosen) -> _Chosen:
        own, shared = (inspect.signature(each).parameters for each in (choice, _report))
        options = dict(own) | {key: p for key, p in shared.items() if key not in ("name", "runs", "comparison")}

        @functools.wraps(choice)
        def command(**given: Any) -> None:
            chosen = choice(**{key: given.pop(key) for key in own})
            _report(name, *chosen, **given)

        command.__signature__ = inspect.Signature([p.replace(kind=by_name) for p in options.values()])  # type: ignore[attr-defined]
        command.__annotations__ = {key: p.annotation for key, p in options.items()}
        app.command(name)(command)
        return choice

    return decorate


@_reports("eval")
def evaluate(
    runs: Annotated[
        list[Path] | None, typer.Argument(parser=place, help="Runs to score. (default: the newest in runs/)")
    ] = None,
) -> tuple[list[Path], None]:
    """Score runs side by side: accuracy, likelihood, calibration; clean, under shift and out of distribution."""
    from ensembler.run import latest

    return runs or [latest(Path("runs"))], None


@_reports("compare")
def compare(
    runs: Annotated[list[Path], typer.Argument(parser=place, help="Two runs or more, of one dataset.")],
    baseline: Annotated[
        Path | None,
        typer.Option(parser=place, help="Which of them the others are compared with. (default: the first)"),
    ] = None,
    curve: Annotated[
        bool, typer.Option("--curve", help="Score every run against its number of members, to choose M.")
    ] = False,
) -> tuple[list[Path], dict[str, Any]]:
    """Compare runs at their costs: differences with intervals, seeds grouped, deep-ensemble equivalents."""
    from ensembler.errors import UsageError
    from ensembler.eval.compare import check_names

    places = [path.resolve() for path in runs]
    check_names([path.name for path in places])
    if baseline is not None and baseline.resolve() not in places:
        raise UsageError(f"--baseline {baseline} is none of the runs: name it among them, too")
    against = 0 if baseline is None else places.index(baseline.resolve())
    return runs, {"baseline": against, "curves": curve}


@app.command("calibrate")
def calibrate(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="The run. (default: the newest in runs/)")] = None,
    method: Annotated[
        Literal["temperature", "isotonic", "beta", "histogram"], typer.Option(help="Of the pooled prediction.")
    ] = "temperature",
    alpha: Annotated[float, typer.Option(help="Prediction sets miss the true class in at most this share.")] = 0.1,
    conformal: Annotated[Literal["lac", "aps"], typer.Option(help="How prediction sets are made.")] = "lac",
    risk: Annotated[
        float | None, typer.Option(help="Abstain such that at most this share of the answers is wrong.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="With which probability --risk shall hold.")] = 0.95,
    data: _Data = None,
    download: _Download = False,
    device: _Device = None,
    batch_size: _BatchSize = None,
    seed: _Seed = 0,
    quiet: _Quiet = False,
) -> None:
    """Fit a run's calibration, prediction sets and abstention on its validation images; kept with the run."""
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
    with watching(quiet) as watch:
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
            watch=watch,
        )
    _say(summary(found), f"calibration: {calibration.save(found, path)}")


@app.command("surface")
def surface(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(parser=place, help="One run, or three of one network. (default: the newest in runs/)"),
    ] = None,
    vertices: Annotated[
        str | None,
        typer.Option(help="Which three of the one run. (default: 0,1,2, and of a curve its ends and middle bend)"),
    ] = None,
    grid: Annotated[int, typer.Option(help="Points a side.")] = 21,
    margin: Annotated[float, typer.Option(help="Reach beyond the three points, as a share of their extent.")] = 0.2,
    examples: Annotated[int, typer.Option(help="Training and test images to measure on, at most.")] = 500,
    batchnorm_examples: Annotated[
        int, typer.Option(help="Training images for BatchNorm statistics at each point, at most.")
    ] = 512,
    data: Annotated[Path | None, typer.Option(help="Folder of the dataset's files.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures. (default: one in surfaces/)")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the numbers' JSON to this file, too.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: CUDA where there is one)")] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of images.")] = 0,
    quiet: _Quiet = False,
) -> None:
    """Draw loss and error on the plane through three networks (Garipov et al. 2018), and along a curve's path."""
    from ensembler.artefact import check_writable
    from ensembler.errors import UsageError
    from ensembler.eval.surface import measure_surface, plot_paths, plot_surface, summary
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
    folder = out or _fresh(Path("surfaces"), "surface")
    _write(folder, files, json)
    _say(summary(found), f"took {found.seconds:.0f} s; surface: {folder} ({', '.join(files)})")


def _fresh(parent: Path, label: str) -> Path:
    """A new folder that is nobody else's, even where another process names one in the same second."""
    from ensembler.run import new_path

    while True:
        path = new_path(parent, label)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError:
            pass  # said better by who writes into it
        return path


def _write(folder: Path, files: dict[str, bytes], json: Path | None) -> None:
    """Write a command's files, and its JSON where it is wanted, too: all or none."""
    from ensembler.artefact import replace_files

    contents = {folder / name: content for name, content in files.items()}
    if json is not None:
        contents[json] = next(content for name, content in files.items() if name.endswith(".json"))
    try:
        replace_files(contents)
    except BaseException:  # Ctrl-C, too
        with suppress(OSError):
            folder.rmdir()  # where nothing is in it
        raise


def _say(*lines: str) -> None:
    """Print lines as they are, however long."""
    from rich.console import Console

    Console(highlight=False, markup=False).print("\n".join(lines), soft_wrap=True)
