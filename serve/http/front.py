"""The server's front: it accepts connections, drops those without a request, and answers health checks.

It is a thread of the server's parent process, which does nothing else, so no flood delays its answers. A connection
whose first head has arrived is passed to the worker with the fewest, as an open socket: nothing is copied, and the
front is not in the path of requests. It looks at the head without reading it (``MSG_PEEK``). Workers tell it over a
Unix socket when they are ready, and why they cannot be; where BentoML listens (``bentoml serve``), the first of them
also passes it the listening socket (:mod:`ensembler.serve.http.intake`).
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
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from time import monotonic
from typing import Any

from ensembler.serve.http.routes import PROBES, READY, answer_of_probe

__all__ = ["CHANNEL", "HEAD_SECONDS", "NUMBER", "Front", "listen", "raise_file_limit", "stop_this_process"]

CHANNEL = "front.sock"
"""The workers' Unix socket, in the folder that they share."""

HEAD_SECONDS = 10.0
"""How long a head may take to arrive."""

NUMBER = 8
"""Bytes of a connection's number, with which its open socket is passed to a worker."""

_HEAD = 2**16  # bytes
_BACKLOG = 2048  # connections that the system accepts before this process does
_ACCEPTED = 64  # connections at a time
_LAST_SECONDS = 0.2  # for the heads of those that connected just before the end
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
    connections: dict[int, str] = field(default_factory=dict)  # their addresses, by number
    unread: bytes = b""


