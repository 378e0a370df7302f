"""Runs and bundles at URLs: what is pushed is pulled byte for byte, and no partial artefact is used."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
import yaml
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from typer.testing import CliRunner

from ensembler import calibration
from ensembler.cli import app
from ensembler.errors import ArtefactError, CorruptError, EnsemblerError, UsageError
from ensembler.run import Run
from ensembler.storage import artefact, urls
from ensembler.storage.artefact import MANIFEST, SEAL
from ensembler.storage.urls import CALIBRATION, CARD, Url, default_folder, is_url, local, name_of, place, pull, push
from tests._hub import Hub, serving
from tests._interrupt import after
from tests._runs import make_bundle, make_run
from tests.test_calibration import made as a_calibration
from tests.test_cli import SMALL

ROOT = Path(__file__).parents[1]
NUMBERS = itertools.count()


class Counting(LocalFileSystem):
    """Reads are noted; and after ``left`` writes the disk is full, in the middle of a file."""

    protocol = "counting"
    left = 10**9
    read: list[str] = []  # noqa: RUF012
    raises: Exception | None = None

    def _spend(self, content: bytes, target: str) -> None:
        if Counting.raises:
            raise Counting.raises
        Counting.left -= 1
        if Counting.left < 0:
            Path(self._strip_protocol(target)).write_bytes(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def put_file(self, lpath, rpath, **options):
        self._spend(Path(lpath).read_bytes(), rpath)
        super().put_file(lpath, rpath, **options)

    def pipe_file(self, path, value, **options):
        self._spend(value, path)
        super().pipe_file(path, value, **options)

    def cat_file(self, path, **options):
        Counting.read.append(Path(path).name)
        return Path(self._strip_protocol(path)).read_bytes()

    def _open(self, path, mode="rb", **options):
        if Counting.raises and Path(path).name not in (MANIFEST, SEAL, CALIBRATION):
            raise Counting.raises
        if mode == "rb":
            Counting.read.append(Path(path).name)
        return super()._open(path, mode, **options)


@pytest.fixture(autouse=True)
def _clean(tmp_path, monkeypatch):
    fsspec.register_implementation("counting", Counting, clobber=True)
    monkeypatch.setattr(Counting, "left", 10**9)
    monkeypatch.setattr(Counting, "raises", None)
    monkeypatch.setattr(Counting, "read", [])
    monkeypatch.chdir(tmp_path)
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def made(path: Path, kind: str = "run", size: int = 1000, seed: int = 0) -> Path:
    """An artefact of noise: storage looks into no file."""
    rng = random.Random(seed)
    manifest = {"kind": kind, "format": 1, "created": f"{seed}"}
    with artefact.write(path, manifest) as folder:
        (folder / "vertices.safetensors").write_bytes(rng.randbytes(size))
        (folder / "deep").mkdir()
        (folder / "deep" / "member-000.onnx").write_bytes(rng.randbytes(size))
        (folder / "empty.jsonl").write_bytes(b"")
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def held(folder: Path) -> list[str]:
    """Everything in a folder, hidden or not."""
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def at(scheme: str, tmp_path: Path, name: str = "mine") -> str:
    return f"{scheme}://" + (f"store/{next(NUMBERS)}/{name}" if scheme == "memory" else f"{tmp_path}/store/{name}")


def calibrate(run: Path) -> bytes:
    found = a_calibration().model_copy(update={"run_sha256": artefact.sha256(run / MANIFEST)})
    return calibration.save(found, run).read_bytes()


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result, *words: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["file", "memory", "counting"])
@pytest.mark.parametrize("kind", ["run", "bundle"])
def test_what_is_pushed_is_pulled_byte_for_byte(scheme, kind, tmp_path):
    source = made(tmp_path / "source", kind)
    if kind == "run":
        calibrate(source)
    url = at(scheme, tmp_path)
    sent = push(source, url)
    assert (sent[0], sent[-1]) == (MANIFEST, SEAL)
    found = pull(url)
    assert found == Path(f"{kind}s", "mine")
    assert content(found) == content(source)  # the calibration, too; the card stays there
    assert content(pull(url, tmp_path / "elsewhere")) == content(source)
    assert content(local(url)) == content(source)
    assert local(url).name == "mine"
    assert local(url) == local(Url(url))
    assert push(source, url) == []
    with pytest.raises(UsageError, match="already exists"):
        pull(url)


def test_a_path_stays_a_path(tmp_path):
    assert local(tmp_path / "x") == tmp_path / "x"
    assert local("runs/x") == Path("runs/x")
    assert place("runs//x") == Path("runs/x")
    assert place("s3://bucket//x") == "s3://bucket//x"
    assert [is_url(text) for text in ("s3://b/x", "file:///x", "C://x", "runs/x", "hf://u/n")] == [1, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("s3://bucket/a/mine/", "mine"),
        ("s3://bucket", "bucket"),
        ("hf://user/model@v1.0", "model"),
        ("gs://b/a b", "a b"),
    ],
)
def test_the_last_part_of_a_url_is_the_name(url, name):
    assert name_of(url) == name


@pytest.mark.parametrize("url", ["file:///a/..", "s3://b/.hidden", "memory://", "file:///a/b\\c", "s3://b/x\n"])
def test_a_url_that_ends_with_no_name_is_refused(url, tmp_path):
    for use in (name_of, local, pull, lambda url: push(made(tmp_path / "source"), url)):
        with pytest.raises(UsageError, match="must end with a name"):
            use(url)


def test_what_the_cache_holds_is_not_fetched_again(tmp_path):
    source, url = made(tmp_path / "source"), at("counting", tmp_path)
    push(source, url)
    Counting.read.clear()
    first = local(url)
    assert {"vertices.safetensors", "member-000.onnx", SEAL, MANIFEST} <= set(Counting.read)
    Counting.read.clear()
    assert local(url) == first
    assert set(Counting.read) == {SEAL, CALIBRATION}

    calibrate(source)  # then what is new comes, and no more
    assert push(source, url) == [CALIBRATION]
    Counting.read.clear()
    second = local(url)
    assert second != first
    assert content(second) == content(source)
    assert set(Counting.read) == {SEAL, CALIBRATION, MANIFEST}
    assert not (first / CALIBRATION).exists()  # whoever works with the first is not disturbed


@pytest.mark.parametrize("name", ["vertices.safetensors", MANIFEST, SEAL])
@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: path.write_bytes(b"x")])
def test_a_damaged_cache_is_fetched_again(name, change, tmp_path):
    source, url = made(tmp_path / "source"), at("file", tmp_path)
    push(source, url)
    change(local(url) / name)
    assert content(local(url)) == content(source)
    (local(url) / CALIBRATION).write_bytes(b"{}")  # nobody pushed it
    assert content(local(url)) == content(source)
    assert list(default_folder().rglob(".*")) == []


# --- what lies there already ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_nothing_is_overwritten(scheme, tmp_path):
    one, other, url = made(tmp_path / "one"), made(tmp_path / "other", seed=1), at(scheme, tmp_path)
    push(one, url)
    with pytest.raises(UsageError, match=r"holds another run or bundle.*choose another URL, or remove"):
        push(other, url)
    with pytest.raises(UsageError, match="holds another run or bundle"):
        urls.check_free(url)
    assert content(pull(url)) == content(one)
    urls.check_free(at(scheme, tmp_path, "free"))


def test_a_push_in_between_is_respected(tmp_path):
    one, other, url = made(tmp_path / "one"), made(tmp_path / "other", seed=1), at("file", tmp_path)
    there = tmp_path / "store" / "mine"
    there.mkdir(parents=True)
    shutil.copy(one / MANIFEST, there)  # where a push of one was broken off
    for refuse in (lambda: push(other, url), lambda: urls.check_free(url)):
        with pytest.raises(UsageError, match=r"another push to .* is running or was interrupted"):
            refuse()
    with pytest.raises(CorruptError, match="incomplete: wait until its push has finished, or push it again"):
        local(url)
    push(one, url)
    assert content(pull(url)) == content(one)


def test_a_folder_of_other_things_and_anothers_card_are_left_alone(tmp_path):
    source, url, there = made(tmp_path / "source"), at("file", tmp_path), tmp_path / "store" / "mine"
    there.mkdir(parents=True)
    (there / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"is not empty, and holds no run or bundle \(thesis.tex\)"):
        push(source, url)
    assert held(there) == ["thesis.tex"]
    (there / "thesis.tex").unlink()
    (there / CARD).write_text("my own card")
    assert CARD not in push(source, url)
    assert (there / CARD).read_text() == "my own card"


def test_two_that_push_to_one_place_at_once_leave_nothing_that_passes_for_whole(tmp_path):
    one, other, url = made(tmp_path / "one"), made(tmp_path / "other", seed=1), at("memory", tmp_path)
    fs = fsspec.filesystem("memory")

    def meanwhile(label, done, total):
        if total > done > total - 100:  # all but the seal
            fs.pipe_file(f"{url}/{MANIFEST}", (other / MANIFEST).read_bytes())

    with pytest.raises(UsageError, match=r"another push to .* ran at the same time"):
        push(one, url, watch=meanwhile)
    with pytest.raises(CorruptError, match="incomplete"):
        pull(url)
    push(other, url)
    assert content(pull(url)) == content(other)


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_the_same_one_again_mends_what_is_missing(scheme, tmp_path):
    source, url = made(tmp_path / "source"), at(scheme, tmp_path)
    push(source, url)
    fs = fsspec.filesystem(scheme)
    for name in ("vertices.safetensors", "deep/member-000.onnx"):
        fs.rm_file(f"{url}/{name}")
        with pytest.raises(CorruptError, match=f"{name} is missing: push again"):
            local(url)
        assert push(source, url) == [name]
    fs.pipe_file(f"{url}/{MANIFEST}", b"{}")
    with pytest.raises(CorruptError, match=r"manifest.json is not what was pushed"):
        local(url)
    assert push(source, url) == [MANIFEST]
    assert content(local(url)) == content(source)


# --- what breaks ------------------------------------------------------------------------------------------------------


def test_a_store_that_fails_after_any_write_is_never_taken_for_whole_and_a_second_push_mends_it(tmp_path):
    source = made(tmp_path / "source")
    calibrate(source)
    writes = len(push(source, at("counting", tmp_path, "all")))
    assert writes == 7
    for n in range(writes):
        url = at("counting", tmp_path, f"after-{n}")
        Counting.left = n
        with pytest.raises(ArtefactError, match=r"cannot write counting://.*No space left on device"):
            push(source, url)
        Counting.left = 10**9
        with pytest.raises(CorruptError, match="incomplete"):
            pull(url)
        with pytest.raises(CorruptError, match="incomplete"):
            local(url)
        assert not Path("runs").exists()
        push(source, url)
        assert content(pull(url, tmp_path / "back" / str(n))) == content(source)


@pytest.mark.parametrize("name", ["vertices.safetensors", "deep/member-000.onnx", MANIFEST, SEAL, CALIBRATION])
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "empty"])
def test_a_damaged_file_there_gets_one_sentence_and_leaves_nothing_behind(name, damage, tmp_path):
    source, url = made(tmp_path / "source"), at("file", tmp_path)
    calibrate(source)
    push(source, url)
    file = tmp_path / "store" / "mine" / name
    good = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        middle = len(good) // 2
        bad = {
            "truncated": good[:-9],
            "empty": b"",
            "changed": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
        }
        file.write_bytes(bad[damage])
    if (name, damage) == (CALIBRATION, "missing"):
        assert content(local(url)) == content(source).keys() - {CALIBRATION} or CALIBRATION not in content(local(url))
        return
    for fetch in (pull, local):
        with pytest.raises(CorruptError) as caught:
            fetch(url)
        assert url in str(caught.value)
        assert "\n" not in str(caught.value)
        assert held(Path("runs")) == []
        assert [path for path in default_folder().rglob("*") if path.is_file()] == []


def test_files_that_nobody_named_stay_there(tmp_path):
    source, url = made(tmp_path / "source"), at("file", tmp_path)
    push(source, url)
    (tmp_path / "store" / "mine" / "virus.exe").write_bytes(b"x")
    assert content(pull(url)) == content(source)


@pytest.mark.parametrize(
    "name",
    [
        "../../x",
        "/etc/x",
        "a/../../x",
        "..",
        "a/..",
        "C:x",
        "a\\..\\x",
        "",
        "a//b",
        ".bashrc",
        MANIFEST,
        SEAL,
        CARD,
        "x\n",
    ],
)
def test_a_manifest_names_no_place_outside_its_folder(name, tmp_path):
    there = made(tmp_path / "store" / "mine")
    manifest = json.loads((there / MANIFEST).read_text())
    manifest["files"][name] = hashlib.sha256(b"evil").hexdigest()
    (there / MANIFEST).write_text(json.dumps(manifest))
    (there / SEAL).write_text(f"{artefact.sha256(there / MANIFEST)}  {MANIFEST}\n")
    (tmp_path / "x").write_bytes(b"evil")
    before = sorted(tmp_path.rglob("*"))
    for use in (pull, local, lambda url: push(there, at("memory", tmp_path))):
        with pytest.raises(ArtefactError, match="which is not a file of a run: do not use it"):
            use(f"file://{there}")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("text", ["[]", "{}", "nonsense", '{"kind": "run"}', '{"kind": "run", "files": {"a": 3}}'])
def test_a_sealed_manifest_of_something_else_is_refused(text, tmp_path):
    there = tmp_path / "store"
    there.mkdir()
    (there / MANIFEST).write_text(text)
    (there / SEAL).write_text(f"{artefact.sha256(there / MANIFEST)}  {MANIFEST}\n")
    for use in (pull, local):
        with pytest.raises(ArtefactError, match=r"manifest.json at file:"):
            use(f"file://{there}")
    checkpoint = made(tmp_path / "checkpoint", "checkpoint")
    with pytest.raises(ArtefactError, match="is a checkpoint, not a run or bundle"):
        push(checkpoint, at("memory", tmp_path))


def test_a_changed_run_is_not_pushed(tmp_path):
    source, url = made(tmp_path / "source"), at("memory", tmp_path)
    calibrate(source)
    (source / CALIBRATION).write_bytes((source / CALIBRATION).read_bytes()[:-9])
    with pytest.raises(CorruptError, match=r"calibration.json has changed"):
        push(source, url)
    (source / CALIBRATION).unlink()
    (source / "empty.jsonl").write_bytes(b"x")
    with pytest.raises(CorruptError, match=r"empty.jsonl has changed"):
        push(source, url)
    with pytest.raises(ArtefactError, match="no run or bundle at"):
        push(tmp_path / "nowhere", url)
    with pytest.raises(ArtefactError, match="no run or bundle at memory"):
        local(url)
    assert MemoryFileSystem.store == {}


def python(code: str, *arguments: object, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **options)


PULL = """
import sys
from pathlib import Path
from ensembler import errors
from ensembler.storage import urls
# Each waits here until the other has fetched everything, too.
sys.addaudithook(lambda event, _: event == "os.rename" and (print("renaming", flush=True), sys.stdin.readline()))
try: print(urls.local(sys.argv[1]) if sys.argv[2] == "cache" else urls.pull(sys.argv[1], Path(sys.argv[2])))
except errors.UsageError as error: print(error)
"""
KILLED = """
import os, sys
from pathlib import Path
from ensembler.storage import urls
import ensembler.storage.card, ensembler.calibration, fsspec.implementations.local, yaml
from tests._kills import killed_everywhere
source, url = Path(sys.argv[2]), sys.argv[3]
def push(place): urls.push(source, f"file://{place}/there")
def pull(place): urls.pull(url, place / "out")
def cache(place):
    os.environ["XDG_CACHE_HOME"] = str(place)
    urls.local(url)
