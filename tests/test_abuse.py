"""Malformed requests, made by hand and by the hundred: each is told why, none breaks anything, none harms another."""

from __future__ import annotations

import base64
import io
import json
import pickle
import signal
import socket
import struct
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from ensembler.serve.http.bodies import TYPES, MediaTypeError
from ensembler.serve.http.json_body import Limits, TooLargeError, parse
from ensembler.serve.http.options import OUTPUTS
from ensembler.serve.http.readers import image_from_file
from tests._runs import TINY, make_bundle
from tests._service import (
    ROUTE,
    Server,
    TestClient,
    assert_refused,
    free_port,
    in_process,
    tiny_images,
)

many = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

GOOD = {"images": tiny_images(1).tolist()}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with in_process(make_bundle(tmp_path_factory.mktemp("abuse") / "bundle"), ENSEMBLER_MAX_PIXELS="10000") as client:
        yield client


@pytest.fixture(autouse=True)
def _good_requests_are_unharmed(client: TestClient) -> Iterator[None]:
    before = client.post(ROUTE, json=GOOD)
    yield
    after = client.post(ROUTE, json=GOOD)
    assert before.status_code == after.status_code == 200
    assert after.json() == before.json()


class Exploit:
    """Unpickling it would say so."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was loaded",)


def npy(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def npy_header(shape: str, descr: str = "|u1", order: bool = False, pixels: bytes = b"") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + pixels


def archive(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, array)
    return file.getvalue()


def zip_bomb() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("images.npy", bytes(10**7))
    return file.getvalue()


PIXELS = tiny_images(1).tobytes()
BAD_BINARY: dict[str, tuple[bytes, int]] = {
    "nothing": (b"", 400),
    "noise": (np.random.default_rng(0).bytes(500), 400),
    "raw bytes of no shape": (PIXELS, 400),
    "a pickle": (pickle.dumps(Exploit()), 415),
    "an old pickle": (pickle.dumps(Exploit(), protocol=0), 400),
    "an array of objects": (npy(np.array([Exploit()], dtype=object), allow_pickle=True), 415),
    "an array of records with objects": (npy(np.zeros(1, [("a", object)]), allow_pickle=True), 415),
    "an archive": (archive(tiny_images(1)), 415),
    "a zip bomb": (zip_bomb(), 415),
    "only the magic": (b"\x93NUMPY", 400),
    "a version to come": (b"\x93NUMPY\x09\x00" + b"x" * 100, 400),
    "version 3": (b"\x93NUMPY\x03\x00" + npy(tiny_images(1))[8:], 400),
    "half a header": (npy(tiny_images(1))[:40], 400),
    "a header that lies about its length": (b"\x93NUMPY\x01\x00\xff\xff{'descr'", 400),
    "a header of 60 kB": (npy_header(f"({'1,' * 30_000})"), 400),
    "a header that calls": (npy_header("__import__('os').system('x')"), 400),
    "a header of a deep shape": (npy_header("(" * 3000 + ")" * 3000), 400),
    "a header without end": (npy_header("(1, 4, 6, 3"), 400),
    "half the pixels": (npy(tiny_images(2))[:-72], 400),
    "pixels too many": (npy(tiny_images(1)) + b"x", 400),
    "10^9 elements": (npy_header("(1000000000,)"), 400),
    "10^30 elements": (npy_header("(10**15, 10**15)"), 400),
    "10^36 elements": (npy_header(f"({10**18}, {10**18})"), 400),
    "a negative shape": (npy_header("(-1, -4, 6, 3)", pixels=PIXELS), 400),
    "a shape of -1": (npy_header("(-1, 4, 6, 3)", pixels=PIXELS), 400),
    "half an image": (npy_header("(0.5, 4, 6, 3)", pixels=PIXELS), 400),
    "a single number": (npy(np.uint8(3)), 400),
    "a single image": (npy(tiny_images(1)[0]), 400),
    "no images": (npy(tiny_images(1)[:0]), 400),
    "images of no size": (npy(np.zeros((1, 0, 6, 3), np.uint8)), 400),
    **{f"{n} dimensions": (npy_header(f"({'1,' * n})", pixels=b"x"), 400) for n in (40, 64, 65, 400)},
    "one image, as true": (npy_header("(True, 4, 6, 3)", pixels=PIXELS), 400),
    "a number with an underscore": (npy_header("(1_0, 4, 6, 3)", pixels=PIXELS * 10), 400),
    "a number in base 16": (npy_header("(0x1, 4, 6, 3)", pixels=PIXELS), 400),
    "a shape twice": (npy_header("(2, 4, 6, 3), 'shape': (1, 4, 6, 3)", pixels=PIXELS), 400),
    "another shape": (npy(np.zeros((2, 6, 4, 3), np.uint8)), 400),
    "too many images": (npy(tiny_images(5)), 400),
    "floats": (npy(tiny_images(1).astype(np.float32)), 400),
    "not a number": (npy(np.full((1, *TINY), np.nan)), 400),
    "booleans": (npy(np.zeros((1, *TINY), bool)), 400),
    "complex numbers": (npy(np.zeros((1, *TINY), complex)), 400),
    "text": (npy(np.full((1, *TINY), "a")), 400),
    "dates": (npy(np.zeros((1, *TINY), "datetime64[s]")), 400),
    "records": (npy(np.zeros((1, *TINY), [("a", "u1")])), 400),
    "nothing at all, 4 by 6": (npy_header("(1, 4, 6, 3)", descr="|V0"), 400),
    "negative pixels": (npy(tiny_images(1).astype(np.int16) - 300), 400),
    "pixels too large": (npy(tiny_images(1).astype(np.uint64) + 2**60), 400),
}


NPY = {"Content-Type": "application/x-npy"}


@pytest.mark.parametrize(("body", "status"), BAD_BINARY.values(), ids=BAD_BINARY)
def test_bad_arrays(client: TestClient, body: bytes, status: int) -> None:
    assert_refused(client.post(ROUTE, content=body, headers=NPY), status)
    assert_refused(client.post(ROUTE, content=body), 400, 415)


SHAPES = [
    "",
    ",",
    "1",
    "1,4,6",
    "1,4,6,3,",
    "-1,4,6,3",
    "1e0,4,6,3",
    "1,4,6,3.0",
    "0,4,6,3",
    "2,4,6,3",
    "1,6,4,3",
    "72",
]
SHAPES += [
    "1,1,1,1,1,1,1,1,72",
    "999999999,999999999,999999999,999999999",
    "1" * 5000,
    "(1,4,6,3)",
    "1;4;6;3",
    "\u0661,4,6,3",
]


@pytest.mark.parametrize("shape", SHAPES)
def test_bad_shapes(client: TestClient, shape: str) -> None:
    assert_refused(client.post(ROUTE, content=PIXELS, headers={"X-Shape": shape.encode()}), 400)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks)


def in_base64(*files: bytes) -> bytes:
    return json.dumps({"images": [base64.b64encode(file).decode() for file in files]}).encode()


END = chunk(b"IEND", b"")
FINE = Image.new("RGB", (9, 7), (10, 200, 30))
BAD_IMAGES: dict[str, tuple[bytes, int]] = {
    "nothing": (b"", 415),
    "noise": (np.random.default_rng(0).bytes(500), 415),
    "a pickle": (pickle.dumps(Exploit()), 415),
    "an archive": (archive(tiny_images(1)), 415),
    "a page": (b"<html><img src='file:///etc/passwd'></html>", 415),
    "an address": (b"http://localhost/image.png", 415),
    "a drawing": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415),
    "a program that draws": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", 415),
    **{f"a {kind}": (encoded(FINE, kind), 415) for kind in ("ICO", "TGA", "PCX", "SGI", "JPEG2000")},
    **{
        f"half a {kind}": (encoded(Image.effect_noise((60, 60), 50), kind)[:1800], 400)
        for kind in ("GIF", "BMP", "TIFF")
    },
    "only the signature": (b"\x89PNG\r\n\x1a\n", 415),
    "only the header": (png_of(9, 7), 415),
    "a header and the end": (png_of(9, 7, END), 400),
    "half a PNG": (encoded(Image.effect_noise((60, 60), 50))[:900], 400),
    "half a JPEG": (encoded(Image.effect_noise((60, 60), 50), "JPEG")[:700], 400),
    "a PNG with a wrong checksum": (encoded(FINE)[:-20] + b"\x00" * 20, 400),
    "noise for pixels": (png_of(9, 7, chunk(b"IDAT", b"\x00" * 50), END), 400),
    "no width": (png_of(0, 7, END), 415),
    "a bomb": (png_of(60_000, 60_000, chunk(b"IDAT", zlib.compress(bytes(10**6))), END), 400),
    "a bomb of 2^62 pixels": (png_of(2**31 - 1, 2**31 - 1, END), 400),
    "a bomb in one line": (png_of(2**31 - 1, 1, END), 400),
    "a bomb just over the limit": (encoded(Image.new("1", (101, 100))), 400),
    "a JPEG bomb": (encoded(Image.new("L", (2000, 2000)), "JPEG"), 400),
    "a bomb of text": (png_of(9, 7, chunk(b"zTXt", b"a\x00\x00" + zlib.compress(bytes(3 * 10**7))), END), 400),
    "a bomb of a profile": (png_of(9, 7, chunk(b"iCCP", b"a\x00\x00" + zlib.compress(bytes(10**7))), END), 400),
    "floats beyond 1": (encoded(Image.fromarray(np.full((7, 9), 2, np.float32)), "TIFF"), 400),
    "32-bit integers": (encoded(Image.fromarray(np.full((7, 9), 2, np.int32)), "TIFF"), 400),
    "a bomb of another format": (encoded(Image.new("1", (101, 100)), "TIFF"), 400),
}


@pytest.mark.parametrize(("body", "status"), BAD_IMAGES.values(), ids=BAD_IMAGES)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images(client: TestClient, body: bytes, status: int) -> None:
    assert_refused(client.post(ROUTE, content=body, headers={"Content-Type": "image/*"}), status)
    assert_refused(client.post(ROUTE, files={"image": body}), status)
    assert_refused(client.post(ROUTE, content=in_base64(body)), status)


def test_good_images_beside_bad_ones(client: TestClient) -> None:
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        assert client.post(ROUTE, content=encoded(FINE, kind)).status_code == 200
    assert client.post(ROUTE, content=encoded(Image.new("RGB", (100, 100)))).status_code == 200  # as large as may be


def test_a_bomb_is_refused_before_it_goes_off(monkeypatch: pytest.MonkeyPatch) -> None:
    tall = encoded(Image.new("RGB", (4000, 4000)))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("its pixels were read"))
    with pytest.raises(ValueError, match="4000 x 4000 pixels is more than 10000"):
        image_from_file(tall, TINY, 10_000)
    with pytest.raises(MediaTypeError):
        image_from_file(b"", TINY)


FORMS = {
    "no boundary": ("multipart/form-data", b"--x--"),
    "another boundary": ("multipart/form-data; boundary=y", b"--x\r\n\r\n--x--\r\n"),
    "no end": (
        "multipart/form-data; boundary=x",
        b'--x\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n\r\n',
    ),
    "a field": (
        "multipart/form-data; boundary=x",
        b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--x--\r\n',
    ),
    "a hundred fields": (
        "multipart/form-data; boundary=x",
        b'--x\r\nContent-Disposition: form-data; name="mode"\r\n\r\nfull\r\n' * 100 + b"--x--\r\n",
    ),
    "a part of no name": (
        "multipart/form-data; boundary=x",
        b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--\r\n",
    ),
    "a part of no headers": ("multipart/form-data; boundary=x", b"--x\r\n\r\n1\r\n--x--\r\n"),
    "an endless boundary": ("multipart/form-data; boundary=" + "x" * 5000, b"--x--"),
    "an unknown charset": ("multipart/form-data; boundary=x; charset=klingon", b"--x--\r\n"),
    "noise": ("multipart/form-data; boundary=x", np.random.default_rng(1).bytes(2000)),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Starlette leaves an unended part open
@pytest.mark.parametrize(("kind", "body"), FORMS.values(), ids=FORMS)
def test_bad_forms(client: TestClient, kind: str, body: bytes) -> None:
    assert_refused(client.post(ROUTE, content=body, headers={"Content-Type": kind}), 400, 415)


QUERIES = ["mode=half", "mode=", "members=", "members=0", "members=1e3", "members=-1", "members=99999999999999999999"]
QUERIES += [
    "level=nan",
    "level=inf",
    "level=0",
    "alpha=0.1",
    "alpha=x",
    "outputs=",
    "outputs=class,",
    "outputs=abstain",
]
QUERIES += ["url=http://localhost/", "images=1", "outputs=" + "a" * 3000, "%00=1", "mode=%ff", "mode=full&extra=%0a"]
QUERIES += ["mode=full&mode=full", "members=1&members=2", "members=1_0", "members=1_", "members=+1", "members=01"]
QUERIES += ["members=%201", "members=1.0", "members=%D9%A1", "level=0_0.5", "level=.5", "level=5e", "level=0.5%20"]
QUERIES += ["level=0." + "5" * 40, "level=0.5" + "0" * 40 + "text", "members=" + "0" * 40 + "1"]


@pytest.mark.parametrize("query", QUERIES)
def test_bad_options(client: TestClient, query: str) -> None:
    assert_refused(client.post(f"{ROUTE}?{query}", content=npy(tiny_images(1))), 400)
    assert_refused(client.post(f"{ROUTE}?{query}", content=encoded(FINE)), 400)
    assert_refused(client.post(f"{ROUTE}?{query}", json=GOOD), 400)
    fields = [field.partition("=")[::2] for field in query.split("&") if "%" not in query]
    if fields and not any(len(value) > 100 for _, value in fields):
        form = [("images", ("a.png", encoded(FINE))), *((name, (None, value)) for name, value in fields)]
        assert_refused(client.post(ROUTE, files=form), 400)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-300, 300) | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=30,
)


@many
@given(ANYTHING)
def test_any_json(client: TestClient, content: Any) -> None:
    body = json.dumps(content)
    assert_refused(client.post(ROUTE, content=body, headers={"Content-Type": "application/json"}), 400)
    assert_refused(client.post(ROUTE, content=body), 400, 415)


DOCUMENTS = st.recursive(
    st.text('\\"[]{}:,a\u20ac\n', max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('\\"[]{}:a', max_size=4), inner, max_size=3),
    max_leaves=20,
)


def size(document: Any) -> tuple[int, int]:
    """Lists and objects, and names of values, as the parser finds them."""
    if not isinstance(document, list | dict):
        return 0, 0
    inner = [size(one) for one in (document.values() if isinstance(document, dict) else document)]
    names = len(document) if isinstance(document, dict) else 0
    return 1 + sum(lists for lists, _ in inner), names + sum(more for _, more in inner)


@many
@given(DOCUMENTS, st.booleans())
def test_what_is_counted_before_parsing_is_what_the_parser_finds(document: Any, ascii_only: bool) -> None:
    body = json.dumps(document, ensure_ascii=ascii_only).encode()
    lists, names = size(document)
    assert parse(body, Limits(10**6, lists, names)) == document
    for fewer in (Limits(10**6, lists - 1, names), Limits(10**6, lists, names - 1)):
        with pytest.raises(TooLargeError):
            parse(body, fewer)


@many
@given(ANYTHING, st.sampled_from(["images", "mode", "members", "level", "alpha", "outputs"]))
def test_any_field(client: TestClient, content: Any, field: str) -> None:
    answer = client.post(ROUTE, content=json.dumps(GOOD | {field: content}))
    fine = content is None or content in ("full", "exact", "confidence") or content == []
    fine |= (field == "members" and content in (1, 2, 3)) or (field == "level" and isinstance(content, float))
    if answer.status_code != 200 or not (fine and field != "images"):
        assert_refused(answer, *((400, 415) if field == "images" else (400,)))  # a text may be base64 of something


@many
@given(st.data())
def test_a_good_body_with_a_few_bytes_changed(client: TestClient, data: st.DataObject) -> None:
    files = [encoded(FINE), encoded(FINE, "JPEG")]
    good = data.draw(st.sampled_from([json.dumps(GOOD).encode(), npy(tiny_images(1)), in_base64(files[0]), *files]))
    body = bytearray(good)
    for place, byte in data.draw(st.lists(st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)), max_size=4)):
        body[place] = byte
    body = body[: data.draw(st.sampled_from([len(good), len(good) // 2, len(good) - 1, 10]))]
    answer = client.post(ROUTE, content=bytes(body))
    if answer.status_code != 200:
        assert_refused(answer, 400, 415)


@many
@given(st.binary(max_size=300), st.sampled_from([None, *TYPES]))
def test_any_bytes(client: TestClient, body: bytes, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    for start in (b"", b"\x93NUMPY\x01\x00", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"{"):
        assert_refused(client.post(ROUTE, content=start + body, headers=headers), 400, 415)


@many
@given(
    shape=st.lists(st.integers(-5, 10**19), max_size=5),
    descr=st.sampled_from(["|u1", "<i8", "|b1", "<f4", "|O", "|V0", "<U9"]),
)
def test_any_header_of_an_array(client: TestClient, shape: list[int], descr: str) -> None:
    body = npy_header(str(tuple(shape)), descr, pixels=PIXELS)
    if tuple(shape) != (1, *TINY):
        assert_refused(client.post(ROUTE, content=body), 400, 415)


@many
@given(
    st.dictionaries(
        st.sampled_from(["mode", "members", "level", "alpha", "outputs", "other"]),
        st.text(max_size=12) | st.sampled_from([*OUTPUTS, "1", "0.5"]),
        min_size=1,
    )
)
def test_any_query(client: TestClient, query: dict[str, str]) -> None:
    answer = client.post(ROUTE, params=query, content=npy(tiny_images(1)))
    if answer.status_code != 200:
        assert_refused(answer, 400)


def raw(port: int, request: bytes) -> bytes:
    """What a server answers to bytes that no client would send."""
    with socket.create_connection(("127.0.0.1", port), timeout=300) as connection:
        connection.sendall(request)
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
        return answer


def test_a_real_server_under_abuse_and_good_requests_beside_it(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "ensembler.cli", "serve", str(make_bundle(tmp_path / "bundle"))]
    limits = {"ENSEMBLER_MAX_BODY": "1000000", "ENSEMBLER_MAX_BATCH": "4", "ENSEMBLER_MAX_PIXELS": "10000"}
    server = Server(command, tmp_path, port, **limits)
    head = f"POST {ROUTE} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n".encode()
    raws = {
        "a huge header": head + b"X-Long: " + b"a" * 200_000 + b"\r\n\r\n",
        "many headers": head + b"".join(b"X-%d: 1\r\n" % n for n in range(20_000)) + b"\r\n",
        "a huge path": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        "two lengths": head + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        "a negative length": head + b"Content-Length: -1\r\n\r\n",
        "a bad chunk": head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nab\r\n",
        "a body over the limit": head + b"Content-Length: 2000000\r\n\r\n" + b" " * 2_000_000,
    }
    try:
        server.wait_until_ready()
        stop = threading.Event()
        good: list[int] = []

        def keep_asking() -> None:
            with httpx.Client(base_url=server.url, timeout=300) as caller:
                while not stop.is_set():
                    good.append(caller.post(ROUTE, json=GOOD).status_code)

        def another_good_one() -> None:
            before = len(good)
            while len(good) == before:
                assert not asking.done(), asking.result()
                time.sleep(0.001)

        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(keep_asking)
            try:
                for name, request in raws.items():
                    answer = raw(port, request)
                    assert answer[:10] in (b"HTTP/1.1 4", b""), (name, answer[:200])
                    another_good_one()
                with httpx.Client(base_url=server.url, timeout=300) as caller:
                    for body, status in [*BAD_BINARY.values()][::3]:
                        assert_refused(caller.post(ROUTE, content=body, headers=NPY), status)
                    for body, status in [*BAD_IMAGES.values()][::3]:
                        assert_refused(caller.post(ROUTE, content=body, headers={"Content-Type": "image/*"}), status)
                # A caller that says much, sends little and goes.
                with socket.create_connection(("127.0.0.1", port)) as connection:
                    connection.sendall(head + b"Content-Length: 900000\r\n\r\n[[[")
                another_good_one()
            finally:
                stop.set()
            asking.result()
        assert set(good) == {200}
        assert "Traceback" not in server.log.read_text()
    finally:
        server.stop(signal.SIGTERM)
