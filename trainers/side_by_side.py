"""The training loop, G members at a time: independent networks of one kind, trained side by side.

A small network leaves most of a GPU idle. Here one forward and one backward pass serve G members: the vertices are one
tensor (G, P), each parameter is a view (G, ...) of it, and ``torch.func.vmap`` runs the network on all of them, a
convolution as one that is grouped by member, a matrix product as a batched one. One optimiser steps them all.

No member knows of the others. Each has its own weights, images, BatchNorm statistics and gradient norm, and ends where
it would have ended alone, but for rounding and for its dropout masks, which are others. In float16 they share the scale
of the loss: a step that overflows in one is left out by all.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from ensembler.errors import DivergedError, UsageError
from ensembler.seeds import derive
from ensembler.trainers.batches import Batches
from ensembler.trainers.loop import Epoch
from ensembler.trainers.schedules import Schedule, one_cycle
from ensembler.trainers.session import PRECISIONS, Session, Solution, stack_buffers
from ensembler.weights import FlatWeights

__all__ = ["solutions", "train"]

Tensors = dict[str, Tensor]


def solutions(session: Session, members: Sequence[int]) -> list[Solution]:
    """What ``session.solution`` gives for each of the members, all of them trained at once.

    Each is booked under a part of its own: the seconds shared out evenly; as peak memory that of all together, since so
    much was held. No checkpoint is kept before they are finished: until then, a resumed run trains them anew.

    Args:
        session: not begun from a solution.
        members: G different numbers.

    Returns:
        G solutions, in the order of ``members``.

    Raises:
        UsageError: ``torch.func.vmap`` cannot run the network. DivergedError: a loss is not finite.
    """
    settings, parts = session.settings, [f"solution {member + 1}" for member in members]
    beginnings = [session.fresh(member) for member in members]
    vertices = torch.stack([beginning.vector for beginning in beginnings])
    buffers = {name: rows.to(session.device) for name, rows in stack_buffers(beginnings).items()}
    del beginnings  # as large as the vertices
    iterations = session.iterations(settings.epochs)
    epochs = -(-iterations // session.per_epoch)
    for _ in parts:
        session.next_number()  # what is trained after these keeps its number
    with ExitStack() as stack:
        booked = [stack.enter_context(session.booked(part)) for part in parts]
        batches = [stack.enter_context(closing(session.batches(part))) for part in parts]
        stack.enter_context(torch.random.fork_rng([session.device] if session.device.type == "cuda" else []))
        torch.manual_seed(derive(settings.seed, "dropout", *parts))
        buffers = train(
            session.weights,
            vertices,
            buffers,
            batches,
            session.optimiser,
            one_cycle(settings.rate, iterations),
            iterations,
            clip=settings.clip,
            precision=PRECISIONS[settings.precision],
            compiled=settings.compile,
            on_epoch=lambda g, epoch: session.note(parts[g], booked[g], epoch, epochs),
        )
    for part in booked:
        part.seconds = round((part.seconds or 0.0) / len(parts), 3)
    return [Solution(vertex, {name: rows[g] for name, rows in buffers.items()}) for g, vertex in enumerate(vertices)]


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        # What vmap has no rule for runs once for each member; few as they are, that is no loss.
        warnings.filterwarnings("ignore", "There is a performance drop")
        # A view of (G, P) has gaps.
        warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout contract")
        yield


@_quietly()
def train(
    weights: FlatWeights,
    vertices: Tensor,
    buffers: Tensors,
    batches: Sequence[Batches],
    optimiser: Callable[[list[Tensor]], Optimizer],
    schedule: Schedule,
    iterations: int,
    *,
    clip: float | None = None,
    precision: torch.dtype = torch.float32,
    compiled: bool = False,
    on_epoch: Callable[[int, Epoch], None] = lambda g, epoch: None,
) -> Tensors:
    """Train all of the vertices, in place. What is not explained here is as in :func:`ensembler.trainers.loop.train`.

    Args:
        weights: the network that all of them are weights of; its own are neither read nor written.
        vertices: (G, P), on the network's device.
        buffers: name to (G, ...), each member's own.
        batches: G streams, one a member, whose batches are of the same sizes.
        optimiser: makes the optimiser of one (G, P) tensor; one that treats each element by itself, as SGD does.
        clip: the largest norm of each member's gradient.
        compiled: whether the network runs by ``torch.compile``.
        on_epoch: called at the end of each epoch for every member, with its place, 0 to G - 1.

    Returns:
        The buffers (G, ...) at the end.

    Raises:
        UsageError: ``torch.func.vmap`` cannot run the network. DivergedError: a loss is not finite.
    """
    moving = vertices.detach().requires_grad_()
    moving.grad = gradients = torch.zeros_like(vertices)
    stepper = optimiser([moving])
    scaler = torch.amp.GradScaler(vertices.device.type, enabled=precision == torch.float16)
    weights.module.train()
    forward = _forward(weights.module, precision, compiled)
    parameters = _parameters(weights, vertices, gradients)
    totals, examples = torch.zeros(len(vertices), 2, device=vertices.device), 0
    for iteration in range(1, iterations + 1):
        for group in stepper.param_groups:
            group["lr"] = schedule(iteration)
        images, labels = zip(*map(next, batches), strict=True)
        x, y = torch.stack(images, dim=1), torch.stack(labels)  # (B, G, 3, H, W), as grouped convolutions want it
        gradients.zero_()
        logits, buffers = forward(parameters, buffers, x)
        losses = cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y).mean(1)
        scaler.scale(losses.sum()).backward()  # type: ignore[no-untyped-call]
        totals += torch.stack([losses.detach() * y.shape[1], (logits.detach().argmax(2) == y).sum(1)], dim=1)
        examples += y.shape[1]
        scaler.unscale_(stepper)
        if clip is not None:
            gradients.mul_((clip / (torch.linalg.vector_norm(gradients, dim=1, keepdim=True) + 1e-6)).clamp(max=1))
        scaler.step(stepper)
        scaler.update()
        if iteration % batches[0].per_epoch == 0 or iteration == iterations:
            number, rate = -(-iteration // batches[0].per_epoch), schedule(iteration)
            for g, (loss, accuracy) in enumerate((totals / examples).tolist()):
                if not math.isfinite(loss):
                    raise DivergedError(
                        f"the training loss is {loss} in epoch {number}: lower the learning rate (it is {rate:g} now)"
                    )
                on_epoch(g, Epoch(number, rate, loss, accuracy, examples))
            totals, examples = torch.zeros_like(totals), 0
    return buffers


def _parameters(weights: FlatWeights, vertices: Tensor, gradients: Tensor) -> Tensors:
    """Each parameter's view (G, ...) of the vertices (G, P); its gradient is one of the gradients (G, P)."""
    views = {}
    for slot in weights._slots:
        size, stride = (len(vertices), *slot.shape), (len(weights), *slot.stride)
        views[slot.name] = vertices.detach().as_strided(size, stride, slot.offset).requires_grad_()
        views[slot.name].grad = gradients.as_strided(size, stride, slot.offset)
    return views


def _forward(
    module: nn.Module, precision: torch.dtype, compiled: bool
) -> Callable[[Tensors, Tensors, Tensor], tuple[Tensor, Tensors]]:
    """Parameters (G, ...), buffers (G, ...) and images (B, G, 3, H, W) to logits (G, B, C) and the buffers after."""
    module = copy.copy(module)  # shares its layers, but is not compiled: here that is done to all members at once

    def member(parameters: Tensors, buffers: Tensors, x: Tensor) -> tuple[Tensor, Tensors]:
        tensors = parameters | buffers
        logits = torch.func.functional_call(module, tensors, (x,))
        return logits, {name: tensors[name] for name in buffers}  # a network may put another tensor in a buffer's place

    members = torch.func.vmap(member, in_dims=(0, 0, 1), randomness="different")
    if compiled:
        members = torch.compile(members)

    def forward(parameters: Tensors, buffers: Tensors, x: Tensor) -> tuple[Tensor, Tensors]:
        try:
            with torch.autocast(x.device.type, precision, enabled=precision != torch.float32):
                logits, after = members(parameters, buffers, x)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            message = f"the members cannot be trained side by side: leave --parallel-members out ({reason})"
            raise UsageError(message) from error
        return logits.float(), after

    return forward
