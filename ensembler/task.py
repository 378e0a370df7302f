"""What a network's outputs mean: the training loss, the predictive distribution, and its scores.

A :class:`Task` is all that the training loop, the ensemble and the evaluation know about outputs and targets.
:class:`Classification` is built in. Your own is any subclass: a run's manifest names it as ``package.module:Class``,
and it is imported from there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from ensembler.errors import DivergedError, UsageError
from ensembler.naming import import_object

if TYPE_CHECKING:
    from torch import Tensor

_Float = TypeVar("_Float", bound=np.floating[Any])

__all__ = ["TINY", "Classification", "Task", "check_finite", "find", "not_finite", "softmax"]

TINY = float(np.finfo(np.float32).tiny)
"""Smallest probability whose logarithm is computed; smaller ones count as this."""


class Task(ABC):
    """The meaning of outputs. Shapes: ``B`` examples, ``M`` members, ``O`` outputs, ``D`` numbers per distribution.

    Attributes:
        name: its name in manifests.
        metric: the name of what :meth:`metrics` computes, shown beside the loss during training.
    """

    name: ClassVar[str]
    metric: ClassVar[str]

    def outputs(self, classes: int) -> int:
        """Return the network's number of outputs for a dataset's number of classes."""
        return classes

    @abstractmethod
    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the training loss (B,) of each example, differentiable in ``outputs`` (B, O)."""

    @abstractmethod
    def metrics(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute a second number (B,) per example, whose mean is shown during training; see :attr:`metric`."""

    @abstractmethod
    def distances(self, outputs: Tensor, others: Tensor) -> Tensor:
        """Compute the squared distance (B,) between the distributions of two outputs (B, O), differentiably."""

    @abstractmethod
    def distribution(self, outputs: Tensor) -> Tensor:
        """Compute one member's predictive distribution (..., D) from its outputs (..., O)."""

    @abstractmethod
    def combine(self, members: Tensor) -> Tensor:
        """Compute the ensemble's predictive distribution (B, D) from its members' (M, B, D)."""

    @abstractmethod
    def nll(self, predicted: Tensor, targets: Tensor) -> float:
        """Compute the mean negative log-likelihood of the targets under ``predicted`` (B, D), in nats."""

    @abstractmethod
    def error(self, predicted: Tensor, targets: Tensor) -> float:
        """Compute the mean error of ``predicted`` (B, D); lower is better."""

    @abstractmethod
    def scores(self, members: Tensor, targets: Tensor) -> dict[str, float | None]:
        """Compute an ensemble's scores from its members' distributions (M, B, D); ``None`` if undefined for M = 1."""

    @abstractmethod
    def disagreement(self, members: Tensor) -> float:
        """Compute how much the members' distributions (M, B, D) differ; 0 for one member."""


class Classification(Task):
    """One of C classes: cross entropy on logits, and the mean of the members' probabilities, not of their logits."""

    name = "classification"
    metric = "accuracy"

    def losses(
        self,
        outputs: Tensor,
        targets: Tensor,
        *,
        label_smoothing: float = 0.0,
        class_weights: Tensor | None = None,
    ) -> Tensor:
        """Compute the cross entropy (B,) of each example, in nats.

        Args:
            outputs: (B, C) logits.
            targets: (B,) int64 classes.
            label_smoothing: E, share of the target's probability that is spread evenly over all C classes (Szegedy et
                al. 2016, sec. 7).
            class_weights: (C,) factor of the loss of each class.
        """
        from torch.nn.functional import cross_entropy

        return cross_entropy(outputs, targets, class_weights, reduction="none", label_smoothing=label_smoothing)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.argmax(1) == targets

    def distances(self, outputs: Tensor, others: Tensor) -> Tensor:
        """Compute twice the squared Hellinger distance, ``sum_c (sqrt p_c - sqrt q_c)^2``, in [0, 2]."""
        roots, other_roots = (self.distribution(each).sqrt() for each in (outputs, others))
        return (roots - other_roots).square().sum(dim=1)

    def distribution(self, outputs: Tensor) -> Tensor:
        return outputs.float().softmax(dim=-1)

    def combine(self, members: Tensor) -> Tensor:
        return members.mean(dim=0)

    def nll(self, predicted: Tensor, targets: Tensor) -> float:
        return -predicted.gather(1, targets[:, None]).clamp_min(TINY).log().double().mean().item()

    def error(self, predicted: Tensor, targets: Tensor) -> float:
        return (predicted.argmax(1) != targets).double().mean().item()

    def scores(self, members: Tensor, targets: Tensor) -> dict[str, float | None]:
        """Compute ``accuracy``, ``nll``, the mean ``member_accuracy`` and the pairwise ``disagreement``."""
        mean = self.combine(members)
        return {
            "accuracy": 1 - self.error(mean, targets),
            "nll": self.nll(mean, targets),
            "member_accuracy": (members.argmax(2) == targets).double().mean().item(),
            "disagreement": None if len(members) == 1 else self.disagreement(members),
        }

    def disagreement(self, members: Tensor) -> float:
        """Compute the share of pairs of members that predict different classes, in [0, 1]."""
        from ensembler.uncertainty import disagreement

        shares = disagreement(members.numpy())
        return 0.0 if shares is None else float(shares.mean())


def not_finite(outputs: Tensor) -> bool:
    """Return whether outputs hold NaN or infinity; minus infinity is a logit, of a class that is left out."""
    return bool((outputs.isnan() | outputs.isposinf()).any())


def check_finite(outputs: Tensor, whose: str) -> None:
    """Refuse outputs that are not finite, of which no score or probability could be made.

    Args:
        outputs: of any shape.
        whose: the subject of the message, such as ``"member 2"``.

    Raises:
        DivergedError: they hold NaN or infinity.
    """
    if not_finite(outputs):
        raise DivergedError(
            f"{whose} answers with numbers that are not finite (NaN or infinity) in evaluation mode, although its "
            "weights are finite: train with a lower learning rate, or mend the network's forward"
        )


def find(name: str) -> Task:
    """Return the task that a manifest names.

    Raises:
        UsageError: ``name`` is neither a task of this package nor an importable ``package.module:Class``.
    """
    if name == Classification.name:
        return Classification()
    task = import_object(name, "task")
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise UsageError(f"{name} is not a task: name a subclass of ensembler.task.Task")
    return task()


def softmax(logits: NDArray[_Float]) -> NDArray[_Float]:
    """Return the probabilities of logits (..., C), of their type. NumPy, for where torch is not installed."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))
