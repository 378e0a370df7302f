"""What serving costs beyond the ensemble itself, and what a server does when it is overloaded.

The server, a bare Starlette route and bare ONNX Runtime in process are pinned to the same CPUs, one after the other;
the client is a process of its own on another CPU. Load is open-loop: arrivals are a Poisson process, and latency counts
from the moment a request was meant to be sent. Every figure leaves out the first 50 requests.

Figures: ``throughput_of_bare_onnxruntime`` (images a second as raw bytes, over bare ONNX Runtime's at the
batch size that really happened), ``added_p50_ms`` (of one image on one connection, over bare ONNX Runtime), with the
same of the bare Starlette route; ``open_loop.*``; with ``--soak``, ``soak.*``.

    python benchmarks/serving.py                   # a small deep ensemble, made here with random weights
    python benchmarks/serving.py bundles/NAME --soak
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

WARM_UP = 50
LATE = 100  # milliseconds, of p99
ROUTE = "/predictive-uncertainty"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE")
    parser.add_argument("--architecture", help="of the ensemble made here (default: resnet20; with --quick: cnn)")
    parser.add_argument("--members", type=int, default=4, help="of the ensemble made here (default: 4)")
    parser.add_argument("--soak", type=float, nargs="?", const=300, metavar="SECONDS", help="also bear it for 300 s")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and their context here")
    for role in ("client", "starlette", "bare"):
        parser.add_argument(f"--{role}", metavar="JSON", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        print(json.dumps(asyncio.run(Client(**json.loads(options.client)).run())))
    elif options.starlette:
        serve_starlette(**json.loads(options.starlette))
    elif options.bare:
        print(json.dumps(measure_bare(**json.loads(options.bare))))
    else:
        with tempfile.TemporaryDirectory() as folder:
            architecture = options.architecture or ("cnn" if options.quick else "resnet20")
            bundle = options.bundle or make_bundle(Path(folder), architecture, options.members)
            compare(bundle.resolve(), options)


def compare(bundle: Path, options: argparse.Namespace) -> None:
    from _harness import report

    shape = json.loads((bundle / "manifest.json").read_text())["image_shape"]
    theirs, ours = cpus()
    print(f"server and bare ONNX Runtime on CPUs {theirs}, the client on {ours}; load average {os.getloadavg()[0]:.1f}")
    seconds = 2 if options.quick else 6
    rounds = 2 if options.quick else 9
    figures: dict[str, float] = {}
    with running("ensembler", bundle, theirs) as service, running("starlette", bundle, theirs) as starlette:
        ports = {"service": service, "starlette": starlette}
        p50: dict[str, list[float]] = {"bare": [], **{name: [] for name in ports}}
        for _ in range(rounds):  # in turns: the machine's other work comes and goes
            p50["bare"] += bare(bundle, theirs, batch=1, seconds=seconds / 3)["ms"]
            for name, port in ports.items():
                found = client(ours, port=port, shape=[1, *shape], connections=1, seconds=seconds / 3)
                p50[name] += found["ms"]
        medians = {name: statistics.median(values) for name, values in p50.items()}
        print(f"one image, one connection, p50: {', '.join(f'{name} {ms:.2f} ms' for name, ms in medians.items())}")
        figures["added_p50_ms"] = medians["service"] - medians["bare"]
        figures["starlette.added_p50_ms"] = medians["starlette"] - medians["bare"]

        shares: dict[str, list[float]] = {name: [] for name in ports}
        rates: list[float] = []
        for _ in range(rounds):
            found = client(ours, port=service, shape=[16, *shape], connections=8, seconds=seconds)
            size = round(statistics.mean(found["batches"]))
            alone = bare(bundle, theirs, batch=size, seconds=seconds / 2)["rate"]
            shares["service"].append(found["rate"] / alone)
            rates.append(found["rate"])
            found = client(ours, port=starlette, shape=[size, *shape], connections=2, seconds=seconds / 2)
            shares["starlette"].append(found["rate"] / alone)
        print(f"8 connections of 16 images: passes of {size}, {statistics.median(rates):.0f} images/s")
        figures["throughput_of_bare_onnxruntime"] = statistics.median(shares["service"])
        figures["starlette.throughput_of_bare_onnxruntime"] = statistics.median(shares["starlette"])
        for name in ("throughput_of_bare_onnxruntime", "starlette.throughput_of_bare_onnxruntime", "added_p50_ms"):
            print(f"  {name} {figures[name]:.3f}")

        capacity = statistics.median(rates)
        for part in (0.5,) if options.quick else (0.25, 0.5, 0.7):
            for name, port in ports.items():
                found = client(ours, port=port, shape=[1, *shape], rates=[[part * capacity, 5 * seconds]])
                line = {key: found[key] for key in ("p50", "p95", "p99", "errors", "mean_batch")}
                figures |= {f"open_loop.{part:g}.{name}.{key}": float(value) for key, value in line.items()}
                print(f"open loop, {part * capacity:.0f} images/s, {name}: {line} {found['statuses']}")
    if options.soak:
        figures |= soak(bundle, shape, theirs, ours, options.soak, capacity)
    print(f"load average {os.getloadavg()[0]:.1f}")
    report(figures, rounds, options.json)


def soak(
    bundle: Path, shape: list[int], theirs: list[int], ours: list[int], seconds: float, capacity: float
) -> dict[str, float]:
    """The highest rate that keeps p99 under 100 ms, for a while; four times that for a fifth of it; and the rate again.

    The flood comes twice: the first takes the memory that many connections at a time take, the second shows whether
    that grows.
    """
    shape = [1, *shape]
    with running("ensembler", bundle, theirs) as port:
        rate, tried = 0.0, 0.1 * capacity
        while tried < capacity:  # upwards: what a server did not bear would weigh on the next trial
            found = client(ours, port=port, shape=shape, rates=[[tried, 20]])
            if found["p99"] >= LATE or set(found["statuses"]) != {"200"}:
                break
            rate, tried = tried, 1.2 * tried
        if not rate:
            raise SystemExit(f"no rate keeps p99 under {LATE} ms on this machine, now")
        rate *= 0.8  # room for what else the machine does meanwhile
        time.sleep(10)
        sizes = [memory()]
        steady = client(ours, port=port, shape=shape, rates=[[rate, seconds]])
        sizes.append(memory())
        floods = []
        for _ in range(2):
            floods.append(client(ours, port=port, shape=shape, rates=[[4 * rate, seconds / 5], [rate, 15]])["phases"])
            sizes.append(memory())
    recovered = [recovery(after) for _, after in floods]
    for name, found in {"steady": steady, "four times that": floods[0][0], "and again": floods[1][0]}.items():
        print(f"soak, {name}: p99 {found['p99']:.0f} ms, {found['statuses']}, passes of {found['mean_batch']:.1f}")
    mib = [size / 2**20 for size in sizes]
    print(f"soak: {rate:.0f} images/s; memory {', '.join(f'{size:.0f}' for size in mib)} MiB; recovered after", end=" ")
    print(", ".join(f"{second:.1f} s" for second in recovered))
    flood = floods[0][0]
    return {
        "soak.rate": rate,
        "soak.p99_ms": steady["p99"],
        "soak.other_statuses": float(
            sum(found["errors"] - found["statuses"].get("503", 0) for found in (steady, *floods[0], *floods[1]))
        ),
        "soak.refused_at_four_times": flood["statuses"].get("503", 0) / max(1, sum(flood["statuses"].values())),
        "soak.p99_of_answered_at_four_times_ms": flood["p99"],
        "soak.memory_growth_mib": mib[1] - mib[0],
        "soak.memory_of_first_flood_mib": mib[2] - mib[1],
        "soak.memory_of_second_flood_mib": mib[3] - mib[2],
        "soak.recovered_after_s": max(recovered),
    }


def recovery(after: dict[str, Any]) -> float:
    """Seconds from a flood's last request until p99, of all that is asked from then on, is under the limit."""
    seconds, ms = np.array(after["seconds"]), np.array(after["ms"])
    for begun in np.arange(0, 14, 0.1):
        if np.quantile(ms[seconds >= begun], 0.99) < LATE:
            return float(begun)
    return float("inf")


