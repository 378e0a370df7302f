"""ASGI middleware that every request passes before anything looks at its body.

It checks, in this order: the token (401), the body's type (415), its size (413), how long it takes to arrive (408), and
how many requests are being handled already (503). A request whose caller disconnects is cancelled (499). Every error is
``{"error": "one sentence"}``, also those of unknown routes (404, 405) and unexpected ones (500). Each response is
counted and logged.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable
from time import monotonic
from typing import TYPE_CHECKING

from starlette.responses import JSONResponse

from ensembler.errors import ArtefactError, EnsemblerError
from ensembler.serve.http.batcher import OverloadError
from ensembler.serve.http.metrics import Requests
from ensembler.serve.http.routes import JSON, KINDS, PAGE, PROBES, PUBLIC
from ensembler.serve.http.settings import Settings

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Gate", "refusal"]

_HELD_BODIES = 8  # times the largest body: what one worker keeps of bodies at a time
_DRAINED_BODIES = 4  # times the largest body: what is read of a refused body, so that its sender reads the answer

_FEWER = "send fewer images at a time"
_SENTENCES = {
    404: "this route does not exist: GET /docs.json lists those that do",
    405: "this route does not take this method: GET /docs.json says which it takes",
    500: "the server failed on this request: its log says why",
}
_NOT_LOGGED = (*PROBES, "/metrics")

_logger = logging.getLogger("ensembler.serve")
_access = logging.getLogger("ensembler.access")


class Gate:
    """The middleware.

    It adds ``ensembler.arrived`` and ``ensembler.read`` to a request's scope: the times, by :func:`time.monotonic`, at
    which its headers and its whole body had arrived.
    """

    def __init__(self, app: ASGIApp, settings: Settings, requests: Requests) -> None:
        self.app = app
        self.settings = settings
        self._requests = requests
        self._held = 0
        self._handled = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        scope["ensembler.arrived"] = monotonic()
        outgoing = _Outgoing(scope, send, self._requests)
        body, headers = _Body(receive), dict(scope["headers"])
        try:
            self._check_token(scope["path"], headers)
            if scope["method"] != "POST" or scope["path"] not in KINDS:
                return await self.app(scope, receive, outgoing.send)
            _check_kind(scope["path"], headers)
        except _RefusedError as error:
            await self._drain(body)
            return await outgoing.refuse(error)
        except Exception:
            return await outgoing.fail()
        await self._handle(scope, receive, body, outgoing)

    async def _handle(self, scope: Scope, receive: Receive, body: _Body, outgoing: _Outgoing) -> None:
        try:
            whole = await self._read(body)
            if self._handled >= self.settings.max_requests:
                raise _RefusedError(503, f"{self._handled} requests are being answered already: send this one again")
            self._handled += 1
            try:
                scope["ensembler.read"] = monotonic()
                await _unless_disconnected(self.app(scope, _replay(whole), outgoing.send), receive)
            finally:
                self._handled -= 1
        except _DisconnectedError:
            await outgoing.refuse(_RefusedError(499, "the caller disconnected"))  # for the count and the log
        except _RefusedError as error:
            if error.status != 408:
                await self._drain(body)
            await outgoing.refuse(error)
        except Exception:
            await outgoing.fail()
        finally:
            self._held -= body.size

    async def _read(self, body: _Body) -> bytes:
        """Read a whole body within the limits."""
        most, seconds = self.settings.max_body, self.settings.body_ms / 1000
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout(seconds):
                async for chunk in body.chunks():
                    chunks.append(chunk)
                    body.size += len(chunk)
                    self._held += len(chunk)
                    if body.size > most:
                        raise _RefusedError(413, f"the body has more than {most} bytes: {_FEWER}")
                    if self._held > _HELD_BODIES * most:
                        raise _RefusedError(503, "too many large bodies arrive at a time: send this one again")
        except TimeoutError:
            raise _RefusedError(
                408, f"the body did not arrive within {seconds:g} s: send it faster, or {_FEWER}"
            ) from None
        return b"".join(chunks)

    async def _drain(self, body: _Body) -> None:
        await body.drain(_DRAINED_BODIES * self.settings.max_body, self.settings.body_ms / 1000)

    def _check_token(self, path: str, headers: dict[bytes, bytes]) -> None:
        if not self.settings.token or path in PUBLIC or path.startswith(f"{PAGE}/"):
            return
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        same = hmac.compare_digest(token.strip(), self.settings.token.encode())
        if not same or scheme.lower() != b"bearer":
            raise _RefusedError(401, "this server needs a token: send it as Authorization: Bearer TOKEN")


def refusal(error: EnsemblerError) -> JSONResponse:
    """Return the response to an error that was raised on purpose."""
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, OverloadError) else None
    fault = 500 if isinstance(error, ArtefactError) else 400  # the bundle's, or the request's
    return JSONResponse({"error": str(error)}, status_code=getattr(error, "status", fault), headers=headers)


class _RefusedError(EnsemblerError):
    """A request that is answered with this status and sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(status, {})


