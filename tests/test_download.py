"""The official archives' way to the disk, from a server that misbehaves in every way we could think of."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ensembler.cli import app
from ensembler.errors import DataError, UsageError
from ensembler.eval.shift import download as module
from ensembler.eval.shift.corruptions import HEADLINE, VALIDATION
from ensembler.eval.shift.download import ARCHIVES, Archive, download

ROOT = Path(__file__).parents[1]
FILES = {f"{name}.npy": 3000 + index for index, name in enumerate(("labels", *HEADLINE, *VALIDATION))}
CONTENT = {name: np.random.default_rng(size).bytes(size) for name, size in FILES.items()}


def tar(members=CONTENT, folder="CIFAR-10-C", extra=()):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as opened:
        for name, content in members.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
        for member, content in extra:
            opened.addfile(member, io.BytesIO(content) if content else None)
    return buffer.getvalue()


def published(content):
    return Archive("CIFAR-10-C", "records/1", len(content), hashlib.md5(content).hexdigest())


class Server(ThreadingHTTPServer):
    """Serves ``content`` as each test wants it to."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = tar()
        self.requests = []  # (path, Range header)
        self.ranges = True
        self.cuts = []  # after how many bytes the next answers break off
        self.statuses = []  # of the next answers, before 200
        self.headers = {}  # in place of the right ones
        self.stall = None  # an event: an answer stops half-way until it is set
        self.base = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # the connection stays open after the last byte, as Zenodo's does

    def do_GET(self):
        server = self.server
        asked = self.headers["Range"]
        server.requests.append((self.path, asked))
        if server.statuses:
            self.send_response(server.statuses.pop(0))
            self.send_header("Content-Length", "0")
            self.send_header("Location", server.base + "/elsewhere")
            self.end_headers()
            return
        first, total = int(asked.split("=")[1][:-1]) if asked and server.ranges else 0, len(server.content)
        self.send_response(206 if first else 200)
        headers = {"Content-Length": total - first}
        if first:
            headers["Content-Range"] = f"bytes {first}-{total - 1}/{total}"
        for name, value in (headers | server.headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        body = server.content[first:]
        if server.stall:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            server.stall.wait(600)
            body = body[len(body) // 2 :]
        if server.cuts:
            body = body[: server.cuts.pop(0)]
            self.close_connection = True
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    if server.stall:
        server.stall.set()
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(server, root, archive=None, waits=(), **options):
    return download(archive or published(server.content), root, base=server.base, waits=waits, **options)


def assert_whole(folder):
    assert folder.name == "CIFAR-10-C"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == CONTENT
    assert {path.name for path in folder.parent.iterdir()} - {"CIFAR-10-C.tar"} == {".CIFAR-10-C.lock", "CIFAR-10-C"}


def test_the_archives_are_the_published_ones():
    for name, archive in [(name, ARCHIVES[name]) for name in ("cifar10c", "cifar100c")]:
        assert archive.files == ("labels.npy", *(f"{each}.npy" for each in HEADLINE + VALIDATION))
        assert len(set(archive.files)) == 20
        assert len(archive.md5) == 32
        assert archive.folder.lower().replace("-", "") == name
        # 19 files of 50,000 images with a header of 128 bytes and one of as many labels, each rounded up to blocks of
        # 512 and preceded by one; the folder's own block; two empty ones at the end. CIFAR-100-C has a README as well.
        blocks = 19 * (1 - -(128 + 50_000 * 3072) // 512) + (1 - -(128 + 50_000) // 512) + 1 + 2
        assert archive.size - 512 * blocks == (0 if name == "cifar10c" else 3 * 512)
    assert module.HOST + "/" + ARCHIVES["cifar10c"].path == (
        "https://zenodo.org/records/2535967/files/CIFAR-10-C.tar?download=1"
    )


def test_a_whole_archive_becomes_a_whole_folder(tmp_path, server):
    told = []
    folder = fetch(server, tmp_path / "new" / "root", watch=lambda *now: told.append(now))
    assert_whole(folder)
    assert server.requests == [("/records/1/files/CIFAR-10-C.tar?download=1", None)]
    for stage in ("fetching", "checking", "unpacking"):
        done = [now[1] for now in told if now[0] == f"{stage} CIFAR-10-C"]
        assert done and done == sorted(done)
        assert {now[2] for now in told} == {len(server.content)}
    assert max(now[1] for now in told if now[0].startswith("checking")) == len(server.content)
    assert fetch(server, folder.parent) == folder  # it is there: nothing is asked for
    assert len(server.requests) == 1


def test_a_cut_transfer_goes_on_where_it_stopped(tmp_path, server):
    server.cuts = [20_000, 0]  # the second attempt gets nothing, and there is no third
    with pytest.raises(
        DataError, match=r"the connection was cut; 20,000 of \d\d,\d\d\d bytes were kept: check the net"
    ):
        fetch(server, tmp_path)
    assert (tmp_path / "CIFAR-10-C.tar.partial").read_bytes() == server.content[:20_000]
    assert not (tmp_path / "CIFAR-10-C").exists()
    server.cuts = [10_000]  # cut again, and gone on with at once, as it has got something
    assert_whole(fetch(server, tmp_path))
    assert [asked for _, asked in server.requests] == [None, "bytes=20000-", "bytes=20000-", "bytes=30000-"]


def test_an_attempt_in_vain_is_made_again(tmp_path, server, monkeypatch):
    slept, told = [], []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    server.statuses = [503, 429, 302]
    assert_whole(fetch(server, tmp_path, waits=(2, 5), watch=lambda *now: told.append(now[0])))
    assert slept == [2, 5]
    assert "the server answers 429 Too Many Requests, trying again in 5 s" in told
    assert server.requests[-1] == ("/elsewhere", None)


def test_a_server_without_ranges_starts_again(tmp_path, server):
    (tmp_path / "CIFAR-10-C.tar.partial").write_bytes(b"x" * 5000)
    server.ranges = False
    assert_whole(fetch(server, tmp_path))
    assert server.requests[0][1] == "bytes=5000-"


@pytest.mark.parametrize("size", [0, 1, -1, 10**6])
def test_a_changed_partial_file_is_found_out(tmp_path, server, size):
    partial = tmp_path / "CIFAR-10-C.tar.partial"
    if size > 0:
        partial.write_bytes(b"x" * size)  # one byte that is wrong, or more than there can be
    else:
        partial.write_bytes(server.content[: len(server.content) + size])  # whole, or all but one byte
    if size != 1:
        assert_whole(fetch(server, tmp_path))
        assert [asked for _, asked in server.requests] == {
            0: [],
            -1: [f"bytes={len(server.content) - 1}-"],
            10**6: [None],
        }[size]
        return
    with pytest.raises(DataError, match=r"not the published archive: its MD5 is .*removed: run the command again"):
        fetch(server, tmp_path)
    assert not partial.exists() and not (tmp_path / "CIFAR-10-C").exists()
    assert_whole(fetch(server, tmp_path))


def test_other_bytes_are_not_unpacked(tmp_path, server):
    archive = published(server.content)
    server.content = server.content[:-1] + b"x"
    with pytest.raises(DataError, match=f"not {archive.md5}; nothing was unpacked"):
        fetch(server, tmp_path, archive)
    assert [path.name for path in tmp_path.iterdir()] == [".CIFAR-10-C.lock"]


def test_a_file_fetched_by_hand_is_used_and_kept(tmp_path, server):
    own = tmp_path / "CIFAR-10-C.tar"
    own.write_bytes(server.content[:-1])
    with pytest.raises(DataError, match=r"CIFAR-10-C\.tar is not the published archive.*; remove it, and fetch it"):
        fetch(server, tmp_path)
    own.write_bytes(server.content)
    assert_whole(fetch(server, tmp_path))
    assert own.exists() and not server.requests


@pytest.mark.parametrize(
    ("statuses", "headers", "message"),
    [
        (
            [404],
            {},
            r"the server answers 404 Not Found: fetch CIFAR-10-C\.tar by hand from https://zenodo\.org/records/1",
        ),
        ([403], {}, "the server answers 403 Forbidden"),
        ([416], {}, "the server answers 416"),
        ([], {"Content-Length": 400}, "offers 400 bytes, not the .* is a proxy or a sign-in page between"),
        ([], {"Content-Length": "many"}, "bad Content-Length; 0 of"),
        ([], {"Content-Range": "bytes 7-9/10"}, "offers 10 bytes, not the"),
        ([], {"Content-Range": "nonsense"}, "offers something of unknown size, not the"),
    ],
)
def test_what_a_server_may_say_instead(tmp_path, server, statuses, headers, message):
    partial = tmp_path / "CIFAR-10-C.tar.partial"
    kept = server.content[:1000] if headers.keys() == {"Content-Range"} else b""
    partial.write_bytes(kept)
    server.statuses, server.headers = statuses, headers
    with pytest.raises(DataError, match=message):
        fetch(server, tmp_path)
    assert len(server.requests) == 1
    assert partial.read_bytes() == kept  # what was there is worth more than what such a server gives


def test_no_network_is_one_sentence(tmp_path):
    archive = published(b"never sent")
    with pytest.raises(
        DataError, match=r"cannot fetch CIFAR-10-C from http://127.0.0.1:1: Connection refused; 0 of 10 "
    ):
        download(archive, tmp_path, base="http://127.0.0.1:1", waits=())


def link(name, kind, target="../../outside"):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, None


def sized(name, content=b"evil"):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    return member, content


def test_no_path_in_the_archive_is_followed(tmp_path, server):
    root = tmp_path / "a" / "b"
    server.content = tar(
        extra=[
            *(
                sized(name)
                for name in ("../escape", "/tmp/ensembler-escape", "CIFAR-10-C/../../escape", "CIFAR-10-C/x")
            ),
            link("CIFAR-10-C/evil", tarfile.SYMTYPE),
            sized("CIFAR-10-C/evil/fog.npy"),
            sized("fog.npy"),
        ]
    )
    assert_whole(fetch(server, root))
    assert {path.name for path in tmp_path.rglob("*")} == {"a", "b", "CIFAR-10-C", ".CIFAR-10-C.lock", *CONTENT}
    assert not Path("/tmp/ensembler-escape").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, None])
def test_an_archive_without_a_file_is_refused(tmp_path, server, kind):
    members = {name: content for name, content in CONTENT.items() if name != "fog.npy"}
    server.content = tar(members, extra=[link("CIFAR-10-C/fog.npy", kind, "CIFAR-10-C/snow.npy")] if kind else ())
    with pytest.raises(DataError, match=r"has no CIFAR-10-C/fog\.npy"):
        fetch(server, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".CIFAR-10-C.lock", "CIFAR-10-C.tar.partial"}


@pytest.mark.parametrize("content", [tar()[:30_000], b"no tar at all" * 100])
def test_an_archive_that_is_no_tar_is_refused(tmp_path, server, content):
    server.content = content
    with pytest.raises(DataError, match=r"cannot unpack .*CIFAR-10-C\.tar\.partial: "):
        fetch(server, tmp_path)
    assert not (tmp_path / "CIFAR-10-C").exists()


def test_a_folder_in_the_way_is_refused(tmp_path, server):
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    (folder / "labels.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"lacks gaussian_noise\.npy and 18 more: remove it, and run the command again"):
        fetch(server, tmp_path)
    (folder / "generated.json").write_text("{}")
    with pytest.raises(UsageError, match="holds generated images: move it away"):
        fetch(server, tmp_path)
    for path in folder.iterdir():
        path.unlink()
    assert_whole(fetch(server, tmp_path))  # an empty one is in nobody's way


def test_too_little_room_is_said_before_and_a_full_disk_loses_nothing(tmp_path, server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        with pytest.raises(
            DataError, match=r"GB free, and to fetch and unpack CIFAR-10-C takes 0\.0 GB more: make room"
        ):
            fetch(server, tmp_path)
    assert not server.requests
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"choose another --data$"):  # nothing was fetched, and nothing kept
        fetch(server, tmp_path / "file")
    (tmp_path / "file").unlink()
    opened = Path.open

    def full_disk(path, mode="r", *rest):
        file = opened(path, mode, *rest)
        if path.name not in full:
            return file
        full.discard(path.name)
        file.close()
        return opened(Path("/dev/full"), "wb", buffering=0)

    for name in ("CIFAR-10-C.tar.partial", "fog.npy"):
        full = {name}
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", full_disk)
            with pytest.raises(
                DataError, match=r"cannot write to .*(No space left|Invalid argument).*: make room there"
            ):
                fetch(server, tmp_path)
        assert not (tmp_path / "CIFAR-10-C").exists() and not list(tmp_path.glob(".partial-*"))
    requests = len(server.requests)
    assert_whole(fetch(server, tmp_path))
    assert len(server.requests) == requests  # it was fetched before


def start(server, root):
    code = (
        "import sys; from ensembler.eval.shift import download as d; from ensembler import cli;"
        f"d.ARCHIVES['cifar10c'] = d.Archive(*{[*vars(published(server.content)).values()][:4]!r});"
        f"d.download.__kwdefaults__['base'] = {server.base!r};"
        f"sys.argv = ['ensembler', 'data', 'download', 'cifar10c', '--data', {str(root)!r}]; cli.main()"
    )

    def listen() -> None:  # a test runner in the background hands down an ignored SIGINT
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=listen)  # noqa: PLW1509


def test_ctrl_c_keeps_what_was_fetched_and_two_processes_do_not_meet(tmp_path, server):
    server.stall = threading.Event()
    process = start(server, tmp_path)
    assert process.stderr.readline().startswith("fetching CIFAR-10-C: 0 of 0 MB")
    while not (partial := tmp_path / "CIFAR-10-C.tar.partial").exists() or not partial.stat().st_size:
        assert process.poll() is None
        time.sleep(0.01)
    with pytest.raises(UsageError, match=r"another process is working on .*CIFAR-10-C: let it finish"):
        fetch(server, tmp_path)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "the partial download was kept: run the same command again to resume" in errors
    assert "Traceback" not in errors
    kept = partial.stat().st_size
    assert 0 < kept <= len(server.content) // 2
    server.stall.set()
    assert_whole(fetch(server, tmp_path))
    assert server.requests[-1][1] == f"bytes={kept}-"


def test_the_command(tmp_path, server, monkeypatch):
    monkeypatch.setitem(ARCHIVES, "cifar10c", published(server.content))
    monkeypatch.setitem(download.__kwdefaults__, "base", server.base)
    call = lambda *arguments: CliRunner().invoke(app, ["data", "download", *arguments])  # noqa: E731
    monkeypatch.setenv("ENSEMBLER_DATA", str(tmp_path / "cache"))
    result = call("cifar10c")
    assert result.exit_code == 0, result.output
    assert_whole(tmp_path / "cache" / "CIFAR-10-C")
    assert "unpacking CIFAR-10-C: 0 of 0 MB" in result.stderr
    result = call("cifar10c", "--data", str(tmp_path / "own"), "--quiet")
    assert result.stderr == ""
    assert f"to use it, ensembler eval --shift cifar10c --data {tmp_path / 'own'}" in result.stdout
    server.statuses = [404]
    result = call("cifar10c", "--data", str(tmp_path / "other"))
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: cannot fetch ")
    assert call("imagenet-c").exit_code == 2


# --- archives of images -----------------------------------------------------------------------------------------------


def packed(names, mode):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as opened:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            opened.addfile(member, io.BytesIO(name.encode()))
        link = tarfile.TarInfo("fog/1/cat/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        opened.addfile(link)
    return buffer.getvalue()


def archive(content, **more):
    return Archive("noise", "records/2", len(content), hashlib.md5(content).hexdigest(), files=(), **more)


@pytest.mark.parametrize("compressed", [False, True])
def test_an_archive_of_images_is_unpacked_under_its_own_paths(server, tmp_path, compressed):
    outside = ("../evil.png", "/tmp/evil.png", "fog/../../evil.png", "C:evil.png", "fog\\evil.png", "fog/1/run.sh")
    inside = ("fog/1/cat/0.JPEG", "./fog/1/dog/0.png")
    server.content = packed((*inside, *outside), "w:gz" if compressed else "w")
    one = archive(server.content, within="imagenet-c", suffix=".tar.gz" if compressed else ".tar", host=server.base)
    folder = download(one, tmp_path)
    assert folder == tmp_path / "imagenet-c" / "noise"
    found = {
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file() or path.is_symlink()
    }
    assert found - {"imagenet-c/.noise.lock"} == {
        "imagenet-c/noise/fog/1/cat/0.JPEG",
        "imagenet-c/noise/fog/1/dog/0.png",
    }
    assert server.requests[0][0] == f"/records/2/files/{one.file}?download=1"
    assert download(one, tmp_path) == folder
    assert len(server.requests) == 1


def test_an_archive_without_images_is_refused(server, tmp_path):
    server.content = packed(("../evil.png", "readme.txt"), "w")
    with pytest.raises(DataError, match=r"noise\.tar.* has no image: it is not the published archive"):
        download(archive(server.content, host=server.base), tmp_path)
    assert not (tmp_path / "noise").exists()


def test_every_published_archive_can_be_named():
    from typing import get_args

    from ensembler.eval.data_commands import _Published

    assert {*get_args(_Published)} == {*ARCHIVES}
    assert ARCHIVES["imagenet-c-blur"].path == "records/2235448/files/blur.tar?download=1"
    assert ARCHIVES["cinic10"].file == "CINIC-10.tar.gz"
