"""The middleware, around a stub of a service that says what it was given."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from ensembler.errors import UsageError
from ensembler.serve.http.bodies import TYPES
from ensembler.serve.http.gate import Gate
from ensembler.serve.http.metrics import Requests
from ensembler.serve.http.routes import PUBLIC, reads_a_body
from ensembler.serve.http.settings import Settings
from tests._runs import make_bundle
from tests._service import ROUTE, TestClient, assert_refused, in_process, tiny_images

LIMITS = {"ENSEMBLER_BUNDLE": "nowhere", "ENSEMBLER_MAX_BODY": "100", "ENSEMBLER_BODY_MS": "200"}


class Caller:
    """One request to the gate, byte by byte."""

    def __init__(
        self, gate: Gate, path: str = ROUTE, method: str = "POST", client: str = "here", **headers: str
    ) -> None:
        self.incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sent: list[dict[str, Any]] = []
        named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        self.scope = {"type": "http", "method": method, "path": path, "headers": named, "client": (client, 1)}
        self.task = asyncio.create_task(gate(self.scope, self.incoming.get, self._send))

    async def _send(self, message: Any) -> None:
        self.sent.append(message)

    def body(self, chunk: bytes, more: bool = False) -> Caller:
        self.incoming.put_nowait({"type": "http.request", "body": chunk, "more_body": more})
        return self

    def hang_up(self) -> None:
        self.incoming.put_nowait({"type": "http.disconnect"})

    async def answer(self) -> tuple[int, dict[bytes, bytes], bytes]:
        await asyncio.wait_for(self.task, 100)
        return (
            self.sent[0]["status"],
            dict(self.sent[0]["headers"]),
            b"".join(message.get("body", b"") for message in self.sent[1:]),
        )


class Stub:
    """Answers how many bytes came, when it may."""

    def __init__(self) -> None:
        self.free = asyncio.Event()
        self.free.set()
        self.cancelled = 0
        self.handled = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        self.handled += 1
        try:
            await self.free.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if body == b"fail":
            raise RuntimeError("/a/path/of/this/machine")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(len(body)).encode()})

    async def has_begun(self, requests: int) -> None:
        while self.handled < requests:
            await asyncio.sleep(0)


@pytest.fixture
def run() -> Callable[..., None]:
    def go(test: Callable[[Gate, Stub], Awaitable[None]], **environment: str) -> None:
        settings = Settings.read(LIMITS | environment)

        async def main() -> None:
            stub = Stub()
            gate = Gate(stub, settings, Requests(CollectorRegistry()))
            async with asyncio.timeout(200):
                await test(gate, stub)
            assert (gate._budget.held.total(), gate._handled) == (0, 0)

        asyncio.run(main())

    return go


def test_bodies_come_whole_or_not_at_all(run: Any) -> None:
    async def test(gate: Gate, stub: Stub) -> None:
        for chunks in ([b"x" * 100], [b"x" * 60, b"y" * 40], [b""]):
            caller = Caller(gate)
            for chunk in chunks[:-1]:
                caller.body(chunk, more=True)
            assert await caller.body(chunks[-1]).answer() == (200, {}, str(sum(map(len, chunks))).encode())
        for chunks in ([b"x" * 101], [b"x" * 60, b"y" * 60], [b"x"] * 150):
            caller = Caller(gate)
            for chunk in chunks[:-1]:
                caller.body(chunk, more=True)
            status, _, body = await caller.body(chunks[-1]).answer()
            assert (status, b"more than 100 bytes" in body) == (413, True)
            assert caller.incoming.empty()  # read to its end, so that who sends all before it listens hears why
        assert stub.handled == 3

    run(test)


def test_a_body_without_end_is_not_read_for_ever(run: Any) -> None:
    async def test(gate: Gate, stub: Stub) -> None:
        caller = Caller(gate)
        for _ in range(100):
            caller.body(b"x" * 50, more=True)
        assert (await caller.answer())[0] == 413
        assert not caller.incoming.empty()
        slow = Caller(gate).body(b"x", more=True)
        status, _, body = await slow.answer()
        assert (status, b"did not arrive within 0.2 s" in body) == (408, True)
        assert stub.handled == 0

    run(test)


def test_who_hangs_up_is_not_handled_any_more(run: Any) -> None:
    async def test(gate: Gate, stub: Stub) -> None:
        early = Caller(gate).body(b"x", more=True)
        early.hang_up()
        await early.task
        stub.free.clear()
        late = Caller(gate).body(b"x")
        await stub.has_begun(1)
        late.hang_up()
        await late.task
        while not stub.cancelled:
            await asyncio.sleep(0)
        assert (stub.handled, stub.cancelled) == (1, 1)
        assert [caller.sent[0]["status"] for caller in (early, late)] == [499, 499]

    run(test)


def test_only_so_many_are_handled_at_a_time(run: Any) -> None:
    async def test(gate: Gate, stub: Stub) -> None:
        stub.free.clear()
        callers = [Caller(gate).body(b"x") for _ in range(2)]
        await stub.has_begun(2)
        status, headers, body = await Caller(gate).body(b"x").answer()
        assert (status, headers[b"retry-after"]) == (503, b"1")
        assert b"2 requests are being answered already" in body
        stub.free.set()
        assert [(await caller.answer())[0] for caller in callers] == [200, 200]
        assert (await Caller(gate).body(b"x").answer())[0] == 200

    run(test, ENSEMBLER_MAX_REQUESTS="2")


def test_only_so_many_bytes_are_held_at_a_time(run: Any) -> None:
    def refused(answer: tuple[int, dict[bytes, bytes], bytes]) -> bool:
        status, headers, body = answer
        return (status, headers.get(b"retry-after"), b"too many large bodies" in body) == (503, b"1", True)

    async def test(gate: Gate, stub: Stub) -> None:
        stub.free.clear()
        callers = [Caller(gate, client="one").body(b"x" * 100) for _ in range(4)]
        await stub.has_begun(4)
        assert refused(await Caller(gate, client="one").body(b"x" * 100).answer())  # half of all for one address
        callers += [Caller(gate, client=f"{number}").body(b"x" * 100) for number in range(5)]
        await stub.has_begun(9)  # of each, 12 bytes are not counted
        assert refused(await Caller(gate, client="another").body(b"x" * 100).answer())
        small = Caller(gate, client="one").body(b"x" * 12)
        await stub.has_begun(10)
        stub.free.set()
        assert [(await caller.answer())[0] for caller in [*callers, small]] == [200] * 10

    run(test)


def test_bodies_that_withhold_their_end_hold_up_nobody(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensembler.serve.http.gate._WINDOW", 0.05)

    async def test(gate: Gate, stub: Stub) -> None:
        withheld = [Caller(gate).body(b"x" * 99, more=True) for _ in range(8)]
        await asyncio.sleep(0)
        assert (await Caller(gate).body(b"x").answer())[0] == 200
        answers = [await caller.answer() for caller in withheld]
        late = [body for status, _, body in answers if status == 408]
        assert late and all(b"more slowly than 16384 bytes a second" in body for body in late)
        assert {status for status, *_ in answers} <= {408, 503}
        assert (await Caller(gate).body(b"x" * 100).answer())[0] == 200

    run(test, ENSEMBLER_BODY_MS="60000")


def test_refused_bodies_are_not_counted_while_they_are_drained(run: Any) -> None:
    async def test(gate: Gate, stub: Stub) -> None:
        drained = [Caller(gate).body(b"x" * 101, more=True) for _ in range(20)]
        while any(not caller.incoming.empty() for caller in drained):
            await asyncio.sleep(0)
        assert gate._budget.held.total() == 0 and not any(caller.task.done() for caller in drained)
        assert (await Caller(gate).body(b"x" * 100).answer())[0] == 200
        for caller in drained:
            assert (await caller.body(b"x").answer())[0] == 413

    run(test, ENSEMBLER_BODY_MS="60000")


def test_what_nobody_foresaw_is_a_sentence_that_gives_nothing_away(run: Any) -> None:
    async def test(gate: Gate, stub: Stub) -> None:
        status, _, body = await Caller(gate).body(b"fail").answer()
        assert (status, body) == (500, b'{"error":"the server failed on this request: its log says why"}')

    run(test)


def test_an_address_writes_nothing_else_into_the_log(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def test(gate: Gate, stub: Stub) -> None:
        with caplog.at_level("INFO", logger="ensembler.access"):
            for address in ("fe80::1%eth0", "a b 200 1.0 ms\nFAKE\x1b[31m\x9b", "y" * 5000):
                await Caller(gate, client=address).body(b"x").answer()
        found = [record.getMessage().partition(" ")[0] for record in caplog.records]
        assert [text.rpartition(":")[0] for text in found] == [
            "fe80::1%eth0",
            "a?b?200?1.0?ms?FAKE??31m?",
            "y" * 200,
        ]

    run(test)


@pytest.mark.parametrize("path", [ROUTE, "/metadata", "/metrics", "/docs.json", "/schema.json", "/examples"])
def test_a_token_is_wanted_everywhere_but_where_probers_look(run: Any, path: str) -> None:
    async def test(gate: Gate, stub: Stub) -> None:
        async def status(path: str, **headers: str) -> tuple[int, dict[bytes, bytes]]:
            method = "POST" if reads_a_body(path) else "GET"
            return (await Caller(gate, path, method, **headers).body(b"").answer())[:2]

        for wrong in ("Bearer wrong", "Bearer", "", "sesame", "Basic sesame", "Bearer sesame2", "Bearer s\xe9same"):
            code, headers = await status(path, authorization=wrong)
            assert (code, headers[b"www-authenticate"]) == (401, b"Bearer")
        assert (await status(path))[0] == 401
        assert stub.handled == 0
        for right in ("Bearer sesame", "bearer sesame", "Bearer  sesame "):
            assert (await status(path, authorization=right))[0] == 200
        for free in (*PUBLIC, "/ui/page.js"):
            assert (await status(free))[0] == 200

    run(test, ENSEMBLER_TOKEN="sesame")


def test_tokens_are_compared_in_constant_time(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)

    async def test(gate: Gate, stub: Stub) -> None:
        assert (await Caller(gate, authorization="Bearer x").body(b"").answer())[0] == 401

    run(test, ENSEMBLER_TOKEN="sesame")
    assert compared == [(b"x", b"sesame")]


@pytest.mark.parametrize(
    ("name", "value"),
    [("TOKEN", "s\xe9same"), ("TOKEN", "two words"), ("MAX_BODY", "32M"), ("MAX_QUEUE", "0"), ("WORKERS", "-1")]
    + [
        ("CORS_ORIGIN", text)
        for text in ("example.org", "https://a.org/", "https://a.org, https://b.org", "https://*.org")
    ],
)
def test_a_setting_that_cannot_be(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv("ENSEMBLER_BUNDLE", "nowhere")
    monkeypatch.setenv(f"ENSEMBLER_{name}", value)
    with pytest.raises(UsageError, match=f"ENSEMBLER_{name} must"):
        Settings.read()


def test_what_is_not_said_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENSEMBLER_BUNDLE", "nowhere")
    settings = Settings.read()
    assert (settings.token, settings.members, settings.workers) == (None, None, 1)
    assert settings.bundle == Path("nowhere")
    assert settings.max_body == 32 * 2**20


KINDS_REFUSED = [
    "application/vnd.bentoml+pickle",
    "application/x-pickle",
    "application/zip",
    "video/mp4",
    "%s%n",
    "a" * 900,
    "multipart/related; boundary=x",
    b"\xff\xfe",
    b"application/json; charset=\xff",
]


@pytest.mark.parametrize("kind", KINDS_REFUSED)
def test_other_kinds_of_bodies_are_not_read(tmp_path: Path, kind: str | bytes) -> None:
    with in_process(make_bundle(tmp_path / "bundle")) as client:
        sentence = assert_refused(client.post(ROUTE, content=b"x", headers={"Content-Type": kind}), 415)
        assert all(name in sentence for name in TYPES)
        compressed = {"Content-Encoding": "gzip"}
        assert "compressed" in assert_refused(client.post(ROUTE, content=b"x", headers=compressed), 415)


def test_a_service_with_a_token(tmp_path: Path) -> None:
    def ask(client: TestClient, **headers: str) -> Any:
        return client.post(ROUTE, json={"images": tiny_images(1).tolist()}, headers=headers)

    with in_process(make_bundle(tmp_path / "bundle"), ENSEMBLER_TOKEN="sesame") as client:
        assert "send it as Authorization" in assert_refused(ask(client), 401)
        assert ask(client, Authorization="Bearer sesame").status_code == 200
        assert client.get("/readyz").status_code == 200
        assert client.get("/docs.json").status_code == 401
        described = client.get("/docs.json", headers={"Authorization": "Bearer sesame"}).json()
        assert described["components"]["securitySchemes"]["token"]["scheme"] == "bearer"


def test_pages_of_other_origins_may_ask_where_they_are_named(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    body = {"images": tiny_images(1).tolist()}
    wish = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    ours, theirs = {"Origin": "https://a.example"}, {"Origin": "https://c.example"}
    token = {"Authorization": "Bearer sesame"}
    origins = "https://a.example,https://b.example:8443"
    with in_process(bundle, ENSEMBLER_TOKEN="sesame", ENSEMBLER_CORS_ORIGIN=origins) as client:
        preflight = client.options(ROUTE, headers=ours | wish)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
        assert client.options(ROUTE, headers=theirs | wish).status_code == 400
        for given, status in ((token, 200), ({}, 401)):  # a refusal can be read, too
            answer = client.post(ROUTE, json=body, headers=ours | given)
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, "https://a.example")
            assert "x-batch-size" in answer.headers["access-control-expose-headers"].lower()
            answer = client.post(ROUTE, json=body, headers=theirs | given)
            assert "access-control-allow-origin" not in answer.headers
    with in_process(bundle) as client:
        assert client.options(ROUTE, headers=ours | wish).status_code == 204
        assert "access-control-allow-origin" not in client.post(ROUTE, json=body, headers=ours).headers
