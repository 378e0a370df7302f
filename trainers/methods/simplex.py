"""SPRO and ESPRO: simplexes of solutions, grown one vertex at a time (Benton et al. 2021, sec. 4 and 5).

Vertices: a trained solution and K - 1 more, once for each simplex. Coefficients: points drawn uniformly, Dirichlet(1),
in training; for the members, the vertices and points drawn with a concentration of the user's choice, each in one
simplex. A new vertex starts at the centroid of the present ones and is the only one that moves. It minimises

    mean over sampled points of loss(c @ V)  -  lambda * log size(V)

where the size is the simplex's volume, as in the paper, or the distance of its points in function space: the root mean
square Hellinger distance between the predictions at two of them for the same images. What each brought, and at what
cost in likelihood, is in docs/methods.md.

The published code sums over the samples where the paper takes the mean, and regularises with the squared volume and a
lambda that is practically zero; here both are the paper's.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Literal, Self

from pydantic import NonNegativeFloat

from ensembler.errors import DivergedError, UsageError
from ensembler.options import option
from ensembler.trainers.method import Members, Method
from ensembler.trainers.recipes import SGD, Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ensembler.trainers.budget import Budget, Piece
    from ensembler.trainers.measure import Solved
    from ensembler.trainers.plan import Fitted
    from ensembler.trainers.settings import Settings
    from ensembler.trainers.trainer import Trainer
    from ensembler.trainers.work import JobOutput

__all__ = ["BASE", "BENTON_2021", "LADDER", "Simplex"]

# g-benton/loss-surface-simplexes, experiments/vgg-cifar10 and vgg-cifar100. Its loss is summed over the 5 samples, not
# averaged: its rate for a vertex, 0.01, acts as 0.05 does here, and its weight decay as a fifth, which cannot be had
# here for the vertices alone. Its 5 samples see the whole batch each, here they share it: a step costs a fifth. Its
# lambda comes to about 1e-7. Members: 2-simplexes and 25 points, as in the paper's figures.
BENTON_2021 = "Benton et al. 2021, arXiv 2102.13042"
BASE = SGD | {"weight_decay": 5e-4, "schedule": "cosine"}
_SPRO = BASE | {"epochs": 300, "lr": 0.05, "vertices": 3, "vertex_lr": 0.05, "samples_per_step": 5}
_SPRO |= {"regularisation": 1e-7, "regulariser": "volume", "members": 25, "corners": False, "concentration": 1.0}

LADDER = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)  # the lambdas that "auto" chooses from


class Simplex(Method):
    """Grow a simplex of solutions vertex by vertex (SPRO, Benton et al. 2021), or several (ESPRO)."""

    command = "train-simplex"
    has_jobs = True
    stops_early = True
    fast = {"epochs": 10, "vertices": 3, "vertex_epochs": 3}  # in 2, a vertex was worse than the solution
    compared = ({}, {"simplexes": 2})
    by_budget = frozenset({"simplexes"})
    published = (
        Recipe("vgg16", _SPRO | {"vertex_epochs": 10}, BENTON_2021, ("cifar10",)),
        Recipe("vgg16", _SPRO | {"vertex_epochs": 20}, BENTON_2021, ("cifar100",)),
    )

    vertices: int = option(4, ge=2, help="K, corners of the simplex.")
    members: int | None = option(
        None, ge=1, help="M: the vertices first, then points drawn inside. (default: the vertices)"
    )
    vertex_epochs: float | None = option(
        None, gt=0, help="Epochs for each added vertex. (default: a quarter of --epochs)"
    )
    vertex_lr: float | None = option(
        None, gt=0, help="Highest learning rate of an added vertex; a cosine takes it to 0. (default: --lr)"
    )
    regularisation: NonNegativeFloat | Literal["auto"] = option(
        0.01,
        metavar="NUMBER | auto",
        help="lambda, the reward of log size; auto: the largest that --tolerance allows.",
    )
    regulariser: Literal["volume", "function"] = option(
        "volume", help="What size is: volume in parameter space, or distance between predictions."
    )
    tolerance: float = option(
        0.02,
        gt=0,
        help="With auto, the share by which vertices and points inside may exceed the solution's held-out NLL.",
    )
    concentration: float = option(
        1.0, gt=0, help="Dirichlet's alpha of the drawn members; below 1 leans to the vertices."
    )
    corners: bool = option(
        True, flag="--corners/--no-corners", help="Whether the first members are the vertices themselves."
    )
    samples_per_step: int = option(
        1, ge=1, help="Points per step; the batch is split among them, at least two images each."
    )
    simplexes: int = option(1, ge=1, help="S, each around a solution of its own; several are ESPRO.")

    @property
    def name(self) -> str:
        """``simplexes`` where there are several."""
        return "simplex" if self.simplexes == 1 else "simplexes"

    def resolved(self, settings: Settings) -> Self:
        """By default the members are the vertices, and an added vertex takes a quarter of a solution's epochs."""
        members = self.members or self.simplexes * self.vertices
        if members < self.simplexes:
            raise UsageError(f"{members} members are too few for {self.simplexes} simplexes: each needs one")
        epochs = self.vertex_epochs or settings.epochs / 4
        settings.check_warmup(epochs, f"a vertex's {epochs:g} epochs")
        chosen = {"members": members, "vertex_epochs": epochs, "vertex_lr": self.vertex_lr or settings.lr}
        return self.model_copy(update=chosen)

    def at_budget(self, budget: Budget) -> list[Piece] | str:
        """One network of B, and the rest for its vertices, --vertex-epochs each at least; of ESPRO, all that fit."""
        from ensembler.trainers.budget import Piece

        if self.regularisation == "auto":
            raise UsageError("--regularisation auto takes an unknown number of passes: give a study its lambda")
        added, count = self.vertices - 1, 1
        if self.simplexes > 1:
            least = budget.one + added * (self.vertex_epochs or budget.epochs / 4) * sum(budget.sizes)
            count = int(budget.total / least + 1e-9)
            if count < 2:
                return f"two simplexes of {self.vertices} vertices take {2 * least / budget.one:.2g} budgets"
        steps = budget.steps((budget.total - count * budget.one) // (count * added))
        if steps < 1:
            return "one network leaves nothing for a vertex"
        if self.vertex_epochs and steps < int(self.vertex_epochs * len(budget.sizes)):
            return f"what a network leaves is less than {self.vertex_epochs:g} epochs for each vertex"
        members = max(1, self.members // count) if self.members else self.vertices
        own = {"members": members, "simplexes": 1, "vertex_epochs": budget.in_epochs(steps)}
        options = self.model_copy(update=own)
        return [
            Piece(options, added * budget.passes(steps), budget.epochs, member, {"init": budget.network(member)})
            for member in range(count)
        ]

    def train(self, trainer: Trainer) -> Members:
        """Grow the simplexes, each around a solution of its own, and draw the members from them.

        ``metrics["simplexes"]`` holds what :func:`ensembler.trainers.measure.describe` finds of each.
        """
        import torch

        from ensembler.run import Sampling
        from ensembler.sampling import sample_coefficients
        from ensembler.trainers.measure import member_buffers
        from ensembler.trainers.work import each

        S, K = self.simplexes, self.vertices
        if S > 1 and trainer.starts_solved:
            raise UsageError("several simplexes start from independent solutions: leave out --init")
        names = ["simplex"] if S == 1 else [f"simplex {number + 1}" for number in range(S)]

        def grow_all(numbers: range, strength: float | str) -> list[JobOutput]:
            jobs = {names[n]: {"number": n, "name": names[n], "strength": strength} for n in numbers}
            return each(trainer, partial(grow, options=self), jobs)

        # "auto" finds the first simplex's lambda, and the others take it.
        first = 1 if self.regularisation == "auto" else S
        made = grow_all(range(first), self.regularisation)
        strength, trials = made[0][1]["strength"], made[0][1]["trials"]
        made += grow_all(range(first, S), strength) if first < S else []

        tensors, stages = [tensors for tensors, _ in made], [facts["stages"] for _, facts in made]
        metrics = {"simplexes": [found[-1] for found in stages], "growth": list(chain(*stages))}
        vertices = torch.cat([own["simplex"] for own in tensors])
        rows = torch.arange(S * K).view(S, K).tolist()
        sampling = Sampling(simplexes=rows, concentration=self.concentration, corners=self.corners)
        coefficients = sample_coefficients(sampling, S * K, self.members or S * K, trainer.settings.seed)
        # Each member has the buffers of its own simplex.
        places = coefficients.view(-1, S, K).sum(dim=2).argmax(dim=1).tolist()
        solved = {n * K: own["solution"] for n, own in enumerate(tensors)}
        buffers = member_buffers(trainer, vertices, coefficients, [tensors[n]["last"] for n in places], solved)
        metrics |= {"lambda": strength, "trials": trials} if trials else {}
        return Members(vertices, coefficients, buffers, sampling, metrics)


def grow(trainer: Trainer, options: Simplex, number: int, name: str, strength: float | Literal["auto"]) -> JobOutput:
    """A job: one ``simplex`` (K, P), the buffers of its ``solution`` and those at the end of its ``last`` training.

    Also what was found at each stage, and lambda.
    """
    from ensembler.trainers.measure import describe
    from ensembler.trainers.starts import solution

    base = solution(trainer, number)
    simplex, buffers, solved = base.vector[None].clone(), base.buffers, {0: base.buffers}
    trials: list[dict[str, float | None]] = []
    stages = []
    for k in range(1, options.vertices):
        part = f"vertex {k + 1}" if options.simplexes == 1 else f"{name}, vertex {k + 1}"
        if strength == "auto":
            strength, fitted, trials = largest_that_fits(trainer, options, simplex, buffers, part, solved)
        else:
            fitted = add_vertex(trainer, options, simplex, buffers, part, strength)
        simplex, buffers = fitted.vertices, fitted.buffers
        stages.append(describe(trainer, simplex, buffers, f"{name} of {k + 1} vertices", solved))
    tensors = {"simplex": simplex, "solution": base.buffers, "last": buffers}
    return tensors, {"stages": stages, "strength": strength, "trials": trials}


def add_vertex(
    trainer: Trainer,
    options: Simplex,
    simplex: Tensor,
    buffers: Mapping[str, Tensor],
    part: str,
    strength: float,
    attempt: str = "",
) -> Fitted:
    """Train one vertex more: the simplex (K + 1, P). But for the strength, a function of the seed and ``part``."""
    import torch

    from ensembler.subspace import dirichlet
    from ensembler.trainers.plan import Plan
    from ensembler.trainers.regularisers import hellinger_repulsion, perturbed, volume_regulariser
    from ensembler.trainers.schedules import cosine

    K, iterations = len(simplex) + 1, trainer.steps(options.vertex_epochs or trainer.settings.epochs / 4)
    larger = torch.cat([simplex, perturbed(simplex.mean(dim=0), trainer.settings.seed, part)[None]])
    volume = strength > 0 and options.regulariser == "volume"
    function = strength > 0 and options.regulariser == "function"
    plan = Plan(
        trainer.warmed(cosine(options.vertex_lr or trainer.lr, iterations)),
        iterations,
        trainable=[K - 1],
        draw=lambda rng, count: dirichlet(count, K, rng),
        samples=options.samples_per_step,
        regulariser=volume_regulariser(larger[:-1], larger[-1], strength, trainer.weights.vector) if volume else None,
        penalty=hellinger_repulsion(trainer.task, strength) if function else None,
    )
    return trainer.fit(part, larger, buffers, plan, attempt)


def largest_that_fits(
    trainer: Trainer, options: Simplex, simplex: Tensor, buffers: Mapping[str, Tensor], part: str, solved: Solved
) -> tuple[float, Fitted, list[dict[str, float | None]]]:
    """Bisect :data:`LADDER` for the largest lambda with which the simplex (K + 1, P) stays within the tolerance.

    It does where neither the mean held-out NLL of the vertices nor that of points inside exceeds the solution's by more
    than the tolerance's share. All trials see the same batches and points, and count as the vertex's cost.

    Returns:
        That lambda, or 0 where none fits; what training with it gave; and all trials.
    """
    import torch

    from ensembler.trainers.measure import inside, points

    held_out, K = trainer.dataset.validation, len(simplex) + 1
    (solution,) = points(trainer, simplex, torch.eye(1, K - 1), buffers, held_out, solved=solved)
    limit = (1 + options.tolerance) * solution.nll
    best, trials = None, list[dict[str, float | None]]()
    low, high = 0, len(LADDER)  # all below low fit, all from high on do not
    while low < high:
        middle = (low + high) // 2
        strength = LADDER[middle]
        try:
            fitted = add_vertex(trainer, options, simplex, buffers, part, strength, f"lambda {strength:g}")
            coefficients = torch.cat([torch.eye(K), inside(K)])
            measured = points(trainer, fitted.vertices, coefficients, fitted.buffers, held_out, solved=solved)
            losses = torch.tensor([point.nll for point in measured], dtype=torch.float64)
            found = max(losses[:K].mean().item(), losses[K:].mean().item())
        except DivergedError:
            found = math.inf
        fits = found <= limit
        known = found if math.isfinite(found) else None  # JSON has no infinity
        trials.append({"lambda": strength, "held_out_nll": known, "limit": limit})
        trainer.say(
            f"lambda {strength:g}: held-out NLL {found:.4f}, limit {limit:.4f}: {'fits' if fits else 'too large'}"
        )
        if fits:
            best, low = (strength, fitted), middle + 1
        else:
            high = middle
    if best is None:
        trainer.say("no lambda fits: the simplex is not regularised")
        best = 0.0, add_vertex(trainer, options, simplex, buffers, part, 0.0, "lambda 0")
    return *best, trials