print(killed_everywhere(globals()[sys.argv[1]], Path(sys.argv[4])))
"""


def killed_everywhere(what: str, source: Path, url: str, folder: Path) -> list[Path]:
    """The folders in which processes pushed or pulled, each killed at another moment."""
    answer, errors = python(KILLED, what, source, url, folder).communicate()
    folders = sorted(folder.iterdir())
    assert len(folders) == int(answer or 0) + 2 > 12, errors
    return folders


def test_two_processes_pull_the_same_at_once(tmp_path):
    source, url = made(tmp_path / "source"), at("file", tmp_path)
    push(source, url)
    for target in ("cache", tmp_path / "out"):
        pair = [python(PULL, url, target, stdin=subprocess.PIPE) for _ in range(2)]
        for process in pair:
            assert process.stdout.readline() == "renaming\n"
        said = [process.communicate("\n") for process in pair]
        assert [error for _, error in said] == ["", ""]
        answers = sorted(answer.strip() for answer, _ in said)
        if target == "cache":
            assert answers[0] == answers[1]
            assert content(Path(answers[0])) == content(source)
            assert held(Path(answers[0]).parent) == ["mine"]
        else:
            assert answers == [str(target), f"{target} already exists: choose another path, or remove it first"]
            assert content(target) == content(source)
    assert list(tmp_path.rglob(".*")) == []


def test_sigkill_while_pushing(tmp_path):
    source, whole = made(tmp_path / "source"), 0
    for folder in killed_everywhere("push", source, "", tmp_path / "killed"):
        url = f"file://{folder}/there"
        try:
            local(url)
            whole += 1
        except CorruptError as error:
            assert "incomplete" in str(error)
        except ArtefactError as error:
            assert "no run or bundle at" in str(error)
        push(source, url)
        assert content(pull(url, folder / "back")) == content(source)
        shutil.rmtree(default_folder(), ignore_errors=True)
    assert whole == 2, "those that were not killed"


@pytest.mark.parametrize("what", ["pull", "cache"])
def test_sigkill_while_pulling(tmp_path, what, monkeypatch):
    source, url = made(tmp_path / "source"), at("file", tmp_path)
    push(source, url)
    for folder in killed_everywhere(what, source, url, tmp_path / "killed"):
        if what == "cache":
            monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
            assert content(local(url)) == content(source)
        else:
            out = folder / "out"
            assert content(out if out.exists() else pull(url, out)) == content(source)


FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
from ensembler.cli import main
main()
"""


