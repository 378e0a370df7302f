"""Fast Geometric Ensembling: snapshots along a cyclic learning rate (Garipov et al. 2018, sec. 4).

Vertices: the snapshots, taken in mid-cycle where the rate is lowest. Coefficients: the identity. One trainable
vertex, one optimiser from the first step to the last: the cycles begin at ``start`` of one solution's budget and take
its momentum over.
"""

from __future__ import annotations

import torch

from ensembler.errors import UsageError
from ensembler.run import Run
from ensembler.trainers.schedules import after, cyclic, cyclic_middles
from ensembler.trainers.session import Session, stack_buffers

__all__ = ["train_fge"]


def train_fge(
    session: Session,
    members: int = 5,
    cycle: float = 2,
    high: float = 5e-2,
    low: float = 5e-4,
    start: float = 0.8,
) -> Run:
    """Train one network and collect ``members`` snapshots of it.

    Args:
        session: the dataset and settings; with ``session.init``, the cycles start from that solution.
        members: M >= 1, one a cycle.
        cycle: c, epochs a cycle (the paper takes 2 to 4).
        high: the paper's alpha_1.
        low: the paper's alpha_2.
        start: share of one solution's budget after which the cycles begin, in (0, 1].

    Returns:
        A run of method ``fge``.
    """
    if members < 1:
        raise UsageError(f"an ensemble needs at least one member, not {members}")
    if not 0 < start <= 1:
        raise UsageError(f"the start must be a share of the budget in (0, 1], not {start}")
    length = session.iterations(cycle)
    middles = cyclic_middles(length, members)
    schedule = cyclic(high, low, length)
    if not session.begins_solved:
        budget = session.iterations(session.settings.epochs)
        begin = max(1, round(start * budget))
        schedule = after(begin, session.schedule(budget), schedule)
        beginning = session.fresh()
    else:
        begin = 0
        beginning = session.solution()
    session.weights.load_buffers(beginning.buffers)
    # The last cycle ends with its snapshot: the climb after it would serve nobody.
    collect = {begin + middle for middle in middles}
    snapshots = session.train("fge", beginning.vector[None].clone(), schedule, max(collect), collect=collect)
    return session.finish(
        "fge",
        torch.cat([snapshot.vertices for snapshot in snapshots]),
        torch.eye(members),
        stack_buffers(snapshots),
        options={"members": members, "cycle": cycle, "high": high, "low": low, "start": start},
    )
