"""What a request must pass before anything looks at it, as ASGI middleware: BentoML would take any body of anybody.

In this order: the token (401), the kind of the body (415), its size (413), the time it takes to arrive (408), and how
many requests are already being handled (503). A caller that hangs up stops its own request. Every refusal is
``{"error": "one sentence"}``, also those of routes that do not exist (404, 405) and of what nobody foresaw (500).
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable
from time import monotonic
from typing import TYPE_CHECKING

from starlette.responses import JSONResponse

from ensembler.errors import EnsemblerError
from ensembler.serve.http.batcher import OverloadError
from ensembler.serve.http.metrics import refusals
from ensembler.serve.http.settings import Settings

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["BINARY", "IMAGE", "JSON", "KINDS", "OPEN", "Gate", "refusal"]

JSON = "/predictive-uncertainty"
BINARY = "/predictive-uncertainty/binary"
IMAGE = "/predictive-uncertainty/image"

KINDS = {
    # The second and third are what curl and others call a body that they were told nothing about.
    JSON: ("application/json", "application/x-www-form-urlencoded", "text/plain"),
    BINARY: ("application/octet-stream", "application/x-npy", "application/x-www-form-urlencoded"),
    IMAGE: ("image/png", "image/jpeg", "multipart/form-data", "application/octet-stream"),
}
"""The media types that each route reads; no type at all is read, too."""

OPEN = ("/livez", "/readyz", "/healthz", "/", "/ui")
"""Routes that need no token: what a prober asks, and a page that holds nothing but itself."""

_HELD_BODIES = 8  # of the largest size: what one worker holds of bodies at a time
_DROPPED_BODIES = 4  # of the largest size: what is read of a refused body, so that its sender hears why

_FEWER = "send fewer images at a time"
_SENTENCES = {
    404: "this route does not exist: GET /docs.json lists those that do",
    405: "this route does not take this method: GET /docs.json says which it takes",
    500: "the server failed on this request: its log says why",
}

_logger = logging.getLogger("bentoml.ensembler")


class Gate:
    """The middleware; it reads its settings when the server starts.

    To what it lets pass, it adds to the scope ``ensembler.arrived`` and ``ensembler.read``: when the request's head and
    the whole of its body had come, by :func:`time.monotonic`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.settings = Settings.read()
        self._held = 0
        self._handled = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        outgoing = _Outgoing(scope, send)
        body, headers = _Body(receive), dict(scope["headers"])
        scope["ensembler.arrived"] = monotonic()
        try:
            self._check_token(scope["path"], headers)
            if scope["method"] != "POST" or scope["path"] not in KINDS:
                return await self.app(scope, receive, outgoing.send)
            _check_kind(scope["path"], headers)
        except _RefusedError as error:
            await body.drop(_DROPPED_BODIES * self.settings.max_body, self.settings.body_time)
            return await outgoing.refuse(error)
        except Exception:
            return await outgoing.fail()
        await self._guard(scope, receive, body, outgoing)

    async def _guard(self, scope: Scope, receive: Receive, body: _Body, outgoing: _Outgoing) -> None:
        chunks: list[bytes] = []
        size = 0
        try:
            try:
                async with asyncio.timeout(self.settings.body_time):
                    async for chunk in body.chunks():
                        size += len(chunk)
                        self._held += len(chunk)
                        if size > self.settings.max_body:
                            raise _RefusedError(413, f"the body has more than {self.settings.max_body} bytes: {_FEWER}")
                        if self._held > _HELD_BODIES * self.settings.max_body:
                            raise _RefusedError(503, "too many large bodies arrive at a time: send this one again", "1")
                        chunks.append(chunk)
            except TimeoutError:
                message = f"the body did not arrive within {self.settings.body_time:g} s: send it faster, or {_FEWER}"
                raise _RefusedError(408, message) from None
            if self._handled >= self.settings.max_requests:
                message = f"{self._handled} requests are being answered already: send this one again"
                raise _RefusedError(503, message, "1")
            whole, replayed = b"".join(chunks), False
            chunks.clear()

            async def replay() -> Message:
                nonlocal replayed
                if replayed:
                    await asyncio.Event().wait()  # whoever hangs up is seen below
                replayed = True
                return {"type": "http.request", "body": whole, "more_body": False}

            self._handled += 1
            try:
                scope["ensembler.read"] = monotonic()
                await _unless_gone(self.app(scope, replay, outgoing.send), receive)
            finally:
                self._handled -= 1
        except _GoneError:
            # Nobody hears it, but it is counted, here and in BentoML's own metrics.
            await outgoing.refuse(_RefusedError(499, "the caller hung up"))
        except _RefusedError as error:
            chunks.clear()
            if error.status != 408:
                await body.drop(_DROPPED_BODIES * self.settings.max_body, self.settings.body_time)
            await outgoing.refuse(error)
        except Exception:
            await outgoing.fail()
        finally:
            self._held -= size

    def _check_token(self, path: str, headers: dict[bytes, bytes]) -> None:
        if not self.settings.token or path in OPEN or path.startswith("/ui/"):
            return
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        same = hmac.compare_digest(token.strip(), self.settings.token.encode())
        if not same or scheme.lower() != b"bearer":
            raise _RefusedError(401, "this server wants a token: send it as Authorization: Bearer TOKEN")


