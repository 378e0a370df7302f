"""A training command's runs, one a seed: their options resolved, made here or elsewhere, saved, resumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from ensembler.errors import UsageError
from ensembler.machine import under_torchrun
from ensembler.options import Options, option
from ensembler.storage.transfers import push_finished
from ensembler.storage.urls import destination
from ensembler.text import echo, print_prose
from ensembler.trainers.settings import Settings

if TYPE_CHECKING:
    from ensembler.data.datasets import Dataset
    from ensembler.run import Run
    from ensembler.trainers.distributed import Group
    from ensembler.trainers.method import Method
    from ensembler.trainers.runs import Runs
    from ensembler.trainers.spec import Spec
    from ensembler.trainers.training import Training

__all__ = ["CheckpointData", "Data", "Import", "Launch", "check_free", "label", "launch", "save"]


_DATASETS = "digits, cifar10, cifar100, fashion-mnist, folder:PATH, or your own: package.module:NAME or file.py:NAME."


class Data(Options):
    """Which images to train on."""

    dataset: str | None = option(None, help=f"{_DATASETS} (default: digits, or that of a run to start from)")
    data: Path | None = option(
        None,
        help="Folder of the dataset's files; of folder:PATH, where it is now. (default: $ENSEMBLER_DATA, or a cache "
        "folder)",
    )
    download: bool = option(False, flag="--download", help="Download the dataset if it is missing.")
    image_size: int | None = option(None, ge=1, help="Resize every image to this many pixels per side.")
    in_memory: bool | None = option(
        None,
        flag="--in-memory/--from-files",
        help="Hold a folder's images in memory, or read them when needed. (default: in memory up to 4 GiB)",
    )
    corrupt: Literal["refuse", "skip"] = option(
        "refuse", help="Images of a folder that cannot be read: stop, or leave them out and name them."
    )
    normalisation: str | None = option(
        None,
        metavar="NAME|MEAN/STD",
        help="Mean and std of the network's inputs: imagenet, half, none, bytes, or as in 0.5,0.5,0.5/0.2,0.2,0.2. "
        "(default: those of the training images)",
    )

    @property
    def name(self) -> str:
        """The dataset's name."""
        return "digits" if self.dataset is None else self.dataset

    def load(self) -> Dataset:
        """Load them.

        Raises:
            DataError: they are missing. UsageError: an option out of range.
        """
        from ensembler.data import datasets
        from ensembler.data.normalisation import normalised

        asked = self.model_dump(include={"download", "image_size", "in_memory", "corrupt"})
        return normalised(datasets.load(self.name, self.data, **asked), self.normalisation)


class CheckpointData(Data):
    """Which images checkpoints were trained on: nothing says it but their user."""

    dataset: str = option(help=f"What they were trained on: {_DATASETS}")


class Launch(Options):
    """Where a command's runs go, how many there are, and what is shown of them."""

    recipe: Literal["paper", "fast"] | None = option(
        None,
        panel="Training",
        help="Other defaults: those published for the method, network and dataset, or those of a short run.",
    )
    collapse: Literal["centroid"] | None = option(
        None, help="Keep only the average of the vertices (SWA), one network; see also: ensembler collapse."
    )
    out: str | None = option(
        None,
        metavar="PATH|URL",
        help="Folder of the new run, or a URL: then one in runs/, pushed when it is finished. (default: one in runs/)",
    )
    resume: Path | None = option(None, metavar="RUN", help="Resume an interrupted run with its original options.")
    seeds: int = option(
        1, ge=1, panel="Engine", help="N, runs with the seeds --seed, --seed + 1, ...; for N > 1, OUT-s0, OUT-s1, ..."
    )
    engine: Literal["local", "ray"] = option(
        "local", panel="Engine", help="What runs independent jobs (members, simplexes, seeds): this process, or Ray."
    )
    address: str | None = option(
        None, panel="Engine", help="Address of a Ray cluster. (default: $RAY_ADDRESS, or a new Ray on this machine)"
    )
    parallel_members: int = option(
        1, ge=1, metavar="M", panel="Engine", help="M independent jobs at once on one GPU: members, simplexes, seeds."
    )
    checkpoint_every: float = option(60.0, ge=0, panel="Progress", help="Seconds between two checkpoints.")
    quiet: bool = option(False, flag="--quiet", panel="Progress", help="Print only the final result.")
    log: Path | None = option(None, panel="Progress", help="File to which each epoch adds a line of JSON.")
    tensorboard: Path | None = option(None, panel="Progress", help="Folder for TensorBoard's event files.")