@pytest.mark.parametrize("command", ["push", "pull", "show"])
def test_a_full_disk(command, tmp_path):
    source, url = made(tmp_path / "source", size=200_000), at("file", tmp_path)
    arguments = {"push": ["push", source, url], "pull": ["pull", url, "--out", tmp_path / "out"], "show": ["show", url]}
    if command != "push":
        push(source, url)
    process = python(FULL, *arguments[command])
    _, error = process.communicate()
    assert process.returncode == 1
    assert error.splitlines()[-1].startswith("error: cannot write ")
    assert "File too large" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.rglob(".*")) == []
    assert [path for path in default_folder().rglob("*") if path.is_file()] == []
    push(source, url)
    assert content(pull(url, tmp_path / "out")) == content(source)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000


# --- what cannot be reached -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "package", "mend"),
    [
        ("s3://bucket/x", "s3fs", "pip install 'ensembler[s3]'"),
        ("gs://bucket/x", "gcsfs", "pip install 'ensembler[gcs]'"),
        ("hf://user/x", "huggingface_hub", "pip install 'ensembler[hub]'"),
    ],
)
def test_a_scheme_without_its_package_says_what_to_install(url, package, mend, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    refused(call("pull", url), f"{url} needs a package that is not installed: {mend}")
    refused(call("push", made(tmp_path / "source"), url), mend)
    refused(call("train-fge", "--out", url), mend)


def test_what_is_not_there_and_what_is_no_url(tmp_path):
    refused(call("pull", "nothing://x/y"), "cannot reach nothing://x/y: ", "nothing")
    refused(call("pull", f"file://{tmp_path}/nowhere"), f"no run or bundle at file://{tmp_path}/nowhere")
    refused(call("show", "memory://nowhere"), "no run or bundle at memory://nowhere")
    refused(call("pull", "runs/x"), "runs/x is not a URL")
    refused(call("push", "runs/x"), "push takes a run or bundle, and the URL to push it to", "which runs/x is not")
    refused(call("pull", "s3://"), "s3:// must end with a name", "such as s3://BUCKET/NAME")
    refused(call("push", "a", "b", "memory://c"), "push takes a run or bundle, and the URL")
    refused(call("push", "memory://x"), "no run in runs")
    refused(
        call("push", made(tmp_path / "source"), "memory://x/y", "--public"),
        "--private and --public are for repositories",
    )
    (tmp_path / "file").write_bytes(b"")
    refused(call("push", tmp_path / "source", f"file://{tmp_path}/file/x", "--quiet"), "cannot write file://")


def test_a_server_that_fails_is_not_taken_for_one_that_has_no_file(tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    run, failing = made(tmp_path / "runs" / "mine"), set()
    calibrate(run)

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path / "runs"))

        def send_head(self):
            if self.path.rpartition("/")[2] in failing:
                return self.send_error(503)
            return super().send_head()

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"http://127.0.0.1:{server.server_port}"
        for name in ("calibration.json", "manifest.sha256", "vertices.safetensors"):
            failing.add(name)
            refused(call("pull", f"{host}/mine", "--out", "new/run", "--quiet"), f"cannot read {host}/mine: 503")
            failing.remove(name)
        assert not Path("new").exists()  # nor a run without its calibration
        refused(call("pull", f"{host}/other"), f"no run or bundle at {host}/other")
        pull(f"{host}/mine", "new/run")
        assert content(Path("new/run")) == content(run)
        refused(call("push", run, f"{host}/new"), f"{host}/new can only be read: push to")
        refused(call("train-fge", "--out", f"{host}/new"), f"{host}/new can only be read: push to")
        server.shutdown()
    refused(call("pull", f"{host}/mine", "--quiet"), f"cannot read {host}/mine: ", "check the URL and the network")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            PermissionError(errno.EACCES, "Access Denied"),
            "Access Denied: check that the credentials in the environment",
        ),
        (
            type("NoCredentialsError", (Exception,), {})("Unable to locate"),
            "Unable to locate: check that the credentials",
        ),
        (OSError(28, "No space left on device"), "No space left on device: make room, and try again"),
        (ConnectionError("network is\nunreachable"), "network is: check the URL and the network, and try again"),
        (TimeoutError(), "TimeoutError: check the URL and the network"),
        (FileNotFoundError("The specified bucket does not exist"), "does not exist: check the URL, or create it"),
    ],
)
def test_what_a_file_system_raises_becomes_one_sentence(error, words, tmp_path):
    source, url = made(tmp_path / "source"), at("counting", tmp_path)
    Counting.raises = error
    refused(call("push", source, url, "--quiet"), f"cannot write {url}: ", words)
    Counting.raises = None
    push(source, url)
    Counting.raises = error
    if not isinstance(error, FileNotFoundError):
        refused(call("pull", url, "--quiet"), f"cannot read {url}: ", words)
        assert not Path("runs/mine").exists()


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path, images):
    result = call("train-simplex", "--vertices", 3, "--members", 3, *SMALL, *images, "--out", "made", "--quiet")
    assert result.exit_code == 0, result.output
    return Path("made")


