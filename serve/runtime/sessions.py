"""ONNX Runtime sessions of a bundle's members, from their files or made of vertices. No torch, no onnx."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ensembler.errors import ArtefactError, UsageError, first_line
from ensembler.machine import gpu_count
from ensembler.serve.runtime.gpu import GpuOptions
from ensembler.serve.runtime.manifest import GRAPH, MERGED, WEIGHTS, BundleManifest, Layout
from ensembler.serve.runtime.vertices import Vertices, check_members, further_coefficients

__all__ = ["merged_name", "on_gpu", "open_bundle", "open_members", "open_merged", "open_session", "providers"]

Providers = list[Any]
"""ONNX Runtime's execution providers, the preferred one first."""

CPU: Sequence[Providers] = (["CPUExecutionProvider"],)

_logger = logging.getLogger("ensembler.serve")


def open_bundle(
    bundle: Path,
    manifest: BundleManifest,
    members: int | None = None,
    seed: int = 0,
    ways: Sequence[Providers] = CPU,
) -> list[onnxruntime.InferenceSession]:
    """Open a session for each member of a bundle, in the order in which they are asked.

    Args:
        bundle: its folder, verified.
        manifest: the bundle's.
        members: how many: by default all; fewer are the first ones; more are drawn from the bundle's simplexes.
        seed: of that draw.
        ways: see :func:`open_session`.

    Raises:
        UsageError: fewer than 1 member, or more than the bundle holds or can make.
        ArtefactError: ONNX Runtime cannot open a graph.
    """
    wanted = manifest.members if members is None else members
    check_members(bundle, manifest, wanted)
    further = wanted - manifest.members
    sessions = open_members(bundle, manifest.layout, manifest.graphs, manifest.order[:wanted], ways)
    if further > 0 and manifest.sampling is not None:
        vertices = Vertices.load(bundle / WEIGHTS)
        drawn = further_coefficients(manifest.sampling, vertices.coefficients.shape[1], further, seed)
        sessions += [open_session(bundle / GRAPH, ways, weights=vertices.further(row)) for row in drawn]
    return sessions


def open_members(
    folder: Path, layout: Layout, graphs: Sequence[str], members: Iterable[int], ways: Sequence[Providers] = CPU
) -> list[onnxruntime.InferenceSession]:
    """Open a session for each of some members; each computes in its caller's thread.

    Args:
        folder: of the files.
        layout: see :class:`~ensembler.serve.runtime.manifest.BundleManifest`.
        graphs: likewise.
        members: their numbers.
        ways: see :func:`open_session`.

    Raises:
        ArtefactError: ONNX Runtime cannot open a graph.
    """
    if layout == "members":
        return [open_session(folder / graphs[member], ways) for member in members]
    vertices = Vertices.load(folder / WEIGHTS)
    return [open_session(folder / GRAPH, ways, weights=vertices.member(member)) for member in members]


def open_merged(
    folder: Path, layout: Layout, order: Sequence[int], threads: int, ways: Sequence[Providers] = CPU
) -> onnxruntime.InferenceSession:
    """Open the graph of all members at once: ``logits`` (M, B, C) in the order in which members are asked.

    Raises:
        ArtefactError: ONNX Runtime cannot open it.
    """
    weights: dict[str, NDArray[np.floating]] = {}
    if layout == "vertices":
        vertices = Vertices.load(folder / WEIGHTS)
        for place, member in enumerate(order):
            weights |= {merged_name(place, name): tensor for name, tensor in vertices.member(member).items()}
    return open_session(folder / MERGED, ways, threads, weights)


def merged_name(place: int, name: str) -> str:
    """Return a name of one member's graph in the graph of all members; ``place`` is the member's in the order."""
    return f"member{place}/{name}"


def open_session(
    graph: Path,
    ways: Sequence[Providers] = CPU,
    threads: int = 1,
    weights: Mapping[str, NDArray[np.floating]] | None = None,
) -> onnxruntime.InferenceSession:
    """Open a session of one graph.

    Args:
        graph: its file.
        ways: providers to open it with; the next ones where the first cannot, which is logged.
        threads: how many compute one operator on a CPU; with 1, the caller's only.
        weights: initialisers that the file declares without holding them.

    Raises:
        ArtefactError: ONNX Runtime cannot open the graph.
    """
    for number, way in enumerate(ways, start=1):
        try:
            # Without ONNX Runtime's own fallback, which prints and leaves out the options.
            return onnxruntime.InferenceSession(
                graph, _options(threads, weights or {}), providers=way, enable_fallback=0
            )
        except Exception as error:  # its exceptions have no base class of their own
            reason = first_line(error)
            if number == len(ways):
                raise ArtefactError(f"ONNX Runtime cannot open {graph}: {reason}: export the run again") from error
            _logger.warning("%s cannot be opened with %s: %s", graph.name, way[0], reason)
    raise UsageError("a session needs a provider to be opened with")


def _options(threads: int, weights: Mapping[str, NDArray[np.floating]]) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3  # errors
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if weights:
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray(w, order="C")) for w in weights.values()]
        options.add_external_initializers(list(weights), values)
    return options


def providers(gpu: GpuOptions, tf32: bool, sessions: int) -> list[Providers]:
    """Return the ways to open a session: on the GPU where there is one, with CUDA graphs or without, and on the CPU.

    Args:
        gpu: options.
        tf32: whether products are computed in TF32, on a GPU.
        sessions: how many will share the GPU.

    Raises:
        UsageError: a GPU is asked for by its number, and there is none of it.
    """
    count = gpu_count() if "CUDAExecutionProvider" in onnxruntime.get_available_providers() else 0
    if gpu.device_id is not None and gpu.device_id >= count:
        raise UsageError(
            f"there is no GPU {gpu.device_id} for ONNX Runtime, which finds {count}: choose another device_id, or "
            "leave it out; a GPU needs NVIDIA's driver and the package onnxruntime-gpu"
        )
    if not count:
        return list(CPU)
    onnxruntime.preload_dlls()  # CUDA's libraries as pip installs them
    on_gpu = [[gpu.provider(tf32, sessions, graphs=graphs), "CPUExecutionProvider"] for graphs in (True, False)]
    return [*on_gpu, *CPU]


def on_gpu(sessions: Iterable[onnxruntime.InferenceSession]) -> bool:
    """Return whether all sessions compute on a GPU."""
    return all(session.get_providers()[0] == "CUDAExecutionProvider" for session in sessions)
