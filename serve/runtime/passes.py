"""Forward passes on a GPU, through buffers of fixed addresses, as CUDA graphs where these are faster."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from threading import Lock
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

__all__ = ["GpuPasses", "eager"]

_EAGER = "-1"  # as a graph's number: neither captured nor replayed


class GpuPasses:
    """Forward passes of sessions on one GPU. Safe to call from several threads at once; they take turns.

    A batch is uploaded once for all sessions, into a buffer of its size, and each session writes its logits into
    another: their addresses never change, so that a pass can be replayed as a CUDA graph, one a session and size.

    Args:
        sessions: on the GPU.
        outputs: the shape of a session's logits but for the batch: (C,), or (M, C) for a graph of M members.
        device_id: the GPU's number.
        memory: ``"cuda"``; ``"cpu"`` in tests.

    Attributes:
        graphs: the batch sizes whose passes are replayed as CUDA graphs; the first pass of a size captures it.
    """

    def __init__(
        self,
        sessions: Sequence[onnxruntime.InferenceSession],
        outputs: Sequence[int],
        device_id: int = 0,
        memory: str = "cuda",
    ) -> None:
        self.graphs: set[int] = set()
        self._sessions = list(sessions)
        self._outputs = list(outputs)
        self._where = (memory, device_id)
        self._lock = Lock()
        self._inputs: dict[int, onnxruntime.OrtValue] = {}
        self._bound: dict[tuple[int, int], tuple[Any, onnxruntime.OrtValue]] = {}

    def logits(self, images: NDArray[np.generic], first: int, last: int) -> NDArray[np.float32]:
        """Return the logits of sessions ``first`` to ``last - 1``: (last - first, [M,] B, C).

        Args:
            images: (B, H, W, 3) as the graphs take them, B being one of the few sizes.
            first, last: places of the sessions.
        """
        size = len(images)
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(size) if size in self.graphs else _EAGER)
        with self._lock:
            given = self._upload(images)
            found = []
            for place in range(first, last):
                binding, output = self._binding(place, size, given)
                self._sessions[place].run_with_iobinding(binding, options)
                found.append(output.numpy())
            return np.stack(found)

    def _upload(self, images: NDArray[np.generic]) -> onnxruntime.OrtValue:
        size = len(images)
        if size not in self._inputs:
            make = onnxruntime.OrtValue.ortvalue_from_shape_and_type
            self._inputs[size] = make(list(images.shape), images.dtype.type, *self._where)
        self._inputs[size].update_inplace(np.ascontiguousarray(images))
        return self._inputs[size]

    def _binding(self, place: int, size: int, given: onnxruntime.OrtValue) -> tuple[Any, onnxruntime.OrtValue]:
        """A session's buffers for one size; they are bound once, as a captured graph has their addresses."""
        if (place, size) not in self._bound:
            shape = [*self._outputs[:-1], size, self._outputs[-1]]
            output = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, *self._where)
            binding = self._sessions[place].io_binding()
            binding.bind_ortvalue_input("images", given)
            binding.bind_ortvalue_output("logits", output)
            self._bound[place, size] = binding, output
        return self._bound[place, size]


@cache
def eager() -> onnxruntime.RunOptions:
    """Return the options of a run that neither captures nor replays a CUDA graph."""
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", _EAGER)
    return options
