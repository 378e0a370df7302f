"""The service over one bundle as a Starlette application: routes and what they need, opened when it starts.

A request passes :mod:`~ensembler.serve.http.gate`, is read by :mod:`~ensembler.serve.http.readers` and
:mod:`~ensembler.serve.http.options`, waits in :mod:`~ensembler.serve.http.batcher`, and is answered by
:mod:`~ensembler.serve.http.answers`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from ensembler.errors import EnsemblerError
from ensembler.serve.http import answers, openapi, page
from ensembler.serve.http.gate import Gate, refusal
from ensembler.serve.http.metrics import Requests
from ensembler.serve.http.predictor import Predictor
from ensembler.serve.http.routes import EXAMPLES, KINDS, PAGE
from ensembler.serve.http.settings import Settings

__all__ = ["application"]


def application(
    settings: Settings, otherwise: Starlette | None = None, registry: CollectorRegistry | None = None
) -> Starlette:
    """Return the application.

    Args:
        settings: of the service.
        otherwise: answers requests to other routes, after the same checks; starts and stops with this application.
        registry: of the Prometheus metrics; a new one by default.
    """
    registry = registry or CollectorRegistry()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        predictor = app.state.predictor = Predictor(settings, registry)
        try:
            predictor.warm_up()
            if otherwise is None:
                yield
            else:
                async with otherwise.router.lifespan_context(otherwise):
                    yield
        finally:
            predictor.close()

    gate = Middleware(Gate, settings=settings, requests=Requests(registry))
    app = Starlette(routes=_ROUTES, middleware=[gate], lifespan=lifespan)
    if otherwise is not None:
        app.router.default = otherwise
    return app


async def _predict(request: Request) -> Response:
    predictor: Predictor = request.app.state.predictor
    try:
        return await predictor.respond(request)
    except EnsemblerError as error:
        return refusal(error)


async def _metadata(request: Request) -> Response:
    predictor: Predictor = request.app.state.predictor
    limits = predictor.settings.model_dump(exclude={"bundle", "token", "members", "require_signature"})
    return JSONResponse(answers.metadata(predictor.runtime, limits))


async def _openapi(request: Request) -> Response:
    predictor: Predictor = request.app.state.predictor
    return JSONResponse(openapi.document(predictor.runtime.manifest, predictor.settings.token is not None))


async def _page(request: Request) -> Response:
    return Response(page.html(), media_type="text/html", headers=page.headers())


async def _examples(request: Request) -> Response:
    predictor: Predictor = request.app.state.predictor
    return JSONResponse(page.examples(predictor.settings.bundle, predictor.runtime.manifest))


async def _to_page(request: Request) -> Response:
    return RedirectResponse(PAGE)


async def _alive(request: Request) -> Response:
    return PlainTextResponse("\n")


async def _ready(request: Request) -> Response:
    ready = request.app.state.predictor.runtime.ready
    return PlainTextResponse("\n", status_code=200 if ready else 503)


_ROUTES = [
    *(Route(path, _predict, methods=["POST"]) for path in KINDS),
    Route("/metadata", _metadata),
    Route("/docs.json", _openapi),
    Route("/", _to_page),
    Route(PAGE, _page),
    Route(EXAMPLES, _examples),
    Route("/livez", _alive),
    Route("/healthz", _alive),
    Route("/readyz", _ready),
]
