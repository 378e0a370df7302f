"""SWAG: a Gaussian fitted to the iterates of SGD at a constant rate (Maddox et al. 2019, algorithm 1); MultiSWAG.

One network is trained as usual for the share ``start`` of one solution's budget, then at the constant rate ``swa_lr``,
where the weights are collected every ``collect_every`` epochs. Of the iterates theta_1 to theta_n are kept

    mean   theta_SWA, their mean
    diag   their variance in each coordinate, mean((theta_i - theta_SWA)^2)
    D      of each of the last K iterates, theta_i - mean(theta_1 ... theta_i)

and each member is a draw (:mod:`ensembler.gaussian`)

    theta_SWA + sqrt(scale) * (diag^(1/2) z1 + D z2 / sqrt(K - 1)),    z1, z2 standard normal.

Vertices: the drawn members. Coefficients: the identity, because the diagonal part leaves the span of the iterates. The
Gaussian is kept beside them, so that more members can be drawn, and its mean is what ``collapse`` gives: SWA.
MultiSWAG (Wilson & Izmailov 2020) draws from several independent Gaussians in turn.

The scale is that of the authors' code, a factor of the covariance; equation 1 of the paper is ``scale = 1/2``.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Self

from ensembler.errors import UsageError
from ensembler.options import option
from ensembler.trainers.method import Members, Method
from ensembler.trainers.recipes import ASHUKHA_2020, MADDOX_2019, SOLUTIONS, Recipe
from ensembler.trainers.schedules import constant

if TYPE_CHECKING:
    from ensembler.trainers.budget import Budget, Piece
    from ensembler.trainers.plan import Gather, Snapshot
    from ensembler.trainers.settings import Settings
    from ensembler.trainers.trainer import Trainer
    from ensembler.trainers.work import JobOutput

__all__ = ["SWAG", "moments"]

# wjmaddox/swa_gaussian, experiments/train/README.md: 300 epochs, the last 140 of them for the iterates. Its rate falls
# to swa_lr within the first 160, that of a solution here falls further before it rises to swa_lr.
_SWAG = {"epochs": 160, "start": 1.0, "swa_epochs": 140.0, "members": 30}
_10, _100 = ("cifar10",), ("cifar100",)


class SWAG(Method):
    """Fit a Gaussian to the iterates of SGD and draw members from it (SWAG, Maddox et al. 2019), or from several."""

    command = "train-swag"
    has_jobs = True
    by_budget = frozenset({"swa_epochs", "swags"})
    fast = {"epochs": 10, "members": 5, "start": 0.6}
    published = (
        Recipe("vgg16", SOLUTIONS["vgg16"] | _SWAG | {"swa_lr": 0.01}, MADDOX_2019),
        Recipe("preresnet164", SOLUTIONS["preresnet164"] | _SWAG | {"swa_lr": 0.01}, MADDOX_2019, _10),
        Recipe("preresnet164", SOLUTIONS["preresnet164"] | _SWAG | {"swa_lr": 0.05}, MADDOX_2019, _100),
        Recipe("wrn28x10", SOLUTIONS["wrn28x10"] | _SWAG | {"swa_lr": 0.05}, MADDOX_2019, _100),
        # SamsungLabs/pytorch-ensembles, train/train_swag.sh.
        Recipe("vgg16bn", SOLUTIONS["vgg16"] | _SWAG | {"swa_lr": 0.01, "members": 100}, ASHUKHA_2020),
        Recipe("wrn28x10", SOLUTIONS["wrn28x10"] | _SWAG | {"swa_lr": 0.01, "members": 100}, ASHUKHA_2020, _10),
    )

    members: int = option(10, ge=1, help="M, members drawn, from the Gaussians in turn.")
    rank: int = option(20, ge=0, help="K, last iterates in the low-rank part, 2 or more; 0 for the diagonal alone.")
    scale: float = option(0.5, ge=0, help="Factor of the covariance; 0.5 is the paper's, 0 draws the mean (SWA).")
    start: float = option(0.75, gt=0, le=1, help="Share of one solution's budget before iterates are collected.")
    swa_epochs: float | None = option(
        None, gt=0, help="Epochs in which iterates are collected. (default: what --start leaves of --epochs)"
    )
    swa_lr: float | None = option(
        None, gt=0, help="Constant learning rate while iterates are collected. (default: a fifth of --lr)"
    )
    collect_every: float = option(1.0, gt=0, help="c, epochs between two iterates.")
    swags: int = option(1, ge=1, help="S, independent Gaussians; several are MultiSWAG.")

    @property
    def name(self) -> str:
        """``multi-swag`` where there are several Gaussians."""
        return "swag" if self.swags == 1 else "multi-swag"

    def resolved(self, settings: Settings) -> Self:
        """By default, a Gaussian costs what one network does."""
        if self.rank == 1:
            raise UsageError("--rank must be 0, for the diagonal alone, or at least 2: one iterate has no covariance")
        if self.members < self.swags:
            raise UsageError(f"{self.members} members are too few for {self.swags} Gaussians: each needs one")
        if not self.scale and self.members > self.swags:
            raise UsageError(f"--scale 0 draws the mean of a Gaussian each time: give --members {self.swags}")
        if self.swa_epochs is None and self.start == 1:
            raise UsageError("--start 1 leaves no epochs in which to collect iterates: give --swa-epochs")
        before = self.start * settings.epochs
        settings.check_warmup(before, f"the {before:g} epochs before iterates are collected")
        swa_epochs = self.swa_epochs or (1 - self.start) * settings.epochs
        return self.model_copy(update={"swa_epochs": swa_epochs, "swa_lr": self.swa_lr or (settings.lr or 0) / 5})

    def at_budget(self, budget: Budget) -> list[Piece] | str:
        """floor(b) independent Gaussians (MultiSWAG), which share M; iterates fill what --start leaves of each."""
        steps = budget.steps(budget.total // budget.whole)
        left = int((1 - (self.start if self.start < 1 else 0.75)) * steps)
        every = min(round(self.collect_every * len(budget.sizes)), left // 2)
        if every < 1:
            return f"{steps:,} steps are too few for two iterates"
        iterates = left // every
        options = {
            "members": max(1, self.members // budget.whole),
            "start": 1 - iterates * every / steps,
            "swa_epochs": budget.in_epochs(iterates * every),
            "collect_every": budget.in_epochs(every),
            "swags": 1,
        }
        return budget.independent(self.model_copy(update=options), steps)

    def train(self, trainer: Trainer) -> Members:
        """Fit the Gaussians, each around a solution of its own, and draw the members from them.

        ``metrics["gaussians"]`` holds the number of iterates, K, and the root mean square distance of an iterate from
        their mean, for each.
        """
        import torch

        from ensembler import gaussian
        from ensembler.run import Gaussians
        from ensembler.trainers.measure import member_buffers
        from ensembler.trainers.work import each

        S = self.swags
        if S > 1 and trainer.starts_solved:
            raise UsageError("several Gaussians need independent solutions: leave out --init")
        collection(trainer, self)
        names = ["swag"] if S == 1 else [f"swag {number + 1}" for number in range(S)]
        jobs = {name: {"name": name, "number": number} for number, name in enumerate(names)}
        made = each(trainer, partial(fit_gaussian, options=self), jobs)
        each_own = [trainer.weights.unflatten(tensors["gaussian"]) for tensors, _ in made]
        gaussians = {name: torch.stack([own[name] for own in each_own]) for name in each_own[0]}
        drawn = gaussian.draw(gaussians, self.scale, self.members, trainer.settings.seed)
        vertices, coefficients = trainer.weights.flatten(drawn), torch.eye(self.members)
        last = [made[m % S][0]["buffers"] for m in range(self.members)]
        return Members(
            vertices,
            coefficients,
            member_buffers(trainer, vertices, coefficients, last),
            Gaussians(scale=self.scale),
            {"gaussians": [facts for _, facts in made]},
            gaussians,
        )


def fit_gaussian(trainer: Trainer, options: SWAG, number: int, name: str) -> JobOutput:
    """A job: one ``gaussian`` (K + 2, P), the ``buffers`` at the end of its training, and its numbers."""
    import torch

    from ensembler.trainers.plan import Plan
    from ensembler.trainers.starts import begin

    network, (iterates, every) = begin(trainer, number), collection(trainer, options)
    first, schedule = trainer.before(options.start, constant(options.swa_lr or trainer.lr / 5))
    # What comes after the last iterate would change nothing.
    collect = range(first + every, first + iterates * every + 1, every)
    plan = Plan(schedule, collect[-1], collect=collect, gather=moments(options.rank, collect))
    fitted = trainer.fit(name, network.vector[None].clone(), network.buffers, plan)
    mean, squares, *deviations = (snapshot.vertices[0] for snapshot in fitted.snapshots)
    found = torch.stack([mean, (squares / iterates).sqrt(), *deviations])
    facts = {"name": name, "iterates": iterates, "rank": len(deviations), "distance": found[1].norm().item()}
    trainer.say("{name}: {iterates} iterates, rank {rank}, {distance:.4g} from their mean".format(**facts))
    return {"gaussian": found, "buffers": fitted.buffers}, facts


def collection(trainer: Trainer, options: SWAG) -> tuple[int, int]:
    """The number of iterates, and the steps between two of them.

    Raises:
        UsageError: fewer than two iterates.
    """
    epochs, every = options.swa_epochs or 0, trainer.steps(options.collect_every)
    iterates = trainer.steps(epochs) // every
    if iterates < 2:
        raise UsageError(
            f"SWAG needs at least 2 iterates, and {epochs:g} epochs with one every {options.collect_every:g} give "
            f"{iterates}: raise --swa-epochs or lower --collect-every"
        )
    return iterates, every


def moments(rank: int, collect: range) -> Gather:
    """Keep of the iterates at ``collect`` their mean, the sum of their squared deviations from it, and the last of D.

    Each iterate updates the first two (Welford 1962): the mean of squares minus the squared mean, which the authors'
    code takes, loses the variance of a weight in the rounding of its square.

    Returns:
        For :attr:`Plan.gather`: 2 + min(rank, n) snapshots, of (1, P) each.
    """
    from ensembler.trainers.plan import Snapshot

    def gather(kept: list[Snapshot], new: Snapshot, iteration: int) -> list[Snapshot]:
        import torch

        n, x = collect.index(iteration) + 1, new.vertices
        mean, squares = (kept[0].vertices, kept[1].vertices) if kept else (x, torch.zeros_like(x))
        before = x - mean
        mean = mean + before / n
        deviation = x - mean
        last = [*kept[2:], Snapshot(deviation, {})][-rank:] if rank else []
        return [Snapshot(mean, {}), Snapshot(squares + before * deviation, {}), *last]

    return gather
