"""The simplex step against a plain SGD step, on the same network, batch and optimiser, in alternation.

``ratio.<arch>.K<k>`` is the time of one SPRO step (K vertices, one of them trainable, volume regulariser on) over the
time of a hand-written ``torch.optim.SGD`` step: the median over pairs that ran one after the other. On a GPU both run
under bfloat16 autocast. On a CPU both keep the memory they free, as training does (``ensembler/device.py``).

``floats_per_parameter.K<k>`` is what such a step of ``vgg16`` holds in memory at the most, over its number of
parameters: every tensor alive is counted, less the activations and temporaries that the plain step holds too.

``operations.<arch>.<precision>.<method>`` is how many operations on tensors a step takes, but for views: on a GPU each
is a launch. Gradients are gathered as on a GPU; a batch is given, of four images. ``plain`` is the plain step, clipped.

    python benchmarks/train_step.py [--quick] [--json FILE]
"""

from __future__ import annotations

import statistics
import weakref
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from _harness import arguments, report, spread, timed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ensembler.device import keep_freed
from ensembler.networks import architectures
from ensembler.subspace import bezier, dirichlet
from ensembler.task import Classification
from ensembler.trainers.batches import Batch
from ensembler.trainers.loop import fit
from ensembler.trainers.methods.subspace import cosine_regulariser
from ensembler.trainers.plan import Plan
from ensembler.trainers.regularisers import Volumes, hellinger_repulsion, volume_regulariser
from ensembler.trainers.schedules import constant
from ensembler.weights import FlatWeights

BATCH, RATE = 128, 1e-3
STEPS = {"vgg16": 1, "preresnet164": 1}  # in a row, of each kind; else 2


