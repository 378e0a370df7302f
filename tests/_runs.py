"""Tiny runs with random weights, made by hand: what the serve room's tests export and serve."""

from __future__ import annotations

from pathlib import Path

import torch

from ensembler import architectures
from ensembler.run import Cost, DatasetRecord, Manifest, Run
from ensembler.weights import FlatWeights

CLASSES = [f"class {index}" for index in range(5)]
SHAPE = [32, 32, 3]


def make_run(path: Path, architecture: str = "cnn", members: int = 3, classes: int = len(CLASSES)) -> Path:
    """A run whose members are far apart: three random vertices, and other buffers for each member.

    Members 0 and 1 have the same coefficients, so that only their buffers, if any, tell them apart.
    """
    generator = torch.Generator().manual_seed(0)
    vertices = []
    for seed in range(3):
        weights = FlatWeights(architectures.build(architecture, classes, seed))
        head = next(p for p in reversed(list(weights.module.parameters())) if p.dim() == 2)
        head.data.mul_(3)  # the initial head is nearly silent: speak up, or any two members would agree
        vertices.append(weights.vector)
    coefficients = torch.softmax(2 * torch.randn(members, 3, generator=generator), dim=1)
    coefficients[1:2] = coefficients[0]
    buffers = {name: _random_rows(buffer, members, generator) for name, buffer in weights.buffers().items()}
    record = DatasetRecord(
        name="none",
        title="made by hand",
        classes=[f"class {index}" for index in range(classes)],
        image_shape=SHAPE,
        mean=[0.4, 0.5, 0.6],
        std=[0.2, 0.25, 0.3],
        train_examples=100,
        train_sha256="0" * 64,
        test_sha256="1" * 64,
    )
    manifest = Manifest(
        method="spro-simplex",
        architecture=architecture,
        dataset=record,
        seed=0,
        vertices=3,
        members=members,
        parameters=len(weights),
        sampling=None,
        options={},
        cost=Cost(parts={"train": 1000}, example_passes=1000, batchnorm_examples=0, seconds=1.0, device="cpu"),
        metrics={},
        created="2026-01-01T00:00:00+00:00",
        versions={},
    )
    vectors = torch.stack(vertices)
    return Run(manifest, weights.unflatten(vectors), coefficients, buffers, frozen=weights.frozen()).save(path)


def _random_rows(buffer: torch.Tensor, members: int, generator: torch.Generator) -> torch.Tensor:
    rows = torch.stack([buffer] * members)
    return rows + torch.rand(rows.shape, generator=generator) if rows.is_floating_point() else rows
