"""Tiny runs and bundles made by hand: what the serve room's tests export and serve."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from ensembler.data.datasets import Dataset
from ensembler.networks import architectures
from ensembler.run import Cost, DatasetRecord, Manifest, Run, Sampling
from ensembler.serve.runtime.manifest import PROBE, BundleManifest, Origin
from ensembler.storage import artefact
from ensembler.weights import FlatWeights

CLASSES = [f"class {index}" for index in range(5)]
SHAPE = [32, 32, 3]
TINY = [4, 6, 3]


def make_run(
    path: Path,
    architecture: str = "cnn",
    members: int = 3,
    dataset: Dataset | None = None,
    sampling: Sampling | None = None,
) -> Path:
    """A run whose members are far apart: three random vertices, and other buffers for each member.

    Members 0 and 1 have the same coefficients, so that only their buffers, if any, tell them apart. Of ``dataset``
    or of images of ``SHAPE`` that are nowhere.
    """
    classes = CLASSES if dataset is None else dataset.classes
    generator = torch.Generator().manual_seed(0)
    vertices = []
    for seed in range(3):
        weights = FlatWeights(architectures.build(architecture, len(classes), seed))
        head = next(p for p in reversed(list(weights.module.parameters())) if p.dim() == 2)
        head.data.mul_(3)  # the initial head is nearly silent: speak up, or any two members would agree
        vertices.append(weights.vector)
    coefficients = torch.softmax(2 * torch.randn(members, 3, generator=generator), dim=1)
    coefficients[1:2] = coefficients[0]
    buffers = {name: _random_rows(buffer, members, generator) for name, buffer in weights.buffers().items()}
    nowhere = DatasetRecord(
        name="none",
        title="made by hand",
        classes=CLASSES,
        shape=SHAPE,
        mean=[0.4, 0.5, 0.6],
        std=[0.2, 0.25, 0.3],
        augmentation="none",
        train_examples=100,
        train_sha256="0" * 64,
        test_sha256="1" * 64,
    )
    manifest = Manifest(
        method="spro-simplex",
        architecture=architecture,
        dataset=nowhere if dataset is None else DatasetRecord.of(dataset),
        seed=0,
        vertices=3,
        members=members,
        parameters=len(weights),
        sampling=sampling,
        options={},
        cost=Cost(entries={}, example_passes=1000, forward_passes=0, seconds=1.0, peak_memory=None, device="cpu"),
        metrics={},
        created="2026-01-01T00:00:00+00:00",
        versions={},
    )
    vectors = torch.stack(vertices)
    return Run(manifest, weights.unflatten(vectors), coefficients, buffers, frozen=weights.frozen()).save(path)


def _random_rows(buffer: torch.Tensor, members: int, generator: torch.Generator) -> torch.Tensor:
    rows = torch.stack([buffer] * members)
    return rows + torch.rand(rows.shape, generator=generator) if rows.is_floating_point() else rows


def tiny_weights(members: int) -> np.ndarray:
    """(M, 3, C): member m of :func:`make_bundle` gives ``images.mean((1, 2)) @ tiny_weights(M)[m]`` as its logits."""
    return np.random.default_rng(0).normal(0, 0.02, (members, 3, len(CLASSES))).astype(np.float32)


def agreeing_weights(members: int) -> np.ndarray:
    """(M, 3, C) of members that mostly agree, so that not all need be asked."""
    common = np.random.default_rng(1).normal(0, 0.05, (3, len(CLASSES)))
    return (common + tiny_weights(members) / 2).astype(np.float32)


def make_bundle(path: Path, members: int = 3, weights: np.ndarray | None = None) -> Path:
    """A bundle of linear classifiers of the mean colour of 4 x 6 images: its answers can be worked out by hand."""
    weights = tiny_weights(members) if weights is None else weights
    graphs = [f"member-{member:03d}.onnx" for member in range(members)]
    manifest = BundleManifest(
        method="deep-ensemble",
        architecture="linear",
        dataset="made by hand",
        classes=CLASSES,
        image_shape=TINY,
        members=members,
        layout="members",
        graphs=graphs,
        input="uint8",
        precision="float32",
        precision_check=None,
        order=list(range(members)),
        ordered_by="the run",
        vertices=members,
        sampling=None,
        parameters=3 * len(CLASSES),
        training_cost={},
        run=Origin(name="none", sha256="0" * 64),
        opset=20,
        max_difference=0.0,
        tolerance=1e-4,
        compared_on=["made by hand"],
        validation=None,
        tuning=None,
        calibration=None,
        created="2026-01-01T00:00:00+00:00",
        versions={},
    )
    with artefact.write(path, manifest.model_dump()) as folder:
        for graph, own in zip(graphs, weights, strict=True):
            (folder / graph).write_bytes(_linear(own).SerializeToString())
        images = np.random.default_rng(0).integers(0, 256, (2, *TINY), dtype=np.uint8)
        logits = images.astype(np.float64).mean(axis=(1, 2)) @ weights.astype(np.float64)
        odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
        np.savez(folder / PROBE, images=images, probabilities=odds / odds.sum(axis=-1, keepdims=True))
    return path


def _linear(weights: np.ndarray) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "weights"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", *TINY])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(CLASSES)])],
        [
            numpy_helper.from_array(np.array([1, 2]), "axes"),
            numpy_helper.from_array(weights, "weights"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
