"""A run to a bundle: each member as ONNX, and each compared with PyTorch before the bundle exists.

The graph takes what callers have, ``images`` (batch, H, W, 3) uint8, and normalises inside; it gives ``logits``
(batch, C) float32. Members differ in their weights only, so one is traced and the others are its graph with their own
weights in it, found by name. Where a weight cannot be found so, every member is traced.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ensembler import artefact
from ensembler.datasets import normalise
from ensembler.ensemble import Ensemble
from ensembler.errors import ArtefactError, ExportError
from ensembler.run import DatasetRecord, versions
from ensembler.seeds import derive
from ensembler.serve.runtime import open_session, softmax
from ensembler.serve.schemas import BundleManifest, Origin

__all__ = ["BATCHES", "TOLERANCE", "export_run"]

TOLERANCE = 1e-4  # the largest difference of a probability from PyTorch's
BATCHES = (1, 2, 7)  # a graph whose batch was frozen at tracing fails at least two of them


def export_run(run_path: str | Path, out: str | Path) -> Path:
    """Export every member of a run, whole or not at all.

    Args:
        run_path: the run's folder.
        out: the bundle's folder; must not exist.

    Returns:
        ``out``.

    Raises:
        UsageError: ``out`` exists.
        ArtefactError: no run there, or the bundle cannot be written; CorruptError: a file of the run has changed.
        ExportError: a member cannot be exported, or does not reproduce PyTorch's probabilities; it is named.
    """
    run_path, out = Path(run_path), Path(out)
    manifest: dict[str, Any] = {}
    with artefact.write(out, manifest) as folder:
        ensemble = Ensemble.load(run_path, device="cpu")
        record = ensemble.run.manifest
        images = _probe(record.dataset.image_shape)
        expected = ensemble.predict_members(images).numpy()
        exporter = _Exporter(record.dataset)
        graphs, differences = [], []
        for member in range(ensemble.members):
            graphs.append(f"member-{member:03d}.onnx")
            try:
                exporter.write(ensemble.network(member), folder / graphs[-1])
                differences.append(_difference(folder / graphs[-1], images, expected[member]))
            except (ExportError, ArtefactError) as error:
                raise ExportError(f"member {member} of {run_path}: {error}") from error
        content = BundleManifest(
            method=record.method,
            architecture=record.architecture,
            dataset=record.dataset.title,
            classes=record.dataset.classes,
            image_shape=record.dataset.image_shape,
            members=ensemble.members,
            graphs=graphs,
            parameters=record.parameters,
            training_cost=record.cost.model_dump(),
            run=Origin(name=run_path.resolve().name, sha256=artefact.sha256(run_path / artefact.MANIFEST)),
            opset=exporter.opset,
            max_difference=max(differences),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=versions(),
        )
        manifest.update(content.model_dump())
    return out


class _Graph(nn.Module):
    """The network behind its normalisation: uint8 (B, H, W, 3) to logits (B, C) float32."""

    def __init__(self, network: nn.Module, dataset: DatasetRecord) -> None:
        super().__init__()
        self.network = network
        self.mean, self.std = tuple(dataset.mean), tuple(dataset.std)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(normalise(images, self.mean, self.std))
        return logits.float()


class _Exporter:
    """Traces the first network it is given, and writes the next ones' weights into that graph."""

    def __init__(self, dataset: DatasetRecord) -> None:
        self._dataset = dataset
        self._traced: onnx.ModelProto | None = None
        self.opset = 0

    def write(self, network: nn.Module, path: Path) -> None:
        """Write ``network``, as it is now, to ``path``.

        Raises:
            ExportError: it cannot be traced, or not with a free batch.
        """
        graph = _Graph(network, self._dataset).eval()
        if self._traced is None or not _holds_weights(self._traced, graph):
            self._traced = _trace(graph, self._dataset)
            self.opset = next(opset.version for opset in self._traced.opset_import if not opset.domain)
        else:
            _replace_weights(self._traced, graph)
        path.write_bytes(self._traced.SerializeToString())


