"""The cost of the all-reduce: a step of the training loop in the processes that torchrun has started, and its parts.

For each network, with a batch of 128 shared among the processes, medians:

``step.<arch>``         seconds of a whole step;
``without.<arch>``      the same step on the same share, in all processes at once, without adding gradients;
``in_step.<arch>``      seconds that the all-reduces take within a step, including the wait for the slowest process;
``alone.<arch>``        seconds of one all-reduce of the flat gradient, when all processes are ready;
``bytes.<arch>``        its size, 4 P.

``reseed`` is what seeding dropout's masks costs per step, in seconds.

    torchrun --nproc-per-node 2 benchmarks/distributed.py [--quick] [--json FILE]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from _harness import arguments, report, spread, timed

from ensembler.device import choose_device, keep_freed, seed_generators
from ensembler.networks import architectures
from ensembler.seeds import derive
from ensembler.task import Classification
from ensembler.trainers.batches import Batch
from ensembler.trainers.distributed import ALONE, Group, join_group
from ensembler.trainers.loop import fit
from ensembler.trainers.plan import Plan
from ensembler.trainers.schedules import constant
from ensembler.weights import FlatWeights

BATCH, RATE = 128, 1e-3


class Share:
    """The same share of the same batch at every step; stands in for :class:`ensembler.trainers.batches.Batches`."""

    per_epoch = 10  # what changes from step to step is drawn once per epoch

    def __init__(self, device: torch.device, group: Group, alone: bool = False) -> None:
        stream = torch.Generator().manual_seed(0)
        x = torch.randn(BATCH, 3, 32, 32, generator=stream)[group.share].to(device)
        y = torch.randint(10, (BATCH,), generator=stream)[group.share].to(device)
        self.batch = Batch(x.contiguous(memory_format=torch.channels_last), y, len(y) if alone else BATCH)

    def begin(self, step: int) -> Generator[Batch, None, None]:
        while True:
            yield self.batch


@dataclass(frozen=True)
class Timed(Group):
    """A group that measures its sums."""

    seconds: list[float] = field(default_factory=list)

    def sum_(self, tensor: torch.Tensor) -> None:
        if tensor.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(timed(lambda: super(Timed, self).sum_(tensor)))


def sgd(moving: list[torch.Tensor]) -> torch.optim.SGD:
    return torch.optim.SGD(moving, lr=RATE, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True)


def step_seconds(weights: FlatWeights, batches: Share, group: Group, steps: int) -> list[float]:
    """Return the seconds of each of so many steps, after two that are not counted."""
    marks: list[float] = []

    def mark(iteration: int, state: object) -> None:
        if weights.vector.is_cuda:
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    plan, vertices = Plan(constant(RATE), steps + 2), weights.vector[None].clone()
    stream: Any = batches
    fit(
        weights,
        Classification(),
        vertices,
        weights.buffers(),
        stream,
        sgd,
        plan,
        clip=1.0,
        after_step=mark,
        group=group,
    )
    return [after - before for before, after in pairwise(marks[1:])]


def main() -> None:
    options = arguments(__doc__)
    figures: dict[str, float] = {}
    with join_group() as group:
        device = choose_device()
        keep_freed(device)
        for arch in ("cnn", "resnet20") if options.quick else ("cnn", "resnet20", "vgg16"):
            steps = 10 if options.quick or arch == "vgg16" else 30
            weights = FlatWeights(architectures.build(arch, 10).to(device))
            together = Timed(group.rank, group.size, group._objects)
            whole = step_seconds(weights, Share(device, group), together, steps)
            in_step = [a + b for a, b in zip(together.seconds[4::2], together.seconds[5::2], strict=True)]
            group.sum_(torch.zeros(1, device=device))
            without = step_seconds(weights, Share(device, group, alone=True), ALONE, steps)
            alone = []
            for _ in range(steps):
                group.sum_(torch.zeros(1, device=device))  # until all are here
                alone.append(timed(lambda: group.sum_(weights.grad)))  # noqa: B023
                weights.grad.zero_()
            found = {"step": whole, "without": without, "in_step": in_step, "alone": alone}
            figures |= {f"{name}.{arch}": statistics.median(values) for name, values in found.items()}
            figures[f"bytes.{arch}"] = 4 * len(weights)
            if group.first:
                print(f"{arch}, {4 * len(weights):,} bytes of gradient, {group.size} processes, milliseconds:")
                for name, values in found.items():
                    print(f"    {name:8} {spread([1000 * value for value in values])}")
        reseeds = [timed(lambda: seed_generators(derive(0, "dropout", "solution 1", 0, 1))) for _ in range(1000)]
        figures["reseed"] = statistics.median(reseeds)
        if group.first:
            print(f"reseeding: {1e6 * figures['reseed']:.1f} microseconds a step")
            report(figures, steps, options.json)


if __name__ == "__main__":
    main()
