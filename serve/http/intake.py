"""A worker's end of the front: connections come as open sockets, and uvicorn answers them.

What the front does for a connection's first head, :class:`_Patient` does for the later ones, and for answers that
nobody reads. The socket at which BentoML would let each worker listen becomes the front's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from ensembler.errors import EnsemblerError
from ensembler.serve.http.front import CHANNEL, HEAD_SECONDS, NUMBER

if TYPE_CHECKING:
    from starlette.applications import Starlette

__all__ = ["join_front"]

_READ_SECONDS = 5.0  # in which a caller must have taken some of its answer
_KEEP_ALIVE = 5  # seconds
_CLOSED = 1000  # connections in a message, which is sent whole or not at all


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
        channel.pass_listener()
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


def _bentoml_listener() -> int | None:
    """The file at which BentoML's worker will listen, as its command line says; none of TLS, which is BentoML's."""
    if "--fd" not in sys.argv or "--ssl-certfile" in sys.argv:
        return None
    return int(sys.argv[sys.argv.index("--fd") + 1])


class _Channel:
    """What this worker tells the front, one JSON object a line."""

    def __init__(self, folder: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(str(folder / CHANNEL))
        self.socket.setblocking(False)

    def pass_listener(self) -> None:
        """Pass the front the socket at which BentoML's worker is about to listen, which gets one that nobody asks."""
        if (listening := _bentoml_listener()) is None:
            return
        socket.send_fds(self.socket, [b"{}\n"], [listening])
        with socket.create_server(("127.0.0.1", 0)) as silent:
            os.dup2(silent.fileno(), listening, inheritable=False)

    def tell(self, **message: Any) -> bool:
        """Send a short message; false where it cannot be sent now."""
        try:
            self.socket.send(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True


@asynccontextmanager
async def _intake(app: Starlette, channel: _Channel, graceful: int) -> AsyncIterator[None]:
    server = _Server(
        uvicorn.Config(
            app,
            http=_Patient,
            lifespan="off",
            ws="none",  # another protocol would take the connection over, and never say that it was closed
            log_config=None,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=graceful,
        )
    )
    loop, connecting, closed = asyncio.get_running_loop(), set[asyncio.Task[Any]](), list[int]()

    def protocol(number: int) -> asyncio.Protocol:
        made = _Patient(config=server.config, server_state=server.server_state, app_state={}, _loop=loop)
        made.on_close = lambda: closed.append(number)
        return made

    def receive() -> bool:
        """Take a connection; false where none waits."""
        try:
            content, files, _, _ = socket.recv_fds(channel.socket, NUMBER, 1)
        except OSError:
            return False
        if not content:  # the parent has ended
            loop.remove_reader(channel.socket)
        for file in files:
            number = int.from_bytes(content, "little")
            task = loop.create_task(loop.connect_accepted_socket(partial(protocol, number), socket.socket(fileno=file)))
            connecting.add(task)
            task.add_done_callback(connecting.discard)
        return bool(files)

    async def tell_closed() -> None:
        while True:
            while channel.tell(closed=closed[:_CLOSED]):  # also the sign that this loop runs
                del closed[:_CLOSED]
                if not closed:
                    break
            await asyncio.sleep(0.2)

    serving, telling = asyncio.create_task(server.serve(sockets=[])), asyncio.create_task(tell_closed())
    loop.add_reader(channel.socket, receive)
    channel.tell(ready=True)
    try:
        yield
    finally:
        channel.tell(ending=True)
        while receive():  # what was passed before
            pass
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
