"""A command's runs, one for each seed: where they go, what of them is there, making them here or elsewhere.

The runs of a comparison's seeds are independent pieces of work, each made from one description that another process can
take; and so is one whole run whose method has no pieces of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import typer

from ensembler.artefact import check_writable
from ensembler.checkpoint import Checkpoint
from ensembler.datasets import Dataset
from ensembler.engine import Engine, Local
from ensembler.errors import ArtefactError, DataError, DivergedError, EngineError, ShapeError, UsageError
from ensembler.run import Run, new_path
from ensembler.trainers.checkpoints import OPTIONS, Checkpoints, unfinished
from ensembler.trainers.collapse import collapse_run
from ensembler.trainers.distributed import ALONE, Group, launched
from ensembler.trainers.session import Session, Settings
from ensembler.trainers.summary import lines

__all__ = ["Order", "Orders", "check_free", "make", "save", "unnamed"]

_WHERE = {"device", "workers", "threads", "compile"}  # options of how it was computed


@dataclass(frozen=True)
class Order:
    """What is to be made, but for the seed.

    Attributes:
        method: makes a run of a session.
        dataset, settings, init: of the session.
        collapse: whether only the vertices' centroid is kept.
        several: whether it is one of several runs, so that what is told of it must name its seed.
        engine: what runs the run's own pieces.
        group: the processes that train together.
    """

    method: Callable[[Session], Run]
    dataset: Dataset
    settings: Settings
    init: Run | Checkpoint | None = None
    collapse: bool = False
    several: bool = False
    engine: Engine = field(default_factory=Local)
    group: Group = ALONE


def make(order: Order, argument: tuple[int, Checkpoints | None], tell: Callable[..., None]) -> Run:
    """Make the run of one seed; a piece of work of :mod:`ensembler.engine`.

    Args:
        order: what to make.
        argument: the seed, and where to keep checkpoints, if this process is to.
        tell: told ``"watch"`` or ``"say"``, and what the session tells of either.
    """
    seed, checkpoints = argument
    which = f"seed {seed}, " if order.several else ""
    session = Session(
        order.dataset,
        replace(order.settings, seed=seed),
        order.init,
        lambda part, epoch, epochs: tell("watch", which + part, epoch, epochs),
        lambda line: tell("say", which + line),
        checkpoints,
        order.engine,
        order.group,
    )
    run = order.method(session)
    return collapse_run(session, run) if order.collapse else run


@dataclass(frozen=True)
class Orders:
    """The runs that one command makes.

    Attributes:
        command: its name.
        options: what it was given, by name, in JSON values; kept beside checkpoints.
        paths: where each run is to be, by its seed.
        group: the processes that train together.
    """

    command: str
    options: Mapping[str, Any]
    paths: Mapping[int, Path]
    group: Group = ALONE

    @classmethod
    def of_seeds(
        cls, command: str, options: Mapping[str, Any], path: Path, first: int, seeds: int, group: Group = ALONE
    ) -> Orders:
        """One run at ``path``; or several beside it, ``PATH-sSEED``, of as many seeds from the ``first`` on."""
        one = {first: path}
        several = {seed: path.with_name(f"{path.name}-s{seed}") for seed in range(first, first + seeds)}
        return cls(command, options, one if seeds == 1 else several, group)

    @property
    def several(self) -> bool:
        """Whether it is more than one run."""
        return len(self.paths) > 1

    def check_free(self, resumed: bool) -> None:
        """Before an hour of training, not after, say what stands where a run is to be, or that nothing can be written.

        Raises:
            UsageError: a run is there; or what was begun of one, and it is not to be ``resumed``.
            ArtefactError: the folder cannot be written to.
        """
        again = resumed or self._broken_off()
        for path in self.paths.values():
            self.group.from_first(partial(check_free, path, again, several=self.several))

    def missing(self, order: Order, given: Mapping[str, Any], ignored: Collection[str]) -> dict[int, Path]:
        """Those that are still to be made, or to be gone on with: of several, some may be there already.

        Args:
            order: what they are to be made by.
            given: the command's options by name, as a manifest holds them.
            ignored: names of options that may differ from those with which a run was begun.

        Raises:
            UsageError: another run is there, or one was begun with other options.
            DataError, CorruptError: the run that is there is of other images, or no longer whole.
        """
        if not self.several:
            return dict(self.paths)
        found = {}
        for seed, path in self.paths.items():
            _check_begun(path, self.command, {**self.options, "seed": seed}, ignored)
            if _is_made(path, seed, given, order):
                typer.echo(f"{path} is there already", err=True)
            else:
                found[seed] = path
        return found

    def make(
        self,
        order: Order,
        paths: Mapping[int, Path],
        engine: Engine,
        hear: Callable[..., None],
        every: float,
        about: Mapping[str, Any],
    ) -> dict[int, Path]:
        """Make runs by the engine, and save each as soon as it is finished; then its checkpoints go.

        Args:
            order: what to make.
            paths: where each run is to be, by its seed.
            engine: what makes them.
            hear: told what the sessions tell, as :func:`make` does.
            every: seconds between two checkpoints of a part.
            about: options that only the command knows; written into each manifest.

        Returns:
            where each lies, by its seed.
        """
        begun = {
            seed: Checkpoints(
                unfinished(path), every, {self.command: {**self.options, "seed": seed}}, ours=self.group.first
            )
            for seed, path in paths.items()
        }
        asked = [(seed, checkpoints if engine.here else None) for seed, checkpoints in begun.items()]
        saved: dict[int, Path] = {}
        try:
            with closing(engine.run(make, order, asked, hear)) as made:
                for place, run in made:
                    seed, _ = asked[place]
                    run.manifest.options |= about
                    saved[seed] = self.group.from_first(partial(save, run, paths[seed]))
                    begun.pop(seed).remove()
        except (KeyboardInterrupt, EngineError, ArtefactError):  # the last: a full disk
            if self.group.first:
                self._say_how_to_go_on(begun)
            raise
        except (UsageError, DataError, ShapeError, DivergedError):
            for checkpoints in begun.values():
                checkpoints.remove()  # to go on would end the same way
            raise
        finally:
            for checkpoints in begun.values():
                checkpoints.close()
        return saved

    def _say_how_to_go_on(self, begun: Mapping[int, Checkpoints]) -> None:
        if self.several:
            seed, path = next(iter(self.paths.items()))
            path = path.with_name(path.name.removesuffix(f"-s{seed}"))
            typer.echo(f"to go on: the same command with --out {path}", err=True)
            return
        for checkpoints in begun.values():
            if checkpoints.folder.is_dir():
                again = checkpoints.folder.with_suffix("")
                typer.echo(f"to go on: ensembler {self.command} --resume {again}", err=True)

    def _broken_off(self) -> bool:
        """Whether torchrun runs the very command again that was broken off, by a restart of its own or by the user."""
        if not launched() or self.several:
            return False
        (path,) = self.paths.values()
        file = unfinished(path) / OPTIONS
        if not file.is_file():
            return False
        begun: object = json.loads(file.read_text("utf-8"))
        return begun == json.loads(json.dumps({self.command: dict(self.options)}))


def check_free(path: Path, resumed: bool = False, several: bool = False) -> None:
    """What :meth:`Orders.check_free` says of one run; of ``several``, some may be there, or begun, already."""
    begun = unfinished(path)
    if path.exists() and resumed:
        raise UsageError(f"{path} exists already: remove {begun} if that is it, finished; else move it away to go on")
    if path.exists() and not several:
        raise UsageError(f"{path} exists already: choose another --out, or remove it first")
    if (begun / OPTIONS).is_file() and not (resumed or several):
        Checkpoints(begun).close()  # says so where another process is working on it
        raise UsageError(f"{begun} holds a run that was broken off: go on with --resume {path}, or remove it")
    check_writable(path.parent)


def unnamed(label: str) -> Path:
    """Where a run goes that the user has not named.

    Raises:
        UsageError: several processes train it, which would each find another name.
    """
    if launched():
        raise UsageError("under torchrun, name the run with --out: every process and every restart must mean the same")
    return new_path(Path("runs"), label)


def save(run: Run, path: Path) -> Path:
    """Save a run, or beside ``path`` if another process took that name meanwhile, and say what it is; where it lies."""
    from rich.console import Console

    try:
        run.save(path)
    except UsageError:  # what was trained is not thrown away
        typer.echo(f"{path} was taken while this run was trained: it is saved beside it", err=True)
        path = run.save(new_path(path.parent, path.name))
    Console(highlight=False).print("\n".join([*lines(run.manifest), f"run: {path}"]), soft_wrap=True)
    return path


def _is_made(path: Path, seed: int, given: Mapping[str, Any], order: Order) -> bool:
    """Whether the run of that seed is there already, whole; of ``given``, what is ``None`` does not count."""
    if not path.exists():
        return False
    manifest = Run.load(path).manifest
    manifest.dataset.check(order.dataset)
    clip = manifest.options.get("clip") or 0.0  # none is 0, as typed
    held = manifest.options | {"seed": manifest.seed, "clip": clip}
    wanted = dict(given) | {"seed": seed}
    if isinstance(order.init, Run):
        wanted["architecture"] = order.init.manifest.architecture
    for name in wanted.keys() & held.keys() - _WHERE:
        if wanted[name] is not None and not _same(wanted[name], held[name]):
            raise UsageError(
                f"{path} is there already, made with {name.replace('_', '-')} {held[name]}, not {wanted[name]}: choose "
                "another --out, or remove it first"
            )
    return True


def _check_begun(path: Path, command: str, options: Mapping[str, Any], ignored: Collection[str]) -> None:
    """Refuse what was begun of the run that is to be at ``path``, if it was begun with other options."""
    folder = unfinished(path)
    if not folder.is_dir():
        return
    try:
        begun = json.loads((folder / OPTIONS).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{folder} does not say what it was begun with: remove it") from error
    of_both = [{k: v for k, v in each.items() if k not in ignored} for each in (begun.get(command, {}), options)]
    if of_both[0] != json.loads(json.dumps(of_both[1])):
        raise UsageError(f"{folder} holds a run that was begun with other options: go on with those, or remove it")


def _same(value: Any, held: Any) -> bool:
    try:
        return float(value) == float(held)
    except (TypeError, ValueError):
        return str(value) == str(held)
