"""What all training commands share: their options, each declared once, and how a command is made of a method.

Annotations are evaluated here, not postponed: Typer reads them.
"""

import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ensembler.errors import UsageError
from ensembler.storage import destination, place
from ensembler.transfers import push_finished

if TYPE_CHECKING:
    from ensembler.checkpoint import Checkpoint
    from ensembler.run import Run
    from ensembler.trainers.distributed import Group
    from ensembler.trainers.orders import Order
    from ensembler.trainers.session import Session

__all__ = ["Concentration", "Corners", "Out", "Points", "app", "label", "option", "trains"]

app = typer.Typer()

_BEGINNING = ("init", "second", "weights")  # options that say what to start from
_PROGRESS = ("checkpoint_every", "quiet", "log", "tensorboard", "data")
_ENGINE = ("engine", "address")  # where a run is made is no part of what it is

option = functools.partial(typer.Option, rich_help_panel="Method")
"""An option of a method's own."""

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

Out = Annotated[
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
Points = Annotated[int, option(help="M: the vertices first, then points drawn inside.")]
Corners = Annotated[
    bool, option("--corners/--no-corners", help="Whether the first members are the vertices themselves.")
]
Concentration = Annotated[float, option(help="Dirichlet's alpha of the drawn members; below 1 leans to the vertices.")]


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


def trains(name: str, has_pieces: bool = False) -> Callable[[_Method], _Method]:
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
            from ensembler.trainers.orders import Orders, unnamed

            if resume:
                _check_typed(context)
            _check_runs(group, seeds, engine)
            beginning = {key: _written(context.params[key]) for key in _BEGINNING if key in given}
            folder, url = destination(out, "runs")
            kept = {key: value for key, value in context.params.items() if key not in ("resume", *_ENGINE)}
            kept |= {"out": url, "seeds": 1}
            options = {key: _written(value) for key, value in kept.items() if value is not None}
            path = resume or folder or unnamed(f"{name.removeprefix('train-')}-{label(given)}")
            orders = Orders.of_seeds(name, options, path, given["seed"], seeds, group)
            orders.check_free(resumed=resume is not None)
            start = _start(given["init"], given["weights"], given["architecture"])
            if recipe:
                given |= _from_recipe(recipe, context, start, given)
            every = given.pop("checkpoint_every")
            whole = functools.partial(method, **{key: _absolute(given[key]) for key in own})
            about = {"recipe": recipe} | beginning
            with (
                choose(engine, address, given["device"], given["threads"]) as chosen,
                _order(start, whole, group, **{key: given[key] for key in shared}) as (order, hear),
            ):
                inside, outside = (chosen, Local()) if has_pieces and not orders.several else (Local(), chosen)
                each = replace(order, collapse=collapse is not None, several=orders.several, engine=inside)
                missing = orders.missing(each, given | about, ignored=_PROGRESS)
                made = orders.make(each, missing, outside, hear, every, about)
            for seed, one in {**orders.paths, **made}.items() if group.first else ():
                push_finished(one, url and url + f"-s{seed}" * orders.several, given["quiet"])

        last = {
            **{"init": _Init, "weights": _Weights, "recipe": _Recipe, "collapse": _Collapse, "out": Out},
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


def _check_runs(group: "Group", seeds: int, engine: str) -> None:
    """At least one run is made; by processes that train together, one, and by themselves."""
    if seeds < 1:
        raise UsageError(f"at least one run is made, not {seeds}")
    if group.size > 1 and (seeds > 1 or engine != "local"):
        raise UsageError(
            "under torchrun, one run is made by the processes that it started: leave out --seeds and --engine"
        )


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


def label(given: Mapping[str, Any]) -> str:
    """What a run that the user has not named is named by: its network."""
    return str(given["architecture"]).replace(":", "-")
