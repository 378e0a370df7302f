"""The application as BentoML mounts it: in this process, as BentoML's own client asks it, and what stops it early."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ensembler.serve import Runtime
from ensembler.serve.http.options import Options
from ensembler.serve.http.schemas import Answer
from ensembler.storage import artefact
from tests._runs import make_bundle
from tests._service import ROUTE, Server, TestClient, free_port, tiny_images

with warnings.catch_warnings():  # of BentoML's own imports
    warnings.simplefilter("ignore")
    import bentoml

    from ensembler.serve.service import PredictiveUncertainty

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the 'model_fields' attribute:DeprecationWarning")  # BentoML


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bentoml") / "bundle")


@pytest.fixture(scope="module", autouse=True)
def _collected() -> Iterator[None]:
    """BentoML's clients leave their temporary folders to the garbage collector, which warns: let it do so here."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def client(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setenv("ENSEMBLER_BUNDLE", str(bundle))
    monkeypatch.setenv("ENSEMBLER_TOKEN", "sesame")
    monkeypatch.setitem(PredictiveUncertainty.config, "metrics", {"enabled": False})  # there is one set a process
    with TestClient(PredictiveUncertainty.to_asgi(), headers={"Authorization": "Bearer sesame"}) as client:
        yield client


def test_an_answered_request_leaves_no_timer(client: TestClient) -> None:
    headers = {"X-Shape": "1,4,6,3", "Content-Type": "application/octet-stream"}
    for _ in range(10):
        assert client.post(ROUTE, content=tiny_images(1).tobytes(), headers=headers).status_code == 200

    def waiting() -> int:
        loop = asyncio.get_running_loop()
        return sum(not timer.cancelled() for timer in loop._scheduled)  # type: ignore[attr-defined]

    assert client.portal is not None
    assert client.portal.call(waiting) < 5


def test_bentomls_own_routes_pass_the_gate(client: TestClient) -> None:
    schema = client.get("/schema.json").json()
    (route,) = schema["routes"]
    assert route["route"] == ROUTE
    assert list(route["input"]["properties"]) == ["images", *Options.model_fields]
    for path in ("/schema.json", "/nowhere", ROUTE):
        answer = client.get(path, headers={"Authorization": ""})
        assert (answer.status_code, list(answer.json())) == (401, ["error"])
    assert client.get("/nowhere").json() == {"error": "this route does not exist: GET /docs.json lists those that do"}
    assert client.get(ROUTE).status_code == 405


def test_the_method_answers_as_the_route_does(client: TestClient) -> None:
    images = tiny_images(2)
    service: Any = PredictiveUncertainty.inner()

    async def ask() -> Answer:
        answer: Answer = await service.predictive_uncertainty(images=images, outputs=["class", "members"], members=2)
        return answer

    assert client.portal is not None
    body = {"images": images.tolist(), "outputs": ["class", "members"], "members": 2}
    assert client.portal.call(ask) == Answer.model_validate(client.post(ROUTE, json=body).json())


def test_bentomls_client(bundle: Path, tmp_path: Path) -> None:
    server = Server([sys.executable, "-m", "ensembler.cli", "serve", str(bundle)], tmp_path, free_port())
    images = tiny_images(3)
    known = Runtime.load(bundle).predict(images)
    try:
        server.wait_until_ready()
        with bentoml.SyncHTTPClient(server.url) as client:
            for given in (images, images.tolist()):
                answer = client.predictive_uncertainty(images=given)
                assert answer["model"]["bundle"] == artefact.sha256(bundle / "manifest.json")
                found = np.array([one["probabilities"] for one in answer["predictions"]])
                np.testing.assert_allclose(found, known.probabilities, atol=1e-6)
            exact = client.predictive_uncertainty(images=images, mode="exact", outputs=["class"])
            assert [one["class"] for one in exact["predictions"]] == known.classes.tolist()
            with pytest.raises(bentoml.exceptions.InvalidArgument, match=r"images\[0\]\[0\]\[0\]\[0\] is 0"):
                client.predictive_uncertainty(images=images / 256)
        assert "POST '/predictive-uncertainty' 200" in server.log.read_text()
    finally:
        server.stop(signal.SIGTERM)


def test_what_is_wrong_stops_the_server_before_its_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(match: str) -> None:
        with pytest.raises(bentoml.exceptions.BentoMLException, match=match):
            PredictiveUncertainty.inner.verify()

    monkeypatch.delenv("ENSEMBLER_BUNDLE", raising=False)
    refused("set ENSEMBLER_BUNDLE")
    monkeypatch.setenv("ENSEMBLER_BUNDLE", str(tmp_path / "nothing"))
    refused("no bundle at")
    monkeypatch.setenv("ENSEMBLER_BUNDLE", str(make_bundle(tmp_path / "bundle")))
    PredictiveUncertainty.inner.verify()
    monkeypatch.setenv("ENSEMBLER_MAX_BATCH", "many")
    refused("ENSEMBLER_MAX_BATCH must be a whole number")


def test_an_address_that_is_taken_is_a_sentence(bundle: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "bentoml", "serve", "ensembler.serve.service:PredictiveUncertainty"]
        done = subprocess.run(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=os.environ | {"ENSEMBLER_BUNDLE": str(bundle), "TMPDIR": str(tmp_path), "BENTOML_HOME": str(tmp_path)},
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    said = "Error: cannot listen: Address already in use: choose another --host or --port"
    assert done.stderr.splitlines()[-1] == said
    assert not [*tmp_path.glob("ensembler-serve-*")]
