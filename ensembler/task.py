"""What a network's outputs mean: the loss that training minimises, the distribution they predict, and its scores.

A :class:`Task` is all that the training loop, the ensemble and the evaluation know of outputs and targets.
:class:`Classification` is the one of this package. Another is any subclass; a run names it in its manifest, as
``package.module:Class``, and finds it there again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from ensembler.errors import UsageError
from ensembler.naming import imported

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TINY", "Classification", "Task", "find", "softmax"]

TINY = float(np.finfo(np.float32).tiny)
"""The smallest probability whose logarithm is taken."""


class Task(ABC):
    """What outputs mean. Shapes: ``B`` examples, ``M`` members, ``O`` outputs, ``D`` numbers of a distribution.

    Attributes:
        name: in manifests.
        metric: what :meth:`metrics` counts; shown beside the loss in training.
    """

    name: ClassVar[str]
    metric: ClassVar[str]

    def outputs(self, classes: int) -> int:
        """How many outputs the network has, for a dataset of so many classes."""
        return classes

    @abstractmethod
    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The training loss (B,) of each example, differentiable in ``outputs`` (B, O)."""

    @abstractmethod
    def metrics(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """A second number (B,) of each example, whose mean is shown in training; see :attr:`metric`."""

    @abstractmethod
    def distances(self, outputs: Tensor, others: Tensor) -> Tensor:
        """The squared distance (B,) between the distributions that two outputs (B, O) predict, differentiable."""

    @abstractmethod
    def distribution(self, outputs: Tensor) -> Tensor:
        """The predictive distribution (..., D) of one member, from its outputs (..., O)."""

    @abstractmethod
    def combine(self, members: Tensor) -> Tensor:
        """The ensemble's predictive distribution (B, D), from its members' (M, B, D)."""

    @abstractmethod
    def nll(self, predicted: Tensor, targets: Tensor) -> float:
        """Mean negative log-likelihood of the targets under ``predicted`` (B, D), in nats."""

    @abstractmethod
    def error(self, predicted: Tensor, targets: Tensor) -> float:
        """Mean error of ``predicted`` (B, D); lower is better."""

    @abstractmethod
    def scores(self, members: Tensor, targets: Tensor) -> dict[str, float | None]:
        """The scores of an ensemble, from its members' distributions (M, B, D); ``None``: one member cannot say."""

    @abstractmethod
    def disagreement(self, members: Tensor) -> float:
        """How far the members (M, B, D) differ in what they predict; 0 for one member."""


class Classification(Task):
    """One of C classes: cross entropy on logits, and the mean of the members' probabilities, never of their logits."""

    name = "classification"
    metric = "accuracy"

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        from torch.nn.functional import cross_entropy

        return cross_entropy(outputs, targets, reduction="none")

    def metrics(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.argmax(1) == targets

    def distances(self, outputs: Tensor, others: Tensor) -> Tensor:
        """The squared Hellinger distance ``sum_c (sqrt p_c - sqrt q_c)^2``, in [0, 2]."""
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
        """``accuracy``, ``nll``, the mean ``member_accuracy`` and the pairwise ``disagreement``."""
        mean = self.combine(members)
        return {
            "accuracy": 1 - self.error(mean, targets),
            "nll": self.nll(mean, targets),
            "member_accuracy": (members.argmax(2) == targets).double().mean().item(),
            "disagreement": None if len(members) == 1 else self.disagreement(members),
        }

    def disagreement(self, members: Tensor) -> float:
        """Share of the pairs of members whose classes differ, in [0, 1]."""
        from ensembler.uncertainty import disagreement

        found = disagreement(members.numpy())
        return 0.0 if found is None else float(found.mean())


def find(name: str) -> Task:
    """The task of a manifest.

    Raises:
        UsageError: ``name`` is neither a task of this package nor an importable ``package.module:Class``.
    """
    if name == Classification.name:
        return Classification()
    task = imported(name, "task")
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise UsageError(f"{name} is no task: name a subclass of ensembler.task.Task")
    return task()


def softmax(logits: NDArray[np.floating]) -> NDArray[np.floating]:
    """Probabilities of logits (..., C), of their type. NumPy, for where no torch is."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))
