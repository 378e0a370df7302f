"""A training command's runs, one a seed: their options resolved, made here or elsewhere, saved, resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from ensembler.errors import UsageError
from ensembler.storage import destination
from ensembler.trainers.options import Options, option
from ensembler.trainers.settings import Settings
from ensembler.transfers import push_finished

if TYPE_CHECKING:
    from ensembler.datasets import Dataset
    from ensembler.engine import Engine
    from ensembler.jobs import Job
    from ensembler.run import Run
    from ensembler.trainers.distributed import Group
    from ensembler.trainers.events import OnEvent
    from ensembler.trainers.method import Method
    from ensembler.trainers.resume import Unfinished
    from ensembler.trainers.spec import Spec
    from ensembler.trainers.starts import Start

__all__ = ["Data", "Launch", "check_free", "launch", "save"]


class Data(Options):
    """Which images to train on."""

    dataset: str | None = option(
        None, help="digits, cifar10, cifar100, fashion-mnist or folder:PATH. (default: that of --init, or digits)"
    )
    data: Path | None = option(None, help="Folder of the dataset's files. (default: ~/.cache/ensembler/data)")
    download: bool = option(False, flag="--download", help="Download the dataset if it is not there.")
    image_size: int | None = option(None, ge=1, help="Resize every image to this many pixels a side.")
    in_memory: bool | None = option(
        None,
        flag="--in-memory/--from-files",
        help="Hold a folder's images in memory, or read them when needed. (default: in memory up to 4 GiB)",
    )
    corrupt: Literal["refuse", "skip"] = option(
        "refuse", help="Images of a folder that cannot be read: stop, or leave them out and name them."
    )


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
        1, ge=1, panel="Engine", help="N, runs with the seeds --seed, --seed + 1, ...: OUT-s0, OUT-s1, ... where N > 1."
    )
    engine: Literal["local", "ray"] = option(
        "local", panel="Engine", help="What runs independent jobs (members, simplexes, seeds): this process, or Ray."
    )
    address: str | None = option(
        None, panel="Engine", help="Address of a Ray cluster. (default: RAY_ADDRESS, or a Ray of this machine's own)"
    )
    checkpoint_every: float = option(60.0, ge=0, panel="Progress", help="Seconds between two checkpoints.")
    quiet: bool = option(False, flag="--quiet", panel="Progress", help="Print only the final result.")
    log: Path | None = option(None, panel="Progress", help="File to which each epoch adds a line of JSON.")
    tensorboard: Path | None = option(None, panel="Progress", help="Folder for TensorBoard's event files.")


_WITH_RESUME = {"resume", "data", "device", "threads", "workers", "engine", "address"}
_WITH_RESUME |= {"checkpoint_every", "quiet", "log", "tensorboard"}


def launch(kind: type[Method], given: Mapping[str, Any], chosen: set[str]) -> None:
    """Make the runs of a command.

    Args:
        kind: the method.
        given: every option of the command, by name.
        chosen: the names of those that were typed, or given by a file: the others have their defaults.

    Raises:
        UsageError: options that do not go together, or a run that is there already.
    """
    from ensembler.engine import choose
    from ensembler.run import new_path
    from ensembler.trainers.distributed import joined, launched
    from ensembler.trainers.progress import progress

    own = Launch.typed(given)
    with joined(given["device"]) as group, choose(own.engine, own.address, given["device"], given["threads"]) as engine:
        if group.size > 1 and (own.seeds > 1 or own.engine != "local"):
            raise UsageError(
                "under torchrun, one run is made by the processes that it started: leave out --seeds and --engine"
            )
        folder, url = destination(own.out, "runs")
        path = own.resume or folder
        if path is None:
            if launched():
                raise UsageError(
                    "under torchrun, name the run with --out: every process and every restart must mean the same"
                )
            path = new_path(Path("runs"), f"{kind.command.removeprefix('train-')}-{_label(given['architecture'])}")
        several = own.seeds > 1
        if not several:
            group.from_first(partial(check_free, path, resumed=own.resume is not None or launched()))
        show = progress(own.quiet, own.log, own.tensorboard) if group.first else progress(quiet=True)
        with show as on_event:
            make = _resumed if own.resume else _given
            work = make(kind, given, chosen, own, group)
            work = replace(work, several=several, group=group, on_event=on_event)
            if own.resume is None and not several:
                _check_begun(path, work.spec, group)
            paths = {work.settings.seed: path}
            if several:
                first = work.settings.seed
                paths = {seed: path.with_name(f"{path.name}-s{seed}") for seed in range(first, first + own.seeds)}
            saved = _make_all(work, paths, engine, own.checkpoint_every)
        for seed, one in saved.items() if group.first else ():
            push_finished(one, url and url + f"-s{seed}" * several, own.quiet)


@dataclass(frozen=True, eq=False)
class _Work:
    """What the runs of a command have in common, and what makes one of them for its seed."""

    spec: Spec
    dataset: Dataset
    method: Method
    settings: Settings
    starts: Mapping[str, Start]
    several: bool = False
    group: Group | None = None
    on_event: OnEvent = lambda event: None
    inner: Engine | None = None
    begun: Mapping[int, Unfinished] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Sent to another process, it leaves behind what is of this one."""
        return self.__dict__ | {"group": None, "on_event": None, "inner": None, "begun": {}}

    def of_seed(self, seed: int) -> tuple[Spec, Settings]:
        """What decides the run of a seed."""
        from ensembler.trainers.training import resolve

        settings = self.settings.model_copy(update={"seed": seed})
        spec, _, _ = resolve(self.dataset, self.method, settings, self.starts, collapse=self.spec.collapse)
        return spec, settings


