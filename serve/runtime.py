"""A bundle's members in ONNX Runtime and NumPy: images to probabilities and their uncertainty. No torch."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ensembler import artefact
from ensembler.errors import ArtefactError
from ensembler.serve.images import check_images
from ensembler.serve.schemas import BundleManifest, read_bundle
from ensembler.uncertainty import mean_probabilities, uncertainty

__all__ = ["Prediction", "Runtime", "available_cpus", "open_session", "softmax"]

_CHUNK_PIXELS = 64 * 32 * 32  # a forward pass: large enough to be efficient, small enough to share among the cores


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the ensemble says of a batch.

    Attributes:
        classes: (B,) int64, the most probable class of the mean.
        labels: its name, B of them.
        probabilities: (B, C) float64, the mean of the members'.
        predictive_entropy: (B,) nats, in [0, log C].
        expected_entropy: (B,) nats, in [0, log C].
        mutual_information: (B,) nats, in [0, log min(M, C)]; ``None`` where M = 1.
        disagreement: (B,) share of the pairs of members whose classes differ; ``None`` where M = 1.
        members_used: how many members were asked.
    """

    classes: NDArray[np.int64]
    labels: list[str]
    probabilities: NDArray[np.float64]
    predictive_entropy: NDArray[np.float64]
    expected_entropy: NDArray[np.float64]
    mutual_information: NDArray[np.float64] | None
    disagreement: NDArray[np.float64] | None
    members_used: int


class Runtime:
    """One single-threaded ONNX Runtime session for each member, all fed by one pool of threads.

    Sessions with threads of their own would fight over the cores; this way M members and any number of callers
    share exactly ``threads`` of them. Safe to call from several threads at once.

    Attributes:
        manifest: the bundle's.
        sha256: of the bundle's manifest, which holds the hash of every graph.
        threads: how many forward passes run at a time.
        device: ``"cuda"`` or ``"cpu"``: where the sessions really compute.
        ready: whether every session has run once.
    """

    def __init__(
        self, manifest: BundleManifest, sha256: str, sessions: Sequence[onnxruntime.InferenceSession], threads: int
    ) -> None:
        self.manifest = manifest
        self.sha256 = sha256
        self.threads = threads
        self.ready = False
        self._sessions = sessions
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ensembler-member")
        on_cuda = all(session.get_providers()[0] == "CUDAExecutionProvider" for session in sessions)
        self.device = "cuda" if on_cuda else "cpu"

    @classmethod
    def load(cls, bundle: str | Path, threads: int | None = None) -> Runtime:
        """Verify a bundle and open its members.

        Args:
            bundle: its folder.
            threads: forward passes at a time; by default one for each core that this process may use.

        Raises:
            ArtefactError: no bundle there, of an unknown format, or a graph that ONNX Runtime cannot open.
            CorruptError: a file of it is missing or has changed; it is named.
        """
        bundle = Path(bundle)
        manifest = read_bundle(bundle)
        providers = _providers()
        sessions = [open_session(bundle / graph, providers) for graph in manifest.graphs]
        return cls(manifest, artefact.sha256(bundle / artefact.MANIFEST), sessions, threads or available_cpus())

    @property
    def members(self) -> int:
        """M."""
        return len(self._sessions)

    def warm_up(self) -> None:
        """Run every session once, so that no caller pays for it; from then on ``ready``."""
        self.predict_members(np.zeros((1, *self.manifest.image_shape), dtype=np.uint8))
        self.ready = True

    def predict_members(self, images: object) -> NDArray[np.float32]:
        """Each member's probabilities.

        Args:
            images: (B, H, W, 3), integers from 0 to 255.

        Returns:
            (M, B, C) float32, rows with sum 1.

        Raises:
            ShapeError: other images than that.
        """
        checked = check_images(images, self.manifest.image_shape)
        height, width = self.manifest.image_shape[:2]
        step = max(1, _CHUNK_PIXELS // (height * width))
        result = np.empty((self.members, len(checked), len(self.manifest.classes)), dtype=np.float32)

        def run(member: int, start: int) -> None:
            (logits,) = self._sessions[member].run(None, {"images": checked[start : start + step]})
            result[member, start : start + step] = softmax(logits)

        tasks = [(member, start) for start in range(0, len(checked), step) for member in range(self.members)]
        for _ in self._pool.map(run, *zip(*tasks, strict=True)):
            pass
        return result

    def predict(self, images: object) -> Prediction:
        """The ensemble's prediction and its uncertainty, computed in float64; takes what :meth:`predict_members` takes.

        Raises:
            ShapeError: not images (B, H, W, 3) of integers from 0 to 255.
        """
        members = self.predict_members(images)
        mean = mean_probabilities(members)
        classes = mean.argmax(axis=-1)
        doubt = uncertainty(members)
        return Prediction(
            classes=classes,
            labels=[self.manifest.classes[index] for index in classes],
            probabilities=mean,
            predictive_entropy=doubt.predictive_entropy,
            expected_entropy=doubt.expected_entropy,
            mutual_information=doubt.mutual_information,
            disagreement=doubt.disagreement,
            members_used=len(members),
        )

    def close(self) -> None:
        """Let the threads go; the runtime cannot predict any more."""
        self.ready = False
        self._pool.shutdown()


def open_session(graph: Path, providers: Sequence[Any] = ("CPUExecutionProvider",)) -> onnxruntime.InferenceSession:
    """A session that computes in its caller's thread alone.

    Raises:
        ArtefactError: ONNX Runtime cannot open the graph.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(graph, options, providers=list(providers))
    except Exception as error:  # its exceptions share no base class of their own
        reason = str(error).splitlines()[0]
        raise ArtefactError(f"ONNX Runtime cannot open {graph}: {reason}: export the run again") from error


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Softmax over the last axis, (..., C) to (..., C), without overflow."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    total: NDArray[np.float32] = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return total


def available_cpus() -> int:
    """The cores that this process may use: its affinity where the system tells, else all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _providers() -> list[Any]:
    """CUDA before the CPU where a GPU answers: the package lists CUDA on machines that have none."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers() and _gpu_answers():
        # TF32 would cost the agreement with PyTorch that the export has checked.
        return [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]
    return ["CPUExecutionProvider"]


def _gpu_answers() -> bool:
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        count = ctypes.c_int(0)
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    except (OSError, AttributeError):
        return False
