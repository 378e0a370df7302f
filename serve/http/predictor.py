"""One worker's ensemble: reads the requests for predictions, queues them, and answers."""

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
from ensembler.serve.answer_log import AnswerLog
from ensembler.serve.http import answers, bodies, json_body, kserve, readers
from ensembler.serve.http.batcher import Answered, Batcher, Columns
from ensembler.serve.http.decoder import Decoder
from ensembler.serve.http.metrics import STAGES, Metrics
from ensembler.serve.http.options import Options
from ensembler.serve.http.settings import Settings
from ensembler.serve.runtime.early_exit import Mode
from ensembler.serve.runtime.images import check_images
from ensembler.serve.runtime.runtime import Runtime
from ensembler.text import counted

__all__ = ["Predictor"]

# JSON above these sizes is read and written in a thread: other requests would wait longer than the thread costs.
_BYTES = 32 * 1024
_NUMBERS = 4 * 1024

_logger = logging.getLogger("ensembler.serve")

T = TypeVar("T")
Images = NDArray[np.uint8]


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
        self._limits = json_body.Limits.of(settings.max_json, settings.max_batch, manifest.image_shape)
        known = manifest.validation
        if known is not None and self.runtime.members != manifest.members:
            known = known.model_copy(update={"drift": []})  # it is of the bundle's own members
        self._metrics = Metrics(known, self.runtime.members, len(manifest.classes), registry, settings.drift_window)
        self._log = None
        if settings.log_answers is not None:
            self._log = AnswerLog(settings.log_answers, settings.log_sample, manifest, self.runtime.sha256)
        self._batcher = Batcher(
            self._predict, max_batch=settings.run_batch, max_queue=settings.max_queue, on_pass=self._on_pass
        )
        self._decoder = Decoder(manifest.image_shape, settings.max_pixels, settings.decode_ms / 1000)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="ensembler-read")

    def warm_up(self) -> None:
        """Run every member once, so that no caller waits for it."""
        self.runtime.warm_up(self.settings.run_batch)
        gc.collect()
        gc.freeze()  # what exists now stays: tracing it again would delay every request
        members, megabytes = counted(self.runtime.members, "member"), self.runtime.memory / 2**20
        _logger.info(
            "%s on %s, %d at a time, %.0f MiB of memory", members, self.runtime.device, self.runtime.threads, megabytes
        )
        if self.runtime.gpu_memory is not None:
            _logger.info("%.0f MiB of the GPU's memory", self.runtime.gpu_memory / 2**20)

    def close(self) -> None:
        """Stop all threads."""
        self._batcher.close()
        self._decoder.close()
        self._threads.shutdown()
        self.runtime.close()
        gc.unfreeze()

    async def respond(self, request: Request) -> Response:
        """Return the response to a request of the prediction route, whose body has arrived.

        Raises:
            EnsemblerError: the request cannot be honoured, or not in time.
        """
        deadline = self._deadline(request)
        images, options = await self._read(request, deadline)
        if not _wants_npy(request):
            return await self._respond(request, deadline, images, options, self._json)
        array = answers.array_output(options)
        return await self._respond(request, deadline, images, options, lambda columns, _: _npy(columns[array]))

    async def infer(self, request: Request) -> Response:
        """Return the response to a request of KServe's protocol, whose body has arrived.

        Raises:
            EnsemblerError: the request cannot be honoured, or not in time.
        """
        deadline = self._deadline(request)
        body, head = await request.body(), request.headers.get(kserve.HEAD_LENGTH)
        question = await self._call(len(body) > _BYTES, kserve.read, body, head, self._limits)
        options = self._resolve(Options.read(question.options))
        kserve.check(question, options)
        files = question.files
        images = self._check(question.images) if files is None else await self._decode(files, deadline)

        def write(columns: Columns, options: Options) -> Response:
            content, length = kserve.answer(columns, options, question, self.runtime)
            headers = None if length is None else {kserve.HEAD_LENGTH: str(length)}
            kind = "application/json" if length is None else "application/octet-stream"
            return Response(content, media_type=kind, headers=headers)

        return await self._respond(request, deadline, images, options, write)

    async def _respond(
        self,
        request: Request,
        deadline: float,
        images: Images,
        options: Options,
        write: Callable[[Columns, Options], Response],
    ) -> Response:
        read = monotonic()
        answered = await self._submit(images, options, deadline)
        predicted = monotonic()
        large = len(images) * len(self.runtime.manifest.classes) > _NUMBERS
        response = await self._call(large, self._write, answered.columns, options, write)
        received = request.scope.get("ensembler.read", read)
        seconds = (read - received, answered.queued, answered.predicted, monotonic() - predicted)
        stages = dict(zip(STAGES, seconds, strict=True))
        self._metrics.stages(stages)
        response.headers["X-Batch-Size"] = str(answered.batch)
        timing = ", ".join(f"{stage};dur={1000 * value:.2f}" for stage, value in stages.items())
        response.headers["Server-Timing"] = timing
        return response

    async def answer(self, images: object, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to images and options as they are in a JSON body."""
        checked, options = self._check(images), self._resolve(Options.read(fields))
        columns = (await self._submit(checked, options, math.inf)).columns
        return answers.content(answers.with_outputs(columns, options, self.runtime), options, self.runtime)

    def _deadline(self, request: Request) -> float:
        """Until when a request can wait, by :func:`time.monotonic`."""
        arrived: float = request.scope.get("ensembler.arrived", monotonic())
        return arrived + _patience(request, self.settings.deadline_ms) / 1000

    async def _read(self, request: Request, deadline: float) -> tuple[Images, Options]:
        """Read a request's images and options; its files are decoded last, as that takes longest."""
        body, texts = await request.body(), request.query_params.multi_items()
        shape, content_type = request.headers.get("x-shape"), request.headers.get("content-type", "")
        kind = bodies.kind_of_body(content_type, shape, body)
        sent: list[bytes] | Images
        if kind == "json":
            sent, options = await self._call(len(body) > _BYTES, self._parse, body, texts)
        elif kind == "form":
            sent, fields = await readers.form_of(request, self.settings.max_batch)
            options = self._resolve(Options.read({}, [*texts, *fields]))
        else:
            options = self._resolve(Options.read({}, texts))
            if kind == "image":
                sent = [body]
            else:
                sent = self._check(
                    readers.images_from_npy(body) if shape is None else readers.images_from_raw(body, shape)
                )
        if not isinstance(sent, list):
            return sent, options
        try:
            return await self._decode(sent, deadline), options
        except bodies.MediaTypeError as error:
            if kind != "image" or content_type.startswith("image/"):
                raise
            raise bodies.MediaTypeError(f"{error}, or JSON, or a .npy file; raw pixels need their X-Shape") from error

    async def _decode(self, files: list[bytes], deadline: float) -> Images:
        most = self.settings.max_batch
        if len(files) > most:
            raise ShapeError(f"{len(files)} images are more than {most} at a time: send several smaller requests")
        return await self._decoder.decode(files, deadline)

    def _parse(self, body: bytes, texts: list[tuple[str, str]]) -> tuple[list[bytes] | Images, Options]:
        question = json_body.read_question(json_body.parse(body, self._limits))
        options = self._resolve(Options.read(question.options, texts))
        return question.files or self._check(question.images), options

    def _check(self, images: object) -> Images:
        return check_images(images, self.runtime.manifest.image_shape, self.settings.max_batch)

    def _resolve(self, options: Options) -> Options:
        return options.resolve(self.runtime.members, self.runtime.calibration)

    async def _submit(self, images: Images, options: Options, deadline: float) -> Answered:
        return await self._batcher.submit(images, options.computation(), deadline)

    def _predict(self, images: NDArray[np.generic], key: Hashable) -> Columns:
        mode, members, level = cast(tuple[Mode, int, float], key)
        return answers.as_columns(self.runtime.predict(images, mode, members=members, level=level))

    def _on_pass(self, images: int) -> None:
        self._metrics.batch(images, self._batcher.waiting)

    def _write(self, columns: Columns, options: Options, write: Callable[[Columns, Options], Response]) -> Response:
        columns = answers.with_outputs(columns, options, self.runtime)
        self._metrics.answer(columns, options.asks_all(self.runtime.members))
        response = write(columns, options)
        if self._log is not None:
            self._log.add(columns, options.mode)
        return response

    def _json(self, columns: Columns, options: Options) -> Response:
        return Response(answers.as_json(columns, options, self.runtime), media_type="application/json")

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


def _npy(column: NDArray[np.generic]) -> Response:
    return Response(answers.as_npy(column), media_type="application/x-npy")


def _wants_npy(request: Request) -> bool:
    kinds = [kind.split(";")[0].strip().lower() for kind in request.headers.get("accept", "").split(",")]
    return "application/x-npy" in kinds or "application/octet-stream" in kinds
