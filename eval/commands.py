"""The evaluation commands.

Annotations are evaluated here, not postponed: Typer reads them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer()

_Quiet = Annotated[bool, typer.Option("--quiet", help="Say nothing before the end.")]


@app.command("eval")
def evaluate(
    runs: Annotated[list[Path] | None, typer.Argument(help="Runs to compare. (default: the newest in runs/)")] = None,
    shift: Annotated[str | None, typer.Option(help="cifar10c: the corruptions of CIFAR-10-C.")] = None,
    examples: Annotated[int | None, typer.Option(help="Test images to use. (default: all)")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the dataset's files, and of CIFAR-10-C/.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch the dataset if it is not there.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the report. (default: one in reports/)")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report's JSON to this file, too.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: CUDA where there is one)")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a forward pass.")] = None,
    seed: Annotated[int, typer.Option(help="Of generated corruptions and the choice of examples.")] = 0,
    quiet: _Quiet = False,
) -> None:
    """Score runs side by side: accuracy, NLL, Brier and ECE, clean and under shift."""
    import time

    from rich.console import Console

    from ensembler.artefact import check_writable, replace_file
    from ensembler.eval.evaluation import evaluate
    from ensembler.eval.plots import plot_reliability, plot_severity
    from ensembler.eval.report import tables
    from ensembler.run import latest, new_path

    start = time.monotonic()
    paths = runs or [latest(Path("runs"))]
    folder = out or new_path(Path("reports"), "eval")
    check_writable(folder)
    with _progress(quiet) as watch:
        report, diagrams = evaluate(
            paths,
            shift,
            data=data,
            download=download,
            examples=examples,
            device=device,
            batch_size=batch_size,
            seed=seed,
            watch=watch,
        )
    text = (report.model_dump_json(indent=2) + "\n").encode()
    files = {folder / "report.json": text, folder / "reliability.png": plot_reliability(report, diagrams)}
    if report.shift is not None:
        files[folder / "severity.png"] = plot_severity(report)
    for path, content in (files | ({json: text} if json else {})).items():
        replace_file(path, content)
    console = Console(highlight=False)
    console.print(tables(report))
    console.print(
        f"took {time.monotonic() - start:.0f} s; report: {folder} ({', '.join(path.name for path in files)})",
        soft_wrap=True,
    )


@app.command("surface")
def surface(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="One run, or three of one network. (default: the newest in runs/)")
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
    from contextlib import nullcontext

    from rich.console import Console

    from ensembler.artefact import check_writable, replace_file
    from ensembler.errors import UsageError
    from ensembler.eval.surface import measure_surface, plot_paths, plot_surface, summary
    from ensembler.run import latest, new_path

    try:
        chosen = None if vertices is None else [int(number) for number in vertices.split(",")]
    except ValueError as error:
        raise UsageError(f"--vertices takes three numbers, such as 0,1,2: not {vertices!r}") from error
    folder = out or new_path(Path("surfaces"), "surface")
    check_writable(folder)

    def line(label: str, done: int, total: int) -> None:
        typer.echo(f"{label}: {done} of {total} points", err=True)

    with _progress(quiet) if quiet or Console(stderr=True).is_terminal else nullcontext(line) as watch:
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
    text = (found.model_dump_json(indent=2) + "\n").encode()
    files = {folder / "surface.json": text, folder / "surface.png": plot_surface(found)}
    if found.paths:
        files[folder / "path.png"] = plot_paths(found)
    for path, content in (files | ({json: text} if json else {})).items():
        replace_file(path, content)
    where = f"took {found.seconds:.0f} s; surface: {folder} ({', '.join(path.name for path in files)})"
    Console(highlight=False, markup=False).print(f"{summary(found)}\n{where}", soft_wrap=True)


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar with the time left, on a terminal alone."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("predicting")

        def watch(label: str, done: int, total: int) -> None:
            bar.update(task, description=label, completed=done, total=total)

        yield watch
