"""ASGI middleware that every request passes before anything looks at its body.

It checks, in this order: the token (401), the body's type (415), its size (413), how long it takes to arrive (408),
how many bytes of bodies are held already, in all and of its address (503), and how many requests are handled
already (503). A request whose caller disconnects is cancelled (499). Every error is ``{"error": "one sentence"}``,
also those of unknown routes (404, 405) and unexpected ones (500). Each response is counted and logged.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from time import monotonic
from typing import TYPE_CHECKING

from starlette.responses import JSONResponse

from ensembler.errors import ArtefactError, EnsemblerError
from ensembler.serve.http.batcher import OverloadError
from ensembler.serve.http.bodies import check_head, check_type
from ensembler.serve.http.metrics import Requests
from ensembler.serve.http.routes import METRICS, PAGE, PROBES, PUBLIC, reads_a_body
from ensembler.serve.http.settings import Settings

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Gate", "refusal"]

_HELD_BODIES = 8  # times the largest body: what one worker keeps of bodies at a time, of one address half of it
_FREE = 2**16  # bytes of each body that are not counted
_WINDOW = 5.0  # seconds in which a body must keep up its rate
_DRAINED_BODIES = 4  # times the largest body: what is read of a refused body, so that its sender reads the answer

_FEWER = "send fewer images at a time"
_SENTENCES = {
    404: "this route does not exist: GET /docs.json lists those that do",
    405: "this route does not take this method: GET /docs.json says which it takes",
    500: "the server failed on this request: its log says why",
}
_LOGGED = 200  # characters of a path or an address
_NO_ADDRESS = re.compile(r"[^\w.:%-]", re.ASCII)
_NOT_LOGGED = (*PROBES, METRICS)

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
        self._budget = _Budget(settings.max_body)
        self._handled = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        scope["ensembler.arrived"] = monotonic()
        outgoing = _Outgoing(scope, send, self._requests)
        body, headers = _Body(receive), dict(scope["headers"])
        try:
            check_head(scope["path"], scope.get("query_string", b""), scope["headers"])
            self._check_token(scope["path"], headers)
            if scope["method"] != "POST" or not reads_a_body(scope["path"]):
                return await self.app(scope, receive, outgoing.send)
            check_type(headers)
        except EnsemblerError as error:
            await self._drain(body)
            return await outgoing.refuse(error)
        except Exception:
            return await outgoing.fail()
        await self._handle(scope, receive, body, outgoing)

    async def _handle(self, scope: Scope, receive: Receive, body: _Body, outgoing: _Outgoing) -> None:
        held = _Held(self._budget, (scope.get("client") or ("-",))[0])
        try:
            whole = await self._read(body, held)
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
            held.release()  # what is drained is not kept
            if error.status != 408:
                await self._drain(body)
            await outgoing.refuse(error)
        except Exception:
            await outgoing.fail()
        finally:
            held.release()

    async def _read(self, body: _Body, held: _Held) -> bytes:
        """Read a whole body within the limits."""
        most = self.settings.max_body
        chunks: list[bytes] = []
        size = 0
        async for chunk in body.chunks(self.settings.body_ms / 1000, self.settings.body_rate):
            chunks.append(chunk)
            size += len(chunk)
            if size > most:
                raise _RefusedError(413, f"the body has more than {most} bytes: {_FEWER}")
            if not held.take(size):
                raise _RefusedError(503, "too many large bodies arrive at a time: send this one again")
        return b"".join(chunks)

    async def _drain(self, body: _Body) -> None:
        """Read and drop the rest, so that a caller that sends everything before it reads gets its answer."""
        left = _DRAINED_BODIES * self.settings.max_body
        try:
            async for chunk in body.chunks(self.settings.body_ms / 1000, self.settings.body_rate):
                left -= len(chunk)
                if left < 0:
                    return
        except (_RefusedError, _DisconnectedError):
            return

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
                allow = dict(message.get("headers", [])).get(b"allow")
                return await self._respond(status, _SENTENCES[status], {"Allow": allow.decode()} if allow else None)
            self._start(status)
        if not self._replaced:
            await self._send(message)

    async def refuse(self, error: EnsemblerError) -> None:
        """Answer with an error."""
        await self._respond(getattr(error, "status", 400), str(error), getattr(error, "headers", None))

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
            address, port = scope.get("client") or ("-", "-")
            seconds = monotonic() - scope["ensembler.arrived"]
            if len(path) > _LOGGED:
                path = f"{path[:_LOGGED]}..."
            address = _NO_ADDRESS.sub("?", address[:_LOGGED])  # it may be what X-Forwarded-For says
            _access.info("%s:%s %s %r %d %.2f ms", address, port, scope["method"], path, status, 1000 * seconds)


class _Body:
    """A request's body as it arrives; reading on continues where it was left."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._ended = False

    async def chunks(self, seconds: float, rate: int) -> AsyncIterator[bytes]:
        """Yield the rest of the body.

        Args:
            seconds: in which it must arrive.
            rate: bytes a second that must arrive, on average over every :data:`_WINDOW` seconds.
        """
        now = asyncio.get_running_loop().time
        last, window, arrived = now() + seconds, now() + _WINDOW, 0
        while not self._ended:
            try:
                async with asyncio.timeout_at(min(last, window)):
                    message = await self._receive()
            except TimeoutError:
                if now() >= last:
                    what = f"the body did not arrive within {seconds:g} s"
                elif arrived < rate * _WINDOW:
                    what = f"the body arrives more slowly than {rate} bytes a second"
                else:
                    window, arrived = now() + _WINDOW, 0
                    continue
                raise _RefusedError(408, f"{what}: send it faster, or {_FEWER}") from None
            if message["type"] == "http.disconnect":
                raise _DisconnectedError
            self._ended = not message.get("more_body", False)
            arrived += len(message.get("body", b""))
            yield message.get("body", b"")


class _Budget:
    """Bytes of bodies that one worker keeps: in all, and of each address.

    The first bytes of a body are free, so that small requests always get through.
    """

    def __init__(self, max_body: int) -> None:
        self.free = min(_FREE, max_body // _HELD_BODIES)
        self._most = _HELD_BODIES * max_body
        self._share = self._most // 2
        self.held: Counter[str] = Counter()

    def take(self, host: str, more: int) -> bool:
        """Count bytes of an address, or return that they are too many."""
        if self.held[host] + more > self._share or self.held.total() + more > self._most:
            return False
        self.held[host] += more
        return True

    def release(self, host: str, count: int) -> None:
        """Forget bytes of an address."""
        self.held[host] -= count
        if not self.held[host]:
            del self.held[host]


class _Held:
    """What one body takes of the budget."""

    def __init__(self, budget: _Budget, host: str) -> None:
        self._budget = budget
        self._host = host
        self._count = 0

    def take(self, size: int) -> bool:
        """Count a body that has reached this size."""
        more = max(0, size - self._budget.free) - self._count
        if more <= 0:
            return True
        taken = self._budget.take(self._host, more)
        self._count += more if taken else 0
        return taken

    def release(self) -> None:
        """Forget the body; a second time changes nothing."""
        if self._count:
            self._budget.release(self._host, self._count)
            self._count = 0


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
