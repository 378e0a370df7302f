"""KServe's Open Inference Protocol, by NVIDIA's client for it and byte by byte."""

from __future__ import annotations

import base64
import io
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ensembler.serve import Runtime
from tests._runs import CLASSES, TINY, make_bundle
from tests._service import Server, TestClient, assert_refused, free_port, in_process, make_calibrated, tiny_images

MODEL = "/v2/models/none"
INFER = f"{MODEL}/infer"
PIXELS = tiny_images(2)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_calibrated(tmp_path_factory.mktemp("kserve") / "bundle")


@pytest.fixture(scope="module")
def client(bundle: Path) -> Iterator[TestClient]:
    with in_process(bundle) as client:
        yield client


def tensor(**changed: Any) -> dict[str, Any]:
    whole = {"name": "images", "shape": list(PIXELS.shape), "datatype": "UINT8", "data": PIXELS.ravel().tolist()}
    return {name: value for name, value in (whole | changed).items() if value is not None}


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def arrays(answer: Any) -> dict[str, np.ndarray]:
    assert answer.status_code == 200, answer.text
    return {one["name"]: np.reshape(one["data"], one["shape"]) for one in answer.json()["outputs"]}


def test_the_server_and_its_model_describe_themselves(client: TestClient) -> None:
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get(f"{MODEL}/ready").json() == {"name": "none", "ready": True}
    described = client.get(MODEL).json()
    assert described["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, *TINY]}]
    names = [{"name": output["name"]} for output in described["outputs"]]
    answered = client.post(INFER, json={"inputs": [tensor()], "outputs": names})
    for told, found in zip(described["outputs"], answered.json()["outputs"], strict=True):
        assert (told["name"], told["datatype"]) == (found["name"], found["datatype"])
        sizes = zip(told["shape"], found["shape"], strict=True)
        assert all(size in (-1, actual) for size, actual in sizes)
    assert described["versions"] == ["1"]
    version = f"{MODEL}/versions/1"  # as clients ask that take it from there
    assert client.get(version).json() == described and client.get(f"{version}/ready").json()["ready"]
    assert client.post(f"{version}/infer", json={"inputs": [tensor()], "outputs": names}).json() == answered.json()
    assert_refused(client.post(f"{MODEL}/versions/2/infer", json={"inputs": [tensor()]}), 404)
    for path in ("", "/ready", "/infer"):
        answer = client.request("POST" if path == "/infer" else "GET", f"/v2/models/other{path}", content=b"{}")
        assert 'has the model "none" only' in assert_refused(answer, 404)


def test_every_form_of_the_input_gives_the_runtimes_answer(client: TestClient, bundle: Path) -> None:
    known = Runtime.load(bundle).predict(PIXELS)
    files = [png(one) for one in PIXELS]
    prefixed = b"".join(len(file).to_bytes(4, "little") + file for file in files)
    in_base64 = [base64.b64encode(file).decode() for file in files]
    inputs: list[tuple[dict[str, Any], bytes]] = [
        (tensor(), b""),
        (tensor(data=PIXELS.tolist()), b""),
        (tensor(datatype="BYTES", shape=[2], data=in_base64), b""),
        *(
            (tensor(datatype=kind, data=None, parameters={"binary_data_size": len(raw)}), raw)
            for kind, raw in {"UINT8": PIXELS.tobytes(), "INT32": PIXELS.astype("<i4").tobytes()}.items()
        ),
        (tensor(datatype="BYTES", shape=[2], data=None, parameters={"binary_data_size": len(prefixed)}), prefixed),
    ]
    for one, raw in inputs:
        head = json.dumps({"id": "a", "inputs": [one]}).encode()
        headers = {"Inference-Header-Content-Length": str(len(head))} if raw else {}
        answer = client.post(INFER, content=head + raw, headers=headers)
        found = arrays(answer)
        assert (answer.json()["id"], answer.json()["model_name"]) == ("a", "none")
        np.testing.assert_array_equal(found["probabilities"], known.probabilities)
        np.testing.assert_array_equal(found["mutual_information"], known.mutual_information)
        assert found["label"].tolist() == known.labels
        assert found["prediction_set"].shape == (2, len(CLASSES)) and found["abstain"].shape == (2,)


def test_options_are_parameters(client: TestClient) -> None:
    asked = {"inputs": [tensor()], "outputs": [{"name": "members"}, {"name": "members_used"}]}
    found = arrays(client.post(INFER, json=asked | {"parameters": {"members": 2}}))
    assert found["members"].shape == (2, 2, len(CLASSES)) and found["members_used"].tolist() == [2, 2]
    exact = client.post(INFER, json=asked | {"parameters": {"mode": "exact"}})
    assert "leave out mode" in assert_refused(exact, 400)


BAD: dict[str, tuple[Any, str]] = {
    "a list": ([], "the body is a list"),
    "no inputs": ({}, "has not one input"),
    "two inputs": ({"inputs": [tensor(), tensor()]}, "has not one input"),
    "another input": ({"inputs": [tensor(name="x")]}, 'called "x", not images'),
    "an input that is none": ({"inputs": [3]}, "inputs[0] is a number"),
    "no shape": ({"inputs": [tensor(shape=None)]}, "has no shape"),
    "a shape of true": ({"inputs": [tensor(shape=[True, *TINY])]}, "has no shape"),
    "a negative shape": ({"inputs": [tensor(shape=[-2, *TINY])]}, "has no shape"),
    "an endless shape": ({"inputs": [tensor(shape=[1] * 70)]}, "has no shape"),
    "another shape": ({"inputs": [tensor(shape=[1, *TINY])]}, "not (1, 4, 6, 3)"),
    "floats": ({"inputs": [tensor(datatype="FP32")]}, 'datatype is "FP32"'),
    "no datatype": ({"inputs": [tensor(datatype=None)]}, "datatype is null"),
    "a datatype that is a list": ({"inputs": [tensor(datatype=[])]}, "datatype is a list"),
    "no data": ({"inputs": [tensor(data=None)]}, "not one of data and binary_data_size"),
    "data that are none": ({"inputs": [tensor(data="x")]}, "data is a string"),
    "a pixel too large": ({"inputs": [tensor(data=[256] * PIXELS.size)]}, "is 256"),
    "fractions": ({"inputs": [tensor(data=[0.5] * PIXELS.size)]}, "is 0.5"),
    "bytes that do not follow": (
        {"inputs": [tensor(data=None, parameters={"binary_data_size": 144})]},
        "but 0 bytes follow",
    ),
    "BYTES of two dimensions": ({"inputs": [tensor(datatype="BYTES", shape=[1, 1], data=["AAAA"])]}, "one dimension"),
    "BYTES too few": ({"inputs": [tensor(datatype="BYTES", shape=[2], data=["AAAA"])]}, "not that of 1 image files"),
    "an id that is none": ({"inputs": [tensor()], "id": 3}, "id is a number"),
    "an unknown output": ({"inputs": [tensor()], "outputs": [{"name": "x"}]}, 'outputs[0] is "x"'),
    "an output that is a list": ({"inputs": [tensor()], "outputs": [{"name": []}]}, "outputs[0] is a list"),
    "an output twice": ({"inputs": [tensor()], "outputs": [{"name": "class"}] * 2}, "again"),
    "outputs that are none": ({"inputs": [tensor()], "outputs": {}}, "outputs is an object"),
    "an unknown parameter": ({"inputs": [tensor()], "parameters": {"x": 1}}, 'unknown option "x"'),
    "outputs as a parameter": ({"inputs": [tensor()], "parameters": {"outputs": ["class"]}}, "send it beside inputs"),
    "a flag that is none": ({"inputs": [tensor()], "parameters": {"binary_data_output": 1}}, "send true or false"),
    "a parameter of an output": (
        {"inputs": [tensor()], "outputs": [{"name": "class", "parameters": {"classification": 2}}]},
        "binary_data is the only one",
    ),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_a_request_that_cannot_be_honoured(client: TestClient, content: Any, message: str) -> None:
    assert message in assert_refused(client.post(INFER, json=content), 400)


def test_bytes_that_are_not_what_they_should_be(client: TestClient) -> None:
    def ask(raw: bytes, length: str | None = None, **changed: Any) -> str:
        size = {"binary_data_size": len(raw)}
        head = json.dumps({"inputs": [tensor(data=None, parameters=size) | changed]}).encode()
        headers = {"Inference-Header-Content-Length": length or str(len(head))}
        return assert_refused(client.post(INFER, content=head + raw, headers=headers), 400, 415)

    assert "145 bytes are not a tensor" in ask(PIXELS.tobytes() + b"x")
    assert "send the JSON's length" in ask(PIXELS.tobytes(), "1000000")
    assert "send the JSON's length" in ask(PIXELS.tobytes(), "9" * 5000)
    assert "send the JSON's length" in ask(PIXELS.tobytes(), "-1")
    assert "the body is not JSON" in ask(PIXELS.tobytes(), "5")
    for raw in (b"\x01", b"\xff\xff\xff\xff", b"\x05\x00\x00\x00abc"):
        assert "end within an element" in ask(raw, datatype="BYTES", shape=[1])
    assert "no format that is read" in ask(b"\x03\x00\x00\x00abc", datatype="BYTES", shape=[1])
    assert "from 0 to 255" in ask(np.full((2, *TINY), -1, "<i2").tobytes(), datatype="INT16")


def test_one_member_has_no_mutual_information(tmp_path: Path) -> None:
    with in_process(make_bundle(tmp_path / "one", members=1)) as client:
        told = {output["name"] for output in client.get(MODEL).json()["outputs"]}
        assert told.isdisjoint({"mutual_information", "disagreement"})
        assert set(arrays(client.post(INFER, json={"inputs": [tensor()]}))) <= told
        asked = {"inputs": [tensor()], "outputs": [{"name": "mutual_information"}]}
        assert "not defined" in assert_refused(client.post(INFER, json=asked), 400)


def test_nvidias_client(bundle: Path, tmp_path: Path) -> None:
    triton = pytest.importorskip("tritonclient.http")
    known = Runtime.load(bundle).predict(PIXELS)
    server = Server([sys.executable, "-m", "ensembler.cli", "serve", str(bundle)], tmp_path, free_port())
    try:
        server.wait_until_ready()
        client = triton.InferenceServerClient(server.url.removeprefix("http://"))
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("none")
        for path, said in {"live": {"live": True}, "ready": {"ready": True}}.items():
            assert server.get(f"/v2/health/{path}").json() == said  # of the front, not of a worker
        assert client.get_model_metadata("none")["inputs"][0]["name"] == "images"
        for binary in (True, False):
            images = triton.InferInput("images", list(PIXELS.shape), "UINT8")
            images.set_data_from_numpy(PIXELS, binary_data=binary)
            for outputs in (None, [triton.InferRequestedOutput(n, binary_data=binary) for n in ("mean", "label")]):
                answer = client.infer("none", [images], outputs=outputs, request_id="7")
                mean = answer.as_numpy("probabilities" if outputs is None else "mean")
                np.testing.assert_array_equal(mean, known.probabilities)
                labels = [str(one, "utf-8") if isinstance(one, bytes) else one for one in answer.as_numpy("label")]
                assert labels == known.labels
                if outputs is None:
                    np.testing.assert_array_equal(answer.as_numpy("mutual_information"), known.mutual_information)
                    assert answer.as_numpy("abstain").dtype == bool
        files = triton.InferInput("images", [2], "BYTES")
        files.set_data_from_numpy(np.array([png(one) for one in PIXELS], dtype=object))
        asked = client.infer("none", [files], parameters={"members": 2}).as_numpy("members_used")
        assert asked.tolist() == [2, 2]
        with pytest.raises(triton.InferenceServerException, match="ask from 1 to 3"):
            client.infer("none", [files], parameters={"members": 9})
        client.close()
    finally:
        server.stop(signal.SIGTERM)
