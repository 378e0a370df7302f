"""The BentoML service over one bundle: what it answers is in docs/serving.md, what can be set in `settings.py`.

Start it with ``ensembler serve BUNDLE``, or by hand from any folder::

    ENSEMBLER_BUNDLE=bundles/NAME bentoml serve ensembler.serve.service:PredictiveUncertainty

The way of a request: ``gate`` lets it in, ``readers`` and ``options`` read it, ``batcher`` has it predicted together
with those that wait beside it, ``answers`` writes what was asked for.
"""

# BentoML ships no types.
# mypy: disallow-subclassing-any=False, disallow-untyped-decorators=False

from __future__ import annotations

import asyncio
import gc
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import bentoml
import numpy as np
from bentoml._internal.server.http import traffic
from bentoml.exceptions import BentoMLException
from numpy.typing import NDArray
from pydantic import Field
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from ensembler.errors import EnsemblerError, ShapeError, UsageError
from ensembler.serve.http import answers, openapi, page
from ensembler.serve.http import readers as images
from ensembler.serve.http.batcher import Answered, Batcher, Columns
from ensembler.serve.http.gate import BINARY, IMAGE, JSON, Gate, refusal
from ensembler.serve.http.metrics import Metrics
from ensembler.serve.http.options import Options, options_from_query, read_options
from ensembler.serve.http.schemas import Answer
from ensembler.serve.http.settings import Settings, whole_number
from ensembler.serve.runtime.early_exit import Mode
from ensembler.serve.runtime.images import check_images
from ensembler.serve.runtime.machine import available_cpus
from ensembler.serve.runtime.manifest import read_bundle
from ensembler.serve.runtime.runtime import Runtime

if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = ["PredictiveUncertainty"]

_BYTES = 32 * 1024  # of JSON, and
_NUMBERS = 4 * 1024  # to write as JSON: more would hold others up for longer than a change of threads takes
_WORKERS = whole_number("ENSEMBLER_WORKERS", 1)


class Batch(bentoml.IODescriptor):
    """A batch of images and what to tell of them, as JSON: ``{"images": [...]}``."""

    images: np.ndarray = Field(
        description="(B, H, W, 3): images as rows of pixels of [red, green, blue], whole numbers from 0 to 255"
    )
    outputs: list[str] | None = Field(None, description="what to answer; by default all but the members")
    mode: str | None = Field(None, description="full, exact or confidence")
    members: int | None = Field(None, description="ask no more than these first ones")
    level: float | None = Field(None, description="of the mode confidence")
    alpha: float | None = Field(None, description="1 - alpha is the coverage of the prediction sets")

    @classmethod
    async def from_http_request(cls, request: Request, serde: Any) -> Self:
        # BentoML's own reading would take NaN, log a stack trace for every bad request and answer it with a list of
        # pydantic's errors.
        batch: Self = cls.model_construct(images=request)
        return batch


_logger = logging.getLogger("bentoml.ensembler")

T = TypeVar("T")
Read = tuple[NDArray[np.generic], Options]


# BentoML sets each request a timer that it never takes back, and so keeps what the request held until its time is over,
# though it was answered long ago: under load 100 MiB, and a fifth of a second for each full garbage collection. The
# gate and the batcher keep the deadlines.
traffic.TimeoutMiddleware = lambda app, timeout: app  # type: ignore[assignment,misc,return-value]


