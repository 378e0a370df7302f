"""SPRO and ESPRO: simplexes of solutions, grown one vertex at a time (Benton et al. 2021, sec. 4 and 5).

Vertices: a trained solution and K - 1 more, once for each simplex. Coefficients: points drawn uniformly, Dirichlet(1),
in training; the vertices and points drawn with a concentration of the user's choice for the members, each of which
lies in one simplex. A new vertex starts at the centroid of the present ones and is the only one that moves. It
minimises

    mean over sampled points of loss(c @ V)  -  lambda * log size(V)

where the size is the simplex's volume, as in the paper, or the distance of its points in function space: the root mean
square Hellinger distance between the predictions at two of them for the same images. What each brought, and at what
cost in likelihood, is in docs/methods.md.

The published code sums over the samples where the paper takes the mean, and regularises with the squared volume and a
lambda that is practically zero; here both are the paper's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ensembler.ensemble import sample_coefficients
from ensembler.errors import DivergedError, UsageError
from ensembler.run import Run, Sampling
from ensembler.seeds import derive, generator
from ensembler.subspace import AffineHull, dirichlet, edge_lengths, log_volume
from ensembler.trainers.loop import Penalty, Regulariser
from ensembler.trainers.pieces import Made, Piece, each
from ensembler.trainers.schedules import cosine
from ensembler.trainers.session import Probe, Session
from ensembler.uncertainty import disagreement

__all__ = ["LADDER", "apart", "describe", "nudged", "towards_volume", "train_simplex"]

LADDER = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)  # the lambdas that "auto" chooses from

_NUDGE = 1e-3  # a new vertex's first step off the hull of the others, as a share of the centroid's norm
_SOFTENING = 1e-2  # eps of the volume's gradient, likewise
_LEAST_DISTANCE = 1e-4  # keeps the logarithm of a squared Hellinger distance finite
_INSIDE = 4  # interior points at which a simplex is measured
_EXAMPLES = 1000  # images that this takes, at most


def train_simplex(
    session: Session,
    vertices: int = 4,
    members: int = 10,
    vertex_epochs: float | None = None,
    vertex_rate: float = 0.1,
    regularisation: float | Literal["auto"] = 1e-2,
    regulariser: str = "volume",
    tolerance: float = 0.02,
    concentration: float = 1.0,
    corners: bool = True,
    samples_per_step: int = 1,
    simplexes: int = 1,
) -> Run:
    """Grow simplexes, each around a solution of its own, and draw an ensemble from them.

    Args:
        session: the dataset and settings; with ``session.init``, that solution is the first vertex.
        vertices: K >= 2, of each simplex.
        members: M, drawn once for the run and shared out among the simplexes, at least one for each.
        vertex_epochs: spent on each added vertex; by default a quarter of the solution's.
        vertex_rate: highest learning rate of an added vertex; a cosine takes it to 0.
        regularisation: lambda >= 0; or ``"auto"``, the largest of :data:`LADDER` with which the simplex stays within
            the tolerance. It is found by bisection on the first added vertex, and every trial is booked as its cost.
        regulariser: ``"volume"`` or ``"function"``; the second costs one more forward pass a step.
        tolerance: of ``"auto"``: by what share the held-out NLL may exceed that of the solution, on average over the
            vertices, and on average over points inside.
        concentration: of the Dirichlet that the members are drawn from; below 1 leans to the vertices.
        corners: whether the first members are the vertices themselves; on held-out data, vertices and points inside
            together were never far from the better of the two alone.
        samples_per_step: points a step, at least 1; the batch is split among them.
        simplexes: S >= 1; one is SPRO, several are ESPRO.

    Returns:
        A run of method ``simplex``, or ``simplexes`` where S > 1, from which further members can be drawn. Simplex s
        has the vertices s K to (s + 1) K - 1. ``metrics["simplexes"]`` holds what :func:`describe` finds of each.
    """
    epochs = session.settings.epochs / 4 if vertex_epochs is None else vertex_epochs
    _check(vertices, members, epochs, vertex_rate, regularisation, regulariser, tolerance, samples_per_step, simplexes)
    if simplexes > 1 and session.begins_solved:
        raise UsageError("several simplexes start from independent solutions, never from one run")
    rows = torch.arange(simplexes * vertices).view(simplexes, vertices).tolist()
    sampling = Sampling(simplexes=rows, concentration=concentration, corners=corners)
    coefficients = sample_coefficients(sampling, simplexes * vertices, members, session.settings.seed)
    names = ["simplex"] if simplexes == 1 else [f"simplex {number + 1}" for number in range(simplexes)]

    def grow(numbers: range, strength: float | Literal["auto"]) -> list[Made]:
        common = {
            **{"vertices": vertices, "strength": strength, "tolerance": tolerance, "epochs": epochs},
            **{"rate": vertex_rate, "regulariser": regulariser, "samples": samples_per_step},
        }
        given = [{"number": n, "name": names[n], "alone": simplexes == 1} | common for n in numbers]
        return each(session, _simplex, [Piece(n, names[n], one) for n, one in zip(numbers, given, strict=True)])

    # "auto" finds the first simplex's lambda, and the others take it.
    alone = 1 if regularisation == "auto" else simplexes
    made = grow(range(alone), regularisation)
    strength, trials = made[0][1]["strength"], made[0][1]["trials"]
    if alone < simplexes:
        made += grow(range(alone, simplexes), strength)
    stages = [facts["stages"] for _, facts in made]
    everything = torch.cat([tensors["simplex"] for tensors, _ in made])
    return session.finish(
        "simplex" if simplexes == 1 else "simplexes",
        everything,
        coefficients,
        session.member_buffers(everything, coefficients),
        sampling=sampling,
        metrics={"simplexes": [found[-1] for found in stages], "growth": list(chain(*stages))}
        | ({"lambda": strength, "trials": trials} if trials else {}),
        options={
            "vertices": vertices,
            "members": members,
            "vertex_epochs": epochs,
            "vertex_rate": vertex_rate,
            "regularisation": regularisation,
            "regulariser": regulariser,
            "tolerance": tolerance,
            "concentration": concentration,
            "corners": corners,
            "samples_per_step": samples_per_step,
            "simplexes": simplexes,
        },
    )


def _simplex(
    session: Session,
    number: int,
    name: str,
    alone: bool,
    vertices: int,
    strength: float | Literal["auto"],
    tolerance: float,
    epochs: float,
    rate: float,
    regulariser: str,
    samples: int,
) -> Made:
    """A piece: one simplex (K, P); what was found at each stage of it, its lambda, and the trials of "auto"."""
    growth = _Growth(session, epochs, rate, regulariser, samples)
    simplex = session.solution(number).vector[None].clone()
    trials: list[dict[str, float | None]] = []
    stages = []
    for k in range(1, vertices):
        part = f"vertex {k + 1}" if alone else f"{name}, vertex {k + 1}"
        if strength == "auto":
            strength, simplex, trials = growth.within(tolerance, simplex, part)
        else:
            simplex = growth.one_more(simplex, strength, part)
        stages.append(describe(session, simplex, f"{name} of {k + 1} vertices"))
    return {"simplex": simplex}, {"stages": stages, "strength": strength, "trials": trials}


@dataclass(frozen=True)
class _Growth:
    """How a vertex is added to a simplex (K, P)."""

    session: Session
    epochs: float
    rate: float
    regulariser: str
    samples: int

    def one_more(self, simplex: Tensor, strength: float, part: str) -> Tensor:
        """The simplex (K + 1, P) with one vertex more; a function of ``part`` but for the strength."""
        session, iterations = self.session, self.session.iterations(self.epochs)
        beginning = nudged(simplex.mean(dim=0), session.settings.seed, part)
        larger = torch.cat([simplex, beginning[None]])
        rng = np.random.default_rng(derive(session.settings.seed, "points", part))
        options: dict[str, Any] = {}
        if strength and self.regulariser == "volume":
            options["regulariser"] = towards_volume(larger[:-1], larger[-1], strength, session.weights.vector)
        elif strength:
            options["penalty"] = apart(strength)
        session.train(
            part,
            larger,
            cosine(self.rate, iterations),
            iterations,
            rng,
            trainable=[len(simplex)],
            draw=lambda samples: dirichlet(samples, len(larger), rng),
            samples=self.samples,
            **options,
        )
        return larger

    def within(
        self, tolerance: float, simplex: Tensor, part: str
    ) -> tuple[float, Tensor, list[dict[str, float | None]]]:
        """Bisect the ladder: the largest lambda that fits, the simplex that it gives, and all trials."""
        (solution,) = _probes(self.session, simplex, torch.eye(1, len(simplex)))
        limit = (1 + tolerance) * solution.nll
        K = len(simplex) + 1
        points = torch.cat([torch.eye(K), _inside(K)])
        best, trials = None, list[dict[str, float | None]]()
        low, high = 0, len(LADDER)  # all below low fit, all from high on do not
        while low < high:
            middle = (low + high) // 2
            strength = LADDER[middle]
            try:
                larger = self.one_more(simplex, strength, part)
                losses = [probe.nll for probe in _probes(self.session, larger, points)]
                found = max(float(np.mean(losses[:K])), float(np.mean(losses[K:])))
            except DivergedError:
                found = math.inf
            fits = found <= limit
            held_out = found if math.isfinite(found) else None  # JSON has no infinity
            trials.append({"lambda": strength, "held_out_nll": held_out, "limit": limit})
            verdict = "fits" if fits else "is too much"
            self.session.say(f"lambda {strength:g}: held-out NLL {found:.4f}, at most {limit:.4f}: it {verdict}")
            if fits:
                best, low = (strength, larger), middle + 1
            else:
                high = middle
        if best is None:
            self.session.say("no lambda of the ladder fits: the simplex is not regularised")
            best = 0.0, self.one_more(simplex, 0.0, part)
        return *best, trials


def nudged(centroid: Tensor, seed: int, part: str) -> Tensor:
    """The centroid (P,), nudged off the hull of the vertices: on it the volume is zero and its gradient undefined."""
    noise = torch.randn(centroid.shape, generator=generator(seed, "nudge", part)).to(centroid.device)
    return centroid + noise * (_NUDGE * centroid.norm() / noise.norm())


def towards_volume(others: Tensor, vertex: Tensor, strength: float, scratch: Tensor) -> Regulariser:
    """Adds the gradient of ``-strength * log volume`` in the moving vertex: ``-strength * r / (h^2 + eps^2)``.

    Args:
        others: (K, P) the simplex's other vertices, fixed.
        vertex: (P,) the one that moves.
        strength: lambda.
        scratch: (P,) overwritten: the network's own weight vector is free between two steps.
    """
    hull = AffineHull(others)
    softening = _SOFTENING * others.mean(dim=0).norm()

    def add(gradients: Tensor) -> None:
        residual = hull.residual(vertex, out=scratch)
        gradients[0].addcmul_(residual, strength / (residual.dot(residual) + softening**2), value=-1)

    return add


def apart(strength: float) -> Penalty:
    """``-strength * log d`` of the root mean square Hellinger distance d between two points' predictions.

    ``d^2`` is the mean over the images of ``sum_c (sqrt p_c - sqrt q_c)^2``, in [0, 2].
    """

    def penalty(logits: Tensor, others: Tensor) -> Tensor:
        roots, other_roots = (torch.softmax(each.float(), dim=1).sqrt() for each in (logits, others))
        squared = (roots - other_roots).square().sum(dim=1).mean()
        return -strength / 2 * (squared + _LEAST_DISTANCE).log()

    return penalty


def describe(session: Session, simplex: Tensor, name: str) -> dict[str, Any]:
    """Measure a simplex (K, P), and say it in one line.

    Returns:
        ``name``, ``log_volume``, ``edge_lengths``; the mean ``train_loss`` and ``held_out_nll`` of the ``vertices``,
        the ``centroid`` and the points ``inside``, in nats; the mean pairwise ``disagreement`` among the vertices and
        among the points inside, a share of the held-out images.
    """
    K = len(simplex)
    centroid = torch.full((1, K), 1 / K)
    probes = _probes(session, simplex, torch.cat([torch.eye(K), centroid, _inside(K)]))
    groups = {"vertices": probes[:K], "centroid": probes[K : K + 1], "inside": probes[K + 1 :]}
    result: dict[str, Any] = {
        "name": name,
        "log_volume": log_volume(simplex).item(),
        "edge_lengths": edge_lengths(simplex).tolist(),
        "train_loss": {group: float(np.mean([probe.train_loss for probe in found])) for group, found in groups.items()},
        "held_out_nll": {group: float(np.mean([probe.nll for probe in found])) for group, found in groups.items()},
        "disagreement": {group: _disagreement(groups[group]) for group in ("vertices", "inside")},
    }
    lengths, loss, held_out, differ = (
        result[key] for key in ("edge_lengths", "train_loss", "held_out_nll", "disagreement")
    )
    session.say(
        f"{name}: log volume {result['log_volume']:.2f}, edges {min(lengths):.2f} to {max(lengths):.2f} long; "
        + "; ".join(
            f"{group} loss {loss[group]:.4f}, held-out NLL {held_out[group]:.4f}"
            + (f", disagreement {differ[group]:.4f}" if group in differ else "")
            for group in groups
        )
    )
    return result


def _inside(vertices: int) -> Tensor:
    return dirichlet(_INSIDE, vertices, np.random.default_rng(0))


def _probes(session: Session, simplex: Tensor, coefficients: Tensor) -> list[Probe]:
    return session.probe(simplex, coefficients, session.dataset.validation, _EXAMPLES)


def _disagreement(probes: list[Probe]) -> float:
    found = disagreement(torch.stack([probe.probabilities for probe in probes]).numpy())
    return 0.0 if found is None else float(found.mean())


def _check(
    vertices: int,
    members: int,
    epochs: float,
    rate: float,
    regularisation: float | str,
    regulariser: str,
    tolerance: float,
    samples: int,
    simplexes: int,
) -> None:
    if vertices < 2:
        raise UsageError(f"a simplex needs at least 2 vertices, not {vertices}")
    for name, value in (
        ("vertex_epochs", epochs),
        ("vertex_rate", rate),
        ("tolerance", tolerance),
        ("samples_per_step", samples),
        ("simplexes", simplexes),
    ):
        if not 0 < value < math.inf:
            raise UsageError(f"{name} must be positive, not {value}")
    if regularisation != "auto" and not (isinstance(regularisation, int | float) and 0 <= regularisation < math.inf):
        raise UsageError(f"the regularisation must be 'auto' or not negative, as {regularisation} is")
    if regulariser not in ("volume", "function"):
        raise UsageError(f"unknown regulariser {regulariser!r}: use volume or function")
    if members < simplexes:
        raise UsageError(f"{members} members are too few for {simplexes} simplexes: each needs at least one member")
