"""The training loss: the task's, with label smoothing and class weights, or a function of your own.

Training minimises it, and nothing else uses it: held-out and test data, calibration and every measurement of weight
space are scored by the task's plain negative log-likelihood.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ensembler import task
from ensembler.data.datasets import Dataset
from ensembler.errors import UsageError
from ensembler.naming import import_object, reason
from ensembler.task import Classification
from ensembler.text import some
from ensembler.trainers.settings import Settings

__all__ = ["Losses", "check_loss", "training_loss"]

Losses = Callable[[Tensor, Tensor], Tensor]
"""Maps outputs (B, O) and targets (B,) to the loss (B,) of each example."""


def training_loss(settings: Settings, dataset: Dataset, device: torch.device) -> Losses:
    """Return the loss that the settings ask for.

    Class weights are scaled to a mean of 1 over the training examples. A batch's loss is the sum of its examples'
    weighted losses, divided by their number: unlike PyTorch's weighted mean, this is the same however a batch is split.

    Raises:
        UsageError: options that do not go together, weights that do not fit the classes, or a loss of one's own that
            cannot be imported or called.
    """
    meaning, smoothing = task.find(dataset.task), settings.label_smoothing
    weighted = settings.class_weights != "none"
    if not (smoothing or weighted):
        return meaning.losses if settings.loss == "task" else _own(settings.loss, device)
    flag = "--label-smoothing" if smoothing else "--class-weights"
    if settings.loss != "task":
        raise UsageError(f"{flag} is part of cross entropy, which --loss {settings.loss} replaces: leave one out")
    if not isinstance(meaning, Classification) or type(meaning).losses is not Classification.losses:
        raise UsageError(
            f"{flag} is part of cross entropy, which is not the loss of the task {dataset.task}: leave it out"
        )
    weights = _class_weights(settings.class_weights, dataset.class_counts).to(device) if weighted else None
    return partial(meaning.losses, label_smoothing=smoothing, class_weights=weights)


def _class_weights(text: str, counts: Mapping[str, int]) -> Tensor:
    """Return the weights (C,) with a mean of 1 over the training examples.

    ``balanced`` gives every class the same share of the loss, as scikit-learn's ``class_weight`` does; otherwise
    ``text`` holds numbers.
    """
    sizes = torch.tensor(list(counts.values()), dtype=torch.float64)
    if text == "balanced":
        if absent := [name for name, count in counts.items() if not count]:
            raise UsageError(
                f"balanced class weights need training examples of every class, and there are none of "
                f"{some(absent, 3)}: give --class-weights a number for each class"
            )
        weights = 1 / sizes
    else:
        weights = torch.tensor(_numbers(text), dtype=torch.float64)
    if len(weights) != len(sizes):
        raise UsageError(f"--class-weights has {len(weights)} numbers, and there are {len(sizes)} classes: one each")
    if not (weights.isfinite().all() and (weights >= 0).all() and weights @ sizes > 0):
        raise UsageError("--class-weights must be finite, none negative, and positive for a class with training images")
    return (weights * sizes.sum() / (weights @ sizes)).float()


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"--class-weights {text!r} is neither balanced nor none, nor numbers as in 1,2.5,1, nor a file of numbers"
        ) from error


def _own(name: str, device: torch.device) -> Losses:
    """Return the loss of that name; where it computes the mean over a batch, every example gets that.

    Raises:
        UsageError: it cannot be imported or called, or is a module with weights of its own.
    """
    loss = _imported(name, device)

    def losses(outputs: Tensor, targets: Tensor) -> Tensor:
        found: Tensor = loss(outputs, targets)
        return found if found.dim() else found.expand(len(targets))

    return losses


def _imported(name: str, device: torch.device) -> Callable[..., Any]:
    found = import_object(name, "loss")
    if isinstance(found, type) or not callable(found):
        what = f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
        raise UsageError(f"the loss {name} is {what}, expected a function of outputs and targets, or an instance")
    if isinstance(found, nn.Module):
        if weights := [key for key, weight in found.named_parameters() if weight.requires_grad]:
            raise UsageError(
                f"the loss {name} has weights of its own ({weights[0]}), which would not be trained: register them as "
                "buffers"
            )
        return copy.deepcopy(found).to(device)
    return found


def check_loss(name: str, outputs: Tensor, targets: Tensor) -> None:
    """Refuse a loss of one's own that training cannot use, by what it makes of some examples.

    Args:
        name: the loss's.
        outputs: (B, O) float32, a network's.
        targets: (B,).

    Raises:
        UsageError: it fails, or returns no finite loss of each example or mean of them, or has no finite gradient.
    """
    loss, count = _imported(name, outputs.device), 4 if outputs.shape[1] == 3 else 3  # another number than outputs
    rows = torch.arange(count, device=outputs.device) % len(targets)
    leaf, y = outputs.detach()[rows].requires_grad_(), targets[rows]
    given = leaf * 1
    said = f"the loss {name}, given outputs ({count}, {outputs.shape[1]}) and targets ({count},),"
    found = _called(said, loss, given, y)
    if not (torch.equal(given, leaf) and torch.equal(y, targets[rows])):
        raise UsageError(f"{said} changes them in place: use no operation in place there")
    if found.dim() and found.shape != y.shape:
        raise UsageError(
            f"{said} returns {tuple(found.shape)}, expected a loss of each example, ({count},), or the mean"
        )
    if not found.is_floating_point():
        raise UsageError(f"{said} returns {str(found.dtype).removeprefix('torch.')}, expected float32")
    if not found.isfinite().all():
        value = found[~found.isfinite()].flatten()[0].item()
        raise UsageError(f"{said} returns {value}: it must be finite, also for a wrong answer")
    if not found.requires_grad:
        raise UsageError(f"{said} returns a loss without a gradient: leave out detach(), item() and no_grad()")
    (gradient,) = torch.autograd.grad(found.sum(), leaf, allow_unused=True)
    if gradient is None or not gradient.isfinite().all():
        problem = "a gradient that is not finite" if gradient is not None else "no gradient in the outputs"
        raise UsageError(f"{said} has {problem}: compute it from the outputs by differentiable operations")
    if found.dim() == 0 and _doubles(found, _called(said, loss, leaf.repeat(2, 1), y.repeat(2))):
        raise UsageError(f"{said} returns a sum over the examples: return their mean, or the loss of each")


def _doubles(once: Tensor, twice: Tensor) -> bool:
    """Return whether the loss of examples given twice is twice theirs, as a sum is and no mean."""
    return once.item() != 0 and math.isclose(twice.item(), 2 * once.item(), rel_tol=1e-4)


def _called(said: str, loss: Callable[..., Any], *given: Tensor) -> Tensor:
    try:
        found = loss(*given)
    except Exception as error:  # whatever a user's code raises
        raise UsageError(f"{said} fails: {reason(error)}") from error
    if not isinstance(found, Tensor):
        raise UsageError(f"{said} returns a {type(found).__name__}, expected a tensor: leave out item() and numpy()")
    return found
