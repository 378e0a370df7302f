"""Image files decoded in processes of their own, which are ended at a deadline, and at a limit of memory.

A decoder is C code that runs for as long as a file makes it. So the headers of all of a request's files are read first
(format, pixels, scans), what they refuse costs milliseconds, and the decoding itself happens in two processes of low
priority: one for what its headers promise to be quick, one for the rest, so that no small image waits for large ones.
Between two parts of a request, others have their turn, and a caller that has disconnected is noticed.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock, Timer
from time import monotonic
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ensembler.data.decoding import measure
from ensembler.errors import ShapeError
from ensembler.serve.http.batcher import DeadlineError
from ensembler.serve.http.bodies import MediaTypeError
from ensembler.serve.http.readers import MAX_PIXELS, image_from_file, refused_files

__all__ = ["Decoder", "most_pixels"]

_LEAST_PIXELS = 2**22  # a screenshot
_RATIO = 256  # pixels of a file for each of the network's: of a network for 224 x 224, a photo of 12 megapixels
_FILES = 32  # times the most pixels of a file: the most of a request
_SCANS = 16  # times the most pixels of a file: the most pixels of all scans of a progressive JPEG
_QUICK_PIXELS = 2**22  # of all scans
_QUICK_BYTES = 2**20
_PART = 2**20  # pixels of a part of a request: many small files at a time
_METADATA = 2**20  # bytes of a file beside its pixels
_PIXEL = 8  # bytes of a pixel in a file: four channels of 16 bits
_MEMORY = 256 * 2**20  # bytes that a process may take, beside 64 a pixel
_READY = b"?"  # written by a process that waits for a question
_TOO_MUCH = "the image takes too much time or memory to decode: send a smaller one"


def most_pixels(shape: Sequence[int]) -> int:
    """Return how many pixels a file may have by default, for a network that takes images (H, W, 3)."""
    return min(MAX_PIXELS, max(_LEAST_PIXELS, _RATIO * shape[0] * shape[1]))


class Decoder:
    """Decodes the image files of one worker's requests. Its processes start with the first file.

    Args:
        shape: (H, W, 3) of the images, to which files are resized.
        max_pixels: of one file; by default what :func:`most_pixels` says.
        seconds: that one file may take.
    """

    def __init__(self, shape: Sequence[int], max_pixels: int | None = None, seconds: float = 5.0) -> None:
        self._shape = tuple(shape)
        self._max_pixels = max_pixels or most_pixels(shape)
        self._seconds = seconds
        self._quick, self._slow = _Lane(self._max_pixels), _Lane(self._max_pixels)

    async def decode(self, files: Sequence[bytes], deadline: float = math.inf) -> NDArray[np.uint8]:
        """Return the files' pixels (B, H, W, 3). Cancelling it ends the decoding.

        Args:
            files: each the content of one image file.
            deadline: by :func:`time.monotonic`.

        Raises:
            MediaTypeError: a format that is not read.
            ShapeError: a file that cannot be decoded, that is too large or takes too long, or too many pixels in all.
            DeadlineError: the deadline passed first.
        """
        try:
            async with asyncio.timeout(None if deadline == math.inf else deadline - monotonic()):
                return await self._decode(files)
        except TimeoutError:
            raise DeadlineError(
                "the deadline passed while images were decoded: allow more time, or send fewer or smaller ones"
            ) from None

    def close(self) -> None:
        """End the processes."""
        for lane in (self._quick, self._slow):
            lane.close()

    async def _decode(self, files: Sequence[bytes]) -> NDArray[np.uint8]:
        most = _METADATA + _PIXEL * self._max_pixels
        for number, file in enumerate(files):
            if len(file) > most:
                raise _refusal(
                    f"{len(file)} bytes are more than an image needs here: send a smaller one", number, files
                )
        costs: list[tuple[int, int]] = []
        for part in _parts(files, [len(file) for file in files], _QUICK_BYTES):
            lane = self._quick if sum(map(len, part)) <= _QUICK_BYTES else self._slow
            answer, _ = await self._ask(lane, "measure", part, len(costs), files)
            costs += answer
            if (total := sum(pixels for pixels, _ in costs)) > _FILES * self._max_pixels:
                what = f"the images have more than {_FILES * self._max_pixels} pixels in all (at least {total})"
                raise ShapeError(f"{what}: send fewer at a time, or smaller ones")
        work = [pixels * scans for pixels, scans in costs]
        lane = self._quick if sum(work) <= _QUICK_PIXELS else self._slow
        images = np.empty((len(files), *self._shape), dtype=np.uint8)
        done = 0
        for part in _parts(files, work, _PART):
            _, content = await self._ask(lane, "decode", part, done, files)
            images[done : done + len(part)] = np.frombuffer(content, dtype=np.uint8).reshape(-1, *self._shape)
            done += len(part)
        return images

    async def _ask(
        self, lane: _Lane, what: str, part: Sequence[bytes], first: int, files: Sequence[bytes]
    ) -> tuple[Any, bytes]:
        question = {"what": what, "shape": self._shape, "max_pixels": self._max_pixels}
        answer, content = await lane.ask(_Job(question, part, self._seconds))
        if answer is None:
            raise _refusal(_TOO_MUCH, first, files)
        if "error" in answer:
            kind = MediaTypeError if answer["media"] else ShapeError
            raise _refusal(answer["error"], first + answer["file"], files, kind)
        return answer["costs"], content


def _refusal(
    reason: str, number: int, files: Sequence[bytes], kind: Callable[[str], ShapeError] = ShapeError
) -> ShapeError:
    where = f"file {number + 1} of {len(files)}: " if len(files) > 1 else ""
    return kind(f"{where}{reason}")


def _parts(files: Sequence[bytes], costs: Sequence[int], most: int) -> Iterator[list[bytes]]:
    """Yield the files in order, in parts that cost no more than ``most``, or of one file."""
    part: list[bytes] = []
    spent = 0
    for file, cost in zip(files, costs, strict=True):
        if part and spent + cost > most:
            yield part
            part, spent = [], 0
        part.append(file)
        spent += cost
    if part:
        yield part


class _Job:
    """A question to a process, which is ended where it takes too long or nobody waits for the answer."""

    def __init__(self, question: dict[str, Any], files: Sequence[bytes], seconds: float) -> None:
        self._head = json.dumps(question | {"bytes": [len(file) for file in files]}).encode()
        self._files = files
        self._seconds = seconds
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._over = False

    def run(self, process: Callable[[], subprocess.Popen[bytes]]) -> tuple[dict[str, Any] | None, bytes]:
        """Return the answer and its bytes; ``None`` where the process was ended or ended itself."""
        with self._lock:
            if self._over:
                return None, b""
            self._process = process()
        timer = Timer(self._seconds, self.end)
        assert self._process.stdin and self._process.stdout  # noqa: S101  both are pipes
        try:
            _exactly(self._process.stdout, len(_READY))  # however long it takes to start
            timer.start()
            _write(self._process.stdin, [self._head, *self._files])
            head, content = _read(self._process.stdout), _read(self._process.stdout)
            return json.loads(head), content
        except (OSError, EOFError):
            self.end()
            return None, b""
        finally:
            timer.cancel()
            with self._lock:
                ended, self._over = self._over, True
            if ended:
                self._process.wait()  # the next job must not meet a process that is about to end

    def end(self) -> None:
        """End it, wherever it is."""
        with self._lock:
            if not self._over and self._process is not None:
                self._process.kill()
            self._over = True


class _Lane:
    """One process, and the thread that asks it."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ensembler-decode")
        self._process: subprocess.Popen[bytes] | None = None

    async def ask(self, job: _Job) -> tuple[dict[str, Any] | None, bytes]:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, job.run, self._running)
        except asyncio.CancelledError:
            job.end()
            raise

    def close(self) -> None:
        self._thread.submit(self._end)
        self._thread.shutdown()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            command = [sys.executable, "-m", "ensembler.serve.http.decoder", str(_MEMORY + 64 * self._max_pixels)]
            self._process = subprocess.Popen(  # noqa: S603  our own arguments
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # what decoders say of untrusted files
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for the server, which ends it in time
            )
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with suppress(OSError):
                    if pipe is not None:
                        pipe.close()
            self._process = None


