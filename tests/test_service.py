from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from ensembler.errors import ArtefactError, ShapeError, UsageError
from ensembler.serve import Runtime
from ensembler.serve.schemas import Answer
from tests._runs import CLASSES, TINY, make_bundle

with warnings.catch_warnings():  # of BentoML's own imports, and of httpx in Starlette's test client
    warnings.simplefilter("ignore")
    import bentoml
    from starlette.testclient import TestClient

    from ensembler.serve.service import BodyLimit, PredictiveUncertainty

# BentoML 1.4.39 reads pydantic's fields from an instance.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the 'model_fields' attribute:DeprecationWarning")

ROUTE = "/predictive-uncertainty"
LIMIT = 100_000


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("service") / "bundle")


@pytest.fixture(scope="module", autouse=True)
def _collected() -> Iterator[None]:
    """BentoML's clients leave their temporary folders to the garbage collector, which warns: let it do so here."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@contextmanager
def in_process(bundle: Path) -> Iterator[TestClient]:
    """The service in this process, with small limits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENSEMBLER_BUNDLE", str(bundle))
        patch.setenv("ENSEMBLER_MAX_BATCH", "4")
        patch.setitem(PredictiveUncertainty.config, "metrics", {"enabled": False})  # they are one set a process
        patch.setattr(PredictiveUncertainty, "middlewares", [(BodyLimit, {"limit": LIMIT})])
        with TestClient(PredictiveUncertainty.to_asgi()) as client:
            yield client


@pytest.fixture(scope="module")
def client(bundle: Path) -> Iterator[TestClient]:
    with in_process(bundle) as client:
        yield client


