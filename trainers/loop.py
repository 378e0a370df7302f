"""The training loop of all methods: each method is a :class:`Plan` for it.

A step draws coefficients ``c``, writes ``c @ V`` into the network, runs it forward and backward, and adds to the
gradient of each trainable vertex ``k`` its share ``c[k] * g``, plus the method's regulariser; any ``torch.optim``
optimiser does the rest. A single network is the case ``K = 1``, ``c = [1]``.

Everything random in a step (the batch, the coefficients, the regulariser's draws) is drawn for a whole epoch and copied
to the device at once. It depends only on the seed, the part of the training and the epoch. So no step waits for the
host, a checkpoint needs no generator's state, and on a GPU the step is captured once and replayed
(:mod:`ensembler.capture`).

Processes that train together (:mod:`ensembler.trainers.distributed`) do the same steps, each on its share of every
batch; their gradients are summed once per step, and everything else is the same in each process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from ensembler.batchnorm import Counters
from ensembler.capture import Captured, Graph, on_stream
from ensembler.device import upload
from ensembler.errors import DivergedError
from ensembler.seeds import derive
from ensembler.task import Task
from ensembler.trainers import optimisers
from ensembler.trainers.batches import Batches
from ensembler.trainers.decay import SampledDecay, leaves_decay
from ensembler.trainers.distributed import ALONE, Group
from ensembler.trainers.held_out import HeldOut, HeldOutBatches
from ensembler.trainers.losses import Losses
from ensembler.trainers.schedules import Schedule
from ensembler.weights import FlatWeights

__all__ = ["Best", "Epoch", "Fitted", "Plan", "Snapshot", "TrainState", "fit"]


Draw = Callable[[np.random.Generator, int], Tensor]
"""Draws N rows of numbers, on the CPU, from a generator and N."""
Coefficients = Callable[[Tensor], Tensor]
"""Maps a step's rows (S, D), on the device, to the coefficients (S, K) of its S points."""
Regulariser = Callable[[Tensor, Tensor | None], None]
"""Adds its gradient to the trainable vertices' (T, P), in place; also takes the row drawn for the step."""
Penalty = Callable[[Tensor, Tensor], Tensor]
"""Computes a scalar term of the loss from the outputs (B, O) at a point and at another one."""
Gather = Callable[[list["Snapshot"], "Snapshot", int], list["Snapshot"]]
"""Returns what is kept of the snapshots so far and a new one, taken after the given iteration. Changes no tensor."""


@dataclass(frozen=True)
class Plan:
    """A method's parameters for the loop.

    Attributes:
        schedule: function from the iteration, starting at 1, to the learning rate.
        iterations: number of steps.
        trainable: indices of the vertices that are trained; the others stay fixed.
        draw: draws a row for each point's coefficients; by default 1, for a single network.
        coefficients: maps the rows to coefficients; by default they are the coefficients.
        samples: S >= 1, points per step. The batch is split among them, so a step costs one pass for any S.
        regulariser: adds its gradient to the trainable vertices'.
        regulariser_draw: draws one row per step for the regulariser.
        penalty: a term of the loss that compares the outputs at the drawn point with those at a second one, for the
            same examples; it costs another forward pass. No gradient flows to the second point: if both have the same
            distribution and the term is symmetric, this is half of the whole gradient in expectation.
        decay_sampled: whether the optimiser's weight decay acts on the sampled weights ``c @ V`` instead of the
            vertices.
        noise: function from the iteration to the standard deviation of Gaussian noise, which is added to every
            trainable weight's gradient after clipping (Langevin dynamics). By default there is none.
        collect: iterations after which to take a snapshot.
        gather: what is kept of the snapshots; by default all of them.
        centre: (K,) coefficients of the point at which the held-out examples are predicted; by default the mean of all
            vertices, which for a single network is the network.
        patience: epochs without a lower held-out loss after which training stops; the vertices of the lowest are kept.
            By default it never does.
    """

    schedule: Schedule
    iterations: int
    trainable: Sequence[int] = (0,)
    draw: Draw | None = None
    coefficients: Coefficients | None = None
    samples: int = 1
    regulariser: Regulariser | None = None
    regulariser_draw: Draw | None = None
    penalty: Penalty | None = None
    decay_sampled: bool = False
    noise: Schedule | None = None
    collect: Container[int] = ()
    gather: Gather = lambda kept, new, iteration: [*kept, new]
    centre: Tensor | None = None
    patience: int = 0


@dataclass(frozen=True)
class Snapshot:
    """The trainable vertices (T, P) and the network's buffers at one iteration."""

    vertices: Tensor
    buffers: dict[str, Tensor]


@dataclass(frozen=True)
class Best:
    """The lowest held-out loss, the epoch after which it was found, and the trainable vertices (T, P) and buffers."""

    loss: float
    epoch: int
    vertices: Tensor
    buffers: dict[str, Tensor]


@dataclass(frozen=True)
class Fitted:
    """The result of training: all vertices (K, P), the network's buffers, and the snapshots, in order."""

    vertices: Tensor
    buffers: dict[str, Tensor]
    snapshots: list[Snapshot] = field(default_factory=list)


