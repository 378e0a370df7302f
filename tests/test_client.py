"""`ensembler predict`, and the examples of clients in docs and examples/, in front of a real server."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.cells import cell_len
from typer.testing import CliRunner

from ensembler.cli import app
from ensembler.errors import ArtefactError, ShapeError, UsageError
from ensembler.serve import Runtime, client
from ensembler.serve.client import ServiceError, find_images, predict_files
from tests._runs import TINY, agreeing_weights, make_bundle
from tests._service import Server, free_port, make_calibrated, tiny_images

ROOT = Path(__file__).parents[1]
TOKEN = "correct-horse"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_calibrated(tmp_path_factory.mktemp("client") / "bundle")


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = [sys.executable, "-m", "ensembler.cli", "serve", str(bundle)]
    server = Server(command, tmp_path_factory.mktemp("server"), free_port(), ENSEMBLER_TOKEN=TOKEN)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop(signal.SIGTERM)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of three images and something else; the images are those of ``tiny_images(3)``."""
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    for name, pixels in zip(("a.png", "b.PNG", "deeper/c.png"), tiny_images(3), strict=True):
        Image.fromarray(pixels).save(folder / name, "PNG")
    (folder / "notes.txt").write_text("hello")
    return folder


def test_images_are_found(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c = (pictures / name for name in ("a.png", "b.PNG", "deeper/c.png"))
    assert find_images([str(pictures)]) == [a, b, c]
    assert find_images([str(c), str(pictures)]) == [c, a, b]  # each once
    assert find_images([str(pictures / "*.png")]) == [a]
    assert find_images([str(pictures / "**" / "*.png")]) == [a, c]
    monkeypatch.chdir(pictures)
    assert find_images(["*.png", "b.PNG"]) == [Path("a.png"), Path("b.PNG")]
    Path("[odd].png").write_bytes(Path("a.png").read_bytes())
    assert find_images(["[odd].png"]) == [Path("[odd].png")]  # a file before a pattern
    for wrong, reason in {"nothing.png": "no image at", "*.gif": "holds no image", "deeper/empty": "holds no"}.items():
        Path("deeper/empty").mkdir(exist_ok=True)
        with pytest.raises(UsageError, match=reason):
            find_images([wrong])
    with pytest.raises(UsageError, match="no image was given"):
        find_images([])


def test_a_bundles_answer_is_the_runtimes(bundle: Path, pictures: Path) -> None:
    files = find_images([str(pictures)])
    answer = predict_files(str(bundle), files)
    known = Runtime.load(bundle).predict(tiny_images(3))
    assert [one["image"] for one in answer["predictions"]] == list(map(str, files))
    assert [one["class"] for one in answer["predictions"]] == known.classes.tolist()
    found = np.array([one["probabilities"] for one in answer["predictions"]])
    np.testing.assert_allclose(found, known.probabilities, atol=1e-6)
    assert answer["model"]["members"] == 3
    assert all({"prediction_set", "abstain"} <= one.keys() for one in answer["predictions"])


def test_a_service_and_its_bundle_answer_alike(server: Server, bundle: Path, pictures: Path) -> None:
    files = find_images([str(pictures)])
    for options in ({}, {"mode": "exact"}, {"members": 2}):
        there = predict_files(server.url + "/", files, token=TOKEN, **options)
        here = predict_files(str(bundle), files, **options)
        assert there.keys() == here.keys() and there["model"] == here["model"]
        for one, other in zip(there["predictions"], here["predictions"], strict=True):
            assert one.keys() == other.keys()
            assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)
            assert {key: one[key] for key in ("image", "label", "members_used")} == {
                key: other[key] for key in ("image", "label", "members_used")
            }


def predict(*arguments: Any, exit_code: int = 0, **environment: str) -> str:
    environment = {"ENSEMBLER_TOKEN": ""} | environment
    result = CliRunner().invoke(app, ["predict", *map(str, arguments)], env=environment)
    assert result.exit_code == exit_code, result.output
    return result.output


