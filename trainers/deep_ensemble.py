"""Deep ensembles: the same network trained M times from independent beginnings (Lakshminarayanan et al. 2017).

Vertices: the M solutions. Coefficients: the identity. One member is a single network, the baseline of everything.
"""

from __future__ import annotations

import torch

from ensembler.errors import UsageError
from ensembler.run import Run
from ensembler.trainers.session import Session, stack_buffers

__all__ = ["train_deep_ensemble"]


def train_deep_ensemble(session: Session, members: int = 4) -> Run:
    """Train ``members`` solutions, each from its own weights and its own order of images.

    Args:
        session: the dataset and settings; ``settings.epochs`` are spent on each member.
        members: M >= 1.

    Returns:
        A run of method ``deep-ensemble``, or ``single`` where M = 1.
    """
    if members < 1:
        raise UsageError(f"an ensemble needs at least one member, not {members}")
    if session.begins_solved:
        raise UsageError("a deep ensemble's members start from independent weights, never from a run")
    solutions = [session.solution(member) for member in range(members)]
    return session.finish(
        "single" if members == 1 else "deep-ensemble",
        torch.stack([solution.vector for solution in solutions]),
        torch.eye(members),
        stack_buffers(solutions),
        options={"members": members},
    )
