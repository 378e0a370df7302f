"""The training commands: each names its method's options; those that all methods share are declared once.

Annotations are evaluated here, not postponed: Typer reads them.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ensembler.errors import UsageError

if TYPE_CHECKING:
    from ensembler.checkpoint import Checkpoint
    from ensembler.run import Cost, Part, Run
    from ensembler.trainers.loop import Epoch
    from ensembler.trainers.session import Session, Watcher

__all__ = ["app"]

app = typer.Typer()

_LONG = ("path", "paths", "growth", "trials")  # metrics for a picture or a program, not for one line

_option = functools.partial(typer.Option, rich_help_panel="Method")
_image_option = functools.partial(typer.Option, rich_help_panel="Images")
_training_option = functools.partial(typer.Option, rich_help_panel="Training")


_Out = Annotated[Path | None, typer.Option(help="Folder of the new run. (default: one in runs/)")]
_Collapse = Annotated[
    Literal["centroid"] | None,
    typer.Option(help="Average the vertices into one network (SWA) and keep only that; see also: ensembler collapse."),
]
_Points = Annotated[
    int | None, _option(help="M: the vertices first, then points drawn inside. (default: the vertices alone)")
]
_Corners = Annotated[
    bool, _option("--corners/--no-corners", help="Whether the first members are the vertices themselves.")
]
_Concentration = Annotated[
    float, _option(help="Dirichlet's alpha of the drawn members; below 1 leans to the vertices.")
]


@contextmanager
def _session(
    dataset: Annotated[
        str | None,
        _image_option(
            help="digits, cifar10, cifar100, fashion-mnist or folder:PATH. (default: that of --init, or digits)"
        ),
    ] = None,
    data: Annotated[
        Path | None, _image_option(help="Folder of the dataset's files. (default: ~/.cache/ensembler/data)")
    ] = None,
    download: Annotated[bool, _image_option("--download", help="Fetch the dataset if it is not there.")] = False,
    image_size: Annotated[int | None, _image_option(help="Bring every image to this many pixels a side.")] = None,
    augmentation: Annotated[
        str | None, _image_option(help="crop-flip, crop or none. (default: what suits the dataset)")
    ] = None,
    architecture: Annotated[
        str,
        _training_option(
            "--arch",
            help="cnn, preresnet20/56/110/164, vgg16, vgg16bn, wrn28x10, torchvision:NAME, timm:NAME or "
            "package.module:factory.",
        ),
    ] = "cnn",
    epochs: Annotated[float, _training_option(help="Passes over the training images for one solution.")] = 20,
    batch_size: Annotated[
        int | None, _training_option(help="Images a step. (default: 128, or 32 under 10,000 images)")
    ] = None,
    rate: Annotated[float, _training_option("--lr", help="Highest learning rate of a solution.")] = 0.1,
    momentum: Annotated[float, _training_option(help="Nesterov momentum of SGD.")] = 0.9,
    weight_decay: Annotated[float, _training_option(help="Weight decay of SGD.")] = 5e-4,
    clip: Annotated[float, _training_option(help="Largest norm of the gradient; 0 for no limit.")] = 1.0,
    init: Annotated[
        Path | None,
        _training_option(help="What to start from: a run, of which the first member, or a .safetensors or .pt file."),
    ] = None,
    weights: Annotated[
        str | None, _training_option(help="Start from published weights of torchvision or timm: DEFAULT, or a name.")
    ] = None,
    seed: Annotated[int, _training_option(help="Of everything that is drawn.")] = 0,
    device: Annotated[str | None, _training_option(help="cpu, cuda, ... (default: CUDA where there is one)")] = None,
) -> Iterator["Session"]:
    """A session made of the shared options, its progress on the screen while the block runs."""
    from ensembler import datasets
    from ensembler.run import Run
    from ensembler.trainers.session import Session, Settings

    settings = Settings(
        architecture=architecture,
        epochs=epochs,
        batch_size=batch_size,
        rate=rate,
        momentum=momentum,
        weight_decay=weight_decay,
        clip=clip or None,
        augmentation=augmentation,
        seed=seed,
        device=device,
    )
    start = _start(init[0] if isinstance(init, list) else init, weights, architecture)
    if isinstance(start, Run) and dataset is None and image_size is None:
        images = start.manifest.dataset.load(data, download=download)
    else:
        images = datasets.load(dataset or "digits", data, download=download, image_size=image_size)
    with _progress() as (watch, say):
        yield Session(images, settings, start, watch, say)


def _start(init: Path | None, weights: str | None, architecture: str) -> "Run | Checkpoint | None":
    from ensembler import checkpoint
    from ensembler.run import Run

    if init is not None and weights is not None:
        raise UsageError("--init and --weights both say what to start from: give one of them")
    if weights is not None:
        return checkpoint.Checkpoint(f"{architecture} {weights}", checkpoint.pretrained(architecture, weights))
    if init is not None and init.is_file():
        return checkpoint.Checkpoint(init.name, checkpoint.read(init))
    return None if init is None else Run.load(init)


def _trains(name: str) -> Callable[[Callable[..., "Run"]], Callable[..., None]]:
    """Make a command of a method: its own options, then the shared ones, then ``--collapse`` and ``--out``.

    A method that names a shared option itself declares it in its own way.
    """

    def decorate(method: Callable[..., "Run"]) -> Callable[..., None]:
        own = {name: p for name, p in inspect.signature(method).parameters.items() if name != "session"}
        shared = inspect.signature(_session).parameters
        options = own | {name: p for name, p in shared.items() if name not in own}

        @functools.wraps(method)
        def command(collapse: str | None, out: Path | None, **given: Any) -> None:
            from ensembler.trainers.collapse import collapse_run

            _check_free(out)
            with _session(**{name: given[name] for name in shared}) as session:
                run = method(session, **{name: given[name] for name in own})
                if collapse:
                    run = collapse_run(session, run)
            _save(run, out)

        last = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in (("collapse", _Collapse), ("out", _Out))
        ]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*options.values(), *last)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(name)(command)
        return command

    return decorate


@_trains("train-deep-ensemble")
def train_deep_ensemble(
    session: "Session", members: Annotated[int, _option(help="M, networks trained; 1 is a single network.")] = 4
) -> "Run":
    """Train M networks from independent beginnings (Lakshminarayanan et al. 2017)."""
    from ensembler.trainers.deep_ensemble import train_deep_ensemble as method

    return method(session, members)


@_trains("train-fge")
def train_fge(
    session: "Session",
    members: Annotated[int, _option(help="M, snapshots taken, one a cycle.")] = 5,
    cycle: Annotated[float, _option(help="Epochs a cycle.")] = 2,
    high: Annotated[float, _option(help="alpha_1, highest rate of a cycle.")] = 5e-2,
    low: Annotated[float, _option(help="alpha_2, lowest rate of a cycle.")] = 5e-4,
    start: Annotated[float, _option(help="Share of one solution's budget before the cycles.")] = 0.8,
) -> "Run":
    """Collect snapshots along a cyclic learning rate (FGE, Garipov et al. 2018)."""
    from ensembler.trainers.fge import train_fge as method

    return method(session, members, cycle, high, low, start)


@_trains("train-snapshots")
def train_snapshots(
    session: "Session",
    members: Annotated[int, _option(help="M, snapshots taken, one a cycle.")] = 5,
    cycle: Annotated[float | None, _option(help="Epochs a cycle. (default: --epochs divided by M)")] = None,
) -> "Run":
    """Collect snapshots at the end of cosine cycles (SSE, Huang et al. 2017)."""
    from ensembler.trainers.snapshot import train_snapshots as method

    return method(session, members, cycle)


@_trains("train-simplex")
def train_simplex(
    session: "Session",
    vertices: Annotated[int, _option(help="K, corners of the simplex.")] = 4,
    members: _Points = None,
    vertex_epochs: Annotated[
        float | None, _option(help="Epochs for each added vertex. (default: a quarter of --epochs)")
    ] = None,
    vertex_rate: Annotated[float, _option("--vertex-lr", help="Highest learning rate of an added vertex.")] = 0.1,
    regularisation: Annotated[
        str, _option(help="lambda, the reward of log size; or auto, the largest that --tolerance allows.")
    ] = "0.01",
    regulariser: Annotated[
        str, _option(help="What size is: volume in parameter space, or function for distance between predictions.")
    ] = "volume",
    tolerance: Annotated[
        float, _option(help="Of auto: by what share points inside may exceed the solution's held-out NLL.")
    ] = 0.05,
    concentration: _Concentration = 1.0,
    corners: _Corners = True,
    samples_per_step: Annotated[int, _option(help="Points a step; the batch is split among them.")] = 1,
    simplexes: Annotated[int, _option(help="S, each around a solution of its own; several are ESPRO.")] = 1,
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


@_trains("train-subspace")
def train_subspace(
    session: "Session",
    vertices: Annotated[int, _option(help="K, ends of a line (2) or corners of a simplex.")] = 3,
    members: _Points = None,
    beta: Annotated[float, _option(help="Weight of the squared cosine between two vertices.")] = 1.0,
    concentration: _Concentration = 1.0,
    corners: _Corners = True,
) -> "Run":
    """Train a line or simplex jointly from scratch, at the cost of one network (Wortsman et al. 2021)."""
    from ensembler.trainers.subspace import train_subspace as method

    return method(session, vertices, members, beta, concentration, corners)


@_trains("train-curve")
def train_curve(
    session: "Session",
    init: Annotated[Path, typer.Argument(metavar="FIRST", help="The run whose first member is one end.")],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="The run whose first member is the other end.")],
    curve: Annotated[str, _option(help="bezier, or chain for straight pieces.")] = "bezier",
    bends: Annotated[int, _option(help="N, points between the ends that move.")] = 1,
    members: Annotated[int, _option(help="M, points of the curve in the ensemble, evenly spaced.")] = 5,
    points: Annotated[int, _option(help="Points at which the straight line and the curve are measured.")] = 61,
    examples: Annotated[int, _option(help="Training and test images that the measuring takes.")] = 2000,
) -> "Run":
    """Connect two solutions by a path of low loss (Garipov et al. 2018)."""
    from ensembler.run import Run
    from ensembler.trainers.curve import train_curve as method

    return method(session, Run.load(init), Run.load(second), curve, bends, members, points, examples)


@_trains("train-complex")
def train_complex(
    session: "Session",
    init: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Two runs or more; of each, the first member.")],
    connectors: Annotated[int, _option(help="Vertices that all simplexes share, added one at a time.")] = 1,
    members: _Points = None,
    regularisation: Annotated[float, _option(help="lambda, the reward of log volume.")] = 1e-2,
    concentration: _Concentration = 1.0,
    corners: _Corners = True,
    points: Annotated[int, _option(help="Points at which the ways between the modes are measured.")] = 21,
    examples: Annotated[int, _option(help="Training and test images that the measuring takes.")] = 2000,
) -> "Run":
    """Join independent solutions by simplexes with shared connectors (Benton et al. 2021)."""
    from ensembler.run import Run
    from ensembler.trainers.complex import train_complex as method

    modes = [Run.load(path) for path in init]
    return method(session, modes, connectors, members, regularisation, concentration, corners, points, examples)


@app.command("collapse")
def collapse(
    run: Annotated[Path | None, typer.Argument(help="Any run. (default: the newest in runs/)")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the dataset's files.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: CUDA where there is one)")] = None,
    out: _Out = None,
) -> None:
    """Average a run's vertices into one network: SWA of snapshots (Izmailov et al. 2018)."""
    from ensembler.run import Run, latest
    from ensembler.trainers.collapse import collapse_run as method
    from ensembler.trainers.session import Session, Settings

    _check_free(out)
    whole = Run.load(run or latest(Path("runs")))
    record = whole.manifest.dataset
    settings = Settings(augmentation=record.augmentation, seed=whole.manifest.seed, device=device)
    _save(method(Session(record.load(data), settings, whole), whole), out)


