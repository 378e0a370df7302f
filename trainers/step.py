"""One step of training, which is the same for every method; see :mod:`ensembler.trainers.loop`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor
from torch.optim import Optimizer

from ensembler.errors import DivergedError
from ensembler.networks.batchnorm import Counters
from ensembler.task import Task
from ensembler.trainers import optimisers
from ensembler.trainers.decay import SampledDecay
from ensembler.trainers.distributed import Group
from ensembler.trainers.losses import Losses
from ensembler.trainers.plan import Best, Epoch, Plan, Snapshot, TrainState
from ensembler.weights import FlatWeights

__all__ = ["Step"]


@dataclass(eq=False)
class Step:
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

    def take(self, kept: Best | TrainState) -> None:
        """Go back to an earlier state's vertices and buffers."""
        with torch.no_grad():
            for vertex, own in zip(self.moving, kept.vertices, strict=True):
                vertex.copy_(own)
        self.weights.load_buffers(kept.buffers)

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
        self.take(state)
        optimisers.restore(self.optimiser, state.optimiser)
        self.totals.copy_(state.totals)
        if state.scaler:
            self.scaler.load_state_dict(state.scaler)