def _run_of_seed(work: _Work, emit: OnEvent, seed: int) -> Run:
    """A job: the run of one seed."""
    from ensembler.trainers.distributed import ALONE
    from ensembler.trainers.events import named
    from ensembler.trainers.training import make_run

    spec, settings = work.of_seed(seed)
    begun = work.begun.get(seed)
    return make_run(
        spec,
        work.dataset,
        work.method,
        settings,
        work.starts,
        on_event=named(f"seed {seed}, ", emit) if work.several else emit,
        store=begun.store if begun else None,
        engine=work.inner,
        group=work.group or ALONE,
    )


@dataclass(frozen=True, eq=False)
class _Saved:
    """The store of finished runs: a job is done where its run lies."""

    work: _Work
    paths: Mapping[int, Path]
    begun: dict[int, Unfinished]
    found: dict[int, Path] = field(default_factory=dict)

    def load(self, job: Job) -> Path | None:
        """Where the run of a seed lies, if it is there and whole.

        Raises:
            UsageError: another run is there.
        """
        from ensembler.run import Run

        seed = job.arguments["seed"]
        path = self.paths[seed]
        if not (self.work.several and path.exists()):
            return None
        if Run.load(path).manifest.fingerprint != self.work.of_seed(seed)[0].fingerprint:
            raise UsageError(
                f"{path} already exists, made with other options or of other data: choose another --out, or remove it"
            )
        typer.echo(f"{path} already exists, skipped", err=True)
        self.found[seed] = path
        return path

    def save(self, job: Job, result: Run) -> None:
        """Save a run, and remove what was kept while it was made."""
        seed, group = job.arguments["seed"], self.work.group
        assert group is not None  # noqa: S101  this store is never sent away
        self.found[seed] = group.from_first(partial(save, result, self.paths[seed]))
        self.begun.pop(seed).remove()


def _make_all(work: _Work, paths: Mapping[int, Path], engine: Engine, every: float) -> dict[int, Path]:
    """Make the runs of all seeds, save each as soon as it is finished, and say where they lie."""
    from ensembler import jobs
    from ensembler.engine import Local
    from ensembler.trainers.resume import Unfinished

    group = work.group
    assert group is not None  # noqa: S101  set by launch
    outer, inner = (engine, Local()) if work.several else (Local(), engine)
    todo = [jobs.Job(f"seed {seed}", _run_of_seed, {"seed": seed}) for seed in paths]
    begun = {
        seed: Unfinished(path, work.of_seed(seed)[0], every, ours=group.first)
        for seed, path in paths.items()
        if not path.exists()
    }
    shared = replace(work, inner=inner, begun=dict(begun) if outer.here else {})
    store = _Saved(work, paths, begun)
    with _kept(work, paths, begun), closing(jobs.run(todo, shared, outer, store, work.on_event)) as results:
        for _ in results:
            pass
    return store.found


@contextmanager
def _kept(work: _Work, paths: Mapping[int, Path], begun: Mapping[int, Unfinished]) -> Iterator[None]:
    """Where the block fails, what was reached is kept, and how to resume is said."""
    try:
        yield
    except BaseException:
        if work.group and work.group.first:
            if work.several:
                seed, path = next(iter(paths.items()))
                again = path.with_name(path.name.removesuffix(f"-s{seed}"))
                typer.echo(f"to resume: the same command with --out {again}", err=True)
            for one in () if work.several else begun.values():
                if one.folder.is_dir():
                    again = one.folder.with_suffix("")
                    typer.echo(f"to resume: ensembler {work.spec.command} --resume {again}", err=True)
        raise
    finally:
        for one in begun.values():
            one.close()


