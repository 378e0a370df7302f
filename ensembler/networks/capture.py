"""Record a training step or a forward pass as a CUDA graph, and replay it: no kernel is launched from Python again.

A step of a small network is hundreds of kernels, and launching them takes the host longer than computing them takes
the GPU. As the step of :mod:`ensembler.trainers.loop` reads and writes only tensors whose addresses stay the same, one
recorded step serves for all of a training; what differs from step to step is copied to where it was read.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ensembler.errors import first_line

__all__ = ["Captured", "CudaGraph", "Graph", "on_stream"]

Step = Callable[..., None]
"""Called as ``step(constant, *tensors)``; does all its work on the device."""

WARM_UP = 3  # steps before the capture: the optimiser makes its state in the first, cuDNN chooses its algorithms


class Graph(Protocol):
    """What is recorded by ``with graph.capture(): step()``, and done by every :meth:`replay`, the first included."""

    def capture(self) -> AbstractContextManager[None]:
        """Record what is done within, without computing it."""
        ...

    def replay(self) -> None:
        """Compute what was recorded, on the same memory."""
        ...


class CudaGraph:
    """A CUDA graph on the current stream, which must not be the default one."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    @contextmanager
    def capture(self) -> Iterator[None]:
        """See :class:`Graph`."""
        # Of this thread only: others, which train on streams of their own, may allocate memory meanwhile.
        with torch.cuda.graph(self._graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            yield

    def replay(self) -> None:
        """See :class:`Graph`."""
        self._graph.replay()


class Captured:
    """A step that is captured once for each shape of its arguments, such as that of an epoch's last, smaller batch.

    The first steps of a shape are computed as they are, the next is captured, and that one and all later ones are
    replayed. So what is computed is what the step alone would compute.

    Args:
        step: what to capture.
        say: told in one sentence why, if the step cannot be captured; it is then computed as it is.
        graph: makes a graph.
    """

    def __init__(self, step: Step, say: Callable[[str], None], graph: Callable[[], Graph] = CudaGraph) -> None:
        self._step, self._say, self._graph = step, say, graph
        self._done = Counter[object]()
        self._recorded: dict[object, tuple[list[Tensor | None], Graph]] = {}
        self._eager = False

    def __call__(self, constant: int, *tensors: Tensor | None) -> None:
        """Do a step.

        Args:
            constant: what the recording keeps, such as the number of examples in the batch.
            tensors: what differs from step to step, on the device; ``None`` where the step takes nothing.
        """
        shape = constant, *(tensor is not None and (tensor.shape, tensor.dtype, tensor.stride()) for tensor in tensors)
        warm = self._done[shape] >= WARM_UP
        if shape not in self._recorded and (self._eager or not warm or not self._record(shape, constant, tensors)):
            self._done[shape] += 1
            self._step(constant, *tensors)
            return
        inputs, graph = self._recorded[shape]
        for own, given in zip(inputs, tensors, strict=True):
            if own is not None and given is not None:
                own.copy_(given)
        graph.replay()

    def _record(self, shape: object, constant: int, tensors: tuple[Tensor | None, ...]) -> bool:
        inputs = [None if tensor is None else tensor.clone() for tensor in tensors]
        graph, before = self._graph(), (random.getstate(), np.random.get_state())
        try:
            with graph.capture():
                self._step(constant, *inputs)
            if not _undrawn(*before):
                raise RuntimeError("the network draws from NumPy's or Python's generator, which a graph cannot")
        except RuntimeError as error:  # as CUDA's own are, and those of PyTorch where a value is read
            self._eager = True
            random.setstate(before[0])
            np.random.set_state(before[1])
            self._say(f"a step of this training cannot be captured as a CUDA graph, and is not: {first_line(error)}")
            return False
        self._recorded[shape] = inputs, graph
        return True


def _undrawn(python: Any, numpy: Any) -> bool:
    """Return whether the global generators of Python and NumPy are in these states."""
    now = zip(np.random.get_state(), numpy, strict=True)
    return random.getstate() == python and all(np.array_equal(one, other) for one, other in now)


@contextmanager
def on_stream(device: torch.device) -> Iterator[None]:
    """Work on a CUDA stream of one's own, as a capture needs; nothing on other devices."""
    if device.type != "cuda":
        yield
        return
    outer = torch.cuda.current_stream(device)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(outer)
    with torch.cuda.stream(stream):
        yield
    outer.wait_stream(stream)
