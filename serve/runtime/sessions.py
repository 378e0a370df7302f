"""ONNX Runtime sessions of a bundle's members, from their files or made of vertices. No torch, no onnx."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ensembler.errors import ArtefactError, UsageError
from ensembler.machine import has_gpu
from ensembler.serve.runtime.manifest import GRAPH, MERGED, WEIGHTS, BundleManifest, Layout
from ensembler.serve.runtime.vertices import Vertices, further_coefficients

__all__ = ["merged_name", "open_bundle", "open_members", "open_merged", "open_session", "providers"]


def open_bundle(
    bundle: Path, manifest: BundleManifest, members: int | None = None, seed: int = 0
) -> list[onnxruntime.InferenceSession]:
    """Open a session for each member of a bundle, in the order in which they are asked.

    Args:
        bundle: its folder, verified.
        manifest: the bundle's.
        members: how many: by default all; fewer are the first ones; more are drawn from the bundle's simplexes.
        seed: of that draw.

    Raises:
        UsageError: fewer than 1 member, or more than the bundle holds or can make.
        ArtefactError: ONNX Runtime cannot open a graph.
    """
    wanted = manifest.members if members is None else members
    if wanted < 1:
        raise UsageError(f"an ensemble needs at least one member, not {wanted}")
    further = wanted - manifest.members
    if further > 0 and manifest.layout == "members":
        raise UsageError(
            f"the bundle holds {manifest.members} members and no vertices to make {wanted} of: ask for fewer, or "
            "export the run with --layout vertices"
        )
    if further > 0 and manifest.sampling is None:
        raise UsageError(
            f"the {manifest.members} members of a run by {manifest.method} are fixed: there are no {wanted} to ask"
        )
    sessions = open_members(bundle, manifest.layout, manifest.graphs, manifest.order[:wanted])
    if further > 0 and manifest.sampling is not None:
        vertices, where = Vertices.load(bundle / WEIGHTS), providers()
        drawn = further_coefficients(manifest.sampling, vertices.coefficients.shape[1], further, seed)
        sessions += [open_session(bundle / GRAPH, where, weights=vertices.further(row)) for row in drawn]
    return sessions


def open_members(
    folder: Path, layout: Layout, graphs: Sequence[str], members: Iterable[int]
) -> list[onnxruntime.InferenceSession]:
    """Open a session for each of some members; each computes in its caller's thread.

    Args:
        folder: of the files.
        layout: see :class:`~ensembler.serve.runtime.manifest.BundleManifest`.
        graphs: likewise.
        members: their numbers.

    Raises:
        ArtefactError: ONNX Runtime cannot open a graph.
    """
    where = providers()
    if layout == "members":
        return [open_session(folder / graphs[member], where) for member in members]
    vertices = Vertices.load(folder / WEIGHTS)
    return [open_session(folder / GRAPH, where, weights=vertices.member(member)) for member in members]


def open_merged(folder: Path, layout: Layout, order: Sequence[int], threads: int) -> onnxruntime.InferenceSession:
    """Open the graph of all members at once: ``logits`` (M, B, C) in the order in which members are asked.

    Raises:
        ArtefactError: ONNX Runtime cannot open it.
    """
    weights: dict[str, NDArray[np.floating]] = {}
    if layout == "vertices":
        vertices = Vertices.load(folder / WEIGHTS)
        for place, member in enumerate(order):
            weights |= {merged_name(place, name): tensor for name, tensor in vertices.member(member).items()}
    return open_session(folder / MERGED, providers(), threads, weights)


def merged_name(place: int, name: str) -> str:
    """Return a name of one member's graph in the graph of all members; ``place`` is the member's in the order."""
    return f"member{place}/{name}"


def open_session(
    graph: Path,
    where: Sequence[Any] = ("CPUExecutionProvider",),
    threads: int = 1,
    weights: Mapping[str, NDArray[np.floating]] | None = None,
) -> onnxruntime.InferenceSession:
    """Open a session of one graph.

    Args:
        graph: its file.
        where: ONNX Runtime's execution providers, the preferred one first.
        threads: how many compute one operator; with 1, the caller's only.
        weights: initialisers that the file declares without holding them.

    Raises:
        ArtefactError: ONNX Runtime cannot open the graph.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3  # errors
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        if weights:
            values = [onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray(w, order="C")) for w in weights.values()]
            options.add_external_initializers(list(weights), values)
        return onnxruntime.InferenceSession(graph, options, providers=list(where))
    except Exception as error:  # its exceptions have no base class of their own
        reason = str(error).splitlines()[0]
        raise ArtefactError(f"ONNX Runtime cannot open {graph}: {reason}: export the run again") from error


def providers() -> list[Any]:
    """Return the execution providers: CUDA before the CPU where there is a GPU; a session may still fall back."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers() and has_gpu():
        onnxruntime.preload_dlls()  # CUDA's libraries as pip installs them
        # TF32 would break the agreement with PyTorch that the export has checked.
        # The default search for a convolution takes half a second or more for every new size of a batch.
        options = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
        return [("CUDAExecutionProvider", options), "CPUExecutionProvider"]
    return ["CPUExecutionProvider"]