def test_every_command_takes_a_url_where_it_takes_a_run_or_bundle(trained, tmp_path):
    run, bundle = at("file", tmp_path, "a-run"), at("file", tmp_path, "a-bundle")
    sent = call("push", trained, run)
    assert sent.exit_code == 0, sent.output
    assert sent.stdout.startswith(f"pushed: {run} ({MANIFEST}, ")
    assert "pushing to" in sent.stderr
    assert call("push", trained, run).stdout == f"{run} is up to date: nothing was sent\n"
    centroid, here = at("file", tmp_path, "centroid"), ["--device", "cpu", "--quiet"]
    short = ["--points", 3, "--examples", 20, *SMALL[2:], "--quiet"]
    for arguments in (
        ["show", run],
        ["eval", run, *here, "--out", "report"],
        ["collapse", run, "--device", "cpu", "--out", centroid],
        ["compare", run, centroid, "--baseline", run, *here],
        ["surface", run, "--grid", 3, *here],
        ["export", run, "--no-data", "--out", bundle],
        ["verify", bundle],
        ["predict", bundle, tmp_path / "images" / "top" / "0.png"],
        ["train-fge", "--init", run, "--members", 2, "--cycle", 1, *SMALL[2:], "--quiet", "--out", "fge"],
        ["train-curve", run, centroid, *short, "--out", "curve"],
        ["train-complex", run, centroid, *short, "--out", "complex"],
        ["pull", bundle, "--out", "pulled"],
    ):
        result = call(*arguments)
        assert result.exit_code == 0, (arguments, result.output)
    assert json.loads(Path("report/report.json").read_text())["runs"][0]["name"] == "a-run"
    assert Path("runs/centroid").is_dir()
    assert content(Path("bundles/a-bundle")) == content(local(bundle)) == content(Path("pulled"))
    made = {name: Run.load(Path(name)).manifest for name in ("fge", "curve", "complex")}
    starts = made["fge"].settings["init"], made["curve"].options["first"], made["complex"].options["modes"][0]
    assert starts == (run, run, run)  # where it began is written as it was typed
    again = call("train-fge", "--config", "fge", "--quiet", "--out", "again")
    assert again.exit_code == 0, again.output
    assert artefact.sha256(Path("again/vertices.safetensors")) == artefact.sha256(Path("fge/vertices.safetensors"))
    Path("all.yaml").write_text(yaml.safe_dump({"show": {"run": run}, "eval": {"runs": [run], "quiet": True}}))
    for command in ("show", "eval"):
        assert call(command, "--config", "all.yaml").exit_code == 0
    refused(call("calibrate", run), "a calibration is kept with its run: ensembler pull", "ensembler push")
    refused(call("show", bundle), "is a bundle, not a run: give the run that it was exported from")
    refused(call("train-fge", "--out", run), "holds another run or bundle")
    assert call("predict", "http://127.0.0.1:9", tmp_path / "images" / "top" / "0.png").exit_code == 1  # a service's