@dataclass(eq=False)
class _Waiting:
    """A connection whose head has not arrived."""

    peer: socket.socket
    address: str
    since: float = field(default_factory=monotonic)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket at an IP address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=_BACKLOG)


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
        public: a listening socket, for this front alone; by default, the one that a worker passes.
        on_failure: called with one sentence where no worker can be started.
    """

    def __init__(self, folder: Path, public: socket.socket | None, on_failure: Callable[[str], None]) -> None:
        self._public = public
        self._on_failure = on_failure
        self._workers: set[_Worker] = set()
        self._killed = 0  # in a row while they opened the bundle
        self._heard = monotonic()  # when a worker last said something
        self._waiting: dict[int, _Waiting] = {}  # by file, the oldest first
        self._most = (raise_file_limit() - _RESERVED) // 2  # here and in each worker; of one address half of it
        self._waiting_of, self._passed_of = Counter[str](), Counter[str]()  # connections of each address
        self._numbers = count()
        self._channels = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._channels.bind(str(folder / CHANNEL))
        self._channels.listen(128)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="ensembler-front", daemon=True)

    def start(self) -> None:
        """Start the thread, which ends with the process."""
        self._thread.start()

    def close(self) -> None:
        """Answer the connections that wait, stop listening, end the thread and close all sockets."""
        self._loop.call_soon_threadsafe(self._end)
        self._thread.join()
        self._drop(self._waiting.values())
        for open_one in (self._channels, *(worker.channel for worker in self._workers)):
            self._loop.remove_reader(open_one)
            open_one.close()
        self._loop.close()

    def _end(self) -> None:
        """Stop listening: the system would accept connections as long as this process lives, and then reset them."""
        if self._public is not None:
            for _ in range(_BACKLOG // _ACCEPTED):
                self._accept()
            self._loop.remove_reader(self._public)
            with suppress(OSError):
                self._public.shutdown(socket.SHUT_RDWR)  # in every process that has it
            self._public.close()
        self._loop.call_later(_LAST_SECONDS if self._waiting else 0, self._loop.stop)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._channels.setblocking(False)
        self._loop.add_reader(self._channels, self._accept_worker)
        if self._public is not None:
            self._open(self._public)
        self._loop.call_later(0.5, self._sweep)
        self._loop.run_forever()

    # Connections

    def _open(self, public: socket.socket) -> None:
        public.setblocking(False)
        self._public = public
        self._loop.add_reader(public, self._accept)

    def _accept(self) -> None:
        assert self._public is not None  # noqa: S101
        for _ in range(_ACCEPTED):
            try:
                peer, (address, *_) = self._public.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    continue
                self._drop_oldest(max(1, len(self._waiting) // 8))
                return
            peer.setblocking(False)
            self._waiting[peer.fileno()] = _Waiting(peer, address)
            self._waiting_of[address] += 1
            self._loop.add_reader(peer, self._look, peer)
            if self._waiting_of[address] > self._most // 2:
                self._drop(islice((one for one in self._waiting.values() if one.address == address), 1))
            elif len(self._waiting) > self._most:
                self._drop_oldest(1)

    def _look(self, peer: socket.socket) -> None:
        try:
            head = peer.recv(_HEAD, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            head = b""
        if not head:
            return self._drop([self._waiting[peer.fileno()]])
        whole = b"\r\n\r\n" in head or b"\n\n" in head
        if whole or len(head) >= _HEAD or not head[:1].isalpha():  # what is no HTTP is the worker's to refuse
            self._decide(peer, self._forget(peer), head, whole)
        else:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, len(head) + 1)

    def _decide(self, peer: socket.socket, address: str, head: bytes, whole: bool) -> None:
        asked = _GET.match(head) if whole else None
        if asked and (path := asked[2].decode("latin-1")) in PROBES:
            healthy = self._is_ready() if path in READY else self._is_alive()
            body, media_type = answer_of_probe(path, healthy)
            return _respond(peer, head, 200 if healthy else 503, body, media_type, asked[1] == b"HEAD")
        serving = [worker for worker in self._workers if worker.ready and not worker.ending]
        if self._passed_of[address] >= self._most // 2:
            reason = "too many connections of this address are open"
        else:
            for worker in sorted(serving, key=lambda worker: len(worker.connections)):
                if len(worker.connections) < self._most and self._pass(worker, peer, address):
                    return
            reason = "too many connections are open" if serving else "the server is starting or stopping"
        _respond(peer, head, 503, json.dumps({"error": f"{reason}: send this request again"}).encode())

    def _pass(self, worker: _Worker, peer: socket.socket, address: str) -> bool:
        """Pass a connection and its number to a worker, unless that takes none at the moment."""
        number = next(self._numbers)
        try:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
            socket.send_fds(worker.channel, [number.to_bytes(NUMBER, "little")], [peer.fileno()])
        except OSError:
            return False
        worker.connections[number] = address
        self._passed_of[address] += 1
        peer.close()
        return True

    def _forget(self, peer: socket.socket) -> str:
        """Watch a connection no more, and return its address."""
        address = self._waiting.pop(peer.fileno()).address
        self._loop.remove_reader(peer)
        _release(self._waiting_of, address)
        return address

    def _drop(self, some: Iterable[_Waiting]) -> None:
        for waiting in list(some):
            self._forget(waiting.peer)
            waiting.peer.close()

    def _drop_oldest(self, most: int) -> None:
        self._drop(islice(self._waiting.values(), most))

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
            content, files, _, _ = socket.recv_fds(worker.channel, 2**16, 1)
        except BlockingIOError:
            return
        except OSError:
            content, files = b"", []
        for listening in (socket.socket(fileno=file) for file in files):
            if self._public is None:
                self._open(listening)
            else:
                listening.close()
        self._heard = monotonic()
        *lines, worker.unread = (worker.unread + content).split(b"\n")
        for line in lines:
            self._note(worker, json.loads(line))
        if not content:
            self._loop.remove_reader(worker.channel)
            worker.channel.close()
            self._workers.discard(worker)
            self._note(worker, {"closed": list(worker.connections)})
            if not worker.ready and not worker.ending:
                self._killed += 1
                if self._killed == _TRIES:
                    self._on_failure(_KILLED)

    def _note(self, worker: _Worker, message: dict[str, Any]) -> None:
        if message.get("ready"):
            worker.ready, self._killed = True, 0
        worker.ending = worker.ending or message.get("ending", False)
        for number in message.get("closed", ()):
            _release(self._passed_of, worker.connections.pop(number))
        if "failed" in message:
            worker.ending = True
            self._on_failure(message["failed"])


def _release(connections: Counter[str], address: str) -> None:
    connections[address] -= 1
    if not connections[address]:
        del connections[address]


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
