"""Losses and errors at points of weight space; their forward passes are counted in the cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ensembler.data.examples import Examples
from ensembler.networks import buffers as carried
from ensembler.networks.batchnorm import has_batchnorm
from ensembler.networks.buffers import BATCHNORM_EXAMPLES, Start
from ensembler.seeds import generator
from ensembler.subspace import dirichlet, edge_lengths, log_volume
from ensembler.task import Task, check_finite
from ensembler.text import some
from ensembler.trainers.trainer import Trainer

__all__ = ["Point", "averages", "describe", "inside", "member_buffers", "path_scores", "points"]

Buffers = Mapping[str, Tensor]
"""A network's buffers by name."""
Solved = Mapping[int, Buffers]
"""The own buffers of vertices that are trained networks by themselves, by their place."""

INSIDE = 4  # interior points at which a simplex is measured
EXAMPLES = 1000  # training examples, and held-out examples, used for a measurement at most

_ENDS = 4  # vertices, between which averages are measured, at most
_AVERAGED = 500  # training examples, and held-out examples, for that, at most

_NONE: Solved = {}


@dataclass(frozen=True, eq=False)
class Point:
    """One point of weight space.

    Attributes:
        train_loss: mean negative log-likelihood on training examples, in nats.
        predicted: (N, D) predictive distributions of held-out examples.
        targets: (N,) their targets.
        task: what outputs and targets mean.
    """

    train_loss: float
    predicted: Tensor
    targets: Tensor
    task: Task

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood on the held-out examples, in nats."""
        return self.task.nll(self.predicted, self.targets)

    @property
    def losses(self) -> NDArray[np.float64]:
        """(N,) negative log-likelihood of each held-out example, in nats."""
        pairs = zip(torch.split(self.predicted, 1), torch.split(self.targets, 1), strict=True)
        return np.array([self.task.nll(*pair) for pair in pairs])

    def error(self, other: Point | None = None) -> float:
        """Compute the error on the held-out examples; with ``other``, that of the ensemble of the two points."""
        members = [self.predicted] if other is None else [self.predicted, other.predicted]
        return self.task.error(self.task.combine(torch.stack(members)), self.targets)


def points(
    trainer: Trainer,
    vertices: Tensor,
    coefficients: Tensor,
    buffers: Buffers,
    held_out: Examples,
    examples: int = EXAMPLES,
    solved: Solved = _NONE,
) -> list[Point]:
    """Measure points on a fixed sample of at most ``examples`` training examples, and of as many held-out examples.

    BatchNorm statistics are recomputed for each point, from the sample of training examples, except at ``solved``
    vertices.

    Args:
        trainer: provides the network.
        vertices: (K, P).
        coefficients: (M, K).
        buffers: of any point; BatchNorm statistics are ignored.
        held_out: a split of the trainer's dataset.
        examples: size of each sample, at most.
        solved: see :func:`member_buffers`.
    """
    train, unseen = _subset(trainer.train_examples, examples), _subset(held_out, examples)
    starts = _starts(coefficients, buffers, solved)

    def measure() -> list[Point]:
        result = list[Point]()
        each = len(train) + len(unseen)
        for row, start in zip(coefficients, starts, strict=True):
            trainer.show("measurements", len(result) * each, len(starts) * each)
            own = carried.member_buffers(trainer.weights, vertices, row[None], train, trainer.record, [start])
            trainer.weights.load_buffers({name: rows[0] for name, rows in own.items()})
            loss = trainer.task.nll(_predict(trainer, train), train.labels.cpu())
            result.append(Point(loss, _predict(trainer, unseen), unseen.labels.cpu(), trainer.task))
        trainer.show("measurements", len(starts) * each, len(starts) * each)
        return result

    with trainer.ledger.entry("measurements", trainer.device) as entry:
        entry.forward_passes += len(coefficients) * (len(train) + len(unseen))
        entry.forward_passes += _recomputed(trainer, starts) * len(train)
        return trainer.group.from_first(measure)


def member_buffers(
    trainer: Trainer,
    vertices: Tensor,
    coefficients: Tensor,
    buffers: Buffers | Sequence[Buffers],
    solved: Solved = _NONE,
) -> dict[str, Tensor]:
    """Compute the buffers (M, ...) of members as :mod:`ensembler.networks.buffers` says, and count the forward passes.

    They are on the CPU, as a run's are.

    Args:
        trainer: provides the network and the training examples.
        vertices: (K, P).
        coefficients: (M, K).
        buffers: carried by all points, or M of them, by each; BatchNorm statistics are recomputed, except at
            ``solved`` vertices.
        solved: the own buffers of vertices that are trained networks by themselves, by their place: a member that is
            such a vertex keeps them.
    """
    train, starts = trainer.train_examples, _starts(coefficients, buffers, solved)
    with trainer.ledger.entry("members", trainer.device) as entry:
        entry.forward_passes += _recomputed(trainer, starts) * min(len(train), BATCHNORM_EXAMPLES)

        def compute() -> dict[str, Tensor]:
            own = carried.member_buffers(trainer.weights, vertices, coefficients, train, trainer.record, starts)
            if not all(kept for _, kept in starts):
                _say_carried(trainer)
            return {name: rows.cpu() for name, rows in own.items()}

        return trainer.group.from_first(compute)


def _say_carried(trainer: Trainer) -> None:
    """Say which running statistics are not recomputed, as they are of no layer that PyTorch has."""
    if names := carried.own_statistics(trainer.weights, trainer.train_examples, trainer.record):
        trainer.say(
            f"{trainer.settings.architecture} changes buffers of its own in training ({some(names, 3)}): members that "
            "were not trained themselves take them over as they are; those of PyTorch's BatchNorm would be recomputed"
        )


def inside(vertices: int) -> Tensor:
    """Return the coefficients (4, K) of the interior points at which every simplex of K vertices is measured."""
    return dirichlet(INSIDE, vertices, np.random.default_rng(0))


def describe(trainer: Trainer, simplex: Tensor, buffers: Buffers, name: str, solved: Solved = _NONE) -> dict[str, Any]:
    """Measure a simplex (K, P) on held-out examples, and report the result on one line.

    ``buffers`` and ``solved`` as of :func:`member_buffers`.

    Returns:
        ``name``, ``log_volume``, ``edge_lengths``; and, unless the settings say not to measure, the mean ``train_loss``
        and ``held_out_nll`` of the ``vertices``, the ``centroid`` and the points ``inside``, in nats, and the mean
        pairwise ``disagreement`` among the vertices and among the points inside.
    """
    lengths = edge_lengths(simplex).tolist()
    result: dict[str, Any] = {"name": name, "log_volume": log_volume(simplex).item(), "edge_lengths": lengths}
    texts = [f"log volume {result['log_volume']:.2f}, edge lengths {min(lengths):.2f} to {max(lengths):.2f}"]
    if trainer.settings.measure == "all":
        K = len(simplex)
        coefficients = torch.cat([torch.eye(K), torch.full((1, K), 1 / K), inside(K)])
        measured = points(trainer, simplex, coefficients, buffers, trainer.dataset.validation, solved=solved)
        groups = {"vertices": measured[:K], "centroid": measured[K : K + 1], "inside": measured[K + 1 :]}
        result |= {
            "train_loss": {group: _mean([point.train_loss for point in own]) for group, own in groups.items()},
            "held_out_nll": {group: _mean([point.nll for point in own]) for group, own in groups.items()},
            "disagreement": {
                group: trainer.task.disagreement(torch.stack([point.predicted for point in groups[group]]))
                for group in ("vertices", "inside")
            },
        }
        texts += [
            f"{group} loss {result['train_loss'][group]:.4f}, held-out NLL {result['held_out_nll'][group]:.4f}"
            + (f", disagreement {result['disagreement'][group]:.4f}" if group in result["disagreement"] else "")
            for group in groups
        ]
    trainer.say(f"{name}: {'; '.join(texts)}")
    return result


def averages(trainer: Trainer, vertices: Tensor, buffers: Buffers) -> list[dict[str, Any]]:
    """Measure halfway between pairs of vertices (K, P): an average is a good network in one valley of the loss only.

    The barrier on the line between two networks (Frankle et al. 2020, sec. 2), at its middle, among at most four
    vertices: the first, the last, and two between.

    Returns:
        Of each pair ``of``, its two vertices, counted from 1, their ``held_out_nll`` as ``ends``, in nats, that of
        their ``average``, and whether it is ``worse`` than both, by more than two standard errors of the difference.
    """
    chosen = np.unique(np.linspace(0, len(vertices) - 1, _ENDS).round().astype(int)).tolist()
    pairs, corners = list(combinations(range(len(chosen)), 2)), torch.eye(len(chosen))
    if not pairs:
        return []
    coefficients = torch.stack([*corners, *((corners[a] + corners[b]) / 2 for a, b in pairs)])
    measured = points(trainer, vertices[chosen], coefficients, buffers, trainer.dataset.validation, _AVERAGED)
    ends, middles = measured[: len(chosen)], measured[len(chosen) :]
    return [
        {
            "of": [chosen[a] + 1, chosen[b] + 1],
            "ends": [ends[a].nll, ends[b].nll],
            "average": middle.nll,
            "worse": all(_clearly_above(middle.losses, end.losses) for end in (ends[a], ends[b])),
        }
        for (a, b), middle in zip(pairs, middles, strict=True)
    ]


def path_scores(
    trainer: Trainer,
    vertices: Tensor,
    coefficients: Tensor,
    buffers: Buffers,
    t: Tensor,
    examples: int,
    solved: Solved = _NONE,
) -> dict[str, list[float] | float]:
    """Measure a path of points; ``buffers`` and ``solved`` as of :func:`member_buffers`.

    Returns:
        ``t``, ``train_loss``, ``test_error`` and ``ensemble_error`` (of the two-member ensemble of the path's first
        point and the one at t; Garipov et al. 2018, figure 2, right): lists with one number per point. And
        ``highest_train_loss`` and ``highest_test_error``: the barriers.
    """
    measured = points(trainer, vertices, coefficients, buffers, trainer.dataset.test, examples, solved)
    losses, errors = [point.train_loss for point in measured], [point.error() for point in measured]
    return {
        "t": t.tolist(),
        "train_loss": losses,
        "test_error": errors,
        "ensemble_error": [point.error(measured[0]) for point in measured],
        "highest_train_loss": max(losses),
        "highest_test_error": max(errors),
    }


def _starts(coefficients: Tensor, buffers: Buffers | Sequence[Buffers], solved: Solved) -> list[Start]:
    """Return what the buffers of each point (M, K) start from."""
    corners = torch.eye(coefficients.shape[1])
    each = [buffers] * len(coefficients) if isinstance(buffers, Mapping) else buffers
    starts: list[Start] = []
    for row, own in zip(coefficients.cpu(), each, strict=True):
        corner = next((k for k in solved if torch.equal(row, corners[k])), None)
        starts.append((own, False) if corner is None else (solved[corner], True))
    return starts


def _recomputed(trainer: Trainer, starts: Sequence[Start]) -> int:
    """Return at how many points BatchNorm statistics are recomputed."""
    return sum(not own for _, own in starts) if has_batchnorm(trainer.weights.module) else 0


def _predict(trainer: Trainer, examples: Examples) -> Tensor:
    """Predict distributions (N, D), on the CPU, with the network's current weights."""
    trainer.weights.module.eval()
    prepare = examples.inputs(trainer.record.mean, trainer.record.std, trainer.device)
    with torch.no_grad():
        parts = examples.batches(trainer.settings.batch_size or 1)
        call = trainer.weights.module._call_impl  # not compiled: that takes longer than so few batches
        outputs = [call(prepare(part.data.to(trainer.device))) for part in parts]  # type: ignore[no-untyped-call]
    found = torch.cat(outputs)
    check_finite(found, "the network")
    return trainer.task.distribution(found).cpu()


def _clearly_above(losses: NDArray[np.float64], others: NDArray[np.float64]) -> bool:
    """Whether the mean of paired losses (N,) is higher by more than two standard errors."""
    excess = losses - others
    return len(excess) > 1 and bool(excess.mean() > 2 * excess.std(ddof=1) / math.sqrt(len(excess)))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _subset(examples: Examples, count: int) -> Examples:
    return examples.part(torch.randperm(len(examples), generator=generator(0, "probe"))[:count])
