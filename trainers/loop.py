"""The one training loop: every method of this room is a choice of its arguments.

A step draws coefficients ``c``, writes ``c @ V`` into the network, runs it forward and backward, and gives each
trainable vertex ``k`` its gradient ``c[k] * g``, plus the method's regulariser; any ``torch.optim`` optimiser does
the rest. A single network is the case ``K = 1``, ``c = [1]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from ensembler.datasets import Split, augment, normalise
from ensembler.errors import DivergedError, UsageError
from ensembler.trainers.schedules import Schedule
from ensembler.weights import FlatWeights

__all__ = ["Batches", "Epoch", "Snapshot", "train"]

Draw = Callable[[int], Tensor]
Regulariser = Callable[[Tensor], None]
Penalty = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Snapshot:
    """The trainable vertices (T, P) and the network's buffers at one iteration."""

    vertices: Tensor
    buffers: dict[str, Tensor]


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
    collect: Container[int] = (),
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
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
        collect: the iterations after which a snapshot is taken.
        on_epoch: called at the end of each epoch, and of the last, unfinished one.

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
    weights.module.train()
    snapshots: list[Snapshot] = []
    totals, examples = torch.zeros(2, device=vertices.device), 0
    for iteration in range(1, iterations + 1):
        for group in stepper.param_groups:
            group["lr"] = schedule(iteration)
        x, y = next(batches)
        gradients.zero_()
        drawn = draw(samples) if draw else torch.ones(samples, 1)
        seconds = draw(samples) if draw and penalty else drawn
        for c, second, x_part, y_part in zip(drawn, seconds, x.chunk(samples), y.chunk(samples), strict=False):
            compare = _comparison(weights, vertices, second, x_part, penalty) if penalty else None
            share = len(y_part) / len(y)
            totals += _accumulate(weights, vertices, c, x_part, y_part, share, trainable, gradients, decay, compare)
        examples += len(y)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(moving, clip)
        if regulariser:
            regulariser(gradients)
        stepper.step()
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
    return snapshots


def _comparison(
    weights: FlatWeights, vertices: Tensor, c: Tensor, x: Tensor, penalty: Penalty
) -> Callable[[Tensor], Tensor]:
    """The penalty as a function of the first point's logits, the second's being known."""
    torch.mv(vertices.T, c.to(vertices.device), out=weights.vector)
    with torch.no_grad():
        logits = weights.module(x)
    return lambda first: penalty(first, logits)


def _accumulate(
    weights: FlatWeights,
    vertices: Tensor,
    c: Tensor,
    x: Tensor,
    y: Tensor,
    share: float,
    trainable: Sequence[int],
    gradients: Tensor,
    decay: float,
    compare: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Add ``share * c[k] * g`` at the point ``c @ V`` to each trainable vertex's gradient.

    Returns:
        (2,) the sum of the losses over the examples, and how many the network got right.
    """
    on_device = c.to(vertices.device)
    torch.mv(vertices.T, on_device, out=weights.vector)
    logits = weights.module(x)
    loss = cross_entropy(logits, y)
    objective = loss + compare(logits) if compare else loss
    alone = gradients.data_ptr() == weights.grad.data_ptr()
    if alone:
        share *= c[trainable[0]].item()
    else:
        weights.grad.zero_()
    (objective * share).backward()  # type: ignore[no-untyped-call]
    if decay:
        weights.grad.add_(weights.vector, alpha=decay * share)
    if not alone:
        gradients.addr_(on_device[list(trainable)], weights.grad)
    return torch.stack([loss.detach() * len(y), (logits.detach().argmax(1) == y).sum()])


class Batches(Iterator[tuple[Tensor, Tensor]]):
    """An endless, seeded stream of shuffled, augmented and normalised batches.

    Every epoch holds every example once; its last batch may be smaller. All of it happens on whole batches of
    tensors, on the device the images lie on.

    Args:
        split: the training images.
        size: B, images a batch.
        augmentation: see :func:`ensembler.datasets.augment`.
        mean, std: of the normalisation.
        generator: a CPU generator; the only source of randomness.
    """

    def __init__(
        self,
        split: Split,
        size: int,
        augmentation: str,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        generator: torch.Generator,
    ) -> None:
        if size < 1:
            raise UsageError(f"the batch size must be at least 1, not {size}")
        self._split, self._size, self._augmentation = split, size, augmentation
        self._mean, self._std, self._generator = mean, std, generator
        self._order = torch.empty(0, dtype=torch.int64)
        self.per_epoch = -(-len(split) // size)

    def __next__(self) -> tuple[Tensor, Tensor]:
        if not len(self._order):
            self._order = torch.randperm(len(self._split), generator=self._generator)
        index, self._order = self._order[: self._size], self._order[self._size :]
        batch = self._split[index.to(self._split.images.device)]
        images = augment(batch.images, self._augmentation, self._generator)
        return normalise(images, self._mean, self._std), batch.labels
