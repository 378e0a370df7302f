"""The training commands: each names its method's options; those that all methods share are declared once.

Annotations are evaluated here, not postponed: Typer reads them.
"""

import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ensembler.errors import ArtefactError, DataError, DivergedError, EngineError, ShapeError, UsageError
from ensembler.storage import destination, place
from ensembler.transfers import push_finished

if TYPE_CHECKING:
    from ensembler.checkpoint import Checkpoint
    from ensembler.engine import Engine
    from ensembler.run import Run
    from ensembler.trainers.distributed import Group
    from ensembler.trainers.orders import Order
    from ensembler.trainers.session import Session

__all__ = ["app"]

app = typer.Typer()

_BEGINNING = ("init", "second", "weights")  # options that say what to start from
_PROGRESS = ("checkpoint_every", "quiet", "log", "tensorboard", "data")
_ENGINE = ("engine", "address")  # where a run is made is no part of what it is

_option = functools.partial(typer.Option, rich_help_panel="Method")
_image_option = functools.partial(typer.Option, rich_help_panel="Images")
_training_option = functools.partial(typer.Option, rich_help_panel="Training")
_progress_option = functools.partial(typer.Option, rich_help_panel="Progress")
_engine_option = functools.partial(typer.Option, rich_help_panel="Engine")

_Init = Annotated[
    Path | None,
    _training_option(
        parser=place,
        help="What to start from: a run, of which the first member, or a .safetensors or .pt file.",
    ),
]
_Weights = Annotated[
    str | None, _training_option(help="Start from published weights of torchvision or timm: DEFAULT, or a name.")
]
_Recipe = Annotated[
    Literal["paper", "fast"] | None,
    _training_option(help="Other defaults: those published for the method, network and dataset, or a short run's."),
]

_Out = Annotated[
    str | None,
    typer.Option(
        metavar="PATH|URL",
        help="Folder of the new run, or a URL: then one in runs/, pushed when it is finished. (default: one in runs/)",
    ),
]
_Collapse = Annotated[
    Literal["centroid"] | None,
    typer.Option(help="Average the vertices into one network (SWA) and keep only that; see also: ensembler collapse."),
]
_Points = Annotated[int, _option(help="M: the vertices first, then points drawn inside.")]
_Corners = Annotated[
    bool, _option("--corners/--no-corners", help="Whether the first members are the vertices themselves.")
]
_Concentration = Annotated[
    float, _option(help="Dirichlet's alpha of the drawn members; below 1 leans to the vertices.")
]


