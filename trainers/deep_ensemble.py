"""Deep ensembles: the same network trained M times from independent beginnings (Lakshminarayanan et al. 2017).

Vertices: the M solutions. Coefficients: the identity. One member is a single network, the baseline of everything.
"""

from __future__ import annotations

import torch

from ensembler.errors import UsageError
from ensembler.run import Run
from ensembler.trainers import side_by_side
from ensembler.trainers.pieces import Made, Piece, each
from ensembler.trainers.session import Session, stack_buffers

__all__ = ["train_deep_ensemble"]


def train_deep_ensemble(session: Session, members: int = 4, parallel: int = 1) -> Run:
    """Train ``members`` solutions, each from its own weights and its own order of images.

    Args:
        session: the dataset and settings; ``settings.epochs`` are spent on each member.
        members: M >= 1.
        parallel: how many of them are trained at once, side by side: see :mod:`ensembler.trainers.side_by_side`.

    Returns:
        A run of method ``deep-ensemble``, or ``single`` where M = 1.
    """
    if members < 1:
        raise UsageError(f"an ensemble needs at least one member, not {members}")
    if parallel < 1:
        raise UsageError(f"at least one member is trained at a time, not {parallel}")
    if parallel > 1 and session.group.size > 1:
        raise UsageError("several processes train one member at a time: leave --parallel-members out")
    if session.begins_solved:
        raise UsageError("a deep ensemble's members start from independent weights, never from a run")
    groups = [list(range(first, min(first + parallel, members))) for first in range(0, members, parallel)]
    names = [f"solution {group[0] + 1}" + f" to {group[-1] + 1}" * (len(group) > 1) for group in groups]
    pieces = [
        Piece(place, name, {"members": group}) for place, (name, group) in enumerate(zip(names, groups, strict=True))
    ]
    made = [tensors for tensors, _ in each(session, _solutions, pieces)]
    whole = {name: torch.cat([tensors[name] for tensors in made]) for name in made[0]}
    return session.finish(
        "single" if members == 1 else "deep-ensemble",
        whole.pop("vertices"),
        torch.eye(members),
        {name.removeprefix("buffer."): rows.cpu() for name, rows in whole.items()},
        options={"members": members, "parallel_members": parallel},
    )


def _solutions(session: Session, members: list[int]) -> Made:
    """A piece: the vertices (G, P) of one or more members, and their buffers (G, ...)."""
    solutions = side_by_side.solutions(session, members) if len(members) > 1 else [session.solution(members[0])]
    buffers = {f"buffer.{name}": rows for name, rows in stack_buffers(solutions).items()}
    return {"vertices": torch.stack([solution.vector for solution in solutions])} | buffers, {}
