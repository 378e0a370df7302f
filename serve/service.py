"""The BentoML service: ``POST /predictive-uncertainty`` over one bundle.

Start it with ``ensembler serve BUNDLE``, or by hand from any folder::

    ENSEMBLER_BUNDLE=bundles/NAME bentoml serve ensembler.serve.service:PredictiveUncertainty

=======================  ===================================================================  =========
``ENSEMBLER_BUNDLE``     the bundle's folder                                                  required
``ENSEMBLER_MAX_BATCH``  the most images in one request                                       1024
``ENSEMBLER_MAX_BODY``   the most bytes in one request's body                                 32 MiB
``ENSEMBLER_WORKERS``    processes; each opens the bundle and takes its share of the cores    1
=======================  ===================================================================  =========

A request that cannot be honoured is answered 400 with ``{"error": "one sentence"}``.
"""

# BentoML ships no types.
# mypy: disallow-subclassing-any=False, disallow-untyped-decorators=False

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import bentoml
import numpy as np
from bentoml.exceptions import BentoMLException
from pydantic import Field
from starlette.responses import JSONResponse, Response

from ensembler.errors import EnsemblerError, ShapeError, UsageError
from ensembler.serve.images import check_images, images_from_json
from ensembler.serve.runtime import Prediction, Runtime, available_cpus
from ensembler.serve.schemas import Answer, ImagePrediction, ModelCard, read_bundle

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["BodyLimit", "PredictiveUncertainty"]


def _bundle() -> Path:
    bundle = os.environ.get("ENSEMBLER_BUNDLE")
    if not bundle:
        raise UsageError("no bundle to serve: set ENSEMBLER_BUNDLE to its folder, or start with ensembler serve BUNDLE")
    return Path(bundle)


def _setting(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"{name} must be a whole number from 1 up, not {text!r}")
    return int(text)


def _max_batch() -> int:
    return _setting("ENSEMBLER_MAX_BATCH", 1024)


_WORKERS = _setting("ENSEMBLER_WORKERS", 1)


class _Body(bytes):
    """A request's body as it came, which sets a caller over HTTP apart from one in Python."""


class Batch(bentoml.IODescriptor):
    """A batch of images, as JSON: ``{"images": [...]}``."""

    images: np.ndarray = Field(
        description="(B, H, W, 3): images as rows of pixels of [red, green, blue], whole numbers from 0 to 255"
    )

    @classmethod
    async def from_http_request(cls, request: Request, serde: Any) -> Self:
        # BentoML's own reading would take NaN, log a stack trace for every bad request and answer it with a list of
        # pydantic's errors. Ours happens in the thread that predicts.
        batch: Self = cls.model_construct(images=_Body(await request.body()))
        return batch


@bentoml.service(workers=_WORKERS, traffic={"timeout": 60})
class PredictiveUncertainty:
    """Predicts images with an ensemble, and says how sure it is of each."""

    def __init__(self) -> None:
        self.runtime = Runtime.load(_bundle(), threads=max(1, available_cpus() // _WORKERS))
        self.max_batch = _max_batch()

    @bentoml.on_deployment
    @staticmethod
    def verify() -> None:
        """Runs once, before any worker: what is wrong stops the server instead of restarting its workers for ever."""
        try:
            read_bundle(_bundle())
            _max_batch()
        except EnsemblerError as error:
            raise BentoMLException(str(error)) from error

    @bentoml.on_startup
    def warm_up(self) -> None:
        self.runtime.warm_up()

    @bentoml.on_shutdown
    def close(self) -> None:
        self.runtime.close()

    async def __is_ready__(self) -> bool:
        return self.runtime.ready

    @bentoml.api(route="/predictive-uncertainty", input_spec=Batch, output_spec=Answer)
    async def predictive_uncertainty(self, images: Any) -> Answer | Response:
        """Predict a batch of images.

        Args:
            images: (B, H, W, 3), whole numbers from 0 to 255: red, green and blue of each pixel.
        """
        try:
            return await asyncio.to_thread(self._answer, images)
        except ShapeError as error:
            if isinstance(images, _Body):
                return _refusal(error)
            raise

    def _answer(self, images: Any) -> Answer:
        if isinstance(images, _Body):
            images = images_from_json(images)
        checked = check_images(images, self.runtime.manifest.image_shape, self.max_batch)
        return _as_answer(self.runtime, self.runtime.predict(checked))


def _as_answer(runtime: Runtime, prediction: Prediction) -> Answer:
    manifest = runtime.manifest
    information, disagreement = prediction.mutual_information, prediction.disagreement
    unknown = [None] * len(prediction.labels)
    columns: dict[str, list[Any]] = {
        "class_index": prediction.classes.tolist(),
        "label": prediction.labels,
        "probabilities": prediction.probabilities.tolist(),
        "predictive_entropy": prediction.predictive_entropy.tolist(),
        "expected_entropy": prediction.expected_entropy.tolist(),
        "mutual_information": unknown if information is None else information.tolist(),
        "disagreement": unknown if disagreement is None else disagreement.tolist(),
        "members_used": [prediction.members_used] * len(prediction.labels),
    }
    return Answer(
        model=ModelCard(
            method=manifest.method,
            architecture=manifest.architecture,
            dataset=manifest.dataset,
            members=runtime.members,
            bundle=runtime.sha256,
        ),
        predictions=[
            ImagePrediction(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)
        ],
    )


class BodyLimit:
    """ASGI middleware: refuses bodies over ``limit`` bytes; BentoML would take any.

    What is over is read and dropped, so that a caller that sends all before it listens still gets the answer.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        chunks, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk, more = message.get("body", b""), message.get("more_body", False)
            size += len(chunk)
            if size <= self.limit:
                chunks.append(chunk)
        if size > self.limit:
            error = UsageError(f"the body has {size} bytes, more than {self.limit}: send fewer images at a time")
            return await _refusal(error)(scope, receive, send)
        body: list[Message] = [{"type": "http.request", "body": b"".join(chunks), "more_body": False}]
        chunks.clear()

        async def replay() -> Message:
            return body.pop() if body else await receive()

        return await self.app(scope, replay, send)


PredictiveUncertainty.add_asgi_middleware(  # type: ignore[attr-defined]  # a Service, by now
    BodyLimit, limit=_setting("ENSEMBLER_MAX_BODY", 32 * 2**20)
)


def _refusal(error: Exception) -> JSONResponse:
    return JSONResponse({"error": str(error)}, status_code=400)