@contextmanager
def _order(
    start: "Run | Checkpoint | None",
    method: "Callable[[Session], Run]",
    group: "Group",
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
        str | None, _image_option(help="crop-flip, crop, resized-crop-flip or none. (default: what suits the dataset)")
    ] = None,
    in_memory: Annotated[
        bool | None,
        _image_option(
            "--in-memory/--from-files",
            help="Hold a folder's images in memory, or read them when needed. (default: in memory up to 4 GiB)",
        ),
    ] = None,
    corrupt: Annotated[
        Literal["refuse", "skip"],
        _image_option(help="Images of a folder that cannot be read: stop at them, or leave them out and name them."),
    ] = "refuse",
    workers: Annotated[
        int | None, _image_option(help="Processes that read images from files. (default: one a CPU, at most 8)")
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
        int | None,
        _training_option(help="Images a step, all processes together. (default: 128, or 32 under 10,000 images)"),
    ] = None,
    rate: Annotated[float, _training_option("--lr", help="Highest learning rate of a solution.")] = 0.1,
    schedule: Annotated[
        Literal["one-cycle", "cosine", "piecewise"], _training_option(help="How the rate of a solution goes.")
    ] = "one-cycle",
    momentum: Annotated[float, _training_option(help="Nesterov momentum of SGD.")] = 0.9,
    weight_decay: Annotated[float, _training_option(help="Weight decay of SGD.")] = 5e-4,
    clip: Annotated[float, _training_option(help="Largest norm of the gradient; 0 for no limit.")] = 1.0,
    precision: Annotated[
        Literal["float32", "bfloat16", "float16"],
        _training_option(help="Of the forward and backward pass; float16 on a GPU alone."),
    ] = "float32",
    compiled: Annotated[
        bool, _training_option("--compile", help="Compile the network: takes a minute, and is meant for GPUs.")
    ] = False,
    sync_batchnorm: Annotated[
        bool,
        _training_option(
            "--sync-batchnorm", help="Under torchrun: normalise over the images of all GPUs, not of each."
        ),
    ] = False,
    seed: Annotated[int, _training_option(help="Of everything that is drawn.")] = 0,
    threads: Annotated[
        int | None, _training_option(help="CPU threads that compute one piece of the training. (default: all)")
    ] = None,
    device: Annotated[str | None, _training_option(help="cpu, cuda, ... (default: CUDA where there is one)")] = None,
    quiet: Annotated[bool, _progress_option("--quiet", help="Say nothing before the end.")] = False,
    log: Annotated[Path | None, _progress_option(help="File that each epoch adds a line of JSON to.")] = None,
    tensorboard: Annotated[Path | None, _progress_option(help="Folder for TensorBoard's event files.")] = None,
) -> Iterator[tuple["Order", Callable[..., None]]]:
    """What the shared options say of the runs to make, and what hears their progress while the block runs."""
    from ensembler import datasets
    from ensembler.run import Run
    from ensembler.trainers.orders import Order
    from ensembler.trainers.progress import progress
    from ensembler.trainers.session import Settings

    settings = Settings(
        architecture=architecture,
        epochs=epochs,
        batch_size=batch_size,
        rate=rate,
        schedule=schedule,
        momentum=momentum,
        weight_decay=weight_decay,
        clip=clip or None,
        precision=precision,
        compile=compiled,
        sync_batchnorm=sync_batchnorm,
        augmentation=augmentation,
        workers=workers,
        seed=seed,
        device=device,
        threads=threads,
    )
    if isinstance(start, Run) and dataset is None and image_size is None:
        load = functools.partial(start.manifest.dataset.load, data, download=download)
    else:
        load = functools.partial(
            datasets.load,
            dataset or "digits",
            data,
            download=download,
            image_size=image_size,
            in_memory=in_memory,
            corrupt=corrupt,
        )
    images = group.after_first(load)
    with progress(quiet, log, tensorboard) if group.first else progress(quiet=True) as (watch, say):
        if images.skipped:
            say(f"{len(images.skipped)} images cannot be read and are left out: {', '.join(images.skipped)}")
        told: dict[str, Callable[..., None]] = {"watch": watch, "say": say}
        yield Order(method, images, settings, start, group=group), lambda kind, *what: told[kind](*what)


def _start(init: list[Path] | Path | None, weights: str | None, architecture: str) -> "Run | Checkpoint | None":
    from ensembler import checkpoint
    from ensembler.run import Run

    init = init[0] if isinstance(init, list) else init
    if init is not None and weights is not None:
        raise UsageError("--init and --weights both say what to start from: give one of them")
    if weights is not None:
        return checkpoint.Checkpoint(f"{architecture} {weights}", checkpoint.pretrained(architecture, weights))
    if init is not None and init.is_file():
        return checkpoint.Checkpoint(init.name, checkpoint.read(init))
    return None if init is None else Run.load(init)


def _give_options_again(context: typer.Context, path: Path | None) -> Path | None:
    """``--resume``: the options that the run was begun with become the defaults, before any is read."""
    if path is None:
        return None
    from ensembler.config import read
    from ensembler.trainers.checkpoints import OPTIONS, unfinished

    file = unfinished(path) / OPTIONS
    if not file.is_file():
        state = "it is finished" if path.exists() else f"there is no {unfinished(path)}"
        raise typer.BadParameter(f"nothing to resume at {path}: {state}")
    begun = json.loads(file.read_text("utf-8"))
    if context.info_name not in begun:
        raise typer.BadParameter(f"{path} was begun by another command: ensembler {next(iter(begun))} --resume {path}")
    try:
        context.default_map = dict(context.default_map or {}) | read(file, context)
    except UsageError as error:
        raise typer.BadParameter(str(error)) from error
    return path


def _check_typed(context: typer.Context) -> None:
    """A checkpoint of other options is another run's: those typed beside ``--resume`` would give a mixture."""
    for name in context.params.keys() - {"resume", *_PROGRESS, *_ENGINE}:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"--resume keeps the options that the run was begun with: leave out {name}")


_Resume = Annotated[
    Path | None,
    _progress_option(
        metavar="RUN",
        is_eager=True,
        callback=_give_options_again,
        help="Go on with a run that was broken off; it keeps the options it was begun with.",
    ),
]
_CheckpointEvery = Annotated[float, _progress_option(help="Seconds between two checkpoints.")]
_Seeds = Annotated[
    int, _engine_option(help="N, runs with the seeds --seed, --seed + 1, ...: OUT-s0, OUT-s1, ... where N > 1.")
]
_Engine = Annotated[
    Literal["local", "ray"],
    _engine_option(help="What runs independent pieces (members, simplexes, seeds): this process in turn, or Ray."),
]
_Address = Annotated[
    str | None, _engine_option(help="Of a Ray cluster. (default: RAY_ADDRESS, or a Ray of this machine's own)")
]