def test_a_run_is_pushed_when_it_is_finished(tmp_path, images, monkeypatch):
    url = at("counting", tmp_path, "fge")
    train = ["train-fge", "--members", 2, "--cycle", 1, *SMALL, *images, "--quiet"]
    result = call(*train, "--out", url)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-2:] == ["run: runs/fge", f"pushed: {url}"]
    assert content(local(url)) == content(Path("runs/fge"))
    refused(call(*train, "--out", at("counting", tmp_path / "x", "fge")), "runs/fge already exists")

    url = at("counting", tmp_path, "second")
    Counting.left = 2
    failed = call(*train, "--out", url)
    refused(failed, "No space left", f"runs/second is finished and kept; to push it: ensembler push runs/second {url}")
    Counting.left = 10**9
    assert call("push", "runs/second", url).exit_code == 0
    assert content(local(url)) == content(Path("runs/second"))
    assert held(Path("runs")) == ["fge", "latest", "second"]


def test_a_resumed_run_starts_from_its_url_and_is_pushed_where_it_was_to_go(trained, tmp_path, monkeypatch):
    start, url = at("file", tmp_path, "start"), at("file", tmp_path, "resumed")
    push(trained, start)
    train = ["train-fge", "--init", start, "--members", 2, "--cycle", 1, *SMALL[2:], "--quiet", "--checkpoint-every", 0]
    assert call(*train, "--out", "whole").exit_code == 0
    with monkeypatch.context() as patch:
        after(patch, 3)
        assert call(*train, "--out", url).exit_code == 130
    result = call("train-fge", "--resume", "runs/resumed")
    assert result.exit_code == 0, result.output
    assert content(local(url)) == content(Path("runs/resumed"))
    assert Run.load(Path("runs/resumed")).manifest.settings["init"] == start
    for name in ("vertices.safetensors", "members.safetensors"):
        assert Path("runs/resumed", name).read_bytes() == Path("whole", name).read_bytes()


