"""The training loop of all methods: each method is a :class:`Plan` for it.

A step draws coefficients ``c``, writes ``c @ V`` into the network, runs it forward and backward, and adds to the
gradient of each trainable vertex ``k`` its share ``c[k] * g``, plus the method's regulariser; any ``torch.optim``
optimiser does the rest. A single network is the case ``K = 1``, ``c = [1]``.

Everything random in a step (the batch, the coefficients, the regulariser's draws) is drawn for a whole epoch and copied
to the device at once. It depends only on the seed, the part of the training and the epoch. So no step waits for the
host, a checkpoint needs no generator's state, and on a GPU the step is captured once and replayed
(:mod:`ensembler.networks.capture`).

Processes that train together (:mod:`ensembler.trainers.distributed`) do the same steps, each on its share of every
batch; their gradients are summed once per step, and everything else is the same in each process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from ensembler.device import upload
from ensembler.networks.capture import Captured, Graph, on_stream
from ensembler.seeds import derive
from ensembler.task import Task
from ensembler.trainers.batches import Batches
from ensembler.trainers.decay import leaves_decay
from ensembler.trainers.distributed import ALONE, Group
from ensembler.trainers.held_out import HeldOut, HeldOutBatches
from ensembler.trainers.losses import Losses
from ensembler.trainers.plan import Best, Draw, Epoch, Fitted, Plan, Snapshot, TrainState
from ensembler.trainers.step import Step
from ensembler.weights import FlatWeights

__all__ = ["fit"]


def fit(
    weights: FlatWeights,
    task: Task,
    vertices: Tensor,
    buffers: Mapping[str, Tensor],
    batches: Batches,
    optimiser: Callable[[list[Tensor]], Optimizer],
    plan: Plan,
    *,
    losses: Losses | None = None,
    stream: tuple[int, str] = (0, ""),
    clip: float = 0.0,
    precision: torch.dtype = torch.float32,
    accumulate: int = 1,
    held_out: HeldOutBatches | None = None,
    on_epoch: Callable[[Epoch, Best | None], None] = lambda epoch, stopped: None,
    before_step: Callable[[int], None] = lambda iteration: None,
    after_step: Callable[[int, Callable[[], TrainState]], None] = lambda iteration, state: None,
    resume: TrainState | None = None,
    group: Group = ALONE,
    graph: Callable[[], Graph] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Fitted:
    """Train some of the vertices, in place.

    Args:
        weights: the network; its weights and buffers are overwritten.
        task: what its outputs mean.
        vertices: (K, P), on the network's device.
        buffers: the network's initial buffers.
        batches: the training batches.
        optimiser: makes the optimiser of a list of (P,) tensors, with their gradients in ``.grad``, or of views of
            both. Its learning rates are set at every step, in their proportions.
        plan: the method's parameters.
        losses: what is minimised; by default the task's.
        stream: the seed and the part, which together with the epoch determine everything random.
        clip: largest norm of the loss's gradient, which is scaled down to it; 0 for no limit. Networks without
            BatchNorm need it to leave their first plateau at a high learning rate.
        precision: of the forward and backward pass, by autocast; the vertices stay float32. float16 scales the loss.
        accumulate: parts of a batch, or of a point's share of it, that go forward and backward one after another, of
            two examples each at least. BatchNorm normalises over each part.
        held_out: yields this process's share of the held-out examples, which are predicted after every epoch.
        on_epoch: called at the end of each epoch, including an incomplete last one, with its statistics; at the last
            one also with what early stopping keeps.
        before_step: called before each step with its number, starting at 1.
        after_step: called after each step with its number and a function that copies the state.
        resume: the state to resume from.
        group: the processes that train together; each makes the same call.
        graph: makes the graphs in which the step is captured; by default, each step is launched anew.
        say: told what is found on the way, a sentence each.

    Raises:
        DivergedError: the loss is not finite.
    """
    weights.load_buffers(buffers)
    weights.module.train()
    moving = [vertices[k].detach().requires_grad_() for k in plan.trainable]
    # A single trainable vertex uses the network's own gradient vector, scaled through the loss: no copy of size P.
    gradients = (
        weights.grad[None] if len(moving) == 1 else torch.zeros(len(moving), len(weights), device=vertices.device)
    )
    for vertex, gradient in zip(moving, gradients, strict=True):
        vertex.grad = gradient
    scaler = torch.amp.GradScaler(vertices.device.type, enabled=precision == torch.float16)
    own = weights, task, losses or task.losses, vertices, moving, gradients
    step = Step(*own, optimiser(moving), plan, scaler, clip, precision, accumulate, group)
    if plan.decay_sampled and leaves_decay(step.optimiser):
        say(f"the weight decay of {type(step.optimiser).__name__} acts on the vertices, not on the points drawn")
    snapshots: list[Snapshot] = []
    examples = iteration = 0
    best, stopped = None, False
    if resume:
        step.restore(resume)
        examples, iteration, best, stopped = resume.examples, resume.iteration, resume.best, resume.stopped
        for snapshot in resume.snapshots:
            on_device = {name: buffer.to(vertices.device) for name, buffer in snapshot.buffers.items()}
            snapshots.append(Snapshot(snapshot.vertices.to(vertices.device), on_device))

    def state() -> TrainState:
        return step.state(iteration, snapshots, examples, best, stopped)

    run = Captured(step, say, graph) if graph else step
    unseen = HeldOut(weights, task, step.outputs_at_centre, group, graph)
    with on_stream(vertices.device), closing(batches.begin(iteration)) as stream_of_batches:
        while iteration < plan.iterations and not stopped:
            epoch, begin = divmod(iteration, batches.per_epoch)
            feed = _Feed.of(plan, stream, epoch, batches.per_epoch, vertices.device)
            end = min(batches.per_epoch, plan.iterations - epoch * batches.per_epoch)
            for n in range(begin, end):
                before_step(iteration + 1)
                batch = next(stream_of_batches)
                run(batch.size, batch.x, batch.y, *feed.at(n), batch.other_y, batch.share)
                examples += batch.size
                iteration += 1
                if iteration in plan.collect:
                    new = Snapshot(vertices[list(plan.trainable)].clone(), weights.buffers())
                    snapshots = plan.gather(snapshots, new, iteration)
                if n == end - 1:
                    found = step.epoch(epoch + 1, plan.schedule(iteration), examples, mixed=batch.share is not None)
                    if held_out:
                        loss, metric = unseen.measure(held_out)
                        found = replace(found, held_out_loss=loss, held_out_metric=metric)
                    if plan.patience:
                        best = step.better(found, best)
                        stopped = found.number - best.epoch >= plan.patience
                    on_epoch(found, best if stopped or iteration == plan.iterations else None)
                    examples = 0
                after_step(iteration, state)
    if best:
        step.take(best)
    return Fitted(vertices, weights.buffers(), snapshots)


@dataclass(frozen=True)
class _Feed:
    """The rates and random numbers of an epoch's N steps of S points, copied to the device together.

    ``rates`` (N,); ``points`` and ``others`` (N, S, D); ``draws`` of the regulariser (N, ...), or ``None``; ``noises``
    (N,), standard deviations, or ``None``.
    """

    rates: Tensor
    points: Tensor
    others: Tensor
    draws: Tensor | None
    noises: Tensor | None

    @classmethod
    def of(cls, plan: Plan, stream: tuple[int, str], epoch: int, steps: int, device: torch.device) -> _Feed:
        """Make the feed of one epoch, which depends only on the stream and the epoch."""
        seed, part = stream

        def rows(draw: Draw, name: str, count: int) -> Tensor:
            return draw(np.random.default_rng(derive(seed, name, part, epoch)), count)

        # The last epoch may be longer than the plan, which need not be defined beyond its end.
        iterations = [min(epoch * steps + n + 1, plan.iterations) for n in range(steps)]
        rates = torch.tensor([plan.schedule(iteration) for iteration in iterations])
        points = torch.ones(steps * plan.samples, 1)
        if plan.draw:
            points = rows(plan.draw, "points", steps * plan.samples)
        others = rows(plan.draw, "other points", len(points)) if plan.draw and plan.penalty else points
        draws = rows(plan.regulariser_draw, "regulariser", steps) if plan.regulariser_draw else None
        noises = torch.tensor([plan.noise(iteration) for iteration in iterations]) if plan.noise else None
        points, others = (each.view(steps, plan.samples, -1) for each in (points, others))
        draws, noises = (None if each is None else upload(each, device) for each in (draws, noises))
        return cls(upload(rates, device), upload(points, device), upload(others, device), draws, noises)

    def at(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return the rows of step ``n`` of the epoch."""
        draw, noise = (None if each is None else each[n] for each in (self.draws, self.noises))
        return self.rates[n], self.points[n], self.others[n], draw, noise