_Method = Callable[..., "Run"]


def _together(command: Callable[..., None]) -> Callable[..., None]:
    """A command in which the processes that torchrun started together take part; without it, this one alone."""

    @functools.wraps(command)
    def run(**given: Any) -> None:
        from ensembler.trainers.distributed import joined

        with joined(given["device"]) as group:
            command(group=group, **given)

    return run


def _trains(name: str, has_pieces: bool = False) -> Callable[[_Method], _Method]:
    """Make a command of a method: its own options, then the shared ones, then where to start and what to keep.

    A method that names a shared option itself declares it in its own way. One that ``has_pieces`` gives them to its
    session's engine; else the whole run is a piece.
    """

    by_name = inspect.Parameter.KEYWORD_ONLY

    def decorate(method: _Method) -> _Method:
        own = {name: p for name, p in inspect.signature(method).parameters.items() if name != "session"}
        shared = {
            name: p
            for name, p in inspect.signature(_order).parameters.items()
            if name not in ("start", "method", "group")
        }

        @functools.wraps(method)
        @_together
        def command(
            group: "Group",
            context: typer.Context,
            recipe: str | None,
            collapse: str | None,
            out: str | None,
            resume: Path | None,
            seeds: int,
            engine: Literal["local", "ray"],
            address: str | None,
            **given: Any,
        ) -> None:
            from ensembler.engine import Local, choose

            if resume:
                _check_typed(context)
            _check_runs(group, seeds, engine)
            beginning = {key: _written(context.params[key]) for key in _BEGINNING if key in given}
            folder, url = destination(out, "runs")
            kept = {key: value for key, value in context.params.items() if key not in ("resume", *_ENGINE)}
            kept |= {"out": url, "seeds": 1}
            options = {key: _written(value) for key, value in kept.items() if value is not None}
            path = resume or folder or _unnamed(f"{name.removeprefix('train-')}-{_label(given)}")
            paths = _of_seeds(path, given["seed"], seeds)
            again = resume is not None or _broken_off(path, {name: options})
            for one in paths.values():
                group.from_first(functools.partial(_check_free, one, again, several=seeds > 1))
            start = _start(given["init"], given["weights"], given["architecture"])
            if recipe:
                given |= _from_recipe(recipe, context, start, given)
            every = given.pop("checkpoint_every")
            whole = functools.partial(method, **{key: _absolute(given[key]) for key in own})
            about = {"recipe": recipe} | beginning
            missing = paths
            with (
                choose(engine, address, given["device"], given["threads"]) as chosen,
                _order(start, whole, group, **{key: given[key] for key in shared}) as (order, hear),
            ):
                of_pieces = replace(order, collapse=collapse is not None, several=seeds > 1)
                if seeds > 1:
                    missing = _not_made(of_pieces, paths, name, options, given | about)
                if has_pieces and seeds == 1:
                    made = _make(replace(of_pieces, engine=chosen), missing, every, name, options, Local(), hear, about)
                else:
                    made = _make(of_pieces, missing, every, name, options, chosen, hear, about)
            for seed, one in (paths | made).items() if group.first else ():
                push_finished(one, url and url + f"-s{seed}" * (seeds > 1), given["quiet"])

        last = {
            **{"init": _Init, "weights": _Weights, "recipe": _Recipe, "collapse": _Collapse, "out": _Out},
            "resume": _Resume,
        }
        rest = {name: inspect.Parameter(name, by_name, default=None, annotation=kind) for name, kind in last.items()}
        rest["checkpoint_every"] = inspect.Parameter(
            "checkpoint_every", by_name, default=60.0, annotation=_CheckpointEvery
        )
        rest["seeds"] = inspect.Parameter("seeds", by_name, default=1, annotation=_Seeds)
        rest["engine"] = inspect.Parameter("engine", by_name, default="local", annotation=_Engine)
        rest["address"] = inspect.Parameter("address", by_name, default=None, annotation=_Address)
        options = own | shared | rest | own  # its own come first, and win
        parameters = [
            inspect.Parameter("context", by_name, annotation=typer.Context),
            *(option.replace(kind=by_name) for option in options.values()),
        ]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(name)(command)
        return method

    return decorate