class OneBatch:
    """The same batch for ever: what the loop asks of its batches, and no more."""

    def __init__(self, device: torch.device, size: int = BATCH) -> None:
        stream = torch.Generator().manual_seed(0)
        self.x = torch.randn(size, 3, 32, 32, generator=stream).to(device, memory_format=torch.channels_last)
        self.y = torch.randint(10, (size,), generator=stream).to(device)
        self.per_epoch = 1

    def begin(self, step: int = 0) -> Generator[Batch, None, None]:
        while True:
            yield Batch(self.x, self.y, len(self.y))


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that were made within and are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self._known = 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self._known.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key, size)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class Operations(TorchDispatchMode):
    """Counts operations on tensors, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = [found.alias_info for found in func._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in returned)
        self.count += func.namespace == "aten" and not view
        return func(*args, **(kwargs or {}))


def sgd(parameters: Iterable[torch.Tensor]) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=RATE, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True)


def precision(batch: OneBatch) -> torch.dtype:
    return torch.bfloat16 if batch.x.is_cuda else torch.float32


def plain_steps(arch: str, batch: OneBatch) -> Callable[[], None]:
    network = architectures.build(arch, 10).to(batch.x.device).train()
    optimiser = sgd(network.parameters())

    def run() -> None:
        for _ in range(STEPS.get(arch, 2)):
            optimiser.zero_grad()
            with torch.autocast(batch.x.device.type, precision(batch), enabled=batch.x.is_cuda):
                logits = network(batch.x)
            loss = torch.nn.functional.cross_entropy(logits.float(), batch.y)
            loss.backward()
            optimiser.step()

    return run


def simplex_steps(arch: str, K: int, batch: OneBatch) -> Callable[[], None]:
    weights = FlatWeights(architectures.build(arch, 10).to(batch.x.device))
    vertices = weights.vector.repeat(K, 1)
    for k in range(1, K):
        vertices[k] += 0.01 * torch.randn(len(weights), device=vertices.device)
    steps = batch.per_epoch = STEPS.get(arch, 2)
    plan = Plan(
        constant(RATE),
        steps,
        trainable=[K - 1],
        draw=lambda rng, count: dirichlet(count, K, rng),
        regulariser=volume_regulariser(vertices[:-1], vertices[-1], 1e-2, weights.vector),
    )
    buffers, task = weights.buffers(), Classification()

    def run() -> None:
        fit(weights, task, vertices, buffers, batch, sgd, plan, precision=precision(batch))  # type: ignore[arg-type]

    return run


def peak_floats(make: Callable[[], Callable[[], None]]) -> float:
    """The most floats alive while ``make()`` and two runs of what it makes."""
    with Live() as live:
        run = make()
        live.peak = live.now  # what was needed to make it is not the step's
        run(), run()
    return live.peak / 4


def plans(weights: FlatWeights) -> dict[str, tuple[torch.Tensor, Plan]]:
    """Vertices and a plan of each method, as its file makes them."""
    rate, task = constant(RATE), Classification()

    def near(K: int) -> torch.Tensor:
        return weights.vector + 0.01 * torch.randn(K, len(weights))

    four, three, common = near(4), near(3), near(3)
    volumes = Volumes(common, [[0, 2], [1, 2]])
    volume = volume_regulariser(four[:-1], four[-1], 1e-2, weights.vector)
    drawn = {
        "volume": (four, {"trainable": [3], "draw": lambda rng, n: dirichlet(n, 4, rng), "regulariser": volume}),
        "function": (
            near(3),
            {"trainable": [2], "draw": lambda rng, n: dirichlet(n, 3, rng), "penalty": hellinger_repulsion(task, 1e-2)},
        ),
        "joint subspace": (
            three,
            {
                "trainable": range(3),
                "draw": lambda rng, n: dirichlet(n, 3, rng),
                "regulariser": cosine_regulariser(three, 1.0, weights),
                "regulariser_draw": lambda rng, n: torch.from_numpy(rng.random((n, 3)).argsort(axis=1)[:, :2]),
            },
        ),
        "curve": (
            near(3),
            {
                "trainable": [1],
                "draw": lambda rng, n: bezier(torch.from_numpy(rng.random(n)).float(), 3),
                "decay_sampled": True,
            },
        ),
        "complex": (
            common,
            {
                "trainable": [2],
                "draw": lambda rng, n: torch.cat([torch.rand(n, 1), dirichlet(n, 2, rng)], dim=1),
                "coefficients": volumes.coefficients,
                "regulariser": volumes.regulariser(1e-2, weights.vector),
            },
        ),
    }
    found = {name: (vertices, Plan(rate, 1, **options)) for name, (vertices, options) in drawn.items()}  # type: ignore[arg-type]
    return {"single, FGE, SSE": (near(1), Plan(rate, 1)), **found}


def operations(arch: str, dtype: torch.dtype) -> dict[str, int]:
    """Operations a step of each method, and of a plain loop."""
    batch = OneBatch(torch.device("cpu"), size=4)
    batch.per_epoch = 100
    network, weights = architectures.build(arch, 10).train(), FlatWeights(architectures.build(arch, 10), gather=True)
    optimiser, task = sgd(network.parameters()), Classification()

    def plain(steps: int) -> None:
        for _ in range(steps):
            optimiser.zero_grad()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                logits = network(batch.x)
            torch.nn.functional.cross_entropy(logits.float(), batch.y).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()

    def own(vertices: torch.Tensor, plan: Plan, steps: int) -> None:
        plan = replace(plan, iterations=steps)
        fit(weights, task, vertices, weights.buffers(), batch, sgd, plan, clip=1.0, precision=dtype)  # type: ignore[arg-type]

    def each(run: Callable[[int], None]) -> int:
        counts = []
        for steps in (1, 2, 3):  # the first makes the optimiser's state
            with Operations() as found:
                run(steps)
            counts.append(found.count)
        return counts[2] - counts[1]

    methods = {name: each(partial(own, *given)) for name, given in plans(weights).items()}
    return {"plain": each(plain), **methods}


def main() -> None:
    options = arguments(__doc__)
    batch = OneBatch(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    keep_freed(batch.x.device)
    figures: dict[str, float] = {}
    quick = ("cnn", "resnet20") if options.quick else ("cnn", "resnet20", "vgg16")
    for arch in ("vgg16", "preresnet164") if batch.x.is_cuda else quick:
        repeats = 10 if options.quick or arch == "vgg16" else 30
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
                seconds.append(theirs / STEPS.get(arch, 2))
            figures[f"ratio.{arch}.K{K}"] = statistics.median(ratios)
            print(f"{arch:9} K={K}: simplex / plain {spread(ratios)}; a plain step {statistics.median(seconds):.4f} s")
    small = OneBatch(torch.device("cpu"), size=2)
    P = sum(parameter.numel() for parameter in architectures.build("vgg16", 10).parameters())
    beyond = peak_floats(lambda: plain_steps("vgg16", small)) - 3 * P  # weights, gradients and momentum are 3 P
    for K in (4,) if options.quick else (2, 3, 4, 5):
        floats = (peak_floats(lambda K=K: simplex_steps("vgg16", K, small)) - beyond) / P  # type: ignore[misc]
        figures[f"floats_per_parameter.K{K}"] = floats
        print(f"vgg16     K={K}: {floats:.3f} floats a parameter; K + 3 = {K + 3}")
    for arch in ("cnn", "resnet20") if options.quick else ("cnn", "resnet20", "vgg16", "preresnet164"):
        for dtype in (torch.float32, torch.bfloat16):
            kind, counts = str(dtype).removeprefix("torch."), operations(arch, dtype)
            figures |= {f"operations.{arch}.{kind}.{name}": count for name, count in counts.items()}
            print(f"{arch}, {kind}: operations a step: {', '.join(f'{name} {n}' for name, n in counts.items())}")
    report(figures, repeats, options.json)


if __name__ == "__main__":
    main()