def refusal(error: Exception) -> JSONResponse:
    """The response that tells a caller of an error raised on purpose."""
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, OverloadError) else None
    return JSONResponse({"error": str(error)}, status_code=getattr(error, "status", 400), headers=headers)


class _RefusedError(EnsemblerError):
    def __init__(self, status: int, message: str, retry_after: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        if retry_after:
            self.headers["Retry-After"] = retry_after


class _GoneError(Exception):
    """The caller hung up."""


class _Outgoing:
    """A response on its way: errors are counted, and those of the framework get a sentence."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self._started = False
        self._replaced = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            status = message["status"]
            if status in _SENTENCES and not _is_json(message):
                self._replaced = True
                return await self._respond(status, _SENTENCES[status], {})
            if status >= 400:
                refusals().count(status)
        if not self._replaced:
            await self._send(message)

    async def refuse(self, error: _RefusedError) -> None:
        await self._respond(error.status, str(error), error.headers)

    async def fail(self) -> None:
        _logger.exception("%s %s failed", self._scope["method"], self._scope["path"])
        if not self._started:
            await self._respond(500, _SENTENCES[500], {})

    async def _respond(self, status: int, sentence: str, headers: dict[str, str]) -> None:
        refusals().count(status)
        response = JSONResponse({"error": sentence}, status_code=status, headers=headers)
        await response(self._scope, _nothing, self._send)


def _check_kind(path: str, headers: dict[bytes, bytes]) -> None:
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower().decode("latin-1")
    if kind and kind not in KINDS[path] and not (path == JSON and kind.endswith("+json")):
        raise _RefusedError(415, f"this route does not read the Content-Type sent: use {', '.join(KINDS[path])}")
    if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"):
        raise _RefusedError(415, "compressed bodies are not read: send it without Content-Encoding")


class _Body:
    """A request's body as it comes; read on, it goes on where it was left."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._ended = False

    async def chunks(self) -> AsyncIterator[bytes]:
        while not self._ended:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise _GoneError
            self._ended = not message.get("more_body", False)
            yield message.get("body", b"")

    async def drop(self, most: int, seconds: float) -> None:
        """Read what still comes, so that a caller that sends all before it listens still gets its answer."""
        size = 0
        try:
            async with asyncio.timeout(seconds):
                async for chunk in self.chunks():
                    size += len(chunk)
                    if size > most:
                        return
        except (TimeoutError, _GoneError):
            return


async def _unless_gone(handling: Awaitable[None], receive: Receive) -> None:
    """Handle a request as long as its caller is there."""
    task = asyncio.ensure_future(handling)
    gone = asyncio.ensure_future(receive())  # the body has come: nothing else can
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _GoneError
        task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def _is_json(message: Message) -> bool:
    return dict(message.get("headers", [])).get(b"content-type", b"").startswith(b"application/json")