def _not_made(
    order: "Order", paths: Mapping[int, Path], name: str, options: dict[str, Any], given: Mapping[str, Any]
) -> dict[int, Path]:
    """Of a comparison's runs, by their seeds, those that are still to be made, or to be gone on with."""
    from ensembler.trainers.orders import check_begun, is_made

    missing = {}
    for seed, path in paths.items():
        check_begun(path, name, options | {"seed": seed}, ignored=_PROGRESS)
        if is_made(path, seed, given, order):
            typer.echo(f"{path} is there already", err=True)
        else:
            missing[seed] = path
    return missing


def _make(
    order: "Order",
    paths: Mapping[int, Path],
    every: float,
    name: str,
    options: dict[str, Any],
    engine: "Engine",
    hear: Callable[..., None],
    about: Mapping[str, Any],
) -> dict[int, Path]:
    """Make the run of each seed by the engine, and save each as soon as it is finished; then its checkpoints go.

    Returns:
        where each lies, by its seed.
    """
    from ensembler.trainers.checkpoints import Checkpoints, unfinished
    from ensembler.trainers.orders import make

    begun = {
        seed: Checkpoints(unfinished(path), every, {name: options | {"seed": seed}}, ours=order.group.first)
        for seed, path in paths.items()
    }
    asked = [(seed, checkpoints if engine.here else None) for seed, checkpoints in begun.items()]
    saved: dict[int, Path] = {}
    try:
        with closing(engine.run(make, order, asked, hear)) as made:
            for place, run in made:
                seed, _ = asked[place]
                run.manifest.options |= about
                saved[seed] = order.group.from_first(functools.partial(_save, run, paths[seed]))
                begun.pop(seed).remove()
    except (KeyboardInterrupt, EngineError, ArtefactError):  # the last: a full disk
        for seed, checkpoints in begun.items() if order.group.first else ():
            if order.several:
                path = paths[seed].with_name(paths[seed].name.removesuffix(f"-s{seed}"))
                typer.echo(f"to go on: the same command with --out {path}", err=True)
                break
            if checkpoints.folder.is_dir():
                typer.echo(f"to go on: ensembler {name} --resume {checkpoints.folder.with_suffix('')}", err=True)
        raise
    except (UsageError, DataError, ShapeError, DivergedError):
        for checkpoints in begun.values():
            checkpoints.remove()  # to go on would end the same way
        raise
    finally:
        for checkpoints in begun.values():
            checkpoints.close()
    return saved


def _check_runs(group: "Group", seeds: int, engine: str) -> None:
    """At least one run is made; by processes that train together, one, and by themselves."""
    if seeds < 1:
        raise UsageError(f"at least one run is made, not {seeds}")
    if group.size > 1 and (seeds > 1 or engine != "local"):
        raise UsageError(
            "under torchrun, one run is made by the processes that it started: leave out --seeds and --engine"
        )


def _of_seeds(path: Path, first: int, seeds: int) -> dict[int, Path]:
    """Where the run of each seed is to be."""
    if seeds == 1:
        return {first: path}
    return {seed: path.with_name(f"{path.name}-s{seed}") for seed in range(first, first + seeds)}


def _from_recipe(
    recipe: str, context: typer.Context, start: "Run | Checkpoint | None", given: dict[str, Any]
) -> dict[str, Any]:
    """What a recipe gives to those options that neither the command line nor a file has given."""
    from ensembler.run import Run
    from ensembler.trainers import recipes

    about = (given["architecture"], given["dataset"] or "digits")
    if isinstance(start, Run):
        about = (start.manifest.architecture, given["dataset"] or start.manifest.dataset.name)
    options = recipes.find(recipe, str(context.info_name), *about)
    sources = {name: context.get_parameter_source(name) for name in options}
    return {name: options[name] for name, source in sources.items() if source is None or source.name == "DEFAULT"}


def _absolute(given: Any) -> Any:
    """A path that means the same in another process."""
    if isinstance(given, list):
        return [_absolute(one) for one in given]
    return given.absolute() if isinstance(given, Path) else given


def _written(given: Path | list[Path] | str | None) -> Any:
    """What to start from, as a manifest holds it: a link such as latest points elsewhere tomorrow."""
    if isinstance(given, list):
        return [_written(path) for path in given]
    return str(given.resolve()) if isinstance(given, Path) else given


