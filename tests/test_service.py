from __future__ import annotations

import base64
import io
import json
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import ExifTags, Image
from typer.testing import CliRunner

from ensembler import calibration
from ensembler.data.decoding import read_image
from ensembler.errors import CorruptError
from ensembler.serve import Runtime
from ensembler.serve.http import json_body, page
from ensembler.serve.http.options import CALIBRATED, OUTPUTS, Options
from ensembler.serve.http.routes import PROBES, PUBLIC, reads_a_body
from ensembler.serve.runtime.manifest import read_bundle
from ensembler.storage import artefact
from ensembler.storage.artefact import sha256
from tests._runs import CLASSES, TINY, make_bundle
from tests._service import (
    LIMIT,
    ROUTE,
    Server,
    TestClient,
    assert_refused,
    free_port,
    in_process,
    make_calibrated,
    tiny_images,
    unless_late,
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("service") / "bundle")


@pytest.fixture(scope="module")
def client(bundle: Path) -> Iterator[TestClient]:
    with in_process(bundle) as client:
        yield client


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
GOOD = {"images": IMAGES}
MALFORMED: dict[str, tuple[Any, str]] = {
    "no body": (b"", "the body is not JSON"),
    "half a body": (b'{"images": [[[', "the body is not JSON"),
    "not text": (b"\xff\xfe\x00\x93", "the body is not JSON"),
    "pixels, not JSON": (tiny_images(1).tobytes(), "the body is not JSON"),
    "brackets without end": (b"[" * 1000, "nested more than 16 lists deep"),
    "brackets and their end": (b'{"images": ' + b"[" * 900 + b"]" * 900 + b"}", "nested more than 16 lists deep"),
    "brackets behind strings": (b'["]"' + b', ["]"' * 900 + b"]" * 901, "nested more than 16 lists deep"),
    "brackets in one string": (b'{"images": "' + b"[" * 5000 + b'"}', "'images' is a string"),
    "brackets not so deep": (b'{"images": ' + b"[" * 9 + b"]" * 9 + b"}", "found (1, 1, 1, 1, 1, 1)"),
    "brackets behind escapes": (rb'["\\"' + rb', ["\\"' * 900 + b"]" * 901, "nested more than 16 lists deep"),
    "brackets in a string of escapes": (rb'{"images": "\"' + rb"[\\" * 5000 + b'"}', "'images' is a string"),
    "images twice": (b'{"images": [], "images": []}', 'has "images" twice'),
    "a name twice, deeper": (b'{"images": [{"b64": "AAAA", "b64": "AAAA"}]}', 'has "b64" twice'),
    "half of a character as a name": (rb'{"images": [], "\ud800": 1}', "half of a character"),
    "half of a character as a value": (rb'{"images": [], "mode": "\uDFFF"}', "half of a character"),
    "no outputs": ({"images": IMAGES, "outputs": []}, "outputs is empty: send a list of some of class"),
    "an option twice": ({"images": IMAGES, "mode": "full", "parameters": {"mode": "full"}}, '"mode" was sent twice'),
    "both names": ({"images": IMAGES, "instances": IMAGES}, "is another name of 'images'"),
    "parameters that are none": ({"images": IMAGES, "parameters": []}, "'parameters' is a list"),
    "UTF-16": (json.dumps({"images": IMAGES}).encode("utf-16"), "the body is not JSON"),
    "a huge number": (b'{"images": ' + b"9" * 9000 + b"}", "the body is not JSON"),
    "null": (None, "the body is null, not an object"),
    "a list": (IMAGES, "the body is a list, not an object"),
    "no images": ({}, "the body has no field 'images'"),
    "another field": ({"image": IMAGES}, "the body has no field 'images'"),
    "one field more": ({"images": IMAGES, "colour": 2}, 'unknown option "colour"'),
    "images null": ({"images": None}, "'images' is null"),
    "images a string": ({"images": "AAAA"}, "'images' is a string"),
    "images a number": ({"images": 3}, "'images' is a number"),
    "images an object": ({"images": {"0": IMAGES}}, "'images' is an object"),
    "images of strings": ({"images": ["A%%A"]}, "images[0] is no base64"),
    "a character of base64": ({"images": ["A"]}, "images[0] is no base64"),
    "an object of two values": ({"images": [{"b64": "AAAA", "key": "1"}]}, "images[0] is an object without base64"),
    "an empty object": ({"instances": [{}]}, "instances[0] is an object without base64"),
    "files and pixels": ({"images": ["AAAA", IMAGES[0]]}, "images[1] is a list without base64"),
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
    "an object": (with_pixel({}), "images[1][0][2][1] is an object"),
    "negative": (with_pixel(-1), "images[1][0][2][1] is -1"),
    "too large": (with_pixel(256), "images[1][0][2][1] is 256: send whole numbers from 0 to 255"),
    "far too large": (with_pixel(10**30), "images[1][0][2][1] is 1000000"),
}


