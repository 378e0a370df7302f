"""Attacks on a server of one's own: what each costs it in seconds and MiB, and what good callers get meanwhile.

Every attack starts a server on the loopback interface, is bounded in bytes and seconds, and prints what good callers
saw (statuses, the slowest answer of ``/readyz``) and the memory of the server's processes before and after.

    python benchmarks/attack/attacks.py                  # all, a few minutes
    python benchmarks/attack/attacks.py bodies heads     # some
    python benchmarks/attack/attacks.py --tree OTHER     # the same on another checkout that has this one route
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path

import httpx
import psutil
from PIL import Image

ROOT = Path(__file__).parents[2]
ROUTE = "/predictive-uncertainty"
HALF = b"GET /metadata HTTP/1.1\r\nHost: x\r\n"


class Server:
    """A server, started as a user starts it, and what a good caller sees of it."""

    def __init__(
        self, bundle: Path, tree: Path, *options: str, limits: dict[int, int] | None = None, **env: str
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]

        def limit() -> None:
            for what, most in (limits or {}).items():
                resource.setrlimit(what, (most, most))

        self.url = f"http://127.0.0.1:{self.port}"
        self.home = tempfile.TemporaryDirectory()
        environment = os.environ | {"PYTHONPATH": str(tree), "BENTOML_HOME": self.home.name} | env
        command = [sys.executable, "-m", "ensembler", "serve", str(bundle), "--port", str(self.port), *options]
        self.process = subprocess.Popen(
            command,
            cwd=tree,
            env=environment,
            preexec_fn=limit,  # noqa: PLW1509  no lock is taken
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        self.slowest = 0.0
        self.statuses: Counter[object] = Counter()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.decode(errors="replace"))

    def wait_until_ready(self, seconds: float = 90) -> bool:
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    return True
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        return False

    def mib(self) -> float:
        """Resident memory of the largest process."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        return max(process.memory_info().rss for process in family) / 2**20

    def connect(self, content: bytes = b"") -> socket.socket:
        peer = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        peer.sendall(content)
        return peer

    @contextmanager
    def watched(self, small: bool = True) -> Iterator[None]:
        """Ask ``/readyz``, and for predictions of one image, all the time."""
        over = threading.Event()
        image = io.BytesIO()
        Image.new("RGB", (32, 32)).save(image, "PNG")

        def watch() -> None:
            while not over.is_set():
                began = time.perf_counter()
                try:
                    with self.connect(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n") as peer:
                        peer.settimeout(30)
                        self.statuses["readyz failed"] += b" 200 " not in peer.recv(1000)
                except OSError:
                    self.statuses["readyz failed"] += 1
                self.slowest = max(self.slowest, time.perf_counter() - began)
                time.sleep(0.05)

        def ask() -> None:
            while not over.is_set():
                try:
                    headers = {"Content-Type": "image/png"}
                    answer = httpx.post(f"{self.url}{ROUTE}", content=image.getvalue(), headers=headers, timeout=120)
                    self.statuses[answer.status_code] += 1
                except httpx.TransportError as error:
                    self.statuses[type(error).__name__] += 1
                time.sleep(0.05)

        threads = [threading.Thread(target=watch), *([threading.Thread(target=ask)] if small else [])]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()

    def stop(self) -> float:
        """Seconds that it takes to end; it is killed after 60."""
        family = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        for process in [*family, self.process]:
            with suppress(psutil.Error, ProcessLookupError):
                process.kill()
        self.home.cleanup()
        return time.monotonic() - began

    def seen(self) -> str:
        good = ", ".join(f"{count} x {status}" for status, count in self.statuses.items() if count)
        return f"good images {good}; slowest /readyz {self.slowest * 1000:.0f} ms"


def paths(bundle: Path, tree: Path) -> str:
    """300 requests for distinct paths of 60,000 bytes."""
    server = Server(bundle, tree)
    server.wait_until_ready()
    before = server.mib()
    with httpx.Client(base_url=server.url, timeout=60) as caller:
        for number in range(300):
            caller.get(f"/{number}{'x' * 60_000}")
        metrics = len(caller.get("/metrics").content)
    after = server.mib()
    server.stop()
    return f"{before:.0f} to {after:.0f} MiB, /metrics {metrics / 1e6:.2f} MB"


def disk(bundle: Path, tree: Path) -> str:
    """No file can grow any more, as on a full disk (RLIMIT_FSIZE), while two workers serve."""
    server = Server(bundle, tree, "--workers", "2")
    server.wait_until_ready()
    time.sleep(5)  # the other worker
    for process in psutil.Process(server.process.pid).children(recursive=True):
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, 0))
    with server.watched():
        time.sleep(5)
    running = server.process.poll() is None
    metrics = httpx.get(f"{server.url}/metrics", timeout=30).status_code if running else "none: the server has ended"
    server.stop()
    warnings = sum("metrics cannot be written" in line for line in server.lines)
    return f"/metrics {metrics}; {server.seen()}; {warnings} lines in the log"


