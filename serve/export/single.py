"""An ensemble as one self-contained ONNX graph: its members, their mean and its uncertainty, as ONNX operators.

Any runtime that reads ONNX then gives what ours gives. The graph takes ``images`` (B, H, W, 3), as the members do, and
returns float32, computed in float64 as :mod:`ensembler.uncertainty` does:

- ``probabilities`` (B, C): the mean of the members' probabilities;
- ``predictive_entropy``, ``expected_entropy`` (B,), in nats;
- ``mutual_information`` (B,), in nats, of two members or more;
- ``members`` (B, M, C): each member's own, in the order in which they are asked;
- ``calibrated`` (B, C): the calibrated mean, of a bundle calibrated by a temperature.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ensembler import calibration
from ensembler.calibration_maps import FLOOR, Temperature
from ensembler.serve.export.graphs import merge, replace_weights
from ensembler.serve.runtime.manifest import GRAPH, WEIGHTS, BundleManifest
from ensembler.serve.runtime.vertices import Vertices

__all__ = ["single_graph"]

_TINY = 1e-300  # 0 log 0 = 0


def single_graph(bundle: Path, manifest: BundleManifest) -> onnx.ModelProto:
    """Return the graph of all members of a bundle and of what is computed from them.

    Args:
        bundle: the folder of its files.
        manifest: the bundle's.
    """
    model = merge(_members(bundle, manifest))
    _average(model, manifest, _temperature(bundle, manifest))
    described = {
        "classes": json.dumps(manifest.classes),
        "method": manifest.method,
        "architecture": manifest.architecture,
        "dataset": manifest.dataset,
        "run": manifest.run.sha256,
    }
    helper.set_model_props(model, described)
    return model


def _members(bundle: Path, manifest: BundleManifest) -> list[onnx.ModelProto]:
    """The graph of each member with its weights, in the order in which they are asked."""
    if manifest.layout == "members":
        return [onnx.load(bundle / manifest.graphs[member]) for member in manifest.order]
    vertices, found = Vertices.load(bundle / WEIGHTS), []
    for member in manifest.order:
        model = onnx.load(bundle / GRAPH, load_external_data=False)
        replace_weights(model, vertices.member(member))
        found.append(model)
    return found


def _temperature(bundle: Path, manifest: BundleManifest) -> float | None:
    """The temperature of the bundle's calibration, if it is one."""
    if not manifest.calibration:
        return None
    fitted = calibration.read(bundle / manifest.calibration, manifest.run.sha256, len(manifest.classes)).map
    return fitted.temperature if isinstance(fitted, Temperature) else None


def _average(model: onnx.ModelProto, manifest: BundleManifest, temperature: float | None) -> None:
    """Replace the output ``logits`` (M, B, C) by what is computed from it, in place."""
    graph, count, classes = model.graph, manifest.members, len(manifest.classes)
    batch = graph.output[0].type.tensor_type.shape.dim[1].dim_param
    del graph.output[:]

    def constant(name: str, value: NDArray[np.generic]) -> str:
        graph.initializer.append(numpy_helper.from_array(value, f"ensemble/{name}"))
        return f"ensemble/{name}"

    def apply(operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"ensemble/{operator} {len(graph.node)}"
        graph.node.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    def give(name: str, value: str, shape: Sequence[int]) -> None:
        graph.node.append(helper.make_node("Cast", [value], [name], to=TensorProto.FLOAT))
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, *shape]))

    first, last = constant("axis of members", np.array([0])), constant("axis of classes", np.array([-1]))
    zero, tiny = constant("zero", np.array(0.0)), constant("tiny", np.array(_TINY))

    def mean(values: str) -> str:
        total = apply("ReduceSum", values, first, keepdims=0)
        return apply("Div", total, constant(f"members of {total}", np.array(float(count))))

    def entropy(p: str) -> str:
        terms = apply("Mul", p, apply("Log", apply("Max", p, tiny)))
        return apply("Max", apply("Neg", apply("ReduceSum", terms, last, keepdims=0)), zero)

    members = apply("Softmax", apply("Cast", "logits", to=TensorProto.DOUBLE), axis=-1)
    average = mean(members)
    predictive, expected = entropy(average), mean(entropy(members))
    give("probabilities", average, [classes])
    give("predictive_entropy", predictive, [])
    give("expected_entropy", expected, [])
    if count > 1:
        give("mutual_information", apply("Max", apply("Sub", predictive, expected), zero), [])
    give("members", apply("Transpose", members, perm=[1, 0, 2]), [count, classes])
    if temperature is not None:
        logs = apply("Log", apply("Max", average, constant("floor", np.array(float(FLOOR)))))
        scaled = apply("Div", logs, constant("temperature", np.array(temperature)))
        give("calibrated", apply("Softmax", scaled, axis=-1), [classes])