class Import(Options):
    """Which checkpoints become a run, and where it goes."""

    checkpoints: list[Path] = option(argument=True, help="Files of weights, one per member: .safetensors, .pt, .ckpt.")
    architecture: str = option(flag="--arch", help="Network of all of them, named as in training.")
    device: str | None = option(None, help="Device, such as cpu or cuda. (default: CUDA where available)")
    out: str | None = option(None, metavar="PATH|URL", help="Folder of the new run, or a URL. (default: one in runs/)")


_WITH_RESUME = {"resume", "data", "dataset", "engine", "address", "parallel_members", "checkpoint_every", "quiet"}
_WITH_RESUME |= {"log", "tensorboard"}
_WITH_RESUME |= Settings.marked("computing")


def launch(kind: type[Method], given: Mapping[str, Any], chosen: set[str]) -> None:
    """Make the runs of a command.

    Args:
        kind: the method.
        given: every option of the command, by name.
        chosen: the names of those that were typed, or given by a file: the others have their defaults.

    Raises:
        UsageError: options that do not go together, or a run that already exists.
    """
    own = Launch.typed(given)
    # Before torch is loaded, so that a mistake is answered at once; of several processes, only the first one answers.
    for record in () if own.resume or under_torchrun() else (Data, kind, Settings):
        record.typed({name: _written(value) for name, value in given.items()})
    from ensembler.engine import choose
    from ensembler.trainers.distributed import join_group
    from ensembler.trainers.events import Message
    from ensembler.trainers.progress import progress
    from ensembler.trainers.runs import Runs
    from ensembler.trainers.spec import Spec, unfinished

    several = own.seeds > 1
    with (
        join_group(given["device"]) as group,
        choose(own.engine, own.address, given["device"], given["threads"], own.parallel_members) as engine,
    ):
        if group.size > 1 and (several or own.engine != "local" or own.parallel_members > 1):
            raise UsageError(
                "under torchrun, one run is made by the processes that it started: leave out --seeds, --engine and "
                "--parallel-members"
            )
        folder, url = destination(own.out, "runs")
        path = own.resume or folder or _unnamed(f"{kind.command.removeprefix('train-')}-{label(given['architecture'])}")
        if not several:
            group.from_first(partial(check_free, path, resumed=own.resume is not None, restarted=under_torchrun()))
        runs = None
        try:
            with progress(own.quiet, own.log, own.tensorboard) if group.first else progress(quiet=True) as on_event:
                if own.resume:
                    spec = group.from_first(partial(Spec.read, unfinished(path)))
                    training, url = _resumed(spec, kind, given, chosen, own, group), spec.url
                else:
                    training = _given(kind, given, chosen, own, group)
                training = training.tried(on_event, group.size)
                first = training.settings.seed
                names = {f"seed {seed}": f"-s{seed}" * several for seed in range(first, first + own.seeds)}
                runs = Runs(
                    {name: training.with_seed(first + number) for number, name in enumerate(names)},
                    {name: path.with_name(path.name + suffix) for name, suffix in names.items()},
                    partial(save, say=lambda text: on_event(Message(text, result=True))),
                    urls={name: url + suffix for name, suffix in names.items()} if url else {},
                    every=own.checkpoint_every,
                    group=group,
                )
                runs.make(engine, on_event)
        except BaseException:
            if runs and group.first:
                _say_how_to_resume(runs, kind.command)
            raise
        for name, one in (runs.found | runs.saved).items() if group.first else ():
            push_finished(one, runs.urls.get(name), own.quiet)


def _say_how_to_resume(runs: Runs, command: str) -> None:
    """Say how to resume what was interrupted, if anything is kept of it."""
    if runs.several and (runs.kept or runs.saved):
        name, path = next(iter(runs.paths.items()))
        again = path.with_name(path.name.removesuffix(f"-s{runs.trainings[name].settings.seed}"))
        typer.echo(f"to resume: the same command with --out {again}", err=True)
        return
    for folder in runs.kept:
        typer.echo(f"to resume: ensembler {command} --resume {folder.with_suffix('')}", err=True)


