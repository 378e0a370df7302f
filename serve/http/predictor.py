"""One worker's ensemble: reads the requests of the three prediction routes, queues them, and answers."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import Response

from ensembler.errors import ShapeError, UsageError
from ensembler.machine import available_cpus
from ensembler.serve.http import answers, readers
from ensembler.serve.http.batcher import Answered, Batcher, Columns
from ensembler.serve.http.metrics import STAGES, Metrics
from ensembler.serve.http.options import Options
from ensembler.serve.http.routes import BINARY, JSON
from ensembler.serve.http.settings import Settings
from ensembler.serve.runtime.early_exit import Mode
from ensembler.serve.runtime.images import check_images
from ensembler.serve.runtime.runtime import Runtime

__all__ = ["Predictor"]

# JSON above these sizes is read and written in a thread: other requests would wait longer than the thread costs.
_BYTES = 32 * 1024
_NUMBERS = 4 * 1024

_logger = logging.getLogger("ensembler.serve")

T = TypeVar("T")
Read = tuple[NDArray[np.uint8], Options]


class Predictor:
    """Answers the prediction requests of one worker.

    Args:
        settings: of the service.
        registry: of the metrics.

    Attributes:
        settings: likewise.
        runtime: the ensemble.

    Raises:
        ArtefactError: no bundle there, or one that cannot be opened.
        UsageError: more members than the bundle can make.
    """

    def __init__(self, settings: Settings, registry: CollectorRegistry) -> None:
        self.settings = settings
        threads = max(1, available_cpus() // settings.workers)
        self.runtime = Runtime.load(
            settings.bundle, threads, members=settings.members, gpu=settings, key=settings.require_signature
        )
        manifest = self.runtime.manifest
        self._metrics = Metrics(manifest.validation, self.runtime.members, len(manifest.classes), registry)
        self._batcher = Batcher(
            self._predict, max_batch=settings.run_batch, max_queue=settings.max_queue, on_pass=self._on_pass
        )
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="ensembler-read")

    def warm_up(self) -> None:
        """Run every member once, so that no caller waits for it."""
        self.runtime.warm_up(self.settings.run_batch)
        gc.collect()
        gc.freeze()  # what exists now stays: tracing it again would delay every request
        counts = (self.runtime.members, self.runtime.device, self.runtime.threads, self.runtime.memory / 2**20)
        _logger.info("%d members on %s, %d at a time, %.0f MiB of memory", *counts)
        if self.runtime.gpu_memory is not None:
            _logger.info("%.0f MiB of the GPU's memory", self.runtime.gpu_memory / 2**20)

    def close(self) -> None:
        """Stop all threads."""
        self._batcher.close()
        self._threads.shutdown()
        self.runtime.close()
        gc.unfreeze()

    async def respond(self, request: Request) -> Response:
        """Return the response to a request of a prediction route, whose body has arrived.

        Raises:
            EnsemblerError: the request cannot be honoured, or not in time.
        """
        arrived, received = (request.scope.get(f"ensembler.{name}", monotonic()) for name in ("arrived", "read"))
        deadline = arrived + _patience(request, self.settings.deadline_ms) / 1000
        images, options = await self._read(request)
        array = answers.array_output(options) if _wants_npy(request) else None
        read = monotonic()
        answered = await self._submit(images, options, deadline)
        predicted = monotonic()
        large = array is None and len(images) * len(self.runtime.manifest.classes) > _NUMBERS
        content = await self._call(large, self._write, answered.columns, options, array)
        seconds = (read - received, answered.queued, answered.predicted, monotonic() - predicted)
        stages = dict(zip(STAGES, seconds, strict=True))
        self._metrics.stages(stages)
        headers = {
            "X-Batch-Size": str(answered.batch),
            "Server-Timing": ", ".join(f"{stage};dur={1000 * value:.2f}" for stage, value in stages.items()),
        }
        kind = "application/json" if array is None else "application/x-npy"
        return Response(content, media_type=kind, headers=headers)

    async def answer(self, images: object, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to images and options as they are in a JSON body."""
        checked, options = self._check(images, Options.from_json(fields))
        columns = (await self._submit(checked, options, math.inf)).columns
        return answers.content(answers.with_outputs(columns, options, self.runtime), options, self.runtime)

    async def _read(self, request: Request) -> Read:
        body, path = await request.body(), request.url.path
        if path == JSON:
            if request.query_params:
                raise UsageError("this route takes its options in the body: put them beside images")
            return await self._call(len(body) > _BYTES, self._read_json, body)
        options = Options.from_query(request.query_params)
        if path == BINARY:
            shape = request.headers.get("x-shape")
            images = readers.images_from_npy(body) if shape is None else readers.images_from_raw(body, shape)
            return self._check(images, options)
        files = await readers.files_of(request, self.settings.max_batch)
        return await self._call(True, self._decode, files, options)

    def _read_json(self, body: bytes) -> Read:
        images, fields = readers.fields_from_json(body)
        return self._check(images, Options.from_json(fields))

    def _decode(self, files: list[bytes], options: Options) -> Read:
        images = []
        for number, file in enumerate(files, start=1):
            try:
                shape = self.runtime.manifest.image_shape
                images.append(readers.image_from_file(file, shape, self.settings.max_pixels))
            except ShapeError as error:
                where = f"file {number} of {len(files)}: " if len(files) > 1 else ""
                raise type(error)(f"{where}{error}") from error
        return self._check(np.stack(images), options)

    def _check(self, images: object, options: Options) -> Read:
        checked = check_images(images, self.runtime.manifest.image_shape, self.settings.max_batch)
        return checked, options.resolve(self.runtime.members, self.runtime.calibration)

    async def _submit(self, images: NDArray[np.uint8], options: Options, deadline: float) -> Answered:
        return await self._batcher.submit(images, (options.mode, options.members, options.level), deadline)

    def _predict(self, images: NDArray[np.generic], key: Hashable) -> Columns:
        mode, members, level = cast(tuple[Mode, int, float], key)
        return answers.as_columns(self.runtime.predict(images, mode, members=members, level=level))

    def _on_pass(self, images: int) -> None:
        self._metrics.batch(images, self._batcher.waiting)

    def _write(self, columns: Columns, options: Options, array: str | None) -> bytes:
        columns = answers.with_outputs(columns, options, self.runtime)
        self._metrics.answer(columns, options.asks_all(self.runtime.members))
        return answers.as_json(columns, options, self.runtime) if array is None else answers.as_npy(columns[array])

    async def _call(self, in_thread: bool, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function, in a thread where it would delay other requests."""
        if not in_thread:
            return function(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)


def _patience(request: Request, most: int) -> int:
    """How long the caller will wait, in milliseconds."""
    text = request.headers.get("x-deadline-ms")
    if text is None:
        return most
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise UsageError("X-Deadline-Ms must be a whole number of milliseconds, such as 500")
    return min(most, int(text))


def _wants_npy(request: Request) -> bool:
    kinds = [kind.split(";")[0].strip().lower() for kind in request.headers.get("accept", "").split(",")]
    return "application/x-npy" in kinds or "application/octet-stream" in kinds