def _given(kind: type[Method], given: Mapping[str, Any], chosen: set[str], own: Launch, group: Group) -> _Work:
    """The work that a command's options ask for."""
    from ensembler import datasets
    from ensembler.run import Run
    from ensembler.trainers import recipes
    from ensembler.trainers.starts import load_starts
    from ensembler.trainers.training import resolve

    data, values = Data.typed(given), {name: _written(value) for name, value in given.items()}
    first = load_starts(kind.typed(values), Settings.typed(values))
    start = next((found for found in first.values() if isinstance(found, Run)), None)
    if own.recipe:
        about = (values["architecture"], data.dataset or "digits")
        if start:
            about = (start.manifest.architecture, data.dataset or start.manifest.dataset.name)
        found = recipes.find(own.recipe, kind, *about)
        values |= {name: value for name, value in found.items() if name not in chosen}
    method, settings = kind.typed(values), Settings.typed(values)
    if start and data.dataset is None and data.image_size is None:
        load = partial(start.manifest.dataset.load, data.data, download=data.download)
    else:
        load = partial(
            datasets.load,
            data.dataset or "digits",
            data.data,
            download=data.download,
            image_size=data.image_size,
            in_memory=data.in_memory,
            corrupt=data.corrupt,
        )
    dataset = group.after_first(load)
    if dataset.skipped and group.first:
        typer.echo(
            f"{len(dataset.skipped)} images cannot be read and are left out: {', '.join(dataset.skipped)}", err=True
        )
    spec, method, settings = resolve(dataset, method, settings, first, collapse=own.collapse is not None)
    return _Work(spec, dataset, method, settings, first)


def _resumed(kind: type[Method], given: Mapping[str, Any], chosen: set[str], own: Launch, group: Group) -> _Work:
    """The work of an interrupted run, from its ``spec.json``."""
    from ensembler.trainers.spec import SPEC, Spec, unfinished
    from ensembler.trainers.starts import load_starts
    from ensembler.trainers.training import resolve

    path = own.resume or Path()
    folder = unfinished(path)
    if not (folder / SPEC).is_file():
        state = "it is finished" if path.exists() else f"there is no {folder}"
        raise UsageError(f"nothing to resume at {path}: {state}")
    spec = Spec.read(folder)
    if spec.command != kind.command:
        raise UsageError(f"{path} was begun by another command: ensembler {spec.command} --resume {path}")
    if wrong := sorted(chosen - _WITH_RESUME):
        flags = Data.flags() | Settings.flags() | Launch.flags() | kind.flags()
        raise UsageError(f"--resume keeps the options that the run was begun with: leave out {flags[wrong[0]]}")
    here = {name: given[name] for name in Settings.marked("computing") & chosen}
    method, settings = kind(**spec.options), Settings(**spec.settings | here)
    starts = load_starts(method, settings)
    dataset = group.after_first(partial(spec.dataset.load, given["data"]))
    spec, method, settings = resolve(dataset, method, settings, starts, collapse=spec.collapse)
    return _Work(spec, dataset, method, settings, starts)


def _check_begun(path: Path, spec: Spec, group: Group) -> None:
    """Refuse to begin what was begun already, unless torchrun runs the very command again."""
    from ensembler.trainers.distributed import launched
    from ensembler.trainers.spec import SPEC, Spec, unfinished

    def check() -> None:
        folder = unfinished(path)
        if (folder / SPEC).is_file() and not (launched() and Spec.read(folder).fingerprint == spec.fingerprint):
            raise UsageError(f"{folder} holds an interrupted run: resume it with --resume {path}, or remove it")

    group.from_first(check)


def check_free(path: Path, resumed: bool = False) -> None:
    """Before an hour of training, not after, say what stands where a run is to be, or that nothing can be written.

    Raises:
        UsageError: a run is there, or what was begun of one. ArtefactError: the folder cannot be written to.
    """
    from ensembler.artefact import check_writable
    from ensembler.trainers.spec import SPEC, unfinished

    begun = unfinished(path)
    if path.exists() and resumed and begun.is_dir():
        raise UsageError(f"{path} already exists. If it is this run, remove {begun}; otherwise move it away and resume")
    if path.exists():
        raise UsageError(f"{path} already exists: choose another --out, or remove it first")
    if (begun / SPEC).is_file() and not resumed:
        raise UsageError(f"{begun} holds an interrupted run: resume it with --resume {path}, or remove it")
    check_writable(path.parent)


def save(run: Run, path: Path) -> Path:
    """Save a run, or beside ``path`` if another process took that name meanwhile, and print what it is.

    Returns:
        Where it lies.
    """
    from rich.console import Console

    from ensembler.run import new_path
    from ensembler.trainers.summary import lines

    try:
        run.save(path)
    except UsageError:  # what was trained is not thrown away
        typer.echo(f"{path} was taken while this run was trained: it is saved beside it", err=True)
        path = run.save(new_path(path.parent, path.name))
    Console(highlight=False).print("\n".join([*lines(run.manifest), f"run: {path}"]), soft_wrap=True)
    return path


def _label(architecture: str) -> str:
    return architecture.replace(":", "-")


def _written(value: Any) -> Any:
    """A path as a manifest holds it: a link such as latest points elsewhere tomorrow."""
    if isinstance(value, list):
        return [_written(one) for one in value]
    return str(value.resolve()) if isinstance(value, Path) else value
