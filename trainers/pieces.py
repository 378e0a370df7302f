"""Independent pieces of one training: the members of a deep ensemble, the simplexes of ESPRO.

One function describes a piece. The session's engine (:mod:`ensembler.engine`) calls it here, with this very session, or
in other processes, with sessions of the same dataset, settings and beginning; the result is the same, for a piece
depends on its seeds alone. (A network that hides state from PyTorch, neither parameter nor persistent buffer, would
carry it from piece to piece here, and not there.) What each cost and told is put together in the pieces' order.

A finished piece is kept at once where the session keeps checkpoints, and is not made again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ensembler.checkpoint import Checkpoint
from ensembler.datasets import Dataset
from ensembler.run import Run
from ensembler.trainers.checkpoints import Done, numbers
from ensembler.trainers.session import Session, Settings

__all__ = ["Made", "Piece", "each"]

Made = tuple[dict[str, Tensor], dict[str, Any]]  # what a piece makes: tensors, and JSON values


@dataclass(frozen=True)
class Piece:
    """One piece: its place among all, its name, and what its function is given, in JSON values."""

    place: int
    name: str
    argument: Mapping[str, Any]


def each(session: Session, function: Callable[..., Made], pieces: Sequence[Piece]) -> list[Made]:
    """What ``function(session, **argument)`` makes of each piece, in their order, the tensors on the session's device.

    Args:
        session: the whole training's; afterwards its network holds the buffers that the last piece left.
        function: of a module, so that another process finds it.
        pieces: independent of one another.

    Raises:
        UsageError: what is kept is of another run, or the engine cannot be had.
        EngineError: the engine has lost a piece.
    """
    watch, say, group = session.watch, session.say, session.group
    checkpoints = session.checkpoints if group.first else None
    steps = session.iterations(session.settings.epochs)
    titles = [f"{piece.name}, {steps} steps" for piece in pieces]

    def kept() -> dict[int, Done]:
        all_of_them = (
            (i, checkpoints.kept(piece.place, titles[i], piece.argument) if checkpoints else None)
            for i, piece in enumerate(pieces)
        )
        return {i: done for i, done in all_of_them if done is not None}

    found = group.from_first(kept)
    missing = [i for i in range(len(pieces)) if i not in found]
    shared = function, session if session.engine.here else (session.dataset, session.settings, session.init)
    told: dict[str, Callable[..., None]] = {"watch": watch, "say": say}

    def hear(kind: str, *what: Any) -> None:
        told[kind](*what)

    with session.absorb() as books:
        try:
            with closing(session.engine.run(_make, shared, [pieces[i] for i in missing], hear)) as run:
                for place, done in run:
                    i = missing[place]
                    if checkpoints:
                        checkpoints.keep(pieces[i].place, titles[i], pieces[i].argument, done)
                    found[i] = done
        finally:
            session.watch, session.say = watch, say
        books += [found[i].books for i in range(len(pieces))]
    session.weights.load_buffers(found[len(pieces) - 1].buffers)
    return [
        ({name: tensor.to(session.device) for name, tensor in found[i].tensors.items()}, found[i].facts)
        for i in range(len(pieces))
    ]


_Beginning = Session | tuple[Dataset, Settings, Run | Checkpoint | None]


def _make(shared: tuple[Callable[..., Made], _Beginning], piece: Piece, tell: Callable[..., None]) -> Done:
    function, beginning = shared
    here = isinstance(beginning, Session)
    session = beginning if isinstance(beginning, Session) else Session(*beginning)
    session.watch, session.say = partial(tell, "watch"), partial(tell, "say")
    with session.apart(numbers(piece.place)) as books:
        tensors, facts = function(session, **piece.argument)
    if not here:
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
    return Done(tensors, facts, {name: buffer.cpu() for name, buffer in session.weights.buffers().items()}, books)