def test_real_runs_and_bundles_load_from_where_they_were_fetched_to(tmp_path):
    from ensembler.serve.runtime.manifest import read_bundle

    run, bundle = make_run(tmp_path / "run"), make_bundle(tmp_path / "bundle")
    for source in (run, bundle):
        push(source, f"memory://real/{source.name}")
    assert Run.load(local("memory://real/run")).manifest == Run.load(run).manifest
    assert read_bundle(local("memory://real/bundle")) == read_bundle(bundle)


# --- the Hugging Face Hub ---------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    file_download = pytest.importorskip("huggingface_hub.file_download")
    sys.modules["huggingface_hub"].HfFileSystem.clear_instance_cache()  # it holds the address of the last test's hub
    hub = Hub()
    with serving(hub) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):  # either may be the one that is read
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        yield hub


def test_a_repository_of_the_hub(hub, tmp_path):
    source, url = make_run(tmp_path / "run"), "hf://user/mine"
    sent = call("push", source, url)
    assert sent.exit_code == 0, sent.output
    assert hub.visibility == {"user/mine": "private"}
    assert len(hub.repositories["user/mine"]) == 2  # the first commit, and one for all the rest
    files = hub.repositories["user/mine"][-1]
    assert files.keys() == {*content(source), CARD, ".gitattributes"}
    assert {name: files[name] for name in content(source)} == content(source)
    assert content(local(url)) == content(source)
    assert content(pull(url)) == content(source)
    assert call("push", source, url).stdout == f"{url} is up to date: nothing was sent\n"
    with pytest.raises(UsageError, match="hf://user/mine holds another run or bundle"):
        push(made(tmp_path / "other"), url)

    calibrate(source)
    assert push(source, url) == [CALIBRATION]
    first = hub.sha(hub.repositories["user/mine"], 1)
    assert CALIBRATION in content(local(url))
    assert CALIBRATION not in content(local(f"{url}@{first}"))  # as it was
    urls.check_free("hf://user/open")
    assert hub.repositories.keys() == {"user/mine"}
    push(source, "hf://user/open", private=False)
    assert hub.visibility["user/open"] == "public"