class _DisconnectedError(Exception):
    """The caller disconnected."""


class _Outgoing:
    """A response on its way: it is counted and logged, and errors that are not JSON get a sentence."""

    def __init__(self, scope: Scope, send: Send, requests: Requests) -> None:
        self._scope = scope
        self._send = send
        self._requests = requests
        self._started = False
        self._replaced = False

    async def send(self, message: Message) -> None:
        """Pass on a message of the application."""
        if message["type"] == "http.response.start":
            status = message["status"]
            if status in _SENTENCES and not _is_json(message):
                self._replaced = True
                return await self._respond(status, _SENTENCES[status])
            self._start(status)
        if not self._replaced:
            await self._send(message)

    async def refuse(self, error: _RefusedError) -> None:
        """Answer with an error."""
        await self._respond(error.status, str(error), error.headers)

    async def fail(self) -> None:
        """Log the exception being handled, and answer 500 unless an answer has begun."""
        _logger.exception("%s %r failed", self._scope["method"], self._scope["path"])
        if not self._started:
            await self._respond(500, _SENTENCES[500])

    async def _respond(self, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        self._start(status)
        response = JSONResponse({"error": sentence}, status_code=status, headers=headers)
        await response(self._scope, _disconnected, self._send)

    def _start(self, status: int) -> None:
        self._started = True
        scope, path = self._scope, self._scope["path"]
        self._requests.count(path, status)
        if path not in _NOT_LOGGED and _access.isEnabledFor(logging.INFO):
            client = scope.get("client") or ("-", "-")
            seconds = monotonic() - scope["ensembler.arrived"]
            _access.info("%s:%s %s %r %d %.2f ms", *client[:2], scope["method"], path, status, 1000 * seconds)


class _Body:
    """A request's body as it arrives; reading on continues where it was left."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._ended = False
        self.size = 0

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the rest of the body."""
        while not self._ended:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise _DisconnectedError
            self._ended = not message.get("more_body", False)
            yield message.get("body", b"")

    async def drain(self, most: int, seconds: float) -> None:
        """Read and drop the rest, so that a caller that sends everything before it reads gets its answer."""
        dropped = 0
        try:
            async with asyncio.timeout(seconds):
                async for chunk in self.chunks():
                    dropped += len(chunk)
                    if dropped > most:
                        return
        except (TimeoutError, _DisconnectedError):
            return


def _check_kind(path: str, headers: dict[bytes, bytes]) -> None:
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower().decode("latin-1")
    if kind and kind not in KINDS[path] and not (path == JSON and kind.endswith("+json")):
        raise _RefusedError(415, f"this route does not read the Content-Type sent: use {', '.join(KINDS[path])}")
    if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"):
        raise _RefusedError(415, "compressed bodies are not read: send it without Content-Encoding")


def _replay(body: bytes) -> Receive:
    """An ASGI ``receive`` that gives a body once."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if not left:
            await asyncio.Event().wait()  # a disconnection is noticed elsewhere
        return left.pop()

    return receive


async def _unless_disconnected(handling: Awaitable[None], receive: Receive) -> None:
    """Handle a request for as long as its caller is connected."""
    task = asyncio.ensure_future(handling)
    disconnected = asyncio.ensure_future(receive())  # the body has arrived: nothing else can
    try:
        await asyncio.wait({task, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _DisconnectedError
        task.result()
    finally:
        disconnected.cancel()
        if not task.done():
            task.cancel()


async def _disconnected() -> Message:
    return {"type": "http.disconnect"}


def _is_json(message: Message) -> bool:
    return dict(message.get("headers", [])).get(b"content-type", b"").startswith(b"application/json")
