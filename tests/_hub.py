"""A stand-in for the Hugging Face Hub: as much of its HTTP as pushing to and pulling from a model repository needs.

Every file goes inline in a commit, as the Hub lets small ones; its store for large files is not imitated.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Commit = dict[str, bytes]


class Hub:
    """Repositories by name, each a list of commits, of which the last is ``main``; who may write sends ``token``."""

    token = "hf_test"

    def __init__(self) -> None:
        self.repositories: dict[str, list[Commit]] = {}
        self.visibility: dict[str, str | None] = {}
        self.address = ""
        self.before_commit = lambda: None  # what another does meanwhile

    def create(self, name: str, visibility: str | None = None) -> None:
        self.repositories[name] = [{".gitattributes": b""}]
        self.visibility[name] = visibility

    @staticmethod
    def sha(commits: list[Commit], number: int) -> str:
        return hashlib.sha1(f"{number} {sorted(commits[number])}".encode()).hexdigest()

    def at(self, name: str, revision: str) -> tuple[str, Commit]:
        commits = self.repositories[name]
        numbers = [n for n in range(len(commits)) if revision in ("main", self.sha(commits, n))]
        return self.sha(commits, numbers[-1]), commits[numbers[-1]]

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:  # noqa: PLR0911  one a route
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            if name in self.repositories:
                return 409, {"url": f"{self.address}/{name}"}
            told = {True: "private", False: "public", None: None}[wanted.get("private")]  # before huggingface_hub 1
            self.create(name, wanted.get("visibility", told))
            return 200, {"url": f"{self.address}/{name}"}
        match = re.fullmatch(r"/api/models/(\w+/\w+)/(\w[\w-]*)/([^/]+)(?:/.*)?", path)
        found = match or re.fullmatch(r"/(\w+/\w+)/(resolve)/([^/]+)/(.*)", path)
        if not found or found[1] not in self.repositories:
            return 404, "RepoNotFound"
        name, what, revision = found[1], found[2], unquote(found[3])
        try:
            sha, files = self.at(name, revision)
        except IndexError:
            return 404, "RevisionNotFound"
        if what == "resolve":
            return (200, files[unquote(found[4])]) if unquote(found[4]) in files else (404, "EntryNotFound")
        if what == "revision":
            return 200, {"id": name, "sha": sha, "siblings": [{"rfilename": file} for file in files]}
        if what == "tree":
            return 200, [
                {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for file, content in files.items()
            ]
        if what == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]}
        if what == "commit":
            self.before_commit()
            header, *lines = [json.loads(line) for line in body.splitlines()]
            if header["value"].get("parentCommit") != self.at(name, revision)[0]:
                return 412, "PreconditionFailed"
            added = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines}
            self.repositories[name].append(files | added)
            return 200, {"commitUrl": f"{self.address}/{name}/commit/x", "commitOid": self.at(name, "main")[0]}
        return 400, f"{method} {path}"


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """The hub's address."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            allowed = self.headers.get("Authorization") == f"Bearer {hub.token}"
            private = any(kind == "private" and f"/{name}" in path for name, kind in hub.visibility.items())
            if not allowed and (self.command == "POST" or private):
                status, answer = 401, "no"
            else:
                status, answer = hub.answer(self.command, path, body)
            said = {"error": answer} if isinstance(answer, str) else answer
            content = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            if isinstance(answer, str):
                self.send_header("X-Error-Code", answer)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub.address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
