"""Members trained side by side against one after the other: the same network, batches, optimiser and loop.

``ratio.<arch>.M<m>`` is the time of an example pass (one example forward and backward once) with ``m`` members side by
side over its time with one member alone: the median over pairs that ran one after the other. Below 1,
``--parallel-members m`` pays. On a GPU both run under bfloat16 autocast, and in float32 too: ``ratio32.<arch>.M<m>``.
Batches are of 128 images; of 32 under ``--quick`` on a CPU.

    python benchmarks/side_by_side.py [--quick] [--json FILE]
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

import torch
from _harness import arguments, report, spread, timed

from ensembler import architectures
from ensembler.trainers import loop, side_by_side
from ensembler.trainers.schedules import constant
from ensembler.weights import FlatWeights

RATE = 1e-3


class OneBatch:
    """The same batch for ever: what the loop asks of its batches, and no more."""

    per_epoch = 10**9

    def __init__(self, device: torch.device, size: int, seed: int = 0) -> None:
        stream = torch.Generator().manual_seed(seed)
        self.x = torch.randn(size, 3, 32, 32, generator=stream).to(device, memory_format=torch.channels_last)
        self.y = torch.randint(10, (size,), generator=stream).to(device)
        self.whole = size

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x, self.y


def sgd(parameters: Iterable[torch.Tensor]) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=RATE, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True)


def alone(arch: str, device: torch.device, size: int, precision: torch.dtype, steps: int) -> Callable[[], None]:
    weights = FlatWeights(architectures.build(arch, 10).to(device))
    vertices, batches = weights.vector[None].clone(), OneBatch(device, size)

    def run() -> None:
        loop.train(weights, vertices, batches, sgd, constant(RATE), steps, clip=1.0, precision=precision)

    return run


def together(
    arch: str, M: int, device: torch.device, size: int, precision: torch.dtype, steps: int
) -> Callable[[], None]:
    networks = [FlatWeights(architectures.build(arch, 10, seed).to(device)) for seed in range(M)]
    vertices = torch.stack([network.vector for network in networks])
    buffers = {name: torch.stack([network.buffers()[name] for network in networks]) for name in networks[0].buffers()}
    batches = [OneBatch(device, size, seed) for seed in range(M)]

    def run() -> None:
        nonlocal buffers
        buffers = side_by_side.train(
            networks[0], vertices, buffers, batches, sgd, constant(RATE), steps, clip=1.0, precision=precision
        )

    return run


def main() -> None:
    options = arguments(__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precisions = (
        {"ratio": torch.bfloat16, "ratio32": torch.float32} if device.type == "cuda" else {"ratio": torch.float32}
    )
    size = 32 if options.quick and device.type == "cpu" else 128
    steps = 20 if device.type == "cuda" else 1
    repeats = 3 if options.quick else 10
    figures: dict[str, float] = {}
    for arch in ("cnn", "resnet20"):
        for name, precision in precisions.items():
            one = alone(arch, device, size, precision, steps)
            for M in (2, 4, 8):
                all_of_them = together(arch, M, device, size, precision, steps)
                one(), all_of_them()  # warm up
                ratios, passes = [], []
                for repeat in range(repeats):
                    if repeat % 2:
                        ours, theirs = timed(all_of_them) / M, timed(one)
                    else:
                        theirs, ours = timed(one), timed(all_of_them) / M
                    ratios.append(ours / theirs)
                    passes.append(theirs / steps / size)
                figures[f"{name}.{arch}.M{M}"] = statistics.median(ratios)
                microseconds = statistics.median(passes) * 1e6
                print(
                    f"{arch:8} M={M} B={size} {precision}: side by side / alone {spread(ratios)}; "
                    f"alone {microseconds:.1f} us an example pass"
                )
    report(figures, repeats, options.json)


if __name__ == "__main__":
    main()
