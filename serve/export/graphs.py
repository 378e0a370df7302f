"""A network as an ONNX graph whose weights keep their names, so that they can be replaced by another member's."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ensembler.data.images import normalise
from ensembler.errors import ExportError
from ensembler.run import DatasetRecord
from ensembler.serve.export.reasons import explained
from ensembler.serve.export.rewriting import rewritten
from ensembler.serve.runtime.manifest import GIVEN
from ensembler.serve.runtime.sessions import merged_name

__all__ = ["Graph", "holds_weights", "merge", "opset", "replace_weights", "save", "silence", "trace", "without_weights"]

EXTERNAL_ABOVE = 2**31 - 2**24  # bytes of tensors: protobuf's 2 GiB, less room for the graph itself


class Graph(nn.Module):
    """The network with its normalisation: images (B, H, W, 3) to logits (B, C) float32.

    Args:
        network: in evaluation mode.
        dataset: what it was trained on.
        scaled: whether pixels are float32 from 0 to 1 rather than uint8 from 0 to 255.
    """

    def __init__(self, network: nn.Module, dataset: DatasetRecord, scaled: bool = False) -> None:
        super().__init__()
        self.network = network
        self.mean, self.std = tuple(dataset.mean), tuple(dataset.std)
        self.scaled = scaled

    def forward(self, images: Tensor) -> Tensor:
        pixels = images * 255 if self.scaled else images
        logits: Tensor = self.network(normalise(pixels, self.mean, self.std))
        return logits.float()

    def weights(self, model: onnx.ModelProto) -> dict[str, Tensor]:
        """Return the present weights, as views, by the names of the graph's initialisers."""
        state = self.state_dict()
        return {i.name: state[i.name] for i in model.graph.initializer if i.name in state}


def trace(graph: Graph, dataset: DatasetRecord) -> onnx.ModelProto:
    """Return the graph in ONNX, for any batch size.

    Raises:
        ExportError: PyTorch cannot export it.
    """
    example = torch.zeros(2, *dataset.shape, dtype=torch.float32 if graph.scaled else torch.uint8)
    with silence(), torch.no_grad():
        try:
            model = rewritten(graph, partial(_export, graph, example))
        except Exception as error:  # the exporter raises errors of any class
            raise ExportError(
                f"PyTorch cannot export this network to ONNX with a free batch: {explained(error, graph)}"
            ) from error
    _check_shapes(model, [*dataset.shape], len(dataset.classes))
    _strip(model)
    return model


def holds_weights(model: onnx.ModelProto, graph: Graph) -> bool:
    """Return whether each weight of ``graph`` is an initialiser of its name, or tied to one that is.

    Except integers: no graph holds BatchNorm's counters, which evaluation does not use.
    """
    state = graph.state_dict()
    own = {name: list(tensor.shape) for name, tensor in state.items()}
    named = {i.name for i in model.graph.initializer if own.get(i.name) == list(i.dims) and i.HasField("raw_data")}
    held = {_memory(state[name]) for name in named}
    return all(
        _memory(tensor) in held for tensor in state.values() if tensor.is_floating_point() or tensor.is_complex()
    )


def replace_weights(model: onnx.ModelProto, weights: Mapping[str, NDArray[np.generic]]) -> None:
    """Replace weights in the graph, in place, each in its initialiser's type."""
    for initializer in model.graph.initializer:
        if initializer.name in weights:
            kind = onnx.helper.tensor_dtype_to_np_dtype(initializer.data_type)
            array = weights[initializer.name].astype(kind, copy=False)
            initializer.CopyFrom(onnx.numpy_helper.from_array(array, initializer.name))


