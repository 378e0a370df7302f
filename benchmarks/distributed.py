"""What the all-reduce costs: a step of the loop among the processes that torchrun has started, and its parts.

For each network, with the batch of 128 shared among the processes, medians:

``step.<arch>``         seconds of a whole step;
``without.<arch>``      the same step on the same share, all processes at work, but none adding up gradients;
``in_step.<arch>``      seconds that the all-reduces of a step take in it, the wait for the slowest process included;
``alone.<arch>``        seconds of one all-reduce of the flat gradient, when all processes are ready for it;
``bytes.<arch>``        its size, 4 P.

``reseed`` is what drawing dropout's masks anew costs a step, in seconds.

    torchrun --nproc-per-node 2 benchmarks/distributed.py [--quick] [--json FILE]
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from _harness import arguments, report, spread, timed

from ensembler import architectures
from ensembler.ensemble import choose_device
from ensembler.memory import keep_freed
from ensembler.seeds import derive
from ensembler.trainers.distributed import ALONE, Group, join_group
from ensembler.trainers.loop import train
from ensembler.trainers.schedules import constant
from ensembler.weights import FlatWeights

BATCH, RATE = 128, 1e-3


class Share:
    """The same share of the same batch for ever."""

    per_epoch = 10**9

    def __init__(self, device: torch.device, group: Group, whole: int) -> None:
        stream = torch.Generator().manual_seed(0)
        x = torch.randn(BATCH, 3, 32, 32, generator=stream)[group.share].to(device)
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.y = torch.randint(10, (BATCH,), generator=stream)[group.share].to(device)
        self.whole = whole

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x, self.y


@dataclass(frozen=True)
class Timed(Group):
    """A group that notes what its sums take."""

    seconds: list[float] = field(default_factory=list)

    def sum_(self, tensor: torch.Tensor) -> None:
        if tensor.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(timed(lambda: super(Timed, self).sum_(tensor)))


def sgd(moving: list[torch.Tensor]) -> torch.optim.SGD:
    return torch.optim.SGD(moving, lr=RATE, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True)


def step_seconds(weights: FlatWeights, batches: Share, group: Group, steps: int) -> list[float]:
    """Seconds of each of so many steps, after two that do not count."""
    marks: list[float] = []

    def mark(iteration: int, state: object) -> None:
        if batches.x.is_cuda:
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    vertices = weights.vector[None].clone()
    train(weights, vertices, batches, sgd, constant(RATE), steps + 2, clip=1.0, on_step=mark, group=group)  # type: ignore[arg-type]
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
            together = Timed(group.rank, group.size, group.here, group._objects)
            whole = step_seconds(weights, Share(device, group, BATCH), together, steps)
            in_step = [a + b for a, b in zip(together.seconds[4::2], together.seconds[5::2], strict=True)]
            group.sum_(torch.zeros(1, device=device))
            mine = Share(device, group, 0)
            mine.whole = len(mine.y)
            without = step_seconds(weights, mine, ALONE, steps)
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
        reseeds = [
            timed(lambda: torch.default_generator.manual_seed(derive(0, "dropout", "solution 1", 0, 1)))
            for _ in range(1000)
        ]
        figures["reseed"] = statistics.median(reseeds)
        if group.first:
            print(f"reseeding: {1e6 * figures['reseed']:.1f} microseconds a step")
            report(figures, steps, options.json)


if __name__ == "__main__":
    main()
