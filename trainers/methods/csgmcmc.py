"""Cyclical stochastic-gradient MCMC: samples at the end of cosine cycles (Zhang et al. 2020, algorithm 1).

The rate is that of a snapshot ensemble; in the last part of each cycle, noise makes SGD a sampler of the posterior

    p(theta) ~ exp(-N / T * (mean loss + decay / 2 * |theta|^2))

of N training examples at temperature T (1 is Bayes'; weight decay is the Gaussian prior). A step at the rate lr with
momentum m adds to every weight's gradient Gaussian noise of variance

    2 (1 - m) T / (N lr)

so that without momentum the weights get noise of variance 2 lr T / N (SGLD, with the paper's step size lr / N); with
momentum it is SGHMC in the form of the authors' code. Vertices: the samples, at equal distances in the noisy part, the
last at the cycle's end. Coefficients: the identity.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Self

from ensembler.errors import UsageError
from ensembler.options import option
from ensembler.trainers.method import Members, Method
from ensembler.trainers.recipes import ASHUKHA_2020, SOLUTIONS, Recipe

if TYPE_CHECKING:
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
    samples_per_cycle: int = option(3, ge=1, help="Samples a cycle; M is a multiple of it.")
    cycle: float | None = option(
        None, gt=0, help="Epochs a cycle; the paper takes 50. (default: --epochs divided by the cycles)"
    )
    exploration: float = option(0.8, ge=0, lt=1, help="beta, share of a cycle before the noise and the samples.")
    temperature: float = option(
        1.0, ge=0, help="T of the posterior; 1 is Bayes', 0 is without noise, and the authors' code takes 1/N."
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
        return self.model_copy(update={"cycle": self.cycle or settings.epochs / self.cycles})

    def train(self, trainer: Trainer) -> Members:
        """Train one network through the cycles, and collect the samples at the end of each."""
        import torch

        from ensembler.trainers.loop import Plan
        from ensembler.trainers.schedules import cosine, repeated
        from ensembler.trainers.starts import fresh, solution, stack_buffers

        settings, length = trainer.settings, trainer.steps(self.cycle or 1)
        quiet = round(self.exploration * length)
        if length - quiet < self.samples_per_cycle:
            raise UsageError(
                f"the noisy part of a cycle has {length - quiet} of its {length} steps, fewer than the "
                f"{self.samples_per_cycle} samples: raise --cycle or lower --exploration"
            )
        begin = solution(trainer) if trainer.starts_solved else fresh(trainer)
        rate = cosine(settings.lr, length)
        noise = langevin(rate, quiet, self.temperature, settings.momentum, len(trainer.train_examples))
        offsets = [
            quiet + (length - quiet) * sample // self.samples_per_cycle
            for sample in range(1, self.samples_per_cycle + 1)
        ]
        plan = Plan(
            repeated(rate, length),
            length * self.cycles,
            noise=repeated(noise, length),
            collect={cycle * length + offset for cycle in range(self.cycles) for offset in offsets},
        )
        fitted = trainer.fit("csgmcmc", begin.vector[None].clone(), begin.buffers, plan)
        vertices = torch.cat([snapshot.vertices for snapshot in fitted.snapshots])
        return Members(vertices, torch.eye(self.members), stack_buffers(fitted.snapshots))


def langevin(rate: Schedule, quiet: int, temperature: float, momentum: float, examples: int) -> Schedule:
    """The standard deviation of the gradients' noise in one cycle: ``sqrt(2 (1 - momentum) T / (N rate))``.

    It is 0 in the first ``quiet`` iterations.

    Args:
        rate: the learning rate in the cycle.
        quiet: iterations of the exploration.
        temperature: T.
        momentum: m, of the optimiser.
        examples: N, training examples, over which the loss is a mean.
    """
    factor = 2 * (1 - momentum) * temperature / examples
    return lambda iteration: math.sqrt(factor / rate(iteration)) if iteration > quiet else 0.0
