"""ONNX Runtime's sessions of a bundle's members: opened from its files, or made of its vertices. No torch, no onnx."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ensembler.errors import ArtefactError, UsageError
from ensembler.serve.runtime.machine import gpu_answers
from ensembler.serve.runtime.manifest import GRAPH, MERGED, WEIGHTS, BundleManifest
from ensembler.serve.runtime.vertices import Vertices, further_coefficients

__all__ = ["merged_name", "open_members", "open_merged", "open_session", "providers"]


def open_members(
    bundle: Path, manifest: BundleManifest, members: int | None = None, seed: int = 0
) -> list[onnxruntime.InferenceSession]:
    """A session for each member, each computing in its caller's thread alone, in the order in which to ask them.

    Args:
        bundle: the folder, already verified.
        manifest: its manifest.
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
    chosen, where = manifest.order[:wanted], providers()
    if manifest.layout == "members":
        return [open_session(bundle / manifest.graphs[member], where) for member in chosen]
    vertices = Vertices.load(bundle / WEIGHTS)
    sessions = [open_session(bundle / GRAPH, where, weights=vertices.member(member)) for member in chosen]
    if further > 0 and manifest.sampling is not None:
        drawn = further_coefficients(manifest.sampling, vertices.coefficients.shape[1], further, seed)
        sessions += [open_session(bundle / GRAPH, where, weights=vertices.further(row)) for row in drawn]
    return sessions


def open_merged(bundle: Path, manifest: BundleManifest, threads: int) -> onnxruntime.InferenceSession:
    """The graph of all members at once, ``logits`` (M, B, C) in the order in which they are asked.

    Raises:
        ArtefactError: ONNX Runtime cannot open it.
    """
    weights: dict[str, NDArray[np.floating]] = {}
    if manifest.layout == "vertices":
        vertices = Vertices.load(bundle / WEIGHTS)
        for place, member in enumerate(manifest.order):
            weights |= {merged_name(place, name): tensor for name, tensor in vertices.member(member).items()}
    return open_session(bundle / MERGED, providers(), threads, weights)


def merged_name(place: int, name: str) -> str:
    """What a name of one member's graph is called in the graph of all; ``place`` is its place in the order."""
    return f"member{place}/{name}"


def open_session(
    graph: Path,
    where: Sequence[Any] = ("CPUExecutionProvider",),
    threads: int = 1,
    weights: Mapping[str, NDArray[np.floating]] | None = None,
) -> onnxruntime.InferenceSession:
    """A session of one graph.

    Args:
        graph: its file.
        where: ONNX Runtime's providers, the preferred one first.
        threads: how many compute one operator; with 1, the caller's alone.
        weights: the initialisers that the file declares and does not hold.

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
            values = [onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(w)) for w in weights.values()]
            options.add_external_initializers(list(weights), values)
        return onnxruntime.InferenceSession(graph, options, providers=list(where))
    except Exception as error:  # its exceptions share no base class of their own
        reason = str(error).splitlines()[0]
        raise ArtefactError(f"ONNX Runtime cannot open {graph}: {reason}: export the run again") from error


def providers() -> list[Any]:
    """CUDA before the CPU where a GPU answers; whether a session then runs there, only the session can say."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers() and gpu_answers():
        onnxruntime.preload_dlls()  # CUDA's libraries as pip installs them, which nothing else finds without torch
        # TF32 would cost the agreement with PyTorch that the export has checked.
        return [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]
    return ["CPUExecutionProvider"]