def test_the_command_prints_a_line_an_image_or_json_or_csv(server: Server, bundle: Path, pictures: Path) -> None:
    known = Runtime.load(bundle).predict(tiny_images(3))
    files = [str(file) for file in find_images([str(pictures)])]
    printed = [json.loads(line) for line in stdout(server.url, pictures, "--json", ENSEMBLER_TOKEN=TOKEN).splitlines()]
    assert [one["image"] for one in printed] == files
    assert [one["label"] for one in printed] == known.labels
    abstains = ["yes" if one["abstain"] else "no" for one in printed]
    header, *lines = stdout(bundle, pictures).splitlines()
    assert header.split() == ["image", "class", "probability", "uncertainty", "abstains"]
    figures = zip(known.probabilities.max(axis=1), known.predictive_entropy, strict=True)
    texts = [[f"{probability:.3f}", f"{entropy:.3f}"] for probability, entropy in figures]
    rows = [[file, label, *own, no] for file, label, own, no in zip(files, known.labels, texts, abstains, strict=True)]
    assert [line.split("  ")[0] for line in lines] == files
    assert [" ".join(line.split()) for line in lines] == [" ".join(row) for row in rows]
    written = pictures / "out.csv"
    assert stdout(bundle, pictures, "--csv", written) == f"predictions: {written}\n"
    assert stdout(bundle, pictures, "--csv", "-") == written.read_text()
    table = list(csv.DictReader(written.read_text().splitlines()))
    assert [[row["image"], row["class"], row["abstains"]] for row in table] == [
        [file, label, no] for file, label, no in zip(files, known.labels, abstains, strict=True)
    ]
    assert [float(row["probability"]) for row in table] == pytest.approx(known.probabilities.max(axis=1).tolist())
    assert [float(row["uncertainty"]) for row in table] == pytest.approx(known.predictive_entropy.tolist())
    assert [json.loads(row["prediction_set"]) for row in table] == [one["prediction_set"] for one in printed]
    assert stdout(bundle, pictures / "a.png", "--mode", "exact").splitlines()[1].split()[-1] == "-"
    refused = CliRunner().invoke(app, ["predict", str(bundle), str(pictures), "--csv", "-", "--json"])
    assert (refused.exit_code, refused.stderr) == (2, "error: --csv excludes --json: give one of them\n")


def stdout(*arguments: Any, **environment: str) -> str:
    result = CliRunner().invoke(app, ["predict", *map(str, arguments)], env={"ENSEMBLER_TOKEN": ""} | environment)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_line_fits_the_terminal_and_is_whole_without_one() -> None:
    long = {"image": f"{'deep/' * 30}name of a picture.png", "label": "a class of a very long name 猫" * 3, "class": 1}
    long |= {"probabilities": [0.25, 0.75], "predictive_entropy": 0.5623, "abstain": True}
    short = long | {"image": "a\x1b[2J.png", "label": "no", "abstain": None}
    answer = {"predictions": [long, short], "errors": []}
    for width in (40, 60, 80, 120):
        lines = client.as_lines(answer, width)
        assert len(lines) == 3 and max(map(cell_len, lines)) <= max(width, 54)
        assert "…" in lines[1] and lines[1].endswith("  0.750        0.562  yes".replace("  0.750", "      0.750"))
    assert "picture.png" in client.as_lines(answer, 80)[1]
    whole = client.as_lines(answer)
    assert long["image"] in whole[1] and long["label"] in whole[1]
    assert whole[2].startswith(r"a\x1b[2J.png") and whole[2].endswith("-")
    fitting = {"predictions": [short], "errors": []}
    assert client.as_lines(fitting, 80) == client.as_lines(fitting)


def test_exact_asks_fewer(pictures: Path, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "many", members=16, weights=agreeing_weights(16))
    full, exact = (
        [json.loads(line) for line in stdout(bundle, pictures, "--json", "--mode", mode).splitlines()]
        for mode in ("full", "exact")
    )
    assert [one["label"] for one in full] == [one["label"] for one in exact]
    assert sum(one["members_used"] for one in exact) < sum(one["members_used"] for one in full) == 48


def test_what_goes_wrong_is_one_line(server: Server, bundle: Path, pictures: Path, tmp_path: Path) -> None:
    def refused(*arguments: Any, **environment: str) -> str:
        lines = predict(*arguments, exit_code=1, **environment).splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ")
        return lines[0]

    image, notes = pictures / "a.png", pictures / "notes.txt"
    assert "needs a token: give it as ENSEMBLER_TOKEN" in refused(server.url, image)
    assert "refuses the token given" in refused(server.url, image, "--token", "another")
    assert "visible ASCII" in refused(server.url, image, "--token", "two words")
    assert "no image at" in refused(bundle, tmp_path / "nothing.png")
    for target in (bundle, server.url):
        assert "notes.txt: the image is of no format that is read" in refused(target, notes, ENSEMBLER_TOKEN=TOKEN)
        assert "ask from 1 to 3" in refused(target, image, "--members", 9, ENSEMBLER_TOKEN=TOKEN)
    assert "no service answers at http://127.0.0.1:" in refused(f"http://127.0.0.1:{free_port()}", image)
    assert "no service answers at http://[bad" in refused("http://[bad", image)
    assert "has no /predictive-uncertainty" in refused(f"{server.url}/ui", image, ENSEMBLER_TOKEN=TOKEN)
    assert "no bundle at" in refused(tmp_path / "nothing", image)
    assert "an address begins with http://" in refused("localhost:3000", image)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ShapeError, match=r"folder\.png: cannot read the file: Is a directory"):
        predict_files(str(bundle), [tmp_path / "folder.png"])
    with pytest.raises(ArtefactError, match="has changed"):
        shutil.copytree(bundle, tmp_path / "damaged")
        (tmp_path / "damaged" / "member-001.onnx").write_bytes(b"")
        predict_files(str(tmp_path / "damaged"), [image])