@_trains("train-deep-ensemble", has_pieces=True)
def train_deep_ensemble(
    session: "Session",
    members: Annotated[int, _option(help="M, networks trained; 1 is a single network.")] = 4,
    parallel_members: Annotated[
        int,
        _option(
            help="Members trained at once, side by side: meant for small networks on a GPU; slower on a CPU, and "
            "without checkpoints."
        ),
    ] = 1,
) -> "Run":
    """Train M networks from independent beginnings (Lakshminarayanan et al. 2017)."""
    from ensembler.trainers.deep_ensemble import train_deep_ensemble as method

    return method(session, members, parallel_members)


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


@_trains("train-simplex", has_pieces=True)
def train_simplex(
    session: "Session",
    vertices: Annotated[int, _option(help="K, corners of the simplex.")] = 4,
    members: _Points = 10,
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
        float, _option(help="Of auto: by what share vertices and points inside may exceed the solution's held-out NLL.")
    ] = 0.02,
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
    members: _Points = 10,
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
    init: Annotated[Path, typer.Argument(parser=place, metavar="FIRST", help="The run whose first member is one end.")],
    second: Annotated[
        Path, typer.Argument(parser=place, metavar="SECOND", help="The run whose first member is the other end.")
    ],
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
    init: Annotated[
        list[Path],
        typer.Argument(parser=place, metavar="RUN...", help="Two runs or more; of each, the first member."),
    ],
    connectors: Annotated[int, _option(help="Vertices that all simplexes share, added one at a time.")] = 1,
    members: _Points = 10,
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
    run: Annotated[Path | None, typer.Argument(parser=place, help="Any run. (default: the newest in runs/)")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the dataset's files.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: CUDA where there is one)")] = None,
    out: _Out = None,
) -> None:
    """Average a run's vertices into one network: SWA of snapshots (Izmailov et al. 2018)."""
    from ensembler.run import Run, latest, new_path
    from ensembler.trainers.collapse import collapse_run as method
    from ensembler.trainers.session import Session, Settings

    folder, url = destination(out, "runs")
    _check_free(folder or Path("runs", "new"))
    whole = Run.load(run or latest(Path("runs")))
    record = whole.manifest.dataset
    settings = Settings(augmentation=record.augmentation, seed=whole.manifest.seed, device=device)
    found = method(Session(record.load(data), settings, whole), whole)
    name = f"{found.manifest.method}-{_label(found.manifest.options)}"
    push_finished(_save(found, folder or new_path(Path("runs"), name)), url)


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


def _check_free(path: Path, resumed: bool = False, several: bool = False) -> None:
    """Said before an hour of training, not after. Of ``several`` runs, some may be there, or begun, already."""
    from ensembler.artefact import check_writable
    from ensembler.trainers.checkpoints import OPTIONS, Checkpoints, unfinished

    begun = unfinished(path)
    if path.exists() and resumed:
        raise UsageError(f"{path} exists already: remove {begun} if that is it, finished; else move it away to go on")
    if path.exists() and not several:
        raise UsageError(f"{path} exists already: choose another --out, or remove it first")
    if (begun / OPTIONS).is_file() and not (resumed or several):
        Checkpoints(begun).close()  # says so where another process is working on it
        raise UsageError(f"{begun} holds a run that was broken off: go on with --resume {path}, or remove it")
    check_writable(path.parent)


def _unnamed(label: str) -> Path:
    """Where a run goes that the user has not named."""
    from ensembler.run import new_path
    from ensembler.trainers.distributed import launched

    if launched():
        raise UsageError("under torchrun, name the run with --out: every process and every restart must mean the same")
    return new_path(Path("runs"), label)


def _broken_off(path: Path, options: Mapping[str, Any]) -> bool:
    """Whether torchrun runs the very command again that was broken off, by a restart of its own or by the user."""
    from ensembler.trainers.checkpoints import OPTIONS, unfinished
    from ensembler.trainers.distributed import launched

    begun = unfinished(path) / OPTIONS
    return launched() and begun.is_file() and json.loads(begun.read_text("utf-8")) == json.loads(json.dumps(options))


def _label(given: Mapping[str, Any]) -> str:
    return str(given["architecture"]).replace(":", "-")


def _save(run: "Run", path: Path) -> Path:
    from rich.console import Console

    from ensembler.run import new_path
    from ensembler.trainers.summary import lines

    try:
        run.save(path)
    except UsageError:  # another process took the name meanwhile: what was trained is not thrown away
        typer.echo(f"{path} was taken while this run was trained: it is saved beside it", err=True)
        path = run.save(new_path(path.parent, path.name))
    Console(highlight=False).print("\n".join([*lines(run.manifest), f"run: {path}"]), soft_wrap=True)
    return path