def without_weights(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """Return a copy of the graph that declares these initialisers as external data without holding them."""
    wanted, bare = set(names), onnx.ModelProto()
    bare.CopyFrom(model)
    for initializer in bare.graph.initializer:
        if initializer.name in wanted:
            initializer.ClearField("raw_data")
            initializer.data_location = onnx.TensorProto.EXTERNAL
            location = initializer.external_data.add()
            location.key, location.value = "location", GIVEN
    return bare


def merge(models: Iterable[onnx.ModelProto]) -> onnx.ModelProto:
    """Return one graph of all members: the same images to ``logits`` (M, B, C), in the members' order.

    Args:
        models: of graphs from ``images`` to ``logits`` (B, C); not changed.
    """
    merged = onnx.ModelProto()
    outputs: list[str] = []
    for place, model in enumerate(models):
        if not outputs:
            merged.CopyFrom(model)
            del merged.graph.node[:], merged.graph.initializer[:], merged.graph.output[:]
        held = {(function.domain, function.name) for function in merged.functions}
        merged.functions.extend(f for f in model.functions if (f.domain, f.name) not in held)
        known = {entry.domain for entry in merged.opset_import}
        merged.opset_import.extend(entry for entry in model.opset_import if entry.domain not in known)
        prefix = merged_name(place, "")
        named = {i.name: f"{prefix}{i.name}" for i in model.graph.initializer}  # the body of a loop refers to them, too
        graph = onnx.compose.add_prefix_graph(model.graph, prefix, rename_inputs=False, name_map=named)
        merged.graph.node.extend(graph.node)
        merged.graph.initializer.extend(graph.initializer)
        outputs.append(graph.output[0].name)
    axis = onnx.numpy_helper.from_array(np.array([0]), "axis of members")
    merged.graph.initializer.append(axis)
    for output in outputs:
        merged.graph.node.append(onnx.helper.make_node("Unsqueeze", [output, axis.name], [f"{output} of one"]))
    rows = [f"{output} of one" for output in outputs]
    merged.graph.node.append(onnx.helper.make_node("Concat", rows, ["logits"], axis=0))
    batch, classes = model.graph.output[0].type.tensor_type.shape.dim
    shape = [len(outputs), batch.dim_param or None, classes.dim_value or None]
    merged.graph.output.append(onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, shape))
    return merged


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph to one file, or, where it is too large for protobuf, with its tensors in ``NAME.data``."""
    if sum(len(initializer.raw_data) for initializer in model.graph.initializer) <= EXTERNAL_ABOVE:
        path.write_bytes(model.SerializeToString())
        return
    copy = onnx.ModelProto()
    copy.CopyFrom(model)  # saving moves the tensors out
    onnx.save_model(copy, str(path), save_as_external_data=True, location=f"{path.name}.data", size_threshold=256)


def opset(model: onnx.ModelProto) -> int:
    """Return the graph's version of ONNX's standard operators."""
    return next(entry.version for entry in model.opset_import if not entry.domain)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Hide what an exporter prints, logs and warns about: its graph is checked afterwards."""
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


def _export(graph: Graph, example: Tensor) -> onnx.ModelProto:
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
    model: onnx.ModelProto = program.model_proto
    return model


def _check_shapes(model: onnx.ModelProto, image_shape: list[int], classes: int) -> None:
    """Refuse a graph whose input and output do not have the same free batch dimension."""
    shapes = [
        [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    ]
    batch = shapes[0][0]
    if not isinstance(batch, str) or shapes != [[batch, *image_shape], [batch, classes]]:
        raise ExportError(
            f"expected a graph from (batch, {', '.join(map(str, image_shape))}) to (batch, {classes}), found "
            f"{' to '.join(map(str, shapes))}: the network must take any batch and return logits (batch, classes); "
            "len(x) fixes its size, x.shape[0] does not"
        )


def _strip(model: onnx.ModelProto) -> None:
    """Remove the exporter's metadata, which holds stack traces with paths of this machine."""
    del model.graph.value_info[:]
    for item in (*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output):
        del item.metadata_props[:]
        item.doc_string = ""


def _memory(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()
