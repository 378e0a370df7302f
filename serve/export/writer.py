"""An ensemble's members as files, in either layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from ensembler.ensemble import Ensemble
from ensembler.errors import ExportError, UsageError, first_line
from ensembler.networks.buffers import recomputed
from ensembler.serve.export.graphs import (
    Graph,
    holds_weights,
    merge,
    opset,
    replace_weights,
    save,
    trace,
    without_weights,
)
from ensembler.serve.export.precision import to_float16, to_int8
from ensembler.serve.runtime.manifest import GRAPH, MERGED, WEIGHTS, Layout, Pixels, Precision
from ensembler.serve.runtime.vertices import Vertices

__all__ = ["Writer", "Written", "write_merged"]


@dataclass(frozen=True)
class Written:
    """What was written, as the bundle's manifest has it."""

    layout: Layout
    graphs: list[str]
    opset: int
    input: Pixels
    precision: Precision


class Writer:
    """Writes an ensemble's members to a folder.

    Args:
        folder: exists.
        ensemble: on the CPU.
        pixels: what the graphs take: uint8 from 0 to 255, or float32 from 0 to 1.
        precision: of weights and activations.
        images: (B, H, W, 3) uint8, from which int8 takes the ranges of its activations.
    """

    def __init__(
        self,
        folder: Path,
        ensemble: Ensemble,
        pixels: Pixels = "uint8",
        precision: Precision = "float32",
        images: NDArray[np.uint8] | None = None,
    ) -> None:
        self._folder = folder
        self._ensemble = ensemble
        self._record = ensemble.run.manifest.dataset
        self._pixels = pixels
        self._precision = precision
        self._images = images

    def write(self, layout: Layout | None) -> Written:
        """Write all members.

        Args:
            layout: by default ``"vertices"`` where that is smaller and possible.

        Raises:
            UsageError: vertices of int8, or of a network whose graph does not hold its weights by name.
            ExportError: a member cannot be traced; it is named.
        """
        if layout == "vertices":
            self._ensemble.run.check_one_network("to make members of")
        if layout == "vertices" and self._precision == "int8":
            raise UsageError(
                "8-bit scales belong to one member and cannot be combined: export int8 with --layout members"
            )
        graph = self._graph(0)
        template = self._trace(graph, 0)
        named = holds_weights(template, graph)
        if layout == "vertices" and not named:
            raise UsageError(
                "this network's graph does not hold every weight by its name: export it with --layout members"
            )
        run = self._ensemble.run
        fewer = not run.parts and run.coefficients.shape[1] < self._ensemble.members
        if layout == "vertices" or (layout is None and named and fewer and self._precision != "int8"):
            self._write_vertices(graph, template)
            layout, graphs = "vertices", [GRAPH]
        else:
            layout, graphs = "members", self._write_members(template, named)
        return Written(layout, graphs, opset(template), self._pixels, self._precision)

    def _write_members(self, template: onnx.ModelProto, named: bool) -> list[str]:
        """Write a file for each member: its network's graph with its weights, or, without names, its own graph."""
        names = [f"member-{member:03d}.onnx" for member in range(self._ensemble.members)]
        traced = self._ensemble.run_of(0)
        for member, name in enumerate(names):
            graph, run = self._graph(member), self._ensemble.run_of(member)
            if run is traced and named:
                replace_weights(template, _arrays(graph, template))
            elif member:
                template, traced = self._trace(graph, member), run
                named = holds_weights(template, graph)
            save(self._converted(template), self._folder / name)
        return names

    def _write_vertices(self, graph: Graph, template: onnx.ModelProto) -> None:
        """Write the graph without weights, and the vertices."""
        run, converted = self._ensemble.run, self._converted(template)
        parameters = dict(graph.network.named_parameters(remove_duplicate=False))
        names = list(graph.weights(template))
        trained = {
            n for n in names if (p := parameters.get(n.removeprefix("network."))) is not None and p.requires_grad
        }
        held = {n for n in names if _differs(n.removeprefix("network."), run.buffers, recomputed(graph.network))}
        kinds = {i.name: onnx.helper.tensor_dtype_to_np_dtype(i.data_type) for i in converted.graph.initializer}

        def rows(ensemble: Ensemble, wanted: set[str]) -> dict[str, NDArray[Any]]:
            """Return these weights of each member of an ensemble: (M, ...)."""
            found: dict[str, NDArray[Any]] = {}
            for member in range(ensemble.members if wanted else 0):
                state = Graph(ensemble.network(member), self._record).state_dict()
                for name in wanted:
                    if member == 0:
                        found[name] = np.empty((ensemble.members, *state[name].shape), kinds[name])
                    found[name][member] = state[name].numpy()
            return found

        count = run.coefficients.shape[1]
        corners = replace(
            run,
            coefficients=torch.eye(count),
            buffers={n: b[:1].expand(count, *b.shape[1:]) for n, b in run.buffers.items()},
        )
        shared = {n: w.astype(kinds[n]) for n, w in _arrays(graph, template).items() if n not in trained | held}
        Vertices(
            run.coefficients.numpy(),
            rows(Ensemble(corners, "cpu"), trained),
            rows(self._ensemble, held),
            shared,
        ).save(self._folder / WEIGHTS)
        save(without_weights(converted, names), self._folder / GRAPH)

    def _graph(self, member: int) -> Graph:
        record = self._ensemble.run_of(member).manifest.dataset
        return Graph(self._ensemble.network(member), record, self._pixels == "float").eval()

    def _trace(self, graph: Graph, member: int) -> onnx.ModelProto:
        try:
            return trace(graph, self._record)
        except ExportError as error:
            raise ExportError(f"member {member + 1}: {error}") from error

    def _converted(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Return the model at the precision that was asked for.

        Raises:
            UsageError: int8 without images. ExportError: the graph cannot be converted.
        """
        if self._precision == "int8" and self._images is None:
            raise UsageError("int8 needs training images to take the ranges of its activations from")
        try:
            if self._precision == "float16":
                return to_float16(model)
            if self._precision == "int8" and self._images is not None:
                scaled = self._images.astype(np.float32) / np.float32(255) if self._pixels == "float" else self._images
                return to_int8(model, scaled)
        except Exception as error:  # ONNX Runtime's, of any class
            reason = first_line(error)
            raise ExportError(
                f"this network cannot be converted to {self._precision} ({reason}): use float32"
            ) from error
        return model


def write_merged(folder: Path, layout: Layout, graphs: Sequence[str], order: Sequence[int]) -> None:
    """Write the graph of all members from their files, in the order in which they are asked."""
    if layout == "vertices":
        models = [onnx.load(folder / GRAPH, load_external_data=False)] * len(order)
    else:
        models = [onnx.load(folder / graphs[member]) for member in order]
    save(merge(models), folder / MERGED)


def _differs(name: str, buffers: Mapping[str, torch.Tensor], recomputed: set[str]) -> bool:
    """Whether each member has a buffer of its own; a recomputed one may be alike in two members by chance only."""
    return name in buffers and (name in recomputed or not bool((buffers[name] == buffers[name][:1]).all()))


def _arrays(graph: Graph, model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {name: tensor.numpy() for name, tensor in graph.weights(model).items()}
