"""The service over one bundle as a Starlette application: routes and what they need, opened when it starts.

A request passes :mod:`~ensembler.serve.http.gate`, is read by :mod:`~ensembler.serve.http.readers` and
:mod:`~ensembler.serve.http.options`, waits in :mod:`~ensembler.serve.http.batcher`, and is answered by
:mod:`~ensembler.serve.http.answers`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from ensembler.errors import EnsemblerError
from ensembler.serve.http import answers, kserve, openapi, page
from ensembler.serve.http.gate import Gate, refusal
from ensembler.serve.http.metrics import Exposition, Requests
from ensembler.serve.http.predictor import Predictor
from ensembler.serve.http.routes import (
    ALIVE,
    DOCS,
    EXAMPLES,
    METADATA,
    METRICS,
    PAGE,
    PREDICT,
    READY,
    SCHEMA,
    V2,
    V2_INFER,
    V2_MODEL,
    V2_READY,
    V2_VERSION,
    answer_of_probe,
)
from ensembler.serve.http.settings import Settings
from ensembler.serve.runtime.images import shown

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["application"]


def application(
    settings: Settings,
    otherwise: Starlette | None = None,
    registry: CollectorRegistry | None = None,
    shared: Path | None = None,
) -> Starlette:
    """Return the application.

    Args:
        settings: of the service.
        otherwise: answers requests to other routes, after the same checks; starts and stops with this application.
        registry: of the Prometheus metrics; a new one by default.
        shared: folder that all workers of one server share; ``None`` where this is the only one.
    """
    registry = registry or CollectorRegistry()
    exposition = Exposition(registry, shared)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        predictor = app.state.predictor = Predictor(settings, registry)
        app.state.exposition = exposition
        writing = asyncio.create_task(exposition.keep_written())
        try:
            predictor.warm_up()
            app.state.examples = page.examples(settings.bundle, predictor.runtime.manifest)
            if otherwise is None:
                yield
            else:
                async with otherwise.router.lifespan_context(otherwise):
                    yield
        finally:
            writing.cancel()
            predictor.close()

    middleware = [Middleware(Gate, settings=settings, requests=Requests(registry))]
    if settings.cors_origin is not None:
        middleware.insert(0, _cors(settings.cors_origin.split(",")))
    app = Starlette(routes=_ROUTES, middleware=middleware, lifespan=lifespan)
    if otherwise is not None:
        app.router.default = _with_options(otherwise)
    return app


def _cors(origins: list[str]) -> Middleware:
    """Lets scripts of these origins read the answers, refusals included, and answers their preflights."""
    return Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["GET", "HEAD", "POST"],
        allow_headers=["Authorization", "Content-Type", "X-Deadline-Ms", "X-Shape", kserve.HEAD_LENGTH],
        expose_headers=["Retry-After", "Server-Timing", "X-Batch-Size", kserve.HEAD_LENGTH],
    )


async def _predict(request: Request) -> Response:
    predictor: Predictor = request.app.state.predictor
    try:
        return await predictor.respond(request)
    except EnsemblerError as error:
        return refusal(error)


async def _metadata(request: Request) -> Response:
    predictor: Predictor = request.app.state.predictor
    hidden = {"bundle", "token", "members", "log_answers", "require_signature"}
    limits = predictor.settings.model_dump(exclude=hidden)
    return JSONResponse(answers.metadata(predictor.runtime, limits))


async def _openapi(request: Request) -> Response:
    predictor: Predictor = request.app.state.predictor
    return JSONResponse(openapi.document(predictor.runtime.manifest, predictor.settings.token is not None))


async def _page(request: Request) -> Response:
    return Response(page.html(), media_type="text/html", headers=page.headers())


async def _examples(request: Request) -> Response:
    return JSONResponse(request.app.state.examples)


async def _metrics(request: Request) -> Response:
    text = await asyncio.to_thread(request.app.state.exposition.text)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


async def _to_page(request: Request) -> Response:
    return RedirectResponse(PAGE)


async def _alive(request: Request) -> Response:
    return _health(request, True)


async def _ready(request: Request) -> Response:
    return _health(request, request.app.state.predictor.runtime.ready)


def _health(request: Request, healthy: bool) -> Response:
    body, media_type = answer_of_probe(request.url.path, healthy)
    return Response(body, status_code=200 if healthy else 503, media_type=media_type)


async def _server(request: Request) -> Response:
    return JSONResponse(kserve.server())


async def _model(request: Request) -> Response:
    return _unless_another(request) or JSONResponse(kserve.model(request.app.state.predictor.runtime))


async def _model_ready(request: Request) -> Response:
    ready = request.app.state.predictor.runtime.ready
    content = {"name": request.path_params["name"], "ready": ready}
    return _unless_another(request) or JSONResponse(content, status_code=200 if ready else 503)


async def _infer(request: Request) -> Response:
    if refused := _unless_another(request):
        return refused
    try:
        return await request.app.state.predictor.infer(request)
    except EnsemblerError as error:
        return refusal(error)


def _unless_another(request: Request) -> Response | None:
    """A refusal, where a path names another model than this server's."""
    name = request.app.state.predictor.runtime.manifest.run.name
    if request.path_params["name"] == name:
        return None
    return JSONResponse({"error": f"this server has the model {shown(name)} only: ask for that"}, status_code=404)


def _route(path: str, endpoint: Callable[[Request], Awaitable[Response]], method: str = "GET") -> Route:
    """A route that answers HEAD and OPTIONS, too."""
    allowed = [method, "HEAD", "OPTIONS"]

    async def answer(request: Request) -> Response:
        if request.method == "OPTIONS" or (request.method == "HEAD" and method != "GET"):
            return Response(status_code=204, headers={"Allow": ", ".join(allowed)})
        return await endpoint(request)

    return Route(path, answer, methods=allowed)


def _with_options(app: Starlette) -> ASGIApp:
    """BentoML's routes, which are read only, with an answer to OPTIONS."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "OPTIONS" and scope["path"] == SCHEMA:
            return await Response(status_code=204, headers={"Allow": "GET, HEAD, OPTIONS"})(scope, receive, send)
        await app(scope, receive, send)

    return answer


_ROUTES = [
    _route(PREDICT, _predict, "POST"),
    _route(METADATA, _metadata),
    _route(DOCS, _openapi),
    _route(METRICS, _metrics),
    _route("/", _to_page),
    _route(PAGE, _page),
    _route(EXAMPLES, _examples),
    *(_route(path, _alive) for path in ALIVE),
    *(_route(path, _ready) for path in READY),
    _route(V2, _server),
    *(
        _route(route.replace("{name}", f"{{name}}{version}"), endpoint, method)
        for route, endpoint, method in (
            (V2_MODEL, _model, "GET"),
            (V2_READY, _model_ready, "GET"),
            (V2_INFER, _infer, "POST"),
        )
        for version in ("", V2_VERSION)
    ),
]
