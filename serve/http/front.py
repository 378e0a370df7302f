"""The server's front: it accepts connections, drops those without a request, and answers health checks.

It is a thread of the server's parent process, which does nothing else, so no flood delays its answers. A connection
whose first head has arrived is passed to the worker with the fewest, as an open socket: nothing is copied, and the
front is not in the path of requests. It looks at the head without reading it (``MSG_PEEK``). Workers tell it over a
Unix socket when they are ready, and why they cannot be (:mod:`ensembler.serve.http.intake`).
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any

from ensembler.serve.http.routes import PROBES, READY, answer_of_probe

__all__ = ["CHANNEL", "HEAD_SECONDS", "Front", "listen", "raise_file_limit", "stop_this_process"]

CHANNEL = "front.sock"
"""The workers' Unix socket, in the folder that they share."""

HEAD_SECONDS = 10.0
"""How long a head may take to arrive."""

_HEAD = 2**16  # bytes
_ACCEPTED = 64  # connections at a time
_SILENT = 60.0  # seconds without a word of any worker, after which the server is held to hang
_TRIES = 2  # of opening the bundle
_RESERVED = 64  # files that are not connections
_GET = re.compile(rb"(GET|HEAD) ([^ ?]+)(\?[^ ]*)? HTTP/1\.[01]\r?\n")
_KILLED = (
    "workers were killed while they opened the bundle, as happens where a model does not fit in memory: give it more "
    "memory, or use fewer workers or members"
)

_logger = logging.getLogger("ensembler.serve")


@dataclass(eq=False)
class _Worker:
    channel: socket.socket
    ready: bool = False
    ending: bool = False
    connections: int = 0
    unread: bytes = b""


@dataclass(eq=False)
class _Waiting:
    """A connection whose head has not arrived."""

    peer: socket.socket
    since: float = field(default_factory=monotonic)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket at an IP address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)


