"""The one training loop: every method of this room is a choice of its arguments.

A step draws coefficients ``c``, writes ``c @ V`` into the network, runs it forward and backward, and gives each
trainable vertex ``k`` its gradient ``c[k] * g``, plus the method's regulariser; any ``torch.optim`` optimiser does
the rest. A single network is the case ``K = 1``, ``c = [1]``.

Processes that train together (:mod:`ensembler.trainers.distributed`) do the same steps, each on its share of every
batch; their gradients are added up once a step, and all the rest is alike in each.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from ensembler.errors import DivergedError
from ensembler.trainers.batches import Batches
from ensembler.trainers.distributed import ALONE, Group
from ensembler.trainers.schedules import Schedule
from ensembler.weights import FlatWeights

__all__ = ["Epoch", "Snapshot", "State", "train"]

Draw = Callable[[int], Tensor]
Regulariser = Callable[[Tensor], None]
Penalty = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Snapshot:
    """The trainable vertices (T, P) and the network's buffers at one iteration."""

    vertices: Tensor
    buffers: dict[str, Tensor]


@dataclass(frozen=True)
class State:
    """All that the next step depends on, after ``iteration`` steps, but for what is drawn at random.

    ``vertices`` (T, P) are the moving ones, ``optimiser`` the optimiser's state by vertex, ``totals`` and ``examples``
    the running epoch's sums, ``scaler`` the loss scaler's state in half precision.
    """

    iteration: int
    vertices: Tensor
    buffers: dict[str, Tensor]
    optimiser: dict[int, dict[str, Any]]
    snapshots: Sequence[Snapshot]
    totals: Tensor
    examples: int
    scaler: dict[str, Any]


@dataclass(frozen=True)
class Epoch:
    """What one epoch did: means over the examples that passed, as they passed."""

    number: int
    rate: float
    loss: float
    accuracy: float
    examples: int