class Client:
    """Loads one server: open-loop at ``rates``, of requests a second, each for some seconds, one after the other; or
    closed-loop on some ``connections`` for some ``seconds``."""

    def __init__(
        self,
        on: list[int],
        port: int,
        shape: list[int],
        rates: list[tuple[float, float]] | None = None,
        connections: int = 1,
        seconds: float = 1.0,
    ) -> None:
        pin(on)
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        body = images.tobytes()
        head = (
            f"POST {ROUTE} HTTP/1.1\r\nHost: x\r\n"
            "Content-Type: application/octet-stream\r\nAccept: application/x-npy\r\n"
            f"X-Shape: {','.join(map(str, shape))}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self.request = head.encode() + body
        self.port, self.rates, self.connections, self.seconds = port, rates or [], connections, seconds
        self.images = len(images)
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.done: list[tuple[float, float, str, int]] = []  # intended, finished, status, batch

    async def run(self) -> dict[str, Any]:
        for _ in range(WARM_UP):
            await self.ask(time.perf_counter())
        self.done.clear()
        start = time.perf_counter()
        if not self.rates:
            await asyncio.gather(*(self.closed_loop(start) for _ in range(self.connections)))
            return self.found(start)
        starts = [start + sum(seconds for _, seconds in self.rates[:i]) for i in range(len(self.rates) + 1)]
        await self.open_loop(start, random.Random(0))
        return self.found(start) | {"phases": [self.found(*phase) for phase in itertools.pairwise(starts)]}

    def found(self, start: float, end: float = float("inf")) -> dict[str, Any]:
        """What became of the requests that were meant to be sent between two moments."""
        done = [entry for entry in self.done if start <= entry[0] < end]
        answered = [entry for entry in done if entry[2] == "200"]
        ms = [1000 * (finished - intended) for intended, finished, _, _ in answered]
        batches = [batch for *_, batch in answered]
        quantiles = np.quantile(ms, [0.5, 0.95, 0.99]).round(2).tolist() if ms else [float("nan")] * 3
        statuses = Counter(status for _, _, status, _ in done)
        taken = max((finished for _, finished, _, _ in done), default=start) - start
        return {
            "ms": ms,
            "seconds": [intended - start for intended, *_ in answered],
            "batches": batches,
            "mean_batch": round(statistics.mean(batches), 2) if batches else 0.0,
            "rate": self.images * len(answered) / max(taken, 1e-9),
            "statuses": statuses,
            "errors": statuses.total() - statuses["200"],
            **dict(zip(("p50", "p95", "p99"), quantiles, strict=True)),
        }

    async def open_loop(self, start: float, rng: random.Random) -> None:
        asked: set[asyncio.Task[None]] = set()
        intended = start
        for rate, seconds in self.rates:
            start += seconds
            while (intended := intended + rng.expovariate(rate)) < start:
                await asyncio.sleep(max(0.0, intended - time.perf_counter()))
                task = asyncio.create_task(self.ask(intended))
                asked.add(task)
                task.add_done_callback(asked.discard)
            intended = start
        await asyncio.gather(*asked)

    async def closed_loop(self, start: float) -> None:
        while time.perf_counter() < start + self.seconds:
            await self.ask(time.perf_counter())

    async def ask(self, intended: float) -> None:
        try:
            try:
                status, batch = await self.exchange(*self.idle.pop())
            except (IndexError, OSError, EOFError):  # none is idle, or the server had enough of waiting
                status, batch = await self.exchange(*await asyncio.open_connection("127.0.0.1", self.port))
        except (OSError, EOFError) as error:
            status, batch = type(error).__name__, 0
        self.done.append((intended, time.perf_counter(), status, batch))

    async def exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[str, int]:
        writer.write(self.request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
        await reader.readexactly(int(headers["content-length"]))
        if headers.get("connection") == "close":
            writer.close()
        else:
            self.idle.append((reader, writer))
        return head.split()[1], int(headers.get("x-batch-size", self.images))


class Bare:
    """One session a member, all in one pool as wide as the CPUs: images (B, H, W, 3) to the mean's (B, C)."""

    def __init__(self, bundle: Path) -> None:
        import onnxruntime

        manifest = json.loads((bundle / "manifest.json").read_text())
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = ["CPUExecutionProvider"]
        self.sessions = [
            onnxruntime.InferenceSession(bundle / graph, settings, providers) for graph in manifest["graphs"]
        ]
        self.shape = manifest["image_shape"]
        self.pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        logits = np.stack(list(self.pool.map(lambda session: session.run(None, {"images": images})[0], self.sessions)))
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
        mean: np.ndarray = (powers / powers.sum(axis=-1, keepdims=True)).mean(axis=0)
        return mean


def measure_bare(on: list[int], bundle: str, batch: int, seconds: float) -> dict[str, Any]:
    pin(on)
    run = Bare(Path(bundle))
    images = np.random.default_rng(0).integers(0, 256, (batch, *run.shape), dtype=np.uint8)
    for _ in range(max(2, WARM_UP // batch)):
        run(images)
    ms, start = [], time.perf_counter()
    while time.perf_counter() < start + seconds:
        began = time.perf_counter()
        run(images)
        ms.append(1000 * (time.perf_counter() - began))
    return {"ms": ms, "rate": batch * len(ms) / (time.perf_counter() - start)}


def serve_starlette(bundle: str, port: int) -> None:
    """The least that serves an ensemble over HTTP: raw bytes in, the mean's ``.npy`` out, in a thread."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    run = Bare(Path(bundle))
    one = asyncio.Lock()

    async def answer(request: Request) -> Response:
        images = np.frombuffer(await request.body(), dtype=np.uint8).reshape(-1, *run.shape)
        async with one:
            mean = await asyncio.to_thread(run, images)
        file = io.BytesIO()
        np.save(file, mean)
        return Response(file.getvalue(), media_type="application/x-npy")

    async def ready(request: Request) -> Response:
        return Response()

    app = Starlette(routes=[Route(ROUTE, answer, methods=["POST"]), Route("/readyz", ready)])
    uvicorn.run(app, port=port, log_level="warning", access_log=False)


def free_port() -> int:
    """A free port below those that the system gives out: BentoML takes two of them before it takes this one."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@contextlib.contextmanager
def running(kind: str, bundle: Path, on: list[int]) -> Iterator[int]:
    """A server on some CPUs; its port."""
    port = free_port()
    if kind == "ensembler":
        command = ["-m", "ensembler.cli", "serve", str(bundle), "--port", str(port)]
    else:
        command = [__file__, "--starlette", json.dumps({"bundle": str(bundle), "port": port})]
    with tempfile.TemporaryDirectory() as home:
        environment = os.environ | {"BENTOML_HOME": home, "PYTHONPATH": str(Path(__file__).parents[1])}
        before = os.sched_getaffinity(0) if on else set()
        pin(on)  # children begin where their parent is
        try:
            server = subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.DEVNULL)
        finally:
            pin(before)
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5).close()
                    break
                except OSError:
                    if server.poll() is not None or time.monotonic() > deadline:
                        raise SystemExit(f"the {kind} server did not start") from None
                    time.sleep(0.2)
            yield port
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def client(on: list[int], **load: Any) -> dict[str, Any]:
    return _apart("--client", on, load)


def bare(bundle: Path, on: list[int], **load: Any) -> dict[str, Any]:
    return _apart("--bare", on, {"bundle": str(bundle), **load})


def _apart(role: str, on: list[int], settings: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, role, json.dumps(settings | {"on": on})]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    found: dict[str, Any] = json.loads(output)
    return found


def cpus() -> tuple[list[int], list[int]]:
    """CPUs for the server and one for the client: another, where there is another."""
    if not hasattr(os, "sched_getaffinity"):
        return [], []
    every = sorted(os.sched_getaffinity(0))
    return every[:-1] or every, every[-1:]


def pin(on: Iterable[int]) -> None:
    if on:
        os.sched_setaffinity(0, on)


def memory() -> int:
    """Bytes that the processes started here hold: the server and its workers, while no client runs."""
    import psutil

    return sum(process.memory_info().rss for process in psutil.Process().children(recursive=True))


def make_bundle(folder: Path, architecture: str, members: int) -> Path:
    """A deep ensemble of one short epoch on the digits: the cost of serving does not depend on its weights."""
    from ensembler.data import datasets
    from ensembler.serve.export.bundle import export_run
    from ensembler.trainers import DeepEnsemble, Settings, train

    print(f"{members} x {architecture}, a short epoch on the digits each ...")
    settings = Settings(architecture=architecture, epochs=1, batch_size=512)
    run = train(datasets.load("digits"), DeepEnsemble(members=members), settings).save(folder / "run")
    return export_run(run, folder / "bundle", layout="members", use_data=False)


if __name__ == "__main__":
    main()