ANSWER = {"model": {"members": 1}, "predictions": [{"label": "yes"}]}  # to one image


Response = tuple[int, dict[str, str], bytes]


@contextmanager
def scripted(*responses: Response | Callable[[bytes], Response]) -> Iterator[tuple[str, list[bytes]]]:
    """A server that gives these responses, the last one for ever; yields its address and the bodies that it got."""
    left, seen = list(responses), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.rfile.read(int(self.headers["Content-Length"])))
            response = left.pop(0) if len(left) > 1 else left[0]
            status, headers, body = response(seen[-1]) if callable(response) else response
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", seen
        server.shutdown()


def test_a_busy_service_is_asked_again_when_it_says(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(client.time, "sleep", waited.append)
    busy = b'{"error": "busy"}'
    responses = [(503, {"Retry-After": after}, busy) for after in ("3", "soon", "4000")]
    with scripted(*responses, (503, {}, busy), (200, {}, json.dumps(ANSWER).encode())) as (url, seen):
        assert predict_files(url, [pictures / "a.png"])["predictions"][0]["label"] == "yes"
    assert waited == [3.0, 1.0, 30.0, 1.0]
    assert seen == [(pictures / "a.png").read_bytes()] * 5
    with scripted((503, {"Retry-After": "1"}, busy)) as (url, seen), pytest.raises(ServiceError, match="too busy"):
        predict_files(url, [pictures / "a.png"])
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, b"<html>", r"\(status 200\) is no ensembler service"),
        (200, b"[1]", "is no ensembler service"),
        (200, b'{"predictions": 1, "model": 2}', "is no ensembler service"),
        (500, b"oops", r"\(status 500\) is no ensembler service"),
        (500, b'{"error": "the server failed"}', "a.png: the server failed"),
        (302, b"", r"\(status 302\) is no ensembler service"),
    ],
)
def test_somebody_else_answers(pictures: Path, status: int, body: bytes, message: str) -> None:
    with scripted((status, {}, body)) as (url, _), pytest.raises(ServiceError, match=message):
        predict_files(url, [pictures / "a.png"], token=TOKEN)


