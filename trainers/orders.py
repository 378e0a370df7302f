"""A command's runs, one for each seed, made here or elsewhere, each from one description that another process can take.

The runs of a comparison's seeds are independent pieces of work, and so is one whole run whose method has no pieces of
its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ensembler.checkpoint import Checkpoint
from ensembler.datasets import Dataset
from ensembler.engine import Engine, Local
from ensembler.errors import ArtefactError, UsageError
from ensembler.run import Run
from ensembler.trainers.checkpoints import OPTIONS, Checkpoints, unfinished
from ensembler.trainers.collapse import collapse_run
from ensembler.trainers.distributed import ALONE, Group
from ensembler.trainers.session import Session, Settings

__all__ = ["Order", "check_begun", "is_made", "make"]

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


def is_made(path: Path, seed: int, given: Mapping[str, Any], order: Order) -> bool:
    """Whether the run of that seed is at ``path`` already, whole.

    Args:
        path: where it is to be.
        seed: its own.
        given: the command's options by name; those that a manifest does not hold, or are ``None``, do not count.
        order: what it is to be made by.

    Raises:
        UsageError: another run is there.
        DataError: it was trained on other images.
        CorruptError: it is no longer whole.
    """
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


def check_begun(path: Path, command: str, options: Mapping[str, Any], ignored: Collection[str]) -> None:
    """Refuse what was begun of the run that is to be at ``path``, if it was begun with other options.

    Args:
        path: where the run is to be.
        command: its name.
        options: by name, as they are kept beside checkpoints.
        ignored: the names of options that may differ.

    Raises:
        UsageError: it was.
        ArtefactError: what it was begun with cannot be read.
    """
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