@dataclass(frozen=True)
class TrainState:
    """Everything that the next step depends on, after ``iteration`` steps.

    ``vertices`` (T, P) are the trainable ones, ``optimiser`` the optimiser's state, ``totals`` and ``examples`` the
    sums of the current epoch, ``scaler`` the state of the loss scaler for float16, ``best`` what early stopping keeps,
    and ``stopped`` whether it has stopped the training.
    """

    iteration: int
    vertices: Tensor
    buffers: dict[str, Tensor]
    optimiser: dict[str, Any]
    snapshots: Sequence[Snapshot]
    totals: Tensor
    examples: int
    scaler: dict[str, Any]
    best: Best | None = None
    stopped: bool = False


@dataclass(frozen=True)
class Epoch:
    """Statistics of one epoch: running means over its training examples, and means over the held-out ones after it.

    There is no ``metric`` where examples were mixed: they have no one target that an answer could be compared with.
    """

    number: int
    lr: float
    loss: float
    metric: float | None
    examples: int
    held_out_loss: float | None = None
    held_out_metric: float | None = None


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
    step = _Step(*own, optimiser(moving), plan, scaler, clip, precision, accumulate, group)
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


@dataclass(eq=False)
class _Step:
    """One step of training. All its arguments and state are on the device."""

    weights: FlatWeights
    task: Task
    losses: Losses
    vertices: Tensor
    moving: list[Tensor]  # (P,) views of the trainable vertices
    gradients: Tensor  # (T, P); the network's own if T = 1
    optimiser: Optimizer
    plan: Plan
    scaler: torch.amp.GradScaler
    clip: float
    precision: torch.dtype
    accumulate: int
    group: Group
    trainable: Tensor = field(init=False)
    centre: Tensor = field(init=False)  # (K,)
    factors: list[float] = field(init=False)  # of the learning rate, by parameter group
    decay: SampledDecay | None = field(init=False, default=None)
    totals: Tensor = field(init=False)
    counters: Counters = field(init=False)

    def __post_init__(self) -> None:
        device = self.vertices.device
        self.trainable = torch.tensor(list(self.plan.trainable), device=device)
        K = len(self.vertices)
        centre = torch.full((K,), 1 / K) if self.plan.centre is None else self.plan.centre
        self.centre = centre.to(device)
        self.totals, self.counters = torch.zeros(2, device=device), Counters(self.weights.module)
        base = self.optimiser.defaults.get("lr")
        self.factors = [float(group["lr"] / base) if base else 1.0 for group in self.optimiser.param_groups]
        if self.plan.decay_sampled:
            self.decay = SampledDecay.taken_from(self.optimiser, self.factors, self.gradients)

    def __call__(
        self,
        size: int,
        x: Tensor,
        y: Tensor,
        rate: Tensor,
        points: Tensor,
        others: Tensor,
        draw: Tensor | None,
        noise: Tensor | None,
        other_y: Tensor | None = None,
        share: Tensor | None = None,
    ) -> None:
        """Update the trainable vertices.

        Args:
            size: examples in the whole batch, of all processes.
            x: this process's share of the batch, the network's inputs (b, ...).
            y: their targets (b,).
            rate: the learning rate, a scalar.
            points: (S, D), the rows of the points' coefficients.
            others: (S, D), the rows of the points that the penalty compares with.
            draw: the regulariser's row.
            noise: the standard deviation of the gradients' noise, a scalar.
            other_y: where examples are mixed, the targets (b,) of those that were mixed into ``x``.
            share: the share of ``y`` in the loss then, a scalar; the rest is that of ``other_y``.
        """
        for group, factor in zip(self.optimiser.param_groups, self.factors, strict=True):
            group["lr"] = rate if factor == 1 else rate * factor
        self.gradients.zero_()
        if self.plan.coefficients:
            points, others = self.plan.coefficients(points), self.plan.coefficients(others)
        sizes = self.group.shares(size, len(points), self.accumulate)
        flat = [part for own in sizes for part in own]
        targets = y[None] if other_y is None else torch.stack([y, other_y])
        parts = zip(torch.split(x, flat), torch.split(targets, flat, dim=1), strict=True)
        pairs = [(c, other) for c, other, own in zip(points, others, sizes, strict=False) for _ in own]
        with self.counters():
            found = [self._accumulate(*pair, *part, size, share) for pair, part in zip(pairs, parts, strict=True)]
        sums = reduce(torch.add, found)
        if len(self.moving) == 1:
            self.group.sum_(self.weights.grad)
        self.group.sum_(sums)  # at every step, so that a checkpoint has the sums of all processes
        self.totals += sums
        self.scaler.unscale_(self.optimiser)
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.moving, self.clip)
        if self.decay:
            self.decay.add(self.vertices, self.trainable, self.moving, self.gradients, points, size, rate)
        if self.plan.regulariser:
            self.plan.regulariser(self.gradients, draw)
        if noise is not None:  # the same in all processes, whose generators differ
            self.gradients.add_(self.group.broadcast_(torch.randn_like(self.gradients)).mul_(noise))
        self.scaler.step(self.optimiser)
        self.scaler.update()

    def _accumulate(
        self, c: Tensor, other: Tensor, x: Tensor, targets: Tensor, size: int, share: Tensor | None
    ) -> Tensor:
        """Add ``c[k] * g`` to each trainable vertex's gradient, with g the gradient of the loss at ``c @ V``.

        The loss is the sum over the examples divided by ``size``. With several trainable vertices, g (P,) is summed
        over the processes here, because that is less than their gradients (T, P). With one, its gradient is summed
        after all points.

        Returns:
            (2,) the sums of the losses and of the metric over the examples.
        """
        single, grad = len(self.moving) == 1, self.weights.grad
        if not single:
            grad.zero_()
        # A process may have no example of a batch that is smaller than the group.
        sums = self._backward(c, other, x, targets, size, share) if len(x) else torch.zeros_like(self.totals)
        if not single:
            self.group.sum_(grad)
            self.gradients.addr_(c[self.trainable], grad)
        return sums

    def _backward(
        self, c: Tensor, other: Tensor, x: Tensor, targets: Tensor, size: int, share: Tensor | None
    ) -> Tensor:
        if self.plan.penalty:
            with torch.no_grad():
                other_outputs = self._outputs(other, x)
        outputs = self._outputs(c, x)
        losses = [self.losses(outputs, y) for y in targets]
        loss = (losses[0] if share is None else share * losses[0] + (1 - share) * losses[1]).sum()
        objective = loss / size
        if self.plan.penalty:
            objective = objective + self.plan.penalty(outputs, other_outputs) * (len(x) / size)
        if len(self.moving) == 1 and self.plan.draw:
            objective = objective * c[self.plan.trainable[0]]
        self.weights.backward(self.scaler.scale(objective))
        with torch.no_grad():
            return torch.stack([loss, self.task.metrics(outputs, targets[0]).sum()])

    def _outputs(self, c: Tensor, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        torch.mv(self.vertices.T, c, out=self.weights.vector)
        half = self.precision != torch.float32
        # Weights are cast anew each time: a cache of autocast's would keep those of the capture.
        with torch.autocast(x.device.type, self.precision, enabled=half, cache_enabled=False):
            outputs = (call or self.weights.module)(x)
        return outputs.float()

    def outputs_at_centre(self, x: Tensor) -> Tensor:
        """Compute the outputs at the plan's centre; not compiled: that takes longer than an epoch's few batches."""
        return self._outputs(self.centre, x, self.weights.module._call_impl)

    def epoch(self, number: int, rate: float, examples: int, mixed: bool) -> Epoch:
        """Return the statistics of the epoch that ends here, and reset the sums.

        Args:
            number: the epoch's, starting at 1.
            rate: its last learning rate.
            examples: how many the sums are over.
            mixed: whether they were mixed, so that the metric is none.

        Raises:
            DivergedError: the loss is not finite.
        """
        loss, metric = (self.totals / examples).tolist()
        self.totals.zero_()
        if not math.isfinite(loss):
            raise DivergedError(
                f"the training loss is {loss} in epoch {number}: lower the learning rate (now {rate:g})"
            )
        return Epoch(number, rate, loss, None if mixed else metric, examples)

    def better(self, epoch: Epoch, best: Best | None) -> Best:
        """Return what has the lower held-out loss: the network now, copied, or the best so far."""
        loss = math.inf if epoch.held_out_loss is None or math.isnan(epoch.held_out_loss) else epoch.held_out_loss
        if best and loss >= best.loss:
            return best
        return Best(loss, epoch.number, self.vertices[self.trainable].clone(), self.weights.buffers())

    def take(self, best: Best) -> None:
        """Go back to the best epoch's vertices and buffers."""
        with torch.no_grad():
            for vertex, kept in zip(self.moving, best.vertices, strict=True):
                vertex.copy_(kept)
        self.weights.load_buffers(best.buffers)

    def state(
        self, iteration: int, snapshots: Sequence[Snapshot], examples: int, best: Best | None, stopped: bool
    ) -> TrainState:
        """Copy everything that the next step depends on."""
        rows, buffers = self.vertices[self.trainable].clone(), self.weights.buffers()
        optimiser = optimisers.state(self.optimiser)
        totals, scaler = self.totals.clone(), self.scaler.state_dict()
        return TrainState(iteration, rows, buffers, optimiser, list(snapshots), totals, examples, scaler, best, stopped)

    def restore(self, state: TrainState) -> None:
        """Resume from a state."""
        with torch.no_grad():
            for vertex, saved in zip(self.moving, state.vertices, strict=True):
                vertex.copy_(saved)
        self.weights.load_buffers(state.buffers)
        optimisers.restore(self.optimiser, state.optimiser)
        self.totals.copy_(state.totals)
        if state.scaler:
            self.scaler.load_state_dict(state.scaler)
