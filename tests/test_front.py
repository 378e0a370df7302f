"""The server's front and the workers' end of it: here in one process, and as a user starts it."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from typer.testing import CliRunner

from ensembler.machine import temporary_folder
from ensembler.serve.commands import app
from ensembler.serve.http import front as front_module
from ensembler.serve.http import intake
from ensembler.serve.http.front import CHANNEL, NUMBER, Front, listen
from ensembler.serve.http.intake import join_front
from ensembler.serve.starting import shared_folder
from tests._runs import make_bundle
from tests._service import ROUTE, Server, free_port, tiny_images, unless_late

HEAD = b"GET /there HTTP/1.1\r\nHost: x\r\n\r\n"

PATIENCE = 300  # seconds: more than the slowest machine needs


class Worker:
    """A worker that counts the connections passed to it."""

    def __init__(self, front: Fixture, **message: Any) -> None:
        self.front = front
        self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.numbers: list[int] = []
        front.sockets.append(self.channel)
        self.channel.connect(str(front.folder / CHANNEL))
        self.channel.settimeout(PATIENCE)
        if message:
            self.tell(**message)

    def tell(self, **message: Any) -> None:
        self.channel.sendall(json.dumps(message).encode() + b"\n")

    def take(self) -> socket.socket:
        number, (file,), _, _ = socket.recv_fds(self.channel, NUMBER, 1)
        self.numbers.append(int.from_bytes(number, "little"))
        return socket.socket(fileno=file)

    def waiting(self, expected: int = 0) -> int:
        """How many come: those that are expected, however long they take, and all that the front has passed by now."""
        for _ in range(expected):
            self.take().close()
        for _ in range(2):  # when it has answered the second, it has seen all that came before the first
            self.front.ask("/livez")
        self.channel.settimeout(0)
        with suppress(BlockingIOError):
            while True:
                self.take().close()
                expected += 1
        self.channel.settimeout(PATIENCE)
        return expected


class Fixture:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failures: list[str] = []
        self.sockets: list[socket.socket] = []
        self.public = listen("127.0.0.1", 0)
        self.front = Front(folder, self.public, self.failures.append)
        self.front.start()

    def connect(self, content: bytes = b"", address: str = "127.0.0.1") -> socket.socket:
        peer = socket.create_connection(self.public.getsockname(), timeout=PATIENCE, source_address=(address, 0))
        self.sockets.append(peer)
        peer.sendall(content)
        return peer

    def ask(self, path: str) -> int:
        with self.connect(f"GET {path} HTTP/1.1\r\n\r\n".encode()) as peer:
            return int(read(peer).split()[1])

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def read(peer: socket.socket) -> bytes:
    """What comes until the other side closes."""
    answer = b""
    try:
        while part := peer.recv(2**16):
            answer += part
    except ConnectionResetError:
        pass
    return answer


@pytest.fixture
def front() -> Iterator[Fixture]:
    with tempfile.TemporaryDirectory() as folder:
        made = Fixture(Path(folder))
        yield made
        for each in made.sockets:
            each.close()
        made.front.close()


def test_health_is_that_of_the_workers(front: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [front.ask(path) for path in ("/livez", "/healthz", "/readyz", "/there")] == [200, 200, 503, 503]
    one, other = Worker(front), Worker(front, ready=True)
    front.wait_until(lambda: front.ask("/readyz") == 200)
    with front.connect(b"HEAD /livez?x HTTP/1.1\r\nHost: x\r\n\r\n") as peer:
        assert read(peer).endswith(b"Connection: close\r\n\r\n")
    other.tell(ending=True)
    front.wait_until(lambda: front.ask("/readyz") == 503)
    one.tell(ready=True)
    front.wait_until(lambda: front.ask("/readyz") == 200)
    monkeypatch.setattr(front_module, "_SILENT", 0.0)  # it hangs
    assert (front.ask("/livez"), front.ask("/readyz")) == (503, 503)


def test_connections_are_shared_by_who_has_fewest(front: Fixture) -> None:
    workers = [Worker(front, ready=True) for _ in range(2)]
    front.wait_until(lambda: sum(worker.ready for worker in front.front._workers) == 2)
    peers = [front.connect(HEAD) for _ in range(40)]
    assert [worker.waiting(20) for worker in workers] == [20, 20]
    workers[0].tell(closed=workers[0].numbers)
    front.wait_until(lambda: min(len(worker.connections) for worker in front.front._workers) == 0)
    peers += [front.connect(HEAD) for _ in range(10)]
    assert [worker.waiting(count) for worker, count in zip(workers, (10, 0), strict=True)] == [10, 0]


def test_a_head_is_passed_whole_or_not_at_all(front: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(front, ready=True)
    front.wait_until(lambda: front.ask("/readyz") == 200)
    pieces = front.connect()
    for byte in HEAD[:-1]:
        pieces.sendall(bytes([byte]))
    assert worker.waiting() == 0
    pieces.sendall(HEAD[-1:])
    with worker.take() as passed:
        assert passed.recv(1000) == HEAD  # nothing was read from it
    with front.connect(b"GET /livez HTTP/1.1\r\nA: " + bytes(70_000)), worker.take() as passed:
        assert passed.recv(9) == b"GET /live"  # a worker refuses it
    with front.connect(b"\x16\x03\x01 no HTTP") as odd, worker.take() as passed:
        assert passed.recv(1000) == b"\x16\x03\x01 no HTTP"
        odd.sendall(b"x")
        assert passed.recv(1000) == b"x"
    halves = [front.connect(HEAD[:-2]), front.connect()]
    front.wait_until(lambda: len(front.front._waiting) == 2)
    monkeypatch.setattr(front_module, "HEAD_SECONDS", 0.0)
    assert [read(half) for half in halves] == [b"", b""]


def test_the_oldest_without_a_head_make_room(front: Fixture) -> None:
    front.front._most = 5
    halves = [front.connect(HEAD[:-2], f"127.0.0.{address}") for address in range(2, 11)]
    assert [read(half) for half in halves[:4]] == [b""] * 4
    assert front.ask("/livez") == 200


def test_one_address_has_half_of_the_connections(front: Fixture) -> None:
    front.front._most = 6
    worker = Worker(front, ready=True)
    front.wait_until(lambda: front.ask("/readyz") == 200)
    patient = front.connect(HEAD[:-2], "127.0.0.2")
    halves = [front.connect(HEAD[:-2]) for _ in range(9)]
    assert [read(half) for half in halves[:6]] == [b""] * 6
    patient.sendall(HEAD[-2:])  # an older one, of another address
    front.wait_until(lambda: front.front._passed_of == {"127.0.0.2": 1})
    held = []
    for number in range(1, 4):
        held.append(front.connect(HEAD))
        front.wait_until(lambda number=number: front.front._passed_of["127.0.0.1"] == number)
    refused = read(front.connect(HEAD))
    assert refused.startswith(b"HTTP/1.1 503 ") and b"too many connections of this address" in refused
    assert front.ask("/livez") == 200
    held += [front.connect(HEAD, "127.0.0.2") for _ in range(2)]
    assert worker.waiting(6) == 6
    assert b"of this address" in read(front.connect(HEAD, "127.0.0.2"))
    assert b"too many connections are open" in read(front.connect(HEAD, "127.0.0.3"))
    worker.tell(closed=worker.numbers)
    front.wait_until(lambda: not front.front._passed_of)
    assert not front.connect(HEAD).close() and worker.waiting(1) == 1
    worker.channel.close()
    front.wait_until(lambda: not front.front._passed_of)
    assert len(held) == 5


def test_a_front_that_ends_answers_those_who_wait_and_accepts_nobody_else() -> None:
    with tempfile.TemporaryDirectory() as folder:
        public = listen("127.0.0.1", 0)
        address, front = public.getsockname(), Front(Path(folder), public, [].append)
        busy = threading.Event()
        front._loop.call_soon(busy.wait, PATIENCE)
        front.start()
        accepted = [socket.create_connection(address, timeout=PATIENCE) for _ in range(100)]  # by the system alone
        for peer in accepted:
            peer.sendall(HEAD)
        ending = threading.Thread(target=front.close)
        ending.start()
        busy.set()
        for peer in accepted:
            assert b" 503 " in read(peer)
            peer.close()
        ending.join()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)


def test_the_socket_of_a_worker_becomes_the_fronts(front: Fixture) -> None:
    with tempfile.TemporaryDirectory() as folder:
        other = Front(Path(folder), None, front.failures.append)
        other.start()
        front.folder = Path(folder)
        worker, again = Worker(front, ready=True), Worker(front, ready=True)
        listening = listen("127.0.0.1", 0)
        for each in (worker, again):
            socket.send_fds(each.channel, [b"{}\n"], [listening.fileno()])
        front.public = listening
        front.wait_until(lambda: front.ask("/readyz") == 200)
        front.connect(HEAD)
        select.select([worker.channel, again.channel], [], [], PATIENCE)
        assert sorted([worker.waiting(), again.waiting()]) == [0, 1]
        other.close()
        listening.close()


def test_a_worker_that_cannot_begin_says_why(front: Fixture) -> None:
    killed, again, refused, served = (Worker(front) for _ in range(4))
    served.tell(ready=True)
    served.channel.close()
    refused.tell(failed="the bundle is damaged")
    refused.channel.close()
    front.wait_until(lambda: front.failures == ["the bundle is damaged"])
    killed.channel.close()
    front.wait_until(lambda: front.front._killed == 1)  # that can happen to anybody
    assert len(front.failures) == 1
    again.channel.close()
    front.wait_until(lambda: len(front.failures) == 2)
    assert "fit in memory" in front.failures[1]


@pytest.fixture
def serving(front: Fixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fixture]:
    """An application behind a front; it gives 20 MB at /large."""

    async def large(request: Request) -> Response:
        return Response(bytes(20_000_000))

    async def there(request: Request) -> Response:
        return PlainTextResponse("yes")

    monkeypatch.setattr(intake, "_KEEP_ALIVE", 1)
    app = Starlette(routes=[Route("/there", there), Route("/large", large)])
    join_front(app, front.folder, graceful=60)
    stop, stopped = asyncio.Event(), threading.Event()
    loop = asyncio.new_event_loop()

    async def main() -> None:
        async with app.router.lifespan_context(app):
            await stop.wait()
        stopped.set()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    front.wait_until(lambda: front.ask("/readyz") == 200)
    yield front
    loop.call_soon_threadsafe(stop.set)
    thread.join(PATIENCE)
    assert stopped.is_set()  # whatever connections are open
    loop.close()


def test_requests_are_answered_behind_the_front(serving: Fixture) -> None:
    host, port = serving.public.getsockname()
    with httpx.Client(base_url=f"http://{host}:{port}") as caller:
        answers = [caller.get("/there") for _ in range(3)]
        assert [answer.text for answer in answers] == ["yes"] * 3
        assert "date" in answers[0].headers
        assert len(caller.get("/large").content) == 20_000_000
    serving.wait_until(lambda: next(iter(serving.front._workers)).connections == {})


def test_later_heads_must_arrive_too(serving: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving.connect(HEAD + HEAD[:-2]) as peer:
        assert read(peer).count(b"yes") == 1
    with serving.connect(HEAD) as peer:
        answer = b""
        while not answer.endswith(b"yes"):
            answer += peer.recv(1000)
        monkeypatch.setattr(intake, "HEAD_SECONDS", 0.2)
        peer.sendall(HEAD[:-2])
        assert read(peer) == b""


def test_a_connection_cannot_be_taken_over_by_another_protocol(serving: Fixture) -> None:
    upgrade = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "
    with serving.connect(HEAD[:-2] + upgrade + b"dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n") as peer:
        assert peer.recv(1000).startswith(b"HTTP/1.1 200 ")
    serving.wait_until(lambda: next(iter(serving.front._workers)).connections == {})


def test_answers_that_nobody_reads_are_dropped(serving: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    passed, passes = Front._pass, list[bool]()
    monkeypatch.setattr(Front, "_pass", lambda *given: passes.append(passed(*given)) or passes[-1])
    monkeypatch.setattr(intake, "_READ_SECONDS", 0.2)
    serving.connect(HEAD.replace(b"there", b"large"))
    serving.wait_until(lambda: passes == [True])
    serving.wait_until(lambda: next(iter(serving.front._workers)).connections == {})


def test_open_connections_do_not_hold_up_the_end(serving: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "_READ_SECONDS", 0.2)
    for content in (HEAD.replace(b"there", b"large"), HEAD, HEAD[:-2], HEAD + HEAD[:-2], b"\x16"):
        serving.connect(content)


def started(folder: Path, *options: str, **environment: str) -> Server:
    command = [sys.executable, "-m", "ensembler.cli", "serve", str(make_bundle(folder / "bundle")), *options]
    return Server(command, folder, free_port(), **environment)


def test_two_workers_without_a_home_under_attack(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    server = started(tmp_path, "--workers", "2", HOME=str(tmp_path / "file" / "home"), BENTOML_HOME="")
    port = int(server.url.rpartition(":")[2])
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        server.wait_until_ready(workers=2)
        for process in [server.process.pid, *(worker.pid for worker in server.family())]:
            resource.prlimit(process, resource.RLIMIT_NOFILE, (200, 200))
        halves = [socket.create_connection(("127.0.0.1", port)) for _ in range(300)]
        for half in halves:
            half.sendall(HEAD[:-2])
        open_ones: list[socket.socket] = []

        def share() -> None:
            while open_ones:
                open_ones.pop().close()
            open_ones.extend(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) for _ in range(40))
            for peer in open_ones:
                peer.sendall(HEAD)
                assert b" 404 " in peer.recv(2**16)
            assert server.shares() == [20, 20]

        unless_late(3, share)
        with httpx.Client(base_url=server.url, timeout=PATIENCE) as caller:
            assert [caller.get(path).status_code for path in ("/readyz", "/livez", "/metadata")] == [200] * 3
            headers = {"Content-Type": "application/octet-stream", "X-Shape": "1,4,6,3"}
            assert caller.post(ROUTE, content=tiny_images(1).tobytes(), headers=headers).status_code == 200
            assert "ensembler_requests_total" in caller.get("/metrics").text
        for peer in [*halves, *open_ones]:
            peer.close()
    finally:
        assert files[1] >= 200
        server.stop(signal.SIGTERM)
    assert "Traceback" not in server.log.read_text()


def test_the_port_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, port, started = make_bundle(tmp_path / "bundle"), free_port(), []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def execve(program: str, command: list[str], environment: dict[str, str]) -> None:
        started.append(command)
        with socket.socket(fileno=os.dup(int(environment["ENSEMBLER_LISTEN"]))) as public:
            assert public.getsockname() == ("127.0.0.1", port) and os.get_inheritable(
                int(environment["ENSEMBLER_LISTEN"])
            )
            socket.create_connection(("127.0.0.1", port)).close()  # it listens, whatever happens until BentoML runs

    monkeypatch.setattr(os, "execve", execve)
    with socket.create_server(("127.0.0.1", port)):
        result = CliRunner().invoke(app, ["serve", str(bundle), "--port", str(port)])
    assert result.exit_code == 2 and not started
    said = f"cannot listen on 127.0.0.1, port {port}: Address already in use: choose another --port"
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert not list(tmp_path.glob("ensembler-serve-*"))  # nothing is left of a server that did not start
    temporary_folder.cache_clear()
    left = temporary_folder()  # as commands make one where a home cannot be written; no atexit runs before an execve
    result = CliRunner().invoke(app, ["serve", str(bundle), "--port", str(port)])
    temporary_folder.cache_clear()
    assert result.exit_code == 0 and len(started) == 1 and not left.exists()


def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    bundle = make_bundle(tmp_path / "bundle")
    monkeypatch.setattr(Path, "write_bytes", full)
    result = CliRunner().invoke(app, ["serve", str(bundle), "--port", str(free_port())])
    assert result.exit_code == 1
    assert "set TMPDIR" in f"{result.exception} {result.stderr}"  # the message alone, where no other command ran before


def test_a_bundle_harmed_while_it_serves_does_not_restart_for_ever(tmp_path: Path) -> None:
    server = started(tmp_path)
    try:
        server.wait_until_ready()
        assert server.post(ROUTE, json={"images": tiny_images(1).tolist()}).status_code == 200
        (tmp_path / "bundle" / "member-000.onnx").write_bytes(b"harmed")
        (worker,) = [process for process in server.family() if "worker" in " ".join(process.cmdline())]
        worker.kill()
        assert server.process.wait(PATIENCE) == 1
    finally:
        server.process.kill()
    log = server.log.read_text()
    assert log.count("Error: ") == 1 and "member-000.onnx" in log
    assert "Traceback" not in log


def test_the_folder_of_a_server_is_one_whose_sockets_can_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    folder = Path(shared_folder())
    try:
        assert len(str(folder)) < 80 and [path.name for path in deep.iterdir()] == []
    finally:
        shutil.rmtree(folder)