def decoding(bundle: Path, tree: Path) -> str:
    """Progressive JPEGs of 2,500 scans with a deadline of 500 ms, and a form of 1,024 PNGs of 25 megapixels."""
    file = io.BytesIO()
    Image.new("RGB", (2000, 2000), "teal").save(file, "JPEG", progressive=True)
    jpeg = file.getvalue()
    jpeg = jpeg[:-2] + jpeg[jpeg.rindex(b"\xff\xda") : -2] * 2500 + jpeg[-2:]
    file = io.BytesIO()
    Image.new("1", (5000, 5000)).save(file, "PNG", optimize=True)
    server = Server(bundle, tree)
    server.wait_until_ready()
    statuses: list[str] = []

    def ask(**options: object) -> None:
        began = time.perf_counter()
        try:
            status = httpx.post(f"{server.url}{ROUTE}", timeout=100, **options).status_code  # type: ignore[arg-type]
        except httpx.TransportError as error:
            status = type(error).__name__
        statuses.append(f"{status} after {time.perf_counter() - began:.2f} s")

    with server.watched():
        for _ in range(2):
            ask(content=jpeg, headers={"Content-Type": "image/jpeg", "X-Deadline-Ms": "500"})
        ask(files=[("images", ("a.png", file.getvalue(), "image/png"))] * 1024)
    return f"{', '.join(statuses)}; {server.seen()}; ended in {server.stop():.1f} s"


def bodies(bundle: Path, tree: Path) -> str:
    """8 connections that withhold the last byte of 32 MiB."""
    server = Server(bundle, tree)
    server.wait_until_ready()
    size = 32 * 2**20
    head = f"POST {ROUTE} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode()
    peers = [server.connect(head) for _ in range(8)]

    def send(peer: socket.socket) -> None:
        with suppress(OSError):
            peer.sendall(bytes(size - 1))

    with server.watched():
        for peer in peers:
            threading.Thread(target=send, args=(peer,), daemon=True).start()
        time.sleep(15)
    seen = f"{server.seen()}; {server.mib():.0f} MiB"
    return f"{seen}; ended in {server.stop():.1f} s"