def raise_file_limit() -> int:
    """Let this process and its children open as many files as they may; return how many."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 2**16 if hard == resource.RLIM_INFINITY else min(hard, 2**16)
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(soft, most)


class Front:
    """The thread.

    Args:
        folder: that the workers share.
        public: a listening socket, for this front alone; without it, workers only tell how they are.
        on_failure: called with one sentence where no worker can be started.
    """

    def __init__(self, folder: Path, public: socket.socket | None, on_failure: Callable[[str], None]) -> None:
        self._public = public
        self._on_failure = on_failure
        self._workers: set[_Worker] = set()
        self._killed = 0  # in a row while they opened the bundle
        self._heard = monotonic()  # when a worker last said something
        self._waiting: dict[int, _Waiting] = {}  # by file, the oldest first
        self._most = (raise_file_limit() - _RESERVED) // 2
        self._channels = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._channels.bind(str(folder / CHANNEL))
        self._channels.listen(128)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="ensembler-front", daemon=True)

    def start(self) -> None:
        """Start the thread, which ends with the process."""
        self._thread.start()

    def close(self) -> None:
        """End the thread and close all sockets."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        for waiting in list(self._waiting.values()):
            self._forget(waiting.peer).close()
        for open_one in (self._public, self._channels, *(worker.channel for worker in self._workers)):
            if open_one is not None:
                self._loop.remove_reader(open_one)
                open_one.close()
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        for listening, accept in ((self._channels, self._accept_worker), (self._public, self._accept)):
            if listening is not None:
                listening.setblocking(False)
                self._loop.add_reader(listening, accept)
        self._loop.call_later(0.5, self._sweep)
        self._loop.run_forever()

    # Connections

    def _accept(self) -> None:
        assert self._public is not None  # noqa: S101
        for _ in range(_ACCEPTED):
            try:
                peer, _ = self._public.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    continue
                self._drop_oldest(max(1, len(self._waiting) // 8))
                return
            peer.setblocking(False)
            self._waiting[peer.fileno()] = _Waiting(peer)
            self._loop.add_reader(peer, self._look, peer)
            if len(self._waiting) > self._most:
                self._drop_oldest(1)

    def _look(self, peer: socket.socket) -> None:
        try:
            head = peer.recv(_HEAD, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            head = b""
        if not head:
            return self._forget(peer).close()
        whole = b"\r\n\r\n" in head or b"\n\n" in head
        if whole or len(head) >= _HEAD or not head[:1].isalpha():  # what is no HTTP is the worker's to refuse
            self._forget(peer)
            self._decide(peer, head)
        else:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, len(head) + 1)

    def _decide(self, peer: socket.socket, head: bytes) -> None:
        asked = _GET.match(head)
        if asked and (path := asked[2].decode("latin-1")) in PROBES:
            healthy = self._is_ready() if path in READY else self._is_alive()
            body, media_type = answer_of_probe(path, healthy)
            return _respond(peer, head, 200 if healthy else 503, body, media_type, asked[1] == b"HEAD")
        for worker in sorted(self._workers, key=lambda worker: worker.connections):
            if worker.ready and not worker.ending and worker.connections < self._most and _pass(worker, peer):
                return
        busy = any(worker.ready and not worker.ending for worker in self._workers)
        reason = "too many connections are open" if busy else "the server is starting or stopping"
        _respond(peer, head, 503, json.dumps({"error": f"{reason}: send this request again"}).encode())

    def _forget(self, peer: socket.socket) -> socket.socket:
        self._waiting.pop(peer.fileno(), None)
        self._loop.remove_reader(peer)
        return peer

    def _drop_oldest(self, count: int) -> None:
        for waiting in list(islice(self._waiting.values(), count)):
            self._forget(waiting.peer).close()

    def _sweep(self) -> None:
        now = monotonic()
        late = [waiting for waiting in self._waiting.values() if now - waiting.since > HEAD_SECONDS]
        self._drop_oldest(len(late))
        self._loop.call_later(0.5, self._sweep)

    # Workers

    def _is_ready(self) -> bool:
        return any(worker.ready and not worker.ending for worker in self._workers) and self._is_alive()

    def _is_alive(self) -> bool:
        loading = any(not worker.ready for worker in self._workers)
        return loading or monotonic() - self._heard < _SILENT

    def _accept_worker(self) -> None:
        try:
            channel, _ = self._channels.accept()
        except OSError:
            return
        channel.setblocking(False)
        worker = _Worker(channel)
        self._workers.add(worker)
        self._loop.add_reader(channel, self._hear, worker)

    def _hear(self, worker: _Worker) -> None:
        try:
            content = worker.channel.recv(2**16)
        except BlockingIOError:
            return
        except OSError:
            content = b""
        self._heard = monotonic()
        *lines, worker.unread = (worker.unread + content).split(b"\n")
        for line in lines:
            self._note(worker, json.loads(line))
        if not content:
            self._loop.remove_reader(worker.channel)
            worker.channel.close()
            self._workers.discard(worker)
            if not worker.ready and not worker.ending:
                self._killed += 1
                if self._killed == _TRIES:
                    self._on_failure(_KILLED)

    def _note(self, worker: _Worker, message: dict[str, Any]) -> None:
        if message.get("ready"):
            worker.ready, self._killed = True, 0
        worker.ending = worker.ending or message.get("ending", False)
        worker.connections -= message.get("closed", 0)
        if "failed" in message:
            worker.ending = True
            self._on_failure(message["failed"])


def _pass(worker: _Worker, peer: socket.socket) -> bool:
    """Pass a connection to a worker, unless that takes none at the moment."""
    try:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        socket.send_fds(worker.channel, [b"c"], [peer.fileno()])
    except OSError:
        return False
    worker.connections += 1
    peer.close()
    return True


def _respond(
    peer: socket.socket, head: bytes, status: int, body: bytes, kind: str = "application/json", head_only: bool = False
) -> None:
    """Answer a connection and close it."""
    reason = {200: "OK", 503: "Service Unavailable"}[status]
    again = "Retry-After: 1\r\n" if status == 503 else ""
    answer = f"HTTP/1.1 {status} {reason}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{again}"
    try:
        peer.recv(len(head))  # closing with unread bytes would reset the connection
        peer.send(answer.encode() + b"Connection: close\r\n\r\n" + (b"" if head_only else body))
        peer.shutdown(socket.SHUT_WR)
    except OSError:
        pass
    finally:
        peer.close()


def stop_this_process(sentence: str) -> None:
    """Say why the server ends, and end it as Ctrl-C would: workers answer what they have accepted."""
    sys.stderr.write(f"Error: {sentence}\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGTERM)
