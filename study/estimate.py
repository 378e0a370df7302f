"""How long a study takes, from a measured second of its own training steps and predictions."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ensembler.data.datasets import Dataset
from ensembler.study.plan import Plan
from ensembler.trainers.budget import Budget
from ensembler.trainers.plan import Plan as Steps
from ensembler.trainers.settings import Settings
from ensembler.trainers.starts import fresh
from ensembler.trainers.trainer import Trainer

__all__ = ["Speed", "measure_speed"]

_SECONDS = 1.0  # of each measurement
_WARM = 3  # steps before it


@dataclass(frozen=True)
class Speed:
    """Measured speeds, in examples a second.

    Attributes:
        training: example passes.
        prediction: forward passes.
        device: on which.
    """

    training: float
    prediction: float
    device: str


def measure_speed(plan: Plan, dataset: Dataset, settings: Settings) -> Speed:
    """Train and predict for a second each with a fresh network of the study, one job at a time.

    Args:
        plan: the plan.
        dataset: what is trained on.
        settings: the plan's, with how they are computed.
    """
    import torch

    trainer = Trainer(dataset, settings)
    begin = fresh(trainer)

    def train(steps: int) -> float:
        start = time.monotonic()
        trainer.fit("estimate", begin.vector[None].clone(), begin.buffers, Steps(lambda step: 1e-4, steps))
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        return time.monotonic() - start

    train(_WARM)  # the first call compiles, captures and allocates
    steps = _WARM
    while (seconds := train(steps)) < _SECONDS:
        steps *= 2
    examples = Budget(1, 0, 0, trainer.batches("").sizes()).passes(steps)
    module, prepare = trainer.weights.module, trainer.train_examples.inputs(dataset.mean, dataset.std, trainer.device)
    batch = next(iter(dataset.test.batches(512)))
    module.eval()
    seen, start = 0, time.monotonic()
    with torch.no_grad():
        while time.monotonic() - start < _SECONDS or not seen:
            module(prepare(batch.data.to(trainer.device))).cpu()
            seen += len(batch)
    return Speed(examples / seconds, seen / (time.monotonic() - start), trainer.ledger.device)