@app.command("show")
def show(
    run: Annotated[Path | None, typer.Argument(help="Any run. (default: the newest in runs/)")] = None,
) -> None:
    """Say what a run is: method, sizes, geometry, cost, metrics, files."""
    import json

    from rich.console import Console
    from rich.table import Table

    from ensembler.run import Run, latest

    path = run or latest(Path("runs"))
    manifest = Run.load(path).manifest
    cost = manifest.cost
    table = Table(title=str(path), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = {
        "method": manifest.method,
        "network": f"{manifest.architecture}, {manifest.parameters:,} parameters",
        "dataset": f"{manifest.dataset.title}, {manifest.dataset.train_examples:,} training images",
        "sizes": f"{manifest.vertices} vertices, {manifest.members} members",
        "cost": _costs(cost),
        **{f"  {name}": _costs(part) for name, part in cost.parts.items()},
        **{name: json.dumps(value) for name, value in manifest.metrics.items() if name not in _LONG},
        "options": json.dumps(manifest.options),
        "seed": str(manifest.seed),
        "created": manifest.created,
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
        "files": ", ".join(manifest.files),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console(highlight=False).print(table)


def _costs(cost: "Cost | Part") -> str:
    from ensembler.run import Cost

    unknown = cost.unknown if isinstance(cost, Cost) else [cost.origin] if cost.origin else []
    texts = [f"{cost.example_passes:,} example passes", *(f"the unknown ones of {origin}" for origin in unknown)]
    if cost.forward_passes:
        texts.append(f"{cost.forward_passes:,} forward passes")
    if cost.seconds is not None:
        texts.append(f"{cost.seconds:,.0f} s")
    if cost.peak_memory is not None:
        texts.append(f"{cost.peak_memory / 2**30:.2f} GiB at the most")
    return f"{', '.join(texts)} on {cost.device}"


def _number_or_auto(text: str) -> float | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--regularisation is a number or auto, not {text!r}") from None


def _check_free(out: Path | None) -> None:
    """Said before an hour of training, not after."""
    from ensembler.artefact import check_writable

    if out is not None and out.exists():
        raise UsageError(f"{out} exists already: choose another --out, or remove it first")
    check_writable(out.parent if out else Path("runs"))


@contextmanager
def _progress() -> Iterator[tuple["Watcher", Callable[[str], None]]]:
    """A bar with the time left on a terminal, and findings above it; one plain line an epoch elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:

        def line(part: str, epoch: "Epoch", epochs: int) -> None:
            typer.echo(f"{part}: epoch {epoch.number} of {epochs}, {_state(epoch)}", err=True)

        yield line, functools.partial(typer.echo, err=True)
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs, {task.fields[state]}"),
        TimeRemainingColumn(),
        console=console,
    )
    tasks: dict[str, TaskID] = {}

    def advance(part: str, epoch: "Epoch", epochs: int) -> None:
        if part not in tasks:
            tasks[part] = bar.add_task(part, total=epochs, state="")
        bar.update(tasks[part], completed=epoch.number, state=_state(epoch))

    with bar:
        yield advance, lambda text: bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _state(epoch: "Epoch") -> str:
    return f"loss {epoch.loss:.3f}, accuracy {epoch.accuracy:.3f}"


def _save(run: "Run", out: Path | None) -> None:
    from rich.console import Console

    from ensembler.run import new_path

    manifest = run.manifest
    path = out or new_path(Path("runs"), f"{manifest.method}-{manifest.architecture.replace(':', '-')}")
    try:
        run.save(path)
    except UsageError:  # another process took the name meanwhile: what was trained is not thrown away
        path = run.save(new_path(path.parent, path.name))
        typer.echo(f"{out or 'the name'} was taken while this run was trained: it is saved beside it", err=True)
    cost, test = manifest.cost, manifest.metrics["test"]
    lines = [
        f"[bold]{manifest.method}[/] of {manifest.members} members on {manifest.dataset.title}: "
        f"test accuracy {test['accuracy']:.4f}, NLL {test['nll']:.4f}",
        f"members: mean accuracy {test['member_accuracy']:.4f}, disagreement "
        + ("not known of one member" if test["disagreement"] is None else f"{test['disagreement']:.4f}"),
    ]
    for simplex in manifest.metrics.get("simplexes", ()):
        lengths = simplex["edge_lengths"]
        lines.append(
            f"{simplex['name']}: log volume {simplex['log_volume']:.2f}, "
            f"edges {min(lengths):.2f} to {max(lengths):.2f} long"
        )
    if "lambda" in manifest.metrics:
        lines.append(f"lambda: {manifest.metrics['lambda']:g}, chosen in {len(manifest.metrics['trials'])} trials")
    ways = {"": manifest.metrics["path"]} if "path" in manifest.metrics else {}
    for between in manifest.metrics.get("paths", ()):
        ways[f"{between['name']}, "] = {name: way for name, way in between.items() if name != "name"}
    for prefix, measured in ways.items():
        for name, way in measured.items():
            lines.append(
                f"{prefix}{name}: highest train loss {way['highest_train_loss']:.4f}, highest test error "
                f"{way['highest_test_error']:.4f}; an end with t = 1/2: error "
                f"{way['ensemble_error'][len(way['t']) // 2]:.4f}"
            )
    lines.append(f"cost: {cost.example_passes:,} example passes, {cost.seconds:.0f} s on {cost.device}")
    lines.append(f"run: {path}")
    Console(highlight=False).print("\n".join(lines), soft_wrap=True)
