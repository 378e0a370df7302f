"""Mode-connecting curves: a path of low loss between two solutions (Garipov et al. 2018, sec. 3).

Vertices: the two ends, fixed, and the bends between them, which move. Coefficients: the curve's basis at t. The bends
start on the straight line and minimise the expected loss at ``t ~ U(0, 1)``, one t a step; weight decay acts on the
sampled weights, as in the paper's code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ensembler.errors import UsageError
from ensembler.run import Run
from ensembler.seeds import derive
from ensembler.subspace import CURVES
from ensembler.trainers.session import Session

__all__ = ["path_scores", "train_curve"]


def train_curve(
    session: Session,
    first: Run,
    second: Run,
    curve: str = "bezier",
    bends: int = 1,
    members: int = 5,
    points: int = 61,
    examples: int = 2000,
) -> Run:
    """Connect the first members of two runs.

    Args:
        session: the dataset and settings; ``settings.epochs`` are spent on the bends, at ``settings.rate``.
        first: a run, of the session's architecture and dataset.
        second: another.
        curve: ``"bezier"``, or ``"chain"`` for straight pieces.
        bends: N >= 1.
        members: M >= 2, evenly spaced from end to end.
        points: where the straight line and the curve are measured, at least 3 (the paper takes 61).
        examples: images that the measuring takes from the training and from the test images, at most.

    Returns:
        A run of method ``curve-bezier`` or ``curve-chain``. Its metrics hold, for ``"line"`` and ``"curve"``, the
        columns of :func:`path_scores`, and the highest loss and error on each.
    """
    if curve not in CURVES:
        raise UsageError(f"unknown curve {curve!r}: use one of {', '.join(CURVES)}")
    if bends < 1 or members < 2 or points < 3 or examples < 1:
        raise UsageError("a curve needs at least 1 bend, 2 members, 3 points and 1 example")
    basis = CURVES[curve]
    ends = [session.inherit(first, "end 1"), session.inherit(second, "end 2")]
    w1, w2 = ends[0].vector, ends[1].vector
    if torch.equal(w1, w2):
        raise UsageError("both ends are the same solution: train the second with another --seed")
    vertices = torch.stack([torch.lerp(w1, w2, k / (bends + 1)) for k in range(bends + 2)])
    line = vertices[[0, -1]].clone()

    rng = np.random.default_rng(derive(session.settings.seed, "points on the curve"))
    iterations = session.iterations(session.settings.epochs)
    session.weights.load_buffers(ends[0].buffers)
    session.train(
        "curve",
        vertices,
        session.schedule(iterations),
        iterations,
        rng,
        trainable=range(1, bends + 1),
        draw=lambda samples: basis(torch.from_numpy(rng.random(samples)).float(), bends + 2),
        decay_sampled=True,
    )
    t = torch.linspace(0, 1, points)
    measured = {
        "line": path_scores(session, line, CURVES["chain"](t, 2), t, examples),
        "curve": path_scores(session, vertices, basis(t, bends + 2), t, examples),
    }
    coefficients = basis(torch.linspace(0, 1, members), bends + 2)
    return session.finish(
        f"curve-{curve}",
        vertices,
        coefficients,
        session.member_buffers(vertices, coefficients),
        metrics={"path": measured},
        options={"curve": curve, "bends": bends, "members": members, "points": points, "examples": examples},
    )


def path_scores(session: Session, vertices: Tensor, coefficients: Tensor, t: Tensor, examples: int) -> dict[str, Any]:
    """What lies along a path: BatchNorm statistics are recomputed at every point.

    Returns:
        ``t``, ``train_loss``, ``test_error`` and ``ensemble_error`` (of the two-member ensemble of the path's first
        point with the one at t; Garipov et al. 2018, figure 2, right): a list each, one number a point. And
        ``highest_train_loss`` and ``highest_test_error``: the barrier.
    """
    points = session.probe(vertices, coefficients, session.dataset.test, examples)
    losses, errors, together = [], [], []
    for point in points:
        losses.append(point.train_loss)
        errors.append(point.error(point.probabilities))
        together.append(point.error((points[0].probabilities + point.probabilities) / 2))
    return {
        "t": t.tolist(),
        "train_loss": losses,
        "test_error": errors,
        "ensemble_error": together,
        "highest_train_loss": max(losses),
        "highest_test_error": max(errors),
    }
