"""The three prediction routes: a request's body and options in, JSON or ``.npy`` out."""

from __future__ import annotations

from time import monotonic

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from ensembler.errors import EnsemblerError, ShapeError, UsageError
from ensembler.serve.http import answers, readers
from ensembler.serve.http.gate import refusal
from ensembler.serve.http.metrics import STAGES
from ensembler.serve.http.options import Options
from ensembler.serve.http.predictor import Predictor
from ensembler.serve.http.routes import BINARY, IMAGE, JSON

__all__ = ["predict"]

# JSON above these sizes is read and written in a thread: other requests would wait longer than the thread costs.
_BYTES = 32 * 1024
_NUMBERS = 4 * 1024

Read = tuple[NDArray[np.uint8], Options]


async def predict(request: Request) -> Response:
    """Answer a request whose body has arrived."""
    predictor: Predictor = request.app.state.predictor
    try:
        arrived, received = (request.scope.get(f"ensembler.{name}", monotonic()) for name in ("arrived", "read"))
        deadline = arrived + _patience(request, predictor.settings.deadline)
        images, options = await _READERS[request.url.path](request, predictor)
        array = answers.array_output(options) if _wants_npy(request) else None
        read = monotonic()
        answered = await predictor.predict(images, options, deadline)
        predicted = monotonic()
        large = array is None and len(images) * len(predictor.runtime.manifest.classes) > _NUMBERS
        content = await predictor.call(large, predictor.write, answered.columns, options, array)
    except EnsemblerError as error:
        return refusal(error)
    seconds = (read - received, answered.queued, answered.predicted, monotonic() - predicted)
    stages = dict(zip(STAGES, seconds, strict=True))
    predictor.metrics.stages(stages)
    headers = {
        "X-Batch-Size": str(answered.batch),
        "Server-Timing": ", ".join(f"{stage};dur={1000 * value:.2f}" for stage, value in stages.items()),
    }
    return Response(content, media_type="application/json" if array is None else "application/x-npy", headers=headers)


async def _from_json(request: Request, predictor: Predictor) -> Read:
    body = await request.body()
    if request.query_params:
        raise UsageError("this route takes its options in the body: put them beside images")

    def read() -> Read:
        images, fields = readers.fields_from_json(body)
        return predictor.check(images), predictor.resolve(Options.from_json(fields))

    return await predictor.call(len(body) > _BYTES, read)


async def _from_bytes(request: Request, predictor: Predictor) -> Read:
    body = await request.body()
    shape = request.headers.get("x-shape")
    images = readers.images_from_npy(body) if shape is None else readers.images_from_raw(body, shape)
    return predictor.check(images), predictor.resolve(Options.from_query(request.query_params))


async def _from_files(request: Request, predictor: Predictor) -> Read:
    options = predictor.resolve(Options.from_query(request.query_params))
    files = await _files(request, predictor.settings.max_batch)
    shape, most = predictor.runtime.manifest.image_shape, predictor.settings.max_pixels

    def read() -> Read:
        images = []
        for number, file in enumerate(files, start=1):
            try:
                images.append(readers.image_from_file(file, shape, most))
            except ShapeError as error:
                where = f"file {number} of {len(files)}: " if len(files) > 1 else ""
                raise type(error)(f"{where}{error}") from error
        return np.stack(images), options

    return await predictor.call(True, read)


_READERS = {JSON: _from_json, BINARY: _from_bytes, IMAGE: _from_files}


async def _files(request: Request, most: int) -> list[bytes]:
    """Return the files of a form, or else the body."""
    body = await request.body()
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return [body]
    try:
        async with request.form(max_files=most, max_fields=0) as form:
            files = [await part.read() for _, part in form.multi_items() if not isinstance(part, str)]
    except Exception as error:  # its parser raises errors of any class
        raise ShapeError(f"the form cannot be read: send nothing but files, {most} at most") from error
    if not files:
        raise ShapeError("the form holds no file: send at least one image")
    return files


def _patience(request: Request, most: float) -> float:
    """Return how long the caller will wait, in seconds."""
    text = request.headers.get("x-deadline-ms")
    if text is None:
        return most
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise UsageError("X-Deadline-Ms must be a whole number of milliseconds, such as 500")
    return min(most, int(text) / 1000)


def _wants_npy(request: Request) -> bool:
    kinds = [kind.split(";")[0].strip().lower() for kind in request.headers.get("accept", "").split(",")]
    return "application/x-npy" in kinds or "application/octet-stream" in kinds
