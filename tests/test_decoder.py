"""Files that take long to decode are refused by their headers, or ended."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ensembler.data.decoding import decode, measure
from ensembler.errors import ShapeError
from ensembler.serve.http import decoder as module
from ensembler.serve.http.batcher import DeadlineError
from ensembler.serve.http.bodies import MediaTypeError
from ensembler.serve.http.decoder import Decoder, most_pixels
from ensembler.serve.runtime.manifest import read_bundle
from tests._runs import TINY, make_bundle
from tests._service import ROUTE, assert_refused, in_process


def file_of(size: int, kind: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((size, size), 50).convert(mode).save(file, kind, **options)
    return file.getvalue()


def of_scans(count: int, size: int = 64) -> bytes:
    """A progressive JPEG whose last scan is repeated, without changing a pixel."""
    content = io.BytesIO()
    Image.new("RGB", (size, size), "teal").save(content, "JPEG", progressive=True)
    file = content.getvalue()
    last = file.rindex(b"\xff\xda")
    scans = count - file.count(b"\xff\xda")
    return file[:-2] + file[last:-2] * scans + file[-2:]


def run(test: Callable[[Decoder], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        decoder = Decoder(TINY, **{"seconds": 300} | options)
        try:
            await test(decoder)
        finally:
            decoder.close()

    asyncio.run(main())


@pytest.mark.parametrize("count", [1, 3, 70])
def test_pixels_are_those_of_training(count: int) -> None:
    files = [
        file_of(20 + number, kind) for number, kind in zip(range(count), ["PNG", "JPEG", "BMP"] * count, strict=False)
    ]

    async def test(decoder: Decoder) -> None:
        expected = np.stack([decode(io.BytesIO(file), TINY[:2]) for file in files])
        np.testing.assert_array_equal(await decoder.decode(files), expected)

    run(test, max_pixels=20_000)


def test_the_scans_of_a_jpeg_are_counted() -> None:
    assert measure(file_of(64, "JPEG")) == (4096, 1)
    assert measure(of_scans(300)) == (4096, 300)
    assert measure(file_of(64)) == (4096, 1)


def test_headers_refuse_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    large, good = file_of(101, mode="1"), file_of(100)
    refused: dict[str, tuple[list[bytes], type[ShapeError]]] = {
        "file 2 of 2: an image of 101 x 101 pixels is more than 10000 pixels": ([good, large], ShapeError),
        "a JPEG of 4096 pixels in 2500 scans": ([of_scans(2500)], ShapeError),
        "more than 320000 pixels in all": ([good] * 33, ShapeError),
        "file 3 of 3: the image is of no format that is read": ([good, good, b"what"], MediaTypeError),
        "bytes are more than an image needs here": ([good + bytes(2 * 2**20)], ShapeError),
    }

    async def test(decoder: Decoder) -> None:
        asked: list[str] = []
        ask = Decoder._ask
        monkeypatch.setattr(
            Decoder, "_ask", lambda self, lane, what, *rest: asked.append(what) or ask(self, lane, what, *rest)
        )
        for sentence, (files, kind) in refused.items():
            with pytest.raises(kind, match=sentence):
                await decoder.decode(files)
        assert set(asked) == {"measure"}
        assert len(await decoder.decode([good] * 32)) == 32

    run(test, max_pixels=10_000)


def test_a_file_that_takes_too_long_or_too_much_memory_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    file = file_of(1000, mode="RGBA")

    async def test(decoder: Decoder) -> None:
        for _ in range(2):
            with pytest.raises(ShapeError, match="too much time or memory"):
                await decoder.decode([file])

    class Over(module.Timer):
        """The time is over at once."""

        def start(self) -> None:
            assert self.interval == 7
            self.function()

    with monkeypatch.context() as patch:
        patch.setattr(module, "Timer", Over)
        run(test, seconds=7, max_pixels=1_000_000)
    monkeypatch.setattr(module, "_MEMORY", -63 * 1_000_000)
    run(test, max_pixels=1_000_000)


def test_the_start_of_a_process_is_not_the_time_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []
    exactly = module._exactly
    monkeypatch.setattr(module, "_exactly", lambda pipe, size: events.append(size) or exactly(pipe, size))

    class Noted(module.Timer):
        def start(self) -> None:
            events.append("begins")
            super().start()

    monkeypatch.setattr(module, "Timer", Noted)

    async def test(decoder: Decoder) -> None:
        await decoder.decode([file_of(32)])

    run(test)
    assert events[:2] == [len(module._READY), "begins"]


def test_deadlines_and_callers_that_leave_end_the_decoding_and_harm_nobody() -> None:
    large, good = file_of(2100, mode="1"), file_of(32)

    async def test(decoder: Decoder) -> None:
        with pytest.raises(DeadlineError):
            await decoder.decode([large], monotonic() - 1)
        await decoder.decode([large])
        process = decoder._slow._process
        assert process is not None and process.poll() is None
        leaving = asyncio.create_task(decoder.decode([large] * 3))
        while not decoder._slow._thread._work_queue.empty() or decoder._slow._process is None:
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        leaving.cancel()
        assert len(await decoder.decode([good])) == 1
        assert len(await decoder.decode([large])) == 1
        with pytest.raises(asyncio.CancelledError):
            await leaving

    run(test, max_pixels=4_500_000)


@pytest.mark.parametrize(
    ("shape", "pixels"), [((32, 32, 3), 2**22), ((224, 224, 3), 12_845_056), ((900, 900, 3), 25_000_000)]
)
def test_the_limit_fits_the_network(shape: tuple[int, int, int], pixels: int) -> None:
    assert most_pixels(shape) == pixels


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield make_bundle(tmp_path_factory.mktemp("decoder") / "bundle")


def test_a_service_refuses_what_its_network_does_not_need(bundle: Path) -> None:
    megapixels = file_of(2100, mode="1")
    with in_process(bundle, ENSEMBLER_MAX_BODY="2000000") as client:
        assert "more than 4194304 pixels" in assert_refused(client.post(ROUTE, content=megapixels), 400)
        answer = client.post(ROUTE, content=of_scans(5000, 256))
        assert "scans" in assert_refused(answer, 400)
        assert client.post(ROUTE, content=file_of(32)).status_code == 200
        late = client.post(ROUTE, content=file_of(32), headers={"X-Deadline-Ms": "0"})
        assert late.status_code == 504
    with in_process(bundle, ENSEMBLER_MAX_PIXELS="4500000", ENSEMBLER_MAX_BODY="2000000") as client:
        assert client.post(ROUTE, content=megapixels).status_code == 200


@pytest.fixture(scope="module")
def hostile() -> tuple[bytes, bytes]:
    """A progressive JPEG of 2,500 scans, and a PNG of 25 megapixels."""
    file = io.BytesIO()
    Image.new("1", (5000, 5000)).save(file, "PNG")
    return of_scans(2500, 2000), file.getvalue()


@pytest.mark.parametrize("sent", ["json", "instances", "form", "kserve"])
def test_files_are_read_within_the_same_limits_however_they_are_sent(
    bundle: Path, hostile: tuple[bytes, bytes], sent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (scans, megapixels), good = hostile, file_of(32)
    name = read_bundle(bundle).run.name
    with in_process(bundle, ENSEMBLER_MAX_BODY="5000000") as client:

        def ask(*files: bytes, **headers: str) -> Any:
            texts = [base64.b64encode(file).decode() for file in files]
            if sent == "form":
                return client.post(ROUTE, files=[("images", file) for file in files], headers=headers)
            if sent == "kserve":
                tensor = {"name": "images", "datatype": "BYTES", "shape": [len(files)], "data": texts}
                return client.post(f"/v2/models/{name}/infer", json={"inputs": [tensor]}, headers=headers)
            body = {"images": texts} if sent == "json" else {"instances": [{"b64": text} for text in texts]}
            return client.post(ROUTE, json=body, headers=headers)

        asked: list[str] = []
        ask_process = Decoder._ask
        monkeypatch.setattr(
            Decoder, "_ask", lambda self, lane, what, *rest: asked.append(what) or ask_process(self, lane, what, *rest)
        )
        assert "a JPEG of 4000000 pixels in 2500 scans" in assert_refused(ask(scans), 400)
        assert "5000 x 5000 pixels is more than 4194304" in assert_refused(ask(megapixels), 400)
        assert "file 2 of 2" in assert_refused(ask(good, scans), 400)
        assert asked.count("decode") == 0  # which would take minutes
        assert ask(good, **{"X-Deadline-Ms": "0"}).status_code == 504
        assert ask(good, good).status_code == 200
        monkeypatch.setattr(module._Job, "run", lambda self, process: (None, b""))  # as of a process that was ended
        assert "too much time or memory" in assert_refused(ask(good), 400)