def _given(kind: type[Method], given: Mapping[str, Any], chosen: set[str], own: Launch, group: Group) -> Training:
    """What a command's options ask for."""
    from ensembler.data import normalisation
    from ensembler.run import Run
    from ensembler.trainers import recipes
    from ensembler.trainers.starts import load_starts
    from ensembler.trainers.training import Training

    data, values = Data.typed(given), {name: _written(value) for name, value in given.items()}
    starts = load_starts(kind.typed(values), Settings.typed(values))
    start = next((found.manifest for found in starts.values() if isinstance(found, Run)), None)
    if start and "architecture" in chosen and values["architecture"] != start.architecture:
        raise UsageError(f"the run that training starts from is of --arch {start.architecture}: leave out --arch")
    if own.recipe:
        architecture = start.architecture if start else values["architecture"]
        name = start.dataset.name if start and data.dataset is None else data.name
        found = recipes.find(own.recipe, kind, architecture, name)
        values |= {name: value for name, value in found.items() if name not in chosen}
    if start and data.normalisation:
        inherited = normalisation.text(start.dataset.mean, start.dataset.std)
        if normalisation.text(*normalisation.parse(data.normalisation)) != inherited:
            raise UsageError(f"the run that training starts from has --normalisation {inherited}: leave it out")
    load = data.load
    if start and data.dataset is None and data.image_size is None:
        load = partial(start.dataset.load, data.data, download=data.download)
    dataset = group.after_first(load)
    return Training.of(dataset, kind.typed(values), Settings.typed(values), starts, own.collapse is not None)


def _resumed(
    spec: Spec, kind: type[Method], given: Mapping[str, Any], chosen: set[str], own: Launch, group: Group
) -> Training:
    """What an interrupted run's ``spec.json`` asks for."""
    from ensembler.trainers.starts import load_starts
    from ensembler.trainers.training import Training

    if spec.command != kind.command:
        raise UsageError(f"{own.resume} was begun by another command: ensembler {spec.command} --resume {own.resume}")
    if wrong := sorted(chosen - _WITH_RESUME):
        flags = Data.flags() | Settings.flags() | Launch.flags() | kind.flags()
        raise UsageError(f"--resume keeps the options that the run was begun with: leave out {flags[wrong[0]]}")
    here = {name: given[name] for name in Settings.marked("computing") & chosen}
    method, settings = kind(**spec.options), Settings(**spec.settings | here)
    dataset = group.after_first(partial(spec.dataset.load, given["data"], dataset=given["dataset"]))
    return Training.of(dataset, method, settings, load_starts(method, settings), spec.collapse)


def _unnamed(name: str) -> Path:
    """Where a run goes that the user has not named.

    Raises:
        UsageError: several processes train it, which would each find another name.
    """
    from ensembler.run import new_path

    if under_torchrun():
        raise UsageError("under torchrun, name the run with --out: every process and every restart must mean the same")
    return new_path(Path("runs"), name)


def check_free(path: Path, resumed: bool = False, restarted: bool = False) -> None:
    """Before an hour of training, not after, say what stands where a run is to be, or that nothing can be written.

    Args:
        path: where it is to be.
        resumed: whether it must have been begun.
        restarted: whether it may have been begun, by the very same command.

    Raises:
        UsageError: a run is there, or what was begun of one; or nothing is there to resume. ArtefactError: the folder
            cannot be written to.
    """
    from ensembler.storage.artefact import check_writable, lock
    from ensembler.trainers.spec import SPEC, unfinished

    begun = unfinished(path)
    if resumed and not (begun / SPEC).is_file():
        raise UsageError(
            f"nothing to resume at {path}: {'it is finished' if path.exists() else f'there is no {begun}'}"
        )
    if path.exists() and (resumed or restarted) and begun.is_dir():
        raise UsageError(f"{path} already exists. If it is this run, remove {begun}; otherwise move it away and resume")
    if path.exists():
        raise UsageError(f"{path} already exists: choose another --out, or remove it first")
    if (begun / SPEC).is_file() and not (resumed or restarted):
        if held := lock(begun / ".lock", begun):
            held.close()
        raise UsageError(f"{begun} holds an interrupted run: resume it with --resume {path}, or remove it")
    check_writable(path.parent)


def save(run: Run, path: Path, say: Callable[[str], None] = print_prose) -> Path:
    """Save a run, or beside ``path`` if another process took that name meanwhile, and say what it is.

    Returns:
        Where it lies.
    """
    from ensembler.run import new_path
    from ensembler.trainers.summary import lines

    try:
        run.save(path)
    except UsageError:  # what was trained is not thrown away
        echo(f"{path} was taken while this run was trained: it is saved beside it", err=True)
        path = run.save(new_path(path.parent, path.name))
    for line in [*lines(run.manifest), f"run: {path}"]:
        say(line)
    return path


def label(architecture: str) -> str:
    """An architecture's name as part of a folder's."""
    return architecture.replace(":", "-")


def _written(value: Any) -> Any:
    """A path as a manifest holds it: a link such as latest points elsewhere tomorrow."""
    if isinstance(value, list | tuple):
        return [_written(one) for one in value]
    return str(value.resolve()) if isinstance(value, Path) else value