def _write(pipe: IO[bytes], parts: Sequence[bytes]) -> None:
    head, *rest = parts
    pipe.write(struct.pack("<Q", len(head)) + head)
    for part in rest:
        pipe.write(part)
    pipe.flush()


def _read(pipe: IO[bytes]) -> bytes:
    (size,) = struct.unpack("<Q", _exactly(pipe, 8))
    return _exactly(pipe, size)


def _exactly(pipe: IO[bytes], size: int) -> bytes:
    content = pipe.read(size)
    if len(content) < size:
        raise EOFError
    return content


def _answer(question: dict[str, Any], files: Sequence[bytes]) -> tuple[dict[str, Any], bytes]:
    most = question["max_pixels"]
    costs, images = [], []
    for number, file in enumerate(files):
        try:
            if question["what"] == "decode":
                images.append(image_from_file(file, question["shape"], most).tobytes())
            else:
                costs.append(_cost(file, most))
        except ShapeError as error:
            return {"error": str(error), "media": isinstance(error, MediaTypeError), "file": number}, b""
        except MemoryError:
            return {
                "error": "it takes too much memory to decode: send a smaller one",
                "media": False,
                "file": number,
            }, b""
    return {"costs": costs}, b"".join(images)


def _cost(file: bytes, most: int) -> tuple[int, int]:
    with refused_files(most):
        pixels, scans = measure(file, most)
    if pixels * scans > _SCANS * most:
        raise ShapeError(f"a JPEG of {pixels} pixels in {scans} scans: save it with fewer, or as PNG")
    return pixels, scans


def _main() -> None:
    """Answer questions until the pipe is closed."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed is no answer
    with suppress(ImportError, AttributeError, OSError, ValueError):  # not on Windows
        import resource

        os.nice(5)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]),) * 2)
    questions = sys.stdin.buffer
    with suppress(EOFError):
        while True:
            answers.write(_READY)
            answers.flush()
            question = json.loads(_read(questions))
            files = [_exactly(questions, size) for size in question["bytes"]]
            answer, content = _answer(question, files)
            head = json.dumps(answer).encode()
            answers.write(struct.pack("<Q", len(head)) + head + struct.pack("<Q", len(content)) + content)


if __name__ == "__main__":
    _main()
