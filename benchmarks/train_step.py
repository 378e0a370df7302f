"""The simplex step against a plain SGD step, on the same network and batch, in alternation.

``ratio.<arch>.K<k>`` is the time of one SPRO step (K vertices, one of them trainable, volume regulariser on) over the
time of a hand-written ``torch.optim.SGD`` step: the median over pairs that ran one after the other.

    python benchmarks/train_step.py [--quick] [--json FILE]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from _harness import arguments, report, spread

from ensembler import architectures
from ensembler.subspace import dirichlet
from ensembler.trainers.loop import train
from ensembler.trainers.schedules import constant
from ensembler.trainers.simplex import towards_volume
from ensembler.weights import FlatWeights

BATCH, RATE, STEPS = 128, 1e-3, 2


class OneBatch:
    """The same batch for ever: what the loop asks of its batches, and no more."""

    per_epoch = 10**9

    def __init__(self, device: torch.device) -> None:
        stream = torch.Generator().manual_seed(0)
        self.x = torch.randn(BATCH, 3, 32, 32, generator=stream).to(device, memory_format=torch.channels_last)
        self.y = torch.randint(10, (BATCH,), generator=stream).to(device)

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x, self.y


def plain_steps(arch: str, batch: OneBatch) -> Callable[[], None]:
    network = architectures.build(arch, 10).to(batch.x.device).train()
    optimiser = torch.optim.SGD(network.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)

    def run() -> None:
        for _ in range(STEPS):
            optimiser.zero_grad()
            loss = torch.nn.functional.cross_entropy(network(batch.x), batch.y)
            loss.backward()
            optimiser.step()

    return run


def simplex_steps(arch: str, K: int, batch: OneBatch) -> Callable[[], None]:
    weights = FlatWeights(architectures.build(arch, 10).to(batch.x.device))
    vertices = weights.vector + 0.01 * torch.randn(K, len(weights), device=batch.x.device)
    rng = np.random.default_rng(0)
    regulariser = towards_volume(vertices[:-1], vertices[-1], 1e-2, weights.vector)

    def run() -> None:
        train(
            weights,
            vertices,
            batch,
            lambda moving: torch.optim.SGD(moving, lr=RATE, momentum=0.9, weight_decay=5e-4, nesterov=True),
            constant(RATE),
            STEPS,
            trainable=[K - 1],
            draw=lambda samples: dirichlet(samples, K, rng),
            regulariser=regulariser,
        )

    return run


def timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    options = arguments(__doc__)
    batch = OneBatch(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    repeats = 12 if options.quick else 30
    figures: dict[str, float] = {}
    for arch in ("cnn", "resnet20"):
        plain = plain_steps(arch, batch)
        for K in (4,) if options.quick else (2, 3, 4, 5):
            simplex = simplex_steps(arch, K, batch)
            plain(), simplex()  # warm up
            ratios, seconds = [], []
            for repeat in range(repeats):
                if repeat % 2:
                    ours, theirs = timed(simplex), timed(plain)
                else:
                    theirs, ours = timed(plain), timed(simplex)
                ratios.append(ours / theirs)
                seconds.append(theirs / STEPS)
            figures[f"ratio.{arch}.K{K}"] = statistics.median(ratios)
            print(f"{arch:9} K={K}: simplex / plain {spread(ratios)}; a plain step {statistics.median(seconds):.4f} s")
    report(figures, repeats, options.json)


if __name__ == "__main__":
    main()