# Tracing costs 0.3 ms a request even where nobody collects its spans, as by default.
@bentoml.service(workers=_WORKERS, tracing={"excluded_urls": JSON})
class PredictiveUncertainty:
    """Predicts images with an ensemble, and says how sure it is of each."""

    def __init__(self) -> None:
        self.settings = Settings.read()
        threads = max(1, available_cpus() // self.settings.workers)
        self.runtime = Runtime.load(self.settings.bundle, threads, members=self.settings.members)
        manifest = self.runtime.manifest
        self.metrics = Metrics(manifest.validation, self.runtime.members, len(manifest.classes))
        self.batcher = Batcher(
            self._predict,
            max_batch=self.settings.run_batch,
            max_queue=self.settings.max_queue,
            watch=self._watch,
        )
        self._readers = {JSON: self._from_json, BINARY: self._from_bytes, IMAGE: self._from_files}
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="ensembler-read")

    @bentoml.on_deployment
    @staticmethod
    def verify() -> None:
        """Runs once, before any worker: what is wrong stops the server instead of restarting its workers for ever."""
        try:
            read_bundle(Settings.read().bundle)
        except EnsemblerError as error:
            raise BentoMLException(str(error)) from error

    @bentoml.on_startup
    def warm_up(self) -> None:
        runtime = self.runtime
        runtime.warm_up()
        gc.collect()
        gc.freeze()  # what is here stays: looking through all of it again would hold every request up
        _logger.info(
            "%d members on %s, %d at a time, %.0f MiB of memory",
            runtime.members,
            runtime.device,
            runtime.threads,
            runtime.memory / 2**20,
        )

    @bentoml.on_shutdown
    def close(self) -> None:
        self.batcher.close()
        self._threads.shutdown()
        self.runtime.close()
        gc.unfreeze()

    async def __is_ready__(self) -> bool:
        return self.runtime.ready

    @bentoml.api(route=JSON, input_spec=Batch, output_spec=Answer)
    async def predictive_uncertainty(
        self,
        images: Any,
        outputs: list[str] | None = None,
        mode: str | None = None,
        members: int | None = None,
        level: float | None = None,
        alpha: float | None = None,
    ) -> Answer | Response:
        """Predict a batch of images.

        Args:
            images: (B, H, W, 3), whole numbers from 0 to 255: red, green and blue of each pixel.
            outputs, mode, members, level, alpha: see :mod:`ensembler.serve.http.options`.
        """
        if isinstance(images, Request):
            return await self.respond(images)
        chosen = {"outputs": outputs, "mode": mode, "members": members, "level": level, "alpha": alpha}
        options = self._options(chosen)
        answered = await self._ask(self._check(images), options, math.inf)
        columns = answers.with_outputs(answered.columns, options, self.runtime)
        return Answer.model_validate(answers.content(columns, options, self.runtime))

    def metadata(self) -> dict[str, Any]:
        """The model card, and this server's limits."""
        names = ("workers", "max_batch", "run_batch", "max_queue", "max_requests", "max_body", "max_pixels")
        settings = {name: getattr(self.settings, name) for name in names}
        return answers.metadata(self.runtime, settings | {"deadline_ms": round(self.settings.deadline * 1000)})

    async def respond(self, request: Request) -> Response:
        """The way of every request, once its body has come."""
        try:
            arrived, received = (request.scope.get(f"ensembler.{name}", monotonic()) for name in ("arrived", "read"))
            deadline = arrived + _patience(request, self.settings.deadline)
            batch, options = await self._readers[request.url.path](request)
            as_npy = _wants_npy(request)
            read = monotonic()
            answered = await self._ask(batch, options, deadline)
            predicted = monotonic()
            large = not as_npy and len(batch) * len(self.runtime.manifest.classes) > _NUMBERS
            content = await self._call(large, self._write, answered.columns, options, as_npy)
        except EnsemblerError as error:
            return refusal(error)
        stages = {
            "read": read - received,
            "queue": answered.queued,
            "predict": answered.predicted,
            "write": monotonic() - predicted,
        }
        for stage, seconds in stages.items():
            self.metrics.stage(stage, seconds)
        headers = {
            "X-Batch-Size": str(answered.batch),
            "Server-Timing": ", ".join(f"{stage};dur={1000 * seconds:.2f}" for stage, seconds in stages.items()),
        }
        return Response(content, media_type="application/x-npy" if as_npy else "application/json", headers=headers)

    async def _ask(self, batch: NDArray[np.generic], options: Options, deadline: float) -> Answered:
        return await self.batcher.submit(batch, (options.mode, options.members, options.level), deadline)

    def _predict(self, batch: NDArray[np.generic], key: Hashable) -> Columns:
        mode, members, level = cast(tuple[Mode, int | None, float], key)
        return answers.as_columns(self.runtime.predict(batch, mode, members=members, level=level))

    def _write(self, columns: Columns, options: Options, as_npy: bool) -> bytes:
        columns = answers.with_outputs(columns, options, self.runtime)
        whole = options.mode == "full" and options.members in (None, self.runtime.members)
        self.metrics.answer(columns, whole)
        return answers.as_npy(columns, options) if as_npy else answers.as_json(columns, options, self.runtime)

    def _watch(self, count: int) -> None:
        self.metrics.batch(count)
        self.metrics.waiting(self.batcher.waiting)

    async def _from_json(self, request: Request) -> Read:
        body = await request.body()
        if request.query_params:
            raise UsageError("this route takes its options in the body: put them beside images")

        def read() -> Read:
            fields = images.fields_from_json(body, Options.fields)
            batch = fields.pop("images")
            return self._check(batch), self._options(fields)

        return await self._call(len(body) > _BYTES, read)

    async def _from_bytes(self, request: Request) -> Read:
        body = await request.body()
        shape = request.headers.get("x-shape")
        batch = images.images_from_npy(body) if shape is None else images.images_from_raw(body, shape)
        return self._check(batch), self._options(options_from_query(request.query_params))

    async def _from_files(self, request: Request) -> Read:
        options = self._options(options_from_query(request.query_params))
        files = await _files(request, self.settings.max_batch)

        def read() -> Read:
            pictures = []
            for number, file in enumerate(files, start=1):
                try:
                    picture = images.image_from_file(file, self.runtime.manifest.image_shape, self.settings.max_pixels)
                except ShapeError as error:
                    where = f"file {number} of {len(files)}: " if len(files) > 1 else ""
                    raise type(error)(f"{where}{error}") from error
                pictures.append(picture)
            return np.stack(pictures), options

        return await self._call(True, read)

    def _check(self, batch: object) -> NDArray[np.uint8]:
        return check_images(batch, self.runtime.manifest.image_shape, self.settings.max_batch)

    def _options(self, chosen: dict[str, Any]) -> Options:
        return read_options(chosen, self.runtime.members, self.runtime.calibration)

    async def _call(self, aside: bool, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function here, or in a thread where it would hold others up."""
        if not aside:
            return function(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)


async def _files(request: Request, most: int) -> list[bytes]:
    """The body itself, or the files of a form."""
    body = await request.body()
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return [body]
    try:
        async with request.form(max_files=most, max_fields=0) as form:
            files = [await part.read() for _, part in form.multi_items() if not isinstance(part, str)]
    except Exception as error:  # its parser raises whatever it meets
        raise ShapeError(f"the form cannot be read: send nothing but files, {most} at most") from error
    if not files:
        raise ShapeError("the form holds no file: send at least one image")
    return files


def _patience(request: Request, most: float) -> float:
    """Seconds that a caller gives us."""
    text = request.headers.get("x-deadline-ms")
    if text is None:
        return most
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise UsageError("X-Deadline-Ms must be a whole number of milliseconds, such as 500")
    return min(most, int(text) / 1000)


def _wants_npy(request: Request) -> bool:
    kinds = [kind.split(";")[0].strip().lower() for kind in request.headers.get("accept", "").split(",")]
    return "application/x-npy" in kinds or "application/octet-stream" in kinds


async def _predict(request: Request) -> Response:
    response: Response = await bentoml.get_current_service().respond(request)
    return response


async def _metadata(request: Request) -> Response:
    return JSONResponse(bentoml.get_current_service().metadata())


async def _openapi(request: Request) -> Response:
    service = bentoml.get_current_service()
    return JSONResponse(openapi.document(service.runtime.manifest, service.settings.token is not None))


async def _to_page(request: Request) -> Response:
    return RedirectResponse(page.PAGE)


# BentoML's routes can only be posted to, and describe themselves as it would have them: these stand before its own.
_routes = [
    Route(BINARY, _predict, methods=["POST"]),
    Route(IMAGE, _predict, methods=["POST"]),
    Route("/metadata", _metadata),
    Route("/docs.json", _openapi),
    Route("/", _to_page),  # BentoML's own page there loads scripts from elsewhere
    *page.ROUTES,
]
PredictiveUncertainty.mount_asgi_app(Starlette(routes=_routes))  # type: ignore[attr-defined]  # a Service, by now
PredictiveUncertainty.add_asgi_middleware(Gate)  # type: ignore[attr-defined]