def train(
    weights: FlatWeights,
    vertices: Tensor,
    batches: Batches,
    optimiser: Callable[[list[Tensor]], Optimizer],
    schedule: Schedule,
    iterations: int,
    *,
    trainable: Sequence[int] = (0,),
    draw: Draw | None = None,
    samples: int = 1,
    clip: float | None = None,
    decay_sampled: bool = False,
    regulariser: Regulariser | None = None,
    penalty: Penalty | None = None,
    precision: torch.dtype = torch.float32,
    collect: Container[int] = (),
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    resume: State | None = None,
    on_step: Callable[[int, Callable[[], State]], None] = lambda iteration, state: None,
    group: Group = ALONE,
) -> list[Snapshot]:
    """Train some of the vertices, in place.

    Args:
        weights: the network; its weights are overwritten at every step.
        vertices: (K, P), on the network's device.
        batches: where the examples come from.
        optimiser: makes the optimiser of the given (P,) tensors.
        schedule: iteration, from 1, to learning rate.
        iterations: how many steps.
        trainable: the indices of the vertices that move; the others stay.
        draw: S to coefficients (S, K); by default the one coefficient of a single network, 1.
        samples: S >= 1, points a step. The batch is split among them, so a step costs one pass whatever S.
        clip: the largest norm of the loss's gradient; a longer one is shortened to it. Without BatchNorm, this is what
            lets a network leave its first plateau at a high rate.
        decay_sampled: whether the optimiser's weight decay acts on the sampled weights ``c @ V``, not on the vertices.
        regulariser: adds its gradient to the trainable vertices' (T, P), in place.
        penalty: a term of the loss that compares the logits (B, C) at the drawn point with those at a second one, for
            the same images; it costs one more forward pass. No gradient flows to the second point: where both are
            drawn alike and the term is symmetric, this is half the whole gradient in expectation.
        precision: of the forward and backward pass, by autocast; the vertices stay in float32. float16 scales the loss.
        collect: the iterations after which a snapshot is taken.
        on_epoch: called at the end of each epoch, and of the last, unfinished one.
        resume: the state to go on from; ``batches`` and ``draw`` stand where they stood then.
        on_step: called after each step with its number and a function that copies the state.
        group: the processes that train together; each calls this alike.

    Returns:
        The snapshots, in order.

    Raises:
        DivergedError: the loss is not finite.
    """
    moving = [vertices[k].detach().requires_grad_() for k in trainable]
    # One moving vertex takes the network's own gradient vector, scaled through the loss: no copy of size P.
    alone = len(moving) == 1
    gradients = weights.grad[None] if alone else torch.zeros(len(moving), len(weights), device=vertices.device)
    for vertex, gradient in zip(moving, gradients, strict=True):
        vertex.grad = gradient
    stepper = optimiser(moving)
    decay = stepper.param_groups[0].get("weight_decay", 0.0) if decay_sampled else 0.0
    if decay:
        stepper.param_groups[0]["weight_decay"] = 0.0
    scaler = torch.amp.GradScaler(vertices.device.type, enabled=precision == torch.float16)
    point = _Point(weights, vertices, list(trainable), gradients, decay, penalty, precision, scaler, group)
    weights.module.train()
    snapshots: list[Snapshot] = []
    totals, examples, done = torch.zeros(2, device=vertices.device), 0, 0
    if resume:
        _restore(resume, weights, moving, stepper, scaler)
        snapshots, totals = list(resume.snapshots), resume.totals.to(vertices.device)
        examples, done = resume.examples, resume.iteration

    def state() -> State:
        rows, optimiser = vertices[list(trainable)].clone(), copy.deepcopy(stepper.state_dict()["state"])
        sums = totals.clone()
        return State(
            iteration, rows, weights.buffers(), optimiser, list(snapshots), sums, examples, scaler.state_dict()
        )

    for iteration in range(done + 1, iterations + 1):
        for parameters in stepper.param_groups:
            parameters["lr"] = schedule(iteration)
        x, y = next(batches)
        gradients.zero_()
        drawn = draw(samples) if draw else torch.ones(samples, 1)
        others = draw(samples) if draw and penalty else drawn
        shares, found = group.shares(batches.whole, samples), torch.zeros_like(totals)
        for c, other, x_part, y_part in zip(
            drawn, others, torch.split(x, shares), torch.split(y, shares), strict=False
        ):
            found += point.accumulate(c, other, x_part, y_part, share=len(y_part) / batches.whole)
        if alone:
            group.sum_(weights.grad)
        group.sum_(found)  # at every step, so that a checkpoint holds what all processes have seen
        totals += found
        examples += batches.whole
        scaler.unscale_(stepper)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(moving, clip)
        if regulariser:
            regulariser(gradients)
        scaler.step(stepper)
        scaler.update()
        if iteration in collect:
            snapshots.append(Snapshot(vertices[list(trainable)].clone(), weights.buffers()))
        if iteration % batches.per_epoch == 0 or iteration == iterations:
            loss, accuracy = (totals / examples).tolist()
            epoch = Epoch(-(-iteration // batches.per_epoch), schedule(iteration), loss, accuracy, examples)
            if not math.isfinite(epoch.loss):
                raise DivergedError(
                    f"the training loss is {epoch.loss} in epoch {epoch.number}: "
                    f"lower the learning rate (it is {epoch.rate:g} now)"
                )
            on_epoch(epoch)
            totals, examples = torch.zeros_like(totals), 0
        on_step(iteration, state)
    return snapshots


@dataclass(frozen=True, eq=False)
class _Point:
    """Writes a point ``c @ V`` into the network and tells the trainable vertices what the loss there says."""

    weights: FlatWeights
    vertices: Tensor
    trainable: list[int]
    gradients: Tensor  # (T, P); the network's own where T = 1
    decay: float
    penalty: Penalty | None
    precision: torch.dtype
    scaler: torch.amp.GradScaler
    group: Group

    def accumulate(self, c: Tensor, other: Tensor, x: Tensor, y: Tensor, share: float) -> Tensor:
        """Add ``share * c[k] * g`` at ``c @ V`` to each trainable vertex's gradient.

        Where several vertices move, g is the sum of all processes': it is P long, and their gradients are T x P. Where
        one moves, its gradient is this process's; the loop adds them up once all points are through.

        Returns:
            (2,) the sum of the losses over the examples, and how many the network got right.
        """
        grad = self.weights.grad
        alone = self.gradients.data_ptr() == grad.data_ptr()
        if alone:
            share *= c[self.trainable[0]].item()
        else:
            grad.zero_()
        # Of a batch smaller than the number of processes, some get nothing.
        found = self._pass(c, other, x, y, share) if len(y) else torch.zeros(2, device=grad.device)
        if not alone:
            self.group.sum_(grad)
            self.gradients.addr_(c.to(grad.device)[self.trainable], grad)
        return found

    def _pass(self, c: Tensor, other: Tensor, x: Tensor, y: Tensor, share: float) -> Tensor:
        """Add ``share * g`` to the network's gradient."""
        if self.penalty:
            with torch.no_grad():
                compared = self._logits(other, x)
        logits = self._logits(c, x)
        loss = cross_entropy(logits, y)
        objective = loss + self.penalty(logits, compared) if self.penalty else loss
        self.scaler.scale(objective * share).backward()  # type: ignore[no-untyped-call]
        if self.decay:
            self.weights.grad.add_(self.weights.vector, alpha=self.decay * share * self.scaler.get_scale())
        return torch.stack([loss.detach() * len(y), (logits.detach().argmax(1) == y).sum()])

    def _logits(self, c: Tensor, x: Tensor) -> Tensor:
        torch.mv(self.vertices.T, c.to(self.vertices.device), out=self.weights.vector)
        with torch.autocast(x.device.type, self.precision, enabled=self.precision != torch.float32):
            logits: Tensor = self.weights.module(x)
        return logits.float()


def _restore(
    state: State, weights: FlatWeights, moving: Sequence[Tensor], stepper: Optimizer, scaler: torch.amp.GradScaler
) -> None:
    with torch.no_grad():
        for vertex, saved in zip(moving, state.vertices, strict=True):
            vertex.copy_(saved)
    weights.load_buffers(state.buffers)
    stepper.load_state_dict({"state": state.optimiser, "param_groups": stepper.state_dict()["param_groups"]})
    if state.scaler:
        scaler.load_state_dict(state.scaler)
