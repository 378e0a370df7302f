"""The loss and metric of held-out examples after an epoch, measured without a change to the training."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ensembler.networks.capture import Captured, Graph
from ensembler.task import Task
from ensembler.trainers.distributed import Group
from ensembler.weights import FlatWeights

__all__ = ["HeldOut", "HeldOutBatches"]

HeldOutBatches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Yields this process's share of the held-out examples: inputs (b, ...) and targets (b,), on the device."""


class HeldOut:
    """Measures held-out examples in evaluation mode.

    Afterwards the network's buffers and mode are those of before, and the loop seeds the random generators and writes
    the weights at every step: what is trained does not depend on it. The host waits once, at the end.

    Args:
        weights: the network.
        task: what its outputs mean.
        outputs: computes the outputs (b, O) of inputs (b, ...).
        group: the processes that train together: each measures its share, with the first one's buffers.
        graph: makes the graphs in which the forward pass is captured, if it is.
    """

    def __init__(
        self,
        weights: FlatWeights,
        task: Task,
        outputs: Callable[[Tensor], Tensor],
        group: Group,
        graph: Callable[[], Graph] | None,
    ) -> None:
        self._weights, self._task, self._outputs, self._group = weights, task, outputs, group
        self._sums = torch.zeros(3, device=weights.vector.device)
        # Where a network cannot be captured, its training has said so.
        self._add = Captured(self._predict, lambda text: None, graph) if graph else self._predict

    def measure(self, batches: HeldOutBatches) -> tuple[float, float]:
        """Return the mean loss and metric."""
        module, before = self._weights.module, self._weights.buffers()
        self._weights.load_buffers({name: self._group.broadcast_(own.clone()) for name, own in before.items()})
        module.eval()
        self._sums.zero_()
        for x, y in batches():
            self._add(len(y), x, y)
        module.train()
        self._weights.load_buffers(before)
        self._group.sum_(self._sums)
        loss, metric, count = self._sums.tolist()
        return loss / count, metric / count

    def _predict(self, size: int, x: Tensor, y: Tensor) -> None:
        with torch.no_grad():
            outputs = self._outputs(x)
            losses, metrics = self._task.losses(outputs, y), self._task.metrics(outputs, y)
            self._sums += torch.stack([losses.sum(), metrics.sum(), torch.ones_like(losses).sum()])
