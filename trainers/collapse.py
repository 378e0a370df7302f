"""The centroid of a run's vertices as one network: SWA of snapshots, a soup of fine-tuned vertices.

Vertices: the run's. Coefficients: one uniform row. BatchNorm statistics are recomputed for it (Izmailov et al. 2018,
sec. 3.2; Wortsman et al. 2022).
"""

from __future__ import annotations

import torch

from ensembler.run import Run
from ensembler.trainers.session import Session

__all__ = ["collapse_run"]


def collapse_run(session: Session, run: Run) -> Run:
    """Average the vertices of ``run`` into one network.

    Args:
        session: the one that made the run, or a new one on the same images with the run as its ``init``.
        run: any run.

    Returns:
        A run of one member, of method ``METHOD-centroid``; it costs what the run cost.
    """
    vertices = session.vertices_of(run)
    coefficients = torch.full((1, len(vertices)), 1 / len(vertices))
    return session.finish(
        f"{run.manifest.method}-centroid",
        vertices,
        coefficients,
        session.member_buffers(vertices, coefficients),
        options=run.manifest.options | {"collapse": "centroid"},
    )