def test_a_refused_image_is_named_and_a_changed_ensemble_noticed(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = (400, {}, b'{"error": "too many pixels"}')
    with scripted(refused) as (url, _), pytest.raises(ShapeError, match=r"a\.png: too many pixels"):
        predict_files(url, [pictures / "a.png"])
    answers = [(200, {}, json.dumps(ANSWER | {"model": {"members": members}}).encode()) for members in (1, 2)]
    monkeypatch.setattr(client, "_BATCH", 1)
    with scripted(*answers) as (url, _), pytest.raises(ServiceError, match="changed its ensemble"):
        predict_files(url, find_images([str(pictures)]))


@pytest.fixture
def many(tmp_path: Path) -> list[Path]:
    """70 image files, all different."""
    (tmp_path / "many").mkdir()
    for number, pixels in enumerate(tiny_images(70)):
        Image.fromarray(pixels).save(tmp_path / "many" / f"{number:02d}.png")
    return find_images([str(tmp_path / "many")])


def test_a_folder_is_asked_in_batches(
    server: Server, bundle: Path, many: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, requests = [], []
    predict, send = Runtime.predict, client._send
    monkeypatch.setattr(Runtime, "predict", lambda *a, **k: passes.append(len(a[1])) or predict(*a, **k))
    monkeypatch.setattr(client, "_send", lambda *a: requests.append(len(a[2])) or send(*a))
    here, there = predict_files(str(bundle), many), predict_files(server.url, many, token=TOKEN)
    assert passes == requests == [32, 32, 6]
    known = predict(Runtime.load(bundle), tiny_images(70))
    for answer in (here, there):
        assert [one["image"] for one in answer["predictions"]] == list(map(str, many))
        assert [one["label"] for one in answer["predictions"]] == known.labels
    requests.clear()
    monkeypatch.setattr(client, "_BATCH_BYTES", 3 * many[0].stat().st_size)
    again = predict_files(server.url, many[:9], token=TOKEN)
    assert [one["label"] for one in again["predictions"]] == known.labels[:9]
    assert 3 <= len(requests) <= 5


def test_a_batch_that_is_refused_is_halved(many: list[Path]) -> None:
    def at_most(most: int) -> Callable[[bytes], Response]:
        def respond(body: bytes) -> Response:
            count = body.count(b"\x89PNG")
            if count > most:
                return 400, {}, b'{"error": "too many"}'
            return 200, {}, json.dumps(ANSWER | {"predictions": [{"label": "yes"}] * count}).encode()

        return respond

    with scripted(at_most(4)) as (url, seen):
        assert len(predict_files(url, many[:16])["predictions"]) == 16
    assert [body.count(b"\x89PNG") for body in seen] == [16, 8, 4, 4, 8, 4, 4]


def test_the_wrong_images_of_a_folder_are_named_and_the_others_answered(
    server: Server, bundle: Path, many: list[Path]
) -> None:
    many[13].write_bytes(b"no image")
    many[40].write_bytes(many[40].read_bytes()[:60])
    for target in (str(bundle), server.url):
        answer = predict_files(target, many, token=TOKEN)
        assert [one["image"] for one in answer["predictions"]] == [
            str(file) for file in many if file not in (many[13], many[40])
        ]
        assert [(Path(one["image"]).name, one["error"].partition(":")[0]) for one in answer["errors"]] == [
            ("13.png", "the image is of no format that is read"),
            ("40.png", "the image cannot be decoded"),
        ]
        with pytest.raises(ShapeError, match=r"13\.png: the image is of no format that is read"):
            predict_files(target, [many[13]], token=TOKEN)


def test_a_file_that_is_no_image_is_none_there_either(server: Server, bundle: Path, pictures: Path) -> None:
    """Though the service reads other bodies, too."""
    question, array = pictures / "question.png", pictures / "array.png"
    question.write_text(json.dumps({"images": tiny_images(1).tolist()}))
    np.save(array, tiny_images(1))
    array.with_name("array.png.npy").rename(array)
    for file in (question, array):
        for target in (str(bundle), server.url):
            with pytest.raises(ShapeError, match=r"the image is of no format that is read: send PNG or [^,]*$"):
                predict_files(target, [file], token=TOKEN)


def test_predict_answers_what_it_can_and_exits_with_1(bundle: Path, many: list[Path]) -> None:
    (many[0].parent / ".ipynb_checkpoints").mkdir()
    (many[0].parent / ".ipynb_checkpoints" / "0.png").write_bytes(many[0].read_bytes())
    many[13].write_bytes(b"no image")
    done = CliRunner().invoke(app, ["predict", str(bundle), str(many[0].parent), "--json"])
    assert done.exit_code == 1
    *found, refused = map(json.loads, done.stdout.splitlines())
    assert [one["image"] for one in found] == [str(file) for file in many if file != many[13]]
    assert refused["image"] == str(many[13]) and refused["error"].startswith("the image is of no format")
    summary, named, last = done.stderr.splitlines()
    assert summary == f"abstains from {sum(one['abstain'] for one in found)} of {len(found)} images"
    assert named.startswith(f"{many[13]}: the image is of no format that is read")
    assert last == f"error: 1 of {len(many)} images could not be read and has no answer"


def test_the_python_example(server: Server, pictures: Path, bundle: Path) -> None:
    script = ROOT / "examples" / "client.py"
    code = [line for line in script.read_text().split('"""', 2)[2].splitlines() if line]
    assert len([line for line in code if not line.startswith(("import", "from"))]) <= 10
    files = find_images([str(pictures)])
    environment = os.environ | {"ENSEMBLER_TOKEN": TOKEN, "BENTOML_DO_NOT_TRACK": "True"}
    command = [sys.executable, script, server.url, *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    known = Runtime.load(bundle).predict(tiny_images(3))
    printed = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[:2] for row in printed] == [[str(file), label] for file, label in zip(files, known.labels, strict=True)]
    assert [float(row[2]) for row in printed] == pytest.approx(known.probabilities.max(axis=1).tolist(), abs=0.001)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_examples(server: Server, bundle: Path, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "deploy.md").read_text()
    commands = [line for line in text.replace("\\\n", " ").splitlines() if line.startswith("curl -s ")]
    assert len(commands) == 3
    pixels = tiny_images(2)
    Image.fromarray(pixels[0]).save(tmp_path / "digit.png")
    (tmp_path / "digits.rgb").write_bytes(pixels.tobytes())
    known = Runtime.load(bundle).predict(pixels)
    answers = []
    for command in commands:
        here = command.replace("http://localhost:3000", server.url).replace("32,32,3", ",".join(map(str, TINY)))
        environment = os.environ | {"ENSEMBLER_TOKEN": TOKEN}
        done = subprocess.run(["bash", "-c", here], cwd=tmp_path, env=environment, capture_output=True, check=True)
        answers.append(json.loads(done.stdout))
    image, raw, card = answers
    assert [one["label"] for one in image["predictions"]] == known.labels[:1]
    assert [one["label"] for one in raw["predictions"]] == known.labels
    assert card["manifest"]["classes"] == Runtime.load(bundle).manifest.classes
