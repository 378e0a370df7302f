"""Cyclical stochastic-gradient MCMC: samples at the end of cosine cycles (Zhang et al. 2020, algorithm 1).

The rate is that of a snapshot ensemble; in the last part of each cycle, noise makes SGD a sampler of the posterior

    p(theta) ~ exp(-N / T * (mean loss + decay / 2 * |theta|^2))

of N training examples at temperature T (1 is Bayes'; weight decay is the Gaussian prior). Without momentum, a step at
the rate lr adds noise of variance 2 lr T / N to every weight (SGLD, with the paper's step size lr / N). With momentum m
it is SGHMC, with the noise in the velocity; see :func:`langevin`. Each cycle begins without velocity: SGD's is the rate
times a buffer, and the buffer's noise at the end of a cycle, times the rate at the beginning of the next, would be the
end of the network.

Vertices: the samples, at equal distances in the noisy part, the last at the cycle's end. Coefficients: the identity.
Clipping, which is on by default, changes the posterior where it acts: it bounds the loss's gradient, not the noise.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from ensembler.errors import UsageError
from ensembler.options import option
from ensembler.trainers.method import Members, Method
from ensembler.trainers.recipes import ASHUKHA_2020, SOLUTIONS, Recipe

if TYPE_CHECKING:
    from ensembler.trainers.budget import Budget, Piece
    from ensembler.trainers.schedules import Schedule
    from ensembler.trainers.settings import Settings
    from ensembler.trainers.trainer import Trainer

__all__ = ["CyclicalSGMCMC", "langevin"]

# SamsungLabs/pytorch-ensembles, train/train_sse_mcmc.sh and train/cifar/sse_mcmc_train.py: the noise in the last 3 of
# 50 epochs, a sample after each; its variance per gradient, 2 / (lr 704^2) for 704 batches an epoch, is that of
# T = N / 704^2. Ruqi Zhang's own code takes T = 1 / N.
_CSGLD = {"batch_size": 64, "momentum": 0.0, "lr": 0.5, "epochs": 200, "cycle": 50.0, "members": 12}
_CSGLD |= {"samples_per_cycle": 3, "exploration": 0.94, "temperature": 0.0908}


class CyclicalSGMCMC(Method):
    """Draw posterior samples at the end of cosine cycles (cyclical SG-MCMC, Zhang et al. 2020)."""

    command = "train-csgmcmc"
    fast = {"epochs": 20, "members": 6}
    published = tuple(
        Recipe(name, SOLUTIONS[solution] | _CSGLD, ASHUKHA_2020)
        for name, solution in (("vgg16bn", "vgg16"), ("preresnet164", "preresnet164"), ("wrn28x10", "wrn28x10"))
    )

    members: int = option(12, ge=1, help="M, samples in all.")
    samples_per_cycle: int = option(3, ge=1, help="Samples per cycle; M is a multiple of it.")
    cycle: float | None = option(
        None, gt=0, help="Epochs per cycle; the paper takes 50. (default: --epochs divided by the cycles)"
    )
    exploration: float = option(0.8, ge=0, lt=1, help="beta, share of a cycle before the noise and the samples.")
    temperature: float = option(
        0.1, ge=0, help="T of the posterior; 1 is Bayes', 0 is without noise, and the authors' code takes 1/N."
    )

    @property
    def cycles(self) -> int:
        """M divided by the samples a cycle."""
        return self.members // self.samples_per_cycle

    def resolved(self, settings: Settings) -> Self:
        """By default, the whole ensemble costs what one network does."""
        if self.members % self.samples_per_cycle:
            raise UsageError(
                f"{self.members} members are no whole number of cycles of {self.samples_per_cycle} samples: give "
                "--members a multiple of --samples-per-cycle"
            )
        if settings.optimiser != "sgd" or settings.parameter_groups:
            option = "--parameter-groups" if settings.optimiser == "sgd" else f"--optimiser {settings.optimiser}"
            raise UsageError(f"{self.command} samples by SGD at one learning rate: leave out {option}")
        cycle = self.cycle or settings.epochs / self.cycles
        if settings.warmup > self.exploration * cycle:
            raise UsageError(
                f"--warmup {settings.warmup:g} is longer than the {self.exploration * cycle:g} epochs of a cycle that "
                "are without noise: lower it"
            )
        return self.model_copy(update={"cycle": cycle})

    def at_budget(self, budget: Budget) -> list[Piece] | str:
        """One run of b x B, in cycles of --cycle epochs where given, else as many a budget as M gives."""
        from ensembler.trainers.budget import LEAST, Piece

        wanted = budget.total / (self.cycle * sum(budget.sizes)) if self.cycle else budget.networks * self.cycles
        for count in range(max(1, round(wanted)), 0, -1):
            length = budget.steps(budget.total // count)
            noisy = length - round(self.exploration * length)
            if noisy >= self.samples_per_cycle and count * budget.passes(length) >= LEAST * budget.total:
                options = {"members": count * self.samples_per_cycle, "cycle": budget.in_epochs(length)}
                epochs = budget.in_epochs(count * length)
                return [Piece(self.model_copy(update=options), count * budget.passes(length), epochs)]
        return f"{budget.steps(budget.total):,} steps are too few for a cycle with its samples"

    def train(self, trainer: Trainer) -> Members:
        """Train one network through the cycles, each a part of the cost, and collect the samples at their ends."""
        from ensembler.trainers.plan import Plan, Snapshot
        from ensembler.trainers.schedules import cosine
        from ensembler.trainers.starts import as_members, begin

        settings, length = trainer.settings, trainer.steps(self.cycle or 1)
        quiet = round(self.exploration * length)
        if length - quiet < self.samples_per_cycle:
            raise UsageError(
                f"the noisy part of a cycle has {length - quiet} of its {length} steps, fewer than the "
                f"{self.samples_per_cycle} samples: raise --cycle or lower --exploration"
            )
        network = begin(trainer)
        rate, count = cosine(trainer.lr, length), self.samples_per_cycle
        plan = Plan(
            rate,
            length,
            noise=langevin(rate, quiet, self.temperature, settings.momentum or 0, len(trainer.train_examples)),
            collect={quiet + (length - quiet) * (sample + 1) // count for sample in range(count)},
        )
        vertices, buffers, samples = network.vector[None].clone(), network.buffers, list[Snapshot]()
        for cycle in range(self.cycles):
            own = plan if cycle else replace(plan, schedule=trainer.warmed(rate))
            fitted = trainer.fit(f"cycle {cycle + 1}", vertices, buffers, own)
            vertices, buffers = fitted.vertices, fitted.buffers
            samples += fitted.snapshots
        return as_members(samples)


def langevin(rate: Schedule, quiet: int, temperature: float, momentum: float, examples: int) -> Schedule:
    """The standard deviation of the gradients' noise in one cycle, 0 in its first ``quiet`` iterations.

    At a constant rate its square is ``2 (1 - m) T / (N rate)``. SGD's velocity is the rate times its buffer, which a
    falling rate shrinks beyond the friction m. For the velocity to keep the variance that it has in equilibrium,
    ``2 rate T / (N (1 + m))``, the square is

        2 T / (N rate) * (1 - m^2 rate / previous rate) / (1 + m).

    Args:
        rate: the learning rate in the cycle.
        quiet: iterations of the exploration.
        temperature: T.
        momentum: m, of the optimiser.
        examples: N, training examples, over which the loss is a mean.
    """
    factor = 2 * temperature / examples / (1 + momentum)

    def noise(iteration: int) -> float:
        if iteration <= quiet:
            return 0.0
        now, before = rate(iteration), rate(max(1, iteration - 1))
        return math.sqrt(factor / now * (1 - momentum**2 * now / before))

    return noise
