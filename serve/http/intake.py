"""A worker's end of the front: connections come as open sockets, and uvicorn answers them.

What the front does for a connection's first head, :class:`_Patient` does for the later ones, and for answers that
nobody reads. Without a front (``bentoml serve``), BentoML's own listener is the only one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from ensembler.errors import EnsemblerError
from ensembler.serve.http.front import CHANNEL, HEAD_SECONDS

if TYPE_CHECKING:
    from starlette.applications import Starlette

__all__ = ["join_front"]

_READ_SECONDS = 5.0  # in which a caller must have taken some of its answer
_KEEP_ALIVE = 5  # seconds


def join_front(app: Starlette, folder: Path, graceful: int) -> None:
    """Let an application be asked through the server's front, from when it has started until it stops.

    Args:
        app: the application.
        folder: that the processes of the server share.
        graceful: seconds that requests in flight may take when it stops.
    """
    original = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(starting: Starlette) -> AsyncIterator[Any]:
        channel = _Channel(folder)
        async with contextlib.AsyncExitStack() as stack:
            try:
                state = await stack.enter_async_context(original(starting))
            except Exception as error:
                channel.tell(failed=_sentence(error))
                os._exit(3)  # uvicorn would add a stack trace
            await stack.enter_async_context(_intake(app, channel, graceful))
            yield state

    app.router.lifespan_context = lifespan


def _sentence(error: Exception) -> str:
    if isinstance(error, EnsemblerError):
        return str(error)
    reason = next(iter(str(error).splitlines()), "")[:200]
    if isinstance(error, MemoryError) or "alloc" in reason.lower():
        return "the bundle does not fit in memory: give it more, or use fewer workers or members"
    return f"the bundle cannot be opened ({type(error).__name__}: {reason}): run ensembler verify on it"


class _Channel:
    """What this worker tells the front, one JSON object a line."""

    def __init__(self, folder: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(str(folder / CHANNEL))
        self.socket.setblocking(False)

    def tell(self, **message: Any) -> None:
        with contextlib.suppress(OSError):
            self.socket.send(json.dumps(message).encode() + b"\n")


@asynccontextmanager
async def _intake(app: Starlette, channel: _Channel, graceful: int) -> AsyncIterator[None]:
    server = _Server(
        uvicorn.Config(
            app,
            http=_Patient,
            lifespan="off",
            log_config=None,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=graceful,
        )
    )
    loop, connecting, closed = asyncio.get_running_loop(), set[asyncio.Task[Any]](), 0

    def note_closed() -> None:
        nonlocal closed
        closed += 1

    def protocol() -> asyncio.Protocol:
        made = _Patient(config=server.config, server_state=server.server_state, app_state={}, _loop=loop)
        made.on_close = note_closed
        return made

    def receive() -> None:
        try:
            content, files, _, _ = socket.recv_fds(channel.socket, 64, 64)
        except OSError:
            return
        if not content:  # the parent has ended
            loop.remove_reader(channel.socket)
        for file in files:
            task = loop.create_task(loop.connect_accepted_socket(protocol, socket.socket(fileno=file)))
            connecting.add(task)
            task.add_done_callback(connecting.discard)

    async def tell_counts() -> None:
        nonlocal closed
        while True:
            count, closed = closed, 0
            channel.tell(closed=count)  # also the sign that this loop runs
            await asyncio.sleep(0.2)

    serving, telling = asyncio.create_task(server.serve(sockets=[])), asyncio.create_task(tell_counts())
    loop.add_reader(channel.socket, receive)
    channel.tell(ready=True)
    try:
        yield
    finally:
        channel.tell(ending=True)
        receive()  # what was passed before
        loop.remove_reader(channel.socket)
        if connecting:
            await asyncio.wait(connecting)
        server.should_exit = True
        await serving
        telling.cancel()
        channel.socket.close()


class _Server(uvicorn.Server):
    """A server inside another, which has the signals."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Patient(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's protocol, with an end to heads that do not arrive and to answers that are not read."""

    on_close: Any = staticmethod(lambda: None)
    _head: asyncio.TimerHandle | None = None
    _answer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_head()
        else:
            self._await_head()

    def on_response_complete(self) -> None:
        self._stop_head()
        super().on_response_complete()
        self._await_reader()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head()
        if self._answer is not None:
            self._answer.cancel()
        super().connection_lost(exc)
        self.on_close()

    def _await_head(self) -> None:
        if self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _stop_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _await_reader(self) -> None:
        """Drop the connection where nothing of its answer is taken for a while."""
        if self._answer is None and (left := self.transport.get_write_buffer_size()):
            self._answer = self.loop.call_later(_READ_SECONDS, self._check_reader, left)

    def _check_reader(self, left: int) -> None:
        self._answer = None
        if self.transport.get_write_buffer_size() >= left:
            self.transport.abort()
        else:
            self._await_reader()
