"""One worker's ensemble behind its queue, and its metrics."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from ensembler.serve.http import answers
from ensembler.serve.http.batcher import Answered, Batcher, Columns
from ensembler.serve.http.metrics import Metrics
from ensembler.serve.http.options import Options
from ensembler.serve.http.settings import Settings
from ensembler.serve.runtime import Runtime
from ensembler.serve.runtime.early_exit import Mode
from ensembler.serve.runtime.images import check_images
from ensembler.serve.runtime.machine import available_cpus

__all__ = ["Predictor"]

_logger = logging.getLogger("ensembler.serve")

T = TypeVar("T")


class Predictor:
    """Predicts the requests of one worker.

    Args:
        settings: the operator's.
        registry: of the metrics.

    Attributes:
        runtime: the ensemble.

    Raises:
        ArtefactError: no bundle there, or one that cannot be opened.
        UsageError: more members than the bundle can make.
    """

    def __init__(self, settings: Settings, registry: CollectorRegistry) -> None:
        self.settings = settings
        threads = max(1, available_cpus() // settings.workers)
        self.runtime = Runtime.load(settings.bundle, threads, members=settings.members)
        manifest = self.runtime.manifest
        self.metrics = Metrics(manifest.validation, self.runtime.members, len(manifest.classes), registry)
        self._batcher = Batcher(
            self._predict, max_batch=settings.run_batch, max_queue=settings.max_queue, on_pass=self._on_pass
        )
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="ensembler-read")

    def warm_up(self) -> None:
        """Run every member once, so that no caller waits for it."""
        runtime = self.runtime
        runtime.warm_up()
        gc.collect()
        gc.freeze()  # what exists now stays: tracing it again would delay every request
        _logger.info(
            "%d members on %s, %d at a time, %.0f MiB of memory",
            runtime.members,
            runtime.device,
            runtime.threads,
            runtime.memory / 2**20,
        )

    def close(self) -> None:
        """Stop all threads."""
        self._batcher.close()
        self._threads.shutdown()
        self.runtime.close()
        gc.unfreeze()

    def check(self, images: object) -> NDArray[np.uint8]:
        """Return images as the graphs take them.

        Raises:
            ShapeError: they are not images of the ensemble's shape, or too many.
        """
        return check_images(images, self.runtime.manifest.image_shape, self.settings.max_batch)

    def resolve(self, options: Options) -> Options:
        """Return the options with every default filled in.

        Raises:
            UsageError: this ensemble cannot honour them.
        """
        return options.resolve(self.runtime.members, self.runtime.calibration)

    async def predict(self, images: NDArray[np.uint8], options: Options, deadline: float = math.inf) -> Answered:
        """Return what the ensemble predicts.

        Args:
            images: (B, H, W, 3), checked.
            options: resolved.
            deadline: by :func:`time.monotonic`.

        Raises:
            OverloadError, DeadlineError: see :meth:`ensembler.serve.http.batcher.Batcher.submit`.
        """
        return await self._batcher.submit(images, (options.mode, options.members, options.level), deadline)

    def write(self, columns: Columns, options: Options, array: str | None = None) -> bytes:
        """Return the body of an answer: JSON, or one column as ``.npy``; and count what it says."""
        columns = answers.with_outputs(columns, options, self.runtime)
        self.metrics.answer(columns, options.asks_all(self.runtime.members))
        return answers.as_json(columns, options, self.runtime) if array is None else answers.as_npy(columns[array])

    async def answer(self, images: object, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to images and options as they come in a JSON body."""
        options = self.resolve(Options.from_json(fields))
        answered = await self.predict(self.check(images), options)
        return answers.content(answers.with_outputs(answered.columns, options, self.runtime), options, self.runtime)

    async def call(self, in_thread: bool, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function, in a thread where it would delay other requests."""
        if not in_thread:
            return function(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    def _predict(self, images: NDArray[np.generic], key: Hashable) -> Columns:
        mode, members, level = cast(tuple[Mode, int, float], key)
        return answers.as_columns(self.runtime.predict(images, mode, members=members, level=level))

    def _on_pass(self, images: int) -> None:
        self.metrics.batch(images, self._batcher.waiting)