def _trace(graph: _Graph, dataset: DatasetRecord) -> onnx.ModelProto:
    example = torch.zeros(2, *dataset.image_shape, dtype=torch.uint8)
    try:
        with _silence(), torch.no_grad():
            program = torch.onnx.export(
                graph,
                (example,),
                dynamo=True,
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                input_names=["images"],
                output_names=["logits"],
                optimize=False,  # folding would rename the weights; ONNX Runtime folds as it loads
                verbose=False,
            )
            if program is None:
                raise RuntimeError("the exporter returned nothing")
            model = program.model_proto
    except Exception as error:  # the exporter raises whatever it meets
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"PyTorch cannot export this network to ONNX with a free batch: {reason}") from error
    _check_shapes(model, [*dataset.image_shape], len(dataset.classes))
    _strip(model)
    return model


def _check_shapes(model: onnx.ModelProto, image_shape: list[int], classes: int) -> None:
    """Refuse a graph whose batch is not one and the same free dimension at both ends."""
    shapes = [
        [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    ]
    batch = shapes[0][0]
    if not isinstance(batch, str) or shapes != [[batch, *image_shape], [batch, classes]]:
        raise ExportError(
            f"expected a graph from (batch, {', '.join(map(str, image_shape))}) to (batch, {classes}), found "
            f"{' to '.join(map(str, shapes))}: the network must take any batch and return logits (batch, classes)"
        )


def _strip(model: onnx.ModelProto) -> None:
    """Drop the exporter's notes: they hold stack traces with this machine's paths."""
    del model.graph.value_info[:]
    for item in (*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output):
        del item.metadata_props[:]
        item.doc_string = ""


def _holds_weights(model: onnx.ModelProto, graph: _Graph) -> bool:
    """Whether each weight of ``graph`` is an initialiser of its name, or tied to one that is.

    Integers do not count: of BatchNorm's counters, which evaluation ignores, no graph holds any.
    """
    state = graph.state_dict()
    own = {name: list(tensor.shape) for name, tensor in state.items()}
    named = {i.name for i in model.graph.initializer if own.get(i.name) == list(i.dims) and i.HasField("raw_data")}
    held = {_memory(state[name]) for name in named}
    return all(_memory(tensor) in held for tensor in state.values() if tensor.is_floating_point())


def _replace_weights(model: onnx.ModelProto, graph: _Graph) -> None:
    state = graph.state_dict()
    for initializer in model.graph.initializer:
        if initializer.name in state:
            array = onnx.numpy_helper.from_array(state[initializer.name].numpy(), initializer.name)
            initializer.CopyFrom(array)


def _memory(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _difference(path: Path, images: NDArray[np.uint8], expected: NDArray[np.float32]) -> float:
    """Largest difference of a probability between the graph as it will be served and PyTorch, at each batch size."""
    session = open_session(path)
    largest, start = 0.0, 0
    for batch in BATCHES:
        part = slice(start, start + batch)
        try:
            (logits,) = session.run(None, {"images": images[part]})
        except Exception as error:
            raise ExportError(f"the graph fails at a batch of {batch}: {str(error).splitlines()[0]}") from error
        difference = float(np.abs(softmax(logits) - expected[part]).max())
        if not difference <= TOLERANCE:  # not a number counts as too large
            raise ExportError(
                f"ONNX differs from PyTorch by {difference:.1e} in a probability at a batch of {batch}, "
                f"more than {TOLERANCE:.0e}: the network computes something that ONNX does not reproduce"
            )
        largest, start = max(largest, difference), start + batch
    return largest


def _probe(image_shape: list[int]) -> NDArray[np.uint8]:
    """The images of the comparison, (sum of BATCHES, H, W, 3): seeded, coarse patches under fine noise.

    Agreement is a property of the graph, not of the data, so that no dataset has to be at hand; the patches give the
    deeper layers the large structures that pure noise, averaged away by the first of them, would not.
    """
    height, width, channels = image_shape
    rng = np.random.default_rng(derive(0, "export"))
    patches = rng.integers(0, 200, (sum(BATCHES), 4, 4, channels))
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    noise = rng.integers(0, 56, (sum(BATCHES), *image_shape))
    return (patches[:, rows][:, :, columns] + noise).astype(np.uint8)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Hide what the exporter prints, logs and warns of: whether its graph is right is measured afterwards."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
