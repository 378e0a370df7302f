"""Snapshot ensembles: cosine restarts, a snapshot at each cycle's end (Huang et al. 2017, "Train 1, get M for free").

Vertices: the snapshots. Coefficients: the identity. One trainable vertex and one optimiser; the rate at iteration i of
cycles of c iterations is

    rate / 2 * (cos(pi * mod(i - 1, c) / c) + 1)
"""

from __future__ import annotations

import torch

from ensembler.errors import UsageError
from ensembler.run import Run
from ensembler.trainers.schedules import cosine, repeated
from ensembler.trainers.session import Session, stack_buffers

__all__ = ["train_snapshots"]


def train_snapshots(session: Session, members: int = 5, cycle: float | None = None) -> Run:
    """Train one network through ``members`` cosine cycles and collect it at the end of each.

    Args:
        session: the dataset and settings; with ``session.init``, the cycles start from that solution.
        members: M >= 1, one a cycle.
        cycle: epochs a cycle (the paper takes 20 to 40); by default ``settings.epochs / members``, so that the whole
            ensemble costs what one network does.

    Returns:
        A run of method ``snapshots``.
    """
    if members < 1:
        raise UsageError(f"an ensemble needs at least one member, not {members}")
    epochs = session.settings.epochs / members if cycle is None else cycle
    if not epochs > 0:
        raise UsageError(f"the cycle must be positive, not {epochs}")
    length = session.iterations(epochs)
    beginning = session.solution() if session.begins_solved else session.fresh()
    session.weights.load_buffers(beginning.buffers)
    snapshots = session.train(
        "snapshots",
        beginning.vector[None].clone(),
        repeated(cosine(session.settings.rate, length), length),
        length * members,
        collect=range(length, length * members + 1, length),
    )
    return session.finish(
        "snapshots",
        torch.cat([snapshot.vertices for snapshot in snapshots]),
        torch.eye(members),
        stack_buffers(snapshots),
        options={"members": members, "cycle": epochs},
    )