@pytest.mark.parametrize(("content", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_request_is_told_why_and_harms_nobody(client: TestClient, content: Any, message: str) -> None:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    sentence = assert_refused(client.post(ROUTE, content=body, headers={"content-type": "application/json"}), 400)
    assert message in sentence
    assert "send" in sentence or "put it" in sentence or "use " in sentence
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


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/ld+json"])
def test_json_is_json_whatever_the_caller_calls_it(client: TestClient, kind: str) -> None:
    body = json.dumps({"images": IMAGES}).encode()
    assert client.post(ROUTE, content=body, headers={"content-type": kind}).status_code == 200


def test_the_limit_counts_bodies_of_no_announced_length(client: TestClient) -> None:
    answer = client.post(ROUTE, content=iter([b" " * 60_000] * 2))
    assert answer.status_code == 413
    assert f"more than {LIMIT} bytes" in answer.json()["error"]
    body = json.dumps({"images": IMAGES}).encode()
    assert client.post(ROUTE, content=iter([body[:50], body[50:]])).status_code == 200


def npy(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def test_the_binary_route_answers_as_json_does(client: TestClient) -> None:
    images = tiny_images(3)
    expected = client.post(ROUTE, json={"images": images.tolist()}).json()
    shape = {"X-Shape": "3, 4, 6, 3", "Content-Type": "application/octet-stream"}
    bodies = [npy(images), npy(images.astype(np.int64)), npy(np.asfortranarray(images))]
    answers = [client.post(ROUTE, content=body) for body in bodies]
    answers.append(client.post(ROUTE, content=images.tobytes(), headers=shape))
    for answer in answers:
        assert answer.json() == expected
    wanted = {"Accept": "application/x-npy"}
    answer = client.post(f"{ROUTE}?outputs=members", content=npy(images), headers=wanted)
    assert answer.headers["content-type"] == "application/x-npy"
    members = np.load(io.BytesIO(answer.content))
    assert members.shape == (3, 3, len(CLASSES))
    mean = np.load(io.BytesIO(client.post(ROUTE, content=npy(images), headers=wanted).content))
    np.testing.assert_allclose(mean, members.mean(axis=1), rtol=1e-6)
    assert mean.tolist() == [prediction["probabilities"] for prediction in expected["predictions"]]
    assert "ask for one of" in assert_refused(
        client.post(f"{ROUTE}?outputs=mean,disagreement", content=npy(images), headers=wanted), 400
    )
    assert "label is not an array" in assert_refused(
        client.post(f"{ROUTE}?outputs=label", content=npy(images), headers=wanted), 400
    )


def png(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def of_kind(pixels: np.ndarray, mode: str) -> Image.Image:
    """An image of a mode; half of it is transparent, where it can be."""
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    if mode == "F":
        return Image.fromarray(pixels[..., 0].astype(np.float32) / 255)
    image = Image.fromarray(pixels).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(np.where(pixels[..., 1] > 127, pixels[..., 2], 255).astype(np.uint8)))
    return image


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
        *(("PNG", mode) for mode in ("RGB", "L", "1", "P", "RGBA", "LA", "I;16")),
        *(("TIFF", mode) for mode in ("I;16", "F", "CMYK", "RGBA")),
        *(("GIF", "P"), ("WEBP", "RGBA"), ("BMP", "RGB"), ("PPM", "L")),
    ],
)
def test_images_are_decoded_as_training_decodes_them(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, mode: str
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    body = png(of_kind(pixels, mode), kind, **({"exif": turned} if kind in ("JPEG", "WEBP") else {}))
    (tmp_path / "image").write_bytes(body)
    seen = []
    predict = Runtime.predict
    monkeypatch.setattr(
        Runtime, "predict", lambda self, images, *a, **k: seen.append(images) or predict(self, images, *a, **k)
    )
    answer = client.post(ROUTE, content=body)
    assert answer.status_code == 200
    assert len(answer.json()["predictions"]) == 1
    assert np.array_equal(seen[0][0], read_image(tmp_path / "image", (4, 6)))


def test_several_images_are_a_form(client: TestClient) -> None:
    files = [("images", ("a.png", png(Image.new("RGB", (9, 9), (n * 80, 0, 0))))) for n in range(3)]
    answer = client.post(f"{ROUTE}?outputs=class,members_used&mode=exact&members=2", files=files)
    assert answer.status_code == 200
    assert [list(prediction) for prediction in answer.json()["predictions"]] == [
        ["class", "members_used", "partial"]
    ] * 3
    broken = [*files[:2], ("images", ("b.png", b"\x89PNG\r\n\x1a\n"))]
    assert "file 3 of 3" in assert_refused(client.post(ROUTE, files=broken))
    assert "4 at most" in assert_refused(client.post(ROUTE, files=files * 2), 400)
    assert "no file" in assert_refused(client.post(ROUTE, files=[], data={}, headers=FORM, content=b"--x--\r\n"), 400)
    fields = [("outputs", (None, "class,members_used")), ("mode", (None, "exact")), ("members", (None, "2"))]
    assert client.post(ROUTE, files=[*files, *fields]).json() == answer.json()
    assert "sent twice" in assert_refused(client.post(f"{ROUTE}?mode=exact", files=[*files, *fields]), 400)


PIXELS = tiny_images(1)
PNG = png(Image.fromarray(PIXELS[0]))
BASE64 = base64.b64encode(PNG).decode()
PLAIN = {"images": PIXELS.tolist()}
SHAPE = {"X-Shape": "1,4,6,3"}
SENT: dict[str, tuple[bytes, dict[str, str]]] = {
    "curl -d": (json.dumps(PLAIN).encode(), {"Content-Type": "application/x-www-form-urlencoded"}),
    "JSON of no type": (b"\n " + json.dumps(PLAIN).encode(), {}),
    "JSON with a byte order mark": (json.dumps(PLAIN).encode("utf-8-sig"), {"Content-Type": "text/plain"}),
    "fetch of a string": (json.dumps(PLAIN).encode(), {"Content-Type": "text/plain;charset=UTF-8"}),
    "problem+json": (json.dumps(PLAIN).encode(), {"Content-Type": "application/vnd.x+json"}),
    "curl --data-binary of an image": (PNG, {"Content-Type": "application/x-www-form-urlencoded"}),
    "an image of no type": (PNG, {}),
    "image/png": (PNG, {"Content-Type": "image/png"}),
    "image/jpg that is a PNG": (PNG, {"Content-Type": "image/jpg"}),
    "image/*": (PNG, {"Content-Type": "image/*"}),
    "IMAGE/WEBP": (PNG, {"Content-Type": "IMAGE/WEBP; q=1"}),
    "octets of an image": (PNG, {"Content-Type": "application/octet-stream"}),
    ".npy of no type": (npy(PIXELS), {}),
    ".npy as octets": (npy(PIXELS), {"Content-Type": "application/octet-stream"}),
    "application/x-npy": (npy(PIXELS), {"Content-Type": "application/x-npy"}),
    "pixels": (PIXELS.tobytes(), SHAPE),
    "pixels as octets": (PIXELS.tobytes(), SHAPE | {"Content-Type": "application/octet-stream"}),
    "pixels by curl": (PIXELS.tobytes(), SHAPE | {"Content-Type": "application/x-www-form-urlencoded"}),
    "a form": (
        b'--x\r\nContent-Disposition: form-data; name="i"; filename="a.png"\r\n\r\n' + PNG + b"\r\n--x--\r\n",
        {"Content-Type": "multipart/form-data; boundary=x"},
    ),
    "base64": (json.dumps({"images": [BASE64]}).encode(), {}),
    "a data URL": (json.dumps({"images": [f"data:image/png;base64,{BASE64}"]}).encode(), {}),
    "base64 in lines": (json.dumps({"images": [base64.encodebytes(PNG).decode()]}).encode(), {}),
    "base64 for URLs": (json.dumps({"images": [base64.urlsafe_b64encode(PNG).decode().rstrip("=")]}).encode(), {}),
    "TensorFlow Serving": (json.dumps({"instances": [{"b64": BASE64}]}).encode(), {}),
    "KServe": (json.dumps({"instances": [{"image": {"b64": BASE64}}]}).encode(), {}),
    "Vertex AI": (json.dumps({"instances": [{"content": BASE64}], "parameters": {}}).encode(), {}),
    "instances of pixels": (json.dumps({"instances": PIXELS.tolist(), "parameters": None}).encode(), {}),
}


@pytest.mark.parametrize(("body", "headers"), SENT.values(), ids=SENT)
def test_one_route_reads_whatever_a_client_sends(client: TestClient, body: bytes, headers: dict[str, str]) -> None:
    answer = client.post(ROUTE, content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.json() == client.post(ROUTE, json=PLAIN).json()


def test_options_are_read_alike_wherever_they_are_sent(client: TestClient) -> None:
    chosen = {"mode": "exact", "members": 2, "outputs": ["class", "members_used"]}
    known = client.post(ROUTE, json=PLAIN | chosen).json()
    query = f"{ROUTE}?mode=exact&members=2&outputs=class,members_used"
    for body, headers in SENT.values():
        assert client.post(query, content=body, headers=headers).json() == known
    assert client.post(ROUTE, json={"instances": PIXELS.tolist(), "parameters": chosen}).json() == known
    for twice in ({"mode": "exact"}, {"parameters": {"mode": "exact"}}):
        assert '"mode" was sent twice' in assert_refused(client.post(query, json=PLAIN | twice), 400)


def test_what_a_body_is_not_is_told(client: TestClient) -> None:
    assert "X-Shape is of raw pixels" in assert_refused(
        client.post(ROUTE, content=PNG, headers=SHAPE | {"Content-Type": "image/png"}), 400
    )
    answer = client.post(ROUTE, content=PIXELS.tobytes())
    assert "raw pixels need their X-Shape" in assert_refused(answer, 415)
    assert "the body is empty" in assert_refused(client.post(ROUTE, content=b" \n"), 400)
    assert "file 2 of 2" in assert_refused(client.post(ROUTE, json={"images": [BASE64, "AAAA"]}), 415)
    assert "5 images are more than 4" in assert_refused(client.post(ROUTE, json={"images": [BASE64] * 5}), 400)
    twice = [("X-Shape", "1,4,6,3"), ("X-Shape", "1,4,6,3")]
    assert "X-Shape was sent twice" in assert_refused(client.post(ROUTE, content=PIXELS.tobytes(), headers=twice), 400)
    long = {"X-Long": "a" * 70_000}
    for answer in (client.post(ROUTE, json=PLAIN, headers=long), client.get("/livez", headers=long)):
        assert "more than 65536" in assert_refused(answer, 431)


def test_json_is_bounded_before_it_is_parsed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"ENSEMBLER_MAX_JSON": "50000", "ENSEMBLER_MAX_BODY": "1000000"}
    with in_process(bundle, **limits) as client:
        assert client.post(ROUTE, json=PLAIN).status_code == 200
        bodies = {
            "more than 50000: send fewer images": b" " * 50_001,
            "lists and objects": b'{"images": [' + b"[]," * 10_000 + b"[]]}",
            "names of values": b'{"images": [], ' + b'"a":1,' * 5000 + b'"a": 1}',
            "lists deep": b"[" * 1000 + b"]" * 1000,
        }
        monkeypatch.setattr(json_body, "json", None)  # parsing would be a 500
        for message, body in bodies.items():
            answer = client.post(ROUTE, content=body, headers={"Content-Type": "application/json"})
            assert message in assert_refused(answer, 400 if "deep" in message else 413)


FORM = {"Content-Type": "multipart/form-data; boundary=x"}


def test_the_caller_chooses(client: TestClient, bundle: Path) -> None:
    images = tiny_images(4)
    runtime = Runtime.load(bundle)
    members = runtime.predict_members(images)

    def ask(**options: Any) -> list[dict[str, Any]]:
        answer = client.post(ROUTE, json={"images": images.tolist(), **options})
        assert answer.status_code == 200, answer.text
        predictions: list[dict[str, Any]] = answer.json()["predictions"]
        return predictions

    chosen = ask(outputs=["mean", "members", "mutual_information"])
    assert [list(prediction) for prediction in chosen] == [["mean", "members", "mutual_information"]] * 4
    np.testing.assert_allclose([prediction["mean"] for prediction in chosen], members.mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(
        np.array([prediction["members"] for prediction in chosen], np.float32).swapaxes(0, 1), members
    )
    for two in ask(members=2, outputs=["members", "members_used", "class"]):
        assert (two["members_used"], len(two["members"]), two["partial"]) == (2, 2, True)
    exact = ask(mode="exact", outputs=["class", "members", "members_used"])
    assert [prediction["class"] for prediction in exact] == members.mean(axis=0).argmax(axis=-1).tolist()
    for prediction in exact:
        assert prediction["partial"] == (prediction["members_used"] < 3)
        assert len(prediction["members"]) == prediction["members_used"]
    assert all(1 <= prediction["members_used"] <= 3 for prediction in ask(mode="confidence", level=0.5))
    everything = {"outputs": None, "mode": None, "members": None, "level": None, "alpha": None}
    assert ask(**everything) == ask()


REFUSED_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown mode": ({"mode": "half"}, 'mode is "half": use one of full, exact, confidence'),
    "a mode that is a list": ({"mode": ["full"]}, "mode is a list: use one of"),
    "too many members": ({"members": 4}, "members is 4: ask from 1 to 3"),
    "far too many members": ({"members": 10**30}, "ask from 1 to 3"),
    "no members": ({"members": 0}, "members is 0: it must be a whole number from 1 up"),
    "members that are true": ({"members": True}, "members is true: it must be a whole number"),
    "half a member": ({"members": 1.5}, "members is 1.5: it must be a whole number"),
    "a level of 1": ({"level": 1}, "level is 1: it must lie between 0 and 1"),
    "a level that is true": ({"level": True}, "level is true: it must lie between 0 and 1"),
    "a level that is no number": ({"level": float("nan")}, "level is NaN: it must lie between 0 and 1"),
    "an unknown output": ({"outputs": ["class", "colour"]}, 'outputs[1] is "colour": use one of class, label'),
    "an output that is a number": ({"outputs": [3]}, "outputs[0] is 3: use one of"),
    "outputs without any": ({"outputs": []}, "outputs is empty: send a list of some of class"),
    "outputs that are a string": ({"outputs": "class"}, 'outputs is "class": send a list'),
    "deep outputs": ({"outputs": json.loads("[" * 8 + "]" * 8)}, "outputs[0] is a list: use one of"),
    "abstention without a calibration": ({"outputs": ["abstain"]}, "has no calibration, which abstain needs"),
    "sets without a calibration": ({"outputs": ["prediction_set"]}, "has no calibration"),
    "an alpha without a calibration": ({"alpha": 0.1}, "has no calibration"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED_OPTIONS.values(), ids=REFUSED_OPTIONS)
def test_a_choice_that_cannot_be_honoured(client: TestClient, options: dict[str, Any], message: str) -> None:
    body = json.dumps({"images": IMAGES, **options})
    assert message in assert_refused(client.post(ROUTE, content=body), 400)


def test_a_calibrated_bundle_answers_with_calibrated_uncertainty(tmp_path: Path) -> None:
    bundle = make_calibrated(tmp_path / "calibrated")
    fitted = Runtime.load(bundle).calibration
    assert fitted is not None and fitted.abstention is not None
    images = tiny_images(4)
    with in_process(bundle) as client:

        def ask(**options: Any) -> Any:
            return client.post(ROUTE, json={"images": images.tolist(), **options})

        answer = ask().json()
        pooled = np.array([prediction["probabilities"] for prediction in answer["predictions"]])
        expected = calibration.apply(fitted, pooled)
        sets = calibration.prediction_sets(fitted, pooled)
        for prediction, calibrated, members in zip(answer["predictions"], expected, sets, strict=True):
            assert prediction["calibrated"] == calibrated.tolist()
            assert prediction["prediction_set"] == [CLASSES[index] for index in np.flatnonzero(members)]
        assert [prediction["abstain"] for prediction in answer["predictions"]] == calibration.abstain(
            fitted, pooled
        ).tolist()
        assert answer["alpha"] == fitted.conformal.alpha
        assert answer["calibration_id"] == sha256(bundle / "calibration.json")
        narrow, wide = (ask(outputs=["prediction_set"], alpha=alpha).json()["predictions"] for alpha in (0.6, 0.01))
        assert sum(len(row["prediction_set"]) for row in narrow) < sum(len(row["prediction_set"]) for row in wide)
        assert "calibrated" not in ask(mode="exact").json()["predictions"][0]
        assert "of all members together" in assert_refused(ask(mode="exact", outputs=["abstain"]), 400)
        assert "of all members together" in assert_refused(ask(members=1, alpha=0.1), 400)
        assert "between 0 and 1" in assert_refused(ask(alpha=1.0), 400)
        assert "add it to outputs" in assert_refused(ask(alpha=0.1, outputs=["class"]), 400)
        card = client.get("/metadata").json()
        assert card["calibration"]["id"] == answer["calibration_id"]
        assert {"calibrated", "abstain", "prediction_set"} <= set(card["outputs"])


def test_a_calibration_without_a_risk_cannot_abstain(tmp_path: Path) -> None:
    with in_process(make_calibrated(tmp_path / "calibrated", risk=None)) as client:
        prediction = client.post(ROUTE, json={"images": IMAGES}).json()["predictions"][0]
        assert "prediction_set" in prediction and "abstain" not in prediction
        answer = client.post(ROUTE, json={"images": IMAGES, "outputs": ["abstain"]})
        assert "calibrate the run with --risk" in assert_refused(answer, 400)


def test_the_model_card_says_what_answers(client: TestClient, bundle: Path) -> None:
    card = client.get("/metadata").json()
    assert card["bundle"] == sha256(bundle / "manifest.json")
    assert card["manifest"]["classes"] == CLASSES
    assert card["manifest"]["files"]["member-000.onnx"] == sha256(bundle / "member-000.onnx")
    assert card["inference"]["forward_passes_per_image"] == 3
    assert card["settings"]["max_batch"] == 4
    assert card["calibration"] is None and "abstain" not in card["outputs"]
    assert str(bundle.parent) not in json.dumps(card)


def test_the_service_describes_its_routes(client: TestClient) -> None:
    described = client.get("/docs.json").json()
    for path, operations in described["paths"].items():
        for method in operations:
            assert client.request(method, path.replace("{name}", "none")).status_code not in (404, 405, 500)
    answer = client.post(ROUTE, json={"images": IMAGES}).json()
    fields = described["components"]["schemas"]["ImagePrediction"]["properties"]
    assert set(answer["predictions"][0]) <= set(fields)
    assert set(answer) <= set(described["components"]["schemas"]["Answer"]["properties"])
    assert tuple(output for output in OUTPUTS if output in fields) == OUTPUTS


@pytest.mark.parametrize("token", ["", "sesame"])
def test_docs_json_is_valid_openapi_3_1(bundle: Path, token: str) -> None:
    from openapi_spec_validator import OpenAPIV31SpecValidator

    with in_process(bundle, ENSEMBLER_TOKEN=token) as client:
        described = client.get("/docs.json", headers={"Authorization": f"Bearer {token}"}).json()
    assert described["openapi"] == "3.1.0"
    OpenAPIV31SpecValidator(described).validate()
    for path, operations in described["paths"].items():
        for operation in operations.values():
            needed = bool(token) and path not in PUBLIC
            assert operation["security"] == ([{"token": []}] if needed else [])
            assert ("401" in operation["responses"]) == needed
    assert {*PROBES, "/ui"} <= described["paths"].keys()


def test_docs_json_describes_what_is_sent_and_answered(client: TestClient) -> None:
    from jsonschema import Draft202012Validator, ValidationError

    described = client.get("/docs.json").json()

    def check(schema: dict[str, Any], value: Any) -> None:
        Draft202012Validator(schema | {"components": described["components"]}).validate(value)

    operation = described["paths"][ROUTE]["post"]
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    answer = operation["responses"]["200"]["content"]["application/json"]["schema"]
    error = operation["responses"]["400"]["content"]["application/json"]["schema"]
    for options in (
        {},
        {"outputs": ["class", "members"]},
        {"mode": "exact", "members": 2},
        dict.fromkeys(Options.model_fields),
    ):
        check(body, GOOD | options)
        check(answer, client.post(ROUTE, json=GOOD | options).json())
    of_the_bundle = ("ask from 1 to 3", "calibration", "NaN")  # JSON has no NaN
    for options, message in REFUSED_OPTIONS.values():
        if any(words in message for words in of_the_bundle):
            continue
        with pytest.raises(ValidationError):
            check(body, GOOD | options)
        check(error, client.post(ROUTE, content=json.dumps(GOOD | options)).json())


def test_one_record_holds_every_option(client: TestClient) -> None:
    """What the documentation and the service's description list is what the record reads."""
    described = client.get("/docs.json").json()["paths"]
    schema = described[ROUTE]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert list(schema["properties"]) == ["images", "instances", "parameters", *Options.model_fields]
    assert list(schema["properties"]["parameters"]["properties"]) == list(Options.model_fields)
    query = [parameter for parameter in described[ROUTE]["post"]["parameters"] if parameter["in"] == "query"]
    assert [parameter["name"] for parameter in query] == list(Options.model_fields)
    assert all(parameter["schema"]["description"] for parameter in query)
    text = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
    section = text.split("### Options")[1].split("###")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(Options.model_fields)
    fields = text.split("### The answer")[1].split("###")[0]
    told = {name for row in re.findall(r"^\| (`.*?`) \|", fields, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert set(OUTPUTS) - {"mean"} <= told


SAME = [
    *({}, {"mode": "full"}, {"level": 0.9}, {"members": 3}, {"mode": "full", "members": 3, "level": 0.5}),
    *({"mode": "confidence"}, {"mode": "confidence", "level": 0.5}),  # asks three members first
]


def test_early_exit_is_asking_all_where_all_are_asked_first() -> None:
    def computation(**options: Any) -> Any:
        return Options.read(options).resolve(8, None).computation()

    assert computation(mode="exact", members=1) == computation(mode="confidence", members=1) == computation(members=1)
    assert computation(mode="exact", members=2) == computation(members=2)
    assert computation(mode="exact", members=3) != computation(members=3)
    assert computation(mode="confidence", members=4) != computation(members=4)


def test_a_calibration_is_applied_and_its_scores_are_sorted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied, sorted_sizes = [], []
    apply, sort = calibration.apply, np.sort
    monkeypatch.setattr(calibration, "apply", lambda *a: applied.append(len(a[1])) or apply(*a))
    monkeypatch.setattr(calibration.np, "sort", lambda *a, **k: sorted_sizes.append(len(a[0])) or sort(*a, **k))
    with in_process(make_calibrated(tmp_path / "calibrated")) as client:
        applied.clear()
        sorted_sizes.clear()
        for _ in range(5):
            answer = client.post(ROUTE, json=GOOD).json()
            assert {"calibrated", "prediction_set", "abstain"} <= answer["predictions"][0].keys()
        assert applied == [1] * 5
        held_out = client.app.state.predictor.runtime.calibration.held_out  # type: ignore[attr-defined]
        assert sorted_sizes.count(held_out) <= 2  # of each method, once
        client.post(ROUTE, json=GOOD | {"outputs": ["class"]})
        assert applied == [1] * 5


def test_requests_that_ask_alike_share_a_pass(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """However they say it: the level is of the mode confidence alone, and three members are all there are."""
    begun, go = threading.Event(), threading.Event()
    passes: list[int] = []
    predict = Runtime.predict

    def held(self: Runtime, images: Any, *options: Any, **more: Any) -> Any:
        passes.append(len(images))
        begun.set()
        assert go.wait(300)
        return predict(self, images, *options, **more)

    monkeypatch.setattr(Runtime, "predict", held)
    with ThreadPoolExecutor(1 + len(SAME)) as pool:
        first = pool.submit(client.post, ROUTE, json=GOOD)
        assert begun.wait(300)
        answers = [pool.submit(client.post, ROUTE, json=GOOD | options) for options in SAME]
        predictor = client.app.state.predictor  # type: ignore[attr-defined]
        deadline = time.monotonic() + 300
        while predictor._batcher.waiting < len(SAME) and time.monotonic() < deadline:
            time.sleep(0.01)
        go.set()
        assert first.result().headers["x-batch-size"] == "1"
        assert [answer.result().headers["x-batch-size"] for answer in answers] == [str(len(SAME))] * len(SAME)
    assert passes == [1, len(SAME)]


@pytest.mark.parametrize("query", ["outputs=label", "outputs=mean,class", "outputs=mutual_information&members=1"])
def test_npy_that_cannot_be_is_refused_before_the_prediction(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, query: str
) -> None:
    monkeypatch.setattr(Runtime, "predict", lambda *arguments, **named: pytest.fail("it was predicted"))
    answer = client.post(f"{ROUTE}?{query}", content=npy(tiny_images(1)), headers={"Accept": "application/x-npy"})
    assert "ask for" in assert_refused(answer, 400)


@pytest.mark.parametrize("output", [output for output in OUTPUTS if output not in ("label", *CALIBRATED)])
def test_every_other_output_is_an_array(client: TestClient, output: str) -> None:
    url = f"{ROUTE}?outputs={output}"
    answer = client.post(url, content=npy(tiny_images(2)), headers={"Accept": "application/x-npy"})
    expected = client.post(url, content=npy(tiny_images(2))).json()["predictions"]
    np.testing.assert_allclose(np.load(io.BytesIO(answer.content)), [one[output] for one in expected])


def test_an_answer_tells_its_batch_and_its_stages(client: TestClient) -> None:
    headers = client.post(ROUTE, json={"images": tiny_images(3).tolist()}).headers
    assert headers["x-batch-size"] == "3"
    assert [stage.split(";")[0] for stage in headers["server-timing"].split(", ")] == [
        "read",
        "queue",
        "predict",
        "write",
    ]


@pytest.mark.parametrize("text", ["", "-1", "1.5", "soon", "9" * 30, "\u0663"])
def test_a_deadline_is_a_number(client: TestClient, text: str) -> None:
    headers = {"X-Deadline-Ms": text.encode()}
    assert "X-Deadline-Ms must be" in assert_refused(client.post(ROUTE, json={"images": IMAGES}, headers=headers), 400)


def test_a_deadline_is_kept(client: TestClient) -> None:
    answer = client.post(ROUTE, json={"images": IMAGES}, headers={"X-Deadline-Ms": "0"})
    assert answer.status_code == 504
    assert "allow more time" in answer.json()["error"]
    assert client.post(ROUTE, json={"images": IMAGES}, headers={"X-Deadline-Ms": "600000"}).status_code == 200


def test_a_browser_lands_on_the_page(client: TestClient) -> None:
    answer = client.get("/", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (307, "/ui")


def test_health(client: TestClient) -> None:
    for path in ("/livez", "/readyz", "/healthz"):
        assert client.get(path).status_code == 200
    assert client.get("/nowhere").status_code == 404


def test_every_route_answers_head_and_options_and_says_what_it_allows(client: TestClient) -> None:
    described = client.get("/docs.json").json()["paths"]
    for path in sorted({route.replace("{name}", "none") for route in described} | {"/"}):
        method = "POST" if reads_a_body(path) else "GET"
        answer = client.options(path)
        assert (answer.status_code, answer.content) == (204, b"")
        assert set(answer.headers["allow"].split(", ")) == {method, "HEAD", "OPTIONS"}
        answer = client.head(path, follow_redirects=False)
        assert answer.status_code < 400 and answer.content == b""
        for other in {"GET", "POST", "PUT", "DELETE", "PATCH", "TRACE"} - {method}:
            answer = client.request(other, path)
            assert (answer.status_code, list(answer.json())) == (405, ["error"])
            assert set(answer.headers["allow"].split(", ")) == {method, "HEAD", "OPTIONS"}


def test_not_ready_before_every_session_has_run(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runtime, "warm_up", lambda *_: None)
    with in_process(bundle) as client:
        assert client.get("/readyz").status_code == 503
        assert client.get("/livez").status_code == 200


def test_a_long_prediction_holds_up_nobody_else(
    client: TestClient, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, others_were_served = threading.Event(), threading.Event()
    predict = Runtime.predict

    def long(self: Runtime, images: Any, *options: Any, **more: Any) -> Any:
        started.set()
        assert others_were_served.wait(300)
        return predict(self, images, *options, **more)

    monkeypatch.setattr(Runtime, "predict", long)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(client.post, ROUTE, json={"images": IMAGES})
        assert started.wait(300)
        assert client.get("/livez").status_code == 200
        assert client.post(ROUTE, json={"images": []}).status_code == 400
        others_were_served.set()
        assert slow.result().status_code == 200


def test_one_member_answers_null(tmp_path: Path) -> None:
    with in_process(make_bundle(tmp_path / "single", members=1)) as client:
        answer = client.post(ROUTE, json={"images": IMAGES}).json()
        (prediction,) = answer["predictions"]
        assert (prediction["mutual_information"], prediction["disagreement"]) == (None, None)
        assert (answer["model"]["members"], prediction["members_used"]) == (1, 1)


def test_the_command_refuses_before_bentoml_starts(bundle: Path, tmp_path: Path) -> None:
    from ensembler.cli import app

    def refused(*arguments: str, code: int = 2, **environment: str) -> str:
        result = CliRunner().invoke(app, ["serve", *arguments], env=environment)
        assert result.exit_code == code
        assert len(result.output.splitlines()) == 1 and result.output.startswith("error: ")
        return result.output

    damaged = make_bundle(tmp_path / "damaged")
    (damaged / "member-001.onnx").write_bytes(b"")
    assert "member-001.onnx has changed" in refused(str(damaged), code=1)
    assert "no bundle at" in refused(str(tmp_path / "nothing"), code=1)
    assert "--host must be an IP address" in refused(str(bundle), "--host", "example.org")
    assert "--cors-origin must be * or origins" in refused(str(bundle), "--cors-origin", "example.org")
    sample = ["--log-answers", str(tmp_path / "log"), "--log-sample", "0"]
    assert "--log-sample must be above 0" in refused(str(bundle), *sample)
    assert "give both" in refused(str(bundle), *sample[2:])
    assert not (tmp_path / "log").exists()
    assert "--workers must be at least 1, not 0" in refused(str(bundle), "--workers", "0")
    assert "--port must be 1 to 65535, not 65536" in refused(str(bundle), "--port", "65536")
    assert "the bundle holds 3 members and no vertices to make 9 of" in refused(str(bundle), "--members", "9")
    for name, value, said in (("MEMBERS", "9", "holds 3 members"), ("USE_TF32", "true", "not compared in TF32")):
        assert said in refused(str(bundle), **{f"ENSEMBLER_{name}": value})
    assert "there is no GPU 99" in refused(str(bundle), ENSEMBLER_DEVICE_ID="99")
    assert "ENSEMBLER_MAX_BATCH must be a whole number from 1 up" in refused(str(bundle), ENSEMBLER_MAX_BATCH="0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "choose another --port" in refused(str(bundle), "--port", str(taken.getsockname()[1]))


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real server of two workers; it leaves nothing behind."""
    command = [sys.executable, "-m", "ensembler.cli", "serve", str(bundle), "--workers", "2"]
    server = Server(command, tmp_path_factory.mktemp("server"), free_port(), ENSEMBLER_MAX_BATCH="8")
    try:
        server.wait_until_ready(workers=2)
        yield server
    finally:
        server.stop(signal.SIGTERM)


def test_a_real_server_serves(server: Server) -> None:
    images = tiny_images(3)
    plain = server.post(ROUTE, json={"images": images.tolist()})
    assert plain.status_code == 200
    assert len(plain.json()["predictions"]) == 3
    with ThreadPoolExecutor(8) as pool:
        bodies = [{"images": tiny_images(1 + n % 10).tolist()} for n in range(40)]
        answers = list(pool.map(lambda body: server.post(ROUTE, json=body), bodies))
    for body, answer in zip(bodies, answers, strict=True):
        assert answer.status_code == (200 if len(body["images"]) <= 8 else 400)
        assert answer.status_code == 400 or len(answer.json()["predictions"]) == len(body["images"])
    assert server.get("/livez").status_code == 200
    assert "predictive-uncertainty" in server.get("/metrics").text
    log = server.log.read_text()
    assert "Traceback" not in log
    assert set(re.findall(r"http://[^\s/]+", log)) == {server.url}  # no address at which nothing is answered


def test_bentoml_itself_starts_the_service_from_any_folder(bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bentoml", "serve", "ensembler.serve.service:PredictiveUncertainty"]
    server = Server(command, tmp_path, free_port(), ENSEMBLER_BUNDLE=str(bundle), ENSEMBLER_WORKERS="2")
    try:
        server.wait_until_ready(workers=2)
        assert server.post(ROUTE, json={"images": IMAGES}).status_code == 200
        unless_late(5, lambda: assert_shared(server))
    finally:
        server.stop(signal.SIGINT)


def assert_shared(server: Server) -> None:
    """Connections go to the workers once their heads have arrived, to each as many."""
    address = server.url.removeprefix("http://").split(":")
    with ExitStack() as stack:
        connect = partial(socket.create_connection, (address[0], int(address[1])), timeout=600)
        halves = [stack.enter_context(connect()) for _ in range(60)]
        for half in halves:
            half.sendall(b"GET /metadata HTTP/1.1\r\nHost: x\r\n")
        assert server.get("/readyz").headers["connection"] == "close"  # the front's
        assert not server.shares()
        for half in halves[:40]:
            half.sendall(b"\r\n")
            assert half.recv(100).startswith(b"HTTP/1.1 200 ")
        assert server.shares() == [20, 20]


def test_what_was_accepted_before_sigterm_is_answered(bundle: Path, tmp_path: Path) -> None:
    limits = {"MAX_BATCH": 8_000, "MAX_QUEUE": 10**6, "RUN_BATCH": 16, "DEADLINE_MS": 600_000}
    environment = {f"ENSEMBLER_{name}": str(value) for name, value in limits.items()}
    server = Server([sys.executable, "-m", "ensembler.cli", "serve", str(bundle)], tmp_path, free_port(), **environment)
    batch = np.zeros((8_000, *TINY), np.uint8)
    headers = {"X-Shape": "8000,4,6,3", "Accept": "application/x-npy", "Content-Type": "application/octet-stream"}
    stopped = threading.Event()
    small: list[tuple[bool, object]] = []

    def ask(_: int) -> httpx.Response:
        return server.post(ROUTE, content=batch.tobytes(), headers=headers)

    def waiting() -> float:
        """Images in the server's queue."""
        metrics = server.get("/metrics").text
        found = re.search(r"^ensembler_waiting_images\S* (\S+)$", metrics, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def keep_asking() -> None:
        with httpx.Client(base_url=server.url, timeout=600) as caller:
            while True:
                after = stopped.is_set()
                try:
                    small.append((after, caller.post(ROUTE, json={"images": IMAGES}).status_code))
                except httpx.TransportError as error:
                    small.append((after, error))
                    return

    try:
        server.wait_until_ready()
        with ThreadPoolExecutor(4) as pool:
            others = pool.submit(keep_asking)
            large: list[Future[httpx.Response]] = []
            while waiting() < 16_000:  # all three are there: the first is being predicted, two wait
                if any(answer.done() for answer in large) or not large:  # it was too quick: once more
                    wait(large)
                    large = [pool.submit(ask, n) for n in range(3)]
                time.sleep(0.01)
            pending = sum(not answer.done() for answer in large)
            stopped.set()
            try:
                server.stop(signal.SIGTERM)
            finally:
                server.process.kill()
            assert pending, [answer.result().text for answer in large]  # else this test would show nothing
            for answer in large:
                assert answer.result().status_code == 200
                assert np.load(io.BytesIO(answer.result().content)).shape == (8_000, len(CLASSES))
            others.result(600)
        # The connection that the stopping server closes is the only one that a caller loses, and after SIGTERM; until
        # it has ended, whoever comes is told to come again.
        assert {status for after, status in small[:-1] if not after} == {200}
        assert {status for _, status in small[:-1]} <= {200, 503}
        assert isinstance(small[-1][1], httpx.TransportError)
    finally:
        server.process.kill()


def test_a_killed_worker_comes_back_while_the_other_serves_on(server: Server) -> None:
    def workers() -> list[int]:
        alive = [process for process in server.family() if process.status() != psutil.STATUS_ZOMBIE]
        return [process.pid for process in alive if "--worker-id" in process.cmdline()]

    def answered() -> bool:
        try:
            return server.post(ROUTE, json={"images": IMAGES}).status_code == 200
        except httpx.TransportError:
            return False

    before = workers()
    assert len(before) == 2
    killed = psutil.Process(before[0])
    killed.kill()
    killed.wait(300)
    assert all(answered() for _ in range(20))
    deadline = time.monotonic() + 300
    while len(now := workers()) < 2 and time.monotonic() < deadline:
        assert answered()
        time.sleep(0.2)
    assert len(set(now) - set(before)) == 1
    assert all(answered() for _ in range(20))


def test_the_pages_examples_are_those_of_the_seal(bundle: Path, tmp_path: Path) -> None:
    manifest = read_bundle(bundle).model_dump(exclude={"files"})
    held = tmp_path / "held"
    with artefact.write(held, manifest) as folder:
        for file in bundle.iterdir():
            if not file.name.startswith("manifest"):
                shutil.copy(file, folder)
        np.save(folder / "examples.npy", tiny_images(2))

    def shown(client: TestClient) -> list[str]:
        return [example["name"] for example in client.get("/examples").json()["examples"]]

    known = read_bundle(held)
    with in_process(held) as client:
        assert len(shown(client)) == 3
        before = client.get("/examples").json()
        np.save(held / "examples.npy", tiny_images(3)[:2])  # while it serves
        assert client.get("/examples").json() == before
    with pytest.raises(CorruptError, match=r"examples\.npy of the bundle has changed"):
        page.examples(held, known)
    shutil.copy(held / "examples.npy", shutil.copytree(bundle, tmp_path / "beside"))  # that no manifest lists
    with in_process(tmp_path / "beside") as client:
        assert len(shown(client)) == 1
