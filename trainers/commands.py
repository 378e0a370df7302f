"""The training commands: each names its method's own options.

Annotations are evaluated here, not postponed: Typer reads them.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ensembler.errors import UsageError
from ensembler.storage import destination, place
from ensembler.trainers.options import Concentration, Corners, Out, Points, app, label, option, trains
from ensembler.transfers import push_finished

if TYPE_CHECKING:
    from ensembler.run import Run
    from ensembler.trainers.session import Session

__all__ = ["app"]


@trains("train-deep-ensemble", has_pieces=True)
def train_deep_ensemble(
    session: "Session",
    members: Annotated[int, option(help="M, networks trained; 1 is a single network.")] = 4,
    parallel_members: Annotated[
        int,
        option(
            help="Members trained at once, side by side: meant for small networks on a GPU; slower on a CPU, and "
            "without checkpoints."
        ),
    ] = 1,
) -> "Run":
    """Train M networks from independent beginnings (Lakshminarayanan et al. 2017)."""
    from ensembler.trainers.deep_ensemble import train_deep_ensemble as method

    return method(session, members, parallel_members)


@trains("train-fge")
def train_fge(
    session: "Session",
    members: Annotated[int, option(help="M, snapshots taken, one a cycle.")] = 5,
    cycle: Annotated[float, option(help="Epochs a cycle.")] = 2,
    high: Annotated[float, option(help="alpha_1, highest rate of a cycle.")] = 5e-2,
    low: Annotated[float, option(help="alpha_2, lowest rate of a cycle.")] = 5e-4,
    start: Annotated[float, option(help="Share of one solution's budget before the cycles.")] = 0.8,
) -> "Run":
    """Collect snapshots along a cyclic learning rate (FGE, Garipov et al. 2018)."""
    from ensembler.trainers.fge import train_fge as method

    return method(session, members, cycle, high, low, start)


@trains("train-snapshots")
def train_snapshots(
    session: "Session",
    members: Annotated[int, option(help="M, snapshots taken, one a cycle.")] = 5,
    cycle: Annotated[float | None, option(help="Epochs a cycle. (default: --epochs divided by M)")] = None,
) -> "Run":
    """Collect snapshots at the end of cosine cycles (SSE, Huang et al. 2017)."""
    from ensembler.trainers.snapshot import train_snapshots as method

    return method(session, members, cycle)


@trains("train-simplex", has_pieces=True)
def train_simplex(
    session: "Session",
    vertices: Annotated[int, option(help="K, corners of the simplex.")] = 4,
    members: Points = 10,
    vertex_epochs: Annotated[
        float | None, option(help="Epochs for each added vertex. (default: a quarter of --epochs)")
    ] = None,
    vertex_rate: Annotated[float, option("--vertex-lr", help="Highest learning rate of an added vertex.")] = 0.1,
    regularisation: Annotated[
        str, option(help="lambda, the reward of log size; or auto, the largest that --tolerance allows.")
    ] = "0.01",
    regulariser: Annotated[
        str, option(help="What size is: volume in parameter space, or function for distance between predictions.")
    ] = "volume",
    tolerance: Annotated[
        float, option(help="Of auto: by what share vertices and points inside may exceed the solution's held-out NLL.")
    ] = 0.02,
    concentration: Concentration = 1.0,
    corners: Corners = True,
    samples_per_step: Annotated[int, option(help="Points a step; the batch is split among them.")] = 1,
    simplexes: Annotated[int, option(help="S, each around a solution of its own; several are ESPRO.")] = 1,
) -> "Run":
    """Grow a simplex of solutions vertex by vertex (SPRO, Benton et al. 2021), or several (ESPRO)."""
    from ensembler.trainers.simplex import train_simplex as method

    return method(
        session,
        vertices,
        members,
        vertex_epochs,
        vertex_rate,
        _number_or_auto(regularisation),
        regulariser,
        tolerance,
        concentration,
        corners,
        samples_per_step,
        simplexes,
    )


@trains("train-subspace")
def train_subspace(
    session: "Session",
    vertices: Annotated[int, option(help="K, ends of a line (2) or corners of a simplex.")] = 3,
    members: Points = 10,
    beta: Annotated[float, option(help="Weight of the squared cosine between two vertices.")] = 1.0,
    concentration: Concentration = 1.0,
    corners: Corners = True,
) -> "Run":
    """Train a line or simplex jointly from scratch, at the cost of one network (Wortsman et al. 2021)."""
    from ensembler.trainers.subspace import train_subspace as method

    return method(session, vertices, members, beta, concentration, corners)


@trains("train-curve")
def train_curve(
    session: "Session",
    init: Annotated[Path, typer.Argument(parser=place, metavar="FIRST", help="The run whose first member is one end.")],
    second: Annotated[
        Path, typer.Argument(parser=place, metavar="SECOND", help="The run whose first member is the other end.")
    ],
    curve: Annotated[str, option(help="bezier, or chain for straight pieces.")] = "bezier",
    bends: Annotated[int, option(help="N, points between the ends that move.")] = 1,
    members: Annotated[int, option(help="M, points of the curve in the ensemble, evenly spaced.")] = 5,
    points: Annotated[int, option(help="Points at which the straight line and the curve are measured.")] = 61,
    examples: Annotated[int, option(help="Training and test images that the measuring takes.")] = 2000,
) -> "Run":
    """Connect two solutions by a path of low loss (Garipov et al. 2018)."""
    from ensembler.run import Run
    from ensembler.trainers.curve import train_curve as method

    return method(session, Run.load(init), Run.load(second), curve, bends, members, points, examples)


@trains("train-complex")
def train_complex(
    session: "Session",
    init: Annotated[
        list[Path],
        typer.Argument(parser=place, metavar="RUN...", help="Two runs or more; of each, the first member."),
    ],
    connectors: Annotated[int, option(help="Vertices that all simplexes share, added one at a time.")] = 1,
    members: Points = 10,
    regularisation: Annotated[float, option(help="lambda, the reward of log volume.")] = 1e-2,
    concentration: Concentration = 1.0,
    corners: Corners = True,
    points: Annotated[int, option(help="Points at which the ways between the modes are measured.")] = 21,
    examples: Annotated[int, option(help="Training and test images that the measuring takes.")] = 2000,
) -> "Run":
    """Join independent solutions by simplexes with shared connectors (Benton et al. 2021)."""
    from ensembler.run import Run
    from ensembler.trainers.complex import train_complex as method

    modes = [Run.load(path) for path in init]
    return method(session, modes, connectors, members, regularisation, concentration, corners, points, examples)


@app.command("collapse")
def collapse(
    run: Annotated[Path | None, typer.Argument(parser=place, help="Any run. (default: the newest in runs/)")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the dataset's files.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: CUDA where there is one)")] = None,
    out: Out = None,
) -> None:
    """Average a run's vertices into one network: SWA of snapshots (Izmailov et al. 2018)."""
    from ensembler.run import Run, latest, new_path
    from ensembler.trainers.collapse import collapse_run as method
    from ensembler.trainers.orders import check_free, save
    from ensembler.trainers.session import Session, Settings

    folder, url = destination(out, "runs")
    check_free(folder or Path("runs", "new"))
    whole = Run.load(run or latest(Path("runs")))
    record = whole.manifest.dataset
    settings = Settings(augmentation=record.augmentation, seed=whole.manifest.seed, device=device)
    found = method(Session(record.load(data), settings, whole), whole)
    name = f"{found.manifest.method}-{label(found.manifest.options)}"
    push_finished(save(found, folder or new_path(Path("runs"), name)), url)


@app.command("show")
def show(
    run: Annotated[Path | None, typer.Argument(parser=place, help="Any run. (default: the newest in runs/)")] = None,
) -> None:
    """Say what a run is: method, sizes, geometry, cost, metrics, files."""
    from rich.console import Console
    from rich.table import Table

    from ensembler.run import Run, latest
    from ensembler.trainers.summary import rows

    path = run or latest(Path("runs"))
    table = Table(title=str(path), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows(Run.load(path).manifest).items():
        table.add_row(name, value)
    Console(highlight=False).print(table)


def _number_or_auto(text: str) -> float | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--regularisation is a number or auto, not {text!r}") from None