def tiny_images(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(0, 256, (batch, *TINY), dtype=np.uint8)


def with_pixel(value: object) -> dict[str, Any]:
    images = tiny_images(2).tolist()
    images[1][0][2][1] = value
    return {"images": images}


def ragged(*place: int) -> dict[str, Any]:
    images = inner = tiny_images(2).tolist()
    for index in place:
        inner = inner[index]
    inner.pop()
    return {"images": images}


IMAGES = tiny_images(1).tolist()
MALFORMED: dict[str, tuple[Any, str]] = {
    "no body": (b"", "the body is not JSON"),
    "half a body": (b'{"images": [[[', "the body is not JSON"),
    "not text": (b"\xff\xfe\x00\x93", "the body is not JSON"),
    "pixels, not JSON": (tiny_images(1).tobytes(), "the body is not JSON"),
    "brackets without end": (b"[" * 50_000, "the body is not JSON"),
    "brackets and their end": (b'{"images": ' + b"[" * 900 + b"]" * 900 + b"}", "found (1, 1, 1, 1, 1, 1)"),
    "a huge number": (b'{"images": ' + b"9" * 9000 + b"}", "the body is not JSON"),
    "null": (None, "the body is null, not an object"),
    "a list": (IMAGES, "the body is a list, not an object"),
    "no images": ({}, "the body has no field 'images'"),
    "another field": ({"image": IMAGES}, "the body has no field 'images'"),
    "one field more": ({"images": IMAGES, "members": 2}, 'unknown field "members"'),
    "images null": ({"images": None}, "'images' is null"),
    "images a string": ({"images": "AAAA"}, "'images' is a string"),
    "images a number": ({"images": 3}, "'images' is a number"),
    "images an object": ({"images": {"0": IMAGES}}, "'images' is an object"),
    "images of strings": ({"images": ["AAAA"]}, "found (1,)"),
    "no image": ({"images": []}, "send at least one image"),
    "an empty image": ({"images": [[]]}, "send at least one image"),
    "a single image": ({"images": IMAGES[0]}, "found a single image: put it in a list"),
    "a list too deep": ({"images": [IMAGES]}, "found (1, 1, 4, 6, 3)"),
    "channels first": ({"images": np.moveaxis(tiny_images(2), 3, 1).tolist()}, "found (2, 3, 4, 6)"),
    "transposed": ({"images": tiny_images(2).swapaxes(1, 2).tolist()}, "found (2, 6, 4, 3)"),
    "one channel": ({"images": tiny_images(2)[..., :1].tolist()}, "found (2, 4, 6, 1)"),
    "four channels": ({"images": np.zeros((1, 4, 6, 4), int).tolist()}, "found (1, 4, 6, 4)"),
    "too many images": ({"images": tiny_images(5).tolist()}, "5 images are more than 4 at a time"),
    "ragged rows": (ragged(1), "images are ragged"),
    "ragged pixels": (ragged(1, 2), "images are ragged"),
    "ragged channels": (ragged(0, 2, 3), "images are ragged"),
    "a pixel that is a list": (with_pixel([1]), "images mix lists and other values"),
    "a fraction": (with_pixel(0.5), "images[1][0][2][1] is 0.5"),
    "a whole float": (with_pixel(1.0), "images[1][0][2][1] is 1.0"),
    "not a number": (with_pixel(float("nan")), "images[1][0][2][1] is NaN"),
    "infinity": (with_pixel(float("inf")), "images[1][0][2][1] is Infinity"),
    "a string": (with_pixel("7"), 'images[1][0][2][1] is "7"'),
    "a long string": (with_pixel("7" * 5000), "...: send whole numbers"),
    "a boolean": (with_pixel(True), "images[1][0][2][1] is true"),
    "a null": (with_pixel(None), "images[1][0][2][1] is null"),
    "an object": (with_pixel({}), "images[1][0][2][1] is {}"),
    "negative": (with_pixel(-1), "images[1][0][2][1] is -1"),
    "too large": (with_pixel(256), "images[1][0][2][1] is 256: send whole numbers from 0 to 255"),
    "far too large": (with_pixel(10**30), "images[1][0][2][1] is 1000000"),
    "a body too large": (b" " * (LIMIT + 1), f"the body has {LIMIT + 1} bytes, more than {LIMIT}"),
}


@pytest.mark.parametrize(("content", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_request_is_told_why_and_harms_nobody(client: TestClient, content: Any, message: str) -> None:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    answer = client.post(ROUTE, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert list(answer.json()) == ["error"]
    sentence = answer.json()["error"]
    assert message in sentence
    assert "send" in sentence or "put it" in sentence
    assert len(sentence) < 250
    assert not any(secret in sentence for secret in ("Traceback", "\n", ".py", os.sep + "work", os.sep + "tmp"))
    assert client.post(ROUTE, json={"images": IMAGES}).status_code == 200


def test_an_answer_is_the_runtimes(client: TestClient, bundle: Path) -> None:
    images = tiny_images(4)
    runtime = Runtime.load(bundle)
    expected = runtime.predict(images)
    answer = client.post(ROUTE, json={"images": images.tolist()}).json()
    assert answer["model"] == {
        "method": "deep-ensemble",
        "architecture": "linear",
        "dataset": "made by hand",
        "members": 3,
        "bundle": runtime.sha256,
    }
    assert len(answer["predictions"]) == 4
    for index, prediction in enumerate(answer["predictions"]):
        assert prediction == {
            "class": expected.classes[index],
            "label": CLASSES[expected.classes[index]],
            "probabilities": expected.probabilities[index].tolist(),
            "predictive_entropy": expected.predictive_entropy[index],
            "expected_entropy": expected.expected_entropy[index],
            "mutual_information": expected.mutual_information[index],
            "disagreement": expected.disagreement[index],
            "members_used": 3,
        }


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_json_is_json_whatever_the_caller_calls_it(client: TestClient, kind: str) -> None:
    body = json.dumps({"images": IMAGES}).encode()
    assert client.post(ROUTE, content=body, headers={"content-type": kind}).status_code == 200


def test_the_limit_counts_bodies_of_no_announced_length(client: TestClient) -> None:
    answer = client.post(ROUTE, content=iter([b" " * 60_000] * 2))
    assert answer.status_code == 400
    assert "120000 bytes" in answer.json()["error"]
    body = json.dumps({"images": IMAGES}).encode()
    assert client.post(ROUTE, content=iter([body[:50], body[50:]])).status_code == 200


def test_health(client: TestClient) -> None:
    for path in ("/livez", "/readyz", "/healthz"):
        assert client.get(path).status_code == 200
    assert client.get(ROUTE).status_code == 405
    assert client.get("/nowhere").status_code == 404


def test_not_ready_before_every_session_has_run(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runtime, "warm_up", lambda self: None)
    with in_process(bundle) as client:
        assert client.get("/readyz").status_code == 503
        assert client.get("/livez").status_code == 200


def test_a_long_prediction_holds_up_nobody_else(
    client: TestClient, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, others_were_served = threading.Event(), threading.Event()
    predict = Runtime.predict

    def long(self: Runtime, images: Any) -> Any:
        started.set()
        assert others_were_served.wait(20)
        return predict(self, images)

    monkeypatch.setattr(Runtime, "predict", long)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(client.post, ROUTE, json={"images": IMAGES})
        assert started.wait(20)
        assert client.get("/livez").status_code == 200
        assert client.post(ROUTE, json={"images": []}).status_code == 400
        others_were_served.set()
        assert slow.result().status_code == 200


def test_the_class_called_directly(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENSEMBLER_BUNDLE", str(bundle))
    service = PredictiveUncertainty.inner()
    assert not asyncio.run(service.__is_ready__())
    service.warm_up()
    assert asyncio.run(service.__is_ready__())
    answers = [asyncio.run(service.predictive_uncertainty(images=images)) for images in (tiny_images(2), IMAGES * 2)]
    assert all(isinstance(answer, Answer) and len(answer.predictions) == 2 for answer in answers)
    with pytest.raises(ShapeError, match="found a single image"):
        asyncio.run(service.predictive_uncertainty(images=IMAGES[0]))
    service.close()
    assert not asyncio.run(service.__is_ready__())


def test_one_member_answers_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENSEMBLER_BUNDLE", str(make_bundle(tmp_path / "single", members=1)))
    service = PredictiveUncertainty.inner()
    answer = json.loads(asyncio.run(service.predictive_uncertainty(images=tiny_images(1))).model_dump_json())
    (prediction,) = answer["predictions"]
    assert (prediction["mutual_information"], prediction["disagreement"]) == (None, None)
    assert (answer["model"]["members"], prediction["members_used"]) == (1, 1)


def test_a_service_without_its_bundle_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENSEMBLER_BUNDLE", raising=False)
    with pytest.raises(UsageError, match="set ENSEMBLER_BUNDLE"):
        PredictiveUncertainty.inner()
    with pytest.raises(bentoml.exceptions.BentoMLException, match="set ENSEMBLER_BUNDLE"):
        PredictiveUncertainty.inner.verify()
    monkeypatch.setenv("ENSEMBLER_BUNDLE", str(tmp_path / "nothing"))
    with pytest.raises(ArtefactError, match="no bundle at"):
        PredictiveUncertainty.inner()
    monkeypatch.setenv("ENSEMBLER_BUNDLE", str(make_bundle(tmp_path / "bundle")))
    monkeypatch.setenv("ENSEMBLER_MAX_BATCH", "many")
    with pytest.raises(bentoml.exceptions.BentoMLException, match="ENSEMBLER_MAX_BATCH must be a whole number"):
        PredictiveUncertainty.inner.verify()


def test_the_command_refuses_before_bentoml_starts(bundle: Path, tmp_path: Path) -> None:
    from ensembler.cli import app

    def refused(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["serve", *arguments])
        assert result.exit_code == 1
        return result.output

    damaged = make_bundle(tmp_path / "damaged")
    (damaged / "member-001.onnx").write_bytes(b"")
    assert "member-001.onnx has changed" in refused(str(damaged))
    assert "no bundle at" in refused(str(tmp_path / "nothing"))
    assert "--host must be an IP address" in refused(str(bundle), "--host", "example.org")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "choose another --port" in refused(str(bundle), "--port", str(taken.getsockname()[1]))


class Server:
    """A real server, started as a user starts it."""

    def __init__(self, command: list[str], folder: Path, port: int, **environment: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "log.txt"
        home = {"BENTOML_HOME": str(folder / "bentoml"), "BENTOML_DO_NOT_TRACK": "True"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(port)], cwd=folder, env=os.environ | home | environment, stdout=log, stderr=log
            )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        pytest.fail(f"the server did not become ready:\n{self.log.read_text()}")

    def stop(self, by: signal.Signals) -> None:
        """Stop it, and make sure that it left no process behind."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(by)
        try:
            assert self.process.wait(timeout=30) == 0
            _, orphans = psutil.wait_procs(family, timeout=5)
            assert family and not orphans
        finally:
            for process in family:
                if process.is_running():
                    process.kill()
            self.process.kill()
            self.process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def test_a_real_server_serves_and_leaves_nothing_behind(bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ensembler.cli", "serve", str(bundle)]
    server = Server(command, tmp_path, free_port(), ENSEMBLER_MAX_BATCH="8")
    try:
        server.wait_until_ready()
        images = tiny_images(3)
        plain = httpx.post(server.url + ROUTE, json={"images": images.tolist()})
        assert plain.status_code == 200
        assert len(plain.json()["predictions"]) == 3
        with bentoml.SyncHTTPClient(server.url) as client:
            assert client.predictive_uncertainty(images=images) == plain.json()
            assert client.predictive_uncertainty(images=images.tolist()) == plain.json()
            with pytest.raises(bentoml.exceptions.InvalidArgument, match=r"images\[0\]\[0\]\[0\]\[0\] is 0"):
                client.predictive_uncertainty(images=images / 256)
        with ThreadPoolExecutor(8) as pool:
            bodies = [{"images": tiny_images(1 + n % 10).tolist()} for n in range(40)]
            answers = list(pool.map(lambda body: httpx.post(server.url + ROUTE, json=body, timeout=30), bodies))
        for body, answer in zip(bodies, answers, strict=True):
            assert answer.status_code == (200 if len(body["images"]) <= 8 else 400)
            assert answer.status_code == 400 or len(answer.json()["predictions"]) == len(body["images"])
        assert httpx.get(f"{server.url}/livez").status_code == 200
        assert "predictive-uncertainty" in httpx.get(f"{server.url}/metrics").text
        assert "Traceback" not in server.log.read_text()
    finally:
        server.stop(signal.SIGTERM)


def test_bentoml_itself_starts_the_service_from_any_folder(bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bentoml", "serve", "ensembler.serve.service:PredictiveUncertainty"]
    server = Server(command, tmp_path, free_port(), ENSEMBLER_BUNDLE=str(bundle), ENSEMBLER_WORKERS="2")
    try:
        server.wait_until_ready()
        assert httpx.post(server.url + ROUTE, json={"images": IMAGES}).status_code == 200
    finally:
        server.stop(signal.SIGINT)
