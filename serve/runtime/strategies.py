"""Ways of running an ensemble's members on one machine; which is the fastest has to be measured.

- ``sessions``: members in parallel, each in one thread of a pool as wide as the available CPUs. M sessions with threads
  of their own would compete for the cores.
- ``loop``: the same sessions one after another in the caller's thread, for networks so small that handing them to
  another thread takes longer than running them.
- ``merged``: all members in one graph, whose operators ONNX Runtime runs in parallel.

On a GPU there are ``loop`` and ``merged``, and no batch is split among the CPU's threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import cast

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ensembler.errors import ArtefactError, EnsemblerError, UsageError, first_line
from ensembler.serve.runtime.manifest import Strategy
from ensembler.serve.runtime.passes import GpuPasses, eager
from ensembler.serve.runtime.sessions import on_gpu
from ensembler.task import softmax

__all__ = ["Members"]

_CHUNK_PIXELS = {"cpu": 64 * 32 * 32, "cuda": 1024 * 32 * 32}  # of a forward pass: efficient, and bounded in memory
_FEWEST = 8  # images of a forward pass: smaller parts are not worth a thread

Probabilities = NDArray[np.float32]


class Members:
    """Opened members, in the order in which they are asked, and a pool of threads that run them.

    Safe to call from several threads at once.

    Args:
        sessions: one a member.
        threads: of the pool.
        image_shape: [H, W, 3].
        classes: C.
        scaled: whether the graphs take pixels from 0 to 1 rather than from 0 to 255.
        merged: all members in one graph.
        device_id: number of the GPU, where the sessions run on one.

    Attributes:
        largest: images of one forward pass, at most.
        passes: on a GPU, what runs each strategy.
    """

    def __init__(
        self,
        sessions: Sequence[onnxruntime.InferenceSession],
        threads: int,
        image_shape: Sequence[int],
        classes: int,
        scaled: bool = False,
        merged: onnxruntime.InferenceSession | None = None,
        device_id: int = 0,
    ) -> None:
        self._sessions = list(sessions)
        self._merged = merged
        self._threads = threads
        self._classes = classes
        self._scaled = scaled
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ensembler-member")
        for session in self._sessions:
            self._check(session, image_shape)
        if merged:
            self._check(merged, image_shape, [len(self)])
        self.passes: dict[Strategy, GpuPasses] = {}
        if on_gpu([*self._sessions, *([merged] if merged else [])]):
            self.use_gpu(device_id)
        self.largest = max(1, _CHUNK_PIXELS[self.device] // (image_shape[0] * image_shape[1]))

    def use_gpu(self, device_id: int, memory: str = "cuda") -> None:
        """Run the sessions on the GPU that they were opened on; ``memory`` is where their buffers are."""
        self.passes["loop"] = GpuPasses(self._sessions, [self._classes], device_id, memory)
        if self._merged:
            self.passes["merged"] = GpuPasses([self._merged], [len(self), self._classes], device_id, memory)

    @property
    def device(self) -> str:
        """Where the sessions run."""
        return "cuda" if self.passes else "cpu"

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """The available ones, the default first."""
        return tuple(self.passes) or ("sessions", "loop", *(("merged",) if self._merged else ()))

    def __len__(self) -> int:
        """M."""
        return len(self._sessions)

    @property
    def batches(self) -> list[int]:
        """The batch sizes of forward passes on a GPU, where others are padded to the next one."""
        return [2**i for i in range(math.ceil(math.log2(self.largest)) + 1)]

    def ask(
        self, images: NDArray[np.generic], strategy: Strategy | None = None, first: int = 0, last: int | None = None
    ) -> Probabilities:
        """Return the probabilities (last - first, B, C) of some of the members, by default of all.

        Args:
            images: (B, H, W, 3), uint8 from 0 to 255; or float32 from 0 to 1, where the graphs take them.
            strategy: by default the first; ``"merged"`` is only for all members.
            first: place of the first member in the order.
            last: one past the place of the last.

        Raises:
            UsageError: a strategy that is not available.
            ArtefactError: a member cannot be run, or gives logits of another shape.
        """
        try:
            return self._ask(images, strategy, first, last)
        except EnsemblerError:
            raise
        except Exception as error:  # ONNX Runtime's, of any class
            raise ArtefactError(
                f"a member cannot be run ({first_line(error)}): verify the bundle here, or export the run again"
            ) from error

    def _ask(
        self, images: NDArray[np.generic], strategy: Strategy | None, first: int, last: int | None
    ) -> Probabilities:
        last, strategy = len(self) if last is None else last, strategy or self.strategies[0]
        if strategy == "merged" and (self._merged is None or (first, last) != (0, len(self))):
            raise UsageError(f"members {first} to {last} cannot be asked in one graph")
        result = np.empty((last - first, len(images), self._classes), dtype=np.float32)
        if self.passes:
            passes = self.passes["merged" if strategy == "merged" else "loop"]
            places = (0, 1) if strategy == "merged" else (first, last)
            for part in self._parts(len(images), 1):
                logits = passes.logits(self._pixels(self._padded(images[part])), *places)
                result[:, part] = softmax(logits.reshape(last - first, -1, self._classes)[:, : part.stop - part.start])
            return result
        if strategy == "merged" and self._merged is not None:
            for part in self._parts(len(images), 1):
                result[:, part] = softmax(self._run(self._merged, images[part]))
            return result

        def run(member: int, part: slice) -> None:
            result[member - first, part] = softmax(self._run(self._sessions[member], images[part]))

        threads = 1 if strategy == "loop" else self._threads
        # Parts that keep all threads busy to the end: 5 members on 2 threads run on halves of the batch, not 3 and 2.
        parts = self._parts(len(images), threads // math.gcd(last - first, threads))
        tasks = [(member, part) for part in parts for member in range(first, last)]
        if threads == 1 or len(tasks) == 1:
            for task in tasks:
                run(*task)
        else:
            for _ in self._pool.map(run, *zip(*tasks, strict=True)):
                pass
        return result

    def close(self) -> None:
        """Stop the threads; nothing can be asked any more."""
        self._pool.shutdown()

    def _parts(self, images: int, wanted: int) -> list[slice]:
        """The batch in equal parts: ``wanted`` of them, fewer where they were too small, more where too large."""
        count = max(min(wanted, images // _FEWEST), -(-images // self.largest), 1)
        edges = [images * i // count for i in range(count + 1)]
        return [slice(*pair) for pair in pairwise(edges)]

    def _run(self, session: onnxruntime.InferenceSession, images: NDArray[np.generic]) -> NDArray[np.float32]:
        (logits,) = session.run(None, {"images": self._pixels(images)}, eager())
        if logits.shape[-2:] != (len(images), self._classes):
            raise ArtefactError(f"a member gives logits {logits.shape} for {len(images)} images: export the run again")
        return cast(NDArray[np.float32], logits)

    def _check(
        self, session: onnxruntime.InferenceSession, image_shape: Sequence[int], leading: Sequence[int] = ()
    ) -> None:
        """Refuse a graph that does not map these images to such logits; ``leading`` are axes before the batch's."""
        kinds = ("tensor(float)" if self._scaled else "tensor(uint8)", "tensor(float)")
        wanted = [("images", kinds[0], [None, *image_shape]), ("logits", kinds[1], [*leading, None, self._classes])]
        found = [(put.name, put.type, list(put.shape)) for put in (*session.get_inputs(), *session.get_outputs())]
        if [put[:2] for put in found] != [put[:2] for put in wanted] or not all(
            len(shape) == len(expected) and all(_fits(*pair) for pair in zip(shape, expected, strict=True))
            for (*_, shape), (*_, expected) in zip(found, wanted, strict=True)
        ):
            raise ArtefactError(
                f"a graph of this bundle does not map images (batch, {', '.join(map(str, image_shape))}) of {kinds[0]} "
                f"to logits (batch, {self._classes}): export the run again"
            )

    def _padded(self, images: NDArray[np.generic]) -> NDArray[np.generic]:
        """The images with black ones up to the next of :attr:`batches`."""
        size = next(batch for batch in self.batches if batch >= len(images))
        return np.concatenate([images, np.zeros((size - len(images), *images.shape[1:]), images.dtype)])

    def _pixels(self, images: NDArray[np.generic]) -> NDArray[np.generic]:
        """The images as the graphs take them."""
        if self._scaled and images.dtype == np.uint8:
            return images.astype(np.float32) / np.float32(255)
        return images


def _fits(length: object, expected: int | None) -> bool:
    """Whether a length of a graph's shape, a name where it is free, is the expected one; ``None``: it must be free."""
    return length == expected if isinstance(length, int) and expected is not None else not isinstance(length, int)