def test_a_repository_that_another_commits_to_meanwhile_is_not_mixed(hub, tmp_path):
    one, other = made(tmp_path / "one"), made(tmp_path / "other", seed=1)
    hub.create("user/mine")

    def meanwhile() -> None:
        hub.before_commit = lambda: None
        push(other, "hf://user/mine")

    hub.before_commit = meanwhile
    with pytest.raises(ArtefactError, match=r"cannot write hf://user/mine: .*412"):
        push(one, "hf://user/mine")
    assert content(local("hf://user/mine")) == content(other)


def test_repositories_that_cannot_be_had(hub, tmp_path, monkeypatch):
    source = made(tmp_path / "source")
    refused(
        call("pull", "hf://user/nowhere"),
        "no run or bundle at hf://user/nowhere: check the URL; if it is private, set HF_TOKEN",
    )
    refused(call("pull", "hf://mine"), "is not a repository: give hf://USER/NAME")
    push(source, "hf://user/mine")
    refused(call("pull", "hf://user/mine@v9"), "no run or bundle at hf://user/mine@v9")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(call("pull", "hf://user/mine"), "hf://user/mine")
    refused(call("push", source, "hf://user/new"), "cannot write hf://user/new", "check that the credentials")
    with pytest.raises(EnsemblerError):
        local("hf://user/mine")
