"""The training commands, one made of each method's record; and ``collapse`` and ``show``.

Annotations are evaluated here, not postponed: Typer reads them.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ensembler.errors import UsageError
from ensembler.options import chosen, parameters, with_parameters
from ensembler.progress import waiting
from ensembler.storage.transfers import push_finished
from ensembler.storage.urls import destination, place
from ensembler.text import cell, counted, echo
from ensembler.trainers.launch import CheckpointData, Data, Import, Launch
from ensembler.trainers.method import Method, methods
from ensembler.trainers.settings import Settings
from ensembler.typed import missing

if TYPE_CHECKING:
    from ensembler.run import Run

__all__ = ["app", "command_of"]

app = typer.Typer()

_Run = Annotated[Path | None, typer.Argument(parser=place, help="Any run. (default: the newest in runs/)")]
_Data = Annotated[Path | None, typer.Option(help="Folder of the dataset's files, if it has moved.")]
_Dataset = Annotated[str | None, typer.Option(help="Name of the run's dataset, if it is another now: module:NAME.")]
_Device = Annotated[str | None, typer.Option(help="Device, such as cpu or cuda. (default: CUDA where available)")]
_Out = Annotated[
    str | None, typer.Option(metavar="PATH|URL", help="Folder of the new run, or a URL. (default: one in runs/)")
]


def command_of(method: type[Method]) -> Callable[..., None]:
    """The command of a method: its own options, then those that all methods share."""

    def command(context: typer.Context, **given: Any) -> None:
        from ensembler.trainers.launch import launch

        if absent := [name for name in method.required() if not given[name] and given["resume"] is None]:
            raise typer.BadParameter(missing(context, absent[0], method.flags()[absent[0]]))
        # A start at a URL has been fetched; the run's manifest names the URL, not the cache.
        typed = {
            name: context.params[name] for name in given.keys() & (method.marked("path") | Settings.marked("path"))
        }
        launch(method, given | typed, chosen(context) & given.keys())

    joins_runs = bool(method.marked("path"))
    shared = [
        *parameters(Data, "Images"),
        *(p for p in parameters(Settings, "Training") if not (joins_runs and p.name in ("init", "weights"))),
        *parameters(Launch, "Run"),
    ]
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    own = [p.replace(default=None) if p.name in method.required() else p for p in parameters(method, "Method")]
    command.__doc__ = method.__doc__
    return with_parameters(command, [context, *own, *shared])


def _keeper(out: str | None) -> Callable[["Run", str], None]:
    """Check where a run is to be, and return what saves it there, or in runs/ under a name, and pushes it."""
    from ensembler.run import new_path
    from ensembler.trainers.launch import check_free, label, save

    folder, url = destination(out, "runs")
    check_free(folder or Path("runs", "new"))
    return lambda run, name: push_finished(save(run, folder or new_path(Path("runs"), label(name))), url)


for _method in methods():
    app.command(_method.command)(command_of(_method))


@app.command("collapse")
def collapse(
    run: _Run = None,
    data: _Data = None,
    dataset: _Dataset = None,
    device: _Device = None,
    out: _Out = None,
) -> None:
    """Average a run's vertices, or its Gaussians' means, into one network: SWA (Izmailov et al. 2018)."""
    from ensembler.run import Run, latest
    from ensembler.trainers.training import collapse_run

    keep = _keeper(out)
    with waiting(False, "averaging"):
        whole = Run.load(run or latest(Path("runs")))
        found = collapse_run(whole, whole.manifest.dataset.load(data, dataset=dataset), device)
    keep(found, f"{found.manifest.method}-{found.manifest.architecture}")


def _import(**given: Any) -> None:
    """Make a run of checkpoints that were trained elsewhere: a deep ensemble, evaluated and served like any other."""
    from ensembler.trainers.importing import import_checkpoints
    from ensembler.trainers.progress import progress

    own, data = Import.typed(given), CheckpointData.typed(given)
    keep, dataset = _keeper(own.out), data.load()
    with progress() as on_event:
        run = import_checkpoints(own.checkpoints, own.architecture, dataset, device=own.device, on_event=on_event)
    keep(run, f"imported-{own.architecture}")


app.command("import")(with_parameters(_import, [*parameters(Import, "Run"), *parameters(CheckpointData, "Images")]))


@app.command("combine")
def combine_runs(
    runs: Annotated[list[Path], typer.Argument(parser=place, help="Runs of one dataset; their networks may differ.")],
    data: _Data = None,
    dataset: _Dataset = None,
    device: _Device = None,
    out: _Out = None,
) -> None:
    """Combine the members of several runs into one run; their costs are added up."""
    from ensembler.run import Run
    from ensembler.trainers.combining import combine

    keep = _keeper(out)
    loaded: dict[str, Run] = {}
    for path in runs:
        if path.is_file():
            raise UsageError(f"{path} is a file, not a run: make a run of checkpoints with ensembler import")
        name = path.resolve().name
        loaded[f"{name} ({len(loaded) + 1})" if name in loaded else name] = Run.load(path)
    with waiting(False, "combining"):
        images = next(iter(loaded.values())).manifest.dataset.load(data, dataset=dataset)
        found = combine(loaded, images, device)
    if again := sum(run.manifest.members for run in loaded.values()) - found.manifest.members:
        echo(f"left out: {counted(again, 'member')} with the weights of another", err=True)
    keep(found, f"combined-{found.manifest.architecture.replace(' ', '')}")


@app.command("show")
def show(run: _Run = None) -> None:
    """Show what a run is: method, sizes, cost, scores, geometry, barriers, and options, those not at default first."""
    from rich.console import Console
    from rich.table import Table

    from ensembler.run import Run, latest
    from ensembler.trainers.description import rows

    path = run or latest(Path("runs"))
    table = Table(title=cell(path), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for row in rows(Run.load(path).manifest):
        table.add_row(cell(row.name), cell(row.text), style="dim" if row.aside else None)
    Console(highlight=False).print(table)