def heads(bundle: Path, tree: Path) -> str:
    """1,100 connections that send half a head, where a process may open 1,024 files; 50 that do not read."""
    server = Server(bundle, tree, limits={resource.RLIMIT_NOFILE: 1024})
    server.wait_until_ready()
    peers = []
    with server.watched():
        for _ in range(1100):
            try:
                peers.append(server.connect(HALF))
            except OSError:
                break
        time.sleep(13)
    dropped = 0
    for peer in peers:
        peer.setblocking(False)
        try:
            dropped += peer.recv(1) == b""
        except BlockingIOError:
            pass
        except OSError:
            dropped += 1
    for _ in range(50):
        peers.append(socket.socket())
        peers[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        try:
            peers[-1].settimeout(2)
            peers[-1].connect(("127.0.0.1", server.port))
            peers[-1].settimeout(0.2)
            for _ in range(2000):
                peers[-1].send(HALF + b"\r\n")
        except OSError:
            pass
    return f"{dropped} of 1,100 dropped after 13 s; {server.seen()}; ended in {server.stop():.1f} s"


def flood(bundle: Path, tree: Path) -> str:
    """64 callers that ask again as soon as they are answered, for 10 s."""
    server = Server(bundle, tree)
    server.wait_until_ready()
    # In a process of their own: in this one, they would keep the one that asks /readyz waiting.
    with ProcessPoolExecutor(1, get_context("spawn")) as callers, server.watched(small=False):
        count = callers.submit(_callers, server.url, 10).result()
    server.stop()
    return f"{dict(count)}; slowest /readyz {server.slowest * 1000:.0f} ms (the flood shares the CPUs)"


def _callers(url: str, seconds: float) -> Counter[int]:
    over, count = time.monotonic() + seconds, Counter[int]()

    def ask(_: int) -> None:
        headers = {"Content-Type": "application/octet-stream", "X-Shape": "16,32,32,3"}
        with httpx.Client(base_url=url, timeout=60) as caller:
            while time.monotonic() < over:
                count[caller.post(ROUTE, content=bytes(16 * 3072), headers=headers).status_code] += 1

    with ThreadPoolExecutor(64) as pool:
        list(pool.map(ask, range(64)))
    return count


def lists(bundle: Path, tree: Path) -> str:
    """JSON of nested lists, 31 MiB."""
    server = Server(bundle, tree)
    server.wait_until_ready()
    before, began = server.mib(), time.perf_counter()
    body = b'{"images": [' + b"[]," * (10 * 2**20) + b"[]]}"
    with server.watched():
        status = httpx.post(server.url + ROUTE, content=body, timeout=100).status_code
        spent = time.perf_counter() - began
    after = server.mib()
    server.stop()
    return f"{status} after {spent:.1f} s, {before:.0f} to {after:.0f} MiB; {server.seen()}"


def loading(bundle: Path, tree: Path) -> str:
    """More members than the bundle holds: how it ends."""
    server = Server(bundle, tree, "--members", "99")
    began = time.monotonic()
    try:
        status: object = server.process.wait(40)
    except subprocess.TimeoutExpired:
        status = "still running"
    text = "".join(server.lines)
    spent = time.monotonic() - began
    server.stop()
    return f"{status} after {spent:.0f} s, {text.count('Traceback')} stack traces"


def home(bundle: Path, tree: Path) -> str:
    """A user whose home cannot be made."""
    server = Server(bundle, tree, HOME="/dev/null/home", BENTOML_HOME="")
    ready = server.wait_until_ready(40)
    server.stop()
    return f"ready: {ready}, {''.join(server.lines).count('Traceback')} stack traces"


def workers(bundle: Path, tree: Path) -> str:
    """40 connections opened at once, and two workers."""
    server = Server(bundle, tree, "--workers", "2")
    server.wait_until_ready()
    time.sleep(5)  # the other one
    peers = [server.connect() for _ in range(40)]
    for peer in peers:
        peer.sendall(HALF + b"\r\n")
        peer.recv(1000)
    counts = [
        sum(each.laddr.port == server.port and each.status == "ESTABLISHED" for each in process.net_connections())
        for process in psutil.Process(server.process.pid).children()
    ]
    server.stop()
    return f"connections of each worker: {counts}"


ATTACKS: list[Callable[[Path, Path], str]] = [
    paths, disk, decoding, bodies, heads, flood, lists, loading, home, workers,
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help=f"of {', '.join(a.__name__ for a in ATTACKS)}")
    parser.add_argument("--bundle", type=Path, help="for 32 x 32 pixels (default: made here, of a small network)")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout whose server is attacked")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = options.bundle
        if bundle is None:
            sys.path.insert(0, str(ROOT / "benchmarks"))
            from serving import make_bundle

            bundle = make_bundle(Path(folder), "cnn", 4)
        for attack in ATTACKS:
            if not options.attacks or attack.__name__ in options.attacks:
                print(f"{attack.__name__}: {attack(bundle.resolve(), options.tree.resolve())}", flush=True)


if __name__ == "__main__":
    main()
